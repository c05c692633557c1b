"""Annotations and calls that a type checker has to accept; checked by test_language_typing.py."""

# ruff: noqa: F821

from typing import Any

import tilejit.language as T

M, N = 64, 32


def subscripted(
    a: T.Tensor[(M, N), "float16"],
    b: T.Tensor[M, N],
    c: T.Tensor[M],
    d: T.Tensor[[M, N], T.float16],
    e: T.StridedTensor[(M, N), (1, M), "float16"],
    f: T.SharedBuffer[(M, N), "float16"],
    g: T.FragmentBuffer[(M, N), "float32"],
    h: T.LocalBuffer[(4,), "float32"],
    i: T.BaseTensor[(M, N), "float32"],
) -> None:
    a[0, 0] = b[0, 0] + c[0]
    rows, columns = d.shape
    print(rows, columns, e.strides, f.dtype, g.scope, h.name, i.shape)


def bare(a: T.Tensor, b: T.StridedTensor, p: T.ptr, alpha: T.float32, n: T.int32) -> None:
    rows: Any = a.shape[0]
    with T.Kernel(T.ceildiv(rows, 64), threads=128) as bx:
        tile = T.alloc_shared((64, 32), a.dtype)
        acc = T.alloc_fragment((64, 64), T.float32)
        total = T.alloc_var("int32", init=0)
        bars = T.alloc_barrier([128, 128])
        T.copy(a[bx * 64, 0], tile)
        T.gemm(tile, tile, acc, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
        for i, j in T.Parallel(64, 64):
            acc[i, j] = T.exp(acc[i, j]) * alpha + T.cast(n, "float32") + T.float32(1)
        T.barrier_arrive(bars[0])
        T.copy(acc, b[bx * 64, 0])
        other = T.make_tensor(p, (rows,), "float16")
        other[0] = total


def called() -> None:
    made = T.Tensor((M, N), "float16")
    strided = T.StridedTensor((M, N), (1, M), "float16")
    shared = T.SharedBuffer((M, N), "float16", strides=(40, 1), align=16, offset_factor=8)
    pointer = T.ptr("float16", "global", is_size_var=True)
    print(made.shape, strided.strides, shared.scope, pointer.dtype)
