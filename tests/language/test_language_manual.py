"""Kernels by hand: what each call records, and what is refused at the user's line."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from traced import kernel as opened
from traced import refused, tensor

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ResourceError,
    ShapeError,
    TraceError,
    UnsupportedError,
)
from tilejit.ir.node import OneThread, Roles, walk
from tilejit.ir.sync import BarrierArrive, BarrierExpect, Control, Elect, SyncThreads
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm, GemmWait

HOPPER = "sm_90a"
HERE = __file__


def half(*shape):
    return T.Tensor(shape, "float16")


def single(*shape, **fields):
    return T.Tensor(shape, "float32", **fields)


@contextlib.contextmanager
def wrong(kind, headline: str, at: str, hint: str | None = None):
    """The body raises `kind` with that headline (and hint), at the line of this file with `at`."""
    with pytest.raises(kind) as caught:
        yield
    error = caught.value
    assert error.headline == headline
    if hint is not None:
        assert error.hint == hint
    assert error.span is not None and error.span.filename == HERE
    with open(HERE, encoding="utf-8") as file:
        line = file.read().splitlines()[error.span.line - 1]
    assert at in line, line


def nodes_of(function, *arguments, **constants):
    """The nodes of a traced kernel."""
    return list(walk(function.compile(*arguments, target=HOPPER, **constants).graph.body))


# ---- clusters and grids -------------------------------------------------------------------------


def test_clusters_that_cannot_be_are_refused():
    with refused(ArgumentError, "T.Kernel: cluster has 1 to 3 entries, got 4."):
        T.Kernel(4, cluster=(1, 1, 1, 1))
    with refused(ArgumentError, "T.Kernel: cluster must be positive, got 0."):
        T.Kernel(4, cluster=0)
    with refused(
        ArgumentTypeError,
        "T.Kernel: cluster must be known when the kernel is traced, got 'two'.",
        "Give an int or a compile-time parameter.",
    ):
        T.Kernel(4, cluster="two")
    with refused(
        ResourceError,
        "T.Kernel: a cluster of 32 blocks; no chip runs more than 16.",
        "Use a smaller cluster.",
    ):
        T.Kernel(32, cluster=32)
    with refused(
        ArgumentError,
        "T.Kernel: the grid has 6 blocks along y, which clusters of 4 do not divide.",
        "Round the grid up to a multiple; blocks that are too many may do nothing.",
    ):
        T.Kernel(4, 6, cluster=(1, 4))
    with refused(
        ArgumentError,
        "T.Kernel: the grid has 1 blocks along y, which clusters of 2 do not divide.",
        "Round the grid up to a multiple; blocks that are too many may do nothing.",
    ):
        T.ClusterKernel(4, cluster_dims=(1, 2))


def test_grid_known_only_at_the_call_is_checked_then():
    N = T.dynamic("N")

    @tilejit
    def kernel(A: T.Tensor((N,), "float32")):
        with T.Kernel(T.ceildiv(N, 32), threads=32, cluster=2) as b:
            A[b * 32 + T.get_thread_binding()] = 1
            T.cluster_sync()

    from tilejit import options

    with options(simulate=True, target=HOPPER):
        a = np.zeros(128, np.float32)
        kernel(a)
        assert (a == 1).all()
        with pytest.raises(ArgumentError, match="3 blocks along x, which clusters of 2 do not"):
            kernel(np.zeros(96, np.float32))


def test_cluster_needs_a_target_that_has_them():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=32, cluster=2) as b:
            A[b] = T.block_rank_in_cluster()

    with wrong(
        UnsupportedError,
        "T.Kernel: cluster needs thread block clusters, which sm_89 lacks.",
        "T.Kernel(4, threads=32, cluster=2)",
        "Targets that have it: sm_90, sm_90a, sm_100a, sm_120a.",
    ):
        kernel.compile(single(4), target="sm_89")
    assert kernel.compile(single(4), target="sm_90").graph.cluster == (2, 1, 1)


def test_cluster_calls_record_their_instructions():
    with opened() as nodes:
        T.cluster_arrive()
        T.cluster_arrive_relaxed()
        T.cluster_wait()
        T.cluster_sync()
        T.fence_proxy_async()
        T.tma_store_arrive()
        T.tma_store_wait(2)
        T.tma_store_wait(1, read=False)
        T.pdl_sync()
        T.pdl_trigger()
    assert [(str(n.op), n.count) for n in nodes] == [
        ("cluster_arrive", 0), ("cluster_arrive_relaxed", 0), ("cluster_wait", 0),
        ("cluster_arrive", 0), ("cluster_wait", 0), ("fence_proxy_async", 0),
        ("tma_store_arrive", 0), ("tma_store_wait_read", 2), ("tma_store_wait", 1),
        ("pdl_sync", 0), ("pdl_trigger", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "call, needs",
    [
        (T.pdl_sync, "griddepcontrol"),
        (T.pdl_trigger, "griddepcontrol"),
        (T.fence_proxy_async, "cp.async.bulk.tensor"),
        (T.tma_store_wait, "cp.async.bulk.tensor"),
        (T.cluster_arrive, "thread block clusters"),
    ],
)
def test_instructions_that_the_target_lacks_are_refused_at_their_line(call, needs):
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=32):
            call()  # here
            A[T.get_thread_binding()] = 1

    name = {"tma_store_wait": "tma_store_wait_read"}.get(call.__name__, call.__name__)
    with wrong(UnsupportedError, f"T.{name} needs {needs}, which sm_80 lacks.", "call()  # here"):
        kernel.compile(single(32), target="sm_80")


# ---- T.ws ---------------------------------------------------------------------------------------


def test_warpgroups_that_cannot_be_are_refused():
    with opened(threads=384):
        with refused(ArgumentError, "T.ws needs a warpgroup.", "Write `with T.ws(0):`."):
            T.ws()
        with refused(
            ArgumentError,
            "T.ws: there is no warpgroup 3; 384 threads are warpgroups 0 to 2.",
            "A warpgroup is 128 threads: threads=512.",
        ):
            T.ws(2, 3)
        with refused(
            UnsupportedError,
            "T.ws: warpgroups 0, 2 are not next to each other.",
            "Number the groups so that those with the same work follow each other.",
        ):
            T.ws(0, 2)
        with refused(ArgumentError, "T.ws: a warpgroup is given twice in (1, 1)."):
            T.ws(1, 1)
        with refused(ArgumentTypeError, "T.ws: a warpgroup is 0.5, not an integer."):
            T.ws(0.5)
    with (
        opened(threads=64),
        refused(
            ArgumentError,
            "T.ws: there is no warpgroup 0; 64 threads are no warpgroup.",
            "A warpgroup is 128 threads: threads=128.",
        ),
    ):
        T.WarpSpecialize(0)
    with (
        opened(threads=(128, 2)),
        refused(
            UnsupportedError,
            "T.ws: the block's threads have more than one dimension.",
            "Write threads=n in T.Kernel.",
        ),
    ):
        T.ws(0)
    with pytest.raises(TraceError, match=r"T\.ws is only allowed inside a kernel\."):
        T.ws(0)


def test_roles_that_may_run_side_by_side_are_one_node():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=384):
            with T.ws(2):
                A[0] = 1
            x = T.alloc_var("float32", init=2)
            with T.ws(0, 1):
                A[1] = x
            with T.ws(0):
                A[2] = 3
            T.sync_threads()
            with T.ws(1):
                A[3] = 4

    found = [n for n in nodes_of(kernel, single(8)) if isinstance(n, Roles)]
    homes = [[(r.first, r.threads) for r in node.roles] for node in found]
    assert homes == [[(256, 128), (0, 256)], [(0, 128)], [(128, 128)]]


def test_ws_inside_another_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=256), T.ws(0, 1):
            A[0] = 1
            with T.ws(1):
                A[1] = 1

    with wrong(
        TraceError,
        "A T.ws cannot be inside another one.",
        "with T.ws(1):",
        "Close the first body; bodies of different groups run side by side.",
    ):
        kernel.compile(single(8), target=HOPPER)


def test_ws_where_only_some_threads_come_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=256):
            if T.get_thread_binding() > 4:
                with T.ws(1):
                    A[1] = 1

    with wrong(
        TraceError,
        "T.ws needs all threads of the block, but it stands in a branch or loop that not all of "
        "them take.",
        "with T.ws(1):",
    ):
        kernel.compile(single(8), target=HOPPER)


def test_tile_op_where_only_some_threads_of_a_role_come_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=256):
            s = T.alloc_shared((8,), "float32")
            with T.ws(1):
                if T.get_thread_binding() > 200:
                    T.copy(A, s)

    with wrong(
        TraceError,
        "T.copy needs threads 128 to 255, but it stands in a branch or loop that not all of them "
        "take.",
        "T.copy(A, s)",
    ):
        kernel.compile(single(8), target=HOPPER)


def test_fragment_of_two_sets_of_threads_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=256):
            f = T.alloc_fragment((128,), "float32")
            T.clear(f)
            with T.ws(1):
                T.copy(f, A)

    with wrong(
        TraceError,
        "`f` is used by warpgroup 1, but it is a fragment of all threads of the block.",
        "T.copy(f, A)",
        "Give each set of warpgroups a fragment of its own; they exchange tiles through shared "
        "memory.",
    ):
        kernel.compile(single(128), target=HOPPER)


def test_value_made_in_a_body_is_not_seen_after_it():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=256):
            with T.ws(1):
                x = A[0] + 1
            A[1] = x

    with wrong(TraceError, "`x` is bound inside the T.ws body and read after it.", "A[1] = x"):
        kernel.compile(single(8), target=HOPPER)


def test_index_by_a_loop_in_a_body_is_checked_but_not_by_threads_that_never_come():
    @tilejit
    def kernel(A: T.Tensor, *, shift):
        with T.Kernel(1, threads=256):
            s = T.alloc_shared((128,), "float32")
            with T.ws(1):
                s[T.get_thread_binding() - 128] = 1
                for i in range(128):
                    s[i + shift] = 2
                T.copy(s, A)

    kernel.compile(single(128), target=HOPPER, shift=0)
    with wrong(
        IndexError,
        "Index `i + 1` reaches 128, but dimension 0 of `s` has extent 128.",
        "s[i + shift] = 2",
    ):
        kernel.compile(single(128), target=HOPPER, shift=1)


def test_elections_that_cannot_be_are_refused():
    with opened(threads=192):
        with refused(
            ArgumentError,
            "T.shuffle_elect: 128 threads; the block's 192 are no whole number of such groups of "
            "warps.",
            "128 elects a thread of each warpgroup, 32 one of each warp, 0 one of all.",
        ):
            T.shuffle_elect(128)
        with refused(ArgumentTypeError, "T.shuffle_elect: the extent is 1.5, not an integer."):
            T.shuffle_elect(1.5)
        T.shuffle_elect(0)
        T.shuffle_elect(96)


def test_election_where_not_all_of_a_warp_come_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            if T.get_thread_binding() < 40:
                if T.shuffle_elect(32):
                    A[0] = 1

    with wrong(
        TraceError,
        "T.shuffle_elect needs all threads of the block, but it stands in a branch or loop that "
        "not all of them take.",
        "if T.shuffle_elect(32):",
    ):
        kernel.compile(single(8), target=HOPPER)


# ---- registers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["inc_max_nreg", "dec_max_nreg", "annotate_producer_reg_dealloc",
                                  "annotate_consumer_reg_alloc"])  # fmt: skip
def test_numbers_of_registers_that_no_thread_can_have_are_refused(call):
    function = getattr(T, call)
    with opened(threads=256):
        for count in (20, 250, 264, 0, -8):
            with refused(
                ArgumentError,
                f"T.{call}: a thread cannot have {count} registers.",
                "A multiple of 8 from 24 to 256.",
            ):
                function(count)
        with refused(
            ArgumentTypeError, f"T.{call}: the number of registers is 40.0, not an integer."
        ):
            function(40.0)


def test_registers_move_between_warpgroups_only():
    with opened(threads=256):
        for call in ("inc_max_nreg", "dec_max_nreg"):
            with refused(
                TraceError,
                f"T.{call} is only allowed in a T.ws body: what one warpgroup gets, another gives "
                "back.",
                "Write it at the top of `with T.ws(...):`.",
            ):
                getattr(T, call)(40)
        with refused(
            ArgumentTypeError,
            "T.set_max_nreg: is_inc is 'up'; it is 1 for more registers, 0 for fewer.",
        ):
            T.set_max_nreg(40, "up")


@tilejit
def registers(A: T.Tensor, *, up, down, threads=384, annotate=False):
    with T.Kernel(1, threads=threads):
        if annotate:
            T.annotate_consumer_reg_alloc(up)  # the annotation
        with T.ws(0):
            T.set_max_nreg(down, 0)
            A[0] = 1
        with T.ws(1, threads // 128 - 1) if threads == 384 else T.ws(1):
            T.set_max_nreg(up, 1)  # more
            A[1] = 2


def test_registers_of_all_roles_must_fit_the_file():
    registers.compile(single(8), target=HOPPER, up=240, down=24)
    with wrong(
        ResourceError,
        "The warpgroups ask for 68608 registers together; the block's 384 threads start with 168 "
        "each, 64512 together.",
        "T.set_max_nreg(up, 1)  # more",
        "Let other warpgroups give more back with T.dec_max_nreg, or ask for fewer.",
    ):
        registers.compile(single(8), target=HOPPER, up=240, down=56)
    with wrong(
        ResourceError,
        "T.dec_max_nreg(176) gives no registers back: a thread has 168 when the block starts.",
        "T.set_max_nreg(down, 0)",
        "Keep fewer than 168, or leave it out.",
    ):
        registers.compile(single(8), target=HOPPER, up=168, down=176)


def test_registers_are_annotated_in_the_bodies_of_a_kernel_that_has_them():
    with wrong(
        TraceError,
        "In a kernel with T.ws the registers of a thread are a matter of each body.",
        "# the annotation",
        "Move the call to the top of the T.ws body that it is for.",
    ):
        registers.compile(single(8), target=HOPPER, up=240, down=24, annotate=True)


def test_registers_move_on_chips_that_can_only():
    with wrong(
        UnsupportedError,
        "T.dec_max_nreg needs setmaxnreg, which sm_90 lacks.",
        "T.set_max_nreg(down, 0)",
        "Targets that have it: sm_90a, sm_100a, sm_120a.",
    ):
        registers.compile(single(8), target="sm_90", up=240, down=24)


# ---- T.tma_copy ---------------------------------------------------------------------------------


def test_bulk_copies_between_other_memories_are_refused():
    A, B = tensor("A", (64, 64)), tensor("B", (64, 64))
    with opened():
        s = T.alloc_shared((64, 64), "float32")
        f = T.alloc_fragment((64, 64), "float32")
        one = T.alloc_barrier(1)
        hint = "T.copy copies between any two memories."
        for src, dst, text in (
            (A, f, "`f` is in a fragment"),
            (f, A, "`f` is in a fragment"),
            (A, B, "`A` and `B` are both in global memory"),
            (s, s, "`s` and `s` are both in shared memory"),
        ):
            headline = f"T.tma_copy copies between global and shared memory, but {text}."
            with refused(ArgumentError, headline, hint):
                T.tma_copy(src, dst, barrier=one)


def test_bulk_copies_with_arguments_that_cannot_be_are_refused():
    A = tensor("A", (64, 64))
    with opened():
        s = T.alloc_shared((64, 64), "float32")
        one, two = T.alloc_barrier(1), T.alloc_barrier([1, 1])
        with refused(
            ArgumentError,
            "T.tma_copy: a copy to shared memory needs a barrier, which learns that it is there.",
            "full = T.alloc_barrier(1); T.tma_copy(..., barrier=full).",
        ):
            T.tma_copy(A, s)
        with refused(
            ArgumentError,
            "T.tma_copy: a copy to global memory tells no barrier.",
            "Leave barrier out, and wait with T.tma_store_wait.",
        ):
            T.tma_copy(s, A, barrier=one)
        with refused(
            ShapeError,
            "`two` holds 2 barriers, and the barrier of T.tma_copy must be one.",
            "Write `two[k]`.",
        ):
            T.tma_copy(A, s, barrier=two)
        with refused(
            ArgumentError,
            "T.tma_copy: cluster_mask is 0b11, but the cluster has 1 block.",
            "Bit r stands for the block of rank r: 0b11 for a cluster of two.",
        ):
            T.tma_copy(A, s, barrier=one, cluster_mask=3)
        with refused(ArgumentError, "T.tma_copy: cluster_mask is for copies to shared memory."):
            T.tma_copy(s, A, cluster_mask=1)
        with refused(
            ArgumentTypeError,
            "T.tma_copy: cluster_mask is 'all'; it is an integer known while tracing.",
            "Where the mask differs between blocks, write each copy under its own `if`.",
        ):
            T.tma_copy(A, s, barrier=one, cluster_mask="all")
        with refused(
            UnsupportedError,
            "T.tma_copy: leader_scope_threads=32 is not supported.",
            "Leave leader_scope_threads out.",
        ):
            T.tma_copy(A, s, barrier=one, leader_scope_threads=32)
        with refused(ArgumentError, "T.tma_store_wait: count must not be negative, got -1."):
            T.tma_store_wait(-1)
        with refused(ArgumentTypeError, "T.tma_store_wait: count is 0.5, not an integer."):
            T.tma_store_wait(0.5)


@tilejit
def brought(A: T.Tensor, B: T.Tensor, *, at=0, rows=8, columns=32, dtype="float32"):
    with T.Kernel(1, threads=128):
        s = T.alloc_shared((rows + 8, columns), dtype)
        there = T.alloc_barrier(1)
        T.tma_copy(A[0, 0], s[at : at + rows, :], barrier=there)
        T.tma_copy(s[0:rows, :], B[0, 0], eviction_policy="evict_last")


def test_bulk_copies_that_the_accelerator_cannot_make_say_why():
    brought.compile(single(8, 32), single(8, 32), target=HOPPER)
    cases = [
        ((single(8, 30), single(8, 32)), {},
         "A to s: rows of A do not provably begin at multiples of 16 bytes", "T.tma_copy(A[0, 0]"),
        ((single(8, 32, align=4), single(8, 32)), {},
         "A to s: A does not provably begin at a multiple of 16 bytes", "T.tma_copy(A[0, 0]"),
        ((single(8, 32), single(8, 32)), {"at": 4},
         "A to s: it begins inside 8 rows of s", "T.tma_copy(A[0, 0]"),
        ((single(8, 32), single(8, 32)), {"columns": 3},
         "A to s: a row of 3 float32 is no multiple of 16 bytes", "T.tma_copy(A[0, 0]"),
        ((single(8, 32), half(8, 32)), {},
         "s to B: it converts float32 to float16", "T.tma_copy(s["),
    ]  # fmt: skip
    for arguments, constants, reason, at in cases:
        with wrong(UnsupportedError, f"T.tma_copy cannot bring {reason}.", at):
            brought.compile(*arguments, target=HOPPER, **constants)
    with wrong(
        UnsupportedError,
        "T.tma_copy needs cp.async.bulk.tensor, which sm_86 lacks.",
        "T.tma_copy(A[0, 0]",
    ):
        brought.compile(single(8, 32), single(8, 32), target="sm_86")


def test_tile_that_blocks_cannot_divide_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=128, cluster=4):
            s = T.alloc_shared((8, 32), "float32")
            there = T.alloc_barrier(1)
            T.tma_copy(A, s, barrier=there, cluster_mask=0b1111)

    with wrong(
        UnsupportedError,
        "s cannot be divided among 4 blocks of the cluster.",
        "T.tma_copy(A, s",
    ):
        kernel.compile(single(8, 32), target=HOPPER)


@tilejit
def issued_by(A: T.Tensor, I: T.Tensor, *, where):
    with T.Kernel(1, threads=256):
        s = T.alloc_shared((8, 32), "float32")
        there = T.alloc_barrier(1)
        tx = T.get_thread_binding()
        if where == "nobody":
            if tx < 4:
                if tx > 7:
                    T.tma_copy(A, s, barrier=there)
        elif where == "unknown":
            if I[tx] > 0:
                T.tma_copy(A, s, barrier=there)
        elif where == "all":
            T.tma_copy(A, s, barrier=there)
        elif where == "elected":
            if T.shuffle_elect(128):
                T.tma_copy(A, s, barrier=there)
        elif where == "range":
            if tx >= 64 and tx < 96:
                if I[0] > 0:
                    T.tma_copy(A, s, barrier=there)
        elif where == "one":
            if tx == 65:
                T.tma_copy(A, s, barrier=there)


def test_thread_that_issues_a_copy_must_be_known():
    arguments = single(8, 32), T.Tensor((256,), "int32")
    with wrong(
        TraceError,
        "No thread gets to T.tma_copy: the conditions around it exclude each other.",
        "T.tma_copy(A, s, barrier=there)",
    ):
        issued_by.compile(*arguments, target=HOPPER, where="nobody")
    with wrong(
        TraceError,
        "Which thread is to do T.tma_copy is only known when the kernel runs.",
        "T.tma_copy(A, s, barrier=there)",
        "Put it under a condition on the thread's index alone, such as "
        "`if T.shuffle_elect(128):`, or outside of such conditions.",
    ):
        issued_by.compile(*arguments, target=HOPPER, where="unknown")


@pytest.mark.parametrize(
    "where, conditions",
    [("all", []), ("elected", ["elected", "(tx // 32) == 0"]),
     ("range", ["tx >= 64", "I_at", "tx == 64"]),
     ("one", ["tx == 65"])],
)  # fmt: skip
def test_copy_is_issued_by_the_first_thread_that_gets_there(where, conditions):
    arguments = single(8, 32), T.Tensor((256,), "int32")
    frame = issued_by.compile(*arguments, target=HOPPER, where=where).kernels[0]
    text = str(frame.planned)
    assert (sum(isinstance(n, OneThread) for n in walk(frame.planned.body)) == 1) == (
        not conditions
    )
    before = text[: text.index("T.tma_copy")]
    found = [line.strip() for line in before.splitlines() if "T.If" in line]
    assert len(found) == len(conditions)
    for condition, line in zip(conditions, found, strict=True):
        assert condition in line


# ---- multiplies ---------------------------------------------------------------------------------


def test_waits_that_cannot_be_are_refused():
    with opened():
        with refused(
            ArgumentError,
            "T.wait_wgmma: 8 multiplies; it leaves 0 to 7 of the newest unfinished.",
        ):
            T.wait_wgmma(8)
        with refused(
            ArgumentTypeError, "T.wait_wgmma: the number of multiplies is 1.0, not an integer."
        ):
            T.wait_wgmma(1.0)


def test_started_multiply_is_checked_like_a_plain_one():
    with opened():
        a = T.alloc_shared((64, 32), "float16")
        b = T.alloc_shared((64, 64), "float16")
        c = T.alloc_fragment((64, 64), "float32")
        d = T.alloc_fragment((64, 64), "float16")
        x = T.alloc_shared((64, 64), "bfloat16")
        with refused(
            ShapeError,
            "T.wgmma_gemm: A is 64x32 and B is 64x64, so their K extents (32 and 64) differ.",
            "Give both tiles the same K, or toggle transpose_A (True if A is stored K x M).",
        ):
            T.wgmma_gemm(a, b, c)
        with refused(
            DTypeError,
            "T.wgmma_gemm: nothing multiplies float16 (A) by bfloat16 (B).",
            "Both tiles need the same dtype, one of float16, bfloat16, tfloat32, float32, float64, "
            "int8, uint8, float8_e4m3fn, float8_e5m2; T.copy casts.",
        ):
            T.wgmma_gemm(b, x, d)
        with refused(
            UnsupportedError,
            "T.wgmma_gemm: annotations={} is not supported.",
            "Leave annotations out.",
        ):
            T.wgmma_gemm(b, b, c, annotations={})
        with refused(
            ArgumentTypeError,
            "T.wgmma_gemm: clear_accum is 2; it must be True or False while tracing.",
            "Call T.wgmma_gemm in both arms of `with T.If(condition):`.",
        ):
            T.wgmma_gemm(b, b, c, clear_accum=2)


@tilejit
def multiply(A: T.Tensor, C: T.Tensor, *, case="", M=64, K=64, threads=128, dtype="float16"):
    with T.Kernel(1, threads=threads):
        a = T.alloc_shared((2, M, K), dtype)
        b = T.alloc_shared((K, 64), dtype)
        acc = T.alloc_fragment((M, 64), "float32")
        other = T.alloc_fragment((M, 64), "float32")
        left = T.alloc_fragment((M, K), dtype)
        T.fill(a, 1)
        T.fill(b, 1)
        T.clear(other)
        T.clear(left)
        T.clear(acc)
        T.wgmma_gemm(a[0, :, :], b, acc)
        if case == "read":
            T.copy(acc, C)
        elif case == "cleared":
            T.clear(acc)
        elif case == "waits too little":
            T.wait_wgmma(1)
            acc[0, 0] = 1
        elif case == "one branch":
            if A[0, 0] > 0:
                T.wait_wgmma(0)
            T.copy(acc, C)
        elif case == "next round":
            for _ in range(3):
                for i, j in T.Parallel(M, 64):
                    other[i, j] = acc[i, j]
                T.wgmma_gemm(a[1, :, :], b, acc)
        elif case == "tile":
            T.copy(A, a[0, :, :])
        elif case == "left":
            T.wait_wgmma(0)
            T.wgmma_gemm(left, b, acc)
            T.copy(A, left)
        elif case == "another shape":
            T.gemm(a[0, :, :], b, acc)
        elif case == "fine":
            T.wgmma_gemm(a[1, :, :], b, acc)
            T.wgmma_gemm(a[1, :, :], b, other)
            T.wait_wgmma(1)
            T.copy(A, a[0, :, :])
            for i, j in T.Parallel(M, 64):
                acc[i, j] = acc[i, j] + 1
        T.wait_wgmma(0)
        T.copy(acc, C)


USED = "`acc` is used while a multiply may not be over."


@pytest.mark.parametrize(
    "case, headline, at",
    [
        ("read", USED, "T.copy(acc, C)"),
        ("cleared", USED, "T.clear(acc)"),
        ("waits too little", USED, "acc[0, 0] = 1"),
        ("one branch", USED, "T.copy(acc, C)"),
        ("next round", USED, "other[i, j] = acc[i, j]"),
        ("tile", "`a` is written while a multiply may still read it.", "T.copy(A, a[0, :, :])"),
        ("left", "`left` is used while a multiply may not be over.", "T.copy(A, left)"),
        ("another shape", USED, "T.gemm(a[0, :, :], b, acc)"),
    ],
)
def test_use_before_the_wait_is_refused_at_its_line(case, headline, at):
    with wrong(TraceError, headline, at):
        multiply.compile(half(64, 64), single(64, 64), target=HOPPER, case=case)


def test_waits_know_which_fragments_they_wait_for():
    nodes = nodes_of(multiply, half(64, 64), single(64, 64), case="fine")
    waits = [[b.name for b in n.registers] for n in nodes if isinstance(n, GemmWait)]
    assert waits == [["acc", "other"], ["other"]]
    assert sum(isinstance(n, Gemm) and n.is_async for n in nodes) == 3


def test_multiplies_that_warpgroups_cannot_do_say_why():
    where = "T.wgmma_gemm(a[0, :, :], b, acc)"
    cases = [
        ({"M": 32}, HOPPER, "the tile is 32x64x64, no multiple of 64x8x16"),
        ({"threads": 64}, HOPPER, "64 threads are not whole warpgroups of 128"),
        ({}, "sm_89", "it needs wgmma, which sm_89 lacks"),
        ({"K": 24}, HOPPER, "the tile is 64x64x24, no multiple of 64x8x16"),
        ({"dtype": "float32"}, HOPPER,
         "b is stored with K outermost, which takes 16-bit elements"),
    ]  # fmt: skip
    for constants, target, reason in cases:
        M, K = constants.get("M", 64), constants.get("K", 64)
        headline = f"T.wgmma_gemm: warpgroups cannot multiply these tiles: {reason}."
        with wrong(UnsupportedError, headline, where):
            multiply.compile(half(M, K), single(M, 64), target=target, **constants)


def test_multiply_of_what_a_pipeline_fills_ahead_is_refused():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 64), A.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(4, num_stages=2):
                T.copy(A[k * 64, 0], a)
                T.wgmma_gemm(a, a, acc)
                T.wait_wgmma(0)
            T.copy(acc, C)

    with wrong(
        UnsupportedError,
        "T.wgmma_gemm: warpgroups cannot multiply these tiles: a is filled ahead by T.Pipelined, "
        "where T.gemm waits.",
        "T.wgmma_gemm(a, a, acc)",
    ):
        kernel.compile(half(256, 64), single(64, 64), target=HOPPER)


# ---- barriers -----------------------------------------------------------------------------------


def test_named_barriers_that_cannot_be_are_refused():
    with opened(threads=256):
        tx = T.get_thread_binding()
        for what in (T.sync_threads, T.named_barrier_arrive):
            name = f"T.{what.__name__}"
            with refused(
                ArgumentError,
                f"{name}: there is no barrier 16.",
                "1 to 15; number 0 is that of all threads: T.sync_threads().",
            ):
                what(16, 64)
            with refused(
                ArgumentError,
                f"{name}: there is no barrier 0.",
                "1 to 15; number 0 is that of all threads: T.sync_threads().",
            ):
                what(0, 64)
            with refused(
                ArgumentError,
                f"{name}: which barrier `tx` is cannot be seen.",
                "Compute it from the thread's index or a loop of constant bounds.",
            ):
                what(tx, 64)
            with refused(
                ArgumentError,
                f"{name}: 48 threads; it takes whole warps, up to the block's 256 threads.",
            ):
                what(1, 48)
            with refused(
                ArgumentTypeError,
                f"{name}: the number of threads is 64.0; it is an integer known while tracing.",
            ):
                what(1, 64.0)
            with refused(ArgumentTypeError, f"{name}: the barrier is a float32, not an integer."):
                what(1.5, 64)
        with refused(
            ArgumentError,
            "T.sync_threads: a number of threads needs a barrier of their own.",
            "Write T.sync_threads(1, 64).",
        ):
            T.sync_threads(arrive_count=64)


def test_named_barriers_record_number_and_threads():
    with opened(threads=256) as nodes:
        tx = T.get_thread_binding()
        T.sync_threads(3)
        T.sync_threads(1 + tx // 128, 128)
        T.named_barrier_arrive(2, 96)
    found = [(n.threads, n.is_arrival) for n in nodes if isinstance(n, SyncThreads)]
    assert found == [(256, False), (128, False), (96, True)]


def test_named_barrier_of_a_body_counts_its_threads():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=384):
            with T.ws(1, 2):
                T.sync_threads(4)
            A[T.get_thread_binding()] = 1

    (sync,) = [n for n in nodes_of(kernel, single(384)) if isinstance(n, SyncThreads)]
    assert sync.threads == 256


def test_roles_need_barriers_that_the_kernel_leaves():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=256):
            for k in range(15):
                T.sync_threads(1 + k % 15, 256)
            with T.ws(1):
                A[0] = 1

    with wrong(
        ResourceError,
        "The T.ws bodies need 1 hardware barriers of their own, but the kernel names all but 0 of "
        "the 15 that there are.",
        "with T.ws(1):",
        "Use fewer numbers in T.sync_threads, or T.alloc_barrier.",
    ):
        kernel.compile(single(8), target=HOPPER)


def test_announced_bytes_that_cannot_be_are_refused():
    with opened() as nodes:
        one = T.alloc_barrier(1)
        for call in (T.mbarrier_expect_tx, T.mbarrier_arrive_expect_tx):
            name = f"T.{call.__name__}"
            for count in (0, -4, 2**20):
                headline = f"{name}: {count} bytes; a phase waits for 1 to 1048575."
                with refused(ArgumentError, headline):
                    call(one, count)
            with refused(
                ArgumentTypeError,
                f"{name}: the number of bytes is 1.5; it is an integer known while tracing.",
            ):
                call(one, 1.5)
            call(one, 64)
    assert [(n.bytes, n.arrives) for n in nodes if isinstance(n, BarrierExpect)] == [
        (64, False), (64, True),
    ]  # fmt: skip


def test_arrivals_at_other_blocks_record_their_rank():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=32, cluster=2):
            one = T.alloc_cluster_barrier(2)
            T.mbarrier_arrive(one, cta_id=1)
            T.mbarrier_arrive(one, T.get_thread_binding() % 2)
            T.mbarrier_arrive(one)
            A[0] = 1

    found = [n.cta for n in nodes_of(kernel, single(8)) if isinstance(n, BarrierArrive)]
    assert [cta is None for cta in found] == [False, False, True]


@pytest.mark.parametrize("call", [T.alloc_barrier, T.alloc_cluster_barrier])
def test_barriers_without_arrivals_are_refused(call):
    name = f"T.{call.__name__}"
    with opened():
        with refused(
            ArgumentError,
            f"{name}: the arrive count is 0; a phase takes 1 to 1048575 arrivals.",
            "Count the threads that arrive: 1, or as many as T.Kernel has.",
        ):
            call(0)
        with refused(ArgumentError, f"{name}: the list of arrive counts is empty."):
            call([])


# ---- the order of tiles, T.copy -----------------------------------------------------------------


def test_orders_of_tiles_that_cannot_be_are_refused():
    with opened():
        with refused(ArgumentError, "T.use_swizzle: order is 'mlx'.", 'It is "row" or "column".'):
            T.use_swizzle(4, order="mlx")
        with refused(ArgumentError, "T.use_swizzle: panel_size must be positive, got 0."):
            T.use_swizzle(0)
        with refused(ArgumentTypeError, "T.use_swizzle: panel_size is 2.5, not an integer."):
            T.use_swizzle(2.5)
        T.use_swizzle(4, enable=False)
        T.use_swizzle(4)
        with refused(ArgumentError, "T.use_swizzle is called twice in a kernel."):
            T.use_swizzle(2)

    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, threads=32) as b:
            T.use_swizzle(2)
            A[b] = 1

    with wrong(
        ArgumentError,
        "T.use_swizzle: the grid has one dimension, so tiles have one order.",
        "T.use_swizzle(2)",
        "Give T.Kernel the tiles along x and y.",
    ):
        kernel.compile(single(8), target=HOPPER)


@tilejit
def prefers_tma(A: T.Tensor, C: T.Tensor, *, dtype="float32", to="shared"):
    with T.Kernel(1, threads=128):
        s = T.alloc_shared((8, 32), dtype)
        f = T.alloc_fragment((8, 32), dtype)
        T.copy(A, s if to == "shared" else f, prefer_instruction="tma")
        T.copy(s if to == "shared" else f, C)


def test_preference_for_tma_is_met_or_refused_with_the_reason():
    kernel = prefers_tma.compile(single(8, 32), single(8, 32), target=HOPPER)
    assert any(isinstance(n, Copy) and n.is_tma for n in walk(kernel.kernels[0].planned.body))
    hint = "Leave prefer_instruction out: T.copy then chooses."
    cases = [
        (single(8, 30), HOPPER, {}, "the source"),
        (half(8, 32), HOPPER, {}, "it converts float16 to float32"),
        (single(8, 32), HOPPER, {"to": "fragment"},
         "it moves boxes between global and shared memory only"),
        (single(8, 32), "sm_80", {}, "it needs cp.async.bulk.tensor, which sm_80 lacks"),
        (single(8, 32, align=4), HOPPER, {},
         "A does not provably begin at a multiple of 16 bytes"),
    ]  # fmt: skip
    for a, target, constants, reason in cases[1:]:
        headline = f'T.copy: prefer_instruction="tma" is not possible: {reason}.'
        with wrong(UnsupportedError, headline, 'prefer_instruction="tma")', hint):
            prefers_tma.compile(a, single(8, 32), target=target, **constants)


def test_policy_of_the_cache_that_is_not_used_is_told():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, *, prefer=None):
        with T.Kernel(1, threads=128):
            s = T.alloc_shared((8, 32), A.dtype)
            T.copy(A, s, eviction_policy="evict_first", prefer_instruction=prefer)
            T.copy(s, C)

    arguments = single(8, 32), single(8, 32)
    text = kernel.compile(*arguments, target=HOPPER).explain()
    assert "copy A -> s: eviction_policy is not used by registers" in text
    made = kernel.compile(*arguments, target=HOPPER, prefer="tma")
    assert "eviction_policy" not in made.explain()
    assert "L2::cache_hint" in made.ptx


def test_nodes_of_a_hand_written_kernel_print_as_they_are_written():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(2, threads=256, cluster=2):
            s = T.alloc_shared((16, 32), A.dtype)
            there = T.alloc_cluster_barrier(1)
            with T.ws(1):
                if T.shuffle_elect(128):
                    T.tma_copy(A, s, barrier=there, cluster_mask=0b11)
                    T.mbarrier_arrive(there)
            with T.ws(0):
                T.mbarrier_wait_parity(there, 0)
                T.tma_copy(s, C, eviction_policy="evict_first")
                T.sync_threads(2, 128)
            T.cluster_sync()

    nodes = nodes_of(kernel, single(16, 32), single(16, 32))
    assert sum(isinstance(n, Elect) for n in nodes) == 1
    assert sum(isinstance(n, Control) for n in nodes) == 2
    text = str(kernel.compile(single(16, 32), single(16, 32), target=HOPPER).graph)
    for line in (
        "with T.ws(1):  # threads 128 to 255",
        "elected = T.shuffle_elect(128)",
        "T.tma_copy(A, s, barrier=there[0], cluster_mask=0b11)",
        "with T.ws(0):  # threads 0 to 127",
        "T.tma_copy(s, C, eviction_policy='evict_first')",
        "T.sync_threads(2, 128)",
        "T.cluster_arrive()",
    ):
        assert line in text, text
