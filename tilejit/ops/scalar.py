"""What every scalar operation means, element by element, in NumPy.

Knows `ir.expr`'s operation names and the arithmetic of each dtype. Does not know variables,
buffers or threads: the reference executor and the simulator's lanes bring those.

Rules beyond NumPy's own:

* Integers wrap. `floordiv` and `floormod` round down, `div` and `fmod` on integers towards zero;
  dividing by zero gives 0. A shift by the width or more (or by a negative count) leaves 0, or the
  sign for `shr` of a signed integer.
* float16, bfloat16 and float8 compute in float32 and round once per operation; tfloat32 is
  float32. `MATH` on float32 is evaluated in float64 and rounded once.
* `min` and `max` take the operand that is no NaN, and -0.0 is less than 0.0 (PTX ISA, min, max).
* `round` is to the nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilejit.dtypes import DType, bfloat16, float32, int32
from tilejit.ir.expr import BINARY, COMPARE, MATH, PREDICATES, UNARY

Array = np.ndarray[Any, Any]

_COMPARE: dict[str, Callable[..., Any]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def evaluate_op(op: str, args: Sequence[Any], dtype: DType) -> Array:
    """`op` on broadcastable arrays, all of `dtype` (for `select` the first is bool).

    Returns an array of `dtype`, or of bool for comparisons and predicates. Never warns.
    `cast` and `bitcast` change the dtype and are functions of their own: `cast_array`,
    `bitcast_array`.
    """
    with np.errstate(all="ignore"):
        return np.asarray(_evaluate(op, [np.asarray(a) for a in args], dtype))


def _evaluate(op: str, args: list[Array], dtype: DType) -> Array:
    if op == "select":
        return np.where(args[0], args[1], args[2])
    if op == "hidden":
        return args[0]
    if is_narrow_float(dtype):  # no arithmetic of its own
        wide = [cast_array(a, dtype, float32) for a in args]
        result = _evaluate(op, wide, float32)
        return result if result.dtype == np.bool_ else cast_array(result, float32, dtype)
    if op in COMPARE:
        return np.asarray(_COMPARE[op](args[0], args[1]))
    if op in PREDICATES:
        return _predicate(op, args[0], dtype)
    assert op in BINARY or op in UNARY or op in MATH, f"unknown operation {op}"
    if dtype.is_float:
        result = _FLOAT[op](*args) if op in _FLOAT else _in_float64(op, args)
    elif dtype.is_bool:
        result = _BOOL[op](*args)
    else:
        result = _INTEGER[op](*args)
    return np.asarray(result).astype(dtype.numpy, copy=False)


def is_narrow_float(dtype: DType) -> bool:
    """True for float16, bfloat16 and float8, which compute in float32."""
    return dtype.is_float and dtype.bits < 32


def _predicate(op: str, a: Array, dtype: DType) -> Array:
    if dtype.is_float:
        functions = {"isnan": np.isnan, "isinf": np.isinf, "isfinite": np.isfinite}
        return np.asarray(functions[op](a))
    return np.full(a.shape, op == "isfinite")


# --- integers and bool ---------------------------------------------------------------------------


def _floor_divide(a: Array, b: Array) -> Array:
    zero = b == 0
    return np.where(zero, 0, np.floor_divide(a, np.where(zero, 1, b).astype(b.dtype)))


def _floor_modulo(a: Array, b: Array) -> Array:
    zero = b == 0
    return np.where(zero, 0, np.remainder(a, np.where(zero, 1, b).astype(b.dtype)))


def _truncated_modulo(a: Array, b: Array) -> Array:
    zero = b == 0
    return np.where(zero, 0, np.fmod(a, np.where(zero, 1, b).astype(b.dtype)))


def _truncated_divide(a: Array, b: Array) -> Array:
    return _floor_divide(np.asarray(a - _truncated_modulo(a, b).astype(a.dtype)), b)


def _width(a: Array) -> int:
    return int(a.dtype.itemsize * 8)


def _shift_left(a: Array, count: Array) -> Array:
    inside = (count >= 0) & (count < _width(a))
    return np.where(inside, np.left_shift(a, np.where(inside, count, 0).astype(a.dtype)), 0)


def _shift_right(a: Array, count: Array) -> Array:
    inside = (count >= 0) & (count < _width(a))
    shifted = np.right_shift(a, np.where(inside, count, _width(a) - 1).astype(a.dtype))
    return np.where(inside | (a < 0), shifted, 0)


def _integer_power(a: Array, b: Array) -> Array:
    """Wraps; a negative exponent gives the truncated reciprocal, which is 0 except for 1, -1."""
    base, exponent = np.broadcast_arrays(a, b)
    result = np.power(base, np.where(exponent < 0, 0, exponent).astype(base.dtype))
    odd = (exponent & 1) == 1
    reciprocal = np.where(base == 1, 1, np.where(base == -1, np.where(odd, -1, 1), 0))
    return np.where(exponent < 0, reciprocal.astype(result.dtype), result)


def _leading_zeros(a: Array) -> Array:
    width = _width(a)
    rest = a.astype(np.uint64) & np.uint64((1 << width) - 1)
    length = np.zeros(a.shape, np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        high = (rest >> np.uint64(step)) != 0
        length = length + np.where(high, step, 0)
        rest = np.where(high, rest >> np.uint64(step), rest)
    return np.asarray(width - (length + (rest != 0)))


def _population(a: Array) -> Array:
    return np.asarray(np.bitwise_count(a.astype(np.uint64) & np.uint64((1 << _width(a)) - 1)))


_INTEGER: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _truncated_divide,
    "floordiv": _floor_divide,
    "floormod": _floor_modulo,
    "fmod": _truncated_modulo,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": _shift_left,
    "shr": _shift_right,
    "pow": _integer_power,
    "neg": np.negative,
    "not": np.invert,
    "abs": np.abs,
    "floor": np.positive,
    "ceil": np.positive,
    "round": np.positive,
    "trunc": np.positive,
    "popcount": _population,
    "clz": _leading_zeros,
}
_BOOL: dict[str, Callable[..., Any]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "min": np.logical_and,
    "max": np.logical_or,
    "add": np.logical_or,
    "mul": np.logical_and,
}

# --- floats --------------------------------------------------------------------------------------


def _minimum(a: Array, b: Array) -> Array:
    result = np.asarray(np.fmin(a, b))
    if not np.all(result):  # some are zero
        return np.where((a == 0) & (b == 0) & np.signbit(a), a, np.where(a == b, b, result))
    return result


def _maximum(a: Array, b: Array) -> Array:
    result = np.asarray(np.fmax(a, b))
    if not np.all(result):
        return np.where((a == 0) & (b == 0) & np.signbit(b), a, np.where(a == b, b, result))
    return result


def _erf(a: Array) -> Array:
    flat = np.fromiter(map(math.erf, a.ravel().tolist()), np.float64, a.size)
    return flat.reshape(a.shape)


_FLOAT: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "floordiv": np.floor_divide,
    "floormod": np.remainder,
    "fmod": np.fmod,
    "min": _minimum,
    "max": _maximum,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "trunc": np.trunc,
}
_FLOAT64: dict[str, Callable[..., Any]] = {
    "pow": np.power,
    "atan2": np.arctan2,
    "exp": np.exp,
    "exp2": np.exp2,
    "exp10": lambda a: np.power(10.0, a),
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "log1p": np.log1p,
    "rsqrt": lambda a: np.divide(1.0, np.sqrt(a)),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "erf": _erf,
}


def _in_float64(op: str, args: list[Array]) -> Array:
    return np.asarray(_FLOAT64[op](*(a.astype(np.float64, copy=False) for a in args)))


# --- conversions ---------------------------------------------------------------------------------


def cast_array(a: Any, source: DType, target: DType) -> Array:
    """`a`, of dtype `source`, converted to `target`; `a` itself where nothing changes.

    * to bool: `!= 0`;
    * integer to integer: wraps;
    * integer to float: rounds to nearest even, to bfloat16 and float8 by way of float32;
    * float to integer: towards zero, saturating, NaN gives 0 (PTX ISA, cvt.rzi of 32-bit floats);
      8 and 16 bits are the low bits of the conversion to int32;
    * float to float: rounds to nearest even, float64 to bfloat16 and float8 by way of float32;
    * to float8: saturates at the largest finite value, infinities too; NaN stays NaN
      (PTX ISA, cvt.satfinite).
    """
    array: Array = np.asarray(a)
    if source is target or source.numpy == target.numpy:
        return array
    with np.errstate(all="ignore"):
        if target.is_bool:
            return np.asarray((array.astype(np.float32) if _is_extended(source) else array) != 0)
        if source.is_float and target.is_integer:
            return _to_integer(array, target)
        if target.is_float and (_is_extended(source) or _is_extended(target)):
            array = array.astype(np.float32, copy=False)
            if target.bits == 8:
                array = np.clip(array, np.float32(target.min), np.float32(target.max))
        return np.asarray(array).astype(target.numpy, copy=False)


def _is_extended(dtype: DType) -> bool:
    """True for the floats that NumPy itself does not have."""
    return dtype.is_float and (dtype.bits == 8 or dtype is bfloat16)


def _to_integer(a: Array, target: DType) -> Array:
    whole = np.trunc(a.astype(np.float64))  # exact for every float
    wide = target if target.bits >= 32 else int32
    low, high = int(wide.min), int(wide.max)
    inside = (whole >= float(low)) & (whole < float(high + 1))
    result = np.where(inside, whole, 0.0).astype(wide.numpy)
    result = np.where(whole < float(low), wide.numpy.type(low), result)
    result = np.where(whole >= float(high + 1), wide.numpy.type(high), result)
    return np.asarray(result).astype(target.numpy, copy=False)


def bitcast_array(a: Any, source: DType, target: DType) -> Array:
    """The same bits as another dtype of the same width."""
    assert source.bits == target.bits, f"bitcast {source} to {target}"
    raw: Array = np.asarray(a, source.numpy).view(target.numpy)
    return raw
