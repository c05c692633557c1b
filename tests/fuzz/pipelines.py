"""Random main loops of matmuls: operands brought, converted, made by threads or held in registers,
guards, tiles beside them, one or two levels of sums, loops around, and what follows.

Knows what such a loop computes, of whole numbers, exactly. Does not know how it is run.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import numpy as np
from writing import Program

from tilejit.dtypes import as_dtype

# dtypes of A, B and the accumulator, and the magnitude of the operands
TYPES = (
    ("bfloat16", "bfloat16", "float32", 3), ("float16", "float16", "float32", 3),
    ("float16", "float16", "float16", 1), ("int8", "uint8", "int32", 9),
    ("float8_e4m3fn", "float8_e5m2", "float32", 3), ("tfloat32", "tfloat32", "float32", 3),
)  # fmt: skip
GUARDS = {
    "": lambda by, k: True,
    "k % 2 == 0": lambda by, k: k % 2 == 0,
    "by > 0": lambda by, k: by > 0,
    "k <= by": lambda by, k: k <= by,
    "flags[k] > 0": lambda by, k: k % 3 != 1,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What was drawn of a program."""

    types: tuple[str, str, str, int]
    tile: tuple[int, int, int]
    size: tuple[int, int, int]
    threads: int
    layout: tuple[bool, bool]
    left: str
    right: str
    guard: str
    whole_guard: bool
    extra: str
    two_levels: bool
    repeats: int
    stages: int | None
    kind: str
    epilogue: str
    split: int | None = None

    @property
    def rounds(self) -> int:
        return -(-self.size[2] // self.tile[2])


def drawn(seed: int) -> Plan:
    w = random.Random(f"pipeline {seed}")
    types = w.choice(TYPES)
    BM, BN, BK = w.choice([64, 64, 128]), w.choice([8, 16, 32, 64]), w.choice([32, 64])
    is_wide = as_dtype(types[0]).bits == 16
    layout = (w.random() < 0.3, w.random() < 0.4) if is_wide else (False, True)
    ragged = w.random() < 0.3
    M = BM * w.choice([1, 2, 3]) - (w.randrange(BM) if ragged else 16 * w.choice([0, 0, 1]))
    N = BN * w.choice([1, 2]) - (w.randrange(BN) if ragged else 0)
    K = BK * w.choice([1, 2, 3, 5]) - (w.randrange(BK) if ragged else 16 * w.choice([0, 1]))
    ways = ("tma", "tma", "tma", "convert", "threads")
    return Plan(
        types=types,
        tile=(BM, BN, BK),
        size=(M, N, K),
        threads=w.choice([128, 128, 256]),
        layout=layout,
        left=w.choice(ways if layout[0] else (*ways, "fragment")),
        right=w.choice(ways),
        guard=w.choice(["", "", *GUARDS]),
        whole_guard=w.random() < 0.3,
        extra=w.choice(["", "", "row", "column", "tile"]),
        two_levels=w.random() < 0.3,
        repeats=w.choice([1, 1, 2]),
        stages=w.choice([None, None, 0, 1, 2, 3, 4]),
        kind=w.choice(["T.Pipelined"] * 4 + ["T.serial"]),
        epilogue=w.choice(["", "", "bias", "relu", "cast", "tile", "twice"]),
    )


def pipeline(seed: int) -> Program:
    return _program(drawn(seed), seed)


def in_rows(seed: int) -> Program:
    """Loops that only multiply, of warpgroups with two or three rows of instructions."""
    plan, w = drawn(seed), random.Random(f"rows {seed}")
    threads, each = 256, 2 if as_dtype(plan.types[0]).bits == 32 else w.choice([2, 2, 3])
    BM, (_, N, K) = threads // 128 * 64 * each, plan.size
    M = BM * w.choice([1, 2]) - w.choice([0, 0, 40, 77])
    K = min(K, 136)  # no loop that blocks would share
    fresh = dataclasses.replace(
        plan, tile=(BM, plan.tile[1], 32), size=(M, N, K), threads=threads, left="tma", right="tma",
        guard="", extra=w.choice(["", "", "", "row"]), two_levels=False, repeats=1,
        kind="T.Pipelined", stages=w.choice([None, None, 2, 3]),
    )  # fmt: skip
    return _program(fresh, seed)


def in_parts(seed: int) -> Program:
    """Loops whose iterations blocks share, in clusters or not."""
    plan, w = drawn(seed), random.Random(f"parts {seed}")
    BK = 32 if as_dtype(plan.types[0]).bits > 8 else 64
    BN = w.choice([16, 32, 48, 64])
    K = BK * w.choice([2, 3, 5, 8]) - w.choice([0, 8])
    fresh = dataclasses.replace(
        plan, tile=(plan.tile[0], BN, BK), size=(plan.size[0], min(plan.size[1], 2 * BN), K),
        left=w.choice(["tma", "tma", "convert"]), right="tma", guard="", extra="", repeats=1,
        two_levels=False, kind="T.Pipelined", split=w.choice([2, 2, 3, 4, 6, 8]),
    )  # fmt: skip
    return _program(fresh, seed)


def _program(plan: Plan, seed: int) -> Program:
    rng = np.random.default_rng(seed)
    limit = plan.types[3]
    M, N, K = plan.size

    def whole(shape: tuple[int, ...], dtype: str, low: int = -limit) -> np.ndarray:
        return rng.integers(low, limit + 1, shape).astype(as_dtype(dtype).numpy)

    a = whole((M, K), _stored(plan.types[0], plan.left))
    b = whole((K, N), _stored(plan.types[1], plan.right), 0 if plan.types[1] == "uint8" else -limit)
    arrays = {
        "A": np.ascontiguousarray(a.T) if plan.layout[0] else a,
        "B": np.ascontiguousarray(b.T) if plan.layout[1] else b,
        "E": whole((8 * plan.rounds, 64), "float32"),
        "flags": np.array([k % 3 != 1 for k in range(plan.rounds)], np.int32),
        "bias": whole((N,), "float32"),
        "C": np.full((M, N), np.nan, np.float32),
        "D": np.full((8 * plan.rounds, 64), np.nan, np.float32),
    }
    expected = {"C": _product(plan, arrays, a, b), "D": _passed(plan, arrays)}
    return Program(
        source=_source(plan),
        arrays=arrays,
        outputs=("C", "D"),
        declared=frozenset(),
        scalars={},
        expected=expected,
        twins={},
        has_sums=True,
    )


def _stored(dtype: str, way: str) -> str:
    """The dtype of the tensor that an operand comes from."""
    if way == "convert":
        return "float32" if as_dtype(dtype).bytes < 4 and not as_dtype(dtype).is_integer else "int8"
    return "float32" if dtype == "tfloat32" else dtype


def _product(plan: Plan, arrays: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C: what the guards let through, once for each time around, and the epilogue."""
    (M, N, K), (BM, _, BK) = plan.size, plan.tile
    left, right = a.astype(np.float64), b.astype(np.float64)
    left = left * (2 if plan.left == "threads" else 1)
    right = right * (2 if plan.right == "threads" else 1)
    total = np.zeros((M, N))
    scale = arrays["E"].astype(np.float64)
    for by in range(-(-M // BM)):
        rows = slice(by * BM, min(M, by * BM + BM))
        for k in range(plan.rounds):
            if not GUARDS[plan.guard](by, k):
                continue
            columns = slice(k * BK, min(K, k * BK + BK))
            part = left[rows, columns] @ right[columns]
            if plan.two_levels and plan.extra == "row":
                part *= scale[8 * k, 0]
            total[rows] += part * plan.repeats
    if plan.epilogue == "bias":
        total += arrays["bias"]
    elif plan.epilogue == "relu":
        total = np.maximum(total, 0)
    elif plan.epilogue == "twice":
        total *= 2
    assert np.abs(total).max(initial=0) < (2**11 if plan.types[2] == "float16" else 2**24)
    return total.astype(np.float32)


def _passed(plan: Plan, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """D: what the tiles beside the operands were, moved on by the threads."""
    result = arrays["D"].copy()
    e = arrays["E"]
    for k in range(plan.rounds):
        rows = slice(8 * k, 8 * k + 8)
        if plan.whole_guard and not GUARDS[plan.guard](0, k):
            continue
        if plan.extra == "row":
            result[8 * k] = e[8 * k] + 1
        elif plan.extra == "column":
            result[rows, 3] = e[rows, 3] + 1
        elif plan.extra == "tile":
            result[rows] = e[rows] + 1
    return result


def _source(plan: Plan) -> str:
    BM, BN, BK = plan.tile
    a, b, acc, _ = plan.types
    tA, tB = plan.layout
    a_shape = (BK, BM) if tA else (BM, BK)
    b_shape = (BN, BK) if tB else (BK, BN)
    stages = (
        "" if plan.stages is None or plan.kind != "T.Pipelined" else f", num_stages={plan.stages}"
    )
    if plan.split is not None:
        stages += f", split={plan.split}"
    lines = [
        "M, N = C.shape",
        f"K = A.shape[{int(not tA)}]",
        f"grid = T.ceildiv(N, {BN}), T.ceildiv(M, {BM})",
        f"with T.Kernel(*grid, threads={plan.threads}) as (bx, by):",
        f'    a = T.alloc_{"fragment" if plan.left == "fragment" else "shared"}({a_shape}, "{a}")',
        f'    b = T.alloc_shared({b_shape}, "{b}")',
        '    row = T.alloc_shared((64,), "float32")',
        '    column = T.alloc_shared((8,), "float32")',
        '    tile = T.alloc_shared((8, 64), "float32")',
        f'    acc = T.alloc_fragment(({BM}, {BN}), "{acc}")',
        f'    part = T.alloc_fragment(({BM}, {BN}), "{acc}")',
        "    T.clear(acc)",
    ]
    loop = _loop(plan, a_shape, b_shape)
    head = f"for k in {plan.kind}(T.ceildiv(K, {BK}){stages}):"
    if plan.repeats > 1:
        lines += [f"    for again in T.serial({plan.repeats}):", f"        {head}"]
        lines += ["            " + line for line in loop]
    else:
        lines += [f"    {head}", *("        " + line for line in loop)]
    lines += ["    " + line for line in _epilogue(plan)]
    parameters = "A: T.Tensor, B: T.Tensor, E: T.Tensor, flags: T.Tensor, bias: T.Tensor, " \
        "C: T.Tensor, D: T.Tensor"  # fmt: skip
    return "\n".join([
        "import tilejit.language as T", "from tilejit import tilejit", "", "", "@tilejit",
        f"def kernel({parameters}):", *("    " + line for line in lines), "",
    ])  # fmt: skip


def _loop(plan: Plan, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> list[str]:
    BM, BN, BK = plan.tile
    tA, tB = plan.layout
    a_at = (f"k * {BK}", f"by * {BM}") if tA else (f"by * {BM}", f"k * {BK}")
    b_at = (f"bx * {BN}", f"k * {BK}") if tB else (f"k * {BK}", f"bx * {BN}")
    body = [
        *_filled("A", "a", plan.left, a_at, a_shape),
        *_filled("B", "b", plan.right, b_at, b_shape),
    ]
    body += _beside(plan)
    target = "part" if plan.two_levels else "acc"
    clear = ", clear_accum=True" if plan.two_levels else ""
    product = [f"T.gemm(a, b, {target}, transpose_A={tA}, transpose_B={tB}{clear})"]
    if plan.two_levels:
        scale = " * row[0]" if plan.extra == "row" else ""
        product += [
            f"for i, j in T.Parallel({BM}, {BN}):",
            f"    acc[i, j] += part[i, j]{scale}",
        ]
    if plan.guard and plan.whole_guard:
        return [f"if {plan.guard}:", *("    " + line for line in (*body, *product))]
    if plan.guard:
        return [*body, f"if {plan.guard}:", *("    " + line for line in product)]
    return [*body, *product]


def _filled(
    tensor: str, tile: str, way: str, at: tuple[str, str], shape: tuple[int, int]
) -> list[str]:
    if way != "threads":
        return [f"T.copy({tensor}[{at[0]}, {at[1]}], {tile})"]
    return [
        f"for i, j in T.Parallel({shape[0]}, {shape[1]}):",
        f"    {tile}[i, j] = {tensor}[{at[0]} + i, {at[1]} + j] * 2",
    ]


def _beside(plan: Plan) -> list[str]:
    """A tile of E that the first row of blocks hands on to D; all see it."""
    first = "if (bx == 0) & (by == 0):"
    if plan.extra == "row":
        return [
            "T.copy(E[8 * k, 0], row)", first,
            "    for i in T.Parallel(64):", "        D[8 * k, i] = row[i] + 1",
        ]  # fmt: skip
    if plan.extra == "column":
        return [
            "T.copy(E[8 * k : 8 * k + 8, 3], column)", first,
            "    for i in T.Parallel(8):", "        D[8 * k + i, 3] = column[i] + 1",
        ]  # fmt: skip
    if plan.extra == "tile":
        return [
            "T.copy(E[8 * k, 0], tile)", first,
            "    for i, j in T.Parallel(8, 64):", "        D[8 * k + i, j] = tile[i, j] + 1",
        ]  # fmt: skip
    return []


def _epilogue(plan: Plan) -> list[str]:
    BM, BN, _ = plan.tile
    loop = f"for i, j in T.Parallel({BM}, {BN}):"
    store = f"T.copy(acc, C[by * {BM}, bx * {BN}])"
    by_kind: dict[str, list[str]] = {
        "": [store],
        "bias": [loop, f"    acc[i, j] += bias[bx * {BN} + j]", store],
        "relu": [loop, "    acc[i, j] = T.max(acc[i, j], 0)", store],
        "cast": [
            f'low = T.alloc_fragment(({BM}, {BN}), "float32")', "T.copy(acc, low)",
            f"T.copy(low, C[by * {BM}, bx * {BN}])",
        ],
        "tile": [
            f'kept = T.alloc_shared(({BM}, {BN}), "float32")', "T.copy(acc, kept)",
            f"T.copy(kept, C[by * {BM}, bx * {BN}])",
        ],
        "twice": [store, loop, "    acc[i, j] *= 2", store],
    }  # fmt: skip
    return by_kind[plan.epilogue]
