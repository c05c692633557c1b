"""Reductions and exchanges of the reference executor.

Knows in which dtype elements are combined and how NaNs count. Does not know threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tilejit.ops.cluster import ClusterExchange, ClusterReduce, ClusterScatter
from tilejit.ops.reduce import Reduce, identity
from tilejit.ops.scalar import Array, cast_array, evaluate_op
from tilejit.ops.scan import Scan

_Combining = Reduce | ClusterReduce | ClusterScatter


def reduced(node: Reduce, values: Array, old: Array | None) -> Array:
    """The elements of `values` along the axis, combined, and with `old` if given: in the dtype of
    the accumulator, converted to the result's at the end."""
    return _finished(node, _along_axis(node, values), old)


def parts_of(node: Reduce, values: Array) -> Array:
    """What a reduction leaves in its scratch: all in the first part of each result, and in the
    others what changes nothing."""
    nothing = identity(node.kind, node.accumulator, keeps_nan=node.keeps_nan)
    parts = np.full(node.parts.shape, nothing, node.accumulator.numpy)
    parts[..., 0] = _along_axis(node, values).reshape(parts.shape[:-1])
    return parts


def taken(node: Reduce, parts: Array, old: Array | None) -> Array:
    """The result of what was left in the scratch."""
    return _finished(node, _all(node, np.moveaxis(parts, -1, 0)), old)


def _along_axis(node: Reduce, values: Array) -> Array:
    values = cast_array(values, node.src.buffer.dtype, node.accumulator)
    return _all(node, np.moveaxis(_counting(node, values), node.axis, 0))


def _counting(node: _Combining, values: Array) -> Array:
    """What counts of elements."""
    is_absolute = node.kind.is_absolute
    return evaluate_op("abs", (values,), node.accumulator) if is_absolute else values


def _finished(node: Reduce, result: Array, old: Array | None) -> Array:
    dtype, target = node.accumulator, node.dst.buffer.dtype
    result = result.reshape(node.dst.shape)
    if old is not None:
        result = _combined(node, cast_array(old, target, dtype), result)
    return cast_array(result, dtype, target)


def exchanged(node: ClusterExchange, parts: Sequence[Array], rank: int) -> Array:
    """The tiles of all blocks, combined in the order of the blocks or side by side; rank: of the
    block that has the result."""
    if not isinstance(node, ClusterReduce | ClusterScatter):
        return np.stack(parts, axis=-1)
    source, target = node.given.buffer.dtype, node.result.buffer.dtype
    if isinstance(node, ClusterScatter):
        columns = node.dst.shape[-1]
        parts = [p[..., rank * columns : (rank + 1) * columns] for p in parts]
    values = cast_array(np.stack(parts), source, node.accumulator)
    return cast_array(_all(node, _counting(node, values)), node.accumulator, target)


def running(node: Scan, values: Array) -> Array:
    """Each element with all before it along the axis, or after it, in the accumulator's dtype."""
    values = cast_array(values, node.src.buffer.dtype, node.accumulator)
    return np.moveaxis(_running(node, np.moveaxis(values, node.axis, 0)), 0, node.axis)


def running_in_parts(node: Scan, values: Array) -> tuple[Array, Array]:
    """The same of each part for itself, and what each adds up to, the parts last."""
    lines = np.moveaxis(values, node.axis, 0)
    parts = [_running(node, part) for part in _parts(node, lines) if len(part)]
    totals = [part[0 if node.reverse else -1] for part in parts]
    assert node.spread is not None, "select did not run"
    absent = np.full_like(totals[0], node.nothing)
    totals += [absent] * (node.spread.parts - len(parts))
    return np.moveaxis(np.concatenate(parts), 0, node.axis), np.stack(totals, axis=-1)


def with_before(node: Scan, values: Array, totals: Array) -> Array:
    """What was scanned in parts, with what the parts before each add up to."""
    lines = np.moveaxis(values, node.axis, 0)
    parts = _parts(node, lines)
    order = list(enumerate(parts))[:: -1 if node.reverse else 1]
    before: Array | None = None
    results = list(parts)
    for k, part in order:
        total = totals[..., k]
        if before is not None:
            results[k] = _combined(node, before, part)
            total = _combined(node, before, total)
        before = total
    return np.moveaxis(np.concatenate(results), 0, node.axis)


def _parts(node: Scan, lines: Array) -> list[Array]:
    assert node.spread is not None, "select did not run"
    length = node.spread.length
    return [lines[k * length : (k + 1) * length] for k in range(node.spread.parts)]


def _running(node: Scan, lines: Array) -> Array:
    """Each line with all before it, or after it."""
    results = list(lines[::-1] if node.reverse else lines)
    for k in range(1, len(results)):
        results[k] = _combined(node, results[k - 1], results[k])
    return np.stack(results[::-1] if node.reverse else results)


def _all(node: _Combining, values: Array) -> Array:
    """All elements along the first axis as one."""
    while len(values) > 1:  # halves, so that errors of sums grow with the logarithm
        half = len(values) // 2
        pairs = _combined(node, values[:half], values[half : 2 * half])
        values = np.concatenate([pairs, values[2 * half :]])
    first: Array = values[0]
    return first


def _combined(node: _Combining | Scan, a: Array, b: Array) -> Array:
    result = evaluate_op(node.kind.combine, (a, b), node.accumulator)
    if node.keeps_nan and node.kind.is_extreme and node.accumulator.is_float:
        result = np.where(np.isnan(a), a, np.where(np.isnan(b), b, result))
    return result
