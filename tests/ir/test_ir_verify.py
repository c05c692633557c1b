"""What `verify` refuses: one broken kernel for each rule, and the good one each was made from."""

import dataclasses

import pytest

from tilejit.dtypes import as_dtype, bool_, float16, float32, int32, int64, uint64
from tilejit.errors import InternalError, Span
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import Op, Var, VarKind, arith, binary, const, index, unary
from tilejit.ir.kernel import Given, GivenLayout, Kernel, Param, ParamKind
from tilejit.ir.node import Atomic, For, If, Load, Parallel, Role, Roles, Store, While
from tilejit.ir.sync import AsyncWait, BarrierArrive, BarrierWait, SyncThreads
from tilejit.ir.verify import verify
from tilejit.layout.fragment import blocked
from tilejit.layout.shared import SharedLayout
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Reduce, ReduceKind

ZERO, ONE = const(0), const(1)


def buffer(name, shape, dtype="int32", scope=Scope.SHARED, **fields):
    shape = tuple(index(n) for n in shape)
    return Buffer(name=name, shape=shape, dtype=as_dtype(dtype), scope=scope, **fields)


DATA = Var("A", int64, VarKind.POINTER)
A = buffer("A", (8, 8), scope=Scope.GLOBAL, data=DATA)
PARAM = Param(name="A", kind=ParamKind.TENSOR, var=DATA, buffer=A)
S = buffer("s", (8, 8))
F = buffer("f", (8, 8), scope=Scope.FRAGMENT)
BX = Var("bx", int32, VarKind.BLOCK)
MBAR = buffer("mbar", (2,), "uint64", Scope.BARRIER, arrive_counts=(32, 1))


def var(name="v", dtype=int32):
    return Var(name, dtype, VarKind.VALUE)


def kernel_of(*body, **fields):
    fields.setdefault("params", (PARAM,))
    fields.setdefault("grid", (const(2),))
    fields.setdefault("threads", (32, 1, 1))
    return Kernel(name="test", block_vars=(BX,), thread_vars=(), body=body, **fields)


def assert_refused(kernel, message):
    with pytest.raises(InternalError) as caught:
        verify(kernel)
    assert caught.value.headline == message


def load(out, *place, source=A, **fields):
    return Load(out=out, buffer=source, index=place or (ZERO, ZERO), **fields)


def store(value, *place, target=A):
    return Store(buffer=target, index=place or (ZERO, ZERO), value=value)


def test_good_kernel_of_every_node_passes():
    v, w, i, j, k = (var(n) for n in "vwijk")
    x = buffer("x", (1,), scope=Scope.VAR)
    tile = buffer("t", (8, 8), "float16")
    acc = buffer("acc", (8, 8), "float32", Scope.FRAGMENT)
    positive = binary("lt", ZERO, v)
    kernel = kernel_of(
        load(v),
        If(condition=positive, then=(store(v),), orelse=(load(w), store(w))),
        While(
            test=(load(w, ZERO, source=x),),
            condition=binary("lt", w, v),
            body=(store(w, ZERO, target=x),),
        ),
        For(var=k, start=index(0), stop=v, body=(store(k, k, BX),)),
        Parallel(
            vars=(i, j),
            extents=(8, 8),
            body=(store(i, i, j, target=F), Atomic(buffer=A, index=(i, j), value=j)),
        ),
        Copy(src=Region(A, (BX, ZERO), (8, 8)), dst=whole(S)),
        Fill(dst=whole(S), value=ONE),
        Gemm(a=whole(tile), b=whole(tile), acc=whole(acc)),
        BarrierArrive(barrier=MBAR, slot=ONE),
        BarrierWait(barrier=MBAR, slot=v, parity=ZERO),
        SyncThreads(),
        AsyncWait(pending=1),
    )
    verify(kernel)
    layouts = {acc: blocked((8, 8), 32, 2)}
    shared = {S: SharedLayout((8, 8), 4), tile: SharedLayout((8, 8), 2)}
    offsets = {S: 0, tile: 256, MBAR: 384}
    verify(
        dataclasses.replace(
            kernel, fragments=layouts, shared=shared, offsets=offsets, shared_bytes=400
        )
    )


def test_variable_out_of_scope_is_refused_at_the_nodes_line():
    v = var()
    node = store(v)
    node = dataclasses.replace(node, span=Span("user.py", 12))
    with pytest.raises(InternalError) as caught:
        verify(kernel_of(If(condition=binary("lt", BX, ONE), then=(load(v),)), node))
    assert caught.value.headline == "Store: v is used where it is not defined."
    assert caught.value.span == node.span


def test_loop_variable_after_its_loop_is_refused():
    k = var("k")
    body = For(var=k, start=index(0), stop=index(3), body=())
    assert_refused(kernel_of(body, store(k)), "Store: k is used where it is not defined.")
    verify(kernel_of(body, body))


def test_value_of_a_loop_body_in_its_bounds_is_refused():
    k, v = var("k"), var("v")
    loop = For(var=k, start=ZERO, stop=v, body=(load(v),))
    assert_refused(kernel_of(loop), "For: v is used where it is not defined.")


def test_while_body_does_not_define_for_its_condition():
    v = var()
    loop = While(condition=binary("lt", v, ONE), body=(load(v),))
    assert_refused(kernel_of(loop), "While: v is used where it is not defined.")


def test_grid_cannot_use_block_variables():
    kernel = kernel_of(grid=(BX,))
    assert_refused(kernel, "kernel: bx is used where it is not defined.")


def test_pointer_of_a_buffer_must_be_in_scope_at_each_use():
    p, v = var("p", int64), var("v")
    far = Buffer(name="x", shape=(ONE,), dtype=int32, scope=Scope.GLOBAL, data=p)
    assert_refused(kernel_of(load(v, ZERO, source=far)), "Load: p is used where it is not defined.")
    table = buffer("P", (2,), "int64", Scope.GLOBAL, data=DATA)
    params = (dataclasses.replace(PARAM, buffer=table),)
    inside = If(
        condition=binary("lt", BX, ONE),
        then=(load(p, ZERO, source=table), load(v, ZERO, source=far)),
    )
    verify(kernel_of(inside, params=params))
    assert_refused(
        kernel_of(inside, load(v, ZERO, source=far), params=params),
        "Load: p is used where it is not defined.",
    )


@pytest.mark.parametrize(
    "node, message",
    [
        (store(const(1.0, float32)), "Store: float32 goes to `A` of int32."),
        (load(var("v", float32)), "Load: int32 of `A` gives float32."),
        (store(ONE, ZERO), "Store: `A` has 2 dimensions and 1 indices."),
        (store(ONE, ZERO, const(0.0, float32)), "Store: an index of dtype float32."),
        (If(condition=ONE), "If: a condition of dtype int32."),
        (While(condition=ONE), "While: a condition of dtype int32."),
        (load(var(), when=ONE), "Load: a condition of dtype int32."),
        (
            Atomic(buffer=A, index=(ZERO, ZERO), value=ONE, combine="mul"),
            "Atomic: combines by 'mul'.",
        ),
        (For(var=var(), start=ZERO, stop=ONE, step=0), "For: a step of 0."),
        (For(var=var(dtype=float32), start=ZERO, stop=ONE), "For: counts in float32."),
        (
            Parallel(vars=(var(),), extents=(4, 4)),
            "Parallel: 1 variables over extents (4, 4).",
        ),
        (
            Parallel(vars=(var(),), extents=(4,), body=(SyncThreads(),)),
            "SyncThreads: stands in a T.Parallel.",
        ),
        (
            Parallel(vars=(var(),), extents=(4,), body=(Parallel(vars=(var(),), extents=(4,)),)),
            "Parallel: stands in a T.Parallel.",
        ),
        (AsyncWait(pending=-1), "AsyncWait: -1 pending groups."),
        (
            Roles(roles=(Role("first", 0, 32),), opener=1, opening=3),
            "Roles: role 1 opens at barrier 3.",
        ),
        (
            Roles(roles=(Role("first", 0, 32),), opener=0),
            "Roles: role 0 opens at barrier 0.",
        ),
        (BarrierArrive(barrier=MBAR, slot=const(2)), "BarrierArrive: `mbar` has no slot 2."),
        (BarrierArrive(barrier=S, slot=ZERO), "BarrierArrive: `s` is no barrier."),
        (load(var("v", uint64), ZERO, source=MBAR), "Load: `mbar` is a barrier."),
        (
            Fill(dst=whole(S), value=const(0.0, float32)),
            "Fill: fills int32 with float32.",
        ),
        (
            Copy(src=whole(A), dst=whole(S), pad=const(0.0, float32)),
            "Copy: pads int32 with float32.",
        ),
        (
            Fill(dst=Region(S, (ONE, ZERO), (8, 8)), value=ONE),
            "Fill: s[1:9, 0:8] is outside of its buffer.",
        ),
        (
            Fill(dst=Region(S, (BX, ZERO), (9, 8)), value=ONE),
            "Fill: s[bx:bx + 9, 0:8] is outside of its buffer.",
        ),
        (
            Fill(dst=Region(S, (ZERO, ZERO), (2, 8), frozenset({0})), value=ONE),
            "Fill: dimension 0 of `s` is dropped.",
        ),
        (
            Gemm(a=whole(S), b=Region(S, (ZERO, ZERO), (4, 8)), acc=whole(F)),
            "Gemm: multiplies (8, 8) by (4, 8) into (8, 8).",
        ),
        (Gemm(a=whole(S), b=whole(A), acc=whole(F)), "Gemm: takes `b` from global."),
        (Gemm(a=whole(S), b=whole(S), acc=whole(S)), "Gemm: accumulates in shared.dyn."),
        (
            Reduce(src=whole(F), dst=whole(S), kind=ReduceKind.SUM, axis=1),
            "Reduce: reduces (8, 8) along 1 to (8, 8).",
        ),
        (
            Reduce(src=whole(F), dst=whole(S), kind=ReduceKind.SUM, axis=2),
            "Reduce: reduces axis 2 of (8, 8).",
        ),
        (
            Reduce(
                src=whole(S),
                dst=Region(A, (ZERO, ZERO), (8, 1)),
                kind=ReduceKind.MAX,
                axis=1,
            ),
            "Reduce: has `dst` in global.",
        ),
    ],
)
def test_malformed_node_is_refused(node, message):
    assert_refused(kernel_of(node), message)


def raw(op, dtype, *children):
    """An operation that the constructors would not make."""
    result = Op()
    result._set(op=op, dtype=dtype, children=children)
    return result


@pytest.mark.parametrize(
    "value, message",
    [
        (raw("add", int32, ONE, const(1, int64)), "add of int32, int64 as int32"),
        (raw("lt", int32, ONE, ONE), "lt of int32, int32 as int32"),
        (raw("select", int32, ONE, ONE, ONE), "select of int32, int32, int32 as int32"),
        (raw("bitcast", int32, const(1, int64)), "bitcast of int64 as int32"),
        (raw("exp", int32, ONE), "exp of int32 as int32"),
        (raw("frobnicate", int32, ONE), "frobnicate of int32 as int32"),
        (raw("add", int32, ONE), "add of int32 as int32"),
    ],
)
def test_ill_typed_expression_is_refused(value, message):
    assert_refused(kernel_of(store(value)), f"Store: there is no {message}.")


def test_operations_that_do_not_exist_for_a_dtype_are_refused():
    half = const(1.0, float16)
    cases = [binary("shl", half, half), binary("and", half, half), unary("popcount", half)]
    flag = binary("lt", BX, ONE)
    cases += [binary("add", flag, flag), unary("neg", flag)]
    for value in cases:
        target = buffer("x", (1,), value.dtype, Scope.VAR)
        with pytest.raises(InternalError, match="there is no"):
            verify(kernel_of(store(value, ZERO, target=target)))
    good = binary("and", flag, unary("not", flag))
    verify(kernel_of(store(good, ZERO, target=buffer("x", (1,), bool_, Scope.VAR))))


@pytest.mark.parametrize(
    "broken, message",
    [
        (buffer("b", (0,)), "`b` has no constant positive shape"),
        (Buffer(name="b", shape=(BX,), dtype=int32, scope=Scope.FRAGMENT),
         "`b` has no constant positive shape"),
        (buffer("b", (4, 4), strides=(ONE,)), "`b` has 1 strides"),
        (buffer("b", (4,), data=buffer("c", (4,), scope=Scope.FRAGMENT)),
         "`b` is a view of local.fragment memory"),
        (buffer("b", (4,), data=const(0, int64)), "`b` has an address"),
        (buffer("b", (4,), scope=Scope.GLOBAL), "`b` has no address"),
        (buffer("b", (4,), scope=Scope.GLOBAL, data=ZERO), "`b` has a narrow address"),
    ],
)  # fmt: skip
def test_malformed_buffer_is_refused(broken, message):
    node = store(ONE, *(ZERO for _ in broken.shape), target=broken)
    assert_refused(kernel_of(node), f"Store: {message}.")


def test_barrier_needs_a_positive_count_for_each_slot():
    for counts in ((), (32,), (32, 0)):
        broken = buffer("mbar", (2,), "uint64", Scope.BARRIER, arrive_counts=counts)
        node = BarrierWait(barrier=broken, slot=BX, parity=ZERO)
        assert_refused(kernel_of(node), f"BarrierWait: `mbar` has arrive counts {counts}.")


def test_inconsistent_layouts_are_refused():
    fill = Fill(dst=whole(F), value=ONE)
    use = Copy(src=whole(S), dst=whole(F))
    assert_refused(
        kernel_of(fill, fragments={F: blocked((8, 4), 32)}),
        "kernel: the layout of `f` has shape (8, 4), not (8, 8).",
    )
    assert_refused(
        kernel_of(fill, fragments={F: blocked((8, 8), 64)}),
        "kernel: the layout of `f` is over 64 of 32 threads.",
    )
    assert_refused(
        kernel_of(use, shared={S: SharedLayout((8, 8), 2)}),
        "kernel: the layout of `s` has shape (8, 8) of 2-byte elements.",
    )
    assert_refused(kernel_of(use, slots={S: 0}), "kernel: `s` has 0 slots.")


def test_layout_other_than_the_given_one_is_refused():
    use = Copy(src=whole(S), dst=whole(F))
    padded, plain = SharedLayout((8, 8), 4, pitch=9), SharedLayout((8, 8), 4)
    given = Given(layouts={S: GivenLayout(padded, None)})
    verify(kernel_of(use, given=given))
    verify(kernel_of(use, given=given, shared={S: dataclasses.replace(padded, tile_align=128)}))
    assert_refused(
        kernel_of(use, given=given, shared={S: plain}),
        "kernel: `s` does not lie in its given layout, rows, pitch 9.",
    )


def test_overlapping_or_too_large_shared_memory_is_refused():
    other = buffer("t", (8, 8))
    copy = Copy(src=whole(S), dst=whole(other))
    layouts = {S: SharedLayout((8, 8), 4), other: SharedLayout((8, 8), 4)}

    def placed(offsets, total, shared=layouts):
        return kernel_of(copy, shared=shared, offsets=offsets, shared_bytes=total)

    verify(placed({S: 256, other: 0}, 512))
    assert_refused(placed({S: 0, other: 252}, 512), "kernel: `s` and `t` overlap in shared memory.")
    assert_refused(
        placed({S: 0, other: 256}, 500), "kernel: shared memory ends at 500 bytes, `t` at 512."
    )
    assert_refused(placed({S: 0}, 512, {}), "kernel: `s` has an offset and no layout.")


def test_kernel_without_threads_or_with_a_parameter_twice_is_refused():
    assert_refused(kernel_of(threads=(0, 1, 1)), "kernel: no threads.")
    assert_refused(kernel_of(params=(PARAM, PARAM)), "kernel: parameter `A` occurs twice.")
    lost = dataclasses.replace(PARAM, buffer=None)
    assert_refused(kernel_of(params=(lost,)), "kernel: tensor `A` has no global buffer.")
    assert_refused(kernel_of(grid=()), "kernel: a grid of 0 dimensions.")


def test_verification_of_a_large_kernel_is_quick():
    body = []
    for _ in range(3000):
        v = var()
        body += [load(v), store(arith("add", v, BX))]
    verify(kernel_of(*body))
