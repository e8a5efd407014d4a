"""What is promised of money."""

from __future__ import annotations

from typing import Final

from tests.proof import aborts, budget, events, oracle, partition, retries, tampering
from tests.proof.registry import Scenario

_ADDS_UP: Final = "events in any order, repeated, by several posters at once: each counted once, and every sum exact"
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
        "money.budget_race",
        "of 500 callers at once on a budget for 100, over three gateways, exactly 100 are admitted",
        budget.budget_race,
    ),
    Scenario(
        "money.budget_reuse",
        "what is held and not spent is usable again, to 95 % of the budget, and nobody is refused falsely",
        budget.budget_reuse,
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
    Scenario(
        "money.partition",
        "while metering stands still nobody gets more than was leased, and what crashed gateways had leased comes back",
        partition.partition,
    ),
    Scenario("money.ledger_events_sqlite", f"{_ADDS_UP}, on SQLite", events.on_sqlite),
    Scenario("money.ledger_events_postgres", f"{_ADDS_UP}, on PostgreSQL", events.on_postgres),
)
