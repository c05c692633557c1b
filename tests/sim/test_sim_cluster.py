"""Blocks of a cluster: multicast copies, barriers and shared memory of other blocks."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit.dtypes import int32, uint16, uint32, uint64
from tilejit.errors import SimulationError
from tilejit.isa import barrier, cluster, launch, mbarrier, tma
from tilejit.isa.machine import Address, Slot
from tilejit.isa.tma import TensorMap
from tilejit.sim.block import Checks
from tilejit.sim.launch import run_lowered
from tilejit.target import TARGETS

QUIET = Checks(races=False)
WAIT = mbarrier.wait_parity(TARGETS["sm_90a"], cluster=True)
MAP, ADDRESS, INT = Slot(uint64, tensor_map=True), Slot(uint64, address=True), Slot(int32)
THREADS = 64
BARRIER = 2048


def place(m, byte: int, offset=None):
    return m.address(Address("shared", None, offset, byte))


def lane(m, number: int):
    return m.binary("eq", m.thread_index(), m.const(number, int32), int32)


def scaled(m, value, factor: int):
    return m.binary("mul", value, m.const(factor, int32), int32)


def rank_of(m):
    return m.issue(cluster.CTA_RANK)[0]


def other(m):
    """The rank of the other block of two."""
    return m.binary("xor", rank_of(m), m.const(1, uint32), uint32)


def whole(m, value):
    return m.cast([value], uint32, int32)[0]


def meet(m) -> None:
    m.issue(cluster.CLUSTER_ARRIVE)
    m.issue(cluster.CLUSTER_WAIT)


def own(m, byte: int = 0) -> Address:
    return Address("shared", None, scaled(m, m.thread_index(), 4), byte, align=4)


def publish(m, y, value, bx) -> None:
    """Store one int32 a thread, block after block."""
    index = m.binary("add", scaled(m, bx, THREADS), m.thread_index(), int32)
    m.store(Address("global", y, scaled(m, index, 4), align=4), [value], int32)


def run(make_kernel, emit, blocks=2, size=2, lanes=0, checks=None, extra=()) -> np.ndarray:
    """The results of `emit(m, bx, *extra)`: one int32 a thread."""

    def body(m, y, bx, *more):
        value = emit(m, bx, *more)
        if value is not None:
            publish(m, y, value, bx)

    names = "".join(f", X{i}" for i in range(len(extra)))
    kernel = make_kernel(
        f"def kernel(Y{names}):\n    body(Y, cuda.blockIdx.x{names})\n",
        {"Y": ADDRESS, **{f"X{i}": MAP for i in range(len(extra))}},
        {"body": (body, [ADDRESS, INT, *[MAP] * len(extra)], [])},
        threads=THREADS,
        lanes=lanes,
        cluster=(size, 1, 1),
    )
    y = np.full(blocks * THREADS, -1, np.int32)
    arrays = [array for array, _ in extra]
    maps = [tensor for _, tensor in extra]
    run_lowered(kernel, (blocks, 1, 1), [y, *maps], arrays, checks=checks)
    return y.reshape(blocks, THREADS)


# --- who is where ---------------------------------------------------------------------------------


def test_blocks_know_their_rank_cluster_and_grid(make_kernel):
    def emit(m, bx):
        parts = [whole(m, m.issue(one)[0]) for one in
                 (cluster.CTA_RANK, launch.CLUSTER_ID_X, launch.GRID_BLOCKS_X)]  # fmt: skip
        total = m.binary("add", parts[0], scaled(m, parts[1], 10), int32)
        total = m.binary("add", total, scaled(m, parts[2], 100), int32)
        return m.binary("add", total, scaled(m, bx, 10000), int32)

    result = run(make_kernel, emit, blocks=6, size=2)
    expected = [600 + 10 * (b // 2) + b % 2 + 10000 * b for b in range(6)]
    np.testing.assert_array_equal(result, np.repeat(expected, THREADS).reshape(6, THREADS))


def test_a_cluster_of_one_block_is_rank_0(make_kernel):
    result = run(make_kernel, lambda m, bx: whole(m, rank_of(m)), blocks=3, size=1)
    assert not result.any()


def test_ranks_count_along_x_first(make_kernel):
    def body(m, y, bx, by):
        index = m.binary("add", scaled(m, by, 4), bx, int32)
        publish(m, y, whole(m, rank_of(m)), index)

    kernel = make_kernel(
        "def kernel(Y):\n    body(Y, cuda.blockIdx.x, cuda.blockIdx.y)\n",
        {"Y": ADDRESS},
        {"body": (body, [ADDRESS, INT, INT], [])},
        cluster=(2, 2, 1),
    )
    y = np.full(4 * 4 * THREADS, -1, np.int32)
    run_lowered(kernel, (4, 4, 1), [y])
    expected = np.tile([[0, 1], [2, 3]], (2, 2))
    np.testing.assert_array_equal(y.reshape(4, 4, THREADS), expected[:, :, None].repeat(64, 2))
    with pytest.raises(AssertionError, match=r"a grid of \(3, 4, 1\) in clusters of \(2, 2, 1\)"):
        run_lowered(kernel, (3, 4, 1), [y])


# --- the cluster's barrier and distributed shared memory ------------------------------------------


def exchange(m, bx, is_synced=True, relaxed=False):
    """Each thread reads what the thread of its number wrote in the other block."""
    m.store(own(m), [m.binary("add", m.thread_index(), scaled(m, bx, 1000), int32)], int32)
    if is_synced:
        m.issue(cluster.CLUSTER_ARRIVE_RELAXED if relaxed else cluster.CLUSTER_ARRIVE)
        m.issue(cluster.CLUSTER_WAIT)
    address = m.issue(cluster.MAPA, [m.address(own(m)), other(m)])[0]
    value = whole(m, m.issue(cluster.load_cluster(32), [address])[0])
    meet(m)
    return value


@pytest.mark.parametrize("lanes", [0, 32])
def test_blocks_read_each_others_shared_memory(lanes, make_kernel):
    for checks in (None, QUIET):
        result = run(make_kernel, exchange, blocks=4, lanes=lanes, checks=checks)
        expected = np.arange(THREADS) + 1000 * np.array([[1], [0], [3], [2]])
        np.testing.assert_array_equal(result, expected)


def test_reading_another_block_without_meeting_it_is_an_error(make_kernel):
    with pytest.raises(SimulationError) as caught:
        run(make_kernel, lambda m, bx: exchange(m, bx, is_synced=False))
    assert caught.value.headline == (
        "Thread 0 of block 1 of the cluster writes shared memory that thread 0 of block 0 of the "
        "cluster read, and nothing orders the two."
    )
    with pytest.raises(SimulationError, match="nothing orders the two"):
        run(make_kernel, lambda m, bx: exchange(m, bx, relaxed=True))


def test_the_blocks_own_barrier_does_not_order_two_blocks(make_kernel):
    def emit(m, bx):
        m.store(own(m), [m.thread_index()], int32)
        m.issue(cluster.CLUSTER_ARRIVE_RELAXED)
        m.issue(cluster.CLUSTER_WAIT)
        m.issue(barrier.bar_sync(0, THREADS))
        address = m.issue(cluster.MAPA, [m.address(own(m)), other(m)])[0]
        m.issue(cluster.load_cluster(32), [address])

    with pytest.raises(SimulationError, match=r"of block \d of the cluster reads shared memory"):
        run(make_kernel, emit)


@pytest.mark.parametrize("bits", [32, 64])
def test_blocks_write_each_others_shared_memory(bits, make_kernel):
    dtype = uint32 if bits == 32 else uint64
    size = bits // 8

    def emit(m, bx):
        mine = Address("shared", None, scaled(m, m.thread_index(), size), 0, align=size)
        m.store(mine, [m.const(0, dtype)], dtype)
        meet(m)
        value = m.binary("add", m.thread_index(), scaled(m, bx, 1000), int32)
        address = m.issue(cluster.MAPA, [m.address(mine), other(m)])[0]
        even = m.binary("eq", m.binary("and", m.thread_index(), m.const(1, int32), int32),
                        m.const(0, int32), int32)  # fmt: skip
        value = m.cast([value], int32, dtype)[0]
        m.issue(cluster.store_cluster(bits), [address, value], even)
        meet(m)
        return m.cast(m.load(mine, dtype), dtype, int32)[0]

    thread = np.arange(THREADS)
    expected = np.where(thread % 2, 0, thread + 1000 * np.array([[1], [0]]))
    np.testing.assert_array_equal(run(make_kernel, emit), expected)


def send_over(m, bx, bits=32, waits=True, fences=True, expected=None):
    """Each thread sends a number to the other block, whose barrier counts the bytes; the barriers
    are made known by the fence and an arrival that releases nothing."""
    dtype, size = (uint32, 4) if bits == 32 else (uint64, 8)
    first = lane(m, 0)
    m.issue(mbarrier.INIT, [place(m, BARRIER), m.const(1, uint32)], first)
    if fences:
        m.issue(mbarrier.FENCE_INIT)
    m.issue(cluster.CLUSTER_ARRIVE_RELAXED)
    mine = Address("shared", None, scaled(m, m.thread_index(), size), 0, align=size)
    m.issue(cluster.CLUSTER_WAIT)
    count = m.const(size * THREADS if expected is None else expected, uint32)
    m.issue(mbarrier.ARRIVE_EXPECT, [place(m, BARRIER), count], first)
    value = m.cast([m.binary("add", m.thread_index(), scaled(m, bx, 1000), int32)], int32, dtype)
    there = m.issue(cluster.MAPA, [m.address(mine), other(m)])[0]
    counted = m.issue(cluster.MAPA, [place(m, BARRIER), other(m)])[0]
    m.issue(cluster.send(bits), [there, value[0], counted])
    wait = [place(m, BARRIER), m.const(0, uint32)]
    if waits:
        m.issue(WAIT, wait)
    result = m.cast(m.load(mine, dtype), dtype, int32)[0]
    if not waits:  # too late
        m.issue(WAIT, wait)
    return result


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("lanes", [0, 32])
def test_what_is_sent_has_come_when_the_barrier_says_so(bits, lanes, make_kernel):
    result = run(make_kernel, lambda m, bx: send_over(m, bx, bits), lanes=lanes)
    np.testing.assert_array_equal(result, np.arange(THREADS) + 1000 * np.array([[1], [0]]))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"waits": False}, "shared memory .* and nothing orders the two"),
        ({"fences": False}, "initialised, and nothing orders the two"),
        ({"expected": 4 * THREADS + 4}, "still expects 4 bytes"),
    ],
)
def test_sending_without_order_is_found(options, words, make_kernel):
    with pytest.raises(SimulationError, match=words):
        run(make_kernel, lambda m, bx: send_over(m, bx, **options))


def test_an_unmapped_address_is_the_blocks_own(make_kernel):
    def emit(m, bx):
        m.store(own(m), [bx], int32)
        return whole(m, m.issue(cluster.load_cluster(32), [m.address(own(m))])[0])

    np.testing.assert_array_equal(run(make_kernel, emit)[:, 5], [0, 1])


def test_reaching_a_block_that_has_ended_is_an_error(make_kernel):
    def emit(m, bx):
        address = m.issue(cluster.MAPA, [m.address(own(m)), other(m)])[0]
        is_last = m.binary("eq", rank_of(m), m.const(1, uint32), uint32)

        def read():
            m.issue(cluster.load_cluster(32), [address])

        m.branch(is_last, read, None, {})

    with pytest.raises(SimulationError) as caught:
        run(make_kernel, emit)
    assert caught.value.headline == (
        "A block of the cluster reaches the shared memory of block 0, which has ended."
    )


def test_a_rank_that_the_cluster_lacks_is_an_error(make_kernel):
    def emit(m, bx):
        m.issue(cluster.MAPA, [m.address(own(m)), m.const(2, uint32)])

    with pytest.raises(SimulationError, match="asks for block 2 of a cluster of 2 blocks"):
        run(make_kernel, emit)


def test_arriving_twice_or_waiting_without_arrival_is_an_error(make_kernel):
    def twice(m, bx):
        m.issue(cluster.CLUSTER_ARRIVE)
        m.issue(cluster.CLUSTER_ARRIVE)

    with pytest.raises(SimulationError, match=r"Thread 0 of block 0 .* twice without waiting"):
        run(make_kernel, twice)
    with pytest.raises(SimulationError, match=r"Thread 0 of block 0 .* but has not arrived"):
        run(make_kernel, lambda m, bx: m.issue(cluster.CLUSTER_WAIT) or None)


def test_a_barrier_of_the_cluster_that_not_all_reach_waits_for_ever(make_kernel):
    def emit(m, bx):
        is_first = m.binary("eq", rank_of(m), m.const(0, uint32), uint32)

        def arrive():
            m.issue(cluster.CLUSTER_ARRIVE)
            m.issue(cluster.CLUSTER_WAIT)

        def wait():
            m.issue(mbarrier.INIT, [place(m, BARRIER), m.const(1, uint32)], lane(m, 0))
            m.issue(barrier.bar_sync(0, THREADS))
            m.issue(WAIT, [place(m, BARRIER), m.const(0, uint32)])

        m.branch(is_first, arrive, wait, {})

    with pytest.raises(SimulationError) as caught:
        run(make_kernel, emit)
    assert caught.value.headline == (
        "The kernel waits for ever: 64 of 128 threads have come to the cluster's barrier; the "
        "barrier at byte 2048 of shared memory of block 1 of the cluster has 0 of 1 arrivals in "
        "phase 0, and threads wait for parity 0."
    )


def test_nobody_waits_for_blocks_that_have_ended(make_kernel):
    def emit(m, bx):
        is_first = m.binary("eq", rank_of(m), m.const(0, uint32), uint32)
        m.branch(is_first, lambda: meet(m), None, {})
        return bx

    np.testing.assert_array_equal(run(make_kernel, emit)[:, 0], [0, 1])


# --- barriers in other blocks ---------------------------------------------------------------------


def hand_over(m, bx, *, meets=True, arrives=True):
    """Block 1 writes to block 0's shared memory, then arrives at block 0's barrier."""
    m.issue(mbarrier.INIT, [place(m, BARRIER), m.const(THREADS, uint32)], lane(m, 0))
    m.issue(mbarrier.FENCE_INIT)
    if meets:
        meet(m)
    else:
        m.issue(barrier.bar_sync(0, THREADS))
    is_first = m.binary("eq", rank_of(m), m.const(0, uint32), uint32)
    zero = m.const(0, uint32)
    state = {"value": [m.const(0, int32)]}

    def take():
        m.issue(WAIT, [place(m, BARRIER), m.const(0, uint32)])
        following = m.binary("xor", m.thread_index(), m.const(1, int32), int32)
        state["value"][:] = m.load(Address("shared", None, scaled(m, following, 4), align=4), int32)

    def give():
        address = m.issue(cluster.MAPA, [m.address(own(m)), zero])[0]
        value = m.cast([scaled(m, m.thread_index(), 3)], int32, uint32)[0]
        m.issue(cluster.store_cluster(32), [address, value])
        if arrives:
            m.issue(mbarrier.ARRIVE_CLUSTER, [place(m, BARRIER), zero])

    m.branch(is_first, take, give, state)
    meet(m)
    return state["value"][0]


def test_arrivals_from_another_block_release_what_it_wrote(make_kernel):
    result = run(make_kernel, hand_over)
    np.testing.assert_array_equal(result[0], 3 * (np.arange(THREADS) ^ 1))


def test_a_missing_arrival_from_another_block_is_waited_for_in_vain(make_kernel):
    with pytest.raises(SimulationError, match=r"The kernel waits for ever: .* of block 0 of the"):
        run(make_kernel, lambda m, bx: hand_over(m, bx, arrives=False))


def test_a_barrier_must_be_known_to_the_block_that_arrives(make_kernel):
    with pytest.raises(SimulationError, match=r"arrives at .* block 0 .* nothing orders the two"):
        run(make_kernel, lambda m, bx: hand_over(m, bx, meets=False))


# --- multicast ------------------------------------------------------------------------------------


def multicast(m, bx, handle, *, expects=512, mask=3, meets=True, waits=True):
    """Each block loads half of a row for both."""
    m.issue(mbarrier.INIT, [place(m, BARRIER), m.const(1, uint32)], lane(m, 0))
    m.issue(mbarrier.FENCE_INIT)
    if meets:
        meet(m)
    full, first = place(m, BARRIER), lane(m, 0)
    m.issue(mbarrier.ARRIVE_EXPECT, [full, m.const(expects, uint32)], first)
    rank = whole(m, rank_of(m))
    to = place(m, 0, scaled(m, rank, 256))
    inputs = [handle, scaled(m, rank, 64), to, full, m.const(mask, uint16)]
    m.issue(tma.tma_load(1, multicast=True), inputs, first)
    if waits:
        m.issue(WAIT, [full, m.const(0, uint32)])
    value = m.load(own(m, 128), int32)[0]  # the second part of the one, the first of the other
    meet(m)
    return value


@pytest.fixture
def row():
    array = np.arange(128, dtype=np.int32)
    return array, TensorMap(array.ctypes.data, 4, (128,), (4,), (64,), 0, kind="int32")


def test_a_multicast_load_fills_every_block_of_its_mask_and_tells_their_barriers(make_kernel, row):
    for checks in (None, QUIET):
        result = run(make_kernel, multicast, blocks=4, extra=[row], checks=checks)
        np.testing.assert_array_equal(result, np.tile(np.arange(32, 96), (4, 1)))


def test_a_multicast_load_does_not_reach_blocks_outside_its_mask(make_kernel, row):
    """Both halves go to block 1 only."""
    with pytest.raises(SimulationError, match=r"block 0 of the cluster has 1 of 1 arrivals and"):
        run(make_kernel, lambda m, bx, x: multicast(m, bx, x, mask=2), extra=[row])


def test_a_block_that_expects_only_its_own_half_is_caught(make_kernel, row):
    with pytest.raises(SimulationError, match=r"is still filling|still expects -256|arrives"):
        run(make_kernel, lambda m, bx, x: multicast(m, bx, x, expects=256), extra=[row])


def test_a_multicast_to_a_block_that_has_not_met_is_an_error(make_kernel, row):
    with pytest.raises(SimulationError, match=r"copies to (a|the) barrier at byte 2048"):
        run(make_kernel, lambda m, bx, x: multicast(m, bx, x, meets=False), extra=[row])


def test_a_multicast_destination_that_is_read_before_the_wait_is_an_error(make_kernel, row):
    with pytest.raises(SimulationError, match=r"reads .* that a bulk copy is still filling"):
        run(make_kernel, lambda m, bx, x: multicast(m, bx, x, waits=False), extra=[row])


def test_a_mask_beyond_the_cluster_is_our_error(make_kernel, row):
    with pytest.raises(AssertionError, match="mask 0x4 for 2 blocks"):
        run(make_kernel, lambda m, bx, x: multicast(m, bx, x, mask=4), extra=[row])
