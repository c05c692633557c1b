"""Traced scalars: Python's operators over expressions, and conversion of what users write.

Knows NumPy 2 promotion with weak Python numbers. Does not know buffers or frames.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from tilejit.dtypes import DType, as_dtype, bool_, float32, int32, int64, lookup, promote, uint32
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError, TraceError, caller_span
from tilejit.ir.expr import (
    COMPARE,
    Const,
    Expr,
    binary,
    cast,
    const,
    int_value,
    show,
    unary,
)
from tilejit.ir.expr import select as select_expr
from tilejit.language.trace import current


class Scalar:
    """Python's operators for everything that stands for one traced number."""

    __slots__ = ()

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """NumPy scalars leave their operators to us; NumPy's functions are refused."""
        operate = _UFUNCS.get(ufunc.__name__)
        if operate is None or method != "__call__" or kwargs:
            raise TraceError(
                f"`np.{ufunc.__name__}` cannot compute with a traced value.",
                hint=f"Use the functions of `tilejit.language`, such as `T.{ufunc.__name__}(x)`.",
            )
        scalars = (x[()] if isinstance(x, np.ndarray) and not x.ndim else x for x in inputs)
        return operate(*scalars)

    def scalar(self) -> Expr:
        """The number, as an expression."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Value:
        return arithmetic("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return arithmetic("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return arithmetic("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return arithmetic("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return arithmetic("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return arithmetic("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return arithmetic("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return arithmetic("div", other, self)

    def __floordiv__(self, other: Any) -> Value:
        return arithmetic("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Value:
        return arithmetic("floordiv", other, self)

    def __mod__(self, other: Any) -> Value:
        return arithmetic("floormod", self, other)

    def __rmod__(self, other: Any) -> Value:
        return arithmetic("floormod", other, self)

    def __divmod__(self, other: Any) -> tuple[Value, Value]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Value, Value]:
        return other // self, other % self

    def __pow__(self, other: Any) -> Value:
        return power(self, other)

    def __rpow__(self, other: Any) -> Value:
        return power(other, self)

    def __and__(self, other: Any) -> Value:
        return arithmetic("and", self, other)

    def __rand__(self, other: Any) -> Value:
        return arithmetic("and", other, self)

    def __or__(self, other: Any) -> Value:
        return arithmetic("or", self, other)

    def __ror__(self, other: Any) -> Value:
        return arithmetic("or", other, self)

    def __xor__(self, other: Any) -> Value:
        return arithmetic("xor", self, other)

    def __rxor__(self, other: Any) -> Value:
        return arithmetic("xor", other, self)

    def __lshift__(self, other: Any) -> Value:
        return arithmetic("shl", self, other)

    def __rlshift__(self, other: Any) -> Value:
        return arithmetic("shl", other, self)

    def __rshift__(self, other: Any) -> Value:
        return arithmetic("shr", self, other)

    def __rrshift__(self, other: Any) -> Value:
        return arithmetic("shr", other, self)

    def __lt__(self, other: Any) -> Value:
        return compare("lt", self, other)

    def __le__(self, other: Any) -> Value:
        return compare("le", self, other)

    def __gt__(self, other: Any) -> Value:
        return compare("gt", self, other)

    def __ge__(self, other: Any) -> Value:
        return compare("ge", self, other)

    def __eq__(self, other: object) -> Any:
        return compare("eq", self, other) if is_scalar(other) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return compare("ne", self, other) if is_scalar(other) else NotImplemented

    def __neg__(self) -> Value:
        e = self.scalar()
        if e.dtype.is_bool:
            raise DTypeError("A bool has no negative.", hint="Write `~x` or `T.int32(x)`.")
        return Value(unary("neg", e))

    def __pos__(self) -> Value:
        return Value(self.scalar())

    def __abs__(self) -> Value:
        e = self.scalar()
        return Value(unary("abs", e) if e.dtype.is_signed else e)

    def __invert__(self) -> Value:
        e = self.scalar()
        if e.dtype.is_float:
            raise DTypeError(f"`~` needs an integer or bool, got {e.dtype}.")
        return Value(unary("not", e))

    def astype(self, dtype: object) -> Value:
        """The value converted to `dtype` (floats to integers truncate, integers wrap)."""
        return Value(cast(self.scalar(), as_dtype(dtype)))

    # -- what tracing cannot see ------------------------------------------------------------

    def __bool__(self) -> bool:
        e = self.scalar()
        if isinstance(e, Const):
            return bool(e.value)
        raise TraceError(
            f"`{shown(e)}` is only known when the kernel runs, so Python cannot decide on it.",
            hint=_bool_hint(),
        )

    def __int__(self) -> int:
        return int(self._number("int()", 'Keep it traced; `x.astype("int32")` converts it.'))

    def __index__(self) -> int:
        e = self.scalar()
        if isinstance(e, Const) and not e.dtype.is_integer:
            raise ArgumentTypeError(f"`{shown(e)}` has dtype {e.dtype}, where an int is needed.")
        return int(
            self._number(
                "Python",
                "Use `T.serial(x)` for a loop, sizes that are constants or compile-time parameters "
                "for tiles, and to index a list `for x in (0, 1):`, which unrolls.",
            )
        )

    def __float__(self) -> float:
        return float(self._number("float()", 'Keep it traced; `x.astype("float32")` converts it.'))

    def _number(self, who: str, hint: str) -> bool | int | float:
        e = self.scalar()
        if isinstance(e, Const):
            return e.value
        raise TraceError(
            f"`{shown(e)}` is only known when the kernel runs; {who} needs its number now.",
            hint=hint,
        )

    def __len__(self) -> int:
        raise TraceError(
            "A traced scalar has no length.", hint="Extents are in `A.shape` of a tensor or tile."
        )

    def __iter__(self) -> NoReturn:
        raise TraceError(
            f"`{shown(self.scalar())}` is one number, so it cannot be unpacked or iterated over.",
            hint="Take as many names as T.Kernel or T.Parallel has extents; for a loop of n rounds "
            "write `for i in T.serial(n):`.",
        )

    def __contains__(self, item: object) -> bool:
        raise TraceError(
            "`in` cannot look into a traced scalar.",
            hint="Compare with each candidate: `(x == a) | (x == b)`.",
        )

    def __hash__(self) -> int:
        raise TraceError(
            "A traced value cannot be hashed: its number is only known when the kernel runs.",
            hint="Use a Python constant as dictionary key or set element.",
        )

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TraceError(
            "NumPy cannot compute with a traced value.",
            hint="Use the functions of `tilejit.language`, such as `T.exp(x)` or `T.max(x, y)`.",
        )

    def __round__(self, digits: int | None = None) -> NoReturn:
        raise TraceError("Python's `round` needs a number now.", hint="Write `T.round(x)`.")


class Value(Scalar):
    """A traced number: wraps an expression."""

    __slots__ = ("expr",)

    def __init__(self, expr: Expr) -> None:
        self.expr = expr

    def scalar(self) -> Expr:
        return self.expr

    @property
    def dtype(self) -> DType:
        return self.expr.dtype

    def __repr__(self) -> str:
        return show(self.expr)


_UFUNCS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: arithmetic("add", a, b),
    "subtract": lambda a, b: arithmetic("sub", a, b),
    "multiply": lambda a, b: arithmetic("mul", a, b),
    "divide": lambda a, b: arithmetic("div", a, b),
    "floor_divide": lambda a, b: arithmetic("floordiv", a, b),
    "remainder": lambda a, b: arithmetic("floormod", a, b),
    "power": lambda a, b: power(a, b),
    "bitwise_and": lambda a, b: arithmetic("and", a, b),
    "bitwise_or": lambda a, b: arithmetic("or", a, b),
    "bitwise_xor": lambda a, b: arithmetic("xor", a, b),
    "left_shift": lambda a, b: arithmetic("shl", a, b),
    "right_shift": lambda a, b: arithmetic("shr", a, b),
    "less": lambda a, b: compare("lt", a, b),
    "less_equal": lambda a, b: compare("le", a, b),
    "greater": lambda a, b: compare("gt", a, b),
    "greater_equal": lambda a, b: compare("ge", a, b),
    "equal": lambda a, b: compare("eq", a, b),
    "not_equal": lambda a, b: compare("ne", a, b),
}

_BOOL_HINTS = {
    "min(": "Write `T.min(a, b)`.",
    "max(": "Write `T.max(a, b)`.",
    "sorted(": "Order two values with `T.min(a, b)` and `T.max(a, b)`.",
    "any(": "Join the conditions with `|`.",
    "all(": "Join the conditions with `&`.",
    "bool(": 'Keep it traced; `x.astype("bool")` converts it.',
}


def _bool_hint() -> str:
    span = caller_span()
    if span is not None and span.column is not None:
        line = linecache.getline(span.filename, span.line).encode()
        text = line[span.column :].decode(errors="replace")
        for start, hint in _BOOL_HINTS.items():
            if text.startswith(start):
                return hint
    return (
        "Write `with T.If(cond):` ... `with T.Else():` for a branch, `T.if_then_else(cond, a, b)` "
        "for a value, `with T.While(cond):` for a loop."
    )


Number = bool | int | float


def is_scalar(x: object) -> bool:
    """True for what `as_expr` takes: numbers, NumPy scalars and traced scalars."""
    return isinstance(x, Scalar | bool | int | float | np.generic | Expr)


def as_expr(x: object, dtype: DType | None = None, what: str = "value") -> Expr:
    """The expression of a number.

    Python numbers are weak: they take `dtype` where it can hold their kind, else int32 (int64
    when needed), float32 or bool. NumPy scalars and traced values keep their dtype.

    Raises:
        ArgumentError: an integer that does not fit.
        ArgumentTypeError: not a number.
    """
    if isinstance(x, Scalar):
        return x.scalar()
    if isinstance(x, Expr):
        return x
    if isinstance(x, np.generic):
        known = lookup(x.dtype)
        if known is None:
            raise DTypeError(f"The {what} has NumPy dtype {x.dtype}, which tilejit does not know.")
        return const(x, known)
    if isinstance(x, bool | int | float):
        return _weak(x, dtype, what)
    raise ArgumentTypeError(
        f"The {what} must be a number or a traced value, got {_describe(x)}.",
        hint=_advice(x),
    )


def _weak(x: Number, dtype: DType | None, what: str) -> Expr:
    """A Python number in the dtype of its partner, or in its own default."""
    if isinstance(x, bool):
        return const(x, dtype if dtype is not None else bool_)
    if isinstance(x, float):
        target = dtype if dtype is not None and dtype.is_float else float32
        if math.isfinite(x) and abs(x) > target.max:
            raise ArgumentError(
                f"The {what} {x!r} does not fit {target} (largest finite value {target.max!r})."
            )
        return const(x, target)
    if dtype is None or dtype.is_bool or dtype is int32:
        wide = int32 if int32.min <= x <= int32.max else int64
    else:
        wide = dtype
    if not wide.min <= x <= wide.max:
        raise ArgumentError(
            f"The {what} {x} does not fit {wide} ({wide.min} to {wide.max}).",
            hint="Cast the other operand to a wider dtype, for example `x.astype('int64')`.",
        )
    return const(x, wide)


def _describe(x: object) -> str:
    if isinstance(x, str):
        return repr(x)
    name = type(x).__name__
    return "None" if x is None else f"an object of type {name}"


def _advice(x: object) -> str:
    if isinstance(x, np.ndarray):
        return "Pass arrays as tensor arguments of the kernel."
    if isinstance(x, complex):
        return "Complex numbers are not supported; pass real and imaginary parts."
    return ""


def as_index(x: object, what: str = "index") -> Expr:
    """An index expression: int32 or int64.

    Raises:
        ArgumentTypeError: not an integer.
    """
    if isinstance(x, bool | np.bool_):
        raise ArgumentTypeError(f"The {what} must be an integer, got {x}.")
    e = as_expr(x, None, what)
    if not e.dtype.is_integer:
        shown = repr(x) if isinstance(x, float) else f"a {e.dtype} value"
        raise ArgumentTypeError(
            f"The {what} must be an integer, got {shown}.",
            hint="Divide integers with `//`; convert with `T.int32(x)`.",
        )
    if isinstance(e, Const):
        value = int(e.value)
        return const(value, int32 if int32.min <= value <= int32.max else int64)
    if e.dtype in (int32, int64):
        return e
    return cast(e, int64 if e.dtype.bits == 64 or e.dtype is uint32 else int32)


def operands(a: object, b: object, what: str = "operand") -> tuple[Expr, Expr]:
    """Two operands brought to their common dtype."""
    weak_a = isinstance(a, bool | int | float) and not isinstance(a, np.generic)
    weak_b = isinstance(b, bool | int | float) and not isinstance(b, np.generic)
    if weak_a and not weak_b:
        y = as_expr(b, None, what)
        x = as_expr(a, y.dtype, what)
    elif weak_b and not weak_a:
        x = as_expr(a, None, what)
        y = as_expr(b, x.dtype, what)
    else:
        x, y = as_expr(a, None, what), as_expr(b, None, what)
    common = promote(x.dtype, y.dtype)
    return cast(x, common), cast(y, common)


def arithmetic(op: str, a: object, b: object) -> Value:
    """`a op b` with Python's meaning of the operators and NumPy's result dtype."""
    x, y = operands(a, b)
    bitwise = op in ("and", "or", "xor", "shl", "shr")
    if bitwise and x.dtype.is_float:
        sign = {"and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}[op]
        raise DTypeError(
            f"`{sign}` needs integers or bools, got {x.dtype}.",
            hint="Reinterpret the bits first: `T.reinterpret(x, 'uint32')`.",
        )
    if x.dtype.is_bool and op not in ("and", "or", "xor"):
        x, y = cast(x, int32), cast(y, int32)
    if op in ("floordiv", "floormod") and x.dtype.is_integer and int_value(y) == 0:
        raise ArgumentError("Integer division by zero.")
    if op == "div" and not x.dtype.is_float:
        x, y = cast(x, float32), cast(y, float32)
    return Value(binary(op, x, y))


def compare(op: str, a: object, b: object) -> Value:
    """`a op b` as a bool value; Python integers of any size compare by their number."""
    assert op in COMPARE, op
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Scalar) and isinstance(y, int) and not isinstance(y, bool):
            dtype = x.scalar().dtype
            if dtype.is_integer and not dtype.min <= y <= dtype.max and dtype.bits < 64:
                wide = cast(x.scalar(), int64)
                return compare(op, Value(wide), y) if x is a else compare(op, y, Value(wide))
    return Value(binary(op, *operands(a, b)))


def power(a: object, b: object) -> Value:
    """`a ** b`; small constant exponents become products."""
    x, y = operands(a, b)
    exponent = b if isinstance(b, int) and not isinstance(b, bool) else None
    if exponent is None and isinstance(b, float) and b == int(b) and x.dtype.is_float:
        exponent = int(b)
    if x.dtype.is_bool:
        x, y = cast(x, int32), cast(y, int32)
    if exponent is not None and exponent < 0 and x.dtype.is_integer:
        raise ArgumentError(
            f"An integer to the power {exponent} is no integer.",
            hint="Cast first: `x.astype('float32') ** n`.",
        )
    if exponent is None or not 0 <= exponent <= 4:
        return Value(binary("pow", x, y))
    result: Expr = const(1, x.dtype)
    for count in range(exponent):
        result = x if count == 0 else binary("mul", result, x)
    return Value(result)


def as_condition(x: object, what: str = "condition") -> Expr:
    """A bool expression; numbers are true when they are not 0."""
    return cast(as_expr(x, None, what), bool_)


def select(condition: object, a: object, b: object) -> Value:
    """`a` where `condition` holds, else `b`, in their common dtype."""
    test = as_condition(condition)
    x, y = operands(a, b)
    return Value(select_expr(test, x, y))


def shown(e: Expr) -> str:
    """The expression as the user wrote it, as far as that is known."""
    trace = current()
    return show(e, None if trace is None else trace.name_of)


def is_traced(x: object) -> bool:
    """True for a scalar whose number is only known when the kernel runs."""
    return isinstance(x, Scalar) and not isinstance(x.scalar(), Const)
