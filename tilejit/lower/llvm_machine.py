"""The machine that writes LLVM IR: what emitters do for one thread, an IR builder records.

Knows thread indices and instruction records; arithmetic, conversions, control flow and memory are
the classes it is made of. Does not know Numba: any function with a builder will do. Works in both
dialects of libNVVM.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilejit.dtypes import DType
from tilejit.isa.instruction import Instruction
from tilejit.lower.llvm_atomic import LLVMAtomics
from tilejit.lower.llvm_values import I32, Value, constant_int, llvm_type, set_range


class LLVMMachine(LLVMAtomics):
    """`isa.machine.Machine` over an llvmlite `IRBuilder`.

    threads: extents of the block. fast_math: approximate float32 functions.
    """

    def thread_index(self) -> Value:
        index: Value = None
        stride = 1
        for axis, extent in zip("xyz", self.threads, strict=True):
            if extent > 1:
                part = self.call(f"llvm.nvvm.read.ptx.sreg.tid.{axis}", I32)
                set_range(part, 0, extent)
                if stride > 1:
                    part = self.builder.mul(part, self.word(stride))
                index = part if index is None else self.builder.add(index, part)
            stride *= extent
        return self.word(0) if index is None else index

    checks_indexes = False

    def check_index(
        self, index: Sequence[Value], extents: Sequence[int], name: str, when: Value | None = None
    ) -> None:
        """A GPU does not check."""

    # -- instructions ------------------------------------------------------------------------

    def issue(
        self,
        instruction: Instruction,
        inputs: Sequence[Value] = (),
        when: Value | None = None,
    ) -> list[Value]:
        assert self.target.has(*instruction.needs), f"{instruction} on {self.target}"
        assert len(inputs) == len(instruction.inputs), f"{instruction}: {len(inputs)} inputs"
        assert when is None or not instruction.outputs, f"{instruction} has outputs and `when`"
        text = instruction.ptx
        registers: list[Value] = []
        # highest number first, so that $a1 is not taken for the start of $a10
        numbers: dict[int, str] = {}
        for number, (value, dtype) in enumerate(zip(inputs, instruction.inputs, strict=True)):
            if number in instruction.immediates:
                known = constant_int(value)
                assert known is not None, f"{instruction}: input {number} is no constant"
                numbers[number] = str(known)
            else:
                numbers[number] = f"$a{len(registers)}"
                registers.append(self._as_register(value, dtype))
        if instruction.immediates:
            for number in sorted(numbers, reverse=True):
                text = text.replace(f"$a{number}", f"\0{number}\0")
            for number, spelled in numbers.items():
                text = text.replace(f"\0{number}\0", spelled)
        known = None if when is None else constant_int(when)
        if known == 0:
            return []
        if when is None or known is not None:
            return self._issue(instruction, text, registers)
        if ";" in text.strip().rstrip(";") or "$" + "{uid}" in text:

            def then() -> None:
                self._issue(instruction, text, registers)

            self.branch(when, then, None, {})
            return []
        guarded = f"@$a{len(registers)} {text.strip()}"
        return self._issue(instruction, guarded, [*registers, when])

    def _issue(
        self, instruction: Instruction, text: str, registers: Sequence[Value]
    ) -> list[Value]:
        return self.assemble(
            text,
            [llvm_type(d) for d in instruction.outputs],
            registers,
            has_effect=instruction.has_effect,
            convergent=True,
            tied=instruction.tied,
        )

    def _as_register(self, value: Value, dtype: DType) -> Value:
        value = self.value(value)
        kind = llvm_type(dtype)
        if value.type != kind:
            value = self._from_integer(self._to_integer(value), kind)
        return value
