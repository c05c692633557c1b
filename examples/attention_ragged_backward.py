"""The gradients of attention over ragged batches.

python examples/attention_ragged_backward.py    check it on NumPy arrays, where there is a device

The tile code of `attention_backward.py`, on sections of the packed tensors as in
`attention_ragged.py`. In the workspaces each sequence has whole tiles of its own.
"""

from __future__ import annotations

from typing import Any

import attention_backward as backward
import attention_ragged as forward
import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit

LOG2_E, ROWS, ROWWISE, STRIP = backward.LOG2_E, backward.ROWS, backward.ROWWISE, backward.STRIP


@tilejit(fast_math=True)
def attention_ragged_backward(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, LSE: T.Tensor, dO: T.Tensor,
    dQ: T.Tensor, dK: T.Tensor, dV: T.Tensor,
    starts_q: T.Tensor, starts_k: T.Tensor, longest_q: T.int32, longest_k: T.int32,
    *,
    BM=None, BN=None, threads=256, stages=None,
    is_causal=False, window=None, deterministic=False,
):  # fmt: skip
    """dQ, dK, dV: the gradients of `attention_ragged`, given its O and LSE and the gradient dO.

    Q, O, dO, dQ: (all queries, heads, D); K, V, dK, dV: (all keys, heads / group, D), 16-bit
    floats; LSE: (heads, all queries) float32. starts_q, starts_k, is_causal, window: as of
    `attention_ragged`; BM, BN, deterministic: as of `attention_backward`. longest_q, longest_k: no
    sequence has more queries, or keys.
    """
    total, heads, D = Q.shape
    shared, sequences = K.shape[1], starts_q.shape[0] - 1
    group = heads // shared
    members = group if D <= 128 else 1  # loops of a block, where registers for it are left
    BM, BN = BM or 64, BN or (128 if D <= 128 else 64)
    scale, none = 1 / D**0.5, -T.infinity("float32")
    rows = (total // ROWS + sequences) * ROWS
    # of each query: the logarithm to base 2 of its sum of exponentials, and the sum of dO * O
    Stats = T.empty((heads, 2, rows), "float32")
    if not deterministic:
        Sum = T.empty((heads, rows, D), "float32")

    def queries_of(z, *tensors, dim=0):
        return [T.section(t, starts_q[z], starts_q[z + 1], dim=dim) for t in tensors]

    def keys_of(z, *tensors):
        return [T.section(t, starts_k[z], starts_k[z + 1]) for t in tensors]

    def home(z):
        """Where a sequence begins in the workspaces: from there on it has whole tiles."""
        return (T.max(starts_q[z], 0) // ROWS + z) * ROWS

    def is_seen(query, key, S, SK):
        newest = SK - S + query
        # queries beyond the last, which may see keys beyond the last, are zero, and so are these
        seen = key <= newest if is_causal else key < SK
        if window:
            seen = seen & (key > newest - window)
        return seen

    def weight(score, stat, seen):
        return T.exp2(T.if_then_else(seen, score * (scale * LOG2_E) - stat, none))

    strips = T.ceildiv(longest_q, ROWS) * (ROWS // STRIP)
    with T.Kernel(strips, heads, sequences, threads=128) as (block, head, z):
        o = T.alloc_fragment((STRIP, D), "float32")
        g = T.alloc_fragment((STRIP, D), "float32")
        total = T.alloc_fragment((STRIP,), "float32")
        results, outer = queries_of(z, O, dO)
        (sums,) = queries_of(z, LSE, dim=1)
        row, start = block * STRIP, home(z)
        with T.If(row < T.ceildiv(results.shape[0], ROWS) * ROWS):
            T.copy(results[row : row + STRIP, head, :], o)
            T.copy(outer[row : row + STRIP, head, :], g)
            for i, d in T.Parallel(STRIP, D):
                o[i, d] *= g[i, d]
            T.reduce_sum(o, total, dim=1)
            T.copy(total, Stats[head, 1, start + row])
            for i in T.Parallel(STRIP):
                lse = sums[head, row + i]
                Stats[head, 0, start + row + i] = T.if_then_else(lse == none, 0.0, lse * LOG2_E)
            if not deterministic:
                for i, d in T.Parallel(STRIP, D):
                    Sum[head, start + row + i, d] = 0.0

    with T.Kernel(T.ceildiv(longest_k, BN), shared, sequences, threads=threads) as (
        block, source, z,
    ):  # fmt: skip
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
        is_lean = D > 128 and group == 1  # the sums of one head leave the producer more registers
        T.annotate_producer_reg_dealloc(40 if is_lean else 24)
        T.annotate_consumer_reg_alloc(232 if is_lean else 240)

        queries, outer = queries_of(z, Q, dO)
        keys, values, dkeys, dvalues = keys_of(z, K, V, dK, dV)
        S, SK, column, start = queries.shape[0], keys.shape[0], block * BN, home(z)
        level = column + (S - SK)  # the query level with the block's first key
        first = T.min(T.max(level, 0) // BM, T.ceildiv(S, BM)) if is_causal else 0
        last = T.min(T.max(level + BN + window - 1, 0), S) if window else S
        last = T.if_then_else(column < SK, last, 0)  # a branch would take registers
        T.clear(dk)
        T.clear(dv)
        T.copy(values[column : column + BN, source, :], v)
        T.copy(keys[column : column + BN, source, :], k)
        count = T.max(T.ceildiv(last, BM) - first, 0)
        for member in range(members):
            for number in T.Pipelined(group // members * count, num_stages=stages):
                head, step = source * group + member, first + number
                if members < group:
                    head, step = source * group + number // count, first + number % count
                row = step * BM
                T.copy(queries[row : row + BM, head, :], q)
                T.copy(outer[row : row + BM, head, :], g)
                T.copy(Stats[head, 0:2, start + row : start + row + BM], stats)
                T.gemm(k, q, scores, transpose_B=True, clear_accum=True, policy=ROWWISE)
                T.gemm(v, g, slopes, transpose_B=True, clear_accum=True, policy=ROWWISE)
                for i, j in T.Parallel(BN, BM):
                    seen = is_seen(row + j, column + i, S, SK)
                    scores[i, j] = weight(scores[i, j], stats[0, j], seen)
                for i, j in T.Parallel(BN, BM):
                    weights[i, j] = scores[i, j]
                    grads[i, j] = scores[i, j] * (slopes[i, j] - stats[1, j])
                T.gemm(weights, g, dv, policy=ROWWISE)
                if not deterministic or left is turned:
                    T.copy(grads, turned)
                if not deterministic:
                    T.gemm(turned, k, dq, transpose_A=True, clear_accum=True)
                T.gemm(left, q, dk, policy=ROWWISE)
                if not deterministic:
                    T.atomic_add(Sum[head, start + row : start + row + BM, :], dq)
        for i, d in T.Parallel(BN, D):
            dk[i, d] *= scale
        T.copy(dk, dkeys[column : column + BN, source, :])
        T.copy(dv, dvalues[column : column + BN, source, :])

    if not deterministic:
        with T.Kernel(T.ceildiv(longest_q, STRIP), heads, sequences, threads=128) as (
            block, head, z,
        ):  # fmt: skip
            (dqueries,) = queries_of(z, dQ)
            row, start = block * STRIP, home(z)
            with T.If(row < dqueries.shape[0]):
                for i, d in T.Parallel(STRIP, D):
                    dqueries[row + i, head, d] = Sum[head, start + row + i, d] * scale
        return

    BM, BN = (128, 64) if D <= 128 else (64, 64)
    with T.Kernel(T.ceildiv(longest_q, BM), heads, sequences, threads=threads) as (block, head, z):
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

        queries, outer, dqueries = queries_of(z, Q, dO, dQ)
        keys, values = keys_of(z, K, V)
        S, SK, row, start = queries.shape[0], keys.shape[0], block * BM, home(z)
        source, level = head // group, row + SK - S  # the first query's newest key
        first = T.max(level - window + 1, 0) // BN if window else 0
        last = T.min(T.max(level + BM, 0), SK) if is_causal else SK
        with T.If(row < S):
            T.copy(queries[row : row + BM, head, :], q)
            T.copy(outer[row : row + BM, head, :], g)
            T.copy(Stats[head, 0, start + row : start + row + BM], top)
            T.copy(Stats[head, 1, start + row : start + row + BM], total)
            T.clear(dq)
            for step in T.Pipelined(first, T.ceildiv(last, BN), num_stages=stages):
                column = step * BN
                T.copy(keys[column : column + BN, source, :], k)
                T.copy(values[column : column + BN, source, :], v)
                T.gemm(q, k, scores, transpose_B=True, clear_accum=True, policy=ROWWISE)
                T.gemm(g, v, slopes, transpose_B=True, clear_accum=True, policy=ROWWISE)
                for i, j in T.Parallel(BM, BN):
                    seen = is_seen(row + i, column + j, S, SK)
                    scores[i, j] = weight(scores[i, j], top[i], seen)
                    grads[i, j] = scores[i, j] * (slopes[i, j] - total[i])
                T.gemm(grads, k, dq, policy=ROWWISE)
            for i, d in T.Parallel(BM, D):
                dq[i, d] *= scale
            T.copy(dq, dqueries[row : row + BM, head, :])


def exact(
    q: Any, k: Any, v: Any, g: Any, starts_q: Any, starts_k: Any, **options: Any
) -> tuple[Any, ...]:
    """The same in float64: dQ, dK and dV; options as of `attention_backward.exact`. Rows of no
    sequence are NaN."""
    results = tuple(np.full(x.shape, np.nan) for x in (q, k, v))
    for z in range(len(starts_q) - 1):
        mine, theirs = slice(*starts_q[z : z + 2]), slice(*starts_k[z : z + 2])
        places = ((q, mine), (k, theirs), (v, theirs), (g, mine))
        parts = [x[rows].swapaxes(0, 1)[None] for x, rows in places]
        for whole, part, (_, rows) in zip(
            results, backward.exact(*parts, **options), places[:3], strict=True
        ):
            whole[rows] = part[0].swapaxes(0, 1)
    return results


def run(
    q: Any, k: Any, v: Any, g: Any, starts_q: Any, starts_k: Any,
    deterministic: bool = False, **options: Any,
) -> list[Any]:  # fmt: skip
    """dQ, dK, dV of NumPy arrays, the forward pass included. Rows of no sequence stay NaN."""
    longest = [int(np.diff(starts).max(initial=0)) for starts in (starts_q, starts_k)]
    o, lse = np.full_like(q, np.nan), np.full(q.shape[1::-1], np.nan, np.float32)
    forward.attention_ragged(q, k, v, o, lse, starts_q, starts_k, longest[0], **options)
    results = [np.full_like(x, np.nan) for x in (q, k, v)]
    attention_ragged_backward(
        q, k, v, o, lse, g, *results, starts_q, starts_k, *longest,
        deterministic=deterministic, **options,
    )  # fmt: skip
    return results


def check() -> None:
    """Compare with float64: sequences of lengths that no tile divides, and of none."""
    rng = np.random.default_rng(0)
    lengths, D = [(70, 130), (0, 40), (1, 90), (150, 0), (129, 60)], 64
    starts_q, starts_k = (forward.starts_of(x) for x in zip(*lengths, strict=True))
    kind = ml_dtypes.bfloat16
    q, g = (rng.standard_normal((starts_q[-1], 2, D)).astype(kind) for _ in range(2))
    k, v = (rng.standard_normal((starts_k[-1], 1, D)).astype(kind) for _ in range(2))
    options: dict[str, Any]
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 40}):
        wanted = exact(q, k, v, g, starts_q, starts_k, **options)
        rough = exact(q, k, v, g, starts_q, starts_k, **options, kind=q.dtype)
        for deterministic in (False, True):
            results = run(q, k, v, g, starts_q, starts_k, deterministic, **options)
            for name, result, right, near in zip("qkv", results, wanted, rough, strict=True):
                error = np.abs(result.astype(np.float64) - right).max()
                allowed = 2 * np.abs(near - right).max()
                assert error <= allowed, f"{options}: d{name} is wrong by {error}, not {allowed}"
    print(f"gradients of {len(lengths)} ragged sequences: right, full, causal, and in a window")


if __name__ == "__main__":
    check()
