"""The LLVM machine: every operation assembles on every target, and is what was meant."""

from __future__ import annotations

import re

import pytest

from tilejit.dtypes import (
    ALL,
    bfloat16,
    bool_,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    tfloat32,
    uint8,
    uint16,
    uint32,
    uint64,
)  # fmt: skip
from tilejit.ir.expr import MATH
from tilejit.isa import barrier, mbarrier, mma, wgmma
from tilejit.isa.cp_async import cp_async
from tilejit.isa.machine import Address, Slot
from tilejit.runtime.compile import compile_lowered
from tilejit.target import TARGETS

INTEGERS = (int8, int16, int32, int64, uint8, uint16, uint32, uint64)
FLOATS = (float32, float64)
DIALECTS = ("sm_80", "sm_90a", "sm_120a")  # old chip and old text, new chip, new text
COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
NUMERIC = ("add", "sub", "mul", "div", "floordiv", "floormod", "fmod", "min", "max", "pow")
INTEGER_BINARY = (*NUMERIC, "and", "or", "xor", "shl", "shr")
FLOAT_BINARY = (*NUMERIC, "atan2")


def compile_for(lowered, target="sm_80"):
    return compile_lowered(lowered, TARGETS[target])


def instructions(ptx):
    """Opcodes of a PTX text, in order."""
    lines = (line.strip() for line in ptx.splitlines())
    code = (re.sub(r"^@!?%p\d+\s+", "", line) for line in lines)
    return [line.split()[0] for line in code if line.endswith(";") and not line.startswith(".")]


# --- every operation on every target -------------------------------------------------------------


@pytest.mark.parametrize("target", DIALECTS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_binary_every_integer_operation_assembles(elementwise, dtype, target):
    def emit(m, values):
        results = [m.binary(op, *values, dtype) for op in INTEGER_BINARY]
        for op in COMPARE:
            results.append(m.cast([m.binary(op, *values, dtype)], bool_, dtype)[0])
        return [*results, *(m.unary(op, values[0], dtype) for op in
                ("neg", "not", "abs", "popcount", "clz"))]  # fmt: skip

    count = len(INTEGER_BINARY) + len(COMPARE) + 5
    compiled = compile_for(elementwise(emit, [dtype] * 2, [dtype] * count), target)
    assert compiled.spill_bytes == 0


@pytest.mark.parametrize("fast_math", (False, True), ids=("exact", "fast"))
@pytest.mark.parametrize("target", DIALECTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary_every_float_function_assembles(elementwise, dtype, target, fast_math):
    functions = sorted(MATH - {"popcount", "clz"}) + ["neg", "abs"]

    def emit(m, values):
        results = [m.unary(op, values[0], dtype) for op in functions]
        results += [m.binary(op, *values, dtype) for op in FLOAT_BINARY]
        results.append(m.fma(*values, values[0], dtype))
        for op in ("isnan", "isinf", "isfinite"):
            results.append(m.cast([m.unary(op, values[0], dtype)], bool_, dtype)[0])
        return results

    count = len(functions) + len(FLOAT_BINARY) + 4
    lowered = elementwise(emit, [dtype] * 2, [dtype] * count, fast_math=fast_math)
    assert compile_for(lowered, target).registers > 0


@pytest.mark.parametrize("target", DIALECTS)
@pytest.mark.parametrize("source", ALL, ids=str)
def test_cast_to_every_dtype_assembles(elementwise, source, target):
    lowered = elementwise(
        lambda m, values: [m.cast([values[0]], source, d)[0] for d in ALL], [source], ALL
    )
    assert compile_for(lowered, target).stack_bytes == 0


@pytest.mark.parametrize("target", TARGETS)
def test_atomic_every_combination_assembles(single, target):
    combinations = ("add", "min", "max", "and", "or", "xor", "exch")

    def emit(m, base):
        for dtype in ALL:
            for combine in combinations:
                if dtype.is_float and combine in ("and", "or", "xor"):
                    continue
                for space in ("global", "shared"):
                    place = Address(
                        space, base if space == "global" else None, None, 16, dtype.bytes
                    )
                    old = m.atomic(
                        place, combine, m.const(1, dtype), dtype, want_old=combine == "add"
                    )
                    assert (old is None) == (combine != "add")

    assert compile_for(single(emit, 1, shared_bytes=64), target).cubin


# --- numbers -------------------------------------------------------------------------------------


def test_multiply_and_add_is_not_contracted_unless_fast_math(elementwise):
    def emit(m, values):
        return [m.binary("add", m.binary("mul", *values, float32), values[0], float32)]

    exact = compile_for(elementwise(emit, [float32] * 2, [float32])).ptx
    assert "mul.rn.f32" in exact and "add.rn.f32" in exact and "fma" not in exact
    fast = compile_for(elementwise(emit, [float32] * 2, [float32], fast_math=True)).ptx
    assert "fma.rn.ftz.f32" in fast


def test_division_and_root_are_ieee_unless_fast_math(elementwise):
    def emit(m, values):
        return [m.binary("div", *values, float32), m.unary("sqrt", values[0], float32)]

    exact = compile_for(elementwise(emit, [float32] * 2, [float32] * 2)).ptx
    assert "div.rn.f32" in exact and "sqrt.rn.f32" in exact
    fast = compile_for(elementwise(emit, [float32] * 2, [float32] * 2, fast_math=True)).ptx
    assert re.search(r"div\.(approx|full)\.ftz\.f32", fast) and "sqrt.approx.ftz.f32" in fast


def test_exp_needs_libdevice_only_when_exact(elementwise):
    def emit(m, values):
        return [m.unary("exp", values[0], float32)]

    fast = compile_for(elementwise(emit, [float32], [float32], fast_math=True)).ptx
    assert instructions(fast).count("ex2.approx.ftz.f32") == 1
    assert len(instructions(fast)) < len(
        instructions(compile_for(elementwise(emit, [float32], [float32])).ptx)
    )


def test_floor_division_by_powers_of_two_is_a_shift_and_a_mask(elementwise):
    def emit(m, values):
        eight = m.const(8, int32)
        return [m.binary(op, values[0], eight, int32) for op in ("floordiv", "floormod")]

    codes = instructions(compile_for(elementwise(emit, [int32], [int32] * 2)).ptx)
    assert "shr.s32" in codes and "and.b32" in codes
    assert not any(code.startswith(("div", "rem", "mul.hi")) for code in codes)


def test_constants_fold_without_instructions(single):
    seen = []

    def emit(m, base):
        two, three = m.const(2, int32), m.const(-7, int32)
        for op in ("add", "floordiv", "floormod", "mul", "lt"):
            seen.append(m.binary(op, three, two, int32).constant)
        seen.append(m.cast([three], int32, uint8)[0].constant)

    compile_for(single(emit, 1))
    assert seen == [-5, -4, 1, -14, 1, 249]


def test_cast_pairs_share_the_packed_conversion(single):
    def emit(m, source, sink):
        values = m.load(Address("global", source, None, align=16, readonly=True), float32, 8)
        halves = m.cast(values, float32, bfloat16)
        m.store(Address("global", sink, None, align=16), halves, bfloat16)

    codes = instructions(compile_for(single(emit, 2)).ptx)
    assert codes.count("cvt.rn.bf16x2.f32") == 4
    assert codes.count("st.global.v4.b32") == 1
    assert not any(code.startswith(("prmt", "mov.b32", "shl", "or", "bfi")) for code in codes)


def test_fp8_conversion_is_an_instruction_where_the_target_has_it(elementwise):
    def emit(m, values):
        return m.cast(values, float32, float8_e4m3fn)

    lowered = elementwise(emit, [float32], [float8_e4m3fn])
    assert "satfinite.e4m3x2" in compile_for(lowered, "sm_89").ptx
    assert "satfinite" not in compile_for(lowered, "sm_86").ptx


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "count", "align", "loads"),
    [
        (float32, 4, 16, ["ld.global.nc.v4.b32"]),
        (float32, 4, 8, ["ld.global.nc.v2.b32"] * 2),
        (float32, 3, 16, ["ld.global.nc.v2.b32", "ld.global.nc.b32"]),
        (float32, 2, 1, ["ld.global.nc.b32"] * 2),
        (float16, 8, 16, ["ld.global.nc.v4.b32"]),
        (float16, 2, 4, ["ld.global.nc.b32"]),
        (float16, 1, 2, ["ld.global.nc.b16"]),
        (bfloat16, 7, 16, ["ld.global.nc.v2.b32", "ld.global.nc.b32", "ld.global.nc.b16"]),
        (int8, 16, 16, ["ld.global.nc.v4.b32"]),
        (int8, 2, 2, ["ld.global.nc.b16"]),
        (int8, 1, 1, ["ld.global.nc.u8"]),
        (float64, 2, 16, ["ld.global.nc.v2.b64"]),
        (int64, 4, 32, ["ld.global.nc.v2.b64"] * 2),
        (bool_, 4, 4, ["ld.global.nc.b32"]),
    ],
)  # fmt: skip
def test_load_takes_the_widest_accesses_that_align(single, dtype, count, align, loads):
    def emit(m, source, sink):
        values = m.load(Address("global", source, None, align=align, readonly=True), dtype, count)
        m.store(Address("global", sink, None, align=align), values, dtype)

    codes = instructions(compile_for(single(emit, 2)).ptx)
    assert [c for c in codes if c.startswith("ld.global")] == loads
    stores = [load.replace("ld.global.nc", "st.global") for load in loads]
    assert [c for c in codes if c.startswith("st.global")] == stores


def test_load_of_written_memory_does_not_use_the_read_only_path(single):
    def emit(m, base):
        value = m.load(Address("global", base, None, align=4), float32)
        m.store(Address("global", base, None, 4, align=4), value, float32)

    codes = instructions(compile_for(single(emit, 1)).ptx)
    assert "ld.global.b32" in codes and "ld.global.nc.b32" not in codes


@pytest.mark.parametrize("target", DIALECTS)
def test_predicated_accesses_are_straight_line_code(single, target):
    def emit(m, source, sink, count):
        for dtype in (int8, float16, float32, float64):
            when = m.binary("lt", m.thread_index(), count, int32)
            place = Address("global", source, None, align=16, readonly=True)
            values = m.load(place, dtype, 2, when)
            m.store(Address("global", sink, None, align=16), values, dtype, when)

    ptx = compile_for(single(emit, 2, extra=(Slot(int32),)), target).ptx
    assert "bra" not in ptx
    assert len(re.findall(r"@%p\d+ st\.global", ptx)) == 4
    assert len(re.findall(r"@%p\d+ ld\.global\.nc", ptx)) == 4


def test_constant_offsets_land_in_the_instruction(single):
    def emit(m, source, sink):
        row = m.binary("mul", m.thread_index(), m.const(128, int32), int32)
        for step in (0, 16, 32):
            offset = m.binary("add", row, m.const(step, int32), int32)
            value = m.load(Address("global", source, offset, 64, 16, readonly=True), int32, 4)
            m.store(Address("shared", None, offset, 2048, 16), value, int32)

    ptx = compile_for(single(emit, 2, shared_bytes=8192)).ptx
    assert re.findall(r"ld\.global\S* .*\+(\d+)\]", ptx) == ["64", "80", "96"]
    assert re.findall(r"st\.shared\S* \[.*\+(\d+)\]", ptx) == ["2048", "2064", "2080"]
    assert ".extern .shared .align 1024" in ptx


@pytest.mark.parametrize("target", DIALECTS)
def test_local_memory_of_constant_indices_becomes_registers(single, target):
    def emit(m, source, sink):
        base = m.alloc_local(64, 16)
        for i in range(4):
            value = m.load(Address("global", source, None, 4 * i, 4), float32)
            m.store(Address("local", base, None, 4 * i, 4), value, float32)
        for i in range(4):
            value = m.load(Address("local", base, None, 4 * (3 - i), 4), float32)
            m.store(Address("global", sink, None, 4 * i, 4), value, float32)

    compiled = compile_for(single(emit, 2), target)
    assert compiled.stack_bytes == 0 and "local" not in compiled.ptx


def test_local_memory_of_a_thread_dependent_index_is_a_stack(single):
    def emit(m, source, sink):
        base = m.alloc_local(64, 16)
        for i in range(16):
            m.store(Address("local", base, None, 4 * i, 4), [m.const(i * i, int32)], int32)
        index = m.load(Address("global", source, None, 0, 4), int32)[0]
        offset = m.binary("mul", index, m.const(4, int32), int32)
        inside = m.binary("lt", index, m.const(16, int32), int32)
        m.store(Address("local", base, offset, 0, 4), [index], int32, inside)
        other = m.binary("xor", offset, m.const(4, int32), int32)
        value = m.load(Address("local", base, other, 0, 4), int32, 1, inside)
        m.store(Address("global", sink, None, 0, 4), value, int32)

    assert compile_for(single(emit, 2)).stack_bytes == 64


# --- control flow --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", DIALECTS)
def test_loop_stays_a_loop_and_carries_its_state(single, target):
    def emit(m, source, sink, count):
        state = {"sum": [m.const(0.0, float32)]}

        def body(i):
            offset = m.binary("mul", i, m.const(4, int32), int32)
            value = m.load(Address("global", source, offset, 0, 4, True), float32)[0]
            state["sum"][0] = m.binary("add", state["sum"][0], value, float32)

        m.loop(m.const(0, int32), count, 1, int32, body, state)
        m.store(Address("global", sink, None, 0, 4), state["sum"], float32)

    ptx = compile_for(single(emit, 2, extra=(Slot(int32),)), target).ptx
    assert instructions(ptx).count("ld.global.nc.b32") == 1  # not unrolled
    assert "add.rn.f32" in ptx


@pytest.mark.parametrize(("trips", "rolled"), [(3, False), (64, True)])
def test_only_long_constant_loops_are_kept_rolled(single, trips, rolled):
    def emit(m, sink):
        def body(i):
            m.store(Address("global", sink, None, 0, 4), [i], int32)

        m.loop(m.const(0, int32), m.const(trips, int32), 1, int32, body, {})

    assert ("nounroll" in compile_for(single(emit, 1)).ptx) == rolled


def test_branch_merges_what_either_side_changed(single):
    def emit(m, source, sink, count):
        words = m.load(Address("global", source, None, 0, 4), bfloat16, 2)
        state = {"pair": list(words), "same": [m.const(1, int32)]}
        same = state["same"][0]

        def swap():
            state["pair"].reverse()

        condition = m.binary("gt", count, m.const(5, int32), int32)
        m.branch(condition, swap, None, state)
        assert state["same"][0] is same
        m.store(Address("global", sink, None, 0, 4), state["pair"], bfloat16)

    assert compile_for(single(emit, 2, extra=(Slot(int32),))).cubin


@pytest.mark.parametrize("target", TARGETS)
def test_issue_writes_instructions_of_the_records(single, target):
    def emit(m, source):
        chosen = mma.find_mma(bfloat16, bfloat16, float32, TARGETS[target])[0]
        one = chosen.instruction
        inputs = [m.const(0, dtype) for dtype in one.inputs]
        results = m.issue(one, inputs)
        m.store(Address("shared", None, None, 0, 16), results, float32)
        shared = m.address(Address("shared", None, None, 64))
        address = m.address(Address("global", source, None, 0))
        when = m.binary("lt", m.thread_index(), m.const(7, int32), int32)
        copy = cp_async(16)
        m.issue(copy, [shared, address, m.const(16, uint32)], when)
        m.issue(mbarrier.INIT, [shared, m.const(32, uint32)], when)
        wait = mbarrier.wait_parity(TARGETS[target])
        m.issue(wait, [shared, m.const(0, uint32)], when)
        m.issue(wait, [shared, m.const(0, uint32)])
        m.issue(barrier.bar_sync(0, 32))

    ptx = compile_for(single(emit, 1, shared_bytes=128), target).ptx
    assert "mma.sync" in ptx and "bar.sync" in ptx
    assert re.search(r"@%p\d+ cp\.async", ptx)
    assert len(set(re.findall(r"wait_\d+:", ptx))) == 2


def test_tied_registers_stay_where_they_are_through_a_chain_of_products(single):
    one = wgmma.find_wgmma(bfloat16, bfloat16, float32, 256, TARGETS["sm_90a"])
    offsets = ((0, 2, 4, 6),)
    product = wgmma.wgmma_sequence(
        one, rows=1, columns=1, steps=4, a_offsets=offsets, b_offsets=offsets
    )
    wait = wgmma.wait_group(0, product.outputs)

    def emit(m, sink):
        a, b = m.const(1 << 62 | 1 << 16 | 64 << 32, uint64), m.const(1 << 62 | 64, uint64)
        state = {"acc": [m.const(0.0, float32)] * len(product.outputs)}

        def body(i):
            state["acc"][:] = m.issue(product, [*state["acc"], a, b])
            state["acc"][:] = m.issue(wait, state["acc"])

        m.loop(m.const(0, int32), m.thread_index(), 1, int32, body, state)
        for number, value in enumerate(state["acc"]):
            m.store(Address("global", sink, None, 4 * number, 4), [value], float32)

    compiled = compile_for(single(emit, 1, threads=(128, 1, 1)), "sm_90a")
    assert compiled.spill_bytes == compiled.stack_bytes == 0
    assert compiled.registers <= 168
    used = re.findall(r"wgmma.mma_async\S+ \{([^}]*)\}", compiled.ptx)
    assert len(used) == 4 and len(set(used)) == 1 and len(set(used[0].split(", "))) == 128


def test_thread_index_of_a_three_dimensional_block_is_linear(single):
    def emit(m, sink):
        m.store(Address("global", sink, None, 0, 4), [m.thread_index()], int32)

    ptx = compile_for(single(emit, 1, threads=(8, 4, 2))).ptx
    assert "%tid.x" in ptx and "%tid.y" in ptx and "%tid.z" in ptx


def test_tfloat32_is_float32_in_registers(elementwise):
    lowered = elementwise(
        lambda m, values: m.cast(values, float32, tfloat32), [float32], [tfloat32]
    )
    assert not any(c.startswith("cvt.rn") for c in instructions(compile_for(lowered).ptx))


def test_packing_parts_of_one_word_gives_the_word(single):
    def emit(m, source, sink):
        word = m.load(Address("global", source, None, 0, 4), uint32)[0]
        assert m.pack(m.unpack(word, float16), float16) is word
        assert m.pack(m.unpack(word, float8_e5m2), float8_e5m2) is word
        low, high = m.unpack(word, float16)
        swapped = m.pack([high, low], float16)
        assert swapped is not word
        m.store(Address("global", sink, None, 0, 4), [swapped], uint32)

    assert compile_for(single(emit, 2)).cubin
