"""`@tilejit`: the callable that traces, compiles and runs; and kernels made by factories.

Knows the order of things from call to launch. Does not know how any of them is done.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from tilejit.errors import ArgumentError, ArgumentTypeError, a_kind
from tilejit.ir.expr import Var
from tilejit.ir.kernel import Program
from tilejit.language.function import PrimFunc, TracedFunction
from tilejit.runtime import device
from tilejit.runtime.arrays import HOST, ArrayView
from tilejit.runtime.cache import SignatureCache
from tilejit.runtime.captures import Captures
from tilejit.runtime.choose import choose, has_open, with_notes
from tilejit.runtime.device import Executor
from tilejit.runtime.factory import prim_kernel
from tilejit.runtime.facts import slots_of
from tilejit.runtime.kernel import TileKernel
from tilejit.runtime.matching import symbol_multiples
from tilejit.runtime.signature import Call, Signature
from tilejit.runtime.traceback import without_our_frames
from tilejit.runtime.warm import WarmCalls
from tilejit.target import Target, as_target


class TileFunction:
    """A Python function that runs as a GPU kernel; made by `@tilejit`.

    Call it with arrays: the kernel for their shapes, strides, dtypes and alignment is made at the
    first call and found at the next.
    """

    def __init__(
        self,
        function: types.FunctionType,
        *,
        out_idx: int | Sequence[int] | None = None,
        target: str | Target | None = None,
        fast_math: bool = False,
    ) -> None:
        functools.update_wrapper(self, function)
        self.__name__ = function.__name__
        self._traced = TracedFunction(function)
        self._signature = Signature(self._traced, function, function.__name__)
        self._captures = Captures(function, function.__name__)
        self._out_idx = out_idx
        self._target = None if target is None else as_target(target)
        self._fast_math = fast_math
        self._cache: SignatureCache[TileKernel] = SignatureCache()
        self._own_stream = "stream" in self._signature.binder.names
        self._warm = WarmCalls(
            self._signature.binder, slots_of(self._signature), self._captures.key
        )
        self.capture_knobs = (out_idx, str(target), fast_math)

    def __repr__(self) -> str:
        return f"<tilejit function {self.__name__}>"

    def __get__(self, instance: object, owner: type | None = None) -> TileFunction:
        if instance is not None:
            raise ArgumentTypeError(
                f"{self.__name__}: a tile function is not a method, so it has no `self`.",
                hint="Define it outside the class, or below `@staticmethod`.",
            )
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the arguments; a factory returns its kernel.

        Args:
            stream: the CUDA stream to run on, where the function has no parameter of that name;
                otherwise the current one of the first tensor's framework.

        Raises:
            TileError: a wrong argument, or a mistake in the function.
        """
        with without_our_frames():
            stream = None if self._own_stream else kwargs.pop("stream", None)
            look = self._warm.look(args, kwargs)
            if look is not None and look.launch is not None:
                return look.run(stream)
            call = self._signature.bind(args, kwargs)
            symbols = self._signature.match(call)
            executor = device.executor()
            target = self._target_of(call.views, executor)
            multiples = symbol_multiples(symbols)
            key = (call.key, self._captures.key(), target.key, tuple(multiples.values()))
            kernel = self._cache.find(key)
            if kernel is None:
                kernel = self._cache.find_or_build(
                    key, lambda: self._build(call, target, multiples)
                )
            if kernel.is_factory_made:
                return kernel
            return kernel.run(call.values, symbols, stream, executor, self._warm, look)

    def compile(self, *args: Any, target: str | Target | None = None, **kwargs: Any) -> TileKernel:
        """The kernel for these arguments, checked and generated but not run.

        Args:
            args, kwargs: as in a call; a tensor may be described instead by `T.Tensor(shape,
                dtype)`, which promises an address that is a multiple of 16 bytes, or of `align`.
                Tensors with a declared shape, scalars and pointers may be left out.
            target: such as "sm_90a"; the GPU's, or without one `TILEJIT_TARGET` or sm_80.

        Raises:
            TileError: a mistake in the function, or something that the target does not have.
        """
        with without_our_frames():
            call = self._signature.bind_specs(args, kwargs)
            executor = device.executor()
            chip = self._target_of((), executor) if target is None else as_target(target)
            multiples = symbol_multiples(self._signature.match_specs(call))
            key = (call.key, self._captures.key(), chip.key, tuple(multiples.values()))
            kernel = self._cache.find_or_build(key, lambda: self._build(call, chip, multiples))
            kernel.lower()
            return kernel

    def _target_of(self, views: Sequence[ArrayView], executor: Executor) -> Target:
        """The chip that a kernel on these arguments is for."""
        if executor is not Executor.GPU:
            return self._target or device.offline_target()
        ordinal = next((v.device for v in views if v.device != HOST), None)
        if ordinal is None:
            ordinal = device.current_device()
        own = device.target_of(ordinal)
        if self._target is None or self._target.name == own.name:
            return own
        if not views:
            return self._target
        if not device.runs_on(self._target, ordinal):
            raise ArgumentError(
                f"{self.__name__} was asked for {self._target}, but the GPU is {own}.",
                hint="Leave `target` out to compile for the GPU at hand.",
            )
        return self._target

    def _build(
        self, call: Call, target: Target, multiples: Mapping[Var, int] | None = None
    ) -> TileKernel:
        if not has_open(call.constants):
            return self._made(call, target, multiples)

        def build(constants: dict[str, Any]) -> Program:
            return self._made(
                dataclasses.replace(call, constants=constants), target, multiples
            ).program

        choice = choose(call.constants, build, target)
        call = dataclasses.replace(call, constants={**call.constants, **choice.values})
        return self._made(call, target, multiples, choice.notes)

    def _made(
        self,
        call: Call,
        target: Target,
        multiples: Mapping[Var, int] | None = None,
        notes: tuple[str, ...] = (),
    ) -> TileKernel:
        traced = self._traced.trace(
            self._signature.trace_arguments(call), name=self.__name__, fast_math=self._fast_math
        )
        if isinstance(traced, PrimFunc):
            if call.names:
                raise ArgumentTypeError(
                    f"{self.__name__} returns a T.prim_func, so it takes sizes, not arrays.",
                    hint=f"Call the kernel that it returns: `{self.__name__}(M, N)(a, b)`.",
                )
            return prim_kernel(traced, target, self._out_idx, self._fast_math, notes)
        if not isinstance(traced, Program):
            raise ArgumentTypeError(f"{self.__name__} returns {a_kind(traced)}.")
        if self._out_idx is not None:
            raise ArgumentTypeError(
                f"{self.__name__}: out_idx is for a function that returns a T.prim_func.",
                hint="Make the output with `C = T.empty(shape, dtype)` and return it.",
            )
        if multiples:
            kernels = (dataclasses.replace(k, multiples=multiples) for k in traced.kernels)
            traced = dataclasses.replace(traced, kernels=tuple(kernels))
        traced = with_notes(traced, notes)
        return TileKernel(
            traced, target, call.names, constants=call.constants, overlaps=call.overlaps
        )


@overload
def tilejit(function: Callable[..., Any], /) -> TileFunction: ...


@overload
def tilejit(
    *,
    out_idx: int | Sequence[int] | None = None,
    target: str | Target | None = None,
    fast_math: bool = False,
) -> Callable[[Callable[..., Any]], TileFunction]: ...


def tilejit(function: Any = None, /, **settings: Any) -> Any:
    """Make a Python function run as a GPU kernel.

    Args:
        function: what is decorated; its parameters are tensors (`A: T.Tensor`, with a shape where
            it is fixed), runtime scalars (`alpha: T.float32`), pointers (`p: T.ptr`), and
            compile-time constants.
        out_idx: of a factory (a function of sizes that returns a `T.prim_func`): which of the
            inner function's parameters are made and returned by a call; negative from the end.
        target: compile for this chip instead of the GPU at hand.
        fast_math: allow approximate float32 division, square roots and functions, and
            contraction of products with sums.

    Raises:
        ArgumentTypeError: not a Python function.

    Example:
        >>> @tilejit
        ... def double(A: T.Tensor, B: T.Tensor):
        ...     with T.Kernel(1, threads=32):
        ...         for i in T.Parallel(A.shape[0]):
        ...             B[i] = 2 * A[i]
    """
    if function is None:
        return functools.partial(_decorate, settings)
    return _decorate(settings, function)


def _decorate(settings: Mapping[str, Any], function: Any) -> TileFunction:
    unknown = settings.keys() - inspect.signature(TileFunction).parameters.keys()
    if unknown:
        raise ArgumentTypeError(
            f"tilejit has no option `{min(unknown)}`.",
            hint="It has: out_idx, target, fast_math.",
        )
    if isinstance(function, staticmethod | classmethod):
        raise ArgumentTypeError(
            f"@tilejit does not decorate {a_kind(function)}.",
            hint="Put `@staticmethod` above `@tilejit`.",
        )
    if isinstance(function, TileFunction):
        raise ArgumentTypeError(f"{function.__name__} is a tile function already.")
    if not isinstance(function, types.FunctionType):
        raise ArgumentTypeError(f"@tilejit decorates a Python function, not {a_kind(function)}.")
    return TileFunction(function, **settings)
