"""Which products have their columns in the order that the next multiply wants them in.

Knows which fragments are used element by element together, and what the tensor memory accelerator
can bring in another order. Does not know layouts of fragments or how boxes are cut.

An 8-bit left operand is held by fours of neighbours, a product by pairs: lanes would have to trade.
But which column is which is decided by the rows of the right operand: stored with two of every four
rows in one half and two in the other, which takes two boxes instead of one, they make a product
that is held by fours too.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.ir.analysis import divisor
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr
from tilejit.ir.kernel import Kernel
from tilejit.ir.loops import accesses
from tilejit.ir.node import Node, rewrite, walk
from tilejit.isa.atom import WgmmaAtom
from tilejit.ops.copy import Copy
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm
from tilejit.passes.tma import MAX_RANK, multiples_of

FOUR = 4  # neighbours that a lane holds of an 8-bit operand
UNIT = 32  # columns of a product that the halves divide evenly: whole swizzles of rows in each


def halve_operands(kernel: Kernel) -> Kernel:
    """Decide which right operands are stored in halves.

    Needs: atoms. Decides: `WgmmaAtom.halved`.
    """
    gemms = [n for n in walk(kernel.body) if isinstance(n, Gemm)]
    again = [n.a.buffer for n in gemms if _takes_fours(n)]
    if not again:
        return kernel
    together = _Together(kernel)
    fits = _Fits(kernel)
    chosen: set[Gemm] = set()
    for buffer in again:
        made = [n for n in gemms if together.are(buffer, n.acc.buffer)]
        if made and all(fits(n) for n in made):
            chosen |= set(made)
    chosen = _whole(chosen, gemms)
    if not chosen:
        return kernel

    def visit(node: Node) -> Node:
        if not isinstance(node, Gemm) or node not in chosen:
            return node
        assert isinstance(node.atom, WgmmaAtom)
        return replace(node, atom=replace(node.atom, halved=True))

    notes = [
        f"{n.b.buffer.name}: two of every four rows in each half, so that {n.acc.buffer.name} lies "
        "as the next multiply takes it"
        for n in gemms
        if n in chosen
    ]
    body = rewrite(kernel.body, visit)
    return replace(kernel, body=body, notes=(*kernel.notes, *dict.fromkeys(notes)))


def _takes_fours(node: Gemm) -> bool:
    a = node.a.buffer
    is_held = a.scope is Scope.FRAGMENT and not node.transpose_a
    return is_held and a.dtype.bits == 8 and isinstance(node.atom, WgmmaAtom)


def _whole(chosen: set[Gemm], gemms: list[Gemm]) -> set[Gemm]:
    """Those whose operand and product other multiplies use alike."""
    while True:
        rest = [n for n in gemms if n not in chosen]
        others = {b.root for n in rest for b in (n.a.buffer, n.b.buffer, n.acc.buffer)}
        left = {n for n in chosen if not {n.b.buffer.root, n.acc.buffer.root} & others}
        if left == chosen:
            return left
        chosen = left


class _Together:
    """Which fragments loops use element by element with which others."""

    def __init__(self, kernel: Kernel) -> None:
        self.group: dict[Buffer, set[Buffer]] = {}
        for node in walk(kernel.body):
            loop = as_parallel(node)
            used: dict[tuple[Expr, ...], set[Buffer]] = {}
            for _, buffer, at in accesses(loop) if loop is not None else ():
                if buffer.scope is Scope.FRAGMENT:
                    used.setdefault(at, set()).add(buffer)
            for same in used.values():
                joined = set().union(*(self.group.get(b, {b}) for b in same))
                self.group |= dict.fromkeys(joined, joined)

    def are(self, one: Buffer, other: Buffer) -> bool:
        return other in self.group.get(one, {one})


class _Fits:
    """Whether the columns of a product can be had in that order."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.nodes = list(walk(kernel.body))
        self.multiples = multiples_of(kernel)

    def __call__(self, node: Gemm) -> bool:
        atom, b = node.atom, node.b
        if not isinstance(atom, WgmmaAtom) or atom.columns * atom.groups_n != 1:
            return False
        if not node.transpose_b or node.n % UNIT or not b.is_whole or b.buffer.rank != 2:
            return False
        if not node.acc.is_whole or b.buffer in self.kernel.given.layouts:
            return False
        readers = [n for n in self.nodes if b.buffer in (x.root for x in n.reads)]
        writers = [n for n in self.nodes if b.buffer in (x.root for x in n.writes)]
        return all(isinstance(n, Gemm) for n in readers) and all(map(self._brings, writers))

    def _brings(self, node: Node) -> bool:
        """Whether boxes can bring the tile in halves: whole fours of rows, of a tensor that may
        have a dimension more."""
        if (
            not isinstance(node, Copy)
            or not node.is_tma
            or node.src.buffer.scope is not Scope.GLOBAL
            or not node.dst.is_whole
        ):
            return False
        tensor, kept = node.src.buffer, node.src.kept
        row = kept[-2]
        number = divisor(node.src.starts[row], self.multiples)
        extent = divisor(tensor.shape[row], self.kernel.multiples)
        is_plain = tensor.rank < MAX_RANK and tensor.section is None
        return is_plain and number % FOUR == 0 and extent % FOUR == 0
