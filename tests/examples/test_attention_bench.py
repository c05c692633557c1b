"""The attention benchmark without a GPU: cases, FlashAttention's rule, tilejit's part in it."""

from __future__ import annotations

import inspect
import math
import sys
import types
from typing import Any

import attention as example
import attention_bench as bench
import attention_cases
import bench_report
import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by name
import numpy as np
import pytest
from attention_cases import Case

import tilejit.language as T
from tilejit.runtime.device import use_executor


def test_cases_share_the_tokens_among_sequences_and_the_width_among_heads():
    found = attention_cases.cases(
        [4096, 32768], [64, 96], ["full", "causal"], ["float16"], heads=None, tokens=16384
    )
    assert [str(case) for case in found] == [
        "4x32x4096x64 float16 full", "1x32x32768x64 float16 full",
        "4x32x4096x64 float16 causal", "1x32x32768x64 float16 causal",
        "4x21x4096x96 float16 full", "1x21x32768x96 float16 full",
        "4x21x4096x96 float16 causal", "1x21x32768x96 float16 causal",
    ]  # fmt: skip


def test_backward_cases_follow_the_forward_ones():
    found = attention_cases.cases(
        [512], [64], ["full"], ["float16"], heads=5, tokens=512, directions=("forward", "backward")
    )
    assert [str(case) for case in found] == [
        "1x5x512x64 float16 full",
        "1x5x512x64 float16 full bwd",
    ]
    assert [case.group for case in found] == ["float16 64 full", "float16 64 full backward"]


def test_operations_are_those_of_the_multiplies_that_a_mask_leaves():
    full = Case(2, 3, 5, 7, "float16", "full")
    assert full.flops == 2 * 3 * (2 * 2 * 5 * 5 * 7)
    assert Case(2, 3, 6, 7, "float16", "causal").flops == 2 * 3 * (2 * 2 * 6 * 6 * 7) // 2
    assert Case(2, 3, 6, 8, "float16", "full", "backward").flops == 2 * 3 * (5 * 2 * 6 * 6 * 8)


def test_least_bytes_are_operands_results_and_the_log_of_sums():
    assert Case(2, 3, 5, 7, "float16", "full").bytes == 2 * 3 * 5 * (4 * 7 * 2 + 4)
    assert Case(2, 3, 5, 7, "float16", "full", "backward").bytes == 2 * 3 * 5 * (8 * 7 * 2 + 4)


def attention(S: int, D: int, dtype: str, is_causal: bool) -> tuple[Any, ...]:
    """Operands, exact O and LSE, and O with weights and results rounded."""
    rng, kind = np.random.default_rng(0), np.dtype(dtype)
    q, k, v = (rng.standard_normal((1, 2, S, D)).astype(kind) for _ in range(3))
    exact, lse = example.exact(q, k, v, is_causal=is_causal)
    rounded, _ = example.exact(q, k, v, is_causal=is_causal, weight_dtype=kind)
    return q, k, v, exact, lse, rounded.astype(kind).astype(np.float64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rule_passes_the_rounded_maths_and_no_lost_keys(dtype, is_causal):
    q, k, v, exact, _, rounded = attention(1100, 64, dtype, is_causal)
    allowed = attention_cases.allowed_errors(np.abs(rounded - exact))
    assert len(allowed) == 18  # of 64 rows each; the last has 12
    assert attention_cases.excess(np.abs(rounded - exact), allowed) <= 0.5
    assert attention_cases.excess(np.abs(exact.astype(dtype) - exact), allowed) < 1
    k = k.copy()
    k[:, :, 512:576] = 0  # scores of nought: weights that are wrong, none too large
    lost, _ = example.exact(q, k, v, is_causal=is_causal)
    assert attention_cases.excess(np.abs(lost - exact), allowed) > 4


def test_rule_of_late_rows_is_not_that_of_the_first():
    *_, exact, _, rounded = attention(1100, 64, "bfloat16", True)
    errors = np.abs(rounded - exact)
    allowed = attention_cases.allowed_errors(errors)
    assert allowed[0] > 4 * allowed[-1]
    errors[0, 1, 1090, 5] = 2 * allowed[-1]
    assert errors.max() < allowed[0]
    assert attention_cases.excess(errors, allowed) == pytest.approx(2)


def test_element_that_is_no_number_is_found_wherever_it_is():
    errors = np.zeros((1, 2, 130, 8))
    allowed = attention_cases.allowed_errors(errors)
    assert attention_cases.excess(errors, allowed) == 0
    for row in (0, 64, 129):
        spoiled = errors.copy()
        spoiled[0, 1, row, 7] = np.nan
        assert math.isnan(attention_cases.excess(spoiled, allowed))


def host_operands(
    S: int, D: int, is_causal: bool
) -> tuple[types.SimpleNamespace, np.ndarray, np.ndarray]:
    """Operands of NumPy arrays, results spoiled, and exact O and LSE."""
    case = Case(1, 2, S, D, "bfloat16", "causal" if is_causal else "full")
    q, k, v, exact, lse, _ = attention(S, D, "bfloat16", is_causal)
    o, said = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
    given = types.SimpleNamespace(case=case, q=q, k=k, v=v, o=o, lse=said, results=(o, said))
    return given, exact, lse


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("candidates", [bench.swept, bench.default])
def test_tilejits_candidates_compute_attention(candidates, is_causal):
    operands, exact, exact_lse = host_operands(200, 64, is_causal)
    found = list(candidates(operands, True))
    assert len(found) == (1 + bench.QUICK if candidates is bench.swept else 1)
    for _, build in found:
        for result in operands.results:
            result[...] = np.nan
        with use_executor("reference"):
            o, lse = build()()
        assert np.abs(o.astype(np.float64) - exact).max() < 0.02
        assert np.abs(lse - exact_lse).max() < attention_cases.LSE_ERROR


def test_sweep_begins_with_the_defaults_and_has_tiles_for_every_usual_dimension():
    for D in (64, 96, 128, 256):
        found = bench.tiles(D)
        assert found[0] == {}
        assert len(found) > 3
        assert len({tuple(tile.items()) for tile in found}) == len(found)
        assert all(tile["threads"] == tile["BM"] * 2 for tile in found[1:])
    assert bench.tiles(512) == ({},)


def test_sweep_does_not_spell_out_the_defaults(monkeypatch):
    known = inspect.signature(example.attention).parameters
    usual = tuple(known[name].default for name in ("BM", "BN", "threads"))
    monkeypatch.setattr(bench, "TILES", ((64, (usual, (32, 16, 64))),))
    assert bench.tiles(64) == ({}, {"BM": 32, "BN": 16, "threads": 64})


@pytest.mark.parametrize(
    ("D", "tile"), [(most, tile) for most, _ in bench.TILES for tile in bench.tiles(most)[1:]]
)
def test_tile_of_the_sweep_compiles_for_hopper(D, tile):
    half = T.Tensor((2, 4, 1024, D), "bfloat16")
    lse = T.Tensor((2, 4, 1024), "float32")
    kernel = example.attention.compile(
        half, half, half, half, lse, target="sm_90a", is_causal=True, **tile
    )
    assert "wgmma.mma_async" in kernel.ptx


def test_names_of_configurations_are_the_keywords():
    operands, *_ = host_operands(8, 64, False)
    names = [name for name, _ in bench.swept(operands, False)]
    assert names[:2] == ["default", "BM=128, BN=192, threads=256"]


def test_backward_is_what_attention_backward_computes(monkeypatch):
    calls = []
    module = types.ModuleType("attention_backward")
    module.attention_backward = lambda *arrays, **words: calls.append((arrays, words))
    monkeypatch.setitem(sys.modules, "attention_backward", module)
    case = Case(1, 2, 8, 64, "bfloat16", "causal", "backward")
    operands = types.SimpleNamespace(
        case=case, q="q", k="k", v="v", o="o", lse="lse", do="do", results=("dq", "dk", "dv")
    )
    for candidates in (bench.swept, bench.default):
        ((name, build),) = candidates(operands, False)
        assert (name, build()()) == ("default", ("dq", "dk", "dv"))
    expected = ("q", "k", "v", "o", "lse", "do", "dq", "dk", "dv"), {"is_causal": True}
    assert calls == [expected] * 2


def test_backward_without_its_example_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "attention_backward", None)
    case = Case(1, 2, 8, 64, "bfloat16", "causal", "backward")
    operands = types.SimpleNamespace(case=case, q=0, k=0, v=0, o=0, lse=0, do=0, results=(0, 0, 0))
    ((_, build),) = bench.default(operands, False)
    with pytest.raises(ImportError):
        build()


def test_options_have_defaults():
    options = bench.parse([])
    assert options.sizes == [512, 1024, 2048, 4096, 8192, 16384]
    assert (options.dims, options.masks) == ([64, 128], ["full", "causal"])
    assert (options.dtypes, options.heads, options.tokens) == (["float16", "bfloat16"], None, 16384)
    assert (options.peers, options.rounds) == (["cudnn", "flash"], 20)
    assert not options.backward


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--masks", "windowed"], "'windowed' is not one of full, causal"),
        (["--dtypes", "int8"], "'int8' is not one of float16, bfloat16"),
        (["--peers", "cublas"], "'cublas' is not one of cudnn, flash, triton, pallas, tilelang"),
        (["--tokens", "0"], "integers here are positive"),
        (["--heads", "2,3"], "'2,3' is not one integer"),
    ],
)
def test_wrong_option_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(words)
    assert message in capsys.readouterr().err


def test_row_says_which_tiles_won_and_is_as_wide_as_its_heading():
    who = [*bench.BENCH.own, *bench.PEERS]
    case = Case(1, 32, 16384, 128, "bfloat16", "causal", "backward")
    outcome = bench_report.Outcome(case, bench.BENCH.base)
    for name, ms in (("tilejit", 4.0), ("default", 5.0), ("cudnn", 2.0)):
        outcome.found[name] = bench_report.Measured(name, "BM=128, BN=96, threads=256", [ms])
    first, told = bench_report.row(outcome, who, detailed=bench.BENCH.told).splitlines()
    heading = bench_report.heading(bench.BENCH.title, who).splitlines()
    assert {len(first)} == {len(line) for line in heading}
    assert first.split()[3:9] == [
        "bwd", f"{case.flops / 4e9:.1f}", "0.500", f"{case.flops / 5e9:.1f}", "0.400",
        f"{case.flops / 2e9:.1f}",
    ]  # fmt: skip
    assert told == "    tilejit: BM=128, BN=96, threads=256, 4.0000 ms"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_operands_know_the_right_results_and_no_others(mask, direction):
    torch = pytest.importorskip("torch")
    case = Case(1, 2, 150, 64, "bfloat16", mask, direction)
    operands = attention_cases.Operands(case)
    operands.poison()
    assert math.isnan(operands.excess(operands.results))
    inputs = [x.float().requires_grad_() for x in (operands.q, operands.k, operands.v)]
    o, lse = attention_cases.plain(*inputs, case.is_causal)
    right: tuple[Any, ...] = o.detach().bfloat16(), lse
    if case.is_backward:
        assert (operands.o == right[0]).all()
        assert (operands.lse == lse).all()
        right = tuple(x.bfloat16() for x in torch.autograd.grad(o, inputs, operands.do.float()))
    assert operands.excess(right) <= 1
    for index, result in enumerate(right):
        spoiled = [x.clone() for x in right]
        spoiled[index].flatten(0, 1)[1, 100:] = 0
        assert operands.excess(tuple(spoiled)) > 1, (index, result.shape)


def test_float64_agrees_with_the_answer_that_torch_computes():
    torch = pytest.importorskip("torch")
    for mask in attention_cases.MASKS:
        operands = attention_cases.Operands(Case(1, 2, 70, 64, "float16", mask))
        q, k, v = (x.cpu().numpy() for x in (operands.q, operands.k, operands.v))
        exact, lse = example.exact(q, k, v, is_causal=mask == "causal")
        like = operands.q.device
        given = tuple(torch.from_numpy(x).to(like, torch.float32) for x in (exact, lse))
        assert operands.excess(given) < 0.1
