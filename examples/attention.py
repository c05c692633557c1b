"""Attention as ordinary tile code: two matmuls with a softmax between them in registers.

python examples/attention.py               check it on NumPy arrays, wherever there is a device
python examples/attention.py --bench       time it (needs a GPU, torch); --bench --help says what

Online softmax as in Milakov and Gimelshein (2018) and FlashAttention (Dao et al., 2022). Nothing in
the compiler knows of attention: what keeps the scores in registers, brings K and V in rings of
their own and hands the probabilities to the second matmul are the passes that any program gets.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@tilejit(fast_math=True)
def attention(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, LSE: T.Tensor,
    *,
    BM=None, BN=None, threads=None, is_causal=False, window=None, softcap=None,
):  # fmt: skip
    """O = softmax(Q @ K.T / sqrt(D)) @ V for each head.

    Q, O: (batch, heads, S, D); K, V: (batch, heads / group, SK, D), 16-bit floats; several heads
    may share one of K and V. LSE: (batch, heads, S) float32, the log of the sum of exponentials of
    a row's scores. is_causal: query i sees keys up to i + SK - S. window: and no more than so many
    of them. softcap: scores become softcap * tanh(score / softcap). A row that sees no key is zero,
    its LSE minus infinity.
    """
    batch, heads, S, D = Q.shape
    shared, SK = K.shape[1], K.shape[2]
    BM = BM or (192 if D <= 64 and not is_causal else 128)
    BN = BN or (80 if D > 128 else 176 if D == 128 and is_causal and SK >= 8192 else 128)
    threads = threads or 2 * BM
    none = -T.infinity("float32")
    scale = LOG2_E * (softcap or D**-0.5)  # of scores, for exp2
    with T.Kernel(T.ceildiv(S, BM), heads, batch, threads=threads) as (block, head, z):
        q = T.alloc_shared((BM, D), Q.dtype)
        k = T.alloc_shared((BN, D), K.dtype)
        v = T.alloc_shared((BN, D), V.dtype)
        scores = T.alloc_fragment((BM, BN), "float32")
        weights = T.alloc_fragment((BM, BN), Q.dtype)
        out = T.alloc_fragment((BM, D), "float32")
        top = T.alloc_fragment((BM,), "float32")
        base = T.alloc_fragment((BM,), "float32")
        fade = T.alloc_fragment((BM,), "float32")
        total = T.alloc_fragment((BM,), "float32")

        source = head // (heads // shared)
        last = SK - S + block * BM + BM  # what the block's last query sees ends before this key
        stop = T.ceildiv(T.max(T.min(last, SK), 0) if is_causal else SK, BN)
        T.copy(Q[z, head, block * BM, 0], q)
        T.clear(out)
        T.clear(total)
        T.fill(top, none)
        for step in T.Pipelined(stop):
            T.copy(K[z, source, step * BN, 0], k)
            T.clear(scores)
            T.gemm(q, k, scores, transpose_B=True)
            if softcap:
                for i, j in T.Parallel(BM, BN):
                    scores[i, j] = T.tanh(scores[i, j] * (D**-0.5 / softcap))
            for i, j in T.Parallel(BM, BN):
                key, newest = step * BN + j, SK - S + block * BM + i
                seen = key < SK
                if is_causal:
                    seen = seen & (key <= newest)
                if window:
                    seen = seen & (key > newest - window)
                scores[i, j] = T.if_then_else(seen, scores[i, j], none)
            T.copy(top, fade)
            T.reduce_max(scores, top, dim=1, clear=False)
            for i in T.Parallel(BM):
                base[i] = T.if_then_else(top[i] == none, 0.0, top[i] * scale)
                fade[i] = T.exp2(fade[i] * scale - base[i])
                total[i] *= fade[i]
            for i, j in T.Parallel(BM, BN):
                scores[i, j] = T.exp2(scores[i, j] * scale - base[i])
            T.reduce_sum(scores, total, dim=1, clear=False)
            T.copy(scores, weights)
            for i, d in T.Parallel(BM, D):
                out[i, d] *= fade[i]
            T.copy(V[z, source, step * BN, 0], v)
            T.gemm(weights, v, out)
        for i, d in T.Parallel(BM, D):
            out[i, d] *= T.if_then_else(total[i] > 0, 1 / total[i], 0.0)
        T.copy(out, O[z, head, block * BM, 0])
        for i in T.Parallel(BM):
            total[i] = (top[i] * scale + T.log2(total[i])) * LN_2
        T.copy(total, LSE[z, head, block * BM])


def exact(
    q, k, v, is_causal=False, window=None, softcap=None, weight_dtype=np.float64, weight_scale=1.0
):  # fmt: skip
    """The same in float64: O and LSE. weight_dtype: what the weights times weight_scale are
    rounded to."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    S, SK = scores.shape[-2:]
    newest, key = np.arange(S)[:, None] + SK - S, np.arange(SK)
    seen = np.ones((S, SK), bool)
    if is_causal:
        seen &= key <= newest
    if window:
        seen &= key > newest - window
    scores = np.where(seen, scores, -np.inf)
    with np.errstate(divide="ignore"):
        top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), -1e300)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        lse = np.log(total) + top
    weights = (weights * weight_scale).astype(weight_dtype).astype(np.float64) / weight_scale
    return weights @ v / np.maximum(total, 1e-300), np.where(total > 0, lse, -np.inf)[..., 0]


def check() -> None:
    """Compare with float64 on sizes that no tile divides."""
    rng = np.random.default_rng(0)
    S, SK, D = 150, 170, 64
    q = rng.standard_normal((1, 4, S, D)).astype(ml_dtypes.bfloat16)
    k, v = (rng.standard_normal((1, 2, SK, D)).astype(ml_dtypes.bfloat16) for _ in range(2))
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 40, "softcap": 30.0}):
        o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
        attention(q, k, v, o, lse, **options)
        wanted, wanted_lse = exact(q, k, v, **options)
        error = np.abs(o.astype(np.float64) - wanted).max()
        assert error < 0.02, f"{options}: wrong by {error}"
        bound = 2e-3 if "softcap" in options else 1e-3  # fast_math's tanh has 11 bits
        assert np.abs(lse - wanted_lse).max() < bound, options
    print(f"attention over {S} x {SK}: right, full, causal, and in a window with soft-cap")


if __name__ == "__main__":
    from bench_options import script

    script(__doc__, check, "attention_bench")
