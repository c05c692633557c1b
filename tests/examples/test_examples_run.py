"""Every example runs, gives right answers and says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SIZES = ((130, 70, 40), (33, 129, 65))


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_is_right_on_every_executor(executor, capsys):
    load("quickstart").main(SIZES)
    where = {"reference": "reference executor", "simulator": "simulator", "gpu": "(sm_"}[executor]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SIZES)
    for (M, N, K), line in zip(SIZES, lines, strict=True):
        assert line.startswith(f"{M}x{N}x{K} float16 is right: ")
        assert where in line


def test_elementwise_is_right_on_every_executor(executor, capsys):
    load("elementwise").main()
    assert capsys.readouterr().out == "gelu_add, causal_mask and transpose are right\n"


def test_strided_is_right_on_every_executor(executor, capsys):
    load("strided").main()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_pointer_table_is_right_on_every_executor(executor, capsys, monkeypatch):
    example = load("pointer_table")
    monkeypatch.setattr(example, "has_gpu", lambda: executor == "gpu")  # its arrays go there
    example.main()
    assert capsys.readouterr().out.startswith("4 groups of [5, 300, 128, 1] floats gathered")


def test_matmul_is_right_on_every_executor(executor, capsys):
    load("matmul").check()
    assert capsys.readouterr().out == "matmul 150x170x90: right\n"


def test_manual_matmul_is_right_where_it_chooses_to_run(capsys):
    load("manual_matmul").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(" bfloat16 by hand is right, on " in line for line in lines)


def test_first_command_of_the_readme_runs_as_a_script():
    lines = run_script("examples/quickstart.py").splitlines()
    assert [line.split()[0] for line in lines] == ["512x512x512", "503x763x1017"]
    assert all(" float16 is right: " in line for line in lines)


def test_simulator_variable_runs_the_generated_kernel():
    code = (
        f"import sys; sys.path.insert(0, 'examples'); import quickstart; quickstart.main({SIZES})"
    )
    for line in run_script("-c", code, NUMBA_ENABLE_CUDASIM="1").splitlines():
        assert " float16 is right: " in line
        assert "on Numba's CUDA simulator (sm_" in line


def test_compile_time_prints_every_stage(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # it measures the kernels of its neighbours
    example = load("compile_time")
    monkeypatch.setattr(example, "ROUNDS", 1)
    example.report("sm_80")
    out = capsys.readouterr().out
    for label in ("trace", "passes", "lower", "Numba front end", "libNVVM", "nvJitLink", "total"):
        assert f"\n{label} " in out
    assert "import tilejit, after numpy: " in out


def test_call_time_without_a_gpu_says_that_it_needs_one():
    done = subprocess.run(
        [sys.executable, "examples/call_time.py"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "There is no GPU here: a call would run in NumPy, and its time says nothing.\n"
    )


@pytest.mark.gpu
def test_call_time_prints_a_line_for_each_kind_of_argument():
    lines = run_script("examples/call_time.py").splitlines()
    assert lines[0].startswith("host microseconds of a warm call on ")
    kinds = [line[:26].strip() for line in lines[2:]]
    assert sorted(kinds) == ["CuPy", "Numba device array", "__cuda_array_interface__", "torch"]
