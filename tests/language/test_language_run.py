"""What proxies, allocations and ops mean when the kernel runs, on every executor."""

import numpy as np
import pytest

import tilejit.language as T
from tilejit import address_of, tilejit

pytestmark = pytest.mark.usefixtures("executor")


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(7).standard_normal(shape).astype(dtype)


def unset(*shape, dtype=np.float32):
    """An output that no kernel has written: NaN, or the smallest integer."""
    is_float = not np.issubdtype(dtype, np.integer)
    return np.full(shape, np.nan if is_float else np.iinfo(dtype).min, dtype)


def test_shared_buffer_with_strides_holds_its_tile():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(2, threads=64) as bx:
            s = T.SharedBuffer((16, 32), "float16", strides=(40, 1), align=16, offset_factor=8)
            T.copy(A[bx * 16, 0], s)
            T.copy(s, C[bx * 16, 0])

    A, C = numbers(31, 29, dtype=np.float16), unset(31, 29, dtype=np.float16)
    kernel(A, C)
    np.testing.assert_array_equal(C, A)


def test_shared_view_counts_its_offset_from_the_buffer():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            base = T.alloc_shared((16, 32), "float32")
            T.copy(A, base)
            half = T.SharedBuffer((256,), "float32", data=base, elem_offset=256)
            for i in T.Parallel(256):
                C[i] = half[i]

    A, C = numbers(16, 32), unset(256)
    kernel(A, C)
    np.testing.assert_array_equal(C, A.ravel()[256:])


def test_shared_view_of_another_dtype_sees_the_bits():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            base = T.alloc_shared((256,), "float32")
            T.copy(A, base)
            words = T.SharedBuffer((256,), "uint32", data=base)
            for i in T.Parallel(256):
                C[i] = words[i]

    A, C = numbers(256), unset(256, dtype=np.uint32)
    kernel(A, C)
    np.testing.assert_array_equal(C, A.view(np.uint32))


def test_allocation_with_elem_offset_holds_its_tile():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.SharedBuffer((8, 32), "float32", elem_offset=4)
            T.copy(A, s)
            T.copy(s, C)

    A, C = numbers(8, 32), unset(8, 32)
    kernel(A, C)
    np.testing.assert_array_equal(C, A)


def test_local_view_sees_the_threads_own_array():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            t = T.get_thread_binding()
            row = T.alloc_local((8,), "float32")
            tail = T.LocalBuffer((4,), "float32", data=row, elem_offset=4)
            for i in T.unroll(8):
                row[i] = A[t, i]
            for i in T.unroll(4):
                C[t, i] = tail[i]

    A, C = numbers(32, 8), unset(32, 4)
    kernel(A, C)
    np.testing.assert_array_equal(C, A[:, 4:])


def test_tensor_view_counts_its_offset_from_the_tensor():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            row = T.Buffer((32,), "float32", data=A, elem_offset=32)
            for i in T.Parallel(32):
                C[i] = row[i]

    A, C = numbers(4, 32), unset(32)
    kernel(A, C)
    np.testing.assert_array_equal(C, A[1])


def test_auto_broadcast_repeats_extents_of_one_in_copies_and_indexes():
    Row = T.Buffer((1, 32), "float32", buffer_type="auto_broadcast")

    @tilejit
    def kernel(A: T.Tensor, bias: Row, C: T.Tensor):
        with T.Kernel(1, threads=64):
            tile = T.alloc_fragment((16, 32), "float32")
            repeated = T.alloc_fragment((16, 32), "float32")
            T.copy(A, tile)
            T.copy(bias, repeated)
            for i, j in T.Parallel(16, 32):
                C[i, j] = tile[i, j] + repeated[i, j] + bias[i, j]

    A, bias, C = numbers(16, 32), numbers(1, 32), unset(16, 32)
    kernel(A, bias, C)
    np.testing.assert_array_equal(C, A + bias + bias)


def test_strided_tensor_reads_and_writes_through_its_strides():
    M, N, s = T.dynamic("M, N, s")

    @tilejit
    def kernel(
        A: T.StridedTensor((M, N), (s, 1), "float32"), C: T.StridedTensor((M, N), (1, M), "float32")
    ):
        with T.Kernel(T.ceildiv(M, 16), threads=64) as bx:
            tile = T.alloc_shared((16, 32), "float32")
            T.copy(A[bx * 16, 0], tile)
            T.copy(tile, C[bx * 16, 0])

    whole, C = numbers(23, 40), unset(31, 23).T
    A = whole[:, :31]
    kernel(A, C)
    np.testing.assert_array_equal(C, A)


def test_pointer_table_reaches_tensors_of_every_length(executor):
    if executor == "gpu":
        pytest.skip("NumPy arrays have no device address to put into a table")

    @tilejit
    def kernel(table: T.Tensor((3,), T.ptr), sizes: T.Tensor((3,), "int32"), C: T.Tensor):
        with T.Kernel(3, threads=64) as g:
            source = T.make_tensor(table[g], (sizes[g],), "float16")
            tile = T.alloc_shared((128,), "float16")
            T.copy(source[0], tile)
            T.copy(tile, C[g, 0])

    arrays = [numbers(n, dtype=np.float16) for n in (8, 128, 101)]
    addresses = [address_of(a) for a in arrays]
    table = np.array([int(a) for a in addresses], np.int64)
    C = unset(3, 128, dtype=np.float16)
    kernel(table, np.array([8, 128, 101], np.int32), C)
    for row, array in zip(C, arrays, strict=True):
        np.testing.assert_array_equal(row[: len(array)], array)
        np.testing.assert_array_equal(row[len(array) :], 0)


def test_variable_starts_with_the_value_of_that_moment():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            t = T.get_thread_binding()
            x = T.alloc_var("float32", init=A[t])
            A[t] = 0
            x += 1
            C[t] = x

    A, C = numbers(32), unset(32)
    before = A.copy()
    kernel(A, C)
    np.testing.assert_array_equal(A, 0)
    np.testing.assert_array_equal(C, before + 1)


def test_variable_without_initial_value_is_zero_in_every_round():
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=32):
            t = T.get_thread_binding()
            for i in T.serial(3):
                x = T.alloc_var("int32")
                x += i + 1
                C[t, i] = x

    C = unset(32, 3, dtype=np.int32)
    kernel(C)
    np.testing.assert_array_equal(C, np.broadcast_to([1, 2, 3], (32, 3)))


def test_atomics_combine_what_all_threads_and_blocks_give():
    @tilejit
    def kernel(C: T.Tensor, D: T.Tensor):
        with T.Kernel(4, threads=64):
            ones = T.alloc_fragment((16, 32), "float32")
            T.fill(ones, 1)
            T.atomic_add(C[0, 0], ones)
            t = T.get_thread_binding()
            T.atomic_max(D[0], t)
            T.atomic_min(D[1], t - 7)
            T.atomic_or(D[2], 1 << (t % 8))

    C, D = np.zeros((15, 31), np.float32), np.zeros(3, np.int32)
    kernel(C, D)
    np.testing.assert_array_equal(C, 4)
    np.testing.assert_array_equal(D, [63, -7, 255])


def test_barrier_lets_threads_read_what_others_wrote():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            bars = T.alloc_barrier([32, 32])
            s = T.alloc_shared((32,), "float32")
            t = T.get_thread_binding()
            s[t] = A[t]
            T.barrier_arrive(bars[1])
            T.barrier_wait(bars[1], 0)
            C[t] = s[31 - t]

    A, C = numbers(32), unset(32)
    kernel(A, C)
    np.testing.assert_array_equal(C, A[::-1])


def test_copy_drops_leading_and_middle_scalars():
    @tilejit
    def kernel(Q: T.Tensor, C: T.Tensor):
        with T.Kernel(2, 3, threads=64) as (b, h):
            tile = T.alloc_shared((16, 32), "float16")
            T.copy(Q[b, 0:16, h, :], tile)
            T.copy(tile, C[b, h, 0, 0])

    Q = numbers(2, 13, 3, 32, dtype=np.float16)
    C = unset(2, 3, 13, 32, dtype=np.float16)
    kernel(Q, C)
    np.testing.assert_array_equal(C, Q.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e5m2", "int8", "int32"])
def test_copy_casts_to_the_destination(dtype):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            tile = T.alloc_shared((16, 32), dtype)
            T.copy(A, tile)
            T.copy(tile, C)

    A, C = numbers(16, 32) * 50, unset(16, 32)
    kernel(A, C)
    target = T.dtype(dtype).numpy
    np.testing.assert_array_equal(C, A.astype(target).astype(np.float32))


def test_functions_of_integers_round_as_they_say():
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=32):
            t = T.get_thread_binding()
            x = t - 16
            C[t, 0] = T.truncdiv(x, 3)
            C[t, 1] = T.truncmod(x, 3)
            C[t, 2] = T.floordiv(x, 3)
            C[t, 3] = T.floormod(x, 3)
            C[t, 4] = T.clamp(x, -3, 5)
            C[t, 5] = T.popcount(x)
            C[t, 6] = T.clz(x)
            C[t, 7] = T.shift_right(x, 1)

    C = unset(32, 8, dtype=np.int32)
    kernel(C)
    x = np.arange(-16, 16)
    expected = [np.fix(x / 3), np.fmod(x, 3), x // 3, x % 3, np.clip(x, -3, 5)]
    bits = [int(v) & 0xFFFFFFFF for v in x]
    expected += [[b.bit_count() for b in bits], [32 - b.bit_length() for b in bits], x >> 1]
    np.testing.assert_array_equal(C, np.stack(expected, 1).astype(np.int32))


@pytest.mark.parametrize("count", [0, 1])
def test_loop_of_no_rounds_may_hold_any_index(count):
    @tilejit
    def kernel(C: T.Tensor, *, count):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((4,), "int32")
            T.fill(s, 3)
            for k in T.serial(count):
                s[k] = 5
            T.copy(s, C)

    C = unset(4, dtype=np.int32)
    kernel(C, count=count)
    assert C.tolist() == [5, 3, 3, 3][:1] * count + [3] * (4 - count)


def test_smaller_and_larger_of_two_bools_are_bools():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(4):
                C[i] = T.min(A[i] > 0, A[i] > 1)
                D[i] = T.max(A[i] > 0, A[i] > 1)

    A, C, D = np.arange(4, dtype=np.int32), np.zeros(4, bool), np.zeros(4, bool)
    kernel(A, C, D)
    assert C.tolist() == [False, False, True, True]
    assert D.tolist() == [False, True, True, True]
