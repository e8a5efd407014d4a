"""Files of `sluice usage export`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from services.cli import export
from services.cli.app import app
from services.runtime.errors import Failure
from sluice.metering.v1 import usage_service_pb2


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_a_text_that_is_a_formula_is_neutralised_and_a_number_is_not(text: str) -> None:
    file = io.BytesIO()
    entry = usage_service_pb2.LedgerEntry(sequence=1, model=text, amount_nano_usd=-5, flags=["a", "b"])
    with export.writer_of("csv", file) as write:
        write(export.row_of(entry))
    (row,) = csv.DictReader(io.StringIO(file.getvalue().decode(), newline=""))
    assert (row["model"], row["amount_nano_usd"], row["flags"]) == (f"'{text}", "-5", "a,b")


def test_texts_with_quotes_and_line_ends_come_back_whole() -> None:
    texts = ['a"b', "a\rb", "a\r\nb", "a,b", "a\nb", "ä", " =x", ""]
    for kind in export.FORMATS:
        file = io.BytesIO()
        with export.writer_of(kind, file) as write:
            for text in texts:
                write(export.row_of(usage_service_pb2.LedgerEntry(model=text)))
        if kind == "parquet":
            rows = parquet.read_table(io.BytesIO(file.getvalue())).to_pylist()
        else:
            read = io.StringIO(file.getvalue().decode(), newline="")
            rows = list(csv.DictReader(read)) if kind == "csv" else [json.loads(line) for line in file.getvalue().splitlines()]
        assert [row["model"] for row in rows] == texts


def test_parquet_has_types_and_groups_of_bounded_size() -> None:
    file = io.BytesIO()
    most = (1 << 63) - 1
    with export.writer_of("parquet", file) as write:
        for number in range(20_001):
            write(export.row_of(usage_service_pb2.LedgerEntry(sequence=number, amount_nano_usd=most, model="=1")))
    read = parquet.ParquetFile(io.BytesIO(file.getvalue()))
    assert [read.metadata.row_group(number).num_rows for number in range(read.num_row_groups)] == [10_000, 10_000, 1]
    table = read.read(["sequence", "amount_nano_usd", "model"]).to_pylist()
    assert [row["sequence"] for row in table] == list(range(20_001))
    assert (table[-1]["amount_nano_usd"], table[-1]["model"]) == (most, "=1")


def test_a_value_that_a_newer_server_has_stays_a_number() -> None:
    entry = usage_service_pb2.LedgerEntry()
    entry.MergeFromString(b"\x98\x01\x63")
    assert export.row_of(entry)["task_type"] == "99"


def test_a_file_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "usage.csv"
    target.write_text("before")
    with pytest.raises(RuntimeError), export.whole(str(target)) as file:
        file.write(b"half")
        file.flush()
        assert target.read_text() == "before"
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("usage.csv", "before")]
    with export.whole(str(target)) as file:
        file.write(b"all")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("usage.csv", "all")]


def test_a_folder_that_is_not_there_and_another_format_are_refused() -> None:
    with pytest.raises(Failure, match="can't be written"), export.whole("/nowhere/at/all.csv"):
        pass
    with pytest.raises(Failure, match="can't be written"), export.whole("/"):
        pass
    ended = CliRunner().invoke(app, ["usage", "export", "--format", "xls", "--output", "-"])
    assert isinstance(ended.exception, Failure)
    assert ended.exception.metadata["field"] == "--format"
