"""Reductions of fragment maps: which threads trade, and where results are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilejit.dtypes import float16, float32
from tilejit.isa.mma import find_mma, tile_acc
from tilejit.layout.fragment import FragmentLayout, blocked, register, replicated, thread
from tilejit.layout.reduction import Reduction, shared_out, spread
from tilejit.target import TARGETS

quick = settings(deadline=None, max_examples=25)
extents = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 100])


@st.composite
def spreads(draw):
    shape = tuple(draw(st.lists(extents, min_size=1, max_size=3)))
    while math.prod(shape) > 1000:
        shape = shape[1:]
    threads = draw(st.sampled_from([1, 32, 48, 96, 128]))
    vector = draw(st.sampled_from([v for v in (1, 2, 4) if shape[-1] % v == 0]))
    axis = draw(st.integers(0, len(shape) - 1))
    return spread(shape, threads, vector, axis, 4), axis


def reduce_by_hand(reduction: Reduction, values: np.ndarray) -> np.ndarray:
    """(threads, registers of the result): sums in the order of the digits."""
    layout = reduction.source
    lanes = np.arange(layout.threads)
    kept = reduction.result
    number = {kept.register_part(r): r for r in range(kept.registers)}
    sums = np.zeros((layout.threads, kept.registers))
    for r in range(layout.registers):
        at = [np.broadcast_to(c, lanes.shape) for c in layout.coordinates(lanes, r)]
        inside = np.logical_and.reduce([a < n for a, n in zip(at, layout.shape, strict=True)])
        found = values[tuple(np.where(inside, a, 0) for a in at)]
        mine = number[reduction.result_part(layout.register_part(r))]
        sums[:, mine] += np.where(inside, found, 0)
    for step in reduction.steps:
        sums = sums + sums[lanes ^ step]
    parts = reduction.partials
    table: dict[tuple[int, ...], float] = {}
    for r in range(parts.registers):
        for t in range(parts.threads):
            place = tuple(int(c) for c in parts.coordinates(t, r))
            assert table.setdefault(place, sums[t, r]) == sums[t, r], "copies differ"
    for r in range(parts.registers):
        for t in range(parts.threads):
            place = tuple(int(c) for c in parts.coordinates(t, r))[:-1]
            sums[t, r] = sum(table[*place, g] for g in range(reduction.groups))
    return sums


def check(layout: FragmentLayout, axis: int) -> None:
    values = np.random.default_rng(1).integers(-9, 9, layout.shape).astype(float)
    for keeps in (False, True):
        reduction = Reduction(layout, axis, keeps)
        want = values.sum(axis, keepdims=keeps)
        sums, kept = reduce_by_hand(reduction, values), reduction.result
        assert kept.shape == want.shape
        for t, r in itertools.product(range(kept.threads), range(kept.registers)):
            place = tuple(int(c) for c in kept.coordinates(t, r))
            if all(c < n for c, n in zip(place, kept.shape, strict=True)):
                assert sums[t, r] == want[place]


@quick
@given(spreads())
def test_every_thread_ends_with_the_sums_of_its_elements(case):
    check(*case)


@quick
@given(spreads())
def test_tile_that_is_reduced_is_spread_dimension_by_dimension(case):
    layout, _ = case
    assert not layout.flat
    places = set()
    for r in range(layout.registers):
        at = layout.coordinates(np.arange(layout.threads), r)
        places |= set(zip(*(np.broadcast_to(c, layout.threads).tolist() for c in at), strict=True))
    assert set(np.ndindex(layout.shape)) <= places


@pytest.mark.parametrize(
    "layout",
    [
        replicated((4, 6), 32),
        blocked((64, 32), 128, 4),
        FragmentLayout(
            (48, 8), ((thread(24, 4), register(2, 1)), (thread(4, 1), register(2, 2))), 96
        ),
        FragmentLayout((64, 4), ((thread(64, 2),), (register(2, 1), thread(2, 1))), 256),
    ],
    ids=str,
)
def test_any_layout_is_reduced_along_both_axes(layout):
    check(layout, 0)
    check(layout, 1)


def test_accumulator_of_matrix_instructions_is_reduced_by_quads_and_by_columns():
    (mma, *_) = find_mma(float16, float16, float32, TARGETS["sm_80"])
    layout = tile_acc(mma, 64, 32, 4, 1)
    rows, columns = Reduction(layout, 1), Reduction(layout, 0)
    assert (rows.registers, rows.steps, rows.groups) == (8, (1, 2), 1)
    assert rows.result.replicas == 4
    assert (columns.registers, columns.steps, columns.groups) == (2, (4, 8, 16), 4)
    assert columns.is_by_warps
    check(layout, 0)
    check(layout, 1)


def test_row_of_a_tile_stays_in_a_warp_where_there_are_rows_enough():
    assert Reduction(spread((4, 1024), 128, 4, 1, 4), 1).groups == 1
    assert Reduction(spread((64, 256), 128, 8, 1, 2), 1).groups == 1
    assert Reduction(spread((1, 4096), 128, 4, 1, 4), 1).groups == 4


@quick
@given(spreads())
def test_lanes_share_out_what_they_both_hold(drawn):
    layout, axis = drawn
    reduction = Reduction(layout, axis)
    held = reduction.partials
    lanes = np.arange(layout.threads)
    for step in reduction.steps:
        fewer = shared_out(held, step)
        if fewer is None:
            assert held.registers == 1 or any(
                d.stride == 1 and d.size % 2 for dim in held.dims for d in dim if d.size > 1
            )
            continue
        assert fewer.registers * 2 == held.registers
        is_odd = (lanes & step) != 0
        for r in range(fewer.registers):
            even, odd, mine = (
                [np.broadcast_to(c, lanes.shape) for c in which.coordinates(lanes, number)]
                for which, number in ((held, 2 * r), (held, 2 * r + 1), (fewer, r))
            )
            for a, b, c in zip(even, odd, mine, strict=True):
                assert (c == np.where(is_odd, b, a)).all()
        held = fewer


def test_threes_of_registers_are_not_shared_out():
    layout = FragmentLayout((3,), ((register(3, 1),),), 32)
    assert shared_out(layout, 4) is None
    pairs = FragmentLayout((3, 2), ((register(3, 2),), (register(2, 1),)), 32)
    fewer = FragmentLayout((3, 2), ((register(3, 1),), (thread(2, 4),)), 32)
    assert shared_out(pairs, 4) == fewer
