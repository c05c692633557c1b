"""Attention of 8-bit operands: right by FlashAttention's rule on every kind of chip, and what the
machine code of its loop costs."""

from __future__ import annotations

import re

import attention_fp8 as example
import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by name
import numpy as np
import pytest
from machine_code import has_disassembler, main_loop

import tilejit
import tilejit.language as T
from tilejit.runtime.device import use_executor

E4M3 = "float8_e4m3fn"
CASES = (  # S, SK, D, heads, O
    (70, 40, 64, (2, 2), "bfloat16"),
    (1, 144, 128, (2, 1), "float16"),
    (96, 162, 96, (4, 2), "bfloat16"),
    (130, 64, 32, (3, 1), "float16"),
)


def operands(S, SK, D, heads, is_one_scale=False):
    rng = np.random.default_rng(1)
    shapes = ((2, heads[0], S, D), (2, heads[1], SK, D), (2, heads[1], D, SK))
    pairs = [example.quantised(rng.standard_normal(shape) * n)
             for n, shape in zip((0.5, 2, 3), shapes, strict=True)]  # fmt: skip
    if is_one_scale:
        pairs = [(x, np.array([[0.02 * n]], np.float32)) for n, (x, _) in enumerate(pairs, 1)]
    return [x for x, _ in pairs] + [scale for _, scale in pairs]


def assert_right(results, arrays, options):
    """At most twice the error of the same maths with weights and results rounded."""
    o, lse = results
    wanted, wanted_lse = example.exact(*arrays, **options)
    coarse = example.exact(*arrays, **options, is_rounded=True)[0].astype(o.dtype)
    allowed = 2 * np.abs(coarse.astype(np.float64) - wanted).max() + 1e-5
    assert np.abs(o.astype(np.float64) - wanted).max() <= allowed
    seen = np.isfinite(wanted_lse)
    assert (np.isneginf(lse) == ~seen).all() and (o[~seen] == 0).all()
    assert np.abs(lse[seen] - wanted_lse[seen]).max(initial=0) < 1e-5


def test_fp8_attention_is_right_on_every_executor(executor, capsys):
    example.check()
    assert capsys.readouterr().out == "fp8 attention over 150 x 180: right, full and causal\n"


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"exact_sums": True}], ids=str)
@pytest.mark.parametrize("S, SK, D, heads, dtype", CASES)
def test_fp8_attention_is_right_for_other_shapes(S, SK, D, heads, dtype, options, target):
    """Also of rows that see no key, and of numbers of keys that no four divides."""
    arrays = operands(S, SK, D, heads, is_one_scale=S == 96)
    tiles = [{"BM": 64, "BN": 32, "threads": 128}, {"BM": 128, "BN": 64}]
    for tile in tiles[: 1 if target == "sm_80" else 2]:  # plain multiplies: slow to simulate
        with use_executor("simulator"), tilejit.options(target=target):
            runs = [example.run(*arrays, dtype, **options, **tile) for _ in range(2)]
        known = {k: v for k, v in options.items() if k != "exact_sums"}
        assert_right(runs[0], arrays, known)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_fp8_attention_is_right_with_its_own_tiles(D, is_causal):
    arrays = operands(140, 400, D, (1, 1))
    with use_executor("simulator"), tilejit.options(target="sm_90a"):
        results = example.run(*arrays, "float16", is_causal=is_causal)
    assert_right(results, arrays, {"is_causal": is_causal})


def test_keys_that_are_lost_are_noticed():
    """What the rule above is worth: without the last 16 of 400 keys it fails."""
    arrays = operands(20, 400, 64, (1, 1))
    lost = [*arrays]
    lost[1], lost[2] = arrays[1][:, :, :384], np.ascontiguousarray(arrays[2][..., :384])
    o, lse = example.exact(*lost)
    with pytest.raises(AssertionError):
        assert_right((o.astype("float16"), lse.astype(np.float32)), arrays, {})


def compiled(D, target="sm_90a", S=4096, dtype="float16", **options):
    tile, turned = T.Tensor((4, 16, S, D), E4M3), T.Tensor((4, 16, D, S), E4M3)
    scale, rows = T.Tensor((4, 16), "float32"), T.Tensor((4, 16, S), "float32")
    out = T.Tensor((4, 16, S, D), dtype)
    return example.attention_fp8.compile(
        tile, tile, turned, scale, scale, scale, out, rows, target=target, **options
    )


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_scores_and_weights_stay_in_registers_on_hopper(D, is_causal):
    kernel = compiled(D, is_causal=is_causal)
    text, ptx = kernel.explain(), kernel.ptx
    assert text.count(": wgmma") == 2 and "through shared memory" not in text
    assert "k: two of every four rows in each half" in text
    assert "prmt.b32" not in ptx and "lanes of quads" not in text
    assert "wgmma.wait_group.sync.aligned 1;" in ptx  # rounds overlap
    resources = kernel.resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)
    assert not re.search(r"C7\d\d\d|(?i:warning|advisory|error)", kernel.kernels[0].compiled.log)


@pytest.mark.parametrize("D", [64, 128])
def test_exact_sums_do_not_leave_the_registers(D):
    kernel = compiled(D, exact_sums=True)
    assert kernel.explain().count(": wgmma") == 2 and "prmt.b32" not in kernel.ptx
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)
    assert "C75" not in kernel.kernels[0].compiled.log


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
def test_a_score_costs_as_much_as_with_16_bits():
    """One multiply-add, exponential, maximum and addition, half a conversion, and the rescaling of
    an element of the result; for rows a few more, and no permutation."""
    BN = D = 128
    counts = main_loop(compiled(D, BN=BN).sass, "QGMMA", D // 32 + BN // 32)
    scores, rows = 128 * BN // 256, 8
    for name in ("FFMA", "MUFU.EX2", "FMNMX", "FADD", "FMUL"):
        assert scores <= counts[name] <= scores + rows, (name, counts[name])
    assert counts["F2FP"] == scores // 2
    assert counts["PRMT"] == 0 and counts["SHFL"] == rows
    assert sum(counts.values()) <= 5.5 * scores + 160


def test_single_warps_trade_what_lies_in_other_lanes():
    kernel = compiled(64, "sm_89", S=1024)
    text = kernel.explain()
    assert text.count(": mma.m16n8k32") == 2 and "through shared memory" not in text
    assert "fragment weights: lanes of quads trade elements to be the left operand" in text
    assert "two of every four" not in text


def test_chips_without_fp8_say_that_they_multiply_by_multiply_adds():
    text = compiled(64, "sm_80", S=1024, BM=64, BN=32, threads=128).explain()
    assert len(re.findall(r"gemm .*: fma", text)) == 2


def test_v_that_is_not_transposed_is_refused():
    tile, scale = T.Tensor((1, 1, 256, 64), E4M3), T.Tensor((1, 1), "float32")
    rows = T.Tensor((1, 1, 256), "float32")
    out = T.Tensor((1, 1, 256, 64), "float16")
    with pytest.raises(ValueError, match=r"V is \(1, 1, 256, 64\); for K of"):
        example.attention_fp8.compile(
            tile, tile, tile, scale, scale, scale, out, rows, target="sm_90a"
        )
