"""Puts a generated program into a T.ws body: some warpgroups do what all did, others nothing."""

from __future__ import annotations

import dataclasses
import random
import re

from writing import Program

GROUP = 128
OPENING = re.compile(r"^( *)with T\.Kernel\((.*), threads=(\d+)\) as (.*):$", re.MULTILINE)


def in_a_role(program: Program, seed: int) -> Program | None:
    """The program by warpgroups in the middle of a larger block; None where its threads are no
    whole warpgroups."""
    rng = random.Random(seed)
    found = OPENING.search(program.source)
    assert found, "a program opens a kernel"
    indent, grid, threads, names = found.groups()
    if int(threads) % GROUP:
        return None
    first, count = rng.choice([0, 1, 1, 2]), int(threads) // GROUP
    total = GROUP * (first + count + rng.choice([0, 1]))
    groups = ", ".join(str(first + g) for g in range(count))
    body = program.source[found.end() :]
    body = "".join(f"    {line}" if line.strip() else line for line in body.splitlines(True))
    body = body.replace("T.get_thread_binding()", f"(T.get_thread_binding() - {GROUP * first})")
    opening = f"{indent}with T.Kernel({grid}, threads={total}) as {names}:\n"
    opening += f"{indent}    with T.ws({groups}):"
    source = program.source[: found.start()] + opening + body
    return dataclasses.replace(program, source=source)
