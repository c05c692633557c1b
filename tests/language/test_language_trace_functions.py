"""Whole functions traced: frames, names, Python statements, and what is refused."""

# Kernels here are written the way users would: nested `with`, plain `if`, unused names.
# ruff: noqa: SIM108, SIM117, SIM201, RUF021, F841, B007, RET504

import threading

import pytest

import tilejit.language as T
from tilejit.dtypes import float16, float32, int32
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    OutOfRangeError,
    ResourceError,
    ShapeError,
    TileError,
    TraceError,
    UnsupportedError,
)
from tilejit.ir.expr import show
from tilejit.ir.kernel import ParamKind
from tilejit.ir.node import For, If, Load, LoopKind, Parallel, Store, While, walk
from tilejit.language.function import (
    ConstArg,
    PrimFunc,
    ScalarArg,
    TensorArg,
    TracedFunction,
)
from tilejit.ops.copy import Copy, Fill


def array(*shape, dtype=float32, **facts):
    strides, step = [], 1
    for extent in reversed(shape):
        strides.insert(0, step)
        step *= extent
    return TensorArg(shape, tuple(strides), dtype, **facts)


def trace(fn, **args):
    return TracedFunction(fn).trace({k: as_arg(v) for k, v in args.items()})


def as_arg(value):
    return value if isinstance(value, TensorArg | ScalarArg | ConstArg) else ConstArg(value)


def only_kernel(fn, **args):
    (kernel,) = trace(fn, **args).kernels
    return kernel


def nodes(kernel, kind):
    return [n for n in walk(kernel.body) if isinstance(n, kind)]


def refusal(error, fn, **args):
    with pytest.raises(error) as caught:
        trace(fn, **args)
    return caught.value


def line_of(error):
    """The text of the line the error points at."""
    text = str(error).splitlines()
    return next(line.split("|", 1)[1].strip() for line in text if " | " in line)


# -- frames -------------------------------------------------------------------------------------


def test_matmul_traces_to_a_pipelined_loop_of_copies():
    def matmul(A, B, C, *, BM=16, BN=32, BK=8):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=64) as (bx, by):
            a = T.alloc_shared((BM, BK), A.dtype)
            b = T.alloc_shared((BK, BN), B.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, BK), num_stages=2):
                T.copy(A[by * BM, k * BK], a)
                T.copy(B[k * BK, bx * BN], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * BM, bx * BN])

    half = {"dtype": float16}
    kernel = only_kernel(matmul, A=array(33, 20, **half), B=array(20, 7, **half), C=array(33, 7))
    assert [show(g) for g in kernel.grid] == ["1", "3"]
    assert kernel.threads == (64, 1, 1)
    assert [v.name for v in kernel.block_vars] == ["bx", "by"]
    (loop,) = nodes(kernel, For)
    assert (loop.kind, loop.num_stages, loop.var.name) == (LoopKind.PIPELINED, 2, "k")
    assert show(loop.stop) == "3"
    assert [b.name for b in kernel.buffers if b.name not in "ABC"] == ["acc", "a", "b"]
    assert not nodes(kernel, Load)  # `A[by * BM, k * BK]` was only used as a place
    assert [(p.name, p.noalias) for p in kernel.params] == [("A", True), ("B", True), ("C", False)]
    assert all(node.span is not None for node in walk(kernel.body))


def test_pipelined_without_num_stages_leaves_the_choice_open():
    def kernel(A):
        with T.Kernel(1):
            for k in T.Pipelined(4):
                A[k] = 0.0

    (loop,) = nodes(only_kernel(kernel, A=array(4)), For)
    assert loop.num_stages is None


def test_several_kernels_make_a_program_in_order():
    def two(A, B):
        with T.Kernel(2) as bx:
            A[bx] = 1.0
        n = A.shape[0] * 2
        with T.Kernel(n) as bx:
            B[bx] = A[bx]

    program = trace(two, A=array(2), B=array(4))
    assert [k.name for k in program.kernels] == ["two_0", "two_1"]
    assert show(program.kernels[1].grid[0]) == "4"
    assert [p.name for p in program.kernels[0].params] == ["A"]
    assert [p.noalias for p in program.kernels[1].params] == [True, False]


def test_nested_kernel_is_refused_naming_the_outer_one():
    def nested(A):
        with T.Kernel(1):
            with T.Kernel(1):
                A[0] = 1.0

    error = refusal(TraceError, nested, A=array(1))
    assert error.headline == "A T.Kernel cannot be inside another one."


@pytest.mark.parametrize(
    ("threads", "kind", "headline"),
    [
        (0, ArgumentError, "T.Kernel: threads must be positive, got 0."),
        (-3, ArgumentError, "T.Kernel: threads must be positive, got -3."),
        (2048, ResourceError,
         "T.Kernel: 2048 threads are more than the 1024 a block can have."),
        ((32, 64), ResourceError,
         "T.Kernel: 2048 threads are more than the 1024 a block can have."),
        (1.5, ArgumentTypeError,
         "T.Kernel: threads must be known when the kernel is traced, got 1.5."),
        ((1, 1, 1, 1), ArgumentError, "T.Kernel: threads has 1 to 3 entries, got 4."),
    ],
)  # fmt: skip
def test_bad_threads_are_refused_with_their_number(threads, kind, headline):
    def kernel(A, threads):
        with T.Kernel(1, threads=threads):
            A[0] = 1.0

    assert refusal(kind, kernel, A=array(1), threads=threads).headline == headline


def test_negative_grid_is_refused_and_zero_is_legal():
    def kernel(A, n):
        with T.Kernel(n):
            A[0] = 1.0

    assert refusal(ArgumentError, kernel, A=array(1), n=-1).headline == (
        "T.Kernel: grid extent 0 must not be negative, got -1."
    )
    assert show(only_kernel(kernel, A=array(1), n=0).grid[0]) == "0"


def test_function_without_a_kernel_is_refused():
    def nothing(A):
        return None

    assert refusal(TraceError, nothing, A=array(1)).headline == (
        "`nothing` opens no kernel, so a call would do nothing."
    )


def test_thread_binding_gives_bounded_variables():
    def kernel(A):
        with T.Kernel(1, threads=(8, 4)):
            tx, ty, _ = T.get_thread_bindings()
            A[ty, tx] = T.float32(1)

    k = only_kernel(kernel, A=array(4, 8))
    assert [(v.name, show(v.high)) for v in k.thread_vars] == [
        ("tx", "7"),
        ("ty", "3"),
        ("tz", "0"),
    ]


def test_parallel_in_parallel_is_refused():
    def kernel(A):
        with T.Kernel(1):
            for i in T.Parallel(4):
                for j in T.Parallel(4):
                    A[i, j] = 1.0

    error = refusal(TraceError, kernel, A=array(4, 4))
    assert error.headline == "A T.Parallel cannot be inside another one."
    assert error.hint == "Write one loop over both: `for i, j in T.Parallel(m, n):`."
    assert line_of(error) == "for j in T.Parallel(4):"


@pytest.mark.parametrize(
    ("extent", "headline"),
    [
        (0, "T.Parallel: extent 0 must be positive, got 0."),
        (-2, "T.Parallel: extent 0 must be positive, got -2."),
    ],
)
def test_parallel_extents_that_are_not_positive_are_refused(extent, headline):
    def kernel(A, n):
        with T.Kernel(1):
            for i in T.Parallel(n):
                A[i] = 1.0

    assert refusal(ShapeError, kernel, A=array(4), n=extent).headline == headline


def test_parallel_with_a_runtime_extent_is_refused():
    def kernel(A, n: T.int32):
        with T.Kernel(1):
            for i in T.Parallel(n):
                A[i] = 1.0

    assert refusal(ShapeError, kernel, A=array(4), n=ScalarArg(int32)).headline == (
        "T.Parallel: extent 0 must be a constant, got `n`."
    )


def test_tile_op_inside_parallel_is_refused():
    def kernel(A):
        with T.Kernel(1):
            s = T.alloc_shared((4,), "float32")
            for i in T.Parallel(4):
                s[0:2] = 1.0
                A[i] = s[i]

    assert refusal(TraceError, kernel, A=array(4)).headline == (
        "T.fill works on whole tiles and cannot be inside T.Parallel."
    )


def test_range_in_a_kernel_is_a_device_loop_and_a_tuple_unrolls():
    def kernel(A):
        total = 0
        for n in range(3):
            total += n
        with T.Kernel(1):
            for i in range(2, 10, 3):
                A[i] = 1.0
            for j in (20, 21):
                A[j] = T.float32(total)

    k = only_kernel(kernel, A=array(32))
    (loop,) = nodes(k, For)
    assert (show(loop.start), show(loop.stop), loop.step) == ("2", "10", 3)
    assert [show(s.index[0]) for s in nodes(k, Store)] == ["i", "20", "21"]


def test_enumerate_over_a_device_loop_is_refused():
    def kernel(A):
        with T.Kernel(1):
            for n, i in enumerate(T.serial(4)):
                A[i] = T.float32(n)

    assert refusal(TraceError, kernel, A=array(4)).headline == (
        "T.serial is a device loop, so Python cannot run through its iterations."
    )


def test_device_loop_in_a_plain_helper_asks_for_a_macro():
    def helper(A):
        for i in T.serial(4):
            A[i] = 1.0

    def kernel(A, helper):
        with T.Kernel(1):
            helper(A)

    error = refusal(TraceError, kernel, A=array(4), helper=helper)
    assert error.headline == (
        "T.serial is used in `helper`, a plain Python function that tilejit has not read."
    )
    assert error.hint == "Decorate `helper` with @T.macro."


def test_macro_is_traced_into_its_caller():
    @T.macro
    def fill_row(A, row, n):
        for j in range(n):
            A[row, j] = 1.0

    def kernel(A):
        with T.Kernel(2) as bx:
            fill_row(A, bx, A.shape[1])

    (store,) = nodes(only_kernel(kernel, A=array(2, 8)), Store)
    assert [show(e) for e in store.index] == ["bx", "j"]


# -- loads and stores -----------------------------------------------------------------------------


def test_load_keeps_the_value_it_read_before_a_store():
    def kernel(A, B):
        with T.Kernel(1):
            x = A[0]
            A[0] = 0.0
            B[0] = x

    k = only_kernel(kernel, A=array(1), B=array(1))
    assert [type(n).__name__ for n in k.body] == ["Load", "Store", "Store"]


def test_unused_load_is_dropped():
    def kernel(A, B):
        with T.Kernel(1):
            A[0]
            B[0] = 1.0

    assert [p.name for p in only_kernel(kernel, A=array(1), B=array(1)).params] == ["B"]


def test_load_of_one_arm_is_guarded_by_its_condition():
    def kernel(A, B):
        with T.Kernel(1):
            s = T.alloc_shared((8,), "float32")
            T.copy(A, s)
            for i in T.Parallel(8):
                B[i] = T.if_then_else(i > 0, s[i - 1], 0)

    (load,) = nodes(only_kernel(kernel, A=array(8), B=array(8)), Load)
    assert show(load.when) == "i > 0"


def test_nested_ternary_guards_with_both_conditions():
    def kernel(A, B):
        with T.Kernel(1):
            s = T.alloc_shared((8,), "float32")
            T.copy(A, s)
            for i in T.Parallel(8):
                B[i] = (s[i - 2] if i > 1 else s[i - 1]) if i > 0 else 0.0

    first, second = nodes(only_kernel(kernel, A=array(8), B=array(8)), Load)
    assert show(first.when) == "(i > 0) & (i > 1)"
    assert show(second.when) == "(i > 0) & ~(i > 1)"


def test_load_used_on_both_sides_of_a_choice_is_not_guarded():
    def kernel(A, B):
        with T.Kernel(1):
            for i in T.Parallel(8):
                x = A[i + 1]
                B[i] = T.if_then_else(i > 0, x, -x)

    (load,) = nodes(only_kernel(kernel, A=array(8), B=array(8)), Load)
    assert load.when is None


def test_right_operand_of_and_reads_only_where_the_left_one_holds():
    def kernel(A, B):
        with T.Kernel(1):
            s = T.alloc_shared((8,), "float32")
            T.copy(A, s)
            for i in T.Parallel(8):
                if i > 0 and s[i - 1] > 0.0:
                    B[i] = 1.0

    k = only_kernel(kernel, A=array(8), B=array(8))
    (load,) = nodes(k, Load)
    assert show(load.when) == "i > 0"
    (branch,) = nodes(k, If)
    assert len(branch.then) == 1


def test_augmented_store_reads_and_writes_one_element():
    def kernel(A):
        with T.Kernel(1):
            for i in T.Parallel(4):
                A[i] += 2

    (store,) = nodes(only_kernel(kernel, A=array(4)), Store)
    assert show(store.value) == "A_at + 2.0"


def test_store_casts_and_constants_must_fit():
    def kernel(A, value):
        with T.Kernel(1):
            A[0] = value

    (store,) = nodes(only_kernel(kernel, A=array(1, dtype=int32), value=1.75), Store)
    assert show(store.value) == "1"
    error = refusal(ArgumentError, kernel, A=array(1, dtype=T.uint8), value=300)
    assert error.headline == "The value stored to `A` 300 does not fit uint8 (0 to 255)."


def test_slice_assignment_fills_and_copies():
    def kernel(A, B):
        with T.Kernel(1):
            s = T.alloc_shared((4, 8), "float32")
            s[:, :] = 1
            s[0:2, 0:4] = A[2:4, 4:8]
            s[3] = 0.0
            B[0:4, 0:8] = s

    k = only_kernel(kernel, A=array(8, 8), B=array(4, 8))
    assert [type(n).__name__ for n in k.body] == ["Fill", "Copy", "Fill", "Copy"]
    assert nodes(k, Copy)[0].src.shape == (2, 4)
    assert nodes(k, Fill)[1].dst.shape == (8,)


def test_slice_assignment_of_another_shape_names_both():
    def kernel(A):
        with T.Kernel(1):
            s = T.alloc_shared((4, 8), "float32")
            s[0:2, :] = A[0:3, 0:8]

    assert refusal(ShapeError, kernel, A=array(8, 8)).headline == (
        "`s[0:2, 0:8]` has shape (2, 8) and the value `A[0:3, 0:8]` has shape (3, 8)."
    )


@pytest.mark.parametrize(
    ("key", "kind", "headline"),
    [
        ((5, 0), OutOfRangeError, "Index 5 is outside dimension 0 of `s`, which has extent 4."),
        ((0, -1), OutOfRangeError, "Index -1 is outside dimension 1 of `s`, which has extent 8."),
        ((0, 0, 0), OutOfRangeError, "`s` has 2 dimensions and is indexed with 3."),
        ((slice(0, 9), 0), OutOfRangeError,
         "Slice 0:9 is outside dimension 0 of `s`, which has extent 4."),
        ((slice(0, 4, 2), 0), UnsupportedError,
         "The slice of dimension 0 of `s` has step 2; only 1 works."),
        ((slice(2, 2), 0), ShapeError,
         "The slice `2:2` of dimension 0 of `s` has extent 0."),
        ((0, 1.5), ArgumentTypeError,
         "The index of dimension 1 of `s` must be an integer, got 1.5."),
    ],
)  # fmt: skip
def test_bad_index_of_a_tile_is_refused(key, kind, headline):
    def kernel(A, key):
        with T.Kernel(1):
            s = T.alloc_shared((4, 8), "float32")
            A[0] = s[key]

    assert refusal(kind, kernel, A=array(1), key=key).headline == headline


def test_negative_index_of_a_tensor_never_wraps():
    def kernel(A):
        with T.Kernel(1):
            A[-1] = 1.0

    error = refusal(OutOfRangeError, kernel, A=array(4))
    assert error.headline == "Index -1 is outside dimension 0 of `A`, which has extent 4."
    assert error.hint == "Negative indexes do not wrap in a kernel."


def test_negative_slice_bounds_count_from_the_end():
    def kernel(A):
        with T.Kernel(1):
            s = T.alloc_shared((2,), "float32")
            T.copy(A[-2:], s)
            T.copy(s, A[0:2])

    assert show(nodes(only_kernel(kernel, A=array(5)), Copy)[0].src.starts[0]) == "3"


def test_loop_that_leaves_a_tile_for_certain_is_refused():
    def kernel(A):
        with T.Kernel(1):
            s = T.alloc_shared((16,), "float32")
            for i in T.serial(17):
                s[i] = 0.0
            T.copy(s, A)

    error = refusal(OutOfRangeError, kernel, A=array(16))
    assert error.headline == "Index `i` reaches 16, but dimension 0 of `s` has extent 16."
    assert line_of(error) == "s[i] = 0.0"


def test_slice_with_a_runtime_extent_is_refused():
    def kernel(A, n: T.int32):
        with T.Kernel(1):
            s = T.alloc_shared((4,), "float32")
            T.copy(A[0:n], s)

    assert refusal(ShapeError, kernel, A=array(8), n=ScalarArg(int32)).headline == (
        "The slice `0:n` of dimension 0 of `A` has no constant extent."
    )


def test_tile_used_as_a_number_is_refused():
    def kernel(A):
        with T.Kernel(1):
            acc = T.alloc_fragment((4,), "float32")
            A[0] = acc + 1

    error = refusal(ArgumentTypeError, kernel, A=array(4))
    assert error.headline == "`acc` is a tile, where one number is needed."


# -- Python statements ----------------------------------------------------------------------------


def test_if_elif_else_on_traced_conditions_becomes_branches():
    def kernel(A):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            if tx < 4:
                A[tx] = 1.0
            elif tx < 8:
                A[tx] = 2.0
            else:
                A[tx] = 3.0

    (outer,) = only_kernel(kernel, A=array(32)).body
    assert show(outer.condition) == "tx < 4"
    (inner,) = outer.orelse
    assert show(inner.condition) == "tx < 8"
    assert len(inner.then) == len(inner.orelse) == 1


def test_if_on_a_host_constant_stays_python():
    def kernel(A, wide):
        with T.Kernel(1):
            if wide:
                n = 8
            else:
                n = 4
            A[0] = T.float32(n)

    (store,) = only_kernel(kernel, A=array(1), wide=False).body
    assert show(store.value) == "4.0"


def test_with_forms_of_branches_match_the_rewritten_ones():
    def flat(A, n: T.int32):
        with T.Kernel(1):
            with T.If(n > 0):
                A[0] = 1.0
            with T.Else():
                A[0] = 2.0

    def nested(A, n: T.int32):
        with T.Kernel(1):
            with T.If(n > 0):
                with T.Then():
                    A[0] = 1.0
                with T.Else():
                    A[0] = 2.0

    for fn in (flat, nested):
        (node,) = only_kernel(fn, A=array(1), n=ScalarArg(int32)).body
        assert [len(node.then), len(node.orelse)] == [1, 1]
        assert show(node.orelse[0].value) == "2.0"


def test_else_belongs_to_the_if_before_it_in_the_same_branch():
    def with_forms(A, n: T.int32):
        with T.Kernel(1):
            with T.If(n > 0):
                with T.If(n > 1):
                    A[0] = 1.0
                with T.Else():
                    A[0] = 2.0
            with T.Else():
                A[0] = 3.0

    def then_form(A, n: T.int32):
        with T.Kernel(1):
            with T.If(n > 0):
                with T.Then():
                    with T.If(n > 1):
                        A[0] = 1.0
                    with T.Else():
                        A[0] = 2.0
                with T.Else():
                    A[0] = 3.0

    def rewritten_inside(A, n: T.int32):
        with T.Kernel(1):
            with T.If(n > 0):
                if n > 1:
                    A[0] = 1.0
                else:
                    A[0] = 2.0
            with T.Else():
                A[0] = 3.0

    for fn in (with_forms, then_form, rewritten_inside):
        (outer,) = only_kernel(fn, A=array(1), n=ScalarArg(int32)).body
        (inner,), (last,) = outer.then, outer.orelse
        assert [show(inner.then[0].value), show(inner.orelse[0].value)] == ["1.0", "2.0"]
        assert show(last.value) == "3.0"


def test_else_without_if_is_refused():
    def kernel(A):
        with T.Kernel(1):
            with T.Else():
                A[0] = 1.0

    assert refusal(TraceError, kernel, A=array(1)).headline == "T.Else has no T.If just before it."


def test_while_reevaluates_its_condition():
    def kernel(A):
        with T.Kernel(1):
            n = T.alloc_var("int32", init=5)
            while n > 0:
                A[n] = 1.0
                n -= 1

    (loop,) = nodes(only_kernel(kernel, A=array(8)), While)
    assert [type(n).__name__ for n in loop.test] == ["Load"]
    assert [type(n).__name__ for n in loop.body] == ["Load", "Store", "Load", "Store"]


@pytest.mark.parametrize("form", ["call", "function"])
def test_with_while_moves_the_loads_of_its_call_into_the_test(form):
    def call(A):
        with T.Kernel(1):
            n = T.alloc_var("int32", init=5)
            limit = A[0]
            with T.While((n[0] > 0) & (A[n[0]] > limit)):
                n -= 1

    def function(A):
        with T.Kernel(1):
            n = T.alloc_var("int32", init=5)
            limit = A[0]
            with T.While(lambda: (n > 0) & (A[n] > limit)):
                n -= 1

    kernel = only_kernel(call if form == "call" else function, A=array(8))
    (loop,) = nodes(kernel, While)
    assert len(loop.test) == 3
    assert [type(n).__name__ for n in kernel.body] == ["Store", "Load", "While"]


def test_while_whose_condition_cannot_change_is_refused():
    def kernel(A, n: T.int32):
        with T.Kernel(1):
            with T.While(n > 0):
                A[0] = 1.0

    error = refusal(TraceError, kernel, A=array(1), n=ScalarArg(int32))
    assert error.headline == (
        "The condition of the while loop is computed before the loop, so it never changes."
    )


def test_host_while_stays_python():
    def kernel(A):
        with T.Kernel(1):
            n = 8
            while n > 1:
                A[n] = 1.0
                n //= 2

    stores = nodes(only_kernel(kernel, A=array(16)), Store)
    assert [show(s.index[0]) for s in stores] == ["8", "4", "2"]


def test_boolean_operators_and_chains_build_conditions():
    def kernel(A, n: T.int32):
        with T.Kernel(1):
            if 0 < n <= 4 and not n == 2 or n == 9:
                A[0] = 1.0

    (node,) = only_kernel(kernel, A=array(1), n=ScalarArg(int32)).body
    assert show(node.condition) == "(((n > 0) & (n <= 4)) & ~(n == 2)) | (n == 9)"


def test_ternary_becomes_a_choice():
    def kernel(A, n: T.int32):
        with T.Kernel(1):
            A[0] = 1.0 if n > 0 else 2.0

    (store,) = only_kernel(kernel, A=array(1), n=ScalarArg(int32)).body
    assert show(store.value) == "if_then_else(n > 0, 1.0, 2.0)"


def test_alloc_var_is_stored_to_by_assignment():
    def kernel(A):
        with T.Kernel(1):
            x = T.alloc_var("float32")
            for i in T.serial(4):
                x = x + A[i]
                x += 1
            y = x
            x = 0.0
            A[0] = y

    k = only_kernel(kernel, A=array(4))
    stores = [s for s in nodes(k, Store) if s.buffer.name == "x"]
    assert len(stores) == 4
    names = [n.buffer.name for n in k.body if isinstance(n, Load | Store)]
    assert names == ["x", "x", "x", "A"]  # y was read before x became 0


def test_rebinding_in_a_device_loop_is_found():
    def kernel(A):
        with T.Kernel(1):
            total = 0.0
            for i in T.serial(4):
                total = total + A[i]
            A[0] = total

    error = refusal(TraceError, kernel, A=array(4))
    assert error.headline == (
        "`total` is re-bound inside the device loop, which tracing would run only once."
    )
    assert error.hint == (
        "Make it a variable of the device: `total = T.alloc_var(dtype, init=...)`."
    )
    assert line_of(error) == "total = total + A[i]"
    assert "total = 0.0" in str(error)


@pytest.mark.parametrize("form", ["augmented", "unpacked", "walrus", "branch", "parameter"])
def test_rebinding_is_found_in_every_form(form):
    def augmented(A):
        with T.Kernel(1):
            x = A[0]
            for i in T.serial(4):
                x += A[i]

    def unpacked(A):
        with T.Kernel(1):
            x = y = A[0]
            for i in T.serial(4):
                x, y = A[i], y

    def walrus(A):
        with T.Kernel(1):
            x = A[0]
            for i in T.serial(4):
                A[i] = (x := x + 1)

    def branch(A):
        with T.Kernel(1) as bx:
            x = A[0]
            if bx > 0:
                x = A[1]
            A[2] = x

    def parameter(A, x=0.0):
        with T.Kernel(1):
            for i in T.serial(4):
                x = A[i] + x

    fn = {f.__name__: f for f in (augmented, unpacked, walrus, branch, parameter)}[form]
    error = refusal(TraceError, fn, A=array(4))
    assert error.headline.startswith("`x` is re-bound inside the ")


def test_name_bound_in_both_branches_and_read_after_them_is_found():
    def kernel(A, n: T.int32):
        with T.Kernel(1):
            if n > 0:
                x = 1.0
            else:
                x = 2.0
            A[0] = x

    error = refusal(TraceError, kernel, A=array(1), n=ScalarArg(int32))
    assert error.headline == "`x` is bound inside the branch and read after it."


def test_names_of_closed_loops_may_be_used_again():
    def kernel(A):
        with T.Kernel(1):
            for i in T.serial(4):
                x = A[i] + 1
                A[i] = x
            for i in T.serial(4):
                x = A[i] * 2
                A[i] = x

    assert len(nodes(only_kernel(kernel, A=array(4)), For)) == 2


def test_value_used_outside_its_loop_names_both_lines():
    def kernel(A):
        box = []
        with T.Kernel(1):
            for i in T.serial(4):
                box.append(A[i])
            A[0] = box[0]

    error = refusal(TraceError, kernel, A=array(4))
    assert error.headline == (
        "`A_at` belongs to the device loop that defines it, and is used outside."
    )
    assert line_of(error) == "A[0] = box[0]"
    assert "box.append(A[i])" in str(error)


def test_tile_of_another_kernel_is_refused():
    def kernel(A):
        with T.Kernel(1):
            s = T.alloc_shared((4,), "float32")
            T.copy(A, s)
        with T.Kernel(1):
            T.copy(s, A)

    assert refusal(TraceError, kernel, A=array(4)).headline == (
        "`s` was not allocated in this kernel."
    )


@pytest.mark.parametrize(
    ("form", "headline"),
    [
        ("break_loop", "`break` would leave a device loop, whose body tracing runs only once."),
        ("break_if", "`break` under a traced condition cannot be traced."),
        ("continue_if", "`continue` under a traced condition cannot be traced."),
        ("continue_with", "`continue` under a traced condition cannot be traced."),
        ("return_if", "`return` under a traced condition cannot be traced."),
        ("return_with", "`return` inside the branch cannot be traced."),
        ("return_loop", "`return` inside the device loop cannot be traced."),
        ("assertion", "`assert` on a traced value cannot be checked while tracing."),
        ("trying", "`try` means nothing inside a kernel."),
        ("context", "`with` on an object of type Lock means nothing inside a kernel."),
    ],
)
def test_statement_that_cannot_be_traced_raises_at_its_line(form, headline):
    def break_loop(A):
        with T.Kernel(1):
            for i in T.serial(4):
                A[i] = 1.0
                break

    def break_if(A):
        with T.Kernel(1):
            for i in T.serial(4):
                if A[i] > 0:
                    break

    def continue_if(A):
        with T.Kernel(1):
            for i in T.serial(4):
                if A[i] > 0:
                    continue
                A[i] = 1.0

    def continue_with(A):
        with T.Kernel(1):
            for i in T.serial(4):
                with T.If(A[i] > 0):
                    continue
                A[i] = 1.0

    def return_if(A):
        with T.Kernel(1) as bx:
            if bx > 0:
                return
            A[0] = 1.0

    def return_with(A):
        with T.Kernel(1) as bx:
            with T.If(bx > 0):
                return
            A[0] = 1.0

    def return_loop(A):
        with T.Kernel(1):
            for i in T.serial(4):
                A[i] = 1.0
                return

    def assertion(A):
        with T.Kernel(1) as bx:
            assert bx >= 0
            A[0] = 1.0

    def trying(A):
        with T.Kernel(1):
            try:
                A[0] = 1.0
            finally:
                A[1] = 2.0

    def context(A):
        with T.Kernel(1):
            with threading.Lock():
                A[0] = 1.0

    functions = (
        break_loop, break_if, continue_if, continue_with, return_if, return_with, return_loop,
        assertion, trying, context,
    )  # fmt: skip
    fn = {f.__name__: f for f in functions}[form]
    error = refusal(TraceError, fn, A=array(4))
    assert error.headline.replace("lock", "Lock") == headline
    assert error.hint
    assert error.span.filename == __file__


def test_break_and_continue_of_host_loops_stay_python():
    def kernel(A):
        with T.Kernel(1):
            for n in (1, 2, 3, 4):
                if n == 2:
                    continue
                if n == 4:
                    break
                A[n] = 1.0
            else:
                A[0] = 1.0

    stores = nodes(only_kernel(kernel, A=array(8)), Store)
    assert [show(s.index[0]) for s in stores] == ["1", "3"]


def test_generators_and_global_statements_are_refused():
    def generator(A):
        with T.Kernel(1):
            yield A[0]

    def writes_global(A):
        global nothing
        with T.Kernel(1):
            A[0] = 1.0

    assert refusal(TraceError, generator, A=array(1)).headline == "`yield` cannot be traced."
    assert refusal(TraceError, writes_global, A=array(1)).headline == (
        "`global nothing` cannot be traced."
    )


def test_source_that_is_not_there_is_said():
    names = {}
    exec("def made(A):\n    pass\n", names)
    error = refusal(TraceError, names["made"], A=array(1))
    assert error.headline == (
        "The source of `made` is not available, and tracing needs to read it."
    )


def test_error_swallowed_by_the_function_stays_an_error():
    def kernel(A):
        try:
            with T.Kernel(1):
                A[9] = 1.0
        except TileError:
            pass
        with T.Kernel(1):
            A[0] = 1.0

    assert refusal(OutOfRangeError, kernel, A=array(1)).headline == (
        "Index 9 is outside dimension 0 of `A`, which has extent 1."
    )


def test_closures_keep_their_cells():
    factor = 2.0

    def kernel(A):
        with T.Kernel(1):
            A[0] = factor

    traced = TracedFunction(kernel)
    assert show(traced.trace({"A": array(1)}).kernels[0].body[0].value) == "2.0"
    factor = 3.0
    assert show(traced.trace({"A": array(1)}).kernels[0].body[0].value) == "3.0"


def test_spans_point_into_the_user_file_with_columns():
    def kernel(A):
        with T.Kernel(1):
            A[0] = 1.0

    (store,) = only_kernel(kernel, A=array(1)).body
    assert store.span.filename == __file__
    assert store.span.function == "kernel"
    assert store.span.column == 12


def test_two_threads_trace_at_once():
    def kernel(A, n):
        with T.Kernel(n) as bx:
            for i in T.serial(n):
                A[bx] = A[bx] + T.float32(n)

    traced = TracedFunction(kernel)
    grids, failures = {}, []

    def work(n):
        try:
            program = traced.trace({"A": array(64), "n": ConstArg(n)})
            grids[n] = show(program.kernels[0].grid[0])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert grids == {n: str(n) for n in range(1, 9)}


# -- parameters -----------------------------------------------------------------------------------


def test_kinds_of_parameters_follow_their_annotations():
    def kernel(
        A: T.Tensor,
        B: T.Tensor((4, 4), "float16"),
        alpha: T.float32,
        p: T.ptr,
        q,
        n: int = 3,
        *,
        m=4,
    ):
        pass

    kinds = {name: rule.kind for name, rule in TracedFunction(kernel).parameters.items()}
    assert kinds == {
        "A": "tensor", "B": "declared", "alpha": "scalar", "p": "pointer", "q": "auto",
        "n": "constant", "m": "constant",
    }  # fmt: skip


def test_text_annotations_see_the_names_around_the_function():
    M = 8

    def kernel(A: "T.Tensor((M, 4), 'float16')", alpha: "float32"):
        pass

    rules = TracedFunction(kernel).parameters
    assert rules["A"].annotation.shape == (8, 4)
    assert rules["alpha"].kind == "scalar"


def test_starred_parameters_are_refused():
    def kernel(*arrays):
        pass

    with pytest.raises(ArgumentError) as caught:
        TracedFunction(kernel).parameters
    assert caught.value.headline == ("`kernel` takes `*arrays`; a kernel's parameters are named.")


def test_declared_symbols_become_parameters():
    M, N = T.dynamic("M, N")

    def kernel(A: T.Tensor((M, N), "float32"), B: T.Tensor((N,), "float32"), alpha: T.float32):
        with T.Kernel((M + 7) // 8) as bx:
            for j in T.serial(N):
                A[bx, j] = B[j] * alpha

    k = only_kernel(kernel)
    assert [(p.name, p.kind) for p in k.params] == [
        ("A", ParamKind.TENSOR), ("B", ParamKind.TENSOR), ("alpha", ParamKind.SCALAR),
        ("M", ParamKind.SYMBOL), ("N", ParamKind.SYMBOL),
    ]  # fmt: skip
    assert show(k.grid[0]) == "(M + 7) // 8"


def test_symbol_of_no_argument_is_refused():
    K = T.dynamic("K")

    def kernel(A: T.Tensor((4,), "float32")):
        with T.Kernel(K):
            A[0] = 1.0

    assert refusal(TraceError, kernel).headline == (
        "The symbol `K` stands in no argument's shape, so a call cannot know it."
    )


def test_overlapping_arguments_lose_noalias_only_when_one_is_written():
    def kernel(A, B, C):
        with T.Kernel(1):
            B[0] = A[0] + C[0]

    A = array(4, overlaps=frozenset({"B"}))
    params = only_kernel(kernel, A=A, B=array(4), C=array(4)).params
    assert {p.name: p.noalias for p in params} == {"A": False, "B": False, "C": True}


def test_strided_argument_keeps_its_strides():
    def kernel(A):
        with T.Kernel(1):
            A[0, 0] = 1.0

    strided = TensorArg((4, 3), (10, 2), float32, align=4)
    (param,) = only_kernel(kernel, A=strided).params
    assert [show(s) for s in param.buffer.strides] == ["10", "2"]
    assert param.buffer.align == 4
    assert only_kernel(kernel, A=array(4, 3)).params[0].buffer.strides is None


def test_outputs_are_returned():
    def kernel(A):
        B = T.empty(A.shape, A.dtype)
        with T.Kernel(1):
            B[0] = A[0]
        return B

    program = trace(kernel, A=array(4))
    assert [b.name for b in program.outputs] == ["B"]
    assert program.results == program.outputs
    assert not program.returns_tuple


def test_return_of_something_else_is_refused():
    def kernel(A):
        with T.Kernel(1):
            A[0] = 1.0
        return 3

    assert refusal(TraceError, kernel, A=array(4)).headline == (
        "`kernel` returns `3`, which is no tensor of the call."
    )


def test_factory_returns_its_inner_function():
    def factory(M, N, dtype="float16"):
        @T.prim_func
        def main(A: T.Tensor((M, N), dtype), B: T.Tensor((M, N), dtype)):
            with T.Kernel(M) as bx:
                for j in T.Parallel(N):
                    B[bx, j] = A[bx, j] + 1

        return main

    inner = trace(factory, M=4, N=8)
    assert isinstance(inner, PrimFunc)
    (kernel,) = inner.trace({}).kernels
    assert kernel.name == "main"
    assert [b.extents for b in kernel.buffers] == [(4, 8), (4, 8)]
    assert nodes(kernel, Parallel)[0].extents == (8,)


def test_item_of_an_outer_list_set_in_a_device_loop_is_found():
    def kernel(A):
        with T.Kernel(1):
            sums = [0.0, 0.0]
            for i in T.serial(4):
                sums[0] = A[i]
            A[0] = sums[0]

    assert refusal(TraceError, kernel, A=array(4)).headline == (
        "An item of `sums`, a Python list, is set inside the device loop, which tracing would "
        "run only once."
    )


def test_host_branch_on_a_symbol_is_refused():
    M = T.dynamic("M")

    def kernel(A: T.Tensor((M,), "float32")):
        if M > 4:
            width = 8
        else:
            width = 4
        with T.Kernel(1):
            A[0] = T.float32(width)

    assert refusal(TraceError, kernel).headline == (
        "`M > 4` is only known when the kernel runs, so Python cannot decide on it."
    )


def test_loop_else_runs_after_the_loop():
    def kernel(A):
        with T.Kernel(1):
            for i in T.serial(4):
                A[i] = 1.0
            else:
                A[5] = 2.0

    loop, store = only_kernel(kernel, A=array(8)).body
    assert isinstance(loop, For)
    assert show(store.index[0]) == "5"


def test_macro_that_assigns_its_parameter_leaves_the_caller_alone():
    @T.macro
    def double(x):
        x = x * 2
        return x

    def kernel(A):
        with T.Kernel(1):
            v = T.alloc_var("float32", init=1.0)
            A[0] = double(v)
            A[1] = v

    stores = nodes(only_kernel(kernel, A=array(2)), Store)
    assert [s.buffer.name for s in stores] == ["v", "A", "A"]


def test_macro_outside_a_traced_function_is_refused():
    @T.macro
    def nothing():
        pass

    with pytest.raises(TraceError) as caught:
        nothing()
    assert caught.value.headline == (
        "`nothing` is a @T.macro and only allowed inside a @tilejit function."
    )


def test_prim_func_called_itself_is_refused():
    @T.prim_func
    def main(A: T.Tensor((4,), "float32")):
        with T.Kernel(1):
            A[0] = 1.0

    with pytest.raises(TraceError) as caught:
        main(None)
    assert caught.value.headline == "`main` is a @T.prim_func, which is not called itself."


def test_while_on_a_device_variable_reads_it_every_round():
    def kernel(A):
        with T.Kernel(1):
            going = T.alloc_var("bool", init=True)
            with T.While(going):
                going = A[0] > 0

    (loop,) = nodes(only_kernel(kernel, A=array(1)), While)
    assert [n.buffer.name for n in loop.test] == ["going"]


def test_annotated_assignment_converts():
    def kernel(A):
        with T.Kernel(2) as bx:
            x: T.float32 = bx
            A[0] = x

    (store,) = nodes(only_kernel(kernel, A=array(1)), Store)
    assert show(store.value) == "float32(bx)"


def test_loop_with_a_negative_step_has_bounds():
    def kernel(A):
        with T.Kernel(1):
            for i in T.serial(7, -1, -2):
                A[i] = 1.0

    (loop,) = nodes(only_kernel(kernel, A=array(8)), For)
    assert (loop.step, show(loop.var.low), show(loop.var.high)) == (-2, "0", "7")


@pytest.mark.parametrize(
    ("loop", "kind", "headline"),
    [
        (lambda n: T.serial(0, 4, 0), ArgumentError, "T.serial: the step must not be 0."),
        (lambda n: T.serial(0, 4, n), ArgumentTypeError, "T.serial: the step must be a constant."),
        (lambda n: T.unroll(n), ArgumentError,
         "T.unroll: the number of rounds must be constant."),
        (lambda n: T.vectorized(n), ArgumentError,
         "T.vectorized: the number of rounds must be constant."),
        (lambda n: T.Pipelined(4, num_stages=-1), ArgumentError,
         "T.Pipelined: num_stages must not be negative, got -1."),
        (lambda n: T.Pipelined(4, order=[0], stage=[0, 1]), ArgumentError,
         "T.Pipelined: order has 1 entries and stage has 2."),
        (lambda n: T.Parallel(), ArgumentError, "T.Parallel needs at least one extent."),
        (lambda n: T.Parallel(4, loop_layout=3), UnsupportedError,
         "T.Parallel: `loop_layout` is not supported."),
        (lambda n: T.serial(1.5), ArgumentTypeError,
         "The stop of T.serial must be an integer, got 1.5."),
    ],
)  # fmt: skip
def test_bad_loop_arguments_are_refused(loop, kind, headline):
    def kernel(A, n: T.int32, loop):
        with T.Kernel(1):
            for i in loop(n):
                A[i] = 1.0

    error = refusal(kind, kernel, A=array(4), n=ScalarArg(int32), loop=loop)
    assert error.headline == headline


def test_loop_outside_a_kernel_is_refused():
    def kernel(A):
        for i in T.serial(4):
            A[i] = 1.0

    assert refusal(TraceError, kernel, A=array(4)).headline == (
        "T.serial is only allowed inside a kernel."
    )


def test_symbol_and_tensor_of_one_name_make_two_parameters():
    A_symbol = T.dynamic("A")

    def kernel(A: T.Tensor((A_symbol,), "float32")):
        with T.Kernel(1):
            for i in T.serial(A_symbol):
                A[i] = 1.0

    assert [p.name for p in only_kernel(kernel).params] == ["A", "A_1"]


def test_part_of_a_slice_is_a_slice_of_the_buffer():
    def kernel(A):
        with T.Kernel(1):
            s = T.alloc_shared((8, 8), "float32")
            part = s[2:6, 4:8]
            part[1:3, :] = 1.0
            part[0, 1] = 2.0
            A[0] = part[3, 3]

    fill, store, load, _ = only_kernel(kernel, A=array(1)).body
    assert repr(fill.dst) == "s[3:5, 4:8]"
    assert [show(e) for e in store.index] == ["2", "5"]
    assert [show(e) for e in load.index] == ["5", "7"]


def test_ellipsis_stands_for_the_missing_dimensions():
    def kernel(A):
        with T.Kernel(1):
            s = T.alloc_shared((2, 3, 4), "float32")
            s[..., 1] = 1.0
            A[0] = s[0, 0, 1]

    assert nodes(only_kernel(kernel, A=array(1)), Fill)[0].dst.shape == (2, 3)


def test_parallel_iteration_that_reads_its_neighbour_is_refused():
    def kernel(A):
        with T.Kernel(1):
            for i, j in T.Parallel(8, 8):
                A[i, j] = A[i, j + 1] + 1

    error = refusal(TraceError, kernel, A=array(8, 9))
    assert error.headline == "`A[i, j + 1]` is written by another iteration of T.Parallel."
    assert error.hint == ("Iterations run in any order: write to another tile, or use T.serial.")


def test_parallel_iteration_that_reads_its_own_element_is_legal():
    def kernel(A):
        with T.Kernel(2) as bx:
            for i in T.Parallel(8):
                A[bx * 8 + i] = A[bx * 8 + i] + 1
            for i in T.Parallel(8):
                A[2 * i] = A[2 * i + 1]
            for i in T.Parallel(8):
                A[i] = A[i + 8]

    assert len(nodes(only_kernel(kernel, A=array(16)), Parallel)) == 3


def test_nested_function_with_nonlocal_is_refused():
    def kernel(A):
        total = 0.0
        with T.Kernel(1):

            def add(x):
                nonlocal total
                total = total + x

            for i in T.serial(4):
                add(A[i])

    assert refusal(TraceError, kernel, A=array(4)).headline == "`nonlocal total` cannot be traced."


def test_matrix_product_operator_points_at_gemm():
    def kernel(A):
        with T.Kernel(1):
            A @ A

    error = refusal(ArgumentTypeError, kernel, A=array(4, 4))
    assert error.headline == "Tiles are not multiplied with `@`."
    assert error.hint == "Write `T.gemm(a, b, acc)` with a fragment `acc`."


def test_barrier_of_an_array_must_be_chosen():
    def kernel(A):
        with T.Kernel(1):
            bars = T.alloc_barrier([32, 32])
            T.barrier_arrive(bars)

    error = refusal(ShapeError, kernel, A=array(1))
    assert "`bars` holds 2 barriers" in error.headline
    assert error.hint == "Write `bars[k]`."


def test_walrus_in_a_condition_binds_its_name():
    def kernel(A):
        with T.Kernel(1):
            if (z := A[1]) > 0:
                A[0] = z

    (_, branch) = only_kernel(kernel, A=array(2)).body
    assert show(branch.then[0].value) == "A_at"


def test_walrus_in_the_condition_of_a_traced_while_is_refused():
    def kernel(A):
        with T.Kernel(1):
            while (z := A[1]) > 0:
                A[0] = z

    assert refusal(TraceError, kernel, A=array(2)).headline == (
        "A condition with `:=` cannot be traced."
    )


def test_branch_on_a_constant_keeps_only_what_runs():
    def kernel(A, flag):
        with T.Kernel(1):
            with T.If(flag):
                A[0] = 1.0
            with T.Else():
                A[0] = 2.0

    for flag, stored in ((True, "1.0"), (False, "2.0")):
        (store,) = only_kernel(kernel, A=array(1), flag=flag).body
        assert show(store.value) == stored


def test_functions_with_unusual_syntax_trace_as_python_runs_them():
    def kernel(A, /, *, n=4, mode="x"):
        first, *rest = (2.0, 3.0, 4.0)
        scale = lambda v: v * first if n > 2 else v
        match mode:
            case "x":
                extra = 1
            case other:
                extra = len(other)
        with T.Kernel(1) as bx:
            values = [k for k in range(n) if k % 2 and k != 3]
            text = """
no indentation here"""
            A[0] = scale(A[1]) + extra + len(values) + len(rest) + text.count("here")

    (_, store) = only_kernel(kernel, A=array(2)).body
    assert show(store.value) == "((((A_at * 2.0) + 1.0) + 1.0) + 2.0) + 1.0"
