"""One block while it is simulated: its memories, barriers and what happened when.

Knows what the groups of a block share. Does not know granules or how a launch runs them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from tilejit.errors import Span
from tilejit.sim.barriers import BlockBarriers, Turns
from tilejit.sim.hazards import History, Order
from tilejit.sim.memory import Memory, Region, shared_region

WARP = 32
_MAX_WATCHED_BYTES = 1 << 26  # the history of a byte takes up to 30


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is looked for while simulating.

    races: accesses of two of a block's threads to one place that nothing orders, and accesses to
        what an asynchronous copy is still filling. Other blocks are not looked at, nor
        arrays of more than 64 MiB.
    unwritten: reads of shared memory that nothing has written.
    """

    races: bool = True
    unwritten: bool = False


class Watch:
    """The search for races through all blocks of a launch, which run one after the other.

    order: of the accesses of the block that runs; None when races are not looked for.
    """

    def __init__(self, checks: Checks) -> None:
        self.order: Order | None = None
        self._checks = checks
        self._histories: dict[Region, History] = {}

    def start_block(self, threads: int, site_of: Callable[[int], Span | None]) -> None:
        """A block of `threads` threads starts: what was before is in order."""
        if not self._checks.races:
            return
        if self.order is None:
            self.order = Order(threads)
        self.order.start(site_of)

    def history_of(self, region: Region, space: str) -> History | None:
        """The accesses of a region so far, or None."""
        if self.order is None or region.size > _MAX_WATCHED_BYTES:
            return None
        found = self._histories.get(region)
        if found is None:
            unwritten = self._checks.unwritten and space == "shared"
            found = self._histories[region] = History(
                self.order, region.size, f"{space} memory", region.name, region.grain, unwritten
            )
        return found

    def forget(self, region: Region) -> None:
        """The region exists no more."""
        self._histories.pop(region, None)


class Block:
    """A block of `threads` threads, run as groups of `lanes`, the last perhaps not full.

    width: lanes of a group in whole warps; the surplus lanes are never active.
    """

    def __init__(
        self, threads: int, lanes: int, shared_bytes: int, memory: Memory, watch: Watch
    ) -> None:
        lanes = lanes or threads
        assert lanes == threads or lanes % WARP == 0, f"groups of {lanes} of {threads} threads"
        self.threads = threads
        self.lanes = lanes
        self.groups = -(-threads // lanes)
        self.width = -(-lanes // WARP) * WARP
        self.memory = memory
        self.shared_region = shared_region(shared_bytes)
        self.shared = Memory("shared", [self.shared_region])
        self.watch = watch
        watch.start_block(self.groups * self.width, self.site_of)
        self.turns = Turns(self.groups)
        self.barriers = BlockBarriers(threads, self.turns, watch.order)
        self._times: list[int] = []
        self._sites: list[Span | None] = []

    def mark(self, span: Span | None) -> None:
        """What happens from now on happens at `span`."""
        order = self.watch.order
        if order is not None:
            self._times.append(order.time)
            self._sites.append(span)

    def site_of(self, time: int) -> Span | None:
        """The span of what happened at that time."""
        place = bisect.bisect_left(self._times, time) - 1
        return self._sites[place] if place >= 0 else None
