"""Lane machines and lowered kernels made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tilejit.dtypes import int32, uint64
from tilejit.isa.machine import Granule, Lowered, Slot
from tilejit.isa.tma import TensorMap
from tilejit.sim.block import Checks, Cluster, Grid, Watch
from tilejit.sim.lanes import LaneMachine
from tilejit.sim.memory import host_memory
from tilejit.sim.recording import Program

ADDRESS = Slot(uint64, address=True)
INT = Slot(int32)

Emit = Callable[..., Any]


@pytest.fixture(params=["directly", "recorded"])
def run_lanes(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`run_lanes(emit, *inputs, threads=64)`: what `emit(machine, *inputs)` returns on the only
    group of a block; `inputs` are values, arrays among them in `memory` are global memory, `maps`
    tensor maps by address. ends: the kernel ends there."""

    def run(
        emit: Emit,
        *inputs: Any,
        threads: int = 64,
        shared_bytes: int = 4096,
        memory: Sequence[np.ndarray] = (),
        checks: Checks | None = None,
        maps: dict[int, TensorMap] | None = None,
        ends: bool = False,
    ) -> Any:
        arrays = [(f"array {i}", array) for i, array in enumerate(memory)]
        grid = Grid(
            threads=threads,
            shared_bytes=shared_bytes,
            memory=host_memory(arrays),
            maps=maps or {},
        )
        block = Cluster(grid, Watch(checks or Checks())).blocks[0]
        machine = LaneMachine(block, 0)
        if request.param == "directly":
            result = machine.run(lambda m, values: emit(m, *values), list(inputs))
            if ends:
                machine.end()
            return result
        several = []

        def emit_list(m: Any, _: list[Any]) -> list[Any]:
            result = emit(m, *inputs)
            several.append(isinstance(result, list | tuple))
            if result is None:
                return []
            return list(result) if several[0] else [result]

        results = machine.run(Program(Granule("test", (), (), emit_list)).run, [])
        if ends:
            machine.end()
        return results if not results or several[0] else results[0]

    return run


@pytest.fixture
def make_kernel() -> Callable[..., Lowered]:
    """`make_kernel(source, parameters, {name: (emit, input slots, output slots)}, ...)`.

    `emit(machine, *inputs)` returns the outputs as a list, or None for none.
    """

    def make(
        source: str,
        parameters: dict[str, Slot],
        granules: dict[str, tuple[Emit, Sequence[Slot], Sequence[Slot]]],
        threads: int | tuple[int, int, int] = 64,
        shared_bytes: int = 4096,
        lanes: int = 0,
        cluster: tuple[int, int, int] = (1, 1, 1),
    ) -> Lowered:
        made = {}
        for name, (emit, inputs, outputs) in granules.items():
            made[name] = Granule(
                name,
                tuple(inputs),
                tuple(outputs),
                lambda m, values, emit=emit: emit(m, *values) or [],
            )
        return Lowered(
            source=source,
            entry="kernel",
            parameters=tuple(parameters.items()),
            noalias=(False,) * len(parameters),
            granules=made,
            threads=(threads, 1, 1) if isinstance(threads, int) else threads,
            shared_bytes=shared_bytes,
            lanes=lanes,
            cluster=cluster,
            tensor_maps=tuple(slot.tensor_map for slot in parameters.values()),
        )

    return make
