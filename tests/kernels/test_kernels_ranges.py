"""Arithmetic of kernels at the ends of a dtype's range, on every executor."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@tilejit
def divide(X: T.Tensor, Y: T.Tensor, Q: T.Tensor, R: T.Tensor, TQ: T.Tensor, TR: T.Tensor):
    with T.Kernel(1, threads=64):
        for i in T.Parallel(X.shape[0]):
            Q[i] = X[i] // Y[i]
            R[i] = X[i] % Y[i]
            TQ[i] = T.truncdiv(X[i], Y[i])
            TR[i] = T.truncmod(X[i], Y[i])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_division_rounds_as_asked_also_at_the_ends_of_the_range(run, rng, dtype):
    numpy, ends = np.dtype(dtype), np.iinfo(dtype)
    x = rng.integers(ends.min, ends.max, 60, dtype=numpy, endpoint=True)
    y = rng.integers(1, 9, 60).astype(numpy)
    if ends.min:
        y[::2] = -y[::2]
    x = np.concatenate([x, np.array([ends.min, ends.max, ends.min, 0], numpy)])
    y = np.concatenate([y, [3, 2, 7, 5]]).astype(numpy)
    q, r, tq, tr = run(divide, x, y, out=[((64,), numpy)] * 4)
    assert (q == x // y).all() and (r == x % y).all()
    for a, b, quotient, rest in zip(x.tolist(), y.tolist(), tq.tolist(), tr.tolist(), strict=True):
        assert rest == (abs(a) % abs(b)) * (-1 if a < 0 else 1), (a, b)
        size = (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)
        assert quotient == size, (a, b)


def test_truncated_division_of_an_extent_sizes_the_grid(run, rng):
    n = T.dynamic("n")

    @tilejit
    def kernel(A: T.Tensor((n,), "int32"), C: T.Tensor((n,), "int32")):
        with T.Kernel(T.truncdiv(n + 31, 32) + T.truncmod(n, 2), threads=32) as bx:
            for i in T.Parallel(32):
                C[bx * 32 + i] = T.truncdiv(A[bx * 32 + i], -3)

    a = rng.integers(-99, 99, 71).astype(np.int32)
    c = run(kernel, a, out=[((71,), np.int32)])
    assert (c == np.trunc(a / -3).astype(np.int32)).all()


def test_constants_fold_as_the_device_divides(run):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=1):
            for k in T.unroll(-3, 4):
                C[k + 3] = T.truncdiv(k * 5, 2) * 100 + T.truncmod(k * 5, 2)

    c = run(kernel, out=[((7,), np.int32)])
    want = [int(k * 5 / 2) * 100 + (abs(k * 5) % 2) * (-1 if k < 0 else 1) for k in range(-3, 4)]
    assert c.tolist() == want


def test_sigmoid_of_float16_does_not_overflow_on_the_way(run):
    @tilejit
    def kernel(X: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(X.shape[0]):
                C[i] = T.sigmoid(X[i])

    x = np.linspace(-16, 16, 65).astype(np.float16)
    c = run(kernel, x, out=[((65,), np.float16)])
    want = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float16)
    assert np.abs(c.view(np.int16).astype(int) - want.view(np.int16).astype(int)).max() <= 1


@tilejit
def floats(X: T.Tensor, Y: T.Tensor, *, first):
    """Y = X + the float of each column's number, counted from `first`."""
    with T.Kernel(X.shape[0], threads=32) as row:
        for j in T.Parallel(X.shape[1]):
            Y[row, j] = X[row, j] + T.cast(first - row + j, "float32")


@pytest.mark.parametrize("first", [0, -100, 2**24 - 20, 2**24 + 1, -(2**24) - 1, 2**31 - 400])
def test_floats_of_neighbouring_indexes_are_rounded_as_each_alone(run, first):
    x = np.zeros((3, 256), np.float32)
    numbers = first - np.arange(3)[:, None] + np.arange(256)
    y = run(floats, x, out=[(x.shape, np.float32)], first=first)
    assert (y == numbers.astype(np.float32)).all()


def test_floats_of_neighbouring_indexes_share_a_conversion():
    shape = T.Tensor((3, 256), "float32")
    assert floats.compile(shape, shape, target="sm_90a", first=5).ptx.count("cvt.rn.f32.s32") == 1
    beyond = floats.compile(shape, shape, target="sm_90a", first=2**24)
    assert beyond.ptx.count("cvt.rn.f32.s32") > 1
