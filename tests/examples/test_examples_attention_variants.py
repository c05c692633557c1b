"""Attention over ragged batches, its gradients, and with scores and masks given as functions: right
by FlashAttention's rule, on both kinds of chip, and the same again."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

import tilejit
import tilejit.language as T
from tilejit.runtime.device import use_executor

EXAMPLES = Path(__file__).parents[2] / "examples"
GUARD = 3  # rows before and after the sequences, which are none of theirs
OPTIONS = ({}, {"is_causal": True}, {"is_causal": True, "window": 40})
NAMES = ("plain causal alibi relative prefix documents beginnings dilated sinks gates all").split()
LENGTHS = (
    [(70, 130), (0, 40), (1, 90), (150, 0), (129, 60)],
    [(0, 0), (1, 1), (64, 128), (0, 0), (200, 31), (5, 257), (0, 3)],
)


@pytest.fixture
def load(monkeypatch):
    def module(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(EXAMPLES))  # they use their neighbours
        return importlib.import_module(name)

    return module


def test_ragged_is_right_on_every_executor(load, executor, capsys):
    load("attention_ragged").check()
    assert capsys.readouterr().out.startswith("attention over 5 ragged sequences: right, full")


def test_ragged_gradients_are_right_on_every_executor(load, executor, capsys):
    load("attention_ragged_backward").check()
    assert capsys.readouterr().out.startswith("gradients of 5 ragged sequences: right, full")


def test_variants_are_right_on_every_executor(load, executor, capsys):
    load("attention_variants").check()
    assert capsys.readouterr().out.startswith("attention over 150: right, plain, causal, alibi")


def ragged(lengths, D, heads, kind, left_out=()):
    """Random operands with NaN in all rows that belong to no sequence, or to one that is left out:
    q, k, v, g, and where the sequences begin."""
    rng = np.random.default_rng(1)
    starts = [np.cumsum([GUARD, *column]).astype(np.int32) for column in zip(*lengths, strict=True)]
    rows = [int(s[-1]) + GUARD for s in starts]
    q, g = (rng.standard_normal((rows[0], heads[0], D)).astype(kind) for _ in "qg")
    k, v = (rng.standard_normal((rows[1], heads[1], D)).astype(kind) for _ in "kv")
    for arrays, begin in (((q, g), starts[0]), ((k, v), starts[1])):
        for x in arrays:
            x[: begin[0]] = x[begin[-1] :] = np.nan
            for z in left_out:
                x[begin[z] : begin[z + 1]] = np.nan
    return q, k, v, g, *starts


def assert_near(result, wanted, rough, name):
    """Where anything is wanted, at most twice the error of the same maths in 16 bits; elsewhere as
    it was, NaN."""
    error = np.abs(result.astype(np.float64) - wanted)
    assert (np.isnan(result.astype(np.float64)) == np.isnan(wanted)).all(), f"{name}: other rows"
    allowed = 2 * np.nanmax(np.abs(rough - wanted), initial=0) + 1e-5
    assert np.nanmax(error, initial=0) <= allowed, f"{name} is wrong by {np.nanmax(error)}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=["some", "others"])
@pytest.mark.parametrize(
    ("D", "heads", "dtype", "tile"),
    [(64, (2, 1), "bfloat16", {}), (128, (2, 2), "float16", {"BM": 64, "BN": 32, "threads": 128})],
)
def test_ragged_sequences_know_nothing_of_each_other(
    load, lengths, D, heads, dtype, tile, options, target
):
    """Between them, and around them all, rows hold NaN; results there stay as they were."""
    example, kind = load("attention_ragged"), np.dtype(dtype)
    q, k, v, _, starts_q, starts_k = ragged(lengths, D, heads, kind)
    wanted, wanted_lse = example.exact(q, k, v, starts_q, starts_k, **options)
    rough, _ = example.exact(q, k, v, starts_q, starts_k, **options, weight_dtype=kind)
    fewest, runs = int(np.diff(starts_q).max()), []
    for longest in (fewest, fewest + 100):
        o, lse = np.full_like(q, np.nan), np.full(q.shape[1::-1], np.nan, np.float32)
        with use_executor("simulator"), tilejit.options(target=target):
            example.attention_ragged(
                q, k, v, o, lse, starts_q, starts_k, longest, **options, **tile
            )
        runs.append((o, lse))
    (o, lse), again = runs
    assert_near(o, wanted, rough.astype(kind).astype(np.float64), "O")
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    assert all(a.tobytes() == b.tobytes() for a, b in zip((o, lse), again, strict=True))


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_ragged_sequence_that_is_not_computed_may_hold_anything(load, target):
    example, kind = load("attention_ragged"), ml_dtypes.bfloat16
    lengths = [(40, 100), (70, 90), (60, 129)]
    q, k, v, _, starts_q, starts_k = ragged(lengths, 64, (1, 1), kind, left_out=(0, 2))
    mine = starts_q[1:3], starts_k[1:3]  # the second sequence alone, between those
    wanted, _ = example.exact(q, k, v, *mine)
    rough, _ = example.exact(q, k, v, *mine, weight_dtype=kind)
    o, lse = np.full_like(q, np.nan), np.full(q.shape[1::-1], np.nan, np.float32)
    with use_executor("simulator"), tilejit.options(target=target):
        example.attention_ragged(q, k, v, o, lse, *mine, 70)
    assert_near(o, wanted, rough.astype(kind).astype(np.float64), "O")
    assert np.isfinite(lse[:, mine[0][0] : mine[0][1]]).all()
    assert np.isnan(np.delete(lse, slice(*mine[0]), axis=1)).all()


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("D", "heads", "dtype", "lengths"),
    [(64, (2, 1), "bfloat16", LENGTHS[1]), (128, (1, 1), "float16", LENGTHS[0])],
)
def test_ragged_gradients_know_nothing_of_other_sequences(
    load, D, heads, dtype, lengths, options, is_deterministic, target
):
    example, kind = load("attention_ragged_backward"), np.dtype(dtype)
    arrays = ragged(lengths, D, heads, kind)
    wanted = example.exact(*arrays, **options)
    rough = example.exact(*arrays, **options, kind=kind)
    with use_executor("simulator"), tilejit.options(target=target):
        results = example.run(*arrays, is_deterministic, **options)
    for name, result, right, near in zip("qkv", results, wanted, rough, strict=True):
        assert_near(result, right, near, f"d{name}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_deterministic_gradients_of_ragged_batches_spill_nothing(load, D, heads, options):
    q, k = T.Tensor((4096, 16, D), "bfloat16"), T.Tensor((4096, heads, D), "bfloat16")
    lse, starts = T.Tensor((16, 4096), "float32"), T.Tensor((5,), "int32")
    backward = load("attention_ragged_backward").attention_ragged_backward.compile(
        q, k, k, q, lse, q, q, k, k, starts, starts, target="sm_90a", deterministic=True, **options
    )
    for kernel in backward.kernels:
        assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)
        assert "C75" not in kernel.compiled.log


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_ragged_batches_have_all_that_other_batches_have_on_hopper(load, D, options):
    total, keys, n = T.dynamic("total"), T.dynamic("keys"), T.dynamic("n")
    q, k = T.Tensor((total, 16, D), "bfloat16"), T.Tensor((keys, 4, D), "bfloat16")
    lse, starts = T.Tensor((16, total), "float32"), T.Tensor((n,), "int32")
    forward = load("attention_ragged").attention_ragged.compile(
        q, k, k, q, lse, starts, starts, target="sm_90a", **options
    )
    backward = load("attention_ragged_backward").attention_ragged_backward.compile(
        q, k, k, q, lse, q, q, k, k, starts, starts, target="sm_90a", **options
    )
    kernels = [*forward.kernels, *backward.kernels]
    for kernel in kernels:
        assert kernel.resources.spill_bytes == 0
        assert "div.u64" not in kernel.ptx and "div.s64" not in kernel.ptx
        assert "C75" not in kernel.compiled.log
    main, gradients = kernels[0], kernels[2]
    for text in (main.explain(), gradients.explain()):
        assert "each block takes the next one when it is free" in text
        assert "stored by the threads" not in text and "added by the threads" not in text
        assert text.count("a producer warp fills") >= 3
    assert "out -> results: by TMA" in main.explain()
    assert "dq -> Sum: added by TMA" in gradients.explain()
    # rounds overlap: the first multiply stands before the loop too, the second behind it
    # (not where three warpgroups' registers are too few for that, as in `attention.py`)
    products = D // 16 + 128 // 16
    is_full = D <= 64 and not options
    assert main.ptx.count("wgmma.mma_async") == products * (1 if is_full else 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("S", "D", "heads", "dtype", "target"),
    [(200, 64, (4, 2), "bfloat16", "sm_90a"), (130, 128, (2, 2), "float16", "sm_80")],
)
def test_variant_is_right_for_other_shapes(load, name, S, D, heads, dtype, target):
    example, kind, rng = load("attention_variants"), np.dtype(dtype), np.random.default_rng(1)
    q = rng.standard_normal((2, heads[0], S, D)).astype(kind)
    k, v = (rng.standard_normal((2, heads[1], S, D)).astype(kind) for _ in "kv")
    tensors, options = example.variants(2, heads[0], S)[name]
    known = {key: x for key, x in options.items() if key != "span"}
    wanted, wanted_lse = example.exact(q, k, v, *tensors, **known)
    rough, _ = example.exact(q, k, v, *tensors, **known, kind=kind)
    runs = []
    for _ in range(2):
        o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
        with use_executor("simulator"), tilejit.options(target=target):
            example.attention(q, k, v, o, lse, *tensors, **options)
        runs.append((o, lse))
    assert_near(o, wanted, rough.astype(kind).astype(np.float64), name)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [64, 128])
def test_variants_are_multiplied_by_warpgroups_and_spill_nothing(load, name, D):
    example = load("attention_variants")
    tensors, options = example.variants(4, 16, 2048)[name]
    wide, flat = T.Tensor((4, 16, 2048, D), "bfloat16"), T.Tensor((4, 16, 2048), "float32")
    (kernel,) = example.attention.compile(
        wide, wide, wide, wide, flat, *tensors, target="sm_90a", **options
    ).kernels
    text = kernel.explain()
    assert text.count(": wgmma") == 2 and text.count("a producer warp fills") == 3
    assert "out -> O: by TMA" in text
    assert kernel.resources.spill_bytes == 0 and "C75" not in kernel.compiled.log


def test_functions_count_by_what_they_compute_and_capture(load):
    """Another function of the same name, or with another number in it, is another kernel."""
    example, rng = load("attention_variants"), np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 1, 64, 64)).astype(np.float16) for _ in "qkv")

    def penalty(step):
        return lambda value, b, h, i, j: value - step * (i - j)

    for step in (0.5, 0.25):
        o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
        with use_executor("reference"):
            example.attention(q, k, v, o, lse, score=penalty(step), BM=64, threads=128)
        wanted, _ = example.exact(q, k, v, score=penalty(step))
        np.testing.assert_allclose(o.astype(np.float64), wanted, atol=5e-3)
