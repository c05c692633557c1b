"""Tiles that several copies fill piece by piece, where there is no producer: these run ahead
together where they fill each element once before its use, else they are waited for at once."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit

TARGETS = ["sm_80", "sm_90a"]


@tilejit
def sums(X: T.Tensor, ROWS: T.Tensor, Y: T.Tensor, *, pieces=4, skipped=None, twice=False):
    """Y[step] = the sum of `pieces` rows of X that a table names, for each step."""
    N = X.shape[1]
    with T.Kernel(1, threads=64):
        tile = T.alloc_shared((pieces, N), X.dtype)
        total = T.alloc_fragment((N,), X.dtype)
        for step in T.Pipelined(Y.shape[0], num_stages=3):
            if skipped is not None:
                T.fill(tile, 0)
            for piece in tuple(range(pieces)):
                if piece != skipped:
                    T.copy(X[ROWS[step, piece], 0:N], tile[piece, :])
            if twice:
                T.copy(X[ROWS[step, 0], 0:N], tile[1, :])
            T.reduce_sum(tile, total, dim=0)
            T.copy(total, Y[step, :])


def arguments(steps=7, pieces=4, N=64):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 9, (20, N)).astype(np.float32)
    rows = rng.integers(0, 20, (steps, pieces)).astype(np.int32)
    return x, rows, np.full((steps, N), np.nan, np.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_that_fill_a_tile_run_ahead(executor, target, pieces):
    x, rows, y = arguments(pieces=pieces)
    with options(target=target if executor != "gpu" else None):
        sums(x, rows, y, pieces=pieces)
    assert (y == x[rows].sum(1)).all()
    text = sums.compile(x, rows, y, pieces=pieces, target=target).explain()
    assert "3 slots of tile" in text, text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", [{"skipped": 2}, {"twice": True}])
def test_pieces_that_leave_gaps_or_overlap_do_not(executor, target, how):
    x, rows, y = arguments()
    with options(target=target if executor != "gpu" else None):
        sums(x, rows, y, **how)
    kept = [p for p in range(4) if p != how.get("skipped")]
    named = rows[:, [0, 0, 2, 3]] if how.get("twice") else rows[:, kept]
    assert (y == x[named].sum(1)).all()
    assert "slots of tile" not in sums.compile(x, rows, y, target=target, **how).explain()
