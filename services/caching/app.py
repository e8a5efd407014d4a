"""Wiring of the caching service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from services.caching.adapters import nats_kv, numpy_index
from services.caching.adapters.minilm import BatchingEmbedder, MiniLm
from services.caching.adapters.nats_kv import NatsSharedTier
from services.caching.config import Config
from services.caching.config import Semantic as SemanticConfig
from services.caching.errors import TierUnavailable
from services.caching.exact import ExactTier
from services.caching.semantic import SemanticTier
from services.caching.service import CachingServicer, Limits
from services.caching.tickets import Pending, Tickets
from services.runtime.config import ConfigError
from services.runtime.dispatch import Binding
from services.runtime.process import Process, Service
from sluice.caching.v1 import caching_service_pb2 as pb2

NAME: Final = "caching"
_SWEEP_SECONDS: Final = 30.0
_DRAIN_SECONDS: Final = 2.0
_WAITING_BYTES: Final = 32 * 1024 * 1024
"""Answers that wait to be embedded."""

Worker = Callable[[], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """Opens the service. Without NATS it starts all the same; without the embedding model too, and says so."""
    _check(config)
    async with contextlib.AsyncExitStack() as stack:
        workers: list[Worker] = []
        drains: list[Callable[[float], Coroutine[Any, Any, None]]] = []
        exact: ExactTier[bytes] = ExactTier(config.exact.max_entries, config.exact.max_bytes)
        metrics = process.metrics
        metrics.gauge("cache_exact_bytes", "Memory of the exact tier of this process.").set_function(lambda: exact.weight)
        metrics.gauge("cache_exact_entries", "Entries of the exact tier of this process.").set_function(lambda: len(exact))

        shared = None
        if config.shared.enabled:

            def purged(tenant: str, namespace: str) -> None:
                servicer.forget(tenant, namespace)

            shared = _open_shared(config, process, purged)
            workers.append(shared.run)
            drains.append(shared.flush)
            metrics.gauge("cache_shared_dropped", "Writes to the shared tier that were dropped.").set_function(
                lambda: shared.dropped_count
            )

        semantic = None
        absence = "the semantic tier is off"
        sweeps: list[Callable[[], int]] = [lambda: exact.sweep(time.time())]
        if config.semantic.enabled:
            try:
                semantic, index = await stack.enter_async_context(
                    _open_semantic(config.semantic, process.state_dir(NAME), workers)
                )
            except TierUnavailable as error:
                absence = f"the semantic tier could not be opened: {error}"
                process.log.warning("semantic_tier_off", reason=str(error))
            else:
                drains.append(semantic.flush)
                sweeps.append(index.sweep)
                metrics.gauge("cache_semantic_entries", "Entries of the semantic tier.").set_function(lambda: len(index))
                metrics.gauge("cache_semantic_bytes", "Memory of the semantic tier.").set_function(lambda: index.bytes)

        lookups = metrics.counter("cache_lookups", "Lookups by outcome.", ("outcome",))
        outcomes = {word: lookups.labels(word) for word in ("exact", "semantic", "miss", "bypass", "refresh")}
        servicer = CachingServicer(
            exact,
            shared,
            semantic,
            Tickets(process.settings.service_token),
            Pending(config.semantic.pending_tickets, config.semantic.pending_tickets * 1024),
            config.namespaces,
            config.default,
            Limits(
                entry_bytes=config.exact.max_entry_bytes,
                semantic_entry_bytes=config.semantic.max_entry_bytes,
                question_bytes=config.semantic.max_question_bytes,
                tallies=config.max_tallies,
            ),
            now=time.time,
            counted=lambda word: outcomes[word].inc(),
            semantic_absence=absence,
        )

        async def sweep() -> None:
            while True:
                await asyncio.sleep(_SWEEP_SECONDS)
                for work in sweeps:
                    work()

        async def drain() -> None:
            await asyncio.gather(*(finish(_DRAIN_SECONDS) for finish in drains))

        async def ready() -> None:
            """The exact tier needs nothing but this process; a lookup never fails for want of another one."""

        yield Service(
            name=NAME,
            bindings=(Binding(servicer, pb2.DESCRIPTOR.services_by_name["CachingService"]),),
            pings={"exact": ready},
            workers=(*workers, sweep),
            drain=drain,
        )


def _check(config: Config) -> None:
    wrong = [name for name in config.namespaces if not name or len(name) > 64 or set(name) - _NAMESPACE_LETTERS]
    if wrong:
        raise ConfigError([f"caching.namespaces: {name!r} must be 1 to 64 of a-z, 0-9, '_' and '-'" for name in wrong])


_NAMESPACE_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")


def _open_shared(config: Config, process: Process, purged: Callable[[str, str], None]) -> NatsSharedTier:
    shared = config.shared
    return NatsSharedTier(
        nats_kv.Settings(
            bucket=shared.bucket,
            max_bytes=shared.max_bytes,
            max_entry_bytes=shared.max_entry_bytes,
            max_age=max(settings.ttl for settings in (config.default, *config.namespaces.values())),
            read_timeout=shared.read_timeout,
            queue_entries=shared.queue_entries,
            queue_bytes=shared.queue_bytes,
            known_keys=shared.known_keys,
        ),
        process.nats,
        process.replica_id,
        now=time.time,
        clock=time.monotonic,
        purged=purged,
        warn=lambda text: process.log.warning("shared_cache_away", reason=text),
    )


@contextlib.asynccontextmanager
async def _open_semantic(
    config: SemanticConfig, directory: Path, workers: list[Worker]
) -> AsyncIterator[tuple[SemanticTier, numpy_index.NumpyIndex]]:
    """The tier and its index; appends their workers. Raises TierUnavailable."""
    model = await asyncio.to_thread(MiniLm, config.model, config.vocabulary, threads=config.threads)
    limits = numpy_index.Limits(config.max_entries_per_tenant, config.max_entries, config.max_bytes)
    # One thread: the model itself spreads over `threads`, and batches must not compete.
    with ThreadPoolExecutor(1, thread_name_prefix="embed") as executor:
        async with numpy_index.open_index(limits, time.time, directory / "semantic.sqlite") as index:
            embedder = BatchingEmbedder(model, executor, batch=config.batch, capacity=config.queue_entries)
            tier = SemanticTier(
                embedder,
                index,
                time.monotonic,
                timeout=config.timeout,
                candidates=config.candidates,
                queue_entries=config.queue_entries,
                queue_bytes=_WAITING_BYTES,
            )
            workers += (embedder.run, tier.run, index.run)
            yield tier, index
