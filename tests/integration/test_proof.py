"""The short form of every measured claim, so that CI sees when one no longer holds. `make proof` runs them at full length."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.proof.registry import select
from tests.running import ROOT

NAMES = [scenario.name for scenario in select(())]
# CPU per request depends on what else the machine does: those figures are shown, not judged, here.
JUDGED = [name for name in NAMES if ".bench_" not in name]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.proof", "--short", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("name", JUDGED)
def test_it_holds_in_short(name: str) -> None:
    done = run("--only", name)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert name in done.stdout


def test_the_bench_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--short", "--only", "compact.passthrough", "--only", "ledger"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "compact.passthrough" in done.stdout
    assert "ledger.postgres" in done.stdout
