"""A Hopper matmul with everything written by hand that the compiler does for ten plain lines:
python examples/manual_matmul.py

The kernel is persistent: a fixed number of blocks computes tile after tile. A block has three
warpgroups. The last one is the producer: one thread of it brings tiles of A and B to a ring of
slots in shared memory, as fast as slots become free. The other two multiply what is there, each 64
rows of the tile, and send the product to C through strips of shared memory while the next tile
arrives.

    full[s]   the tiles of slot s are there: one arrival, of the thread that brings them, and as
              many bytes as T.tma_copy announces
    empty[s]  slot s may be filled again: one arrival a warpgroup, of every block that fills it

A phase of a barrier completes when all have arrived; its parity is 0 for the first, 1 for the
second, and so on in turn. The n-th use of the ring is slot n % stages in round n // stages. A fresh
barrier is taken to have completed a phase of parity 1, so the producer's first wait for each slot
does not block.

With cluster=2 two blocks work on tiles below each other, which need the same tile of B: each brings
half of it and hands it to both. Their slots are then free only when both have used them.

With late=True a slot is left one multiply later: the next one has then been started already, and
the tensor cores need not wait for it. It pays where tiles are small.
"""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np

import tilejit
import tilejit.language as T
from tilejit import tilejit as kernel

GROUP = 128  # threads of a warpgroup
ROWS = 64  # of the tile that one warpgroup multiplies


@kernel
def matmul(
    A: T.Tensor,
    B: T.Tensor,
    C: T.Tensor,
    *,
    BN=256,
    BK=64,
    stages=3,
    cluster=1,
    blocks=132,
    late=False,
    W=64,
):
    M, K = A.shape
    N = C.shape[1]
    BM = 2 * ROWS
    across, down = T.ceildiv(N, BN), T.ceildiv(M, BM * cluster)  # what a cluster computes at once
    steps = T.ceildiv(K, BK)
    with T.Kernel(blocks, threads=3 * GROUP, cluster=cluster) as block:
        a = T.alloc_shared((stages, BM, BK), A.dtype)
        b = T.alloc_shared((stages, BK, BN), B.dtype)
        strip = T.alloc_shared((2, BM, W), C.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        full = T.alloc_cluster_barrier([1] * stages)
        empty = T.alloc_cluster_barrier([2 * cluster] * stages)
        tx = T.get_thread_binding()
        rank = T.block_rank_in_cluster()
        first, together = block // cluster, blocks // cluster
        visits = T.ceildiv(across * down - first, together)  # tiles of this block

        with T.ws(2):  # the producer
            T.annotate_producer_reg_dealloc(40)
            if T.shuffle_elect(GROUP):
                for visit in range(visits):
                    tile = first + visit * together
                    row, column = (tile // across * cluster + rank) * BM, tile % across * BN
                    for k in range(steps):
                        n = visit * steps + k
                        slot = n % stages
                        T.mbarrier_wait_parity(empty[slot], ((n // stages) & 1) ^ 1)
                        T.tma_copy(A[row, k * BK], a[slot, :, :], barrier=full[slot])
                        everyone = (1 << cluster) - 1
                        T.tma_copy(
                            B[k * BK, column], b[slot, :, :], barrier=full[slot],
                            cluster_mask=everyone,
                        )  # fmt: skip
                        T.mbarrier_arrive(full[slot])

        with T.ws(0, 1):  # the consumers
            T.annotate_consumer_reg_alloc(232)
            group, lane = tx // GROUP, tx % GROUP

            @T.macro
            def leave(n):
                if lane < cluster:  # one thread for each block that fills the slot
                    where = lane if cluster > 1 else None
                    T.mbarrier_arrive(empty[n % stages], cta_id=where)

            for visit in range(visits):
                tile = first + visit * together
                row, column = (tile // across * cluster + rank) * BM, tile % across * BN
                T.clear(acc)
                for k in range(steps):
                    n = visit * steps + k
                    slot = n % stages
                    T.mbarrier_wait_parity(full[slot], (n // stages) & 1)
                    T.wgmma_gemm(a[slot, :, :], b[slot, :, :], acc)
                    if late:
                        T.wait_wgmma(1)  # the multiply before is over
                        if k > 0:
                            leave(n - 1)
                    else:
                        T.wait_wgmma(0)
                        leave(n)
                if late:
                    T.wait_wgmma(0)
                    leave((visit + 1) * steps - 1)
                # Strip after strip: registers, shared memory, C. A warpgroup writes its 64 rows of
                # one strip while those of the other are on their way; there is an even number.
                for j in T.unroll(BN // W):
                    T.copy(acc[:, j * W : (j + 1) * W], strip[j % 2, :, :])
                    T.fence_proxy_async()  # what is written is there for the copy below
                    T.tma_store_wait(0)  # the strip before has been read
                    T.sync_threads(1 + group, GROUP)  # all of the warpgroup know both
                    if T.shuffle_elect(GROUP):
                        T.tma_copy(
                            strip[j % 2, group * ROWS : (group + 1) * ROWS, :],
                            C[row + group * ROWS, column + j * W],
                        )
            T.tma_store_wait(0)  # shared memory must last until it has been read

        if cluster > 1:
            T.cluster_sync()  # and until the other block sends nothing more


def main(sizes=((256, 192, 200), (300, 136, 64))) -> None:
    """Check products on the GPU, or where there is none on the simulator, in small tiles."""
    small = {} if tilejit.has_gpu() else {"BN": 128, "blocks": 2}
    where = contextlib.nullcontext()
    if not tilejit.has_gpu():
        where = tilejit.options(simulate=True, target="sm_90a")
    rng = np.random.default_rng(0)
    with where:
        for M, N, K in sizes:
            a = rng.standard_normal((M, K)).astype(ml_dtypes.bfloat16)
            b = rng.standard_normal((K, N)).astype(ml_dtypes.bfloat16)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            bound = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
            for cluster in (1, 2):
                c = np.full((M, N), np.nan, ml_dtypes.bfloat16)
                matmul(a, b, c, cluster=cluster, **small)
                error = np.abs(c.astype(np.float64) - exact)
                wrong = ~(error <= 2.0**-8 * np.abs(exact) + 2.0**-22 * K * bound)
                assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements are wrong"
            print(f"{M}x{N}x{K} bfloat16 by hand is right, on {tilejit.device_name()}")


if __name__ == "__main__":
    main()
