"""ldmatrix, cp.async, barriers and mbarriers: what they do to memory and whom they call."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit import dtypes
from tilejit.isa import barrier, cp_async, launch, mbarrier
from tilejit.isa.ldmatrix import ldmatrix
from tilejit.isa.mma import MMA, fragment_a, fragment_b
from tilejit.isa.stmatrix import stmatrix
from tilejit.target import TARGETS


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_lane_l_the_pair_at_row_l_div_4(count, make_lanes):
    lanes = make_lanes(64)
    lanes.shared.view(np.uint16)[:] = np.arange(len(lanes.shared) // 2)
    address = np.full(64, 1 << 30, np.uint32)  # ignored beyond the rows in use
    rows = np.random.default_rng(0).permutation(64)[: 16 * count].reshape(2, -1) * 16
    for warp in (0, 1):
        address[32 * warp : 32 * warp + 8 * count] = rows[warp]
    outputs = ldmatrix(count).meaning(lanes, [address])
    assert len(outputs) == count
    for matrix in range(count):
        for lane in range(64):
            start = rows[lane // 32][8 * matrix + lane % 32 // 4] // 2 + 2 * (lane % 4)
            assert outputs[matrix][lane] == start | (start + 1) << 16


@pytest.mark.parametrize("count", [1, 2, 4])
def test_transposed_ldmatrix_gives_lane_l_the_pair_at_column_l_div_4(count, make_lanes):
    lanes = make_lanes(32)
    lanes.shared.view(np.uint16)[:] = np.arange(len(lanes.shared) // 2)
    address = np.arange(32, dtype=np.uint32)[::-1] * 16
    outputs = ldmatrix(count, True).meaning(lanes, [address])
    for matrix in range(count):
        for lane in range(32):
            first = address[8 * matrix + 2 * (lane % 4)] // 2 + lane // 4
            second = address[8 * matrix + 2 * (lane % 4) + 1] // 2 + lane // 4
            assert outputs[matrix][lane] == first | second << 16


def test_ldmatrix_rows_are_the_fragments_of_mma(make_lanes):
    lanes = make_lanes(32)
    a = np.arange(256, dtype=np.uint16).reshape(16, 16)
    b = np.arange(1000, 1128, dtype=np.uint16).reshape(16, 8)  # (k, n): loaded transposed
    lanes.shared[:512] = a.view(np.uint8).ravel()
    lanes.shared[512:768] = b.view(np.uint8).ravel()
    lane = np.arange(32, dtype=np.uint32)
    for layout, matrix, loaded in (
        (fragment_a(MMA[0]), a, ldmatrix(4).meaning(lanes, [lane % 16 * 32 + lane // 16 * 16])),
        (fragment_b(MMA[0]), b, ldmatrix(2, True).meaning(lanes, [512 + lane % 16 * 16])),
    ):
        elements = np.ascontiguousarray(np.stack(loaded, axis=1)).view(np.uint16)
        for register in range(layout.registers):
            expected = matrix[layout.coordinates(np.arange(32), register)]
            assert np.array_equal(elements[:, register], expected)


def test_ldmatrix_of_a_misaligned_row_is_our_error(make_lanes):
    with pytest.raises(AssertionError, match="not 16-byte aligned"):
        ldmatrix(1).meaning(make_lanes(32), [np.full(32, 8, np.uint32)])


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_is_the_inverse_of_ldmatrix(count, transposed, make_lanes):
    lanes = make_lanes(64)
    rng = np.random.default_rng(count)
    lanes.shared[:] = rng.integers(0, 256, len(lanes.shared))
    before = lanes.shared.copy()
    address = np.full(64, 1 << 30, np.uint32)  # ignored beyond the rows in use
    rows = rng.permutation(64)[: 16 * count].reshape(2, -1) * 16
    for warp in (0, 1):
        address[32 * warp : 32 * warp + 8 * count] = rows[warp]
    words = ldmatrix(count, transposed).meaning(lanes, [address])
    lanes.shared[:] = 0
    assert stmatrix(count, transposed).meaning(lanes, [address, *words]) == ()
    places = (rows.ravel()[:, None] + np.arange(16)).ravel()
    assert np.array_equal(lanes.shared[places], before[places])
    lanes.shared[places] = 0
    assert not lanes.shared.any()


def test_stmatrix_stores_its_warp_or_nothing_at_16_byte_rows(make_lanes):
    lanes = make_lanes(64)
    lanes.active[32:] = False
    lane = np.arange(64, dtype=np.uint32)
    stmatrix(1).meaning(lanes, [lane * 16, lane + 1])
    assert lanes.shared[:128].view(np.uint32).tolist() == list(range(1, 33))
    assert not lanes.shared[128:].any()
    lanes.active[5] = False
    with pytest.raises(AssertionError, match="only part of a warp"):
        stmatrix(1).meaning(lanes, [lane * 16, lane])
    lanes.active[5] = True
    with pytest.raises(AssertionError, match="not 16-byte aligned"):
        stmatrix(1).meaning(lanes, [lane * 8, lane])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_copies_the_valid_bytes_and_zeros_the_rest(size, make_lanes):
    lanes = make_lanes(32)
    rng = np.random.default_rng(1)
    lanes.memory[:] = rng.integers(1, 256, len(lanes.memory))
    lanes.shared[:] = 255
    lane = np.arange(32)
    valid = (lane % (size + 1)).astype(np.uint32)
    lanes.active[5] = False
    one = cp_async.cp_async(size)
    shared, source = (lane * 32).astype(np.uint32), (lanes.BASE + lane * size).astype(np.uint64)
    assert one.meaning(lanes, [shared, source, valid]) == ()
    for i in lane:
        piece = lanes.shared[i * 32 : i * 32 + 32]
        count = 0 if i == 5 else size
        expected = np.full(32, 255, np.uint8)
        expected[:count] = 0
        if count:
            expected[: valid[i]] = lanes.memory[i * size : i * size + valid[i]]
        assert np.array_equal(piece, expected)


def test_cp_async_bypasses_l1_only_for_16_bytes():
    assert cp_async.cp_async(16).name == "cp.async.cg.16"
    assert cp_async.cp_async(16, is_cached=True).name == "cp.async.ca.16"
    assert cp_async.cp_async(8).name == "cp.async.ca.8"
    with pytest.raises(AssertionError, match="4, 8 or 16 bytes, not 2"):
        cp_async.cp_async(2)


def test_cp_async_of_more_valid_bytes_than_its_size_is_our_error(make_lanes):
    inputs = [np.zeros(32, np.uint32), np.full(32, 4096, np.uint64), np.full(32, 9, np.uint32)]
    with pytest.raises(AssertionError, match="reads more than 8 bytes"):
        cp_async.cp_async(8).meaning(make_lanes(32), inputs)


def test_records_with_a_constant_are_made_once():
    assert cp_async.wait_group(2) is cp_async.wait_group(2)
    assert barrier.bar_sync(1, 64) is barrier.bar_sync(1, 64)
    assert cp_async.wait_group(2).ptx == "cp.async.wait_group 2;"


@pytest.mark.parametrize(
    ("instruction", "calls"),
    [
        (cp_async.COMMIT_GROUP, [("commit_async",)]),
        (cp_async.wait_group(3), [("wait_async", 3)]),
        (cp_async.WAIT_ALL, [("commit_async",), ("wait_async", 0)]),
        (barrier.bar_sync(0, 100), [("sync_block", 0, 100)]),
        (barrier.bar_sync(2, 64), [("sync_block", 2, 64)]),
        (barrier.bar_arrive(2, 64), [("arrive_block", 2, 64)]),
        (barrier.SYNC_WARP, [("sync_warp",)]),
        (barrier.FENCE_BLOCK, []),
        (barrier.FENCE_DEVICE, []),
        (launch.GRID_DEPENDENCY_WAIT, []),
        (launch.GRID_DEPENDENCY_LAUNCH, []),
        (mbarrier.FENCE_INIT, [("mbarrier_fence",)]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_synchronising_instruction_asks_its_lanes(instruction, calls, make_lanes):
    lanes = make_lanes(32)
    assert instruction.meaning(lanes, []) == ()
    assert lanes.calls == calls
    assert instruction.has_effect


def test_mbarrier_instructions_pass_address_count_and_parity(make_lanes):
    lanes = make_lanes(32)
    address, number = np.full(32, 64, np.uint32), np.ones(32, np.uint32)
    mbarrier.INIT.meaning(lanes, [address, number])
    mbarrier.ARRIVE.meaning(lanes, [address])
    mbarrier.TEST_WAIT.meaning(lanes, [address, number])
    mbarrier.TRY_WAIT.meaning(lanes, [address, number])
    wait = ("mbarrier_wait", address, number)
    assert lanes.calls == [
        ("mbarrier_init", address, number), ("mbarrier_arrive", address), wait, wait
    ]  # fmt: skip


def test_bar_sync_of_part_of_a_block_counts_whole_warps():
    assert barrier.bar_sync(0, 100).ptx == "bar.sync 0;"
    assert barrier.bar_sync(3, 96).ptx == "bar.sync 3, 96;"
    with pytest.raises(AssertionError, match="100 threads are no whole warps"):
        barrier.bar_sync(3, 100)
    with pytest.raises(AssertionError, match="no hardware barrier 16"):
        barrier.bar_sync(16, 32)


def test_wait_parity_sleeps_only_where_the_target_can():
    assert mbarrier.wait_parity(TARGETS["sm_89"]) is mbarrier.TEST_WAIT
    assert mbarrier.wait_parity(TARGETS["sm_90"]) is mbarrier.TRY_WAIT
    assert mbarrier.wait_parity(TARGETS["sm_120a"]) is mbarrier.TRY_WAIT
    assert mbarrier.INIT.inputs == (dtypes.uint32, dtypes.uint32)
