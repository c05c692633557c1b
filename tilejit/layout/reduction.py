"""How a fragment is reduced along one axis: which digits of it are registers, lanes and warps.

Pure index maths. Does not know what is combined, machines or tile ops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tilejit.layout.fragment import (
    REGISTER,
    THREAD,
    Digit,
    FragmentLayout,
    register,
    thread,
)

LANES = 32  # threads that trade registers (PTX ISA, "shfl.sync")
SECTOR_BYTES = 64  # neighbouring bytes below which accesses of a warp cost more
ELEMENT_COST = 4  # of loading an element and what else is done to it, in operations
EXCHANGE_COST = 40  # of two trips to shared memory and a meeting


@dataclass(frozen=True)
class Reduction:
    """The reduction of fragments of a layout along an axis.

    keeps_axis: the result has an extent of 1 there, else the dimension is gone.
    """

    source: FragmentLayout
    axis: int
    keeps_axis: bool = False

    def __post_init__(self) -> None:
        assert not self.source.flat, f"{self.source} tells no axes apart"

    @cached_property
    def result(self) -> FragmentLayout:
        """Where the results are: threads that the axis told apart hold copies."""
        rest = [d for d in range(len(self.source.shape)) if d != self.axis]
        kept = self.source.project(rest)
        if not self.keeps_axis:
            return kept
        return FragmentLayout(
            (*kept.shape[: self.axis], 1, *kept.shape[self.axis :]),
            (*kept.dims[: self.axis], (), *kept.dims[self.axis :]),
            kept.threads,
        )

    def result_part(self, part: Sequence[int]) -> tuple[int, ...]:
        """The result's coordinates of an element's."""
        middle = (0,) if self.keeps_axis else ()
        return (*part[: self.axis], *middle, *part[self.axis + 1 :])

    @property
    def registers(self) -> int:
        """Elements of the axis that a thread holds, padding included."""
        digits = self.source.dims[self.axis]
        return math.prod(d.size for d in digits if d.place == REGISTER)

    @property
    def is_padded(self) -> bool:
        """True when digits of the axis cover more than its extent."""
        covered = math.prod(d.size for d in self.source.dims[self.axis])
        return covered > self.source.shape[self.axis]

    @cached_property
    def _threads(self) -> tuple[list[Digit], list[Digit]]:
        """The axis's threads within a warp that differ in single bits of their number, and the
        others."""
        lanes, others = [], []
        for digit in self.source.dims[self.axis]:
            if digit.place != THREAD or digit.size == 1:
                continue
            near = 1
            if self.source.threads % LANES == 0 and LANES % digit.stride == 0:
                near = math.gcd(digit.size, LANES // digit.stride)
            if digit.size > near:
                others.append(thread(digit.size // near, digit.stride * near))
            if near > 1:
                lanes.append(thread(near, digit.stride))
        return lanes, others

    @property
    def lanes(self) -> int:
        """Lanes of a warp that hold parts of one result."""
        return math.prod(d.size for d in self._threads[0])

    @property
    def steps(self) -> tuple[int, ...]:
        """Distances at which lanes trade what they have, nearest first."""
        return tuple(
            sorted(
                digit.stride << bit
                for digit in self._threads[0]
                for bit in range(digit.size.bit_length() - 1)
            )
        )

    @property
    def groups(self) -> int:
        """Threads that hold parts of one result after lanes have traded: all of them go through
        shared memory."""
        return math.prod(d.size for d in self._threads[1])

    @property
    def is_by_warps(self) -> bool:
        """True when whole warps are what goes through shared memory."""
        return all(d.stride % LANES == 0 for d in self._threads[1])

    @cached_property
    def partials(self) -> FragmentLayout:
        """Where the parts are after lanes have traded: a result's, with one dimension more."""
        kept = self.result
        return FragmentLayout(
            (*kept.shape, self.groups), (*kept.dims, tuple(self._threads[1])), kept.threads
        )


def shared_out(layout: FragmentLayout, step: int) -> FragmentLayout | None:
    """The layout where, of two threads whose numbers differ by the bit `step` and which hold the
    same, the first keeps the even registers and the other the odd ones; None where registers do
    not come in pairs."""
    registers = [d for dim in layout.dims for d in dim if d.place == REGISTER and d.size > 1]
    if not any(d.stride == 1 and d.size % 2 == 0 for d in registers):
        return None

    def digits(dim: Sequence[Digit]) -> Iterator[Digit]:
        for d in dim:
            if d.place != REGISTER or d.size == 1:
                yield d
            elif d.stride > 1:
                yield register(d.size, d.stride // 2)
            else:
                if d.size > 2:
                    yield register(d.size // 2, 1)
                yield thread(2, step)

    return FragmentLayout(
        layout.shape, tuple(tuple(digits(d)) for d in layout.dims), layout.threads
    )


def spread(
    shape: Sequence[int], threads: int, vector: int, axis: int, itemsize: int
) -> FragmentLayout:
    """Spread a tile that is reduced along an axis: as `blocked`, but dimension by dimension, with
    as little to trade between threads as evenness and neighbouring accesses allow.

    `vector` divides the last extent.
    """
    assert shape and shape[-1] % vector == 0, f"vector {vector} does not divide {shape}"
    best: tuple[tuple[float, int], FragmentLayout] | None = None
    for shares in _shares(len(shape), threads):
        layout = _dimension_wise(shape, threads, vector, shares)
        found = Reduction(layout, axis)
        results = layout.registers // found.registers
        near = min(shares[-1] * vector, shape[-1]) * itemsize
        cost = ELEMENT_COST * layout.registers * max(1.0, SECTOR_BYTES / near)
        cost += 2 * results * len(found.steps)
        if found.groups > 1:
            cost += results * found.groups + EXCHANGE_COST
        key = (cost, -shares[-1])
        if best is None or key < best[0]:
            best = (key, layout)
    assert best is not None, f"no way to spread {shape}"
    return best[1]


def _shares(rank: int, threads: int) -> Iterator[tuple[int, ...]]:
    """All ways to give each dimension a number of threads, whose product divides `threads`."""
    divisors = [d for d in range(1, threads + 1) if threads % d == 0]
    for shares in itertools.product(divisors, repeat=min(rank, 2)):
        if threads % math.prod(shares) == 0:
            yield (*(1,) * (rank - 2), *shares)
    for d in range(rank - 2):  # of three and more dimensions, one of the outer and the last
        for first, last in itertools.product(divisors, repeat=2):
            if threads % (first * last) == 0:
                yield (*(first if k == d else 1 for k in range(rank - 1)), last)


def _dimension_wise(
    shape: Sequence[int], threads: int, vector: int, shares: Sequence[int]
) -> FragmentLayout:
    dims: list[tuple[Digit, ...]] = []
    number, position = vector, 1
    for d in reversed(range(len(shape))):
        width = vector if d == len(shape) - 1 else 1
        rounds = -(-shape[d] // (width * shares[d]))
        digits = (register(rounds, number), thread(shares[d], position), register(width, 1))
        dims.append(tuple(digit for digit in digits if digit.size > 1))
        number *= rounds
        position *= shares[d]
    return FragmentLayout(tuple(shape), tuple(reversed(dims)), threads)
