"""Clusters of blocks: a block's number in its cluster, and the barrier of the whole cluster.

Knows the calls and what each node means. Does not know what blocks share.
"""

from __future__ import annotations

from tilejit.errors import caller_span
from tilejit.ir.sync import Control, ControlOp
from tilejit.language.trace import current_kernel
from tilejit.language.value import Value
from tilejit.language.where import tile_op


def block_rank_in_cluster() -> Value:
    """The block's number in its cluster, from 0 on, counted along x first; 0 without clusters
    (PTX ISA, "Special Registers: %cluster_ctarank").

    It is int32 and the same for all threads of the block.

    Raises:
        TraceError: outside a kernel.
    """
    return Value(current_kernel("T.block_rank_in_cluster").cluster_rank)


def cluster_arrive() -> None:
    """Every thread comes to the cluster's barrier and goes on; what it has written before is seen
    by the threads of all blocks after their `T.cluster_wait` (PTX ISA, "barrier.cluster.arrive").

    All threads of a warp reach it together, and no thread arrives twice without waiting.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
    """
    _add("T.cluster_arrive", ControlOp.CLUSTER_ARRIVE)


def cluster_arrive_relaxed() -> None:
    """The same for threads that have written nothing that other blocks want to see
    (PTX ISA, "barrier.cluster.arrive.relaxed")."""
    _add("T.cluster_arrive_relaxed", ControlOp.CLUSTER_ARRIVE_RELAXED)


def cluster_wait() -> None:
    """Every thread waits until all threads of the cluster have arrived
    (PTX ISA, "barrier.cluster.wait").

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
    """
    _add("T.cluster_wait", ControlOp.CLUSTER_WAIT)


def cluster_sync() -> None:
    """All threads of the cluster meet: `T.cluster_arrive` and `T.cluster_wait`.

    A block's shared memory must outlive what others send there: let clusters whose blocks write
    or arrive in each other's end with it. mbarriers are known to the cluster from the start.
    """
    _add("T.cluster_sync", ControlOp.CLUSTER_ARRIVE, ControlOp.CLUSTER_WAIT)


def _add(what: str, *operations: ControlOp) -> None:
    trace = tile_op(what)
    for operation in operations:
        trace.add(Control(op=operation, span=caller_span()))
