"""The scenarios of the issue `mesh`: counts, robustness against rubbish, survival of each service, CPU per request."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from services.cli.client import failures
from services.cli.demonstration import LOCAL_MODEL
from services.cli.state import Secrets
from services.runtime.errors import Failure
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2
from sluice.tokenization.v1 import tokenization_service_pb2
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.bench import scenarios as bench
from tests.conversations import conversation
from tests.proof import kills, malformed
from tests.proof.parallel import each
from tests.proof.registry import Context, Result, Scenario
from tests.running import running

UNLIMITED: Final = {"metering": {"bootstrap_requests_per_minute": -1, "bootstrap_concurrency": -1}}
ESTIMATED_MODEL: Final = "anthropic/claude-haiku-4-5"
COVERAGE: Final = 0.99
_CALL_SECONDS: Final = 60.0
_AT_ONCE: Final = 4
"""As many as the local model runs at once."""
_OBSERVATIONS: Final = 200
"""In one report to the estimator."""


def count_equals_llama_cpp(context: Context) -> Result:
    """Asks the mesh for an answer to each conversation: its receipt has our count, its usage what llama.cpp counted."""
    number = context.size(long=1000, short=20)
    seed = random.Random(20261124)
    wrong: list[str] = []
    with (
        running("compact", sections=UNLIMITED) as started,
        started.client() as client,
        context.track("conversations", number) as step,
    ):

        def ask(made: conversation_pb2.Conversation) -> str:
            made.max_output_tokens = 1
            request = inference_service_pb2.GenerateRequest(
                conversation=made,
                routing=inference_service_pb2.RoutingWishes(model=LOCAL_MODEL, allow_fallback=False),
                cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
            )
            try:
                with failures():
                    response = client.inference.Generate(request, timeout=_CALL_SECONDS, metadata=client.as_tenant)
            except Failure as failure:
                return f"refused: {failure.reason.value}: {failure.message[:200]}"
            ours, theirs = response.receipt.input_count, response.answer.usage
            if ours.method != receipt_pb2.TOKEN_COUNT_METHOD_EXACT or theirs.source != answer_pb2.USAGE_SOURCE_REPORTED:
                return "the count is not exact, or llama.cpp reported none"
            if ours.token_count != theirs.input_token_count:
                last = made.messages[-1].parts[0].text
                return f"we count {ours.token_count}, llama.cpp {theirs.input_token_count}; the last turn is {last[:80]!r}"
            return ""

        # Whether the model's child starts is not what is measured.
        ask(conversation(random.Random(0)))
        for complaint in each(ask, (conversation(seed) for _ in range(number)), at_once=_AT_ONCE):
            if complaint:
                wrong.append(complaint)
            step()
    return Result(number, f"{number - len(wrong)} equal", f"{number} equal", not wrong, wrong)


def estimator_bound(context: Context) -> Result:
    """Asks the running tokenization service for the estimate and, of the same conversation, for the exact count.

    First as a fresh estimator answers, which knows nothing of the model, then after it has seen what a provider reports.
    """
    number = context.size(long=1000, short=400)
    with running("compact") as started, started.channel("tokenization") as channel:
        stub = TokenizationServiceStub(channel)
        as_service = (("authorization", f"Bearer {Secrets.load_or_create(started.directory).service_token}"),)

        def counts(made: conversation_pb2.Conversation) -> tuple[receipt_pb2.TokenCount, int]:
            request = tokenization_service_pb2.CountRequest(models=[ESTIMATED_MODEL, LOCAL_MODEL], conversation=made)
            with failures():
                estimate, exact = stub.Count(request, timeout=_CALL_SECONDS, metadata=as_service).counts
            assert estimate.method == receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED
            assert exact.method == receipt_pb2.TOKEN_COUNT_METHOD_EXACT
            return estimate, exact.token_count

        def covered(seed: int, step: Callable[[], None]) -> tuple[float, float]:
            rng = random.Random(seed)
            inside, bounds = 0, 0.0
            for _ in range(number):
                estimate, exact = counts(conversation(rng))
                inside += abs(exact - estimate.token_count) <= estimate.error_bound * estimate.token_count
                bounds += estimate.error_bound
                step()
            return inside / number, bounds / number

        with context.track("estimates", 2 * number + 1200) as step:
            fresh, wide = covered(1, step)
            rng = random.Random(2)
            for _ in range(1200 // _OBSERVATIONS):
                seen = []
                for _ in range(_OBSERVATIONS):
                    made = conversation(rng)
                    seen.append(
                        tokenization_service_pb2.Observation(
                            model=ESTIMATED_MODEL,
                            conversation=made,
                            reported=answer_pb2.Usage(
                                input_token_count=counts(made)[1], source=answer_pb2.USAGE_SOURCE_REPORTED
                            ),
                        )
                    )
                    step()
                with failures():
                    stub.Calibrate(
                        tokenization_service_pb2.CalibrateRequest(observations=seen), timeout=_CALL_SECONDS, metadata=as_service
                    )
            learnt, narrow = covered(3, step)
    measured = f"{fresh:.1%} covered by ±{wide:.0%} fresh, {learnt:.1%} by ±{narrow:.0%} calibrated"
    return Result(2 * number, measured, f"both >= {COVERAGE:.0%}", min(fresh, learnt) >= COVERAGE)


def malformed_requests(context: Context) -> Result:
    """Sends rubbish of many kinds to every port of a compact mesh, over HTTP and gRPC, then a proper request."""
    number = context.size(long=10_000, short=1000)
    with running("compact", sections=UNLIMITED) as started, context.track("requests", number) as step:
        pids = dict(started.ready.pids)
        seen = malformed.send(started, number, step)
        crashes = seen.unanswered
        complaints = list(seen.complaints)
        if started.process.poll() is not None or dict(started.ready.pids) != pids:
            crashes += 1
            complaints.insert(0, "a process ended")
        else:
            kills.ask(started.ready)
        traces = malformed.stack_traces(started)
    measured = f"{crashes} crashes, {seen.internal} INTERNAL or 500, {len(traces) + seen.leaked} stack traces"
    return Result(number, measured, "0, 0, 0", not complaints and not traces, (*complaints, *traces))


def kill_each_service(context: Context) -> Result:
    """Kills each process of a mesh in turn under load."""
    rounds = context.size(long=5, short=1)
    with running("mesh", sections=UNLIMITED) as started:
        names = list(started.ready.pids)
        with context.track("kills", rounds * len(names)) as step:
            seen = kills.kill_in_turn(started, names * rounds, step)
    worst = max(seen.kills, key=lambda one: one.recovery_seconds)
    measured = (
        f"worst recovery {worst.recovery_seconds:.1f} s ({worst.name}), {seen.late} of {seen.requests} requests past their "
        f"deadline, {sum(one.flipped for one in seen.kills)} health flips"
    )
    bound = f"<= {kills.RECOVERY_SECONDS:g} s, 0, {len(seen.kills)}"
    ok = worst.recovery_seconds <= kills.RECOVERY_SECONDS and not seen.late and all(one.flipped for one in seen.kills)
    return Result(len(seen.kills), measured, bound, ok, seen.details())


def _benched(topology: str, name: str) -> Callable[[Context], Result]:
    def run(context: Context) -> Result:
        plan = bench.SHORT if context.short else bench.FULL
        (scenario,) = [one for one in bench.SCENARIOS if one.name == name]
        with context.track(f"{topology}.{name}", 1), bench.stand(topology) as stand:
            figure = bench.measure(stand, scenario, plan)
        if figure.void or figure.bound is None:
            return Result(0, "void", figure.mark.text, False, (figure.void,))
        unit = "µs/chunk" if figure.mark.chunk_us is not None else "µs"
        ratio = figure.spread(lambda one: one.ratio)[1]
        measured = f"{figure.measured:.0f} {unit} of CPU, {ratio:.1f} times a bare proxy"
        details = (figure.note,) if figure.note else ()
        return Result(
            sum(one.product.ok for one in figure.rounds),
            measured,
            f"<= {figure.bound:.0f} {unit}",
            figure.verdict == "ok",
            details,
        )

    return run


SCENARIOS: Final = (
    Scenario(
        "mesh.count_equals_llama_cpp",
        "our exact counts are those that llama.cpp bills, in generated conversations",
        count_equals_llama_cpp,
    ),
    Scenario("mesh.estimator_bound", "the stated error bound of estimates holds", estimator_bound),
    Scenario(
        "mesh.malformed_requests",
        "rubbish over HTTP and gRPC crashes nothing and is nobody's fault but the caller's",
        malformed_requests,
    ),
    Scenario("mesh.kill_each_service", "after kill -9 of any process requests succeed again", kill_each_service),
    *(
        Scenario(
            f"mesh.bench_{scenario.name}_{topology}", f"CPU per request: {scenario.summary}", _benched(topology, scenario.name)
        )
        for topology, scenario in bench.select(())
        if topology in scenario.marks
    ),
)
