"""Tile ops seen as elementwise loops: a copy or a fill is a T.Parallel over its region.

Knows how to write one as the other. Layout inference and lowering then need one mechanism for all.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.dtypes import bool_, int32
from tilejit.ir.buffer import Region, Scope
from tilejit.ir.expr import (
    Expr,
    Var,
    VarKind,
    arith,
    binary,
    cast,
    const,
    index,
    select,
    substitute,
)
from tilejit.ir.node import Atomic, Body, For, Load, LoopKind, Node, Parallel, Store
from tilejit.ops.copy import Copy, Fill


def as_parallel(node: Node) -> Parallel | None:
    """The T.Parallel loop that does what a Copy, Fill or Parallel node does; None for others, and
    for copies by which lanes trade what they hold."""
    if isinstance(node, Parallel):
        return node
    if isinstance(node, Fill):
        variables = loop_variables(node.dst.shape)
        store = Store(
            buffer=node.dst.buffer,
            index=place(node.dst, variables),
            value=node.value,
            span=node.span,
        )
        return Parallel(vars=variables, extents=node.dst.shape, body=(store,), span=node.span)
    if isinstance(node, Copy) and not node.is_trade:
        return _copy_loop(node)
    return None


def loop_variables(shape: tuple[int, ...]) -> tuple[Var, ...]:
    return tuple(
        Var("ijklmnpq"[d] if d < 8 else f"i{d}", int32, VarKind.PARALLEL, index(0), index(n - 1))
        for d, n in enumerate(shape)
    )


def place(region: Region, coordinates: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The buffer index of a region's element."""
    result = list(region.starts)
    for d, coordinate in zip(region.kept, coordinates, strict=True):
        result[d] = arith("add", region.starts[d], coordinate)
    return tuple(result)


def in_range(region: Region, coordinates: tuple[Expr, ...]) -> Expr:
    """Whether the element lies inside the region's buffer."""
    result: Expr = const(True, bool_)
    for i, extent in zip(place(region, coordinates), region.buffer.shape, strict=True):
        result = binary("and", result, arith("ge", i, 0))
        result = binary("and", result, arith("lt", i, extent))
    return result


def _copy_loop(node: Copy) -> Parallel:
    variables = loop_variables(node.src.shape)
    source, target = node.src.buffer, node.dst.buffer
    loaded = Var(source.name, source.dtype, VarKind.VALUE)
    load = Load(out=loaded, buffer=source, index=place(node.src, variables), span=node.span)
    value: Expr = loaded
    if node.pad is not None and source.scope is Scope.GLOBAL:
        value = select(in_range(node.src, variables), value, node.pad)
    at, value = place(node.dst, variables), cast(value, target.dtype)
    store: Node = Store(buffer=target, index=at, value=value, span=node.span)
    if node.combine is not None:
        store = Atomic(buffer=target, index=at, value=value, combine=node.combine, span=node.span)
    return Parallel(
        vars=variables,
        extents=node.src.shape,
        body=(load, store),
        coalesced_width=node.coalesced_width,
        span=node.span,
    )


def is_private(node: Copy | Fill) -> bool:
    """True when each thread moves all the elements itself: one side is its own memory."""
    return any(b.scope.is_per_thread for b in (*node.reads, *node.writes))


def as_loops(node: Copy | Fill) -> Body:
    """What a thread does to copy to or from its own memory: nested loops over all elements, the
    innermost vectorised."""
    loop = as_parallel(node)
    assert loop is not None
    body: Body = loop.body
    mapping = {
        v: Var(v.name, v.dtype, VarKind.LOOP, index(0), index(n - 1))
        for v, n in zip(loop.vars, loop.extents, strict=True)
    }
    body = tuple(_substitute(inner, dict(mapping)) for inner in body)
    for d, (v, extent) in enumerate(reversed(list(zip(loop.vars, loop.extents, strict=True)))):
        body = (
            For(
                var=mapping[v],
                start=index(0),
                stop=index(extent),
                kind=LoopKind.VECTORIZED if d == 0 else LoopKind.UNROLL,
                body=body,
                span=node.span,
            ),
        )
    return body


def _substitute(node: Node, mapping: dict[Var, Expr]) -> Node:
    if isinstance(node, Load):
        return replace(node, index=tuple(substitute(e, mapping) for e in node.index))
    assert isinstance(node, Store)
    return replace(
        node,
        index=tuple(substitute(e, mapping) for e in node.index),
        value=substitute(node.value, mapping),
    )
