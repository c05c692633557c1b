"""Traced scalars: promotion, folding, and what Python may not do with them."""

import numpy as np
import pytest

import tilejit.language as T
from tilejit.dtypes import (
    bfloat16,
    bool_,
    float16,
    float32,
    float64,
    int8,
    int32,
    int64,
    uint8,
    uint32,
)
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError, TraceError
from tilejit.ir.expr import Var, VarKind, is_const, show
from tilejit.language.value import Value, as_expr, as_index


def value(dtype, name="x"):
    return Value(Var(name, dtype, VarKind.SCALAR))


@pytest.mark.parametrize(
    ("left", "right", "result"),
    [
        (int8, uint8, "int16"),
        (int32, uint32, "int64"),
        (float16, float32, "float32"),
        (int64, float16, "float16"),
        (uint8, bfloat16, "bfloat16"),
        (float32, float64, "float64"),
        (bool_, int8, "int8"),
    ],
)
def test_add_of_two_dtypes_promotes_as_numpy_2_but_integers_follow_floats(left, right, result):
    assert (value(left) + value(right)).dtype == result
    assert (value(right) * value(left)).dtype == result


@pytest.mark.parametrize(
    ("dtype", "number", "result"),
    [
        (float16, 1.5, "float16"),
        (float16, 2, "float16"),
        (int8, 3, "int8"),
        (int8, True, "int8"),
        (int32, 1.5, "float32"),
        (bool_, 1, "int32"),
        (int32, 1 << 40, "int64"),
        (float64, 0.1, "float64"),
    ],
)
def test_python_numbers_are_weak_operands(dtype, number, result):
    assert (value(dtype) + number).dtype == result
    assert (number + value(dtype)).dtype == result


def test_numpy_scalars_are_strong_operands_on_both_sides():
    assert (value(float16) + np.float32(1)).dtype == "float32"
    assert (np.float64(1) * value(float16)).dtype == "float64"


def test_integer_division_gives_float32_and_floor_division_keeps_integers():
    x, y = value(int32), value(int32, "y")
    assert (x / y).dtype == "float32"
    assert (x // y).dtype == "int32"
    assert (value(float16) / 3).dtype == "float16"


def test_constant_integer_out_of_range_of_a_narrow_dtype_is_refused():
    with pytest.raises(ArgumentError) as caught:
        value(uint8) + 300
    assert caught.value.headline == "The operand 300 does not fit uint8 (0 to 255)."
    assert caught.value.hint.startswith("Cast the other operand to a wider dtype")


def test_comparison_with_an_out_of_range_integer_compares_the_numbers():
    assert (value(uint8) < 300).dtype == "bool"
    assert (np.int64(300) > value(uint8)).dtype == "bool"


def test_small_constant_powers_become_products():
    x = value(float32)
    assert show((x**2).expr) == "x * x"
    assert show((x**3.0).expr) == "(x * x) * x"
    assert is_const((x**0).expr, 1.0)
    assert show((x**0.5).expr) == "x ** 0.5"


def test_integer_division_by_a_zero_constant_is_refused():
    with pytest.raises(ArgumentError, match=r"^Integer division by zero\."):
        value(int32) // 0


def test_bit_operations_on_floats_are_refused():
    with pytest.raises(DTypeError) as caught:
        value(float32) & 1
    assert caught.value.headline == "`&` needs integers or bools, got float32."


def test_negation_of_a_bool_is_refused_with_what_to_write():
    with pytest.raises(DTypeError) as caught:
        -value(bool_)
    assert caught.value.headline == "A bool has no negative."


def test_float16_with_bfloat16_has_no_common_type():
    with pytest.raises(DTypeError, match=r"^float16 and bfloat16 have no common type\."):
        value(float16) + value(bfloat16)


@pytest.mark.parametrize(
    ("use", "headline"),
    [
        (bool, "`x` is only known when the kernel runs, so Python cannot decide on it."),
        (int, "`x` is only known when the kernel runs; int() needs its number now."),
        (float, "`x` is only known when the kernel runs; float() needs its number now."),
        (range, "`x` is only known when the kernel runs; Python needs its number now."),
        (len, "A traced scalar has no length."),
        (list, "`x` is one number, so it cannot be unpacked or iterated over."),
        (hash, "A traced value cannot be hashed: its number is only known when the kernel runs."),
        (round, "Python's `round` needs a number now."),
        (np.exp, "NumPy cannot compute with a traced value."),
        (lambda x: 3 in x, "`in` cannot look into a traced scalar."),
    ],
)
def test_python_protocols_of_a_traced_value_raise_with_advice(use, headline):
    if use is np.exp:
        use = np.asarray
    with pytest.raises(TraceError) as caught:
        use(value(int32))
    assert caught.value.headline == headline
    assert caught.value.hint


def test_truth_of_a_traced_value_names_all_three_ways_to_write_it():
    with pytest.raises(TraceError) as caught:
        bool(value(int32) < 3)
    assert caught.value.headline.startswith("`x < 3` is only known when the kernel runs")


def test_python_min_of_traced_values_points_at_the_tile_function():
    x = value(int32)
    with pytest.raises(TraceError) as caught:
        min(x, 3)
    assert caught.value.hint == "Write `T.min(a, b)`."


def test_constant_values_convert_silently():
    three = Value(as_expr(3))
    assert int(three) == 3
    assert list(range(three)) == [0, 1, 2]
    assert bool(three)
    assert [10, 11, 12, 13][three] == 13


def test_as_index_refuses_floats_and_bools():
    with pytest.raises(ArgumentTypeError) as caught:
        as_index(1.5, "row")
    assert caught.value.headline == "The row must be an integer, got 1.5."
    with pytest.raises(ArgumentTypeError, match=r"^The row must be an integer, got True\."):
        as_index(True, "row")
    with pytest.raises(
        ArgumentTypeError, match=r"^The row must be an integer, got a float32 value"
    ):
        as_index(value(float32), "row")


def test_as_index_widens_narrow_and_unsigned_integers():
    assert as_index(value(int8)).dtype is int32
    assert as_index(value(uint32)).dtype is int64
    assert as_index(value(int64)).dtype is int64


def test_operand_that_is_no_number_is_named():
    with pytest.raises(ArgumentTypeError) as caught:
        value(int32) + "a"
    assert caught.value.headline == "The operand must be a number or a traced value, got 'a'."


def test_dtype_called_on_a_value_casts_it():
    assert T.float16(value(int32)).dtype == "float16"
    assert value(int32).astype("uint8").dtype == "uint8"


def test_numpy_function_of_a_traced_value_points_at_the_tile_function():
    with pytest.raises(TraceError) as caught:
        np.exp(value(float32))
    assert caught.value.headline == "`np.exp` cannot compute with a traced value."
    assert caught.value.hint.endswith("such as `T.exp(x)`.")


def test_array_as_an_operand_is_refused_on_both_sides():
    for use in (lambda x: x + np.ones(3), lambda x: np.ones(3) * x):
        with pytest.raises(ArgumentTypeError) as caught:
            use(value(float32))
        assert caught.value.headline == (
            "The operand must be a number or a traced value, got an object of type ndarray."
        )
