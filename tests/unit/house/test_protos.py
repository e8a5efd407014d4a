"""The contracts: generated code is fresh, the protos keep their rules, and a change that would break a client is caught."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.runtime.errors import Reason
from services.runtime.settings import SERVICES
from sluice.errors.v1 import error_reason_pb2

ROOT = Path(__file__).resolve().parents[3]
BUF = Path(sys.executable).with_name("buf")


def buf(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BUF), *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The protos in a place where they may be spoilt."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copytree(ROOT / ".cache" / "protos", tmp_path / ".cache" / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def test_generated_code_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.generate", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_stale_generated_code_is_noticed(tmp_path: Path) -> None:
    spoilt = tmp_path / "checkout"
    shutil.copytree(ROOT, spoilt, ignore=shutil.ignore_patterns(".git", ".venv", ".cache", "node_modules", "__pycache__"))
    command = [sys.executable, "-m", "tools.generate", "--check"]
    fresh = subprocess.run(command, cwd=spoilt, capture_output=True, text=True, timeout=120, check=False)
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr
    proto = spoilt / "protos" / "sluice" / "routing" / "v1" / "routing_service.proto"
    proto.write_text(
        proto.read_text().replace("string tenant_id = 1;", "string tenant_id = 1;\n  // New.\n  string extra = 99;", 1)
    )
    done = subprocess.run(
        [sys.executable, "-m", "tools.generate", "--check"],
        cwd=spoilt,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0


def test_the_protos_pass_lint_and_break_nobody(copy: Path) -> None:
    for arguments in (("lint",), ("breaking", "protos", "--against", str(ROOT / "protos" / "baseline.binpb"))):
        done = buf(*arguments, cwd=copy)
        assert done.returncode == 0, done.stdout + done.stderr


BREAKS: list[tuple[str, Callable[[str], str]]] = [
    ("a field is renamed", lambda text: text.replace("string operation_id = 1;", "string operation_identity = 1;", 1)),
    ("a field changes its number", lambda text: text.replace("string operation_id = 1;", "string operation_id = 77;", 1)),
    ("a field changes its type", lambda text: text.replace("string operation_id = 1;", "int64 operation_id = 1;", 1)),
    ("a method goes", lambda text: re.sub(r"\n(  //[^\n]*\n)+  rpc ReportOutcome[^\n]*", "", text, count=1)),
]


@pytest.mark.parametrize(("name", "spoil"), BREAKS, ids=[name for name, _ in BREAKS])
def test_a_planted_break_is_caught(copy: Path, name: str, spoil: Callable[[str], str]) -> None:
    proto = copy / "protos" / "sluice" / "inference" / "v1" / "inference_service.proto"
    before = proto.read_text()
    proto.write_text(spoil(before))
    assert proto.read_text() != before, f"{name}: the break was not planted"
    done = buf("breaking", "protos", "--against", str(ROOT / "protos" / "baseline.binpb"), cwd=copy)
    assert done.returncode != 0
    assert "inference_service.proto" in done.stdout + done.stderr


def test_a_comment_that_is_missing_is_caught(copy: Path) -> None:
    proto = copy / "protos" / "sluice" / "inference" / "v1" / "inference_service.proto"
    proto.write_text(proto.read_text() + "\nmessage Bare {\n  string value = 1;\n}\n")
    assert buf("lint", cwd=copy).returncode != 0


def test_reasons_of_the_proto_and_of_the_code_are_the_same() -> None:
    named = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118  # no mapping
    assert named == {reason.value for reason in Reason}


def test_every_service_has_its_package() -> None:
    for service in SERVICES:
        assert (ROOT / "services" / service / "__main__.py").is_file(), service
