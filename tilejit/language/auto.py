"""`T.auto`: compile-time parameters that the compiler chooses.

Knows how candidates are written. Does not know how one is chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tilejit.errors import ArgumentError, ArgumentTypeError

MAX_CANDIDATES = 16


@dataclass(frozen=True)
class Auto:
    """A parameter left open. candidates: values that it may take, the usual one first."""

    candidates: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"T.auto({', '.join(map(repr, self.candidates))})"


def auto(*candidates: Any) -> Any:
    """A compile-time parameter that the compiler chooses: `def f(A, B, *, BM=T.auto(64, 128))`.

    Each call signature gets those candidates whose kernel the cost model estimates to be fastest
    on the target; `explain()` says which, and what came next. A value given in the call is taken
    as it is.

    Args:
        candidates: ints, strings, booleans or None, at most 16; the first is taken where nothing
            tells them apart.

    Raises:
        ArgumentError, ArgumentTypeError: no candidates, too many, one twice, or of another type.

    Example:
        >>> @tilejit
        ... def matmul(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=T.auto(128, 64)):
        ...     ...
    """
    if not candidates:
        raise ArgumentError("T.auto needs candidates.", hint="Write T.auto(128, 64, 256).")
    if len(candidates) > MAX_CANDIDATES:
        raise ArgumentError(
            f"T.auto takes at most {MAX_CANDIDATES} candidates, got {len(candidates)}."
        )
    for value in candidates:
        if not isinstance(value, int | str | None):
            raise ArgumentTypeError(
                f"T.auto chooses among ints, strings, booleans and None, got {value!r}."
            )
    if len(set(map(repr, candidates))) < len(candidates):
        raise ArgumentError(f"T.auto{candidates!r} names a candidate twice.")
    return _auto(*((type(value), value) for value in candidates))


@functools.cache  # equal candidates are one object, so that a call that repeats them is warm
def _auto(*typed: tuple[type, Any]) -> Auto:
    return Auto(tuple(value for _, value in typed))
