"""`T.use_swizzle`: in which order the blocks compute their tiles.

Knows the arguments. Does not know how a block finds its tile.
"""

from __future__ import annotations

import dataclasses

from tilejit.errors import ArgumentError, ArgumentTypeError
from tilejit.language.extents import is_integer
from tilejit.language.trace import current_kernel

_ORDERS = ("row", "column")


def use_swizzle(panel_size: int, order: str = "row", enable: bool = True) -> None:
    """Blocks that run at once compute tiles near each other, which share what the L2 cache holds.

    The tiles are taken in panels of `panel_size` rows of tiles (blocks along y), in a panel
    column after column; with "column" in panels of columns, row after row. Which tile a block
    computes changes for the whole kernel, wherever the call stands: the block indexes that
    `T.Kernel` gives name the tile. Where passes let a block compute several tiles it is their
    order, instead of the one they would choose.

    Args:
        panel_size: 1 or more.
        order: "row" or "column".
        enable: False does nothing.

    Raises:
        ArgumentError, ArgumentTypeError: another order or size; the second call; a grid of one
            dimension.
        TraceError: outside a kernel.
    """
    what = "T.use_swizzle"
    trace = current_kernel(what)
    if order not in _ORDERS:
        raise ArgumentError(f"{what}: order is {order!r}.", hint='It is "row" or "column".')
    if not is_integer(panel_size):
        raise ArgumentTypeError(f"{what}: panel_size is {panel_size!r}, not an integer.")
    if panel_size < 1:
        raise ArgumentError(f"{what}: panel_size must be positive, got {panel_size}.")
    if not enable:
        return
    if len(trace.grid) < 2:
        raise ArgumentError(
            f"{what}: the grid has one dimension, so tiles have one order.",
            related=[(trace.span, "the kernel")],
            hint="Give T.Kernel the tiles along x and y.",
        )
    if trace.given.panel:
        raise ArgumentError(f"{what} is called twice in a kernel.")
    trace.given = dataclasses.replace(trace.given, panel=int(panel_size), order=order)
