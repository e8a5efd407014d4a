"""`sluice usage export`: entries of the journal as a file, a page in memory at a time."""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, TextIO

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from services.cli.accounts import moment
from services.cli.client import failures, pages
from services.cli.session import Session, StateDirOption, TimeoutOption
from services.runtime.errors import invalid
from sluice.inference.v1 import answer_pb2, receipt_pb2
from sluice.metering.v1 import usage_service_pb2 as usage_pb2

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""
_GROUP_ROWS: Final = 10_000
"""Rows in memory, and in a row group of Parquet."""


def _name(enum: Any, number: int, prefix: str) -> str:
    """A newer server's value, which has no name here, stays a number."""
    return enum.Name(number).removeprefix(prefix).lower() if number in enum.values() else str(number)


def row_of(entry: usage_pb2.LedgerEntry) -> dict[str, str | int]:
    """Columns of an entry: amounts in nano-dollars, moments as ISO 8601 in UTC, enums by name."""
    usage = entry.usage
    return {
        "sequence": entry.sequence,
        "attempt_id": entry.attempt_id,
        "operation_id": entry.operation_id,
        "start_time": entry.start_time.ToJsonString(),
        "post_time": entry.post_time.ToJsonString(),
        "tenant_id": entry.tenant_id,
        "project_id": entry.project_id,
        "key_id": entry.key_id,
        "model": entry.model,
        "provider": entry.provider,
        "task_type": _name(receipt_pb2.TaskType, entry.task_type, "TASK_TYPE_"),
        "outcome": _name(receipt_pb2.AttemptOutcome, entry.outcome, "ATTEMPT_OUTCOME_"),
        "cache_status": _name(receipt_pb2.CacheStatus, entry.cache_status, "CACHE_STATUS_"),
        "attempt_number": entry.attempt_number,
        "debit_account": entry.debit_account,
        "credit_account": entry.credit_account,
        "amount_nano_usd": entry.amount_nano_usd,
        "saved_nano_usd": entry.saved_nano_usd,
        "input_token_count": usage.input_token_count,
        "cached_input_token_count": usage.cached_input_token_count,
        "cache_write_token_count": usage.cache_write_token_count,
        "output_token_count": usage.output_token_count,
        "reasoning_token_count": usage.reasoning_token_count,
        "image_count": usage.image_count,
        "usage_source": _name(answer_pb2.UsageSource, usage.source, "USAGE_SOURCE_"),
        "price_version": entry.price_version,
        "flags": ",".join(entry.flags),
    }


def neutral(cell: str | int) -> str | int:
    """A cell that no spreadsheet runs: a text that begins as a formula does gets an apostrophe before it. Numbers stay."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


Row = dict[str, str | int]
Write = Callable[[Row], object]


@contextlib.contextmanager
def _text(file: BinaryIO) -> Iterator[TextIO]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
        text.flush()
    finally:
        # The file is its owner's to close.
        text.detach()


@contextlib.contextmanager
def _csv(file: BinaryIO) -> Iterator[Write]:
    with _text(file) as text:
        writer = csv.writer(text)
        writer.writerow(row_of(usage_pb2.LedgerEntry()))
        yield lambda row: writer.writerow([neutral(cell) for cell in row.values()])


@contextlib.contextmanager
def _jsonl(file: BinaryIO) -> Iterator[Write]:
    with _text(file) as text:
        yield lambda row: text.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _parquet(file: BinaryIO) -> Iterator[Write]:
    arrow, parquet = _arrow()
    types = {str: arrow.string(), int: arrow.int64()}
    schema = arrow.schema([(name, types[type(value)]) for name, value in row_of(usage_pb2.LedgerEntry()).items()])
    rows: list[Row] = []
    with parquet.ParquetWriter(file, schema) as writer:

        def write(row: Row) -> None:
            rows.append(row)
            if len(rows) == _GROUP_ROWS:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows.clear()

        yield write
        if rows:
            writer.write_table(arrow.Table.from_pylist(rows, schema))


def _arrow() -> tuple[Any, Any]:
    """Raises Failure (REQUEST_INVALID) where the library isn't installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise invalid(
            "--format", "parquet needs pyarrow; install Sluice with its extra `parquet`, or pyarrow beside it"
        ) from None


_WRITERS: Final = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}
FORMATS: Final = tuple(_WRITERS)


def writer_of(kind: str, file: BinaryIO) -> contextlib.AbstractContextManager[Write]:
    """What writes rows into `file`, which is complete at its end. `kind` is of FORMATS. Raises Failure (REQUEST_INVALID)."""
    return _WRITERS[kind](file)


@contextlib.contextmanager
def whole(target: str) -> Iterator[BinaryIO]:
    """A file that has the name `target` once it is whole and on the disk; `-` is standard output. What failed leaves nothing behind."""
    if target == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(target)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise invalid("--output", f"{target!r} can't be written: {error.strerror}") from None
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            Path(temporary).replace(path)
        except OSError as error:
            raise invalid("--output", f"{target!r} can't be written: {error.strerror}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def command(
    output: Annotated[str, typer.Option("--output", "-o", help="File to write, `-` for standard output.", metavar="FILE")],
    kind: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = "csv",
    tenant: Annotated[str, typer.Option(help="Only this tenant; all when empty.")] = "",
    start: Annotated[str, typer.Option(help="Attempts from this moment on, say 2026-11-01; from the first when empty.")] = "",
    end: Annotated[str, typer.Option(help="Attempts before this moment; now when empty.")] = "",
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 60.0,
) -> None:
    """Writes the journal's entries of a time, oldest first, one a row. Parquet needs the extra `parquet`.

    Amounts are whole nano-dollars. In CSV a text that a spreadsheet would run as a formula has an apostrophe before it.

    Example: `sluice usage export --format csv --start 2026-11-01 --end 2026-12-01 --output november.csv`.
    """
    if kind not in FORMATS:
        raise invalid("--format", f"{kind!r} is not one of {', '.join(FORMATS)}")
    first = moment(start, "--start") if start else None
    # Fixed, so that an export under load ends.
    last = moment(end or datetime.datetime.now(datetime.UTC).isoformat(), "--end")
    request = usage_pb2.ListEntriesRequest(tenant_id=tenant, oldest_first=True, start_time=first, end_time=last)
    columns: tuple[Any, ...] = (TextColumn("exporting"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Session(state_dir, timeout) as session:
        client = session.client
        with failures():
            head = client.usage.GetLedgerHead(usage_pb2.GetLedgerHeadRequest(), timeout=timeout, metadata=client.as_admin).head
        with (
            whole(output) as file,
            Progress(*columns, console=session.errors, transient=True, disable=not session.errors.is_terminal) as progress,
            contextlib.ExitStack() as stack,
        ):
            task = progress.add_task("", total=head.sequence)
            write = stack.enter_context(writer_of(kind, file))
            for page in pages(client.usage.ListEntries, request, client.as_admin, timeout):
                for entry in page.entries:
                    write(row_of(entry))
                if page.entries:
                    progress.update(task, completed=page.entries[-1].sequence)
