"""Which bulk stores may go to a place that another one is still on its way to.

Knows the tiles that copies write, and what loops do to them. Does not know barriers. Bulk stores
are not ordered among themselves, not even those of one thread (PTX ISA, "Memory consistency
model: async operations").
"""

from __future__ import annotations

from collections.abc import Iterable

from tilejit.ir.analysis import linear
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import variables
from tilejit.ir.node import Atomic, For, Node, is_over_tiles, walk
from tilejit.ir.sync import Control, ControlOp
from tilejit.ops.copy import Copy

# Tensors that bulk stores are on their way to, and the copy that they belong to: of one copy they
# go to different places. None: any place.
Sent = frozenset[tuple[Buffer, Copy | None]]


def may_meet(now: Iterable[tuple[Buffer, Copy]], before: Sent) -> bool:
    """Whether what is sent now may go where something is on its way to, and would be another
    result in another order."""
    return any(
        tensor is other and copy is not earlier and not _both_add(copy, earlier)
        for tensor, copy in now
        for other, earlier in before
    )


def _both_add(copy: Copy, other: Copy | None) -> bool:
    """Sums do not depend on the order."""
    return copy.combine is not None and other is not None and copy.combine == other.combine


def after_round(sent: Sent, own: Iterable[tuple[Buffer, Copy]], loop: Node) -> Sent:
    """What is on its way when a loop begins anew that its next round may meet.

    own: what the loop's own nodes send. The tiles of a walk are blocks of the user's, which do not
    touch what others write.
    """
    if is_over_tiles(loop):
        return frozenset()
    again = {
        (tensor, copy) for tensor, copy in own if copy.combine is None and not _moves_on(copy, loop)
    }
    return sent - again | {(tensor, None) for tensor, copy in sent & again}


def signals(node: Node) -> bool:
    """True for what other blocks may take as a sign that everything before it is there."""
    if isinstance(node, Control):
        return node.op is ControlOp.FENCE_DEVICE
    return any(isinstance(n, Atomic) and n.buffer.scope is Scope.GLOBAL for n in walk((node,)))


def _moves_on(copy: Copy, loop: Node) -> bool:
    """True when the copy writes another place in each round of the loop."""
    if not isinstance(loop, For):
        return False
    for start, extent in zip(copy.dst.starts, copy.dst.extents, strict=True):
        terms, _ = linear(start)
        others = (t for t in terms if t is not loop.var)
        if any(loop.var in variables(t) for t in others):
            continue
        if abs(terms.get(loop.var, 0) * loop.step) >= extent:
            return True
    return False
