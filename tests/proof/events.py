"""Settlements that come in any order, more than once, from several posters at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import uvloop

from services.metering.accounts import Limits, Payer, Tenant
from services.metering.adapters import postgres as postgres_store
from services.metering.adapters.sqlite import open_store
from services.metering.ledger import PostState, Settlement
from services.metering.ports import Store, UsageFilter
from tests import postgres
from tests.conformance.ledger.examples import NOW, key, settlement
from tests.proof.registry import Context, Result

_TENANTS: Final = 5
_KEYS: Final = 4
_MODELS: Final = ("a/x", "a/y", "a/z")
_POSTERS: Final = 8
_GROUP: Final = 100
_REPEATED: Final = 0.1
"""Share of the events that come again; a poster that got no answer posts its whole group again, too."""
_REPEATED_GROUPS: Final = 0.1
_SPAN_SECONDS: Final = 34 * 86_400.0
"""How late the latest event is."""


def _payers() -> list[Payer]:
    return [
        Payer(f"tenant-{tenant}", "default", f"key-{tenant}-{number}") for tenant in range(_TENANTS) for number in range(_KEYS)
    ]


def _events(number: int) -> list[Settlement]:
    chance = random.Random(11)
    payers = _payers()
    return [
        settlement(
            # Some operations have several attempts.
            f"op-{index // 3}/{index % 3 + 1}",
            amount=chance.randrange(10_000_000),
            payer=chance.choice(payers),
            model=chance.choice(_MODELS),
            tokens=chance.randrange(5000),
            start_micros=int((NOW + chance.uniform(0.0, _SPAN_SECONDS)) * 1e6),
        )
        for index in range(number)
    ]


async def _post(store: Store, events: Sequence[Settlement], seed: int) -> Counter[PostState]:
    """As one poster: its groups in any order, some twice."""
    chance = random.Random(seed)
    groups = [events[start : start + _GROUP] for start in range(0, len(events), _GROUP)]
    groups += chance.sample(groups, int(len(groups) * _REPEATED_GROUPS))
    chance.shuffle(groups)
    states: Counter[PostState] = Counter()
    for group in groups:
        states.update(await store.post(group))
    return states


Sums = dict[tuple[str, str, str], tuple[int, int, int]]
"""Attempts, nano-dollars and input tokens by tenant, key and model."""


def _sums(events: Sequence[Settlement]) -> Sums:
    sums: Sums = {}
    for event in events:
        entry = event.entry
        group = (entry.tenant_id, entry.key_id, entry.model)
        attempts, cost, tokens = sums.get(group, (0, 0, 0))
        sums[group] = (attempts + 1, cost + entry.amount, tokens + entry.input_tokens)
    return sums


async def _told(store: Store) -> Sums:
    rows = await store.usage(UsageFilter(), ("tenant", "key", "model"), (), 1000)
    return {(row.group[0], row.group[1], row.group[2]): (row.attempts, row.cost, row.input_tokens) for row in rows}


async def _wrong(store: Store, events: Sequence[Settlement]) -> list[str]:
    """What the ledger says that isn't so."""
    expected, told = _sums(events), await _told(store)
    wrong = [
        f"{group}: {told.get(group)} instead of {expected.get(group)}"
        for group in sorted(expected.keys() | told.keys())
        if told.get(group) != expected.get(group)
    ]
    owed: Counter[str] = Counter()
    for event in events:
        owed[event.entry.key_id] += event.entry.amount
        owed[event.entry.tenant_id] += event.entry.amount
    for payer in _payers():
        chain = await store.chain_by_key(payer.key_id)
        assert chain is not None
        for name, balance in ((payer.key_id, chain.key.balance), (payer.tenant_id, chain.tenant.balance)):
            if (balance.spent_nano_usd, balance.held_nano_usd) != (owed[name], 0):
                wrong.append(f"{name}: {balance} instead of {owed[name]} spent")
    return [*wrong, *(await store.verify()).problems]


async def _measured(context: Context, stores: Sequence[Store], number: int) -> Result:
    await asyncio.gather(*(stores[0].create_tenant(Tenant(f"tenant-{n}", "", Limits(), NOW), "") for n in range(_TENANTS)))
    for payer in _payers():
        await stores[0].create_key(key(payer.key_id, tenant_id=payer.tenant_id))
    events = _events(number)
    chance = random.Random(12)
    shares: list[list[Settlement]] = [[] for _ in range(_POSTERS)]
    for event in events:
        # Those that come again do so from another poster, at about the same time.
        for poster in chance.sample(range(_POSTERS), 1 + (chance.random() < _REPEATED)):
            shares[poster].append(event)
    for share in shares:
        chance.shuffle(share)
    began = time.monotonic()
    with context.track("posters", _POSTERS) as step:

        async def post(poster: int) -> Counter[PostState]:
            states = await _post(stores[poster % len(stores)], shares[poster], poster)
            step()
            return states

        states = sum(await asyncio.gather(*map(post, range(_POSTERS))), Counter[PostState]())
    rate = states.total() / (time.monotonic() - began)
    wrong = await _wrong(stores[0], events)
    posted, repeated = states[PostState.POSTED], states[PostState.DUPLICATE]
    return Result(
        number,
        f"{posted} posted, {repeated} known, {len(wrong)} sums wrong, {rate:.0f} events/s",
        f"{number}, the rest, 0",
        posted == number and repeated > 0 and not wrong,
        wrong,
    )


def _run(context: Context, opened: Sequence[AbstractAsyncContextManager[Store]]) -> Result:
    async def run() -> Result:
        async with _all(opened) as stores:
            return await _measured(context, stores, context.size(long=100_000, short=10_000))

    return uvloop.run(run())


@contextlib.asynccontextmanager
async def _all(opened: Sequence[AbstractAsyncContextManager[Store]]) -> AsyncIterator[list[Store]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(one) for one in opened]


def on_sqlite(context: Context) -> Result:
    """On SQLite, which one process uses."""
    with tempfile.TemporaryDirectory() as name:
        return _run(context, [open_store(Path(name))])


def on_postgres(context: Context) -> Result:
    """On PostgreSQL, by two stores as two processes have them."""
    with postgres.server() as server:
        url = postgres_store.url_of(asyncio.run(server.new_database()))
        return _run(context, [postgres_store.open_store(url) for _ in range(2)])
