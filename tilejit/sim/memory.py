"""The memories of the simulated GPU: bytes, where they are, and what lies outside.

Knows addresses and bytes. Does not know threads, dtypes or synchronisation.
"""

from __future__ import annotations

import bisect
import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilejit.errors import SimulationError

Array = np.ndarray[Any, Any]

POISON = 0xFF  # fills memory that nothing has written: NaN as float, -1 as integer
# Shared addresses do not start at 0 on a GPU, so an offset taken for an address must fail here too.
SHARED_BASE = 1024
_LOCAL_BASE = 1 << 40
_LOCAL_GAP = 256  # bytes between local allocations, so that running over the end is noticed
_RAW = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}


def raw_dtype(width: int) -> np.dtype[Any]:
    """The NumPy dtype that moves `width` bytes as one element."""
    return np.dtype(_RAW.get(width, f"V{width}"))


class Region:
    """Contiguous bytes at `base`, most often accessed `grain` (a power of two) at a time.

    origin: the region whose bytes these are, seen from elsewhere; itself for most.
    """

    __slots__ = ("_windows", "base", "bytes", "grain", "is_writable", "name", "origin", "size")

    def __init__(
        self, base: int, bytes_: Array, name: str, is_writable: bool = True, grain: int = 16
    ) -> None:
        self.base = base
        self.bytes = bytes_
        self.size = int(bytes_.size)
        self.name = name
        self.is_writable = is_writable
        self.grain = grain
        self.origin: Region = self
        self._windows: dict[int, Array] = {}

    def window(self, width: int) -> Array:
        """A view whose element i is the `width` bytes from byte i on."""
        found = self._windows.get(width)
        if found is None:
            count = max(0, self.size - width + 1)
            found = self._windows[width] = np.ndarray(
                (count,), raw_dtype(width), buffer=self.bytes.data if count else b"", strides=(1,)
            )
        return found

    def seen_from(self, base: int) -> Region:
        """The same bytes at another address."""
        other = Region(base, self.bytes, self.name, self.is_writable, self.grain)
        other.origin = self.origin
        return other

    def holds(self, low: int, high: int) -> bool:
        return self.base <= low and high <= self.base + self.size


class Memory:
    """Regions of one address space.

    `read` and `write` take one address for each accessing thread (int64) and move `width` bytes
    for each, as elements of `raw_dtype(width)`.
    """

    def __init__(self, space: str, regions: Sequence[Region] = ()) -> None:
        self.space = space
        self._regions = sorted(regions, key=lambda region: region.base)
        self._bases = [region.base for region in self._regions]

    def add(self, region: Region) -> None:
        place = bisect.bisect(self._bases, region.base)
        self._regions.insert(place, region)
        self._bases.insert(place, region.base)

    def read(self, address: Array, width: int) -> Array:
        region = self._common(address, width)
        if region is not None:
            return region.window(width)[address - region.base]  # type: ignore[no-any-return]
        result = np.empty(address.shape, raw_dtype(width))
        for region, lanes in self.split(address, width, "reads"):
            result[lanes] = region.window(width)[address[lanes] - region.base]
        return result

    def write(self, address: Array, raw: Array) -> None:
        width = raw.dtype.itemsize
        region = self._common(address, width)
        if region is not None:
            self._write_region(region, address, raw)
            return
        for region, lanes in self.split(address, width, "writes"):
            self._write_region(region, address[lanes], raw[lanes])

    def part(
        self, start: int, shape: Sequence[int], strides: Sequence[int], dtype: Any, verb: str
    ) -> tuple[Region, Array]:
        """The region that holds a strided array at address `start`, and a view of it."""
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        address, width = np.array([start], np.int64), last + dtype.itemsize
        ((region, _),) = self.split(address, width, verb)
        if verb != "reads":
            self._check_writable(region)
        view: Array = np.ndarray(
            tuple(shape), dtype, region.bytes.data, start - region.base, tuple(strides)
        )
        return region, view

    def check(self, address: Array, width: int, verb: str) -> None:
        """Raise when bytes outside every region would be touched."""
        self.split(address, width, verb)

    def same(self, address: Array, raw: Array) -> Array:
        """Which threads would write the bytes that are there already."""
        width = raw.dtype.itemsize
        there = self.read(address, width)
        return (_as_bytes(there, width) == _as_bytes(raw, width)).all(axis=1)  # type: ignore[no-any-return]

    def _check_writable(self, region: Region) -> None:
        if not region.is_writable:
            raise SimulationError(
                f"The kernel writes to {region.name}, which is read-only.",
                hint="Pass an array that may be written.",
            )

    def _write_region(self, region: Region, address: Array, raw: Array) -> None:
        self._check_writable(region)
        window, index = region.window(raw.dtype.itemsize), address - region.base
        window[index] = raw
        back = window[index]
        if back.tobytes() != raw.tobytes():  # a later thread overwrote an earlier one's bytes
            self._report_conflict(region, index, raw, back)

    def _report_conflict(self, region: Region, index: Array, raw: Array, back: Array) -> None:
        width = raw.dtype.itemsize
        differs = (_as_bytes(raw, width) != _as_bytes(back, width)).any(axis=1)
        first = int(index[differs.argmax()])
        raise SimulationError(
            f"Two threads write different values to byte {first} of {region.name} at once.",
            notes=["Which value stays is up to chance on a GPU."],
            hint="Let each iteration write its own elements, or use T.atomic_add.",
        )

    def _common(self, address: Array, width: int) -> Region | None:
        """The region that holds every access, or None."""
        low, high = int(address.min()), int(address.max()) + width
        place = bisect.bisect(self._bases, low) - 1
        if place < 0:
            return None
        region = self._regions[place]
        return region if high <= region.base + region.size else None

    def split(self, address: Array, width: int, verb: str) -> list[tuple[Region, Array | slice]]:
        """Each region with the positions of the accesses to it; an error for those to none."""
        region = self._common(address, width)
        if region is not None:
            return [(region, slice(None))]
        if not self._regions:
            raise SimulationError(f"The kernel {verb} {self.space} memory, but it has none.")
        place = np.searchsorted(np.array(self._bases, np.int64), address, side="right") - 1
        result: list[tuple[Region, Array | slice]] = []
        for number in np.unique(place).tolist():
            lanes = np.flatnonzero(place == number)
            low, high = address[lanes].min(), address[lanes].max() + width
            if number < 0 or not self._regions[number].holds(int(low), int(high)):
                self._report_stray(address, width, verb)
            result.append((self._regions[number], lanes))
        return result

    def _report_stray(self, address: Array, width: int, verb: str) -> None:
        for value in address.tolist():
            region, distance = self._nearest(value, width)
            if distance:
                break
        if value < region.base:
            where = f"{region.base - value} bytes before the start of {region.name}"
        else:
            over = value + width - region.base - region.size
            where = f"{over} bytes past the end of {region.name} ({region.size} bytes)"
        raise SimulationError(
            f"The kernel {verb} {width} bytes of {self.space} memory, {where}.",
            hint="Check the index against the buffer's shape.",
        )

    def _nearest(self, value: int, width: int) -> tuple[Region, int]:
        """The region nearest to `width` bytes at `value`, and how far outside of it they are."""

        def distance(region: Region) -> int:
            return max(region.base - value, value + width - region.base - region.size, 0)

        region = min(self._regions, key=distance)
        return region, distance(region)


def _as_bytes(raw: Array, width: int) -> Array:
    return np.ascontiguousarray(raw).view(np.uint8).reshape(-1, width)


def host_memory(segments: Sequence[tuple[str, Array]]) -> Memory:
    """Global memory made of host arrays at their real addresses; arrays that overlap count as
    one."""
    spans = []
    for name, array in segments:
        if array.size:
            low, high = np.lib.array_utils.byte_bounds(array)
            grain = math.gcd(16, array.itemsize)
            spans.append((low, high, name, bool(array.flags.writeable), grain))
    regions: list[Region] = []
    merged: list[tuple[int, int, str, bool, int]] = []
    for low, high, name, is_writable, grain in sorted(spans):
        if merged and low < merged[-1][1]:
            begin, end, first, was_writable, other = merged.pop()
            names = first if first == name else f"{first} and {name}"
            writable = was_writable or is_writable
            merged.append((begin, max(end, high), names, writable, min(grain, other)))
        else:
            merged.append((low, high, name, is_writable, grain))
    for low, high, name, is_writable, grain in merged:
        mapped = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        regions.append(Region(low, mapped, name, is_writable, grain))
    return Memory("global", regions)


def shared_region(size: int) -> Region:
    """A block's shared memory, never written."""
    return Region(SHARED_BASE, np.full(size, POISON, np.uint8), "the block's shared memory")


class LocalMemory(Memory):
    """Memory of each thread's own. An allocation is one region, a thread's part after the other."""

    def __init__(self, lanes: int) -> None:
        super().__init__("local")
        self._lanes = lanes
        self._next = _LOCAL_BASE
        self._parts: dict[int, int] = {}
        self._made: dict[object, Array] = {}

    def allocate(self, key: object, size: int, align: int) -> Array:
        """Addresses (lanes,) of `size` bytes a thread; the same memory for the same key."""
        found = self._made.get(key)
        if found is not None:
            return found
        stride = -(-size // align) * align
        base = -(-self._next // 256) * 256
        self._next = base + stride * self._lanes + _LOCAL_GAP
        content = np.full(stride * self._lanes, POISON, np.uint8)
        self.add(Region(base, content, "a thread's local memory"))
        self._parts[base] = stride
        addresses = base + stride * np.arange(self._lanes, dtype=np.int64)
        result = self._made[key] = addresses.astype(np.uint64)
        return result

    def check_owner(self, address: Array, lanes: Array, width: int, verb: str) -> None:
        """Raise when a thread reaches outside its own part."""
        self.check(address, width, verb)
        place = np.searchsorted(np.array(self._bases, np.int64), address, side="right") - 1
        base = np.array(self._bases, np.int64)[place]
        stride = np.array([self._parts[int(b)] for b in base], np.int64)
        begin = base + lanes * stride
        outside = (address < begin) | (address + width > begin + stride)
        if outside.any():
            first = int(outside.argmax())
            offset, size = int(address[first] - begin[first]), int(stride[first])
            raise SimulationError(
                f"A thread {verb} {width} bytes at byte {offset} of a local buffer of {size} "
                "bytes.",
                hint="Check the index against the buffer's shape.",
            )
