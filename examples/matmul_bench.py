"""Times `matmul.py` beside cuBLAS, Triton, JAX Pallas and TileLang, in one process and in turns.

python examples/matmul.py --bench --sizes 4096 --peers cublas,triton,pallas,tilelang

Each candidate's result is checked before it is timed. Of each peer the best of a short sweep goes
into the interleaved rounds; tilejit runs what its cost model chose, without one. The L2 cache is
flushed before every call. Printed
are medians as TFLOP/s, and their ratio to cuBLAS. A peer that is not there, does not compile or is
wrong is left out, with the reason. Needs a GPU and torch.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import matmul as example
import roofline
from bench_clock import Limit, choose_clock, measure, reason
from matmul_cases import PRECISIONS, Case, Operands, cases, shapes

Candidates = Callable[[Operands, bool], Iterator[tuple[str, Callable[[], Any]]]]

PEERS = ("cublas", "triton", "pallas", "tilelang")
SIZES = (2048, 4096, 8192, 16384)
SWEEP_ROUNDS = 5
SWEEP_SHARE = 0.7
"""Of the time for one case, when time is limited: compiling takes most of it."""

SHAPES_HELP = "real: 32 products of language models, instead of squares or, with --sizes, besides"
LAYOUTS_HELP = "how B is stored, nn K x N, nt N x K (both); 8-bit operands take nt only"
TIMER_HELP = """events: candidates on torch's stream only; profiler: kernel durations of all
(profiler if pallas is among the peers, else events)"""


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
    """What came of one case: candidates by their names, and who was left out, why."""

    case: Case
    found: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tflops(self, who: str) -> float:
        return self.case.flops / self.found[who].ms / 1e9

    def ratio(self, who: str) -> float | None:
        """cuBLAS's time over the candidate's; None where either is missing."""
        if who not in self.found or "cublas" not in self.found:
            return None
        return self.found["cublas"].ms / self.found[who].ms


def tilejit_candidates(operands: Operands, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """tilejit's own: what its cost model chooses, and no sweep."""
    case, a, b, c = operands.case, operands.a, operands.b, operands.c
    tiles = "tfloat32" if case.dtype == "tfloat32" else None

    def build() -> Callable[[], Any]:
        def call() -> Any:
            example.matmul(a, b, c, transpose_B=case.is_transposed, tiles=tiles)
            return c

        return call

    yield "T.auto", build


def load_peers(names: Sequence[str]) -> tuple[dict[str, Candidates], list[str]]:
    """tilejit and the peers that import, and a line for each that does not."""
    # before JAX is imported, by whomever: else it takes three quarters of the memory at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found: dict[str, Candidates] = {"tilejit": tilejit_candidates}
    notes = []
    for name in names:
        try:
            found[name] = importlib.import_module(f"peers.matmul_{name}").candidates
        except Exception as error:
            notes.append(f"{name} is left out: {reason(error)}")
    return found, notes


def prepare(
    operands: Operands,
    who: str,
    candidates: Candidates,
    quick: bool,
    limit: Limit,
    outcome: Outcome,
) -> dict[tuple[str, str], Callable[[], Any]]:
    """The calls of one candidate's configurations that compile and are right, by their names."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    trouble = ""  # the first, which tells most
    try:
        for config, build in candidates(operands, quick):
            if calls and limit.is_over:
                break
            try:
                call = build()
                excess = check(operands, call)
            except Exception as error:
                trouble = trouble or reason(error)
                continue
            if excess <= 1:
                calls[who, config] = call
            else:
                wrong = f"{config} is wrong: its error is {excess:.3g} times the bound"
                outcome.notes.append(f"{who}: {wrong}")
                trouble = trouble or "wrong"
    except Exception as error:
        trouble = trouble or reason(error)
    if not calls:
        outcome.notes.append(f"{who} is left out: {trouble or 'no configuration fits'}")
    return calls


def check(operands: Operands, call: Callable[[], Any]) -> float:
    """The result's largest error, as a multiple of the bound; not a number where one is left."""
    import torch

    operands.poison()
    torch.cuda.synchronize()
    result = call()
    torch.cuda.synchronize()
    if not isinstance(result, torch.Tensor):
        result = sys.modules["peers.matmul_pallas"].to_torch(result)
    return operands.excess(result)


def run_case(
    case: Case, peers: dict[str, Candidates], clock: Any, limit: Limit, options: argparse.Namespace
) -> Outcome:
    """Sweep each candidate's configurations, then time the best of each in turns."""
    outcome, operands = Outcome(case), Operands(case)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for index, (who, candidates) in enumerate(peers.items()):
        part = limit.part(SWEEP_SHARE / (len(peers) - index))
        calls |= prepare(operands, who, candidates, options.quick, part, outcome)
    best: dict[str, tuple[float, str]] = {}
    for (who, config), times in measure(clock, calls, SWEEP_ROUNDS, limit).items():
        ms = statistics.median(times)
        if ms <= 0:
            outcome.notes.append(f"{who} is left out: the clock saw none of its kernels")
        elif who not in best or ms < best[who][0]:
            best[who] = ms, config
    chosen = {who: calls[who, config] for who, (_, config) in best.items()}
    for who, times in measure(clock, chosen, options.rounds, limit).items():
        outcome.found[who] = Measured(who, best[who][1], times)
    return outcome


def run(options: argparse.Namespace, outcomes: list[Outcome], start: float) -> int:
    """Time all cases, one line each as it ends; says how many were not reached.

    outcomes: filled on the way, so that what was measured is there whatever happens.
    """
    limit = Limit(options.seconds - (time.monotonic() - start) if options.seconds else None)
    peers, notes = load_peers(options.peers)
    clock, trouble = choose_clock(options.timer, has_other_streams="pallas" in peers)
    notes += [trouble] if trouble else []
    if not clock.sees_all_streams and peers.pop("pallas", None):
        notes.append("pallas is left out: CUDA events do not see JAX's streams")
    print(*notes, f"Timer: {clock.name}.", sep="\n", flush=True)
    todo = cases(shapes(options.sizes, real=options.real), options.dtypes, options.layouts)
    print(heading(list(peers)), flush=True)
    for index, case in enumerate(todo):
        if limit.is_over:
            return len(todo) - index
        try:
            part = limit.part(1 / (len(todo) - index))
            outcomes.append(run_case(case, peers, clock, part, options))
            print(row(outcomes[-1], list(peers), details=options.details), flush=True)
            save(options, outcomes, clock)
        except Exception as error:
            print(f"{case}: {reason(error)}", flush=True)
        if lost := free_memory():  # no call on this device can succeed any more
            print(f"The device is lost: {lost}", flush=True)
            return len(todo) - index - 1
    return 0


def free_memory() -> str | None:
    """Give back what a case held; says what is wrong where the device does not answer."""
    import torch

    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return reason(error)
    return None


def heading(who: Sequence[str]) -> str:
    """The columns of `row`."""
    columns = "".join(f"{name:>16}" for name in who)
    return f"{'M x N x K, dtype, layout of B':<38}{columns}\n{'':<38}" + (
        f"{'TFLOP/s  ratio':>16}" * len(who)
    )


def row(outcome: Outcome, who: Sequence[str], *, details: bool) -> str:
    """One case's figures, and below them who was left out and, if asked, what won the sweeps."""
    cells = []
    for name in who:
        ratio = outcome.ratio(name)
        shown = "-" if ratio is None else f"{ratio:.3f}"
        cells.append(f"{outcome.tflops(name):9.1f}{shown:>7}" if name in outcome.found else "-")
    lines = [f"{outcome.case!s:<38}" + "".join(f"{cell:>16}" for cell in cells)]
    lines += [f"    {note}" for note in outcome.notes]
    if details:
        lines += [f"    {m.who}: {m.config}, {m.ms:.4f} ms" for m in outcome.found.values()]
    return "\n".join(lines)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def summary(outcomes: Sequence[Outcome], who: Sequence[str]) -> str:
    """Geometric means of the ratios to cuBLAS for each dtype and layout, and of how many cases."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.case.dtype, outcome.case.layout), []).append(outcome)
    lines = [f"{'geometric means of the ratios':<38}" + "".join(f"{n:>16}" for n in who)]
    for (dtype, layout), group in groups.items():
        cells = []
        for name in who:
            ratios = [ratio for o in group if (ratio := o.ratio(name)) is not None]
            mean = f"{geometric_mean(ratios):.3f} of {len(ratios)}" if ratios else "-"
            cells.append(f"{mean:>16}")
        lines.append(f"{dtype + ' ' + layout:<38}" + "".join(cells))
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


def save(options: argparse.Namespace, outcomes: Sequence[Outcome], clock: Any) -> None:
    """Write all that is known to the JSON file, if one was asked for."""
    import torch

    if not options.json:
        return
    told = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "timer": clock.name,
        "notes": {str(outcome.case): outcome.notes for outcome in outcomes if outcome.notes},
        "records": records(outcomes),
    }  # fmt: skip
    with open(options.json, "w", encoding="utf-8") as file:
        json.dump(told, file, indent=1)


def finish(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """Print the means, and draw the picture if one was asked for."""
    import torch

    who = [n for n in ("tilejit", *PEERS) if any(n in o.found for o in outcomes)]
    print(summary(outcomes, who))
    if options.plot:
        try:
            device, bandwidth = torch.cuda.get_device_name(0), roofline.copy_bandwidth()
            print(roofline.draw(options.plot, records(outcomes), device, bandwidth))
        except Exception as error:
            print(f"No picture: {reason(error)}")


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
        raise argparse.ArgumentTypeError("sizes are positive")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; sizes are squares of their own unless only real shapes are asked for."""
    dtypes = list(PRECISIONS)
    parser = argparse.ArgumentParser(
        prog="matmul.py --bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=numbers, help="M = N = K (2048,4096,8192,16384)")
    add("--shapes", choices=("square", "real"), default="square", help=SHAPES_HELP)
    add("--dtypes", type=words(dtypes), default=["bfloat16"], help=f"of {','.join(dtypes)}")
    add("--layouts", type=words(["nn", "nt"]), default=["nn", "nt"], help=LAYOUTS_HELP)
    add("--peers", type=words(PEERS), default=["cublas"], help=f"of {','.join(PEERS)}")
    add("--rounds", type=int, default=20, help="interleaved rounds (20)")
    add("--seconds", type=float, help="end by then: fewer configurations, rounds and cases")
    add("--quick", action="store_true", help="sweep fewer configurations")
    add("--timer", choices=("events", "profiler"), help=TIMER_HELP)
    add("--details", action="store_true", help="print which configurations won")
    add("--json", metavar="FILE", help="write all times there")
    add("--plot", metavar="FILE.png", help="draw a roofline there")
    options = parser.parse_args(argv)
    options.real = options.shapes == "real"
    options.sizes = options.sizes or ([] if options.real else list(SIZES))
    options.rounds = max(options.rounds, 1)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if a case was timed."""
    start = time.monotonic()
    options = parse(argv)
    try:
        import torch
    except ImportError:
        print("The benchmark needs torch.", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("There is no GPU here: times would say nothing.", file=sys.stderr)
        return 1
    outcomes: list[Outcome] = []
    try:
        missed = run(options, outcomes, start)
        if missed:
            print(f"{missed} cases were not reached.")
    finally:
        if outcomes:
            finish(options, outcomes)
    return 0 if outcomes else 1


if __name__ == "__main__":
    raise SystemExit(main())
