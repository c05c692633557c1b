"""Orders what threads read of a tile before the tensor memory accelerator fills it again.

Knows which tiles are filled so, and by what threads say that they have read them. Does not know
slots or who fills. Ordinary loads wait in a queue that neither an arrival at a barrier nor the
accelerator stands in: without a fence (PTX ISA, "Async proxy") a thread can say that it is done,
and the tile be overwritten, before its loads are carried out.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, If, Node, OneThread, Roles, While, all_reads, walk
from tilejit.ir.sync import BarrierArrive, BarrierExpect, Control, ControlOp, SyncThreads
from tilejit.ops.copy import Copy
from tilejit.passes.sync import bulk_tiles, is_async_access

Seen = frozenset[Buffer]


def order_reads(kernel: Kernel) -> Kernel:
    """Fence reads of tiles that are filled in bulk before the arrivals, and for tiles of the user's
    own before the meetings, that let them be filled again.

    Needs: roles, SyncThreads.
    """
    filled = frozenset(
        n.dst.buffer.root
        for n in walk(kernel.body)
        if isinstance(n, Copy) and n.is_tma and n.dst.buffer.scope is Scope.SHARED
    )
    if not filled:
        return kernel
    body, _ = _Orderer(filled, bulk_tiles(kernel)).body(kernel.body, frozenset())
    return replace(kernel, body=body)


class _Orderer:
    """filled: tiles that bulk copies fill; by_hand: those of copies that the user waits for."""

    def __init__(self, filled: Seen, by_hand: Seen) -> None:
        self.filled = filled
        self.by_hand = by_hand

    def body(self, nodes: Body, seen: Seen) -> tuple[Body, Seen]:
        """The nodes with fences; seen: tiles that were read since the last one."""
        result: list[Node] = []
        for node in nodes:
            if self.tells(node, seen):
                result.append(Control(op=ControlOp.FENCE_ASYNC, span=node.span))
                seen = frozenset()
            fresh, seen = self.node(node, seen)
            result.append(fresh)
        return tuple(result), seen

    def tells(self, node: Node, seen: Seen) -> bool:
        """Whether others may learn from the node that what was seen may be overwritten."""
        if isinstance(node, BarrierArrive) or (isinstance(node, BarrierExpect) and node.arrives):
            return bool(seen)
        return isinstance(node, SyncThreads) and bool(seen & self.by_hand)

    def node(self, node: Node, seen: Seen) -> tuple[Node, Seen]:
        if isinstance(node, Control) and node.op is ControlOp.FENCE_ASYNC:
            return node, frozenset()
        if isinstance(node, Roles | If | OneThread):
            inner = [self.body(child, seen) for child in node.bodies]
            return node.with_bodies(*(body for body, _ in inner)), seen.union(
                *(left for _, left in inner)
            )
        if isinstance(node, For | While):
            while True:  # what a round has read, the next one's arrivals tell of
                bodies: list[Body] = []
                left = seen
                for child in node.bodies:
                    body, left = self.body(child, left)
                    bodies.append(body)
                if left <= seen:
                    return node.with_bodies(*bodies), seen
                seen |= left
        if is_async_access(node):
            return node, seen
        return node, seen | (self.filled & {b.root for b in all_reads(node)})
