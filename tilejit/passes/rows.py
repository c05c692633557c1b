"""Which accumulators want whole rows in a warp: those that are reduced along rows, or become the
left operand of the next multiply, where a warp needs whole rows too.

Knows reductions, multiplies and what loops use together. Does not know how warps share a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr
from tilejit.ir.loops import accesses
from tilejit.ir.node import Body, For, Node, While, walk
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Reduce


def used_by_rows(body: Body) -> set[Buffer]:
    """Accumulators that want whole rows in a warp: where parts of a row are in several warps, each
    row's sum or maximum goes through shared memory, and so does an operand. Counted is what is done
    as often as the multiply: a reduction after a loop over K is not worth slower multiplies."""
    found: set[Buffer] = set()
    own = [n for n in _outside_loops(body) if isinstance(n, Gemm)]
    if own:
        by_rows = _by_rows(list(walk(body)))
        found = {n.acc.buffer for n in own} & by_rows
    for node in _outside_loops(body):
        if isinstance(node, For | While):
            for inner in node.bodies:
                found |= used_by_rows(inner)
    return found


def _outside_loops(body: Body) -> Iterator[Node]:
    """All nodes but those in loops."""
    for node in body:
        yield node
        if not isinstance(node, For | While):
            for inner in node.bodies:
                yield from _outside_loops(inner)


def _by_rows(nodes: list[Node]) -> set[Buffer]:
    """Fragments that are reduced along rows or take part in a chain of multiplies, and those that
    loops use with them element by element."""
    found: set[Buffer] = set()
    together: list[set[Buffer]] = []
    for node in nodes:
        if isinstance(node, Reduce) and node.axis == len(node.src.shape) - 1:
            found.add(node.src.buffer)
        elif isinstance(node, Gemm) and not node.transpose_a:
            if node.a.buffer.scope is Scope.FRAGMENT:
                found |= {node.a.buffer, node.acc.buffer}
        elif (loop := as_parallel(node)) is not None:
            used: dict[tuple[Expr, ...], set[Buffer]] = {}
            for _, buffer, at in accesses(loop):
                if buffer.scope is Scope.FRAGMENT:
                    used.setdefault(at, set()).add(buffer)
            together += (same for same in used.values() if len(same) > 1)
    while True:
        more = {b for same in together if same & found for b in same} - found
        if not more:
            return found
        found |= more
