"""Every kernel of every example compiles for every target: no spills, no stack, no warnings."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tilejit.language as T
from tilejit import TileFunction
from tilejit.target import TARGETS

EXAMPLES = Path(__file__).parents[2] / "examples"
ASSEMBLER_NUMBER = re.compile(r"\bC7\d\d\d\b")  # ptxas's performance warnings carry one


def kernels(name: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"kernels_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return vars(module)


def half(*shape: int) -> Any:
    return T.Tensor(shape, "float16")


def brain(*shape: int) -> Any:
    return T.Tensor(shape, "bfloat16")


def eighth(*shape: int) -> Any:
    return T.Tensor(shape, "float8_e4m3fn")


def single(*shape: int) -> Any:
    return T.Tensor(shape, "float32")


# the sizes are those that the examples run at
CASES: dict[tuple[str, str], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    ("quickstart", "matmul"): lambda: ((half(512, 512), half(512, 512), single(512, 512)), {}),
    ("elementwise", "gelu_add"): lambda: ((single(203, 517),) * 3, {}),
    ("elementwise", "causal_mask"): lambda: ((single(203, 517),) * 2, {}),
    ("elementwise", "transpose"): lambda: ((single(203, 517), single(517, 203)), {}),
    ("strided", "scale"): lambda: ((single(90, 150), single(90, 150)), {}),
    ("strided", "add_any"): lambda: ((), {}),
    ("pointer_table", "gather_rows"): lambda: (
        (T.Tensor((4,), "int64"), T.Tensor((4,), "int32"), T.Tensor((4,), "int32"), single(434)),
        {},
    ),
    ("pointer_table", "copy_from"): lambda: ((), {"out": single(300)}),
    ("call_time", "scale"): lambda: ((), {}),
    ("matmul", "matmul"): lambda: (
        (brain(150, 90), brain(90, 170), single(150, 170)),
        {"BM": 64, "BN": 64},
    ),
    ("attention", "attention"): lambda: (
        (
            brain(1, 4, 150, 64),
            *(brain(1, 2, 170, 64),) * 2,
            brain(1, 4, 150, 64),
            single(1, 4, 150),
        ),
        {"is_causal": True, "window": 40, "softcap": 30.0},
    ),
    ("attention_backward", "attention_backward"): lambda: (
        (
            *(brain(1, 4, 150, 64), *(brain(1, 2, 170, 64),) * 2, brain(1, 4, 150, 64)),
            *(single(1, 4, 150), brain(1, 4, 150, 64)),
            *(brain(1, 4, 150, 64), *(brain(1, 2, 170, 64),) * 2),
        ),
        {"is_causal": True, "window": 40, "softcap": 30.0, "BM": 64, "BN": 64},
    ),
    ("attention_fp8", "attention_fp8"): lambda: (
        (
            *(eighth(1, 4, 150, 64), eighth(1, 2, 176, 64), eighth(1, 2, 64, 176)),
            *(single(1, 4), single(1, 2), single(1, 2)),
            *(brain(1, 4, 150, 64), single(1, 4, 150)),
        ),
        {"is_causal": True, "BM": 64, "BN": 64},
    ),
    ("attention_ragged", "attention_ragged"): lambda: (
        (
            *(brain(150, 4, 64), *(brain(170, 2, 64),) * 2, brain(150, 4, 64)),
            *(single(4, 150), *(T.Tensor((4,), "int32"),) * 2),
        ),
        {"is_causal": True, "BM": 64, "BN": 64},
    ),
    ("attention_ragged_backward", "attention_ragged_backward"): lambda: (
        (
            *(brain(150, 4, 64), *(brain(170, 2, 64),) * 2, brain(150, 4, 64)),
            *(single(4, 150), brain(150, 4, 64)),
            *(brain(150, 4, 64), *(brain(170, 2, 64),) * 2, *(T.Tensor((4,), "int32"),) * 2),
        ),
        {"BM": 64, "BN": 64},
    ),
    ("attention_variants", "attention"): lambda: (
        (
            brain(1, 4, 150, 64),
            *(brain(1, 2, 170, 64),) * 2,
            brain(1, 4, 150, 64),
            single(1, 4, 150),
        ),
        {"BM": 64, "BN": 64, "threads": 128},
    ),
    ("manual_matmul", "matmul"): lambda: ((brain(4096, 4096),) * 3, {"cluster": 2}),
    ("rows", "softmax"): lambda: ((brain(70, 128),) * 2, {"BM": 64}),
    ("rows", "rms_norm"): lambda: (
        (brain(9, 1000), brain(1000), brain(9, 1000), single(9)),
        {"BM": 8},
    ),
    ("rows", "layer_norm"): lambda: (
        (brain(9, 1000), brain(1000), brain(1000), brain(9, 1000), single(9), single(9)),
        {"BM": 8},
    ),
    ("rows", "softmax_backward"): lambda: (
        (brain(70, 128),) * 3,
        {"BM": 64, "threads": 512, "workers": 3},
    ),
    ("rows", "rms_norm_backward"): lambda: (
        (brain(9, 1000), brain(1000), brain(9, 1000), single(9), brain(9, 1000), brain(1000)),
        {"BM": 4, "threads": 256, "workers": 3},
    ),
    ("rows", "layer_norm_backward"): lambda: (
        (
            brain(9, 1000),
            brain(1000),
            brain(9, 1000),
            *(single(9),) * 2,
            brain(9, 1000),
            *(brain(1000),) * 2,
        ),
        {"BM": 4, "threads": 256, "workers": 3},
    ),
}
ONLY = {("manual_matmul", "matmul"): ("sm_90a",)}  # what other chips have no instructions for


def assert_clean(kernel: Any) -> None:
    """Nothing in local memory, and the assembler has no more to say than what it used."""
    for frame in kernel.kernels:
        assert frame.cubin[:4] == b"\x7fELF"
        resources = frame.resources
        assert (resources.spill_bytes, resources.stack_bytes) == (0, 0), resources
        assert 0 < resources.registers <= 255
        log = frame.compiled.log
        assert not ASSEMBLER_NUMBER.search(log), log
        assert not re.search(r"(?i)warning|advisory|error", log), log


def test_list_of_kernels_is_complete():
    found = {
        (path.stem, name)
        for path in EXAMPLES.glob("*.py")
        if path.stem != "compile_time"
        for name, value in kernels(path.stem).items()
        if isinstance(value, TileFunction)
    }
    assert found == set(CASES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("example", "name"), CASES)
def test_example_kernel_compiles_cleanly(example, name, target):
    if target not in ONLY.get((example, name), TARGETS):
        pytest.skip(f"it is written for {', '.join(ONLY[example, name])}")
    arguments, constants = CASES[example, name]()
    assert_clean(kernels(example)[name].compile(*arguments, target=target, **constants))


@pytest.mark.parametrize("target", TARGETS)
def test_quickstart_compiles_cleanly_where_no_tile_divides(target):
    arguments = half(503, 1017), half(1017, 763), single(503, 763)
    assert_clean(kernels("quickstart")["matmul"].compile(*arguments, target=target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [16, 128, 4096])
def test_what_the_cost_model_chooses_compiles_cleanly_for_every_chip(rows, target):
    matmul = kernels("matmul")["matmul"]
    a, b, c = brain(rows, 4096), brain(4096, 4096), brain(rows, 4096)
    assert_clean(matmul.compile(a, b, c, target=target, transpose_B=rows != 4096))


@pytest.mark.parametrize("shape", [(1024, 10240, 8192), (1024, 6144, 4096), (16, 4096, 14336)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8", "tfloat32"])
def test_what_the_cost_model_chooses_multiplies_by_warpgroups_on_hopper(dtype, shape):
    M, N, K = shape
    stored = "float32" if dtype == "tfloat32" else dtype
    out = {"int8": "int32", "tfloat32": "float32"}.get(dtype, "bfloat16")
    kernel = kernels("matmul")["matmul"].compile(
        T.Tensor((M, K), stored), T.Tensor((N, K), stored), T.Tensor((M, N), out),
        target="sm_90a", transpose_B=True, tiles="tfloat32" if dtype == "tfloat32" else None,
    )  # fmt: skip
    assert_clean(kernel)
    assert "wgmma.mma_async" in kernel.ptx
