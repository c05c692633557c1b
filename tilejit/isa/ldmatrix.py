"""ldmatrix: a warp loads 8x8 matrices of 16-bit elements from shared memory.

Knows which lane gets which element. Does not know layouts or what the elements mean: a row is 16
bytes, so it also moves rows of four 32-bit or sixteen 8-bit elements when not transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.isa.mma import WARP, whole_warps
from tilejit.target import Feature

ROW_BYTES = 16


@cache
def ldmatrix(count: int, transposed: bool = False) -> Instruction:
    """Load `count` (1, 2 or 4) matrices.

    Input: a uint32 shared address a lane, 16-byte aligned; lanes 8*i to 8*i + 7 address the rows
    of matrix i, later lanes' addresses are ignored.
    Outputs: one uint32 a matrix: lane l gets elements (l // 4, 2 * (l % 4)) and the next of that
    row; transposed, elements (2 * (l % 4), l // 4) and the next of that column. The first is in
    the low half.
    """
    assert count in (1, 2, 4), f"ldmatrix.x{count}"
    name = f"ldmatrix.x{count}" + (".trans" if transposed else "")
    outputs = ", ".join(f"$d{i}" for i in range(count))
    modifier = ".trans" if transposed else ""

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        whole_warps(lanes, name)
        words = _read_rows(lanes, inputs[0], count, name)
        if transposed:
            halves = words.view(np.uint16).reshape(-1, count, 8, 8)
            words = np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)
        return tuple(words[:, i].reshape(-1) for i in range(count))

    # PTX ISA, "Warp-level matrix load instruction: ldmatrix"
    return Instruction(
        name=name,
        ptx=f"ldmatrix.sync.aligned.m8n8.x{count}{modifier}.shared.b16 {{{outputs}}}, [$a0];",
        outputs=(dtypes.uint32,) * count,
        inputs=(dtypes.uint32,),
        needs=frozenset({Feature.LDMATRIX}),
        meaning=meaning,
    )


def _read_rows(lanes: LaneContext, address: Array, count: int, name: str) -> Array:
    """The rows as uint32 (warps, count, 8, 4)."""
    by_warp = np.broadcast_to(address, lanes.thread.shape).reshape(-1, WARP)
    used = np.tile(by_warp[:, : 8 * count], (1, 4 // count)).reshape(-1)
    assert not (used[lanes.active] % ROW_BYTES).any(), f"{name}: a row is not 16-byte aligned"
    rows = np.ascontiguousarray(lanes.read("shared", used, ROW_BYTES))
    words = rows.view(np.uint32).reshape(-1, WARP, 4)[:, : 8 * count]
    return np.ascontiguousarray(words).reshape(-1, count, 8, 4)
