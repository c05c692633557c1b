"""Reductions that go through shared memory in two steps, so that neighbours share a meeting.

Knows what nodes read and write. Does not know where threads meet, nor how parts are left and
combined.

Threads leave their parts of one reduction after another, and then take the results of all: one
meeting lies between, where each reduction alone would have its own. What stands between two
reductions stays where it is if it needs no result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tilejit.ir.buffer import Buffer
from tilejit.ir.node import (
    Body,
    Let,
    Load,
    Node,
    Parallel,
    Store,
    all_reads,
    all_writes,
)
from tilejit.isa.atom import CopyMethod
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.reduce import Reduce, Step


def share_meetings(body: Body) -> Body:
    """Decide the steps of reductions with scratch: each leaves its parts where it stands, and
    takes its results before what first needs them, or after the last of its neighbours has left
    its own."""
    return _Sharing().body(body)


class _Sharing:
    """waiting: reductions that have left their parts. between: what has come after them, which
    runs after they have taken their results unless another reduction joins them."""

    def __init__(self) -> None:
        self.result: list[Node] = []
        self.waiting: list[Reduce] = []
        self.between: list[Node] = []

    def body(self, body: Body) -> Body:
        for node in body:
            if isinstance(node, Reduce) and node.scratch is not None:
                self.reduce(node)
            elif not self.waiting:
                self.result.append(_inside(node))
            elif _may_come_first(node) and not self.touches_results(node):
                self.between.append(node)
            else:
                self.take()
                self.result.append(_inside(node))
        self.take()
        return tuple(self.result)

    def reduce(self, node: Reduce) -> None:
        is_sent = any(other.scratch is node.scratch for other in self.waiting)
        if is_sent or self.touches_results(replace(node, step=Step.SEND)):
            self.take()
        self.result += [*self.between, replace(node, step=Step.SEND)]
        self.between = []
        self.waiting.append(node)

    def take(self) -> None:
        self.result += [replace(node, step=Step.TAKE) for node in self.waiting]
        self.result += self.between
        self.waiting, self.between = [], []

    def touches_results(self, node: Node) -> bool:
        return bool(_roots(n.dst.buffer for n in self.waiting) & _touched(node))


def _inside(node: Node) -> Node:
    """The node with the same done to its bodies."""
    if not node.bodies or isinstance(node, Parallel):
        return node
    return node.with_bodies(*(share_meetings(inner) for inner in node.bodies))


def _may_come_first(node: Node) -> bool:
    """Whether threads may do the node's work before they meet: all do their own share of it, and
    wait for nothing."""
    if isinstance(node, Copy):
        is_plain = node.atom is not None and node.atom.method is CopyMethod.REGISTERS
        return is_plain and not node.is_async
    return isinstance(node, Fill | Let | Load | Parallel | Reduce | Store)


def _touched(node: Node) -> set[Buffer]:
    return _roots(all_reads(node) | all_writes(node))


def _roots(buffers: Iterable[Buffer]) -> set[Buffer]:
    return {b.root for b in buffers}
