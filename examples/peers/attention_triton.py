"""An online-softmax attention in Triton, with tensor maps; a tile of queries a program."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def walk(
    out, total, top, q, k_map, v_map, above, first, last, S, query, scale,
    BN: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add keys from `first` up to `last`, BN at a time; only with CAUSAL or EDGE is any hidden.

    out: weighted sums of V; total: of the weights; top: the largest score, times `scale`.
    above: rows of earlier heads. scale: log2(e) / sqrt(D).
    """
    for key in tl.range(first, last, BN):
        scores = tl.dot(q, k_map.load([above + key, 0]).T)
        keys = key + tl.arange(0, BN)
        if CAUSAL:
            scores = tl.where(keys[None, :] <= query[:, None], scores, -float("inf"))
        if EDGE:
            scores = tl.where(keys[None, :] < S, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        v = v_map.load([above + key, 0])
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None])
        top = new_top
    return out, total, top


@triton.jit
def attention(
    q_map, k_map, v_map, o, S, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; WIDE is D, or the next power of two."""
    # last tiles first: under a causal mask they have most to do
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    above = tl.program_id(1) * S
    query = block * BM + tl.arange(0, BM)
    q = q_map.load([above + block * BM, 0])
    out = tl.zeros((BM, WIDE), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    whole = S // BN * BN
    if CAUSAL:
        whole = tl.minimum(whole, block * BM // BN * BN)
    out, total, top = walk(
        out, total, top, q, k_map, v_map, above, 0, whole, S, query, scale, BN, False, False
    )
    last = S
    if CAUSAL:
        last = tl.minimum(S, block * BM + BM)
    out, total, top = walk(
        out, total, top, q, k_map, v_map, above, whole, last, S, query, scale, BN, CAUSAL, True
    )
    d = tl.arange(0, WIDE)
    at = o + (above + query)[:, None].to(tl.int64) * D + d[None, :]
    inside = (query < S)[:, None] & (d < D)[None, :]
    tl.store(at, (out / total[:, None]).to(o.dtype.element_ty), mask=inside)


# BM, BN, warps, stages
TILES = (
    (128, 128, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 4, 3),
    (64, 64, 4, 3),
    (128, 32, 8, 4),
)
LOG2_E = 1.4426950408889634


def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function that compiles and gives the call."""
    if operands.case.is_backward:
        raise ValueError("only a forward pass is written in Triton")
    for BM, BN, warps, stages in TILES[: 2 if quick else None]:
        constants = {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages}
        name = f"{BM}x{BN}, {stages} stages, {warps} warps"
        yield name, functools.partial(_build, operands, constants)


def _build(operands: Any, constants: dict[str, int]) -> Callable[[], Any]:
    case, o = operands.case, operands.o
    wide = triton.next_power_of_2(case.D)

    def rows_of(x: Any, rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.view(-1, case.D), [rows, wide])

    q_map = rows_of(operands.q, constants["BM"])
    k_map, v_map = (rows_of(x, constants["BN"]) for x in (operands.k, operands.v))
    grid = (triton.cdiv(case.S, constants["BM"]), case.batch * case.heads)
    words = {**constants, "D": case.D, "WIDE": wide, "CAUSAL": case.is_causal}
    scale = LOG2_E * case.D**-0.5

    def call() -> Any:
        attention[grid](q_map, k_map, v_map, o, case.S, scale, **words)
        return o

    return call
