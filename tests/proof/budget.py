"""Many callers at once for the money of few, over several gateways."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import uvloop

from services.cli.client import Client
from services.runtime.errors import Reason
from services.runtime.status import failure_from_rpc
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.proof.callers import addresses
from tests.proof.oracle import GATEWAYS
from tests.proof.registry import Context, Result
from tests.proof.tenants import QUIET_SECONDS, account, balance
from tests.running import Running, default_catalogue, running

CALLERS: Final = 500
WORTH: Final = 100
"""Requests that a budget is worth."""
USABLE: Final = 0.95
_FLAT: Final = "echo/flat"
_LONG: Final = "echo/long"
_HOLD: Final = 50_000_000
"""Nano-dollars that are held for a request of either model."""
_TOKENS: Final = 100
_ANSWERED: Final = 40
"""Tokens of an answer of the second model, whose hold is for _TOKENS."""
_SECONDS: Final = 0.2
"""That an answer takes."""
_CALL_SECONDS: Final = 30.0
_NO_MONEY: Final = Reason.BUDGET_EXHAUSTED.value
_MOST_RACES: Final = 10
_SECTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "metering": {"bootstrap_requests_per_minute": -1, "bootstrap_concurrency": -1}
}


def _catalogue() -> dict[str, Any]:
    catalogue = default_catalogue()
    shared = {
        "provider": "echo",
        "context_window": 100_000,
        "max_output_tokens": _TOKENS,
        "capabilities": ["chat", "streaming"],
    }
    free = {"input": "0", "output": "0"}
    # By the request, so that what is held is what it costs; and by the token, of which fewer come than are held for.
    prices = {_FLAT: {**free, "request": "0.05"}, _LONG: {**free, "output": str(0.05 / _TOKENS * 1_000_000)}}
    for model, price in prices.items():
        catalogue["models"][model] = {**shared, "upstream_model": "echo", "display_name": model, "price": price}
    return catalogue


@contextlib.contextmanager
def _mesh() -> Iterator[tuple[Running, Client]]:
    with (
        running("mesh", sections=_SECTIONS, catalogue=_catalogue(), replicas={"gateway": GATEWAYS}) as started,
        started.client() as client,
    ):
        yield started, client


@dataclass(slots=True)
class _Round:
    """What became of the callers."""

    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def admitted(self) -> int:
        """Those that were answered."""
        return self.outcomes["answered"]


class _Callers:
    """Calls over all gateways in turn. Use as a context."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets
        self._stack = contextlib.AsyncExitStack()
        self._numbers = itertools.count()

    async def __aenter__(self) -> _Callers:
        channels = [await self._stack.enter_async_context(grpc.aio.insecure_channel(target)) for target in self._targets]
        self._stubs: list[Any] = [InferenceServiceStub(channel) for channel in channels]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def call(self, secret: str, model: str, *, streaming: bool, gateway: int | None = None) -> str:
        """`answered`, or the reason of the refusal."""
        number = next(self._numbers)
        stub = self._stubs[(number if gateway is None else gateway) % len(self._stubs)]
        directives = json.dumps({"delay": _SECONDS, "output_tokens": _ANSWERED, "chunks": 4})
        message = conversation_pb2.Message(
            role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=f"{number} [[echo {directives}]]")]
        )
        kind = inference_service_pb2.StreamGenerateRequest if streaming else inference_service_pb2.GenerateRequest
        request = kind(
            conversation=conversation_pb2.Conversation(messages=[message], max_output_tokens=_TOKENS),
            routing=inference_service_pb2.RoutingWishes(model=model, allow_fallback=False),
            cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
        )
        metadata = (("authorization", f"Bearer {secret}"),)
        try:
            if streaming:
                async for _ in stub.StreamGenerate(request, timeout=_CALL_SECONDS, metadata=metadata):
                    pass
            else:
                await stub.Generate(request, timeout=_CALL_SECONDS, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            failure = failure_from_rpc(error, "the gateway")
            return _NO_MONEY if failure.reason is Reason.BUDGET_EXHAUSTED else f"{failure.reason.value}: {failure.message}"
        return "answered"

    async def race(self, secret: str, model: str, *, streaming: bool) -> _Round:
        """CALLERS at once."""
        calls = (self.call(secret, model, streaming=streaming) for _ in range(CALLERS))
        return _Round(Counter(await asyncio.gather(*calls)))


def budget_race(context: Context) -> Result:
    """CALLERS at once on a budget for WORTH of them, over three gateways, whole answers and streams in turn; each round is a tenant of its
    own. What is held for a request is what it costs, so exactly WORTH may be admitted, and no nano-dollar beyond the budget spent.
    """
    rounds = context.size(long=20, short=4)
    with _mesh() as (started, client):
        secrets = [account(client, f"race-{number}", budget=WORTH * _HOLD) for number in range(rounds)]
        results = uvloop.run(_races(context, [address.grpc for address in addresses(started)], secrets))
        balances = [balance(client, f"race-{number}") for number in range(rounds)]
    admitted = [result.admitted for result in results]
    others = sum((result.outcomes for result in results), Counter())
    del others["answered"], others[_NO_MONEY]
    overshoot = max(0, *(spent + held - WORTH * _HOLD for spent, held in balances))
    exact = sum(count == WORTH for count in admitted)
    return Result(
        rounds,
        f"{exact} rounds with exactly {WORTH} of {CALLERS} admitted (least {min(admitted)}, most {max(admitted)}), overshoot {overshoot} "
        f"nano-USD, {others.total()} otherwise refused",
        f"{rounds} rounds, 0, 0",
        exact == rounds and not overshoot and not others,
        [
            *(f"{count} x {reason}" for reason, count in others.most_common(5)),
            *(f"round {number}: {count} admitted" for number, count in enumerate(admitted) if count != WORTH),
        ],
    )


async def _races(context: Context, targets: Sequence[str], secrets: Sequence[str]) -> list[_Round]:
    results = []
    async with _Callers(targets) as callers:
        with context.track("rounds", len(secrets)) as step:
            for number, secret in enumerate(secrets):
                results.append(await callers.race(secret, _FLAT, streaming=number % 2 == 1))
                step()
    return results


def budget_reuse(context: Context) -> Result:
    """As budget_race, where answers cost two fifths of what is held for them: what is freed must be usable. Callers come until the budget
    is used up; then, when all is quiet and every gateway has given back what it had, one after another until each gateway refuses.
    """
    rounds = context.size(long=20, short=4)
    budget = WORTH * _HOLD
    with _mesh() as (started, client):
        names = [f"reuse-{number}" for number in range(rounds)]
        secrets = [account(client, name, budget=budget) for name in names]
        targets = [address.grpc for address in addresses(started)]
        results = uvloop.run(_reuses(context, client, targets, list(zip(names, secrets, strict=True))))
        balances = [balance(client, name) for name in names]
    used = [spent / budget for spent, _ in balances]
    overshoot = max(0, *(spent - budget for spent, _ in balances))
    false_refusals = [refusal for result in results for refusal in result]
    return Result(
        rounds,
        f"{min(used):.1%} of the budget used (median {statistics.median(used):.1%}), overshoot {overshoot} nano-USD, {len(false_refusals)} false "
        "refusals after quiescence",
        f">= {USABLE:.0%}, 0, 0",
        min(used) >= USABLE and not overshoot and not false_refusals,
        [
            *false_refusals,
            *(f"{name}: {share:.1%} used" for name, share in zip(names, used, strict=True) if share < USABLE),
        ],
    )


async def _reuses(
    context: Context, client: Client, targets: Sequence[str], accounts: Sequence[tuple[str, str]]
) -> list[list[str]]:
    """False refusals, by round."""
    found = []
    async with _Callers(targets) as callers:
        with context.track("rounds", len(accounts)) as step:
            for number, (_, secret) in enumerate(accounts):
                for _ in range(_MOST_RACES):
                    if (await callers.race(secret, _LONG, streaming=number % 2 == 1)).outcomes[_NO_MONEY]:
                        break
                step()
        ends = time.monotonic() + QUIET_SECONDS
        for name, _ in accounts:
            while (await asyncio.to_thread(balance, client, name))[1] and time.monotonic() < ends:
                await asyncio.sleep(0.5)
        with context.track("rounds, when all is quiet", len(accounts)) as step:
            for number, (name, secret) in enumerate(accounts):
                found.append(await _after_quiescence(callers, client, name, secret, streaming=number % 2 == 1))
                step()
    return found


async def _after_quiescence(callers: _Callers, client: Client, name: str, secret: str, *, streaming: bool) -> list[str]:
    """Refusals of requests that what is left covers."""
    refusals = []
    for gateway in range(GATEWAYS):
        while True:
            spent, held = await asyncio.to_thread(balance, client, name)
            left = WORTH * _HOLD - spent - held
            # Half of what is left covers all of them, so none may be refused; in the end one after another.
            at_once = max(1, left // (2 * _HOLD))
            calls = (callers.call(secret, _LONG, streaming=streaming, gateway=gateway) for _ in range(at_once))
            refused = [outcome for outcome in await asyncio.gather(*calls) if outcome != "answered"]
            if refused:
                if left >= _HOLD:
                    refusals.append(f"{name} at gateway {gateway}, {held} held, {left} left, {at_once} at once: {refused[0]}")
                break
    return refusals
