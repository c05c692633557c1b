"""Rows in registers: how wide they are read and written, and loops that use statistics of rows."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


@tilejit
def scaled_rows(A: T.Tensor, W: T.Tensor, B: T.Tensor, *, BM=1, threads=128):
    """B = A * W * sum(A * W, 1): loops of fragments alone stand between those that use memory."""
    M, N = A.shape
    with T.Kernel(T.ceildiv(M, BM), threads=threads) as block:
        w = T.alloc_fragment((N,), W.dtype)
        x, y = T.alloc_fragment((BM, N), A.dtype), T.alloc_fragment((BM, N), "float32")
        total = T.alloc_fragment((BM,), "float32")
        T.copy(W, w)
        T.copy(A[block * BM, 0], x)
        for i, j in T.Parallel(BM, N):
            y[i, j] = T.cast(x[i, j], "float32") * T.cast(w[j], "float32")
        T.reduce_sum(y, total, dim=1)
        for i, j in T.Parallel(BM, N):
            y[i, j] *= total[i]
        T.copy(y, B[block * BM, 0])


@tilejit
def staged_rows(A: T.Tensor, B: T.Tensor, *, BM=8, threads=128):
    """B = A * sum(A, 1), from a tile in shared memory: only the sums are in registers."""
    M, N = A.shape
    with T.Kernel(T.ceildiv(M, BM), threads=threads) as block:
        tile = T.alloc_shared((BM, N), A.dtype)
        x, total = T.alloc_fragment((BM, N), "float32"), T.alloc_fragment((BM,), "float32")
        T.copy(A[block * BM, 0], tile)
        T.copy(tile, x)
        T.reduce_sum(x, total, dim=1)
        for i, j in T.Parallel(BM, N):
            B[block * BM + i, j] = tile[i, j] * total[i]


def accesses(ptx):
    """The kinds of accesses to memory, and how many bytes each moves."""
    found = re.findall(r"\b(ld|st)\.(global|shared)[\w.:]*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx)
    return {(op, space, int(count or 1) * int(bits) // 8) for op, space, count, bits in found}


def brain(*shape):
    return T.Tensor(shape, "bfloat16")


@pytest.mark.parametrize("BM, N", [(1, 2048), (8, 256), (16, 128), (4, 1000), (1, 3000)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_rows_are_read_and_written_16_bytes_at_a_time(target, BM, N):
    spec = brain(BM * 3, N)
    for threads in (128, 256):
        kernel = scaled_rows.compile(spec, brain(N), spec, BM=BM, threads=threads, target=target)
        widths = {width for op, space, width in accesses(kernel.ptx) if space == "global"}
        assert widths == {16}, kernel.explain()
        assert kernel.resources.spill_bytes == 0


@pytest.mark.parametrize("N", [1000, 1024, 2040])
def test_tiles_that_the_threads_do_not_divide_are_accessed_as_widely(N):
    kernel = staged_rows.compile(brain(24, N), brain(24, N), target="sm_90a")
    wide = {(op, space) for op, space, width in accesses(kernel.ptx) if width == 16}
    assert {("ld", "global"), ("st", "global"), ("ld", "shared"), ("st", "shared")} <= wide
    assert not any(width < 4 for _, _, width in accesses(kernel.ptx)), accesses(kernel.ptx)
    # the sums stay where they are: the loop is spread like what was reduced
    assert "goes through shared memory" not in kernel.explain()


@pytest.mark.parametrize("M, N", [(1, 1), (3, 7), (5, 127), (9, 128), (17, 1000), (8, 1031)])
@pytest.mark.parametrize("BM", [1, 8])
def test_rows_of_any_length_are_right(run, rng, M, N, BM):
    a = rng.integers(-3, 4, (M, N)).astype(np.float32)
    w = rng.integers(-2, 3, N).astype(np.float32)
    b = run(scaled_rows, a, w, out=[((M, N), np.float32)], BM=BM)
    assert (b == a * w * (a * w).sum(1, keepdims=True)).all()
    c = run(staged_rows, a, out=[((M, N), np.float32)], BM=BM)
    assert (c == a * a.sum(1, keepdims=True)).all()
