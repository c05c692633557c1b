"""Reads machine code: what the loops of a kernel consist of."""

from __future__ import annotations

import collections
import re
import shutil


def main_loop(sass: str, multiply: str, count: int) -> dict[str, int]:
    """How often each instruction is in the shortest loop with so many of this multiply."""
    lines = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    labels, found = dict[str, int](), list[str]()
    for label, text in lines:
        if label:
            labels[label] = len(found)
        else:
            found.append(re.sub(r"^@!?U?P\d+ ", "", text).strip())
    bodies = []
    for end, text in enumerate(found):
        jump = re.match(r"BRA.*`\((\.L_x_\d+)\)", text)
        if jump and labels[jump[1]] <= end:
            bodies.append(found[labels[jump[1]] : end + 1])
    both = [b for b in bodies if sum(text.startswith(multiply) for text in b) >= count]
    names = [text.split()[0].split(".") for text in min(both, key=len)]
    return collections.Counter(".".join(parts[: 2 if parts[0] == "MUFU" else 1]) for parts in names)


def has_disassembler() -> bool:
    if shutil.which("nvdisasm"):
        return True
    from cuda import pathfinder

    return pathfinder.find_nvidia_binary_utility("nvdisasm") is not None
