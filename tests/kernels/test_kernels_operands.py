"""Operands of tile multiplies: fp8 and float64 on matrix instructions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.target import TARGETS

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
UNITS = {"float16": 2.0**-10, "float32": 2.0**-22, "float64": 2.0**-51}  # of sum |a||b|, generously
TRANSPOSES = pytest.mark.parametrize("transpose", ["nn", "nt", "tn", "tt"])


@tilejit
def multiply(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    BM=32, BN=32, BK=32, threads=128, accum="float32", tA=False, tB=False, scopes="ss", stages=2,
    policy=T.GemmWarpPolicy.Square,
):  # fmt: skip
    M, N = C.shape
    K = A.shape[0] if tA else A.shape[1]
    alloc = {"s": T.alloc_shared, "f": T.alloc_fragment}
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = alloc[scopes[0]]((BK, BM) if tA else (BM, BK), A.dtype)
        b = alloc[scopes[1]]((BN, BK) if tB else (BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), accum)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
            T.copy(A[k * BK, by * BM] if tA else A[by * BM, k * BK], a)
            T.copy(B[bx * BN, k * BK] if tB else B[k * BK, bx * BN], b)
            T.gemm(a, b, acc, transpose_A=tA, transpose_B=tB, policy=policy)
        T.copy(acc, C[by * BM, bx * BN])


def operand(rng, shape, dtype):
    if np.dtype(dtype).kind in "iu":
        return rng.integers(-9, 9, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def assert_product(c, a, b, extra=0.0):
    """Every element as near to the exact product as summing in the dtype of `c` allows."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    tolerance = (a.shape[1] * UNITS.get(c.dtype.name, 0.0) + extra) * size + 1e-30
    wrong = ~(np.abs(c.astype(np.float64) - exact) <= tolerance)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements are wrong"


def check(run, rng, shape, dtypes, out, transpose="nn", extra=0.0, **constants):
    M, N, K = shape
    a, b = operand(rng, (M, K), dtypes[0]), operand(rng, (K, N), dtypes[1])
    tA, tB = transpose[0] == "t", transpose[1] == "t"
    stored_a = np.ascontiguousarray(a.T) if tA else a
    stored_b = np.ascontiguousarray(b.T) if tB else b
    c = run(multiply, stored_a, stored_b, out=[((M, N), out)], tA=tA, tB=tB, accum=out, **constants)
    assert_product(c, a, b, extra)


def compiled(dtypes, out, target, shape=(128, 128, 128), transpose="nn", **constants):
    M, N, K = shape
    tA, tB = transpose[0] == "t", transpose[1] == "t"
    return multiply.compile(
        T.Tensor((K, M) if tA else (M, K), dtypes[0]),
        T.Tensor((N, K) if tB else (K, N), dtypes[1]),
        T.Tensor((M, N), out),
        target=target, tA=tA, tB=tB, accum=out, **constants,
    )  # fmt: skip


SHAPES = [(64, 64, 64), (50, 71, 33), (1, 1, 1)]
PAIRS = pytest.mark.parametrize(
    "pair", [(a, b) for a in (E4M3, E5M2) for b in (E4M3, E5M2)],
    ids=lambda pair: "-".join(np.dtype(d).name for d in pair),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@TRANSPOSES
@PAIRS
def test_matmul_of_float8_through_matrix_instructions_is_right(
    run, rng, executor, pair, transpose, shape
):
    # tensor cores of some chips keep 14 bits of the sum
    extra = 2.0**-12 if executor == "gpu" else 0.0
    with options(target="sm_89"):
        check(run, rng, shape, pair, "float32", transpose, extra)


@pytest.mark.parametrize("BK", [16, 48])
def test_matmul_of_float8_tiles_that_only_the_short_instruction_divides_is_right(run, rng, BK):
    with options(target="sm_120a"):
        check(run, rng, (32, 32, 48), (E4M3, E5M2), "float32", extra=2.0**-12, BK=BK)
    kernel = compiled((E4M3, E5M2), "float32", "sm_120a", BK=BK)
    assert "mma.m16n8k16.f32.e4m3.e5m2.f32 on" in kernel.explain()


@TRANSPOSES
def test_matmul_of_float8_accumulating_in_float16_is_near(run, rng, transpose):
    with options(target="sm_89"):
        check(run, rng, (32, 48, 64), (E5M2, E4M3), "float16", transpose)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@TRANSPOSES
def test_matmul_of_float64_is_right_to_its_last_bits(run, rng, transpose, shape, target):
    with options(target=target):
        check(run, rng, shape, (np.float64, np.float64), "float64", transpose)


@pytest.mark.parametrize("tile", [(8, 8, 4), (24, 40, 12), (16, 8, 20), (16, 16, 8)], ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_matmul_of_small_float64_tiles_is_right(run, rng, tile, target):
    BM, BN, BK = tile
    with options(target=target):
        check(run, rng, (30, 41, 23), (np.float64, np.float64), "float64", BM=BM, BN=BN, BK=BK)


@pytest.mark.parametrize(
    ("target", "tile", "name"),
    [
        ("sm_80", (32, 32, 32), "mma.m8n8k4.f64"),
        ("sm_89", (8, 8, 4), "mma.m8n8k4.f64"),
        ("sm_90", (32, 32, 32), "mma.m16n8k16.f64"),
        ("sm_90a", (32, 32, 24), "mma.m16n8k8.f64"),
        ("sm_100a", (32, 32, 12), "mma.m16n8k4.f64"),
        ("sm_120a", (24, 32, 16), "mma.m8n8k4.f64"),
        ("sm_90", (32, 32, 6), "fma"),
    ],
)
def test_float64_tiles_get_the_largest_instruction_that_divides_them(target, tile, name):
    BM, BN, BK = tile
    kernel = compiled(("float64", "float64"), "float64", target, BM=BM, BN=BN, BK=BK)
    assert f"gemm a @ b -> acc: {name}" in kernel.explain()


def test_float8_tiles_on_a_chip_without_the_instruction_say_that_they_use_fma():
    text = compiled((E4M3, E4M3), "float32", "sm_86").explain()
    assert "gemm a @ b -> acc: fma" in text
    assert "not mma.m16n8k32.f32.e4m3.e4m3.f32 (needs mma.sync, mma.sync fp8, which sm_86" in text


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "out"), [(E4M3, "float32"), (E5M2, "float16"), (np.float64, "float64")]
)
@pytest.mark.parametrize("transpose", ["nt", "tn"])
def test_matmul_of_float8_and_float64_compiles_without_spills(name, dtype, out, transpose):
    is_wide = dtype is np.float64
    kernel = compiled(
        (dtype, dtype), out, name, transpose=transpose, stages=3,
        BM=64, BN=64, BK=16 if is_wide else 64,
    )  # fmt: skip
    has_mma = is_wide or name not in ("sm_80", "sm_86")
    assert ("mma.sync" in kernel.ptx) == has_mma
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)
