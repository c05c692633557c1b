"""Attention over ragged batches: sequences of any lengths, packed one after the other.

python examples/attention_ragged.py        check it on NumPy arrays, wherever there is a device

The same tile code as `attention.py`. Each sequence is a section of the packed tensors, whose ends
are its own: tiles that reach beyond them read zeros there and write nothing, whatever the
neighbours hold. Where sections begin is read from memory by whoever needs it.
"""

from __future__ import annotations

import attention as forward
import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit

LOG2_E, LN_2 = forward.LOG2_E, forward.LN_2


@tilejit(fast_math=True)
def attention_ragged(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, LSE: T.Tensor,
    starts_q: T.Tensor, starts_k: T.Tensor, longest: T.int32,
    *,
    BM=None, BN=None, threads=None, is_causal=False, window=None,
):  # fmt: skip
    """O = softmax(Q @ K.T / sqrt(D)) @ V for each head of each sequence.

    Q, O: (all queries, heads, D); K, V: (all keys, heads / group, D), 16-bit floats; several heads
    may share one of K and V. LSE: (heads, all queries) float32, as `attention.py` has it.
    starts_q, starts_k: (sequences + 1,) int32, where the sequences' queries and keys begin in the
    packed tensors, and where the last ones end. longest: no sequence has more queries; it may be
    larger, at the price of tiles without work. is_causal: the last query of a sequence sees its
    last key, the one before it one less; window: and no more than so many. A row that sees no key
    is zero, its LSE minus infinity.
    """
    heads, D = Q.shape[1:]
    shared, sequences = K.shape[1], starts_q.shape[0] - 1
    BM = BM or (192 if D <= 64 and not is_causal else 128)
    BN = BN or (128 if D <= 128 else 80)
    threads = threads or 2 * BM
    none = -T.infinity("float32")
    scale = LOG2_E * D**-0.5  # of scores, for exp2
    with T.Kernel(T.ceildiv(longest, BM), heads, sequences, threads=threads) as (block, head, z):
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

        queries = T.section(Q, starts_q[z], starts_q[z + 1])
        results = T.section(O, starts_q[z], starts_q[z + 1])
        sums = T.section(LSE, starts_q[z], starts_q[z + 1], dim=1)
        keys = T.section(K, starts_k[z], starts_k[z + 1])
        values = T.section(V, starts_k[z], starts_k[z + 1])
        S, SK = queries.shape[0], keys.shape[0]
        row, source = block * BM, head // (heads // shared)
        last = SK - S + row + BM  # what the block's last query sees ends before this key
        stop = T.ceildiv(T.max(T.min(last, SK), 0) if is_causal else SK, BN)
        first = T.max(SK - S + row - window + 1, 0) // BN if window else 0
        with T.If(row < S):
            T.copy(queries[row : row + BM, head, :], q)
            T.clear(out)
            T.clear(total)
            T.fill(top, none)
            for step in T.Pipelined(first, stop):
                T.copy(keys[step * BN : step * BN + BN, source, :], k)
                T.clear(scores)
                T.gemm(q, k, scores, transpose_B=True)
                for i, j in T.Parallel(BM, BN):
                    key, newest = step * BN + j, SK - S + row + i
                    # rows beyond the last query, which may see keys beyond the last, are not stored
                    seen = key <= newest if is_causal else key < SK
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
                T.copy(values[step * BN : step * BN + BN, source, :], v)
                T.gemm(weights, v, out)
            for i, d in T.Parallel(BM, D):
                out[i, d] *= T.if_then_else(total[i] > 0, 1 / total[i], 0.0)
            T.copy(out, results[row : row + BM, head, :])
            for i in T.Parallel(BM):
                total[i] = (top[i] * scale + T.log2(total[i])) * LN_2
            T.copy(total, sums[head, row])


def starts_of(lengths) -> np.ndarray:
    """Where sequences of these lengths begin when they are packed, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def exact(q, k, v, starts_q, starts_k, **options):
    """The same in float64: O and LSE. Queries of no sequence are NaN."""
    o = np.full(q.shape, np.nan)
    lse = np.full(q.shape[1::-1], np.nan)
    for z in range(len(starts_q) - 1):
        mine, theirs = slice(*starts_q[z : z + 2]), slice(*starts_k[z : z + 2])
        parts = [x[rows].swapaxes(0, 1)[None] for x, rows in ((q, mine), (k, theirs), (v, theirs))]
        results, sums = forward.exact(*parts, **options)
        o[mine] = results[0].swapaxes(0, 1)
        lse[:, mine] = sums[0]
    return o, lse


def check() -> None:
    """Compare with float64: sequences of lengths that no tile divides, and of none."""
    rng = np.random.default_rng(0)
    lengths, D = [(70, 130), (0, 40), (1, 90), (150, 0), (129, 60)], 64
    starts_q, starts_k = (starts_of(x) for x in zip(*lengths, strict=True))
    q = rng.standard_normal((starts_q[-1], 4, D)).astype(ml_dtypes.bfloat16)
    k, v = (rng.standard_normal((starts_k[-1], 2, D)).astype(ml_dtypes.bfloat16) for _ in range(2))
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 40}):
        o, lse = np.full_like(q, np.nan), np.full(q.shape[1::-1], np.nan, np.float32)
        attention_ragged(q, k, v, o, lse, starts_q, starts_k, 150, **options)
        wanted, wanted_lse = exact(q, k, v, starts_q, starts_k, **options)
        error = np.abs(o.astype(np.float64) - wanted).max()
        assert error < 0.02, f"{options}: wrong by {error}"
        seen = np.isfinite(wanted_lse)
        assert (np.isneginf(lse) == ~seen).all(), options
        assert np.abs(lse[seen] - wanted_lse[seen]).max() < 2e-3, options
    print(f"attention over {len(lengths)} ragged sequences: right, full, causal, and in a window")


if __name__ == "__main__":
    check()
