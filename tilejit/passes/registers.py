"""How many registers a thread has: at launch, and after producers have given theirs away.

Knows the register file and setmaxnreg's steps. Does not know what registers hold.
"""

from __future__ import annotations

GROUP = 128  # threads of a warpgroup
MAX_THREADS = 1024  # of a block, producers included (CUDA Programming Guide)
REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor (CUDA Programming Guide)
MOST_REGISTERS = 255  # of a thread
# Words of a fragment that a thread may hold: more cannot stay in registers, and the compile time of
# tuples grows with the square (256 words 0.5 s, 512 words 1.7 s).
MAX_WORDS = 256
REGISTER_STEP = 8  # setmaxnreg counts in eights (PTX ISA, "setmaxnreg")
PRODUCER_REGISTERS = 40
SPARE_REGISTERS = 40  # of a thread, besides its fragments: addresses, the epilogue
ENOUGH_REGISTERS = 232  # a thread that has as many at launch needs no more


def launch_registers(threads: int) -> int:
    """Of each thread of a block with so many, when it starts."""
    return min(MOST_REGISTERS, REGISTER_FILE // threads // REGISTER_STEP * REGISTER_STEP)


def register_split(threads: int) -> tuple[int, int]:
    """Registers of each of `threads` consumers, and of a producer of the warpgroup besides them,
    moved from one to the other when the kernel starts; (0, 0) where all threads have enough."""
    total = threads + GROUP
    at_launch = launch_registers(total)
    if at_launch >= ENOUGH_REGISTERS:
        return 0, 0
    down = min(PRODUCER_REGISTERS, at_launch)
    up = (at_launch * total - down * GROUP) // threads // REGISTER_STEP * REGISTER_STEP
    return min(up, 256 - REGISTER_STEP), down


def consumer_registers(threads: int) -> int:
    """Of each of `threads` consumers beside a warpgroup of producers."""
    up, _ = register_split(threads)
    return up or launch_registers(threads + GROUP)
