"""Operation ids, and what makes a repeated request one operation."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from services.runtime.errors import Failure, Reason

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS: Final = tuple(high + low for high in _ALPHABET for low in _ALPHABET)
_COUNTER_MASK: Final = (1 << 30) - 1

Result = TypeVar("Result")


class OperationIds:
    """Makes ids of 26 characters in Crockford's base 32, sortable by time: 48 bits of milliseconds (as in a ULID), 50 random bits of
    this process, 30 bits that count. Unique as long as a process makes fewer than 2^30 within a millisecond.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        random = secrets.randbits(50)
        self._process = "".join(_PAIRS[random >> shift & 1023] for shift in (40, 30, 20, 10, 0))
        self._count = secrets.randbits(29)
        self._millisecond = -1
        self._second = -1
        self._high = ""
        self._prefix = ""

    def create(self) -> str:
        """The next id."""
        millisecond = self._clock() // 1_000_000
        if millisecond > self._millisecond:
            # A clock set back must not break the order: the last prefix stays until time has caught up.
            self._millisecond = millisecond
            second = millisecond >> 10
            if second != self._second:
                # Under load there is a new prefix for every request: only its last pair is made anew, the rest once a second.
                self._second = second
                self._high = "".join(_PAIRS[second >> shift & 1023] for shift in (30, 20, 10, 0))
            self._prefix = self._high + _PAIRS[millisecond & 1023] + self._process
        self._count = count = (self._count + 1) & _COUNTER_MASK
        return self._prefix + _PAIRS[count >> 20] + _PAIRS[count >> 10 & 1023] + _PAIRS[count & 1023]


def moment_of(operation_id: str) -> float:
    """When an operation began, Unix seconds; 0 of what is no id of ours."""
    value = 0
    for digit in operation_id[:10]:
        place = _ALPHABET.find(digit)
        if place < 0:
            return 0.0
        value = value << 5 | place
    return value / 1000


_MAX_KEPT_BYTES: Final = 4 * 1024 * 1024
"""Pieces of a stream that are kept for callers that join it later. Past that, pieces that everybody has read are dropped."""


class Shared(Generic[Result]):
    """One operation that several callers wait for, and the pieces of its stream so far."""

    __slots__ = (
        "_base",
        "_changed",
        "_kept_bytes",
        "_pieces",
        "_readers",
        "abandon",
        "failure",
        "fingerprint",
        "leaving",
        "result",
        "size",
        "waiters",
        "wire",
        "work",
    )  # fmt: skip

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.result: Result | None = None
        self.failure: BaseException | None = None
        self.waiters = 0
        self.size = 0
        """Weight of the result among those that are remembered."""
        self.wire = 0
        """Wire format of the stream; 0: none in particular."""
        self.work: asyncio.Task[None] | None = None
        self.abandon: Callable[[], None] | None = None
        """Lets a new operation take this one's request id."""
        self.leaving: asyncio.TimerHandle | None = None
        """Ends it if nobody has joined by then."""
        self._pieces: deque[tuple[object, int]] = deque()
        self._base = 0
        self._kept_bytes = 0
        self._readers: list[Reader] = []
        self._changed: asyncio.Event = asyncio.Event()

    def is_done(self) -> bool:
        """Whether the result or the failure is there."""
        return self.result is not None or self.failure is not None

    def add(self, piece: object, weight: int) -> None:
        """Appends a piece of a stream of `weight` bytes."""
        self._pieces.append((piece, weight))
        self._kept_bytes += weight
        self._drop_read()
        self._wake()

    def is_full(self) -> bool:
        """Whether the slowest reader is so far behind that no piece should be added."""
        return self._kept_bytes > _MAX_KEPT_BYTES and bool(self._readers)

    def finish(self, result: Result) -> None:
        """Sets the result, which every waiter gets."""
        self.result = result
        self._end()

    def fail(self, failure: BaseException) -> None:
        """Sets the failure, which every waiter gets."""
        self.failure = failure
        self._end()

    async def change(self) -> None:
        """Returns when something has changed since this call began."""
        await self._changed.wait()

    @contextlib.contextmanager
    def read(self) -> Iterator[Reader]:
        """A reader of the pieces from the first one on."""
        reader = Reader(self)
        self._readers.append(reader)
        try:
            yield reader
        finally:
            reader.close()

    def piece(self, index: int) -> object | None:
        """The piece at an index; None: not there yet."""
        place = index - self._base
        return self._pieces[place][0] if place < len(self._pieces) else None

    def has_begin(self) -> bool:
        """Whether no piece was dropped."""
        return self._base == 0

    def has_advanced(self) -> None:
        """A reader has read on."""
        if self._kept_bytes > _MAX_KEPT_BYTES:
            self._drop_read()
            self._wake()

    def remove(self, reader: Reader) -> None:
        """A reader has left."""
        if reader in self._readers:
            self._readers.remove(reader)
            self.has_advanced()
            if self.is_done():
                self._end()

    def _drop_read(self) -> None:
        slowest = min((reader.index for reader in self._readers), default=self._base + len(self._pieces))
        while self._kept_bytes > _MAX_KEPT_BYTES and self._base < slowest:
            _, weight = self._pieces.popleft()
            self._kept_bytes -= weight
            self._base += 1

    def _end(self) -> None:
        if not self._readers:
            # Whoever comes now gets the result itself.
            self._pieces.clear()
            self._kept_bytes = 0
            self._base = 1
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Reader:
    """A place in the pieces of a shared operation."""

    __slots__ = ("_shared", "index", "is_whole")

    def __init__(self, shared: Shared[Any]) -> None:
        self._shared = shared
        self.index = 0
        self.is_whole = shared.has_begin()
        """Whether it could begin at the first piece."""

    def next(self) -> object | None:
        """The next piece; None: not there yet."""
        piece = self._shared.piece(self.index)
        if piece is not None:
            self.index += 1
            self._shared.has_advanced()
        return piece

    def close(self) -> None:
        """Lets go of its place."""
        self._shared.remove(self)


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """Bounds of what is remembered for replays."""

    max_count: int
    max_bytes: int
    max_seconds: float


class Requests(Generic[Result]):
    """Operations by (tenant, request id): under way, or finished and remembered for a while.

    Failed and cancelled operations are forgotten at once, so that a retry runs again. When memory is short the oldest finished ones
    go first; a request id that was forgotten is a new operation.
    """

    def __init__(self, limits: ReplayLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._running: dict[tuple[str, str], Shared[Result]] = {}
        self._done: OrderedDict[tuple[str, str], tuple[float, Shared[Result]]] = OrderedDict()
        self._bytes = 0

    def find(self, tenant_id: str, request_id: str, fingerprint: bytes) -> Shared[Result] | None:
        """The operation of this request id, if any. Failure REQUEST_ID_REUSED when it had another body."""
        key = (tenant_id, request_id)
        shared = self._running.get(key)
        if shared is None:
            self._expire()
            entry = self._done.get(key)
            if entry is None:
                return None
            shared = entry[1]
        if shared.fingerprint != fingerprint:
            raise reused(request_id)
        return shared

    def begin(self, tenant_id: str, request_id: str, fingerprint: bytes) -> Shared[Result]:
        """Registers a new operation. Failure OVERLOADED when too many are under way."""
        if len(self._running) >= self._limits.max_count:
            raise Failure(Reason.OVERLOADED, "too many requests with a request id are under way; retry later", retry_delay=1.0)
        shared: Shared[Result] = Shared(fingerprint)
        self._running[tenant_id, request_id] = shared
        return shared

    def abandon(self, tenant_id: str, request_id: str, shared: Shared[Result]) -> None:
        """The operation is about to be cancelled: who comes from now on begins another."""
        key = (tenant_id, request_id)
        if self._running.get(key) is shared:
            del self._running[key]

    def end(self, tenant_id: str, request_id: str, shared: Shared[Result], size: int) -> None:
        """Moves an operation to the finished ones, or forgets it when it has no result. `size` is its weight in bytes."""
        key = (tenant_id, request_id)
        if self._running.get(key) is shared:
            del self._running[key]
        shared.work = None
        if shared.result is None or size > self._limits.max_bytes:
            return
        shared.size = size
        self._done[key] = (self._clock() + self._limits.max_seconds, shared)
        self._bytes += size
        while len(self._done) > self._limits.max_count or self._bytes > self._limits.max_bytes:
            self._drop_oldest()

    def running(self) -> list[Shared[Result]]:
        """What is under way."""
        return list(self._running.values())

    def _expire(self) -> None:
        now = self._clock()
        while self._done and next(iter(self._done.values()))[0] <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, shared) = self._done.popitem(last=False)
        self._bytes -= shared.size


def reused(request_id: str) -> Failure:
    """The refusal of a request id that came with another request before."""
    return Failure(
        Reason.REQUEST_ID_REUSED,
        f"request id {request_id!r} was used with another request; send a new id with a new request",
        metadata={"request_id": request_id},
    )


def fingerprint(body: bytes) -> bytes:
    """What tells one request body from another."""
    return hashlib.sha256(body).digest()
