"""The machine code of attention's loop: what each score costs, and where masks are paid for."""

from __future__ import annotations

import re

import attention
import pytest
from machine_code import has_disassembler, main_loop

import tilejit.language as T
from tilejit.ir.node import If, Parallel, walk

BM = BN = D = 128
SCORES = BM * BN // 256  # of a thread
MASK = re.compile(r"loop over scores: (.*)")


def compiled(target="sm_90a", S=4096, **options):
    tile, rows = T.Tensor((4, 16, S, D), "float16"), T.Tensor((4, 16, S), "float32")
    return attention.attention.compile(tile, tile, tile, tile, rows, target=target, **options)


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_score_costs_as_much_as_by_hand(is_causal):
    """One multiply-add, exponential, maximum and addition, half a conversion, and the rescaling of
    an element of the result; for rows a few more. A mask that depends on the tile is there once."""
    counts = main_loop(compiled(is_causal=is_causal).sass, "HGMMA", 2 * D // 16)
    rows = 8
    for name in ("FFMA", "MUFU.EX2", "FMNMX", "FADD", "FMUL"):
        assert SCORES <= counts[name] <= SCORES + rows, (name, counts[name])
    assert counts["F2FP"] == SCORES // 2
    masks = SCORES if is_causal else 0
    assert masks <= counts["FSEL"] <= masks + rows
    assert counts["ISETP"] <= masks + rows and counts["FSETP"] <= rows
    assert sum(counts.values()) <= 5.5 * SCORES + 160 + 3 * masks


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "options, masks",
    [
        ({}, ["masks that hold in every tile are left out"]),
        ({"S": 4090}, [r"no masks where .* < 4090"]),
        ({"is_causal": True},
         ["masks that hold in every tile are left out", r"no masks where .* <= \(block \* 128\)"]),
        ({"is_causal": True, "window": 500},
         ["masks that hold in every tile are left out", r"no masks where \(.*\) & \(.*\)"]),
    ],
    ids=str,
)  # fmt: skip
def test_only_tiles_that_need_a_mask_pay_for_it(target, options, masks):
    kernel = compiled(target, **options)
    found = MASK.findall(kernel.explain())
    assert len(found) == len(masks)
    assert all(re.fullmatch(want, text) for want, text in zip(masks, found, strict=True)), found
    (frame,) = kernel.kernels
    around = [n for n in walk(frame.planned.body)
              if isinstance(n, If) and [type(x) for x in n.then] == [Parallel]]  # fmt: skip
    assert bool(around) == any("where" in text for text in masks)
    assert all(not n.orelse for n in around)  # tiles without a mask have nothing to do
    assert not re.search(r"C7\d\d\d|(?i:warning|advisory|error)", frame.compiled.log)
    assert frame.resources.spill_bytes == frame.resources.stack_bytes == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_120a"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_warps_keep_their_rows_where_they_multiply_alone(target, is_causal):
    """Statistics and weights stay in registers: no policy has to be given for that."""
    text = compiled(target, is_causal=is_causal, BM=64, threads=128).explain()
    assert "through shared memory" not in text and "on 4x1 warps" in text
