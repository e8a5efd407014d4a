"""Several gateways: who repeats a request with its id gets one operation, one charge, whichever gateway it asks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from services.cli.client import Client, failures
from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from sluice.metering.v1 import usage_service_pb2
from tests.integration.conftest import SECTIONS
from tests.running import Running, default_catalogue, running

PRICED = "echo/priced"
GATEWAYS = ("gateway", "gateway-2", "gateway-3")
SETTLE_SECONDS = 20.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Running]:
    catalogue = default_catalogue()
    catalogue["models"][PRICED] = {**catalogue["models"]["echo/echo"], "price": {"input": 1, "output": 2}}
    with running("mesh", sections=SECTIONS, catalogue=catalogue, replicas={"gateway": len(GATEWAYS)}) as started:
        yield started


@pytest.fixture
def stubs(mesh: Running) -> Iterator[list[InferenceServiceStub]]:
    """One for each gateway."""
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(mesh.ready.grpc[name])) for name in GATEWAYS]
        yield [InferenceServiceStub(channel) for channel in channels]


def ask(request_id: str, text: str = "Hello?") -> inference_service_pb2.GenerateRequest:
    return inference_service_pb2.GenerateRequest(
        request_id=request_id,
        conversation=conversation_pb2.Conversation(
            messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)])]
        ),
        routing=inference_service_pb2.RoutingWishes(model=PRICED),
        cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
    )


def operation_of(
    stub: InferenceServiceStub, request: inference_service_pb2.GenerateRequest, client: Client, stream: bool
) -> str:
    """Id of the operation that answered; the whole answer is read."""
    with failures():
        if not stream:
            return stub.Generate(request, timeout=30, metadata=client.as_tenant).operation_id
        streamed = inference_service_pb2.StreamGenerateRequest.FromString(request.SerializeToString())
        events = list(stub.StreamGenerate(streamed, timeout=30, metadata=client.as_tenant))
    assert events[0].WhichOneof("event") == "opened"
    assert events[-1].WhichOneof("event") == "closed"
    assert "".join(event.delta.text for event in events) != ""
    return events[0].opened.operation_id


def entries(client: Client, operation_id: str) -> int:
    """Rows of the ledger for it, once there are any."""
    ends = time.monotonic() + SETTLE_SECONDS
    request = usage_service_pb2.ListEntriesRequest(operation_id=operation_id, tenant_id="default")
    while True:
        with failures():
            found = client.usage.ListEntries(request, timeout=30, metadata=client.as_admin).entries
        if found or time.monotonic() > ends:
            return len(found)
        time.sleep(0.05)


def test_repetitions_over_all_gateways_are_one_operation_each(stubs: list[InferenceServiceStub], client: Client) -> None:
    ids = [f"r-{uuid.uuid4().hex}" for _ in range(40)]
    calls = [(stub, request_id, number % 2 == 1) for request_id in ids for number, stub in enumerate((*stubs, *stubs))]
    with ThreadPoolExecutor(24) as executor:
        operations = list(executor.map(lambda call: operation_of(call[0], ask(call[1]), client, call[2]), calls))
    by_id: dict[str, set[str]] = {}
    for (_, request_id, _), operation_id in zip(calls, operations, strict=True):
        by_id.setdefault(request_id, set()).add(operation_id)
    assert all(len(found) == 1 for found in by_id.values())
    assert len(set(operations)) == len(ids)
    assert [entries(client, operation_id) for operation_id in sorted(set(operations))] == [1] * len(ids)


def test_over_http_the_key_is_the_same_operation_as_over_grpc(
    mesh: Running, stubs: list[InferenceServiceStub], client: Client
) -> None:
    # Of some ids the gateway with the first HTTP port is the owner, of others it isn't.
    for _ in range(6):
        request_id = f"h-{uuid.uuid4().hex}"
        request = urllib.request.Request(
            f"{mesh.ready.http}/v1/chat/completions",
            json.dumps({"model": PRICED, "messages": [{"role": "user", "content": "Hello?"}]}).encode(),
            {
                "content-type": "application/json",
                "authorization": f"Bearer {mesh.ready.key}",
                "idempotency-key": request_id,
                "x-sluice-cache": "off",
            },
        )
        answers = []
        for _ in range(2):
            with urllib.request.urlopen(request, timeout=30) as response:
                answers.append((response.headers["x-sluice-operation-id"], json.loads(response.read())))
        assert answers[0] == answers[1]
        assert {operation_of(stub, ask(request_id), client, False) for stub in stubs} == {answers[0][0]}
        assert entries(client, answers[0][0]) == 1


def test_another_body_is_refused_by_every_gateway(stubs: list[InferenceServiceStub], client: Client) -> None:
    request_id = f"b-{uuid.uuid4().hex}"
    operation_of(stubs[0], ask(request_id), client, False)
    for stub in stubs:
        with pytest.raises(Failure) as refused:
            operation_of(stub, ask(request_id, "Something else"), client, False)
        assert refused.value.reason is Reason.REQUEST_ID_REUSED


def test_a_killed_gateway_takes_only_what_it_had_under_way(
    mesh: Running, stubs: list[InferenceServiceStub], client: Client
) -> None:
    """Those who ask the others are answered; what the killed one had answered is replayed by who owns its ids now."""
    ids = [f"k-{uuid.uuid4().hex}" for _ in range(30)]
    before = [operation_of(stubs[0], ask(request_id), client, False) for request_id in ids]
    os.kill(mesh.ready.pids["gateway-2"], signal.SIGKILL)
    with ThreadPoolExecutor(10) as executor:
        after = list(executor.map(lambda request_id: operation_of(stubs[0], ask(request_id), client, False), ids))
    assert after == before
    assert all(entries(client, operation_id) == 1 for operation_id in after)


def test_what_was_answered_is_replayed_after_all_gateways_were_killed_at_once(
    mesh: Running, stubs: list[InferenceServiceStub], client: Client
) -> None:
    ids = [f"a-{uuid.uuid4().hex}" for _ in range(12)]

    def answered(number: int, stream: bool) -> str:
        ends = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                return operation_of(stubs[number % 3], ask(ids[number]), client, stream)
            except Failure as failure:
                # Not back yet.
                if failure.reason is not Reason.DEPENDENCY_UNAVAILABLE or time.monotonic() > ends:
                    raise
                time.sleep(0.1)

    before = [answered(number, number % 2 == 1) for number in range(12)]
    for name in GATEWAYS:
        os.kill(mesh.ready.pids[name], signal.SIGKILL)
    after = [answered(number, number % 2 == 0) for number in range(12)]
    assert after == before
    assert all(entries(client, operation_id) == 1 for operation_id in after)
