"""Tiles and variables that are used though nothing fills them."""

from __future__ import annotations

import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import TraceError

NOTHING, ADDED = "nothing", "only what adds to it"


@tilejit
def program(A: T.Tensor, C: T.Tensor, *, case):
    with T.Kernel(1, threads=128):
        a, b = T.alloc_shared((64, 64), "float16"), T.alloc_shared((64, 64), "float16")
        acc = T.alloc_fragment((64, 64), "float32")
        total = T.alloc_fragment((64,), "float32")
        T.copy(A, a)
        T.copy(A, b)
        if case == "gemm":
            T.gemm(a, b, acc)
        elif case == "begun":
            T.gemm(a, b, acc, clear_accum=True)
        elif case == "loop":
            for _ in T.serial(3):
                T.gemm(a, b, acc)
        elif case == "copied":
            acc[0, 0] = 1.0
        elif case == "sum":
            T.clear(acc)
            T.reduce_sum(acc, total, dim=1, clear=False)
        elif case == "shared":
            acc_in = T.alloc_shared((64, 64), "float32")
            T.copy(acc_in, acc)
        elif case == "elements":
            for _ in T.serial(3):
                for i, j in T.Parallel(64, 64):
                    acc[i, j] += T.cast(a[i, j], "float32")
        elif case == "begun later":
            for k in T.serial(3):
                for i, j in T.Parallel(64, 64):
                    acc[i, j] = T.if_then_else(k == 0, 0.0, acc[i, j]) + 1.0
        elif case == "count":
            x = T.alloc_var("int32")
            x = x + 1
            for i, j in T.Parallel(64, 64):
                acc[i, j] = T.cast(x, "float32")
        elif case == "view":
            flat = T.SharedBuffer((4096,), "float16", data=a)
            for i, j in T.Parallel(64, 64):
                acc[i, j] = flat[i * 64 + j]
        T.copy(acc, C)


@pytest.mark.parametrize(
    ("case", "name", "what", "line"),
    [
        ("gemm", "acc", ADDED, "T.gemm(a, b, acc)"),
        ("loop", "acc", ADDED, "T.gemm(a, b, acc)"),
        ("sum", "total", ADDED, "T.reduce_sum(acc, total, dim=1, clear=False)"),
        ("shared", "acc_in", NOTHING, "T.copy(acc_in, acc)"),
        ("nothing", "acc", NOTHING, "T.copy(acc, C)"),
        ("elements", "acc", ADDED, 'acc[i, j] += T.cast(a[i, j], "float32")'),
    ],
)
def test_use_of_what_nothing_fills_is_refused_at_its_line(case, name, what, line):
    specs = T.Tensor((64, 64), "float16"), T.Tensor((64, 64), "float32")
    with pytest.raises(TraceError) as caught:
        program.compile(*specs, case=case, target="sm_90a")
    text = str(caught.value)
    assert text.startswith(f"`{name}` is used here, but {what} in the kernel fills it.")
    assert line in text and f"{name} comes from here" in text


@pytest.mark.parametrize("case", ["begun", "copied", "view", "begun later", "count"])
def test_what_something_fills_is_fine(case):
    specs = T.Tensor((64, 64), "float16"), T.Tensor((64, 64), "float32")
    program.compile(*specs, case=case, target="sm_90a")
