"""Whether an executor can reach the arguments of a call, and where new outputs go.

Knows array views and executors. Does not know kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilejit.errors import ArgumentError
from tilejit.ir.buffer import Buffer
from tilejit.runtime import arrays, device
from tilejit.runtime.arrays import HOST, ArrayView
from tilejit.runtime.device import Executor


def place(what: str, names: Sequence[str], values: Sequence[Any], executor: Executor) -> int:
    """The device that a call runs on; 0 where there is none.

    Raises:
        ArgumentError: an argument that the executor cannot reach, or two GPUs.
    """
    ordinal, first = HOST, ""
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, ArrayView):
            continue
        if executor is not Executor.GPU:
            if value.device != HOST:
                raise ArgumentError(
                    f"{what}: {name} is on GPU {value.device}, but this call runs on the "
                    f"{executor}, which reads host memory."
                )
        elif value.device == HOST:
            if value.framework == "torch":
                raise ArgumentError(
                    f"{what}: {name} is a torch tensor in host memory, but the kernel runs on "
                    "the GPU.",
                    hint=f"Pass `{name}.cuda()`.",
                )
        elif ordinal == HOST:
            ordinal, first = value.device, name
        elif ordinal != value.device:
            raise ArgumentError(
                f"{what}: {first} is on GPU {ordinal} and {name} is on GPU {value.device}."
            )
    if executor is Executor.GPU and ordinal == HOST:
        return device.current_device()
    return max(ordinal, 0)


def check_writable(what: str, name: str, view: ArrayView) -> None:
    """
    Raises:
        ArgumentError: a kernel that writes the argument would do what its owner forbids.
    """
    if not view.writable:
        raise ArgumentError(
            f"{what}: {name} is read-only, but the kernel writes it.",
            hint="Pass a writable array, such as a copy.",
        )
    if view.framework == "torch" and arrays.needs_gradient(view.owner):
        raise ArgumentError(
            f"{what}: {name} requires a gradient, but the kernel writes it unseen by autograd.",
            hint=f"Pass `{name}.detach()`, or call inside `with torch.no_grad():`.",
        )
    for d, (extent, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        if stride == 0 and extent > 1 and view.size:
            raise ArgumentError(
                f"{what}: {name} repeats its elements along dimension {d} (its stride is 0), but "
                "the kernel writes it.",
                hint="Pass an array that has memory for each element.",
            )


def allocate_output(
    what: str, buffer: Buffer, shape: tuple[int, ...], like: ArrayView | None
) -> ArrayView:
    """An array for an output that the call makes, of the framework of its first tensor."""
    if any(extent < 0 for extent in shape):
        raise ArgumentError(f"{what}: the output {buffer.name} would have shape {shape}.")
    framework = like.framework if like is not None else "numpy"
    return arrays.allocate(framework, shape, buffer.dtype, like)
