"""Which multiplies of a loop run during other work of the loop: a round does the first part of the
next iteration together with the last part of its own.

Knows what nodes use and change, and when an asynchronous multiply must be over. Does not know
roles, slots or barriers.

A multiply whose operands threads make (a softmax between two multiplies, a conversion before one)
can only start when they are made, and meanwhile nothing else is there to multiply. So the nodes of
an iteration are parted in two: those that make operands run one iteration ahead, and the multiplies
of the iteration before run beside them (modulo scheduling with two stages; Rau and Glaeser, 1981).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tilejit.errors import ArgumentError
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Body,
    For,
    If,
    Let,
    Load,
    LoopKind,
    Node,
    Parallel,
    Store,
    While,
    all_reads,
    all_writes,
    walk,
)
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.ops.reduce import Reduce
from tilejit.passes.registers import SPARE_REGISTERS, consumer_registers

_QUIET = (Scope.FRAGMENT, Scope.SHARED, Scope.VAR)
_KNOWN = (Let, Load, Store, Copy, Fill, Gemm, GemmWait, Parallel, Reduce, If, For, While)


@dataclass(frozen=True)
class Overlap:
    """The nodes of a round in order. ahead: those of the next iteration; the others are of the
    round's own; a node that defines a value for both is there twice."""

    order: tuple[tuple[Node, bool], ...]

    def part(self, is_ahead: bool) -> list[Node]:
        return [n for n, ahead in self.order if ahead is is_ahead]

    @property
    def made(self) -> set[Buffer]:
        """What the nodes write in shared memory."""
        written = {b for n, _ in self.order for b in all_writes(n)}
        return {b for b in written if b.scope is Scope.SHARED}

    @property
    def turn(self) -> list[Gemm]:
        """The multiplies that begin one after the other in a round, before other work; without any
        of the next iteration, none."""
        gemms = [(n, ahead) for n, ahead in self.order if isinstance(n, Gemm)]
        late = [k for k, (_, ahead) in enumerate(gemms) if not ahead]
        if not late or not gemms[0][1]:
            return []
        return [n for n, _ in gemms[: late[-1] + 1]]

    @property
    def has_turns(self) -> bool:
        """Whether warpgroups may take turns: between the first and the last of these multiplies
        they need not meet."""
        gemms = self.turn
        nodes = [n for n, _ in self.order]
        if not gemms:
            return False
        between = nodes[nodes.index(gemms[0]) : nodes.index(gemms[-1]) + 1]
        used = {b for n in between for b in all_reads(n) | all_writes(n)}
        return not used & self.made and all(b.scope in _QUIET for b in used)

    @property
    def repeated(self) -> list[Node]:
        """Nodes that are there twice."""
        both = set(self.part(True)) & set(self.part(False))
        return [n for n in self.part(True) if n in both]


def overlaps(kernel: Kernel, brought: Collection[Node]) -> dict[For, Overlap]:
    """The pipelined loops whose rounds overlap, with how they do.

    Needs: atoms, layouts. brought: copies that others make.
    """
    if not _fits(kernel):
        return {}
    loops = [n for n in walk(kernel.body) if isinstance(n, For)]
    found = {loop: find_overlap(loop, brought, kernel) for loop in loops}
    return {loop: overlap for loop, overlap in found.items() if overlap is not None}


def _fits(kernel: Kernel) -> bool:
    """Whether all fragments fit the registers at once: those that carry values to the next round
    share none."""
    size = sum(math.prod(b.extents) * b.dtype.bytes for b in kernel.scoped(Scope.FRAGMENT))
    most = consumer_registers(kernel.num_threads) - SPARE_REGISTERS
    return size / 4 / kernel.num_threads <= most


def find_overlap(loop: For, brought: Collection[Node], kernel: Kernel) -> Overlap | None:
    """How rounds of a loop overlap; None where they cannot or nothing is won."""
    if loop.kind is not LoopKind.PIPELINED or loop.num_stages == 1:
        return None
    inside = list(walk(loop.body))
    if not all(isinstance(n, _KNOWN) for n in inside):
        return None
    own = [n for n in loop.body if isinstance(n, Gemm) and n.is_async]
    if len(own) != sum(isinstance(n, Gemm) for n in inside):
        return None
    parting = _Parting(loop, brought, Aliases(kernel))
    return parting.by_hand() if loop.order else parting.run()


class _Parting:
    def __init__(self, loop: For, brought: Collection[Node], aliases: Aliases) -> None:
        self.loop = loop
        self.aliases = aliases
        self.nodes = [n for n in loop.body if not isinstance(n, GemmWait) and n not in brought]
        self.brought = {b.root for n in brought for b in n.writes}
        self.reads = {n: self.stands_for(all_reads(n)) for n in self.nodes}
        self.writes = {n: self.stands_for(all_writes(n)) for n in self.nodes}
        self.uses = {n: _uses(n) for n in self.nodes}
        self.changed = set().union(*self.writes.values())
        self.place = {n: k for k, n in enumerate(self.nodes)}

    def stands_for(self, buffers: Iterable[Buffer]) -> set[Buffer]:
        return {self.aliases.of(b) for b in buffers}

    def run(self) -> Overlap | None:
        late = self.late()
        ahead = [n for n in self.nodes if n not in late]
        if not late or not any(isinstance(n, Parallel | Reduce) for n in ahead):
            return None
        first = self.first(ahead, late)
        repeated = self.repeated(late)
        last = [n for n in self.nodes if n in late or n in repeated]
        rest = [n for n in ahead if n not in first]
        order = [
            *((n, True) for n in ahead if n in first),
            *((n, False) for n in last),
            *((n, True) for n in rest),
        ]
        return Overlap(tuple(order))

    def by_hand(self) -> Overlap | None:
        """The order that the user gave.

        Raises:
            ArgumentError: it changes what the loop computes, or has three stages.
        """
        marks = self.marks()
        stages = sorted({stage for _, stage in marks.values()})
        if len(stages) > 2:
            raise ArgumentError(
                f"T.Pipelined: the schedule has {len(stages)} stages besides that of the copies; "
                "two are supported.",
                span=self.loop.span,
                hint="Let each statement be of the next iteration or of the round's own.",
            )
        late = {n for n, (_, stage) in marks.items() if stage == stages[-1]}
        repeated = self.repeated(late) if len(stages) == 2 else set()
        order = sorted(self.nodes, key=lambda n: marks[n][0])
        for node in order:
            self.check(node, late, marks)
        if len(stages) == 1:
            return None if order == self.nodes else Overlap(tuple((n, False) for n in order))
        values = [(n, False) for n in self.nodes if n in repeated and n not in late]
        return Overlap((*values, *((n, n not in late) for n in order)))

    def marks(self) -> dict[Node, tuple[int, int]]:
        """Each node's place and stage; what passes have put before or after a statement goes with
        it, and values with the first that uses them."""
        known = [n for n in self.nodes if n.schedule is not None]
        marks: dict[Node, tuple[int, int]] = {}
        for node in reversed(self.nodes):
            mark = node.schedule
            if mark is None:
                later = [n for n in self.nodes[self.place[node] + 1 :] if self.depends(n, node)]
                earlier = [n for n in known if self.place[n] < self.place[node]]
                kin = later[:1] or earlier[-1:] or known[:1]
                mark = marks.get(kin[0]) or kin[0].schedule
            assert mark is not None, "the trace marked all statements"
            marks[node] = mark
        return marks

    def depends(self, node: Node, earlier: Node) -> bool:
        """Whether a node uses or changes what an earlier one makes, or makes what that one uses."""
        if set(earlier.defines) & self.uses[node]:
            return True
        reads, writes = self.reads[earlier], self.writes[earlier]
        return bool((self.reads[node] | self.writes[node]) & writes or self.writes[node] & reads)

    def check(self, node: Node, late: set[Node], marks: dict[Node, tuple[int, int]]) -> None:
        """Nodes that depend on each other must come in the order in which they are written: those
        of an iteration, and what one does before what the next one does."""
        for other in self.nodes:
            if other is node or not (self.depends(node, other) or self.depends(other, node)):
                continue
            first, second = sorted((node, other), key=lambda n: self.place[n])
            if self.is_repeatable(first):
                continue
            is_before = marks[first][0] <= marks[second][0]
            if (first in late) == (second in late):
                good = is_before
            elif second in late:  # the first one's next turn must not come before it
                good = not is_before or not self.depends_again(first, second)
            else:
                good = False
            if not good:
                raise ArgumentError(
                    "T.Pipelined: the schedule changes what the loop computes: a statement would "
                    "run before, or overtake, another that it depends on.",
                    span=self.loop.span,
                    related=[(first.span, "this statement"), (second.span, "must follow this")],
                    hint="Compare with the order in which the body is written.",
                )

    def depends_again(self, first: Node, second: Node) -> bool:
        """Whether what the first does for the next iteration disturbs the second."""
        mine = self.writes[first]
        return bool(
            mine & (self.reads[second] | self.writes[second])
            or self.reads[first] & self.writes[second]
        )

    def is_repeatable(self, node: Node) -> bool:
        """Whether a node may be done twice: it only makes a value, which is the same then."""
        if isinstance(node, Let):
            return True
        return isinstance(node, Load) and not self.reads[node] & (self.changed | self.brought)

    def late(self) -> set[Node]:
        """What cannot run ahead: multiplies of operands that threads make, and what their results,
        or what else is late, decides."""
        late: set[Node] = {
            n for n in self.nodes if isinstance(n, Gemm) and self.operands(n) & self.changed
        }
        grown = True
        while grown:
            grown = False
            for node in self.nodes:
                if node not in late and any(self.follows(node, other) for other in late):
                    late.add(node)
                    grown = True
        return late

    def operands(self, gemm: Gemm) -> set[Buffer]:
        return self.stands_for((gemm.a.buffer, gemm.b.buffer))

    def follows(self, node: Node, late: Node) -> bool:
        """Whether a node must stay behind a late one."""
        reads, writes = self.reads[node], self.writes[node]
        if (reads | writes) & self.writes[late]:
            return True
        if writes & self.reads[late] and self.place[node] > self.place[late]:
            return True
        if self.uses[node] & set(late.defines):
            return True
        return bool(set(node.defines) & self.uses[late]) and not self.is_repeatable(node)

    def repeated(self, late: set[Node]) -> set[Node]:
        """Nodes ahead that late ones need a value of."""
        found: set[Node] = set()
        wanted = {v for n in late for v in self.uses[n]}
        for node in reversed(self.nodes):
            if node not in late and set(node.defines) & wanted:
                found.add(node)
                wanted |= self.uses[node]
        return found

    def first(self, ahead: list[Node], late: set[Node]) -> set[Node]:
        """What of the next iteration comes before the late nodes: multiplies that wait for no work
        of threads, and what these need."""
        used = {b for n in late for b in self.reads[n]}
        chosen: set[Node] = set()
        for gemm in (n for n in ahead if isinstance(n, Gemm)):
            group = self.needed(gemm, ahead)
            if all(self.is_light(n, used) for n in group) and self.may_pass(group, chosen, ahead):
                chosen |= group
        return chosen

    def needed(self, gemm: Node, ahead: list[Node]) -> set[Node]:
        """The node and those before it that make what it uses."""
        group = {gemm}
        for node in reversed(ahead[: ahead.index(gemm)]):
            for other in list(group):
                if self.writes[node] & (self.reads[other] | self.writes[other]):
                    group.add(node)
                if set(node.defines) & self.uses[other]:
                    group.add(node)
        return group

    def is_light(self, node: Node, used: set[Buffer]) -> bool:
        return isinstance(node, Let | Load | Fill | Gemm) and not self.writes[node] & used

    def may_pass(self, group: set[Node], chosen: set[Node], ahead: list[Node]) -> bool:
        """Whether the group may run before the nodes that now stand before it."""
        for node in group:
            for other in ahead[: ahead.index(node)]:
                if other in group or other in chosen:
                    continue
                if self.writes[node] & (self.reads[other] | self.writes[other]):
                    return False
        return True


def _uses(node: Node) -> set[Var]:
    return {v for n in walk((node,)) for e in n.exprs for v in variables(e)}


class Flight:
    """Nodes in order, with a wait where one touches what a multiply in flight reads or writes.

    made: what threads write in shared memory.
    """

    def __init__(self, made: Collection[Buffer]) -> None:
        self._made = made
        self.nodes: list[Node] = []
        self._flying: list[Gemm] = []
        self._ends: list[tuple[list[Gemm], Body]] = []

    def add(self, *nodes: Node) -> None:
        for node in nodes:
            blocking = [k for k, gemm in enumerate(self._flying) if _conflict(node, gemm)]
            if blocking:
                self._land(blocking[-1] + 1)
            self.nodes.append(node)
            if isinstance(node, Gemm) and node.is_async:
                self._flying.append(node)

    def after(self, gemms: Iterable[Gemm], nodes: Iterable[Node]) -> None:
        """Nodes that may come when the multiplies are over, as soon as that is known."""
        waiting = [g for g in gemms if g in self._flying]
        if waiting:
            self._ends.append((waiting, tuple(nodes)))
        else:
            self.nodes += nodes

    def land(self) -> None:
        """Wait for all."""
        self._land(len(self._flying))

    def _land(self, count: int) -> None:
        landed, self._flying = self._flying[:count], self._flying[count:]
        if not landed:
            return
        operands = [r.buffer for g in landed for r in (g.a, g.b)]
        self.nodes.append(
            GemmWait(
                pending=len(self._flying),
                registers=held_registers(landed),
                operands=tuple(dict.fromkeys(b for b in operands if b in self._made)),
                span=landed[-1].span,
            )
        )
        ends, self._ends = self._ends, []
        for waiting, nodes in ends:
            self.after(waiting, nodes)


def held_registers(gemms: Iterable[Gemm]) -> tuple[Buffer, ...]:
    """Fragments that multiplies in flight read or change."""
    held = [r.buffer for g in gemms for r in (g.a, g.acc) if r.buffer.scope is Scope.FRAGMENT]
    return tuple(dict.fromkeys(held))


def _conflict(node: Node, gemm: Gemm) -> bool:
    """Whether a node needs the multiply to be over."""
    acc, operands = gemm.acc.buffer.root, {r.buffer.root for r in (gemm.a, gemm.b)}
    reads = {b.root for b in all_reads(node)}
    writes = {b.root for b in all_writes(node)}
    if isinstance(node, Gemm) and node.is_async:
        inputs = {node.a.buffer.root, node.b.buffer.root}
        if node.acc.buffer.root is acc:  # in order of themselves where shapes agree
            return node.atom != gemm.atom or node.acc != gemm.acc
        return acc in inputs or node.acc.buffer.root in operands
    held = {b for b in operands if b.scope is Scope.FRAGMENT}
    return bool((reads | writes) & ({acc} | held) or writes & operands)
