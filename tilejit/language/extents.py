"""Shapes, strides, scopes and element types as users write them, checked and normalised.

Knows which spellings are accepted and how a wrong one is refused. Does not know buffers' memory,
the trace or tile ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilejit import dtypes
from tilejit.dtypes import DType
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError, ShapeError
from tilejit.ir.buffer import Scope
from tilejit.ir.expr import Expr, arith, const, index, int_value, same_width, select, show
from tilejit.language.value import Scalar, as_index

SCOPES: dict[str, Scope] = {
    "global": Scope.GLOBAL,
    "shared": Scope.SHARED,
    "shared.dyn": Scope.SHARED,
    "local": Scope.LOCAL,
    "local.fragment": Scope.FRAGMENT,
    "local.var": Scope.VAR,
    "shared.barrier": Scope.BARRIER,
}


def as_scope(scope: object, what: str, allowed: Sequence[Scope] = tuple(Scope)) -> Scope:
    """The memory scope of that name, if the caller `allowed` it."""
    if isinstance(scope, Scope):
        scope = scope.value
    if not isinstance(scope, str):
        raise ArgumentTypeError(f"{what}: scope is {scope!r}, not a string.")
    found = SCOPES.get(scope)
    names = [name for name, value in SCOPES.items() if value in allowed]
    if found is None or found not in allowed:
        raise ArgumentError(
            f'{what}: scope "{scope}" is not one it can have.',
            hint="Scopes: " + ", ".join(f'"{name}"' for name in names) + ".",
        )
    return found


def is_integer(x: object) -> bool:
    """True for a Python or NumPy integer (bool is none)."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_extent(x: object) -> bool:
    """True for what can be one extent of a shape: an integer or a traced value."""
    return is_integer(x) or isinstance(x, Scalar)


def as_dims(dims: Any, what: str, noun: str) -> tuple[Expr, ...]:
    """The integers of a shape or strides; a lone integer counts as one of them.

    noun: what one of them is called in messages, "extent" or "stride".
    """
    if is_extent(dims):
        dims = (dims,)
    if isinstance(dims, str | bytes | DType) or not hasattr(dims, "__iter__"):
        raise ArgumentTypeError(
            f"{what}: {_PLURAL[noun]} {dims!r}, not an integer or a tuple of integers.",
            hint=_ORDER[noun],
        )
    return tuple(_as_dim(x, d, what, noun) for d, x in enumerate(dims))


_PLURAL = {"extent": "the shape is", "stride": "the strides are"}
_ORDER = {
    "extent": "The shape comes first, then the dtype: `((64, 32), 'float16')`.",
    "stride": "The shape comes first, then the strides, then the dtype: "
    "`((64, 32), (1, 64), 'float16')`.",
}


def _as_dim(x: Any, position: int, what: str, noun: str) -> Expr:
    if is_integer(x):
        if not dtypes.int64.min <= int(x) <= dtypes.int64.max:
            raise ShapeError(f"{what}: {noun} {position} is {x}, which does not fit 64 bits.")
        return index(int(x))
    if isinstance(x, Scalar):
        expr = x.scalar()
        if expr.dtype.is_integer:
            return as_index(expr, f"{noun} {position}")
        raise ArgumentTypeError(
            f"{what}: {noun} {position} is a {expr.dtype} value, not an integer."
        )
    hint = "Use integer division, `//`." if isinstance(x, float | np.floating) else ""
    raise ArgumentTypeError(f"{what}: {noun} {position} is {x!r}, not an integer.", hint=hint)


def as_shape(shape: Any, what: str) -> tuple[Expr, ...]:
    """The extents of a tensor: an integer, symbols, or a sequence of those; 0 is allowed.

    Raises:
        ShapeError: a negative extent.
        ArgumentTypeError: not integers.
    """
    extents = as_dims(shape, what, "extent")
    for d, extent in enumerate(extents):
        value = int_value(extent)
        if value is not None and value < 0:
            raise ShapeError(
                f"{what}: extent {d} is {value}; it must not be negative.",
                hint="Give the number of elements; T.dynamic makes one that is known at the call.",
            )
    return extents


def as_tile_shape(shape: Any, what: str) -> tuple[Expr, ...]:
    """The extents of a tile: constants of at least 1.

    Raises:
        ShapeError: an extent that is zero, negative or known only at run time.
        ArgumentTypeError: not integers.
    """
    extents = as_shape(shape, what)
    for d, extent in enumerate(extents):
        value = int_value(extent)
        if value is None:
            raise ShapeError(
                f"{what}: extent {d} is `{show(extent)}`, which is known only at run time.",
                hint="Give the tile a constant extent; T.copy stops at a tensor's edge by itself.",
            )
        if value == 0:
            raise ShapeError(
                f"{what}: extent {d} is 0; a tile has at least one element.",
                hint="Allocate nothing, or give a positive extent.",
            )
    return extents


def as_strides(strides: Any, shape: tuple[Expr, ...], what: str) -> tuple[Expr, ...]:
    """Strides in elements, as many as the shape has extents.

    Raises:
        ShapeError: another number of them.
    """
    steps = as_dims(strides, what, "stride")
    if len(steps) != len(shape):
        raise ShapeError(
            f"{what}: {count(len(shape), 'extent')} but {count(len(steps), 'stride')}.",
            hint="Give one stride, in elements, for each extent.",
        )
    return steps


def as_element_type(dtype: Any, what: str) -> DType:
    """The dtype of a buffer's elements; `T.ptr` is int64, the type of an address."""
    if getattr(dtype, "is_pointer_type", False):
        return dtypes.int64
    if dtype is None:
        raise DTypeError(f"{what}: the dtype is None.", hint='For example "float16".')
    if is_extent(dtype) or isinstance(dtype, tuple | list):
        raise DTypeError(
            f"{what}: {dtype!r} is where the dtype goes.",
            hint="Put all extents into one tuple: `((64, 32), 'float16')`.",
        )
    return dtypes.as_dtype(dtype)


def count(number: int, noun: str) -> str:
    """`1 extent`, `2 extents`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shape_text(shape: Sequence[int | Expr]) -> str:
    """`128x32` for constants, `(n, 32)` where an extent is an expression."""
    values = [x if isinstance(x, int) else int_value(x) for x in shape]
    if None not in values:
        return "x".join(str(v) for v in values) if values else "a single element"
    parts = [str(x) if isinstance(x, int) else show(x) for x in shape]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def compact_strides(shape: tuple[Expr, ...]) -> tuple[int, ...] | None:
    """Row-major strides of constant extents, else None."""
    steps: list[int] = []
    step = 1
    for extent in reversed(shape):
        value = int_value(extent)
        if value is None:
            return None
        steps.append(step)
        step *= value
    return tuple(reversed(steps))


def span_elements(shape: tuple[Expr, ...], strides: tuple[Expr, ...] | None) -> int | None:
    """Elements from the first to the last one inclusive, for constants of at least 0."""
    extents = [int_value(e) for e in shape]
    steps = compact_strides(shape) if strides is None else [int_value(s) for s in strides]
    if steps is None or None in extents or None in steps:
        return None
    if 0 in extents:
        return 0
    last = 0
    for extent, step in zip(extents, steps, strict=True):
        assert extent is not None and step is not None, "tested above"
        last += (extent - 1) * step
    return last + 1


def repeated(at: Expr, extent: Expr, start: Expr | None = None) -> Expr:
    """An index along a broadcasting dimension: `start` (0) where the extent is 1, else `at`."""
    first = index(0) if start is None else start
    if int_value(extent) is not None:
        return first if int_value(extent) == 1 else at
    at, first = same_width(at, first)
    return select(arith("eq", extent, 1), first, at)


ZERO = const(0)
