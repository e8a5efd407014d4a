"""The semantic tier: an answer to a question that means the same, inside one tenant and one scope."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from services.caching.breaker import Breaker
from services.caching.errors import TierUnavailable
from services.caching.guard import veto
from services.caching.ports import Embedder, Match, Record, Vector, VectorIndex

_STORE_SECONDS: Final = 5.0
"""Longest time for embedding and storing one answer, off the path."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found."""

    match: Match | None
    """The record whose answer serves; None: none does."""
    score: float | None
    """Cosine of the nearest record, or of the one that serves; None: none was compared."""
    reason: str
    """Why, in words."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An answer that waits to be stored."""

    partition: str
    scope: bytes
    key: bytes
    namespace: str
    text: str
    payload: bytes
    """The answer."""
    create_time: float
    expire_time: float


class SemanticTier:
    """Searches at once, stores in the background. `run` must be running."""

    def __init__(
        self,
        embedder: Embedder,
        index: VectorIndex,
        clock: Callable[[], float],
        *,
        timeout: float,
        candidates: int,
        queue_entries: int,
        queue_bytes: int,
    ) -> None:
        """`clock` is monotonic; `timeout` in seconds."""
        self._embedder = embedder
        self._index = index
        self._clock = clock
        self._timeout = timeout
        self._candidates = candidates
        self._queue_entries = queue_entries
        self._queue_bytes = queue_bytes
        self._breaker = Breaker()
        self._queue: deque[Waiting] = deque()
        self._bytes = 0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._current: Waiting | None = None
        self.failed_count = 0

    async def find(self, partition: str, scope: bytes, question: str, threshold: float) -> Finding:
        """The nearest record that reaches `threshold` and passes the guard. Raises TierUnavailable within the timeout."""
        if not self._breaker.allows(self._clock()):
            raise TierUnavailable("it didn't answer lately and is not asked for a moment")
        try:
            async with asyncio.timeout(self._timeout):
                vector = await self._embedder.embed(question, urgent=True)
                matches = None if vector is None else await self._index.search(partition, scope, vector, self._candidates)
        except (TimeoutError, TierUnavailable) as error:
            self._breaker.failed(self._clock())
            if isinstance(error, TierUnavailable):
                raise
            raise TierUnavailable(f"no answer within {self._timeout * 1000:g} ms") from None
        self._breaker.succeeded()
        if matches is None:
            return Finding(None, None, "the question is too long for the embedding model or has words that it doesn't know")
        return judge(question, matches, threshold)

    def add(self, waiting: Waiting) -> bool:
        """Queues an answer; False when it was dropped."""
        if len(self._queue) >= self._queue_entries or self._bytes + len(waiting.payload) > self._queue_bytes:
            return False
        self._queue.append(waiting)
        self._bytes += len(waiting.payload)
        self._idle.clear()
        self._work.set()
        return True

    async def run(self) -> None:
        """The worker that stores."""
        while True:
            await self._work.wait()
            if not self._queue:
                self._idle.set()
                self._work.clear()
                continue
            waiting = self._queue.popleft()
            self._bytes -= len(waiting.payload)
            self._current = waiting
            try:
                async with asyncio.timeout(_STORE_SECONDS):
                    vector = await self._embedder.embed(waiting.text, urgent=False)
                    # A purge may have come while the model ran.
                    if vector is not None and self._current is waiting:
                        await self._index.upsert(_record(waiting, vector))
            except (TimeoutError, TierUnavailable):
                self.failed_count += 1
            finally:
                self._current = None

    async def flush(self, timeout: float) -> None:
        """Waits until all that is queued is stored, at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            self.failed_count += len(self._queue)

    async def purge(self, partition: str, namespace: str) -> int:
        """Removes a partition's records, of one namespace when it is given, waiting ones too. Raises TierUnavailable."""

        def concerned(waiting: Waiting) -> bool:
            return waiting.partition == partition and namespace in ("", waiting.namespace)

        kept = deque(waiting for waiting in self._queue if not concerned(waiting))
        self._queue = kept
        self._bytes = sum(len(waiting.payload) for waiting in kept)
        if self._current is not None and concerned(self._current):
            self._current = None
        self._work.set()
        return await self._bounded(self._index.delete(partition, namespace))

    async def count(self, partition: str, namespace: str) -> int:
        """How many records there are. Raises TierUnavailable."""
        return await self._bounded(self._index.count(partition, namespace))

    async def _bounded(self, call: Coroutine[Any, Any, int]) -> int:
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                return await call
        except TimeoutError:
            raise TierUnavailable(f"no answer within {_STORE_SECONDS:g} s") from None


def judge(question: str, matches: list[Match], threshold: float) -> Finding:
    """The first of `matches`, nearest first, that reaches `threshold` and passes the guard."""
    if not matches:
        return Finding(None, None, "no entry of the same scope")
    nearest = matches[0].score
    if nearest < threshold:
        return Finding(None, nearest, f"the nearest entry is below the threshold of {threshold:g}")
    first: str | None = None
    for match in matches:
        if match.score < threshold:
            break
        refusal = veto(question, match.text)
        if refusal is None:
            return Finding(match, match.score, "a question that means the same was answered")
        first = first or refusal
    return Finding(None, nearest, f"the guard refused the nearest entry: {first}")


def _record(waiting: Waiting, vector: Vector) -> Record:
    return Record(
        partition=waiting.partition,
        scope=waiting.scope,
        key=waiting.key,
        namespace=waiting.namespace,
        vector=vector,
        text=waiting.text,
        payload=waiting.payload,
        create_time=waiting.create_time,
        expire_time=waiting.expire_time,
    )
