"""How long TMA takes to bring tiles, by the rows of their boxes.

Knows how rows lie in memory and in a tile. Does not know who brings them or how they are used.
The figures are measured (`examples/matmul_notes.md`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from tilejit.layout.boxes import CHUNK, SWIZZLES
from tilejit.ops.copy import Copy
from tilejit.passes.nominal import existing, nominal

LINE_BYTES = 128  # of the L2 cache, and of a row of a box that is brought at once
ROW_CLOCKS = 1.35  # for a row of a whole line
SHORT_ROW_CLOCKS = 2.0  # for a shorter one
# for one that is in more lines than it has to: rows that begin at multiples of 64, 32 or 16 bytes
CROSSING_CLOCKS = {64: 2.7, 32: 3.4, 16: 4.9}
SHARED_CROSSING_CLOCKS = 3.8  # for one of them, where blocks share such tiles
ABSENT_CLOCKS = 3.7  # for one that lies outside of the tensor
CLUSTER_CLOCKS = 2000  # of a kernel whose blocks share tiles, until they have met and ended


def row_bytes(copy: Copy) -> int:
    """Bytes of a box's row: of the widest swizzle that divides the tile's."""
    row = copy.dst.extents[-1] * copy.dst.buffer.dtype.bytes
    return next((CHUNK * n for n in SWIZZLES if row % (CHUNK * n) == 0), CHUNK)


def box_rows(copy: Copy) -> float:
    """The rows that bring a tile, those outside of the tensor included."""
    return math.prod(copy.dst.extents) * copy.dst.buffer.dtype.bytes / row_bytes(copy)


def crosses_lines(copy: Copy) -> bool:
    """Whether rows lie in more lines of the L2 cache than they would have to."""
    return _aligned(copy) < row_bytes(copy)


def row_clocks(copy: Copy, is_shared: bool = False) -> float:
    """How long a row takes. is_shared: tiles of the kernel are brought by two blocks together."""
    if not crosses_lines(copy):
        return ROW_CLOCKS if row_bytes(copy) == LINE_BYTES else SHORT_ROW_CLOCKS
    return SHARED_CROSSING_CLOCKS if is_shared else CROSSING_CLOCKS[_aligned(copy)]


def bring_clocks(copies: Iterable[Copy], shared: Collection[Copy] = ()) -> float:
    """How long the tiles' rows take. shared: those of which a block brings half."""
    total = 0.0
    for copy in copies:
        rows = box_rows(copy) * existing(copy.src)
        total += rows * row_clocks(copy, bool(shared)) / (2 if copy in shared else 1)
    return total


def _aligned(copy: Copy) -> int:
    """At multiples of how many bytes rows begin, of a line's."""
    kept = copy.src.kept
    if len(kept) < 2:
        return LINE_BYTES
    stride = nominal(copy.src.buffer.element_strides[kept[-2]])
    return max(math.gcd(stride * copy.src.buffer.dtype.bytes, LINE_BYTES), CHUNK)
