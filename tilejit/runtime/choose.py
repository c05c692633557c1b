"""Chooses the values of parameters that are `T.auto(...)`: by what the cost model says of each
kernel that they would give.

Knows how candidates are combined and compared. Does not know costs, nor how a kernel is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilejit.errors import TileError
from tilejit.ir.kernel import Program
from tilejit.language.auto import Auto
from tilejit.passes.cost import Estimate
from tilejit.passes.nominal import nominal
from tilejit.passes.schedule import best_schedule
from tilejit.target import Target

Values = tuple[Any, ...]
Grids = tuple[tuple[int, ...], ...]  # blocks along each axis, of each kernel
MOST_TRIED = 60  # combinations of all parameters at once; more are searched two at a time
REFINED = 4  # combinations of other parameters with which values between candidates are tried
BETWEEN_WORTH = 0.96  # of the time of the best candidate: what a value between must save
SHOWN = 3  # of the best, in explain()
WORTH = 0.99  # of the time of an earlier candidate: what a later one must save
LIGHTER = 0.9  # of what an equally fast one multiplies: what counts as less


@dataclass(frozen=True)
class Choice:
    """values: of the open parameters. notes: lines for `explain()`."""

    values: dict[str, Any]
    notes: tuple[str, ...]


def has_open(constants: Mapping[str, Any]) -> bool:
    """True when a parameter is left to the cost model."""
    return any(isinstance(value, Auto) for value in constants.values())


def choose(
    constants: Mapping[str, Any], build: Callable[[dict[str, Any]], Program], target: Target
) -> Choice:
    """The values of the open parameters.

    build: the traced program for values of all constants.

    Raises:
        TileError: every candidate fails; what the first one says.
    """
    return _Search(constants, build, target).run()


class _Search:
    def __init__(
        self,
        constants: Mapping[str, Any],
        build: Callable[[dict[str, Any]], Program],
        target: Target,
    ) -> None:
        self.constants = dict(constants)
        self.build = build
        self.target = target
        autos = {n: v for n, v in constants.items() if isinstance(v, Auto)}
        self.open = {n: v.candidates for n, v in autos.items()}
        self.steps = [v.step for v in autos.values()]
        self.found: dict[Values, float] = {}
        self.failed: dict[Values, TileError | str] = {}
        self.estimates: dict[Values, list[Estimate]] = {}
        self.grids: dict[Values, Grids] = {}

    def run(self) -> Choice:
        first = tuple(candidates[0] for candidates in self.open.values())
        total = 1
        for candidates in self.open.values():
            total *= len(candidates)
        if total <= MOST_TRIED:
            best = self.best_of(itertools.product(*self.open.values()))
        else:
            best = self.climb(first)
        if best is not None and any(self.steps):
            best = self.refined(best)
        if best is None:
            reason = self.failed[first]
            if isinstance(reason, TileError):
                raise reason
            best = first  # nothing fits by the estimate: what follows says what is wrong
        return Choice(dict(zip(self.open, best, strict=True)), self.notes(best))

    def climb(self, start: Values) -> Values | None:
        """Try all values of each pair of parameters in turn, the others as they were best."""
        best = start
        names = list(self.open)
        while True:
            before = best
            for i, j in itertools.combinations(range(len(names)), 2):
                at_hand = itertools.chain([best], self.varied(best, i, j))
                best = self.best_of(at_hand) or best
            if best == before:
                return best if best in self.found else None

    def refined(self, best: Values) -> Values:
        """The best where values between the candidates are tried too, of one parameter after the
        other: they have to be worth more than what estimates are wrong by."""
        named = set(self.found)
        most = BETWEEN_WORTH * self.found[best]
        for place, step in enumerate(self.steps):
            tried = 0
            for same in self.ways(place) if step else ():
                between = [seconds for v, seconds in self.found.items() if v not in named]
                if tried < REFINED and self.try_between(same, place, min([most, *between])):
                    tried += 1
        found = self.best_of([v for v in self.found if v not in named])
        return found if found is not None and self.found[found] <= most else best

    def ways(self, place: int) -> list[list[Values]]:
        """What was tried of a parameter for each combination of the others, the best first."""
        result: dict[Values, list[Values]] = {}
        for values in sorted(self.found, key=self.found.__getitem__):
            result.setdefault((*values[:place], *values[place + 1 :]), []).append(values)
        return list(result.values())

    def try_between(self, same: list[Values], place: int, most: float) -> bool:
        """Weigh the multiples of a parameter's step between the candidates next to the first of
        `same`, those that may take at most so many seconds; False where none can.

        same: what was tried of the parameter with the same values of the others, the best first.

        What can be better of a value between is that blocks fill the chip in every round and end
        where tensors do. A round takes as long as its blocks are large, and the larger, the less
        for each unit of it. Where there are as many blocks as for a smaller value, each does more
        for nothing.
        """
        each = [self.found[v] / self.rounds(v) / max(1, abs(v[place])) for v in same]
        if each[0] * min(self.covered(v, place) for v in same) > most:
            return False
        near, named = same[0], sorted(list(self.open.values())[place])
        at, step = named.index(near[place]), self.steps[place]
        low, high = named[max(0, at - 1)], named[min(at + 1, len(named) - 1)]
        smaller: set[Grids] = set()
        for number in sorted({low, near[place], *range(low // step * step + step, high, step)}):
            values = (*near[:place], number, *near[place + 1 :])
            if number not in named:
                program = self.traced_between(values)
                if program is None or self.grids[values] in smaller:
                    continue
                if min(each) * self.rounds(values) * abs(number) <= most:
                    self.weigh_program(values, program)
            if values in self.found:
                smaller.add(self.grids[values])
        return True

    def rounds(self, values: Values) -> int:
        """How often blocks begin at the same time, on a chip that has one for each multiprocessor
        at once."""
        chip = self.target.chip.multiprocessors
        return max(1, sum(math.ceil(math.prod(grid) / chip) for grid in self.grids[values]))

    def covered(self, values: Values, place: int) -> float:
        """What a multiprocessor does at least, where all do as much: blocks' shares, in units of a
        parameter that says how large they are."""
        shares: int = sum(map(math.prod, self.grids[values])) * abs(values[place])
        return max(1, shares) / self.target.chip.multiprocessors

    def varied(self, values: Values, i: int, j: int) -> Iterator[Values]:
        options = list(self.open.values())
        for a, b in itertools.product(options[i], options[j]):
            fresh = list(values)
            fresh[i], fresh[j] = a, b
            yield tuple(fresh)

    def best_of(self, tried: Iterable[Values]) -> Values | None:
        """Of those that are about as fast as the fastest the first, unless another one multiplies
        less that is not there."""
        weighed = [(seconds, v) for v in tried if (seconds := self.weigh(v)) is not None]
        if not weighed:
            return None
        least = min(seconds for seconds, _ in weighed)
        near = [v for seconds, v in weighed if seconds * WORTH <= least]
        lightest = min(near, key=self.multiplied)
        is_lighter = self.multiplied(lightest) < LIGHTER * self.multiplied(near[0])
        return lightest if is_lighter else near[0]

    def multiplied(self, values: Values) -> float:
        """Seconds in which the tensor cores multiply."""
        return sum(e.seconds * e.busy for e in self.estimates[values])

    def weigh(self, values: Values) -> float | None:
        """The seconds by which a call is compared; None where the kernel cannot be."""
        if values not in self.found and values not in self.failed:
            program = self.traced(values)
            if program is not None:
                self.weigh_program(values, program)
        return self.found.get(values)

    def traced(self, values: Values) -> Program | None:
        """The program for values of the open parameters; None where there is none."""
        try:
            program = self.build({**self.constants, **dict(zip(self.open, values, strict=True))})
        except TileError as error:
            self.failed[values] = error
            return None
        self.grids[values] = tuple(tuple(map(nominal, k.grid)) for k in program.kernels)
        return program

    def traced_between(self, values: Values) -> Program | None:
        """The same for values that nobody named: whatever the function raises for them, it is
        right for those that somebody did."""
        try:
            return self.traced(values)
        except Exception as error:
            self.failed[values] = f"{type(error).__name__}: {error}"
            return None

    def weigh_program(self, values: Values, program: Program) -> None:
        """Note what the cost model says of a program, or why it says nothing."""
        try:
            estimates: list[Estimate] = []
            weight = 0.0
            for kernel in program.kernels:
                chosen = best_schedule(kernel, self.target)
                if isinstance(chosen, str):
                    self.failed[values] = chosen
                    return
                estimates.append(chosen.estimate)
                weight += chosen.weight
        except TileError as error:
            self.failed[values] = error
            return
        self.estimates[values] = estimates
        self.found[values] = weight

    def notes(self, best: Values) -> tuple[str, ...]:
        """What was chosen, and what came next."""
        tried = len(self.found) + len(self.failed)
        lines = [f"{self.shown(best)}: chosen of {tried} candidates"]
        if best in self.found:
            bound = max(self.estimates[best], key=lambda e: e.seconds)
            lines[0] += (
                f", estimated {self.estimated(best)}, "
                f"tensor cores {bound.busy:.0%} busy, bound by {bound.bound}"
            )
        ranked = sorted((v for v in self.found if v != best), key=lambda v: self.found[v])
        lines += [f"  next {self.shown(v)}: estimated {self.estimated(v)}" for v in ranked[:SHOWN]]
        for values, reason in itertools.islice(self.failed.items(), SHOWN):
            text = reason.headline if isinstance(reason, TileError) else reason
            lines.append(f"  not {self.shown(values)}: {text}")
        return tuple(lines)

    def estimated(self, values: Values) -> str:
        seconds = sum(e.seconds for e in self.estimates[values])
        return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"

    def shown(self, values: Values) -> str:
        return ", ".join(f"{n}={v!r}" for n, v in zip(self.open, values, strict=True))


def with_notes(program: Program, notes: tuple[str, ...]) -> Program:
    """The program whose `explain()` begins with these lines."""
    if not notes or not program.kernels:
        return program
    first, *others = program.kernels
    first = replace(first, notes=(*notes, *first.notes))
    return replace(program, kernels=(first, *others))
