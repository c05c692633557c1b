"""What the benchmarks share, without a GPU: clocks, options, what is left out, what is printed."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_clock
import bench_options
import bench_report
import bench_run
import numpy as np
import pytest
from bench_clock import Limit

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_times_are_summed_between_markers():
    mark = f"at::{bench_clock.MARKER}(long)"
    records = [
        (60.0, mark, 1.0), (5.0, "flush", 9.0), (20.0, mark, 1.0), (30.0, "gemm", 4.0),
        (35.0, "reduce", 2.0), (40.0, mark, 1.0), (45.0, "flush", 9.0), (70.0, mark, 1.0),
    ]  # fmt: skip
    assert bench_clock.between_markers(records) == pytest.approx([0.006, 0.0])


class Counter:
    """A clock for which every call takes a millisecond."""

    def __init__(self) -> None:
        self.turns: list[list[str]] = []

    def round(self, calls):
        self.turns.append([call() for call in calls])
        return [1.0] * len(calls)


def test_measured_calls_take_turns_to_be_first():
    clock = Counter()
    calls = {"a": lambda: "a", "b": lambda: "b"}
    times = bench_clock.measure(clock, calls, 3, bench_clock.Limit())
    assert clock.turns == [["a", "b"], ["b", "a"], ["a", "b"]]
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_limit_that_is_over_stops_after_the_fewest_rounds():
    clock = Counter()
    bench_clock.measure(clock, {"a": lambda: "a"}, 50, bench_clock.Limit(0.0))
    assert len(clock.turns) == bench_clock.FEWEST_ROUNDS
    assert bench_clock.measure(clock, {}, 5, bench_clock.Limit()) == {}


def test_part_of_a_limit_ends_before_it():
    whole = bench_clock.Limit(100.0)
    assert 20 < whole.part(0.25).left_s <= 25
    assert math.isinf(bench_clock.Limit().part(0.25).left_s)


def test_geometric_mean_of_a_factor_and_its_inverse_is_one():
    assert bench_report.geometric_mean([4.0, 0.25]) == pytest.approx(1.0)


def test_reason_is_one_line():
    assert bench_clock.reason(ValueError("first\nsecond")) == "ValueError: first"
    assert bench_clock.reason(KeyError()) == "KeyError"


@dataclass(frozen=True)
class Sum:
    """A case: so many numbers to be added."""

    n: int

    flops, bytes, group = 10**9, 8, "sums"

    def __str__(self) -> str:
        return f"{self.n} numbers"


class Numbers:
    """Its operands, and the rule that a sum may be wrong by a half."""

    def __init__(self, case: Sum) -> None:
        self.case, self.out = case, np.zeros(1)

    def poison(self) -> None:
        self.out[:] = np.nan

    def excess(self, result: Any) -> float:
        return float(abs(result[0] - self.case.n) / 0.5)


def adder(configs: dict[str, Any]) -> bench_run.Candidates:
    """Candidates that store the number given, or raise the error given when they are built."""

    def candidates(operands, quick):
        for name, value in configs.items():

            def build(value=value) -> Callable[[], Any]:
                if isinstance(value, Exception):
                    raise value

                def call():
                    if value is not None:
                        operands.out[:] = value
                    return operands.out

                return call

            yield name, build

    return candidates


@pytest.fixture
def torch(monkeypatch):
    """As much of torch as the runner asks for."""
    nothing = lambda *_: None
    cuda = types.SimpleNamespace(
        synchronize=nothing, empty_cache=nothing, is_available=lambda: True,
        get_device_name=lambda _: "a chip",
    )  # fmt: skip
    module = types.ModuleType("torch")
    module.cuda, module.__version__ = cuda, "0"
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def bench(**own: bench_run.Candidates) -> bench_run.Bench:
    return bench_run.Bench(
        name="sum", title="n", base="rival", own=own, make_operands=Numbers, told=("mine",)
    )


def options(**given: Any) -> argparse.Namespace:
    known = {"peers": [], "rounds": 3, "seconds": None, "quick": False, "timer": None}
    return argparse.Namespace(**(known | {"details": False, "json": None} | given))


class Clock:
    """Takes as many milliseconds for a call as it has been told to."""

    name, sees_all_streams = "a clock", False

    def __init__(self, ms: list[float]) -> None:
        self.ms, self.rounds = ms, []

    def round(self, calls):
        self.rounds.append(len(calls))
        return [self.ms[len(self.rounds) % len(self.ms)]] * len(calls)


def prepare(peer: bench_run.Peer) -> tuple[list[str], list[str]]:
    outcome = bench_report.Outcome(Sum(5), "rival")
    calls = bench_run.prepare(Numbers(Sum(5)), "mine", peer, False, Limit(), outcome)
    return [config for _, config in calls], outcome.notes


def test_configurations_that_fail_or_are_wrong_are_not_timed(torch):
    configs = {"bad": ValueError("no\nroom"), "wrong": 7, "nan": None, "right": 5.1}
    found, notes = prepare(bench_run.Peer(adder(configs)))
    assert found == ["right"]
    assert notes == [
        "mine: wrong is wrong: its error is 4 times the bound",
        "mine: nan is wrong: its error is nan times the bound",
    ]


def test_candidate_without_a_right_configuration_is_left_out_with_the_first_reason(torch):
    configs = {"bad": ValueError("no\nroom"), "worse": OSError("later")}
    assert prepare(bench_run.Peer(adder(configs))) == (
        [], ["mine is left out: ValueError: no"],
    )  # fmt: skip
    assert prepare(bench_run.Peer(adder({})))[1] == ["mine is left out: no configuration fits"]


def test_result_of_a_peer_with_arrays_of_its_own_is_converted_before_it_is_checked(torch):
    peer = bench_run.Peer(adder({"negative": -5}), to_torch=lambda result: -result)
    assert prepare(peer) == (["negative"], [])


def test_best_of_the_sweep_is_timed_in_turns_with_the_best_of_the_others(torch):
    class Sums(Clock):
        """Takes as many milliseconds as a call's result says."""

        def round(self, calls):
            self.rounds.append(len(calls))
            return [float(call()[0]) for call in calls]

    clock = Sums([])
    peers = {
        "mine": bench_run.Peer(adder({"slow": 5.4, "fast": 5.0, "middle": 5.2})),
        "rival": bench_run.Peer(adder({"only": 5.5})),
    }
    case, sums = Sum(5), bench(mine=peers["mine"].candidates)
    outcome = bench_run.run_case(sums, case, peers, clock, Limit(), options(rounds=4))
    assert clock.rounds == [4] * bench_run.SWEEP_ROUNDS + [2] * 4
    assert (outcome.found["mine"].config, outcome.found["mine"].times) == ("fast", [5.0] * 4)
    assert outcome.ratio("mine") == pytest.approx(1.1)


def test_candidate_of_which_the_clock_sees_nothing_is_left_out(torch):
    mine = adder({"a": 5})
    peers = {"mine": bench_run.Peer(mine)}
    outcome = bench_run.run_case(bench(mine=mine), Sum(5), peers, Clock([0.0]), Limit(), options())
    assert outcome.found == {}
    assert outcome.notes == ["mine is left out: the clock saw none of its kernels"]


def test_run_prints_a_line_a_case_and_what_won_then_the_means(torch, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_run, "choose_clock", lambda *_, **__: (Clock([2.0]), "it is slow"))
    given = options(peers=["nobody"], json=str(tmp_path / "out.json"))
    both = bench(mine=adder({"five": 5}), rival=adder({"six": 5.2}))
    drawn = []
    assert bench_run.main(both, [Sum(5), Sum(6)], given, 0.0, drawn.append) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nobody is left out: ModuleNotFoundError: No module named 'peers.sum_nobody'"
    assert lines[1:3] == ["it is slow", "Timer: a clock."]
    assert lines[3].split() == ["n", "mine", "rival"]
    assert lines[5].split() == ["5", "numbers", "0.5", "1.000", "0.5", "1.000"]
    assert lines[6] == "    mine: five, 2.0000 ms"
    assert lines[7].split() == ["6", "numbers", "-", "-"]
    assert lines[8] == "    mine: five is wrong: its error is 2 times the bound"
    assert lines[-1].split() == ["sums", "1.000", "of", "1", "1.000", "of", "1"]
    assert [len(outcomes) for outcomes in drawn] == [2]
    told = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (told["device"], told["timer"]) == ("a chip", "a clock")
    assert [(r["who"], r["n"], r["ms"]) for r in told["records"]] == [
        ("mine", 5, 2.0), ("rival", 5, 2.0),
    ]  # fmt: skip
    assert list(told["notes"]) == ["6 numbers"]


def test_peer_with_streams_of_its_own_is_left_out_where_events_are_the_clock(
    torch, monkeypatch, capsys
):
    monkeypatch.setattr(bench_run, "choose_clock", lambda *_, **__: (Clock([2.0]), None))
    peer = types.ModuleType("peers.sum_rival")
    peer.candidates, peer.to_torch = adder({"c": 5}), lambda result: result
    monkeypatch.setitem(sys.modules, "peers.sum_rival", peer)
    bench_run.main(bench(mine=adder({"a": 5})), [Sum(5)], options(peers=["rival"]), 0.0)
    said = capsys.readouterr().out
    assert said.startswith("rival is left out: CUDA events do not see its streams\n")
    assert "rival" not in said.splitlines()[2]


def test_time_that_is_over_leaves_cases_out_and_says_how_many(torch, monkeypatch, capsys):
    monkeypatch.setattr(bench_run, "choose_clock", lambda *_, **__: (Clock([2.0]), None))
    given = options(seconds=1e-9)
    assert bench_run.main(bench(mine=adder({"a": 5})), [Sum(5), Sum(6)], given, 0.0) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 cases were not reached."


def test_device_that_no_longer_answers_ends_the_run(torch, monkeypatch, capsys):
    def lost() -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(bench_run, "choose_clock", lambda *_, **__: (Clock([2.0]), None))
    torch.cuda.empty_cache = lost
    bench_run.main(bench(mine=adder({"a": 5})), [Sum(5), Sum(5), Sum(5)], options(), 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert "The device is lost: RuntimeError: an illegal address" in lines
    assert "2 cases were not reached." in lines


def test_peers_that_need_what_is_not_installed_are_reported(monkeypatch):
    import attention_bench
    import matmul_bench

    for name in ("torch", "jax", "triton", "tilelang"):
        monkeypatch.setitem(sys.modules, name, None)
    for known in [name for name in sys.modules if name.startswith("peers.")]:
        monkeypatch.delitem(sys.modules, known)
    for module in (matmul_bench, attention_bench):
        found, notes = bench_run.load_peers(module.BENCH, module.PEERS)
        assert list(found) == list(module.BENCH.own)
        assert [note.split()[0] for note in notes] == list(module.PEERS)
        assert all("is left out: ModuleNotFoundError: " in note for note in notes)


def test_number_is_one_positive_integer():
    assert bench_options.number("16") == 16
    for text, message in (("1,2", "'1,2' is not one integer"), ("0", "integers here are positive")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{message}$"):
            bench_options.number(text)


@pytest.mark.parametrize("example", ["matmul", "attention"])
def test_benchmark_without_torch_says_what_it_needs(example):
    code = f"import sys; sys.modules['torch'] = None; import {example}_bench as b; exit(b.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, "The benchmark needs torch.\n")


def test_script_runs_the_check_or_the_benchmark_or_says_what_it_knows(monkeypatch):
    module = types.ModuleType("some_bench")
    module.main = lambda words: len(words)
    monkeypatch.setitem(sys.modules, "some_bench", module)
    ran = []

    def run(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["some.py", *words])
        bench_options.script("What it does.", lambda: ran.append("check"), "some_bench")

    run()
    assert ran == ["check"]
    with pytest.raises(SystemExit) as left:
        run("--bench", "--quick", "--details")
    assert left.value.code == 2
    with pytest.raises(SystemExit, match=r"^Unknown: --quick\nWhat it does\.$"):
        run("--quick")
    assert ran == ["check"]
