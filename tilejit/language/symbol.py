"""`T.dynamic`: extents and strides known only when the kernel is called.

Knows how symbols are named and made. Does not know how a call finds their numbers.
"""

from __future__ import annotations

import re
from typing import Any

from tilejit.dtypes import int32, int64
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError
from tilejit.ir.expr import Var, VarKind, const
from tilejit.language.extents import as_element_type
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
    if not isinstance(name, str):
        raise ArgumentTypeError(f"T.dynamic: the name is {name!r}, not a string.")
    element = as_element_type(dtype, "T.dynamic")
    if element not in (int32, int64):
        raise DTypeError(f"T.dynamic: an extent is int32 or int64, not {element}.")
    names = [part for part in re.split(r"[,\s]+", name) if part]
    for part in names:
        if not part.isidentifier():
            raise ArgumentError(f"T.dynamic: {part!r} is not a name.", hint='Write "M" or "M, N".')
    if not names:
        raise ArgumentError("T.dynamic: the name is empty.", hint='Write "M" or "M, N".')
    zero = const(0, element)
    symbols = tuple(Value(Var(part, element, VarKind.SYMBOL, low=zero)) for part in names)
    return symbols[0] if len(symbols) == 1 else symbols


def symbolic(name: str, dtype: Any = "int32") -> Any:
    """The same as `dynamic`, under its older name."""
    return dynamic(name, dtype)
