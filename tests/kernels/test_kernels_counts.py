"""Numbers of tiles, masks and sends, where they cost instructions: what is known at run time only
is divided in 32 bits, neighbours share a comparison, and sends amid a loop are no branch."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, matmul, operand

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ResourceError
from tilejit.passes.tiles import MAX_TILES

BF16 = ml_dtypes.bfloat16
HOPPER = "sm_90a"


@T.macro
def product(A, B, C, x, y, z, stop, BM, BN, BK):
    """A tile of A[z] @ B[z], of the first `stop` columns of A."""
    a, b = T.alloc_shared((BM, BK), A.dtype), T.alloc_shared((BK, BN), B.dtype)
    acc = T.alloc_fragment((BM, BN), "float32")
    T.clear(acc)
    for k in T.Pipelined(T.ceildiv(stop, BK), num_stages=3):
        T.copy(A[z, y * BM, k * BK], a)
        T.copy(B[z, k * BK, x * BN], b)
        T.gemm(a, b, acc)
    T.copy(acc, C[z, y * BM, x * BN])


@tilejit
def batched(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=64, BN=64, BK=64):
    """C[z] = A[z] @ B[z], of any number of rows, columns and batches."""
    batch, M, K = A.shape
    N = B.shape[2]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), batch, threads=128) as (x, y, z):
        product(A, B, C, x, y, z, K, BM, BN, BK)


@tilejit
def triangle(A: T.Tensor, B: T.Tensor, rows: T.int32, C: T.Tensor, *, BM=64, BN=64, BK=64):
    """The same of the first `rows` rows and of lower triangles A: tiles have more work further
    down, so blocks take them from a counter."""
    batch, _, K = A.shape
    N = B.shape[2]
    with T.Kernel(T.ceildiv(rows, BM), T.ceildiv(N, BN), batch, threads=128) as (y, x, z):
        product(A, B, C, x, y, z, T.min((y + 1) * BM, K), BM, BN, BK)


def compiled(kernel):
    """For numbers of batches, rows and columns that are known at run time only."""
    batch, m, n = (T.dynamic(name) for name in "bmn")
    n = n * 8
    shapes = (batch, m, 128), (batch, 128, n), (batch, m, n)
    dtypes = ("bfloat16", "bfloat16", "float32")
    a, b, c = (T.Tensor(s, d) for s, d in zip(shapes, dtypes, strict=True))
    rows = (T.int32,) if kernel is triangle else ()
    return kernel.compile(a, b, *rows, c, target=HOPPER)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 130, 200), (5, 64, 64), (2, 700, 72)], ids=str)
def test_tiles_of_any_number_are_all_found(hopper, rng, shape):
    batch, M, N = shape
    a, b = operand(rng, (batch, M, 128), BF16), operand(rng, (batch, 128, N), BF16)
    kernel = compiled(batched)
    result = hopper(kernel, a, b, out=[((batch, M, N), np.float32)])
    assert_product(result, a, b)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 128, 200), (2, 70, 72)], ids=str)
def test_uneven_tiles_of_any_number_are_all_found(hopper, rng, shape):
    batch, rows, N = shape
    a, b = operand(rng, (batch, 128, 128), BF16), operand(rng, (batch, 128, N), BF16)
    a = np.tril(a)
    kernel = compiled(triangle)
    assert "each block takes the next one when it is free" in kernel.explain()
    a = np.ascontiguousarray(a[:, :rows])
    result = hopper(kernel, a, b, rows, out=[((batch, rows, N), np.float32)])
    assert_product(result, a, b)


def test_no_block_where_there_are_no_tiles(hopper, rng):
    a, b = operand(rng, (1, 128, 128), BF16), operand(rng, (1, 128, 64), BF16)
    kernel = compiled(triangle)
    for rows in (0, -200):
        result = hopper(kernel, a, b, rows, out=[((1, 128, 64), np.float32)])
        assert np.isnan(result).all()


@pytest.mark.parametrize("kernel", [batched, triangle])
def test_numbers_of_tiles_are_divided_in_32_bits(kernel):
    made = compiled(kernel)
    assert "div.u32" in made.ptx and not re.search(r"(div|rem)\.[us]64", made.ptx)


def test_more_tiles_than_are_counted_are_refused():
    @tilejit
    def plain(A: T.Tensor, *, panel=0):
        with T.Kernel(A.shape[0], A.shape[1], threads=32) as (x, y):
            if panel:
                T.use_swizzle(panel)
            A[x, y] = 0.0

    frame = compiled(batched).kernels[0]
    assert frame.planned.is_persistent
    assert frame.launch_grid((1 << 15, 1 << 15, 1), None) == (2, 1, 1)
    wide = T.Tensor((T.dynamic("m"), T.dynamic("n")), "float32")
    panels = plain.compile(wide, target=HOPPER, panel=4).kernels[0]
    for found in (frame, panels):
        found.check_tiles("it", (1 << 15, 1 << 15, 1))
        with pytest.raises(ResourceError, match=f"{1 << 31} blocks, of which at most {MAX_TILES}"):
            found.check_tiles("it", (1 << 16, 1 << 15, 1))
    line = plain.compile(wide, target=HOPPER).kernels[0]  # which counts no tiles
    line.check_tiles("it", (1 << 16, 1 << 15, 1))
    assert line.launch_grid((1 << 16, 1 << 15, 1), None) == (1 << 16, 1 << 15, 1)


def test_calls_with_more_tiles_than_are_counted_are_refused(hopper, rng):
    a, b = operand(rng, (1, 128, 128), BF16), operand(rng, (1, 128, 8192), BF16)
    with pytest.raises(ResourceError, match=f"{128 * (2**25 - 1)} blocks, of which at most"):
        hopper(compiled(triangle), a, b, 2**31 - 64, out=[((1, 128, 8192), np.float32)])


def test_sends_amid_a_loop_have_no_branch():
    specs = [T.Tensor((4096, 4096), "bfloat16")] * 3  # several tiles a block
    late = matmul.compile(*specs, target=HOPPER, BM=128, BN=256, BK=64, threads=256)
    sends = re.findall(r"(@%p\d+ )?cp\.async\.bulk\.tensor\.2d\.global", late.ptx)
    assert sends.count("") == 4 and len(sends) == 8  # those of the last tile are behind its loop


# ---- masks --------------------------------------------------------------------------------------


@tilejit
def masked(X: T.Tensor, Y: T.Tensor, *, N=None):
    """Rows, each by two blocks, whose elements from column N on count as 7."""
    M = X.shape[0]
    part = 3072
    with T.Kernel(M * 2, threads=128) as block:
        row, column = block // 2, block % 2 * part
        x = T.alloc_fragment((part,), X.dtype)
        T.copy(X[row, column], x)
        for j in T.Parallel(part):
            x[j] = T.if_then_else(column + j < N, x[j], 7.0)
        for j in T.Parallel(part):
            Y[row, column + j] = T.if_then_else(column + j >= N - 8, x[j] * 2, x[j])


@tilejit
def remainders(X: T.Tensor, Y: T.Tensor, *, factor=6, by=9, most=4):
    with T.Kernel(1, threads=128):
        for i in T.Parallel(X.shape[0]):
            Y[i] = T.if_then_else((X[i] * factor) % by < most, 1, 0)


@pytest.mark.parametrize("factors", [(6, 9, 4), (100, 1000, 250), (8, 1024, 251), (40, 1000, 501)])
def test_values_wrap_before_they_are_compared(run, rng, factors):
    factor, by, most = factors
    x = rng.integers(-(2**31), 2**31, 256).astype(np.int32)
    with np.errstate(over="ignore"):
        wanted = (x * np.int32(factor)) % np.int32(by) < most
    found = run(remainders, x, out=[((256,), np.int32)], factor=factor, by=by, most=most)
    assert (found == wanted).all()


@tilejit
def far(Y: T.Tensor):
    with T.Kernel(1, threads=32):
        for i in T.Parallel(Y.shape[0]):
            Y[i] = 0
        for j in T.serial(4096, 4098):
            if T.cast(j, "int64") * 1048576 - 4294967296 < 5:
                for i in T.Parallel(Y.shape[0]):
                    Y[i] = j


def test_wide_values_are_compared_in_64_bits(run):
    assert (run(far, out=[((8,), np.int32)]) == 4096).all()


@pytest.mark.parametrize("N", [1, 7, 8, 1000, 3071, 3072, 4000, 5997, 6000])
def test_masks_hide_what_they_should(run, rng, N):
    x = rng.standard_normal((3, 6000)).astype(BF16)
    column = np.arange(6000)
    wanted = np.where(column < N, x.astype(np.float32), 7)
    wanted = np.where(column >= N - 8, wanted * 2, wanted)
    assert (run(masked, x, out=[((3, 6000), BF16)], N=N).astype(np.float32) == wanted).all()


def test_neighbours_in_a_vector_share_a_mask():
    specs = [T.Tensor((64, 6000), "bfloat16")] * 2
    counts = [masked.compile(*specs, target=HOPPER, N=N).ptx.count("setp.") for N in (4000, 3999)]
    assert counts[0] <= 20 and counts[1] <= 40, counts
