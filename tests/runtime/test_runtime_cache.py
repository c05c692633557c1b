"""The memory cache under threads."""

from __future__ import annotations

import threading
import time

import pytest

from tilejit.runtime.cache import SignatureCache


def test_value_is_built_once_for_threads_that_ask_together():
    cache: SignatureCache[object] = SignatureCache()
    built = []
    start = threading.Barrier(8)
    results = []

    def build():
        time.sleep(0.02)
        built.append(1)
        return object()

    def ask():
        start.wait()
        results.append(cache.find_or_build("key", build))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(set(map(id, results))) == 1


def test_different_keys_build_at_the_same_time():
    cache: SignatureCache[int] = SignatureCache()
    together = threading.Barrier(2, timeout=5)

    def ask(n):
        cache.find_or_build(n, lambda: together.wait() * 0 + n + 1)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 2


def test_failed_build_leaves_no_entry_and_may_be_tried_again():
    cache: SignatureCache[int] = SignatureCache()

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.find_or_build("key", fail)
    assert cache.find("key") is None
    assert cache.find_or_build("key", lambda: 3) == 3
