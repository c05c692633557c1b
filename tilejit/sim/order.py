"""What comes before what among the threads of a block, or of a cluster of blocks.

Knows, for every thread, up to when it knows what each other thread did. Does not know what they
do, nor how barriers count.

Time is a counter of the threads' accesses. `known[u, t]` is the time up to which thread u comes
after what thread t did; a barrier raises it. What is done asynchronously is done by agents, which
are numbered after the threads and know nothing themselves: the bulk copies that one barrier is
told of, the matrix products of one warpgroup.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilejit.errors import Span

Array = np.ndarray[Any, Any]


class Order:
    """What comes before what among `threads` threads (in whole warps) and their agents.

    site_of: the source span of what happened at a time.
    block_threads: threads of one block, where the threads are those of a cluster of blocks.
    """

    site_of: Callable[[int], Span | None]

    def __init__(self, threads: int, block_threads: int = 0) -> None:
        self.threads = threads
        self.time = 0
        self.synced = 0  # everything until then comes before everything after, for all threads
        self.known = np.zeros((threads, threads), np.int64)
        self.bit = _bits(threads)
        self.warps = threads // 32  # agents included
        self._block_threads = block_threads or threads
        self._agents: dict[int, str] = {}  # names
        self._copiers = range(0)  # numbers for agents that only write
        self._next_warp = self.warps
        self._landed: list[tuple[int, int]] = []  # agents and times that not all threads may know

    def start(self, site_of: Callable[[int], Span | None]) -> None:
        """Another block starts, after everything until now."""
        self.site_of = site_of
        self._agents.clear()
        self._copiers = range(0)
        self._next_warp = self.threads // 32
        self._landed.clear()
        self.known.fill(self.time)
        self.synced = self.time

    def tick(self) -> int:
        self.time += 1
        return self.time

    def new_agent(self, name: str, reads: bool) -> int:
        """The number of something that acts by itself, with its name in words. One that reads has
        a warp of its own, as a history keeps one time for the reads of a warp."""
        if reads:
            number = self._new_warp()[0]
        else:
            self._copiers = self._copiers or self._new_warp()
            number, self._copiers = self._copiers[0], self._copiers[1:]
        self._agents[number] = name
        return number

    def _new_warp(self) -> range:
        """Numbers that nobody has."""
        start = 32 * self._next_warp
        self._next_warp += 1
        if self._next_warp > self.warps:
            self.warps = self._next_warp
            self.known = np.pad(self.known, ((0, 0), (0, 32)))
            self.bit = _bits(32 * self.warps)
        return range(start, start + 32)

    def name(self, actor: int) -> str:
        """The thread or agent in words."""
        if actor >= self.threads:
            return self._agents[actor]
        block, thread = divmod(actor, self._block_threads)
        is_alone = self._block_threads == self.threads
        return f"thread {thread}" + ("" if is_alone else f" of block {block} of the cluster")

    def who(self, actor: int) -> str:
        """The same, to begin a sentence with."""
        name = self.name(int(actor))
        return name[0].upper() + name[1:]

    def land(self, agent: int) -> int:
        """The time of something that an agent has just done."""
        time = self.tick()
        self._landed.append((agent, time))
        return time

    def told(self, agent: int, time: int) -> Array:
        """What those know who learn of nothing but an agent's doing."""
        known = np.zeros(32 * self.warps, np.int64)
        known[agent] = time
        return known

    def release(self, threads: Array) -> Array:
        """What `threads` know together, themselves included: up to when, for each thread."""
        together = self.known[threads].max(axis=0)
        together[threads] = self.time
        return together  # type: ignore[no-any-return]

    def acquire(self, threads: Array, known: Array) -> None:
        """`threads` now come after what a `release` told."""
        if len(known) == self.known.shape[1]:
            self.known[threads] = np.maximum(self.known[threads], known)
        else:  # told before there were more agents
            self.known[threads, : len(known)] = np.maximum(self.known[threads, : len(known)], known)

    def synchronise_all(self) -> None:
        """All threads have met: they come after what any of them has done or been told."""
        agents = self.known[:, self.threads :].max(axis=0)
        self.known[:, : self.threads] = self.time
        self.known[:, self.threads :] = agents
        self._landed = [(a, t) for a, t in self._landed if agents[a - self.threads] < t]
        self.synced = min((t - 1 for _, t in self._landed), default=self.time)

    def comes_after(self, threads: Array, other: int, time: int) -> Array:
        """Which of `threads` come after what `other` did at `time`."""
        return (threads == other) | (self.known[threads, other] >= time)  # type: ignore[no-any-return]

    def known_by_all(self, threads: Array) -> Array:
        """Up to when all of `threads` come after what each actor did."""
        known = self.known[threads]
        known[np.arange(len(threads)), threads] = self.time
        return known.min(axis=0)  # type: ignore[no-any-return]


def _bits(actors: int) -> Array:
    return np.uint32(1) << (np.arange(actors, dtype=np.uint32) % np.uint32(32))


def merge(first: Array | None, second: Array) -> Array:
    """What is known from two releases, the first of which there may not have been."""
    if first is None or len(first) == len(second):
        result: Array = second if first is None else np.maximum(first, second)
        return result
    short, long = sorted((first, second), key=len)
    wide: Array = np.pad(short, (0, len(long) - len(short)))
    wide[:] = np.maximum(wide, long)
    return wide
