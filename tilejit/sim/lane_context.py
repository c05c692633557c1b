"""What the lanes of a group do to the block: memory accesses, asynchronous copies, barriers.

Knows which lanes are active and the block they belong to. Does not know scalar operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilejit.errors import Span
from tilejit.sim.block import CLUSTER_SHIFT, Block
from tilejit.sim.hazards import History
from tilejit.sim.memory import LocalMemory, Memory, raw_dtype

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """Asynchronous copies in flight, one entry a lane: `raw` goes to `place`."""

    lanes: Array
    place: Array
    raw: Array
    group: Array


class LaneEffects:
    """`isa.machine.LaneContext`: lanes are the threads of group `group`, in whole warps.

    mask: the lanes that execute, None for all. active: those of the instruction being executed.
    """

    def __init__(self, block: Block, group: int) -> None:
        self._block = block
        self._group = block.rank * block.groups + group
        self.width = block.width
        first = group * block.lanes
        numbers = first + np.arange(self.width)
        self.thread: Array = numbers.astype(np.int32)
        self._threads = block.first + numbers
        real = numbers < min(first + block.lanes, block.threads)
        self.everyone: Array = real
        self.mask: Array | None = None if real.all() else real
        self.active: Array = real
        self.local = LocalMemory(self.width)
        self._all = np.arange(self.width)
        self._span: Span | None = None
        self._copies: list[_Copy] = []
        self._committed = np.zeros(self.width, np.int64)

    def begin(self, span: Span | None) -> None:
        """What follows happens at `span`."""
        self._span = span
        self._block.mark(span)

    def give_way(self) -> None:
        """Let the block's other groups run."""
        self._block.turns.give_way(self._group)
        self._block.mark(self._span)

    # --- lanes -----------------------------------------------------------------------------------

    def mask_with(self, when: Array | None) -> Array | None:
        """The executing lanes for which `when` holds; None for all."""
        if when is None:
            return self.mask
        assert when.dtype == np.bool_, f"a condition of dtype {when.dtype}"
        if len(when) == 1:
            return self.mask if when[0] else np.zeros(self.width, np.bool_)
        if self.mask is not None:
            return when & self.mask
        return None if when.all() else when

    def spread(self, value: Array) -> Array:
        """The value with one element a lane."""
        return value if len(value) == self.width else value.repeat(self.width)

    def lanes_of(self, mask: Array | None) -> Array:
        return self._all if mask is None else np.flatnonzero(mask)

    def memory_of(self, space: str) -> Memory:
        if space == "global":
            return self._block.memory
        if space == "cluster":
            return self._block.cluster_memory
        return self._block.shared if space == "shared" else self.local

    # --- memory ----------------------------------------------------------------------------------

    def read_raw(
        self, space: str, place: Array, width: int, mask: Array | None, is_const: bool = False
    ) -> Array:
        """`width` bytes at each lane's address as one element; 0 where the mask is false. Lanes
        that all read one `place` share one result.

        is_const: nothing writes there, so that races need not be looked for.
        """
        if mask is None:
            return self._read_lanes(space, place, width, self._all, is_const)
        lanes, place = np.flatnonzero(mask), self.spread(place)
        result = np.zeros(self.width, raw_dtype(width))
        if not len(lanes):
            return result
        result[lanes] = self._read_lanes(space, place[lanes], width, lanes, is_const)
        return result

    def _read_lanes(
        self, space: str, place: Array, width: int, lanes: Array, is_const: bool
    ) -> Array:
        if space == "local":
            self.local.check_owner(place, lanes, width, "reads")
        raw = self.memory_of(space).read(place, width)
        if not is_const:
            place = place if len(place) == len(lanes) else place.repeat(len(lanes))
            for history, threads, offset, _ in self._tracked(space, place, width, lanes, "reads"):
                history.read(threads, offset, width)
        return raw

    def write_raw(self, space: str, place: Array, raw: Array, mask: Array | None) -> None:
        """Write each lane's element at its address, where the mask is true."""
        lanes = self.lanes_of(mask)
        if mask is not None:
            place, raw = place[lanes], raw[lanes]
        if not len(lanes):
            return
        width = raw.dtype.itemsize
        memory = self.memory_of(space)
        if space == "local":
            self.local.check_owner(place, lanes, width, "writes")
        for history, threads, offset, at in self._tracked(space, place, width, lanes, "writes"):
            same = functools.partial(memory.same, place[at], raw[at])
            history.write(threads, offset, width, same)
        memory.write(place, raw)

    def check_atomic(self, space: str, place: Array, width: int, lanes: Array) -> None:
        """Check an atomic access of these lanes."""
        self.memory_of(space).check(place, width, "changes")
        for history, threads, offset, _ in self._tracked(space, place, width, lanes, "changes"):
            history.write(threads, offset, width, is_atomic=True)

    def _tracked(
        self, space: str, place: Array, width: int, lanes: Array, verb: str
    ) -> Iterator[tuple[History, Array, Array, Array | slice]]:
        """For each region that is accessed: its history, and the threads, byte offsets and
        positions of the accesses."""
        if space == "local" or self._block.watch.order is None:
            return
        for region, at in self.memory_of(space).split(place, width, verb):
            noun = "shared" if space == "cluster" else space
            history = self._block.watch.history_of(region, noun)
            if history is not None:
                yield history, self._threads[lanes[at]], place[at] - region.base, at

    def read(self, space: str, address: Array, size: int) -> Array:
        self._check_alive(space, address)
        raw = self.read_raw(space, address.astype(np.int64), size, self._effective())
        return np.ascontiguousarray(raw).view(np.uint8).reshape(-1, size)

    def write(self, space: str, address: Array, data: Array, where: Array | None = None) -> None:
        self._check_alive(space, address)
        raw = np.ascontiguousarray(data).view(raw_dtype(data.shape[1]))[:, 0]
        mask = self._effective() if where is None else self.active & where
        self.write_raw(space, address.astype(np.int64), raw, mask)

    def _check_alive(self, space: str, address: Array) -> None:
        """Raise when an address is in the memory of a block of the cluster that has ended."""
        if space == "cluster":
            for place in np.unique(address[self.active] >> CLUSTER_SHIFT << CLUSTER_SHIFT):
                self._block.find(int(place))

    def _effective(self) -> Array | None:
        return None if self.active.all() else self.active

    # --- asynchronous copies ---------------------------------------------------------------------

    def copy_async(self, shared: Array, source: Array, size: int, valid: Array) -> None:
        lanes = np.flatnonzero(self.active)
        if not len(lanes):
            return
        place = shared.astype(np.int64)[lanes]
        raw = self._read_valid(source.astype(np.int64)[lanes], size, valid[lanes])
        self._block.shared.check(place, size, "writes")
        for history, threads, offset, _ in self._tracked("shared", place, size, lanes, "writes"):
            history.start_copy(threads, offset, size)
        self._copies.append(_Copy(lanes, place, raw, self._committed[lanes]))

    def _read_valid(self, source: Array, size: int, valid: Array) -> Array:
        memory = self._block.memory
        if (valid == size).all():
            return memory.read(source, size)
        content = np.zeros((len(source), size), np.uint8)
        for count in np.unique(valid).tolist():
            if count:
                rows = np.flatnonzero(valid == count)
                raw = np.ascontiguousarray(memory.read(source[rows], count))
                content[rows, :count] = raw.view(np.uint8).reshape(-1, count)
        return content.view(raw_dtype(size))[:, 0]

    def commit_async(self) -> None:
        self._committed = self._committed + self.active

    def wait_async(self, pending: int) -> None:
        remaining = []
        for copy in self._copies:
            done = copy.group < self._committed[copy.lanes] - pending
            done &= self.active[copy.lanes]
            if done.any():
                self._land(copy, done)
            if not done.all():
                left = ~done
                remaining.append(
                    _Copy(copy.lanes[left], copy.place[left], copy.raw[left], copy.group[left])
                )
        self._copies = remaining

    def _land(self, copy: _Copy, done: Array) -> None:
        place, raw, lanes = copy.place[done], copy.raw[done], copy.lanes[done]
        self._block.shared.write(place, raw)
        size = raw.dtype.itemsize
        for history, threads, offset, _ in self._tracked("shared", place, size, lanes, "writes"):
            history.land_copy(threads, offset, size)

    # --- barriers --------------------------------------------------------------------------------

    def sync_block(self, barrier: int, threads: int) -> None:
        self._block.barriers.sync(
            self._group, self._threads[self.active], barrier, threads, self._span
        )
        self._block.mark(self._span)

    def arrive_block(self, barrier: int, threads: int) -> None:
        self._block.barriers.leave(self._threads[self.active], barrier, threads)

    def sync_warp(self) -> None:
        self._block.barriers.sync_warp(self._threads[self.active])

    def mbarrier_init(self, address: Array, count: Array) -> None:
        on = self.active
        self._block.barriers.initialise(self._threads[on], address[on], count[on])

    def mbarrier_arrive(self, address: Array) -> None:
        for block, on, place in self._by_block(address):
            block.barriers.arrive(self._threads[on], place)

    def mbarrier_expect(self, address: Array, count: Array) -> None:
        for block, on, place in self._by_block(address):
            block.barriers.expect(self._threads[on], place, count[on])

    def mbarrier_receive(self, address: Array, count: int) -> None:
        for block, on, place in self._by_block(address):
            block.barriers.receive(self._threads[on], place, count)

    def _by_block(self, address: Array) -> Iterator[tuple[Block, Array, Array]]:
        """Each block of the cluster that the active lanes' addresses are in, with the lanes and
        the addresses there."""
        rank = np.where(self.active, address >> CLUSTER_SHIFT, -1)
        for number in np.unique(rank[self.active]).tolist():
            lanes = np.flatnonzero(rank == number)
            block, _ = self._block.find(number << CLUSTER_SHIFT)
            yield block, lanes, address[lanes] & (1 << CLUSTER_SHIFT) - 1

    def mbarrier_wait(self, address: Array, parity: Array) -> None:
        on = self.active
        self._block.barriers.wait(
            self._group, self._threads[on], address[on], parity[on], self._span
        )
        self._block.mark(self._span)
