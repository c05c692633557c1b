"""Which rounds of a loop use elements of their own, and never those of another round.

Knows indexes of accesses. Does not know threads, barriers or what bulk copies do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from tilejit.dtypes import int32
from tilejit.ir.analysis import told_apart
from tilejit.ir.buffer import Buffer
from tilejit.ir.divergence import Divergence
from tilejit.ir.expr import Expr, Var, VarKind, arith, int_value, substitute, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.loops import accesses
from tilejit.ir.node import Atomic, Body, For, If, Load, Node, Store, While, walk
from tilejit.ops.copy import Copy
from tilejit.ops.elementwise import as_parallel

# Stand for the variables of any T.Parallel loop, by position.
PLACES = tuple(Var(f"place{d}", int32, VarKind.PARALLEL) for d in range(16))

_MANY = 1 << 40  # values of a variable that takes nobody knows how many

# A buffer, and the place in it that is accessed; None: anywhere.
_Access = tuple[Buffer, tuple[Expr, ...] | None]


def distinct(buffer: Buffer, at: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Expressions that differ wherever two indexes mean different elements of memory, and are
    equal where they mean the same."""
    strides = [int_value(s) for s in buffer.strides or ()]
    if strides and None not in strides:
        parts = [arith("mul", e, s) for e, s in zip(at, buffer.strides or (), strict=True)]
        return (functools.reduce(lambda a, b: arith("add", a, b), parts),)
    repeats = [buffer.broadcasts and int_value(n) == 1 for n in buffer.shape]
    return tuple(e for e, is_repeated in zip(at, repeats, strict=True) if not is_repeated)


def apart_by_rounds(
    loop: For,
    kernel: Kernel,
    differing: Divergence,
    standing_for: Callable[[Buffer], Buffer],
) -> frozenset[Buffer]:
    """The buffers of which no round of the loop touches an element that another round touches.

    differing: what differs between threads, all of which go through the loop.
    standing_for: the buffer that stands for all that may share a buffer's memory; such are given.
    """
    extents: dict[Var, int] = {}
    for var, count in zip(kernel.thread_vars, kernel.threads, strict=False):
        extents[var] = count
    found: dict[Buffer, list[_Access]] = {}
    for buffer, at in _accesses(loop.body, extents):
        found.setdefault(standing_for(buffer), []).append((buffer, at))
    number = Var("round", int32, VarKind.LOOP)
    extents[number] = _MANY
    mapping: dict[Var, Expr] = {loop.var: arith("mul", number, loop.step)}
    unsure = {v for n in walk(loop.body) for v in n.defines} | differing.vars  # not the same
    unsure -= set(extents)

    def is_apart(all_accesses: Sequence[_Access]) -> bool:
        common: set[tuple[int, Expr]] | None = None
        for buffer, at in all_accesses:
            if at is None or buffer is not all_accesses[0][0]:
                return False
            here = (substitute(e, mapping) for e in distinct(buffer, at))
            mine = {(d, e) for d, e in enumerate(here) if not variables(e) & unsure}
            common = mine if common is None else common & mine
        return number in told_apart([e for _, e in common or ()], extents)

    return frozenset(b for b, mine in found.items() if is_apart(mine))


def _accesses(body: Body, extents: dict[Var, int]) -> Iterator[_Access]:
    """All accesses, with loops' variables by position; to extents is added how many values each
    variable takes."""
    for node in body:
        is_bulk = isinstance(node, Copy) and (node.is_tma or node.is_async)
        loop = None if is_bulk else as_parallel(node)
        if loop is not None:
            places = dict(zip(loop.vars, PLACES, strict=False))
            for var, count in zip(loop.vars, loop.extents, strict=True):
                place = places[var]
                extents[place] = max(extents.get(place, 0), count)
            for _, buffer, at in accesses(loop):
                yield buffer, tuple(substitute(e, dict(places)) for e in at)
        elif isinstance(node, Load | Store | Atomic):
            yield node.buffer, node.index
        elif isinstance(node, For | If | While):
            if isinstance(node, For):
                extents[node.var] = _reach(node)
            for inner in node.bodies:
                yield from _accesses(inner, extents)
        else:
            yield from _anywhere(node)


def _anywhere(node: Node) -> Iterator[_Access]:
    for inner in walk((node,)):
        for buffer in (*inner.reads, *inner.writes):
            yield buffer, None


def _reach(loop: For) -> int:
    """How many values in a row the loop's variable takes at most, each time that it runs."""
    start, stop = int_value(loop.start), int_value(loop.stop)
    return _MANY if start is None or stop is None else abs(stop - start)
