"""Random matmuls on Hopper: sizes that nothing divides, all dtypes and layouts, sizes known when
compiling and not; every element near the float64 product, nothing written around it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from products import assert_product, matmul, matmul_of_any_size, operand, stored

from tilejit.dtypes import as_dtype

# A, B, the accumulator, and what may be stored
TYPES = [
    ("float16", "float16", "float32", ("float16", "float32", "bfloat16")),
    ("float16", "float16", "float16", ("float16", "float32")),
    ("bfloat16", "bfloat16", "float32", ("bfloat16", "float32", "float8_e4m3fn")),
    ("float32", "float32", "float32", ("float32", "bfloat16")),  # through tf32
    ("float8_e4m3fn", "float8_e4m3fn", "float32", ("float32", "bfloat16", "float16")),
    ("float8_e5m2", "float8_e4m3fn", "float32", ("bfloat16",)),
    ("int8", "int8", "int32", ("int32",)),
    ("uint8", "int8", "int32", ("int32",)),
]
TILES = [  # (BM, BN, bytes of K, threads)
    (64, 64, 64, 128), (128, 128, 128, 256), (128, 256, 128, 256), (64, 128, 128, 128),
]  # fmt: skip
SMALL_TILES = TILES[:1] + [(128, 32, 64, 256), (64, 24, 128, 128)]


def extent(draw: random.Random, largest: int) -> int:
    kind = draw.random()
    if kind < 0.1:
        return draw.choice([1, 2, 7, 8, 16, 63, 64, 65])
    number = draw.randrange(1, largest)
    return number if kind < 0.55 else -(-number // 16) * 16


def check(hopper, seed, largest, tiles):
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    a_dtype, b_dtype, accum, outputs = draw.choice(TYPES)
    size = as_dtype(a_dtype).bytes
    tA, tB = draw.choice([(False, False), (False, True), (True, False), (True, True)])
    if size != 2 and draw.random() < 0.7:
        tA, tB = False, True
    M, N, K = (extent(draw, largest) for _ in range(3))
    BM, BN, k_bytes, threads = draw.choice(tiles)
    out, tf32 = draw.choice(outputs), a_dtype == "float32"
    constants = {"BM": BM, "BN": BN, "BK": k_bytes // size, "threads": threads, "accum": accum,
                 "tf32": tf32}  # fmt: skip
    a, b = operand(rng, (M, K), a_dtype), operand(rng, (K, N), b_dtype)
    if draw.random() < 0.4:
        kernel = matmul_of_any_size(a_dtype, b_dtype, out, tA, tB)
    else:
        kernel = matmul
        constants |= {"tA": tA, "tB": tB}
    c = hopper(kernel, stored(a, tA), stored(b, tB), out=[((M, N), out)], **constants)
    assert_product(c, a, b, accum=accum, tf32=tf32)


@pytest.mark.parametrize("seed", range(40))
def test_random_small_product_is_right(hopper, seed):
    check(hopper, seed, 200, SMALL_TILES)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200))
def test_random_large_product_is_right(hopper_gpu, seed):
    check(hopper_gpu, 1000 + seed, 1200, TILES)
