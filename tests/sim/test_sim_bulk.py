"""Bulk copies of boxes: where bytes go, when they land, and what is caught when nobody waits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tilejit.dtypes import bool_, float32, int32, uint32, uint64
from tilejit.errors import SimulationError
from tilejit.isa import barrier, mbarrier, tma
from tilejit.isa.machine import Address, Slot
from tilejit.isa.stmatrix import stmatrix
from tilejit.isa.tma import TensorMap
from tilejit.layout.shared import SharedLayout
from tilejit.sim.block import Checks
from tilejit.sim.launch import run_lowered
from tilejit.target import TARGETS

QUIET = Checks(races=False)
HANDLE = 1 << 40  # of the tensor map in `run_lanes`
BARRIER = 4096 - 64  # byte of shared memory
WAIT = mbarrier.wait_parity(TARGETS["sm_90a"])
MAP, ADDRESS, INT = Slot(uint64, tensor_map=True), Slot(uint64, address=True), Slot(int32)


def map_of(array, box, swizzle=0, kind=None, rounds=False) -> TensorMap:
    kind = kind or array.dtype.name
    made = TensorMap(
        array.ctypes.data, array.itemsize, array.shape, array.strides, tuple(box), swizzle,
        rounds, kind,
    )  # fmt: skip
    assert not made.problem(), made.problem()
    return made


def place(m, byte: int):
    return m.address(Address("shared", None, None, byte))


def lane(m, number: int):
    return m.binary("eq", m.thread_index(), m.const(number, int32), int32)


def own(m, byte: int = 0, stride: int = 4) -> Address:
    offset = m.binary("mul", m.thread_index(), m.const(stride, int32), int32)
    return Address("shared", None, offset, byte, align=4)


def init(m, byte: int = BARRIER, count: int = 1) -> None:
    m.issue(mbarrier.INIT, [place(m, byte), m.const(count, uint32)], lane(m, 0))


def sync(m) -> None:
    m.issue(barrier.bar_sync(0, 0))


def expect(m, size: int, byte: int = BARRIER, when=None) -> None:
    when = lane(m, 0) if when is None else when
    m.issue(mbarrier.ARRIVE_EXPECT, [place(m, byte), m.const(size, uint32)], when)


def wait(m, parity: int = 0, byte: int = BARRIER) -> None:
    m.issue(WAIT, [place(m, byte), m.const(parity, uint32)])


def load(m, start, to: int = 0, byte: int = BARRIER, handle: int = HANDLE, when=None) -> None:
    inputs = [m.const(handle, uint64), *(m.const(i, int32) for i in start), place(m, to)]
    when = lane(m, 0) if when is None else when
    m.issue(tma.tma_load(len(start)), [*inputs, place(m, byte)], when)


def store(m, start, source: int = 0, handle: int = HANDLE, add: bool = False, thread=0) -> None:
    one = tma.tma_reduce_add(len(start)) if add else tma.tma_store(len(start))
    inputs = [m.const(handle, uint64), *(m.const(i, int32) for i in start), place(m, source)]
    m.issue(one, inputs, lane(m, thread))


def wait_stores(m, pending: int = 0, read: bool = False, thread: int = 0) -> None:
    m.issue(tma.wait_stores(pending, read), [], lane(m, thread))


def load_whole(start, count: int):
    """Loads a box and returns `count` words of it a thread of 64."""

    def emit(m):
        init(m)
        sync(m)
        expect(m, 4 * 64 * count)
        load(m, start)
        wait(m)
        return m.load(own(m, stride=4 * count), uint32, count)

    return emit


def words_of(result) -> np.ndarray:
    return np.stack(result, axis=1).ravel()


# --- loads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [(0,), (500,), (-100,), (1000,), (-300,)])
def test_a_box_of_rank_1_is_clipped_with_zeros(start, run_lanes):
    array = np.arange(1, 601, dtype=np.int32)
    result = words_of(
        run_lanes(load_whole(start, 4), memory=[array], maps={HANDLE: map_of(array, (256,))})
    )
    padded = np.pad(array, 1000)
    at = 1000 + start[0]
    np.testing.assert_array_equal(result, padded[at : at + 256] if at < 2000 else 0)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("corner", ["low", "inside", "high"])
def test_a_box_of_any_rank_comes_outermost_first(rank, corner, run_lanes):
    shape = (6, 5, 4, 4, 16)[-rank:]
    array = np.arange(1, 1 + np.prod(shape), dtype=np.int32).reshape(shape)
    box = {2: (16, 16), 3: (4, 4, 16), 4: (2, 2, 4, 16), 5: (2, 2, 2, 2, 16)}[rank]
    step = {"low": -1, "inside": 0, "high": 3}[corner]
    start = (*(step,) * (rank - 1), 4 * step)  # in a row by 16 bytes
    padded = np.pad(array, 24)
    expected = padded[tuple(slice(24 + i, 24 + i + n) for i, n in zip(start, box, strict=True))]
    result = run_lanes(load_whole(start, 4), memory=[array], maps={HANDLE: map_of(array, box)})
    np.testing.assert_array_equal(words_of(result), expected.ravel())


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("to", [0, 1024, 2048 + 256])
def test_a_swizzled_box_lies_as_shared_layouts_say(span, to, run_lanes):
    """Also where its pattern does not begin at the box: the address decides."""
    columns, rows = span // 2, 1024 // span
    array = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns)

    def emit(m):
        init(m)
        sync(m)
        expect(m, 1024)
        load(m, (0, 0), to)
        wait(m)
        return m.load(own(m, to, 16), uint32, 4)

    maps = {HANDLE: map_of(array, array.shape, span)}
    result = words_of(run_lanes(emit, memory=[array], maps=maps)).view(np.uint16)
    layout = SharedLayout((64 * rows, columns), 2, swizzle=span // 16)
    first = to // span % (64 * rows)
    table = layout.table()[first : first + rows] - first * span
    np.testing.assert_array_equal(result[table // 2], array)


def test_rows_below_the_swizzles_span_keep_its_pitch(run_lanes):
    array = np.arange(8 * 16, dtype=np.uint16).reshape(8, 16)
    box = tma.Box(map_of(array, (8, 16), 128), (0, 0))
    assert box.chunks(0).tolist() == [
        128 * r + 16 * (c ^ r % 8) for r in range(8) for c in range(2)
    ]
    assert box.tensor.box_bytes == 256


def test_a_tensor_may_have_strides(run_lanes):
    whole = np.arange(32 * 64, dtype=np.int32).reshape(32, 64)
    part = whole[3:31:2, 4:40]
    maps = {HANDLE: map_of(part, (8, 32))}
    result = words_of(run_lanes(load_whole((10, 8), 4), memory=[whole], maps=maps))
    expected = np.zeros((8, 32), np.int32)
    expected[:4, :28] = part[10:, 8:]
    np.testing.assert_array_equal(result.reshape(8, 32), expected)


def test_a_map_may_round_to_tf32(run_lanes):
    array = np.zeros(256, np.float32)
    one = np.float32(2.0**-10)
    array[:8] = [1 + one / 2, 1 + 3 * one / 2, 1 + one * 0.51, -1 - one * 0.49, 2 - one / 4,
                 np.inf, -np.inf, np.nan]  # fmt: skip
    maps = {HANDLE: map_of(array, (256,), kind="tfloat32", rounds=True)}
    result = words_of(run_lanes(load_whole((0,), 4), memory=[array], maps=maps)).view(np.float32)
    expected = [1, 1 + 2 * one, 1 + one, -1, 2, np.inf, -np.inf, np.nan]
    np.testing.assert_array_equal(result[:8], np.array(expected, np.float32))


def test_memory_is_read_when_the_load_lands(run_lanes):
    array = np.zeros(256, np.int32)

    def emit(m):
        init(m)
        sync(m)
        expect(m, 1024)
        load(m, (0,))
        if isinstance(m.thread_index(), np.ndarray):  # directly
            array[:] = 7
        wait(m)
        return m.load(own(m, stride=16), uint32, 4)

    result = words_of(run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))}))
    assert set(result.tolist()) == {7 if array[0] else 0}


def test_a_destination_that_is_read_before_the_wait_is_an_error_or_poison(run_lanes):
    array = np.ones(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m):
        init(m)
        sync(m)
        expect(m, 1024)
        load(m, (0,))
        value = m.load(own(m, stride=16), uint32, 4)
        wait(m)
        return value

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, memory=[array], maps=maps)
    assert caught.value.headline == (
        "Thread 0 reads shared memory that a bulk copy is still filling."
    )
    assert caught.value.hint == "Wait for the copy first."
    assert set(words_of(run_lanes(emit, memory=[array], maps=maps, checks=QUIET))) == {0xFFFFFFFF}


def test_a_destination_that_is_written_before_the_wait_is_an_error(run_lanes):
    array = np.ones(256, np.int32)

    def emit(m):
        init(m)
        sync(m)
        expect(m, 1024)
        load(m, (0,))
        m.store(own(m), [m.const(1, int32)], int32, lane(m, 5))

    with pytest.raises(SimulationError, match=r"Thread 5 writes .* a bulk copy is still filling"):
        run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))})


def test_who_has_not_waited_must_meet_somebody_who_has(run_lanes):
    array = np.ones(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, is_synced):
        init(m)
        sync(m)
        expect(m, 1024)
        load(m, (0,))
        m.issue(WAIT, [place(m, BARRIER), m.const(0, uint32)], lane(m, 3))
        if is_synced:
            sync(m)
        return m.load(own(m, stride=16), uint32, 4)

    assert set(words_of(run_lanes(emit, True, memory=[array], maps=maps))) == {1}
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, False, memory=[array], maps=maps)
    assert caught.value.headline == (
        "Thread 0 reads shared memory that a bulk copy wrote, and nothing orders the two."
    )


def test_meeting_at_a_barrier_does_not_replace_the_wait(run_lanes):
    """The load has landed, but nobody knows."""
    array = np.ones(512, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m):
        init(m)
        init(m, BARRIER + 8)
        sync(m)
        expect(m, 1024)
        expect(m, 1024, BARRIER + 8)
        load(m, (0,))
        load(m, (256,), 1024, BARRIER + 8)
        wait(m, 0, BARRIER + 8)  # lands both
        sync(m)
        return m.load(own(m, stride=16), uint32, 4)

    with pytest.raises(SimulationError, match="that a bulk copy wrote, and nothing orders the two"):
        run_lanes(emit, memory=[array], maps=maps)


def test_a_load_over_what_another_thread_still_reads_is_an_error(run_lanes):
    array = np.ones(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, is_synced):
        init(m)
        m.store(own(m), [m.const(1, int32)], int32)
        m.load(own(m), int32)
        if is_synced:
            sync(m)
        expect(m, 1024)
        load(m, (0,))
        wait(m)

    run_lanes(emit, True, memory=[array], maps=maps)
    with pytest.raises(SimulationError, match=r"Thread 0 writes .* thread 1 wrote, and nothing"):
        run_lanes(emit, False, memory=[array], maps=maps)


def test_a_load_of_what_another_thread_wrote_to_global_memory_needs_a_barrier(run_lanes):
    array = np.ones(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, base, is_synced):
        init(m)
        sync(m)
        offset = m.binary("mul", m.thread_index(), m.const(4, int32), int32)
        m.store(Address("global", base, offset, align=4), [m.thread_index()], int32)
        if is_synced:
            sync(m)
        expect(m, 1024)
        load(m, (0,))
        wait(m)

    address = np.array([array.ctypes.data], np.uint64)
    run_lanes(emit, address, True, memory=[array], maps=maps)
    with pytest.raises(SimulationError, match="Thread 0 reads global memory that thread 1 wrote"):
        run_lanes(emit, address, False, memory=[array], maps=maps)


@pytest.mark.parametrize(
    ("shape", "start", "past"), [((300,), (100,), "224 bytes past"), ((512,), (0,), None)]
)
def test_a_map_that_is_larger_than_its_memory_is_an_error_where_it_shows(
    shape, start, past, run_lanes
):
    array = np.ones(300, np.int32)
    maps = {HANDLE: TensorMap(array.ctypes.data, 4, (512,), (4,), (256,), 0, kind="int32")}
    emit = load_whole(start, 4)
    if past is None:
        run_lanes(emit, memory=[array], maps=maps)
        return
    with pytest.raises(SimulationError, match=f"reads 1024 bytes of global memory, {past}"):
        run_lanes(emit, memory=[array], maps=maps)


def test_a_misplaced_box_and_an_illegal_map_are_our_errors(run_lanes):
    array = np.ones(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, to, rank):
        init(m)
        sync(m)
        load(m, (0,) * rank, to)

    with pytest.raises(AssertionError, match="not aligned to 128"):
        run_lanes(emit, 64, 1, memory=[array], maps=maps)
    with pytest.raises(AssertionError, match="rank 1, used as 2"):
        run_lanes(emit, 0, 2, memory=[array], maps=maps)
    with pytest.raises(AssertionError, match="no tensor map at address"):
        run_lanes(emit, 0, 1, memory=[array])
    with pytest.raises(AssertionError, match="not 1 to 256"):
        bad = TensorMap(array.ctypes.data, 4, (256,), (4,), (512,), 0, kind="int32")
        run_lanes(emit, 0, 1, memory=[array], maps={HANDLE: bad})


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float32", "float64"])
def test_a_box_that_begins_inside_16_bytes_of_a_row_is_our_error(kind, run_lanes):
    """A GPU raises an illegal instruction."""
    array = np.ones((4, 256), kind)
    unit = 16 // array.itemsize
    maps = {HANDLE: map_of(array, (1, 1024 // array.itemsize // 4))}

    def bring(m, start):
        init(m)
        sync(m)
        expect(m, 256)
        load(m, start)
        wait(m)

    for start in ((1, unit), (3, -unit), (3, 0), (-1, 256)):
        run_lanes(bring, start, memory=[array], maps=maps)
        if min(start) >= 0:
            run_lanes(stored(start), memory=[array], maps=maps)
    for start in ((0, 1), (0, unit - 1), (1, -1), (4, unit + 1), (0, 256 + unit // 2)):
        words = f"begins at element {start[1]} of a row, which is no multiple of 16 bytes"
        for emit, inputs in ((bring, [start]), (stored(start), [])):
            with pytest.raises(AssertionError, match=words):
                run_lanes(emit, *inputs, memory=[array], maps=maps)


# --- bytes that barriers expect -------------------------------------------------------------------


def test_one_barrier_waits_for_the_bytes_of_several_loads(run_lanes):
    array = np.arange(512, dtype=np.int32)

    def emit(m):
        init(m)
        sync(m)
        expect(m, 2048)
        load(m, (256,))
        load(m, (0,), 1024)
        wait(m)
        return m.load(own(m, stride=32), uint32, 4) + m.load(own(m, 16, stride=32), uint32, 4)

    result = run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))})
    np.testing.assert_array_equal(words_of(result), np.roll(array, 256))


def test_bytes_may_be_announced_apart_from_the_arrival_and_after_they_have_come(run_lanes):
    array = np.ones(512, dtype=np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m):
        init(m)
        init(m, BARRIER + 8)
        sync(m)
        load(m, (0,))  # nothing announced yet
        expect(m, 1024, BARRIER + 8)
        load(m, (256,), 1024, BARRIER + 8)
        wait(m, 0, BARRIER + 8)  # both have landed
        m.issue(mbarrier.EXPECT, [place(m, BARRIER), m.const(1024, uint32)], lane(m, 7))
        m.issue(mbarrier.ARRIVE, [place(m, BARRIER)], lane(m, 9))
        wait(m)
        return m.load(own(m, stride=32), uint32, 4)

    assert set(words_of(run_lanes(emit, memory=[array], maps=maps, ends=True))) == {1}


def test_too_many_announced_bytes_are_waited_for_in_vain(run_lanes):
    array = np.ones(256, np.int32)

    def emit(m):
        init(m)
        sync(m)
        expect(m, 1024 + 64)
        load(m, (0,))
        wait(m)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))})
    assert caught.value.headline == (
        "The kernel waits for ever: the barrier at byte 4032 of shared memory has 1 of 1 arrivals "
        "and still expects 64 bytes in phase 0, and threads wait for parity 0."
    )


def test_too_few_announced_bytes_do_not_hide_the_rest(run_lanes):
    array = np.ones(512, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m):
        init(m)
        sync(m)
        expect(m, 1024)
        load(m, (0,))
        load(m, (0,), 1024)
        wait(m)
        return m.load(own(m, stride=32), uint32, 4)

    with pytest.raises(SimulationError, match="a bulk copy is still filling"):
        run_lanes(emit, memory=[array], maps=maps)


def test_an_arrival_without_announced_bytes_completes_the_phase_at_once(run_lanes):
    array = np.ones(256, np.int32)

    def emit(m):
        init(m)
        sync(m)
        m.issue(mbarrier.ARRIVE, [place(m, BARRIER)], lane(m, 0))
        load(m, (0,))
        wait(m)
        m.load(own(m), int32)

    with pytest.raises(SimulationError, match="a bulk copy is still filling"):
        run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))})


def test_an_arrival_for_the_next_phase_while_bytes_are_missing_is_an_error(run_lanes):
    def emit(m):
        init(m)
        sync(m)
        expect(m, 64)
        expect(m, 64)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit)
    assert caught.value.headline == (
        "A thread arrives too often: the barrier at byte 4032 of shared memory has 1 of 1 "
        "arrivals and still expects 128 bytes in phase 0."
    )


def test_more_bytes_than_a_barrier_counts_are_an_error(run_lanes):
    def emit(m):
        init(m)
        sync(m)
        expect(m, 1 << 20)

    with pytest.raises(SimulationError, match="Too many bytes for one phase"):
        run_lanes(emit)


def test_a_kernel_must_not_end_before_its_loads(run_lanes):
    array = np.ones(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, has_load):
        init(m)
        sync(m)
        expect(m, 1024)
        if has_load:
            load(m, (0,), 1024)

    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, True, memory=[array], maps=maps, ends=True)
    assert caught.value.headline == (
        "The kernel ends while a bulk copy to byte 1024 of shared memory is on its way."
    )
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, False, memory=[array], maps=maps, ends=True)
    assert caught.value.headline == (
        "The kernel ends while the barrier at byte 4032 of shared memory has 1 of 1 arrivals and "
        "still expects 1024 bytes in phase 0."
    )


# --- a ring ---------------------------------------------------------------------------------------

ROUNDS, STAGES, SIZE = 7, 2, 512  # elements of a stage
FULL, EMPTY = 4096, 4096 + 8 * STAGES

RING = """
def kernel(X, Y):
    start()
    i = 0
    if producing():
        while more(i):
            fill(X, i)
            i = following(i)
    else:
        while more(i):
            drain(Y, i)
            i = following(i)
"""


def ring(make_kernel, waits_for_empty=True, waits_for_full=True, drains_first=True):
    """Warpgroup 0 loads rows of X into a ring, warpgroup 1 doubles them into Y."""

    def slot(m, i, byte):
        number = m.binary("floormod", i, m.const(STAGES, int32), int32)
        offset = m.binary("mul", number, m.const(8, int32), int32)
        return m.address(Address("shared", None, offset, byte))

    def parity(m, i, flip):
        turn = m.binary("floordiv", i, m.const(STAGES, int32), int32)
        turn = m.binary("add", turn, m.const(flip, int32), int32)
        return m.cast([m.binary("and", turn, m.const(1, int32), int32)], int32, uint32)[0]

    def offset(m, i):
        number = m.binary("floormod", i, m.const(STAGES, int32), int32)
        return m.binary("mul", number, m.const(4 * SIZE, int32), int32)

    def start(m):
        for stage in range(STAGES):
            init(m, FULL + 8 * stage)
            init(m, EMPTY + 8 * stage)
        sync(m)

    def fill(m, x, i):
        first = lane(m, 0)
        if waits_for_empty:
            m.issue(WAIT, [slot(m, i, EMPTY), parity(m, i, 1)], first)
        full = slot(m, i, FULL)
        m.issue(mbarrier.ARRIVE_EXPECT, [full, m.const(4 * SIZE, uint32)], first)
        for part in range(SIZE // 256):
            to = m.address(Address("shared", None, offset(m, i), 1024 * part))
            m.issue(tma.tma_load(2), [x, i, m.const(256 * part, int32), to, full], first)

    def drain(m, y, i):
        if waits_for_full:
            m.issue(WAIT, [slot(m, i, FULL), parity(m, i, 0)])
        local = m.binary("and", m.thread_index(), m.const(127, int32), int32)
        here = m.binary("mul", local, m.const(16, int32), int32)
        source = m.binary("add", offset(m, i), here, int32)
        if not drains_first:
            m.issue(mbarrier.ARRIVE, [slot(m, i, EMPTY)], lane(m, 128))
        values = m.load(Address("shared", None, source, align=16), float32, 4)
        values = [m.binary("add", v, v, float32) for v in values]
        row = m.binary("mul", i, m.const(4 * SIZE, int32), int32)
        m.store(Address("global", y, m.binary("add", row, here, int32), align=16), values, float32)
        m.issue(barrier.bar_sync(1, 128))
        if drains_first:
            m.issue(mbarrier.ARRIVE, [slot(m, i, EMPTY)], lane(m, 128))

    def producing(m):
        return [m.binary("lt", m.thread_index(), m.const(128, int32), int32)]

    bool_slot = Slot(bool_)
    return make_kernel(
        RING,
        {"X": MAP, "Y": ADDRESS},
        {
            "start": (start, [], []),
            "producing": (producing, [], [bool_slot]),
            "more": (
                lambda m, i: [m.binary("lt", i, m.const(ROUNDS, int32), int32)], [INT], [bool_slot]
            ),
            "following": (
                lambda m, i: [m.binary("add", i, m.const(1, int32), int32)], [INT], [INT]
            ),
            "fill": (fill, [MAP, INT], []),
            "drain": (drain, [ADDRESS, INT], []),
        },
        threads=256,
        lanes=128,
        shared_bytes=4096 + 64,
    )  # fmt: skip


def run_ring(kernel, checks=None) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((ROUNDS, SIZE)).astype(np.float32)
    y = np.full_like(x, np.nan)
    run_lowered(kernel, (1, 1, 1), [map_of(x, (1, 256)), y], [x], checks=checks)
    return x, y


def test_a_producer_and_a_consumer_share_a_ring_of_buffers(make_kernel):
    for checks in (None, QUIET):
        x, y = run_ring(ring(make_kernel), checks)
        np.testing.assert_array_equal(y, 2 * x)


def test_a_producer_that_does_not_wait_for_empty_buffers_is_caught(make_kernel):
    # the next load of a stage is not even announced before the bytes of the last
    with pytest.raises(SimulationError, match=r"arrives too often|still filling|nothing orders"):
        run_ring(ring(make_kernel, waits_for_empty=False))


def test_a_consumer_that_does_not_wait_for_full_buffers_is_caught(make_kernel):
    # it runs ahead of the producer, which then waits for a phase that is long over
    for checks in (None, QUIET):
        with pytest.raises(SimulationError, match=r"The kernel waits for ever: the barrier at"):
            run_ring(ring(make_kernel, waits_for_full=False), checks)


def test_a_consumer_that_gives_a_buffer_back_before_it_has_read_it_is_caught(make_kernel):
    with pytest.raises(SimulationError, match=r"Thread 0 writes .* that thread 1\d\d read"):
        run_ring(ring(make_kernel, drains_first=False))


# --- stores ---------------------------------------------------------------------------------------


def fill_own(m, count: int = 4) -> None:
    values = [m.cast([m.thread_index()], int32, uint32)[0]] * count
    m.store(own(m, stride=4 * count), values, uint32)


def fence(m) -> None:
    m.issue(tma.FENCE_ASYNC)


def commit(m, thread: int = 0) -> None:
    m.issue(tma.COMMIT_STORES, [], lane(m, thread))


def stored(start, thread: int = 0, is_waited: bool = True, **options):
    def emit(m):
        fill_own(m)
        fence(m)
        sync(m)
        store(m, start, thread=thread, **options)
        commit(m, thread)
        if is_waited:
            wait_stores(m, thread=thread)

    return emit


def test_a_store_that_begins_before_the_tensor_is_an_error(run_lanes):
    """A GPU raises an illegal instruction."""
    array = np.ones((4, 256), np.int32)
    maps = {HANDLE: map_of(array, (1, 64))}
    for start in ((-1, 0), (0, -4), (-9, 0), (0, -256)):
        with pytest.raises(SimulationError, match=r"A bulk store begins at .*, before its tensor"):
            run_lanes(stored(start), memory=[array], maps=maps)


def test_a_store_over_the_end_of_a_row_inside_16_bytes_is_our_error(run_lanes):
    """A GPU writes all of the last 16 bytes."""
    array = np.ones((4, 68), np.int32)[:, :65]
    maps = {HANDLE: map_of(array, (1, 64))}
    run_lanes(stored((2, 0)), memory=[array], maps=maps)
    with pytest.raises(AssertionError, match="rows of 65 elements end inside 16 bytes"):
        run_lanes(stored((2, 64)), memory=[array], maps=maps)


@pytest.mark.parametrize("start", [0, 100, 300, 400, 500])
@pytest.mark.parametrize("is_waited", [True, False])
def test_a_store_is_clipped_and_done_at_the_latest_when_the_kernel_ends(
    start, is_waited, run_lanes
):
    guarded = np.full(400 + 64, -1, np.int32)
    array = guarded[32:-32]
    maps = {HANDLE: map_of(array, (256,))}
    run_lanes(stored((start,), 3, is_waited), memory=[guarded], maps=maps, ends=True)
    expected = np.full(1200, -1, np.int32)
    expected[400 + start : 656 + start] = np.arange(256) // 4
    np.testing.assert_array_equal(array, expected[400:800])
    assert (guarded[:32] == -1).all() and (guarded[-32:] == -1).all()


def test_a_store_of_a_swizzled_box_undoes_the_swizzle(run_lanes):
    array = np.zeros((8, 64), np.uint16)
    copy = np.arange(512, dtype=np.uint16).reshape(8, 64)
    maps = {HANDLE: map_of(array, (8, 64), 128), 2 * HANDLE: map_of(copy, (8, 64), 128)}

    def emit(m):
        init(m)
        sync(m)
        expect(m, 1024)
        load(m, (0, 0), handle=2 * HANDLE)
        wait(m)
        store(m, (0, 0))  # what came by itself needs no fence
        commit(m)

    run_lanes(emit, memory=[array, copy], maps=maps, ends=True)
    np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("kind", ["int32", "uint32", "float32", "float64", "bfloat16", "float16"])
def test_a_store_may_add(kind, run_lanes):
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    count = 1024 // dtype.itemsize
    array = np.arange(128).astype(dtype)
    maps = {HANDLE: map_of(array, (128,), kind=kind)}
    words = np.full(count, 3).astype(dtype).view(np.uint32)
    outside = 16 // dtype.itemsize

    def emit(m):
        m.store(own(m, stride=16), [m.const(int(w), uint32) for w in words[:4]], uint32)
        fence(m)
        sync(m)
        for thread in (0, 33):  # the order of additions does not matter
            store(m, (outside,), add=True, thread=thread)
            commit(m, thread)

    run_lanes(emit, memory=[array], maps=maps, ends=True)
    expected = np.arange(128) + 6
    expected[:outside] -= 6
    np.testing.assert_array_equal(array.astype(np.float64), expected)


def test_an_addition_to_what_another_thread_wrote_needs_a_barrier(run_lanes):
    array = np.zeros(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, base, is_synced):
        fill_own(m)
        fence(m)
        sync(m)
        m.store(Address("global", base, None, 40, 4), [m.thread_index()], int32, lane(m, 5))
        if is_synced:
            sync(m)
        store(m, (0,), add=True)
        commit(m)
        wait_stores(m)

    address = np.array([array.ctypes.data], np.uint64)
    run_lanes(emit, address, True, memory=[array], maps=maps)
    assert array[10] == 5 + 10 // 4
    with pytest.raises(SimulationError, match="Thread 0 writes global memory that thread 5 wrote"):
        run_lanes(emit, address, False, memory=[array], maps=maps)


def test_bytes_and_halfwords_do_not_add(run_lanes):
    array = np.zeros(256, np.uint8)
    with pytest.raises(AssertionError, match="uint8 do not add"):
        run_lanes(stored((0,), add=True), memory=[array], maps={HANDLE: map_of(array, (256,))})


def test_the_source_is_read_late_and_may_be_overwritten_once_it_has_been_read(run_lanes):
    array = np.zeros(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, waits):
        stored((0,), is_waited=False)(m)
        if waits:
            wait_stores(m, read=True)
        sync(m)
        m.store(own(m, stride=16), [m.const(77, uint32)] * 4, uint32)

    run_lanes(emit, True, memory=[array], maps=maps, ends=True)
    np.testing.assert_array_equal(array, np.arange(256) // 4)
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, False, memory=[array], maps=maps)
    assert caught.value.headline == (
        "Thread 0 writes shared memory that a bulk store of thread 0 is still reading."
    )
    run_lanes(emit, False, memory=[array], maps=maps, checks=QUIET, ends=True)
    assert set(array.tolist()) == {77}


def test_others_may_overwrite_a_source_only_after_they_have_met_who_waited(run_lanes):
    array = np.zeros(256, np.int32)

    def emit(m):
        stored((0,), is_waited=False)(m)
        wait_stores(m, read=True)
        m.store(own(m, stride=16), [m.const(77, uint32)] * 4, uint32, lane(m, 9))

    with pytest.raises(SimulationError, match=r"Thread 9 writes .* thread 0 read, and nothing"):
        run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))})


def test_global_memory_is_written_by_the_wait_that_is_not_for_reading(run_lanes):
    array = np.full(256, -1, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, base, read):
        stored((0,), is_waited=False)(m)
        wait_stores(m, read=read)
        return m.load(Address("global", base, None, 4 * 200), int32, when=lane(m, 0))

    address = np.array([array.ctypes.data], np.uint64)
    assert run_lanes(emit, address, False, memory=[array], maps=maps)[0][0] == 50
    array[:] = -1
    with pytest.raises(SimulationError, match="asynchronous copy of thread 0 is still filling"):
        run_lanes(emit, address, True, memory=[array], maps=maps)
    assert run_lanes(emit, address, True, memory=[array], maps=maps, checks=QUIET)[0][0] == -1


def test_a_wait_leaves_the_newest_groups(run_lanes):
    array = np.full((3, 256), -1, np.int32)
    maps = {HANDLE: map_of(array, (1, 256))}

    def emit(m, base):
        fill_own(m)
        fence(m)
        sync(m)
        for row in range(3):
            store(m, (row, 0))
            commit(m)
        wait_stores(m, 1)
        return [
            m.load(Address("global", base, None, 1024 * row + 4 * 200), int32)[0]
            for row in range(3)
        ]

    address = np.array([array.ctypes.data], np.uint64)
    values = run_lanes(emit, address, memory=[array], maps=maps, checks=QUIET)
    assert [int(v[0]) for v in values] == [50, 50, -1]


def test_an_uncommitted_store_is_not_waited_for(run_lanes):
    array = np.full(256, -1, np.int32)

    def emit(m):
        fill_own(m)
        fence(m)
        sync(m)
        store(m, (0,))
        wait_stores(m)
        sync(m)
        fill_own(m)

    with pytest.raises(SimulationError, match="a bulk store of thread 0 is still reading"):
        run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))})


def test_ordinary_writes_need_a_fence_of_their_threads_and_a_barrier(run_lanes):
    array = np.zeros(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, fences, syncs):
        fill_own(m)
        if fences == "all":
            fence(m)
        if syncs:
            sync(m)
        if fences == "issuer":
            m.issue(tma.FENCE_ASYNC, [], lane(m, 0))
        store(m, (0,))
        commit(m)

    run_lanes(emit, "all", True, memory=[array], maps=maps, ends=True)
    with pytest.raises(SimulationError) as caught:
        run_lanes(emit, "none", True, memory=[array], maps=maps)
    assert caught.value.headline == (
        "A bulk store of thread 0 reads shared memory that thread 0 wrote without a "
        "fence.proxy.async after it."
    )
    assert caught.value.hint == (
        "Let each thread that writes execute a fence.proxy.async and then meet the reader at a "
        "barrier."
    )
    with pytest.raises(SimulationError, match=r"thread 1 wrote without a fence\.proxy\.async"):
        run_lanes(emit, "issuer", True, memory=[array], maps=maps)
    with pytest.raises(SimulationError, match="thread 1 wrote, and nothing orders the two"):
        run_lanes(emit, "all", False, memory=[array], maps=maps)


def test_a_write_after_the_fence_needs_another_one_and_a_fence_needs_the_barrier(run_lanes):
    array = np.zeros(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, is_late):
        fill_own(m)
        if is_late:
            sync(m)
        fence(m)
        if not is_late:
            sync(m)
            m.store(own(m), [m.const(5, int32)], int32, lane(m, 8))
            sync(m)
        store(m, (0,))

    with pytest.raises(SimulationError, match=r"thread 8 wrote without a fence\.proxy\.async"):
        run_lanes(emit, False, memory=[array], maps=maps)
    with pytest.raises(
        SimulationError, match=r"thread 1 wrote, and nothing orders it and the fence\.proxy\.async"
    ):
        run_lanes(emit, True, memory=[array], maps=maps)


def test_what_stmatrix_writes_needs_a_fence_too(run_lanes):
    array = np.zeros(256, np.int32)
    maps = {HANDLE: map_of(array, (256,))}

    def emit(m, is_fenced):
        address = m.address(own(m, stride=16))
        value = m.cast([m.thread_index()], int32, uint32)[0]
        m.issue(stmatrix(4), [address, *[value] * 4])
        if is_fenced:
            fence(m)
        sync(m)
        store(m, (0,))
        commit(m)

    run_lanes(emit, True, memory=[array], maps=maps, ends=True)
    rows = np.arange(32).reshape(8, 4)
    expected = [np.tile(rows + 32 * warp, (4, 1)) for warp in (0, 1)]
    np.testing.assert_array_equal(array, np.ravel(expected))
    with pytest.raises(SimulationError, match=r"thread 0 wrote without a fence\.proxy\.async"):
        run_lanes(emit, False, memory=[array], maps=maps)


def test_two_stores_to_one_place_are_an_error(run_lanes):
    array = np.zeros(256, np.int32)

    def emit(m):
        stored((0,), is_waited=False)(m)
        store(m, (252,))

    with pytest.raises(SimulationError, match="Thread 0 writes global memory that an asynchronous"):
        run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))})


def test_a_store_to_read_only_memory_is_an_error(run_lanes):
    array = np.zeros(256, np.int32)
    array.flags.writeable = False
    with pytest.raises(SimulationError, match="writes to array 0, which is read-only"):
        run_lanes(stored((0,)), memory=[array], maps={HANDLE: map_of(array, (256,))})


def test_prefetches_do_nothing(run_lanes):
    array = np.zeros(256, np.int32)

    def emit(m):
        m.issue(tma.PREFETCH_MAP, [m.const(HANDLE, uint64)])
        m.issue(tma.tma_prefetch(1), [m.const(HANDLE, uint64), m.const(0, int32)], lane(m, 0))

    run_lanes(emit, memory=[array], maps={HANDLE: map_of(array, (256,))}, ends=True)
