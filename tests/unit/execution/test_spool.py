"""The spool: real files, a real child process, and a real `kill -9`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from services.execution.attempts import lost
from services.execution.errors import SpoolFull
from services.execution.spool import Spool
from services.runtime.barrier import Barrier
from services.runtime.errors import Failure, Reason, unavailable
from sluice.inference.v1 import receipt_pb2
from sluice.metering.v1 import metering_service_pb2
from tests.unit.execution.upstream import PATIENCE

ROOT: Final = Path(__file__).resolve().parents[3]
CHILD: Final = '''
import asyncio, sys
from pathlib import Path
from services.execution.spool import Spool
from tests.unit.execution.test_spool import settlement, parse
from services.execution.attempts import lost

async def main():
    """Settles attempts for ever, posts them to the file, and tells of each settlement before the next begins."""
    ledger = open(sys.argv[2], "ab", buffering=0)

    async def post(records):
        for record in records:
            ledger.write(b"%b %d\\n" % (record.attempt_id.encode(), record.outcome))

    spool = Spool(Path(sys.argv[1]), post, group_seconds=0.001, segment_bytes=8192, most_bytes=1 << 24)
    spool.open(parse, lost)
    task = asyncio.create_task(spool.run())
    number = 0
    while True:
        number += 1
        spool.begin(settlement(f"open/{number}"))()
        for part in range(3):
            spool.begin(settlement(f"done/{number}/{part}"))()
            spool.settle(settlement(f"done/{number}/{part}", outcome=1, cost=7))
        # The same by groups: those of one turn of the loop share a write.
        for gate in [spool.begin(settlement(f"done/{number}/{part}")) for part in range(3, 6)]:
            gate()
        for part in range(3, 6):
            spool.end(settlement(f"done/{number}/{part}", outcome=1, cost=7))
        spool.write()
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
        await asyncio.sleep(0)

asyncio.run(main())
'''


def settlement(attempt: str, outcome: int = 0, cost: int = 0) -> metering_service_pb2.Settlement:
    """A record."""
    made = metering_service_pb2.Settlement(attempt_id=attempt, operation_id=attempt, cost_nano_usd=cost, tenant_id="t" * 40)
    made.outcome = outcome  # type: ignore[assignment]  # a number of the enum
    return made


parse: Final = metering_service_pb2.Settlement.FromString


class Ledger:
    """Where settlements are posted; takes each attempt once, as metering does."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.down = False
        self.refused = asyncio.Event()

    async def post(self, records: Sequence[Any]) -> None:
        """Takes them or fails, as a whole."""
        if self.down:
            self.refused.set()
            raise unavailable("metering", "down")
        self.posted += records

    def ids(self) -> Counter[str]:
        """How often each attempt was posted."""
        return Counter(record.attempt_id for record in self.posted)


def spool_at(directory: Path, ledger: Ledger, *, segment_bytes: int = 1 << 20, most_bytes: int = 1 << 24) -> Spool:
    return Spool(directory, ledger.post, group_seconds=0.0005, segment_bytes=segment_bytes, most_bytes=most_bytes)


async def drained(spool: Spool) -> None:
    """Posts all there is."""
    task = asyncio.create_task(spool.run())
    assert await spool.flush(PATIENCE)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.spool"))


@pytest.mark.parametrize("rounds", [1, 40, 400])
async def test_after_kill_9_every_attempt_is_settled_exactly_once(tmp_path: Path, rounds: int) -> None:
    book = tmp_path / "ledger"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "spool"), str(book)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    said = 0
    try:
        while said < rounds:
            line = await asyncio.to_thread(child.stdout.readline)
            assert line, "the child died by itself"
            said = int(line)
    finally:
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()
        child.wait()
        child.stdout.close()
    said = int(rest.split()[-1]) if rest.endswith(b"\n") else said
    before = [line.split() for line in book.read_bytes().splitlines()] if book.exists() else []
    outcomes: dict[str, int] = {}
    for attempt, outcome in before:
        outcomes.setdefault(attempt.decode(), int(outcome))

    ledger = Ledger()
    spool = spool_at(tmp_path / "spool", ledger)
    lost_count = spool.open(parse, lost)
    # One spool after another may post the same attempt again, which the ledger refuses by its id; within one it never happens.
    await drained(spool)
    spool.close()
    assert set(ledger.ids().values()) == {1}
    for record in ledger.posted:
        outcomes.setdefault(record.attempt_id, record.outcome)
    # What the child said is in the ledger, and how it ended: settled ones as they were, the others as lost.
    for number in range(1, said + 1):
        for part in range(6):
            assert outcomes[f"done/{number}/{part}"] == receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED
        assert outcomes[f"open/{number}"] == receipt_pb2.ATTEMPT_OUTCOME_LOST
    # Beyond it there is at most the round that was under way.
    assert len(outcomes) <= 7 * (said + 2)
    assert lost_count >= said

    # And nothing is left for a third process.
    again = Ledger()
    third = spool_at(tmp_path / "spool", again)
    assert third.open(parse, lost) == 0
    assert third.backlog == 0
    third.close()
    assert files(tmp_path / "spool") == []


async def test_a_settlement_is_on_disk_before_settle_returns(tmp_path: Path) -> None:
    ledger = Ledger()
    spool = spool_at(tmp_path / "one", ledger)
    spool.open(parse, lost)
    spool.begin(settlement("a"))()
    spool.settle(settlement("a", 1, 7))
    spool.begin(settlement("b"))()
    [path] = files(tmp_path / "one")
    # As it would be found if the process died now.
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    second = spool_at(tmp_path / "two", ledger)
    assert second.open(parse, lost) == 1
    await drained(second)
    assert {record.attempt_id: (record.outcome, record.cost_nano_usd) for record in ledger.posted} == {
        "a": (receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED, 7),
        "b": (receipt_pb2.ATTEMPT_OUTCOME_LOST, 0),
    }
    spool.close()
    second.close()


async def test_a_torn_tail_is_ignored_at_every_length(tmp_path: Path) -> None:
    spool = spool_at(tmp_path / "whole", Ledger())
    spool.open(parse, lost)
    for name in "ab":
        spool.begin(settlement(name))()
        spool.settle(settlement(name, 1, 7))
    [path] = files(tmp_path / "whole")
    raw = path.read_bytes()
    spool.close()
    quarter = len(raw) // 4
    assert len(raw) == 4 * quarter or len(raw) > 100
    for length in range(len(raw) + 1):
        ledger = Ledger()
        directory = tmp_path / f"cut{length}"
        directory.mkdir()
        (directory / "0000000001.spool").write_bytes(raw[:length])
        torn = spool_at(directory, ledger)
        torn.open(parse, lost)
        if torn.backlog:
            await torn._post_some()
        torn.close()
        assert set(ledger.ids().values()) <= {1}
        for record in ledger.posted:
            assert record.outcome in (receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED, receipt_pb2.ATTEMPT_OUTCOME_LOST)
        assert files(directory) == []
    # The whole file has both, settled.
    assert ledger.ids() == {"a": 1, "b": 1}
    assert {record.outcome for record in ledger.posted} == {receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED}


async def test_a_record_that_rotted_ends_its_file_and_not_the_others(tmp_path: Path) -> None:
    tmp_path.joinpath("s").mkdir()
    for number in (1, 2):
        spool = spool_at(tmp_path / f"make{number}", Ledger())
        spool.open(parse, lost)
        spool.settle(settlement(f"x{number}", 1, 7))
        raw = bytearray(files(tmp_path / f"make{number}")[0].read_bytes())
        spool.close()
        if number == 1:
            raw[-1] ^= 1
        (tmp_path / "s" / f"{number:010d}.spool").write_bytes(raw)
    ledger = Ledger()
    spool = spool_at(tmp_path / "s", ledger)
    spool.open(parse, lost)
    await drained(spool)
    spool.close()
    assert ledger.ids() == {"x2": 1}


async def test_a_ledger_that_is_away_gets_everything_once_when_it_is_back(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.down = True
    spool = spool_at(tmp_path, ledger, segment_bytes=4096)
    spool.open(parse, lost)
    task = asyncio.create_task(spool.run())
    for number in range(1200):
        spool.begin(settlement(str(number)))()
        spool.settle(settlement(str(number), 1, 7))
    async with asyncio.timeout(PATIENCE):
        await ledger.refused.wait()
    assert not await spool.flush(0.01)
    assert spool.backlog == 1200
    assert len(files(tmp_path)) > 10
    ledger.down = False
    assert await spool.flush(PATIENCE)
    assert [record.attempt_id for record in ledger.posted] == [str(number) for number in range(1200)]
    # Files that are done with are gone, but for the one that is written.
    assert len(files(tmp_path)) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    spool.close()
    assert files(tmp_path) == []


async def test_a_ledger_that_hangs_keeps_nothing_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut takes no more than the last group, however long the ledger has been away."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    hangs, asked = asyncio.Event(), asyncio.Event()

    async def post(records: Sequence[Any]) -> None:
        asked.set()
        await hangs.wait()

    spool = Spool(tmp_path, post, group_seconds=0.0005, segment_bytes=1 << 20, most_bytes=1 << 24)
    spool.open(parse, lost)
    task = asyncio.create_task(spool.run())
    spool.settle(settlement("first", 1, 7))
    async with asyncio.timeout(PATIENCE):
        await asked.wait()
        spool.settle(settlement("second", 1, 7))
        [file] = files(tmp_path)
        while synced[-1] < file.stat().st_size:
            await asyncio.sleep(0.001)
    assert spool.backlog == 2
    hangs.set()
    assert await spool.flush(PATIENCE)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    spool.close()


async def test_what_a_restart_finds_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = spool_at(tmp_path / "one", Ledger())
    killed.open(parse, lost)
    killed.settle(settlement("op/1", 1, 7))
    [left] = files(tmp_path / "one")
    (tmp_path / "two").mkdir()
    found = tmp_path / "two" / left.name
    found.write_bytes(left.read_bytes())
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    again = spool_at(tmp_path / "two", Ledger())
    again.open(parse, lost)
    assert found.stat().st_ino in synced
    again.close()
    killed.close()


async def test_a_file_with_an_open_attempt_is_kept(tmp_path: Path) -> None:
    ledger = Ledger()
    spool = spool_at(tmp_path, ledger, segment_bytes=4096)
    spool.open(parse, lost)
    spool.begin(settlement("long"))()
    first = files(tmp_path)[0]
    for number in range(200):
        spool.begin(settlement(str(number)))()
        spool.settle(settlement(str(number), 1))
    await drained(spool)
    assert first.exists()
    spool.settle(settlement("long", 1))
    await drained(spool)
    assert not first.exists()
    spool.close()


async def test_beyond_its_limit_no_attempt_begins_and_posting_makes_room(tmp_path: Path) -> None:
    ledger = Ledger()
    # A limit below the size of a segment must not stop it for ever.
    spool = spool_at(tmp_path, ledger, segment_bytes=1 << 20, most_bytes=65_536)
    spool.open(parse, lost)
    number = 0
    with pytest.raises(SpoolFull) as caught:
        while number < 10_000:
            spool.begin(settlement(str(number)))()
            spool.settle(settlement(str(number), 1))
            number += 1
    assert 100 < number < 10_000
    assert caught.value.reason is Reason.DEPENDENCY_UNAVAILABLE
    assert caught.value.retry_delay
    # Money that was spent is never refused.
    spool.settle(settlement("late", 1))
    await drained(spool)
    assert ledger.ids() == Counter({**{str(one): 1 for one in range(number)}, "late": 1})
    spool.begin(settlement("next"))()
    spool.close()


FULL_DISK: Final = '''
import asyncio, resource, signal, sys
from pathlib import Path
from services.execution.errors import SpoolFull
from services.execution.spool import Spool
from services.execution.attempts import lost
from tests.unit.execution.test_spool import settlement, parse

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

async def post(records): pass

async def main():
    """A file-size limit stands for a full disk: the kernel writes a part of the record, as it does there."""
    spool = Spool(Path(sys.argv[1]), post, group_seconds=0.001, segment_bytes=1 << 20, most_bytes=1 << 24)
    spool.open(parse, lost)
    spool.begin(settlement("before"))()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        spool.begin(settlement("refused"))()
    except SpoolFull:
        print("full", flush=True)
    spool.settle(settlement("unwritten", 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    spool.begin(settlement("after"))()
    spool.settle(settlement("after", 1))
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
'''


async def test_what_follows_a_full_disk_is_not_lost(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    try:
        assert await asyncio.to_thread(child.stdout.readline) == b"full\n"
        assert await asyncio.to_thread(child.stdout.readline) == b"ready\n"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    ledger = Ledger()
    spool = spool_at(tmp_path, ledger)
    assert spool.open(parse, lost) == 1
    await drained(spool)
    spool.close()
    assert ledger.ids() == {"before": 1, "after": 1}
    assert {record.attempt_id: record.outcome for record in ledger.posted}["after"] == receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED


async def test_two_processes_never_share_a_spool(tmp_path: Path) -> None:
    first = spool_at(tmp_path, Ledger())
    first.open(parse, lost)
    with pytest.raises(RuntimeError, match=r"mesh\.state_dir"):
        spool_at(tmp_path, Ledger()).open(parse, lost)
    first.close()
    second = spool_at(tmp_path, Ledger())
    second.open(parse, lost)
    second.close()


async def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    spool = spool_at(tmp_path, Ledger())
    spool.open(parse, lost)
    assert files(tmp_path)[0].stat().st_mode & 0o077 == 0
    spool.close()


async def test_a_lost_attempt_is_the_platforms(tmp_path: Path) -> None:
    made = lost(settlement("a"))
    assert made.payer == metering_service_pb2.PAYER_PLATFORM
    assert made.outcome == receipt_pb2.ATTEMPT_OUTCOME_LOST
    assert made.is_final
    assert isinstance(SpoolFull(), Failure)


async def test_those_of_one_turn_share_a_write_that_is_done_before_a_gate_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_at(tmp_path, Ledger())
    spool.open(parse, lost)
    writes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: bytes) -> int:
        writes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    gates = [spool.begin(settlement(str(number))) for number in range(10)]
    assert not writes
    assert not any(gate.passed for gate in gates)
    gates[3]()
    assert len(writes) == 1
    assert [gate.passed for gate in gates] == [number == 3 for number in range(10)]
    for gate in gates:
        gate()
    assert len(writes) == 1
    assert all(gate.passed for gate in gates)
    for number in range(10):
        spool.end(settlement(str(number), 1, 7))
    # Nobody sends: the end of the turn writes them.
    await asyncio.sleep(0)
    assert len(writes) == 2
    assert sum(path.stat().st_size for path in files(tmp_path)) == sum(writes)
    assert spool.backlog == 10
    spool.close()


async def test_the_barrier_writes_what_ended(tmp_path: Path) -> None:
    spool = spool_at(tmp_path, Ledger())
    spool.open(parse, lost)
    barrier = Barrier()
    barrier()
    barrier.add(spool.write)
    spool.begin(settlement("a"))()
    spool.end(settlement("a", 1, 7))
    assert spool.backlog == 0
    size = files(tmp_path)[0].stat().st_size
    barrier()
    assert spool.backlog == 1
    assert files(tmp_path)[0].stat().st_size > size
    spool.close()


async def test_a_start_stands_before_its_settlement_though_no_gate_was_passed(tmp_path: Path) -> None:
    ledger = Ledger()
    spool = spool_at(tmp_path / "one", ledger)
    spool.open(parse, lost)
    gate = spool.begin(settlement("a"))
    spool.settle(settlement("a", 1, 7))
    assert not gate.passed
    [path] = files(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    # Behind it, a start would be an attempt that never ended.
    second = spool_at(tmp_path / "two", ledger)
    assert second.open(parse, lost) == 0
    assert second.backlog == 1
    second.close()
    await drained(spool)
    spool.close()
    assert files(tmp_path / "one") == []


def full(descriptor: int, data: bytes) -> int:
    """A write to a disk that is full."""
    raise OSError(28, "No space left on device")


async def test_a_full_spool_refuses_what_begins_and_keeps_what_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    spool = spool_at(tmp_path, ledger)
    spool.open(parse, lost)
    spool.begin(settlement("running"))()
    monkeypatch.setattr(os, "write", full)
    refused = spool.begin(settlement("refused"))
    spool.end(settlement("running", 1, 7))
    for _ in range(2):
        with pytest.raises(SpoolFull):
            refused()
    assert not refused.passed
    monkeypatch.undo()
    await drained(spool)
    assert ledger.ids() == {"running": 1}
    spool.close()


async def test_a_settlement_that_cannot_be_written_leaves_its_start_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is posted: else a crash would forget the attempt altogether."""
    ledger = Ledger()
    spool = spool_at(tmp_path, ledger, segment_bytes=32)
    spool.open(parse, lost)
    spool.begin(settlement("op/1"))()
    # The next record opens a second file: nothing but the settlement keeps the first.
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        spool.settle(settlement("op/1"))
    spool.begin(settlement("op/2"))()
    assert any(b"op/1" in path.read_bytes() for path in files(tmp_path))
    spool.close()
    again = spool_at(tmp_path, ledger)
    assert again.open(parse, lost) == 2
    await drained(again)
    assert set(ledger.ids()) == {"op/1", "op/2"}
    again.close()


async def test_one_record_that_cannot_be_written_costs_the_others_of_its_turn_nothing(tmp_path: Path) -> None:
    ledger = Ledger()
    spool = spool_at(tmp_path, ledger)
    spool.open(parse, lost)
    huge = settlement("op/2")
    huge.model = "m" * (1 << 20)
    with pytest.raises(SpoolFull):
        spool.begin(huge)
    gates = [spool.begin(settlement("op/1")), spool.begin(settlement("op/3"))]
    spool.end(settlement("op/1"))
    spool.end(huge)
    spool.end(settlement("op/3"))
    for gate in gates:
        gate()
    assert spool.backlog == 3
    await drained(spool)
    assert set(ledger.ids()) == {"op/1", "op/2", "op/3"}
    spool.close()


async def test_a_closed_spool_opens_no_gate_and_keeps_what_it_has(tmp_path: Path) -> None:
    ledger = Ledger()
    spool = spool_at(tmp_path, ledger, segment_bytes=32)
    spool.open(parse, lost)
    spool.begin(settlement("op/1"))()
    spool.close()
    gate = spool.begin(settlement("op/2"))
    with pytest.raises(SpoolFull):
        gate()
    spool.end(settlement("op/1"))
    spool.write()
    spool.settle(settlement("op/1"))
    again = spool_at(tmp_path, ledger)
    assert again.open(parse, lost) == 1
    assert again.backlog == 1
    again.close()
