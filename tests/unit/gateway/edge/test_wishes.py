"""Wishes in headers: each is written where it belongs, and nothing that can't be honoured passes in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.edge import wishes
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from services.runtime.errors import Failure
from sluice.inference.v1 import inference_service_pb2, receipt_pb2

# The machine may be busy: how long an example takes says nothing about the code.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
Request = inference_service_pb2.GenerateRequest


def applied(**headers: str) -> Request:
    """A request with the wishes of `headers`, whose names have `_` for `-`."""
    request = Request()
    wishes.apply_to_generate({name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}, request)
    return request


def refusal(call: Callable[[], object]) -> Failure:
    with pytest.raises(Failure) as caught:
        call()
    return caught.value


def test_no_wish_asks_for_nothing_but_an_answer_without_receipt() -> None:
    request = Request()
    assert wishes.apply_to_generate({b"host": b"x", b"x-request-id": b"1"}, request) is None
    assert request == Request(receipt_view=inference_service_pb2.RECEIPT_VIEW_NONE)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("simple", receipt_pb2.TASK_TYPE_SIMPLE),
        ("reasoning", receipt_pb2.TASK_TYPE_REASONING),
        ("code", receipt_pb2.TASK_TYPE_CODE),
        ("vision", receipt_pb2.TASK_TYPE_VISION),
    ],
)
def test_task_type(value: str, wanted: int) -> None:
    assert applied(x_sluice_task_type=value).task_type == wanted


def test_every_task_type_of_the_contract_can_be_wished() -> None:
    assert set(wishes.TASK_TYPES.values()) == set(receipt_pb2.TaskType.values()) - {receipt_pb2.TASK_TYPE_UNSPECIFIED}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("off", inference_service_pb2.CACHE_MODE_OFF),
        ("exact", inference_service_pb2.CACHE_MODE_EXACT),
        ("semantic", inference_service_pb2.CACHE_MODE_SEMANTIC),
        ("refresh", inference_service_pb2.CACHE_MODE_REFRESH),
    ],
)
def test_cache_mode(value: str, wanted: int) -> None:
    assert applied(x_sluice_cache=value).cache.mode == wanted


def test_cache_details() -> None:
    request = applied(x_sluice_cache_namespace="search", x_sluice_cache_min_similarity="0.93", x_sluice_cache_ttl="10m")
    assert request.cache.cache_namespace == "search"
    assert request.cache.min_similarity == 0.93
    assert request.cache.ttl.seconds == 600
    assert request.cache.mode == inference_service_pb2.CACHE_MODE_UNSPECIFIED


def test_routing_wishes() -> None:
    request = applied(
        x_sluice_max_cost_nano_usd="9223372036854775807",
        x_sluice_max_latency="800ms",
        x_sluice_region="eu",
        x_sluice_affinity_key="talk 7",
        x_sluice_allow_fallback="false",
    )
    routing = request.routing
    assert routing.max_cost_nano_usd == 2**63 - 1
    assert (routing.max_latency.seconds, routing.max_latency.nanos) == (0, 800_000_000)
    assert routing.region == "eu"
    assert routing.affinity_key == "talk 7"
    assert routing.HasField("allow_fallback")
    assert not routing.allow_fallback
    assert applied(x_sluice_allow_fallback="true").routing.allow_fallback


def test_a_cost_of_nothing_is_a_wish_too() -> None:
    assert applied(x_sluice_max_cost_nano_usd="0").routing.HasField("max_cost_nano_usd")


def test_metadata_is_merged_over_the_body() -> None:
    request = Request(metadata={"team": "body", "kept": "yes"})
    wishes.apply_to_generate({b"x-sluice-metadata": b'{"team": "search", "caf\\u00e9": "\\u2615"}'}, request)
    assert dict(request.metadata) == {"team": "search", "kept": "yes", "café": "☕"}


def test_affinity_in_a_header_wins_over_the_body() -> None:
    request = Request(routing=inference_service_pb2.RoutingWishes(affinity_key="body"))
    wishes.apply_to_generate({b"x-sluice-affinity-key": b"header"}, request)
    assert request.routing.affinity_key == "header"


def test_receipt() -> None:
    assert applied(x_sluice_receipt="full").receipt_view == inference_service_pb2.RECEIPT_VIEW_FULL
    assert applied(x_sluice_receipt="none").receipt_view == inference_service_pb2.RECEIPT_VIEW_NONE


def test_idempotency_key_becomes_the_request_id() -> None:
    assert applied(idempotency_key=" stainless-python-retry-7 ").request_id == "stainless-python-retry-7"
    embed = inference_service_pb2.EmbedRequest()
    wishes.apply_to_embed({b"idempotency-key": b"once"}, embed)
    assert embed.request_id == "once"


def test_timeout_is_returned_and_not_written() -> None:
    request = Request()
    assert wishes.apply_to_generate({b"x-sluice-timeout": b"1.5s"}, request) == 1.5
    assert request == Request(receipt_view=inference_service_pb2.RECEIPT_VIEW_NONE)
    assert wishes.apply_to_embed({b"x-sluice-timeout": b"2"}, inference_service_pb2.EmbedRequest()) == 2.0
    assert wishes.apply_to_free_call({b"x-sluice-timeout": b"250ms"}) == 0.25


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("30", 30.0), ("30s", 30.0), ("1.5s", 1.5), ("800ms", 0.8), ("10m", 600.0), ("2h", 7200.0), ("0.000001ms", 1e-9)],
)
def test_times(value: str, wanted: float) -> None:
    assert wishes.seconds(value, "x") == pytest.approx(wanted)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0",
        "0s",
        "-1s",
        "1d",
        "1 s",
        "s",
        "1e3",
        ".5s",
        "1.s",
        "nan",
        "inf",
        "+1",
        "1s1s",
        "٣s",
        "1" * 10,
        "0.0000001ms",
        "999999999h",
    ],
)
def test_no_times(value: str) -> None:
    failure = refusal(lambda: wishes.seconds(value, "x-sluice-timeout"))
    assert isinstance(failure, RequestInvalid)
    assert failure.metadata == {"field": "x-sluice-timeout"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-sluice-task-type", "hard"),
        ("x-sluice-cache", "on"),
        ("x-sluice-cache", "off, exact"),  # given twice: the listener joins the lines
        ("x-sluice-cache", "OFF"),
        ("x-sluice-cache-min-similarity", "0.4"),
        ("x-sluice-cache-min-similarity", "1.01"),
        ("x-sluice-cache-min-similarity", "nan"),
        ("x-sluice-cache-min-similarity", "0_9"),
        ("x-sluice-cache-min-similarity", "high"),
        ("x-sluice-cache-ttl", "soon"),
        ("x-sluice-cache-ttl", "0s"),
        ("x-sluice-max-cost-nano-usd", "-1"),
        ("x-sluice-max-cost-nano-usd", "1.5"),
        ("x-sluice-max-cost-nano-usd", "9223372036854775808"),
        ("x-sluice-max-cost-nano-usd", "1_000"),
        ("x-sluice-max-cost-nano-usd", "1" * 5000),
        ("x-sluice-max-latency", "fast"),
        ("x-sluice-allow-fallback", "True"),
        ("x-sluice-allow-fallback", "1"),
        ("x-sluice-metadata", "team=search"),
        ("x-sluice-metadata", "[1]"),
        ("x-sluice-metadata", '{"team": 7}'),
        ("x-sluice-metadata", '{"team": null}'),
        ("x-sluice-metadata", '"text"'),
        ("x-sluice-metadata", "[" * 5000),
        ("x-sluice-receipt", "short"),
        ("x-sluice-timeout", "later"),
    ],
)
def test_wrong_values_are_refused_under_the_header_s_name(name: str, value: str) -> None:
    failure = refusal(lambda: wishes.apply_to_generate({name.encode(): value.encode()}, Request()))
    assert isinstance(failure, RequestInvalid)
    assert failure.metadata["field"].startswith(name)
    assert len(failure.message) < 300


_ALL = [
    "idempotency-key", "x-sluice-task-type", "x-sluice-cache", "x-sluice-cache-namespace", "x-sluice-cache-min-similarity",
    "x-sluice-cache-ttl", "x-sluice-max-cost-nano-usd", "x-sluice-max-latency", "x-sluice-region", "x-sluice-affinity-key",
    "x-sluice-allow-fallback", "x-sluice-metadata", "x-sluice-receipt", "x-sluice-timeout",
]  # fmt: skip


@pytest.mark.parametrize("name", _ALL)
@pytest.mark.parametrize("value", [b"", b"  ", b"caf\xc3\xa9", b"a\tb", b"\x7f", b"\xff"])
def test_empty_or_unprintable_values_are_refused(name: str, value: bytes) -> None:
    failure = refusal(lambda: wishes.apply_to_generate({name.encode(): value}, Request()))
    assert isinstance(failure, RequestInvalid)
    assert failure.metadata == {"field": name}


@pytest.mark.parametrize("name", _ALL)
def test_the_module_s_documentation_names_every_header(name: str) -> None:
    assert name in (wishes.__doc__ or "").lower()


def test_unknown_wishes_are_refused_by_name() -> None:
    failure = refusal(lambda: applied(x_sluice_colour="blue"))
    assert isinstance(failure, FieldUnsupported)
    assert failure.metadata == {"field": "x-sluice-colour"}
    long = refusal(lambda: wishes.apply_to_generate({b"x-sluice-" + b"a" * 9000: b"1"}, Request()))
    assert len(long.message) < 300


@pytest.mark.parametrize(
    "name", [name for name in _ALL if name not in ("idempotency-key", "x-sluice-timeout", "x-sluice-metadata")]
)
def test_what_means_nothing_for_embeddings_is_refused_there(name: str) -> None:
    failure = refusal(lambda: wishes.apply_to_embed({name.encode(): b"1"}, inference_service_pb2.EmbedRequest()))
    assert isinstance(failure, FieldUnsupported)
    assert failure.metadata == {"field": name}


def test_embeddings_take_metadata() -> None:
    request = inference_service_pb2.EmbedRequest(metadata={"a": "1"})
    assert wishes.apply_to_embed({b"x-sluice-metadata": b'{"b": "2"}', b"host": b"h"}, request) is None
    assert dict(request.metadata) == {"a": "1", "b": "2"}


@pytest.mark.parametrize("name", [name for name in _ALL if name not in ("idempotency-key", "x-sluice-timeout")])
def test_free_calls_take_a_timeout_only(name: str) -> None:
    failure = refusal(lambda: wishes.apply_to_free_call({name.encode(): b"1"}))
    assert isinstance(failure, FieldUnsupported)
    assert failure.metadata == {"field": name}


def test_free_calls_ignore_an_idempotency_key() -> None:
    # SDKs send it with every POST; a call without effect is idempotent anyway.
    assert wishes.apply_to_free_call({b"idempotency-key": b"k", b"host": b"h"}) is None


@unhurried
@given(name=st.sampled_from(_ALL), value=st.binary(max_size=60))
def test_whatever_a_header_has_only_a_failure_is_raised(name: str, value: bytes) -> None:
    for headers in ({name.encode(): value}, {name.encode() + value.lower(): b"1"}):
        try:
            timeout = wishes.apply_to_generate(headers, Request())
        except Failure:
            continue
        assert timeout is None or timeout > 0
