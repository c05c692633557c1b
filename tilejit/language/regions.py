"""The two sides of a tile op, brought to regions of one shape.

A side is a buffer, a slice of one, or a start point `A[i, j]` that takes its extents from the
other side. Knows how extents are matched and how a mismatch is told. Does not know the ops.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tilejit.errors import ArgumentTypeError, ShapeError, Span
from tilejit.ir.buffer import Buffer, Region
from tilejit.ir.expr import Expr, arith, int_value
from tilejit.language.extents import count, repeated, shape_text
from tilejit.language.handle import (
    BarrierHandle,
    BufferHandle,
    Element,
    RegionHandle,
    as_region,
)


@dataclass(frozen=True, slots=True)
class Start:
    """A start point: a buffer and an index for each of its dimensions."""

    buffer: Buffer
    index: tuple[Expr, ...]


Side = Region | Start | Buffer


def as_side(x: Any, what: str, role: str) -> Side:
    """What an argument of a tile op names; a buffer with runtime extents stays a buffer.

    Raises:
        ArgumentTypeError: no buffer, slice or element of one.
    """
    if isinstance(x, Element):
        return Start(*x.place)
    if isinstance(x, BarrierHandle):
        raise ArgumentTypeError(f"{what}: `{x.name}` is a barrier, which holds no tile.")
    if isinstance(x, BufferHandle):
        return as_region(x, f"{what}: {role}") if x.buffer.is_static else x.buffer
    if isinstance(x, RegionHandle):
        return x.region
    raise ArgumentTypeError(
        f"{what}: {role} is {x!r}, not a buffer, a slice or an element of one.",
        hint="For example `A`, `A[i, j]` (a start point) or `A[i:i + 64, j:j + 32]`.",
    )


def match(what: str, src: Side, dst: Side) -> tuple[Region, Region]:
    """The two sides as regions of equal shape (`src` may broadcast if its buffer says so).

    A start point takes the other side's extents for its last dimensions and one element of the
    others; extents of 1 need no partner.

    Raises:
        ShapeError: the extents differ, or neither side says them.
    """
    for side, other in ((src, dst), (dst, src)):
        if isinstance(side, Buffer) and not isinstance(other, Region | Start):
            raise _unknown_extents(what, side, other)
    if isinstance(src, Start) and isinstance(dst, Start):
        return one_element(src), one_element(dst)
    if isinstance(src, Start):
        full = _extent_region(what, dst, src)
        return _extended(what, src, full), _squeezed_like(full, src)
    if isinstance(dst, Start):
        full = _extent_region(what, src, dst)
        return _squeezed_like(full, dst), _extended(what, dst, full)
    if isinstance(src, Region) and isinstance(dst, Region):
        return _equalised(what, src, dst)
    raise _unknown_extents(what, *((src, dst) if isinstance(src, Buffer) else (dst, src)))


def one_element(start: Start) -> Region:
    """The region of the one element at a start point; it has no dimensions."""
    rank = start.buffer.rank
    return Region(start.buffer, start.index, (1,) * rank, frozenset(range(rank)))


def dropped(region: Region, dims: set[int]) -> Region:
    """The region without some of its dimensions (of extent 1)."""
    assert all(region.extents[d] == 1 for d in dims), f"{region} has no extent 1 in {dims}"
    return dataclasses.replace(region, dropped=region.dropped | dims)


def squeezed(region: Region) -> Region:
    """The region without dimensions of extent 1."""
    return dropped(region, {d for d in region.kept if region.extents[d] == 1})


def _extent_region(what: str, side: Side, start: Start) -> Region:
    if isinstance(side, Region):
        return side
    assert isinstance(side, Buffer), f"{what}: {side}"
    raise _unknown_extents(what, side, start)


def _extended(what: str, start: Start, other: Region) -> Region:
    rank = start.buffer.rank
    shape = _fitting(other, rank).shape
    if len(shape) > rank:
        raise ShapeError(
            f"{what}: `{start.buffer.name}` has {count(rank, 'dimension')}, "
            f"but `{other.buffer.name}` is {shape_text(other.shape)}.",
            related=_origins(start.buffer, other.buffer),
            hint="Copy a slice with fewer dimensions.",
        )
    lead = rank - len(shape)
    return Region(start.buffer, start.index, (1,) * lead + shape, frozenset(range(lead)))


def _squeezed_like(region: Region, start: Start) -> Region:
    return _fitting(region, start.buffer.rank)


def _fitting(region: Region, rank: int) -> Region:
    """The region itself, or without its extents of 1 when it has more than `rank` dimensions."""
    return region if len(region.shape) <= rank else squeezed(region)


def _equalised(what: str, src: Region, dst: Region) -> tuple[Region, Region]:
    if src.shape == dst.shape:
        return src, dst
    a, b = squeezed(src), squeezed(dst)
    if a.shape == b.shape:
        return a, b
    if broadcast_index(src, tuple(src.starts[d] for d in src.kept), dst.shape) is not None:
        return src, dst
    raise ShapeError(
        f"{what}: the source is {shape_text(src.shape)}, "
        f"but the destination is {shape_text(dst.shape)}.",
        related=_origins(src.buffer, dst.buffer),
        hint="Give both sides the same extents, or a start point such as "
        f"`{start_example(dst.buffer)}`, which takes them from the other side.",
    )


def start_example(buffer: Buffer) -> str:
    """How a start point of the buffer is written."""
    return f"{buffer.name}[{', '.join('ijklmnop'[d % 8] for d in range(buffer.rank))}]"


def _unknown_extents(what: str, side: Buffer, other: Side) -> ShapeError:
    name = side.name
    if isinstance(other, Region):
        end = f", but the other side is {shape_text(other.shape)}."
    else:
        end = ", known only at run time, and nothing else says how much is meant."
    return ShapeError(
        f"{what}: `{name}` is {shape_text(side.shape)}{end}",
        related=_origins(side),
        hint=f"Name a start point, `{start_example(side)}`, with a tile on the other side.",
    )


def _origins(*buffers: Buffer) -> list[tuple[Span | None, str]]:
    return [(b.span, f"{b.name} comes from here") for b in buffers]


def may_repeat(region: Region) -> bool:
    """True when elements of a broadcasting buffer stand for several of the region."""
    shape = region.buffer.shape
    return region.buffer.broadcasts and any(
        region.extents[d] != 1 and int_value(shape[d]) in (None, 1) for d in region.kept
    )


def broadcast_index(
    region: Region, variables: tuple[Expr, ...], shape: tuple[int, ...]
) -> tuple[Expr, ...] | None:
    """The index of a broadcasting buffer's element in a loop over `shape`, or None if it has none.

    Extents of 1 repeat: of the buffer, of the region, and those found to be 1 at run time.
    """
    kept = region.kept
    if not region.buffer.broadcasts or len(kept) != len(shape):
        return None
    result = list(region.starts)
    for d, size, variable in zip(kept, shape, variables, strict=True):
        if region.extents[d] == size:
            extent, start = region.buffer.shape[d], region.starts[d]
            result[d] = repeated(arith("add", start, variable), extent, start)
        elif int_value(region.buffer.shape[d]) != 1:
            return None
    return tuple(result)
