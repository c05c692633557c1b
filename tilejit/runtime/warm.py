"""Warm calls: those like one made before go from its facts straight to the launch.

Knows the order of a warm call, and what may differ between two calls with equal facts: addresses,
overlap, scalars, captured values, the stream, gradients. Does not know how facts are read
(`facts`), nor what makes a call right: that was checked when a call with these facts went the long
way.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Var
from tilejit.ir.kernel import Program
from tilejit.runtime import arrays, device
from tilejit.runtime.arrays import HOST, ArrayView
from tilejit.runtime.binding import Binder
from tilejit.runtime.device import Executor
from tilejit.runtime.facts import Gather, Key, Slot, Values, make_gather
from tilejit.runtime.frame import TileFrame
from tilejit.runtime.launch import stream_handle, stream_source
from tilejit.runtime.matching import Symbols
from tilejit.runtime.program import Grid, HostProgram

MAX_CALLS = 1024
"""Calls that a function remembers; with more it begins anew, so that sizes that never come back
do not pile up."""

Results = Callable[[Sequence[Any], Sequence[Any]], Any]


@dataclass(frozen=True, slots=True)
class _Step:
    """One kernel of a call. start: launches it on its grid, where that is fixed; order: picks its
    parameters from the call's values; has_spaces: some of them are workspaces."""

    start: Callable[[int, int], None] | None
    pack: Callable[[Sequence[Any]], int]
    order: Callable[[Values], Sequence[Any]]
    frame: TileFrame
    has_spaces: bool


class WarmLaunch:
    """A call with everything settled but addresses, numbers and the stream.

    Holds nothing of the arguments that it was made from.

    variables: what the values of a call are, in order, those that are settled among them; fixed:
    values of those; makers: of fresh outputs; results: what the call returns, from its arguments
    and the outputs; grids: where values decide them; is_refused: true while autograd records what
    the kernel would write unseen.
    """

    def __init__(
        self,
        steps: Sequence[_Step],
        variables: Sequence[Var],
        fixed: Sequence[int],
        ordinal: int,
        stream: Callable[[], int],
        *,
        makers: Sequence[Callable[[], Any]] = (),
        results: Results | None = None,
        grids: Callable[[Mapping[Var, Any]], Sequence[Grid]] | None = None,
        is_refused: Callable[[], bool] | None = None,
    ) -> None:
        self._steps = tuple(steps)
        self._variables = tuple(variables)
        self._fixed = tuple(fixed)
        self._ordinal = ordinal
        self._stream = stream
        self._makers = tuple(makers)
        self._results = results
        self._grids = grids
        self._is_active = device.activity(ordinal)
        self.is_refused = is_refused

    def __call__(self, look: Look, stream: Any) -> Any:
        """Enqueue for a call with other addresses, numbers and stream."""
        made: Sequence[Any] = ()
        pool = look.values + self._fixed
        if self._makers:
            made = [make() for make in self._makers]
            pool += tuple(x.data_ptr() for x in made)
        grids = None
        if self._grids is not None:
            grids = self._grids(dict(zip(self._variables, pool, strict=True)))
        if grids is None or any(all(n > 0 for n in grid) for grid in grids):
            handle = self._stream() if stream is None else stream_handle(stream)
            if self._is_active():
                self._enqueue(pool, grids, handle)
            else:
                with device.active(self._ordinal):
                    self._enqueue(pool, grids, handle)
        if self._results is None:
            return None
        return self._results([look.given[n] for n in look.plan.places], made)

    def _enqueue(self, pool: Values, grids: Sequence[Grid] | None, handle: int) -> None:
        if grids is None:
            for step in self._steps:
                assert step.start is not None, "a fixed grid has its launcher"
                values = step.order(pool)
                if step.has_spaces:
                    values = step.frame.with_spaces(values, self._ordinal, handle)
                step.start(handle, step.pack(values))
            return
        for step, grid in zip(self._steps, grids, strict=True):
            if all(n > 0 for n in grid):
                values = step.frame.with_spaces(step.order(pool), self._ordinal, handle)
                packed = step.pack(values)
                blocks = step.frame.launch_grid(grid, self._ordinal)
                step.frame.loaded.launch(blocks, packed, handle, self._ordinal)


def settle(
    program: Program,
    frames: Sequence[TileFrame],
    host: HostProgram,
    out_idx: Sequence[int],
    values: Sequence[Any],
    symbols: Symbols,
    ordinal: int,
    grids: Callable[[Mapping[Var, Any]], Sequence[Grid]],
) -> WarmLaunch | None:
    """The warm launch for calls like one that was made; None where such calls go the long way.

    values: of all arguments, as `TileKernel.run` takes them; grids: checked, from the values.
    """
    views = [v for v in values if isinstance(v, ArrayView)]
    tensors = [v for a, v in zip(program.arguments, values, strict=True) if isinstance(a, Buffer)]
    inputs = [n for n in range(len(values)) if n not in out_idx]
    arguments = [_variable(program.arguments[n]) for n in inputs]
    given = set(arguments)
    fixed = {v: value for v, value in symbols.items() if v not in given}
    fresh = [program.arguments[n] for n in out_idx] + list(program.outputs)
    shapes = [values[n].shape for n in out_idx]
    if not views or any(v.device == HOST for v in views):
        return None
    if not host.output_variables <= fixed.keys():
        return None
    shapes += [tuple(extents(fixed)) for extents in host.output_shapes]
    makers = [arrays.maker(views[0], s, b.dtype) for s, b in zip(shapes, fresh, strict=True)]
    if None in makers:
        return None
    variables = [*arguments, *fixed, *map(_variable, fresh)]
    is_grid_fixed = host.grid_variables <= fixed.keys()
    settled = grids(fixed) if is_grid_fixed else [None] * len(frames)
    if is_grid_fixed and not any(all(n > 0 for n in grid) for grid in settled if grid):
        return None  # nothing to launch
    steps = [
        _step(frame, grid, variables, ordinal)
        for frame, grid in zip(frames, settled, strict=True)
        if grid is None or all(n > 0 for n in grid)
    ]
    return WarmLaunch(
        steps,
        variables,
        list(fixed.values()),
        ordinal,
        stream_source([*tensors, *views]),
        makers=makers,  # type: ignore[arg-type]
        results=_results(program, out_idx, inputs, fresh),
        grids=None if is_grid_fixed else grids,
        is_refused=_refusal(program, host, values),
    )


def _variable(argument: Buffer | Var) -> Var:
    variable = argument.data if isinstance(argument, Buffer) else argument
    assert isinstance(variable, Var), argument
    return variable


def _step(frame: TileFrame, grid: Grid | None, variables: Sequence[Var], ordinal: int) -> _Step:
    order = frame.order({v: n for n, v in enumerate(variables)})
    if grid is None:
        return _Step(None, frame.packer.pack, order, frame, bool(frame.spaces))
    blocks = frame.launch_grid(grid, ordinal)
    start = frame.loaded.launcher(blocks, ordinal)
    return _Step(start, frame.packer.pack, order, frame, bool(frame.spaces))


def _results(
    program: Program, out_idx: Sequence[int], inputs: Sequence[int], fresh: Sequence[Any]
) -> Results | None:
    """What a call returns; None for nothing."""
    if not out_idx and not program.results:
        return None
    wanted = [program.arguments[n] for n in out_idx] if out_idx else list(program.results)
    arguments = [program.arguments[n] for n in inputs]
    made = {id(b): n for n, b in enumerate(fresh)}
    passed = {id(b): n for n, b in enumerate(arguments)}
    sources = [(id(b) in made, made.get(id(b), passed.get(id(b), 0))) for b in wanted]
    is_tuple = len(wanted) > 1 or (not out_idx and program.returns_tuple)

    def results(given: Sequence[Any], fresh: Sequence[Any]) -> Any:
        found = tuple(fresh[n] if is_made else given[n] for is_made, n in sources)
        return found if is_tuple else found[0]

    return results


def _refusal(
    program: Program, host: HostProgram, values: Sequence[Any]
) -> Callable[[], bool] | None:
    """The test for gradients, where a written tensor may need one."""
    for argument, value in zip(program.arguments, values, strict=True):
        if not isinstance(argument, Buffer) or argument.data not in host.written:
            continue
        if value.framework == "torch" and value.owner.requires_grad:
            return sys.modules["torch"].is_grad_enabled  # type: ignore[no-any-return]
    return None


@dataclass(slots=True)
class _Group:
    """Calls with the same facts. pairs: (bit, i, j, below, above): the tensors at values i and j
    share bytes where the difference of their addresses is between; launches: by the sum of the
    bits of those that do."""

    pairs: tuple[tuple[int, int, int, int, int], ...]
    launches: dict[int, WarmLaunch] = field(default_factory=dict)

    def shared(self, values: Values) -> int:
        found = 0
        for bit, i, j, below, above in self.pairs:
            if below < values[i] - values[j] < above:
                found |= bit
        return found


@dataclass(slots=True)
class _Plan:
    """One way to call: these types of arguments, given so. places: as of `make_gather`."""

    gather: Gather | None
    places: tuple[int, ...] = ()
    groups: dict[Key, _Group] = field(default_factory=dict)


@dataclass(slots=True)
class Look:
    """What a look at a call found: its facts, and the launch if such a call was made before."""

    plan: _Plan
    given: Sequence[Any]
    key: Key
    values: Values
    launch: WarmLaunch | None

    def run(self, stream: Any) -> Any:
        assert self.launch is not None, "only a known call is launched"
        return self.launch(self, stream)


class WarmCalls:
    """The calls that a function has seen on a GPU, by their facts."""

    def __init__(
        self, binder: Binder, slots: Sequence[Slot], captures: Callable[[], int] = int
    ) -> None:
        self._binder = binder
        self._slots = tuple(slots)
        self._captures = captures
        self._plans: dict[Key, _Plan] = {}
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(g.launches) for p in self._plans.values() for g in p.groups.values())

    def look(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Look | None:
        """The facts of a call; None where it goes the long way."""
        if device.executor() is not Executor.GPU:
            return None
        given = (*args, *kwargs.values()) if kwargs else args
        shape = (tuple(kwargs), *map(type, given)) if kwargs else tuple(map(type, given))
        plan = self._plans.get(shape) or self._plan(shape, given, tuple(kwargs))
        if plan.gather is None:
            return None
        try:
            facts, values = plan.gather(*given)
            key = (self._captures(), facts)
            group = plan.groups.get(key)
        except Exception:  # an argument that cannot be read so: the long way takes it or says why
            return None
        launch = None
        if group is not None:
            launch = group.launches.get(group.shared(values))
            if launch is not None and launch.is_refused is not None and launch.is_refused():
                launch = None
        return Look(plan, given, key, values, launch)

    def _plan(self, shape: Key, given: Sequence[Any], keywords: Sequence[str]) -> _Plan:
        kinds = [type(x) for x in given]
        made = make_gather(self._binder, self._slots, kinds, keywords)
        plan = _Plan(None) if made is None else _Plan(*made)
        with self._lock:
            if len(self._plans) >= MAX_CALLS:
                self._plans.clear()
            return self._plans.setdefault(shape, plan)

    def remember(self, before: Look, launch: WarmLaunch, views: Sequence[ArrayView | None]) -> None:
        """Keep the launch of a call that went the long way.

        before: its facts before it did; views: of the tensor that each value is the address of,
        None for other values.
        """
        plan, given = before.plan, before.given
        assert plan.gather is not None, "calls without facts are not remembered"
        try:
            facts, values = plan.gather(*given)
            after = (self._captures(), facts), values
        except Exception:  # an argument is gone: the call was made, and is not remembered
            return
        if after != (before.key, before.values):
            return  # something changed meanwhile, so they are not known to belong together
        with self._lock:
            if self._count >= MAX_CALLS:
                for other in self._plans.values():
                    other.groups.clear()
                self._count = 0
            group = plan.groups.get(before.key)
            if group is None:
                group = _Group(_pairs(views))
            group.launches[group.shared(values)] = launch
            plan.groups[before.key] = group
            self._count += 1


def _pairs(views: Sequence[ArrayView | None]) -> tuple[tuple[int, int, int, int, int], ...]:
    """Of `_Group`, for tensors with elements."""
    spans = [(n, v.address, *v.span) for n, v in enumerate(views) if v is not None and v.size]
    pairs: list[tuple[int, int, int, int, int]] = []
    for (i, a, a_low, a_high), (j, b, b_low, b_high) in itertools.combinations(spans, 2):
        # a_low < b_high and b_low < a_high, each end as it lies from its address
        below, above = (b_low - b) - (a_high - a), (b_high - b) - (a_low - a)
        pairs.append((1 << len(pairs), i, j, below, above))
    return tuple(pairs)
