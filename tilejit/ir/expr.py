"""Scalar expressions of the tile graph: pure, immutable, interned.

Knows dtypes and constant folding. Loads are not expressions but nodes that bind a `Var`, so an
expression can be evaluated anywhere its variables are in scope. Equal expressions are the same
object: compare with `is`, use as dictionary keys.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import numpy as np

from tilejit.dtypes import DType, bool_, float16, float32, int32, int64

Number = bool | int | float


class VarKind(StrEnum):
    BLOCK = "block"  # blockIdx component
    THREAD = "thread"  # threadIdx component
    LOOP = "loop"  # serial loop
    PARALLEL = "parallel"  # T.Parallel iteration
    SYMBOL = "symbol"  # runtime extent or stride
    SCALAR = "scalar"  # runtime scalar argument
    POINTER = "pointer"  # address of an argument
    VALUE = "value"  # result of a load


class Expr:
    """Base class. `dtype` is the type of the value; `children` the operands."""

    __slots__ = ("__weakref__", "dtype")
    dtype: DType
    children: tuple[Expr, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)


class Const(Expr):
    """A typed constant; `value` is a Python number."""

    __slots__ = ("value",)
    value: Number


class Var(Expr):
    """A named value: loop variable, block or thread index, argument, or loaded value.

    low, high: inclusive bounds when known (expressions of other variables are resolved by
        `ir.analysis`).
    """

    __slots__ = ("high", "kind", "low", "name", "serial")
    name: str
    kind: VarKind
    low: Expr | None
    high: Expr | None
    serial: int

    _serials = itertools.count()

    def __init__(
        self,
        name: str,
        dtype: DType,
        kind: VarKind,
        low: Expr | None = None,
        high: Expr | None = None,
    ) -> None:
        self._set(name=name, dtype=dtype, kind=kind, low=low, high=high, serial=next(Var._serials))

    def __repr__(self) -> str:
        return f"{self.name}"


class Op(Expr):
    """An operation `op` on `children`. Which names exist: `BINARY`, `COMPARE`, `UNARY`, `select`,
    `cast`, `bitcast`, and the functions of `MATH`."""

    __slots__ = ("children", "known_variables", "op")
    op: str
    children: tuple[Expr, ...]
    known_variables: frozenset[Var] | None  # once `variables` was asked


BINARY = frozenset(
    "add sub mul div floordiv floormod min max and or xor shl shr pow atan2 fmod".split()
)
COMPARE = frozenset("lt le gt ge eq ne".split())
UNARY = frozenset("neg not abs hidden".split())
MATH = frozenset(
    "exp exp2 exp10 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan sinh cosh tanh asin acos "
    "atan erf floor ceil round trunc popcount clz".split()
)
PREDICATES = frozenset("isnan isinf isfinite".split())

_table: weakref.WeakValueDictionary[object, Expr] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _intern(key: object, build: Callable[[], Expr]) -> Expr:
    with _lock:
        found = _table.get(key)
        if found is None:
            found = _table[key] = build()
        return found


def const(value: Number | np.generic, dtype: DType = int32) -> Const:
    """A constant of `dtype`; the value is wrapped (integers) or rounded (floats) to it."""
    if type(value) is int and dtype is int32:
        return _int32(value)
    return _const(value, dtype)


@functools.lru_cache(maxsize=4096)  # extents and steps: the same ones over and over
def _int32(value: int) -> Const:
    return _const(value, int32)


def _const(value: Number | np.generic, dtype: DType) -> Const:
    if isinstance(value, np.generic):
        value = value.item()
    if dtype.is_integer:
        value = int(value) & ((1 << dtype.bits) - 1)
        if dtype.is_signed and value >> (dtype.bits - 1):
            value -= 1 << dtype.bits
    elif dtype.is_float:
        with np.errstate(over="ignore"):
            value = float(dtype.numpy.type(float(value)))
    else:
        value = bool(value)
    # -0.0 == 0.0 and nan != nan: key by the text
    key = (Const, dtype.name, value if not isinstance(value, float) else value.hex())

    def build() -> Expr:
        node = Const()
        node._set(dtype=dtype, value=value)
        return node

    result = _intern(key, build)
    assert isinstance(result, Const)
    return result


def _op(name: str, dtype: DType, *children: Expr) -> Expr:
    # Children are interned or unique, so their identity is their value. The key holds them
    # weakly through the node: an id is not reused while the node that refers to it lives.
    key = (name, dtype.name, *(id(c) for c in children))

    def build() -> Expr:
        node = Op()
        node._set(op=name, dtype=dtype, children=children, known_variables=None)
        return node

    return _intern(key, build)


def is_const(e: Expr, value: Number | None = None) -> bool:
    return isinstance(e, Const) and (value is None or e.value == value)


def const_value(e: Expr) -> Number | None:
    """The Python number of a constant, else None."""
    return e.value if isinstance(e, Const) else None


def int_value(e: Expr) -> int | None:
    """The Python int of an integer constant, else None."""
    return int(e.value) if isinstance(e, Const) and not isinstance(e.value, float) else None


# On integers and bools, divisors not 0: whole numbers, not wrapped.
FOLD: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "fmod": lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1),
    "floordiv": lambda a, b: a // b,
    "floormod": lambda a, b: a % b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


_DIVISIONS = ("div", "fmod", "floordiv", "floormod")


def binary(op: str, a: Expr, b: Expr) -> Expr:
    """`a op b`; both of one dtype, the result too (bool for comparisons). Folds constants and
    the identities of integer arithmetic."""
    assert op in BINARY or op in COMPARE, op
    assert a.dtype is b.dtype, f"{op}: {a.dtype} and {b.dtype}"
    result = bool_ if op in COMPARE else a.dtype
    if isinstance(a, Const) and isinstance(b, Const) and not a.dtype.is_float:
        x, y = a.value, b.value
        if op in FOLD and not (op in _DIVISIONS and y == 0):
            return const(FOLD[op](x, y), result)
        if op in ("shl", "shr") and 0 <= y < a.dtype.bits:
            return const(int(x) << int(y) if op == "shl" else int(x) >> int(y), result)
    if a.dtype.is_integer:
        folded = _integer_identity(op, a, b)
        if folded is not None:
            return folded
    if a.dtype.is_bool and op in ("and", "or"):
        for known, other in ((a, b), (b, a)):
            if isinstance(known, Const):
                return other if bool(known.value) == (op == "and") else known
    if op in ("add", "mul", "min", "max", "and", "or", "xor", "eq", "ne") and isinstance(a, Const):
        a, b = b, a  # constants on the right
    return _op(op, result, a, b)


def _integer_identity(op: str, a: Expr, b: Expr) -> Expr | None:
    x, y = int_value(a), int_value(b)
    if op in ("add", "or", "xor", "sub", "shl", "shr") and y == 0:
        return a
    if op in ("add", "or", "xor") and x == 0:
        return b
    if op == "mul":
        if 0 in (x, y):
            return const(0, a.dtype)
        if y == 1:
            return a
        if x == 1:
            return b
    if op in ("floordiv", "floormod") and y == 1:
        return a if op == "floordiv" else const(0, a.dtype)
    if op == "and" and 0 in (x, y):
        return const(0, a.dtype)
    if op in ("min", "max", "and", "or") and a is b:
        return a
    if op in ("sub", "xor") and a is b:
        return const(0, a.dtype)
    if op in ("le", "ge", "eq") and a is b:
        return const(True, bool_)
    if op in ("lt", "gt", "ne") and a is b:
        return const(False, bool_)
    if op == "add" and y is not None and isinstance(a, Op) and a.op == "add":
        inner = int_value(a.children[1])
        # (e + 1) + 2; in an index nothing may wrap
        if inner is not None and a.dtype.min <= inner + y <= a.dtype.max:
            return binary("add", a.children[0], const(inner + y, a.dtype))
    return None


def unary(op: str, a: Expr) -> Expr:
    """`op a` for neg, not (bitwise on integers, logical on bool), abs, hidden, MATH and PREDICATES.
    hidden: the value itself, which no compiler knows; of at most 32 bits, not bool."""
    if op == "not" and isinstance(a, Const):
        return const(not a.value if a.dtype.is_bool else ~int(a.value), a.dtype)
    if op == "not" and isinstance(a, Op) and a.op == "not":
        return a.children[0]
    if isinstance(a, Const) and op in ("neg", "abs"):
        return const(-a.value if op == "neg" else abs(a.value), a.dtype)
    assert op in UNARY or op in MATH or op in PREDICATES, op
    return _op(op, bool_ if op in PREDICATES else a.dtype, a)


def cast(a: Expr, dtype: DType) -> Expr:
    """Conversion of the value: floats to integers truncate, integers wrap, float to fp8
    saturates, anything to bool is `!= 0`."""
    if a.dtype is dtype:
        return a
    if isinstance(a, Const) and not (a.dtype.is_float and dtype.is_integer):
        if not (dtype.is_float and dtype.bits == 8):
            return const(a.value, dtype)
    if isinstance(a, Const) and dtype.is_integer and math.isfinite(a.value):
        value = int(a.value)
        if dtype.min <= value <= dtype.max:
            return const(value, dtype)
    return _op("cast", dtype, a)


def bitcast(a: Expr, dtype: DType) -> Expr:
    assert a.dtype.bits == dtype.bits
    return a if a.dtype is dtype else _op("bitcast", dtype, a)


def select(condition: Expr, a: Expr, b: Expr) -> Expr:
    """`a` where `condition` holds, else `b`."""
    assert condition.dtype is bool_ and a.dtype is b.dtype
    if isinstance(condition, Const):
        return a if condition.value else b
    return a if a is b else _op("select", a.dtype, condition, a, b)


def index(value: int | Expr) -> Expr:
    """An index expression: ints become int32 constants, or int64 when they need it."""
    if isinstance(value, Expr):
        return value
    return const(value, int32 if int32.min <= value <= int32.max else int64)


def same_width(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Two integer expressions brought to one dtype (int64 if either needs it)."""
    if a.dtype is b.dtype:
        return a, b
    wide = int64 if a.dtype.bits == 64 or b.dtype.bits == 64 else int32
    return cast(a, wide), cast(b, wide)


def arith(op: str, a: int | Expr, b: int | Expr) -> Expr:
    """Index arithmetic: `binary` that takes ints and mixed widths; constants never wrap."""
    a, b = index(a), index(b)
    if op in ("add", "sub", "mul") and isinstance(a, Const) and isinstance(b, Const):
        return index(FOLD[op](int(a.value), int(b.value)))
    return binary(op, *same_width(a, b))


def ceildiv(a: int | Expr, b: int | Expr) -> Expr:
    """`(a + b - 1) // b`."""
    return arith("floordiv", arith("add", a, arith("sub", b, 1)), b)


def walk(e: Expr) -> Iterator[Expr]:
    """Every distinct sub-expression, operands first."""
    if not e.children:
        yield e
        return
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(e, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((c, False) for c in reversed(node.children) if c not in seen)


def variables(e: Expr) -> frozenset[Var]:
    """Every variable of the expression."""
    if isinstance(e, Var):
        return frozenset((e,))
    if not isinstance(e, Op):
        return _NONE
    if e.known_variables is None:
        e._set(known_variables=frozenset(n for n in walk(e) if isinstance(n, Var)))
    assert e.known_variables is not None
    return e.known_variables


_NONE: frozenset[Var] = frozenset()


def substitute(e: Expr, mapping: dict[Var, Expr]) -> Expr:
    """`e` with variables replaced (same dtypes)."""
    done: dict[Expr, Expr] = {}
    for node in walk(e):
        if isinstance(node, Var):
            done[node] = mapping.get(node, node)
        elif isinstance(node, Op):
            fresh = tuple(done[c] for c in node.children)
            same = all(f is c for f, c in zip(fresh, node.children, strict=True))
            done[node] = node if same else rebuild(node, fresh)
        else:
            done[node] = node
    return done[e]


def rebuild(node: Op, children: tuple[Expr, ...]) -> Expr:
    """The same operation on other operands, folded again."""
    if node.op == "select":
        return select(*children)
    if node.op == "cast":
        return cast(children[0], node.dtype)
    if node.op == "bitcast":
        return bitcast(children[0], node.dtype)
    if len(children) == 2:
        return binary(node.op, *children)
    return unary(node.op, children[0])


_SYMBOL = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "floormod": "%",
    "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>", "pow": "**",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip


def show(e: Expr, name: Callable[[Var], str] | None = None) -> str:
    """Readable text in Python's syntax; `name` gives variables another name than their own."""
    if isinstance(e, Const):
        if e.dtype in (int32, bool_):
            return str(e.value)
        if e.dtype is int64:
            return str(e.value)
        value = str(e.value)
        if e.dtype in (float16, float32):
            value = str(e.dtype.numpy.type(e.value))  # as many digits as tell it apart
        return value if e.dtype is float32 else f"{e.dtype}({value})"
    if isinstance(e, Var):
        return e.name if name is None else name(e)
    assert isinstance(e, Op)
    args = [show(c, name) for c in e.children]
    if e.op in _SYMBOL:
        wrapped = [
            f"({a})" if isinstance(c, Op) and c.op in _SYMBOL else a
            for a, c in zip(args, e.children, strict=True)
        ]
        return f"{wrapped[0]} {_SYMBOL[e.op]} {wrapped[1]}"
    if e.op == "neg":
        return f"-{args[0]}" if not isinstance(e.children[0], Op) else f"-({args[0]})"
    if e.op == "not":
        return f"~({args[0]})"
    if e.op == "cast":
        return f"{e.dtype}({args[0]})"
    if e.op == "select":
        return f"if_then_else({', '.join(args)})"
    if e.op == "bitcast":
        return f"reinterpret({args[0]}, {e.dtype})"
    return f"{e.op}({', '.join(args)})"
