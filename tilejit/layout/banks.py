"""Bank conflicts of shared-memory accesses, from addresses alone.

Pure index maths. Does not know layouts or instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BANKS = 32
BANK_BYTES = 4
PHASE_BYTES = BANKS * BANK_BYTES  # what one pass over all banks delivers


def conflict_ways(addresses: np.ndarray[Any, Any], width_bytes: int) -> int:
    """How many different words of one bank a phase of the access asks for; 1 has no conflicts.

    addresses: (lanes,) byte addresses of one warp's access of `width_bytes` each, aligned to it.
    Accesses wider than 4 bytes take several phases: half warps of 8 bytes, quarter warps of 16.
    For ldmatrix: the row addresses, 16 bytes wide.
    """
    assert width_bytes in (1, 2, 4, 8, 16), f"no access is {width_bytes} bytes wide"
    per_phase = PHASE_BYTES // max(width_bytes, BANK_BYTES)
    steps = np.arange(0, width_bytes, BANK_BYTES)
    ways = 1
    for start in range(0, len(addresses), per_phase):
        phase = np.asarray(addresses[start : start + per_phase], np.int64)
        words = np.unique((phase[:, None] + steps) // BANK_BYTES)
        ways = max(ways, int(np.bincount(words % BANKS).max()))
    return ways
