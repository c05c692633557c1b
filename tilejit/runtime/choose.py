"""Chooses the values of parameters that are `T.auto(...)`: by what the cost model says of each
kernel that they would give.

Knows how candidates are combined and compared. Does not know costs, nor how a kernel is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilejit.errors import TileError
from tilejit.ir.kernel import Program
from tilejit.language.auto import Auto
from tilejit.passes.cost import Estimate
from tilejit.passes.schedule import best_schedule
from tilejit.target import Target

Values = tuple[Any, ...]
MOST_TRIED = 40  # combinations of all parameters at once; more are searched two at a time
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
        self.open = {n: v.candidates for n, v in constants.items() if isinstance(v, Auto)}
        self.found: dict[Values, float] = {}
        self.failed: dict[Values, TileError | str] = {}
        self.estimates: dict[Values, list[Estimate]] = {}

    def run(self) -> Choice:
        first = tuple(candidates[0] for candidates in self.open.values())
        total = 1
        for candidates in self.open.values():
            total *= len(candidates)
        if total <= MOST_TRIED:
            best = self.best_of(itertools.product(*self.open.values()))
        else:
            best = self.climb(first)
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

    def varied(self, values: Values, i: int, j: int) -> Iterator[Values]:
        options = list(self.open.values())
        for a, b in itertools.product(options[i], options[j]):
            fresh = list(values)
            fresh[i], fresh[j] = a, b
            yield tuple(fresh)

    def best_of(self, tried: Iterator[Values] | itertools.product[Values]) -> Values | None:
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
        if values in self.found or values in self.failed:
            return self.found.get(values)
        try:
            program = self.build({**self.constants, **dict(zip(self.open, values, strict=True))})
            estimates: list[Estimate] = []
            weight = 0.0
            for kernel in program.kernels:
                chosen = best_schedule(kernel, self.target)
                if isinstance(chosen, str):
                    self.failed[values] = chosen
                    return None
                estimates.append(chosen.estimate)
                weight += chosen.weight
        except TileError as error:
            self.failed[values] = error
            return None
        self.estimates[values] = estimates
        self.found[values] = weight
        return self.found[values]

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
