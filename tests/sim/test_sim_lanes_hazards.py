"""Shared memory between threads: what orders two accesses, and what is caught when nothing does."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit.dtypes import int8, int32, uint32, uint64
from tilejit.errors import SimulationError
from tilejit.isa import barrier, cp_async, mbarrier
from tilejit.isa.machine import Address
from tilejit.sim.block import Checks
from tilejit.sim.hazards import History
from tilejit.sim.order import Order

THREADS = 64
LANES = np.arange(THREADS)
QUIET = Checks(races=False)


def scaled(m, value, factor: int):
    return m.binary("mul", value, m.const(factor, int32), int32)


def own(m, constant: int = 0) -> Address:
    """Four bytes of the thread's own."""
    return Address("shared", None, scaled(m, m.thread_index(), 4), constant, align=4)


def neighbours(m, constant: int = 0) -> Address:
    """Four bytes of the next thread."""
    following = m.binary("add", m.thread_index(), m.const(1, int32), int32)
    following = m.binary("floormod", following, m.const(THREADS, int32), int32)
    return Address("shared", None, scaled(m, following, 4), constant, align=4)


def write_own(m, constant: int = 0, when=None) -> None:
    m.store(own(m, constant), [m.thread_index()], int32, when)


def read_neighbours(m):
    return m.load(neighbours(m), int32)[0]


def is_lane(m, lane: int):
    return m.binary("eq", m.thread_index(), m.const(lane, int32), int32)


def sync(m) -> None:
    m.issue(barrier.bar_sync(0, THREADS))


def test_a_neighbours_value_after_a_barrier_is_read(run_lanes):
    def emit(m):
        write_own(m)
        sync(m)
        return read_neighbours(m)

    np.testing.assert_array_equal(run_lanes(emit), (LANES + 1) % THREADS)


def test_a_neighbours_value_without_a_barrier_is_an_error(run_lanes):
    def emit(m):
        write_own(m)
        return read_neighbours(m)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit)
    assert caught.value.headline == (
        "Thread 0 reads shared memory that thread 1 wrote, and nothing orders the two."
    )
    assert caught.value.notes == ("Byte 4 of the block's shared memory.",)
    assert caught.value.hint == (
        "Put T.sync_threads() between the two. Iterations of one T.Parallel must not depend on "
        "each other."
    )


def test_a_race_in_global_memory_is_an_error_too(run_lanes):
    array = np.arange(THREADS + 1, dtype=np.int32)

    def emit(m, x, is_synced):
        offset = scaled(m, m.thread_index(), 4)
        (value,) = m.load(Address("global", x, offset, 4, align=4), int32)
        if is_synced:
            sync(m)
        m.store(Address("global", x, offset, align=4), [value], int32)

    address = np.array([array.ctypes.data], np.uint64)
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, address, False, memory=[array])
    assert caught.value.headline == (
        "Thread 1 writes global memory that thread 0 read, and nothing orders the two."
    )
    assert caught.value.notes == ("Byte 4 of array 0.",)
    run_lanes(emit, address, True, memory=[array])
    assert array.tolist() == [*range(1, THREADS + 1), THREADS]


def test_overwriting_what_a_neighbour_has_just_read_is_an_error(run_lanes):
    def emit(m, is_synced):
        write_own(m)
        sync(m)
        read_neighbours(m)
        if is_synced:
            sync(m)
        write_own(m)

    run_lanes(emit, True)
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, False)
    assert caught.value.headline == (
        "Thread 0 writes shared memory that thread 63 read, and nothing orders the two."
    )


def test_overwriting_what_a_neighbour_wrote_is_an_error_unless_it_changes_nothing(run_lanes):
    def emit(m, value):
        m.store(own(m), [m.const(1, int32)], int32)
        m.store(neighbours(m), [m.const(value, int32)], int32)

    run_lanes(emit, 1)
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, 2)
    assert caught.value.headline == (
        "Thread 0 writes shared memory that thread 1 wrote, and nothing orders the two."
    )


def test_a_threads_own_accesses_need_no_barrier(run_lanes):
    def emit(m):
        write_own(m)
        for _ in range(3):
            (value,) = m.load(own(m), int32)
            m.store(own(m), [m.binary("add", value, value, int32)], int32)
        return m.load(own(m), int32)[0]

    np.testing.assert_array_equal(run_lanes(emit), LANES * 8)


@pytest.mark.parametrize("width", [1, 2])
def test_neighbouring_bytes_of_a_word_are_no_race(run_lanes, width):
    def emit(m):
        place = Address("shared", None, scaled(m, m.thread_index(), width), 256)
        values = m.cast([m.thread_index()] * width, int32, int8)
        write_own(m)  # whole words first, so that the history is made finer later
        for _ in range(2):
            m.store(place, values, int8)
            m.load(place, int8, width)
        return m.load(own(m), int32)[0]

    np.testing.assert_array_equal(run_lanes(emit), LANES)


def test_races_are_found_across_accesses_of_different_width(run_lanes):
    def emit(m):
        m.store(own(m), [m.thread_index()], int32)
        first = is_lane(m, 0)
        place = Address("shared", None, m.const(7, int32))
        m.store(place, [m.const(9, int8)], int8, when=first)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit)
    assert "Thread 0 writes shared memory that thread 1 wrote" in caught.value.headline
    assert caught.value.notes == ("Byte 7 of the block's shared memory.",)


def test_a_warp_barrier_orders_a_warp_and_no_more(run_lanes):
    def emit(m, distance):
        write_own(m)
        m.issue(barrier.SYNC_WARP)
        other = m.binary("xor", m.thread_index(), m.const(distance, int32), int32)
        return m.load(Address("shared", None, scaled(m, other, 4)), int32)[0]

    np.testing.assert_array_equal(run_lanes(emit, 5), LANES ^ 5)
    with pytest.raises(SimulationError, match=r"Thread 0 reads .* thread 32 wrote"):
        run_lanes(emit, 32)


def test_who_only_comes_to_a_barrier_is_ordered_before_those_who_wait_there(run_lanes):
    def emit(m, reader):
        is_early = m.binary("lt", m.thread_index(), m.const(32, int32), int32)
        is_late = m.binary("ge", m.thread_index(), m.const(32, int32), int32)
        write_own(m)
        m.issue(barrier.bar_arrive(1, 64), [], is_early)
        m.issue(barrier.bar_sync(1, 64), [], is_late)
        other = m.binary("xor", m.thread_index(), m.const(32, int32), int32)
        place = Address("shared", None, scaled(m, other, 4))
        return m.load(place, int32, when=is_late if reader == "late" else is_early)[0]

    np.testing.assert_array_equal(run_lanes(emit, "late")[32:], LANES[:32])
    with pytest.raises(SimulationError, match="Thread 0 reads shared memory that thread 32 wrote"):
        run_lanes(emit, "early")


def test_nobody_can_only_come_to_the_whole_blocks_barrier():
    with pytest.raises(AssertionError, match="nobody can arrive at barrier 0"):
        barrier.bar_arrive(0, 64)


def test_a_read_by_one_lane_of_a_warp_is_ordered_by_that_lane_alone(run_lanes):
    """Lane 40 reads and arrives; lane 0 waits and overwrites. The rest of lane 40's warp does not
    take part."""

    def emit(m, reader):
        barrier_at = np.array([1024 + 2048], np.uint32)
        first, forty = is_lane(m, 0), is_lane(m, 40)
        m.issue(mbarrier.INIT, [barrier_at, m.const(1, uint32)], when=first)
        m.store(own(m), [m.thread_index()], int32)
        sync(m)
        m.load(Address("shared", None, None, 0), int32, when=is_lane(m, reader))
        m.issue(mbarrier.ARRIVE, [barrier_at], when=forty)
        m.issue(mbarrier.TEST_WAIT, [barrier_at, m.const(0, uint32)], when=first)
        m.store(own(m), [m.const(9, int32)], int32, when=first)

    run_lanes(emit, 40)
    with pytest.raises(SimulationError, match=r"Thread 0 writes .* thread 41 read"):
        run_lanes(emit, 41)


def test_atomics_of_several_threads_are_no_race_but_a_plain_read_of_them_is(run_lanes):
    def emit(m, is_read):
        place = Address("shared", None, None, 8)
        m.store(place, [m.const(0, int32)], int32, when=is_lane(m, 0))
        sync(m)
        m.atomic(place, "add", m.const(1, int32), int32)
        m.atomic(place, "add", m.const(1, int32), int32)
        if not is_read:
            sync(m)
        return m.load(place, int32)[0]

    assert set(run_lanes(emit, False).tolist()) == {2 * THREADS}
    with pytest.raises(SimulationError, match="and nothing orders the two"):
        run_lanes(emit, True)


def test_shared_memory_that_nothing_wrote_is_poison_and_an_error_where_asked_for(run_lanes):
    def emit(m):
        return m.load(own(m), int32)[0]

    assert set(run_lanes(emit).tolist()) == {-1}
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, checks=Checks(unwritten=True))
    assert caught.value.headline == "The kernel reads shared memory that nothing has written."
    assert caught.value.hint == "Fill the buffer first, for example with T.clear."


@pytest.mark.parametrize("offset", [4096 - 4 * THREADS + 4, -4])
def test_shared_memory_has_an_end(run_lanes, offset):
    with pytest.raises(SimulationError) as caught:
        run_lanes(lambda m: write_own(m, offset))
    where = (
        "4 bytes before the start of the block's shared memory"
        if offset < 0
        else "4 bytes past the end of the block's shared memory (4096 bytes)"
    )
    assert caught.value.headline == f"The kernel writes 4 bytes of shared memory, {where}."


# --- asynchronous copies --------------------------------------------------------------------------


def copy_own(m, x, constant: int = 0, valid: int = 4) -> None:
    source = m.address(Address("global", x, scaled(m, m.thread_index(), 4), constant))
    m.issue(cp_async.cp_async(4), [m.address(own(m)), source, m.const(valid, uint32)])


SOURCE = np.arange(2 * THREADS, dtype=np.int32) + 1000


@pytest.fixture
def run_copy(run_lanes):
    def run(emit, checks=None):
        address = np.array([SOURCE.ctypes.data], np.uint64)
        return run_lanes(emit, address, memory=[SOURCE], checks=checks)

    return run


def test_an_asynchronous_copy_has_landed_after_the_wait(run_copy):
    def emit(m, x):
        copy_own(m, x)
        m.issue(cp_async.COMMIT_GROUP)
        m.issue(cp_async.wait_group(0))
        sync(m)
        return read_neighbours(m)

    np.testing.assert_array_equal(run_copy(emit), SOURCE[(LANES + 1) % THREADS])


def test_an_asynchronous_copy_that_is_not_waited_for_leaves_what_was_there(run_copy):
    def emit(m, x):
        write_own(m)
        copy_own(m, x)
        m.issue(cp_async.COMMIT_GROUP)
        sync(m)
        return m.load(own(m), int32)[0]

    np.testing.assert_array_equal(run_copy(emit, QUIET), LANES)
    with pytest.raises(SimulationError) as caught:
        run_copy(emit)
    assert caught.value.headline == (
        "Thread 0 reads shared memory that an asynchronous copy of thread 0 is still filling."
    )
    assert caught.value.hint == "Wait for the copy first."


def test_a_copy_that_its_thread_alone_has_waited_for_is_a_race_for_others(run_copy):
    def emit(m, x):
        copy_own(m, x)
        m.issue(cp_async.WAIT_ALL)
        return m.load(own(m), int32)[0], read_neighbours(m)

    with pytest.raises(SimulationError, match=r"Thread 0 reads .* thread 1 wrote"):
        run_copy(emit)


@pytest.mark.parametrize(("pending", "expected"), [(0, 64), (1, 0), (2, -1)])
def test_waiting_with_groups_pending_lands_the_older_ones(run_copy, pending, expected):
    def emit(m, x):
        for group in range(2):
            copy_own(m, x, constant=group * 4 * THREADS)
            m.issue(cp_async.COMMIT_GROUP)
        m.issue(cp_async.wait_group(pending))
        return m.load(own(m), int32)[0]

    there = run_copy(emit, QUIET)
    wanted = np.full(THREADS, -1) if expected < 0 else SOURCE[expected : expected + THREADS]
    np.testing.assert_array_equal(there, wanted)


def test_an_uncommitted_copy_is_not_waited_for_by_its_group(run_copy):
    def emit(m, x):
        copy_own(m, x)
        m.issue(cp_async.wait_group(0))
        return m.load(own(m), int32)[0]

    assert set(run_copy(emit, QUIET).tolist()) == {-1}


@pytest.mark.parametrize("valid", [0, 1, 3])
def test_the_bytes_that_a_copy_does_not_read_are_zero(run_copy, valid):
    def emit(m, x):
        copy_own(m, x, valid=valid)
        m.issue(cp_async.WAIT_ALL)
        return m.load(own(m), int32)[0]

    expected = SOURCE[:THREADS] & ((1 << 8 * valid) - 1)
    np.testing.assert_array_equal(run_copy(emit), expected)


def test_a_copy_with_nothing_to_read_may_point_anywhere(run_lanes):
    def emit(m):
        nowhere = m.const(12345, uint64)
        m.issue(cp_async.cp_async(4), [m.address(own(m)), nowhere, m.const(0, uint32)])
        m.issue(cp_async.WAIT_ALL)
        return m.load(own(m), int32)[0]

    assert not run_lanes(emit).any()


def test_refilling_a_slot_that_others_still_read_is_an_error(run_copy):
    def emit(m, x):
        write_own(m)
        sync(m)
        read_neighbours(m)
        copy_own(m, x)

    with pytest.raises(SimulationError, match=r"Thread 0 writes .* thread 63 read"):
        run_copy(emit)


def test_copies_of_some_lanes_wait_for_their_own_groups(run_copy):
    """Lanes below 10 commit two groups, the others one, so that waiting for all but one lands
    different copies."""

    def emit(m, x):
        copy_own(m, x)
        m.issue(cp_async.COMMIT_GROUP)
        few = m.binary("lt", m.thread_index(), m.const(10, int32), int32)
        m.branch(few, lambda: m.issue(cp_async.COMMIT_GROUP), None, {})
        m.issue(cp_async.wait_group(1))
        return m.load(own(m), int32)[0]

    np.testing.assert_array_equal(run_copy(emit, QUIET), np.where(LANES < 10, SOURCE[:THREADS], -1))


# --- barriers -------------------------------------------------------------------------------------


def test_a_barrier_that_some_lanes_miss_is_a_wait_for_ever(run_lanes):
    def emit(m):
        few = m.binary("lt", m.thread_index(), m.const(10, int32), int32)
        m.branch(few, lambda: sync(m), None, {})

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit)
    assert caught.value.headline == (
        "The kernel waits for ever: 10 of 64 threads have come to barrier 0."
    )


def test_a_wait_for_arrivals_that_do_not_come_is_a_wait_for_ever(run_lanes):
    def emit(m):
        where = np.array([1024], np.uint32)
        m.issue(mbarrier.INIT, [where, m.const(65, uint32)], when=is_lane(m, 0))
        sync(m)
        m.issue(mbarrier.ARRIVE, [where])
        m.issue(mbarrier.TEST_WAIT, [where, m.const(0, uint32)])

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit)
    assert caught.value.headline == (
        "The kernel waits for ever: the barrier at byte 0 of shared memory has 64 of 65 arrivals "
        "in phase 0, and threads wait for parity 0."
    )
    assert "arrive_count" in caught.value.hint


def test_phases_alternate_in_parity(run_lanes):
    """Before the first phase has completed a wait for parity 1 returns, as on a GPU."""

    def emit(m):
        where = np.array([1024 + 8], np.uint32)
        m.issue(mbarrier.INIT, [where, m.const(THREADS, uint32)], when=is_lane(m, 0))
        sync(m)
        m.issue(mbarrier.TEST_WAIT, [where, m.const(1, uint32)])
        for round_ in range(4):
            write_own(m, 256)
            m.issue(mbarrier.ARRIVE, [where])
            m.issue(mbarrier.TEST_WAIT, [where, m.const(round_ & 1, uint32)])
            m.load(neighbours(m, 256), int32)
            sync(m)

    run_lanes(emit)


def test_an_mbarrier_that_was_never_made_is_an_error(run_lanes):
    where = np.array([1024 + 16], np.uint32)
    with pytest.raises(SimulationError) as caught:
        run_lanes(lambda m: m.issue(mbarrier.ARRIVE, [where]))
    headline = "The kernel arrives at a barrier at byte 16 of shared memory, but there is none."
    assert caught.value.headline == headline


def test_an_mbarrier_used_before_its_making_is_known_is_an_error(run_lanes):
    def emit(m):
        where = np.array([1024], np.uint32)
        m.issue(mbarrier.INIT, [where, m.const(THREADS, uint32)], when=is_lane(m, 0))
        m.issue(mbarrier.ARRIVE, [where])

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit)
    assert caught.value.headline == (
        "Thread 1 arrives at the barrier at byte 0 of shared memory that thread 0 initialised, "
        "and nothing orders the two."
    )


# --- against the definition -----------------------------------------------------------------------


class Exact:
    """Races by the definition: every access is kept, and what each thread knows of each other."""

    def __init__(self, threads: int) -> None:
        self.known = np.zeros((threads, threads), int)
        self.accesses: dict[int, list[tuple[int, bool, int]]] = {}
        self.time = 0

    def access(self, threads, offsets, width: int, is_write: bool) -> bool:
        """True when one of the accesses is in a race with an earlier one."""
        self.time += 1
        places = [(t, o + i) for t, o in zip(threads, offsets, strict=True) for i in range(width)]
        found = any(
            (is_write or was_write) and other != thread and self.known[thread, other] < time
            for thread, place in places
            for other, was_write, time in self.accesses.get(place, [])
        )
        for thread, place in places:
            self.accesses.setdefault(place, []).append((thread, is_write, self.time))
        return found

    def order(self, first, second) -> None:
        """What `first` did until now comes before what `second` will do."""
        told = self.known[first].max(axis=0)
        told[first] = self.time
        self.known[second] = np.maximum(self.known[second], told)


@pytest.mark.parametrize("seed", range(60))
def test_random_accesses_are_races_exactly_when_the_definition_says_so(seed):
    rng = np.random.default_rng(seed)
    threads = np.arange(96)
    warps = threads.reshape(3, 32)
    order, exact = Order(96), Exact(96)
    order.start(lambda time: None)
    history = History(order, 512, "shared memory", "a buffer")
    for _ in range(60):
        action = rng.integers(12)
        if action == 0:
            order.synchronise_all()
            exact.order(threads, threads)
        elif action <= 3:
            first, second = warps[rng.integers(3)], warps[rng.integers(3)]
            order.acquire(second, order.release(first))
            exact.order(first, second)
        else:
            members = rng.choice(warps[rng.integers(3)], rng.integers(1, 5), replace=False)
            width = int(rng.choice([1, 2, 4, 16]))
            offsets = rng.choice(512 // 16, len(members), replace=False) * 16
            offsets += rng.integers(16 // width, size=len(members)) * width
            is_write = bool(rng.integers(2))
            is_race = exact.access(members, offsets, width, is_write)
            access = history.write if is_write else history.read
            if is_race:
                with pytest.raises(SimulationError, match="nothing orders the two"):
                    access(members, offsets, width)
                return
            access(members, offsets, width)
