"""The servicer: keys, translation, streams, acting for a tenant."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.service import InferenceService, secret_of
from services.runtime.call import ANONYMOUS, Caller, CallerKind
from services.runtime.dispatch import Binding, build_table
from services.runtime.errors import Failure, Reason
from services.runtime.inproc import InprocChannel
from sluice.inference.v1 import inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.unit.gateway.fakes import SECRET, World, generate

KEY = (("authorization", f"Bearer {SECRET}"),)
_MAX_SECONDS = 20.0
ACTING = (("x-sluice-tenant", "globex"), ("x-sluice-project", "p"), ("x-sluice-key", "key-9"))


def stub(world: World, caller: Caller = ANONYMOUS) -> Any:
    """A stub to the servicer."""
    servicer = InferenceService(world.core, world.loop.time, max_seconds=_MAX_SECONDS)
    binding = Binding(servicer, inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"])
    table = build_table([binding], ())
    channel: Any = InprocChannel(lambda: table, caller)
    return InferenceServiceStub(channel)


async def test_generate_answers_with_a_receipt() -> None:
    world = World()
    response = await stub(world).Generate(generate(), metadata=KEY, timeout=5.0)
    assert response.answer.message.parts[0].text == "hi"
    assert response.receipt.operation_id == response.operation_id
    assert response.receipt.tenant_id == "acme"


@pytest.mark.parametrize(("asked", "given"), [(5.0, 5.0), (1e8, _MAX_SECONDS)])
async def test_a_call_gets_its_own_time_but_no_more_than_the_longest(asked: float, given: float) -> None:
    world = World()
    began = world.loop.time()
    await stub(world).Generate(generate(), metadata=KEY, timeout=asked)
    [(_, _, call)] = world.execution.calls
    assert began + given - 1.0 < call.deadline <= began + given + 1.0


async def test_a_receipt_that_is_not_wanted_is_left_out() -> None:
    world = World()
    view = inference_service_pb2.RECEIPT_VIEW_NONE
    response = await stub(world).Generate(generate(receipt_view=view), metadata=KEY, timeout=5.0)
    assert not response.HasField("receipt")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), Reason.KEY_MISSING),
        ((("authorization", "Basic abc"),), Reason.KEY_MISSING),
        ((("authorization", "Bearer "),), Reason.KEY_MISSING),
        (ACTING, Reason.KEY_MISSING),
    ],
)
async def test_without_a_key(metadata: tuple[tuple[str, str], ...], reason: Reason) -> None:
    world = World()
    with pytest.raises(Failure) as caught:
        await stub(world).Generate(generate(), metadata=metadata, timeout=5.0)
    assert caught.value.reason is reason
    assert not world.execution.calls


async def test_a_wrong_key() -> None:
    world = World()
    world.metering.valid = False
    with pytest.raises(Failure) as caught:
        await stub(world).ListModels(inference_service_pb2.ListModelsRequest(), metadata=KEY, timeout=5.0)
    assert caught.value.reason is Reason.KEY_INVALID


async def test_a_service_acts_for_a_tenant() -> None:
    world = World()
    response = await stub(world, Caller(CallerKind.SERVICE, "batching")).Generate(generate(), metadata=ACTING, timeout=5.0)
    assert (response.receipt.tenant_id, response.receipt.project_id, response.receipt.key_id) == ("globex", "p", "key-9")
    assert not world.metering.asked("Authenticate")
    (request,) = world.execution.asked("Complete")
    assert request.billing.key_id == "key-9"


async def test_a_service_that_says_half_of_it_is_refused() -> None:
    world = World()
    with pytest.raises(Failure) as caught:
        await stub(world, Caller(CallerKind.SERVICE, "batching")).Generate(generate(), metadata=ACTING[:1], timeout=5.0)
    assert caught.value.reason is Reason.SERVICE_IDENTITY


async def test_a_stream_is_opened_deltas_closed() -> None:
    world = World()
    request = inference_service_pb2.StreamGenerateRequest(conversation=generate().conversation)
    events = [event async for event in stub(world).StreamGenerate(request, metadata=KEY, timeout=5.0)]
    assert [event.WhichOneof("event") for event in events] == ["opened", "delta", "delta", "closed"]
    assert events[0].opened.model == "a/one"
    assert events[-1].closed.usage.output_token_count == 5
    assert events[-1].closed.receipt.operation_id == events[0].opened.operation_id


async def test_a_stream_with_a_request_id_is_replayed() -> None:
    world = World()
    request = inference_service_pb2.StreamGenerateRequest(conversation=generate().conversation, request_id="r1")
    first = [event async for event in stub(world).StreamGenerate(request, metadata=KEY, timeout=5.0)]
    again = [event async for event in stub(world).StreamGenerate(request, metadata=KEY, timeout=5.0)]
    assert again[0].opened.operation_id == first[0].opened.operation_id
    assert again[1].delta.text == "hi"
    # The same request as a whole is the same operation.
    whole = await stub(world).Generate(generate(request_id="r1"), metadata=KEY, timeout=5.0)
    assert whole.operation_id == first[0].opened.operation_id


async def test_the_other_methods() -> None:
    world = World()
    calls = stub(world)
    embedded = await calls.Embed(inference_service_pb2.EmbedRequest(model="a/one", inputs=["x"]), metadata=KEY, timeout=5.0)
    assert embedded.embeddings[0].values == [1.0, 2.0]
    counted = await calls.CountTokens(
        inference_service_pb2.CountTokensRequest(model="a/one", conversation=generate().conversation), metadata=KEY, timeout=5.0
    )
    assert counted.input_count.token_count == 10
    explained = await calls.Explain(inference_service_pb2.ExplainRequest(request=generate()), metadata=KEY, timeout=5.0)
    assert explained.receipt.policy == "default"
    await calls.ReportOutcome(
        inference_service_pb2.ReportOutcomeRequest(operation_id="A" * 26, outcome=inference_service_pb2.OUTCOME_FAILED),
        metadata=KEY,
        timeout=5.0,
    )
    assert world.outcomes.failed_count == 1
    with pytest.raises(Failure) as caught:
        await calls.Explain(inference_service_pb2.ExplainRequest(), metadata=KEY, timeout=5.0)
    assert caught.value.metadata == {"field": "request"}


def test_where_a_key_is_found() -> None:
    assert secret_of("Bearer a", None) == "a"
    assert secret_of("bearer  a ", "b") == "a"
    assert secret_of(None, "b") == "b"
    assert secret_of("Basic a", "b") == "b"
    assert secret_of(None, None) is None
