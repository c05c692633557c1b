"""Divides the iterations of a loop that sums into accumulators among the blocks of a cluster, and
what follows it too: each block adds up some columns of the sums and finishes these.

Knows which work after the loop is done element by element, so that it can be divided, and where
sums may come. Does not know how blocks exchange what they have, nor whether it pays.

Where the last of several blocks adds up all sums (`split`), they go through memory that the runtime
keeps, and then one block works alone; here each receives what it adds, at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tilejit.dtypes import int32
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope, whole
from tilejit.ir.expr import Expr, Var, VarKind, arith, const, index, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Body,
    For,
    If,
    Load,
    Node,
    Parallel,
    Store,
    all_reads,
    all_writes,
    walk,
)
from tilejit.ir.substitution import substituted
from tilejit.ir.sync import BarrierArrive, BarrierWait, SyncThreads
from tilejit.ops.cluster import MOST_BLOCKS, ClusterScatter
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import ReduceKind
from tilejit.passes.channels import barriers
from tilejit.passes.rowwise import is_elementwise
from tilejit.passes.split import Splittable, share_of, splittable
from tilejit.target import Feature, Target

COLUMNS = 8  # that a block has at least, and in whole groups: a thread stores 16 bytes of 16 bits


@dataclass(frozen=True)
class _Work:
    """What follows the loop. loops: those over the accumulators' elements; others stay."""

    nodes: tuple[Node, ...]
    loops: dict[Node, Parallel]
    fragments: tuple[Buffer, ...]  # whose elements lie as the accumulators'


def why_whole(kernel: Kernel, found: Splittable, target: Target) -> str:
    """Why blocks cannot finish parts of the tile each; "" where they can."""
    if not target.has(Feature.CLUSTER, Feature.MBARRIER_TX):
        return f"{target.name} has no clusters"
    if kernel.given.cluster is not None:
        return "T.Kernel gives the clusters"
    work = _divided(kernel, found)
    return work if isinstance(work, str) else ""


def divides(found: Splittable, blocks: int) -> bool:
    """Whether so many blocks can share out the accumulators' columns."""
    each = {b.extents[-1] for b in found.accumulators}
    return 1 < blocks <= MOST_BLOCKS and all(n % (blocks * COLUMNS) == 0 for n in each)


def _divided(kernel: Kernel, found: Splittable) -> _Work | str:
    """The work after the loop as loops over elements, and what no element concerns."""
    first = found.accumulators[0]
    if first.rank != 2 or any(b.extents != first.extents for b in found.accumulators):
        return "accumulators are of several shapes"
    after = kernel.body[found.place + 1 :]
    tiles = {b.root for n in walk(found.loop.body) if isinstance(n, Copy) for b in n.writes}
    around = (*kernel.body[: found.place], *after)
    if any({b.root for b in all_reads(n) | all_writes(n)} & tiles for n in around):
        return "tiles of the loop are used outside of it"  # where their memory is needed
    aliases = Aliases(kernel)
    fragments: dict[Buffer, None] = dict.fromkeys(found.accumulators)
    loops: dict[Node, Parallel] = {}
    for node in after:
        if not (all_reads(node) | all_writes(node)) & fragments.keys():
            if any(b.root.scope is Scope.GLOBAL for b in all_writes(node)):
                return "after the loop each block would write what is none of its columns"
            continue
        loop = as_parallel(node) if _is_plain(node) else None
        if loop is None or not is_elementwise(loop, first):
            return "after the loop more is done than element by element"
        column = loop.vars[1]
        for inner in walk(loop.body):
            if isinstance(inner, Store) and inner.buffer.root.scope is Scope.SHARED:
                return "after the loop elements go to shared memory"
            if not isinstance(inner, Load | Store) or inner.buffer.scope is not Scope.FRAGMENT:
                continue
            if inner.buffer.extents == first.extents:
                fragments.setdefault(inner.buffer)
            elif any(column in variables(e) for e in inner.index):
                return f"{inner.buffer.name} has an element a column, which registers cannot divide"
        loops[node] = loop
    made = {b for b in fragments if b not in found.accumulators}
    outside = [n for n in (*kernel.body[: found.place + 1], *after) if n not in loops]
    if any((all_reads(n) | all_writes(n)) & made for n in outside):
        return "a fragment that is used element by element is used otherwise too"
    written = [(n, {aliases.of(b) for b in _of_memory(all_writes(n))}) for n in loops]
    for node, tensors in written:
        for other in (n for n in after if n is not node):
            for verb, buffers in (("read", all_reads(other)), ("written", all_writes(other))):
                if {aliases.of(b) for b in _of_memory(buffers)} & tensors:
                    return f"after the loop elements are {verb} that another block may have written"
    return _Work(after, loops, tuple(fragments))


def _is_plain(node: Node) -> bool:
    if isinstance(node, Copy):
        return node.combine is None and node.prefer is None and not node.is_async
    return isinstance(node, Parallel | Fill)


def _of_memory(buffers: Iterable[Buffer]) -> list[Buffer]:
    return [b for b in buffers if b.root.scope is Scope.GLOBAL]


def share_out(kernel: Kernel, blocks: int) -> Kernel:
    """The kernel whose splittable loop, and what follows it, is done by `blocks` blocks a tile."""
    found = splittable(kernel)
    assert isinstance(found, Splittable) and divides(found, blocks), found
    work = _divided(kernel, found)
    assert isinstance(work, _Work), work
    part = Var("part", int32, VarKind.BLOCK, index(0), index(blocks - 1))
    parts = {b: _part_of(b, blocks) for b in work.fragments}
    body = [*kernel.body[: found.place], share_of(found.loop, part, blocks)]
    body += _exchange(found, parts)
    for node in work.nodes:
        loop = work.loops.get(node)
        body.append(node if loop is None else _of_part(loop, part, parts))
    x, y, z = (blocks if axis == len(kernel.grid) else 1 for axis in range(3))
    return replace(
        kernel,
        grid=(*kernel.grid, index(blocks)),
        block_vars=(*kernel.block_vars, part),
        body=tuple(body),
        parts=blocks,
        is_shared_out=True,
        cluster=(x, y, z),
        notes=(
            *kernel.notes,
            f"{blocks} blocks a tile, a cluster, share its iterations; each adds up its columns of "
            "their sums",
        ),
    )


def _exchange(found: Splittable, parts: Mapping[Buffer, Buffer]) -> list[ClusterScatter]:
    """Each block's columns of the sums; parts: the fragments for them."""
    kind, span = ReduceKind.SUM, found.loop.span
    pairs = [(whole(b), whole(parts[b])) for b in found.accumulators]
    return [ClusterScatter(src=src, dst=dst, kind=kind, span=span) for src, dst in pairs]


def _part_of(buffer: Buffer, blocks: int) -> Buffer:
    """The fragment for a block's columns of a fragment."""
    rows, columns = buffer.extents
    return Buffer(
        name=f"{buffer.name}_part",
        shape=(index(rows), index(columns // blocks)),
        dtype=buffer.dtype,
        scope=Scope.FRAGMENT,
        span=buffer.span,
    )


def _of_part(loop: Parallel, part: Var, parts: Mapping[Buffer, Buffer]) -> Parallel:
    """The iterations of an elementwise loop that belong to a block's columns."""
    rows, columns = next(iter(parts.values())).extents
    i, j = loop.vars
    inner = Var(j.name, j.dtype, j.kind, index(0), index(columns - 1))
    body = _redirected(loop.body, (i, inner), parts)
    at: Expr = arith("add", arith("mul", part, columns), inner)
    return replace(loop, vars=(i, inner), extents=(rows, columns), body=substituted(body, {j: at}))


def _redirected(body: Body, at: tuple[Var, ...], parts: Mapping[Buffer, Buffer]) -> Body:
    """The body whose accesses to fragments are to their parts."""
    result: list[Node] = []
    for node in body:
        fresh = node.with_bodies(*(_redirected(b, at, parts) for b in node.bodies))
        if isinstance(fresh, Load | Store) and fresh.buffer in parts:
            fresh = replace(fresh, buffer=parts[fresh.buffer], index=at)
        result.append(fresh)
    return tuple(result)


# ---- where sums come -----------------------------------------------------------------------------


def shared_copies(kernel: Kernel, brought: Sequence[Copy]) -> list[Copy]:
    """What is brought in the loop whose iterations blocks share."""
    loops = (n for n in kernel.body if isinstance(n, For))
    loop = next(n for n in loops if any(isinstance(m, Gemm) for m in walk(n.body)))
    inside = set(walk(loop.body))
    return [c for c in brought if c in inside]


def over_tiles(kernel: Kernel, brought: Sequence[Copy]) -> tuple[Buffer, ...]:
    """The memory where the sums of other blocks come, which can be that of the loop's tiles, where
    these are brought: they are used nowhere else."""
    if not kernel.is_shared_out or not shared_copies(kernel, brought):
        return ()
    exchanges = (n for n in kernel.body if isinstance(n, ClusterScatter))
    return tuple(dict.fromkeys(n.scratch for n in exchanges if n.scratch is not None))


def once_tiles_are_used(kernel: Kernel, body: Body, thread: Var) -> Body:
    """The consumers' work, which waits before the first exchange until consumers of all blocks of
    the cluster have used all their tiles. thread: the number of a consumer's thread."""
    blocks, zero = kernel.cluster_size, const(0, int32)
    used = barriers("tiles_used", 1, blocks)
    arrive = BarrierArrive(barrier=used, slot=zero, cta=thread)
    waiting: list[Node] = [
        SyncThreads(inserted=True),
        If(condition=arith("lt", thread, blocks), then=(arrive,)),
        BarrierWait(barrier=used, slot=zero, parity=zero),
    ]
    at = next(k for k, n in enumerate(body) if isinstance(n, ClusterScatter))
    return (*body[:at], *waiting, *body[at:])
