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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope, whole
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Let,
    Load,
    LoopKind,
    Node,
    OneThread,
    Parallel,
    Store,
    While,
    all_reads,
    all_writes,
    walk,
)
from tilejit.ir.rounds import Rounds, by_hand
from tilejit.ir.substitution import rebuffered
from tilejit.ir.sync import Control, ControlOp, SyncThreads
from tilejit.isa.atom import CopyAtom, CopyMethod
from tilejit.isa.wgmma import MAX_PENDING
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.ops.reduce import Reduce
from tilejit.ops.scan import Scan
from tilejit.passes.pieces import only_brings
from tilejit.passes.pressure import fills, fragments_at, most_words, words_beside
from tilejit.passes.registers import consumer_registers
from tilejit.passes.wgmma import multiply_clocks
from tilejit.passes.work import work_clocks

SPARE_REGISTERS = 24  # of a thread besides its fragments, in a loop whose rounds overlap
_QUIET = (Scope.FRAGMENT, Scope.SHARED, Scope.VAR)
_LEAVING = (
    ControlOp.STORE_WAIT_READ, ControlOp.STORE_WAIT, ControlOp.FENCE_ASYNC, ControlOp.STORE_COMMIT,
)  # fmt: skip
_KNOWN = (Let, Load, Store, Copy, Fill, Gemm, GemmWait, Parallel, Reduce, Scan, If, For, While)


@dataclass(frozen=True)
class Overlap:
    """The nodes of a round in order. ahead: those of the next iteration; the others are of the
    round's own; a node that defines a value for both is there twice.

    moved: fragments that nodes ahead use in place of those that the others still use.
    before: what gives them their values before the first iteration.
    pairs: tiles in shared memory of which the two parts of a round use one each, in turn.
    """

    order: tuple[tuple[Node, bool], ...]
    moved: dict[Buffer, Buffer] = field(default_factory=dict)
    before: Body = ()
    pairs: tuple[Buffer, ...] = ()

    def part(self, is_ahead: bool) -> list[Node]:
        return [n for n, ahead in self.order if ahead is is_ahead]

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
        used = self.used_in_turn
        made = {b.root for n, _ in self.order for b in all_writes(n) if b.scope is Scope.SHARED}
        return bool(used) and not used & made and all(b.scope in _QUIET for b in used)

    @property
    def used_in_turn(self) -> set[Buffer]:
        """What nodes from the first to the last of these multiplies read or write."""
        gemms = self.turn
        nodes = [n for n, _ in self.order]
        between = nodes[nodes.index(gemms[0]) : nodes.index(gemms[-1]) + 1] if gemms else []
        return {b.root for n in between for b in all_reads(n) | all_writes(n)}

    @property
    def repeated(self) -> list[Node]:
        """Nodes that are there twice."""
        both = set(self.part(True)) & set(self.part(False))
        return [n for n in self.part(True) if n in both]


def overlaps(kernel: Kernel, brought: Collection[Node], slots: int = 2) -> dict[For, Overlap]:
    """The pipelined loops whose rounds overlap, or whose multiplies run beside other work of their
    round, with how they do.

    Needs: atoms, layouts. brought: copies that others make. slots: of what they bring in loops
    whose stages are left open, where that is known.
    """
    found: dict[For, Overlap] = {}
    for loop in (n for n in walk(kernel.body) if isinstance(n, For)):
        stages = slots if loop.num_stages is None else loop.num_stages
        if loop.kind is not LoopKind.PIPELINED or stages <= 1 or _brings_inside(loop, brought):
            continue
        overlap = find_overlap(loop, brought, kernel) if _fits(loop, kernel) else None
        overlap = overlap or in_order(loop, brought, kernel)
        if overlap is not None:
            found[loop] = overlap
    return found


def _brings_inside(loop: For, brought: Collection[Node]) -> bool:
    """Whether branches or loops in the loop have copies that others make, and more."""
    inner = (child for node in loop.body if not only_brings(node, brought) for child in node.bodies)
    return any(n in brought for child in inner for n in walk(child))


def in_order(loop: For, brought: Collection[Node], kernel: Kernel) -> Overlap | None:
    """A round of one iteration, in its own order, whose multiplies run beside what does not need
    them; None where each is needed at once, nothing else is done meanwhile, or what they hold and
    what is done take too many registers."""
    if not all(isinstance(n, (*_KNOWN, Atomic)) or _leaves(n) for n in walk(loop.body)):
        return None
    own = [n for n in loop.body if isinstance(n, Gemm) and n.is_async]
    if len(own) < 2 or len(own) != sum(isinstance(n, Gemm) for n in walk(loop.body)):
        return None
    nodes = [n for n in loop.body if not isinstance(n, GemmWait) and not only_brings(n, brought)]
    if all(isinstance(n, Gemm | Let | Load) for n in nodes):
        return None
    flight = Flight(())
    flight.add(*nodes)
    flight.land()
    if most_words(flight.nodes, loop, kernel) > _most_registers(kernel):
        return None
    return Overlap(tuple((n, False) for n in nodes))


def _leaves(node: Node) -> bool:
    """Whether it belongs to results that leave by bulk copies, which no multiply is part of."""
    if isinstance(node, Control):
        return node.op in _LEAVING
    return isinstance(node, OneThread) or (isinstance(node, SyncThreads) and node.inserted)


def _fits(loop: For, kernel: Kernel) -> bool:
    """Whether all fragments that a loop uses, or that keep values meanwhile, fit the registers at
    once, with what else it takes: those that carry values to the next round share none."""
    size = sum(math.prod(b.extents) * b.dtype.bytes for b in fragments_at(loop, kernel))
    words = size / 4 / kernel.num_threads + words_beside(loop, kernel)
    return words <= _most_registers(kernel)


def _most_registers(kernel: Kernel) -> int:
    """Of a thread, for fragments."""
    return consumer_registers(kernel.num_threads) - SPARE_REGISTERS


def find_overlap(loop: For, brought: Collection[Node], kernel: Kernel) -> Overlap | None:
    """How rounds of a loop overlap; None where they cannot or nothing is won."""
    inside = list(walk(loop.body))
    if not all(isinstance(n, _KNOWN) for n in inside):
        return None
    own = [n for n in loop.body if isinstance(n, Gemm) and n.is_async]
    if len(own) != sum(isinstance(n, Gemm) for n in inside):
        return None
    nodes = [n for n in loop.body if not isinstance(n, GemmWait) and not only_brings(n, brought)]
    rounds = Rounds(nodes, Aliases(kernel), (b for n in brought for b in n.writes))
    parting = _Parting(rounds)
    return parting.by_hand() if loop.order else parting.run()


def with_followers(
    seeds: Collection[Node], nodes: Sequence[Node], follows: Callable[[Node, Node], bool]
) -> set[Node]:
    """Some of an iteration's nodes, with all that must stay behind one of them."""
    late = set(seeds)
    grown = True
    while grown:
        grown = False
        for node in nodes:
            if node not in late and any(follows(node, other) for other in late):
                late.add(node)
                grown = True
    return late


class _Parting:
    """Parts the nodes of an iteration in two."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.nodes, self.place = rounds.nodes, rounds.place
        self.reads, self.writes = rounds.reads, rounds.writes

    def run(self) -> Overlap | None:
        late = self.late()
        ahead = [n for n in self.nodes if n not in late]
        if not late or not any(map(work_clocks, ahead)):
            return None
        first = self.first(ahead, late)
        repeated = self.rounds.repeated(late)
        last = [n for n in self.nodes if n in late or n in repeated]
        rest = [n for n in ahead if n not in first]
        copied, moved = self.renamed(rest, last)
        order = [
            *((n, True) for n in ahead if n in first),
            *((n, False) for n in last),
            *((n, True) for n in copied),
        ]
        if self.is_multiplying() and not moved:
            order = self.sooner(order)
        return Overlap(tuple(order), moved)

    def is_multiplying(self) -> bool:
        """Whether the tensor cores have more to do than the threads."""
        busy = sum(multiply_clocks(n) for n in self.nodes if isinstance(n, Gemm))
        return busy > sum(work_clocks(n) for n in self.nodes)

    def sooner(self, order: list[tuple[Node, bool]]) -> list[tuple[Node, bool]]:
        """The order in which late multiplies start at once: work of theirs that stands before them
        is done at the end of the round before, where nothing disturbs it."""
        late = [n for n, ahead in order if not ahead]
        start = next(k for k, n in enumerate(late) if isinstance(n, Gemm))
        early = [n for n in late[:start] if not isinstance(n, Let | Load)]
        rest = [(n, ahead) for n, ahead in order if n not in early]
        fresh = [*rest, *((n, True) for n in early)]
        nodes = [n for n, ahead in fresh if ahead or n not in self.rounds.repeated(set(late))]
        stays = {n for n in late if n not in early}
        return order if self.rounds.overtaken(nodes, stays) else fresh

    def by_hand(self) -> Overlap | None:
        """The order that the user gave: the trace has seen that it keeps the loop's meaning."""
        order, late = by_hand(self.rounds)
        if order == self.nodes and len(late) == len(order):
            return None
        if self.rounds.overtaken(order, late):  # copies that were to be ahead of all are not
            return None
        repeated = self.rounds.repeated(late)
        start = max(k for k, n in enumerate(order) if n in late) + 1
        copied, moved = self.renamed(order[start:], [n for n in order if n in late])
        result = [
            *((n, False) for n in self.nodes if n in repeated),
            *((n, n not in late) for n in order[:start]),
            *((n, True) for n in copied),
        ]
        return Overlap(tuple(result), moved)

    def late(self) -> set[Node]:
        """What cannot run ahead: multiplies of operands that threads make, and what their results,
        or what else is late, decides."""
        made = (n for n in self.nodes if isinstance(n, Gemm))
        seeds = {n for n in made if self.operands(n) & self.rounds.changed}
        return with_followers(seeds, self.nodes, self.follows)

    def operands(self, gemm: Gemm) -> set[Buffer]:
        return self.rounds.stands_for((gemm.a.buffer, gemm.b.buffer))

    def follows(self, node: Node, late: Node) -> bool:
        """Whether a node must stay behind a late one."""
        reads, writes, uses = self.reads[node], self.writes[node], self.rounds.uses
        if (reads | writes) & self.writes[late]:
            return True
        if writes & self.reads[late] and self.place[node] > self.place[late]:
            return True
        if uses[node] & set(late.defines):
            return True
        return bool(set(node.defines) & uses[late]) and not self.rounds.is_repeatable(node)

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
                if set(node.defines) & self.rounds.uses[other]:
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
                if self.rounds.disturbs(node, other):
                    return False
        return True

    def renamed(
        self, rest: list[Node], last: list[Node]
    ) -> tuple[list[Node], dict[Buffer, Buffer]]:
        """The nodes ahead, those that work out an operand writing other registers, which are copied
        when the multiply that reads the operand is over; and those registers."""
        moved: dict[Buffer, Buffer] = {}
        for gemm in (n for n in last if isinstance(n, Gemm)):
            old = gemm.a.buffer
            users = [n for n in rest if old.root in self.reads[n] | self.writes[n]]
            is_made = any(
                isinstance(n, Parallel | Reduce | If) or (isinstance(n, Copy) and n.is_trade)
                for n in users
            )
            is_read = any(old.root in self.reads[n] for n in users)
            is_whole = any(fills(n, old) for n in users)  # nothing of the last one's is left
            if old.scope is Scope.FRAGMENT and is_made and is_whole and not is_read:
                moved[old] = replace(old, name=f"{old.name}_next")
        atom = CopyAtom(CopyMethod.REGISTERS, 1)
        copies = [
            Copy(src=whole(fresh), dst=whole(old), atom=atom, span=old.span)
            for old, fresh in moved.items()
        ]
        return [*rebuffered(rest, moved), *copies], moved


class Flight:
    """Nodes in order, with a wait where one touches what a multiply in flight reads or writes.

    made: what threads of the kernel write in shared memory.
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
        if count:  # more than the instruction can leave on their way land with them
            count = max(count, len(self._flying) - MAX_PENDING)
        landed, self._flying = self._flying[:count], self._flying[count:]
        if not landed:
            return
        operands = [r.buffer for g in landed for r in (g.a, g.b)]
        self.nodes.append(
            GemmWait(
                pending=len(self._flying),
                registers=held_registers(landed),
                operands=tuple(dict.fromkeys(b for b in operands if b.root in self._made)),
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
            is_same = node.acc.buffer is gemm.acc.buffer and node.acc.is_whole and gemm.acc.is_whole
            return node.clear or node.atom != gemm.atom or not is_same
        return acc in inputs or node.acc.buffer.root in operands
    held = {b for b in operands if b.scope is Scope.FRAGMENT}
    return bool((reads | writes) & ({acc} | held) or writes & operands)
