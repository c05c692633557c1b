"""Gives pipelined loops that fill the same tile one after the other a tile each.

Knows where tiles are filled and read, and how much memory slots will take. Does not know who fills
them.

Slots belong to one loop: what it brings ahead must not overwrite what another one still reads. So
loops over full tiles first and over those with a mask after them could not have slots of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, LoopKind, Node, rewrite, walk
from tilejit.ir.substitution import rebuffered
from tilejit.ops.copy import Copy
from tilejit.passes.bring import is_inward
from tilejit.target import Target

FEWEST_SLOTS = 2  # of a loop whose stages are left open
SPARE_BYTES = 2048  # of shared memory, for barriers and gaps


def own_tiles(kernel: Kernel, target: Target) -> Kernel:
    """Decide which loops get tiles of their own: those that fill one anew in every round, before
    they read it, where nothing else reads what they fill and the slots of all fit.

    Needs: shapes and dtypes. Leaves everything else alone.
    """
    loops = list(_pipelined(kernel.body))
    fresh: dict[For, dict[Buffer, Buffer]] = {}
    views = {b.root for b in kernel.buffers if b.is_view}
    for buffer in kernel.scoped(Scope.SHARED):
        if buffer.is_view or buffer in views or buffer in kernel.given.layouts:
            continue
        mine = [n for n in loops if any(_touches(m, buffer) for m in walk(n.body))]
        inside = {id(m) for n in mine for m in walk(n.body)}
        elsewhere = any(_touches(m, buffer) for m in walk(kernel.body) if id(m) not in inside)
        if len(mine) < 2 or elsewhere or not all(_fills_first(n.body, buffer) for n in mine):
            continue
        for number, loop in enumerate(mine[1:], 1):
            fresh.setdefault(loop, {})[buffer] = replace(buffer, name=f"{buffer.name}_{number}")
    room = target.shared_bytes - SPARE_BYTES
    if not fresh or all(_bytes(kernel, loops, fresh, n) > room for n in (FEWEST_SLOTS, 1)):
        return kernel

    def visit(node: Node) -> Node:
        found = next((own for loop, own in fresh.items() if loop.var is _var(node)), None)
        return node if found is None else node.with_bodies(rebuffered(node.bodies[0], found))

    names = dict.fromkeys(b.name for own in fresh.values() for b in own)
    note = f"{', '.join(names)}: a tile for each of the loops that fill it"
    return replace(kernel, body=rewrite(kernel.body, visit), notes=(*kernel.notes, note))


def _var(node: Node) -> object:
    return node.var if isinstance(node, For) else None


def _pipelined(body: Body) -> Iterator[For]:
    """The outermost pipelined loops with stages."""
    for node in body:
        if isinstance(node, For) and node.kind is LoopKind.PIPELINED:
            if node.num_stages is None or node.num_stages > 1:
                yield node
        else:
            for inner in node.bodies:
                yield from _pipelined(inner)


def _touches(node: Node, buffer: Buffer) -> bool:
    return any(b.root is buffer for b in (*node.reads, *node.writes))


def _fills_first(body: Body, buffer: Buffer) -> bool:
    """Whether a copy from a tensor in the body fills the whole buffer, before all else that touches
    it, which reads it only."""
    touching = [n for n in walk(body) if _touches(n, buffer)]
    first = touching[0]
    if first not in body or not isinstance(first, Copy) or not is_inward(first):
        return False
    return first.dst.is_whole and not any(b.root is buffer for n in touching[1:] for b in n.writes)


def _bytes(
    kernel: Kernel, loops: list[For], fresh: Mapping[For, Mapping[Buffer, Buffer]], fewest: int
) -> int:
    """Of shared memory that tiles take with the slots that are asked for, or so few."""
    slots = dict.fromkeys(kernel.scoped(Scope.SHARED), 1)
    for loop in loops:
        stages = fewest if loop.num_stages is None else loop.num_stages
        for copy in (n for n in loop.body if is_inward(n)):
            assert isinstance(copy, Copy)
            own = fresh.get(loop, {}).get(copy.dst.buffer, copy.dst.buffer)
            slots[own] = max(slots.get(own, 1), stages)
    return sum(n * math.prod(b.extents) * b.dtype.bytes for b, n in slots.items() if not b.is_view)
