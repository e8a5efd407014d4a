"""Job table and queues on NATS JetStream.

    SLUICE_JOBS    work queue, `sluice.jobs.<tenant>.<class>`, discard new, a cap per subject: a full queue is an error
    SLUICE_LATER   tickets of later: `sluice.later.at.…` holds scheduled messages (ADR-51), `sluice.later.due.…` gets them when due,
                   from where workers move them into SLUICE_JOBS. A stream of its own, since the server refuses scheduling
                   together with discard new (err_code 10052, nats-server 2.15.1)
    SLUICE_DEAD    dead letters, `sluice.dead.<tenant>.<class>`
    KV sluice-jobs the job table, `<tenant>.<job id>`, changed by compare-and-set

The broker's deduplication is a convenience only (reliability.md M4, M5): the table decides. Everything that must be known to have
happened is confirmed: publishes by their PubAck, acknowledgements by `ack_sync` (M11). Fetches are short (M12).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

from google.protobuf.message import DecodeError
from nats.aio.client import Client as NatsClient
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext, api
from nats.js.errors import (
    APIError,
    BadRequestError,
    FetchTimeoutError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    NotFoundError,
    ServiceUnavailableError,
)
from nats.js.kv import KeyValue

from services.batching.cancellation import checkpoint
from services.batching.errors import BatchingError, Conflict, QueueFull, QueueUnavailable, TooLarge
from services.batching.job import Job
from services.batching.ports import Delivery, QueueName, Row, Ticket
from services.batching.proto import (
    record_from_proto,
    record_to_proto,
    ticket_from_proto,
    ticket_to_proto,
    timestamp,
)
from services.runtime.errors import Failure, Reason
from services.runtime.status import status_from_failure
from sluice.jobs.v1 import job_service_pb2 as pb2

JOBS: Final = "SLUICE_JOBS"
LATER: Final = "SLUICE_LATER"
DEAD: Final = "SLUICE_DEAD"
BUCKET: Final = "sluice-jobs"
_TABLE: Final = f"KV_{BUCKET}"
_ROWS: Final = f"$KV.{BUCKET}."
"""The bucket's stream, and what its subjects begin with."""
CANCELLED: Final = "sluice.jobs-cancelled"
"""Core NATS subject on which cancels are announced; the payload is a job id."""
WAKE: Final = "sluice.jobs-wake"
"""Core NATS subject on which new tickets are announced."""

_TIMEOUT: Final = 2.0
"""Seconds until a call that NATS doesn't answer is given up; one that is under way when the server dies waits so long."""
_FETCH_SECONDS: Final = 0.2
_ROWS_AT_ONCE: Final = 64
_READER_SECONDS: Final = 30.0
"""A list that nobody reads on is forgotten by the server."""
_DELETED: Final = frozenset(("KV-Operation", "Nats-Marker-Reason"))
"""Headers of a row that says that there is none."""
_WATCHER_SECONDS: Final = 5.0
"""What nobody watches any more is forgotten by the server: it has few consumers to give, and nats-py's default is 5 minutes."""
_WATCH_CHECK: Final = 2.0
"""Seconds of silence after which a watcher is checked."""
_ROW_MARGIN: Final = 16 * 1024
"""Bytes that a row may have more than its ticket: states, times and a failure."""
_FULL: Final = 10077
"""err_code of `maximum messages per subject exceeded`."""
_FULL_SECONDS: Final = 5.0
"""Seconds until a due ticket whose queue was full is moved again."""
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")

Connect = Callable[[], Awaitable[NatsClient]]


def token(text: str) -> str:
    """`text` as one token of a subject or key: itself, or base64url after `=` when it has characters of its own meaning."""
    if _PLAIN.fullmatch(text):
        return text
    return "=" + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def text_of(encoded: str) -> str:
    """The text behind a token. Raises ValueError for what `token` never gives."""
    if not encoded.startswith("="):
        if not _PLAIN.fullmatch(encoded):
            raise ValueError(f"{encoded!r} is no token")
        return encoded
    data = encoded[1:]
    text = base64.urlsafe_b64decode(data + "=" * (-len(data) % 4)).decode()
    if token(text) != encoded:
        raise ValueError(f"{encoded!r} is no token")
    return text


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turns what means that the broker isn't there into QueueUnavailable."""
    try:
        yield
    except (NatsTimeoutError, NoRespondersError, TimeoutError, ConnectionError, OSError) as error:
        raise QueueUnavailable from error
    except ServiceUnavailableError as error:
        raise QueueUnavailable from error
    except APIError:
        raise
    except NatsError as error:
        raise QueueUnavailable from error
    except BatchingError:
        raise
    except Failure as failure:
        # The process's own connection says that it isn't connected.
        raise QueueUnavailable from failure


class JetStream:
    """Streams and bucket, made at first use and whenever the server has lost them."""

    def __init__(self, connect: Connect, *, capacity: int, retention: float, replicas: int) -> None:
        self._connect = connect
        self._capacity = capacity
        self._retention = retention
        self._replicas = replicas
        self._ready: tuple[JetStreamContext, KeyValue] | None = None
        self._lock = asyncio.Lock()
        self._max_payload = 0

    async def context(self) -> tuple[JetStreamContext, KeyValue]:
        """JetStream and the table. Raises QueueUnavailable."""
        with _translated():
            client = await self._connect()
            if not client.is_connected:
                raise QueueUnavailable
            self._max_payload = client.max_payload
            if self._ready is None:
                async with self._lock:
                    if self._ready is None:
                        self._ready = await self._prepare(client)
            return self._ready

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message that the server takes; 0 before the first connection."""
        return self._max_payload

    def forget(self) -> None:
        """Streams are looked for again at the next use."""
        self._ready = None

    async def _prepare(self, client: NatsClient) -> tuple[JetStreamContext, KeyValue]:
        jetstream = client.jetstream(timeout=_TIMEOUT)
        for config in self._streams():
            await _ensure(jetstream, config)
        try:
            bucket = await jetstream.key_value(BUCKET)
        except NotFoundError:
            bucket = await jetstream.create_key_value(
                api.KeyValueConfig(
                    bucket=BUCKET,
                    history=1,
                    ttl=self._retention,
                    storage=api.StorageType.FILE,
                    replicas=self._replicas,
                )
            )
        return jetstream, bucket

    def _streams(self) -> Iterator[api.StreamConfig]:
        common: dict[str, Any] = {"storage": api.StorageType.FILE, "num_replicas": self._replicas}
        yield api.StreamConfig(
            name=JOBS,
            subjects=["sluice.jobs.*.*"],
            retention=api.RetentionPolicy.WORK_QUEUE,
            discard=api.DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=self._capacity,
            duplicate_window=120,
            **common,
        )
        yield api.StreamConfig(
            name=LATER,
            subjects=["sluice.later.at.*.*.*", "sluice.later.due.*.*"],
            retention=api.RetentionPolicy.WORK_QUEUE,
            allow_msg_schedules=True,
            allow_msg_ttl=True,
            **common,
        )
        yield api.StreamConfig(name=DEAD, subjects=["sluice.dead.*.*"], max_age=self._retention, duplicate_window=120, **common)


async def _ensure(jetstream: JetStreamContext, config: api.StreamConfig) -> None:
    try:
        await jetstream.add_stream(config)
    except BadRequestError as error:
        # Another process, or an operator, made it with other settings: theirs stay.
        if error.err_code != 10058:
            raise


class JetStreamTable:
    """JobTable on a key-value bucket."""

    def __init__(self, streams: JetStream) -> None:
        self._streams = streams

    async def _bucket(self) -> KeyValue:
        return (await self._streams.context())[1]

    async def get(self, tenant_id: str, job_id: str) -> Row | None:
        """See JobTable."""
        bucket = await self._bucket()
        with _translated():
            try:
                entry = await bucket.get(_key(tenant_id, job_id))
            except KeyNotFoundError:
                return None
        return Row(_job_of(entry.value), entry.revision or 0)

    async def create(self, job: Job) -> int:
        """See JobTable."""
        return await self._write(job, 0)

    async def replace(self, job: Job, revision: int) -> int:
        """See JobTable."""
        return await self._write(job, revision)

    async def _write(self, job: Job, revision: int) -> int:
        bucket = await self._bucket()
        record = record_to_proto(job).SerializeToString()
        with _translated():
            try:
                return await bucket.update(_key(job.tenant_id, job.id), record, last=revision)
            except KeyWrongLastSequenceError as error:
                raise Conflict from error
            except MaxPayloadError as error:
                raise TooLarge(len(record), self._streams.max_payload) from error

    async def list(self, tenant_id: str) -> AsyncIterator[Job]:
        """See JobTable."""
        jetstream, _ = await self._streams.context()
        subject = f"{_ROWS}{token(tenant_id)}.>"
        with _translated():
            # A pull consumer of our own, since the server tells how many rows there are as it makes one. nats-py's watcher asks later, when
            # rows may have left the server's count and not arrived here yet, and then takes the table for empty.
            made = await jetstream.add_consumer(_TABLE, config=_reader(subject), timeout=_TIMEOUT)
            rows = await jetstream.pull_subscribe_bind(made.name, stream=_TABLE)
        left = made.num_pending or 0
        try:
            while left:
                try:
                    with _translated():
                        messages = await rows.fetch(min(left, _ROWS_AT_ONCE), timeout=_TIMEOUT)
                except QueueUnavailable:
                    # Unless what was left is gone meanwhile.
                    with _translated():
                        left = (await jetstream.consumer_info(_TABLE, made.name, timeout=_TIMEOUT)).num_pending or 0
                    if left:
                        raise
                    return
                for message in messages:
                    if not (message.headers and _DELETED & message.headers.keys()):
                        yield _job_of(message.data)
                left = messages[-1].metadata.num_pending
        finally:
            with contextlib.suppress(NatsError, OSError):
                await rows.unsubscribe()
            with contextlib.suppress(NatsError, OSError):
                await jetstream.delete_consumer(_TABLE, made.name)

    async def watch(self, tenant_id: str, job_id: str) -> AsyncGenerator[Job, None]:
        """See JobTable."""
        seen = 0
        while True:
            bucket = await self._bucket()
            with _translated():
                watcher = await bucket.watch(_key(tenant_id, job_id), ignore_deletes=True, inactive_threshold=_WATCHER_SECONDS)
            try:
                while True:
                    checkpoint()
                    try:
                        entry = await _next(watcher, _WATCH_CHECK)
                    except (NatsTimeoutError, TimeoutError):
                        # The consumer behind a watcher lives in the server's memory: after a restart it says nothing for ever.
                        row = await self.get(tenant_id, job_id)
                        if row is not None and row.revision != seen:
                            break
                        continue
                    if entry is not None and entry.revision != seen:
                        seen = entry.revision
                        yield _job_of(entry.value)
            finally:
                await _stop(watcher)


def _reader(subject: str) -> api.ConsumerConfig:
    return api.ConsumerConfig(
        filter_subject=subject,
        deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
        ack_policy=api.AckPolicy.NONE,
        inactive_threshold=_READER_SECONDS,
        mem_storage=True,
        num_replicas=1,
    )


async def _next(watcher: Any, seconds: float) -> Any:
    return await watcher.updates(timeout=seconds)


async def _stop(watcher: Any) -> None:
    with contextlib.suppress(NatsError, ConnectionError, OSError):
        await watcher.stop()


def _key(tenant_id: str, job_id: str) -> str:
    return f"{token(tenant_id)}.{token(job_id)}"


def _job_of(value: bytes | None) -> Job:
    return record_from_proto(pb2.JobRecord.FromString(value or b""))


class JetStreamQueues:
    """Queues on JetStream streams."""

    def __init__(self, streams: JetStream, connect: Connect, *, capacity: int, ack_wait: float, idle: float) -> None:
        self._streams = streams
        self._connect = connect
        self._capacity = capacity
        self._ack_wait = ack_wait
        self._idle = idle
        self._subscriptions: dict[QueueName, JetStreamContext.PullSubscription] = {}

    async def put(self, ticket: Ticket) -> None:
        """See Queues."""
        message = ticket_to_proto(ticket)
        await self._fits(message)
        await self._publish(message)
        with contextlib.suppress(NatsError, Failure):
            await (await self._connect()).publish(WAKE, b"")

    async def _fits(self, message: pb2.JobMessage) -> None:
        """Raises TooLarge for a ticket whose row of the table, with a failure in it, would be refused later."""
        with _translated():
            limit = (await self._connect()).max_payload - _ROW_MARGIN
        if message.ByteSize() > limit:
            raise TooLarge(message.ByteSize(), limit)

    async def _publish(self, message: pb2.JobMessage) -> None:
        jetstream, _ = await self._streams.context()
        subject = f"sluice.jobs.{token(message.tenant_id)}.{token(message.submit.job_class)}"
        try:
            await jetstream.publish(
                subject,
                message.SerializeToString(),
                timeout=_TIMEOUT,
                # With the body: of two submits that race under one id the table takes either, so both tickets must be there.
                headers={"Nats-Msg-Id": f"{message.job_id}/{message.attempt_number}/{message.generation}/{_body(message)}"},
            )
        except ServiceUnavailableError as error:
            if error.err_code == _FULL:
                raise QueueFull(self._capacity) from error
            self._streams.forget()
            raise QueueUnavailable from error
        except (NatsError, TimeoutError, OSError) as error:
            self._streams.forget()
            raise QueueUnavailable from error

    async def put_later(self, ticket: Ticket, at: float) -> None:
        """See Queues. The server schedules by whole seconds; a ticket is never early."""
        jetstream, _ = await self._streams.context()
        message = ticket_to_proto(ticket)
        await self._fits(message)
        tenant, job_class = token(message.tenant_id), token(message.submit.job_class)
        due = datetime.datetime.fromtimestamp(int(at) + 1, datetime.UTC)
        with _translated():
            await jetstream.publish(
                f"sluice.later.at.{tenant}.{job_class}.{token(f'{message.job_id}-{_body(message)}')}",
                message.SerializeToString(),
                timeout=_TIMEOUT,
                headers={
                    "Nats-Schedule": f"@at {due:%Y-%m-%dT%H:%M:%SZ}",
                    "Nats-Schedule-Target": f"sluice.later.due.{tenant}.{job_class}",
                },
            )

    async def move_due(self) -> None:
        """Moves tickets that are due into their queues, until cancelled. Any number of processes may do so."""
        while True:
            checkpoint()
            try:
                await self._move_some()
            except (QueueUnavailable, NatsError, OSError):
                self._streams.forget()
                await asyncio.sleep(1.0)

    async def _move_some(self) -> None:
        jetstream, _ = await self._streams.context()
        with _translated():
            subscription = await jetstream.pull_subscribe(
                "sluice.later.due.*.*",
                durable="mover",
                stream=LATER,
                config=api.ConsumerConfig(ack_policy=api.AckPolicy.EXPLICIT, ack_wait=10, max_deliver=-1),
            )
        try:
            while True:
                checkpoint()
                try:
                    messages = await subscription.fetch(32, timeout=2.0)
                except (NatsTimeoutError, FetchTimeoutError, TimeoutError):
                    await self._streams.context()
                    continue
                for message in messages:
                    await self._move(message)
                with contextlib.suppress(NatsError, Failure):
                    await (await self._connect()).publish(WAKE, b"")
        finally:
            with contextlib.suppress(NatsError, OSError):
                await subscription.unsubscribe()

    async def _move(self, message: Any) -> None:
        ticket = _ticket_of(message)
        if ticket is None:
            await self._refuse(message)
            return
        try:
            await self._publish(ticket_to_proto(ticket))
        except QueueFull:
            # Only this one waits: tickets of other tenants are behind it.
            await message.nak(delay=_FULL_SECONDS)
        else:
            await message.ack_sync(timeout=_TIMEOUT)

    async def _refuse(self, message: Any) -> None:
        """Puts what is no ticket among the dead letters and removes it: it would come again for ever."""
        jetstream, _ = await self._streams.context()
        digest = hashlib.sha256(message.data).hexdigest()
        failure = Failure(
            Reason.INTERNAL,
            f"a message of {len(message.data)} bytes on {message.subject!r} is no job",
            metadata={"sha256": digest, "subject": message.subject},
        )
        *_, tenant, job_class = message.subject.split(".")
        letter = pb2.DeadLetter(error=status_from_failure(failure), dead_time=timestamp(time.time()))
        with _translated():
            await jetstream.publish(
                f"sluice.dead.{tenant}.{job_class}",
                letter.SerializeToString(),
                timeout=_TIMEOUT,
                headers={"Nats-Msg-Id": f"{message.metadata.stream}/{message.metadata.sequence.stream}/{digest}"},
            )
            await message.ack_sync(timeout=_TIMEOUT)

    async def bury(self, ticket: Ticket, failure: Failure, now: float) -> None:
        """See Queues."""
        jetstream, _ = await self._streams.context()
        letter = pb2.DeadLetter(
            message=ticket_to_proto(ticket),
            error=status_from_failure(failure),
            dead_time=timestamp(now),
            attempt_count=ticket.job.attempts,
        )
        job = ticket.job
        with _translated():
            await jetstream.publish(
                f"sluice.dead.{token(job.tenant_id)}.{token(job.job_class)}",
                letter.SerializeToString(),
                timeout=_TIMEOUT,
                headers={"Nats-Msg-Id": f"{job.id}/{job.create_time}/{job.generation}/{ticket.attempt}"},
            )

    async def waiting(self) -> dict[QueueName, int]:
        """See Queues."""
        jetstream, _ = await self._streams.context()
        try:
            with _translated():
                info = await jetstream.stream_info(JOBS, subjects_filter="sluice.jobs.>")
        except NotFoundError:
            self._streams.forget()
            return {}
        found = {}
        for subject, count in (info.state.subjects or {}).items():
            _, _, tenant, job_class = subject.split(".")
            with contextlib.suppress(ValueError):
                # Subjects that are none of ours can't be served.
                found[QueueName(text_of(tenant), text_of(job_class))] = count
        return found

    async def take(self, queue: QueueName, most: int) -> list[Delivery]:
        """See Queues."""
        known = self._subscriptions.get(queue)
        try:
            messages = await self._fetch(known or await self._subscribe(queue), most)
        except (QueueUnavailable, APIError) as error:
            self._subscriptions.pop(queue, None)
            removed = isinstance(error, APIError) or isinstance(error.__cause__, ServiceUnavailableError)
            if known is None or not removed:
                raise
            # The consumer was removed while idle; a new one says so if it is more than that.
            messages = await self._fetch(await self._subscribe(queue), most)
        deliveries = []
        for message in messages:
            ticket = _ticket_of(message)
            if ticket is None:
                await self._refuse(message)
            else:
                deliveries.append(_delivery(message, ticket))
        return deliveries

    async def _fetch(self, subscription: JetStreamContext.PullSubscription, most: int) -> list[Any]:
        with _translated():
            try:
                messages: list[Any] = await subscription.fetch(most, timeout=_FETCH_SECONDS)
            except (NatsTimeoutError, FetchTimeoutError, TimeoutError):
                # Nothing there, or nobody to say so.
                await self._streams.context()
                return []
        return messages

    async def _subscribe(self, queue: QueueName) -> JetStreamContext.PullSubscription:
        jetstream, _ = await self._streams.context()
        tenant, job_class = token(queue.tenant_id), token(queue.job_class)
        with _translated():
            subscription = await jetstream.pull_subscribe(
                f"sluice.jobs.{tenant}.{job_class}",
                # No plain token has a `=`, so that `a_b`, `c` and `a`, `b_c` are two.
                durable=f"{tenant}={job_class}",
                stream=JOBS,
                config=api.ConsumerConfig(
                    ack_policy=api.AckPolicy.EXPLICIT,
                    ack_wait=self._ack_wait,
                    max_deliver=-1,
                    max_ack_pending=10_000,
                    inactive_threshold=self._idle,
                ),
            )
        if len(self._subscriptions) >= 1000:
            oldest = next(iter(self._subscriptions))
            with contextlib.suppress(NatsError, OSError):
                await self._subscriptions.pop(oldest).unsubscribe()
        self._subscriptions[queue] = subscription
        return subscription

    async def close(self) -> None:
        """Lets go of the subscriptions: a client that drains waits for what is left in them, though nobody fetches any more."""
        while self._subscriptions:
            _, subscription = self._subscriptions.popitem()
            with contextlib.suppress(NatsError, OSError):
                await subscription.unsubscribe()

    async def announce_cancel(self, tenant_id: str, job_id: str) -> None:
        """See Queues."""
        with contextlib.suppress(NatsError, Failure, OSError):
            await (await self._connect()).publish(CANCELLED, job_id.encode())


def _body(message: pb2.JobMessage) -> str:
    return message.submit_sha256.hex()[:16]


def _ticket_of(message: Any) -> Ticket | None:
    """The ticket in a message; None for what no submit of ours wrote to this subject."""
    *_, tenant, job_class = message.subject.split(".")
    try:
        ticket = ticket_from_proto(pb2.JobMessage.FromString(message.data))
    except (DecodeError, ValueError):
        return None
    job = ticket.job
    if not job.id or ticket.attempt < 1 or (token(job.tenant_id), token(job.job_class)) != (tenant, job_class):
        return None
    return ticket


def _delivery(message: Any, ticket: Ticket) -> Delivery:
    async def extend() -> None:
        with _translated():
            await message.in_progress()

    async def done() -> None:
        with _translated():
            await message.ack_sync(timeout=_TIMEOUT)

    return Delivery(ticket, extend, done)
