"""Times `matmul.py` beside cuBLAS, Triton, JAX Pallas and TileLang, in one process and in turns.

python examples/matmul.py --bench --sizes 4096 --peers cublas,triton,pallas,tilelang

Each candidate's result is checked before it is timed. Of each peer the best of a short sweep goes
into the interleaved rounds; tilejit runs what its cost model chose, without one. The L2 cache is
flushed before every call. Printed are medians as TFLOP/s, and their ratio to cuBLAS. A peer that is
not there, does not compile or is wrong is left out, with the reason. Needs a GPU and torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_run
import matmul as example
import roofline
from bench_clock import reason
from bench_options import bench_parser, numbers, words
from bench_report import Outcome, records
from matmul_cases import PRECISIONS, Operands, cases, shapes

PEERS = ("cublas", "triton", "pallas", "tilelang")
SIZES = (2048, 4096, 8192, 16384)

SHAPES_HELP = "real: 32 products of language models, instead of squares or, with --sizes, besides"
LAYOUTS_HELP = "how B is stored, nn K x N, nt N x K (both); 8-bit operands take nt only"


def tilejit_candidates(operands: Operands, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """tilejit's own: what its cost model chooses, and no sweep."""
    case, a, b, c = operands.case, operands.a, operands.b, operands.c
    tiles = "tfloat32" if case.dtype == "tfloat32" else None

    def build() -> Callable[[], Any]:
        def call() -> Any:
            example.matmul(a, b, c, transpose_B=case.is_transposed, tiles=tiles)
            return c

        return call

    yield "T.auto", build


BENCH = bench_run.Bench(
    name="matmul",
    title="M x N x K, dtype, layout of B",
    base="cublas",
    own={"tilejit": tilejit_candidates},
    make_operands=Operands,
)


def draw(path: str, outcomes: Sequence[Outcome]) -> None:
    """Draw the roofline there; says in one line where it is, or why there is none."""
    try:
        device, bandwidth = bench_run.versions()["device"], roofline.copy_bandwidth()
        print(roofline.draw(path, records(outcomes), device, bandwidth))
    except Exception as error:
        print(f"No picture: {reason(error)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; sizes are squares of their own unless only real shapes are asked for."""
    dtypes = list(PRECISIONS)
    parser = bench_parser("matmul", __doc__, PEERS, ["cublas"])
    add = parser.add_argument
    add("--sizes", type=numbers, help="M = N = K (2048,4096,8192,16384)")
    add("--shapes", choices=("square", "real"), default="square", help=SHAPES_HELP)
    add("--dtypes", type=words(dtypes), default=["bfloat16"], help=f"of {','.join(dtypes)}")
    add("--layouts", type=words(["nn", "nt"]), default=["nn", "nt"], help=LAYOUTS_HELP)
    add("--plot", metavar="FILE.png", help="draw a roofline there")
    options = parser.parse_args(argv)
    options.real = options.shapes == "real"
    options.sizes = options.sizes or ([] if options.real else list(SIZES))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if a case was timed."""
    start = time.monotonic()
    options = parse(argv)
    todo = cases(shapes(options.sizes, real=options.real), options.dtypes, options.layouts)
    picture = (lambda outcomes: draw(options.plot, outcomes)) if options.plot else None
    return bench_run.main(BENCH, todo, options, start, picture)


if __name__ == "__main__":
    raise SystemExit(main())
