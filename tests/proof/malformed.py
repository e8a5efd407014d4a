"""Rubbish of many kinds over HTTP and gRPC: broken framing, broken JSON, broken protobuf, wrong types, absurd values, wrong places."""

from __future__ import annotations

import copy
import json
import random
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
from google.protobuf import descriptor, message_factory
from google.protobuf.message import Message

from services.cli.state import Secrets
from sluice.caching.v1 import caching_service_pb2
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.jobs.v1 import job_service_pb2
from sluice.link.v1 import link_service_pb2
from sluice.metering.v1 import metering_service_pb2, tenancy_service_pb2, usage_service_pb2
from sluice.routing.v1 import routing_service_pb2
from sluice.tokenization.v1 import tokenization_service_pb2
from tests.proof.parallel import each
from tests.running import Running

_AT_ONCE: Final = 4
_HTTP_SECONDS: Final = 20.0
_GRPC_SECONDS: Final = 3.0
_MOST_REPLIES: Final = 5
_TRACE: Final = re.compile(r"Traceback \(most recent call last\)|File \\?\"[^\"\n]+\\?\", line \d+")
_FILES: Final = (
    ("gateway", inference_service_pb2),
    ("batching", job_service_pb2),
    ("metering", metering_service_pb2),
    ("metering", tenancy_service_pb2),
    ("metering", usage_service_pb2),
    ("routing", routing_service_pb2),
    ("caching", caching_service_pb2),
    ("execution", execution_service_pb2),
    ("tokenization", tokenization_service_pb2),
    ("execution", link_service_pb2),
)
_CHAT: Final[Any] = {
    "model": "echo/echo",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                {"type": "text", "text": "And now?"},
            ],
        },
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "max_tokens": 8,
    "stop": ["x"],
    "n": 1,
    "seed": 1,
    "user": "u",
    "stream": False,
    "logit_bias": {"1": 1},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "metadata": {"team": "search"},
}
_MESSAGE: Final[Any] = {
    "model": "echo/echo",
    "max_tokens": 8,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "3"}]},
    ],
    "temperature": 0.5,
    "top_k": 5,
    "stop_sequences": ["x"],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "metadata": {"user_id": "u"},
    "stream": False,
}
_EMBED: Final[Any] = {"model": "echo/echo", "input": ["one", "two"], "dimensions": 8, "encoding_format": "float", "user": "u"}
_ROUTES: Final = (
    ("/v1/chat/completions", _CHAT),
    ("/v1/messages", _MESSAGE),
    ("/v1/messages/count_tokens", {key: _MESSAGE[key] for key in ("model", "messages", "system", "tools")}),
    ("/v1/embeddings", _EMBED),
)
_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, -1e308, 1e-320, 0.1, float("nan"), float("inf"),
    "", " ", "\x00", "\ud800", "😀" * 100, "x" * 100_000, "-1", "null", "a/b/c/d", "../../etc/passwd", "'; DROP TABLE keys; --",
    [], [[]], [None], [{}], {}, {"": ""}, {"type": "text"}, {"$ref": "#"}, ["x"] * 3000,
)  # fmt: skip
_HEADERS: Final = (
    ("x-sluice-timeout", ("-1s", "0", "abc", "99999999999999h", "1e5s", "")),
    ("x-sluice-cache", ("bogus", "", "exact, semantic")),
    ("x-sluice-cache-namespace", ("UPPER", "x" * 300, "../..", "é")),
    ("x-sluice-cache-min-similarity", ("nan", "2", "-1", "x")),
    ("x-sluice-cache-ttl", ("-5s", "forever")),
    ("x-sluice-max-cost-nano-usd", ("-1", "1.5", "9" * 30)),
    ("x-sluice-task-type", ("poetry",)),
    ("x-sluice-metadata", ("{", "[1]", '{"a": 1}', '{"' + "k" * 500 + '": "v"}')),
    ("x-sluice-unknown", ("1",)),
    ("x-sluice-allow-fallback", ("maybe",)),
    ("x-sluice-receipt", ("some",)),
    ("idempotency-key", ("k" * 10_000, "\x7f", "é")),
    (
        "authorization",
        ("Bearer", "Bearer ", "Basic eDp5", "Bearer \xff\xfe", "Bearer " + "x" * 5000, "Bearer sk-sluice-nobody"),
    ),
    ("content-encoding", ("gzip", "br, gzip")),
    ("traceparent", ("00-zz-zz-01", "x" * 400, "00-" + "0" * 32 + "-" + "0" * 16 + "-ff")),
    ("x-request-id", ("\xff", "x" * 1000, "")),
    ("expect", ("200-ok",)),
    ("accept", ("\xff/\xff",)),
)
_HOST: Final = b"Host: h\r\n"
_POST: Final = b"POST /v1/chat/completions HTTP/1.1\r\n" + _HOST
_FRAMES: Final = (
    b"\r\n\r\n\r\n\x00\x00\x00",
    b"GARBAGE\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n" + _HOST + b"\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + _HOST + b"\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + b"Bad Header: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + b"X: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + b": empty\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + b"X: y\r\n folded\r\n\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + b"".join(b"X-%d: y\r\n" % number for number in range(400)) + b"\r\n",
    _POST + b"Content-Length: -1\r\n\r\n",
    _POST + b"Content-Length: 1e3\r\n\r\n",
    _POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
    _POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    _POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    _POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT evil:443 HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
)
_PLACES: Final = (
    ("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"), ("POST", "/v1/models"), ("POST", "/"), ("PUT", "/v1/embeddings"),
    ("GET", "/v1/models/%00%ff"), ("GET", "/v1/models/" + "x" * 4000), ("POST", "/v1/../../etc/passwd"), ("OPTIONS", "*"),
    ("POST", "/v1/chat/completions/"), ("POST", "//v1/chat/completions"), ("POST", "/v1/chat/completions%3Fa"), ("PATCH", "/healthz"),
)  # fmt: skip
_PROPER: Final = {"tenant_id": "acme", "model": "echo/echo", "project_id": "default", "key_id": "k1", "request_id": ""}
_DEEPEST: Final = 5
_TEXTS: Final = (
    "", " ", "\x00", "x", "😀", "x" * 5000, "../..", "echo/echo", "no/such", "policy/none", "00000000", "\u202e", "a\nb", "-1", "{}", "[" * 500,
)  # fmt: skip
_INTEGERS: Final = (0, 1, -1, 2, 7, 100, 2**31 - 1, -(2**31))
_WIDE: Final = (2**63 - 1, -(2**63), 10**12)
_FLOATS: Final = (0.0, -1.0, 0.5, 1e300, float("nan"), float("inf"), -float("inf"))


@dataclass(frozen=True, slots=True)
class Case:
    """One request that nobody should send."""

    what: str
    send: Callable[[], Verdict]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came back."""

    answered: bool
    """An answer, or where the request was incomplete an orderly end."""
    internal: bool = False
    """The server took the blame."""
    leaked: bool = False
    """The answer has a stack trace in it."""
    said: str = ""


@dataclass(slots=True)
class Seen:
    """What came back of everything."""

    internal: int = 0
    leaked: int = 0
    unanswered: int = 0
    complaints: list[str] = field(default_factory=list)

    def add(self, case: Case, verdict: Verdict) -> None:
        """Counts one."""
        self.internal += verdict.internal
        self.leaked += verdict.leaked
        self.unanswered += not verdict.answered
        if verdict.internal or verdict.leaked or not verdict.answered:
            self.complaints.append(f"{case.what}: {verdict.said[:300] or 'no answer'}")


def send(started: Running, number: int, step: Callable[[], None]) -> Seen:
    """Sends `number` of them, half over HTTP and half over gRPC; the same ones each time."""
    seen = Seen()
    rng = random.Random(20261124)
    with GrpcPorts(started) as ports:

        def cases() -> Iterator[Case]:
            for index in range(number):
                yield ports.case(rng) if index % 2 else http_case(started, rng)

        def work(case: Case) -> tuple[Case, Verdict]:
            return case, case.send()

        for case, verdict in each(work, cases(), at_once=_AT_ONCE):
            seen.add(case, verdict)
            step()
    return seen


def stack_traces(started: Running) -> list[str]:
    """The log lines that have a stack trace in them, cut short."""
    found = []
    for log in sorted((started.directory / "logs").glob("*.log")):
        for line in log.read_text(errors="replace").splitlines():
            match = _TRACE.search(line)
            if match is not None:
                found.append(f"{log.name}: {line[:80]} … {line[-400:]}")
    return found


# HTTP


def http_case(started: Running, rng: random.Random) -> Case:
    """A request over HTTP."""
    port = urlsplit(started.ready.http).port or 0
    key = started.ready.key
    kind = rng.choice(("frame", "cut", "syntax", "type", "type", "type", "header", "place"))
    path, proper = rng.choice(_ROUTES)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "connection": "close"}
    body = json.dumps(proper).encode()
    method = "POST"
    what = f"HTTP {kind}"
    match kind:
        case "frame":
            frame = rng.choice(_FRAMES)
            return Case(f"HTTP frame {frame[:60]!r}", lambda: _exchange(port, frame, is_whole=False))
        case "cut":
            whole = _request(method, path, headers, body)
            piece = whole[: rng.randrange(1, len(whole))]
            return Case(f"HTTP cut off after {len(piece)} bytes", lambda: _exchange(port, piece, is_whole=False))
        case "syntax":
            body = _broken_json(rng, body)
            what += f" {path} {body[:40]!r}"
        case "type":
            changed, where = _mutated(rng, proper)
            body = json.dumps(changed).encode()
            what += f" {path} {where}"
        case "header":
            name, values = rng.choice(_HEADERS)
            headers[name] = rng.choice(values)
            what += f" {path} {name}: {headers[name][:40]!r}"
        case _:
            method, path = rng.choice(_PLACES)
            what += f" {method} {path[:60]}"
    request = _request(method, path, headers, body)
    return Case(what, lambda: _exchange(port, request, is_whole=True))


def _request(method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def _broken_json(rng: random.Random, body: bytes) -> bytes:
    position = rng.randrange(len(body))
    return rng.choice(
        (
            b"",
            b"{",
            b"null",
            b"[]",
            b'"text"',
            b"\xff\xfe" + body,
            b"\xef\xbb\xbf" + body,
            body[:position],
            body[:position] + rng.randbytes(3) + body[position:],
            body + b"}",
            b"[" * 50_000,
            b'{"a":' * 5000,
            body.replace(b'"model"', b'"model": "x", "model"'),
            rng.randbytes(200),
        )
    )


def _mutated(rng: random.Random, proper: Any) -> tuple[Any, str]:
    """A copy with one to three places changed, and where."""
    changed = copy.deepcopy(proper)
    places = []
    for _ in range(rng.randint(1, 3)):
        holder, key, where = _place(rng, changed)
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                del holder[key]
                places.append(f"-{where}")
            case 1 if isinstance(holder, dict):
                holder[f"{key}_x"] = holder[key]
                places.append(f"{where}_x")
            case 2 if isinstance(holder, list):
                holder *= 2
                places.append(f"{where}*2")
            case _:
                holder[key] = copy.deepcopy(rng.choice(_VALUES))
                places.append(f"{where}={str(holder[key])[:20]!r}")
        if not changed:
            break
    return changed, " ".join(places)


def _place(rng: random.Random, value: Any) -> tuple[Any, Any, str]:
    """A holder and a key in it, anywhere in `value`, which is not empty."""
    where = ""
    while True:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        where += f"/{str(key)[:20]}"
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return value, key, where
        value = inner


def _exchange(port: int, data: bytes, *, is_whole: bool) -> Verdict:
    """Sends bytes and reads to the end. A request that isn't whole may be answered by the end of the connection alone."""
    received = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_HTTP_SECONDS) as connection:
            try:
                connection.sendall(data)
                if not is_whole:
                    connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(65_536):
                    received += piece
            except ConnectionError:
                # Refused before all of it was read.
                pass
    except OSError as error:
        return Verdict(False, said=f"{type(error).__name__}: {error}")
    match = re.match(rb"HTTP/1\.[01] (\d{3})", received)
    status = int(match[1]) if match is not None else 0
    text = received.decode(errors="replace")
    return Verdict(
        answered=bool(status) or not is_whole,
        internal=status == 500,
        leaked=_TRACE.search(text) is not None,
        said=text[:120].partition("\r\n")[0] + " " + text.partition("\r\n\r\n")[2],
    )


# gRPC


@dataclass(frozen=True, slots=True)
class _Method:
    path: str
    owner: str
    request: descriptor.Descriptor
    is_server_streaming: bool
    is_client_streaming: bool


class GrpcPorts:
    """Channels to every service of a running mesh."""

    def __init__(self, started: Running) -> None:
        ready = started.ready
        self._channels = {owner: grpc.insecure_channel(ready.grpc[owner]) for owner, _ in _FILES}
        self._methods = tuple(_methods())
        service = Secrets.load_or_create(started.directory).service_token
        self._tokens = {"gateway": ready.key, "batching": ready.key}
        self._service_token = service
        self._credentials = (
            None,
            "Bearer",
            "Bearer x",
            *(f"Bearer {one}" for one in (ready.key, ready.admin_key, service, service)),
        )

    def __enter__(self) -> GrpcPorts:
        return self

    def __exit__(self, *exc: object) -> None:
        for channel in self._channels.values():
            channel.close()

    def case(self, rng: random.Random) -> Case:
        """A call."""
        method = rng.choice(self._methods)
        kind = rng.choice(("random", "flipped", "cut", "absurd", "bent", "bent", "bent", "bent", "unknown"))
        made = message_factory.GetMessageClass(method.request)()
        if kind == "absurd":
            _fill(rng, made, share=0.5)
        else:
            _make_proper(made)
            _fill(rng, made, share=0.08 if kind == "bent" else 0.02)
        message = made.SerializeToString()
        path = method.path
        match kind:
            case "random":
                message = rng.randbytes(rng.randint(1, 200))
            case "flipped" if message:
                bits = bytearray(message)
                for _ in range(rng.randint(1, 4)):
                    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
                message = bytes(bits)
            case "cut":
                message = message[: rng.randrange(len(message) + 1)]
            case "unknown":
                path = rng.choice(("/", "/x/y", f"{path}X", path.upper(), "/sluice.inference.v1.InferenceService/"))
        # Whoever is let in gets further.
        right = f"Bearer {self._tokens.get(method.owner, self._service_token)}"
        credential = right if rng.random() < 0.8 else rng.choice(self._credentials)
        metadata: tuple[tuple[str, str], ...] = (("authorization", credential),) if credential is not None else ()
        if rng.random() < 0.1:
            metadata = (
                *metadata,
                rng.choice((("traceparent", "x" * 100), ("x-sluice-service", "?" * 500), ("x-request-id", " "))),
            )
        channel = self._channels[method.owner]
        return Case(f"gRPC {kind} {path} {message[:24].hex()}", lambda: _call(channel, path, method, message, metadata))


def _methods() -> Iterator[_Method]:
    for owner, module in _FILES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield _Method(
                    f"/{service.full_name}/{method.name}",
                    owner,
                    method.input_type,
                    bool(method.server_streaming),
                    bool(method.client_streaming),
                )


def _call(channel: Any, path: str, method: _Method, message: bytes, metadata: tuple[tuple[str, str], ...]) -> Verdict:
    # `Any`: the stubs' types know no calls whose messages are plain bytes.
    try:
        if method.is_client_streaming:
            replies = channel.stream_stream(path)(iter((message,)), timeout=_GRPC_SECONDS, metadata=metadata)
        elif method.is_server_streaming:
            replies = channel.unary_stream(path)(message, timeout=_GRPC_SECONDS, metadata=metadata)
        else:
            channel.unary_unary(path)(message, timeout=_GRPC_SECONDS, metadata=metadata)
            return Verdict(True)
        for count, _ in enumerate(replies, 1):
            if count >= _MOST_REPLIES:
                replies.cancel()
                break
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
        has_reason = any(key == "grpc-status-details-bin" for key, _ in _trailers(error))
        return Verdict(
            # Without a reason it is the transport that speaks: nobody is there.
            answered=code is not grpc.StatusCode.UNAVAILABLE or has_reason,
            internal=code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN),
            leaked=_TRACE.search(details) is not None,
            said=f"{code.name}: {details}",
        )
    return Verdict(True)


def _trailers(error: Any) -> Iterable[tuple[str, str | bytes]]:
    found: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()
    return found


def _make_proper(message: Message) -> None:
    """Sets what most requests need, wherever `message` has it: a tenant, a model, a conversation."""
    for one in message.DESCRIPTOR.fields:
        if one.name in _PROPER and not one.is_repeated and one.message_type is None:
            setattr(message, one.name, _PROPER[one.name])
        elif one.name == "models" and one.is_repeated and one.message_type is None:
            getattr(message, one.name).append(_PROPER["model"])
        elif one.message_type is not None and one.message_type.full_name == conversation_pb2.Conversation.DESCRIPTOR.full_name:
            turn = getattr(message, one.name).messages.add(role=conversation_pb2.ROLE_USER)
            turn.parts.add(text="What is the capital of France?")
        elif one.name in ("request", "routing", "limits", "billing") and one.message_type is not None:
            getattr(message, one.name).SetInParent()
            _make_proper(getattr(message, one.name))


def _fill(rng: random.Random, message: Message, *, share: float, depth: int = 0) -> None:
    """Sets about `share` of the fields to values that are allowed by type and hardly ever by sense."""
    for one in message.DESCRIPTOR.fields:
        chosen = rng.random() < share
        if one.message_type is not None and one.message_type.GetOptions().map_entry:
            if chosen:
                _fill_map(rng, message, one)
        elif one.message_type is not None:
            if depth < _DEEPEST:
                _fill_inner(rng, message, one, share, depth, grow=chosen)
        elif chosen and one.is_repeated:
            getattr(message, one.name).extend(_scalar(rng, one) for _ in range(rng.randint(1, 3)))
        elif chosen:
            setattr(message, one.name, _scalar(rng, one))


def _fill_inner(rng: random.Random, message: Message, one: Any, share: float, depth: int, *, grow: bool) -> None:
    """Goes into the messages that are there; `grow` makes one where there is none."""
    if one.is_repeated:
        holder = getattr(message, one.name)
        if grow:
            holder.add()
        for inner in holder:
            _fill(rng, inner, share=share, depth=depth + 1)
    elif grow or message.HasField(one.name):
        inner = getattr(message, one.name)
        inner.SetInParent()
        _fill(rng, inner, share=share, depth=depth + 1)


def _fill_map(rng: random.Random, message: Message, one: Any) -> None:
    key, value = one.message_type.fields_by_name["key"], one.message_type.fields_by_name["value"]
    if value.message_type is None:
        for _ in range(rng.randint(1, 3)):
            getattr(message, one.name)[_scalar(rng, key)] = _scalar(rng, value)


def _scalar(rng: random.Random, one: Any) -> Any:
    kinds = descriptor.FieldDescriptor
    match one.cpp_type:
        case kinds.CPPTYPE_STRING:
            return rng.randbytes(rng.randint(0, 40)) if one.type == kinds.TYPE_BYTES else rng.choice(_TEXTS)
        case kinds.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case kinds.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 3, 99, -1))
        case kinds.CPPTYPE_FLOAT | kinds.CPPTYPE_DOUBLE:
            return rng.choice(_FLOATS)
        case kinds.CPPTYPE_INT64:
            return rng.choice((*_INTEGERS, *_WIDE))
        case kinds.CPPTYPE_INT32:
            return rng.choice(_INTEGERS)
        case _:
            return abs(rng.choice(_INTEGERS[:-1]))
