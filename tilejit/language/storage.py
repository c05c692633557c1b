"""Makes the buffer that a proxy call or an `alloc_*` asks for: an allocation, a view or a tensor.

Knows what `data`, `strides`, `elem_offset`, `align` and their kin promise and what of it can be
checked while tracing. Does not know how memory is laid out on the chip.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tilejit.dtypes import DType
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    OutOfRangeError,
    ShapeError,
    UnsupportedError,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, arith, index, int_value, show
from tilejit.language.extents import (
    ZERO,
    as_element_type,
    as_shape,
    as_strides,
    as_tile_shape,
    compact_strides,
    count,
    shape_text,
    span_elements,
)
from tilejit.language.handle import BufferHandle, RegionHandle, VarHandle
from tilejit.language.trace import assigned_name
from tilejit.language.value import Scalar, as_index

# A tensor argument's address is promised to be a multiple of this (the widest vector access).
TENSOR_ALIGN_BYTES = 16
# Dynamic shared memory starts at a multiple of this.
SHARED_ALIGN_BYTES = 1024
_ALIGN_LIMIT = {Scope.SHARED: SHARED_ALIGN_BYTES}
_BUFFER_TYPES = ("", "default", "auto_broadcast")


@dataclass(frozen=True, slots=True)
class Request:
    """What a proxy call asks for, as the user gave it; `what` names the call in messages."""

    what: str
    shape: Any
    dtype: Any
    scope: Scope
    strides: Any = None
    data: Any = None
    elem_offset: Any = None
    align: Any = None
    offset_factor: Any = None
    buffer_type: Any = ""
    axis_separators: Any = None


def make_spec(request: Request) -> BufferHandle:
    """A buffer without memory: an annotation of a parameter, or an argument of `compile`."""
    shape = as_shape(request.shape, request.what)
    buffer = _buffer(request, shape, "tensor")
    if request.scope is Scope.GLOBAL and buffer.offset is not ZERO:
        raise ArgumentError(
            f"{request.what}: elem_offset counts elements from `data`, and none is given.",
            hint="An argument begins at its first element: pass the slice that you mean.",
        )
    return BufferHandle(buffer)


def make_global(request: Request) -> BufferHandle:
    """A global buffer on an address: a pointer parameter, a 64-bit integer, or a tensor's own."""
    shape = as_shape(request.shape, request.what)
    buffer = _buffer(request, shape, "tensor")
    source = request.data
    if isinstance(source, BufferHandle) and not isinstance(source, VarHandle):
        return BufferHandle(_global_view(request.what, buffer, source.buffer))
    # Nobody checks what an address is a multiple of, so no more than an element is assumed.
    align = buffer.align if request.align else buffer.dtype.bytes
    return BufferHandle(_with(buffer, data=as_address(source, request.what), align=align))


def make_tile(request: Request) -> BufferHandle:
    """An allocation in the block's memory, or with `data` a view of one."""
    shape = as_tile_shape(request.shape, request.what)
    default = {Scope.SHARED: "shared", Scope.FRAGMENT: "fragment"}.get(request.scope, "local")
    buffer = _buffer(request, shape, default)
    if buffer.scope is Scope.FRAGMENT and buffer.strides is not None:
        raise UnsupportedError(
            f"{request.what}: a fragment is spread over the threads and has no strides.",
            hint="Leave `strides` out, or use T.SharedBuffer.",
        )
    if request.data is None:
        return BufferHandle(_allocation(request.what, buffer))
    return BufferHandle(_tile_view(request.what, buffer, request.data))


def as_address(source: Any, what: str) -> Expr:
    """The address that a pointer parameter or a 64-bit integer value holds."""
    if isinstance(source, BufferHandle | RegionHandle) and not isinstance(source, VarHandle):
        raise ArgumentTypeError(
            f"{what}: the pointer is a buffer; an address is an int64.",
            hint="Pass the buffer as `data=` to make a view of it.",
        )
    if isinstance(source, Scalar):
        expr = source.scalar()
        if expr.dtype.is_integer and expr.dtype.bits == 64:
            return expr
        raise ArgumentTypeError(
            f"{what}: the pointer is a value of dtype {expr.dtype}; an address is an int64.",
            hint="Load it from a table of dtype T.ptr, or annotate the parameter with T.ptr.",
        )
    if getattr(source, "is_pointer_type", False):
        raise ArgumentTypeError(
            f"{what}: T.ptr is an annotation of a parameter, not an address.",
            hint="Write `def kernel(p: T.ptr, ...)` and pass `p`.",
        )
    raise ArgumentTypeError(
        f"{what}: the pointer is {source!r}, not a pointer parameter or a 64-bit integer value."
    )


def _buffer(request: Request, shape: tuple[Expr, ...], default_name: str) -> Buffer:
    """All but where the memory is."""
    what, scope = request.what, request.scope
    dtype = as_element_type(request.dtype, what)
    _check_separators(request.axis_separators, what)
    span = caller_span()
    return Buffer(
        name=assigned_name(span, default_name),
        shape=shape,
        dtype=dtype,
        scope=scope,
        strides=_strides(request.strides, shape, scope, what),
        offset=_offset(request.elem_offset, request.offset_factor, what),
        align=_align(request.align, dtype, scope, what),
        broadcasts=_broadcasts(request.buffer_type, what),
        span=span,
    )


def _with(buffer: Buffer, **changes: Any) -> Buffer:
    return dataclasses.replace(buffer, **changes)


def _strides(
    strides: Any, shape: tuple[Expr, ...], scope: Scope, what: str
) -> tuple[Expr, ...] | None:
    if strides is None or (isinstance(strides, tuple | list) and not strides and shape):
        return None  # TVM writes compact strides as an empty list
    steps = as_strides(strides, shape, what)
    values = tuple(int_value(s) for s in steps)
    for d, value in enumerate(values):
        if value is None and scope is not Scope.GLOBAL:
            raise ShapeError(f"{what}: stride {d} is `{show(steps[d])}`, known only at run time.")
        if value is not None and value < 0:
            raise ShapeError(f"{what}: stride {d} is {value}; it must not be negative.")
    return None if values == compact_strides(shape) else steps


def _offset(elem_offset: Any, offset_factor: Any, what: str) -> Expr:
    factor = _whole(offset_factor, 0, "offset_factor", what)
    if elem_offset is None:
        return ZERO
    if isinstance(elem_offset, Scalar):
        offset = as_index(elem_offset, "elem_offset")
    else:
        offset = index(_whole(elem_offset, 0, "elem_offset", what))
    value = int_value(offset)
    if factor <= 1:
        return offset
    if value is None:  # says so in a form that the divisibility analysis reads
        return arith("mul", arith("floordiv", offset, factor), factor)
    if value % factor:
        raise ArgumentError(
            f"{what}: elem_offset is {value}, not a multiple of offset_factor {factor}."
        )
    return offset


def _whole(x: Any, default: int, name: str, what: str) -> int:
    """A Python integer of at least 0; None is the default."""
    if x is None:
        return default
    if isinstance(x, bool) or not hasattr(x, "__index__") or isinstance(x, Scalar):
        raise ArgumentTypeError(f"{what}: {name} is {x!r}, not an integer.")
    if (value := int(x)) < 0:
        raise ArgumentError(f"{what}: {name} is {value}; it must not be negative.")
    return value


def _align(align: Any, dtype: DType, scope: Scope, what: str) -> int:
    value = _whole(align, 0, "align", what)
    if value == 0:
        return TENSOR_ALIGN_BYTES if scope is Scope.GLOBAL else 0
    if value & (value - 1):
        raise ArgumentError(f"{what}: align is {value} bytes, not a power of two.")
    if value < dtype.bytes:
        raise ArgumentError(
            f"{what}: align is {value} bytes, less than one {dtype} element ({dtype.bytes} bytes)."
        )
    limit = _ALIGN_LIMIT.get(scope)
    if limit is not None and value > limit:
        raise ArgumentError(
            f"{what}: align is {value} bytes; shared memory itself starts at a multiple of {limit}."
        )
    return value


def _broadcasts(buffer_type: Any, what: str) -> bool:
    if buffer_type not in _BUFFER_TYPES:
        raise ArgumentError(
            f"{what}: buffer_type is {buffer_type!r}.",
            hint='It is "" or "auto_broadcast" (extents of 1 repeat).',
        )
    return bool(buffer_type == "auto_broadcast")


def _check_separators(axis_separators: Any, what: str) -> None:
    if axis_separators is not None and list(axis_separators):
        raise UnsupportedError(
            f"{what}: axis_separators is {axis_separators!r}, but a GPU's memory is flat.",
            hint="Leave it out.",
        )


def _allocation(what: str, buffer: Buffer) -> Buffer:
    """The buffer itself, or a view into an allocation with room for its offset."""
    offset = int_value(buffer.offset)
    if offset == 0:
        return buffer
    if offset is None:
        raise ShapeError(
            f"{what}: elem_offset is `{show(buffer.offset)}`, known only at run time.",
            hint="An allocation needs a constant; a view (`data=`) takes any offset.",
        )
    span = span_elements(buffer.shape, buffer.strides)
    assert span is not None, f"{buffer} has runtime extents"
    shape = as_shape(offset + span, what)
    root = _with(buffer, name=f"{buffer.name}_base", shape=shape, strides=None, offset=ZERO)
    return _with(buffer, data=root, align=0)


def _tile_view(what: str, buffer: Buffer, source: Any) -> Buffer:
    if not isinstance(source, BufferHandle):
        raise ArgumentTypeError(
            f"{what}: data is {source!r}; a view needs another buffer.",
            hint="Pass the handle that an alloc function or proxy returned.",
        )
    parent = source.buffer
    if parent.scope is not buffer.scope:
        raise ArgumentError(
            f'{what}: the view is in "{buffer.scope}", but `{parent.name}` is in "{parent.scope}".'
        )
    offset = _rescaled(what, buffer, parent)
    _check_room(what, buffer, parent)
    if buffer.scope is Scope.FRAGMENT:
        return _fragment_alias(what, buffer, parent)
    return _with(buffer, data=parent.root, offset=offset)


def _fragment_alias(what: str, buffer: Buffer, parent: Buffer) -> Buffer:
    """The parent itself: registers of other threads cannot be seen under another shape."""
    if buffer.shape == parent.shape and buffer.dtype is parent.dtype:
        return parent
    raise UnsupportedError(
        f"{what}: `{parent.name}` is a {shape_text(parent.shape)} {parent.dtype} fragment; its "
        f"registers cannot be seen as {shape_text(buffer.shape)} {buffer.dtype}.",
        related=[(parent.span, f"{parent.name} comes from here")],
        hint="Copy it to shared memory with T.copy and view that.",
    )


def _rescaled(what: str, buffer: Buffer, parent: Buffer) -> Expr:
    """The view's offset from its parent's root, in the view's elements."""
    base = parent.offset if parent.is_view or parent.scope is Scope.GLOBAL else ZERO
    if parent.dtype.bytes != buffer.dtype.bytes:
        ratio, rest = divmod(parent.dtype.bytes, buffer.dtype.bytes)
        value = int_value(base)
        if value is not None:
            whole, rest = divmod(value * parent.dtype.bytes, buffer.dtype.bytes)
            base = index(whole)
        elif not rest:
            base = arith("mul", base, ratio)
        if rest:
            raise ArgumentError(
                f"{what}: `{parent.name}` starts inside an element of {buffer.dtype}.",
                hint="View the buffer that it is a view of.",
            )
    return arith("add", base, buffer.offset)


def _check_room(what: str, buffer: Buffer, parent: Buffer) -> None:
    """Refuse a view that provably ends behind its parent."""
    offset, span = int_value(buffer.offset), span_elements(buffer.shape, buffer.strides)
    room = span_elements(parent.shape, parent.strides)
    if span is None or room is None:
        return
    end = ((offset or 0) + span) * buffer.dtype.bytes
    if end > room * parent.dtype.bytes:
        raise OutOfRangeError(
            f"{what}: the view ends at byte {end}, but `{parent.name}` has "
            f"{count(room * parent.dtype.bytes, 'byte')}.",
            notes=[
                f"The view is {shape_text(buffer.shape)} {buffer.dtype}, "
                f"`{parent.name}` is {shape_text(parent.shape)} {parent.dtype}."
            ],
            related=[(parent.span, f"{parent.name} comes from here")],
            hint="Make the view smaller, or allocate more.",
        )


def _global_view(what: str, buffer: Buffer, parent: Buffer) -> Buffer:
    """A tensor on the memory of another tensor: same address, offset counted from its start."""
    if parent.scope is not Scope.GLOBAL:
        raise ArgumentError(
            f'{what}: the view is in "global", but `{parent.name}` is in "{parent.scope}".',
            hint="T.SharedBuffer, T.FragmentBuffer and T.LocalBuffer make views of tiles.",
        )
    offset = _rescaled(what, buffer, parent)
    _check_room(what, buffer, parent)
    return _with(buffer, data=parent.data, offset=offset, align=parent.align)
