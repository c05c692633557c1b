"""How blocks begin: the role that brings tiles makes the barriers and goes on, the others wait for
that; and where the block meets first."""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from disassembler import has_disassembler
from products import assert_near, assert_product, matmul, operand
from test_kernels_manual import example
from test_kernels_shared_out import finished

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import SimulationError
from tilejit.ir.node import Roles, walk
from tilejit.ir.sync import SyncThreads
from tilejit.isa import barrier as isa_barrier
from tilejit.lower import skeleton

BF16 = ml_dtypes.bfloat16
HOPPER = "sm_90a"
GROUP = 128


def half(*shape):
    return T.Tensor(shape, "bfloat16")


def single(*shape):
    return T.Tensor(shape, "float32")


def roles_of(kernel):
    """The first roles of the kernel as planned."""
    (frame,) = kernel.kernels
    return next(n for n in walk(frame.planned.body) if isinstance(n, Roles))


def is_early(kernel) -> bool:
    """Whether a role makes the barriers, by the plan and by the PTX."""
    roles = roles_of(kernel)
    if roles.opener is None:
        assert "bar.arrive " not in kernel.ptx
        return False
    threads = sum(role.threads for role in roles.roles)
    others = len(roles.roles) - 1
    assert kernel.ptx.count(f"bar.arrive {roles.opening}, {threads};") == 1
    assert kernel.ptx.count(f"bar.sync {roles.opening}, {threads};") == others
    return True


# ---- machine code -------------------------------------------------------------------------------


def reaches_before(sass: str, wanted: str, waits: str) -> bool:
    """Whether there is a way from the kernel's start to an instruction `wanted` that passes none
    of `waits`, by jumps and falling through."""
    labels, code, closed = dict[str, int](), list[str](), dict[str, str]()
    lines = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    for label, text in lines:
        if label:
            labels[label] = len(code)
        else:
            code.append(text.strip())
    seen, todo = set[int](), [0]
    while todo:
        at = todo.pop()
        if at in seen or at >= len(code):
            continue
        seen.add(at)
        condition, text = re.fullmatch(r"(@!?U?P\w+ +)?(.*)", code[at]).groups()
        if re.match(waits, text):
            continue
        if re.match(wanted, text):
            return True
        target = re.search(r"`\((\.L_x_\d+)\)", text)
        if text.startswith("BSSY"):
            closed[text.split()[1].rstrip(",")] = target[1]
        elif text.startswith("BSYNC") and text.split()[1] in closed:
            todo.append(labels[closed[text.split()[1]]])
        elif target:
            todo.append(labels[target[1]])
        if condition or not re.match(r"EXIT|BRA `", text):
            todo.append(at + 1)
    return False


def test_ways_through_machine_code_are_found():
    lines = ["@P0 BRA `(.L_x_1)", "BAR.SYNC 0x0", "WANTED", "EXIT", ".L_x_1:", "{}", "WANTED"]

    def way(text):
        named = [x.format(text) for x in lines]
        sass = "\n".join(
            x if x.endswith(":") else f"        /*{16 * n:04x}*/   {x} ;"
            for n, x in enumerate(named)
        )
        return reaches_before(sass, "WANTED", "BAR.SYNC")

    assert way("NOP") and way("@P1 EXIT")
    assert not way("EXIT") and not way("BAR.SYNC 0xf") and not way("BRA `(.L_x_1)")


WAITS = r"BAR\.SYNC|UCGABAR_WAIT"


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize("size", [(1024,) * 3, (2048,) * 3, (4096,) * 3, (16, 4096, 4096)], ids=str)
def test_first_copy_waits_for_nobody(size):
    M, N, K = size
    BN, threads = (128, 128) if M < 2048 else (256, 256)
    kernel = matmul.compile(
        half(M, K), half(K, N), half(M, N), target=HOPPER, BM=128, BN=BN, BK=64, threads=threads
    )
    (frame,) = kernel.kernels
    is_free = frame.planned.cluster_size == 1 or frame.planned.is_shared_out
    assert is_early(kernel) == is_free
    assert reaches_before(kernel.sass, "UTMALDG", WAITS) == is_free
    assert not reaches_before(kernel.sass, "HGMMA", WAITS)


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize("cluster", [1, 2])
def test_first_copy_of_the_kernel_by_hand_waits_only_in_clusters(cluster):
    kernel = example().matmul.compile(*[half(512, 512)] * 3, target=HOPPER, cluster=cluster)
    assert is_early(kernel) == (cluster == 1)
    assert reaches_before(kernel.sass, "UTMALDG", WAITS) == (cluster == 1)
    assert ("barrier.cluster.arrive.release" in kernel.ptx) == (cluster > 1)


@pytest.mark.parametrize("cluster", [(1, 2), (2, 1)])
def test_blocks_that_hand_each_other_tiles_meet_first(cluster):
    sizes = half(512, 512), half(512, 512), half(512, 512)
    kernel = clustered.compile(*sizes, target=HOPPER, cluster=cluster)
    assert not is_early(kernel)
    ptx = kernel.ptx
    met = ptx.index("barrier.cluster.wait")
    assert ptx.index("mbarrier.init") < ptx.index("barrier.cluster.arrive.release") < met
    assert met < min(m.start() for m in re.finditer(r"mbarrier\.(?!init)|cp\.async\.bulk", ptx))
    assert ".multicast::cluster" in ptx


@tilejit
def clustered(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, cluster, BM=128, BN=128, BK=64):
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=256, cluster=cluster) as (bx, by):
        a, b = T.alloc_shared((BM, BK), A.dtype), T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), split=1):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * BM, bx * BN])


def test_maps_of_results_are_fetched_after_those_of_what_is_brought():
    kernel = clustered.compile(*[half(512, 512)] * 3, target=HOPPER, cluster=1)
    names = ("prefetch.tensormap", "mbarrier.init", "bar.arrive ", "cp.async.bulk.tensor.2d.shared")
    order = re.findall("|".join(map(re.escape, names)), kernel.ptx)
    fetched = [n for n, name in enumerate(order) if name == "prefetch.tensormap"]
    made, come = order.index("mbarrier.init"), order.index("bar.arrive ")
    assert len(fetched) == 3
    assert fetched[1] < made < come < fetched[2] < order.index("cp.async.bulk.tensor.2d.shared")
    (frame,) = kernel.kernels
    assert re.findall(r"# (\w+), .*makes the barriers", str(frame.planned)) == ["producer"]


# ---- what they compute --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128, 64), (200, 136, 264), (64, 72, 8)])
def test_matmul_is_right(hopper, rng, size):
    M, N, K = size
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    c = hopper(clustered, a, b, out=[((M, N), BF16)], cluster=1)
    assert_product(c, a, b)
    assert is_early(clustered.compile(a, b, c, target=HOPPER, cluster=1))


@pytest.mark.parametrize("size", [(128, 128, 64), (96, 200, 264)])
def test_blocks_of_a_cluster_that_share_a_loop_are_right(hopper, rng, size):
    """They use each other's barriers only after the loop: what comes to the cluster's barrier
    first has made its own."""
    M, N, K = size
    a, b = (rng.integers(-4, 5, s).astype(BF16) for s in ((M, K), (K, N)))
    v = rng.integers(-9, 10, N).astype(np.float32)
    r = np.zeros((M, N), np.float32)
    c = hopper(finished, a, b, v, r, out=[((M, N), np.float32)], kind="bias")
    assert (c == np.maximum(a.astype(np.float64) @ b.astype(np.float64) + v, 0)).all()
    kernel = finished.compile(a, b, v, r, c, target=HOPPER, kind="bias")
    assert kernel.kernels[0].planned.is_shared_out and is_early(kernel)
    ptx = kernel.ptx
    assert ptx.count("barrier.cluster.arrive.relaxed") == len(roles_of(kernel).roles)
    made = [m.start() for m in re.finditer(r"mbarrier\.init", ptx)]
    fence = ptx.index("fence.mbarrier_init")
    after = [m.start() for m in re.finditer(r"barrier\.cluster\.arrive\.relaxed", ptx)]
    assert max(made) < fence < min(x for x in after if x > max(made))


@tilejit
def scores(Q: T.Tensor, K: T.Tensor, V: T.Tensor, O: T.Tensor, *, B=64, is_normal=True):
    """softmax(Q @ K.T) @ V without running maxima, for small numbers; or not divided by the sums
    of the rows."""
    S, D = K.shape
    with T.Kernel(T.ceildiv(Q.shape[0], B), threads=128) as block:
        q, k, v = (T.alloc_shared((B, D), Q.dtype) for _ in range(3))
        score, out = T.alloc_fragment((B, B), "float32"), T.alloc_fragment((B, D), "float32")
        weight, total = T.alloc_fragment((B, B), Q.dtype), T.alloc_fragment((B,), "float32")
        T.copy(Q[block * B, 0], q)
        T.clear(out)
        T.clear(total)
        for step in T.Pipelined(T.ceildiv(S, B)):
            T.copy(K[step * B, 0], k)
            T.copy(V[step * B, 0], v)
            T.gemm(q, k, score, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(B, B):
                score[i, j] = T.if_then_else(step * B + j < S, T.exp(score[i, j]), 0.0)
            if is_normal:
                T.reduce_sum(score, total, dim=1, clear=False)
            T.copy(score, weight)
            T.gemm(weight, v, out)
        if is_normal:
            for i, d in T.Parallel(B, D):
                out[i, d] /= total[i]
        T.copy(out, O[block * B, 0])


@pytest.mark.parametrize("is_normal", [False, True])
@pytest.mark.parametrize("rows, keys", [(64, 64), (100, 200), (129, 70)])
def test_attention_is_right_and_meets_where_its_loop_reduces(hopper, rng, rows, keys, is_normal):
    q, k, v = (rng.uniform(-0.4, 0.4, (n, 64)).astype(BF16) for n in (rows, keys, keys))
    o = hopper(scores, q, k, v, out=[((rows, 64), np.float32)], is_normal=is_normal)
    weights = np.exp(q.astype(np.float64) @ k.astype(np.float64).T)
    sums = weights.sum(1, keepdims=True)
    exact = weights @ v.astype(np.float64) / (sums if is_normal else 1)
    assert_near(o, exact, np.full(exact.shape, 2.0**-8) * (1 if is_normal else sums))
    kernel = scores.compile(q, k, v, o, target=HOPPER, is_normal=is_normal)
    assert is_early(kernel) == (not is_normal)


# ---- written by hand ----------------------------------------------------------------------------


@tilejit
def scaled(
    A: T.Tensor, C: T.Tensor, *,
    by="elected", first=1, slots=2, named=0, before=False, after=False,
):  # fmt: skip
    """C = A * the sums of its rows, of which warpgroup `first` brings 32 at a time. by: who of it
    uses the barriers. named: so many hardware barriers are named by the other one. before, after:
    the block uses a barrier before or after its roles."""
    M, N = A.shape
    steps, numbers = T.ceildiv(M, 32), tuple(range(1, named + 1))
    with T.Kernel(1, threads=2 * GROUP):
        tile = T.alloc_shared((slots, 32, N), A.dtype)
        held, total = T.alloc_fragment((32, N), A.dtype), T.alloc_fragment((32,), A.dtype)
        full, empty = T.alloc_barrier([1] * slots), T.alloc_barrier([GROUP] * slots)
        over = T.alloc_barrier(2 * GROUP)
        tx = T.get_thread_binding()

        @T.macro
        def bring(k):
            T.tma_copy(A[k * 32, 0], tile[k % slots, :, :], barrier=full[k % slots])
            T.mbarrier_arrive(full[k % slots])

        if before:
            T.mbarrier_arrive(over)
        with T.ws(first):
            if by == "elected":
                if T.shuffle_elect(GROUP):
                    for k in range(steps):
                        T.mbarrier_wait_parity(empty[k % slots], ((k // slots) & 1) ^ 1)
                        bring(k)
            else:
                for k in range(steps):
                    T.mbarrier_wait_parity(empty[k % slots], ((k // slots) & 1) ^ 1)
                    if T.shuffle_elect(GROUP):
                        bring(k)
        with T.ws(1 - first):
            for number in numbers:
                T.sync_threads(number, GROUP)
            for k in range(steps):
                T.mbarrier_wait_parity(full[k % slots], (k // slots) & 1)
                T.copy(tile[k % slots, :, :], held)
                T.mbarrier_arrive(empty[k % slots])
                T.reduce_sum(held, total, dim=1)
                for i, j in T.Parallel(32, N):
                    held[i, j] *= total[i]
                T.copy(held, C[k * 32, 0])
        if after:
            T.mbarrier_arrive(over)
        if before or after:
            T.mbarrier_wait_parity(over, 0)
            if tx == 0:
                C[0, 0] = 0


EARLY = [{}, {"first": 0}, {"slots": 1}, {"named": 5}, {"named": 12}]
LATE = [{"by": "all"}, {"before": True}, {"after": True}, {"named": 13}]


@pytest.mark.parametrize("options", EARLY + LATE, ids=str)
def test_kernel_by_hand_is_right_and_opens_where_it_may(hopper, rng, options):
    a = rng.integers(-9, 10, (100, 64)).astype(np.float32)
    c = hopper(scaled, a, out=[((100, 64), np.float32)], **options)
    expected = a * a.sum(1, keepdims=True)
    if options.get("before") or options.get("after"):
        expected[0, 0] = 0
    assert (c == expected).all()
    assert is_early(scaled.compile(a, c, target=HOPPER, **options)) == (options in EARLY)


@pytest.mark.parametrize("named", [0, 3, 12])
def test_nothing_else_uses_the_barrier_where_the_others_wait(named):
    roles = roles_of(scaled.compile(single(64, 64), single(64, 64), target=HOPPER, named=named))
    numbers = [n.number.value for n in walk((roles,)) if isinstance(n, SyncThreads) and n.number]
    assert len(numbers) == named
    used = {*numbers, *(role.meeting for role in roles.roles)}
    assert 0 < roles.opening < 16 and roles.opening not in used


def test_kernel_that_waits_for_the_one_before_makes_its_barriers_meanwhile():
    """What stands before the roles may take long."""

    @tilejit
    def dependent(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            tile, there = T.alloc_shared((32, 64), A.dtype), T.alloc_barrier(1)
            T.pdl_sync()
            with T.ws(1):
                if T.shuffle_elect(GROUP):
                    T.tma_copy(A[0, 0], tile, barrier=there)
                    T.mbarrier_arrive(there)
            with T.ws(0):
                T.mbarrier_wait_parity(there, 0)
                T.copy(tile, C[0, 0])

    kernel = dependent.compile(single(32, 64), single(32, 64), target=HOPPER)
    assert not is_early(kernel)
    assert kernel.ptx.index("mbarrier.init") < kernel.ptx.index("griddepcontrol.wait")


def test_teams_meet_elsewhere(monkeypatch):
    from tilejit.passes import teams

    monkeypatch.setattr(teams, "FEWEST_TILES", 0)
    roles = roles_of(matmul.compile(half(512, 256), half(256, 512), half(512, 512), target=HOPPER))
    consumer = roles.roles[0]
    meetings = range(consumer.meeting, consumer.meeting + consumer.teams)
    assert consumer.teams == 2 and roles.opener == 1
    assert roles.opening not in meetings


# ---- mistakes that the simulator finds ----------------------------------------------------------


@pytest.mark.parametrize("first, found", [(0, "nothing orders the two"), (1, "but there is none")])
def test_role_that_uses_barriers_before_the_meeting_is_found(
    hopper, rng, executor, monkeypatch, first, found
):
    if executor != "simulator":
        pytest.skip("only the simulator looks")
    made = skeleton.of_role

    def hasty(kernel, roles, role):
        """Waiting roles only say that they have come."""
        opening = made(kernel, roles, role)
        if role is roles.roles[roles.opener]:
            return opening
        threads = sum(r.threads for r in roles.roles)
        come = isa_barrier.bar_arrive(roles.opening, threads)
        return replace(opening, emit=lambda emitter: emitter.m.issue(come))

    monkeypatch.setattr(skeleton, "of_role", hasty)
    a = rng.standard_normal((96, 48)).astype(np.float32)
    with pytest.raises(SimulationError, match=found):
        hopper(scaled, a, out=[((96, 48), np.float32)], first=first)
