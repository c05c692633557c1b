"""What a block of the reference executor holds while it runs: values, memory, barriers, lanes.

Knows which memory each buffer has, and regions of it. Does not know nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilejit.errors import SimulationError
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.divergence import Divergence
from tilejit.ir.expr import Expr
from tilejit.ops.scalar import Array
from tilejit.sim.reference_memory import (
    AddressSpace,
    Block,
    Index,
    Mask,
    View,
    both,
    fresh_bytes,
    holds_nowhere,
)
from tilejit.sim.reference_values import Value, Values, as_value, is_lane_value

_NO_ARRAY: Array = np.zeros(0, np.uint8)


@dataclass
class Phases:
    """A barrier that counts: `count` phases of `needed` arrivals have completed.

    bytes: that the phase waits for besides.
    """

    needed: int
    arrivals: int = 0
    count: int = 0
    bytes: int = 0

    def arrive(self, threads: int) -> None:
        self.arrivals += threads
        while self.arrivals >= self.needed and not self.bytes:
            self.arrivals -= self.needed
            self.count += 1


class BlockState:
    """The memory and the values of one block, as those threads of it see them that execute.

    mask: lanes that execute; None for all.
    box: extents of the T.Parallel being executed, else None: then lanes are threads.
    barriers, meetings: of the block: those that count, and the hardware's by number.
    """

    def __init__(
        self,
        arrays: Mapping[Buffer, Array],
        addresses: AddressSpace,
        num_threads: int,
        differing: Divergence,
    ) -> None:
        self.values = Values()
        self.mask: Mask = None
        self.box: tuple[int, ...] | None = None
        self._num_threads = num_threads
        self._own = slice(0, num_threads)  # the executing threads
        self._arrays = arrays
        self._addresses = addresses
        self._differing = differing
        self._global_views: dict[Buffer, View] = {}
        self.start_block()

    def start_block(self) -> None:
        """Forget the memory of the block before."""
        self._blocks: dict[Buffer, Block] = {}
        self._private: dict[Buffer, Block] = {}
        self._views: dict[tuple[Buffer, int], View] = {}
        self.barriers: dict[Buffer, list[Phases]] = {}
        self.meetings: dict[int, Any] = {}

    def seen_by(self, first: int, threads: int) -> BlockState:
        """The same block as some of its threads see it, with values of their own."""
        lens = BlockState(self._arrays, self._addresses, self._num_threads, self._differing)
        lens._own = slice(first, first + threads)
        lens._blocks, lens.barriers, lens.meetings = self._blocks, self.barriers, self.meetings
        for var, value in self.values.variables.items():
            if is_lane_value(value) and value.shape == (self._num_threads,):
                value = value[lens._own]
            lens.values.variables[var] = value
        return lens

    @property
    def _is_role(self) -> bool:
        return self._own != slice(0, self._num_threads)

    def _differs(self, root: Buffer) -> bool:
        """Whether the threads of the block have values of their own there."""
        return root in self._differing.buffers or root in self._differing.mixed

    # --- memory ----------------------------------------------------------------------------------

    def views(self, buffer: Buffer, active: Mask) -> Iterator[tuple[Mask, View]]:
        """The buffer's memory, and the active lanes that it is that of; more than one only where
        a pointer differs between lanes."""
        if buffer.scope is not Scope.GLOBAL:
            yield active, self._chip_view(buffer)
        elif buffer in self._arrays:
            yield active, self._argument_view(buffer)
        else:
            yield from self._pointer_views(buffer, active)

    def _extents(self, exprs: Sequence[Expr], buffer: Buffer) -> tuple[int, ...]:
        extents = tuple(self.values.whole(e) for e in exprs)
        if any(is_lane_value(e) for e in extents):
            raise SimulationError(
                f"The shape or strides of `{buffer.name}` differ between threads.",
                span=self.values.span,
                hint="Make the tensor from values that are the same for the block.",
            )
        return extents

    def _argument_view(self, buffer: Buffer) -> View:
        view = self._global_views.get(buffer)
        if view is None:
            array = self._arrays[buffer]
            view = View(
                name=buffer.name,
                dtype=buffer.dtype,
                array=array if array.ndim else array[None],
                prefix=() if array.ndim else (0,),
                extents=array.shape if buffer.broadcasts else self._extents(buffer.shape, buffer),
                guarded=True,
                broadcasts=buffer.broadcasts,
            )
            self._global_views[buffer] = view
        return view

    def _pointer_views(self, buffer: Buffer, active: Mask) -> Iterator[tuple[Mask, View]]:
        assert isinstance(buffer.data, Expr), f"{buffer.name} has no memory"
        address = self.values.whole(buffer.data)
        address = address + self.values.whole(buffer.offset) * buffer.dtype.bytes
        if not is_lane_value(address):
            yield active, self._pointer_view(buffer, int(address))
            return
        wanted, chosen = np.broadcast_arrays(address, True if active is None else active)
        for one in np.unique(wanted[chosen]).tolist():
            yield both(active, address == one), self._pointer_view(buffer, one)

    def _pointer_view(self, buffer: Buffer, address: int) -> View:
        extents = self._extents(buffer.shape, buffer)
        if 0 in extents:  # wherever it lies: behind an array's last element too
            flat, start = np.zeros(1, buffer.dtype.numpy), 0
        else:
            span = self.values.span
            flat, start = self._addresses.flat(address, buffer.dtype, buffer.name, span)
        return View(
            name=buffer.name,
            dtype=buffer.dtype,
            array=flat,
            extents=extents,
            guarded=True,
            strides=self._extents(buffer.element_strides, buffer),
            start=start,
            broadcasts=buffer.broadcasts,
        )

    def _chip_view(self, buffer: Buffer) -> View:
        offset, inner = 0, buffer  # in bytes
        while isinstance(inner.data, Buffer):
            (step,) = self._extents((inner.offset,), buffer)
            offset += step * inner.dtype.bytes
            inner = inner.data
        key = (buffer, offset)
        private = self.box is not None and buffer.scope.is_per_thread
        block = self._private_block(inner) if private else None
        view = None if private else self._views.get(key)
        if view is None:
            strides = self._extents(buffer.element_strides, buffer)
            view = View(
                name=buffer.name,
                dtype=buffer.dtype,
                array=_NO_ARRAY,
                extents=buffer.extents,
                guarded=False,
            )
            view = (block or self._own_rows(inner)).view(view, strides, offset, self.values.span)
            if not private:
                self._views[key] = view
        return view

    def _own_rows(self, root: Buffer) -> Block:
        """The buffer's memory, of the executing threads where it is each thread's own."""
        block = self._block(root)
        if not (self._is_role and root.scope.is_per_thread and self._differs(root)):
            return block
        assert block.poison is not None
        rows = block.bytes[self._own]
        return Block(rows, (np.arange(len(rows)),), block.poison[self._own])

    def _block(self, root: Buffer) -> Block:
        block = self._blocks.get(root)
        if block is None:
            strides = self._extents(root.element_strides, root)
            reach = sum((e - 1) * s for e, s in zip(root.extents, strides, strict=True)) + 1
            size = reach * root.dtype.bytes
            lanes: tuple[int, ...] = (1,)
            prefix: Index = (0,)
            poison = None
            if root.scope.is_per_thread:
                if self._differs(root):
                    lanes, prefix = (self._num_threads,), (np.arange(self._num_threads),)
                poison = np.zeros((*lanes, size), np.bool_)
            memory = fresh_bytes(lanes, size, root.dtype, root.scope is Scope.VAR)
            block = self._blocks[root] = Block(memory, prefix, poison)
        return block

    # --- memory of one T.Parallel iteration ------------------------------------------------------

    def _private_block(self, root: Buffer) -> Block:
        """A per-thread buffer as each iteration sees it: its own copy of what all threads have."""
        block = self._private.get(root)
        if block is None:
            assert self.box is not None
            outer = self._own_rows(root)
            assert outer.poison is not None
            poison = outer.poison.any(axis=0) | _differs(outer.bytes, root.dtype.bytes)
            shape = (*self.box, outer.bytes.shape[-1])
            grid = np.ogrid[tuple(slice(n) for n in self.box)]
            block = self._private[root] = Block(
                np.broadcast_to(outer.bytes[0], shape).copy(),
                tuple(grid),
                np.broadcast_to(poison, shape).copy(),
            )
        return block

    def end_parallel(self) -> None:
        """Give per-thread buffers the values that all iterations agree on."""
        for root, block in self._private.items():
            outer, item = self._own_rows(root), root.dtype.bytes
            assert outer.poison is not None and block.poison is not None
            final = block.bytes.reshape(-1, outer.bytes.shape[-1])
            unread = block.poison.reshape(final.shape)[:, ::item]  # as `View` marks elements
            untouched = np.repeat(unread.all(axis=0), item)
            outer.bytes[...] = np.where(untouched, outer.bytes, final[0])
            unclear = np.repeat(unread.any(axis=0), item) | _differs(final, item)
            outer.poison[...] = np.where(untouched, outer.poison, unclear)
        self._private.clear()

    # --- elements --------------------------------------------------------------------------------

    def gather(self, buffer: Buffer, index: Index, when: Mask = None) -> Value:
        """The elements at `index`, 0 where `when` is false or out of range of a global buffer."""
        active = both(self.mask, when)
        if holds_nowhere(active):
            return as_value(np.zeros((), buffer.dtype.numpy), buffer.dtype)
        result: Value = None
        for mask, view in self.views(buffer, active):
            part = view.gather(index, mask, self.values.span)
            result = part if result is None else np.where(mask, part, result)
        assert result is not None, f"no lane reads {buffer.name}"
        is_role_wide = self._is_role and buffer.root in self._differing.mixed
        if is_role_wide and buffer.root not in self._differing.buffers and self.box is None:
            if is_lane_value(result) and np.all(result == result.flat[0]):
                return as_value(result.flat[0], buffer.dtype)
        return result

    def scatter(self, buffer: Buffer, index: Index, value: Value) -> None:
        for mask, view in self.views(buffer, self.mask):
            view.scatter(index, value, mask, self.values.span)

    # --- regions ---------------------------------------------------------------------------------

    def read(self, region: Region, pad: Value = 0) -> Array:
        """The region's elements, of its shape; with a leading lane axis where lanes differ."""
        starts = tuple(self.values.whole(e) for e in region.starts)
        result: Array | None = None
        for mask, view in self.views(region.buffer, self.mask):
            box = None if mask is not None else _box(view, starts, region.extents)
            if box is not None:
                part = self._read_box(view, box, region, pad)
            else:
                part = self._read_any(view, region, starts, mask, pad)
            result = part if result is None else np.where(_lead(mask, region), part, result)
        assert result is not None, f"no lane reads {region.buffer.name}"
        lead = result.shape[: result.ndim - len(region.extents)]
        return result.reshape(*lead, *region.shape)

    def _read_box(self, view: View, box: Any, region: Region, pad: Value) -> Array:
        outer, inner, is_full = box
        if is_full:
            part: Array = view.array[outer]
            return part
        result = np.full(region.extents, pad, view.dtype.numpy)
        result[inner] = view.array[outer]
        return result

    def _read_any(self, view: View, region: Region, starts: Index, mask: Mask, pad: Value) -> Array:
        view, index = _spread(view, starts, region.extents)
        active = _lead(mask, region)
        values = np.asarray(view.gather(index, active, self.values.span))
        if view.guarded and np.any(np.asarray(pad, view.dtype.numpy)):
            values = np.where(view.inside(index), values, _lead(pad, region))
        lead = values.shape[: max(0, values.ndim - len(region.extents))]
        return np.broadcast_to(values, (*lead, *region.extents))

    def write(self, region: Region, values: Array) -> None:
        """Write `values`, of the region's shape or with a leading lane axis."""
        starts = tuple(self.values.whole(e) for e in region.starts)
        lead = values.shape[: max(0, values.ndim - len(region.shape))]
        values = np.broadcast_to(values, (*lead, *region.shape)).reshape(*lead, *region.extents)
        for mask, view in self.views(region.buffer, self.mask):
            box = None if mask is not None or lead else _box(view, starts, region.extents)
            if box is None:
                spread, index = _spread(view, starts, region.extents)
                spread.scatter(index, values, _lead(mask, region), self.values.span)
                continue
            outer, inner, _ = box
            view.array[outer] = values[inner]
            if view.poison is not None:
                view.poison[outer] = False


def _differs(rows: Array, size: int) -> Array:
    """For each byte, whether the element of `size` bytes it belongs to differs between rows."""
    differs = (rows != rows[:1]).any(axis=0)
    return np.repeat(differs.reshape(-1, size).any(axis=-1), size)


def _lead(value: Value, region: Region) -> Value:
    """A value over the lanes, shaped to broadcast along the region's dimensions."""
    if not is_lane_value(value):
        return value
    return value.reshape(*value.shape, *(1,) * len(region.extents))


def _spread(view: View, starts: Index, extents: tuple[int, ...]) -> tuple[View, Index]:
    """The view and the index of a region's elements: lanes lead, then the region's dimensions."""
    rank = len(extents)

    def lead(value: Value) -> Value:
        return value.reshape(*value.shape, *(1,) * rank) if is_lane_value(value) else value

    index = []
    for d, (start, extent) in enumerate(zip(starts, extents, strict=True)):
        step = np.arange(extent).reshape(*(extent if d == k else 1 for k in range(rank)))
        index.append(lead(start) + step)
    return replace(view, prefix=tuple(lead(p) for p in view.prefix)), tuple(index)


def _box(view: View, starts: Index, extents: tuple[int, ...]) -> Any | None:
    """Slices of the array and of the region where they meet, and whether that is all of the
    region; None when the region is no plain box of the array."""
    plain = view.strides is None and not any(map(is_lane_value, (*starts, *view.prefix)))
    if not plain or (view.broadcasts and 1 in view.extents):
        return None
    if view.poison is not None and view.poison.any():
        return None
    low = [max(s, 0) for s in starts]
    high = [min(s + n, e) for s, n, e in zip(starts, extents, view.extents, strict=True)]
    is_full = all(
        a == s and b == s + n for a, b, s, n in zip(low, high, starts, extents, strict=True)
    )
    if not is_full and not view.guarded:
        return None  # reported with the element's index
    high = [max(a, b) for a, b in zip(low, high, strict=True)]
    outer = (*view.prefix, *(slice(a, b) for a, b in zip(low, high, strict=True)))
    inner = tuple(slice(a - s, a - s + b - a) for a, b, s in zip(low, high, starts, strict=True))
    if not is_full and math.prod(b - a for a, b in zip(low, high, strict=True)) == 0:
        empty = tuple(slice(0, 0) for _ in starts)
        return (*view.prefix, *empty), empty, False
    return outer, inner, is_full
