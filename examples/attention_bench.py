"""Times `attention.py` beside cuDNN, flash, Triton, JAX Pallas and TileLang, in turns.

python examples/attention.py --bench --dims 128 --peers cudnn,flash,triton,pallas,tilelang

Each candidate's result is checked by FlashAttention's rule before it is timed: at most twice the
error that the same maths has in 16 bits, both against float32. The best of a short sweep of tiles
goes into the interleaved rounds, and of tilejit the example's own defaults besides. The L2 cache
is flushed before every call. Printed are medians as TFLOP/s, of the multiplies that a mask leaves,
and their ratio to cuDNN (torch's scaled_dot_product_attention, as is flash). A peer that is not
there, does not compile or is wrong is left out, with the reason. Needs a GPU and torch.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attention as example
import bench_run
from attention_cases import DTYPES, MASKS, Operands, cases
from bench_options import bench_parser, number, numbers, words

PEERS = ("cudnn", "flash", "triton", "pallas", "tilelang")
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
DEFAULT = "default"
"""The column of the example's own tiles; "tilejit" is the best of the sweep."""

# BM, BN and threads by the largest D that they are for, most promising first.
TILES = (
    (64, ((128, 192, 256), (192, 96, 384), (128, 128, 256), (192, 128, 384), (128, 160, 256))),
    (96, ((128, 160, 256), (192, 96, 384), (128, 128, 256), (128, 144, 256), (128, 96, 256))),
    (128, ((128, 160, 256), (128, 176, 256), (128, 128, 256), (128, 144, 256), (192, 96, 384))),
    (256, ((128, 80, 256), (64, 80, 128), (128, 64, 256), (64, 64, 128), (128, 128, 256))),
)
QUICK = 2

HEADS_HELP = "of each sequence (2048 / D)"
TOKENS_HELP = "of a batch: it has as many sequences (16384)"
BACKWARD_HELP = "time the gradients too (needs attention_backward.py; of the peers, torch's)"


def tiles(D: int) -> tuple[dict[str, int], ...]:
    """Keywords to try for heads of that dimension: none, then those that say something else."""
    known = inspect.signature(example.attention).parameters
    found = next((choices for most, choices in TILES if most >= D), ())
    spelled = [{"BM": BM, "BN": BN, "threads": threads} for BM, BN, threads in found]
    return {}, *(t for t in spelled if any(known[name].default != t[name] for name in t))


def swept(operands: Operands, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """tilejit's own: the defaults, and for the forward pass some tiles."""
    found = tiles(operands.case.D)[: 1 + QUICK if quick else None]
    for tile in found[:1] if operands.case.is_backward else found:
        yield _name(tile), functools.partial(_build, operands, tile)


def default(operands: Operands, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """tilejit's own as the example is called without a word on tiles."""
    yield _name({}), functools.partial(_build, operands, {})


def _name(tile: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in tile.items()) or "default"


def _build(operands: Operands, tile: dict[str, int]) -> Callable[[], Any]:
    case, results = operands.case, operands.results
    arrays = [operands.q, operands.k, operands.v, operands.o, operands.lse]
    function = example.attention
    if case.is_backward:
        function = importlib.import_module("attention_backward").attention_backward
        arrays += [operands.do, *results]

    def call() -> Any:
        function(*arrays, is_causal=case.is_causal, **tile)
        return results

    return call


BENCH = bench_run.Bench(
    name="attention",
    title="batch x heads x S x D, dtype, mask",
    base="cudnn",
    own={"tilejit": swept, DEFAULT: default},
    make_operands=Operands,
    told=("tilejit",),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = bench_parser("attention", __doc__, PEERS, ["cudnn", "flash"])
    add = parser.add_argument
    masks, dtypes = ",".join(MASKS), ",".join(DTYPES)
    add("--sizes", type=numbers, default=list(SIZES), help="S (512,1024,2048,4096,8192,16384)")
    add("--dims", type=numbers, default=[64, 128], help="D, also 96 and 256 (64,128)")
    add("--masks", type=words(MASKS), default=list(MASKS), help=f"of {masks} (both)")
    add("--dtypes", type=words(DTYPES), default=list(DTYPES), help=f"of {dtypes} (both)")
    add("--heads", type=number, help=HEADS_HELP)
    add("--tokens", type=number, default=16384, help=TOKENS_HELP)
    add("--backward", action="store_true", help=BACKWARD_HELP)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if a case was timed."""
    start = time.monotonic()
    options = parse(argv)
    todo = cases(
        options.sizes,
        options.dims,
        options.masks,
        options.dtypes,
        heads=options.heads,
        tokens=options.tokens,
        directions=("forward", "backward") if options.backward else ("forward",),
    )
    return bench_run.main(BENCH, todo, options, start)


if __name__ == "__main__":
    raise SystemExit(main())
