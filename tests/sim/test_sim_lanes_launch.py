"""Generated kernels under Numba's CUDA simulator, against plain NumPy."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tilejit import target
from tilejit.dtypes import bfloat16, bool_, float32, int32, uint32, uint64
from tilejit.errors import SimulationError, Span
from tilejit.isa import barrier, cp_async, ldmatrix, mbarrier, mma, special
from tilejit.isa.machine import Address, Slot
from tilejit.sim.block import Checks
from tilejit.sim.launch import run_lowered

ADDRESS, INT, FLOAT, BOOL = Slot(uint64, address=True), Slot(int32), Slot(float32), Slot(bool_)


def scaled(m, value, factor: int):
    return m.binary("mul", value, m.const(factor, int32), int32)


def at(base, m, index) -> Address:
    return Address("global", base, scaled(m, index, 4), align=4)


def add(m, a, b):
    return m.binary("add", a, b, int32)


# --- one group ------------------------------------------------------------------------------------

GRID_STRIDE = """
def kernel(X, Y, alpha, n):
    bx = cuda.blockIdx.x
    i = start(bx)
    while more(i, n):
        step(X, Y, alpha, i, n)  # axpy.py:7
        i = advance(i)
"""


@pytest.fixture
def axpy(make_kernel):
    """Two blocks of 100 threads: y = alpha * x + 1 for every element."""
    threads = 100

    def start(m, bx):
        return [scaled(m, bx, threads)]

    def more(m, i, n):
        return [m.binary("lt", i, n, int32)]

    def step(m, x, y, alpha, i, n):
        index = add(m, i, m.thread_index())
        inside = m.binary("lt", index, n, int32)
        (value,) = m.load(at(x, m, index), float32, when=inside)
        value = m.binary(
            "add", m.binary("mul", value, alpha, float32), m.const(1, float32), float32
        )
        m.store(at(y, m, index), [value], float32, when=inside)

    def advance(m, i):
        return [add(m, i, m.const(2 * threads, int32))]

    return make_kernel(
        GRID_STRIDE,
        {"X": ADDRESS, "Y": ADDRESS, "alpha": FLOAT, "n": INT},
        {
            "start": (start, [INT], [INT]),
            "more": (more, [INT, INT], [BOOL]),
            "step": (step, [ADDRESS, ADDRESS, FLOAT, INT, INT], []),
            "advance": (advance, [INT], [INT]),
        },
        threads=(25, 2, 2),
    )


@pytest.mark.parametrize("size", [1, 99, 100, 101, 503])
def test_an_elementwise_kernel_writes_every_element_and_no_more(axpy, size):
    x = np.arange(size, dtype=np.float32)
    guarded = np.full(size + 8, np.nan, np.float32)
    y = guarded[4:-4]
    run_lowered(axpy, (2, 1, 1), [x.ctypes.data, y.ctypes.data, 0.5, size], [x, y])
    np.testing.assert_array_equal(y, x * np.float32(0.5) + 1)
    assert np.isnan(guarded[:4]).all() and np.isnan(guarded[-4:]).all()


def test_arrays_may_stand_for_their_addresses(axpy):
    x, y = np.ones(7, np.float32), np.zeros(7, np.float32)
    run_lowered(axpy, (2, 1, 1), [x, y, np.float32(2), np.int32(7)])
    assert y.tolist() == [3.0] * 7


def test_a_grid_without_blocks_runs_nothing(axpy):
    run_lowered(axpy, (0, 1, 1), [0, 0, 0.0, 5])


def test_an_error_names_the_parameter_and_the_line_of_the_generated_kernel(axpy):
    x, y = np.ones(7, np.float32), np.zeros(9, np.float32)
    with pytest.raises(SimulationError) as caught:
        run_lowered(axpy, (2, 1, 1), [x, y, 1.0, 9])
    assert caught.value.headline == (
        "The kernel reads 4 bytes of global memory, 4 bytes past the end of X (28 bytes)."
    )
    assert caught.value.span.line == 6
    assert "step(X, Y, alpha, i, n)  # axpy.py:7" in str(caught.value)
    assert not y.any()


def test_an_error_in_a_granule_with_a_span_points_at_the_user(make_kernel):
    def stray(m, x):
        m.load(at(x, m, m.const(100, int32)), int32)

    made = make_kernel(
        "def kernel(X):\n    stray(X)\n", {"X": ADDRESS}, {"stray": (stray, [ADDRESS], [])}
    )
    span = Span("user.py", 42, function="f")
    granule = dataclasses.replace(made.granules["stray"], span=span)
    with pytest.raises(SimulationError) as caught:
        run_lowered(
            dataclasses.replace(made, granules={"stray": granule}),
            (1, 1, 1),
            [np.zeros(3, np.int32)],
        )
    assert caught.value.span is span


def test_a_run_after_a_failed_one_is_right(axpy):
    x, y = np.ones(7, np.float32), np.zeros(7, np.float32)
    with pytest.raises(SimulationError):
        run_lowered(axpy, (2, 1, 1), [x, y, 1.0, 500])
    run_lowered(axpy, (2, 1, 1), [x, y, 1.0, 7])
    assert y.tolist() == [2.0] * 7
    assert not [t for t in threading.enumerate() if type(t).__name__ == "BlockThread"]


def test_a_defect_of_an_emitter_comes_through_as_it_is(make_kernel):
    def broken(m):
        raise AssertionError("emitter is wrong")

    made = make_kernel("def kernel():\n    broken()\n", {}, {"broken": (broken, [], [])})
    with pytest.raises(AssertionError, match=r"^emitter is wrong$"):
        run_lowered(made, (3, 1, 1), [])


def test_a_result_of_another_dtype_than_declared_is_our_error(make_kernel):
    made = make_kernel(
        "def kernel():\n    x = wrong()\n",
        {},
        {"wrong": (lambda m: [m.const(1, uint32)], [], [INT])},
    )
    with pytest.raises(AssertionError, match="wrong: uint32 where int32 is declared"):
        run_lowered(made, (1, 1, 1), [])


def test_launches_from_several_threads_take_turns(axpy):
    x = np.arange(300, dtype=np.float32)
    results = [np.zeros_like(x) for _ in range(4)]
    runs = [
        threading.Thread(target=run_lowered, args=(axpy, (2, 1, 1), [x, y, float(i), 300]))
        for i, y in enumerate(results)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    for i, y in enumerate(results):
        np.testing.assert_array_equal(y, x * i + 1)


def test_blocks_do_not_share_shared_memory(make_kernel):
    def body(m, y, bx):
        place = Address("shared", None, scaled(m, m.thread_index(), 4), align=4)
        (before,) = m.load(place, int32)
        m.store(place, [m.const(5, int32)], int32)
        m.store(at(y, m, add(m, scaled(m, bx, 64), m.thread_index())), [before], int32)

    made = make_kernel(
        "def kernel(Y):\n    body(Y, cuda.blockIdx.x)\n",
        {"Y": ADDRESS},
        {"body": (body, [ADDRESS, INT], [])},
    )
    y = np.zeros(128, np.int32)
    run_lowered(made, (2, 1, 1), [y])
    assert set(y.tolist()) == {-1}


def test_an_emitter_runs_once_for_all_blocks_and_rounds(make_kernel):
    calls = []

    def count(m, y, i):
        calls.append(i)
        m.atomic(at(y, m, m.thread_index()), "add", i, int32)
        return [add(m, i, m.const(1, int32))]

    made = make_kernel(
        "def kernel(Y):\n    i = 0\n    while more(i):\n        i = count(Y, i)\n",
        {"Y": ADDRESS},
        {
            "more": (lambda m, i: [m.binary("lt", i, m.const(4, int32), int32)], [INT], [BOOL]),
            "count": (count, [ADDRESS, INT], [INT]),
        },
    )
    y = np.zeros(64, np.int32)
    run_lowered(made, (3, 1, 1), [y])
    run_lowered(made, (2, 1, 1), [y])
    assert y.tolist() == [5 * (0 + 1 + 2 + 3)] * 64
    assert len(calls) == 1


def test_what_another_block_did_is_no_race(make_kernel):
    def body(m, y, bx):
        (value,) = m.load(at(y, m, m.thread_index()), int32)
        m.issue(barrier.bar_sync(0, 64))
        other = m.binary("xor", m.thread_index(), m.const(63, int32), int32)
        m.store(at(y, m, other), [add(m, value, bx)], int32)

    made = make_kernel(
        "def kernel(Y):\n    body(Y, cuda.blockIdx.x)\n",
        {"Y": ADDRESS},
        {"body": (body, [ADDRESS, INT], [])},
    )
    y = np.arange(64, dtype=np.int32)
    run_lowered(made, (3, 1, 1), [y])
    np.testing.assert_array_equal(y, np.arange(64)[::-1] + 3)


def test_block_indices_run_over_the_grid(make_kernel):
    def body(m, y, bx, by, bz):
        index = add(m, bx, add(m, scaled(m, by, 3), scaled(m, bz, 6)))
        first = m.binary("eq", m.thread_index(), m.const(0, int32), int32)
        m.atomic(at(y, m, index), "add", m.const(1, int32), int32, when=first)

    made = make_kernel(
        "def kernel(Y):\n    body(Y, cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z)\n",
        {"Y": ADDRESS},
        {"body": (body, [ADDRESS, INT, INT, INT], [])},
        threads=32,
    )
    y = np.zeros(24, np.int32)
    run_lowered(made, (3, 2, 4), [y])
    assert y.tolist() == [1] * 24


def test_conditions_of_the_skeleton_must_agree_and_as_operands_need_not(make_kernel):
    def odd(m):
        one = m.const(1, int32)
        return [m.binary("eq", m.binary("and", m.thread_index(), one, int32), one, int32)]

    def put(m, y, condition):
        value = m.select(condition, m.const(10, int32), m.const(20, int32))
        m.store(at(y, m, m.thread_index()), [value], int32)

    granules = {"odd": (odd, [], [BOOL]), "put": (put, [ADDRESS, BOOL], [])}
    y = np.zeros(64, np.int32)
    operand = "def kernel(Y):\n    c = odd()\n    put(Y, c)\n"
    run_lowered(make_kernel(operand, {"Y": ADDRESS}, granules), (1, 1, 1), [y])
    np.testing.assert_array_equal(y, np.where(np.arange(64) % 2, 10, 20))
    condition = "def kernel(Y):\n    c = odd()\n    if c:\n        put(Y, c)\n"
    with pytest.raises(SimulationError) as caught:
        run_lowered(make_kernel(condition, {"Y": ADDRESS}, granules), (1, 1, 1), [y])
    assert caught.value.headline == (
        "The lanes of a group disagree on a condition that they must take together."
    )
    assert caught.value.notes == ("32 of 64 threads find it true.",)


def test_local_memory_lives_from_granule_to_granule_and_apart_for_each_call(make_kernel):
    base = Slot(uint64)

    def allocate(m):
        return [m.alloc_local(4, 4)]

    def put(m, where, value):
        m.store(Address("local", where, None, align=4), [add(m, m.thread_index(), value)], int32)

    def out(m, y, first, second):
        a = m.load(Address("local", first, None), int32)[0]
        b = m.load(Address("local", second, None), int32)[0]
        m.store(at(y, m, m.thread_index()), [m.binary("sub", a, b, int32)], int32)

    made = make_kernel(
        "def kernel(Y):\n    a = allocate()\n    b = allocate()\n    put(a, 500)\n"
        "    put(b, 100)\n    out(Y, a, b)\n",
        {"Y": ADDRESS},
        {
            "allocate": (allocate, [], [base]),
            "put": (put, [base, INT], []),
            "out": (out, [ADDRESS, base, base], []),
        },
    )
    y = np.zeros(64, np.int32)
    run_lowered(made, (1, 1, 1), [y])
    assert set(y.tolist()) == {400}


# --- groups ---------------------------------------------------------------------------------------

PING = """
def kernel(Y):
    setup()
    if is_producer():
        i = 0
        while less(i):
            produce(i)
            i = advance(i)
    else:
        i = 0
        while less(i):
            consume(Y, i)
            i = advance(i)
"""
ROUNDS = 5


def make_ping(make_kernel, frees_slot: bool):
    """Warp 0 fills a buffer of 128 bytes round by round; warp 1 sums what it finds there."""
    full, empty = np.array([1024], np.uint32), np.array([1024 + 8], np.uint32)
    data = 64

    def setup(m):
        first = m.binary("eq", m.thread_index(), m.const(0, int32), int32)
        for place in (full, empty):
            m.issue(mbarrier.INIT, [place, m.const(32, uint32)], when=first)
        m.issue(barrier.bar_sync(0, 64))

    def lane(m):
        return m.binary("and", m.thread_index(), m.const(31, int32), int32)

    def parity(m, i, flip):
        odd = m.binary("and", i, m.const(1, int32), int32)
        return m.cast([m.binary("xor", odd, m.const(flip, int32), int32)], int32, uint32)[0]

    def produce(m, i):
        m.issue(mbarrier.TEST_WAIT, [empty, parity(m, i, 1 if frees_slot else 0)])
        value = add(m, scaled(m, i, 100), lane(m))
        m.store(Address("shared", None, scaled(m, lane(m), 4), data, align=4), [value], int32)
        m.issue(mbarrier.ARRIVE, [full])

    def consume(m, y, i):
        m.issue(mbarrier.TEST_WAIT, [full, parity(m, i, 0)])
        other = m.binary("xor", lane(m), m.const(7, int32), int32)
        (value,) = m.load(Address("shared", None, scaled(m, other, 4), data, align=4), int32)
        m.issue(mbarrier.ARRIVE, [empty])
        m.store(at(y, m, add(m, scaled(m, i, 32), lane(m))), [value], int32)

    return make_kernel(
        PING,
        {"Y": ADDRESS},
        {
            "setup": (setup, [], []),
            "is_producer": (
                lambda m: [m.binary("lt", m.thread_index(), m.const(32, int32), int32)],
                [],
                [BOOL],
            ),
            "less": (
                lambda m, i: [m.binary("lt", i, m.const(ROUNDS, int32), int32)],
                [INT],
                [BOOL],
            ),
            "produce": (produce, [INT], []),
            "consume": (consume, [ADDRESS, INT], []),
            "advance": (lambda m, i: [add(m, i, m.const(1, int32))], [INT], [INT]),
        },
        lanes=32,
    )


def test_two_warps_hand_a_buffer_back_and_forth_through_mbarriers(make_kernel):
    y = np.full(ROUNDS * 32, -1, np.int32)
    run_lowered(make_ping(make_kernel, True), (2, 1, 1), [y])
    expected = np.arange(ROUNDS)[:, None] * 100 + (np.arange(32) ^ 7)
    np.testing.assert_array_equal(y.reshape(ROUNDS, 32), expected)


def test_warps_that_wait_for_each_other_are_an_error_and_no_hang(make_kernel):
    y = np.full(ROUNDS * 32, -1, np.int32)
    with pytest.raises(SimulationError) as caught:
        run_lowered(make_ping(make_kernel, False), (1, 1, 1), [y])
    assert caught.value.headline == (
        "The kernel waits for ever: the barrier at byte 8 of shared memory has 0 of 32 arrivals "
        "in phase 0, and threads wait for parity 0; the barrier at byte 0 of shared memory has "
        "0 of 32 arrivals in phase 0, and threads wait for parity 0."
    )


def test_a_group_that_ends_while_another_waits_at_a_barrier_is_an_error(make_kernel):
    made = make_kernel(
        "def kernel():\n    if first():\n        meet()\n",
        {},
        {
            "first": (
                lambda m: [m.binary("lt", m.thread_index(), m.const(32, int32), int32)],
                [],
                [BOOL],
            ),
            "meet": (lambda m: m.issue(barrier.bar_sync(0, 96)), [], []),
        },
        threads=96,
        lanes=32,
    )
    with pytest.raises(SimulationError) as caught:
        run_lowered(made, (1, 1, 1), [])
    assert caught.value.headline == (
        "The kernel waits for ever: 32 of 96 threads have come to barrier 0."
    )
    assert caught.value.span.line == 3


@pytest.mark.parametrize("number", [0, 1])
def test_warps_exchange_through_a_barrier_of_the_block_or_a_part_of_it(make_kernel, number):
    def write(m):
        m.store(
            Address("shared", None, scaled(m, m.thread_index(), 4), align=4),
            [m.thread_index()],
            int32,
        )

    def read(m, y):
        other = m.binary("xor", m.thread_index(), m.const(32, int32), int32)
        (value,) = m.load(Address("shared", None, scaled(m, other, 4), align=4), int32)
        m.store(at(y, m, m.thread_index()), [value], int32)

    granules = {
        "write": (write, [], []),
        "meet": (lambda m: m.issue(barrier.bar_sync(number, 64)), [], []),
        "read": (read, [ADDRESS], []),
    }
    y = np.zeros(64, np.int32)
    source = "def kernel(Y):\n    write()\n    meet()\n    read(Y)\n"
    run_lowered(make_kernel(source, {"Y": ADDRESS}, granules, lanes=32), (1, 1, 1), [y])
    np.testing.assert_array_equal(y, np.arange(64) ^ 32)
    without = source.replace("    meet()\n", "")
    with pytest.raises(SimulationError) as caught:
        run_lowered(make_kernel(without, {"Y": ADDRESS}, granules, lanes=32), (1, 1, 1), [y])
    assert caught.value.headline == (
        "Thread 32 writes shared memory that thread 0 read, and nothing orders the two."
    )
    assert [label for _, label in caught.value.related] == ["read here"]
    assert [span.line for span, _ in caught.value.related] == [3]
    quiet = make_kernel(without, {"Y": ADDRESS}, granules, lanes=32)
    y[:] = 0
    run_lowered(quiet, (1, 1, 1), [y], checks=Checks(races=False))
    # One warp runs after the other here, so the first finds what nothing has written.
    assert set(y[:32].tolist()) == {-1}


def test_a_warp_that_spins_on_memory_lets_the_others_run(make_kernel):
    """Warp 0 polls a word of global memory that warp 1 sets."""

    def look(m, flag):
        place, zero = Address("global", flag, None, align=4), m.const(0, int32)
        first = m.binary("eq", m.thread_index(), zero, int32)
        value = m.atomic(place, "or", zero, int32, when=first, want_old=True)
        value = m.issue(
            special.shuffle("idx"), [m.bitcast(value, int32, uint32), m.const(0, uint32)]
        )[0]
        return [m.binary("eq", value, m.const(0, uint32), uint32)]

    def put(m, flag):
        m.atomic(Address("global", flag, None, align=4), "or", m.const(1, int32), int32)

    made = make_kernel(
        "def kernel(F):\n    if first():\n        while look(F):\n            pass\n"
        "    else:\n        put(F)\n",
        {"F": ADDRESS},
        {
            "first": (
                lambda m: [m.binary("lt", m.thread_index(), m.const(32, int32), int32)],
                [],
                [BOOL],
            ),
            "look": (look, [ADDRESS], [BOOL]),
            "put": (put, [ADDRESS], []),
        },
        lanes=32,
    )
    flag = np.zeros(1, np.int32)
    run_lowered(made, (1, 1, 1), [flag])
    assert flag[0] == 1


# --- instructions ---------------------------------------------------------------------------------


def make_matmul(make_kernel):
    """A (16, 32) times B (32, 8) on one warp: cp.async, ldmatrix and mma.sync of bfloat16."""
    chosen = next(
        one
        for one in mma.find_mma(bfloat16, bfloat16, float32, target.as_target("sm_80"))
        if (one.m, one.n, one.k) == (16, 8, 16)
    )
    fragment = Slot(float32, 4)
    b_at = 16 * 64  # bytes: A's rows are 64 bytes, B's 16

    def copy(m, a, b):
        for base, size, place in ((a, 16 * 64, 0), (b, 32 * 16, b_at)):
            for done in range(0, size, 512):
                offset = scaled(m, m.thread_index(), 16)
                source = m.address(Address("global", base, offset, done))
                goal = m.address(Address("shared", None, offset, place + done, align=16))
                m.issue(cp_async.cp_async(16), [goal, source, m.const(16, uint32)])
        m.issue(cp_async.COMMIT_GROUP)
        m.issue(cp_async.wait_group(0))
        m.issue(barrier.bar_sync(0, 32))

    def multiply(m, acc, k):
        lane = m.thread_index()
        row = m.binary("and", lane, m.const(15, int32), int32)
        half = m.binary("shr", lane, m.const(4, int32), int32)
        k_bytes = scaled(m, k, 32)
        a_offset = add(m, add(m, scaled(m, row, 64), scaled(m, half, 16)), k_bytes)
        a = m.issue(ldmatrix.ldmatrix(4), [m.address(Address("shared", None, a_offset))])
        b_offset = add(m, scaled(m, row, 16), scaled(m, k, 256))
        b_address = m.address(Address("shared", None, b_offset, b_at))
        b = m.issue(ldmatrix.ldmatrix(2, transposed=True), [b_address])
        return [m.issue(chosen.instruction, [*a, *b, *acc])]

    def out(m, c, acc):
        lane = m.thread_index()
        row = m.binary("shr", lane, m.const(2, int32), int32)
        column = scaled(m, m.binary("and", lane, m.const(3, int32), int32), 2)
        for part in range(2):
            index = add(m, scaled(m, row, 8), column)
            address = Address("global", c, scaled(m, index, 4), part * 8 * 8 * 4, align=8)
            m.store(address, acc[2 * part : 2 * part + 2], float32)

    return make_kernel(
        "def kernel(A, B, C):\n    copy(A, B)\n    acc = clear()\n    k = 0\n"
        "    while more(k):\n        acc = multiply(acc, k)\n        k = advance(k)\n"
        "    out(C, acc)\n",
        {"A": ADDRESS, "B": ADDRESS, "C": ADDRESS},
        {
            "copy": (copy, [ADDRESS, ADDRESS], []),
            "clear": (lambda m: [[m.const(0.0, float32)] * 4], [], [fragment]),
            "more": (lambda m, k: [m.binary("lt", k, m.const(2, int32), int32)], [INT], [BOOL]),
            "multiply": (multiply, [fragment, INT], [fragment]),
            "advance": (lambda m, k: [add(m, k, m.const(1, int32))], [INT], [INT]),
            "out": (out, [ADDRESS, fragment], []),
        },
        threads=32,
    )


def test_a_tensor_core_matmul_is_numpys(make_kernel):
    rng = np.random.default_rng(0)
    a = rng.integers(-8, 8, (16, 32)).astype(bfloat16.numpy)
    b = rng.integers(-8, 8, (32, 8)).astype(bfloat16.numpy)
    c = np.full((16, 8), np.nan, np.float32)
    run_lowered(make_matmul(make_kernel), (1, 1, 1), [a, b, c])
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32))


SCRIPT = """
import numpy as np
from tilejit.dtypes import int32, uint64
from tilejit.isa.machine import Address, Granule, Lowered, Slot
from tilejit.sim.launch import run_lowered

def body(m, inputs):
    y, bx = inputs
    index = m.binary("add", m.binary("mul", bx, m.const(64, int32), int32), m.thread_index(), int32)
    offset = m.binary("mul", index, m.const(4, int32), int32)
    m.store(Address("global", y, offset, align=4), [index], int32)
    return []

address, number = Slot(uint64, address=True), Slot(int32)
kernel = Lowered(
    source="def kernel(Y):\\n    body(Y, cuda.blockIdx.x)\\n", entry="kernel",
    parameters=(("Y", address),), noalias=(False,), threads=(64, 1, 1), shared_bytes=0,
    granules={"body": Granule("body", (address, number), (), body)},
)
y = np.full(128, -1, np.int32)
run_lowered(kernel, (2, 1, 1), [y])
assert (y == np.arange(128)).all()
print("simulated")
"""


@pytest.mark.parametrize("variable", ["0", "1"])
def test_a_kernel_runs_with_numbas_variable_set_or_not(variable):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": variable}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout == "simulated\n", found.stderr
