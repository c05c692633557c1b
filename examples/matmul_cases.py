"""What the matmul benchmark computes: shapes, dtypes, random operands, and which error is too much.

Knows torch only where operands are drawn. Does not know who multiplies, nor how it is timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

REAL_ROWS = (16, 128, 1024, 8192)
"""Tokens in flight: decoding, a batch of it, and prompts."""

REAL_WEIGHTS = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
)  # fmt: skip
"""N and K of the projections of language models with 8 and 70 billion weights."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How operands of one dtype are stored, summed and checked.

    stored, out: torch's names of the operands' and of the result's dtype.
    relative: error allowed for each unit of the result; summed: for each unit of sum |a * b|;
        floor: allowed anyway.
    layouts: those that cuBLAS multiplies.
    """

    stored: str
    out: str
    relative: float
    summed: float
    floor: float = 0.0
    layouts: tuple[str, ...] = ("nn", "nt")


# `relative` covers twice the rounding of the result, `summed` what is dropped on the way: partial
# sums that cuBLAS adds as 16-bit numbers, all but 10 bits of each factor of tf32, and all but about
# 14 bits of a sum of fp8 products. A tile of K left out or added twice is many times more.
PRECISIONS = {
    "bfloat16": Precision(stored="bfloat16", out="bfloat16", relative=2**-8, summed=2**-13),
    "float16": Precision(stored="float16", out="float16", relative=2**-10, summed=2**-14),
    "tfloat32": Precision(stored="float32", out="float32", relative=2**-9, summed=2**-12),
    "float8_e4m3fn": Precision(
        stored="float8_e4m3fn", out="bfloat16", relative=2**-6, summed=2**-10, layouts=("nt",)
    ),
    "int8": Precision(
        stored="int8", out="int32", relative=0.0, summed=0.0, floor=0.5, layouts=("nt",)
    ),
}


@dataclass(frozen=True)
class Case:
    """One product: C (M x N) = A (M x K) @ B, stored K x N ("nn") or N x K ("nt")."""

    M: int
    N: int
    K: int
    dtype: str
    layout: str

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.dtype]

    @property
    def is_transposed(self) -> bool:
        return self.layout == "nt"

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def bytes(self) -> int:
        """The least that must move: each operand read once, the result written once."""
        operands = (self.M + self.N) * self.K * width(self.precision.stored)
        return operands + self.M * self.N * width(self.precision.out)

    @property
    def group(self) -> str:
        return f"{self.dtype} {self.layout}"

    def __str__(self) -> str:
        return f"{self.M}x{self.N}x{self.K} {self.group}"


def width(stored: str) -> int:
    """Bytes of one element."""
    return {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}.get(stored, 1)


def shapes(sizes: Iterable[int], *, real: bool) -> list[tuple[int, int, int]]:
    """M, N and K of squares of those sizes, then, if `real`, of the products of language models."""
    squares = [(size, size, size) for size in sizes]
    return squares + [(M, N, K) for N, K in REAL_WEIGHTS for M in REAL_ROWS if real]


def cases(
    products: Sequence[tuple[int, int, int]], dtypes: Iterable[str], layouts: Sequence[str]
) -> list[Case]:
    """All of them, dtype by dtype; layouts that cuBLAS cannot multiply are left out."""
    return [
        Case(M, N, K, dtype, layout)
        for dtype in dtypes
        for layout in layouts
        if layout in PRECISIONS[dtype].layouts
        for M, N, K in products
    ]


def error_bound(dtype: str, magnitude: Any, products: Any) -> Any:
    """The largest error that rounding explains.

    magnitude: |result|; products: the sum of |a * b|; numbers or arrays.
    """
    precision = PRECISIONS[dtype]
    return precision.relative * magnitude + precision.summed * products + precision.floor


class Operands:
    """Random operands of a case on the GPU, room for its result, and the right one.

    a, b: as stored; c: M x N, shared by all who write their result there.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        import torch

        torch.manual_seed(seed)
        self.case = case
        self.a = self._draw(case.M, case.K)
        self.b = self._draw(*((case.N, case.K) if case.is_transposed else (case.K, case.N)))
        out = getattr(torch, case.precision.out)
        self.c = torch.empty(case.M, case.N, dtype=out, device=self.a.device)
        self._reference, self._bound = self._solve()

    def _draw(self, rows: int, columns: int) -> Any:
        """Normal, or for integers uniform over all values; never zeros, which are faster."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.case.dtype == "int8":
            return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=device)
        drawn = torch.randn(rows, columns, device=device)
        return drawn.to(getattr(torch, self.case.precision.stored))

    def _solve(self) -> tuple[Any, Any]:
        """The product in float64, kept as float32, and the bound on the error of each element."""
        a, b = self.a.float().double(), self.b.float().double()
        b = b.t() if self.case.is_transposed else b
        reference = (a @ b).float()
        products = 0.0
        if self.case.precision.summed:
            products = (a.abs_() @ b.abs_()).float()
        return reference, error_bound(self.case.dtype, reference.abs(), products)

    def poison(self) -> None:
        """Fill `c` with what no product gives: NaN, or the least integer."""
        self.c.fill_(float("nan") if self.c.is_floating_point() else -(2**31))

    def excess(self, result: Any) -> float:
        """The largest error as a multiple of its bound; NaN where an element is NaN."""
        assert tuple(result.shape) == tuple(self.c.shape), f"result of shape {result.shape}"
        error = (result.float() - self._reference).abs_()
        return float(error.div_(self._bound).max().item())
