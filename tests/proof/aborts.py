"""Requests that end in every other way than with an answer: none may leave money, or a place among those that run, reserved."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import uvloop

from services.cli.client import Client, failures, pages
from services.runtime.errors import Failure, Reason
from services.runtime.status import failure_from_rpc
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2
from sluice.metering.v1 import usage_service_pb2
from tests.proof.callers import Address, addresses, stubs
from tests.proof.oracle import GATEWAYS
from tests.proof.registry import Context, Result
from tests.proof.tenants import QUIET_SECONDS, account, reservations, seconds_held
from tests.running import Running, default_catalogue, running

CHUNKS: Final = 50
_MODEL: Final = "abort/echo"
_DRAINED_MODEL: Final = "abort/drained"
_TOKENS: Final = 1000
_HOLD: Final = 1_000_000
"""Nano-dollars that are held for a request; what is cut off costs some hundredths of it."""
_SLICED_BUDGET: Final = 20_000 * _HOLD
_SINGLE_BUDGET: Final = 600 * _HOLD
"""Less than what slices are kept off (recall factor x gateways x an eighth of a slice), so that most requests have holds of their own."""
_CONCURRENCY: Final = 150
_AT_ONCE: Final = 32
_PER_KILL: Final = 60
"""Requests under way at each kill."""
_DEADLINE: Final = 0.15
_CALL_SECONDS: Final = 20.0
_SHORT_LEASE_SECONDS: Final = 8
_RECOVERY_SECONDS: Final = 30.0
_LIMITED: Final = frozenset({Reason.BUDGET_EXHAUSTED, Reason.RATE_LIMITED, Reason.CONCURRENCY_LIMITED})
_LATE: Final = ("DEADLINE_EXCEEDED", Reason.PROVIDER_TIMEOUT.value, Reason.ALL_CANDIDATES_FAILED.value)
_REPORTED: Final = 77
"""Output tokens that the provider reports of an answer whose stream was left."""


class Kind(enum.Enum):
    """How a request ends."""

    CANCELLED = "cancelled before the first byte"
    LEFT = "left mid-stream over gRPC"
    CLOSED = "closed mid-stream over HTTP, which ends a generator of the edge"
    FAILED = "failed by the provider with 500"
    TIMED_OUT = "past its deadline"


class _RefusedError(Exception):
    """The gateway said no for want of money, rate or room, and there is enough of each."""


@dataclass(slots=True)
class _Seen:
    """What became of the requests."""

    ended: Counter[str] = field(default_factory=Counter)
    """As they were meant to, by kind."""
    otherwise: Counter[str] = field(default_factory=Counter)
    """In another way, in words."""
    refused: Counter[str] = field(default_factory=Counter)
    """False 429."""
    in_flight: list[int] = field(default_factory=list)
    """Requests under way at each kill of the executor."""


def _catalogue() -> dict[str, Any]:
    catalogue = default_catalogue()
    catalogue["providers"]["aborted"] = {"kind": "echo"}
    catalogue["providers"]["drained"] = {"kind": "echo", "on_disconnect": "drain"}
    price = {"input": "0", "output": str(_HOLD / _TOKENS / 1000)}
    for model, provider in ((_MODEL, "aborted"), (_DRAINED_MODEL, "drained")):
        catalogue["models"][model] = {
            "provider": provider,
            "upstream_model": "echo",
            "display_name": model,
            "context_window": 100_000,
            "max_output_tokens": _TOKENS,
            "capabilities": ["chat", "streaming"],
            "price": price,
        }
    return catalogue


_SECTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "metering": {"bootstrap_requests_per_minute": -1, "bootstrap_concurrency": -1},
    # Scripted failures must reach the provider, not a breaker.
    "execution": {"breaker_failures": 1000, "breaker_calls": 100_000},
}


class _Aborters:
    """Callers of all gateways. Use as a context."""

    def __init__(self, gateways: Sequence[Address], secrets: Sequence[str]) -> None:
        self._gateways = gateways
        self._secrets = secrets
        self._stack = contextlib.AsyncExitStack()
        self._stubs: Sequence[Any] = ()
        self._random = random.Random(9)

    async def __aenter__(self) -> _Aborters:
        self._stubs = await self._stack.enter_async_context(stubs(self._gateways))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _stream(
        self,
        directives: Mapping[str, Any],
        *,
        model: str = _MODEL,
        timeout: float = _CALL_SECONDS,
        stub: Any = None,
        secret: str = "",
    ) -> Any:
        """A stream from any gateway for any tenant, unless they are given."""
        text = f"{self._random.random()} [[echo {json.dumps(directives)}]]"
        message = conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)])
        request = inference_service_pb2.StreamGenerateRequest(
            conversation=conversation_pb2.Conversation(messages=[message], max_output_tokens=_TOKENS),
            routing=inference_service_pb2.RoutingWishes(model=model, allow_fallback=False),
            cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
        )
        metadata = (("authorization", f"Bearer {secret or self._random.choice(self._secrets)}"),)
        return (stub or self._random.choice(self._stubs)).StreamGenerate(request, timeout=timeout, metadata=metadata)

    async def abort(self, kind: Kind, seen: _Seen) -> None:
        """One request that ends so."""
        try:
            said = await self._aborted(kind)
        except _RefusedError as error:
            seen.refused[str(error)] += 1
        else:
            if said:
                seen.otherwise[f"{kind.value}: {said}"] += 1
            else:
                seen.ended[kind.name] += 1

    async def _aborted(self, kind: Kind) -> str:
        """Empty: as it was meant to."""
        chance = self._random
        match kind:
            case Kind.CANCELLED:
                call = self._stream({"delay": 0.5})
                reading = asyncio.ensure_future(_read(call, None))
                await asyncio.wait((reading,), timeout=chance.uniform(0.0, 0.15))
                call.cancel()
                return _unless(await reading, "CANCELLED")
            case Kind.LEFT:
                pieces = chance.randint(1, 4)
                return await _read(self._stream({"text": _words(10), "chunks": 10, "chunk_delay": 0.02}), pieces)
            case Kind.CLOSED:
                return await self._closed(chance.randint(1, 4))
            case Kind.FAILED:
                return _unless(await _read(self._stream({"error": 500}), None), Reason.ALL_CANDIDATES_FAILED.value)
            case Kind.TIMED_OUT:
                said = await _read(self._stream({"hang": True}, timeout=_DEADLINE), None)
                return _unless(said, *_LATE)

    async def _closed(self, pieces: int) -> str:
        parts = urlsplit(self._random.choice(self._gateways).http)
        text = f"{self._random.random()} [[echo {json.dumps({'text': _words(10), 'chunks': 10, 'chunk_delay': 0.02})}]]"
        body = json.dumps(
            {
                "model": _MODEL,
                "stream": True,
                "max_completion_tokens": _TOKENS,
                "messages": [{"role": "user", "content": text}],
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {self._random.choice(self._secrets)}\r\nx-sluice-cache: off\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        seen = b""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                try:
                    writer.write(head.encode() + body)
                    while seen.count(b'"content":"') < pieces and (data := await reader.read(65_536)):
                        seen += data
                        if seen.startswith(b"HTTP/1.1 429"):
                            raise _RefusedError(seen.decode(errors="replace")[-200:])
                        if b"[DONE]" in seen:
                            return "the stream was over before it was closed"
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            return type(error).__name__
        return "" if seen.count(b'"content":"') >= pieces else f"cut off after {seen[-120:]!r}"

    async def answered(self) -> str:
        """One request at each gateway and tenant that is to be answered; empty: they were."""
        for stub in self._stubs:
            for secret in self._secrets:
                said = await _read(self._stream({"text": "here", "output_tokens": 1}, stub=stub, secret=secret), None)
                if said:
                    return said
        return ""

    async def killed(self, started: Running, seen: _Seen) -> None:
        """Kills the executor while _PER_KILL requests are under way, half of them mid-stream; until it answers again."""
        calls = []
        for number in range(_PER_KILL):
            slow: dict[str, Any] = {"text": _words(60), "chunks": 60, "chunk_delay": 0.1} if number % 2 else {"delay": 6.0}
            calls.append(asyncio.ensure_future(_read(self._stream(slow), None)))
        # Until all are with the executor.
        await asyncio.sleep(2.0)
        seen.in_flight.append(sum(not call.done() for call in calls))
        pid = started.ready.pids["execution"]
        os.kill(pid, signal.SIGKILL)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, _RefusedError):
                seen.refused[f"at a kill: {outcome}"] += 1
            elif isinstance(outcome, BaseException):
                raise outcome
        loop = asyncio.get_running_loop()
        ends = loop.time() + _RECOVERY_SECONDS
        while loop.time() < ends:
            try:
                if started.ready.pids.get("execution") not in (None, pid) and not await self.answered():
                    return
            except _RefusedError as error:
                seen.refused[f"after a kill: {error}"] += 1
                return
            except Failure:
                # The ready file is being written.
                pass
            await asyncio.sleep(0.2)
        raise AssertionError(f"the executor does not answer {_RECOVERY_SECONDS:g} s after its kill")

    async def left_at(self, chunk: int, model: str, usage: Mapping[str, Any]) -> str:
        """Leaves a stream after so many chunks; the operation's id."""
        directives = {"text": _words(CHUNKS), "chunks": CHUNKS, "chunk_delay": 0.03, **usage}
        call = self._stream(directives, model=model)
        operation, count = "", 0
        async for event in call:
            if event.HasField("opened"):
                operation = event.opened.operation_id
            elif event.HasField("delta"):
                count += 1
                if count == chunk:
                    call.cancel()
                    break
        return operation


async def _read(call: Any, pieces: int | None) -> str:
    """Reads a stream to its end, or until so many pieces have come and then leaves it; empty: it came so far, else how it ended."""
    count = 0
    try:
        async for event in call:
            count += event.HasField("delta")
            if pieces is not None and count >= pieces:
                call.cancel()
                return ""
    except asyncio.CancelledError:
        # Of the call, not of this task: nobody cancels it.
        return "CANCELLED"
    except grpc.aio.AioRpcError as error:
        failure = failure_from_rpc(error, "the gateway")
        if failure.reason in _LIMITED:
            raise _RefusedError(f"{failure.reason.value}: {failure.message}") from None
        return error.code().name if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else failure.reason.value
    return "" if pieces is None else "the stream was over before it was left"


def _unless(said: str, *meant: str) -> str:
    """Empty when it ended as it was meant to."""
    return "" if said in meant else said or "answered"


def _words(count: int) -> str:
    return " ".join(f"word{number}" for number in range(count))


def aborts(context: Context) -> Result:
    """Requests of every kind end early, at three gateways, for a tenant whose money comes in slices and one with single holds; then the
    executor is killed again and again with many under way. Nobody may be refused meanwhile, for there is money and room enough unless some
    is lost with each; and when all is quiet nothing may be held.
    """
    number = context.size(long=10_000, short=150)
    kills = context.size(long=40, short=1)
    with _mesh(context) as (started, client, secrets):
        seen = uvloop.run(_aborted(context, started, secrets, number, kills))
        held_seconds = uvloop.run(seconds_held(client))
        reserved = [] if held_seconds is not None else reservations(started)
        again = uvloop.run(_together(started, secrets))
        with failures():
            verdict = client.usage.VerifyLedger(
                usage_service_pb2.VerifyLedgerRequest(), timeout=_CALL_SECONDS, metadata=client.as_admin
            )
    refused = seen.refused + again.refused
    least = min(seen.ended[kind.name] for kind in Kind)
    in_flight = min(seen.in_flight)
    measured = (
        f"at least {least} of each of {len(Kind)} kinds, {kills} kills of the executor with at least {in_flight} in flight: "
        f"{'nothing' if held_seconds is not None else 'money'} held after "
        f"{QUIET_SECONDS if held_seconds is None else held_seconds:.0f} s, "
        f"{refused.total()} false 429, ledger {'ok' if verdict.ok else 'damaged'}"
    )
    # A few streams end, on a busy machine, before their caller can leave.
    ok = (
        least >= 0.95 * number
        and in_flight >= 0.9 * _PER_KILL
        and held_seconds is not None
        and not refused
        and verdict.ok
        and not again.otherwise
    )
    details = [
        *(f"refused {count} x {reason}" for reason, count in refused.most_common(6)),
        *reserved,
        *verdict.problems,
        *(f"{count} x {words}" for words, count in (seen.otherwise + again.otherwise).most_common(10)),
        f"in flight at kills: {seen.in_flight}",
    ]
    bound = f">= {int(0.95 * number)}, {kills} with >= {int(0.9 * _PER_KILL)}: nothing after <= {QUIET_SECONDS:g} s, 0, ok"
    return Result(len(Kind) * number + sum(seen.in_flight), measured, bound, ok, details)


async def _aborted(context: Context, started: Running, secrets: Sequence[str], number: int, kills: int) -> _Seen:
    seen = _Seen()
    waiting = [kind for kind in Kind for _ in range(number)]
    random.Random(10).shuffle(waiting)
    async with _Aborters(addresses(started), secrets) as aborters:
        with context.track("aborts", len(waiting)) as step:

            async def work() -> None:
                while waiting:
                    await aborters.abort(waiting.pop(), seen)
                    step()

            await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
        with context.track("kills", kills) as step:
            for _ in range(kills):
                await aborters.killed(started, seen)
                step()
    return seen


async def _together(started: Running, secrets: Sequence[str]) -> _Seen:
    """When all is quiet: as many at once as may well run, each of which is to be answered."""
    seen = _Seen()
    async with _Aborters(addresses(started), secrets) as aborters:
        for outcome in await asyncio.gather(*(aborters.answered() for _ in range(_AT_ONCE)), return_exceptions=True):
            if isinstance(outcome, _RefusedError):
                seen.refused[f"when all is quiet: {outcome}"] += 1
            elif isinstance(outcome, BaseException):
                raise outcome
            elif outcome:
                seen.otherwise[f"when all is quiet: {outcome}"] += 1
    return seen


@contextlib.contextmanager
def _mesh(context: Context) -> Iterator[tuple[Running, Client, list[str]]]:
    """With the secrets of both tenants."""
    sections = {name: dict(values) for name, values in _SECTIONS.items()}
    if context.short:
        # An idle lease is given back at its end: the short form doesn't wait half a minute for it.
        sections["metering"]["lease_seconds"] = _SHORT_LEASE_SECONDS
    with (
        running("mesh", sections=sections, catalogue=_catalogue(), replicas={"gateway": GATEWAYS}) as started,
        started.client() as client,
    ):
        secrets = [
            account(client, "sliced", budget=_SLICED_BUDGET, concurrency=_CONCURRENCY),
            account(client, "single", budget=_SINGLE_BUDGET, concurrency=_CONCURRENCY),
        ]
        yield started, client, secrets


def disconnects(context: Context) -> Result:
    """A stream is left after each of its CHUNKS chunks: where it is cut it is charged by our count, where it is read on by what the
    provider reports, and an explicit zero stays zero. One entry each.
    """
    rounds = context.size(long=20, short=2)
    rules: Sequence[tuple[str, str, Mapping[str, Any]]] = (
        ("cut", _MODEL, {}),
        ("drained", _DRAINED_MODEL, {"output_tokens": _REPORTED}),
        ("drained zero", _DRAINED_MODEL, {"input_tokens": 0, "output_tokens": 0}),
    )
    with _mesh(context) as (started, client, secrets):
        left = uvloop.run(_left(context, started, secrets, rules, rounds))
        held_seconds = uvloop.run(seconds_held(client))
        entries: dict[str, list[usage_service_pb2.LedgerEntry]] = defaultdict(list)
        for page in pages(client.usage.ListEntries, usage_service_pb2.ListEntriesRequest(), client.as_admin, _CALL_SECONDS):
            for entry in page.entries:
                entries[entry.operation_id].append(entry)
    wrong = [
        f"{rule}, left after chunk {chunk}, operation {operation!r}: {said}"
        for rule, chunk, operation in left
        for said in (wrong_entries(rule, chunk, entries.get(operation, [])),)
        if said
    ]
    return Result(
        len(left),
        f"{len(left) - len(wrong)} with one right charge, {'nothing' if held_seconds is not None else 'money'} held afterwards",
        f"{len(left)}, nothing",
        not wrong and held_seconds is not None,
        wrong,
    )


async def _left(
    context: Context,
    started: Running,
    secrets: Sequence[str],
    rules: Sequence[tuple[str, str, Mapping[str, Any]]],
    rounds: int,
) -> list[tuple[str, int, str]]:
    """Rule, chunk and operation of each."""
    left = []
    async with _Aborters(addresses(started), secrets) as aborters:
        waiting = [(*rule, chunk) for _ in range(rounds) for rule in rules for chunk in range(1, CHUNKS + 1)]
        with context.track("streams", len(waiting)) as step:

            async def work() -> None:
                while waiting:
                    rule, model, usage, chunk = waiting.pop()
                    left.append((rule, chunk, await aborters.left_at(chunk, model, usage)))
                    step()

            await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
    return left


def wrong_entries(rule: str, chunk: int, entries: Sequence[usage_service_pb2.LedgerEntry]) -> str:
    """What is wrong with the entries of a stream that was left after `chunk` chunks; empty: nothing."""
    if len(entries) != 1:
        return f"{len(entries)} entries"
    (entry,) = entries
    usage, each = entry.usage, _HOLD // _TOKENS
    if entry.amount_nano_usd != usage.output_token_count * each:
        return f"{usage.output_token_count} tokens, {entry.amount_nano_usd} charged"
    is_reported = usage.source == answer_pb2.USAGE_SOURCE_REPORTED
    match rule:
        case "cut":
            # The last chunk may be followed by the report before the caller is gone.
            if not usage.output_token_count or (is_reported and chunk < CHUNKS):
                return f"{usage.output_token_count} tokens, {answer_pb2.UsageSource.Name(usage.source)}"
        case "drained":
            if usage.output_token_count != _REPORTED or not is_reported:
                return f"{usage.output_token_count} tokens, {answer_pb2.UsageSource.Name(usage.source)}"
        case _:
            if usage.output_token_count or not is_reported:
                return f"{usage.output_token_count} tokens, {answer_pb2.UsageSource.Name(usage.source)}"
    return ""
