"""The gradients of attention as ordinary tile code: five matmuls a tile, four of them in registers.

python examples/attention_backward.py     check it on NumPy arrays, wherever there is a device

The scheme is FlashAttention's (Dao et al., 2022): nothing of S x SK is kept, the weights are made
again from the forward pass's log-sum-exp. A block has some keys and goes through the queries that
see them, with scores transposed, keys along the rows: so the weights and their gradients are left
operands of the products that become dV and dK where they are, in registers.
"""

from __future__ import annotations

import tilejit.language as T
from tilejit import tilejit

LOG2_E = 1.4426950408889634
ROWS = 128  # that the workspaces' rows are a multiple of: every BM divides it


@tilejit(fast_math=True)
def attention_backward(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, LSE: T.Tensor, dO: T.Tensor,
    dQ: T.Tensor, dK: T.Tensor, dV: T.Tensor,
    *,
    BM=None, BN=None, threads=256, stages=None,
    is_causal=False, window=None, softcap=None, deterministic=False,
):  # fmt: skip
    batch, heads, S, D = Q.shape
    shared, SK = K.shape[1], K.shape[2]
    group = heads // shared
    BM = BM or 64
    BN = BN or 128
    scale = 1 / D**0.5
    none = -T.infinity("float32")
    rows = T.ceildiv(S, ROWS) * ROWS
    Top = T.empty((batch, heads, rows), "float32")
    Delta = T.empty((batch, heads, rows), "float32")
    Sum = T.empty((batch, heads, rows, D), "float32")

    with T.Kernel(rows // 64, heads, batch, threads=128) as (block, head, z):
        o = T.alloc_fragment((64, D), "float32")
        g = T.alloc_fragment((64, D), "float32")
        delta = T.alloc_fragment((64,), "float32")
        T.copy(O[z, head, block * 64, 0], o)
        T.copy(dO[z, head, block * 64, 0], g)
        for i, d in T.Parallel(64, D):
            o[i, d] *= g[i, d]
        T.reduce_sum(o, delta, dim=1)
        for i in T.Parallel(64):
            lse = LSE[z, head, block * 64 + i]
            Top[z, head, block * 64 + i] = T.if_then_else(lse == none, 0.0, lse * LOG2_E)
        T.copy(delta, Delta[z, head, block * 64])
        for i, d in T.Parallel(64, D):
            Sum[z, head, block * 64 + i, d] = 0.0

    with T.Kernel(T.ceildiv(SK, BN), shared, batch, threads=threads) as (block, source, z):
        k = T.alloc_shared((BN, D), K.dtype)
        v = T.alloc_shared((BN, D), V.dtype)
        q = T.alloc_shared((BM, D), Q.dtype)
        g = T.alloc_shared((BM, D), dO.dtype)
        top = T.alloc_shared((BM,), "float32")
        delta = T.alloc_shared((BM,), "float32")
        turned = T.alloc_shared((BN, BM), Q.dtype)
        scores = T.alloc_fragment((BN, BM), "float32")
        slopes = T.alloc_fragment((BN, BM), "float32")
        weights = T.alloc_fragment((BN, BM), Q.dtype)
        grads = T.alloc_fragment((BN, BM), Q.dtype)
        dq = T.alloc_fragment((BM, D), "float32")
        dk = T.alloc_fragment((BN, D), "float32")
        dv = T.alloc_fragment((BN, D), "float32")

        first, last = block * BN + S - SK, block * BN + BN + S - SK  # queries level with the keys
        start = T.min(T.max(first, 0) // BM, T.ceildiv(S, BM)) if is_causal else 0
        stop = T.ceildiv(T.max(T.min(last + window - 1, S), 0) if window else S, BM)
        T.copy(K[z, source, block * BN, 0], k)
        T.copy(V[z, source, block * BN, 0], v)
        T.clear(dk)
        T.clear(dv)
        for member in range(group):
            head = source * group + member
            for step in T.Pipelined(start, stop, num_stages=stages):
                T.copy(Q[z, head, step * BM, 0], q)
                T.copy(Top[z, head, step * BM], top)
                T.copy(dO[z, head, step * BM, 0], g)
                T.copy(Delta[z, head, step * BM], delta)
                T.gemm(k, q, scores, transpose_B=True, clear_accum=True)
                T.gemm(v, g, slopes, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(BN, BM):
                    key, newest = block * BN + i, SK - S + step * BM + j
                    seen = key < SK
                    if is_causal:
                        seen = seen & (key <= newest)
                    if window:
                        seen = seen & (key > newest - window)
                    power = scores[i, j] * (scale * LOG2_E) - top[j]
                    scores[i, j] = T.exp2(T.if_then_else(seen, power, none))
                T.copy(scores, weights)
                T.gemm(weights, g, dv)
                for i, j in T.Parallel(BN, BM):
                    grads[i, j] = scores[i, j] * (slopes[i, j] - delta[j])
                T.copy(grads, turned)
                T.gemm(grads, q, dk)
                T.gemm(turned, k, dq, transpose_A=True, clear_accum=True)
                T.atomic_add(Sum[z, head, step * BM : step * BM + BM, :], dq)
        for i, d in T.Parallel(BN, D):
            dk[i, d] *= scale
        T.copy(dk, dK[z, source, block * BN, 0])
        T.copy(dv, dV[z, source, block * BN, 0])

    with T.Kernel(T.ceildiv(S, 64), heads, batch, threads=128) as (block, head, z):
        for i, d in T.Parallel(64, D):
            dQ[z, head, block * 64 + i, d] = Sum[z, head, block * 64 + i, d] * scale
