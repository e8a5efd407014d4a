"""One seed: the settings, the faults, the callers, the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from services.metering.accounts import Key, Limits, Tenant
from services.metering.adapters.sqlite import verify_connection
from services.metering.ledger import GENESIS, Head
from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from sluice.metering.v1 import metering_service_pb2
from tests.simulation import disk as disks
from tests.simulation import peers
from tests.simulation.checks import at_a_confirmation, at_an_answer, at_commit, at_the_end, when_quiet, when_settled
from tests.simulation.network import Channel, Network, Node
from tests.simulation.nodes import Execution, Gateway, Metering, Settings
from tests.simulation.store import empty_database
from tests.simulation.universe import Killed, Loop, Universe, governed
from tests.simulation.vendor import Vendor

TENANT: Final = "acme"
KEYS: Final = ("key-1", "key-2")
_TROUBLE_SECONDS: Final = 12.0
_QUIET_SECONDS: Final = 14.0
"""The longest call, and the pauses of a spool whose ledger was away."""
_SETTLE_SECONDS: Final = 18.0
"""Until what nobody needs any more is free, whoever was killed: 15 s, and what the store takes to look."""
_EXPIRY_SECONDS: Final = 90.0
"""Until every hold and lease is over."""
_MOST_KILLS: Final = 12
_FAULTS: Final = frozenset((Reason.INTERNAL, Reason.REQUEST_INVALID, Reason.REQUEST_ID_REUSED, Reason.STATE_CONFLICT))
"""What no caller of this simulation may be told."""

_EXECUTED: Final = frozenset(
    f"/sluice.execution.v1.ExecutionService/{method}" for method in ("Complete", "StreamComplete", "Embed")
)
"""Calls that spend money."""

Process = Gateway | Execution | Metering
Break = Callable[["World"], contextlib.AbstractContextManager[None]]
"""Plants a bug while it is open."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """How much goes wrong. Probabilities: for each turn of a process, point, call, write, commit."""

    kill_at_turn: float
    kill_at_point: float
    stall: float
    network: float
    disk: float
    commit: float
    vendor: float
    drains: int
    power: float
    """Of the kills of execution, those in which the whole machine loses power."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A caller has received the last byte."""

    caller: str
    request_id: str
    operation_id: str
    cost: int


@dataclass(frozen=True, slots=True)
class Question:
    """What a caller asks, as often as it likes."""

    call: Callable[[float, tuple[tuple[str, str], ...]], Coroutine[Any, Any, tuple[str, int]]]
    key: str
    request_id: str

    def put(self, timeout: float) -> Coroutine[Any, Any, tuple[str, int]]:
        """The operation's id and its cost. Raises Failure."""
        return self.call(timeout, (("authorization", f"Bearer {self.key}"),))


async def _generated(call: Awaitable[Any]) -> tuple[str, int]:
    response = await call
    return response.operation_id, response.cost_nano_usd


_embedded = _generated


async def _streamed(replies: Any) -> tuple[str, int]:
    operation_id = ""
    async with contextlib.aclosing(replies):
        async for reply in replies:
            if reply.HasField("opened"):
                operation_id = reply.opened.operation_id
            elif reply.HasField("closed"):
                return operation_id, reply.closed.cost_nano_usd
    raise Failure(Reason.INTERNAL, "the stream ended without its end")


def _conversation(text: str, **fields: Any) -> conversation_pb2.Conversation:
    part = conversation_pb2.Part(text=text)
    return conversation_pb2.Conversation(
        messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[part])], **fields
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a seed."""

    seed: int
    problems: tuple[str, ...]
    trace: tuple[str, ...]
    steps: int
    seconds: float
    """Of the clock in there."""
    counts: Mapping[str, int]
    killed_at: frozenset[tuple[str, int]]

    @property
    def digest(self) -> str:
        """Of the whole trace."""
        return hashlib.blake2b("\n".join(self.trace).encode(), digest_size=8).hexdigest()


@dataclass(slots=True)
class Records:
    """What the simulation knows beside the product, to hold it against."""

    starts: dict[str, metering_service_pb2.Settlement] = field(default_factory=dict)
    settles: dict[str, metering_service_pb2.Settlement] = field(default_factory=dict)
    answered: list[Answered] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    """By reason."""
    holds: dict[str, int] = field(default_factory=dict)
    """What was held for an operation when it was sent to execution."""
    asked_again: set[str] = field(default_factory=set)
    """Operations whose Hold arrived a second time: that one may be granted after the first was refused or freed, unknown to anybody."""
    kills: int = 0
    killed_at: set[tuple[str, int]] = field(default_factory=set)
    """File and line of what waited in a process that was killed."""


class World:
    """Everything of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.universe = universe = Universe(seed)
        rng = universe.rng
        self.settings = Settings(
            slice_nano_usd=rng.choice([150_000, 400_000, 1_000_000]),
            recall_factor=rng.choice([1, 20]),
            linger=rng.choice([0.0, 1.0, 5.0]),
            lease_seconds=rng.choice([4.0, 10.0, 15.0]),
            grace_seconds=45.0,
            uncounted_bytes=rng.choice([0, 8192]),
            segment_bytes=rng.choice([4096, 1 << 16]),
            requests_per_minute=rng.choice([-1, -1, -1, -1, -1, 30]),
            concurrency=rng.choice([4, 16, 50, 50]),
        )
        self.trouble = Trouble(
            kill_at_turn=rng.choice([0.0, 0.0003, 0.001, 0.003]),
            kill_at_point=rng.choice([0.0, 0.01, 0.04]),
            stall=rng.choice([0.0, 0.0005, 0.002]),
            network=rng.choice([0.0, 0.03, 0.1, 0.25]),
            disk=rng.choice([0.0, 0.0, 0.0, 0.05]),
            commit=rng.choice([0.0, 0.0, 0.05, 0.2]),
            vendor=rng.choice([0.0, 0.1, 0.3]),
            drains=rng.choice([0, 0, 1, 2]),
            power=rng.choice([0.0, 0.0, 0.3]),
        )
        self.tenant_budget = rng.choice([None, 500_000, 1_000_000, 2_500_000, 20_000_000])
        self.key_budgets = {key: rng.choice([None, None, 400_000, 1_500_000]) for key in KEYS}
        self.gateways = rng.choice([1, 1, 2])
        self.executions = rng.choice([1, 1, 2])
        self.operations = rng.randint(6, 14)
        self.records = Records()
        self.problems: list[str] = []
        self.book = peers.book()
        self.network = Network(universe, reliable=frozenset({"peers"}), watch=self._watched, again=self._again)
        self.disk = disks.Disk(universe, self._recorded)
        self.vendor = Vendor(universe, universe.loop("vendor"), peers.prices(self.book))
        self.connection = empty_database()
        self.processes: dict[str, Process] = {}
        """By the name of their place."""
        self._incarnations: dict[str, int] = {}
        self._in_trouble = False
        self.revoked: set[str] = set()
        self.head = Head(0, GENESIS)
        self.callers = self._node("callers", "callers")

    # What is watched.

    def _recorded(self, kind: int, record: metering_service_pb2.Settlement) -> None:
        (self.records.starts if kind == disks.START else self.records.settles)[record.attempt_id] = record

    def _watched(self, client: Node, method: str, request: Any, is_answered: bool) -> None:
        if method in _EXECUTED:
            self.records.holds[request.operation_id] = request.billing.hold_nano_usd
        elif method.endswith("/PostSettlements") and is_answered:
            at_a_confirmation(self, [settlement.attempt_id for settlement in request.settlements])

    def _again(self, method: str, data: bytes) -> None:
        if method.endswith("/Hold"):
            self.records.asked_again.add(metering_service_pb2.HoldRequest.FromString(data).operation_id)

    def wrong(self, text: str) -> None:
        """Something that was promised doesn't hold."""
        if text not in self.problems:
            self.problems.append(text)
            self.universe.log(f"!!! {text}")

    # Processes.

    def _node(self, name: str, service: str) -> Node:
        node = Node(name, service, self.universe.loop(name))
        self.network.nodes.append(node)
        return node

    def boot(self, place: str) -> None:
        """Starts the process of a place, `gateway-0`; what it finds is what an earlier one left on disk."""
        service = place.partition("-")[0]
        number = self._incarnations[place] = self._incarnations.get(place, 0) + 1
        node = self._node(f"{place}.{number}", service)
        self.universe.log(f"{node.name} boots")
        node.loop.killable = True
        asyncio._set_running_loop(node.loop)
        try:
            process = self._made(place, service, node)
        finally:
            asyncio._set_running_loop(None)
        self.processes[place] = process
        node.loop.spawn(process.start())

    def _made(self, place: str, service: str, node: Node) -> Process:
        if service == "gateway":
            return Gateway(node, self.network, self.settings)
        if service == "execution":
            return Execution(node, self.network, self.settings, self.disk, place, self.vendor)
        fails = self.trouble.commit if self._in_trouble else 0.0
        return Metering(node, self.settings, self.connection, self.book, fails, lambda: at_commit(self))

    def kill(self, process: Process, why: str) -> None:
        """As `kill -9` does."""
        node = process.node
        self.universe.log(f"KILL {node.name} {why}")
        if self._in_trouble:
            self.records.killed_at.update(node.loop.places())
        node.serving = False
        self.universe.kill(node.loop)
        self.network.died(node)
        self.disk.released(node.loop)
        process.died()

    def _place_of(self, loop: Loop) -> str:
        return loop.name.rpartition(".")[0]

    def _kill_and_restart(self, loop: Loop, why: str) -> None:
        place = self._place_of(loop)
        self.records.kills += 1
        self.kill(self.processes[place], why)
        if place.startswith("execution") and self.universe.may(self.trouble.power):
            self.universe.log(f"POWER LOST {place}")
            self.disk.power_lost(place, loop)
        self.callers.loop.call_later(0.02 + 3.0 * self.universe.rng.random() ** 2, self.boot, place)

    def _turn(self, loop: Loop) -> None:
        if not self._in_trouble or self.records.kills >= _MOST_KILLS:
            return
        drawn = self.universe.rng.random()
        trouble = self.trouble
        if drawn < trouble.kill_at_turn:
            self._kill_and_restart(loop, "between turns")
        elif drawn < trouble.kill_at_turn + trouble.stall:
            loop.stalled_until = self.universe.now + self.universe.rng.choice([0.05, 0.5, 3.0])
            self.universe.log(f"STALL {loop.name} until {loop.stalled_until:.6f}")

    def _point(self, loop: Loop, what: str) -> None:
        if not self._in_trouble or self.records.kills >= _MOST_KILLS or not loop.killable:
            return
        if self.universe.may(self.trouble.kill_at_point):
            self._kill_and_restart(loop, what)
            raise Killed

    async def _drain(self, after: float) -> None:
        await asyncio.sleep(after)
        place = self.universe.rng.choice(sorted(self.processes))
        process = self.processes[place]
        if not process.node.serving:
            return
        self.universe.log(f"DRAIN {process.node.name}")
        await self._drained(process)
        if self.processes[place] is process and process.node.loop.alive:
            self.kill(process, "drained")
            self.boot(place)

    async def _revoke(self, key: str, after: float) -> None:
        """Ends a key. The gateways are told as NATS would tell them, or find out when they ask again."""
        await asyncio.sleep(after)
        self.universe.log(f"REVOKE {key}")
        self.revoked.add(key)
        self.connection.execute("UPDATE keys SET revoke_time = ? WHERE id = ?", (time.time(), key))
        for process in self.processes.values():
            if isinstance(process, Gateway) and self.universe.may(0.7):
                process.node.loop.call_later(self.universe.pause(), process.around.identities.revoke, _digest(key), None)

    async def _drained(self, process: Process) -> None:
        # The callers' loop waits for another one: through what both can see.
        task = process.node.loop.spawn(process.drain())
        while not task.done() and process.node.loop.alive:
            await asyncio.sleep(0.05)

    # Callers.

    def _stub(self) -> Any:
        channel: Any = Channel(self.network, self.callers, "gateway")
        return InferenceServiceStub(channel)

    async def _caller(self, number: int, stub: Any) -> None:
        rng = self.universe.rng
        await asyncio.sleep(rng.random() * (_TROUBLE_SECONDS - 2.0))
        ask = self._question(number, stub)
        together = 2 if ask.request_id and self.universe.may(0.3) else 1
        async with asyncio.TaskGroup() as group:
            for copy in range(together):
                group.create_task(self._ask(f"caller {number}.{copy}", ask))

    def _question(self, number: int, stub: Any) -> Question:
        rng, may = self.universe.rng, self.universe.may
        request_id = f"id-{number}" if may(0.4) else ""
        text = f"request {number if may(0.85) else 0} " + "word " * rng.randint(0, 20)
        key = rng.choice(KEYS)
        if may(0.15):
            wanted = inference_service_pb2.EmbedRequest(
                request_id=request_id, model=rng.choice(peers.MODELS), inputs=[text] * 5
            )
            return Question(
                lambda timeout, metadata: _embedded(stub.Embed(wanted, timeout=timeout, metadata=metadata)), key, request_id
            )
        fields: dict[str, Any] = {
            "request_id": request_id,
            "conversation": _conversation(text),
            "receipt_view": rng.choice([inference_service_pb2.RECEIPT_VIEW_NONE, inference_service_pb2.RECEIPT_VIEW_FULL]),
        }
        if may(0.8):
            fields["conversation"].max_output_tokens = rng.randint(4, 60)
        if may(0.5):
            fields["cache"] = inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF)
        if may(0.4):
            streamed = inference_service_pb2.StreamGenerateRequest(**fields)
            return Question(
                lambda timeout, metadata: _streamed(stub.StreamGenerate(streamed, timeout=timeout, metadata=metadata)),
                key,
                request_id,
            )
        whole = inference_service_pb2.GenerateRequest(**fields)
        return Question(
            lambda timeout, metadata: _generated(stub.Generate(whole, timeout=timeout, metadata=metadata)), key, request_id
        )

    async def _ask(self, name: str, question: Question) -> None:
        rng = self.universe.rng
        for _ in range(rng.randint(1, 3)):
            timeout = rng.choice([0.5, 2.0, 6.0])
            patience = rng.random() * 2.0 if self.universe.may(0.2) else 100.0
            try:
                async with asyncio.timeout(patience):
                    operation_id, cost = await question.put(timeout)
            except Failure as failure:
                reason = failure.reason.value
                self.records.failed[reason] = self.records.failed.get(reason, 0) + 1
                self.universe.log(f"{name} fails: {reason}")
                if failure.reason in _FAULTS:
                    self.wrong(f"{name}: {failure!r}")
            except TimeoutError:
                self.universe.log(f"{name} leaves")
                return
            else:
                self._answered(Answered(name, question.request_id, operation_id, cost))
                return
            await asyncio.sleep(rng.random())

    def _answered(self, answered: Answered) -> None:
        self.universe.log(f"{answered.caller} has its answer, {answered.operation_id}, {answered.cost}")
        self.records.answered.append(answered)
        at_an_answer(self, answered.operation_id)

    # The course of a seed.

    def run(self, plant: Break | None = None) -> None:
        """From the first process to the last check. `plant`: a bug, from when the accounts have been made."""
        self._make_accounts()
        with plant(self) if plant else contextlib.nullcontext():
            self._run()

    def _run(self) -> None:
        universe = self.universe
        self._set_up()
        universe.turn, universe.point = self._turn, self._point
        self._set_trouble(True)
        begun = universe.now
        stub = self._stub()
        callers = [self.callers.loop.spawn(self._caller(number, stub)) for number in range(self.operations)]
        if universe.may(0.1):
            self.callers.loop.spawn(self._revoke(KEYS[1], universe.rng.random() * _TROUBLE_SECONDS))
        for _ in range(self.trouble.drains):
            self.callers.loop.spawn(self._drain(universe.rng.random() * _TROUBLE_SECONDS))
        universe.run(begun + _TROUBLE_SECONDS, lambda: False)
        self._set_trouble(False)
        universe.log("--- the trouble is over")
        if not universe.run(universe.now + 40.0, lambda: all(caller.done() for caller in callers)):
            self.wrong("callers still wait")
        for caller in callers:
            if caller.done() and caller.exception() is not None:
                self.wrong(f"a caller: {caller.exception()!r}")
        universe.run(universe.now + _QUIET_SECONDS, lambda: False)
        when_quiet(self)
        universe.run(universe.now + _SETTLE_SECONDS, lambda: False)
        when_settled(self)
        self.head = verify_connection(self.connection, None).head
        self._stop_gateways()
        universe.log("--- until everything has expired")
        universe.run(universe.now + _EXPIRY_SECONDS, lambda: False)
        at_the_end(self)
        self._ask_once_more(stub)
        self.problems += universe.complaints

    def _make_accounts(self) -> None:
        universe = self.universe
        peers_node = self._node("peers", "peers")
        peers_node.serve(peers.bindings(self.book))
        self.boot("metering-0")
        metering = self.processes["metering-0"]
        assert isinstance(metering, Metering)
        task = metering.node.loop.spawn(self._accounts(metering))
        universe.run(universe.now + 10.0, task.done)
        task.result()

    def _set_up(self) -> None:
        universe = self.universe
        for number in range(self.executions):
            self.boot(f"execution-{number}")
        for number in range(self.gateways):
            self.boot(f"gateway-{number}")
        universe.run(universe.now + 0.5, lambda: False)

    async def _accounts(self, metering: Metering) -> None:
        store = metering.store
        await store.create_tenant(Tenant(TENANT, "", Limits(budget_nano_usd=self.tenant_budget), time.time()), "")
        for name in KEYS:
            limits = Limits(budget_nano_usd=self.key_budgets[name])
            digest = _digest(name)
            await store.create_key(Key(name, digest, TENANT, "default", "", "", ("inference",), (), limits, time.time()))

    def _set_trouble(self, on: bool) -> None:
        trouble = self.trouble
        self._in_trouble = on
        self.network.trouble = trouble.network if on else 0.0
        self.disk.fails = trouble.disk if on else 0.0
        self.vendor.trouble = trouble.vendor if on else 0.0
        metering = self.processes["metering-0"]
        assert isinstance(metering, Metering)
        metering.store.fails = trouble.commit if on else 0.0

    def _stop_gateways(self) -> None:
        universe = self.universe
        for place in [place for place in self.processes if place.startswith("gateway")]:
            process = self.processes.pop(place)
            if universe.may(0.5):
                task = self.callers.loop.spawn(self._drained(process))
                universe.run(universe.now + 20.0, task.done)
            self.kill(process, "at the end")

    def _ask_once_more(self, stub: Any) -> None:
        """Nothing is reserved any more: who has the money for a request must not be refused."""
        universe = self.universe
        for key in KEYS:
            self.boot("gateway-9")
            universe.run(universe.now + 0.5, lambda: False)
            self._probe(stub, key)
            universe.run(universe.now + 2.0, lambda: False)
            # With it go the requests that were set aside for it; those of a minute come back with time.
            self.kill(self.processes.pop("gateway-9"), "at the end")
            if self.settings.requests_per_minute >= 0:
                universe.run(universe.now + 60.0, lambda: False)
        at_the_end(self, expired=False)

    def _probe(self, stub: Any, key: str) -> None:
        universe = self.universe
        wanted = inference_service_pb2.GenerateRequest(
            conversation=_conversation("the last one", max_output_tokens=5),
            cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
        )
        question = Question(
            lambda timeout, metadata: _generated(stub.Generate(wanted, timeout=timeout, metadata=metadata)), key, ""
        )
        left = self.left(key)
        task = self.callers.loop.spawn(question.put(30.0))
        if not universe.run(universe.now + 40.0, task.done):
            self.wrong(f"the last request of {key} never ended")
            return
        error = task.exception()
        reason = error.reason if isinstance(error, Failure) else None
        if error is None:
            self._answered(Answered(f"the last of {key}", "", *task.result()))
        elif key in self.revoked and reason is Reason.KEY_INVALID:
            universe.log(f"{key} is revoked")
        elif left is not None and left < _PROBE_COST and reason is Reason.BUDGET_EXHAUSTED:
            universe.log(f"the last of {key} is refused with {left} left")
        else:
            self.wrong(f"{key} has {left} left and is refused: {error!r}")

    def left(self, key: str) -> int | None:
        """What the tightest budget above a key has left; None: there is none."""
        rows = self.connection.execute(
            "SELECT budget - spent - held FROM accounts WHERE budget IS NOT NULL AND name IN (?, ?, ?)",
            (f"key/{key}", f"project/{TENANT}/default", f"tenant/{TENANT}"),
        )
        return min((row[0] for row in rows), default=None)


_PROBE_COST: Final = 60_000
"""More than the request costs at most at either model."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def simulate(seed: int, plant: Break | None = None) -> Outcome:
    """Runs one seed."""
    was_on = gc.isenabled()
    # When something is collected would depend on what ran before. So nothing is, and at the end what is of this seed alone.
    gc.disable()
    gc.freeze()
    try:
        world = World(seed)
        with governed(world.universe), disks.mounted(world.disk):
            begun = world.universe.now
            world.run(plant)
            seconds = world.universe.now - begun
        world.connection.close()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
    records = world.records
    counts = {
        "answered": len(records.answered),
        "failed": sum(records.failed.values()),
        "kills": records.kills,
        "attempts": len(records.starts),
        "calls": world.network.count,
    }
    universe = world.universe
    killed_at = frozenset(records.killed_at)
    return Outcome(seed, tuple(world.problems), tuple(universe.trace), universe.step_count, seconds, counts, killed_at)
