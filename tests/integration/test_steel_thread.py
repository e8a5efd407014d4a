"""One thread through everything, on the real local model: routed, counted, cached, held, executed, settled, explained."""

from __future__ import annotations

import contextlib
import http.client
import time
import uuid
from urllib.parse import urlsplit

import grpc
import pytest

from services.cli.accounts import _ensure_project
from services.cli.client import Client, failures
from services.cli.demonstration import DOWN_MODEL, LOCAL_MODEL, SYSTEM
from services.cli.rendering import answer_text
from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2
from sluice.jobs.v1 import job_service_pb2
from sluice.metering.v1 import tenancy_service_pb2, usage_service_pb2
from tests.running import Running

TIMEOUT = 60.0


def ask(
    text: str,
    *,
    model: str = LOCAL_MODEL,
    mode: inference_service_pb2.CacheMode.ValueType = inference_service_pb2.CACHE_MODE_OFF,
    namespace: str = "",
    max_tokens: int = 24,
    request_id: str = "",
) -> inference_service_pb2.GenerateRequest:
    """A request of one user turn, after a system turn without which a model of this size babbles."""
    return inference_service_pb2.GenerateRequest(
        request_id=request_id,
        conversation=conversation_pb2.Conversation(
            messages=[
                conversation_pb2.Message(role=conversation_pb2.ROLE_SYSTEM, parts=[conversation_pb2.Part(text=SYSTEM)]),
                conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)]),
            ],
            sampling=conversation_pb2.Sampling(temperature=0.0, seed=7),
            max_output_tokens=max_tokens,
        ),
        routing=inference_service_pb2.RoutingWishes(model=model, allow_fallback=True),
        cache=inference_service_pb2.CacheWishes(mode=mode, cache_namespace=namespace),
    )


def generate(client: Client, request: inference_service_pb2.GenerateRequest) -> inference_service_pb2.GenerateResponse:
    """One unary call."""
    with failures():
        return client.inference.Generate(request, timeout=TIMEOUT, metadata=client.as_tenant)


def test_a_real_model_answers_and_the_receipt_says_how(client: Client) -> None:
    response = generate(client, ask("What is the capital of France?"))
    assert "Paris" in answer_text(response.answer)
    receipt = response.receipt
    assert receipt.operation_id == response.operation_id
    assert receipt.tenant_id == "default"
    assert receipt.attempts[-1].model == LOCAL_MODEL
    assert receipt.attempts[-1].outcome == receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED
    assert receipt.input_count.method == receipt_pb2.TOKEN_COUNT_METHOD_EXACT
    assert receipt.input_count.token_count == response.answer.usage.input_token_count
    assert response.answer.usage.source == answer_pb2.USAGE_SOURCE_REPORTED
    assert receipt.cost_nano_usd == response.cost_nano_usd == 0
    assert receipt.price_version, "a free model has a written price of zero"
    assert receipt.candidates, "every candidate has a fate"
    assert all(fate.reason for fate in receipt.candidates)
    assert not receipt.degradations


def test_the_same_request_again_is_an_exact_hit_and_a_paraphrase_a_semantic_one(client: Client) -> None:
    namespace = f"t-{uuid.uuid4().hex[:12]}"
    semantic = inference_service_pb2.CACHE_MODE_SEMANTIC
    first = generate(client, ask("What is the capital of France?", mode=semantic, namespace=namespace))
    assert first.receipt.cache.status == receipt_pb2.CACHE_STATUS_MISS
    again = generate(client, ask("What is the capital of France?", mode=semantic, namespace=namespace))
    assert again.receipt.cache.status == receipt_pb2.CACHE_STATUS_HIT_EXACT
    assert again.answer.message == first.answer.message
    assert not again.receipt.attempts
    paraphrase = ask("What's the capital city of France?", mode=semantic, namespace=namespace)
    ends = time.monotonic() + 10
    while True:
        found = generate(client, paraphrase)
        if found.receipt.cache.status == receipt_pb2.CACHE_STATUS_HIT_SEMANTIC:
            break
        # The paraphrase's own answer is stored by now, so only another namespace can still show a semantic hit.
        assert time.monotonic() < ends, found.receipt.cache
        time.sleep(0.3)
        namespace = f"t-{uuid.uuid4().hex[:12]}"
        generate(client, ask("What is the capital of France?", mode=semantic, namespace=namespace))
        paraphrase.cache.cache_namespace = namespace
        time.sleep(0.5)
    assert found.receipt.cache.score >= found.receipt.cache.threshold
    assert found.answer.message == first.answer.message


def new_tenant(client: Client) -> tuple[str, str]:
    """A tenant of a test's own, and a key of it."""
    tenant = f"other-{uuid.uuid4().hex[:8]}"
    client.tenancy.CreateTenant(
        tenancy_service_pb2.CreateTenantRequest(tenant=tenancy_service_pb2.Tenant(id=tenant)),
        timeout=TIMEOUT,
        metadata=client.as_admin,
    )
    _ensure_project(client, tenant, "default", TIMEOUT)
    secret = client.tenancy.CreateKey(
        tenancy_service_pb2.CreateKeyRequest(
            key=tenancy_service_pb2.Key(tenant_id=tenant, project_id="default", scopes=["inference"])
        ),
        timeout=TIMEOUT,
        metadata=client.as_admin,
    ).secret
    return tenant, secret


def test_another_tenant_never_sees_the_entry(mesh: Running, client: Client) -> None:
    _, secret = new_tenant(client)
    request = ask(f"Say the word {uuid.uuid4().hex[:6]}.", mode=inference_service_pb2.CACHE_MODE_EXACT, model="echo/echo")
    generate(client, request)
    assert generate(client, request).receipt.cache.status == receipt_pb2.CACHE_STATUS_HIT_EXACT
    with mesh.client(key=secret) as other:
        assert generate(other, request).receipt.cache.status == receipt_pb2.CACHE_STATUS_MISS


def test_a_kept_connection_is_nobody_s_but_the_key_s_that_each_request_shows(mesh: Running, client: Client) -> None:
    parts = urlsplit(mesh.ready.http)
    good = {"authorization": f"Bearer {mesh.ready.key}"}
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        for headers, status in (
            (good, 200),
            ({"authorization": "Bearer sk-sluice-wrong"}, 401),
            ({}, 401),
            (good, 200),
            ({"x-api-key": mesh.ready.key}, 200),
            ({"x-api-key": "sk-sluice-wrong"}, 401),
            (good, 200),
        ):
            connection.request("GET", "/v1/models", headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == status, headers


def test_a_stream_comes_in_pieces_and_ends_with_its_receipt(client: Client) -> None:
    plain = ask("Name three colors of the rainbow.")
    request = inference_service_pb2.StreamGenerateRequest(
        conversation=plain.conversation, routing=plain.routing, cache=plain.cache
    )
    events = list(client.inference.StreamGenerate(request, timeout=TIMEOUT, metadata=client.as_tenant))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "opened"
    assert kinds[-1] == "closed"
    assert set(kinds[1:-1]) == {"delta"}
    assert len(kinds) >= 3
    closed = events[-1].closed
    assert closed.usage.output_token_count > 0
    assert closed.receipt.attempts[-1].first_token_duration.ToTimedelta().total_seconds() > 0


def test_a_job_runs_and_its_answer_is_kept(client: Client) -> None:
    with failures():
        job = client.jobs.SubmitJob(
            job_service_pb2.SubmitJobRequest(request_id=uuid.uuid4().hex, request=ask("Say hello.")),
            timeout=TIMEOUT,
            metadata=client.as_tenant,
        ).job
        states = [
            response.job.state
            for response in client.jobs.WatchJob(
                job_service_pb2.WatchJobRequest(job_id=job.id), timeout=TIMEOUT, metadata=client.as_tenant
            )
        ]
        done = client.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job.id), timeout=TIMEOUT, metadata=client.as_tenant).job
    assert states[-1] == job_service_pb2.JOB_STATE_SUCCEEDED
    assert done.state == job_service_pb2.JOB_STATE_SUCCEEDED
    assert answer_text(done.response.answer)
    assert done.response.receipt.tenant_id == "default"


def test_the_next_candidate_answers_when_the_first_is_down(client: Client) -> None:
    response = generate(client, ask("Say hello.", model=DOWN_MODEL))
    outcomes = [(attempt.model, attempt.outcome) for attempt in response.receipt.attempts]
    assert outcomes[-1] == (LOCAL_MODEL, receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED)
    assert outcomes[0][0] in (DOWN_MODEL, LOCAL_MODEL)
    if outcomes[0][0] == LOCAL_MODEL:
        # The breaker was open already: then the plan says so.
        assert any(fate.model == DOWN_MODEL and not fate.planned for fate in response.receipt.candidates)


def test_the_default_policy_classifies_and_explains(client: Client) -> None:
    request = ask("```python\ndef f(x):\n    return x +\n```\nWhy is this a SyntaxError?", model="")
    with failures():
        receipt = client.inference.Explain(
            inference_service_pb2.ExplainRequest(request=request), timeout=TIMEOUT, metadata=client.as_tenant
        ).receipt
    assert receipt.task_type == receipt_pb2.TASK_TYPE_CODE
    assert receipt.task_type_source == receipt_pb2.TASK_TYPE_SOURCE_CLASSIFIER
    assert receipt.task_type_reason
    assert len(receipt.candidates) >= 3
    assert not receipt.attempts


def test_counts_models_and_embeddings(client: Client) -> None:
    with failures():
        count = client.inference.CountTokens(
            inference_service_pb2.CountTokensRequest(model=LOCAL_MODEL, conversation=ask("Hello").conversation),
            timeout=TIMEOUT,
            metadata=client.as_tenant,
        ).input_count
        models = client.inference.ListModels(
            inference_service_pb2.ListModelsRequest(), timeout=TIMEOUT, metadata=client.as_tenant
        ).models
        embedded = client.inference.Embed(
            inference_service_pb2.EmbedRequest(model="echo/echo", inputs=["one", "two"]),
            timeout=TIMEOUT,
            metadata=client.as_tenant,
        )
    assert count.method == receipt_pb2.TOKEN_COUNT_METHOD_EXACT
    assert {LOCAL_MODEL, "echo/echo", "policy/default"} <= {model.id for model in models}
    assert len(embedded.embeddings) == 2


def test_the_ledger_has_every_request_once_and_verifies(client: Client) -> None:
    response = generate(client, ask("Say hi.", request_id=uuid.uuid4().hex))
    ends = time.monotonic() + 5
    entries: list[usage_service_pb2.LedgerEntry] = []
    while not entries and time.monotonic() < ends:
        with failures():
            entries = list(
                client.usage.ListEntries(
                    usage_service_pb2.ListEntriesRequest(tenant_id="default", operation_id=response.operation_id),
                    timeout=TIMEOUT,
                    metadata=client.as_admin,
                ).entries
            )
        time.sleep(0.02)
    assert [entry.attempt_id for entry in entries] == [attempt.attempt_id for attempt in response.receipt.attempts]
    with failures():
        verdict = client.usage.VerifyLedger(usage_service_pb2.VerifyLedgerRequest(), timeout=TIMEOUT, metadata=client.as_admin)
    assert verdict.ok, verdict.problems
    assert verdict.debit_nano_usd == verdict.credit_nano_usd


@pytest.mark.parametrize("how", ["times out", "cancels"])
def test_who_leaves_an_uncounted_request_is_charged_for_the_tokens_that_it_had(mesh: Running, client: Client, how: str) -> None:
    """Nobody reads a receipt, so the prompt is not counted before it is sent, and no usage is ever reported."""
    tenant, secret = new_tenant(client)
    # No quarter of its bytes is the number of its tokens.
    request = ask("Ein Satz über Käsefäden, Öl und Übermut. " * 5, model="echo/echo")
    request.receipt_view = inference_service_pb2.RECEIPT_VIEW_NONE
    with failures():
        count = client.inference.CountTokens(
            inference_service_pb2.CountTokensRequest(model="echo/echo", conversation=request.conversation),
            timeout=TIMEOUT,
            metadata=client.as_tenant,
        ).input_count
    assert count.method == receipt_pb2.TOKEN_COUNT_METHOD_ENCODING
    with mesh.client(key=secret) as other:
        generate(other, request)
        request.metadata["echo.delay"] = "30"
        waiting = other.inference.Generate.future(
            request, timeout=0.5 if how == "times out" else TIMEOUT, metadata=other.as_tenant
        )
        time.sleep(0.2)
        if how == "cancels":
            waiting.cancel()
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            waiting.result()
    ends = time.monotonic() + 10
    entries: list[usage_service_pb2.LedgerEntry] = []
    while len(entries) < 2 and time.monotonic() < ends:
        time.sleep(0.02)
        with failures():
            entries = list(
                client.usage.ListEntries(
                    usage_service_pb2.ListEntriesRequest(tenant_id=tenant), timeout=TIMEOUT, metadata=client.as_admin
                ).entries
            )
    left, answered = entries
    assert answered.usage.source == answer_pb2.USAGE_SOURCE_REPORTED
    assert left.usage.source == answer_pb2.USAGE_SOURCE_ESTIMATED
    assert left.usage.input_token_count == count.token_count
    expected = "ATTEMPT_OUTCOME_FAILED" if how == "times out" else "ATTEMPT_OUTCOME_CANCELLED"
    assert receipt_pb2.AttemptOutcome.Name(left.outcome) == expected


def test_a_repeated_request_id_replays_and_is_charged_once(client: Client) -> None:
    request = ask("Say one word.", request_id=uuid.uuid4().hex)
    first = generate(client, request)
    second = generate(client, request)
    assert second.operation_id == first.operation_id
    assert second.answer == first.answer
    changed = ask("Say two words.", request_id=request.request_id)
    with pytest.raises(Failure) as caught:
        generate(client, changed)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


def test_outcomes_are_taken(client: Client) -> None:
    response = generate(client, ask("Say yes.", model="echo/echo"))
    with failures():
        client.inference.ReportOutcome(
            inference_service_pb2.ReportOutcomeRequest(
                operation_id=response.operation_id, outcome=inference_service_pb2.OUTCOME_SERVED
            ),
            timeout=TIMEOUT,
            metadata=client.as_tenant,
        )


@pytest.mark.parametrize(
    ("request_", "reason", "key"),
    [
        (ask("x", model="no/such"), Reason.MODEL_NOT_FOUND, None),
        (inference_service_pb2.GenerateRequest(), Reason.REQUEST_INVALID, None),
        (ask("x"), Reason.KEY_INVALID, "sk-sluice-wrong"),
    ],
)
def test_errors_have_reasons(
    mesh: Running, request_: inference_service_pb2.GenerateRequest, reason: Reason, key: str | None
) -> None:
    with mesh.client(key=key) as client, pytest.raises(Failure) as caught:
        generate(client, request_)
    assert caught.value.reason is reason
