"""Finds races in a block: accesses of two threads to one place that nothing orders.

Knows, for every place, who wrote and who read it when. Does not know what is stored, nor how
barriers count.

An access of thread u conflicts with an earlier one of thread t at a time later than the order's
`known[u, t]`. What is read asynchronously is held until it has been read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tilejit.errors import SimulationError, Span
from tilejit.sim.order import Order

Array = np.ndarray[Any, Any]

_IN_FLIGHT = np.int64(1) << 62  # the time of a write that has not landed
_SYNC_HINT = (
    "Put T.sync_threads() between the two. Iterations of one T.Parallel must not depend on each "
    "other."
)


class Flights:
    """What asynchronous readers do with the places of a region.

    fenced: the time of the fence that covers the last write. held: how many are still reading,
    holder: the last of them.
    """

    def __init__(self, places: int) -> None:
        self.fenced = np.zeros(places, np.int64)
        self.held = np.zeros(places, np.int16)
        self.holder = np.zeros(places, np.int32)
        self._names: dict[str, int] = {}

    def refine(self, factor: int) -> None:
        for name in ("fenced", "held", "holder"):
            setattr(self, name, getattr(self, name).repeat(factor))

    def number_of(self, name: str) -> int:
        return self._names.setdefault(name, len(self._names))

    def name_of(self, place: int) -> str:
        return list(self._names)[int(self.holder[place])]


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
        self._warps = order.warps
        self._grain = grain
        places = -(-size // grain)
        self._writer = np.zeros(places, np.int32)
        self._written = np.zeros(places, np.int64)
        self._is_atomic = np.zeros(places, np.bool_)
        self._last_read = np.zeros(places, np.int64)
        # by place and warp: time of the last read and which lanes have read
        self._read = np.zeros(places * self._warps, np.int64)
        self._readers = np.zeros(places * self._warps, np.uint32)
        self._flights: Flights | None = None

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
        self._record_read(threads, places, time)

    def _record_read(self, threads: Array, places: Array, time: int) -> None:
        flat = places * self._warps + (threads >> 5)
        stale = self._read[flat] <= self._order.synced
        if stale.any():
            self._readers[flat[stale]] = 0
        others = (self._readers[flat] & ~self._order.bit[threads]) != 0
        if others.any():
            self._forget_reads(threads[others], flat[others])
        np.bitwise_or.at(self._readers, flat, self._order.bit[threads])
        self._read[flat] = time
        self._last_read[places] = time

    def _forget_reads(self, threads: Array, flat: Array) -> None:
        """Reads of a warp that a thread which now reads comes after: who comes after the new read
        comes after them."""
        lanes = np.arange(32)
        reader = (flat % self._warps)[:, None] * 32 + lanes
        is_before = self._order.known[threads[:, None], reader] >= self._read[flat][:, None]
        before = (is_before.astype(np.uint32) << lanes.astype(np.uint32)).sum(1, dtype=np.uint32)
        np.bitwise_and.at(self._readers, flat, ~before)

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
        if self._flights is not None:
            self._check_held(threads, places)
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

    # --- what agents do --------------------------------------------------------------------------

    def start_load(self, thread: int, agent: int, offset: Array, width: int) -> None:
        """`thread` starts a copy whose writes, by `agent`, may land from now on."""
        threads = np.full(len(offset), thread)
        self.write(threads, offset, width)
        _, places = self._places(threads, offset, width)
        self._writer[places] = agent
        self._written[places] = _IN_FLIGHT

    def land_load(self, offset: Array, width: int, time: int) -> None:
        """The writes have landed; agents see each other's without a fence."""
        _, places = self._places(offset, offset, width)
        self._written[places] = time
        self._async().fenced[places] = time

    def hold(self, threads: Array, name: str, offset: Array, width: int) -> None:
        """`threads` together start something, `name` in words, that reads bytes by and by. Its
        bytes are distinct."""
        _, places = self._places(offset, offset, width)
        self._order.tick()
        written, writer = self._written[places], self._writer[places]
        if self._report_unwritten and not written.all():
            self._report_unwritten_read(places, written)
        flights = self._async()
        fenced = flights.fenced[places]
        known = self._order.known_by_all(threads)[writer]
        for problem, bad in (
            ("is still filling", written == _IN_FLIGHT),
            ("wrote, and nothing orders the two", known < written),
            ("wrote without a fence.proxy.async after it", fenced < written),
            ("wrote, and nothing orders it and the fence.proxy.async after that", known < fenced),
        ):
            if bad.any():
                self._report_hold(name, problem, places, int(bad.argmax()))
        flights.held[places] += 1
        flights.holder[places] = flights.number_of(name)

    def release_hold(self, reader: int, offset: Array, width: int, time: int) -> None:
        """The bytes have been read; the thread or agent `reader` counts as who did it."""
        readers, places = self._places(np.full(len(offset), reader), offset, width)
        self._async().held[places] -= 1
        self._record_read(readers, places, time)

    def fence(self, threads: Array, time: int) -> None:
        """What `threads` have written comes before what agents read for those who come later."""
        flights = self._async()
        late = np.flatnonzero(flights.fenced < self._written)
        flights.fenced[late[np.isin(self._writer[late], threads)]] = time

    def _async(self) -> Flights:
        if self._flights is None:
            self._flights = Flights(len(self._written))
        return self._flights

    # --- checks ----------------------------------------------------------------------------------

    def _places(self, threads: Array, offset: Array, width: int) -> tuple[Array, Array]:
        """Thread and place of every place touched."""
        if self._warps != self._order.warps:
            self._widen()
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
        if self._flights is not None:
            self._flights.refine(factor)

    def _widen(self) -> None:
        """There are more agents than before."""
        more = self._order.warps - self._warps
        for name in ("_read", "_readers"):
            by_place = getattr(self, name).reshape(-1, self._warps)
            setattr(self, name, np.pad(by_place, ((0, 0), (0, more))).reshape(-1))
        self._warps = self._order.warps

    def _check_held(self, threads: Array, places: Array) -> None:
        held = self._async().held[places]
        if not held.any():
            return
        first = int(held.argmax())
        raise SimulationError(
            f"{self._order.who(threads[first])} writes {self._noun} that "
            f"{self._async().name_of(places[first])} is still reading.",
            notes=[self._where(places[first])],
            hint="Wait for it first.",
        )

    def _report_hold(self, name: str, problem: str, places: Array, first: int) -> None:
        written, writer = self._written[places[first]], int(self._writer[places[first]])
        other = self._order.name(writer)
        if "filling" in problem and writer < self._order.threads:
            other = f"an asynchronous copy of {other}"
        raise SimulationError(
            f"{name[0].upper()}{name[1:]} reads {self._noun} that {other} {problem}.",
            notes=[self._where(places[first])],
            hint="Let each thread that writes execute a fence.proxy.async and then meet the "
            "reader at a barrier."
            if "fence" in problem
            else "Wait for the copy first."
            if "filling" in problem
            else _SYNC_HINT,
            related=self._sites([(int(written), "written here")] if written < _IN_FLIGHT else []),
        )

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
        who, other = self._order.who(threads[first]), self._order.name(int(writer[first]))
        is_agent = writer[first] >= self._order.threads
        if in_flight[first]:
            other = other if is_agent else f"an asynchronous copy of {other}"
            raise SimulationError(
                f"{who} {verb} {self._noun} that {other} is still filling.",
                notes=[where],
                hint="Wait for the copy first.",
            )
        raise SimulationError(
            f"{who} {verb} {self._noun} that {other} wrote, and nothing orders the two.",
            notes=[where],
            hint="Wait for the copy first." if is_agent else _SYNC_HINT,
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
            f"{self._order.who(writer[row, 0])} writes {self._noun} that "
            f"{self._order.name(int(reader[row, lane]))} read, and nothing orders the two.",
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
