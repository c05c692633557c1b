"""Reductions of the reference executor.

Knows in which dtype elements are combined and how NaNs count. Does not know threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tilejit.ops.cluster import ClusterReduce
from tilejit.ops.reduce import Reduce
from tilejit.ops.scalar import Array, cast_array, evaluate_op


def reduced(node: Reduce, values: Array, old: Array | None) -> Array:
    """The elements of `values` along the axis, combined, and with `old` if given: in the dtype of
    the accumulator, converted to the result's at the end."""
    source, dtype, target = node.src.buffer.dtype, node.accumulator, node.dst.buffer.dtype
    values = np.moveaxis(cast_array(values, source, dtype), node.axis, 0)
    result = _all(node, values).reshape(node.dst.shape)
    if old is not None:
        result = _combined(node, cast_array(old, target, dtype), result)
    return cast_array(result, dtype, target)


def cluster_reduced(node: ClusterReduce, parts: Sequence[Array]) -> Array:
    """The tiles of all blocks, combined in the order of the blocks."""
    source, dtype = node.tile.buffer.dtype, node.accumulator
    values = cast_array(np.stack(parts), source, dtype)
    return cast_array(_all(node, values), dtype, source)


def _all(node: Reduce | ClusterReduce, values: Array) -> Array:
    """All elements along the first axis as one."""
    if node.kind.is_absolute:
        values = evaluate_op("abs", (values,), node.accumulator)
    while len(values) > 1:  # halves, so that errors of sums grow with the logarithm
        half = len(values) // 2
        pairs = _combined(node, values[:half], values[half : 2 * half])
        values = np.concatenate([pairs, values[2 * half :]])
    first: Array = values[0]
    return first


def _combined(node: Reduce | ClusterReduce, a: Array, b: Array) -> Array:
    result = evaluate_op(node.kind.combine, (a, b), node.accumulator)
    if node.keeps_nan and node.kind.is_extreme and node.accumulator.is_float:
        result = np.where(np.isnan(a), a, np.where(np.isnan(b), b, result))
    return result
