"""The machine code of attention's loop: what each score costs, and where masks are paid for."""

from __future__ import annotations

import collections
import re
import shutil

import attention
import pytest

import tilejit.language as T
from tilejit.ir.node import If, Parallel, walk

BM = BN = D = 128
SCORES = BM * BN // 256  # of a thread
MASK = re.compile(r"loop over scores: (.*)")


def compiled(target="sm_90a", S=4096, **options):
    tile, rows = T.Tensor((4, 16, S, D), "float16"), T.Tensor((4, 16, S), "float32")
    return attention.attention.compile(tile, tile, tile, tile, rows, target=target, **options)


def main_loop(sass: str) -> dict[str, int]:
    """How often each instruction is in the shortest loop with the multiplies of both products."""
    lines = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    labels, found = dict[str, int](), list[str]()
    for label, text in lines:
        if label:
            labels[label] = len(found)
        else:
            found.append(re.sub(r"^@!?U?P\d+ ", "", text).strip())
    bodies = []
    for end, text in enumerate(found):
        jump = re.match(r"BRA.*`\((\.L_x_\d+)\)", text)
        if jump and labels[jump[1]] <= end:
            bodies.append(found[labels[jump[1]] : end + 1])
    both = [b for b in bodies if sum(text.startswith("HGMMA") for text in b) >= 2 * D // 16]
    names = [text.split()[0].split(".") for text in min(both, key=len)]
    return collections.Counter(".".join(parts[: 2 if parts[0] == "MUFU" else 1]) for parts in names)


def has_disassembler() -> bool:
    if shutil.which("nvdisasm"):
        return True
    from cuda import pathfinder

    return pathfinder.find_nvidia_binary_utility("nvdisasm") is not None


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_score_costs_as_much_as_by_hand(is_causal):
    """One multiply-add, exponential, maximum and addition, half a conversion, and the rescaling of
    an element of the result; for rows a few more. A mask that depends on the tile is there once."""
    counts = main_loop(compiled(is_causal=is_causal).sass)
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
