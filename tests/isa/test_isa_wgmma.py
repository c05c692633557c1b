"""wgmma: fragment maps against the PTX ISA's formulas, meanings against matrix products."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.isa import wgmma
from tilejit.isa.mma import find_mma
from tilejit.isa.mma import fragment_a as mma_fragment_a
from tilejit.isa.mma import fragment_acc as mma_fragment_acc
from tilejit.isa.wgmma import find_wgmma, fragment_a, fragment_acc, tile_a, tile_acc, wait_group
from tilejit.isa.wgmma_fragments import WGMMA
from tilejit.isa.wgmma_operands import operand_chunks
from tilejit.layout.shared import SharedLayout
from tilejit.target import TARGETS

HOPPER = TARGETS["sm_90a"]
F16, BF16, TF32, F32 = dtypes.float16, dtypes.bfloat16, dtypes.tfloat32, dtypes.float32
E4M3, E5M2, S8, U8, S32 = (
    dtypes.float8_e4m3fn, dtypes.float8_e5m2, dtypes.int8, dtypes.uint8, dtypes.int32
)  # fmt: skip


def names(types):
    return "-".join(map(str, types))


TYPES = tuple(dict.fromkeys(key[:3] for key in WGMMA))
EVERY_TYPE = pytest.mark.parametrize("types", TYPES, ids=names)
EVERY_MODE = pytest.mark.parametrize("mode", [0, 1, 2, 3], ids=["none", "128", "64", "32"])


def find(types, n):
    return find_wgmma(*types, n, HOPPER)


# --- records --------------------------------------------------------------------------------------


def test_every_width_that_the_ptx_isa_has_is_there_and_no_other():
    floats = [n for n in range(1, 300) if find((BF16, BF16, F32), n)]
    assert floats == list(range(8, 257, 8))
    integers = [n for n in range(1, 300) if find((S8, U8, S32), n)]
    assert integers == [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224,
                        240, 256]  # fmt: skip
    assert len(TYPES) == 4 + 8 + 4


@pytest.mark.parametrize(
    "types",
    [(F16, BF16, F32), (BF16, BF16, BF16), (F32, F32, F32), (TF32, TF32, F16), (S8, S8, F32)],
)
def test_types_without_an_instruction_have_none(types):
    assert find(types, 64) is None


def test_only_hopper_has_it():
    having = [t for t in TARGETS.values() if find_wgmma(F16, F16, F32, 64, t)]
    assert [str(t) for t in having] == ["sm_90a"]


@EVERY_TYPE
def test_k_is_32_bytes(types):
    one = find(types, 64)
    assert one.k * one.a.bytes == 32 and one.m == 64
    assert one.name == repr(one) and one.name.startswith(f"wgmma.m64n64k{one.k}.")


# --- fragments ------------------------------------------------------------------------------------


@EVERY_TYPE
@pytest.mark.parametrize("n", [8, 24, 256])
def test_a_fragment_is_four_warps_of_mma_along_m(types, n):
    one = find(types, n)
    acc, a = fragment_acc(one), fragment_a(one)
    small = {1: (S8, S8, S32), 2: (F16, F16, F32), 4: (TF32, TF32, F32)}[one.a.bytes]
    mma = find_mma(*small, HOPPER)[0]
    assert (mma.m, mma.k) == (16, one.k)
    for t in (0, 5, 33, 77, 127):
        warp, lane = divmod(t, 32)
        for r in range(a.registers):
            row, column = mma_fragment_a(mma).coordinates(lane, r)
            assert a.coordinates(t, r) == (16 * warp + row, column)
        for r in range(acc.registers):
            row, column = mma_fragment_acc(mma).coordinates(lane, r % 4)
            assert acc.coordinates(t, r) == (16 * warp + row, 8 * (r // 4) + column)


@EVERY_TYPE
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_tile_holds_each_element_once_a_replica(types, groups):
    groups_m, groups_n = groups
    one = find(types, 24)
    m, n, k = 128 * groups_m, 48 * groups_n, 3 * one.k
    for layout, copies in (
        (tile_acc(one, m, n, *groups), 1),
        (tile_a(one, m, k, *groups), groups_n),
    ):
        threads = np.arange(layout.threads)
        places: Counter[tuple[int, ...]] = Counter()
        for r in range(layout.registers):
            columns = (np.broadcast_to(c, threads.shape) for c in layout.coordinates(threads, r))
            places.update(zip(*(c.tolist() for c in columns), strict=True))
        assert layout.threads == 128 * groups_m * groups_n
        assert set(places) == set(np.ndindex(layout.shape))
        assert set(places.values()) == {copies}


def test_a_tile_gives_each_warpgroup_a_contiguous_part_and_instructions_n_before_m():
    one = find((BF16, BF16, F32), 32)
    acc = tile_acc(one, 256, 128, 2, 2)
    assert acc.coordinates(0, 0) == (0, 0)
    assert acc.coordinates(128, 0) == (0, 64) and acc.coordinates(256, 0) == (128, 0)
    assert acc.coordinates(0, 16) == (0, 32) and acc.coordinates(0, 32) == (64, 0)
    a = tile_a(one, 256, 32, 2, 2)
    assert a.coordinates(128, 0) == (0, 0) and a.coordinates(256, 0) == (128, 0)
    assert a.coordinates(0, 8) == (0, 16) and a.coordinates(0, 16) == (64, 0)
    with pytest.raises(AssertionError, match="72 is no multiple of 64"):
        tile_acc(one, 128, 72, 1, 2)


# --- descriptors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n", [32, 96, 256])
def test_a_product_of_halves_is_held_as_an_8_bit_left_operand(n, groups):
    """Column c of the instruction's result is what stored row c of the operand makes."""
    one = find((E4M3, E4M3, F32), n)
    plain = tile_acc(one, 64 * groups, n, groups, 1)
    halved = tile_acc(one, 64 * groups, n, groups, 1, halved=True)
    assert halved.same_places(tile_a(one, 64 * groups, n, groups, 1))
    stored = SharedLayout((n, 32), 1, halved=True).stored_row(np.arange(n))
    threads = np.arange(128 * groups)
    for r in range(plain.registers):
        row, column = halved.coordinates(threads, r)
        assert np.array_equal(plain.coordinates(threads, r)[0], row)
        assert np.array_equal(plain.coordinates(threads, r)[1], stored[column])


def test_a_descriptor_has_its_fields_where_the_ptx_isa_says():
    assert wgmma.descriptor_constant(1, 16, 1024) == 1 << 62 | 64 << 32 | 1 << 16
    assert wgmma.descriptor_constant(3, 0x3FFF0, 0) == 3 << 62 | 0x3FFF << 16
    with pytest.raises(AssertionError, match="stride of 24"):
        wgmma.descriptor_constant(0, 24, 128)


def test_only_the_low_18_bits_of_an_address_count():
    base = wgmma.descriptor_constant(1, 0, 1024)
    near = operand_chunks(base | 0x400 >> 4, 64, 16, 2, False)
    wrapped = operand_chunks(base + (0x40000 + 0x400 >> 4), 64, 16, 2, False)
    assert np.array_equal(near, wrapped)


def test_the_swizzle_of_128_bytes_permutes_by_the_line_of_the_address():
    base = wgmma.descriptor_constant(1, 0, 1024) | 2048 >> 4
    chunks = operand_chunks(base + 2, 16, 16, 2, False)  # the second 16 of K
    assert chunks.tolist() == [
        [2048 + row * 128 + (c ^ row % 8) * 16 for c in (2, 3)] for row in range(16)
    ]


# --- meanings -------------------------------------------------------------------------------------


@EVERY_TYPE
@EVERY_MODE
def test_a_product_is_the_matrix_product(types, mode, make_product, make_lanes):
    steps = max(wgmma_span(mode) // 32, 2)
    for n in (8, 24, 64, 128, 256):
        product = make_product(find(types, n), mode, mode, steps=steps)
        assert np.array_equal(product.run(make_lanes(128)), product.expected)


def wgmma_span(mode):
    return {0: 16, 1: 128, 2: 64, 3: 32}[mode]


@EVERY_MODE
@pytest.mark.parametrize("n", [8, 24, 64, 128, 256])
@pytest.mark.parametrize("turned", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("types", [(F16, F16, F32), (F16, F16, F16), (BF16, BF16, F32)], ids=names)
def test_a_product_of_mn_major_operands_is_the_matrix_product(
    types, turned, n, mode, make_product, make_lanes
):
    product = make_product(find(types, n), mode, mode, *turned, steps=4)
    assert np.array_equal(product.run(make_lanes(128)), product.expected)


@EVERY_TYPE
def test_a_product_with_a_in_registers_is_the_matrix_product(types, make_product, make_lanes):
    for n in (8, 64, 256):
        product = make_product(find(types, n), None, 1, rows=2, steps=4)
        assert np.array_equal(product.run(make_lanes(128)), product.expected)
    if types[0].bits == 16:
        product = make_product(find(types, 64), None, 1, b_turned=True, steps=3)
        assert np.array_equal(product.run(make_lanes(128)), product.expected)


@pytest.mark.parametrize("scale", [None, 0, 1, 7])
@pytest.mark.parametrize("a_mode", [None, 1])
def test_a_sequence_of_rows_and_columns_adds_or_begins_anew(
    scale, a_mode, make_product, make_lanes
):
    one = find((BF16, BF16, F32), 40)
    product = make_product(one, a_mode, 2, rows=2, columns=3, steps=4, scale=scale)
    if scale == 0:  # old values do not even count as NaN
        product.inputs[:5] = [np.full(128, np.nan, np.float32)] * 5
    assert np.array_equal(product.run(make_lanes(128)), product.expected)


def test_two_warpgroups_have_their_own_descriptors(make_product, make_lanes):
    one = find((F16, F16, F32), 64)
    parts = [make_product(one, None, 1, steps=4, b_turned=flag) for flag in (False, False)]
    lanes = make_lanes(256)
    lanes.shared[:] = parts[0].content
    inputs = [np.concatenate(pair) for pair in zip(*(p.inputs for p in parts), strict=True)]
    inputs[-1][128:] += 64  # by 8 rows of N
    outputs = parts[0].instruction.meaning(lanes, inputs)
    wait_group(0, parts[0].instruction.outputs).meaning(lanes, outputs)
    first = parts[0].matrix([x[:128] for x in outputs])
    second = parts[0].matrix([x[128:] for x in outputs])
    assert np.array_equal(first, parts[0].expected)
    assert not np.array_equal(second, parts[0].expected)
    acc = parts[0].matrix(parts[0].inputs[:32])
    assert np.array_equal((second - acc)[:, :-8], (parts[0].expected - acc)[:, 8:])


def test_results_are_poison_until_waited_for_and_a_chain_sees_them_all_the_same(
    make_product, make_lanes
):
    for types in ((BF16, BF16, F32), (F16, F16, F16), (S8, S8, S32)):
        product = make_product(find(types, 16), 1, 1, steps=4)
        lanes = make_lanes(128)
        lanes.shared[:] = product.content
        count = len(product.instruction.outputs)
        middle = product.instruction.meaning(lanes, product.inputs)
        last = product.instruction.meaning(lanes, [*middle, *product.inputs[count:]])
        poison = product.matrix(last)
        assert np.isnan(poison).all() if types[2].is_float else (poison == 0x7FFF7FFF).all()
        wait_group(0, product.instruction.outputs).meaning(lanes, last)
        acc = product.matrix(product.inputs[:count])
        assert np.array_equal(product.matrix(last), 2 * product.expected - acc)


def test_shared_memory_is_read_when_the_product_is_waited_for(make_product, make_lanes):
    product = make_product(find((F16, F16, F32), 8), 1, 1, steps=4)
    lanes = make_lanes(128)
    lanes.shared[:] = 0
    outputs = product.instruction.meaning(lanes, product.inputs)
    lanes.shared[:] = product.content
    wait_group(0, product.instruction.outputs).meaning(lanes, outputs)
    assert np.array_equal(product.matrix(outputs), product.expected)


def test_registers_of_a_are_read_when_the_product_is_issued(make_product, make_lanes):
    product = make_product(find((F16, F16, F32), 8), None, 1, steps=4)
    lanes = make_lanes(128)
    lanes.shared[:] = product.content
    outputs = product.instruction.meaning(lanes, product.inputs)
    for word in product.inputs[4:-1]:
        word[:] = 0
    wait_group(0, product.instruction.outputs).meaning(lanes, outputs)
    assert np.array_equal(product.matrix(outputs), product.expected)


def test_tf32_operands_lose_their_low_13_bits(make_product, make_lanes):
    one = find((TF32, TF32, F32), 8)
    for a_mode in (1, None):
        product = make_product(one, a_mode, 1, steps=4)
        product.content.view(np.uint32)[:] |= 0x1FFF
        for word in product.inputs[4:-1]:
            if word.dtype == np.uint32:
                word |= 0x1FFF
        assert np.array_equal(product.run(make_lanes(128)), product.expected)


def test_float16_accumulators_are_rounded_after_each_instruction(make_product, make_lanes):
    product = make_product(find((F16, F16, F16), 8), 1, 1, steps=4)
    ones = np.ones(len(product.content) // 2, np.float16)
    product.content[:] = ones.view(np.uint8)
    start = np.full(256, 2048.0, np.float16).view(np.uint32)  # 2048 + 16 is exact, + 1 is not
    product.inputs[:2] = [start.copy(), start.copy()]
    assert (product.run(make_lanes(128)) == 2048 + 64).all()
    product.content.view(np.float16)[:] = 0.25  # each instruction adds 1: lost every time
    assert (product.run(make_lanes(128)) == 2048).all()


def test_integer_accumulators_wrap(make_product, make_lanes):
    product = make_product(find((U8, U8, S32), 8), 1, 1, steps=4)
    product.content[:] = 1
    product.inputs[:4] = [np.full(128, 2**31 - 1, np.int32)] * 4
    assert (product.run(make_lanes(128)) == -(2**31) + 127).all()


def test_infinities_and_nans_go_through(make_product, make_lanes):
    product = make_product(find((BF16, BF16, F32), 8), 1, 1, steps=4)
    product.content.view(ml_dtypes.bfloat16)[:] = 1
    product.content.view(ml_dtypes.bfloat16)[0] = np.inf  # A[0, 0]
    product.content.view(ml_dtypes.bfloat16)[64 + 8] = np.nan  # A[1, 0]
    result = product.run(make_lanes(128))
    assert np.isposinf(result[0]).all() and np.isnan(result[1]).all()
    assert np.isfinite(result[2:]).all()


def test_an_issue_by_part_of_a_warpgroup_is_our_error(make_product, make_lanes):
    product = make_product(find((BF16, BF16, F32), 8), 1, 1)
    lanes = make_lanes(128)
    lanes.active[:32] = False
    with pytest.raises(AssertionError, match="only part of a warpgroup executes it"):
        product.instruction.meaning(lanes, product.inputs)
    with pytest.raises(AssertionError, match="only part of a warpgroup executes it"):
        wait_group(0, ()).meaning(lanes, [])
    with pytest.raises(AssertionError, match="no whole warpgroups"):
        product.instruction.meaning(make_lanes(96), [x[:96] for x in product.inputs])


def test_a_warpgroup_that_stays_away_computes_nothing(make_product, make_lanes):
    product = make_product(find((BF16, BF16, F32), 8), 1, 1)
    lanes = make_lanes(256)
    lanes.active[:128] = False
    product.instruction.meaning(lanes, [np.tile(x, 2) for x in product.inputs])
    assert lanes.calls == [("start_product", 1), ("commit_products",)]


def test_threads_with_different_descriptors_are_our_error(make_product, make_lanes):
    product = make_product(find((BF16, BF16, F32), 8), 1, 1)
    product.inputs[-1][40] += 2
    with pytest.raises(AssertionError, match="descriptors differ"):
        product.instruction.meaning(make_lanes(128), product.inputs)


def test_what_the_hardware_cannot_do_is_our_error():
    one = find((TF32, TF32, F32), 8)
    single = {"rows": 1, "columns": 1, "steps": 1, "b_offsets": ((0,),)}
    with pytest.raises(AssertionError, match="only operands of 16 bits may be MN-major"):
        wgmma.wgmma_sequence(one, a_offsets=((0,),), transpose_b=True, **single)
    with pytest.raises(AssertionError, match="A is in registers"):
        wgmma.wgmma_sequence(find((F16, F16, F32), 8), a_registers=True, transpose_a=True, **single)
    with pytest.raises(AssertionError, match="offsets of A"):
        wgmma.wgmma_sequence(one, a_offsets=((0, 1),), **single)
    with pytest.raises(AssertionError, match="wait_group 8"):
        wait_group(8, ())


def test_a_sequence_issues_steps_outer_rows_then_columns_inner_between_fence_and_commit():
    one = find((F16, F16, F32), 8)
    text = wgmma.wgmma_sequence(
        one, rows=2, columns=2, steps=2, a_offsets=((0, 2), (64, 66)), b_offsets=((0, 2), (8, 10)),
        scaled=True,
    ).ptx  # fmt: skip
    lines = [line for line in text.splitlines() if line.startswith("wgmma")]
    assert lines[0] == "wgmma.fence.sync.aligned;"
    assert lines[-1] == "wgmma.commit_group.sync.aligned;"
    firsts = [line.split("{")[1].split(",")[0] for line in lines[1:-1]]
    assert firsts == ["$d0", "$d4", "$d8", "$d12"] * 2
    assert ["first" in line for line in lines[1:-1]] == [True] * 4 + [False] * 4
    assert all(line.endswith(", 1, 1, 0, 0;") for line in lines[1:-1])
