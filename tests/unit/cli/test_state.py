"""Which mesh a command is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.state import READY_NAME, Ready
from services.runtime.errors import Failure

ADDRESSES = {f"SLUICE_{name}": f"far:{port}" for port, name in enumerate(("GATEWAY", "BATCHING", "METERING", "EXECUTION"))}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mesh that runs with the default state directory."""
    monkeypatch.delenv("SLUICE_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    Ready("http://here", {"metering": "here:1"}, {}, {}, "key", "admin").write(tmp_path / "sluice" / READY_NAME)
    return tmp_path


def test_without_anything_it_is_the_one_that_runs_here(here: Path) -> None:
    assert Ready.found(None, {"HOME": "/x"}).http == "http://here"


def test_addresses_in_the_environment_come_before_what_runs_here(here: Path) -> None:
    found = Ready.found(None, {**ADDRESSES, "SLUICE_URL": "http://far", "SLUICE_ADMIN_KEY": "a"})
    assert (found.http, found.grpc["metering"], found.admin_key, found.key) == ("http://far", "far:2", "a", "")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_named_state_directory_comes_before_them(here: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    named = here / "named"
    Ready("http://named", {}, {}, {}, "key", "admin").write(named / READY_NAME)
    if how == "option":
        assert Ready.found(named, ADDRESSES).http == "http://named"
    else:
        monkeypatch.setenv("SLUICE_STATE_DIR", str(named))
        assert Ready.found(None, {**ADDRESSES, "SLUICE_STATE_DIR": str(named)}).http == "http://named"


def test_half_of_the_addresses_are_no_mesh(here: Path) -> None:
    with pytest.raises(Failure, match="SLUICE_BATCHING, SLUICE_METERING, SLUICE_EXECUTION must be set, too"):
        Ready.found(None, {"SLUICE_GATEWAY": "far:1"})


def test_where_nothing_runs_the_failure_says_how_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(Failure, match="sluice up"):
        Ready.found(None, {})
