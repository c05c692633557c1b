"""Scratch of reductions in loops, in two slots that rounds use in turn.

Knows the two steps of reductions and which loops they stand in. Does not know what else threads
meet for.

Parts of a round must not be written where those of the last one are still read: with one slot the
threads meet for that. With two, a thread that is a round ahead writes to the other slot, and no
thread is two ahead, for all meet in every round between leaving parts and taking them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tilejit.dtypes import int32
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, const, index
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, Load, Node, Store, While, walk
from tilejit.ir.sync import SyncThreads
from tilejit.layout.shared import SharedLayout
from tilejit.ops.reduce import Reduce, Step

SLOTS = 2
MOST_BYTES = 2048  # of a group's scratch: more is better spent on tiles

Group = frozenset[Buffer]


def exchanges_in_loops(body: Body) -> list[Group]:
    """The scratch of reductions that take their results together, in loops, where it is small and
    nothing else uses it."""
    steps = [n for n in walk(body) if isinstance(n, Reduce) and n.step is not Step.WHOLE]
    uses = [n.scratch for n in steps]
    found = dict.fromkeys(_groups(body, in_loop=False))
    return [
        group
        for group in found
        if all(uses.count(b) == 2 for b in group) and sum(map(_bytes, group)) <= MOST_BYTES
    ]


def _groups(body: Body, *, in_loop: bool) -> Iterator[Group]:
    together: set[Buffer] = set()
    for node in body:
        if isinstance(node, Reduce) and node.step is Step.TAKE:
            assert node.scratch is not None, "nothing was sent"
            together.add(node.scratch)
            continue
        if together and in_loop:
            yield frozenset(together)
        together = set()
        for inner in node.bodies:
            yield from _groups(inner, in_loop=in_loop or isinstance(node, For | While))
    if together and in_loop:
        yield frozenset(together)


def _bytes(buffer: Buffer) -> int:
    return math.prod(buffer.extents) * buffer.dtype.bytes


def scratch_in_turns(kernel: Kernel) -> frozenset[Buffer]:
    """The scratch that needs no other meetings than those between leaving parts and taking them."""
    nodes = (n for n in walk(kernel.body) if isinstance(n, Reduce) and n.slot is not None)
    return frozenset(n.scratch for n in nodes if n.scratch is not None)


def in_turns(kernel: Kernel, group: Group) -> Kernel:
    """The kernel with the group's scratch in two slots, and the meeting that makes them enough.

    Needs: the steps of reductions, and shared layouts.
    """
    wide = {b: replace(b, shape=(index(SLOTS), *b.shape)) for b in group}
    layouts = {b: SharedLayout(b.extents, b.dtype.bytes) for b in wide.values()}
    shared = {b: layout for b, layout in kernel.shared.items() if b not in group}
    body = _Turns(wide).body(kernel.body, in_loop=False)
    return replace(kernel, body=body, shared=shared | layouts)


@dataclass
class _Turns:
    """wide: for each scratch of the group, the one with slots. seen: how many nodes of each step
    have been visited."""

    wide: dict[Buffer, Buffer]
    seen: dict[Step, int] = field(default_factory=lambda: dict.fromkeys(Step, 0))

    def __post_init__(self) -> None:
        name = min(b.name for b in self.wide)
        self.turns = Buffer(name=f"{name}_turn", shape=(index(1),), dtype=int32, scope=Scope.VAR)
        self.turn = Var(self.turns.name, int32, VarKind.VALUE, index(0), index(SLOTS - 1))

    def body(self, body: Body, *, in_loop: bool) -> Body:
        result: list[Node] = []
        for node in body:
            if isinstance(node, Reduce) and node.scratch in self.wide:
                result += self.reduce(node)
            elif not any(isinstance(n, Reduce) and n.scratch in self.wide for n in walk((node,))):
                result.append(node)
            else:
                is_loop = isinstance(node, For | While)
                if is_loop and not in_loop:
                    result.append(self.keep(const(0, int32), node))
                inner = (self.body(b, in_loop=in_loop or is_loop) for b in node.bodies)
                result.append(node.with_bodies(*inner))
        return tuple(result)

    def reduce(self, node: Reduce) -> list[Node]:
        assert node.scratch is not None, "nothing goes through shared memory"
        before: list[Node] = []
        after: list[Node] = []
        if not self.seen[node.step]:
            if node.step is Step.SEND:
                at = (index(0),)
                before.append(Load(out=self.turn, buffer=self.turns, index=at, span=node.span))
            else:
                before.append(SyncThreads(inserted=True, span=node.span))
        self.seen[node.step] += 1
        if self.seen[Step.TAKE] == len(self.wide):
            after.append(self.keep(arith("sub", SLOTS - 1, self.turn), node))
        return [*before, replace(node, scratch=self.wide[node.scratch], slot=self.turn), *after]

    def keep(self, turn: Expr, node: Node) -> Store:
        return Store(buffer=self.turns, index=(index(0),), value=turn, span=node.span)
