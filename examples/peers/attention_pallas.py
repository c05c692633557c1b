"""The attention that JAX ships for Hopper, written in Pallas Mosaic GPU."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.pallas.ops.gpu import attention_mgpu as hopper
from peers import jax_arrays

# Queries of each of the two warpgroups, keys a step, slots.
TILES = ((64, 128, 2), (64, 256, 2), (128, 128, 2), (64, 64, 2), (64, 128, 4))


def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function that compiles and gives the call."""
    case = operands.case
    if case.is_backward:
        raise ValueError("only its forward pass is compared")
    # Its kernel does not divide by the root of D: that is done here, and not timed.
    scaled = (operands.q.float() * case.D**-0.5).to(operands.q.dtype)
    inputs = (scaled, operands.k, operands.v)
    arrays = [jax_arrays.to_jax(x.transpose(1, 2).contiguous()) for x in inputs]
    for block_q, block_kv, slots in TILES[: 2 if quick else None]:
        name = f"2 x {block_q} queries, {block_kv} keys, {slots} slots"
        config = {"block_q": block_q, "block_kv": block_kv, "max_concurrent_steps": slots}
        yield name, functools.partial(_build, arrays, config | {"causal": case.is_causal})


def _build(arrays: list[Any], config: dict[str, Any]) -> Callable[[], Any]:
    tuning = hopper.TuningConfig(**config)
    attention = jax.jit(lambda q, k, v: hopper.attention(q, k, v, tuning))
    return jax_arrays.call_jax(attention, *arrays, shape=arrays[0].shape)


def to_torch(result: Any) -> Any:
    """Its O, (batch, S, heads, D), as a torch tensor of (batch, heads, S, D)."""
    return jax_arrays.to_torch(result).transpose(1, 2)
