"""The compiler: a kernel as traced, one decision after the other."""

from __future__ import annotations

from collections.abc import Callable

from tilejit import config
from tilejit.ir.kernel import Kernel
from tilejit.ir.verify import verify
from tilejit.passes.allocate import allocate_memory
from tilejit.passes.bounds import drop_masks
from tilejit.passes.clears import drop_zeros, fold_clears
from tilejit.passes.constants import hide_constants
from tilejit.passes.describe import describe_tensors
from tilejit.passes.exchange import plan_exchanges
from tilejit.passes.given import order_tiles
from tilejit.passes.halves import halve_operands
from tilejit.passes.layouts import infer_layouts
from tilejit.passes.opening import open_early
from tilejit.passes.pipeline import pipeline_loops
from tilejit.passes.proxies import order_reads
from tilejit.passes.schedule import choose_schedule
from tilejit.passes.select import select_atoms
from tilejit.passes.specialise import specialise
from tilejit.passes.sync import insert_sync
from tilejit.target import Target

Pass = Callable[[Kernel], Kernel]

# After choose_schedule and select_atoms (which also take the target), in this order:
PASSES: tuple[Pass, ...] = (
    drop_masks,  # early: what follows sees what is left to compute
    fold_clears,  # what accumulators hold when loops begin has been looked at
    hide_constants,  # fills of zeros that are left
    plan_exchanges,  # what is sent is in fragments
    halve_operands,  # the order of columns is part of a product's layout
    infer_layouts,  # layouts depend on the instructions
    pipeline_loops,  # how many slots fit depends on the layouts' bytes
    specialise,  # the same of what producers bring
    drop_zeros,  # what rounds fill anew has been looked at
    order_tiles,  # blocks that walk have an order already
    insert_sync,  # hazards depend on what runs ahead
    order_reads,  # meetings and arrivals are what tells others
    describe_tensors,  # boxes depend on slots and clusters
    open_early,  # hardware barriers that nothing else uses
    allocate_memory,  # last: every buffer, slot and scratch is known
)


def stages(kernel: Kernel, target: Target) -> list[tuple[str, Kernel]]:
    """The kernel after every pass, with the pass's name."""
    result = [("trace", kernel)]
    check = config.current().verify
    kernel = choose_schedule(kernel, target)
    result.append(("choose_schedule", kernel))
    kernel = select_atoms(kernel, target)
    result.append(("select_atoms", kernel))
    for apply in PASSES:
        if check:
            verify(kernel)
        kernel = apply(kernel)
        result.append((getattr(apply, "__name__", "pass"), kernel))
    if check:
        verify(kernel)
    return result


def run(kernel: Kernel, target: Target) -> Kernel:
    """All passes: the kernel ready to be lowered for `target`."""
    return stages(kernel, target)[-1][1]
