"""Generated Python source to an LLVM module, by Numba's CUDA front end.

Knows Numba's contexts and passes. Does not know NVVM, PTX or cubins.

The contexts install only the few registries that a skeleton of assignments, calls, loops and
branches needs: Numba's full set (fp16, bf16 and fp8 headers, libdevice, ufuncs, arrays) costs the
first compile of a process 0.3 s.
"""

from __future__ import annotations

import contextlib
import linecache
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numba import cuda
from numba.cuda import compiler, cudadecl, types, utils
from numba.cuda.core.callconv import CUDACallConv
from numba.cuda.core.compiler_lock import global_compiler_lock
from numba.cuda.cudadrv import nvvm
from numba.cuda.flags import CUDAFlags
from numba.cuda.target import CUDATargetContext, CUDATypingContext
from numba.cuda.typing import builtins as typing_builtins

from tilejit.isa.machine import Lowered
from tilejit.lower.intrinsic import (
    TENSOR_MAP_ALIGN,
    GranuleCall,
    make_intrinsic,
    numba_type,
)
from tilejit.lower.llvm_values import (
    LOOP_BLOCK,
    constant_node,
    ir_int,
    keep_rolled,
    metadata_string,
)
from tilejit.target import Target

_BY_VALUE = re.compile(r"byval\(\[\d+ x i8\]\)")
_ENVIRONMENT = ".NumbaEnv."  # how Numba begins the name of a function's Python environment


class _TypingContext(CUDATypingContext):  # type: ignore[misc]
    """Types granules, `cuda.blockIdx` and builtin scalars."""

    def load_additional_registries(self) -> None:
        self.install_registry(cudadecl.registry)

    def _load_builtins(self) -> None:
        self.install_registry(typing_builtins.registry)

    def resolve_value_type(self, val: Any) -> Any:
        if isinstance(val, GranuleCall):
            return val.function_type
        return super().resolve_value_type(val)


class _TargetContext(CUDATargetContext):  # type: ignore[misc]
    """Lowers granules by their emitters; names kernels as they are written."""

    def load_additional_registries(self) -> None:
        from numba.cuda import cudaimpl
        from numba.cuda.cpython import builtins, numbers, tupleobj

        for module in (cudaimpl, tupleobj, numbers, builtins):
            self.install_registry(module.registry)

    def get_function(self, fn: Any, sig: Any, _firstcall: bool = True) -> Any:
        if isinstance(fn, types.Function) and isinstance(fn.typing_key, GranuleCall):
            return _Lowering(fn.typing_key, self)
        return super().get_function(fn, sig, _firstcall)


class _CallConvention(CUDACallConv):  # type: ignore[misc]
    """Numba's, with kernels named as they are written."""

    def mangler(self, name: str, argtypes: Any, *, abi_tags: Any = (), uid: Any = None) -> str:
        if name.startswith(_ENVIRONMENT):
            return name
        return re.sub(r"\W", "_", name.rpartition(".")[2], flags=re.ASCII)


class _Lowering:
    """A granule's implementation, called as Numba calls one."""

    def __init__(self, call: GranuleCall, context: Any) -> None:
        self.call = call
        self.context = context

    def __call__(self, builder: Any, args: Any, loc: Any = None) -> Any:
        return self.call.lower(self.context, builder, args)


_contexts: list[Any] = []


def _get_contexts() -> Any:
    if not _contexts:
        typing_context = _TypingContext()
        _contexts[:] = [typing_context, _TargetContext(typing_context)]
    return _contexts


@contextlib.contextmanager
def _defined(lowered: Lowered, target: Target) -> Iterator[Callable[..., Any]]:
    """The kernel as a Python function, whose source Numba's messages can show meanwhile."""
    filename = f"<tilejit {lowered.entry} {id(lowered):x}>"
    lines = lowered.source.splitlines(keepends=True)
    namespace: dict[str, Any] = {"cuda": cuda, "__name__": "tilejit_kernel"}
    for name, granule in lowered.granules.items():
        namespace[name] = make_intrinsic(granule, target, lowered.fast_math, lowered.threads)
    linecache.cache[filename] = (len(lowered.source), None, lines, filename)
    try:
        exec(compile(lowered.source, filename, "exec"), namespace)
        yield namespace[lowered.entry]
    finally:
        linecache.cache.pop(filename, None)


def _flags(target: Target) -> Any:
    flags = CUDAFlags()
    flags.no_compile = True  # only lower
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.compute_capability = target.cc
    flags.max_registers = None
    flags.lto = False
    return flags


def lower_to_llvm(lowered: Lowered, target: Target) -> tuple[str, str]:
    """The LLVM module of a kernel as text, and the kernel's name in it.

    Raises whatever Numba raises: the source is ours, so any error is a defect.
    """
    arguments = tuple(numba_type(slot) for _, slot in lowered.parameters)
    with (
        _defined(lowered, target) as kernel,
        global_compiler_lock,
        utils.numba_target_override(),
    ):
        typing_context, target_context = _get_contexts()
        result = compiler.compile_extra(
            typingctx=typing_context,
            targetctx=target_context,
            func=kernel,
            args=arguments,
            return_type=None,
            flags=_flags(target),
            locals={},
            pipeline_class=compiler.CUDACompiler,
            call_conv=_CallConvention(target_context),
            abi_info={},
        )
        library = result.library
        library.finalize()
        function = library.get_function(result.fndesc.llvm_func_name)
        compiler.kernel_fixup(function, False)
        nvvm.set_launch_bounds(function, (_product(lowered.threads), lowered.min_blocks))
        if lowered.cluster != (1, 1, 1):
            for axis, blocks in zip("xyz", lowered.cluster, strict=True):
                _annotate(function, f"cluster_dim_{axis}", ir_int(blocks))
        for argument, alone in zip(function.args, lowered.noalias, strict=True):
            if alone:
                argument.add_attribute("noalias")
        _pass_by_value(function, lowered.tensor_maps)
        _keep_loops_rolled(function)
        _drop_environment(function.module)
        text = str(function.module)
        if not target.has_modern_ir:  # where attributes have no types
            text = _BY_VALUE.sub("byval", text)
        return text, function.name


def _pass_by_value(function: Any, is_map: Sequence[bool]) -> None:
    """Let tensor maps be parameters themselves, read where they lie: the hardware wants the
    address of one in parameter memory (CUDA Programming Guide, "__grid_constant__")."""
    numbers = [n for n, is_one in enumerate(is_map, 1) if is_one]
    for n in numbers:
        argument = function.args[n - 1]
        argument.add_attribute("byval")
        argument.attributes.align = TENSOR_MAP_ALIGN
    if numbers:
        _annotate(function, "grid_constant", constant_node(function.module, numbers))


def _annotate(function: Any, key: str, value: Any) -> None:
    """Add an annotation of NVVM's to a kernel (NVVM IR Specification, "Global Property
    Annotation")."""
    module = function.module
    annotations = module.add_named_metadata("nvvm.annotations")
    annotations.add(module.add_metadata([function, metadata_string(module, key), value]))


def _product(threads: tuple[int, int, int]) -> int:
    return threads[0] * threads[1] * threads[2]


def _drop_environment(module: Any) -> None:
    """Remove the global that Numba's CPU functions find their Python environment by."""
    for name in [n for n in module.globals if n.startswith(_ENVIRONMENT)]:
        del module.globals[name]


def _successors(block: Any) -> list[Any]:
    operands = block.terminator.operands if block.terminator is not None else ()
    return [o for o in operands if hasattr(o, "terminator")]


def _keep_loops_rolled(function: Any) -> None:
    """Mark the back edges of the skeleton's loops; the machine has decided about its own."""
    entry = function.blocks[0]
    on_path: set[Any] = {entry}
    seen: set[Any] = {entry}
    stack = [(entry, iter(_successors(entry)))]
    while stack:
        block, successors = stack[-1]
        following = next(successors, None)
        if following is None:
            on_path.discard(block)
            stack.pop()
        elif following in on_path:
            if not following.name.startswith(LOOP_BLOCK):
                keep_rolled(function.module, block.terminator)
        elif following not in seen:
            seen.add(following)
            on_path.add(following)
            stack.append((following, iter(_successors(following))))
