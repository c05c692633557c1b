"""One `T.Kernel` frame on its way to the GPU: tile graph, generated source, PTX, cubin, SASS.

Knows passes, lowering and compilation. Does not know arguments.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tilejit import config, lower, passes
from tilejit.dtypes import DType
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.isa.machine import Lowered
from tilejit.runtime.compile import Compiled, compile_lowered, disassemble
from tilejit.runtime.launch import LoadedKernel, Packer
from tilejit.target import Target

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a thread and a block of the compiled kernel use.

    registers: of a thread; spill_bytes: registers saved to local memory, of a thread, loads and
    stores together; stack_bytes: local memory of a thread; shared_bytes: of a block.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


class TileFrame:
    """One kernel of a compiled function; each stage is made when first asked for, once.

    graph: the tile graph as traced; target: the chip that the later stages are for.
    """

    def __init__(self, graph: Kernel, target: Target) -> None:
        self.graph = graph
        self.target = target
        self._lock = threading.RLock()
        self._made: dict[str, object] = {}
        self._seconds: dict[str, float] = {}
        _dump("trace", graph)

    def __repr__(self) -> str:
        return f"<{self.graph.name} for {self.target}>"

    def _once(self, stage: str, make: Callable[[], T]) -> T:
        found = self._made.get(stage)
        if found is None:
            with self._lock:
                found = self._made.get(stage)
                if found is None:
                    start = time.perf_counter()
                    found = self._made[stage] = make()
                    self._seconds[stage] = time.perf_counter() - start
        return found  # type: ignore[return-value]

    @property
    def planned(self) -> Kernel:
        """The tile graph after all passes."""
        return self._once("passes", self._plan)

    def _plan(self) -> Kernel:
        after = passes.stages(self.graph, self.target)
        for name, kernel in after[1:]:
            _dump(name, kernel)
        return after[-1][1]

    @property
    def lowered(self) -> Lowered:
        plan = self.planned
        return self._once("lower", lambda: self._lower(plan))

    def _lower(self, plan: Kernel) -> Lowered:
        lowered = lower.lower_kernel(plan)
        _dump("source", lowered.source)
        _dump("explain", self.explain())
        return lowered

    @property
    def compiled(self) -> Compiled:
        lowered = self.lowered
        return self._once("compile", lambda: self._compile(lowered))

    def _compile(self, lowered: Lowered) -> Compiled:
        compiled = compile_lowered(lowered, self.target)
        _dump("ptx", compiled.ptx)
        return compiled

    @property
    def loaded(self) -> LoadedKernel:
        """The cubin in the driver; needs a GPU."""

        def load() -> LoadedKernel:
            made, lowered = self.compiled, self.lowered
            return LoadedKernel(
                self.graph.name, made.cubin, made.entry, lowered.threads, lowered.shared_bytes
            )

        return self._once("load", load)

    @property
    def packer(self) -> Packer:
        return self._once("pack", lambda: Packer([parameter_dtype(p) for p in self.planned.params]))

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Wall time of the stages made so far: passes, lower, and those of the compilers."""
        seconds = dict(self._seconds)
        if seconds.pop("compile", None) is not None:
            seconds |= self.compiled.stage_seconds
        return seconds

    @property
    def source(self) -> str:
        """The generated Numba CUDA kernel."""
        return self.lowered.source

    @property
    def ptx(self) -> str:
        return self.compiled.ptx

    @property
    def cubin(self) -> bytes:
        return self.compiled.cubin

    @property
    def sass(self) -> str:
        """The machine code as text.

        Raises:
            UnsupportedError: CUDA's disassembler, nvdisasm, is not installed.
        """
        return self._once("sass", lambda: disassemble(self.cubin))

    @property
    def resources(self) -> Resources:
        made = self.compiled
        return Resources(
            registers=made.registers,
            spill_bytes=made.spill_bytes,
            stack_bytes=made.stack_bytes,
            shared_bytes=self.lowered.shared_bytes,
        )

    def explain(self) -> str:
        """What was decided for the kernel, and what was rejected, as text."""
        plan = self.planned
        head = (
            f"{plan.name} for {self.target}: {plan.num_threads} threads, "
            f"{plan.shared_bytes} bytes of shared memory a block"
        )
        return "\n".join((head, *(f"  {note}" for note in plan.notes)))


def parameter_dtype(param: Param) -> DType | None:
    """The dtype of a kernel parameter; None for an address."""
    return None if param.kind in (ParamKind.TENSOR, ParamKind.POINTER) else param.var.dtype


def _dump(stage: str, text: object) -> None:
    wanted = config.current().dump
    if wanted and stage in (part.strip() for part in wanted.split(",")):
        print(text, file=sys.stderr)
