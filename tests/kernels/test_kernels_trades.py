"""Products of 8-bit elements that are multiplied again: they stay in registers."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, passes, tilejit
from tilejit.layout.fragment import blocked, register, thread
from tilejit.layout.trade import before_trade, quad_trade
from tilejit.runtime.device import use_executor
from tilejit.runtime.kernel import TileKernel

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
KINDS = pytest.mark.parametrize(
    "dtype, sums", [(E4M3, "float32"), (E5M2, "float32"), (np.int8, "int32"), (np.uint8, "int32")],
    ids=["e4m3", "e5m2", "s8", "u8"],
)  # fmt: skip
TILES = pytest.mark.parametrize("BM, BN, threads", [(64, 32, 128), (128, 96, 256), (128, 160, 128)])


@tilejit
def chain(
    A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, BM=64, BN=32, threads=128, cap=3
):  # fmt: skip
    """C = p @ D.T with p = A @ B.T held between 0 and `cap` and rounded to A's dtype."""
    M, K = A.shape
    N, L = B.shape[0], D.shape[0]
    sums = C.dtype
    with T.Kernel(T.ceildiv(M, BM), threads=threads) as block:
        a = T.alloc_shared((BM, K), A.dtype)
        b = T.alloc_shared((BN, K), A.dtype)
        d = T.alloc_shared((L, BN), A.dtype)
        s = T.alloc_fragment((BM, BN), sums)
        p = T.alloc_fragment((BM, BN), A.dtype)
        acc = T.alloc_fragment((BM, L), sums)
        T.copy(A[block * BM, 0], a)
        T.clear(acc)
        for step in T.Pipelined(T.ceildiv(N, BN)):
            T.copy(B[step * BN, 0], b)
            T.clear(s)
            T.gemm(a, b, s, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(BM, BN):
                s[i, j] = T.min(T.max(s[i, j], 0), cap)
            T.copy(s, p)
            T.copy(D[0, step * BN], d)
            T.gemm(p, d, acc, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
        T.copy(acc, C[block * BM, 0])


def small(rng, shape, dtype):
    """Elements whose products and sums every dtype here holds exactly."""
    low = 0 if np.dtype(dtype).kind == "u" else -1
    return rng.integers(low, 2, shape).astype(dtype)


def compiled(target, dtype, sums, N, pad=0, **constants):
    """The kernel for K = 64 and L = 32. pad: columns more in D, which nothing uses."""
    kind = np.dtype(dtype).name
    shapes = [(70, 64), (N, 64), (32, N + pad)]
    specs = [T.Tensor(shape, kind) for shape in shapes]
    return chain.compile(*specs, T.Tensor((70, 32), sums), target=target, **constants)


@KINDS
@TILES
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("spare", [0, 5])
def test_products_of_products_are_right(
    run, rng, dtype, sums, BM, BN, threads, target, spare, executor
):
    if executor == "gpu" and target != "sm_90a":
        pytest.skip("needs that chip")
    """Also where rows of the first right operand are no whole fours."""
    M, N = 70, 2 * BN + 16
    a, b, d = (small(rng, shape, dtype) for shape in ((M, 64), (N - spare, 64), (32, N)))
    d[:, N - spare :] = 0
    with options(target=target):
        c = run(chain, a, b, d, out=[((M, 32), sums)], BM=BM, BN=BN, threads=threads)
    wide = [x.astype(np.int64) for x in (a, b, d)]
    p = np.clip(wide[0] @ wide[1].T, 0, 3)
    assert (c.astype(np.int64) == p @ wide[2][:, : N - spare].T).all()


@pytest.mark.parametrize("target, spare", [("sm_89", 0), ("sm_90a", 0), ("sm_90a", 5)])
def test_the_graph_means_the_same_after_every_pass(rng, target, spare):
    """Until blocks walk, which is not in the arguments any more."""
    M, N = 70, 144
    a, b, d = (small(rng, shape, E4M3) for shape in ((M, 64), (N - spare, 64), (32, N)))
    d[:, N - spare :] = 0
    c = np.full((M, 32), np.nan, np.float32)
    wide = [x.astype(np.float64) for x in (a, b, d)]
    wanted = np.clip(wide[0] @ wide[1].T, 0, 3) @ wide[2][:, : N - spare].T
    kernel = chain.compile(a, b, d, c, target=target, BN=64)
    (frame,) = kernel.kernels
    names = []
    for name, graph in passes.stages(frame.graph, kernel.target):
        if graph.is_persistent:
            break
        names.append(name)
        program = dataclasses.replace(kernel.program, kernels=(graph,))
        with use_executor("reference"):
            TileKernel(program, kernel.target, kernel.names)(a, b, d, c)
        assert (c == wanted).all(), name
        c[:] = np.nan
    assert "infer_layouts" in names


@KINDS
@TILES
def test_products_stay_in_registers(dtype, sums, BM, BN, threads):
    for target in ("sm_89", "sm_90a"):
        kernel = compiled(target, dtype, sums, 2 * BN + 16, BM=BM, BN=BN, threads=threads)
        text = kernel.explain()
        assert "fragment p goes through shared memory" not in text
        assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0
        assert "C75" not in kernel.kernels[0].compiled.log


def test_what_lies_in_other_lanes_is_traded_by_two_shuffles_for_two_words():
    kernel = compiled("sm_89", E4M3, "float32", 64, BM=64, BN=64, threads=128)
    assert "fragment p: lanes of quads trade elements to be the left operand" in kernel.explain()
    words = 64 * 64 // 128 // 4
    assert kernel.ptx.count("shfl.sync.idx") in (words, words + 1)
    assert kernel.ptx.count("prmt.b32") == 2 * words
    assert kernel.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == 2 * words


def layouts(extent):
    """Rows of `extent` columns, over a warp: pairs of 8 columns a quad, and fours of 16."""
    rows = (register(2, 4), thread(8, 4))
    fours = (register(extent // 16, 8), thread(4, 1), register(4, 1))
    pairs = (register(extent // 8, 4), thread(4, 1), register(2, 1))
    twos = (register(2, 2), thread(8, 4))
    make = type(blocked((8,), 8))
    return make((16, extent), (twos, pairs), 32), make((16, extent), (rows, fours), 32)


@pytest.mark.parametrize("extent", [16, 48, 64])
def test_a_trade_brings_every_element_of_a_row(extent):
    held, wanted = layouts(extent)
    assert not held.same_places(wanted)
    words = quad_trade(held, wanted)
    assert sorted(r for before, _ in words for r in before) == list(range(held.registers))
    assert sorted(r for _, after in words for r in after) == list(range(wanted.registers))
    for lane in range(32):
        quad = [lane - lane % 4 + n for n in range(4)]
        for before, after in words:
            there = {held.coordinates(t, r) for t in quad for r in before}
            assert {wanted.coordinates(lane, r) for r in after} <= there
    numbered = before_trade(wanted)
    assert numbered is not None and numbered.same_places(held)
    assert all(before == after for before, after in quad_trade(numbered, wanted))


def test_other_layouts_are_no_trade_apart():
    held, wanted = layouts(32)
    assert not quad_trade(held, held) and not quad_trade(wanted, held)
    assert not quad_trade(held, blocked((16, 32), 32, 4))
    assert before_trade(blocked((16, 32), 32, 4)) is None
    assert before_trade(held) is None


# ---- products made in the order that the next multiply takes ------------------------------------

HALVED = "b: two of every four rows in each half, so that s lies as the next multiply takes it"


@pytest.mark.parametrize("N, is_halved", [(144, True), (140, True), (142, False)])
def test_boxes_bring_rows_in_order_where_they_can(N, is_halved):
    kernel = compiled("sm_90a", E4M3, "float32", N, BN=64, pad=-N % 16)
    assert (HALVED in kernel.explain()) == is_halved
    assert ("lanes of quads trade" in kernel.explain()) != is_halved
    assert ("prmt.b32" in kernel.ptx) != is_halved
    assert ("tensor.3d" in kernel.ptx) == is_halved  # fours and pairs of rows are dimensions


def test_a_dynamic_number_of_rows_counts_by_what_is_promised():
    keys = T.dynamic("keys")
    shapes = [(70, 64), (4 * keys, 64), (32, 16 * keys)]
    specs = [T.Tensor(shape, "float8_e4m3fn") for shape in shapes]
    kernel = chain.compile(*specs, T.Tensor((70, 32), "float32"), target="sm_90a")
    assert HALVED in kernel.explain()


@tilejit
def twice(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, S: T.Tensor, *, extra="", BN=64):
    """C = p @ D.T with p = A @ B.T, which is stored as well; `extra` uses B otherwise too."""
    M, K, L = A.shape[0], A.shape[1], D.shape[0]
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((M, K), A.dtype)
        b = T.alloc_shared((BN, K), A.dtype)
        d = T.alloc_shared((L, BN), A.dtype)
        s = T.alloc_fragment((M, BN), "float32")
        p = T.alloc_fragment((M, BN), A.dtype)
        acc = T.alloc_fragment((M, L), "float32")
        T.copy(A, a)
        T.clear(acc)
        for step in T.Pipelined(B.shape[0] // BN):
            T.copy(B[step * BN, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            if extra == "read":
                for i, j in T.Parallel(M, BN):
                    s[i, j] += T.cast(b[j, 0], "float32")
            if extra == "added":
                T.gemm(a, b, s, transpose_B=True)
            T.copy(s, S[0, step * BN])
            T.copy(s, p)
            T.copy(D[0, step * BN], d)
            T.gemm(p, d, acc, transpose_B=True)
        T.copy(acc, C)


@pytest.mark.parametrize("extra, is_halved", [("", True), ("added", True), ("read", False)])
def test_a_product_that_is_used_otherwise_is_right(hopper, rng, extra, is_halved):
    a, b, d = (small(rng, shape, E4M3) for shape in ((64, 32), (128, 32), (32, 128)))
    a[:, 6:] = 0  # sums that have four bits
    out = [((64, 32), "float32"), ((64, 128), "float32")]
    c, s = hopper(twice, a, b, d, out=out, extra=extra)
    p = a.astype(np.float64) @ b.astype(np.float64).T
    p = {"": p, "added": 2 * p, "read": p + b[:, 0].astype(np.float64)}[extra]
    assert (s == p).all() and (c == p @ d.astype(np.float64).T).all()
    specs = [T.Tensor(x.shape, "float8_e4m3fn") for x in (a, b, d)]
    specs += [T.Tensor(shape, dtype) for shape, dtype in out]
    assert (HALVED in twice.compile(*specs, target="sm_90a", extra=extra).explain()) == is_halved


@tilejit
def together(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, blocks=2, mask=3, BN=64):
    """C = (A @ B.T) @ D.T, the blocks of a cluster bringing B for each other."""
    BM, K, L = 64, A.shape[1], D.shape[0]
    with T.Kernel(A.shape[0] // BM, threads=128, cluster=blocks) as block:
        a = T.alloc_shared((BM, K), A.dtype)
        b = T.alloc_shared((BN, K), A.dtype)
        d = T.alloc_shared((L, BN), A.dtype)
        s = T.alloc_fragment((BM, BN), "float32")
        p = T.alloc_fragment((BM, BN), A.dtype)
        acc = T.alloc_fragment((BM, L), "float32")
        there = T.alloc_cluster_barrier(1)
        free = T.alloc_cluster_barrier(blocks)
        T.copy(A[block * BM, 0], a)
        T.clear(acc)
        for k in range(B.shape[0] // BN):
            if T.shuffle_elect(0):
                T.mbarrier_wait_parity(free, (k & 1) ^ 1)
                T.tma_copy(B[k * BN, 0], b, barrier=there, cluster_mask=mask)
                T.mbarrier_arrive(there)
            T.mbarrier_wait_parity(there, k & 1)
            T.copy(D[0, k * BN], d)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            T.copy(s, p)
            T.gemm(p, d, acc, transpose_B=True)
            T.sync_threads()
            if T.get_thread_binding() < blocks:
                T.mbarrier_arrive(free, cta_id=T.get_thread_binding())
        T.cluster_sync()
        T.copy(acc, C[block * BM, 0])


@pytest.mark.parametrize("K", [64, 128, 256, 512])  # parts of rows, parts of columns
@pytest.mark.parametrize("blocks, mask", [(2, 0b11), (4, 0b1111), (4, 0b0101)])
def test_blocks_of_a_cluster_bring_rows_in_order(hopper, rng, blocks, mask, K):
    rows = 64 * blocks
    a, b, d = (small(rng, shape, E4M3) for shape in ((rows, K), (128, K), (32, 128)))
    a[:, 8:] = 0
    c = hopper(together, a, b, d, out=[((rows, 32), "float32")], blocks=blocks, mask=mask)
    wide = [x.astype(np.float64) for x in (a, b, d)]
    assert (c == wide[0] @ wide[1].T @ wide[2].T).all()
    specs = [T.Tensor(x.shape, "float8_e4m3fn") for x in (a, b, d)]
    kernel = together.compile(
        *specs, T.Tensor((rows, 32), "float32"), target="sm_90a", blocks=blocks, mask=mask
    )
    assert HALVED in kernel.explain()
