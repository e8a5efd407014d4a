"""Anthropic's Messages API: what its SDK sends is read, what we send is read by its SDK, and nothing gets lost on the way."""

from __future__ import annotations

import base64
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import anthropic
import httpx2
import orjson
import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from services.execution.adapters.anthropic import Gathered, answer_of, request_of
from services.execution.adapters.sse import data_of, events
from services.gateway import validation
from services.gateway.core import Completion
from services.gateway.edge import anthropic as edge
from services.gateway.edge.openai import ChatCall
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from services.gateway.events import Opened
from services.gateway.executions import deltas_of
from services.gateway.receipts import Facts
from services.runtime.errors import Failure, Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2
from tests.unit.execution.adapters.recorded import ANTHROPIC_WHOLE, RECORDED, TEXT, THOUGHT
from tests.unit.execution.examples import heard, prompt
from tests.unit.execution.upstream import chunked, pool_to, upstream
from tests.unit.gateway.fakes import PRINCIPAL

WIRE: Final = execution_service_pb2.WIRE_FORMAT_ANTHROPIC_MESSAGES
PICTURE: Final = b"\x89PNG\r\n\x1a\n and so on"
ENCODED: Final = base64.b64encode(PICTURE).decode()
SCHEMA: Final[dict[str, Any]] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LEAST: Final[dict[str, Any]] = {"model": "auto", "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}
CACHED: Final = {"type": "ephemeral", "ttl": "1h"}
FULL: Final[dict[str, Any]] = {
    "model": "anthropic/claude-sonnet",
    "max_tokens": 30_000,
    "messages": [
        {"role": "user", "content": "hello"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look", "cache_control": CACHED},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                {"type": "text", "text": "I ask."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "c2", "name": "clock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c1",
                    "content": [{"type": "text", "text": "21 "}, {"type": "text", "text": "°C"}],
                },
                {"type": "tool_result", "tool_use_id": "c2", "content": "broken", "is_error": True},
                {"type": "text", "text": "go on"},
            ],
        },
        {"role": "assistant", "content": "It is"},
    ],
    "system": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief.", "cache_control": {"type": "ephemeral"}}],
    "tools": [
        {"name": "weather", "description": "The weather.", "input_schema": SCHEMA, "type": "custom", "strict": True},
        {"name": "clock", "input_schema": {"type": "object"}, "cache_control": CACHED},
    ],
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "stop_sequences": ["END", "STOP"],
    "stream": True,
    "metadata": {"user_id": "u1"},
    "service_tier": "auto",
    "thinking": {"type": "enabled", "budget_tokens": 8192, "display": "summarized"},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "cache_control": {"type": "ephemeral"},
    "speed": "standard",
}
COUNTABLE: Final = (
    "model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control", "speed",
)  # fmt: skip
EVENT: Final[TypeAdapter[Any]] = TypeAdapter(RawMessageStreamEvent)
FREE: Final = ("schema", "input_schema", "input")
"""Keys below which any key is the application's own."""


def read(**fields: Any) -> ChatCall:
    """The call of the smallest body with these fields."""
    return edge.message_from_json(orjson.dumps({**LEAST, **fields}))


def refusal(read_body: Callable[[bytes], ChatCall], body: Any) -> Failure:
    """How a body is refused."""
    with pytest.raises(Failure) as caught:
        read_body(orjson.dumps(body))
    return caught.value


def turns(call: ChatCall) -> list[conversation_pb2.Message]:
    """The turns of a call."""
    return list(call.request.conversation.messages)


def completion(answer: answer_pb2.Answer) -> Completion:
    """A finished answer."""
    request = inference_service_pb2.GenerateRequest()
    return Completion(Facts("01OPERATION", PRINCIPAL, request, "generate", 1_760_000_000 * 10**9, 0), answer)


def answer(*parts: conversation_pb2.Part, **fields: Any) -> answer_pb2.Answer:
    """An answer of these parts."""
    turn = conversation_pb2.Message(role=conversation_pb2.ROLE_ASSISTANT, parts=parts)
    values: dict[str, Any] = {
        "model": "a/one",
        "finish_reason": answer_pb2.FINISH_REASON_STOP,
        "usage": answer_pb2.Usage(input_token_count=7, output_token_count=3, source=answer_pb2.USAGE_SOURCE_REPORTED),
        **fields,
    }
    return answer_pb2.Answer(message=turn, **values)


def part(**fields: Any) -> conversation_pb2.Part:
    """A part."""
    return conversation_pb2.Part(**fields)


def call_part(arguments: str, name: str = "weather", call: str = "c1") -> conversation_pb2.Part:
    """A part that is a tool call."""
    return part(tool_call=conversation_pb2.ToolCall(id=call, name=name, arguments_json=arguments))


def opened(*, is_wire: bool = False) -> Opened:
    """A stream that was opened."""
    return Opened("01OPERATION", "", "a/one", 1_760_000_000, is_wire)


def batch(*deltas: answer_pb2.Delta) -> execution_service_pb2.DeltaBatch:
    """Pieces that came together."""
    return execution_service_pb2.DeltaBatch(deltas=deltas)


def text(value: str) -> answer_pb2.Delta:
    """A piece of text."""
    return answer_pb2.Delta(text=value)


def piece(index: int, arguments: str = "", call: str = "", name: str = "") -> answer_pb2.Delta:
    """A piece of a tool call."""
    return answer_pb2.Delta(tool_call=answer_pb2.ToolCallDelta(index=index, id=call, name=name, arguments_json=arguments))


def streamed(batches: Sequence[execution_service_pb2.DeltaBatch], whole: answer_pb2.Answer) -> bytes:
    """A whole stream."""
    stream = edge.MessageStream(opened())
    return b"".join([stream.begin(), *(stream.pieces(one) for one in batches), stream.end(completion(whole))])


def documents(stream: bytes) -> list[Any]:
    """The events of a stream, each with the name that it has as a server-sent event."""
    found = []
    for event in events(stream):
        document = orjson.loads(data_of(event))
        assert event.startswith(b"event: %b\n" % document["type"].encode())
        found.append(document)
    return found


def check_order(found: Sequence[Any]) -> None:
    """What every client may rely on: indexes count up, deltas go into open blocks of their kind, every block is closed once."""
    kinds = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "thinking", "input_json_delta": "tool_use"}
    begun = 0
    blocks: dict[int, str] = {}
    for event in found:
        if event["type"] == "ping":
            continue
        assert EVENT.validate_python(event).type == event["type"]
        if event["type"] == "content_block_start":
            assert event["index"] == begun
            blocks[begun] = event["content_block"]["type"]
            begun += 1
        elif event["type"] == "content_block_delta":
            assert blocks[event["index"]] == kinds[event["delta"]["type"]]
        elif event["type"] == "content_block_stop":
            del blocks[event["index"]]
        elif event["type"] == "message_delta":
            assert not blocks
    assert not blocks
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]


def gathered(found: Sequence[Any]) -> answer_pb2.Answer:
    """The answer that our own client of this format makes of a stream."""
    pieces = Gathered("a/one", formatted=False)
    for event in found:
        pieces.take(event)
    assert pieces.ended
    return pieces.answer()


class Served:
    """A client of the real SDK, answered without a network."""

    def __init__(self, respond: Callable[[httpx2.Request], bytes]) -> None:
        self.asked: list[httpx2.Request] = []
        self._respond = respond
        transport = httpx2.MockTransport(self._handle)
        self.client = anthropic.Anthropic(
            api_key="k", base_url="http://sluice.test", max_retries=0, http_client=httpx2.Client(transport=transport)
        )

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        body = self._respond(request)
        kind = "text/event-stream" if body.startswith(b"event:") else "application/json"
        return httpx2.Response(200, content=body, headers={"content-type": kind})


def accumulated(stream: bytes) -> Message:
    """What the SDK makes of a stream."""
    served = Served(lambda request: stream)
    with served.client.messages.stream(model="auto", max_tokens=8, messages=[{"role": "user", "content": "hello"}]) as events:
        return events.get_final_message()


# Requests


def test_the_smallest_request() -> None:
    call = read()
    assert not call.stream
    assert call.request == inference_service_pb2.GenerateRequest(
        routing=inference_service_pb2.RoutingWishes(model="auto"),
        conversation=conversation_pb2.Conversation(
            messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[part(text="hello")])],
            max_output_tokens=8,
        ),
    )


def test_every_field_is_carried_over() -> None:
    call = edge.message_from_json(orjson.dumps(FULL))
    request, talk = call.request, call.request.conversation
    assert call.stream
    assert request.routing.model == "anthropic/claude-sonnet"
    assert request.end_user == "u1"
    assert talk.max_output_tokens == 30_000
    assert talk.sampling == conversation_pb2.Sampling(temperature=0.5, top_p=0.9, top_k=40)
    assert list(talk.stop_sequences) == ["END", "STOP"]
    assert talk.reasoning_effort == conversation_pb2.REASONING_EFFORT_MEDIUM
    assert talk.tool_choice == conversation_pb2.ToolChoice(mode=conversation_pb2.TOOL_CHOICE_MODE_NAMED, name="weather")
    assert talk.HasField("parallel_tool_calls")
    assert not talk.parallel_tool_calls
    assert orjson.loads(talk.response_format.json_schema) == SCHEMA
    assert talk.response_format.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA
    assert talk.response_format.strict
    assert [(tool.name, tool.description, orjson.loads(tool.parameters_json_schema), tool.strict) for tool in talk.tools] == [
        ("weather", "The weather.", SCHEMA, True),
        ("clock", "", {"type": "object"}, False),
    ]
    assert not talk.tools[1].HasField("strict")
    Turn, role = conversation_pb2.Message, conversation_pb2.Role
    assert turns(call) == [
        Turn(role=role.ROLE_SYSTEM, parts=[part(text="Be"), part(text=" brief.")]),
        Turn(role=role.ROLE_USER, parts=[part(text="hello")]),
        Turn(
            role=role.ROLE_USER,
            parts=[
                part(text="look"),
                part(image=conversation_pb2.Image(data=PICTURE, media_type="image/png")),
                part(image=conversation_pb2.Image(url="https://example.com/a.png")),
            ],
        ),
        Turn(
            role=role.ROLE_ASSISTANT,
            parts=[
                part(reasoning=conversation_pb2.Reasoning(text="hm", signature="c2ln")),
                part(text="I ask."),
                call_part('{"city":"Köln"}'),
                call_part("{}", "clock", "c2"),
            ],
        ),
        Turn(
            role=role.ROLE_TOOL,
            parts=[
                part(tool_result=conversation_pb2.ToolResult(tool_call_id="c1", text="21 °C")),
                part(tool_result=conversation_pb2.ToolResult(tool_call_id="c2", text="broken", is_error=True)),
            ],
        ),
        Turn(role=role.ROLE_USER, parts=[part(text="go on")]),
        Turn(role=role.ROLE_ASSISTANT, parts=[part(text="It is")]),
    ]
    # What was read keeps the contract that the core checks next.
    validation.check_generate(request, 1 << 20)


async def test_a_request_that_goes_on_to_anthropic_is_the_one_that_came() -> None:
    # A format becomes a tool on the way, and thinking is left out beside such sampling: each has its own test.
    wanted = {name: value for name, value in FULL.items() if name not in ("output_config", "thinking")}
    call = edge.message_from_json(orjson.dumps(wanted))
    sent = request_of(prompt(call.request.conversation, most=30_000, user="u1"), streaming=True)
    for name in ("max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream", "metadata", "tool_choice"):
        assert sent[name] == wanted[name]
    assert sent["system"] == "Be brief."
    assert [tool["input_schema"] for tool in sent["tools"]] == [tool["input_schema"] for tool in wanted["tools"]]
    came = copy.deepcopy(wanted["messages"])
    del came[1]["content"][0]["cache_control"]
    came[0:2] = [{"role": "user", "content": [{"type": "text", "text": "hello"}, *came[1]["content"]]}]
    came[2]["content"][0]["content"] = "21 °C"
    came[3]["content"] = [{"type": "text", "text": "It is"}]
    assert sent["messages"] == came


@pytest.mark.parametrize("effort", ["MINIMAL", "LOW", "MEDIUM", "HIGH"])
async def test_an_effort_and_its_budget_mean_each_other(effort: str) -> None:
    wanted = conversation_pb2.ReasoningEffort.Value(f"REASONING_EFFORT_{effort}")
    talk = conversation_pb2.Conversation(reasoning_effort=wanted)
    thinking = request_of(prompt(talk, most=100_000), streaming=False)["thinking"]
    assert read(max_tokens=100_000, thinking=thinking).request.conversation.reasoning_effort == wanted


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, "UNSPECIFIED"),
        ({"thinking": {"type": "disabled"}}, "NONE"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2047}}, "MINIMAL"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "LOW"),
        ({"thinking": {"type": "enabled", "budget_tokens": 90_000}}, "HIGH"),
        ({"thinking": {"type": "adaptive"}}, "HIGH"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "LOW"),
        ({"output_config": {"effort": "medium"}, "thinking": {"type": "adaptive"}}, "MEDIUM"),
        ({"output_config": {"effort": "high"}}, "HIGH"),
        ({"output_config": {"effort": None}, "thinking": None}, "UNSPECIFIED"),
    ],
)
def test_thinking_becomes_an_effort(fields: dict[str, Any], effort: str) -> None:
    value = read(max_tokens=100_000, **fields).request.conversation.reasoning_effort
    assert conversation_pb2.ReasoningEffort.Name(value) == f"REASONING_EFFORT_{effort}"


@pytest.mark.parametrize(
    ("choice", "mode", "parallel"),
    [
        ({"type": "auto"}, None, None),
        ({"type": "auto", "disable_parallel_tool_use": False}, None, None),
        ({"type": "auto", "disable_parallel_tool_use": True}, None, False),
        ({"type": "any", "disable_parallel_tool_use": True}, conversation_pb2.TOOL_CHOICE_MODE_REQUIRED, False),
        ({"type": "none"}, conversation_pb2.TOOL_CHOICE_MODE_NONE, None),
    ],
)
def test_tool_choice(choice: dict[str, Any], mode: int | None, parallel: bool | None) -> None:
    talk = read(tools=FULL["tools"], tool_choice=choice).request.conversation
    assert (talk.tool_choice.mode if talk.HasField("tool_choice") else None) == mode
    assert (talk.parallel_tool_calls if talk.HasField("parallel_tool_calls") else None) == parallel


def test_results_and_texts_keep_their_order() -> None:
    result = {"type": "tool_result", "tool_use_id": "c1"}
    said = {"type": "text", "text": "and"}
    call = read(messages=[{"role": "user", "content": [said, result, result, said]}])
    assert [(turn.role, len(turn.parts)) for turn in turns(call)] == [
        (conversation_pb2.ROLE_USER, 1),
        (conversation_pb2.ROLE_TOOL, 2),
        (conversation_pb2.ROLE_USER, 1),
    ]
    assert turns(call)[1].parts[0].tool_result.text == ""


def test_both_spellings_of_the_format() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    older = read(output_format=form)
    assert older.request == read(output_config={"format": form}).request
    assert older.request == read(output_config={"format": form}, output_format=form).request
    other = {"type": "json_schema", "schema": {"type": "object"}}
    refused = refusal(edge.message_from_json, {**LEAST, "output_format": form, "output_config": {"format": other}})
    assert "contradict" in refused.message


@pytest.mark.parametrize("system", ["", []])
def test_no_standing_instructions_are_none(system: Any) -> None:
    assert read(system=system).request == read().request


def test_standing_instructions_may_stand_between_turns() -> None:
    call = read(messages=[*LEAST["messages"], {"role": "system", "content": "Be brief."}])
    assert turns(call)[1] == conversation_pb2.Message(role=conversation_pb2.ROLE_SYSTEM, parts=[part(text="Be brief.")])


def test_null_asks_for_nothing() -> None:
    nothing = dict.fromkeys(
        [
            *(name for name in FULL if name not in LEAST),
            "container",
            "context_management",
            "diagnostics",
            "inference_geo",
            "mcp_servers",
        ]
    )
    assert read(**nothing).request == read().request


@pytest.mark.parametrize(
    ("fields", "field", "kind"),
    [
        ({"max_tokens": None}, "max_tokens", RequestInvalid),
        ({"model": None}, "model", RequestInvalid),
        ({"messages": None}, "messages", RequestInvalid),
        ({"max_tokens": 0}, "max_tokens", RequestInvalid),
        ({"max_tokens": True}, "max_tokens", RequestInvalid),
        ({"temperature": 1.5}, "temperature", RequestInvalid),
        ({"stream": "yes"}, "stream", RequestInvalid),
        ({"n": 1}, "n", FieldUnsupported),
        ({"container": "c"}, "container", FieldUnsupported),
        ({"inference_geo": "us"}, "inference_geo", FieldUnsupported),
        ({"service_tier": "standard_only"}, "service_tier", FieldUnsupported),
        ({"speed": "fast"}, "speed", FieldUnsupported),
        ({"metadata": {"team": "a"}}, "metadata.team", FieldUnsupported),
        ({"cache_control": {"type": "forever"}}, "cache_control.type", RequestInvalid),
        ({"thinking": {"type": "between_tools"}}, "thinking.type", FieldUnsupported),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", RequestInvalid),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking.budget_tokens", RequestInvalid),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 2000},
            "thinking.budget_tokens",
            RequestInvalid,
        ),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display", FieldUnsupported),
        ({"output_config": {"effort": "max"}}, "output_config.effort", FieldUnsupported),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}, "output_config.effort", FieldUnsupported),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type", RequestInvalid),
        (
            {"tool_choice": {"type": "none", "disable_parallel_tool_use": True}},
            "tool_choice.disable_parallel_tool_use",
            FieldUnsupported,
        ),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", RequestInvalid),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", FieldUnsupported),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", RequestInvalid),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "tools[0].defer_loading", FieldUnsupported),
        ({"tools": [{"name": "f", "input_schema": {}, "input_examples": [{}]}]}, "tools[0].input_examples", FieldUnsupported),
        (
            {"tools": [{"name": "f", "input_schema": {}, "eager_input_streaming": True}]},
            "tools[0].eager_input_streaming",
            FieldUnsupported,
        ),
        ({"system": [{"type": "image"}]}, "system[0].type", FieldUnsupported),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", RequestInvalid),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", RequestInvalid),
        ({"messages": [{"role": "user"}]}, "messages[0].content", RequestInvalid),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type", FieldUnsupported),
        ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, "messages[0].content[0].type", FieldUnsupported),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
            "messages[0].content[0].type",
            FieldUnsupported,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}]},
            "messages[0].content[0].source.type",
            FieldUnsupported,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a"}}]}]},
            "messages[0].content[0].source.url",
            RequestInvalid,
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": ENCODED}}
                        ],
                    }
                ]
            },
            "messages[0].content[0].source.media_type",
            RequestInvalid,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}]}
                ]
            },
            "messages[0].content[0].content[0].type",
            FieldUnsupported,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "citations": [{}]}]}]},
            "messages[0].content[0].citations",
            FieldUnsupported,
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], field: str, kind: type[Failure]) -> None:
    refused = refusal(edge.message_from_json, {**LEAST, **fields})
    assert type(refused) is kind
    assert refused.metadata["field"] == field


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the objects whose keys are Anthropic's."""
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            if key not in FREE:
                yield from objects(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from objects(inner, (*path, index))


def at(body: Any, path: Sequence[Any]) -> Any:
    """What stands at a path."""
    for step in path:
        body = body[step]
    return body


@pytest.mark.parametrize("path", list(objects(FULL)), ids=str)
def test_an_unknown_key_is_refused_by_name_wherever_it_stands(path: tuple[Any, ...]) -> None:
    body = copy.deepcopy(FULL)
    at(body, path)["zzz"] = 1
    refused = refusal(edge.message_from_json, body)
    assert refused.reason is Reason.FIELD_UNSUPPORTED
    assert refused.metadata["field"].endswith("zzz")


def test_counting_takes_what_makes_a_prompt_and_nothing_else() -> None:
    body = {name: FULL[name] for name in COUNTABLE}
    call = edge.count_from_json(orjson.dumps(body))
    whole = edge.message_from_json(orjson.dumps(FULL)).request.conversation
    assert list(call.request.conversation.messages) == list(whole.messages)
    assert list(call.request.conversation.tools) == list(whole.tools)
    assert call.request.routing.model == FULL["model"]
    for name in set(FULL) - set(COUNTABLE):
        assert refusal(edge.count_from_json, {**body, name: FULL[name]}).metadata["field"] == name
    assert orjson.loads(edge.count_to_json(receipt_pb2.TokenCount(token_count=42))) == {"input_tokens": 42}


ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**63 - 1, 2**64 - 1, 0.5, -0.0, 1e308, "", "x", "\x00", "🙂" * 300, "data:image/png;base64,", [], [[]],
    [None], [{}], {}, {"type": None}, {"type": []}, {"type": {}}, {"type": "text"}, {"type": "text", "text": 1},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "%%%"}},
    {"type": "tool_use", "id": "", "name": "", "input": []}, {"role": []}, [{"role": {}, "content": "x"}], {"": ""},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def is_read(read_body: Callable[[bytes], ChatCall], data: bytes) -> bool:
    """Whether a body is read; False: it is refused, and the refusal says where."""
    try:
        call = read_body(data)
    except (RequestInvalid, FieldUnsupported) as refused:
        return not refused.metadata["field"]
    call.request.SerializeToString()
    return True


def test_every_field_with_every_odd_value_is_read_or_refused() -> None:
    refused = accepted = 0
    for path in places(FULL):
        for odd in ODD:
            body = copy.deepcopy(FULL)
            at(body, path[:-1])[path[-1]] = odd
            data = orjson.dumps(body)
            for read_body in (edge.message_from_json, edge.count_from_json):
                if is_read(read_body, data):
                    accepted += 1
                else:
                    refused += 1
    assert refused > 2000
    assert accepted > 100


def test_mangled_bytes_are_read_or_refused() -> None:
    chance = random.Random(7)
    data = orjson.dumps(FULL)
    survived = 0
    for _ in range(1500):
        mangled = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            start = chance.randrange(len(mangled))
            match chance.randrange(4):
                case 0:
                    del mangled[start:]
                case 1:
                    mangled[start] = chance.randrange(256)
                case 2:
                    del mangled[start : start + chance.randint(1, 40)]
                case _:
                    end = start + chance.randint(1, 60)
                    mangled[start:start] = mangled[start:end]
            if not mangled:
                break
        survived += is_read(edge.message_from_json, bytes(mangled))
    assert 0 < survived < 1000


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"x"', b"{", b"\xff", b'{"a":' * 5000, b'{"model":"\\ud800"}'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    for read_body in (edge.message_from_json, edge.count_from_json):
        with pytest.raises(RequestInvalid) as caught:
            read_body(body)
        assert caught.value.metadata["field"] == "body"


def test_a_schema_that_is_too_deep_is_refused() -> None:
    deep = b'{"a":' * 400 + b"1" + b"}" * 400
    body = b'{"model":"auto","max_tokens":1,"messages":[],"tools":[{"name":"f","input_schema":' + deep + b"}]}"
    with pytest.raises(RequestInvalid) as caught:
        edge.message_from_json(body)
    assert caught.value.metadata["field"] == "tools[0].input_schema"


# Answers

WHOLE: Final = answer_of(ANTHROPIC_WHOLE, "a/one", formatted=False)


def test_an_answer_of_anthropic_comes_out_as_it_went_in() -> None:
    sent = orjson.loads(edge.message_to_json(completion(WHOLE)))
    assert sent["content"] == ANTHROPIC_WHOLE["content"]
    assert sent["stop_reason"] == "tool_use"
    # Anthropic's own tier is not known of other providers' answers.
    assert {**sent["usage"], "service_tier": "standard"} == ANTHROPIC_WHOLE["usage"]
    message = Message.model_validate(sent)
    assert (message.id, message.model, message.role, message.type) == ("msg_01OPERATION", "a/one", "assistant", "message")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens, message.usage.cache_creation_input_tokens) == (
        14,
        16,
        10,
    )


def test_an_answer_that_the_sdk_got_may_be_sent_back() -> None:
    for body in (edge.message_to_json(completion(WHOLE)), streamed([deltas_of(WHOLE)], WHOLE)):
        served = Served(lambda request, body=body: body)  # type: ignore[misc]
        messages = served.client.messages
        asked: list[Any] = [{"role": "user", "content": "hello"}]
        if body.startswith(b"event:"):
            with messages.stream(model="auto", max_tokens=8, messages=asked) as events:
                got: Any = events.get_final_message()
        else:
            got = messages.create(model="auto", max_tokens=8, messages=asked)
        asked.append(got.to_param())
        asked.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_a", "content": "21"}]})
        messages.create(model="auto", max_tokens=8, messages=asked)
        back = turns(edge.message_from_json(served.asked[-1].content))
        assert list(back[1].parts) == list(WHOLE.message.parts)
        assert back[2].parts[0].tool_result.text == "21"


def test_what_the_sdk_calls_its_own_is_read() -> None:
    served = Served(lambda request: edge.message_to_json(completion(answer(part(text='{"city":"Rome"}')))))
    parsed = served.client.messages.parse(
        model="auto", max_tokens=8, messages=[{"role": "user", "content": "hello"}], output_format=dict[str, str]
    )
    assert parsed.parsed_output == {"city": "Rome"}
    asked = edge.message_from_json(served.asked[0].content).request.conversation
    assert asked.response_format.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA


@pytest.mark.parametrize(
    ("finish", "stop", "expected"),
    [
        ("STOP", "", "end_turn"),
        ("STOP", "END", "stop_sequence"),
        ("LENGTH", "", "max_tokens"),
        ("TOOL_CALLS", "", "tool_use"),
        ("CONTENT_FILTER", "", "refusal"),
        ("BUDGET", "", "max_tokens"),
        ("ERROR", "", "max_tokens"),
        ("CANCELLED", "", "max_tokens"),
    ],
)
def test_stop_reasons(finish: str, stop: str, expected: str) -> None:
    whole = answer(part(text="a"), finish_reason=answer_pb2.FinishReason.Value(f"FINISH_REASON_{finish}"), stop_sequence=stop)
    for message in (
        Message.model_validate_json(edge.message_to_json(completion(whole))),
        accumulated(streamed([deltas_of(whole)], whole)),
    ):
        assert message.stop_reason == expected
        assert message.stop_sequence == (stop or None)


def test_a_refusal_is_a_text_and_a_stop_reason() -> None:
    whole = answer(part(text="Well, "), part(refusal="I can't help with that."))
    for message in (
        Message.model_validate_json(edge.message_to_json(completion(whole))),
        accumulated(streamed([deltas_of(whole)], whole)),
    ):
        assert [block.text for block in message.content if block.type == "text"] == ["Well, ", "I can't help with that."]
        assert message.stop_reason == "refusal"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", b'"input":{}'),
        (" ", b'"input":{}'),
        ('{"n":123456789012345678901234567890}', b'"input":{"n":123456789012345678901234567890}'),
        ('{"city": "Ro', b'"input":{"INVALID_JSON":"{\\"city\\": \\"Ro"}'),
        ("[1]", b'"input":{"INVALID_JSON":"[1]"}'),
    ],
)
def test_arguments_as_the_model_wrote_them(arguments: str, expected: bytes) -> None:
    body = edge.message_to_json(completion(answer(call_part(arguments))))
    assert expected in body
    assert Message.model_validate_json(body).content[0].type == "tool_use"


def test_empty_parts_make_no_blocks() -> None:
    whole = answer(
        part(text=""),
        part(reasoning=conversation_pb2.Reasoning()),
        part(refusal=""),
        finish_reason=answer_pb2.FINISH_REASON_LENGTH,
    )
    assert orjson.loads(edge.message_to_json(completion(whole)))["content"] == []
    assert accumulated(streamed([deltas_of(whole)], whole)).content == []


def test_usage_adds_up() -> None:
    usage = answer_pb2.Usage(
        input_token_count=40,
        cached_input_token_count=16,
        cache_write_token_count=10,
        output_token_count=30,
        reasoning_token_count=12,
    )
    whole = answer(part(text="a"), usage=usage)
    for message in (
        Message.model_validate_json(edge.message_to_json(completion(whole))),
        accumulated(streamed([deltas_of(whole)], whole)),
    ):
        got = message.usage
        assert (got.input_tokens, got.cache_read_input_tokens, got.cache_creation_input_tokens, got.output_tokens) == (
            14,
            16,
            10,
            30,
        )
        assert got.output_tokens_details is not None
        assert got.output_tokens_details.thinking_tokens == 12


def test_a_wished_receipt_stands_beside_the_answer() -> None:
    whole = answer(part(text="a"))
    receipt = receipt_pb2.Receipt(operation_id="01OPERATION", cost_nano_usd=5)
    expected = {"operation_id": "01OPERATION", "cost_nano_usd": "5"}
    assert orjson.loads(edge.message_to_json(completion(whole), receipt))["sluice"] == expected
    for is_wire in (False, True):
        stream = edge.MessageStream(opened(is_wire=is_wire))
        ended = documents(stream.end(completion(whole), receipt))
        assert ended[-2]["sluice"] == expected
        assert ended[-2]["type"] == "message_delta"


# Streams


def test_the_bytes_of_a_stream() -> None:
    whole = answer(part(text="Hi there"))
    stream = edge.MessageStream(opened())
    begun = stream.begin()
    assert [event["type"] for event in documents(begun)] == ["message_start", "ping"]
    assert stream.pieces(batch(text("Hi"))) == (
        b"event: content_block_start\n"
        b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}\n\n'
    )
    assert stream.pieces(batch(text(' "th'))) == (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" \\"th"}}\n\n'
    )
    assert stream.pieces(batch(text("e"), text("re"))) == (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"ere"}}\n\n'
    )
    assert stream.end(completion(whole)) == (
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        b'"usage":{"input_tokens":7,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":3}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


def chopped(whole: answer_pb2.Answer, chance: random.Random, *, interleaved: bool) -> list[execution_service_pb2.DeltaBatch]:
    """An answer in pieces as providers send them; calls in a row may come at once."""
    runs: list[list[list[answer_pb2.Delta]]] = []
    calls = 0
    for one in whole.message.parts:
        kind = one.WhichOneof("kind")
        value = {"text": one.text, "reasoning": one.reasoning.text, "tool_call": one.tool_call.arguments_json}[kind or ""]
        cuts = sorted(chance.randrange(len(value) + 1) for _ in range(chance.randint(0, 4)))
        bits = [value[start:end] for start, end in zip([0, *cuts], [*cuts, len(value)], strict=True)]
        if kind == "text":
            runs.append([[text(bit)] for bit in bits])
        elif kind == "reasoning":
            thought = [[answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(text=bit))] for bit in bits]
            thought[-1][0].reasoning.signature = one.reasoning.signature
            runs.append(thought)
        else:
            said = [[piece(calls, bit)] for bit in bits]
            said[0][0].tool_call.id, said[0][0].tool_call.name = one.tool_call.id, one.tool_call.name
            if interleaved and calls and runs and runs[-1] and runs[-1][0][0].HasField("tool_call"):
                # Any order of the pieces of both that keeps the order of each, and in which the older call begins first.
                older, rest = runs[-1], said
                mixed = [older.pop(0)]
                while older or rest:
                    source = older if older and (not rest or chance.random() < 0.5) else rest
                    mixed.append(source.pop(0))
                runs[-1] = mixed
                # Only pairs are mixed: the next call must begin after both have.
                runs.append([])
            else:
                runs.append(said)
            calls += 1
    flat = [delta for run in runs for deltas in run for delta in deltas]
    batches = []
    while flat:
        size = chance.randint(1, 4)
        batches.append(batch(*flat[:size]))
        del flat[:size]
    return batches


def invented(chance: random.Random) -> answer_pb2.Answer:
    """An answer whose neighbouring parts are told apart by any stream."""
    parts: list[conversation_pb2.Part] = []
    words = ["Grüße 🙂 ", '"quoted"\n', "a\x00b\u2028", "plain "]
    for _ in range(chance.randint(0, 6)):
        said = "".join(chance.choices(words, k=chance.randint(1, 5)))
        last = parts[-1].WhichOneof("kind") if parts else None
        kind = chance.choice(
            [name for name in ("text", "reasoning", "tool_call", "tool_call") if name != last or last == "tool_call"]
        )
        if kind == "text":
            parts.append(part(text=said))
        elif kind == "reasoning":
            parts.append(part(reasoning=conversation_pb2.Reasoning(text=said, signature=chance.choice(["", "c2ln"]))))
        else:
            arguments = orjson.dumps({"q": said, "deep": {"}": [said]}}).decode()
            parts.append(call_part(arguments, "f", f"c{len(parts)}"))
    return answer(*parts, finish_reason=answer_pb2.FINISH_REASON_STOP)


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_stream_is_the_answer_and_keeps_the_order_of_events(interleaved: bool) -> None:
    chance = random.Random(11)
    overlapped = 0
    for _ in range(300):
        whole = invented(chance)
        found = documents(streamed(chopped(whole, chance, interleaved=interleaved), whole))
        check_order(found)
        assert list(gathered(found).message.parts) == list(whole.message.parts)
        names = [event["type"].removeprefix("content_block_") for event in found if "index" in event and "delta" not in event]
        overlapped += names != ["start", "stop"] * (len(names) // 2)
    if interleaved:
        assert overlapped > 20
    else:
        assert overlapped == 0, "blocks stand one after the other unless the provider itself mixes them"


def test_the_sdk_puts_calls_together_that_came_at_once() -> None:
    whole = answer(call_part('{"a":1}'), call_part('{"b":2}', "clock", "c2"), finish_reason=answer_pb2.FINISH_REASON_TOOL_CALLS)
    message = accumulated(
        streamed(
            [
                batch(piece(0, "", "c1", "weather"), piece(1, "", "c2", "clock")),
                batch(piece(1, '{"b"'), piece(0, '{"a":1}'), piece(1, ":2}")),
            ],
            whole,
        )
    )
    assert [(block.id, block.name, block.input) for block in message.content if block.type == "tool_use"] == [
        ("c1", "weather", {"a": 1}),
        ("c2", "clock", {"b": 2}),
    ]


def test_more_for_a_call_that_was_closed_is_a_fault_of_the_provider() -> None:
    stream = edge.MessageStream(opened())
    stream.pieces(batch(piece(0, "{}", "c1", "weather"), text("so")))
    assert stream.pieces(batch(piece(0, " \n"))) == b""
    with pytest.raises(Failure) as caught:
        stream.pieces(batch(piece(0, ',"a":1}')))
    assert caught.value.reason is Reason.PROVIDER_MALFORMED


def test_a_call_that_was_cut_off_is_closed_at_the_end() -> None:
    whole = answer(finish_reason=answer_pb2.FINISH_REASON_LENGTH)
    found = documents(streamed([batch(piece(0, '{"city":"Ro', "c1", "weather"))], whole))
    check_order(found)
    assert accumulated(streamed([batch(piece(0, '{"city":"Ro', "c1", "weather"))], whole)).stop_reason == "max_tokens"


def test_signed_thinking_ends_its_block() -> None:
    def thought(said: str, signature: str = "") -> answer_pb2.Delta:
        return answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(text=said, signature=signature))

    message = accumulated(streamed([batch(thought("a"), thought("b", "s1"), thought("", "s2"), thought("c"))], answer()))
    assert [(block.thinking, block.signature) for block in message.content if block.type == "thinking"] == [
        ("ab", "s1"),
        ("", "s2"),
        ("c", ""),
    ]


async def test_a_stream_that_passes_through_is_whole_with_our_end() -> None:
    """The real adapter decides what is withheld: both sides must agree on it."""
    recorded = RECORDED["anthropic"]
    async with upstream(chunked([recorded.stream])) as server, pool_to(server.url) as pool:
        got = await heard(recorded.make(pool).stream(prompt(wire=WIRE)))
    stream = edge.MessageStream(opened(is_wire=True))
    assert stream.begin() == b""
    passed = stream.wire(got.wire)
    ended = stream.wire_end(completion(got.answer))
    assert ended == stream.end(completion(got.answer))
    found = documents(passed + ended)
    check_order(found)
    assert [event["type"] for event in documents(ended)] == ["message_delta", "message_stop"]
    message = accumulated(passed + ended)
    assert message.to_dict()["content"] == ANTHROPIC_WHOLE["content"]
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens, message.usage.output_tokens) == (14, 16, 30)
    texts = [block.text for block in message.content if block.type == "text"]
    thoughts = [block.thinking for block in message.content if block.type == "thinking"]
    assert (texts, thoughts) == ([TEXT], [THOUGHT])


def test_a_stream_that_passes_through_and_is_cut_has_its_open_block_closed() -> None:
    whole = answer(finish_reason=answer_pb2.FINISH_REASON_BUDGET)
    shown = list(events(RECORDED["anthropic"].stream))
    shown = [event for event in shown if b"message_delta" not in event and b"message_stop" not in event]
    assert len(shown) > 10
    for count in range(1, len(shown) + 1):
        for at_once in (1, 3, count):
            stream = edge.MessageStream(opened(is_wire=True))
            wire = b""
            for start in range(0, count, at_once):
                data = b"".join(event + b"\n\n" for event in shown[start : min(count, start + at_once)])
                passed_on = stream.wire(data)
                # The first event gets our names; all others go as they came.
                assert b"message_start" in data or passed_on is data
                wire += data
            ping = b'event: ping\ndata: {"type":"ping"}\n\n'
            found = documents(wire + stream.wire(ping) + stream.end(completion(whole)))
            check_order(found)
            assert found[-2]["delta"]["stop_reason"] == "max_tokens"


# Models


def catalogue(count: int) -> list[inference_service_pb2.Model]:
    """Models in the order of their ids."""
    return [
        inference_service_pb2.Model(
            id=f"p/m{number:03}", provider="p", display_name=f"M {number}", context_window=1000, max_output_tokens=100
        )
        for number in range(count)
    ]


def test_a_model_as_the_sdk_reads_it() -> None:
    model = ModelInfo.model_validate(edge.model_to_json(catalogue(1)[0]))
    assert (model.id, model.display_name, model.type) == ("p/m000", "M 0", "model")
    assert model.created_at.timestamp() == 0
    assert (model.max_input_tokens, model.max_tokens) == (1000, 100)
    policy = ModelInfo.model_validate(edge.model_to_json(inference_service_pb2.Model(id="policy/default", provider="sluice")))
    assert (policy.display_name, policy.max_input_tokens, policy.max_tokens) == ("policy/default", None, None)


@pytest.mark.parametrize("limit", [1, 2, 7, 20, 1000])
@pytest.mark.parametrize("way", ["after_id", "before_id"])
def test_the_sdk_walks_all_pages(limit: int, way: str) -> None:
    models = catalogue(21)
    served = Served(lambda request: edge.models_to_json(models, dict(request.url.params)))
    if way == "after_id":
        assert [model.id for model in served.client.models.list(limit=limit)] == [model.id for model in models]
        assert len(served.asked) == -(-21 // limit)
    else:
        got = {model.id for model in served.client.models.list(limit=limit, before_id="p/m020")}
        assert got == {model.id for model in models[:-1]}
        assert len(served.asked) == -(-20 // limit)


def test_a_page_without_wishes() -> None:
    page = orjson.loads(edge.models_to_json(catalogue(21)))
    assert (len(page["data"]), page["has_more"], page["first_id"], page["last_id"]) == (20, True, "p/m000", "p/m019")
    assert orjson.loads(edge.models_to_json([])) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "٣"}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"after_id": "p/none"}, "after_id"),
        ({"after_id": "p/m000", "before_id": "p/m001"}, "before_id"),
        ({"lifecycle": "retired"}, "lifecycle"),
    ],
)
def test_wishes_for_a_page_that_are_refused(query: dict[str, str], field: str) -> None:
    with pytest.raises(Failure) as caught:
        edge.models_to_json(catalogue(3), query)
    assert caught.value.metadata["field"] == field
