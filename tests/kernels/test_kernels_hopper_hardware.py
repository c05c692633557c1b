"""What Hopper does and no manual says, found by random programs on a GPU: bulk stores write whole
16 bytes and trap before the tensor, and loads are overtaken by the next bulk copy to their tile."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, explained, operand

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.errors import SimulationError, UnsupportedError
from tilejit.runtime.device import use_executor

BF16 = ml_dtypes.bfloat16
HOPPER = "sm_90a"


@tilejit
def product(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, up=0, left=0, prefer=None):
    """C = A @ B; tiles of C begin `up` rows and `left` columns before it."""
    M, N, K = *C.shape, A.shape[1]
    with T.Kernel(T.ceildiv(N + left, 64), T.ceildiv(M + up, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * 64 - up, k * 32], a)
            T.copy(B[k * 32, bx * 64 - left], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64 - up, bx * 64 - left], prefer_instruction=prefer)


@pytest.mark.parametrize("out, columns", [("float32", 65), ("float32", 63), (BF16, 70), (BF16, 9)])
def test_rows_that_end_inside_16_bytes_leave_what_is_behind_them(hopper, rng, out, columns):
    """The tensor's rows are a part of longer ones, as a slice's are."""
    whole = -(-columns // 8) * 8 + 8
    a, b = operand(rng, (70, 48), BF16), operand(rng, (48, whole), BF16)[:, :columns]
    c = hopper(
        lambda a, b, c: product(a, b, c[:, :columns]), a, b, out=[((70, whole), out)],
    )  # fmt: skip
    assert_product(c[:, :columns], a, b)
    assert np.isnan(c[:, columns:].astype(np.float32)).all()
    strided = T.StridedTensor((70, columns), (whole, 1), T.Tensor((1,), out).dtype)
    rows = T.StridedTensor((48, columns), (whole, 1), "bfloat16")
    text = explained(product, a, rows, strided)
    assert "slots of a, b by TMA" in text
    assert "acc -> C: stored by the threads" in text
    assert "(rows of C do not provably end at multiples of 16 bytes)" in text


@pytest.mark.parametrize("up, left", [(1, 0), (0, 16), (5, 64), (64, 0), (70, 80)])
def test_tiles_that_begin_before_the_tensor_are_written_by_threads(hopper, rng, up, left):
    a, b = operand(rng, (72, 48), BF16), operand(rng, (48, 136), BF16)
    c = hopper(product, a, b, out=[((72, 136), "float32")], up=up, left=left)
    assert_product(c, a, b)
    text = explained(product, a, b, T.Tensor((72, 136), "float32"), up=up, left=left)
    assert "slots of a, b by TMA" in text, "loads may begin there"
    assert "(the part of C may begin before the tensor does)" in text


def test_store_asked_for_before_the_tensor_is_the_users_word(rng):
    """It compiles, for the user may know more than the compiler; where it is not so the simulator
    says what a GPU would trap at."""
    specs = [T.Tensor((64, 64), BF16)] * 2 + [T.Tensor((64, 64), "float32")]
    text = product.compile(*specs, target=HOPPER, up=8, prefer="tma").explain()
    assert "acc -> C: by TMA" in text
    a = operand(rng, (64, 64), BF16)
    with (
        use_executor("simulator"),
        options(target=HOPPER),
        pytest.raises(SimulationError, match="before its tensor"),
    ):
        product(a, a, np.zeros((64, 64), np.float32), up=8, prefer="tma")


@tilejit
def before(C: T.Tensor, *, rows):
    with T.Kernel(2, threads=128) as bx:
        tile = T.alloc_shared((16, 64), C.dtype)
        T.fill(tile, 0)
        T.fence_proxy_async()
        T.sync_threads()
        if T.shuffle_elect(128):
            T.tma_copy(tile, C[bx * 16 - rows, 0])
            T.tma_store_wait(0)


def test_store_by_hand_that_surely_begins_before_the_tensor_is_an_error_at_its_line():
    spec = T.Tensor((64, 64), "float32")
    before.compile(spec, target=HOPPER, rows=16)
    with pytest.raises(UnsupportedError, match="the part of C begins before the tensor does"):
        before.compile(spec, target=HOPPER, rows=17)


@tilejit
def by_halves(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=64, BN=192, BK=64):
    """The second half of a slot begins inside of a swizzle, so that warps load it."""
    M, N, K = *C.shape, A.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[bx * BN, k * BK], b)
            for half in (0, BK // 2):
                part = slice(half, half + BK // 2)
                T.gemm(a[0:BM, part], b[0:BN, part], acc, transpose_B=True)
        T.copy(acc, C[by * BM, bx * BN])


def test_loads_are_over_before_their_slot_is_left(hopper, rng):
    """Loads of the sums' rows meet in the same banks, long enough for the next copy to come."""
    a, b = operand(rng, (192, 520), BF16), operand(rng, (512, 520), BF16)
    c = hopper(by_halves, a, b, out=[((192, 512), "float32")])
    assert_product(c, a, b.T)
    specs = T.Tensor(a.shape, BF16), T.Tensor(b.shape, BF16), T.Tensor((192, 512), "float32")
    lines = by_halves.compile(*specs, target=HOPPER).kernels[0].planned.__str__().splitlines()
    left = next(n for n, line in enumerate(lines) if "barrier_arrive(a_b_empty" in line)
    assert "fence_proxy_async" in lines[left - 1]


def test_multiplies_that_read_slots_themselves_need_no_fence():
    specs = T.Tensor((512, 512), BF16), T.Tensor((512, 512), BF16), T.Tensor((512, 512), BF16)
    text = str(product.compile(*specs, target=HOPPER).kernels[0].planned)
    loop = text[text.index("wait_wgmma") : text.index("barrier_arrive(a_b_empty")]
    assert "fence_proxy_async" not in loop


@tilejit
def refilled(A: T.Tensor, C: T.Tensor):
    """A tile by hand that threads read and one thread has filled again once they have met."""
    with T.Kernel(1, threads=128):
        tile = T.alloc_shared((64, 64), A.dtype)
        full = T.alloc_barrier(1)
        for k in range(4):
            if T.shuffle_elect(128):
                T.tma_copy(A[k * 64, 0], tile, barrier=full)
                T.mbarrier_arrive(full)
            T.mbarrier_wait_parity(full, k % 2)
            for i, j in T.Parallel(64, 64):
                C[k * 64 + i, j] = tile[i, j] * 2
            T.sync_threads()


def test_loads_of_a_tile_by_hand_are_over_when_threads_have_met(hopper, rng):
    a = rng.standard_normal((256, 64)).astype(np.float32)
    c = hopper(refilled, a, out=[((256, 64), np.float32)])
    assert (c == a * 2).all()
    planned = refilled.compile(*[T.Tensor((256, 64), "float32")] * 2, target=HOPPER)
    lines = str(planned.kernels[0].planned).splitlines()
    met = max(n for n, line in enumerate(lines) if "sync_threads" in line)
    assert "fence_proxy_async" in lines[met - 1]
