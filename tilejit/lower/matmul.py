"""Emitters of T.gemm: matrix instructions fed by ldmatrix, and plain multiply-adds.

Knows operand layouts and how registers of fragments become operand words. Does not know how the
instruction was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tilejit.dtypes import DType, float32, int32, uint32
from tilejit.errors import InternalError
from tilejit.ir.analysis import divisor
from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, Var, VarKind, arith, index
from tilejit.ir.node import Node
from tilejit.isa.atom import GemmAtom, MmaInstruction
from tilejit.isa.ldmatrix import ldmatrix
from tilejit.isa.machine import Value
from tilejit.isa.mma import WARP, fragment_a, fragment_b, operand_word, words_a, words_b
from tilejit.isa.special import TF32_FROM_F32
from tilejit.layout.fragment import FragmentLayout
from tilejit.lower.emit import Point, Points
from tilejit.lower.index import coordinates, thread_part
from tilejit.lower.operands import Operand, Operands, OperandSource, Spread, WarpTile
from tilejit.lower.scan import ScanEmitter
from tilejit.ops.gemm import FetchOperands, Gemm, held_operands

Words = Callable[[int, int], list[Value]]

FMA_STEP = 4  # values of k that one round of the plain multiply unrolls


class MatmulEmitter(ScanEmitter):
    """Multiplies by single warps and threads."""

    def emit_tile(self, node: Node, points: Points) -> None:
        if isinstance(node, Gemm):
            assert node.atom is not None, "select did not run"
            with self.scope():
                for region in (node.a, node.b):
                    self.check_region(region, points.points[0])
                assert isinstance(node.atom, GemmAtom), f"{node.atom} has its own emitter"
                if node.atom.mma is None:
                    self.emit_fma(node, points.points[0])
                else:
                    self.emit_mma(node, node.atom, node.atom.mma, points.points[0])
        elif isinstance(node, FetchOperands):
            with self.scope():
                self.emit_fetch(node, points.points[0])
        else:
            super().emit_tile(node, points)

    # ---- matrix instructions ----------------------------------------------------------------

    def emit_mma(self, node: Gemm, atom: GemmAtom, mma: MmaInstruction, point: Point) -> None:
        """Multiply step by step of k; the operands of a step are loaded before the one before it
        is multiplied, so that the loads' latency passes behind arithmetic."""
        m = self.m
        acc = self.state[node.acc.buffer]
        warp_tile = self._warp_tile(node, atom, mma)
        words = self.acc_words(mma, acc, node)
        steps = node.k // mma.k
        if node.carried is None:
            now = self._operands(node, mma, warp_tile, point).all(0)
        else:
            now = self._split_words(self.state[node.carried], mma, warp_tile)
        pairs = warp_tile.rows * warp_tile.columns
        # All copies together: between matrix instructions and ldmatrix each costs three idle slots
        # (measured on an H200 at 4096^3: spread 0.556, together 0.593 of cuBLAS).
        self.emit_straight(node.filling, point)
        for step in range(steps):
            later, loads = Operands(), Spread([], 1)
            if step + 1 < steps:
                source = self._operands(node, mma, warp_tile, point)
                loads = Spread(source.pieces(step + 1, later), pairs)
            elif node.following is not None:
                for inner in node.meanwhile:
                    self.emit_node(inner, self.single())
                a, b = node.following
                ahead = dataclasses.replace(node, a=a, b=b)
                source = self._operands(ahead, mma, warp_tile, point)
                loads = Spread(source.pieces(0, later), pairs)
            for j in range(warp_tile.columns):
                for i in range(warp_tile.rows):
                    loads.advance()
                    place = i * warp_tile.columns + j
                    inputs = [*now.a[i], *now.b[j], *words[place]]
                    words[place] = m.issue(mma.instruction, inputs)
            loads.finish()
            now = later
        self.store_acc(mma, acc, words)
        if node.carried is not None:
            self.state[node.carried][:] = now.words

    def emit_fetch(self, node: FetchOperands, point: Point) -> None:
        gemm = node.gemm
        assert isinstance(gemm.atom, GemmAtom) and gemm.atom.mma is not None
        warp_tile = self._warp_tile(gemm, gemm.atom, gemm.atom.mma)
        operands = self._operands(gemm, gemm.atom.mma, warp_tile, point).all(0)
        self.state[node.carried][:] = operands.words

    def _warp_tile(self, node: Gemm, atom: GemmAtom, mma: MmaInstruction) -> WarpTile:
        """The part of the tile that the executing warp multiplies."""
        rows = node.m // (atom.warps_m * mma.m)
        columns = node.n // (atom.warps_n * mma.n)
        warp = arith("floordiv", self.thread, WARP)
        warp = arith("floormod", warp, atom.warps_m * atom.warps_n)
        origin_m = arith("mul", arith("floordiv", warp, atom.warps_n), rows * mma.m)
        origin_n = arith("mul", arith("floormod", warp, atom.warps_n), columns * mma.n)
        lane = arith("floormod", self.thread, WARP)
        return WarpTile(rows, columns, lane, origin_m, origin_n)

    def _operands(
        self, node: Gemm, mma: MmaInstruction, tile: WarpTile, point: Point
    ) -> OperandSource:
        """Where the operand words of any step of k come from."""
        held = self._held_words(node, mma)
        a_side = Operand(node.a, not node.transpose_a, point)
        b_side = Operand(node.b, node.transpose_b, point)

        def rows(i: int, step: int) -> list[Value]:
            if "a" in held:
                return self.rounded(held["a"](i, step), mma)
            row = arith("add", tile.origin_m, i * mma.m)
            return self.rounded(self.load_a(a_side, mma, tile.lane, row, step * mma.k), mma)

        def columns(j: int, count: int, step: int) -> list[list[Value]]:
            if "b" in held:
                return [self.rounded(held["b"](c, step), mma) for c in range(j, j + count)]
            column = arith("add", tile.origin_n, j * mma.n)
            found = self.load_b(b_side, mma, count, tile.lane, column, step * mma.k)
            return [self.rounded(words, mma) for words in found]

        group = 1 if "b" in held else self.columns_at_once(b_side, mma)
        return OperandSource(tile, rows, columns, group)

    def columns_at_once(self, side: Operand, mma: MmaInstruction) -> int:
        """Instructions along n whose operands one load brings."""
        halves = mma.k * mma.b.bytes // 16
        return max(1, 4 // halves) if self.can_ldmatrix(side, mma.b) else 1

    def _split_words(self, held: list[Value], mma: MmaInstruction, tile: WarpTile) -> Operands:
        """Carried words by row and by column of instructions."""
        a_words, b_words = words_a(mma), words_b(mma)
        cut = tile.rows * a_words
        a = [list(held[k : k + a_words]) for k in range(0, cut, a_words)]
        b = [list(held[k : k + b_words]) for k in range(cut, len(held), b_words)]
        return Operands(a, b)

    def acc_words(self, mma: MmaInstruction, acc: list[Value], node: Gemm) -> list[list[Value]]:
        """The accumulator's registers, grouped by instruction (m outer, n inner)."""
        per = mma.m * mma.n // WARP
        if node.clear:
            zero = self.m.const(0, mma.acc)
            acc = [zero] * len(acc)
        groups = [acc[k : k + per] for k in range(0, len(acc), per)]
        if mma.acc.bits == 16:
            return [[self.m.pack(g[k : k + 2], mma.acc) for k in (0, 2)] for g in groups]
        return [list(g) for g in groups]

    def store_acc(self, mma: MmaInstruction, acc: list[Value], words: list[list[Value]]) -> None:
        flat = [w for group in words for w in group]
        if mma.acc.bits == 16:
            flat = [v for w in flat for v in self.m.unpack(w, mma.acc)]
        acc[:] = flat

    def _held_words(self, node: Gemm, mma: MmaInstruction) -> dict[str, Words]:
        """For each operand in a fragment, "a" or "b", a function (row or column of instructions,
        step of k) -> its operand words."""
        steps = node.k // mma.k
        elements = {"a": fragment_a(mma).registers, "b": fragment_b(mma).registers}

        def source(side: str, buffer: Buffer, wanted: FragmentLayout) -> Words:
            held = self.state[buffer]
            place = wanted.register_of(self.kernel.fragments[buffer])
            per = elements[side]

            def words(i: int, step: int) -> list[Value]:
                first = (i * steps + step) * per
                mine = [held[place[first + k]] for k in range(per)]
                return self.operand_words(mine, buffer.dtype)

            return words

        operands = held_operands(node, self.threads)
        return {side: source(side, region.buffer, wanted) for side, region, wanted in operands}

    def operand_words(self, values: Sequence[Value], dtype: DType) -> list[Value]:
        """The registers of a matrix instruction from the elements they hold."""
        if operand_word(dtype) is dtype:
            return list(values)
        if dtype.bits == 32:
            return [self.m.bitcast(v, dtype, uint32) for v in values]
        per = 32 // dtype.bits
        return [self.m.pack(values[i : i + per], dtype) for i in range(0, len(values), per)]

    def rounded(self, words: list[Value], mma: MmaInstruction) -> list[Value]:
        return self.rounded_words(words, mma.a)

    def rounded_words(self, words: list[Value], dtype: DType) -> list[Value]:
        """tf32 operands rounded: the instruction itself would cut them off, twice the error."""
        if dtype.name != "tfloat32":
            return words
        floats = [self.m.bitcast(w, uint32, float32) for w in words]
        return [self.m.issue(TF32_FROM_F32, [f])[0] for f in floats]

    def load_a(
        self, side: Operand, mma: MmaInstruction, lane: Expr, row: Expr, k: int
    ) -> list[Value]:
        """The operand words of A at instruction row `row`, from shared memory."""
        bytes_ = mma.a.bytes
        per_chunk = 16 // bytes_
        halves = mma.k // per_chunk  # 16-byte chunks along k: one word column each
        if self.can_ldmatrix(side, mma.a):
            if side.is_k_major:
                r = arith("floormod", lane, 16)
                c = arith("mul", arith("floordiv", lane, 16), per_chunk)
                if halves == 1:
                    c = index(0)
                return self._ldmatrix(side, arith("add", row, r), arith("add", c, k), 2 * halves)
            r = arith("mul", arith("floormod", arith("floordiv", lane, 8), 2), 8)
            low = arith("floormod", lane, 8)
            c = arith("add", low, arith("mul", arith("floordiv", lane, 16), 8))
            if halves == 1:
                c = low
            return self._ldmatrix(
                side, arith("add", row, r), arith("add", c, k), 2 * halves, transposed=True
            )
        layout = fragment_a(mma)
        return self._gather(side, layout, mma.a, lane, row, k, is_outer_first=True)

    def load_b(
        self, side: Operand, mma: MmaInstruction, columns: int, lane: Expr, column: Expr, k: int
    ) -> list[list[Value]]:
        """The operand words of B for each of `columns` instructions along n."""
        per_chunk = 16 // mma.b.bytes
        halves = mma.k // per_chunk
        if not self.can_ldmatrix(side, mma.b):
            layout = fragment_b(mma)
            return [
                self._gather(side, layout, mma.b, lane, arith("add", column, j * mma.n), k, False)
                for j in range(columns)
            ]
        result: list[list[Value]] = []
        j = 0
        while j < columns:
            width = min(4 // halves, columns - j)
            width = 1 << (width.bit_length() - 1)
            n0 = arith("add", column, j * mma.n)
            # matrix index of the lane: halves of k fastest, then instructions along n
            matrix = arith("floordiv", lane, 8)
            row = arith("floormod", lane, 8)
            half = arith("floormod", matrix, halves) if halves > 1 else index(0)
            tile = arith("floordiv", matrix, halves) if halves > 1 else matrix
            tile = arith("floormod", tile, width) if width > 1 else index(0)
            if side.is_k_major:
                outer = arith("add", arith("mul", tile, 8), row)
                inner = arith("mul", half, per_chunk)
            else:
                outer = arith("mul", tile, 8)
                inner = arith("add", arith("mul", half, 8), row)
            words = self._ldmatrix(
                side,
                arith("add", n0, outer),
                arith("add", inner, k),
                width * halves,
                transposed=not side.is_k_major,
            )
            result += [words[t * halves : (t + 1) * halves] for t in range(width)]
            j += width
        return result

    def can_ldmatrix(self, side: Operand, dtype: DType) -> bool:
        """Whether rows of 16 bytes lie where ldmatrix reads them. It gives a lane 32 bits of a row:
        no whole float64."""
        if dtype.bits > 32 or (not side.is_k_major and dtype.bits != 16):
            return False
        column = side.point.sub(side.region.starts[-1])
        if divisor(column, self.kernel.multiples) * dtype.bytes % 16:
            return False
        buffer = side.region.buffer
        return buffer is buffer.root and self.kernel.shared[buffer].has_wide_rows

    def _ldmatrix(
        self, side: Operand, outer: Expr, k: Expr, count: int, transposed: bool = False
    ) -> list[Value]:
        address = self.address(side.region.buffer, side.at(outer, k))
        if address.align < 16:
            raise InternalError(f"ldmatrix on `{side.region.buffer.name}` is not aligned.")
        return self.m.issue(ldmatrix(count, transposed), [self.m.address(address)])

    def _gather(
        self,
        side: Operand,
        layout: FragmentLayout,
        dtype: DType,
        lane: Expr,
        outer: Expr,
        k: int,
        is_outer_first: bool,
    ) -> list[Value]:
        """Operand words element by element, for operands that ldmatrix cannot read."""
        parts = thread_part(layout, lane)
        values = []
        for register in range(layout.registers):
            first, second = coordinates(layout, parts, register)
            o, kk = (first, second) if is_outer_first else (second, first)
            at = side.at(arith("add", outer, o), arith("add", kk, k))
            source = side.region.buffer
            values += self.m.load(self.address(source, at), source.dtype)
        return self.operand_words(values, dtype)

    # ---- plain multiply-adds ----------------------------------------------------------------

    def emit_fma(self, node: Gemm, point: Point) -> None:
        """acc[r] += a[row(r), k] * b[k, column(r)] for every register, in a loop over k."""
        m, acc_dtype = self.m, node.acc.buffer.dtype
        compute = acc_dtype if acc_dtype.bits >= 32 else float32
        layout = self.kernel.fragments[node.acc.buffer]
        parts = thread_part(layout, self.thread)
        places = [coordinates(layout, parts, r)[-2:] for r in range(layout.registers)]
        acc = self.state[node.acc.buffer]
        if node.clear:
            acc[:] = [m.const(0, acc_dtype)] * len(acc)
        acc[:] = m.cast(acc, acc_dtype, compute) if compute is not acc_dtype else acc
        a_side = Operand(node.a, not node.transpose_a, point)
        b_side = Operand(node.b, node.transpose_b, point)
        state = {node.acc.buffer: acc}
        unit = FMA_STEP if node.k % FMA_STEP == 0 else 1

        def one(k: Expr) -> None:
            a_row = self._operand_rows(a_side, [p[0] for p in places], node.m, k, unit, compute)
            b_row = self._operand_rows(b_side, [p[1] for p in places], node.n, k, unit, compute)
            for r, (row, column) in enumerate(places):
                total = acc[r]
                for u in range(unit):
                    total = m.fma(a_row[row][u], b_row[column][u], total, compute)
                acc[r] = total

        if node.k == unit:
            with self.scope():
                one(index(0))
        else:
            k_var = Var("k", int32, VarKind.LOOP, index(0), index(node.k // unit - 1))

            def body(value: Value) -> None:
                with self.scope():
                    self.bind(k_var, value)
                    one(arith("mul", k_var, unit))

            m.loop(m.const(0, int32), m.const(node.k // unit, int32), 1, int32, body, state)
        if compute is not acc_dtype:
            acc[:] = m.cast(acc, compute, acc_dtype)

    def _operand_rows(
        self,
        side: Operand,
        outers: Sequence[Expr],
        extent: int,
        k: Expr,
        unit: int,
        compute: DType,
    ) -> dict[Expr, list[Value]]:
        """For each distinct row (A) or column (B): `unit` values along k, in the compute type."""
        buffer = side.region.buffer
        result: dict[Expr, list[Value]] = {}
        for outer in dict.fromkeys(outers):
            inside = self.inside(outer, index(extent))  # padding of the layout reads nothing
            # neighbours along k are neighbours in memory only within a swizzle's 16-byte chunk
            width = min(unit, 16 // buffer.dtype.bytes) if side.is_k_major else 1
            loaded: list[Value] = []
            for u in range(0, unit, width):
                address = self.address(buffer, side.at(outer, arith("add", k, u)))
                loaded += self.m.load(address, buffer.dtype, width, inside)
            if buffer.dtype is not compute:
                loaded = self.m.cast(loaded, buffer.dtype, compute)
            result[outer] = loaded
        return result
