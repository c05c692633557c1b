"""Sections of tensors: what lies outside of them is neither read nor written, by whatever copies
tiles, on every executor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import operand

import tilejit.language as T
from tilejit import options, passes, tilejit
from tilejit.errors import DeviceError
from tilejit.passes import late
from tilejit.runtime import frame
from tilejit.runtime.device import use_executor
from tilejit.runtime.tensor_maps import MapSource
from tilejit.target import as_target

LENGTHS = (70, 0, 1, 64, 33)
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)


@tilejit
def double(A: T.Tensor, B: T.Tensor, starts: T.Tensor, which: T.Tensor, *, BM=32, dim=0):
    """Of the sections named by `which`, twice the elements and one more."""
    with T.Kernel(T.ceildiv(A.shape[dim], BM), which.shape[0], threads=64) as (block, n):
        z = which[n]
        source = T.section(A, starts[z], starts[z + 1], dim=dim)
        result = T.section(B, starts[z], starts[z + 1], dim=dim)
        for i, j in T.Parallel(BM, A.shape[1 - dim]):
            at = (block * BM + i, j) if dim == 0 else (j, block * BM + i)
            result[at] = source[at] * 2 + 1


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_elements_outside_of_a_section_are_not_written(executor, rng, dim, kind):
    a = rng.standard_normal((STARTS[-1], 24)).astype(np.float32)
    b = np.full_like(a, np.nan)
    wanted = b.copy()
    for z in (0, 3):
        rows = slice(STARTS[z], STARTS[z + 1])
        wanted[rows] = a[rows] * 2 + 1
    if dim == 1:
        a, b, wanted = (np.ascontiguousarray(x.T) for x in (a, b, wanted))
    double(a, b, STARTS.astype(kind), np.array([0, 3, 1], np.int32), dim=dim)
    np.testing.assert_array_equal(b, wanted)


def test_bounds_beyond_a_tensor_end_where_it_does(executor, rng):
    a = rng.standard_normal((40, 8)).astype(np.float32)
    starts = np.array([-7, 10, 1000, 2**31 - 1, 5], np.int32)
    b = np.full_like(a, np.nan)
    double(a, b, starts, np.array([0], np.int32))
    np.testing.assert_array_equal(b[:10], a[:10] * 2 + 1)
    assert np.isnan(b[10:]).all()
    double(a, b, starts, np.array([1, 2, 3], np.int32))
    np.testing.assert_array_equal(b, a * 2 + 1)


@tilejit
def products(A: T.Tensor, B: T.Tensor, C: T.Tensor, starts: T.Tensor, longest: T.int32, *, BN=64):
    """C = A[z] @ B[z].T of each section, both of them ragged: (longest, longest) each, of which a
    section has its own part. A, B: (rows, heads, K)."""
    heads, K = A.shape[1:]
    BM, BK = 128, 64
    sections = starts.shape[0] - 1
    grid = (T.ceildiv(longest, BM), heads, sections)
    with T.Kernel(*grid, threads=256) as (block, head, z):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        left = T.section(A, starts[z], starts[z + 1])
        right = T.section(B, starts[z], starts[z + 1])
        result = T.section(C, starts[z], starts[z + 1])
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(left[block * BM : block * BM + BM, head, k * BK : k * BK + BK], a)
            T.copy(right[0:BN, head, k * BK : k * BK + BK], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.copy(acc, result[block * BM : block * BM + BM, head, :])


def assert_products(kind, starts, K=160, heads=2, **chosen):
    """Rows of no section are NaN, and stay so."""
    rng = np.random.default_rng(5)
    rows = int(starts.max()) + 50
    a, b = (operand(rng, (rows, heads, K), kind) for _ in range(2))
    inside = np.zeros(rows, bool)
    for z in range(len(starts) - 1):
        inside[starts[z] : starts[z + 1]] = True
    a[~inside] = b[~inside] = np.nan
    c = np.full((rows, heads, 64), np.nan, np.float32)
    products(a, b, c, starts, int(np.diff(starts).max()), **chosen)
    assert np.isnan(c[~inside]).all()
    for z in range(len(starts) - 1):
        mine = slice(starts[z], starts[z + 1])
        x, y = a[mine].astype(np.float64), b[mine][:64].astype(np.float64)
        wanted = np.einsum("mhk,nhk->mhn", x, y)
        count = wanted.shape[2]
        np.testing.assert_allclose(c[mine, :, :count], wanted, rtol=1e-3, atol=1e-3)
        assert (c[mine, :, count:] == 0).all()


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("first", [0, 37])
def test_tiles_of_ragged_sections_are_multiplied_alone(target, kind, first):
    with use_executor("simulator"), options(target=target):
        assert_products(kind, STARTS + np.int32(first))


@pytest.mark.parametrize("blocks", [1, 3])
def test_results_in_a_section_do_not_wait_for_the_next_tile_whose_section_is_another(
    monkeypatch, blocks
):
    monkeypatch.setattr(late, "FEWEST_TILES", 0)
    monkeypatch.setattr(frame, "SIMULATED_BLOCKS", blocks)
    rng = np.random.default_rng(5)
    a = operand(rng, (STARTS[-1], 2, 512), "bfloat16")
    c = np.full((STARTS[-1], 2, 64), np.nan, "bfloat16")
    with use_executor("simulator"), options(target="sm_90a"):
        products(a, a, c, STARTS, 70)
    for z in range(len(LENGTHS)):
        x = a[STARTS[z] : STARTS[z + 1]].astype(np.float64)
        wanted = np.einsum("mhk,nhk->mhn", x, x[:64])
        mine = c[STARTS[z] : STARTS[z + 1], :, : wanted.shape[2]].astype(np.float64)
        np.testing.assert_allclose(mine, wanted, rtol=1e-2, atol=0.5)


def test_sections_move_by_tma_where_rows_are_whole():
    n = T.dynamic("n")
    wide, out = T.Tensor((n, 2, 128), "bfloat16"), T.Tensor((n, 2, 64), "float32")
    starts = T.Tensor((6,), "int32")
    kernel = products.compile(wide, wide, out, starts, target="sm_90a").kernels[0]
    text = kernel.explain()
    assert "slots of a, b by TMA" in text and "acc -> result: by TMA" in text
    assert "cp.async.bulk.tensor.5d" in kernel.ptx
    odd = T.Tensor((n, 2, 130), "bfloat16")
    text = products.compile(odd, odd, out, starts, target="sm_90a").kernels[0].explain()
    assert "rows of left do not provably begin at multiples of 16 bytes" in text


def test_sections_of_tensors_without_rows_read_as_zeros():
    starts = np.zeros(3, np.int32)
    empty = np.zeros((0, 2, 128), ml_dtypes.bfloat16)
    c = np.zeros((0, 2, 64), np.float32)
    with use_executor("simulator"), options(target="sm_90a"):
        products(empty, empty, c, starts, 100)


@tilejit
def shifted(A: T.Tensor, B: T.Tensor, C: T.Tensor, starts: T.Tensor, *, shift, dim=0):
    """The product of a tile that begins `shift` rows after its section does."""
    M, K = 64, A.shape[-1]
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((M, K), A.dtype)
        b = T.alloc_shared((64, K), B.dtype)
        acc = T.alloc_fragment((M, 64), "float32")
        part = T.section(A, starts[0], starts[1], dim=dim)
        T.clear(acc)
        for _ in T.Pipelined(1, num_stages=2):
            T.copy(part[shift : shift + M, 0:K], a)
            T.copy(B[0:64, 0:K], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.copy(acc, C)


def reasons(**chosen):
    tile = T.Tensor((200, 64), "float16")
    out, starts = T.Tensor((64, 64), "float32"), T.Tensor((2,), "int32")
    return shifted.compile(tile, tile, out, starts, target="sm_90a", **chosen).explain()


def test_sections_that_tma_cannot_tell_from_their_neighbours_are_copied_by_threads():
    assert "part is a section of rows" in reasons(shift=0, dim=1)
    assert "by TMA" in reasons(shift=3)


@tilejit
def scattered(A: T.Tensor, B: T.Tensor, C: T.Tensor, pages: T.Tensor, *, page=64):
    """C = the sum over pages of A @ page.T, each page a section found in the loop."""
    BM, K = A.shape
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((BM, K), A.dtype)
        b = T.alloc_shared((page, K), B.dtype)
        acc = T.alloc_fragment((BM, page), "float32")
        kept = T.alloc_fragment((BM, page), "float32")
        halves = T.alloc_fragment((BM, page), A.dtype)
        T.copy(A, a)
        T.clear(kept)
        for step in T.Pipelined(pages.shape[0]):
            number = pages[step]
            rows = T.section(B, number * page, number * page + page - number % 7)
            T.copy(rows[0:page, 0:K], b)
            T.clear(acc)
            T.gemm(a, b, acc, transpose_B=True)
            for i, j in T.Parallel(BM, page):
                halves[i, j] = acc[i, j] * 0.5
            T.gemm(halves, b, kept)
        T.copy(kept, C)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_sections_found_in_a_loop_whose_rounds_overlap_are_those_of_their_iteration(target):
    rng = np.random.default_rng(3)
    a, b = operand(rng, (64, 64), "float16"), operand(rng, (640, 64), "float16")
    pages = np.array([3, 9, 0, 4, 4, 7], np.int32)
    wanted = np.zeros((64, 64))
    for number in pages:
        rows = np.zeros((64, 64))
        count = 64 - number % 7
        rows[:count] = b[number * 64 : number * 64 + count]
        half = (a.astype(np.float64) @ rows.T * 0.5).astype(np.float16).astype(np.float64)
        wanted += half @ rows
    c = np.full((64, 64), np.nan, np.float32)
    with use_executor("simulator"), options(target=target):
        scattered(a, b, c, pages)
    np.testing.assert_allclose(c, wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())
    shapes = [T.Tensor(x.shape, x.dtype) for x in (a, b, c, pages)]
    explained = scattered.compile(*shapes, target="sm_90a").explain()
    assert "slots of b by TMA" in explained


def test_map_of_too_long_a_tensor_is_refused():
    n = T.dynamic("n")
    wide, out = T.Tensor((n, 2, 128), "bfloat16"), T.Tensor((n, 2, 64), "float32")
    kernel = products.compile(wide, wide, out, T.Tensor((6,), "int32"), target="sm_90a")
    lowered = passes.run(kernel.kernels[0].graph, as_target("sm_90a"))
    (param, *_) = (p for p in lowered.params if p.box is not None)
    source = MapSource(param)
    assert source.describe(4096, 300).shape[2] == 1 << 30
    with pytest.raises(DeviceError, match="cannot be copied in bulk: it may have 1073741824"):
        source.describe(4096, (1 << 30) + 1)
