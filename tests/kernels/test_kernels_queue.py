"""Blocks that take uneven tiles when they are free: every tile is computed once, whatever decides
how long it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, operand

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.ir.node import Atomic, Roles, While, walk
from tilejit.runtime import frame
from tilejit.runtime.device import use_executor

BF16 = ml_dtypes.bfloat16
QUEUE = "each block takes the next one when it is free"


@tilejit
def triangle(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kind, BM=64, BN=64, BK=32, threads=128):
    """C = A @ B, of whose K only what lies below the diagonal counts: K up to the tile's end along
    M ("rows"), along N ("columns") or both; from its start on ("from")."""
    M, K = A.shape
    N = B.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        first, last = 0, K
        if kind in ("rows", "both"):
            last = T.min(last, (by + 1) * BM)
        if kind in ("columns", "both"):
            last = T.min(last, (bx + 1) * BN)
        if kind == "from":
            first = by * BM // BK
        T.clear(acc)
        for k in T.Pipelined(first, T.ceildiv(last, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * BM, bx * BN])


def masked(a, kind, BM=64, BN=64, N=0):
    """A for each column tile, without what does not count."""
    M, K = a.shape
    rows, k = np.arange(M)[:, None], np.arange(K)
    parts = []
    for column in range(-(-N // BN)):
        seen = np.ones((M, K), bool)
        if kind in ("rows", "both"):
            seen &= k < (rows // BM + 1) * BM
        if kind in ("columns", "both"):
            seen &= k < (column + 1) * BN
        if kind == "from":
            seen &= k >= rows // BM * BM
        parts.append(np.where(seen, a, 0).astype(a.dtype))
    return parts


@pytest.mark.parametrize("kind", ["rows", "columns", "both", "from", "none"])
@pytest.mark.parametrize("size", [(64, 64, 64), (200, 136, 264), (520, 264, 136)], ids=str)
def test_every_tile_is_computed_once(hopper, rng, kind, size):
    M, N, K = size
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    c = hopper(triangle, a, b, out=[((M, N), "float32")], kind=kind)
    for column, part in enumerate(masked(a, kind, N=N)):
        place = slice(column * 64, column * 64 + 64)
        assert_product(c[:, place], part, b[:, place])


@pytest.mark.parametrize("kind, axes", [("rows", "y"), ("columns", "x"), ("both", "x and y")])
def test_explain_says_along_what_tiles_differ(kind, axes):
    specs = T.Tensor((2048, 2048), BF16), T.Tensor((2048, 2048), BF16)
    kernel = triangle.compile(*specs, T.Tensor((2048, 2048), "float32"), target="sm_90a", kind=kind)
    assert f"tiles differ along {axes}: {QUEUE}" in kernel.explain()
    assert "longest first" in kernel.explain()


def test_even_tiles_are_not_taken_from_a_queue():
    specs = T.Tensor((2048, 2048), BF16), T.Tensor((2048, 2048), BF16)
    kernel = triangle.compile(
        *specs, T.Tensor((2048, 2048), "float32"), target="sm_90a", kind="none"
    )
    assert QUEUE not in kernel.explain()
    assert not any(isinstance(n, Atomic) for n in walk(kernel.kernels[0].planned.body))


@tilejit
def ragged(A: T.Tensor, B: T.Tensor, lengths: T.Tensor, C: T.Tensor):
    """C[z] = A[z, :, :lengths[z]] @ B[z, :lengths[z]]: how long a tile is, memory says."""
    batch, M, K = A.shape
    N = B.shape[2]
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), batch, threads=128) as (bx, by, z):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(T.min(lengths[z], K), 32)):
            T.copy(A[z, by * 64, k * 32], a)
            T.copy(B[z, k * 32, bx * 64], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[z, by * 64, bx * 64])


def test_tiles_of_lengths_in_memory_are_right(hopper, rng):
    lengths = np.array([64, 0, 160, 32, 96], np.int32)
    a, b = operand(rng, (5, 136, 160), BF16), operand(rng, (5, 160, 72), BF16)
    c = hopper(ragged, a, b, lengths, out=[((5, 136, 72), "float32")])
    for z, length in enumerate(lengths):
        assert_product(c[z], a[z, :, :length], b[z, :length])
    specs = T.Tensor((5, 136, 160), BF16), T.Tensor((5, 160, 72), BF16), T.Tensor((5,), "int32")
    kernel = ragged.compile(*specs, T.Tensor((5, 136, 72), "float32"), target="sm_90a")
    assert f"tiles differ along z: {QUEUE}" in kernel.explain()


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_any_number_of_blocks_shares_the_tiles(monkeypatch, rng, blocks):
    """Also one alone, and more than some of them are there for; each launch leaves the counter as
    it was, which the simulator's workspace checks."""
    monkeypatch.setattr(frame, "SIMULATED_BLOCKS", blocks)
    a, b = operand(rng, (200, 264), BF16), operand(rng, (264, 136), BF16)
    with use_executor("simulator"), options(target="sm_90a"):
        c = np.full((200, 136), np.nan, np.float32)
        triangle(a, b, c, kind="rows")
    for column, part in enumerate(masked(a, "rows", N=136)):
        place = slice(column * 64, column * 64 + 64)
        assert_product(c[:, place], part, b[:, place])


def test_consumers_hear_of_tiles_from_their_producer():
    """One thread takes tiles, a full turn ahead of the others."""
    specs = T.Tensor((2048, 2048), BF16), T.Tensor((2048, 2048), BF16)
    out = T.Tensor((2048, 2048), "float32")
    kernel = triangle.compile(*specs, out, target="sm_90a", kind="rows")
    roles = next(n for n in kernel.kernels[0].planned.body if isinstance(n, Roles)).roles
    for role in roles:
        assert sum(isinstance(n, While) and n.is_tiles for n in walk(role.body)) == 1
    assert sum("atom" in line and ".add" in line for line in kernel.ptx.splitlines()) == 1


@tilejit
def shared_work(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, is_uneven, split=3):
    """C = A @ B, where it is uneven of A's lower triangle: blocks share each tile's iterations."""
    M, K = A.shape
    N = B.shape[1]
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        last = T.min(K, (by + 1) * 64) if is_uneven else K
        for k in T.Pipelined(T.ceildiv(last, 32), split=split):
            T.copy(A[by * 64, k * 32], a)
            T.copy(B[k * 32, bx * 64], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64, bx * 64])


@pytest.mark.parametrize("is_uneven", [False, True])
def test_tiles_that_blocks_share_are_right(hopper, rng, is_uneven):
    a, b = operand(rng, (200, 264), BF16), operand(rng, (264, 136), BF16)
    c = hopper(shared_work, a, b, out=[((200, 136), "float32")], is_uneven=is_uneven)
    part = masked(a, "rows", N=64)[0] if is_uneven else a
    assert_product(c, part, b)


@pytest.mark.parametrize("is_uneven", [False, True])
def test_parts_of_a_tile_are_no_uneven_tiles(is_uneven):
    specs = T.Tensor((2048, 2048), BF16), T.Tensor((2048, 2048), BF16)
    out = T.Tensor((2048, 2048), "float32")
    kernel = shared_work.compile(*specs, out, target="sm_90a", is_uneven=is_uneven)
    assert (f"tiles differ along y: {QUEUE}" in kernel.explain()) == is_uneven
    assert "tiles differ along z" not in kernel.explain()


def test_counters_of_a_kernel_are_apart(monkeypatch):
    """What counts a tile's parts is not what counts the tiles that are taken."""
    given = {}

    def workspace(name, size, ordinal, stream, *, is_zeroed):
        return given.setdefault(name, 4096 * (1 + len(given)))

    monkeypatch.setattr(frame, "workspace", workspace)
    specs = T.Tensor((2048, 2048), BF16), T.Tensor((2048, 2048), BF16)
    out = T.Tensor((2048, 2048), "float32")
    kernel = shared_work.compile(*specs, out, target="sm_90a", is_uneven=True).kernels[0]
    values = kernel.with_spaces([0] * len(kernel.planned.params), 0, 0)
    addresses = [values[n] for n, _, _ in kernel.spaces]
    assert sum(p.is_zeroed for _, p, _ in kernel.spaces) == 2
    assert len(set(addresses)) == len(addresses)
