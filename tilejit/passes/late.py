"""Results that leave late: kept in registers, in their tensor's type, and stored in strips while
the block multiplies its next tile.

Knows which copy can wait so long and where its strips go. Does not know how a strip is stored, nor
who multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tilejit.dtypes import bool_
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import (
    Expr,
    Op,
    Var,
    VarKind,
    arith,
    binary,
    const,
    int_value,
    substitute,
    variables,
)
from tilejit.ir.expr import walk as terms
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, If, Let, LoopKind, Node, all_reads, all_writes, walk
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.passes.bring import is_inward
from tilejit.passes.nominal import nominal
from tilejit.passes.overlap import overlaps
from tilejit.passes.registers import SPARE_REGISTERS, consumer_registers
from tilejit.passes.tiles import Walk

STRIP_ROW = 128  # bytes of a row of results that are a strip's: the widest swizzle
MOST_STRIPS = 8  # more make the kernel long
FEWEST_TILES = 2  # of a block, for one to follow another
# Functions whose polynomials' constants fill the registers beside an accumulator's
LONG_MATH = frozenset(("erf", "tan", "sin", "cos", "asin", "acos", "atan", "atan2"))


@dataclass(frozen=True)
class Late:
    """A copy that waits.

    held: the registers that keep what it copies. strips: in how many parts it is stored; strip: the
    nodes that store one, given its number and the region that the whole goes to.
    """

    copy: Copy
    held: Buffer
    strips: int
    strip: Callable[[int, Region], list[Node]]


def strip_widths(columns: int, bytes_: int) -> list[int]:
    """The columns of the strips in which an instruction's leave: of whole swizzles, and what is
    left of them in powers of two. bytes_: of an element."""
    widest = min(STRIP_ROW // bytes_, 1 << (columns.bit_length() - 1))
    widths = [widest] * (columns // widest)
    left = columns % widest
    return widths + [1 << bit for bit in reversed(range(left.bit_length())) if left >> bit & 1]


def can_wait(kernel: Kernel, copy: Copy, strips: int) -> bool:
    """Whether the copy's strips can leave during the next tile's multiplies: the copy ends the
    tile's work, nothing else reads or writes the tensor, and registers and iterations are enough.

    Needs: atoms, layouts.
    """
    assert kernel.target is not None, "select did not run"
    if kernel.body[-1] is not copy or kernel.parts > 1 or strips > MOST_STRIPS:
        return False
    if kernel.given.keeps_registers:
        return False
    sums = {n.acc.buffer for n in walk(kernel.body) if isinstance(n, Gemm)}
    if copy.src.buffer in sums and copy.src.buffer.dtype is copy.dst.buffer.dtype:
        return False  # kept in the registers that the next multiply writes, they serialise it
    if any(_is_long(e) for node in walk(kernel.body) for e in node.exprs):
        return False
    aliases = Aliases(kernel)
    tensor = aliases.of(copy.dst.buffer)
    others = {b for node in kernel.body for b in all_reads(node)}
    others |= {b for node in kernel.body[:-1] for b in all_writes(node)}
    if any(aliases.of(b) is tensor for b in others):
        return False  # tiles need no order among themselves, what a tile does to a place does
    tiles = math.prod(nominal(extent) for extent in kernel.grid)
    if tiles < FEWEST_TILES * kernel.target.chip.multiprocessors:
        return False
    loop = main_loop(kernel.body)
    if loop is None or rounds_of(loop) < strips or _values(kernel, copy.dst) is None:
        return False
    brought = [n for n in walk(kernel.body) if isinstance(n, Copy) and n.is_tma and is_inward(n)]
    if loop in overlaps(kernel, brought, slots=2):  # as there are where two fit
        return False  # its rounds have work of their own beside the multiplies
    size = sum(math.prod(b.extents) * b.dtype.bytes for b in kernel.scoped(Scope.FRAGMENT))
    size += math.prod(copy.src.extents) * copy.dst.buffer.dtype.bytes
    most = consumer_registers(kernel.num_threads) - SPARE_REGISTERS
    return size / 4 / kernel.num_threads <= most


def _is_long(e: Expr) -> bool:
    return any(isinstance(x, Op) and x.op in LONG_MATH for x in terms(e))


def main_loop(body: Body) -> For | None:
    """The first loop of a tile's work that multiplies while its threads could do something else."""
    for node in body:
        if isinstance(node, For) and _free_at(node.body) is not None:
            return node
    return None


def _free_at(body: Body) -> int | None:
    """The place in a loop's body where a multiply has begun and is not waited for yet."""
    begun = None
    for place, node in enumerate(body, 1):
        if isinstance(node, Gemm) and node.is_async:
            begun = place
        elif isinstance(node, GemmWait) and begun is not None:
            return begun
    return None


def rounds_of(loop: For) -> int:
    """How often the loop runs, if that is known."""
    start, stop = int_value(loop.start), int_value(loop.stop)
    if start is None or stop is None or loop.step < 0:
        return 0
    return max(0, -(-(stop - start) // loop.step))


def _values(kernel: Kernel, region: Region) -> list[Let] | None:
    """The values that tell where a region lies, in the order in which they are computed; None where
    more than values of the block's place tell it."""
    if region.buffer.place:  # the tensor itself lies where only the tile that is left knows
        return None
    lets = {n.var: n for n in kernel.body if isinstance(n, Let)}
    known = {VarKind.SYMBOL, VarKind.SCALAR, VarKind.THREAD, VarKind.BLOCK}
    wanted: set[Var] = set()
    left = [v for e in region.starts for v in variables(e)]
    while left:
        var = left.pop()
        if var in wanted or var in kernel.block_vars:
            continue
        if var in lets:
            wanted.add(var)
            left += variables(lets[var].value)
        elif var.kind not in known:
            return None
    return [n for n in lets.values() if n.var in wanted]


def during(late: Late, body: Body, loop: For, kernel: Kernel, walked: Walk, visit: Var) -> Body:
    """A tile's work, with the strips of the tile before in the first iterations of its loop.

    body: the work as `consumers` do it, in which `loop` has the same variable.
    """
    values, region = _elsewhere(late, kernel, walked, arith("max", arith("sub", visit, 1), 0))
    has_before = Var("has_before", bool_, VarKind.VALUE)
    is_second = binary("gt", visit, const(0, visit.dtype))
    result: list[Node] = [*values, Let(var=has_before, value=is_second)]
    for node in body:
        if isinstance(node, For) and node.var is loop.var:
            result += _opened(late, node, region, has_before)
        else:
            result.append(node)
    return tuple(result)


def after(late: Late, kernel: Kernel, walked: Walk) -> Body:
    """The last tile's strips."""
    counted: list[Node] = []
    visits = walked.visits(counted)
    values, region = _elsewhere(late, kernel, walked, arith("sub", visits, 1))
    strips = [n for number in range(late.strips) for n in late.strip(number, region)]
    condition = binary("gt", visits, const(0, visits.dtype))
    return (*counted, If(condition=condition, then=(*values, *strips), span=late.copy.span))


def _opened(late: Late, loop: For, region: Region, has_before: Var) -> list[Node]:
    """The loop's first iterations with a strip each, and the loop of the others."""
    place, result = _free_at(loop.body), list[Node]()
    assert place is not None, "the loop has waits of its own"
    start = int_value(loop.start)
    assert start is not None, "its iterations are known"
    for number in range(late.strips):
        strip = late.strip(number, region)
        stored = If(condition=has_before, then=tuple(strip), span=late.copy.span)
        first = start + number * loop.step
        result.append(
            replace(
                loop,
                start=const(first, loop.start.dtype),
                stop=const(first + loop.step, loop.start.dtype),
                kind=LoopKind.SERIAL,
                body=(*loop.body[:place], stored, *loop.body[place:]),
            )
        )
    rest = replace(loop, start=const(start + late.strips * loop.step, loop.start.dtype))
    return [*result, rest] if rounds_of(rest) else result


def _elsewhere(late: Late, kernel: Kernel, walked: Walk, visit: Expr) -> tuple[list[Node], Region]:
    """Values of another of the block's tiles, and where its results go."""
    names = {v: _fresh(v) for v in kernel.block_vars}
    mapping: dict[Var, Expr] = dict(names)
    nodes = walked.place(visit, names)
    for let in _values(kernel, late.copy.dst) or ():
        fresh = _fresh(let.var)
        nodes.append(replace(let, var=fresh, value=substitute(let.value, mapping)))
        mapping[let.var] = fresh
    region = late.copy.dst
    starts = tuple(substitute(e, mapping) for e in region.starts)
    return nodes, Region(region.buffer, starts, region.extents, region.dropped)


def _fresh(var: Var) -> Var:
    return Var(f"{var.name}_late", var.dtype, VarKind.VALUE, var.low, var.high)
