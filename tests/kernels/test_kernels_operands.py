"""Operands of tile multiplies: fp8 and float64 on matrix instructions, and fragments as A and B."""

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
SCOPES = pytest.mark.parametrize("scopes", ["fs", "sf", "ff"])


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


# ---- float8 and float64 -------------------------------------------------------------------------

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
    assert any(name in kernel.ptx for name in ("mma.sync", "wgmma.mma_async")) == has_mma
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)


# ---- fragments as operands ----------------------------------------------------------------------

DTYPES = {  # of A, B and C; what matrix instructions multiply
    "float16": (np.float16, np.float16, "float32"),
    "bfloat16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16, "float32"),
    "int8": (np.int8, np.int8, "int32"),
    "float8": (E4M3, E5M2, "float32"),
    "float64": (np.float64, np.float64, "float64"),
}


@TRANSPOSES
@SCOPES
@pytest.mark.parametrize("name", [*DTYPES, "float32"])
def test_gemm_with_fragment_operands_is_right(run, rng, executor, name, scopes, transpose):
    *dtypes, out = DTYPES.get(name, (np.float32, np.float32, "float32"))
    extra = 2.0**-12 if executor == "gpu" and name == "float8" else 0.0
    with options(target="sm_90"):
        check(run, rng, (50, 71, 65), dtypes, out, transpose, extra, scopes=scopes, BM=64, BN=32)


@pytest.mark.parametrize("policy", list(T.GemmWarpPolicy))
@pytest.mark.parametrize("threads", [32, 96, 256])
@SCOPES
def test_gemm_with_fragment_operands_and_any_number_of_warps_is_right(
    run, rng, scopes, threads, policy
):
    check(run, rng, (48, 64, 32), (np.float16, np.float16), "float32", scopes=scopes, BM=48, BN=64,
          threads=threads, policy=policy)  # fmt: skip


@SCOPES
@pytest.mark.parametrize("tile", [(10, 12, 7), (16, 8, 6), (1, 4, 3)], ids=str)
def test_gemm_with_fragment_operands_that_no_instruction_takes_is_right(run, rng, tile, scopes):
    BM, BN, BK = tile
    check(run, rng, (21, 30, 26), (np.float16, np.float16), "float32", scopes=scopes, BM=BM, BN=BN,
          BK=BK)  # fmt: skip
    text = compiled(
        ("float16", "float16"), "float32", "sm_80", scopes=scopes, BM=BM, BN=BN, BK=BK
    ).explain()
    for name, scope in zip("ab", scopes, strict=True):
        said = f"gemm a @ b -> acc: {name} goes through shared memory" in text
        assert said == (scope == "f")
    assert "gemm a_shared" not in text and "gemm a @ b -> acc: fma" in text


@TRANSPOSES
@pytest.mark.parametrize("name", DTYPES)
def test_fragments_that_nothing_else_decides_are_used_from_registers(name, transpose):
    *dtypes, out = DTYPES[name]
    kernel = compiled(dtypes, out, "sm_90", transpose=transpose, scopes="ff")
    assert kernel.resources.shared_bytes == 0
    assert "through shared memory" not in kernel.explain()
    assert "mma.sync" in kernel.ptx and "ldmatrix" not in kernel.ptx
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)


@tilejit
def chain(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, threads=128, tB=False):
    """D @ p or D @ p.T, p being the product of A and B."""
    M, N = A.shape[0], B.shape[1]
    inner = N if tB else M
    columns = M if tB else N
    with T.Kernel(1, threads=threads):
        a = T.alloc_shared(A.shape, "float16")
        b = T.alloc_shared(B.shape, "float16")
        d = T.alloc_shared((32, inner), "float16")
        s = T.alloc_fragment((M, N), "float32")
        p = T.alloc_fragment((M, N), "float16")
        acc = T.alloc_fragment((32, columns), "float32")
        T.copy(A, a)
        T.copy(B, b)
        T.copy(D, d)
        T.gemm(a, b, s, clear_accum=True)
        for i, j in T.Parallel(M, N):
            p[i, j] = T.max(s[i, j], 0)
        T.gemm(d, p, acc, transpose_B=tB, clear_accum=True)
        T.copy(acc, C)


@pytest.mark.parametrize("tB", [False, True])
@pytest.mark.parametrize("threads", [32, 128])
def test_a_product_as_right_operand_is_right(run, rng, threads, tB):
    a, b = operand(rng, (64, 32), np.float16), operand(rng, (32, 48), np.float16)
    d = operand(rng, (32, 48 if tB else 64), np.float16)
    c = run(chain, a, b, d, out=[((32, 64 if tB else 48), "float32")], threads=threads, tB=tB)
    p = np.maximum(a.astype(np.float32) @ b.astype(np.float32), 0).astype(np.float16)
    assert_product(c, d, p.T if tB else p, extra=2.0**-9)


def test_a_right_operand_goes_through_shared_memory_only_where_it_lies_elsewhere():
    half, single = "float16", "float32"
    for threads, tB, is_moved in [(32, True, False), (32, False, True), (128, True, True)]:
        D, C = T.Tensor((32, 48 if tB else 64), half), T.Tensor((32, 64 if tB else 48), single)
        kernel = chain.compile(
            T.Tensor((64, 32), half), T.Tensor((32, 48), half), D, C,
            target="sm_80", threads=threads, tB=tB,
        )  # fmt: skip
        line = "fragment p goes through shared memory to be the right operand at"
        assert (line in kernel.explain()) == is_moved, (threads, tB)


@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("size", [32, 10])
def test_a_fragment_may_be_both_operands(run, rng, size, threads):
    @tilejit
    def square(A: T.Tensor, C: T.Tensor, D: T.Tensor, E: T.Tensor, *, threads):
        with T.Kernel(1, threads=threads):
            a = T.alloc_fragment(A.shape, A.dtype)
            b = T.alloc_fragment(A.shape, A.dtype)
            c = T.alloc_fragment(A.shape, "float32")
            d = T.alloc_fragment(A.shape, "float32")
            e = T.alloc_fragment(A.shape, "float16")
            T.copy(A, a)
            T.gemm(a, a, c, clear_accum=True)
            T.gemm(a, a, d, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(*A.shape):
                b[i, j] = c[i, j]
            T.gemm(b, b, e, transpose_A=True, clear_accum=True)
            T.copy(c, C)
            T.copy(d, D)
            T.copy(e, E)

    a = rng.integers(-1, 2, (size, size)).astype(np.float16)
    outs = [((size, size), dtype) for dtype in ("float32", "float32", "float16")]
    c, d, e = run(square, a, out=outs, threads=threads)
    wide = a.astype(np.float64)
    assert (c == wide @ wide).all() and (d == wide @ wide.T).all()
    assert (e == (wide @ wide).T @ (wide @ wide)).all()


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("size", [32, 10])
def test_a_fragment_may_be_operand_and_sum(run, rng, size, threads, clear):
    @tilejit
    def update(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor, *, threads, clear):
        with T.Kernel(1, threads=threads):
            x = T.alloc_fragment(A.shape, "float16")
            y = T.alloc_fragment(A.shape, "float16")
            b = T.alloc_shared(A.shape, "float16")
            T.copy(A, x)
            T.copy(A, y)
            T.copy(B, b)
            T.gemm(x, b, x, clear_accum=clear)
            T.gemm(b, y, y, clear_accum=clear)
            T.copy(x, C)
            T.copy(y, D)

    a, b = rng.integers(-3, 4, (2, size, size)).astype(np.float16)
    c, d = run(update, a, b, out=[((size, size), "float16")] * 2, threads=threads, clear=clear)
    left, right = a.astype(np.float64), b.astype(np.float64)
    before = 0 if clear else left
    assert (c == left @ right + before).all()
    assert (d == right @ left + before).all()


@pytest.mark.parametrize("tile", [(32, 16, 48), (10, 12, 7)], ids=str)
def test_operands_and_sum_may_have_leading_extents_of_1(run, rng, tile):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        (M, K), N = A.shape, B.shape[1]
        with T.Kernel(1, threads=64):
            a = T.alloc_fragment((1, M, K), A.dtype)
            b = T.alloc_fragment((1, 1, N, K), B.dtype)
            acc = T.alloc_fragment((1, M, N), "float32")
            T.copy(A, a[0, :, :])
            for i, j in T.Parallel(K, N):
                b[0, 0, j, i] = B[i, j]
            T.gemm(a, b, acc, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(M, N):
                C[i, j] = acc[0, i, j]

    M, N, K = tile
    a, b = operand(rng, (M, K), np.float16), operand(rng, (K, N), np.float16)
    assert_product(run(kernel, a, b, out=[((M, N), "float32")]), a, b)


def test_a_fragment_too_large_to_lie_as_the_instruction_asks_goes_through_shared_memory(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 128), "float16")
            b = T.alloc_fragment((128, 256), "float16")
            acc = T.alloc_fragment((64, 256), "float32")
            T.copy(A, a)
            T.copy(B, b)
            T.gemm(a, b, acc, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
            T.copy(acc, C)

    a, b = operand(rng, (64, 128), np.float16), operand(rng, (128, 256), np.float16)
    assert_product(run(kernel, a, b, out=[((64, 256), "float32")]), a, b)
    text = kernel.compile(a, b, T.Tensor((64, 256), "float32"), target="sm_80").explain()
    assert "on 4x1 warps" in text and "fragment b goes through shared memory" in text
