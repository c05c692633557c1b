"""Tiles that the blocks of a cluster exchange: where they go through, and who waits for whom.

Knows barriers that count bytes, the cluster's barrier and how often nodes execute. Does not know
PTX or layouts.

Every block sends its elements to the shared memory of all, and waits at a barrier of its own until
the bytes of all have come. A block that is ahead may send what comes next while another one still
waits: it goes elsewhere, to the other of two slots, and no block gets further ahead, for it needs
what that other one sends. Neighbouring exchanges all send before any waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tilejit.dtypes import int32, uint64
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, const, index, int_value
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, Load, Node, Store, While, walk
from tilejit.ir.sync import Control, ControlOp
from tilejit.ops.cluster import ClusterExchange, meets_late
from tilejit.ops.reduce import Step

SLOTS = 2
_BARRIER = (ControlOp.CLUSTER_ARRIVE, ControlOp.CLUSTER_ARRIVE_RELAXED, ControlOp.CLUSTER_WAIT)


def plan_exchanges(kernel: Kernel) -> Kernel:
    """Decide the memory, the barriers and the slots of T.cluster_reduce and T.cluster_gather.

    Needs: tiles in fragments. Decides: `scratch`, `barrier`, `slot` and `parity` of the nodes, and
    where the block's threads wait until all blocks of the cluster have begun: as late as they can.
    """
    if not any(isinstance(n, ClusterExchange) for n in walk(kernel.body)):
        return kernel
    planner = _Planner(kernel.cluster_size)
    body = planner.visit(kernel.body, is_repeated=False)
    fresh = replace(
        kernel,
        body=(*planner.first, *body),
        notes=(*kernel.notes, *dict.fromkeys(planner.notes)),
    )
    if not meets_late(fresh):
        return fresh
    wait = Control(op=ControlOp.CLUSTER_WAIT, span=kernel.span)
    return replace(fresh, body=_with_wait(fresh.body, wait))


def _with_wait(body: Body, wait: Node) -> Body:
    """The body with a wait before what first needs the other blocks, but not in branches, and in
    loops only that have one round."""
    at = next(k for k, n in enumerate(body) if any(map(_is_of_cluster, walk((n,)))))
    first = body[at]
    if isinstance(first, For) and _is_once(first):
        inside = replace(first, body=_with_wait(first.body, wait))
        return (*body[:at], inside, *body[at + 1 :])
    return (*body[:at], wait, *body[at:])


def _is_of_cluster(node: Node) -> bool:
    is_control = isinstance(node, Control) and node.op in _BARRIER
    return is_control or isinstance(node, ClusterExchange)


class _Planner:
    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.first: list[Node] = []  # what the kernel begins with
        self.notes: list[str] = []

    def visit(self, body: Body, *, is_repeated: bool) -> Body:
        result: list[Node] = []
        together: list[ClusterExchange] = []
        for node in body:
            if isinstance(node, ClusterExchange):
                if any(node.given.buffer is other.result.buffer for other in together):
                    result += self.planned(together, is_repeated)
                    together = []
                together.append(node)
                continue
            result += self.planned(together, is_repeated)
            together = []
            again = is_repeated or isinstance(node, While)
            again |= isinstance(node, For) and not _is_once(node)
            fresh = (self.visit(child, is_repeated=again) for child in node.bodies)
            result.append(node.with_bodies(*fresh))
        result += self.planned(together, is_repeated)
        return tuple(result)

    def planned(self, nodes: Sequence[ClusterExchange], is_repeated: bool) -> list[Node]:
        """Neighbours that send what none of them makes, which share their turns and a barrier."""
        if not nodes:
            return []
        slots, span = SLOTS if is_repeated else 1, nodes[0].span
        name = "_".join(n.given.buffer.name for n in nodes)
        barrier = Buffer(
            name=f"{name}_come",
            shape=(index(slots),),
            dtype=uint64,
            scope=Scope.BARRIER,
            arrive_counts=(len(nodes),) * slots,
            span=span,
        )
        slot: Expr = index(0)
        parity: Expr = index(0)
        before: list[Node] = []
        after: list[Node] = []
        if is_repeated:
            turns = Buffer(name=f"{name}_turns", shape=(index(1),), dtype=int32, scope=Scope.VAR)
            turn = Var(turns.name, int32, VarKind.VALUE, index(0), index(2 * slots - 1))
            at = (index(0),)
            following = arith("floormod", arith("add", turn, 1), 2 * slots)
            slot, parity = arith("floormod", turn, slots), arith("floordiv", turn, slots)
            self.first.append(Store(buffer=turns, index=at, value=const(0, int32), span=span))
            before.append(Load(out=turn, buffer=turns, index=at, span=span))
            after.append(Store(buffer=turns, index=at, value=following, span=span))
        fresh = [
            replace(n, scratch=self.scratch(n, slots), barrier=barrier, slot=slot, parity=parity)
            for n in nodes
        ]
        if len(fresh) > 1:
            fresh = [replace(n, step=step) for step in (Step.SEND, Step.TAKE) for n in fresh]
        return [*before, *fresh, *after]

    def scratch(self, node: ClusterExchange, slots: int) -> Buffer:
        """Memory for the elements of all blocks."""
        self.notes.append(f"{node.title}: {self.blocks} blocks through shared memory")
        return Buffer(
            name=f"{node.given.buffer.name}_blocks",
            shape=tuple(index(n) for n in (slots, *node.given.shape, self.blocks)),
            dtype=node.sent_as,
            scope=Scope.SHARED,
            span=node.span,
        )


def _is_once(loop: For) -> bool:
    """True when the loop surely has one round."""
    span = int_value(arith("sub", loop.stop, loop.start))
    return span is not None and 0 < span * (1 if loop.step > 0 else -1) <= abs(loop.step)
