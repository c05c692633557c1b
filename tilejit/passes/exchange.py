"""Tiles that the blocks of a cluster exchange: where they go through, and who waits for whom.

Knows barriers that count bytes, the cluster's barrier and how often nodes execute. Does not know
PTX or layouts.

Every block sends its elements to the shared memory of all, and waits at a barrier of its own until
the bytes of all have come. A block that is ahead may send what comes next while another one still
waits: it goes elsewhere, to the other of two slots, and no block gets further ahead, for it needs
what that other one sends. Neighbouring exchanges all send before any waits.

Loops with stages may send of the next round before they take of their own (`around`). Four slots
are enough for that. A block that sends for the k-th time has taken k - 2, so all blocks have sent
k - 2, and before that taken k - 4: threads of theirs may still wait for or read what came for
k - 3, k - 2 and k - 1, but k - 4, whose slot and barrier k has, is over. That barrier's phase of
k - 4 has completed everywhere, for its bytes have been waited for: bytes of k count in the next
phase, be they there before the block itself announces them or after. The threads of a block meet
after they have taken and before they send again (`sync`: to send writes what was read), so what one
of them has done all have, and nobody still asks for the parity of k - 4 when k's phase completes.
With three slots k would come where k - 3 may still be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tilejit.dtypes import int32, uint64
from tilejit.errors import Span
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, const, index, int_value
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, Load, LoopKind, Node, Store, While, walk
from tilejit.ir.sync import Control, ControlOp
from tilejit.ops.cluster import ClusterExchange, ClusterScatter, meets_late
from tilejit.ops.reduce import Step

SLOTS = 2
AHEAD_SLOTS = 4  # where a round may send before the one before it takes
AHEAD_BYTES = 4096  # of a tile's slots: more are better spent on tiles that are brought
FEWEST_STAGES = 3  # of a loop whose rounds overlap: two tiles are in use, one comes
_BARRIER = (ControlOp.CLUSTER_ARRIVE, ControlOp.CLUSTER_ARRIVE_RELAXED, ControlOp.CLUSTER_WAIT)


def plan_exchanges(kernel: Kernel) -> Kernel:
    """Decide the memory, the barriers and the slots of T.cluster_reduce, T.cluster_gather and
    T.cluster_reduce_scatter.

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

    def visit(self, body: Body, *, is_repeated: bool, is_staged: bool = False) -> Body:
        """is_staged: the body is a pipelined loop's."""
        result: list[Node] = []
        together: list[ClusterExchange] = []
        for node in body:
            if isinstance(node, ClusterExchange):
                if any(node.given.buffer is other.result.buffer for other in together):
                    result += self.planned(together, is_repeated, is_staged)
                    together = []
                together.append(node)
                continue
            result += self.planned(together, is_repeated, is_staged)
            together = []
            again = is_repeated or isinstance(node, While)
            again |= isinstance(node, For) and not _is_once(node)
            staged = again and _may_overlap(node)
            fresh = (self.visit(b, is_repeated=again, is_staged=staged) for b in node.bodies)
            result.append(node.with_bodies(*fresh))
        result += self.planned(together, is_repeated, is_staged)
        return tuple(result)

    def planned(
        self, nodes: Sequence[ClusterExchange], is_repeated: bool, is_staged: bool
    ) -> list[Node]:
        """Neighbours that send what none of them makes, which share their turns and a barrier.
        is_staged: sending and taking each count their own turns, where so many slots are worth
        their memory."""
        if not nodes:
            return []
        sizes = [math.prod(n.room(self.blocks)) * n.sent_as.bytes for n in nodes]
        is_apart = is_staged and AHEAD_SLOTS * max(sizes) <= AHEAD_BYTES
        slots, span = SLOTS if is_repeated else 1, nodes[0].span
        if is_apart:
            slots = AHEAD_SLOTS
        name = "_".join(n.given.buffer.name for n in nodes)
        barrier = Buffer(
            name=f"{name}_come",
            shape=(index(slots),),
            dtype=uint64,
            scope=Scope.BARRIER,
            arrive_counts=(len(nodes),) * slots,
            span=span,
        )
        scratch = {n: self.scratch(n, slots) for n in nodes}
        steps: list[tuple[Step, ...]] = [(Step.WHOLE,)]
        if is_apart:
            steps = [(Step.SEND,), (Step.TAKE,)]
        elif len(nodes) > 1 or any(isinstance(n, ClusterScatter) for n in nodes):
            steps = [(Step.SEND, Step.TAKE)]
        result: list[Node] = []
        for phase in steps:
            slot: Expr = index(0)
            parity: Expr = index(0)
            after: list[Node] = []
            if is_repeated:
                suffix = f"_{phase[0]}_turns" if is_apart else "_turns"
                load, after = self.turn(f"{name}{suffix}", slots, span)
                slot = arith("floormod", load.out, slots)
                parity = arith("floordiv", load.out, slots)
                result.append(load)
            result += [
                replace(n, scratch=scratch[n], barrier=barrier, slot=slot, parity=parity, step=step)
                for step in phase
                for n in nodes
            ]
            result += after
        return result

    def turn(self, name: str, slots: int, span: Span | None) -> tuple[Load, list[Node]]:
        """How often something has been done, twice as many as slots being none, and one more."""
        turns = Buffer(name=name, shape=(index(1),), dtype=int32, scope=Scope.VAR)
        turn = Var(turns.name, int32, VarKind.VALUE, index(0), index(2 * slots - 1))
        at = (index(0),)
        following = arith("floormod", arith("add", turn, 1), 2 * slots)
        self.first.append(Store(buffer=turns, index=at, value=const(0, int32), span=span))
        load = Load(out=turn, buffer=turns, index=at, span=span)
        return load, [Store(buffer=turns, index=at, value=following, span=span)]

    def scratch(self, node: ClusterExchange, slots: int) -> Buffer:
        """Memory for the elements of all blocks."""
        self.notes.append(f"{node.title}: {self.blocks} blocks through shared memory")
        return Buffer(
            name=f"{node.given.buffer.name}_blocks",
            shape=tuple(index(n) for n in (slots, *node.room(self.blocks))),
            dtype=node.sent_as,
            scope=Scope.SHARED,
            span=node.span,
        )


def _may_overlap(node: Node) -> bool:
    """Whether a loop's rounds may overlap."""
    if not isinstance(node, For) or node.kind is not LoopKind.PIPELINED or node.order:
        return False
    return node.num_stages is None or node.num_stages >= FEWEST_STAGES


def sends_ahead(node: ClusterExchange) -> bool:
    """Whether the tile may be sent in the round before the one that takes it."""
    slots = 0 if node.barrier is None else len(node.barrier.arrive_counts)
    return node.step is not Step.WHOLE and slots == AHEAD_SLOTS


def _is_once(loop: For) -> bool:
    """True when the loop surely has one round."""
    span = int_value(arith("sub", loop.stop, loop.start))
    return span is not None and 0 < span * (1 if loop.step > 0 else -1) <= abs(loop.step)
