"""Attention whose scores and masks are Python functions, inlined by tracing.

python examples/attention_variants.py      check them on NumPy arrays, wherever there is a device

One kernel, and a few lines for each variant: ALiBi (Press et al., 2021), a table of biases for
relative positions (Raffel et al., 2019), prefixes that all see, packed documents, windows with
gaps, sinks (a learned logit of each head in the softmax's denominator), a gate for each head and
query. The functions have the arguments of torch's FlexAttention; what they compute is ordinary
code of the loop over the scores, and their tensors are arguments of the call.
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
    one: T.Tensor = None, two: T.Tensor = None,
    sinks: T.Tensor = None, gates: T.Tensor = None,
    *,
    score=None, seen=None, span=None, BM=128, BN=None, threads=256,
):  # fmt: skip
    """O = softmax(score(Q @ K.T / sqrt(D)) where seen) @ V for each head.

    Q, O: (batch, heads, S, D); K, V: (batch, heads / group, SK, D), 16-bit floats; several heads
    may share one of K and V. LSE: (batch, heads, S) float32, the log of the softmax's denominator.
    score(value, batch, head, query, key, *tensors): what becomes of a score. seen(batch, head,
    query, key, *tensors): whether it counts. span(batch, head, first, last, *tensors): the keys,
    from the one to below the other, of which queries `first` to `last` may see some; the others are
    not looked at. tensors: `one` and `two`, those that are given. sinks: (heads,) float32, one more
    logit for each row, without a value. gates: (batch, heads, S), whose sigmoid scales O's rows.
    A row that sees no key is zero, its LSE minus infinity, or the sink.
    """
    batch, heads, S, D = Q.shape
    shared, SK = K.shape[1], K.shape[2]
    tensors = [t for t in (one, two) if t is not None]
    BN = BN or (80 if D > 128 else 96 if tensors else 128)  # what functions load takes registers
    none = -T.infinity("float32")
    scale = D**-0.5 if score is None else 1.0  # of scores when they have been seen to
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

        row, source = block * BM, head // (heads // shared)
        first, stop = 0, SK
        if span is not None:
            first, stop = span(z, head, row, T.min(row + BM, S) - 1, *tensors)
            first, stop = T.max(first, 0) // BN, T.min(stop, SK)
        T.copy(Q[z, head, row, 0], q)
        T.clear(out)
        T.fill(total, 0.0 if sinks is None else 1.0)
        T.fill(top, none if sinks is None else sinks[head] / scale)
        for step in T.Pipelined(first, T.ceildiv(stop, BN)):
            T.copy(K[z, source, step * BN, 0], k)
            T.clear(scores)
            T.gemm(q, k, scores, transpose_B=True)
            for i, j in T.Parallel(BM, BN):
                query, key = row + i, step * BN + j
                value = scores[i, j]
                if score is not None:
                    value = score(value * D**-0.5, z, head, query, key, *tensors)
                is_seen = key < SK
                if seen is not None:
                    is_seen = is_seen & seen(z, head, query, key, *tensors)
                scores[i, j] = T.if_then_else(is_seen, value, none)
            T.copy(top, fade)
            T.reduce_max(scores, top, dim=1, clear=False)
            for i in T.Parallel(BM):
                base[i] = T.if_then_else(top[i] == none, 0.0, top[i] * (scale * LOG2_E))
                fade[i] = T.exp2(fade[i] * (scale * LOG2_E) - base[i])
                total[i] *= fade[i]
            for i, j in T.Parallel(BM, BN):
                scores[i, j] = T.exp2(scores[i, j] * (scale * LOG2_E) - base[i])
            T.reduce_sum(scores, total, dim=1, clear=False)
            T.copy(scores, weights)
            for i, d in T.Parallel(BM, D):
                out[i, d] *= fade[i]
            T.copy(V[z, source, step * BN, 0], v)
            T.gemm(weights, v, out)
        for i in T.Parallel(BM):
            fade[i] = T.if_then_else(total[i] > 0, 1 / total[i], 0.0)
            total[i] = top[i] * scale + T.log2(total[i]) * LN_2
            if gates is not None:
                fade[i] *= T.sigmoid(T.cast(gates[z, head, row + i], "float32"))
        for i, d in T.Parallel(BM, D):
            out[i, d] *= fade[i]
        T.copy(out, O[z, head, row, 0])
        T.copy(total, LSE[z, head, row])


# ---- scores -------------------------------------------------------------------------------------


def alibi(value, batch, head, query, key, slopes):
    """A penalty for distance. slopes: (heads,) float32, as `alibi_slopes` has them."""
    return value - slopes[head] * (query - key)


def alibi_slopes(heads: int) -> np.ndarray:
    """2 ** -(8 / heads), and its powers."""
    return (2.0 ** (-8.0 / heads * np.arange(1, heads + 1))).astype(np.float32)


def relative(value, batch, head, query, key, table):
    """A bias for each distance. table: (heads, 2 * reach + 1) float32, from `key - query == -reach`
    on; farther keys have none."""
    return value + table[head, key - query + table.shape[1] // 2]


# ---- masks --------------------------------------------------------------------------------------


def causal(batch, head, query, key, *tensors):
    """A query sees the keys up to its own."""
    return key <= query


def causal_span(batch, head, first, last, *tensors):
    return 0, last + 1


def prefix(batch, head, query, key, lengths):
    """All queries see the first `lengths[batch]` keys, and those to their own. lengths: int32."""
    return (key < lengths[batch]) | (key <= query)


def prefix_span(batch, head, first, last, lengths):
    return 0, T.max(lengths[batch], last + 1)


def same_document(batch, head, query, key, documents):
    """Causal, among tokens of one document. documents: (batch, S), the number of each token's."""
    return (key <= query) & (documents[batch, key] == documents[batch, query])


def since_document(batch, head, query, key, beginnings):
    """The same, told otherwise. beginnings: (batch, S) int32, the first token of each token's
    document: what ranges of keys can be told from."""
    return (key <= query) & (key >= beginnings[batch, query])


def document_span(batch, head, first, last, beginnings):
    return beginnings[batch, first], last + 1


def dilated(reach: int, step: int):
    """The last `reach` keys of which the distance is a multiple of `step`, and the range."""

    def seen(batch, head, query, key, *tensors):
        gap = query - key
        return (gap >= 0) & (gap < reach * step) & (gap % step == 0)

    def span(batch, head, first, last, *tensors):
        return first - reach * step + 1, last + 1

    return seen, span


# ---- the same in float64 ------------------------------------------------------------------------


class Guarded:
    """An array that reads as 0 outside, as tensors do in kernels."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def __getitem__(self, key):
        places = np.broadcast_arrays(*(key if isinstance(key, tuple) else (key,)))
        pairs = list(zip(places, self.shape, strict=True))
        inside = np.logical_and.reduce([(x >= 0) & (x < n) for x, n in pairs])
        found = self.array[tuple(np.clip(x, 0, n - 1) for x, n in pairs)]
        return np.where(inside, found, 0).astype(found.dtype if found.dtype.kind == "i" else float)


def exact(q, k, v, *tensors, score=None, seen=None, sinks=None, gates=None, kind=np.float64):
    """O and LSE in float64, by the same functions. kind: what the weights are rounded to."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    at = np.ogrid[tuple(slice(n) for n in scores.shape)]
    tensors = [Guarded(t) for t in tensors]
    if score is not None:
        scores = score(scores, *at, *tensors)
    if seen is not None:
        scores = np.where(seen(*at, *tensors), scores, -np.inf)
    logits = np.full((q.shape[1], 1, 1), -np.inf) if sinks is None else sinks[:, None, None]
    top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), logits.astype(np.float64))
    top = np.maximum(top, -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + np.exp(logits - top)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    o = weights.astype(kind).astype(np.float64) @ v / np.maximum(total, 1e-300)
    if gates is not None:
        o /= 1 + np.exp(-gates[..., None].astype(np.float64))
    return o, np.where(total > 0, lse, -np.inf)[..., 0]


def variants(batch: int, heads: int, S: int, reach: int = 20):
    """Tensors and options of each variant, by name, for tests and timings; S of queries and keys.

    Each is (tensors, options): of `attention`, and without `span` of `exact`.
    """
    rng = np.random.default_rng(2)
    slopes, lengths = alibi_slopes(heads), np.linspace(0, S, batch + 2).astype(np.int32)[1:-1]
    table = rng.standard_normal((heads, 2 * reach + 1)).astype(np.float32)
    documents = np.sort(rng.integers(0, 4, (batch, S)), axis=1).astype(np.int32)
    beginnings = np.stack([np.searchsorted(d, d) for d in documents]).astype(np.int32)
    sinks = rng.standard_normal(heads).astype(np.float32)
    gates = rng.standard_normal((batch, heads, S)).astype(np.float32)
    window, window_span = dilated(reach, 3)
    is_causal = {"seen": causal, "span": causal_span}
    return {
        "plain": ((), {}),
        "causal": ((), is_causal),
        "alibi": ((slopes,), {"score": alibi, **is_causal}),
        "relative": ((table,), {"score": relative}),
        "prefix": ((lengths,), {"seen": prefix, "span": prefix_span}),
        "documents": ((documents,), {"seen": same_document, "span": causal_span}),
        "beginnings": ((beginnings,), {"seen": since_document, "span": document_span}),
        "dilated": ((), {"seen": window, "span": window_span}),
        "sinks": ((), {"sinks": sinks, **is_causal}),
        "gates": ((), {"gates": gates}),
        "all": ((table, beginnings), {
            "score": lambda value, b, h, i, j, bias, _: relative(value, b, h, i, j, bias),
            "seen": lambda b, h, i, j, _, begin: since_document(b, h, i, j, begin),
            "span": lambda b, h, first, last, _, begin: document_span(b, h, first, last, begin),
            "sinks": sinks, "gates": gates,
        }),
    }  # fmt: skip


def check() -> None:
    """Compare with float64 on sizes that no tile divides."""
    rng = np.random.default_rng(0)
    batch, heads, S, D = 2, 4, 150, 64
    q = rng.standard_normal((batch, heads, S, D)).astype(ml_dtypes.bfloat16)
    k, v = (rng.standard_normal((batch, 2, S, D)).astype(ml_dtypes.bfloat16) for _ in range(2))
    found = variants(batch, heads, S)
    for name, (tensors, options) in found.items():
        o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
        attention(q, k, v, o, lse, *tensors, **options)
        known = {key: x for key, x in options.items() if key != "span"}
        wanted, wanted_lse = exact(q, k, v, *tensors, **known)
        error = np.abs(o.astype(np.float64) - wanted).max()
        assert error < 0.02, f"{name}: wrong by {error}"
        assert np.abs(lse - wanted_lse).max() < 2e-3, name
    print(f"attention over {S}: right, {', '.join(found)}")


if __name__ == "__main__":
    check()
