"""Requests with a request id over several gateways."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from services.gateway.core import Completion
from services.gateway.events import Opened
from services.gateway.operations import OperationIds, moment_of
from services.gateway.owners import PASSED_ON, Owners
from services.gateway.service import InferenceService
from services.runtime.call import Call, Caller, CallerKind
from services.runtime.dispatch import Binding, build_table
from services.runtime.errors import Failure, Reason, unavailable
from services.runtime.inproc import InprocChannel
from services.runtime.interceptors import inner_chain
from services.runtime.link import Replica
from services.runtime.metrics import Registry
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.unit.gateway.fakes import PRINCIPAL, SECRET, World, generate
from tests.unit.runtime.fakes import Lines

NAMES = ("gateway-1", "gateway-2", "gateway-3")


class Wire:
    """A channel that breaks when its other end is killed."""

    def __init__(self, inner: Any, lost: asyncio.Event) -> None:
        self._inner = inner
        self._lost = lost

    def unary_unary(self, method: str, **serializers: Any) -> Callable[..., Any]:
        call = self._inner.unary_unary(method, **serializers)

        async def over(request: Any, **options: Any) -> Any:
            return await self._until_lost(call(request, **options))

        return over

    def unary_stream(self, method: str, **serializers: Any) -> Callable[..., AsyncIterator[Any]]:
        call = self._inner.unary_stream(method, **serializers)

        async def over(request: Any, **options: Any) -> AsyncIterator[Any]:
            async with contextlib.aclosing(call(request, **options)) as replies:
                while True:
                    try:
                        reply = await self._until_lost(anext(replies))
                    except StopAsyncIteration:
                        return
                    yield reply

        return over

    async def _until_lost(self, work: Any) -> Any:
        async def run() -> Any:
            return await work

        task, lost = asyncio.create_task(run()), asyncio.create_task(self._lost.wait())
        try:
            await asyncio.wait((task, lost), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise unavailable("gateway", "the connection to gateway was lost during the call")
        finally:
            for one in (task, lost):
                one.cancel()
            with contextlib.suppress(BaseException):
                await task


class Mesh:
    """Gateways that know each other. Make it inside a running loop."""

    def __init__(self) -> None:
        self.lost = {name: asyncio.Event() for name in NAMES}
        self.drained: set[str] = set()
        self.worlds = {name: World(gateways=self, replica_id=f"{name}.first") for name in NAMES}
        self.metadata: list[Any] = []

    @property
    def replicas(self) -> list[Replica]:
        return [Replica(name, f"{name}.first") for name in NAMES if not self.lost[name].is_set() and name not in self.drained]

    def only(self, endpoint: str) -> Any:
        world = self.worlds[endpoint]
        servicer = InferenceService(world.core, world.loop.time, max_seconds=60.0)
        table = build_table(
            [Binding(servicer, inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"])],
            inner_chain(log=Lines(), registry=Registry(), slow_seconds=60.0),
        )
        return Wire(InprocChannel(lambda: table, Caller(CallerKind.SERVICE, "gateway")), self.lost[endpoint])

    def owner(self, request_id: str) -> str:
        """Which gateway owns the id of PRINCIPAL's key."""
        found = Owners(self, "nobody").find(f"{PRINCIPAL.tenant_id}/{PRINCIPAL.key_id}", request_id)
        assert found is not None
        return found.endpoint

    def others(self, request_id: str) -> list[World]:
        """Those that don't own it."""
        return [world for name, world in self.worlds.items() if name != self.owner(request_id)]

    def calls(self, method: str) -> int:
        """Calls of execution by all gateways."""
        return sum(len(world.execution.asked(method)) for world in self.worlds.values())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.001)


async def test_whichever_gateway_is_asked_one_runs_it_and_all_give_its_answer() -> None:
    mesh = Mesh()
    request = generate(request_id="r1")
    completions = await asyncio.gather(*(world.generate(request) for world in mesh.worlds.values() for _ in range(5)))
    assert mesh.calls("Complete") == 1
    assert mesh.worlds[mesh.owner("r1")].execution.asked("Complete")
    assert len({one.operation_id for one in completions}) == 1
    first = completions[0]
    for one in completions:
        assert one.answer == first.answer
        facts = (one.request_id, one.model, one.cost_nano_usd, one.created, one.cache_status)
        assert facts == (first.request_id, first.model, first.cost_nano_usd, first.created, first.cache_status)
        assert one.receipt() == first.receipt()
    # And replays it afterwards.
    again = await asyncio.gather(*(world.generate(request) for world in mesh.worlds.values()))
    assert {one.operation_id for one in again} == {first.operation_id}
    assert mesh.calls("Complete") == 1


async def test_ids_are_spread_and_stay_where_they_are_when_another_gateway_goes() -> None:
    mesh = Mesh()
    ids = [f"r{number}" for number in range(600)]
    before = {one: mesh.owner(one) for one in ids}
    assert min(Counter(before.values()).values()) > 150
    mesh.lost["gateway-2"].set()
    after = {one: mesh.owner(one) for one in ids}
    moved = [one for one in ids if before[one] != after[one]]
    assert moved == [one for one in ids if before[one] == "gateway-2"]
    assert min(Counter(after[one] for one in moved).values()) > 50


async def test_another_key_has_other_ids_of_the_same_name() -> None:
    mesh = Mesh()
    other = replace(PRINCIPAL, key_id="key-other")
    for world in mesh.worlds.values():
        await world.generate(generate(request_id="r1"))
        await world.generate(generate(request_id="r1"), principal=other)
    assert mesh.calls("Complete") == 2


async def test_another_body_is_refused_wherever_it_comes_in() -> None:
    mesh = Mesh()
    await mesh.others("r1")[0].generate(generate(request_id="r1"))
    for world in mesh.worlds.values():
        with pytest.raises(Failure) as refused:
            await world.generate(generate("something else", request_id="r1"))
        assert refused.value.reason is Reason.REQUEST_ID_REUSED


async def test_how_the_receipt_is_wanted_makes_no_other_request() -> None:
    mesh = Mesh()
    views = (inference_service_pb2.RECEIPT_VIEW_NONE, inference_service_pb2.RECEIPT_VIEW_FULL)
    for world in mesh.worlds.values():
        for view in views:
            request = generate(request_id="r1")
            request.receipt_view = view
            completion = await world.generate(request)
            # The core has it whatever was wished; the edges give it or don't. What was begun without has its attempts, too.
            assert completion.receipt().attempts
            assert request.receipt_view == view, "the caller's own request stays as it is"
    assert mesh.calls("Complete") == 1


async def test_a_stream_is_joined_from_its_first_piece_over_another_gateway() -> None:
    mesh = Mesh()
    owner, (one, two) = mesh.worlds[mesh.owner("r1")], mesh.others("r1")
    owner.execution.piece_gate = asyncio.Event()
    request = generate(request_id="r1")
    streams = [asyncio.create_task(world.stream(request)) for world in (one, owner, two)]
    await until(lambda: mesh.calls("StreamComplete"))
    late = one.core.stream(PRINCIPAL, request, accepted_wire=0, deadline=one.soon())
    opened = await anext(late)
    assert isinstance(opened, Opened)
    assert isinstance(await anext(late), execution_service_pb2.DeltaBatch)
    owner.execution.piece_gate.set()
    all_events = [*await asyncio.gather(*streams), [opened, *[event async for event in late]]]
    assert mesh.calls("StreamComplete") == 1
    texts = {
        "".join(delta.text for event in events if isinstance(event, execution_service_pb2.DeltaBatch) for delta in event.deltas)
        for events in all_events[:3]
    }
    assert len(texts) == 1
    assert texts != {""}
    ends = [events[-1] for events in all_events]
    assert all(isinstance(end, Completion) for end in ends)
    assert len({(end.operation_id, end.cost_nano_usd, end.answer.finish_reason, end.model) for end in ends}) == 1
    assert {end.answer.usage.output_token_count for end in ends} == {ends[0].answer.usage.output_token_count}
    # Whole, too, and as a stream afterwards.
    assert (await two.generate(request)).operation_id == opened.operation_id
    replayed = await two.stream(request)
    assert isinstance(replayed[0], Opened)
    assert replayed[-1].operation_id == opened.operation_id
    assert mesh.calls("StreamComplete") == 1


async def test_embeddings_are_shared_too() -> None:
    mesh = Mesh()
    request = inference_service_pb2.EmbedRequest(request_id="r1", model="a/one", inputs=["abc"])
    answers = await asyncio.gather(
        *(world.core.embed(PRINCIPAL, request, deadline=world.soon()) for world in mesh.worlds.values())
    )
    assert mesh.calls("Embed") == 1
    assert {answer.operation_id for answer in answers} == {answers[0].operation_id}


async def test_the_last_caller_to_leave_cancels_it_at_the_owner() -> None:
    mesh = Mesh()
    owner, (one, two) = mesh.worlds[mesh.owner("r1")], mesh.others("r1")
    owner.execution.gate = asyncio.Event()
    calls = [asyncio.create_task(world.generate(generate(request_id="r1"))) for world in (one, two)]
    await until(lambda: mesh.calls("Complete"))
    await asyncio.sleep(0.02)
    calls[0].cancel()
    await asyncio.sleep(0.02)
    assert owner.execution.cancelled_count == 0
    calls[1].cancel()
    await until(lambda: owner.execution.cancelled_count == 1)


async def test_when_the_owner_is_lost_the_next_one_runs_it_and_all_who_waited_get_that_answer() -> None:
    mesh = Mesh()
    name = mesh.owner("r1")
    owner, others = mesh.worlds[name], mesh.others("r1")
    owner.execution.gate = asyncio.Event()
    calls = [asyncio.create_task(world.generate(generate(request_id="r1"))) for world in others for _ in range(3)]
    await until(lambda: mesh.calls("Complete"))
    await asyncio.sleep(0.02)
    mesh.lost[name].set()
    completions = await asyncio.gather(*calls)
    assert len({one.operation_id for one in completions}) == 1
    assert sum(len(world.execution.asked("Complete")) for world in others) == 1
    assert sum(world.passing.lost_count for world in others) == 6


async def test_a_stream_that_has_begun_is_not_begun_again_when_its_owner_is_lost() -> None:
    mesh = Mesh()
    name = mesh.owner("r1")
    owner, (one, _) = mesh.worlds[name], mesh.others("r1")
    owner.execution.piece_gate = asyncio.Event()
    stream = one.core.stream(PRINCIPAL, generate(request_id="r1"), accepted_wire=0, deadline=one.soon())
    assert isinstance(await anext(stream), Opened)
    await anext(stream)
    mesh.lost[name].set()
    with pytest.raises(Failure) as lost:
        await anext(stream)
    assert (lost.value.reason, lost.value.metadata["dependency"]) == (Reason.DEPENDENCY_UNAVAILABLE, "gateway")
    assert mesh.calls("StreamComplete") == 1


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_operation_outlives_the_gateway_that_passed_it_on(streaming: bool) -> None:
    """Its caller has not left: it asks another gateway, and gets the answer of the same operation."""
    mesh = Mesh()
    owner = mesh.worlds[mesh.owner("r1")]
    gate = asyncio.Event()
    owner.execution.gate = gate
    passed = Call("Generate", owner.soon())

    async def stream() -> None:
        async for _ in owner.core.stream(
            PRINCIPAL, generate(request_id="r1"), accepted_wire=0, deadline=owner.soon(), passed_on=passed
        ):
            pass

    work: Any = (
        stream()
        if streaming
        else owner.core.generate(PRINCIPAL, generate(request_id="r1"), deadline=owner.soon(), passed_on=passed)
    )
    call = asyncio.create_task(work)
    await until(lambda: owner.execution.calls)
    passed.is_lost = True
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    gate.set()
    completion = await mesh.others("r1")[0].generate(generate(request_id="r1"))
    assert completion.operation_id
    assert owner.execution.cancelled_count == 0
    assert mesh.calls("Complete") + mesh.calls("StreamComplete") == 1


async def test_what_fails_at_the_owner_fails_for_its_caller_and_is_not_run_elsewhere() -> None:
    mesh = Mesh()
    owner, others = mesh.worlds[mesh.owner("r1")], mesh.others("r1")
    owner.execution.failures["Complete"] = unavailable("metering", "away")
    for world in others:
        with pytest.raises(Failure) as failed:
            await world.generate(generate(request_id="r1"))
        assert failed.value.metadata["dependency"] == "metering"
    assert all(not world.execution.asked("Complete") for world in others)


async def test_a_caller_has_its_own_deadline_at_another_gateway_too() -> None:
    mesh = Mesh()
    owner, (one, _) = mesh.worlds[mesh.owner("r1")], mesh.others("r1")
    owner.execution.gate = asyncio.Event()
    began = one.loop.time()
    with pytest.raises(Failure) as late:
        await one.generate(generate(request_id="r1"), seconds=0.1)
    assert late.value.reason is Reason.DEADLINE_EXCEEDED
    assert 0.05 < one.loop.time() - began < 1.0


async def test_a_draining_gateway_waits_for_what_it_has_passed_on() -> None:
    mesh = Mesh()
    owner, (one, _) = mesh.worlds[mesh.owner("r1")], mesh.others("r1")
    owner.execution.gate = asyncio.Event()
    call = asyncio.create_task(one.generate(generate(request_id="r1")))
    await until(lambda: mesh.calls("Complete"))
    one.core.close_admission()
    assert not await one.core.wait_idle(0.02)
    owner.execution.gate.set()
    await call
    assert await one.core.wait_idle(1.0)


@pytest.mark.parametrize(("kind", "runs_here"), [(CallerKind.ANONYMOUS, False), (CallerKind.SERVICE, True)])
async def test_only_a_service_can_say_that_a_request_was_passed_on(kind: CallerKind, runs_here: bool) -> None:
    mesh = Mesh()
    scope = f"{PRINCIPAL.tenant_id}/{PRINCIPAL.key_id}"
    one = mesh.others("r1")[0]
    servicer = InferenceService(one.core, one.loop.time, max_seconds=60.0)
    table = build_table(
        [Binding(servicer, inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"])],
        inner_chain(log=Lines(), registry=Registry(), slow_seconds=60.0),
    )
    stub: Any = InferenceServiceStub(InprocChannel(lambda: table, Caller(kind, "somebody")))  # type: ignore[call-overload]
    metadata = [(PASSED_ON, "1"), ("authorization", f"Bearer {SECRET}")]
    if kind is CallerKind.SERVICE:
        tenant, key = scope.split("/")
        metadata += [("x-sluice-tenant", tenant), ("x-sluice-project", PRINCIPAL.project_id), ("x-sluice-key", key)]
    await stub.Generate(generate(request_id="r1"), timeout=5.0, metadata=tuple(metadata))
    assert bool(one.execution.asked("Complete")) is runs_here
    assert mesh.calls("Complete") == 1


async def test_without_other_gateways_nothing_is_passed_on() -> None:
    world = World()
    await world.generate(generate(request_id="r1"))
    assert world.passing.passed_count == 0
    assert Owners(None, "me").find("acme/key", "r1") is None


async def test_a_gateway_that_is_not_yet_seen_by_itself_passes_on_to_those_that_are() -> None:
    mesh = Mesh()
    mesh.drained.add("gateway-1")
    for number in range(20):
        await mesh.worlds["gateway-1"].generate(generate(request_id=f"r{number}"))
    assert not mesh.worlds["gateway-1"].execution.asked("Complete")


def test_an_operation_id_tells_when_it_began() -> None:
    ids = OperationIds(lambda: 1_764_000_123_456_789_000)
    assert moment_of(ids.create()) == 1_764_000_123.456
    assert moment_of("") == 0.0
    assert moment_of("no id of ours") == 0.0
