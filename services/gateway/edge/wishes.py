"""Wishes in headers: what OpenAI's and Anthropic's bodies have no field for.

    Idempotency-Key              the request id: same key and body join or replay the first call
    x-sluice-task-type           simple, reasoning, code or vision
    x-sluice-cache               off, exact, semantic or refresh
    x-sluice-cache-namespace     entries of other namespaces are not seen
    x-sluice-cache-min-similarity  least cosine for a semantic hit
    x-sluice-cache-ttl           how long the answer may be stored, say 10m
    x-sluice-max-cost-nano-usd   most that the request may cost
    x-sluice-max-latency         longest expected time, say 1.5s or 800ms
    x-sluice-region              region that the request must not leave
    x-sluice-affinity-key        equal keys prefer the same candidate
    x-sluice-allow-fallback      true or false
    x-sluice-metadata            JSON object of strings, merged over the body's metadata
    x-sluice-receipt             full: the answer has the receipt in its field `sluice`; none: the default
    x-sluice-timeout             time for the request, all attempts together, say 30s

Any other `x-sluice-` header is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import orjson
from google.protobuf.duration_pb2 import Duration

from services.gateway.edge import payload
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from sluice.inference.v1 import inference_service_pb2, receipt_pb2

PREFIX: Final = b"x-sluice-"
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)?")
_DECIMAL: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,17})?")
_MAX_SECONDS: Final = 315_576_000_000
"""Longest time that protobuf's Duration has."""
_SECONDS: Final[Mapping[str, float]] = MappingProxyType({"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0})

TASK_TYPES: Final[Mapping[str, receipt_pb2.TaskType.ValueType]] = MappingProxyType(
    {
        "simple": receipt_pb2.TASK_TYPE_SIMPLE,
        "reasoning": receipt_pb2.TASK_TYPE_REASONING,
        "code": receipt_pb2.TASK_TYPE_CODE,
        "vision": receipt_pb2.TASK_TYPE_VISION,
    }
)
_MODES: Final[Mapping[str, inference_service_pb2.CacheMode.ValueType]] = MappingProxyType(
    {
        "off": inference_service_pb2.CACHE_MODE_OFF,
        "exact": inference_service_pb2.CACHE_MODE_EXACT,
        "semantic": inference_service_pb2.CACHE_MODE_SEMANTIC,
        "refresh": inference_service_pb2.CACHE_MODE_REFRESH,
    }
)

Request = inference_service_pb2.GenerateRequest


def apply_to_generate(headers: Mapping[bytes, bytes], request: Request) -> float | None:
    """Writes the wishes of `headers` into `request`. Returns the timeout in seconds; None: none is wished.

    A full receipt is wished by `request.receipt_view`.
    """
    request.receipt_view = inference_service_pb2.RECEIPT_VIEW_NONE
    timeout = None
    for name in headers:
        if name.startswith(PREFIX):
            if name == b"x-sluice-timeout":
                timeout = _timeout(headers)
                continue
            write = _WRITERS.get(name)
            if write is None:
                raise FieldUnsupported(
                    _text(name), "is unknown; see the documentation of the HTTP edge for the headers there are"
                )
            write(request, value_of(headers, name), _text(name))
    key = headers.get(b"idempotency-key")
    if key is not None:
        request.request_id = value_of(headers, b"idempotency-key")
    return timeout


def apply_to_embed(headers: Mapping[bytes, bytes], request: inference_service_pb2.EmbedRequest) -> float | None:
    """As `apply_to_generate`. Embeddings are neither routed nor cached, so the wishes for that are refused by name."""
    timeout = None
    for name in headers:
        if name.startswith(PREFIX):
            if name == b"x-sluice-timeout":
                timeout = _timeout(headers)
            elif name == b"x-sluice-metadata":
                request.metadata.update(_labels(value_of(headers, name), _text(name)))
            else:
                raise FieldUnsupported(_text(name), "means nothing for this call; leave it out")
    if b"idempotency-key" in headers:
        request.request_id = value_of(headers, b"idempotency-key")
    return timeout


def apply_to_free_call(headers: Mapping[bytes, bytes]) -> float | None:
    """As `apply_to_generate`, for calls that neither run nor cost anything."""
    timeout = None
    for name in headers:
        if name.startswith(PREFIX):
            if name != b"x-sluice-timeout":
                raise FieldUnsupported(_text(name), "means nothing for this call; leave it out")
            timeout = _timeout(headers)
    return timeout


def value_of(headers: Mapping[bytes, bytes], name: bytes) -> str:
    """The value of a header as text: printable ASCII, not empty.

    An empty one is refused, since a wish that is lost in silence (say the variable of a shell script that isn't set) would let a
    request leave its region or run twice.
    """
    try:
        value = headers[name].decode("ascii")
    except UnicodeDecodeError:
        raise RequestInvalid(_text(name), "must be printable ASCII") from None
    if not value.isprintable():
        raise RequestInvalid(_text(name), "must be printable ASCII")
    value = value.strip()
    if not value:
        raise RequestInvalid(_text(name), "must not be empty; leave it out to wish nothing")
    return value


def seconds(value: str, path: str) -> float:
    """`1.5s`, `800ms`, `10m` or `1h` in seconds; a bare number is seconds."""
    match = _DURATION.fullmatch(value)
    if match is None or not 1e-9 <= (result := float(match[1]) * _SECONDS[match[2] or "s"]) <= _MAX_SECONDS:
        raise RequestInvalid(path, f"must be a time above 0 such as 1.5s, 800ms or 10m, is {payload.shown(value)}")
    return result


def _timeout(headers: Mapping[bytes, bytes]) -> float:
    return seconds(value_of(headers, b"x-sluice-timeout"), "x-sluice-timeout")


def _set_duration(duration: Duration, value: str, path: str) -> None:
    duration.FromNanoseconds(round(seconds(value, path) * 1e9))


def _labels(value: str, path: str) -> dict[str, str]:
    try:
        parsed = orjson.loads(value)
    except orjson.JSONDecodeError:
        raise RequestInvalid(path, 'must be a JSON object of strings, say {"team": "search"}') from None
    return payload.labels(parsed, path)


def _task_type(request: Request, value: str, path: str) -> None:
    request.task_type = TASK_TYPES[payload.choice(value, path, TASK_TYPES)]


def _cache(request: Request, value: str, path: str) -> None:
    request.cache.mode = _MODES[payload.choice(value, path, _MODES)]


def _cache_namespace(request: Request, value: str, path: str) -> None:
    request.cache.cache_namespace = value


def _min_similarity(request: Request, value: str, path: str) -> None:
    # Not float() alone, which also takes `0_9`, `nan` and `infinity`.
    if _DECIMAL.fullmatch(value) is None:
        raise RequestInvalid(path, f"must be a number, is {payload.shown(value)}")
    request.cache.min_similarity = payload.number(float(value), path, 0.5, 1.0)


def _ttl(request: Request, value: str, path: str) -> None:
    _set_duration(request.cache.ttl, value, path)


def _max_cost(request: Request, value: str, path: str) -> None:
    if not value.isdigit() or len(value) > 19 or int(value) > payload.INT64_MAX:
        raise RequestInvalid(path, f"must be a whole number of nano-dollars, is {payload.shown(value)}")
    request.routing.max_cost_nano_usd = int(value)


def _max_latency(request: Request, value: str, path: str) -> None:
    _set_duration(request.routing.max_latency, value, path)


def _region(request: Request, value: str, path: str) -> None:
    request.routing.region = value


def _affinity_key(request: Request, value: str, path: str) -> None:
    request.routing.affinity_key = value


def _allow_fallback(request: Request, value: str, path: str) -> None:
    request.routing.allow_fallback = payload.choice(value, path, ("true", "false")) == "true"


def _metadata(request: Request, value: str, path: str) -> None:
    request.metadata.update(_labels(value, path))


def _receipt(request: Request, value: str, path: str) -> None:
    if payload.choice(value, path, ("full", "none")) == "full":
        request.receipt_view = inference_service_pb2.RECEIPT_VIEW_FULL


def _text(name: bytes) -> str:
    return name.decode("latin-1")[:64]


_WRITERS: Final[Mapping[bytes, Callable[[Request, str, str], None]]] = MappingProxyType(
    {
        b"x-sluice-task-type": _task_type,
        b"x-sluice-cache": _cache,
        b"x-sluice-cache-namespace": _cache_namespace,
        b"x-sluice-cache-min-similarity": _min_similarity,
        b"x-sluice-cache-ttl": _ttl,
        b"x-sluice-max-cost-nano-usd": _max_cost,
        b"x-sluice-max-latency": _max_latency,
        b"x-sluice-region": _region,
        b"x-sluice-affinity-key": _affinity_key,
        b"x-sluice-allow-fallback": _allow_fallback,
        b"x-sluice-metadata": _metadata,
        b"x-sluice-receipt": _receipt,
    }
)
