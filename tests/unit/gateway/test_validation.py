"""Every bound of the contract, and that garbage is refused, never a crash."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway import validation
from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from tests.unit.gateway.fakes import conversation, generate

MAX = 1_000_000
SERVED = inference_service_pb2.OUTCOME_SERVED
JSON_SCHEMA = conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA


def field_of(request: Any) -> str:
    """The field that a request is refused for; empty: it is accepted."""
    try:
        validation.check_generate(request, MAX)
    except Failure as failure:
        return failure.metadata["field"] if failure.reason is Reason.REQUEST_INVALID else failure.reason.value
    return ""


def turn(role: int = conversation_pb2.ROLE_USER, **part: Any) -> Any:
    """A request of one turn with one part."""
    request = inference_service_pb2.GenerateRequest()
    message = request.conversation.messages.add(role=conversation_pb2.Role.ValueType(role))
    message.parts.add(**part)
    return request


def sampled(**fields: Any) -> Any:
    """A request with sampling fields."""
    return generate(conversation_fields={"sampling": conversation_pb2.Sampling(**fields)})


def test_a_plain_request_is_accepted_and_measured() -> None:
    shape = validation.check_generate(generate("some text"), MAX)
    assert shape.message_count == 1
    assert shape.last_user_text == "some text"
    assert shape.text_bytes() >= len("some text")


def test_too_large() -> None:
    with pytest.raises(Failure) as caught:
        validation.check_generate(generate("x" * 2000), 1000)
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE
    assert caught.value.metadata == {"limit_bytes": "1000"}


def test_pictures_are_counted_apart_from_text() -> None:
    request = turn(image=conversation_pb2.Image(data=b"x" * 500, media_type="image/png"))
    shape = validation.check_generate(request, MAX)
    assert shape.image_count == 1
    assert shape.text_bytes() < 100


@pytest.mark.parametrize(
    ("request_message", "field"),
    [
        (inference_service_pb2.GenerateRequest(), "conversation"),
        (inference_service_pb2.GenerateRequest(conversation=conversation_pb2.Conversation()), "conversation.messages"),
        (generate(request_id="x" * 129), "request_id"),
        (generate(request_id="a\n"), "request_id"),
        (generate(request_id="é"), "request_id"),
        (turn(role=0, text="x"), "conversation.messages[0].role"),
        (turn(role=17, text="x"), "conversation.messages[0].role"),
        (turn(), "conversation.messages[0].parts[0]"),
        (turn(role=conversation_pb2.ROLE_TOOL, text="x"), "conversation.messages[0].parts[0].text"),
        (turn(refusal="no"), "conversation.messages[0].parts[0].refusal"),
        (turn(image=conversation_pb2.Image()), "conversation.messages[0].parts[0].image"),
        (turn(image=conversation_pb2.Image(data=b"x")), "conversation.messages[0].parts[0].image.media_type"),
        (turn(image=conversation_pb2.Image(url="http://x/y.png")), "conversation.messages[0].parts[0].image.url"),
        (turn(image=conversation_pb2.Image(url="https://x", detail="huge")), "conversation.messages[0].parts[0].image.detail"),
        (
            turn(role=conversation_pb2.ROLE_SYSTEM, image=conversation_pb2.Image(url="https://x")),
            "conversation.messages[0].parts[0].image",
        ),
        (turn(tool_call=conversation_pb2.ToolCall(id="1", name="f")), "conversation.messages[0].parts[0].tool_call"),
        (
            turn(role=conversation_pb2.ROLE_ASSISTANT, tool_call=conversation_pb2.ToolCall(name="f")),
            "conversation.messages[0].parts[0].tool_call.id",
        ),
        (
            turn(role=conversation_pb2.ROLE_TOOL, tool_result=conversation_pb2.ToolResult(text="x")),
            "conversation.messages[0].parts[0].tool_result.tool_call_id",
        ),
        (generate(conversation_fields={"tools": [conversation_pb2.ToolDefinition(name="a b")]}), "conversation.tools[0].name"),
        (
            generate(conversation_fields={"tools": [conversation_pb2.ToolDefinition(name="a")] * 2}),
            "conversation.tools[1].name",
        ),
        (
            generate(conversation_fields={"tools": [conversation_pb2.ToolDefinition(name="a", parameters_json_schema="[1]")]}),
            "conversation.tools[0].parameters_json_schema",
        ),
        (
            generate(conversation_fields={"tools": [conversation_pb2.ToolDefinition(name="a", parameters_json_schema="{")]}),
            "conversation.tools[0].parameters_json_schema",
        ),
        (generate(conversation_fields={"tool_choice": conversation_pb2.ToolChoice()}), "conversation.tool_choice.mode"),
        (
            generate(
                conversation_fields={
                    "tool_choice": conversation_pb2.ToolChoice(mode=conversation_pb2.TOOL_CHOICE_MODE_NAMED, name="f")
                }
            ),
            "conversation.tool_choice.name",
        ),
        (
            generate(
                conversation_fields={
                    "tool_choice": conversation_pb2.ToolChoice(mode=conversation_pb2.TOOL_CHOICE_MODE_REQUIRED)
                }
            ),
            "conversation.tool_choice.mode",
        ),
        (
            generate(conversation_fields={"response_format": conversation_pb2.ResponseFormat()}),
            "conversation.response_format.kind",
        ),
        (
            generate(conversation_fields={"response_format": conversation_pb2.ResponseFormat(kind=JSON_SCHEMA)}),
            "conversation.response_format.json_schema",
        ),
        (
            generate(
                conversation_fields={
                    "response_format": conversation_pb2.ResponseFormat(kind=JSON_SCHEMA, json_schema="{}", name="ä")
                }
            ),
            "conversation.response_format.name",
        ),
        (generate(conversation_fields={"max_output_tokens": 0}), "conversation.max_output_tokens"),
        (generate(conversation_fields={"max_output_tokens": 1_000_001}), "conversation.max_output_tokens"),
        (generate(conversation_fields={"stop_sequences": ["a"] * 9}), "conversation.stop_sequences"),
        (generate(conversation_fields={"stop_sequences": [""]}), "conversation.stop_sequences[0]"),
        (sampled(temperature=2.1), "conversation.sampling.temperature"),
        (sampled(temperature=float("nan")), "conversation.sampling.temperature"),
        (sampled(top_p=0.0), "conversation.sampling.top_p"),
        (sampled(top_k=0), "conversation.sampling.top_k"),
        (sampled(presence_penalty=-3.0), "conversation.sampling.presence_penalty"),
        (sampled(frequency_penalty=float("inf")), "conversation.sampling.frequency_penalty"),
        (sampled(logit_bias={1: 101.0}), "conversation.sampling.logit_bias[1]"),
        (sampled(logit_bias=dict.fromkeys(range(1025), 1.0)), "conversation.sampling.logit_bias"),
        (sampled(top_logprob_count=21), "conversation.sampling.top_logprob_count"),
        (sampled(top_logprob_count=2), "conversation.sampling.top_logprob_count"),
        (generate(routing=inference_service_pb2.RoutingWishes(model="m" * 129)), "routing.model"),
        (generate(routing=inference_service_pb2.RoutingWishes(max_cost_nano_usd=-1)), "routing.max_cost_nano_usd"),
        (generate(routing=inference_service_pb2.RoutingWishes(max_latency=Duration(seconds=-1))), "routing.max_latency"),
        (generate(routing=inference_service_pb2.RoutingWishes(region="r" * 33)), "routing.region"),
        (generate(routing=inference_service_pb2.RoutingWishes(affinity_key="é" * 65)), "routing.affinity_key"),
        (generate(cache=inference_service_pb2.CacheWishes(cache_namespace="A")), "cache.cache_namespace"),
        (generate(cache=inference_service_pb2.CacheWishes(min_similarity=0.4)), "cache.min_similarity"),
        (generate(cache=inference_service_pb2.CacheWishes(ttl=Duration(seconds=0))), "cache.ttl"),
        (generate(task_type=9), "task_type"),
        (generate(metadata={str(number): "v" for number in range(17)}), "metadata"),
        (generate(metadata={"k" * 65: "v"}), "metadata"),
        (generate(metadata={"k": "v" * 513}), "metadata[k]"),
        (generate(end_user="u" * 257), "end_user"),
    ],
)
def test_what_breaks_a_bound_is_refused_by_path(request_message: Any, field: str) -> None:
    assert field_of(request_message) == field


@pytest.mark.parametrize(
    "request_message",
    [
        turn(text=""),
        turn(role=conversation_pb2.ROLE_DEVELOPER, text="x"),
        turn(
            role=conversation_pb2.ROLE_ASSISTANT, tool_call=conversation_pb2.ToolCall(id="1", name="f", arguments_json="{oops")
        ),
        turn(role=conversation_pb2.ROLE_TOOL, tool_result=conversation_pb2.ToolResult(tool_call_id="1")),
        sampled(temperature=0.0, top_p=1.0, top_k=1, seed=-1, presence_penalty=2.0, logit_bias={0: -100.0}),
        generate(request_id="with space", end_user="u" * 256, metadata={"k" * 64: "v" * 512}),
        generate(routing=inference_service_pb2.RoutingWishes(model="m" * 128, max_cost_nano_usd=0)),
    ],
)
def test_what_is_within_the_bounds_is_accepted(request_message: Any) -> None:
    assert field_of(request_message) == ""


def test_embeddings() -> None:
    good = inference_service_pb2.EmbedRequest(model="a/one", inputs=["x"])
    assert validation.check_embed(good, MAX).byte_count == 1
    for bad, field in [
        (inference_service_pb2.EmbedRequest(inputs=["x"]), "model"),
        (inference_service_pb2.EmbedRequest(model="a/one"), "inputs"),
        (inference_service_pb2.EmbedRequest(model="a/one", inputs=["x", ""]), "inputs[1]"),
        (inference_service_pb2.EmbedRequest(model="a/one", inputs=["x" * 65_537]), "inputs[0]"),
        (inference_service_pb2.EmbedRequest(model="a/one", inputs=["x"], dimension_count=0), "dimension_count"),
    ]:
        with pytest.raises(Failure) as caught:
            validation.check_embed(bad, MAX)
        assert caught.value.metadata["field"] == field


def test_reports_of_outcomes() -> None:
    good = inference_service_pb2.ReportOutcomeRequest(operation_id="A" * 26, outcome=SERVED)
    validation.check_outcome(good)
    for bad in (
        inference_service_pb2.ReportOutcomeRequest(outcome=SERVED),
        inference_service_pb2.ReportOutcomeRequest(operation_id="A" * 26),
        inference_service_pb2.ReportOutcomeRequest(operation_id="A" * 26, outcome=SERVED, score=1.5),
        inference_service_pb2.ReportOutcomeRequest(operation_id="A" * 26, outcome=SERVED, comment="x" * 1025),
    ):
        with pytest.raises(Failure):
            validation.check_outcome(bad)


def test_pages() -> None:
    validation.check_page(0, "")
    with pytest.raises(Failure):
        validation.check_page(1001, "")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=400))
def test_bytes_that_parse_are_judged_without_a_crash(data: bytes) -> None:
    try:
        request = inference_service_pb2.GenerateRequest.FromString(data)
    except DecodeError:
        return
    field_of(request)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 12))
def test_a_damaged_request_is_judged_without_a_crash(seed: int, flips: int) -> None:
    request = generate(
        "text",
        request_id="r",
        conversation_fields={
            "tools": [conversation_pb2.ToolDefinition(name="f", parameters_json_schema="{}")],
            "sampling": conversation_pb2.Sampling(temperature=1.0, logit_bias={1: 1.0}),
            "response_format": conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT),
        },
        routing=inference_service_pb2.RoutingWishes(model="a/one", max_latency=Duration(seconds=1)),
        cache=inference_service_pb2.CacheWishes(ttl=Duration(seconds=5)),
        metadata={"k": "v"},
    )
    damaged = bytearray(request.SerializeToString())
    source = random.Random(seed)
    for _ in range(flips):
        damaged[source.randrange(len(damaged))] = source.randrange(256)
    try:
        parsed = inference_service_pb2.GenerateRequest.FromString(bytes(damaged))
    except DecodeError:
        return
    field_of(parsed)


def test_shape_of_a_conversation_keeps_the_last_user_text() -> None:
    talk = conversation("first")
    talk.messages.add(role=conversation_pb2.ROLE_ASSISTANT).parts.add(text="reply")
    talk.messages.add(role=conversation_pb2.ROLE_USER).parts.add(text="second")
    assert validation.check_conversation(talk, MAX).last_user_text == "second"
