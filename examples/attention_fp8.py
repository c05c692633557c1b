"""Attention with operands of 8 bits: `attention.py` for Q, K and V in float8_e4m3, with scales.

python examples/attention_fp8.py           check it on NumPy arrays, wherever there is a device

The weights are rounded to 8 bits too, so both multiplies run at twice the rate of 16 bits on chips
that have it. They stay in registers: nothing below says so, the compiler makes the scores in the
order of columns that the second multiply takes (`explain()` says how). V comes transposed, with its
keys next to each other: warpgroups multiply no other operands of 8 bits (PTX ISA, "wgmma"), and
whoever rounds V to 8 bits can write it so at no cost.

Hopper adds products of fp8 with some 14 bits and cuts off what is below, towards zero. Where V has
both signs that is less than what rounding the weights to 4 bits does; where it has one, sums over
thousands of keys come out per cents too small. `exact_sums` adds each tile's sums in float32.
"""

from __future__ import annotations

import attention as forward
import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit

E4M3 = ml_dtypes.float8_e4m3fn
LOG2_E, LN_2 = forward.LOG2_E, forward.LN_2
BITS = 8  # 2**8 is the largest power of two in e4m3: weights up to it use all of its exponents
FULL_ROW = T.GemmWarpPolicy.FullRow


@tilejit(fast_math=True)
def attention_fp8(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, QS: T.Tensor, KS: T.Tensor, VS: T.Tensor,
    O: T.Tensor, LSE: T.Tensor,
    *,
    BM=None, BN=None, threads=None, is_causal=False, exact_sums=False,
):  # fmt: skip
    """O = softmax(Q @ K.T / sqrt(D)) @ V for each head, of Q * QS, K * KS and V * VS.

    Q: (batch, heads, S, D); K: (batch, heads / group, SK, D); V: (batch, heads / group, D, SK), its
    last two dimensions swapped; all float8_e4m3fn. QS, KS, VS: float32, (batch, heads of the
    tensor) or (1, 1), above 0. O: (batch, heads, S, D), 16-bit floats. LSE: (batch, heads, S)
    float32, the log of the sum of exponentials of a row's scores. is_causal: query i sees keys up
    to i + SK - S. exact_sums: products are summed over a tile of keys at a time, tiles in float32
    (for D up to 128). A row that sees no key is zero, its LSE minus infinity.
    """
    batch, heads, S, D = Q.shape
    shared, SK = K.shape[1], K.shape[2]
    if V.shape != (*K.shape[:2], D, SK):
        raise ValueError(f"V is {V.shape}; for K of {K.shape} it is {(*K.shape[:2], D, SK)}")
    BM = BM or 128
    BN = BN or (96 if exact_sums or D > 128 else 128)
    threads = threads or 2 * BM
    none = -T.infinity("float32")

    def scale_of(scales, z, head):
        return scales[z if scales.shape[0] > 1 else 0, head if scales.shape[1] > 1 else 0]

    with T.Kernel(T.ceildiv(S, BM), heads, batch, threads=threads) as (block, head, z):
        q = T.alloc_shared((BM, D), Q.dtype)
        k = T.alloc_shared((BN, D), K.dtype)
        v = T.alloc_shared((D, BN), V.dtype)
        scores = T.alloc_fragment((BM, BN), "float32")
        weights = T.alloc_fragment((BM, BN), V.dtype)
        out = T.alloc_fragment((BM, D), "float32")
        part = T.alloc_fragment((BM, D), "float32")
        top = T.alloc_fragment((BM,), "float32")
        base = T.alloc_fragment((BM,), "float32")
        fade = T.alloc_fragment((BM,), "float32")
        total = T.alloc_fragment((BM,), "float32")

        source = head // (heads // shared)
        scale = scale_of(QS, z, head) * scale_of(KS, z, source) * (LOG2_E * D**-0.5)  # for exp2
        last = SK - S + block * BM + BM  # what the block's last query sees ends before this key
        stop = T.ceildiv(T.max(T.min(last, SK), 0) if is_causal else SK, BN)
        T.copy(Q[z, head, block * BM, 0], q)
        T.clear(out)
        T.clear(total)
        T.fill(top, none)
        for step in T.Pipelined(stop):
            T.copy(K[z, source, step * BN, 0], k)
            T.clear(scores)
            T.gemm(q, k, scores, transpose_B=True, policy=FULL_ROW)
            for i, j in T.Parallel(BM, BN):
                key, newest = step * BN + j, SK - S + block * BM + i
                seen = key < SK
                if is_causal:
                    seen = seen & (key <= newest)
                scores[i, j] = T.if_then_else(seen, scores[i, j], none)
            T.copy(top, fade)
            T.reduce_max(scores, top, dim=1, clear=False)
            for i in T.Parallel(BM):
                base[i] = T.if_then_else(top[i] == none, 0.0, top[i] * scale - BITS)
                fade[i] = T.exp2(fade[i] * scale - BITS - base[i])
                total[i] *= fade[i]
            for i, j in T.Parallel(BM, BN):
                scores[i, j] = T.exp2(scores[i, j] * scale - base[i])
            T.reduce_sum(scores, total, dim=1, clear=False)
            T.copy(scores, weights)
            T.copy(V[z, source, 0, step * BN], v)
            if exact_sums:
                T.clear(part)
                T.gemm(weights, v, part, transpose_B=True, policy=FULL_ROW)
                for i, d in T.Parallel(BM, D):
                    out[i, d] = out[i, d] * fade[i] + part[i, d]
            else:
                for i, d in T.Parallel(BM, D):
                    out[i, d] *= fade[i]
                T.gemm(weights, v, out, transpose_B=True, policy=FULL_ROW)
        last_scale = scale_of(VS, z, source)
        for i, d in T.Parallel(BM, D):
            out[i, d] *= T.if_then_else(total[i] > 0, last_scale / total[i], 0.0)
        T.copy(out, O[z, head, block * BM, 0])
        for i in T.Parallel(BM):
            total[i] = (top[i] * scale + T.log2(total[i]) - BITS) * LN_2
        T.copy(total, LSE[z, head, block * BM])


def quantised(x):
    """x in 8 bits, and for each head the number to multiply that by: its largest becomes 448."""
    scale = np.abs(x).max((-1, -2), initial=1e-30) / float(ml_dtypes.finfo(E4M3).max)
    return (x / scale[..., None, None]).astype(E4M3), scale.astype(np.float32)


def exact(q, k, v, qs, ks, vs, is_causal=False, is_rounded=False):
    """The same in float64: O and LSE. is_rounded: of weights rounded to 8 bits."""
    q, k, v = (
        x.astype(np.float64) * np.float64(s)[..., None, None]
        for x, s in ((q, qs), (k, ks), (v.swapaxes(-1, -2), vs))
    )
    rounding = {"weight_dtype": E4M3, "weight_scale": 2.0**BITS} if is_rounded else {}
    return forward.exact(q, k, v, is_causal=is_causal, **rounding)


def run(q, k, v, qs, ks, vs, dtype, **options):
    """O and LSE on NumPy arrays."""
    o, lse = np.full(q.shape, np.nan, dtype), np.full(q.shape[:3], np.nan, np.float32)
    attention_fp8(q, k, v, qs, ks, vs, o, lse, **options)
    return o, lse


def check() -> None:
    """Compare with float64: at most twice the error that rounded weights and results have."""
    rng = np.random.default_rng(0)
    S, SK, D = 150, 180, 64
    q, qs = quantised(rng.standard_normal((1, 4, S, D)))
    k, ks = quantised(rng.standard_normal((1, 2, SK, D)))
    v, vs = quantised(rng.standard_normal((1, 2, D, SK)))
    for options in ({}, {"is_causal": True}):
        o, lse = run(q, k, v, qs, ks, vs, ml_dtypes.bfloat16, **options)
        wanted, wanted_lse = exact(q, k, v, qs, ks, vs, **options)
        rough = exact(q, k, v, qs, ks, vs, is_rounded=True, **options)[0].astype(o.dtype)
        error = np.abs(o.astype(np.float64) - wanted).max()
        assert error <= 2 * np.abs(rough.astype(np.float64) - wanted).max(), f"wrong by {error}"
        assert np.abs(lse - wanted_lse).max() < 2e-3, options
    print(f"fp8 attention over {S} x {SK}: right, full and causal")


if __name__ == "__main__":
    check()
