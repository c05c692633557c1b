"""Where the strips of results that wait are stored: in a tile's first iterations and after the last
tile."""

from __future__ import annotations

import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.ir.expr import variables
from tilejit.ir.node import For, If, LoopKind, OneThread, Parallel, Roles, walk
from tilejit.ir.sync import Control, ControlOp, SyncThreads
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.passes import late


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """Results of blocks that compute a few tiles wait too."""
    monkeypatch.setattr(late, "FEWEST_TILES", 0)


@tilejit
def matmul(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BN, stages=None, works=False):
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, 128), threads=256) as (bx, by):
        a = T.alloc_shared((128, 32), A.dtype)
        b = T.alloc_shared((32, BN), B.dtype)
        acc = T.alloc_fragment((128, BN), "float32")
        count = T.alloc_fragment((128,), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32), num_stages=stages):
            T.copy(A[by * 128, k * 32], a)
            T.copy(B[k * 32, bx * BN], b)
            T.gemm(a, b, acc)
            if works:
                for i in T.Parallel(128):
                    count[i] = k + 1
        if works:
            for i, j in T.Parallel(128, BN):
                acc[i, j] *= count[i]
        T.copy(acc, C[by * 128, bx * BN])


def consumer(columns, trips, **constants):
    """What the consumers do before and in the walk over a block's tiles, and after it."""
    N, K = 2 * columns, 32 * trips
    spec = T.Tensor((512, K), "bfloat16"), T.Tensor((K, N), "bfloat16")
    out = T.Tensor((512, N), "bfloat16")
    plan = matmul.compile(*spec, out, target="sm_90a", BN=columns, **constants).kernels[0].planned
    roles = next(n for n in plan.body if isinstance(n, Roles))
    body = roles.roles[0].body
    place = next(n for n, x in enumerate(body) if isinstance(x, For) and x.kind is LoopKind.TILES)
    return body[place].body, body[place + 1 :]


def sent(body):
    """The strips that nodes store, as the slots that they are in."""
    copies = [n for n in walk(body) if isinstance(n, Copy) and n.is_tma]
    return [int(n.src.starts[0].value) for n in copies]


def loops(body):
    return [n for n in body if isinstance(n, For)]


@pytest.mark.parametrize("columns, trips", [(64, 1), (64, 4), (128, 2), (192, 3), (256, 9)])
def test_each_of_the_first_iterations_stores_a_strip(columns, trips):
    strips = columns // 64
    tile, _ = consumer(columns, trips)
    found = loops(tile)
    bounds = [(int(n.start.value), int(n.stop.value)) for n in found]
    rest = [(strips, trips)] if trips > strips else []
    assert bounds == [(n, n + 1) for n in range(strips)] + rest
    slots = min(2, strips)
    assert [sent(n.body) for n in found[:strips]] == [[n % slots] for n in range(strips)]
    assert not any(sent(n.body) for n in found[strips:])
    assert sent(tile) == [n % slots for n in range(strips)]


@pytest.mark.parametrize("constants", [{}, {"stages": 2}, {"works": True}], ids=str)
def test_a_strip_is_stored_while_a_multiply_runs(constants):
    tile, _ = consumer(128, 5, **constants)
    for loop in loops(tile)[:2]:
        kinds = [type(n) for n in loop.body]
        (place,) = (n for n, x in enumerate(loop.body) if isinstance(x, If) and sent((x,)))
        assert kinds[place - 1] is Gemm and loop.body[place - 1].is_async
        assert GemmWait in kinds[place + 1 :]
        assert GemmWait not in kinds[: place - 1]


def test_the_first_tile_stores_nothing():
    tile, _ = consumer(128, 5)
    conditions = [n.condition for n in walk(tile) if isinstance(n, If) and sent((n,))]
    assert [c.name for c in conditions] == ["has_before"] * 2
    (value,) = (n for n in walk(tile) if "has_before" in [v.name for v in n.defines])
    assert [v.name for v in variables(value.value)] == ["visit"]
    assert value.value.op == "gt"


def test_the_last_tile_is_stored_after_the_walk():
    tile, rest = consumer(192, 4)
    last, *end = rest
    assert isinstance(last, If)
    assert sent((last,)) == [0, 1, 0]
    assert [n.op for n in end] == [ControlOp.STORE_WAIT_READ]
    assert isinstance(tile[-1], Parallel)
    assert [b.name for b in tile[-1].body[-1].writes] == ["acc_held"]


def test_a_strip_waits_until_its_slot_was_read():
    """Three strips in two slots: the first one goes where the tile before had its last."""
    tile, _ = consumer(192, 4)
    for number, loop in enumerate(loops(tile)[:3]):
        (strip,) = (n for n in loop.body if isinstance(n, If) and sent((n,)))
        before = [n for n in strip.then if isinstance(n, Control | SyncThreads | Parallel)]
        kinds = [n.op if isinstance(n, Control) else type(n) for n in before]
        written = kinds.index(Parallel)
        met = [ControlOp.STORE_WAIT_READ, SyncThreads] if number == 0 else []
        assert kinds[:written] == met
        assert kinds[written + 1 :] == [
            ControlOp.FENCE_ASYNC,
            ControlOp.STORE_WAIT_READ,
            SyncThreads,
            ControlOp.STORE_COMMIT,
        ]
        assert [n.each for n in strip.then if isinstance(n, OneThread)] == [128]
