"""Atoms for several numbers of threads: what is found once is what each of them would find."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tilejit.language as T
from tilejit import target as chips
from tilejit import tilejit
from tilejit.ir.node import walk
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.passes import cost, schedule, select

TARGETS = ["sm_90a", "sm_80"]


@tilejit
def product(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM, BN, BK=64, transpose_B=False):
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM)) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK) if transpose_B else (BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[(bx * BN, k * BK) if transpose_B else (k * BK, bx * BN)], b)
            T.gemm(a, b, acc, transpose_B=transpose_B)
        T.copy(acc, C[by * BM, bx * BN])


def traced(BM, BN, target, dtype="bfloat16", transpose_B=False, K=1024):
    shapes = (1024, K), (1024, K) if transpose_B else (K, 1024), (1024, 1024)
    specs = [T.Tensor(shape, dtype) for shape in shapes]
    sizes = {"BM": BM, "BN": BN, "transpose_B": transpose_B}
    call = product._signature.bind_specs(tuple(specs), sizes)
    made = product._made(call, chips.as_target(target))  # not compiled: some do not fit
    return made.kernels[0].graph


def atoms(kernel) -> list[object]:
    return [n.atom for n in walk(kernel.body) if isinstance(n, Copy | Gemm)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("BM, BN", [(64, 32), (128, 192), (192, 96), (256, 128), (80, 40)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_selection_finds_for_each_number_of_threads_what_it_would_alone(BM, BN, dtype, target):
    chip = chips.as_target(target)
    for transpose_B in (True, False):
        kernel = traced(BM, BN, target, dtype, transpose_B)
        selection = select.Selection(replace(kernel, is_free=False), chip)
        for threads in (384, 128, 256, 128):
            alone = replace(kernel, threads=(threads, 1, 1), is_free=False)
            expected = select.select_atoms(alone, chip)
            found = selection.of((threads, 1, 1))
            assert found.threads == (threads, 1, 1)
            assert [v.high.value for v in found.thread_vars] == [threads - 1, 0, 0]
            assert atoms(found) == atoms(expected)
            assert found.notes == expected.notes
            assert cost.plan(found) == cost.plan(expected)


@pytest.mark.parametrize("target", TARGETS)
def test_threads_that_cannot_hold_the_fragments_are_those_that_no_plan_allows(target):
    chip = chips.as_target(target)
    held = set()
    for BM, BN in ((64, 64), (128, 128), (128, 256), (256, 256), (256, 320)):
        kernel = traced(BM, BN, target)
        for threads in schedule.FREE_THREADS:
            alone = replace(kernel, threads=(threads, 1, 1), is_free=False)
            can_hold = cost.holds_fragments(kernel, threads)
            held.add(can_hold)
            planned = cost.plan(select.select_atoms(alone, chip))
            assert can_hold or "registers a thread are more than it can have" in planned
    assert held == {True, False}


def test_reason_of_a_kernel_that_never_fits_is_that_of_the_first_number_of_threads():
    chip = chips.as_target("sm_90a")
    kernel = traced(256, 512, "sm_90a")
    first = replace(kernel, threads=(schedule.FREE_THREADS[0], 1, 1), is_free=False)
    expected = cost.plan(select.select_atoms(first, chip))
    assert "registers a thread are more than it can have" in expected
    assert schedule.best_schedule(kernel, chip) == expected
