"""Allocations: every form of tilejit.language.allocate and each error."""

import numpy as np
import pytest
from traced import function, kernel, refused, tensor

import tilejit.language as T
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    TraceError,
    UnsupportedError,
)
from tilejit.ir.buffer import Scope
from tilejit.ir.expr import Const, VarKind, int_value, show
from tilejit.ir.node import Load, Store
from tilejit.language.allocate import MAX_ARRIVALS

ALLOCATORS = [
    (T.alloc_shared, "T.alloc_shared", Scope.SHARED, "shared"),
    (T.alloc_local, "T.alloc_local", Scope.LOCAL, "local"),
    (T.alloc_fragment, "T.alloc_fragment", Scope.FRAGMENT, "fragment"),
]


@pytest.mark.parametrize(("alloc", "what", "scope", "default"), ALLOCATORS)
def test_alloc_gives_its_shape_dtype_and_scope(alloc, what, scope, default):
    with kernel():
        tile = alloc((64, 32), "float16")
        row = alloc(np.int32(7), T.float32)
        lists = alloc([4, 4], np.dtype("int8"))
        unnamed = [alloc(4, "int8")][0]
    assert (tile.shape, tile.dtype, tile.scope) == ((64, 32), "float16", scope)
    assert tile.strides == (32, 1)
    assert (row.shape, row.dtype) == ((7,), "float32")
    assert (lists.shape, lists.dtype) == ((4, 4), "int8")
    assert [b.name for b in (tile, row, lists)] == ["tile", "row", "lists"]
    assert unnamed.name in (default, "unnamed")


def test_statements_that_share_a_line_name_their_own_tiles():
    with kernel():
        a = T.alloc_shared((64, 32), "int8"); b = T.alloc_shared((64, 32), "int8")  # noqa: E702  # fmt: skip
    assert [a.name, b.name] == ["a", "b"]


@pytest.mark.parametrize(("alloc", "what", "scope", "default"), ALLOCATORS)
def test_alloc_outside_a_kernel_is_refused(alloc, what, scope, default):
    with refused(
        TraceError,
        f"{what} is only allowed inside a kernel.",
        "Put it under `with T.Kernel(...) as ...:` in a @tilejit function.",
    ):
        alloc((64, 32), "float16")
    with (
        function(),
        refused(
            TraceError,
            f"{what} is only allowed inside a kernel.",
            "Put it under `with T.Kernel(...) as ...:` in a @tilejit function.",
        ),
    ):
        alloc((64, 32), "float16")


@pytest.mark.parametrize(("alloc", "what", "scope", "default"), ALLOCATORS)
def test_alloc_with_extents_that_are_none_is_refused(alloc, what, scope, default):
    n = T.dynamic("n")
    with kernel():
        with refused(
            ShapeError,
            f"{what}: extent 1 is 0; a tile has at least one element.",
            "Allocate nothing, or give a positive extent.",
        ):
            alloc((4, 0), "float16")
        with refused(
            ShapeError,
            f"{what}: extent 0 is -4; it must not be negative.",
            "Give the number of elements; T.dynamic makes one that is known at the call.",
        ):
            alloc((-4, 4), "float16")
        with refused(
            ShapeError,
            f"{what}: extent 0 is `n * 2`, which is known only at run time.",
            "Give the tile a constant extent; T.copy stops at a tensor's edge by itself.",
        ):
            alloc((n * 2,), "float16")
        with refused(
            ArgumentTypeError,
            f"{what}: extent 0 is 8.0, not an integer.",
            "Use integer division, `//`.",
        ):
            alloc((16 / 2,), "float16")


@pytest.mark.parametrize(("alloc", "what", "scope", "default"), ALLOCATORS)
def test_alloc_with_an_unknown_dtype_is_refused(alloc, what, scope, default):
    with (
        kernel(),
        refused(DTypeError, "'bfloat' is not a dtype that tilejit knows.", 'Did you mean "float"?'),
    ):
        alloc((4,), "bfloat")


def test_alloc_takes_constant_values_of_symbols_folded_away():
    with kernel():
        assert T.alloc_shared((T.ceildiv(T.int32(100), 8) * 1, 4), "int8").shape == (13, 4)


def test_alloc_takes_only_its_own_scopes():
    with kernel():
        assert T.alloc_shared(4, "int8", scope="shared").scope == "shared.dyn"
        assert T.alloc_shared(4, "int8", "shared.dyn").scope == "shared.dyn"
        assert T.alloc_local(4, "int8", "local").scope == "local"
        assert T.alloc_fragment(4, "int8", "local.fragment").scope == "local.fragment"
        assert T.alloc_fragment(4, "int8", "local").scope == "local"
        with refused(
            ArgumentError,
            'T.alloc_shared: scope "local" is not one it can have.',
            'Scopes: "shared", "shared.dyn".',
        ):
            T.alloc_shared(4, "int8", "local")
        with refused(
            ArgumentError,
            'T.alloc_fragment: scope "shared" is not one it can have.',
            'Scopes: "local", "local.fragment".',
        ):
            T.alloc_fragment(4, "int8", "shared")
        with refused(
            ArgumentError,
            'T.alloc_local: scope "shared.tmem" is not one it can have.',
            'Scopes: "local".',
        ):
            T.alloc_local(4, "int8", "shared.tmem")


# -- alloc_var


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: T.alloc_var("int32"), 0),
        (lambda: T.alloc_var("int32", 1), 1),
        (lambda: T.alloc_var("int32", "local.var"), 0),
        (lambda: T.alloc_var("int32", 1, "local.var"), 1),
        (lambda: T.alloc_var("int32", "local.var", init=1), 1),
        (lambda: T.alloc_var("int32", init=1), 1),
        (lambda: T.alloc_var("int32", init=1, scope="local.var"), 1),
        (lambda: T.alloc_var("int32", scope="local.var"), 0),
        (lambda: T.alloc_var(T.int32, np.int8(3)), 3),
        (lambda: T.alloc_var("int32", 2.0), 2),
    ],
)
def test_alloc_var_every_form_stores_its_initial_value(make, value):
    with kernel() as nodes:
        x = make()
    (store,) = nodes
    assert isinstance(store, Store) and store.buffer is x.buffer
    assert int_value(store.value) == value and store.value.dtype == "int32"
    assert (x.scope, x.shape) == ("local.var", (1,))


def test_alloc_var_keeps_a_float64_exact():
    with kernel() as nodes:
        T.alloc_var("float64", 0.1)
    assert isinstance(nodes[0].value, Const) and nodes[0].value.value == 0.1


def test_alloc_var_of_ptr_is_an_int64():
    with kernel():
        assert T.alloc_var(T.ptr).dtype == "int64"


def test_alloc_var_from_an_element_stores_the_value_of_that_moment():
    A = tensor("A", (8,), "float16")
    with kernel() as nodes:
        x = T.alloc_var("float32", init=A[3])
        A[3] = 0
    load, store, _ = nodes
    assert isinstance(load, Load)
    assert show(store.value) == f"float32({load.out.name})" and x.name == "x"


def test_alloc_var_from_another_variable_reads_it_first():
    with kernel() as nodes:
        a = T.alloc_var("int32", 5)
        T.alloc_var("int32", a)
    assert [type(n) for n in nodes] == [Store, Load, Store]
    assert nodes[2].value is nodes[1].out


def test_alloc_var_out_of_range_is_refused_with_the_range():
    with kernel():
        with refused(
            ArgumentError,
            "300 does not fit int8 (-128 to 127).",
            "Choose a wider dtype, or a number that fits.",
        ):
            T.alloc_var("int8", 300)
        with refused(
            ArgumentError,
            "-1 does not fit uint8 (0 to 255).",
            "Choose a wider dtype, or a number that fits.",
        ):
            T.alloc_var("uint8", init=-1)
        with refused(
            ArgumentError,
            "0.5 is not a whole number, so it is no int32.",
            "Round it, or choose a floating-point dtype.",
        ):
            T.alloc_var("int32", 0.5)
        with refused(
            ArgumentError,
            "1e+300 does not fit float32 (largest finite value 3.4028234663852886e+38).",
            "Choose a wider dtype, or a number that fits.",
        ):
            T.alloc_var("float32", 1e300)


def test_alloc_var_infinity_is_a_float():
    with kernel() as nodes:
        T.alloc_var("float32", -T.infinity("float32"))
        T.alloc_var("float16", float("inf"))
    assert [n.value.value for n in nodes] == [float("-inf"), float("inf")]


def test_alloc_var_misused_arguments_are_refused():
    with kernel():
        with refused(
            ArgumentTypeError,
            "T.alloc_var: the initial value is given twice.",
            "Keep either the positional one or `init=`.",
        ):
            T.alloc_var("int32", 1, init=2)
        with refused(ArgumentTypeError, "T.alloc_var: the scope must be a string, not 3."):
            T.alloc_var("int32", 1, 3)
        with refused(
            ArgumentTypeError,
            "T.alloc_var takes at most 3 positional arguments but got 4.",
            "Write T.alloc_var(dtype, init=value).",
        ):
            T.alloc_var("int32", 1, "local.var", 4)
        with refused(ArgumentTypeError, "T.alloc_var: the scope is given twice."):
            T.alloc_var("int32", 1, "local.var", scope="local.var")
        with refused(
            ArgumentError,
            'T.alloc_var: scope "shared" is not one it can have.',
            'Scopes: "local.var".',
        ):
            T.alloc_var("int32", "shared")
        with refused(
            ArgumentTypeError,
            "The initial value of T.alloc_var must be a number or a traced value, "
            "got an object of type list.",
        ):
            T.alloc_var("int32", [1])


def test_alloc_var_outside_a_kernel_is_refused():
    with refused(
        TraceError,
        "T.alloc_var is only allowed inside a kernel.",
        "Put it under `with T.Kernel(...) as ...:` in a @tilejit function.",
    ):
        T.alloc_var("int32")


# -- alloc_barrier


def test_alloc_barrier_makes_one_or_several():
    with kernel():
        one = T.alloc_barrier(128)
        several = T.alloc_barrier([32, np.int64(64), 128])
    assert (one.buffer.arrive_counts, one.shape, one.scope) == ((128,), (1,), "shared.barrier")
    assert several.buffer.arrive_counts == (32, 64, 128)
    assert (several.shape, several.dtype, several.name) == ((3,), "uint64", "several")


def test_alloc_barrier_refuses_counts_that_no_phase_has():
    with kernel():
        with refused(
            ArgumentError,
            f"T.alloc_barrier: the arrive count is 0; a phase takes 1 to {MAX_ARRIVALS} arrivals.",
            "Count the threads that arrive: 1, or as many as T.Kernel has.",
        ):
            T.alloc_barrier(0)
        with refused(
            ArgumentError,
            f"T.alloc_barrier: arrive count 1 is -3; a phase takes 1 to {MAX_ARRIVALS} arrivals.",
            "Count the threads that arrive: 1, or as many as T.Kernel has.",
        ):
            T.alloc_barrier([1, -3])
        with refused(ArgumentError, "T.alloc_barrier: the list of arrive counts is empty."):
            T.alloc_barrier([])
        with refused(
            ArgumentTypeError,
            "T.alloc_barrier: the arrive count is 1.5, not an integer.",
            "It is a constant: how many arrivals complete a phase.",
        ):
            T.alloc_barrier(1.5)
        with refused(
            ArgumentTypeError,
            "T.alloc_barrier: the arrive count is True, not an integer.",
            "It is a constant: how many arrivals complete a phase.",
        ):
            T.alloc_barrier(True)


def test_alloc_barrier_outside_a_kernel_is_refused():
    with refused(
        TraceError,
        "T.alloc_barrier is only allowed inside a kernel.",
        "Put it under `with T.Kernel(...) as ...:` in a @tilejit function.",
    ):
        T.alloc_barrier(1)


# -- empty, alloc_global


def test_empty_makes_an_output_of_the_call():
    M = T.dynamic("M")
    with function() as trace:
        C = T.empty((M, 32), "float16")
        D = T.empty(4, 8, dtype="int8")
        E = T.empty(4, 8)
        F = T.empty(4, 8, T.float16)
        G = T.empty(4)
    assert trace.outputs == [x.buffer for x in (C, D, E, F, G)]
    assert [repr(x) for x in C.shape] == ["M", "32"]
    assert [x.dtype.name for x in (C, D, E, F)] == ["float16", "int8", "float32", "float16"]
    assert [x.shape for x in (D, E, F, G)] == [(4, 8)] * 3 + [(4,)]
    assert C.name == "C" and C.buffer.data.kind is VarKind.POINTER and C.scope == "global"


def test_empty_in_the_wrong_place_is_refused():
    with refused(
        TraceError,
        "T.empty is only allowed inside a @tilejit function.",
        "Move it into the function, before `with T.Kernel(...)`.",
    ):
        T.empty(4)
    with (
        kernel(),
        refused(
            TraceError,
            "T.empty is not allowed inside a kernel.",
            "Move it before `with T.Kernel(...)`.",
        ),
    ):
        T.empty(4)
    with (
        function(),
        refused(ArgumentTypeError, "T.empty needs a shape.", "Write T.empty((M, N), dtype)."),
    ):
        T.empty()


def test_alloc_global_says_what_to_use():
    with (
        kernel(),
        refused(
            UnsupportedError,
            "T.alloc_global is not supported: a kernel does not allocate global memory.",
            "Pass a tensor as an argument, or make one with T.empty before T.Kernel.",
        ),
    ):
        T.alloc_global((4,), "float32")
