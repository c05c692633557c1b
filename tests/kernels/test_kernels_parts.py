"""Vectors that a tensor's end or a condition cuts: the rest is accessed whole, nothing beyond it is
touched, and what is left out is zero or as it was."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit

DTYPES = ["int8", "float16", ml_dtypes.bfloat16, "float32", "float64"]
TARGETS = ["sm_80", "sm_90a"]
BLOCK = 1024


@tilejit
def copy_if(
    X: T.Tensor, Y: T.Tensor, low: T.int32, high: T.int32, *, threads=64, through_shared=False
):
    """Y[n] = X[n] for n from `low` on and before `high`."""
    with T.Kernel(T.ceildiv(X.shape[0], BLOCK), threads=threads) as block:
        if through_shared:
            tile = T.alloc_shared((BLOCK,), X.dtype)
            T.fill(tile, 3)
            for i in T.Parallel(BLOCK):
                n = block * BLOCK + i
                if (low <= n) & (n < high):
                    tile[i] = X[n]
            for i in T.Parallel(BLOCK):
                n = block * BLOCK + i
                if not ((n < low) | (n >= high)):
                    Y[n] = tile[i]
        else:
            for i in T.Parallel(BLOCK):
                n = block * BLOCK + i
                if n >= low:
                    if n < high:
                        Y[n] = X[n]


@tilejit
def add_to(X: T.Tensor, Y: T.Tensor, Z: T.Tensor, skipped: T.int32, *, threads=64):
    """Z += X + Y, without the first elements of Y; Z is read and written."""
    with T.Kernel(T.ceildiv(X.shape[0], BLOCK), threads=threads) as block:
        for i in T.Parallel(BLOCK):
            n = block * BLOCK + i
            Z[n] = Z[n] + X[n] + T.if_then_else(n >= skipped, Y[n], 0)


@tilejit
def windows(X: T.Tensor, Y: T.Tensor, *, part, threads=32):
    """Rows of any width as one line, in whole vectors; beyond a row 7 is read."""
    M, N = X.shape
    x, y = T.make_tensor(X.data, (M * N,), X.dtype), T.make_tensor(Y.data, (M * N,), Y.dtype)
    with T.Kernel(M, threads=threads) as row:
        tile = T.alloc_fragment((part,), X.dtype)
        begin = row * N // 8 * 8

        def is_mine(j):
            c = j - row * N % 8
            return (c >= 0) & (c < N)

        for j in T.Parallel(part):
            tile[j] = T.if_then_else(is_mine(j), x[begin + j], 7)
        for j in T.Parallel(part):
            if is_mine(j):
                y[begin + j] = tile[j] + 1


def guarded(count, dtype, fill):
    """An array amid others that must stay, which begins at a multiple of 16 bytes."""
    whole = np.full(count + 256, fill, dtype)
    start = next(n for n in range(64, 192) if whole[n:].ctypes.data % 16 == 0)
    return whole, whole[start : start + count], start


@pytest.mark.parametrize("count", [1, 7, 1001, 1023, 1025, 3 * BLOCK - 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_cut_vectors_are_copied_and_nothing_else(executor, target, dtype, count):
    _, x, _ = guarded(count, dtype, 1)
    x[:] = np.arange(count) % 100
    with options(target=target if executor != "gpu" else None):
        for low, high in ((0, count), (3, count - 2), (count // 2, count // 2 + 1), (-5, 2**31 - 1),
                          (count - 1, 3), (-(2**31), count // 3)):  # fmt: skip
            for through_shared in (False, True):
                whole, y, start = guarded(count, dtype, 99)
                copy_if(x, y, low, high, through_shared=through_shared)
                n = np.arange(count)
                wanted = whole.copy()
                wanted[:] = 99
                kept = np.where((n >= low) & (n < high), x, 99)
                wanted[start : start + count] = kept.astype(dtype)
                assert whole.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("count", [5, 1001, 2047])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cut_vectors_that_are_read_and_written(executor, dtype, count):
    rng = np.random.default_rng(count)
    x, y, z = (rng.integers(0, 20, count).astype(dtype) for _ in range(3))
    for skipped in (0, 3, count - 1):
        result = z.copy()
        add_to(x, y, result, skipped)
        wanted = z + x + np.where(np.arange(count) >= skipped, y, 0).astype(dtype)
        assert result.tobytes() == wanted.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(1, 5), (9, 13), (17, 250), (8, 509), (5, 1)])
def test_rows_of_any_width_in_whole_vectors(executor, dtype, M, N):
    x = (np.arange(M * N) % 90).reshape(M, N).astype(dtype)
    y = np.full_like(x, 99)
    windows(x, y, part=(N + 14) // 8 * 8)
    assert y.tobytes() == (x + np.ones((), dtype)).tobytes()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("target", TARGETS)
def test_odd_lengths_have_wide_accesses(target, dtype):
    odd = T.Tensor((100_003,), dtype)
    kind = "b64" if dtype == "float64" else "b32"
    for kernel in (
        copy_if.compile(odd, odd, 3, 70, target=target),
        add_to.compile(odd, odd, odd, 3, target=target),
    ):
        (frame,) = kernel.kernels
        count = 2 if dtype == "float64" else 4
        assert f"v{count}.{kind}" in frame.ptx.split("bra DONE")[0]
        resources = frame.resources
        assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)


def test_lengths_of_run_time_have_wide_accesses():
    n = T.dynamic("n")

    @tilejit
    def double(X: T.Tensor((n,), "float32"), Y: T.Tensor((n,), "float32")):
        with T.Kernel(T.ceildiv(n, BLOCK), threads=64) as block:
            for i in T.Parallel(BLOCK):
                Y[block * BLOCK + i] = 2 * X[block * BLOCK + i]

    assert "ld.global.nc.v4.b32" in double.compile(target="sm_90a").kernels[0].ptx
    for count in (1, 1023, 1025):
        x = np.arange(count, dtype=np.float32)
        y = np.full_like(x, np.nan)
        double(x, y)
        assert (y == 2 * x).all()


@tilejit
def every_other(X: T.Tensor, Y: T.Tensor, *, threads=32):
    """Conditions that leave no range, or of values that may wrap."""
    with T.Kernel(1, threads=threads):
        for i in T.Parallel(256):
            if i % 2 == 0:
                Y[i] = X[i]
            if (i < 100) ^ (i < 50):
                Y[i] = X[i] + 1
            if T.cast(i, "int8") < 5:
                Y[i] = X[i] + 2
            if (2 * i > 301) | (X[i] == 3):
                Y[i] = X[i] + 4


def test_conditions_that_leave_no_range(executor):
    x = np.arange(256, dtype=np.float32)
    y = np.full_like(x, -1)
    every_other(x, y)
    i = np.arange(256)
    wanted = np.where(i % 2 == 0, x, -1)
    wanted = np.where((i < 100) ^ (i < 50), x + 1, wanted)
    wanted = np.where(i.astype(np.int8) < 5, x + 2, wanted)
    wanted = np.where((2 * i > 301) | (x == 3), x + 4, wanted)
    assert (y == wanted).all()


@tilejit
def below(X: T.Tensor, Y: T.Tensor, limits: T.Tensor, *, kind, threads=32):
    """Conditions between numbers of a dtype, whose differences it does not hold."""
    with T.Kernel(1, threads=threads):
        for i in T.Parallel(X.shape[0]):
            if T.cast(i, kind) < limits[0]:
                Y[i] = X[i]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int64"])
def test_limits_of_any_dtype(executor, kind):
    info = np.iinfo(kind)
    for limit in {0, 3, 100, int(info.max), int(info.max) - 3, int(info.min), int(info.min) + 4}:
        x = np.arange(128, dtype=np.int32)
        y = np.full_like(x, -7)
        below(x, y, np.array([limit], kind), kind=kind)
        assert (y == np.where(x < limit, x, -7)).all(), limit


@tilejit
def count_up(Y: T.Tensor, n: T.int32, *, threads=32):
    with T.Kernel(1, threads=threads):
        counts = T.alloc_fragment((64,), "int32")
        T.clear(counts)
        for i in T.Parallel(64):
            if i < n:
                while counts[i] < 5:
                    counts[i] = counts[i] + 1
        T.copy(counts, Y)


def test_loops_in_branches_of_some_elements_end(executor):
    y = np.full(64, -1, np.int32)
    count_up(y, 5)
    assert (y == np.where(np.arange(64) < 5, 5, 0)).all()


@tilejit
def repeat(X: T.Tensor, Y: T.Tensor, n: T.int32, *, threads=32):
    """The same elements are read by several vectors, under other conditions."""
    with T.Kernel(1, threads=threads):
        thread = T.get_thread_binding()
        for k in T.vectorized(12):
            if (k % 4) * (1 - k // 8) < n:
                Y[thread * 12 + k] = X[thread * 4 + k % 4]


def test_what_is_read_twice_under_other_conditions(executor):
    x = np.arange(1, 129, dtype=np.float32)
    for n in range(1, 5):
        y = np.zeros(384, np.float32)
        repeat(x, y, n)
        k = np.arange(384) % 12
        kept = (k % 4) * (1 - k // 8) < n
        assert (y == np.where(kept, x[np.arange(384) // 12 * 4 + k % 4], 0)).all()


@tilejit
def between(X: T.Tensor, Y: T.Tensor, low: T.int32, high: T.int32, *, threads=32):
    """Vectors of two accesses, and of bytes that begin amid words."""
    with T.Kernel(1, threads=threads):
        thread = T.get_thread_binding()
        tile = T.alloc_shared((32 * 8 + 8,), X.dtype)
        for k in T.vectorized(8):
            if k >= low:
                if k < high:
                    Y[thread * 8 + k] = X[thread * 8 + k]
        for i in T.Parallel(256):
            tile[i + 2] = 5
        for i in T.Parallel(256):
            if i < high:
                tile[i + 2] = X[i]
        for i in T.Parallel(256):
            if i >= low:
                Y[256 + i] = tile[i + 2]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float16", "float32", "float64"])
def test_limits_far_from_any_vector(executor, dtype):
    far = [-(2**31), -(2**31) + 3, 2**31 - 1, 2**31 - 4, 3, 7]
    x = (np.arange(256) % 100).astype(dtype)
    between.compile(x, np.zeros(512, dtype), 1, 2, target="sm_90a").kernels[0].cubin  # assembles
    for low in far:
        for high in far:
            y = np.full(512, 77, dtype)
            between(x, y, low, high)
            k, i = np.arange(256) % 8, np.arange(256)
            direct = np.where((k >= low) & (k < high), x, 77)
            through = np.where(i >= low, np.where(i < high, x, 5), 77)
            assert y.tobytes() == np.concatenate([direct, through]).astype(dtype).tobytes()
