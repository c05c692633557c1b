"""The attention of torch, by one of the libraries behind it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def with_backend(backend: SDPBackend) -> Callable[[Any, bool], Iterator[Any]]:
    """A peer's candidates: the one that this library is."""

    def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
        build = _backward if operands.case.is_backward else _forward
        yield "torch", functools.partial(build, operands, backend)

    return candidates


def _forward(operands: Any, backend: SDPBackend) -> Callable[[], Any]:
    q, k, v, is_causal = operands.q, operands.k, operands.v, operands.case.is_causal

    def call() -> Any:
        with sdpa_kernel(backend), torch.no_grad():
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return call


def _backward(operands: Any, backend: SDPBackend) -> Callable[[], Any]:
    """Of one forward pass, whose graph is kept, the gradients again and again."""
    leaves = [x.detach().requires_grad_() for x in (operands.q, operands.k, operands.v)]
    with sdpa_kernel(backend):
        o = scaled_dot_product_attention(*leaves, is_causal=operands.case.is_causal)
    return lambda: torch.autograd.grad(o, leaves, operands.do, retain_graph=True)
