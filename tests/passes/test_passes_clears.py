"""Where a multiply begins with its product instead of zeros in its accumulator."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.ir.node import walk
from tilejit.ops.copy import Fill
from tilejit.ops.gemm import Gemm

TARGETS = ["sm_80", "sm_90a", "sm_120a"]


@T.macro
def nothing(acc, a, b):
    pass


def made(between=nothing, value=0.0, rows=64, dtype="float16"):
    """Products of tiles, each filled into an accumulator that was just set."""

    @tilejit
    def products(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, threads=128):
        with T.Kernel(1, threads=threads):
            a = T.alloc_shared((64, 64), dtype)
            b = T.alloc_shared((64, 64), dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.copy(A, a)
            for k in T.Pipelined(B.shape[0] // 64, num_stages=2):
                T.copy(B[k * 64, 0], b)
                T.fill(acc[:rows, :], value)
                between(acc, a, b)
                T.gemm(a, b, acc)
                T.copy(acc, C[k * 64, 0])

    return products


def nodes(kernel, target, dtype="float16"):
    """The fills and the multiplies of the compiled kernel."""
    spec = T.Tensor((64, 64), dtype), T.Tensor((192, 64), dtype), T.Tensor((192, 64), "float32")
    (frame,) = kernel.compile(*spec, target=target).kernels
    body = list(walk(frame.planned.body))
    return [n for n in body if isinstance(n, Fill)], [n for n in body if isinstance(n, Gemm)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_fill_of_zeros_becomes_the_clear_of_the_multiply_after_it(target, dtype):
    fills, gemms = nodes(made(dtype=dtype), target, dtype)
    assert not fills and [g.clear for g in gemms] == [True]


@T.macro
def add(acc, a, b):
    for i, j in T.Parallel(64, 64):
        acc[i, j] += 1.0


@T.macro
def look(acc, a, b):
    for i, j in T.Parallel(64, 64):
        a[i, j] = acc[i, j].astype("float16")


@T.macro
def other(acc, a, b):
    T.fill(b, 1.0)


@pytest.mark.parametrize(
    "kernel",
    [made(value=1.0), made(rows=32), made(between=add), made(between=look)],
    ids=["ones", "a part", "changed", "looked at"],
)
def test_multiplies_after_other_fills_add(kernel):
    _, gemms = nodes(kernel, "sm_80")
    assert [g.clear for g in gemms] == [False]


def test_what_lies_between_and_does_not_touch_the_accumulator_is_no_matter():
    found, gemms = nodes(made(between=other), "sm_80")
    assert [n.dst.buffer.name for n in found] == ["b"] and [g.clear for g in gemms] == [True]


def test_an_accumulator_that_a_loop_adds_to_is_filled_before_it():
    @tilejit
    def matmul(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 64), "float16")
            b = T.alloc_shared((64, 64), "float16")
            acc = T.alloc_fragment((64, 64), "float32")
            T.copy(A, a)
            T.clear(acc)
            for k in T.Pipelined(3, num_stages=2):
                T.copy(B[k * 64, 0], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[0, 0])

    found, gemms = nodes(matmul, "sm_80")
    assert len(found) == 1 and not any(g.clear for g in gemms)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("between", [nothing, add, other], ids=["nothing", "add", "other"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_products_are_right(executor, target, between, dtype):
    if executor == "gpu":
        pytest.skip("arrays on the host")
    rng = np.random.default_rng(1)
    a, b = rng.integers(-3, 4, (64, 64)), rng.integers(-3, 4, (192, 64))
    c = np.full((192, 64), np.nan, np.float32)
    with options(target=target):
        made(between, dtype=dtype)(a.astype(dtype), b.astype(dtype), c)
    right = np.ones_like(b) if between is other else b
    want = np.concatenate([a @ right[k : k + 64] for k in (0, 64, 128)])
    np.testing.assert_array_equal(c, want + (1 if between is add else 0))


def test_warpgroups_multiply_without_zeros_in_registers():
    """One warpgroup's accumulator of 64 x 64 is 32 registers a thread; none is set to zero."""
    spec = T.Tensor((64, 64), "float16"), T.Tensor((192, 64), "float16")
    kernel = made().compile(*spec, T.Tensor((192, 64), "float32"), target="sm_90a")
    assert "wgmma.mma_async" in kernel.ptx
    assert "fill" not in kernel.source
    assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0
