"""The matmul of torch, which is cuBLAS."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function that gives the call."""
    case = operands.case
    yield "torch", {"float8_e4m3fn": _fp8, "int8": _int8}.get(case.dtype, _plain)(operands)


def _plain(operands: Any) -> Callable[[], Any]:
    a, b, c = operands.a, operands.b, operands.c
    b = b.t() if operands.case.is_transposed else b

    def build() -> Callable[[], Any]:
        # tf32 for float32; of no effect on 16-bit operands
        torch.set_float32_matmul_precision("high")
        return lambda: torch.matmul(a, b, out=c)

    return build


def _fp8(operands: Any) -> Callable[[], Any]:
    a, b, c = operands.a, operands.b.t(), operands.c
    one = torch.ones((), device=a.device)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return lambda: lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out=c, **options)


def _int8(operands: Any) -> Callable[[], Any]:
    a, b, c = operands.a, operands.b.t(), operands.c
    return lambda: lambda: torch._int_mm(a, b, out=c)
