"""What is offered for Hopper compiles: with the instruction that was chosen, without spills or
stack, without a word of the assembler on serialised multiplies or ignored register counts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from products import matmul
from test_kernels_hopper_epilogues import KINDS, fused
from test_kernels_hopper_scaled import block_scaled, two_level

import tilejit.language as T

REGISTER_FILE = 65536
PRODUCERS = 128  # threads beside the user's

# (BM, BN) and threads; BK goes with the dtype
TILES = [
    ((128, 256), 256), ((128, 128), 256), ((64, 256), 128), ((256, 128), 256), ((192, 128), 384),
    ((64, 128), 128), ((128, 128), 128), ((128, 192), 256), ((64, 64), 128), ((64, 8), 128),
]  # fmt: skip
WIDE = [("bfloat16", "bfloat16", "float32"), ("float16", "float32", "float32")]
HALF = ("float16", "float16", "float16")
NARROW = [
    ("float8_e4m3fn", "bfloat16", "float32"), ("float8_e5m2", "float16", "float16"),
    ("int8", "int32", "int32"),
]  # fmt: skip
CASES = [
    *((WIDE[0], layout, *tile, 64) for tile in TILES[:8] for layout in ("nn", "nt")),
    *((WIDE[0], layout, *tile, 64) for tile in TILES[:4] for layout in ("tn", "tt")),
    *((WIDE[1], "nn", *tile, 64) for tile in (*TILES[:2], *TILES[8:])),
    *((HALF, layout, *TILES[0], 64) for layout in ("nn", "tt")),
    *((types, "nt", *tile, 128) for types in NARROW for tile in TILES[:4]),
    *((("float32", "float32", "float32"), "nt", *tile, 32) for tile in TILES[:4]),
]


def assert_clean(kernel: Any, spill_bytes: int = 0) -> None:
    (frame,) = kernel.kernels
    resources, log = frame.resources, frame.compiled.log
    assert max(resources.spill_bytes, resources.stack_bytes) <= spill_bytes, resources
    threads = frame.lowered.threads[0]
    assert resources.registers <= min(255, REGISTER_FILE // threads // 8 * 8)
    assert "Used" in log, "the assembler's report is missing"
    assert not re.search(r"\bC7\d\d\d\b", log), log
    assert not re.search(r"(?i)warning|advisory|error", log), log


def specs(types, layout, M, N, K):
    dtype, out, _ = types
    a = (K, M) if layout[0] == "t" else (M, K)
    b = (N, K) if layout[1] == "t" else (K, N)
    return T.Tensor(a, dtype), T.Tensor(b, dtype), T.Tensor((M, N), out)


def compiled(types, layout, tile, threads, depth, size=(4096, 4096, 4096)):
    return matmul.compile(
        *specs(types, layout, *size), target="sm_90a", BM=tile[0], BN=tile[1], BK=depth,
        threads=threads, accum=types[2], tf32=types[0] == "float32", tA=layout[0] == "t",
        tB=layout[1] == "t",
    )  # fmt: skip


@pytest.mark.parametrize(
    "types, layout, tile, threads, depth", CASES, ids=lambda x: str(x).replace(" ", "")
)
def test_tile_compiles_cleanly(types, layout, tile, threads, depth):
    kernel = compiled(types, layout, tile, threads, depth)
    text = kernel.explain()
    assert f"wgmma.m64n{min(tile[1], 256)}k" in text
    assert "slots of a, b by TMA" in text
    if tile[1] * T.Tensor((1,), types[1]).dtype.bytes % 16 == 0:
        assert "acc -> C: by TMA" in text
    assert_clean(kernel)


@pytest.mark.parametrize("size", [(4000, 4008, 4016), (8, 8, 8), (1000, 4096, 64)], ids=str)
@pytest.mark.parametrize("tile, threads", TILES[:2])
def test_ragged_tile_compiles_cleanly(size, tile, threads):
    kernel = compiled(WIDE[0], "nn", tile, threads, 64, size)
    assert "slots of a, b by TMA" in kernel.explain()
    assert_clean(kernel)


@pytest.mark.parametrize("size", [(503, 763, 1017), (4096, 4095, 4096), (1, 1, 1)], ids=str)
def test_kernel_for_ragged_rows_compiles_cleanly(size):
    kernel = compiled(WIDE[0], "nt", (128, 128), 256, 32, size)
    assert_clean(kernel)


@pytest.mark.parametrize("tile, threads", TILES[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_epilogue_compiles_cleanly(kind, tile, threads):
    n = 4096
    arguments = specs(WIDE[0], "nn", n, n, n)
    bias = T.Tensor((n,), "bfloat16")
    kernel = fused.compile(
        *arguments[:2], arguments[2], bias, arguments[2], target="sm_90a", BM=tile[0], BN=tile[1],
        BK=64, threads=threads, kind=kind,
    )  # fmt: skip
    # erf beside 128 accumulators: the count of tiles is put away, once a tile
    assert_clean(kernel, spill_bytes=8 if (kind, tile[1]) == ("gelu", 256) else 0)
    text = kernel.explain()
    assert f"wgmma.m64n{tile[1]}k16" in text
    assert "acc -> C: by TMA" in text


@pytest.mark.parametrize("BM, threads", [(128, 256), (64, 128)])
def test_two_levels_of_accumulation_compile_cleanly(BM, threads):
    n = 4096
    a, _, c = specs(NARROW[0], "nt", n, n, n)
    kernel = two_level.compile(a, a, c, target="sm_90a", BM=BM, BN=128, BK=128, threads=threads)
    assert "wgmma.m64n128k32.f32.e4m3.e4m3" in kernel.explain()
    assert_clean(kernel)


@pytest.mark.parametrize("where", ["global", "shared", "fragment"])
def test_scales_of_blocks_compile_cleanly(where):
    n = 4096
    a, _, c = specs(NARROW[0], "nt", n, n, n)
    scale_a, scale_b = T.Tensor((n, n // 128), "float32"), T.Tensor((n // 128,) * 2, "float32")
    kernel = block_scaled.compile(a, a, scale_a, scale_b, c, target="sm_90a", BM=128, BN=128,
                                  BK=128, threads=256, where=where)  # fmt: skip
    assert "wgmma.m64n128k32.f32.e4m3.e4m3" in kernel.explain()
    assert_clean(kernel)
