"""What kernels do with statistics of rows and columns: softmax, norms, attention; where these
lie."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import TraceError, options, tilejit
from tilejit.target import TARGETS


@tilejit
def softmax(A: T.Tensor, C: T.Tensor, *, BM=64, threads=128):
    M, N = A.shape
    with T.Kernel(T.ceildiv(M, BM), threads=threads) as block:
        x = T.alloc_fragment((BM, N), "float32")
        most = T.alloc_fragment((BM,), "float32")
        total = T.alloc_fragment((BM,), "float32")
        T.copy(A[block * BM, 0], x)
        T.reduce_max(x, most, dim=1)
        for i, j in T.Parallel(BM, N):
            x[i, j] = T.exp(x[i, j] - most[i])
        T.reduce_sum(x, total, dim=1)
        for i, j in T.Parallel(BM, N):
            C[block * BM + i, j] = x[i, j] / total[i]


@tilejit
def layer_norm(X: T.Tensor, W: T.Tensor, Y: T.Tensor, *, BM=4, threads=128):
    M, N = X.shape
    with T.Kernel(T.ceildiv(M, BM), threads=threads) as block:
        x = T.alloc_fragment((BM, N), X.dtype)
        wide = T.alloc_fragment((BM, N), "float32")
        mean = T.alloc_fragment((BM, 1), "float32")
        spread = T.alloc_fragment((BM,), "float32")
        T.copy(X[block * BM, 0], x)
        T.copy(x, wide)
        T.reduce_sum(wide, mean, dim=1)
        for i, j in T.Parallel(BM, N):
            wide[i, j] = wide[i, j] - mean[i, 0] / N
        square = T.alloc_fragment((BM, N), "float32")
        for i, j in T.Parallel(BM, N):
            square[i, j] = wide[i, j] * wide[i, j]
        T.reduce_sum(square, spread)
        for i, j in T.Parallel(BM, N):
            Y[block * BM + i, j] = wide[i, j] * T.rsqrt(spread[i] / N + 1e-5) * W[j]


@tilejit
def online_softmax(A: T.Tensor, Most: T.Tensor, Total: T.Tensor, *, BM=32, BN=64, threads=128):
    """Of each row the maximum and the sum of exp2(x - maximum), a block of columns at a time."""
    M, N = A.shape
    with T.Kernel(T.ceildiv(M, BM), threads=threads) as block:
        a = T.alloc_shared((BM, BN), A.dtype)
        x = T.alloc_fragment((BM, BN), "float32")
        most = T.alloc_fragment((BM,), "float32")
        before = T.alloc_fragment((BM,), "float32")
        row = T.alloc_fragment((BM,), "float32")
        total = T.alloc_fragment((BM,), "float32")
        T.fill(most, -T.infinity("float32"))
        T.clear(total)
        for k in T.Pipelined(T.ceildiv(N, BN), num_stages=2):
            T.copy(A[block * BM, k * BN], a)
            for i, j in T.Parallel(BM, BN):
                inside = k * BN + j < N
                x[i, j] = T.if_then_else(inside, a[i, j].astype("float32"), -T.infinity("float32"))
            T.copy(most, before)
            T.reduce_max(x, most, dim=1, clear=False)
            for i, j in T.Parallel(BM, BN):
                x[i, j] = T.exp2(x[i, j] - most[i])
            T.reduce_sum(x, row, dim=1)
            for i in T.Parallel(BM):
                total[i] = total[i] * T.exp2(before[i] - most[i]) + row[i]
        T.copy(most, Most[block * BM])
        T.copy(total, Total[block * BM])


@tilejit
def attention(
    Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, *, BM=64, BN=64, threads=128, stages=2,
    policy=T.GemmWarpPolicy.FullRow,
):  # fmt: skip
    S, D = Q.shape
    rows = K.shape[0]
    scale = 1.44269504 / D**0.5
    with T.Kernel(T.ceildiv(S, BM), threads=threads) as block:
        q = T.alloc_shared((BM, D), Q.dtype)
        k = T.alloc_shared((BN, D), Q.dtype)
        v = T.alloc_shared((BN, D), Q.dtype)
        s = T.alloc_fragment((BM, BN), "float32")
        p = T.alloc_fragment((BM, BN), Q.dtype)
        o = T.alloc_fragment((BM, D), "float32")
        m = T.alloc_fragment((BM,), "float32")
        before = T.alloc_fragment((BM,), "float32")
        rescale = T.alloc_fragment((BM,), "float32")
        total = T.alloc_fragment((BM,), "float32")
        row = T.alloc_fragment((BM,), "float32")
        T.copy(Q[block * BM, 0], q)
        T.clear(o)
        T.clear(total)
        T.fill(m, -T.infinity("float32"))
        for n in T.Pipelined(T.ceildiv(rows, BN), num_stages=stages):
            T.copy(K[n * BN, 0], k)
            T.gemm(q, k, s, transpose_B=True, policy=policy, clear_accum=True)
            for i, j in T.Parallel(BM, BN):
                is_there = n * BN + j < rows
                s[i, j] = T.if_then_else(is_there, s[i, j] * scale, -T.infinity("float32"))
            T.copy(m, before)
            T.reduce_max(s, m, dim=1, clear=False)
            for i in T.Parallel(BM):
                rescale[i] = T.exp2(before[i] - m[i])
            for i, j in T.Parallel(BM, BN):
                s[i, j] = T.exp2(s[i, j] - m[i])
            T.reduce_sum(s, row, dim=1)
            for i in T.Parallel(BM):
                total[i] = total[i] * rescale[i] + row[i]
            for i, j in T.Parallel(BM, D):
                o[i, j] *= rescale[i]
            T.copy(s, p)
            T.copy(V[n * BN, 0], v)
            T.gemm(p, v, o, policy=policy)
        for i, j in T.Parallel(BM, D):
            o[i, j] /= total[i]
        T.copy(o, O[block * BM, 0])


def softmax_of(a):
    e = np.exp(a.astype(np.float64) - a.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def attention_of(q, k, v):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    return softmax_of(q @ k.T / q.shape[1] ** 0.5) @ v


@pytest.mark.parametrize("shape", [(1, 1), (70, 48), (5, 1000), (64, 33), (3, 257)])
@pytest.mark.parametrize(("BM", "threads"), [(64, 128), (2, 256), (1, 96)])
def test_softmax_of_rows_is_right(run, rng, shape, BM, threads):
    if BM * shape[1] / threads > 200:
        pytest.skip("more than the registers of a block")
    a = (rng.standard_normal(shape) * 5).astype(np.float32)
    got = run(softmax, a, out=[(shape, np.float32)], BM=BM, threads=threads)
    np.testing.assert_allclose(got, softmax_of(a), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(10, 256), (3, 1000), (6, 37)])
def test_layer_norm_of_rows_is_right(run, rng, dtype, shape):
    numpy = T.dtype(dtype).numpy
    x = (rng.standard_normal(shape) * 3 + 1).astype(numpy)
    w = rng.standard_normal(shape[1]).astype(numpy)
    got = run(layer_norm, x, w, out=[(shape, np.float32)])
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want * w.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("BM", "threads"), [(32, 128), (8, 64), (1, 128)])
def test_maximum_and_sum_follow_a_loop_over_columns(run, rng, BM, threads):
    a = (rng.standard_normal((50, 200)) * 4).astype(np.float16)
    most, total = run(
        online_softmax, a, out=[((50,), np.float32)] * 2, BM=BM, BN=64, threads=threads
    )
    wide = a.astype(np.float64)
    assert (most == wide.max(1)).all()
    np.testing.assert_allclose(total, np.exp2(wide - wide.max(1)[:, None]).sum(1), rtol=1e-6)


ATTENTION = [
    {},
    {"BM": 32, "BN": 32, "stages": 3},
    {"policy": T.GemmWarpPolicy.Square},  # rows over two warps: through shared memory
    {"policy": T.GemmWarpPolicy.FullCol, "BN": 128},
    {"threads": 256, "policy": T.GemmWarpPolicy.Square},
]


def near(got, want, dtype):
    """As near as attention in the tensor's dtype is: twice the error of rounding P, and O's."""
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert (abs(got.astype(np.float64) - want) <= 3 * unit * (abs(want) + 1)).all()


@pytest.mark.parametrize("choices", ATTENTION, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(100, 150), (64, 64), (1, 33)])
def test_attention_by_single_warps_is_right(run, rng, choices, rows, columns):
    q, k, v = (rng.standard_normal((n, 64)).astype(np.float16) for n in (rows, columns, columns))
    with options(target="sm_80"):
        got = run(attention, q, k, v, out=[((rows, 64), np.float16)], **choices)
    near(got, attention_of(q, k, v), "float16")


HOPPER = [
    ({}, (100, 150)),
    ({"BM": 128, "threads": 256}, (130, 200)),
    ({"threads": 256}, (100, 150)),  # two warpgroups along a row: through shared memory
    ({"stages": 3, "BN": 128}, (1, 300)),
]


@pytest.mark.parametrize(("choices", "shape"), HOPPER, ids=str)
def test_attention_by_warpgroups_is_right(hopper, rng, choices, shape):
    rows, columns = shape
    q, k, v = (rng.standard_normal((n, 64)) for n in (rows, columns, columns))
    q, k, v = (x.astype(T.dtype("bfloat16").numpy) for x in (q, k, v))
    choices = {"policy": T.GemmWarpPolicy.Square, **choices}
    got = hopper(attention, q, k, v, out=[((rows, 64), q.dtype)], **choices)
    near(got, attention_of(q, k, v), "bfloat16")


# ---- where statistics lie ------------------------------------------------------------------------


def half(*shape):
    return T.Tensor(shape, "float16")


def layout_of(kernel, name):
    (frame,) = kernel.kernels
    return next(layout for b, layout in frame.planned.fragments.items() if b.name == name)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120a"])
def test_statistics_of_an_accumulator_stay_in_registers(target):
    kernel = attention.compile(*[half(512, 64)] * 4, target=target)
    s, m = layout_of(kernel, "s"), layout_of(kernel, "m")
    assert m.dims == s.project((0,)).dims and m.replicas == 4
    assert re.search(r"reduce_max s -> m: \d+ registers a result, 4 lanes by shuffles$",
                     kernel.explain(), re.MULTILINE)  # fmt: skip
    assert "goes through shared memory" not in kernel.explain()
    shared = {b.name for b in kernel.kernels[0].planned.shared}
    assert shared - {"O_strips"} == {"q", "k", "v"}
    assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0


def test_reduction_within_a_warp_touches_no_shared_memory():
    single = T.Tensor((64, 256), "float32")
    kernel = softmax.compile(single, single, target="sm_90a", BM=16)
    assert kernel.resources.shared_bytes == 0
    assert "st.shared" not in kernel.ptx and "bar.sync" not in kernel.ptx
    assert kernel.ptx.count("shfl.sync.bfly") == 2 * 3  # eight lanes a row


def test_reduction_over_warps_says_so():
    single = T.Tensor((4, 4096), "float32")
    kernel = softmax.compile(single, single, target="sm_80", BM=1)
    text = "reduce_max x -> most: 32 registers a result, 32 lanes by shuffles, 4 warps through"
    assert f"{text} shared memory" in kernel.explain()
    assert kernel.ptx.count("bar.sync") == 2


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_with_reductions_compile_without_spills(target):
    for kernel in (
        softmax.compile(*[T.Tensor((100, 512), "float32")] * 2, target=target, BM=16),
        layer_norm.compile(half(64, 1024), half(1024), half(64, 1024), target=target),
        online_softmax.compile(half(64, 999), half(64), half(64), target=target),
        attention.compile(*[half(512, 64)] * 4, target=target, policy=T.GemmWarpPolicy.Square),
        attention.compile(*[half(512, 128)] * 4, target=target, BM=128, BN=64, threads=256),
    ):
        assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0


# ---- roles, branches, loops ----------------------------------------------------------------------


def test_warpgroups_of_a_role_reduce_for_themselves(run, rng):
    @tilejit
    def kernel(A: T.Tensor, X: T.Tensor, Y: T.Tensor):
        with T.Kernel(1, threads=384):
            with T.ws(0):
                a = T.alloc_fragment((1, 700), "float32")
                x = T.alloc_fragment((1,), "float32")
                T.copy(A[0:1, :], a)
                T.reduce_sum(a, x, dim=1)
                T.copy(x, X)
            with T.ws(1, 2):
                b = T.alloc_fragment((3, 700), "float32")
                y = T.alloc_fragment((700,), "float32")
                z = T.alloc_fragment((1,), "float32")
                T.copy(A[1:4, :], b)
                T.clear(z)
                for _ in T.serial(3):
                    T.reduce_sum(b, y, dim=0)
                    T.reduce_max(y, z, dim=0, clear=False)
                    for i, j in T.Parallel(3, 700):
                        b[i, j] += 1
                T.copy(z, Y)

    a = rng.integers(-9, 9, (4, 700)).astype(np.float32)
    a[1:] = abs(a[1:])
    x, y = run(kernel, a, out=[((1,), np.float32)] * 2)
    assert x == a[0].sum() and y == a[1:].sum(0).max() + 6


def test_columns_and_rows_of_one_tile_are_reduced(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, R: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((32, 64), "float16")
            acc = T.alloc_fragment((64, 64), "float32")
            row = T.alloc_fragment((64,), "float32")
            column = T.alloc_fragment((64,), "float32")
            T.copy(A, a)
            T.copy(B, b)
            T.clear(acc)
            T.gemm(a, b, acc)
            T.reduce_sum(acc, row, dim=1)
            T.reduce_absmax(acc, column, dim=0)
            for i, j in T.Parallel(64, 64):
                R[i, j] = acc[i, j] * row[i] + column[j]
            T.copy(column, C)

    a = rng.integers(-3, 4, (64, 32)).astype(np.float16)
    b = rng.integers(-3, 4, (32, 64)).astype(np.float16)
    product = a.astype(np.float32) @ b.astype(np.float32)
    column = abs(product).max(0)
    for target in ("sm_80", "sm_90a"):
        with options(target=target):
            r, c = run(kernel, a, b, out=[((64, 64), np.float32), ((64,), np.float32)])
        assert (c == column).all()
        assert (r == product * product.sum(1, keepdims=True) + column).all()


def test_results_where_something_else_decides_their_layout_go_there(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=64):
            x = T.alloc_fragment((16, 40), "float32")
            y = T.alloc_fragment((16, 8), "float32")
            both = T.alloc_fragment((16,), "float32")
            T.copy(A, x)
            T.copy(B, y)
            T.reduce_max(x, both, dim=1)
            T.reduce_max(y, both, dim=1, clear=False)  # y's rows lie in other threads
            for i, j in T.Parallel(16, 8):
                D[i, j] = y[i, j] + both[i]
            for i in T.serial(4):
                C[i] = both[4 * i] + x[i, 3]

    a = rng.standard_normal((16, 40)).astype(np.float32)
    b = rng.standard_normal((16, 8)).astype(np.float32)
    c, d = run(kernel, a, b, out=[((4,), np.float32), ((16, 8), np.float32)])
    both = np.maximum(a.max(1), b.max(1))
    assert (c == both[::4] + a[:4, 3]).all() and (d == b + both[:, None]).all()


def test_parts_and_slots_of_tiles_are_reduced(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=96):
            s = T.alloc_shared((3, 8, 50), "int32")
            f = T.alloc_fragment((8, 50), "int32")
            sums = T.alloc_shared((4, 8), "int32")
            low = T.alloc_fragment((4,), "int32")
            T.copy(A, s)
            T.clear(sums)
            for k in T.serial(3):
                T.reduce_sum(s[k, :, :], sums[k, :], dim=1)
                T.copy(s[k, :, :], f)
                T.reduce_min(f[0:4, 10:30], low, dim=-1)
                T.reduce_sum(low, sums[3, k : k + 1], dim=0)
            T.copy(sums, C)
            T.copy(low, D)

    a = rng.integers(-99, 99, (3, 8, 50)).astype(np.int32)
    c, d = run(kernel, a, out=[((4, 8), np.int32), ((4,), np.int32)])
    low = a[:, :4, 10:30].min(2)
    assert (c[:3] == a.sum(2)).all() and (c[3] == [*low.sum(1), 0, 0, 0, 0, 0]).all()
    assert (d == low[2]).all()


def test_reduction_in_branches_of_all_threads_is_right(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, n: T.int32):
        with T.Kernel(3, threads=64) as block:
            a = T.alloc_fragment((2, 600), "float32")
            c = T.alloc_fragment((2,), "float32")
            T.copy(A, a)
            T.clear(c)
            if block < n:
                T.reduce_sum(a, c)
            else:
                while c[0] < 3:
                    T.reduce_max(a, c, clear=False)
            T.copy(c, C[block, 0])

    a = rng.integers(1, 9, (2, 600)).astype(np.float32)
    got = run(lambda a, c: kernel(a, c, 1), a, out=[((3, 2), np.float32)])
    assert (got == [a.sum(1), a.max(1), a.max(1)]).all()


def test_reduction_that_only_some_threads_reach_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=64):
            a = T.alloc_fragment((64,), "float32")
            c = T.alloc_fragment((1,), "float32")
            T.copy(A, a)
            if T.get_thread_binding() < 32:
                T.reduce_sum(a, c)
            T.copy(c, A[0:1])

    with pytest.raises(TraceError, match=r"^T.reduce_sum needs all threads of the block"):
        kernel.compile(T.Tensor((64,), "float32"), target="sm_80")


def test_tiles_left_to_the_cost_model_may_be_reduced():
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=T.auto(64, 128), BN=T.auto(64, 128)):
        M, K = A.shape
        N = B.shape[1]
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM)) as (bx, by):
            a = T.alloc_shared((BM, 64), A.dtype)
            b = T.alloc_shared((64, BN), A.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            most = T.alloc_fragment((BM,), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 64)):
                T.copy(A[by * BM, k * 64], a)
                T.copy(B[k * 64, bx * BN], b)
                T.gemm(a, b, acc)
            T.reduce_absmax(acc, most)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] = acc[i, j] / T.max(most[i], 1e-6)
            T.copy(acc, C[by * BM, bx * BN])

    for target in ("sm_80", "sm_90a"):
        compiled = kernel.compile(*[half(1024, 1024)] * 3, target=target)
        assert "reduce_absmax acc -> most" in compiled.explain()
        assert compiled.resources.spill_bytes == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_operands_of_a_multiply_in_a_pipeline_are_reduced_beside_it(run, rng, target):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        M, K = A.shape
        with T.Kernel(T.ceildiv(M, 64), threads=128) as block:
            a = T.alloc_shared((64, 64), A.dtype)
            b = T.alloc_shared((64, 64), A.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            row = T.alloc_fragment((64,), "float32")
            column = T.alloc_shared((64,), "float32")
            T.clear(acc)
            T.clear(row)
            T.clear(column)
            for k in T.Pipelined(T.ceildiv(K, 64), num_stages=2):
                T.copy(A[block * 64, k * 64], a)
                T.copy(B[k * 64, 0], b)
                T.gemm(a, b, acc)
                T.reduce_sum(a, row, dim=1, clear=False)
                T.reduce_absmax(b, column, dim=0, clear=False)
            for i, j in T.Parallel(64, 64):
                C[block * 64 + i, j] = acc[i, j] + row[i]
            T.copy(column, D)

    a = rng.integers(-3, 4, (70, 200)).astype(np.float16)
    b = rng.integers(-3, 4, (200, 64)).astype(np.float16)
    with options(target=target):
        c, d = run(kernel, a, b, out=[((70, 64), np.float32), ((64,), np.float32)])
    wide = a.astype(np.float32)
    assert (c == wide @ b.astype(np.float32) + wide.sum(1, keepdims=True)).all()
    assert (d == abs(b.astype(np.float32)).max(0)).all()


def test_parts_of_fragments_take_results_and_odd_loops_beside_them_do_not_matter(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=(16, 6)):
            f = T.alloc_fragment((10, 12), "float32")
            two = T.alloc_fragment((2, 10), "float32")
            last = T.alloc_fragment((10,), "float32")
            T.copy(A, f)
            T.clear(two)
            for i, j in T.Parallel(10, 8):
                f[i, j] = f[i, j] + A[i, j]
            T.reduce_max(f, two[1, :], dim=1)
            T.reduce_max(f[:, 8:12], two[0, :], dim=1, clear=False)
            T.reduce_sum(two, last, dim=0)
            T.copy(two, C)
            T.copy(last, D)

    a = rng.integers(-9, 9, (10, 12)).astype(np.float32)
    c, d = run(kernel, a, out=[((2, 10), np.float32), ((10,), np.float32)])
    f = a.copy()
    f[:, :8] *= 2
    want = np.stack([np.maximum(f[:, 8:].max(1), 0), f.max(1)])
    assert (c == want).all() and (d == want.sum(0)).all()


def test_accumulator_of_a_multiply_under_way_is_not_reduced():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 64), "float16")
            acc = T.alloc_fragment((64, 64), "float32")
            row = T.alloc_fragment((64,), "float32")
            T.copy(A, a)
            T.clear(acc)
            T.wgmma_gemm(a, a, acc)
            T.reduce_sum(acc, row)
            T.wait_wgmma(0)

    with pytest.raises(TraceError, match="acc"):
        kernel.compile(half(64, 64), target="sm_90a")
