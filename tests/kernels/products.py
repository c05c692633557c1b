"""A matmul of every dtype and layout, and how far its result may be from the exact one."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit
from tilejit.dtypes import as_dtype

# The rounding of a sum of products, in units of the sum of their magnitudes, for each term:
# of float32 accumulators, of fp8's (a tensor core keeps 13 bits between additions), of float16's
FLOAT32_STEP, FP8_STEP, FLOAT16_STEP = 2.0**-22, 2.0**-13, 2.0**-10
TF32_ERROR = 2.0**-10  # of a product whose factors are rounded to 10 bits


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    BM=64, BN=64, BK=32, stages=None, threads=128, tA=False, tB=False, accum="float32", tf32=False,
    policy=T.GemmWarpPolicy.Square, cluster=None, split=None,
):  # fmt: skip
    M, N = C.shape
    K = A.shape[0] if tA else A.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads, cluster=cluster) as (bx, by):
        a = T.alloc_shared((BK, BM) if tA else (BM, BK), "tfloat32" if tf32 else A.dtype)
        b = T.alloc_shared((BN, BK) if tB else (BK, BN), "tfloat32" if tf32 else B.dtype)
        acc = T.alloc_fragment((BM, BN), accum)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages, split=split):
            if tA:
                T.copy(A[k * BK, by * BM], a)
            else:
                T.copy(A[by * BM, k * BK], a)
            if tB:
                T.copy(B[bx * BN, k * BK], b)
            else:
                T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc, transpose_A=tA, transpose_B=tB, policy=policy)
        T.copy(acc, C[by * BM, bx * BN])


@functools.cache
def matmul_of_any_size(a: str, b: str, out: str, tA: bool, tB: bool) -> Any:
    """The same with M, N and K that are known only at the call."""
    M, N, K = T.dynamic("M, N, K")

    @tilejit
    def matmul(
        A: T.Tensor((K, M) if tA else (M, K), a), B: T.Tensor((N, K) if tB else (K, N), b),
        C: T.Tensor((M, N), out), *, BM, BN, BK, threads, accum, tf32,
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
            left = T.alloc_shared((BK, BM) if tA else (BM, BK), "tfloat32" if tf32 else a)
            right = T.alloc_shared((BN, BK) if tB else (BK, BN), "tfloat32" if tf32 else b)
            acc = T.alloc_fragment((BM, BN), accum)
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, BK)):
                if tA:
                    T.copy(A[k * BK, by * BM], left)
                else:
                    T.copy(A[by * BM, k * BK], left)
                if tB:
                    T.copy(B[bx * BN, k * BK], right)
                else:
                    T.copy(B[k * BK, bx * BN], right)
                T.gemm(left, right, acc, transpose_A=tA, transpose_B=tB)
            T.copy(acc, C[by * BM, bx * BN])

    return matmul


def operand(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Normal numbers, or of an integer type all that it has."""
    kind = as_dtype(dtype)
    if kind.is_integer:
        return rng.integers(int(kind.min), int(kind.max), shape, kind.numpy, endpoint=True)
    return rng.standard_normal(shape, np.float32).astype(kind.numpy)


def stored(x: np.ndarray, is_transposed: bool) -> np.ndarray:
    """The matrix as a kernel gets it."""
    return np.ascontiguousarray(x.T) if is_transposed else x


def step_of(a: Any, accum: Any) -> float:
    if as_dtype(accum).name == "float16":
        return FLOAT16_STEP
    return FP8_STEP if as_dtype(a).name.startswith("float8") else FLOAT32_STEP


def assert_product(
    c: np.ndarray, a: np.ndarray, b: np.ndarray, *, accum: Any = "float32", tf32: bool = False
) -> None:
    """Every element of c within one unit of its last place and the rounding of the sum."""
    with np.errstate(all="ignore"):
        if as_dtype(c.dtype).is_integer:
            exact = a.astype(np.int64) @ b.astype(np.int64)
            np.testing.assert_array_equal(c, exact.astype(c.dtype))
            return
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        exact, sizes = wide_a @ wide_b, np.abs(wide_a) @ np.abs(wide_b)
        error = a.shape[1] * step_of(a.dtype, accum) + (TF32_ERROR if tf32 else 0)
        assert_near(c, exact, error * sizes)


def assert_near(c: np.ndarray, exact: np.ndarray, error: Any) -> None:
    """Every element of c within one unit of its last place and `error`."""
    info = ml_dtypes.finfo(c.dtype)
    unit = np.maximum(float(info.eps) * np.abs(exact), float(info.smallest_subnormal))
    got = c.astype(np.float64)
    wrong = ~(np.abs(got - exact) <= unit + error)
    where = tuple(int(i[0]) for i in np.nonzero(wrong)) if wrong.any() else ()
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} elements are wrong, the first at {where}: "
        f"{got[where]}, not {exact[where]}"
    )


def explained(kernel: Any, *arguments: Any, **constants: Any) -> str:
    """What was chosen for a chip with multiplies by warpgroups."""
    return kernel.compile(*arguments, target="sm_90a", **constants).explain()
