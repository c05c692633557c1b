"""wgmma: four warps multiply tiles in shared memory while they go on with other work.

Knows how products are issued and waited for, and what they mean; records, fragments and operands in
shared memory are the files beside it. Does not know how operands come there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np

from tilejit import dtypes
from tilejit.dtypes import DType
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.isa.tma import CHUNK
from tilejit.isa.wgmma_fragments import (
    NEEDS,
    PTX_TYPE,
    WARPGROUP,
    WgmmaInstruction,
    find_wgmma,
    fragment_a,
    fragment_acc,
    tile_a,
    tile_acc,
    whole_warpgroups,
)
from tilejit.isa.wgmma_operands import (
    K_BYTES,
    descriptor_constant,
    operand_chunks,
    operand_matrix,
)
from tilejit.layout.fragment import FragmentLayout

__all__ = [
    "MAX_PENDING", "WARPGROUP", "WGMMA_COMMIT", "WGMMA_FENCE", "Offsets", "WgmmaInstruction",
    "descriptor_constant", "find_wgmma", "fragment_a", "fragment_acc", "tile_a", "tile_acc",
    "wait_group", "wgmma_sequence", "whole_warpgroups",
]  # fmt: skip

MAX_PENDING = 7
# What accumulators hold while a product is on its way: NaN, or a large odd number
_POISON = np.uint32(0x7FFF7FFF)

Offsets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Sequence:
    """What `wgmma_sequence` was asked for, its text and its meaning."""

    one: WgmmaInstruction
    rows: int
    columns: int
    steps: int
    a_offsets: Offsets
    b_offsets: Offsets
    a_registers: bool
    transpose_a: bool
    transpose_b: bool
    scaled: bool

    def __post_init__(self) -> None:
        is_wide = self.one.a.bits == 16
        assert is_wide or not (self.transpose_a or self.transpose_b), (
            f"{self.one}: only operands of 16 bits may be MN-major"
        )
        assert not (self.a_registers and self.transpose_a), f"{self.one}: A is in registers"
        shape = (self.rows, self.steps)
        assert self.a_registers or _shape(self.a_offsets) == shape, f"offsets of A for {shape}"
        shape = (self.columns, self.steps)
        assert _shape(self.b_offsets) == shape, f"offsets of B for {shape}"

    @cached_property
    def words(self) -> int:
        """Accumulator registers of a thread."""
        return self.rows * self.columns * self.one.acc_registers

    @cached_property
    def a_words(self) -> int:
        return self.rows * self.steps * self.one.a_registers if self.a_registers else 0

    @property
    def name(self) -> str:
        majors = ("t" if self.transpose_a else "n") + ("t" if self.transpose_b else "n")
        source = "r" if self.a_registers else "s"
        scaled = ".scaled" if self.scaled else ""
        return f"{self.one}.{self.rows}x{self.columns}x{self.steps}.{source}.{majors}{scaled}"

    # -- text --

    def text(self) -> str:
        """The fence, all products and the commit, with the descriptors computed before them."""
        b_input = self.words + (self.a_words or 1)
        lines = [".reg .pred accumulate, first;", "setp.eq.u32 accumulate, 0, 0;"]
        if self.scaled:
            lines.append(f"setp.ne.u32 first, $a{b_input + 1}, 0;")
        names = []
        for letter, number, table in (
            ("a", self.words, () if self.a_registers else self.a_offsets),
            ("b", b_input, self.b_offsets),
        ):
            of = {0: f"$a{number}"}
            for offset in sorted({o for row in table for o in row} - {0}):
                of[offset] = f"{letter}_{len(of)}"
                lines.append(f".reg .b64 {of[offset]};")
                lines.append(f"add.s64 {of[offset]}, $a{number}, {offset};")
            names.append(of)
        lines.append("wgmma.fence.sync.aligned;")
        for step in range(self.steps):
            for row in range(self.rows):
                for column in range(self.columns):
                    lines.append(self._product(step, row, column, *names))
        lines.append("wgmma.commit_group.sync.aligned;")
        return "{\n" + "\n".join(lines) + "\n}"

    def _product(
        self, step: int, row: int, column: int, a_names: dict[int, str], b_names: dict[int, str]
    ) -> str:
        one, count = self.one, self.one.acc_registers
        types = ".".join(PTX_TYPE[d] for d in (one.acc, one.a, one.b))
        acc = _registers("d", (row * self.columns + column) * count, count)
        if self.a_registers:
            place = (row * self.steps + step) * one.a_registers
            a = _registers("a", self.words + place, one.a_registers)
        else:
            a = a_names[self.a_offsets[row][step]]
        b = b_names[self.b_offsets[column][step]]
        operands = [acc, a, b, "first" if self.scaled and step == 0 else "accumulate"]
        if one.acc is not dtypes.int32:
            operands += ["1", "1"]  # neither operand is negated
        if one.a.bits == 16:
            transposes = (self.transpose_b,) if self.a_registers else self._transposes
            operands += [str(int(flag)) for flag in transposes]
        shape = f"m{one.m}n{one.n}k{one.k}"
        return f"wgmma.mma_async.sync.aligned.{shape}.{types} {', '.join(operands)};"

    @property
    def _transposes(self) -> tuple[bool, bool]:
        return self.transpose_a, self.transpose_b

    # -- meaning --

    def meaning(self, lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Queue the products of every warpgroup. The results are poison until they have been
        waited for and then filled in place, so that products in a chain see each other's."""
        whole_warpgroups(lanes, self.name)
        register_dtype = self.one.acc_register.numpy
        length = len(lanes.thread)
        outputs = tuple(np.full(length, _POISON).view(register_dtype) for _ in range(self.words))
        for group in np.flatnonzero(lanes.active[::WARPGROUP]).tolist():
            part = slice(group * WARPGROUP, (group + 1) * WARPGROUP)
            own = [x[part] for x in inputs]
            a, descriptors = self._left(own), own[self.words + self.a_words :]
            keeps = not self.scaled or bool(_uniform(descriptors.pop(), self.name))
            bases = [int(_uniform(d, self.name)) for d in descriptors]
            reads = self._addresses(bases)
            before, after = own[: self.words], [x[part] for x in outputs]
            finish = partial(self._finish, a, keeps, before, after)
            lanes.start_product(group, reads, finish)
        lanes.commit_products()
        return outputs

    def _left(self, own: Sequence[Array]) -> Array | None:
        """A from registers, (rows * m, steps * k), or None when it is in shared memory."""
        if not self.a_registers:
            return None
        words = np.stack(own[self.words : self.words + self.a_words], axis=1)
        if self.one.a is dtypes.tfloat32:
            words &= np.uint32(0xFFFFE000)
        layout = tile_a(self.one, self.rows * self.one.m, self.steps * self.one.k, 1, 1)
        matrix = np.empty(layout.shape, self.one.a.numpy)
        matrix[_index(layout)] = words.view(self.one.a.numpy).T
        return matrix.astype(np.float32)

    def _chunks(self, base: int, table: Offsets, extent: int, transposed: bool) -> Array:
        """Addresses (instructions, steps, ...) of an operand's chunks."""
        one = self.one
        return np.array(
            [
                [operand_chunks(base + o, extent, one.k, one.a.bytes, transposed) for o in row]
                for row in table
            ]
        )

    def _addresses(self, bases: Sequence[int]) -> Array:
        """All chunks that are read: those of A, unless in registers, then those of B."""
        b = self._chunks(bases[-1], self.b_offsets, self.one.n, self.transpose_b).ravel()
        if self.a_registers:
            return b
        a = self._chunks(bases[0], self.a_offsets, self.one.m, self.transpose_a).ravel()
        return np.concatenate([a, b])

    def _operand(
        self, content: Array, dtype: DType, count: int, extent: int, transposed: bool
    ) -> Array:
        """(count * extent, steps * k) from its chunks."""
        k = self.one.k
        chunks = (k, extent * dtype.bytes // CHUNK) if transposed else (extent, K_BYTES // CHUNK)
        parts = operand_matrix(
            content.reshape(count, self.steps, *chunks, CHUNK), dtype, transposed
        )
        return parts.swapaxes(1, 2).reshape(count * extent, self.steps * k)

    def _finish(
        self,
        a: Array | None,
        keeps: bool,
        before: Sequence[Array],
        after: Sequence[Array],
        content: Array,
    ) -> None:
        """Fill `after` from `before` and the operands. Products are exact in float32 and summed
        in it, instruction by instruction; of 8-bit integers those sums are exact (below 2**24)
        and the accumulator wraps."""
        one, k = self.one, self.one.k
        if a is None:
            size = self.rows * self.steps * one.m * K_BYTES // CHUNK
            a = self._operand(content[:size], one.a, self.rows, one.m, self.transpose_a)
            content = content[size:]
        b = self._operand(content, one.b, self.columns, one.n, self.transpose_b)
        layout = tile_acc(one, self.rows * one.m, self.columns * one.n, 1, 1)
        index = _index(layout)
        with np.errstate(all="ignore"):
            acc = np.zeros(layout.shape, one.acc.numpy)
            if keeps:
                words = np.stack(before, axis=1)
                acc[index] = words.view(one.acc.numpy).T
            for step in range(self.steps):
                part = slice(step * k, (step + 1) * k)
                terms = a[:, part] @ b[:, part].T
                if one.acc is dtypes.float16:
                    acc = (acc.astype(np.float32) + terms).astype(np.float16)
                else:
                    acc += terms.astype(one.acc.numpy, copy=False)
        results = np.ascontiguousarray(acc[index].T).view(one.acc_register.numpy)
        for target, column in zip(after, results.T, strict=True):
            target[:] = column


def _shape(table: Offsets) -> tuple[int, int]:
    widths = {len(row) for row in table}
    return len(table), widths.pop() if len(widths) == 1 else -1


def _uniform(values: Array, name: str) -> np.generic:
    """The value that all threads of a warpgroup must have."""
    assert (values == values[0]).all(), f"{name}: the threads' descriptors differ"
    return values[0]  # type: ignore[no-any-return]


@cache
def _index(layout: FragmentLayout) -> tuple[Array, Array]:
    """Where in the matrix each register of each thread is: index arrays (registers, threads)."""
    threads = np.arange(layout.threads)
    places = [layout.coordinates(threads, r) for r in range(layout.registers)]
    row, column = (
        np.stack([np.broadcast_to(place[d], threads.shape) for place in places]) for d in (0, 1)
    )
    return row, column


def _registers(letter: str, start: int, count: int) -> str:
    return "{" + ", ".join(f"${letter}{start + i}" for i in range(count)) + "}"


@cache
def wgmma_sequence(
    one: WgmmaInstruction,
    *,
    rows: int,
    columns: int,
    steps: int,
    a_offsets: Offsets = (),
    b_offsets: Offsets,
    a_registers: bool = False,
    transpose_a: bool = False,
    transpose_b: bool = False,
    scaled: bool = False,
) -> Instruction:
    """rows x columns products of `one`, each accumulated over `steps`, as one group.

    Inputs: the accumulators' registers (row outer, column inner), updated in place; then A, with
    `a_registers` the words of all instructions (row outer, step inner), else a uint64 descriptor;
    then the descriptor of B; then if `scaled` a uint32, 0 for results that begin with this
    sequence's first step instead of being added to.
    a_offsets[row][step], b_offsets[column][step]: what is added to the descriptors, in units of
    16 bytes. transpose_*: the operand is MN-major.
    The results must not be touched until `wait_group`.
    """
    sequence = _Sequence(
        one, rows, columns, steps, a_offsets, b_offsets, a_registers, transpose_a, transpose_b,
        scaled,
    )  # fmt: skip
    acc = (one.acc_register,) * sequence.words
    left = (dtypes.uint32,) * sequence.a_words if a_registers else (dtypes.uint64,)
    # PTX ISA, "Asynchronous warpgroup level matrix instructions: wgmma.fence, wgmma.mma_async,
    # wgmma.commit_group"
    return Instruction(
        name=sequence.name,
        ptx=sequence.text(),
        outputs=acc,
        inputs=(*acc, *left, dtypes.uint64, *(dtypes.uint32,) * scaled),
        tied=sequence.words,
        needs=one.needs,
        meaning=sequence.meaning,
    )


@cache
def wait_group(pending: int, registers: tuple[DType, ...]) -> Instruction:
    """Wait until at most `pending` of the warpgroup's newest groups are not complete.

    registers: of all accumulators that may be on their way, inputs and outputs alike, so that
    nothing that reads them comes before.
    """
    assert 0 <= pending <= MAX_PENDING, f"wgmma.wait_group {pending}"
    name = f"wgmma.wait_group.{pending}"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        whole_warpgroups(lanes, name)
        lanes.wait_products(pending)
        return tuple(inputs)

    # PTX ISA, "wgmma.wait_group"
    return Instruction(
        name=name,
        ptx=f"wgmma.wait_group.sync.aligned {pending};",
        outputs=registers,
        inputs=registers,
        tied=len(registers),
        needs=NEEDS,
        meaning=meaning,
    )


def _nothing(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """The simulator's registers are always up to date."""
    return ()


def _commit(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    whole_warpgroups(lanes, "wgmma.commit_group")
    lanes.commit_products()
    return ()


# PTX ISA, "wgmma.fence": earlier accesses to registers come before the products that follow
WGMMA_FENCE = Instruction(
    name="wgmma.fence",
    ptx="wgmma.fence.sync.aligned;",
    needs=NEEDS,
    meaning=_nothing,
)

# PTX ISA, "wgmma.commit_group"
WGMMA_COMMIT = Instruction(
    name="wgmma.commit_group",
    ptx="wgmma.commit_group.sync.aligned;",
    needs=NEEDS,
    meaning=_commit,
)
