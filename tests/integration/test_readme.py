"""Every command of the README works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, Running

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = [body for kind, body in BLOCKS if kind == "sh"]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]


@pytest.fixture
def environment(mesh: Running, tmp_path: Path) -> dict[str, str]:
    """That of a person who started `sluice up` with this state directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLUICE_", "OPENAI_", "ANTHROPIC_"))}
    return {**kept, "SLUICE_STATE_DIR": str(mesh.directory), "HOME": str(tmp_path)}


def run(script: str, environment: dict[str, str]) -> str:
    """What a script prints; it stops at the first command that fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_the_readme_has_what_a_newcomer_needs() -> None:
    head = README.split("## Run it in production")[0]
    assert len(head.splitlines()) <= 80, "one screen, more or less"
    assert {"make demo", "make test"} <= {
        line.split("#")[0].strip() for kind, body in BLOCKS if kind == "console" for line in body.splitlines()
    }
    for word in ("curl", "grpcurl", "jobs submit", "sluice env"):
        assert any(word in block for block in SHELL), word


def test_shell_blocks_run(environment: dict[str, str]) -> None:
    assert SHELL
    for block in SHELL:
        printed = run(block, environment)
        assert '"chat.completion"' in printed
        assert '"operation_id"' in printed


@pytest.mark.parametrize("block", PYTHON, ids=["openai", "stub"])
def test_python_blocks_run(environment: dict[str, str], block: str) -> None:
    exports = run('PATH=$PWD/.venv/bin:$PATH; eval "$(sluice env --sdk)"; env -0 | base64 -w0', environment)
    import base64

    shown = dict(line.split("=", 1) for line in base64.b64decode(exports).decode().split("\0") if "=" in line)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, env=shown, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_every_make_task_that_is_named_exists() -> None:
    tasks = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert named <= tasks, named - tasks


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"`((?:deploy|services|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
