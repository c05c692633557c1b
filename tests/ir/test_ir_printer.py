"""Printed kernels: the user's names, every node, decided blanks."""

import dataclasses

import pytest

from tilejit.dtypes import as_dtype, float16, float32, int32, int64, uint64
from tilejit.errors import Span
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import Var, VarKind, arith, binary, ceildiv, const, index
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.ir.node import Atomic, For, If, Load, LoopKind, Node, Parallel, Store, While
from tilejit.ir.printer import print_kernel
from tilejit.ir.sync import AsyncCommit, AsyncWait, BarrierArrive, BarrierWait, SyncThreads
from tilejit.isa.atom import CopyAtom, CopyMethod
from tilejit.layout.fragment import blocked
from tilejit.layout.shared import SharedLayout
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm, GemmWarpPolicy
from tilejit.ops.reduce import Reduce, ReduceKind
from tilejit.target import as_target


def tensor(name, shape, dtype="float16", **fields):
    data = Var(name, int64, VarKind.POINTER)
    buffer = Buffer(
        name=name,
        shape=tuple(index(e) for e in shape),
        dtype=as_dtype(dtype),
        scope=Scope.GLOBAL,
        data=data,
        **fields,
    )
    return Param(name=name, kind=ParamKind.TENSOR, var=data, buffer=buffer)


def on_chip(name, shape, dtype, scope, **fields):
    shape = tuple(index(n) for n in shape)
    return Buffer(name=name, shape=shape, dtype=as_dtype(dtype), scope=scope, **fields)


def kernel_of(*body, params=(), block=("bx",), threads=(128, 1, 1), thread_vars=(), **fields):
    return Kernel(
        name="test",
        params=tuple(params),
        grid=tuple(const(4) for _ in block),
        threads=threads,
        block_vars=tuple(Var(n, int32, VarKind.BLOCK) for n in block),
        thread_vars=thread_vars,
        body=body,
        **fields,
    )


def printed(*body, **fields):
    """The lines inside of `with T.Kernel`, without their common indentation."""
    lines = print_kernel(kernel_of(*body, **fields)).splitlines()
    return [line[8:] for line in lines[2:]]


def matmul():
    M = Var("M", int32, VarKind.SYMBOL)
    A, B, C = tensor("A", (M, 512), align=16), tensor("B", (512, 256)), tensor("C", (M, 256))
    a = on_chip("a", (128, 32), "float16", Scope.SHARED)
    b = on_chip("b", (32, 128), "float16", Scope.SHARED)
    acc = on_chip("acc", (128, 128), "float32", Scope.FRAGMENT)
    bx, by = (Var(n, int32, VarKind.BLOCK) for n in ("bx", "by"))
    k = Var("k", int32, VarKind.LOOP)
    row, column, depth = arith("mul", by, 128), arith("mul", bx, 128), arith("mul", k, 32)
    load_a = Copy(src=Region(A.buffer, (row, depth), (128, 32)), dst=whole(a))
    load_b = Copy(src=Region(B.buffer, (depth, column), (32, 128)), dst=whole(b))
    body = (
        Fill(dst=whole(acc), value=const(0.0, float32)),
        For(
            var=k,
            start=index(0),
            stop=index(16),
            kind=LoopKind.PIPELINED,
            num_stages=3,
            body=(load_a, load_b, Gemm(a=whole(a), b=whole(b), acc=whole(acc))),
        ),
        Copy(src=whole(acc), dst=Region(C.buffer, (row, column), (128, 128))),
    )
    symbol = Param(name="M", kind=ParamKind.SYMBOL, var=M)
    kernel = Kernel(
        name="matmul",
        params=(A, B, C, symbol),
        grid=(const(2), ceildiv(M, 128)),
        threads=(128, 1, 1),
        block_vars=(bx, by),
        thread_vars=(),
        body=body,
    )
    return kernel, a, b, acc, load_a


def test_kernel_prints_as_the_user_would_write_it():
    kernel, *_ = matmul()
    assert (
        str(kernel)
        == """\
def matmul(A: T.Tensor((M, 512), "float16", align=16), B: T.Tensor((512, 256), "float16"), \
C: T.Tensor((M, 256), "float16"), M: T.int32):
    with T.Kernel(2, (M + 127) // 128, threads=128) as (bx, by):
        acc = T.alloc_fragment((128, 128), "float32")
        a = T.alloc_shared((128, 32), "float16")
        b = T.alloc_shared((32, 128), "float16")
        T.fill(acc, 0.0)
        for k in T.Pipelined(16, num_stages=3):
            T.copy(A[by * 128:by * 128 + 128, k * 32:k * 32 + 32], a)
            T.copy(B[k * 32:k * 32 + 32, bx * 128:bx * 128 + 128], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 128:by * 128 + 128, bx * 128:bx * 128 + 128])
"""
    )


def test_decisions_print_as_comments():
    kernel, a, b, acc, load_a = matmul()
    atom = CopyAtom(CopyMethod.CP_ASYNC, 8)
    loop = kernel.body[1]
    loop = dataclasses.replace(loop, body=(dataclasses.replace(load_a, atom=atom), *loop.body[1:]))
    layout = blocked((128, 128), 128, 4)
    text = print_kernel(
        dataclasses.replace(
            kernel,
            body=(kernel.body[0], loop, kernel.body[2]),
            target=as_target("sm_90"),
            fragments={acc: layout},
            shared={a: SharedLayout((128, 32), 2, swizzle=4)},
            slots={a: 3},
            offsets={a: 0, b: 24576},
            shared_bytes=49152,
        )
    )
    lines = {line.strip().split(" ")[0]: line for line in text.splitlines()}
    assert lines["def"].endswith("# sm_90, 49152 bytes shared")
    assert lines["acc"].endswith(f"# {layout}")
    assert lines["a"].endswith("# 3 slots, rows, 64-byte swizzle, at byte 0")
    assert lines["b"].endswith("# at byte 24576")
    assert ", a)  # cp.async, 8 elements a time" in text


def test_scalar_nodes_and_control_flow_print_as_python():
    A, N = tensor("A", (64,), "int32"), Var("n", int32, VarKind.SCALAR)
    i, k, v = (Var(n, int32, VarKind.LOOP) for n in "ikv")
    x = on_chip("x", (1,), "int32", Scope.VAR)
    seen, old = Var("seen", int32, VarKind.VALUE), Var("old", int32, VarKind.VALUE)
    zero, one = const(0), const(1)
    small = binary("lt", i, N)
    assert printed(
        Store(buffer=x, index=(zero,), value=zero),
        Parallel(
            vars=(i,),
            extents=(64,),
            body=(
                Load(out=v, buffer=A.buffer, index=(i,), when=small),
                If(
                    condition=small,
                    then=(Store(buffer=A.buffer, index=(i,), value=v),),
                    orelse=(
                        Atomic(buffer=A.buffer, index=(zero,), value=v, combine="max", out=old),
                    ),
                ),
            ),
            coalesced_width=4,
        ),
        For(var=k, start=one, stop=N, step=2, kind=LoopKind.UNROLL, unroll_factor=4),
        While(
            test=(Load(out=seen, buffer=x, index=(zero,)),),
            condition=binary("lt", seen, N),
            body=(Atomic(buffer=x, index=(zero,), value=one),),
        ),
        While(condition=binary("lt", N, zero)),
        params=[A, Param(name="n", kind=ParamKind.SCALAR, var=N)],
    ) == [
        'x = T.alloc_var("int32")',
        "x[0] = 0",
        "for i in T.Parallel(64, coalesced_width=4):",
        "    v = A[i] if i < n else 0",
        "    with T.If(i < n):",
        "        A[i] = v",
        "    with T.Else():",
        "        old = T.atomic_max(A[0], v)",
        "for k in T.unroll(1, n, 2, unroll_factor=4):",
        "    pass",
        "while True:",
        "    seen = x[0]",
        "    if not (seen < n): break",
        "    T.atomic_add(x[0], 1)",
        "with T.While(n < 0):",
        "    pass",
    ]


def test_synchronisation_prints_its_arguments():
    mbar = Buffer(
        name="mbar", shape=(const(2),), dtype=uint64, scope=Scope.BARRIER, arrive_counts=(128, 1)
    )
    assert printed(
        BarrierArrive(barrier=mbar, slot=const(1)),
        BarrierWait(barrier=mbar, slot=const(1), parity=const(0)),
        SyncThreads(),
        SyncThreads(inserted=True),
        AsyncCommit(),
        AsyncWait(pending=2),
    ) == [
        "mbar = T.alloc_barrier([128, 1])",
        "T.barrier_arrive(mbar[1])",
        "T.barrier_wait(mbar[1], parity=0)",
        "T.sync_threads()",
        "T.sync_threads()  # inserted",
        "T.async_commit()",
        "T.async_wait(2)",
    ]


def test_tile_ops_print_every_argument():
    A = tensor("A", (8, 4, 4))
    s = on_chip("s", (4, 4), "float16", Scope.SHARED)
    f = on_chip("f", (4, 4), "float32", Scope.FRAGMENT)
    m = Var("m", int32, VarKind.BLOCK)
    zero = const(0)
    lines = printed(
        Copy(
            src=Region(A.buffer, (arith("floordiv", m, 2), zero, zero), (1, 4, 4), frozenset({0})),
            dst=whole(s),
            pad=const(0.1, float16),
            coalesced_width=2,
            prefer="cp_async",
        ),
        Gemm(
            a=whole(s),
            b=whole(s),
            acc=whole(f),
            transpose_a=True,
            transpose_b=True,
            policy=GemmWarpPolicy.FullRow,
            clear=True,
        ),
        Fill(dst=Region(s, (arith("floormod", m, 2), zero), (2, 4)), value=const(0, float16)),
        Reduce(
            src=whole(f),
            dst=Region(s, (zero, zero), (4, 1), frozenset({1})),
            kind=ReduceKind.ABSMAX,
            axis=1,
            clear=False,
            keeps_nan=True,
        ),
        params=[A],
    )
    assert lines[2:] == [
        "T.copy(A[m // 2, 0:4, 0:4], s, pad=float16(0.1), coalesced_width=2, "
        "prefer_instruction='cp_async')",
        "T.gemm(s, s, f, transpose_A=True, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, "
        "clear_accum=True)",
        "T.fill(s[m % 2:(m % 2) + 2, 0:4], float16(0.0))",
        "T.reduce_absmax(f, s[0:4, 0], dim=1, clear=False, nan_propagate=True)",
    ]


def test_views_pointers_and_parameter_facts_print():
    table = tensor("P", (3,), "int64")
    N = Var("n", int32, VarKind.SYMBOL)
    strided = tensor("S", (4, 4), "float16", strides=(N, const(1)), offset=const(2))
    strided = dataclasses.replace(strided, noalias=True)
    lone = tensor("L", (1, 4), broadcasts=True)
    p = Var("p", int64, VarKind.VALUE)
    x = Buffer(name="x", shape=(N,), dtype=float32, scope=Scope.GLOBAL, data=p, align=16)
    s = on_chip("s", (16,), "float32", Scope.SHARED, align=128)
    t = on_chip("t", (2, 4), "float32", Scope.SHARED, data=s, offset=const(8))
    kernel = kernel_of(
        Load(out=p, buffer=table.buffer, index=(const(0),)),
        Copy(
            src=Region(x, (const(0),), (4,)),
            dst=Region(t, (const(1), const(0)), (1, 4), frozenset({0})),
        ),
        params=[table, strided, lone, Param(name="n", kind=ParamKind.SYMBOL, var=N)],
        fast_math=True,
    )
    lines = print_kernel(kernel).splitlines()
    assert lines[0] == (
        'def test(P: T.Tensor((3,), "int64"), '
        'S: T.StridedTensor((4, 4), (n, 1), "float16", elem_offset=2, noalias=True), '
        'L: T.Tensor((1, 4), "float16", buffer_type="auto_broadcast"), n: T.int32):  # fast math'
    )
    assert [line.strip() for line in lines[2:]] == [
        's = T.alloc_shared((16,), "float32", align=128)',
        't = T.view(s, (2, 4), "float32", elem_offset=8)',
        "p = P[0]",
        'x = T.make_tensor(p, (n,), "float32", align=16)',
        "T.copy(x[0:4], t[1, 0:4])",
    ]


def test_two_things_of_one_name_are_told_apart():
    first, second = (on_chip("s", (4,), "int32", Scope.SHARED) for _ in range(2))
    i, j = (Var("i", int32, VarKind.PARALLEL) for _ in range(2))
    assert printed(
        Parallel(vars=(i,), extents=(4,), body=(Store(buffer=first, index=(i,), value=const(0)),)),
        Parallel(vars=(j,), extents=(4,), body=(Store(buffer=second, index=(j,), value=j),)),
    ) == [
        's = T.alloc_shared((4,), "int32")',
        's_1 = T.alloc_shared((4,), "int32")',
        "for i in T.Parallel(4):",
        "    s[i] = 0",
        "for i_1 in T.Parallel(4):",
        "    s_1[i_1] = i_1",
    ]


def test_lines_are_printed_on_request_and_otherwise_do_not_matter():
    def kernel(line):
        return kernel_of(SyncThreads(span=Span("file.py", line)), AsyncCommit())

    assert print_kernel(kernel(3)) == print_kernel(kernel(70))
    lines = print_kernel(kernel(3), lines=True).splitlines()
    assert lines[2].split() == ["T.sync_threads()", "#", "line", "3"]
    assert lines[3].split() == ["T.async_commit()"]


def test_thread_index_is_named_where_it_is_used():
    tx = Var("tx", int32, VarKind.THREAD)
    A = tensor("A", (64,), "int32")
    store = Store(buffer=A.buffer, index=(tx,), value=const(1))
    lines = printed(store, params=[A], thread_vars=(tx,))
    assert lines == ["tx = T.get_thread_binding()  # threadIdx.x", "A[tx] = 1"]
    assert printed(AsyncCommit(), thread_vars=(tx,)) == ["T.async_commit()"]
    assert printed() == ["pass"]


def test_node_class_without_a_text_is_an_assertion_not_a_guess():
    class Strange(Node):
        pass

    with pytest.raises(AssertionError, match="Strange does not say how it is printed"):
        print_kernel(kernel_of(Strange()))
