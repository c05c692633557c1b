"""mbarrier: barriers in shared memory that count arrivals and have phases.

Knows the instructions. Does not know what a barrier guards.

A barrier is 8 bytes, 8-byte aligned. Its phase completes when as many arrivals have come as it was
initialised with; waiting for parity p returns once the phase of that parity (0, 1, 0, ...) is
complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.target import Feature, Target

BYTES = 8
_NEEDS = frozenset({Feature.MBARRIER})


def _init(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_init(inputs[0], inputs[1])
    return ()


def _arrive(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.mbarrier_arrive(inputs[0])
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


def _wait_loop(test: str) -> str:
    return (
        "{\n"
        ".reg .pred complete;\n"
        "wait_${uid}:\n"
        f"mbarrier.{test}.parity.shared.b64 complete, [$a0], $a1;\n"
        "@!complete bra wait_${uid};\n"
        "}"
    )


# PTX ISA, "mbarrier.test_wait, mbarrier.try_wait". Inputs: shared address, parity (0 or 1).
TEST_WAIT = Instruction(
    name="mbarrier.test_wait.parity",
    ptx=_wait_loop("test_wait"),
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_NEEDS,
    meaning=_wait,
)

# The same, but the thread may sleep while the hardware waits; came with the transaction counts.
TRY_WAIT = Instruction(
    name="mbarrier.try_wait.parity",
    ptx=_wait_loop("try_wait"),
    inputs=(dtypes.uint32, dtypes.uint32),
    needs=_NEEDS | {Feature.MBARRIER_TX},
    meaning=_wait,
)


def wait_parity(target: Target) -> Instruction:
    """The target's best way to wait for a phase."""
    return TRY_WAIT if target.has(*TRY_WAIT.needs) else TEST_WAIT
