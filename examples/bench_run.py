"""Times an example beside its peers: every candidate checked, swept, and then timed in turns.

Knows torch, imported only where it is used. Does not know what is computed: a `Bench` says it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench_clock import Limit, choose_clock, measure, reason
from bench_report import Measured, Outcome, heading, row, save, summary

Candidates = Callable[[Any, bool], Iterator[tuple[str, Callable[[], Callable[[], Any]]]]]
"""Of operands, and whether to be quick: configurations' names, and functions that compile and give
the call. A call returns its result."""

SWEEP_ROUNDS = 5
SWEEP_SHARE = 0.7
"""Of the time for one case, when time is limited: compiling takes most of it."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is timed.

    name: of the example; its peers are the modules `peers/<name>_<peer>.py`.
    title: heads the cases; base: the peer to whose times ratios are taken.
    own: tilejit's candidates by their columns; told: those whose configuration every line tells.
    make_operands: of a case, an object with `poison()`, which spoils results, and
        `excess(result)`, a result's largest error as a multiple of what is allowed, or NaN.
    """

    name: str
    title: str
    base: str
    own: dict[str, Candidates]
    make_operands: Callable[[Any], Any]
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """Somebody's candidates.

    to_torch: of one with arrays, and so streams, of its own: makes its result a torch tensor.
    """

    candidates: Candidates
    to_torch: Callable[[Any], Any] | None = None


def load_peers(bench: Bench, names: Sequence[str]) -> tuple[dict[str, Peer], list[str]]:
    """tilejit and the peers that import, and a line for each that does not."""
    # before JAX is imported, by whomever: else it takes three quarters of the memory at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = {column: Peer(candidates) for column, candidates in bench.own.items()}
    notes = []
    for name in names:
        try:
            module = importlib.import_module(f"peers.{bench.name}_{name}")
            found[name] = Peer(module.candidates, getattr(module, "to_torch", None))
        except Exception as error:
            notes.append(f"{name} is left out: {reason(error)}")
    return found, notes


def prepare(
    operands: Any, who: str, peer: Peer, quick: bool, limit: Limit, outcome: Outcome
) -> dict[tuple[str, str], Callable[[], Any]]:
    """The calls of one candidate's configurations that compile and are right, by their names."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    trouble = ""  # the first, which tells most
    try:
        for config, build in peer.candidates(operands, quick):
            if calls and limit.is_over:
                break
            try:
                call = build()
                excess = check(operands, peer, call)
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


def check(operands: Any, peer: Peer, call: Callable[[], Any]) -> float:
    """The result's largest error, as a multiple of the bound; not a number where one is left."""
    import torch

    operands.poison()
    torch.cuda.synchronize()
    result = call()
    torch.cuda.synchronize()
    return float(operands.excess(peer.to_torch(result) if peer.to_torch else result))


def run_case(
    bench: Bench,
    case: Any,
    peers: dict[str, Peer],
    clock: Any,
    limit: Limit,
    options: argparse.Namespace,
) -> Outcome:
    """Sweep each candidate's configurations, then time the best of each in turns."""
    outcome, operands = Outcome(case, bench.base), bench.make_operands(case)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for index, (who, peer) in enumerate(peers.items()):
        part = limit.part(SWEEP_SHARE / (len(peers) - index))
        calls |= prepare(operands, who, peer, options.quick, part, outcome)
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


def run(
    bench: Bench,
    todo: Sequence[Any],
    options: argparse.Namespace,
    outcomes: list[Outcome],
    start: float,
) -> int:
    """Time all cases, one line each as it ends; says how many were not reached.

    outcomes: filled on the way, so that what was measured is there whatever happens.
    start: what `time.monotonic` said when the time that is limited began.
    """
    limit = Limit(options.seconds - (time.monotonic() - start) if options.seconds else None)
    peers, notes = load_peers(bench, options.peers)
    strange = [name for name, peer in peers.items() if peer.to_torch]
    clock, trouble = choose_clock(options.timer, has_other_streams=bool(strange))
    notes += [trouble] if trouble else []
    if not clock.sees_all_streams:
        for name in strange:
            del peers[name]
            notes.append(f"{name} is left out: CUDA events do not see its streams")
    print(*notes, f"Timer: {clock.name}.", sep="\n", flush=True)
    print(heading(bench.title, list(peers)), flush=True)
    detailed = list(peers) if options.details else bench.told
    for index, case in enumerate(todo):
        if limit.is_over:
            return len(todo) - index
        try:
            part = limit.part(1 / (len(todo) - index))
            outcomes.append(run_case(bench, case, peers, clock, part, options))
            print(row(outcomes[-1], list(peers), detailed=detailed), flush=True)
            if options.json:
                save(options.json, outcomes, {**versions(), "timer": clock.name})
        except Exception as error:
            print(f"{case}: {reason(error)}", flush=True)
        if lost := free_memory():  # no call on this device can succeed any more
            print(f"The device is lost: {lost}", flush=True)
            return len(todo) - index - 1
    return 0


def versions() -> dict[str, str]:
    """What a file of times should say of the machine."""
    import torch

    return {"device": torch.cuda.get_device_name(0), "torch": torch.__version__}


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


def main(
    bench: Bench,
    todo: Sequence[Any],
    options: argparse.Namespace,
    start: float,
    draw: Callable[[Sequence[Outcome]], None] | None = None,
) -> int:
    """Run the benchmark and print the means; 0 if a case was timed.

    draw: is given what was measured, at the end.
    """
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
        missed = run(bench, todo, options, outcomes, start)
        if missed:
            print(f"{missed} cases were not reached.")
    finally:
        if outcomes:
            columns = [*bench.own, *options.peers]
            print(summary(outcomes, [n for n in columns if any(n in o.found for o in outcomes)]))
            if draw:
                draw(outcomes)
    return 0 if outcomes else 1
