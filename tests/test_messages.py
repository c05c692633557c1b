"""What users read when they are wrong, pinned whole: headline, marked source, notes and hint.

Each message is written here with its marked source in place of file, line and carets: `at` is the
line under carets, `and` another place that matters, with its label.
"""

from __future__ import annotations

import contextlib
import math
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tilejit.language as T
from tilejit import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    OutOfRangeError,
    ResourceError,
    ShapeError,
    TileError,
    TraceError,
    UnsupportedError,
    tilejit,
)

pytestmark = pytest.mark.usefixtures("reference")
HERE = Path(__file__)
SOURCE = HERE.read_text(encoding="utf-8").splitlines()


def condensed(text: str) -> list[str]:
    """A message with marked source for file, line and carets, all of which are checked."""
    lines = text.split("\n")
    result = [lines[0]]
    where = re.fullmatch(r'  File "(.+)", line (\d+), in (\S+)', lines[1])
    assert where and Path(where[1]) == HERE, lines[1]
    rest = iter(lines[2:])
    for line in rest:
        quoted = re.match(r" *(\d+) \| ", line)
        if not quoted:
            assert re.match(r"  (Note|Hint): +\S", line), line
            result.append(line.strip())
            continue
        number, source = int(quoted[1]), line[quoted.end() :]
        assert source == SOURCE[number - 1], line
        gutter, marks = next(rest).split("| ", 1)
        assert not gutter.strip(), gutter
        begin = len(marks) - len(marks.lstrip())
        width = len(re.match(r"\^+|-+", marks[begin:])[0])
        is_first = marks[begin] == "^"
        assert is_first == (number == int(where[2]) and len(result) == 1), line
        label = marks[begin + width :].strip()
        marked = source[begin : begin + width]
        result.append(f"at {marked}" if is_first else f"and {marked}: {label}")
    return result


@contextlib.contextmanager
def message(kind: type[TileError], expected: str) -> Iterator[None]:
    """The body raises `kind` with exactly that message."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert condensed(str(caught.value)) == textwrap.dedent(expected).strip().split("\n")


def spec(*shape: int, dtype: str = "float32"):
    return T.Tensor(shape, dtype)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


class State:
    value = 3


STATE = State()
N = T.dynamic("N")


def test_gemm_with_unequal_k_names_both_tiles():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((64, 128), "float16")
            c = T.alloc_fragment((64, 128), "float32")
            T.gemm(a, b, c)

    with message(
        ShapeError,
        """
        T.gemm: A is 64x32 and B is 64x128, so their K extents (32 and 64) differ.
        at T.gemm(a, b, c)
        and T.alloc_shared((64, 32), "float16"): a comes from here
        and T.alloc_shared((64, 128), "float16"): b comes from here
        Hint: Give both tiles the same K, or toggle transpose_A (True if A is stored K x M).
        """,
    ):
        kernel.compile(spec(4))


def test_gemm_with_an_accumulator_of_other_columns_names_both():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((32, 128), "float16")
            c = T.alloc_fragment((64, 64), "float32")
            T.gemm(a, b, c)

    with message(
        ShapeError,
        """
        T.gemm: B is 32x128 and C is 64x64, so their N extents (128 and 64) differ.
        at T.gemm(a, b, c)
        and T.alloc_shared((32, 128), "float16"): b comes from here
        and T.alloc_fragment((64, 64), "float32"): c comes from here
        Hint: C has as many columns as the product: 64x128.
        """,
    ):
        kernel.compile(spec(4))


def test_gemm_of_two_dtypes_lists_those_that_work():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((32, 64), "bfloat16")
            c = T.alloc_fragment((64, 64), "float32")
            T.gemm(a, b, c)

    with message(
        DTypeError,
        """
        T.gemm: nothing multiplies float16 (A) by bfloat16 (B).
        at T.gemm(a, b, c)
        and T.alloc_shared((64, 32), "float16"): a comes from here
        and T.alloc_shared((32, 64), "bfloat16"): b comes from here
        Hint: Both tiles need the same dtype, one of float16, bfloat16, tfloat32, float32, float64, int8, uint8, float8_e4m3fn, float8_e5m2; T.copy casts.
        """,
    ):
        kernel.compile(spec(4))


def test_gemm_into_a_wrong_accumulator_names_the_right_dtype():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "int8")
            b = T.alloc_shared((32, 64), "int8")
            c = T.alloc_fragment((64, 64), "float32")
            T.gemm(a, b, c)

    with message(
        DTypeError,
        """
        T.gemm: products of int8 (A) by int8 (B) add up in int32, but C is float32.
        at T.gemm(a, b, c)
        and T.alloc_fragment((64, 64), "float32"): c comes from here
        Hint: Allocate C as "int32".
        """,
    ):
        kernel.compile(spec(4))


def test_gemm_on_a_tensor_in_global_memory_says_to_copy_it():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            b = T.alloc_shared((32, 64), "float16")
            c = T.alloc_fragment((64, 64), "float32")
            T.gemm(A, b, c)

    with message(
        ArgumentError,
        """
        T.gemm: A is in global memory, but it has to be in shared memory or a fragment.
        at T.gemm(A, b, c)
        and A: A comes from here
        Hint: Copy it to shared memory with T.copy first.
        """,
    ):
        kernel.compile(spec(64, 32, dtype="float16"))


def test_gemm_into_shared_memory_says_to_use_a_fragment():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((32, 64), "float16")
            c = T.alloc_shared((64, 64), "float32")
            T.gemm(a, b, c)

    with message(
        ArgumentError,
        """
        T.gemm: C is in shared memory, but it has to be in a fragment.
        at T.gemm(a, b, c)
        and T.alloc_shared((64, 64), "float32"): c comes from here
        Hint: Allocate it with T.alloc_fragment.
        """,
    ):
        kernel.compile(spec(64, 32, dtype="float16"))


def test_copy_between_unequal_tiles_names_both():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float32")
            b = T.alloc_fragment((32, 32), "float32")
            T.copy(a, b)

    with message(
        ShapeError,
        """
        T.copy: the source is 64x32, but the destination is 32x32.
        at T.copy(a, b)
        and T.alloc_shared((64, 32), "float32"): a comes from here
        and T.alloc_fragment((32, 32), "float32"): b comes from here
        Hint: Give both sides the same extents, or a start point such as `b[i, j]`, which takes them from the other side.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_copy_of_a_slice_with_other_extents_names_both():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float32")
            T.copy(A[0:48, 0:32], a)

    with message(
        ShapeError,
        """
        T.copy: the source is 48x32, but the destination is 64x32.
        at T.copy(A[0:48, 0:32], a)
        and A: A comes from here
        and T.alloc_shared((64, 32), "float32"): a comes from here
        Hint: Give both sides the same extents, or a start point such as `a[i, j]`, which takes them from the other side.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_copy_to_a_tile_of_higher_rank_names_both():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32, 2), "float32")
            T.copy(A[0, 0], a)

    with message(
        ShapeError,
        """
        T.copy: `A` has 2 dimensions, but `a` is 64x32x2.
        at T.copy(A[0, 0], a)
        and A: A comes from here
        and T.alloc_shared((64, 32, 2), "float32"): a comes from here
        Hint: Copy a slice with fewer dimensions.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_copy_of_a_number_shows_what_it_takes():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float32")
            T.copy(3, a)

    with message(
        ArgumentTypeError,
        """
        T.copy: the source is 3, not a buffer, a slice or an element of one.
        at T.copy(3, a)
        Hint: For example `A`, `A[i, j]` (a start point) or `A[i:i + 64, j:j + 32]`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_index_outside_a_tile_names_its_extent():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((64, 32), "float32")
            s[0, 32] = 1.0

    with message(
        OutOfRangeError,
        """
        Index 32 is outside dimension 1 of `s`, which has extent 32.
        at s[0, 32]
        and T.alloc_shared((64, 32), "float32"): s comes from here
        Hint: Indexes of that dimension go from 0 to below 32.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_index_that_a_loop_drives_outside_names_how_far():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((64,), "float32")
            for i in T.Parallel(64):
                s[i + 1] = 0.0

    with message(
        OutOfRangeError,
        """
        Index `i + 1` reaches 64, but dimension 0 of `s` has extent 64.
        at s[i + 1]
        and T.alloc_shared((64,), "float32"): s comes from here
        Hint: Shrink the loop, or guard the access with `with T.If(cond):`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_negative_index_does_not_wrap():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            A[-1, 0] = 1.0

    with message(
        OutOfRangeError,
        """
        Index -1 is outside dimension 0 of `A`, which has extent 64.
        at A[-1, 0]
        and A: A comes from here
        Hint: Negative indexes do not wrap in a kernel.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_slice_outside_a_tile_names_its_extent():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((64,), "float32")
            T.clear(s[32:80])

    with message(
        OutOfRangeError,
        """
        Slice 32:80 is outside dimension 0 of `s`, which has extent 64.
        at s[32:80]
        and T.alloc_shared((64,), "float32"): s comes from here
        Hint: Indexes of that dimension go from 0 to below 64.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_slice_with_a_step_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((64,), "float32")
            T.clear(s[0:64:2])

    with message(
        UnsupportedError,
        """
        The slice of dimension 0 of `s` has step 2; only 1 works.
        at s[0:64:2]
        Hint: Loop over the elements with T.Parallel: `A[i * 2]`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_more_indexes_than_dimensions_are_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            A[0, 0, 0] = 1.0

    with message(
        OutOfRangeError,
        """
        `A` has 2 dimensions and is indexed with 3.
        at A[0, 0, 0]
        and A: A comes from here
        Hint: Give at most one index for each dimension.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_index_that_is_no_integer_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            A[0.5, 0] = 1.0

    with message(
        ArgumentTypeError,
        """
        The index of dimension 0 of `A` must be an integer, got 0.5.
        at A[0.5, 0]
        Hint: Divide integers with `//`; convert with `T.int32(x)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_allocation_outside_a_kernel_says_where_it_goes():
    @tilejit
    def kernel(A: T.Tensor):
        s = T.alloc_shared((64,), "float32")
        with T.Kernel(1, threads=128):
            T.clear(s)

    with message(
        TraceError,
        """
        T.alloc_shared is only allowed inside a kernel.
        at T.alloc_shared((64,), "float32")
        Hint: Put it under `with T.Kernel(...) as ...:` in a @tilejit function.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_tile_op_outside_a_kernel_says_where_it_goes():
    @tilejit
    def kernel(A: T.Tensor):
        T.clear(A)

    with message(
        TraceError,
        """
        T.clear is only allowed inside a kernel.
        at T.clear(A)
        Hint: Put it under `with T.Kernel(...) as ...:` in a @tilejit function.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_allocation_outside_any_function_says_where_it_goes():
    with message(
        TraceError,
        """
        T.alloc_fragment is only allowed inside a kernel.
        at T.alloc_fragment((8, 8), "float32")
        Hint: Put it under `with T.Kernel(...) as ...:` in a @tilejit function.
        """,
    ):
        T.alloc_fragment((8, 8), "float32")


def test_kernel_in_a_kernel_shows_the_outer_one():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            with T.Kernel(2):
                pass

    with message(
        TraceError,
        """
        A T.Kernel cannot be inside another one.
        at T.Kernel(2)
        and T.Kernel(1, threads=128): the outer kernel
        Hint: Close the first kernel; several in a row run in order.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_unknown_dtype_is_suggested():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((64,), "float17")

    with message(
        DTypeError,
        """
        'float17' is not a dtype that tilejit knows.
        at T.alloc_shared((64,), "float17")
        Hint: Did you mean "float16"?
        """,
    ):
        kernel.compile(spec(64, 32))


def test_tile_without_elements_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((64, 0), "float32")

    with message(
        ShapeError,
        """
        T.alloc_shared: extent 1 is 0; a tile has at least one element.
        at T.alloc_shared((64, 0), "float32")
        Hint: Allocate nothing, or give a positive extent.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_tile_with_a_runtime_extent_is_refused():
    @tilejit
    def kernel(A: T.Tensor((T.dynamic("M"),), "float32")):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((A.shape[0],), "float32")

    with message(
        ShapeError,
        """
        T.alloc_shared: extent 0 is `M`, which is known only at run time.
        at T.alloc_shared((A.shape[0],), "float32")
        Hint: Give the tile a constant extent; T.copy stops at a tensor's edge by itself.
        """,
    ):
        kernel.compile()


def test_bool_of_a_traced_value_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=128) as bx:
            x = bool(bx > 2)

    with message(
        TraceError,
        """
        `bx > 2` is only known when the kernel runs, so Python cannot decide on it.
        at bool(bx > 2)
        Hint: Keep it traced; `x.astype("bool")` converts it.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_int_of_a_traced_value_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=128) as bx:
            x = int(bx)

    with message(
        TraceError,
        """
        `bx` is only known when the kernel runs; int() needs its number now.
        at int(bx)
        Hint: Keep it traced; `x.astype("int32")` converts it.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_device_loop_that_indexes_a_list_is_told_of_tuples():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            sums = [T.alloc_fragment((64, 32), "float32") for _ in range(2)]
            for x in range(2):
                T.clear(sums[x])

    with message(
        TraceError,
        """
        `x` is only known when the kernel runs; Python needs its number now.
        at sums[x]
        Hint: Use `T.serial(x)` for a loop, sizes that are constants or compile-time parameters for tiles, and to index a list `for x in (0, 1):`, which unrolls.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_len_of_a_tensor_names_its_shape():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=128) as bx:
            x = len(A)

    with message(
        TraceError,
        """
        `len(A)` is not available while tracing.
        at len(A)
        Hint: Write `A.shape[0]`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_builtin_max_of_traced_values_names_ours():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=128) as bx:
            x = max(bx, 2)

    with message(
        TraceError,
        """
        `bx < 2` is only known when the kernel runs, so Python cannot decide on it.
        at max(bx, 2)
        Hint: Write `T.max(a, b)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_math_function_of_an_element_shows_the_element():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=128) as bx:
            A[0, 0] = math.exp(A[0, 1])

    with message(
        TraceError,
        """
        `A[0, 1]` is only known when the kernel runs; float() needs its number now.
        at math.exp(A[0, 1])
        Hint: Keep it traced; `x.astype("float32")` converts it.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_numpy_function_of_a_traced_value_names_ours():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=128) as bx:
            A[0, 0] = np.exp(A[0, 1])

    with message(
        TraceError,
        """
        `np.exp` cannot compute with a traced value.
        at np.exp(A[0, 1])
        Hint: Use the functions of `tilejit.language`, such as `T.exp(x)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_name_rebound_in_a_loop_shows_both_lines():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            total = 0
            for i in T.serial(8):
                total = total + i
            A[0, 0] = total

    with message(
        TraceError,
        """
        `total` is re-bound inside the device loop, which tracing would run only once.
        at total = total + i
        and total = 0: bound here
        Hint: Make it a variable of the device: `total = T.alloc_var(dtype, init=...)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_name_rebound_in_a_branch_shows_both_lines():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            x = 0
            if bx > 0:
                x = 1
            A[0, 0] = x

    with message(
        TraceError,
        """
        `x` is re-bound inside the branch, which tracing would run only once.
        at x = 1
        and x = 0: bound here
        Hint: Make it a variable of the device: `x = T.alloc_var(dtype, init=...)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_break_under_a_traced_condition_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in T.serial(8):
                if A[i, 0] > 0:
                    break

    with message(
        TraceError,
        """
        `break` under a traced condition cannot be traced.
        at A[i, 0] > 0
        Hint: Use `with T.While(cond):` with the condition for going on.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_return_inside_a_device_loop_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in T.serial(8):
                return

    with message(
        TraceError,
        """
        `return` inside the device loop cannot be traced.
        at return
        and T.serial(8): opened here
        Hint: Let the function end; guard the rest with `with T.If(cond):`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_range_to_a_fraction_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in range(2.5):
                A[i, 0] = 1.0

    with message(
        ArgumentTypeError,
        """
        The stop of range must be an integer, got 2.5.
        at range(2.5)
        Hint: Divide integers with `//`; convert with `T.int32(x)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_range_with_step_zero_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in range(0, 8, 0):
                A[i, 0] = 1.0

    with message(
        ArgumentError,
        """
        range: the step must not be 0.
        at range(0, 8, 0)
        Hint: Leave it out to count up by 1.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_value_of_a_loop_read_after_it_shows_both_lines():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in range(4):
                y = A[i, 0] * 2
            A[0, 0] = y

    with message(
        TraceError,
        """
        `y` is bound inside the device loop and read after it.
        at y
        and y = A[i, 0] * 2: bound here
        Hint: Make it a variable of the device before: `y = T.alloc_var(dtype)`; for a choice of two values write `T.if_then_else(cond, a, b)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_parallel_over_a_runtime_extent_is_refused():
    @tilejit
    def kernel(A: T.Tensor((T.dynamic("M"),), "float32")):
        with T.Kernel(2, threads=128) as bx:
            for i in T.Parallel(A.shape[0]):
                A[i] = 0.0

    with message(
        ShapeError,
        """
        T.Parallel: extent 0 must be a constant, got `M`.
        at T.Parallel(A.shape[0])
        Hint: Loop over a constant tile and guard with `with T.If(i < n):`.
        """,
    ):
        kernel.compile()


def test_parallel_without_iterations_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in T.Parallel(0):
                A[i, 0] = 0.0

    with message(
        ShapeError,
        """
        T.Parallel: extent 0 must be positive, got 0.
        at T.Parallel(0)
        Hint: A loop that runs no iteration can be left out.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_parallel_in_a_parallel_shows_the_outer_one():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in T.Parallel(4):
                for j in T.Parallel(4):
                    A[i, j] = 0.0

    with message(
        TraceError,
        """
        A T.Parallel cannot be inside another one.
        at T.Parallel(4)
        and T.Parallel(4): the outer loop
        Hint: Write one loop over both: `for i, j in T.Parallel(m, n):`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_parallel_with_too_many_loop_names_counts_both():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i, j, k in T.Parallel(4, 8):
                A[i, j] = 0.0

    with message(
        ArgumentError,
        """
        T.Parallel gives 2 loop variables, but 3 names take them.
        at T.Parallel(4, 8)
        Hint: Write one name for each extent.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_parallel_that_reads_what_it_writes_elsewhere_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            s = T.alloc_shared((64,), "float32")
            for i in T.Parallel(63):
                s[i] = s[i + 1]

    with message(
        TraceError,
        """
        `s[i + 1]` is written by another iteration of T.Parallel.
        at s[i + 1]
        and s[i]: written here
        Hint: Iterations run in any order: write to another tile, or use T.serial.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_parallel_that_adds_up_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            a, total = T.alloc_fragment((64, 32), A.dtype), T.alloc_fragment((64,), A.dtype)
            T.copy(A, a)
            T.clear(total)
            for i, j in T.Parallel(64, 32):
                total[i] += a[i, j]

    with message(
        TraceError,
        """
        `total[i]` is read and written by every iteration over `j` of T.Parallel.
        at total[i]
        and total[i]: written here
        Hint: Combine elements with T.reduce_sum or another reduction, or write a loop without `j`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_parallel_may_read_what_its_own_iteration_wrote():
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=128):
            a, most = T.alloc_fragment((8, 32), A.dtype), T.alloc_fragment((8,), A.dtype)
            T.copy(A, a)
            for i, j in T.Parallel(8, 32):
                most[i] = i + 1.0  # the same for every j
                most[i] = most[i] * 2
                B[i, j] = a[i, j] * most[i]
            for i in T.Parallel(8):
                most[i] += 1

    kernel.compile(spec(8, 32), spec(8, 32))


def test_copy_in_a_branch_of_some_threads_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            tx = T.get_thread_binding()
            s = T.alloc_shared((64, 32), "float32")
            with T.If(tx < 32):
                T.copy(A, s)

    with message(
        TraceError,
        """
        T.copy needs all threads of the block, but it stands in a branch or loop that not all of them take.
        at T.copy(A, s)
        Hint: Move it out, or make the condition the same for all of them.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_copy_in_a_parallel_loop_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            s = T.alloc_shared((64, 32), "float32")
            for i in T.Parallel(4):
                T.copy(A, s)

    with message(
        TraceError,
        """
        T.copy is not allowed inside T.Parallel.
        at T.copy(A, s)
        and T.Parallel(4): T.Parallel starts here
        Hint: All threads of the block do it together: move it out of the loop.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_barrier_in_a_branch_of_some_threads_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            tx = T.get_thread_binding()
            with T.If(tx < 32):
                T.sync_threads()

    with message(
        TraceError,
        """
        T.sync_threads needs all threads of the block, but it stands in a branch or loop that not all of them take.
        at T.sync_threads()
        Hint: Move it out, or make the condition the same for all of them.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_more_threads_than_a_block_has_names_both():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=2048) as bx:
            A[0, 0] = 1.0

    with message(
        ResourceError,
        """
        T.Kernel: 2048 threads are more than the 1024 a block can have.
        at T.Kernel(2, threads=2048)
        Hint: Use fewer threads and more blocks.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_kernel_without_threads_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=0) as bx:
            A[0, 0] = 1.0

    with message(
        ArgumentError,
        """
        T.Kernel: threads must be positive, got 0.
        at T.Kernel(2, threads=0)
        Hint: A multiple of 32, such as 128, uses whole warps.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_grid_with_four_extents_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, 2, 2, 2) as bx:
            A[0, 0] = 1.0

    with message(
        ArgumentError,
        """
        T.Kernel takes 1 to 3 grid extents, got 4.
        at T.Kernel(2, 2, 2, 2)
        Hint: Fold two into one, and split the block's index with `//` and `%`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_grid_extent_that_is_no_integer_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(A.shape[0] / 2) as bx:
            A[0, 0] = 1.0

    with message(
        ArgumentTypeError,
        """
        The grid extent 0 of T.Kernel must be an integer, got 32.0.
        at T.Kernel(A.shape[0] / 2)
        Hint: Divide integers with `//`; convert with `T.int32(x)`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_block_index_unpacked_into_two_names_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4) as (bx, by):
            A[0, 0] = 1.0

    with message(
        TraceError,
        """
        `bx` is one number, so it cannot be unpacked or iterated over.
        at (bx, by)
        Hint: Take as many names as T.Kernel or T.Parallel has extents; for a loop of n rounds write `for i in T.serial(n):`.
        """,
    ):
        kernel.compile(spec(64, 32))


def test_shared_memory_beyond_the_chip_lists_who_uses_it():
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            a = T.alloc_shared((256, 128), "float32")
            b = T.alloc_shared((128, 128), "float32")
            T.copy(A, a)
            T.copy(B, b)
            T.copy(a, A)
            T.copy(b, B)

    with message(
        ResourceError,
        """
        Kernel `kernel` needs 196608 bytes of shared memory; sm_86 has 101376 for a block.
        at T.alloc_shared((256, 128), "float32")
        Note:    131072 bytes  a: 256x128 float32
        Note:     65536 bytes  b: 128x128 float32
        Hint: Use smaller tiles or fewer stages.
        """,
    ):
        kernel.compile(spec(256, 128), spec(128, 128), target="sm_86")


def test_fragment_beyond_the_registers_names_both_numbers():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            a = T.alloc_fragment((512, 128), "float32")
            T.copy(A, a)
            T.copy(a, A)

    with message(
        ResourceError,
        """
        Fragment `a` of 512x128 float32 needs 512 registers in each of 128 threads; 256 is the most.
        at T.alloc_fragment((512, 128), "float32")
        Hint: Use a smaller tile, more threads, or alloc_shared.
        """,
    ):
        kernel.compile(spec(512, 128), target="sm_86")


def test_unknown_target_lists_the_targets():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            A[0, 0] = 1.0

    with message(
        UnsupportedError,
        """
        'sm_75' is not a target that tilejit compiles for.
        at kernel.compile(spec(512, 128), target="sm_75")
        Hint: Targets: sm_80, sm_86, sm_89, sm_90, sm_90a, sm_100a, sm_120a.
        """,
    ):
        kernel.compile(spec(512, 128), target="sm_75")


def test_initial_value_outside_its_dtype_names_the_range():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            x = T.alloc_var("int8", init=300)

    with message(
        ArgumentError,
        """
        300 does not fit int8 (-128 to 127).
        at T.alloc_var("int8", init=300)
        Hint: Choose a wider dtype, or a number that fits.
        """,
    ):
        kernel.compile(spec(512, 128))


def test_initial_value_that_is_no_integer_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            x = T.alloc_var("int32", init=1.5)

    with message(
        ArgumentError,
        """
        1.5 is not a whole number, so it is no int32.
        at T.alloc_var("int32", init=1.5)
        Hint: Round it, or choose a floating-point dtype.
        """,
    ):
        kernel.compile(spec(512, 128))


def test_barrier_without_arrivals_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            x = T.alloc_barrier(0)

    with message(
        ArgumentError,
        """
        T.alloc_barrier: the arrive count is 0; a phase takes 1 to 1048575 arrivals.
        at T.alloc_barrier(0)
        Hint: Count the threads that arrive: 1, or as many as T.Kernel has.
        """,
    ):
        kernel.compile(spec(512, 128))


def test_barrier_with_a_negative_count_names_which():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            x = T.alloc_barrier([128, -1])

    with message(
        ArgumentError,
        """
        T.alloc_barrier: arrive count 1 is -1; a phase takes 1 to 1048575 arrivals.
        at T.alloc_barrier([128, -1])
        Hint: Count the threads that arrive: 1, or as many as T.Kernel has.
        """,
    ):
        kernel.compile(spec(512, 128))


def test_strides_of_another_number_than_extents_count_both():
    with message(
        ShapeError,
        """
        T.StridedTensor: 2 extents but 1 stride.
        at T.StridedTensor((8, 8), (8,), "float32")
        Hint: Give one stride, in elements, for each extent.
        """,
    ):
        T.StridedTensor((8, 8), (8,), "float32")


def test_axis_separators_are_refused():
    with message(
        UnsupportedError,
        """
        T.Buffer: axis_separators is [1], but a GPU's memory is flat.
        at T.Buffer((8, 8), "float32", axis_separators=[1])
        Hint: Leave it out.
        """,
    ):
        T.Buffer((8, 8), "float32", axis_separators=[1])


def test_choice_of_a_string_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            A[0, 0] = T.if_then_else(bx > 0, "a", 1.0)

    with message(
        ArgumentTypeError,
        """
        T.if_then_else: 'a' is not a number or a traced value.
        at T.if_then_else(bx > 0, "a", 1.0)
        Hint: Tiles are computed element by element in T.Parallel.
        """,
    ):
        kernel.compile(spec(512, 128))


def test_sum_of_float16_and_bfloat16_is_refused():
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            A[0] = A[0] + B[0]

    with message(
        DTypeError,
        """
        float16 and bfloat16 have no common type.
        at A[0] + B[0]
        Hint: Cast one side, for example `x.astype('float32')`.
        """,
    ):
        kernel.compile(spec(8, dtype="float16"), spec(8, dtype="bfloat16"))


def test_bit_operation_on_floats_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            A[0] = A[0] & 1

    with message(
        DTypeError,
        """
        `&` needs integers or bools, got float16.
        at A[0] & 1
        Hint: Reinterpret the bits first: `T.reinterpret(x, 'uint32')`.
        """,
    ):
        kernel.compile(spec(8, dtype="float16"))


def test_truth_of_a_tile_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            if A:
                A[0] = 1.0

    with message(
        TraceError,
        """
        `A` is a tile, so it is neither true nor false.
        at if A:
        Hint: To test an optional argument write `if x is not None:`.
        """,
    ):
        kernel.compile(spec(8, dtype="float16"))


def test_continue_under_a_traced_condition_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            while A[0] > 0:
                if A[0] > 4:
                    continue
                A[0] = A[0] - 1

    with message(
        TraceError,
        """
        `continue` under a traced condition cannot be traced.
        at A[0] > 4
        Hint: Put the rest of the body under `with T.If(...):` with the opposite condition.
        """,
    ):
        kernel.compile(spec(8, dtype="float16"))


def test_assert_on_a_traced_value_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            assert A[0] > 0

    with message(
        TraceError,
        """
        `assert` on a traced value cannot be checked while tracing.
        at A[0] > 0
        Hint: Check arguments before the call, or guard with `with T.If(cond):`.
        """,
    ):
        kernel.compile(spec(8, dtype="float16"))


def test_pipeline_with_negative_stages_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            for i in T.Pipelined(4, num_stages=-1):
                A[i] = 0.0

    with message(
        ArgumentError,
        """
        T.Pipelined: num_stages must not be negative, got -1.
        at T.Pipelined(4, num_stages=-1)
        Hint: 0 or 1 keeps one copy of each tile; 3 loads two rounds ahead.
        """,
    ):
        kernel.compile(spec(8, dtype="float16"))


def test_out_idx_outside_the_parameters_counts_them():
    @tilejit(out_idx=[5])
    def factory(n):
        @T.prim_func
        def inner(A: T.Tensor((n,), "float32")):
            with T.Kernel(1, threads=32):
                T.clear(A)

        return inner

    with message(
        ArgumentError,
        """
        inner: out_idx 5 is outside its 1 parameters.
        at factory(8)
        Hint: Parameters count from 0, or from -1 at the end.
        """,
    ):
        factory(8)


def test_mutable_global_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            A[0] = STATE.value

    with message(
        ArgumentTypeError,
        """
        kernel reads `STATE`, a State; tilejit cannot tell when it changes.
        at def kernel(A: T.Tensor):
        Hint: Pass it as an argument, or use numbers, strings, dtypes, tuples, lists or dicts.
        """,
    ):
        kernel(zeros(8))


def test_function_without_a_kernel_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        A.shape

    with message(
        TraceError,
        """
        `kernel` opens no kernel, so a call would do nothing.
        at def kernel(A: T.Tensor):
        Hint: Put the work under `with T.Kernel(...) as ...:`.
        """,
    ):
        kernel(zeros(8))


def test_else_without_if_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128) as bx:
            with T.Else():
                A[0] = 1.0

    with message(
        TraceError,
        """
        T.Else has no T.If just before it.
        at with T.Else():
        Hint: Write `with T.If(cond):` and `with T.Else():` one after the other.
        """,
    ):
        kernel(zeros(8))


def test_gemm_with_an_unknown_policy_lists_them():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((32, 64), "float16")
            c = T.alloc_fragment((64, 64), "float32")
            T.gemm(a, b, c, policy="rows")

    with message(
        ArgumentError,
        """
        T.gemm: 'rows' is not a policy for sharing C among warps.
        at T.gemm(a, b, c, policy="rows")
        Hint: Policies: T.GemmWarpPolicy.Square, T.GemmWarpPolicy.FullRow, T.GemmWarpPolicy.FullCol.
        """,
    ):
        kernel.compile(spec(4))


def test_atomic_that_the_dtype_lacks_lists_those_that_have_it():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            T.atomic_or(A[0], 3)

    with message(
        DTypeError,
        """
        T.atomic_or: `A` is float32, which has no atomic or.
        at T.atomic_or(A[0], 3)
        Hint: Dtypes: int32, uint32, int64, uint64.
        """,
    ):
        kernel.compile(spec(4))


def test_fill_outside_the_dtype_names_the_range():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((4,), "uint8")
            T.fill(s, 256)

    with message(
        ArgumentError,
        """
        256 does not fit uint8 (0 to 255).
        at T.fill(s, 256)
        Hint: Choose a wider dtype, or a number that fits.
        """,
    ):
        kernel.compile(spec(4))


def test_cast_to_an_unknown_dtype_is_suggested():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            A[0] = T.cast(A[1], "float23")

    with message(
        DTypeError,
        """
        'float23' is not a dtype that tilejit knows.
        at T.cast(A[1], "float23")
        Hint: Did you mean "float32"?
        """,
    ):
        kernel.compile(spec(4))


def test_view_larger_than_its_buffer_names_both():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((4,), "uint8")
            v = T.SharedBuffer((8,), "float32", data=s)
            T.clear(v)

    with message(
        OutOfRangeError,
        """
        T.SharedBuffer: the view ends at byte 32, but `s` has 4 bytes.
        at T.SharedBuffer((8,), "float32", data=s)
        and T.alloc_shared((4,), "uint8"): s comes from here
        Note: The view is 8 float32, `s` is 4 uint8.
        Hint: Make the view smaller, or allocate more.
        """,
    ):
        kernel.compile(spec(4))


def test_generator_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            yield A

    with message(
        TraceError,
        """
        `yield` cannot be traced.
        at yield A
        Hint: A kernel function runs to its end.
        """,
    ):
        kernel.compile(spec(4))


def test_array_read_from_the_closure_is_refused():
    W = zeros(4)

    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            A[0] = W[0]

    with message(
        ArgumentTypeError,
        """
        kernel reads `W`, an ndarray; tilejit cannot tell when it changes.
        at def kernel(A: T.Tensor):
        Hint: Pass it as an argument, or use numbers, strings, dtypes, tuples, lists or dicts.
        """,
    ):
        kernel.compile(spec(4))


def test_call_without_an_argument_names_it():
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            T.copy(A[0], B[0])

    with message(
        ArgumentTypeError,
        """
        kernel: B is missing.
        at kernel(zeros(8))
        Hint: It takes: A, B.
        """,
    ):
        kernel(zeros(8))


def test_argument_of_another_dtype_names_both():
    @tilejit
    def kernel(A: T.Tensor((8,), "float16")):
        with T.Kernel(1, threads=32):
            T.clear(A)

    with message(
        DTypeError,
        """
        kernel: A has dtype float32, but it was declared float16.
        at kernel(zeros(8))
        Hint: Convert it first, for example with `A.astype(...)`.
        """,
    ):
        kernel(zeros(8))


def test_argument_of_another_rank_names_both():
    @tilejit
    def kernel(A: T.Tensor((8, 8), "float32")):
        with T.Kernel(1, threads=32):
            T.clear(A)

    with message(
        ShapeError,
        """
        kernel: A has 1 dimension, but it was declared with 2.
        at kernel(zeros(8))
        Note: Its shape is (8,); declared: (8, 8).
        Hint: Reshape it, or index out the dimensions that are too many.
        """,
    ):
        kernel(zeros(8))


def test_argument_of_another_extent_names_both():
    @tilejit
    def kernel(A: T.Tensor((8, 8), "float32")):
        with T.Kernel(1, threads=32):
            T.clear(A)

    with message(
        ShapeError,
        """
        kernel: A has extent 9 in dimension 1, but it was declared 8.
        at kernel(zeros(8, 9))
        Note: A was declared with extents (8, 8).
        Hint: Pass another array, or declare the extent with T.dynamic to take any.
        """,
    ):
        kernel(zeros(8, 9))


def test_arguments_that_disagree_on_a_symbol_name_both():
    @tilejit
    def kernel(A: T.Tensor((N,), "float32"), B: T.Tensor((N,), "float32")):
        with T.Kernel(1, threads=32):
            T.copy(A[0], B[0])

    with message(
        ShapeError,
        """
        kernel: N is 8 in A and 9 in B.
        at kernel(zeros(8), zeros(9))
        Note: B was declared (N,).
        Hint: Extents that are declared N are equal.
        """,
    ):
        kernel(zeros(8), zeros(9))


def test_argument_that_is_not_contiguous_shows_the_strides():
    @tilejit
    def kernel(A: T.Tensor((8, 8), "float32")):
        with T.Kernel(1, threads=32):
            T.clear(A)

    with message(
        ShapeError,
        """
        kernel: A is not contiguous: its strides are (1, 8), but (8, 1) were declared.
        at kernel(zeros(8, 8).T)
        Hint: Pass a contiguous copy, or declare it `T.StridedTensor` with its strides.
        """,
    ):
        kernel(zeros(8, 8).T)


def test_output_that_is_read_only_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=32):
            A[0] = 1.0

    with message(
        ArgumentError,
        """
        kernel: A is read-only, but the kernel writes it.
        at kernel(np.broadcast_to(np.float32(0), (8,)))
        Hint: Pass a writable array, such as a copy.
        """,
    ):
        kernel(np.broadcast_to(np.float32(0), (8,)))


def test_argument_that_is_no_array_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=32):
            A[0] = 1.0

    with message(
        ArgumentTypeError,
        """
        kernel: A is a list, not an array.
        at kernel([1.0, 2.0])
        Hint: NumPy, Numba, CuPy and torch arrays do, and all with DLPack.
        """,
    ):
        kernel([1.0, 2.0])


def test_misspelt_argument_is_suggested():
    @tilejit
    def kernel(A: T.Tensor, *, block=32):
        with T.Kernel(1, threads=block):
            A[0] = 1.0

    with message(
        ArgumentTypeError,
        """
        kernel has no parameter `blocks`.
        at kernel(zeros(8), blocks=64)
        Hint: Did you mean `block`?
        """,
    ):
        kernel(zeros(8), blocks=64)


def test_scalar_that_is_no_number_is_refused():
    @tilejit
    def kernel(A: T.Tensor, alpha: T.float32):
        with T.Kernel(1, threads=32):
            A[0] = alpha

    with message(
        DTypeError,
        """
        kernel: alpha is a str, but it was declared a float32 number.
        at kernel(zeros(8), "2")
        Hint: Pass a Python or NumPy number.
        """,
    ):
        kernel(zeros(8), "2")


def test_argument_of_a_dtype_we_lack_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=32):
            A[0] = 1.0

    with message(
        DTypeError,
        """
        kernel: A has dtype complex64, which tilejit does not know.
        at kernel(np.zeros(8, np.complex64))
        Hint: Known: bool, int8, int16, int32, int64, uint8, uint16, uint32, uint64, float16, bfloat16, float32, float64, tfloat32, float8_e4m3fn, float8_e5m2.
        """,
    ):
        kernel(np.zeros(8, np.complex64))


def test_argument_declared_in_shared_memory_is_refused():
    with message(
        ArgumentError,
        """
        `A` of `kernel` is declared in shared memory; arguments are in global memory.
        at def kernel(A: T.SharedBuffer((8,), "float32")):
        Hint: Declare it with T.Tensor, and allocate inside the kernel.
        """,
    ):

        @tilejit
        def kernel(A: T.SharedBuffer((8,), "float32")):
            with T.Kernel(1, threads=32):
                A[0] = 1.0
