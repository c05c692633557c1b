"""Two matmuls in Triton: a persistent one with tensor maps, and a plain one with pointers."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles are walked column by column."""
    first = tile // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def persistent(
    a_map, b_map, c_map, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr,
    TRANSPOSED: tl.constexpr, SUM: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Every block multiplies each BLOCKS-th tile of C; PARTS of a tile are stored in turn."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # A second counter for the stores lets the next tile's loads start before them.
    stored = tl.program_id(0) - BLOCKS
    for tile in tl.range(tl.program_id(0), rows * columns, BLOCKS, flatten=True):
        row, column = place(tile, rows, columns, GROUP)
        acc = tl.zeros((BM, BN), dtype=SUM)
        for step in range(tl.cdiv(K, BK)):
            a = a_map.load([row * BM, step * BK])
            if TRANSPOSED:
                b = b_map.load([column * BN, step * BK]).T
            else:
                b = b_map.load([step * BK, column * BN])
            acc = tl.dot(a, b, acc, input_precision="tf32", out_dtype=SUM)
        stored += BLOCKS
        row, column = place(stored, rows, columns, GROUP)
        if PARTS == 2:
            halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            c_map.store([row * BM, column * BN], left.to(OUT))
            c_map.store([row * BM, column * BN + BN // 2], right.to(OUT))
        else:
            c_map.store([row * BM, column * BN], acc.to(OUT))


@triton.jit
def blocked(
    a, b, c, M, N, K, b_k, b_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUM: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """One tile of C a block, through pointers; BK must divide K and BN N."""
    row, column = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    # rows past the end are read from the start instead, and never stored
    a_at = a + (m % M)[:, None].to(tl.int64) * K + k[None, :]
    b_at = b + k[:, None] * b_k + n[None, :].to(tl.int64) * b_n
    acc = tl.zeros((BM, BN), dtype=SUM)
    for _ in range(K // BK):
        acc = tl.dot(tl.load(a_at), tl.load(b_at), acc, input_precision="tf32", out_dtype=SUM)
        a_at += BK
        b_at += BK * b_k
    c_at = c + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(c_at, acc.to(OUT), mask=m[:, None] < M)


# kernel, BM, BN, BK of 2-byte elements, warps, stages, parts of a stored tile
LARGE = (
    ("persistent", 128, 256, 64, 8, 3, 2),
    ("persistent", 128, 256, 64, 8, 4, 2),
    ("persistent", 128, 128, 64, 4, 4, 1),
    ("blocked", 128, 256, 64, 8, 3, 1),
    ("persistent", 128, 128, 64, 8, 4, 2),
    ("blocked", 128, 128, 64, 4, 4, 1),
)
SMALL = (
    ("persistent", 64, 128, 64, 4, 6, 1),
    ("blocked", 64, 128, 64, 4, 5, 1),
    ("blocked", 16, 128, 64, 4, 5, 1),
    ("blocked", 64, 64, 64, 4, 6, 1),
    ("blocked", 16, 64, 128, 4, 5, 1),
)
TYPES = {
    "bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32, "int32": tl.int32,
}  # fmt: skip


def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function that compiles and gives the call."""
    case = operands.case
    found = SMALL + LARGE[2:3] if case.M < 128 else LARGE + SMALL[:1]
    for kind, BM, BN, BK, warps, stages, parts in found[: 3 if quick else None]:
        BK = BK * 2 // operands.a.element_size()
        name = f"{kind} {BM}x{BN}x{BK}, {stages} stages, {warps} warps"
        constants = {"BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": stages}
        build = _persistent if kind == "persistent" else _blocked
        yield name, functools.partial(build, operands, constants, parts)


def _constants(operands: Any, constants: dict[str, int]) -> dict[str, Any]:
    total = tl.int32 if operands.case.dtype == "int8" else tl.float32
    out = TYPES[operands.case.precision.out]
    return {**constants, "GROUP": 8, "SUM": total, "OUT": out}


def _persistent(operands: Any, constants: dict[str, int], parts: int) -> Callable[[], Any]:
    case, c = operands.case, operands.c
    BM, BN, BK = constants["BM"], constants["BN"], constants["BK"]
    a_map = TensorDescriptor.from_tensor(operands.a, [BM, BK])
    b_map = TensorDescriptor.from_tensor(operands.b, [BN, BK] if case.is_transposed else [BK, BN])
    c_map = TensorDescriptor.from_tensor(c, [BM, BN // parts])
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    blocks = min(processors, triton.cdiv(case.M, BM) * triton.cdiv(case.N, BN))
    words = _constants(operands, constants)
    words |= {"PARTS": parts, "BLOCKS": blocks, "TRANSPOSED": case.is_transposed}

    def call() -> Any:
        persistent[(blocks,)](a_map, b_map, c_map, case.M, case.N, case.K, **words)
        return c

    return call


def _blocked(operands: Any, constants: dict[str, int], parts: int) -> Callable[[], Any]:
    case, a, b, c = operands.case, operands.a, operands.b, operands.c
    if case.K % constants["BK"] or case.N % constants["BN"]:
        raise ValueError("the plain kernel's tile does not divide N or K")
    b_k, b_n = (1, b.stride(0)) if case.is_transposed else (b.stride(0), 1)
    blocks = triton.cdiv(case.M, constants["BM"]) * triton.cdiv(case.N, constants["BN"])
    words = _constants(operands, constants)

    def call() -> Any:
        blocked[(blocks,)](a, b, c, case.M, case.N, case.K, b_k, b_n, **words)
        return c

    return call
