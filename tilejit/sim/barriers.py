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
from tilejit.sim.memory import SHARED_BASE
from tilejit.sim.order import Order, merge

Array = np.ndarray[Any, Any]


_PATIENCE = 100  # times that a group gives way to nobody before something lands
_MAX_EXPECTED_BYTES = (1 << 20) - 1  # PTX ISA, "Contents of the mbarrier object"


class Stopped(Exception):
    """Ends a simulated thread because the launch has failed elsewhere."""


class Turns:
    """Whose turn it is among the groups of one block or cluster.

    advance: does the next thing that happens only when no group can go on; False when nothing is
        left to do.
    failure: why the block cannot go on; every group that waits for its turn then ends.
    """

    def __init__(self, groups: int, advance: Callable[[], bool] = lambda: False) -> None:
        self._advance = advance
        self._alone = 0  # how often in a row a group has given way to nobody
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
        if self.failure is None and self._live and not self._pass_on_late(group):
            self.fail(self._deadlock())
        return not self._live

    def give_way(self, group: int) -> None:
        """Let others run first, if any can."""
        if len(self._live) > 1:
            others = [self._waiting[g][0] for g in self._live if g in self._waiting]
            self._alone = 0 if any(ready() for ready in others) else self._alone + 1
            if self._alone > _PATIENCE:  # it may be looking for what comes only then
                self._alone = 0
                self._advance()
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
        if not self._pass_on_late(group):
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

    def _pass_on_late(self, group: int) -> bool:
        """The same, after as little as lets one go on."""
        while not self._pass_on(group):
            if not self._advance():
                return False
        return True

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
        self.is_left = False  # some come and do not wait
        self.gathered: Array | None = None  # what those who have come know together
        self.released: Array | None = None

    def arrive(self, count: int, needed: int, known: Array | None) -> None:
        self.arrived += count
        self.needed = needed
        if known is not None:
            self.gathered = merge(self.gathered, known)
        if self.arrived >= needed:
            self.rounds += 1
            self.arrived = 0
            self.released, self.gathered = self.gathered, None

    def __str__(self) -> str:
        return f"{self.arrived} of {self.needed} threads have come to barrier {self.number}"


class ClusterBarrier:
    """The barrier of a cluster of `threads` threads: they arrive, and later wait (PTX ISA,
    barrier.cluster).

    order: told what is ordered by it; None when races are not looked for.
    """

    def __init__(self, threads: int, turns: Turns, order: Order | None) -> None:
        self._turns = turns
        self._order = order
        self._needed = threads
        self._arrived = 0
        self._rounds = 0
        self._awaited: dict[int, int] = {}  # by thread: the round it has arrived in
        self._passed: dict[int, int] = {}  # by thread: the last round that it has waited for
        self._gathered: Array | None = None
        self._released: Array | None = None

    def arrive(self, threads: Array, releases: bool) -> None:
        """`threads` come; what they did before is ordered if it `releases`."""
        for thread in threads.tolist():
            if thread in self._awaited:
                raise SimulationError(
                    f"{self._who(thread)} arrives at the cluster's barrier twice without waiting."
                )
            self._awaited[thread] = self._rounds
        if releases and self._order is not None:
            self._gathered = merge(self._gathered, self._order.release(threads))
        self._arrived += len(threads)
        self._complete()

    def wait(self, group: int, threads: Array, span: Span | None) -> None:
        """`threads` wait until all have come."""
        missing = [t for t in threads.tolist() if t not in self._awaited]
        if missing:
            raise SimulationError(
                f"{self._who(missing[0])} waits at the cluster's barrier, but has not arrived."
            )
        last = max((self._awaited.pop(t) for t in threads.tolist()), default=-1)
        self._turns.wait_until(group, lambda: self._rounds > last, lambda: str(self), span)
        self._passed.update(dict.fromkeys(threads.tolist(), last))
        if self._order is not None and self._released is not None:
            self._order.acquire(threads, self._released)

    def next_known(self) -> Callable[[int], bool]:
        """Tells of a thread whether it has waited for a round that nobody has completed yet."""
        now = self._rounds
        return lambda thread: self._passed.get(thread, -1) >= now

    def leave(self, threads: int) -> None:
        """`threads` have ended: nobody waits for them any more."""
        self._needed -= threads
        self._complete()

    def _who(self, thread: int) -> str:
        return f"Thread {thread}" if self._order is None else self._order.who(thread)

    def _complete(self) -> None:
        if self._arrived and self._arrived >= self._needed:
            self._rounds += 1
            self._arrived = 0
            self._released, self._gathered = self._gathered, None

    def __str__(self) -> str:
        return f"{self._arrived} of {self._needed} threads have come to the cluster's barrier"


class PhaseBarrier:
    """An mbarrier: counts arrivals and bytes, has phases (PTX ISA, "Parallel synchronization and
    communication instructions: mbarrier").

    phase: number of phases completed. `made` is who initialised it and when; `owner` the block,
        in words.
    bytes: those that its phase still expects; below 0 when they come before they are announced.
    """

    def __init__(self, address: int, count: int, made: tuple[int, int], owner: str = "") -> None:
        self.owner = owner
        self.address = address
        self.count = count
        self.pending = count
        self.bytes = 0
        self.phase = 0
        self.made = made
        self.is_known: Callable[[int], bool] = lambda thread: False  # to threads of the cluster
        self.agent: int | None = None  # what copies to it
        self._gathered: Array | None = None
        self.released: Array | None = None

    def arrive(self, count: int, known: Array | None) -> None:
        if self.pending <= 0:
            raise SimulationError(
                f"A thread arrives too often: {self}.",
                hint="Give the barrier an arrive_count for all arrivals of a phase.",
            )
        self.pending -= count
        self._gather(known)

    def expect(self, count: int) -> None:
        """The phase also waits for that many bytes."""
        self.bytes += count
        if abs(self.bytes) > _MAX_EXPECTED_BYTES:
            raise SimulationError(f"Too many bytes for one phase: {self}.")

    def receive(self, count: int, known: Array | None) -> None:
        """That many bytes have come."""
        self.bytes -= count
        self._gather(known)

    def _gather(self, known: Array | None) -> None:
        if known is not None:
            self._gathered = merge(self._gathered, known)
        while self.pending <= 0 and self.bytes == 0:
            self.pending += self.count
            self.phase += 1
            self.released = self._gathered

    def is_complete(self, parity: int) -> bool:
        """The current phase's predecessor has that parity (before the first phase, parity 1)."""
        return self.phase & 1 != parity & 1

    @property
    def place(self) -> str:
        return f"the barrier at byte {self.address - SHARED_BASE} of shared memory{self.owner}"

    def __str__(self) -> str:
        bytes_ = f" and still expects {self.bytes} bytes" if self.bytes else ""
        return (
            f"{self.place} has {self.count - self.pending} of {self.count} arrivals{bytes_} in "
            f"phase {self.phase}"
        )


class BlockBarriers:
    """The barriers of one block; the calls take the executing threads.

    order: told what is ordered by them; None when races are not looked for.
    owner: which block it is, in words, where several run at once.
    """

    def __init__(self, threads: int, turns: Turns, order: Order | None, owner: str = "") -> None:
        self._threads = threads
        self._turns = turns
        self._order = order
        self._owner = owner
        self._is_alone = not owner
        self._hardware: dict[int, HardwareBarrier] = {}
        self._phased: dict[int, PhaseBarrier] = {}

    def sync(self, group: int, threads: Array, number: int, needed: int, span: Span | None) -> None:
        """`threads` meet at hardware barrier `number`, which needs that many; 0 needs all."""
        needed = self._threads if number == 0 else needed
        barrier = self._hardware.setdefault(number, HardwareBarrier(number))
        order, rounds = self._order, barrier.rounds
        is_whole = needed == self._threads and self._is_alone and not barrier.is_left
        is_single = is_whole and len(threads) == needed
        known = None if order is None or is_single else order.release(threads)
        barrier.arrive(len(threads), needed, known)
        if barrier.rounds == rounds:
            self._turns.wait_until(
                group, lambda: barrier.rounds != rounds, lambda: str(barrier), span
            )
        elif order is not None and is_whole:
            order.synchronise_all()
            return
        if order is not None and barrier.released is not None:
            order.acquire(threads, barrier.released)

    def leave(self, threads: Array, number: int, needed: int) -> None:
        """`threads` come to a hardware barrier and do not wait."""
        barrier = self._hardware.setdefault(number, HardwareBarrier(number))
        barrier.is_left = True
        known = None if self._order is None else self._order.release(threads)
        barrier.arrive(len(threads), needed, known)

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
            self._phased[place] = PhaseBarrier(place, arrivals, (thread, time), self._owner)

    def arrive(self, threads: Array, address: Array) -> None:
        """Each thread arrives once at the mbarrier at its address."""
        for place in np.unique(address).tolist():
            members = threads[address == place]
            barrier = self.find(place, members, "arrives at")
            known = None if self._order is None else self._order.release(members)
            barrier.arrive(len(members), known)

    def expect(self, threads: Array, address: Array, count: Array) -> None:
        """Each thread announces bytes to the barrier at its address."""
        for thread, place, size in zip(
            threads.tolist(), address.tolist(), count.tolist(), strict=True
        ):
            self.find(place, np.array([thread]), "announces bytes to").expect(size)

    def publish(self, threads: Array, is_known: Callable[[int], bool]) -> None:
        """Those that `threads` have made are known to other threads too."""
        for barrier in self._phased.values():
            if barrier.made[0] in threads:
                barrier.is_known = is_known

    def receive(self, threads: Array, address: Array, count: int) -> None:
        """Each thread has brought bytes that the barrier at its address counts."""
        for place in np.unique(address).tolist():
            members = threads[address == place]
            known = None if self._order is None else self._order.release(members)
            self.find(place, members, "sends to").receive(count * len(members), known)

    def check_end(self) -> None:
        """Raise when the block ends before the bytes that a barrier expects have come."""
        for barrier in self._phased.values():
            if barrier.bytes:
                raise SimulationError(
                    f"The kernel ends while {barrier}.",
                    hint="Wait for the copies, and expect as many bytes as they have.",
                )

    def wait(
        self, group: int, threads: Array, address: Array, parity: Array, span: Span | None
    ) -> None:
        """Each thread waits until the phase of its parity has completed."""
        wanted: list[tuple[PhaseBarrier, int, Array]] = []
        for place, bit in sorted(set(zip(address.tolist(), parity.tolist(), strict=True))):
            members = threads[(address == place) & (parity == bit)]
            wanted.append((self.find(place, members, "waits at"), bit, members))

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

    def find(self, place: int, threads: Array, verb: str) -> PhaseBarrier:
        """The barrier at `place`, which `threads` must know of."""
        barrier = self._phased.get(place)
        where = f"byte {place - SHARED_BASE} of shared memory{self._owner}"
        if barrier is None:
            raise SimulationError(
                f"The kernel {verb} a barrier at {where}, but there is none.",
                hint="Make it with T.alloc_barrier.",
            )
        if self._order is not None:
            maker, time = barrier.made
            ordered = self._order.comes_after(threads, maker, time)
            others = [t for t in threads[~ordered].tolist() if not barrier.is_known(t)]
            if others:
                who, other = self._order.who(others[0]), self._order.name(maker)
                raise SimulationError(
                    f"{who} {verb} the barrier at {where} that {other} initialised, and nothing "
                    "orders the two.",
                    hint="Put T.sync_threads() between the two.",
                )
        return barrier
