"""Kernels with runtime extents, compiled for those of arrays or specs."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit

M, N = T.dynamic("M"), T.dynamic("N")


@tilejit
def doubled(A: T.Tensor((M, N), "float32"), B: T.Tensor((M, N), "float32")):
    with T.Kernel(M, T.ceildiv(N, 512), threads=128) as (row, block):
        for j in T.Parallel(512):
            column = block * 512 + j
            if column < N:
                B[row, column] = 2 * A[row, column]


def is_wide(kernel) -> bool:
    return "ld.global.nc.v4" in kernel.ptx or "ld.global.v4" in kernel.ptx


def spec(rows, columns):
    return T.Tensor((rows, columns), "float32")


def test_what_divides_the_extents_is_known():
    assert is_wide(doubled.compile(spec(4, 4096), spec(4, 4096), target="sm_90a"))
    assert not is_wide(doubled.compile(spec(4, 4095), spec(4, 4095), target="sm_90a"))
    assert not is_wide(doubled.compile(target="sm_90a"))
    some = T.dynamic("some")
    assert not is_wide(doubled.compile(spec(4, some), spec(4, some), target="sm_90a"))


FACTOR = 2


@tilejit
def scaled(A: T.Tensor((N,), "float32"), B: T.Tensor((N,), "float32")):
    with T.Kernel(T.ceildiv(N, 128), threads=32) as block:
        for i in T.Parallel(128):
            if block * 128 + i < N:
                B[block * 128 + i] = FACTOR * A[block * 128 + i]


def test_values_from_outside_are_those_that_it_was_compiled_with(monkeypatch):
    kernel = scaled.compile(T.Tensor((128,), "float32"), T.Tensor((128,), "float32"))
    monkeypatch.setitem(globals(), "FACTOR", 3)
    for n in (128, 127):
        a, b = np.ones(n, np.float32), np.full(n, np.nan, np.float32)
        kernel(a, b)
        assert (b == 2).all()
        scaled(a, b)
        assert (b == 3).all()


@pytest.mark.parametrize("columns", [4096, 1001, 8, 515])
def test_it_serves_all_extents(columns):
    kernel = doubled.compile(spec(4, 4096), spec(4, 4096))
    a = np.random.default_rng(0).random((3, columns), np.float32)
    b = np.full_like(a, np.nan)
    for _ in range(2):
        kernel(a, b)
        assert (b == 2 * a).all()
