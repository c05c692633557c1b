"""The matmul in TileLang: bulk copies and wgmma are its compiler's choice on Hopper."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tilelang
import tilelang.language as T

with contextlib.suppress(Exception):  # a line for each compilation otherwise
    tilelang.set_log_level("WARNING")


@tilelang.jit
def make_matmul(M, N, K, BM, BN, BK, stages, threads, transposed, dtype, tiles, out, total):
    """The kernel for one shape; 16-bit results go through shared memory."""
    b_tile = (BN, BK) if transposed else (BK, BN)
    tiles = T.tfloat32 if tiles == "tfloat32" else tiles

    @T.prim_func
    def gemm(
        A: T.Tensor((M, K), dtype),
        B: T.Tensor((N, K) if transposed else (K, N), dtype),
        C: T.Tensor((M, N), out),
    ):
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
            a = T.alloc_shared((BM, BK), tiles)
            b = T.alloc_shared(b_tile, tiles)
            acc = T.alloc_fragment((BM, BN), total)
            T.use_swizzle(panel_size=10)
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
                T.copy(A[by * BM, k * BK], a)
                if transposed:
                    T.copy(B[bx * BN, k * BK], b)
                else:
                    T.copy(B[k * BK, bx * BN], b)
                T.gemm(a, b, acc, transpose_B=transposed)
            if out == "bfloat16" or out == "float16":
                c = T.alloc_shared((BM, BN), out)
                T.copy(acc, c)
                T.copy(c, C[by * BM, bx * BN])
            else:
                T.copy(acc, C[by * BM, bx * BN])

    return gemm


# BM, BN, BK of 2-byte elements, stages, threads that multiply
LARGE = (
    (128, 256, 64, 3, 256),
    (128, 128, 64, 4, 256),
    (256, 128, 64, 3, 256),
    (128, 256, 64, 4, 256),
    (128, 128, 64, 4, 128),
    (128, 192, 64, 4, 256),
)
SMALL = ((64, 128, 64, 4, 128), (64, 64, 64, 6, 128), (64, 256, 64, 4, 128))


def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function that compiles and gives the call."""
    case = operands.case
    found = (SMALL if case.M < 128 else LARGE)[: 2 if quick else None]
    for BM, BN, BK, stages, threads in found:
        BK = BK * 2 // operands.a.element_size()
        name = f"{BM}x{BN}x{BK}, {stages} stages, {threads} threads"
        tiling = BM, BN, BK, stages, threads
        yield name, functools.partial(_build, operands, tiling, case.precision.stored)
        if case.dtype == "tfloat32" and case.is_transposed:  # else its compiler takes mma.sync
            yield f"{name}, tfloat32 tiles", functools.partial(_build, operands, tiling, case.dtype)


def _build(operands: Any, tiling: tuple[int, ...], tiles: str) -> Callable[[], Any]:
    case, a, b, c = operands.case, operands.a, operands.b, operands.c
    precision = case.precision
    total = "int32" if case.dtype == "int8" else "float32"
    words = (case.is_transposed, precision.stored, tiles, precision.out, total)
    kernel = make_matmul(case.M, case.N, case.K, *tiling, *words)

    def call() -> Any:
        kernel(a, b, c)
        return c

    return call
