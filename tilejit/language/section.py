"""A section of a tensor: consecutive elements of one dimension, known only to the kernel.

Knows what its bounds mean and which view it is. Does not know how accesses are guarded or copied.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tilejit.dtypes import int32
from tilejit.errors import ArgumentError, ArgumentTypeError, caller_span
from tilejit.ir.buffer import Buffer, Scope, Section
from tilejit.ir.expr import Expr, Var, VarKind, arith, cast, int_value
from tilejit.ir.node import Let
from tilejit.language.extents import count, is_integer
from tilejit.language.handle import BufferHandle, VarHandle
from tilejit.language.trace import Trace, assigned_name
from tilejit.language.value import as_index
from tilejit.language.where import tile_op


def section(tensor: Any, start: Any, stop: Any, dim: int = 0) -> BufferHandle:
    """The elements `start` to below `stop` of one dimension of a tensor, as a tensor of their own.

    What lies outside is out of range, as it is for any tensor: it reads as 0 and is not written,
    whatever else the tensor has there. So each sequence of a packed batch is a tensor, though only
    the kernel knows where it begins: `T.section(K, starts[z], starts[z + 1])`. On chips with a
    tensor memory accelerator, tiles of it are copied in bulk like those of whole tensors.

    Args:
        tensor: a tensor in global memory: an argument, or one that `T.empty` made.
        start, stop: integers, of which some may be loaded; those outside of the tensor are taken
            to its ends. A section that stops before it starts has no elements.
        dim: the dimension, from 0 on; the others stay whole.

    Returns:
        The section; its extent along `dim` is a value of the kernel, all else is the tensor's.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
        ArgumentTypeError: no tensor in global memory, `dim` no integer, or bounds that are none.
        ArgumentError: no such dimension, a tensor that broadcasts, or a section of a section.
    """
    what = "T.section"
    trace = tile_op(what)
    whole = _tensor(tensor, what)
    if not is_integer(dim):
        raise ArgumentTypeError(f"{what}: dim is {dim!r}, not an integer.")
    if not 0 <= dim < whole.rank:
        raise ArgumentError(
            f"{what}: dim is {dim}, but `{whole.name}` has {count(whole.rank, 'dimension')}.",
            related=[(whole.span, f"{whole.name} comes from here")],
        )
    span = caller_span()
    name = assigned_name(span, f"{whole.name}_section")
    extent = whole.shape[dim]
    first, last = (
        arith("max", arith("min", as_index(e, f"{what}: {side}"), extent), 0)
        for e, side in ((start, "start"), (stop, "stop"))
    )
    begin = _named(trace, f"{name}_start", first, extent)
    rows = _named(trace, f"{name}_extent", arith("max", arith("sub", last, begin), 0), extent)
    stride = whole.element_strides[dim]
    shape = (*whole.shape[:dim], rows, *whole.shape[dim + 1 :])
    return BufferHandle(
        dataclasses.replace(
            whole,
            name=name,
            shape=shape,
            strides=whole.element_strides,
            offset=arith("add", whole.offset, arith("mul", begin, stride)),
            section=Section(tensor=whole, dim=dim, first=begin),
            span=span,
        )
    )


def _tensor(tensor: Any, what: str) -> Buffer:
    is_tensor = isinstance(tensor, BufferHandle) and not isinstance(tensor, VarHandle)
    if not is_tensor or tensor.buffer.scope is not Scope.GLOBAL:
        raise ArgumentTypeError(
            f"{what}: the tensor is {tensor!r}, not one in global memory.",
            hint="Of tiles on the chip, write the slice: `tile[8:16, :]`.",
        )
    buffer: Buffer = tensor.buffer
    if buffer.broadcasts:
        raise ArgumentError(f"{what}: `{buffer.name}` broadcasts, so it has no sections.")
    if buffer.section is not None:
        raise ArgumentError(
            f"{what}: `{buffer.name}` is a section itself.",
            related=[(buffer.span, f"{buffer.name} comes from here")],
            hint=f"Take it of `{buffer.section.tensor.name}`, with both bounds.",
        )
    return buffer


def _named(trace: Trace, name: str, value: Expr, extent: Expr) -> Expr:
    """A variable for a value from 0 to the extent, unless it is a constant."""
    if int_value(value) is not None:
        return value
    span = caller_span()
    var: Var = trace.new_var(name, int32, VarKind.VALUE, (0, extent), span)
    trace.add(Let(var=var, value=cast(value, int32), span=span))
    return var
