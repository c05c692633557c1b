"""Which constants are hidden from the assembler: those that left operands in registers may hold."""

from __future__ import annotations

import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.ir.expr import Op
from tilejit.ir.expr import walk as parts
from tilejit.ir.node import Store, walk
from tilejit.ops.copy import Fill

BF16 = "bfloat16"


@T.macro
def filled(p, t, s, X):
    T.fill(p, 2)


@T.macro
def filled_in_part(p, t, s, X):
    for i, j in T.Parallel(64, 32):
        if j < 16:
            p[i, j] = X[i]
        else:
            p[i, j] = 1


@T.macro
def chosen(p, t, s, X):
    for i, j in T.Parallel(64, 32):
        p[i, j] = T.if_then_else(j < 16, X[i], 0)


@T.macro
def through_others(p, t, s, X):
    T.fill(t, 3)
    for i, j in T.Parallel(64, 32):
        p[i, j] = t[i, j] * 2


@T.macro
def of_where_it_is(p, t, s, X):
    for i, j in T.Parallel(64, 32):
        p[i, j] = T.cast(i < j, "float32")


@T.macro
def beyond_the_end(p, t, s, X):
    for i, j in T.Parallel(64, 32):
        p[i, j] = X[i + j]


@T.macro
def computed(p, t, s, X):
    for i, j in T.Parallel(64, 32):
        p[i, j] = T.exp2(T.if_then_else(i < j, X[i], -T.infinity("float32")) - X[j])


@T.macro
def computed_of_constants(p, t, s, X):
    for i, j in T.Parallel(64, 32):
        p[i, j] = T.exp2(T.if_then_else(j < 16, X[i], -T.infinity("float32")))


@T.macro
def chosen_by_values(p, t, s, X):
    for i, j in T.Parallel(64, 32):
        p[i, j] = T.if_then_else(X[j] > 0, X[i], 0)


@T.macro
def overwritten(p, t, s, X):
    T.fill(p, 0)
    for i, j in T.Parallel(64, 32):
        p[i, j] = X[i]


def hidden(make, size=64, target="sm_90a"):
    """How many stores and fills hide what they store."""

    @tilejit
    def product(B: T.Tensor, X: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            b = T.alloc_shared((32, 32), BF16)
            p = T.alloc_fragment((64, 32), BF16)
            t = T.alloc_fragment((64, 32), "float32")
            acc = T.alloc_fragment((64, 32), "float32")
            T.copy(B, b)
            make(p, t, acc, X)
            T.gemm(p, b, acc, clear_accum=True)
            T.copy(acc, C)

    specs = T.Tensor((32, 32), BF16), T.Tensor((size,), "float32"), T.Tensor((64, 32), "float32")
    (frame,) = product.compile(*specs, target=target).kernels
    values = [n.value for n in walk(frame.planned.body) if isinstance(n, Store | Fill)]
    return sum(any(isinstance(e, Op) and e.op == "hidden" for e in parts(v)) for v in values)


@pytest.mark.parametrize("make, count", [
    (filled, 1), (filled_in_part, 1), (chosen, 1), (through_others, 1), (of_where_it_is, 1),
    (beyond_the_end, 1), (computed, 0), (overwritten, 0),
    (computed_of_constants, 1), (chosen_by_values, 0),
])  # fmt: skip
def test_constants_that_may_be_left_operands_are_hidden(make, count):
    assert hidden(make) == count


def test_what_is_surely_in_the_tensor_is_no_constant():
    assert hidden(beyond_the_end, size=128) == 0


def test_other_chips_need_nothing_hidden():
    assert hidden(filled, target="sm_80") == 0


def test_stores_to_tensors_whose_extents_the_call_knows_are_none_of_its_business():
    @tilejit
    def product(B: T.Tensor, C: T.Tensor[[T.dynamic("M"), T.dynamic("N")], T.float32]):
        with T.Kernel(1, threads=128):
            b = T.alloc_shared((32, 32), BF16)
            p = T.alloc_fragment((64, 32), BF16)
            acc = T.alloc_fragment((64, 32), "float32")
            T.copy(B, b)
            T.fill(p, 1)
            T.gemm(p, b, acc, clear_accum=True)
            for i, j in T.Parallel(64, 32):
                C[i, j] = acc[i, j]

    kernel = product.compile(T.Tensor((32, 32), BF16), target="sm_90a")
    fills = [n for n in walk(kernel.kernels[0].planned.body) if isinstance(n, Fill)]
    assert [n.value.op for n in fills] == ["hidden"]
