"""`T.auto`: compile-time parameters that the compiler chooses.

Knows how candidates are written. Does not know how one is chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tilejit.errors import ArgumentError, ArgumentTypeError

MAX_CANDIDATES = 16
MAX_BETWEEN = 256  # multiples of a step; each is traced


@dataclass(frozen=True)
class Auto:
    """A parameter left open. candidates: values that it may take, the usual one first. step: it may
    also take multiples of it between them; 0 where it may not."""

    candidates: tuple[Any, ...]
    step: int = 0

    def __repr__(self) -> str:
        step = (f"step={self.step}",) if self.step else ()
        return f"T.auto({', '.join((*map(repr, self.candidates), *step))})"


def auto(*candidates: Any, step: int | None = None) -> Any:
    """A compile-time parameter that the compiler chooses: `def f(A, B, *, BM=T.auto(64, 128))`.

    Each call signature gets those candidates whose kernel the cost model estimates to be fastest
    on the target; `explain()` says which, and what came next. A value given in the call is taken
    as it is.

    Args:
        candidates: ints, strings, booleans or None, at most 16; the first is taken where nothing
            tells them apart.
        step: of ints: once the best of the candidates are known, the multiples of it next to them
            are compared too, up to the next smaller and larger candidate. `T.auto(128, 256, 64,
            step=8)` may give 144: a tile of that width, whose blocks leave no part of the chip
            without work. A value that nobody named and for which the function raises anything is
            passed over.

    Raises:
        ArgumentError, ArgumentTypeError: no candidates, too many, one twice, or of another type; a
            step that is not positive, with candidates that are not all ints, or of which more than
            256 multiples lie between them.

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
    if step is not None:
        _check_step(candidates, step)
    return _auto(step or 0, *((type(value), value) for value in candidates))


def _check_step(candidates: tuple[Any, ...], step: Any) -> None:
    if not _is_int(step):
        raise ArgumentTypeError(f"T.auto: step is an int, got {step!r}.")
    if step < 1:
        raise ArgumentError(f"T.auto: step is {step}; it must be positive.")
    for value in candidates:
        if not _is_int(value):
            raise ArgumentTypeError(
                f"T.auto: step is for ints, and {value!r} is none.",
                hint="Leave `step` out, or the candidate.",
            )
    between = (max(candidates) - min(candidates)) // step
    if between > MAX_BETWEEN:
        raise ArgumentError(
            f"T.auto: {between} multiples of {step} lie between the candidates; "
            f"at most {MAX_BETWEEN} are compared.",
            hint="Take a larger step.",
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@functools.cache  # equal candidates are one object, so that a call that repeats them is warm
def _auto(step: int, *typed: tuple[type, Any]) -> Auto:
    return Auto(tuple(value for _, value in typed), step)
