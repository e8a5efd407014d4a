"""Money while everything is killed: what a provider billed against what the ledger says, operation by operation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from services.cli.client import Client, failures, pages
from services.cli.state import Secrets
from services.runtime.errors import Failure
from sluice.inference.v1 import receipt_pb2
from sluice.metering.v1 import usage_service_pb2
from tests.proof import provider
from tests.proof.callers import Ask, Callers, Outcome, addresses
from tests.proof.redelivery import Redelivery
from tests.proof.registry import Context, Result
from tests.proof.tenants import QUIET_SECONDS, account, reservations, seconds_held
from tests.running import ROOT, Running, default_catalogue, running

GATEWAYS: Final = 3
KILL_SECONDS: Final = 4.0
LEAST_IN_FLIGHT: Final = 30
_RATE: Final = 60.0
_SHORT_RATE: Final = 20.0
"""Of the short form: requests a second, so that fewer of them meet as many kills."""
_LEAVING: Final = 0.05
"""Share of callers that go away."""
_LATEST_LEAVE: Final = 6.0
_HELD_SINGLY: Final = 0.3
"""Share of requests of a tenant whose budget is too small for slices, by the recall factor below: each asks for a hold of its own."""
_RECALL_FACTOR: Final = 100_000
_AMPLE: Final = 100_000 * 1_000_000_000
_SINGLE: Final = 1_000 * 1_000_000_000
_CALL_SECONDS: Final = 30.0
_PLATFORM: Final = "platform"
_SUCCEEDED: Final = receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED


@contextlib.contextmanager
def oracle(*, fastest: float = 0.5, slowest: float = 5.0) -> Iterator[tuple[str, Path]]:
    """A running oracle: its URL, and its bill."""
    with tempfile.TemporaryDirectory(prefix="sluice-oracle-") as name:
        directory = Path(name)
        command = [sys.executable, "-m", "tests.proof.provider", name, "--fastest", str(fastest), "--slowest", str(slowest)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            ends = time.monotonic() + 20.0
            while not (directory / "port").exists():
                assert process.poll() is None, "the oracle ended"
                assert time.monotonic() < ends, "the oracle does not start"
                time.sleep(0.02)
            yield f"http://127.0.0.1:{(directory / 'port').read_text()}/v1", directory / "bill"
        finally:
            process.terminate()
            process.wait()


def _catalogue(url: str) -> dict[str, Any]:
    catalogue = default_catalogue()
    catalogue["providers"]["oracle"] = {"kind": "openai", "base_url": url}
    catalogue["models"][provider.MODEL] = {
        "provider": "oracle",
        "upstream_model": "delphi",
        "display_name": "Delphi",
        "context_window": 1_000_000,
        "max_output_tokens": 4096,
        "capabilities": ["chat", "streaming"],
        "price": dict(provider.PRICE),
    }
    return catalogue


_SECTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "metering": {
        "bootstrap_requests_per_minute": -1,
        "bootstrap_concurrency": -1,
        "bootstrap_budget_nano_usd": _AMPLE,
        "recall_factor": _RECALL_FACTOR,
    }
}


@contextlib.contextmanager
def mesh(url: str) -> Iterator[Running]:
    """A mesh with GATEWAYS gateways whose models include the oracle's."""
    with running("mesh", sections=_SECTIONS, catalogue=_catalogue(url), replicas={"gateway": GATEWAYS}) as started:
        yield started


def entries_of(client: Client) -> list[usage_service_pb2.LedgerEntry]:
    """What the ledger says of the oracle."""
    request = usage_service_pb2.ListEntriesRequest()
    return [
        entry
        for page in pages(client.usage.ListEntries, request, client.as_admin, _CALL_SECONDS)
        for entry in page.entries
        if entry.model == provider.MODEL
    ]


@dataclass(slots=True)
class Audit:
    """The ledger held against the oracle's bill and what callers got."""

    answered: int = 0
    equal: int = 0
    """Answers whose entry has the oracle's amount."""
    twice: int = 0
    """Attempts, or executions of the oracle, with more than one entry."""
    executions: int = 0
    extra: int = 0
    """Executions of an operation beyond its first."""
    extra_paid: int = 0
    """Entries for those that debit a tenant."""
    complaints: list[str] = field(default_factory=list)

    def complain(self, words: str) -> None:
        """Notes what is wrong, for people."""
        self.complaints.append(words)


def audit(
    outcomes: Sequence[Outcome], bill: Mapping[int, provider.Execution], entries: Sequence[usage_service_pb2.LedgerEntry]
) -> Audit:
    """Matches all three. A completed execution is known in the ledger by its tokens, which no other has."""
    found = Audit(executions=len(bill))
    by_attempt = Counter(entry.attempt_id for entry in entries)
    by_operation: dict[str, list[usage_service_pb2.LedgerEntry]] = defaultdict(list)
    by_tokens: dict[int, list[usage_service_pb2.LedgerEntry]] = defaultdict(list)
    for entry in entries:
        by_operation[entry.operation_id].append(entry)
        if entry.outcome == _SUCCEEDED:
            by_tokens[entry.usage.input_token_count].append(entry)
    for attempt, count in by_attempt.items():
        if count > 1:
            found.twice += 1
            found.complain(f"attempt {attempt} has {count} entries")
    paid: Counter[str] = Counter()
    for execution in bill.values():
        booked = by_tokens[execution.input_tokens]
        if len(booked) > 1:
            found.twice += 1
            found.complain(f"execution {execution.number} of {execution.marker} has {len(booked)} entries")
        if execution.amount is not None:
            paid[execution.marker] += any(entry.debit_account != _PLATFORM for entry in booked)
    for outcome in outcomes:
        answer = outcome.answer
        if answer is not None:
            found.answered += 1
            wrong = _wrong(outcome, bill, by_operation[answer.operation_id])
            found.equal += not wrong
            if wrong:
                found.complain(wrong)
    begun = Counter(execution.marker for execution in bill.values())
    found.extra = sum(count - 1 for count in begun.values())
    for marker, count in paid.items():
        if count > 1:
            found.complain(f"{marker} was charged for {count} completed executions")
    # An execution that was cut off is charged by what was sent to the oracle and came back. One such charge a caller asks for: by leaving.
    leavers = sum(outcome.has_left for outcome in outcomes)
    cut = [
        entry for entry in entries if entry.outcome != _SUCCEEDED and entry.amount_nano_usd and entry.debit_account != _PLATFORM
    ]
    if len(cut) > leavers:
        kinds = Counter(receipt_pb2.AttemptOutcome.Name(entry.outcome) for entry in cut)
        found.complain(f"{len(cut)} attempts that were cut off debit tenants, {leavers} callers left: {dict(kinds)}")
    found.extra_paid = sum(count - 1 for count in paid.values() if count > 1) + max(0, len(cut) - leavers)
    return found


def _wrong(outcome: Outcome, bill: Mapping[int, provider.Execution], entries: Sequence[usage_service_pb2.LedgerEntry]) -> str:
    """What is wrong with the entry of an answer that a caller got; empty: nothing."""
    answer = outcome.answer
    assert answer is not None
    name = f"{outcome.ask.marker}, operation {answer.operation_id}"
    execution = bill.get(answer.execution)
    if execution is None or execution.amount is None or execution.marker != outcome.ask.marker:
        return f"{name}: execution {answer.execution} is not billed, or another's"
    succeeded = [entry for entry in entries if entry.outcome == _SUCCEEDED]
    if len(succeeded) != 1:
        return f"{name}: {len(succeeded)} entries of success"
    (entry,) = succeeded
    if entry.usage.input_token_count != execution.input_tokens or entry.amount_nano_usd != execution.amount:
        return f"{name}: the ledger has {entry.amount_nano_usd}, the oracle {execution.amount}"
    if answer.cost is not None and answer.cost != execution.amount:
        return f"{name}: the caller was told {answer.cost}, the oracle says {execution.amount}"
    return ""


def _asks(number: int, secrets: Sequence[str]) -> list[Ask]:
    """`secrets`: of the tenant with slices, and of the one with single holds."""
    chance = random.Random(16)
    return [
        Ask(
            f"{index:06d}",
            secrets[chance.random() < _HELD_SINGLY],
            is_streamed=chance.random() < 0.5,
            is_http=chance.random() < 0.5,
            # Without a key its going away cancels the request.
            leaves_after=leaves_after,
            has_key=leaves_after is None,
        )
        for index in range(number)
        for leaves_after in (chance.uniform(0.0, _LATEST_LEAVE) if chance.random() < _LEAVING else None,)
    ]


@dataclass(slots=True)
class _Kills:
    """Kills a random process of the mesh every KILL_SECONDS, each name before any comes again."""

    started: Running
    callers: Callers
    names: list[str] = field(default_factory=list)
    """Of those that were killed."""
    in_flight: list[int] = field(default_factory=list)
    """Requests under way at each kill."""

    async def run(self) -> None:
        """Until cancelled."""
        chance = random.Random(23)
        waiting: list[str] = []
        while True:
            await asyncio.sleep(KILL_SECONDS)
            with contextlib.suppress(Failure):
                pids = self.started.ready.pids
                waiting = waiting or chance.sample(sorted(pids), len(pids))
                # One that is just being started again has to wait for its turn.
                name = next((one for one in waiting if pids.get(one)), None)
                if name is None:
                    continue
                waiting.remove(name)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[name], signal.SIGKILL)
                    self.names.append(name)
                    self.in_flight.append(self.callers.in_flight)


def oracle_kills(context: Context) -> Result:
    """Callers ask an oracle for answers, 60 a second over three gateways, while every few seconds a process of the mesh is killed.

    One in twenty callers goes away at a random time, and has no key; the others ask again with the same key until they have the last byte. Every
    settlement is posted twice (see redelivery.py for why that stands for NATS delivering twice). In the end the ledger must say of
    every answer that a caller got what the oracle billed for it, to the nano-dollar; no attempt may be booked twice; within a minute
    no money may be held; and what crashes made the oracle run more than once must be the platform's to pay.
    """
    number = context.size(long=10_000, short=600)
    least_kills = context.size(long=40, short=6)
    with oracle() as (url, bill), mesh(url) as started, started.client() as client:
        ready = started.ready
        asks = _asks(number, (ready.key, account(client, "single", budget=_SINGLE)))
        outcomes, kills, again = uvloop.run(_loaded(context, started, asks))
        held_seconds = uvloop.run(seconds_held(client))
        reserved = [] if held_seconds is not None else reservations(started)
        found = audit(outcomes, provider.read_bill(bill), entries_of(client))
        with failures():
            verdict = client.usage.VerifyLedger(
                usage_service_pb2.VerifyLedgerRequest(), timeout=_CALL_SECONDS, metadata=client.as_admin
            )
    concurrency = max(kills.in_flight, default=0)
    least = min(kills.in_flight, default=0)
    left = sum(outcome.has_left for outcome in outcomes)
    given_up = number - found.answered - left
    errors: Counter[str] = sum((outcome.errors for outcome in outcomes), Counter())
    measured = (
        f"{len(kills.names)} kills with at least {least} in flight: {found.equal} of {found.answered} answers to the nano-dollar, "
        f"{found.twice} booked twice, {'nothing' if held_seconds is not None else 'money'} held after "
        f"{QUIET_SECONDS if held_seconds is None else held_seconds:.0f} s, ledger {'ok' if verdict.ok else 'damaged'}, "
        f"{found.extra} extra executions, {found.extra_paid} paid by tenants"
    )
    bound = (
        f">= {least_kills} kills with >= {LEAST_IN_FLIGHT}: all, 0, nothing after <= {QUIET_SECONDS:g} s, ok, "
        f"<= {len(kills.names) * concurrency}, 0"
    )
    ok = (
        len(kills.names) >= least_kills
        and least >= LEAST_IN_FLIGHT
        and found.equal == found.answered
        and not found.twice
        and held_seconds is not None
        and verdict.ok
        and found.extra <= len(kills.names) * concurrency
        and not found.extra_paid
        and not again.refused
    )
    details = [
        *verdict.problems,
        *again.refused,
        *found.complaints,
        *reserved,
        f"{found.answered} answered, {left} left, {given_up} gave up; {found.executions} executions",
        f"{again.delivered_count} settlements delivered again; killed {dict(Counter(kills.names))}",
        *(f"{count} x {error}" for error, count in errors.most_common(6)),
    ]
    return Result(number, measured, bound, ok, details)


async def _loaded(context: Context, started: Running, asks: Sequence[Ask]) -> tuple[list[Outcome], _Kills, Redelivery]:
    loop = asyncio.get_running_loop()
    again = _redelivery(started)
    async with Callers(addresses(started)) as callers, again.following():
        kills = _Kills(started, callers)
        killing = asyncio.create_task(kills.run())
        tasks = []
        began, rate = loop.time(), _SHORT_RATE if context.short else _RATE
        with context.track("requests", len(asks)) as step:
            for index, ask in enumerate(asks):
                await asyncio.sleep(began + index / rate - loop.time())
                tasks.append(asyncio.create_task(callers.call(ask)))
                tasks[-1].add_done_callback(lambda _: step())
            # Kills meet the full load, not its end.
            killing.cancel()
            outcomes = await asyncio.gather(*tasks)
        await asyncio.gather(killing, return_exceptions=True)
    return outcomes, kills, again


def _redelivery(started: Running) -> Redelivery:
    token = Secrets.load_or_create(started.directory).service_token
    return Redelivery(started.directory / "execution" / "spool", started.ready.grpc["metering"], token)
