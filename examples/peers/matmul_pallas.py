"""The matmul that JAX ships for Hopper, written in Pallas Mosaic GPU."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as hopper
from peers.jax_arrays import call_jax, to_jax
from peers.jax_arrays import to_torch as to_torch

# Tile of a warpgroup, slots, how wide the walk over C is, along which of M and N lie the two
# warpgroups, and along which the two blocks of a cluster, if any.
LARGE = (
    (128, 128, 4, 8, "N", None),
    (64, 256, 4, 8, "M", None),
    (128, 128, 4, 8, "M", None),
    (128, 128, 4, 8, "N", "M"),
    (128, 128, 4, 16, "N", None),
    (128, 128, 4, 8, "N", "N"),
    (64, 256, 4, 16, "M", "M"),
    (128, 128, 4, 16, "M", "N"),
)
SMALL = ((64, 64, 6, 8, "M", None), (64, 64, 6, 8, "N", None), (64, 128, 4, 8, "N", None))


def candidates(operands: Any, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function that compiles and gives the call."""
    case = operands.case
    if case.layout != "nn" or case.dtype not in ("bfloat16", "float16"):
        raise ValueError("JAX's kernel takes 16-bit operands, B stored K x N")
    if case.M % 64:
        raise ValueError(f"JAX's kernel takes tiles of 64 rows, which do not divide M = {case.M}")
    a, b = to_jax(operands.a), to_jax(operands.b)
    found = [t for t in (LARGE if case.M > 512 else SMALL + LARGE) if _divides(case, *t)]
    for tiling in found[: 3 if quick else 8]:
        tile_m, tile_n, slots, wide, groups, cluster = tiling
        name = f"{tile_m}x{tile_n} a group along {groups}, {slots} slots, width {wide}"
        name += f", cluster along {cluster}" if cluster else ""
        yield name, functools.partial(_build, a, b, tiling)


def _divides(case: Any, tile_m: int, tile_n: int, slots: int, wide: int, *along: Any) -> bool:
    """Whether blocks and clusters of them fill C without a rest."""
    rows = tile_m * 2 ** along.count("M")
    columns = tile_n * 2 ** along.count("N")
    return case.M % rows == 0 and case.N % columns == 0 and case.K % 64 == 0


def _build(a: Any, b: Any, tiling: tuple[Any, ...]) -> Callable[[], Any]:
    tile_m, tile_n, slots, wide, groups, cluster = tiling
    along = {"M": hopper.MatmulDimension.M, "N": hopper.MatmulDimension.N, None: None}
    config = hopper.TuningConfig(
        tile_m=tile_m, tile_n=tile_n, tile_k=64, max_concurrent_steps=slots,
        epi_tile_n=64, epi_tile_m=64, grid_minor_dim=along["M"], grid_tile_width=wide,
        wg_dimension=along[groups], cluster_dimension=along[cluster],
    )  # fmt: skip
    matmul = jax.jit(functools.partial(hopper.matmul, c=None, config=config))
    return call_jax(matmul, a, b, shape=(a.shape[0], b.shape[1]))
