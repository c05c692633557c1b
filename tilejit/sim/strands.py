"""Parts of one program that wait for each other, run in turns: producers and consumers.

Knows turns. Does not know nodes, lanes or barriers: who waits says what for.

One strand runs at a time and gives its turn away only where it must wait, so runs repeat exactly
and a wait that can never end is seen at once.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence


class Stopped(Exception):
    """Ends a strand because another one has failed."""


class Strands:
    """What runs in turns; nothing but the caller at first."""

    def __init__(self) -> None:
        self._waiting: dict[threading.Semaphore, Callable[[], bool]] = {}  # gates and conditions
        self._joins: set[threading.Semaphore] = set()  # gates of those whose parts run
        self._failure: BaseException | None = None
        self._is_stuck = False

    def wait_until(self, ready: Callable[[], bool]) -> bool:
        """Return once `ready` holds, the others running meanwhile; False when none can go on."""
        return ready() or self._wait(threading.Semaphore(0), ready)

    def _wait(self, gate: threading.Semaphore, ready: Callable[[], bool]) -> bool:
        self._waiting[gate] = ready
        if not self._pass_on():
            del self._waiting[gate]
            return False
        gate.acquire()
        if self._failure is not None:
            raise Stopped("another strand has failed")
        return not self._is_stuck

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run the parts, each until it waits; return when all have ended.

        Raises:
            BaseException: what the first part that failed raised.
        """
        left = set(range(len(parts)))
        own = threading.Semaphore(0)
        self._joins.add(own)
        threads = []
        for number, part in enumerate(parts):
            gate = threading.Semaphore(0)
            self._waiting[gate] = lambda: True
            run = contextvars.copy_context().run
            arguments = (run, self._strand, part, gate, left, number)
            threads.append(threading.Thread(target=_call, args=arguments, daemon=True))
            threads[-1].start()
        with contextlib.suppress(Stopped):  # the failure is raised below
            self._wait(own, lambda: not left)
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _strand(
        self, part: Callable[[], None], gate: threading.Semaphore, left: set[int], number: int
    ) -> None:
        gate.acquire()
        try:
            if self._failure is None:
                part()
        except Stopped:
            pass  # of the strand that failed, which has said why
        except BaseException as error:  # raised again by `run`
            self._failure = self._failure or error
        left.discard(number)
        if self._failure is not None:
            for other in list(self._waiting):
                self._release(other)
        elif not self._pass_on():
            self._is_stuck = True  # who has waited longest says for what
            self._release(next(gate for gate in self._waiting if gate not in self._joins))

    def _pass_on(self) -> bool:
        """Give the turn to the first that can go on."""
        for gate, ready in self._waiting.items():
            if ready():
                self._release(gate)
                return True
        return False

    def _release(self, gate: threading.Semaphore) -> None:
        self._waiting.pop(gate, None)
        gate.release()


def _call(run: Callable[..., None], *arguments: object) -> None:
    run(*arguments)
