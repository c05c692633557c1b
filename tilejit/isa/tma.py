"""cp.async.bulk.tensor: boxes of a tensor move between global and shared memory by themselves.

Knows tensor maps, where a box's bytes are in both memories, and the instructions. Does not know
how maps are encoded or passed to a kernel, nor when copies land.

Shapes, strides, boxes and coordinates stand outermost first, as NumPy's do; the hardware's order
is the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import ml_dtypes
import numpy as np

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.target import Feature

MAX_RANK = 5
SHARED_ALIGN = 128  # of a box in shared memory, bytes
CHUNK = 16  # bytes that stay together under every swizzle
_NEEDS = frozenset({Feature.TMA})
_KINDS: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint64": np.dtype(np.uint64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "tfloat32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

# How long a copy's lines stay in the L2 cache: the 64-bit policies that `hint` instructions take,
# as CUTLASS has them (TMA::CacheHintSm90).
EVICTION_POLICY: dict[str, int] = {
    "evict_normal": 0x1000000000000000,
    "evict_first": 0x12F0000000000000,
    "evict_last": 0x14F0000000000000,
}


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled is told of a tensor in global memory and of its boxes.

    strides: bytes; the last is the element size and not passed on.
    box: extents of what one instruction copies.
    swizzle: span in bytes (32, 64, 128) within which the 16-byte chunks of a box's rows are
        permuted in shared memory, by XOR with the higher address bits; 0 for none.
    rounds: float32 elements are rounded to tf32 (to nearest even) when loaded.
    kind: element type as the encoder names it.
    """

    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    rounds: bool = False
    kind: str = "uint8"

    @property
    def is_empty(self) -> bool:
        """True for a tensor without elements: no map describes it, but its boxes are zeros."""
        return 0 in self.shape

    def problem(self) -> str:
        """Why the hardware would refuse it, or an empty string (CUDA driver API,
        cuTensorMapEncodeTiled)."""
        rank = len(self.shape)
        if not 1 <= rank <= MAX_RANK:
            return f"it has {rank} dimensions, not 1 to {MAX_RANK}"
        if len(self.strides) != rank or len(self.box) != rank:
            return "its shape, strides and box differ in length"
        if self.kind not in _KINDS or _KINDS[self.kind].itemsize != self.itemsize:
            return f"no element type {self.kind!r} has {self.itemsize} bytes"
        if self.rounds and self.kind != "tfloat32":
            return f"elements of type {self.kind!r} are not rounded"
        if self.address % 16:
            return "its address is no multiple of 16"
        if self.strides[-1] != self.itemsize:
            return "its last dimension is not contiguous"
        return self._problem_of_extents()

    def _problem_of_extents(self) -> str:
        for extent in self.shape:
            if not 1 <= extent <= 1 << 32:
                return f"an extent is {extent}, not 1 to 2**32"
        for stride in self.strides[:-1]:
            if stride % 16 or not 0 <= stride < 1 << 40:
                return f"a stride is {stride} bytes, no multiple of 16 below 2**40"
        for extent in self.box:
            if not 1 <= extent <= 256:
                return f"the box has {extent} elements along a dimension, not 1 to 256"
        if self.swizzle not in (0, 32, 64, 128):
            return f"there is no swizzle of {self.swizzle} bytes"
        if self.row_bytes % 16:
            return f"the box's rows have {self.row_bytes} bytes, no multiple of 16"
        if self.swizzle and self.row_bytes > self.swizzle:
            return f"the box's rows have {self.row_bytes} bytes, more than the swizzle's span"
        return ""

    @property
    def row_bytes(self) -> int:
        return self.box[-1] * self.itemsize

    @property
    def box_bytes(self) -> int:
        """What a load tells its barrier, elements outside the tensor included."""
        return math.prod(self.box) * self.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        return _KINDS[self.kind]

    @cached_property
    def _offsets(self) -> Array:
        """Of the box's 16-byte chunks in shared memory, in order, before swizzling."""
        rows = math.prod(self.box[:-1])
        pitch = self.swizzle or self.row_bytes  # rows below the span keep its pitch
        chunks = np.arange(self.row_bytes // CHUNK, dtype=np.int64) * CHUNK
        return (np.arange(rows, dtype=np.int64)[:, None] * pitch + chunks).ravel()


@dataclass(frozen=True)
class Box:
    """The box of a tensor that begins at `start`: inside the tensor or outside, but in a row at a
    multiple of 16 bytes."""

    tensor: TensorMap
    start: tuple[int, ...]

    def chunks(self, shared: int) -> Array:
        """The shared addresses of its 16-byte chunks, in the order of its elements."""
        return swizzled(shared + self.tensor._offsets, self.tensor.swizzle)

    def meets(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part that lies in the tensor: slices of the tensor, and of the box."""
        outer, inner = [], []
        for start, size, extent in zip(self.start, self.tensor.box, self.tensor.shape, strict=True):
            low = min(max(start, 0), extent)
            high = max(min(start + size, extent), low)
            outer.append(slice(low, high))
            inner.append(slice(low - start, high - start) if high > low else slice(0, 0))
        return tuple(outer), tuple(inner)


def swizzled(address: Array, span: int) -> Array:
    """Where the hardware's swizzle of `span` bytes (0, 32, 64, 128) puts a shared address: the
    number of the 16-byte chunk XOR that of the 128-byte line, modulo the chunks of a span."""
    mask = max(span // CHUNK, 1) - 1
    return address ^ ((address >> 7) & mask) << 4  # type: ignore[no-any-return]


def round_to_tf32(values: Array) -> Array:
    """float32 to ten bits of fraction, to nearest even; infinities and NaNs stay."""
    bits = values.view(np.uint32)
    half = np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    rounded = (bits + half) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).view(np.float32)


def _boxes(
    lanes: LaneContext, rank: int, inputs: Sequence[Array], shared: Array
) -> list[tuple[int, Box, int]]:
    """For each active lane its box (inputs: the map, then the coordinates) and shared address."""
    result = []
    for lane in np.flatnonzero(lanes.active).tolist():
        tensor = lanes.tensor_map(int(inputs[0][lane]))
        assert len(tensor.shape) == rank, f"a map of rank {len(tensor.shape)}, used as {rank}"
        assert tensor.is_empty or not tensor.problem(), tensor.problem()
        place = int(shared[lane])
        assert place % SHARED_ALIGN == 0, f"a box at {place} is not aligned to {SHARED_ALIGN}"
        start = tuple(int(x[lane]) for x in inputs[1 : 1 + rank])
        # not in the PTX ISA: measured on an H100, which raises an illegal instruction
        assert start[-1] * tensor.itemsize % CHUNK == 0, (
            f"a box begins at element {start[-1]} of a row, which is no multiple of {CHUNK} bytes"
        )
        result.append((lane, Box(tensor, start), place))
    return result


def _coordinates(rank: int) -> str:
    return "[$a0, {" + ", ".join(f"$a{i}" for i in range(rank, 0, -1)) + "}]"


def _map_inputs(rank: int) -> tuple[dtypes.DType, ...]:
    assert 1 <= rank <= MAX_RANK, f"a tensor of rank {rank}"
    return (dtypes.uint64, *(dtypes.int32,) * rank)


@cache
def tma_load(rank: int, multicast: bool = False, hint: bool = False) -> Instruction:
    """Copy a box to shared memory and tell a barrier its bytes; what is outside becomes 0.

    Inputs: the address of the tensor map, `rank` coordinates, the uint32 shared addresses of the
    box (a multiple of 128) and of the barrier, then if `multicast` a uint16 mask of the blocks of
    the cluster that get the box (at the same place, with the barrier at the same place), then if
    `hint` an EVICTION_POLICY. One thread executes it.
    """
    at = 1 + rank  # number of the input with the destination

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        for lane, box, shared in _boxes(lanes, rank, inputs, inputs[at]):
            mask = int(inputs[at + 2][lane]) if multicast else None
            lanes.load_box(lane, box, shared, int(inputs[at + 1][lane]), mask)
        return ()

    extra = (dtypes.uint16,) * multicast + (dtypes.uint64,) * hint
    modifiers = ".multicast::cluster" * multicast + ".L2::cache_hint" * hint
    # PTX ISA, "Data movement and conversion instructions: cp.async.bulk.tensor"
    return Instruction(
        name=f"cp.async.bulk.tensor.load.{rank}d{modifiers}",
        ptx=f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        f"{modifiers} [$a{at}], {_coordinates(rank)}, [$a{at + 1}]"
        + "".join(f", $a{at + 2 + i}" for i in range(len(extra)))
        + ";",
        inputs=(*_map_inputs(rank), dtypes.uint32, dtypes.uint32, *extra),
        needs=_NEEDS | ({Feature.CLUSTER} if multicast else frozenset()),
        meaning=meaning,
    )


@cache
def tma_store(rank: int, hint: bool = False) -> Instruction:
    """Copy a box from shared to global memory; what is outside the tensor is not written.

    Inputs: the address of the tensor map, `rank` coordinates, the uint32 shared address (a
    multiple of 128), then if `hint` an EVICTION_POLICY. It may be waited for once the thread has
    committed it. Ordinary writes of the source need FENCE_ASYNC by their threads and a barrier
    before.
    """
    modifier = ".L2::cache_hint" * hint
    policy = f", $a{2 + rank}" * hint
    # PTX ISA, "Data movement and conversion instructions: cp.async.bulk.tensor"
    return Instruction(
        name=f"cp.async.bulk.tensor.store.{rank}d{modifier}",
        ptx=f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group{modifier} "
        f"{_coordinates(rank)}, [$a{1 + rank}]{policy};",
        inputs=(*_map_inputs(rank), dtypes.uint32, *(dtypes.uint64,) * hint),
        needs=_NEEDS,
        meaning=lambda lanes, inputs: _store(lanes, rank, inputs, False),
    )


@cache
def tma_reduce_add(rank: int) -> Instruction:
    """Add a box in shared memory to global memory, element by element; inputs as of
    `tma_store`."""
    # PTX ISA, "Data movement and conversion instructions: cp.reduce.async.bulk.tensor"
    return Instruction(
        name=f"cp.reduce.async.bulk.tensor.{rank}d.add",
        ptx=f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.add.tile.bulk_group "
        f"{_coordinates(rank)}, [$a{1 + rank}];",
        inputs=(*_map_inputs(rank), dtypes.uint32),
        needs=_NEEDS,
        meaning=lambda lanes, inputs: _store(lanes, rank, inputs, True),
    )


def _store(lanes: LaneContext, rank: int, inputs: Sequence[Array], add: bool) -> tuple[Array, ...]:
    for lane, box, shared in _boxes(lanes, rank, inputs, inputs[1 + rank]):
        kind, tensor = box.tensor.kind, box.tensor
        # not in the PTX ISA: measured on an H100, see `passes.tma`
        ends_inside = box.start[-1] + tensor.box[-1] <= tensor.shape[-1]
        assert ends_inside or tensor.shape[-1] * tensor.itemsize % CHUNK == 0, (
            f"rows of {tensor.shape[-1]} elements end inside {CHUNK} bytes, which are all written"
        )
        assert not add or kind not in ("uint8", "uint16"), f"elements of type {kind} do not add"
        lanes.store_box(lane, box, shared, add)
    return ()


def _nothing(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """The simulator has no caches."""
    return ()


@cache
def tma_prefetch(rank: int) -> Instruction:
    """Bring a box into the L2 cache. Inputs: the address of the tensor map, `rank` coordinates."""
    # PTX ISA, "Data movement and conversion instructions: cp.async.bulk.prefetch.tensor"
    return Instruction(
        name=f"cp.async.bulk.prefetch.tensor.{rank}d",
        ptx=f"cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile {_coordinates(rank)};",
        inputs=_map_inputs(rank),
        needs=_NEEDS,
        meaning=_nothing,
    )


# PTX ISA, "prefetch": bring a tensor map into the cache of such. Input: its address.
PREFETCH_MAP = Instruction(
    name="prefetch.tensormap",
    ptx="prefetch.tensormap [$a0];",
    inputs=(dtypes.uint64,),
    needs=_NEEDS,
    meaning=_nothing,
)


def _commit(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.commit_stores()
    return ()


# PTX ISA, "cp.async.bulk.commit_group": the thread's stores since the last one become a group
COMMIT_STORES = Instruction(
    name="cp.async.bulk.commit_group",
    ptx="cp.async.bulk.commit_group;",
    needs=_NEEDS,
    meaning=_commit,
)


@cache
def wait_stores(pending: int, read: bool) -> Instruction:
    """Wait until at most `pending` of the thread's newest groups of stores are not complete.

    read: wait only until their sources have been read, so that they may be overwritten; the
    writes to global memory may still be on their way.
    """
    assert pending >= 0, f"cp.async.bulk.wait_group {pending}"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        lanes.wait_stores(pending, read)
        return ()

    modifier = ".read" if read else ""
    # PTX ISA, "cp.async.bulk.wait_group"
    return Instruction(
        name=f"cp.async.bulk.wait_group{modifier}.{pending}",
        ptx=f"cp.async.bulk.wait_group{modifier} {pending};",
        needs=_NEEDS,
        meaning=meaning,
    )


def _fence(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.fence_async()
    return ()


# PTX ISA, "membar, fence": the thread's ordinary writes to shared memory come before what bulk
# copies and wgmma read later. A barrier tells those who start these.
FENCE_ASYNC = Instruction(
    name="fence.proxy.async",
    ptx="fence.proxy.async.shared::cta;",
    needs=_NEEDS,
    meaning=_fence,
)
