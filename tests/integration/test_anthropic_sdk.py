"""The unmodified `anthropic` SDK against the edge: only its base URL is changed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

from services.cli.demonstration import LOCAL_MODEL, SYSTEM
from tests.running import Running

ECHO = "echo/echo"
# This SDK has no parameter for it any more; the API of older models has.
GREEDY = {"temperature": 0}
WEATHER: ToolParam = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def sdk(mesh: Running) -> Iterator[anthropic.Anthropic]:
    """A client that doesn't retry, so that what Sluice answers is seen."""
    ready = mesh.ready
    with anthropic.Anthropic(base_url=ready.http, api_key=ready.key, max_retries=0, timeout=60) as client:
        yield client


def scripted(**directives: Any) -> list[MessageParam]:
    """A user turn that tells the echo provider what to do. A word of its own keeps it out of the cache."""
    return [{"role": "user", "content": f"{uuid.uuid4().hex} [[echo {json.dumps(directives)}]]"}]


def text_of(message: anthropic.types.Message) -> str:
    """The texts of an answer."""
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_with_the_real_model(sdk: anthropic.Anthropic) -> None:
    message = sdk.messages.create(
        model=LOCAL_MODEL,
        max_tokens=24,
        extra_body=GREEDY,
        system=SYSTEM,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    assert (message.type, message.role, message.model) == ("message", "assistant", LOCAL_MODEL)
    assert "Paris" in text_of(message)
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 10
    assert message.usage.output_tokens > 3
    assert message._request_id


def test_the_token_limit_is_a_stop_reason(sdk: anthropic.Anthropic) -> None:
    message = sdk.messages.create(
        model=LOCAL_MODEL,
        max_tokens=4,
        extra_body=GREEDY,
        system=[{"type": "text", "text": SYSTEM}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}],
    )
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 4


def test_a_stream(sdk: anthropic.Anthropic) -> None:
    pieces = []
    with sdk.messages.stream(
        model=LOCAL_MODEL,
        max_tokens=24,
        extra_body=GREEDY,
        system=SYSTEM,
        messages=[{"role": "user", "content": "Name three colors of the rainbow."}],
    ) as stream:
        pieces += list(stream.text_stream)
        final = stream.get_final_message()
    # What arrives together goes on together: how many pieces there are is told by the fake, which takes its time.
    assert pieces
    assert "".join(pieces) == text_of(final)
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 24


def test_pieces_come_one_by_one(sdk: anthropic.Anthropic) -> None:
    with sdk.messages.stream(model=ECHO, max_tokens=9, messages=scripted(text="one two three four", chunk_delay=0.1)) as stream:
        assert len(list(stream.text_stream)) >= 3


def test_the_events_of_a_stream_come_in_order(sdk: anthropic.Anthropic) -> None:
    kinds = [
        str(event.type) for event in sdk.messages.create(model=ECHO, max_tokens=9, messages=scripted(text="a b c"), stream=True)
    ]
    kinds = [kind for kind in kinds if kind != "ping"]
    assert kinds[0] == "message_start"
    assert kinds[1] == "content_block_start"
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_tools_are_called_and_their_results_taken(sdk: anthropic.Anthropic) -> None:
    messages = scripted(tool_calls=[{"name": "weather", "arguments": {"city": "Oslo"}}])
    called = sdk.messages.create(model=ECHO, max_tokens=50, messages=messages, tools=[WEATHER], tool_choice={"type": "auto"})
    assert called.stop_reason == "tool_use"
    block = called.content[-1]
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("weather", {"city": "Oslo"})
    messages.append(
        {"role": "assistant", "content": [{"type": "tool_use", "id": block.id, "name": "weather", "input": block.input}]}
    )
    messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "rain"}]})
    messages.append({"role": "user", "content": "So, umbrella?"})
    answer = sdk.messages.create(model=ECHO, max_tokens=50, messages=messages, tools=[WEATHER])
    assert text_of(answer) == "echo: So, umbrella?"


def test_streamed_tool_use_can_be_put_together(sdk: anthropic.Anthropic) -> None:
    with sdk.messages.stream(
        model=ECHO,
        max_tokens=50,
        messages=scripted(tool_calls=[{"name": "weather", "arguments": {"city": "Oslo"}}]),
        tools=[WEATHER],
    ) as stream:
        final = stream.get_final_message()
    block = final.content[-1]
    assert block.type == "tool_use"
    assert block.input == {"city": "Oslo"}
    assert final.stop_reason == "tool_use"


def test_pictures_go_to_who_can_see(sdk: anthropic.Anthropic) -> None:
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    messages: list[MessageParam] = [
        {
            "role": "user",
            "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": picture}},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]
    assert text_of(sdk.messages.create(model=ECHO, max_tokens=50, messages=messages)) == "echo: What is this?"
    with pytest.raises(anthropic.BadRequestError):
        sdk.messages.create(model=LOCAL_MODEL, max_tokens=50, messages=messages)


def test_thinking_is_shown(sdk: anthropic.Anthropic) -> None:
    message = sdk.messages.create(
        model=ECHO,
        max_tokens=2000,
        thinking={"type": "enabled", "budget_tokens": 1024},
        messages=scripted(reasoning="hm", text="yes"),
    )
    assert [block.type for block in message.content] == ["thinking", "text"]


def test_counting_tokens(sdk: anthropic.Anthropic) -> None:
    messages: list[MessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
    counted = sdk.messages.count_tokens(model=LOCAL_MODEL, system=SYSTEM, messages=messages)
    answered = sdk.messages.create(model=LOCAL_MODEL, max_tokens=2, system=SYSTEM, messages=messages)
    # Anthropic counts what a prompt cache gave apart.
    assert counted.input_tokens == answered.usage.input_tokens + (answered.usage.cache_read_input_tokens or 0)


def test_models(sdk: anthropic.Anthropic) -> None:
    names = {model.id for model in sdk.models.list(limit=5)}
    assert {LOCAL_MODEL, ECHO, "policy/default"} <= names, "pages are followed"
    assert sdk.models.retrieve(ECHO).display_name == "Echo (a fake)"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (anthropic.NotFoundError, {"model": "no/such"}),
        (anthropic.BadRequestError, {"messages": []}),
        (anthropic.BadRequestError, {"max_tokens": 0}),
        (anthropic.BadRequestError, {"extra_body": {"temperature": 9}}),
        (anthropic.BadRequestError, {"extra_body": {"wheels": 4}}),
        (anthropic.BadRequestError, {"model": LOCAL_MODEL, "tools": [WEATHER]}),
        (anthropic.InternalServerError, {"model": "broken/500", "messages": scripted(error=500)}),
    ],
)
def test_errors_are_the_sdks_own(
    sdk: anthropic.Anthropic, kind: type[anthropic.APIStatusError], changes: dict[str, Any]
) -> None:
    with pytest.raises(kind) as caught:
        sdk.messages.create(**{"model": ECHO, "max_tokens": 10, "messages": scripted(), **changes})
    body = caught.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["message"]
    assert caught.value.request_id


def test_a_wrong_key_is_an_authentication_error(mesh: Running) -> None:
    url = mesh.ready.http
    stranger = anthropic.Anthropic(base_url=url, api_key="sk-wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError) as caught:
        stranger.models.list()
    assert "sk-wrong" not in str(caught.value)


def test_a_stream_that_breaks_raises(sdk: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError):
        for _ in sdk.messages.create(
            model="broken/stream2", max_tokens=9, messages=scripted(text="a b c d", break_after=2), stream=True
        ):
            pass
