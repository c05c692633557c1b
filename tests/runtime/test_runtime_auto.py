"""Parameters left to the cost model: when they are chosen, what is chosen, and what goes wrong."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import ArgumentError, ArgumentTypeError, TileError, tilejit
from tilejit.passes import schedule
from tilejit.runtime import choose

pytestmark = pytest.mark.usefixtures("reference")


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor,
    *, BM=T.auto(64, 128, 256), BN=T.auto(128, 256, 64), BK=T.auto(64, 32), threads=None,
):  # fmt: skip
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * BM, bx * BN])


def compiled(M, N, K, target="sm_90a", **constants):
    return matmul.compile(
        T.Tensor((M, K), "bfloat16"), T.Tensor((K, N), "bfloat16"), T.Tensor((M, N), "bfloat16"),
        target=target, **constants,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2048, 4096, 8192, 16384])
def test_large_products_get_the_tile_that_keeps_tensor_cores_busy(size):
    kernel = compiled(size, size, size)
    constants = kernel.constants
    assert {constants["BM"], constants["BN"]} == {128, 256}
    assert constants["BK"] == 64
    assert kernel.kernels[0].planned.num_threads == 256


def test_few_rows_get_a_flat_tile_and_one_warpgroup():
    kernel = compiled(16, 8192, 8192)
    assert kernel.constants["BM"] == 64
    assert kernel.kernels[0].planned.num_threads == 128


def test_of_equally_fast_tiles_the_one_that_multiplies_less_is_taken():
    """Memory is what both wait for; the larger tile would multiply rows that are not there."""
    kernel = compiled(16, 57344, 8192, BM=T.auto(128, 64))
    assert kernel.constants["BM"] == 64
    assert "bound by memory" in kernel.explain()


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100a", "sm_120a"])
def test_choice_fits_the_shared_memory_of_every_chip(target):
    planned = compiled(4096, 4096, 4096, target).kernels[0].planned
    assert 0 < planned.shared_bytes <= planned.target.shared_bytes


def test_explanation_says_what_was_chosen_and_what_came_next():
    lines = compiled(4096, 4096, 4096).explain().splitlines()
    assert lines[1].startswith("  BM=128, BN=256, BK=64: chosen of 18 candidates, estimated ")
    assert lines[1].endswith("% busy, bound by the tensor cores")
    assert lines[2].startswith("    next BM=")
    assert any(line.startswith("    not BM=256, BN=256") for line in lines)


def test_value_given_in_the_call_is_taken():
    kernel = compiled(4096, 4096, 4096, BM=64, BN=64)
    assert (kernel.constants["BM"], kernel.constants["BN"]) == (64, 64)
    assert "BK=64: chosen of 2 candidates" in kernel.explain()
    assert "chosen of" not in compiled(4096, 4096, 4096, BM=64, BN=64, BK=32).explain()


def test_threads_by_hand_are_kept():
    assert compiled(4096, 4096, 4096, threads=128).kernels[0].planned.num_threads == 128


def test_candidates_in_the_call_are_chosen_from():
    kernel = compiled(4096, 4096, 4096, BM=T.auto(64), BN=T.auto(64, 128))
    assert kernel.constants["BM"] == 64
    assert kernel.constants["BN"] in (64, 128)


def test_result_is_right_and_the_second_call_finds_the_kernel(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((48, 48)).astype(np.float16) for _ in range(2))
    c = np.full((48, 48), np.nan, np.float32)
    matmul(a, b, c)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(choose, "best_schedule", None)  # would fail if it were asked again
    matmul(a, b, c)
    with pytest.raises(TypeError):
        matmul(a[:32], b, c[:32])


def test_equal_candidates_are_one_object():
    assert T.auto(64, 128) is T.auto(64, 128)
    assert T.auto(1, 0) is not T.auto(True, False)
    assert repr(T.auto(64, "a", None)) == "T.auto(64, 'a', None)"


@tilejit
def picky(A: T.Tensor, *, n=T.auto(3, 4, 0), fail=False):
    with T.Kernel(1, threads=32):
        a = T.alloc_shared((n if not fail else -n, 32), "float32")
        T.copy(A[0, 0], a)
        T.copy(a, A[0, 0])


def test_candidate_that_cannot_be_is_passed_over_and_named():
    text = picky.compile(T.Tensor((8, 32), "float32"), n=T.auto(0, 4), target="sm_80").explain()
    assert "n=4: chosen of 2 candidates" in text
    assert "not n=0: T.alloc_shared: extent 0 is 0; a tile has at least one element." in text


def test_when_all_candidates_fail_the_first_one_says_why():
    with pytest.raises(TileError) as caught:
        picky.compile(T.Tensor((8, 32), "float32"), fail=True, target="sm_80")
    assert "extent 0 is -3; it must not be negative" in str(caught.value)
    assert "test_runtime_auto.py" in str(caught.value)


def test_what_no_candidate_fits_on_the_chip_is_said_by_the_compiler():
    sizes = {"BM": T.auto(128), "BN": T.auto(128), "BK": T.auto(512)}
    with pytest.raises(TileError, match="262144 bytes of shared memory"):
        compiled(4096, 4096, 4096, "sm_86", **sizes)


def test_choice_of_a_factory_is_made_too():
    @tilejit(out_idx=[-1])
    def factory(M, N, block=T.auto(64, 32)):
        @T.prim_func
        def main(A: T.Tensor((M, N), "float32"), B: T.Tensor((M, N), "float32")):
            with T.Kernel(T.ceildiv(M, block), threads=128) as bx:
                for i, j in T.Parallel(block, N):
                    B[bx * block + i, j] = A[bx * block + i, j] + 1

        return main

    kernel = factory(128, 64)
    assert "block=32: chosen of 2 candidates" in kernel.explain()
    a = np.ones((128, 64), np.float32)
    np.testing.assert_array_equal(kernel(a), a + 1)


@pytest.mark.parametrize(
    "candidates, kind, message",
    [
        ((), ArgumentError, "T.auto needs candidates."),
        (tuple(range(17)), ArgumentError, "T.auto takes at most 16 candidates, got 17."),
        ((1.5,), ArgumentTypeError,
         "T.auto chooses among ints, strings, booleans and None, got 1.5."),
        ((64, 64), ArgumentError, r"T.auto\(64, 64\) names a candidate twice."),
    ],
)  # fmt: skip
def test_wrong_candidates_are_refused(candidates, kind, message):
    with pytest.raises(kind, match=message):
        T.auto(*candidates)


def test_many_parameters_are_searched_two_at_a_time(monkeypatch):
    tried = []
    real = choose.best_schedule
    monkeypatch.setattr(choose, "best_schedule", lambda *a: tried.append(1) or real(*a))
    sizes = T.auto(*(32 * n for n in range(1, 9)))
    kernel = compiled(4096, 4096, 4096, BM=sizes, BN=sizes, BK=T.auto(16, 32, 64, 128))
    assert len(tried) < 200 < 8 * 8 * 4
    best = compiled(4096, 4096, 4096, BM=T.auto(128, 256), BN=T.auto(256, 128, 192))
    assert estimate(kernel) <= estimate(best) * 1.02


def estimate(kernel) -> float:
    chosen = schedule.best_schedule(kernel.kernels[0].graph, kernel.target)
    assert not isinstance(chosen, str), chosen
    return chosen.estimate.seconds


def test_kernel_that_asks_for_its_threads_has_128():
    @tilejit
    def asks(A: T.Tensor):
        with T.Kernel(1):
            tx = T.get_thread_binding()
            A[tx] = T.get_thread_extent()

    a = np.zeros(128, np.int32)
    asks(a)
    assert (a == 128).all()


def test_program_of_several_kernels_is_weighed_as_a_whole():
    @tilejit
    def twice(A: T.Tensor, B: T.Tensor, *, block=T.auto(256, 32)):
        n = A.shape[0]
        for source, target in ((A, B), (B, A)):
            with T.Kernel(T.ceildiv(n, block), threads=128) as bx:
                for i in T.Parallel(block):
                    target[bx * block + i] = source[bx * block + i] + 1

    spec = T.Tensor((4096,), "float32")
    kernel = twice.compile(spec, spec, target="sm_90a")
    assert kernel.kernels[0].explain().splitlines()[1].startswith("  block=")
    assert "chosen of" not in kernel.kernels[1].explain()
