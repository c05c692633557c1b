"""The reference executor on hand-made tile graphs, against plain NumPy."""

import math
import time

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.dtypes import as_dtype, bool_, float32, int32, int64
from tilejit.errors import SimulationError
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import (
    Var,
    VarKind,
    arith,
    binary,
    cast,
    ceildiv,
    const,
    index,
    select,
    unary,
)
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.ir.node import Atomic, For, If, Load, LoopKind, Parallel, Store, While
from tilejit.ir.printer import print_kernel
from tilejit.ir.sync import AsyncCommit, AsyncWait, BarrierArrive, BarrierWait, SyncThreads
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm
from tilejit.passes import stages
from tilejit.sim.reference import run_kernel
from tilejit.target import as_target


class Graph:
    """A kernel under construction, and its run."""

    def __init__(self, threads=32, grid=1):
        self.params, self.arguments = [], {}
        self.threads = threads
        self.grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)[:3]
        self.block = [Var(n, int32, VarKind.BLOCK) for n in ("bx", "by")]
        self.thread = Var("tx", int32, VarKind.THREAD)

    def tensor(self, name, array, **fields):
        data = Var(name, int64, VarKind.POINTER)
        dtype = dtypes.as_dtype(array.dtype)
        shape = fields.pop("shape", tuple(index(n) for n in array.shape))
        buffer = Buffer(
            name=name, shape=shape, dtype=dtype, scope=Scope.GLOBAL, data=data, **fields
        )
        self.params.append(Param(name=name, kind=ParamKind.TENSOR, var=data, buffer=buffer))
        self.arguments[buffer] = array
        return buffer

    def scalar(self, name, value, dtype, kind=ParamKind.SCALAR):
        var = Var(name, as_dtype(dtype), VarKind.SCALAR)
        self.params.append(Param(name=name, kind=kind, var=var))
        self.arguments[var] = value
        return var

    def kernel(self, *body):
        return Kernel(
            name="test",
            params=tuple(self.params),
            grid=tuple(index(n) for n in self.grid),
            threads=(self.threads, 1, 1),
            block_vars=tuple(self.block),
            thread_vars=(self.thread,),
            body=body,
        )

    def run(self, *body, memory=()):
        run_kernel(self.kernel(*body), self.arguments, self.grid, memory=memory)


def range_of(stop):
    """The `start` and `stop` fields of a `For`."""
    return {"start": index(0), "stop": index(stop)}


def on_chip(name, shape, dtype="float32", scope=Scope.SHARED, **fields):
    shape = tuple(index(n) for n in shape)
    return Buffer(name=name, shape=shape, dtype=as_dtype(dtype), scope=scope, **fields)


def fragment(name, shape, dtype="float32"):
    return on_chip(name, shape, dtype, Scope.FRAGMENT)


def local(name, shape=(1,), dtype="int32", scope=Scope.VAR):
    return on_chip(name, shape, dtype, scope)


def at(buffer, *starts, extents, dropped=()):
    return Region(buffer, tuple(map(index, starts)), extents, frozenset(dropped))


def loop_var(name="i", kind=VarKind.LOOP):
    return Var(name, int32, kind)


def iteration(*names):
    return tuple(Var(n, int32, VarKind.PARALLEL) for n in names)


def load(buffer, *place, when=None):
    out = Var("v", buffer.dtype, VarKind.VALUE)
    return Load(out=out, buffer=buffer, index=tuple(map(index, place)), when=when), out


def store(buffer, *place, value):
    return Store(buffer=buffer, index=tuple(map(index, place)), value=value)


def add(a, b):
    return binary("add", a, b)


def guarded(shape, dtype=np.float32, margin=3):
    """An array of NaN (or a mark) inside a larger one of the same."""
    wide = tuple(n + 2 * margin for n in shape)
    mark = math.nan if np.dtype(dtype).kind not in "iub" else 77
    band = np.full(wide, mark, dtype)
    return band, band[tuple(slice(margin, margin + n) for n in shape)]


def assert_only_inside(band, inner):
    copy = band.copy()
    margin = (band.shape[0] - inner.shape[0]) // 2
    mark = copy[0, 0] if copy.ndim > 1 else copy[0]
    copy[tuple(slice(margin, n - margin) for n in band.shape)] = mark
    assert np.all((copy == mark) | (copy != copy))


def ramp(*shape, dtype=np.float32):
    return (np.arange(math.prod(shape)) % 97 - 40).reshape(shape).astype(dtype)


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 13), (16, 8), (17, 9), (15, 31)])
def test_copy_through_shared_pads_with_zeros_and_drops_what_is_outside(rows, columns):
    band, out = guarded((rows, columns))
    a = ramp(rows, columns)
    g = Graph(grid=(-(-columns // 8), -(-rows // 16)))
    A, B = g.tensor("A", a), g.tensor("B", out)
    s = on_chip("s", (16, 8))
    row, column = arith("mul", g.block[1], 16), arith("mul", g.block[0], 8)
    g.run(
        Copy(src=at(A, row, column, extents=(16, 8)), dst=whole(s)),
        SyncThreads(),
        Copy(src=whole(s), dst=at(B, row, column, extents=(16, 8))),
    )
    assert np.array_equal(out, a)
    assert_only_inside(band, out)


def test_copy_out_of_range_reads_pad():
    out = np.full(8, math.nan, np.float32)
    g = Graph()
    A, B = g.tensor("A", ramp(5)), g.tensor("B", out)
    f = fragment("f", (8,))
    g.run(
        Copy(src=at(A, -2, extents=(8,)), dst=whole(f), pad=const(9.0, float32)),
        Copy(src=whole(f), dst=whole(B)),
    )
    assert out.tolist() == [9, 9, *ramp(5).tolist(), 9]


def test_copy_wholly_out_of_range_is_zeros_and_writes_nothing():
    out = np.full(4, math.nan, np.float32)
    g = Graph()
    A, B = g.tensor("A", ramp(5)), g.tensor("B", out)
    f = fragment("f", (4,))
    g.run(
        Copy(src=at(A, 100, extents=(4,)), dst=whole(f)),
        Copy(src=whole(f), dst=whole(B)),
        Fill(dst=whole(f), value=const(3.0, float32)),
        Copy(src=whole(f), dst=at(B, -4, extents=(4,))),
    )
    assert out.tolist() == [0, 0, 0, 0]


def test_copy_with_dropped_dimensions_and_strided_argument():
    a = ramp(3, 20, 4)[:, ::2, :]
    out = np.full((10, 4), math.nan, np.float32)
    g = Graph()
    A, B = g.tensor("A", a), g.tensor("B", out)
    s = on_chip("s", (10, 4))
    g.run(
        Copy(src=at(A, 1, 0, 0, extents=(1, 10, 4), dropped={0}), dst=whole(s)),
        Copy(src=whole(s), dst=whole(B)),
    )
    assert np.array_equal(out, a[1])


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "int8", "bool"])
def test_copy_casts_to_the_destination(name):
    dtype = as_dtype(name)
    a = np.array([0.0, 1.25, -3.75, 1000.3, 1e6], np.float32)
    out = np.zeros(5, dtype.numpy)
    g = Graph()
    A, B = g.tensor("A", a), g.tensor("B", out)
    g.run(Copy(src=whole(A), dst=whole(B)))
    with np.errstate(over="ignore"):
        expected = {
            "float16": a.astype(np.float16),
            "bfloat16": a.astype(ml_dtypes.bfloat16),
            "float8_e4m3fn": np.clip(a, -448, 448).astype(ml_dtypes.float8_e4m3fn),
            "int8": np.array([0, 1, -3, 1000 - 1024, 64], np.int8),
            "bool": a != 0,
        }[name]
    assert out.tobytes() == expected.tobytes()


def test_copy_between_views_of_shared_memory():
    out = np.zeros((2, 6), np.int32)
    g = Graph()
    B = g.tensor("B", out)
    s = on_chip("s", (12,), "int32")
    t = on_chip("t", (2, 3), "int32", data=s, offset=const(6))
    u = on_chip("u", (2, 3), "int32", data=s, strides=(const(1), const(2)))
    (i,) = iteration("i")
    g.run(
        Parallel(vars=(i,), extents=(12,), body=(store(s, i, value=i),)),
        Copy(src=whole(t), dst=at(B, 0, 0, extents=(2, 3))),
        Copy(src=whole(u), dst=at(B, 0, 3, extents=(2, 3))),
    )
    assert out.tolist() == [[6, 7, 8, 0, 2, 4], [9, 10, 11, 1, 3, 5]]


def test_view_that_reaches_outside_is_caught():
    g = Graph()
    B = g.tensor("B", np.zeros(8, np.int32))
    s = on_chip("s", (8,), "int32")
    t = on_chip("t", (8,), "int32", data=s, offset=const(1))
    with pytest.raises(SimulationError, match="`t` reaches outside of the 32 bytes"):
        g.run(Copy(src=whole(t), dst=whole(B)))


def test_shared_copy_out_of_range_names_the_element():
    g = Graph()
    B = g.tensor("B", np.zeros(8, np.float32))
    s = on_chip("s", (8,))
    with pytest.raises(SimulationError, match=r"`s\[8\]` is outside of `s`, whose shape is \(8\)"):
        g.run(Copy(src=at(s, 4, extents=(8,)), dst=whole(B)))


def test_unwritten_shared_memory_reads_nan():
    out = np.zeros(4, np.float32)
    g = Graph()
    B, s = g.tensor("B", out), on_chip("s", (4,))
    g.run(Copy(src=whole(s), dst=whole(B)))
    assert np.isnan(out).all()


def test_fill_takes_a_runtime_scalar():
    out = np.full((3, 5), math.nan, np.float16)
    g = Graph()
    alpha = g.scalar("alpha", 2.5, "float16")
    B = g.tensor("B", out)
    g.run(Fill(dst=at(B, 1, 0, extents=(4, 4)), value=alpha))
    assert np.isnan(out[0]).all() and np.isnan(out[:, 4]).all() and (out[1:, :4] == 2.5).all()


# --- matrix multiply -----------------------------------------------------------------------------


def matmul(a, b, tile, acc_dtype, stages_noise=()):
    """A tiled product in the graph of T.copy and T.gemm."""
    (m, k), n = a.shape, b.shape[1]
    bm, bn, bk = tile
    band, out = guarded((m, n), as_dtype(acc_dtype).numpy)
    g = Graph(grid=(-(-n // bn), -(-m // bm)), threads=128)
    A, B, C = g.tensor("A", a), g.tensor("B", b), g.tensor("C", out)
    s, t = on_chip("s", (bm, bk), A.dtype), on_chip("t", (bk, bn), B.dtype)
    acc = fragment("acc", (bm, bn), acc_dtype)
    row, column = arith("mul", g.block[1], bm), arith("mul", g.block[0], bn)
    step = loop_var("k")
    depth = arith("mul", step, bk)
    g.run(
        Fill(dst=whole(acc), value=const(0, acc.dtype)),
        For(
            var=step,
            **range_of(ceildiv(k, bk)),
            body=(
                Copy(src=at(A, row, depth, extents=(bm, bk)), dst=whole(s)),
                Copy(src=at(B, depth, column, extents=(bk, bn)), dst=whole(t)),
                *stages_noise,
                Gemm(a=whole(s), b=whole(t), acc=whole(acc)),
            ),
        ),
        Copy(src=whole(acc), dst=at(C, row, column, extents=(bm, bn))),
    )
    return band, out


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_matmul_of_odd_sizes_accumulates_in_float32(name):
    rng = np.random.default_rng(1)
    a = rng.normal(size=(37, 53)).astype(as_dtype(name).numpy)
    b = rng.normal(size=(53, 29)).astype(as_dtype(name).numpy)
    noise = (AsyncCommit(), AsyncWait(), SyncThreads())
    band, out = matmul(a, b, (16, 16, 8), "float32", noise)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert_only_inside(band, out)


def test_matmul_of_int8_is_exact_and_wraps_in_int32():
    a = np.full((3, 200), -128, np.int8)
    b = np.full((200, 2), -128, np.int8)
    _, out = matmul(a, b, (4, 4, 64), "int32")
    assert (out == 200 * 128 * 128).all()


def test_matmul_of_float64_keeps_its_precision():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(20, 33)), rng.normal(size=(33, 9))
    _, out = matmul(a, b, (8, 8, 16), "float64")
    np.testing.assert_allclose(out, a @ b, rtol=1e-13)


def run_gemm(a, b, acc, dtype=None, **flags):
    out = np.full(acc.shape, math.nan, acc.dtype)
    g = Graph()
    A, B = g.tensor("A", a), g.tensor("B", b)
    C, D = g.tensor("C", acc), g.tensor("D", out)
    s = on_chip("s", a.shape, dtype or A.dtype)
    t = on_chip("t", b.shape, dtype or B.dtype)
    f = fragment("f", acc.shape, C.dtype)
    g.run(
        Copy(src=whole(A), dst=whole(s)),
        Copy(src=whole(B), dst=whole(t)),
        Copy(src=whole(C), dst=whole(f)),
        Gemm(a=whole(s), b=whole(t), acc=whole(f), **flags),
        Copy(src=whole(f), dst=whole(D)),
    )
    return out


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("clear", [False, True])
def test_gemm_transposes_and_clears(transpose_a, transpose_b, clear):
    a, b, acc = ramp(5, 7), ramp(7, 3), ramp(5, 3)
    got = run_gemm(
        np.ascontiguousarray(a.T) if transpose_a else a,
        np.ascontiguousarray(b.T) if transpose_b else b,
        acc,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        clear=clear,
    )
    assert np.array_equal(got, a @ b + (0 if clear else acc))


def test_gemm_in_float16_rounds_at_the_end():
    a = np.full((1, 4), 0.1, np.float16)
    acc = np.array([[1.0]], np.float16)
    got = run_gemm(a, a.reshape(4, 1), acc)
    exact = np.float32(1) + a.astype(np.float32) @ a.astype(np.float32).T
    assert got == exact.astype(np.float16)


def test_gemm_in_tfloat32_rounds_operands_to_ten_mantissa_bits():
    step = 2.0**-10
    a = np.array([[1 + step / 2], [1 + step / 2 - 2.0**-23], [-1 - step / 2], [math.inf]])
    a = a.astype(np.float32)
    got = run_gemm(a, np.ones((1, 1), np.float32), np.zeros((4, 1), np.float32), "tfloat32")
    assert got.ravel().tolist() == [1 + step, 1, -1 - step, math.inf]


# --- T.Parallel ----------------------------------------------------------------------------------


def test_parallel_evaluates_dtypes_like_numpy():
    a, b = ramp(9, 11, dtype=np.int8), ramp(9, 11)
    out = np.full((9, 11), math.nan, np.float32)
    g = Graph()
    A, B, C = g.tensor("A", a), g.tensor("B", b), g.tensor("C", out)
    i, j = iteration("i", "j")
    la, x = load(A, i, j)
    lb, y = load(B, i, j)
    doubled = binary("mul", x, const(3, dtypes.int8))  # wraps
    value = add(cast(doubled, float32), unary("exp", binary("min", y, const(1.0, float32))))
    g.run(Parallel(vars=(i, j), extents=(9, 11), body=(la, lb, store(C, i, j, value=value))))
    expected = (a * np.int8(3)).astype(np.float32) + np.exp(
        np.minimum(b, 1).astype(np.float64)
    ).astype(np.float32)
    assert np.array_equal(out, expected)


def test_parallel_guards_global_access_and_never_wraps_negative_indexes():
    out = np.full(8, 7, np.int32)
    g = Graph()
    A, B = g.tensor("A", np.arange(1, 6, dtype=np.int32)), g.tensor("B", out)
    (i,) = iteration("i")
    read, x = load(A, arith("sub", i, 2))
    g.run(Parallel(vars=(i,), extents=(12,), body=(read, store(B, arith("sub", i, 1), value=x))))
    assert out.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def test_index_arithmetic_does_not_wrap_at_32_bits():
    out = np.full(4, 7, np.int32)
    g = Graph()
    A, B = g.tensor("A", np.arange(4, dtype=np.int32)), g.tensor("B", out)
    (i,) = iteration("i")
    far = arith("mul", arith("add", i, 2**20), 2**12)  # 2**32 and up: wraps to small numbers
    read, x = load(A, far)
    g.run(Parallel(vars=(i,), extents=(4,), body=(read, store(B, i, value=x))))
    assert out.tolist() == [0, 0, 0, 0]


def test_parallel_out_of_range_of_shared_names_the_element_and_the_line():
    g = Graph()
    s = on_chip("s", (4, 8))
    i, j = iteration("i", "j")
    with pytest.raises(SimulationError) as caught:
        value = const(1.0, float32)
        g.run(Parallel(vars=(i, j), extents=(4, 8), body=(store(s, i, add(i, j), value=value),)))
    assert caught.value.headline == "`s[1, 8]` is outside of `s`, whose shape is (4, 8)."


def test_parallel_condition_masks_stores_loads_and_errors():
    a = ramp(6)
    out = np.full(6, math.nan, np.float32)
    g = Graph()
    A, B, s = g.tensor("A", a), g.tensor("B", out), on_chip("s", (3,))
    (i,) = iteration("i")
    small = binary("lt", i, const(3))
    read, x = load(A, i)
    again, y = load(s, i)
    g.run(
        Fill(dst=whole(s), value=const(5.0, float32)),
        Parallel(
            vars=(i,),
            extents=(6,),
            body=(
                If(
                    condition=small,
                    then=(again, store(B, i, value=y)),  # s[i] exists for these i only
                    orelse=(read, store(B, i, value=x)),
                ),
            ),
        ),
    )
    assert out.tolist() == [5, 5, 5, *a[3:].tolist()]


def test_load_with_when_reads_zero_and_no_memory_where_false():
    out = np.full(4, math.nan, np.float32)
    g = Graph()
    B, s = g.tensor("B", out), on_chip("s", (4,))
    (i,) = iteration("i")
    read, x = load(s, arith("sub", i, 1), when=binary("gt", i, const(0)))
    g.run(
        Fill(dst=whole(s), value=const(2.0, float32)),
        Parallel(vars=(i,), extents=(4,), body=(read, store(B, i, value=x))),
    )
    assert out.tolist() == [0, 2, 2, 2]


def test_parallel_loops_with_varying_bounds_and_while_run_each_iteration_alone():
    out, count = np.zeros(7, np.int32), np.zeros(7, np.int32)
    g = Graph()
    B, C, x = g.tensor("B", out), g.tensor("C", count), local("x")
    (i,), k = iteration("i"), loop_var("k")
    first, v = load(x, 0)
    test, w = load(x, 0)
    more, u = load(x, 0)
    last, z = load(x, 0)
    g.run(
        Parallel(
            vars=(i,),
            extents=(7,),
            body=(
                store(x, 0, value=const(0)),
                For(
                    var=k,
                    start=const(1),
                    stop=i,
                    body=(first, store(x, 0, value=add(v, k))),
                ),
                last,
                store(B, i, value=z),
                store(x, 0, value=i),
                While(
                    test=(test,),
                    condition=binary("gt", w, const(2)),
                    body=(more, store(x, 0, value=binary("sub", u, const(2)))),
                ),
                (final := load(x, 0))[0],
                store(C, i, value=final[1]),
            ),
        )
    )
    assert out.tolist() == [sum(range(1, i)) for i in range(7)]
    assert count.tolist() == [0, 1, 2, 1, 2, 1, 2]


def test_parallel_for_counts_down():
    out = np.zeros(4, np.int32)
    g = Graph()
    B = g.tensor("B", out)
    (i,), k = iteration("i"), loop_var("k")
    g.run(
        Parallel(
            vars=(i,),
            extents=(4,),
            body=(For(var=k, start=i, stop=const(0), step=-1, body=(store(B, i, value=k),)),),
        )
    )
    assert out.tolist() == [0, 1, 1, 1]


def test_parallel_iterations_storing_different_values_to_one_place_are_caught():
    g = Graph()
    B = g.tensor("B", np.zeros(4, np.int32))
    (i,) = iteration("i")
    half = arith("floordiv", i, 2)
    with pytest.raises(SimulationError, match="different values to one element of `B`"):
        g.run(Parallel(vars=(i,), extents=(8,), body=(store(B, half, value=i),)))
    with pytest.raises(SimulationError, match="different values to one element of `B`"):
        g.run(Parallel(vars=(i,), extents=(8,), body=(store(B, 0, value=i),)))
    g.run(Parallel(vars=(i,), extents=(8,), body=(store(B, half, value=half),)))
    assert g.arguments[B].tolist() == [0, 1, 2, 3]


def test_local_written_by_parallel_iterations_is_undefined_after_unless_all_agree():
    out = np.zeros(1, np.int32)
    g = Graph()
    B, x = g.tensor("B", out), local("x")
    (i,) = iteration("i")
    read, v = load(x, 0)
    g.run(
        Parallel(vars=(i,), extents=(4,), body=(store(x, 0, value=const(5)),)),
        read,
        store(B, 0, value=v),
    )
    assert out[0] == 5
    with pytest.raises(SimulationError, match=r"`x` is read after T\.Parallel iterations wrote"):
        g.run(Parallel(vars=(i,), extents=(4,), body=(store(x, 0, value=i),)), read)
    g.run(
        Parallel(vars=(i,), extents=(4,), body=(store(x, 0, value=i),)),
        store(x, 0, value=const(6)),
        read,
        store(B, 0, value=v),
    )
    assert out[0] == 6


def test_thread_value_inside_parallel_is_refused():
    g = Graph()
    B = g.tensor("B", np.zeros(4, np.int32))
    (i,) = iteration("i")
    with pytest.raises(SimulationError, match="`tx` differs between threads"):
        g.run(Parallel(vars=(i,), extents=(4,), body=(store(B, i, value=g.thread),)))


# --- threads -------------------------------------------------------------------------------------


def test_statement_takes_effect_once_a_block_unless_it_depends_on_the_thread():
    out = np.zeros(3, np.int32)
    g = Graph(threads=64)
    B = g.tensor("B", out)
    one = const(1)
    g.run(
        Atomic(buffer=B, index=(const(0),), value=one),
        Atomic(buffer=B, index=(arith("mul", g.thread, 0),), value=one),
        Atomic(buffer=B, index=(const(1),), value=g.thread),
        If(
            condition=binary("lt", g.thread, const(5)),
            then=(Atomic(buffer=B, index=(const(2),), value=one),),
        ),
    )
    assert out.tolist() == [2, sum(range(64)), 5]


def test_threads_each_have_their_own_local_memory():
    a = ramp(32, 3, dtype=np.int32)
    out = np.full((32, 3), -1, np.int32)
    g = Graph(threads=32)
    A, B = g.tensor("A", a), g.tensor("B", out)
    x = local("x", (3,), scope=Scope.LOCAL)
    k = loop_var("k")
    read, v = load(x, k)
    g.run(
        Copy(src=at(A, g.thread, 0, extents=(1, 3), dropped={0}), dst=whole(x)),
        For(var=k, **range_of(3), body=(read, store(x, k, value=add(v, g.thread)))),
        Copy(src=whole(x), dst=at(B, g.thread, 0, extents=(1, 3), dropped={0})),
    )
    assert np.array_equal(out, a + np.arange(32)[:, None])


def test_threads_run_loops_and_branches_of_their_own():
    out = np.full(16, -1, np.int32)
    g = Graph(threads=16)
    B, x, k = g.tensor("B", out), local("x"), loop_var("k")
    read, v = load(x, 0)
    last, w = load(x, 0)
    odd = binary("eq", arith("floormod", g.thread, 2), const(1))
    g.run(
        store(x, 0, value=const(0)),
        For(var=k, **range_of(g.thread), body=(read, store(x, 0, value=add(v, k)))),
        If(condition=odd, then=(store(x, 0, value=const(-5)),)),
        last,
        store(B, g.thread, value=w),
    )
    assert out.tolist() == [-5 if t % 2 else sum(range(t)) for t in range(16)]


def test_threads_storing_different_values_to_one_place_are_caught():
    g = Graph()
    s = on_chip("s", (1,), "int32")
    with pytest.raises(SimulationError, match="Two threads or iterations store different"):
        g.run(store(s, 0, value=g.thread))


def test_tile_op_reached_by_some_threads_only_is_caught():
    g = Graph()
    B = g.tensor("B", np.zeros(4, np.float32))
    some = binary("lt", g.thread, const(3))
    for node, what in (
        (Fill(dst=whole(B), value=const(0.0, float32)), "T.fill"),
        (SyncThreads(), "T.sync_threads"),
        (Copy(src=whole(B), dst=whole(B)), "T.copy"),
    ):
        with pytest.raises(SimulationError, match=f"{what} is reached by some threads"):
            g.run(If(condition=some, then=(node,)))


def test_uniform_while_and_if_and_serial_loops_run_as_in_python():
    out = np.full(5, -1, np.int64)
    g = Graph()
    B, x = g.tensor("B", out), local("x", dtype="int64")
    test, v = load(x, 0)
    body, w = load(x, 0)
    step = loop_var("k")
    last, z = load(x, 0)
    g.run(
        store(x, 0, value=const(1, int64)),
        While(
            test=(test,),
            condition=binary("lt", v, const(1000, int64)),
            body=(body, store(x, 0, value=binary("mul", w, const(3, int64)))),
        ),
        last,
        For(
            var=step,
            start=const(4),
            stop=const(-1),
            step=-2,
            body=(If(condition=binary("gt", step, const(0)), then=(store(B, step, value=z),)),),
        ),
    )
    assert out.tolist() == [-1, -1, 2187, -1, 2187]


def test_select_and_loads_keep_order_with_stores():
    out = np.zeros(2, np.float32)
    g = Graph()
    A, B = g.tensor("A", np.array([3.0], np.float32)), g.tensor("B", out)
    read, x = load(A, 0)
    flag = g.scalar("flag", True, "bool")
    g.run(
        read,
        store(A, 0, value=const(0.0, float32)),
        store(B, 0, value=x),
        store(B, 1, value=select(flag, x, const(9.0, float32))),
    )
    assert out.tolist() == [3, 3]


# --- atomics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["add", "min", "max", "and", "or", "xor", "exch"])
def test_atomics_on_one_place_combine_in_order_and_return_old_values(combine):
    values = np.array([5, -3, 12, 7, 7, 100], np.int32)
    total, old = np.array([6], np.int32), np.full(6, -1, np.int32)
    g = Graph()
    V, A, B = g.tensor("V", values), g.tensor("A", total), g.tensor("B", old)
    (i,) = iteration("i")
    read, x = load(V, i)
    out = Var("old", int32, VarKind.VALUE)
    atomic = Atomic(buffer=A, index=(const(0),), value=x, combine=combine, out=out)
    g.run(Parallel(vars=(i,), extents=(6,), body=(read, atomic, store(B, i, value=out))))
    functions = {
        "add": lambda a, b: a + b, "min": min, "max": max, "exch": lambda a, b: b,
        "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    }  # fmt: skip
    expected = 6
    for k, value in enumerate(values.tolist()):
        assert old[k] == expected
        expected = functions[combine](expected, value)
    assert total[0] == expected


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "int32"])
def test_histogram_by_atomic_add_drops_what_is_out_of_range(name):
    dtype = as_dtype(name)
    keys = (np.arange(500) * 7919 % 11).astype(np.int32)
    out = np.zeros(10, dtype.numpy)
    g = Graph(grid=5)
    K, H = g.tensor("K", keys), g.tensor("H", out)
    (i,) = iteration("i")
    read, key = load(K, add(arith("mul", g.block[0], 100), i))
    atomic = Atomic(buffer=H, index=(key,), value=const(1, dtype))
    g.run(Parallel(vars=(i,), extents=(100,), body=(read, atomic)))
    expected = np.bincount(keys, minlength=11)[:10]
    assert out.astype(np.int64).tolist() == expected.tolist()


def test_atomic_in_every_iteration_counts_iterations_not_values():
    out = np.zeros(1, np.int32)
    g = Graph(grid=3)
    B = g.tensor("B", out)
    i, j = iteration("i", "j")
    atomic = Atomic(buffer=B, index=(const(0),), value=const(2))
    g.run(Parallel(vars=(i, j), extents=(4, 5), body=(atomic,)))
    assert out[0] == 3 * 20 * 2


# --- barriers ------------------------------------------------------------------------------------


def barrier(*counts):
    return Buffer(
        name="mbar",
        shape=(index(len(counts)),),
        dtype=dtypes.uint64,
        scope=Scope.BARRIER,
        arrive_counts=counts,
    )


def test_barrier_wait_passes_when_all_threads_arrived():
    g = Graph(threads=32)
    b, k = barrier(32), loop_var("k")
    zero = const(0)
    g.run(
        BarrierWait(barrier=b, slot=zero, parity=const(1)),  # the phase before the first
        For(
            var=k,
            **range_of(4),
            body=(
                BarrierArrive(barrier=b, slot=zero),
                BarrierWait(barrier=b, slot=zero, parity=arith("floormod", k, 2)),
            ),
        ),
    )


def test_barrier_wait_that_never_ends_says_so():
    g = Graph(threads=32)
    b = barrier(32, 33)
    one = const(1)
    with pytest.raises(SimulationError, match="would wait for ever") as caught:
        g.run(
            BarrierArrive(barrier=b, slot=one),
            BarrierWait(barrier=b, slot=one, parity=const(0)),
        )
    assert caught.value.headline == (
        "Waiting on `mbar[1]` for the phase of parity 0 would wait for ever."
    )
    assert caught.value.notes == ("Phase 0 has 32 of 33 arrivals.",)


def test_barrier_counts_only_threads_that_arrive():
    g = Graph(threads=32)
    b = barrier(8)
    some = binary("lt", g.thread, const(8))
    g.run(
        If(condition=some, then=(BarrierArrive(barrier=b, slot=const(0)),)),
        BarrierWait(barrier=b, slot=const(0), parity=const(0)),
    )


# --- pointers, symbols ---------------------------------------------------------------------------


def test_pointer_table_reads_the_memory_behind_each_address():
    arrays = [ramp(n) for n in (3, 8, 5)]
    table = np.array([a.ctypes.data for a in arrays], np.int64)
    sizes = np.array([len(a) for a in arrays], np.int32)
    out = np.full((3, 8), math.nan, np.float32)
    g = Graph(grid=3)
    P, S, B = g.tensor("P", table), g.tensor("S", sizes), g.tensor("B", out)
    base, pointer = load(P, g.block[0])
    size, n = load(S, g.block[0])
    source = Buffer(name="a", shape=(n,), dtype=float32, scope=Scope.GLOBAL, data=pointer)
    f = fragment("f", (8,))
    body = (
        base,
        size,
        Copy(src=at(source, 0, extents=(8,)), dst=whole(f)),
        Copy(src=whole(f), dst=at(B, g.block[0], 0, extents=(1, 8), dropped={0})),
    )
    g.run(*body, memory=arrays)
    expected = np.zeros((3, 8), np.float32)
    for row, a in zip(expected, arrays, strict=True):
        row[: len(a)] = a
    assert np.array_equal(out, expected)
    with pytest.raises(SimulationError, match=r"`a` is at address 0x.*in none of the arrays"):
        g.run(*body)


def test_pointer_that_differs_between_iterations_and_element_offsets():
    arrays = [np.arange(10 * k, 10 * k + 6, dtype=np.int32) for k in range(3)]
    table = np.array([a.ctypes.data for a in arrays], np.int64)
    out = np.full((3, 4), -1, np.int32)
    g = Graph()
    P, B = g.tensor("P", table), g.tensor("B", out)
    i, j = iteration("i", "j")
    base, pointer = load(P, i)
    a = Buffer(
        name="a",
        shape=(const(4),),
        dtype=int32,
        scope=Scope.GLOBAL,
        data=pointer,
        offset=const(2),
    )
    read, x = load(a, j)
    g.run(
        Parallel(vars=(i, j), extents=(3, 4), body=(base, read, store(B, i, j, value=x))),
        memory=arrays,
    )
    assert np.array_equal(out, np.stack([a[2:] for a in arrays]))


def test_pointer_access_beyond_the_memory_is_caught():
    a = np.arange(4, dtype=np.float32)
    g = Graph()
    address = g.scalar("p", a.ctypes.data, "int64", ParamKind.POINTER)
    source = Buffer(name="a", shape=(const(5),), dtype=float32, scope=Scope.GLOBAL, data=address)
    f = fragment("f", (5,))
    with pytest.raises(SimulationError, match="An element of `a` lies outside the memory"):
        g.run(Copy(src=whole(source), dst=whole(f)), memory=[a])


def test_store_through_a_pointer_writes_the_array():
    a = np.zeros((4, 6), np.float16)
    g = Graph()
    address = g.scalar("p", a.ctypes.data, "int64", ParamKind.POINTER)
    target = Buffer(
        name="a",
        shape=(const(4), const(3)),
        dtype=dtypes.float16,
        scope=Scope.GLOBAL,
        data=address,
        strides=(const(6), const(2)),
    )
    g.run(Fill(dst=whole(target), value=const(1.0, dtypes.float16)), memory=[a])
    assert np.array_equal(a, np.tile(np.array([1, 0], np.float16), (4, 3)))


def test_symbolic_extent_guards_with_its_value():
    out = np.full(10, -1, np.int32)
    g = Graph()
    n = g.scalar("n", 6, "int32", ParamKind.SYMBOL)
    B = g.tensor("B", out[:6], shape=(n,))
    (i,) = iteration("i")
    g.run(Parallel(vars=(i,), extents=(8,), body=(store(B, i, value=i),)))
    assert out.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]


def test_broadcast_tensor_repeats_extents_of_one():
    out = np.zeros((3, 4), np.float32)
    g = Graph()
    A = g.tensor("A", ramp(1, 4), shape=(const(3), const(4)), broadcasts=True)
    B = g.tensor("B", out)
    g.run(Copy(src=at(A, 0, 0, extents=(3, 4)), dst=whole(B)))
    assert np.array_equal(out, np.broadcast_to(ramp(1, 4), (3, 4)))


def test_fragment_element_read_outside_parallel_is_the_tiles():
    out = np.zeros(2, np.float32)
    g = Graph()
    B, f = g.tensor("B", out), fragment("f", (4,))
    (i,) = iteration("i")
    read, x = load(f, 3)
    g.run(
        Parallel(vars=(i,), extents=(4,), body=(store(f, i, value=cast(i, float32)),)),
        read,
        store(B, 1, value=x),
    )
    assert out.tolist() == [0, 3]


def test_zero_dimensional_tensor_is_one_element():
    out = np.array(1.5, np.float32)
    g = Graph()
    B = g.tensor("B", out)
    read, x = load(B)
    g.run(read, store(B, value=add(x, const(1.0, float32))))
    assert out == 2.5


def test_bool_tensors_hold_conditions():
    out = np.zeros(5, np.bool_)
    g = Graph()
    B, f = g.tensor("B", out), fragment("f", (5,), "bool")
    (i,) = iteration("i")
    odd = binary("eq", binary("and", i, const(1)), const(1))
    read, x = load(f, i)
    g.run(
        Parallel(vars=(i,), extents=(5,), body=(store(f, i, value=odd),)),
        Parallel(vars=(i,), extents=(5,), body=(read, store(B, i, value=unary("not", x)))),
    )
    assert out.tolist() == [True, False, True, False, True]
    assert x.dtype is bool_


# --- after passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 96, 64), (37, 61, 29), (1, 8, 16)])
def test_graph_means_the_same_after_every_pass(shape):
    m, k, n = shape
    a, b = ramp(m, k, dtype=np.float16), ramp(k, n, dtype=np.float16)
    out = np.full((m, n), math.nan, np.float32)
    g = Graph(grid=(-(-n // 32), -(-m // 32)), threads=64)
    A, B = (g.tensor(name, x, align=16) for name, x in (("A", a), ("B", b)))
    C = g.tensor("C", out, align=16)
    s, t = on_chip("s", (32, 16), "float16"), on_chip("t", (16, 32), "float16")
    acc, step = fragment("acc", (32, 32)), loop_var("k")
    row, column = arith("mul", g.block[1], 32), arith("mul", g.block[0], 32)
    depth = arith("mul", step, 16)
    i, j = iteration("i", "j")
    read, x = load(acc, i, j)
    kernel = g.kernel(
        Fill(dst=whole(acc), value=const(0.0, float32)),
        For(
            var=step,
            **range_of(ceildiv(k, 16)),
            kind=LoopKind.PIPELINED,
            num_stages=3,
            body=(
                Copy(src=at(A, row, depth, extents=(32, 16)), dst=whole(s)),
                Copy(src=at(B, depth, column, extents=(16, 32)), dst=whole(t)),
                Gemm(a=whole(s), b=whole(t), acc=whole(acc)),
            ),
        ),
        Parallel(
            vars=(i, j),
            extents=(32, 32),
            body=(read, store(acc, i, j, value=binary("max", x, const(-9.0, float32)))),
        ),
        Copy(src=whole(acc), dst=at(C, row, column, extents=(32, 32))),
    )
    expected = np.maximum(a.astype(np.float32) @ b.astype(np.float32), -9)
    for name, stage in stages(kernel, as_target("sm_80")):
        out[...] = math.nan
        run_kernel(stage, g.arguments, g.grid)
        assert np.array_equal(out, expected), name
        assert print_kernel(stage).startswith("def test(")


# --- speed ---------------------------------------------------------------------------------------


def test_reference_is_fast_enough_to_be_what_a_call_without_a_gpu_uses():
    a, b = (ramp(512, 512, dtype=ml_dtypes.bfloat16) for _ in range(2))
    begin = time.perf_counter()
    _, out = matmul(a, b, (128, 128, 32), "float32")
    assert time.perf_counter() - begin < 4  # about 0.2 s on an idle machine
    assert np.array_equal(out, a.astype(np.float32) @ b.astype(np.float32))


def test_elementwise_of_a_million_elements_is_fast():
    a, b = ramp(1024, 1024), ramp(1024, 1024)
    out = np.full((1024, 1024), math.nan, np.float32)
    g = Graph(grid=(8, 8), threads=128)
    A, B, C = g.tensor("A", a), g.tensor("B", b), g.tensor("C", out)
    i, j = iteration("i", "j")
    row = add(arith("mul", g.block[1], 128), i)
    column = add(arith("mul", g.block[0], 128), j)
    la, x = load(A, row, column)
    lb, y = load(B, row, column)
    begin = time.perf_counter()
    g.run(
        Parallel(
            vars=(i, j), extents=(128, 128), body=(la, lb, store(C, row, column, value=add(x, y)))
        )
    )
    assert time.perf_counter() - begin < 4  # about 0.1 s on an idle machine
    assert np.array_equal(out, a + b)
