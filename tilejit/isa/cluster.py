"""Clusters: blocks that run at once, meet at a barrier and reach each other's shared memory.

Knows the instructions. Does not know why blocks would work together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.target import Feature

_NEEDS = frozenset({Feature.CLUSTER})


def _arrive(releases: bool, lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.cluster_arrive(releases)
    return ()


def _wait(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.cluster_wait()
    return ()


def _rank(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    return (np.full(lanes.thread.shape, lanes.cluster_rank(), np.uint32),)


def _map(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    return (lanes.map_shared(inputs[0], inputs[1]),)


# PTX ISA, "barrier.cluster": every thread of the cluster arrives, then waits. What a thread did
# before its arrival is visible to the others after their wait.
CLUSTER_ARRIVE = Instruction(
    name="barrier.cluster.arrive",
    ptx="barrier.cluster.arrive.release.aligned;",
    needs=_NEEDS,
    meaning=partial(_arrive, True),
)

# The same for a thread that has written nothing that the others want to see.
CLUSTER_ARRIVE_RELAXED = Instruction(
    name="barrier.cluster.arrive.relaxed",
    ptx="barrier.cluster.arrive.relaxed.aligned;",
    needs=_NEEDS,
    meaning=partial(_arrive, False),
)

CLUSTER_WAIT = Instruction(
    name="barrier.cluster.wait",
    ptx="barrier.cluster.wait.acquire.aligned;",
    needs=_NEEDS,
    meaning=_wait,
)

# PTX ISA, "Special registers: %cluster_ctarank"
CTA_RANK = Instruction(
    name="cluster_ctarank",
    ptx="mov.u32 $d0, %cluster_ctarank;",
    outputs=(dtypes.uint32,),
    needs=_NEEDS,
    meaning=_rank,
    has_effect=False,
)

# PTX ISA, "mapa". Inputs: an address in the own block's shared memory, the rank of a block.
# Output: the same place in that block, as `load_cluster` and `store_cluster` take it.
MAPA = Instruction(
    name="mapa",
    ptx="mapa.shared::cluster.u32 $d0, $a0, $a1;",
    outputs=(dtypes.uint32,),
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_NEEDS,
    meaning=_map,
    has_effect=False,
)


@cache
def load_cluster(bits: int) -> Instruction:
    """Load 32 or 64 bits from the shared memory of a block of the cluster.

    Input: an address made by `MAPA`, aligned to the access. The other block must not end before.
    """
    dtype = _word(bits)

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        address = np.broadcast_to(inputs[0], lanes.thread.shape)
        _check_aligned(lanes, address, bits)
        content = np.ascontiguousarray(lanes.read("cluster", address, bits // 8))
        return (content.view(dtype.numpy)[:, 0],)

    # PTX ISA, "Data movement and conversion instructions: ld"
    return Instruction(
        name=f"ld.shared::cluster.b{bits}",
        ptx=f"ld.shared::cluster.b{bits} $d0, [$a0];",
        outputs=(dtype,),
        inputs=(dtypes.uint32,),
        needs=_NEEDS,
        meaning=meaning,
    )


@cache
def store_cluster(bits: int) -> Instruction:
    """Store 32 or 64 bits likewise. Inputs: the address, the value."""
    dtype = _word(bits)

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        address = np.broadcast_to(inputs[0], lanes.thread.shape)
        value = np.broadcast_to(inputs[1], lanes.thread.shape)
        _check_aligned(lanes, address, bits)
        content = np.ascontiguousarray(value).view(np.uint8).reshape(-1, bits // 8)
        lanes.write("cluster", address, content)
        return ()

    # PTX ISA, "Data movement and conversion instructions: st"
    return Instruction(
        name=f"st.shared::cluster.b{bits}",
        ptx=f"st.shared::cluster.b{bits} [$a0], $a1;",
        inputs=(dtypes.uint32, dtype),
        needs=_NEEDS,
        meaning=meaning,
    )


@cache
def send(bits: int, width: int = 1) -> Instruction:
    """Store `width` neighbours of 32 or 64 bits, 16 bytes at most, to the shared memory of a block
    of the cluster without waiting for it; a barrier of that block counts the bytes when they are
    there.

    Inputs: an address made by `MAPA`, aligned to the access, the values, the barrier's address made
    by `MAPA` likewise. The thread's other accesses are not ordered with it.
    """
    dtype = _word(bits)
    assert width in (1, 2, 4) and width * bits <= 128, f"{width} words of {bits} bits"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        address, barrier = (np.broadcast_to(inputs[k], lanes.thread.shape) for k in (0, -1))
        values = [np.broadcast_to(v, lanes.thread.shape) for v in inputs[1:-1]]
        _check_aligned(lanes, address, bits * width)
        content = np.stack(values, axis=-1).view(np.uint8).reshape(-1, bits // 8 * width)
        lanes.write("cluster", address, content)
        lanes.mbarrier_receive(barrier, bits // 8 * width)
        return ()

    # PTX ISA, "Data movement and conversion instructions: st.async"
    vector = "" if width == 1 else f".v{width}"
    values = ", ".join(f"$a{n + 1}" for n in range(width))
    values = values if width == 1 else f"{{{values}}}"
    how = "st.async.shared::cluster.mbarrier::complete_tx::bytes"
    return Instruction(
        name=f"st.async{vector}.b{bits}",
        ptx=f"{how}{vector}.b{bits} [$a0], {values}, [$a{width + 1}];",
        inputs=(dtypes.uint32, *(dtype,) * width, dtypes.uint32),
        needs=_NEEDS | {Feature.MBARRIER_TX},
        meaning=meaning,
    )


def _word(bits: int) -> dtypes.DType:
    assert bits in (32, 64), f"an access of {bits} bits to another block"
    return dtypes.uint32 if bits == 32 else dtypes.uint64


def _check_aligned(lanes: LaneContext, address: Array, bits: int) -> None:
    assert not (address[lanes.active] % (bits // 8)).any(), f"{bits} bits are not aligned"
