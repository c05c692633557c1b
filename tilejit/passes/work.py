"""How long a multiprocessor's threads are busy with elementwise code.

Knows about how many instructions expressions take. Does not know what runs beside them.
"""

from __future__ import annotations

import math

from tilejit.ir.expr import MATH, Expr, Op, variables, walk
from tilejit.ir.node import For, If, Load, Node, Parallel
from tilejit.ir.node import walk as walk_nodes
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.reduce import Reduce
from tilejit.ops.scan import Scan
from tilejit.passes.nominal import nominal

LANES = 128  # instructions of threads that a multiprocessor starts in a clock
SCAN_STEPS = 4  # instructions for an element of a scan
MATH_LANES = 16  # the same of its special function units
_FREE = frozenset(("cast", "bitcast"))  # mostly part of something else


def work_clocks(node: Node) -> float:
    """Of a node outside of memory: a loop over a tile, a reduction, a copy between fragments, or
    rounds of these; of a branch, its shorter way, where masks are left out."""
    if isinstance(node, If):
        return min(sum(map(work_clocks, body)) for body in node.bodies)
    if isinstance(node, For):
        rounds = max(0.0, (nominal(node.stop) - nominal(node.start)) / node.step)
        return rounds * sum(map(work_clocks, node.body))
    if isinstance(node, Parallel):
        return math.prod(node.extents) * _clocks_of_iteration(node)
    if isinstance(node, Reduce):
        return math.prod(node.src.extents) / LANES
    if isinstance(node, Scan):
        return SCAN_STEPS * math.prod(node.src.extents) / LANES
    if isinstance(node, Copy) and node.is_trade:
        return 0.75 * math.prod(node.dst.extents) / LANES  # four permutations, two shuffles for 8
    if isinstance(node, Copy):
        return math.prod(node.dst.extents) / (2 * LANES)  # two of 16 bits at once
    if isinstance(node, Fill):
        return math.prod(node.dst.extents) / LANES
    return 0.0


def _clocks_of_iteration(loop: Parallel) -> float:
    """Of what differs along the loop's last dimension; the rest is done once a row."""
    inner: set[Expr] = {loop.vars[-1]}
    simple = special = 0
    for node in walk_nodes(loop.body):
        used = {v for e in node.exprs for v in variables(e)}
        if isinstance(node, Load) and used & inner:
            inner.add(node.out)
        for expr in {e for whole in node.exprs for e in walk(whole)}:
            if isinstance(expr, Op) and expr.op not in _FREE and variables(expr) & inner:
                if expr.op in MATH:
                    special += 1
                else:
                    simple += 1
    return simple / LANES + special / MATH_LANES
