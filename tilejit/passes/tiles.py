"""Lets a block compute tile after tile, in an order that keeps neighbours in the L2 cache.

Knows grids, clusters and which tiles share operands. Does not know what a tile's work is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tilejit.dtypes import int32
from tilejit.ir.analysis import MAX_SYMBOL, divisor, interval
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, index, int_value, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, Let, Load, LoopKind, Node, Role, Store, While, walk
from tilejit.isa.atom import WgmmaAtom
from tilejit.layout.boxes import boxes_of
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.passes.box_rows import CLUSTER_CLOCKS, bring_clocks, crosses_lines
from tilejit.passes.nominal import existing, nominal
from tilejit.passes.wgmma import multiply_clocks

MAX_BLOCKS = 1 << 16  # of a persistent launch, far above what any chip runs at once
MAX_TILES = MAX_SYMBOL  # checked at every launch, so that to count tiles takes 32 bits
SAVED_SHARE = 1 / 5  # of what bringing tiles takes: what sharing them must save
MANY_WAVES = 4  # tiles a block, from which on clusters are worth their start
TYPICAL_BLOCKS = 132  # multiprocessors of an H100 or H200: sizes groups of tiles, nothing else


@dataclass
class Walk:
    """How the tiles of a kernel are visited.

    cluster: blocks that share tiles of operands, along `axis` of the grid.
    group: rows of tiles (along y) that are visited together; by_columns: columns instead.
    """

    kernel: Kernel
    cluster: int
    axis: int | None
    group: int
    by_columns: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.block = Var("block", int32, VarKind.BLOCK, index(0), index(MAX_BLOCKS - 1))
        self.blocks = Var("blocks", int32, VarKind.SCALAR, index(1), index(MAX_BLOCKS))

    def around(self, body: Body, role: Role | None = None, visit: Var | None = None) -> Body:
        """The loop over a block's tiles around the work for one; without a role, of the thread that
        brings what they need; of a role with teams, each takes its turn. visit: a variable for the
        number of the block's tile."""
        if not body:
            return body
        if role is None:
            return self._from_tile_to_tile(body)
        counted: list[Node] = []
        visits = self.visits(counted)
        opened: list[Node] = []
        if visit is None:
            visit = visit_number()
        turn = visit
        if role is not None and role.team is not None:
            turn = Var("turn", int32, VarKind.LOOP, index(0), index(MAX_TILES - 1))
            mine = arith("add", arith("mul", turn, role.teams), role.team)
            visit = Var("visit", int32, VarKind.VALUE, index(0), index(MAX_TILES - 1))
            opened.append(Let(var=visit, value=mine))
            left = arith("sub", arith("add", visits, role.teams - 1), role.team)
            visits = arith("floordiv", left, role.teams)
        loop = For(
            var=turn,
            start=index(0),
            stop=visits,
            kind=LoopKind.TILES,
            body=(*opened, *self.place(visit), *body),
            span=self.kernel.span,
        )
        return (*counted, loop)

    def _from_tile_to_tile(self, body: Body) -> Body:
        """The loop of the thread that brings tiles. It asks for no number of tiles: to divide by
        the number of blocks takes longer than all else that is done before a first copy."""
        at = (index(0),)
        counted: list[Node] = []
        total = self._total(counted)
        unit = Buffer(name="produced_unit", shape=(index(1),), dtype=int32, scope=Scope.VAR)
        loaded = Var("unit", int32, VarKind.VALUE, index(0))
        following = arith("add", loaded, self._step())
        loop = While(
            test=(Load(out=loaded, buffer=unit, index=at),),
            condition=arith("lt", loaded, total),
            body=(
                *self.decode(loaded, self.units(), {}),
                *body,
                Store(buffer=unit, index=at, value=following),
            ),
            is_tiles=True,
            span=self.kernel.span,
        )
        return *counted, Store(buffer=unit, index=at, value=self._first()), loop

    def visits(self, nodes: list[Node]) -> Expr:
        """How many tiles the block computes; what it is made of is added to the nodes."""
        step = self._step()
        left = arith("add", self._total(nodes), arith("sub", step, 1))
        return arith("floordiv", arith("sub", left, self._first()), step)

    def place(self, visit: Expr, names: Mapping[Var, Var] | None = None) -> list[Node]:
        """The block variables of the block's tile of that number; names: others for them."""
        unit = Var("unit", int32, VarKind.VALUE, index(0), self.last_unit())
        value = arith("add", self._first(), arith("mul", visit, self._step()))
        return [Let(var=unit, value=value), *self.decode(unit, self.units(), names or {})]

    def _first(self) -> Expr:
        return arith("floordiv", self.block, self.cluster)

    def _step(self) -> Expr:
        return arith("floordiv", self.blocks, self.cluster)

    def last_unit(self) -> Expr:
        """The largest number of a unit, as far as it is known."""
        return arith("sub", at_most(_product(self.units()), MAX_TILES), 1)

    def _total(self, nodes: list[Node]) -> Expr:
        units = [self._counted("count", e, nodes) for e in self.units()]
        return self._counted("units", _product(units), nodes)

    def _counted(self, name: str, value: Expr, nodes: list[Node]) -> Expr:
        """A number of tiles: it has a name where it is not constant, for no arithmetic says that a
        kernel runs only where there are tiles, and no more than MAX_TILES. 64 bits divide several
        times slower."""
        if int_value(value) is not None:
            return value
        high = interval(value).high
        most = MAX_TILES if high is None else min(high, MAX_TILES)
        return self._named(name, value, index(most + 1), nodes, low=1)

    def units(self) -> list[Expr]:
        """Extents of the grid in what a cluster computes at once."""
        return [
            arith("floordiv", extent, self.cluster) if d == self.axis else extent
            for d, extent in enumerate(self.kernel.grid)
        ]

    def decode(self, unit: Expr, units: Sequence[Expr], names: Mapping[Var, Var]) -> list[Node]:
        """The block variables of a unit: `group` rows of it together, each column before the
        next."""
        nodes: list[Node] = []
        units = [self._counted("count", e, nodes) for e in units]
        x, y, *z = units if len(units) > 1 else (*units, index(1))
        if self.by_columns:
            x, y = y, x
        places: list[Expr]
        rest = unit
        if z:
            plane = self._counted("plane", arith("mul", x, y), nodes)
            rest = self._named("place", arith("floormod", unit, plane), plane, nodes)
            depth = arith("floordiv", unit, plane)
        if self.group == 1:
            places = [arith("floormod", rest, x), arith("floordiv", rest, x)]
        else:
            wide = arith("mul", x, self.group)
            if not interval(wide).fits_int32:  # where y is small, more than there are tiles
                wide = self._counted("wide", arith("min", wide, MAX_TILES), nodes)
            band = arith("mul", arith("floordiv", rest, wide), self.group)
            inside = arith("floormod", rest, wide)
            rows: Expr = index(self.group)
            if divisor(y) % self.group:
                rows = arith("min", rows, arith("sub", y, band))
                rows = self._named("rows", rows, index(self.group + 1), nodes)
            places = [
                arith("floordiv", inside, rows),
                arith("add", band, arith("floormod", inside, rows)),
            ]
        if self.by_columns:
            places.reverse()
        if z:
            places.append(depth)
        rank = arith("floormod", self.block, self.cluster)
        for d, (var, place) in enumerate(
            zip(self.kernel.block_vars, places[: len(units)], strict=True)
        ):
            if d == self.axis:
                place = arith("add", arith("mul", place, self.cluster), rank)
            nodes.append(Let(var=names.get(var, var), value=place))
        return nodes

    def _named(self, name: str, value: Expr, stop: Expr, nodes: list[Node], low: int = 0) -> Expr:
        var = Var(name, int32, VarKind.VALUE, index(low), arith("sub", stop, 1))
        nodes.append(Let(var=var, value=value))
        return var

    def finish(self, kernel: Kernel) -> Kernel:
        """The kernel whose blocks walk."""
        return replace(
            kernel,
            grid=(_product(self.kernel.grid),),
            block_vars=(self.block,),
            blocks_var=self.blocks,
            cluster=(self.cluster, 1, 1),
            is_persistent=True,
        )


class Stay(Walk):
    """Each block has one tile, or a part of one: launched are as many blocks as there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        total = arith("mul", _product(self.units()), self.cluster)
        last = arith("sub", at_most(total, MAX_TILES), 1)
        self.block = Var("block", int32, VarKind.BLOCK, index(0), last)

    def around(self, body: Body, role: Role | None = None, visit: Var | None = None) -> Body:
        return (*self.place(index(0)), *body) if body else body

    def finish(self, kernel: Kernel) -> Kernel:
        fresh = super().finish(kernel)
        return replace(fresh, blocks_var=None, is_persistent=False)


def _product(extents: Sequence[Expr]) -> Expr:
    product: Expr = index(1)
    for extent in extents:
        product = arith("mul", product, extent)
    return product


def at_most(number: Expr, most: int) -> Expr:
    """The number, or what is known to be more where 32 bits may not hold it."""
    return number if interval(number).fits_int32 else index(most)


def visit_number() -> Var:
    """A variable for the number of a block's tile."""
    return Var("visit", int32, VarKind.LOOP, index(0), index(MAX_TILES - 1))


def tile_walk(kernel: Kernel, cluster: int, axis: int | None) -> Walk:
    """The order of a kernel's tiles: groups of rows such that what runs at once reads little."""
    if kernel.is_shared_out:
        cluster, axis = kernel.parts, len(kernel.grid) - 1
    if len(kernel.grid) - kernel.is_shared_out == 1:
        group = 1
        order = "in order"
    else:
        group = best_group(kernel, cluster, axis)
        order = f"in groups of {group} along y"
    by_columns = kernel.given.order == "column"
    if kernel.given.panel:
        group = max(1, kernel.given.panel // (cluster if axis == (0 if by_columns else 1) else 1))
        order = f"in panels of {kernel.given.panel} {kernel.given.order}s, as asked"
    if kernel.is_shared_out:
        note = f"a tile for each cluster, {order}"
        return Stay(kernel, cluster, axis, group, by_columns, [note])
    walked = Walk(kernel, cluster, axis, group, by_columns)
    walked.notes.append(f"each block computes tiles one after the other, {order}")
    if cluster > 1 and axis is not None:
        walked.notes.append(
            f"clusters of {cluster} blocks along {'xyz'[axis]} share what they read"
        )
    return walked


def best_group(kernel: Kernel, cluster: int, axis: int | None) -> int:
    """Rows of tiles (along y) in a group, such that the tiles that run at once read the fewest
    bytes."""
    along_x, along_y = bytes_along(kernel, 0), bytes_along(kernel, 1)
    steps = [cluster if axis == d else 1 for d in (0, 1)]
    running = max(1, TYPICAL_BLOCKS // cluster)
    most = int_value(kernel.grid[1])
    most = running if most is None else max(1, most // steps[1])
    best = (math.inf, 1)
    for rows in range(1, min(running, most) + 1):
        columns = running / rows
        read = rows * steps[1] * along_y + columns * steps[0] * along_x
        best = min(best, (read, rows))
    return best[1]


def bytes_along(kernel: Kernel, axis: int) -> int:
    """Bytes of the brought tiles that differ from tile to tile along an axis of the grid."""
    total = 0
    for copy in brought_copies(kernel):
        if not is_same_along(copy, kernel, axis):
            total += tile_bytes(copy)
    return max(total, 1)


def tile_bytes(copy: Copy) -> int:
    return math.prod(copy.dst.extents) * copy.dst.buffer.dtype.bytes


def brought_copies(kernel: Kernel) -> list[Copy]:
    return [
        n
        for n in walk(kernel.body)
        if isinstance(n, Copy) and n.is_tma and n.src.buffer.scope is Scope.GLOBAL
    ]


def is_same_along(copy: Copy, kernel: Kernel, axis: int) -> bool:
    """Whether blocks that differ along the grid's axis only bring the same tile."""
    moving = moving_along(kernel, axis)
    return not any(variables(e) & moving for e in copy.exprs)


def is_in_step(copy: Copy, kernel: Kernel, axis: int) -> bool:
    """Whether blocks that differ along the grid's axis only make the copy equally often."""
    moving = moving_along(kernel, axis)

    def within(body: Body) -> bool:
        for node in body:
            if any(copy is n for inner in node.bodies for n in walk(inner)):
                steady = not any(variables(e) & moving for e in node.exprs)
                return steady and all(within(inner) for inner in node.bodies)
        return True

    return within(kernel.body)


def moving_along(kernel: Kernel, axis: int) -> set[Var]:
    """The variables that may differ between blocks that differ along the grid's axis only."""
    moving: set[Var] = set(kernel.block_vars[axis : axis + 1])
    for node in walk(kernel.body):
        if isinstance(node, Load) and node.buffer.scope is not Scope.GLOBAL:
            moving.update(node.defines)  # a block's own memory
        elif isinstance(node, Let | Load) and any(variables(e) & moving for e in node.exprs):
            moving.update(node.defines)
        elif isinstance(node, For) and any(variables(e) & moving for e in node.exprs):
            moving.add(node.var)
    return moving


def shared_by_two(
    kernel: Kernel,
    brought: Sequence[Copy],
    weigh: Callable[[Sequence[Copy]], float],
    is_dividable: Callable[[Copy], bool],
) -> tuple[int | None, list[Copy]]:
    """Along which axis of the grid two neighbours share the most, and those tiles' copies, where
    the grid and all such tiles divide so. weigh: what is saved by sharing tiles; 0 where that is
    not worth it."""
    best: tuple[float, int | None, list[Copy]] = (0.0, None, [])
    for axis, extent in enumerate(kernel.grid):
        if divisor(extent) % 2 or not all(is_in_step(c, kernel, axis) for c in brought):
            continue
        same = [c for c in brought if is_same_along(c, kernel, axis)]
        saved = weigh(same)
        if saved > best[0] and all(map(is_dividable, same)):
            best = (saved, axis, same)
    return best[1], best[2]


def slow_shared_by_two(
    kernel: Kernel, brought: Sequence[Copy], is_dividable: Callable[[Copy], bool]
) -> tuple[int | None, list[Copy]]:
    """`shared_by_two` of tiles whose rows TMA takes longer for than it takes to multiply them."""
    alone = bring_clocks(brought)
    if not any(map(crosses_lines, brought)) or alone <= multiplied_clocks(kernel):
        return None, []

    loops = [n for n in walk(kernel.body) if isinstance(n, For)]
    rounds = max((nominal(n.stop) - nominal(n.start) for n in loops), default=1)

    def saved(same: Sequence[Copy]) -> float:
        clocks = (alone - bring_clocks(brought, same)) * rounds if same else 0.0
        return clocks if clocks > CLUSTER_CLOCKS else 0.0

    return shared_by_two(kernel, brought, saved, is_dividable)


def multiplied_clocks(kernel: Kernel) -> float:
    """How long the tensor cores multiply what is brought once."""
    gemms = [n for n in walk(kernel.body) if isinstance(n, Gemm)]
    return sum(multiply_clocks(n) for n in gemms if isinstance(n.atom, WgmmaAtom))


def choose_cluster(kernel: Kernel, brought: Sequence[Copy]) -> tuple[int, int | None]:
    """How many blocks share tiles, and along which axis of the grid: two, along the axis that saves
    most, where the grid divides so and only multiplies by warpgroups read what is shared.

    Only where the L2 cache brings less than is multiplied: blocks that share tiles wait for each
    other, and neighbours' requests for the same lines meet on their way even so. And where TMA
    takes longer for the tiles' rows than it takes to multiply them: each block brings half then.
    """
    if not only_multiplied(kernel, brought):
        return 1, None
    assert kernel.target is not None, "select did not run"
    chip = kernel.target.chip

    size = sum(tile_bytes(c) * existing(c.src) for c in brought)

    def saved(same: Sequence[Copy]) -> float:
        half = sum(tile_bytes(c) * existing(c.src) for c in same) / 2
        return half if half > SAVED_SHARE * size else 0.0

    def is_dividable(copy: Copy) -> bool:
        return bool(boxes_of(kernel.shared[copy.dst.buffer], copy.dst.extents, 2))

    axis, _ = slow_shared_by_two(kernel, brought, is_dividable)
    if axis is None:
        tiles = math.prod(nominal(extent) for extent in kernel.grid)
        if tiles < MANY_WAVES * chip.multiprocessors:
            return 1, None
        if size <= multiplied_clocks(kernel) * chip.brought_bytes:
            return 1, None
        axis, _ = shared_by_two(kernel, brought, saved, is_dividable)
    return (1, None) if axis is None else (2, axis)


def only_multiplied(kernel: Kernel, brought: Sequence[Copy]) -> bool:
    buffers = {c.dst.buffer for c in brought}
    for node in walk(kernel.body):
        is_multiply = isinstance(node, Gemm) and isinstance(node.atom, WgmmaAtom)
        if not is_multiply and any(b.root in buffers for b in node.reads):
            return False
    return True
