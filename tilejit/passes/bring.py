"""Which copies into shared memory producer threads can make, and what uses what they bring.

Knows what a copy's place and source depend on, and where its tile is read. Does not know
instructions, slots or barriers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, If, Let, Load, Node, all_reads, all_writes, walk
from tilejit.ops.copy import Copy
from tilejit.passes.pieces import filled_in, misplaced, reads


def is_inward(node: Node) -> bool:
    """True for a copy from global to shared memory."""
    if not isinstance(node, Copy):
        return False
    return (node.src.buffer.scope, node.dst.buffer.scope) == (Scope.GLOBAL, Scope.SHARED)


@dataclass(frozen=True)
class Feed:
    """Copies whose tiles are first and last used by the same nodes.

    first, last: places of those nodes in the body that the copies, or loops over them, stand in.
    opened, filled: places where the first and the last of the copies stand.
    """

    copies: tuple[Copy, ...]
    first: int
    last: int
    opened: int
    filled: int

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return tuple(dict.fromkeys(copy.dst.buffer for copy in self.copies))


def feeds(body: Body, brought: Iterable[Node]) -> list[Feed]:
    """The copies of a body that are brought, in groups by their uses."""
    groups: dict[tuple[int, int], dict[Copy, int]] = {}
    for place, copy in filled_in(body, set(brought)):
        users = [n for n, other in enumerate(body) if reads(other, copy.dst.buffer)]
        groups.setdefault((users[0], users[-1]), {})[copy] = place
    return [
        Feed(tuple(places), *used, min(places.values()), max(places.values()))
        for used, places in groups.items()
    ]


class Reach:
    """For every copy from global to shared memory, why a producer cannot make it.

    reasons: "" where it can.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.reasons: dict[Copy, str] = {}
        self._aliases = Aliases(kernel)
        self._changed = {self._aliases.of(b) for b in kernel.written if b.scope is Scope.GLOBAL}
        self._nodes = list(walk(kernel.body))
        known = {*kernel.block_vars, *(p.var for p in kernel.params)}
        self._visit(kernel.body, known, "")
        self._join()

    def _visit(self, body: Body, known: set[Var], reason: str) -> None:
        """reason: why nothing in the body can be made ahead; known: what a producer knows there."""
        known = set(known)
        for place, node in enumerate(body):
            if isinstance(node, Copy) and is_inward(node):
                self.reasons[node] = reason or self._reason(node, body, place, known)
            elif isinstance(node, Let):
                if _knows(node.exprs, known):
                    known.add(node.var)
            elif isinstance(node, Load):
                if self._is_constant(node.buffer) and _knows(node.exprs, known):
                    known.add(node.out)
            elif isinstance(node, For) and _knows(node.exprs, known):
                self._visit(node.body, known | {node.var}, reason)
            elif isinstance(node, If) and _knows(node.exprs, known):
                for inner in node.bodies:
                    self._visit(inner, known, reason)
            else:
                why = "it stands where only the block's own threads know whether it runs"
                for inner in node.bodies:
                    self._visit(inner, known, reason or why)

    def _join(self) -> None:
        """Pieces of a tile that a producer can make all, or none."""
        pieces: dict[Buffer, list[Copy]] = {}
        for copy in self.reasons:
            if not copy.dst.is_whole and not copy.dst.buffer.is_view:
                pieces.setdefault(copy.dst.buffer, []).append(copy)
        for target, copies in pieces.items():
            why = next((self.reasons[c] for c in copies if self.reasons[c]), "")
            why = why or misplaced(self.kernel, target, copies)
            self.reasons |= dict.fromkeys(copies, why)

    def _is_constant(self, buffer: Buffer) -> bool:
        if buffer.scope is not Scope.GLOBAL:
            return False
        return self._aliases.of(buffer) not in self._changed

    def _reason(self, copy: Copy, body: Body, place: int, known: set[Var]) -> str:
        target = copy.dst.buffer
        if not _knows(copy.exprs, known):
            return "where it copies from depends on what the block computes"
        if not self._is_constant(copy.src.buffer):
            return f"the kernel writes {copy.src.buffer.name}"
        if target.is_view:
            return f"it fills only a part of {target.name}"
        if not copy.dst.is_whole:
            return ""  # until it is known what else fills the tile
        inside = {n for child in body[place + 1 :] for n in walk((child,))}
        for node in self._nodes:
            if any(b.root is target for b in node.writes) and node is not copy:
                return f"{target.name} is written elsewhere too"
            if node not in inside and any(b.root is target for b in node.reads):
                return f"{target.name} is used outside of the loop or branch that fills it"
        if not any(reads(child, target) for child in body[place + 1 :]):
            return f"{target.name} is not used after it"
        return ""


def _knows(exprs: Iterable[Expr], known: set[Var]) -> bool:
    return all(variables(e) <= known for e in exprs)


def writers(kernel: Kernel, root: Buffer) -> list[Node]:
    """The nodes that write a buffer themselves."""
    return [n for n in walk(kernel.body) if any(b.root is root for b in n.writes)]


def touches(node: Node, buffers: Iterable[Buffer]) -> bool:
    """Whether the node or anything in it reads or writes one of the buffers."""
    roots = {b.root for b in buffers}
    return any(b.root in roots for b in all_reads(node) | all_writes(node))
