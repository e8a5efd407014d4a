"""The rules of money that hold whatever the store."""

from __future__ import annotations

from services.metering.ledger import GENESIS, chained
from tests.conformance.ledger.examples import settlement


def test_the_hash_of_an_entry_without_our_own_counts_is_what_it_was_before_there_were_any() -> None:
    """By the code of before: ledgers of that time must verify."""
    entry = settlement("op-1/1", amount=7, observed=(None, None)).entry
    first = chained(GENESIS, entry)
    assert (first.hex(), chained(first, entry).hex()) == (
        "7c4efe52347d3fd8557e27116badb142",
        "91ff7874f41ce12b0dae16e6ff385976",
    )


def test_each_of_our_own_counts_changes_the_hash() -> None:
    counts = ((None, None), (None, 0), (0, None), (0, 0), (None, 1), (1, None), (1, 0), (0, 1))
    hashes = {chained(GENESIS, settlement("op-1/1", amount=7, observed=one).entry) for one in counts}
    assert len(hashes) == len(counts)
