"""Kernels as TileLang's users write them, with nothing but the import changed."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


def small(rng: np.random.Generator, *shape: int, dtype=np.float16) -> np.ndarray:
    """Integers, whose sums of products are exact."""
    return rng.integers(-3, 4, shape).astype(dtype)


def test_matmul_with_annotations_in_the_body_is_right(executor, rng):
    @tilejit
    def matmul(A, B, block_M: int = 32, block_N: int = 32, block_K: int = 16, dtype=T.float16):
        M, N, K = T.const("M, N, K")
        A: T.Tensor[[M, K], dtype]
        B: T.Tensor[[K, N], dtype]
        C = T.empty((M, N), dtype)
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=128) as (bx, by):
            A_shared = T.alloc_shared((block_M, block_K), dtype)
            B_shared = T.alloc_shared((block_K, block_N), dtype)
            C_local = T.alloc_fragment((block_M, block_N), T.float32)
            T.clear(C_local)
            for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=3):
                T.copy(A[by * block_M, k * block_K], A_shared)
                T.copy(B[k * block_K, bx * block_N], B_shared)
                T.gemm(A_shared, B_shared, C_local)
            T.copy(C_local, C[by * block_M, bx * block_N])
        return C

    for M, N, K in ((50, 70, 40), (33, 31, 17)):
        a, b = small(rng, M, K), small(rng, K, N)
        want = (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float16)
        assert (np.asarray(matmul(a, b)) == want).all()


@pytest.mark.parametrize("load", ["serial", "vectorized"])
def test_gemv_whose_threads_share_a_row_is_right(executor, rng, load):
    @tilejit
    def gemv(A, B, BLOCK_N: int, reduce_threads: int, dtype=T.float16, accum_dtype=T.float):
        N, K = T.const("N, K")
        TILE_K = 128 // T.dtype(dtype).bits
        BLOCK_K = reduce_threads * TILE_K
        A: T.Tensor((K,), dtype)
        B: T.Tensor((N, K), dtype)
        C = T.empty((N,), dtype)
        with T.Kernel(T.ceildiv(N, BLOCK_N), threads=(BLOCK_N, reduce_threads)) as bn:
            tn = T.get_thread_binding(0)
            tk = T.get_thread_binding(1)
            A_local = T.alloc_local((TILE_K,), dtype)
            B_local = T.alloc_local((TILE_K,), dtype)
            C_shared = T.alloc_shared((BLOCK_N,), accum_dtype)
            C_accum = T.alloc_local((1,), accum_dtype)
            if tk == 0:
                C_shared[tn] = 0
            T.clear(C_accum)
            for bk in T.serial(T.ceildiv(K, BLOCK_K)):
                for k in T.vectorized(TILE_K) if load == "vectorized" else T.serial(TILE_K):
                    A_local[k] = A[bk * BLOCK_K + tk * TILE_K + k]
                    B_local[k] = B[bn * BLOCK_N + tn, bk * BLOCK_K + tk * TILE_K + k]
                for k in T.serial(TILE_K):
                    C_accum[0] += A_local[k].astype(accum_dtype) * B_local[k].astype(accum_dtype)
            T.atomic_add(C_shared[tn], C_accum[0])
            C[bn * BLOCK_N + tn] = C_shared[tn]
        return C

    a, b = small(rng, 56), small(rng, 21, 56)
    want = (b.astype(np.float32) @ a.astype(np.float32)).astype(np.float16)
    assert (np.asarray(gemv(a, b, 8, 4)) == want).all()


def test_stream_k_matmul_with_a_traced_while_loop_is_right(run, rng):
    m, n, k = 64, 96, 128
    tile, programs = 32, 5
    steps = k // tile
    total = (m // tile) * (n // tile) * steps
    full, part = total // programs, total % programs

    @tilejit
    def streamk(A, B, C, dtype=T.float16, num_stages=2):
        M, N, K = T.const("M, N, K")
        A: T.Tensor((M, K), dtype)
        B: T.Tensor((N, K), dtype)
        C: T.Tensor((M, N), T.float32)
        with T.Kernel(1, threads=64):
            T.clear(C)
        with T.Kernel(programs, threads=64) as pid:
            A_shared = T.alloc_shared((tile, tile), dtype)
            B_shared = T.alloc_shared((tile, tile), dtype)
            C_local = T.alloc_fragment((tile, tile), T.float32)
            start_iter = T.alloc_fragment((1,), T.int32, "local")
            end_iter = T.alloc_fragment((1,), T.int32, "local")
            start_iter[0] = pid * full + T.min(pid, part)
            last_iter = (pid + 1) * full + T.min(pid + 1, part)
            while start_iter[0] < last_iter:
                end_iter[0] = T.min(start_iter[0] + (steps - (start_iter[0] % steps)), last_iter)
                tile_id = start_iter[0] // steps
                first = start_iter[0] % steps
                pid_m = tile_id // T.ceildiv(N, tile)
                pid_n = tile_id % T.ceildiv(N, tile)
                T.clear(C_local)
                for k in T.Pipelined(end_iter[0] - start_iter[0], num_stages=num_stages):
                    T.copy(A[pid_m * tile, (k + first) * tile], A_shared)
                    T.copy(B[pid_n * tile, (k + first) * tile], B_shared)
                    T.gemm(A_shared, B_shared, C_local, transpose_B=True)
                if first == 0 and (end_iter[0] % steps == 0):
                    T.copy(C_local, C[pid_m * tile, pid_n * tile])
                else:
                    for i, j in T.Parallel(tile, tile):
                        T.atomic_add(C[pid_m * tile + i, pid_n * tile + j], C_local[i, j])
                start_iter[0] = end_iter[0]

    a, b = small(rng, m, k), small(rng, n, k)
    c = run(streamk, a, b, out=[((m, n), np.float32)])
    assert (c == a.astype(np.float32) @ b.T.astype(np.float32)).all()


def test_grouped_matmul_that_finds_its_group_is_right(run, rng):
    @tilejit
    def grouped(sizes, K, N, block_M, block_N, block_K, dtype="float16"):
        rows, groups = sum(sizes), len(sizes)
        blocks = sum(math.ceil(size / block_M) for size in sizes)

        @T.prim_func
        def kernel(
            A: T.Tensor([rows, K], dtype),
            B: T.Tensor([groups, K, N], dtype),
            batch_sizes: T.Tensor([groups], "int32"),
            batch_offsets: T.Tensor([groups], "int32"),
            padded_offsets: T.Tensor([groups], "int32"),
            C: T.Tensor([rows, N], dtype),
        ):
            with T.Kernel(blocks, T.ceildiv(N, block_N), threads=128) as (bx, by):
                A_shared = T.alloc_shared([block_M, block_K], dtype)
                B_shared = T.alloc_shared([block_K, block_N], dtype)
                C_local = T.alloc_fragment([block_M, block_N], "float32")
                group = T.alloc_local([1], "int32")
                size = T.alloc_local([1], "int32")
                padded = bx * block_M
                for i in range(groups):
                    group[0] = T.if_then_else(padded >= padded_offsets[i], i, group[0])
                size[0] = batch_sizes[group[0]]
                start = padded - padded_offsets[group[0]] + batch_offsets[group[0]]
                left = T.max(0, T.min(block_M, size[0] + padded_offsets[group[0]] - padded))
                T.clear(C_local)
                for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=2):
                    T.copy(A[start : start + block_M, k * block_K : (k + 1) * block_K], A_shared)
                    T.copy(
                        B[
                            group[0],
                            k * block_K : (k + 1) * block_K,
                            by * block_N : (by + 1) * block_N,
                        ],
                        B_shared,
                    )
                    T.gemm(A_shared, B_shared, C_local)
                for i, j in T.Parallel(block_M, block_N):
                    if i < left:
                        C[start + i, by * block_N + j] = C_local[i, j]

        return kernel

    sizes, K, N = (20, 40, 7), 48, 40
    offsets, padded = np.array([0, 20, 60], np.int32), np.array([0, 32, 80], np.int32)
    a, b = small(rng, sum(sizes), K), small(rng, len(sizes), K, N)
    c = run(
        grouped(sizes, K, N, 16, 32, 16),
        *(a, b, np.array(sizes, np.int32), offsets, padded),
        out=[((sum(sizes), N), np.float16)],
    )
    parts = zip(np.split(a, offsets[1:]), b, strict=True)
    want = np.concatenate([x.astype(np.float32) @ y.astype(np.float32) for x, y in parts])
    assert (c == want.astype(np.float16)).all()


def test_copies_by_indexes_held_in_a_fragment_are_right(run, rng):
    M, N, bm, bn = 64, 96, 16, 32

    @tilejit
    def factory(dtype=T.float16):
        @T.prim_func
        def main(
            A: T.Tensor((M, N), dtype),
            BlockMask: T.Tensor((M // bm, N // bn), T.int32),
            B: T.Tensor((M, N), dtype),
        ):
            with T.Kernel(T.ceildiv(M, bm)) as (by,):
                A_shared = T.alloc_shared((bm, bn), dtype)
                rows = T.alloc_fragment((N // bn,), T.int32)
                T.copy(BlockMask[by, :], rows)
                for i in T.Pipelined(N // bn):
                    row = rows[i]
                    if row >= 0:
                        T.copy(A[row, 0], A_shared)
                    else:
                        T.clear(A_shared)
                    T.copy(
                        A_shared,
                        B[by * bm : (by + 1) * bm, i * bn : (i + 1) * bn],
                    )

        return main

    a = small(rng, M, N)
    mask = (rng.integers(-1, M // bm, (M // bm, N // bn)) * bm).astype(np.int32)
    want = np.zeros_like(a)
    for y, x in np.ndindex(mask.shape):
        if mask[y, x] >= 0:
            tile = a[mask[y, x] : mask[y, x] + bm, :bn]
            want[y * bm : (y + 1) * bm, x * bn : (x + 1) * bn] = tile
    assert (run(factory(), a, mask, out=[((M, N), np.float16)]) == want).all()


def test_vectorized_loop_whose_rounds_depend_on_each_other_runs_in_order(run):
    @tilejit
    def kernel(A: T.Tensor, Sums: T.Tensor, Chain: T.Tensor, Pairs: T.Tensor, Last: T.Tensor):
        with T.Kernel(1, threads=32):
            t = T.get_thread_binding(0)
            chain = T.alloc_local((8,), "float32")
            chain[0] = t
            Sums[t] = 0
            for k in T.vectorized(4):
                Sums[t] = Sums[t] + A[t, k]
            for k in T.vectorized(7):
                chain[k + 1] = chain[k] + 1
            for k in T.vectorized(8):
                Chain[t, k] = chain[k]
            for k in T.vectorized(8):
                Pairs[t, k // 2] = chain[k]
            for k in T.vectorized(4):
                Last[t, k] = 1
                Last[t, k + 1] = 2

    a = np.arange(128, dtype=np.float32).reshape(32, 4)
    shapes = [(32,), (32, 8), (32, 4), (32, 5)]
    sums, chain, pairs, last = run(kernel, a, out=[(s, np.float32) for s in shapes])
    ramp = np.arange(32)[:, None] + np.arange(8)
    assert (sums == a.sum(1)).all()
    assert (chain == ramp).all()
    assert (pairs == ramp[:, 1::2]).all()
    assert (last == [1, 1, 1, 1, 2]).all()


def test_vectorized_loop_with_independent_rounds_keeps_its_wide_accesses():
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            t = T.get_thread_binding(0)
            for k in T.vectorized(4):
                A[t, k] = A[t, k] * 2 + B[t, k]
                A[t, k] += 1

    spec = T.Tensor((32, 4), "float32")
    ptx = kernel.compile(spec, spec, target="sm_80").ptx
    assert "ld.global.v4" in ptx.replace(".nc", "") and "st.global.v4" in ptx


def test_butterflies_over_local_arrays_with_traced_strides_are_right(executor, rng):
    threads, each = 8, 8

    @tilejit
    def transform(A, n, dtype):
        b = T.const("b")
        A: T.Tensor((b, n), dtype)
        B = T.empty((b, n), dtype)
        assert n == threads * each, f"{n=} is not {threads * each}"
        with T.Kernel(b, threads=threads) as bx:
            local = T.alloc_local((each,), dtype)
            tx = T.get_thread_binding(0)
            for i in T.vectorized(each):
                local[i] = A[bx, tx * each + i]
            for i in T.serial(int(math.log2(each))):
                chunk = 1 << (i + 1)
                for j in T.serial(each // chunk):
                    base = j * chunk
                    for k in T.serial(chunk // 2):
                        half = base + k + chunk // 2
                        local[base + k] = local[base + k] + local[half]
                        local[half] = local[base + k] - 2 * local[half]
            for i in T.vectorized(each):
                B[bx, tx * each + i] = local[i]
        return B

    a = small(rng, 3, 64, dtype=np.float32)
    h = np.ones((1, 1))
    for _ in range(3):
        h = np.block([[h, h], [h, -h]])
    want = (a.reshape(3, 8, 8) @ h.T).reshape(3, 64)
    assert (np.asarray(transform(a, 64, T.float32)) == want).all()
