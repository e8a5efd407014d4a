"""The routes of the HTTP edge: from an exchange to the core and back.

    POST /v1/chat/completions         OpenAI's chat completions, whole or streamed
    POST /v1/embeddings               OpenAI's embeddings
    POST /v1/messages                 Anthropic's messages, whole or streamed
    POST /v1/messages/count_tokens    Anthropic's token count
    GET  /v1/models, /v1/models/{id}  in Anthropic's form when the request has `anthropic-version`, else in OpenAI's
    GET  /healthz                     the process lives
    GET  /readyz                      it can take requests

Answers carry `x-request-id` (the client's own where it sent one), and where something ran `x-sluice-operation-id`, `x-sluice-model`,
`x-sluice-cost-nano-usd` and `x-sluice-cache`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote

import orjson

from services.gateway.core import Completion, Core, Principal
from services.gateway.edge import anthropic, openai, wishes
from services.gateway.edge.config import EdgeConfig
from services.gateway.edge.errors import Dialect, EdgeError, error_body, error_event, error_head
from services.gateway.edge.http1 import Exchange, Listener
from services.gateway.edge.payload import RequestInvalid
from services.gateway.edge.rates import rate_head
from services.gateway.events import Opened
from services.gateway.identities import digest_of
from services.gateway.service import secret_of
from services.runtime import telemetry
from services.runtime.call import Metadata
from services.runtime.errors import Failure, Reason, deadline_exceeded
from services.runtime.process import Process
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import inference_service_pb2, receipt_pb2

if TYPE_CHECKING:
    # Importing it for real loads the exporter of traces.
    from services.runtime.tracing import RequestSpan

_READY_SECONDS: Final = 1.0
_GRACE_SECONDS: Final = 1.0
"""The core ends by its deadline itself; this much later the exchange is cut off all the same."""
_MAX_REQUEST_ID: Final = 128
_MODELS: Final = b"/v1/models"
_ANTHROPIC_VERSION: Final = b"anthropic-version"
_PAGE: Final = 1000
_MAX_LISTED: Final = 20_000
_CACHE_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {number: name.removeprefix("CACHE_STATUS_").lower() for name, number in receipt_pb2.CacheStatus.items()}
)

# Bound here since a member of an enum costs a lookup in its metaclass each time.
_OPENAI: Final = Dialect.OPENAI
_ANTHROPIC: Final = Dialect.ANTHROPIC
_FULL: Final = inference_service_pb2.RECEIPT_VIEW_FULL

Handler = Callable[[Exchange, "Visit"], Coroutine[Any, Any, None]]


class Visit:
    """What is known of an exchange besides its bytes."""

    __slots__ = ("dialect", "forward", "principal", "request_id", "span")

    def __init__(self, dialect: Dialect, request_id: str, span: RequestSpan | None, forward: Metadata) -> None:
        self.dialect = dialect
        self.request_id = request_id
        self.span = span
        self.forward = forward
        self.principal: Principal | None = None
        """Who asks, once that is known and something is asked that is limited."""


class Edge:
    """The application behind the listener."""

    def __init__(self, core: Core, config: EdgeConfig, process: Process, ping: Callable[[], Awaitable[None]]) -> None:
        """`ping` raises when requests can't be served."""
        self._core = core
        self._config = config
        self._log = process.log
        self._telemetry = process.telemetry
        self._ping = ping
        self._loop = asyncio.get_running_loop()
        self._prefix = f"req-{secrets.token_hex(6)}-"
        self._numbers = itertools.count(1)
        self._refused = process.metrics.counter("edge_refused", "Requests refused before they reached the core.", ("reason",))
        self.listener = Listener(config, self, process.barrier)
        self.url = ""
        self._routes: dict[bytes, tuple[bytes, Dialect, Handler]] = {
            b"/v1/chat/completions": (b"POST", Dialect.OPENAI, self._chat),
            b"/v1/embeddings": (b"POST", Dialect.OPENAI, self._embed),
            b"/v1/messages": (b"POST", Dialect.ANTHROPIC, self._message),
            b"/v1/messages/count_tokens": (b"POST", Dialect.ANTHROPIC, self._count_tokens),
            _MODELS: (b"GET", Dialect.OPENAI, self._list_models),
            b"/healthz": (b"GET", Dialect.OPENAI, self._healthz),
            b"/readyz": (b"GET", Dialect.OPENAI, self._readyz),
        }

    async def drain(self) -> None:
        """See Listener.drain."""
        await self.listener.drain()

    # the listener's

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        """See Application."""
        path = exchange.target.partition(b"?")[0]
        route = self._routes.get(path)
        if route is None and path.startswith(b"/v1/models/"):
            route = (b"GET", Dialect.OPENAI, self._get_model)
        if route is None:
            shown = path.decode("ascii", "replace")[:200]
            failure = EdgeError(Reason.ROUTE_NOT_FOUND, f"there is nothing at {shown}; the routes are {self._named_routes()}")
            self._answer_failure(exchange, _dialect_of(exchange), failure)
            return None
        method, dialect, handler = route
        if exchange.method != method and not (exchange.method == b"HEAD" and method == b"GET"):
            allowed = "GET, HEAD" if method == b"GET" else "POST"
            failure = EdgeError(Reason.ROUTE_NOT_FOUND, f"this route takes {allowed}", metadata={"allow": allowed})
            self._answer_failure(exchange, dialect, failure)
            return None
        if dialect is _OPENAI and _ANTHROPIC_VERSION in exchange.headers:
            dialect = _ANTHROPIC
        return self._visit(exchange, dialect, handler)

    def refuse(self, exchange: Exchange, failure: Failure) -> None:
        """See Application."""
        self._answer_failure(exchange, _dialect_of(exchange), failure)

    async def _visit(self, exchange: Exchange, dialect: Dialect, handler: Handler) -> None:
        request_id = self._request_id(exchange)
        span = None
        forward: Metadata = (("x-request-id", request_id),)
        if self._telemetry.enabled:
            span, forward = self._begin_span(exchange, forward)
        else:
            parent = exchange.headers.get(b"traceparent")
            if parent is not None:
                forward = (*forward, ("traceparent", parent.decode("ascii", "replace")))
        visit = Visit(dialect, request_id, span, forward)
        failed: Failure | None = None
        try:
            await handler(exchange, visit)
        except Failure as failure:
            failed = failure
            self._fail(exchange, visit, failure)
        except asyncio.CancelledError:
            if not exchange.expired:
                # The client went away: nobody is left to answer.
                failed = Failure(Reason.CANCELLED, "the client went away")
                raise
            failed = deadline_exceeded("the answer")
            if self.listener.draining:
                failed = EdgeError(Reason.DRAINING, "this replica is going down; send the request again", retry_delay=1.0)
            self._fail(exchange, visit, failed)
        except Exception:  # noqa: BLE001  # a fault of ours becomes one answer and one log entry, whatever it was
            self._log.exception(
                "edge_failed", request_id=request_id, path=exchange.target.partition(b"?")[0].decode("ascii", "replace")
            )
            failed = EdgeError(Reason.INTERNAL, f"Sluice failed; its log has the reason under {request_id}")
            self._fail(exchange, visit, failed)
        finally:
            if span is not None:
                span.end(failed)

    def _fail(self, exchange: Exchange, visit: Visit, failure: Failure) -> None:
        if exchange.closed:
            return
        if not exchange.opened:
            head = error_head(failure, visit.request_id)
            if visit.principal is not None:
                head += rate_head(self._core.standings(visit.principal))
            exchange.respond(head, error_body(failure, visit.dialect, visit.request_id))
            return
        exchange.send(error_event(failure, visit.dialect, visit.request_id))
        exchange.close()

    def _answer_failure(self, exchange: Exchange, dialect: Dialect, failure: Failure) -> None:
        self._refused.labels(failure.reason.value).inc()
        request_id = self._request_id(exchange)
        exchange.respond(error_head(failure, request_id), error_body(failure, dialect, request_id))

    def _request_id(self, exchange: Exchange) -> str:
        """The client's own, where it is one that may stand in a header and a log; else a new one."""
        given = exchange.headers.get(b"x-request-id")
        if given is not None and 0 < len(given) <= _MAX_REQUEST_ID and given.isascii():
            text = given.decode("ascii")
            if text.isprintable():
                return text
        return f"{self._prefix}{next(self._numbers):x}"

    def _begin_span(self, exchange: Exchange, forward: Metadata) -> tuple[RequestSpan | None, Metadata]:
        headers = exchange.headers
        carrier = {
            name.decode(): headers[name].decode("ascii", "replace")
            for name in (b"traceparent", b"tracestate")
            if name in headers
        }
        path = exchange.target.partition(b"?")[0].decode("ascii", "replace")
        if path.startswith("/v1/models/"):
            path = "/v1/models/{id}"
        span = self._telemetry.begin(f"{exchange.method.decode('ascii', 'replace')} {path}", carrier)
        return span, forward if span is None else (*forward, *span.forward)

    def _named_routes(self) -> str:
        return ", ".join(path.decode() for path in self._routes)

    # who asks, and until when

    def _known(self, exchange: Exchange) -> Principal | None:
        """The principal of a key that was checked lately; None: `_authenticate` must be asked. Hot path, so no coroutine."""
        headers = exchange.headers
        shown = (headers.get(b"authorization"), headers.get(b"x-api-key"))
        connection = exchange.connection
        memory: tuple[tuple[bytes | None, bytes | None], bytes] | None = connection.memory
        if memory is not None and memory[0] == shown:
            # A client that keeps its connection sends the same key with every request.
            return self._core.known_digest(memory[1])
        secret = _secret_of(exchange)
        if secret is None:
            return None
        digest = digest_of(secret)
        connection.memory = (shown, digest)
        return self._core.known_digest(digest)

    async def _authenticate(self, exchange: Exchange) -> Principal:
        return await self._core.authenticate(_secret_of(exchange))

    def _deadline(self, exchange: Exchange, timeout: float | None) -> float:
        config = self._config
        if timeout is None:
            timeout = config.default_deadline
        elif timeout > config.max_deadline:
            raise RequestInvalid("x-sluice-timeout", f"must be at most {config.max_deadline:g} s, got {timeout:g} s")
        deadline = self._loop.time() + timeout
        exchange.expire_at = deadline + _GRACE_SECONDS
        return deadline

    # routes

    # Not coroutines of their own: each one more is one more frame at every step of a request.

    def _chat(self, exchange: Exchange, visit: Visit) -> Coroutine[Any, Any, None]:
        return self._converse(exchange, visit, openai.chat_from_json, openai.chat_to_json)

    def _message(self, exchange: Exchange, visit: Visit) -> Coroutine[Any, Any, None]:
        return self._converse(exchange, visit, anthropic.message_from_json, anthropic.message_to_json)

    async def _converse(
        self,
        exchange: Exchange,
        visit: Visit,
        from_json: Callable[[bytes | bytearray], openai.ChatCall],
        to_json: Callable[[Completion, receipt_pb2.Receipt | None], bytes],
    ) -> None:
        principal = visit.principal = self._known(exchange) or await self._authenticate(exchange)
        _check_encoding(exchange)
        call = from_json(exchange.body)
        request = call.request
        deadline = self._deadline(exchange, wishes.apply_to_generate(exchange.headers, request))
        if call.stream:
            await self._stream(exchange, visit, principal, call, deadline)
            return
        completion = await self._core.generate(principal, request, deadline=deadline, forward=visit.forward)
        _annotate(visit, request, completion)
        body = to_json(completion, _wished_receipt(request, completion))
        exchange.respond(_completed_head(completion, visit.request_id) + rate_head(self._core.standings(principal)), body)

    async def _stream(
        self, exchange: Exchange, visit: Visit, principal: Principal, call: openai.ChatCall, deadline: float
    ) -> None:
        is_openai = visit.dialect is _OPENAI
        wire = (
            execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT if is_openai else execution_service_pb2.WIRE_FORMAT_ANTHROPIC_MESSAGES
        )
        events = self._core.stream(principal, call.request, accepted_wire=wire, deadline=deadline, forward=visit.forward)
        stream: openai.ChatStream | anthropic.MessageStream | None = None
        try:
            async for event in events:
                if type(event) is bytes:
                    assert stream is not None, "the core opens first"
                    data = stream.wire(event)
                elif isinstance(event, Opened):
                    stream = (
                        openai.ChatStream(event, include_usage=call.include_usage)
                        if is_openai
                        else anthropic.MessageStream(event)
                    )
                    exchange.open(_opened_head(event, visit.request_id) + rate_head(self._core.standings(principal)))
                    data = stream.begin()
                elif isinstance(event, execution_service_pb2.DeltaBatch):
                    assert stream is not None, "the core opens first"
                    data = stream.pieces(event)
                else:
                    assert stream is not None
                    assert isinstance(event, Completion)
                    _annotate(visit, call.request, event)
                    data = stream.end(event, _wished_receipt(call.request, event))
                if data and not exchange.send(data):
                    await exchange.writable()
        finally:
            await events.aclose()
        exchange.close()

    async def _embed(self, exchange: Exchange, visit: Visit) -> None:
        principal = visit.principal = self._known(exchange) or await self._authenticate(exchange)
        _check_encoding(exchange)
        call = openai.embed_from_json(exchange.body)
        deadline = self._deadline(exchange, wishes.apply_to_embed(exchange.headers, call.request))
        response = await self._core.embed(principal, call.request, deadline=deadline, forward=visit.forward)
        head = b"%bx-sluice-operation-id: %b\r\nx-sluice-model: %b\r\nx-sluice-cost-nano-usd: %d\r\n" % (
            _json_head(visit.request_id), response.operation_id.encode(), response.model.encode(), response.cost_nano_usd,
        )  # fmt: skip
        exchange.respond(
            head + rate_head(self._core.standings(principal)), openai.embed_to_json(response, is_base64=call.is_base64)
        )

    async def _count_tokens(self, exchange: Exchange, visit: Visit) -> None:
        principal = self._known(exchange) or await self._authenticate(exchange)
        _check_encoding(exchange)
        call = anthropic.count_from_json(exchange.body)
        deadline = self._deadline(exchange, wishes.apply_to_free_call(exchange.headers))
        request = inference_service_pb2.CountTokensRequest(
            model=call.request.routing.model, conversation=call.request.conversation
        )
        response = await self._core.count_tokens(principal, request, deadline=deadline, forward=visit.forward)
        exchange.respond(_json_head(visit.request_id), anthropic.count_to_json(response.input_count))

    async def _models(self, exchange: Exchange, visit: Visit) -> list[inference_service_pb2.Model]:
        principal = self._known(exchange) or await self._authenticate(exchange)
        deadline = self._deadline(exchange, wishes.apply_to_free_call(exchange.headers))
        found: list[inference_service_pb2.Model] = []
        token = ""
        while True:
            page = await self._core.list_models(
                principal,
                inference_service_pb2.ListModelsRequest(page_size=_PAGE, page_token=token),
                deadline=deadline,
                forward=visit.forward,
            )
            found += page.models
            token = page.next_page_token
            if not token or len(found) >= _MAX_LISTED:
                return found

    async def _list_models(self, exchange: Exchange, visit: Visit) -> None:
        models = await self._models(exchange, visit)
        if visit.dialect is Dialect.OPENAI:
            body = openai.models_to_json(models)
        else:
            query = exchange.target.partition(b"?")[2].decode("ascii", "replace")
            body = anthropic.models_to_json(models, dict(parse_qsl(query)))
        exchange.respond(_json_head(visit.request_id), body)

    async def _get_model(self, exchange: Exchange, visit: Visit) -> None:
        name = unquote(exchange.target.partition(b"?")[0][len(_MODELS) + 1 :].decode("ascii", "replace"))
        for model in await self._models(exchange, visit):
            if model.id == name:
                to_json = openai.model_to_json if visit.dialect is Dialect.OPENAI else anthropic.model_to_json
                exchange.respond(_json_head(visit.request_id), orjson.dumps(to_json(model)))
                return
        raise EdgeError(
            Reason.MODEL_NOT_FOUND, f"no model or policy {name[:200]!r} is there for this key", metadata={"model": name[:200]}
        )

    async def _healthz(self, exchange: Exchange, visit: Visit) -> None:
        exchange.respond(_json_head(visit.request_id), b'{"status":"ok"}')

    async def _readyz(self, exchange: Exchange, visit: Visit) -> None:
        if self.listener.draining:
            raise EdgeError(Reason.DRAINING, "this replica is going down", retry_delay=1.0)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._ping()
        except TimeoutError:
            raise EdgeError(
                Reason.DEPENDENCY_UNAVAILABLE, "routing doesn't answer", metadata={"dependency": "routing"}
            ) from None
        exchange.respond(_json_head(visit.request_id), b'{"status":"ready"}')


@contextlib.asynccontextmanager
async def serve(core: Core, config: EdgeConfig, process: Process, ping: Callable[[], Awaitable[None]]) -> AsyncIterator[Edge]:
    """The edge, listening while the context is open. OSError when the address is taken."""
    edge = Edge(core, config, process, ping)
    async with edge.listener.listening():
        host = f"[{config.host}]" if ":" in config.host else config.host
        edge.url = f"http://{host}:{edge.listener.port}"
        yield edge


def _dialect_of(exchange: Exchange) -> Dialect:
    """Whose JSON an error has, where no route decided it."""
    if exchange.target.startswith(b"/v1/messages") or _ANTHROPIC_VERSION in exchange.headers:
        return Dialect.ANTHROPIC
    return Dialect.OPENAI


def _secret_of(exchange: Exchange) -> str | None:
    """See `secret_of`."""
    headers = exchange.headers
    authorization = headers.get(b"authorization")
    if authorization is not None and authorization.startswith(b"Bearer "):
        # What nearly everybody sends.
        return authorization[7:].decode("latin-1").strip() or None
    key = headers.get(b"x-api-key")
    return secret_of(
        None if authorization is None else authorization.decode("latin-1"), None if key is None else key.decode("latin-1")
    )


def _check_encoding(exchange: Exchange) -> None:
    coding = exchange.headers.get(b"content-encoding")
    if coding is not None and coding.lower() != b"identity":
        raise RequestInvalid("content-encoding", "compressed bodies are not taken; send the JSON as it is")


def _wished_receipt(request: inference_service_pb2.GenerateRequest, completion: Completion) -> receipt_pb2.Receipt | None:
    return completion.receipt() if request.receipt_view == _FULL else None


def _annotate(visit: Visit, request: inference_service_pb2.GenerateRequest, completion: Completion) -> None:
    span = visit.span
    if span is None:
        return
    answer = completion.answer
    span.annotate(
        {
            telemetry.OPERATION_NAME: "chat",
            telemetry.REQUEST_MODEL: request.routing.model,
            telemetry.RESPONSE_ID: completion.operation_id,
            telemetry.RESPONSE_MODEL: answer.model,
            telemetry.USAGE_INPUT_TOKENS: answer.usage.input_token_count,
            telemetry.USAGE_OUTPUT_TOKENS: answer.usage.output_token_count,
        }
    )


def _json_head(request_id: str) -> bytes:
    named = request_id.encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: %b\r\nrequest-id: %b\r\n" % (named, named)


def _completed_head(completion: Completion, request_id: str) -> bytes:
    # As text, encoded once: a head of bytes has to encode each of its parts.
    return (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: {request_id}\r\nrequest-id: {request_id}\r\n"
        f"x-sluice-operation-id: {completion.operation_id}\r\nx-sluice-model: {completion.model}\r\n"
        f"x-sluice-cost-nano-usd: {completion.cost_nano_usd}\r\nx-sluice-cache: {_CACHE_NAMES[completion.cache_status]}\r\n"
    ).encode()


def _opened_head(opened: Opened, request_id: str) -> bytes:
    named = request_id.encode()
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
        b"x-request-id: %b\r\nrequest-id: %b\r\nx-sluice-operation-id: %b\r\nx-sluice-model: %b\r\n"
    ) % (named, named, opened.operation_id.encode(), opened.model.encode())
