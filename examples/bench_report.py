"""What a benchmark tells: candidates' times on each case, tables, means, and a file of it all.

Knows rates and ratios. Does not know what the cases compute, nor how they are timed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

WIDTH = 40
"""Columns of a table's first cell, which holds a case."""


class Case(Protocol):
    """What one line is about: a dataclass that says itself by `str`.

    flops: operations of one call; bytes: the least that it must move; group: the line of the
    summary that it counts for.
    """

    @property
    def flops(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    @property
    def group(self) -> str: ...


@dataclass
class Measured:
    """One candidate's times on one case, in milliseconds, and the configuration that won."""

    who: str
    config: str
    times: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


@dataclass
class Outcome:
    """What came of one case: candidates by their names, and who was left out, why.

    base: the candidate whose time is divided by the others'.
    """

    case: Any  # a Case
    base: str
    found: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tflops(self, who: str) -> float:
        return float(self.case.flops / self.found[who].ms / 1e9)

    def ratio(self, who: str) -> float | None:
        """The base's time over the candidate's; None where either is missing."""
        if who not in self.found or self.base not in self.found:
            return None
        return self.found[self.base].ms / self.found[who].ms


def heading(title: str, who: Sequence[str]) -> str:
    """The columns of `row`."""
    columns = "".join(f"{name:>16}" for name in who)
    return f"{title:<{WIDTH}}{columns}\n{'':<{WIDTH}}" + f"{'TFLOP/s  ratio':>16}" * len(who)


def row(outcome: Outcome, who: Sequence[str], *, detailed: Sequence[str]) -> str:
    """One case's figures, below them who was left out, and what won the sweeps of `detailed`."""
    cells = []
    for name in who:
        ratio = outcome.ratio(name)
        shown = "-" if ratio is None else f"{ratio:.3f}"
        cells.append(f"{outcome.tflops(name):9.1f}{shown:>7}" if name in outcome.found else "-")
    lines = [f"{outcome.case!s:<{WIDTH}}" + "".join(f"{cell:>16}" for cell in cells)]
    lines += [f"    {note}" for note in outcome.notes]
    told = [m for m in outcome.found.values() if m.who in detailed]
    return "\n".join(lines + [f"    {m.who}: {m.config}, {m.ms:.4f} ms" for m in told])


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def summary(outcomes: Sequence[Outcome], who: Sequence[str]) -> str:
    """Geometric means of the ratios for each group of cases, and of how many cases."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.group, []).append(outcome)
    lines = [f"{'geometric means of the ratios':<{WIDTH}}" + "".join(f"{n:>16}" for n in who)]
    for name, group in groups.items():
        cells = []
        for candidate in who:
            ratios = [ratio for o in group if (ratio := o.ratio(candidate)) is not None]
            mean = f"{geometric_mean(ratios):.3f} of {len(ratios)}" if ratios else "-"
            cells.append(f"{mean:>16}")
        lines.append(f"{name:<{WIDTH}}" + "".join(cells))
    return "\n".join(lines)


def records(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One flat record for each candidate of each case."""
    return [
        {
            **asdict(outcome.case), "who": who, "config": found.config, "ms": found.ms,
            "times_ms": found.times, "tflops": outcome.tflops(who), "ratio": outcome.ratio(who),
            "intensity": outcome.case.flops / outcome.case.bytes,
        }
        for outcome in outcomes
        for who, found in outcome.found.items()
    ]  # fmt: skip


def save(path: str, outcomes: Sequence[Outcome], facts: dict[str, Any]) -> None:
    """Write the facts of the run and all that was measured to a JSON file."""
    told = {
        **facts,
        "notes": {str(outcome.case): outcome.notes for outcome in outcomes if outcome.notes},
        "records": records(outcomes),
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(told, file, indent=1)
