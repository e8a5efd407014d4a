"""JetStream, with the traps of reliability.md closed: every wait is bounded, errors are `Failure`, doubt is said.

Streams and consumers are data in the words of the JetStream API (`retention`, `discard_new_per_subject`, `ack_wait` in
nanoseconds, …), so that the newest server features need no support by the client library.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, Final

import nats.errors
import nats.js.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import PubAck

from services.runtime.errors import Failure, Reason, unavailable

TIMEOUT_SECONDS: Final = 2.0
MAX_FETCH_SECONDS: Final = 5.0
"""A fetch that is under way when the server restarts waits for its whole time (M12), so it must be short."""

_STREAM_EXISTS: Final = 10058
_STORE_FAILED: Final = 10077
_NOT_FOUND: Final = frozenset({10014, 10059})
_KEY: Final = re.compile(r"[A-Za-z0-9_=/-]+(?:\.[A-Za-z0-9_=/-]+)*")
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


def token(text: str) -> str:
    """`text` as one token of a subject, so that nobody reaches another tenant's subject by a dot or a wildcard.

    Raises Failure REQUEST_INVALID when it isn't made of letters, digits, `_` and `-`.
    """
    if _TOKEN.fullmatch(text) is None:
        raise Failure(
            Reason.REQUEST_INVALID,
            f"{text[:64]!r} must be 1 to 128 letters, digits, '_' or '-' to be part of a subject",
            metadata={"field": "subject"},
        )
    return text


async def ensure_stream(client: Client, config: Mapping[str, Any], *, timeout: float = TIMEOUT_SECONDS) -> None:
    """Makes the stream `config["name"]`, or changes it to `config`. Raises Failure DEPENDENCY_UNAVAILABLE or STATE_CONFLICT."""
    name = config["name"]
    error = await _api(client, f"STREAM.CREATE.{name}", config, timeout)
    if error is not None and error.get("err_code") == _STREAM_EXISTS:
        error = await _api(client, f"STREAM.UPDATE.{name}", config, timeout)
    _check(error, f"stream {name!r}")


async def ensure_consumer(client: Client, stream: str, config: Mapping[str, Any], *, timeout: float = TIMEOUT_SECONDS) -> None:
    """Makes the durable consumer `config["durable_name"]` of `stream`, or changes it. Raises as `ensure_stream`."""
    name = config["durable_name"]
    request = {"stream_name": stream, "config": dict(config)}
    # With a filter the name of the request's subject must carry it; this form takes it from the body.
    error = await _api(client, f"CONSUMER.DURABLE.CREATE.{stream}.{name}", request, timeout)
    _check(error, f"consumer {name!r} of stream {stream!r}")


async def remove_consumer(client: Client, stream: str, name: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
    """Removes a consumer; nothing happens when it isn't there. Raises as `ensure_stream`."""
    error = await _api(client, f"CONSUMER.DELETE.{stream}.{name}", {}, timeout)
    if error is not None and error.get("err_code") not in _NOT_FOUND:
        _check(error, f"consumer {name!r} of stream {stream!r}")


async def publish(
    stream: JetStreamContext,
    subject: str,
    payload: bytes,
    *,
    message_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> PubAck:
    """Publishes and waits for the server's word that the message is stored.

    `message_id` must be unique over all tenants of the stream (M5). Raises Failure QUEUE_FULL when a limit of the stream
    refuses the message, DEPENDENCY_UNAVAILABLE when there is no answer: then the message may or may not be stored; publish
    again with the same id.
    """
    given = dict(headers or {})
    if message_id is not None:
        given["Nats-Msg-Id"] = message_id
    try:
        async with asyncio.timeout(timeout):
            return await stream.publish(subject, payload, timeout=timeout, headers=given or None)
    except nats.js.errors.APIError as error:
        if error.err_code == _STORE_FAILED:
            raise Failure(Reason.QUEUE_FULL, "the queue is full; try again when jobs have ended", retry_delay=5.0) from None
        raise unavailable("nats", f"NATS refused the message (code {error.err_code})") from None
    except (TimeoutError, nats.errors.Error):
        raise unavailable("nats", "NATS didn't confirm the message in time") from None


async def ack_sync(message: Msg, *, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Acknowledges and waits for the server's word. False: nobody knows; do nothing, the redelivery must be harmless (M11)."""
    try:
        async with asyncio.timeout(timeout):
            await message.ack_sync(timeout=timeout)
    except (TimeoutError, nats.errors.Error):
        return False
    return True


async def fetch(subscription: JetStreamContext.PullSubscription, count: int, *, timeout: float = 1.0) -> list[Msg]:
    """Up to `count` messages, none when there are none within `timeout` (at most 5 s). Raises DEPENDENCY_UNAVAILABLE."""
    limit = min(timeout, MAX_FETCH_SECONDS)
    try:
        async with asyncio.timeout(limit + 1.0):
            messages: list[Msg] = await subscription.fetch(count, timeout=limit)
    except TimeoutError:
        # nats-py's own TimeoutError is one, too.
        return []
    except (nats.errors.Error, nats.js.errors.Error):
        raise unavailable("nats", "the queue can't be read") from None
    return messages


class KeyValue:
    """A key-value bucket whose entries end by themselves."""

    def __init__(self, client: Client, bucket: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self._client = client
        self._stream = f"KV_{bucket}"
        self._prefix = f"$KV.{bucket}."
        self._context = client.jetstream()
        self._timeout = timeout

    async def ensure(
        self, *, max_bytes: int, max_age: float, max_value_bytes: int, is_durable: bool = False, replicas: int = 1
    ) -> None:
        """Makes the bucket; `max_age` is in seconds. At `max_bytes` one in memory drops its oldest entries, as a cache does; a durable one,
        on disk, refuses new ones: what it has confirmed it keeps for its time.
        """
        await ensure_stream(
            self._client,
            {
                "name": self._stream,
                "subjects": [f"{self._prefix}>"],
                "storage": "file" if is_durable else "memory",
                "retention": "limits",
                "discard": "new" if is_durable else "old",
                "max_msgs_per_subject": 1,
                "max_bytes": max_bytes,
                "max_msg_size": max_value_bytes,
                "max_age": int(max_age * 1e9),
                "allow_rollup_hdrs": True,
                "allow_direct": True,
                "allow_msg_ttl": True,
                "num_replicas": replicas,
                "duplicate_window": int(min(max_age, 1.0) * 1e9),
            },
            timeout=self._timeout,
        )

    async def get(self, key: str) -> bytes | None:
        """The value, None when there is none. Raises Failure DEPENDENCY_UNAVAILABLE."""
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._client.request(
                    f"$JS.API.DIRECT.GET.{self._stream}.{self._subject(key)}", b"", timeout=self._timeout
                )
        except (TimeoutError, nats.errors.Error):
            raise unavailable("nats", "the bucket can't be read") from None
        headers = reply.headers or {}
        if headers.get("Status") == "404" or "KV-Operation" in headers:
            return None
        if "Status" in headers:
            raise unavailable("nats", f"the bucket answered {headers['Status']}")
        return bytes(reply.data)

    async def put(self, key: str, value: bytes, *, ttl: float | None = None) -> None:
        """Stores `value`, for `ttl` seconds (whole ones, at least 1) or as long as the bucket allows. Raises as `publish`."""
        headers = None if ttl is None else {"Nats-TTL": f"{max(1, int(ttl))}s"}
        await publish(self._context, self._subject(key), value, headers=headers, timeout=self._timeout)

    async def delete(self, key: str) -> None:
        """Removes the entry and what it was. Raises as `publish`."""
        headers = {"KV-Operation": "PURGE", "Nats-Rollup": "sub", "Nats-TTL": "60s"}
        await publish(self._context, self._subject(key), b"", headers=headers, timeout=self._timeout)

    def _subject(self, key: str) -> str:
        if _KEY.fullmatch(key) is None:
            raise ValueError(f"{key!r} must be made of letters, digits, '_', '=', '/', '-' and single dots between them")
        return self._prefix + key


async def _api(client: Client, operation: str, request: Mapping[str, Any], timeout: float) -> Mapping[str, Any] | None:
    """Calls the JetStream API; returns its error object, None after success."""
    body = orjson.dumps(request) if request else b""
    try:
        async with asyncio.timeout(timeout):
            reply = await client.request(f"$JS.API.{operation}", body, timeout=timeout)
    except (TimeoutError, nats.errors.Error):
        raise unavailable("nats", "JetStream doesn't answer; check that NATS runs with `jetstream` enabled") from None
    error: Mapping[str, Any] | None = orjson.loads(reply.data).get("error")
    return error


def _check(error: Mapping[str, Any] | None, what: str) -> None:
    if error is None:
        return
    if error.get("code") == 503:
        raise unavailable("nats", f"JetStream can't make {what} now: {error.get('description', '')}")
    raise Failure(
        Reason.STATE_CONFLICT,
        f"JetStream refuses {what}: {error.get('description', '')}; change or remove it by hand",
        metadata={"state": str(error.get("err_code", ""))},
    )
