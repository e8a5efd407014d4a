"""Limits on the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from services.cli import accounts
from services.cli.app import app
from services.runtime.errors import Failure, Reason
from sluice.metering.v1 import tenancy_service_pb2


def test_limits_of_models_are_read_and_told() -> None:
    texts = ["openai/gpt:requests=60,tokens=-1", "http://odd:name: concurrency=5"]
    limits = accounts._limits("0.5", 10, None, None, texts)
    assert limits == tenancy_service_pb2.Limits(
        budget_nano_usd=500_000_000,
        requests_per_minute=10,
        models=[
            tenancy_service_pb2.ModelLimits(model="openai/gpt", requests_per_minute=60, tokens_per_minute=-1),
            tenancy_service_pb2.ModelLimits(model="http://odd:name", concurrency=5),
        ],
    )
    words = accounts._limit_words(limits)
    assert words == "$0.50, 10 req/min, openai/gpt: 60 req/min + unlimited tokens/min, http://odd:name: 5 at once"


@pytest.mark.parametrize(
    "text", ["openai/gpt", "openai/gpt:", ":requests=1", "m:requests", "m:requests=x", "m:requests=--1", "m:rpm=1"]
)
def test_a_limit_that_is_none_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(Failure) as refused:
        accounts._limits(None, None, None, None, [text])
    assert refused.value.reason is Reason.REQUEST_INVALID
    assert "MODEL:LIMITS" in refused.value.message


def test_it_is_in_the_help_of_all_that_take_limits() -> None:
    for command in (["tenants", "create"], ["tenants", "update"], ["keys", "create"]):
        result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert "--model-limit" in result.stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2026-11-23", 1_795_392_000), ("2026-11-23T17:00:00Z", 1_795_453_200), ("2026-11-23T17:00:00+01:00", 1_795_449_600)],
)
def test_a_moment_is_of_utc_unless_it_says_otherwise(text: str, seconds: int) -> None:
    assert accounts.moment(text, "--start").seconds == seconds


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "23.11.2026", "1700000000000"])
def test_a_moment_that_is_none_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(Failure) as refused:
        accounts.moment(text, "--end")
    assert refused.value.metadata["field"] == "--end"
    assert "2026-11-23T17:00:00Z" in refused.value.message


@pytest.mark.parametrize("options", [["--task-type", "2"], ["--task-type", "unspecified"], ["--by", "color"], ["--start", "x"]])
def test_a_filter_of_usage_that_is_none_is_refused_before_any_call(options: list[str]) -> None:
    ended = CliRunner().invoke(app, ["usage", *options])
    assert isinstance(ended.exception, Failure)
    assert ended.exception.metadata["field"] == options[0]
