"""Barriers of a block and a warp, and the fence between their memory accesses.

Knows the instructions. Does not know who must meet where.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext

WHOLE_BLOCK = 0  # the hardware barrier at which all threads of the block meet
NUM_BARRIERS = 16


@cache
def bar_sync(barrier: int, threads: int) -> Instruction:
    """Wait at hardware barrier `barrier` until `threads` threads have come.

    Memory accesses before it are visible to those threads after it. Barrier 0 is the whole
    block's and takes any number; the others count whole warps.
    """
    assert 0 <= barrier < NUM_BARRIERS, f"there is no hardware barrier {barrier}"
    assert barrier == WHOLE_BLOCK or threads % 32 == 0, f"{threads} threads are no whole warps"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        lanes.sync_block(barrier, threads)
        return ()

    # PTX ISA, "Parallel synchronization and communication instructions: bar, barrier"
    count = "" if barrier == WHOLE_BLOCK else f", {threads}"
    return Instruction(
        name=f"bar.sync.{barrier}.{threads}",
        ptx=f"bar.sync {barrier}{count};",
        meaning=meaning,
    )


@cache
def bar_arrive(barrier: int, threads: int) -> Instruction:
    """Come to hardware barrier `barrier` of `threads` threads without waiting for the others.

    Those who `bar_sync` there see the thread's earlier memory accesses.
    """
    assert WHOLE_BLOCK < barrier < NUM_BARRIERS, f"nobody can arrive at barrier {barrier}"
    assert threads % 32 == 0, f"{threads} threads are no whole warps"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        lanes.arrive_block(barrier, threads)
        return ()

    return Instruction(
        name=f"bar.arrive.{barrier}.{threads}",
        ptx=f"bar.arrive {barrier}, {threads};",
        meaning=meaning,
    )


@cache
def bar_sync_at(threads: int) -> Instruction:
    """`bar_sync` at the hardware barrier whose number is the input (uint32, the same in a warp)."""
    assert threads % 32 == 0, f"{threads} threads are no whole warps"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        lanes.sync_block(_number(lanes, inputs[0]), threads)
        return ()

    return Instruction(
        name=f"bar.sync.r.{threads}",
        ptx=f"bar.sync $a0, {threads};",
        inputs=(dtypes.uint32,),
        meaning=meaning,
    )


@cache
def bar_arrive_at(threads: int) -> Instruction:
    """`bar_arrive` at the hardware barrier whose number is the input."""
    assert threads % 32 == 0, f"{threads} threads are no whole warps"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        lanes.arrive_block(_number(lanes, inputs[0]), threads)
        return ()

    return Instruction(
        name=f"bar.arrive.r.{threads}",
        ptx=f"bar.arrive $a0, {threads};",
        inputs=(dtypes.uint32,),
        meaning=meaning,
    )


def _number(lanes: LaneContext, numbers: Array) -> int:
    """The barrier that all executing threads of the simulated group mean."""
    found = set(np.broadcast_to(numbers, lanes.thread.shape)[lanes.active].tolist())
    assert len(found) == 1, f"threads that run together come to barriers {sorted(found)}"
    (number,) = found
    assert WHOLE_BLOCK < number < NUM_BARRIERS, f"there is no hardware barrier {number}"
    return int(number)


def _meet_in_warp(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.sync_warp()
    return ()


def _nothing(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """Lanes run in lockstep and see each other's writes at once."""
    return ()


# PTX ISA, "bar.warp.sync"
SYNC_WARP = Instruction(
    name="bar.warp.sync",
    ptx="bar.warp.sync 0xffffffff;",
    meaning=_meet_in_warp,
)

# PTX ISA, "membar, fence": the thread's accesses before it come first for the whole block
FENCE_BLOCK = Instruction(
    name="membar.cta",
    ptx="membar.cta;",
    meaning=_nothing,
)

# The same for all threads of the device
FENCE_DEVICE = Instruction(
    name="fence.acq_rel.gpu",
    ptx="fence.acq_rel.gpu;",
    meaning=_nothing,
)
