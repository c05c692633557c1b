"""Atomic updates of elements and tiles in global and shared memory.

Knows the forms and their checks. Does not know instructions.
"""

from __future__ import annotations

from typing import Any

from tilejit.dtypes import (
    DType,
    bfloat16,
    float16,
    float32,
    float64,
    int32,
    int64,
    uint32,
    uint64,
)
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    UnsupportedError,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr, Var, VarKind, cast
from tilejit.ir.node import Atomic, Load, Node, Parallel
from tilejit.language.extents import shape_text
from tilejit.language.handle import BufferHandle, Element, RegionHandle, VarHandle
from tilejit.language.regions import Start, as_side, match, start_example
from tilejit.language.trace import Trace, current_kernel
from tilejit.language.value import Value, as_expr
from tilejit.language.where import tile_op
from tilejit.ops.copy import Copy
from tilejit.ops.elementwise import loop_variables, place

_INTEGERS: tuple[DType, ...] = (int32, uint32, int64, uint64)
_FLOATS: tuple[DType, ...] = (float16, bfloat16, float32, float64)
# From where to where a tile may be added without the threads
_MOVES = ((Scope.FRAGMENT, Scope.GLOBAL), (Scope.SHARED, Scope.GLOBAL))
_ALLOWED: dict[str, tuple[DType, ...]] = {
    "add": _INTEGERS + _FLOATS,
    "min": _INTEGERS + _FLOATS,
    "max": _INTEGERS + _FLOATS,
    "or": _INTEGERS,
}


def atomic_add(
    dst: Any,
    value: Any,
    memory_order: str | None = None,
    return_prev: bool = False,
    use_tma: bool | None = None,
    annotations: Any = None,
) -> Value | None:
    """`dst += value` in one step that no other thread can interrupt.

    Args:
        dst: an element `C[i, j]`, or, with a tile as `value`, a buffer, a slice or a start point:
            then each element of it is updated. Global or shared memory.
        value: a number or traced value, or a tile of the same extents; cast to dst's dtype.
        memory_order: None or "relaxed".
        return_prev: give back the old value (elements only).
        use_tma: True for the tensor memory accelerator, which then adds a tile to a global tensor
            or is refused with the reason; False for threads; None for what the kernel can do best.
        annotations: None.

    Raises:
        ArgumentError: dst lies in registers.
        DTypeError: no atomic operation on dst's dtype.
        ShapeError: tiles of different extents.
        UnsupportedError: another memory order, an old value of a tile, or the tensor memory
            accelerator is asked for and cannot add the tile.
        TraceError: outside a kernel; a tile inside T.Parallel.
    """
    what = "T.atomic_add"
    if use_tma not in (None, False, True):
        raise ArgumentTypeError(f"{what}: use_tma is {use_tma!r}, not True, False or None.")
    return _atomic("add", dst, value, memory_order, return_prev, annotations, use_tma)


def atomic_max(
    dst: Any,
    value: Any,
    memory_order: str | None = None,
    return_prev: bool = False,
    annotations: Any = None,
) -> Value | None:
    """`dst = max(dst, value)` in one step; arguments and errors as for `atomic_add`."""
    return _atomic("max", dst, value, memory_order, return_prev, annotations)


def atomic_min(
    dst: Any,
    value: Any,
    memory_order: str | None = None,
    return_prev: bool = False,
    annotations: Any = None,
) -> Value | None:
    """`dst = min(dst, value)` in one step; arguments and errors as for `atomic_add`."""
    return _atomic("min", dst, value, memory_order, return_prev, annotations)


def atomic_or(
    dst: Any, value: Any, memory_order: str | None = None, return_prev: bool = False
) -> Value | None:
    """`dst |= value` in one step, for integers; arguments and errors as for `atomic_add`."""
    return _atomic("or", dst, value, memory_order, return_prev, None)


def _atomic(
    combine: str,
    dst: Any,
    value: Any,
    memory_order: Any,
    return_prev: Any,
    annotations: Any,
    use_tma: bool | None = False,
) -> Value | None:
    what = f"T.atomic_{combine}"
    trace = current_kernel(what)
    if memory_order not in (None, "relaxed"):
        raise UnsupportedError(
            f"{what}: memory_order={memory_order!r} is not supported.",
            hint='Atomics are "relaxed"; order them with T.sync_threads or a barrier.',
        )
    if annotations is not None:
        raise UnsupportedError(f"{what}: annotations are not supported.", hint="Omit them.")
    side = as_side(dst, what, "the destination")
    buffer = side if isinstance(side, Buffer) else side.buffer
    _check(what, combine, buffer)
    is_tile = isinstance(value, BufferHandle | RegionHandle) and not isinstance(value, VarHandle)
    if use_tma and not (is_tile and buffer.scope is Scope.GLOBAL):
        raise UnsupportedError(
            f"{what}: use_tma=True adds tiles to global tensors only.", hint="Omit it."
        )
    if isinstance(side, Start) and not is_tile:
        expr = as_expr(value, buffer.dtype, f"value of {what}")
        return _element(trace, combine, side, cast(expr, buffer.dtype), bool(return_prev))
    if return_prev:
        raise UnsupportedError(
            f"{what}: return_prev=True needs one element, not a tile.",
            hint=f"Update `{start_example(buffer)}` in T.Parallel.",
        )
    tile_op(f"{what} on a tile")
    if is_tile or isinstance(value, Element):
        _tile(trace, combine, *match(what, as_side(value, what, "the value"), side), use_tma)
    else:
        _spread(trace, what, combine, side, as_expr(value, buffer.dtype, f"value of {what}"))
    return None


def _check(what: str, combine: str, buffer: Buffer) -> None:
    if buffer.scope not in (Scope.GLOBAL, Scope.SHARED):
        raise ArgumentError(
            f'{what}: `{buffer.name}` is in "{buffer.scope}", which no other thread can reach.',
            related=[(buffer.span, f"{buffer.name} comes from here")],
            hint="Atomics are for global and shared memory; write `x += v` instead.",
        )
    allowed = _ALLOWED[combine]
    if buffer.dtype not in allowed:
        raise DTypeError(
            f"{what}: `{buffer.name}` is {buffer.dtype}, which has no atomic {combine}.",
            hint="Dtypes: " + ", ".join(d.name for d in allowed) + ".",
        )


def _element(
    trace: Trace, combine: str, start: Start, value: Expr, return_prev: bool
) -> Value | None:
    buffer = start.buffer
    old: Var | None = None
    if return_prev:
        old = Var(trace.unique_name(f"{buffer.name}_old"), buffer.dtype, VarKind.VALUE)
    node = Atomic(
        buffer=buffer, index=start.index, value=value, combine=combine, out=old, span=caller_span()
    )
    trace.add(node)
    return None if old is None else Value(old)


def _tile(
    trace: Trace, combine: str, value: Region, dst: Region, use_tma: bool | None = False
) -> None:
    """An element's update for each element of a tile, in T.Parallel; or a copy that adds, where
    the accelerator may do it."""
    if value.shape != dst.shape:
        raise UnsupportedError(
            f"T.atomic_{combine}: `{value.buffer.name}` would have to repeat.",
            hint="Write the loop with T.Parallel.",
        )
    may_move = (value.buffer.scope, dst.buffer.scope) in _MOVES
    if use_tma and not may_move:
        raise UnsupportedError(
            f"T.atomic_{combine}: use_tma=True adds tiles of fragments and of shared memory only.",
            related=[(value.buffer.span, f"{value.buffer.name} comes from here")],
            hint="Omit it.",
        )
    if may_move and use_tma is not False:
        prefer = "tma" if use_tma else None
        trace.add(Copy(src=value, dst=dst, combine=combine, prefer=prefer, span=caller_span()))
        return
    variables = loop_variables(dst.shape)
    name = trace.unique_name(f"{value.buffer.name}_at")
    loaded = Var(name, value.buffer.dtype, VarKind.VALUE)
    load = Load(out=loaded, buffer=value.buffer, index=place(value, variables), span=caller_span())
    _loop(trace, combine, dst, variables, (load,), cast(loaded, dst.buffer.dtype))


def _spread(trace: Trace, what: str, combine: str, side: Region | Start | Buffer, x: Expr) -> None:
    """The same value for each element of a tile."""
    if isinstance(side, Buffer):
        raise ShapeError(
            f"{what}: `{side.name}` is {shape_text(side.shape)}, known only at run time.",
            hint=f"Update `{start_example(side)}` in T.Parallel.",
        )
    assert isinstance(side, Region), f"{what}: {side}"
    _loop(trace, combine, side, loop_variables(side.shape), (), cast(x, side.buffer.dtype))


def _loop(
    trace: Trace,
    combine: str,
    dst: Region,
    variables: tuple[Var, ...],
    before: tuple[Node, ...],
    value: Expr,
) -> None:
    span = caller_span()
    index = place(dst, variables)
    update = Atomic(buffer=dst.buffer, index=index, value=value, combine=combine, span=span)
    body = (*before, update)
    trace.add(Parallel(vars=variables, extents=dst.shape, body=body, span=span))
