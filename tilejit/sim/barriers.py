"""How the groups of a simulated block take turns, meet and wait for each other.

Knows turns, hardware barriers and mbarrier phases. Does not know memory contents.

One group runs at a time and gives its turn away only where it must wait, so runs repeat exactly
and a wait that can never end is seen at once: nobody can go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from tilejit.errors import SimulationError, Span
from tilejit.sim.hazards import Order
from tilejit.sim.memory import SHARED_BASE

Array = np.ndarray[Any, Any]


class Stopped(Exception):
    """Ends a simulated thread because the launch has failed elsewhere."""


class Turns:
    """Whose turn it is among the groups of one block.

    failure: why the block cannot go on; every group that waits for its turn then ends.
    """

    def __init__(self, groups: int) -> None:
        self.failure: BaseException | None = None
        self._gates = [threading.Semaphore(0) for _ in range(groups)]
        self._lock = threading.Lock()
        self._unborn = groups
        # of a group that waits: may it go on, and the place it waits at, in words
        self._waiting: dict[int, tuple[Callable[[], bool], Callable[[], str], Span | None]] = {}
        self._live = set(range(groups))

    def enter(self, group: int) -> None:
        """Start `group`; returns when all have started and it has its turn."""
        with self._lock:
            self._waiting[group] = (lambda: True, lambda: "starts", None)
            self._unborn -= 1
            is_last = self._unborn == 0
        if is_last:
            self._gates[0].release()
        self._take(group)

    def leave(self, group: int) -> bool:
        """End `group`; True when it was the last."""
        self._live.discard(group)
        if self.failure is None and self._live and not self._pass_on(group):
            self.fail(self._deadlock())
        return not self._live

    def give_way(self, group: int) -> None:
        """Let others run first, if any can."""
        if len(self._live) > 1:
            self._waiting[group] = (lambda: True, lambda: "runs", None)
            self._pass_on(group)
            self._take(group)

    def wait_until(
        self, group: int, ready: Callable[[], bool], place: Callable[[], str], span: Span | None
    ) -> None:
        """Return once `ready` holds; the other groups run meanwhile.

        Raises:
            SimulationError: none of the block's groups can go on.
        """
        if ready():
            return
        self._waiting[group] = (ready, place, span)
        if not self._pass_on(group):
            error = self._deadlock()
            self.fail(error)
            raise error
        self._take(group)

    def fail(self, error: BaseException) -> None:
        """End every group at its next wait."""
        if self.failure is None:
            self.failure = error
        for gate in self._gates:
            gate.release()

    def _take(self, group: int) -> None:
        self._gates[group].acquire()
        if self.failure is not None:
            raise Stopped("the launch has failed")
        self._waiting.pop(group, None)

    def _pass_on(self, group: int) -> bool:
        count = len(self._gates)
        for step in range(1, count + 1):
            other = (group + step) % count
            waits = self._waiting.get(other)
            if other in self._live and waits is not None and waits[0]():
                self._gates[other].release()
                return True
        return False

    def _deadlock(self) -> SimulationError:
        waiting = [self._waiting[g] for g in sorted(self._waiting) if g in self._live]
        places = list(dict.fromkeys(place() for _, place, _ in waiting))
        spans = [span for _, _, span in waiting if span is not None]
        return SimulationError(
            "The kernel waits for ever: " + "; ".join(places) + ".",
            span=spans[0] if spans else None,
            hint="Let every thread reach the same barriers, and arrive as often as their "
            "arrive_count says.",
        )


class HardwareBarrier:
    """One of the numbered barriers at which threads meet (PTX ISA, bar.sync)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.arrived = 0
        self.rounds = 0
        self.needed = 0
        self.gathered: Array | None = None  # what those who have come know together
        self.released: Array | None = None

    def arrive(self, count: int, needed: int, known: Array | None) -> None:
        self.arrived += count
        self.needed = needed
        if known is not None:
            self.gathered = known if self.gathered is None else np.maximum(self.gathered, known)
        if self.arrived >= needed:
            self.rounds += 1
            self.arrived = 0
            self.released, self.gathered = self.gathered, None

    def __str__(self) -> str:
        return f"{self.arrived} of {self.needed} threads have come to barrier {self.number}"


class PhaseBarrier:
    """An mbarrier: counts arrivals, has phases (PTX ISA, "Parallel synchronization and
    communication instructions: mbarrier").

    phase: number of phases completed. `made` is who initialised it and when.
    """

    def __init__(self, address: int, count: int, made: tuple[int, int]) -> None:
        self.address = address
        self.count = count
        self.pending = count
        self.phase = 0
        self.made = made
        self._gathered: Array | None = None
        self.released: Array | None = None

    def arrive(self, count: int, known: Array | None) -> None:
        if known is not None:
            self._gathered = known if self._gathered is None else np.maximum(self._gathered, known)
        self.pending -= count
        while self.pending <= 0:
            self.pending += self.count
            self.phase += 1
            self.released = self._gathered

    def is_complete(self, parity: int) -> bool:
        """The current phase's predecessor has that parity (before the first phase, parity 1)."""
        return self.phase & 1 != parity & 1

    def __str__(self) -> str:
        return (
            f"the barrier at byte {self.address - SHARED_BASE} of shared memory has "
            f"{self.count - self.pending} of {self.count} arrivals in phase {self.phase}"
        )


class BlockBarriers:
    """The barriers of one block; the calls take the executing threads.

    order: told what is ordered by them; None when races are not looked for.
    """

    def __init__(self, threads: int, turns: Turns, order: Order | None) -> None:
        self._threads = threads
        self._turns = turns
        self._order = order
        self._hardware: dict[int, HardwareBarrier] = {}
        self._phased: dict[int, PhaseBarrier] = {}

    def sync(self, group: int, threads: Array, number: int, needed: int, span: Span | None) -> None:
        """`threads` meet at hardware barrier `number`, which needs that many; 0 needs all."""
        needed = self._threads if number == 0 else needed
        barrier = self._hardware.setdefault(number, HardwareBarrier(number))
        order, rounds = self._order, barrier.rounds
        is_alone = len(threads) == self._threads
        known = None if order is None or is_alone else order.release(threads)
        barrier.arrive(len(threads), needed, known)
        if barrier.rounds == rounds:
            self._turns.wait_until(
                group, lambda: barrier.rounds != rounds, lambda: str(barrier), span
            )
        elif order is not None and needed == self._threads:
            order.synchronise_all()
            return
        if order is not None and barrier.released is not None:
            order.acquire(threads, barrier.released)

    def sync_warp(self, threads: Array) -> None:
        """Each warp's `threads` are ordered among themselves."""
        if self._order is not None:
            for warp in np.unique(threads >> 5).tolist():
                members = threads[threads >> 5 == warp]
                self._order.acquire(members, self._order.release(members))

    def initialise(self, threads: Array, address: Array, count: Array) -> None:
        """Make an mbarrier at each address."""
        time = 0
        if self._order is not None:
            time = self._order.tick()
        for thread, place, arrivals in zip(
            threads.tolist(), address.tolist(), count.tolist(), strict=True
        ):
            if place % 8:
                raise SimulationError(f"A barrier at byte {place - SHARED_BASE} is misaligned.")
            self._phased[place] = PhaseBarrier(place, arrivals, (thread, time))

    def arrive(self, threads: Array, address: Array) -> None:
        """Each thread arrives once at the mbarrier at its address."""
        for place in np.unique(address).tolist():
            members = threads[address == place]
            barrier = self._find(place, members, "arrives at")
            known = None if self._order is None else self._order.release(members)
            barrier.arrive(len(members), known)

    def wait(
        self, group: int, threads: Array, address: Array, parity: Array, span: Span | None
    ) -> None:
        """Each thread waits until the phase of its parity has completed."""
        wanted: list[tuple[PhaseBarrier, int, Array]] = []
        for place, bit in sorted(set(zip(address.tolist(), parity.tolist(), strict=True))):
            members = threads[(address == place) & (parity == bit)]
            wanted.append((self._find(place, members, "waits at"), bit, members))

        def late() -> list[str]:
            return [
                f"{barrier}, and threads wait for parity {bit & 1}"
                for barrier, bit, _ in wanted
                if not barrier.is_complete(bit)
            ]

        self._turns.wait_until(group, lambda: not late(), lambda: "; ".join(late()), span)
        if self._order is not None:
            for barrier, _, members in wanted:
                if barrier.released is not None:
                    self._order.acquire(members, barrier.released)

    def _find(self, place: int, threads: Array, verb: str) -> PhaseBarrier:
        barrier = self._phased.get(place)
        where = f"byte {place - SHARED_BASE} of shared memory"
        if barrier is None:
            raise SimulationError(
                f"The kernel {verb} a barrier at {where}, but there is none.",
                hint="Make it with T.alloc_barrier.",
            )
        if self._order is not None:
            maker, time = barrier.made
            ordered = self._order.comes_after(threads, maker, time)
            if not ordered.all():
                thread = int(threads[ordered.argmin()])
                raise SimulationError(
                    f"Thread {thread} {verb} the barrier at {where} that thread {maker} "
                    "initialised, and nothing orders the two.",
                    hint="Put T.sync_threads() between the two.",
                )
        return barrier
