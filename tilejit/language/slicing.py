"""Indexes and slices: what `A[...]` means, checked against the buffer's extents.

Knows positions, bounds and regions. Does not know handles, loads or stores.
"""

from __future__ import annotations

from types import EllipsisType

from tilejit.errors import OutOfRangeError, ShapeError, UnsupportedError
from tilejit.ir.analysis import difference, interval
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Const, Expr, index, int_value, show
from tilejit.language.extents import repeated
from tilejit.language.value import as_index


def expand_index(buffer: Buffer, rank: int, key: object) -> list[object]:
    """One entry a dimension: ellipses and missing trailing indexes become full slices."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if sum(isinstance(p, EllipsisType) for p in parts) > 1:
        raise ShapeError(
            f"Two ellipses in one index of `{buffer.name}`; where they end is unclear."
        )
    given = sum(not isinstance(p, EllipsisType) for p in parts)
    if given > rank:
        raise OutOfRangeError(
            f"`{buffer.name}` has {rank} dimension{'s' * (rank != 1)} and is indexed with {given}.",
            related=[(buffer.span, f"{buffer.name} comes from here")],
            hint="Give at most one index for each dimension.",
        )
    missing: list[object] = [slice(None)] * (rank - given)
    for place, part in enumerate(parts):
        if isinstance(part, EllipsisType):
            return [*parts[:place], *missing, *parts[place + 1 :]]
    return [*parts, *missing]


def checked_position(buffer: Buffer, d: int, part: object) -> Expr:
    """The checked index of one dimension."""
    e = as_index(part, f"index of dimension {d} of `{buffer.name}`")
    extent = int_value(buffer.shape[d])
    if buffer.broadcasts:
        e = repeated(e, buffer.shape[d])
    if buffer.scope is Scope.GLOBAL:
        at = int_value(e)
        beyond = at is not None and (at < 0 or (extent is not None and 0 < extent <= at))
    else:
        span = interval(e)
        at = span.low if span.low == span.high else None
        assert extent is not None, f"{buffer.name} has runtime extents"
        beyond = (span.high is not None and span.high < 0) or (
            span.low is not None and span.low >= extent
        )
    if beyond:
        raise _out_of_range(buffer, d, show(e), show(buffer.shape[d]), (at or 0) < 0)
    return e


def _out_of_range(
    buffer: Buffer, d: int, at: str, extent: str, is_negative: bool
) -> OutOfRangeError:
    hint = f"Indexes of that dimension go from 0 to below {extent}."
    if is_negative:
        hint = "Negative indexes do not wrap in a kernel."
    return OutOfRangeError(
        f"{'Slice' if ':' in at else 'Index'} {at} is outside dimension {d} of `{buffer.name}`, "
        f"which has extent {extent}.",
        related=[(buffer.span, f"{buffer.name} comes from here")],
        hint=hint,
    )


def make_region(buffer: Buffer, parts: list[object]) -> Region:
    starts: list[Expr] = []
    extents: list[int] = []
    dropped: set[int] = set()
    for d, part in enumerate(parts):
        if isinstance(part, slice):
            start, extent = _slice(buffer, d, part)
        else:
            start, extent = checked_position(buffer, d, part), 1
            dropped.add(d)
        starts.append(start)
        extents.append(extent)
    return Region(buffer, tuple(starts), tuple(extents), frozenset(dropped))


def _slice(buffer: Buffer, d: int, part: slice) -> tuple[Expr, int]:
    """Start and extent of a slice of dimension `d`."""
    if part.step is not None and part.step != 1:
        raise UnsupportedError(
            f"The slice of dimension {d} of `{buffer.name}` has step {part.step!r}; only 1 works.",
            hint="Loop over the elements with T.Parallel: `A[i * 2]`.",
        )
    whole_extent = buffer.shape[d]
    start = _bound(buffer, d, part.start, index(0))
    stop = _bound(buffer, d, part.stop, whole_extent)
    extent = difference(stop, start)
    if extent is None:
        raise ShapeError(
            f"The slice `{show(start)}:{show(stop)}` of dimension {d} of `{buffer.name}` has no "
            "constant extent.",
            hint="Write `start:start + 64` with a constant extent, or pass a start point.",
        )
    if extent <= 0:
        raise ShapeError(
            f"The slice `{show(start)}:{show(stop)}` of dimension {d} of `{buffer.name}` has "
            f"extent {extent}.",
        )
    low, high, limit = int_value(start), int_value(stop), int_value(whole_extent)
    is_global = buffer.scope is Scope.GLOBAL
    if low is not None and low < 0:
        raise _out_of_range(buffer, d, f"{low}:{high}", show(whole_extent), True)
    if high is not None and limit is not None and high > limit and not is_global:
        raise _out_of_range(buffer, d, f"{low}:{high}", str(limit), False)
    return start, extent


def _bound(buffer: Buffer, d: int, bound: object, default: Expr) -> Expr:
    """A slice bound; constant negative ones count from the end, as in NumPy."""
    if bound is None:
        return default
    e = as_index(bound, f"slice bound of dimension {d} of `{buffer.name}`")
    if not isinstance(e, Const) or int(e.value) >= 0:
        return e
    extent = int_value(buffer.shape[d])
    if extent is None:
        raise OutOfRangeError(
            f"The slice bound {e.value} of dimension {d} of `{buffer.name}` counts from an end "
            "that is only known at the call.",
            hint="Give bounds from the start.",
        )
    return index(extent + int(e.value))
