"""`T.dynamic` and `T.const`: names of extents and strides.

Knows how symbols are named and made. Does not know how a call finds their numbers.
"""

from __future__ import annotations

import re
from typing import Any

from tilejit.dtypes import int32, int64
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError
from tilejit.ir.expr import Var, VarKind
from tilejit.ir.expr import const as number
from tilejit.language.extents import as_element_type
from tilejit.language.trace import current, current_host
from tilejit.language.value import Value


def dynamic(name: str, dtype: Any = "int32") -> Any:
    """A symbol for a shape, or a tuple of them for several names.

    Args:
        name: "M", or several: "M, N" or "M N".
        dtype: "int32" or "int64".

    Raises:
        ArgumentError: not an identifier.
        DTypeError: another dtype.

    Example:
        >>> M, N = dynamic("M, N")
        >>> M + 1
        M + 1
    """
    return _symbols("T.dynamic", name, dtype)


def const(name: str, dtype: Any = "int32") -> Any:
    """Extents of the arrays of this call, named by the annotations that follow in the body.

    Inside a @tilejit function, before `T.Kernel`; each name is a Python integer once an
    annotation such as `A: T.Tensor((M, N), "float16")` has bound it. Arguments and errors as for
    `dynamic`.

    Raises:
        TraceError: outside a traced function, or inside `T.Kernel`.
    """
    current_host("T.const")
    return _symbols("T.const", name, dtype)


def _symbols(what: str, name: str, dtype: Any) -> Any:
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{what}: the name is {name!r}, not a string.")
    element = as_element_type(dtype, what)
    if element not in (int32, int64):
        raise DTypeError(f"{what}: an extent is int32 or int64, not {element}.")
    names = [part for part in re.split(r"[,\s]+", name) if part]
    for part in names:
        if not part.isidentifier():
            raise ArgumentError(f"{what}: {part!r} is not a name.", hint='Write "M" or "M, N".')
    if not names:
        raise ArgumentError(f"{what}: the name is empty.", hint='Write "M" or "M, N".')
    trace = current()
    known = trace.host.known if trace is not None else {}
    zero = number(0, element)
    symbols = tuple(
        known[part] if part in known else Value(Var(part, element, VarKind.SYMBOL, low=zero))
        for part in names
    )
    return symbols[0] if len(symbols) == 1 else symbols


def symbolic(name: str, dtype: Any = "int32") -> Any:
    """The same as `dynamic`, under its older name."""
    return dynamic(name, dtype)
