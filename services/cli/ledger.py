"""`sluice ledger`: whether the books are what they were, and copies of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from services.cli.client import failures
from services.cli.rendering import money, open_console
from services.cli.session import JsonOption, Session, StateDirOption
from services.cli.state import default_state_dir
from services.metering.adapters import sqlite_files
from services.metering.adapters.sqlite import FILE_NAME
from services.metering.app import NAME as METERING
from services.metering.ledger import Head
from services.metering.proto import head_from_proto, verdict_to_proto
from services.runtime.errors import invalid
from sluice.metering.v1 import usage_service_pb2

ledger = typer.Typer(
    no_args_is_help=True, help="The ledger: its head to be kept elsewhere, the check of all its entries, backup and restore."
)

_LONGEST = 19
_WRONG = 3
"""Exit code: told apart from 1, with which every command says that it could not do what it was asked."""
TimeoutOption = Annotated[
    float, typer.Option("--timeout", help="Seconds that the check may take; it reads every entry.", min=0.001)
]


def head_of(text: str) -> usage_service_pb2.LedgerHead:
    """The head that `sluice ledger head` printed. Raises Failure (REQUEST_INVALID)."""
    sequence, colon, digits = text.strip().partition(":")
    try:
        if colon and sequence.isascii() and sequence.isdigit() and len(sequence) < _LONGEST:
            return usage_service_pb2.LedgerHead(sequence=int(sequence), hash=bytes.fromhex(digits))
    except ValueError:
        pass
    raise invalid("--head", f"{text!r} is not a head as `sluice ledger head` prints it: SEQUENCE:HASH")


def text_of(head: usage_service_pb2.LedgerHead) -> str:
    """The head as `--head` takes it."""
    return f"{head.sequence}:{head.hash.hex()}"


@ledger.command("head")
def head(
    state_dir: StateDirOption = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that the call may take.", min=0.001)] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Prints the head: the last entry's number and the hash over all. Keep it where who can write to the ledger can't."""
    with Session(state_dir, timeout) as session, failures():
        client = session.client
        request = usage_service_pb2.GetLedgerHeadRequest()
        found = client.usage.GetLedgerHead(request, timeout=timeout, metadata=client.as_admin).head
    # For scripts: nothing else on the line, and never wrapped.
    typer.echo(json.dumps({"head": text_of(found)}) if as_json else text_of(found))


@ledger.command("verify")
def verify(
    expected: Annotated[
        str,
        typer.Option(
            "--head", help="A head that was kept, SEQUENCE:HASH: shows a tail that was cut off, or a ledger written anew."
        ),
    ] = "",
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", help="Check this file, a backup or the ledger of a stopped Sluice, instead of asking a running one."
        ),
    ] = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Checks every entry: the hash chain, the balances, the file. Exit code 3 when the books are wrong."""
    kept = head_of(expected) if expected else None
    console, errors = open_console(), open_console(stderr=True)
    if file is not None:
        known: Head | None = head_from_proto(kept, "--head") if kept is not None else None
        with errors.status("reading every entry"):
            verdict = verdict_to_proto(sqlite_files.verify_file(file, known))
    else:
        request = usage_service_pb2.VerifyLedgerRequest(expected_head=kept)
        with Session(state_dir, timeout) as session, failures(), errors.status("reading every entry"):
            client = session.client
            verdict = client.usage.VerifyLedger(request, timeout=timeout, metadata=client.as_admin)
    if as_json:
        document = MessageToDict(verdict, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        document["head"] = text_of(verdict.head)
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for problem in verdict.problems:
            _say(console, problem)
        _say(console, _summary(verdict))
    if not verdict.ok:
        raise typer.Exit(_WRONG)


@ledger.command("backup")
def backup(
    target: Annotated[Path, typer.Argument(help="File to write; it must not be there yet.", metavar="FILE")],
    state_dir: StateDirOption = None,
) -> None:
    """Copies the ledger while Sluice runs, checks the copy, and prints its head. Runs where the ledger's file is (SQLite)."""
    source = _directory(state_dir) / FILE_NAME
    with _copying("copying") as progress:
        verdict = verdict_to_proto(sqlite_files.backup(source, target, progress))
    console = open_console()
    _say(console, f"{target}: {_summary(verdict)}")


@ledger.command("restore")
def restore(
    source: Annotated[Path, typer.Argument(help="Backup to put in the ledger's place.", metavar="FILE")],
    state_dir: StateDirOption = None,
) -> None:
    """Puts a backup in the place of a stopped Sluice's ledger (SQLite); what was there is kept beside it.

    What was posted after the backup is not in it: those requests were made and are charged to nobody.
    """
    with _copying("restoring") as progress:
        verdict, kept = sqlite_files.restore(source, _directory(state_dir), progress)
    console = open_console()
    _say(console, _summary(verdict_to_proto(verdict)))
    if kept is not None:
        _say(console, f"what was there before is {kept}")


def _directory(state_dir: Path | None) -> Path:
    return (state_dir or default_state_dir()) / METERING


def _summary(verdict: usage_service_pb2.VerifyLedgerResponse) -> str:
    state = "the books are right" if verdict.ok else f"the books are wrong ({len(verdict.problems)} problems)"
    return f"{state}: {verdict.entry_count} entries, {money(verdict.debit_nano_usd)} moved, head {text_of(verdict.head)}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _copying(description: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=open_console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
