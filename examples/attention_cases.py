"""What the attention benchmark computes: shapes, random operands, and which error is too much.

Knows torch only where operands are drawn and the answer is computed. Does not know who computes
it, nor how it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MASKS = ("full", "causal")
DTYPES = ("float16", "bfloat16")
MODEL_WIDTH = 2048
"""Heads times their dimension, where heads are not given: FlashAttention's benchmark has it."""

GROUP = 64
"""Rows whose errors have one bound."""

ERROR_FLOOR = 1e-5
LSE_ERROR = 1e-3
BACKWARD_FLOPS = 2.5
"""Of the forward pass's: five products of the size of its two."""

SCORES_AT_ONCE = 2**28
"""Elements of the largest matrix of scores: some 6 GiB while the answer is computed."""


@dataclass(frozen=True)
class Case:
    """softmax(Q @ K.T / sqrt(D)) @ V for Q, K, V of (batch, heads, S, D), or its gradients."""

    batch: int
    heads: int
    S: int
    D: int
    dtype: str
    mask: str
    direction: str = "forward"

    @property
    def is_causal(self) -> bool:
        return self.mask == "causal"

    @property
    def is_backward(self) -> bool:
        return self.direction == "backward"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.S, self.D

    @property
    def flops(self) -> int:
        """Of the multiplies alone; half of a square of scores counts where a mask hides half."""
        forward = 4 * self.batch * self.heads * self.S**2 * self.D // (2 if self.is_causal else 1)
        return int(forward * (BACKWARD_FLOPS if self.is_backward else 1))

    @property
    def bytes(self) -> int:
        """The least that must move: each operand read once, each result written once."""
        tensors = 8 if self.is_backward else 4
        return self.batch * self.heads * self.S * (2 * tensors * self.D + 4)

    @property
    def group(self) -> str:
        return f"{self.dtype} {self.D} {self.mask}" + (" backward" if self.is_backward else "")

    def __str__(self) -> str:
        extents = f"{self.batch}x{self.heads}x{self.S}x{self.D}"
        return f"{extents} {self.dtype} {self.mask}" + (" bwd" if self.is_backward else "")


def cases(
    sizes: Iterable[int],
    dims: Iterable[int],
    masks: Sequence[str],
    dtypes: Iterable[str],
    *,
    heads: int | None,
    tokens: int,
    directions: Sequence[str] = ("forward",),
) -> list[Case]:
    """All of them, direction by direction and dtype by dtype.

    tokens: of a batch together, at least one sequence; heads: `MODEL_WIDTH` / D if None.
    """
    sizes, dims = list(sizes), list(dims)
    return [
        Case(max(tokens // S, 1), heads or max(MODEL_WIDTH // D, 1), S, D, dtype, mask, direction)
        for direction in directions
        for dtype in dtypes
        for D in dims
        for mask in masks
        for S in sizes
    ]


def peaks(errors: Any) -> list[float]:
    """The largest of each `GROUP` rows, over all heads; NaN where one is.

    errors: (..., rows, columns), of NumPy or torch.
    """
    return [
        float(errors[..., row : row + GROUP, :].max()) for row in range(0, errors.shape[-2], GROUP)
    ]


def allowed_errors(coarse: Any) -> list[float]:
    """FlashAttention's rule: twice the error of the same maths in 16 bits.

    coarse: the absolute errors of that. The bound is one for `GROUP` rows: under a causal mask the
    first rows are weighted sums of few values, with errors as large as the last rows themselves.
    """
    return [2 * peak + ERROR_FLOOR for peak in peaks(coarse)]


def excess(errors: Any, allowed: Sequence[float]) -> float:
    """The largest error as a multiple of what its rows are allowed; NaN where an error is NaN."""
    ratios = [peak / bound for peak, bound in zip(peaks(errors), allowed, strict=True)]
    return math.nan if any(math.isnan(ratio) for ratio in ratios) else max(ratios)


def plain(q: Any, k: Any, v: Any, is_causal: bool) -> tuple[Any, Any]:
    """O and LSE by torch's own operations, in the operands' dtype; the softmax in float32."""
    import torch

    scores = q @ (k * k.shape[-1] ** -0.5).transpose(-1, -2)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(hidden, -math.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
    return weights @ v, torch.logsumexp(scores.detach().float(), -1)


class Operands:
    """Random operands of a case on the GPU, room for its results, and the right ones.

    q, k, v: normal, (batch, heads, S, D). o, lse: of the forward pass, as `attention.py` has them;
    where the case is backward they hold its right results, and do, dq, dk and dv are there too.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        import torch

        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("highest")
        self.case = case
        self.q, self.k, self.v = (self._draw() for _ in range(3))
        self.o = torch.empty_like(self.q)
        self.lse = torch.empty(case.shape[:3], device=self.q.device)
        self.results: tuple[Any, ...] = (self.o, self.lse)
        inputs: tuple[Any, ...] = (self.q, self.k, self.v)
        if case.is_backward:
            self.do = self._draw()
            self.dq, self.dk, self.dv = (torch.empty_like(self.q) for _ in range(3))
            self.results = (self.dq, self.dk, self.dv)
            inputs = (*inputs, self.do)
        self._wanted, self._allowed = self._solve(inputs)

    def _draw(self) -> Any:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.randn(self.case.shape, device=device).to(getattr(torch, self.case.dtype))

    def _solve(self, inputs: tuple[Any, ...]) -> tuple[list[Any], list[list[float]]]:
        """The results in float32 maths, and the bounds on their errors, some heads at a time."""
        import torch

        heads, S = self.case.batch * self.case.heads, self.case.S
        flat = [x.flatten(0, 1) for x in inputs]
        exact: list[list[Any]] = []
        coarse: list[list[Any]] = []
        step = max(SCORES_AT_ONCE // S**2, 1)
        for first in range(0, heads, step):
            part = [x[first : first + step] for x in flat]
            exact.append(self._results([x.float() for x in part], first))
            coarse.append(self._results(part))
        wanted = [torch.cat(parts) for parts in zip(*exact, strict=True)]
        rounded = [torch.cat(parts) for parts in zip(*coarse, strict=True)]
        pairs = list(zip(wanted, rounded, strict=True))
        allowed = [allowed_errors((r.float() - w).abs_()) for w, r in pairs if w.dim() == 3]
        return [w.view(self.case.batch, self.case.heads, *w.shape[1:]) for w in wanted], allowed

    def _results(self, inputs: Sequence[Any], first: int | None = None) -> list[Any]:
        """What the case asks for, of some heads: O and LSE, or the gradients of Q, K and V.

        first: the first of these heads, whose O and LSE a backward case keeps.
        """
        import torch

        q, k, v = (x.detach().requires_grad_(self.case.is_backward) for x in inputs[:3])
        o, lse = plain(q, k, v, self.case.is_causal)
        if not self.case.is_backward:
            return [o, lse]
        if first is not None:
            heads = slice(first, first + q.shape[0])
            self.o.flatten(0, 1)[heads] = o.detach().to(self.o.dtype)
            self.lse.flatten(0, 1)[heads] = lse
        return list(torch.autograd.grad(o, (q, k, v), inputs[3]))

    def poison(self) -> None:
        """Fill the results with NaN, and what torch's allocator gives out next for such a one."""
        import torch

        fresh = [torch.full_like(result, math.nan) for result in self.results]
        for result, spoiled in zip(self.results, fresh, strict=True):
            result.copy_(spoiled)

    def excess(self, results: Any) -> float:
        """The largest error as a multiple of its bound; NaN where an element is NaN.

        results: O, alone or with LSE; or of a backward case the gradients of Q, K and V.
        """
        given = results if isinstance(results, tuple) else (results,)
        assert len(given) == len(self._wanted) or not self.case.is_backward, "a gradient is missing"
        worst = 0.0
        for index, result in enumerate(given):
            wanted = self._wanted[index]
            assert result.shape == wanted.shape, f"result of shape {tuple(result.shape)}"
            errors = (result.float() - wanted).abs_()
            if wanted.dim() == 4:
                found = excess(errors, self._allowed[index])
            else:
                found = float(errors.max()) / LSE_ERROR
            worst = math.nan if math.isnan(found) or math.isnan(worst) else max(worst, found)
        return worst
