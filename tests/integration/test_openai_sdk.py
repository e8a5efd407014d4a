"""The unmodified `openai` SDK against the edge: only its base URL is changed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from services.cli.demonstration import LOCAL_MODEL, SYSTEM
from sluice.metering.v1 import tenancy_service_pb2
from tests.running import Running

ECHO = "echo/echo"
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def sdk(mesh: Running) -> Iterator[openai.OpenAI]:
    """A client that doesn't retry, so that what Sluice answers is seen."""
    ready = mesh.ready
    with openai.OpenAI(base_url=f"{ready.http}/v1", api_key=ready.key, max_retries=0, timeout=60) as client:
        yield client


def turns(text: str) -> list[ChatCompletionMessageParam]:
    """A system turn and a user turn."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def scripted(**directives: Any) -> list[ChatCompletionMessageParam]:
    """A user turn that tells the echo provider what to do. A word of its own keeps it out of the cache."""
    return [{"role": "user", "content": f"{uuid.uuid4().hex} [[echo {json.dumps(directives)}]]"}]


def test_limits_are_told_and_kept(mesh: Running) -> None:
    key = tenancy_service_pb2.Key(
        tenant_id="default",
        project_id="default",
        scopes=["inference"],
        limits=tenancy_service_pb2.Limits(requests_per_minute=3, concurrency=7),
    )
    with mesh.client() as admin:
        made = admin.tenancy.CreateKey(tenancy_service_pb2.CreateKeyRequest(key=key), timeout=10, metadata=admin.as_admin)
    with openai.OpenAI(base_url=f"{mesh.ready.http}/v1", api_key=made.secret, max_retries=0, timeout=60) as client:
        left = []
        for streaming in (False, True, False):
            raw = client.chat.completions.with_raw_response.create(model=ECHO, messages=scripted(), stream=streaming)
            raw.parse()
            left.append(int(raw.headers["x-ratelimit-remaining-requests"]))
            assert (raw.headers["x-ratelimit-limit-requests"], raw.headers["x-ratelimit-limit-concurrency"]) == ("3", "7")
            assert 0 < float(raw.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert left == [2, 1, 0]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=ECHO, messages=scripted())
    headers = caught.value.response.headers
    assert headers["x-ratelimit-remaining-requests"] == "0"
    # A place is free again after a third of a minute.
    assert 1 <= int(headers["retry-after"]) <= 20


def test_the_limits_of_one_model_leave_the_others_alone(mesh: Running) -> None:
    models = [tenancy_service_pb2.ModelLimits(model=ECHO, requests_per_minute=2)]
    key = tenancy_service_pb2.Key(
        tenant_id="default",
        project_id="default",
        scopes=["inference"],
        limits=tenancy_service_pb2.Limits(models=models),
    )
    with mesh.client() as admin:
        made = admin.tenancy.CreateKey(tenancy_service_pb2.CreateKeyRequest(key=key), timeout=10, metadata=admin.as_admin)
    with openai.OpenAI(base_url=f"{mesh.ready.http}/v1", api_key=made.secret, max_retries=0, timeout=60) as client:
        # No model answers in another's place here: the request says which one.
        alone = {"x-sluice-allow-fallback": "false"}
        for _ in range(2):
            client.chat.completions.create(model=ECHO, messages=scripted(), extra_headers=alone)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=ECHO, messages=scripted(), extra_headers=alone)
        client.chat.completions.create(model=LOCAL_MODEL, messages=turns(uuid.uuid4().hex), max_tokens=4, extra_headers=alone)
    assert f"the limit of 2 requests per minute of the model {ECHO} is used up" in str(caught.value)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


def test_a_chat_with_the_real_model(sdk: openai.OpenAI) -> None:
    raw = sdk.chat.completions.with_raw_response.create(
        model=LOCAL_MODEL, messages=turns("What is the capital of France?"), temperature=0, max_tokens=24
    )
    completion = raw.parse()
    assert completion.object == "chat.completion"
    assert completion.model == LOCAL_MODEL
    assert "Paris" in (completion.choices[0].message.content or "")
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens > 20
    assert raw.headers["x-sluice-operation-id"]
    assert raw.headers["x-sluice-cost-nano-usd"] == "0"
    assert completion._request_id


def test_a_stream_with_usage(sdk: openai.OpenAI) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model=LOCAL_MODEL,
            messages=turns("Name three colors of the rainbow."),
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text) > 20
    assert len({chunk.id for chunk in chunks if chunk.choices}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == [
        "length"
    ]
    last = chunks[-1]
    assert last.usage is not None
    assert not last.choices
    assert last.usage.completion_tokens == 24


def test_chunks_come_one_by_one(sdk: openai.OpenAI) -> None:
    messages = scripted(text="one two three four", chunk_delay=0.1)
    chunks = list(sdk.chat.completions.create(model=ECHO, messages=messages, stream=True))
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) >= 3


def test_a_stream_without_usage_has_none(sdk: openai.OpenAI) -> None:
    chunks = list(sdk.chat.completions.create(model=ECHO, messages=scripted(text="one two three"), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_tools_are_called_and_their_results_taken(sdk: openai.OpenAI) -> None:
    messages = scripted(tool_calls=[{"name": "weather", "arguments": {"city": "Oslo"}}])
    called = sdk.chat.completions.create(model=ECHO, messages=messages, tools=[WEATHER], tool_choice="auto").choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.tool_calls is not None
    call = called.message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    messages.append(
        {
            "role": "assistant",
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}
            ],
        }
    )
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    messages.append({"role": "user", "content": "So, umbrella?"})
    answer = sdk.chat.completions.create(model=ECHO, messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "echo: So, umbrella?"


def test_streamed_tool_calls_can_be_put_together(sdk: openai.OpenAI) -> None:
    arguments = ""
    name = ""
    for chunk in sdk.chat.completions.create(
        model=ECHO,
        messages=scripted(tool_calls=[{"name": "weather", "arguments": {"city": "Oslo"}}]),
        tools=[WEATHER],
        stream=True,
    ):
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "weather"
    assert json.loads(arguments) == {"city": "Oslo"}


class City(BaseModel):
    """What the model is to fill in."""

    name: str
    population: int


@pytest.mark.parametrize("model", [ECHO, LOCAL_MODEL])
def test_json_schema(sdk: openai.OpenAI, model: str) -> None:
    """The local model is held to it by its grammar, however little it knows."""
    parsed = sdk.chat.completions.parse(
        model=model, messages=turns("Describe the city of Paris as JSON."), response_format=City, temperature=0, max_tokens=80
    )
    city = parsed.choices[0].message.parsed
    assert isinstance(city, City)
    assert city.name


def test_pictures_go_to_who_can_see(sdk: openai.OpenAI) -> None:
    picture = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    messages: list[ChatCompletionMessageParam] = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": picture}}],
        }
    ]
    answer = sdk.chat.completions.create(model=ECHO, messages=messages)
    assert answer.choices[0].message.content == "echo: What is this?"
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model=LOCAL_MODEL, messages=messages)
    assert caught.value.code == "field_unsupported"


def test_embeddings(sdk: openai.OpenAI) -> None:
    found = sdk.embeddings.create(model=ECHO, input=["one", "two"], dimensions=64)
    plain = sdk.embeddings.create(model=ECHO, input=["one", "two"], dimensions=64, encoding_format="float")
    assert [len(row.embedding) for row in found.data] == [64, 64]
    for left, right in zip(found.data, plain.data, strict=True):
        assert left.embedding == pytest.approx(right.embedding)


def test_models(sdk: openai.OpenAI) -> None:
    names = {model.id for model in sdk.models.list()}
    assert {LOCAL_MODEL, ECHO, "policy/default"} <= names
    assert sdk.models.retrieve(ECHO).owned_by == "echo"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("no/such")


@pytest.mark.parametrize(
    ("kind", "code", "changes"),
    [
        (openai.NotFoundError, "model_not_found", {"model": "no/such"}),
        (openai.BadRequestError, "request_invalid", {"messages": []}),
        (openai.BadRequestError, "request_invalid", {"temperature": 9}),
        (openai.BadRequestError, "field_unsupported", {"extra_body": {"wheels": 4}}),
        (openai.BadRequestError, "field_unsupported", {"n": 2}),
        (openai.BadRequestError, "field_unsupported", {"model": LOCAL_MODEL, "tools": [WEATHER]}),
        (openai.BadRequestError, "provider_rejected", {"messages": scripted(error=400, error_message="no such voice")}),
        (openai.InternalServerError, "all_candidates_failed", {"model": "broken/500", "messages": scripted(error=500)}),
        (
            openai.InternalServerError,
            "all_candidates_failed",
            {"model": "broken/429", "messages": scripted(error=429, retry_after=7)},
        ),
    ],
)
def test_errors_are_the_sdks_own(
    sdk: openai.OpenAI, kind: type[openai.APIStatusError], code: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(kind) as caught:
        sdk.chat.completions.create(**{"model": ECHO, "messages": scripted(), **changes})
    assert caught.value.code == code
    assert caught.value.message
    assert caught.value.request_id


def test_a_wrong_key_is_an_authentication_error(mesh: Running) -> None:
    url = f"{mesh.ready.http}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "key_invalid"
    assert "sk-wrong" not in str(caught.value)


def test_a_stream_that_breaks_raises(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError) as caught:
        for _ in sdk.chat.completions.create(
            model="broken/stream", messages=scripted(text="a b c d", break_after=2), stream=True
        ):
            pass
    assert caught.value.code == "provider_stream_broken"


def test_an_idempotency_key_gives_the_same_answer_and_refuses_another_body(sdk: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    messages = scripted(text="once")
    first = sdk.chat.completions.create(model=ECHO, messages=messages, extra_headers=headers)
    again = sdk.chat.completions.create(model=ECHO, messages=messages, extra_headers=headers)
    assert first == again
    with pytest.raises(openai.ConflictError) as caught:
        sdk.chat.completions.create(model=ECHO, messages=scripted(text="twice"), extra_headers=headers)
    assert caught.value.code == "request_id_reused"


def test_a_receipt_on_request(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model=ECHO, messages=scripted(), extra_headers={"x-sluice-receipt": "full"})
    receipt = (answer.model_extra or {})["sluice"]
    assert receipt["tenant_id"] == "default"
    assert receipt["attempts"][0]["model"] == ECHO


def test_the_deadline_is_kept(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.chat.completions.create(
            model=ECHO, messages=scripted(hang=True), extra_headers={"x-sluice-timeout": "1s"}, timeout=10
        )
    assert caught.value.status_code in (502, 504)


async def test_the_async_client(mesh: Running) -> None:
    ready = mesh.ready
    async with openai.AsyncOpenAI(base_url=f"{ready.http}/v1", api_key=ready.key, max_retries=0) as client:
        stream = await client.chat.completions.create(model=ECHO, messages=scripted(text="a b"), stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "a b"
