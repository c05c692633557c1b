"""What explain() says of loops whose fragments do not fit the registers, and where nothing."""

from __future__ import annotations

import pytest

import tilejit.language as T
from tilejit import tilejit


@tilejit
def chain(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, N2, threads, around=False):
    """2 ** (A @ B.T) @ D, divided by its rows' lengths; around: in a loop of two rounds."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(M, 128), threads=threads) as by:
        a = T.alloc_shared((128, K), A.dtype)
        b = T.alloc_shared((128, K), B.dtype)
        d = T.alloc_shared((128, N2), D.dtype)
        s = T.alloc_fragment((128, 128), "float32")
        p = T.alloc_fragment((128, 128), A.dtype)
        acc = T.alloc_fragment((128, N2), "float32")
        squares = T.alloc_fragment((128, N2), "float32")
        length = T.alloc_fragment((128,), "float32")
        T.copy(A[by * 128, 0], a)
        for _ in T.serial(2 if around else 1):
            T.clear(acc)
            for n in T.Pipelined(T.ceildiv(B.shape[0], 128), num_stages=2):
                T.copy(B[n * 128, 0], b)
                T.copy(D[n * 128, 0], d)
                T.gemm(a, b, s, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(128, 128):
                    p[i, j] = T.exp2(s[i, j])
                T.gemm(p, d, acc)
            for i, j in T.Parallel(128, N2):
                squares[i, j] = acc[i, j] * acc[i, j]
            T.reduce_sum(squares, length, dim=1)
            for i, j in T.Parallel(128, N2):
                C[by * 128 + i, j] = acc[i, j] * T.rsqrt(length[i])


def compiled(N2, threads, target="sm_90a", **constants):
    half = [T.Tensor(shape, "bfloat16") for shape in ((512, 64), (512, 64), (512, N2))]
    out = T.Tensor((512, N2), "float32")
    return chain.compile(*half, out, target=target, N2=N2, threads=threads, **constants)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_fragments_that_do_not_fit_are_told_with_a_remedy(target):
    kernel = compiled(128, 128, target)
    (note,) = (line for line in kernel.explain().splitlines() if "registers of a thread" in line)
    assert "test_passes_pressure.py:" in note
    assert "fragments take 256 registers of a thread, which has 255: some are spilled" in note
    assert "take more threads or smaller tiles" in note
    assert kernel.resources.spill_bytes


@pytest.mark.parametrize("N2, threads, around", [(128, 256, False), (64, 128, True)])
def test_what_lives_after_the_loop_does_not_count(N2, threads, around):
    """An operand takes the place of what it is made of, and squares that of the scores."""
    kernel = compiled(N2, threads, around=around)
    assert "some are spilled" not in kernel.explain()
    assert not kernel.resources.spill_bytes
