"""Fragment maps: each element once a replica, vectors, projections, conversions."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilejit.layout.fragment import (
    Digit,
    FragmentLayout,
    blocked,
    register,
    replicated,
    thread,
)

quick = settings(deadline=None, max_examples=60)

extents = st.sampled_from([1, 2, 3, 5, 7, 8, 12, 16, 17, 24, 32, 48, 64, 100, 128])
block_sizes = st.sampled_from([1, 32, 37, 64, 96, 100, 128, 160, 256, 384])


@st.composite
def blocked_cases(draw):
    shape = tuple(draw(st.lists(extents, min_size=1, max_size=3)))
    while math.prod(shape) > 8192:
        shape = shape[1:]
    vector = draw(st.sampled_from([v for v in (1, 2, 3, 4, 8) if shape[-1] % v == 0]))
    return shape, draw(block_sizes), vector


@st.composite
def digit_layouts(draw):
    """Random even layouts: the factors of random extents dealt to threads and registers."""
    dims, threads, registers = [], 1, 1
    order: list[tuple[int, int, int, str]] = []  # (random rank, dim, position, place)
    sizes = draw(st.lists(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=3), min_size=1,
                          max_size=3))  # fmt: skip
    for axis, factors in enumerate(sizes):
        dims.append([Digit(size, "register", 1) for size in factors])
        for position in range(len(factors)):
            place = draw(st.sampled_from(["thread", "register"]))
            order.append((draw(st.integers(0, 99)), axis, position, place))
    for _, axis, position, place in sorted(order):
        size = dims[axis][position].size
        stride = threads if place == "thread" else registers
        dims[axis][position] = Digit(size, place, stride)
        if place == "thread":
            if draw(st.booleans()):  # a gap: copies
                threads *= 2
                dims[axis][position] = Digit(size, place, threads)
            threads *= size
        else:
            registers *= size
    shape = tuple(math.prod(factors) for factors in sizes)
    return FragmentLayout(shape, tuple(map(tuple, dims)), threads * draw(st.sampled_from([1, 3])))


def all_coordinates(layout, index):
    """(threads, rank) coordinates of one register."""
    threads = np.arange(layout.threads)
    columns = [np.broadcast_to(c, threads.shape) for c in layout.coordinates(threads, index)]
    return np.array(columns, int).reshape(len(columns), layout.threads).T


def element_places(layout):
    """Which thread holds each element in which register."""
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for index in range(layout.registers):
        coordinates = all_coordinates(layout, index)
        assert (coordinates >= 0).all()
        for t in np.nonzero((coordinates < layout.shape).all(axis=1))[0].tolist():
            places.setdefault(tuple(coordinates[t].tolist()), []).append((t, index))
    return places


def assert_covers_once(layout):
    places = element_places(layout)
    assert set(places) == set(np.ndindex(layout.shape))
    assert {len(held) for held in places.values()} == {layout.replicas}
    assert all(len({t for t, _ in held}) == len(held) for held in places.values())


@quick
@given(blocked_cases())
def test_blocked_holds_each_element_once_a_replica(case):
    assert_covers_once(blocked(*case))


@quick
@given(blocked_cases())
def test_blocked_shares_the_work_evenly(case):
    shape, threads, vector = case
    layout = blocked(shape, threads, vector)
    vectors = math.prod(shape) // vector
    assert layout.registers == -(-vectors // threads) * vector
    assert layout.threads == threads and layout.shape == shape


@quick
@given(blocked_cases())
def test_blocked_gives_consecutive_threads_consecutive_vectors(case):
    shape, threads, vector = case
    layout = blocked(shape, threads, vector)
    active = min(threads, layout.holders, math.prod(shape) // vector)
    lanes = np.arange(active)
    where = [np.broadcast_to(c, lanes.shape) for c in layout.coordinates(lanes, 0)]
    flat = np.ravel_multi_index(where, shape)
    run = min(active, max(1, shape[-1] // vector))
    assert (np.diff(flat[:run]) == vector).all()


@quick
@given(st.one_of(blocked_cases().map(lambda case: blocked(*case)), digit_layouts()))
def test_vector_registers_hold_consecutive_elements_all_or_none_of_them_real(layout):
    vector = layout.vector
    assert layout.registers % vector == 0
    for start in range(0, layout.registers, vector):
        first = all_coordinates(layout, start)
        is_real = (first < layout.shape).all(axis=1)
        for step in range(1, vector):
            other = all_coordinates(layout, start + step)
            assert np.array_equal(first[:, :-1], other[:, :-1])
            assert np.array_equal(first[:, -1] + step, other[:, -1])
            assert np.array_equal(is_real, (other < layout.shape).all(axis=1))


@quick
@given(blocked_cases())
def test_blocked_keeps_the_vector_it_was_asked_for(case):
    assert blocked(*case).vector % case[2] == 0


def test_a_padded_vector_is_cut_to_what_divides_the_row():
    layout = FragmentLayout((14,), ((thread(4, 1), register(4, 1)),), 4)
    assert layout.is_padded
    assert layout.vector == 2


def test_a_flat_layout_does_not_claim_vectors_across_rows():
    layout = FragmentLayout((3, 6), ((thread(5, 1), register(4, 1)),), 5, flat=True)
    assert layout.vector == 2
    assert_covers_once(layout)


@quick
@given(digit_layouts())
def test_digit_layouts_hold_each_element_once_a_replica(layout):
    assert_covers_once(layout)


@quick
@given(digit_layouts())
def test_replica_digits_tell_copies_apart(layout):
    assert math.prod(d.size for d in layout.replica_digits) == layout.replicas
    for held in element_places(layout).values():
        marks = {tuple((t // d.stride) % d.size for d in layout.replica_digits) for t, _ in held}
        assert len(marks) == len(held)


@quick
@given(digit_layouts(), st.randoms(use_true_random=False))
def test_project_keeps_each_element_with_threads_that_held_its_row(layout, random):
    rank = len(layout.shape)
    keep = random.sample(range(rank), random.randint(1, rank))
    projected = layout.project(keep)
    assert projected.shape == tuple(layout.shape[d] for d in keep)
    assert_covers_once(projected)
    dropped = [d for d in range(rank) if d not in keep]
    holders: dict[tuple[int, ...], set[int]] = {}
    for element, held in element_places(layout).items():
        if all(element[d] == 0 for d in dropped):
            holders[tuple(element[d] for d in keep)] = {t for t, _ in held}
    for element, held in element_places(projected).items():
        assert holders[element] <= {t for t, _ in held}


@quick
@given(digit_layouts(), st.randoms(use_true_random=False))
def test_layouts_that_differ_in_register_numbers_have_the_same_places(layout, random):
    registers = [d for dim in layout.dims for d in dim if d.place == "register"]
    random.shuffle(registers)
    fresh, position = {}, 1
    for digit in registers:
        fresh[id(digit)] = position
        position *= digit.size
    other = FragmentLayout(
        layout.shape,
        tuple(
            tuple(register(d.size, fresh[id(d)]) if id(d) in fresh else d for d in dim)
            for dim in layout.dims
        ),
        layout.threads,
    )
    assert layout.same_places(other)
    mapping = layout.register_of(other)
    assert sorted(mapping) == list(range(layout.registers))
    for mine, theirs in enumerate(mapping):
        assert np.array_equal(all_coordinates(layout, mine), all_coordinates(other, theirs))


def holding(layout):
    return {element: {t for t, _ in held} for element, held in element_places(layout).items()}


@quick
@given(st.lists(digit_layouts(), min_size=2, max_size=2))
def test_same_places_is_only_said_of_layouts_whose_threads_hold_the_same(layouts):
    one, other = layouts
    if one.same_places(other):
        assert holding(one) == holding(other)


@quick
@given(digit_layouts(), st.integers(1, 6))
def test_lengthened_holds_all_of_the_new_dimension_where_the_element_was(layout, extent):
    longer = layout.lengthened(extent)
    assert longer.shape == (*layout.shape, extent) and longer.vector % extent == 0
    assert longer.project(range(len(layout.shape))).same_places(layout)
    for t, r in itertools.product(range(layout.threads), range(layout.registers)):
        at = layout.coordinates(t, r)
        found = [longer.coordinates(t, r * extent + c) for c in range(extent)]
        assert found == [(*at, c) for c in range(extent)]


def test_split_thread_digits_are_the_same_places_as_one_digit():
    whole = FragmentLayout((16, 2), ((thread(16, 1),), (register(2, 1),)), 16)
    split = FragmentLayout((16, 2), ((thread(4, 4), thread(4, 1)), (register(2, 1),)), 16)
    turned = FragmentLayout((16, 2), ((thread(4, 1), thread(4, 4)), (register(2, 1),)), 16)
    assert whole.same_places(split)
    assert not whole.same_places(turned)
    assert not whole.same_places(blocked((16, 2), 32))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4)])
def test_replicated_gives_every_thread_every_element(shape):
    layout = replicated(shape, 48)
    assert layout.replicas == 48
    assert_covers_once(layout)


def test_a_scalar_fragment_is_one_register_of_every_thread():
    layout = blocked((), 96)
    assert (layout.registers, layout.replicas, layout.vector) == (1, 96, 1)
    assert layout.coordinates(5, 0) == ()


def test_blocked_of_an_awkward_shape_is_padded_along_the_flat_index():
    layout = blocked((7, 13), 96)
    assert layout.flat and layout.is_padded
    assert str(layout) == "flat (96t1) over 96 threads"
    real = Counter(c < 7 for c, _ in (layout.coordinates(t, 0) for t in range(96)))
    assert real[True] == 91


def test_layouts_print_digits_most_significant_first():
    assert str(blocked((128, 32), 128, 8)) == "(4r8*32t4, 4t1*8r1) over 128 threads"
    assert str(blocked((2, 16), 128)) == "(2t16, 16t1) over 128 threads x4 copies"


def test_digits_that_do_not_cover_the_shape_are_our_error():
    with pytest.raises(AssertionError, match="digits cover 8 of 9"):
        FragmentLayout((9,), ((thread(8, 1),),), 8)
    with pytest.raises(AssertionError, match="vector 3 does not divide"):
        blocked((8,), 32, 3)


def test_weights_of_all_digits_rebuild_the_coordinates():
    layout = blocked((24, 40), 96, 4)
    for t, r in itertools.product(range(0, 96, 7), range(layout.registers)):
        index = {"thread": t, "register": r}
        rebuilt = tuple(
            sum(index[d.place] // d.stride % d.size * weight for d, weight in weighted)
            for weighted in layout.weights
        )
        if not layout.flat:
            assert rebuilt == layout.coordinates(t, r)
