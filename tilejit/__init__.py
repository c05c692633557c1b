"""tilejit: tile programs in plain Python, compiled by Numba for NVIDIA GPUs.

`from tilejit import tilejit` and `import tilejit.language as T` are all a kernel needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tilejit.config import options
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    DTypeError,
    InternalError,
    OutOfRangeError,
    ResourceError,
    ShapeError,
    SimulationError,
    TileError,
    TraceError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from tilejit.runtime.addresses import address_of
    from tilejit.runtime.decorator import TileFunction, tilejit
    from tilejit.runtime.device import device_name, has_gpu
    from tilejit.runtime.kernel import TileKernel

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "DTypeError",
    "DeviceError",
    "InternalError",
    "OutOfRangeError",
    "ResourceError",
    "ShapeError",
    "SimulationError",
    "TileError",
    "TileFunction",
    "TileKernel",
    "TraceError",
    "UnsupportedError",
    "__version__",
    "address_of",
    "device_name",
    "has_gpu",
    "options",
    "tilejit",
]

# Made on first use, so that `import tilejit` alone stays cheap.
_HOMES = {
    "address_of": "tilejit.runtime.addresses",
    "device_name": "tilejit.runtime.device",
    "has_gpu": "tilejit.runtime.device",
    "tilejit": "tilejit.runtime.decorator",
    "TileFunction": "tilejit.runtime.decorator",
    "TileKernel": "tilejit.runtime.kernel",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tilejit' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
