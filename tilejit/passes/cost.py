"""How long a kernel will take, from the chip's numbers: what the choice of tiles rests on.

Knows how much each block multiplies, brings and stores, and how blocks share the chip. Does not
know layouts or addresses. The figures are fitted to measurements (`examples/matmul_notes.md`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tilejit.dtypes import DType
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import Kernel, ParamKind
from tilejit.ir.node import Body, For, Load, LoopKind, Node, Parallel, Store, walk
from tilejit.isa.atom import CopyMethod, WgmmaAtom
from tilejit.isa.mma import WARP
from tilejit.layout.boxes import SWIZZLE_ROWS
from tilejit.ops.cluster import MOST_BLOCKS, ROOM_GAP
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Reduce
from tilejit.ops.scan import Scan
from tilejit.passes.box_rows import (
    ABSENT_CLOCKS,
    CLUSTER_CLOCKS,
    LINE_BYTES,
    box_rows,
    bring_clocks,
    crosses_lines,
    row_bytes,
)
from tilejit.passes.bring import is_inward
from tilejit.passes.late import can_wait, strip_widths
from tilejit.passes.nominal import existing, nominal
from tilejit.passes.pipeline import SPARE_BYTES
from tilejit.passes.registers import (
    GROUP,
    REGISTER_FILE,
    SPARE_REGISTERS,
    consumer_registers,
    launch_registers,
)
from tilejit.passes.tail import rows_in_turn
from tilejit.passes.teams import may_take_turns
from tilejit.passes.tiles import slow_shared_by_two
from tilejit.passes.trim import rows_there
from tilejit.passes.wgmma import ROWS, SHARED_BYTES, multiply_clocks
from tilejit.target import Feature, Target

START_CLOCKS = 6250  # launch, the first tiles from memory, the last stores
TILE_CLOCKS = 1000  # of a block's tile, before and after what is counted
KEPT_CLOCKS = 590  # of a block's tile whose results leave later
STORE_BYTES = 53  # a clock, that a block writes from registers
LONE_STORE_BYTES = 44  # a block of one warpgroup
WIDE_SHARE = 1.57  # as long take elements of more than 16 bits, which stmatrix does not write
KEEP_BYTES = 16  # a clock, that a block writes of the sums of a loop that blocks share
SUM_BYTES = 30  # a clock, that the last of those blocks adds up
SUM_CLOCKS = 5500  # until it knows that it is the last
SENT_BYTES = 5.5  # a clock, that a block sends to others of its cluster
SENT_CLOCKS = 750  # until what blocks of a cluster send has come
# of all multiprocessors, what clusters of so many blocks can have at once
# (cuOccupancyMaxActiveClusters on an H100; of 2 blocks all)
CLUSTERED = {3: 0.886, 4: 0.909, 5: 0.833, 6: 0.773, 7: 0.795, 8: 0.909}
ARRIVAL_CLOCKS = 1300  # from the request for a tile to its arrival from the L2 cache, under load
MEMORY_CLOCKS = 1800  # more where it comes from memory
TURN_CLOCKS = 320  # of an iteration at least, until the next can begin
STEP_CLOCKS = 60  # and for each 128 bytes of K
ISSUE_CLOCKS = 58  # of an iteration in which a single warpgroup does not multiply
READ_SHARE = 0.7  # of B, that an instruction reads again which others of a block read too
TMA_BYTES = 128  # a clock, that it brings a multiprocessor where neighbours want the same lines
APART_BYTES = 50  # where those are blocks of its cluster, which have other iterations
WARP_SHARE = 2 / 3  # of the peak of warpgroups, that warps alone reach
MMA_SHARE = 0.8  # of the peak, where warps load their own operands and have time for it
LOAD_ROWS = 16  # of an operand, that one ldmatrix loads for a step of k
MEMORY_SHARE = 0.945  # of the peak bandwidth
SCATTER_BYTES = 620  # of what an iteration brings, that cost memory time and are not there
TOGETHER = 3.4  # how well overlaps what is done together: at 1 not at all
IDLE_SHARE = 0.083  # slower, where few multiprocessors work: they do not draw all of the memory
COOL_SHARE = 0.195  # faster runs the clock while the tensor cores idle, and draw no power
HOT_SHARE = 0.03  # slower it runs where they never idle
BUSY_SHARE = 0.75  # of the time, from which on it gets slower
EDGE_SHARE = 0.022  # of a block's work, in which the chip is not full yet or not any more
UNWRITTEN_BYTES = 17.2e6  # in the L2 cache from before, which make room as others are read
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

    def times(self, factor: float) -> _Work:
        result = _Work()
        result.add(self, factor)
        return result

    def add(self, other: _Work, times: float = 1.0) -> None:
        self.clocks += other.clocks * times
        self.tensor += other.tensor * times
        self.brought += other.brought * times
        self.rows += other.rows * times
        self.read += other.read * times


@dataclass(frozen=True)
class Plan:
    """What is known of a kernel whose atoms are chosen.

    loop: of the loops that blocks may share, apart: where clusters are used for that and not to
    bring tiles; rest: all else of a block. has_room: blocks that each add up a part of the sums
    have memory for what comes from others. tiles: blocks of the grid. sum_bytes: of a tile's
    accumulators. brought_bytes: a clock, that a block brings of tiles. at_once: blocks that a
    multiprocessor holds. scatter: how much longer memory takes because it is read in small pieces.
    has_turns: two teams of consumers take turns. is_late: a tile's results leave during the next
    one's multiplies. is_shared: blocks share tiles that are slow to bring.
    """

    target: Target
    loop: _Work
    apart: _Work
    has_room: bool
    rest: _Work
    tiles: float
    memory_bytes: float
    sum_bytes: float
    brought_bytes: float
    at_once: int = 1
    scatter: float = 1.0
    has_turns: bool = False
    is_late: bool = False
    is_shared: bool = False

    def estimate(self, parts: int = 1, is_shared_out: bool = False) -> Estimate:
        """The time with so many blocks a tile; is_shared_out: they are a cluster."""
        chip, loop, running = self.target.chip, self.loop, self.target.chip.multiprocessors
        rest, sums = self.rest.clocks, 0.0
        if is_shared_out:
            rest = TILE_CLOCKS + (rest - TILE_CLOCKS) / parts
            clusters = int(running * CLUSTERED.get(parts, 1.0)) // parts
            running = max(1, clusters) * parts
            sums = SENT_CLOCKS + self.sum_bytes * (parts - 1) / parts / SENT_BYTES
            loop = self.apart
        elif parts > 1:
            sums = SUM_CLOCKS + self.sum_bytes * (1 / KEEP_BYTES + parts / SUM_BYTES)
        each = loop.clocks / parts + rest
        units = max(1.0, self.tiles) * parts
        here = min(self.at_once, math.ceil(units / running))
        throughput = here * max(loop.tensor, loop.brought / self.brought_bytes) / parts
        each = max(each, throughput)
        if self.has_turns and parts == 1:
            each = max(loop.clocks, each / 2)
        if self.is_late and parts == 1:
            each = loop.clocks + KEPT_CLOCKS
        waves, last = divmod(units, running * here)
        whole = 1 - last / units
        multiplied = (self.loop.tensor + self.rest.tensor) * self.tiles / chip.multiprocessors
        idle = max(0.0, 1 - multiplied / (each * math.ceil(units / running / here)))
        moved = self.memory_bytes + min(self.memory_bytes, UNWRITTEN_BYTES)
        hot = max(0.0, 1 - idle - BUSY_SHARE) / (1 - BUSY_SHARE)
        # than the clock that memory's bytes are counted by
        faster = (1 + COOL_SHARE * idle) * (1 - HOT_SHARE * hot)
        memory = moved / (chip.memory_bytes * MEMORY_SHARE) * self.scatter * faster
        clocks = START_CLOCKS * faster + _together(waves * each, memory * whole) + waves * sums
        if last:
            clocks += _together(each, memory * (1 - whole)) + sums
        clocks += EDGE_SHARE * each
        if self.is_shared and not is_shared_out:
            clocks += CLUSTER_CLOCKS
        clocks *= 1 + IDLE_SHARE * max(0.0, 1 - units / chip.multiprocessors)
        busy = multiplied / clocks
        bound = "the tensor cores"
        if memory > math.ceil(units / running / here) * each:
            bound = "memory"
        elif 2 * (loop.tensor + self.rest.tensor) < each * parts:
            waits_for_tiles = 2 * loop.clocks > each * parts and loop.brought > 0
            bound = "bringing tiles" if waits_for_tiles else "work besides"
        return Estimate(clocks / (chip.clock * faster * 1e9), busy, bound)


def _together(*clocks: float) -> float:
    """Clocks of what overlaps, but less the more alike they are: each has to wait at times."""
    longest = max(*clocks, 1.0)
    shares = [(c / longest) ** TOGETHER for c in clocks]
    return longest * math.pow(sum(shares), 1 / TOGETHER)


def plan(kernel: Kernel) -> Plan | str:
    """What the kernel costs; why not, where it does not fit the chip.

    Needs: atoms.
    """
    assert kernel.target is not None, "select did not run"
    return _Planner(kernel, kernel.target).run()


def holds_fragments(kernel: Kernel, threads: int) -> bool:
    """Whether so many threads may have registers for the kernel's fragments. False where `plan`
    would say so too; it knows more once atoms are chosen."""
    most = max(consumer_registers(threads), launch_registers(threads))
    return _fragment_words(kernel) / threads + SPARE_REGISTERS <= most


def _fragment_words(kernel: Kernel) -> float:
    return sum(math.prod(b.extents) * b.dtype.bytes / 4 for b in kernel.scoped(Scope.FRAGMENT))


@dataclass
class _Planner:
    kernel: Kernel
    target: Target
    loop: _Work = field(default_factory=_Work)
    slots: int = 1
    arrival: float = ARRIVAL_CLOCKS
    least: float = 0.0
    has_turns: bool = False
    halved: Sequence[Copy] = ()
    brought_bytes: float = 0.0  # a clock
    weighed: dict[Node, _Work] = field(default_factory=dict)  # what `single` has found

    def run(self) -> Plan | str:
        nodes = list(walk(self.kernel.body))
        brought = [n for n in nodes if isinstance(n, Copy) and n.is_tma]
        self.brought_bytes = self.target.chip.brought_bytes
        if brought:
            self.brought_bytes = max(self.brought_bytes, TMA_BYTES)
        shared, each = self.shared_bytes()
        if shared + each > self.target.shared_bytes:
            return f"{shared + each} bytes of shared memory are more than a block can have"
        words = _fragment_words(self.kernel)
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
        self.has_turns = bool(brought) and threads == GROUP and may_take_turns(self.kernel)
        memory = self.memory_bytes()
        if any(crosses_lines(n) for n in brought):
            inward = [n for n in brought if is_inward(n)]
            _, self.halved = slow_shared_by_two(self.kernel, inward, _is_dividable)
        self.visit(self.kernel.body)
        reads = max(1.0, tiles * self.loop.brought)
        self.arrival += MEMORY_CLOCKS * min(1.0, memory / reads)
        self.loop = _Work()
        rest = self.visit(self.kernel.body)
        rest.clocks += TILE_CLOCKS
        sums = {n.acc.buffer for n in nodes if isinstance(n, Gemm)}
        together, is_shared = self.loop, bool(self.halved)
        brought_bytes = self.brought_bytes
        has_room = self.has_room(sums, brought, shared + each * (self.slots - 1))
        if self.halved:
            self.halved = ()
            self.weighed.clear()
        if has_room and brought:
            self.loop, self.brought_bytes = _Work(), APART_BYTES
            self.visit(self.kernel.body)
        return Plan(
            target=self.target,
            loop=together,
            apart=self.loop,
            has_room=has_room,
            rest=rest,
            tiles=tiles,
            memory_bytes=memory,
            brought_bytes=brought_bytes,
            sum_bytes=sum(math.prod(b.extents) * b.dtype.bytes for b in sums),
            at_once=max(1, at_once),
            has_turns=self.has_turns,
            is_late=bool(brought) and self.is_late(),
            is_shared=is_shared,
            scatter=1 + SCATTER_BYTES / self.least if self.least else 1.0,
        )

    def has_room(self, sums: set[Buffer], brought: Sequence[Copy], shared: int) -> bool:
        """Whether blocks that have each a part of the sums have memory for what comes from others:
        beside all else, or where tiles were that are brought.

        shared: bytes of a block with all slots.
        """
        room = 0
        for buffer in sums:
            *rows, columns = buffer.extents
            gaps = MOST_BLOCKS * ROOM_GAP
            room += math.prod(rows) * (columns + gaps) * max(4, buffer.dtype.bytes)
        loops = (n for n in self.kernel.body if isinstance(n, For))
        inside = (n for loop in loops for n in loop.body if isinstance(n, Copy))
        tiles = {n.dst.buffer for n in inside if n in brought}
        if tiles:
            apart = (b for b in self.kernel.scoped(Scope.SHARED) if b not in tiles)
            shared = sum(math.prod(b.extents) * b.dtype.bytes for b in apart)
        return shared + room + SPARE_BYTES <= self.target.shared_bytes

    def is_late(self) -> bool:
        """Whether the tile's results can leave during the next one's multiplies."""
        copy = self.kernel.body[-1]
        if self.kernel.num_threads == GROUP or not isinstance(copy, Copy):
            return False
        scopes = copy.src.buffer.scope, copy.dst.buffer.scope
        atoms = (n.atom for n in walk(self.kernel.body) if isinstance(n, Gemm))
        atom = next((a for a in atoms if isinstance(a, WgmmaAtom)), None)
        if atom is None:
            return False
        widths = strip_widths(atom.wgmma.n, copy.dst.buffer.dtype.bytes)
        strips = atom.rows * atom.columns * len(widths)
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
                found = self.weighed.get(node)
                if found is None:
                    found = self.weighed[node] = self.single(node)
                work.add(found)
        return work

    def repeat(self, node: For, work: _Work) -> None:
        """A loop: what it brings arrives while it multiplies, if it is a pipeline."""
        times = max(0.0, (nominal(node.stop) - nominal(node.start)) / node.step)
        inner = self.visit(node.body)
        if node.kind is not LoopKind.PIPELINED or not any(_is_ahead(n) for n in node.body):
            work.add(inner, times)
            return
        transfer = inner.brought / self.brought_bytes
        arrival = (self.arrival + transfer) / max(1, self.slots - 1)
        groups = self.kernel.num_threads // GROUP
        slabs = [
            n.k * n.a.buffer.dtype.bytes / LINE_BYTES for n in node.body if isinstance(n, Gemm)
        ]
        slab = max(1.0, *slabs, 1.0)  # of K, in lines of memory
        piece = inner.brought / slab
        self.least = min(self.least or piece, piece)
        is_alone = groups < 2 and not self.has_turns  # nobody multiplies while it waits
        ways = (inner.read + inner.brought) / SHARED_BYTES, transfer, inner.rows
        is_covered = not is_alone and inner.tensor > max(ways)
        step = max(
            inner.tensor + (ISSUE_CLOCKS if is_alone else 0),
            max(ways) if is_covered else _together(*ways),
            arrival,
            TURN_CLOCKS + STEP_CLOCKS * slab,
        )
        if self.slots < 2:
            step += arrival  # it has nothing to do meanwhile
        self.loop.add(_Work(step + inner.clocks, inner.tensor, inner.brought), times)

    def single(self, node: Node) -> _Work:
        if isinstance(node, Gemm):
            return self.gemm(node)
        if isinstance(node, Copy):
            size = math.prod(node.dst.extents) * node.src.buffer.dtype.bytes
            if _is_ahead(node):
                share = existing(node.src)
                rows = bring_clocks([node], self.halved) if node.is_tma else 0.0
                if node.is_tma and not rows_there(node):
                    rows += box_rows(node) * (1 - share) * ABSENT_CLOCKS
                return _Work(brought=size * share, rows=rows)
            if Scope.GLOBAL in (node.src.buffer.scope, node.dst.buffer.scope):
                rows = rows_in_turn(self.kernel, node)  # all but the last leave meanwhile
                wide = WIDE_SHARE if node.dst.buffer.dtype.bytes > 2 else 1
                return _Work(clocks=size / self.store_bytes * wide / rows)
        if isinstance(node, Parallel):
            touched = [n.buffer for n in walk(node.body) if isinstance(n, Load | Store)]
            size = sum(b.dtype.bytes for b in touched if b.scope is Scope.GLOBAL)
            return _Work(clocks=math.prod(node.extents) * size / self.store_bytes)
        if isinstance(node, Reduce | Scan):
            size = math.prod(node.src.extents)
            return _Work(clocks=size / REDUCE_A_CLOCK + TRADE_CLOCKS)
        return _Work()

    @property
    def store_bytes(self) -> float:
        """What the block writes from registers in a clock."""
        return STORE_BYTES if self.kernel.num_threads > GROUP else LONE_STORE_BYTES

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
            clocks = multiply_clocks(node)
            return _Work(tensor=clocks, read=_operand_bytes(node, node.atom))
        if node.atom is None or node.atom.mma is None:
            return _Work(clocks=node.m * node.n * node.k / FMA_A_CLOCK)
        rate = chip.tensor_macs * (1 if self.is_unpacked(node) else _speed(operand))
        if self.target.has(Feature.WGMMA):
            rate *= WARP_SHARE
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
    """What a multiply by warpgroups reads of shared memory."""
    down = atom.groups_m * atom.rows
    rows = down * ROWS if node.a.buffer.scope is Scope.SHARED else 0
    columns = atom.wgmma.n * (1 + READ_SHARE * (down - 1))
    across = atom.groups_n * atom.columns
    return across * (rows + columns) * node.k * node.a.buffer.dtype.bytes


def _is_dividable(copy: Copy) -> bool:
    """Whether two blocks can bring half of a tile each, in whole swizzles."""
    if len(copy.dst.extents) < 2:
        return False
    *_, rows, columns = copy.dst.extents
    panels = columns * copy.dst.buffer.dtype.bytes // row_bytes(copy)
    return rows % (2 * SWIZZLE_ROWS) == 0 or panels % 2 == 0


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
