"""Device memory that the runtime keeps for kernels between launches, one block for each device and
stream.

Knows allocation. Does not know what kernels do with it.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from tilejit.ir.buffer import Buffer
from tilejit.runtime.device import check, driver

_Key = tuple[int, int, str]
_blocks: dict[_Key, tuple[int, int]] = {}
_lock = threading.Lock()
_GROWTH = 2  # a block that is too small is followed by one that is larger by as much at least


def workspace(name: str, size: int, ordinal: int, stream: int, *, is_zeroed: bool) -> int:
    """The address of at least `size` bytes for launches on one stream, whose work is in order, so
    that one block serves them all. The device's context is current.

    name: blocks of different names are disjoint. is_zeroed: the block is zero when it is new;
        kernels leave it so.

    Blocks that were outgrown stay: a captured graph may still use them.
    """
    key = (ordinal, stream, name)
    found = _blocks.get(key)
    if found is not None and found[1] >= size:
        return found[0]
    with _lock:
        found = _blocks.get(key)
        if found is None or found[1] < size:
            size = max(size, _GROWTH * found[1]) if found else size
            found = _blocks[key] = _allocate(size, is_zeroed), size
    return found[0]


def _allocate(size: int, is_zeroed: bool) -> int:
    """Also while a graph is being captured, which must not see the allocation."""
    api = driver()
    doing = f"Reserving {size} bytes of workspace on the GPU"
    relaxed = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(api.cuThreadExchangeStreamCaptureMode(relaxed), doing)
    try:
        block = int(check(api.cuMemAlloc(size), doing))
        if is_zeroed:
            own = check(api.cuStreamCreate(1), doing)  # non-blocking
            check(api.cuMemsetD8Async(block, 0, size, own), doing)
            check(api.cuStreamSynchronize(own), doing)
            check(api.cuStreamDestroy(own), doing)
    finally:
        check(api.cuThreadExchangeStreamCaptureMode(before), doing)
    return block


def simulated_workspace(like: Buffer, is_zeroed: bool) -> np.ndarray[Any, Any]:
    """Host memory for one simulated launch; what need not be zero is not."""
    made = np.zeros(like.extents, like.dtype.numpy)
    if not is_zeroed:
        made.view(np.uint8)[...] = 0xFF
    return made
