"""What explain() says of a multiply that Hopper's warpgroups do not do, or copies that TMA does not
make: each reason in its words. The program runs all the same."""

from __future__ import annotations

import re

import numpy as np
import pytest
from products import assert_product, explained, matmul, operand

import tilejit.language as T
from tilejit import ResourceError, tilejit


def line_of(text: str, start: str) -> str:
    (line,) = (line.strip() for line in text.splitlines() if line.strip().startswith(start))
    return line


def spec(*shape: int, dtype: str = "bfloat16", **promises: int):
    return T.Tensor(shape, dtype, **promises)


SQUARE = spec(256, 256), spec(256, 256), spec(256, 256, dtype="float32")


@pytest.mark.parametrize(
    "constants, reason",
    [
        ({"threads": 96}, "96 threads are not whole warpgroups of 128"),
        ({"threads": 192, "BM": 192}, "192 threads are not whole warpgroups of 128"),
        ({"BM": 48}, "the tile is 48x64x32, no multiple of 64x8x16"),
        ({"BM": 96}, "the tile is 96x64x32, no multiple of 64x8x16"),
        ({"BN": 20, "tB": True}, "the tile is 64x20x32, no multiple of 64x8x16"),
        ({"BK": 24}, "the tile is 64x64x24, no multiple of 64x8x16"),
        (
            {"BM": 128, "BN": 256},
            r"its sums take 256 registers of each of 128 threads, of \d+ free",
        ),
        (
            {"BM": 512, "BN": 16, "threads": 1024},
            "a block has no room for producers beside 1024 threads",
        ),
        ({"BN": 24, "threads": 256}, "2 warpgroups cannot share 64x24 in parts of 64x8"),
    ],
    ids=str,
)
def test_reason_why_a_tile_is_not_for_warpgroups(constants, reason):
    gemm = line_of(explained(matmul, *SQUARE, **constants), "gemm a @ b -> acc:")
    assert "wgmma.m64" not in gemm
    assert re.search(rf"; not wgmma \({reason}\)", gemm), gemm


@pytest.mark.parametrize(
    "types, layout, reason",
    [
        (("int8", "int8", "int32"), "nn",
         "b is stored with K outermost, which takes 16-bit elements"),
        (("float8_e4m3fn", "float8_e5m2", "float32"), "tt",
         "a is stored with K outermost, which takes 16-bit elements"),
        (("float32", "float32", "float32"), "nt",
         "no instruction multiplies float32 and float32 into float32"),
        (("float64", "float64", "float64"), "nt",
         "no instruction multiplies float64 and float64 into float64"),
    ],
    ids=str,
)  # fmt: skip
def test_reason_why_dtypes_are_not_for_warpgroups(types, layout, reason):
    a, b, out = types
    arguments = spec(256, 256, dtype=a), spec(256, 256, dtype=b), spec(256, 256, dtype=out)
    text = explained(matmul, *arguments, accum=out, tA=layout[0] == "t", tB=layout[1] == "t")
    assert f"; not wgmma ({reason})" in line_of(text, "gemm a @ b -> acc:")


@pytest.mark.parametrize(
    "a, reason",
    [
        (spec(256, 252), "rows of A do not provably begin at multiples of 16 bytes"),
        (spec(256, 256, align=8), "A does not provably begin at a multiple of 16 bytes"),
        (
            np.zeros((256, 512), np.float16)[:, ::2],
            "neighbours in a row of A are not neighbours in memory",
        ),
        (np.zeros((256, 256), np.float16)[::-1], "rows of A do not follow each other in memory"),
    ],
    ids=["pitch", "address", "columns", "backwards"],
)
def test_reason_why_a_tensor_is_not_for_tma(a, reason):
    is_array = isinstance(a, np.ndarray)
    dtype = "float16" if is_array else "bfloat16"
    K = a.shape[1] if is_array else 252 if "rows of A do not provably" in reason else 256
    text = explained(matmul, a, spec(K, 256, dtype=dtype), spec(256, 256, dtype="float32"))
    assert f"not TMA ({reason})" in line_of(text, "copy A -> a:")
    gemm = line_of(text, "gemm a @ b -> acc:")
    assert gemm.endswith("; not wgmma (its operands are not brought by TMA)")


def test_reason_why_an_empty_tensor_is_not_for_tma():
    text = explained(matmul, spec(64, 0), spec(0, 64), spec(64, 64, dtype="float32"))
    assert "not TMA (A is empty)" in line_of(text, "copy A -> a:")


@tilejit
def unusual(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kind, BK=32):
    threads = (64, 2) if kind == "threads of two dimensions" else 128
    with T.Kernel(1, threads=threads):
        a = T.alloc_shared((64, BK), A.dtype)
        b = T.alloc_shared((BK, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        if kind == "view":
            flat = T.SharedBuffer((64 * BK,), A.dtype, data=a.data)
        if kind == "while":
            left = T.alloc_var("int32", init=2)
            while left > 0:
                left -= 1
        for k in T.Pipelined(A.shape[1] // BK, num_stages=2):
            if kind == "prefer":
                T.copy(A[0, k * BK], a, prefer_instruction="cp_async")
            else:
                T.copy(A[0, k * BK], a)
            if kind == "right":
                held = T.alloc_fragment((BK, 64), B.dtype)
                T.copy(B[k * BK, 0], held)
                T.gemm(a, held, acc)
            else:
                T.copy(B[k * BK, 0], b)
                if kind == "view":
                    for i in T.Parallel(64 * BK):
                        flat[i] = flat[i]
                if kind == "part":
                    T.gemm(a[0:64, 4:20], b[4:20, 0:64], acc)
                    T.gemm(a[0:64, 0:4], b[0:4, 0:64], acc)
                    T.gemm(a[0:64, 20:32], b[20:32, 0:64], acc)
                else:
                    T.gemm(a, b, acc)
        T.copy(acc, C)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("threads of two dimensions", "the block's threads have more than one dimension"),
        ("while", "the kernel has a loop whose end only the block knows"),
        ("view", "a has views, so it lies in plain rows"),
        ("right", "b is a fragment"),
        ("prefer", "its operands are not brought by TMA"),
        ("part", "the part of a begins inside of a swizzle"),
    ],
)
def test_reason_why_a_program_is_not_for_warpgroups(hopper, rng, kind, reason):
    a, b = operand(rng, (64, 128), np.float16), operand(rng, (128, 64), np.float16)
    c = hopper(unusual, a, b, out=[((64, 64), "float32")], kind=kind)
    assert_product(c, a, b)
    text = explained(unusual, a, b, c, kind=kind)
    assert f"; not wgmma ({reason})" in text
    if kind == "prefer":
        assert "not TMA (prefer_instruction is 'cp_async')" in line_of(text, "copy A -> a:")


def test_reason_why_a_store_is_not_by_tma():
    text = explained(matmul, spec(256, 256), spec(256, 256), spec(256, 256, dtype="int16"), BN=24)
    assert "acc -> C: by TMA" in text
    text = explained(matmul, spec(256, 256), spec(256, 250), spec(256, 250), tB=False)
    assert "wgmma" in line_of(text, "gemm a @ b -> acc:")  # refused: B's rows are ragged
    narrow = spec(256, 256, dtype="int8")
    text = explained(matmul, spec(256, 256), spec(256, 256), narrow, BN=24)
    assert line_of(text, "acc -> C:") == (
        "acc -> C: stored by the threads, not by TMA (a row of 8 int8 is no multiple of 16 bytes)"
    )


def test_stages_that_do_not_fit_are_refused_with_a_table():
    with pytest.raises(ResourceError) as error:
        explained(matmul, *SQUARE, BM=128, BN=256, BK=64, threads=256, stages=6)
    text = str(error.value)
    assert re.search(r"needs \d+ bytes of shared memory; sm_90a has 232448 for a block", text)
    assert "b: 6x64x256 bfloat16" in text


def test_chip_without_warpgroups_has_no_word_of_them():
    for target in ("sm_80", "sm_90", "sm_100a"):
        assert "wgmma" not in matmul.compile(*SQUARE, target=target).explain()
