"""Elementwise work on an accumulator, done for one row of each warpgroup's instructions at a time.

Knows which nodes do to each element what they do to all, and which registers a row has. Does not
know when rows are complete, nor why one is wanted before the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tilejit.dtypes import int32
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, index
from tilejit.ir.node import If, Let, Load, Node, Parallel, Store, all_reads, all_writes, walk
from tilejit.ir.substitution import substituted
from tilejit.isa.atom import WgmmaAtom
from tilejit.layout.fragment import FragmentLayout
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.elementwise import as_parallel
from tilejit.passes.skew import again
from tilejit.passes.wgmma import ROWS

_PLAIN = (Let, Load, Store, If)
_MOVED = (Let, Load, Parallel, Copy, Fill)


def parted(
    nodes: Sequence[Node],
    acc: Buffer,
    aliases: Aliases,
    layouts: Mapping[Buffer, FragmentLayout] | None = None,
) -> tuple[list[Node], list[Parallel]] | None:
    """Nodes that follow the multiplies of `acc`, as those that need none of its elements, which can
    come first, and elementwise loops over all; None where they are something else.

    layouts: of fragments; None before they are known, when any are taken to fit.
    """
    first: list[Node] = []
    loops: list[Parallel] = []
    carried = {acc}  # fragments whose elements lie as the accumulator's
    used: set[Buffer] = set()  # by the loops, as the buffers that stand for them
    for node in nodes:
        reads, writes = all_reads(node), all_writes(node)
        if not (reads | writes) & carried:
            if not isinstance(node, _MOVED) or {aliases.of(b) for b in writes} & used:
                return None
            first.append(node)
            continue
        loop = as_parallel(node) if isinstance(node, Parallel | Copy) else None
        if loop is None or not is_elementwise(loop, acc, layouts):
            return None
        if any(b.scope is not Scope.FRAGMENT for b in all_writes(loop)):
            return None
        carried |= all_writes(loop)
        used |= {aliases.of(b) for b in reads | writes}
        loops.append(loop)
    return first, loops


def is_elementwise(
    loop: Parallel, acc: Buffer, layouts: Mapping[Buffer, FragmentLayout] | None = None
) -> bool:
    """Whether each iteration reads and writes its own element of matrices that lie as `acc` does,
    and of other fragments only reads."""
    if loop.extents != acc.extents or loop.coalesced_width is not None:
        return False
    if layouts is not None and loop.layout is not None and loop.layout != layouts[acc]:
        return False
    for node in walk(loop.body):
        if not isinstance(node, _PLAIN):
            return False
        if isinstance(node, Load | Store) and node.buffer.scope is Scope.FRAGMENT:
            is_alike = node.buffer.extents == acc.extents
            if is_alike and layouts is not None:
                is_alike = layouts[node.buffer] == layouts[acc]
            if is_alike and tuple(node.index) != tuple(loop.vars):
                return False
            if not is_alike and (isinstance(node, Store) or node.buffer.extents == acc.extents):
                return False
    return True


def of_row(loop: Parallel, row: int, atom: WgmmaAtom, layout: FragmentLayout) -> Parallel:
    """The iterations of an elementwise loop that belong to a row of each warpgroup's instructions;
    layout: of the whole."""
    columns = loop.extents[1] // atom.groups_n
    extents = (atom.groups_m, atom.groups_n, ROWS, columns)
    d, g, i, j = variables = tuple(
        Var(name, int32, VarKind.PARALLEL, index(0), index(n - 1))
        for name, n in zip("dgij", extents, strict=True)
    )
    down = arith("add", arith("mul", d, atom.rows * ROWS), arith("add", i, row * ROWS))
    across = arith("add", arith("mul", g, columns), j)
    mapping: dict[Var, Expr] = dict(zip(loop.vars, (down, across), strict=True))
    mapping |= {v: again(v) for n in walk(loop.body) for v in n.defines}
    # (groups_m, rows, ROWS, groups_n, columns)
    held = layout.split(0, ROWS).split(0, atom.rows).split(3, columns)
    return Parallel(
        vars=variables,
        extents=extents,
        body=substituted(loop.body, mapping),
        layout=held.project((0, 3, 2, 4)),
        span=loop.span,
    )
