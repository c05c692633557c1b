"""Tiles that are added to tensors: by the tensor memory accelerator where it can, else by threads,
and multiplies that run beside other work of their round."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from products import explained, operand

import tilejit
import tilejit.language as T
from tilejit import tilejit as jit
from tilejit.errors import UnsupportedError
from tilejit.runtime.device import use_executor

BF16 = ml_dtypes.bfloat16
BY_THREADS = re.compile(r"\b(red|atom)\.\S*global")


@jit
def add_product(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=64, BN=64, threads=128, twice=False, use_tma=None
):
    """C += A @ B, or twice that."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, 32), A.dtype)
        b = T.alloc_shared((32, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2, split=1):
            T.copy(A[by * BM, k * 32], a)
            T.copy(B[k * 32, bx * BN], b)
            T.gemm(a, b, acc)
        T.atomic_add(C[by * BM, bx * BN], acc, use_tma=use_tma)
        if twice:
            T.atomic_add(C[by * BM, bx * BN], acc, use_tma=use_tma)


@jit
def add_each_product(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=64, BN=64, threads=128):
    """C += A @ B, where each step of K is added by itself."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, 32), A.dtype)
        b = T.alloc_shared((32, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2):
            T.copy(A[by * BM, k * 32], a)
            T.copy(B[k * 32, bx * BN], b)
            T.gemm(a, b, acc, clear_accum=True)
            T.atomic_add(C[by * BM, bx * BN], acc)


@jit
def add_tile(A: T.Tensor, C: T.Tensor, *, BM=32, BN=64, use_tma=None):
    """C += A, through a tile in shared memory."""
    M, N = C.shape
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        s = T.alloc_shared((BM, BN), A.dtype)
        T.copy(A[by * BM, bx * BN], s)
        T.atomic_add(C[by * BM, bx * BN], s, use_tma=use_tma)


def added(executor, kernel, *inputs, before, target="sm_90a", **constants):
    result = before.copy()
    with use_executor(executor), tilejit.options(target=target):
        kernel(*inputs, result, **constants)
    return result


def product(a, b):
    return a.astype(np.float64) @ b.astype(np.float64)


@pytest.mark.parametrize("executor", ["reference", "simulator"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("M", "N", "K", "tile"),
    [(64, 64, 32, {}), (70, 136, 90, {"BM": 128, "threads": 256}), (130, 72, 40, {"BN": 128}),
     (70, 67, 40, {})],
)  # fmt: skip
def test_product_is_added_to_what_is_there(rng, executor, target, dtype, M, N, K, tile):
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    kind = np.dtype(dtype)
    before = rng.standard_normal((M, N)).astype(kind)
    result = added(executor, add_product, a, b, before=before, target=target, **tile)
    wanted = before.astype(np.float64) + product(a, b)
    step = float(ml_dtypes.finfo(kind).eps)
    bound = step * (np.abs(wanted) + 2 * np.abs(product(a, b))) + 1e-5
    assert (np.abs(result.astype(np.float64) - wanted) <= bound).all()


def test_accumulators_are_added_by_the_accelerator_in_strips():
    tensors = T.Tensor((256, 64), "bfloat16"), T.Tensor((64, 256), "bfloat16")
    text = explained(add_product, *tensors, T.Tensor((256, 256), "float32"))
    assert "acc -> C: added by TMA, through strips of 32 columns" in text
    kernel = add_product.compile(*tensors, T.Tensor((256, 256), "float32"), target="sm_90a")
    assert "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add" in kernel.ptx
    assert not BY_THREADS.search(kernel.ptx)


@pytest.mark.parametrize(
    ("columns", "constants", "why"),
    [(250, {}, "do not provably begin at multiples of 16 bytes"), (256, {"use_tma": False}, "")],
)
def test_accumulators_are_added_by_threads_where_the_accelerator_cannot(columns, constants, why):
    tensors = T.Tensor((256, 64), "bfloat16"), T.Tensor((64, 256), "bfloat16")
    out = T.Tensor((256, columns), "float32")
    kernel = add_product.compile(*tensors, out, target="sm_90a", **constants)
    assert "cp.reduce" not in kernel.ptx and BY_THREADS.search(kernel.ptx)
    assert not why or (
        "acc -> C: added by the threads, not by TMA" in kernel.explain() and why in kernel.explain()
    )


@pytest.mark.parametrize("executor", ["reference", "simulator"])
@pytest.mark.parametrize("tile", [{}, {"BM": 128, "threads": 256}, {"BN": 128}, {"BN": 32}])
def test_every_round_of_a_loop_adds_its_product(rng, executor, tile):
    a, b = operand(rng, (150, 200), BF16), operand(rng, (200, 136), BF16)
    before = rng.standard_normal((150, 136)).astype(np.float32)
    result = added(executor, add_each_product, a, b, before=before, **tile)
    wanted = before.astype(np.float64) + product(a, b)
    np.testing.assert_allclose(result, wanted, atol=2e-4)


def test_additions_to_one_place_do_not_wait_for_each_other():
    """Sums come out the same in any order, stores do not."""
    tensors = T.Tensor((256, 64), "bfloat16"), T.Tensor((64, 256), "bfloat16")
    out = T.Tensor((256, 256), "float32")
    for kernel, constants in ((add_product, {"twice": True}), (add_each_product, {})):
        planned = str(
            kernel.compile(*tensors, out, target="sm_90a", **constants).kernels[0].planned
        )
        assert "use_tma=True" in planned
        assert planned.count("T.tma_store_wait()") == 0


@pytest.mark.parametrize("executor", ["reference", "simulator"])
@pytest.mark.parametrize("twice", [False, True])
def test_two_additions_count_twice(rng, executor, twice):
    a, b = operand(rng, (70, 40), BF16), operand(rng, (40, 72), BF16)
    result = added(executor, add_product, a, b, before=np.zeros((70, 72), np.float32), twice=twice)
    np.testing.assert_allclose(result, (1 + twice) * product(a, b), atol=1e-4)


@pytest.mark.parametrize("executor", ["reference", "simulator"])
@pytest.mark.parametrize("use_tma", [None, True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32"])
def test_tile_in_shared_memory_is_added(rng, executor, use_tma, dtype):
    a = (rng.standard_normal((70, 136)) * 8).astype(dtype)
    before = (rng.standard_normal((70, 136)) * 8).astype(dtype)
    result = added(executor, add_tile, a, before=before, use_tma=use_tma)
    np.testing.assert_array_equal(result, before + a)


def test_what_the_accelerator_cannot_add_is_refused_with_the_reason():
    tensor = T.Tensor((70, 136), "float32")
    with pytest.raises(UnsupportedError) as caught:
        add_tile.compile(tensor, tensor, target="sm_80", use_tma=True)
    text = str(caught.value)
    assert text.startswith("T.atomic_add: use_tma=True is not possible: it needs ")
    assert "T.atomic_add(C[by * BM, bx * BN], s, use_tma=use_tma)" in text
    assert "Leave use_tma out: T.atomic_add then chooses." in text
    wide = T.Tensor((70, 136), "float64")
    with pytest.raises(UnsupportedError, match="it does not add float64"):
        add_tile.compile(wide, wide, target="sm_90a", use_tma=True)
    tensors = T.Tensor((256, 64), "bfloat16"), T.Tensor((64, 256), "bfloat16")
    with pytest.raises(UnsupportedError, match="do not provably begin at multiples of 16 bytes"):
        add_product.compile(
            *tensors, T.Tensor((256, 250), "float32"), target="sm_90a", use_tma=True
        )


@pytest.mark.parametrize("executor", ["reference", "simulator"])
def test_what_is_added_is_there_for_what_reads_it_later(rng, executor):
    @jit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(2, num_stages=2):
                T.copy(A[0, k * 32], a)
                T.copy(B[k * 32, 0], b)
                T.gemm(a, b, acc)
            T.atomic_add(C[0, 0], acc)
            for i, j in T.Parallel(64, 64):
                D[i, j] = 2 * C[i, j]

    a, b = operand(rng, (64, 64), BF16), operand(rng, (64, 64), BF16)
    c, d = np.ones((64, 64), np.float32), np.full((64, 64), np.nan, np.float32)
    with use_executor(executor), tilejit.options(target="sm_90a"):
        kernel(a, b, c, d)
    np.testing.assert_allclose(c, 1 + product(a, b), atol=1e-4)
    np.testing.assert_array_equal(d, 2 * c)


def test_multiplies_of_one_round_run_beside_other_work(rng):
    """Neither the second product nor the last one is waited for before it is needed; a tile that
    threads fill again is not written before all have multiplied it."""

    @jit
    def kernel(A: T.Tensor, B: T.Tensor, V: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, T.ceildiv(A.shape[0], 128), threads=256) as (_, by):
            a = T.alloc_shared((128, 32), A.dtype)
            b = T.alloc_shared((256, 32), B.dtype)
            v = T.alloc_shared((256, 64), V.dtype)
            made = T.alloc_shared((128, 256), A.dtype)
            first = T.alloc_fragment((128, 256), "float32")
            total = T.alloc_fragment((128, 64), "float32")
            other = T.alloc_fragment((128, 64), "float32")
            T.clear(total)
            T.clear(other)
            T.copy(A[by * 128, 0], a)
            for k in T.Pipelined(T.ceildiv(B.shape[0], 256), num_stages=2):
                T.copy(B[k * 256, 0], b)
                T.copy(V[k * 256, 0], v)
                T.gemm(a, b, first, transpose_B=True, clear_accum=True)
                T.copy(first, made)
                T.gemm(made, v, total)
                T.gemm(made, v, other)
                for i, j in T.Parallel(128, 64):
                    total[i, j] *= 0.5
            T.copy(total, C[by * 128, 0])
            T.copy(other, D[by * 128, 0])

    a, b, v = (operand(rng, s, BF16) for s in ((130, 32), (520, 32), (520, 64)))
    c, d = (np.full((130, 64), np.nan, np.float32) for _ in range(2))
    with use_executor("simulator"), tilejit.options(target="sm_90a"):
        kernel(a, b, v, c, d)
    total, other = np.zeros((130, 64)), np.zeros((130, 64))
    for k in range(0, 520, 256):
        made = product(a, b[k : k + 256].T).astype(BF16)
        part = product(made, v[k : k + 256])
        total, other = (total + part) / 2, other + part
    np.testing.assert_allclose(c, total, atol=0.3, rtol=2e-2)
    np.testing.assert_allclose(d, other, atol=0.3, rtol=2e-2)
    planned = str(kernel.compile(a, b, v, c, d, target="sm_90a").kernels[0].planned)
    assert "T.wait_wgmma(1)" in planned


def test_copies_share_strips_when_little_memory_is_left(rng):
    @jit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(T.ceildiv(A.shape[0], 128), threads=256) as bx:
            a = T.alloc_shared((128, 256), A.dtype)
            b = T.alloc_shared((128, 256), B.dtype)
            c = T.alloc_fragment((128, 128), "float32")
            d = T.alloc_fragment((128, 128), "float32")
            T.clear(c)
            T.clear(d)
            T.copy(A[bx * 128, 0], a)
            for k in T.Pipelined(T.ceildiv(B.shape[0], 128), num_stages=2):
                T.copy(B[k * 128, 0], b)
                T.gemm(a, b, c, transpose_B=True)
                T.gemm(a, b, d, transpose_B=True)
            T.copy(c, C[bx * 128, 0])
            T.copy(d, D[bx * 128, 0])

    specs = [T.Tensor((512, 256), "bfloat16")] * 2 + [T.Tensor((512, 128), "bfloat16")] * 2
    text = kernel.compile(*specs, target="sm_90a").explain()
    assert "c -> C: by TMA" in text and "d -> D: by TMA" in text
    a, b = operand(rng, (200, 256), BF16), operand(rng, (200, 256), BF16)
    c, d = (np.full((200, 128), np.nan, BF16) for _ in range(2))
    with use_executor("simulator"), tilejit.options(target="sm_90a"):
        kernel(a, b, c, d)
    wanted = product(
        a, np.pad(b.astype(np.float32), ((0, 56), (0, 0))).reshape(2, 128, 256).sum(0).T
    )
    for result in (c, d):
        np.testing.assert_allclose(result.astype(np.float64), wanted, atol=0.3, rtol=2e-2)
