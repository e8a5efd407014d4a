"""Files that are derived from others are fresh, and what must not stand in a commit doesn't."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def test_the_example_of_the_settings_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.example", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_locks_have_hashes_and_name_no_index() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text()
        packages = re.findall(r"^([a-z0-9][a-z0-9._-]*)==", text, re.MULTILINE | re.IGNORECASE)
        assert len(packages) > 30
        assert text.count("--hash=sha256:") >= len(packages)
        assert "index-url" not in text
        assert "://" not in "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def test_every_dependency_says_why_it_is_there() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("dependencies = ["))
    above = ""
    for line in lines[start + 1 :]:
        stripped = line.strip()
        if stripped.startswith("[tool"):
            break
        if stripped.startswith('"'):
            assert above.startswith(("#", '"')), f"{stripped}: say why"
        above = stripped


def test_every_make_task_has_a_help_line() -> None:
    text = (ROOT / "Makefile").read_text()
    tasks = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    helped = re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE)
    assert set(tasks) == set(helped)
    assert {"demo", "up", "test", "check", "bench", "gen", "proof", "install"} <= set(tasks)


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "helpers", "common", "misc", "base", "manager"}
    assert [path for path in tracked() if path.suffix == ".py" and path.stem in empty] == []


def test_no_large_or_foreign_file_is_tracked() -> None:
    for path in tracked():
        assert "node_modules" not in path.parts
        if path.is_file():
            assert path.stat().st_size < 1_000_000, path
