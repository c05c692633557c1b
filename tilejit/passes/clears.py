"""Lets a multiply begin with its product where its accumulator was only just filled with zeros,
always or in one branch.

Knows fills, multiplies and what lies between them. Does not know instructions: each has a way to
begin without a sum, and those of warpgroups one to begin so or not.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, is_const, unary
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, If, Node, Store, all_reads, all_writes
from tilejit.isa.atom import WgmmaAtom
from tilejit.ops.copy import Fill
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm


def fold_clears(kernel: Kernel) -> Kernel:
    """Turn a fill of zeros whose only user is the next multiply into that multiply's `clear`.

    Needs: atoms. Decides: `Gemm.clear` of those, whose fills go away: an instruction that begins
    without a sum needs no zeros in its registers; and `Gemm.begins` where the zeros stand in one
    branch (the tile's that needs no mask, say). Leaves everything else alone.
    """
    return replace(kernel, body=_folded(kernel.body))


def drop_zeros(kernel: Kernel) -> Kernel:
    """Leave out the zeros in a branch where the next multiply begins without them.

    Needs: roles, and rounds that overlap: until they are planned the branch shows that each round
    fills the accumulator anew. Leaves everything else alone.
    """
    return replace(kernel, body=_dropped(kernel.body))


def _folded(body: Body) -> Body:
    result: list[Node] = []
    for node in body:
        node = node.with_bodies(*map(_folded, node.bodies))
        if isinstance(node, Gemm) and _adds_to_all(node):
            place = _touched_at(result, node.acc.buffer)
            if place is not None and _is_zero(result[place], node.acc.buffer):
                del result[place]
                node = replace(node, clear=True)
            elif place is not None and isinstance(node.atom, WgmmaAtom):
                node = replace(node, begins=_when_zero(result[place], node.acc.buffer))
        result.append(node)
    return tuple(result)


def _dropped(body: Body) -> Body:
    result: list[Node] = []
    for node in body:
        node = node.with_bodies(*map(_dropped, node.bodies))
        if isinstance(node, Gemm) and node.begins is not None and node.is_async:
            place = _touched_at(result, node.acc.buffer)
            branch = None if place is None else result[place]
            if isinstance(branch, If) and _when_zero(branch, node.acc.buffer) is node.begins:
                assert place is not None
                is_then = branch.condition is node.begins
                bodies = ((), branch.orelse) if is_then else (branch.then, ())
                result[place] = branch.with_bodies(*bodies)
        result.append(node)
    return tuple(result)


def _adds_to_all(node: Gemm) -> bool:
    operands = {node.a.buffer.root, node.b.buffer.root}
    return not node.clear and node.acc.is_whole and node.acc.buffer.root not in operands


def _touched_at(before: list[Node], buffer: Buffer) -> int | None:
    """The place of the last node that touches the buffer."""
    for place in range(len(before) - 1, -1, -1):
        node = before[place]
        if buffer.root in {b.root for b in all_reads(node) | all_writes(node)}:
            return place
    return None


def _is_zero(node: Node, buffer: Buffer) -> bool:
    """Whether the node does nothing but fill all of the buffer with zeros."""
    loop = as_parallel(node)
    if loop is None or all_writes(node) != {buffer} or len(loop.body) != 1:
        return False
    (store,) = loop.body
    if not isinstance(store, Store) or not is_const(store.value, 0):
        return False
    if isinstance(node, Fill):
        return node.dst.is_whole
    return loop.extents == buffer.extents and store.index == loop.vars


def _when_zero(node: Node, buffer: Buffer) -> Expr | None:
    """When a branch does nothing but that; None where it never does, or other nodes."""
    if not isinstance(node, If):
        return None
    if len(node.then) == 1 and _is_zero(node.then[0], buffer):
        return node.condition
    if len(node.orelse) == 1 and _is_zero(node.orelse[0], buffer):
        return unary("not", node.condition)
    return None
