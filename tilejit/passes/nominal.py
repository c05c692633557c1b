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
        low, high = bounds.low, bounds.high
        if var.kind in (VarKind.SYMBOL, VarKind.SCALAR) or low is None or high is None:
            values[var] = const(NOMINAL, var.dtype)
        elif var.kind is VarKind.VALUE and high - low > 2 * NOMINAL:  # it says next to nothing
            values[var] = const(min(max(low, NOMINAL), high), var.dtype)
        else:
            values[var] = const((low + high) // 2, var.dtype)
    found = int_value(substitute(e, values))  # type: ignore[arg-type]
    return NOMINAL if found is None else found
