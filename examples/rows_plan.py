"""How `rows.py` divides rows among blocks and threads, by their length: what was fastest of many
ways that were timed on an H100.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import tilejit.language as T

MULTIPROCESSORS = 132  # of an H100 or H200: how many blocks go through the rows of a gradient
MOST = 262_144  # elements of a row
VECTOR = 8  # elements of 16 bits that a thread reads or writes at once
WARP = 32
FORWARD, BACKWARD = 256, 64  # elements from which on odd rows are taken in whole vectors
LARGEST = 16  # blocks of a cluster


@dataclass(frozen=True)
class Plan:
    """How rows are divided: BM of them in a block, or one among `blocks` blocks.

    resident: blocks of a multiprocessor at once. stages: rows that are brought or computed at a
    time; 0 for blocks that have one group of rows each. kept: how many of W and B stay in shared
    memory for all rows of a block; the others come from L2 for each. turns: clusters for each that
    runs at once: multiprocessors are not equally fast, and who is done first takes the next.
    is_free: clusters stay, and each takes the next row when it is free.
    """

    BM: int
    threads: int
    blocks: int
    resident: int
    stages: int = 0
    kept: int = 0
    turns: int = 1
    is_free: bool = False

    @property
    def workers(self):
        """Clusters that go through the rows, `turns` for each that runs at once."""
        return self.turns * self.at_once

    @property
    def at_once(self):
        """Clusters of blocks that run at once; of wide ones fewer, for their blocks have to be
        neighbours."""
        at_once = max(1, MULTIPROCESSORS * self.resident // self.blocks)
        if self.blocks <= 2:
            return at_once
        share = 0.08 if self.blocks == 8 and self.resident < 4 else 0.125
        return at_once - max(1, round(share * at_once))

    @property
    def options(self):
        options = asdict(self) | {"workers": self.workers if self.stages else 0}
        del options["turns"], options["is_free"]
        return {name: value for name, value in options.items() if name != "kept" or value}


def rows_for(N):
    """Rows of a block of at most 8192 elements."""
    return most_rows(N, 8192)


def forward_plan(N, name):
    """32 elements a thread and 1024 threads a multiprocessor: enough bytes on their way; of long
    rows 64 and 512. Of the longest, whose weights would come from L2 for each row anew, the next
    rows are brought meanwhile, and weights stay."""
    assert N <= MOST, f"rows of {N} elements are too long"
    if is_unaligned(N, N, FORWARD):
        return unaligned_forward_plan(N, name)
    has_masks = N & N - 1 != 0  # which take registers
    if N <= 8192:
        resident = 4 if name == "softmax" or not has_masks else 3 if N % VECTOR == 0 else 2
        return Plan(rows_for(N), 256, 1, resident)
    if name == "softmax":
        blocks = cluster_for(N, 8192 if N <= 65536 else 16384)
        if N > 65536:
            return Plan(1, fitted(N, blocks, (7, 8), 320, slack=1.0), blocks, 3)
        vectors, resident = ((3, 4), 5 - has_masks) if N > 16384 else ((2, 3, 4), 4)
        return Plan(1, fitted(N, blocks, vectors, 256), blocks, resident)
    if N <= 16384 or (N < 32768 and name == "rms_norm"):
        blocks = cluster_for(N, 16384)
        return Plan(1, fitted(N, blocks, (5, 6, 7, 8), 256), blocks, 2)
    if N <= 32768:
        threads = fitted(N, 1, (4, 5, 6), 640) if N < 32768 else 512
        return Plan(1, threads, 1, 1, stages=2, kept=1, is_free=True)
    kept = 2 if name == "layer_norm" and N > 65536 else 1  # in the place of a row
    blocks = cluster_for(N, 16384)
    resident = 32768 * blocks // N
    threads = fitted(N, blocks, (5, 6, 7, 8), 192 if resident > 2 else 256)
    resident = max(1, min(resident, 768 // threads))
    return Plan(1, threads, blocks, resident, stages=3 - kept, kept=kept, is_free=True)


def backward_plan(N, name):
    """16 elements a thread, of the longest rows 32: there are two tensors to read, and sums over
    rows to keep, of LayerNorm two."""
    assert N <= MOST, f"rows of {N} elements are too long"
    if is_unaligned(N, N, BACKWARD):
        return unaligned_backward_plan(N, name)
    has_masks, is_double = N & N - 1 != 0, name == "layer_norm"
    if N > 4096 and has_masks:
        return uneven_backward_plan(N, is_double)
    if is_double:
        if N <= 2048:
            return Plan(max(1, rows_for(N) // 4), 128, 1, 4, stages=3)
        if N <= 16384:
            return Plan(rows_for(N), 512, cluster_for(N, 8192), 1, stages=3)
        return Plan(1, 512, cluster_for(N, 16384), 1, stages=3)
    if N > 65536:
        return Plan(1, 1024 if name == "softmax" else 512, cluster_for(N, 16384), 1, stages=2)
    if N > 4096:
        return Plan(1, 512, cluster_for(N, 8192), 2, stages=2)
    if N > 2048:
        return Plan(1, 256, 1, 4, stages=2)
    if name == "softmax":
        return Plan(rows_for(N), 512, 1, 2, stages=2)
    return Plan(max(1, rows_for(N) // 4), 128, 1, 4, stages=2)


def uneven_backward_plan(N, is_double):
    """Of other widths than powers of two; is_double: there are two sums over rows. Up to 32,768
    columns there are about so many elements of all rows on a multiprocessor: with more the rings
    take the L1 cache's place, with fewer memory waits."""
    stages = 3 if is_double else 2
    if N <= 8192:
        return Plan(1, fitted(N, 1, (1, 2), 512), 1, 1 if is_double else 2, stages=stages)
    if N <= 32768:
        blocks = cluster_for(N, 4096)
        resident = (8192 if is_double else 11264) * blocks // N
        return Plan(1, fitted(N, blocks, (2, 3), 192), blocks, resident, stages=stages)
    if is_double and N <= 131072:
        blocks = cluster_for(N, 12800)
        vectors = (2,) if blocks * 8192 < N else (3, 4)
        return Plan(1, fitted(N, blocks, vectors, 256), blocks, 1, stages=stages)
    if N <= 65536:
        blocks = cluster_for(N, 8192)
        return Plan(1, fitted(N, blocks, (3, 4), 256), blocks, 2, stages=stages)
    blocks = cluster_for(N, 16384)
    vectors = (2,) if is_double else (3, 4)
    stages = 3 if is_double or 11264 * blocks >= N else 2
    return Plan(1, fitted(N, blocks, vectors, 512), blocks, 1, stages=stages)


def unaligned_forward_plan(N, name):
    """Of rows that begin amid vectors: many small blocks, which hide what masks cost; of long rows,
    whose weights would come from L2, fewer, and weights stay."""
    width, is_double = columns_of(N), name == "layer_norm"
    if N <= 4096:
        return Plan(most_rows(N, 4096), 128, 1, 5 if is_double else 6)
    blocks = cluster_for(width, 6400)
    if name == "softmax" and N > LARGEST * 6400:
        is_longest = N > LARGEST * 12800
        vectors = (5, 6) if is_longest else (3, 4, 5)
        threads = fitted(width, blocks, vectors, 160, slack=1.08)
        return Plan(1, threads, blocks, 2 if is_longest or threads > 320 else 3)
    if name == "softmax" or (N <= 65536 and not is_double) or N <= 8192:
        vectors = (3, 4, 5) if is_double else (3, 4, 5, 6)
        threads = fitted(width, blocks, vectors, 128 if N <= 8192 else 160)
        return Plan(1, threads, blocks, max(2, 704 // threads))
    if N <= 65536:
        threads = fitted(width, blocks, (3, 4, 5), 160)
        return Plan(1, threads, blocks, max(2, 704 // threads), stages=2, kept=2, turns=16)
    blocks = cluster_for(width, 25600 if is_double else 19200)
    if is_double:
        threads = fitted(width, blocks, (6,) if blocks == LARGEST else (5,), 384)
        resident = 2 if threads <= 320 and blocks < LARGEST else 1
        return Plan(1, threads, blocks, resident, stages=2, kept=2, turns=4)
    threads = fitted(width, blocks, (5,), 384)
    return Plan(1, threads, blocks, 2 if threads <= 416 else 1, stages=2, kept=1)


def unaligned_backward_plan(N, name):
    """The same of gradients."""
    width, is_double = columns_of(N), name == "layer_norm"
    if N <= 2730:
        return Plan(min(most_rows(N, 2730), 32 if name == "softmax" else 16), 128, 1, 4, stages=2)
    if name == "rms_norm" and 8192 < N <= 12800:
        return Plan(1, fitted(width, 1, (5,), 320), 1, 1, stages=2, turns=2)
    if N <= 32768:
        blocks = cluster_for(width, 6400 if name == "softmax" else 5120)
        threads = fitted(width, blocks, (2,), 320)
        return Plan(1, threads, blocks, max(2, 704 // threads), stages=2)
    blocks = cluster_for(width, 12800 if name == "softmax" else 6400)
    threads = T.ceildiv(width, blocks * 2 * VECTOR * WARP) * WARP
    if name == "softmax":
        if threads > 1024:
            threads = fitted(width, blocks, (3,), 704)
        return Plan(1, threads, blocks, 1, stages=3 if blocks == LARGEST else 2)
    if threads > 640:
        threads = fitted(width, blocks, (5, 6) if is_double else (5,), 384)
        return Plan(1, threads, blocks, 1, stages=2)
    resident = 1 if is_double and threads > 416 else 2
    return Plan(1, threads, blocks, resident, stages=3 if is_double else 2)


def most_rows(N, most):
    """Rows of a block, a power of two, such that it has at most so many elements."""
    return 1 << max(1, most // N).bit_length() - 1


def fitted(N, blocks, vectors, about, slack=1.05):
    """Threads of a block that has a share of a row, about so many, each with one of those numbers
    of vectors: such that not many more have nothing to do (`slack` times the fewest columns)."""

    def threads(count):
        return T.ceildiv(N, blocks * count * VECTOR * WARP) * WARP

    least = min(threads(n) * n for n in vectors)
    good = [threads(n) for n in vectors if threads(n) * n <= slack * least]
    return min(good, key=lambda n: (abs(n - about), n))


def cluster_for(N, most):
    """Blocks of a cluster, a power of two, such that each has at most so many columns."""
    blocks = 1
    while blocks * most < N and blocks < LARGEST:
        blocks *= 2
    return blocks


def part_of(N, blocks, threads, is_free=False):
    """Columns of a row that each block of a cluster takes: whole vectors of 16 bytes. Where few are
    too many, as many for each thread: then masks are only where memory is read and written.
    is_free: warps bring a piece each, which is so always."""
    share, unit = T.ceildiv(N, blocks), VECTOR * threads
    whole = T.ceildiv(share, unit) * unit
    if is_free or 6 * whole <= 7 * share:
        return whole
    return N if blocks == 1 else T.ceildiv(share, VECTOR) * VECTOR


def is_unaligned(N, pitch, least):
    """Whether rows begin amid vectors; not of fewer elements than `least`, of which vectors would
    have too much of others'."""
    return least <= N and pitch % VECTOR != 0


def columns_of(N):
    """Columns of the vectors that have any element of a row: one that is no whole number of them
    long may begin at any place of one."""
    return N if N % VECTOR == 0 else T.ceildiv(N + VECTOR - 1, VECTOR) * VECTOR


def alike(N, BM):
    """Of how many workers there must be a multiple, so that in each place of BM rows all rows of
    one begin at the same place of a vector."""
    return VECTOR // math.gcd(VECTOR, N * BM)


def chosen(plan, N, more, is_alike=True):
    """The options of a plan for rows of N elements, with others in place of some. is_alike: rows of
    a worker begin alike; so there are some workers less, or else more, in turns."""
    knobs = plan.options | more
    if plan.stages and is_alike:
        workers, step = knobs["workers"], alike(N, plan.BM)
        fewer = workers // step * step
        knobs["workers"] = fewer if fewer >= 0.95 * workers else math.lcm(workers, step)
    return knobs
