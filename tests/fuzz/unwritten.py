"""Reads machine code: registers that warpgroup multiplies take an operand from though on some way
to them nothing has written there."""

from __future__ import annotations

import re

_LINE = re.compile(
    r"^(?P<label>\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]*);", re.MULTILINE
)
# what has no result in registers, or only predicates
_NO_RESULT = (
    "ST", "RED", "SYNCS", "UTMA", "BRA", "BAR", "EXIT", "WARP", "MEMBAR", "FENCE", "DEPBAR",
    "ERRBAR", "CCTL", "NANOSLEEP", "BSSY", "BSYNC",
)  # fmt: skip


def unwritten(sass: str) -> list[str]:
    """The multiplies, each with the registers that it may read before anything wrote them."""
    code, labels = list[str](), dict[str, int]()
    for match in _LINE.finditer(sass):
        if match["label"]:
            labels[match["label"]] = len(code)
        else:
            code.append(match["text"].strip())
    before: list[int | None] = [None] * len(code)  # registers, as bits; None: no way there
    before[0] = 0
    open_ends = [0]
    while open_ends:
        place = open_ends.pop()
        known = before[place]
        assert known is not None
        after = known | _results(code[place])
        for following in _following(code, place, labels):
            old = before[following]
            new = after if old is None else old & after
            if new != old:
                before[following] = new
                open_ends.append(following)
    found = []
    for place, text in enumerate(code):
        known = before[place]
        if "GMMA." not in text or known is None:
            continue
        lost = [f"R{r}" for r in sorted(_multiplied(text)) if not known >> r & 1]
        if lost:
            found.append(f"{text}: {', '.join(lost)}")
    return found


def _multiplied(text: str) -> set[int]:
    """The registers that a multiply reads, but for sums that a predicate may leave out."""
    left = re.search(r"GMMA\.\S+\s+R\d+, R(\d+)", text)
    found = set(range(int(left[1]), int(left[1]) + 4)) if left else set()
    sums = re.search(r"\], R(\d+)( ;|$|, gsb0)", re.sub(r"\]\.\w+", "]", text))
    if sums:
        found |= set(range(int(sums[1]), int(sums[1]) + _width(text)))
    return found


def _following(code: list[str], place: int, labels: dict[str, int]) -> list[int]:
    text = code[place]
    is_conditional = text.startswith("@")
    operation, _, rest = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    found = []
    if operation.startswith("BRA"):
        target = re.search(r"`\((\.L_x_\d+)\)", rest)
        assert target, text
        found.append(labels[target[1]])
        is_conditional |= "P" in rest.split("`")[0] or ".DIV" in operation
    ends = operation.startswith(("BRA", "EXIT")) and not is_conditional
    return found + ([] if ends or place + 1 == len(code) else [place + 1])


def _results(text: str) -> int:
    """The registers that an instruction writes, as bits."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text)
    operation, _, rest = text.partition(" ")
    if operation.startswith(_NO_RESULT):
        return 0
    for operand in rest.split(","):
        name = operand.strip()
        if re.fullmatch(r"!?U?P[T\d]", name):
            continue
        match = re.fullmatch(r"R(\d+)", name)
        return ((1 << _width(operation)) - 1) << int(match[1]) if match else 0
    return 0


def _width(operation: str) -> int:
    """How many registers a result takes."""
    multiply = re.search(r"GMMA\.64x(\d+)x\d+\.(\w+)", operation)
    if multiply:
        return int(multiply[1]) // (4 if multiply[2] == "F16" else 2)
    if operation.startswith("LDSM"):
        return int(operation.rsplit(".", 1)[1]) if operation[-1].isdigit() else 1
    if ".128" in operation:
        return 4
    is_pair = operation.startswith(("DADD", "DMUL", "DFMA"))
    is_pair |= operation.startswith("CS2R") and ".32" not in operation
    return 2 if is_pair or ".64" in operation or ".WIDE" in operation else 1
