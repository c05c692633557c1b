"""Results that go through a tile of the user's own on their way to a tensor."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


@T.macro
def nothing(acc, tile, scale):
    pass


@T.macro
def meet(acc, tile, scale):
    T.sync_threads()


@T.macro
def change(acc, tile, scale):
    for i, j in T.Parallel(128, 64):
        acc[i, j] = 0.0


@T.macro
def use(acc, tile, scale):
    for i, j in T.Parallel(128, 64):
        tile[i, j] += 1.0


@T.macro
def scaled(acc, tile, scale):
    for i in T.Parallel(128):
        scale[i] = 2.0


def made(between=nothing, tile_dtype="float16", rows=128, given=False):
    @tilejit
    def matmul(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = B.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 128), threads=128) as (bx, by):
            a, b = T.alloc_shared((128, 64), A.dtype), T.alloc_shared((64, 64), A.dtype)
            acc, scale = T.alloc_fragment((128, 64), "float32"), T.alloc_fragment((128,), "float32")
            tile = T.alloc_shared((128, 64), tile_dtype)
            if given:
                T.annotate_layout({tile: T.make_swizzled_layout(tile)})
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 64), num_stages=2):
                T.copy(A[by * 128, k * 64], a)
                T.copy(B[k * 64, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, tile)
            between(acc, tile, scale)
            T.copy(tile[:rows, :], C[by * 128, bx * 64])

    return matmul


def explained(kernel, shape=(256, 256), dtype="float16", out="float16"):
    spec = T.Tensor((shape[0], 128), dtype), T.Tensor((128, shape[1]), dtype)
    return kernel.compile(*spec, T.Tensor(shape, out), target="sm_90a").explain()


@pytest.mark.parametrize("between", [nothing, meet, scaled], ids=["nothing", "meet", "other"])
def test_a_tile_that_results_only_pass_through_is_left_out(between):
    text = explained(made(between))
    assert "tile is left out" in text and "acc -> C: by TMA, through strips" in text


@pytest.mark.parametrize(
    ("kernel", "shape", "out"),
    [
        (made(change), (256, 256), "float16"),
        (made(use), (256, 256), "float16"),
        (made(given=True), (256, 256), "float16"),
        (made(rows=64), (256, 256), "float16"),
        (made(), (256, 256), "float32"),  # rounded on the way
        (made(), (256, 250), "float16"),  # rows that no box ends at
    ],
    ids=["changed", "used", "layout", "part", "dtype", "odd"],
)
def test_tiles_with_a_use_stay(kernel, shape, out):
    assert "left out" not in explained(kernel, shape, out=out)


@tilejit
def transposed(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
    """C = (A @ B).T by way of a tile, as wide stores want it; D = A @ B, by way of another."""
    with T.Kernel(T.ceildiv(B.shape[1], 64), T.ceildiv(A.shape[0], 64), threads=128) as (bx, by):
        a, b = T.alloc_shared((64, 64), A.dtype), T.alloc_shared((64, 64), A.dtype)
        acc, turned = T.alloc_fragment((64, 64), "float32"), T.alloc_fragment((64, 64), "float32")
        tile, plain = T.alloc_shared((64, 64), A.dtype), T.alloc_shared((64, 64), A.dtype)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(A.shape[1], 64), num_stages=2):
            T.copy(A[by * 64, k * 64], a)
            T.copy(B[k * 64, bx * 64], b)
            T.gemm(a, b, acc)
        for i, j in T.Parallel(64, 64):
            turned[j, i] = acc[i, j]
        T.copy(turned, tile)
        T.copy(tile, C[bx * 64, by * 64])
        T.copy(acc, plain)
        T.copy(plain, D[by * 64, bx * 64])


def test_tiles_that_bring_elements_in_order_stay(hopper, rng):
    a = rng.integers(-3, 4, (192, 100)).astype(np.float16)
    b = rng.integers(-3, 4, (100, 136)).astype(np.float16)
    want = (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float16)
    c, d = hopper(transposed, a, b, out=[((136, 192), np.float16), ((192, 136), np.float16)])
    assert (c == want.T).all() and (d == want).all()
    sides = T.Tensor((192, 128), "float16"), T.Tensor((128, 256), "float16")
    results = T.Tensor((256, 192), "float16"), T.Tensor((192, 256), "float16")
    text = transposed.compile(*sides, *results, target="sm_90a").explain()
    assert "plain is left out" in text and "tile is left out" not in text


KERNELS = {
    "nothing": made(),
    "meet": made(meet),
    "change": made(change),
    "use": made(use),
    "layout": made(given=True),
    "rounded": made(tile_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(256, 192), (200, 136), (130, 70)], ids=str)
def test_results_are_right(hopper, rng, name, shape):
    M, N = shape
    a = rng.integers(-3, 4, (M, 100)).astype(np.float16)
    b = rng.integers(-3, 4, (100, N)).astype(np.float16)
    want = a.astype(np.float32) @ b.astype(np.float32)
    if name == "rounded":
        want = want.astype(T.dtype("bfloat16").numpy).astype(np.float32)
    want += name == "use"
    got = hopper(KERNELS[name], a, b, out=[(shape, np.float16)])
    np.testing.assert_array_equal(got, want.astype(np.float16))
