"""Which elements of an accumulator the lanes of a quad trade: 8-bit ones, so that it becomes a left
operand; pairs, so that each lane has four neighbours.

Pure index maths. Does not know shuffles, instructions or nodes.

Matrix instructions leave two neighbouring columns of 8 in each of four lanes, and take four
neighbouring columns of 16 of 8-bit operands (PTX ISA, "Matrix fragments for mma.m16n8k32" and
"Register fragments for wgmma"). The words of 16 columns stay in their quad.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tilejit.layout.fragment import THREAD, FragmentLayout, register, thread

WARP = 32
LANES = 4  # of a quad
SPAN = 16  # elements that its words of four hold
HELD = (0, 1, 8, 9)  # elements of a word before the trade, counted from twice the lane
WANTED = (0, 1, 2, 3)  # the same after it, counted from four times the lane

Word = tuple[int, int, int, int]  # registers


@cache
def quad_trade(held: FragmentLayout, wanted: FragmentLayout) -> tuple[tuple[Word, Word], ...]:
    """The words that lanes of each quad trade to go from one layout to the other: the registers
    that make one before, and those that it becomes. Empty where that is not what is missing."""
    if held.shape != wanted.shape or held.threads != wanted.threads or held.threads % LANES:
        return ()
    if any(one.flat or one.is_padded for one in (held, wanted)):
        return ()
    axis = _axis(held, wanted)
    if axis is None:
        return ()
    before = {held.register_part(r): r for r in range(held.registers)}
    after = {wanted.register_part(r): r for r in range(wanted.registers)}
    words: list[tuple[Word, Word]] = []
    for place in after:
        if place[axis] % SPAN:
            continue
        old = [before.get(_moved(place, axis, n)) for n in HELD]
        new = [after.get(_moved(place, axis, n)) for n in WANTED]
        if None in old or None in new:
            return ()
        words.append((tuple(old), tuple(new)))  # type: ignore[arg-type]
    if len(words) * len(HELD) != held.registers or held.registers != wanted.registers:
        return ()
    return tuple(words)


def before_trade(wanted: FragmentLayout) -> FragmentLayout | None:
    """The layout that a trade makes this one of, with the elements of a word in the registers where
    the word will be; None where there is none."""
    if wanted.flat:
        return None
    four = (thread(LANES, 1), register(len(WANTED), 1))
    ends = [d for d, digits in enumerate(wanted.dims) if digits[-2:] == four]
    if len(ends) != 1:
        return None
    pairs = (register(2, 2), thread(LANES, 1), register(2, 1))
    dims = list(wanted.dims)
    dims[ends[0]] = (*dims[ends[0]][:-2], *pairs)
    return FragmentLayout(wanted.shape, tuple(dims), wanted.threads)


def paired(held: FragmentLayout) -> tuple[FragmentLayout, int] | None:
    """The layout after neighbouring lanes have traded pairs: each holds four neighbours of one of
    two rows instead of two of either. And the distance of such lanes; None where lanes do not hold
    pairs beside each other of two rows.

    Of the registers 4n to 4n + 3 of a lane, the first two are of one row, the others of the other;
    after it they are the four neighbours.
    """
    if held.flat or held.is_padded or len(held.dims[-1]) < 2:
        return None
    *rest, lanes, pair = held.dims[-1]
    both = register(2, 2)
    rows = [d for d, digits in enumerate(held.dims) if both in digits]
    if pair != register(2, 1) or lanes.place != THREAD or lanes.size % 2 or not rows:
        return None
    if lanes.stride > WARP // 2:
        return None
    dims = [
        tuple(thread(2, lanes.stride) if d == both else d for d in digits) for digits in held.dims
    ]
    rest = list(dims[-1][:-2])
    if lanes.size > 2:
        rest.append(thread(lanes.size // 2, 2 * lanes.stride))
    dims[-1] = (*rest, both, pair)
    return FragmentLayout(held.shape, tuple(dims), held.threads), lanes.stride


def _axis(held: FragmentLayout, wanted: FragmentLayout) -> int | None:
    """The dimension along which the lanes of quads hold pairs of 8 and want fours of 16, where
    all else is in the same threads."""
    threads = np.arange(held.threads)
    lane = threads % LANES
    axis = None
    for d, (mine, other) in enumerate(
        zip(held.thread_part(threads), wanted.thread_part(threads), strict=True)
    ):
        if np.array_equal(np.broadcast_to(mine, lane.shape), np.broadcast_to(other, lane.shape)):
            continue
        rest = mine - 2 * lane
        if axis is not None or not np.array_equal(rest, other - 4 * lane) or (rest % SPAN).any():
            return None
        axis = d
    return axis


def _moved(place: tuple[int, ...], axis: int, step: int) -> tuple[int, ...]:
    return (*place[:axis], place[axis] + step, *place[axis + 1 :])
