"""Everything that opens a frame of the trace, under one roof: kernels, loops and branches.

Knows where each is defined. Does not know what any of them does.
"""

from tilejit.language.branches import Else, If, Then, While
from tilejit.language.context import MARK, Context
from tilejit.language.launch import (
    ClusterKernel,
    Kernel,
    get_block_binding,
    get_block_bindings,
    get_block_extent,
    get_thread_binding,
    get_thread_bindings,
    get_thread_extent,
    get_thread_extents,
)
from tilejit.language.loops import (
    DeviceLoop,
    Parallel,
    Pipelined,
    RangeLoop,
    left_early,
    serial,
    unroll,
    vectorized,
)

__all__ = [
    "MARK",
    "ClusterKernel",
    "Context",
    "DeviceLoop",
    "Else",
    "If",
    "Kernel",
    "Parallel",
    "Pipelined",
    "RangeLoop",
    "Then",
    "While",
    "get_block_binding",
    "get_block_bindings",
    "get_block_extent",
    "get_thread_binding",
    "get_thread_bindings",
    "get_thread_extent",
    "get_thread_extents",
    "left_early",
    "serial",
    "unroll",
    "vectorized",
]
