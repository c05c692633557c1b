"""The gradients of attention as ordinary tile code: five matmuls for each pair of tiles.

python examples/attention_backward.py     check it on NumPy arrays, wherever there is a device

The scheme is FlashAttention's (Dao et al., 2022): nothing of S x SK is kept, the weights are made
again from the forward pass's log-sum-exp. A block has some keys and goes through the queries that
see them. Its scores are transposed, keys along the rows: so the weights and their gradients are,
in registers, left operands of the products that become dV and dK.
"""

from __future__ import annotations

from typing import Any

import attention as forward
import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit

LOG2_E = 1.4426950408889634
ROWS = 128  # workspaces have a multiple of so many rows: any BM divides it
ROWWISE = T.GemmWarpPolicy.FullRow  # scores stay with the warps that multiply them again
STRIP = 64  # rows of a block that prepares or finishes


@tilejit(fast_math=True)
def attention_backward(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, LSE: T.Tensor, dO: T.Tensor,
    dQ: T.Tensor, dK: T.Tensor, dV: T.Tensor,
    *,
    BM=None, BN=None, threads=256, stages=None,
    is_causal=False, window=None, softcap=None, deterministic=False,
):  # fmt: skip
    """dQ, dK, dV: the gradients of `attention`, given its O and LSE and the gradient dO of O.

    Q, O, dO, dQ: (batch, heads, S, D); K, V, dK, dV: (batch, heads / group, SK, D), 16-bit floats;
    LSE: (batch, heads, S) float32. is_causal, window, softcap: as of `attention`. BM, BN: queries
    and keys of a tile. deterministic: dQ is made by a kernel of its own, which multiplies scores
    and their gradients again; else blocks add to it in float32 by atomics, in any order, and two
    runs may differ in its last bits. dK and dV have one order always.
    """
    batch, heads, S, D = Q.shape
    shared, SK = K.shape[1], K.shape[2]
    group = heads // shared
    members = group if D <= 128 else 1  # loops of a block, where registers for it are left
    is_light = D <= 64 and not softcap  # scores of 128 queries fit the registers
    BM, BN = BM or (128 if is_light else 64), BN or (128 if D <= 128 else 64)
    scale, none = 1 / D**0.5, -T.infinity("float32")
    rows = T.ceildiv(S, ROWS) * ROWS
    # of each query: the logarithm to base 2 of its sum of exponentials, and the sum of dO * O
    Stats = T.empty((batch, heads, 2, rows), "float32")
    if not deterministic:
        Sum = T.empty((batch, heads, rows, D), "float32")

    def is_seen(query, key):
        newest, seen = SK - S + query, key < SK
        if is_causal:
            seen = seen & (key <= newest)
        if window:
            seen = seen & (key > newest - window)
        return seen

    def power(score, stat):
        """The logarithm to base 2 of a score's weight, and what its gradient is multiplied by."""
        bend = 1
        if softcap:
            bent = T.tanh(score * (scale / softcap))
            score, bend = bent * (softcap / scale), 1 - bent * bent
        return score * (scale * LOG2_E) - stat, bend

    with T.Kernel(rows // STRIP, heads, batch, threads=128) as (block, head, z):
        o = T.alloc_fragment((STRIP, D), "float32")
        g = T.alloc_fragment((STRIP, D), "float32")
        total = T.alloc_fragment((STRIP,), "float32")
        T.copy(O[z, head, block * STRIP, 0], o)
        T.copy(dO[z, head, block * STRIP, 0], g)
        for i, d in T.Parallel(STRIP, D):
            o[i, d] *= g[i, d]
        T.reduce_sum(o, total, dim=1)
        T.copy(total, Stats[z, head, 1, block * STRIP])
        for i in T.Parallel(STRIP):
            lse = LSE[z, head, block * STRIP + i]
            Stats[z, head, 0, block * STRIP + i] = T.if_then_else(lse == none, 0.0, lse * LOG2_E)
        if not deterministic:
            for i, d in T.Parallel(STRIP, D):
                Sum[z, head, block * STRIP + i, d] = 0.0

    with T.Kernel(T.ceildiv(SK, BN), shared, batch, threads=threads) as (block, source, z):
        k = T.alloc_shared((BN, D), K.dtype)
        v = T.alloc_shared((BN, D), V.dtype)
        q = T.alloc_shared((BM, D), Q.dtype)
        g = T.alloc_shared((BM, D), dO.dtype)
        stats = T.alloc_shared((2, BM), "float32")
        scores = T.alloc_fragment((BN, BM), "float32")
        slopes = T.alloc_fragment((BN, BM), "float32")
        weights = T.alloc_fragment((BN, BM), Q.dtype)
        grads = T.alloc_fragment((BN, BM), Q.dtype)
        turned = T.alloc_shared((BN, BM), Q.dtype)
        left = grads if D <= 128 else turned  # warpgroups have all rows of few keys in parts
        dq = T.alloc_fragment((BM, D), "float32")
        dk = T.alloc_fragment((BN, D), "float32")
        dv = T.alloc_fragment((BN, D), "float32")
        across = threads // (2 * BM)  # warpgroups that share the columns of dQ
        if across > 1 and D // across % 64:  # each begins where a swizzle of the keys does
            half, quarter = T.make_half_bank_swizzled_layout, T.make_quarter_bank_swizzled_layout
            T.annotate_layout({k: (quarter if D // across % 32 else half)(k)})
        T.annotate_producer_reg_dealloc(24)
        T.annotate_consumer_reg_alloc(240)

        level = block * BN + S - SK  # the query level with the block's first key
        first = T.min(T.max(level, 0) // BM, T.ceildiv(S, BM)) if is_causal else 0
        last = T.min(T.max(level + BN + window - 1, 0), S) if window else S
        T.copy(K[z, source, block * BN, 0], k)
        T.copy(V[z, source, block * BN, 0], v)
        T.clear(dk)
        T.clear(dv)
        count = T.max(T.ceildiv(last, BM) - first, 0)
        for member in range(members):
            for number in T.Pipelined(group // members * count, num_stages=stages):
                head, step = source * group + member, first + number
                if members < group:
                    head, step = source * group + number // count, first + number % count
                T.copy(Q[z, head, step * BM, 0], q)
                T.copy(dO[z, head, step * BM, 0], g)
                T.copy(Stats[z, head, 0:2, step * BM : step * BM + BM], stats)
                T.gemm(k, q, scores, transpose_B=True, clear_accum=True, policy=ROWWISE)
                T.gemm(v, g, slopes, transpose_B=True, clear_accum=True, policy=ROWWISE)
                for i, j in T.Parallel(BN, BM):
                    scores[i, j], bend = power(scores[i, j], stats[0, j])
                    if softcap:
                        slopes[i, j] = (slopes[i, j] - stats[1, j]) * bend
                for i, j in T.Parallel(BN, BM):  # by itself: most tiles have nothing to hide
                    seen = is_seen(step * BM + j, block * BN + i)
                    scores[i, j] = T.if_then_else(seen, scores[i, j], none)
                for i, j in T.Parallel(BN, BM):
                    scores[i, j] = T.exp2(scores[i, j])
                for i, j in T.Parallel(BN, BM):
                    weights[i, j] = scores[i, j]
                    slope = slopes[i, j] if softcap else slopes[i, j] - stats[1, j]
                    grads[i, j] = scores[i, j] * slope
                T.gemm(weights, g, dv, policy=ROWWISE)
                if not deterministic or left is turned:
                    T.copy(grads, turned)
                if not deterministic:
                    T.gemm(turned, k, dq, transpose_A=True, clear_accum=True)
                T.gemm(left, q, dk, policy=ROWWISE)
                if not deterministic:
                    T.atomic_add(Sum[z, head, step * BM : step * BM + BM, :], dq)
        for i, d in T.Parallel(BN, D):
            dk[i, d] *= scale
        T.copy(dk, dK[z, source, block * BN, 0])
        T.copy(dv, dV[z, source, block * BN, 0])

    if not deterministic:
        with T.Kernel(T.ceildiv(S, STRIP), heads, batch, threads=128) as (block, head, z):
            for i, d in T.Parallel(STRIP, D):
                dQ[z, head, block * STRIP + i, d] = Sum[z, head, block * STRIP + i, d] * scale
        return

    BM, BN = (128, 64) if D <= 128 else (64, 64)
    with T.Kernel(T.ceildiv(S, BM), heads, batch, threads=threads) as (block, head, z):
        q = T.alloc_shared((BM, D), Q.dtype)
        g = T.alloc_shared((BM, D), dO.dtype)
        k = T.alloc_shared((BN, D), K.dtype)
        v = T.alloc_shared((BN, D), V.dtype)
        scores = T.alloc_fragment((BM, BN), "float32")
        slopes = T.alloc_fragment((BM, BN), "float32")
        grads = T.alloc_fragment((BM, BN), Q.dtype)
        top = T.alloc_fragment((BM,), "float32")
        total = T.alloc_fragment((BM,), "float32")
        dq = T.alloc_fragment((BM, D), "float32")

        source, level = head // group, block * BM + SK - S  # the first query's newest key
        first = T.max(level - window + 1, 0) // BN if window else 0
        last = T.min(T.max(level + BM, 0), SK) if is_causal else SK
        T.copy(Q[z, head, block * BM, 0], q)
        T.copy(dO[z, head, block * BM, 0], g)
        T.copy(Stats[z, head, 0, block * BM : block * BM + BM], top)
        T.copy(Stats[z, head, 1, block * BM : block * BM + BM], total)
        T.clear(dq)
        for step in T.Pipelined(first, T.ceildiv(last, BN), num_stages=stages):
            T.copy(K[z, source, step * BN, 0], k)
            T.copy(V[z, source, step * BN, 0], v)
            T.gemm(q, k, scores, transpose_B=True, clear_accum=True, policy=ROWWISE)
            T.gemm(g, v, slopes, transpose_B=True, clear_accum=True, policy=ROWWISE)
            for i, j in T.Parallel(BM, BN):
                scores[i, j], bend = power(scores[i, j], top[i])
                slopes[i, j] = (slopes[i, j] - total[i]) * bend
            for i, j in T.Parallel(BM, BN):
                seen = is_seen(block * BM + i, step * BN + j)
                scores[i, j] = T.if_then_else(seen, scores[i, j], none)
            for i, j in T.Parallel(BM, BN):
                grads[i, j] = T.exp2(scores[i, j]) * slopes[i, j]
            T.gemm(grads, k, dq, policy=ROWWISE)
        for i, d in T.Parallel(BM, D):
            dq[i, d] *= scale
        T.copy(dq, dQ[z, head, block * BM, 0])


def exact(
    q: Any, k: Any, v: Any, g: Any,
    is_causal: bool = False, window: int | None = None, softcap: float | None = None,
    kind: Any = np.float64,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The same in float64: dQ, dK and dV. kind: what O, the weights, the gradients of scores and
    the results are rounded to."""

    def rounded(x: Any) -> Any:
        return x.astype(kind).astype(np.float64)

    o, lse = forward.exact(q, k, v, is_causal, window, softcap, weight_dtype=kind)
    q, k, v, g = (x.astype(np.float64) for x in (q, k, v, g))
    group = q.shape[1] // k.shape[1]
    whole_k, whole_v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = 1 / q.shape[-1] ** 0.5
    scores, bend = q @ whole_k.swapaxes(-1, -2) * scale, 1.0
    if softcap:
        bent = np.tanh(scores / softcap)
        scores, bend = softcap * bent, 1 - bent**2
    S, SK = scores.shape[-2:]
    newest, key = np.arange(S)[:, None] + SK - S, np.arange(SK)
    seen = np.isfinite(lse)[..., None] & np.ones((S, SK), bool)
    if is_causal:
        seen &= key <= newest
    if window:
        seen &= key > newest - window
    power = np.where(seen, scores - np.where(np.isfinite(lse), lse, 0)[..., None], -np.inf)
    weights = np.exp(power)
    total = (g * rounded(o)).sum(-1, keepdims=True)
    grads = rounded(weights * (g @ whole_v.swapaxes(-1, -2) - total) * bend)
    of_members = (*k.shape[:2], group, SK, k.shape[-1])
    dk = (grads.swapaxes(-1, -2) @ q * scale).reshape(of_members).sum(2)
    dv = (rounded(weights).swapaxes(-1, -2) @ g).reshape(of_members).sum(2)
    return rounded(grads @ whole_k * scale), rounded(dk), rounded(dv)


def run(q: Any, k: Any, v: Any, g: Any, deterministic: bool = False, **options: Any) -> list[Any]:
    """dQ, dK, dV of NumPy arrays, the forward pass included."""
    o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
    forward.attention(q, k, v, o, lse, **options)
    results = [np.full_like(x, np.nan) for x in (q, k, v)]
    attention_backward(q, k, v, o, lse, g, *results, deterministic=deterministic, **options)
    return results


def check() -> None:
    """Compare with float64 on sizes that no tile divides."""
    rng = np.random.default_rng(0)
    S, SK, D = 100, 140, 64
    q, g = (rng.standard_normal((1, 2, S, D)).astype(ml_dtypes.bfloat16) for _ in range(2))
    k, v = (rng.standard_normal((1, 1, SK, D)).astype(ml_dtypes.bfloat16) for _ in range(2))
    options: dict[str, Any]
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 40, "softcap": 30.0}):
        wanted = exact(q, k, v, g, **options)
        rough = exact(q, k, v, g, **options, kind=q.dtype)
        for deterministic in (False, True):
            results = run(q, k, v, g, deterministic, **options)
            for name, result, right, near in zip("qkv", results, wanted, rough, strict=True):
                error = np.abs(result.astype(np.float64) - right).max()
                allowed = 2 * np.abs(near - right).max()
                assert error <= allowed, f"{options}: d{name} is wrong by {error}, not {allowed}"
    print(f"gradients over {S} x {SK}: right, full, causal, and in a window with soft-cap")


if __name__ == "__main__":
    check()
