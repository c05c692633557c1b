"""Arrays between torch and JAX on one GPU, and calls of JAX that end when the device has."""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch

import jax
import jax.numpy as jnp
import numpy as np
import torch


def to_jax(x: Any) -> Any:
    """The same memory where DLPack can, else a copy."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        raise RuntimeError(f"JAX sees no GPU, only {device.platform}")
    torch.cuda.synchronize()
    try:
        return jnp.from_dlpack(x.detach())
    except Exception:
        bits = x.view(torch.int16).cpu().numpy()
        return jax.device_put(bits.view(np.dtype(jnp.dtype(str(x.dtype)[6:]))), device)


def to_torch(result: Any) -> Any:
    """A JAX array as a torch tensor on the same GPU."""
    try:
        return torch.from_dlpack(result)
    except Exception:
        return torch.from_numpy(np.asarray(result.astype(jnp.float32))).cuda()


def call_jax(function: Callable[..., Any], *arrays: Any, shape: tuple[int, ...]) -> Any:
    """A call of a compiled function; the allocator's next memory of its result's shape is NaN."""
    jnp.full(shape, jnp.nan, arrays[0].dtype).block_until_ready()
    return lambda: function(*arrays).block_until_ready()
