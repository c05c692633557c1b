"""Attention in TileLang, pipelined by its compiler or by a schedule of ours."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tilelang
import tilelang.language as T

with contextlib.suppress(Exception):  # a line for each compilation otherwise
    tilelang.set_log_level("WARNING")

LOG2_E = 1.4426950408889634

# A place and a stage for each statement of the loop: K's copy, mask, first product, seven of the
# softmax, fading of O, V's copy, second product. The fading and the second product come an
# iteration later than the rest, and before the softmax that they can run beside.
LATE = {
    "order": [0, 2, 3, 6, 7, 8, 9, 10, 11, 12, 4, 1, 5],
    "stage": [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 2],
}


@tilelang.jit(pass_configs={tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True})
def make_attention(batch, heads, S, D, causal, dtype, BM, BN, threads, stages):
    """The kernel for one shape; O goes through shared memory."""
    scale = LOG2_E * D**-0.5
    shape = (batch, heads, S, D)
    rows = T.GemmWarpPolicy.FullRow
    schedule = LATE if stages is None else {"num_stages": stages}

    @T.prim_func
    def attention(
        Q: T.Tensor(shape, dtype),
        K: T.Tensor(shape, dtype),
        V: T.Tensor(shape, dtype),
        O: T.Tensor(shape, dtype),
    ):
        with T.Kernel(T.ceildiv(S, BM), heads, batch, threads=threads) as (block, head, z):
            q = T.alloc_shared((BM, D), dtype)
            k = T.alloc_shared((BN, D), dtype)
            v = T.alloc_shared((BN, D), dtype)
            o = T.alloc_shared((BM, D), dtype)
            scores = T.alloc_fragment((BM, BN), "float32")
            weights = T.alloc_fragment((BM, BN), dtype)
            out = T.alloc_fragment((BM, D), "float32")
            top = T.alloc_fragment((BM,), "float32")
            before = T.alloc_fragment((BM,), "float32")
            fade = T.alloc_fragment((BM,), "float32")
            part = T.alloc_fragment((BM,), "float32")
            total = T.alloc_fragment((BM,), "float32")

            T.copy(Q[z, head, block * BM : block * BM + BM, :], q)
            T.fill(out, 0)
            T.fill(total, 0)
            T.fill(top, -T.infinity("float32"))
            last = T.min(S, block * BM + BM) if causal else S
            for step in T.Pipelined(T.ceildiv(last, BN), **schedule):
                T.copy(K[z, head, step * BN : step * BN + BN, :], k)
                if causal:
                    for i, j in T.Parallel(BM, BN):
                        scores[i, j] = T.if_then_else(
                            block * BM + i >= step * BN + j, 0, -T.infinity("float32")
                        )
                else:
                    T.fill(scores, 0)
                T.gemm(q, k, scores, transpose_B=True, policy=rows)
                T.copy(top, before)
                T.reduce_max(scores, top, dim=1, clear=False)
                for i in T.Parallel(BM):
                    fade[i] = T.exp2(before[i] * scale - top[i] * scale)
                for i, j in T.Parallel(BM, BN):
                    scores[i, j] = T.exp2(scores[i, j] * scale - top[i] * scale)
                T.reduce_sum(scores, part, dim=1)
                for i in T.Parallel(BM):
                    total[i] = total[i] * fade[i] + part[i]
                T.copy(scores, weights)
                for i, d in T.Parallel(BM, D):
                    out[i, d] *= fade[i]
                T.copy(V[z, head, step * BN : step * BN + BN, :], v)
                T.gemm(weights, v, out, policy=rows)
            for i, d in T.Parallel(BM, D):
                out[i, d] /= total[i]
            T.copy(out, o)
            T.copy(o, O[z, head, block * BM : block * BM + BM, :])

    return attention


# BM, BN, threads that compute, and stages; None: the schedule above, not the compiler's
TILES = (
    (128, 128, 256, 2),
    (128, 128, 256, None),
    (128, 64, 256, 2),
    (192, 128, 384, 2),
    (64, 64, 128, 2),
)


def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function that compiles and gives the call."""
    if operands.case.is_backward:
        raise ValueError("only a forward pass is written in TileLang")
    for tile in TILES[: 2 if quick else None]:
        BM, BN, threads, stages = tile
        if operands.case.S % BN == 0:  # the kernel hides no keys past the end
            schedule = f"{stages} stages" if stages else "second product late"
            name = f"{BM}x{BN}, {schedule}, {threads} threads"
            yield name, functools.partial(_build, operands, tile)


def _build(operands: Any, tile: tuple[Any, ...]) -> Callable[[], Any]:
    case, o = operands.case, operands.o
    arrays = operands.q, operands.k, operands.v, o
    kernel = make_attention(*case.shape, case.is_causal, case.dtype, *tile)

    def call() -> Any:
        kernel(*arrays)
        return o

    return call
