"""Lets blocks take the next tile when they are free, the longest tiles first.

Knows which tiles have more work than others, and how a block learns which one is next. Does not
know what a tile's work is.

Tiles in a fixed order of blocks end together only where all are alike. Here a counter in memory
that the runtime keeps says how many have been taken; a block's producer takes one ahead of its
consumers and tells them through shared memory. Longest first bounds what the last ones cost
(Graham, "Bounds on multiprocessing timing anomalies", 1969).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tilejit.dtypes import int32, uint64
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, binary, const, index, substitute, variables
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.ir.node import Atomic, Body, For, If, Let, Load, Node, Role, Store, While, walk
from tilejit.ir.sync import BarrierArrive, BarrierWait
from tilejit.layout.shared import SharedLayout
from tilejit.ops.gemm import Gemm
from tilejit.passes.nominal import nominal
from tilejit.passes.tiles import (
    Walk,
    best_group,
    brought_copies,
    is_same_along,
    moving_along,
    tile_bytes,
)

SLOTS = 2  # tiles that consumers have been told of
CACHE_SHARE = 0.5  # of the L2 cache: what tiles that are visited together may read again
ALIGN = 256  # bytes, of memory that the runtime keeps


@dataclass(frozen=True)
class Unevenness:
    """Tiles differ along these axes of the grid; along some of them the last ones are longest."""

    axes: tuple[int, ...]
    rising: tuple[int, ...]


def unevenness(kernel: Kernel) -> Unevenness | None:
    """Along which axes of the grid tiles multiply more or less; None where all are alike."""
    loops = _multiplying(kernel)
    axes: list[int] = []
    rising: list[int] = []
    tiled = len(kernel.grid) - (kernel.parts > 1)  # blocks that share a tile have equal parts
    for axis in range(tiled):
        differing = moving_along(kernel, axis)
        mine = [n for n in loops if any(variables(e) & differing for e in (n.start, n.stop))]
        if mine:
            axes.append(axis)
            first, last = (sum(_rounds(n, kernel, axis, end) for n in mine) for end in (0, 1))
            if last > first:
                rising.append(axis)
    return Unevenness(tuple(axes), tuple(rising)) if axes else None


def _multiplying(kernel: Kernel) -> list[For]:
    """The loops with multiplies in them."""
    loops = [n for n in walk(kernel.body) if isinstance(n, For)]
    return [n for n in loops if any(isinstance(m, Gemm) for m in walk(n.body))]


def _rounds(loop: For, kernel: Kernel, axis: int, end: int) -> float:
    """Of a loop in a tile at the first or last place along an axis."""
    place = (nominal(kernel.grid[axis]) - 1) * end
    mapping: dict[Var, Expr] = {
        kernel.block_vars[axis]: const(place, kernel.block_vars[axis].dtype)
    }
    for node in walk(kernel.body):
        # what no place decides has a typical value of its own
        if isinstance(node, Let) and variables(node.value) & mapping.keys():
            mapping[node.var] = substitute(node.value, mapping)
    start, stop = (nominal(substitute(e, mapping)) for e in (loop.start, loop.stop))
    return max(0.0, (stop - start) / loop.step)


def queue_walk(kernel: Kernel, uneven: Unevenness) -> Queue:
    """The order in which a kernel's uneven tiles are taken: groups of rows whose operands the L2
    cache holds, and in each group the longest tiles first."""
    by_columns = uneven.axes[0] == 1
    group = 1
    if len(kernel.grid) > 1:
        group = _rows_in_cache(kernel, 0 if by_columns else 1, uneven.axes[0])
    walked = Queue(kernel, 1, None, group, by_columns, rising=uneven.rising)
    along = " and ".join("xyz"[d] for d in uneven.axes)
    walked.notes.append(
        f"tiles differ along {along}: each block takes the next one when it is free, "
        f"in groups of {group} along {'x' if by_columns else 'y'}, longest first"
    )
    return walked


def _rows_in_cache(kernel: Kernel, axis: int, uneven: int) -> int:
    """How many rows of tiles along an axis are visited together: as many as share of the cache hold
    what tiles along the uneven axis read again."""
    assert kernel.target is not None, "select did not run"
    again = [c for c in brought_copies(kernel) if is_same_along(c, kernel, uneven)]
    size = 0.0
    for copy in again:
        size += tile_bytes(copy) * max(1.0, _times(kernel, copy))
    if not size:
        return best_group(kernel, 1, None)
    rows = int(kernel.target.chip.cache_bytes * CACHE_SHARE / size)
    return max(1, min(rows, nominal(kernel.grid[axis])))


def _times(kernel: Kernel, copy: Node) -> float:
    """How often a copy is made at most, by the loops around it."""
    result = 1.0
    for loop in (n for n in walk(kernel.body) if isinstance(n, For)):
        if any(n is copy for n in walk(loop.body)):
            ends = [
                _rounds(loop, kernel, axis, e) for axis in range(len(kernel.grid)) for e in (0, 1)
            ]
            result *= max(ends)
    return result


@dataclass
class Queue(Walk):
    """A walk in which the next tile is whichever has not been taken yet.

    rising: axes of the grid that are visited from the end.
    """

    rising: tuple[int, ...] = ()
    taken: Buffer = field(init=False)
    param: Param = field(init=False)
    told: Buffer = field(init=False)
    full: Buffer = field(init=False)
    empty: Buffer = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "tiles_taken"
        while name in {p.name for p in self.kernel.params}:
            name += "_"
        var = Var(name, uint64, VarKind.POINTER)
        self.taken = Buffer(
            name=name, shape=(index(1),), dtype=int32, scope=Scope.GLOBAL, data=var, align=ALIGN
        )
        self.param = Param(
            name=name, kind=ParamKind.WORKSPACE, var=var, buffer=self.taken, is_zeroed=True
        )
        shape = (index(SLOTS),)
        self.told = Buffer(name="next_tiles", shape=shape, dtype=int32, scope=Scope.SHARED)
        self.full = self._barrier("tile_told", 1)
        self.empty = self._barrier("tile_heard", self.kernel.num_threads)

    def _barrier(self, name: str, arrivals: int) -> Buffer:
        counts = (arrivals,) * SLOTS
        shape = (index(SLOTS),)
        return Buffer(
            name=name, shape=shape, dtype=int32, scope=Scope.BARRIER, arrive_counts=counts
        )

    def around(self, body: Body, role: Role | None = None, visit: Var | None = None) -> Body:
        """The loop over the tiles that a block takes; without a role, of the thread that brings
        what they need, which takes them."""
        assert visit is None, "tiles that are taken have no number in their block"
        name = "consumed" if role else "produced"
        tile, count = (
            Buffer(name=f"{name}_{what}", shape=(index(1),), dtype=int32, scope=Scope.VAR)
            for what in ("tile", "tiles")
        )
        counted: list[Node] = []
        total = self._total(counted)
        unit = Var("unit", int32, VarKind.VALUE, index(0), self.last_unit())
        loaded = Var("tile", int32, VarKind.VALUE, index(0))
        done = Var("tiles", int32, VarKind.VALUE, index(0))
        slot = Var("slot", int32, VarKind.VALUE, index(0), index(SLOTS - 1))
        parity = binary("and", arith("floordiv", done, SLOTS), const(1, int32))
        turn: Body = (
            Load(out=done, buffer=count, index=(index(0),)),
            Let(var=slot, value=arith("floormod", done, SLOTS)),
        )
        following = Var("next_tile", int32, VarKind.VALUE, index(0))
        fetched, learned = self._tell(slot, parity, following), self._hear(slot, parity, following)
        ended = (_set(tile, following), _set(count, arith("add", done, 1)))
        work = (
            (*body, *turn, *learned)
            if role
            else (*self._take(following, total), *body, *turn, *fetched)
        )
        loop = While(
            test=(Load(out=loaded, buffer=tile, index=(index(0),)),),
            condition=arith("lt", loaded, total),
            body=(
                Let(var=unit, value=loaded),
                *self.decode(unit, self.units(), {}),
                *work,
                *ended,
            ),
            is_tiles=True,
            span=self.kernel.span,
        )
        return (*counted, _set(tile, self.block), _set(count, const(0, int32)), loop)

    def _take(self, following: Var, total: Expr) -> Body:
        """The next tile's number. Each tile that is computed takes one: the last to do so leaves
        the counter as it was."""
        taken = Var("taken", int32, VarKind.VALUE, index(0))
        is_last = arith("eq", taken, arith("sub", total, 1))
        reset = Store(buffer=self.taken, index=(index(0),), value=const(0, int32))
        return (
            Atomic(buffer=self.taken, index=(index(0),), value=const(1, int32), out=taken),
            If(condition=is_last, then=(reset,)),
            Let(var=following, value=arith("add", taken, self.blocks)),
        )

    def _tell(self, slot: Var, parity: Expr, following: Var) -> Body:
        free = binary("xor", parity, const(1, int32))
        return (
            BarrierWait(barrier=self.empty, slot=slot, parity=free),
            Store(buffer=self.told, index=(slot,), value=following),
            BarrierArrive(barrier=self.full, slot=slot),
        )

    def _hear(self, slot: Var, parity: Expr, following: Var) -> Body:
        return (
            BarrierWait(barrier=self.full, slot=slot, parity=parity),
            Load(out=following, buffer=self.told, index=(slot,)),
            BarrierArrive(barrier=self.empty, slot=slot),
        )

    def decode(self, unit: Expr, units: Sequence[Expr], names: Mapping[Var, Var]) -> list[Node]:
        """The block variables of a tile, counted from the end along axes that rise."""
        nodes = super().decode(unit, units, names)
        variables_ = [names.get(v, v) for v in self.kernel.block_vars]
        last = {variables_[d]: arith("sub", units[d], 1) for d in self.rising}
        return [
            replace(n, value=arith("sub", last[n.var], n.value))
            if isinstance(n, Let) and n.var in last
            else n
            for n in nodes
        ]

    def finish(self, kernel: Kernel) -> Kernel:
        layout = SharedLayout((SLOTS,), int32.bytes)
        return super().finish(
            replace(
                kernel,
                params=(*kernel.params, self.param),
                shared={**kernel.shared, self.told: layout},
                slots={**kernel.slots, self.told: SLOTS},
            )
        )


def _set(variable: Buffer, value: Expr) -> Node:
    return Store(buffer=variable, index=(index(0),), value=value)
