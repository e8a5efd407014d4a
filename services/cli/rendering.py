"""How the command line shows things to people: money, durations, receipts, tables, errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.runtime.errors import Failure
from sluice.errors.v1 import error_reason_pb2
from sluice.inference.v1 import answer_pb2, receipt_pb2

NANO: Final = 1_000_000_000


def money(nano_usd: int) -> str:
    """Nano-dollars as dollars, exact, without trailing zeros: `$0.0000015`."""
    sign = "-" if nano_usd < 0 else ""
    whole, rest = divmod(abs(nano_usd), NANO)
    digits = f"{rest:09d}".rstrip("0")
    return f"{sign}${whole}.{digits:0<2}"


def milliseconds(duration: Duration) -> str:
    """A duration in milliseconds: `12.3 ms`."""
    return f"{duration.seconds * 1e3 + duration.nanos / 1e6:.1f} ms"


def lower_name(value: str, prefix: str) -> str:
    """An enum value's name for people: `CACHE_STATUS_HIT_EXACT` → `hit exact`."""
    return value.removeprefix(prefix).lower().replace("_", " ")


def cache_words(verdict: receipt_pb2.CacheVerdict) -> str:
    """A cache verdict in words: `hit semantic 0.953 ≥ 0.92`."""
    words = lower_name(receipt_pb2.CacheStatus.Name(verdict.status), "CACHE_STATUS_")
    if verdict.HasField("score") and verdict.HasField("threshold"):
        relation = "≥" if verdict.score >= verdict.threshold else "<"
        words += f" {verdict.score:.3f} {relation} {verdict.threshold:g}"
    return words


def answer_text(answer: answer_pb2.Answer) -> str:
    """The answer's text, its tool calls as JSON lines."""
    parts: list[str] = []
    for part in answer.message.parts:
        kind = part.WhichOneof("kind")
        if kind == "text":
            parts.append(part.text)
        elif kind == "refusal":
            parts.append(part.refusal)
        elif kind == "tool_call":
            parts.append(f"\n{part.tool_call.name}({part.tool_call.arguments_json})")
    return "".join(parts)


_FILE_WIDTH: Final = 160


def open_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; a file or pipe has no width, and tables there shouldn't be folded to 80 columns."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_FILE_WIDTH)


def print_table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """A table; numbers stand to the right."""
    table = Table(title=title, title_justify="left")
    listed = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(listed) and all(_numeric(row[index]) for row in listed)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in listed:
        table.add_row(*row)
    console.print(table)


def _numeric(text: str) -> bool:
    return text == "" or text.lstrip("-$")[:1].isdigit()


def print_json(messages: Iterable[Message] | Message) -> None:
    """Messages as one JSON document on standard output."""

    def plain(message: Message) -> Any:
        return MessageToDict(message, preserving_proto_field_name=True)

    document = plain(messages) if isinstance(messages, Message) else [plain(message) for message in messages]
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_receipt(console: Console, receipt: receipt_pb2.Receipt, *, ran: bool = True) -> None:
    """One receipt for people; of a request that was only explained (`ran` false), what it would be."""
    usage = receipt.attempts[-1].usage if receipt.attempts else answer_pb2.Usage()
    count = receipt.input_count
    method = lower_name(receipt_pb2.TokenCountMethod.Name(count.method), "TOKEN_COUNT_METHOD_")
    facts: list[tuple[str, str]] = [
        ("operation", receipt.operation_id),
        ("payer", f"{receipt.tenant_id} / {receipt.project_id} / {receipt.key_id}"),
        (
            "task type",
            f"{lower_name(receipt_pb2.TaskType.Name(receipt.task_type), 'TASK_TYPE_')} {receipt.task_type_reason}".strip(),
        ),
        ("policy", f"{receipt.policy or 'the named model'} @ {receipt.policy_version}"),
        ("cache", f"{cache_words(receipt.cache)} {receipt.cache.reason}".strip()),
    ]
    if count.tokenizer:
        facts.append(("prompt tokens", f"{count.token_count} ({method}, {count.tokenizer}, ±{count.error_bound:.1%})"))
    if ran:
        shown = f"{usage.input_token_count} in ({usage.cached_input_token_count} cached), {usage.output_token_count} out"
        facts.append(("usage", shown))
    facts += [
        ("held" if ran else "would hold", money(receipt.hold_nano_usd)),
        ("expected", money(receipt.estimated_cost_nano_usd)),
    ]
    if ran:
        facts += [
            ("charged", f"{money(receipt.cost_nano_usd)} {receipt.price_version}".strip()),
            ("saved", money(receipt.saved_nano_usd)),
            ("took", f"{milliseconds(receipt.total_duration)}, first byte {milliseconds(receipt.first_byte_duration)}"),
        ]
    if receipt.budget_level:
        facts.append(
            (
                "budget",
                f"{receipt.budget_level}: {money(receipt.budget_before_nano_usd)} → {money(receipt.budget_after_nano_usd)}",
            )
        )
    facts += [("went on without", words) for words in receipt.degradations]
    print_table(console, ("", ""), facts, title="Receipt" if ran else "What would happen")
    print_candidates(console, receipt)
    if receipt.attempts:
        print_table(
            console,
            ("attempt", "model", "outcome", "error", "took", "cost"),
            [
                (
                    attempt.attempt_id,
                    attempt.model,
                    lower_name(receipt_pb2.AttemptOutcome.Name(attempt.outcome), "ATTEMPT_OUTCOME_"),
                    _reason(attempt.error_reason),
                    milliseconds(attempt.duration),
                    money(attempt.cost_nano_usd),
                )
                for attempt in receipt.attempts
            ],
            title="Attempts",
        )


def _reason(value: error_reason_pb2.ErrorReason.ValueType) -> str:
    return "" if value == 0 else lower_name(error_reason_pb2.ErrorReason.Name(value), "ERROR_REASON_")


def print_candidates(console: Console, receipt: receipt_pb2.Receipt) -> None:
    """Every candidate and its fate."""
    print_table(
        console,
        ("", "candidate", "score", "expected cost", "why"),
        [
            (
                "planned" if fate.planned else "filtered",
                fate.model,
                f"{fate.total_score:.3f}" if fate.planned else "",
                money(fate.estimated_cost_nano_usd) if fate.planned else "",
                fate.reason,
            )
            for fate in receipt.candidates
        ],
        title="Candidates",
    )


def print_failure(console: Console, failure: Failure) -> None:
    """An error for people: reason, what to do, when to try again."""
    console.print(Text.assemble((failure.reason.value, "bold red"), " ", failure.message))
    if failure.retry_delay is not None:
        console.print(f"Try again in {failure.retry_delay:g} s.")
