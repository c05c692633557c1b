"""The meaning of every scalar operation, against Python's numbers and NumPy's own types."""

import math

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.ir.expr import BINARY, COMPARE, MATH, PREDICATES, UNARY
from tilejit.ops.scalar import bitcast_array, cast_array, evaluate_op

INTEGERS = [d for d in dtypes.ALL if d.is_integer]
FLOATS = [d for d in dtypes.ALL if d.is_float]
INTEGER_OPS = {
    "add", "sub", "mul", "div", "floordiv", "floormod", "fmod", "min", "max", "and", "or", "xor",
    "shl", "shr", "pow", "neg", "not", "abs", "popcount", "clz", "floor", "ceil", "round", "trunc",
}  # fmt: skip


def wrap(value, dtype):
    value &= (1 << dtype.bits) - 1
    return value - (1 << dtype.bits) if dtype.is_signed and value >> (dtype.bits - 1) else value


def integer_samples(dtype):
    low, high = dtype.min, dtype.max
    values = {low, low + 1, -7, -3, -1, 0, 1, 2, 3, 7, 8, 31, 33, 100, high - 1, high}
    return sorted(v for v in values if low <= v <= high)


def same_bits(a, b):
    assert a.dtype == b.dtype
    if a.dtype.kind in "biu":
        return np.array_equal(a, b)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    equal = (wide_a == wide_b) & (np.signbit(wide_a) == np.signbit(wide_b))
    return bool(np.all(equal | (np.isnan(wide_a) & np.isnan(wide_b))))


PYTHON_BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b if b else 0,
    "floormod": lambda a, b: a % b if b else 0,
    "div": lambda a, b: (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else 0,
    "fmod": lambda a, b: (abs(a) % abs(b)) * (-1 if a < 0 else 1) if b else 0,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("op", sorted(PYTHON_BINARY))
def test_integer_binary_operation_equals_pythons_wrapped(op, dtype):
    values = integer_samples(dtype)
    a = np.array(values, dtype.numpy)[:, None]
    b = np.array(values, dtype.numpy)[None, :]
    got = evaluate_op(op, (a, b), dtype)
    for i, x in enumerate(values):
        for j, y in enumerate(values):
            expected = PYTHON_BINARY[op](x, y)
            if op not in COMPARE:
                expected = wrap(expected, dtype)
            assert got[i, j] == expected, f"{x} {op} {y}"
    assert got.dtype == (np.bool_ if op in COMPARE else dtype.numpy)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_shift_by_the_width_or_more_leaves_zero_or_the_sign(dtype):
    values = integer_samples(dtype)
    counts = [-1, 0, 1, dtype.bits - 1, dtype.bits, dtype.bits + 5]
    counts = [c for c in counts if dtype.min <= c <= dtype.max]
    a, b = np.array(values, dtype.numpy)[:, None], np.array(counts, dtype.numpy)[None, :]
    left, right = evaluate_op("shl", (a, b), dtype), evaluate_op("shr", (a, b), dtype)
    for i, x in enumerate(values):
        for j, y in enumerate(counts):
            count = y if 0 <= y < dtype.bits else dtype.bits
            assert left[i, j] == wrap(x << count, dtype)
            assert right[i, j] == x >> count


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_unary_operations_equal_pythons_wrapped(dtype):
    values = integer_samples(dtype)
    a = np.array(values, dtype.numpy)
    mask = (1 << dtype.bits) - 1
    expected = {
        "neg": lambda x: -x,
        "not": lambda x: ~x,
        "abs": abs,
        "popcount": lambda x: (x & mask).bit_count(),
        "clz": lambda x: dtype.bits - (x & mask).bit_length(),
        "floor": lambda x: x,
        "trunc": lambda x: x,
    }
    for op, function in expected.items():
        got = evaluate_op(op, (a,), dtype)
        assert got.dtype == dtype.numpy
        assert got.tolist() == [wrap(function(x), dtype) for x in values], op
    assert not evaluate_op("isnan", (a,), dtype).any()
    assert evaluate_op("isfinite", (a,), dtype).all()


def test_integer_power_wraps_and_negative_exponents_truncate():
    a = np.array([3, -1, -1, 1, 2, 0, 10], np.int32)
    b = np.array([5, -3, -2, -9, -1, 0, 10], np.int32)
    expected = [243, -1, 1, 1, 0, 1, wrap(10**10, dtypes.int32)]
    assert evaluate_op("pow", (a, b), dtypes.int32).tolist() == expected


FLOAT_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "floordiv": np.floor_divide,
    "floormod": np.remainder,
    "fmod": np.fmod,
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", sorted(FLOAT_BINARY))
def test_float_binary_operation_rounds_once_from_float32_or_its_own_width(op, dtype, rng):
    a = cast_array(rng.normal(size=300) * 4, dtypes.float64, dtype)
    b = cast_array(rng.normal(size=300) * 4, dtypes.float64, dtype)
    b[:3] = 0
    got = evaluate_op(op, (a, b), dtype)
    width = np.float64 if dtype is dtypes.float64 else np.float32
    with np.errstate(all="ignore"):
        expected = FLOAT_BINARY[op](a.astype(width), b.astype(width))
    if dtype.bits == 8:
        expected = np.clip(expected, dtype.min, dtype.max)
    assert same_bits(got, expected.astype(dtype.numpy))


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", sorted(COMPARE))
def test_float_comparison_is_ieee(op, dtype):
    a = np.array([1.0, math.nan, 2.0, -0.0, 0.5], dtype.numpy)
    b = np.array([1.0, 1.0, math.nan, 0.0, 2.0], dtype.numpy)
    expected = [PYTHON_BINARY[op](float(x), float(y)) for x, y in zip(a, b, strict=True)]
    assert evaluate_op(op, (a, b), dtype).tolist() == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_min_and_max_take_the_number_and_order_zeros(dtype):
    nan, zero = math.nan, 0.0
    a = np.array([nan, 1, nan, zero, -zero, 2, -zero], dtype.numpy)
    b = np.array([1, nan, nan, -zero, zero, 3, -zero], dtype.numpy)
    low = np.array([1, 1, nan, -zero, -zero, 2, -zero], dtype.numpy)
    high = np.array([1, 1, nan, zero, zero, 3, -zero], dtype.numpy)
    assert same_bits(evaluate_op("min", (a, b), dtype), low)
    assert same_bits(evaluate_op("max", (a, b), dtype), high)


MATH_CASES = [
    ("exp", math.exp, -3, 3), ("exp2", math.exp2, -3, 3), ("exp10", lambda x: 10.0**x, -2, 2),
    ("expm1", math.expm1, -1, 1), ("log", math.log, 0.1, 5), ("log2", math.log2, 0.1, 5),
    ("log10", math.log10, 0.1, 5), ("log1p", math.log1p, -0.5, 5), ("sqrt", math.sqrt, 0, 9),
    ("rsqrt", lambda x: 1 / math.sqrt(x), 0.1, 9), ("sin", math.sin, -7, 7),
    ("cos", math.cos, -7, 7), ("tan", math.tan, -1, 1), ("sinh", math.sinh, -3, 3),
    ("cosh", math.cosh, -3, 3), ("tanh", math.tanh, -3, 3), ("asin", math.asin, -1, 1),
    ("acos", math.acos, -1, 1), ("atan", math.atan, -4, 4), ("erf", math.erf, -3, 3),
    ("floor", math.floor, -4, 4), ("ceil", math.ceil, -4, 4), ("round", round, -4, 4),
    ("trunc", math.trunc, -4, 4),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op, function, low, high", MATH_CASES, ids=[c[0] for c in MATH_CASES])
def test_math_function_equals_pythons_rounded_to_the_dtype(op, function, low, high, dtype):
    a = cast_array(np.linspace(low, high, 101).reshape(1, 101), dtypes.float64, dtype)
    got = evaluate_op(op, (a,), dtype)
    exact = np.array([[function(float(x)) for x in a[0]]])
    if dtype is dtypes.float64:
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, exact, rtol=1e-14, atol=1e-15)
    else:
        expected = cast_array(exact.astype(np.float32), dtypes.float32, dtype)
        same = got.astype(np.float64) == expected.astype(np.float64)
        assert np.count_nonzero(~same) <= 1  # libm's last bit may tip one rounding
        np.testing.assert_allclose(
            got.astype(np.float64), exact, rtol=float(ml_dtypes.finfo(dtype.numpy).eps), atol=2e-2
        )


def test_every_named_operation_has_a_meaning():
    for op in BINARY | COMPARE | UNARY | MATH | PREDICATES:
        count = 2 if op in BINARY | COMPARE else 1
        for dtype in (dtypes.int32, dtypes.float32, dtypes.float16, dtypes.float64):
            if dtype.is_integer and op in BINARY | UNARY | MATH and op not in INTEGER_OPS:
                continue
            if dtype.is_float and op in ("and", "or", "xor", "shl", "shr", "not"):
                continue
            if dtype.is_float and op in ("popcount", "clz"):
                continue
            got = evaluate_op(op, [np.ones(3, dtype.numpy)] * count, dtype)
            is_bool = op in COMPARE | PREDICATES
            assert got.shape == (3,) and got.dtype == (np.bool_ if is_bool else dtype.numpy), op


def test_exceptional_values_never_warn():
    a = np.array([0.0, -1.0, math.inf, math.nan], np.float32)
    assert math.isnan(evaluate_op("log", (a,), dtypes.float32)[1])
    assert evaluate_op("log", (a,), dtypes.float32)[0] == -math.inf
    assert evaluate_op("rsqrt", (np.float32(0),), dtypes.float32) == math.inf
    assert evaluate_op("div", (a[:1] + 1, a[:1]), dtypes.float32)[0] == math.inf
    assert evaluate_op("isnan", (a,), dtypes.float32).tolist() == [False, False, False, True]
    assert evaluate_op("isinf", (a,), dtypes.float32).tolist() == [False, False, True, False]
    assert evaluate_op("isfinite", (a,), dtypes.float32).tolist() == [True, True, False, False]


def test_bool_operations_are_logical():
    a, b = np.array([[True], [False]]), np.array([[True, False]])
    for op, function in (
        ("and", np.logical_and),
        ("or", np.logical_or),
        ("xor", np.logical_xor),
        ("eq", np.equal),
        ("ne", np.not_equal),
    ):
        got = evaluate_op(op, (a, b), dtypes.bool_)
        assert got.dtype == np.bool_ and np.array_equal(got, function(a, b))
    assert evaluate_op("not", (a,), dtypes.bool_).ravel().tolist() == [False, True]


def test_select_broadcasts_and_keeps_the_dtype():
    condition = np.array([[True], [False]])
    got = evaluate_op(
        "select", (condition, np.float16(1), np.array([2, 3], np.float16)), dtypes.float16
    )
    assert got.dtype == np.float16 and got.tolist() == [[1, 1], [2, 3]]


@pytest.mark.parametrize("source", dtypes.ALL, ids=str)
@pytest.mark.parametrize("target", dtypes.ALL, ids=str)
def test_cast_of_small_numbers_is_exact_in_every_pair(source, target):
    values = np.array([0, 1, 2, 3]) if not source.is_bool else np.array([0, 1])
    got = cast_array(values.astype(source.numpy), source, target)
    assert got.dtype == target.numpy
    expected = values != 0 if target.is_bool else values
    assert got.astype(np.float64).tolist() == expected.astype(np.float64).tolist()


WIDE_SOURCES = [dtypes.float16, dtypes.bfloat16, dtypes.float32, dtypes.float64]


@pytest.mark.parametrize("source", WIDE_SOURCES, ids=str)
@pytest.mark.parametrize("target", INTEGERS, ids=str)
def test_cast_from_float_to_integer_truncates_saturates_and_narrows(source, target):
    values = [-1.9, -0.5, 0.5, 1.9, 1e4, -1e4, 6e4, -6e4, math.inf, -math.inf, math.nan]
    if source.bits >= 32:
        values += [2.0**31, -(2.0**31), 2.0**32, 2.0**63, -(2.0**63), 2.0**64, 1e30]
    a = np.array(values, source.numpy)
    wide = target if target.bits >= 32 else dtypes.int32
    expected = []
    for x in map(float, a):
        limit = max(wide.min, min(wide.max, x)) if not math.isnan(x) else 0
        expected.append(wrap(int(limit), target))
    assert cast_array(a, source, target).tolist() == expected


@pytest.mark.parametrize("source", INTEGERS, ids=str)
@pytest.mark.parametrize("target", INTEGERS, ids=str)
def test_cast_between_integers_wraps(source, target):
    values = integer_samples(source)
    got = cast_array(np.array(values, source.numpy), source, target)
    assert got.tolist() == [wrap(v, target) for v in values]


@pytest.mark.parametrize("target", [dtypes.float8_e4m3fn, dtypes.float8_e5m2], ids=str)
def test_cast_to_float8_saturates_and_keeps_nan(target):
    a = np.array([1e6, -1e6, math.inf, -math.inf, math.nan, 1.0], np.float32)
    got = cast_array(a, dtypes.float32, target).astype(np.float32)
    high = target.max
    assert got[:4].tolist() == [high, -high, high, -high]
    assert math.isnan(got[4]) and got[5] == 1.0
    single = cast_array(np.int32(10**6), dtypes.int32, target)
    assert isinstance(single, np.ndarray) and single.astype(np.float32) == high


def test_cast_to_bool_is_unequal_zero_and_counts_nan():
    a = np.array([0.0, -0.0, 0.25, math.nan, math.inf])
    for source in (dtypes.float64, dtypes.float16, dtypes.bfloat16):
        got = cast_array(a.astype(source.numpy), source, dtypes.bool_)
        assert got.tolist() == [False, False, True, True, True]


def test_cast_to_the_same_representation_returns_the_array():
    a = np.ones(3, np.float32)
    assert cast_array(a, dtypes.float32, dtypes.tfloat32) is a


def test_bitcast_keeps_the_bits_of_strided_arrays():
    a = np.array([1.0, 9.0, -2.0, 9.0], np.float32)[::2]
    got = bitcast_array(a, dtypes.float32, dtypes.uint32)
    assert got.tolist() == [0x3F800000, 0xC0000000]
    back = bitcast_array(got, dtypes.uint32, dtypes.float32)
    assert back.tolist() == [1.0, -2.0]
    half = bitcast_array(np.float16(1), dtypes.float16, dtypes.bfloat16)
    assert half.dtype == ml_dtypes.bfloat16
