"""On a GPU: what the LLVM machine writes computes what `ops.scalar` says, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
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
    uint8,
    uint16,
    uint32,
    uint64,
)  # fmt: skip
from tilejit.ir.expr import MATH
from tilejit.isa.machine import Address
from tilejit.ops.scalar import cast_array, evaluate_op

INTEGERS = (int8, int16, int32, int64, uint8, uint16, uint32, uint64)
COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
DIVIDE = ("div", "floordiv", "floormod", "fmod")
FLOAT_EXACT = ("add", "sub", "mul", *DIVIDE, "min", "max", *COMPARE)
INTEGER_BINARY = (*FLOAT_EXACT, "and", "or", "xor", "shl", "shr", "pow")
CONSTANTS = (1, 2, 3, 7, 8, 100, -1, -3, -8, 0)
FUNCTIONS = sorted(MATH - {"popcount", "clz"})


def specimens(dtype, count=4096, seed=0):
    """Values that matter (limits, zeros, ties, specials) and random ones of every magnitude."""
    rng = np.random.default_rng(seed)
    if dtype.is_bool:
        return rng.random(count) < 0.5
    if dtype.is_integer:
        low, high = int(dtype.min), int(dtype.max)
        special = [low, low + 1, -1, 0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 100, high - 1, high]
        special = np.array([v for v in special if low <= v <= high], dtype.numpy)
        raw = rng.integers(0, 256, (count, dtype.bytes), np.uint8).view(dtype.numpy).ravel()
        small = rng.integers(max(low, -20), 21, count).astype(dtype.numpy)
        values = np.where(rng.random(count) < 0.5, raw, small)
        place = rng.integers(0, count, count // 4)
        values[place] = rng.choice(special, len(place))
        return values
    raw = rng.integers(0, 256, (count, dtype.bytes), np.uint8).view(dtype.numpy).ravel()
    near = rng.uniform(-8, 8, count).astype(dtype.numpy)
    halves = (rng.integers(-16, 17, count) / 2).astype(dtype.numpy)
    values = np.where(rng.random(count) < 0.3, raw, np.where(rng.random(count) < 0.5, near, halves))
    largest = float(dtype.max)
    special = np.array([0.0, -0.0, 1.0, -1.0, largest, -largest, np.nan]).astype(dtype.numpy)
    place = rng.integers(0, count, count // 8)
    values[place] = rng.choice(special, len(place))
    return values


def same(got, want, what):
    """Equal bit for bit; any NaN is as good as another."""
    assert got.dtype == want.dtype
    size = got.dtype.itemsize
    bits, wanted = (np.ascontiguousarray(a).view(f"u{size}") for a in (got, want))
    equal = bits == wanted
    if got.dtype.kind not in "iub":
        with np.errstate(invalid="ignore"):
            equal |= np.isnan(got.astype(np.float64)) & np.isnan(want.astype(np.float64))
    wrong = np.flatnonzero(~equal)
    assert not len(wrong), f"{what}: {len(wrong)} differ, first at {wrong[0]}: " + repr(
        (got[wrong[:4]], want[wrong[:4]])
    )


@dataclass
class Case:
    """A kernel, the arrays it takes, and what must be in them afterwards."""

    lowered: Any
    arrays: list
    grid: int
    check: Any
    extra: tuple = ()


def table_case(elementwise, inputs, arrays, rows, fast_math=False):
    """rows: (what, output dtype, emit(machine, values) -> value, expected array or check)."""
    count = len(arrays[0])
    lowered = elementwise(
        lambda m, values: [row[2](m, values) for row in rows],
        inputs,
        [row[1] for row in rows],
        fast_math=fast_math,
    )
    outputs = [np.full(count * row[1].bytes, 0xA5, np.uint8).view(row[1].numpy) for row in rows]

    def check():
        for row, output in zip(rows, outputs, strict=True):
            expected = row[3]
            if callable(expected):
                expected(output)
            else:
                same(output, expected, row[0])

    return Case(lowered, [*arrays, *outputs], -(-count // 128), check, (np.int32(count),))


def integer_case(elementwise, dtype):
    a, b = specimens(dtype, seed=1), specimens(dtype, seed=2)
    rows = []
    for op in INTEGER_BINARY:
        want = evaluate_op(op, [a, b], dtype)
        out = bool_ if want.dtype == bool else dtype
        rows.append((op, out, lambda m, v, op=op: m.binary(op, *v, dtype), want))
    for op in ("neg", "not", "abs", "popcount", "clz"):
        want = evaluate_op(op, [a], dtype)
        rows.append((op, dtype, lambda m, v, op=op: m.unary(op, v[0], dtype), want))
    for number in CONSTANTS:
        if not dtype.min <= number <= dtype.max:
            continue
        for op in (*DIVIDE, "pow", "shl", "shr", "mul"):
            want = evaluate_op(op, [a, np.full_like(a, number)], dtype)
            rows.append((
                f"{op} {number}", dtype,
                lambda m, v, op=op, n=number: m.binary(op, v[0], m.const(n, dtype), dtype), want,
            ))  # fmt: skip
    return table_case(elementwise, [dtype, dtype], [a, b], rows)


def float_case(elementwise, dtype):
    a, b = specimens(dtype, seed=3), specimens(dtype, seed=4)
    rows = []
    for op in FLOAT_EXACT:
        want = evaluate_op(op, [a, b], dtype)
        out = bool_ if want.dtype == bool else dtype
        rows.append((op, out, lambda m, v, op=op: m.binary(op, *v, dtype), want))
    for op in ("neg", "abs", "sqrt", "floor", "ceil", "round", "trunc", "isnan", "isinf",
               "isfinite"):  # fmt: skip
        want = evaluate_op(op, [a], dtype)
        out = bool_ if want.dtype == bool else dtype
        rows.append((op, out, lambda m, v, op=op: m.unary(op, v[0], dtype), want))
    return table_case(elementwise, [dtype, dtype], [a, b], rows)


def function_case(elementwise, dtype, fast_math):
    rng = np.random.default_rng(7)
    a = rng.uniform(0.01, 0.99, 4096).astype(dtype.numpy)
    b = rng.uniform(0.5, 3.0, 4096).astype(dtype.numpy)
    tolerance = 1e-12 if dtype is float64 else 2e-3 if fast_math else 2e-6

    def near(op, want):
        def check(output):
            error = np.abs(output.astype(np.float64) - want) / np.maximum(np.abs(want), 1e-2)
            assert error.max() < tolerance, f"{op} {dtype}: {error.max()}"

        return check

    rows = []
    for op in FUNCTIONS:
        want = evaluate_op(op, [a.astype(np.float64)], float64)
        rows.append((op, dtype, lambda m, v, op=op: m.unary(op, v[0], dtype), near(op, want)))
    for op in ("pow", "atan2"):
        want = evaluate_op(op, [a.astype(np.float64), b.astype(np.float64)], float64)
        rows.append((op, dtype, lambda m, v, op=op: m.binary(op, *v, dtype), near(op, want)))
    return table_case(elementwise, [dtype, dtype], [a, b], rows, fast_math)


def cast_case(elementwise, source):
    a = specimens(source, seed=5)
    rows = [
        (f"{source} to {d}", d, lambda m, v, d=d: m.cast([v[0]], source, d)[0],
         cast_array(a, source, d)) for d in ALL
    ]  # fmt: skip
    return table_case(elementwise, [source], [a], rows)


def vector_cast_case(single, source, target, count):
    """`count` elements a thread, converted together, through the widest accesses."""
    threads = 64
    a = specimens(source, threads * count, seed=6)
    out = np.zeros(threads * count, target.numpy)

    def emit(m, read, write):
        def place(base, dtype, readonly):
            size = count * dtype.bytes
            offset = m.binary("mul", m.thread_index(), m.const(size, int32), int32)
            align = size & -size
            return Address("global", base, offset, align=align, readonly=readonly)

        values = m.load(place(read, source, True), source, count)
        m.store(place(write, target, False), m.cast(values, source, target), target)

    return Case(
        single(emit, 2, threads=(threads, 1, 1)), [a, out], 1,
        lambda: same(out, cast_array(a, source, target), f"{source} to {target} by {count}"),
    )  # fmt: skip


def atomic_case(single, dtype, space):
    """256 threads combine into the same place, each with its own value."""
    combines = ("add", "min", "max", "exch") + (() if dtype.is_float else ("and", "or", "xor"))
    values = np.arange(256) % 5
    values = (values != 2) if dtype.is_bool else (values + 1).astype(dtype.numpy)
    slots = np.zeros(16, dtype.numpy)
    stride = 3 * dtype.bytes if dtype.bytes < 4 else dtype.bytes  # bytes at odd places too
    slots = np.zeros(16 * 4, dtype.numpy)
    if dtype.is_bool:
        slots[:] = True
    else:
        slots[:] = np.array([3]).astype(dtype.numpy)
    start = slots.copy()
    old = np.zeros(256, dtype.numpy)

    def emit(m, source, target, before):
        index = m.thread_index()
        offset = m.binary("mul", index, m.const(dtype.bytes, int32), int32)
        value = m.load(Address("global", source, offset, 0, dtype.bytes, True), dtype)[0]
        half = m.binary("lt", index, m.const(128, int32), int32)
        base = target if space == "global" else None
        if space == "shared":
            copy_bytes(m, ("global", target), ("shared", None), slots.nbytes)
            m.issue(bar_sync(0, 256))
        for number, combine in enumerate(combines):
            place = Address(space, base, None, number * stride, dtype.bytes)
            seen = m.atomic(place, combine, value, dtype, half, want_old=number == 0)
            if number == 0:
                m.store(Address("global", before, offset, 0, dtype.bytes), [seen], dtype)
        if space == "shared":
            m.issue(bar_sync(0, 256))
            copy_bytes(m, ("shared", None), ("global", target), slots.nbytes)

    def check():
        if dtype is bool_:
            results = {"add": True, "min": False, "max": True, "and": False, "or": True}
        else:
            numbers = values[:128].astype(np.int64)
            initial = int(start.astype(np.float64)[0])
            xor = int(np.bitwise_xor.reduce(np.append(numbers, initial)))
            conjunction = int(np.bitwise_and.reduce(np.append(numbers, initial)))
            disjunction = int(np.bitwise_or.reduce(np.append(numbers, initial)))
            results = {
                "add": np.int64(initial + numbers.sum()).astype(dtype.numpy), "min": 1, "max": 5,
                "and": conjunction, "or": disjunction, "xor": xor,
            }  # fmt: skip
            if dtype.is_float and dtype.bits <= 16 and dtype is not float16:
                del results["add"]  # rounds on the way, in an order that is not ours
        for number, combine in enumerate(combines):
            got = slots[number * stride // dtype.bytes]
            if combine in results:
                assert float(got) == float(results[combine]), f"{combine} {dtype} {space}: {got}"
            elif combine == "exch":
                assert got in values
        assert not old[128:].any()  # nothing was exchanged there
        used = {number * stride // dtype.bytes for number in range(len(combines))}
        rest = [i for i in range(len(slots)) if i not in used]
        same(slots[rest], start[rest], f"neighbours of {dtype}")

    return Case(
        single(emit, 3, threads=(256, 1, 1), shared_bytes=slots.nbytes + 16),
        [values, slots, old], 1, check,
    )  # fmt: skip


def copy_bytes(m, source, sink, size):
    """Thread 0 copies words."""
    first = m.binary("eq", m.thread_index(), m.const(0, int32), int32)
    for at in range(0, size, 4):
        word = m.load(Address(*source, None, at, 4), uint32, 1, first)
        m.store(Address(*sink, None, at, 4), word, uint32, first)


def loop_case(single):
    """Loops of every kind, with steps up and down, and a break by condition."""
    last = 2**31 - 1
    bounds = np.array([(0, 10), (5, 5), (7, 3), (-3, 4), (last - 4, last), (0, 1)], np.int32)
    out = np.zeros((len(bounds), 4), np.int32)
    steps = (1, 3, -1, -2)

    def emit(m, source, sink):
        thread = m.thread_index()
        row = m.binary("mul", thread, m.const(8, int32), int32)
        low, high = m.load(Address("global", source, row, 0, 8, True), int32, 2)
        for number, step in enumerate(steps):
            state = {"sum": [m.const(0, int32)]}

            def body(i, state=state):
                odd = m.binary("and", i, m.const(1, int32), int32)
                is_odd = m.binary("ne", odd, m.const(0, int32), int32)
                total = state["sum"]

                def then():
                    total[0] = m.binary("add", total[0], m.const(1000, int32), int32)

                def orelse():
                    total[0] = m.binary("add", total[0], m.const(1, int32), int32)

                m.branch(is_odd, then, orelse, state)

            start, stop = (low, high) if step > 0 else (high, low)
            m.loop(start, stop, step, int32, body, state)
            place = m.binary("mul", thread, m.const(16, int32), int32)
            m.store(Address("global", sink, place, 4 * number, 4), state["sum"], int32)

    def check():
        for (low, high), row in zip(bounds.tolist(), out.tolist(), strict=True):
            for step, got in zip(steps, row, strict=True):
                span = range(low, high, step) if step > 0 else range(high, low, step)
                assert got == sum(1000 if i % 2 else 1 for i in span), (low, high, step)

    return Case(single(emit, 2, threads=(len(bounds), 1, 1)), [bounds, out], 1, check)


def bar_sync(barrier, threads):
    from tilejit.isa import barrier as family

    return family.bar_sync(barrier, threads)


def all_cases(elementwise, single):
    cases = {f"integer {d}": lambda d=d: integer_case(elementwise, d) for d in INTEGERS}
    for d in (float32, float64):
        cases[f"float {d}"] = lambda d=d: float_case(elementwise, d)
        cases[f"functions {d}"] = lambda d=d: function_case(elementwise, d, False)
    cases["functions float32 fast"] = lambda: function_case(elementwise, float32, True)
    for d in ALL:
        cases[f"cast {d}"] = lambda d=d: cast_case(elementwise, d)
        for space in ("global", "shared"):
            cases[f"atomic {d} {space}"] = lambda d=d, s=space: atomic_case(single, d, s)
    for source, target, count in [
        (float32, float16, 8), (float32, bfloat16, 7), (bfloat16, float32, 8),
        (float16, float32, 5), (float32, float8_e4m3fn, 16), (float8_e4m3fn, float16, 16),
        (float8_e5m2, bfloat16, 3), (float32, float8_e5m2, 6), (bfloat16, float8_e4m3fn, 4),
        (int8, float16, 16), (float16, int8, 12), (bool_, float32, 4), (float64, bfloat16, 2),
        (bfloat16, bfloat16, 8), (int8, int8, 3), (float16, bool_, 6),
    ]:  # fmt: skip
        cases[f"vector {source} to {target} by {count}"] = lambda s=source, t=target, c=count: (
            vector_cast_case(single, s, t, c)
        )
    cases["loops"] = lambda: loop_case(single)
    return cases


@pytest.mark.parametrize("name", sorted(all_cases(None, None)))
def test_machine_on_the_gpu_agrees_with_the_meaning(gpu, elementwise, single, name):
    case = all_cases(elementwise, single)[name]()
    gpu(case.lowered, case.arrays, case.extra, case.grid)
    case.check()
