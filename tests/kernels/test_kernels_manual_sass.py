"""The same kernel written by hand and by the passes: the same count of each instruction of the
tensor cores, the tensor memory accelerator and barriers; no spills, nothing serialised."""

from __future__ import annotations

import collections
import re

import pytest
from disassembler import has_disassembler
from test_kernels_manual import example, one_warp_arrives, ping_pong, ring, shared_tile
from test_kernels_manual import through_strips as strips

import tilejit.language as T
from tilejit import tilejit

HOPPER = "sm_90a"
SQUARE = T.Tensor((2048, 2048), "bfloat16")  # a tile or two a block: results leave with their tile
# Multiplies; bulk copies, their groups and maps; mbarriers, hardware barriers, those of clusters;
# fences; registers.
COUNTED = re.compile(
    r"HGMMA|WARPGROUP|WARPSYNC|UTMA\w+|SYNCS|BAR|DEPBAR|UCGABAR\w*|FENCE|MEMBAR|USETMAXREG|ELECT"
)


@tilejit
def plain(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=128, BN=256, BK=64, stages=3, threads=256,
    cluster=None,
):  # fmt: skip
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads, cluster=cluster) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages, split=1):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * BM, bx * BN])


def both(cluster: int, stages: int, BN: int):
    """The kernel by hand and by the passes, which leave slots of small tiles late."""
    by_hand = example().matmul.compile(
        SQUARE, SQUARE, SQUARE,
        target=HOPPER, cluster=cluster, stages=stages, BN=BN, late=BN < 256,
    )  # fmt: skip
    made = plain.compile(
        SQUARE, SQUARE, SQUARE, target=HOPPER, cluster=(1, cluster), stages=stages, BN=BN
    )
    return by_hand, made


def opcodes(sass: str) -> dict[str, int]:
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?(\w+)", sass, re.MULTILINE)
    counts = collections.Counter(name for name in found if COUNTED.fullmatch(name))
    return dict(sorted(counts.items()))


PTX = re.compile(
    r"wgmma\.\w+(?:\.\w+)*|cp\.async\.bulk\.[\w.:]+|mbarrier\.\w+(?:\.\w+)*|bar\.\w+|"
    r"barrier\.cluster\.\w+|fence\.[\w.:]+|setmaxnreg\.\w+|elect\.sync|prefetch\.tensormap"
)


def instructions(ptx: str) -> dict[str, int]:
    return dict(sorted(collections.Counter(PTX.findall(ptx)).items()))


def assert_clean(kernel) -> None:
    log, resources = kernel.kernels[0].compiled.log, kernel.resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0), resources
    assert not re.search(r"C7\d\d\d|(?i:warning|advisory|error)", log), log


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("stages, BN", [(3, 256), (4, 128)])
def test_kernel_by_hand_has_the_instructions_of_the_passes(cluster, stages, BN):
    by_hand, made = both(cluster, stages, BN)
    assert_clean(by_hand)
    assert_clean(made)
    assert instructions(by_hand.ptx) == instructions(made.ptx)
    assert by_hand.resources.registers == made.resources.registers


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("stages, BN", [(3, 256), (4, 128)])
def test_machine_code_by_hand_counts_as_that_of_the_passes(cluster, stages, BN):
    by_hand, made = both(cluster, stages, BN)
    counts = opcodes(by_hand.sass)
    assert counts == opcodes(made.sass)
    assert {"HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "BAR", "USETMAXREG"} <= set(counts)
    assert ("UCGABAR_ARV" in counts) == (cluster > 1)


def half(*shape: int):
    return T.Tensor(shape, "bfloat16")


def single(*shape: int):
    return T.Tensor(shape, "float32")


@pytest.mark.parametrize(
    "kernel, arguments, constants",
    [
        (ring, (half(512, 512), half(512, 512), single(512, 512)), {}),
        (ring, (half(512, 512), half(512, 512), single(512, 512)), {"stages": 4, "pending": 1}),
        (ring, (half(512, 512), half(512, 512), single(512, 512)),
         {"BM": 128, "BN": 256, "threads": 256}),
        (ping_pong, (half(256, 512), half(512, 512), single(256, 512)), {"BN": 128}),
        (one_warp_arrives, (single(64, 64), single(64, 64)), {}),
        (strips, (single(512, 512), half(512, 512)), {}),
        (shared_tile, (single(96, 64), single(2, 96, 64)), {"cluster": (2, 1), "mask": 3}),
        (shared_tile, (single(96, 64), single(4, 96, 64)), {"cluster": (2, 2), "mask": 5}),
    ],
)  # fmt: skip
def test_kernels_by_hand_compile_cleanly(kernel, arguments, constants):
    assert_clean(kernel.compile(*arguments, target=HOPPER, **constants))
