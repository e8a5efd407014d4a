"""`sluice demo`: the main job from nothing to a table of receipts, on the embedded defaults and the real local model."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from services.cli import up
from services.cli.client import failures
from services.cli.jobs import state_words
from services.cli.rendering import answer_text, cache_words, lower_name, milliseconds, money, print_table
from services.cli.session import Session
from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import conversation_pb2, inference_service_pb2, receipt_pb2
from sluice.jobs.v1 import job_service_pb2 as jobs_pb2

LOCAL_MODEL: Final = "local/smollm2-135m-instruct"
DOWN_MODEL: Final = "down/primary"
QUESTION: Final = "What is the capital of France?"
PARAPHRASE: Final = "What's the capital city of France?"
SYSTEM: Final = "You are a helpful assistant."
"""Without it a model of this size babbles."""
_CALL_SECONDS: Final = 120.0


def demo_catalogue(source: Path) -> dict[str, Any]:
    """The default catalogue plus one provider that is down and a model there that falls back to the local one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    catalogue: dict[str, Any] = yaml.safe_load(source.read_text())
    catalogue["providers"]["down"] = {"kind": "openai", "base_url": f"http://127.0.0.1:{closed_port}/v1"}
    catalogue["models"][DOWN_MODEL] = {
        **catalogue["models"][LOCAL_MODEL],
        "provider": "down",
        "upstream_model": "primary",
        "aliases": [],
        "fallbacks": [LOCAL_MODEL],
        "price": "free",
    }
    return catalogue


@dataclass(slots=True)
class Demonstration:
    """The steps, and the receipts that they left."""

    session: Session
    receipts: list[tuple[str, receipt_pb2.Receipt]] = field(default_factory=list)

    def _request(self, text: str, *, model: str = LOCAL_MODEL) -> inference_service_pb2.GenerateRequest:
        conversation = conversation_pb2.Conversation(
            messages=[
                conversation_pb2.Message(role=conversation_pb2.ROLE_SYSTEM, parts=[conversation_pb2.Part(text=SYSTEM)]),
                conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)]),
            ],
            sampling=conversation_pb2.Sampling(temperature=0.0, seed=7),
            max_output_tokens=48,
        )
        return inference_service_pb2.GenerateRequest(
            conversation=conversation,
            routing=inference_service_pb2.RoutingWishes(model=model, allow_fallback=True),
            cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_SEMANTIC),
        )

    def _say(self, step: str, question: str) -> None:
        self.session.console.print(f"\n[bold]{step}[/]")
        self.session.console.print(f"> {question}", style="cyan", markup=False)

    def _generate(self, step: str, request: inference_service_pb2.GenerateRequest) -> receipt_pb2.Receipt:
        client = self.session.client
        with _waiting(self.session.errors, "the model is thinking"), failures():
            response = client.inference.Generate(request, timeout=_CALL_SECONDS, metadata=client.as_tenant)
        self.session.console.print(answer_text(response.answer), markup=False, highlight=False)
        self.receipts.append((step, response.receipt))
        return response.receipt

    def _expect(self, step: str, receipt: receipt_pb2.Receipt, *statuses: receipt_pb2.CacheStatus.ValueType) -> None:
        self.session.console.print(f"cache: {cache_words(receipt.cache)}", style="dim")
        if receipt.cache.status not in statuses:
            wanted = " or ".join(lower_name(receipt_pb2.CacheStatus.Name(s), "CACHE_STATUS_") for s in statuses)
            raise Failure(Reason.INTERNAL, f"step {step!r} wanted {wanted} of the cache and got {cache_words(receipt.cache)!r}")

    def first_answer(self) -> None:
        """A real completion; the model is loaded on the way."""
        self._say("1 · a first answer", QUESTION)
        receipt = self._generate("first answer", self._request(QUESTION))
        self._expect("first answer", receipt, receipt_pb2.CACHE_STATUS_MISS)

    def exact_hit(self) -> None:
        """The same request again."""
        self._say("2 · the same again", QUESTION)
        receipt = self._generate("exact hit", self._request(QUESTION))
        self._expect("exact hit", receipt, receipt_pb2.CACHE_STATUS_HIT_EXACT)

    def semantic_hit(self) -> None:
        """The same question in other words. The entry's vector is made after the answer went out, so this may need a moment."""
        self._say("3 · the same in other words", PARAPHRASE)
        request = self._request(PARAPHRASE)
        self._wait_for_semantic_entry(request)
        receipt = self._generate("semantic hit", request)
        self._expect("semantic hit", receipt, receipt_pb2.CACHE_STATUS_HIT_SEMANTIC)

    def _wait_for_semantic_entry(self, request: inference_service_pb2.GenerateRequest) -> None:
        client = self.session.client
        ends = time.monotonic() + 10.0
        with _waiting(self.session.errors, "the answer is being indexed"), failures():
            while time.monotonic() < ends:
                explained = client.inference.Explain(
                    inference_service_pb2.ExplainRequest(request=request), timeout=10.0, metadata=client.as_tenant
                )
                if explained.receipt.cache.status == receipt_pb2.CACHE_STATUS_HIT_SEMANTIC:
                    return
                time.sleep(0.1)

    def stream(self) -> None:
        """An answer as it is produced."""
        question = "Name three colors of the rainbow."
        self._say("4 · a stream", question)
        plain = self._request(question)
        request = inference_service_pb2.StreamGenerateRequest(
            conversation=plain.conversation, routing=plain.routing, cache=plain.cache
        )
        client = self.session.client
        count = 0
        with failures():
            for event in client.inference.StreamGenerate(request, timeout=_CALL_SECONDS, metadata=client.as_tenant):
                kind = event.WhichOneof("event")
                if kind == "delta":
                    count += 1
                    print(event.delta.text, end="", flush=True)
                elif kind == "closed":
                    self.receipts.append(("stream", event.closed.receipt))
        print()
        self.session.console.print(f"{count} pieces", style="dim")
        if not count:
            raise Failure(Reason.INTERNAL, "the stream had no piece")

    def job(self) -> None:
        """A request that runs later."""
        question = "Write one sentence about the sea."
        self._say("5 · an async job", question)
        client = self.session.client
        with failures():
            job = client.jobs.SubmitJob(
                jobs_pb2.SubmitJobRequest(request_id=f"demo-{time.time_ns()}", request=self._request(question)),
                timeout=10.0,
                metadata=client.as_tenant,
            ).job
            self.session.console.print(f"accepted as {job.id}", style="dim")
            with _waiting(self.session.errors, "the job runs"):
                watched = client.jobs.WatchJob(
                    jobs_pb2.WatchJobRequest(job_id=job.id), timeout=_CALL_SECONDS, metadata=client.as_tenant
                )
                for response in watched:
                    job = response.job
        if job.state != jobs_pb2.JOB_STATE_SUCCEEDED:
            raise Failure(Reason.INTERNAL, f"the job is {state_words(job)}: {job.error.message}")
        self.session.console.print(answer_text(job.response.answer), markup=False, highlight=False)
        self.receipts.append(("async job", job.response.receipt))

    def fallback(self) -> None:
        """The first provider is down; the next one answers."""
        question = "What color is a ripe banana?"
        self._say(f"6 · a fallback: {DOWN_MODEL} is down", question)
        receipt = self._generate("fallback", self._request(question, model=DOWN_MODEL))
        # Routing passes over a provider whose free probe failed; until the first probe is back, execution tries it and goes on.
        passed = [f"{fate.model} passed over ({fate.reason})" for fate in receipt.candidates if not fate.planned]
        tried = [
            f"{a.model} {lower_name(receipt_pb2.AttemptOutcome.Name(a.outcome), 'ATTEMPT_OUTCOME_')}" for a in receipt.attempts
        ]
        words = " → ".join([*passed, *tried])
        self.session.console.print(words, style="dim", markup=False, highlight=False)
        answered = receipt.attempts[-1].model if receipt.attempts else ""
        if answered != LOCAL_MODEL or len(passed) + len(tried) < 2:
            raise Failure(Reason.INTERNAL, f"the fallback should have answered from {LOCAL_MODEL}; what happened: {words}")

    def table(self) -> None:
        """What each step used, cost and took."""
        self.session.console.print()
        rows = []
        for step, receipt in self.receipts:
            usage = receipt.attempts[-1].usage if receipt.attempts else None
            rows.append(
                (
                    step,
                    receipt.attempts[-1].model if receipt.attempts else "cache",
                    cache_words(receipt.cache),
                    f"{usage.input_token_count} + {usage.output_token_count}" if usage is not None else "0 + 0",
                    money(receipt.hold_nano_usd),
                    money(receipt.cost_nano_usd),
                    len(receipt.attempts),
                    milliseconds(receipt.total_duration),
                )
            )
        columns = ("step", "answered by", "cache", "tokens", "held", "cost", "attempts", "latency")
        print_table(self.session.console, columns, rows, title="Receipts (the local model costs nothing: a written zero)")

    def run(self) -> None:
        """All steps in order; raises Failure at the first that did not show what it should."""
        self.first_answer()
        self.exact_hit()
        self.semantic_hit()
        self.stream()
        self.job()
        self.fallback()
        self.table()


@contextlib.contextmanager
def _waiting(console: Console, words: str) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(words, total=None)
        yield


def command(
    mesh: Annotated[bool, typer.Option("--mesh", help="One process per service instead of one for all.")] = False,
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", help="Keep the state here. Default: a temporary directory, removed at the end."),
    ] = None,
) -> None:
    """Starts everything on free ports, asks the real local model, shows cache, stream, job and fallback, prints receipts, stops."""
    began = time.monotonic()
    kept = state_dir is not None
    directory = state_dir or Path(tempfile.mkdtemp(prefix="sluice-demo-"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        catalogue = directory / "catalogue.yaml"
        catalogue.write_text(yaml.safe_dump(demo_catalogue(up.default_catalogue()), sort_keys=False))
        options = up.Options(state_dir=directory, mesh=mesh, port=0, grpc_port=0, catalogue=catalogue)

        async def demonstrate(running: up.Running) -> None:
            started = time.monotonic()
            await asyncio.to_thread(_steps, directory)
            print(f"\nstarted in {started - began:.1f} s, ran in {time.monotonic() - started:.1f} s")
            running.stop()

        up.run(options, demonstrate)
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def _steps(directory: Path) -> None:
    session = Session(directory, _CALL_SECONDS)
    with session:
        Demonstration(session).run()
