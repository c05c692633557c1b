"""Device time of calls that are timed in turns: by CUDA events, or by the records of CUPTI.

Knows torch and its profiler, imported only where a clock is made. Does not know what is called.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

MARKER = "spin_kernel"
"""A part of the name of the kernel behind `torch.cuda._sleep`, which nothing else launches."""

NOT_WORK = (" Sync", " Wait Event")
"""Ends of the names of records that are no work on the device."""

FEWEST_ROUNDS = 3
TRIES = 3


class Limit:
    """A moment by which something must have ended; without seconds it never comes."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left_s <= 0

    def part(self, share: float) -> Limit:
        """The end of that share of what is left."""
        return Limit(None if math.isinf(self._end) else max(0.0, self.left_s * share))


class Flush:
    """Writes a buffer of twice the L2 cache, so that nobody finds operands there."""

    def __init__(self) -> None:
        import torch

        bytes_ = 2 * int(torch.cuda.get_device_properties(0).L2_cache_size or 64 << 20)
        self._buffer = torch.empty(bytes_ // 4, dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        self._buffer.fill_(1)


class EventClock:
    """CUDA events on torch's stream around each call, which is queued before the clock starts."""

    name = "CUDA events on torch's stream"
    sees_all_streams = False

    def __init__(self) -> None:
        self._flush = Flush()

    def round(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each call, one after the other."""
        import torch

        times = []
        for call in calls:
            self._flush()
            torch.cuda._sleep(500_000)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return times


class ProfilerClock:
    """The sum of the durations of all kernels that a call launched, on whatever stream."""

    name = "kernel durations recorded by CUPTI (torch.profiler)"
    sees_all_streams = True

    def __init__(self) -> None:
        self._flush = Flush()

    def round(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each call, one after the other; 0 where no kernel was seen.

        Raises:
            RuntimeError: the profiler lost records, several times.
        """
        for _ in range(TRIES):
            times = between_markers(self._record(calls))
            if len(times) == len(calls):
                return times
        raise RuntimeError(f"the profiler saw {len(times)} of {len(calls)} calls")

    def _record(self, calls: Sequence[Callable[[], Any]]) -> list[tuple[float, str, float]]:
        """Start in us, name and duration in us of all that ran on the device."""
        import torch

        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for call in calls:
                self._flush()
                torch.cuda._sleep(1000)
                torch.cuda.synchronize()
                call()
                torch.cuda.synchronize()
                torch.cuda._sleep(1000)
                torch.cuda.synchronize()
        device = torch.autograd.DeviceType.CUDA
        return [
            (event.time_range.start, event.name, event.time_range.elapsed_us())
            for event in profile.events()
            if event.device_type == device and not event.name.endswith(NOT_WORK)
        ]


def between_markers(records: Sequence[tuple[float, str, float]]) -> list[float]:
    """Milliseconds of what ran between the first two markers, between the next two, and so on.

    records: start and duration in microseconds with a name between them, in any order.
    """
    times: list[float] = []
    is_open = False
    for _, name, duration_us in sorted(records):
        if MARKER in name:
            is_open = not is_open
            times += [0.0] if is_open else []
        elif is_open:
            times[-1] += duration_us / 1000
    return times


def choose_clock(wanted: str | None, *, has_other_streams: bool) -> tuple[Any, str | None]:
    """The clock for this run, and what stands against the one that would have been better."""
    import torch

    if wanted == "events" or (wanted is None and not has_other_streams):
        return EventClock(), None
    clock = ProfilerClock()
    tile = torch.ones(256, 256, device="cuda")
    try:
        clock.round([lambda: tile @ tile])  # the first session also loads CUPTI
        if min(clock.round([lambda: tile @ tile, lambda: tile + tile])) > 0:
            return clock, None
        trouble = "it saw no kernel between two others"
    except Exception as error:
        trouble = reason(error)
    return EventClock(), f"torch.profiler is of no use here: {trouble}"


def measure(
    clock: Any, calls: dict[Any, Callable[[], Any]], rounds: int, limit: Limit
) -> dict[Any, list[float]]:
    """Milliseconds of each call in each round; the first one of a round changes each time."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(rounds if names else 0):
        if index >= FEWEST_ROUNDS and limit.is_over:
            break
        turn = names[index % len(names) :] + names[: index % len(names)]
        for name, ms in zip(turn, clock.round([calls[name] for name in turn]), strict=True):
            times[name].append(ms)
    return times


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
