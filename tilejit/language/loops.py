"""Device loops: `T.serial`, `T.unroll`, `T.vectorized`, `T.Pipelined`, `T.Parallel`.

Knows their arguments, variables and nodes. Does not know how a `for` statement reaches them
(`constructs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tilejit.dtypes import int32, int64
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    ShapeError,
    Span,
    TraceError,
    UnsupportedError,
    caller_span,
)
from tilejit.ir.analysis import difference
from tilejit.ir.expr import Var, VarKind, arith, int_value, same_width
from tilejit.ir.node import For, LoopKind, Node
from tilejit.ir.node import Parallel as ParallelNode
from tilejit.language.context import require_read_source
from tilejit.language.extents import count
from tilejit.language.schedule import marked
from tilejit.language.trace import FrameKind, current_kernel
from tilejit.language.value import Value, as_index


class DeviceLoop:
    """What `T.serial` and its kin return: goes directly after `in` of a `for` statement."""

    def __init__(self, what: str, kind: FrameKind) -> None:
        self.what = what
        self.kind = kind
        self.span = caller_span()
        self.trace = current_kernel(what)

    def __iter__(self) -> Iterator[Any]:  # the type that a `for` statement wants
        require_read_source(self.what)
        raise TraceError(
            f"{self.what} is a device loop, so Python cannot run through its iterations.",
            hint=f"Write it directly after `in`: `for i in {self.what}(...):`.",
        )

    def variables(self, names: tuple[str, ...]) -> tuple[Var, ...]:
        raise NotImplementedError

    def node(self, variables: tuple[Var, ...], body: tuple[Node, ...]) -> Node:
        raise NotImplementedError

    def rounds(self, names: tuple[str, ...] = ()) -> Iterator[Any]:
        """Open the loop's frame, give its variables once, close it."""
        trace = current_kernel(self.what)
        frame = trace.push(self.kind, self.span)
        loop_vars = self.variables(names)
        values = tuple(Value(v) for v in loop_vars)
        if len(names) > 1 and len(names) != len(values):
            trace.pop(frame)
            raise ArgumentError(
                f"{self.what} gives {count(len(values), 'loop variable')}, but {len(names)} names "
                "take them.",
                span=self.span,
                hint="Write one name for each extent.",
            )
        try:
            yield values[0] if len(values) == 1 else values
        except GeneratorExit:
            trace.failures.append(left_early(self.what, self.span))
            if frame.is_open:
                trace.pop(frame)
            raise
        trace.add(self.node(loop_vars, tuple(trace.pop(frame))))


def left_early(what: str, span: Span | None) -> TraceError:
    """A device loop was left by `break` or `return`."""
    return TraceError(
        f"The loop over {what} is left by `break` or `return`, which tracing sees only once.",
        span=span,
        hint="Use `with T.While(cond):`, or do the rest of the body under `with T.If(cond):`.",
    )


class RangeLoop(DeviceLoop):
    """A loop with a start, a stop and a constant step."""

    def __init__(
        self, what: str, start: object, stop: object, step: object, kind: LoopKind, **fields: Any
    ) -> None:
        super().__init__(what, FrameKind.LOOP)
        if stop is None:
            start, stop = 0, start
        low, high = as_index(start, f"start of {what}"), as_index(stop, f"stop of {what}")
        self.start, self.stop = same_width(low, high)
        self.step = _step(what, step)
        self.loop_kind = kind
        self.fields = fields

    def variables(self, names: tuple[str, ...]) -> tuple[Var, ...]:
        if self.step > 0:
            low, high = self.start, arith("sub", self.stop, 1)
        else:
            low, high = arith("add", self.stop, 1), self.start
        extent = difference(high, low)
        # without rounds the variable never has a value, so no index made of it is out of range
        bounds = None if extent is not None and extent < 0 else (low, high)
        dtype = int64 if self.start.dtype is int64 else int32
        name = names[0] if names else "i"
        return (self.trace.new_var(name, dtype, VarKind.LOOP, bounds, self.span),)

    def node(self, variables: tuple[Var, ...], body: tuple[Node, ...]) -> Node:
        order = self.fields.get("order")
        if order:
            stage, group = self.fields["stage"], self.fields["group"]
            body = marked(body, order, stage, group, self.span)
        return For(
            var=variables[0],
            start=self.start,
            stop=self.stop,
            step=self.step,
            kind=self.loop_kind,
            body=body,
            span=self.span,
            **self.fields,
        )


def _step(what: str, step: object) -> int:
    if step is None:
        return 1
    constant = int_value(as_index(step, f"step of {what}"))
    if constant is None:
        raise ArgumentTypeError(
            f"{what}: the step must be a constant.",
            hint="Loop with step 1 and multiply the variable.",
        )
    if constant == 0:
        raise ArgumentError(
            f"{what}: the step must not be 0.", hint="Leave it out to count up by 1."
        )
    return constant


def _refuse(what: str, **given: object) -> None:
    """Arguments that are in the signature for TileLang's sake, and mean nothing here."""
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{what}: `{name}` is not supported.", hint="Leave it out.")


def serial(
    start: Any, stop: Any = None, step: Any = None, *, annotations: object = None
) -> DeviceLoop:
    """An ordinary loop: `for i in T.serial(n)`, with `range`'s arguments.

    start, stop: integers or traced values; step: a constant other than 0.
    """
    _refuse("T.serial", annotations=annotations)
    return RangeLoop("T.serial", start, stop, step, LoopKind.SERIAL)


def unroll(
    start: Any,
    stop: Any = None,
    step: Any = None,
    *,
    explicit: bool = False,
    unroll_factor: int | None = None,
    annotations: object = None,
) -> DeviceLoop:
    """A loop whose body is repeated in the code, `unroll_factor` rounds at a time or all.

    Raises:
        ArgumentError: bounds that are not constant, without an `unroll_factor`.
    """
    _refuse("T.unroll", annotations=annotations)
    if unroll_factor is not None and (not isinstance(unroll_factor, int) or unroll_factor < 1):
        raise ArgumentError(f"T.unroll: unroll_factor must be positive, got {unroll_factor!r}.")
    loop = RangeLoop("T.unroll", start, stop, step, LoopKind.UNROLL, unroll_factor=unroll_factor)
    is_constant = int_value(loop.start) is not None and int_value(loop.stop) is not None
    if not is_constant and unroll_factor is None:
        raise ArgumentError(
            "T.unroll: the number of rounds must be constant.",
            hint="Give `unroll_factor=4`, or use T.serial.",
        )
    return loop


def vectorized(start: Any, stop: Any = None, *, annotations: object = None) -> DeviceLoop:
    """A loop of constant extent whose rounds are to become one vector access."""
    _refuse("T.vectorized", annotations=annotations)
    loop = RangeLoop("T.vectorized", start, stop, None, LoopKind.VECTORIZED)
    if int_value(arith("sub", loop.stop, loop.start)) is None:
        raise ArgumentError(
            "T.vectorized: the number of rounds must be constant.", hint="Use T.serial."
        )
    return loop


def Pipelined(
    start: Any,
    stop: Any = None,
    num_stages: int | None = None,
    order: Sequence[int] | None = None,
    stage: Sequence[int] | None = None,
    sync: object = None,
    group: Sequence[Sequence[int]] | None = None,
    annotations: object = None,
    split: int | None = None,
) -> DeviceLoop:
    """A loop whose copies into shared memory run ahead of its arithmetic.

    num_stages: slots of each tile that is filled ahead; 0 is a plain loop, None lets the cost
        model choose. With three or more, rounds that exchange by T.cluster_reduce overlap: what one
        sends is made a round before it is taken.
    split: blocks that share the iterations, whose sums are added in a fixed order (split-K); 1 for
        none, None lets the cost model choose where the stages are left open too.
    order, stage: a schedule by hand, one entry a statement of the body: its place in a round (-1
        for copies that are made ahead of all), and how many iterations the round is behind it
        there: statements of the lowest stage are those of the next iteration. Two stages besides
        that of the copies. It takes effect where multiplies are asynchronous.
    group: the statements that an entry of order and stage is for, if for more than one.

    Raises:
        ArgumentError: negative stages, a split below 1 or of a loop that does not only add
            products to accumulators that begin at zero; order, stage and group that do not name
            each statement once, or that change what the loop computes.
    """
    _refuse("T.Pipelined", sync=sync, annotations=annotations)
    if num_stages is not None and (
        isinstance(num_stages, bool) or not isinstance(num_stages, int | np.integer)
    ):
        raise ArgumentTypeError(f"T.Pipelined: num_stages must be an int, got {num_stages!r}.")
    if num_stages is not None and num_stages < 0:
        raise ArgumentError(
            f"T.Pipelined: num_stages must not be negative, got {num_stages}.",
            hint="0 or 1 keeps one copy of each tile; 3 loads two rounds ahead.",
        )
    if split is not None and (isinstance(split, bool) or not isinstance(split, int | np.integer)):
        raise ArgumentTypeError(f"T.Pipelined: split must be an int, got {split!r}.")
    if split is not None and split < 1:
        raise ArgumentError(
            f"T.Pipelined: split must be positive, got {split}.", hint="1 means one block a tile."
        )
    steps, stages = _numbers("order", order), _numbers("stage", stage)
    groups = tuple(_numbers("group", g) for g in _entries("group", group))
    if len(steps) != len(stages):
        raise ArgumentError(
            f"T.Pipelined: order has {len(steps)} entries and stage has {len(stages)}.",
            hint="Give one entry of each for every statement of the body.",
        )
    if min(steps, default=0) < -1:
        raise ArgumentError(
            f"T.Pipelined: order has {min(steps)}; places count from 0 on.",
            hint="-1 is for copies that are made ahead of everything.",
        )
    if groups and not steps:
        raise ArgumentError(
            "T.Pipelined: group is given without order and stage.",
            hint="Give one entry of order and stage for every group.",
        )
    return RangeLoop(
        "T.Pipelined",
        start,
        stop,
        None,
        LoopKind.PIPELINED,
        num_stages=None if num_stages is None else int(num_stages),
        parts=None if split is None else int(split),
        order=steps,
        stage=stages,
        group=groups,
    )


def _entries(name: str, values: object) -> Sequence[object]:
    """What a schedule by hand gives for its statements."""
    if values is None:
        return ()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ArgumentTypeError(f"T.Pipelined: {name} must be a sequence, got {values!r}.")
    return values


def _numbers(name: str, values: object) -> tuple[int, ...]:
    numbers: list[int] = []
    for entry in _entries(name, values):
        if isinstance(entry, bool) or not isinstance(entry, int | np.integer):
            raise ArgumentTypeError(f"T.Pipelined: {name} must hold ints, got {entry!r}.")
        numbers.append(int(entry))
    return tuple(numbers)


class ParallelLoop(DeviceLoop):
    """Independent iterations over a box of constant extents."""

    def __init__(self, extents: tuple[object, ...], coalesced_width: int | None) -> None:
        super().__init__("T.Parallel", FrameKind.PARALLEL)
        outer = self.trace.enclosing(FrameKind.PARALLEL)
        if outer is not None:
            raise TraceError(
                "A T.Parallel cannot be inside another one.",
                related=[(outer.span, "the outer loop")],
                hint="Write one loop over both: `for i, j in T.Parallel(m, n):`.",
            )
        if not extents:
            raise ArgumentError("T.Parallel needs at least one extent.")
        self.extents = tuple(_parallel_extent(e, d) for d, e in enumerate(extents))
        self.coalesced_width = coalesced_width

    def variables(self, names: tuple[str, ...]) -> tuple[Var, ...]:
        defaults = ("i", "j", "k", "l", *(f"i{d}" for d in range(4, len(self.extents))))
        chosen = names if len(names) == len(self.extents) else defaults
        return tuple(
            self.trace.new_var(name, int32, VarKind.PARALLEL, (0, extent - 1), self.span)
            for name, extent in zip(chosen, self.extents, strict=False)
        )

    def node(self, variables: tuple[Var, ...], body: tuple[Node, ...]) -> Node:
        return ParallelNode(
            vars=variables,
            extents=self.extents,
            body=body,
            coalesced_width=self.coalesced_width,
            span=self.span,
        )


def _parallel_extent(extent: object, d: int) -> int:
    constant = int_value(as_index(extent, f"extent {d} of T.Parallel"))
    if constant is None:
        raise ShapeError(
            f"T.Parallel: extent {d} must be a constant, got `{extent!r}`.",
            hint="Loop over a constant tile and guard with `with T.If(i < n):`.",
        )
    if constant <= 0:
        raise ShapeError(
            f"T.Parallel: extent {d} must be positive, got {constant}.",
            hint="A loop that runs no iteration can be left out.",
        )
    return constant


def Parallel(
    *extents: Any,
    coalesced_width: int | None = None,
    loop_layout: object = None,
    prefer_async: object = None,
    annotations: object = None,
) -> DeviceLoop:
    """Independent iterations over a box, spread over the block's threads.

    extents: positive constants. Gives one variable an extent: `for i, j in T.Parallel(m, n)`.
    coalesced_width: elements that a thread takes side by side.
    """
    _refuse(
        "T.Parallel", loop_layout=loop_layout, prefer_async=prefer_async, annotations=annotations
    )
    if coalesced_width is not None and (
        not isinstance(coalesced_width, int) or coalesced_width < 1
    ):
        raise ArgumentError(
            f"T.Parallel: coalesced_width must be positive, got {coalesced_width!r}."
        )
    return ParallelLoop(extents, coalesced_width)
