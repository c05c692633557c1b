"""Options: of the environment as it is now, or of the innermost block."""

from __future__ import annotations

import os
import threading

import pytest

from tilejit import config, options


def test_environment_is_followed_when_it_changes(monkeypatch):
    assert config.current() == config.from_environment(os.environ)
    monkeypatch.setenv("TILEJIT_TARGET", "sm_86")
    assert config.current().target == "sm_86"
    monkeypatch.setenv("TILEJIT_TARGET", "sm_89")
    monkeypatch.setenv("TILEJIT_VERIFY", "0")
    assert (config.current().target, config.current().verify) == ("sm_89", False)
    monkeypatch.delenv("TILEJIT_TARGET")
    assert config.current().target == ""


def test_environment_is_parsed_once_while_it_stays(monkeypatch):
    monkeypatch.setenv("TILEJIT_TARGET", "sm_86")
    first = config.current()
    monkeypatch.setenv("TILEJIT_UNRELATED", "1")
    assert config.current() is first


def test_another_environment_in_its_place_is_followed(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TILEJIT_TARGET": "sm_90"})
    assert config.current().target == "sm_90"


def test_block_wins_over_the_environment_in_its_own_thread(monkeypatch):
    monkeypatch.setenv("TILEJIT_TARGET", "sm_86")
    seen = []
    with options(target="sm_90"):
        thread = threading.Thread(target=lambda: seen.append(config.current().target))
        thread.start()
        thread.join()
        seen.append(config.current().target)
    seen.append(config.current().target)
    assert seen == ["sm_86", "sm_90", "sm_86"]


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="verbose"), options(verbose=True):
        pass
