"""Attention for torch, with its gradients: `attention` and `attention_backward` as operators that
autograd and torch.compile know.

python examples/attention_torch.py     check gradients against torch's own (needs torch)

The kernels take torch's tensors where they are, on torch's current stream. Nothing here is imported
from torch before it is asked for.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import attention as forward
import attention_backward as backward

OPTIONS = "bool is_causal, int? window, float? softcap, bool deterministic"


@functools.cache
def operators() -> Any:
    """The two operators, made once: `forward(q, k, v, *options)` gives O and the log-sum-exp,
    `backward(q, k, v, o, lse, grad, *options)` dQ, dK and dV."""
    import torch

    def named(is_causal: bool, window: int | None, softcap: float | None) -> dict[str, Any]:
        return {"is_causal": is_causal, "window": window, "softcap": softcap}

    @torch.library.custom_op(
        "tilejit::attention",
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)",
    )
    def run(q: Any, k: Any, v: Any, is_causal: Any, window: Any, softcap: Any, _: Any) -> Any:
        o, lse = like(q, k, v, is_causal, window, softcap, _)
        forward.attention(q, k, v, o, lse, **named(is_causal, window, softcap))
        return o, lse

    @run.register_fake
    def like(q: Any, k: Any, v: Any, is_causal: Any, window: Any, softcap: Any, _: Any) -> Any:
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse

    @torch.library.custom_op(
        "tilejit::attention_backward",
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor grad, {OPTIONS})"
        " -> (Tensor, Tensor, Tensor)",
    )
    def run_backward(
        q: Any, k: Any, v: Any, o: Any, lse: Any, grad: Any,
        is_causal: Any, window: Any, softcap: Any, deterministic: Any,
    ) -> Any:  # fmt: skip
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        options = named(is_causal, window, softcap)
        backward.attention_backward(
            q, k, v, o, lse, grad.contiguous(), *grads, **options, deterministic=deterministic
        )
        return grads

    @run_backward.register_fake
    def like_backward(q: Any, k: Any, v: Any, *_: Any) -> Any:
        return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, *options = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.options = options

    def gradients(ctx: Any, grad: Any, _: Any) -> Any:
        return *run_backward(*ctx.saved_tensors, grad, *ctx.options), None, None, None, None

    run.register_autograd(gradients, setup_context=keep)
    return SimpleNamespace(forward=run, backward=run_backward)


def attention(
    q: Any, k: Any, v: Any,
    *,
    is_causal: bool = False, window: int | None = None, softcap: float | None = None,
    deterministic: bool = False,
) -> Any:  # fmt: skip
    """softmax(q @ k.T / sqrt(D)) @ v for each head, with gradients.

    q and the result: (batch, heads, S, D); k, v: (batch, heads / group, SK, D); float16 or bfloat16
    tensors. is_causal, window, softcap: as of the example `attention`. deterministic: gradients of
    two runs are bitwise equal.
    """
    options = is_causal, window, None if softcap is None else float(softcap), deterministic
    return operators().forward(q, k, v, *options)[0]


def check(device: str | None = None) -> None:
    """Compare with torch's own attention in float32 and its gradients."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    S, D, dtype = 150, 64, torch.bfloat16
    for is_causal in (False, True):
        shapes = (1, 4, S, D), (1, 2, S, D), (1, 2, S, D)
        mine = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
        q, k, v = theirs = [x.detach().float().requires_grad_() for x in mine]
        o = attention(*mine, is_causal=is_causal)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=is_causal
        )
        grad = torch.randn_like(o)
        o.backward(grad)
        wanted.backward(grad.float())
        for name, a, b in zip("qkv", mine, theirs, strict=True):
            error = (a.grad.float() - b.grad).norm() / b.grad.norm()
            assert error < 0.01, f"d{name} is wrong by {error:.3g} of its norm, {is_causal=}"
        assert (o.float() - wanted).abs().max() < 0.02
    print(f"attention over {S}: its gradients are those of torch, full and causal")


if __name__ == "__main__":
    check()
