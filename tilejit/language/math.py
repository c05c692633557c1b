"""Elementwise functions: selection, casts, constants and the math library.

Every function takes Python and NumPy numbers as well as traced values: of numbers alone it computes
a number. Knows which dtypes each takes and gives. Does not know how the device computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tilejit import dtypes
from tilejit.dtypes import DType, as_dtype, bool_, float32, promote
from tilejit.errors import DTypeError
from tilejit.ir.expr import Const, Expr, binary, bitcast, const, unary
from tilejit.ir.expr import cast as cast_expr
from tilejit.language.extents import as_element_type
from tilejit.language.integers import check_numbers, has_traced
from tilejit.language.value import (
    Scalar,
    Value,
    as_condition,
    as_expr,
    operands,
    power,
    select,
)

# -- smallest, largest, selection


def min(a: Any, b: Any) -> Any:  # TileLang's name
    """The smaller of two values; the other one where one is NaN."""
    return _extreme("min", a, b)


def max(a: Any, b: Any) -> Any:  # TileLang's name
    """The larger of two values; the other one where one is NaN."""
    return _extreme("max", a, b)


def _extreme(op: str, a: Any, b: Any) -> Any:
    check_numbers(f"T.{op}", a, b)
    if has_traced(a, b):
        x, y = operands(a, b)
        return Value(binary(op, x, y))
    if a != a:
        return b
    if b != b:
        return a
    return (a if a <= b else b) if op == "min" else (a if a >= b else b)


def clamp(x: Any, min_val: Any, max_val: Any) -> Any:
    """`x`, but at least `min_val` and at most `max_val`."""
    return min(max(x, min_val), max_val)


def if_then_else(cond: Any, true_value: Any, false_value: Any) -> Any:
    """`true_value` where `cond` holds, else `false_value`, in their common dtype.

    Elements that only one arm reads are read only where that arm is taken. A condition known while
    tracing picks its arm at once.
    """
    what = "T.if_then_else"
    check_numbers(what, cond, true_value, false_value)
    test = as_condition(cond, f"condition of {what}")
    if isinstance(test, Const) and not has_traced(true_value, false_value):
        return true_value if test.value else false_value
    return select(Value(test), true_value, false_value)


def Select(condition: Any, true_value: Any, false_value: Any) -> Any:
    """The same as `if_then_else`."""
    return if_then_else(condition, true_value, false_value)


# -- casts and constants


def cast(x: Any, dtype: Any) -> Value:
    """`x` converted: floats to integers truncate, integers wrap, float to fp8 saturates."""
    check_numbers("T.cast", x)
    return Value(cast_expr(as_expr(x), as_element_type(dtype, "T.cast")))


def Cast(dtype: Any, x: Any) -> Value:
    """`cast` with the dtype first."""
    return cast(x, dtype)


def reinterpret(x: Any, dtype: Any) -> Value:
    """The bits of `x` as another dtype of the same width; the arguments may be swapped.

    Raises:
        DTypeError: the widths differ.
    """
    if not isinstance(x, Scalar | np.generic) and isinstance(dtype, Scalar | np.generic):
        x, dtype = dtype, x
    check_numbers("T.reinterpret", x)
    expr, target = as_expr(x), as_element_type(dtype, "T.reinterpret")
    if expr.dtype.bits != target.bits:
        raise DTypeError(
            f"T.reinterpret: {expr.dtype} has {expr.dtype.bits} bits, "
            f"but {target} has {target.bits}.",
            hint="T.cast converts values between dtypes of any width.",
        )
    return Value(bitcast(expr, target))


def infinity(dtype: Any) -> Any:
    """Positive infinity of a float dtype, as a NumPy scalar.

    Raises:
        DTypeError: the dtype has no infinity.
    """
    element = as_element_type(dtype, "T.infinity")
    value = element.numpy.type(math.inf) if element.is_float else None
    if value is None or not math.isinf(float(value)):
        raise DTypeError(
            f"{element} has no infinity.", hint=f"Its largest value is {element.max!r}."
        )
    return value


def min_value(dtype: Any) -> Any:
    """The smallest finite value of a dtype, as a NumPy scalar."""
    element = as_element_type(dtype, "T.min_value")
    return element.constant(element.min)


def max_value(dtype: Any) -> Any:
    """The largest finite value of a dtype, as a NumPy scalar."""
    element = as_element_type(dtype, "T.max_value")
    return element.constant(element.max)


# -- math


def _float_operand(what: str, x: Any) -> Expr:
    """The operand as a float: integers and bools become float32."""
    check_numbers(what, x)
    expr = as_expr(x)
    return expr if expr.dtype.is_float else cast_expr(expr, float32)


def _on_numbers(function: Callable[..., Any], *xs: Any) -> Any:
    """A NumPy function of numbers: a float, or the NumPy scalar type that was given."""
    with np.errstate(all="ignore"):
        result = function(*(np.float64(x) for x in xs))
    kinds = [dtypes.lookup(x.dtype) for x in xs if isinstance(x, np.generic)]
    known = [k if k.is_float else float32 for k in kinds if k is not None]
    if not known:
        return float(result)
    common = known[0]
    for other in known[1:]:
        common = promote(common, other)
    return common.numpy.type(result)


def _math(op: str, x: Any, function: Callable[[Any], Any], name: str = "") -> Any:
    what = f"T.{name or op}"
    if has_traced(x):
        return Value(unary(op, _float_operand(what, x)))
    check_numbers(what, x)
    return _on_numbers(function, x)


def abs(x: Any) -> Any:  # TileLang's name
    """The magnitude, in the value's own dtype."""
    check_numbers("T.abs", x)
    return x.__abs__()


def exp(x: Any) -> Any:
    """e to the power `x`."""
    return _math("exp", x, np.exp)


def exp2(x: Any) -> Any:
    """2 to the power `x`."""
    return _math("exp2", x, np.exp2)


def exp10(x: Any) -> Any:
    """10 to the power `x`."""
    return _math("exp10", x, lambda v: np.power(10.0, v))


def expm1(x: Any) -> Any:
    """`exp(x) - 1`, exact near 0."""
    return _math("expm1", x, np.expm1)


def log(x: Any) -> Any:
    """Natural logarithm."""
    return _math("log", x, np.log)


def log2(x: Any) -> Any:
    """Logarithm to base 2."""
    return _math("log2", x, np.log2)


def log10(x: Any) -> Any:
    """Logarithm to base 10."""
    return _math("log10", x, np.log10)


def log1p(x: Any) -> Any:
    """`log(1 + x)`, exact near 0."""
    return _math("log1p", x, np.log1p)


def sqrt(x: Any) -> Any:
    """Square root."""
    return _math("sqrt", x, np.sqrt)


def rsqrt(x: Any) -> Any:
    """`1 / sqrt(x)`."""
    return _math("rsqrt", x, lambda v: 1.0 / np.sqrt(v))


def sin(x: Any) -> Any:
    """Sine, of radians."""
    return _math("sin", x, np.sin)


def cos(x: Any) -> Any:
    """Cosine, of radians."""
    return _math("cos", x, np.cos)


def tan(x: Any) -> Any:
    """Tangent, of radians."""
    return _math("tan", x, np.tan)


def sinh(x: Any) -> Any:
    """Hyperbolic sine."""
    return _math("sinh", x, np.sinh)


def cosh(x: Any) -> Any:
    """Hyperbolic cosine."""
    return _math("cosh", x, np.cosh)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return _math("tanh", x, np.tanh)


def asin(x: Any) -> Any:
    """Arc sine, in radians."""
    return _math("asin", x, np.arcsin)


def acos(x: Any) -> Any:
    """Arc cosine, in radians."""
    return _math("acos", x, np.arccos)


def atan(x: Any) -> Any:
    """Arc tangent, in radians."""
    return _math("atan", x, np.arctan)


def erf(x: Any) -> Any:
    """The error function."""
    return _math("erf", x, lambda v: np.float64(math.erf(v)))


def floor(x: Any) -> Any:
    """The largest whole number that is not above `x`, as a float."""
    return _math("floor", x, np.floor)


def ceil(x: Any) -> Any:
    """The smallest whole number that is not below `x`, as a float."""
    return _math("ceil", x, np.ceil)


def trunc(x: Any) -> Any:
    """`x` without its fraction, as a float."""
    return _math("trunc", x, np.trunc)


def round(x: Any) -> Any:  # TileLang's name
    """The nearest whole number, as a float; halves to the even one, as NumPy does."""
    return _math("round", x, np.rint)


def nearbyint(x: Any) -> Any:
    """The same as `round`."""
    return _math("round", x, np.rint, "nearbyint")


def sigmoid(x: Any) -> Any:
    """`1 / (1 + exp(-x))`."""
    if not has_traced(x):
        check_numbers("T.sigmoid", x)
        return _on_numbers(lambda v: 1.0 / (1.0 + np.exp(-v)), x)
    operand = _float_operand("T.sigmoid", x)
    wide = Value(cast_expr(operand, float32) if operand.dtype.bits < 32 else operand)
    result = 1.0 / (1.0 + exp(-wide))
    return Value(cast_expr(result.expr, operand.dtype))


def pow(x: Any, y: Any) -> Any:  # TileLang's name
    """`x` to the power `y`; integers stay integers."""
    check_numbers("T.pow", x, y)
    return power(x, y) if has_traced(x, y) else x**y


def atan2(y: Any, x: Any) -> Any:
    """The angle of the point (x, y), in radians."""
    return _math2("atan2", y, x, np.arctan2)


def fmod(x: Any, y: Any) -> Any:
    """The remainder of `x / y` with the sign of `x`, as C's `fmod`; integers become float32."""
    return _math2("fmod", x, y, np.fmod)


def _math2(op: str, a: Any, b: Any, function: Callable[[Any, Any], Any]) -> Any:
    what = f"T.{op}"
    check_numbers(what, a, b)
    if not has_traced(a, b):
        return _on_numbers(function, a, b)
    x, y = operands(a, b)
    if not x.dtype.is_float:
        x, y = cast_expr(x, float32), cast_expr(y, float32)
    return Value(binary(op, x, y))


def _predicate(op: str, x: Any, function: Callable[[Any], Any], of_integers: bool) -> Any:
    check_numbers(f"T.{op}", x)
    if not has_traced(x):
        return bool(function(float(x)))
    expr = as_expr(x)
    return Value(unary(op, expr) if expr.dtype.is_float else const(of_integers, bool_))


def isnan(x: Any) -> Any:
    """Whether `x` is not a number."""
    return _predicate("isnan", x, math.isnan, False)


def isinf(x: Any) -> Any:
    """Whether `x` is infinite."""
    return _predicate("isinf", x, math.isinf, False)


def isfinite(x: Any) -> Any:
    """Whether `x` is neither infinite nor NaN."""
    return _predicate("isfinite", x, math.isfinite, True)


def dtype(spelling: Any) -> DType:
    """The dtype that a name, or a NumPy, ml_dtypes or torch dtype, means.

    Raises:
        DTypeError: unknown.
    """
    return as_dtype(spelling)
