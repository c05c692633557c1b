"""Splits a kernel into a producer, which fills slots of shared memory, and consumers, which do the
rest.

Knows what is brought, who waits for whom, and when a slot is free again. Does not know PTX or
offsets in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tilejit.dtypes import int32
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import (
    Expr,
    Var,
    VarKind,
    arith,
    binary,
    cast,
    const,
    index,
    variables,
)
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Body,
    For,
    If,
    Let,
    Load,
    LoopKind,
    Node,
    OneThread,
    Role,
    Roles,
    Store,
    all_writes,
    walk,
)
from tilejit.ir.sync import BarrierArrive, BarrierSlot, BarrierWait, Control, ControlOp
from tilejit.isa.wgmma import MAX_PENDING
from tilejit.layout.boxes import boxes_of
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.passes.bring import Feed, feeds, is_inward, touches
from tilejit.passes.channels import Channel, barriers, counted, counter, zeros
from tilejit.passes.epilogue import Staging, stage_stores
from tilejit.passes.forward import forwarded
from tilejit.passes.given import cluster_of, registers_of
from tilejit.passes.late import after, during, main_loop
from tilejit.passes.overlap import held_registers, overlaps
from tilejit.passes.pieces import filled_in, only_brings
from tilejit.passes.pipeline import into_slot, with_slots
from tilejit.passes.queue import queue_walk, unevenness
from tilejit.passes.registers import GROUP
from tilejit.passes.rounds import first_turn, overlapped
from tilejit.passes.shared_out import once_tiles_are_used, over_tiles, shared_copies
from tilejit.passes.tail import Tail, find_tail, row_by_row, shortened
from tilejit.passes.teams import team_count, times
from tilejit.passes.tiles import Walk, is_same_along, tile_walk, visit_number
from tilejit.passes.trim import emptied, rows_there, trimmed
from tilejit.passes.wgmma import multiply_clocks
from tilejit.target import Target

MAX_SLOTS = 12  # more wait for nothing
TEAM_BARRIER = 14  # the hardware barrier of the first team
FEWEST_SLOTS = 2  # one is filled while the other is used; one alone where no two fit
BARRIER_BYTES = 1024  # set aside for barriers and alignment when slots are counted
ISSUE_CLOCKS = 400  # from the end of a multiply to the start of the next that waited for it


def specialise(kernel: Kernel) -> Kernel:
    """Decide the roles of a kernel whose copies are brought by a producer.

    Needs: atoms, layouts. Decides: `slots`, roles, barriers, `extra_threads`, `cluster`,
    `is_persistent`. Kernels without such copies stay as they are.
    """
    brought = [n for n in walk(kernel.body) if isinstance(n, Copy) and n.is_tma and is_inward(n)]
    brought = [n for n in brought if n.barrier is None]
    if not brought:
        return kernel
    kept: set[Buffer] = set()
    while True:
        direct, saved = forwarded(kernel, kept)
        specialiser = _Specialiser(direct, brought)
        slow = {saved[c] for c in specialiser.staging.by_threads if c in saved}
        if not slow:
            specialiser.notes += [f"{b.name} is left out" for b in saved.values()]
            return specialiser.run()
        kept |= slow  # the user's way is better


class _Specialiser:
    def __init__(self, kernel: Kernel, brought: list[Copy]) -> None:
        assert kernel.target is not None, "select did not run"
        self.target: Target = kernel.target
        self.brought = brought
        self.kernel = kernel
        self.shared = dict(kernel.shared)
        self.over_tiles = over_tiles(kernel, brought)  # has the place of slots, later
        self.teams = team_count(kernel, brought)
        self.turn = counter("turn")
        self.team = Var("team", int32, VarKind.THREAD, index(0), index(self.teams - 1))
        self.staging: Staging = stage_stores(
            kernel, self._free_bytes()[0], self.teams, self.team if self.teams > 1 else None
        )
        self.kernel = self.staging.kernel
        self.shared = dict(self.kernel.shared)
        self.slots = dict(self.kernel.slots)
        self.channels: dict[Copy, Channel] = {}
        self.notes: list[str] = []
        self.thread = self.kernel.thread_vars[0]
        self.cluster, self.axis = cluster_of(self.kernel, brought)
        self.free_slots = self._free_slots()
        self.overlaps = (
            overlaps(self.kernel, brought, self.free_slots[0]) if self.teams == 1 else {}
        )
        fragments = dict(self.kernel.fragments)
        for overlap in self.overlaps.values():
            fragments.update((b, fragments[old]) for old, b in overlap.moved.items())
        self.kernel = replace(self.kernel, fragments=fragments)
        self.tail = None
        if self.teams == 1:
            passed = set(self.overlaps)
            if self.staging.late is not None:  # its strips stand in the first iterations
                loop = main_loop(self.kernel.body)
                assert loop is not None, "a copy waits for a loop"
                passed.add(loop)
            self.tail = find_tail(self.kernel, self.staging.strips, brought, passed)
        self.uneven = unevenness(self.kernel)
        self.rows = self._trims()  # of tiles that are longer than the tensor
        self.turning = 0  # warpgroups that take turns in a loop

    def run(self) -> Kernel:
        kernel = self.kernel
        self._open_channels(kernel.body, None, self.free_slots)
        produced = _prune(self.produce(kernel.body))
        consumed = self.consume(kernel.body, None)
        if self.over_tiles:
            consumed = once_tiles_are_used(kernel, consumed, self.thread)
        walked = self._walk()
        self.notes += walked.notes
        threads = kernel.num_threads * self.teams
        up, down = registers_of(kernel, self.teams)
        producer, consumer = list[Node](), list[Node]()
        if up:
            producer.append(Control(op=ControlOp.REGISTERS_DOWN, count=down))
            consumer.append(Control(op=ControlOp.REGISTERS_UP, count=up))
        channels = list(dict.fromkeys(self.channels.values()))
        producer.append(OneThread(body=(*zeros(c.fed for c in channels), *walked.around(produced))))
        if kernel.is_shared_out:  # who has come to the cluster's barrier may not end before it
            producer.append(Control(op=ControlOp.CLUSTER_WAIT, span=kernel.span))
        role = Role("consumer", 0, threads)
        if self.teams > 1:
            role = replace(role, teams=self.teams, team=self.team, meeting=TEAM_BARRIER)
            consumed = self._in_turn(consumed, channels)
            self.notes.append(f"{self.teams} teams of {kernel.num_threads} threads take turns")
        empty = [n for copy, rows in self.rows.items() for n in self._emptied(copy, rows)]
        if self.teams == 1:
            consumer += empty  # while the first tiles are on their way
            empty = []
        consumer += self._starts(channels)
        if self.turning:
            consumer.append(first_turn(self.thread, self.turning))
        late = self.staging.late
        if late is None:
            consumer += walked.around(consumed, role)
        else:
            loop = main_loop(self.kernel.body)
            assert loop is not None, "a copy waits for a loop"
            visit = visit_number()
            consumed = during(late, consumed, loop, kernel, walked, visit)
            consumer += walked.around(consumed, role, visit)
            consumer += after(late, kernel, walked)
        if self.staging.buffers:
            consumer.append(Control(op=ControlOp.STORE_WAIT_READ))
        roles = Roles(
            roles=(
                replace(role, body=tuple(consumer)),
                Role("producer", threads, GROUP, tuple(producer)),
            )
        )
        body: list[Node] = [*empty, roles]
        if self.cluster > 1:  # a block's memory must outlive what others send to it
            body += [Control(op=ControlOp.CLUSTER_ARRIVE), Control(op=ControlOp.CLUSTER_WAIT)]
        self._say(channels, up, down)
        return walked.finish(
            replace(
                kernel,
                body=tuple(body),
                shared=self.shared,
                slots=self.slots,
                unions=self._unions(),
                extra_threads=threads - kernel.num_threads + GROUP,
                notes=(*kernel.notes, *self.notes),
            )
        )

    def _unions(self) -> tuple[tuple[tuple[Buffer, ...], tuple[Buffer, ...]], ...]:
        """What comes from other blocks lies over the slots of tiles that have been used."""
        if not self.over_tiles:
            return ()
        slots = {b: s for c in self.channels.values() for b, s in c.slotted.items()}
        fed = (slots[c.dst.buffer] for c in shared_copies(self.kernel, self.brought))
        return ((tuple(dict.fromkeys(fed)), self.over_tiles),)

    def _trims(self) -> dict[Copy, int]:
        """The rows of copies that bring fewer than their tile has, and are alone to write it."""
        writes = [b.root for n in walk(self.kernel.body) for b in n.writes]
        found = {}
        for copy in self.brought:
            rows, tile = rows_there(copy), copy.dst
            is_shared = self.axis is not None and is_same_along(copy, self.kernel, self.axis)
            is_alone = tile.is_whole and writes.count(tile.buffer.root) == 1
            if rows is None or not is_alone or is_shared:
                continue
            layout = self.shared[tile.buffer]
            if not layout.halved and boxes_of(layout, trimmed(copy, rows).dst.extents):
                found[copy] = rows
        return found

    def _emptied(self, copy: Copy, rows: int) -> list[Node]:
        slots = self.channels[copy].slotted[copy.dst.buffer]
        self.notes.append(
            f"{copy.dst.buffer.name}: only the {rows} rows that there are are brought"
        )
        return emptied(slots, rows)

    def _walk(self) -> Walk:
        """How blocks come to their tiles: in a fixed order, unless some tiles are longer."""
        is_free = (
            self.cluster == 1
            and not self.kernel.is_shared_out
            and self.teams == 1
            and self.staging.late is None
        )
        if self.uneven is not None and is_free and not self.kernel.given.panel:
            return queue_walk(self.kernel, self.uneven)
        return tile_walk(self.kernel, self.cluster, self.axis)

    # ---- teams ------------------------------------------------------------------------------

    def _starts(self, channels: Sequence[Channel]) -> list[Node]:
        """Where each team begins in the ring: after the tiles of the teams before it."""
        if self.teams == 1:
            return zeros(c.used for c in channels)
        result = zeros([self.turn])
        for channel in channels:
            value = cast(arith("mul", self.trips(channel), self.team), int32)
            result.append(Store(buffer=channel.used, index=(index(0),), value=value))
        return result

    def trips(self, channel: Channel) -> Expr:
        """How often the channel is filled for a tile."""
        found = times(self.kernel.body, channel.feed.copies[0])
        assert found is not None, "teams have equal tiles"
        return found

    def _in_turn(self, body: Body, channels: Sequence[Channel]) -> Body:
        """A tile's work, whose multiplies wait until those of the team before are over; after them
        the ring has the other teams' tiles."""
        full = {c.full for c in channels}
        waits = [
            n
            for n, node in enumerate(body)
            if any(isinstance(x, BarrierWait) and x.barrier in full for x in walk((node,)))
        ]
        # one barrier a team, completed by the team before it; the first begins unasked
        turns, count = barriers("turns", self.teams, 1), self.turn
        now = Var("turn_now", int32, VarKind.VALUE, index(0))
        is_first = binary("eq", self.team, const(0, int32))
        parity = binary("xor", binary("and", now, const(1, int32)), cast(is_first, int32))
        after = arith("floormod", arith("add", self.team, 1), self.teams)
        opened: list[Node] = [
            Load(out=now, buffer=count, index=(index(0),)),
            BarrierWait(barrier=turns, slot=self.team, parity=parity),
        ]
        lane = arith("floormod", self.thread, self.kernel.num_threads)
        closed: list[Node] = [
            If(
                condition=arith("eq", lane, 0),
                then=(BarrierArrive(barrier=turns, slot=after),),
            ),
        ]
        ended: list[Node] = [Store(buffer=count, index=(index(0),), value=arith("add", now, 1))]
        for channel in channels:
            used = Var(f"{channel.used.name}_end", int32, VarKind.VALUE, index(0))
            skipped = arith("mul", self.trips(channel), self.teams - 1)
            value = cast(arith("add", used, skipped), int32)
            ended += [
                Load(out=used, buffer=channel.used, index=(index(0),)),
                Store(buffer=channel.used, index=(index(0),), value=value),
            ]
        first, last = waits[0], waits[-1] + 1
        return (*body[:first], *opened, *body[first:last], *closed, *body[last:], *ended)

    def _say(self, channels: Sequence[Channel], up: int, down: int) -> None:
        for channel in channels:
            names = ", ".join(b.name for b in channel.slotted)
            plural = "slot" if channel.slots == 1 else "slots"
            self.notes.append(f"a producer warp fills {channel.slots} {plural} of {names} by TMA")
        if up:
            self.notes.append(f"registers: {up} a consumer thread, {down} a producer thread")
        self.notes += self.staging.notes
        if self.tail is not None:
            self.notes.append(
                f"the last iterations of the loop at {self.tail.loop.span} multiply one row of "
                "instructions after the other, each stored while the next is multiplied"
            )

    # ---- channels ---------------------------------------------------------------------------

    def _free_bytes(self) -> tuple[int, int, int]:
        """Shared memory that is left with as many stages as the user asked for, or the fewest that
        work; the bytes of one stage more, of the loops whose stages are left open; and those of
        what is brought outside of loops."""
        fed = {c.dst.buffer for c in self.brought}
        size = {b: -(-layout.bytes // 1024) * 1024 for b, layout in self.shared.items()}
        apart = (n for b, n in size.items() if b not in fed and b not in self.over_tiles)
        taken = BARRIER_BYTES + sum(apart)
        each = once = 0
        for loop, copies in self._fed_loops(self.kernel.body, None):
            bytes_ = sum(size[b] for b in {c.dst.buffer for c in copies})
            if loop is None:
                once += bytes_
            elif loop.kind is not LoopKind.PIPELINED:
                taken += bytes_
            elif loop.num_stages is None:
                each += bytes_
                taken += bytes_ * FEWEST_SLOTS
            else:
                taken += bytes_ * max(1, loop.num_stages)
        return self.target.shared_bytes - taken - once, each, once

    def _free_slots(self) -> tuple[int, int]:
        """Slots that fit of what is brought in loops whose stages the user left open, and outside
        of loops: there one more, where it fits, is filled for the next tile."""
        left, each, once = self._free_bytes()
        outside = 2 if once <= left else 1
        left -= (outside - 1) * once
        inside = max(1, min(MAX_SLOTS, FEWEST_SLOTS + left // each)) if each else 1
        return inside, outside

    def _fed_loops(self, body: Body, loop: For | None) -> list[tuple[For | None, list[Copy]]]:
        mine = [copy for _, copy in filled_in(body, self.brought)]
        result = [(loop, mine)] if mine else []
        for node in body:
            inside = node if isinstance(node, For) else loop
            for inner in node.bodies:
                result += self._fed_loops(inner, inside)
        return result

    def _open_channels(self, body: Body, loop: For | None, free: tuple[int, int]) -> None:
        """A channel for each feed of the body and of all in it. loop: the innermost one around it.
        free: slots in loops whose stages are left open, and outside of loops."""
        for feed in feeds(body, self.brought):
            slots = free[1] if loop is None else 1
            if loop is not None and loop.kind is LoopKind.PIPELINED:
                slots = free[0] if loop.num_stages is None else max(1, loop.num_stages)
            self._open(feed, slots, body)
        if loop is not None and body is loop.body and loop not in self.overlaps:
            self._defer(body)
        for node in body:
            inside = node if isinstance(node, For) else loop
            for inner in node.bodies:
                self._open_channels(inner, inside, free)

    def _open(self, feed: Feed, slots: int, body: Body) -> None:
        readers = [n for n in walk(body) if any(b.root in feed.buffers for b in n.reads)]
        by_group = all(isinstance(n, Gemm) and n.is_async for n in readers)
        name = "_".join(b.name for b in feed.buffers)
        leavers = self.kernel.num_threads // GROUP if by_group else self.kernel.num_threads
        slotted = {}
        for buffer in feed.buffers:
            fresh, layout = with_slots(buffer, self.shared.pop(buffer), slots)
            self.shared[fresh], self.slots[fresh] = layout, slots
            slotted[buffer] = fresh
        channel = Channel(
            feed=feed,
            slots=slots,
            slotted=slotted,
            full=barriers(f"{name}_full", slots, 1),
            empty=barriers(f"{name}_empty", slots, leavers * self.cluster),
            fed=counter(f"{name}_fed"),
            used=counter(f"{name}_used"),
            by_group=by_group,
            thread=self.thread,
            cluster=self.cluster,
        )
        assert by_group or self.cluster == 1, "only warpgroups leave slots of a whole cluster"
        for copy in feed.copies:
            self.channels[copy] = channel

    def _defer(self, body: Body) -> None:
        """In a loop whose accumulators only its multiplies touch, and whose operands threads do not
        write, the next multiply starts before the last one's slot is left; unless other warpgroups
        have enough to multiply meanwhile."""
        channels = self._channels_in(body)
        gemms = [n for n in body if isinstance(n, Gemm) and n.is_async]
        groups = self.kernel.num_threads // GROUP
        others_work = (groups - 1) / groups * sum(multiply_clocks(n) for n in gemms)
        if others_work >= ISSUE_CLOCKS:
            return
        if any(n.clear for n in gemms):
            return  # the assembler takes the registers of sums that nothing reads for other things
        held = held_registers(gemms)
        others = [n for n in body if not isinstance(n, Gemm | GemmWait)]
        others = [n for n in others if not only_brings(n, self.brought)]
        if not channels or not gemms or any(touches(n, held) for n in others):
            return
        operands = {r.buffer.root for g in gemms for r in (g.a, g.b)}
        if any(b.root in operands for n in others for b in all_writes(n)):
            return
        if all(c.by_group and c.slots > 1 for c in channels):
            for channel in channels:
                channel.is_deferred = True

    def _channels_in(self, body: Body) -> list[Channel]:
        mine = [self.channels[copy] for _, copy in filled_in(body, self.channels)]
        return list(dict.fromkeys(mine))

    # ---- the producer -----------------------------------------------------------------------

    def produce(self, body: Body, outer: Mapping[Channel, Var] | None = None) -> Body:
        """What of the body brings tiles, and what that needs. outer: slots that are being filled
        around it."""
        result: list[Node] = []
        channels, slot_of = self._channels_in(body), dict(outer or {})
        for place, node in enumerate(body):
            for channel in (c for c in channels if c.feed.opened == place):
                opened, slot_of[channel], parity = channel.turn(channel.fed)
                free, slot = binary("xor", parity, const(1)), slot_of[channel]
                span = channel.feed.copies[0].span
                wait = BarrierWait(barrier=channel.empty, slot=slot, parity=free, span=span)
                result += [*opened, wait]
            if isinstance(node, Copy) and node in self.channels:
                channel = self.channels[node]
                result.append(self._filling(node, channel, slot_of[channel]))
            elif isinstance(node, Let | Load):
                result.append(node)
            elif isinstance(node, For | If):
                inner = [self.produce(child, slot_of) for child in node.bodies]
                if any(isinstance(n, Copy) for child in inner for n in walk(child)):
                    result.append(_serial(node).with_bodies(*inner))
            for channel in (c for c in channels if c.feed.filled == place):
                span, slot = node.span, slot_of[channel]
                result.append(BarrierArrive(barrier=channel.full, slot=slot, span=span))
                result += counted(channel.fed)
        return tuple(result)

    def _filling(self, copy: Copy, channel: Channel, slot: Var) -> Node:
        filled = into_slot(copy, channel.slotted, slot)
        assert isinstance(filled, Copy)
        if copy in self.rows:
            filled = trimmed(filled, self.rows[copy])
        is_shared = self.axis is not None and is_same_along(copy, self.kernel, self.axis)
        return replace(
            filled,
            barrier=BarrierSlot(channel.full, slot),
            cluster_axis=self.axis if is_shared else None,
        )

    # ---- consumers --------------------------------------------------------------------------

    def consume(self, body: Body, loop: For | None) -> Body:
        """The body without what the producer does, waiting for it."""
        channels = self._channels_in(body)
        deferred = [c for c in channels if c.is_deferred]
        slot_of: dict[Channel, Var] = {}
        result: list[Node] = []
        for place, node in enumerate(body):
            if isinstance(node, Copy) and node in self.channels:
                continue
            if isinstance(node, GemmWait) and deferred:
                continue
            if self.tail is not None and node in self.tail.passed:
                continue  # they stand where the loop ends
            for channel in (c for c in channels if c.feed.first == place):
                opened, slot_of[channel], parity = channel.turn(channel.used)
                wait = BarrierWait(
                    barrier=channel.full, slot=slot_of[channel], parity=parity, span=node.span
                )
                result += [*opened, wait]
            fresh = self._inside(node)
            for channel, slot in slot_of.items():
                fresh = [into_slot(n, channel.slotted, slot) for n in fresh]
            result += fresh
            for channel in channels:
                if not channel.is_deferred and _leaves_at(channel, body) == place:
                    result += channel.leave(slot_of[channel])
                    result += counted(channel.used)
        if deferred:
            assert loop is not None, "only loops leave slots late"
            result += self._leave_late(body, loop, deferred, slot_of)
        return tuple(result)

    def _inside(self, node: Node) -> list[Node]:
        """The node with consumers' bodies, and what follows a loop that leaves slots late."""
        if not node.bodies or isinstance(node, Gemm):
            return [node]
        if only_brings(node, self.channels):
            return []
        loop = node if isinstance(node, For) else None
        if loop is not None and loop in self.overlaps:
            return self._overlapped(loop)
        if self.tail is not None and loop is self.tail.loop:
            return self._with_tail(loop, self.tail)
        inner = [self.consume(child, loop) for child in node.bodies]
        fresh = _serial(node).with_bodies(*inner)
        return [fresh] if loop is None else [fresh, *self._left_late(loop)]

    def _with_tail(self, loop: For, tail: Tail) -> list[Node]:
        channels = self._channels_in(loop.body)
        short, rounds = shortened(tail, channels)
        steady = _serial(short).with_bodies(self.consume(loop.body, loop))
        result = [steady, *self._left_late(short)]
        for channel in channels:
            channel.is_deferred = False  # the last slots are left together
        last = self.consume(loop.body, loop)
        return [*result, *row_by_row(tail, short, rounds, last, channels)]

    def _left_late(self, loop: For) -> list[Node]:
        """What follows a loop that leaves slots late."""
        if not any(c.is_deferred for c in self._channels_in(loop.body)):
            return []
        registers = held_registers([n for n in loop.body if isinstance(n, Gemm)])
        ran = arith("lt" if loop.step > 0 else "gt", loop.start, loop.stop)
        result: list[Node] = [GemmWait(pending=0, registers=registers, span=loop.span)]
        for channel in (c for c in self._channels_in(loop.body) if c.is_deferred):
            loaded, last = channel.before()
            result += [*loaded, *channel.leave(last, ran)]
        return result

    def _overlapped(self, loop: For) -> list[Node]:
        overlap, groups = self.overlaps[loop], self.kernel.num_threads // GROUP
        turns = groups if groups > 1 and overlap.has_turns and self.uneven is None else 0
        where = f"the loop at {loop.span}"
        self.notes.append(f"rounds of {where} overlap")
        if turns:
            self.turning = turns
            self.notes.append(f"{turns} warpgroups take turns to multiply in {where}")
        channels = self._channels_in(loop.body)
        others = (n for n in walk(self.kernel.body) if n not in self.channels)
        made = {b.root for n in others for b in n.writes if b.scope is Scope.SHARED}
        return overlapped(loop, overlap, channels, self.thread, turns, made)

    def _leave_late(
        self,
        body: Body,
        loop: For,
        deferred: list[Channel],
        slot_of: dict[Channel, Var],
    ) -> list[Node]:
        """Leave the slots of the iteration before: its multiplies are over when only this one's
        are not."""
        gemms = [n for n in body if isinstance(n, Gemm)]
        pending = min(len(gemms), MAX_PENDING)
        wait = GemmWait(pending=pending, registers=held_registers(gemms), span=loop.span)
        result: list[Node] = [wait]
        has_before = arith("gt" if loop.step > 0 else "lt", loop.var, loop.start)
        for channel in deferred:
            loaded, last = channel.before()
            result += [*loaded, *channel.leave(last, has_before)]
            result += counted(channel.used)
        return result


def _leaves_at(channel: Channel, body: Body) -> int:
    """The place of the node after which the channel's tile is not used any more."""
    last = channel.feed.last
    node = body[last]
    if isinstance(node, Gemm) and node.is_async:
        return next(n for n in range(last, len(body)) if isinstance(body[n], GemmWait))
    return last


def _serial(node: Node) -> Node:
    """A pipelined loop without its stages: they have become slots."""
    if isinstance(node, For) and node.kind is LoopKind.PIPELINED:
        return replace(node, kind=LoopKind.SERIAL, num_stages=0)
    return node


def _prune(body: Body) -> Body:
    """The body without values that nothing uses."""
    return _prune_into(body, set())


def _prune_into(body: Body, wanted: set[Var]) -> Body:
    result: list[Node] = []
    for node in reversed(body):
        if isinstance(node, Let | Load) and not set(node.defines) & wanted:
            continue
        inner = [_prune_into(child, wanted) for child in reversed(node.bodies)]
        fresh = node.with_bodies(*reversed(inner)) if inner else node
        wanted |= {v for e in node.exprs for v in variables(e)}
        result.append(fresh)
    return tuple(reversed(result))
