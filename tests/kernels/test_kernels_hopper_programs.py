"""Programs around Hopper's multiplies: operands made by threads or held in registers, several
multiplies and loops, branches, bounds known at run time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, assert_near, assert_product, explained, matmul, operand

import tilejit.language as T
from tilejit import tilejit

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def wide(*arrays):
    return [x.astype(np.float64) for x in arrays]


@pytest.mark.parametrize("stages", [0, 1, 2, 3, 4, None])
@pytest.mark.parametrize("K", [32, 40, 128, 200])
def test_loop_has_any_number_of_stages(hopper, rng, stages, K):
    a, b = operand(rng, (80, K), BF16), operand(rng, (K, 72), BF16)
    c = hopper(matmul, a, b, out=[((80, 72), "float32")], stages=stages)
    assert_product(c, a, b)
    assert "wgmma" in explained(matmul, a, b, c, stages=stages)


@pytest.mark.parametrize("kind", ["serial", "range", "unroll"])
def test_loop_over_k_may_be_an_ordinary_one(hopper, rng, kind):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kind):
        M, K = A.shape
        N = C.shape[1]
        loops = {"serial": T.serial, "range": range, "unroll": T.unroll}
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in loops[kind](K // 32):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (80, 96), BF16), operand(rng, (96, 72), BF16)
    c = hopper(kernel, a, b, out=[((80, 72), "float32")], kind=kind)
    assert_product(c, a, b)
    assert "wgmma" in explained(kernel, a, b, c, kind=kind)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_operand_that_threads_make_is_multiplied(hopper, rng, stages):
    """B is dequantised by ordinary stores: a fence and a meeting come before the multiply."""

    @tilejit
    def kernel(A: T.Tensor, Q: T.Tensor, scale: T.Tensor, C: T.Tensor, *, stages):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            q = T.alloc_shared((32, 64), Q.dtype)
            b = T.alloc_shared((32, 64), A.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=stages):
                T.copy(A[by * 64, k * 32], a)
                T.copy(Q[k * 32, bx * 64], q)
                for i, j in T.Parallel(32, 64):
                    b[i, j] = q[i, j] * scale[bx * 64 + j]
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, q = operand(rng, (80, 96), BF16), operand(rng, (96, 80), np.int8)
    scale = rng.choice([0.25, 0.5, 1.0], 80).astype(np.float32)
    c = hopper(kernel, a, q, scale, out=[((80, 80), "float32")], stages=stages)
    assert_product(c, a, (q * scale).astype(BF16))
    text = explained(kernel, a, q, scale, c, stages=stages)
    assert "wgmma" in text


def test_operands_that_threads_make_without_a_loop_are_multiplied(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=256):
            a = T.alloc_shared((128, 32), "bfloat16")
            b = T.alloc_shared((32, 64), "bfloat16")
            acc = T.alloc_fragment((128, 64), "float32")
            for i, j in T.Parallel(128, 32):
                a[i, j] = A[i, j] * 2
            for i, j in T.Parallel(32, 64):
                b[i, j] = B[i, j] + 1
            T.gemm(a, b, acc, clear_accum=True)
            for i, j in T.Parallel(32, 64):
                b[i, j] = B[i, j]
            T.gemm(a, b, acc)
            T.copy(acc, C)

    a = rng.integers(-9, 9, (128, 32)).astype(np.float32)
    b = rng.integers(-9, 9, (32, 64)).astype(np.float32)
    c = hopper(kernel, a, b, out=[((128, 64), "float32")])
    np.testing.assert_array_equal(c, 2 * a @ (2 * b + 1))
    assert "wgmma" in explained(kernel, a, b, c)


@pytest.mark.parametrize("dtype", [BF16, np.float16, E4M3, np.int8], ids=str)
@pytest.mark.parametrize("in_loop", [True, False])
def test_left_operand_in_registers_is_multiplied(hopper, rng, dtype, in_loop):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, accum, in_loop):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_fragment((64, 64), A.dtype)
            b = T.alloc_shared((64, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), accum)
            T.clear(acc)
            if not in_loop:
                T.copy(A[by * 64, 0], a)
            for k in T.Pipelined(T.ceildiv(K, 64), num_stages=2):
                if in_loop:
                    T.copy(A[by * 64, k * 64], a)
                T.copy(B[bx * 64, k * 64], b)
                T.gemm(a, b, acc, transpose_B=True)
            T.copy(acc, C[by * 64, bx * 64])

    accum = "int32" if dtype is np.int8 else "float32"
    K = 192 if in_loop else 64
    a, b = operand(rng, (80, K), dtype), operand(rng, (80, K), dtype)
    c = hopper(kernel, a, b, out=[((80, 80), accum)], accum=accum, in_loop=in_loop)
    assert_product(c, a, b.T)
    text = explained(kernel, a, b, c, accum=accum, in_loop=in_loop)
    assert "wgmma" in text
    assert "of b by TMA" in text


def test_two_products_of_one_loop_are_right(hopper, rng):
    """Gate and up projections: one A, two B, two accumulators."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            d = T.alloc_shared((32, 64), D.dtype)
            gate = T.alloc_fragment((64, 64), "float32")
            up = T.alloc_fragment((64, 64), "float32")
            T.clear(gate)
            T.clear(up)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.copy(D[k * 32, bx * 64], d)
                T.gemm(a, b, gate)
                T.gemm(a, d, up)
            for i, j in T.Parallel(64, 64):
                gate[i, j] = T.max(gate[i, j], 0) * up[i, j]
            T.copy(gate, C[by * 64, bx * 64])

    a, b, d = (operand(rng, s, BF16) for s in ((80, 96), (96, 72), (96, 72)))
    c = hopper(kernel, a, b, d, out=[((80, 72), "float32")])
    x, y, z = wide(a, b, d)
    error = 200 * FLOAT32_STEP * (np.abs(x) @ np.abs(y)) * (np.abs(x) @ np.abs(z))
    assert_near(c, np.maximum(x @ y, 0) * (x @ z), error)
    text = explained(kernel, a, b, d, c)
    assert text.count("wgmma.m64n64k16") == 2
    assert "by TMA" in text


def test_two_products_into_one_accumulator_are_right(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, D: T.Tensor, E: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            d = T.alloc_shared((64, 32), D.dtype)
            e = T.alloc_shared((32, 64), E.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
                T.copy(D[by * 64, k * 32], d)
                T.copy(E[k * 32, bx * 64], e)
                T.gemm(d, e, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b, d, e = (operand(rng, s, BF16) for s in ((80, 96), (96, 72), (80, 96), (96, 72)))
    c = hopper(kernel, a, b, d, e, out=[((80, 72), "float32")])
    assert_product(c, np.hstack([a, d]), np.vstack([b, e]))
    assert explained(kernel, a, b, d, e, c).count("wgmma.m64n64k16") == 2


@pytest.mark.parametrize("threads, rows", [(128, 64), (256, 128)])
@pytest.mark.parametrize("through", ["fragment", "shared"])
def test_attention_is_right(hopper, rng, threads, rows, through):
    """Two multiplies, the second's left operand made of the first's accumulator."""

    @tilejit
    def attention(Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, *, BM, BN, threads, through):
        heads, length, D = Q.shape
        with T.Kernel(T.ceildiv(length, BM), heads, threads=threads) as (bx, head):
            q = T.alloc_shared((BM, D), Q.dtype)
            k = T.alloc_shared((BN, D), K.dtype)
            v = T.alloc_shared((BN, D), V.dtype)
            s = T.alloc_fragment((BM, BN), "float32")
            p = T.alloc_fragment((BM, BN), Q.dtype)
            p_shared = T.alloc_shared((BM, BN), Q.dtype)
            acc = T.alloc_fragment((BM, D), "float32")
            total = T.alloc_fragment((BM,), "float32")
            top = T.alloc_fragment((BM,), "float32")
            last = T.alloc_fragment((BM,), "float32")
            T.copy(Q[head, bx * BM, 0], q)
            T.clear(acc)
            T.clear(total)
            T.fill(top, -1e30)
            for step in T.Pipelined(T.ceildiv(length, BN), num_stages=2):
                T.copy(K[head, step * BN, 0], k)
                T.gemm(q, k, s, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(BM, BN):
                    if step * BN + j >= length:
                        s[i, j] = -1e30
                for i in T.Parallel(BM):
                    last[i] = top[i]
                for i in T.Parallel(BM):
                    for j in T.serial(BN):
                        top[i] = T.max(top[i], s[i, j])
                for i, j in T.Parallel(BM, BN):
                    s[i, j] = T.exp(s[i, j] - top[i])
                for i in T.Parallel(BM):
                    total[i] *= T.exp(last[i] - top[i])
                for i in T.Parallel(BM):
                    for j in T.serial(BN):
                        total[i] += s[i, j]
                for i, j in T.Parallel(BM, D):
                    acc[i, j] *= T.exp(last[i] - top[i])
                T.copy(V[head, step * BN, 0], v)
                for i, j in T.Parallel(BM, BN):
                    p[i, j] = s[i, j]
                if through == "shared":
                    T.copy(p, p_shared)
                    T.gemm(p_shared, v, acc)
                else:
                    T.gemm(p, v, acc)
            for i, j in T.Parallel(BM, D):
                acc[i, j] /= total[i]
            T.copy(acc, O[head, bx * BM, 0])

    q, k, v = (operand(rng, (2, 136, 64), np.float16) for _ in range(3))
    q = (q * 0.25).astype(np.float16)
    constants = {"BM": rows, "BN": 64, "threads": threads, "through": through}
    o = hopper(attention, q, k, v, out=[((2, 136, 64), "float32")], **constants)
    for head in range(2):
        x, y, z = wide(q[head], k[head], v[head])
        p = np.exp(x @ y.T - (x @ y.T).max(1, keepdims=True))
        np.testing.assert_allclose(o[head], p / p.sum(1, keepdims=True) @ z, atol=4e-3)
    text = explained(attention, q, k, v, o, **constants)
    assert text.count("wgmma.m64n64k16") == 2
    assert "by TMA" in text


def test_several_pipelined_loops_follow_each_other(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, D: T.Tensor, E: T.Tensor, C: T.Tensor):
        M = A.shape[0]
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            d = T.alloc_shared((64, 64), D.dtype)
            e = T.alloc_shared((64, 64), E.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(A.shape[1], 32), num_stages=3):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            for i, j in T.Parallel(64, 64):
                acc[i, j] *= 2
            for k in T.Pipelined(T.ceildiv(D.shape[1], 64), num_stages=2):
                T.copy(D[by * 64, k * 64], d)
                T.copy(E[k * 64, bx * 64], e)
                T.gemm(d, e, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b, d, e = (operand(rng, s, BF16) for s in ((80, 96), (96, 72), (80, 136), (136, 72)))
    c = hopper(kernel, a, b, d, e, out=[((80, 72), "float32")])
    w, x, y, z = wide(a, b, d, e)
    error = 300 * FLOAT32_STEP * (2 * np.abs(w) @ np.abs(x) + np.abs(y) @ np.abs(z))
    assert_near(c, 2 * w @ x + y @ z, error)
    assert explained(kernel, a, b, d, e, c).count("wgmma.m64n64k16") == 2


def test_one_tile_may_be_brought_by_two_loops(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(2, num_stages=2):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            for k in T.Pipelined(T.ceildiv(K, 32) - 2, num_stages=2):
                T.copy(A[by * 64, (k + 2) * 32], a)
                T.copy(B[(k + 2) * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (80, 136), BF16), operand(rng, (136, 72), BF16)
    assert_product(hopper(kernel, a, b, out=[((80, 72), "float32")]), a, b)


@pytest.mark.parametrize("inner", [1, 3])
def test_pipelined_loop_in_a_loop_is_right(hopper, rng, inner):
    """Several output tiles for each block, one after the other."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, inner):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(M, 64 * inner), threads=128) as by:
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            for row in T.serial(inner):
                for bx in range(T.ceildiv(N, 64)):
                    T.clear(acc)
                    for k in T.Pipelined(T.ceildiv(K, 32), num_stages=3):
                        T.copy(A[(by * inner + row) * 64, k * 32], a)
                        T.copy(B[k * 32, bx * 64], b)
                        T.gemm(a, b, acc)
                    T.copy(acc, C[(by * inner + row) * 64, bx * 64])

    a, b = operand(rng, (208, 72), BF16), operand(rng, (72, 136), BF16)
    c = hopper(kernel, a, b, out=[((208, 136), "float32")], inner=inner)
    assert_product(c, a, b)
    text = explained(kernel, a, b, c, inner=inner)
    assert "wgmma" in text
    assert "of a, b by TMA" in text


@pytest.mark.parametrize("kind", ["block", "tensor", "scalar"])
def test_bounds_of_the_loop_are_known_only_at_run_time(hopper, rng, kind):
    """Lower triangular products, ragged groups, a number given."""

    @tilejit
    def kernel(
        A: T.Tensor, B: T.Tensor, counts: T.Tensor, C: T.Tensor, number: T.int32, *, kind
    ):  # fmt: skip
        M, N = C.shape
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            rounds = {"block": by * 2, "tensor": counts[by], "scalar": number}[kind]
            for k in T.Pipelined(rounds, num_stages=3):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (200, 128), BF16), operand(rng, (128, 72), BF16)
    counts = np.array([3, 0, 4, 1], np.int32)
    c = hopper(lambda a, b, n, c: kernel(a, b, n, c, 2, kind=kind), a, b, counts,
               out=[((200, 72), "float32")])  # fmt: skip
    for block in range(4):
        rows = slice(block * 64, min(200, block * 64 + 64))
        depth = 32 * {"block": block * 2, "tensor": counts[block], "scalar": 2}[kind]
        assert_product(c[rows], a[rows, :depth], b[:depth])
    text = explained(kernel, a, b, counts, c, 2, kind=kind)
    assert "wgmma" in text
    assert "of a, b by TMA" in text


@pytest.mark.parametrize("start, step", [(1, 1), (0, 2), (1, 2)])
def test_loop_begins_and_steps_anyhow(hopper, rng, start, step):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, start, step):
        K = A.shape[1]
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(start, T.ceildiv(K, 32), num_stages=2):
                T.copy(A[0, k * 32 * step], a)
                T.copy(B[k * 32 * step, 0], b)
                T.gemm(a, b, acc)
            T.copy(acc, C)

    a, b = operand(rng, (64, 256), BF16), operand(rng, (256, 64), BF16)
    c = hopper(kernel, a, b, out=[((64, 64), "float32")], start=start, step=step)
    columns = [k * 32 * step + i for k in range(start, 8) for i in range(32)]
    columns = [x for x in columns if x < 256]  # past the end are zeros
    assert_product(c, a[:, columns], b[columns])


@pytest.mark.parametrize("what", ["block", "loop", "tensor", "around"])
def test_branches_stand_in_or_around_the_loop(hopper, rng, what):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, flags: T.Tensor, C: T.Tensor, *, what):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            if what == "around":
                if flags[by] > 0:
                    for k in T.Pipelined(T.ceildiv(K, 32), num_stages=3):
                        T.copy(A[by * 64, k * 32], a)
                        T.copy(B[k * 32, bx * 64], b)
                        T.gemm(a, b, acc)
            else:
                for k in T.Pipelined(T.ceildiv(K, 32), num_stages=3):
                    condition = {"block": by > 0, "loop": k % 2 == 0, "tensor": flags[k] > 0}[what]
                    if condition:
                        T.copy(A[by * 64, k * 32], a)
                        T.copy(B[k * 32, bx * 64], b)
                        T.gemm(a, b, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (136, 128), BF16), operand(rng, (128, 72), BF16)
    flags = np.array([1, 0, 1, 1], np.int32)
    c = hopper(kernel, a, b, flags, out=[((136, 72), "float32")], what=what)
    for block in range(3):
        rows = slice(block * 64, min(136, block * 64 + 64))
        taken = {
            "block": [block > 0] * 4, "loop": [True, False] * 2, "tensor": flags > 0,
            "around": [flags[block] > 0] * 4,
        }[what]  # fmt: skip
        columns = [k for k in range(128) if taken[k // 32]]
        assert_product(c[rows], a[rows][:, columns], b[columns])
    text = explained(kernel, a, b, flags, c, what=what)
    assert "a producer warp fills 3 slots of a, b by TMA" in text


def test_branches_in_a_round_bring_one_tile_or_another(hopper, rng):
    """A tile that every round brings, two that one side of a branch brings, one of them where a
    branch in the branch is taken; as many slots as are left, or given."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, D: T.Tensor, flags: T.Tensor, C: T.Tensor, *, stages):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            d = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=stages):
                T.copy(A[by * 64, k * 32], a)
                if flags[by, k] > 0:
                    T.copy(B[k * 32, bx * 64], b)
                    T.gemm(a, b, acc)
                    if flags[by, k] > 1:
                        T.copy(D[k * 32, bx * 64], d)
                        T.gemm(a, d, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a = operand(rng, (136, 200), BF16)
    b, d = operand(rng, (200, 72), BF16), operand(rng, (200, 72), BF16)
    flags = rng.integers(0, 3, (3, 7)).astype(np.int32)
    for stages in (None, 2):
        c = hopper(kernel, a, b, d, flags, out=[((136, 72), "float32")], stages=stages)
        for block in range(3):
            rows, seen = slice(block * 64, block * 64 + 64), flags[block].repeat(32)[:200]
            left = np.hstack([a[rows, seen > 0], a[rows, seen > 1]])
            assert_product(c[rows], left, np.vstack([b[seen > 0], d[seen > 1]]))
        text = explained(kernel, a, b, d, flags, c, stages=stages)
        for tile in "abd":
            assert f" slots of {tile} by TMA" in text


def test_operand_that_both_sides_of_a_branch_fill_is_copied_by_threads(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, D: T.Tensor, flags: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(A.shape[1] // 32, num_stages=2):
                T.copy(A[0, k * 32], a)
                if flags[k] > 0:
                    T.copy(B[k * 32, 0], b)
                else:
                    T.copy(D[k * 32, 0], b)
                T.gemm(a, b, acc)
            T.copy(acc, C)

    a = operand(rng, (64, 128), BF16)
    b, d = operand(rng, (128, 64), BF16), operand(rng, (128, 64), BF16)
    flags = np.array([1, 0, 0, 1], np.int32)
    c = hopper(kernel, a, b, d, flags, out=[((64, 64), "float32")])
    assert_product(c, a, np.where(flags.repeat(32)[:, None] > 0, b, d))
    text = explained(kernel, a, b, d, flags, c)
    assert "wgmma" in text
    assert "fills 2 slots of a by TMA" in text
    assert "copy B -> b: by the block's threads, not TMA (b is written elsewhere too)" in text


def test_loop_whose_copies_stand_in_a_branch_says_why_none_runs_ahead(rng):
    @tilejit
    def kernel(A: T.Tensor, flags: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            for k in T.Pipelined(A.shape[1] // 32):
                if flags[k] > 0:
                    T.copy(A[0, k * 32], a)
                    for i, j in T.Parallel(64, 32):
                        C[i, j] += a[i, j]

    single = "float32"
    a, c = T.Tensor((64, 128), single), T.Tensor((64, 32), single)
    flags = T.Tensor((4,), "int32")
    text = kernel.compile(a, flags, c, target="sm_90a").explain()
    assert "serial, no copy can run ahead: what fills a stands in a branch" in text


def test_guarded_multiply_in_a_loop_that_brings_every_time(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=3):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                if k <= by:
                    T.gemm(a, b, acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (200, 128), BF16), operand(rng, (128, 72), BF16)
    c = hopper(kernel, a, b, out=[((200, 72), "float32")])
    for block in range(4):
        rows, depth = slice(block * 64, min(200, block * 64 + 64)), 32 * (block + 1)
        assert_product(c[rows], a[rows, :depth], b[:depth])


@tilejit
def paged(A: T.Tensor, B: T.Tensor, pages: T.Tensor, C: T.Tensor, *, kind, rows=16, stages=None):
    """C = sum of A[:, 64 k on] @ the 64 rows of B in pages of `rows` that a table names: pages come
    piece by piece, by a loop or one after the other; with a kind of piece that none brings, so."""
    M, K = A.shape
    N = C.shape[1]
    count = 64 // rows
    loops = {"unroll": T.unroll, "serial": T.serial}
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        own = T.alloc_fragment((rows, 64), B.dtype)
        T.clear(acc)
        for k in T.Pipelined(K // 64, num_stages=stages):
            T.copy(A[by * 64, k * 64], a)
            for piece in loops[kind](count) if kind in loops else tuple(range(count)):
                page = pages[k * count + piece]
                part = b[piece * rows : piece * rows + rows, :]
                if kind == "thread" and piece == 1:
                    T.copy(B[page, :, bx * 64 : bx * 64 + 64], own)
                    T.copy(own, part)
                elif kind == "branch":
                    if page >= 0:
                        T.copy(B[page, :, bx * 64 : bx * 64 + 64], part)
                elif kind == "twice" and piece == 1:
                    T.copy(B[0, :, bx * 64 : bx * 64 + 64], part)
                    T.copy(B[page, :, bx * 64 : bx * 64 + 64], part)
                elif kind == "between" and piece == count - 1:
                    T.gemm(a, b, acc)
                    T.copy(B[page, :, bx * 64 : bx * 64 + 64], part)
                else:
                    T.copy(B[page, :, bx * 64 : bx * 64 + 64], part)
            if kind == "between":
                T.clear(acc)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64, bx * 64])


def run_paged(hopper, rng, kind, **constants):
    rows, K = constants.get("rows", 16), 192
    a, b = operand(rng, (80, K), BF16), operand(rng, (20, rows, 72), BF16)
    pages = rng.integers(0, 20, K // rows).astype(np.int32)
    c = hopper(paged, a, b, pages, out=[((80, 72), "float32")], kind=kind, **constants)
    left, right = a, b[pages].reshape(K, 72)
    if kind == "between":  # sums begin anew with each tile
        left, right = a[:, -64:], right[-64:]
    assert_product(c, left, right)
    return explained(paged, a, b, pages, c, kind=kind, **constants)


@pytest.mark.parametrize("stages", [None, 2])
@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("kind", ["unroll", "serial", "each"])
def test_pieces_of_a_tile_are_brought_to_one_slot(hopper, rng, kind, rows, stages):
    text = run_paged(hopper, rng, kind, rows=rows, stages=stages)
    assert "wgmma" in text
    assert f"{stages or 12} slots of a, b by TMA" in text


@pytest.mark.parametrize(
    "kind, rows, reason",
    [
        ("thread", 16, "b is written elsewhere too"),
        ("branch", 16, "which part of b it fills is known at run time only"),
        ("twice", 16, "the copies that fill parts of b do not fill each element once"),
        ("between", 16, "b is not used after all copies that fill it"),
        ("each", 4, "it begins inside 8 rows of b"),
    ],
)
def test_pieces_are_copied_by_threads_where_one_cannot_be_brought(hopper, rng, kind, rows, reason):
    text = run_paged(hopper, rng, kind, rows=rows)
    assert "slots of a, b by TMA" not in text
    assert reason in text


def test_convolution_of_slices_is_right(hopper, rng):
    """A one-dimensional convolution: the left tile comes from another place for every tap."""

    @tilejit
    def conv(X: T.Tensor, W: T.Tensor, Y: T.Tensor):
        batch, length, channels = X.shape
        taps, _, N = W.shape
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(length, 64), batch, threads=128) as (bx, by, bz):
            x = T.alloc_shared((64, 32), X.dtype)
            w = T.alloc_shared((32, 64), W.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(taps * T.ceildiv(channels, 32), num_stages=3):
                tap = k // T.ceildiv(channels, 32)
                c = k % T.ceildiv(channels, 32)
                T.copy(X[bz, by * 64 + tap - taps // 2, c * 32], x)
                T.copy(W[tap, c * 32, bx * 64], w)
                T.gemm(x, w, acc)
            T.copy(acc, Y[bz, by * 64, bx * 64])

    x, w = operand(rng, (2, 72, 64), BF16), operand(rng, (3, 64, 72), BF16)
    y = hopper(conv, x, w, out=[((2, 72, 72), "float32")])
    for z in range(2):
        padded = np.zeros((74, 64), BF16)
        padded[1:-1] = x[z]
        columns = np.hstack([padded[t : t + 72] for t in range(3)])
        assert_product(y[z], columns, w.reshape(-1, 72))
    text = explained(conv, x, w, y)
    assert "wgmma" in text
    assert "of x, w by TMA" in text


def test_gathered_rows_are_multiplied(hopper, rng):
    """Experts' weights chosen by an index that is read from memory."""

    @tilejit
    def grouped(X: T.Tensor, W: T.Tensor, expert: T.Tensor, Y: T.Tensor):
        M, K = X.shape
        N = Y.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            x = T.alloc_shared((64, 32), X.dtype)
            w = T.alloc_shared((32, 64), W.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            chosen = expert[by]
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=3):
                T.copy(X[by * 64, k * 32], x)
                T.copy(W[chosen, k * 32, bx * 64], w)
                T.gemm(x, w, acc)
            T.copy(acc, Y[by * 64, bx * 64])

    x, w = operand(rng, (192, 64), BF16), operand(rng, (4, 64, 72), BF16)
    expert = np.array([2, 0, 3], np.int32)
    y = hopper(grouped, x, w, expert, out=[((192, 72), "float32")])
    for block in range(3):
        rows = slice(block * 64, block * 64 + 64)
        assert_product(y[rows], x[rows], w[expert[block]])
    text = explained(grouped, x, w, expert, y)
    assert "wgmma" in text
    assert "by TMA" in text


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int8], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4,), (16,), (32,), (520,), (2048,), (1, 64), (5, 64), (3, 16), (7, 32), (8, 16), (9, 128),
     (257, 16), (264, 64), (520, 16), (8, 264), (3, 520)],
    ids=str,
)  # fmt: skip
def test_tile_of_any_shape_is_brought_beside_the_operands(hopper, rng, dtype, shape):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, E: T.Tensor, C: T.Tensor, D: T.Tensor, *, shape):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            e = T.alloc_shared(shape, E.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(A.shape[1] // 32, num_stages=3):
                T.copy(A[0, k * 32], a)
                T.copy(B[k * 32, 0], b)
                T.gemm(a, b, acc)
                if len(shape) == 1:
                    T.copy(E[k * shape[0]], e)
                    for i in T.Parallel(shape[0]):
                        D[k * shape[0] + i] = e[i]
                else:
                    T.copy(E[k * shape[0], 0], e)
                    for i, j in T.Parallel(*shape):
                        D[k * shape[0] + i, j] = e[i, j]
            T.copy(acc, C)

    a, b = operand(rng, (64, 128), BF16), operand(rng, (128, 64), BF16)
    e = operand(rng, (4 * shape[0], *shape[1:]), dtype)
    c, d = hopper(kernel, a, b, e, out=[((64, 64), "float32"), (e.shape, dtype)], shape=shape)
    assert_product(c, a, b)
    assert d.tobytes() == e.tobytes()
    text = explained(kernel, a, b, e, c, d, shape=shape)
    assert "wgmma" in text
    assert "slots of a, b by TMA" in text
    assert "of e by TMA" in text or "copy E -> e: by the block's threads, not TMA (" in text


def test_converted_and_written_tiles_are_copied_beside_the_operands(hopper, rng):
    """What cannot be brought, because it is converted, comes from where the kernel writes or from
    single elements of rows, is copied by threads; the operands are brought all the same."""

    @tilejit
    def kernel(
        A: T.Tensor, B: T.Tensor, scale: T.Tensor, Y: T.Tensor, C: T.Tensor, D: T.Tensor
    ):  # fmt: skip
        with T.Kernel(2, threads=128) as by:
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            column = T.alloc_shared((64,), "float32")
            y = T.alloc_shared((64, 32), "float32")
            z = T.alloc_shared((64, 32), "float32")
            part = T.alloc_fragment((64, 64), "float32")
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(A.shape[1] // 32, num_stages=3):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, 0], b)
                T.copy(scale[by * 64 : by * 64 + 64, k], column)
                T.copy(Y[by * 64, k * 32], y)
                T.gemm(a, b, part, clear_accum=True)
                for i, j in T.Parallel(64, 64):
                    acc[i, j] += part[i, j] * column[i]
                for i, j in T.Parallel(64, 32):
                    D[by * 64 + i, k * 32 + j] = y[i, j] * 2
                T.copy(D[by * 64, k * 32], z)
                for i, j in T.Parallel(64, 32):
                    D[by * 64 + i, k * 32 + j] = z[i, (j + 1) % 32]
            T.copy(acc, C[by * 64, 0])

    a, b = operand(rng, (128, 128), BF16), operand(rng, (128, 64), BF16)
    y = operand(rng, (128, 128), BF16)
    scale = rng.choice([0.5, 1.0, 2.0], (128, 4)).astype(np.float32)
    out = [((128, 64), "float32"), ((128, 128), "float32")]
    c, d = hopper(kernel, a, b, scale, y, out=out)
    scaled = a.astype(np.float32) * scale.repeat(32, axis=1)
    assert_product(c, scaled, b)
    wanted = np.roll(2 * y.astype(np.float32).reshape(128, 4, 32), -1, axis=2)
    np.testing.assert_array_equal(d, wanted.reshape(128, 128))
    text = explained(kernel, a, b, scale, y, c, d)
    assert "wgmma" in text
    assert "of a, b by TMA" in text
    assert (
        "copy scale -> column: by the block's threads, not TMA (a row of scale is one element)"
        in text
    )
    assert "copy D -> z: by the block's threads, not TMA (the kernel writes D)" in text


@pytest.mark.parametrize("threads, rows", [(128, 64), (256, 128)])
def test_operand_that_threads_make_of_global_memory_waits_for_the_multiply(
    hopper, rng, threads, rows
):
    """The other operand is brought, so that the loop could leave the multiply to itself."""

    @tilejit
    def kernel(A: T.Tensor, Q: T.Tensor, C: T.Tensor, *, threads, rows):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, rows), threads=threads) as (bx, by):
            a = T.alloc_shared((rows, 32), A.dtype)
            b = T.alloc_shared((32, 64), A.dtype)
            acc = T.alloc_fragment((rows, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=3):
                T.copy(A[by * rows, k * 32], a)
                for i, j in T.Parallel(32, 64):
                    b[i, j] = Q[k * 32 + i, bx * 64 + j] * 2
                T.gemm(a, b, acc)
            T.copy(acc, C[by * rows, bx * 64])

    a, q = operand(rng, (136, 200), BF16), operand(rng, (200, 80), np.int8)
    q //= 2
    constants = {"threads": threads, "rows": rows}
    c = hopper(kernel, a, q, out=[((136, 80), "float32")], **constants)
    assert_product(c, a, (q.astype(np.int32) * 2).astype(BF16))
    text = explained(kernel, a, q, c, **constants)
    assert "wgmma" in text
    assert "of a by TMA" in text
