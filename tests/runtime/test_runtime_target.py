"""What is known of the chip at hand: the table's figures, or its own where they differ."""

from __future__ import annotations

import re

import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.target import TARGETS, measured

H100 = TARGETS["sm_90a"]


def test_a_device_like_the_tables_has_its_figures():
    assert measured(H100, 132, 3.352e12, 50 << 20) is H100
    assert measured(H100, 0, 0.0, 0) is H100


@pytest.mark.parametrize(
    "multiprocessors, bandwidth, cache", [(132, 4.917e12, 60 << 20), (114, 2.04e12, 50 << 20)]
)
def test_another_product_has_its_own(multiprocessors, bandwidth, cache):
    chip = measured(H100, multiprocessors, bandwidth, cache).chip
    assert chip.multiprocessors == multiprocessors
    assert chip.memory_bytes == pytest.approx(bandwidth / 1.65e9)
    assert chip.cache_bytes == cache
    assert chip.tensor_macs == H100.chip.tensor_macs


@tilejit
def product(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BN=T.auto(128, 64, 32)):
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, 64)) as (bx, by):
        a, b = T.alloc_shared((64, 64), A.dtype), T.alloc_shared((BN, 64), B.dtype)
        acc = T.alloc_fragment((64, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 64)):
            T.copy(A[by * 64, k * 64], a)
            T.copy(B[bx * BN, k * 64], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.copy(acc, C[by * 64, bx * BN])


def test_kernels_are_chosen_and_kept_for_the_chip():
    """A flat product waits for memory, and less for faster memory."""
    specs = [T.Tensor(shape, "bfloat16") for shape in ((16, 4096), (6144, 4096), (16, 6144))]
    usual = product.compile(*specs, target=H100)
    faster = product.compile(*specs, target=measured(H100, 132, 4.917e12, 60 << 20))
    assert usual is not faster
    assert "bound by memory" in usual.explain()
    estimates = [re.search(r"estimated ([\d.]+) us", k.explain())[1] for k in (usual, faster)]
    assert float(estimates[1]) < 0.85 * float(estimates[0])
