"""Compiling a generated kernel: every target, what is reported, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading

import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.dtypes import bfloat16, bool_, float16, float32, float64, int32, uint8
from tilejit.errors import InternalError, UnsupportedError
from tilejit.isa.machine import Address, Granule, Lowered, Slot
from tilejit.runtime import compile as compile_module
from tilejit.runtime.compile import compile_lowered, disassemble
from tilejit.target import TARGETS

INT, FLAG, ADDRESS = Slot(int32), Slot(bool_), Slot(uint8, address=True)
ACCUMULATOR = Slot(float32, 4)


def granule(name, inputs, outputs, emit):
    return name, Granule(name, inputs, outputs, emit)


def lower_axpy(entry="axpy", threads=(128, 1, 1), shared_bytes=0, fast_math=False):
    """Y[i] = 2 X[i] + 1 over a grid-stride loop in the skeleton, eight elements a step."""

    def start(m, inputs):
        width = m.const(threads[0], int32)
        return [m.binary("add", m.binary("mul", inputs[0], width, int32), m.thread_index(), int32)]

    def more(m, inputs):
        return [m.binary("lt", *inputs, int32)]

    def step(m, inputs):
        x, y, i = inputs
        offset = m.binary("mul", i, m.const(16, int32), int32)
        values = m.load(Address("global", x, offset, 0, 16, True), bfloat16, 8)
        wide = m.cast(values, bfloat16, float32)
        two, one = m.const(2.0, float32), m.const(1.0, float32)
        wide = [m.binary("add", m.binary("mul", v, two, float32), one, float32) for v in wide]
        m.store(Address("global", y, offset, 0, 16), m.cast(wide, float32, bfloat16), bfloat16)
        return []

    def advance(m, inputs):
        return [m.binary("add", inputs[0], m.const(4096, int32), int32)]

    return Lowered(
        source=textwrap.dedent(f"""\
            def {entry}(X, Y, n):
                bx = cuda.blockIdx.x
                i = start_1(bx)
                while more_2(i, n):
                    step_3(X, Y, i)
                    i = next_4(i)
            """),
        entry=entry,
        parameters=(("X", ADDRESS), ("Y", ADDRESS), ("n", INT)),
        noalias=(True, False, False),
        granules=dict([
            granule("start_1", (INT,), (INT,), start),
            granule("more_2", (INT, INT), (FLAG,), more),
            granule("step_3", (ADDRESS, ADDRESS, INT), (), step),
            granule("next_4", (INT,), (INT,), advance),
        ]),
        threads=threads,
        shared_bytes=shared_bytes,
        fast_math=fast_math,
    )  # fmt: skip


def lower_values(source, granules, parameters=(("X", ADDRESS), ("n", INT))):
    return Lowered(
        source=textwrap.dedent(source), entry="kernel", parameters=parameters,
        noalias=(False,) * len(parameters), granules=dict(granules),
        threads=(64, 1, 1), shared_bytes=0,
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_compile_gives_a_cubin_for_every_target_without_spills(target):
    compiled = compile_lowered(lower_axpy(), target)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert f".target {target}" in compiled.ptx
    assert (compiled.spill_bytes, compiled.stack_bytes) == (0, 0)
    assert 8 <= compiled.registers <= 64
    assert "C75" not in compiled.log
    assert set(compiled.stage_seconds) == {"import", "front_end", "nvvm", "link"}


def test_compile_names_the_kernel_as_the_source_does():
    compiled = compile_lowered(lower_axpy("tile_kernel"), TARGETS["sm_90a"])
    assert compiled.entry == "tile_kernel"
    assert ".visible .entry tile_kernel(" in compiled.ptx


def test_compile_twice_gives_the_same_code():
    first, second = (compile_lowered(lower_axpy(), TARGETS["sm_80"]) for _ in range(2))
    assert first.ptx == second.ptx and first.cubin == second.cubin


def test_compile_bounds_the_registers_by_the_block():
    ptx = compile_lowered(lower_axpy(threads=(64, 4, 1)), TARGETS["sm_80"]).ptx
    assert re.search(r"\.maxntid 256\b", ptx) and ".minnctapersm 1" in ptx


def test_skeleton_loop_is_not_unrolled():
    ptx = compile_lowered(lower_axpy(), TARGETS["sm_80"]).ptx
    assert ptx.count("ld.global.nc.v4.b32") == 1
    assert "nounroll" in ptx


def test_compile_reports_the_dynamic_shared_memory_of_the_kernel():
    assert compile_lowered(lower_axpy(shared_bytes=98304), TARGETS["sm_90"]).shared_bytes == 98304


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a"])
def test_tuples_go_through_python_variables_and_stay_registers(target):
    def zeros(m, inputs):
        return [[m.const(0.0, float32)] * 4]

    def accumulate(m, inputs):
        acc, base, k = inputs
        offset = m.binary("mul", k, m.const(16, int32), int32)
        values = m.load(Address("global", base, offset, 0, 16, True), float32, 4)
        total = [m.binary("add", a, v, float32) for a, v in zip(acc, values, strict=True)]
        return [total, m.binary("add", k, m.const(1, int32), int32)]

    def less(m, inputs):
        return [m.binary("lt", *inputs, int32)]

    def zero(m, inputs):
        return [m.const(0, int32)]

    def write(m, inputs):
        m.store(Address("global", inputs[0], None, 0, 16), inputs[1], float32)
        return []

    lowered = lower_values(
        """
        def kernel(X, n):
            acc = zeros_0()
            k = zero_1()
            while less_2(k, n):
                acc, k = accumulate_3(acc, X, k)
            write_4(X, acc)
        """,
        [
            granule("zeros_0", (), (ACCUMULATOR,), zeros),
            granule("zero_1", (), (INT,), zero),
            granule("less_2", (INT, INT), (FLAG,), less),
            granule("accumulate_3", (ACCUMULATOR, ADDRESS, INT), (ACCUMULATOR, INT), accumulate),
            granule("write_4", (ADDRESS, ACCUMULATOR), (), write),
        ],
    )
    compiled = compile_lowered(lowered, TARGETS[target])
    assert compiled.stack_bytes == 0 and ".local" not in compiled.ptx
    assert compiled.ptx.count("add.rn.f32") == 4


@pytest.mark.parametrize("dtype", [bool_, float16, float64, bfloat16, uint8], ids=str)
def test_scalars_of_every_kind_pass_as_parameters_and_through_branches(dtype):
    def write(m, inputs):
        base, value = inputs
        m.store(Address("global", base, None, 0, 8), [value], dtype)
        return []

    def positive(m, inputs):
        return [m.binary("gt", inputs[0], m.const(0, int32), int32)]

    def one(m, inputs):
        return [m.const(1, dtype)]

    lowered = lower_values(
        """
        def kernel(X, n, s):
            if positive_0(n):
                t = one_1()
            else:
                t = s
            write_2(X, t)
        """,
        [
            granule("positive_0", (INT,), (FLAG,), positive),
            granule("one_1", (), (Slot(dtype),), one),
            granule("write_2", (ADDRESS, Slot(dtype)), (), write),
        ],
        (("X", ADDRESS), ("n", INT), ("s", Slot(dtype))),
    )
    assert compile_lowered(lowered, TARGETS["sm_86"]).stack_bytes == 0


def test_addresses_can_be_computed_and_stored():
    def shift(m, inputs):
        place = Address("global", inputs[0], m.binary("mul", inputs[1], m.const(4, int32), int32))
        return [m.address(place)]

    def write(m, inputs):
        m.store(Address("global", inputs[0], None, 0, 4), [m.const(1.0, float32)], float32)
        return []

    lowered = lower_values(
        """
        def kernel(X, n):
            p = shift_0(X, n)
            write_1(p)
        """,
        [
            granule("shift_0", (ADDRESS, INT), (ADDRESS,), shift),
            granule("write_1", (ADDRESS,), (), write),
        ],
    )
    assert "st.global.b32" in compile_lowered(lowered, TARGETS["sm_89"]).ptx


def test_compile_from_several_threads_at_once_gives_the_same_cubin():
    results, errors = {}, []

    def work(number):
        try:
            results[number] = compile_lowered(lower_axpy(), TARGETS["sm_90a"]).cubin
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 4 and len(set(results.values())) == 1


# --- what goes wrong -----------------------------------------------------------------------------


def test_defect_in_the_source_names_the_generated_line():
    lowered = lower_values("def kernel(X, n):\n    m = unknown_7(n)\n", [])
    with pytest.raises(InternalError) as caught:
        compile_lowered(lowered, TARGETS["sm_80"])
    text = str(caught.value)
    assert text.startswith("The generated kernel could not be lowered (kernel).")
    assert "m = unknown_7(n)" in text
    assert "please report" in text


def test_defect_in_an_emitter_is_reported_with_its_granule():
    def wrong(m, inputs):
        return []

    lowered = lower_values(
        "def kernel(X, n):\n    m = wrong_3(n)\n    wrong_3(m)\n",
        [granule("wrong_3", (INT,), (INT,), wrong)],
    )
    with pytest.raises(InternalError) as caught:
        compile_lowered(lowered, TARGETS["sm_80"])
    assert caught.value.headline == "The code of `wrong_3` could not be generated."
    assert caught.value.notes == ("AssertionError: it returned 0 values and declares 1",)
    assert "please report" in caught.value.hint


def test_error_of_the_user_inside_an_emitter_passes_unchanged():
    def refuse(m, inputs):
        raise UnsupportedError("No such thing.")

    lowered = lower_values(
        "def kernel(X, n):\n    refuse_0(n)\n", [granule("refuse_0", (INT,), (), refuse)]
    )
    with pytest.raises(UnsupportedError, match="No such thing"):
        compile_lowered(lowered, TARGETS["sm_80"])


def test_assembler_error_is_reported_with_its_text():
    def broken(m, inputs):
        m.assemble("not.an.instruction $a0;", (), (inputs[0],), has_effect=True)
        return []

    lowered = lower_values(
        "def kernel(X, n):\n    broken_0(n)\n", [granule("broken_0", (INT,), (), broken)]
    )
    with pytest.raises(InternalError) as caught:
        compile_lowered(lowered, TARGETS["sm_80"])
    assert str(caught.value).startswith("The assembler refused the generated code (kernel).")
    assert "fatal" in caught.value.notes[0] or "error" in caught.value.notes[0]


def test_compile_under_the_simulator_variable_says_so_in_one_sentence():
    script = """
        from tilejit.errors import UnsupportedError
        from tilejit.isa.machine import Lowered
        from tilejit.runtime.compile import compile_lowered
        from tilejit.target import TARGETS
        lowered = Lowered("def k():\\n    pass\\n", "k", (), (), {}, (32, 1, 1), 0)
        try:
            compile_lowered(lowered, TARGETS["sm_80"])
        except UnsupportedError as error:
            print(error.headline)
    """
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == (
        "NUMBA_ENABLE_CUDASIM is set, and Numba compiles nothing in a process that has it."
    )


def test_importing_the_compile_module_does_not_import_numba():
    code = "import sys, tilejit.runtime.compile; print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_disassemble_without_nvdisasm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compile_module, "_find_nvdisasm", lambda: None)
    with pytest.raises(UnsupportedError) as caught:
        disassemble(b"\x7fELF")
    assert "needs nvdisasm, which is not installed" in caught.value.headline
    assert "pip install" in caught.value.hint


def test_disassemble_passes_the_cubin_and_returns_the_text(monkeypatch, tmp_path):
    program = tmp_path / "nvdisasm"
    program.write_text("#!/bin/sh\nwc -c < $2\n")
    program.chmod(0o755)
    monkeypatch.setattr(compile_module, "_find_nvdisasm", lambda: str(program))
    assert disassemble(b"x" * 123).strip() == "123"
    program.write_text("#!/bin/sh\necho no such format >&2\nexit 3\n")
    with pytest.raises(InternalError) as caught:
        disassemble(b"x")
    assert "no such format" in str(caught.value)


def test_ptx_is_made_only_for_who_asks(monkeypatch):
    """The linker wants LTO-IR: PTX costs another run of libNVVM."""
    runs = []

    def counted(llvm, target, fast_math, more=()):
        runs.append(tuple(more))
        return run(llvm, target, fast_math, more)

    run = compile_module._run_nvvm
    monkeypatch.setattr(compile_module, "_run_nvvm", counted)

    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                A[i] = 1.0

    compiled = kernel.compile(T.Tensor((32,), "float32"), target="sm_90a")
    assert compiled.cubin and runs == [("-gen-lto",)]
    assert ".entry" in compiled.ptx and compiled.ptx and runs == [("-gen-lto",), ()]


@tilejit
def scaled(X: T.Tensor, Y: T.Tensor, by: T.Tensor = None, *, change=None):
    with T.Kernel(1, threads=32):
        for i in T.Parallel(32):
            x = X[i] if by is None else X[i] * by[0]
            Y[i] = x if change is None else change(x)


def test_compile_leaves_out_tensors_as_calls_do():
    shape = T.Tensor((32,), "float32")
    for given in ((), (None,)):
        kernel = scaled.compile(shape, shape, *given, target="sm_80", change=lambda x: x + 1)
        assert [p.name for p in kernel.kernels[0].graph.params] == ["X", "Y"]
    kernel = scaled.compile(shape, shape, T.Tensor((1,), "float32"), target="sm_80")
    assert [p.name for p in kernel.kernels[0].graph.params] == ["X", "Y", "by"]
