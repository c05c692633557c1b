"""How a tile is scanned along one axis: where its elements are in the meantime.

Pure index maths. Does not know what is combined, machines or tile ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tilejit.layout.fragment import Digit, FragmentLayout, register, thread
from tilejit.layout.reduction import EXCHANGE_COST, LANES, SECTOR_BYTES, Reduction

ACCESS_COST = 2  # of an access to memory, in operations


@dataclass(frozen=True)
class Scanning:
    """How a tile is scanned along `axis`.

    A thread holds `rounds` runs of `run` neighbours each, those of `lanes` lanes of a warp side by
    side; lanes whose numbers are `stride` apart are neighbours. Where all lanes together do not
    hold the whole axis there are `parts` of it, whose threads do not trade registers. Digits may
    cover more than there is.
    """

    layout: FragmentLayout
    axis: int
    parts: int
    rounds: int
    lanes: int
    stride: int
    run: int

    @property
    def length(self) -> int:
        """Elements of a part."""
        return self.rounds * self.lanes * self.run

    @property
    def is_padded(self) -> bool:
        """True when digits of the axis cover more than its extent."""
        return self.parts * self.length > self.layout.shape[self.axis]

    @cached_property
    def totals(self) -> FragmentLayout:
        """Where all of each part is: the tile's layout, with one dimension in the place of the
        axis, the last, for the parts."""
        kept = Reduction(self.layout, self.axis).result
        parts = self.layout.dims[self.axis][:1] if self.parts > 1 else ()
        return FragmentLayout((*kept.shape, self.parts), (*kept.dims, parts), kept.threads)

    def line(self, register: int) -> tuple[tuple[int, ...], int]:
        """The other coordinates of a register's element, and its place in the thread's."""
        part = self.layout.register_part(register)
        return (*part[: self.axis], *part[self.axis + 1 :]), part[self.axis]


def scanned(
    shape: Sequence[int], axis: int, threads: int, vector: int, itemsize: int = 4
) -> Scanning:
    """Spread a tile that is scanned along an axis over threads, with as little to do for each as
    evenness and neighbouring accesses to memory allow.

    vector: the most neighbours along the last dimension that a thread accesses at once, a power of
        two that divides its extent. itemsize: their bytes.
    """
    choices = _choices(tuple(shape), axis, threads, vector, itemsize)
    return min(choices, key=lambda choice: choice.cost).scanning


@dataclass(frozen=True)
class _Choice:
    """shares: threads along each dimension; of the axis, those in other parts."""

    shape: tuple[int, ...]
    axis: int
    threads: int
    itemsize: int
    vector: int
    shares: tuple[int, ...]
    lanes: int

    @property
    def is_last(self) -> bool:
        return self.axis == len(self.shape) - 1

    @property
    def parts(self) -> int:
        return self.shares[self.axis]

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Vectors of the last dimension, and elements of the others, in a thread."""
        counts = []
        for d, (extent, share) in enumerate(zip(self.shape, self.shares, strict=True)):
            share *= self.lanes if d == self.axis else 1
            share *= self.vector if d == len(self.shape) - 1 else 1
            counts.append(-(-extent // share))
        return tuple(counts)

    @property
    def cost(self) -> float:
        """Instructions of a thread, about."""
        registers = math.prod(self.held) * self.vector
        lines = registers // (self.held[self.axis] * (self.vector if self.is_last else 1))
        last = self.lanes if self.is_last else self.shares[-1]
        near = min(last * self.vector, self.shape[-1]) * self.itemsize
        cost = 2 * ACCESS_COST * registers / self.vector * max(1.0, SECTOR_BYTES / near)
        cost += registers * (1 + (self.lanes > 1) + (self.parts > 1))
        if self.lanes > 1:
            rounds = self.held[self.axis] if self.is_last else 1
            cost += lines * rounds * (3 * (self.lanes.bit_length() - 1) + 2)
        if self.parts > 1:
            cost += EXCHANGE_COST + 4 * lines * self.parts
        return cost

    @property
    def scanning(self) -> Scanning:
        last = len(self.shape) - 1
        stride = 1 if self.is_last else self.shares[last]
        position = stride * self.lanes
        number = 1
        dims: list[tuple[Digit, ...]] = []
        for d in reversed(range(len(self.shape))):
            held, share = self.held[d], self.shares[d]
            width = self.vector if d == last else 1
            if d == self.axis:
                where = thread(self.lanes, stride)
            else:
                where = thread(share, 1 if d == last else position)
                position *= 1 if d == last else share
            if d == self.axis and d != last:
                digits = [where, register(held, number)]
            else:
                digits = [register(held, number * width), where, register(width, number)]
            number *= held * width
            dims.insert(0, tuple(digit for digit in digits if digit.size > 1))
        if self.parts > 1:
            dims[self.axis] = (thread(self.parts, position), *dims[self.axis])
        layout = FragmentLayout(self.shape, tuple(dims), self.threads)
        rounds, run = (self.held[last], self.vector) if self.is_last else (1, self.held[self.axis])
        return Scanning(layout, self.axis, self.parts, rounds, self.lanes, stride, run)


def _choices(
    shape: tuple[int, ...], axis: int, threads: int, vector: int, itemsize: int
) -> Iterator[_Choice]:
    """Vectors, threads along the last dimension, lanes and parts of the axis; the other dimensions
    take of the rest what they can."""
    last, extent = len(shape) - 1, shape[axis]
    while vector >= 1:
        runs = -(-extent // vector) if axis == last else extent
        most = 1 if axis == last else -(-shape[last] // vector)
        for share in _divisors(threads, most):
            for lanes in _lanes(threads, share, runs):
                shares, free = [1] * len(shape), threads // (share * lanes)
                shares[last] = share
                for d in reversed(range(last)):
                    if d != axis:
                        shares[d] = max(_divisors(free, shape[d]))
                        free //= shares[d]
                is_warp = lanes == 1 or lanes * share == LANES  # parts are no less
                for parts in _divisors(free, -(-runs // lanes) if is_warp else 1):
                    shares[axis] = parts
                    yield _Choice(shape, axis, threads, itemsize, vector, tuple(shares), lanes)
        vector //= 2


def _lanes(threads: int, share: int, runs: int) -> Iterator[int]:
    """How many lanes of a warp, `share` apart, may hold runs of a line."""
    lanes = 1
    while True:
        yield lanes
        lanes *= 2
        if threads % LANES or LANES % (share * lanes) or lanes >= 2 * runs:
            return


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
