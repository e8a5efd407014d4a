"""Callers that break off and ask again, with one key each, wherever."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import uvloop

from tests.proof import provider
from tests.proof.callers import PATIENCE_SECONDS, Address, Answer, Ask, Callers, LeftError, Outcome, TryFailedError, addresses
from tests.proof.oracle import GATEWAYS, audit, entries_of, mesh, oracle
from tests.proof.registry import Context, Result

_RATE: Final = 20.0
_SLOWEST: Final = 3.0
_MOST_BREAKS: Final = 3
_LONGEST_PAUSE: Final = 1.5
_TOGETHER: Final = 0.2
"""Share of callers whose last try is two tries at once, at two gateways."""
_PLATFORM: Final = "platform"


@dataclass(slots=True)
class _Tries:
    """How often callers asked, and broke off."""

    asked: int = 0
    broken: int = 0
    broken_mid_stream: int = 0
    different: list[str] = field(default_factory=list)
    """Those whose tries were answered differently."""


def client_retries(context: Context) -> Result:
    """Each caller breaks off up to three times, in the middle of its stream if it has one, and asks again with the same key at another
    gateway; a fifth of them ends with two tries at once. The provider may be called once for each key, and each may be charged once, by
    what the provider billed.
    """
    number = context.size(long=1000, short=150)
    with oracle(slowest=_SLOWEST) as (url, bill), mesh(url) as started, started.client() as client:
        asks = _asks(number, started.ready.key)
        outcomes, tries = uvloop.run(_loaded(context, addresses(started), asks))
        executions = provider.read_bill(bill)
        entries = entries_of(client)
    found = audit(outcomes, executions, entries)
    charges = Counter(entry.operation_id for entry in entries if entry.debit_account != _PLATFORM and entry.amount_nano_usd)
    completed = sum(execution.amount is not None for execution in executions.values())
    measured = (
        f"{len(executions)} provider calls, {completed} completed, {sum(charges.values())} charges, {found.equal} to the nano-dollar; "
        f"asked {tries.asked} times, {tries.broken} broken off, {tries.broken_mid_stream} of them mid-stream"
    )
    ok = (
        len(executions) == completed == sum(charges.values()) == found.equal == number
        and not found.twice
        and not found.complaints
        and not tries.different
        and tries.broken_mid_stream * 4 > number
    )
    errors: Counter[str] = sum((outcome.errors for outcome in outcomes), Counter())
    extra = Counter(execution.marker for execution in executions.values())
    details = [
        *tries.different,
        *found.complaints,
        *(f"{marker} was run {count} times" for marker, count in extra.items() if count > 1),
        *(f"{count} x {error}" for error, count in errors.most_common(6)),
    ]
    return Result(number, measured, f"{number} calls, completed, charges and equal; > {number // 4} mid-stream", ok, details)


def _asks(number: int, secret: str) -> list[Ask]:
    chance = random.Random(31)
    return [
        Ask(f"r{index:06d}", secret, is_streamed=chance.random() < 0.6, is_http=chance.random() < 0.5)
        for index in range(number)
    ]


async def _loaded(context: Context, gateways: Sequence[Address], asks: Sequence[Ask]) -> tuple[list[Outcome], _Tries]:
    loop = asyncio.get_running_loop()
    tries = _Tries()
    async with Callers(gateways) as callers:
        tasks = []
        began = loop.time()
        with context.track("callers", len(asks)) as step:
            for index, ask in enumerate(asks):
                await asyncio.sleep(began + index / _RATE - loop.time())
                tasks.append(asyncio.create_task(_caller(callers, ask, random.Random(index), tries)))
                tasks[-1].add_done_callback(lambda _: step())
            return list(await asyncio.gather(*tasks)), tries


async def _caller(callers: Callers, ask: Ask, chance: random.Random, tries: _Tries) -> Outcome:
    gateway = chance.randrange(GATEWAYS)
    for _ in range(chance.randint(1, _MOST_BREAKS)):
        tries.asked += 1
        pieces = chance.randint(1, 4) if ask.is_streamed else None
        try:
            async with asyncio.timeout(None if ask.is_streamed else chance.uniform(0.0, _SLOWEST)):
                await callers.once(ask, gateway, most_pieces=pieces)
        except LeftError:
            tries.broken += 1
            tries.broken_mid_stream += 1
        except TimeoutError:
            tries.broken += 1
        except TryFailedError:
            # It is seen in the last try, which goes on until it has an answer.
            pass
        gateway = (gateway + chance.randrange(1, GATEWAYS)) % GATEWAYS
        await asyncio.sleep(chance.uniform(0.0, _LONGEST_PAUSE))
    outcome = Outcome(ask)
    places = [gateway, (gateway + 1) % GATEWAYS] if chance.random() < _TOGETHER else [gateway]
    tries.asked += len(places)
    answers = await asyncio.gather(*(_patient(callers, ask, place, outcome) for place in places))
    outcome.answer = answers[0]
    if len({(answer.operation_id, answer.execution) for answer in answers if answer is not None}) != 1:
        tries.different.append(f"{ask.marker} was answered with {answers}")
    return outcome


async def _patient(callers: Callers, ask: Ask, gateway: int, outcome: Outcome) -> Answer | None:
    """A try that is repeated until it is answered; None: it wasn't in a minute."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                outcome.tries += 1
                try:
                    return await callers.once(ask, gateway)
                except TryFailedError as error:
                    outcome.errors[str(error)] += 1
                await asyncio.sleep(0.2)
    return None
