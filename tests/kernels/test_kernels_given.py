"""Ten plain lines with a choice by hand: clusters, the order of tiles, registers, instructions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import assert_near, assert_product, operand

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ResourceError, UnsupportedError

BF16 = ml_dtypes.bfloat16
HOPPER = "sm_90a"


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    BM=64, BN=64, BK=64, stages=3, threads=128, cluster=None, panel=0, order="row", up=0, down=0,
    keep=False, prefer=None, prefer_out=None, disable_tma=False, evict=None, bias=False,
):  # fmt: skip
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads, cluster=cluster) as (bx, by):
        if panel:
            T.use_swizzle(panel, order)
        if up:
            T.annotate_consumer_reg_alloc(up)
        if down:
            T.annotate_producer_reg_dealloc(down)
        if keep:
            T.disable_warp_group_reg_alloc()
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
            T.copy(
                A[by * BM, k * BK], a,
                prefer_instruction=prefer, disable_tma=disable_tma, eviction_policy=evict,
            )  # fmt: skip
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
            if bias:
                for i, j in T.Parallel(BM, BN):
                    acc[i, j] = acc[i, j] + a[i, 0]
        T.copy(acc, C[by * BM, bx * BN], prefer_instruction=prefer_out)


def check(run, rng, size, **constants):
    M, N, K = size
    a, b = operand(rng, (M, K), np.float16), operand(rng, (K, N), np.float16)
    c = run(matmul, a, b, out=[((M, N), "float32")], **constants)
    assert_product(c, a, b)


def compiled(size=(256, 384, 128), **constants):
    M, N, K = size
    half = [T.Tensor(shape, "float16") for shape in ((M, K), (K, N))]
    return matmul.compile(*half, T.Tensor((M, N), "float32"), target=HOPPER, **constants)


# ---- clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cluster, size, multicast, words",
    [
        (2, (256, 384, 128), True, "clusters of 2 blocks along x share what they read"),
        ((1, 2), (256, 384, 128), True, "clusters of 2 blocks along y share what they read"),
        ((1, 4), (250, 100, 72), True, "clusters of 4 blocks along y share what they read"),
        (1, (256, 384, 128), False, "each block computes tiles"),
    ],
)
def test_cluster_by_hand_is_what_blocks_share_along(hopper, rng, cluster, size, multicast, words):
    check(hopper, rng, size, cluster=cluster, BN=128 if cluster == (1, 4) else 64)
    BN = 128 if cluster == (1, 4) else 64
    kernel = compiled((256, 384, 128), cluster=cluster, BN=BN)
    assert words in kernel.explain()
    assert (".multicast::cluster" in kernel.ptx) == multicast


def test_cluster_along_two_axes_is_refused_where_passes_bring_the_tiles():
    with pytest.raises(UnsupportedError) as caught:
        compiled(cluster=(2, 2))
    assert caught.value.headline == (
        "T.Kernel: in a cluster of 2x2x1 blocks the compiler's own producers cannot share tiles."
    )
    assert caught.value.notes == ("They share along one axis of the grid.",)


def test_cluster_is_refused_where_threads_read_what_is_shared():
    with pytest.raises(UnsupportedError) as caught:
        compiled(cluster=2, bias=True)
    assert caught.value.headline == (
        "T.Kernel: blocks of a cluster of 2x1x1 cannot share the tiles that producers bring: more "
        "than T.gemm reads them."
    )


@tilejit
def counted(A: T.Tensor, B: T.Tensor, C: T.Tensor, counts: T.Tensor, *, cluster, by_block=True):
    """Each row of tiles is multiplied along as much of K as a tensor says."""
    with T.Kernel(C.shape[1] // 64, C.shape[0] // 64, threads=128, cluster=cluster) as (bx, by):
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(counts[by if by_block else 1], num_stages=2):
            T.copy(A[by * 64, k * 64], a)
            T.copy(B[k * 64, bx * 64], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64, bx * 64])


def test_cluster_is_refused_where_its_blocks_copy_unequally_often(hopper, rng):
    square, counts = T.Tensor((256, 256), "bfloat16"), T.Tensor((4,), "int32")
    arguments = square, square, T.Tensor((256, 256), "float32"), counts
    with pytest.raises(UnsupportedError) as caught:
        counted.compile(*arguments, cluster=(1, 2), target="sm_90a")
    assert caught.value.headline == (
        "T.Kernel: blocks of a cluster of 1x2x1 cannot share the tiles that producers bring: each "
        "has its own number of copies of A."
    )
    a, b = (rng.standard_normal((256, 256)).astype(BF16) for _ in range(2))
    numbers = np.array([1, 3, 0, 4], np.int32)
    for by_block, cluster, lengths in ((True, (2, 1), numbers), (False, (1, 2), [3] * 4)):
        options = {"by_block": by_block, "cluster": cluster}
        c = hopper(
            lambda a, b, n, c, **rest: counted(a, b, c, n, **rest),
            a, b, numbers, out=[((256, 256), np.float32)], **options,
        )  # fmt: skip
        for by, length in enumerate(lengths):
            rows, depth = slice(by * 64, by * 64 + 64), length * 64
            exact = a[rows, :depth].astype(np.float64) @ b[:depth].astype(np.float64)
            assert_near(c[rows], exact, 1e-3)
        text = counted.compile(*arguments, target="sm_90a", **options).explain()
        assert "clusters of 2 blocks" in text


def test_cluster_of_a_kernel_that_passes_leave_alone_is_launched_so(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(4, 2, threads=64, cluster=(2, 2)) as (bx, by):
            for i in T.Parallel(64):
                C[by, bx * 64 + i] = A[by, bx * 64 + i] + T.block_rank_in_cluster()

    a = rng.standard_normal((2, 256)).astype(np.float32)
    by, bx = np.indices((2, 4))
    ranks = np.repeat(bx % 2 + by % 2 * 2, 64, axis=1).astype(np.float32)
    assert (hopper(kernel, a, out=[((2, 256), np.float32)]) == a + ranks).all()
    ptx = kernel.compile(a, a, target=HOPPER).ptx
    assert ".reqnctapercluster 2, 2" in ptx


# ---- the order of tiles -------------------------------------------------------------------------


@pytest.mark.parametrize("panel, order", [(1, "row"), (2, "row"), (3, "row"), (10, "row"),
                                          (1, "column"), (2, "column"), (5, "column")])  # fmt: skip
def test_tiles_in_panels_are_all_computed(run, rng, panel, order):
    check(run, rng, (300, 200, 40), panel=panel, order=order, BK=32)


@pytest.mark.parametrize("cluster", [None, 2, (1, 2)])
@pytest.mark.parametrize("panel, order", [(2, "row"), (3, "column"), (4, "row"), (2, "column")])
def test_tiles_in_panels_are_all_computed_on_hopper(hopper, rng, panel, order, cluster):
    check(hopper, rng, (256, 384, 72), panel=panel, order=order, cluster=cluster)
    text = compiled(panel=panel, order=order, cluster=cluster).explain()
    assert f"in panels of {panel} {order}s, as asked" in text


@tilejit
def places(C: T.Tensor, *, panel, order, cluster=None):
    """Which tile the block of each number computes."""
    with T.Kernel(C.shape[1], C.shape[0], threads=32, cluster=cluster) as (bx, by):
        T.use_swizzle(panel, order)
        if T.get_thread_binding() == 0:
            C[by, bx] = T.get_block_binding(0) + 100 * T.get_block_binding(1)


@pytest.mark.parametrize("order", ["row", "column"])
def test_panels_are_walked_across_their_width_first(order):
    kernel = places.compile(T.Tensor((4, 6), "int32"), target=HOPPER, panel=2, order=order)
    text = str(kernel.kernels[0].planned)
    assert f"tiles are computed in panels of 2 {order}s" in kernel.explain()
    tile = "block_x + (block_y * 6)"
    assert f"tile = {tile}" in text
    if order == "row":  # 12 tiles a panel of two rows; the row changes fastest
        assert "bx = (tile % 12) // 2" in text
        assert "by = ((tile // 12) * 2) + ((tile % 12) % 2)" in text
    else:
        assert "by = (tile % 8) // 2" in text
        assert "bx = ((tile // 8) * 2) + ((tile % 8) % 2)" in text


@pytest.mark.parametrize("cluster", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("order", ["row", "column"])
def test_blocks_of_a_cluster_stay_neighbours_in_panels(hopper, order, cluster):
    c = hopper(places, out=[((4, 6), np.int32)], panel=2, order=order, cluster=cluster)
    by, bx = np.indices((4, 6))
    assert (c == bx + 100 * by).all()


# ---- registers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constants, words",
    [
        ({}, "registers: 232 a consumer thread, 40 a producer thread"),
        ({"up": 240, "down": 24}, "registers: 240 a consumer thread, 24 a producer thread"),
        ({"up": 240}, "registers: 240 a consumer thread, 24 a producer thread"),
        ({"up": 200}, "registers: 200 a consumer thread, 40 a producer thread"),
        ({"down": 24}, "registers: 240 a consumer thread, 24 a producer thread"),
        ({"down": 56}, "registers: 224 a consumer thread, 56 a producer thread"),
    ],
)
def test_registers_by_hand_are_what_passes_use(hopper, rng, constants, words):
    check(hopper, rng, (128, 64, 72), BM=128, threads=256, **constants)
    kernel = compiled(BM=128, threads=256, **constants)
    assert words in kernel.explain()
    up, down = (int(w) for w in words.split() if w.isdigit())
    assert f"setmaxnreg.inc.sync.aligned.u32 {up};" in kernel.ptx
    assert f"setmaxnreg.dec.sync.aligned.u32 {down};" in kernel.ptx


def test_registers_are_kept_when_asked():
    kernel = compiled(BM=128, threads=256, keep=True)
    assert "setmaxnreg" not in kernel.ptx
    assert "registers:" not in kernel.explain()


@pytest.mark.parametrize("constants", [{"up": 248}, {"up": 240, "down": 56}, {"up": 256}])
def test_registers_beyond_those_of_a_block_are_refused(constants):
    with pytest.raises(ResourceError) as caught:
        compiled(BM=128, threads=256, **constants)
    assert "64512 that a block of 384 threads starts with" in caught.value.headline
    assert caught.value.span is not None


def test_registers_that_no_producer_gives_are_told():
    text = matmul.compile(
        *(T.Tensor((128, 128), "float16"),) * 2, T.Tensor((128, 128), "float32"),
        target="sm_80", up=240,
    ).explain()  # fmt: skip
    assert "registers stay as they are: the block has no producers" in text


# ---- instructions -------------------------------------------------------------------------------


def test_instruction_of_a_copy_in_a_pipeline_by_hand(hopper, rng):
    for constants in (
        {"prefer": "tma"}, {"disable_tma": True}, {"prefer": "cp_async"}, {"prefer": "sync"},
        {"prefer_out": "tma"}, {"evict": "evict_first"},
    ):  # fmt: skip
        check(hopper, rng, (128, 64, 72), **constants)
    assert "cp.async.bulk.tensor" in compiled(prefer="tma").ptx
    assert "cp.async.bulk.tensor" not in compiled(disable_tma=True).ptx
    text = compiled(disable_tma=True).explain()
    assert "copy A -> a: cp.async, not TMA (disable_tma is set)" in text
    assert "L2::cache_hint" in compiled(evict="evict_last").ptx
    assert "L2::cache_hint" not in compiled(evict="evict_normal").ptx


def test_preferred_instruction_that_producers_cannot_use_is_refused():
    half, ragged = T.Tensor((128, 128), "float16"), T.Tensor((128, 101), "float16")
    for arguments, constants, reason in (
        ((ragged, T.Tensor((101, 128), "float16"), T.Tensor((128, 128), "float32")),
         {"prefer": "tma"}, "rows of A do not provably begin at multiples of 16 bytes"),
        ((half, T.Tensor((128, 101), "float16"), T.Tensor((128, 101), "float32")),
         {"prefer_out": "tma"}, "it moves boxes between global and shared memory only"),
        ((half, half, T.StridedTensor((128, 128), (130, 1), "float32")),
         {"prefer_out": "tma"}, "rows of C do not provably begin at multiples of 16 bytes"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError) as caught:
            matmul.compile(*arguments, target=HOPPER, **constants)
        assert caught.value.headline == (
            f'T.copy: prefer_instruction="tma" is not possible: {reason}.'
        )


# ---- dependent launches -------------------------------------------------------------------------


def test_dependent_kernels_give_the_same_numbers(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(8, threads=128) as b:
            for i in T.Parallel(128):
                B[b * 128 + i] = A[b * 128 + i] + 1
            T.pdl_trigger()
        with T.Kernel(8, threads=128) as b:
            T.pdl_sync()
            for i in T.Parallel(128):
                C[b * 128 + i] = B[1023 - (b * 128 + i)] * 2

    a = rng.standard_normal(1024).astype(np.float32)
    b, c = hopper(kernel, a, out=[((1024,), np.float32)] * 2)
    assert (b == a + 1).all() and (c == (a + 1)[::-1] * 2).all()
    first, second = kernel.compile(a, a, a, target=HOPPER).kernels
    assert "griddepcontrol.launch_dependents" in first.ptx
    assert "griddepcontrol.wait" in second.ptx
    assert "ld.global.nc" not in second.ptx  # the kernel before may still be writing
