"""Emitters of T.Parallel loops and of copies: a tile's elements spread over threads.

Knows loop layouts, vector groups and asynchronous copies. Does not know matrix instructions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tilejit.dtypes import int32, uint32
from tilejit.errors import InternalError
from tilejit.ir.analysis import depends, divisor, interval, linear, provably
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr, Var, arith, binary, const, index
from tilejit.ir.loops import loop_layout
from tilejit.ir.node import Body, If, Node, Parallel, Store, all_reads, all_writes, walk
from tilejit.isa import barrier as isa_barrier
from tilejit.isa import cp_async as isa_cp_async
from tilejit.isa.atom import CopyMethod
from tilejit.isa.machine import Value
from tilejit.isa.mma import WARP
from tilejit.isa.stmatrix import stmatrix
from tilejit.layout.boxes import boxes_of
from tilejit.layout.fragment import FragmentLayout, blocked
from tilejit.layout.shared import SharedLayout
from tilejit.layout.trade import quad_trade
from tilejit.lower.emit import Point, Points
from tilejit.lower.index import coordinates, split, thread_digit, thread_part, total
from tilejit.lower.quads import (
    LANES,
    MATRIX,
    PAIR,
    ROW,
    TILES,
    matrix_strides,
    tile_stride,
    trade,
    trade_fours,
)
from tilejit.lower.statements import (
    ROUND,
    StatementEmitter,
    points_registers,
    split_points,
    writes_shared_temporary,
)
from tilejit.ops.copy import Copy
from tilejit.ops.elementwise import as_parallel, loop_variables, place
from tilejit.target import Feature


class TileEmitter(StatementEmitter):
    """T.Parallel, copies and fills."""

    def emit_tile(self, node: Node, points: Points) -> None:
        if isinstance(node, Copy) and node.atom and node.atom.method is CopyMethod.CP_ASYNC:
            self.emit_async_copy(node, points)
            return
        if isinstance(node, Copy) and node.is_trade:
            self.emit_trade(node)
            return
        parallel = as_parallel(node)
        if parallel is None:
            super().emit_tile(node, points)
        elif points.layout is not None or len(points.points) != 1:
            raise InternalError("T.Parallel inside T.Parallel.", span=node.span)
        else:
            self.emit_parallel(parallel, points)

    def emit_parallel(self, node: Parallel, outer: Points) -> None:
        """Unroll the iterations of this thread, a round of registers at a time."""
        layout = loop_layout(node, self.kernel)
        (around,) = outer.points
        parts = thread_part(layout, self.thread)
        once = self.replica(layout)
        one_by_one = writes_shared_temporary(node.body, node.vars)
        only_memory = not any(
            b.scope is Scope.FRAGMENT for inner in walk(node.body) for b in inner.writes
        )
        meets = once is not None and not only_memory
        size = max(layout.vector, ROUND // layout.vector * layout.vector)
        for first in range(0, layout.registers, size):
            registers = list(range(first, min(first + size, layout.registers)))
            with self.scope():
                points = self._points(node, layout, parts, registers, around)
                points.once = once
                points.once_loads = once if only_memory else None
                points.constants = outer.constants
                rounds = split_points(points) if one_by_one else [points]
                for part in rounds:
                    self._emit_round(node, part, meets)

    def _emit_round(self, node: Parallel, points: Points, meets: bool) -> None:
        """Statement after statement. With `meets`, threads run copies of an iteration and all of
        them load: they meet before one of them stores to what they have loaded, and before they
        load what one has stored."""
        memory = self.facts.aliases.of
        loaded: set[Buffer] = set()
        stored: set[Buffer] = set()
        for inner in node.body:
            written = {memory(b) for b in all_writes(inner) if not _is_private(b)}
            read = {memory(b) for b in all_reads(inner) if not _is_private(b)}
            assert not (meets and inner.bodies and written & read), (
                f"copies of an iteration change what others read, at {inner.span}"
            )
            if meets and (written & loaded or read & stored):
                self.meet()
                loaded.clear()
                stored.clear()
            self.emit_node(inner, points)
            loaded |= read
            stored |= written

    def _points(
        self,
        node: Parallel,
        layout: FragmentLayout,
        parts: tuple[Expr, ...],
        registers: list[int],
        around: Point,
    ) -> Points:
        points = []
        for register in registers:
            at = coordinates(layout, parts, register)
            bounds = self.bounds(layout, at)
            mapping = {**around.mapping, **dict(zip(node.vars, at, strict=True))}
            points.append(replace(around, mapping=mapping, bounds=bounds))
        vector = layout.vector if not layout.flat else _flat_vector(layout)
        axis = node.vars[-1] if node.vars else None
        return Points(points, layout, node.vars, vector, axis, registers=registers)

    def bounds(self, layout: FragmentLayout, at: tuple[Expr, ...]) -> Value | None:
        """Whether coordinates exist; None when they surely do."""
        if not layout.is_padded:
            return None
        return self.both(*(self.inside(e, index(n)) for e, n in zip(at, layout.shape, strict=True)))

    def replica(self, layout: FragmentLayout) -> Value | None:
        """True in the first of the threads that hold copies."""
        conditions: list[Value | None] = []
        for digit in layout.replica_digits:
            value = thread_digit(self.thread, digit.stride, digit.size, layout.threads)
            conditions.append(self.value(binary("eq", value, const(0))))
        return self.both(*conditions)

    # ---- wide stores ------------------------------------------------------------------------

    def _store_memory(self, node: Store, points: Points, values: list[Value]) -> None:
        if self._store_quads(node, points, values) or self._store_matrices(node, points, values):
            return
        super()._store_memory(node, points, values)

    def _store_matrices(self, node: Store, points: Points, values: list[Value]) -> bool:
        """Store an accumulator's 16-bit pairs to shared memory by stmatrix, four matrices a time;
        False when they cannot be."""
        layout, buffer = points.layout, node.buffer
        strides = matrix_strides(layout, buffer.dtype) if layout is not None else None
        if strides is None or points.once is not None or self.divergent or points.axis is None:
            return False
        if (
            buffer.scope is not Scope.SHARED
            or buffer is not buffer.root
            or len(points.variables) < 2
        ):
            return False
        if not self.target.has(Feature.STMATRIX) or not are_rows(node.index, points.variables):
            return False
        if any(p.condition is not None or p.tests or p.bounds is not None for p in points.points):
            return False
        down, across = strides
        place_of = {register: n for n, register in enumerate(points_registers(points))}
        firsts = [
            r for r in place_of if not (r % PAIR or r // down % 2 or r // across % 2)
        ]  # of groups of two by two matrices
        groups = [[r, r + down, r + across, r + down + across] for r in firsts]
        if any(r not in place_of for group in groups for r in group):
            return False
        indexes = [self._matrix_row(node, points, place_of[r]) for r in firsts]
        if any(self.address(buffer, at).align < MATRIX * buffer.dtype.bytes for at in indexes):
            return False
        self._meet_lanes(buffer)
        for group, at in zip(groups, indexes, strict=True):
            starts = [place_of[r] for r in group]
            words = [self.m.pack(values[n : n + PAIR], buffer.dtype) for n in starts]
            self.check(buffer, at)
            self.m.issue(stmatrix(4), [self.m.address(self.address(buffer, at)), *words])
        self._meet_lanes(buffer)
        return True

    def _meet_lanes(self, buffer: Buffer) -> None:
        """Order what a lane has read and will read itself with another's store for it."""
        if self.facts.aliases.of(buffer) in self.facts.read:
            self.m.issue(isa_barrier.SYNC_WARP)

    def _matrix_row(self, node: Store, points: Points, number: int) -> tuple[Expr, ...]:
        """Where the row lies that the lane addresses, of four matrices that begin with a point's:
        lanes 0 to 7 address those of the first, 8 to 15 of the one below, 16 to 23 of the one
        beside it, and 24 to 31 of the last."""
        point = points.points[number]
        *_, row, column = points.variables
        own_row = thread_digit(self.thread, LANES, MATRIX, self.threads)
        own_column = arith("mul", thread_digit(self.thread, 1, LANES, self.threads), PAIR)
        lane_row = thread_digit(self.thread, 1, MATRIX, self.threads)
        below = thread_digit(self.thread, MATRIX, 2, self.threads)
        beside = thread_digit(self.thread, 2 * MATRIX, 2, self.threads)
        moved_row = arith("add", lane_row, arith("mul", below, MATRIX))
        moved = {
            row: arith("add", arith("sub", point.mapping[row], own_row), moved_row),
            column: arith(
                "add",
                arith("sub", point.mapping[column], own_column),
                arith("mul", beside, MATRIX),
            ),
        }
        mapping = {**point.mapping, **{v: total(*linear(e)) for v, e in moved.items()}}
        return tuple(Point(mapping).sub(e) for e in node.index)

    def _store_quads(self, node: Store, points: Points, values: list[Value]) -> bool:
        """Store an accumulator's 16-bit pairs 16 bytes a time; False when they cannot be."""
        layout, dtype = points.layout, node.buffer.dtype
        stride = tile_stride(layout, dtype) if layout is not None else None
        if stride is None or points.once is not None or self.divergent or points.axis is None:
            return False
        if node.buffer.scope is not Scope.GLOBAL:
            return False
        if any(p.condition is not None or p.tests or p.bounds is not None for p in points.points):
            return False
        if self.access_width(node.buffer, node.index, points) < PAIR:
            return False
        place_of = {register: n for n, register in enumerate(points_registers(points))}
        firsts = [r for r in place_of if r % PAIR == 0 and r // stride % TILES == 0]
        rows = [[r + j * stride for j in range(TILES)] for r in firsts]
        if any(r not in place_of for row in rows for r in row):
            return False
        moved = [self._moved(points, place_of[r]) for r in firsts]
        indexes = [tuple(point.sub(e) for e in node.index) for point in moved]
        if not all(self._is_wide(node, at) for at in indexes):
            return False
        lane = self.value(thread_digit(self.thread, 1, LANES, self.threads))
        self._meet_lanes(node.buffer)
        for row, at in zip(rows, indexes, strict=True):
            starts = [place_of[r] for r in row]
            words = [self.m.pack(values[n : n + PAIR], dtype) for n in starts]
            elements = [v for w in trade(self.m, words, lane) for v in self.m.unpack(w, dtype)]
            when = self.guard(node.buffer, at)
            self.m.store(self.address(node.buffer, at), elements, dtype, when)
        self._meet_lanes(node.buffer)
        return True

    def _moved(self, points: Points, number: int) -> Point:
        """The first point of four rows with its last coordinate where the lane's elements begin
        after the trade."""
        point = points.points[number]
        assert points.axis is not None
        quad = thread_digit(self.thread, 1, LANES, self.threads)
        axis = arith("add", point.mapping[points.axis], arith("mul", quad, ROW - PAIR))
        return Point({**point.mapping, points.axis: total(*linear(axis))})

    def _is_wide(self, node: Store, at: tuple[Expr, ...]) -> bool:
        """Whether one access takes a lane's elements: aligned, in range together or not at all."""
        buffer, multiples = node.buffer, self.kernel.multiples
        last = arith("add", at[-1], ROW - 1)
        if self.inside(last, buffer.shape[-1]) is not None or not provably("ge", at[-1], index(0)):
            together = math.gcd(divisor(at[-1], multiples), divisor(buffer.shape[-1], multiples))
            if together % ROW:
                return False
        return self.address(buffer, at).align >= ROW * buffer.dtype.bytes

    # ---- copies between fragments -----------------------------------------------------------

    def emit_trade(self, node: Copy) -> None:
        """Lanes of quads trade 8-bit elements until each holds what the other layout says."""
        source, target = node.src.buffer, node.dst.buffer
        fragments, dtype = self.kernel.fragments, source.dtype
        pairs = quad_trade(fragments[source], fragments[target])
        assert pairs, f"{node.src} is not a trade away from {node.dst}"
        held, result = self.state[source], list(self.state[target])
        words = [self.m.pack([held[r] for r in before], dtype) for before, _ in pairs]
        lane = self.value(thread_digit(self.thread, 1, WARP, self.threads))
        traded = trade_fours(self.m, words, lane)
        for word, (_, after) in zip(traded, pairs, strict=True):
            for register, value in zip(after, self.m.unpack(word, dtype), strict=True):
                result[register] = value
        self.state[target][:] = result

    # ---- asynchronous copies ----------------------------------------------------------------

    def emit_async_copy(self, node: Copy, outer: Points) -> None:
        """cp.async of `vector` elements a time; what lies outside the tensor becomes zero."""
        (around,) = outer.points
        assert node.atom is not None
        vector = node.atom.vector
        layout = blocked(node.src.shape, self.threads, vector)
        variables = loop_variables(node.src.shape)
        parts = thread_part(layout, self.thread)
        once = self.replica(layout)
        for register in range(0, layout.registers, vector):
            at = coordinates(layout, parts, register)
            point = Point({**around.mapping, **dict(zip(variables, at, strict=True))})
            when = self.both(self.bounds(layout, at), self.condition(around), once)
            source_at = tuple(point.sub(e) for e in place(node.src, variables))
            target_at = tuple(point.sub(e) for e in place(node.dst, variables))
            self._issue_async(node, source_at, target_at, vector, when)

    def _issue_async(
        self,
        node: Copy,
        source_at: tuple[Expr, ...],
        target_at: tuple[Expr, ...],
        vector: int,
        when: Value | None,
    ) -> None:
        source, target = node.src.buffer, node.dst.buffer
        size = vector * source.dtype.bytes
        shared = self.address(target, target_at)
        memory = self.address(source, source_at)
        if shared.align < size or memory.align < size:
            raise InternalError(
                f"An asynchronous copy of {size} bytes from `{source.name}` is not aligned.",
                span=node.span,
            )
        inputs = [
            self.m.address(shared),
            self.m.address(memory),
            self.valid_bytes(node, source_at, vector),
        ]
        self.m.issue(isa_cp_async.cp_async(size), inputs, when)

    def emit_straight(self, body: Body, point: Point) -> None:
        """Copies that run ahead, their branches turned into predicates: no branch cuts the code
        around them in pieces that are scheduled apart."""
        for node in body:
            if isinstance(node, If):
                assert not node.orelse, "a pipeline's fill has no other arm"
                condition = self.both(self.condition(point), self.value(point.sub(node.condition)))
                self.emit_straight(node.then, replace(point, condition=condition))
            else:
                self.emit_node(node, Points([point]))

    def valid_bytes(self, node: Copy, at: tuple[Expr, ...], vector: int) -> Value:
        """Bytes of a vector that lie inside the tensor."""
        source = node.src.buffer
        size = vector * source.dtype.bytes
        full = self.m.const(size, uint32)
        rows = self.guard(source, at, lead_only=True)
        extent, column = source.shape[-1], at[-1]
        left = arith("sub", extent, column)
        last = arith("add", column, vector - 1)
        if self.inside(last, extent) is None:
            count = full
        else:
            elements = arith("min", arith("max", left, 0), vector)
            count = self.index_value(arith("mul", elements, source.dtype.bytes), 32)[0]
            count = self.m.cast([count], int32, uint32)[0]
            low = interval(column).low
            if low is None or low < 0:
                rows = self.both(rows, self.inside(column, extent))
        return count if rows is None else self.m.select(rows, count, self.m.const(0, uint32))


def box_places(
    layout: SharedLayout, outer: Region, inner: Region, blocks: int, rank: Expr
) -> Iterator[tuple[list[Expr], list[Expr]]]:
    """Where the boxes of a region begin: the index in the tensor, whose rows are fours and pairs of
    one where the tile is stored in halves, and in the shared tile.

    blocks, rank: of the blocks of a cluster that share the work, each taking its part.
    """
    boxes = boxes_of(layout, inner.extents, blocks)
    assert boxes is not None, f"{inner} cannot be divided among {blocks} blocks"
    rows, columns = boxes.rows, boxes.columns
    row_share: Expr = index(0)
    column_share: Expr = index(0)
    if boxes.shared_axis == "rows":
        rows //= blocks
        row_share = arith("mul", rank, rows)
    elif boxes.shared_axis == "columns":
        columns //= blocks
        column_share = arith("mul", rank, columns)
    kept = list(zip(outer.kept, inner.kept, strict=True))
    lead = [range(inner.extents[d]) for _, d in kept[:-2]]
    for first in itertools.product(*lead):
        for row in range(0, rows, boxes.box_rows):
            for column in range(0, columns, boxes.box_columns):
                offsets: list[Expr] = [index(n) for n in first]
                if len(kept) > 1:
                    offsets.append(arith("add", row_share, row))
                offsets.append(arith("add", column_share, column))
                half: Expr = index(0)
                if layout.halved:  # the offset counts rows as they are stored
                    half, pair = split(offsets[-2], layout.rows // 2)
                    offsets[-2] = arith("mul", pair, 2)
                outside, inside = list(outer.starts), list(inner.starts)
                for (out, chip), offset in zip(kept, offsets, strict=True):
                    outside[out] = arith("add", outside[out], offset)
                    inside[chip] = arith("add", inside[chip], offset)
                if layout.halved:
                    out, chip = kept[-2]
                    second = arith("mul", half, 2)
                    inside[chip] = arith("add", inside[chip], second)
                    outside[out : out + 1] = [arith("floordiv", outside[out], 4), second]
                yield outside, inside


def are_rows(at: Sequence[Expr], variables: Sequence[Var]) -> bool:
    """Whether the last two indexes step by one with the last two variables, and nothing else
    does."""
    *_, row, column = variables
    *lead, i, j = at if len(at) > 1 else (index(0), *at)
    for e, var in ((i, row), (j, column)):
        if linear(e)[0].get(var) != 1:
            return False
        rest = {v for v in (row, column) if v is not var}
        if any(depends(term, rest) for term in linear(e)[0]):
            return False
    return not any(depends(e, (row, column)) for e in lead)


def _is_private(buffer: Buffer) -> bool:
    return buffer.scope is Scope.FRAGMENT or buffer.scope.is_per_thread


def _flat_vector(layout: FragmentLayout) -> int:
    """Consecutive flat indices are consecutive last coordinates when the vector divides it."""
    vector = layout.vector
    while vector > 1 and layout.shape[-1] % vector:
        vector //= 2
    return vector
