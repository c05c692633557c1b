"""How tiles are spread to be scanned: every element in its place, and neighbours side by side."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilejit.layout.reduction import LANES
from tilejit.layout.scan import Scanning, scanned

quick = settings(deadline=None, max_examples=40)
extents = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 100, 700])


@st.composite
def scans(draw):
    shape = tuple(draw(st.lists(extents, min_size=1, max_size=3)))
    while math.prod(shape) > 3000:
        shape = shape[1:]
    threads = draw(st.sampled_from([1, 32, 48, 96, 128, 256]))
    vector = draw(st.sampled_from([v for v in (1, 2, 4, 8) if shape[-1] % v == 0]))
    axis = draw(st.integers(0, len(shape) - 1))
    return shape, axis, threads, vector


def scan_by_hand(spread: Scanning, values: np.ndarray) -> np.ndarray:
    """(registers, threads): sums in the order of registers, lanes, rounds and parts."""
    layout = spread.layout
    threads = np.arange(layout.threads)
    rank = threads // spread.stride % spread.lanes
    lines: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    held = np.zeros((layout.registers, layout.threads))
    for r in range(layout.registers):
        line, place = spread.line(r)
        lines.setdefault(line, []).append((place, r))
        at = [np.broadcast_to(c, threads.shape) for c in layout.coordinates(threads, r)]
        inside = np.logical_and.reduce([a < n for a, n in zip(at, layout.shape, strict=True)])
        held[r] = np.where(inside, values[tuple(np.where(inside, a, 0) for a in at)], 0)
    totals = {}
    for line, members in lines.items():
        done = np.zeros(layout.threads)
        order = [r for _, r in sorted(members)]
        assert len(order) == spread.rounds * spread.run
        for first in range(0, len(order), spread.run):
            run = order[first : first + spread.run]
            held[run] = np.cumsum(held[run], 0)
            own = held[run[-1]].copy()
            others = [(threads - (rank - k) * spread.stride) for k in range(spread.lanes)]
            before = sum(np.where(k < rank, own[o], 0) for k, o in enumerate(others))
            held[run] += before + done
            done = done + sum(own[o] for o in others)
        totals[line] = done
    table: dict[tuple[int, ...], float] = {}
    where = spread.totals
    for r in range(where.registers):
        for t in range(where.threads):
            at = tuple(int(c) for c in where.coordinates(t, r))
            total = totals[where.register_part(r)[:-1]][t]
            assert table.setdefault(at, total) == total, "copies differ"
    for r in range(where.registers):
        for t in range(where.threads):
            *line, part = (int(c) for c in where.coordinates(t, r))
            before = sum(table[(*line, k)] for k in range(part))
            for _, own in lines[where.register_part(r)[:-1]]:
                held[own, t] += before
    return held


@quick
@given(scans())
def test_every_element_ends_with_the_sum_up_to_it(case):
    shape, axis, threads, _ = case
    spread = scanned(*case)
    layout = spread.layout
    values = np.random.default_rng(1).integers(-9, 9, shape).astype(float)
    want, held = values.cumsum(axis), scan_by_hand(spread, values)
    seen = set()
    for r in range(layout.registers):
        for t in range(threads):
            at = tuple(int(c) for c in layout.coordinates(t, r))
            if all(c < n for c, n in zip(at, shape, strict=True)):
                seen.add(at)
                assert held[r, t] == want[at], (at, spread)
    assert seen == set(np.ndindex(*shape))
    assert layout.shape == shape


@quick
@given(scans())
def test_lanes_that_trade_are_of_one_warp(case):
    spread = scanned(*case)
    assert spread.lanes == 1 or spread.stride * spread.lanes <= LANES
    assert spread.lanes == 1 or spread.layout.threads % LANES == 0
    assert spread.lanes & (spread.lanes - 1) == 0


@pytest.mark.parametrize(
    ("shape", "axis", "threads", "vector", "parts", "rounds", "lanes", "run"),
    [
        ((1, 128), 1, 128, 4, 1, 1, 32, 4),  # a warp's lanes hold a row of a chunk
        ((64,), 0, 128, 4, 1, 1, 32, 2),
        ((4096,), 0, 256, 4, 8, 4, 32, 4),  # warps share what would be many registers
        ((64, 128), 0, 128, 4, 4, 1, 1, 16),  # columns: neighbours are other columns
        ((64, 256), 0, 64, 4, 1, 1, 1, 64),  # as many columns as threads hold: nothing is traded
        ((64, 16), 0, 128, 4, 4, 1, 2, 8),
        ((64, 16), 0, 32, 4, 1, 1, 8, 8),
        ((4, 1000), 1, 128, 4, 1, 8, 32, 4),  # a warp a row
    ],
)
def test_tiles_are_spread_as_one_would(shape, axis, threads, vector, parts, rounds, lanes, run):
    found = scanned(shape, axis, threads, vector)
    assert (found.parts, found.rounds, found.lanes, found.run) == (parts, rounds, lanes, run)
