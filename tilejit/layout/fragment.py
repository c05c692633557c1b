"""Where each element of a fragment lives: a map (thread, register) -> coordinates.

Pure index maths on mixed-radix digits. Does not know instructions, machines or tile ops.

Each dimension of a fragment is written as digits, most significant first; a digit is held either
by the thread index or by the register index. The coordinate along the dimension is therefore a
part that depends on the thread plus a part that depends on the register, and the register part is
a compile-time constant in unrolled code. Digits may cover more than the extent (padding): such
elements do not exist and must be masked by whoever visits them. Threads that no digit tells apart
hold copies of the same elements (replication).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

THREAD = "thread"
REGISTER = "register"


@dataclass(frozen=True, slots=True)
class Digit:
    """`size` values of `(index // stride) % size`, index being the thread's or the register's."""

    size: int
    place: str
    stride: int

    def __post_init__(self) -> None:
        assert self.size >= 1 and self.stride >= 1, f"bad digit {self}"


def thread(size: int, stride: int) -> Digit:
    return Digit(size, THREAD, stride)


def register(size: int, stride: int) -> Digit:
    return Digit(size, REGISTER, stride)


@dataclass(frozen=True)
class FragmentLayout:
    """The layout of a fragment of `shape` elements over `threads` threads.

    dims: digits of each dimension, most significant first; when `flat`, a single entry that
        describes the row-major flattened index instead.
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[Digit, ...], ...]
    threads: int
    flat: bool = False

    def __post_init__(self) -> None:
        expected = 1 if self.flat else len(self.shape)
        assert len(self.dims) == expected, f"{self.dims} for shape {self.shape}"
        for extent, digits in zip(self._extents, self.dims, strict=True):
            capacity = math.prod(d.size for d in digits)
            assert capacity >= extent, f"digits cover {capacity} of {extent}"

    @property
    def _extents(self) -> tuple[int, ...]:
        return (math.prod(self.shape),) if self.flat else self.shape

    @cached_property
    def registers(self) -> int:
        """Elements a thread holds, padding included."""
        return math.prod(d.size for dim in self.dims for d in dim if d.place == REGISTER)

    @cached_property
    def holders(self) -> int:
        """Threads that hold different elements; the others are copies of them."""
        return math.prod(d.size for dim in self.dims for d in dim if d.place == THREAD)

    @property
    def replicas(self) -> int:
        return self.threads // self.holders

    @cached_property
    def is_padded(self) -> bool:
        return any(
            math.prod(d.size for d in digits) > extent
            for extent, digits in zip(self._extents, self.dims, strict=True)
        )

    @cached_property
    def weights(self) -> tuple[tuple[tuple[Digit, int], ...], ...]:
        """Each dimension's digits with the coordinate step of one count of the digit."""
        result = []
        for digits in self.dims:
            weighted: list[tuple[Digit, int]] = []
            weight = 1
            for digit in reversed(digits):
                weighted.append((digit, weight))
                weight *= digit.size
            result.append(tuple(reversed(weighted)))
        return tuple(result)

    @cached_property
    def replica_digits(self) -> tuple[Digit, ...]:
        """The digits of the thread index that tell copies of the same element apart."""
        used = sorted(
            (d for dim in self.dims for d in dim if d.place == THREAD and d.size > 1),
            key=lambda d: d.stride,
        )
        free: list[Digit] = []
        position = 1
        for digit in used:
            assert digit.stride % position == 0, f"thread digits overlap in {self}"
            if digit.stride > position:
                free.append(thread(digit.stride // position, position))
            position = digit.stride * digit.size
        assert self.threads % position == 0, f"thread digits exceed {self.threads} threads"
        if self.threads > position:
            free.append(thread(self.threads // position, position))
        return tuple(free)

    def register_part(self, index: int) -> tuple[int, ...]:
        """The constant part of the coordinates of register `index` (flat: of the flat index)."""
        return tuple(
            sum(
                (index // d.stride) % d.size * weight
                for d, weight in weighted
                if d.place == REGISTER
            )
            for weighted in self.weights
        )

    def thread_part(self, thread_index: Any) -> tuple[Any, ...]:
        """The part of the coordinates that depends on the thread (an int or an array of them)."""
        return tuple(
            sum(
                (thread_index // d.stride) % d.size * weight
                for d, weight in weighted
                if d.place == THREAD
            )
            for weighted in self.weights
        )

    def coordinates(self, thread_index: Any, register_index: int) -> tuple[Any, ...]:
        """Coordinates of one element; for padding they lie outside the shape."""
        parts = tuple(
            t + r
            for t, r in zip(
                self.thread_part(thread_index),
                self.register_part(register_index),
                strict=True,
            )
        )
        if not self.flat:
            return parts
        rest, result = parts[0], []
        for extent in reversed(self.shape[1:]):
            result.append(rest % extent)
            rest = rest // extent
        return (rest, *reversed(result))  # the first coordinate runs over when padded

    @cached_property
    def vector(self) -> int:
        """Consecutive registers from any multiple of it that hold consecutive last coordinates,
        all of them in the shape or none."""
        if not self.dims:
            return 1
        size = 1
        for digit, weight in reversed(self.weights[-1]):
            if digit.size == 1:
                continue
            if digit.place != REGISTER or digit.stride != size or weight != size:
                break
            size *= digit.size
        return math.gcd(size, self.shape[-1])

    def project(self, keep: Sequence[int]) -> FragmentLayout:
        """The layout of a fragment that has only the dimensions `keep`, in that order.

        Its elements are where this layout's are; the dropped dimensions' threads hold copies.
        """
        assert not self.flat or tuple(keep) == tuple(range(len(self.shape))), "flat layout"
        if self.flat:
            return self
        dims = _renumber([self.dims[d] for d in keep])
        return FragmentLayout(tuple(self.shape[d] for d in keep), dims, self.threads)

    def lengthened(self, extent: int) -> FragmentLayout:
        """The layout of a fragment with one dimension more, the last: a thread that holds an
        element here holds all `extent` there."""
        assert not self.flat, "flat layout"
        wider = tuple(
            tuple(register(d.size, d.stride * extent) if d.place == REGISTER else d for d in dim)
            for dim in self.dims
        )
        return FragmentLayout((*self.shape, extent), (*wider, (register(extent, 1),)), self.threads)

    def split(self, axis: int, inner: int) -> FragmentLayout:
        """The same places with a dimension written as two, the second of extent `inner`."""
        assert not self.flat and self.shape[axis] % inner == 0, f"{self} by {inner}"
        low: list[Digit] = []
        high = list(self.dims[axis])
        rest = inner
        while rest > 1:
            digit = high.pop()
            size = math.gcd(digit.size, rest)
            assert size in (digit.size, rest), f"{inner} does not cut {self} between digits"
            low.insert(0, Digit(size, digit.place, digit.stride))
            if digit.size > size:
                high.append(Digit(digit.size // size, digit.place, digit.stride * size))
            rest //= size
        shape = (*self.shape[:axis], self.shape[axis] // inner, inner, *self.shape[axis + 1 :])
        dims = (*self.dims[:axis], tuple(high), tuple(low), *self.dims[axis + 1 :])
        return FragmentLayout(shape, dims, self.threads)

    def crop(self, axis: int, extent: int) -> FragmentLayout:
        """The layout of `extent` neighbours along a dimension of whose places registers tell the
        coarsest; they begin where such a place does."""
        if extent == self.shape[axis]:
            return self
        top, *rest = self.dims[axis]
        each = math.prod(d.size for d in rest)
        assert top.place == REGISTER and extent % each == 0 and not self.flat, f"{self} to {extent}"
        assert extent <= self.shape[axis], f"{extent} of {self}"
        dims = list(self.dims)
        dims[axis] = (replace(top, size=extent // each), *rest)
        shape = (*self.shape[:axis], extent, *self.shape[axis + 1 :])
        return FragmentLayout(shape, _renumber(dims), self.threads)

    def window(self, axis: int, extent: int) -> FragmentLayout | None:
        """The layout of any `extent` neighbours along a dimension that begin at a multiple of
        it, where all such windows are held by the same threads alike; None where they are not."""
        if self.flat or self.shape[axis] % extent or self.is_padded:
            return None
        rest, digits = extent, list(self.dims[axis])
        while rest > 1:
            size = digits.pop().size
            if rest % size and size % rest:
                return None
            rest //= min(size, rest)
        split = self.split(axis, extent)
        if any(d.place != REGISTER for d in split.dims[axis]):
            return None
        return split.project([d for d in range(len(split.shape)) if d != axis])

    def same_places(self, other: FragmentLayout) -> bool:
        """True when each element is in the same threads in both (registers may be numbered
        differently, which costs nothing to convert)."""
        if self.shape != other.shape or self.threads != other.threads:
            return False
        if self == other:
            return True
        return self._canonical() == other._canonical()

    def _canonical(self) -> object:
        if self.flat:
            return self
        dims = []
        for extent, weighted in zip(self.shape, self.weights, strict=True):
            threads: list[tuple[int, int, int]] = []
            for d, weight in weighted:
                if d.place != THREAD or d.size == 1:
                    continue
                last = threads[-1] if threads else None
                if last and last[1] == d.stride * d.size and last[2] == weight * d.size:
                    threads[-1] = (
                        last[0] * d.size,
                        d.stride,
                        weight,
                    )  # two adjacent digits: one
                else:
                    threads.append((d.size, d.stride, weight))
            capacity = math.prod(d.size for d, _ in weighted)
            dims.append((tuple(threads), capacity if capacity != extent else extent))
        return tuple(dims)

    def register_of(self, other: FragmentLayout) -> list[int]:
        """For each register of `self`, the register of `other` with the same element
        (both layouts have the `same_places`)."""
        table = {other.register_part(r): r for r in range(other.registers)}
        return [table[self.register_part(r)] for r in range(self.registers)]

    def __str__(self) -> str:
        def show(digits: Iterable[Digit]) -> str:
            return "*".join(f"{d.size}{d.place[0]}{d.stride}" for d in digits) or "1"

        body = ", ".join(show(dim) for dim in self.dims)
        copies = f" x{self.replicas} copies" if self.replicas > 1 else ""
        return f"{'flat ' if self.flat else ''}({body}) over {self.threads} threads{copies}"


def _renumber(dims: Sequence[tuple[Digit, ...]]) -> tuple[tuple[Digit, ...], ...]:
    """The same digits with the register strides made compact, order kept."""
    strides = sorted({(d.stride, d.size) for dim in dims for d in dim if d.place == REGISTER})
    fresh: dict[tuple[int, int], int] = {}
    position = 1
    for stride, size in strides:
        fresh[stride, size] = position
        position *= size
    return tuple(
        tuple(register(d.size, fresh[d.stride, d.size]) if d.place == REGISTER else d for d in dim)
        for dim in dims
    )


def replicated(shape: Sequence[int], threads: int) -> FragmentLayout:
    """Every thread holds every element."""
    dims: list[tuple[Digit, ...]] = []
    position = 1
    for extent in reversed(shape):
        dims.append((register(extent, position),))
        position *= extent
    return FragmentLayout(tuple(shape), tuple(reversed(dims)), threads)


def blocked(shape: Sequence[int], threads: int, vector: int = 1) -> FragmentLayout:
    """Spread a tile evenly: consecutive threads hold consecutive vectors of the last dimension.

    `vector` must divide the last extent (1 when there is no dimension). When the tile cannot be
    cut evenly by dimension it is cut along its flattened index, padded to whole rounds.
    """
    shape = tuple(shape)
    if not shape:
        return FragmentLayout((), (), threads)
    assert shape[-1] % vector == 0, f"vector {vector} does not divide {shape}"
    digits: list[tuple[Digit, ...]] = []
    free = threads  # threads not yet used
    position = 1  # stride of the next thread digit
    registers = vector
    even = True
    for axis in range(len(shape) - 1, -1, -1):
        extent = shape[axis] // (vector if axis == len(shape) - 1 else 1)
        mine = math.gcd(extent, free)
        if mine != min(extent, free) and free > 1 and not (axis == 0 and extent > free):
            even = False
            break
        if axis == 0 and extent % mine and free > 1:
            even = False
            break
        entry: list[Digit] = []
        rest = extent // mine
        if rest > 1:
            entry.append(register(rest, registers))
            registers *= rest
        if mine > 1:
            entry.append(thread(mine, position))
            position *= mine
            free //= mine
        if axis == len(shape) - 1 and vector > 1:
            entry.append(register(vector, 1))
        digits.append(tuple(entry))
    if even and (
        free == 1 or all(len(d) or e == 1 for d, e in zip(digits, shape[::-1], strict=True))
    ):
        layout = FragmentLayout(shape, tuple(reversed(digits)), threads)
        if layout.holders * vector * 2 > min(threads * vector, math.prod(shape)):
            return layout
    total = math.prod(shape) // vector
    rounds = -(-total // threads)
    holders = threads if rounds > 1 else _divisor_at_least(threads, total)
    flat: list[Digit] = []
    if rounds > 1:
        flat.append(register(rounds, vector))
    flat.append(thread(holders, 1))
    if vector > 1:
        flat.append(register(vector, 1))
    if len(shape) == 1:
        return FragmentLayout(shape, (tuple(flat),), threads)
    return FragmentLayout(shape, (tuple(flat),), threads, flat=True)


def _divisor_at_least(number: int, least: int) -> int:
    """The smallest divisor of `number` that is at least `least`."""
    return min(d for d in range(1, number + 1) if number % d == 0 and d >= least)
