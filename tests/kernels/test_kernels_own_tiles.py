"""Loops that fill the same tile one after the other: each has slots of its own where that is the
same program."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, explained, operand

import tilejit.language as T
from tilejit import options, tilejit

BF16 = ml_dtypes.bfloat16
OWN = "a tile for each of the loops that fill it"


@tilejit
def product(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kind="plain", cut=2, stages=None, BN=64):
    """A @ B in two loops over its 32 columns of A: the first `cut` rounds, and the rest."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, BN), B.dtype)
        acc = T.alloc_fragment((64, BN), "float32")
        T.clear(acc)
        for first, last in ((0, cut), (cut, T.ceildiv(K, 32))):
            for k in T.Pipelined(first, last, num_stages=stages):
                T.copy(A[by * 64, k * 32], a)
                if kind != "stale" or first == 0:
                    T.copy(B[k * 32, bx * BN], b)
                T.gemm(a, b, acc)
                if kind == "twice" and first == 0:
                    T.copy(B[k * 32, bx * BN], b)
        if kind == "after":
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64, bx * BN])


@pytest.mark.parametrize("stages", [None, 2, 3])
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_loops_over_one_tile_after_each_other_are_pipelines(executor, rng, target, cut, stages):
    a, b = operand(rng, (80, 200), BF16), operand(rng, (200, 72), BF16)
    c = np.full((80, 72), np.nan, np.float32)
    with options(target=target):
        product(a, b, c, cut=cut, stages=stages)
    assert_product(c, a, b)
    specs = [T.Tensor(x.shape, x.dtype.name) for x in (a, b, c)]
    text = product.compile(*specs, target=target, cut=cut, stages=stages).explain()
    assert f"a, b: {OWN}" in text
    for tiles in ("a, b", "a_1, b_1"):
        slots = f"slots of {tiles} by TMA" if target == "sm_90a" else f"slots of {tiles}"
        assert slots in text
    assert ("wgmma" in text) == (target == "sm_90a")


@pytest.mark.parametrize("kind", ["stale", "twice", "after"])
def test_tiles_that_outlive_a_round_stay_one(hopper, rng, kind):
    """What is read was filled by the other loop, at the end of the last round, or in the last
    loop's last round."""
    a, b = operand(rng, (64, 128), BF16), operand(rng, (128, 64), BF16)
    c = hopper(product, a, b, out=[((64, 64), "float32")], kind=kind)
    left, right = a, b
    if kind == "stale":
        right = np.vstack([b[:64], b[32:64], b[32:64]])
    if kind == "after":
        left, right = np.hstack([a, a[:, 96:]]), np.vstack([b, b[96:]])
    assert_product(c, left, right)
    text = explained(product, a, b, c, kind=kind)
    assert f"a, b: {OWN}" not in text
    assert (f"a: {OWN}" in text) == (kind != "after")


def test_tiles_stay_one_where_two_do_not_fit():
    wide = [T.Tensor((64, 256), "bfloat16"), T.Tensor((256, 512), "bfloat16")]
    out = T.Tensor((64, 512), "float32")
    one = product.compile(*wide, out, target="sm_90a", BN=256, stages=5)
    assert OWN in one.explain()
    assert OWN not in product.compile(*wide, out, target="sm_90a", BN=256, stages=6).explain()
