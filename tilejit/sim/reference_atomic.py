"""Atomic updates of the reference executor: in the order of the lanes.

Knows duplicates of a place. Does not know buffers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilejit.dtypes import DType
from tilejit.ops.scalar import Array, evaluate_op, is_narrow_float

_UFUNCS: dict[str, Any] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_FEW = 8  # duplicates of a place that are cheaper one round each than `ufunc.at`


def combine_at(
    array: Array,
    places: tuple[Array, ...],
    values: Array,
    combine: str,
    dtype: DType,
    want_old: bool,
) -> Array:
    """`array[places] = combine(array[places], values)`, one after the other.

    places, values: of one dimension. Returns the values found (zeros if not `want_old` and the
    duplicates of a place are many).
    """
    if not places:
        array, places = array[None], (np.zeros(values.shape, np.int64),)
    rounds = _occurrences(np.ravel_multi_index(places, array.shape))
    last = int(rounds.max(initial=0))
    ufunc = _UFUNCS.get(combine)
    if last > _FEW and not want_old and ufunc is not None and not is_narrow_float(dtype):
        ufunc.at(array, places, values)
        return np.zeros_like(values)
    old = np.zeros_like(values)
    for number in range(last + 1):
        now = rounds == number if last else slice(None)
        at = tuple(p[now] for p in places)
        old[now] = array[at]
        if combine == "exch":
            array[at] = values[now]
        else:
            array[at] = evaluate_op(combine, (old[now], values[now]), dtype)
    return old


def _occurrences(places: Array) -> Array:
    """How many earlier elements equal each element."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    first = np.ones(ordered.shape, np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    position = np.arange(ordered.size)
    result = np.empty(ordered.shape, np.int64)
    result[order] = position - np.maximum.accumulate(np.where(first, position, 0))
    return result
