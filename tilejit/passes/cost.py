"""How long a kernel will take, from the chip's numbers: what the choice of tiles rests on.

Knows how much each block multiplies, brings and stores, and how blocks share the chip. Does not
know layouts or addresses. The figures are fitted to measurements (`examples/matmul_notes.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tilejit.dtypes import DType
from tilejit.ir.buffer import Scope
from tilejit.ir.kernel import Kernel, ParamKind
from tilejit.ir.node import Body, For, Load, LoopKind, Node, Parallel, Store, walk
from tilejit.isa.atom import CopyMethod, WgmmaAtom
from tilejit.isa.mma import WARP
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Reduce
from tilejit.passes.late import STRIP_ROW, can_wait
from tilejit.passes.nominal import existing, nominal
from tilejit.passes.registers import (
    GROUP,
    REGISTER_FILE,
    SPARE_REGISTERS,
    consumer_registers,
    launch_registers,
)
from tilejit.passes.tail import rows_in_turn
from tilejit.passes.teams import FEWEST_TILES, reduces_between
from tilejit.passes.trim import rows_there
from tilejit.passes.wgmma import ROWS, SHARED_BYTES, multiply_clocks
from tilejit.target import Target

START_CLOCKS = 8000  # launch, the first tiles from memory, the last stores
TILE_CLOCKS = 1500  # of a block's tile, before and after what is counted
KEPT_CLOCKS = 600  # of a block's tile whose results leave later
STORE_BYTES = 32  # a clock, that a block writes from registers
KEEP_BYTES = 16  # a clock, that a block writes of the sums of a loop that blocks share
SUM_BYTES = 44  # a clock, that the last of those blocks adds up
SUM_CLOCKS = 4500  # until it knows that it is the last
ARRIVAL_CLOCKS = 1300  # from the request for a tile to its arrival from the L2 cache, under load
MEMORY_CLOCKS = 1600  # more where it comes from memory
TURN_CLOCKS = 80  # of an iteration at least, until the next can begin
STEP_CLOCKS = 270  # and for each 128 bytes of K
ISSUE_CLOCKS = 60  # of an iteration in which a single warpgroup does not multiply
ROW_BYTES = 128  # of a box, which TMA brings at once
ROW_CLOCKS = 1.85  # that it takes for one, long or short
ROW_SHARE = 0.007  # slower, for each row of instructions of a warpgroup but the first
ABSENT_CLOCKS = 5.0  # for one that lies outside of the tensor
MMA_SHARE = 0.8  # of the peak, where warps load their own operands and have time for it
LOAD_ROWS = 16  # of an operand, that one ldmatrix loads for a step of k
MEMORY_SHARE = 0.9  # of the peak bandwidth
SCATTER_BYTES = 900  # of what an iteration brings, that cost memory time and are not there
ALONE_SHARE = 0.02  # of work and memory traffic, whichever is shorter, that does not overlap
IDLE_SHARE = 0.08  # slower, where few multiprocessors work: they do not draw all of the memory
EDGE_SHARE = 0.05  # of a block's work, in which the chip is not full yet or not any more
UNWRITTEN_BYTES = 20e6  # in the L2 cache from before, which make room as others are read
MAX_SLOTS = 12
PLAIN_SLOTS = 3  # of loops that bring tiles by cp.async
STRIP_BYTES = 32 * 1024  # of shared memory, where results leave by TMA
FMA_A_CLOCK = 64  # without tensor cores
REDUCE_A_CLOCK = 64  # elements that reductions combine
TRADE_CLOCKS = 200  # of a reduction, until lanes and warps have traded
MAX_WARPS = 48  # of a multiprocessor; some chips have more


@dataclass(frozen=True)
class Estimate:
    """seconds: of a launch at the chip's usual clock. busy: share of it in which the tensor cores
    multiply. bound: what takes the time."""

    seconds: float
    busy: float
    bound: str


@dataclass
class _Work:
    """Of one block. clocks: not overlapped; tensor: of the tensor cores, overlapped or not;
    brought, rows: bytes from global to shared memory, and clocks for the rows of at most 128 bytes
    that they lie in; read: bytes of operands from there."""

    clocks: float = 0.0
    tensor: float = 0.0
    brought: float = 0.0
    rows: float = 0.0
    read: float = 0.0

    def add(self, other: _Work, times: float = 1.0) -> None:
        self.clocks += other.clocks * times
        self.tensor += other.tensor * times
        self.brought += other.brought * times
        self.rows += other.rows * times
        self.read += other.read * times


@dataclass(frozen=True)
class Plan:
    """What is known of a kernel whose atoms are chosen.

    loop: of the loops that blocks may share; rest: all else of a block. tiles: blocks of the grid.
    sum_bytes: of a tile's accumulators. at_once: blocks that a multiprocessor holds. scatter: how
    much longer memory takes because it is read in small pieces. has_turns: two teams of consumers
    take turns. is_late: a tile's results leave during the next one's
    multiplies.
    """

    target: Target
    loop: _Work
    rest: _Work
    tiles: float
    memory_bytes: float
    sum_bytes: float
    at_once: int = 1
    scatter: float = 1.0
    has_turns: bool = False
    is_late: bool = False

    def estimate(self, parts: int = 1) -> Estimate:
        """The time with so many blocks a tile."""
        chip = self.target.chip
        each = self.loop.clocks / parts + self.rest.clocks
        sums = 0.0
        if parts > 1:
            sums = SUM_CLOCKS + self.sum_bytes * (1 / KEEP_BYTES + parts / SUM_BYTES)
        units = max(1.0, self.tiles) * parts
        here = min(self.at_once, math.ceil(units / chip.multiprocessors))
        throughput = here * max(self.loop.tensor, self.loop.brought / chip.brought_bytes) / parts
        each = max(each, throughput)
        if self.has_turns and parts == 1:
            each = max(self.loop.clocks, each / 2)
        if self.is_late and parts == 1:
            each = self.loop.clocks + KEPT_CLOCKS
        moved = self.memory_bytes + min(self.memory_bytes, UNWRITTEN_BYTES)
        memory = moved / (chip.memory_bytes * MEMORY_SHARE) * self.scatter
        waves, last = divmod(units, chip.multiprocessors * here)
        whole = 1 - last / units
        clocks = START_CLOCKS + _both(waves * each, memory * whole) + waves * sums
        if last:
            clocks += _both(each, memory * (1 - whole)) + sums
        clocks += EDGE_SHARE * each
        clocks *= 1 + IDLE_SHARE * max(0.0, 1 - units / chip.multiprocessors)
        busy = (self.loop.tensor + self.rest.tensor) * self.tiles / chip.multiprocessors / clocks
        bound = "the tensor cores"
        if 2 * (self.loop.tensor + self.rest.tensor) < each * parts:
            bound = "work besides"
        if memory > math.ceil(units / chip.multiprocessors / here) * each:
            bound = "memory"
        elif self.loop.brought / chip.brought_bytes > self.loop.tensor:
            bound = "bringing tiles"
        return Estimate(clocks / (chip.clock * 1e9), busy, bound)


def _both(work: float, memory: float) -> float:
    """Clocks of what overlaps, but not all of it."""
    return max(work, memory) + ALONE_SHARE * min(work, memory)


def plan(kernel: Kernel) -> Plan | str:
    """What the kernel costs; why not, where it does not fit the chip.

    Needs: atoms.
    """
    assert kernel.target is not None, "select did not run"
    return _Planner(kernel, kernel.target).run()


@dataclass
class _Planner:
    kernel: Kernel
    target: Target
    loop: _Work = field(default_factory=_Work)
    slots: int = 1
    arrival: float = ARRIVAL_CLOCKS
    least: float = 0.0
    has_turns: bool = False

    def run(self) -> Plan | str:
        nodes = list(walk(self.kernel.body))
        brought = [n for n in nodes if isinstance(n, Copy) and n.is_tma]
        shared, each = self.shared_bytes()
        if shared + each > self.target.shared_bytes:
            return f"{shared + each} bytes of shared memory are more than a block can have"
        words = sum(
            math.prod(b.extents) * b.dtype.bytes / 4 for b in self.kernel.scoped(Scope.FRAGMENT)
        )
        threads = self.kernel.num_threads
        operands = [self.operand_words(n) for n in nodes if isinstance(n, Gemm)]
        registers = words / threads + SPARE_REGISTERS + max(operands, default=0)
        most = consumer_registers(threads) if brought else launch_registers(threads)
        if registers > most:
            return f"about {registers:.0f} registers a thread are more than it can have"
        self.slots = MAX_SLOTS
        if each:
            free = self.target.shared_bytes - shared - (STRIP_BYTES if brought else 0)
            self.slots = int(max(1, min(self.slots, 1 + free // each)))
        if not brought:
            self.slots = min(self.slots, PLAIN_SLOTS)
        at_once = 1
        if not brought:
            at_once = int(
                min(
                    self.target.shared_bytes // max(1, shared + each * (self.slots - 1)),
                    REGISTER_FILE // (threads * registers),
                    MAX_WARPS * WARP // threads,
                )
            )
        tiles = math.prod(nominal(e) for e in self.kernel.grid)
        is_enough = tiles >= FEWEST_TILES * self.target.chip.multiprocessors
        self.has_turns = bool(brought) and threads == GROUP and is_enough
        self.has_turns &= not reduces_between(self.kernel)
        memory = self.memory_bytes()
        self.visit(self.kernel.body)
        reads = max(1.0, tiles * self.loop.brought)
        self.arrival += MEMORY_CLOCKS * min(1.0, memory / reads)
        self.loop = _Work()
        rest = self.visit(self.kernel.body)
        rest.clocks += TILE_CLOCKS
        sums = {n.acc.buffer for n in nodes if isinstance(n, Gemm)}
        return Plan(
            target=self.target,
            loop=self.loop,
            rest=rest,
            tiles=tiles,
            memory_bytes=memory,
            sum_bytes=sum(math.prod(b.extents) * b.dtype.bytes for b in sums),
            at_once=max(1, at_once),
            has_turns=self.has_turns,
            is_late=bool(brought) and self.is_late(),
            scatter=1 + SCATTER_BYTES / self.least if self.least else 1.0,
        )

    def is_late(self) -> bool:
        """Whether the tile's results can leave during the next one's multiplies."""
        copy = self.kernel.body[-1]
        if self.kernel.num_threads == GROUP or not isinstance(copy, Copy):
            return False
        scopes = copy.src.buffer.scope, copy.dst.buffer.scope
        row = copy.src.extents[-1] * copy.dst.buffer.dtype.bytes
        strips = math.ceil(row / STRIP_ROW)
        return scopes == (Scope.FRAGMENT, Scope.GLOBAL) and can_wait(self.kernel, copy, strips)

    def shared_bytes(self) -> tuple[int, int]:
        """Of a block with one slot of each tile, and of one slot more where stages are open."""
        size = {b: math.prod(b.extents) * b.dtype.bytes for b in self.kernel.scoped(Scope.SHARED)}
        total, each = sum(size.values()), 0
        for loop in walk(self.kernel.body):
            if isinstance(loop, For) and loop.kind is LoopKind.PIPELINED:
                fed = {n.dst.buffer for n in loop.body if isinstance(n, Copy) and _is_ahead(n)}
                slot = sum(size.get(b, 0) for b in fed)
                if loop.num_stages is None:
                    each += slot
                else:
                    total += slot * max(0, loop.num_stages - 1)
        return total, each

    def memory_bytes(self) -> float:
        """Of all tensors, each read or written once."""
        tensors = [p.buffer for p in self.kernel.params if p.kind is ParamKind.TENSOR]
        return sum(math.prod(nominal(e) for e in b.shape) * b.dtype.bytes for b in tensors if b)

    # ---- what a block does ------------------------------------------------------------------

    def visit(self, body: Body) -> _Work:
        work = _Work()
        for node in body:
            if isinstance(node, For):
                self.repeat(node, work)
            elif node.bodies and not isinstance(node, Parallel | Gemm):
                for inner in node.bodies:
                    work.add(self.visit(inner))
            else:
                work.add(self.single(node))
        return work

    def repeat(self, node: For, work: _Work) -> None:
        """A loop: what it brings arrives while it multiplies, if it is a pipeline."""
        times = max(0.0, (nominal(node.stop) - nominal(node.start)) / node.step)
        inner = self.visit(node.body)
        if node.kind is not LoopKind.PIPELINED or not any(_is_ahead(n) for n in node.body):
            work.add(inner, times)
            return
        chip = self.target.chip
        transfer = inner.brought / chip.brought_bytes
        arrival = (self.arrival + transfer) / max(1, self.slots - 1)
        groups = self.kernel.num_threads // GROUP
        issue = ISSUE_CLOCKS if groups < 2 and not self.has_turns else 0.0
        slabs = [n.k * n.a.buffer.dtype.bytes / ROW_BYTES for n in node.body if isinstance(n, Gemm)]
        slab = max(1.0, *slabs, 1.0)  # of K, in lines of memory
        piece = inner.brought / slab
        self.least = min(self.least or piece, piece)
        step = max(
            inner.tensor + issue,
            (inner.read + inner.brought) / SHARED_BYTES,
            transfer,
            inner.rows,
            arrival,
            TURN_CLOCKS + STEP_CLOCKS * slab,
        )
        self.loop.add(_Work(step + inner.clocks, inner.tensor, inner.brought), times)

    def single(self, node: Node) -> _Work:
        if isinstance(node, Gemm):
            return self.gemm(node)
        if isinstance(node, Copy):
            size = math.prod(node.dst.extents) * node.src.buffer.dtype.bytes
            if _is_ahead(node):
                row = min(node.dst.extents[-1] * node.src.buffer.dtype.bytes, ROW_BYTES)
                share = existing(node.src)
                absent = 0.0 if rows_there(node) else ABSENT_CLOCKS
                each = share * ROW_CLOCKS + (1 - share) * absent
                rows = size / row * each if node.is_tma else 0.0
                return _Work(brought=size * share, rows=rows)
            if Scope.GLOBAL in (node.src.buffer.scope, node.dst.buffer.scope):
                rows = rows_in_turn(self.kernel, node)  # all but the last leave meanwhile
                return _Work(clocks=size / STORE_BYTES / rows)
        if isinstance(node, Parallel):
            touched = [n.buffer for n in walk(node.body) if isinstance(n, Load | Store)]
            size = sum(b.dtype.bytes for b in touched if b.scope is Scope.GLOBAL)
            return _Work(clocks=math.prod(node.extents) * size / STORE_BYTES)
        if isinstance(node, Reduce):
            size = math.prod(node.src.extents)
            return _Work(clocks=size / REDUCE_A_CLOCK + TRADE_CLOCKS)
        return _Work()

    def operand_words(self, node: Gemm) -> float:
        """Registers of a thread for the operands of mma.sync: of this step of K and the next."""
        if node.atom is None or node.atom.mma is None:
            return 0
        rows = node.m / node.atom.warps_m + node.n / node.atom.warps_n
        size = 2 if self.is_unpacked(node) else node.a.buffer.dtype.bytes
        return 2 * rows * node.atom.mma.k * size / 4 / WARP

    def is_unpacked(self, node: Gemm) -> bool:
        operand = node.a.buffer.dtype
        return operand.is_float and operand.bits == 8 and self.target.chip.unpacks_fp8

    def gemm(self, node: Gemm) -> _Work:
        chip, operand = self.target.chip, node.a.buffer.dtype
        if isinstance(node.atom, WgmmaAtom):
            clocks = multiply_clocks(node) * (1 + ROW_SHARE * (node.atom.rows - 1))
            return _Work(tensor=clocks, read=_operand_bytes(node, node.atom))
        if node.atom is None or node.atom.mma is None:
            return _Work(clocks=node.m * node.n * node.k / FMA_A_CLOCK)
        rate = chip.tensor_macs * (1 if self.is_unpacked(node) else _speed(operand))
        down, across = node.atom.warps_m, node.atom.warps_n
        reads = node.m * across + node.n * down  # rows of operands that all warps load
        warps = self.kernel.num_threads // WARP
        repeated = warps / (down * across)
        mma = node.atom.mma
        products = node.m // down // mma.m * (node.n // across // mma.n)
        loads = node.m / down / LOAD_ROWS + node.n / across / LOAD_ROWS  # issued between them
        share = MMA_SHARE * products / (products + loads)
        multiply = node.m * node.n * node.k / (rate * share) * repeated
        return _Work(tensor=multiply, read=reads * node.k * operand.bytes)


def _operand_bytes(node: Gemm, atom: WgmmaAtom) -> float:
    """What a multiply by warpgroups reads of shared memory: B once for instructions in a row that
    differ in A only."""
    groups = atom.groups_m * atom.groups_n * atom.columns
    rows = atom.rows * ROWS if node.a.buffer.scope is Scope.SHARED else 0
    return groups * (rows + atom.wgmma.n) * node.k * node.a.buffer.dtype.bytes


def _speed(operand: DType) -> float:
    """Products a clock, in those of 16-bit operands."""
    return 1 / 16 if operand.bits == 64 else 16 / operand.bits


def _is_ahead(node: Node) -> bool:
    """Whether a copy arrives while other work goes on."""
    return (
        isinstance(node, Copy)
        and node.atom is not None
        and node.atom.method in (CopyMethod.TMA, CopyMethod.CP_ASYNC)
        and node.dst.buffer.scope is Scope.SHARED
    )
