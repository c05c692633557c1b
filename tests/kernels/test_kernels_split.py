"""Loops whose iterations several blocks share: the sums are added in a fixed order, whatever the
sizes, and what follows is done once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, assert_near, explained, operand

import tilejit.language as T
from tilejit import ArgumentError, options, tilejit
from tilejit.runtime.frame import TileFrame

BF16 = ml_dtypes.bfloat16


@tilejit
def biased(
    A: T.Tensor, B: T.Tensor, bias: T.Tensor, C: T.Tensor, *,
    BM=64, BN=64, BK=32, split=2, stages=None, threads=None,
):  # fmt: skip
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages, split=split):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        for i, j in T.Parallel(BM, BN):
            with T.If(bx * BN + j < N):
                acc[i, j] += bias[bx * BN + j]
        T.copy(acc, C[by * BM, bx * BN])


def check(run, rng, size, **constants):
    M, N, K = size
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    bias = operand(rng, (N,), np.float32)
    c = run(biased, a, b, bias, out=[((M, N), "float32")], **constants)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    sizes = np.abs(wide_a) @ np.abs(wide_b) + np.abs(bias)
    assert_near(c, wide_a @ wide_b + bias, (K + 2) * FLOAT32_STEP * sizes)


@pytest.mark.parametrize("split", [2, 3, 7])
@pytest.mark.parametrize(
    "size", [(16, 64, 256), (64, 64, 32), (130, 72, 200), (65, 63, 31), (1, 8, 1)], ids=str
)
def test_split_loop_is_right_on_hopper(hopper, rng, size, split):
    check(hopper, rng, size, split=split)


@pytest.mark.parametrize(
    "constants",
    [{"threads": 128}, {"threads": 256, "stages": 3}, {"BM": 128, "BN": 32}, {"stages": 0}],
    ids=str,
)
def test_split_loop_is_right_with_stages_and_threads_by_hand(hopper, rng, constants):
    check(hopper, rng, (100, 96, 160), split=3, **constants)


@pytest.mark.parametrize("size", [(16, 64, 256), (130, 72, 200), (65, 63, 31)], ids=str)
def test_split_loop_is_right_where_warps_load_their_operands(run, rng, size):
    with options(target="sm_80"):
        check(run, rng, size, split=3)


def test_more_parts_than_iterations_add_nothing(hopper, rng):
    check(hopper, rng, (64, 64, 64), split=9)


@tilejit
def two_products(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor, *, BM=64, BN=64, BK=32):
    """C = A @ B and, from the same tiles, D = A @ A's first columns."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM)) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        plain = T.alloc_fragment((BM, BN), "float32")
        again = T.alloc_fragment((BM, BN), "float32")
        T.clear(plain)
        T.clear(again)
        for k in T.Pipelined(T.ceildiv(K, BK), split=4):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, plain)
            T.gemm(a, b, again)
        for i, j in T.Parallel(BM, BN):
            again[i, j] = again[i, j] * 2
        T.copy(plain, C[by * BM, bx * BN])
        T.copy(again, D[by * BM, bx * BN])


def test_every_accumulator_of_a_split_loop_is_added_up(hopper, rng):
    a, b = operand(rng, (96, 136), BF16), operand(rng, (136, 72), BF16)
    c, d = hopper(two_products, a, b, out=[((96, 72), "float32")] * 2)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    error = 136 * FLOAT32_STEP * (np.abs(wide_a) @ np.abs(wide_b))
    assert_near(c, wide_a @ wide_b, error)
    np.testing.assert_array_equal(d, 2 * c)


@tilejit
def integers(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, split=2):
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(M, 64)) as bx:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((N, 64), B.dtype)
        acc = T.alloc_fragment((64, N), "int32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 64), split=split):
            T.copy(A[bx * 64, k * 64], a)
            T.copy(B[0, k * 64], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.copy(acc, C[bx * 64, 0])


def test_split_sums_of_integers_are_exact_on_a_grid_of_one_dimension(hopper, rng):
    a, b = operand(rng, (150, 336), np.int8), operand(rng, (32, 336), np.int8)
    c = hopper(integers, a, b, out=[((150, 32), "int32")], split=3)
    np.testing.assert_array_equal(c, a.astype(np.int64) @ b.astype(np.int64).T)


def frame_of(target="sm_90a", **constants) -> TileFrame:
    wide = T.Tensor((16, 4096), "bfloat16")
    tall = T.Tensor((4096, 128), "bfloat16")
    bias, out = T.Tensor((128,), "float32"), T.Tensor((16, 128), "float32")
    return biased.compile(wide, tall, bias, out, target=target, **constants).kernels[0]


def test_explanation_says_how_many_blocks_share_a_loop():
    text = explained(
        biased, *(T.Tensor(s, d) for s, d in (((16, 4096), "bfloat16"), ((4096, 128), "bfloat16"),
                                              ((128,), "float32"), ((16, 128), "float32"))),
        split=5,
    )  # fmt: skip
    assert "5 blocks a tile share its iterations; the last adds up their sums" in text


def test_launch_has_a_block_for_each_part():
    frame = frame_of("sm_80", split=3)
    assert frame.launch_grid((2, 1, 1), None) == (2, 1, 3)
    assert [p.name for _, p, _ in frame.spaces] == ["counts", "acc_parts"]
    assert [size for *_, size in frame.spaces] == [2 * 4, 2 * 3 * 64 * 64 * 4]


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120a"])
def test_split_kernel_compiles_without_spills(target):
    resources = frame_of(target, split=4).resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)


def test_few_tiles_with_many_iterations_are_split_unasked():
    a, b = T.Tensor((64, 32768), "bfloat16"), T.Tensor((32768, 64), "bfloat16")
    bias, c = T.Tensor((64,), "float32"), T.Tensor((64, 64), "float32")
    planned = biased.compile(a, b, bias, c, target="sm_90a", split=None, BK=64).kernels[0].planned
    assert planned.parts > 2
    for constants in ({"split": 1}, {"stages": 4}):
        kernel = biased.compile(
            a, b, bias, c, target="sm_90a", **{"split": None, "BK": 64, **constants}
        )
        assert kernel.kernels[0].planned.parts == 1, constants


def test_many_tiles_are_not_split_unasked():
    square = T.Tensor((4096, 4096), "bfloat16")
    bias, c = T.Tensor((4096,), "float32"), T.Tensor((4096, 4096), "float32")
    kernel = biased.compile(square, square, bias, c, target="sm_90a", split=None, BM=128, BN=256)
    assert kernel.kernels[0].planned.parts == 1


def refused(build) -> str:
    with pytest.raises(ArgumentError) as caught:
        build()
    return str(caught.value)


def kernel_of(before=None, inside=None, after=None, grid=(2,), split=2):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(*grid, threads=128):
            a = T.alloc_shared((64, 64), A.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            if before:
                before(acc, C)
            for k in T.Pipelined(8, split=split):
                T.copy(A[0, k * 64], a)
                T.gemm(a, a, acc)
                if inside:
                    inside(acc, C)
            if after == "copy":
                T.copy(a, C[0, 0])
            elif after:
                after(acc, C)
            T.copy(acc, C[0, 0])

    tensor = T.Tensor((64, 512), "bfloat16")
    return kernel.compile(tensor, T.Tensor((64, 64), "float32"), target="sm_90a")


@pytest.mark.parametrize(
    "parts, reason",
    [
        ({"before": lambda acc, C: T.fill(acc, 1)}, "acc does not begin at zero"),
        ({"before": lambda acc, C: (T.clear(acc), T.copy(acc, C[0, 0]))},
         "a tensor is written before it"),
        ({"before": lambda acc, C: T.clear(acc), "inside": lambda acc, C: T.copy(acc, C[0, 0])},
         "an iteration copies to C"),
        ({"before": lambda acc, C: T.clear(acc), "after": "copy"},
         "a is used after it as it leaves it"),
        ({"before": lambda acc, C: T.clear(acc), "grid": (1, 1, 2)},
         "the grid has three dimensions already"),
        ({"before": lambda acc, C: T.clear(acc), "after": lambda acc, C: T.atomic_add(C[0, 0], 1)},
         "around it there is a T.gemm, a T.While or an atomic"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_loop_that_does_more_than_add_is_not_split(parts, reason):
    message = refused(lambda: kernel_of(**parts))
    assert f"T.Pipelined: the iterations cannot be split among blocks: {reason}." in message
    assert "test_kernels_split.py" in message


def test_loop_that_multiplies_half_of_what_was_copied_before_is_not_split(hopper, rng):
    """And one that copies twice to a place, each time before it multiplies, is."""

    @tilejit
    def halves(A: T.Tensor, C: T.Tensor, *, is_late, split=2):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 64), A.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            T.clear(a)
            for k in T.Pipelined(8, split=split):
                T.copy(A[0, k * 64], a if not is_late else a[0:32, :])
                T.gemm(a, a, acc, transpose_B=True)
                T.copy(A[64, k * 64], a if not is_late else a[32:64, :])
                if not is_late:
                    T.gemm(a, a, acc, transpose_B=True)
            T.copy(acc, C[0, 0])

    tensors = T.Tensor((128, 512), "bfloat16"), T.Tensor((64, 64), "float32")
    message = refused(lambda: halves.compile(*tensors, target="sm_90a", is_late=True))
    assert "an iteration multiplies what another one has copied" in message
    a = rng.integers(-4, 5, (128, 512)).astype(BF16)
    c = hopper(halves, a, out=[((64, 64), "float32")], is_late=False)
    top, bottom = a[:64].astype(np.float32), a[64:].astype(np.float32)
    np.testing.assert_array_equal(c, top @ top.T + bottom @ bottom.T)


@pytest.mark.parametrize("slots, split", [(1, 2), (2, 2), (2, None)])
def test_loop_that_multiplies_what_was_copied_before_is_not_split(hopper, rng, slots, split):
    """By hand, the tile of the next iteration comes during this one's multiply."""

    @tilejit
    def ahead(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((slots, 64, 64), A.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            T.copy(A[0, 0], a[0, :, :])
            for k in T.Pipelined(8, split=split):
                if slots > 1:
                    T.copy(A[0, (k + 1) * 64], a[(k + 1) % slots, :, :])
                T.gemm(a[k % slots, :, :], a[k % slots, :, :], acc, transpose_B=True)
                if slots == 1:
                    T.copy(A[0, (k + 1) * 64], a[0, :, :])
            T.copy(acc, C[0, 0])

    a = rng.integers(-4, 5, (64, 512)).astype(BF16)
    if split is not None:
        tensors = T.Tensor((64, 512), "bfloat16"), T.Tensor((64, 64), "float32")
        message = refused(lambda: ahead.compile(*tensors, target="sm_90a"))
        assert "an iteration multiplies what another one has copied" in message
        return
    c = hopper(ahead, a, out=[((64, 64), "float32")])
    np.testing.assert_array_equal(c, a.astype(np.float64) @ a.astype(np.float64).T)


@pytest.mark.parametrize("split", [0, -1, True, 1.5])
def test_split_is_a_positive_number(split):
    with pytest.raises((ArgumentError, TypeError), match=r"T.Pipelined: split must be"):
        kernel_of(before=lambda acc, C: T.clear(acc), split=split)
