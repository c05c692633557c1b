"""Results that leave while the last products of their tile are worked out: in the last iterations
of a tile's loop a warpgroup works out one row of its instructions after the other, and stores each
as soon as it is complete.

Knows which products can be parted so, and in what order they and the stores begin. Does not know
how a strip is stored, nor what passes tiles between producer and consumers.

Row by row in each step of k, all rows are complete at the end of K only, and then the tensor cores
wait until everything is stored. What the order of the last iterations changes is no more than when
a row is complete: each instruction reads the operands that it reads anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, arith, cast
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, LoopKind, Node, Parallel, all_reads, all_writes, walk
from tilejit.ir.substitution import substituted
from tilejit.isa.atom import WgmmaAtom
from tilejit.layout.fragment import FragmentLayout
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.passes.bring import is_inward
from tilejit.passes.channels import Channel
from tilejit.passes.epilogue import Strips
from tilejit.passes.late import rounds_of
from tilejit.passes.pieces import only_brings
from tilejit.passes.registers import GROUP
from tilejit.passes.rowwise import of_row, parted
from tilejit.passes.skew import again

ROUNDS = 3  # iterations that are done row by row: in their time a row's results leave


@dataclass(frozen=True)
class Tail:
    """The last iterations of a loop, row by row.

    rounds: how many. first: nodes that need no product. rows: of each row of instructions what
    stores it, in pieces, of which the first does what else is done to its elements before.
    passed: the nodes of the tile's work, after the loop, in whose place all this stands.
    """

    loop: For
    rounds: int
    first: Body
    rows: tuple[tuple[Body, ...], ...]
    passed: frozenset[Node]


@dataclass(frozen=True)
class _Found:
    """A loop that works out an accumulator, and what stands between it and what stores."""

    loop: For
    gemm: Gemm
    atom: WgmmaAtom
    between: Body


def find_tail(
    kernel: Kernel, strips: Sequence[Strips], brought: Collection[Node], passed: Collection[For]
) -> Tail | None:
    """The first loop whose products leave so.

    Needs: atoms, layouts, stores in strips. brought: copies that others make. passed: loops that
    are written out in another way.
    """
    slotted = {b.root for n in brought for b in n.writes}
    for stored in strips:
        begin = next((k for k, n in enumerate(kernel.body) if n is stored.nodes[0][0]), 0)
        found = _multiplying(kernel, begin, brought)
        if found is None or found.loop in passed or found.atom.rows == 1:
            continue
        acc, source = found.gemm.acc.buffer, stored.copy.src.buffer
        layout = kernel.fragments[acc]
        parts = _in_rows(kernel, found, stored.copy, kernel.fragments)
        if parts is None or kernel.fragments[source] != layout:
            continue
        first, loops = parts
        if source not in {acc, *(b for n in loops for b in all_writes(n))}:
            continue
        others = [n for n in found.between if n not in brought]
        if any(b.root in slotted for n in others for b in all_reads(n) | all_writes(n)):
            continue  # it waits for what it reads, at a place of its own; products still read slots
        rows: dict[int, list[Body]] = {}
        for place, nodes in zip(stored.places, stored.nodes, strict=True):
            rows.setdefault(place.row, []).append(nodes)
        for row, pieces in rows.items():
            work = (of_row(loop, row, found.atom, layout) for loop in loops)
            pieces[0] = (*work, *pieces[0])
        return Tail(
            loop=found.loop,
            rounds=min(ROUNDS, rounds_of(found.loop)),
            first=tuple(n for n in first if n not in brought),
            rows=tuple(tuple(rows[row]) for row in sorted(rows)),
            passed=frozenset((*found.between, *(n for strip in stored.nodes for n in strip))),
        )
    return None


def rows_in_turn(kernel: Kernel, copy: Copy) -> int:
    """How many rows of instructions leave one after the other, of what a copy of the tile's work
    stores; 1 for other copies.

    Needs: atoms.
    """
    begin = next((k for k, n in enumerate(kernel.body) if n is copy), 0)
    brought = [n for n in walk(kernel.body) if isinstance(n, Copy) and n.is_tma and is_inward(n)]
    if not brought or copy.dst.buffer.scope is not Scope.GLOBAL:
        return 1
    found = _multiplying(kernel, begin, brought)
    if found is None or copy.src.buffer.extents != found.gemm.acc.buffer.extents:
        return 1
    return found.atom.rows if _in_rows(kernel, found, copy) else 1


def _in_rows(
    kernel: Kernel,
    found: _Found,
    stored: Copy,
    layouts: Mapping[Buffer, FragmentLayout] | None = None,
) -> tuple[list[Node], list[Parallel]] | None:
    """What stands between a loop and the copy that stores, `parted`; None where rows would not
    become what they are after the whole loop: operands stay as they are until the last row is
    multiplied, and what is stored is read by no row, for another one may have been stored before.
    """
    aliases, gemm = Aliases(kernel), found.gemm
    parts = parted(found.between, gemm.acc.buffer, aliases, layouts)
    if parts is None:
        return None
    first, loops = parts
    operands, tensor = {gemm.a.buffer.root, gemm.b.buffer.root}, aliases.of(stored.dst.buffer)
    if any(b.root in operands for n in first for b in all_writes(n)):
        return None
    return None if any(aliases.of(b) is tensor for n in loops for b in all_reads(n)) else parts


def _multiplying(kernel: Kernel, end: int, brought: Collection[Node]) -> _Found | None:
    """The last loop before a place in the tile's work, if all it does is to multiply."""
    if kernel.num_threads == GROUP:
        return None  # a warpgroup alone starts its next multiply before the last one is over
    begin = next((k for k in range(end - 1, -1, -1) if isinstance(kernel.body[k], For)), None)
    loop = kernel.body[begin] if begin is not None else None
    if begin is None or not isinstance(loop, For) or loop.kind is not LoopKind.PIPELINED:
        return None
    mine = [n for n in loop.body if not only_brings(n, brought)]
    if loop.step != 1 or not rounds_of(loop) or [type(n) for n in mine] != [Gemm, GemmWait]:
        return None
    gemm = mine[0]
    assert isinstance(gemm, Gemm)
    if not isinstance(gemm.atom, WgmmaAtom) or not _has_own_registers(gemm):
        return None
    others = [n for n in walk(kernel.body) if isinstance(n, Gemm) and n is not gemm]
    if any(n.acc.buffer.root is gemm.acc.buffer.root for n in others):
        return None
    return _Found(loop, gemm, gemm.atom, kernel.body[begin + 1 : end])


def _has_own_registers(gemm: Gemm) -> bool:
    """Whether each row of instructions has registers that nothing else of the multiply decides."""
    acc = gemm.acc.buffer
    is_plain = gemm.acc.is_whole and acc.rank == 2 and not gemm.clear
    return is_plain and gemm.a.buffer.scope is Scope.SHARED and acc.dtype.bits == 32


def shortened(tail: Tail, channels: Sequence[Channel]) -> tuple[For, int]:
    """The loop without its last iterations, and how many these are. channels: of what it brings."""
    rounds = min(tail.rounds, *(c.slots for c in channels))
    stop = arith("sub", tail.loop.stop, rounds)
    return replace(tail.loop, stop=cast(stop, tail.loop.stop.dtype)), rounds


def row_by_row(
    tail: Tail, short: For, rounds: int, inner: Body, channels: Sequence[Channel]
) -> list[Node]:
    """The last iterations row by row, with the nodes that store.

    short: the loop without them. inner: an iteration as consumers do it. channels: of what the
    loop brings.
    """
    loop = tail.loop
    begun = next(k for k, n in enumerate(inner) if isinstance(n, Gemm))
    result: list[Node] = []
    gemms: list[Gemm] = []
    left: list[Node] = []
    # how many have been used tells the next slot, and is known before this one is left
    counts = {c.used for c in channels}
    for number in range(rounds):
        mapping: dict[Var, Expr] = {v: again(v) for n in walk(inner) for v in n.defines}
        mapping[loop.var] = cast(arith("add", short.stop, number), loop.var.dtype)
        turned = substituted(inner, mapping)
        gemm, wait = turned[begun : begun + 2]
        assert isinstance(gemm, Gemm) and isinstance(wait, GemmWait) and not wait.pending
        gemms.append(gemm)
        result += [*turned[:begun], replace(gemm, row=0)]
        for node in turned[begun + 2 :]:
            is_count = bool((all_reads(node) | all_writes(node)) & counts)
            (result if is_count else left).append(node)
    result += tail.first
    acc = (gemms[0].acc.buffer,)
    for row, pieces in enumerate(tail.rows[:-1]):
        # few instructions wait for the tensor cores, and a thread at the next: it stores between
        for number, gemm in enumerate(gemms):
            result.append(replace(gemm, row=row + 1))
            if number == 0:
                done = replace(gemm, row=row)
                result.append(GemmWait(pending=1, gemm=done, registers=acc, span=loop.span))
            end = number + 1 if number + 1 < rounds else len(pieces)
            result += (n for piece in pieces[number:end] for n in piece)
    result += [GemmWait(pending=0, registers=acc, span=loop.span), *left]
    result += (n for piece in tail.rows[-1] for n in piece)
    return result
