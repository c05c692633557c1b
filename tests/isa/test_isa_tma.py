"""Tensor maps and boxes: what the hardware refuses, and where bytes go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tilejit import dtypes
from tilejit.isa import cluster, mbarrier, tma
from tilejit.isa.tma import Box, TensorMap, round_to_tf32, swizzled
from tilejit.layout.shared import SharedLayout
from tilejit.target import TARGETS

GOOD = TensorMap(
    address=4096, itemsize=2, shape=(100, 200), strides=(416, 2), box=(64, 64), swizzle=128,
    kind="bfloat16",
)  # fmt: skip


def test_a_legal_map_has_no_problem():
    assert GOOD.problem() == ""
    assert GOOD.row_bytes == 128 and GOOD.box_bytes == 8192
    assert replace(GOOD, strides=(0, 2)).problem() == ""
    single = {"shape": (1 << 32,), "strides": (4,), "box": (256,), "swizzle": 0, "itemsize": 4}
    assert replace(GOOD, kind="tfloat32", rounds=True, **single).problem() == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shape": (), "strides": (), "box": ()}, "it has 0 dimensions, not 1 to 5"),
        ({"shape": (1,) * 6, "strides": (16,) * 6, "box": (1,) * 6}, "it has 6 dimensions"),
        ({"box": (64,)}, "its shape, strides and box differ in length"),
        ({"itemsize": 4, "strides": (416, 4)}, "no element type 'bfloat16' has 4 bytes"),
        ({"kind": "int4"}, "no element type 'int4' has 2 bytes"),
        ({"rounds": True}, "elements of type 'bfloat16' are not rounded"),
        ({"address": 4104}, "its address is no multiple of 16"),
        ({"strides": (416, 4)}, "its last dimension is not contiguous"),
        ({"strides": (408, 2)}, "a stride is 408 bytes, no multiple of 16 below 2**40"),
        ({"strides": (1 << 40, 2)}, "no multiple of 16 below 2**40"),
        ({"strides": (-416, 2)}, "a stride is -416 bytes"),
        ({"shape": (0, 200)}, "an extent is 0, not 1 to 2**32"),
        ({"shape": (100, (1 << 32) + 1)}, "not 1 to 2**32"),
        ({"box": (257, 64)}, "the box has 257 elements along a dimension, not 1 to 256"),
        ({"box": (0, 64)}, "the box has 0 elements"),
        ({"swizzle": 16}, "there is no swizzle of 16 bytes"),
        ({"box": (64, 60)}, "the box's rows have 120 bytes, no multiple of 16"),
        ({"box": (64, 128)}, "the box's rows have 256 bytes, more than the swizzle's span"),
    ],
)
def test_a_map_that_the_hardware_refuses_says_why(change, problem):
    assert problem in replace(GOOD, **change).problem()


@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_a_box_lies_in_shared_memory_as_a_layout_with_that_swizzle(span):
    columns = (span or 64) // 2
    box = Box(replace(GOOD, box=(32, columns), swizzle=span), (0, 0))
    layout = SharedLayout((32, columns), 2, swizzle=max(span // 16, 1))
    places = box.chunks(2048)[:, None] + np.arange(0, 16, 2)
    assert np.array_equal(places.reshape(32, columns), 2048 + layout.table())


def test_the_address_decides_about_the_swizzle():
    addresses = np.arange(0, 4096, 16)
    for span in (0, 32, 64, 128):
        moved = swizzled(addresses, span)
        assert sorted(moved.tolist()) == addresses.tolist()
        assert np.array_equal(swizzled(moved, span), addresses)
        assert np.array_equal(moved // max(span, 16), addresses // max(span, 16))
    assert swizzled(np.array([0x390]), 128).tolist() == [0x390 ^ 7 << 4]
    assert swizzled(np.array([0x390]), 64).tolist() == [0x390 ^ 3 << 4]
    assert swizzled(np.array([0x390]), 32).tolist() == [0x390 ^ 1 << 4]


@pytest.mark.parametrize(
    ("start", "outer", "inner"),
    [
        (0, slice(0, 64), slice(0, 64)),
        (-10, slice(0, 54), slice(10, 64)),
        (90, slice(90, 100), slice(0, 10)),
        (-64, slice(0, 0), slice(0, 0)),
        (100, slice(100, 100), slice(0, 0)),
        (2**31 - 1, slice(100, 100), slice(0, 0)),
    ],
)
def test_a_box_meets_its_tensor_where_both_are(start, outer, inner):
    assert Box(GOOD, (start, 0)).meets() == ((outer, slice(0, 64)), (inner, slice(0, 64)))


def test_rounding_to_tf32_goes_to_the_nearest_even_and_keeps_infinities_and_nans():
    step = 2.0**-10
    values = [1 + step / 2, 1 + 3 * step / 2, -1 - step * 0.51, 2 - step / 4, 3.5, np.inf, -np.inf]
    rounded = round_to_tf32(np.array(values, np.float32)).tolist()
    assert rounded == [1, 1 + 2 * step, -1 - step, 2, 3.5, np.inf, -np.inf]
    nan = np.array([0x7F800001, 0x7FFFFFFF], np.uint32)
    assert round_to_tf32(nan.view(np.float32)).view(np.uint32).tolist() == nan.tolist()


def test_eviction_policies_are_the_64_bit_constants():
    assert tma.EVICTION_POLICY == {
        "evict_normal": 1 << 60, "evict_first": 0x12F << 52, "evict_last": 0x14F << 52
    }  # fmt: skip


def test_coordinates_are_written_innermost_first():
    assert "[$a0, {$a3, $a2, $a1}], [$a5], $a6, $a7;" in tma.tma_load(3, True, True).ptx
    assert tma.tma_load(3, True, True).inputs[-2:] == (dtypes.uint16, dtypes.uint64)
    assert tma.tma_store(2).ptx.endswith("[$a0, {$a2, $a1}], [$a3];")
    with pytest.raises(AssertionError, match="rank 6"):
        tma.tma_load(6)


class TestCalls:
    """What the records ask of their lanes."""

    @pytest.fixture
    def lanes(self, make_lanes):
        lanes = make_lanes(32)
        lanes.active[:] = np.arange(32) == 3
        lanes.tensor_map = lambda handle: {77: GOOD}[handle]
        return lanes

    @pytest.fixture
    def place(self):
        ramp = np.arange(32)
        return [
            np.where(ramp == 3, 77, 0).astype(np.uint64),
            ramp.astype(np.int32) - 10,
            ramp.astype(np.int32) * 8,
            (ramp * 128).astype(np.uint32),
        ]

    def test_a_load_is_the_active_lanes(self, lanes, place):
        barrier = np.full(32, 8, np.uint32)
        tma.tma_load(2).meaning(lanes, [*place, barrier])
        mask = np.full(32, 5, np.uint16)
        policy = np.zeros(32, np.uint64)
        tma.tma_load(2, multicast=True, hint=True).meaning(lanes, [*place, barrier, mask, policy])
        box = Box(GOOD, (-7, 24))
        assert lanes.calls == [("load_box", 3, box, 384, 8, None), ("load_box", 3, box, 384, 8, 5)]

    def test_a_store_is_the_active_lanes(self, lanes, place):
        tma.tma_store(2).meaning(lanes, place)
        tma.tma_reduce_add(2).meaning(lanes, place)
        box = Box(GOOD, (-7, 24))
        assert lanes.calls == [
            ("store_box", 3, box, 384, False), ("store_box", 3, box, 384, True)
        ]  # fmt: skip

    @pytest.mark.parametrize("column", [1, 4, -4, 12, 99])
    def test_a_box_that_begins_inside_16_bytes_of_a_row_is_our_error(self, lanes, place, column):
        place[2][:] = column
        barrier = np.full(32, 8, np.uint32)
        for one in (tma.tma_load(2), tma.tma_store(2), tma.tma_reduce_add(2)):
            inputs = [*place, barrier] if one is tma.tma_load(2) else place
            with pytest.raises(AssertionError, match=f"begins at element {column} of a row, which"):
                one.meaning(lanes, inputs)
        assert lanes.calls == []

    def test_waits_commits_and_fences_are_passed_on(self, lanes):
        for one in (tma.COMMIT_STORES, tma.wait_stores(2, True), tma.FENCE_ASYNC):
            one.meaning(lanes, [])
        assert lanes.calls == [("commit_stores",), ("wait_stores", 2, True), ("fence_async",)]

    def test_barriers_announce_bytes_before_they_arrive(self, lanes):
        address, size = np.full(32, 64, np.uint32), np.full(32, 512, np.uint32)
        mbarrier.ARRIVE_EXPECT.meaning(lanes, [address, size])
        mbarrier.EXPECT.meaning(lanes, [address, size])
        assert lanes.calls == [
            ("mbarrier_expect", address, size),
            ("mbarrier_arrive", address),
            ("mbarrier_expect", address, size),
        ]

    def test_an_arrival_in_the_cluster_is_at_the_mapped_address(self, lanes):
        address, rank = np.full(32, 64, np.uint32), np.full(32, 2, np.uint32)
        mbarrier.ARRIVE_CLUSTER.meaning(lanes, [address, rank])
        ((name, mapped),) = lanes.calls
        assert name == "mbarrier_arrive" and set(mapped.tolist()) == {64 | 2 << 24}

    def test_the_clusters_barrier_releases_unless_relaxed(self, lanes):
        for one in (cluster.CLUSTER_ARRIVE, cluster.CLUSTER_ARRIVE_RELAXED, cluster.CLUSTER_WAIT):
            one.meaning(lanes, [])
        assert lanes.calls == [("cluster_arrive", True), ("cluster_arrive", False),
                               ("cluster_wait",)]  # fmt: skip


def test_a_wait_for_the_cluster_acquires_from_it():
    wait = mbarrier.wait_parity(TARGETS["sm_90a"], cluster=True)
    assert wait is mbarrier.TRY_WAIT_CLUSTER and ".acquire.cluster." in wait.ptx
    assert mbarrier.wait_parity(TARGETS["sm_90a"]) is mbarrier.TRY_WAIT
