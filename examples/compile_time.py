"""How long the quickstart matmul takes to compile, by stage: python examples/compile_time.py

Needs no GPU. Fresh processes measure what a first compile costs; nothing is read from a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import elementwise
import quickstart

import tilejit.language as T
from tilejit import tilejit

STAGES = {
    "trace": "trace",
    "passes": "passes",
    "lower": "lower",
    "import": "import of Numba",
    "front_end": "Numba front end",
    "nvvm": "libNVVM",
    "link": "nvJitLink",
    "total": "total",
}
LIMITS = {"first": 1.3, "after another kernel": 0.6, "again": 0.6}  # seconds, on two cores
IMPORT_LIMIT = 0.1
IMPORTS = (
    "import tilejit",
    "import tilejit.language as T; from tilejit import tilejit",
)
ROUNDS = 5


def compile_once(target: str) -> dict[str, float]:
    """Seconds by stage for a matmul that nothing has compiled before."""
    matmul = tilejit(quickstart.matmul.__wrapped__)
    half = T.Tensor((512, 512), "float16")
    start = time.perf_counter()
    kernel = matmul.compile(half, half, T.Tensor((512, 512), "float32"), target=target)
    assert kernel.cubin
    total = time.perf_counter() - start
    seconds = kernel.kernels[0].stage_seconds
    return {"trace": total - sum(seconds.values()), **seconds, "total": total}


def compile_another(target: str) -> None:
    table = T.Tensor((203, 517), "float32")
    assert elementwise.gelu_add.compile(table, table, table, target=target).cubin


def median(samples: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(s[stage] for s in samples) for stage in samples[0]}


def measure(situation: str, target: str) -> dict[str, float]:
    """In this process, which has compiled nothing yet."""
    if situation == "first":
        return compile_once(target)
    compile_another(target)
    first = compile_once(target)
    if situation == "after another kernel":
        return first
    return median([compile_once(target) for _ in range(ROUNDS)])


def in_fresh_process(situation: str, target: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", situation, "--target", target]
    samples = []
    for _ in range(1 if situation == "again" else ROUNDS):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        samples.append(json.loads(done.stdout))
    return median(samples)


def import_seconds(statement: str) -> float:
    """What an import costs after `import numpy`, in a fresh process, once Python has cached the
    bytecode."""
    code = (
        "import numpy, time; start = time.perf_counter()\n"
        f"{statement}\n"
        "print(time.perf_counter() - start)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    samples = []
    for _ in range(1 + ROUNDS):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        samples.append(float(done.stdout))
    return statistics.median(samples[1:])


def report(target: str) -> None:
    columns = {situation: in_fresh_process(situation, target) for situation in LIMITS}
    print(f"quickstart matmul for {target}, seconds, medians of {ROUNDS}")
    print(f"{'stage':18}" + "".join(f"{name:>22}" for name in columns))
    for stage, label in STAGES.items():
        cells = "".join(f"{column[stage]:22.3f}" for column in columns.values())
        print(f"{label:18}{cells}")
    print(f"{'limit':18}" + "".join(f"{limit:22.3f}" for limit in LIMITS.values()))
    for statement in IMPORTS:
        seconds = import_seconds(statement)
        print(f"{statement}, after numpy: {seconds:.3f} s, limit {IMPORT_LIMIT:.3f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_80")
    parser.add_argument("--measure", choices=LIMITS, help="print one measurement as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.target)))
    else:
        report(arguments.target)
