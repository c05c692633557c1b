"""`T.copy`, `T.fill`, `T.clear`: moving and setting tiles.

Knows the arguments and their checks. Does not know how a tile is moved: a pass decides that.
"""

from __future__ import annotations

from typing import Any

from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    ShapeError,
    UnsupportedError,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Region
from tilejit.ir.expr import Var, VarKind, cast
from tilejit.ir.node import Load, Parallel, Store
from tilejit.language.extents import is_integer, shape_text
from tilejit.language.regions import (
    Start,
    as_side,
    broadcast_index,
    match,
    may_repeat,
    one_element,
    start_example,
)
from tilejit.language.trace import Trace
from tilejit.language.value import as_expr
from tilejit.language.where import tile_op
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.elementwise import loop_variables, place

_INSTRUCTIONS = ("tma", "cp_async", "sync")
_EVICTIONS = ("evict_normal", "evict_first", "evict_last")


def copy(
    src: Any,
    dst: Any,
    *,
    coalesced_width: int | None = None,
    disable_tma: bool = False,
    eviction_policy: str | None = None,
    prefer_instruction: str | None = None,
    annotations: Any = None,
    loop_layout: Any = None,
) -> None:
    """Copy a tile, element by element, cast to the destination's dtype.

    Args:
        src, dst: a buffer, a slice, or a start point such as `A[i, j]`, which takes its extents
            from the other side. Any pair of global, shared, fragment and local memory. Outside a
            global tensor a source reads as 0 and a destination is not written.
        coalesced_width: elements a thread moves at once.
        disable_tma: the tensor memory accelerator does not make the copy.
        eviction_policy: "evict_first", "evict_last" or "evict_normal": how long the L2 cache keeps
            what the tensor memory accelerator moves; other instructions do not take it, and
            `explain()` then says so.
        prefer_instruction: "tma", which then makes the copy or is refused with the reason;
            "cp_async" or "sync" (through registers), where they can.
        annotations, loop_layout: None.

    Raises:
        ShapeError: the extents differ, or nothing says them.
        ArgumentError, ArgumentTypeError: anything else about an argument.
        UnsupportedError: the tensor memory accelerator is asked for and cannot make the copy.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    trace = tile_op("T.copy")
    _refuse_given("T.copy", annotations=annotations, loop_layout=loop_layout)
    prefer = _preference(prefer_instruction, disable_tma)
    eviction = check_eviction("T.copy", eviction_policy)
    source, target = as_side(src, "T.copy", "the source"), as_side(dst, "T.copy", "the destination")
    a, b = match("T.copy", source, target)
    if a.shape != b.shape or may_repeat(a):
        if prefer == "tma":
            raise UnsupportedError(
                'T.copy: prefer_instruction="tma" is not possible: '
                f"extents of 1 of `{a.buffer.name}` repeat.",
                hint="Leave prefer_instruction out.",
            )
        _broadcast_copy(trace, a, b, b.shape)
        return
    width = _width(coalesced_width, a)
    trace.add(
        Copy(
            src=a,
            dst=b,
            coalesced_width=width,
            prefer=prefer,
            eviction=eviction,
            span=caller_span(),
        )
    )


def _refuse_given(what: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedError(f"{what}: {name}={value!r} is not supported.", hint="Omit it.")


def _preference(prefer: str | None, disable_tma: bool) -> str | None:
    """The instruction that is asked for, or "no_tma"."""
    if not isinstance(disable_tma, bool):
        raise ArgumentTypeError(f"T.copy: disable_tma is {disable_tma!r}, not True or False.")
    if prefer is not None and prefer not in _INSTRUCTIONS:
        raise ArgumentError(
            f"T.copy: prefer_instruction is {prefer!r}.",
            hint='It is "tma", "cp_async" or "sync".',
        )
    if prefer == "tma" and disable_tma:
        raise ArgumentError('T.copy: prefer_instruction="tma" and disable_tma=True contradict.')
    return "no_tma" if disable_tma and prefer is None else prefer


def check_eviction(what: str, policy: str | None) -> str | None:
    """The name of a policy of the L2 cache, checked; None for the usual one."""
    if policy is None or policy == "evict_normal":
        return None
    if policy not in _EVICTIONS:
        raise ArgumentError(
            f"{what}: eviction_policy is {policy!r}.",
            hint="It is " + ", ".join(f'"{name}"' for name in _EVICTIONS) + ".",
        )
    return policy


def _width(coalesced_width: Any, region: Region) -> int | None:
    if coalesced_width is None:
        return None
    if not is_integer(coalesced_width) or coalesced_width < 1:
        raise ArgumentError(
            f"T.copy: coalesced_width is {coalesced_width!r}; it counts elements, 1 or more."
        )
    last = region.shape[-1] if region.shape else 1
    if last % int(coalesced_width):
        raise ArgumentError(
            f"T.copy: coalesced_width is {coalesced_width}, "
            f"which does not divide the last extent {last}."
        )
    return int(coalesced_width)


def _broadcast_copy(trace: Trace, src: Region, dst: Region, shape: tuple[int, ...]) -> None:
    """A copy from a buffer whose extents of 1 repeat, as the loop that it is."""
    variables = loop_variables(shape)
    index = broadcast_index(src, variables, shape)
    assert index is not None, f"{src} does not broadcast to {shape}"
    span = caller_span()
    loaded = Var(trace.unique_name(src.buffer.name), src.buffer.dtype, VarKind.VALUE)
    load = Load(out=loaded, buffer=src.buffer, index=index, span=span)
    value = cast(loaded, dst.buffer.dtype)
    store = Store(buffer=dst.buffer, index=place(dst, variables), value=value, span=span)
    trace.add(Parallel(vars=variables, extents=shape, body=(load, store), span=span))


def fill(buf: Any, value: Any) -> None:
    """Set every element of a buffer, a slice or one element.

    Args:
        buf: a buffer with constant extents, a slice, or `A[i, j]` for one element.
        value: a number that the dtype can hold, or a traced value, which is cast.

    Raises:
        ShapeError: the buffer's extents are known only at run time.
        ArgumentError: the number does not fit the dtype.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    _fill("T.fill", buf, value)


def clear(buf: Any) -> None:
    """Set every element to 0: `T.fill(buf, 0)`."""
    _fill("T.clear", buf, 0)


def _fill(what: str, buf: Any, value: Any) -> None:
    trace = tile_op(what)
    side = as_side(buf, what, "the buffer")
    if isinstance(side, Buffer):
        raise ShapeError(
            f"{what}: `{side.name}` is {shape_text(side.shape)}, known only at run time.",
            hint=f"Fill a slice of constant extents, or store to `{start_example(side)}` in "
            "T.Parallel.",
        )
    region = one_element(side) if isinstance(side, Start) else side
    buffer = region.buffer
    if isinstance(value, bool | int | float):
        value = buffer.dtype.constant(value)  # checks the range
    expr = cast(as_expr(value, buffer.dtype, f"{what}: the value"), buffer.dtype)
    trace.add(Fill(dst=region, value=expr, span=caller_span()))
