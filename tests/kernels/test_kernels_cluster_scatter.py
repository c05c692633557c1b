"""Tiles of the blocks of a cluster that are combined, each block having its part of the result."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ArgumentError, DTypeError, ShapeError, TraceError


@tilejit
def scattering(
    A: T.Tensor, C: T.Tensor, *, blocks=4, rounds=1, kind="sum", keeps_nan=False,
    source="fragment", target="fragment", threads=64,
):  # fmt: skip
    """C[g * blocks + r] = part r of the tiles of the g-th group of `blocks`, combined."""
    make = {"fragment": T.alloc_fragment, "shared": T.alloc_shared}
    with T.Kernel(A.shape[0] // rounds, threads=threads, cluster=blocks) as block:
        own = make[source](A.shape[1:], A.dtype)
        part = make[target](C.shape[1:], C.dtype)
        for r in range(rounds):
            at = block // blocks * blocks * rounds + r * blocks + block % blocks
            T.copy(A[(at, *(0,) * (len(A.shape) - 1))], own)
            T.cluster_reduce_scatter(own, part, kind, keeps_nan)
            T.copy(part, C[(at, *(0,) * (len(A.shape) - 1))])


def expected(a, blocks, combine=np.add):
    """Of groups of `blocks` tiles."""
    whole = combine.reduce(a.reshape(-1, blocks, *a.shape[1:]), axis=1)
    parts = np.stack(np.split(whole, blocks, axis=-1), axis=1)
    return parts.reshape(-1, *parts.shape[2:])


def run(hopper, a, blocks=4, combine=np.add, dtype=None, **knobs):
    shape = (*a.shape[:-1], a.shape[-1] // blocks)
    c = hopper(scattering, a, out=[(shape, dtype or a.dtype)], blocks=blocks, **knobs)
    wanted = expected(a, blocks, combine).astype(c.dtype)
    np.testing.assert_array_equal(c, wanted)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 8])
def test_each_block_has_its_part_of_the_sum(hopper, rng, blocks):
    run(hopper, rng.integers(-9, 10, (2 * blocks, 3, 24 * blocks)).astype(np.float32), blocks)


@pytest.mark.parametrize("shape", [(4,), (64,), (3, 20), (16, 128), (65, 8), (2, 3, 36)])
@pytest.mark.parametrize(
    "source, target", [("fragment", "fragment"), ("shared", "fragment"), ("fragment", "shared"),
                       ("shared", "shared")],
)  # fmt: skip
def test_tiles_of_any_shape_in_either_memory(hopper, rng, shape, source, target):
    a = rng.integers(-9, 10, (8, *shape)).astype(np.float32)
    run(hopper, a, source=source, target=target)


@pytest.mark.parametrize("threads", [32, 64, 128, 256])
def test_more_threads_than_elements_or_fewer(hopper, rng, threads):
    run(hopper, rng.integers(-9, 10, (4, 5, 44)).astype(np.float32), threads=threads)


@pytest.mark.parametrize("rounds", [2, 3, 6])
def test_a_loop_uses_the_same_memory_again(hopper, rng, rounds):
    run(hopper, rng.integers(-9, 10, (8 * rounds, 2, 12)).astype(np.int32), rounds=rounds)


@pytest.mark.parametrize(
    "given, result", [("float16", "float32"), ("bfloat16", "bfloat16"), ("float64", "float64"),
                      ("float32", "float16"), ("int32", "int32"), ("int8", "int32"),
                      ("uint8", "uint8"), ("int64", "int64")],
)  # fmt: skip
def test_dtypes(hopper, rng, given, result):
    """Small integers, which all of them hold; sums of uint8 wrap."""
    a = rng.integers(0, 100, (4, 3, 40)).astype(T.dtype(given).numpy)
    wide = a.astype(np.float64 if T.dtype(given).is_float else np.int64)
    c = hopper(scattering, a, out=[((4, 3, 10), T.dtype(result).numpy)])
    np.testing.assert_array_equal(c, expected(wide, 4).astype(T.dtype(result).numpy))


@pytest.mark.parametrize(
    "kind, combine", [("max", np.maximum), ("min", np.minimum), ("bitand", np.bitwise_and),
                      ("bitor", np.bitwise_or), ("bitxor", np.bitwise_xor)],
)  # fmt: skip
def test_kinds_of_integers(hopper, rng, kind, combine):
    run(hopper, rng.integers(-99, 99, (4, 2, 16)).astype(np.int32), 4, combine, kind=kind)


def test_absolute_values(hopper, rng):
    a = rng.integers(-9, 10, (4, 2, 16)).astype(np.float32)
    c = hopper(scattering, a, out=[((4, 2, 4), np.float32)], kind="abssum")
    np.testing.assert_array_equal(c, expected(np.abs(a), 4))


@pytest.mark.parametrize("keeps_nan", [False, True])
def test_nan_of_a_maximum(hopper, keeps_nan):
    a = np.arange(32, dtype=np.float32).reshape(4, 8)
    a[1, 3] = np.nan
    combine = np.maximum if keeps_nan else np.fmax
    run(hopper, a, 4, combine, kind="max", keeps_nan=keeps_nan)


def test_two_runs_give_the_same_bits(hopper, rng):
    a = rng.standard_normal((8, 16, 64)).astype(np.float32)
    first, second = (hopper(scattering, a, out=[((8, 16, 16), np.float32)]) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@tilejit
def shared_product(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, blocks=4, BM=64, BN=64, BK=32):
    """C = A @ B: the blocks of a cluster share K."""
    M, K = A.shape
    N = B.shape[1]
    with T.Kernel(N // BN * blocks, M // BM, threads=128, cluster=blocks) as (bx, by):
        rank = T.block_rank_in_cluster()
        a, b = T.alloc_shared((BM, BK), A.dtype), T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        mine = T.alloc_fragment((BM, BN // blocks), "float32")
        T.clear(acc)
        for k in T.Pipelined(K // BK // blocks, num_stages=2):
            at = (rank * (K // BK // blocks) + k) * BK
            T.copy(A[by * BM, at], a)
            T.copy(B[at, bx // blocks * BN], b)
            T.gemm(a, b, acc)
        T.cluster_reduce_scatter(acc, mine)
        T.copy(mine, C[by * BM, bx // blocks * BN + rank * (BN // blocks)])


@pytest.mark.parametrize("blocks", [2, 4])
def test_a_product_whose_blocks_share_its_sums(hopper, rng, blocks):
    a, b = (rng.integers(-3, 4, s).astype(np.float16) for s in ((128, 256), (256, 128)))
    c = hopper(shared_product, a, b, out=[((128, 128), np.float32)], blocks=blocks)
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32))


def test_neighbours_go_out_in_one_message():
    A, C = T.Tensor((4, 16, 64), "float32"), T.Tensor((4, 16, 16), "float32")
    kernel = scattering.compile(A, C, target="sm_90a")
    assert "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32" in kernel.ptx
    assert "cluster_reduce_scatter sum own -> part: 4 blocks through shared memory" in (
        kernel.explain()
    )
    assert 'T.cluster_reduce_scatter(own, part, "sum")' in str(kernel.graph)


# ---- mistakes -----------------------------------------------------------------------------------


def _scatter(shape, part, given="float32", result="float32", **knobs):
    @tilejit
    def wrong():
        with T.Kernel(4, threads=32, cluster=4):
            own, mine = T.alloc_fragment(shape, given), T.alloc_fragment(part, result)
            T.cluster_reduce_scatter(own, mine, **knobs)

    wrong.compile(target="sm_90a")


@pytest.mark.parametrize(
    "shape, part, message",
    [
        ((8, 64), (8, 64), "`own` is 8x64, and the part of one of 4 blocks of a cluster is 8x16, "
                           "but `mine` is 8x64"),
        ((8, 64), (4, 16), "is 8x16, but `mine` is 4x16"),
        ((8, 62), (8, 16), "is no tile, for they do not divide it, but `mine` is 8x16"),
    ],
)  # fmt: skip
def test_shapes_that_are_no_part(shape, part, message):
    with pytest.raises(ShapeError, match=re.escape(message)) as found:
        _scatter(shape, part)
    assert "T.cluster_reduce_scatter(own, mine, **knobs)" in str(found.value)


def test_other_mistakes():
    with pytest.raises(DTypeError, match="combines bits of integers or bool"):
        _scatter((8, 64), (8, 16), reduce_type="bitor")
    with pytest.raises(DTypeError, match="whose values `mine` of int32 does not hold"):
        _scatter((8, 64), (8, 16), "float32", "int32")
    with pytest.raises(ArgumentError, match="reduce_type is 'product'"):
        _scatter((8, 64), (8, 16), reduce_type="product")
    with pytest.raises(TraceError, match=r"T\.cluster_reduce_scatter is only allowed inside"):
        T.cluster_reduce_scatter(None, None)
