"""Providers as the catalogue file names them: the section `providers`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from services.runtime.config import ConfigError

OUR_KEYS: Final = "sk-sluice-"
KINDS: Final = ("openai", "anthropic", "gemini", "local", "echo")
_ID: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_DEFAULT_BASES: Final[Mapping[str, str]] = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "gemini": "https://generativelanguage.googleapis.com",
}
_CREDENTIAL_HEADERS: Final = {
    "authorization",
    "proxy-authorization",
    "cookie",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
}
_FIELDS: Final = {
    "kind",
    "base_url",
    "credential",
    "model",
    "headers",
    "probe_path",
    "region",
    "regions",
    "context_window",
    "parallel",
    "on_disconnect",
    "drain_seconds",
}
_DRAIN_SECONDS: Final = 30.0
_MOST_DRAIN_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One provider."""

    id: str
    kind: str
    base_url: str = ""
    credential: str = ""
    """`env:NAME` or `file:PATH`; empty: none is needed."""
    model: str = ""
    """For `local`: which model; `smollm2-135m-instruct`, or the path of a GGUF file."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every call. Not for credentials: those come from `credential`."""
    probe_path: str = ""
    """Path of the free probe; empty: as usual for the kind."""
    context_window: int = 2048
    """For `local`: tokens per request."""
    parallel: int = 4
    """For `local`: requests at once."""
    drain_seconds: float = 0.0
    """For how long a stream is read on after its caller has left, so that it is charged by the provider's own usage; 0: it is cut, and what
    came is estimated."""


def parse(section: object) -> dict[str, Entry]:
    """The providers by id. Raises ConfigError with every problem."""
    if not isinstance(section, Mapping) or not section:
        raise ConfigError(["providers: must be a mapping with at least one provider"])
    problems: list[str] = []
    entries = {}
    for name, value in section.items():
        entry = _entry(str(name), value, problems)
        if entry is not None:
            entries[entry.id] = entry
    if problems:
        raise ConfigError(problems)
    return entries


def _entry(name: str, value: Any, problems: list[str]) -> Entry | None:
    where = f"providers.{name}"
    before = len(problems)
    if not _ID.fullmatch(name):
        problems.append(f"{where}: the id must match [a-z0-9][a-z0-9_.-]*")
    if not isinstance(value, Mapping):
        problems.append(f"{where}: must be a mapping")
        return None
    problems += [f"{where}.{key}: unknown" for key in sorted(map(str, set(value) - _FIELDS))]
    kind = value.get("kind")
    if kind not in KINDS:
        problems.append(f"{where}.kind: must be one of {', '.join(KINDS)}, got {kind!r}")
        return None
    base = str(value.get("base_url") or _DEFAULT_BASES.get(kind, ""))
    if base:
        if not _is_address(base):
            problems.append(f"{where}.base_url: must be an http or https URL without user and query")
    elif kind in _DEFAULT_BASES:
        problems.append(f"{where}.base_url: must be set")
    credential = str(value.get("credential") or "")
    if credential and not re.fullmatch(r"(env|file):.+", credential):
        problems.append(f"{where}.credential: must be env:NAME or file:PATH; a key itself has no place in the catalogue")
    headers = value.get("headers") or {}
    if not isinstance(headers, Mapping) or not all(_header(k, v) for k, v in headers.items()):
        problems.append(f"{where}.headers: must map header names to plain ASCII texts without line breaks")
        headers = {}
    problems += [
        f"{where}.headers.{key}: a credential has no place in the catalogue; name its source in credential"
        for key in headers
        if str(key).lower() in _CREDENTIAL_HEADERS
    ]
    window, parallel = value.get("context_window", 2048), value.get("parallel", 4)
    if not isinstance(window, int) or not isinstance(parallel, int) or window < 128 or parallel < 1:
        problems.append(f"{where}: context_window and parallel must be whole numbers of at least 128 and 1")
    rule = value.get("on_disconnect", "cancel")
    if rule not in ("cancel", "drain"):
        problems.append(f"{where}.on_disconnect: must be cancel or drain, got {rule!r}")
    seconds = value.get("drain_seconds", _DRAIN_SECONDS)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds <= _MOST_DRAIN_SECONDS:
        problems.append(f"{where}.drain_seconds: must be more than 0 and at most {_MOST_DRAIN_SECONDS:g}, got {seconds!r}")
    elif "drain_seconds" in value and rule != "drain":
        problems.append(f"{where}.drain_seconds: means something with on_disconnect: drain only")
    if len(problems) > before:
        return None
    return Entry(
        name,
        kind,
        base.rstrip("/"),
        credential,
        str(value.get("model") or ""),
        {str(k): str(v) for k, v in headers.items()},
        str(value.get("probe_path") or ""),
        window,
        parallel,
        float(seconds) if rule == "drain" else 0.0,
    )


def _is_address(base: str) -> bool:
    try:
        parts = urlsplit(base)
        return bool(
            parts.scheme in ("http", "https")
            and parts.hostname
            and "@" not in parts.netloc
            and not parts.query
            and parts.port != 0
        )
    except ValueError:
        # A port out of range, a broken IPv6 address.
        return False


def _header(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and bool(re.fullmatch(r"[A-Za-z0-9-]+", name))
        and bool(re.fullmatch(r"[\t\x20-\x7e]*", str(value)))
    )


def read_credential(source: str, environ: Mapping[str, str] = os.environ) -> str:
    """The secret behind `env:NAME` or `file:PATH`; empty when it isn't there or can't be sent in a header."""
    kind, _, place = source.partition(":")
    secret = ""
    if kind == "env":
        secret = environ.get(place, "").strip()
    elif kind == "file":
        try:
            secret = Path(place).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError, RuntimeError):
            secret = ""
    if secret.startswith(OUR_KEYS):
        # One of our own, out of an environment that was made for our clients: a provider must never see it.
        return ""
    # A line break within it would be a header of its own.
    return secret if secret.isascii() and secret.isprintable() else ""
