"""Which accumulators want whole rows in a warp, where the user does not say how warps share one."""

from __future__ import annotations

import pytest

import tilejit.language as T
from tilejit import tilejit

POLICY = T.GemmWarpPolicy


@tilejit
def program(A: T.Tensor, C: T.Tensor, *, use="", policy=POLICY.Square):
    with T.Kernel(1, threads=128):
        a, b = T.alloc_shared((64, 64), "float16"), T.alloc_shared((64, 64), "float16")
        acc, other = (T.alloc_fragment((64, 64), "float32") for _ in range(2))
        half, total = T.alloc_fragment((64, 64), "float16"), T.alloc_fragment((64,), "float32")
        T.clear(acc)
        T.clear(other)
        T.clear(total)
        T.copy(A[0, 0], a)
        for k in T.Pipelined(4, num_stages=2):
            T.copy(A[k * 64, 0], b)
            T.gemm(a, b, acc, policy=policy)
            if use == "rows":
                T.reduce_max(acc, total, dim=1, clear=False)
            elif use == "rows of what follows":
                for i, j in T.Parallel(64, 64):
                    other[i, j] = T.exp2(acc[i, j])
                T.reduce_sum(other, total, dim=1, clear=False)
            elif use == "columns":
                T.reduce_max(acc, total, dim=0, clear=False)
            elif use == "operand":
                T.copy(acc, half)
                T.gemm(half, b, other)
        if use == "rows later":
            T.reduce_max(acc, total, dim=1, clear=False)
        for i, j in T.Parallel(64, 64):
            acc[i, j] += total[i] + other[i, j]
        T.copy(acc, C)


def warps(**constants):
    """How warps share each accumulator."""
    specs = T.Tensor((256, 64), "float16"), T.Tensor((64, 64), "float32")
    text = program.compile(*specs, target="sm_80", **constants).explain()
    return [line.split(" on ")[1].split()[0] for line in text.splitlines() if "gemm " in line]


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        ("", ["2x2"]),
        ("columns", ["2x2"]),
        ("rows later", ["2x2"]),  # once for a whole loop
        ("rows", ["4x1"]),
        ("rows of what follows", ["4x1"]),
        ("operand", ["4x1", "4x1"]),
    ],
)
def test_rows_that_each_round_needs_whole_stay_in_a_warp(use, wanted):
    assert warps(use=use) == wanted


def test_other_policies_hold():
    assert warps(use="rows", policy=POLICY.FullCol) == ["1x4"]
