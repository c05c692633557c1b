"""Loops that access some tensors at quotients, remainders or bits of an index: scales of groups,
halves of a head in rotary embeddings, tables that repeat."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


@tilejit
def scaled(Q: T.Tensor, S: T.Tensor, Y: T.Tensor, *, group=32, bits=False):
    """Y = Q times the scale of each group of columns."""
    M, N = Q.shape
    with T.Kernel(T.ceildiv(M, 16), threads=128) as block:
        for i, j in T.Parallel(16, N):
            row = block * 16 + i
            if row < M:
                at = j >> (group.bit_length() - 1) if bits else j // group
                Y[row, j] = T.cast(Q[row, j], "float32") * S[row, at]


@tilejit
def rotated(X: T.Tensor, cosine: T.Tensor, sine: T.Tensor, Y: T.Tensor, *, spelled="mod"):
    """Rotary embedding whose pairs are half a head apart."""
    S, D = X.shape
    half = D // 2
    with T.Kernel(T.ceildiv(S, 16), threads=128) as block:
        for i, j in T.Parallel(16, D):
            row = block * 16 + i
            if row < S:
                other, at = (j + half) % D, j % half
                if spelled == "bits":
                    other, at = j ^ half, j & (half - 1)
                sign = T.if_then_else(j < half, -1.0, 1.0)
                x, y = T.cast(X[row, j], "float32"), T.cast(X[row, other], "float32")
                Y[row, j] = x * cosine[row, at] + sign * y * sine[row, at]


@tilejit
def repeated(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, rows=4):
    """C = A + B, whose columns repeat with a period that vectors may not divide."""
    M, N = A.shape
    with T.Kernel(1, threads=64):
        for i, j in T.Parallel(M, N):
            C[i, j] = A[i, j] + B[i // rows, (j + 3) % B.shape[1]]


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "group"), [(32, 256, 128), (20, 96, 32), (7, 40, 8), (5, 48, 2)]
)
def test_scales_of_groups(run, rng, M, N, group, bits):
    q = rng.integers(-9, 10, (M, N)).astype(np.int8)
    s = (2.0 ** rng.integers(-3, 4, (M, N // group))).astype(np.float32)
    y = run(scaled, q, s, out=[((M, N), np.float32)], group=group, bits=bits)
    assert (y == q * np.repeat(s, group, 1)).all()


@pytest.mark.parametrize("spelled", ["mod", "bits"])
@pytest.mark.parametrize(("S", "D"), [(40, 128), (17, 64), (9, 16), (5, 4)])
def test_halves_of_a_head_are_rotated(run, rng, spelled, S, D):
    x = rng.integers(-4, 5, (S, D)).astype(np.float16)
    cosine, sine = (rng.integers(-2, 3, (S, D // 2)).astype(np.float32) for _ in range(2))
    low, high = np.split(x.astype(np.float32), 2, 1)
    want = np.concatenate([low * cosine - high * sine, high * cosine + low * sine], 1)
    y = run(rotated, x, cosine, sine, out=[((S, D), np.float32)], spelled=spelled)
    assert (y == want).all()


@pytest.mark.parametrize("period", [1, 5, 8, 12, 32, 100])
@pytest.mark.parametrize("shape", [(8, 64), (6, 36), (4, 7)])
def test_columns_that_repeat(run, rng, period, shape):
    a = rng.integers(-9, 10, shape).astype(np.float32)
    b = rng.integers(-9, 10, (-(-shape[0] // 4), period)).astype(np.float32)
    at = (np.arange(shape[1]) + 3) % period
    want = a + b[np.arange(shape[0]) // 4][:, at]
    assert (run(repeated, a, b, out=[(shape, np.float32)]) == want).all()


def loads(kernel, *specs, **constants):
    """The widths in bits of loads and stores of global memory."""
    ptx = kernel.compile(*specs, target="sm_90a", **constants).ptx
    found = re.findall(r"(?:ld|st)\.global\S*?(?:\.(v\d))?\.[bfus](\d+)", ptx)
    return sorted({int(v[1:] or 1) * int(b) if v else int(b) for v, b in found})


@pytest.mark.parametrize("bits", [False, True])
def test_only_scales_are_loaded_one_by_one(bits):
    spec = T.Tensor((16, 256), "int8"), T.Tensor((16, 2), "float32"), T.Tensor((16, 256), "float32")
    assert loads(scaled, *spec, group=128, bits=bits) == [32, 128]


@pytest.mark.parametrize("spelled", ["mod", "bits"])
def test_both_halves_come_in_vectors(spelled):
    x, table = T.Tensor((16, 128), "bfloat16"), T.Tensor((16, 64), "float32")
    assert loads(rotated, x, table, table, x, spelled=spelled) == [128]
