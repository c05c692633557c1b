"""`address_of`: the address of an array's first element, for pointer arguments and tables.

Knows which host arrays were asked about, so that executors without a GPU may follow the address.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from tilejit.errors import ArgumentError, ArgumentTypeError, a_kind
from tilejit.runtime import device
from tilejit.runtime.arrays import HOST, host_array, is_array, read

_asked: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def address_of(x: Any) -> int:
    """The address of an array's first element, for a pointer parameter or a table of them.

    The array must stay alive while kernels use the address; nothing else keeps it.

    Args:
        x: an array or tensor, in the memory that kernels run on.

    Raises:
        TypeError: not an array.
        ValueError: an array in host memory, where kernels run on a GPU.
    """
    if not is_array(x):
        raise ArgumentTypeError(f"address_of takes an array, not {a_kind(x)}.")
    try:
        view = read(x)
    except (ArgumentError, ArgumentTypeError) as error:
        raise type(error)(
            error.headline.replace("{name}", "address_of: x"), hint=error.hint
        ) from None
    if view.device == HOST:
        if device.executor() is device.Executor.GPU:
            raise ArgumentError(
                "address_of: x is in host memory, which kernels on the GPU cannot reach.",
                hint="Move it first, for example with `numba.cuda.to_device(x)`.",
            )
        with _lock:
            _asked[id(x)] = x
    return view.address


def remembered_arrays() -> list[np.ndarray[Any, Any]]:
    """The host arrays alive whose address was asked for."""
    with _lock:
        alive = list(_asked.values())
    return [host_array(read(x)) for x in alive]
