"""How many registers of a thread the fragments of a loop take at once.

Knows which fragments hold values that are still wanted, and what multiplies in flight hold. Does
not know what else the assembler keeps in registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, If, Node, Parallel, Store, all_reads, all_writes, walk
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.ops.reduce import Reduce

_PASSES = 2  # over a loop's nodes: what a round hands to the next is known after the first


def fragments_at(loop: For, kernel: Kernel) -> set[Buffer]:
    """The fragments that a loop uses, or that are used both before and after it; of loops around
    it, all that they use."""
    return _fragments(_held_at(kernel.body, loop, frozenset(), frozenset()))


def _held_at(body: Body, loop: For, before: Set[Buffer], after: Set[Buffer]) -> Set[Buffer]:
    place = next(k for k, n in enumerate(body) if any(m is loop for m in walk((n,))))
    node = body[place]
    before |= _used(body[:place])
    after |= _used(body[place + 1 :])
    if isinstance(node, If):
        (inner,) = (b for b in node.bodies if any(m is loop for m in walk(b)))
        return _held_at(inner, loop, before, after)
    return _used((node,)) | before & after


def _used(body: Body) -> set[Buffer]:
    return {b.root for n in body for b in all_reads(n) | all_writes(n)}


def _fragments(buffers: Iterable[Buffer]) -> set[Buffer]:
    return {b.root for b in buffers if b.scope is Scope.FRAGMENT}


def most_words(nodes: Sequence[Node], loop: For, kernel: Kernel) -> float:
    """Words of a thread that fragments take where a round of the loop has most of them.

    nodes: of the round, with the waits for its multiplies. What a node makes of a fragment that is
    not wanted any more takes its registers. Needs: layouts.
    """
    held = fragments_at(loop, kernel)
    through = held - _fragments(_used(loop.body))
    size = {b: f.registers * b.dtype.bytes / 4 for b, f in kernel.fragments.items()}
    read, made = [_needed(n) for n in nodes], [_made_anew(n) for n in nodes]
    after = _wanted_after(loop, kernel) & held
    wanted: list[Set[Buffer]] = [after] * len(nodes)
    live = after
    for _ in range(_PASSES):
        for k in reversed(range(len(nodes))):
            wanted[k] = live
            live = live - made[k] | read[k]
        live = live | after
    flying: list[Gemm] = []
    most = 0.0
    for k, node in enumerate(nodes):
        if isinstance(node, Gemm) and node.is_async:
            flying.append(node)
        elif isinstance(node, GemmWait):
            flying = flying[len(flying) - node.pending :]
        busy = through | _fragments(r.buffer for g in flying for r in (g.a, g.acc))
        for now in (wanted[k] - made[k] | read[k], wanted[k]):
            most = max(most, sum(size.get(b, 0.0) for b in now | busy))
    return most


def _needed(node: Node) -> set[Buffer]:
    """Fragments of which a node needs what they held before."""
    if isinstance(node, Gemm):
        sums = [] if node.clear and node.acc.is_whole else [node.acc.buffer]
        return _fragments([node.a.buffer, node.b.buffer, *sums])
    return _fragments(all_reads(node) | all_writes(node)) - _made_anew(node)


def _made_anew(node: Node) -> set[Buffer]:
    """Fragments of which a node surely writes every element, without reading any."""
    if isinstance(node, Gemm):
        return _fragments([node.acc.buffer] if node.clear and node.acc.is_whole else [])
    written = _fragments(all_writes(node)) - _fragments(all_reads(node))
    return {b for b in written if fills(node, b)}


def _wanted_after(loop: For, kernel: Kernel) -> set[Buffer]:
    """Fragments that anything but the loop reads."""
    inside = {id(n) for n in walk((loop,))}
    return _fragments(b for n in walk(kernel.body) if id(n) not in inside for b in n.reads)


def fills(node: Node, buffer: Buffer) -> bool:
    """Whether the node surely writes every element of the buffer, and by no other name."""
    if any(b.root is buffer and b is not buffer for b in all_writes(node)):
        return False
    if isinstance(node, If):
        return all(any(fills(n, buffer) for n in body) for body in node.bodies)
    if isinstance(node, Copy | Fill | Reduce):
        return node.dst.buffer is buffer and node.dst.is_whole
    if not isinstance(node, Parallel) or node.extents != buffer.extents:
        return False
    stores = [n for n in node.body if isinstance(n, Store) and n.buffer is buffer]
    return any(n.index == node.vars for n in stores)
