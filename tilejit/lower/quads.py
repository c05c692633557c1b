"""Lanes of a quad trade the words of accumulators: for wide stores until each holds 16 neighbouring
bytes, for 8-bit operands until each holds four neighbours.

Matrix instructions leave two neighbouring elements of a row in each of four lanes (PTX ISA, "Matrix
fragments for mma"). Stored as they are, 16-bit elements fill half of a 32-byte sector an access.
Knows fragment digits and shuffles. Does not know nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilejit.dtypes import DType, int32, uint32
from tilejit.isa.machine import Machine, Value
from tilejit.isa.special import PERMUTE, shuffle
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


# Selectors of prmt: the low halves of two words, the high ones, and both with the second word first
LOW, HIGH, LOW_TURNED, HIGH_TURNED = 0x5410, 0x7632, 0x1054, 0x3276


def trade_fours(m: Machine, words: Sequence[Value], lane: Value) -> list[Value]:
    """Each word's four 8-bit elements of 16 that are neighbours, four times the lane's number in
    its quad from the first.

    words: the elements 2q, 2q + 1, 2q + 8, 2q + 9 of 16, q being the number; lane: in the warp,
    int32.

    Lane q takes the low halves (q < 2) or the high ones of lanes 2q % 4 and 2q % 4 + 1. Of two
    words at once a lane sends the low halves together and the high ones together, even and odd
    lanes in turn, so that every shuffle brings every lane a word.
    """

    def number(op: str, a: Value, constant: int) -> Value:
        return m.binary(op, a, m.const(constant, int32), int32)

    def chosen(is_first: Value, first: int, second: int) -> Value:
        return m.select(is_first, m.const(first, uint32), m.const(second, uint32))

    is_even = m.binary("eq", number("and", lane, 1), m.const(0, int32), int32)
    is_low = m.binary("eq", number("and", lane, 2), m.const(0, int32), int32)
    quad, second = number("and", lane, -LANES), number("shl", number("and", lane, 1), 1)
    even = m.binary("or", quad, second, int32)
    odd = number("or", even, 1)
    sources = [
        m.bitcast(m.select(is_low, a, b), int32, uint32) for a, b in ((even, odd), (odd, even))
    ]
    sent = [chosen(is_even, LOW, HIGH), chosen(is_even, HIGH, LOW)]
    taken = [chosen(is_low, LOW, LOW_TURNED), chosen(is_low, HIGH, HIGH_TURNED)]
    result: list[Value] = []
    for first in range(0, len(words), 2):
        two = [words[first], words[min(first + 1, len(words) - 1)]]
        halves = [m.issue(PERMUTE, [*two, by])[0] for by in sent]
        came = [
            m.issue(shuffle("idx"), [half, source])[0]
            for half, source in zip(halves, sources, strict=True)
        ]
        result += [m.issue(PERMUTE, [*came, by])[0] for by in taken]
    return result[: len(words)]
