"""Lets a multiply begin with its product where its accumulator was only just filled with zeros.

Knows fills, multiplies and what lies between them. Does not know instructions: each has a way to
begin without a sum.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import is_const
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, Node, all_reads, all_writes
from tilejit.ops.copy import Fill
from tilejit.ops.gemm import Gemm


def fold_clears(kernel: Kernel) -> Kernel:
    """Turn a fill of zeros whose only user is the next multiply into that multiply's `clear`.

    Needs: shapes. Decides: `Gemm.clear` of those, whose fills go away: an instruction that begins
    without a sum needs no zeros in its registers. Leaves everything else alone.
    """
    return replace(kernel, body=_folded(kernel.body))


def _folded(body: Body) -> Body:
    result: list[Node] = []
    for node in body:
        node = node.with_bodies(*map(_folded, node.bodies))
        if isinstance(node, Gemm) and _adds_to_all(node):
            place = _cleared_at(result, node.acc.buffer)
            if place is not None:
                del result[place]
                node = replace(node, clear=True)
        result.append(node)
    return tuple(result)


def _adds_to_all(node: Gemm) -> bool:
    operands = {node.a.buffer.root, node.b.buffer.root}
    return not node.clear and node.acc.is_whole and node.acc.buffer.root not in operands


def _cleared_at(before: list[Node], buffer: Buffer) -> int | None:
    """The place of the last node that touches the buffer, if it fills all of it with zeros."""
    for place in range(len(before) - 1, -1, -1):
        node = before[place]
        if buffer.root not in {b.root for b in all_reads(node) | all_writes(node)}:
            continue
        is_clear = isinstance(node, Fill) and is_const(node.value, 0) and node.dst.is_whole
        return place if is_clear and node.writes == (buffer,) else None
    return None
