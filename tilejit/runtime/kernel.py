"""The kernel object: a traced program for one target that can be inspected and called.

Knows how a program's values reach each executor. Does not know how arguments become a signature.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from tilejit.errors import ArgumentError, UnsupportedError
from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Var, VarKind, variables
from tilejit.ir.kernel import Kernel, Program
from tilejit.runtime import arrays, device
from tilejit.runtime.addresses import remembered_arrays
from tilejit.runtime.arrays import HOST, ArrayView, host_array
from tilejit.runtime.binding import Binder
from tilejit.runtime.captures import freeze
from tilejit.runtime.device import Executor
from tilejit.runtime.facts import Slot
from tilejit.runtime.frame import Resources, TileFrame
from tilejit.runtime.launch import Staging, check_grid, stream_handle, stream_of
from tilejit.runtime.matching import Matcher, Symbols, evaluate, scalar_value
from tilejit.runtime.placement import allocate_output, check_writable, place
from tilejit.runtime.program import Grid, HostProgram
from tilejit.runtime.signature import SPEC_ALIGN, misaligned, pointer_value, read_argument
from tilejit.runtime.traceback import without_our_frames
from tilejit.runtime.warm import Look, WarmCalls, settle
from tilejit.sim import launch as simulator
from tilejit.sim import reference
from tilejit.target import Target

log = logging.getLogger("tilejit")
Pair = tuple[str, str]
Specialise = Callable[[Mapping[str, int], frozenset[Pair]], "TileKernel"]


class TileKernel:
    """A compiled tile function: call it with its tensors and scalars, or look inside.

    name: of the function; names: of the arguments that a call takes, in order, outputs of
    `out_idx` among them; out_idx: positions of those; constants: what the parameters without
    memory were compiled for; overlaps: arguments whose bytes may overlap; specialise: gives the
    kernel for lower alignments and other overlaps, where that is allowed.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        names: Sequence[str],
        *,
        constants: Mapping[str, Any] | None = None,
        out_idx: Sequence[int] = (),
        overlaps: Sequence[tuple[str, str]] = (),
        specialise: Specialise | None = None,
    ) -> None:
        self.program = program
        self.target = target
        self.name = program.name
        self.names = tuple(names)
        assert len(names) == len(program.arguments), (names, program.arguments)
        self.constants = dict(constants or {})
        self.out_idx = tuple(out_idx)
        self.kernels = tuple(TileFrame(k, target) for k in program.kernels)
        self._overlaps = frozenset(overlaps)
        self.is_factory_made = specialise is not None
        self._specialise = specialise
        self._host = HostProgram(program)
        self._tensors = tuple(n for n, a in enumerate(program.arguments) if isinstance(a, Buffer))

    def __repr__(self) -> str:
        return f"<tilejit kernel {self.name}({', '.join(self.names)}) for {self.target}>"

    # What was made, of the only kernel.

    def _only(self, what: str) -> TileFrame:
        if len(self.kernels) != 1:
            raise UnsupportedError(
                f"{self.name} is a program of {len(self.kernels)} kernels, each with its own "
                f"`{what}`.",
                hint=f"Write `.kernels[0].{what}`.",
            )
        return self.kernels[0]

    @property
    def graph(self) -> Kernel:
        """The tile graph as traced; it prints."""
        return self._only("graph").graph

    @property
    def source(self) -> str:
        """The generated Numba CUDA kernel."""
        return self._only("source").source

    @property
    def ptx(self) -> str:
        return self._only("ptx").ptx

    @property
    def cubin(self) -> bytes:
        return self._only("cubin").cubin

    @property
    def sass(self) -> str:
        """The machine code as text; see `TileFrame.sass`."""
        return self._only("sass").sass

    @property
    def resources(self) -> Resources:
        return self._only("resources").resources

    def explain(self) -> str:
        """What was decided for each kernel, as text."""
        return "\n".join(frame.explain() for frame in self.kernels)

    def lower(self) -> None:
        """Decide and generate everything, so that errors show now; makes no cubin."""
        for frame in self.kernels:
            frame.lowered  # noqa: B018 - made on access

    # Calling.

    def __call__(self, *args: Any, stream: Any = None, **kwargs: Any) -> Any:
        """Run on tensors and scalars, in order or by name, without those of `out_idx`.

        Args:
            stream: the CUDA stream; otherwise the first tensor's framework's current one.

        Raises:
            TypeError, ValueError: an argument that is not what the kernel was compiled for.
        """
        with without_our_frames():
            look = self._warm.look(args, kwargs)
            if look is not None and look.launch is not None:
                return look.run(stream)
            given = self._binder.bind(args, self._without_constants(kwargs))
            values, symbols = self._read(given)
            other = self._variant(values) or self._wider(symbols)
            if other is not None:
                return other(*args, stream=stream, **kwargs)
            return self.run(values, symbols, stream, None, self._warm, look)

    @cached_property
    def _warm(self) -> WarmCalls:
        slots = [self._slot(self.names[n], self.program.arguments[n]) for n in self._inputs]
        return WarmCalls(self._binder, slots)

    def _slot(self, name: str, argument: Buffer | Var) -> Slot:
        """An argument as warm calls know it."""
        if isinstance(argument, Buffer):
            return Slot(name, "tensor", align=max(1, argument.align))
        if argument.kind is VarKind.POINTER:
            return Slot(name, "pointer")
        buffers = [b for b in self.program.arguments if isinstance(b, Buffer)]
        dims = [e for b in buffers for e in (*b.shape, *(b.strides or ()))]
        is_keyed = any(argument in variables(e) for e in dims)
        return Slot(name, "scalar", argument.dtype, is_keyed=is_keyed)

    @cached_property
    def _inputs(self) -> tuple[int, ...]:
        return tuple(n for n in range(len(self.names)) if n not in self.out_idx)

    @cached_property
    def _binder(self) -> Binder:
        names = [self.names[n] for n in self._inputs]
        return Binder(self.name, names, len(names), {})

    @cached_property
    def _matcher(self) -> Matcher:
        """The declarations of the tensors that a call passes."""
        arguments = self.program.arguments
        tensors = [(self.names[n], arguments[n]) for n in self._tensors if n not in self.out_idx]
        return Matcher(self.name, tensors)  # type: ignore[arg-type]

    def _without_constants(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments but those that repeat a compile-time constant."""
        rest = dict(kwargs)
        for name in kwargs.keys() & self.constants.keys():
            value, own = rest.pop(name), self.constants[name]
            if freeze(value, self.name, name) != freeze(own, self.name, name):
                raise ArgumentError(
                    f"{self.name}: {name} is {value!r}, but the kernel was compiled for {own!r}."
                )
        return rest

    def _read(self, given: Sequence[Any]) -> tuple[list[Any], Symbols]:
        """The values of all arguments, outputs made, and those of the symbols."""
        values: list[Any] = [None] * len(self.names)
        views: list[ArrayView] = []
        scalars: dict[Var, Any] = {}
        for n, value in zip(self._inputs, given, strict=True):
            argument, name = self.program.arguments[n], self.names[n]
            if isinstance(argument, Buffer):
                values[n] = read_argument(self.name, name, value)
                views.append(values[n])
            elif argument.kind is VarKind.POINTER:
                values[n] = pointer_value(self.name, name, value)
            else:
                values[n] = scalars[argument] = scalar_value(self.name, name, value, argument.dtype)
        symbols = self._matcher.match(views, scalars)
        for n in self.out_idx:
            buffer = self.program.arguments[n]
            assert isinstance(buffer, Buffer), self.names[n]
            shape = self._output_shape(self.names[n], buffer, symbols)
            values[n] = allocate_output(self.name, buffer, shape, views[0] if views else None)
        return values, symbols

    def _output_shape(self, name: str, buffer: Buffer, symbols: Symbols) -> tuple[int, ...]:
        for e in buffer.shape:
            unknown = variables(e) - symbols.keys()
            if unknown:
                symbol = min(unknown, key=lambda v: v.serial).name
                raise ArgumentError(
                    f"{self.name}: no argument says what {symbol} is, an extent of the output "
                    f"{name}.",
                    hint=f"Leave {name} out of out_idx and pass it.",
                )
        return tuple(evaluate(e, symbols) for e in buffer.shape)

    def _variant(self, values: Sequence[Any]) -> TileKernel | None:
        """The kernel that serves arguments with less alignment or more overlap than this one was
        made for; None when this one does."""
        aligns: dict[str, int] = {}
        tensors = [n for n in self._tensors if n not in self.out_idx]
        for n in tensors:
            promised, view = self.program.arguments[n].align, values[n]  # type: ignore[union-attr]
            if view.size and view.address % max(1, promised):
                if self._specialise is None or promised > SPEC_ALIGN:
                    raise misaligned(self.name, self.names[n], promised)
                aligns[self.names[n]] = view.align
        pairs = {
            (self.names[tensors[i]], self.names[tensors[j]])
            for i, j in arrays.overlapping([values[n] for n in tensors])
        }
        if pairs <= self._overlaps and not aligns:
            return None
        if self._specialise is not None:
            return self._specialise(aligns, frozenset(pairs))
        for a, b in sorted(pairs - self._overlaps):
            if self._is_written(a) or self._is_written(b):
                raise ArgumentError(
                    f"{self.name}: {a} and {b} share memory, but the kernel was compiled for "
                    "arguments that do not.",
                    hint="Compile it with such arguments, or call the decorated function.",
                )
        return None

    def _wider(self, symbols: Symbols) -> TileKernel | None:
        """The kernel for any extents, where this one was compiled for others; else None."""
        promised = (pair for k in self.program.kernels for pair in k.multiples.items())
        return None if all(symbols[v] % n == 0 for v, n in promised) else self._general

    @cached_property
    def _general(self) -> TileKernel:
        """The same program for any extents."""
        kernels = tuple(replace(k, multiples={}) for k in self.program.kernels)
        return TileKernel(
            replace(self.program, kernels=kernels),
            self.target,
            self.names,
            constants=self.constants,
            out_idx=self.out_idx,
            overlaps=tuple(self._overlaps),
        )

    def _is_written(self, name: str) -> bool:
        buffer = self.program.arguments[self.names.index(name)]
        return isinstance(buffer, Buffer) and buffer.data in self._host.written

    # Running.

    def run(
        self,
        values: Sequence[Any],
        symbols: Symbols,
        stream: Any = None,
        executor: Executor | None = None,
        warm: WarmCalls | None = None,
        look: Look | None = None,
    ) -> Any:
        """Run with values that were checked: a view for each tensor, a number or address for
        each scalar and pointer, in the order of the arguments.

        warm, look: who remembers the call, and its facts.
        """
        executor = executor or device.executor()
        views = [v for v in values if isinstance(v, ArrayView)]
        ordinal = place(self.name, self.names, values, executor)
        env: dict[Var, Any] = dict(symbols)
        memory: dict[Buffer, ArrayView] = {}
        written = self._host.written
        for name, argument, value in zip(self.names, self.program.arguments, values, strict=True):
            if isinstance(argument, Var):
                env[argument] = value.address if isinstance(value, ArrayView) else value
                continue
            memory[argument] = value
            if argument.data in written:
                check_writable(self.name, name, value)
            env[argument.data] = value.address  # type: ignore[index]
        for buffer, extents in zip(self.program.outputs, self._host.output_shapes, strict=True):
            like = views[0] if views else None
            fresh = allocate_output(self.name, buffer, tuple(extents(env)), like)
            memory[buffer] = fresh
            env[buffer.data] = fresh.address  # type: ignore[index]
        if executor is Executor.GPU:
            self._run_gpu(env, values, memory, ordinal, stream)
            if warm is not None and look is not None:
                self._remember(warm, look, values, symbols, ordinal)
        else:
            self._run_host(executor, env, values, memory)
        return self._results(values, memory)

    def _remember(
        self,
        warm: WarmCalls,
        look: Look,
        values: Sequence[Any],
        symbols: Symbols,
        ordinal: int,
    ) -> None:
        launch = settle(
            self.program, self.kernels, self._host, self.out_idx, values, symbols, ordinal,
            self._grids,
        )  # fmt: skip
        if launch is not None:
            views = [values[n] if n in self._tensors else None for n in self._inputs]
            warm.remember(look, launch, views)

    def _results(self, values: Sequence[Any], memory: Mapping[Buffer, ArrayView]) -> Any:
        if self.out_idx:
            made = tuple(values[n].owner for n in self.out_idx)
            return made[0] if len(made) == 1 else made
        results = tuple(memory[b].owner for b in self.program.results)
        if self.program.returns_tuple:
            return results
        return results[0] if results else None

    def _grids(self, env: Mapping[Var, Any]) -> list[Grid]:
        grids = [grid(env) for grid in self._host.grids]
        for frame, grid in zip(self.kernels, grids, strict=True):
            name = f"{self.name} ({frame.graph.name})" if len(grids) > 1 else self.name
            check_grid(name, grid, frame.graph.given.cluster)
            frame.check_tiles(name, grid)
        return grids

    def _run_gpu(
        self,
        env: dict[Var, Any],
        values: Sequence[Any],
        memory: Mapping[Buffer, ArrayView],
        ordinal: int,
        stream: Any,
    ) -> None:
        grids = self._grids(env)
        if not any(all(n > 0 for n in grid) for grid in grids):
            return
        views = [*memory.values(), *(v for v in values if isinstance(v, ArrayView))]
        views = list({id(v): v for v in views}.values())
        handle = stream_handle(stream) if stream is not None else stream_of(views)
        with device.active(ordinal):
            if all(v.device != HOST for v in views):
                self._enqueue(env, grids, handle, ordinal)
                return
            staging = Staging(views)
            try:
                staging.copy_in(handle)
                placed = dict(env)
                for argument, value in [
                    *zip(self.program.arguments, values, strict=True),
                    *((b, memory[b]) for b in self.program.outputs),
                ]:
                    if isinstance(value, ArrayView) and value.device == HOST:
                        var = argument if isinstance(argument, Var) else argument.data
                        placed[var] = staging.address(value.address)  # type: ignore[index]
                self._enqueue(placed, grids, handle, ordinal)
                staging.copy_out(self._host_results(values, memory), handle)
            finally:
                staging.close()

    def _host_results(
        self, values: Sequence[Any], memory: Mapping[Buffer, ArrayView]
    ) -> list[ArrayView]:
        """Views whose memory a kernel may have changed: written ones and pointers' targets."""
        changed = [v for b, v in memory.items() if b.data in self._host.written]
        for argument, value in zip(self.program.arguments, values, strict=True):
            if isinstance(argument, Var) and isinstance(value, ArrayView) and value.writable:
                changed.append(value)
        return changed

    def _enqueue(
        self, env: Mapping[Var, Any], grids: Sequence[Grid], stream: int, ordinal: int
    ) -> None:
        for frame, grid in zip(self.kernels, grids, strict=True):
            if all(n > 0 for n in grid):
                values = frame.with_spaces(frame.launch_values(env), ordinal, stream)
                packed = frame.packer.pack(values)
                blocks = frame.launch_grid(grid, ordinal)
                frame.loaded.launch(blocks, packed, stream, ordinal)

    def _run_host(
        self,
        executor: Executor,
        env: Mapping[Var, Any],
        values: Sequence[Any],
        memory: Mapping[Buffer, ArrayView],
    ) -> None:
        hosts = {buffer: host_array(view) for buffer, view in memory.items()}
        reachable = [host_array(v) for v in values if isinstance(v, ArrayView)]
        reachable = [*hosts.values(), *reachable, *remembered_arrays()]
        segments = list({id(a): a for a in reachable if a.size}.values())
        for frame, grid in zip(self.kernels, self._grids(env), strict=True):
            if not all(n > 0 for n in grid):
                continue
            if executor is Executor.REFERENCE:
                _run_reference(frame.graph, env, hosts, grid, segments)
            else:
                blocks = frame.launch_grid(grid, None)
                spaces: list[Any] = []
                given = frame.simulator_values(env, spaces)
                simulator.run_lowered(frame.lowered, blocks, given, [*segments, *spaces])
                frame.check_spaces(spaces)


def _run_reference(
    kernel: Kernel,
    env: Mapping[Var, Any],
    hosts: Mapping[Buffer, np.ndarray[Any, Any]],
    grid: Grid,
    segments: Sequence[np.ndarray[Any, Any]],
) -> None:
    _say_where_once()
    arguments: dict[Buffer | Var, Any] = {}
    for part in (env, hosts):
        arguments.update(part)  # type: ignore[arg-type]
    reference.run_kernel(kernel, arguments, grid, memory=segments)


_said: list[bool] = []


def _say_where_once() -> None:
    if not _said and not device.has_gpu():
        _said.append(True)
        log.warning("No GPU found: tilejit runs its kernels on the NumPy reference executor.")
