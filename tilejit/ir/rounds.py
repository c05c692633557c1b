"""What the nodes of a loop's body need of each other, in one iteration and the next.

Knows buffers and values that nodes use and change. Does not know what nodes do or how long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Var, variables
from tilejit.ir.node import Let, Load, Node, all_reads, all_writes, walk


class Rounds:
    """nodes: of the body, in its order. brought: buffers that others fill beside them."""

    def __init__(
        self, nodes: Sequence[Node], aliases: Aliases, brought: Iterable[Buffer] = ()
    ) -> None:
        self.nodes = list(nodes)
        self._aliases = aliases
        self._brought = {b.root for b in brought}
        self.reads = {n: self.stands_for(all_reads(n)) for n in nodes}
        self.writes = {n: self.stands_for(all_writes(n)) for n in nodes}
        self.uses = {n: _uses(n) for n in nodes}
        self.changed: set[Buffer] = set().union(*self.writes.values())
        self.place = {n: k for k, n in enumerate(nodes)}
        self._repeatable = self._values()

    def stands_for(self, buffers: Iterable[Buffer]) -> set[Buffer]:
        return {self._aliases.of(b) for b in buffers}

    def _values(self) -> set[Node]:
        """Nodes that only make a value, out of nothing that changes."""
        found: set[Node] = set()
        unsure: set[Var] = set()
        for node in self.nodes:
            moves = self.uses[node] & unsure or self.reads[node] & (self.changed | self._brought)
            if isinstance(node, Let | Load) and not moves:
                found.add(node)
            else:
                unsure |= set(node.defines)
        return found

    def is_repeatable(self, node: Node) -> bool:
        """Whether a node may be done twice: it only makes a value, which is the same then."""
        return node in self._repeatable

    def depends(self, node: Node, earlier: Node) -> bool:
        """Whether a node uses or changes what an earlier one makes, or makes what that one uses."""
        return bool(set(earlier.defines) & self.uses[node]) or self.disturbs(earlier, node)

    def disturbs(self, node: Node, other: Node) -> bool:
        """Whether one of the two changes memory that the other uses."""
        touched = self.reads[other] | self.writes[other]
        return bool(self.writes[node] & touched or self.reads[node] & self.writes[other])

    def repeated(self, late: set[Node]) -> set[Node]:
        """Nodes besides the late ones that these need a value of."""
        found: set[Node] = set()
        wanted = {v for n in late for v in self.uses[n]}
        for node in reversed(self.nodes):
            if node not in late and set(node.defines) & wanted:
                found.add(node)
                wanted |= self.uses[node]
        return found

    def overtaken(self, order: Sequence[Node], late: set[Node]) -> tuple[Node, Node] | None:
        """Two nodes of which the second, in another order of a round, no longer follows the first.

        late: nodes that are of the round's own iteration where the others are of the next one.
        Nodes that depend on each other must keep their order: in an iteration, and what one does
        for an iteration before what the other does for the next.
        """
        place = {n: k for k, n in enumerate(order)}
        for k, second in enumerate(self.nodes):
            for first in self.nodes[:k]:
                if self.is_repeatable(first) or not self.depends(second, first):
                    continue
                is_before = place[first] < place[second]
                if (first in late) == (second in late):
                    good = is_before
                elif second in late:  # the first one's next turn must not come before it
                    is_told = bool(set(first.defines) & self.uses[second])
                    good = not is_told and (not is_before or not self.disturbs(first, second))
                else:
                    good = False
                if not good:
                    return first, second
        return None


def marks(rounds: Rounds) -> dict[Node, tuple[int, int]]:
    """Of a loop with a schedule by hand: each node's place and stage. What passes have put before
    or after a statement goes with it; values, and copies ahead of all that nobody else makes, with
    the first that uses them."""
    known = [n for n in rounds.nodes if n.schedule is not None and n.schedule[0] >= 0]
    found: dict[Node, tuple[int, int]] = {}
    for node in reversed(rounds.nodes):
        mark = node.schedule
        if mark is None or mark[0] < 0:
            rest = rounds.nodes[rounds.place[node] + 1 :]
            later = [n for n in rest if rounds.depends(n, node)]
            earlier = [n for n in known if rounds.place[n] < rounds.place[node]]
            kin = (later[:1] or earlier[-1:] or known[:1])[0]
            mark = found.get(kin) or kin.schedule
        assert mark is not None, "the trace marks all statements"
        found[node] = mark
    return found


def by_hand(rounds: Rounds) -> tuple[list[Node], set[Node]]:
    """A schedule by hand: the order of a round, and the nodes that are late in it. Values that may
    be made twice come first, and are no late ones where others need them."""
    found = marks(rounds)
    stages = {stage for _, stage in found.values()}
    order = sorted(rounds.nodes, key=lambda n: -1 if rounds.is_repeatable(n) else found[n][0])
    late = {n for n, (_, stage) in found.items() if stage == max(stages)}
    wanted = {v for n in rounds.nodes if n not in late for v in rounds.uses[n]}
    for node in reversed(rounds.nodes):
        if node in late and rounds.is_repeatable(node) and set(node.defines) & wanted:
            late.remove(node)
            wanted |= rounds.uses[node]
    return order, late


def _uses(node: Node) -> set[Var]:
    return {v for n in walk((node,)) for e in n.exprs for v in variables(e)}
