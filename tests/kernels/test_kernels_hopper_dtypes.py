"""Matmuls for warpgroups and the tensor memory accelerator: every operand dtype, layout and
accumulator, and what explain() says where the chip has no instruction."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, explained, matmul, operand, stored

import tilejit.language as T
from tilejit import tilejit
from tilejit.dtypes import as_dtype
from tilejit.isa.tma import round_to_tf32

E4M3, E5M2, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16
WIDE = [(np.float16, "float32"), (np.float16, "float16"), (BF16, "float32")]
NARROW = [
    *((a, b, "float32") for a in (E4M3, E5M2) for b in (E4M3, E5M2)),
    (E4M3, E4M3, "float16"), (E5M2, E4M3, "float16"),
    *((a, b, "int32") for a in (np.int8, np.uint8) for b in (np.int8, np.uint8)),
]  # fmt: skip
LAYOUTS = ["nn", "nt", "tn", "tt"]  # of A and of B: t stored transposed
TILINGS = [
    {"BM": 64, "BN": 64, "BK": 32, "threads": 128},
    {"BM": 128, "BN": 48, "BK": 64, "threads": 256},
]
SIZES = [(128, 160, 96), (80, 112, 144)]  # M, N, K; tiles divide the first


def name(x):
    return "-".join(name(y) for y in x) if isinstance(x, tuple) else as_dtype(x).name


def check(hopper, rng, size, a_dtype, b_dtype, accum, out, layout, **constants):
    M, N, K = size
    tA, tB = (side == "t" for side in layout)
    a, b = operand(rng, (M, K), a_dtype), operand(rng, (K, N), b_dtype)
    arrays = stored(a, tA), stored(b, tB)
    constants |= {"tA": tA, "tB": tB, "accum": accum}
    c = hopper(matmul, *arrays, out=[((M, N), out)], **constants)
    assert_product(c, a, b, accum=accum, tf32=constants.get("tf32", False))
    return explained(matmul, *arrays, T.Tensor((M, N), out), **constants)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: f"{t['BM']}x{t['BN']}x{t['BK']}")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("types", WIDE, ids=name)
def test_matmul_of_16_bit_floats_is_right_in_every_layout(hopper, rng, types, layout, tiling):
    dtype, accum = types
    for size in SIZES:
        text = check(hopper, rng, size, dtype, dtype, accum, accum, layout, **tiling)
        assert f"wgmma.m64n{tiling['BN']}k16" in text
        assert "of a, b by TMA" in text


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: f"{t['BM']}x{t['BN']}x{t['BK']}")
@pytest.mark.parametrize("types", NARROW, ids=name)
def test_matmul_of_8_bits_with_k_innermost_is_by_warpgroups(hopper, rng, types, tiling):
    for size in SIZES:
        text = check(hopper, rng, size, *types, types[2], "nt", **tiling)
        assert f"wgmma.m64n{tiling['BN']}k32" in text
        assert "of a, b by TMA" in text


@pytest.mark.parametrize("layout", ["nn", "tn", "tt"])
@pytest.mark.parametrize("types", NARROW, ids=name)
def test_matmul_of_8_bits_with_k_outermost_is_by_warps(hopper, rng, types, layout):
    text = check(hopper, rng, SIZES[1], *types, types[2], layout, **TILINGS[0])
    which = "a" if layout[0] == "t" else "b"
    assert "mma.m16n8k32" in text
    assert f"not wgmma ({which} is stored with K outermost, which takes 16-bit elements)" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matmul_through_tf32_is_by_warpgroups_where_k_is_innermost(hopper, rng, layout):
    for size, tiling in zip(SIZES, TILINGS, strict=True):
        text = check(hopper, rng, size, np.float32, np.float32, "float32", "float32", layout,
                     tf32=True, **tiling)  # fmt: skip
        if layout == "nt":
            assert f"wgmma.m64n{tiling['BN']}k8" in text
        else:
            assert "mma.m16n8k8.f32.tf32.tf32.f32" in text
            assert "is stored with K outermost, which takes 16-bit elements" in text


def test_matmul_of_float32_is_by_fused_multiply_adds(hopper, rng):
    text = check(hopper, rng, SIZES[1], np.float32, np.float32, "float32", "float32", "nt")
    assert "fma" in text
    assert "not wgmma (no instruction multiplies float32 and float32 into float32" in text


@pytest.mark.parametrize("out", ["float16", "bfloat16", "float8_e4m3fn", "float32", "float64"])
def test_float_product_is_stored_in_another_dtype(hopper, rng, out):
    check(hopper, rng, SIZES[1], BF16, BF16, "float32", out, "nn", **TILINGS[0])


@pytest.mark.parametrize("out", ["int8", "int32", "int64"])
def test_integer_product_is_stored_in_another_dtype(hopper, rng, out):
    check(hopper, rng, SIZES[1], np.int8, np.int8, "int32", out, "nt", **TILINGS[0])


@pytest.mark.parametrize("columns", [8, 16, 24, 40, 56, 72, 88, 104, 120, 136, 200, 256])
def test_tile_of_any_number_of_columns_is_right(hopper, rng, columns):
    for layout in ("nn", "nt"):
        check(hopper, rng, (64, 264, 48), BF16, BF16, "float32", "float32", layout, BM=64,
              BN=columns, BK=32)  # fmt: skip


@pytest.mark.parametrize("columns", [8, 24, 40, 48, 72, 96, 112])
def test_integer_tile_of_any_number_of_columns_is_right(hopper, rng, columns):
    check(hopper, rng, (64, 128, 64), np.int8, np.uint8, "int32", "int32", "nt", BM=64,
          BN=columns, BK=32)  # fmt: skip


@pytest.mark.parametrize("depth", [16, 32, 48, 64, 80, 96, 128, 192])
def test_tile_of_any_depth_is_right(hopper, rng, depth):
    for layout in LAYOUTS:
        check(hopper, rng, (64, 64, 208), BF16, BF16, "float32", "float32", layout, BK=depth)


@pytest.mark.parametrize("depth", [32, 64, 96, 128, 256])
def test_8_bit_tile_of_any_depth_is_right(hopper, rng, depth):
    check(hopper, rng, (64, 64, 272), E4M3, E4M3, "float32", "float32", "nt", BK=depth)


@pytest.mark.parametrize("depth", [8, 16, 24, 32, 64])
def test_tf32_tile_of_any_depth_is_right(hopper, rng, depth):
    check(hopper, rng, (64, 64, 100), np.float32, np.float32, "float32", "float32", "nt",
          BK=depth, tf32=True)  # fmt: skip


@pytest.mark.parametrize("policy", list(T.GemmWarpPolicy))
@pytest.mark.parametrize(
    "tile, threads", [((128, 64), 256), ((64, 128), 256), ((192, 64), 384), ((256, 64), 512)]
)
def test_any_number_of_warpgroups_share_a_tile(hopper, rng, tile, threads, policy):
    for layout in ("nn", "nt"):
        text = check(hopper, rng, (264, 136, 72), BF16, BF16, "float32", "float32", layout,
                     BM=tile[0], BN=tile[1], BK=32, threads=threads, policy=policy)  # fmt: skip
        assert "wgmma" in text


def untied(rng, shape):
    """Float32 that is never halfway between two tf32 numbers."""
    bits = operand(rng, shape, np.float32).view(np.uint32) | np.uint32(1)
    return bits.view(np.float32)


def test_tf32_operands_are_rounded_on_their_way(hopper, rng):
    a, b = untied(rng, (64, 96)), untied(rng, (80, 96))
    c = hopper(matmul, a, b, out=[((64, 80), "float32")], tB=True, tf32=True)
    assert_product(c, round_to_tf32(a), round_to_tf32(b).T)


def test_tf32_operand_that_threads_store_is_rounded(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "tfloat32")
            b = T.alloc_shared((64, 32), "tfloat32")
            acc = T.alloc_fragment((64, 64), "float32")
            for i, j in T.Parallel(64, 32):
                a[i, j] = A[i, j] * 2
                b[i, j] = B[i, j]
            T.gemm(a, b, acc, transpose_B=True, clear_accum=True)
            T.copy(acc, C)

    a, b = untied(rng, (64, 32)), untied(rng, (64, 32))
    c = hopper(kernel, a, b, out=[((64, 64), "float32")])
    assert_product(c, 2 * round_to_tf32(a), round_to_tf32(b).T)


def test_tf32_operand_that_is_also_read_keeps_its_bits_and_is_rounded(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "tfloat32")
            b = T.alloc_shared((64, 32), "tfloat32")
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(2, num_stages=2):
                T.copy(A[0, k * 32], a)
                T.copy(B[0, k * 32], b)
                T.gemm(a, b, acc, transpose_B=True)
                for i, j in T.Parallel(64, 32):
                    D[i, k * 32 + j] = a[i, j]
            T.copy(acc, C)

    a, b = untied(rng, (64, 64)), untied(rng, (64, 64))
    c, d = hopper(kernel, a, b, out=[((64, 64), "float32")] * 2)
    assert_product(c, round_to_tf32(a), round_to_tf32(b).T)
    np.testing.assert_array_equal(d, a)


def test_tf32_operands_of_a_kernel_without_loops_are_rounded(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "tfloat32")
            b = T.alloc_shared((64, 32), "tfloat32")
            acc = T.alloc_fragment((64, 64), "float32")
            T.copy(A, a)
            T.copy(B, b)
            T.gemm(a, b, acc, transpose_B=True, clear_accum=True)
            T.copy(acc, C)

    a, b = untied(rng, (64, 32)), untied(rng, (64, 32))
    c = hopper(kernel, a, b, out=[((64, 64), "float32")])
    assert_product(c, round_to_tf32(a), round_to_tf32(b).T)


@pytest.mark.parametrize("tile, threads", [((448, 16), 896), ((512, 16), 1024), ((320, 24), 640)])
def test_block_of_many_warpgroups_is_right(hopper, rng, tile, threads):
    """Seven are the most that leave room for a producer."""
    text = check(hopper, rng, (530, 40, 72), BF16, BF16, "float32", "float32", "nt", BM=tile[0],
                 BN=tile[1], BK=32, threads=threads)  # fmt: skip
    assert ("of a, b by TMA" in text) == (threads < 1024)
