"""Which neighbouring nodes become one call of the generated source, and what it is called.

Knows nodes and names. Does not know what a call emits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Var
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Let,
    Load,
    Node,
    OneThread,
    Parallel,
    Store,
    While,
    walk,
)
from tilejit.ir.sync import (
    AsyncCommit,
    AsyncWait,
    BarrierArrive,
    BarrierExpect,
    BarrierWait,
    Control,
    Elect,
    SyncThreads,
)
from tilejit.isa.atom import CopyMethod
from tilejit.ops.cluster import ClusterExchange, ClusterGather, ClusterReduce, ClusterScatter
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import FetchOperands, Gemm, GemmWait
from tilejit.ops.reduce import Reduce, Step
from tilejit.ops.scan import Scan
from tilejit.ops.uses import used_variables

Key = Buffer  # a fragment, or the root of a private array: what `EmitterBase.state` holds


def count_uses_in(nodes: Iterable[Node]) -> dict[Var, int]:
    counts: dict[Var, int] = {}
    for node in walk(tuple(nodes)):
        for var in used_variables(node):
            counts[var] = counts.get(var, 0) + 1
    return counts


def count_uses(kernel: Kernel) -> dict[Var, int]:
    """How many nodes use each variable."""
    return count_uses_in(kernel.body)


def defines_all(node: Node, key: Key) -> bool:
    """True when the node sets every element of the state without reading it."""
    if isinstance(node, Fill | Copy):
        if not isinstance(node.dst.buffer, Buffer) or node.dst.buffer is not key:
            return False
        return node.dst.is_whole and key not in node.reads
    if isinstance(node, Gemm):
        is_set = node.clear and node.acc.buffer is key and node.acc.is_whole
        return is_set and key not in node.reads
    if isinstance(node, FetchOperands):
        return node.carried is key
    if isinstance(node, Reduce):
        return key in node.writes and node.dst.is_whole and key not in node.reads
    if isinstance(node, ClusterExchange):
        return key in node.writes and node.result.is_whole and key not in node.reads
    if isinstance(node, Store):
        return node.buffer is key and math.prod(key.extents) == 1
    return False


def is_pipeline_step(node: Node) -> bool:
    """Part of a pipeline's machinery: waits, meetings and copies that run ahead."""
    if isinstance(node, AsyncCommit | AsyncWait | FetchOperands):
        return True
    if isinstance(node, SyncThreads):
        return node.inserted
    if isinstance(node, Copy):
        return node.atom is not None and node.atom.method is CopyMethod.CP_ASYNC
    return isinstance(node, If) and all(
        is_pipeline_step(n) or isinstance(n, Load) for b in node.bodies for n in b
    )


def is_scalar(node: Node) -> bool:
    if isinstance(node, If | For | While):
        return all(is_scalar(n) for b in node.bodies for n in b)
    return isinstance(node, Load | Store | Atomic | BarrierArrive | BarrierWait)


def is_async_step(node: Node) -> bool:
    """Part of what starts, announces or waits for work that runs by itself."""
    if isinstance(node, If):
        return all(is_async_step(n) or is_scalar(n) for b in node.bodies for n in b)
    if isinstance(node, Copy):
        return node.is_tma
    if isinstance(node, Gemm):
        return node.is_async
    if isinstance(node, SyncThreads):
        return node.number is not None
    return isinstance(node, Let | Elect | Control | GemmWait | BarrierExpect)


def share_call(before: Node, node: Node) -> bool:
    if is_async_step(before) or is_async_step(node):
        return all(is_async_step(n) or is_scalar(n) for n in (before, node))
    return (is_scalar(before) and is_scalar(node)) or (
        is_pipeline_step(before) and is_pipeline_step(node)
    )


def call_name(nodes: Body) -> str:
    """A name that says what the call does, with the user's buffer names."""
    if all(is_pipeline_step(n) for n in nodes):
        filled = dict.fromkeys(n.dst.buffer.name for n in walk(nodes) if isinstance(n, Copy))
        if filled:
            return "_".join(["fill", *filled])
        return "sync" if isinstance(nodes[0], SyncThreads) else "wait"
    waits = [n for n in nodes if isinstance(n, Gemm)]
    if waits and all(is_async_step(n) or is_scalar(n) for n in nodes):
        nodes = tuple(waits)
    node = nodes[0]
    if isinstance(node, OneThread):
        brought = dict.fromkeys(n.dst.buffer.name for n in walk(nodes) if isinstance(n, Copy))
        return "_".join(["bring", *brought])
    if isinstance(node, Control):
        return str(node.op.value)
    if isinstance(node, Copy):
        return f"copy_{node.src.buffer.name}_{node.dst.buffer.name}"
    if isinstance(node, Fill):
        return f"fill_{node.dst.buffer.name}"
    if isinstance(node, Gemm):
        return f"gemm_{node.a.buffer.name}_{node.b.buffer.name}"
    if isinstance(node, Reduce):
        what = "reduce" if node.step is Step.WHOLE else f"reduce_{node.step.value}"
        return f"{what}_{node.kind}_{node.src.buffer.name}_{node.dst.buffer.name}"
    if isinstance(node, Scan):
        what = node.call[2:] if node.step is Step.WHOLE else f"{node.call[2:]}_{node.step.value}"
        return f"{what}_{node.dst.buffer.name}"
    if isinstance(node, ClusterReduce):
        what = "reduce" if node.step is Step.WHOLE else node.step.value
        return f"cluster_{what}_{node.kind}_{node.tile.buffer.name}"
    if isinstance(node, ClusterScatter):
        what = "reduce_scatter" if node.step is Step.WHOLE else node.step.value
        return f"cluster_{what}_{node.kind}_{node.src.buffer.name}_{node.dst.buffer.name}"
    if isinstance(node, ClusterGather):
        what = "gather" if node.step is Step.WHOLE else node.step.value
        return f"cluster_{what}_{node.src.buffer.name}_{node.dst.buffer.name}"
    if isinstance(node, SyncThreads):
        return "sync"
    written = dict.fromkeys(b.name for n in walk(nodes) for b in n.writes)
    kind = "parallel" if isinstance(node, Parallel) else "scalars" if is_scalar(node) else "block"
    return "_".join([kind, *list(written)[:3]])
