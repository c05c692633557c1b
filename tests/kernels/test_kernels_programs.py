"""Programs as users port them: several features at once, on every executor."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

import tilejit.language as T
from tilejit import tilejit


@pytest.mark.parametrize("via", ["shared", "fragment"])
def test_int4_weights_unpacked_on_the_way_to_shared_memory_multiply_right(run, rng, via):

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, S: T.Tensor, C: T.Tensor, *, BM=32, BN=32, BK=32, via):
        M, K = A.shape
        N = B.shape[0]
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
            a = T.alloc_shared((BM, BK), A.dtype)
            bq = T.alloc_shared((BN, BK // 2), "uint8")
            bl = T.alloc_fragment((BN, BK // 2), "uint8")
            bd = T.alloc_fragment((BN, BK), A.dtype)
            b = T.alloc_shared((BN, BK), A.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, BK), num_stages=2):
                T.copy(A[by * BM, k * BK], a)
                T.copy(B[bx * BN, k * BK // 2], bq)
                if via == "shared":
                    for i, j in T.Parallel(BN, BK):
                        q = bq[i, j // 2] >> j % 2 * 4 & 15
                        b[i, j] = (q.astype("float16") - 8.0) * S[bx * BN + i]
                else:
                    T.copy(bq, bl)
                    for i, j in T.Parallel(BN, BK):
                        q = bl[i, j // 2] >> j % 2 * 4 & 15
                        bd[i, j] = (q.astype("float16") - T.float16(8)) * S[bx * BN + i]
                    T.copy(bd, b)
                T.gemm(a, b, acc, transpose_B=True)
            T.copy(acc, C[by * BM, bx * BN])

    M, N, K = (40, 48, 96)
    a = rng.integers(-4, 4, (M, K)).astype(np.float16)
    q = rng.integers(0, 256, (N, K // 2)).astype(np.uint8)
    s = (2.0 ** rng.integers(-2, 2, N)).astype(np.float16)
    c = run(kernel, a, q, s, out=[((M, N), np.float32)], via=via)
    b = np.stack([q & 15, q >> 4], -1).reshape(N, K).astype(np.float32) - 8
    b *= s[:, None].astype(np.float32)
    assert (c == a.astype(np.float32) @ b.T).all()


def test_convolution_as_a_matmul_of_guarded_loads_is_right(run, rng):

    @tilejit
    def conv(
        X: T.Tensor, W: T.Tensor, Y: T.Tensor, *, KH=3, KW=3, stride=2, pad=1, BM=32, BN=16, BK=16
    ):
        NB, H, Wd, C = X.shape
        F = W.shape[3]
        OH = (H + 2 * pad - KH) // stride + 1
        OW = (Wd + 2 * pad - KW) // stride + 1
        Wf = T.Tensor((KH * KW * C, F), W.dtype, data=W)
        Yf = T.Tensor((NB * OH * OW, F), Y.dtype, data=Y)
        with T.Kernel(T.ceildiv(F, BN), T.ceildiv(NB * OH * OW, BM), threads=64) as (bx, by):
            a = T.alloc_shared((BM, BK), X.dtype)
            b = T.alloc_shared((BK, BN), W.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(KH * KW * C, BK), num_stages=2):
                for i, j in T.Parallel(BM, BK):
                    kk = k * BK + j
                    m = by * BM + i
                    h = m % (OH * OW) // OW * stride + kk // (KW * C) - pad
                    w = m % OW * stride + kk // C % KW - pad
                    inb = h >= 0 and h < H and (w >= 0) and (w < Wd) and (kk < KH * KW * C)
                    a[i, j] = T.if_then_else(inb, X[m // (OH * OW), h, w, kk % C], 0)
                T.copy(Wf[k * BK, bx * BN], b)
                T.gemm(a, b, acc)
            T.copy(acc, Yf[by * BM, bx * BN])

    NB, H, Wd, C, F = (2, 9, 7, 5, 20)
    x = rng.integers(-3, 4, (NB, H, Wd, C)).astype(np.float16)
    w = rng.integers(-3, 4, (3, 3, C, F)).astype(np.float16)
    OH = (H + 2 - 3) // 2 + 1
    OW = (Wd + 2 - 3) // 2 + 1
    y = run(conv, x, w, out=[((NB, OH, OW, F), np.float32)])
    xp = np.pad(x.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = np.zeros((NB, OH, OW, F), np.float32)
    for p in range(3):
        for q in range(3):
            want += np.einsum(
                "nhwc,cf->nhwf",
                xp[:, p : p + 2 * OH : 2, q : q + 2 * OW : 2][:, :OH, :OW],
                w[p, q].astype(np.float32),
            )
    assert (y == want).all()


def test_split_k_adds_tiles_atomically(run, rng):

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=32, BN=32, BK=16, split=2):
        M, K = A.shape
        N = B.shape[1]
        with T.Kernel(1, threads=32):
            T.clear(C)
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), split, threads=64) as (bx, by, bz):
            a = T.alloc_shared((BM, BK), A.dtype)
            b = T.alloc_shared((BK, BN), B.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            cs = T.alloc_shared((BM, BN), "float32")
            T.clear(acc)
            for k in T.Pipelined(bz, T.ceildiv(K, BK), num_stages=2):
                with T.If((k - bz) % split == 0):
                    T.copy(A[by * BM, k * BK], a)
                    T.copy(B[k * BK, bx * BN], b)
                    T.gemm(a, b, acc)
            T.copy(acc, cs)
            T.atomic_add(C[by * BM, bx * BN], cs)

    M, N, K = (40, 35, 75)
    a = rng.integers(-4, 4, (M, K)).astype(np.float16)
    b = rng.integers(-4, 4, (K, N)).astype(np.float16)
    c = run(kernel, a, b, out=[((M, N), np.float32)])
    assert (c == a.astype(np.float32) @ b.astype(np.float32)).all()


def test_online_softmax_in_shared_memory_is_right(run, rng):

    @tilejit
    def softmax(X: T.Tensor, Y: T.Tensor, *, BM=8, BN=16):
        M, N = X.shape
        with T.Kernel(T.ceildiv(M, BM), threads=32) as bx:
            s = T.alloc_shared((BM, BN), "float32")
            mx = T.alloc_shared((BM,), "float32")
            sm = T.alloc_shared((BM,), "float32")
            T.fill(mx, -T.infinity("float32"))
            T.fill(sm, 0)
            for n in T.serial(T.ceildiv(N, BN)):
                T.copy(X[bx * BM, n * BN], s)
                for i in T.Parallel(BM):
                    for j in T.serial(BN):
                        if n * BN + j < N:
                            new = T.max(mx[i], s[i, j])
                            sm[i] = sm[i] * T.exp(mx[i] - new) + T.exp(s[i, j] - new)
                            mx[i] = new
            for n in T.serial(T.ceildiv(N, BN)):
                T.copy(X[bx * BM, n * BN], s)
                for i, j in T.Parallel(BM, BN):
                    s[i, j] = T.exp(s[i, j] - mx[i]) / sm[i]
                T.copy(s, Y[bx * BM, n * BN])

    x = rng.standard_normal((11, 37)).astype(np.float32) * 3
    y = run(softmax, x, out=[((11, 37), np.float32)])
    e = np.exp(x - x.max(1, keepdims=True))
    assert np.allclose(y, e / e.sum(1, keepdims=True), rtol=1e-05)


def test_block_sparse_matmul_takes_indices_inside_the_pipeline(run, rng):

    @tilejit
    def bs(
        A: T.Tensor, B: T.Tensor, idx: T.Tensor, cnt: T.Tensor, C: T.Tensor, *, BM=32, BN=32, BK=32
    ):
        M, _ = A.shape
        N = B.shape[1]
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
            a = T.alloc_shared((BM, BK), A.dtype)
            b = T.alloc_shared((BK, BN), B.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            T.clear(acc)
            for k in T.Pipelined(cnt[by], num_stages=2):
                kk = idx[by, k]
                T.copy(A[by * BM, kk * BK], a)
                T.copy(B[kk * BK, bx * BN], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * BM, bx * BN])

    M, N, K = (128, 40, 128)
    a = rng.integers(-4, 4, (M, K)).astype(np.float16)
    b = rng.integers(-4, 4, (K, N)).astype(np.float16)
    cnt = np.array([0, 1, 2, 4], np.int32)
    idx = np.array([rng.permutation(4) for _ in range(4)], np.int32)
    c = run(bs, a, b, idx, cnt, out=[((M, N), np.float32)])
    want = np.zeros((M, N), np.float32)
    for r in range(4):
        for k in idx[r, : cnt[r]]:
            want[r * 32 : r * 32 + 32] += a[r * 32 : r * 32 + 32, k * 32 : k * 32 + 32].astype(
                np.float32
            ) @ b[k * 32 : k * 32 + 32].astype(np.float32)
    assert (c == want).all()


def test_persistent_blocks_take_every_tile_once(run, rng):

    @tilejit
    def pers(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=32, BN=32, BK=32, sms=3):
        M, K = A.shape
        N = B.shape[1]
        nm, nn = (T.ceildiv(M, BM), T.ceildiv(N, BN))
        with T.Kernel(sms, threads=64) as bid:
            a = T.alloc_shared((BM, BK), A.dtype)
            b = T.alloc_shared((BK, BN), B.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            for w in T.serial(T.ceildiv(nm * nn, sms)):
                t = w * sms + bid
                if t < nm * nn:
                    by = t // nn
                    bx = t % nn
                    T.clear(acc)
                    for k in T.Pipelined(T.ceildiv(K, BK), num_stages=2):
                        T.copy(A[by * BM, k * BK], a)
                        T.copy(B[k * BK, bx * BN], b)
                        T.gemm(a, b, acc)
                    T.copy(acc, C[by * BM, bx * BN])

    M, N, K = (75, 70, 65)
    a = rng.integers(-4, 4, (M, K)).astype(bfloat16)
    b = rng.integers(-4, 4, (K, N)).astype(bfloat16)
    c = run(pers, a, b, out=[((M, N), np.float32)])
    assert (c == a.astype(np.float32) @ b.astype(np.float32)).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("stages", [0, 1, 2, 3, 4])
def test_pipeline_of_a_runtime_length_runs_so_often(run, rng, n, stages):

    @tilejit
    def kernel(
        A: T.Tensor((T.dynamic("M"), 16), "float32"),
        cnt: T.Tensor((1,), "int32"),
        C: T.Tensor((16,), "float32"),
        *,
        stages,
    ):
        with T.Kernel(1, threads=32):
            a = T.alloc_shared((16,), "float32")
            acc = T.alloc_fragment((16,), "float32")
            T.clear(acc)
            for k in T.Pipelined(cnt[0], num_stages=stages):
                T.copy(A[k, 0:16], a)
                for i in T.Parallel(16):
                    acc[i] += a[i]
            T.copy(acc, C)

    a = rng.integers(-9, 9, (9, 16)).astype(np.float32)
    c = run(kernel, a, np.array([n], np.int32), out=[((16,), np.float32)], stages=stages)
    assert (c == a[:n].sum(0)).all()


def test_double_buffer_kept_by_the_user_multiplies_right(run, rng):

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=32, BN=32, BK=16):
        M, K = A.shape
        N = B.shape[1]
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=64) as (bx, by):
            a = T.alloc_shared((2, BM, BK), A.dtype)
            b = T.alloc_shared((2, BK, BN), B.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            T.clear(acc)
            T.copy(A[by * BM, 0], a[0, :, :])
            T.copy(B[0, bx * BN], b[0, :, :])
            n = T.ceildiv(K, BK)
            for k in T.serial(n):
                if k + 1 < n:
                    T.copy(A[by * BM, (k + 1) * BK], a[(k + 1) % 2, :, :])
                    T.copy(B[(k + 1) * BK, bx * BN], b[(k + 1) % 2, :, :])
                T.gemm(a[k % 2, :, :], b[k % 2, :, :], acc)
            T.copy(acc, C[by * BM, bx * BN])

    M, N, K = (40, 50, 60)
    a = rng.integers(-4, 4, (M, K)).astype(bfloat16)
    b = rng.integers(-4, 4, (K, N)).astype(bfloat16)
    c = run(kernel, a, b, out=[((M, N), np.float32)])
    assert (c == a.astype(np.float32) @ b.astype(np.float32)).all()


def test_two_pipelines_inside_a_serial_loop_are_right(run, rng):

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor, *, BM=32, BK=16):
        M, K = A.shape
        with T.Kernel(1, threads=64):
            a = T.alloc_shared((BM, BK), A.dtype)
            b = T.alloc_shared((BK, BM), B.dtype)
            acc = T.alloc_fragment((BM, BM), "float32")
            acc2 = T.alloc_fragment((BM, BM), "float32")
            for m in T.serial(M // BM):
                T.clear(acc)
                T.clear(acc2)
                for k in T.Pipelined(K // BK, num_stages=2):
                    T.copy(A[m * BM, k * BK], a)
                    T.copy(B[k * BK, 0], b)
                    T.gemm(a, b, acc)
                for k in T.Pipelined(K // BK, num_stages=3):
                    T.copy(A[m * BM, k * BK], a)
                    T.copy(B[k * BK, 0], b)
                    for i, j in T.Parallel(BM, BK):
                        a[i, j] = a[i, j] * 2
                    T.gemm(a, b, acc2)
                T.copy(acc, C[m * BM, 0])
                T.copy(acc2, D[m * BM, 0])

    a = rng.integers(-4, 4, (96, 64)).astype(np.float16)
    b = rng.integers(-4, 4, (64, 32)).astype(np.float16)
    c, d = run(kernel, a, b, out=[((96, 32), np.float32)] * 2)
    w = a.astype(np.float32) @ b.astype(np.float32)
    assert (c == w).all() and (d == 2 * w).all()


def test_loops_with_any_start_stop_and_step_run_as_in_python(run, rng):

    @tilejit
    def k(n: T.int32, Y: T.Tensor):
        with T.Kernel(1, threads=32):
            acc = T.alloc_var("int32")
            for i in T.serial(n, 0, -1):
                acc = acc * 3 + i
            Y[0] = acc
            acc = 0
            for i in range(0, n, 3):
                acc = acc * 3 + i
            Y[1] = acc
            acc = 0
            for _ in T.serial(5, 5):
                acc += 1
            for _ in T.serial(n, n - 4):
                acc += 1
            for _ in T.unroll(3, 0):
                acc += 1
            for i in range(7, -2, -4):
                acc = acc * 10 + i
            Y[2] = acc
            acc = 0
            for i in T.unroll(10, 0, -3):
                acc = acc * 11 + i
            Y[3] = acc
            acc = 0
            for i in T.serial(n - 5, n, 2):
                acc = acc * 7 + i
            Y[4] = acc

    for n in (0, 1, 5, 8):
        y = run(k, n, out=[((5,), np.int32)])
        w = []
        for lst, b in (
            (range(n, 0, -1), 3),
            (range(0, n, 3), 3),
            (range(7, -2, -4), 10),
            (range(10, 0, -3), 11),
            (range(n - 5, n, 2), 7),
        ):
            a = 0
            for i in lst:
                a = a * b + i
            w.append(a)
        assert list(y) == w, (n, y, w)


def test_state_machine_of_scalars_follows_its_branches(run, rng):

    @tilejit
    def k(A: T.Tensor, C: T.Tensor):
        n = A.shape[1]
        with T.Kernel(A.shape[0], threads=32) as bx:
            state = T.alloc_var("int32")
            count = T.alloc_var("int32")
            pos = T.alloc_var("int32", init=0)
            while pos < n:
                c = A[bx, pos]
                if state == 0:
                    if c > 0:
                        state = 1
                        count = count + 1
                elif state == 1:
                    if c < 0:
                        state = 2
                else:
                    state = 0
                pos += 1
            C[bx] = count * 10 + state

    a = rng.integers(-1, 2, (5, 40)).astype(np.int8)
    c = run(k, a, out=[((5,), np.int32)])
    for r in range(5):
        s = cn = 0
        for v in a[r]:
            if s == 0:
                if v > 0:
                    s = 1
                    cn += 1
            elif s == 1:
                if v < 0:
                    s = 2
            else:
                s = 0
        assert c[r] == cn * 10 + s


def test_nested_branches_inside_a_parallel_loop_are_followed(run, rng):

    @tilejit
    def k(A: T.Tensor, C: T.Tensor, *, flag=True, mode="a"):
        n = A.shape[0]
        with T.Kernel(T.ceildiv(n, 64), threads=64) as bx:
            for i in T.Parallel(64):
                g = bx * 64 + i
                x = A[g]
                if flag and mode == "a":  # noqa: SIM108
                    y = x + 1
                else:
                    y = x - 1
                v = T.alloc_var("float32", init=y)
                if 0 <= x < 1:
                    v = v * 2
                    if g % 3 == 0 or g % 5 == 0:
                        v = v + 100
                    elif g % 7 == 0:
                        v = v + 200
                    else:
                        v += 300
                elif not x < -1 and x != 2:
                    v = -v
                else:
                    v = T.abs(v) if x > -2 else x * 3
                if g < n:
                    C[g] = v

    a = (rng.standard_normal(150) * 2).astype(np.float32)
    c = run(k, a, out=[((150,), np.float32)])
    w = []
    for g, x in enumerate(a):
        v = x + np.float32(1)
        if 0 <= x < 1:
            v = v * np.float32(2)
            v += (
                np.float32(100)
                if g % 3 == 0 or g % 5 == 0
                else np.float32(200)
                if g % 7 == 0
                else np.float32(300)
            )
        elif not x < -1 and x != 2:
            v = -v
        else:
            v = abs(v) if x > -2 else x * np.float32(3)
        w.append(v)
    assert (c == np.array(w, np.float32)).all()


def test_attention_with_reductions_by_hand_is_near(run, rng):

    @tilejit
    def fa(Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, *, BM=32, BN=32, causal=True):
        S, D = Q.shape
        with T.Kernel(T.ceildiv(S, BM), threads=64) as bx:
            q = T.alloc_shared((BM, D), Q.dtype)
            kk = T.alloc_shared((BN, D), Q.dtype)
            v = T.alloc_shared((BN, D), Q.dtype)
            sc = T.alloc_fragment((BM, BN), "float32")
            ss = T.alloc_shared((BM, BN), "float32")
            p = T.alloc_shared((BM, BN), Q.dtype)
            acc = T.alloc_fragment((BM, D), "float32")
            m = T.alloc_shared((BM,), "float32")
            l = T.alloc_shared((BM,), "float32")
            al = T.alloc_shared((BM,), "float32")
            T.copy(Q[bx * BM, 0], q)
            T.clear(acc)
            T.clear(l)
            T.fill(m, -T.infinity("float32"))
            end = T.ceildiv((bx + 1) * BM, BN) if causal else T.ceildiv(S, BN)
            for n in T.Pipelined(end, num_stages=2):
                T.copy(K[n * BN, 0], kk)
                T.copy(V[n * BN, 0], v)
                T.gemm(q, kk, sc, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(BM, BN):
                    ok = n * BN + j < S and (not causal or n * BN + j <= bx * BM + i)
                    sc[i, j] = T.if_then_else(ok, sc[i, j] * 0.25, -T.infinity("float32"))
                T.copy(sc, ss)
                for i in T.Parallel(BM):
                    mx = T.alloc_var("float32", init=m[i])
                    for j in T.serial(BN):
                        mx = T.max(mx, ss[i, j])
                    al[i] = T.exp(m[i] - mx)
                    sm = T.alloc_var("float32", init=l[i] * al[i])
                    for j in T.serial(BN):
                        e = T.exp(ss[i, j] - mx)
                        sm += e
                        p[i, j] = e
                    l[i] = sm
                    m[i] = mx
                for i, j in T.Parallel(BM, D):
                    acc[i, j] *= al[i]
                T.gemm(p, v, acc)
            for i, j in T.Parallel(BM, D):
                acc[i, j] = acc[i, j] / l[i]
            T.copy(acc, O[bx * BM, 0])

    S, D = (75, 16)
    q, k, v = (rng.standard_normal((S, D)).astype(np.float16) for _ in range(3))
    for causal in (True, False):
        o = run(fa, q, k, v, out=[((S, D), np.float32)], causal=causal)
        s = q.astype(np.float32) @ k.astype(np.float32).T * 0.25
        if causal:
            s = np.where(np.tril(np.ones((S, S), bool)), s, -np.inf)
        e = np.exp(s - s.max(1, keepdims=True))
        w = e / e.sum(1, keepdims=True) @ v.astype(np.float32)
        assert np.allclose(o, w, atol=0.005)


def test_bitonic_sort_in_shared_memory_sorts(run, rng):

    @tilejit
    def sort(X: T.Tensor, Y: T.Tensor, *, N=64):
        with T.Kernel(1, threads=N):
            s = T.alloc_shared((N,), X.dtype)
            tx = T.get_thread_binding()
            s[tx] = X[tx]
            T.sync_threads()
            kk = T.alloc_var("int32", init=2)
            while kk <= N:
                j = T.alloc_var("int32", init=kk // 2)
                while j > 0:
                    o = tx ^ j
                    if o > tx:
                        up = tx & kk == 0
                        a = s[tx]
                        b = s[o]
                        if (a > b) == up:
                            s[tx] = b
                            s[o] = a
                    T.sync_threads()
                    j = j // 2
                kk = kk * 2
            Y[tx] = s[tx]

    x = rng.integers(-99, 99, 64).astype(np.int32)
    y = run(sort, x, out=[((64,), np.int32)])
    assert (y == np.sort(x)).all()


def test_top_k_inside_a_parallel_loop_finds_the_largest(run, rng):

    @tilejit
    def topk(X: T.Tensor, I: T.Tensor, *, K=3):
        M, N = X.shape
        with T.Kernel(T.ceildiv(M, 32), threads=32) as bx:
            for i in T.Parallel(32):
                last = T.alloc_var("float32", init=T.infinity("float32"))
                for k in T.serial(K):
                    best = T.alloc_var("float32", init=-T.infinity("float32"))
                    arg = T.alloc_var("int32", init=0)
                    for j in T.serial(N):
                        v = X[bx * 32 + i, j]
                        if v < last and v > best:
                            best = v
                            arg = j
                    I[bx * 32 + i, k] = arg
                    last = best

    x = rng.permutation(40 * 9).reshape(40, 9).astype(np.float32)
    i = run(topk, x, out=[((40, 3), np.int32)])
    assert (i == np.argsort(-x, 1)[:, :3]).all()
