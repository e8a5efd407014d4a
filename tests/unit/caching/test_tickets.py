from __future__ import annotations

import pytest

from services.caching.errors import TicketInvalid
from services.caching.tickets import MAX_BYTES, Pending, Tickets

WHOSE = b"t" * 16


def issue(tickets: Tickets, namespace: str = "default") -> bytes:
    return tickets.issue(WHOSE, namespace, b"k" * 32, b"s" * 16, 1_700_000_000.25, 60.0)


def test_another_replica_with_the_token_reads_it() -> None:
    ticket = Tickets("token").read(issue(Tickets("token"), "n" * 64), WHOSE)
    assert (ticket.key, ticket.scope, ticket.namespace, ticket.ttl) == (b"k" * 32, b"s" * 16, "n" * 64, 60.0)
    assert ticket.create_time == pytest.approx(1_700_000_000.25)
    assert len(issue(Tickets("token"), "n" * 64)) <= MAX_BYTES


def test_no_bit_can_be_changed() -> None:
    tickets = Tickets("token")
    good = issue(tickets)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        with pytest.raises(TicketInvalid):
            tickets.read(bytes(bad), WHOSE)


@pytest.mark.parametrize("bad", [b"", b"x", b"x" * 16, b"x" * 105, b"x" * 1000])
def test_what_is_no_ticket_is_refused(bad: bytes) -> None:
    with pytest.raises(TicketInvalid):
        Tickets("token").read(bad, WHOSE)


def test_other_tenants_and_other_meshes_are_refused() -> None:
    good = issue(Tickets("token"))
    with pytest.raises(TicketInvalid):
        Tickets("token").read(good, b"u" * 16)
    for other in (Tickets("other"), Tickets("")):
        with pytest.raises(TicketInvalid):
            other.read(good, WHOSE)
    with pytest.raises(TicketInvalid):
        Tickets("").read(issue(Tickets("")), WHOSE)


def test_pending_questions_are_bounded_by_number_and_size() -> None:
    pending = Pending(3, 100)
    for number in range(5):
        pending.put(bytes([number]) * 20, "q" * 10)
    assert len(pending) == 3
    assert pending.take(b"\x00" * 20) is None
    assert pending.take(b"\x04" * 20) == "q" * 10
    assert pending.take(b"\x04" * 20) is None
    pending.put(b"\x09" * 20, "q" * 95)
    assert len(pending) == 1
    pending.put(b"\x08" * 20, "q" * 101)
    assert len(pending) == 0


def test_the_same_ticket_twice_is_counted_once() -> None:
    pending = Pending(10, 100)
    for _ in range(20):
        pending.put(b"\x01" * 20, "q" * 60)
    assert pending.take(b"\x01" * 20) == "q" * 60
