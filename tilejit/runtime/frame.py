"""One `T.Kernel` frame on its way to the GPU: tile graph, generated source, PTX, cubin, SASS.

Knows passes, lowering and compilation. Does not know arguments.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tilejit import config, lower, passes
from tilejit.dtypes import DType
from tilejit.errors import InternalError, ResourceError
from tilejit.ir.expr import Var
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.ir.node import walk
from tilejit.ir.sync import Control, ControlOp
from tilejit.isa.machine import Lowered
from tilejit.passes.tiles import MAX_TILES
from tilejit.runtime import device
from tilejit.runtime.compile import Compiled, compile_lowered, disassemble
from tilejit.runtime.launch import LoadedKernel, Packer
from tilejit.runtime.program import Grid
from tilejit.runtime.tensor_maps import MapSource, map_reader
from tilejit.runtime.workspace import simulated_workspace, workspace
from tilejit.target import Target

T = TypeVar("T")
SIMULATED_BLOCKS = 2  # of a persistent launch: few, so that each computes several tiles


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
        _dump("trace", graph.__str__)

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
            _dump(name, kernel.__str__)
        return after[-1][1]

    @property
    def lowered(self) -> Lowered:
        plan = self.planned
        return self._once("lower", lambda: self._lower(plan))

    def _lower(self, plan: Kernel) -> Lowered:
        lowered = lower.lower_kernel(plan)
        _dump("source", lambda: lowered.source)
        _dump("explain", self.explain)
        return lowered

    @property
    def compiled(self) -> Compiled:
        lowered = self.lowered
        return self._once("compile", lambda: self._compile(lowered))

    def _compile(self, lowered: Lowered) -> Compiled:
        compiled = compile_lowered(lowered, self.target)
        _dump("ptx", lambda: compiled.ptx)  # which is made on demand
        return compiled

    @property
    def loaded(self) -> LoadedKernel:
        """The cubin in the driver; needs a GPU."""

        def load() -> LoadedKernel:
            made, lowered = self.compiled, self.lowered
            return LoadedKernel(
                self.graph.name,
                made.cubin,
                made.entry,
                lowered.threads,
                lowered.shared_bytes,
                starts_early=_waits_for_others(self.graph),
                cluster=math.prod(lowered.cluster),
            )

        return self._once("load", load)

    @property
    def packer(self) -> Packer:
        def make() -> Packer:
            params = self.planned.params
            maps = [n for n, p in enumerate(params) if p.kind is ParamKind.TENSOR_MAP]
            return Packer([parameter_dtype(p) for p in params], maps)

        return self._once("pack", make)

    @property
    def maps(self) -> tuple[MapSource | None, ...]:
        """For each parameter, where its tensor map comes from; None for other parameters."""
        return self._once(
            "maps",
            lambda: tuple(
                MapSource(p) if p.kind is ParamKind.TENSOR_MAP else None
                for p in self.planned.params
            ),
        )

    @property
    def spaces(self) -> tuple[tuple[int, Param, int], ...]:
        """Of the parameters that are workspaces: place, parameter, bytes."""
        return self._once(
            "spaces",
            lambda: tuple(
                (n, p, math.prod(p.buffer.extents) * p.buffer.dtype.bytes)
                for n, p in enumerate(self.planned.params)
                if p.kind is ParamKind.WORKSPACE and p.buffer is not None
            ),
        )

    def with_spaces(self, values: Sequence[Any], ordinal: int, stream: int) -> Sequence[Any]:
        """The parameters' values with the addresses of the workspaces. The device's context is
        current."""
        if not self.spaces:
            return values
        values = list(values)
        for n, param, size in self.spaces:
            # zero before and after, so that kernels may share it, but not one's two parameters
            name = f"zeroed {n}" if param.is_zeroed else f"space {n}"
            values[n] = workspace(name, size, ordinal, stream, is_zeroed=param.is_zeroed)
        return values

    def launch_values(self, env: Mapping[Var, Any]) -> list[Any]:
        """The parameters' values for a launch, from those of the arguments; 0 for workspaces."""
        return [
            env.get(p.var, 0)
            if source is None
            else source.encoded(*(env[v] for v in source.variables))
            for p, source in zip(self.planned.params, self.maps, strict=True)
        ]

    def simulator_values(self, env: Mapping[Var, Any], spaces: list[Any]) -> list[Any]:
        """The same for a simulated launch, tensor maps as descriptions; memory made for workspaces
        is added to `spaces`."""
        values = [
            env.get(p.var, 0)
            if source is None
            else source.describe(*(env[v] for v in source.variables))
            for p, source in zip(self.planned.params, self.maps, strict=True)
        ]
        for n, param, _ in self.spaces:
            assert param.buffer is not None, param
            spaces.append(simulated_workspace(param.buffer, param.is_zeroed))
            values[n] = spaces[-1].ctypes.data
        return values

    def check_spaces(self, spaces: Sequence[Any]) -> None:
        """Memory that must be zero for the next launch is."""
        for (_, param, _), space in zip(self.spaces, spaces, strict=True):
            if param.is_zeroed and space.any():
                raise InternalError(f"{self.planned.name}: {param.name} is not left zero.")

    def order(self, places: dict[Var, int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """Picks the parameters' values from a call's, which are at these places; workspaces get
        any."""
        params, maps = self.planned.params, self.maps
        wanted = [
            places.get(p.var, 0) if source is None else places[source.variables[0]]
            for p, source in zip(params, maps, strict=True)
        ]
        readers = [
            (n, map_reader(source, places)) for n, source in enumerate(maps) if source is not None
        ]
        pick: Callable[[Sequence[Any]], Any] = operator.itemgetter(*wanted)
        if len(wanted) == 1:
            pick = lambda pool: (pool[wanted[0]],)  # noqa: E731
        if not wanted:
            return lambda pool: ()
        if not readers:
            return pick

        def order(pool: Sequence[Any]) -> Sequence[Any]:
            values = list(pick(pool))
            for n, read in readers:
                values[n] = read(pool)
            return values

        return order

    def check_tiles(self, name: str, grid: Grid) -> None:
        """
        Raises:
            ResourceError: more tiles than blocks that find their own can count.
        """
        tiles = grid[0] * grid[1] * grid[2]
        if tiles > MAX_TILES and self._finds_tiles:
            raise ResourceError(
                f"{name}: the grid has {tiles} blocks, of which at most {MAX_TILES} are counted.",
                hint="Let each block do more.",
            )

    @property
    def _finds_tiles(self) -> bool:
        """Whether a block's number is not its tile's place in the grid."""
        plan = self.planned
        return plan.is_persistent or self._is_line or bool(plan.given.panel)

    @property
    def _is_line(self) -> bool:
        """Whether blocks have one number, whatever the grid is."""
        plan = self.planned
        return len(plan.grid) < len(self.graph.grid) + (plan.parts > 1)

    def launch_grid(self, grid: Grid, ordinal: int | None) -> Grid:
        """The blocks to launch for a grid of tiles, on a GPU or (None) simulated."""
        plan = self.planned
        if plan.parts > 1:  # one more dimension, whatever the others are
            axis = len(self.graph.grid)
            grid = (*grid[:axis], plan.parts, *grid[axis + 1 :])  # type: ignore[assignment]
        tiles = grid[0] * grid[1] * grid[2]
        if not plan.is_persistent:
            return (tiles, 1, 1) if self._is_line else grid
        blocks = SIMULATED_BLOCKS if ordinal is None else device.multiprocessors(ordinal)
        size = plan.cluster_size
        return min(tiles, max(size, blocks // size * size)), 1, 1

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
    is_number = param.kind in (ParamKind.SCALAR, ParamKind.SYMBOL)
    return param.var.dtype if is_number else None


def _waits_for_others(kernel: Kernel) -> bool:
    """Whether the kernel waits for those before it in the stream by itself."""
    return any(
        isinstance(n, Control) and n.op is ControlOp.DEPENDENCY_WAIT for n in walk(kernel.body)
    )


def _dump(stage: str, text: Callable[[], str]) -> None:
    """Print what the user wants to see of a stage; nothing else is written out."""
    wanted = config.current().dump
    if wanted and stage in (part.strip() for part in wanted.split(",")):
        print(text(), file=sys.stderr)
