"""What is promised of money."""

from __future__ import annotations

from typing import Final

from tests.proof import budget, oracle, retries, tampering
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
)
