"""The local provider: the real model, in its real child process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any, Final

import jsonschema
import orjson
import pytest

from services.execution.adapters.http1 import Pool
from services.execution.adapters.local import LocalProvider
from services.execution.adapters.local_server import locate
from services.execution.adapters.openai import OpenAIProvider
from services.execution.errors import AttemptFailed
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2
from tests.unit.execution.examples import Heard, conversation, embedding, heard, prompt, texts

LONG: Final = 50.0
"""Seconds that loading the model and a short answer may take on a machine that is busy."""
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}


def connect(url: str, key: str) -> OpenAIProvider:
    """As the service's wiring does."""
    pool = Pool(f"{url}/v1", connect_timeout=5.0, max_connections=16, keep_alive=4.0, max_answer_bytes=1 << 20)
    options: dict[str, Any] = {"first_byte_timeout": LONG, "idle_timeout": LONG, "kind": "local"}
    return OpenAIProvider(
        pool,
        address=url,
        credential=lambda: key,
        credential_name="",
        headers={},
        limit_field="max_tokens",
        keep_streams=False,
        **options,
    )


def provider_of(model: str, directory: Path) -> LocalProvider:
    return LocalProvider(model, connect, directory / "local.log", context_window=512, parallel=2)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def ended(provider: LocalProvider) -> None:
    """Returns when the child's end has been noticed."""
    async with asyncio.timeout(LONG):
        while provider.pid is not None:
            await asyncio.sleep(0.01)


@pytest.mark.model
async def test_the_real_model(tmp_path: Path) -> None:
    provider = provider_of("smollm2-135m-instruct", tmp_path)
    # Nothing runs before its first use, and that is healthy.
    assert provider.pid is None
    await provider.probe(asyncio.get_running_loop().time() + 1)
    try:
        cool = conversation_pb2.Sampling(temperature=0.0, seed=1)
        talk = conversation("Say hello in one short sentence.", sampling=cool)

        # Unary; two first calls start one child.
        one, two = await asyncio.gather(
            *(provider.complete(prompt(talk, most=5, seconds=LONG)) for _ in range(2)),
        )
        child = provider.pid
        assert child is not None
        for answer in (one.answer, two.answer):
            assert texts(answer).strip()
            assert answer.usage.source == answer_pb2.USAGE_SOURCE_REPORTED
            assert answer.usage.input_token_count > 5
            assert 1 <= answer.usage.output_token_count <= 5
        await provider.probe(asyncio.get_running_loop().time() + LONG)

        # Stream: in pieces, with the same text as the whole, translated or passed through.
        got = await heard(provider.stream(prompt(talk, most=5, seconds=LONG)))
        assert got.count > 2
        assert got.text == texts(got.answer)
        assert got.answer.usage.output_token_count == one.answer.usage.output_token_count
        wire = execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT
        passed = await heard(provider.stream(prompt(talk, most=5, seconds=LONG, wire=wire)))
        assert passed.wire.startswith(b"data: {")
        assert b"[DONE]" not in passed.wire
        assert texts(passed.answer) == got.text
        assert passed.answer.usage.source == answer_pb2.USAGE_SOURCE_REPORTED

        # A schema is kept by grammar, whatever a small model would rather say.
        formatted = conversation_pb2.ResponseFormat(
            kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=orjson.dumps(SCHEMA).decode(), name="weather"
        )
        talk_of_weather = conversation("Is it sunny in Rome?", sampling=cool, response_format=formatted)
        answer = (await provider.complete(prompt(talk_of_weather, most=24, seconds=LONG))).answer
        jsonschema.validate(orjson.loads(texts(answer)), SCHEMA)

        # More than fits is the caller's fault, by the model server's own words.
        with pytest.raises(AttemptFailed) as caught:
            await provider.complete(prompt(conversation("word " * 2000), most=5, seconds=LONG))
        assert caught.value.reason is Reason.CONTEXT_WINDOW_EXCEEDED

        # Cancellation leaves the child alive and free for the next call.
        first = asyncio.Event()

        async def follow() -> None:
            async for _ in provider.stream(prompt(conversation("Count to one hundred."), most=400, seconds=LONG)):
                first.set()

        task = asyncio.create_task(follow())
        async with asyncio.timeout(LONG):
            await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert provider.pid == child
        assert texts((await provider.complete(prompt(talk, most=2, seconds=LONG))).answer)

        # Killed in the middle of a stream: that one breaks, the next call finds a new child.
        partial = Heard()
        with pytest.raises(AttemptFailed) as caught:
            async for piece in provider.stream(prompt(conversation("Count to one hundred."), most=400, seconds=LONG)):
                partial.take(piece)
                if partial.count == 1:
                    os.kill(child, signal.SIGKILL)
        assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN
        await ended(provider)
        assert texts((await provider.complete(prompt(talk, most=2, seconds=LONG))).answer)
        second = provider.pid
        assert second not in (None, child)
    finally:
        last = provider.pid
        await provider.close()
    assert last is not None
    assert not exists(last)
    with pytest.raises(AttemptFailed) as caught:
        await provider.complete(prompt(seconds=1))
    assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE


async def test_a_model_that_is_not_there_is_unavailable_and_its_log_says_why(tmp_path: Path) -> None:
    provider = provider_of(str(tmp_path / "none.gguf"), tmp_path)
    try:
        with pytest.raises(AttemptFailed) as caught:
            await provider.complete(prompt(seconds=LONG))
        assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE
        assert "did not start" in caught.value.message
        await ended(provider)
    finally:
        await provider.close()
    assert "neither a GGUF file nor one of" in (tmp_path / "local.log").read_text()


async def test_a_caller_whose_deadline_passes_while_the_model_loads_gets_a_timeout(tmp_path: Path) -> None:
    provider = provider_of(str(tmp_path / "none.gguf"), tmp_path)
    try:
        with pytest.raises(AttemptFailed) as caught:
            await provider.complete(prompt(seconds=0.01))
        assert caught.value.reason is Reason.PROVIDER_TIMEOUT
    finally:
        await provider.close()
    assert provider.pid is None


async def test_it_makes_no_embeddings(tmp_path: Path) -> None:
    with pytest.raises(AttemptFailed) as caught:
        await provider_of("", tmp_path).embed(embedding("a"))
    assert caught.value.reason is Reason.PROVIDER_REJECTED


def test_models_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert locate("smollm2-135m-instruct").suffix == ".gguf"
    assert locate("") == locate("smollm2-135m-instruct")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    assert locate(str(path)) == path
    with pytest.raises(FileNotFoundError, match="neither a GGUF file"):
        locate(str(tmp_path / "none.gguf"))
