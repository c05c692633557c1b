"""Sizes, strides and addresses of matmuls on Hopper: where TMA's rules fail another path is taken,
and the numbers are the same."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, explained, matmul, operand, stored

import tilejit.language as T
from tilejit import passes, tilejit
from tilejit.ir.kernel import ParamKind
from tilejit.target import as_target

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LAYOUTS = ["nn", "nt", "tn", "tt"]
HOPPER = "sm_90a"


def check(hopper, rng, size, layout="nn", dtype=BF16, out="float32", accum="float32", **constants):
    M, N, K = size
    tA, tB = (side == "t" for side in layout)
    a, b = operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)
    constants |= {"tA": tA, "tB": tB, "accum": accum}
    arrays = stored(a, tA), stored(b, tB)
    c = hopper(matmul, *arrays, out=[((M, N), out)], **constants)
    assert_product(c, a, b, accum=accum, tf32=constants.get("tf32", False))
    return explained(matmul, *arrays, T.Tensor((M, N), out), **constants)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1), (1, 64, 64), (64, 1, 64), (64, 64, 1), (63, 65, 67), (64, 64, 8), (65, 8, 129),
     (129, 72, 24), (8, 200, 40)],
    ids=str,
)  # fmt: skip
def test_matmul_of_any_size_is_right(hopper, rng, size, layout):
    check(hopper, rng, size, layout)


@pytest.mark.parametrize("dtype, accum", [(E4M3, "float32"), (np.int8, "int32"),
                                          (np.float16, "float16")])  # fmt: skip
@pytest.mark.parametrize("size", [(65, 33, 47), (48, 80, 16), (1, 16, 32), (70, 64, 8)], ids=str)
def test_matmul_of_any_size_and_dtype_is_right(hopper, rng, size, dtype, accum):
    for layout in LAYOUTS:
        check(hopper, rng, size, layout, dtype, accum, accum)


def test_matmul_of_odd_sizes_in_large_tiles_is_right(hopper, rng):
    text = check(hopper, rng, (503, 763, 117), BM=128, BN=256, BK=64, threads=256)
    assert "not wgmma (its operands are not brought by TMA)" in text
    assert (
        "copy A -> a: through registers, not asynchronous (rows are not provably aligned to 4, 8 "
        "or 16 bytes); not TMA (rows of A do not provably begin at multiples of 16 bytes)"
    ) in text


@pytest.mark.parametrize("pitch", ["N", "K"])
def test_only_the_tensor_whose_rows_are_ragged_is_spared_tma(hopper, rng, pitch):
    """N is no multiple of 8: B's rows are ragged; the output's only concern its store."""
    size = (96, 100, 64) if pitch == "N" else (96, 128, 60)
    text = check(hopper, rng, size, "nn" if pitch == "N" else "nt")
    assert "TMA (rows of B do not provably begin at multiples of 16 bytes)" in text


def test_output_with_ragged_rows_is_stored_by_threads(hopper, rng):
    text = check(hopper, rng, (96, 100, 64), "nt", out="bfloat16")
    assert "wgmma" in text
    assert (
        "acc -> C: stored by the threads, not by TMA "
        "(rows of C do not provably begin at multiples of 16 bytes)"
    ) in text


def test_sum_over_nothing_is_zero(hopper, rng):
    for layout in LAYOUTS:
        check(hopper, rng, (70, 40, 0), layout)


@pytest.mark.parametrize("size", [(0, 64, 64), (64, 0, 64), (0, 0, 0)], ids=str)
def test_matmul_without_output_writes_nothing(hopper, rng, size):
    check(hopper, rng, size)


def embedded(x, rows, columns, row0=0, column0=0):
    """The matrix as a part of a larger one."""
    whole = np.full((x.shape[0] + rows, x.shape[1] + columns), 7, x.dtype)
    view = whole[row0 : row0 + x.shape[0], column0 : column0 + x.shape[1]]
    view[...] = x
    return view


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "padding, column0, fits",
    [(8, 0, True), (64, 8, True), (64, 16, True), (8, 1, False), (8, 4, False), (3, 0, False),
     (4, 0, False)],
)  # fmt: skip
def test_parts_of_larger_matrices_are_multiplied(hopper, rng, layout, padding, column0, fits):
    M, N, K = 80, 72, 88
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    tA, tB = (side == "t" for side in layout)
    arrays = [embedded(stored(x, t), 3, padding, 2, column0) for x, t in ((a, tA), (b, tB))]
    c = hopper(matmul, *arrays, out=[((M, N), "float32")], tA=tA, tB=tB)
    assert_product(c, a, b)
    text = explained(matmul, *arrays, c, tA=tA, tB=tB)
    assert ("wgmma.m64n64k16" in text) == fits
    if column0 % 8:
        assert "does not provably begin at a multiple of 16 bytes" in text
    elif not fits:
        assert "do not provably begin at multiples of 16 bytes" in text


@pytest.mark.parametrize("elements", [1, 2, 4, 8])
def test_output_in_a_larger_matrix_leaves_the_rest_alone(executor, hopper, rng, elements):
    if executor == "gpu":
        pytest.skip("arrays on the host")
    a, b = operand(rng, (80, 40), BF16), operand(rng, (40, 72), BF16)
    whole = np.full((100, 72 + 8 + elements), -3, np.float32)
    view = whole[5:85, elements : elements + 72]
    matmul(a, b, view)
    assert_product(view.copy(), a, b)
    view[...] = -3
    assert (whole == -3).all()


def test_columns_far_apart_are_multiplied(hopper, rng):
    """Neither dimension of a view is contiguous."""
    a, b = operand(rng, (80, 2 * 40), BF16)[:, ::2], operand(rng, (40, 72), BF16)
    c = hopper(matmul, a, b, out=[((80, 72), "float32")])
    assert_product(c, a, b)
    text = explained(matmul, a, b, c)
    assert "not TMA (neighbours in a row of A are not neighbours in memory)" in text


def test_transposed_view_is_multiplied_as_it_lies(hopper, rng):
    a, b = operand(rng, (40, 80), BF16).T, operand(rng, (40, 72), BF16)
    c = hopper(matmul, a, b, out=[((80, 72), "float32")])
    assert_product(c, a, b)


@pytest.mark.parametrize("kind", ["repeated", "reversed"])
def test_rows_that_do_not_follow_each_other_are_multiplied(executor, hopper, rng, kind):
    if executor == "gpu" and kind == "reversed":
        pytest.skip("torch has no such tensors")
    a, b = operand(rng, (80, 64), BF16), operand(rng, (64, 72), BF16)
    a = np.broadcast_to(a[:1], a.shape) if kind == "repeated" else a[::-1]
    c = hopper(matmul, a, b, out=[((80, 72), "float32")])
    assert_product(c, a, b)
    text = explained(matmul, a, b, c)
    assert "not TMA (rows of A do not follow each other in memory)" in text


@tilejit
def batched(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=64, BN=64, BK=32, tB=False):
    batch, M, K = A.shape
    N = C.shape[2]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), batch, threads=128) as (bx, by, bz):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK) if tB else (BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[bz, by * BM, k * BK], a)
            if tB:
                T.copy(B[bz, bx * BN, k * BK], b)
            else:
                T.copy(B[bz, k * BK, bx * BN], b)
            T.gemm(a, b, acc, transpose_B=tB)
        T.copy(acc, C[bz, by * BM, bx * BN])


@pytest.mark.parametrize("size", [(64, 64, 64), (72, 136, 40), (65, 70, 33), (64, 64, 0)], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_of_products_is_right(hopper, rng, batch, size):
    M, N, K = size
    a, b = operand(rng, (batch, M, K), BF16), operand(rng, (batch, K, N), BF16)
    c = hopper(batched, a, b, out=[((batch, M, N), "float32")])
    for z in range(batch):
        assert_product(c[z], a[z], b[z])
    text = explained(batched, a, b, c)
    assert ("wgmma" in text and "acc -> C: by TMA" in text) == (size[0] != 65 and K > 0)


def test_rows_past_a_matrix_do_not_reach_into_the_next_of_the_batch(hopper, rng):
    a, b = operand(rng, (3, 70, 72), BF16), operand(rng, (3, 72, 72), BF16)
    stored_b = np.ascontiguousarray(b.swapaxes(1, 2))
    c = hopper(batched, a, stored_b, out=[((3, 70, 72), "bfloat16")], tB=True)
    for z in range(3):
        assert_product(c[z], a[z], b[z])


def test_batch_with_strides_of_its_own_is_right(hopper, rng):
    """The batch is the middle dimension in memory, and rows are parts of longer ones."""
    a = operand(rng, (72, 2, 80), BF16)[:, :, :40].swapaxes(0, 1)
    b = operand(rng, (2, 40, 72), BF16)
    c = hopper(batched, a, b, out=[((2, 72, 72), "float32")])
    for z in range(2):
        assert_product(c[z], a[z], b[z])
    assert "of a, b by TMA" in explained(batched, a, b, c)


M, N, K = T.dynamic("M, N, K")


@tilejit
def any_size(
    A: T.Tensor((M, K), "bfloat16"), B: T.Tensor((K, N), "bfloat16"),
    C: T.Tensor((M, N), "float32"), *, BM=64, BN=64, BK=32,
):  # fmt: skip
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        a = T.alloc_shared((BM, BK), "bfloat16")
        b = T.alloc_shared((BK, BN), "bfloat16")
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * BM, bx * BN])


@pytest.mark.parametrize(
    "size",
    [(64, 64, 64), (200, 136, 72), (8, 8, 8), (65, 67, 69), (1, 8, 16), (16, 16, 0), (48, 0, 16),
     (0, 16, 16), (129, 64, 4), (130, 200, 104)],
    ids=str,
)  # fmt: skip
def test_one_kernel_serves_all_sizes(hopper, rng, size):
    m, n, k = size
    a, b = operand(rng, (m, k), BF16), operand(rng, (k, n), BF16)
    c = hopper(any_size, a, b, out=[((m, n), "float32")])
    assert_product(c, a, b)


@pytest.mark.parametrize("divides", [8, 1])
def test_kernel_of_runtime_extents_is_for_tma_where_8_divides_them(divides):
    """A spec promises nothing of its extents; of a call's it is known what divides them."""
    traced = any_size.compile(target=HOPPER).graph
    extents = [param.var for param in traced.params if param.kind is ParamKind.SYMBOL]
    known = replace(traced, multiples=dict.fromkeys(extents, divides))
    text = "\n".join(passes.run(known, as_target(HOPPER)).notes)
    assert ("of a, b by TMA" in text) == (divides == 8)


R, S, P = T.dynamic("R, S, P")


@tilejit
def any_pitch(
    A: T.StridedTensor((R, 40), (P, 1), "bfloat16"), B: T.Tensor((40, S), "bfloat16"),
    C: T.Tensor((R, S), "float32"),
):  # fmt: skip
    with T.Kernel(T.ceildiv(S, 64), T.ceildiv(R, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 32), "bfloat16")
        b = T.alloc_shared((32, 64), "bfloat16")
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(2):
            T.copy(A[by * 64, k * 32], a)
            T.copy(B[k * 32, bx * 64], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64, bx * 64])


@pytest.mark.parametrize("pitch", [40, 48, 44, 41, 104])
def test_one_kernel_serves_all_pitches(hopper, rng, pitch):
    a, b = operand(rng, (80, pitch), BF16)[:, :40], operand(rng, (40, 72), BF16)
    c = hopper(any_pitch, a, b, out=[((80, 72), "float32")])
    assert_product(c, a, b)


def test_pitch_of_a_kernel_for_all_of_them_may_be_zero(hopper, rng):
    a, b = operand(rng, (80, 40), BF16), operand(rng, (40, 72), BF16)
    a = np.broadcast_to(a[:1], a.shape)
    c = hopper(any_pitch, a, b, out=[((80, 72), "float32")])
    assert_product(c, a, b)


def test_tile_of_an_empty_tensor_is_zeros(hopper, rng):
    """The tensor that K alone makes empty is brought before the loop."""
    rows = T.dynamic("rows")

    @tilejit
    def kernel(
        A: T.Tensor((64, 64), "bfloat16"), B: T.Tensor((64, 64), "bfloat16"),
        E: T.Tensor((rows, 64), "bfloat16"), C: T.Tensor((64, 64), "float32"),
    ):  # fmt: skip
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "bfloat16")
            b = T.alloc_shared((64, 32), "bfloat16")
            e = T.alloc_shared((64, 64), "bfloat16")
            acc = T.alloc_fragment((64, 64), "float32")
            T.copy(E[0, 0], e)
            for i, j in T.Parallel(64, 64):
                acc[i, j] = e[i, j]
            for k in T.Pipelined(2):
                T.copy(A[0, k * 32], a)
                T.copy(B[0, k * 32], b)
                T.gemm(a, b, acc, transpose_B=True)
            T.copy(acc, C)

    a, b = operand(rng, (64, 64), BF16), operand(rng, (64, 64), BF16)
    for count in (64, 5, 0):
        e = operand(rng, (count, 64), BF16)
        c = hopper(kernel, a, b, e, out=[((64, 64), "float32")])
        c[:count] -= e
        np.testing.assert_allclose(c, a.astype(float) @ b.T.astype(float), atol=1e-4)


@pytest.mark.parametrize("align", [2, 4, 8, 16, 32])
def test_tensor_at_any_address_is_multiplied(hopper, rng, align):
    count = 80 * 64 + 64
    memory = operand(rng, (count,), BF16)
    start = (-memory.ctypes.data // 2) % 32 + align // 2
    a = memory[start : start + 80 * 64].reshape(80, 64)
    b = operand(rng, (64, 72), BF16)
    c = hopper(matmul, a, b, out=[((80, 72), "float32")])
    assert_product(c, a, b)
    text = explained(matmul, a, b, c)
    assert ("wgmma" in text and "of a, b by TMA" in text) == (align % 16 == 0)
    if align % 16:
        assert "not TMA (A does not provably begin at a multiple of 16 bytes)" in text


def test_kernel_for_aligned_tensors_gives_way_to_one_for_others(hopper, executor, rng):
    if executor == "gpu":
        pytest.skip("arrays on the host")

    @tilejit(out_idx=[-1])
    def make(M, N, K):
        @T.prim_func
        def product(
            A: T.Tensor((M, K), "bfloat16"), B: T.Tensor((K, N), "bfloat16"),
            C: T.Tensor((M, N), "float32"),
        ):  # fmt: skip
            with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
                a = T.alloc_shared((64, 32), "bfloat16")
                b = T.alloc_shared((32, 64), "bfloat16")
                acc = T.alloc_fragment((64, 64), "float32")
                T.clear(acc)
                for k in T.Pipelined(T.ceildiv(K, 32)):
                    T.copy(A[by * 64, k * 32], a)
                    T.copy(B[k * 32, bx * 64], b)
                    T.gemm(a, b, acc)
                T.copy(acc, C[by * 64, bx * 64])

        return product

    kernel = make(80, 72, 64)
    assert "of a, b by TMA" in kernel.explain()
    memory, b = operand(rng, (80 * 64 + 1,), BF16), operand(rng, (64, 72), BF16)
    for offset in (0, 1):
        a = memory[offset : offset + 80 * 64].reshape(80, 64)
        assert_product(kernel(a, b), a, b)
