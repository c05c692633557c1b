"""Where the block's threads meet."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.dtypes import int32
from tilejit.ir.expr import Var, VarKind, index
from tilejit.ir.node import For, walk
from tilejit.ir.sync import SyncThreads
from tilejit.passes import sync


@tilejit
def turned(A: T.Tensor, C: T.Tensor, *, rounds):
    """C[k] = A + k, backwards."""
    with T.Kernel(1, threads=128):
        s = T.alloc_shared((128,), "float32")
        for k in T.serial(rounds):
            for i in T.Parallel(128):
                s[i] = A[i] + k
            for i in T.Parallel(128):
                C[k, i] = s[127 - i]
        for i in T.Parallel(128):
            s[i] = 0.0
        for i in T.Parallel(128):
            C[rounds, i] = s[i]


@pytest.mark.parametrize("rounds, met", [(1, 2), (2, 3), (5, 3)])
def test_a_loop_of_one_round_does_not_meet_itself(executor, rounds, met):
    a = np.arange(128, dtype=np.float32)
    c = np.full((rounds + 1, 128), np.nan, np.float32)
    if executor == "gpu":
        pytest.skip("arrays on the host")
    turned(a, c, rounds=rounds)
    np.testing.assert_array_equal(c[:-1], a[::-1] + np.arange(rounds)[:, None])
    assert (c[-1] == 0).all()
    with options(target="sm_80"):
        plan = turned.compile(a, c, rounds=rounds).kernels[0].planned
    assert sum(isinstance(n, SyncThreads) for n in walk(plan.body)) == met


@pytest.mark.parametrize("rows, met", [(4, 0), (1, 1)])
def test_reduction_over_warps_meets_itself_in_a_loop(rows, met):
    """Between leaving parts and taking them; the next round leaves its own elsewhere."""

    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_fragment((rows, 1024), "float32")
            c = T.alloc_fragment((rows,), "float32")
            T.clear(c)
            for k in T.serial(5):
                T.copy(A[k * rows, 0], a)
                T.reduce_sum(a, c, clear=False)
            T.copy(c, C)

    plan = kernel.compile(T.Tensor((99, 1024), "float32"), T.Tensor((rows,), "float32"),
                          target="sm_80").kernels[0].planned  # fmt: skip
    assert sum(isinstance(n, SyncThreads) for n in walk(plan.body)) == met


N = Var("n", int32, VarKind.SYMBOL, index(1))


@pytest.mark.parametrize(
    "start, stop, step, expected",
    [
        (0, 1, 1, True),
        (3, 4, 1, True),
        (0, 2, 2, True),
        (0, 1, 2, True),
        (1, 0, -1, True),
        (1, -1, -2, True),
        (0, 0, 1, False),
        (1, 0, 1, False),
        (0, 1, -1, False),
        (0, 2, 1, False),
        (0, 3, 2, False),
        (2, 0, -1, False),
        (0, N, 1, False),
        (N, N, 1, False),
    ],
    ids=str,
)
def test_loops_that_surely_have_one_round(start, stop, step, expected):
    k = Var("k", int32, VarKind.LOOP)
    start, stop = (index(e) if isinstance(e, int) else e for e in (start, stop))
    loop = For(var=k, start=start, stop=stop, step=step, body=())
    assert sync._is_once(loop) == expected


@tilejit
def updated(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, reads):
    """C = A @ B + C, whose rows are read upside down, or by the warpgroup that stores them."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(C.shape[1], 64), T.ceildiv(M, 128), threads=256) as (bx, by):
        a = T.alloc_shared((128, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((128, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * 128, k * 32], a)
            T.copy(B[k * 32, bx * 64], b)
            T.gemm(a, b, acc)
        if reads:
            for i, j in T.Parallel(128, 64):
                acc[i, j] += C[by * 128 + 127 - i, bx * 64 + j]
        T.copy(acc, C[by * 128, bx * 64])


@pytest.mark.parametrize("reads, met", [(False, 0), (True, 1)])
def test_threads_have_read_what_a_bulk_store_overwrites(reads, met):
    spec = T.Tensor((256, 64), "bfloat16"), T.Tensor((64, 128), "bfloat16")
    out = T.Tensor((256, 128), "bfloat16")
    kernel = updated.compile(*spec, out, target="sm_90a", reads=reads)
    assert "acc -> C: by TMA" in kernel.explain()
    plan = kernel.kernels[0].planned
    meetings = [n for n in walk(plan.body) if isinstance(n, SyncThreads) and n.number is None]
    assert len(meetings) == met
