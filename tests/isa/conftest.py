"""Lanes to execute an instruction's meaning on, and PTX text made of instruction records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tilejit import dtypes
from tilejit.isa import barrier, cp_async, ldmatrix, mbarrier, mma, special
from tilejit.isa.instruction import Instruction
from tilejit.target import Target

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
    *(special.shuffle(mode) for mode in ("idx", "bfly")),
    *(
        value
        for module in (barrier, mbarrier, special)
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


class Lanes:
    """Whole warps with flat shared memory and global memory that starts at address 4096."""

    BASE = 4096

    def __init__(self, count: int) -> None:
        self.thread = np.arange(count, dtype=np.int32)
        self.active = np.ones(count, bool)
        self.shared = np.zeros(1 << 14, np.uint8)
        self.memory = np.zeros(1 << 14, np.uint8)
        self.calls: list[tuple[Any, ...]] = []

    def read(self, space: str, address: np.ndarray, size: int) -> np.ndarray:
        assert space == "shared"
        places = address.astype(np.int64)[:, None] + np.arange(size)
        return np.where(self.active[:, None], self.shared[places], np.uint8(0))

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
    """A PTX module with one kernel an instruction, k0, k1, ...: each lane loads the inputs
    (8 bytes each, input by input), executes the instruction and stores the outputs likewise.
    Before that, the block's shared memory is filled with words equal to their number."""

    def write(target: Target, instructions: Sequence[Instruction]) -> str:
        # 8.7: the first version with sm_120a
        parts = [f".version 8.7\n.target {target.name}\n.address_size 64\n"]
        parts += [_write_kernel(f"k{i}", one, i) for i, one in enumerate(instructions)]
        return "\n".join(parts)

    return write


def _write_kernel(name: str, instruction: Instruction, uid: int) -> str:
    inputs = [f"%{REGISTERS[d][1]}{i}" for i, d in enumerate(instruction.inputs)]
    outputs = [f"%{REGISTERS[d][1]}{100 + i}" for i, d in enumerate(instruction.outputs)]
    lines = [f".visible .entry {name}(.param .u64 source, .param .u64 sink)", "{"]
    lines += [f".reg .{kind} %{prefix}<200>;" for kind, prefix in REGISTERS.values()]
    lines += [
        ".shared .align 16 .b8 memory[4096];",
        "mov.u32 %r150, %tid.x;",
        "mul.wide.u32 %d150, %r150, 8;",
        "ld.param.u64 %d151, [source];",
        "ld.param.u64 %d152, [sink];",
        "add.u64 %d151, %d151, %d150;",
        "add.u64 %d152, %d152, %d150;",
        "mov.u32 %r151, memory;",
        "mad.lo.u32 %r152, %r150, 4, %r151;",
    ]
    for row in range(32):
        lines += [
            f"add.u32 %r153, %r150, {32 * row};",
            f"st.shared.b32 [%r152+{128 * row}], %r153;",
        ]
    lines.append("bar.sync 0;")
    for i, dtype in enumerate(instruction.inputs):
        lines.append(f"ld.global.{REGISTERS[dtype][0]} {inputs[i]}, [%d151+{256 * i}];")
    if "shared" in instruction.ptx:
        lines.append(f"add.u32 {inputs[0]}, {inputs[0]}, %r151;")
    lines.append(write_call(instruction, outputs, inputs, uid))
    for i, dtype in enumerate(instruction.outputs):
        lines.append(f"st.global.{REGISTERS[dtype][0]} [%d152+{256 * i}], {outputs[i]};")
    return "\n".join([*lines, "ret;", "}"])
