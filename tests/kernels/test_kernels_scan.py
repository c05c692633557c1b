"""Running sums and maxima of tiles along any axis: dtypes, shapes, scopes, and what kernels do
with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from disassembler import has_disassembler
from test_kernels_reduce import FLOATS, INTEGERS, values

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ResourceError, TraceError
from tilejit.ir.node import walk
from tilejit.ops.scan import Scan
from tilejit.runtime.device import use_executor
from tilejit.runtime.kernel import TileKernel


@tilejit
def scanning(
    A: T.Tensor,
    C: T.Tensor,
    *,
    dim,
    op="cumsum",
    reverse=False,
    source="fragment",
    target="fragment",
    threads=128,
    nan=False,
):
    more = {"nan_propagate": True} if nan else {}
    with T.Kernel(1, threads=threads):
        make = {"fragment": T.alloc_fragment, "shared": T.alloc_shared}
        a = make[source](A.shape, A.dtype)
        T.copy(A, a)
        if target == "place":
            getattr(T, op)(a, dim=dim, reverse=reverse, **more)
            T.copy(a, C)
        else:
            c = make[target](A.shape, C.dtype)
            getattr(T, op)(a, c, dim=dim, reverse=reverse, **more)
            T.copy(c, C)


def running(a, op, dim, reverse, dtype):
    """In float64, or in integers that wrap."""
    wide = a.astype(np.float64) if a.dtype.kind not in "iub" else a.astype(dtype)
    wide = np.flip(wide, dim) if reverse else wide
    with np.errstate(over="ignore"):
        result = (
            np.add.accumulate(wide, dim, dtype=wide.dtype)
            if op == "cumsum"
            else np.fmax.accumulate(wide, dim)
        )
    return (np.flip(result, dim) if reverse else result).astype(dtype)


def check(run, rng, shape, dim, dtype="float32", out=None, op="cumsum", reverse=False, **options):
    a = values(rng, dtype, shape)
    out = T.dtype(out or dtype).numpy
    want = running(a, op, dim, reverse, out)
    got = run(scanning, a, out=[(shape, out)], dim=dim, op=op, reverse=reverse, **options)
    assert got.tobytes() == want.tobytes(), (shape, dim, dtype, options, got, want)


@pytest.mark.parametrize("op", ["cumsum", "cummax"])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_every_dtype_is_right_along_both_axes(run, rng, op, dtype):
    for shape, dim, reverse in (((24, 40), 1, True), ((24, 40), 0, False), ((7, 5), 1, False)):
        if op == "cumsum" and dtype.startswith("float8"):
            shape = tuple(min(n, 5) for n in shape)  # longer sums are not exact
        check(run, rng, shape, dim, dtype, op=op, reverse=reverse)


SHAPES = [
    (1,), (31,), (64,), (128,), (1000,), (1001,), (4096,), (5000,), (1, 128), (3, 40), (2, 1000),
    (1, 1001), (64, 16), (64, 128), (200, 3), (33, 33), (3, 5, 8), (2, 40, 24),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_right_along_all_axes(run, rng, shape):
    for dim in range(len(shape)):
        for reverse in (False, True):
            check(run, rng, shape, dim - len(shape) * reverse, reverse=reverse)


@pytest.mark.parametrize("threads", [1, 32, 48, 96, 256])
def test_any_number_of_threads_is_right(run, rng, threads):
    for shape, dim in (((100,), 0), ((40, 24), 0), ((5, 77), 1)):
        shape = tuple(min(n, 16) for n in shape) if threads == 1 else shape
        check(run, rng, shape, dim, threads=threads, reverse=threads == 48)
        check(run, rng, shape, dim, "int32", op="cummax", threads=threads)


@pytest.mark.parametrize(("shape", "dim"), [((200, 160), 1), ((160, 200), 0), ((3, 70, 150), 1)])
def test_large_tiles_in_shared_memory_come_in_pieces(run, rng, shape, dim):
    for target in ("shared", "place"):
        options = {"source": "shared", "target": target, "reverse": target == "place"}
        check(run, rng, shape, dim, "int32" if target == "place" else "int16", **options)


def test_pieces_of_what_overlaps_are_not_taken(run, rng):
    @tilejit
    def shifted(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((120, 64), "int32")
            T.copy(A, s)
            T.cumsum(s[0:80, :], s[40:120, :], dim=1)
            T.copy(s, C)

    a = rng.integers(-9, 9, (120, 64), np.int32)
    want = np.concatenate([a[:40], a[:80].cumsum(1)])
    assert (run(shifted, a, out=[(a.shape, np.int32)]) == want).all()


@pytest.mark.parametrize("source", ["fragment", "shared"])
@pytest.mark.parametrize("target", ["fragment", "shared", "place"])
def test_tiles_are_in_fragments_and_shared_memory(run, rng, source, target):
    for shape, dim in (((16, 48), 1), ((16, 48), 0), ((1500,), 0)):
        check(run, rng, shape, dim, "int32", source=source, target=target)
        check(run, rng, shape, dim, "float16", source=source, target=target, op="cummax")


def test_pieces_of_slices_that_cross_are_not_taken(run, rng):
    """Both begin at the same element, and go other ways."""

    @tilejit
    def crossed(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared(A.shape, A.dtype)
            T.copy(A, s)
            T.cumsum(s[:, :, 0], s[0, 0:33, :], dim=0)
            T.copy(s, C)

    a = rng.integers(0, 9, (33, 64, 64), np.uint8)
    want = a.copy()
    want[0, :33] = a[:, :, 0].cumsum(0, dtype=np.uint8)
    assert (run(crossed, a, out=[(a.shape, np.uint8)]) == want).all()


def test_zeros_keep_their_sign(run):
    a = np.full((2, 700), -0.0, np.float32)
    for dim in (0, 1):
        got = run(scanning, a, out=[(a.shape, np.float32)], dim=dim)
        assert (got == 0).all() and np.signbit(got).all()


def test_accumulators_go_there_and_back_through_one_tile(hopper, rng):
    @tilejit
    def product(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=256):
            a, b = T.alloc_shared(A.shape, A.dtype), T.alloc_shared(B.shape, B.dtype)
            acc = T.alloc_fragment(C.shape, "float32")
            T.copy(A, a)
            T.copy(B, b)
            T.gemm(a, b, acc, clear_accum=True)
            T.cumsum(acc, dim=1)
            T.copy(acc, C)

    a = rng.integers(-2, 3, (128, 64)).astype(np.float16)
    b = rng.integers(-2, 3, (64, 256)).astype(np.float16)
    c = hopper(product, a, b, out=[((128, 256), np.float32)])
    assert (c == (a.astype(np.float32) @ b.astype(np.float32)).cumsum(1)).all()


def test_line_that_is_too_long_says_so():
    @tilejit
    def long(A: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared(A.shape, A.dtype)
            T.copy(A, s)
            T.cumsum(s)
            T.copy(s, A)

    words = r"T.cumsum: `s` takes 316 registers in each of 32 threads while it is scanned; 256 is"
    with pytest.raises(ResourceError, match=words):
        long.compile(T.Tensor((10000,), "float32"), target="sm_90a")


@pytest.mark.parametrize(("dtype", "out"), [
    ("float16", "float32"), ("bfloat16", "float64"), ("int8", "int32"), ("uint8", "float32"),
    ("bool", "int32"), ("int32", "int64"),
])  # fmt: skip
def test_results_may_be_wider(run, rng, dtype, out):
    for shape, dim in (((24, 40), 1), ((24, 40), 0), ((1200,), 0)):
        check(run, rng, shape, dim, dtype, out)


@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("propagate", [False, True])
def test_nans_are_passed_over_or_kept(run, rng, threads, propagate):
    a = rng.standard_normal((3, 700)).astype(np.float32)
    a[0, 5], a[1, [0, 300]], a[2] = np.nan, np.nan, np.nan
    accumulate = np.maximum.accumulate if propagate else np.fmax.accumulate
    for reverse in (False, True):
        step = -1 if reverse else 1
        want = accumulate(a[:, ::step], 1)[:, ::step]
        out = [(a.shape, np.float32)]
        more = {"reverse": reverse, "nan": propagate, "threads": threads}
        got = run(scanning, a, out=out, dim=1, op="cummax", **more)
        np.testing.assert_array_equal(got, want)


def test_infinities_are_added_as_they_come(run):
    a = np.ones((2, 600), np.float32)
    a[0, 7], a[1, 100], a[1, 500] = np.inf, np.inf, -np.inf
    got = run(scanning, a, out=[(a.shape, np.float32)], dim=1)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got, np.cumsum(a, 1))


@pytest.mark.parametrize(("shape", "dim"), [((4096,), 0), ((8, 500), 1), ((300, 24), 0)])
def test_sums_are_as_exact_as_float32_allows(run, rng, shape, dim):
    a = rng.standard_normal(shape).astype(np.float32)
    got = run(scanning, a, out=[(shape, np.float32)], dim=dim)
    error = abs(got - np.cumsum(a.astype(np.float64), dim))
    bound = 2.0**-23 * np.cumsum(abs(a.astype(np.float64)), dim) * np.sqrt(shape[dim])
    assert (error <= bound).all(), (error / bound).max()


@tilejit
def rows(A: T.Tensor, L: T.Tensor, C: T.Tensor, S: T.Tensor, *, BN=64):
    """C = running sums of rows longer than a tile, each row to its own length; S[i] = a row's."""
    with T.Kernel(A.shape[0], threads=128) as row:
        a, total = T.alloc_shared((1, BN), "float32"), T.alloc_fragment((1,), "float32")
        c = T.alloc_fragment((1, BN), "float32")
        T.clear(total)
        for k in T.Pipelined(T.ceildiv(L[row], BN), num_stages=2):
            T.copy(A[row, k * BN], a)
            for i, j in T.Parallel(1, BN):
                c[i, j] = T.if_then_else(k * BN + j < L[row], a[i, j], 0.0)
            T.cumsum(c, dim=1)
            for i, j in T.Parallel(1, BN):
                c[i, j] += total[i]
                if k * BN + j < L[row]:
                    C[row, k * BN + j] = c[i, j]
            T.reduce_max(c, total, dim=1)
        T.copy(total, S[row : row + 1])


def test_rounds_of_a_pipeline_go_on_where_the_last_ended(run, rng):
    a = rng.integers(0, 5, (5, 300)).astype(np.float32)
    lengths = np.array([300, 0, 1, 64, 257], np.int32)
    c, s = run(rows, a, lengths, out=[(a.shape, np.float32), ((5,), np.float32)])
    for i, n in enumerate(lengths):
        assert (c[i, :n] == np.cumsum(a[i, :n])).all() and np.isnan(c[i, n:]).all()
        assert s[i] == a[i, :n].sum()


CHUNK, HEAD = 64, 32


@tilejit
def gated(Q: T.Tensor, K: T.Tensor, V: T.Tensor, G: T.Tensor, O: T.Tensor):
    """Linear attention whose state fades by exp(G) each step, a chunk at a time (Yang et al.,
    "Gated linear attention transformers", 2024; Mamba-2's by scalar gates)."""
    S, D = Q.shape
    with T.Kernel(1, threads=128):
        q, k = T.alloc_shared((CHUNK, D), Q.dtype), T.alloc_shared((CHUNK, D), Q.dtype)
        v, faded = T.alloc_shared((CHUNK, D), Q.dtype), T.alloc_shared((CHUNK, D), Q.dtype)
        g = T.alloc_fragment((CHUNK,), "float32")
        held, gs = T.alloc_shared((D, D), Q.dtype), T.alloc_shared((CHUNK,), "float32")
        state = T.alloc_fragment((D, D), "float32")
        scores = T.alloc_fragment((CHUNK, CHUNK), "float32")
        weights = T.alloc_fragment((CHUNK, CHUNK), Q.dtype)
        old, o = T.alloc_fragment((CHUNK, D), "float32"), T.alloc_fragment((CHUNK, D), "float32")
        T.clear(state)
        for c in T.serial(S // CHUNK):
            T.copy(Q[c * CHUNK, 0], q)
            T.copy(K[c * CHUNK, 0], k)
            T.copy(V[c * CHUNK, 0], v)
            T.copy(G[c * CHUNK], g)
            T.cumsum(g)
            T.copy(g, gs)
            T.copy(state, held)
            T.gemm(q, held, old, clear_accum=True)
            T.gemm(q, k, scores, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(CHUNK, CHUNK):
                weights[i, j] = T.if_then_else(i >= j, scores[i, j] * T.exp(gs[i] - gs[j]), 0.0)
            for i, d in T.Parallel(CHUNK, D):
                o[i, d] = old[i, d] * T.exp(gs[i])
            T.gemm(weights, v, o)
            T.copy(o, O[c * CHUNK, 0])
            for i, d in T.Parallel(CHUNK, D):
                faded[i, d] = k[i, d] * T.exp(gs[CHUNK - 1] - gs[i])
            for i, d in T.Parallel(D, D):
                state[i, d] *= T.exp(gs[CHUNK - 1])
            T.gemm(faded, v, state, transpose_A=True)


def check_gated(run, rng):
    S = 4 * CHUNK
    q, k, v = (rng.uniform(-1, 1, (S, HEAD)).astype(np.float16) for _ in range(3))
    g = rng.uniform(-0.1, 0, S).astype(np.float32)
    state, want = np.zeros((HEAD, HEAD)), np.empty((S, HEAD))
    for t in range(S):
        state = state * np.exp(g[t].astype(np.float64)) + np.outer(k[t], v[t])
        want[t] = q[t].astype(np.float64) @ state
    got = run(gated, q, k, v, g, out=[((S, HEAD), np.float32)])
    assert abs(got - want).max() < 0.02 * abs(want).max()


def test_gated_linear_attention_is_right(run, rng):
    check_gated(run, rng)


def test_gated_linear_attention_is_right_by_warpgroups(hopper, rng):
    check_gated(hopper, rng)


@tilejit
def halves(A: T.Tensor, C: T.Tensor, *, flag=1):
    """Slices of a shared tile in roles of their own, and a scan in a branch that all take."""
    M, N = A.shape
    with T.Kernel(1, threads=256):
        s = T.alloc_shared((2, M, N), "float32")
        for h, i, j in T.Parallel(2, M, N):
            s[h, i, j] = A[i, j]
        with T.ws(0):
            T.cumsum(s[0, :, :], dim=1)
        with T.ws(1):
            T.cumsum(s[1, :, :], dim=0, reverse=True)
        if A[0, 0] > 0:
            T.cummax(s[0, 1:M, :], dim=-1)
        for i, j in T.Parallel(M, N):
            C[i, j] = s[0, i, j] + s[1, i, j]


@pytest.mark.parametrize("first", [-1.0, 1.0])
def test_slices_and_roles_and_branches(run, rng, first):
    a = rng.integers(-3, 4, (12, 300)).astype(np.float32)
    a[0, 0] = first
    along = np.cumsum(a, 1)
    if first > 0:
        along[1:] = np.maximum.accumulate(along[1:], 1)
    want = along + np.cumsum(a[::-1], 0)[::-1]
    assert (run(halves, a, out=[(a.shape, np.float32)]) == want).all()


@tilejit
def twice(A: T.Tensor, C: T.Tensor):
    """C = sums over the rectangle above and left of each element."""
    with T.Kernel(1, threads=128):
        x = T.alloc_fragment(A.shape, A.dtype)
        T.copy(A, x)
        T.cumsum(x, dim=0)
        T.cumsum(x, dim=1)
        T.copy(x, C)


@pytest.mark.parametrize("shape", [(40, 64), (7, 200), (128, 5)])
def test_both_axes_after_one_another(run, rng, shape):
    a = rng.integers(-3, 4, shape).astype(np.float32)
    want = a.cumsum(0).cumsum(1)
    assert (run(twice, a, out=[(shape, np.float32)]) == want).all()


def test_each_stage_of_the_graph_means_the_same(rng):
    a = rng.integers(-9, 9, (1, 1500)).astype(np.float32)
    for reverse in (False, True):
        results = []
        for planned in (False, True):
            c = np.full(a.shape, np.nan, np.float32)
            compiled = scanning.compile(a, c, target="sm_90a", dim=1, reverse=reverse)
            (frame,) = compiled.kernels
            graph = frame.planned if planned else frame.graph
            assert planned == any(isinstance(n, Scan) and n.scratch for n in walk(graph.body))
            program = dataclasses.replace(compiled.program, kernels=(graph,))
            with use_executor("reference"):
                TileKernel(program, compiled.target, compiled.names)(a, c)
            results.append(c)
        np.testing.assert_array_equal(results[0], running(a, "cumsum", 1, reverse, np.float32))
        np.testing.assert_array_equal(*results)


def test_branch_that_not_all_threads_take_is_refused():
    @tilejit
    def wrong(A: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((64,), "float32")
            T.copy(A, s)
            if T.get_thread_binding() < 32:
                T.cumsum(s)
            T.copy(s, A)

    with pytest.raises(TraceError, match=r"^T.cumsum needs all threads of the block"):
        wrong.compile(T.Tensor((64,), "float32"), target="sm_90a")


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_in_vectors_and_stay_in_registers(dtype):
    spec = T.Tensor((1, 4096), dtype)
    compiled = scanning.compile(spec, spec, target="sm_90a", dim=1)
    loads = [line for line in compiled.sass.splitlines() if "LDG" in line]
    assert loads and all(".128" in line for line in loads)
    assert compiled.resources.spill_bytes == compiled.resources.stack_bytes == 0
    assert compiled.sass.count("BAR.SYNC") == 1
    how = "32 registers of a line, 32 lanes by shuffles, 4 parts through shared memory"
    assert f"cumsum a -> c: {how}" in compiled.explain()
