"""Arguments against declarations, and index expressions on the host."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit import dtypes
from tilejit.dtypes import int32
from tilejit.errors import ArgumentError, DTypeError, ShapeError
from tilejit.ir.analysis import MAX_SYMBOL
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var, VarKind, arith, binary, cast, ceildiv, const, index, select
from tilejit.runtime import arrays
from tilejit.runtime.host import host_function
from tilejit.runtime.matching import Matcher, scalar_value


def symbol(name, low=0):
    return Var(name, int32, VarKind.SYMBOL, low=None if low is None else const(low))


M, N = symbol("M"), symbol("N")


def declare(shape, dtype="float32", strides=None):
    return Buffer(
        name="A",
        shape=tuple(index(e) for e in shape),
        dtype=dtypes.as_dtype(dtype),
        scope=Scope.GLOBAL,
        strides=None if strides is None else tuple(index(s) for s in strides),
    )


def match(*pairs):
    names = "ABC"
    declared = [(names[n], buffer) for n, (buffer, _) in enumerate(pairs)]
    return Matcher("f", declared).match([arrays.read(x) for _, x in pairs])


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def test_symbols_take_the_extents_of_the_arguments():
    assert match((declare((M, N)), zeros(3, 5)), (declare((N, 4)), zeros(5, 4))) == {M: 3, N: 5}


def test_expression_with_one_unknown_is_solved():
    assert match((declare((arith("mul", M, 4),)), zeros(12))) == {M: 3}
    assert match((declare((arith("add", arith("mul", 2, M), 1),)), zeros(7))) == {M: 3}


def test_expression_waits_for_the_symbols_of_later_arguments():
    total = arith("add", M, N)
    got = match((declare((total,)), zeros(9)), (declare((M,)), zeros(4)))
    assert got == {M: 4, N: 5}


def test_expression_of_known_symbols_is_checked():
    pairs = (declare((M,)), zeros(9)), (declare((ceildiv(M, 4),)), zeros(2))
    with pytest.raises(ShapeError, match=r"^f: B has extent 2 in dimension 0, but it was declared"):
        match(*pairs)


def test_strides_bind_symbols_and_may_be_negative():
    step = symbol("s", low=None)
    x = zeros(10)[::-2]
    assert match((declare((M,), strides=(step,)), x)) == {M: 5, step: -2}


def test_stride_of_a_single_element_is_not_compared():
    assert match((declare((1, 4), strides=(100, 1)), zeros(1, 4))) == {}


CASES = {
    "f: A has dtype float64, but it was declared float32.": (
        DTypeError,
        [(declare((4,)), np.zeros(4))],
    ),
    "f: A has 1 dimension, but it was declared with 2.": (
        ShapeError,
        [(declare((4, 4)), zeros(4))],
    ),
    "f: A has extent 5 in dimension 1, but it was declared 8.": (
        ShapeError,
        [(declare((M, 8)), zeros(3, 5))],
    ),
    "f: M is 3 in A and 4 in B.": (
        ShapeError,
        [(declare((M,)), zeros(3)), (declare((M,)), zeros(4))],
    ),
    "f: A is not contiguous: its strides are (1, 4), but (4, 1) were declared.": (
        ShapeError,
        [(declare((4, 4)), zeros(4, 4).T)],
    ),
    "f: A has stride 6 in dimension 0, but it was declared 8.": (
        ShapeError,
        [(declare((4, 3), strides=(8, 1)), zeros(4, 6)[:, :3])],
    ),
    "f: A has extent 7 in dimension 0, but it was declared `M * 4`.": (
        ShapeError,
        [(declare((arith("mul", M, 4),)), zeros(7))],
    ),
    "f: the shapes of the arguments do not say what M and N are.": (
        ArgumentError,
        [(declare((arith("mul", 2, arith("add", M, N)),)), zeros(8))],
    ),
    "f: M is -1, but it was declared a size, which is not negative.": (
        ArgumentError,
        [(declare((arith("add", M, 3),)), zeros(2))],
    ),
    f"f: A has extent {MAX_SYMBOL + 1} in dimension 0; one that is known only at run time may be "
    f"at most {MAX_SYMBOL}.": (
        ShapeError,
        [(declare((M,), "int8"), np.broadcast_to(np.int8(0), MAX_SYMBOL + 1))],
    ),
}


@pytest.mark.parametrize("headline", CASES)
def test_wrong_argument_is_said_with_both_numbers(headline):
    error, pairs = CASES[headline]
    with pytest.raises(error) as caught:
        match(*pairs)
    assert caught.value.headline == headline


def test_tfloat32_takes_float32_arrays():
    assert match((declare((4,), "tfloat32"), zeros(4))) == {}


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("int32", 7, 7),
        ("int32", np.int64(7), 7),
        ("float32", 2, 2.0),
        ("float16", 0.1, float(np.float16(0.1))),
        ("bfloat16", 1.0, 1.0),
        ("bool", True, True),
        ("uint8", 255, 255),
    ],
)
def test_scalar_argument_becomes_a_number_of_its_dtype(dtype, value, expected):
    got = scalar_value("f", "alpha", value, dtypes.as_dtype(dtype))
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("dtype", "value", "error", "headline"),
    [
        ("int8", 300, ArgumentError, "f: alpha: 300 does not fit int8 (-128 to 127)."),
        ("int32", 1.5, ArgumentError, "f: alpha: 1.5 is not a whole number, so it is no int32."),
        (
            "float32",
            [1],
            DTypeError,
            "f: alpha is a list, but it was declared a float32 number.",
        ),
        (
            "float16",
            1e9,
            ArgumentError,
            "f: alpha: 1000000000.0 does not fit float16 (largest finite value 65504.0).",
        ),
    ],
)
def test_scalar_argument_that_does_not_fit_is_refused(dtype, value, error, headline):
    with pytest.raises(error) as caught:
        scalar_value("f", "alpha", value, dtypes.as_dtype(dtype))
    assert caught.value.headline == headline


def test_host_function_computes_as_python_does():
    exprs = (
        ceildiv(M, 128),
        binary("floormod", M, N),
        binary("min", M, N),
        select(binary("lt", M, N), const(1), const(2)),
        cast(arith("sub", N, M), dtypes.int64),
        const(5),
    )
    assert host_function(exprs, (M, N))(-300, 7) == (-2, 1, -300, 1, 307, 5)
    assert host_function((), ())() == ()
