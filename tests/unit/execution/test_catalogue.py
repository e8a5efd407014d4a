"""Providers in the catalogue file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from services.execution.catalogue import Entry, parse, read_credential
from services.runtime.config import ConfigError

KEY = "sk-canary-0123456789"


def problems(section: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(section)
    return list(caught.value.problems)


def test_a_provider_of_each_kind() -> None:
    entries = parse(
        {
            "openai": {"kind": "openai", "credential": "env:OPENAI_API_KEY"},
            "vllm": {"kind": "openai", "base_url": "http://10.0.0.1:8000/v1/", "headers": {"x-team": "a"}},
            "claude": {"kind": "anthropic", "credential": "file:~/key", "probe_path": "/health"},
            "gemini": {"kind": "gemini", "regions": ["eu"]},
            "local": {"kind": "local", "model": "m.gguf", "context_window": 512, "parallel": 1},
            "echo": {"kind": "echo"},
        }
    )
    assert entries["openai"] == Entry("openai", "openai", "https://api.openai.com/v1", "env:OPENAI_API_KEY")
    assert entries["vllm"] == Entry("vllm", "openai", "http://10.0.0.1:8000/v1", headers={"x-team": "a"})
    assert entries["claude"].base_url == "https://api.anthropic.com"
    assert entries["claude"].probe_path == "/health"
    assert (entries["local"].model, entries["local"].context_window, entries["local"].parallel) == ("m.gguf", 512, 1)
    assert entries["echo"] == Entry("echo", "echo")


def test_the_shipped_catalogue_is_right() -> None:
    shipped = yaml.safe_load((Path(__file__).resolve().parents[3] / "deploy" / "catalogue.yaml").read_text())
    assert parse(shipped["providers"])


@pytest.mark.parametrize("section", [None, [], "x", {}])
def test_there_must_be_providers(section: object) -> None:
    assert problems(section) == ["providers: must be a mapping with at least one provider"]


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        {
            "UPPER": {"kind": "echo"},
            "list": ["echo"],
            "kind": {"kind": "grok", "surprise": 1},
            "many": {
                "kind": "openai",
                "base_url": "ftp://x",
                "credential": KEY,
                "headers": {"bad name": "x"},
                "parallel": 0,
                "context_window": "big",
                "typo": 1,
                "on_disconnect": "wait",
                "drain_seconds": 601,
            },
            "idle": {"kind": "echo", "drain_seconds": 5},
            "good": {"kind": "echo"},
        }
    )
    starts = [
        "providers.UPPER: the id",
        "providers.list: must be a mapping",
        "providers.kind.surprise: unknown",
        "providers.kind.kind: must be one of",
        "providers.many.typo: unknown",
        "providers.many.base_url: must be",
        "providers.many.credential: must be",
        "providers.many.headers: must map",
        "providers.many: context_window and parallel",
        "providers.many.on_disconnect: must be cancel or drain",
        "providers.many.drain_seconds: must be more than 0",
        "providers.idle.drain_seconds: means something with",
    ]
    assert len(found) == len(starts)
    assert all(problem.startswith(start) for problem, start in zip(found, starts, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"credential": KEY},
        {"credential": f"key:{KEY}"},
        {"credential": "env:"},
        {"credential": "file:"},
        {"base_url": f"https://{KEY}@api.example.com"},
        {"base_url": f"https://:{KEY}@api.example.com"},
        {"base_url": f"https://user:{KEY}@api.example.com"},
        {"base_url": f"https://api.example.com/v1?key={KEY}"},
        {"headers": {"Authorization": f"Bearer {KEY}"}},
        {"headers": {"x-api-key": KEY}},
        {"headers": {"X-Goog-Api-Key": KEY}},
        {"headers": {"api-key": KEY}},
        {"api_key": KEY},
    ],
)
def test_a_key_in_the_catalogue_is_refused_and_not_repeated(fields: dict[str, Any]) -> None:
    found = problems({"p": {"kind": "openai", **fields}})
    assert len(found) == 1
    assert KEY not in found[0]


@pytest.mark.parametrize(
    "base", ["x", "http://", "https://[::1", "http://host:99999", "http://host:0", "http://host:x", "file:///etc/passwd"]
)
def test_addresses_that_are_none(base: str) -> None:
    assert problems({"p": {"kind": "openai", "base_url": base}}) == [
        "providers.p.base_url: must be an http or https URL without user and query"
    ]


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\0b", "Grüße", "日本"])
def test_headers_that_can_t_be_sent(value: str) -> None:
    assert len(problems({"p": {"kind": "openai", "headers": {"x-a": value}}})) == 1


def test_credentials_are_read_from_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    assert read_credential(f"file:{path}") == KEY
    assert read_credential("env:A", {"A": f" {KEY} "}) == KEY
    assert read_credential("env:B", {"A": KEY}) == ""
    assert read_credential(f"file:{tmp_path / 'none'}") == ""
    assert read_credential(f"file:{tmp_path}") == ""
    assert read_credential("") == ""


@pytest.mark.parametrize("content", [b"a\nx-evil: 1", b"a\r\nb", b"\xff\xfe", "schlüssel".encode(), b"a\0b", b"a\tb"])
def test_a_credential_that_can_t_be_a_header_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    assert read_credential(f"file:{path}") == ""


def test_a_stream_is_read_on_only_where_the_catalogue_says_so() -> None:
    entries = parse(
        {
            "cut": {"kind": "echo"},
            "read": {"kind": "echo", "on_disconnect": "drain"},
            "short": {"kind": "echo", "on_disconnect": "drain", "drain_seconds": 2},
        }
    )
    assert {name: entry.drain_seconds for name, entry in entries.items()} == {"cut": 0.0, "read": 30.0, "short": 2.0}
