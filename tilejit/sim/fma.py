"""Fused multiply-add in NumPy: a * b + c rounded once.

Knows floating point. Does not know lanes.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_LOW_BITS = np.int64((1 << 29) - 1)  # of a float64, those that a float32 drops
_HALF = np.int64(1 << 28)
_SMALLEST_NORMAL = np.float64(2.0**-125)
_SPLIT = np.float64(2**27 + 1)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Of float32 or float64 arrays; integers wrap."""
    if a.dtype == np.float32:
        return _fma32(a, b, c)
    if a.dtype == np.float64:
        return _fma64(a, b, c)
    return np.asarray(a * b + c)


def _fma32(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in float64; only a sum that float64 rounds to the middle between two
    float32 values, or near the subnormals, can round twice."""
    addend = c.astype(np.float64)
    product = a.astype(np.float64) * b
    total = product + addend
    tie = (total.view(np.int64) & _LOW_BITS) == _HALF
    if tie.any() or (np.abs(total) < _SMALLEST_NORMAL).any():
        total = _to_odd(total, _sum_error(product, addend, total))
    return total.astype(np.float32)


def _sum_error(a: Array, b: Array, total: Array) -> Array:
    """What a + b lost when it was rounded to `total` (Knuth's two-sum)."""
    shadow = total - a
    return np.asarray((a - (total - shadow)) + (b - shadow))


def _to_odd(total: Array, error: Array) -> Array:
    """`total`, if inexact, moved to the neighbour towards the exact value whose last bit is 1, so
    that rounding once more rounds as from the exact value."""
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + towards, bits).view(np.float64)


def _fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond, "Emulation of FMA and correctly rounded sums" (2008)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high = a * b
    low = _product_error(a, b, high)
    upper = c + low
    upper_error = _sum_error(c, low, upper)
    total = high + upper
    total_error = _sum_error(high, upper, total)
    rest = upper_error + total_error
    rest = _to_odd(rest, _sum_error(upper_error, total_error, rest))
    result = np.asarray(total + rest)
    sizes = np.abs(np.stack([a, b, high, c]))
    # Outside this range the splitting overflows or the error terms are subnormal.
    risky = ((sizes > 2.0**900) | ((sizes < 2.0**-900) & (sizes != 0))).any(axis=0)
    risky |= (high == 0) | ~np.isfinite(result)
    for lane in np.flatnonzero(risky):
        result[lane] = _exact(float(a[lane]), float(b[lane]), float(c[lane]))
    return result


def _product_error(a: Array, b: Array, product: Array) -> Array:
    """What a * b lost when it was rounded to `product` (Dekker)."""
    a_high = _SPLIT * a - (_SPLIT * a - a)
    b_high = _SPLIT * b - (_SPLIT * b - b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return np.asarray(error)


def _exact(a: float, b: float, c: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c  # the sign of zero; a * b may only underflow where c is not 0
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf
