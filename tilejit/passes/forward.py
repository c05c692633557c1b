"""Sends results that the user stages in shared memory of their own straight to their tensor: how
they leave best, strip by strip and while the next tile is multiplied, is decided later.

Knows copies and what lies between them. Does not know how results leave.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, Node, all_writes, walk
from tilejit.isa.atom import CopyMethod, WgmmaAtom
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm


def forwarded(kernel: Kernel, tiles: Collection[Buffer] = ()) -> tuple[Kernel, dict[Copy, Buffer]]:
    """The kernel with `T.copy(x, s)` and `T.copy(s, C)` as one `T.copy(x, C)`, where `x` lies as
    warpgroups hold an accumulator, nothing else uses `s` and nothing changes `x` in between; and
    those copies, with the tile that each saves.

    Needs: atoms, layouts. tiles: those that stay.
    """
    held = [
        kernel.fragments[n.acc.buffer]
        for n in walk(kernel.body)
        if isinstance(n, Gemm) and isinstance(n.atom, WgmmaAtom)
    ]
    uses: dict[Buffer, list[Node]] = {}
    for node in walk(kernel.body):
        for buffer in {b.root for b in (*node.reads, *node.writes)}:
            uses.setdefault(buffer, []).append(node)
    views = {b.root for b in kernel.buffers if b.is_view}
    kept = views | set(kernel.given.layouts) | set(kernel.slots) | set(tiles)
    fresh: dict[Copy, Buffer] = {}

    def visit(body: Body) -> Body:
        result = [node.with_bodies(*map(visit, node.bodies)) for node in body]
        for k, node in enumerate(body):
            if not isinstance(node, Copy) or not _fills(node) or node.dst.buffer in kept:
                continue
            tile, source = node.dst.buffer, node.src.buffer
            if source.rank != 2 or kernel.fragments[source] not in held:
                continue
            last = _emptied(body[k + 1 :], tile, source)
            if last is not None and uses[tile] == [node, last]:
                direct = replace(node, dst=last.dst, prefer=last.prefer, eviction=last.eviction)
                fresh[direct] = tile
                result[k], result[body.index(last)] = None, direct  # type: ignore[call-overload]
        return tuple(node for node in result if node is not None)

    body = visit(kernel.body)
    if not fresh:
        return kernel, fresh
    shared = {b: layout for b, layout in kernel.shared.items() if b not in fresh.values()}
    return replace(kernel, body=body, shared=shared), fresh


def _is_plain(node: Copy) -> bool:
    return node.combine is None and not node.is_async and node.coalesced_width is None


def _fills(node: Copy) -> bool:
    """Whether the copy fills a tile in shared memory with a fragment."""
    scopes = (node.src.buffer.scope, node.dst.buffer.scope)
    by_threads = node.atom is not None and node.atom.method is CopyMethod.REGISTERS
    is_all = node.src.is_whole and node.dst.is_whole
    is_ours = scopes == (Scope.FRAGMENT, Scope.SHARED) and node.prefer is None
    return is_ours and is_all and by_threads and _is_plain(node)


def _emptied(after: Sequence[Node], tile: Buffer, source: Buffer) -> Copy | None:
    """The copy of the whole tile to a tensor of its dtype, if the source stays as it is until
    then."""
    for node in after:
        if isinstance(node, Copy) and node.src.buffer is tile:
            target = node.dst.buffer
            is_result = target.scope is Scope.GLOBAL and target.dtype is tile.dtype
            is_all = node.src.is_whole and node.prefer in (None, "tma")
            return node if is_result and is_all and _is_plain(node) else None
        if source.root in {b.root for b in all_writes(node)}:
            return None
    return None
