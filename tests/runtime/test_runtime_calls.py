"""Calls of tile functions: the four spellings, the caches, and where results go."""

from __future__ import annotations

import inspect
import logging
import threading

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import TileFunction, TileKernel, UnsupportedError, address_of, options, tilejit
from tilejit.runtime import device, kernel

SCALE = 2
FACTORS = [3]


@tilejit
def double(A: T.Tensor, B: T.Tensor, *, BN=32):
    """Doubles A into B."""
    (n,) = A.shape
    with T.Kernel(T.ceildiv(n, BN), threads=32) as bx:
        for i in T.Parallel(BN):
            B[bx * BN + i] = A[bx * BN + i] * 2


def filled(like):
    result = np.empty_like(like)
    result[...] = np.nan if result.dtype.kind == "f" else 77
    return result


@pytest.mark.parametrize("n", [1, 31, 33, 97])
def test_arrays_in_are_computed_for_odd_sizes(executor, n):
    x = np.arange(n, dtype=np.float32)
    guarded = np.full(n + 64, np.nan, np.float32)
    double(x, guarded[32 : 32 + n])
    np.testing.assert_array_equal(guarded[32 : 32 + n], x * 2)
    assert np.isnan(guarded[:32]).all()
    assert np.isnan(guarded[32 + n :]).all()


def test_strided_numpy_views_are_read_and_written_in_place(executor):
    x = np.arange(50, dtype=np.float32)
    out = np.full(120, -1, np.float32)
    double(x[::-2], out[3:78:3])
    expected = np.full(120, -1, np.float32)
    expected[3:78:3] = x[::-2] * 2
    np.testing.assert_array_equal(out, expected)


def test_function_keeps_its_identity():
    assert isinstance(double, TileFunction)
    assert double.__name__ == "double"
    assert double.__doc__ == "Doubles A into B."
    assert list(inspect.signature(double).parameters) == ["A", "B", "BN"]
    assert inspect.isfunction(double.__wrapped__)


def test_arguments_go_by_keyword_too(executor):
    x = np.ones(5, np.float32)
    out = filled(x)
    double(B=out, A=x, BN=16)
    assert (out == 2).all()


def count_traces(function, monkeypatch):
    traces = []
    trace = function._traced.trace

    def counted(*args, **kwargs):
        traces.append(1)
        return trace(*args, **kwargs)

    monkeypatch.setattr(function._traced, "trace", counted)
    return traces


def test_signature_is_shape_stride_dtype_constant(reference, monkeypatch):
    @tilejit
    def copy(A: T.Tensor, B: T.Tensor, *, BN=32):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(BN):
                B[i] = A[i]

    traces = count_traces(copy, monkeypatch)
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    for args, kwargs, total in [
        ((x, y), {}, 1),
        ((y, x), {}, 1),
        ((x[:32], y), {}, 2),
        ((x[::2], y), {}, 3),
        ((x.view(np.int32), y), {}, 4),
        ((x, y), {"BN": 16}, 5),
        ((x, y), {"BN": 32}, 5),
        ((x[1:33], y), {}, 6),
        ((x[32:], y), {}, 6),
        ((x, x), {}, 7),
    ]:
        copy(*args, **kwargs)
        assert len(traces) == total, (kwargs, total)


def test_runtime_symbol_and_scalar_are_not_in_the_signature(executor, monkeypatch):
    n = T.dynamic("n")

    @tilejit
    def scale(A: T.Tensor((n, 4), "float32"), alpha: T.float32, B: T.Tensor((n, 4), "float32")):
        with T.Kernel(T.ceildiv(n, 8), threads=32) as bx:
            for i, j in T.Parallel(8, 4):
                B[bx * 8 + i, j] = A[bx * 8 + i, j] * alpha

    traces = count_traces(scale, monkeypatch)
    for rows, alpha in ((1, 2), (13, 0.5), (19, -1.0), (16, 3.0), (32, 4)):
        x = np.random.default_rng(rows).random((rows, 4), np.float32)
        out = filled(x)
        scale(x, alpha, out)
        np.testing.assert_array_equal(out, x * np.float32(alpha))
    assert len(traces) == 2  # the second for extents that 16 divides


def test_changed_global_is_traced_again(executor, monkeypatch):
    @tilejit
    def scaled(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(8):
                B[i] = A[i] * (SCALE * FACTORS[0])

    x = np.arange(8, dtype=np.float32)
    out = filled(x)
    scaled(x, out)
    assert (out == x * 6).all()
    monkeypatch.setitem(globals(), "SCALE", 5)
    scaled(x, out)
    assert (out == x * 15).all()
    FACTORS[0] = 4
    try:
        scaled(x, out)
    finally:
        FACTORS[0] = 3
    assert (out == x * 20).all()


def test_output_made_by_the_kernel_is_returned(executor):
    @tilejit
    def parts(A: T.Tensor):
        low = T.empty(A.shape, A.dtype)
        high = T.empty(A.shape, "int32")
        with T.Kernel(1, threads=32):
            for i in T.Parallel(10):
                low[i] = A[i] - 1
                high[i] = A[i] + 1
        return low, high

    x = np.arange(10, dtype=np.float32)
    low, high = parts(x)
    assert isinstance(low, np.ndarray)
    assert (low.dtype, high.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(low, x - 1)
    np.testing.assert_array_equal(high, x + 1)


def test_several_frames_run_in_order(executor):
    @tilejit
    def chain(A: T.Tensor):
        middle, last = T.empty(A.shape, A.dtype), T.empty(A.shape, A.dtype)
        with T.Kernel(1, threads=32):
            for i in T.Parallel(20):
                middle[i] = A[i] + 1
        with T.Kernel(1, threads=64):
            for i in T.Parallel(20):
                last[i] = middle[19 - i] * 2
        return last

    x = np.arange(20, dtype=np.float32)
    np.testing.assert_array_equal(chain(x), (x[::-1] + 1) * 2)
    program = chain.compile(x)
    assert [k.graph.threads[0] for k in program.kernels] == [32, 64]
    with pytest.raises(UnsupportedError) as caught:
        program.ptx
    assert caught.value.headline == ("chain is a program of 2 kernels, each with its own `ptx`.")


def make_factory(**settings):
    @tilejit(**settings)
    def factory(n, m, dtype="float32"):
        @T.prim_func
        def combine(A: T.Tensor((n,), dtype), B: T.Tensor((m,), dtype), C: T.Tensor((n, m), dtype)):
            with T.Kernel(1, threads=32):
                for i, j in T.Parallel(n, m):
                    C[i, j] = A[i] + B[j]

        return combine

    return factory


@pytest.mark.parametrize("out_idx", [-1, [2], [-1], None])
def test_factory_gives_a_kernel_that_makes_its_outputs(executor, out_idx):
    factory = make_factory(out_idx=out_idx)
    combine = factory(3, 5)
    assert isinstance(combine, TileKernel)
    assert factory(3, m=5) is combine
    assert factory(3, 6) is not combine
    a, b = np.arange(3, dtype=np.float32), np.arange(5, dtype=np.float32)
    if out_idx is None:
        result = np.full((3, 5), np.nan, np.float32)
        assert combine(a, b, result) is None
    else:
        result = combine(a, b)
    np.testing.assert_array_equal(result, a[:, None] + b)


def test_factory_kernel_takes_less_aligned_arrays(executor):
    combine = make_factory(out_idx=-1)(4, 4)
    x = np.arange(9, dtype=np.float32)
    np.testing.assert_array_equal(combine(x[1:5], x[5:]), x[1:5, None] + x[5:])


def test_factory_kernel_takes_arguments_that_overlap(executor):
    @tilejit
    def factory(n):
        @T.prim_func
        def shift(A: T.Tensor((n,), "float32"), B: T.Tensor((n,), "float32")):
            with T.Kernel(1, threads=32):
                for i in T.Parallel(n):
                    B[i] = A[i] * 2

        return shift

    x = np.arange(8, dtype=np.float32)
    factory(8)(x, x)
    np.testing.assert_array_equal(x, np.arange(8) * 2)


def test_empty_argument_is_legal_and_launches_nothing(executor):
    x = np.zeros(0, np.float32)
    double(x, x.copy())
    n = T.dynamic("n")

    @tilejit
    def same(A: T.Tensor((n,), "float32")):
        C = T.empty((n,), "float32")
        with T.Kernel(T.ceildiv(n, 8), threads=32) as bx:
            for i in T.Parallel(8):
                C[bx * 8 + i] = A[bx * 8 + i]
        return C

    assert same(x).shape == (0,)


def test_zero_dimensional_array_is_a_tensor(executor):
    @tilejit
    def bump(A: T.Tensor):
        with T.Kernel(1, threads=32):
            for _ in T.Parallel(1):
                A[()] = A[()] + 1

    x = np.array(3.0, np.float32)
    bump(x)
    assert x == 4


def test_auto_parameter_takes_an_array_or_a_constant(executor):
    @tilejit
    def plus(A, b, C):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(8):
                C[i] = A[i] + (b if isinstance(b, int) else b[i])

    x = np.arange(8, dtype=np.int32)
    out = filled(x)
    plus(x, 5, out)
    np.testing.assert_array_equal(out, x + 5)
    plus(x, x, out)
    np.testing.assert_array_equal(out, x + x)


def test_bfloat16_arrays_go_through(executor):
    x = np.arange(9).astype(ml_dtypes.bfloat16)
    out = np.zeros_like(x)
    double(x, out)
    assert (out == x * 2).all()


def test_threads_that_ask_for_one_signature_compile_once(monkeypatch):
    @tilejit
    def copy(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(16):
                B[i] = A[i]

    traces = count_traces(copy, monkeypatch)
    start = threading.Barrier(6)
    outputs = [np.zeros(16, np.float32) for _ in range(6)]
    x = np.arange(16, dtype=np.float32)

    def call(out):
        with device.use_executor("reference"):
            start.wait()
            copy(x, out)

    threads = [threading.Thread(target=call, args=(out,)) for out in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(traces) == 1
    assert all((out == x).all() for out in outputs)


def test_compile_takes_specs_and_a_target_and_needs_no_gpu():
    made = double.compile(T.Tensor((96,), "float32"), T.Tensor((96,), "float32"), target="sm_90a")
    assert made.target.name == "sm_90a"
    assert ".target sm_90a" in made.ptx
    assert made.cubin[:4] == b"\x7fELF"
    assert made.resources.spill_bytes == 0
    assert made.resources.registers > 0
    assert "def double" in made.source
    assert "for i in T.Parallel(32)" in str(made.graph)
    assert "double for sm_90a: 32 threads" in made.explain()


def test_compiled_kernel_is_called_with_its_tensors(executor):
    made = double.compile(T.Tensor((40,), "float32"), T.Tensor((40,), "float32"), BN=16)
    x = np.arange(40, dtype=np.float32)
    out = filled(x)
    made(x, out)
    np.testing.assert_array_equal(out, x * 2)
    made(B=x, A=x.copy(), BN=16)
    np.testing.assert_array_equal(out, x)


def test_symbolic_spec_makes_a_kernel_for_all_sizes(executor):
    n = T.dynamic("n")
    made = double.compile(T.Tensor((n,), "float32"), T.Tensor((n,), "float32"))
    for size in (1, 50):
        x = np.arange(size, dtype=np.float32)
        out = filled(x)
        made(x, out)
        np.testing.assert_array_equal(out, x * 2)


def test_pointer_parameter_takes_an_array_or_its_address(executor):
    if executor == "gpu":
        cuda = pytest.importorskip("numba.cuda", reason="device arrays come from Numba")

    @tilejit
    def fetch(source: T.ptr, C: T.Tensor):
        with T.Kernel(1, threads=32):
            A = T.make_tensor(source, (8,), "float32")
            for i in T.Parallel(8):
                C[i] = A[i] + 1

    x = np.arange(8, dtype=np.float32)
    out = filled(x)
    fetch(x, out)
    np.testing.assert_array_equal(out, x + 1)
    held = cuda.to_device(x) if executor == "gpu" else x
    out = filled(x)
    fetch(address_of(held), out)
    np.testing.assert_array_equal(out, x + 1)


def test_call_without_a_gpu_says_once_where_it_runs(monkeypatch, caplog):
    monkeypatch.setattr(kernel, "_said", [])
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    x = np.arange(8, dtype=np.float32)
    with caplog.at_level(logging.INFO, "tilejit"):
        double(x, x.copy())
        double(x, x.copy())
    assert [r.getMessage() for r in caplog.records] == [
        "No GPU found: tilejit runs its kernels on the NumPy reference executor."
    ]


def test_simulate_option_chooses_the_simulator():
    with options(simulate=True):
        assert device.executor() is device.Executor.SIMULATOR


def test_target_option_chooses_the_chip_that_is_simulated():
    with device.use_executor("simulator"), options(target="sm_90"):
        assert double.compile(T.Tensor((8,), "int32"), T.Tensor((8,), "int32")).target.name == (
            "sm_90"
        )


def test_dump_prints_the_stages_asked_for(capsys):
    with options(dump="trace,source"):
        double.compile(T.Tensor((24,), "int8"), T.Tensor((24,), "int8"))
    text = capsys.readouterr().err
    assert "T.Parallel(32)" in text
    assert "cuda.blockIdx.x" in text
    assert ".visible" not in text


def test_dump_prints_the_graph_after_the_passes_asked_for(capsys):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((8, 32), "float32")
            T.copy(A, tile)
            T.copy(tile, B)

    table = T.Tensor((8, 32), "float32")
    with options(dump="select_atoms, allocate_memory"):
        kernel.compile(table, table, target="sm_80")
    selected, allocated = capsys.readouterr().err.strip().split("\n\n")
    assert "# registers" in selected and "at byte 0" not in selected
    assert "at byte 0" in allocated
