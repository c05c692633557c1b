"""Elementwise functions on numbers and on traced values: results, dtypes and errors."""

import math

import ml_dtypes
import numpy as np
import pytest
from traced import kernel, refused, tensor

import tilejit.language as T
from tilejit.dtypes import as_dtype
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError
from tilejit.ir.expr import Const, Op, Var, VarKind, walk
from tilejit.language.value import Value
from tilejit.ops.scalar import bitcast_array, cast_array, evaluate_op


def value_of(traced: Value, **numbers):
    """What a traced expression of symbols is for these numbers, by the meaning of its ops."""
    done = {}
    for node in walk(traced.expr):
        if isinstance(node, Const):
            done[node] = np.asarray(node.value, node.dtype.numpy)
        elif isinstance(node, Var):
            done[node] = np.asarray(numbers[node.name], node.dtype.numpy)
        else:
            assert isinstance(node, Op)
            args = [done[c] for c in node.children]
            if node.op == "cast":
                done[node] = cast_array(args[0], node.children[0].dtype, node.dtype)
            elif node.op == "bitcast":
                done[node] = bitcast_array(args[0], node.children[0].dtype, node.dtype)
            else:
                operand = node.children[-1].dtype
                done[node] = evaluate_op(node.op, args, operand)
    return done[traced.expr].item()


def symbol(name: str, dtype: str = "int32") -> Value:
    return Value(Var(name, as_dtype(dtype), VarKind.SCALAR))


UNARY = [
    (T.exp, math.exp, 0.75),
    (T.exp2, lambda v: 2.0**v, 0.75),
    (T.exp10, lambda v: 10.0**v, 0.75),
    (T.expm1, math.expm1, 0.75),
    (T.log, math.log, 0.75),
    (T.log2, math.log2, 0.75),
    (T.log10, math.log10, 0.75),
    (T.log1p, math.log1p, 0.75),
    (T.sqrt, math.sqrt, 0.75),
    (T.rsqrt, lambda v: 1 / math.sqrt(v), 0.75),
    (T.sin, math.sin, 0.75),
    (T.cos, math.cos, 0.75),
    (T.tan, math.tan, 0.75),
    (T.sinh, math.sinh, 0.75),
    (T.cosh, math.cosh, 0.75),
    (T.tanh, math.tanh, 0.75),
    (T.asin, math.asin, 0.75),
    (T.acos, math.acos, 0.75),
    (T.atan, math.atan, 0.75),
    (T.erf, math.erf, 0.75),
    (T.sigmoid, lambda v: 1 / (1 + math.exp(-v)), 0.75),
    (T.floor, math.floor, -1.5),
    (T.ceil, math.ceil, -1.5),
    (T.trunc, math.trunc, -1.75),
    (T.round, round, 2.5),
    (T.round, round, 3.5),
    (T.nearbyint, round, 2.5),
    (T.abs, abs, -1.5),
]


@pytest.mark.parametrize(("function", "expected", "x"), UNARY)
def test_math_on_a_python_number_is_a_number(function, expected, x):
    assert isinstance(function(x), float)
    assert function(x) == pytest.approx(expected(x), rel=1e-12)


@pytest.mark.parametrize(("function", "expected", "x"), UNARY)
def test_math_on_a_numpy_scalar_keeps_its_dtype(function, expected, x):
    result = function(np.float32(x))
    assert isinstance(result, np.float32) and result == pytest.approx(expected(x), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("function", "expected", "x"), UNARY)
def test_math_on_a_traced_value_keeps_its_dtype(function, expected, x, dtype):
    result = function(symbol("x", dtype))
    assert result.dtype == dtype
    tolerance = {"float32": 1e-6, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    assert value_of(result, x=x) == pytest.approx(expected(x), rel=tolerance)


@pytest.mark.parametrize(
    "function", [f for f, _, _ in UNARY if f is not T.abs], ids=lambda f: f.__name__
)
def test_math_on_an_integer_gives_float32(function):
    assert function(symbol("i", "int32")).dtype == "float32"
    assert isinstance(function(np.int8(1)), np.float32)


def test_math_of_a_domain_error_is_nan_or_infinite_without_warning():
    assert math.isnan(T.log(-1.0)) and T.log(0) == -math.inf
    assert T.exp(1e4) == math.inf and T.rsqrt(0.0) == math.inf


@pytest.mark.parametrize(
    ("function", "a", "b", "expected"),
    [
        (T.pow, 2.0, 0.5, 2.0**0.5),
        (T.atan2, 1.0, -2.0, math.atan2(1.0, -2.0)),
        (T.fmod, -7.5, 2.0, math.fmod(-7.5, 2.0)),
    ],
)
def test_binary_math_agrees_on_numbers_and_traced_values(function, a, b, expected):
    assert function(a, b) == pytest.approx(expected)
    traced = function(symbol("a", "float64"), symbol("b", "float64"))
    assert value_of(traced, a=a, b=b) == pytest.approx(expected)
    assert function(symbol("a", "float16"), 2.0).dtype == "float16"


def test_fmod_and_atan2_of_integers_are_float32():
    assert T.fmod(symbol("a"), 3).dtype == "float32"
    assert T.atan2(symbol("a"), symbol("b")).dtype == "float32"


def test_pow_of_integers_stays_integer():
    assert T.pow(3, 4) == 81 and T.pow(symbol("a"), 3).dtype == "int32"
    assert value_of(T.pow(symbol("a"), 3), a=-2) == -8


@pytest.mark.parametrize("a", [-7, 7, 0, 6])
@pytest.mark.parametrize("b", [2, -2, 3])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (T.floordiv, lambda a, b: a // b),
        (T.floormod, lambda a, b: a % b),
        (T.truncdiv, lambda a, b: int(a / b)),
        (T.truncmod, lambda a, b: int(math.fmod(a, b))),
        (T.min, min),
        (T.max, max),
        (T.bitwise_and, lambda a, b: a & b),
        (T.bitwise_or, lambda a, b: a | b),
        (T.bitwise_xor, lambda a, b: a ^ b),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_integer_functions_agree_on_numbers_and_traced_values(function, expected, a, b):
    assert function(a, b) == expected(a, b)
    assert value_of(function(symbol("a"), symbol("b")), a=a, b=b) == expected(a, b)
    assert value_of(function(symbol("a"), b), a=a) == expected(a, b)
    assert value_of(function(a, symbol("b")), b=b) == expected(a, b)


@pytest.mark.parametrize(("a", "b"), [(0, 4), (1, 4), (4, 4), (5, 4), (1017, 128)])
def test_ceildiv_rounds_up(a, b):
    assert T.ceildiv(a, b) == -(-a // b)
    assert T.ceildiv(np.int64(a), b) == -(-a // b)
    assert value_of(T.ceildiv(symbol("a"), b), a=a) == -(-a // b)


def test_truncdiv_of_unsigned_values_is_plain_division():
    assert value_of(T.truncdiv(symbol("a", "uint32"), 3), a=2**32 - 1) == (2**32 - 1) // 3


def test_shifts_keep_the_sign():
    assert T.shift_left(3, 4) == 48 and T.shift_right(-16, 2) == -4
    assert value_of(T.shift_left(symbol("a"), 4), a=3) == 48
    assert value_of(T.shift_right(symbol("a"), 2), a=-16) == -4
    assert T.bitwise_not(5) == -6 and T.bitwise_not(True) is False
    assert value_of(T.bitwise_not(symbol("a")), a=5) == -6


@pytest.mark.parametrize("x", [0, 1, 255, -1, 2**31 - 1])
def test_bit_counts_agree_on_numbers_and_traced_values(x):
    bits = x & 0xFFFFFFFF
    assert T.popcount(x) == bits.bit_count() == value_of(T.popcount(symbol("x")), x=x)
    assert T.clz(x) == 32 - bits.bit_length() == value_of(T.clz(symbol("x")), x=x)


def test_min_and_max_promote_like_arithmetic():
    assert T.max(symbol("a"), 0.5).dtype == "float32"
    assert T.min(symbol("a", "float16"), 1.0).dtype == "float16"
    assert T.max(math.nan, 1.0) == 1.0 and T.min(2.0, math.nan) == 2.0


def test_clamp_bounds_on_both_sides():
    assert [T.clamp(x, -1, 1) for x in (-3, 0, 3)] == [-1, 0, 1]
    traced = T.clamp(symbol("x", "float32"), -1.0, 1.0)
    assert [value_of(traced, x=x) for x in (-3, 0.5, 3)] == [-1, 0.5, 1]


def test_predicates_know_integers_and_infinities():
    assert (T.isnan(math.nan), T.isinf(math.inf), T.isfinite(1.0)) == (True, True, True)
    x = symbol("x", "float16")
    assert value_of(T.isnan(x), x=math.nan) is True
    assert value_of(T.isinf(x), x=-math.inf) is True
    assert value_of(T.isfinite(x), x=math.inf) is False
    assert bool(T.isnan(symbol("i"))) is False and bool(T.isfinite(symbol("i"))) is True


def test_bit_counts_of_a_traced_value_that_folds_stay_traced():
    x = symbol("x", "int8")
    for count, number in ((T.popcount(x % 1), 0), (T.clz(x - x), 8)):
        assert isinstance(count, Value) and count.dtype == "int8"
        assert value_of(count) == number


def test_if_then_else_selects_and_promotes():
    x = symbol("x")
    assert T.if_then_else(True, 1, 2) == 1 and T.Select(False, 1, 2) == 2
    chosen = T.if_then_else(x > 0, x, 0.5)
    assert chosen.dtype == "float32"
    assert (value_of(chosen, x=3), value_of(chosen, x=-3)) == (3.0, 0.5)
    assert value_of(T.Select(x, 1, 2), x=5) == 1


def test_cast_converts_numbers_and_values():
    assert T.cast(symbol("x", "float32"), "int8").dtype == "int8"
    assert T.Cast("float16", symbol("x")).dtype == "float16"
    assert int(T.cast(1.75, "int32")) == 1
    assert value_of(T.cast(symbol("x", "float32"), "int32"), x=-1.75) == -1
    assert T.float16(symbol("x")).dtype == "float16" and T.float16(1.5) == np.float16(1.5)


def test_reinterpret_keeps_the_bits_in_either_argument_order():
    x = symbol("x", "float32")
    bits = int(np.float32(1.5).view(np.uint32))
    assert value_of(T.reinterpret(x, "uint32"), x=1.5) == bits
    assert value_of(T.reinterpret("uint32", x), x=1.5) == bits
    assert value_of(T.reinterpret(np.float32(1.5), "uint32")) == bits


def test_limits_of_dtypes():
    assert T.infinity("float32") == np.inf and T.infinity(T.bfloat16) == ml_dtypes.bfloat16("inf")
    assert -T.infinity("float16") == -np.inf
    assert (T.min_value("int8"), T.max_value("uint16")) == (-128, 65535)
    assert T.max_value("float16") == 65504.0


def test_dtype_normalises_every_spelling():
    assert T.dtype("half") is T.float16 and T.dtype(np.float32) is T.float32
    assert str(T.dtype("float8_e4m3")) == "float8_e4m3fn"
    names = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32"
    for name in names.split() + ["float64", "tfloat32", "float8_e4m3fn", "float8_e5m2"]:
        assert getattr(T, name) == name
    for alias, name in (("half", "float16"), ("float", "float32"), ("double", "float64"),
                        ("short", "int16"), ("int", "int32"), ("uint", "uint32"),
                        ("long", "int64"), ("tf32", "tfloat32")):  # fmt: skip
        assert getattr(T, alias) == name


def test_functions_take_variables_and_elements_inside_a_kernel():
    A = tensor("A", (8,), "float16")
    with kernel():
        x = T.alloc_var("int32", 3)
        assert T.exp(A[0]).dtype == "float16"
        assert T.max(x, 0).dtype == "int32"
        assert T.ceildiv(x, 2).dtype == "int32"


# -- errors


def test_function_of_a_tile_is_refused():
    with kernel():
        s = T.alloc_shared((8, 8), "float32")
        with refused(
            ArgumentTypeError,
            "`s` is a tile, where one number is needed.",
            "Index it, for example inside `for i, j in T.Parallel(...)`: `A[i, j]`.",
        ):
            T.exp(s)


def test_function_of_something_else_is_refused():
    with refused(
        ArgumentTypeError,
        "T.exp: 'x' is not a number or a traced value.",
        "Tiles are computed element by element in T.Parallel.",
    ):
        T.exp("x")
    with refused(
        ArgumentTypeError,
        "T.max: None is not a number or a traced value.",
        "Tiles are computed element by element in T.Parallel.",
    ):
        T.max(None, 1)


def test_division_by_zero_is_refused():
    for function in (T.ceildiv, T.floordiv, T.floormod, T.truncdiv, T.truncmod):
        for x in (4, symbol("x")):
            with refused(ArgumentError, f"T.{function.__name__}: the divisor is 0."):
                function(x, 0)


def test_integer_functions_of_floats_are_refused():
    with refused(ArgumentTypeError, "T.ceildiv takes integers, not 4.5."):
        T.ceildiv(4.5, 2)
    with refused(ArgumentTypeError, "T.truncdiv takes integers, not a float32 value."):
        T.truncdiv(symbol("x", "float32"), 2)
    with refused(DTypeError, "T.popcount takes integers, not float32."):
        T.popcount(symbol("x", "float32"))
    with refused(
        DTypeError,
        "T.bitwise_and takes integers, not float32.",
        'Take the bits first: `T.reinterpret(x, "uint32")`.',
    ):
        T.bitwise_and(symbol("x", "float32"), 1)


def test_reinterpret_of_another_width_is_refused():
    with refused(
        DTypeError,
        "T.reinterpret: float32 has 32 bits, but int16 has 16.",
        "T.cast converts values between dtypes of any width.",
    ):
        T.reinterpret(symbol("x", "float32"), "int16")


def test_infinity_of_a_dtype_without_one_is_refused():
    with refused(DTypeError, "int32 has no infinity.", "Its largest value is 2147483647."):
        T.infinity("int32")
    with refused(DTypeError, "float8_e4m3fn has no infinity.", "Its largest value is 448.0."):
        T.infinity("float8_e4m3fn")
