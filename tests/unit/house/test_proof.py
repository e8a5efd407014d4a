"""What the measured claims are judged by finds what they forbid."""

from __future__ import annotations

import pytest

from sluice.inference.v1 import answer_pb2
from sluice.metering.v1 import usage_service_pb2
from tests.proof.aborts import wrong_entries
from tests.proof.partition import excess


def test_a_bucket_that_fills_in_a_minute_is_exceeded_by_nobody_who_keeps_to_it() -> None:
    assert excess([], 60) == 0.0
    assert excess([5.0] * 60, 60) == 0.0
    assert excess([5.0] * 60 + [5.0 + second for second in range(1, 100)], 60) == pytest.approx(0.0)


def test_what_is_beyond_the_bucket_counts_in_the_worst_span() -> None:
    assert excess([5.0] * 61, 60) == pytest.approx(1.0)
    # A slow hour before, and after, makes it no better.
    slow = [60.0 * minute for minute in range(60)]
    assert excess([*slow, *[3600.0] * 63, *(3600.0 + at for at in slow[1:])], 60) == pytest.approx(3.0)


def entry(tokens: int, source: int, amount: int) -> usage_service_pb2.LedgerEntry:
    usage = answer_pb2.Usage(output_token_count=tokens, source=source)  # type: ignore[arg-type]
    return usage_service_pb2.LedgerEntry(amount_nano_usd=amount, usage=usage)


def test_a_left_stream_has_one_entry_by_the_rule_of_its_provider() -> None:
    counted, reported = answer_pb2.USAGE_SOURCE_ESTIMATED, answer_pb2.USAGE_SOURCE_REPORTED
    assert not wrong_entries("cut", 7, [entry(9, counted, 9000)])
    assert not wrong_entries("drained", 7, [entry(77, reported, 77_000)])
    assert not wrong_entries("drained zero", 7, [entry(0, reported, 0)])
    assert wrong_entries("cut", 7, [])
    assert wrong_entries("cut", 7, [entry(9, counted, 9000)] * 2)
    assert wrong_entries("cut", 7, [entry(9, counted, 9001)])
    assert wrong_entries("cut", 7, [entry(9, reported, 9000)])
    assert wrong_entries("drained", 7, [entry(9, counted, 9000)])
    assert wrong_entries("drained zero", 7, [entry(3, reported, 3000)])
