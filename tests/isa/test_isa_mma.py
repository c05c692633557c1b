"""mma records: fragment maps against the PTX ISA's formulas, meanings against matrix products."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.isa import mma as family
from tilejit.isa.mma import MMA, find_mma, tile_a, tile_acc, tile_b
from tilejit.layout.fragment import FragmentLayout
from tilejit.target import TARGETS

EVERY_MMA = pytest.mark.parametrize("mma", MMA, ids=lambda mma: mma.name)


def formula_a(mma, lane, i):
    """(row, column) of A as the PTX ISA's "Matrix fragments" write it, by operand width."""
    group, quad = lane >> 2, lane & 3
    if mma.a is dtypes.tfloat32:  # a0 a1: rows; a2 a3: the second half of K
        return group + 8 * (i % 2), quad + (4 if i >= 2 else 0)
    if mma.a is dtypes.float64:
        return (group, i * 2 + quad) if i % 2 == 0 else (group + 8, i * 2 - 2 + quad)
    if mma.a.bits == 16:
        row = group if i in (0, 1, 4, 5) else group + 8
        return row, quad * 2 + (i & 1) + (8 if i >= 4 else 0)
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, quad * 4 + (i & 3) + (16 if i >= 8 else 0)


def formula_b(mma, lane, i):
    group, quad = lane >> 2, lane & 3
    if mma.b in (dtypes.tfloat32, dtypes.float64):
        return quad + 4 * i, group
    if mma.b.bits == 16:
        return quad * 2 + (i & 1) + (8 if i >= 2 else 0), group
    return quad * 4 + (i & 3) + (16 if i >= 4 else 0), group


def formula_acc(mma, lane, i):
    return (lane >> 2) + (8 if i >= 2 else 0), (lane & 3) * 2 + (i & 1)


@EVERY_MMA
@pytest.mark.parametrize("operand", ["a", "b", "acc"])
def test_a_fragment_is_where_the_ptx_isa_says(mma, operand):
    layout = getattr(family, f"fragment_{operand}")(mma)
    formula = globals()[f"formula_{operand}"]
    for lane in range(32):
        for i in range(layout.registers):
            assert layout.coordinates(lane, i) == formula(mma, lane, i)


def count_places(layout: FragmentLayout) -> Counter[tuple[int, ...]]:
    threads = np.arange(layout.threads)
    places: Counter[tuple[int, ...]] = Counter()
    for r in range(layout.registers):
        columns = (np.broadcast_to(c, threads.shape) for c in layout.coordinates(threads, r))
        places.update(zip(*(c.tolist() for c in columns), strict=True))
    return places


@EVERY_MMA
@pytest.mark.parametrize("warps", [(1, 1), (2, 2), (1, 4), (3, 1)])
def test_a_tile_holds_each_element_once_a_replica(mma, warps):
    warps_m, warps_n = warps
    m, n, k = 2 * mma.m * warps_m, 3 * mma.n * warps_n, 2 * mma.k
    for layout, copies in (
        (tile_acc(mma, m, n, *warps), 1),
        (tile_a(mma, m, k, *warps), warps_n),
        (tile_b(mma, k, n, *warps), warps_m),
    ):
        places = count_places(layout)
        assert layout.threads == 32 * warps_m * warps_n
        assert layout.replicas == copies
        assert set(places) == set(np.ndindex(layout.shape))
        assert set(places.values()) == {copies}


def random_matrix(rng, shape, dtype):
    if dtype.is_integer:
        return rng.integers(dtype.min, dtype.max + 1, shape).astype(dtype.numpy)
    return rng.standard_normal(shape).astype(dtype.numpy)


def scatter(matrix, layout):
    """(threads, registers) elements of a matrix."""
    threads = np.arange(layout.threads)
    return np.stack(
        [matrix[layout.coordinates(threads, r)] for r in range(layout.registers)], axis=1
    )


def words(elements):
    """Operand registers: those of float64 elements, else of 32 bits."""
    together = np.ascontiguousarray(elements)
    return together if together.dtype == np.float64 else together.view(np.uint32)


def exact(matrix, dtype):
    """float64 values as the instruction reads them."""
    if dtype is dtypes.tfloat32:
        matrix = (matrix.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return matrix.astype(np.float64)


@EVERY_MMA
@pytest.mark.parametrize("warps", [(1, 1), (2, 3)])
def test_a_tile_product_reassembled_from_instructions_is_the_matrix_product(mma, warps, make_lanes):
    rng = np.random.default_rng(7)
    repeat_m, repeat_n, repeat_k = 2, 3, 2
    m, n, k = repeat_m * mma.m * warps[0], repeat_n * mma.n * warps[1], repeat_k * mma.k
    a, b = random_matrix(rng, (m, k), mma.a), random_matrix(rng, (k, n), mma.b)
    c = random_matrix(rng, (m, n), dtypes.int8 if mma.acc.is_integer else mma.acc)
    c = c.astype(mma.acc.numpy)

    layout = tile_acc(mma, m, n, *warps)
    a_regs = words(scatter(a, tile_a(mma, m, k, *warps)))
    b_regs = words(scatter(b, tile_b(mma, k, n, *warps)))
    acc = scatter(c, layout)
    acc = words(acc) if mma.acc is dtypes.float16 else acc.copy()

    one = mma.instruction
    size = len(one.outputs)
    a_size = a_regs.shape[1] // (repeat_m * repeat_k)
    b_size = b_regs.shape[1] // (repeat_n * repeat_k)
    assert a_size + b_size + size == len(one.inputs)
    lanes = make_lanes(layout.threads)
    for i in range(repeat_m):
        for j in range(repeat_n):
            at = (i * repeat_n + j) * size
            for step in range(repeat_k):
                a_at, b_at = (i * repeat_k + step) * a_size, (j * repeat_k + step) * b_size
                inputs = [*a_regs.T[a_at : a_at + a_size], *b_regs.T[b_at : b_at + b_size]]
                outputs = one.meaning(lanes, [*inputs, *acc.T[at : at + size]])
                acc[:, at : at + size] = np.stack(outputs, axis=1)

    result = np.full((m, n), np.nan)
    final = acc.view(np.float16) if mma.acc is dtypes.float16 else acc
    for r in range(layout.registers):
        result[layout.coordinates(np.arange(layout.threads), r)] = final[:, r]
    expected = exact(a, mma.a) @ exact(b, mma.b) + c.astype(np.float64)
    if mma.acc.is_integer:
        assert np.array_equal(result, expected)
    else:
        tolerance = {"float16": 0.05, "float32": 1e-4, "float64": 1e-13}[mma.acc.name]
        assert np.abs(result - expected).max() < tolerance


def test_an_8_bit_mma_wraps_its_accumulator(make_lanes):
    (mma, *_) = find_mma(dtypes.uint8, dtypes.uint8, dtypes.int32, TARGETS["sm_80"])
    ones = [np.full(32, 0x01010101, np.uint32)] * 6
    start = [np.full(32, 2**31 - 1, np.int32)] * 4
    outputs = mma.instruction.meaning(make_lanes(32), [*ones, *start])
    assert outputs[0].dtype == np.int32
    assert set(outputs[0].tolist()) == {-(2**31) + 31}


def test_a_tf32_mma_reads_only_the_top_19_bits(make_lanes):
    mma = find_mma(dtypes.tfloat32, dtypes.tfloat32, dtypes.float32, TARGETS["sm_80"])[0]
    almost_two = np.full(32, 0x3FFFFFFF, np.uint32)  # cut to 2 - 2**-10
    one = np.full(32, 1.0, np.float32).view(np.uint32)
    zero = np.zeros(32, np.float32)
    outputs = mma.instruction.meaning(make_lanes(32), [almost_two] * 4 + [one] * 2 + [zero] * 4)
    assert set(outputs[0].tolist()) == {8 * (2 - 2**-10)}


def test_an_mma_in_a_warp_that_is_only_partly_active_is_our_error(make_lanes):
    mma = MMA[0].instruction
    lanes = make_lanes(64)
    inputs = [np.zeros(64, d.numpy) for d in mma.inputs]
    lanes.active[32:] = False  # a whole warp may stay away
    mma.meaning(lanes, inputs)
    lanes.active[3] = False
    with pytest.raises(AssertionError, match="only part of a warp"):
        mma.meaning(lanes, inputs)


def test_find_mma_puts_the_largest_instruction_first():
    found = find_mma(dtypes.bfloat16, dtypes.bfloat16, dtypes.float32, TARGETS["sm_86"])
    assert [(mma.m, mma.n, mma.k) for mma in found] == [(16, 8, 16), (16, 8, 8)]
    assert all(mma.instruction.has_effect is False for mma in found)


FLOAT8 = (dtypes.float8_e4m3fn, dtypes.float8_e5m2)


@pytest.mark.parametrize("acc", [dtypes.float32, dtypes.float16], ids=str)
@pytest.mark.parametrize("b", FLOAT8, ids=str)
@pytest.mark.parametrize("a", FLOAT8, ids=str)
def test_targets_from_sm_89_on_multiply_every_pair_of_float8(a, b, acc):
    for name, target in TARGETS.items():
        shapes = [(mma.m, mma.n, mma.k) for mma in find_mma(a, b, acc, target)]
        assert shapes == ([] if name in ("sm_80", "sm_86") else [(16, 8, 32), (16, 8, 16)]), name


def test_every_target_multiplies_float64_and_those_from_sm_90_on_in_16_rows():
    for name, target in TARGETS.items():
        found = find_mma(dtypes.float64, dtypes.float64, dtypes.float64, target)
        large = [] if name in ("sm_80", "sm_86", "sm_89") else [(16, 8, k) for k in (16, 8, 4)]
        assert [(mma.m, mma.n, mma.k) for mma in found] == [*large, (8, 8, 4)], name


def test_a_float64_mma_keeps_all_53_bits(make_lanes):
    (mma,) = find_mma(dtypes.float64, dtypes.float64, dtypes.float64, TARGETS["sm_80"])
    a, b, acc = np.full(32, 1 + 2.0**-52), np.ones(32), np.zeros(32)
    first, second = mma.instruction.meaning(make_lanes(32), [a, b, acc, acc])
    assert first.dtype == second.dtype == np.float64
    assert set(first.tolist()) | set(second.tolist()) == {4 + 2.0**-50}


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_operands_keep_nans_and_the_infinities_of_e5m2(dtype, make_lanes):
    (mma, *_) = find_mma(dtype, dtype, dtypes.float32, TARGETS["sm_89"])
    a = np.zeros((16, 32), dtype.numpy)
    a[0, 0], a[1, 0] = np.inf, np.nan  # e4m3 has no infinity: NumPy makes a NaN of it
    inputs = [
        *words(scatter(a, family.fragment_a(mma))).T,
        *words(scatter(np.ones((32, 8), dtype.numpy), family.fragment_b(mma))).T,
        *np.zeros((4, 32), np.float32),
    ]
    outputs = mma.instruction.meaning(make_lanes(32), inputs)
    is_special = np.isinf if dtype is dtypes.float8_e5m2 else np.isnan
    assert is_special(outputs[0][:4]).all() and np.isnan(outputs[0][4:8]).all()
    assert not np.any(outputs[2])


@pytest.mark.parametrize(
    ("a", "b", "acc"),
    [
        (dtypes.float16, dtypes.bfloat16, dtypes.float32),
        (dtypes.bfloat16, dtypes.bfloat16, dtypes.bfloat16),
        (dtypes.float32, dtypes.float32, dtypes.float32),
        (dtypes.int8, dtypes.int8, dtypes.float32),
        (dtypes.float8_e4m3fn, dtypes.float16, dtypes.float32),
        (dtypes.float64, dtypes.float64, dtypes.float32),
    ],
)
def test_find_mma_of_types_without_an_instruction_is_empty(a, b, acc):
    assert find_mma(a, b, acc, TARGETS["sm_90a"]) == []


def test_a_tile_that_the_warps_do_not_divide_is_our_error():
    with pytest.raises(AssertionError, match="24 is no multiple of 16"):
        tile_acc(MMA[0], 24, 8, 1, 1)


def test_bfloat16_operands_keep_infinities_and_nans(make_lanes):
    mma = find_mma(dtypes.bfloat16, dtypes.bfloat16, dtypes.float32, TARGETS["sm_80"])[0]
    a = np.zeros((16, 16), ml_dtypes.bfloat16)
    a[0, 0], a[1, 0] = np.inf, np.nan
    b = np.ones((16, 8), ml_dtypes.bfloat16)
    inputs = [
        *words(scatter(a, family.fragment_a(mma))).T,
        *words(scatter(b, family.fragment_b(mma))).T,
        *np.zeros((4, 32), np.float32),
    ]
    outputs = mma.instruction.meaning(make_lanes(32), inputs)
    assert np.isinf(outputs[0][:4]).all() and np.isnan(outputs[0][4:8]).all()
    assert not np.any(outputs[2])
