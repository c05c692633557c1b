"""Gradients of attention: right by FlashAttention's rule, on both kinds of chip, and the same again
where that is promised; and torch's operators of it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by name
import numpy as np
import pytest

import tilejit
import tilejit.language as T
from tilejit.runtime.device import use_executor

EXAMPLES = Path(__file__).parents[2] / "examples"
CASES: tuple[tuple[int, int, int, tuple[int, int], str, dict[str, Any]], ...] = (
    (70, 40, 64, (2, 2), "bfloat16", {"is_causal": True}),
    (1, 130, 128, (2, 1), "float16", {}),
    (96, 160, 96, (4, 2), "bfloat16", {"is_causal": True, "window": 40, "softcap": 30.0}),
    (130, 200, 128, (3, 1), "bfloat16", {"window": 17}),
    (150, 140, 64, (2, 1), "float16", {"softcap": 2.0}),
)


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # it uses its neighbour
    return importlib.import_module("attention_backward")


def inputs(S, SK, D, heads, dtype):
    rng, kind = np.random.default_rng(1), np.dtype(dtype)
    q, g = (rng.standard_normal((2, heads[0], S, D)).astype(kind) for _ in range(2))
    k, v = (rng.standard_normal((2, heads[1], SK, D)).astype(kind) for _ in range(2))
    return q, k, v, g


def assert_right(example, results, arrays, options):
    """At most twice the error of the same maths with weights, their gradients and results
    rounded."""
    wanted = example.exact(*arrays, **options)
    rough = example.exact(*arrays, **options, kind=arrays[0].dtype)
    for name, result, right, near in zip("qkv", results, wanted, rough, strict=True):
        error = np.abs(result.astype(np.float64) - right).max()
        assert error <= 2 * np.abs(near - right).max() + 1e-6, f"d{name} is wrong by {error}"


def test_gradients_are_right_on_every_executor(example, executor, capsys):
    example.check()
    assert capsys.readouterr().out.startswith("gradients over 100 x 140: right, full, causal")


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("S", "SK", "D", "heads", "dtype", "options"), CASES)
def test_gradients_are_right_for_other_shapes(
    example, S, SK, D, heads, dtype, is_deterministic, options, target
):
    """Also of rows that see no key, and of keys that no row sees, which are zero."""
    arrays = inputs(S, SK, D, heads, dtype)
    with use_executor("simulator"), tilejit.options(target=target):
        count = 3 if is_deterministic else 1
        runs = [example.run(*arrays, is_deterministic, **options) for _ in range(count)]
    for results in runs:
        assert_right(example, results, arrays, options)
    for first, *others in zip(*runs, strict=True):
        assert all(first.tobytes() == other.tobytes() for other in others)


@pytest.mark.parametrize("tile", [{"BM": 64, "BN": 64, "threads": 128}, {"BM": 64}])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_gradients_are_right_for_other_tiles(example, tile, is_deterministic):
    arrays = q, k, v, g = inputs(140, 150, 64, (2, 1), "float16")
    o, lse = example.forward.exact(q, k, v, is_causal=True)
    results = [np.full_like(x, np.nan) for x in (q, k, v)]
    with use_executor("simulator"), tilejit.options(target="sm_90a"):
        example.attention_backward(
            q, k, v, o.astype(q.dtype), lse.astype(np.float32), g, *results,
            is_causal=True, deterministic=is_deterministic, **tile,
        )  # fmt: skip
    assert_right(example, results, arrays, {"is_causal": True})


def test_gradients_of_wide_heads_are_right(example):
    arrays = inputs(70, 90, 256, (1, 1), "bfloat16")
    with use_executor("simulator"), tilejit.options(target="sm_90a"):
        for is_deterministic in (False, True):
            results = example.run(*arrays, is_deterministic, is_causal=True)
            assert_right(example, results, arrays, {"is_causal": True})


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "window": 1000, "softcap": 30.0}],
    ids=str,
)
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_warpgroups_multiply_everything_on_hopper(example, D, is_deterministic, options):
    wide, flat = T.Tensor((1, 16, 4096, D), "bfloat16"), T.Tensor((1, 16, 4096), "float32")
    program = example.attention_backward.compile(
        *(wide,) * 4, flat, *(wide,) * 4, target="sm_90a", deterministic=is_deterministic, **options
    )
    _, *kernels = program.kernels
    text = "\n".join(k.explain() for k in kernels)
    assert text.count(": wgmma") == (7 if is_deterministic else 5) and "mma.m16n8k16" not in text
    assert is_deterministic or "dq -> Sum: added by TMA" in text
    for kernel in kernels:
        resources = kernel.resources
        assert (resources.spill_bytes, resources.stack_bytes) == (0, 0), resources
        assert "C75" not in kernel.compiled.log, kernel.compiled.log
    atomics = sum(k.ptx.count("cp.reduce.async") + k.ptx.count("red.global") for k in kernels)
    assert (atomics == 0) is is_deterministic


def test_torch_operators_have_gradients(example, capsys):
    torch = pytest.importorskip("torch")
    operators = importlib.import_module("attention_torch")
    operators.check()
    assert capsys.readouterr().out.startswith("attention over 150: its gradients are those of")
    shape = (1, 2, 40, 64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (
        torch.randn(shape, dtype=torch.float16, device=device, requires_grad=True) for _ in "qkv"
    )
    torch.library.opcheck(operators.operators().forward, (q, k, v, True, None, None, False))


def test_torch_example_does_not_import_torch_by_itself(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("unused", EXAMPLES / "attention_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError):
        module.attention(None, None, None)
