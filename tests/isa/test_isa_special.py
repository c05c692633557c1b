"""Conversions, fast functions and shuffles against NumPy and ml_dtypes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.isa import special
from tilejit.target import TARGETS

EDGES = np.array(
    [0.0, -0.0, 1.0, -1.5, 65504, 65519.9, 65520, 1e-8, -6e-8, 448, 464, 480, 57344, 61440, 3e38,
     -3.4e38, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e-45, -7e-3],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.int32, dtypes.uint32], ids=str)
def test_own_zero_is_zero_in_every_lane_and_may_be_moved(dtype):
    lanes = SimpleNamespace(thread=np.arange(64))
    zero = special.own_zero(dtype)
    (value,) = zero.meaning(lanes, [])
    assert value.dtype == dtype.numpy and value.shape == (64,) and not value.any()
    assert not zero.has_effect


def values():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 4096, np.uint64).astype(np.uint32).view(np.float32)
    finite = bits[~np.isnan(bits)]
    return np.concatenate([EDGES, finite, rng.standard_normal(1000).astype(np.float32)])


def test_bf16_conversion_rounds_to_nearest_even():
    x = values()
    (bits,) = special.BF16_FROM_F32.meaning(None, [x])
    assert bits.dtype == np.uint16
    with np.errstate(over="ignore"):
        assert np.array_equal(bits, x.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize(
    ("instruction", "numpy"),
    [(special.BF16X2_FROM_F32, ml_dtypes.bfloat16), (special.F16X2_FROM_F32, np.float16)],
    ids=["bf16x2", "f16x2"],
)
def test_a_pair_conversion_puts_its_first_input_into_the_low_half(instruction, numpy):
    low, high = values(), values()[::-1].copy()
    (packed,) = instruction.meaning(None, [low, high])
    assert packed.dtype == np.uint32
    with np.errstate(over="ignore"):
        expected = np.stack([low.astype(numpy), high.astype(numpy)], axis=1)
    assert np.array_equal(packed.view(np.uint16).reshape(-1, 2), expected.view(np.uint16))


def test_16_bit_conversions_of_any_nan_give_the_canonical_one():
    nan = np.array([0x7FC00000, 0xFF800001, 0x7F800001], np.uint32).view(np.float32)
    assert special.BF16_FROM_F32.meaning(None, [nan])[0].tolist() == [0x7FFF] * 3
    assert special.F16X2_FROM_F32.meaning(None, [nan, nan])[0].tolist() == [0x7FFF7FFF] * 3


def test_tf32_conversion_cuts_the_payload_of_a_nan():
    nan = np.array([0x7FFFFFFF, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    (bits,) = special.TF32_FROM_F32.meaning(None, [nan])
    assert bits.tolist() == [0x7FFFE000, 0xFFC00000, 0x7F800000]


def test_tf32_conversion_keeps_ten_bits_and_takes_ties_away_from_zero():
    x = np.array([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 1 + 3 * 2**-11, 0.0, -0.0, np.inf])
    (bits,) = special.TF32_FROM_F32.meaning(None, [x.astype(np.float32)])
    expected = [1 + 2**-10, -1 - 2**-10, 1.0, 1 + 2 * 2**-10, 0.0, -0.0, np.inf]
    assert bits.view(np.float32).tolist() == expected
    assert not (special.TF32_FROM_F32.meaning(None, [values()])[0] & 0x1FFF).any()


@pytest.mark.parametrize(
    ("narrow", "widen", "dtype"),
    [
        (special.E4M3X2_FROM_F32, special.F16X2_FROM_E4M3X2, dtypes.float8_e4m3fn),
        (special.E5M2X2_FROM_F32, special.F16X2_FROM_E5M2X2, dtypes.float8_e5m2),
    ],
    ids=["e4m3", "e5m2"],
)
class TestFp8:
    def test_narrowing_saturates_and_rounds_to_nearest_even(self, narrow, widen, dtype):
        low, high = values(), values()[::-1].copy()
        (packed,) = narrow.meaning(None, [low, high])
        assert packed.dtype == np.uint16
        clipped = np.clip(np.stack([low, high], axis=1), -dtype.max, dtype.max)
        expected = clipped.astype(dtype.numpy).view(np.uint8)
        assert np.array_equal(packed.view(np.uint8).reshape(-1, 2), expected)

    def test_narrowing_of_infinity_is_the_largest_value_and_of_nan_nan(self, narrow, widen, dtype):
        low = np.array([np.inf, np.nan], np.float32)
        (packed,) = narrow.meaning(None, [low, -low])
        pair = packed.view(np.uint8).view(dtype.numpy).astype(np.float32)
        assert pair[:2].tolist() == [dtype.max, -dtype.max]
        assert np.isnan(pair[2:]).all() and packed[1] == 0x7F7F

    def test_widening_is_exact_for_every_value(self, narrow, widen, dtype):
        every = np.arange(256, dtype=np.uint16)
        (packed,) = widen.meaning(None, [every | (255 - every) << 8])
        pair = packed.view(np.float16).reshape(-1, 2)
        wide = every.astype(np.uint8).view(dtype.numpy).astype(np.float32)
        assert np.array_equal(pair[:, 0].astype(np.float32), wide, equal_nan=True)
        assert np.array_equal(pair[:, 1].astype(np.float32), wide[::-1], equal_nan=True)

    def test_the_conversion_needs_a_target_that_has_it(self, narrow, widen, dtype):
        lacking = {name for name, target in TARGETS.items() if not target.has(*narrow.needs)}
        assert lacking == {"sm_80", "sm_86"}
        assert narrow.needs == widen.needs


@pytest.mark.parametrize(
    ("instruction", "function", "x"),
    [
        (special.EX2, lambda x: 2.0**x, 3.25),
        (special.LG2, math.log2, 10.0),
        (special.RCP, lambda x: 1 / x, 3.0),
        (special.RSQRT, lambda x: x**-0.5, 2.0),
        (special.SQRT, math.sqrt, 2.0),
        (special.SIN, math.sin, 0.7),
        (special.COS, math.cos, 0.7),
        (special.TANH, math.tanh, -0.3),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_fast_function_means_the_function(instruction, function, x):
    (y,) = instruction.meaning(None, [np.array([x, np.nan], np.float32)])
    assert y.dtype == np.float32
    assert y[0] == pytest.approx(function(x), rel=1e-6)
    assert np.isnan(y[1])


def test_fast_functions_treat_subnormal_numbers_as_zero():
    subnormal = np.array([1e-40, -1e-40], np.float32)
    assert special.RCP.meaning(None, [subnormal])[0].tolist() == [np.inf, -np.inf]
    assert special.LG2.meaning(None, [subnormal])[0][0] == -np.inf
    assert special.EX2.meaning(None, [np.array([-140.0], np.float32)])[0].tolist() == [0.0]
    assert special.TANH.meaning(None, [subnormal])[0].tolist() == subnormal.tolist()


def test_shuffles_stay_within_their_warp(make_lanes):
    lanes = make_lanes(96)
    value = np.arange(96, dtype=np.uint32) * 10
    (same,) = special.shuffle("idx").meaning(lanes, [value, np.full(96, 3, np.uint32)])
    assert same.tolist() == [30] * 32 + [350] * 32 + [670] * 32
    (other,) = special.shuffle("bfly").meaning(lanes, [value, np.full(96, 16, np.uint32)])
    assert np.array_equal(other, value.reshape(-1, 2, 16)[:, ::-1].ravel())
    three = np.full(96, 3, np.uint32)
    lane = np.arange(32)
    (before,) = special.shuffle("up").meaning(lanes, [value, three])
    assert before[32:64].tolist() == (320 + 10 * np.where(lane < 3, lane, lane - 3)).tolist()
    (after,) = special.shuffle("down").meaning(lanes, [value, three])
    assert after[32:64].tolist() == (320 + 10 * np.where(lane > 28, lane, lane + 3)).tolist()
    with pytest.raises(AssertionError, match="shuffle left"):
        special.shuffle("left")


def test_a_permutation_takes_bytes_by_number():
    low, high = np.array([0x33221100], np.uint32), np.array([0x77665544], np.uint32)
    for selector in (0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0x7070):
        (word,) = special.PERMUTE.meaning(None, [low, high, np.uint32(selector)])
        digits = [selector >> 4 * n & 7 for n in range(4)]
        assert word.tolist() == [sum(0x11 * digit << 8 * n for n, digit in enumerate(digits))]
        assert word.dtype == np.uint32
