"""mbarrier: barriers in shared memory that count arrivals and have phases.

Knows the instructions. Does not know what a barrier guards.

A barrier is 8 bytes, 8-byte aligned. Its phase completes when as many arrivals have come as it was
initialised with and as many bytes as it was told to expect; waiting for parity p returns once the
phase of that parity (0, 1, 0, ...) is complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.target import Feature, Target

BYTES = 8
_NEEDS = frozenset({Feature.MBARRIER})
_TRANSACTIONS = _NEEDS | {Feature.MBARRIER_TX}


def _init(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_init(inputs[0], inputs[1])
    return ()


def _arrive(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_arrive(inputs[0])
    return ()


def _expect(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_expect(inputs[0], inputs[1])
    return ()


def _arrive_expect(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_expect(inputs[0], inputs[1])
    lanes.mbarrier_arrive(inputs[0])
    return ()


def _arrive_cluster(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_arrive(lanes.map_shared(inputs[0], inputs[1]))
    return ()


def _fence_init(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_fence()
    return ()


def _wait(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_wait(inputs[0], inputs[1])
    return ()


# PTX ISA, "mbarrier.init". Inputs: shared address, arrivals a phase. One thread executes it, and
# a block barrier makes it known to the others.
INIT = Instruction(
    name="mbarrier.init",
    ptx="mbarrier.init.shared.b64 [$a0], $a1;",
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_NEEDS,
    meaning=_init,
)

# PTX ISA, "mbarrier.arrive". Releases the thread's earlier accesses to those who wait.
ARRIVE = Instruction(
    name="mbarrier.arrive",
    ptx="mbarrier.arrive.shared.b64 _, [$a0];",
    inputs=(dtypes.uint32,),
    needs=_NEEDS,
    meaning=_arrive,
)

# PTX ISA, "mbarrier.expect_tx". Inputs: shared address, bytes that the current phase also waits
# for; what copies to it asynchronously tells it the bytes that have come.
EXPECT = Instruction(
    name="mbarrier.expect_tx",
    ptx="mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$a0], $a1;",
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_TRANSACTIONS,
    meaning=_expect,
)

# PTX ISA, "mbarrier.arrive". The same, then one arrival. Inputs: shared address, bytes.
ARRIVE_EXPECT = Instruction(
    name="mbarrier.arrive.expect_tx",
    ptx="mbarrier.arrive.expect_tx.shared::cta.b64 _, [$a0], $a1;",
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_TRANSACTIONS,
    meaning=_arrive_expect,
)

# PTX ISA, "mapa", "mbarrier.arrive". One arrival at the barrier of another block of the cluster. It
# orders no memory of that block: release at the cluster's scope costs a fence of the whole device.
# Inputs: the barrier's address in the own block, the rank of the other block.
ARRIVE_CLUSTER = Instruction(
    name="mbarrier.arrive.cluster",
    ptx="{\n"
    ".reg .b32 remote;\n"
    "mapa.shared::cluster.u32 remote, $a0, $a1;\n"
    "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
    "}",
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_TRANSACTIONS | {Feature.CLUSTER},
    meaning=_arrive_cluster,
)

# PTX ISA, "membar, fence": makes the thread's initialised barriers known to the cluster and to
# asynchronous copies; a barrier of the cluster or the block follows, and that of the cluster may be
# come to without release.
FENCE_INIT = Instruction(
    name="fence.mbarrier_init",
    ptx="fence.mbarrier_init.release.cluster;",
    needs=frozenset({Feature.CLUSTER}),
    meaning=_fence_init,
)


def _wait_loop(test: str, space: str = "shared") -> str:
    return (
        "{\n"
        ".reg .pred complete;\n"
        "wait_${uid}:\n"
        f"mbarrier.{test}.{space}.b64 complete, [$a0], $a1;\n"
        "@!complete bra wait_${uid};\n"
        "}"
    )


# PTX ISA, "mbarrier.test_wait, mbarrier.try_wait". Inputs: shared address, parity (0 or 1).
TEST_WAIT = Instruction(
    name="mbarrier.test_wait.parity",
    ptx=_wait_loop("test_wait.parity"),
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_NEEDS,
    meaning=_wait,
)

# The same, but the thread may sleep while the hardware waits; came with the transaction counts.
TRY_WAIT = Instruction(
    name="mbarrier.try_wait.parity",
    ptx=_wait_loop("try_wait.parity"),
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_TRANSACTIONS,
    meaning=_wait,
)

# The same, where other blocks of the cluster arrive: what they did before is visible after it.
TRY_WAIT_CLUSTER = Instruction(
    name="mbarrier.try_wait.parity.cluster",
    ptx=_wait_loop("try_wait.parity.acquire.cluster", "shared::cta"),
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_TRANSACTIONS | {Feature.CLUSTER},
    meaning=_wait,
)


def wait_parity(target: Target, cluster: bool = False) -> Instruction:
    """The target's best way to wait for a phase.

    Bytes that asynchronous copies have announced to the barrier are visible after it.
    cluster: threads of other blocks of the cluster arrive too.
    """
    if cluster:
        return TRY_WAIT_CLUSTER
    return TRY_WAIT if target.has(*TRY_WAIT.needs) else TEST_WAIT
