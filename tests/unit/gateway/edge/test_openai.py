"""OpenAI's chat completions and embeddings: every field is carried over or refused by name; answers are what OpenAI's SDK reads."""

from __future__ import annotations

import base64
import contextlib
import copy
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, get_args

import openai.types as sdk
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming

from services.gateway import validation
from services.gateway.core import Completion
from services.gateway.edge import openai
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from services.gateway.events import Opened
from services.gateway.receipts import Facts
from services.runtime.errors import Failure, Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2
from tests.unit.gateway.fakes import PRINCIPAL

# The machine may be busy: how long an example takes says nothing about the code.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
Part = conversation_pb2.Part
Message = conversation_pb2.Message
PIXEL: Final = base64.b64encode(b"\x89PNG").decode()
SCHEMA: Final[dict[str, Any]] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LEAST: Final[dict[str, Any]] = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}

FULL: Final[dict[str, Any]] = {
    "model": "openai/gpt",
    "messages": [
        {"role": "developer", "content": "Be brief.", "name": "lead"},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {
            "role": "user",
            "name": "ann",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I ask."}, {"type": "refusal", "refusal": "Not that."}],
            "refusal": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}],
            "audio": None,
            "function_call": None,
            "annotations": [],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21 "}, {"type": "text", "text": "°C"}]},
        {"role": "assistant", "content": None, "refusal": "No."},
    ],
    "tools": [
        {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": SCHEMA, "strict": True}},
        {"type": "function", "function": {"name": "clock"}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "parallel_tool_calls": False,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True, "description": "The answer."},
    },
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "seed": -7,
    "stop": ["END", "STOP"],
    "presence_penalty": -1.5,
    "frequency_penalty": 2,
    "logit_bias": {"50256": -100, "7": 1.5},
    "logprobs": True,
    "top_logprobs": 3,
    "max_completion_tokens": 100,
    "reasoning_effort": "low",
    "metadata": {"team": "search"},
    "safety_identifier": "user-1",
    "prompt_cache_key": "talk-7",
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "n": 1,
    "store": False,
    "service_tier": "default",
    "modalities": ["text"],
    "verbosity": "medium",
}


def chat(**changes: Any) -> openai.ChatCall:
    return openai.chat_from_json(orjson.dumps({**LEAST, **changes}))


def conversation(**changes: Any) -> conversation_pb2.Conversation:
    return chat(**changes).request.conversation


def refusal(call: Callable[[], object]) -> Failure:
    with pytest.raises(Failure) as caught:
        call()
    return caught.value


def message(item: dict[str, Any]) -> conversation_pb2.Message:
    (result,) = conversation(messages=[item]).messages
    return result


# requests


def test_every_field_is_carried_over() -> None:
    call = openai.chat_from_json(orjson.dumps(FULL))
    schema = orjson.dumps(SCHEMA).decode()
    wanted = inference_service_pb2.GenerateRequest(
        conversation=conversation_pb2.Conversation(
            messages=[
                Message(role=conversation_pb2.ROLE_DEVELOPER, name="lead", parts=[Part(text="Be brief.")]),
                Message(role=conversation_pb2.ROLE_SYSTEM, parts=[Part(text="Be "), Part(text="kind.")]),
                Message(
                    role=conversation_pb2.ROLE_USER,
                    name="ann",
                    parts=[
                        Part(text="What is this?"),
                        Part(image=conversation_pb2.Image(data=b"\x89PNG", media_type="image/png", detail="low")),
                        Part(image=conversation_pb2.Image(url="https://example.com/a.png")),
                    ],
                ),
                Message(
                    role=conversation_pb2.ROLE_ASSISTANT,
                    parts=[
                        Part(reasoning=conversation_pb2.Reasoning(text="hm")),
                        Part(text="I ask."),
                        Part(refusal="Not that."),
                        Part(tool_call=conversation_pb2.ToolCall(id="c1", name="weather", arguments_json='{"city":"Köln"}')),
                    ],
                ),
                Message(
                    role=conversation_pb2.ROLE_TOOL,
                    parts=[Part(tool_result=conversation_pb2.ToolResult(tool_call_id="c1", text="21 °C"))],
                ),
                Message(role=conversation_pb2.ROLE_ASSISTANT, parts=[Part(refusal="No.")]),
            ],
            tools=[
                conversation_pb2.ToolDefinition(
                    name="weather", description="Says it.", parameters_json_schema=schema, strict=True
                ),
                conversation_pb2.ToolDefinition(name="clock"),
            ],
            tool_choice=conversation_pb2.ToolChoice(mode=conversation_pb2.TOOL_CHOICE_MODE_NAMED, name="weather"),
            response_format=conversation_pb2.ResponseFormat(
                kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA,
                json_schema=schema,
                name="answer",
                strict=True,
                description="The answer.",
            ),
            sampling=conversation_pb2.Sampling(
                temperature=0.5,
                top_p=0.9,
                top_k=40,
                seed=-7,
                presence_penalty=-1.5,
                frequency_penalty=2,
                logit_bias={50256: -100, 7: 1.5},
                logprobs=True,
                top_logprob_count=3,
            ),
            max_output_tokens=100,
            stop_sequences=["END", "STOP"],
            reasoning_effort=conversation_pb2.REASONING_EFFORT_LOW,
            parallel_tool_calls=False,
        ),
        routing=inference_service_pb2.RoutingWishes(model="openai/gpt", affinity_key="talk-7"),
        metadata={"team": "search"},
        end_user="user-1",
    )
    assert call.request == wanted
    assert call.stream
    assert call.include_usage
    validation.check_generate(call.request, 10_000_000)


def test_the_contract_has_no_field_of_a_conversation_that_can_t_be_asked_for() -> None:
    call = openai.chat_from_json(orjson.dumps(FULL))
    asked = call.request.conversation
    assert {field.name for field, _ in asked.ListFields()} == set(asked.DESCRIPTOR.fields_by_name)
    assert {field.name for field, _ in asked.sampling.ListFields()} == set(asked.sampling.DESCRIPTOR.fields_by_name)


def test_what_isn_t_asked_for_isn_t_set() -> None:
    call = chat()
    assert call.request == inference_service_pb2.GenerateRequest(
        conversation=conversation_pb2.Conversation(
            messages=[Message(role=conversation_pb2.ROLE_USER, parts=[Part(text="hello")])]
        ),
        routing=inference_service_pb2.RoutingWishes(model="auto"),
    )
    assert not call.stream
    assert not call.include_usage


@pytest.mark.parametrize(
    "changes",
    [
        {"tool_choice": "auto"}, {"logprobs": False}, {"top_logprobs": 0}, {"response_format": {"type": "text"}}, {"n": 1}, {"store": False},
        {"service_tier": "auto"}, {"service_tier": "default"}, {"modalities": ["text"]}, {"verbosity": "medium"}, {"stream": False},
        {"stream_options": {"include_usage": False}}, {"tools": []}, {"stop": []}, {"metadata": {}}, {"logit_bias": {}}, {"user": ""},
    ],
)  # fmt: skip
def test_wishes_for_what_happens_anyway_leave_equal_requests_equal(changes: dict[str, Any]) -> None:
    # The request is the key of the cache and of idempotency.
    assert chat(**changes).request.SerializeToString(deterministic=True) == chat().request.SerializeToString(deterministic=True)


def test_null_asks_for_nothing() -> None:
    nulls = {name: None for name in (*FULL, *_REFUSED) if name not in LEAST}
    assert chat(**nulls).request == chat().request


_REFUSED: Final[dict[str, Any]] = {
    "audio": {"voice": "alloy", "format": "mp3"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "web_search_options": {},
    "n": 2,
    "store": True,
    "service_tier": "flex",
    "modalities": ["text", "audio"],
    "verbosity": "high",
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_can_t_be_honoured_is_refused_by_name(name: str) -> None:
    failure = refusal(lambda: chat(**{name: _REFUSED[name]}))
    assert isinstance(failure, FieldUnsupported)
    assert failure.metadata == {"field": name}


def test_every_field_of_the_sdk_is_known() -> None:
    names = set(CompletionCreateParamsNonStreaming.__annotations__) | set(CompletionCreateParamsStreaming.__annotations__)
    assert names <= {*FULL, *_REFUSED, "max_tokens", "user"}
    assert set(sdk.EmbeddingCreateParams.__annotations__) == {"model", "input", "encoding_format", "dimensions", "user"}


@pytest.mark.parametrize("value", [1, None, {}, "x"])
def test_unknown_fields_are_refused_by_name_even_when_null(value: Any) -> None:
    failure = refusal(lambda: chat(temprature=value))
    assert isinstance(failure, FieldUnsupported)
    assert failure.metadata == {"field": "temprature"}


def objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a body whose keys are ours to know, with its path."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            if key not in ("schema", "parameters", "metadata", "logit_bias"):
                yield from objects(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from objects(inner, f"{path}[{index}]")


@pytest.mark.parametrize("position", range(len(list(objects(FULL)))))
def test_unknown_keys_are_refused_by_path_wherever_they_stand(position: int) -> None:
    body = copy.deepcopy(FULL)
    path, item = list(objects(body))[position]
    item["surprise"] = None
    failure = refusal(lambda: openai.chat_from_json(orjson.dumps(body)))
    assert isinstance(failure, FieldUnsupported)
    assert failure.metadata == {"field": f"{path}.surprise" if path else "surprise"}


@pytest.mark.parametrize("name", ["model", "messages"])
@pytest.mark.parametrize("is_null", [True, False])
def test_model_and_messages_are_required(name: str, is_null: bool) -> None:
    body: dict[str, Any] = {**LEAST, name: None}
    if not is_null:
        del body[name]
    failure = refusal(lambda: openai.chat_from_json(orjson.dumps(body)))
    assert failure.reason is Reason.REQUEST_INVALID
    assert failure.metadata == {"field": name}


def test_an_empty_model_is_not_the_default() -> None:
    assert refusal(lambda: chat(model="")).metadata == {"field": "model"}


def test_both_names_of_the_output_limit() -> None:
    assert conversation(max_tokens=5).max_output_tokens == 5
    assert conversation(max_completion_tokens=5).max_output_tokens == 5
    assert conversation(max_tokens=5, max_completion_tokens=5).max_output_tokens == 5
    assert refusal(lambda: chat(max_tokens=5, max_completion_tokens=6)).metadata == {"field": "max_completion_tokens"}
    assert refusal(lambda: chat(max_completion_tokens=5, max_tokens=6)).metadata == {"field": "max_tokens"}


def test_both_names_of_the_end_user() -> None:
    assert chat(user="u").request.end_user == "u"
    assert chat(user="u", safety_identifier="u").request.end_user == "u"
    assert refusal(lambda: chat(user="u", safety_identifier="v")).metadata == {"field": "safety_identifier"}


def test_one_stop_or_several() -> None:
    assert conversation(stop="END").stop_sequences == ["END"]
    assert conversation(stop=["a", "b"]).stop_sequences == ["a", "b"]
    assert refusal(lambda: chat(stop=["a", 1])).metadata == {"field": "stop[1]"}


@pytest.mark.parametrize(
    ("choice", "mode"),
    [("none", conversation_pb2.TOOL_CHOICE_MODE_NONE), ("required", conversation_pb2.TOOL_CHOICE_MODE_REQUIRED)],
)
def test_tool_choice(choice: str, mode: int) -> None:
    assert conversation(tool_choice=choice).tool_choice.mode == mode


@pytest.mark.parametrize(
    ("choice", "field", "kind"),
    [
        ("any", "tool_choice", RequestInvalid),
        (1, "tool_choice", RequestInvalid),
        ({"type": "custom", "custom": {"name": "x"}}, "tool_choice.type", FieldUnsupported),
        ({"type": "allowed_tools", "allowed_tools": {}}, "tool_choice.type", FieldUnsupported),
        ({"type": "function"}, "tool_choice.function", RequestInvalid),
        ({"type": "function", "function": {}}, "tool_choice.function.name", RequestInvalid),
        ({"type": "function", "function": {"name": 1}}, "tool_choice.function.name", RequestInvalid),
    ],
)
def test_other_tool_choices_are_refused(choice: Any, field: str, kind: type[Failure]) -> None:
    failure = refusal(lambda: chat(tool_choice=choice))
    assert isinstance(failure, kind)
    assert failure.metadata == {"field": field}


def test_response_formats() -> None:
    wanted = conversation(response_format={"type": "json_object"}).response_format
    assert wanted == conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT)
    wanted = conversation(
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": None}}
    ).response_format
    assert wanted.json_schema == "{}"
    assert not wanted.HasField("strict")


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": ["text"]}, "response_format.type"),
        ({"type": "grammar", "grammar": "x"}, "response_format.type"),
        ({"type": "text", "json_schema": {}}, "response_format.json_schema"),
        ({"type": "json_object", "schema": {}}, "response_format.schema"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": []}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": 1}},
            "response_format.json_schema.strict",
        ),
    ],
)
def test_other_response_formats_are_refused(wanted: Any, field: str) -> None:
    assert refusal(lambda: chat(response_format=wanted)).metadata == {"field": field}


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high"])
def test_reasoning_efforts(effort: str) -> None:
    number = conversation(reasoning_effort=effort).reasoning_effort
    assert conversation_pb2.ReasoningEffort.Name(number) == f"REASONING_EFFORT_{effort.upper()}"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0, 0.0, 1, 2], [-0.1, 2.1, "1", True, [1]]),
        ("top_p", [0.1, 1], [-0.1, 1.1, "1", False]),
        ("top_k", [1, 2**31 - 1], [0, -1, 2**31, 1.0, "1"]),
        ("seed", [0, -(2**63), 2**63 - 1], [2**63, 1.5, "1", True]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1, "0"]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1, "0"]),
        ("logprobs", [True], [1, "true"]),
        ("top_logprobs", [0, 20], [-1, 21, 1.5, True]),
        ("max_tokens", [1, 1_000_000], [0, -1, 1_000_001, 1.5, "5", True]),
        ("max_completion_tokens", [1, 1_000_000], [0, -1, 1_000_001, 1.5, "5", True]),
        ("n", [1], [0, -1, 129, "1", True, 1.0]),
        ("parallel_tool_calls", [True, False], [0, "true"]),
        ("stream", [True, False], [0, 1, "true"]),
        ("store", [False], [0, "false"]),
        ("user", ["u"], [1, ["u"]]),
        ("safety_identifier", ["u"], [1]),
        ("prompt_cache_key", ["k"], [1]),
        ("reasoning_effort", ["low"], ["LOW", "xhigh", "", 1, ["low"], {}]),
        ("model", ["m"], ["", 1, ["m"], {}]),
        ("tools", [[]], [{}, "x", 1]),
        ("messages", [[]], [{}, "x", 1]),
        ("metadata", [{"a": "b"}], [[], "x", 1]),
        ("logit_bias", [{"1": 1}], [[], "x", 1]),
    ],
)
def test_ranges_and_types(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        chat(**{name: value})
    for value in bad:
        failure = refusal(lambda value=value: chat(**{name: value}))  # type: ignore[misc]
        assert failure.reason is Reason.REQUEST_INVALID, value
        assert failure.metadata == {"field": name}


@pytest.mark.parametrize(
    ("biases", "field"),
    [
        ({"a": 1}, "logit_bias"), ({"-1": 1}, "logit_bias"), ({"1.5": 1}, "logit_bias"), ({"": 1}, "logit_bias"), ({"²": 1}, "logit_bias"),
        ({"٣": 1}, "logit_bias"), ({"2147483648": 1}, "logit_bias"), ({"9" * 5000: 1}, "logit_bias"), ({"1": 1, "01": 2}, "logit_bias"),
        ({"1": 101}, "logit_bias.1"), ({"1": "5"}, "logit_bias.1"), ({"1": None}, "logit_bias.1"),
    ],
)  # fmt: skip
def test_biases_that_are_none(biases: dict[str, Any], field: str) -> None:
    failure = refusal(lambda: chat(logit_bias=biases))
    assert failure.metadata == {"field": field}
    assert len(failure.message) < 200


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"include_usage": 1}, "stream_options.include_usage"),
        ({"include_obfuscation": True}, "stream_options.include_obfuscation"),
        ({"include_obfuscation": "no"}, "stream_options.include_obfuscation"),
        ({"include_obfuscation": 0}, "stream_options.include_obfuscation"),
        ([], "stream_options"),
    ],
)
def test_stream_options_that_are_none(options: Any, field: str) -> None:
    assert refusal(lambda: chat(stream=True, stream_options=options)).metadata == {"field": field}


def test_usage_of_a_stream_needs_a_stream() -> None:
    assert refusal(lambda: chat(stream_options={"include_usage": True})).metadata == {"field": "stream_options"}


# messages


def test_an_answer_of_the_sdk_can_be_sent_back_whole() -> None:
    answered = ChatCompletion.model_validate_json(openai.chat_to_json(completion(TOOLS)))
    sent_back = answered.choices[0].message.model_dump()
    assert message(sent_back) == Message(
        role=conversation_pb2.ROLE_ASSISTANT,
        parts=[part for kind in ("reasoning", "text", "tool_call") for part in TOOLS.message.parts if part.HasField(kind)],
    )


def test_an_assistant_may_say_nothing_but_must_say_so() -> None:
    assert message({"role": "assistant", "content": ""}).parts == [Part(text="")]
    assert message({"role": "assistant", "content": "", "tool_calls": []}).parts == [Part(text="")]
    calls = [{"id": "1", "function": {"name": "f", "arguments": ""}}]
    assert [part.WhichOneof("kind") for part in message({"role": "assistant", "tool_calls": calls}).parts] == ["tool_call"]
    for item in ({"role": "assistant"}, {"role": "assistant", "content": None}, {"role": "assistant", "tool_calls": []}):
        assert refusal(lambda item=item: message(item)).metadata == {"field": "messages[0].content"}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ("hello", "messages[0]"),
        (None, "messages[0]"),
        ({}, "messages[0].role"),
        ({"role": None, "content": "x"}, "messages[0].role"),
        ({"role": "function", "content": "x", "name": "f"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"role": "USER", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": {}}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": []}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "https://a/b"}]}, "messages[0].content[0].image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].image_url.url"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b", "detail": "original"}}]},
            "messages[0].content[0].image_url.detail",
        ),
        ({"role": "user", "content": "x", "tool_calls": []}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
        (
            {"role": "system", "content": [{"type": "image_url", "image_url": {"url": "https://a/b"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "messages[0].function_call"),
        ({"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]}, "messages[0].annotations"),
        ({"role": "assistant", "content": "x", "annotations": 0}, "messages[0].annotations"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
        ({"role": "assistant", "content": 5}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "messages[0].tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}, "messages[0].tool_calls[0].function.name"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "tool", "tool_call_id": "1"}, "messages[0].content"),
        ({"role": "tool", "tool_call_id": "1", "content": 5}, "messages[0].content"),
        ({"role": "tool", "tool_call_id": "1", "content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
    ],
)
def test_messages_that_are_none(item: Any, field: str) -> None:
    failure = refusal(lambda: chat(messages=[item]))
    assert isinstance(failure, RequestInvalid | FieldUnsupported)
    assert failure.metadata == {"field": field}


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        ("f", "tools[0]"),
        ({}, "tools[0].type"),
        ({"type": "custom", "custom": {"name": "x"}}, "tools[0].type"),
        ({"type": "function"}, "tools[0].function"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": 1}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "f", "parameters": "{}"}}, "tools[0].function.parameters"),
        ({"type": "function", "function": {"name": "f", "strict": "yes"}}, "tools[0].function.strict"),
        ({"type": "function", "function": {"name": "f", "description": 1}}, "tools[0].function.description"),
    ],
)
def test_tools_that_are_none(tool: Any, field: str) -> None:
    assert refusal(lambda: chat(tools=[tool])).metadata == {"field": field}


# rubbish

_RUBBISH: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1.5, 10**18, 2**64, 1e300, "", "x", "\0", "é" * 300, [], {}, [None], [[]], [{}], {"a": None}, {"": {}},
    {"type": "function"}, {"type": None}, {"role": "user"},
)  # fmt: skip


def spoiled(body: Any) -> Iterator[Any]:
    """`body` with one place after the other left out, replaced or moved."""

    def places(value: Any) -> Iterator[tuple[Any, Any]]:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield value, key
            yield from places(value[key])

    for position in range(len(list(places(body)))):
        for rubbish in _RUBBISH:
            changed = copy.deepcopy(body)
            container, key = list(places(changed))[position]
            container[key] = rubbish
            yield changed
        changed = copy.deepcopy(body)
        container, key = list(places(changed))[position]
        del container[key]
        yield changed


def check_only_failures(
    bodies: Iterable[bytes], read: Callable[[bytes], Any], check: Callable[[Any], object]
) -> tuple[int, int]:
    """How many bodies were taken and refused. What is taken can travel, and breaks no later step either."""
    taken, failures = 0, []
    for body in bodies:
        try:
            call = read(body)
        except Failure as failure:
            failures.append(failure)
            continue
        taken += 1
        call.request.SerializeToString()
        with contextlib.suppress(Failure):
            check(call.request)
    for one in failures:
        assert isinstance(one, RequestInvalid | FieldUnsupported)
        assert one.metadata["field"]
        assert len(one.message) < 400
    return taken, len(failures)


def test_thousands_of_spoiled_bodies_raise_nothing_but_failures() -> None:
    bodies = (orjson.dumps(body) for body in spoiled(FULL) if not _has_large(body))
    taken, refused = check_only_failures(
        bodies, openai.chat_from_json, lambda request: validation.check_generate(request, 10_000_000)
    )
    assert taken > 100
    assert refused > 1500


def _has_large(body: Any) -> bool:
    try:
        orjson.dumps(body)
    except TypeError:
        return True
    return False


def test_spoiled_embeddings_raise_nothing_but_failures() -> None:
    body = {"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8, "user": "u"}
    bodies = (orjson.dumps(body) for body in spoiled(body) if not _has_large(body))
    taken, refused = check_only_failures(
        bodies, openai.embed_from_json, lambda request: validation.check_embed(request, 10_000_000)
    )
    assert taken > 10
    assert refused > 80


def test_bodies_cut_short_raise_nothing_but_failures() -> None:
    whole = orjson.dumps(FULL)
    taken, refused = check_only_failures(
        (whole[:length] for length in range(len(whole))), openai.chat_from_json, lambda request: None
    )
    assert (taken, refused) == (0, len(whole))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*FULL, "role", "content", "type", "text", "function", "name", "id"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@unhurried
@given(body=st.dictionaries(st.sampled_from(list(FULL)), json_values, max_size=6))
def test_any_body_raises_nothing_but_failures(body: dict[str, Any]) -> None:
    check_only_failures(
        [orjson.dumps({**LEAST, **body})], openai.chat_from_json, lambda request: validation.check_generate(request, 1_000_000)
    )


# embeddings


def embed(**changes: Any) -> openai.EmbedCall:
    return openai.embed_from_json(orjson.dumps({"model": "m", "input": "text", **changes}))


def test_embedding_requests() -> None:
    call = embed(input=["a", "b"], encoding_format="base64", dimensions=8, user="u")
    assert call.is_base64
    assert call.request == inference_service_pb2.EmbedRequest(model="m", inputs=["a", "b"], dimension_count=8, end_user="u")
    call = embed(encoding_format=None, dimensions=None, user=None)
    assert not call.is_base64
    assert call.request == inference_service_pb2.EmbedRequest(model="m", inputs=["text"])
    assert not embed(encoding_format="float").is_base64


@pytest.mark.parametrize(
    ("changes", "field", "kind"),
    [
        ({"model": None}, "model", RequestInvalid),
        ({"input": None}, "input", RequestInvalid),
        ({"input": 5}, "input", RequestInvalid),
        ({"input": {}}, "input", RequestInvalid),
        ({"input": ["a", None]}, "input[1]", RequestInvalid),
        ({"input": [True]}, "input[0]", RequestInvalid),
        ({"input": [1, 2]}, "input", FieldUnsupported),
        ({"input": [[1, 2], [3]]}, "input", FieldUnsupported),
        ({"encoding_format": "int8"}, "encoding_format", RequestInvalid),
        ({"dimensions": 0}, "dimensions", RequestInvalid),
        ({"dimensions": 2**31}, "dimensions", RequestInvalid),
        ({"user": 1}, "user", RequestInvalid),
        ({"input_type": "query"}, "input_type", FieldUnsupported),
        ({"truncate": None}, "truncate", FieldUnsupported),
    ],
)
def test_embedding_requests_that_are_none(changes: dict[str, Any], field: str, kind: type[Failure]) -> None:
    failure = refusal(lambda: embed(**changes))
    assert isinstance(failure, kind)
    assert failure.metadata == {"field": field}


def test_embeddings_as_floats_and_as_base64() -> None:
    vectors = [[0.5, -1.25, 3.0], [0.1, 2.0**-20, -0.0]]
    response = inference_service_pb2.EmbedResponse(
        model="m/e",
        embeddings=[inference_service_pb2.Embedding(values=vector) for vector in vectors],
        usage=answer_pb2.Usage(input_token_count=7),
    )
    floats = sdk.CreateEmbeddingResponse.model_validate_json(openai.embed_to_json(response, is_base64=False))
    assert floats.model == "m/e"
    assert (floats.usage.prompt_tokens, floats.usage.total_tokens) == (7, 7)
    assert [row.index for row in floats.data] == [0, 1]
    encoded = orjson.loads(openai.embed_to_json(response, is_base64=True))
    for vector, row, packed in zip(vectors, floats.data, encoded["data"], strict=True):
        exact = list(struct.unpack("<3f", struct.pack("<3f", *vector)))
        assert row.embedding == exact
        assert list(struct.unpack("<3f", base64.b64decode(packed["embedding"]))) == exact
    assert {key: value for key, value in encoded.items() if key != "data"} == {
        "object": "list", "model": "m/e", "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }  # fmt: skip


# answers

_USAGE: Final = answer_pb2.Usage(
    input_token_count=11,
    cached_input_token_count=4,
    output_token_count=5,
    reasoning_token_count=2,
    source=answer_pb2.USAGE_SOURCE_REPORTED,
)
_LOGPROBS: Final = '{"content":[{"token":"a","bytes":[97],"logprob":-0.5,"top_logprobs":[]}],"refusal":null}'


def reply(*parts: conversation_pb2.Part, finish: int = answer_pb2.FINISH_REASON_STOP, logprobs: str = "") -> answer_pb2.Answer:
    return answer_pb2.Answer(
        message=Message(role=conversation_pb2.ROLE_ASSISTANT, parts=parts),
        finish_reason=answer_pb2.FinishReason.ValueType(finish),
        usage=_USAGE,
        model="a/one",
        logprobs_json=logprobs,
    )


TOOLS: Final = reply(
    Part(reasoning=conversation_pb2.Reasoning(text="Let me ")),
    Part(text="I ask."),
    Part(tool_call=conversation_pb2.ToolCall(id="c1", name="weather", arguments_json='{"city":"Köln"}')),
    Part(tool_call=conversation_pb2.ToolCall(id="c2", name="clock", arguments_json="{}")),
    finish=answer_pb2.FINISH_REASON_TOOL_CALLS,
)


def completion(answer: answer_pb2.Answer) -> Completion:
    facts = Facts(
        "OP" + "1" * 24, PRINCIPAL, inference_service_pb2.GenerateRequest(), "generate", 1_500_000_000_000_000_000, 10
    )
    return Completion(facts, answer)


def read_back(answer: answer_pb2.Answer, receipt: receipt_pb2.Receipt | None = None) -> ChatCompletion:
    return ChatCompletion.model_validate_json(openai.chat_to_json(completion(answer), receipt))


def test_a_text() -> None:
    got = read_back(reply(Part(text='He said "ä"\n\u2028')))
    assert got.id == "chatcmpl-OP" + "1" * 24
    assert got.object == "chat.completion"
    assert got.created == 1_500_000_000
    assert got.model == "a/one"
    (choice,) = got.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert choice.message.role == "assistant"
    assert choice.message.content == 'He said "ä"\n\u2028'
    assert choice.message.refusal is None
    assert choice.message.tool_calls is None
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (11, 5, 16)
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 4
    assert got.usage.completion_tokens_details is not None
    assert got.usage.completion_tokens_details.reasoning_tokens == 2
    assert got.model_extra == {}


def test_tool_calls_and_reasoning() -> None:
    (choice,) = read_back(TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I ask."
    assert choice.message.model_extra == {"reasoning_content": "Let me "}
    calls = choice.message.tool_calls or []
    assert [(call.type, call.id) for call in calls] == [("function", "c1"), ("function", "c2")]
    assert calls[0].type == "function"
    assert (calls[0].function.name, calls[0].function.arguments) == ("weather", '{"city":"Köln"}')


def test_several_texts_are_one() -> None:
    assert read_back(reply(Part(text="a"), Part(text=""), Part(text="b"))).choices[0].message.content == "ab"


def test_refusals_nothing_and_calls_alone() -> None:
    refused = read_back(reply(Part(refusal="I "), Part(refusal="won't"))).choices[0].message
    assert (refused.content, refused.refusal) == (None, "I won't")
    assert read_back(reply()).choices[0].message.content == ""
    assert read_back(reply(Part(text=""))).choices[0].message.content == ""
    hidden = read_back(reply(Part(reasoning=conversation_pb2.Reasoning(signature="s")), Part(text="a"))).choices[0].message
    assert hidden.model_extra == {}
    call = Part(tool_call=conversation_pb2.ToolCall(id="c", name="f", arguments_json=""))
    assert read_back(reply(call)).choices[0].message.content is None


@pytest.mark.parametrize("finish", [number for number in answer_pb2.FinishReason.values() if number])
def test_finish_reasons_are_words_that_the_sdk_knows(finish: int) -> None:
    word = read_back(reply(Part(text="a"), finish=finish)).choices[0].finish_reason
    known = get_args(sdk.CompletionChoice.model_fields["finish_reason"].annotation)
    assert word in {*known, "tool_calls", "function_call"}
    name = answer_pb2.FinishReason.Name(answer_pb2.FinishReason.ValueType(finish)).removeprefix("FINISH_REASON_").lower()
    assert word == (name if name in ("stop", "length", "tool_calls", "content_filter") else "length")


def test_logprobs() -> None:
    logprobs = read_back(reply(Part(text="a"), logprobs=_LOGPROBS)).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert (logprobs.content[0].token, logprobs.content[0].logprob) == ("a", -0.5)


def test_a_receipt_stands_beside_the_answer() -> None:
    receipt = receipt_pb2.Receipt(operation_id="OP", cost_nano_usd=2**60)
    extra = read_back(reply(Part(text="a")), receipt).model_extra
    assert extra == {"sluice": {"operation_id": "OP", "cost_nano_usd": str(2**60)}}


def test_models() -> None:
    models = [
        inference_service_pb2.Model(id="a/one", provider="a"),
        inference_service_pb2.Model(id="policy/best", provider="sluice"),
    ]
    listed = orjson.loads(openai.models_to_json(models))
    assert listed["object"] == "list"
    got = [sdk.Model.model_validate(row) for row in listed["data"]]
    assert [(model.id, model.owned_by, model.object) for model in got] == [
        ("a/one", "a", "model"),
        ("policy/best", "sluice", "model"),
    ]
    assert orjson.loads(openai.models_to_json([])) == {"object": "list", "data": []}


# streams


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a finished stream, which must be framed as the standard says and end with the mark."""
    assert data.endswith(openai.DONE)
    blocks = data.split(b"\n\n")[:-2]
    assert all(block.startswith(b"data: ") and b"\n" not in block for block in blocks)
    return [orjson.loads(block[6:]) for block in blocks]


def opened(*, is_wire: bool = False) -> Opened:
    return Opened("OP" + "1" * 24, "", "a/one", 1_500_000_000, is_wire)


def batch(*deltas: answer_pb2.Delta) -> execution_service_pb2.DeltaBatch:
    return execution_service_pb2.DeltaBatch(deltas=deltas)


def call_piece(index: int, id_: str = "", name: str = "", arguments: str = "") -> answer_pb2.Delta:
    return answer_pb2.Delta(tool_call=answer_pb2.ToolCallDelta(index=index, id=id_, name=name, arguments_json=arguments))


def streamed(
    *batches: execution_service_pb2.DeltaBatch,
    answer: answer_pb2.Answer,
    include_usage: bool = False,
    receipt: receipt_pb2.Receipt | None = None,
) -> list[ChatCompletionChunk]:
    stream = openai.ChatStream(opened(), include_usage=include_usage)
    data = stream.begin() + b"".join(stream.pieces(pieces) for pieces in batches) + stream.end(completion(answer), receipt)
    return [ChatCompletionChunk.model_validate(event) for event in events(data)]


def gathered(chunks: list[ChatCompletionChunk]) -> ChatCompletion:
    """What the SDK makes of the chunks."""
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(chunk)
    return state.get_final_completion()


def test_a_stream_of_text_is_the_whole_answer() -> None:
    texts = ["Hel", "", 'lo "ä"', "\n\ndata: [DONE]\n\n", "\u2028", "\0"]
    answer = reply(Part(text="".join(texts)))
    chunks = streamed(*(batch(answer_pb2.Delta(text=text)) for text in texts), answer=answer, include_usage=True)
    assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks} == {
        ("chatcmpl-OP" + "1" * 24, 1_500_000_000, "a/one", "chat.completion.chunk")
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(texts) + 1) + ["stop"]
    assert chunks[-1].choices == []
    whole = read_back(answer)
    final = gathered(chunks)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    assert final.usage == whole.usage == chunks[-1].usage


def test_usage_comes_only_when_asked_for() -> None:
    chunks = streamed(batch(answer_pb2.Delta(text="a")), answer=reply(Part(text="a")))
    assert len(chunks) == 3
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_neighbouring_texts_are_one_chunk_and_the_order_stays() -> None:
    chunks = streamed(
        batch(
            answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(text="hm")),
            answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(signature="s")),
            answer_pb2.Delta(text="a"),
            answer_pb2.Delta(text="b"),
            answer_pb2.Delta(refusal="no"),
            answer_pb2.Delta(text="c"),
        ),
        answer=reply(Part(text="abc")),
    )
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks[1:-1]]
    assert deltas == [{"reasoning_content": "hm"}, {"content": "ab"}, {"refusal": "no"}, {"content": "c"}]


@pytest.mark.parametrize("is_split", [True, False])
def test_a_stream_of_tool_calls_is_the_whole_answer(is_split: bool) -> None:
    deltas = [
        answer_pb2.Delta(text="I ask."),
        call_piece(0, "c1", "weather"),
        call_piece(0, arguments='{"city":'),
        call_piece(0, arguments='"Köln"}'),
        call_piece(1, "c2", "clock", "{}"),
    ]
    batches = [batch(delta) for delta in deltas] if is_split else [batch(*deltas)]
    chunks = streamed(*batches, answer=TOOLS)
    first = chunks[2].choices[0].delta.tool_calls or []
    assert (first[0].id, first[0].type, first[0].index) == ("c1", "function", 0)
    later = chunks[3].choices[0].delta.tool_calls or []
    assert (later[0].id, later[0].type) == (None, None)
    final, whole = gathered(chunks).choices[0], read_back(TOOLS).choices[0]
    assert final.finish_reason == whole.finish_reason == "tool_calls"
    assert final.message.content == whole.message.content
    got = [
        call.model_dump(include={"id": True, "type": True, "function": {"name", "arguments"}})
        for call in final.message.tool_calls or []
    ]
    assert got == [call.model_dump() for call in whole.message.tool_calls or []]


def test_logprobs_of_a_stream_come_with_its_finish() -> None:
    answer = reply(Part(text="a"), logprobs=_LOGPROBS)
    logprobs = gathered(streamed(batch(answer_pb2.Delta(text="a")), answer=answer)).choices[0].logprobs
    assert logprobs == read_back(answer).choices[0].logprobs
    assert logprobs is not None


def test_the_receipt_of_a_stream_comes_last() -> None:
    receipt = receipt_pb2.Receipt(operation_id="OP")
    for include_usage in (True, False):
        chunks = streamed(answer=reply(Part(text="a")), receipt=receipt, include_usage=include_usage)
        assert chunks[-1].choices == []
        assert chunks[-1].model_extra == {"sluice": {"operation_id": "OP"}}
        assert (chunks[-1].usage is not None) == include_usage
        gathered(chunks)


def test_an_empty_batch_is_nothing() -> None:
    stream = openai.ChatStream(opened(), include_usage=False)
    assert stream.pieces(batch()) == b""
    assert stream.pieces(batch(answer_pb2.Delta())) == b""


def test_a_provider_s_own_bytes_get_an_end_only() -> None:
    stream = openai.ChatStream(opened(is_wire=True), include_usage=False)
    assert stream.begin() == b""
    assert stream.end(completion(reply(Part(text="a")))) == openai.DONE
    stream = openai.ChatStream(opened(is_wire=True), include_usage=True)
    (usage,) = events(stream.end(completion(reply(Part(text="a")))))
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 16


def test_a_provider_s_stream_that_we_cut_gets_a_finish() -> None:
    stream = openai.ChatStream(opened(is_wire=True), include_usage=False)
    (cut,) = events(stream.end(completion(reply(Part(text="a"), finish=answer_pb2.FINISH_REASON_BUDGET))))
    assert cut["choices"][0]["finish_reason"] == "length"


@unhurried
@given(texts=st.lists(st.text(), max_size=6))
def test_any_text_survives_the_stream(texts: list[str]) -> None:
    stream = openai.ChatStream(opened(), include_usage=False)
    data = stream.begin() + stream.pieces(batch(*(answer_pb2.Delta(text=text) for text in texts)))
    data += stream.end(completion(reply()))
    got = [choice["delta"].get("content") or "" for event in events(data) for choice in event["choices"]]
    assert "".join(got) == "".join(texts)
