"""stmatrix: a warp stores 8x8 matrices of 16-bit elements to shared memory.

Knows which lane gives which element. Does not know layouts or what the elements mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.ldmatrix import ROW_BYTES
from tilejit.isa.machine import LaneContext
from tilejit.isa.mma import WARP, whole_warps
from tilejit.target import Feature


@cache
def stmatrix(count: int, transposed: bool = False) -> Instruction:
    """Store `count` (1, 2 or 4) matrices: the inverse of ldmatrix.

    Inputs: a uint32 shared address a lane, 16-byte aligned, of which lanes 8*i to 8*i + 7 address
    the rows of matrix i and later lanes' are ignored; then one uint32 a matrix: lane l gives
    elements (l // 4, 2 * (l % 4)) and the next of that row, transposed (2 * (l % 4), l // 4) and
    the next of that column. The first is in the low half.
    """
    assert count in (1, 2, 4), f"stmatrix.x{count}"
    modifier = ".trans" if transposed else ""
    name = f"stmatrix.x{count}{modifier}"
    words = ", ".join(f"$a{1 + i}" for i in range(count))

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        whole_warps(lanes, name)
        address = np.broadcast_to(inputs[0], lanes.thread.shape)
        used = np.arange(len(address)) % WARP < 8 * count
        assert not (address[lanes.active & used] % ROW_BYTES).any(), (
            f"{name}: a row is not 16-byte aligned"
        )
        lanes.write("shared", address, _rows(inputs[1:], transposed), used)
        return ()

    # PTX ISA, "Warp-level matrix store instruction: stmatrix"
    return Instruction(
        name=name,
        ptx=f"stmatrix.sync.aligned.m8n8.x{count}{modifier}.shared.b16 [$a0], {{{words}}};",
        inputs=(dtypes.uint32,) * (1 + count),
        needs=frozenset({Feature.STMATRIX}),
        meaning=meaning,
    )


def _rows(words: Sequence[Array], transposed: bool) -> Array:
    """(lanes, 16) bytes: the row that each lane addresses, zeros for those that address none."""
    count = len(words)
    matrices = np.stack(words).reshape(count, -1, WARP).swapaxes(0, 1)  # (warps, count, 32)
    halves = np.ascontiguousarray(matrices).view(np.uint16).reshape(-1, count, 8, 8)
    if transposed:
        halves = halves.swapaxes(2, 3)
    rows = np.zeros((len(halves), WARP, ROW_BYTES // 2), np.uint16)
    rows[:, : 8 * count] = halves.reshape(-1, 8 * count, 8)
    return rows.reshape(-1, ROW_BYTES // 2).view(np.uint8)
