"""Emitters of reductions: registers first, then lanes of a warp by shuffles, then warps through
shared memory, then blocks of a cluster through each other's.

Knows fragment digits and shuffles. Does not know why a fragment lies as it does. What is combined
with what depends on the layout alone, so two runs give the same bits; in every step both threads
of a pair compute the same, so all copies of a result are equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from tilejit.dtypes import DType, int32, uint8, uint16, uint32, uint64
from tilejit.ir.expr import Expr, Var, VarKind, arith, binary, const, index, int_value
from tilejit.ir.node import Node
from tilejit.isa import cluster as isa_cluster
from tilejit.isa import mbarrier as isa_mbarrier
from tilejit.isa.machine import Value
from tilejit.isa.mma import WARP
from tilejit.isa.special import shuffle
from tilejit.layout.fragment import FragmentLayout
from tilejit.layout.reduction import Reduction, shared_out
from tilejit.layout.trade import paired
from tilejit.lower.emit import Points
from tilejit.lower.index import coordinates, thread_digit, thread_part
from tilejit.lower.quads import trade_pair
from tilejit.lower.tiles import TileEmitter
from tilejit.ops.cluster import ClusterExchange, ClusterReduce, ClusterScatter
from tilejit.ops.reduce import Reduce, Step, identity
from tilejit.ops.scan import Scan

_Combining = Reduce | ClusterReduce | ClusterScatter
_BITS = {8: uint8, 16: uint16}
MOST_SENT = 16  # bytes at once (PTX ISA, "st.async")


class ReduceEmitter(TileEmitter):
    """Reductions of fragments."""

    def emit_tile(self, node: Node, points: Points) -> None:
        if isinstance(node, Reduce):
            with self.scope():
                self.emit_reduce(node)
        elif isinstance(node, ClusterExchange):
            with self.scope():
                self.emit_exchange(node)
        else:
            super().emit_tile(node, points)

    def emit_reduce(self, node: Reduce) -> None:
        fragments, dtype = self.kernel.fragments, node.accumulator
        target = fragments[node.dst.buffer]
        reduction = node.reduction(fragments[node.src.buffer])
        if node.step is Step.SEND:
            self._send_parts(node, reduction, self._in_threads(node, reduction))
            return
        if node.step is Step.TAKE:
            results = self._take_parts(node, reduction, target)
        else:
            results = self._in_threads(node, reduction)
            for step in reduction.steps:
                results = self._with_lane(node, results, step)
        if node.step is Step.WHOLE:
            results = [results[p] for p in target.register_of(reduction.result)]
        held = self.state[node.dst.buffer]
        if not node.clear:
            old = self.m.cast(held, node.dst.buffer.dtype, dtype)
            results = [self.pair(node, a, b) for a, b in zip(old, results, strict=True)]
        held[:] = self.m.cast(results, dtype, node.dst.buffer.dtype)

    def _in_threads(self, node: Reduce, reduction: Reduction) -> list[Value]:
        """Of each register of the result, what the thread's own elements give."""
        m, dtype, layout = self.m, node.accumulator, reduction.source
        values = m.cast(self.state[node.src.buffer], node.src.buffer.dtype, dtype)
        if node.kind.is_absolute and dtype.is_signed:
            values = [m.unary("abs", v, dtype) for v in values]
        if reduction.is_padded:
            nothing = m.const(identity(node.kind, dtype, keeps_nan=node.keeps_nan), dtype)
            values = self.existing(values, layout, node.axis, nothing)
        groups: dict[tuple[int, ...], list[tuple[int, Value]]] = {}
        for register, value in enumerate(values):
            part = layout.register_part(register)
            groups.setdefault(reduction.result_part(part), []).append((part[node.axis], value))
        order = [reduction.result.register_part(r) for r in range(reduction.result.registers)]
        along = [[v for _, v in sorted(groups[part], key=lambda e: e[0])] for part in order]
        return [self._tree(node, mine) for mine in along]

    def existing(
        self, values: Sequence[Value], layout: FragmentLayout, axis: int, nothing: Value
    ) -> list[Value]:
        """A fragment's registers, with what changes nothing in those beyond the axis."""
        parts, extent = thread_part(layout, self.thread), index(layout.shape[axis])
        result = list(values)
        for register, value in enumerate(values):
            exists = self.inside(coordinates(layout, parts, register)[axis], extent)
            if exists is not None:
                result[register] = self.m.select(exists, value, nothing)
        return result

    def _tree(self, node: _Combining, values: Sequence[Value]) -> Value:
        """All combined, neighbours first: few values are under way at a time, and errors of sums
        grow with the tree's height."""
        if len(values) == 1:
            return values[0]
        middle = len(values) // 2
        return self.pair(node, self._tree(node, values[:middle]), self._tree(node, values[middle:]))

    def pair(self, node: _Combining | Scan, a: Value, b: Value) -> Value:
        """Two values combined, in the accumulator's dtype."""
        m, dtype = self.m, node.accumulator
        result = m.binary(node.kind.combine, a, b, dtype)
        if not (node.keeps_nan and node.kind.is_extreme and dtype.is_float):
            return result
        for value in (b, a):
            result = m.select(m.unary("isnan", value, dtype), value, result)
        return result

    # ---- between threads --------------------------------------------------------------------

    def from_lane(self, value: Value, which: Value, dtype: DType, mode: str = "bfly") -> Value:
        """The value of another lane; mode and which: as of `shuffle`."""
        m = self.m
        if dtype.bits == 32:
            word = m.bitcast(value, dtype, uint32) if dtype is not uint32 else value
            (word,) = m.issue(shuffle(mode), [word, which])
            return m.bitcast(word, uint32, dtype) if dtype is not uint32 else word
        bits = m.bitcast(value, dtype, uint64) if dtype is not uint64 else value
        half = m.const(32, uint64)
        words = m.cast([bits, m.binary("shr", bits, half, uint64)], uint64, uint32)
        moved = [m.issue(shuffle(mode), [word, which])[0] for word in words]
        low, high = m.cast(moved, uint32, uint64)
        bits = m.binary("or", low, m.binary("shl", high, half, uint64), uint64)
        return m.bitcast(bits, uint64, dtype) if dtype is not uint64 else bits

    def _with_lane(self, node: Reduce, values: list[Value], step: int) -> list[Value]:
        """Values, each combined with that of the lane whose number differs by the bit `step`."""
        distance = self.m.const(step, uint32)
        others = [self.from_lane(v, distance, node.accumulator) for v in values]
        return [self.pair(node, a, b) for a, b in zip(values, others, strict=True)]

    def _send_parts(self, node: Reduce, reduction: Reduction, values: list[Value]) -> None:
        """Each group of threads writes its part. Lanes that hold parts of the same results share
        them out: of two lanes each gives one half away and combines the other."""
        m, scratch, dtype, layout = self.m, node.scratch, node.accumulator, reduction.partials
        assert scratch is not None and dtype.bits in (32, 64), "layouts did not run"
        for step in reduction.steps:
            fewer = shared_out(layout, step)
            if fewer is None:
                values = self._with_lane(node, values, step)
                continue
            bit = thread_digit(self.thread, step, 2, layout.threads)
            is_odd = self.value(binary("eq", bit, const(1)))
            pairs = list(zip(values[::2], values[1::2], strict=True))
            given = [m.select(is_odd, even, odd) for even, odd in pairs]
            kept = [m.select(is_odd, odd, even) for even, odd in pairs]
            distance = m.const(step, uint32)
            come = [self.from_lane(v, distance, dtype) for v in given]
            values = [self.pair(node, a, b) for a, b in zip(kept, come, strict=True)]
            layout = fewer
        parts = thread_part(layout, self.thread)
        first = self.replica(layout)
        slot = () if node.slot is None else (node.slot,)
        for register, value in enumerate(values):
            at = coordinates(layout, parts, register)
            inside = self.both(self.bounds(layout, at), first)
            m.store(self.address(scratch, (*slot, *at)), [value], dtype, inside)

    def _take_parts(
        self, node: Reduce, reduction: Reduction, layout: FragmentLayout
    ) -> list[Value]:
        """All threads read the parts of the results that they hold."""
        scratch, dtype = node.scratch, node.accumulator
        assert scratch is not None, "layouts did not run"
        parts = thread_part(layout, self.thread)
        slot = () if node.slot is None else (node.slot,)
        results = []
        for register in range(layout.registers):
            at = coordinates(layout, parts, register)
            start: tuple[Expr, ...] = (*slot, *at, index(0))
            place, inside = self.address(scratch, start), self.bounds(layout, at)
            results.append(self._tree(node, self.m.load(place, dtype, reduction.groups, inside)))
        return results

    # ---- between blocks ---------------------------------------------------------------------

    def emit_exchange(self, node: ClusterExchange) -> None:
        """Each block sends its elements to all blocks of the cluster; all read what has come."""
        assert node.barrier is not None and node.slot is not None, "exchanges are not planned"
        come = self.barrier_address(node.barrier, node.slot, self.single().points[0])
        if node.step is not Step.TAKE:
            self._announce_and_send(node, come)
        if node.step is not Step.SEND:
            self._take(node, come)

    def _places(self, layout: FragmentLayout) -> Iterator[tuple[tuple[Expr, ...], Value | None]]:
        """Coordinates of each register's element, and whether it exists."""
        parts = thread_part(layout, self.thread)
        for register in range(layout.registers):
            at = coordinates(layout, parts, register)
            yield at, self.bounds(layout, at)

    def _announce_and_send(self, node: ClusterExchange, come: Value) -> None:
        m, dtype, buffer = self.m, node.sent_as, node.given.buffer
        held, layout = self.state[buffer], self.kernel.fragments[buffer]
        if isinstance(node, ClusterReduce | ClusterScatter):
            values = m.cast(held, buffer.dtype, dtype)
            if node.kind.is_absolute and dtype.is_signed:
                values = [m.unary("abs", v, dtype) for v in values]
        else:
            values = self._widened(held, buffer.dtype)
        places = list(self._places(layout))
        size = node.received(self.kernel.cluster_size) * dtype.bytes
        expected = [come, m.const(size, uint32)]
        m.issue(isa_mbarrier.ARRIVE_EXPECT, expected, self.inside_first_thread())
        if isinstance(node, ClusterScatter):
            self._share_out(node, layout, come, values)
            return
        elements = [(at, v, inside) for (at, inside), v in zip(places, values, strict=True)]
        self._send(node, layout, come, elements)

    def _take(self, node: ClusterExchange, come: Value) -> None:
        m, dtype, scratch, buffer = self.m, node.sent_as, node.scratch, node.result.buffer
        assert scratch is not None and node.slot is not None and node.parity is not None
        (parity,) = m.cast([self.index_value(node.parity, 32)[0]], int32, uint32)
        m.issue(isa_mbarrier.wait_parity(self.target), [come, parity])
        layout = self.kernel.fragments[buffer]
        results: list[Value] = []
        if isinstance(node, ClusterReduce):
            for at, inside in self._places(layout):
                place = self.address(scratch, (node.slot, *at, index(0)))
                loaded = m.load(place, dtype, self.kernel.cluster_size, inside)
                results.append(self._tree(node, loaded))
            self.state[buffer][:] = m.cast(results, dtype, buffer.dtype)
            return
        if isinstance(node, ClusterScatter):
            for at, inside in itertools.islice(self._places(layout), None, None, layout.vector):
                come_from = [
                    m.load(
                        self.address(scratch, (node.slot, index(block), *at)),
                        dtype,
                        layout.vector,
                        inside,
                    )
                    for block in range(self.kernel.cluster_size)
                ]
                results += (self._tree(node, same) for same in zip(*come_from, strict=True))
            self.state[buffer][:] = m.cast(results, dtype, buffer.dtype)
            return
        for at, inside in itertools.islice(self._places(layout), None, None, layout.vector):
            place = self.address(scratch, (node.slot, *at))
            results += m.load(place, dtype, layout.vector, inside)
        self.state[buffer][:] = self._narrowed(results, buffer.dtype)

    def _widened(self, values: Sequence[Value], dtype: DType) -> list[Value]:
        """Elements of fewer than 32 bits as uint32, others as they are."""
        if dtype.bits >= 32:
            return list(values)
        if dtype.is_float:
            bits = _BITS[dtype.bits]
            return self._widened([self.m.bitcast(v, dtype, bits) for v in values], bits)
        return self.m.cast(values, dtype, uint32)

    def _narrowed(self, values: Sequence[Value], dtype: DType) -> list[Value]:
        """The inverse of `_widened`."""
        if dtype.bits >= 32:
            return list(values)
        if dtype.is_float:
            bits = _BITS[dtype.bits]
            return [self.m.bitcast(v, bits, dtype) for v in self._narrowed(values, bits)]
        return self.m.cast(values, uint32, dtype)

    def _send(
        self,
        node: ClusterExchange,
        layout: FragmentLayout,
        come: Value,
        elements: list[tuple[tuple[Expr, ...], Value, Value | None]],
    ) -> None:
        """Store elements at the block's number in the memory of every block, whose barriers count
        them. Threads that hold copies of an element divide the blocks among them."""
        m, blocks, dtype = self.m, self.kernel.cluster_size, node.sent_as
        assert node.scratch is not None and node.slot is not None, "exchanges are not planned"
        word = uint32 if dtype.bits == 32 else uint64
        own_rank = self._own_rank()
        for first in range(0, blocks, layout.replicas):
            peer = arith("add", self._copy_number(layout), first)
            is_block = None
            if first + layout.replicas > blocks:
                is_block = self.value(binary("lt", peer, const(blocks)))
                peer = arith("min", peer, blocks - 1)
            (rank,) = m.cast([self.index_value(peer, 32)[0]], int32, uint32)
            (counted,) = m.issue(isa_cluster.MAPA, [come, rank])
            for at, value, inside in elements:
                own = m.address(self.address(node.scratch, (node.slot, *at, own_rank)))
                (there,) = m.issue(isa_cluster.MAPA, [own, rank])
                bits = value if dtype is word else m.bitcast(value, dtype, word)
                when = self.both(inside, is_block)
                m.issue(isa_cluster.send(dtype.bits), [there, bits, counted], when)

    def _share_out(
        self, node: ClusterScatter, layout: FragmentLayout, come: Value, values: Sequence[Value]
    ) -> None:
        """Store each part of the elements, at the block's number, in the memory of the block whose
        part it is; of threads that hold copies the first does."""
        m, dtype, columns = self.m, node.sent_as, node.dst.shape[-1]
        assert node.scratch is not None and node.slot is not None, "exchanges are not planned"
        word = uint32 if dtype.bits == 32 else uint64
        values = [v if dtype is word else m.bitcast(v, dtype, word) for v in values]
        layout, values = self._four_together(layout, columns, word, values)
        width = math.gcd(layout.vector, columns, MOST_SENT // dtype.bytes)
        own_rank, first = self._own_rank(), self.replica(layout)
        peers: dict[int | None, tuple[Value, Value, Value, Value]] = {}
        for register, (at, inside) in enumerate(self._places(layout)):
            if register % width:
                continue
            peer = arith("floordiv", at[-1], columns)
            known = int_value(peer)
            if known is None or known not in peers:
                (rank,) = m.cast([self.index_value(peer, 32)[0]], int32, uint32)
                (counted,) = m.issue(isa_cluster.MAPA, [come, rank])
                is_own = self.value(binary("eq", peer, own_rank))
                peers[known] = rank, counted, is_own, self.value(binary("ne", peer, own_rank))
            rank, counted, is_own, is_other = peers[known]
            there = (node.slot, own_rank, *at[:-1], arith("floormod", at[-1], columns))
            mine, when = values[register : register + width], self.both(inside, first)
            m.store(self.address(node.scratch, there), mine, word, self.both(when, is_own))
            own = m.address(self.address(node.scratch, there))
            (place,) = m.issue(isa_cluster.MAPA, [own, rank])
            send = isa_cluster.send(dtype.bits, width)
            m.issue(send, [place, *mine, counted], self.both(when, is_other))

    def _four_together(
        self, layout: FragmentLayout, columns: int, dtype: DType, values: Sequence[Value]
    ) -> tuple[FragmentLayout, Sequence[Value]]:
        """The elements after neighbouring lanes have traded pairs, where that makes for messages
        twice as wide: the network takes as long for 8 bytes as for 16."""
        found = paired(layout) if dtype.bits == 32 and columns % 4 == 0 else None
        if found is None:
            return layout, values
        fours, distance = found
        lane = self.value(thread_digit(self.thread, 1, WARP, self.threads))
        traded: list[Value] = []
        for n in range(0, len(values), 4):
            pairs = list(values[n : n + 2]), list(values[n + 2 : n + 4])
            traded += trade_pair(self.m, *pairs, lane, distance)
        return fours, traded

    def _own_rank(self) -> Var:
        """The block's number in its cluster."""
        rank = Var("rank", int32, VarKind.VALUE, index(0), index(self.kernel.cluster_size - 1))
        self.bind(rank, self.m.cast(list(self.m.issue(isa_cluster.CTA_RANK)), uint32, int32)[0])
        return rank

    def _copy_number(self, layout: FragmentLayout) -> Expr:
        """The thread's number among those that hold copies of its elements."""
        number: Expr = index(0)
        step = 1
        for digit in layout.replica_digits:
            value = thread_digit(self.thread, digit.stride, digit.size, layout.threads)
            number = arith("add", number, arith("mul", value, step))
            step *= digit.size
        return number
