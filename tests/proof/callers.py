"""Callers that want an answer and are patient: each asks with one idempotency key, and again with the same one, at whichever gateway,
until it has the last byte, gives up, or goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import httptools
import yaml

from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.proof import provider
from tests.running import Running

TRY_SECONDS: Final = 15.0
"""Deadline of each try."""
PATIENCE_SECONDS: Final = 60.0
"""After which a caller gives up."""
MOST_TOKENS: Final = 400
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 2.0
_NUMBER: Final = re.compile(r"(\d+): ")
_RECONNECT: Final = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway listens."""

    http: str
    grpc: str


def addresses(started: Running) -> list[Address]:
    """Of every gateway of a mesh. Ports stay when a process is started again."""
    ready = started.ready
    found = []
    for name, target in sorted(ready.grpc.items()):
        if name.partition("-")[0] == "gateway":
            written = yaml.safe_load((started.directory / "run" / f"{name}.yaml").read_text())
            found.append(Address(f"http://127.0.0.1:{written['gateway']['edge']['port']}", target))
    return found


@contextlib.asynccontextmanager
async def stubs(gateways: Sequence[Address]) -> AsyncIterator[list[Any]]:
    """A stub of each gateway, whose channel finds one that was started again within half a second."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            InferenceServiceStub(await stack.enter_async_context(grpc.aio.insecure_channel(gateway.grpc, options=_RECONNECT)))
            for gateway in gateways
        ]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller wants."""

    marker: str
    """Names the request at the oracle, and is its idempotency key."""
    secret: str
    """The key of its tenant."""
    is_streamed: bool
    is_http: bool
    leaves_after: float | None = None
    """Seconds after which it goes away."""
    has_key: bool = True
    """Whether the marker is sent as the idempotency key. Who has none asks once."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a caller got, to the last byte."""

    operation_id: str
    execution: int
    """Number of the oracle's execution that made it."""
    cost: int | None
    """What the caller was told that it is charged, nano-dollars; None: it wasn't told."""


@dataclass(slots=True)
class Outcome:
    """How it went for a caller."""

    ask: Ask
    answer: Answer | None = None
    has_left: bool = False
    tries: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class TryFailedError(Exception):
    """A try without an answer."""


class LeftError(Exception):
    """The caller went away in the middle of a stream, as it was told to."""


class Callers:
    """Every caller of a load. Use as a context."""

    def __init__(self, gateways: Sequence[Address]) -> None:
        self.in_flight = 0
        self._gateways = gateways
        self._stack = contextlib.AsyncExitStack()
        self._stubs: Sequence[Any] = ()
        self._random = random.Random(4)

    async def __aenter__(self) -> Callers:
        self._stubs = await self._stack.enter_async_context(stubs(self._gateways))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def call(self, ask: Ask) -> Outcome:
        """Until there is an outcome."""
        outcome = Outcome(ask)
        self.in_flight += 1
        try:
            async with asyncio.timeout(ask.leaves_after):
                await self._persist(ask, outcome)
        except TimeoutError:
            outcome.has_left = True
        finally:
            self.in_flight -= 1
        return outcome

    async def _persist(self, ask: Ask, outcome: Outcome) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + PATIENCE_SECONDS
        pause = _FIRST_PAUSE
        while loop.time() < ends:
            outcome.tries += 1
            try:
                outcome.answer = await self.once(ask, self._random.randrange(len(self._gateways)))
            except TryFailedError as error:
                outcome.errors[str(error)] += 1
                if not ask.has_key:
                    return
            else:
                return
            await asyncio.sleep(pause * self._random.uniform(0.7, 1.3))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def once(self, ask: Ask, gateway: int, *, most_pieces: int | None = None) -> Answer:
        """One try at one gateway. Raises TryFailedError, and LeftError where `most_pieces` of its stream have come before its end."""
        if ask.is_http:
            return await self._over_http(ask, self._gateways[gateway].http, most_pieces)
        return await self._over_grpc(ask, self._stubs[gateway], most_pieces)

    async def _over_grpc(self, ask: Ask, stub: Any, most_pieces: int | None) -> Answer:
        kind = inference_service_pb2.StreamGenerateRequest if ask.is_streamed else inference_service_pb2.GenerateRequest
        message = conversation_pb2.Message(
            role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=f"[{ask.marker}] What will come?")]
        )
        request = kind(
            request_id=ask.marker if ask.has_key else "",
            conversation=conversation_pb2.Conversation(messages=[message], max_output_tokens=MOST_TOKENS),
            routing=inference_service_pb2.RoutingWishes(model=provider.MODEL),
            cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
            receipt_view=inference_service_pb2.RECEIPT_VIEW_NONE,
        )
        metadata = (("authorization", f"Bearer {ask.secret}"),)
        try:
            if not ask.is_streamed:
                whole = await stub.Generate(request, timeout=TRY_SECONDS, metadata=metadata)
                text = "".join(part.text for part in whole.answer.message.parts)
                return Answer(whole.operation_id, _execution(text), whole.cost_nano_usd)
            operation, text, cost = "", "", None
            pieces = 0
            call = stub.StreamGenerate(request, timeout=TRY_SECONDS, metadata=metadata)
            async for event in call:
                if event.HasField("opened"):
                    operation = event.opened.operation_id
                elif event.HasField("delta"):
                    text += event.delta.text
                    pieces += 1
                    if pieces == most_pieces:
                        call.cancel()
                        raise LeftError
                else:
                    cost = event.closed.cost_nano_usd
        except grpc.RpcError as error:
            raise TryFailedError(f"gRPC {error.code().name}: {(error.details() or '')[:100]}") from None
        if cost is None:
            raise TryFailedError("gRPC: the stream ended before its end")
        return Answer(operation, _execution(text), cost)

    async def _over_http(self, ask: Ask, url: str, most_pieces: int | None) -> Answer:
        body = {
            "model": provider.MODEL,
            "messages": [{"role": "user", "content": f"[{ask.marker}] What will come?"}],
            "max_completion_tokens": MOST_TOKENS,
        }
        if ask.is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {
            "authorization": f"Bearer {ask.secret}",
            "content-type": "application/json",
            "x-sluice-cache": "off",
            "x-sluice-timeout": f"{TRY_SECONDS:g}s",
        }
        if ask.has_key:
            headers["idempotency-key"] = ask.marker
        try:
            async with asyncio.timeout(TRY_SECONDS + 5.0):
                response = await _exchange(url, headers, json.dumps(body).encode(), most_pieces)
        except TimeoutError:
            raise TryFailedError("HTTP: no answer in time") from None
        except (OSError, httptools.HttpParserError) as error:
            raise TryFailedError(f"HTTP {type(error).__name__}") from None
        if not response.is_complete:
            raise TryFailedError("HTTP: the answer was cut off")
        said = response.body.decode()
        if response.status != 200:
            raise TryFailedError(f"HTTP {response.status}: {said[:120]}")
        operation = response.headers.get("x-sluice-operation-id", "")
        if not ask.is_streamed:
            cost = response.headers.get("x-sluice-cost-nano-usd")
            text = json.loads(said)["choices"][0]["message"]["content"]
            return Answer(operation, _execution(text), int(cost) if cost is not None else None)
        if not said.endswith("data: [DONE]\n\n"):
            raise TryFailedError(f"HTTP: the stream ended with {said[-120:]!r}")
        text = ""
        for line in said.splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", ()):
                    text += choice["delta"].get("content") or ""
        return Answer(operation, _execution(text), None)


def _execution(text: str) -> int:
    found = _NUMBER.match(text)
    if found is None:
        raise TryFailedError(f"not an answer of the oracle: {text[:80]!r}")
    return int(found[1])


class _Response:
    """What httptools' parser tells."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Some more bytes."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """See httptools."""
        self.body += data

    def on_message_complete(self) -> None:
        """See httptools."""
        self.is_complete = True


async def _exchange(url: str, headers: Mapping[str, str], body: bytes, most_pieces: int | None) -> _Response:
    """POST to the chat completions. Leaving early closes the connection."""
    parts = urlsplit(url)
    response = _Response()
    async with _connected(parts.hostname or "", parts.port or 0) as (reader, writer):
        lines = [f"{name}: {value}" for name, value in {**headers, "host": parts.netloc, "content-length": len(body)}.items()]
        writer.write("\r\n".join(("POST /v1/chat/completions HTTP/1.1", *lines, "", "")).encode() + body)
        while not response.is_complete and (data := await reader.read(65536)):
            response.feed(data)
            if most_pieces is not None and not response.is_complete and response.body.count(b'"content":"') >= most_pieces:
                raise LeftError
    return response


@contextlib.asynccontextmanager
async def _connected(host: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()
