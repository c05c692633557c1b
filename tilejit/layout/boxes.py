"""How a shared tile is cut into the boxes that one bulk copy moves.

Pure index maths of panels, rows and swizzles. Does not know tensors or instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilejit.layout.shared import SharedLayout

MAX_EXTENT = 256  # elements of a box along a dimension (CUDA Driver API, cuTensorMapEncodeTiled)
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


def boxes_of(layout: SharedLayout, extents: tuple[int, ...], blocks: int = 1) -> Boxes | None:
    """The boxes for a region of a tile laid out so, by each of `blocks` blocks of a cluster; None
    when the tile cannot be divided among them."""
    rows = extents[-2] if len(extents) > 1 else 1
    panels = layout.columns // layout.panel
    box_columns = _divisor_up_to(layout.panel, MAX_EXTENT)
    if blocks == 1:
        return Boxes(rows, layout.columns, _divisor_up_to(rows, MAX_EXTENT), box_columns)
    if panels % blocks == 0:
        box_rows = _divisor_up_to(rows, MAX_EXTENT)
        return Boxes(rows, layout.columns, box_rows, box_columns, "columns", blocks)
    if rows % (blocks * SWIZZLE_ROWS) == 0:
        box_rows = _divisor_up_to(rows // blocks, MAX_EXTENT, SWIZZLE_ROWS)
        return Boxes(rows, layout.columns, box_rows, box_columns, "rows", blocks)
    return None


def _divisor_up_to(number: int, most: int, step: int = 1) -> int:
    """The largest divisor of `number` that is at most `most`, a multiple of `step`."""
    return max(n for n in range(step, min(number, most) + 1, step) if number % n == 0)


def swizzle_of(layout: SharedLayout) -> int:
    """Bytes over which the layout permutes 16-byte chunks, as a tensor map says it."""
    return 16 * layout.swizzle if layout.swizzle > 1 else 0
