"""Finds races in a block: accesses of two threads to one place that nothing orders.

Knows, for every place, who wrote and who read it when, and for every thread up to when it knows
what each other thread did. Does not know what is stored, nor how barriers count.

Time is a counter of the block's accesses. `known[u, t]` is the time up to which thread u comes
after what thread t did; a barrier raises it. An access of u conflicts with an earlier one of t at
a time later than `known[u, t]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tilejit.errors import SimulationError, Span

Array = np.ndarray[Any, Any]

_IN_FLIGHT = np.int64(1) << 62  # the time of a write that has not landed
_SYNC_HINT = (
    "Put T.sync_threads() between the two. Iterations of one T.Parallel must not depend on each "
    "other."
)


class Order:
    """What comes before what among a block's `threads` (in whole warps).

    site_of: the source span of what happened at a time.
    """

    site_of: Callable[[int], Span | None]

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.time = 0
        self.synced = 0  # everything until then comes before everything after, for all threads
        self.known = np.zeros((threads, threads), np.int64)
        self.bit = np.uint32(1) << (np.arange(threads, dtype=np.uint32) % np.uint32(32))

    def start(self, site_of: Callable[[int], Span | None]) -> None:
        """Another block starts, after everything until now."""
        self.site_of = site_of
        self.synchronise_all()

    def tick(self) -> int:
        self.time += 1
        return self.time

    def release(self, threads: Array) -> Array:
        """What `threads` know together, themselves included: up to when, for each thread."""
        together = self.known[threads].max(axis=0)
        together[threads] = self.time
        return together  # type: ignore[no-any-return]

    def acquire(self, threads: Array, known: Array) -> None:
        """`threads` now come after what a `release` told."""
        self.known[threads] = np.maximum(self.known[threads], known)

    def synchronise_all(self) -> None:
        """All threads of the block have met."""
        self.known.fill(self.time)
        self.synced = self.time

    def comes_after(self, threads: Array, other: int, time: int) -> Array:
        """Which of `threads` come after what `other` did at `time`."""
        return (threads == other) | (self.known[threads, other] >= time)  # type: ignore[no-any-return]


class History:
    """Who accessed the bytes of one region when.

    noun, name: the kind of memory, and the region, in words.
    grain: bytes that are accessed together; halved when an access needs it.
    report_unwritten: reading a byte that nothing wrote is an error too.
    """

    def __init__(
        self,
        order: Order,
        size: int,
        noun: str,
        name: str,
        grain: int = 16,
        report_unwritten: bool = False,
    ) -> None:
        self._order = order
        self._noun = noun
        self._name = name
        self._report_unwritten = report_unwritten
        self._warps = order.threads // 32
        self._grain = grain
        places = -(-size // grain)
        self._writer = np.zeros(places, np.int32)
        self._written = np.zeros(places, np.int64)
        self._is_atomic = np.zeros(places, np.bool_)
        self._last_read = np.zeros(places, np.int64)
        # by place and warp: time of the last read and which lanes have read
        self._read = np.zeros(places * self._warps, np.int64)
        self._readers = np.zeros(places * self._warps, np.uint32)

    # --- accesses --------------------------------------------------------------------------------

    def read(self, threads: Array, offset: Array, width: int) -> None:
        """Threads read `width` bytes each at byte `offset` (arrays of one entry a thread)."""
        threads, places = self._places(threads, offset, width)
        time = self._order.tick()
        written = self._written[places]
        if self._report_unwritten and not written.all():
            self._report_unwritten_read(places, written)
        if written.max() > self._order.synced:
            self._check_writers(threads, places, written, "reads", None)
        flat = places * self._warps + (threads >> 5)
        stale = self._read[flat] <= self._order.synced
        if stale.any():
            self._readers[flat[stale]] = 0
        np.bitwise_or.at(self._readers, flat, self._order.bit[threads])
        self._read[flat] = time
        self._last_read[places] = time

    def write(
        self,
        threads: Array,
        offset: Array,
        width: int,
        same: Callable[[], Array] | None = None,
        is_atomic: bool = False,
    ) -> None:
        """Threads write; `same` says which of them change nothing."""
        count = len(threads)
        threads, places = self._places(threads, offset, width)
        time = self._order.tick()
        written = self._written[places]
        if written.max() > self._order.synced:
            excused = self._is_atomic[places] if is_atomic else None
            if excused is None and same is not None:
                excused = same().repeat(len(places) // count)
            self._check_writers(threads, places, written, "writes", excused)
        if self._last_read[places].max() > self._order.synced:
            self._check_readers(threads, places)
        self._writer[places] = threads
        self._written[places] = time
        self._is_atomic[places] = is_atomic

    def start_copy(self, threads: Array, offset: Array, width: int) -> None:
        """Threads issue asynchronous writes that may land from now on."""
        self.write(threads, offset, width)
        _, places = self._places(threads, offset, width)
        self._written[places] = _IN_FLIGHT

    def land_copy(self, threads: Array, offset: Array, width: int) -> None:
        """The asynchronous writes are done: their threads' own accesses may follow."""
        threads, places = self._places(threads, offset, width)
        self._writer[places] = threads
        self._written[places] = self._order.tick()

    # --- checks ----------------------------------------------------------------------------------

    def _places(self, threads: Array, offset: Array, width: int) -> tuple[Array, Array]:
        """Thread and place of every place touched."""
        grain = self._grain
        while width % grain or (offset & (grain - 1)).any():
            grain //= 2
        if grain != self._grain:
            self._refine(self._grain // grain)
        places = offset // grain
        if width == grain:
            return threads, places
        each = width // grain
        return threads.repeat(each), (places[:, None] + np.arange(each)).ravel()

    def _refine(self, factor: int) -> None:
        self._grain //= factor
        for name in ("_writer", "_written", "_is_atomic", "_last_read"):
            setattr(self, name, getattr(self, name).repeat(factor))
        for name in ("_read", "_readers"):
            by_place = getattr(self, name).reshape(-1, self._warps)
            setattr(self, name, by_place.repeat(factor, axis=0).reshape(-1))

    def _check_writers(
        self, threads: Array, places: Array, written: Array, verb: str, excused: Array | None
    ) -> None:
        in_flight = written == _IN_FLIGHT
        writer = self._writer[places]
        bad = (written > self._order.known[threads, writer]) & (writer != threads)
        if excused is not None:
            bad &= ~excused
        bad |= in_flight
        if not bad.any():
            return
        first = int(bad.argmax())
        where = self._where(places[first])
        if in_flight[first]:
            raise SimulationError(
                f"Thread {threads[first]} {verb} {self._noun} that an asynchronous copy of "
                f"thread {writer[first]} is still filling.",
                notes=[where],
                hint="Wait for the copy first.",
            )
        raise SimulationError(
            f"Thread {threads[first]} {verb} {self._noun} that thread {writer[first]} wrote, "
            "and nothing orders the two.",
            notes=[where],
            hint=_SYNC_HINT,
            related=self._sites([(int(written[first]), "written here")]),
        )

    def _check_readers(self, threads: Array, places: Array) -> None:
        """Raise when a place is written that another thread read and nothing orders the two."""
        flat = places[:, None] * self._warps + np.arange(self._warps)
        time = self._read[flat]
        at, warp = np.nonzero(time > self._order.synced)
        if not len(at):
            return
        lanes = np.arange(32)
        has_read = (self._readers[flat[at, warp]][:, None] >> lanes.astype(np.uint32)) & 1
        reader = warp[:, None] * 32 + lanes
        writer = threads[at][:, None]
        bad = has_read.astype(np.bool_) & (reader != writer)
        bad &= self._order.known[writer, reader] < time[at, warp][:, None]
        if not bad.any():
            return
        row, lane = (int(i) for i in np.argwhere(bad)[0])
        raise SimulationError(
            f"Thread {threads[at[row]]} writes {self._noun} that thread {reader[row, lane]} "
            "read, and nothing orders the two.",
            notes=[self._where(places[at[row]])],
            hint=_SYNC_HINT,
            related=self._sites([(int(time[at[row], warp[row]]), "read here")]),
        )

    def _report_unwritten_read(self, places: Array, written: Array) -> None:
        raise SimulationError(
            f"The kernel reads {self._noun} that nothing has written.",
            notes=[self._where(places[(written == 0).argmax()])],
            hint="Fill the buffer first, for example with T.clear.",
        )

    def _where(self, place: int) -> str:
        return f"Byte {int(place) * self._grain} of {self._name}."

    def _sites(self, events: Iterable[tuple[int, str]]) -> list[tuple[Span | None, str]]:
        return [(self._order.site_of(time), label) for time, label in events]
