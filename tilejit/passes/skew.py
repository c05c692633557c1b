"""Writes a loop whose rounds overlap as three: the part of the first iteration that runs ahead, the
rounds, and the rest of the last iteration.

Knows which iteration each part is of. Does not know how parts come to what they need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tilejit.errors import Span
from tilejit.ir.expr import Expr, Var, arith, cast, int_value
from tilejit.ir.node import Body, For, If, LoopKind, Node
from tilejit.passes.overlap import Overlap

# For nodes that run ahead and for the others, what variables become in them
Mapping = dict[bool, dict[Var, Expr]]


def skewed(
    loop: For, overlap: Overlap, opening: Callable[[Mapping], Body],
    steady: Callable[[Mapping], Body], closing: Callable[[Mapping], Body],
) -> list[Node]:  # fmt: skip
    """The loop's rounds, each with the next iteration's part that runs ahead and its own rest.

    opening, steady, closing: the nodes of those parts; one that is not there has no mapping.
    """
    dtype, span = loop.var.dtype, loop.span
    runs = arith("lt" if loop.step > 0 else "gt", loop.start, loop.stop)
    mine: dict[Var, Expr] = {v: again(v) for n in overlap.repeated for v in n.defines}
    following = cast(arith("add", loop.var, loop.step), dtype)
    last = cast(_last(loop), dtype)
    first = opening({True: {loop.var: cast(loop.start, dtype)}})
    body = steady({True: {loop.var: following}, False: mine})
    rest = closing({False: {loop.var: last, **mine}})
    stop = cast(arith("sub", loop.stop, loop.step), dtype)
    return [
        *_where(runs, (*overlap.before, *first), span),
        replace(loop, kind=LoopKind.SERIAL, num_stages=0, stop=stop, body=body),
        *_where(runs, rest, span),
    ]


def again(var: Var) -> Var:
    """Another variable of the same name and range."""
    return Var(var.name, var.dtype, var.kind, var.low, var.high)


def _last(loop: For) -> Expr:
    """The variable's value in the last iteration."""
    if abs(loop.step) == 1:
        return arith("sub", loop.stop, loop.step)
    span = arith("sub", arith("sub", loop.stop, loop.start), 1 if loop.step > 0 else -1)
    rounds = arith("floordiv", span, loop.step)
    return arith("add", loop.start, arith("mul", rounds, loop.step))


def _where(condition: Expr, body: Body, span: Span | None) -> list[Node]:
    known = int_value(condition)
    if known is not None:
        return list(body) if known else []
    return [If(condition=condition, then=body, span=span)]
