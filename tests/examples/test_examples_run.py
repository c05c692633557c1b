"""Every example runs, gives right answers and says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by name
import numpy as np
import pytest

import tilejit
from tilejit.runtime.device import use_executor

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


def test_attention_is_right_on_every_executor(executor, capsys):
    load("attention").check()
    assert capsys.readouterr().out.startswith("attention over 150 x 170: right, full, causal")


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "window": 40, "softcap": 30.0}],
    ids=str,
)
@pytest.mark.parametrize(
    "S, SK, D, heads, dtype",
    [(70, 40, 64, (2, 2), "bfloat16"), (1, 130, 128, (2, 1), "float16"),
     (96, 160, 96, (4, 2), "bfloat16"), (130, 64, 32, (3, 1), "float16")],
)  # fmt: skip
def test_attention_is_right_for_other_shapes(S, SK, D, heads, dtype, options, target):
    """Also rows that see no key, which are zero. At most twice the error of the same maths with
    weights and results rounded, which is FlashAttention's rule."""
    example, rng = load("attention"), np.random.default_rng(1)
    kind = np.dtype(dtype)
    q = rng.standard_normal((2, heads[0], S, D)).astype(kind)
    k, v = (rng.standard_normal((2, heads[1], SK, D)).astype(kind) for _ in range(2))
    exact, exact_lse = example.exact(q, k, v, **options)
    coarse, _ = example.exact(q, k, v, **options, weight_dtype=kind)
    coarse_error = np.abs(coarse.astype(kind).astype(np.float64) - exact).max()
    for tile in ({"BM": 64, "BN": 32, "threads": 128}, {"BM": 128, "BN": 64}):
        runs = []
        for _ in range(2):
            o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
            with use_executor("simulator"), tilejit.options(target=target):
                example.attention(q, k, v, o, lse, **options, **tile)
            runs.append((o, lse))
        error = np.abs(o.astype(np.float64) - exact).max()
        assert error <= 2 * coarse_error + 1e-5
        seen = np.isfinite(exact_lse)
        assert (np.isneginf(lse) == ~seen).all() and (o[~seen] == 0).all()
        assert np.abs(lse[seen] - exact_lse[seen]).max(initial=0) < 1e-5
        assert all(a.tobytes() == b.tobytes() for a, b in zip(*runs, strict=True))


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
