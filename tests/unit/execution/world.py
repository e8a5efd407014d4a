"""A small execution service without its process: real providers behind real sockets, a real spool, and a ledger in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from services.execution.adapters.echo import EchoProvider
from services.execution.adapters.openai import OpenAIProvider
from services.execution.attempts import Operation, Tried, fill_attempt, lost
from services.execution.breaker import Figures
from services.execution.counts import Counts
from services.execution.provider import Provider
from services.execution.spool import Spool
from services.execution.targets import Targets
from services.runtime.call import Call
from services.runtime.errors import Failure
from sluice.execution.v1 import execution_service_pb2 as pb2
from sluice.inference.v1 import receipt_pb2
from sluice.metering.v1 import metering_service_pb2
from sluice.tokenization.v1 import tokenization_service_pb2
from tests.unit.execution.examples import SECRET, billing, candidate, conversation
from tests.unit.execution.upstream import PATIENCE, Script, Upstream, pool_to, upstream


class Clock:
    """The breakers' time, which a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Tokenization:
    """A stub of tokenization: what it was asked, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.token_count = 11
        self.failure: Failure | None = None
        self.gate = asyncio.Event()
        """Answers wait until it is set."""
        self.gate.set()

    async def Count(self, request: Any, *, timeout: float) -> Any:
        """See the proto."""
        self.asked += request.models
        async with asyncio.timeout(timeout):
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return tokenization_service_pb2.CountResponse(counts=[receipt_pb2.TokenCount(token_count=self.token_count)])


class World:
    """What an operation needs."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.targets = Targets(Figures(), self.clock)
        self.ledger: list[metering_service_pb2.Settlement] = []
        self.reports: list[Tried] = []
        self.servers: dict[str, Upstream] = {}
        self.tokenization = Tokenization()
        stub: Any = self.tokenization
        self.counts = Counts(stub, self.clock, seconds=PATIENCE)
        self.spool = Spool(directory, self._post, group_seconds=0.0005, segment_bytes=1 << 20, most_bytes=1 << 24)
        self.spool.open(metering_service_pb2.Settlement.FromString, lost)

    async def _post(self, records: Sequence[Any]) -> None:
        self.ledger += records

    async def settled(self) -> list[metering_service_pb2.Settlement]:
        """Every settlement, after all have been posted."""
        await self.counts.wait_idle()
        assert await self.spool.flush(PATIENCE)
        return self.ledger

    def asked(self, provider: str) -> int:
        """How many requests a provider has had."""
        return len(self.servers[provider].exchanges)

    def operation(
        self, *providers: str, kind: Any = pb2.CompleteRequest, seconds: float = PATIENCE, **fields: Any
    ) -> Operation:
        """An operation with candidates at `providers`, in that order."""
        made: dict[str, Any] = {
            "operation_id": "op",
            "billing": billing(),
            "candidates": [candidate(name) for name in providers],
            "metadata": {},
            **({"inputs": ["a"]} if kind is pb2.EmbedRequest else {"conversation": conversation()}),
            **fields,
        }
        now = asyncio.get_running_loop().time
        return Operation(
            kind(**made),
            self.targets,
            self.spool,
            self.reports.append,
            Call("/sluice.execution.v1.ExecutionService/Complete", now() + seconds),
            now,
            self.counts.count,
            self.counts.later,
            first_byte_seconds=PATIENCE,
        )

    def stream(self, *providers: str, **fields: Any) -> Operation:
        """A streamed one."""
        return self.operation(*providers, kind=pb2.StreamCompleteRequest, **fields)


@contextlib.asynccontextmanager
async def world(directory: Path, **scripts: Script | Sequence[Script]) -> AsyncIterator[World]:
    """A world with an OpenAI-style provider per name, and one called `echo`."""
    made = World(directory)
    async with contextlib.AsyncExitStack() as stack:
        providers: dict[str, Provider] = {"echo": EchoProvider()}
        for name, script in scripts.items():
            server = await stack.enter_async_context(upstream(*([script] if callable(script) else script)))
            pool = await stack.enter_async_context(pool_to(server.url))
            made.servers[name] = server
            providers[name] = OpenAIProvider(
                pool,
                address=server.url,
                credential=lambda: SECRET,
                credential_name=f"env:{name}",
                headers={},
                first_byte_timeout=PATIENCE,
                idle_timeout=PATIENCE,
            )
        made.targets.use(providers)
        poster = asyncio.create_task(made.spool.run())
        try:
            yield made
        finally:
            poster.cancel()
            await asyncio.gather(poster, return_exceptions=True)
            made.spool.close()


def attempts_of(operation: Operation) -> Sequence[receipt_pb2.Attempt]:
    """What a receipt shows of it."""
    attempts = pb2.CompleteResponse().attempts
    for tried in operation.tried:
        fill_attempt(attempts.add(), tried)
    return attempts


def outcomes(attempts: Sequence[receipt_pb2.Attempt]) -> list[tuple[str, str, str]]:
    """Id, provider and outcome of each attempt."""
    names = receipt_pb2.AttemptOutcome
    return [(one.attempt_id, one.provider, names.Name(one.outcome).removeprefix("ATTEMPT_OUTCOME_")) for one in attempts]
