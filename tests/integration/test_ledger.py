"""`sluice ledger` as a person runs it, against a running Sluice and beside a stopped one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.client import Client, failures
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from tests.running import ROOT, Running


def sluice(*arguments: str, state: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "ledger", *arguments],
        cwd=ROOT,
        env={**os.environ, "SLUICE_STATE_DIR": str(state)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def asked(client: Client, text: str) -> str:
    request = inference_service_pb2.GenerateRequest(
        conversation=conversation_pb2.Conversation(
            messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)])]
        ),
        routing=inference_service_pb2.RoutingWishes(model="echo/echo"),
    )
    with failures():
        return client.inference.Generate(request, timeout=30, metadata=client.as_tenant).operation_id


def test_the_head_is_kept_and_the_ledger_verified_against_it(mesh: Running, client: Client) -> None:
    asked(client, "Something to be booked.")
    printed = sluice("head", state=mesh.directory)
    assert (printed.returncode, printed.stderr) == (0, "")
    head = printed.stdout.strip()
    number, _, digits = head.partition(":")
    assert int(number) > 0
    assert len(bytes.fromhex(digits)) == 16
    checked = sluice("verify", "--head", head, state=mesh.directory)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "the books are right" in checked.stdout
    as_json = json.loads(sluice("verify", "--json", state=mesh.directory).stdout)
    assert as_json["ok"] is True
    assert as_json["problems"] == []
    # Another hash at its place, and a place that isn't there: both are what a ledger written anew looks like.
    other = f"{number}:{'00' * 16}"
    beyond = f"{int(number) + 1_000_000}:{digits}"
    for wrong, words in ((other, "is not the one whose hash was kept"), (beyond, "are missing")):
        refused = sluice("verify", "--head", wrong, state=mesh.directory)
        assert refused.returncode == 3
        assert words in refused.stdout


@pytest.mark.parametrize(
    ("given", "words"),
    [("nonsense", "SEQUENCE:HASH"), ("7:abc", "SEQUENCE:HASH"), ("7:abcd", "must have 16 bytes"), ("-1:00", "SEQUENCE:HASH")],
)
def test_what_is_no_head_is_refused_by_name(mesh: Running, given: str, words: str) -> None:
    refused = sluice("verify", f"--head={given}", state=mesh.directory)
    assert refused.returncode == 1
    assert words in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_backup_of_the_running_ledger_is_checked_and_can_be_restored_elsewhere(
    mesh: Running, client: Client, tmp_path: Path
) -> None:
    asked(client, "Something else to be booked.")
    copy = tmp_path / "copy.db"
    made = sluice("backup", str(copy), state=mesh.directory)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "the books are right" in made.stdout
    head = made.stdout.split()[-1]
    # What the copy ends with, the ledger has.
    assert sluice("verify", "--head", head, state=mesh.directory).returncode == 0
    assert sluice("verify", "--file", str(copy), "--head", head, state=tmp_path).returncode == 0
    again = sluice("backup", str(copy), state=mesh.directory)
    assert again.returncode == 1
    assert "there already" in again.stdout + again.stderr
    # In use: refused.
    refused = sluice("restore", str(copy), state=mesh.directory)
    assert refused.returncode == 1
    assert "another metering process" in refused.stdout + refused.stderr
    restored = sluice("restore", str(copy), state=tmp_path / "new")
    assert restored.returncode == 0, restored.stdout + restored.stderr
    assert head in restored.stdout
    assert sluice("verify", "--file", str(tmp_path / "new" / "metering" / "ledger.db"), state=tmp_path).returncode == 0
