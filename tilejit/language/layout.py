"""How shared tiles lie in memory, by the user's word: `T.make_*_layout` and `T.annotate_layout`.

Knows which layouts there are and what each asks of a tile. Does not know which instructions can use
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilejit.dtypes import DType
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    TileError,
    TraceError,
    UnsupportedError,
    a_kind,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import GivenLayout
from tilejit.ir.node import Body, walk
from tilejit.language.extents import is_integer, shape_text
from tilejit.language.handle import BufferHandle, RegionHandle
from tilejit.language.trace import Trace, current_kernel
from tilejit.layout.boxes import CHUNK, SWIZZLE_ROWS, SWIZZLES, chunked_layout, swizzled_layout
from tilejit.layout.shared import SharedLayout

FULL, HALF, QUARTER = SWIZZLES
_ADVICE = "T.make_linear_layout and T.make_padded_layout take any rows."


@dataclass(frozen=True, slots=True)
class TileLayout:
    """How the elements of a shared tile of a shape and dtype lie: what `T.make_*_layout` gives and
    `T.annotate_layout` takes."""

    layout: SharedLayout
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    def __repr__(self) -> str:
        return f"{_tile(self.shape, self.dtype)} in {self.layout}"


# -- layouts ----------------------------------------------------------------------------------


def make_swizzled_layout(buffer: BufferHandle) -> TileLayout:
    """The widest swizzle that the tile's rows have room for: over 128, 64 or 32 bytes.

    Args:
        buffer: a tile from `T.alloc_shared` of any dtype, (..., rows, columns): rows a multiple of
            8, a row's bytes one of 32.

    Raises:
        ArgumentTypeError, UnsupportedError: no shared tile, or one without memory of its own.
        ShapeError: another shape.
        TraceError: outside a kernel.
    """
    what = "T.make_swizzled_layout"
    tile = _shared_tile(what, buffer)
    row_bytes = _row_bytes(what, tile)
    chunks = next((n for n in SWIZZLES if row_bytes % (CHUNK * n) == 0), QUARTER)
    return _swizzled(what, tile, chunks)


def make_full_bank_swizzled_layout(buffer: BufferHandle) -> TileLayout:
    """Panels of 128 bytes of a row, one after the other; in row r of a panel the 16-byte chunk c
    lies where chunk c ^ (r % 8) would (PTX ISA, "Swizzling modes", 128-byte).

    Rows are a multiple of 8, a row's bytes one of 128; otherwise like `T.make_swizzled_layout`.
    """
    what = "T.make_full_bank_swizzled_layout"
    return _swizzled(what, _shared_tile(what, buffer), FULL)


def make_half_bank_swizzled_layout(buffer: BufferHandle) -> TileLayout:
    """The same over 64 bytes: chunk c ^ (r // 2 % 4), rows of a multiple of 64 bytes."""
    what = "T.make_half_bank_swizzled_layout"
    return _swizzled(what, _shared_tile(what, buffer), HALF)


def make_quarter_bank_swizzled_layout(buffer: BufferHandle) -> TileLayout:
    """The same over 32 bytes: chunk c ^ (r // 4 % 2), rows of a multiple of 32 bytes."""
    what = "T.make_quarter_bank_swizzled_layout"
    return _swizzled(what, _shared_tile(what, buffer), QUARTER)


def make_chunked_layout(buffer: BufferHandle) -> TileLayout:
    """Panels of 16 bytes of a row, one after the other: what multiplies by warpgroups and bulk
    copies take without a swizzle.

    Rows are a multiple of 8, a row's bytes one of 16; otherwise like `T.make_swizzled_layout`.
    """
    what = "T.make_chunked_layout"
    tile = _shared_tile(what, buffer)
    _check_rows(what, tile, CHUNK)
    return TileLayout(chunked_layout(tile.extents, tile.dtype.bytes), tile.dtype)


def make_linear_layout(buffer: BufferHandle) -> TileLayout:
    """Plain rows, one after the other, of a tile of any shape and dtype.

    Raises:
        ArgumentTypeError, UnsupportedError: no shared tile, or one without memory of its own.
        TraceError: outside a kernel.
    """
    tile = _shared_tile("T.make_linear_layout", buffer)
    return TileLayout(SharedLayout(tile.extents, tile.dtype.bytes), tile.dtype)


def make_padded_layout(buffer: BufferHandle, pad: int) -> TileLayout:
    """Plain rows with a gap after each.

    Args:
        buffer: a tile from `T.alloc_shared` of any dtype, of two dimensions or more.
        pad: elements of the gap, 1 or more. With a multiple of 16 bytes `ldmatrix` and the widest
            `cp.async` can use the tile; bulk copies and multiplies by warpgroups never do.

    Raises:
        ArgumentTypeError, ArgumentError: another pad; no shared tile.
        UnsupportedError: a tile without memory of its own.
        ShapeError: a tile of one dimension.
        TraceError: outside a kernel.
    """
    what = "T.make_padded_layout"
    tile = _shared_tile(what, buffer)
    _row_bytes(what, tile)
    if not is_integer(pad):
        raise ArgumentTypeError(f"{what}: pad is {pad!r}, not an integer.")
    if pad < 1:
        raise ArgumentError(
            f"{what}: pad must be positive, got {pad}.",
            hint="It counts elements; T.make_linear_layout has none.",
        )
    pitch = tile.extents[-1] + int(pad)
    return TileLayout(SharedLayout(tile.extents, tile.dtype.bytes, pitch=pitch), tile.dtype)


def _swizzled(what: str, tile: Buffer, chunks: int) -> TileLayout:
    _check_rows(what, tile, CHUNK * chunks)
    return TileLayout(swizzled_layout(tile.extents, tile.dtype.bytes, chunks), tile.dtype)


def _row_bytes(what: str, tile: Buffer) -> int:
    if tile.rank < 2:
        raise ShapeError(
            f"{what}: `{tile.name}` has one dimension, so it has no rows to arrange.",
            related=[(tile.span, f"{tile.name} comes from here")],
            hint="T.make_linear_layout takes it.",
        )
    return tile.extents[-1] * tile.dtype.bytes


def _check_rows(what: str, tile: Buffer, panel_bytes: int) -> None:
    """Refuse rows that panels of so many bytes do not make up."""
    row_bytes = _row_bytes(what, tile)
    related = [(tile.span, f"{tile.name} comes from here")]
    if tile.extents[-2] % SWIZZLE_ROWS:
        raise ShapeError(
            f"{what}: `{tile.name}` has {tile.extents[-2]} rows, no multiple of {SWIZZLE_ROWS}.",
            related=related,
            hint=_ADVICE,
        )
    if row_bytes % panel_bytes:
        raise ShapeError(
            f"{what}: a row of `{tile.name}` has {row_bytes} bytes, no multiple of {panel_bytes}.",
            related=related,
            hint=_ADVICE,
        )


def _shared_tile(what: str, x: object) -> Buffer:
    """The buffer of a tile in shared memory whose layout can be chosen."""
    current_kernel(what)
    if isinstance(x, RegionHandle):
        raise ArgumentTypeError(
            f"{what}: `{x!r}` is a slice, and a layout is that of a whole tile.",
            hint=f"Pass `{x.buffer.name}`.",
        )
    if not isinstance(x, BufferHandle):
        raise ArgumentTypeError(
            f"{what}: {a_kind(x)} is no tile.", hint="Pass what T.alloc_shared returned."
        )
    buffer = x.buffer
    if buffer.scope is Scope.FRAGMENT:
        raise UnsupportedError(
            f"{what}: `{x.name}` is a fragment, and layouts of fragments are decided by the "
            "compiler: its instructions ask for them.",
            related=[(buffer.span, f"{x.name} comes from here")],
            hint="Tiles in shared memory can be given a layout.",
        )
    if buffer.scope is not Scope.SHARED:
        raise ArgumentTypeError(
            f"{what}: `{x.name}` is in {buffer.scope.words}, not a tile in shared memory.",
            related=[(buffer.span, f"{x.name} comes from here")],
            hint="Pass what T.alloc_shared returned.",
        )
    if buffer.is_view or buffer.strides is not None:
        has = "is a view of other memory" if buffer.is_view else "has strides of its own"
        raise UnsupportedError(
            f"{what}: `{x.name}` {has}, which is its layout.",
            related=[(buffer.span, f"{x.name} comes from here")],
            hint="Give a layout to a tile from T.alloc_shared(shape, dtype).",
        )
    return buffer


# -- the annotation ---------------------------------------------------------------------------


def annotate_layout(layouts: Mapping[BufferHandle, TileLayout]) -> None:
    """Tiles in shared memory lie as given, in the whole kernel, instead of as passes choose.

    Where an instruction cannot use a tile that lies so, the next one is taken and `explain()` says
    why; one that the kernel asks for by name (`T.wgmma_gemm`, `T.tma_copy`,
    `prefer_instruction="tma"`) is an error. What the kernel computes does not depend on layouts.

    Args:
        layouts: for tiles from `T.alloc_shared` what `T.make_*_layout` gives for them, such as
            `{a: T.make_swizzled_layout(a)}`. The slots that `T.Pipelined` makes of a tile lie each
            like the tile.

    Raises:
        ArgumentTypeError: no dictionary; a key that is no shared tile; a value that is no layout.
        UnsupportedError: a fragment, a view, a tile with strides; a function as a layout.
        ShapeError, DTypeError: a layout of another tile's shape or dtype.
        ArgumentError: a tile that has been given a layout before.
        TraceError: outside a kernel, in a loop, branch or `T.ws` body; a tile that was used before.
    """
    what = "T.annotate_layout"
    trace = current_kernel(what)
    if trace.frame is not trace.root:
        raise TraceError(
            f"{what} holds for the whole kernel and cannot stand in {trace.frame.place}.",
            related=[(trace.frame.span, "it starts here")],
            hint="Write it right after the T.alloc_shared, at the top of the kernel.",
        )
    if not isinstance(layouts, Mapping):
        raise ArgumentTypeError(
            f"{what} takes a dictionary, got {a_kind(layouts)}.",
            hint=f"Write `{what}({{a: T.make_swizzled_layout(a)}})`.",
        )
    given = dict(trace.given.layouts)
    for key, layout in layouts.items():
        buffer = _shared_tile(what, key)
        _check_layout(what, buffer, layout)
        if buffer in given:
            raise ArgumentError(
                f"{what}: `{buffer.name}` is given a layout twice.",
                related=[(given[buffer].span, "the first time")],
            )
        _check_unused(what, trace, buffer)
        given[buffer] = GivenLayout(layout.layout, caller_span())
    trace.given = dataclasses.replace(trace.given, layouts=given)


def _check_layout(what: str, buffer: Buffer, layout: Any) -> None:
    related = [(buffer.span, f"{buffer.name} comes from here")]
    if not isinstance(layout, TileLayout):
        is_function = callable(layout)
        kind: type[TileError] = UnsupportedError if is_function else ArgumentTypeError
        got = "a function" if is_function else a_kind(layout)
        raise kind(
            f"{what}: the layout of `{buffer.name}` is {got}, not one that T.make_*_layout gives.",
            hint=f"Write `{what}({{{buffer.name}: T.make_swizzled_layout({buffer.name})}})`.",
        )
    if layout.shape != buffer.extents:
        raise ShapeError(
            f"{what}: `{buffer.name}` is {_tile(buffer.extents, buffer.dtype)}, but its layout is "
            f"that of {_tile(layout.shape, layout.dtype)}.",
            related=related,
            hint=f"Make the layout from `{buffer.name}`.",
        )
    if layout.dtype is not buffer.dtype:
        raise DTypeError(
            f"{what}: `{buffer.name}` holds {buffer.dtype}, but its layout is that of a tile of "
            f"{layout.dtype}.",
            related=related,
            hint=f"Make the layout from `{buffer.name}`.",
        )


def _check_unused(what: str, trace: Trace, buffer: Buffer) -> None:
    """Refuse a tile of another kernel, and one that a node before the annotation uses."""
    trace.check_home(buffer, caller_span())
    for node in walk(tuple(trace.root.nodes)):
        if any(b.root is buffer for b in (*node.reads, *node.writes)):
            raise TraceError(
                f"{what}: `{buffer.name}` was used before it is given a layout.",
                related=[(node.span, "used here")],
                hint="Write the call right after the T.alloc_shared.",
            )


def check_views(trace: Trace, body: Body) -> None:
    """Refuse views of tiles that do not lie in plain rows.

    Raises:
        UnsupportedError: at the view.
    """
    for node in walk(body):
        for view in (*node.reads, *node.writes):
            given = trace.given.layouts.get(view.root) if view.is_view else None
            if given is None or given.layout == SharedLayout(
                given.layout.shape, given.layout.itemsize
            ):
                continue
            raise UnsupportedError(
                f"`{view.name}` is a view of `{view.root.name}`, and views see plain rows; it was "
                f"given another layout ({given.layout}).",
                span=view.span,
                related=[(given.span, "the layout is given here")],
                hint="Give it T.make_linear_layout, or a tile of its own in place of the view.",
            )


def _tile(shape: tuple[int, ...], dtype: DType) -> str:
    return f"{shape_text(shape)} {dtype}"
