"""Emitters of what runs by itself: bulk copies of boxes, multiplies by warpgroups, the barriers and
instructions that order them.

Knows boxes, descriptors and who issues. Does not know why a copy or multiply was made so.
"""

from __future__ import annotations

from collections.abc import Callable

from tilejit.dtypes import DType, float16, int32, uint16, uint32, uint64
from tilejit.errors import InternalError
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, binary, const, index
from tilejit.ir.node import Body, Let, Node, OneThread
from tilejit.ir.sync import BarrierArrive, BarrierExpect, Control, ControlOp, Elect
from tilejit.isa import cluster as isa_cluster
from tilejit.isa import launch as isa_launch
from tilejit.isa import mbarrier as isa_mbarrier
from tilejit.isa import tma as isa_tma
from tilejit.isa import wgmma as isa_wgmma
from tilejit.isa.atom import WgmmaAtom
from tilejit.isa.barrier import FENCE_DEVICE
from tilejit.isa.instruction import Instruction
from tilejit.isa.machine import Value
from tilejit.isa.mma import WARP
from tilejit.isa.registers import setmaxnreg
from tilejit.isa.special import ELECT, UNIFORM, own_zero
from tilejit.layout.shared import SharedLayout
from tilejit.lower.emit import Point, Points
from tilejit.lower.matmul import MatmulEmitter
from tilejit.lower.tiles import box_places
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm, GemmWait, left_layout

GROUP = isa_wgmma.WARPGROUP

_PLAIN: dict[ControlOp, Instruction] = {
    ControlOp.FENCE_ASYNC: isa_tma.FENCE_ASYNC,
    ControlOp.FENCE_BARRIERS: isa_mbarrier.FENCE_INIT,
    ControlOp.FENCE_DEVICE: FENCE_DEVICE,
    ControlOp.STORE_COMMIT: isa_tma.COMMIT_STORES,
    ControlOp.CLUSTER_ARRIVE: isa_cluster.CLUSTER_ARRIVE,
    ControlOp.CLUSTER_ARRIVE_RELAXED: isa_cluster.CLUSTER_ARRIVE_RELAXED,
    ControlOp.CLUSTER_WAIT: isa_cluster.CLUSTER_WAIT,
    ControlOp.DEPENDENCY_WAIT: isa_launch.GRID_DEPENDENCY_WAIT,
    ControlOp.DEPENDENCY_LAUNCH: isa_launch.GRID_DEPENDENCY_LAUNCH,
}


def control_instruction(node: Control) -> Instruction:
    """The instruction of a Control node."""
    if node.op in (ControlOp.STORE_WAIT, ControlOp.STORE_WAIT_READ):
        return isa_tma.wait_stores(node.count, node.op is ControlOp.STORE_WAIT_READ)
    if node.op in (ControlOp.REGISTERS_UP, ControlOp.REGISTERS_DOWN):
        return setmaxnreg(node.count, node.op is ControlOp.REGISTERS_UP)
    return _PLAIN[node.op]


class KernelEmitter(MatmulEmitter):
    """All nodes."""

    def emit_tile(self, node: Node, points: Points) -> None:
        point = points.points[0]
        if isinstance(node, Let):
            self.emit_let(node, point)
        elif isinstance(node, OneThread):
            self.emit_one_thread(node, points)
        elif isinstance(node, Elect):
            absolute = self.kernel.thread_vars[0]
            self.bind(node.out, self._elected(arith("floormod", absolute, node.each)))
        elif isinstance(node, Control):
            self.m.issue(control_instruction(node))
        elif isinstance(node, BarrierExpect):
            self.emit_expect(node, point)
        elif isinstance(node, BarrierArrive) and node.cta is not None:
            address = self.barrier_address(node.barrier, node.slot, point)
            rank = self._word(point.sub(node.cta))
            self.m.issue(isa_mbarrier.ARRIVE_CLUSTER, [address, rank])
        elif isinstance(node, Copy) and node.is_tma:
            with self.scope():
                self.emit_boxes(node, point)
        elif isinstance(node, Gemm) and isinstance(node.atom, WgmmaAtom):
            with self.scope():
                self.emit_wgmma(node, node.atom, point)
        elif isinstance(node, GemmWait):
            self.emit_gemm_wait(node)
        else:
            super().emit_tile(node, points)

    def _word(self, e: Expr) -> Value:
        """An index as a uint32."""
        value = self.index_value(e, 32)[0]
        return self.m.cast([value], int32, uint32)[0]

    def emit_let(self, node: Let, point: Point) -> None:
        value = point.sub(node.value)
        if node.var.dtype.is_integer:
            self.bind(node.var, self.index_value(value, node.var.dtype.bits)[0])
        else:
            self.bind(node.var, self.value(value))

    def emit_one_thread(self, node: OneThread, points: Points) -> None:
        warps: Expr = self.thread
        if node.each:
            warps = arith("floormod", warps, node.each)
        elected = self._elected(warps)
        if node not in self.facts.quick:
            self._where(elected, lambda: self.emit_body(node.body, points), node.body)
            return
        # without a branch the coordinates are ready when the threads have met
        for store in node.body:
            assert isinstance(store, Copy)
            with self.scope():
                self.emit_boxes(store, points.points[0], elected)

    def in_elected_thread(self, emit: Callable[[], None]) -> None:
        """What `emit` emits is done by the thread that does `OneThread` of the whole role."""
        self._where(self._elected(self.thread), emit)

    def in_warp(self, number: int, emit: Callable[[], None]) -> None:
        """What `emit` emits is done by one warp of the role."""
        warp = self._warp(self.thread)
        self._where(self.m.binary("eq", warp, self.m.const(number, uint32), uint32), emit)

    def _where(self, condition: Value, emit: Callable[[], None], body: Body = ()) -> None:
        """body: what is emitted, as far as it is nodes."""

        def inside() -> None:
            with self.scope():
                emit()

        self.divergent += 1
        self.m.branch(condition, inside, None, self.changed(body))
        self.divergent -= 1

    def _warp(self, number: Expr) -> Value:
        """The number of the thread's warp, in a uniform register, of the number of the thread."""
        warp = self.value(arith("floordiv", number, WARP))
        return self.m.issue(UNIFORM, [self.m.bitcast(warp, int32, uint32)])[0]

    def _elected(self, number: Expr) -> Value:
        """True in one of the threads of the warp that has the numbers below 32."""
        m = self.m
        if not self.target.has(*ELECT.needs):
            return self.value(binary("eq", number, const(0, int32)))
        is_first = m.binary("eq", self._warp(number), m.const(0, uint32), uint32)
        (elected,) = m.issue(ELECT, [])
        return self.both(is_first, m.binary("ne", elected, m.const(0, uint32), uint32))

    def emit_expect(self, node: BarrierExpect, point: Point) -> None:
        address = self.barrier_address(node.barrier, node.slot, point)
        record = isa_mbarrier.ARRIVE_EXPECT if node.arrives else isa_mbarrier.EXPECT
        self.m.issue(record, [address, self.m.const(node.bytes, uint32)])

    # ---- bulk copies ------------------------------------------------------------------------

    def emit_boxes(self, node: Copy, point: Point, when: Value | None = None) -> None:
        """One instruction a box; before those to shared memory the barrier learns their bytes.
        when: of stores, in which thread."""
        assert node.tensor_map is not None, "describe did not run"
        is_load = _is_load(node)
        inner = node.dst if is_load else node.src
        self.check_region(inner, point)
        layout = self.kernel.shared[inner.buffer]
        barrier: Value = None
        if is_load:
            assert node.barrier is not None, f"nobody waits for {node.dst}"
            barrier = self.barrier_address(node.barrier.buffer, node.barrier.slot, point)
            bytes_ = layout.itemsize
            for extent in inner.shape:
                bytes_ *= extent
            self.m.issue(isa_mbarrier.EXPECT, [barrier, self.m.const(bytes_, uint32)])
        mask = node.sharers(self.kernel.cluster_size)
        if not mask or mask == (1 << self.kernel.cluster_size) - 1:
            self._emit_share(node, point, barrier, node.share or const(0), mask, when=when)
            return
        is_in = binary("and", binary("shr", const(mask), self.kernel.cluster_rank), const(1))

        def together() -> None:
            with self.scope():
                self._emit_share(node, point, barrier, node.share or const(0), mask)

        def alone() -> None:
            for share in range(mask.bit_count()):
                with self.scope():
                    self._emit_share(node, point, barrier, const(share), mask, is_alone=True)

        self.m.branch(self.value(binary("ne", is_in, const(0))), together, alone, {})

    def _emit_share(
        self,
        node: Copy,
        point: Point,
        barrier: Value,
        share: Expr,
        mask: int,
        is_alone: bool = False,
        when: Value | None = None,
    ) -> None:
        """The boxes of one block, each handed to the blocks of `mask` (0: to none but its own).
        is_alone: the block is not one of them."""
        is_load = _is_load(node)
        outer, inner = (node.src, node.dst) if is_load else (node.dst, node.src)
        layout = self.kernel.shared[inner.buffer]
        assert node.tensor_map is not None, "describe did not run"
        tensor = self.value(node.tensor_map)
        hint = node.eviction is not None
        targets = [self.m.const(mask, uint16)] if mask and not is_alone else []
        for outside, inside in box_places(layout, outer, inner, max(1, mask.bit_count()), share):
            at = [self.index_value(point.sub(e), 32)[0] for e in outside]
            address = self.address(inner.buffer, [point.sub(e) for e in inside])
            if address.align < 16:
                raise InternalError(f"A box of `{inner.buffer.name}` is not aligned.")
            shared = self.m.address(address)
            policy = [] if not hint else [self._policy(node.eviction or "")]
            if node.combine is not None:
                self.m.issue(isa_tma.tma_reduce_add(len(at)), [tensor, *at, shared], when)
                continue
            if not is_load:
                self.m.issue(isa_tma.tma_store(len(at), hint), [tensor, *at, shared, *policy], when)
                continue
            record = isa_tma.tma_load(len(at), bool(targets), hint)
            self.m.issue(record, [tensor, *at, shared, barrier, *targets, *policy])

    def _policy(self, eviction: str) -> Value:
        return self.m.const(isa_tma.EVICTION_POLICY[eviction], uint64)

    # ---- multiplies by warpgroups -----------------------------------------------------------

    def emit_wgmma(self, node: Gemm, atom: WgmmaAtom, point: Point) -> None:
        m, one = self.m, atom.wgmma
        rows = atom.rows if node.row is None else 1
        acc = self.state[node.acc.buffer]
        group = self._warpgroup(atom.groups_m * atom.groups_n)
        down = arith("floordiv", group, atom.groups_n)
        across = arith("floormod", group, atom.groups_n)
        row = arith("mul", down, node.m // atom.groups_m)
        column = arith("mul", across, node.n // atom.groups_n)
        steps = node.k // one.k
        mine = slice(0, len(acc)) if node.row is None else atom.registers_of(node.row)
        if node.row is not None:
            row = arith("add", row, node.row * one.m)
        inputs = self._packed(acc[mine], one.acc)
        if node.clear:
            # with a zero that other code uses the assembler keeps room for sums that nothing reads
            inputs = m.issue(own_zero(one.acc_register)) * len(inputs)
        a_offsets: isa_wgmma.Offsets = ()
        is_register = node.a.buffer.scope is Scope.FRAGMENT
        if is_register:
            inputs += self._left_words(node, atom)
        else:
            side = _Side(self.kernel.shared[node.a.buffer], not node.transpose_a)
            a_offsets = side.offsets(rows, one.m, steps, one.k)
            inputs.append(self._descriptor(node.a, side, row, point))
        side = _Side(self.kernel.shared[node.b.buffer], node.transpose_b)
        b_offsets = side.offsets(atom.columns, one.n, steps, one.k)
        inputs.append(self._descriptor(node.b, side, column, point))
        if node.clear:
            inputs.append(m.const(0, uint32))
        elif node.begins is not None:
            zero, one_more = m.const(0, uint32), m.const(1, uint32)
            inputs.append(m.select(self.value(node.begins), zero, one_more))
        record = isa_wgmma.wgmma_sequence(
            one,
            rows=rows,
            columns=atom.columns,
            steps=steps,
            a_offsets=a_offsets,
            b_offsets=b_offsets,
            a_registers=is_register,
            transpose_a=node.transpose_a and not is_register,
            transpose_b=not node.transpose_b,
            scaled=node.clear or node.begins is not None,
        )
        words = m.issue(record, inputs)
        if one.acc is float16:  # taking two elements out of a register is touching it
            words = m.issue(isa_wgmma.wait_group(0, (one.acc_register,) * len(words)), words)
        acc[mine] = self._unpacked(words, one.acc)

    def _warpgroup(self, groups: int) -> Expr:
        """The number of the thread's warpgroup, in a uniform register: so are the descriptors that
        follow from it."""
        if groups == 1:
            return index(0)
        number = self.value(arith("floordiv", self.thread, GROUP))
        (number,) = self.m.issue(UNIFORM, [self.m.bitcast(number, int32, uint32)])
        group = Var("warpgroup", int32, VarKind.VALUE, index(0), index(groups - 1))
        self.bind(group, self.m.bitcast(number, uint32, int32))
        return group

    def _packed(self, values: list[Value], dtype: DType) -> list[Value]:
        if dtype is not float16:
            return list(values)
        return [self.m.pack(values[k : k + 2], dtype) for k in range(0, len(values), 2)]

    def _unpacked(self, words: list[Value], dtype: DType) -> list[Value]:
        if dtype is not float16:
            return words
        return [v for word in words for v in self.m.unpack(word, dtype)]

    def _left_words(self, node: Gemm, atom: WgmmaAtom) -> list[Value]:
        """The words of A from its fragment, instruction by instruction."""
        held, dtype = self.state[node.a.buffer], node.a.buffer.dtype
        wanted = left_layout(node, atom, self.threads)
        place = wanted.register_of(self.kernel.fragments[node.a.buffer])
        words = self.operand_words([held[p] for p in place], dtype)
        return self.rounded_words(words, dtype)

    def _descriptor(self, region: Region, side: _Side, outer: Expr, point: Point) -> Value:
        """The 64-bit descriptor of an operand that begins at row or column `outer`."""
        at = [point.sub(e) for e in region.starts]
        where = region.kept[0 if side.is_k_major else 1]
        at[where] = arith("add", at[where], outer)
        address = self.m.address(self.address(region.buffer, at))
        m = self.m
        low = m.binary("and", address, m.const(0x3FFFF, uint32), uint32)
        low = m.binary("shr", low, m.const(4, uint32), uint32)
        wide = m.cast([low], uint32, uint64)[0]
        return m.binary("or", wide, m.const(side.descriptor, uint64), uint64)

    def emit_gemm_wait(self, node: GemmWait) -> None:
        """Wait, and make everything that is over depend on it."""
        if node.gemm is not None:
            self._wait_for_row(node, node.gemm)
            return
        parts: list[tuple[Buffer, list[Value], DType]] = []
        for buffer in node.registers:
            packed = self._state_words(buffer)
            parts.append((buffer, *packed))
        flat = [v for _, values, _ in parts for v in values]
        kinds = tuple(dtype for _, values, dtype in parts for _ in values)
        flat = self.m.issue(isa_wgmma.wait_group(node.pending, kinds), flat)
        for buffer, values, dtype in parts:
            mine, flat = flat[: len(values)], flat[len(values) :]
            self._keep_words(buffer, mine, dtype)

    def _wait_for_row(self, node: GemmWait, gemm: Gemm) -> None:
        """The same for a row of instructions; the others may still be on their way."""
        assert isinstance(gemm.atom, WgmmaAtom) and gemm.row is not None
        held, row = self.state[gemm.acc.buffer], gemm.atom.registers_of(gemm.row)
        kinds = (gemm.atom.wgmma.acc,) * len(held[row])
        held[row] = self.m.issue(isa_wgmma.wait_group(node.pending, kinds), held[row])

    def _state_words(self, buffer: Buffer) -> tuple[list[Value], DType]:
        """A fragment's registers as an instruction has them."""
        held, dtype = self.state[buffer], buffer.dtype
        if dtype.bits == 32 and dtype.name != "tfloat32":
            return list(held), dtype
        return self.operand_words(held, dtype), uint32

    def _keep_words(self, buffer: Buffer, words: list[Value], dtype: DType) -> None:
        own = buffer.dtype
        if dtype is own:
            self.state[buffer][:] = words
        elif own.bits == 32:
            self.state[buffer][:] = [self.m.bitcast(w, uint32, own) for w in words]
        else:
            self.state[buffer][:] = [v for w in words for v in self.m.unpack(w, own)]


class _Side:
    """An operand in shared memory as descriptors see it: rows along m or n, columns along k, or
    the reverse."""

    def __init__(self, layout: SharedLayout, is_k_major: bool) -> None:
        self.layout = layout
        self.is_k_major = is_k_major
        self.row_bytes = layout.panel * layout.itemsize
        self.panel_bytes = layout.rows * self.row_bytes

    @property
    def descriptor(self) -> int:
        """All of a descriptor but the address (PTX ISA, "Matrix descriptor")."""
        mode = {8: 1, 4: 2, 2: 3, 1: 0}[self.layout.swizzle]
        eight_rows = 8 * self.row_bytes
        if self.is_k_major:  # eight rows to the next; without swizzle, chunks of a row
            return isa_wgmma.descriptor_constant(
                mode, self.panel_bytes if not mode else 16, eight_rows
            )
        if mode:
            return isa_wgmma.descriptor_constant(mode, self.panel_bytes, eight_rows)
        return isa_wgmma.descriptor_constant(mode, eight_rows, self.panel_bytes)

    def offsets(self, count: int, extent: int, steps: int, k: int) -> isa_wgmma.Offsets:
        """Of `count` instructions along m or n and each step of k, in units of 16 bytes."""
        return tuple(
            tuple(self._bytes(n * extent, step * k) // 16 for step in range(steps))
            for n in range(count)
        )

    def _bytes(self, outer: int, k: int) -> int:
        row, column = (outer, k) if self.is_k_major else (k, outer)
        panel, within = divmod(column, self.layout.panel)
        return panel * self.panel_bytes + row * self.row_bytes + within * self.layout.itemsize


def _is_load(copy: Copy) -> bool:
    return copy.src.buffer.scope is Scope.GLOBAL
