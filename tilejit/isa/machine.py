"""What emitters are written against: a machine that executes scalar code for every thread.

Two machines exist. The LLVM machine (`lower`) records the code of one thread; the lane machine
(`sim`) executes it at once for many threads, a value being an array with one element a lane. An
emitter is an ordinary function of a machine, so the simulator runs the very index maths, swizzles
and instruction choices that the GPU will.

Values are opaque to emitters. A value has the dtype it was made with; dtypes narrower than 32 bits
are storage only, except integers: float16, bfloat16 and float8 values can be moved, selected,
cast, packed and bit-cast, but arithmetic on them is the emitter's (cast to float32 and back).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tilejit.dtypes import DType
from tilejit.errors import Span
from tilejit.isa.instruction import Instruction

if TYPE_CHECKING:
    from tilejit.isa.tma import Box, TensorMap

Value = Any
State = dict[Any, list[Value]]
# Of consecutive elements those that exist: the first one's number and that after the last, int32
Part = tuple[Value, Value]


@dataclass(frozen=True, slots=True)
class Address:
    """A byte address: `base` plus `offset` plus `constant`.

    space: "global", "shared" or "local".
    base: an address value (global: of a parameter, or a 64-bit integer; local: from
        `alloc_local`; shared: None, offsets count from the block's dynamic shared memory).
    offset: an int32, uint32 or int64 value in bytes, or None for 0.
    constant: bytes, known at compile time.
    align: power of two that provably divides the address.
    readonly: nothing writes this memory while the kernel runs.
    """

    space: str
    base: Value | None
    offset: Value | None
    constant: int = 0
    align: int = 1
    readonly: bool = False


class Machine(Protocol):
    """Operations an emitter may use. `dtype` is always that of the operands.

    checks_indexes: `check_index` does something, so indexes are worth computing for it.
    """

    checks_indexes: bool

    def const(self, value: bool | int | float, dtype: DType) -> Value: ...

    def thread_index(self) -> Value:
        """Linear index (x fastest) of the thread in the block, int32."""

    def binary(self, op: str, a: Value, b: Value, dtype: DType) -> Value:
        """`ir.expr` BINARY or COMPARE on integers of any width, float32, float64 (not `and or xor
        shl shr`), bool (`and or xor eq ne`). floordiv and floormod round down, also on floats."""

    def quotient(self, a: Value, b: Value, dtype: DType) -> Value:
        """a // b of unsigned integers, where b is known not to be 0."""

    def unary(self, op: str, a: Value, dtype: DType) -> Value:
        """`ir.expr` UNARY, PREDICATES on integers, float32, float64, bool; MATH on float32 and
        float64 (popcount, clz on integers)."""

    def fma(self, a: Value, b: Value, c: Value, dtype: DType) -> Value:
        """a * b + c: rounded once for float32 and float64, wrapping for integers."""

    def cast(self, values: Sequence[Value], source: DType, target: DType) -> list[Value]:
        """Convert each as `ir.expr.cast` says; neighbours may share an instruction."""

    def bitcast(self, a: Value, source: DType, target: DType) -> Value: ...

    def select(self, condition: Value, a: Value, b: Value) -> Value: ...

    def pack(self, values: Sequence[Value], dtype: DType) -> Value:
        """32 bits' worth of elements (four of 8 bits, two of 16, one of 32) to a uint32, the
        first in the lowest bits."""

    def unpack(self, word: Value, dtype: DType) -> list[Value]:
        """The inverse of `pack`."""

    def load(
        self,
        address: Address,
        dtype: DType,
        count: int = 1,
        when: Value | None = None,
        part: Part | None = None,
    ) -> list[Value]:
        """`count` consecutive elements; zeros where `when` is false and outside of `part`. One
        access when `count` times the element size is a power of two up to 16 and divides the
        alignment, else as few as the alignment allows; of a part that is not all, one an element
        (in global and shared memory only)."""

    def store(
        self,
        address: Address,
        values: Sequence[Value],
        dtype: DType,
        when: Value | None = None,
        part: Part | None = None,
    ) -> None:
        """The inverse of `load`; nothing is written where that gives zeros."""

    def atomic(
        self,
        address: Address,
        combine: str,
        value: Value,
        dtype: DType,
        when: Value | None = None,
        want_old: bool = False,
    ) -> Value | None:
        """Combine in one step (relaxed, device scope for global memory): add, min, max, and, or,
        xor, exch. Returns the old value if wanted (0 where `when` is false)."""

    def check_index(
        self, index: Sequence[Value], extents: Sequence[int], name: str, when: Value | None = None
    ) -> None:
        """Report an index (int64) outside the buffer `name`, where `when` is true."""

    def alloc_local(self, size: int, align: int) -> Value:
        """The base of `size` bytes of memory of each thread's own."""

    def address(self, address: Address) -> Value:
        """The address as an integer: uint32 in shared memory, uint64 else."""

    def issue(
        self,
        instruction: Instruction,
        inputs: Sequence[Value] = (),
        when: Value | None = None,
    ) -> list[Value]:
        """Execute a machine instruction; with `when`, only where it is true (such an instruction
        has no outputs)."""

    def branch(
        self,
        condition: Value,
        then: Callable[[], None],
        orelse: Callable[[], None] | None,
        state: State,
    ) -> None:
        """Run `then` where the condition holds, `orelse` elsewhere. Both change `state` (its
        lists, in place); afterwards it holds each thread's values."""

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        dtype: DType,
        body: Callable[[Value], None],
        state: State,
    ) -> None:
        """`for i in range(start, stop, step)`: `body(i)` changes `state`."""

    def loop_while(self, test: Callable[[], Value], body: Callable[[], None], state: State) -> None:
        """`while test(): body()`; both may change `state`."""


class LaneContext(Protocol):
    """What an instruction's meaning may use: the lanes (simulated threads) that execute it.

    Arrays have one row a lane. Lanes are whole warps in order, so `reshape(-1, 32)` is by warp.
    """

    thread: np.ndarray[Any, Any]  # linear thread index, int32
    active: np.ndarray[Any, Any]  # bool: the instruction takes effect in this lane

    def read(self, space: str, address: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
        """`size` bytes at each active lane's address, uint8 (lanes, size); zeros elsewhere.
        Reports addresses outside any buffer and shared-memory races."""

    def write(
        self,
        space: str,
        address: np.ndarray[Any, Any],
        data: np.ndarray[Any, Any],
        where: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Write `data` (lanes, size) at each active lane's address, only in the lanes `where`."""

    def copy_async(
        self,
        shared: np.ndarray[Any, Any],
        source: np.ndarray[Any, Any],
        size: int,
        valid: np.ndarray[Any, Any],
    ) -> None:
        """Queue a copy of `size` bytes from global to shared memory; bytes from `valid` on are
        zeros. It lands when its group has been waited for, not before."""

    def commit_async(self) -> None: ...

    def wait_async(self, pending: int) -> None: ...

    def sync_block(self, barrier: int, threads: int) -> None:
        """All of `threads` threads meet at hardware barrier `barrier`; 0 is all of the block's."""

    def arrive_block(self, barrier: int, threads: int) -> None:
        """The active lanes come to that barrier and do not wait."""

    def sync_warp(self) -> None:
        """The active lanes of each warp meet."""

    # Barriers in shared memory: an address may also be one that `map_shared` gave, except where
    # the lanes wait or initialise.

    def mbarrier_init(self, address: np.ndarray[Any, Any], count: np.ndarray[Any, Any]) -> None: ...

    def mbarrier_arrive(self, address: np.ndarray[Any, Any]) -> None: ...

    def mbarrier_expect(self, address: np.ndarray[Any, Any], count: np.ndarray[Any, Any]) -> None:
        """The current phase also waits for `count` bytes."""

    def mbarrier_fence(self) -> None:
        """Those that the active lanes have made are known to who waits at the cluster's barrier
        for what comes next."""

    def mbarrier_receive(self, address: np.ndarray[Any, Any], count: int) -> None:
        """Each active lane has brought `count` bytes that the current phase waits for."""

    def mbarrier_wait(
        self, address: np.ndarray[Any, Any], parity: np.ndarray[Any, Any]
    ) -> None: ...

    # Bulk copies of tensors. One lane starts each; `lane` is its number among the lanes.

    def tensor_map(self, handle: int) -> TensorMap:
        """The tensor map whose address in the parameters the kernel takes `handle` for."""

    def load_box(self, lane: int, box: Box, shared: int, barrier: int, mask: int | None) -> None:
        """Queue a copy of `box` to shared memory. It lands as late as possible and then tells the
        barrier its bytes; with `mask`, in every block of the cluster whose bit is set, at the same
        place and the same barrier there."""

    def store_box(self, lane: int, box: Box, shared: int, add: bool) -> None:
        """Queue a copy from shared memory to `box`, or its addition. Shared memory is read and
        global memory written when the lane waits for it or the kernel ends."""

    def commit_stores(self) -> None:
        """The lane's queued stores since the last call become a group."""

    def wait_stores(self, pending: int, read: bool) -> None:
        """Each lane waits until at most `pending` of its newest groups are not complete, or, for
        `read`, have not read shared memory."""

    def fence_async(self) -> None:
        """What the active lanes wrote to shared memory is visible to asynchronous copies and
        matrix products from now on."""

    # Matrix products of warpgroups (128 lanes, numbered within the lanes).

    def start_product(
        self,
        warpgroup: int,
        reads: np.ndarray[Any, Any],
        finish: Callable[[np.ndarray[Any, Any]], None],
    ) -> None:
        """Queue a product that reads 16 bytes of shared memory at each address of `reads`. Once
        its group has been waited for, `finish` gets what is there then, uint8 (reads, 16)."""

    def commit_products(self) -> None:
        """The queued products of each warpgroup since the last call become a group."""

    def wait_products(self, pending: int) -> None:
        """Each warpgroup waits until at most `pending` of its newest groups are not complete."""

    # The cluster and the grid.

    def cluster_rank(self) -> int:
        """The block's number in its cluster."""

    def cluster_index(self) -> int:
        """The cluster's number along x in the grid."""

    def grid_blocks(self) -> int:
        """Blocks along x in the grid."""

    def map_shared(
        self, address: np.ndarray[Any, Any], rank: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Where other blocks of the cluster see the address of the block of that rank, uint32:
        `read` and `write` take it in space "cluster"."""

    def cluster_arrive(self, releases: bool) -> None:
        """The active lanes come to the cluster's barrier; `releases`: with their writes."""

    def cluster_wait(self) -> None:
        """The active lanes wait until all of the cluster have come to its barrier."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The type of a value that passes through the generated Python code.

    count: None for a scalar of `dtype`; else a tuple of that many `dtype` elements, dtype being
        int32, uint32, int64, uint64, float32 or float64 (narrower elements are packed in uint32).
    address: the scalar is the address of global memory (a raw pointer parameter).
    tensor_map: the scalar is the address of a tensor map among the parameters (uint64).
    """

    dtype: DType
    count: int | None = None
    address: bool = False
    tensor_map: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Granule:
    """A piece of a kernel that one call in the generated source stands for.

    emit: given a machine and the input values (a list of values for a tuple slot), runs the code
        and returns the outputs alike.
    span: the user's line, for errors.
    """

    name: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    emit: Callable[[Machine, list[Any]], list[Any]]
    span: Span | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """A kernel as generated: Python source that calls granules by name.

    source: a module with one function, `entry`, of the parameters in order.
    parameters: name and type of each.
    noalias: which parameters are addresses of memory that nothing else in the call overlaps.
    threads: threads of a block; shared_bytes: its dynamic shared memory.
    lanes: threads that run the skeleton's control flow together in the simulator: all of them
        (`threads`), or 32 when warps go different ways through blocking operations, or 128 when
        warpgroups do.
    cluster: blocks of a cluster along x, y and z; the grid is a multiple of it.
    min_blocks: blocks that a multiprocessor has registers for at once.
    tensor_maps: which parameters are tensor maps; empty when none is. Their argument in the
        simulator is a `tma.TensorMap`.
    """

    source: str
    entry: str
    parameters: tuple[tuple[str, Slot], ...]
    noalias: tuple[bool, ...]
    granules: dict[str, Granule]
    threads: tuple[int, int, int]
    shared_bytes: int
    fast_math: bool = False
    lanes: int = 0
    cluster: tuple[int, int, int] = (1, 1, 1)
    tensor_maps: tuple[bool, ...] = ()
    min_blocks: int = 1
