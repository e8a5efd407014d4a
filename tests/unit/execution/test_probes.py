"""Free probes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.execution.probes import Prober, every
from services.runtime.errors import unavailable
from tests.unit.execution.examples import SECRET
from tests.unit.execution.upstream import PATIENCE, Exchange, document, hangs
from tests.unit.execution.world import world


async def test_a_round_asks_every_provider_once_and_says_why_one_is_not_well(tmp_path: Path) -> None:
    words = {"error": {"message": f"bad key {SECRET}", "type": "x"}}
    async with world(tmp_path, well=document({"data": []}), sick=document(words, 401), hung=hangs) as made:
        assert {probe.healthy for probe in made.targets.probes.values()} == {None}
        await Prober(made.targets, interval=PATIENCE, timeout=0.05).round()
        probes = made.targets.probes
        assert {name: probe.healthy for name, probe in probes.items()} == {
            "well": True,
            "sick": False,
            "hung": False,
            "echo": True,
        }
        assert probes["well"].detail == ""
        assert probes["sick"].detail.startswith("PROVIDER_AUTHENTICATION: ")
        assert "in time" in probes["hung"].detail or "no answer within" in probes["hung"].detail
        assert SECRET not in probes["sick"].detail
        assert all(probe.time > 0 and probe.seconds >= 0 for probe in probes.values())
        assert [(exchange.method, exchange.path) for exchange in made.servers["well"].exchanges] == [("GET", "/models")]
        async with asyncio.timeout(PATIENCE):
            await made.servers["hung"].ended[0].wait()
        # Probes are no attempts: nothing is recorded, nothing costs.
        assert await made.settled() == []
        assert made.reports == []


async def test_it_probes_again_and_sees_a_recovery(tmp_path: Path) -> None:
    seen = asyncio.Event()

    async def recovers(exchange: Exchange) -> None:
        await document({"data": []})(exchange)
        seen.set()

    async with world(tmp_path, a=[document({}, 503), recovers]) as made:
        task = asyncio.create_task(Prober(made.targets, interval=0.001, timeout=PATIENCE).run())
        async with asyncio.timeout(PATIENCE):
            await seen.wait()
            while not made.targets.probes["a"].healthy:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_provider_that_the_catalogue_no_longer_names_has_no_probe(tmp_path: Path) -> None:
    async with world(tmp_path, a=document({})) as made:
        await Prober(made.targets, interval=PATIENCE, timeout=PATIENCE).round()
        kept = {"echo": made.targets.providers["echo"]}
        made.targets.use(kept)
        assert list(made.targets.probes) == ["echo"]
        assert made.targets.probes["echo"].healthy is True


async def test_a_report_that_fails_is_tried_again_at_the_next_turn() -> None:
    calls = 0
    done = asyncio.Event()

    async def report() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise unavailable("routing", "down")
        done.set()

    task = asyncio.create_task(every(0.001, report))
    async with asyncio.timeout(PATIENCE):
        await done.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
