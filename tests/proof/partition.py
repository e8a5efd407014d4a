"""Metering that is away under load, and gateways that crash with money in their hands."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import uvloop

from services.cli.client import Client
from services.runtime.errors import Reason
from services.runtime.status import failure_from_rpc
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from tests.proof.callers import addresses, stubs
from tests.proof.oracle import GATEWAYS
from tests.proof.registry import Context, Result
from tests.proof.tenants import account, balance, held, seconds_held
from tests.running import Running, default_catalogue, running

_MODEL: Final = "echo/flat"
_COST: Final = 50_000_000
"""Nano-dollars of a request, as much as is held for it."""
_RECALL_FACTOR: Final = 2
"""So that slices are given out until a budget is nearly used up."""
_SLICE: Final = 32
_RATE: Final = 60
"""Requests per minute of the tenant that has a rate."""
_LARGEST_SLICE: Final = max(_SLICE, _RATE // 8)
_RATED_EACH_SECOND: Final = 20.0
_PAID_EACH_SECOND: Final = 10.0
_PAID_SHARE: Final = 0.4
"""Of the requests that ask for money, those that there is money for."""
_CRASHED_WORTH: Final = 120
_CALL_SECONDS: Final = 10.0
"""More than the gateway waits for metering: then its refusals say why."""
_RECOVERY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of the load before metering is away, while it is, and after that; and those of a lease, None: the default."""

    before: float
    away: float
    after: float
    lease: float | None

    @property
    def total(self) -> float:
        """Seconds of the load."""
        return self.before + self.away + self.after


_LONG: Final = _Times(15.0, 30.0, 30.0, None)
_SHORT: Final = _Times(4.0, 10.0, 6.0, 6.0)
"""As in the long form, leases end while metering is away."""


@dataclass(slots=True)
class _Load:
    """What became of the requests of one tenant."""

    answered: list[float] = field(default_factory=list)
    """When, on the monotonic clock; ascending."""
    refused: Counter[str] = field(default_factory=Counter)


def excess(times: Sequence[float], limit: int) -> float:
    """By how much the answers at `times` (ascending) were more, in the worst span of time, than a bucket of `limit` that fills in a
    minute lets pass.
    """
    worst, before = 0.0, 0.0
    for number, at in enumerate(times):
        # Answers up to this one, less what came meanwhile: the span that begins where that is least has most beyond the bucket.
        level = number - at * limit / 60
        before = min(before, level) if number else level
        worst = max(worst, level + 1 - before - limit)
    return worst


def partition(context: Context) -> Result:
    """Three gateways are asked for more money and a higher rate than there is. Metering stands still meanwhile, for longer than a lease
    has left: what was leased may be used, and no more. Afterwards all gateways are killed with slices in their hands, and those must
    come back: the whole budget of a tenant is usable, to the last request.
    """
    times = _SHORT if context.short else _LONG
    worth = int(_PAID_EACH_SECOND * times.total * _PAID_SHARE)
    sections: dict[str, dict[str, Any]] = {"metering": {"recall_factor": _RECALL_FACTOR}}
    if times.lease is not None:
        sections["metering"]["lease_seconds"] = times.lease
    with (
        running("mesh", sections=sections, catalogue=_catalogue(), replicas={"gateway": GATEWAYS}) as started,
        started.client() as client,
    ):
        paid = account(client, "paid", budget=worth * _COST)
        rated = account(client, "rated", rate=_RATE)
        crashed = account(client, "crashed", budget=_CRASHED_WORTH * _COST)
        loads, recovery = uvloop.run(_loaded(context, started, times, paid, rated))
        crash_seconds, used = uvloop.run(_crashed(started, client, crashed))
        spent = balance(client, "paid")[0]
    by_money, by_rate = loads
    overshoot = max(0, spent - worth * _COST, len(by_money.answered) * _COST - worth * _COST)
    uncharged = max(0, len(by_money.answered) * _COST - spent)
    over_rate = excess(by_rate.answered, _RATE)
    most = GATEWAYS * _LARGEST_SLICE
    measured = (
        f"overshoot {overshoot} nano-USD, {uncharged} uncharged, {over_rate:.0f} requests over the rate; answers again {recovery:.1f} s after {times.away:g} s; "
        f"leases back {'never' if crash_seconds is None else f'{crash_seconds:.0f} s'} after a crash, then {used} of {_CRASHED_WORTH} used"
    )
    ok = (
        not overshoot
        and not uncharged
        and over_rate <= most
        and recovery <= _RECOVERY_SECONDS
        and crash_seconds is not None
        and used == _CRASHED_WORTH
        # Who has time left isn't told that it had none.
        and Reason.DEADLINE_EXCEEDED.value not in by_money.refused + by_rate.refused
        # Else the load asked for nothing that it couldn't have.
        and Reason.BUDGET_EXHAUSTED.value in by_money.refused
        and Reason.RATE_LIMITED.value in by_rate.refused
        and Reason.DEPENDENCY_UNAVAILABLE.value in by_money.refused + by_rate.refused
    )
    asked = sum(len(load.answered) + load.refused.total() for load in loads)
    details = [
        f"{name}: {len(load.answered)} answered, refused {dict(load.refused.most_common(5))}"
        for name, load in (("money", by_money), ("rate", by_rate))
    ]
    bound = f"0, 0, <= {most} = replicas x slice; <= {_RECOVERY_SECONDS:g} s; <= 60 s, all"
    return Result(asked, measured, bound, ok, [*details, f"spent {spent} of {worth * _COST}"])


def _catalogue() -> dict[str, Any]:
    catalogue = default_catalogue()
    catalogue["models"][_MODEL] = {
        "provider": "echo",
        "upstream_model": "echo",
        "display_name": _MODEL,
        "context_window": 100_000,
        "max_output_tokens": 100,
        "capabilities": ["chat", "streaming"],
        "price": {"input": "0", "output": "0", "request": str(_COST / 1_000_000_000)},
    }
    return catalogue


async def _ask(stub: Any, secret: str, number: int) -> str:
    """Empty: answered; else the reason of the refusal."""
    message = conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=str(number))])
    request = inference_service_pb2.GenerateRequest(
        conversation=conversation_pb2.Conversation(messages=[message], max_output_tokens=100),
        routing=inference_service_pb2.RoutingWishes(model=_MODEL, allow_fallback=False),
        cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
    )
    try:
        await stub.Generate(request, timeout=_CALL_SECONDS, metadata=(("authorization", f"Bearer {secret}"),))
    except grpc.aio.AioRpcError as error:
        return failure_from_rpc(error, "the gateway").reason.value
    return ""


async def _asking(stubs: Sequence[Any], secret: str, each_second: float, seconds: float, step: Callable[[], None]) -> _Load:
    """Asks steadily."""
    load = _Load()

    async def one(number: int) -> None:
        said = await _ask(stubs[number % len(stubs)], secret, number)
        if said:
            load.refused[said] += 1
        else:
            load.answered.append(time.monotonic())
        step()

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(int(each_second * seconds)):
            await asyncio.sleep(began + number / each_second - time.monotonic())
            group.create_task(one(number))
    return load


async def _loaded(
    context: Context, started: Running, times: _Times, paid: str, rated: str
) -> tuple[tuple[_Load, _Load], float]:
    """What became of both loads, and the seconds from metering's coming back to the next answer."""
    total = int(_PAID_EACH_SECOND * times.total) + int(_RATED_EACH_SECOND * times.total)
    async with stubs(addresses(started)) as targets:
        with context.track("requests", total) as step:
            by_money = asyncio.create_task(_asking(targets, paid, _PAID_EACH_SECOND, times.total, step))
            by_rate = asyncio.create_task(_asking(targets, rated, _RATED_EACH_SECOND, times.total, step))
            await asyncio.sleep(times.before)
            pid = started.ready.pids["metering"]
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(times.away)
            finally:
                # The supervisor may have lost patience and started another.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            back = time.monotonic()
            loads = (await by_money, await by_rate)
    return loads, min((at - back for at in loads[1].answered if at > back), default=float("inf"))


async def _crashed(started: Running, client: Client, secret: str) -> tuple[float | None, int]:
    """Seconds until nothing is held after all gateways were killed, and the requests that the budget was good for in all."""
    used = 0
    async with stubs(addresses(started)) as targets:
        for number in range(2 * GATEWAYS):
            used += not await _ask(targets[number % GATEWAYS], secret, number)
        for name, pid in started.ready.pids.items():
            if name.partition("-")[0] == "gateway":
                os.kill(pid, signal.SIGKILL)
        held_seconds = await seconds_held(client)
        ends = time.monotonic() + 60.0
        for number in itertools.count():
            said = await _ask(targets[number % GATEWAYS], secret, number)
            used += not said
            if time.monotonic() > ends:
                break
            if said == Reason.BUDGET_EXHAUSTED.value and not (await asyncio.to_thread(held, client)):
                break
            if said:
                # The rest may be in another gateway's slice, and one that was killed may not be there yet.
                await asyncio.sleep(0.1)
    return held_seconds, used
