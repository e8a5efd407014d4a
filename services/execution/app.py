"""Wiring of the execution service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from services.execution import catalogue
from services.execution.adapters.anthropic import AnthropicProvider
from services.execution.adapters.echo import EchoProvider
from services.execution.adapters.gemini import GeminiProvider
from services.execution.adapters.http1 import Pool
from services.execution.adapters.local import LocalProvider
from services.execution.adapters.openai import OpenAIProvider
from services.execution.attempts import lost
from services.execution.breaker import Figures, State
from services.execution.catalogue import Entry, read_credential
from services.execution.config import Config
from services.execution.counts import Counts
from services.execution.errors import AttemptFailed
from services.execution.probes import Prober, every
from services.execution.provider import Provider
from services.execution.service import ExecutionServicer, Reports
from services.execution.spool import Spool
from services.execution.targets import Targets
from services.runtime.config import ConfigError, read_yaml
from services.runtime.dispatch import Binding
from services.runtime.errors import Failure, Reason
from services.runtime.process import Process, Service
from services.runtime.watching import Watch
from sluice.execution.v1 import execution_service_pb2
from sluice.metering.v1 import metering_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub
from sluice.routing.v1 import routing_service_pb2
from sluice.routing.v1.routing_service_pb2_grpc import RoutingServiceStub
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub

NAME: Final = "execution"
_POST_SECONDS: Final = 10.0
_REPORT_SECONDS: Final = 2.0
_BREAKERS: Final = {
    State.CLOSED: routing_service_pb2.BREAKER_STATE_CLOSED,
    State.OPEN: routing_service_pb2.BREAKER_STATE_OPEN,
    State.HALF_OPEN: routing_service_pb2.BREAKER_STATE_HALF_OPEN,
}
_PROBES: Final = {
    None: routing_service_pb2.PROBE_STATE_UNSPECIFIED,
    True: routing_service_pb2.PROBE_STATE_HEALTHY,
    False: routing_service_pb2.PROBE_STATE_UNHEALTHY,
}
_MOST_MODELS: Final = 5000


def _read(path: Path) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    """Providers, and the models of each, out of the catalogue file. Raises ConfigError."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: must be a mapping of sections"])
    entries = catalogue.parse(content.get("providers"))
    models: dict[str, list[str]] = {}
    named = content.get("models")
    for model, entry in list(named.items())[:_MOST_MODELS] if isinstance(named, Mapping) else ():
        if isinstance(entry, Mapping):
            models.setdefault(str(entry.get("provider")), []).append(str(model))
    return entries, models


class _Providers:
    """Providers as the catalogue names them; those whose entry did not change live on when it is reloaded."""

    def __init__(self, config: Config, targets: Targets, directory: Path) -> None:
        self._config = config
        self._targets = targets
        self._directory = directory
        self.entries: dict[str, Entry] = {}
        self.models: dict[str, list[str]] = {}

    async def use(self, entries: dict[str, Entry], models: dict[str, list[str]]) -> None:
        """Takes another catalogue and closes what it no longer names."""
        present = dict(self._targets.providers)
        kept = {name: present[name] for name, entry in entries.items() if self.entries.get(name) == entry and name in present}
        providers = {name: kept.get(name) or self._make(entry) for name, entry in entries.items()}
        self.entries, self.models = entries, models
        self._targets.use(providers, {name: entry.drain_seconds for name, entry in entries.items() if entry.drain_seconds})
        for name, models_of in models.items():
            provider = providers.get(name)
            if provider is not None:
                for model in models_of:
                    self._targets.target(name, provider, model)
        for name, provider in present.items():
            if name not in kept:
                await provider.close()

    def _pool(self, base_url: str) -> Pool:
        config = self._config
        return Pool(
            base_url,
            connect_timeout=config.connect_timeout,
            max_connections=config.max_connections,
            keep_alive=config.keep_alive,
            max_answer_bytes=config.max_answer_bytes,
        )

    def _make(self, entry: Entry) -> Provider:
        config = self._config
        if entry.kind == "echo":
            return EchoProvider()
        if entry.kind == "local":
            return LocalProvider(
                entry.model,
                self._local_client,
                self._directory / f"{entry.id}.log",
                context_window=entry.context_window,
                parallel=entry.parallel,
            )
        secret = _Credential(entry.credential)
        options: dict[str, Any] = {
            "address": entry.base_url,
            "credential": secret.read,
            "credential_name": entry.credential,
            "headers": entry.headers,
            "probe_path": entry.probe_path,
            "idle_timeout": config.idle_timeout,
        }
        pool = self._pool(entry.base_url)
        match entry.kind:
            case "anthropic":
                return AnthropicProvider(pool, **options)
            case "gemini":
                return GeminiProvider(pool, **options)
            case _:
                return OpenAIProvider(pool, first_byte_timeout=config.first_byte_timeout, **options)

    def _local_client(self, url: str, key: str) -> OpenAIProvider:
        return OpenAIProvider(
            self._pool(f"{url}/v1"),
            address=url,
            credential=lambda: key,
            credential_name="",
            headers={},
            first_byte_timeout=self._config.first_byte_timeout,
            idle_timeout=self._config.idle_timeout,
            kind="local",
            limit_field="max_tokens",
            # llama.cpp closes after each stream without a header that says so.
            keep_streams=False,
        )

    async def close(self) -> None:
        """Closes every provider."""
        await asyncio.gather(*(provider.close() for provider in self._targets.providers.values()))


class _Credential:
    """A secret that is read again every few seconds, so that a rotated one is taken up."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._value = read_credential(source)
        self._read_at = 0.0

    def read(self) -> str:
        """The secret; empty when none is needed. Raises AttemptFailed when one is needed and isn't there: nothing is sent then."""
        if self._source:
            now = time.monotonic()
            if now - self._read_at > 5.0:
                self._value, self._read_at = read_credential(self._source), now
            if not self._value:
                raise AttemptFailed(Reason.PROVIDER_AUTHENTICATION, f"no key of the provider: {self._source} is not set")
        return self._value


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """Opens the providers and the spool, and replays what an earlier process left in it."""
    path = process.settings.catalogue
    file = Watch(path)
    directory = process.state_dir(NAME)
    loop = asyncio.get_running_loop()
    figures = Figures(
        config.breaker_failures,
        config.breaker_window,
        config.breaker_calls,
        config.breaker_share,
        config.breaker_cooldown,
        config.breaker_longest,
        config.breaker_successes,
    )
    targets = Targets(figures, loop.time)
    providers = _Providers(config, targets, directory)
    await providers.use(*await asyncio.to_thread(_read, path))
    metering = MeteringServiceStub(process.channel("metering"))
    routing = RoutingServiceStub(process.channel("routing"))
    reports = Reports()
    refused = process.metrics.counter(
        "sluice_settlements_refused_total", "Settlements that the ledger will never take; each is logged"
    )

    async def post(settlements: Sequence[Any]) -> None:
        response = await metering.PostSettlements(
            metering_service_pb2.PostSettlementsRequest(settlements=settlements), timeout=_POST_SECONDS
        )
        for result in response.results:
            if result.state == metering_service_pb2.SETTLEMENT_STATE_REFUSED:
                refused.inc()
                process.log.error("settlement_refused", attempt=result.attempt_id, message=result.status.message)

    spool = Spool(
        directory / "spool",
        post,
        group_seconds=config.spool_group,
        segment_bytes=config.spool_segment_bytes,
        most_bytes=config.spool_bytes,
    )
    lost_count = await asyncio.to_thread(spool.open, metering_service_pb2.Settlement.FromString, lost)
    if lost_count or spool.backlog:
        process.log.warning("spool_replayed", lost=lost_count, settlements=spool.backlog)
    process.barrier.add(spool.write)
    process.metrics.gauge("sluice_spool_backlog", "Settlements that are not posted yet").set_function(
        lambda: float(spool.backlog)
    )

    def health() -> list[routing_service_pb2.TargetHealth]:
        found = []
        for target in targets:
            probe = targets.probes.get(target.provider)
            found.append(
                routing_service_pb2.TargetHealth(
                    model=target.model,
                    provider=target.provider,
                    in_flight_count=target.breaker.in_flight,
                    breaker=_BREAKERS[target.breaker.state],
                    probe=_PROBES[probe.healthy if probe is not None else None],
                    probe_detail=probe.detail[:200] if probe is not None else "",
                )
            )
        return found

    async def report() -> None:
        request = routing_service_pb2.ReportExecutionRequest(
            replica_id=process.replica_id, attempts=reports.take(), targets=health()
        )
        await routing.ReportExecution(request, timeout=_REPORT_SECONDS)

    async def watch() -> None:
        async for _ in file.changes(config.reload_interval):
            try:
                await providers.use(*await asyncio.to_thread(_read, path))
            except ConfigError as error:
                # The last good providers stay.
                process.log.error("providers_not_reloaded", problems=list(error.problems))
            else:
                process.log.info("providers_reloaded", count=len(providers.entries))

    async def warm() -> None:
        for provider in targets.providers.values():
            if isinstance(provider, LocalProvider):
                try:
                    await provider.client()
                except Failure as failure:
                    process.log.error("local_model_not_started", message=failure.message)

    counts = Counts(TokenizationServiceStub(process.channel("tokenization")), loop.time, seconds=config.count_timeout)
    process.metrics.gauge(
        "sluice_uncounted_settlements", "Attempts charged by the size of their prompt, since it couldn't be counted"
    ).set_function(lambda: float(counts.failure_count))
    servicer = ExecutionServicer(
        targets, spool, reports, health, lambda: providers.entries, counts, first_byte=config.first_byte_timeout
    )

    async def drain() -> None:
        await servicer.wait_idle(process.settings.drain_grace)
        if not await spool.flush(process.settings.drain_flush):
            process.log.warning("spool_not_flushed", settlements=spool.backlog)

    async def ready() -> None:
        """Calls can be recorded: nothing else is needed to take them."""

    prober = Prober(targets, interval=config.probe_interval, timeout=config.probe_timeout)
    workers: list[Any] = [spool.run, prober.run, partial(every, config.report_interval, report), watch]
    if config.warm_local:
        workers.append(warm)
    try:
        yield Service(
            name=NAME,
            bindings=(Binding(servicer, execution_service_pb2.DESCRIPTOR.services_by_name["ExecutionService"]),),
            pings={"spool": ready},
            workers=tuple(workers),
            drain=drain,
        )
    finally:
        await providers.close()
        spool.close()
