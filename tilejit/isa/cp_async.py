"""cp.async: copies from global to shared memory that complete later.

Knows the copies and their groups. Does not know pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.target import Feature

_NEEDS = frozenset({Feature.CP_ASYNC})


@cache
def cp_async(size: int, is_cached: bool = False) -> Instruction:
    """Copy `size` bytes (4, 8 or 16), both addresses aligned to `size`.

    Inputs: the uint32 shared address, the uint64 global address, and the uint32 number of bytes
    to read (at most `size`); the bytes after them become 0, and with 0 nothing is read. The copy
    may be waited for once it has been committed in a group.
    is_cached: keep the line in L1; only copies of 16 bytes can do without.
    """
    assert size in (4, 8, 16), f"cp.async copies 4, 8 or 16 bytes, not {size}"
    level = "ca" if is_cached or size < 16 else "cg"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        shared, source, valid = (np.broadcast_to(x, lanes.thread.shape) for x in inputs)
        assert not (valid[lanes.active] > size).any(), f"cp.async reads more than {size} bytes"
        lanes.copy_async(shared, source, size, valid)
        return ()

    # PTX ISA, "Data movement and conversion instructions: cp.async"
    return Instruction(
        name=f"cp.async.{level}.{size}",
        ptx=f"cp.async.{level}.shared.global [$a0], [$a1], {size}, $a2;",
        inputs=(dtypes.uint32, dtypes.uint64, dtypes.uint32),
        needs=_NEEDS,
        meaning=meaning,
    )


def _commit(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.commit_async()
    return ()


# PTX ISA, "cp.async.commit_group": the thread's copies since the last one become a group
COMMIT_GROUP = Instruction(
    name="cp.async.commit_group",
    ptx="cp.async.commit_group;",
    needs=_NEEDS,
    meaning=_commit,
)


@cache
def wait_group(pending: int) -> Instruction:
    """Wait until at most `pending` of the thread's newest groups are not complete.

    Other threads see the copied bytes only after a barrier that follows.
    """
    assert pending >= 0, f"cp.async.wait_group {pending}"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        lanes.wait_async(pending)
        return ()

    # PTX ISA, "cp.async.wait_group, cp.async.wait_all"
    return Instruction(
        name=f"cp.async.wait_group.{pending}",
        ptx=f"cp.async.wait_group {pending};",
        needs=_NEEDS,
        meaning=meaning,
    )


def _wait_all(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    lanes.commit_async()
    lanes.wait_async(0)
    return ()


# PTX ISA, "cp.async.wait_group, cp.async.wait_all": commits, then waits for every group
WAIT_ALL = Instruction(
    name="cp.async.wait_all",
    ptx="cp.async.wait_all;",
    needs=_NEEDS,
    meaning=_wait_all,
)
