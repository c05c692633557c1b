"""Typical values of what only a call or a block knows: what choices between schedules rest on.

Knows ranges of variables. Does not know what is chosen.
"""

from __future__ import annotations

import math

from tilejit.ir.analysis import interval
from tilejit.ir.buffer import Region
from tilejit.ir.expr import Expr, VarKind, const, int_value, substitute, variables

NOMINAL = 4096  # taken for an extent that only the call knows


def existing(region: Region) -> float:
    """The share of a region's elements that lies inside the tensor, over all its places."""
    share = 1.0
    for d in region.kept:
        whole, tile = nominal(region.buffer.shape[d]), region.extents[d]
        if whole > 0:
            share *= whole / (math.ceil(whole / tile) * tile)
    return share


def nominal(e: Expr) -> int:
    """The value of an expression, for typical values of what only the call or the block knows."""
    known = int_value(e)
    if known is not None:
        return known
    values = {}
    for var in variables(e):
        bounds = interval(var)
        if var.kind in (VarKind.SYMBOL, VarKind.SCALAR) or None in (bounds.low, bounds.high):
            values[var] = const(NOMINAL, var.dtype)
        else:
            middle = ((bounds.low or 0) + (bounds.high or 0)) // 2
            values[var] = const(middle, var.dtype)
    found = int_value(substitute(e, values))  # type: ignore[arg-type]
    return NOMINAL if found is None else found
