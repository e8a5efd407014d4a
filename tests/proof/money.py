"""What is promised of money."""

from __future__ import annotations

from typing import Final

from tests.proof import aborts, oracle, retries, tampering
from tests.proof.registry import Scenario

_FINDS: Final = "`ledger verify` finds a changed byte, a removed row, swapped rows, and against a kept head a cut tail"

SCENARIOS: Final = (
    Scenario("money.ledger_tampering_sqlite", f"{_FINDS}, on SQLite", tampering.on_sqlite),
    Scenario("money.ledger_tampering_postgres", f"{_FINDS}, on PostgreSQL", tampering.on_postgres),
    Scenario(
        "money.oracle_kills",
        "while every process is killed, each answer is booked as its provider billed it",
        oracle.oracle_kills,
    ),
    Scenario(
        "money.client_retries",
        "callers that break off, mid-stream too, and ask again with their key cause one provider call and one charge each",
        retries.client_retries,
    ),
    Scenario(
        "money.aborts",
        "requests that are cancelled, left, failed, late or killed leave nothing held, and cause no refusal",
        aborts.aborts,
    ),
    Scenario(
        "money.disconnects",
        "a stream that is left after any of its chunks is charged once, by the rule of its provider",
        aborts.disconnects,
    ),
)
