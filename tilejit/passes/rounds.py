"""Writes out the rounds of loops that overlap, where producers bring tiles.

Knows where a round waits for tiles and leaves slots, and when warpgroups take turns. Does not know
which nodes run ahead, nor why.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from tilejit.errors import Span
from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, Var, arith, index
from tilejit.ir.node import Body, For, If, LoopKind, Node
from tilejit.ir.substitution import substituted
from tilejit.ir.sync import BarrierWait, Control, ControlOp, SyncThreads
from tilejit.ops.gemm import Gemm
from tilejit.passes.channels import Channel, counted
from tilejit.passes.overlap import Flight, Overlap
from tilejit.passes.pipeline import into_slot
from tilejit.passes.registers import GROUP
from tilejit.passes.skew import Mapping, skewed

TURN_BARRIER = 9  # the hardware barrier of the first warpgroup that takes turns


def overlapped(
    loop: For,
    overlap: Overlap,
    channels: Sequence[Channel],
    thread: Var,
    turns: int,
    made: Collection[Buffer],
) -> list[Node]:
    """The loop's rounds. channels: of what the loop brings. turns: warpgroups that take turns to
    multiply, or 0. made: what threads of the kernel write in shared memory."""

    def part(mapping: Mapping, ahead: int = 0, turns: int = 0) -> Body:
        return _Round(overlap, channels, thread, mapping, ahead, turns, made).body()

    if not overlap.part(True):
        serial = replace(loop, kind=LoopKind.SERIAL, num_stages=0)
        return [replace(serial, body=part({False: {}}))]
    return [
        *(_met(loop.span) if turns and overlap.used_in_turn & set(made) else ()),
        *skewed(loop, overlap, part, lambda mapping: part(mapping, 1, turns), part),
    ]


def _met(span: Span | None) -> Body:
    """Threads have seen what all have written: in a turn nobody can wait for the others."""
    fence = Control(op=ControlOp.FENCE_ASYNC, span=span)
    return fence, SyncThreads(inserted=True, span=span)


def first_turn(thread: Var, turns: int) -> Node:
    """As if the last warpgroup had just had its turn."""
    is_last = arith("eq", arith("floordiv", thread, GROUP), turns - 1)
    return If(condition=is_last, then=(_turn_barrier(index(0), True),))


class _Round:
    """A round of a loop whose rounds overlap, or the part of one before or after the loop.

    mapping: for nodes that run ahead and for the others, what their variables become there; a part
    that is not there has none. ahead: how many iterations the former are in front of the latter.
    """

    def __init__(
        self,
        overlap: Overlap,
        channels: Sequence[Channel],
        thread: Var,
        mapping: Mapping,
        ahead: int,
        turns: int,
        made: Collection[Buffer],
    ) -> None:
        self.overlap = overlap
        self.channels = channels
        self.thread = thread
        self.mapping = mapping
        self.ahead = ahead
        self.turns = turns
        self.flight = Flight(made)
        self.slots: dict[tuple[Channel, bool], Var] = {}
        self.readers: dict[tuple[Channel, bool], list[Gemm]] = {}

    def body(self) -> Body:
        order = [(n, ahead) for n, ahead in self.overlap.order if ahead in self.mapping]
        last = {(c, ahead): n for n, ahead in order for c in self.channels if c.is_read_by(n)}
        multiplies = [n for n in self.overlap.turn if self.turns]
        for node, is_ahead in order:
            if node in multiplies[:1]:
                self.flight.add(_turn_barrier(self._group(), False))
            mine = [c for c in self.channels if c.is_read_by(node)]
            for channel in mine:
                if (channel, is_ahead) not in self.slots:
                    self._open(channel, is_ahead)
            fresh = node
            for channel in mine:
                fresh = into_slot(fresh, channel.slotted, self.slots[channel, is_ahead])
            (fresh,) = substituted((fresh,), self.mapping[is_ahead])
            self.flight.add(fresh)
            for channel in mine:
                if isinstance(fresh, Gemm):
                    self.readers.setdefault((channel, is_ahead), []).append(fresh)
                if last[channel, is_ahead] is node and is_ahead is self._ends_ahead(channel):
                    self._leave(channel, is_ahead)
            if node in multiplies[-1:]:
                following = arith("floormod", arith("add", self._group(), 1), self.turns)
                self.flight.add(_turn_barrier(following, True))
        self.flight.land()
        # which slot is the next one's has been asked for by what runs ahead: it counts no sooner
        kept = [c for c, ahead in last if not ahead and self._crosses(c)]
        self.flight.add(*(n for c in kept for n in counted(c.used)))
        return tuple(self.flight.nodes)

    def _group(self) -> Expr:
        return arith("floordiv", self.thread, GROUP)

    def _stages(self, channel: Channel) -> set[bool]:
        """Whether nodes that run ahead use the channel's tiles, and whether others do."""
        return {ahead for n, ahead in self.overlap.order if channel.is_read_by(n)}

    def _crosses(self, channel: Channel) -> bool:
        return self._stages(channel) == {True, False}

    def _ends_ahead(self, channel: Channel) -> bool:
        return self._stages(channel) == {True}

    def _open(self, channel: Channel, is_ahead: bool) -> None:
        """Find the slot, and wait for its tile where that has not been done an iteration ago."""
        crosses = self._crosses(channel)
        skipped = self.ahead if crosses and is_ahead else 0
        opened, slot, parity = channel.turn(channel.used, skipped)
        self.slots[channel, is_ahead] = slot
        self.flight.add(*opened)
        if is_ahead or not crosses:
            span = channel.feed.copies[0].span
            self.flight.add(BarrierWait(barrier=channel.full, slot=slot, parity=parity, span=span))

    def _leave(self, channel: Channel, is_ahead: bool) -> None:
        slot = self.slots[channel, is_ahead]
        left = channel.leave(slot)
        if not self._crosses(channel):
            left += counted(channel.used)
        self.flight.after(self.readers.get((channel, is_ahead), ()), left)


def _turn_barrier(group: Expr, is_arrival: bool) -> SyncThreads:
    """Where a warpgroup waits for its turn, and another one says that it has come."""
    number = arith("add", group, TURN_BARRIER)
    return SyncThreads(inserted=True, number=number, threads=2 * GROUP, is_arrival=is_arrival)
