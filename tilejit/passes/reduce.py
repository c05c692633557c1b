"""Reductions: tiles that are no fragments go through fragments, and axes that span warps through
shared memory; what blocks exchange likewise.

Knows what a reduction asks of its fragments' layouts. Does not know PTX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import Var, index
from tilejit.ir.loops import accesses
from tilejit.ir.node import Body, Node
from tilejit.isa.atom import CopyAtom, CopyMethod
from tilejit.layout.fragment import FragmentLayout
from tilejit.layout.reduction import Reduction
from tilejit.ops.cluster import ClusterGather, ClusterReduce, ClusterScatter
from tilejit.ops.copy import Copy
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.reduce import Reduce

WIDEST_BYTES = 16  # of a thread's load (PTX ISA, "ld")


def in_fragments(node: Reduce | ClusterGather | ClusterScatter) -> list[Node]:
    """The node from a whole fragment to a whole fragment, with the copies that it takes."""
    before: list[Node] = []
    after: list[Node] = []
    source, target = node.src, node.dst
    if not _is_fragment(source):
        source = _fragment_for(source, "held")
        before.append(by_registers(node.src, source, node))
    if not _is_fragment(target):
        target = _fragment_for(target, "gathered" if isinstance(node, ClusterGather) else "reduced")
        if isinstance(node, Reduce) and not node.clear:
            before.append(by_registers(node.dst, target, node))
        after.append(by_registers(target, node.dst, node))
    return [*before, replace(node, src=source, dst=target), *after]


def combined_in_fragment(node: ClusterReduce) -> list[Node]:
    """The same of a tile that blocks of a cluster combine."""
    if _is_fragment(node.tile):
        return [node]
    held = _fragment_for(node.tile, "held")
    fetch, keep = by_registers(node.tile, held, node), by_registers(held, node.tile, node)
    return [fetch, replace(node, tile=held), keep]


def _is_fragment(region: Region) -> bool:
    return region.buffer.scope is Scope.FRAGMENT and region.is_whole


def _fragment_for(region: Region, suffix: str) -> Region:
    """A whole fragment of the region's shape."""
    like = region.buffer
    return whole(
        Buffer(
            name=f"{like.name}_{suffix}",
            shape=tuple(index(n) for n in region.shape),
            dtype=like.dtype,
            scope=Scope.FRAGMENT,
            span=like.span,
        )
    )


def by_registers(source: Region, target: Region, node: Node) -> Copy:
    """A copy by the block's threads, on behalf of a node."""
    atom = CopyAtom(CopyMethod.REGISTERS, 1)
    return Copy(src=source, dst=target, atom=atom, span=node.span)


def shared_scratch(like: Buffer) -> Buffer:
    """A shared buffer that a fragment can be copied to."""
    return Buffer(
        name=f"{like.name}_shared",
        shape=like.shape,
        dtype=like.dtype,
        scope=Scope.SHARED,
        span=like.span,
    )


def result_layout(
    node: Reduce | ClusterGather, layouts: Mapping[Buffer, FragmentLayout]
) -> FragmentLayout | None:
    """Where the result is, once it is known where its elements are; what is gathered is where the
    block's own part is."""
    source = layouts.get(node.src.buffer)
    if source is None or source.flat:
        return None
    if isinstance(node, ClusterGather):
        return source.lengthened(node.dst.shape[-1])
    return node.reduction(source).result


def parts_at_once(into: Iterable[Reduce], layouts: Mapping[Buffer, FragmentLayout]) -> int | None:
    """Of results of reductions into one fragment, of how many neighbours one load brings all parts;
    None unless all of them, as far as is known, come through shared memory."""
    found: list[int] = []
    for node in into:
        source = layouts.get(node.src.buffer)
        if source is None:
            continue
        groups = 1 if source.flat else node.reduction(source).groups
        if groups == 1:
            return None
        found.append(max(1, WIDEST_BYTES // (groups * node.accumulator.bytes)))
    return min(found, default=None)


def stands_alone(result: Buffer, body: Body) -> bool:
    """Whether a reduction's result is used nowhere but element by element, in loops over all of
    it."""
    for node in body:
        loop = as_parallel(node)
        if loop is not None:
            indexes = [at for _, buffer, at in accesses(loop) if buffer is result]
            if any({v for v in at if isinstance(v, Var)} != set(loop.vars) for at in indexes):
                return False
            continue
        is_made = isinstance(node, Reduce) and node.src.buffer is not result
        if not is_made and result in (*node.reads, *node.writes):
            return False
        if not all(stands_alone(result, inner) for inner in node.bodies):
            return False
    return True


def axis_of(reductions: Iterable[Reduce], buffers: Iterable[Buffer]) -> int | None:
    """The axis along which the first of the fragments that is reduced is, None where none is."""
    wanted = set(buffers)
    return next((n.axis for n in reductions if n.src.buffer in wanted), None)


def with_scratch(node: Reduce, reduction: Reduction) -> Reduce:
    """The reduction with shared memory for the parts of its results, where it takes any."""
    if reduction.groups == 1:
        return node
    scratch = Buffer(
        name=f"{node.dst.buffer.name}_parts",
        shape=tuple(index(n) for n in reduction.partials.shape),
        dtype=node.accumulator,
        scope=Scope.SHARED,
        span=node.span,
    )
    return replace(node, scratch=scratch)


def note_of(node: Reduce, reduction: Reduction) -> str:
    """What explain() says of the reduction."""
    held, lanes, groups = reduction.registers, reduction.lanes, reduction.groups
    how = [f"{held} register{'s' if held > 1 else ''} a result"]
    if lanes > 1:
        how.append(f"{lanes} lanes by shuffles")
    if groups > 1:
        what = "warps" if reduction.is_by_warps else "threads"
        how.append(f"{groups} {what} through shared memory")
    return f"reduce_{node.kind} {node.src.buffer.name} -> {node.dst.buffer.name}: " + ", ".join(how)
