"""The `sluice` command."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from services import __version__
from services.cli import accounts, demonstration, doctor, export, up
from services.cli.client import failures, pages
from services.cli.jobs import jobs
from services.cli.ledger import ledger
from services.cli.rendering import (
    money,
    open_console,
    print_failure,
    print_json,
    print_receipt,
    print_table,
)
from services.cli.session import JsonOption, KeyOption, Session, StateDirOption, TimeoutOption
from services.cli.state import READY_NAME, Ready, default_state_dir
from services.runtime.config import ConfigError
from services.runtime.errors import Failure, invalid
from sluice.inference.v1 import conversation_pb2, inference_service_pb2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(accounts.tenants, name="tenants")
app.add_typer(accounts.keys, name="keys")
app.add_typer(jobs, name="jobs")
app.add_typer(ledger, name="ledger")
accounts.usage.command("export")(export.command)
app.add_typer(accounts.usage, name="usage")
app.command("up")(up.command)
app.command("demo")(demonstration.command)
app.command("doctor")(doctor.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sluice {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Sluice: LLM inference, metered, cached and routed. Start it with `sluice up`; any OpenAI or Anthropic client can then point at the
    printed URL.
    """


ModelOption = Annotated[str, typer.Option(help="Model or policy/NAME; empty: the default policy.")]
CACHE_MODES = {
    "": inference_service_pb2.CACHE_MODE_UNSPECIFIED,
    "off": inference_service_pb2.CACHE_MODE_OFF,
    "exact": inference_service_pb2.CACHE_MODE_EXACT,
    "semantic": inference_service_pb2.CACHE_MODE_SEMANTIC,
    "refresh": inference_service_pb2.CACHE_MODE_REFRESH,
}
CacheOption = Annotated[str, typer.Option(help="off, exact, semantic or refresh; empty: as the namespace is configured.")]


def _wishes(cache: str) -> inference_service_pb2.CacheWishes:
    if cache not in CACHE_MODES:
        raise invalid("--cache", f"{cache!r} is not one of off, exact, semantic, refresh")
    return inference_service_pb2.CacheWishes(mode=CACHE_MODES[cache])


def _message(role: conversation_pb2.Role.ValueType, text: str) -> conversation_pb2.Message:
    return conversation_pb2.Message(role=role, parts=[conversation_pb2.Part(text=text)])


@app.command("env")
def environment(
    sdk: Annotated[
        bool, typer.Option("--sdk", help="Also what the SDKs of OpenAI and Anthropic read: their URL and key.")
    ] = False,
    state_dir: StateDirOption = None,
) -> None:
    """Prints addresses and key of the running `up` as shell exports: eval "$(sluice env)"."""
    ready = Ready.read((state_dir or default_state_dir()) / READY_NAME)
    values = {
        "SLUICE_URL": ready.http,
        "SLUICE_KEY": ready.key,
        "SLUICE_ADMIN_KEY": ready.admin_key,
        **{f"SLUICE_{name.upper().replace('-', '_')}": address for name, address in ready.grpc.items()},
    }
    if sdk:
        # Only when asked for: a `sluice up` started in the same shell would take them for the providers' own.
        values |= {"OPENAI_BASE_URL": f"{ready.http}/v1", "OPENAI_API_KEY": ready.key}
        values |= {"ANTHROPIC_BASE_URL": ready.http, "ANTHROPIC_API_KEY": ready.key}
    for name, value in values.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; `-` reads standard input. Without it: a conversation.")
    ] = None,
    model: ModelOption = "",
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)] = None,
    cache: CacheOption = "",
    receipt: Annotated[bool, typer.Option("--receipt", help="Print the receipt after each answer.")] = False,
    key: KeyOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Asks a model and streams its answer."""
    conversation = conversation_pb2.Conversation(max_output_tokens=max_tokens)
    if system:
        conversation.messages.append(_message(conversation_pb2.ROLE_SYSTEM, system))
    with Session(state_dir, timeout, key=key) as session:
        if prompt is not None:
            _turn(session, conversation, sys.stdin.read() if prompt == "-" else prompt, model, cache, receipt)
            return
        session.errors.print("Type a message; an empty line or Ctrl-D ends.")
        while text := _ask(session.errors):
            _turn(session, conversation, text, model, cache, receipt)


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""


def _turn(
    session: Session, conversation: conversation_pb2.Conversation, text: str, model: str, cache: str, receipt: bool
) -> None:
    client = session.client
    conversation.messages.append(_message(conversation_pb2.ROLE_USER, text))
    request = inference_service_pb2.StreamGenerateRequest(
        conversation=conversation,
        routing=inference_service_pb2.RoutingWishes(model=model),
        cache=_wishes(cache),
    )
    said: list[str] = []
    closed = inference_service_pb2.StreamClosed()
    with failures():
        for event in client.inference.StreamGenerate(request, timeout=session.timeout, metadata=client.as_tenant):
            kind = event.WhichOneof("event")
            if kind == "delta":
                piece = event.delta.text or event.delta.refusal or event.delta.tool_call.arguments_json
                said.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
            elif kind == "closed":
                closed = event.closed
    print()
    conversation.messages.append(_message(conversation_pb2.ROLE_ASSISTANT, "".join(said)))
    if receipt:
        print_receipt(session.errors, closed.receipt)


@app.command()
def models(
    key: KeyOption = None, state_dir: StateDirOption = None, timeout: TimeoutOption = 10.0, as_json: JsonOption = False
) -> None:
    """Lists models and policies that the key may use, with prices and health."""
    with Session(state_dir, timeout, key=key) as session:
        client = session.client
        request = inference_service_pb2.ListModelsRequest()
        found = [m for page in pages(client.inference.ListModels, request, client.as_tenant, timeout) for m in page.models]
        if as_json:
            print_json(found)
            return

        def price(model: inference_service_pb2.Model, field: str) -> str:
            return money(getattr(model, field)) if model.HasField(field) else ""  # type: ignore[arg-type]  # two of its literals

        print_table(
            session.console,
            ("model", "window", "$/M in", "$/M out", "healthy", "capabilities"),
            [
                (
                    m.id,
                    m.context_window or "",
                    price(m, "input_nano_usd_per_million"),
                    price(m, "output_nano_usd_per_million"),
                    "yes" if m.healthy else "no",
                    " ".join(m.capabilities),
                )
                for m in found
            ],
        )


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="What would be asked; `-` reads standard input.")],
    model: ModelOption = "",
    cache: CacheOption = "",
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)] = None,
    key: KeyOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Says what a request would do: every candidate and its fate, count, hold, cache. Runs nothing."""
    conversation = conversation_pb2.Conversation(max_output_tokens=max_tokens)
    conversation.messages.append(_message(conversation_pb2.ROLE_USER, sys.stdin.read() if prompt == "-" else prompt))
    request = inference_service_pb2.ExplainRequest(
        request=inference_service_pb2.GenerateRequest(
            conversation=conversation,
            routing=inference_service_pb2.RoutingWishes(model=model),
            cache=_wishes(cache),
        )
    )
    with Session(state_dir, timeout, key=key) as session, failures():
        client = session.client
        receipt = client.inference.Explain(request, timeout=timeout, metadata=client.as_tenant).receipt
        if as_json:
            print_json(receipt)
        else:
            print_receipt(session.console, receipt, ran=False)


def main() -> NoReturn:
    """The entry point. Failures are words and exit code 1, faults of usage 2, Ctrl-C 130."""
    console = open_console(stderr=True)
    try:
        app()
    except Failure as failure:
        print_failure(console, failure)
        sys.exit(1)
    except ConfigError as error:
        console.print(str(error), markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
