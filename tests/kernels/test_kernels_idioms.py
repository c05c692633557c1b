"""Attention in the way that TileLang's users write it: the mask stands in the accumulator before
the scores are added, maxima are kept by hand, sums are made anew each round, and results pass
through a tile in shared memory."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


@tilejit(fast_math=True)
def attention(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, *, is_causal=False, BM=128, BN=64, stages=2
):
    """Of (batch, S, heads, D)."""
    batch, S, heads, D = Q.shape
    exponent = D**-0.5 * 1.4426950408889634
    low = -T.infinity("float32")
    with T.Kernel(T.ceildiv(S, BM), heads, batch, threads=2 * BM) as (block, head, z):
        q, o = T.alloc_shared([BM, D], Q.dtype), T.alloc_shared([BM, D], Q.dtype)
        k, v = T.alloc_shared([BN, D], Q.dtype), T.alloc_shared([BN, D], Q.dtype)
        s, p = T.alloc_fragment([BM, BN], "float32"), T.alloc_fragment([BM, BN], Q.dtype)
        out = T.alloc_fragment([BM, D], "float32")
        best, before = T.alloc_fragment([BM], "float32"), T.alloc_fragment([BM], "float32")
        factor, added = T.alloc_fragment([BM], "float32"), T.alloc_fragment([BM], "float32")
        total = T.alloc_fragment([BM], "float32")
        T.copy(Q[z, block * BM : (block + 1) * BM, head, :], q)
        T.fill(out, 0)
        T.fill(total, 0)
        T.fill(best, low)
        stop = T.ceildiv(S, BN)
        if is_causal:
            stop = T.min(stop, T.ceildiv((block + 1) * BM, BN))
        for step in T.Pipelined(stop, num_stages=stages):
            T.copy(K[z, step * BN : (step + 1) * BN, head, :], k)
            for i, j in T.Parallel(BM, BN):
                seen = step * BN + j < S
                if is_causal:
                    seen = seen & (block * BM + i >= step * BN + j)
                s[i, j] = T.if_then_else(seen, 0, low)
            T.gemm(q, k, s, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
            T.copy(best, before)
            T.fill(best, low)
            T.reduce_max(s, best, dim=1, clear=False)
            for i in T.Parallel(BM):
                best[i] = T.max(best[i], before[i])
            for i in T.Parallel(BM):
                factor[i] = T.exp2(before[i] * exponent - best[i] * exponent)
            for i, j in T.Parallel(BM, BN):
                s[i, j] = T.exp2(s[i, j] * exponent - best[i] * exponent)
            T.reduce_sum(s, added, dim=1)
            for i in T.Parallel(BM):
                total[i] = total[i] * factor[i] + added[i]
            T.copy(s, p)
            for i, j in T.Parallel(BM, D):
                out[i, j] *= factor[i]
            T.copy(V[z, step * BN : (step + 1) * BN, head, :], v)
            T.gemm(p, v, out, policy=T.GemmWarpPolicy.FullRow)
        for i, j in T.Parallel(BM, D):
            out[i, j] /= total[i]
        T.copy(out, o)
        T.copy(o, O[z, block * BM : (block + 1) * BM, head, :])


def right(q, k, v, is_causal):
    q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights @ v / weights.sum(-1, keepdims=True)).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("S", "D"), [(300, 64), (256, 128)])
def test_attention_is_right(hopper, rng, S, D, is_causal):
    shape = (2, S, 2, D)
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for _ in range(3))
    o = hopper(attention, q, k, v, out=[(shape, np.float16)], is_causal=is_causal)
    assert abs(o - right(q, k, v, is_causal)).max() < 4e-3


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_nothing_is_done_that_the_example_does_not(is_causal):
    """No zeros are written where nothing is masked, and no tile takes the place of slots."""
    spec = T.Tensor((2, 4096, 16, 128), "bfloat16")
    arguments = {"is_causal": is_causal, "BN": 128, "target": "sm_90a"}
    compiled = attention.compile(spec, spec, spec, spec, **arguments)
    assert compiled.resources.spill_bytes == 0
    text = compiled.explain()
    assert "o is left out" in text and "out -> O: by TMA" in text
    assert ("no masks where" in text) == is_causal
    assert str(compiled.kernels[0].planned).count("s[i, j] = 0.0") == 0
