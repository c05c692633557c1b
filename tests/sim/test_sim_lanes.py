"""The lane machine: values, memory and control flow, against plain NumPy."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.dtypes import bfloat16, float16, float32, float64, int8, int32, int64, uint32
from tilejit.errors import SimulationError
from tilejit.isa import barrier, special
from tilejit.isa.machine import Address
from tilejit.sim.fma import fused_multiply_add

THREADS = 64
LANES = np.arange(THREADS)


def address_of(array: np.ndarray) -> np.ndarray:
    return np.array([array.ctypes.data], np.uint64)


def full(value: np.ndarray) -> np.ndarray:
    return np.broadcast_to(value, (THREADS,))


def scaled_thread(m, factor: int) -> np.ndarray:
    return m.binary("mul", m.thread_index(), m.const(factor, int32), int32)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (-1, uint32, 0xFFFFFFFF),
        (300, int8, 44),
        (1 << 31, int32, -(1 << 31)),
        (0.1, float32, np.float32(0.1)),
        (0.1, bfloat16, ml_dtypes.bfloat16(0.1)),
        (True, dtypes.bool_, True),
    ],
    ids=str,
)
def test_a_constant_takes_its_dtype(run_lanes, value, dtype, expected):
    result = run_lanes(lambda m: m.const(value, dtype))
    assert result.dtype == dtype.numpy
    assert result.tolist() == [expected]


@pytest.mark.parametrize("op", ["add", "sub", "mul", "floordiv", "floormod", "and", "min", "shr"])
@pytest.mark.parametrize("right", [3, "lanes"])
def test_integer_arithmetic_is_numpys(run_lanes, op, right):
    a = (LANES - 30).astype(np.int32)
    b = np.array([3], np.int32) if right == 3 else (LANES % 7 + 1).astype(np.int32)
    function = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide,
        "floormod": np.remainder, "and": np.bitwise_and, "min": np.minimum,
        "shr": np.right_shift,
    }[op]  # fmt: skip
    result = run_lanes(lambda m: m.binary(op, a, b, int32))
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, function(a, b))


def test_integers_wrap_without_a_warning(run_lanes):
    big = np.array([2**31 - 1], np.int32)
    assert run_lanes(lambda m: m.binary("add", big, m.const(1, int32), int32)).tolist() == [
        -(2**31)
    ]


def test_a_division_by_zero_is_zero(run_lanes):
    assert run_lanes(
        lambda m: m.binary("floordiv", m.const(7, int32), m.const(0, int32), int32)
    ).tolist() == [0]


def test_an_operand_of_another_dtype_is_our_error(run_lanes):
    with pytest.raises(AssertionError, match="add: int32, int64 for int32"):
        run_lanes(lambda m: m.binary("add", m.const(1, int32), m.const(1, int64), int32))


def test_select_takes_each_lanes_choice(run_lanes):
    def emit(m):
        small = m.binary("lt", m.thread_index(), m.const(10, int32), int32)
        return m.select(small, m.thread_index(), m.const(-1, int32))

    np.testing.assert_array_equal(run_lanes(emit), np.where(LANES < 10, LANES, -1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_cast_of_several_values_is_the_cast_of_each(run_lanes, count):
    values = [np.linspace(-3, 3, THREADS).astype(np.float32) * (i + 1) for i in range(count)]
    values[0] = np.array([1.7], np.float32)  # the same in all lanes
    results = run_lanes(lambda m: m.cast(values, float32, bfloat16))
    for value, result in zip(values, results, strict=True):
        np.testing.assert_array_equal(full(result), full(value.astype(ml_dtypes.bfloat16)))


@pytest.mark.parametrize("dtype", [int8, float16, bfloat16, dtypes.float8_e4m3fn, float32], ids=str)
def test_pack_puts_the_first_element_in_the_low_bits_and_unpack_undoes_it(run_lanes, dtype):
    count = 4 // dtype.bytes
    values = [np.arange(i, i + THREADS).astype(dtype.numpy) for i in range(count)]
    word, *back = run_lanes(lambda m: [w := m.pack(values, dtype), *m.unpack(w, dtype)])
    low = values[0].view(f"u{dtype.bytes}")
    np.testing.assert_array_equal(word & ((1 << dtype.bits) - 1), low)
    for value, again in zip(values, back, strict=True):
        np.testing.assert_array_equal(again, value)


def test_bitcast_keeps_the_bits(run_lanes):
    result = run_lanes(lambda m: m.bitcast(m.const(1.0, float32), float32, uint32))
    assert result.tolist() == [0x3F800000]


def test_fma_rounds_float32_once():
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 1 << 32, 2000, np.uint32).view(np.float32) for _ in range(3))
    near = rng.random(2000) < 0.5  # sums that cancel, where rounding twice shows
    with np.errstate(all="ignore"):
        c = np.where(near, (-a.astype(np.float64) * b).astype(np.float32), c)
        found = fused_multiply_add(a, b, c)
    check_fused(a, b, c, found, np.float32)


def test_fma_rounds_float32_at_a_double_rounding_once():
    a = np.array([1 + 2.0**-23, 1 + 2.0**-23], np.float32)
    b = np.array([1 + 2.0**-23, 1 + 2.0**-23], np.float32)
    c = np.array([2.0**30, -(2.0**-60)], np.float32)
    check_fused(a, b, c, fused_multiply_add(a, b, c), np.float32)
    # 1 + 2^-24 exactly between two float32 values, moved off it by less than float64 keeps
    a, b = np.array([2.0**-12, 2.0**-12], np.float32), np.array([2.0**-12] * 2, np.float32)
    one = np.array([1.0, 1.0], np.float32)
    tiny = fused_multiply_add(np.array([2.0**-40, -(2.0**-40)], np.float32), one * 2.0**-20, a * b)
    check_fused(tiny, one, one, fused_multiply_add(tiny, one, one), np.float32)


def test_fma_rounds_float64_once():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 500)) * 10.0 ** rng.integers(-5, 5, (2, 500))
    c = np.where(rng.random(500) < 0.5, -a * b, rng.standard_normal(500))
    check_fused(a, b, c, fused_multiply_add(a, b, c), np.float64)


def test_fma_of_extreme_float64_is_exact():
    a = np.array([1e308, 1e-200, 1e-320, np.inf, np.nan, -0.0, 1e308])
    b = np.array([10.0, 1e-200, 2.0, 0.0, 1.0, 1.0, 1e10])
    c = np.array([-1e308, 1e-310, 0.0, 1.0, 1.0, -0.0, np.inf])
    with np.errstate(all="ignore"):
        found = fused_multiply_add(a, b, c)
    np.testing.assert_array_equal(found[3:], [np.nan, np.nan, -0.0, np.inf])
    assert np.signbit(found[5])
    check_fused(a[:3], b[:3], c[:3], found[:3], np.float64)


def check_fused(a, b, c, found, dtype):
    for x, y, z, result in zip(a, b, c, found, strict=True):
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if abs(exact) >= Fraction(float(np.finfo(dtype).max)):
            continue
        error = abs(Fraction(float(result)) - exact)
        for neighbour in (
            np.nextafter(result, dtype(np.inf)),
            np.nextafter(result, dtype(-np.inf)),
        ):
            if np.isfinite(neighbour):
                other = abs(Fraction(float(neighbour)) - exact)
                even = int(result.view(f"u{dtype(0).itemsize}")) % 2 == 0
                assert error < other or (error == other and even), (x, y, z, result)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [int8, float16, bfloat16, float32, float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_load_and_store_move_consecutive_elements(run_lanes, dtype, count):
    source = np.arange(THREADS * count).astype(dtype.numpy)
    target = np.zeros(THREADS * count, dtype.numpy)

    def emit(m, x, y):
        offset = scaled_thread(m, count * dtype.bytes)
        values = m.load(Address("global", x, offset), dtype, count)
        m.store(Address("global", y, offset), values[::-1], dtype)

    run_lanes(emit, address_of(source), address_of(target), memory=[source, target])
    expected = source.reshape(THREADS, count)[:, ::-1].reshape(-1)
    np.testing.assert_array_equal(target, expected)


def test_a_load_gives_zero_where_its_condition_is_false(run_lanes):
    source = np.arange(1, 11, dtype=np.float32)  # lanes from 10 on would be outside

    def emit(m, x):
        inside = m.binary("lt", m.thread_index(), m.const(10, int32), int32)
        return m.load(Address("global", x, scaled_thread(m, 4)), float32, when=inside)[0]

    result = run_lanes(emit, address_of(source), memory=[source])
    np.testing.assert_array_equal(result, np.where(LANES < 10, LANES + 1, 0))


def test_a_load_that_all_lanes_share_stays_one_value(run_lanes):
    source = np.array([5, 6], np.int32)
    result = run_lanes(
        lambda m, x: m.load(Address("global", x, None, 4), int32)[0],
        address_of(source),
        memory=[source],
    )
    assert result.tolist() == [6]


def test_stored_bools_are_bytes_and_any_other_byte_loads_as_true(run_lanes):
    source = np.array([0, 1, 2, 255], np.uint8).repeat(16)
    target = np.full(THREADS, 7, np.uint8)

    def emit(m, x, y):
        value = m.load(Address("global", x, m.thread_index()), dtypes.bool_)
        m.store(Address("global", y, m.thread_index()), value, dtypes.bool_)

    run_lanes(emit, address_of(source), address_of(target), memory=[source, target])
    np.testing.assert_array_equal(target, source != 0)


@pytest.mark.parametrize("index", [-1, 64, 1000])
def test_an_access_outside_every_array_names_the_nearest(run_lanes, index):
    source = np.zeros(THREADS, np.float32)
    where = (
        "4 bytes before the start of array 0"
        if index < 0
        else f"{(index - 63) * 4} bytes past the end of array 0 (256 bytes)"
    )

    def emit(m, x):
        m.load(Address("global", x, m.const(index * 4, int32)), float32)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, address_of(source), memory=[source])
    assert caught.value.headline == f"The kernel reads 4 bytes of global memory, {where}."
    assert caught.value.hint == "Check the index against the buffer's shape."


def test_lanes_may_reach_different_arrays_in_one_access(run_lanes):
    arrays = [np.full(3, i, np.int32) for i in range(4)]
    table = np.array([a.ctypes.data for a in arrays], np.uint64)

    def emit(m, t):
        which = m.binary("floormod", m.thread_index(), m.const(4, int32), int32)
        offset = m.binary("mul", which, m.const(8, int32), int32)
        base = m.load(Address("global", t, offset), dtypes.uint64)[0]
        m.store(Address("global", base, None, 8), [which], int32)
        m.issue(barrier.bar_sync(0, THREADS))
        return m.load(Address("global", base, None, 8), int32)[0]

    result = run_lanes(emit, address_of(table), memory=[table, *arrays])
    np.testing.assert_array_equal(result, LANES % 4)
    assert [a.tolist() for a in arrays] == [[i, i, i] for i in range(4)]


def test_a_store_to_a_read_only_array_is_an_error(run_lanes):
    array = np.zeros(THREADS, np.int32)
    array.flags.writeable = False

    def emit(m, x):
        m.store(Address("global", x, scaled_thread(m, 4)), [m.thread_index()], int32)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, address_of(array), memory=[array])
    assert caught.value.headline == "The kernel writes to array 0, which is read-only."
    assert not array.any()


def test_two_lanes_that_store_different_values_to_one_place_are_an_error(run_lanes):
    array = np.zeros(4, np.int32)

    def emit(m, x):
        m.store(Address("global", x, None, 8), [m.thread_index()], int32)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, address_of(array), memory=[array])
    headline = "Two threads write different values to byte 8 of array 0 at once."
    assert caught.value.headline == headline
    assert "T.atomic_add" in caught.value.hint


def test_lanes_that_store_the_same_value_to_one_place_are_none(run_lanes):
    array = np.zeros(4, np.int32)
    run_lanes(
        lambda m, x: m.store(Address("global", x, None, 8), [m.const(7, int32)], int32),
        address_of(array),
        memory=[array],
    )
    assert array.tolist() == [0, 0, 7, 0]


def test_an_alignment_that_does_not_hold_is_an_error(run_lanes):
    array = np.zeros(THREADS * 2, np.float32)

    def emit(m, x):
        m.load(Address("global", x, scaled_thread(m, 4), align=8), float32)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, address_of(array), memory=[array])
    assert caught.value.headline == (
        "An access of 4 bytes to global memory is taken to be aligned to 8 bytes, but is not."
    )


@pytest.mark.parametrize("combine", ["add", "min", "max", "and", "or", "xor", "exch"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_combine_one_lane_after_the_other(run_lanes, combine, space):
    array = np.array([3, 5], np.int32)

    def emit(m, x):
        place = Address(space, x if space == "global" else None, None)
        first = m.binary("eq", m.thread_index(), m.const(0, int32), int32)
        m.store(place, [m.const(3, int32)], int32, when=first)
        m.issue(barrier.bar_sync(0, THREADS))
        odd = m.binary("eq", m.binary("and", m.thread_index(), m.const(1, int32), int32),
                       m.const(1, int32), int32)  # fmt: skip
        old = m.atomic(place, combine, m.thread_index(), int32, when=odd, want_old=True)
        m.issue(barrier.bar_sync(0, THREADS))
        return old, m.load(place, int32)[0]

    old, new = run_lanes(emit, address_of(array), memory=[array])
    function = {
        "add": int.__add__, "min": min, "max": max, "and": int.__and__, "or": int.__or__,
        "xor": int.__xor__, "exch": lambda a, b: b,
    }[combine]  # fmt: skip
    value, seen = 3, np.zeros(THREADS, int)
    for lane in range(1, THREADS, 2):
        seen[lane] = value
        value = function(value, lane)
    np.testing.assert_array_equal(old, seen)
    np.testing.assert_array_equal(full(new), value)


def test_atomic_add_of_bfloat16_rounds_each_sum(run_lanes):
    array = np.zeros(2, ml_dtypes.bfloat16)
    value = np.array([1.01], ml_dtypes.bfloat16)
    run_lanes(
        lambda m, x: m.atomic(Address("global", x, None), "add", value, bfloat16),
        address_of(array),
        memory=[array],
    )
    expected = np.float32(0)
    for _ in range(THREADS):
        expected = np.float32(ml_dtypes.bfloat16(expected + np.float32(value[0])))
    assert float(array[0]) == expected


def test_local_memory_is_each_lanes_own(run_lanes):
    def emit(m):
        base = m.alloc_local(12, 4)
        for i in range(3):
            value = m.binary("add", m.thread_index(), m.const(i * 100, int32), int32)
            m.store(Address("local", base, None, 4 * i, align=4), [value], int32)
        turn = m.binary("floormod", m.thread_index(), m.const(3, int32), int32)
        offset = m.binary("mul", turn, m.const(4, int32), int32)
        return m.load(Address("local", base, offset), int32)[0]

    np.testing.assert_array_equal(run_lanes(emit), LANES + LANES % 3 * 100)


@pytest.mark.parametrize("offset", [-4, 12])
def test_local_memory_outside_the_lanes_part_is_an_error(run_lanes, offset):
    def emit(m):
        base = m.alloc_local(12, 4)
        m.store(Address("local", base, None, offset), [m.const(0, int32)], int32)

    with pytest.raises(SimulationError):
        run_lanes(emit)


def test_local_memory_of_the_neighbour_is_not_reached(run_lanes):
    def emit(m):
        base = m.alloc_local(12, 4)
        middle = m.binary("eq", m.thread_index(), m.const(5, int32), int32)
        m.load(Address("local", base, None, 12), int32, when=middle)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit)
    assert caught.value.headline == (
        "A thread reads 4 bytes at byte 12 of a local buffer of 12 bytes."
    )


def test_a_block_of_no_whole_warps_has_no_more_lanes_than_threads(run_lanes):
    target = np.full(100, -1, np.int32)

    def emit(m, y):
        m.store(Address("global", y, scaled_thread(m, 4)), [m.thread_index()], int32)

    run_lanes(emit, address_of(target), memory=[target], threads=100)
    np.testing.assert_array_equal(target, np.arange(100))


# --- control flow ---------------------------------------------------------------------------------


def is_below(m, bound: int) -> np.ndarray:
    return m.binary("lt", m.thread_index(), m.const(bound, int32), int32)


@pytest.mark.parametrize("bound", [0, 10, THREADS])
def test_branch_gives_each_lane_its_sides_values_and_effects(run_lanes, bound):
    target = np.full(THREADS, -1, np.int32)

    def emit(m, y):
        state = {"x": [m.const(1, int32), m.thread_index()]}

        def then():
            state["x"][0] = m.const(5, int32)
            m.store(Address("global", y, scaled_thread(m, 4)), [m.const(1, int32)], int32)

        def orelse():
            state["x"][1] = m.const(-7, int32)
            m.store(Address("global", y, scaled_thread(m, 4)), [m.const(2, int32)], int32)

        m.branch(is_below(m, bound), then, orelse, state)
        return state["x"]

    first, second = run_lanes(emit, address_of(target), memory=[target])
    np.testing.assert_array_equal(full(first), np.where(bound > LANES, 5, 1))
    np.testing.assert_array_equal(full(second), np.where(bound > LANES, LANES, -7))
    np.testing.assert_array_equal(target, np.where(bound > LANES, 1, 2))


def test_branches_nest(run_lanes):
    def emit(m):
        state = {"x": [m.const(0, int32)]}

        def inner():
            def deepest():
                state["x"][0] = m.const(2, int32)

            state["x"][0] = m.const(1, int32)
            m.branch(is_below(m, 5), deepest, None, state)

        m.branch(is_below(m, 20), inner, None, state)
        return state["x"][0]

    expected = np.select([LANES < 5, LANES < 20], [2, 1], 0)
    np.testing.assert_array_equal(run_lanes(emit), expected)


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 5, 1), (7, 0, -2), (3, 3, 1), (0, 7, 3)])
def test_loop_is_pythons_range(run_lanes, start, stop, step):
    def emit(m):
        state = {"sum": [m.const(0, int32)], "last": [m.const(-1, int32)]}

        def body(i):
            state["sum"][0] = m.binary("add", state["sum"][0], i, int32)
            state["last"][0] = i

        m.loop(m.const(start, int32), m.const(stop, int32), step, int32, body, state)
        return state["sum"][0], state["last"][0]

    total, last = run_lanes(emit)
    indices = range(start, stop, step)
    assert total.tolist() == [sum(indices)]
    assert last.tolist() == [indices[-1] if indices else -1]


@pytest.mark.parametrize("step", [1, 2, -1])
def test_loop_with_other_bounds_in_each_lane_runs_each_lanes_range(run_lanes, step):
    target = np.zeros(THREADS, np.int32)

    def emit(m, y):
        state = {"sum": [m.const(0, int32)]}
        bounds = (m.const(3, int32), m.thread_index())

        def body(i):
            state["sum"][0] = m.binary("add", state["sum"][0], i, int32)
            m.atomic(Address("global", y, scaled_thread(m, 4)), "add", m.const(1, int32), int32)

        start, stop = bounds if step > 0 else bounds[::-1]
        m.loop(start, stop, step, int32, body, state)
        return state["sum"][0]

    result = run_lanes(emit, address_of(target), memory=[target])
    ranges = [range(3, t, step) if step > 0 else range(t, 3, step) for t in range(THREADS)]
    np.testing.assert_array_equal(result, [sum(r) for r in ranges])
    np.testing.assert_array_equal(target, [len(r) for r in ranges])


def test_loop_while_stops_lane_by_lane(run_lanes):
    def emit(m):
        state = {"n": [m.binary("add", m.thread_index(), m.const(1, int32), int32)],
                 "steps": [m.const(0, int32)]}  # fmt: skip

        def test():
            return m.binary("ne", state["n"][0], m.const(1, int32), int32)

        def body():
            n = state["n"][0]
            odd = m.binary("eq", m.binary("floormod", n, m.const(2, int32), int32),
                           m.const(1, int32), int32)  # fmt: skip
            up = m.binary("add", m.binary("mul", n, m.const(3, int32), int32), m.const(1, int32),
                          int32)  # fmt: skip
            half = m.binary("floordiv", n, m.const(2, int32), int32)
            state["n"][0] = m.select(odd, up, half)
            state["steps"][0] = m.binary("add", state["steps"][0], m.const(1, int32), int32)

        m.loop_while(test, body, state)
        return state["steps"][0]

    def collatz(n):
        steps = 0
        while n != 1:
            n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
        return steps

    np.testing.assert_array_equal(run_lanes(emit), [collatz(n) for n in range(1, THREADS + 1)])


def test_a_while_loop_that_never_ends_is_an_error(run_lanes, monkeypatch):
    monkeypatch.setattr("tilejit.sim.lanes._MAX_ROUNDS", 100)

    with pytest.raises(SimulationError) as caught:
        run_lanes(lambda m: m.loop_while(lambda: m.const(True, dtypes.bool_), lambda: None, {}))
    assert caught.value.headline == "A while loop has not ended after 100 rounds."


def test_an_instructions_integer_registers_have_no_sign(run_lanes):
    shuffle = special.shuffle("bfly")
    (result,) = run_lanes(lambda m: m.issue(shuffle, [m.thread_index(), m.const(1, int32)]))
    np.testing.assert_array_equal(result, LANES ^ 1)
    with pytest.raises(AssertionError, match=r"shfl\.sync\.bfly: float32 for uint32"):
        run_lanes(lambda m: m.issue(shuffle, [m.const(1.0, float32), m.const(1, int32)]))
