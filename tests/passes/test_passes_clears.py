"""Where a multiply begins with its product instead of zeros in its accumulator."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.ir.expr import is_const
from tilejit.ir.node import If, walk
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


# ---- zeros in one branch ------------------------------------------------------------------------

KEYS = 320


def masked(mask_first=True, flipped=False, dtype="float16", atom="float32"):
    """Row sums of exp of masked products: the mask stands in the accumulator before the product is
    added, as 0 and minus infinity."""

    @tilejit
    def sums(A: T.Tensor, B: T.Tensor, S: T.Tensor, *, threads=128):
        with T.Kernel(T.ceildiv(A.shape[0], 64), threads=threads) as block:
            a, b = T.alloc_shared((64, 64), dtype), T.alloc_shared((64, 64), dtype)
            acc = T.alloc_fragment((64, 64), atom)
            total = T.alloc_fragment((64,), "float32")
            T.copy(A[block * 64, 0], a)
            T.clear(total)
            for k in T.Pipelined(T.ceildiv(B.shape[0], 64), num_stages=2):
                T.copy(B[k * 64, 0], b)
                if mask_first:
                    for i, j in T.Parallel(64, 64):
                        seen = block * 64 + i >= k * 64 + j
                        acc[i, j] = T.if_then_else(seen, 0, -T.infinity(atom))
                elif flipped:
                    if k % 2 == 1:
                        T.fill(acc, -1.0)
                    else:
                        T.clear(acc)
                else:
                    if k % 2 == 0:
                        T.clear(acc)
                    else:
                        T.fill(acc, -1.0)
                T.gemm(a, b, acc, transpose_B=True)
                for i, j in T.Parallel(64, 64):  # what stays behind are infinities and NaNs
                    acc[i, j] = T.exp2(acc[i, j])
                T.reduce_sum(acc, total, dim=1, clear=False)
                for i, j in T.Parallel(64, 64):
                    acc[i, j] = T.log2(acc[i, j] - 1.0) * T.infinity(atom)
            T.copy(total, S[block * 64])

    return sums


def begun(kernel, target="sm_90a"):
    spec = T.Tensor((KEYS, 64), "float16"), T.Tensor((KEYS, 64), "float16")
    compiled = kernel.compile(*spec, T.Tensor((KEYS,), "float32"), target=target)
    (frame,) = compiled.kernels
    body = list(walk(frame.planned.body))
    return [n.begins for n in body if isinstance(n, Gemm)], body, compiled


@pytest.mark.parametrize("kernel", [masked(), masked(False), masked(False, True)])
def test_zeros_of_one_branch_are_left_out(kernel):
    begins, body, compiled = begun(kernel)
    assert begins and all(e is not None for e in begins)
    branches = [n for n in body if isinstance(n, If) and not (n.then and n.orelse)]
    assert any(n.then or n.orelse for n in branches)
    assert not any(isinstance(n, Fill) and is_const(n.value, 0) and n.dst.buffer.rank == 2
                   for n in body)  # fmt: skip
    assert "setp.ne.u32 \tfirst" in compiled.ptx or "setp.ne.u32 first" in compiled.ptx


@pytest.mark.parametrize("target", ["sm_80", "sm_120a"])
def test_other_multiplies_take_the_zeros(target):
    begins, _, _ = begun(masked(), target)
    assert begins == [None]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options_",
    [{}, {"mask_first": False}, {"mask_first": False, "flipped": True}, {"atom": "float16"}],
)
def test_masked_sums_are_right(executor, target, options_):
    if executor == "gpu":
        pytest.skip("arrays on the host")
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-1, 2, (KEYS, 64)).astype(np.float16) / 8 for _ in range(2))
    s = np.full(KEYS, np.nan, np.float32)
    with options(target=target):
        masked(**options_)(a, b, s)
    scores = a.astype(np.float64) @ b.astype(np.float64).T
    if options_.get("mask_first", True):
        scores = np.where(np.arange(KEYS)[:, None] >= np.arange(KEYS), scores, -np.inf)
    else:
        scores -= np.arange(KEYS) // 64 % 2
    tolerance = 2e-3 if "atom" in options_ else 1e-5
    np.testing.assert_allclose(s, np.exp2(scores).sum(1), rtol=tolerance)
