"""Boxes that end where the tensor does, of tiles that are longer than all of it: 16 rows that a
multiply takes 64 at a time. The accelerator takes longer over a row that is absent than over one
that it brings.

Knows regions and slots. Does not know why a tile is as long as it is.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.ir.analysis import interval
from tilejit.ir.buffer import Buffer, Region
from tilejit.ir.expr import const, index, int_value
from tilejit.ir.node import Node
from tilejit.ir.sync import Control, ControlOp, SyncThreads
from tilejit.ops.copy import Copy, Fill


def rows_there(copy: Copy) -> int | None:
    """How many of a tile's rows there are, the same ones wherever a block copies from; None where
    all are, or that differs."""
    source = copy.src
    if len(source.kept) < 2 or source.buffer.section is not None:
        return None
    d = source.kept[-2]
    whole, start = int_value(source.buffer.shape[d]), interval(source.starts[d])
    if whole is None or start.low is None or start.low != start.high:
        return None
    rows = whole - start.low
    return rows if start.low >= 0 and 0 < rows < source.extents[d] else None


def trimmed(copy: Copy, rows: int) -> Copy:
    """The copy of the rows that there are."""
    return replace(copy, src=_shortened(copy.src, rows), dst=_shortened(copy.dst, rows))


def _shortened(region: Region, rows: int) -> Region:
    d = region.kept[-2]
    extents = (*region.extents[:d], rows, *region.extents[d + 1 :])
    return replace(region, extents=extents)


def emptied(slots: Buffer, rows: int) -> list[Node]:
    """Zeros for the other rows of all slots, before threads or multiplies read them."""
    *lead, tile_rows, columns = slots.extents
    starts = (*(index(0) for _ in lead), index(rows), index(0))
    rest = Region(slots, starts, (*lead, tile_rows - rows, columns), frozenset())
    fill = Fill(dst=rest, value=const(0, slots.dtype), span=slots.span)
    return [fill, Control(op=ControlOp.FENCE_ASYNC), SyncThreads(inserted=True)]
