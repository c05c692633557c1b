"""The command line that the examples share: their check, or `--bench` and its options.

Knows words, not what they ask for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

TIMER_HELP = """events: candidates on torch's stream only; profiler: kernel durations of all
(profiler if pallas is among the peers, else events)"""


def script(doc: str | None, check: Callable[[], None], bench: str) -> None:
    """Run an example: its check, or with `--bench` the `main` of the module `bench`, and exit."""
    given = sys.argv[1:]
    if "--bench" in given:
        main = importlib.import_module(bench).main
        raise SystemExit(main([word for word in given if word != "--bench"]))
    if given:
        raise SystemExit(f"Unknown: {' '.join(given)}\n{doc}")
    check()


def words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser for some of those words with commas between them, or none."""

    def parse(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",") if word.strip()]
        for word in found:
            if word not in allowed:
                message = f"{word!r} is not one of {', '.join(allowed)}"
                raise argparse.ArgumentTypeError(message)
        return list(dict.fromkeys(found))

    return parse


def numbers(text: str) -> list[int]:
    """Positive integers with commas between them."""
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers") from error
    if any(number < 1 for number in found):
        raise argparse.ArgumentTypeError("integers here are positive")
    return found


def number(text: str) -> int:
    """One positive integer."""
    found = numbers(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one integer")
    return found[0]


def bench_parser(
    example: str, doc: str | None, peers: Sequence[str], default_peers: Sequence[str]
) -> argparse.ArgumentParser:
    """A parser that has what every benchmark takes: peers, how long, how timed, what is told."""
    parser = argparse.ArgumentParser(
        prog=f"{example}.py --bench",
        description=doc,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    several = f"of {','.join(peers)} ({','.join(default_peers)})"
    add("--peers", type=words(peers), default=list(default_peers), help=several)
    add("--rounds", type=number, default=20, help="interleaved rounds (20)")
    add("--seconds", type=float, help="end by then: fewer configurations, rounds and cases")
    add("--quick", action="store_true", help="sweep fewer configurations")
    add("--timer", choices=("events", "profiler"), help=TIMER_HELP)
    add("--details", action="store_true", help="print which configurations won")
    add("--json", metavar="FILE", help="write all times there")
    return parser
