"""Positional and keyword arguments to parameters, with messages as clear as Python's.

Knows names and defaults. Does not know what an argument is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from tilejit.errors import ArgumentTypeError

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "missing"})()


class Binder:
    """The parameters of a function.

    what: its name; names: in order; num_positional: how many of them may be given by position;
    num_nameless: how many only so; defaults: of those that have one.
    """

    def __init__(
        self,
        what: str,
        names: Sequence[str],
        num_positional: int,
        defaults: Mapping[str, Any],
        num_nameless: int = 0,
    ) -> None:
        self.what = what
        self.names = tuple(names)
        self._positional = num_positional
        self._nameless = num_nameless
        self._defaults = [defaults.get(name, MISSING) for name in names]
        self._place = {name: n for n, name in enumerate(names) if n >= num_nameless}

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], is_partial: bool = False
    ) -> list[Any]:
        """A value for each parameter; `MISSING` for those not given when `is_partial`.

        Raises:
            ArgumentTypeError: too many, missing, unknown or repeated arguments.
        """
        count = len(args)
        if count > self._positional:
            self._too_many(count)
        values = [*args, *self._defaults[count:]]
        for name, value in kwargs.items():
            n = self._place.get(name)
            if n is None:
                self._unknown(name)
            elif n < count:
                raise ArgumentTypeError(f"{self.what}: {name} was given twice.")
            else:
                values[n] = value
        if not is_partial:
            for n, value in enumerate(values):
                if value is MISSING:
                    self._missing([m for m in range(n, len(values)) if values[m] is MISSING])
        return values

    def default(self, n: int) -> Any:
        """Of the parameter at place `n`; `MISSING` where it has none."""
        return self._defaults[n]

    def places(self, count: int, keywords: Sequence[str]) -> dict[int, int] | None:
        """Which argument each parameter gets, by place: `count` are given by position, and after
        them those of `keywords`; None where `bind` refuses them."""
        result = {n: n for n in range(count)}
        for n, name in enumerate(keywords, count):
            place = self._place.get(name)
            if place is None or place in result:
                return None
            result[place] = n
        return None if count > self._positional else result

    def _too_many(self, given: int) -> None:
        most = self._positional
        allowed = ", ".join(self.names[:most])
        takes = f"{most} positional argument{'' if most == 1 else 's'}"
        raise ArgumentTypeError(
            f"{self.what} takes {takes}, but {given} {'was' if given == 1 else 'were'} given.",
            notes=(f"Its parameters are: {allowed}.",) if allowed else (),
            hint="Pass the others by keyword." if len(self.names) > most else "",
        )

    def _missing(self, places: Sequence[int]) -> None:
        names = [self.names[n] for n in places]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        verb = "is" if len(names) == 1 else "are"
        raise ArgumentTypeError(
            f"{self.what}: {listed} {verb} missing.",
            hint=f"It takes: {', '.join(self.names)}.",
        )

    def _unknown(self, name: str) -> None:
        close = difflib.get_close_matches(name, self.names, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"It has: {', '.join(self.names)}."
        raise ArgumentTypeError(f"{self.what} has no parameter `{name}`.", hint=hint)
