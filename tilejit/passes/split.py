"""Divides the iterations of a loop that sums into accumulators among several blocks (split-K).

Knows which kernels allow it and how the parts are added: in the order of the parts, by whichever
block comes last, so that two runs give the same bits. Does not know how many parts pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tilejit.dtypes import int32, uint64
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import (
    Expr,
    Var,
    VarKind,
    arith,
    binary,
    cast,
    const,
    index,
    int_value,
    is_const,
    variables,
)
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Load,
    LoopKind,
    Node,
    Parallel,
    Store,
    While,
    all_reads,
    all_writes,
    walk,
)
from tilejit.ir.substitution import substituted
from tilejit.ir.sync import Control, ControlOp, SyncThreads
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.elementwise import loop_variables
from tilejit.ops.gemm import Gemm

MAX_GRID_RANK = 2  # the parts are one more dimension of the grid
ALIGN = 256  # bytes, of memory that the runtime keeps


@dataclass(frozen=True)
class Splittable:
    """A loop of a kernel whose iterations may be divided.

    place: of the loop in the kernel's body. accumulators: what it sums into.
    tiles: blocks of the grid. trips: iterations, where known.
    """

    place: int
    loop: For
    accumulators: tuple[Buffer, ...]
    tiles: int
    trips: int | None


def splittable(kernel: Kernel) -> Splittable | str:
    """The only pipelined loop of a kernel with a multiply, if it does nothing but add products to
    accumulators that begin at zero; else why it cannot be split."""
    grid = [int_value(extent) for extent in kernel.grid]
    if None in grid or len(kernel.block_vars) != len(grid):
        return "the grid is known only when the kernel is launched"
    if len(grid) > MAX_GRID_RANK:
        return "the grid has three dimensions already"
    places = [n for n, node in enumerate(kernel.body) if _is_candidate(node)]
    if len(places) != 1:
        return f"the kernel has {len(places)} pipelined loops with T.gemm at its top"
    (place,) = places
    loop = kernel.body[place]
    assert isinstance(loop, For)
    before, after = kernel.body[:place], kernel.body[place + 1 :]
    sums = tuple(dict.fromkeys(n.acc.buffer for n in loop.body if isinstance(n, Gemm)))
    reason = _more_than_adds(loop, sums) or _not_from_zero(before, sums)
    reason = reason or _left_behind(loop, after)
    if reason:
        return reason
    around = list(walk((*before, *after)))
    adds = any(isinstance(n, Copy) and n.combine is not None for n in around)
    if adds or any(isinstance(n, Gemm | While | Atomic) for n in around):
        return "around it there is a T.gemm, a T.While or an atomic"
    if any(b.scope is Scope.BARRIER for b in kernel.buffers):
        return "the kernel has barriers of its own"
    tiles = 1
    for extent in grid:
        tiles *= extent or 0
    return Splittable(place, loop, sums, tiles, int_value(_trips(loop)))


def _is_candidate(node: Node) -> bool:
    return (
        isinstance(node, For)
        and node.kind is LoopKind.PIPELINED
        and any(isinstance(n, Gemm) for n in node.body)
    )


def _more_than_adds(loop: For, sums: tuple[Buffer, ...]) -> str:
    """What iterations change that outlives them, besides the sums; "" for nothing."""
    copied = [n.dst for n in loop.body if isinstance(n, Copy)]
    tiles = {r.buffer.root for r in copied}
    brought: list[Region] = []
    for node in loop.body:
        if isinstance(node, Gemm):
            for region in (node.a, node.b):
                if region.buffer.root not in tiles:
                    continue
                if not _is_brought(region, brought, copied, loop.var):
                    return "an iteration multiplies what another one has copied"
            if node.clear:
                return "an iteration clears an accumulator"
            if not node.acc.is_whole or {node.a.buffer.root, node.b.buffer.root} & set(sums):
                return "an accumulator is used otherwise"
        elif isinstance(node, Copy):
            scopes = node.src.buffer.root.scope, node.dst.buffer.root.scope
            if scopes != (Scope.GLOBAL, Scope.SHARED):
                return f"an iteration copies to {node.dst.buffer.name}"
            brought.append(node.dst)
        elif not isinstance(node, Load) or node.buffer.root.scope is not Scope.GLOBAL:
            return "an iteration does more than copy and multiply"
    return ""


def _is_brought(
    region: Region, brought: Sequence[Region], copied: Sequence[Region], turn: Var
) -> bool:
    """Whether what an iteration copies before is all that it then uses of what iterations copy:
    places that any of them copies to, and at the same place where places move.

    brought: what has been copied in the iteration until then; copied: in all of it. turn: the
    loop's variable.
    """
    root = region.buffer.root
    mine, all_ = ([r for r in these if r.buffer.root is root] for these in (brought, copied))
    places = {(r.starts, r.extents) for r in mine}
    if any((r.starts, r.extents) not in places for r in all_):
        return False
    moves = any(turn in variables(e) for r in (region, *mine) for e in r.starts)
    return not moves or any(r.starts == region.starts for r in mine)


def _not_from_zero(before: Body, sums: tuple[Buffer, ...]) -> str:
    """Why the accumulators may not be zero when the loop begins; "" when they are, and nothing
    outside of the block changes before."""
    zero: set[Buffer] = set()
    for node in before:
        if any(b.root.scope is Scope.GLOBAL for b in all_writes(node)):
            return "a tensor is written before it"
        for buffer in sums:
            if buffer in {b.root for b in all_writes(node) | all_reads(node)}:
                zero.discard(buffer)
                if isinstance(node, Fill) and is_const(node.value, 0) and node.dst.is_whole:
                    zero.add(buffer)
    names = ", ".join(b.name for b in sums if b not in zero)
    return f"{names} does not begin at zero" if names else ""


def _left_behind(loop: For, after: Body) -> str:
    """Which tile is read after the loop as its last iteration leaves it: blocks that do what
    follows have done other iterations; "" for none."""
    tiles = {b.root for n in loop.body if isinstance(n, Copy) for b in n.writes}

    def stale(body: Body, fresh: frozenset[Buffer]) -> Buffer | None:
        for node in body:
            read = next((b for b in node.reads if b.root in tiles and b not in fresh), None)
            read = read or next(filter(None, (stale(b, fresh) for b in node.bodies)), None)
            if read is not None:
                return read
            if isinstance(node, Copy | Fill) and node.dst.is_whole:
                fresh |= {node.dst.buffer}
        return None

    found = stale(after, frozenset())
    return f"{found.name} is used after it as it leaves it" if found else ""


def _trips(loop: For) -> Expr:
    """Iterations of the loop."""
    span = arith("sub", loop.stop, loop.start)
    if loop.step < 0:
        span = arith("sub", loop.start, loop.stop)
    step = abs(loop.step)
    return arith("max", arith("floordiv", arith("add", span, step - 1), step), 0)


def share_of(loop: For, part: Var, parts: int) -> For:
    """The loop over one of `parts` parts of its iterations, of which the first may have one more
    than the others; counted from 0, so that who compiles it sees whether it has any."""
    trips = _trips(loop)
    each, more = arith("floordiv", trips, parts), arith("floormod", trips, parts)
    first, count = arith("mul", part, each), each
    if int_value(more) != 0:
        first = arith("add", first, arith("min", part, more))
        count = arith("add", count, cast(binary("lt", part, more), int32))
    var = Var(loop.var.name, loop.var.dtype, VarKind.LOOP, index(0), arith("sub", trips, 1))
    place = arith("add", loop.start, arith("mul", arith("add", first, var), loop.step))
    at = {loop.var: cast(place, loop.var.dtype)}
    start, body = index(0), substituted(loop.body, at)
    return replace(loop, var=var, start=start, stop=count, step=1, body=body)


def split_loop(kernel: Kernel, parts: int, why: str = "") -> Kernel:
    """The kernel whose splittable loop is done by `parts` blocks a tile.

    Each writes its sums to memory that the runtime keeps and counts itself; the last one adds them
    up in the order of the parts, and goes on alone. why: blocks do not each add up a part.
    """
    found = splittable(kernel)
    assert isinstance(found, Splittable) and parts > 1, found
    return _Splitter(kernel, found, parts, why).run()


class _Splitter:
    def __init__(self, kernel: Kernel, found: Splittable, parts: int, why: str) -> None:
        self.why = f" ({why})" if why else ""
        self.kernel = kernel
        self.found = found
        self.parts = parts
        self.span = found.loop.span
        self.part = Var("part", int32, VarKind.BLOCK, index(0), index(parts - 1))
        self.counts, count_param = self._workspace("counts", (found.tiles,), is_zeroed=True)
        self.sums: dict[Buffer, Buffer] = {}
        params = [count_param]
        for buffer in found.accumulators:
            shape = (found.tiles, parts, *buffer.extents)
            name = f"{buffer.name}_parts"
            self.sums[buffer], param = self._workspace(name, shape, buffer)
            params.append(param)
        self.params = params

    def _workspace(
        self,
        name: str,
        shape: tuple[int, ...],
        like: Buffer | None = None,
        *,
        is_zeroed: bool = False,
    ) -> tuple[Buffer, Param]:
        taken = {p.name for p in self.kernel.params}
        while name in taken:
            name += "_"
        dtype = int32 if like is None else like.dtype
        var = Var(name, uint64, VarKind.POINTER)
        buffer = Buffer(
            name=name,
            shape=tuple(index(n) for n in shape),
            dtype=dtype,
            scope=Scope.GLOBAL,
            data=var,
            align=ALIGN,
            span=self.span,
        )
        param = Param(
            name=name, kind=ParamKind.WORKSPACE, var=var, buffer=buffer, is_zeroed=is_zeroed
        )
        return buffer, param

    @property
    def tile(self) -> Expr:
        """The number of the block's tile."""
        number: Expr = index(0)
        for var, extent in zip(self.kernel.block_vars, self.kernel.grid, strict=True):
            number = arith("add", arith("mul", number, extent), var)
        return number

    def run(self) -> Kernel:
        kernel, place = self.kernel, self.found.place
        before, after = kernel.body[:place], kernel.body[place + 1 :]
        body = (
            *before,
            share_of(self.found.loop, self.part, self.parts),
            *self.keep(),
            *self.finish(after),
        )
        return replace(
            kernel,
            grid=(*kernel.grid, index(self.parts)),
            block_vars=(*kernel.block_vars, self.part),
            params=(*kernel.params, *self.params),
            body=body,
            parts=self.parts,
            notes=(
                *kernel.notes,
                f"{self.parts} blocks a tile share its iterations; the last adds up their sums"
                f"{self.why}",
            ),
        )

    def keep(self) -> list[Node]:
        """Write the sums, and let everybody know."""
        nodes: list[Node] = []
        for buffer, kept in self.sums.items():
            at = loop_variables(buffer.extents)
            value = Var(buffer.name, buffer.dtype, VarKind.VALUE)
            load = Load(out=value, buffer=buffer, index=at, span=self.span)
            store = Store(
                buffer=kept, index=(self.tile, self.part, *at), value=value, span=self.span
            )
            nodes.append(self._over(at, buffer, (load, store)))
        nodes += [
            Control(op=ControlOp.FENCE_DEVICE, span=self.span),
            SyncThreads(inserted=True, span=self.span),
        ]
        return nodes

    def finish(self, after: Body) -> list[Node]:
        """What the last of a tile's blocks does: add up, make ready for the next launch, go on."""
        before = Var("parts_before", int32, VarKind.VALUE, index(0), index(self.parts - 1))
        count = Atomic(
            buffer=self.counts,
            index=(self.tile,),
            value=const(1, int32),
            out=before,
            span=self.span,
        )
        nodes: list[Node] = [
            Control(op=ControlOp.FENCE_DEVICE, span=self.span),
            Store(buffer=self.counts, index=(self.tile,), value=const(0, int32), span=self.span),
        ]
        for buffer, kept in self.sums.items():
            nodes += self._add_up(buffer, kept)
        is_last = binary("eq", before, const(self.parts - 1, int32))
        return [count, If(condition=is_last, then=(*nodes, *after), span=self.span)]

    def _add_up(self, buffer: Buffer, kept: Buffer) -> list[Node]:
        at = loop_variables(buffer.extents)
        first = Var(kept.name, buffer.dtype, VarKind.VALUE)
        load = Load(out=first, buffer=kept, index=(self.tile, index(0), *at), span=self.span)
        store = Store(buffer=buffer, index=at, value=first, span=self.span)
        start = self._over(at, buffer, (load, store))
        number = Var("other", int32, VarKind.LOOP, index(1), index(self.parts - 1))
        at = loop_variables(buffer.extents)
        sum_, part = (Var(n, buffer.dtype, VarKind.VALUE) for n in (buffer.name, kept.name))
        body = (
            Load(out=sum_, buffer=buffer, index=at, span=self.span),
            Load(out=part, buffer=kept, index=(self.tile, number, *at), span=self.span),
            Store(buffer=buffer, index=at, value=binary("add", sum_, part), span=self.span),
        )
        rest = For(
            var=number,
            start=index(1),
            stop=index(self.parts),
            body=(self._over(at, buffer, body),),
            span=self.span,
        )
        return [start, rest]

    def _over(self, at: tuple[Var, ...], buffer: Buffer, body: Body) -> Parallel:
        """The loop over an accumulator's elements."""
        return Parallel(vars=at, extents=buffer.extents, body=body, span=self.span)
