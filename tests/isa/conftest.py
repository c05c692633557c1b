"""Lanes to execute an instruction's meaning on, and PTX text made of instruction records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tilejit import dtypes
from tilejit.isa import (
    barrier,
    cluster,
    cp_async,
    launch,
    ldmatrix,
    mbarrier,
    mma,
    registers,
    special,
    stmatrix,
    tma,
    wgmma,
)
from tilejit.isa.instruction import Instruction
from tilejit.isa.wgmma_fragments import WGMMA
from tilejit.layout.shared import SharedLayout
from tilejit.target import Target


def wgmma_examples() -> list[Instruction]:
    """Each type with its narrowest and widest instruction, and each way to spell a sequence."""
    types = dict.fromkeys(key[:3] for key in WGMMA)
    single = {"rows": 1, "columns": 1, "steps": 1, "b_offsets": ((0,),)}
    result = []
    for key in types:
        widths = [k[3] for k in WGMMA if k[:3] == key]
        for n in (min(widths), 24, max(widths)):
            result.append(wgmma.wgmma_sequence(WGMMA[*key, n], a_offsets=((0,),), **single))
        result.append(wgmma.wgmma_sequence(WGMMA[*key, 48], a_registers=True, **single))
    one = WGMMA[dtypes.bfloat16, dtypes.bfloat16, dtypes.float32, 32]
    several = {"rows": 2, "columns": 3, "steps": 2, "b_offsets": ((0, 2), (64, 66), (-128, 5))}
    for scaled in (False, True):
        for turned in (False, True):
            options = {"scaled": scaled, "transpose_b": turned, **several}
            result.append(wgmma.wgmma_sequence(one, a_registers=True, **options))
            options |= {"transpose_a": not turned, "a_offsets": ((0, 2), (512, 514))}
            result.append(wgmma.wgmma_sequence(one, **options))
    return result


INSTRUCTIONS: tuple[Instruction, ...] = (
    *(one.instruction for one in mma.MMA),
    *(ldmatrix.ldmatrix(count, trans) for count in (1, 2, 4) for trans in (False, True)),
    *(cp_async.cp_async(size) for size in (4, 8, 16)),
    cp_async.cp_async(16, is_cached=True),
    cp_async.COMMIT_GROUP,
    cp_async.WAIT_ALL,
    cp_async.wait_group(0),
    cp_async.wait_group(3),
    barrier.bar_sync(0, 100),
    barrier.bar_sync(1, 128),
    barrier.bar_arrive(3, 256),
    special.PERMUTE,
    *(special.shuffle(mode) for mode in ("idx", "bfly", "up", "down")),
    *(stmatrix.stmatrix(count, trans) for count in (1, 2, 4) for trans in (False, True)),
    *(
        make(bits)
        for make in (cluster.load_cluster, cluster.store_cluster, cluster.send)
        for bits in (32, 64)
    ),
    registers.setmaxnreg(24, False),
    registers.setmaxnreg(240, True),
    *(
        tma.tma_load(rank, multicast, hint)
        for rank in range(1, 6)
        for multicast in (False, True)
        for hint in (False, True)
    ),
    *(tma.tma_store(rank, hint) for rank in range(1, 6) for hint in (False, True)),
    *(make(rank) for make in (tma.tma_reduce_add, tma.tma_prefetch) for rank in range(1, 6)),
    *(tma.wait_stores(pending, read) for pending in (0, 2) for read in (False, True)),
    *wgmma_examples(),
    wgmma.wait_group(0, ()),
    wgmma.wait_group(1, (dtypes.float32,) * 128),
    wgmma.wait_group(7, (dtypes.uint32, dtypes.int32, dtypes.float32)),
    *(
        value
        for module in (barrier, mbarrier, special, cluster, launch, tma, wgmma)
        for value in vars(module).values()
        if isinstance(value, Instruction)
    ),
)

# Register classes of PTX: declaration and prefix
REGISTERS = {
    dtypes.uint16: ("b16", "h"),
    dtypes.uint32: ("b32", "r"),
    dtypes.int32: ("b32", "i"),
    dtypes.float32: ("f32", "f"),
    dtypes.uint64: ("b64", "d"),
    dtypes.float64: ("f64", "g"),
}


SHARED_BYTES = 48 * 1024  # of the fake lanes, and of each kernel of a module


class Lanes:
    """Whole warps with flat shared memory and global memory that starts at address 4096."""

    BASE = 4096

    def __init__(self, count: int) -> None:
        self.thread = np.arange(count, dtype=np.int32)
        self.active = np.ones(count, bool)
        self.shared = np.zeros(SHARED_BYTES, np.uint8)
        self.memory = np.zeros(1 << 14, np.uint8)
        self.calls: list[tuple[Any, ...]] = []
        self.products: list[tuple[np.ndarray, Any]] = []

    def read(self, space: str, address: np.ndarray, size: int) -> np.ndarray:
        assert space == "shared"
        places = address.astype(np.int64)[:, None] + np.arange(size)
        return np.where(self.active[:, None], self.shared[places], np.uint8(0))

    def write(
        self, space: str, address: np.ndarray, data: np.ndarray, where: np.ndarray | None = None
    ) -> None:
        assert space == "shared"
        on = self.active if where is None else self.active & where
        places = address[on].astype(np.int64)[:, None] + np.arange(data.shape[1])
        self.shared[places] = data[on]

    def start_product(self, warpgroup: int, reads: np.ndarray, finish: Any) -> None:
        self.calls.append(("start_product", warpgroup))
        self.products.append((reads, finish))

    def wait_products(self, pending: int) -> None:
        self.calls.append(("wait_products", pending))
        if pending == 0:
            for reads, finish in self.products:
                finish(self.shared[reads[:, None] + np.arange(16)])
            self.products.clear()

    def map_shared(self, address: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return address | rank << np.uint32(24)

    def copy_async(
        self, shared: np.ndarray, source: np.ndarray, size: int, valid: np.ndarray
    ) -> None:
        for lane in np.nonzero(self.active)[0]:
            start, count = int(source[lane]) - self.BASE, int(valid[lane])
            piece = np.zeros(size, np.uint8)
            piece[:count] = self.memory[start : start + count]
            self.shared[int(shared[lane]) : int(shared[lane]) + size] = piece

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, *arguments))


def write_call(
    instruction: Instruction, outputs: Sequence[str], inputs: Sequence[str], uid: int
) -> str:
    """The instruction with the registers filled in."""
    text = instruction.ptx.replace("${uid}", str(uid))
    for letter, names in (("d", outputs), ("a", inputs)):
        for i in reversed(range(len(names))):
            text = text.replace(f"${letter}{i}", names[i])
    assert "$" not in text, f"{instruction}: {text}"
    return text


@dataclass
class Product:
    """A sequence of products with its operands.

    content: shared memory before it. inputs: of its registers, (128,) each. layout: of the
    result, `expected`.
    """

    instruction: Instruction
    inputs: list[np.ndarray]
    content: np.ndarray
    expected: np.ndarray
    layout: Any

    def run(self, lanes: Lanes) -> np.ndarray:
        """The result of the product's meaning after its wait."""
        lanes.shared[:] = self.content
        outputs = self.instruction.meaning(lanes, self.inputs)
        wait = wgmma.wait_group(0, self.instruction.outputs)
        return self.matrix(wait.meaning(lanes, outputs))

    def matrix(self, registers: Sequence[np.ndarray]) -> np.ndarray:
        """The matrix that a warpgroup holds in its accumulators."""
        words = np.stack(registers, axis=1)
        is_packed = words.shape[1] < self.layout.registers
        elements = words.view(np.float16) if is_packed else words
        result = np.full(self.layout.shape, np.nan)
        for r in range(self.layout.registers):
            result[self.layout.coordinates(np.arange(128), r)] = elements[:, r]
        return result


SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a descriptor's layout modes


def _small(rng: np.random.Generator, shape: tuple[int, ...], dtype: dtypes.DType) -> np.ndarray:
    """Numbers whose products' sums are exact in any order."""
    if dtype.is_integer:
        return rng.integers(dtype.min, dtype.max + 1, shape).astype(dtype.numpy)
    return rng.integers(-3, 4, shape).astype(dtype.numpy)


def _place(
    content: np.ndarray, start: int, matrix: np.ndarray, mode: int, turned: bool, tile: int, k: int
) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Put an operand (rows of M or N, K) into shared memory at `start` as the layout mode wants;
    its descriptor, and the offsets of instructions of `tile` rows and `k` of K."""
    itemsize, span = matrix.itemsize, SPANS[mode]
    raw = np.ascontiguousarray(matrix.T if turned else matrix).view(f"u{itemsize}")
    rows, columns = raw.shape
    if mode:
        width = span // itemsize
        padded = -(-columns // width) * width
        layout = SharedLayout((rows, padded), itemsize, panel=width, swizzle=span // 16)
        places, lbo, sbo = layout.table()[:, :columns], rows * span, 8 * span
    else:  # blocks of 8 rows of 16 bytes: of one column of blocks after another, or of one row
        row, byte = np.indices((rows, columns * itemsize))[:, :, ::itemsize]
        far, near = (columns * itemsize * 8, 128) if turned else (rows * 16, 128)
        steps = (far, near) if turned else (near, far)
        places = row // 8 * steps[0] + byte // 16 * steps[1] + row % 8 * 16 + byte % 16
        lbo, sbo = far, near
    content[(start + places)[..., None] + np.arange(itemsize)] = raw[..., None].view(np.uint8)
    offsets = tuple(
        tuple(int(places[(j, i) if turned else (i, j)]) // 16 for j in range(0, matrix.shape[1], k))
        for i in range(0, matrix.shape[0], tile)
    )
    return wgmma.descriptor_constant(mode, lbo, sbo) | start >> 4, offsets


@pytest.fixture
def make_product():
    """`make_product(one, ...)` makes operands of small numbers, places them and says what comes
    out. a_mode: None for A in registers."""

    def make(one, a_mode=1, b_mode=1, a_turned=False, b_turned=False, rows=1, columns=1, steps=4,
             scale=None) -> Product:  # fmt: skip
        rng = np.random.default_rng(one.n)
        a = _small(rng, (rows * one.m, steps * one.k), one.a)
        b = _small(rng, (columns * one.n, steps * one.k), one.b)
        acc_type = dtypes.int8 if one.acc.is_integer else one.acc
        acc = _small(rng, (len(a), len(b)), acc_type).astype(one.acc.numpy)
        content = rng.integers(0, 256, SHARED_BYTES).astype(np.uint8)
        options: dict[str, Any] = {"rows": rows, "columns": columns, "steps": steps}
        layout = wgmma.tile_acc(one, *acc.shape, 1, 1)
        inputs = _registers_of(acc, layout)
        end = 0
        if a_mode is None:
            options["a_registers"] = True
            inputs += _registers_of(a, wgmma.tile_a(one, *a.shape, 1, 1), np.uint32)
        else:
            base, options["a_offsets"] = _place(content, 0, a, a_mode, a_turned, one.m, one.k)
            inputs.append(np.full(128, base, np.uint64))
            end = -(-a.nbytes // 1024) * 1024
        base, options["b_offsets"] = _place(content, end, b, b_mode, b_turned, one.n, one.k)
        inputs.append(np.full(128, base, np.uint64))
        if scale is not None:
            inputs.append(np.full(128, scale, np.uint32))
        instruction = wgmma.wgmma_sequence(
            one, transpose_a=a_turned, transpose_b=b_turned, scaled=scale is not None, **options
        )
        expected = a.astype(np.float64) @ b.astype(np.float64).T
        if scale != 0:
            expected += acc
        return Product(instruction, inputs, content, expected, layout)

    return make


def _registers_of(matrix: np.ndarray, layout: Any, numpy: Any = None) -> list[np.ndarray]:
    """The registers of the matrix's fragment, one array a register."""
    threads = np.arange(layout.threads)
    elements = np.stack(
        [matrix[layout.coordinates(threads, r)] for r in range(layout.registers)], axis=1
    )
    numpy = numpy or (np.uint32 if matrix.itemsize < 4 else matrix.dtype)
    return list(np.ascontiguousarray(np.ascontiguousarray(elements).view(numpy).T))


@pytest.fixture
def make_lanes() -> type[Lanes]:
    return Lanes


@pytest.fixture(params=INSTRUCTIONS, ids=lambda instruction: instruction.name)
def instruction(request: pytest.FixtureRequest) -> Instruction:
    return request.param


@pytest.fixture
def instructions() -> tuple[Instruction, ...]:
    return INSTRUCTIONS


@pytest.fixture
def write_module():
    """A PTX module with one kernel an instruction, k0, k1, ..., for `threads` threads: each loads
    the inputs (8 bytes each, input by input), executes the instruction and stores the outputs
    likewise. Before that the block's shared memory is filled from `content` and afterwards written
    back there; shared addresses and matrix descriptors among the inputs count from its start."""

    def write(target: Target, instructions: Sequence[Instruction], threads: int = 32) -> str:
        # 8.7: the first version with sm_120a
        parts = [f".version 8.7\n.target {target.name}\n.address_size 64\n"]
        parts += [_write_kernel(f"k{i}", one, i, threads) for i, one in enumerate(instructions)]
        return "\n".join(parts)

    return write


def _write_kernel(name: str, instruction: Instruction, uid: int, threads: int) -> str:
    inputs = [f"%{REGISTERS[d][1]}{i}" for i, d in enumerate(instruction.inputs)]
    outputs = [f"%{REGISTERS[d][1]}{300 + i}" for i, d in enumerate(instruction.outputs)]
    lines = [
        f".visible .entry {name}(.param .u64 source, .param .u64 sink, .param .u64 content)",
        f".maxntid {threads}",
        "{",
    ]
    lines += [f".reg .{kind} %{prefix}<600>;" for kind, prefix in REGISTERS.values()]
    lines += [
        ".reg .pred %more;",
        f".shared .align 1024 .b8 memory[{SHARED_BYTES}];",
        "mov.u32 %r500, %tid.x;",
        "mul.wide.u32 %d500, %r500, 8;",
        "ld.param.u64 %d501, [source];",
        "ld.param.u64 %d502, [sink];",
        "ld.param.u64 %d503, [content];",
        "add.u64 %d501, %d501, %d500;",
        "add.u64 %d502, %d502, %d500;",
        "mov.u32 %r501, memory;",
        *_copy("fill", threads, "ld.global.b32 %r504, [%d504]; st.shared.b32 [%r503], %r504;"),
        "fence.proxy.async.shared::cta;" if "wgmma" in instruction.ptx else "",
        "bar.sync 0;",
    ]
    for i, dtype in enumerate(instruction.inputs):
        lines.append(f"ld.global.{REGISTERS[dtype][0]} {inputs[i]}, [%d501+{8 * threads * i}];")
    lines += _relocate(instruction, inputs)
    lines += [
        f"mov.{REGISTERS[d][0]} {outputs[i]}, {inputs[i]};"
        for i, d in enumerate(instruction.outputs[: instruction.tied])
    ]
    lines.append(write_call(instruction, outputs, inputs, uid))
    for i, dtype in enumerate(instruction.outputs):
        lines.append(f"st.global.{REGISTERS[dtype][0]} [%d502+{8 * threads * i}], {outputs[i]};")
    lines.append("bar.sync 0;")
    lines += _copy("keep", threads, "ld.shared.b32 %r504, [%r503]; st.global.b32 [%d504], %r504;")
    return "\n".join([*lines, "ret;", "}"])


def _copy(label: str, threads: int, move: str) -> list[str]:
    """Move the words of shared memory, at %r503, and of `content`, at %d504, one after another."""
    return [
        "mul.lo.u32 %r502, %r500, 4;",
        f"{label}:",
        "add.u32 %r503, %r501, %r502;",
        "cvt.u64.u32 %d504, %r502;",
        "add.u64 %d504, %d503, %d504;",
        move,
        f"add.u32 %r502, %r502, {4 * threads};",
        f"setp.lt.u32 %more, %r502, {SHARED_BYTES};",
        f"@%more bra {label};",
    ]


def _relocate(instruction: Instruction, inputs: Sequence[str]) -> list[str]:
    """Add the start of shared memory to the inputs that are places there."""
    if "wgmma.mma" in instruction.ptx:
        lines = ["shr.u32 %r505, %r501, 4;", "cvt.u64.u32 %d505, %r505;"]
        places = [i for i, d in enumerate(instruction.inputs) if d is dtypes.uint64]
        return lines + [f"add.u64 {inputs[i]}, {inputs[i]}, %d505;" for i in places]
    is_place = instruction.inputs[:1] == (dtypes.uint32,) and not instruction.tied
    if "shared" in instruction.ptx and is_place:
        return [f"add.u32 {inputs[0]}, {inputs[0]}, %r501;"]
    return []
