"""Matrix products of warpgroups in kernels: late results, and what is caught around operands."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit.dtypes import bfloat16, bool_, float16, float32, int32, uint32, uint64
from tilejit.errors import SimulationError
from tilejit.isa import barrier, cp_async, mbarrier, registers, tma, wgmma
from tilejit.isa.machine import Address, Slot
from tilejit.isa.tma import TensorMap
from tilejit.sim.block import Checks
from tilejit.sim.launch import run_lowered
from tilejit.target import TARGETS

HOPPER = TARGETS["sm_90a"]
QUIET = Checks(races=False)
WAIT = mbarrier.wait_parity(HOPPER)
N, K = 64, 64
ONE = wgmma.find_wgmma(bfloat16, bfloat16, float32, N, HOPPER)
STEPS = K // ONE.k
OFFSETS = (tuple(2 * s for s in range(STEPS)),)
PRODUCT = wgmma.wgmma_sequence(
    ONE, rows=1, columns=1, steps=STEPS, a_offsets=OFFSETS, b_offsets=OFFSETS, scaled=True
)
COUNT = len(PRODUCT.outputs)
LAYOUT = wgmma.tile_acc(ONE, 64, N, 1, 1)
A_BYTES = B_BYTES = 64 * 128
B_AT = A_BYTES
BARRIER = 2 * A_BYTES
SHARED = BARRIER + 64
MAP, ADDRESS, INT, ACC = (
    Slot(uint64, tensor_map=True), Slot(uint64, address=True), Slot(int32), Slot(float32, COUNT)
)  # fmt: skip


def place(m, byte: int, offset=None):
    return m.address(Address("shared", None, offset, byte))


def lane(m, number: int):
    return m.binary("eq", m.thread_index(), m.const(number, int32), int32)


def sync(m) -> None:
    m.issue(barrier.bar_sync(0, 0))


def fence(m) -> None:
    m.issue(tma.FENCE_ASYNC)


def descriptor(m, byte: int, offset=None):
    address = m.cast([place(m, byte, offset)], uint32, uint64)[0]
    field = m.binary("and", address, m.const(0x3FFFF, uint64), uint64)
    field = m.binary("shr", field, m.const(4, uint64), uint64)
    fixed = m.const(wgmma.descriptor_constant(1, 16, 1024), uint64)
    return m.binary("or", field, fixed, uint64)


def multiply(m, acc=None, scale: int = 1, offset=None):
    acc = [m.const(0.0, float32)] * COUNT if acc is None else acc
    operands = [descriptor(m, 0, offset), descriptor(m, B_AT, offset), m.const(scale, uint32)]
    return m.issue(PRODUCT, [*acc, *operands])


def wait(m, acc, pending: int = 0):
    return m.issue(wgmma.wait_group(pending, (float32,) * len(acc)), acc)


def fill(m, value: int = 0x3F803F80) -> None:
    """Both operands: ones, unless told otherwise. Every thread writes one row of each line."""
    offset = m.binary("mul", m.thread_index(), m.const(16, int32), int32)
    for line in range((A_BYTES + B_BYTES) // (16 * 128)):
        target = Address("shared", None, offset, 16 * 128 * line, align=16)
        m.store(target, [m.const(value, uint32)] * 4, uint32)


def run(run_lanes, emit, *arguments, **options):
    return run_lanes(emit, *arguments, threads=128, shared_bytes=SHARED, **options)


def test_a_product_of_ordinarily_written_operands_comes_with_its_wait(run_lanes):
    def emit(m):
        fill(m)
        fence(m)
        sync(m)
        return wait(m, multiply(m))

    assert all((value == K).all() for value in run(run_lanes, emit, ends=True))


def test_results_before_the_wait_are_poison(run_lanes):
    def emit(m, pending):
        fill(m)
        fence(m)
        sync(m)
        acc = multiply(m)
        if pending is not None:
            acc = wait(m, acc, pending)
        return [m.binary("add", value, m.const(0.0, float32), float32) for value in acc]

    for pending in (None, 1):
        assert all(np.isnan(value).all() for value in run(run_lanes, emit, pending))


def test_a_wait_may_leave_the_newest_group_on_its_way(run_lanes):
    def emit(m):
        fill(m)
        fence(m)
        sync(m)
        first = multiply(m)
        second = multiply(m)
        both = wait(m, [*first, *second], 1)
        early = m.binary("add", both[0], m.const(1.0, float32), float32)
        late = m.binary("add", both[COUNT], m.const(1.0, float32), float32)
        done = wait(m, both[COUNT:])
        return [early, late, done[0]]

    early, late, done = run(run_lanes, emit)
    assert (early == K + 1).all() and np.isnan(late).all() and (done == K).all()


def test_a_chain_adds_and_scale_zero_begins_anew(run_lanes):
    def emit(m, scale):
        fill(m)
        fence(m)
        sync(m)
        acc = multiply(m, [m.const(5.0, float32)] * COUNT, scale)
        return wait(m, multiply(m, multiply(m, acc)))

    assert (run(run_lanes, emit, 1)[3] == 5 + 3 * K).all()
    assert (run(run_lanes, emit, 0)[3] == 3 * K).all()


def test_a_chain_goes_through_loops(run_lanes):
    def emit(m):
        fill(m)
        fence(m)
        sync(m)
        state = {"acc": [m.const(0.0, float32)] * COUNT}

        def body(i):
            state["acc"][:] = multiply(m, state["acc"])

        m.loop(m.const(0, int32), m.const(5, int32), 1, int32, body, state)
        return wait(m, state["acc"])

    assert all((value == 5 * K).all() for value in run(run_lanes, emit))


# --- proxies --------------------------------------------------------------------------------------


def test_ordinary_writes_need_a_fence_of_their_threads_and_a_barrier(run_lanes):
    def emit(m, fences, syncs=True):
        fill(m)
        if fences == "all":
            fence(m)
        if syncs:
            sync(m)
        if fences == "one":
            m.issue(tma.FENCE_ASYNC, [], lane(m, 0))
            sync(m)
        return wait(m, multiply(m))

    with pytest.raises(SimulationError) as caught:
        run(run_lanes, emit, "none")
    assert caught.value.headline == (
        "A matrix product of threads 0 to 127 reads shared memory that thread 0 wrote without a "
        "fence.proxy.async after it."
    )
    assert caught.value.notes == ("Byte 0 of the block's shared memory.",)
    with pytest.raises(SimulationError, match=r"thread 1 wrote without a fence\.proxy\.async"):
        run(run_lanes, emit, "one")
    with pytest.raises(SimulationError, match="thread 0 wrote, and nothing orders the two"):
        run(run_lanes, emit, "all", False)


def test_what_cp_async_brought_needs_a_fence_after_its_wait(run_lanes):
    array = np.full(2 * A_BYTES // 4, 0x3F803F80, np.uint32)

    def emit(m, base, is_late):
        offset = m.binary("mul", m.thread_index(), m.const(16, int32), int32)
        for line in range(2 * A_BYTES // 2048):
            to = m.address(Address("shared", None, offset, 2048 * line))
            source = m.address(Address("global", base, offset, 2048 * line))
            m.issue(cp_async.cp_async(16), [to, source, m.const(16, uint32)])
        if not is_late:
            fence(m)
        m.issue(cp_async.WAIT_ALL)
        if is_late:
            fence(m)
        sync(m)
        return wait(m, multiply(m))

    address = np.array([array.ctypes.data], np.uint64)
    result = run(run_lanes, emit, address, True, memory=[array])
    assert all((value == K).all() for value in result)
    with pytest.raises(SimulationError, match=r"wrote without a fence\.proxy\.async"):
        run(run_lanes, emit, address, False, memory=[array])


def test_operands_on_their_way_are_an_error(run_lanes):
    array = np.ones((64, 64), np.uint16)
    tensor = TensorMap(
        array.ctypes.data, 2, array.shape, array.strides, (64, 64), 128, kind="bfloat16"
    )

    def emit(m):
        m.issue(mbarrier.INIT, [place(m, BARRIER), m.const(1, uint32)], lane(m, 0))
        sync(m)
        full, zero = place(m, BARRIER), m.const(0, int32)
        m.issue(mbarrier.ARRIVE_EXPECT, [full, m.const(A_BYTES, uint32)], lane(m, 0))
        inputs = [m.const(1 << 40, uint64), zero, zero, place(m, 0), full]
        m.issue(tma.tma_load(2), inputs, lane(m, 0))
        multiply(m)

    with pytest.raises(SimulationError) as caught:
        run(run_lanes, emit, memory=[array], maps={1 << 40: tensor})
    assert caught.value.headline == (
        "A matrix product of threads 0 to 127 reads shared memory that a bulk copy is still "
        "filling."
    )


# --- operands while they are read -----------------------------------------------------------------


def test_overwriting_an_operand_before_the_wait_is_an_error(run_lanes):
    def emit(m, is_waited):
        fill(m)
        fence(m)
        sync(m)
        acc = multiply(m)
        if is_waited:
            acc = wait(m, acc)
            sync(m)
        fill(m, 0)
        return wait(m, acc)

    assert (run(run_lanes, emit, True)[0] == K).all()
    with pytest.raises(SimulationError) as caught:
        run(run_lanes, emit, False)
    assert caught.value.headline == (
        "Thread 0 writes shared memory that a matrix product of threads 0 to 127 is still reading."
    )
    assert caught.value.hint == "Wait for it first."
    assert (run(run_lanes, emit, False, checks=QUIET)[0] == 0).all()  # it was read late


def test_what_no_product_reads_may_be_written_meanwhile(run_lanes):
    def emit(m):
        fill(m)
        fence(m)
        sync(m)
        acc = multiply(m)
        m.store(Address("shared", None, None, BARRIER + 32, 4), [m.thread_index()], int32,
                lane(m, 9))  # fmt: skip
        return wait(m, acc)

    assert (run(run_lanes, emit)[0] == K).all()


def test_an_operand_outside_shared_memory_is_an_error(run_lanes):
    def emit(m):
        multiply(m, offset=m.const(1024, int32))

    with pytest.raises(SimulationError, match=r"reads 16 bytes of shared memory, .* past"):
        run(run_lanes, emit)


def test_a_kernel_must_not_end_before_its_products(run_lanes):
    def emit(m):
        fill(m)
        fence(m)
        sync(m)
        multiply(m)

    with pytest.raises(SimulationError) as caught:
        run(run_lanes, emit, ends=True)
    assert caught.value.headline == (
        "The kernel ends while a matrix product of threads 0 to 127 is on its way."
    )


def test_a_product_in_a_group_of_less_than_a_warpgroup_is_our_error(run_lanes):
    def emit(m):
        multiply(m)

    with pytest.raises(AssertionError, match="no whole warpgroups"):
        run_lanes(emit, threads=64, shared_bytes=SHARED)


def test_registers_are_asked_for_by_whole_warpgroups(run_lanes):
    def emit(m, part):
        m.issue(registers.setmaxnreg(232, True), [], lane(m, 0) if part else None)

    run(run_lanes, emit, False)
    with pytest.raises(AssertionError, match="only part of a warpgroup"):
        run(run_lanes, emit, True)
    with pytest.raises(AssertionError, match="setmaxnreg 20"):
        registers.setmaxnreg(20, False)


# --- a warp-specialised matmul --------------------------------------------------------------------

MATMUL = """
def kernel(A, B, C):
    start()
    k = 0
    if producing():
        while more(k):
            load(A, B, k)
            k = following(k)
    else:
        acc = clear()
        while more(k):
            acc = multiply(k, acc)
            k = following(k)
        finish(C, acc)
"""
STAGES, ROUNDS, CONSUMERS = 2, 5, 2
STAGE = CONSUMERS * A_BYTES + B_BYTES
FULL = STAGES * STAGE
EMPTY = FULL + 8 * STAGES


def matmul(make_kernel, *, waits=True, arrives="after", threads_arriving=1, lag=0):
    """Warpgroup 0 loads A (128 x 64) and B (64 x 64, N x K) tiles, warpgroups 1 and 2 multiply 64
    rows each.

    arrives: gives a stage back "after" or "before" its product was waited for. lag: products that
    stay on their way while the next stage is multiplied.
    """

    def slot(m, k, byte, step):
        number = m.binary("floormod", k, m.const(STAGES, int32), int32)
        return place(m, byte, m.binary("mul", number, m.const(step, int32), int32))

    def parity(m, k, flip):
        turn = m.binary("floordiv", k, m.const(STAGES, int32), int32)
        turn = m.binary("add", turn, m.const(flip, int32), int32)
        return m.cast([m.binary("and", turn, m.const(1, int32), int32)], int32, uint32)[0]

    def local(m):
        return m.binary("and", m.thread_index(), m.const(127, int32), int32)

    def start(m):
        for stage in range(STAGES):
            for byte, count in ((FULL, 1), (EMPTY, CONSUMERS * threads_arriving)):
                m.issue(
                    mbarrier.INIT, [place(m, byte + 8 * stage), m.const(count, uint32)], lane(m, 0)
                )
        sync(m)

    def load(m, a, b, k):
        first = lane(m, 0)
        m.issue(WAIT, [slot(m, k, EMPTY, 8), parity(m, k, 1)], first)
        full = slot(m, k, FULL, 8)
        m.issue(mbarrier.ARRIVE_EXPECT, [full, m.const(STAGE, uint32)], first)
        column = m.binary("mul", k, m.const(K, int32), int32)
        for tensor, row, byte in ((a, 0, 0), (a, 64, A_BYTES), (b, 0, CONSUMERS * A_BYTES)):
            inputs = [tensor, m.const(row, int32), column, slot(m, k, byte, STAGE), full]
            m.issue(tma.tma_load(2), inputs, first)

    def multiply(m, k, acc):
        m.issue(WAIT, [slot(m, k, FULL, 8), parity(m, k, 0)])
        group = m.binary("shr", m.thread_index(), m.const(7, int32), int32)
        group = m.binary("sub", group, m.const(1, int32), int32)
        number = m.binary("floormod", k, m.const(STAGES, int32), int32)
        stage = m.binary("mul", number, m.const(STAGE, int32), int32)
        rows = m.binary("mul", group, m.const(A_BYTES, int32), int32)
        a = descriptor(m, 0, m.binary("add", stage, rows, int32))
        b = descriptor(m, CONSUMERS * A_BYTES, stage)
        acc = m.issue(PRODUCT, [*acc, a, b, m.const(1, uint32)])
        arrival = m.binary("lt", local(m), m.const(threads_arriving, int32), int32)
        if arrives == "before":
            m.issue(mbarrier.ARRIVE, [slot(m, k, EMPTY, 8)], arrival)
        if waits:
            acc = wait(m, acc, lag)
        if arrives == "after":
            earlier = m.binary("sub", k, m.const(lag, int32), int32)
            has_one = m.binary("ge", earlier, m.const(0, int32), int32)
            arrival = m.binary("and", arrival, has_one, bool_)
            m.issue(mbarrier.ARRIVE, [slot(m, earlier, EMPTY, 8)], arrival)
        return acc

    def finish(m, c, acc):
        if waits:
            acc = wait(m, acc)
        group = m.binary("shr", m.thread_index(), m.const(7, int32), int32)
        group = m.binary("sub", group, m.const(1, int32), int32)
        base = m.binary("mul", group, m.const(64 * N, int32), int32)
        base = m.binary("add", base, own(m), int32)
        for r, value in enumerate(acc):
            row, column = LAYOUT.register_part(r)
            index = m.binary("add", base, m.const(row * N + column, int32), int32)
            offset = m.binary("mul", index, m.const(4, int32), int32)
            m.store(Address("global", c, offset, align=4), [value], float32)

    def own(m):
        """The thread's own row and column: warps have 16 rows, quads 2 columns."""
        thread = local(m)
        warp = m.binary("shr", thread, m.const(5, int32), int32)
        quad = m.binary("and", m.binary("shr", thread, m.const(2, int32), int32),
                        m.const(7, int32), int32)  # fmt: skip
        pair = m.binary("and", thread, m.const(3, int32), int32)
        row = m.binary("add", m.binary("mul", warp, m.const(16, int32), int32), quad, int32)
        index = m.binary("mul", row, m.const(N, int32), int32)
        twice = m.binary("mul", pair, m.const(2, int32), int32)
        return m.binary("add", index, twice, int32)

    def producing(m):
        return [m.binary("lt", m.thread_index(), m.const(128, int32), int32)]

    return make_kernel(
        MATMUL,
        {"A": MAP, "B": MAP, "C": ADDRESS},
        {
            "start": (start, [], []),
            "producing": (producing, [], [Slot(bool_)]),
            "more": (
                lambda m, k: [m.binary("lt", k, m.const(ROUNDS, int32), int32)],
                [INT],
                [Slot(bool_)],
            ),
            "following": (
                lambda m, k: [m.binary("add", k, m.const(1, int32), int32)], [INT], [INT]
            ),
            "load": (load, [MAP, MAP, INT], []),
            "clear": (lambda m: [[m.const(0.0, float32)] * COUNT], [], [ACC]),
            "multiply": (lambda m, k, acc: [multiply(m, k, acc)], [INT, ACC], [ACC]),
            "finish": (finish, [ADDRESS, ACC], []),
        },
        threads=128 * (1 + CONSUMERS),
        lanes=128,
        shared_bytes=EMPTY + 8 * STAGES,
    )  # fmt: skip


def run_matmul(kernel, checks=None):
    rng = np.random.default_rng(3)
    a = rng.integers(-4, 5, (128, K * ROUNDS)).astype(bfloat16.numpy)
    b = rng.integers(-4, 5, (N, K * ROUNDS)).astype(bfloat16.numpy)
    c = np.full((128, N), np.nan, np.float32)
    maps = [
        TensorMap(x.ctypes.data, 2, x.shape, x.strides, (64, K), 128, kind="bfloat16")
        for x in (a, b)
    ]
    run_lowered(kernel, (1, 1, 1), [*maps, c], [a, b], checks=checks)
    return c, a.astype(np.float32) @ b.astype(np.float32).T


@pytest.mark.parametrize("threads_arriving", [1, 128])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_producer_and_two_multiplying_warpgroups(threads_arriving, lag, make_kernel):
    """One thread of each gives a stage back for all of its warpgroup."""
    for checks in (None, QUIET):
        kernel = matmul(make_kernel, threads_arriving=threads_arriving, lag=lag)
        c, expected = run_matmul(kernel, checks)
        np.testing.assert_array_equal(c, expected)


def test_a_stage_that_is_given_back_before_its_product_is_done_is_an_error(make_kernel):
    with pytest.raises(SimulationError) as caught:
        run_matmul(matmul(make_kernel, arrives="before"))
    assert "writes shared memory that a matrix product of threads" in caught.value.headline
    # with a lag the stage of the newest product is given back
    with pytest.raises(SimulationError, match="is still reading"):
        run_matmul(matmul(make_kernel, arrives="before", lag=1))


def test_without_any_wait_for_products_stages_cannot_be_given_back(make_kernel):
    with pytest.raises(SimulationError, match="is still reading"):
        run_matmul(matmul(make_kernel, waits=False))
    with pytest.raises(SimulationError, match="The kernel ends while a matrix product of threads"):
        run_matmul(matmul(make_kernel, waits=False), QUIET)


def test_float16_accumulators_travel_as_words(run_lanes):
    one = wgmma.find_wgmma(float16, float16, float16, N, HOPPER)
    product = wgmma.wgmma_sequence(
        one, rows=1, columns=1, steps=STEPS, a_offsets=OFFSETS, b_offsets=OFFSETS
    )

    def emit(m):
        fill(m, 0x3C003C00)
        fence(m)
        sync(m)
        acc = [m.const(0x40004000, uint32)] * len(product.outputs)  # twos
        acc = m.issue(product, [*acc, descriptor(m, 0), descriptor(m, B_AT)])
        return m.issue(wgmma.wait_group(0, product.outputs), acc)

    for value in run(run_lanes, emit):
        assert (value.view(np.float16) == K + 2).all()
