"""Which copies fill a tile piece by piece, such as pages of a cache that are found through a table.

Knows where pieces and the tile's uses stand, and which elements a piece is. Does not know who
copies, or how.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, Var, const, int_value, substitute
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, If, Let, Load, Node, all_reads, walk
from tilejit.ops.copy import Copy

MOST_PIECES = 1024  # more are not worth a barrier for all


def misplaced(kernel: Kernel, target: Buffer, copies: Sequence[Copy]) -> str:
    """Why copies do not fill a tile together, each its own piece, before anything uses it; "" when
    they do. Between the tile's uses and them stand loops of constant bounds at most."""
    nodes = list(walk(kernel.body))
    if any(b.root is target for n in nodes if n not in copies for b in n.writes):
        return f"{target.name} is written elsewhere too"
    readers = [n for n in nodes if any(b.root is target for b in n.reads)]
    body = _around(kernel.body, [*copies, *readers])
    places = [_place(body, n) for n in copies]
    if any(_place(body, n) <= max(places) for n in readers) or not readers:
        return f"{target.name} is not used after all copies that fill it"
    paths = [_path((body[place],), copy) for copy, place in zip(copies, places, strict=True)]
    filled = _times_filled(target, copies, paths)
    if filled is None:
        return f"which part of {target.name} it fills is known at run time only"
    if (filled != 1).any():
        return f"the copies that fill parts of {target.name} do not fill each element once"
    return ""


def fill_once(target: Buffer, copies: Sequence[Copy]) -> bool:
    """Whether copies of one body fill each element of a tile once."""
    if len(copies) == 1 and copies[0].dst.is_whole:
        return True
    filled = _times_filled(target, copies, [()] * len(copies))
    return filled is not None and bool((filled == 1).all())


def _times_filled(
    target: Buffer, copies: Sequence[Copy], paths: Sequence[Sequence[Node]]
) -> np.ndarray[Any, Any] | None:
    """How often each element of a tile is filled, given what stands around each copy."""
    filled = np.zeros(target.extents, np.int32)
    for copy, path in zip(copies, paths, strict=True):
        regions = _regions(copy, path)
        if regions is None:
            return None
        for region in regions:
            filled[region] += 1
    return filled


def _contains(node: Node, other: Node) -> bool:
    return any(n is other for n in walk((node,)))


def _place(body: Body, node: Node) -> int:
    return next(k for k, n in enumerate(body) if _contains(n, node))


def _around(body: Body, nodes: Sequence[Node]) -> Body:
    """The innermost body that has all of the nodes."""
    for inner in (b for node in body for b in node.bodies):
        if all(any(m is n for m in walk(inner)) for n in nodes):
            return _around(inner, nodes)
    return body


def _path(body: Body, copy: Copy) -> list[Node]:
    """The nodes around a copy, outermost first."""
    for node in body:
        for inner in node.bodies:
            if any(n is copy for n in walk(inner)):
                return [node, *_path(inner, copy)]
    return []


def _regions(copy: Copy, path: Sequence[Node]) -> list[tuple[slice, ...]] | None:
    """What a copy fills each time that it is made; None where that is not known."""
    loops = [n for n in path if isinstance(n, For)]
    bounds = [(int_value(n.start), int_value(n.stop), n.step) for n in loops]
    if len(loops) < len(path) or any(a is None or b is None for a, b, _ in bounds):
        return None
    ranges = [range(a, b, step) for a, b, step in bounds if a is not None and b is not None]
    if math.prod(map(len, ranges)) > MOST_PIECES:
        return None
    result: list[tuple[slice, ...]] = []
    for values in itertools.product(*ranges):
        mapping: dict[Var, Expr] = {
            n.var: const(v, n.var.dtype) for n, v in zip(loops, values, strict=True)
        }
        starts = [int_value(substitute(e, mapping)) for e in copy.dst.starts]
        ends = [(s, s + n) for s, n in zip(starts, copy.dst.extents, strict=True) if s is not None]
        inside = all(
            a >= 0 and b <= n for (a, b), n in zip(ends, copy.dst.buffer.extents, strict=False)
        )
        if len(ends) < len(starts) or not inside:
            return None
        result.append(tuple(slice(*end) for end in ends))
    return result


def only_brings(node: Node, brought: Collection[Node]) -> bool:
    """Whether a node is a copy that others make, or a loop over such copies."""
    if not isinstance(node, For):
        return node in brought
    inside = [n for n in walk(node.body) if not isinstance(n, For | Let | Load)]
    return bool(inside) and all(n in brought for n in inside)


def filled_in(body: Body, brought: Collection[Node]) -> Iterator[tuple[int, Copy]]:
    """The copies that fill what nodes of a body read, each with the place in it that it stands at:
    of the body, or pieces in loops of it."""
    for place, node in enumerate(body):
        inside = walk((node,)) if isinstance(node, For) else iter((node,))
        for copy in (n for n in inside if isinstance(n, Copy) and n in brought):
            readers = {k for k, n in enumerate(body) if reads(n, copy.dst.buffer)}
            if readers and place not in readers:
                yield place, copy


def round_copies(body: Body) -> Iterator[Copy]:
    """The copies that a round of a loop makes: in its body, in branches of it, and pieces of tiles
    in loops of it."""
    for node in in_round(body):
        if isinstance(node, Copy):
            yield node
        elif isinstance(node, For):
            inside = (n for n in walk(node.body) if isinstance(n, Copy))
            yield from (n for n in inside if not n.dst.is_whole)


def in_round(body: Body) -> Iterator[Node]:
    """The nodes that a round of a loop comes to itself: those of its body, and of branches in it,
    but not of loops in it."""
    for node in body:
        yield node
        if isinstance(node, If):
            for inner in node.bodies:
                yield from in_round(inner)


def reads(node: Node, root: Buffer) -> bool:
    """Whether the node or anything in it reads the buffer or a view of it."""
    return any(b.root is root for b in all_reads(node))
