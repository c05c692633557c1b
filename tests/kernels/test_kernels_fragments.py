"""Fragments that loops index in other ways than the plain one, on every executor."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


def test_fragment_beside_one_that_goes_through_shared_memory_is_found(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=64):
            f = T.alloc_fragment((8, 32), "float32")
            row = T.alloc_fragment((32,), "float32")
            T.copy(A, f)
            T.clear(row)
            for r in T.serial(8):
                for j in T.Parallel(32):
                    row[j] = row[j] + f[r, j]
            for i, j in T.Parallel(8, 32):
                C[i, j] = f[i, j] - f[i, 0] + row[j]
            T.copy(row, D)

    a = rng.integers(-9, 9, (8, 32)).astype(np.float32)
    c, d = run(kernel, a, out=[((8, 32), np.float32), ((32,), np.float32)])
    assert (d == a.sum(0)).all()
    assert (c == a - a[:, :1] + a.sum(0)).all()


@pytest.mark.parametrize("threads", [32, 96, 33])
def test_fragment_read_at_loop_variables_and_constants_is_right(run, rng, threads):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, *, threads):
        with T.Kernel(1, threads=threads):
            f = T.alloc_fragment((4, 16), "float32")
            m = T.alloc_fragment((4,), "float32")
            T.copy(A, f)
            T.fill(m, -T.infinity("float32"))
            for i in T.Parallel(4):
                for j in T.serial(16):
                    m[i] = T.max(m[i], f[i, j])
            for i, j in T.Parallel(4, 16):
                C[i, j] = f[i, j] - m[i] + f[3, 2]

    a = rng.standard_normal((4, 16)).astype(np.float32)
    c = run(kernel, a, out=[((4, 16), np.float32)], threads=threads)
    assert (c == a - a.max(1, keepdims=True) + a[3, 2]).all()


def test_fragment_split_over_three_dimensions_is_right(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=64):
            f = T.alloc_fragment((8, 20), "float32")
            g = T.alloc_fragment((2, 4, 20), "float32")
            one = T.alloc_fragment((1,), "float32")
            T.copy(A, f)
            T.clear(one)
            for p, q, j in T.Parallel(2, 4, 20):
                g[p, q, j] = f[p * 4 + q, j] * 2
            for q in T.serial(4):
                one[0] += A[q, 0]
            for p, q, j in T.Parallel(2, 4, 20):
                g[p, q, j] += one[0]
            T.copy(g, C)
            T.copy(g[1, 2, :], D)

    a = rng.integers(-9, 9, (8, 20)).astype(np.float32)
    c, d = run(kernel, a, out=[((2, 4, 20), np.float32), ((20,), np.float32)])
    want = (2 * a + a[:4, 0].sum()).reshape(2, 4, 20)
    assert (c == want).all() and (d == want[1, 2]).all()


DTYPES = ["float32", "float16", "bfloat16", "float64", "int8", "int64", "bool", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_fragments_and_shared_tiles_are_copied_both_ways(run, rng, dtype):
    @tilejit
    def kernel(A: T.Tensor, X: T.Tensor, Y: T.Tensor, Z: T.Tensor):
        with T.Kernel(1, threads=96):
            s = T.alloc_shared((3, 12, 20), A.dtype)
            t = T.alloc_shared((20, 12), A.dtype)
            f = T.alloc_fragment((12, 20), A.dtype)
            g = T.alloc_fragment((4, 20), A.dtype)
            row = T.alloc_fragment((20,), A.dtype)
            T.clear(s)
            T.clear(t)
            T.copy(A[1, 1], s[1, :, :])
            T.copy(s[1, 0:12, 0:20], f)
            T.copy(f[4:8, :], g)
            T.copy(g, s[2, 3:7, :])
            T.copy(f[11, :], row)
            T.copy(row, s[0, 5, :])
            T.copy(s[1, 2:6, 3:13], t[10:14, 1:11])
            T.copy(t[10:14, 1:11], s[0, 8:12, 10:20])
            T.copy(s, X)
            T.copy(t, Y)
            T.copy(f[2:12, 5:17], Z)

    numpy = T.dtype(dtype).numpy
    a = (rng.standard_normal((15, 23)) * 5).astype(numpy)
    x, y, z = run(kernel, a, out=[((3, 12, 20), numpy), ((20, 12), numpy), ((10, 12), numpy)])
    s, t, f = np.zeros((3, 12, 20), numpy), np.zeros((20, 12), numpy), a[1:13, 1:21]
    s[1], s[2, 3:7], s[0, 5] = f, f[4:8], f[11]
    t[10:14, 1:11] = f[2:6, 3:13]
    s[0, 8:12, 10:20] = f[2:6, 3:13]
    assert x.tobytes() == s.tobytes()
    assert y.tobytes() == t.tobytes()
    assert z.tobytes() == f[2:12, 5:17].tobytes()
