"""How many teams of consumers take turns at a block's tiles, so that one multiplies while another
stores its results.

Knows what a tile needs of a block that teams would share. Does not know roles or barriers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tilejit.ir.buffer import Scope
from tilejit.ir.expr import Expr, VarKind, arith, index, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, Node, walk
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Reduce
from tilejit.ops.scan import Scan
from tilejit.passes.nominal import nominal
from tilejit.passes.registers import GROUP, SPARE_REGISTERS, consumer_registers

TEAMS = 2
FEWEST_TILES = 2  # of a block, for teams to have turns


def team_count(kernel: Kernel, brought: Sequence[Copy]) -> int:
    """Two where one warpgroup works on a tile and does little but multiply, blocks have several,
    and the teams would share nothing but what is brought for them; else one.

    Needs: atoms, layouts.
    """
    assert kernel.target is not None, "select did not run"
    if kernel.num_threads != GROUP or kernel.given.keeps_registers:
        return 1
    if set(kernel.shared) - {c.dst.buffer for c in brought}:
        return 1
    if not all(c.dst.is_whole for c in brought):
        return 1  # how often a piece is brought is not how often its tile is
    gemms = [n for n in walk(kernel.body) if isinstance(n, Gemm)]
    if not gemms or not all(n.is_async for n in gemms) or not may_take_turns(kernel):
        return 1
    return TEAMS if all(times(kernel.body, c) is not None for c in brought) else 1


def may_take_turns(kernel: Kernel) -> bool:
    """Whether blocks have several tiles, registers are enough for two teams, and a team would not
    reduce tiles while it has its turn."""
    assert kernel.target is not None, "select did not run"
    words = sum(math.prod(b.extents) * b.dtype.bytes / 4 for b in kernel.scoped(Scope.FRAGMENT))
    if words / GROUP > consumer_registers(TEAMS * GROUP) - SPARE_REGISTERS:
        return False
    tiles = math.prod(nominal(extent) for extent in kernel.grid)
    is_enough = tiles >= FEWEST_TILES * kernel.target.chip.multiprocessors
    return is_enough and not reduces_between(kernel)


def reduces_between(kernel: Kernel) -> bool:
    """Whether a loop reduces tiles between its multiplies: a team would keep its turn meanwhile,
    and the tensor cores would idle."""
    for loop in walk(kernel.body):
        if isinstance(loop, For):
            inside = list(walk(loop.body))
            if any(isinstance(n, Gemm) for n in inside):
                return any(isinstance(n, Reduce | Scan) for n in inside)
    return False


def times(body: Body, copy: Copy) -> Expr | None:
    """How often a copy is made for a tile, where that is the same for all tiles; else None."""
    found = next(_path(body, copy), None)
    if found is None:
        return None
    count: Expr = index(1)
    for node in found:
        if not isinstance(node, For):
            return None
        span = arith("sub", node.stop, node.start)
        if node.step < 0:
            span = arith("sub", node.start, node.stop)
        step = abs(node.step)
        each = arith("floordiv", arith("add", span, step - 1), step)
        count = arith("mul", count, arith("max", each, 0))
    same = {VarKind.SYMBOL, VarKind.SCALAR}
    return count if all(v.kind in same for v in variables(count)) else None


def _path(body: Body, copy: Copy) -> Iterator[tuple[Node, ...]]:
    """The nodes around a copy, outermost first."""
    for node in body:
        if node is copy:
            yield ()
        for inner in node.bodies:
            for path in _path(inner, copy):
                yield (node, *path)
