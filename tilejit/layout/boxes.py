"""How a shared tile is cut into the boxes that one bulk copy moves.

Pure index maths of panels, rows and swizzles. Does not know tensors or instructions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tilejit.layout.shared import SharedLayout

MAX_EXTENT = 256  # elements of a box along a dimension (CUDA Driver API, cuTensorMapEncodeTiled)
BOX_ALIGN = 128  # bytes, of a box's place in shared memory
CHUNK = 16  # bytes that every swizzle keeps together
SWIZZLES = (8, 4, 2)  # chunks that one permutes: over 128, 64 or 32 bytes, the widest first
SWIZZLE_ROWS = 8  # after as many rows every swizzle begins anew


@dataclass(frozen=True)
class Boxes:
    """How a tile of `rows` x `columns` elements is cut into boxes, each moved at once.

    shared_axis: what is divided among the `blocks` of a cluster, each moving its part: "rows",
        "columns", or "" where each moves all.
    """

    rows: int
    columns: int
    box_rows: int
    box_columns: int
    shared_axis: str = ""
    blocks: int = 1


def boxed_layout(shape: tuple[int, ...], itemsize: int) -> SharedLayout:
    """How a tile lies that bulk copies fill: swizzled where the pattern begins anew with every
    tile, in plain rows elsewhere."""
    if len(shape) < 2 or shape[-2] % SWIZZLE_ROWS:
        return SharedLayout(shape, itemsize, tile_align=BOX_ALIGN)
    layout = operand_layout(shape, itemsize)
    if layout.panel > MAX_EXTENT:
        layout = chunked_layout(shape, itemsize)
    return replace(layout, tile_align=BOX_ALIGN)


def operand_layout(shape: tuple[int, ...], itemsize: int) -> SharedLayout:
    """The widest swizzle whose panels divide a row. Rows that none divides are an odd number of
    16-byte chunks: 8 of them below each other already lie in different banks."""
    for chunks in SWIZZLES:
        if shape[-1] * itemsize % (CHUNK * chunks) == 0:
            return swizzled_layout(shape, itemsize, chunks)
    return SharedLayout(shape, itemsize)


def swizzled_layout(shape: tuple[int, ...], itemsize: int, chunks: int) -> SharedLayout:
    """Panels of so many 16-byte chunks, swizzled over their width."""
    return SharedLayout(shape, itemsize, panel=CHUNK * chunks // itemsize, swizzle=chunks)


def chunked_layout(shape: tuple[int, ...], itemsize: int) -> SharedLayout:
    """Panels of one 16-byte chunk: rows of it follow each other without a gap."""
    return SharedLayout(shape, itemsize, panel=CHUNK // itemsize)


def boxes_of(layout: SharedLayout, extents: tuple[int, ...], blocks: int = 1) -> Boxes | None:
    """The boxes for a region of a tile laid out so, by each of `blocks` blocks of a cluster; None
    when it cannot be cut into boxes, or not among them."""
    rows = extents[-2] if len(extents) > 1 else 1
    if layout.halved and rows != layout.rows:
        return None
    longest = rows // 2 if layout.halved else rows  # what a box must divide
    panels = layout.columns // layout.panel
    box_rows: int | None
    box_columns: int | None = layout.panel
    if layout.panel > MAX_EXTENT:  # one row; in others a box would leave no gap to the next
        wide = _divisor(layout.panel, BOX_ALIGN // layout.itemsize)
        box_columns = wide if rows == 1 else None
    share = ""
    if blocks == 1 or panels % blocks == 0:
        share = "columns" if blocks > 1 else ""
        box_rows = longest if longest <= MAX_EXTENT else _divisor(longest, SWIZZLE_ROWS)
    else:
        share = "rows"
        whole = rows % (blocks * SWIZZLE_ROWS) == 0
        part = math.gcd(rows // blocks, longest)
        box_rows = _divisor(part, SWIZZLE_ROWS) if whole else None
    if box_rows is None or box_columns is None:
        return None
    return Boxes(rows, layout.columns, box_rows, box_columns, share, blocks)


def _divisor(number: int, step: int) -> int | None:
    """The largest divisor of `number` that a box may have and that is a multiple of `step`."""
    fits = [n for n in range(step, min(number, MAX_EXTENT) + 1, step) if number % n == 0]
    return max(fits, default=None)


def swizzle_of(layout: SharedLayout) -> int:
    """Bytes over which the layout permutes 16-byte chunks, as a tensor map says it."""
    return 16 * layout.swizzle if layout.swizzle > 1 else 0
