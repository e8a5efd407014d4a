"""Structured logs without secrets, and a cheap log of one line per request.

Redaction works on the rendered line, whatever field or traceback a secret hides in: keys by their shape, values by the name
before them, and the process' own secrets by value.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson
import structlog

from services.runtime.metrics import Counter
from services.runtime.settings import LogFormat, LogLevel

_HIDDEN: Final = "[redacted]"
_MAX_LINE: Final = 32 * 1024
_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}

_VALUE: Final = r"\\?[\"']?\s*[:=]\s*\\?[\"']?(?!\[redacted\]|(?:bearer|basic)\s)"


def _shape(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """A secret with the shape `pattern`; what a group `keep` matches stays."""
    return re.compile(pattern, flags)


def _named(name: str) -> re.Pattern[str]:
    """The value that follows `name`, in JSON, in Python's repr, in a header, in a query."""
    return re.compile(rf"(?P<keep>{name}{_VALUE})[^\s\"'\\,;&}}\])]{{4,}}", re.IGNORECASE)


# Each pattern is tried only where its marker stands in the lower-cased text: finding a literal is a hundred times cheaper than
# running an expression over all of the text.
_RULES: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    *((f"{head}k-", _shape(rf"(?<![A-Za-z0-9_]){head}k-[A-Za-z0-9_\-]{{8,}}")) for head in "srp"),
    *((scheme, _shape(rf"(?P<keep>{scheme}\s+)[A-Za-z0-9._~+/=\-]{{6,}}", re.IGNORECASE)) for scheme in ("bearer", "basic")),
    ("aiza", _shape(r"AIza[0-9A-Za-z_\-]{20,}")),
    *((head, _shape(rf"(?<![A-Za-z0-9_]){head}[A-Za-z0-9_\-]{{12,}}")) for head in ("gsk_", "hf_", "xai-", "pplx-", "r8_")),
    *((head.lower(), _shape(rf"{head}[0-9A-Z]{{16}}")) for head in ("AKIA", "ASIA")),
    ("eyj", _shape(r"eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*")),
    ("-----begin", _shape(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL)),
    ("://", _shape(r"(?P<keep>://)[^/\s\"'@]+(?=@)")),
    ("authorization", _named("authorization")),
    ("api", _named("api[_-]?key")),
    ("passw", _named("passwo?r?d")),
    ("secret", _named("secret")),
    ("credential", _named("credentials?")),
    ("token", _named(r"(?<![A-Za-z0-9])token")),
    ("key=", _shape(r"(?P<keep>(?<![A-Za-z0-9])key=)[^&\s\"']+", re.IGNORECASE)),
)
_ASCII_LOWER: Final = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class Redactor:
    """Takes secrets out of text. `secrets` are values known to this process; shorter ones than 6 characters are left alone."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        self._known = tuple(known)

    def __call__(self, text: str) -> str:
        """`text` without secrets."""
        for secret in self._known:
            if secret in text:
                text = text.replace(secret, _HIDDEN)
        # Lower-casing must not move anything, which it does for some letters beyond ASCII.
        lower = text.lower() if text.isascii() else text.translate(_ASCII_LOWER)
        spans: list[tuple[int, int]] = []
        for marker, pattern in _RULES:
            position = lower.find(marker)
            while position >= 0:
                found = pattern.match(text, position)
                if found is None:
                    position = lower.find(marker, position + 1)
                    continue
                start = found.end("keep") if "keep" in pattern.groupindex else found.start()
                spans.append((start, found.end()))
                position = lower.find(marker, max(found.end(), position + 1))
        if not spans:
            return text
        parts: list[str] = []
        end = 0
        for start, stop in sorted(spans):
            if stop <= end:
                continue
            if start >= end:
                parts += (text[end:start], _HIDDEN)
            end = stop
        return "".join([*parts, text[end:]])


def open_log(
    level: LogLevel, form: LogFormat, redact: Callable[[str], str], *, stream: TextIO | None = None, **bound: Any
) -> Any:
    """A structlog logger that writes to `stream` (standard error), with `bound` on every line. Configures nothing globally."""
    output = sys.stderr if stream is None else stream
    render: Any = _render_json if form is LogFormat.JSON else _render_console

    def write(_: Any, __: str, values: Mapping[str, Any]) -> str:
        return redact(render(values))[:_MAX_LINE]

    logger: Any = structlog.wrap_logger(
        structlog.PrintLogger(output),
        processors=[structlog.processors.add_log_level, _traceback, write],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level.value]),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger.bind(**bound)


def _traceback(_: Any, __: str, values: Any) -> Any:
    error = values.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()
    elif isinstance(error, BaseException):
        error = (type(error), error, error.__traceback__)
    if isinstance(error, tuple) and error[0] is not None:
        values["traceback"] = "".join(traceback.format_exception(*error))
    return values


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _render_json(values: Mapping[str, Any]) -> str:
    return orjson.dumps({"time": _now(), **values}, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()


def _render_console(values: Mapping[str, Any]) -> str:
    rest = dict(values)
    level, event, trace = rest.pop("level", ""), rest.pop("event", ""), rest.pop("traceback", None)
    pairs = " ".join(f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}" for key, value in rest.items())
    line = f"{_now()} {level:<7} {event} {pairs}".rstrip()
    return line if trace is None else f"{line}\n{trace}"


class LibraryLog(logging.Handler):
    """Brings warnings of libraries that use the standard logging into our log."""

    def __init__(self, log: Any) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        write("library", library=record.name, message=record.getMessage(), exc_info=record.exc_info or None)


class RequestLog:
    """One JSON line per request, written in batches by a thread of its own.

    `write` costs well under a microsecond on the path: rendering, redaction and writing happen in the thread. At most
    `capacity` lines wait; further ones are dropped and counted, since a log must not stop the service. Give JSON-like
    values alone.
    """

    def __init__(
        self,
        redact: Callable[[str], str],
        dropped: Counter,
        *,
        stream: TextIO | None = None,
        interval: float = 0.1,
        capacity: int = 20_000,
    ) -> None:
        self._redact = redact
        self._dropped = dropped
        self._stream = sys.stdout if stream is None else stream
        self._interval = interval
        self._capacity = capacity
        self._lines: list[tuple[Mapping[str, Any], bool]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def write(self, values: Mapping[str, Any], *, is_plain: bool = False) -> None:
        """Takes one line; `values` must not be changed afterwards.

        `is_plain`: it has nothing but numbers and our own ids and names in it, and needn't be searched for secrets, which takes as long
        as all else that is done for a line.
        """
        if len(self._lines) < self._capacity:
            self._lines.append((values, is_plain))
        else:
            self._dropped.inc()

    def close(self) -> None:
        """Writes what waits and ends. Blocks for at most a second."""
        self._stop.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(self._interval)
            # Swapping the list is one store, so lines that arrive meanwhile are in the one or in the other.
            lines, self._lines = self._lines, []
            if lines:
                self._flush(lines)

    def _flush(self, lines: list[tuple[Mapping[str, Any], bool]]) -> None:
        rendered = []
        for values, is_plain in lines:
            try:
                line = orjson.dumps(values, default=repr).decode()
            except TypeError:
                self._dropped.inc()
            else:
                rendered.append(line if is_plain else self._redact(line))
        try:
            self._stream.write("\n".join([*rendered, ""]))
            self._stream.flush()
        except (OSError, ValueError):
            # The reader of our output is gone; the service goes on.
            self._dropped.inc(len(rendered))
