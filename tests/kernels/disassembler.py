"""Whether machine code can be shown here."""

from __future__ import annotations

import shutil


def has_disassembler() -> bool:
    if shutil.which("nvdisasm"):
        return True
    from cuda import pathfinder

    return pathfinder.find_nvidia_binary_utility("nvdisasm") is not None
