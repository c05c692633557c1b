"""Gives the shared tiles of a generated program random layouts."""

from __future__ import annotations

import ast
import dataclasses
import math
import random
import re

from writing import Program

from tilejit.dtypes import as_dtype

MOST_PADDED = 8192  # bytes of a tile with gaps, of which a pipeline has several
TILE = re.compile(r'^( *)(\w+) = T\.alloc_shared\((\(.*\)|\d+), "(\w+)"\)$', re.MULTILINE)


def laid_out(program: Program, seed: int) -> Program:
    """The program in which most tiles are annotated with one of the layouts that they may have."""
    rng = random.Random(seed)
    top = re.search(r"^( *)with T\.Kernel", program.source, re.MULTILINE)[1] + "    "

    def annotated(match: re.Match[str]) -> str:
        indent, name, shape, dtype = match.groups()
        if indent != top or rng.random() < 0.2:
            return match[0]
        shape = ast.literal_eval(shape)
        shape = shape if isinstance(shape, tuple) else (shape,)
        call = rng.choice(_calls(rng, name, shape, as_dtype(dtype).bytes))
        return f"{match[0]}\n{indent}T.annotate_layout({{{name}: T.{call}}})"

    return dataclasses.replace(program, source=TILE.sub(annotated, program.source))


def _calls(rng: random.Random, name: str, shape: tuple[int, ...], itemsize: int) -> list[str]:
    calls = [f"make_linear_layout({name})"]
    rows = math.prod(shape[:-1])
    if len(shape) > 1:
        pad = rng.choice([1, 2, 3, 16 // itemsize, 32 // itemsize])
        if rows * (shape[-1] + pad) * itemsize <= MOST_PADDED:
            calls.append(f"make_padded_layout({name}, {pad})")
        kinds = {128: "full_bank_swizzled", 64: "half_bank_swizzled", 32: "quarter_bank_swizzled"}
        for size, kind in {**kinds, 16: "chunked"}.items():
            if shape[-1] * itemsize % size == 0 and shape[-2] % 8 == 0:
                calls.append(f"make_{kind}_layout({name})")
    return calls
