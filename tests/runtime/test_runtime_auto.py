"""Parameters left to the cost model: when they are chosen, what is chosen, and what goes wrong."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

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
    tB=False,
):  # fmt: skip
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK) if tB else (BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[(bx * BN, k * BK) if tB else (k * BK, bx * BN)], b)
            T.gemm(a, b, acc, transpose_B=tB)
        T.copy(acc, C[by * BM, bx * BN])


def specs(M, N, K, tB=False):
    shapes = (M, K), (N, K) if tB else (K, N), (M, N)
    return tuple(T.Tensor(shape, "bfloat16") for shape in shapes)


def compiled(M, N, K, target="sm_90a", **constants):
    tensors = specs(M, N, K, constants.get("tB", False))
    return matmul.compile(*tensors, target=target, **constants)


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


WIDTHS = {
    "BM": T.auto(128), "BN": T.auto(128, 256, 64, 192, step=8), "BK": T.auto(64), "tB": True
}  # fmt: skip


def weighed_grids(monkeypatch) -> list[tuple[int, ...]]:
    """The grids of what the cost model is asked about from now on, in that order."""
    seen: list[tuple[int, ...]] = []
    real = choose.best_schedule

    def best_schedule(kernel, target):
        seen.append(tuple(e.value for e in kernel.grid))
        return real(kernel, target)

    monkeypatch.setattr(choose, "best_schedule", best_schedule)
    return seen


def test_value_between_candidates_is_taken_where_its_blocks_fill_the_chip():
    kernel = compiled(1536, 1536, 1536, **WIDTHS)
    blocks = 12 * -(-1536 // kernel.constants["BN"])
    assert kernel.constants["BN"] == 144 and blocks == 132 == kernel.target.chip.multiprocessors
    named = compiled(1536, 1536, 1536, **{**WIDTHS, "BN": T.auto(128, 256, 64, 192)})
    assert estimate(kernel) < choose.BETWEEN_WORTH * estimate(named)
    tried = int(re.search(r"BN=144, BK=64: chosen of (\d+) candidates", kernel.explain())[1])
    assert 4 < tried <= 4 + 14


def test_nothing_between_candidates_is_weighed_where_their_blocks_fill_the_chip(monkeypatch):
    seen = weighed_grids(monkeypatch)
    assert compiled(4096, 4096, 4096, **WIDTHS).constants["BN"] == 256
    assert len(seen) == 4


def test_values_between_are_multiples_next_to_the_best_candidate_with_fewer_blocks_each():
    search = searched(1536, 1536, 1536, **WIDTHS)
    between = [v[1] for v in search.found if v[1] not in (64, 128, 192, 256)]
    assert between and between == sorted(between)
    assert all(n % 8 == 0 and 128 < n < 256 for n in between)
    blocks = [-(-1536 // n) for n in between]
    assert all(a > b for a, b in itertools.pairwise(blocks))
    assert not {-(-1536 // 128), -(-1536 // 192)} & set(blocks)


@pytest.mark.parametrize("best, others", [(64, (128,)), (320, (256,))])
def test_nothing_beyond_the_candidates_is_tried(best, others, monkeypatch):
    real = choose.best_schedule
    width = {"BM": T.auto(128), "BN": T.auto(best, *others, step=16), "BK": T.auto(64)}

    def best_schedule(kernel, target):  # as if the first were much the best, but no chip full
        found = real(kernel, target)
        scale = 1e-3 if kernel.grid[0].value == -(-3000 // best) else 1
        return replace(
            found, estimate=replace(found.estimate, seconds=found.estimate.seconds * scale)
        )

    monkeypatch.setattr(choose, "best_schedule", best_schedule)
    monkeypatch.setattr(choose, "BETWEEN_WORTH", 1e6)
    tried = {v[1] for v in searched(3000, 3000, 3000, **width).grids}
    assert tried >= {best, *others} and min(tried) == min(best, *others)
    assert max(tried) == max(best, *others)
    assert len(tried) == 2 + abs(best - others[0]) // 16 - 1


def searched(M, N, K, **constants) -> choose._Search:
    """The search of a call's values, after it."""
    found = []
    real = choose._Search.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose._Search, "run", lambda s: (found.append(s), real(s))[1])
        matmul_of(M, N, K, **constants)
    (search,) = found
    return search


def matmul_of(M, N, K, **constants):
    fresh = tilejit(matmul.__wrapped__)  # with a cache of its own
    tensors = specs(M, N, K, constants.get("tB", False))
    return fresh.compile(*tensors, target="sm_90a", **constants)


def test_value_between_has_to_be_worth_more_than_an_estimate_is_wrong_by(monkeypatch):
    monkeypatch.setattr(choose, "BETWEEN_WORTH", 0.5)
    assert searched(1536, 1536, 1536, **WIDTHS).run().values["BN"] == 192


def test_two_parameters_may_have_steps():
    sizes = {"BM": T.auto(128, 64, step=64), "BN": T.auto(128, 192, step=8), "BK": T.auto(64)}
    assert matmul_of(1536, 1536, 1536, **sizes, tB=True).constants["BN"] == 144


def test_result_of_a_value_between_is_right(monkeypatch):
    monkeypatch.setattr(choose, "BETWEEN_WORTH", 1e6)  # taken in any case
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float16) for s in ((50, 40), (40, 88)))
    c = np.full((50, 88), np.nan, np.float32)
    fresh = tilejit(matmul.__wrapped__)
    fresh(a, b, c, BM=32, BN=T.auto(32, 64, step=8), BK=16)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-3, atol=1e-3)
    specs = [T.Tensor(x.shape, str(x.dtype)) for x in (a, b, c)]
    wide = fresh.compile(*specs, BM=32, BN=T.auto(32, 64, step=8), BK=16).constants["BN"]
    assert wide in (40, 48, 56)


def test_value_between_that_cannot_be_is_passed_over(monkeypatch):
    @tilejit
    def rows(A: T.Tensor, *, n=T.auto(4, 12, step=2)):
        if n == 6:
            T.alloc_shared((1,), "float32")  # outside of a kernel
        with T.Kernel(T.ceildiv(A.shape[0], n), threads=32) as b:
            for i in T.Parallel(n):
                A[b * n + i] = A[b * n + i] + 1

    monkeypatch.setattr(choose, "BETWEEN_WORTH", 1e6)
    text = rows.compile(T.Tensor((100,), "float32"), target="sm_80").explain()
    assert "not n=6: T.alloc_shared" in text
    assert re.search(r"  n=(8|10): chosen of \d candidates", text)


def test_step_is_part_of_what_is_asked():
    assert T.auto(64, 128, step=8) is T.auto(64, 128, step=8)
    assert T.auto(64, 128, step=8) is not T.auto(64, 128)
    assert T.auto(64, 128, step=8) != T.auto(64, 128, step=16)
    assert repr(T.auto(64, 128, step=8)) == "T.auto(64, 128, step=8)"


@pytest.mark.parametrize(
    "candidates, step, kind, message",
    [
        ((), 8, ArgumentError, "T.auto needs candidates."),
        ((64,), 0, ArgumentError, "T.auto: step is 0; it must be positive."),
        ((64,), -8, ArgumentError, "T.auto: step is -8; it must be positive."),
        ((64,), 8.0, ArgumentTypeError, "T.auto: step is an int, got 8.0."),
        ((64,), True, ArgumentTypeError, "T.auto: step is an int, got True."),
        ((64, "a"), 8, ArgumentTypeError, "T.auto: step is for ints, and 'a' is none."),
        ((64, None), 8, ArgumentTypeError, "T.auto: step is for ints, and None is none."),
        ((64, True), 8, ArgumentTypeError, "T.auto: step is for ints, and True is none."),
    ],
)  # fmt: skip
def test_wrong_steps_are_refused(candidates, step, kind, message):
    with pytest.raises(kind, match=message):
        T.auto(*candidates, step=step)


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


def test_columns_in_narrow_panels_cost_what_their_rows_take():
    """A tile of 144 columns stored K x N comes in rows of 32 bytes."""
    sizes = {**WIDTHS, "tB": False}
    assert matmul_of(1536, 1536, 1536, **sizes).constants["BN"] % 64 == 0


@tilejit
def fussy(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BN=T.auto(128, 64, 256, step=8), kind):
    """A @ B.T in tiles whose width it restricts itself."""
    if BN % 64:
        if kind == "assert":
            raise AssertionError("BN is 64, 128 or 256")
        if kind == "value":
            raise ValueError(BN)
        1 // 0
    with T.Kernel(T.ceildiv(C.shape[1], BN), T.ceildiv(C.shape[0], 128)) as (bx, by):
        a = T.alloc_shared((128, 64), A.dtype)
        b = T.alloc_shared((BN, 64), A.dtype)
        acc = T.alloc_fragment((128, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(A.shape[1], 64)):
            T.copy(A[by * 128, k * 64], a)
            T.copy(B[bx * BN, k * 64], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.copy(acc, C[by * 128, bx * BN])


@pytest.mark.parametrize("kind", ["assert", "value", "division"])
def test_values_between_for_which_the_function_raises_are_passed_over(kind):
    tensors = specs(1536, 1536, 1536, True)
    kernel = fussy.compile(*tensors, target="sm_90a", kind=kind)
    assert kernel.constants["BN"] % 64 == 0
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError)):
        fussy.compile(*tensors, target="sm_90a", kind=kind, BN=T.auto(136, 64))  # named, it is said


def test_steps_that_are_too_many_are_refused():
    with pytest.raises(ArgumentError, match="at most 256 are compared"):
        T.auto(64, 100_000, step=1)
