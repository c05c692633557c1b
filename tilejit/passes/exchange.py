"""Tiles that the blocks of a cluster combine: where they go through, and who may write there when.

Knows the cluster's barrier and how often nodes execute. Does not know PTX.

Blocks write into each other's shared memory. A block may do so once the others have begun and have
read what was there before: all come to the cluster's barrier when they have, early, and wait for
each other right before they write, late, so that what lies between hides the way.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.errors import TraceError
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import index
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, Node, walk
from tilejit.ir.sync import Control, ControlOp
from tilejit.ops.cluster import ClusterReduce

_BARRIER = (ControlOp.CLUSTER_ARRIVE, ControlOp.CLUSTER_ARRIVE_RELAXED, ControlOp.CLUSTER_WAIT)


def with_scratch(node: ClusterReduce, blocks: int) -> ClusterReduce:
    """The node with shared memory for the elements of all blocks."""
    scratch = Buffer(
        name=f"{node.tile.buffer.name}_blocks",
        shape=tuple(index(n) for n in (*node.tile.shape, blocks)),
        dtype=node.accumulator,
        scope=Scope.SHARED,
        span=node.span,
    )
    return replace(node, scratch=scratch)


def note_of(node: ClusterReduce, blocks: int) -> str:
    """What explain() says of it."""
    return (
        f"cluster_reduce {node.kind} {node.tile.buffer.name}: {blocks} blocks through shared memory"
    )


def order_exchanges(kernel: Kernel) -> Kernel:
    """Decide where blocks come to the cluster's barrier for T.cluster_reduce.

    Needs: the final order of nodes. Decides: Control nodes. Each reduction itself is a meeting of
    all threads of the cluster between the writing and the reading.
    Raises TraceError where it stands between the user's T.cluster_arrive and T.cluster_wait.
    """
    nodes = [n for n in walk(kernel.body) if isinstance(n, ClusterReduce)]
    if not nodes:
        return kernel
    arrive = _control(ControlOp.CLUSTER_ARRIVE_RELAXED, nodes[0])
    if any(isinstance(n, Control) and n.op in _BARRIER for n in walk(kernel.body)):
        _check_order(kernel.body)
        return replace(kernel, body=_visit(kernel.body, arrives_before=True))
    first = next(k for k, n in enumerate(kernel.body) if any(m in nodes for m in walk((n,))))
    if all(n in kernel.body for n in nodes):  # each has memory of its own, used once
        wait = _control(ControlOp.CLUSTER_WAIT, nodes[0])
        body = (arrive, *kernel.body[:first], wait, *kernel.body[first:])
        return replace(kernel, body=body)
    end = _control(ControlOp.CLUSTER_WAIT, nodes[-1])
    return replace(kernel, body=(arrive, *_visit(kernel.body, arrives_before=False), end))


def _control(op: ControlOp, node: Node) -> Control:
    return Control(op=op, span=node.span)


def _visit(body: Body, *, arrives_before: bool) -> Body:
    """Each reduction between a wait and the arrival that the next one waits for; with
    `arrives_before`, right after both."""
    result: list[Node] = []
    for node in body:
        if not isinstance(node, ClusterReduce):
            fresh = (_visit(child, arrives_before=arrives_before) for child in node.bodies)
            result.append(node.with_bodies(*fresh))
            continue
        arrive = _control(ControlOp.CLUSTER_ARRIVE, node)
        wait = _control(ControlOp.CLUSTER_WAIT, node)
        result += [arrive, wait, node] if arrives_before else [wait, node, arrive]
    return tuple(result)


def _check_order(body: Body) -> None:
    """
    Raises:
        TraceError: threads that have come to the cluster's barrier would come again before waiting.
    """
    before: Control | None = None
    for node in body:
        for child in node.bodies:
            _check_order(child)
        if isinstance(node, Control) and node.op in _BARRIER:
            before = None if node.op is ControlOp.CLUSTER_WAIT else node
        elif before is not None and any(isinstance(n, ClusterReduce) for n in walk((node,))):
            raise TraceError(
                f"T.cluster_reduce stands between T.{before.op} and its T.cluster_wait.",
                span=node.span,
                related=[(before.span, "the arrival")],
                hint="Blocks meet at the same barrier to reduce: put it before or after the two.",
            )
