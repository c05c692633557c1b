"""Integer helpers and bit functions: division in all its roundings, shifts, masks, counts.

Every function takes Python and NumPy numbers as well as traced values: of numbers alone it computes
a number. Knows which dtypes each takes and gives. Does not know how the device computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tilejit.dtypes import int32
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError
from tilejit.ir.analysis import interval
from tilejit.ir.expr import Const, Expr, binary, const, int_value, unary
from tilejit.language.value import Scalar, Value, arithmetic, as_expr, operands


def has_traced(*xs: object) -> bool:
    """True when a function of these gives a traced value."""
    return any(isinstance(x, Scalar | Expr) for x in xs)


def check_numbers(what: str, *xs: object) -> None:
    """Refuse what is neither a number nor a traced value."""
    for x in xs:
        if not isinstance(x, Scalar | Expr | bool | int | float | np.generic):
            raise ArgumentTypeError(
                f"{what}: {x!r} is not a number or a traced value.",
                hint="Tiles are computed element by element in T.Parallel.",
            )


def ceildiv(a: Any, b: Any) -> Any:
    """`a / b` rounded up, for integers."""
    _check_integers("T.ceildiv", a, b)
    return (a + b - 1) // b


def floordiv(a: Any, b: Any) -> Any:
    """`a // b`: rounded down."""
    check_numbers("T.floordiv", a, b)
    _check_divisor("T.floordiv", b)
    return a // b


def floormod(a: Any, b: Any) -> Any:
    """`a % b`: the remainder of `floordiv`, with the sign of `b`."""
    check_numbers("T.floormod", a, b)
    _check_divisor("T.floormod", b)
    return a % b


def truncdiv(a: Any, b: Any) -> Any:
    """`a / b` rounded towards 0, for integers, as in C."""
    _check_integers("T.truncdiv", a, b)
    if not has_traced(a, b):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    x, y = operands(a, b)
    return Value(binary("floordiv" if _is_natural(x, y) else "div", x, y))


def truncmod(a: Any, b: Any) -> Any:
    """The remainder of `truncdiv`, with the sign of `a`, as C's `%`."""
    _check_integers("T.truncmod", a, b)
    if not has_traced(a, b):
        return int(math.copysign(1, a)) * (abs(a) % abs(b))
    x, y = operands(a, b)
    return Value(binary("floormod" if _is_natural(x, y) else "fmod", x, y))


def _is_natural(*exprs: Expr) -> bool:
    """True when no value is negative: all roundings are one, and more is known of rounding down."""
    lows = [interval(e).low for e in exprs]
    return all(low is not None and low >= 0 for low in lows)


def _check_integers(what: str, *xs: Any) -> None:
    check_numbers(what, *xs)
    for x in xs:
        dtype = as_expr(x).dtype if not isinstance(x, int) else int32
        if not dtype.is_integer or isinstance(x, bool):
            shown = x if not isinstance(x, Scalar) else f"a {dtype} value"
            raise ArgumentTypeError(f"{what} takes integers, not {shown}.")
    _check_divisor(what, xs[-1])


def _check_divisor(what: str, x: Any) -> None:
    value = int_value(as_expr(x))
    if value == 0:
        raise ArgumentError(f"{what}: the divisor is 0.")


def shift_left(a: Any, b: Any) -> Any:
    """`a << b`."""
    return _bits("shl", "T.shift_left", a, b)


def shift_right(a: Any, b: Any) -> Any:
    """`a >> b`; keeps the sign of signed integers."""
    return _bits("shr", "T.shift_right", a, b)


def bitwise_and(a: Any, b: Any) -> Any:
    """`a & b`."""
    return _bits("and", "T.bitwise_and", a, b)


def bitwise_or(a: Any, b: Any) -> Any:
    """`a | b`."""
    return _bits("or", "T.bitwise_or", a, b)


def bitwise_xor(a: Any, b: Any) -> Any:
    """`a ^ b`."""
    return _bits("xor", "T.bitwise_xor", a, b)


def bitwise_not(a: Any) -> Any:
    """`~a`."""
    check_numbers("T.bitwise_not", a)
    if isinstance(a, bool):
        return not a
    return ~a


_PYTHON_BITS: dict[str, Callable[[Any, Any], Any]] = {
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}


def _bits(op: str, what: str, a: Any, b: Any) -> Any:
    check_numbers(what, a, b)
    for x in (a, b):
        if as_expr(x).dtype.is_float:
            raise DTypeError(
                f"{what} takes integers, not {as_expr(x).dtype}.",
                hint='Take the bits first: `T.reinterpret(x, "uint32")`.',
            )
    if has_traced(a, b):
        return arithmetic(op, a, b)
    return _PYTHON_BITS[op](a, b)


def popcount(x: Any) -> Any:
    """How many bits of an integer are set, in its dtype."""
    return _bit_count("popcount", x)


def clz(x: Any) -> Any:
    """How many leading bits of an integer are 0, in its dtype; Python integers count as int32."""
    return _bit_count("clz", x)


def _bit_count(op: str, x: Any) -> Any:
    what = f"T.{op}"
    check_numbers(what, x)
    expr = as_expr(x)
    if not expr.dtype.is_integer:
        raise DTypeError(f"{what} takes integers, not {expr.dtype}.")
    if not isinstance(expr, Const):
        return Value(unary(op, expr))
    bits = int(expr.value) & ((1 << expr.dtype.bits) - 1)
    number = bits.bit_count() if op == "popcount" else expr.dtype.bits - bits.bit_length()
    return Value(const(number, expr.dtype)) if has_traced(x) else number
