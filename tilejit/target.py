"""Facts per chip: limits, features and the spelling that the compilers want.

Knows architecture numbers (with `isa/`, the only room that does). Does not know instructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from tilejit.errors import UnsupportedError


class Feature(StrEnum):
    """What an instruction may need; a chip has a set of them (a set, not a minimum)."""

    CP_ASYNC = "cp.async"
    LDMATRIX = "ldmatrix"
    MMA = "mma.sync"
    MMA_FP8 = "mma.sync fp8"
    MMA_F64 = "mma.sync f64"
    MMA_F64_M16 = "mma.sync f64 m16"
    FP8_CONVERT = "fp8 conversion"
    MBARRIER = "mbarrier"
    MBARRIER_TX = "mbarrier expect_tx"
    TMA = "cp.async.bulk.tensor"
    CLUSTER = "thread block clusters"
    STMATRIX = "stmatrix"
    GRIDDEPCONTROL = "griddepcontrol"
    WGMMA = "wgmma"
    SETMAXNREG = "setmaxnreg"


_SM80 = frozenset(
    {Feature.CP_ASYNC, Feature.LDMATRIX, Feature.MMA, Feature.MMA_F64, Feature.MBARRIER}
)
_SM89 = _SM80 | {Feature.MMA_FP8, Feature.FP8_CONVERT}
_SM90 = _SM89 | {
    Feature.MMA_F64_M16,
    Feature.MBARRIER_TX, Feature.TMA, Feature.CLUSTER, Feature.STMATRIX, Feature.GRIDDEPCONTROL,
}  # fmt: skip
_SM90A = _SM90 | {Feature.WGMMA, Feature.SETMAXNREG}
_SM100 = _SM90 | {Feature.SETMAXNREG}


@dataclass(frozen=True, slots=True)
class Chip:
    """What a typical product of a target does in a clock; weighs choices, nothing else.

    multiprocessors, clock (GHz under load): of the whole chip. memory_bytes: a clock, of the whole
    chip from its memory. brought_bytes: a clock, from the L2 cache to a multiprocessor.
    cache_bytes: of the L2 cache. Of the device at hand, the driver knows better (`measured`).
    tensor_macs: multiply-adds of 16-bit operands a clock in a multiprocessor's tensor cores, into
    float32. unpacks_fp8: mma.sync turns fp8 operands into float16 first.
    Sources: NVIDIA's architecture whitepapers; `brought_bytes` of sm_90a is measured.
    """

    multiprocessors: int
    clock: float
    memory_bytes: float
    brought_bytes: float
    tensor_macs: int
    cache_bytes: int
    unpacks_fp8: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """One chip. `name` is ptxas's spelling, such as sm_90a."""

    name: str
    cc: tuple[int, int]
    suffix: str
    # per block, the opt-in maximum (CUDA Programming Guide, compute capabilities)
    shared_bytes: int
    features: frozenset[Feature]
    chip: Chip
    max_cluster: int = 8  # blocks (CUDA Programming Guide, thread block clusters: 8 are portable)

    @property
    def compute(self) -> str:
        """The NVVM and NVRTC spelling, such as compute_90a."""
        return self.name.replace("sm_", "compute_")

    @property
    def has_modern_ir(self) -> bool:
        """libNVVM takes the modern LLVM dialect for it, else LLVM 7's (NVVM IR Specification)."""
        return self.cc >= (10, 0)

    @property
    def key(self) -> tuple[str, Chip]:
        """What kernels for it depend on."""
        return self.name, self.chip

    def has(self, *features: Feature) -> bool:
        return self.features.issuperset(features)

    def __str__(self) -> str:
        return self.name


_A100 = Chip(108, 1.41, 1100, 45, 1024, 40 << 20)
_RTX3090 = Chip(82, 1.7, 550, 28, 256, 6 << 20)
_RTX4090 = Chip(128, 2.5, 400, 32, 256, 72 << 20)
_H100 = Chip(132, 1.65, 2000, 54, 2048, 50 << 20, unpacks_fp8=True)
_B200 = Chip(148, 1.85, 4200, 60, 1024, 126 << 20, unpacks_fp8=True)
_RTX5090 = Chip(170, 2.4, 740, 32, 256, 96 << 20)

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("sm_80", (8, 0), "", 163 * 1024, _SM80, _A100),
        Target("sm_86", (8, 6), "", 99 * 1024, _SM80, _RTX3090),
        Target("sm_89", (8, 9), "", 99 * 1024, _SM89, _RTX4090),
        Target("sm_90", (9, 0), "", 227 * 1024, _SM90, _H100, 16),
        Target("sm_90a", (9, 0), "a", 227 * 1024, _SM90A, _H100, 16),
        Target("sm_100a", (10, 0), "a", 227 * 1024, _SM100, _B200, 16),
        Target("sm_120a", (12, 0), "a", 99 * 1024, _SM100, _RTX5090),
    )
}


Figure = TypeVar("Figure", int, float)
SAME = 0.05  # as much as a product's figures may differ from the table's, which choices rest on


def measured(target: Target, multiprocessors: int, memory_bytes: float, cache_bytes: int) -> Target:
    """The target with what a device's driver says of it, where the product is another than the
    table's: its multiprocessors, the bytes a second of its memory, the bytes of its L2 cache; 0
    where it does not know."""
    chip = target.chip
    own = replace(
        chip,
        multiprocessors=_differing(multiprocessors, chip.multiprocessors),
        memory_bytes=_differing(memory_bytes / (chip.clock * 1e9), chip.memory_bytes),
        cache_bytes=_differing(cache_bytes, chip.cache_bytes),
    )
    return target if own == chip else replace(target, chip=own)


def _differing(value: Figure, usual: Figure) -> Figure:
    return value if value and abs(value / usual - 1) > SAME else usual


def as_target(target: str | Target) -> Target:
    """The target of that name.

    Raises:
        UnsupportedError: not one of `TARGETS`.
    """
    if isinstance(target, Target):
        return target
    found = TARGETS.get(target)
    if found is None:
        raise UnsupportedError(
            f"{target!r} is not a target that tilejit compiles for.",
            hint="Targets: " + ", ".join(TARGETS) + ".",
        )
    return found


def for_capability(major: int, minor: int) -> Target:
    """The best target for a device of that compute capability.

    Raises:
        UnsupportedError: older than 8.0.
    """
    same = [t for t in TARGETS.values() if t.cc == (major, minor)]
    if same:
        return max(same, key=lambda t: len(t.features))
    # A cubin without suffix runs on later minor versions of the same major one.
    older = [t for t in TARGETS.values() if t.cc[0] == major and t.cc[1] < minor and not t.suffix]
    if older:
        return max(older, key=lambda t: t.cc)
    raise UnsupportedError(
        f"The GPU has compute capability {major}.{minor}; tilejit has no target for it.",
        hint="Targets: " + ", ".join(TARGETS) + ".",
    )
