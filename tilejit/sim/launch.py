"""Runs a lowered kernel under Numba's CUDA simulator, its granules executed by lane machines.

Knows Numba's simulator and the generated source. Does not know tile graphs or instructions.

The simulator gives every CUDA thread a Python thread. Here each of those stands for a group of
threads: it runs the generated function, and a granule's twin does the granule for all of the
group's lanes.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilejit.errors import SimulationError, Span
from tilejit.isa.machine import Granule, Lowered, Slot
from tilejit.isa.tma import TensorMap
from tilejit.sim.barriers import Stopped
from tilejit.sim.block import Checks, Cluster, Grid, Watch
from tilejit.sim.lanes import LaneMachine
from tilejit.sim.memory import Memory, host_memory
from tilejit.sim.recording import program_of

Array = np.ndarray[Any, Any]
Argument = Array | int | float | TensorMap

_CALLS_A_TURN = 256  # granules a group runs before others may, should it be waiting for them
_MAPS_BASE = 0x7E << 40  # where the parameters of a kernel seem to be
_one_kernel = threading.Lock()  # Numba's simulator keeps the running kernel in a global


def run_lowered(
    lowered: Lowered,
    grid: tuple[int, int, int],
    arguments: Sequence[Argument],
    segments: Sequence[Array] = (),
    *,
    checks: Checks | None = None,
) -> None:
    """Run `lowered` on a grid of blocks; memory is written in place.

    Args:
        arguments: one a parameter, in order: a number, for an address parameter an array or
            its address (`array.ctypes.data`), for a tensor map a `TensorMap`.
        segments: the arrays that make up global memory, besides those among `arguments`.
        checks: what is looked for; races by default.

    Raises:
        SimulationError: the kernel did something that a GPU would do wrong silently.
    """
    if 0 in grid:
        return
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    assert len(arguments) == len(lowered.parameters), (
        f"{lowered.entry} takes {len(lowered.parameters)} arguments, not {len(arguments)}"
    )
    arrays = [*segments, *(a for a in arguments if isinstance(a, np.ndarray) and a.ndim)]
    memory = host_memory([(_name_of(array, lowered, arguments), array) for array in arrays])
    values = [_plain(argument, number) for number, argument in enumerate(arguments)]
    maps = {
        int(value): argument
        for value, argument in zip(values, arguments, strict=True)
        if isinstance(argument, TensorMap)
    }
    launch = _Launch(lowered, grid, memory, maps, checks or Checks())
    with _one_kernel:
        kernel = FakeCUDAKernel(_Entry(launch), device=False)
        try:
            kernel[launch.clusters, (launch.groups, 1, 1)](*values)
        except Stopped:
            failure = launch.failure
            assert failure is not None, "a simulated thread stopped without a reason"
            raise failure from failure.__cause__
        finally:
            launch.stop()


def _plain(argument: Argument, number: int) -> int | float:
    """Numba's simulator would wrap an array; addresses and numbers it leaves alone."""
    if isinstance(argument, TensorMap):
        return _MAPS_BASE + 128 * number
    if isinstance(argument, np.ndarray) and argument.ndim:
        return int(argument.ctypes.data)
    return argument.item() if isinstance(argument, np.ndarray | np.generic) else argument


def _name_of(array: Array, lowered: Lowered, arguments: Sequence[Argument]) -> str:
    """The parameter that holds an address in the array."""
    low, high = np.lib.array_utils.byte_bounds(array)
    for (name, slot), argument in zip(lowered.parameters, arguments, strict=True):
        is_map = isinstance(argument, TensorMap)
        address = argument.address if isinstance(argument, TensorMap) else _plain(argument, 0)
        if (slot.address or is_map) and low <= address < high:
            return name
    return "an argument"


class _Launch:
    """One run of a kernel.

    failure: the first error, kept because Numba's simulator makes a new exception of it.
    """

    def __init__(
        self,
        lowered: Lowered,
        grid: tuple[int, int, int],
        memory: Memory,
        maps: dict[int, TensorMap],
        checks: Checks,
    ) -> None:
        self._lowered = lowered
        self._watch = Watch(checks)
        self._grid = Grid(
            threads=math.prod(lowered.threads),
            lanes=lowered.lanes,
            shared_bytes=lowered.shared_bytes,
            memory=memory,
            blocks=grid,
            cluster=lowered.cluster,
            maps=maps,
        )
        for extent, step in zip(grid, lowered.cluster, strict=True):
            assert extent % step == 0, f"a grid of {grid} in clusters of {lowered.cluster}"
        x, y, z = (n // step for n, step in zip(grid, lowered.cluster, strict=True))
        self.clusters = (x, y, z)
        self.groups = self._grid.groups * math.prod(lowered.cluster)
        self.failure: BaseException | None = None
        self._has_ended = False
        self._running: dict[tuple[int, int, int], Cluster] = {}
        self._lock = threading.Lock()
        self._here = threading.local()  # .machine, .calls: of the group that a thread simulates
        self._filename = _register(lowered)
        self.entry = self._build()

    def _build(self) -> Callable[..., None]:
        """The generated function, calling twins."""
        from numba import cuda

        names: dict[str, Any] = {"cuda": cuda}
        names.update((name, self._twin(g)) for name, g in self._lowered.granules.items())
        exec(compile(self._lowered.source, self._filename, "exec"), names)
        return names[self._lowered.entry]  # type: ignore[no-any-return]

    def run_group(self, thread: Any, arguments: Sequence[int | float]) -> None:
        """Run the generated function in the simulator's thread `thread`, whose block stands for a
        cluster."""
        where = (thread.blockIdx.x, thread.blockIdx.y, thread.blockIdx.z)
        number = thread.threadIdx.x
        cluster = self._cluster(where)
        block = cluster.blocks[number // self._grid.groups]
        thread.blockIdx = type(thread.blockIdx)(*self._block_index(where, block.rank))
        turns = cluster.turns
        try:
            turns.enter(number)
            machine = self._here.machine = LaneMachine(block, number % self._grid.groups)
            self._here.calls = 0
            self.entry(*arguments)
            machine.end()
        except Stopped:
            raise
        except BaseException as error:
            if self.failure is None:
                self.failure = error
            turns.fail(error)
            raise Stopped("the kernel failed") from None
        else:
            if turns.leave(number):
                del self._running[where]
        finally:
            self.failure = self.failure or turns.failure
        if self.failure is not None:
            raise Stopped("the kernel failed")

    def stop(self) -> None:
        """End the threads that are left, should the launch have been interrupted."""
        self._has_ended = True
        for cluster in list(self._running.values()):
            cluster.turns.fail(Stopped("the launch has ended"))

    def _cluster(self, where: tuple[int, int, int]) -> Cluster:
        with self._lock:
            found = self._running.get(where)
            if found is None:
                found = self._running[where] = Cluster(self._grid, self._watch, where[0])
            return found

    def _block_index(self, where: tuple[int, int, int], rank: int) -> tuple[int, ...]:
        """Where in the grid a block of a cluster is; ranks count along x first."""
        x, y, _ = extents = self._lowered.cluster
        inside = (rank % x, rank // x % y, rank // (x * y))
        return tuple(w * e + i for w, e, i in zip(where, extents, inside, strict=True))

    def _twin(self, granule: Granule) -> Callable[..., Any]:
        """What the generated source calls in place of the granule's intrinsic."""

        def twin(*arguments: Any) -> Any:
            line = sys._getframe(1).f_lineno
            machine: LaneMachine = self._here.machine
            self._count_call(machine)
            inputs = [
                _to_value(argument, slot, granule.name)
                for argument, slot in zip(arguments, granule.inputs, strict=True)
            ]
            span = granule.span or self._span(line)
            try:
                results = machine.run(program_of(granule).run, inputs, span, line)
            except SimulationError as error:
                error.span = span
                raise
            outputs = [
                _from_value(result, slot, granule.name, machine.everyone, span)
                for result, slot in zip(results, granule.outputs, strict=True)
            ]
            if not outputs:
                return None
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return twin

    def _count_call(self, machine: LaneMachine) -> None:
        if self._has_ended:
            raise Stopped("the launch has ended")
        self._here.calls += 1
        if self._here.calls % _CALLS_A_TURN == 0:
            machine.give_way()

    @functools.lru_cache(maxsize=256)  # noqa: B019 - the launch is short-lived
    def _span(self, line: int) -> Span:
        text = linecache.getline(self._filename, line).rstrip("\n")
        column = len(text) - len(text.lstrip())
        code = text.split("  #")[0]
        return Span(self._filename, line, column, line, len(code.encode()), self._lowered.entry)


class _Entry:
    """The function that Numba's simulator runs in each of its threads."""

    def __init__(self, launch: _Launch) -> None:
        self._launch = launch
        # Numba puts its stand-in for `cuda` there while the kernel runs
        self.__globals__ = launch.entry.__globals__

    def __call__(self, *arguments: int | float) -> None:
        thread = threading.current_thread()
        # Numba's loop asks its threads all the time whether they are alive, which takes half of
        # the processor from them. It may as well wait until they are not.
        vars(thread)["is_alive"] = functools.partial(_wait_for_end, thread)
        self._launch.run_group(thread, arguments)


def _wait_for_end(thread: threading.Thread) -> bool:
    threading.Thread.join(thread)
    return False


def _register(lowered: Lowered) -> str:
    """Make the generated source known to tracebacks; returns its file name."""
    digest = hashlib.sha256(lowered.source.encode()).hexdigest()[:12]
    filename = f"<tilejit {lowered.entry} {digest}>"
    lines = lowered.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(lowered.source), None, lines, filename)
    return filename


class LaneCondition:
    """A bool that a granule returned: an operand for others, or a condition of the skeleton."""

    __slots__ = ("_everyone", "_span", "value")

    def __init__(self, value: Array, everyone: Array, span: Span | None) -> None:
        self.value = value
        self._everyone = everyone
        self._span = span

    def __bool__(self) -> bool:
        value = self.value if len(self.value) == 1 else self.value[self._everyone]
        first = bool(value[0])
        if not (value == first).all():
            raise SimulationError(
                "The lanes of a group disagree on a condition that they must take together.",
                span=self._span,
                notes=[f"{int(value.sum())} of {len(value)} threads find it true."],
            )
        return first


def _to_value(argument: Any, slot: Slot, granule: str) -> Any:
    """What the machine computes with, from what went through the generated code."""
    if slot.count is not None:
        assert isinstance(argument, tuple) and len(argument) == slot.count, (
            f"{granule} takes {slot.count} elements"
        )
        values = list(argument)
        for value in values:
            _check(value, slot, granule)
        return values
    if isinstance(argument, LaneCondition):
        argument = argument.value
    if isinstance(argument, np.ndarray):
        if slot.dtype.numpy != argument.dtype:
            assert slot.dtype.is_integer and argument.dtype.kind in "iu", (
                f"{granule} takes {slot.dtype}, not {argument.dtype}"
            )
            return argument.astype(slot.dtype.numpy)
        return argument
    if isinstance(argument, int) and slot.dtype.is_integer:
        argument &= (1 << slot.dtype.bits) - 1  # addresses beyond int64, 32-bit loop counters
        return np.array([argument], f"u{slot.dtype.bytes}").view(slot.dtype.numpy)
    return np.array([argument], slot.dtype.numpy)


def _from_value(result: Any, slot: Slot, granule: str, everyone: Array, span: Span | None) -> Any:
    """The inverse of `_to_value`."""
    if slot.count is not None:
        assert len(result) == slot.count, f"{granule} gives {len(result)} of {slot.count} elements"
        for value in result:
            _check(value, slot, granule)
        return tuple(result)
    _check(result, slot, granule)
    return LaneCondition(result, everyone, span) if slot.dtype.is_bool else result


def _check(value: Any, slot: Slot, granule: str) -> None:
    assert isinstance(value, np.ndarray), f"{granule}: {value!r} is no value of a machine"
    assert value.dtype == slot.dtype.numpy, (
        f"{granule}: {value.dtype} where {slot.dtype} is declared"
    )
