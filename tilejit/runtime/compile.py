"""Generated kernel to cubin: Numba's front end, libNVVM, nvJitLink; no GPU and no driver.

Knows the compilers' options and how to read their logs. Does not know tile graphs, caches or how
a kernel is launched. Only the compilers of the installed wheels are used, and the cubin is made
by the nvJitLink of the same set as the libNVVM: PTX of a newer toolkit than the driver's would
not load.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tilejit.errors import InternalError, TileError, UnsupportedError
from tilejit.isa.machine import Lowered
from tilejit.target import Target


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel in machine code.

    cubin: for the target it was compiled for. llvm: what it was made from.
    entry: the kernel's name in both.
    registers: of a thread. spill_bytes: stored and loaded by a thread, in sum.
    stack_bytes: of a thread. shared_bytes: dynamic, of a block.
    log: what the compilers said. stage_seconds: wall time by stage.
    """

    cubin: bytes
    llvm: str
    target: Target
    fast_math: bool
    entry: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    log: str
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def ptx(self) -> str:
        """The PTX that libNVVM makes of the kernel; the way to the cubin has none."""
        return _text(bytearray(_run_nvvm(self.llvm, self.target, self.fast_math)[0]))


def compile_lowered(lowered: Lowered, target: Target) -> Compiled:
    """Compile a generated kernel.

    Raises:
        UnsupportedError: Numba's simulator is switched on for the process.
        InternalError: a compiler refused what was generated.
    """
    clock = _Clock()
    with _paused_collector():
        front_end = _load_front_end()
        clock.stop("import")
        try:
            llvm, entry = front_end.lower_to_llvm(lowered, target)
        except TileError:
            raise
        except Exception as error:
            raise _defect("The generated kernel could not be lowered", lowered, error) from error
        clock.stop("front_end")
    try:
        container, remarks = _run_nvvm(llvm, target, lowered.fast_math, ["-gen-lto"])
    except Exception as error:
        raise _defect("libNVVM refused the generated code", lowered, error) from error
    clock.stop("nvvm")
    try:
        cubin, log = _run_linker(container, target, lowered.fast_math)
    except Exception as error:
        raise _defect("The assembler refused the generated code", lowered, error) from error
    clock.stop("link")
    registers, spills, stack = _read_usage(log)
    return Compiled(
        cubin=cubin,
        llvm=llvm,
        target=target,
        fast_math=lowered.fast_math,
        entry=entry,
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        shared_bytes=lowered.shared_bytes,
        log="\n".join(filter(None, (remarks, log))),
        stage_seconds=clock.seconds,
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """No garbage collection meanwhile: it doubles the time of importing and of lowering, which
    make many small objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load_front_end() -> Any:
    from numba.cuda.core import config

    if config.ENABLE_CUDASIM:
        raise UnsupportedError(
            "NUMBA_ENABLE_CUDASIM is set, and Numba compiles nothing in a process that has it.",
            hint="Unset it to compile; the test suite simulates without it.",
        )
    from tilejit.lower import front_end

    return front_end


def _defect(headline: str, lowered: Lowered, error: Exception) -> InternalError:
    """The error with the generated lines that it names, else the whole source."""
    text = str(error)
    lines = lowered.source.splitlines()
    named = sorted(
        {int(n) for n in re.findall(r"<tilejit [^>]*>\"?[,:]? ?(?:line )?\(?(\d+)", text)}
    )
    shown = [f"line {n} is `{lines[n - 1].strip()}`" for n in named if 0 < n <= len(lines)]
    return InternalError(
        f"{headline} ({lowered.entry}).",
        notes=[f"{type(error).__name__}: {text}", *(shown or ["source:\n" + lowered.source])],
        hint="This is a defect of tilejit; please report it with this text.",
    )


# -- libNVVM ---------------------------------------------------------------------------------


def _math_options(fast_math: bool) -> list[str]:
    """Of libNVVM, and of the linker, which generates the code."""
    if fast_math:
        return ["-ftz=1", "-fma=1", "-prec-div=0", "-prec-sqrt=0"]
    return ["-ftz=0", "-fma=0", "-prec-div=1", "-prec-sqrt=1"]


def _run_nvvm(
    llvm: str, target: Target, fast_math: bool, more: Sequence[str] = ()
) -> tuple[bytes, str]:
    """The PTX, or with -gen-lto the module for the linker; and what libNVVM said."""
    from cuda.bindings import nvvm

    program = nvvm.create_program()
    try:
        module = llvm.encode()
        nvvm.add_module_to_program(program, module, len(module), "kernel")
        if "@__nv_" in llvm or '@"__nv_' in llvm:
            library = _libdevice()
            nvvm.lazy_add_module_to_program(program, library, len(library), "libdevice")
        options = [f"-arch={target.compute}", "-opt=3", *_math_options(fast_math), *more]
        failure: Exception | None = None
        try:
            nvvm.compile_program(program, len(options), options)
        except nvvm.nvvmError as error:
            failure = error
        log = bytearray(nvvm.get_program_log_size(program))
        nvvm.get_program_log(program, log)
        if failure is not None:
            raise RuntimeError(_text(log)) from failure
        result = bytearray(nvvm.get_compiled_result_size(program))
        nvvm.get_compiled_result(program, result)
    finally:
        nvvm.destroy_program(program)
    return bytes(result), _text(log)


def _text(buffer: bytearray) -> str:
    return buffer.decode(errors="replace").rstrip("\0 \n")


_libdevice_bitcode: list[bytes] = []


def _libdevice() -> bytes:
    if not _libdevice_bitcode:
        from numba.cuda.cudadrv.libs import open_libdevice

        _libdevice_bitcode.append(open_libdevice())
    return _libdevice_bitcode[0]


# -- nvJitLink -------------------------------------------------------------------------------


def _run_linker(module: bytes, target: Target, fast_math: bool) -> tuple[bytes, str]:
    """Through link-time optimisation: of PTX the linker makes code that others could be linked to,
    in which the assembler ignores setmaxnreg (C7504)."""
    from cuda.bindings import nvjitlink

    options = [f"-arch={target.name}", "-verbose", "-lto", "-no-cache", *_math_options(fast_math)]
    linker = nvjitlink.create(len(options), options)
    try:
        kind = nvjitlink.InputType.LTOIR
        try:
            nvjitlink.add_data(linker, kind, module, len(module), "kernel")
            nvjitlink.complete(linker)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(linker))
            nvjitlink.get_error_log(linker, log)
            raise RuntimeError(_text(log)) from error
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, cubin)
    finally:
        nvjitlink.destroy(linker)
    return bytes(cubin), _text(log)


_USED = re.compile(r"ptxas info\s*: Used (\d+) registers")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


# What nvJitLink says of a kernel that it has assembled before in the process.
_AGAIN = re.compile(r"used (\d+) registers, .*?(\d+) stack, .*?(\d+) bytes lmem")


def _read_usage(log: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack bytes, as the assembler reports them."""
    used, memory = _USED.search(log), _MEMORY.search(log)
    if used is None or memory is None:
        again = _AGAIN.search(log)
        if again is not None:
            registers, stack, local = map(int, again.groups())
            return registers, max(0, local - stack), stack
        raise InternalError("The assembler's report could not be read.", notes=[log])
    stack, stores, loads = map(int, memory.groups())
    return int(used[1]), stores + loads, stack


# -- nvdisasm --------------------------------------------------------------------------------


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text.

    Raises:
        UnsupportedError: nvdisasm is not installed.
        InternalError: nvdisasm refused the cubin.
    """
    program = _find_nvdisasm()
    if program is None:
        raise UnsupportedError(
            "Showing machine code needs nvdisasm, which is not installed.",
            hint="It is in NVIDIA's CUDA toolkit; `pip install nvidia-cuda-nvdisasm` brings it.",
        )
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        done = subprocess.run(
            [program, "-c", path], capture_output=True, text=True, check=False, timeout=120
        )
    finally:
        os.unlink(path)
    if done.returncode:
        raise InternalError("nvdisasm refused the cubin.", notes=[done.stderr.strip()])
    return done.stdout


def _find_nvdisasm() -> str | None:
    program = shutil.which("nvdisasm")
    if program is None:
        from cuda import pathfinder

        program = pathfinder.find_nvidia_binary_utility("nvdisasm")
    return program
