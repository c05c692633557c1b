"""Wide stores of accumulators: lanes of a quad trade words until each holds 16 neighbouring bytes.

Matrix instructions leave two neighbouring elements of a row in each of four lanes (PTX ISA, "Matrix
fragments for mma"). Stored as they are, 16-bit elements fill half of a 32-byte sector an access.
Knows fragment digits and shuffles. Does not know nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilejit.dtypes import DType, int32, uint32
from tilejit.isa.machine import Machine, Value
from tilejit.isa.special import shuffle
from tilejit.layout.fragment import REGISTER, THREAD, FragmentLayout

LANES = 4  # of a quad
PAIR = 2  # neighbouring elements that a lane holds before the trade
TILES = 4  # rows of LANES * PAIR elements traded together: a lane ends with one of them
ROW = LANES * PAIR  # elements, 16 bytes


def tile_stride(layout: FragmentLayout, dtype: DType) -> int | None:
    """Registers from one row of a quad to the next, when the layout's last dimension is quads of
    pairs of 16-bit elements in enough registers to trade; else None."""
    if layout.flat or layout.is_padded or layout.threads % 32 or dtype.bytes != 2:
        return None
    if not layout.dims or len(layout.dims[-1]) < 3:
        return None
    *_, tiles, lanes, pair = layout.dims[-1]
    if (pair.place, pair.size, pair.stride) != (REGISTER, PAIR, 1):
        return None
    if (lanes.place, lanes.size, lanes.stride) != (THREAD, LANES, 1):
        return None
    return tiles.stride if tiles.place == REGISTER and tiles.size % TILES == 0 else None


MATRIX = 8  # rows and columns of what stmatrix stores a lane's pair of


def matrix_strides(layout: FragmentLayout, dtype: DType) -> tuple[int, int] | None:
    """Registers from a matrix of 8x8 to the one 8 rows below and to the one 8 columns on, when
    warps hold such matrices as stmatrix wants them (PTX ISA, stmatrix); else None."""
    across = tile_stride(layout, dtype)
    if across is None or len(layout.dims) < 2 or len(layout.dims[-2]) < 2:
        return None
    *_, halves, lanes = layout.dims[-2]
    if (lanes.place, lanes.size, lanes.stride) != (THREAD, MATRIX, LANES):
        return None
    if (halves.place, halves.size) != (REGISTER, 2):
        return None
    return halves.stride, across


def trade(m: Machine, words: Sequence[Value], lane: Value) -> list[Value]:
    """The four words of row `lane` of four, each lane holding one word of every row.

    words: of rows 0 to 3; lane: its number in the quad, int32.
    """
    # between neighbours the rows of each pair, then across the quad one pair for the other
    low = trade_pair(m, [words[0]], [words[1]], lane, 1)
    high = trade_pair(m, [words[2]], [words[3]], lane, 1)
    return trade_pair(m, low, high, lane, 2)


def trade_pair(
    m: Machine, first: list[Value], second: list[Value], lane: Value, step: int
) -> list[Value]:
    """Lanes without the bit `step` end with both halves of `first`, the others of `second`; the
    half from the lower lane comes first."""
    bit = m.binary("and", lane, m.const(step, int32), int32)
    is_upper = m.binary("ne", bit, m.const(0, int32), int32)
    sent = [m.select(is_upper, a, b) for a, b in zip(first, second, strict=True)]
    distance = m.const(step, uint32)
    received = [m.issue(shuffle("bfly"), [w, distance])[0] for w in sent]
    kept = [m.select(is_upper, b, a) for a, b in zip(first, second, strict=True)]
    lower = [m.select(is_upper, r, k) for r, k in zip(received, kept, strict=True)]
    upper = [m.select(is_upper, k, r) for r, k in zip(received, kept, strict=True)]
    return lower + upper
