"""Memory of the reference executor: arguments, addresses, on-chip buffers and views of them.

Knows how a buffer's elements are found and what is outside of it. Does not know nodes.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilejit.dtypes import DType
from tilejit.errors import SimulationError, Span
from tilejit.ops.scalar import Array
from tilejit.sim.reference_values import Value, is_lane_value

Index = tuple[Value, ...]
Mask = Any  # None: everywhere; else a bool, or an array of them over the lanes


def both(a: Mask, b: Mask) -> Mask:
    """Where both masks hold; None is everywhere."""
    if a is None or a is True:
        return None if b is True else b
    return a if b is None or b is True else np.logical_and(a, b)


def holds_nowhere(mask: Mask) -> bool:
    return mask is not None and not np.any(mask)


def holds_everywhere(mask: Mask) -> bool:
    return mask is None or bool(np.all(mask))


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """Where the elements of a buffer are.

    array: memory, indexed by `prefix` and then by the buffer's indices; with `strides`, flat
        memory in which element 0 is at `start`.
    poison: of the array's shape: True where the value depends on which thread ran what.
    start: elements before element 0.
    """

    name: str
    dtype: DType
    array: Array
    extents: tuple[int, ...]
    guarded: bool
    prefix: Index = ()
    poison: Array | None = None
    strides: tuple[int, ...] | None = None
    start: int = 0
    broadcasts: bool = False

    def inside(self, index: Index) -> Value:
        """Where the index is within the extents: True, False or an array."""
        result: Value = True
        for i, extent in zip(index, self.extents, strict=True):
            if self.broadcasts and extent == 1:
                continue
            if not is_lane_value(i):
                if not 0 <= i < extent:
                    return False
            elif i.size and (i.min() < 0 or i.max() >= extent):
                result = np.logical_and(result, (i >= 0) & (i < extent))
        return result

    def places(self, index: Index, active: Mask, span: Span | None) -> Index:
        """The index into `array`; anywhere inside it where `active` does not hold."""
        clipped = []
        for i, extent in zip(index, self.extents, strict=True):
            if self.broadcasts and extent == 1:
                clipped.append(0)
            elif is_lane_value(i):
                outside = i.size and (i.min() < 0 or i.max() >= extent)
                clipped.append(np.clip(i, 0, max(extent - 1, 0)) if outside else i)
            else:
                clipped.append(min(max(i, 0), max(extent - 1, 0)))
        if self.strides is None:
            return (*self.prefix, *clipped)
        linear = self.start + sum(i * s for i, s in zip(clipped, self.strides, strict=True))
        outside = np.logical_and(True if active is None else active, (linear < 0))
        outside = outside | ((linear >= self.array.size) & (True if active is None else active))
        if np.any(outside):
            raise SimulationError(
                f"An element of `{self.name}` lies outside the memory that its pointer points "
                "into.",
                span=span,
                hint="Check the pointer, the shape and the strides it was given.",
            )
        return (np.clip(linear, 0, self.array.size - 1) if is_lane_value(linear) else linear,)

    def check(self, index: Index, active: Mask, span: Span | None) -> Mask:
        """Where `active` holds and the index is in range.

        Raises:
            SimulationError: an active index out of range of memory that does not guard itself.
        """
        inside = self.inside(index)
        if inside is True or self.guarded:
            return both(active, inside)
        bad = ~np.asarray(inside) if active is None else np.logical_and(active, ~np.asarray(inside))
        if np.any(bad):
            raise SimulationError(self._complaint(index, bad), span=span)
        return active

    def _complaint(self, index: Index, bad: Array) -> str:
        broadcast = np.broadcast_arrays(bad, *index)
        first = np.argwhere(broadcast[0])[0]
        numbers = [int(i[tuple(first)]) for i in broadcast[1:]]
        shown = ", ".join(map(str, numbers))
        extents = ", ".join(map(str, self.extents))
        return f"`{self.name}[{shown}]` is outside of `{self.name}`, whose shape is ({extents})."

    def gather(self, index: Index, active: Mask, span: Span | None) -> Value:
        """The elements at `index`; 0 where not active or out of range of guarded memory."""
        active = self.check(index, active, span)
        if holds_nowhere(active):
            shape = np.broadcast_shapes(*(np.shape(i) for i in index), np.shape(active))
            return _settle(np.zeros(shape, self.dtype.numpy), self.dtype)
        places = self.places(index, active, span)
        if self.poison is not None and np.any(
            np.logical_and(self.poison[places], True if active is None else active)
        ):
            raise SimulationError(
                f"`{self.name}` is read after T.Parallel iterations wrote different values to it; "
                "which of them a thread sees is not defined.",
                span=span,
                hint="Keep per-iteration values in a fragment.",
            )
        values = self.array[places]
        if active is not None:
            values = np.where(active, values, self.dtype.numpy.type(0))
        return _settle(np.asarray(values), self.dtype)

    def scatter(self, index: Index, value: Value, active: Mask, span: Span | None) -> None:
        """Store `value` at `index` where active, except out of range of guarded memory.

        Raises:
            SimulationError: two lanes store different values to one place.
        """
        active = self.check(index, active, span)
        if holds_nowhere(active):
            return
        places = self.places(index, active, span)
        value = np.asarray(value, self.dtype.numpy)
        reach = np.broadcast_shapes(*(np.shape(i) for i in places))
        shape = np.broadcast_shapes(reach, value.shape, np.shape(active))
        if not holds_everywhere(active):
            chosen = np.broadcast_to(active, shape)
            places = tuple(np.broadcast_to(i, shape)[chosen] for i in places)
            if value.ndim:
                value = np.broadcast_to(value, shape)[chosen]
        elif reach != shape:
            places = tuple(np.broadcast_to(i, shape) for i in places)
        self.array[places] = value
        if self.poison is not None:
            self.poison[places] = False
        if value.size > 1 and not _is_injective(places, shape):
            stored = np.asarray(self.array[places])
            if not np.array_equal(_bits(stored), _bits(np.broadcast_to(value, stored.shape))):
                raise SimulationError(
                    "Two threads or iterations store different values to one element of "
                    f"`{self.name}`.",
                    span=span,
                )


def _settle(values: Array, dtype: DType) -> Value:
    return values.item() if values.ndim == 0 and not dtype.is_float else values


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _is_injective(places: Index, shape: tuple[int, ...]) -> bool:
    """True when the places obviously differ: each axis of `shape` moves one index of its own,
    strictly upwards."""
    covered = set()
    for place in places:
        if not is_lane_value(place):
            continue
        axes = [d for d, n in enumerate(place.shape) if n > 1]
        if len(axes) == 1 and np.all(np.diff(place.ravel()) > 0):
            covered.add(axes[0] - place.ndim)
    return all(n == 1 or d - len(shape) in covered for d, n in enumerate(shape))


# --- memory of a block ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """On-chip memory of one buffer: bytes of shape (*lanes, size), with `prefix` as lane index."""

    bytes: Array
    prefix: Index = ()
    poison: Array | None = None

    def view(self, view: View, strides: Sequence[int], offset: int, span: Span | None) -> View:
        """`view` with its array: element 0 is `offset` bytes from the start, `strides` are in
        elements."""
        item = view.dtype.bytes
        reach = [(e - 1) * s * item for e, s in zip(view.extents, strides, strict=True)]
        low = offset + sum(r for r in reach if r < 0)
        high = offset + sum(r for r in reach if r > 0) + item
        size = self.bytes.shape[-1]
        if low < 0 or high > size:
            raise SimulationError(
                f"`{view.name}` reaches outside of the {size} bytes that it is a view of.",
                span=span,
            )
        steps = tuple(s * item for s in strides)

        def typed(array: Array, dtype: Any) -> Array:
            shape = (*array.shape[:-1], *view.extents)
            lanes = array.strides[:-1]
            return np.ndarray(shape, dtype, array, offset, (*lanes, *steps))

        poison = None if self.poison is None else typed(self.poison, np.bool_)
        array = typed(self.bytes, view.dtype.numpy)
        return replace(view, array=array, prefix=self.prefix, poison=poison)


def fresh_bytes(lanes: tuple[int, ...], size: int, dtype: DType, zero: bool) -> Array:
    """Memory that nothing was written to: all bits set (NaN for floats), true for bool."""
    return np.full((*lanes, size), 0 if zero else 1 if dtype.is_bool else 0xFF, np.uint8)


# --- memory by address ---------------------------------------------------------------------------


class AddressSpace:
    """Finds memory by address among NumPy arrays."""

    def __init__(self, arrays: Iterable[Array]) -> None:
        ranges: dict[int, tuple[int, bool]] = {}
        for array in arrays:
            if array.size == 0:
                continue
            low, high = np.lib.array_utils.byte_bounds(array)
            known = ranges.get(low, (0, False))
            ranges[low] = (max(high, known[0]), array.flags.writeable or known[1])
        self._segments = sorted((low, *rest) for low, rest in ranges.items())
        self._lows = [s[0] for s in self._segments]

    def flat(self, address: int, dtype: DType, name: str, span: Span | None) -> tuple[Array, int]:
        """The memory around `address` as a flat array of the dtype, and the place of `address`.

        Raises:
            SimulationError: no array has this address.
        """
        at = bisect.bisect_right(self._lows, address) - 1
        while at >= 0 and address >= self._segments[at][1]:
            at -= 1  # a longer array may begin earlier
        if at < 0:
            raise SimulationError(
                f"`{name}` is at address {address:#x}, which is in none of the arrays of this "
                "call.",
                span=span,
                hint="Pass the array that the pointer points into to the call as well.",
            )
        low, high, is_writeable = self._segments[at]
        phase = (address - low) % dtype.bytes
        count = (high - low - phase) // dtype.bytes
        raw: Any = (ctypes.c_uint8 * (count * dtype.bytes)).from_address(low + phase)
        flat: Array = np.frombuffer(raw, np.uint8).view(dtype.numpy)
        flat.flags.writeable = is_writeable
        return flat, (address - low) // dtype.bytes
