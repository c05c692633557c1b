"""Bulk copies of boxes of tensors while they are on their way between global and shared memory.

Knows what they read and write, and when that counts as done. Does not know who waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilejit.errors import SimulationError, Span
from tilejit.isa.tma import CHUNK, Box, round_to_tf32
from tilejit.sim.barriers import PhaseBarrier
from tilejit.sim.hazards import History
from tilejit.sim.memory import SHARED_BASE, Memory, Region, raw_dtype
from tilejit.sim.order import Order

if TYPE_CHECKING:
    from tilejit.sim.block import Block, Watch

Array = np.ndarray[Any, Any]
ADDRESSES = 1 << 64  # beyond them they begin anew


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a box that lies in its tensor: in global memory, and as slices of the box."""

    region: Region
    view: Array
    inner: tuple[slice, ...]

    def rows(self) -> tuple[Array, int]:
        """Offsets in the region of the rows that lie in it, and the bytes of one."""
        offset = np.full(1, self.view.ctypes.data - self.region.bytes.ctypes.data, np.int64)
        for extent, stride in zip(self.view.shape[:-1], self.view.strides[:-1], strict=True):
            offset = (offset[:, None] + np.arange(extent) * stride).ravel()
        return offset, self.view.shape[-1] * self.view.itemsize


def part_of(box: Box, memory: Memory, verb: str) -> Part | None:
    """Where the box lies in global memory; None when it is outside its tensor."""
    tensor = box.tensor
    outer, inner = box.meets()
    shape = [s.stop - s.start for s in outer]
    if 0 in shape:
        return None
    start = tensor.address + sum(
        s.start * stride for s, stride in zip(outer, tensor.strides, strict=True)
    )
    start &= ADDRESSES - 1
    region, view = memory.part(start, shape, tensor.strides, tensor.dtype, verb)
    return Part(region, view, inner)


@dataclass(frozen=True, eq=False)
class Target:
    """Where a load goes in one block: the addresses of the box's chunks, and a barrier."""

    block: Block
    place: Array
    barrier: PhaseBarrier


@dataclass(frozen=True, eq=False)
class Load:
    """A copy of a box to shared memory, of one or several blocks."""

    box: Box
    targets: Sequence[Target]
    span: Span | None

    def start(self, thread: int, memory: Memory, watch: Watch) -> None:
        """Check what `thread` starts; the bytes are on their way from now on."""
        for target in self.targets:
            target.block.shared.check(target.place, CHUNK, "writes")
            history = target.block.history()
            if history is not None:
                agent = _agent_of(target, watch.order)
                history.start_load(thread, agent, target.place - SHARED_BASE, CHUNK)
        part = part_of(self.box, memory, "reads")
        source = None if part is None else watch.history_of(part.region, "global")
        if part is not None and source is not None:
            offset, width = part.rows()
            source.read(np.full(len(offset), thread), offset, width)

    def land(self, memory: Memory, order: Order | None) -> None:
        """The bytes are there, and the barriers are told so."""
        tensor = self.box.tensor
        content = np.zeros(tensor.box, tensor.dtype)
        part = part_of(self.box, memory, "reads")
        if part is not None:
            content[part.inner] = part.view
        if tensor.rounds:
            content = round_to_tf32(content)
        raw = content.reshape(-1).view(raw_dtype(CHUNK))
        for target in self.targets:
            target.block.shared.write(target.place, raw)
            known = None
            history = target.block.history()
            if history is not None and order is not None:
                agent = _agent_of(target, order)
                time = order.land(agent)
                history.land_load(target.place - SHARED_BASE, CHUNK, time)
                known = order.told(agent, time)
            target.barrier.receive(tensor.box_bytes, known)

    def check_end(self, block: Block) -> None:
        """Raise when the block ends before the bytes have come."""
        for target in self.targets:
            if target.block is block:
                raise SimulationError(
                    "The kernel ends while a bulk copy to byte "
                    f"{int(target.place[0]) - SHARED_BASE} of shared memory is on its way.",
                    span=self.span,
                    hint="Wait for every copy.",
                )


def _agent_of(target: Target, order: Order | None) -> int:
    """Who does the copies that the target's barrier is told of."""
    barrier = target.barrier
    if barrier.agent is None:
        assert order is not None, "agents are for those who look for races"
        barrier.agent = order.new_agent("a bulk copy", reads=False)
    return barrier.agent


class Store:
    """A copy of a box from shared to global memory, or its addition there.

    thread: who started it. group: the number of its group among the thread's.
    """

    def __init__(self, box: Box, place: Array, thread: int, group: int, add: bool) -> None:
        self.box = box
        self.thread = thread
        self.group = group
        self._place = place
        self._add = add
        self._content: Array | None = None

    def start(self, shared: Memory, history: History | None, memory: Memory, watch: Watch) -> None:
        """Check what the thread starts; the source is held from now on."""
        shared.check(self._place, CHUNK, "reads")
        order = watch.order
        if history is not None and order is not None:
            name = f"a bulk store of {order.name(self.thread)}"
            history.hold(np.array([self.thread]), name, self._place - SHARED_BASE, CHUNK)
        part = part_of(self.box, memory, "writes")
        sink = None if part is None else watch.history_of(part.region, "global")
        if part is not None and sink is not None and not self._add:
            offset, width = part.rows()
            sink.start_copy(np.full(len(offset), self.thread), offset, width)

    def read(self, shared: Memory, history: History | None, order: Order | None) -> None:
        """The source has been read, unless it was before."""
        if self._content is not None:
            return
        self._content = shared.read(self._place, CHUNK)
        if history is not None and order is not None:
            history.release_hold(self.thread, self._place - SHARED_BASE, CHUNK, order.tick())

    def write(self, memory: Memory, watch: Watch) -> None:
        """What has been read arrives in global memory."""
        assert self._content is not None, "a store writes before it has read"
        part = part_of(self.box, memory, "writes")
        if part is None:
            return
        elements = self._content.view(self.box.tensor.dtype).reshape(self.box.tensor.box)
        sink = watch.history_of(part.region, "global")
        if sink is not None:
            offset, width = part.rows()
            threads = np.full(len(offset), self.thread)
            if self._add:
                sink.write(threads, offset, width, is_atomic=True)
            else:
                sink.land_copy(threads, offset, width)
        piece = elements[part.inner]
        with np.errstate(all="ignore"):
            part.view[...] = part.view + piece if self._add else piece
