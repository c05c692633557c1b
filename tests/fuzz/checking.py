"""Runs a generated program everywhere and compares: its meaning, the tile graph after every pass
on the reference executor, and the generated kernel on the simulator.

Knows how arguments are laid out in memory. Does not know how programs are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import linecache
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from writing import Program

from tilejit import passes
from tilejit.dtypes import as_dtype
from tilejit.errors import ArgumentError, OutOfRangeError
from tilejit.ir.kernel import ParamKind
from tilejit.runtime.device import use_executor
from tilejit.runtime.kernel import TileKernel

# What a generated program may be refused for though it would never come to it: an index that is
# certainly out of range, a divisor that folds to 0.
REFUSALS = (r"^Index .* is outside dimension \d+ of ", r"^Integer division by zero\.$")
GUARD = 64  # bytes before and after an argument that must stay as they are


class Argument:
    """An array inside a larger allocation, at some alignment and with some strides."""

    def __init__(self, values: np.ndarray, rng: random.Random, is_plain: bool) -> None:
        size = values.itemsize
        self.padded = values.shape
        kind = "plain" if is_plain else rng.choice(["plain", "plain", "offset", "wide", "turned"])
        shape = values.shape
        if kind == "wide":
            shape = (*shape[:-1], shape[-1] + rng.choice([1, 3, 4, 8]))
        elif kind == "turned":
            shape = shape[::-1]
        offset = rng.choice([1, 2, 4]) * size if kind == "offset" else 0
        count = int(np.prod(shape)) * size
        memory = np.full(count + 2 * GUARD + 64, 0xA5, np.uint8)
        start = GUARD + (-(memory.ctypes.data + GUARD)) % 16 + offset
        inner = memory[start : start + count].view(values.dtype).reshape(shape)
        if kind == "turned":
            inner = inner.T
        elif kind == "wide":
            inner = inner[..., : values.shape[-1]]
        self.kind, self.memory, self.view = kind, memory, inner
        inner[...] = values
        self.before = memory.copy()

    def reset(self) -> None:
        self.memory[...] = self.before

    def is_touched_outside(self) -> bool:
        """True when bytes changed that are none of the array's."""
        after = self.memory.copy()
        self.reset_inner(after)
        return bool((after != self.before).any())

    def reset_inner(self, memory: np.ndarray) -> None:
        """Give the array's own bytes their first value in a copy of its memory."""
        start = self.view.ctypes.data - self.memory.ctypes.data
        own = np.lib.stride_tricks.as_strided(
            memory[start:].view(np.uint8)[: len(memory) - start],
            (*self.view.shape, self.view.itemsize),
            (*self.view.strides, 1),
        )
        first = np.lib.stride_tricks.as_strided(self.before[start:], own.shape, own.strides)
        own[...] = first


def build(program: Program) -> Any:
    """The @tilejit function of the program's source."""
    digest = hashlib.sha256(program.source.encode()).hexdigest()[:12]
    filename = f"<fuzz {digest}>"
    lines = program.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(program.source), None, lines, filename)
    names: dict[str, Any] = {"__name__": "fuzz"}
    exec(compile(program.source, filename, "exec"), names)
    return names["kernel"]


def compile_some(
    make: Callable[[int], Program], seed: int, target: str
) -> tuple[Program, TileKernel, dict[str, Argument]]:
    """The program of `seed`, or where the language refuses that, of one after it; its kernel, and
    arguments for it."""
    for attempt in range(5):
        number = seed + attempt * 1_000_003
        program = make(number)
        try:
            return program, *compile_program(program, number, target)
        except (OutOfRangeError, ArgumentError) as error:
            if not any(re.search(reason, error.headline) for reason in REFUSALS):
                raise
    raise AssertionError("the language refuses five programs in a row")


def check_some(make: Callable[[int], Program], seed: int, target: str) -> None:
    check(*compile_some(make, seed, target))


def compile_program(
    program: Program, seed: int, target: str
) -> tuple[TileKernel, dict[str, Argument]]:
    """The kernel, and arguments for it laid out in memory as `seed` says."""
    rng = random.Random(seed)
    is_plain = rng.random() < 0.5
    arguments = {
        name: Argument(a, rng, is_plain or name in program.declared)
        for name, a in program.arrays.items()
    }
    arguments |= {name: arguments[other] for name, other in program.twins.items()}
    return build(program).compile(**given(program, arguments), target=target), arguments


def given(program: Program, arguments: dict[str, Argument]) -> dict[str, Any]:
    return {name: x.view for name, x in arguments.items()} | program.scalars


def check(program: Program, kernel: TileKernel, arguments: dict[str, Argument]) -> None:
    """Assert that everything that can run the program agrees with its meaning, bit for bit."""
    (frame,) = kernel.kernels
    for stage, graph in passes.stages(frame.graph, kernel.target):
        own = (ParamKind.WORKSPACE, ParamKind.TENSOR_MAP)
        if graph.is_persistent or any(p.kind in own for p in graph.params):
            break  # which tile a block computes, and what the runtime adds, is not in the arguments
        with use_executor("reference"):
            _with_graph(kernel, graph)(**given(program, arguments))
        compare(program, arguments, f"the reference executor after {stage}")
    with use_executor("simulator"):
        kernel(**given(program, arguments))
    compare(program, arguments, "the simulator")


def _with_graph(kernel: TileKernel, graph: Any) -> TileKernel:
    program = dataclasses.replace(kernel.program, kernels=(graph,))
    return TileKernel(program, kernel.target, kernel.names, overlaps=sorted(kernel._overlaps))


def compare(program: Program, arguments: dict[str, Argument], who: str) -> None:
    """Assert that the outputs are as expected and nothing else changed; then undo the run."""
    for name, argument in arguments.items():
        assert not argument.is_touched_outside(), f"{who} wrote outside {name}"
        if name in program.outputs:
            bounds = program.bounds.get(name)
            if bounds is None:
                want = program.expected[name]
                assert_same(argument.view, want, f"{who}: {name}", program.has_sums)
            else:
                assert_near(argument.view, program.expected[name], bounds, f"{who}: {name}")
        else:
            assert_same(argument.view, program.arrays[name], f"{who} changed the input {name}")
    for argument in arguments.values():
        argument.reset()


def assert_near(got: np.ndarray, want: np.ndarray, bounds: np.ndarray, where: str) -> None:
    wrong = ~(np.abs(got.astype(np.float64) - want) <= bounds)
    assert not wrong.any(), f"{where}: {wrong.sum()} of {wrong.size} are too far off"


def assert_same(
    got: np.ndarray, want: np.ndarray, where: str, is_unsigned_zero: bool = False
) -> None:
    wrong = canonical(got, is_unsigned_zero) != canonical(want, is_unsigned_zero)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{where}{list(at)} is {got[at]!r}, not {want[at]!r}; "
            f"{wrong.sum()} of {wrong.size} differ"
        )


def canonical(a: np.ndarray, is_unsigned_zero: bool = False) -> np.ndarray:
    """The bits, with all NaN alike, and on request both zeros."""
    array = np.ascontiguousarray(a)
    raw = array.view(f"u{a.itemsize}").copy()
    if as_dtype(a.dtype).is_float:
        numbers = array.astype(np.float64)
        raw[np.isnan(numbers)] = 1
        if is_unsigned_zero:
            raw[numbers == 0] = 0
    return raw
