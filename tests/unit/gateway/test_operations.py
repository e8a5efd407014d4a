"""Ids, and what makes repeated requests one operation."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.operations import OperationIds, ReplayLimits, Requests, Shared, fingerprint
from services.runtime.errors import Failure, Reason


def requests(
    max_count: int = 3, max_bytes: int = 100, max_seconds: float = 10.0, now: list[float] | None = None
) -> Requests[str]:
    """A table whose clock is `now[0]`."""
    clock = now if now is not None else [0.0]
    return Requests(ReplayLimits(max_count, max_bytes, max_seconds), lambda: clock[0])


def finish(table: Requests[str], request_id: str, result: str, size: int) -> Shared[str]:
    """An operation from begin to end."""
    shared = table.begin("t", request_id, b"body")
    shared.finish(result)
    table.end("t", request_id, shared, size)
    return shared


def test_ids_are_unique_sorted_and_of_the_alphabet() -> None:
    ids = OperationIds()
    made = [ids.create() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert {len(one) for one in made} == {26}
    assert set("".join(made)) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")


def test_ids_sort_by_time_even_when_the_clock_is_set_back() -> None:
    times = iter([1_000_000_000_000, 2_000_000_000_000, 1_500_000_000_000, 3_000_000_000_000])
    ids = OperationIds(lambda: next(times))
    made = [ids.create()[:10] for _ in range(4)]
    assert made == sorted(made)
    assert made[1] == made[2]


def test_two_processes_do_not_meet() -> None:
    assert OperationIds().create()[10:20] != OperationIds().create()[10:20]


def test_running_and_finished_operations_are_found() -> None:
    table = requests()
    shared = table.begin("t", "r", b"body")
    assert table.find("t", "r", b"body") is shared
    assert table.find("other", "r", b"body") is None
    shared.finish("answer")
    table.end("t", "r", shared, 10)
    found = table.find("t", "r", b"body")
    assert found is not None
    assert found.result == "answer"


def test_another_body_is_refused_while_running_and_after() -> None:
    table = requests()
    shared = table.begin("t", "r", b"body")
    for _ in range(2):
        with pytest.raises(Failure) as caught:
            table.find("t", "r", b"other")
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
        shared.finish("answer")
        table.end("t", "r", shared, 1)


def test_failures_are_forgotten() -> None:
    table = requests()
    shared = table.begin("t", "r", b"body")
    shared.fail(Failure(Reason.CANCELLED, "gone"))
    table.end("t", "r", shared, 0)
    assert table.find("t", "r", b"body") is None


def test_memory_is_bounded_by_count_bytes_and_time() -> None:
    now = [0.0]
    table = requests(now=now)
    for number in range(4):
        finish(table, f"r{number}", "x", 10)
    assert table.find("t", "r0", b"body") is None
    assert table.find("t", "r3", b"body") is not None
    finish(table, "large", "x", 95)
    assert table.find("t", "r3", b"body") is None
    finish(table, "too large", "x", 101)
    assert table.find("t", "too large", b"body") is None
    now[0] = 11.0
    assert table.find("t", "large", b"body") is None


def test_what_runs_is_bounded() -> None:
    table = requests(max_count=1)
    table.begin("t", "r1", b"body")
    with pytest.raises(Failure) as caught:
        table.begin("t", "r2", b"body")
    assert caught.value.reason is Reason.OVERLOADED


def test_readers_see_every_piece_from_the_first() -> None:
    shared: Shared[str] = Shared(b"f")
    shared.add("a", 1)
    with shared.read() as reader:
        assert reader.is_whole
        shared.add("b", 1)
        assert [reader.next(), reader.next(), reader.next()] == ["a", "b", None]


def test_a_large_stream_waits_for_its_slowest_reader_and_forgets_what_all_have_read() -> None:
    shared: Shared[str] = Shared(b"f")
    with shared.read() as slow, shared.read() as fast:
        for _ in range(5):
            shared.add("x", 1024 * 1024)
            fast.next()
        assert shared.is_full()
        slow.next()
        assert not shared.is_full()
        with shared.read() as late:
            assert not late.is_whole
    assert not shared.is_full()


def test_pieces_are_dropped_at_the_end_when_nobody_reads() -> None:
    shared: Shared[str] = Shared(b"f")
    shared.add("x", 10)
    shared.finish("all")
    with shared.read() as late:
        assert not late.is_whole


async def test_waiters_wake_at_every_change() -> None:
    shared: Shared[str] = Shared(b"f")
    waiting = asyncio.create_task(shared.change())
    await asyncio.sleep(0)
    shared.add("x", 1)
    await asyncio.wait_for(waiting, 1.0)


def test_fingerprints_differ() -> None:
    assert fingerprint(b"a") != fingerprint(b"b")
