"""Settings of the caching service."""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.runtime.config import setting

_MEBIBYTE = 1024 * 1024


class Mode(enum.StrEnum):
    """Which tiers a namespace has."""

    OFF = "off"
    EXACT = "exact"
    SEMANTIC = "semantic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Settings of one namespace."""

    mode: Mode = setting(
        Mode.EXACT,
        "Tiers that are asked when the caller wishes nothing; a caller may ask for the semantic tier wherever this is not off",
    )
    threshold: float = setting(
        0.92, "Least cosine of a semantic hit; belongs to the embedding model's build", minimum=0.5, maximum=1
    )
    ttl: float = setting(3600.0, "How long an answer is stored", unit="s", minimum=1, maximum=30 * 86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Settings of the exact tier in the process."""

    max_bytes: int = setting(256 * _MEBIBYTE, "Memory of all entries", unit="bytes", minimum=0)
    max_entries: int = setting(100_000, "Entries", minimum=0, maximum=10_000_000)
    max_entry_bytes: int = setting(_MEBIBYTE, "Larger answers are not stored", unit="bytes", minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Settings of the exact tier that replicas share, a JetStream key-value bucket in memory."""

    enabled: bool = setting(True, "Whether replicas share answers over NATS")
    bucket: str = setting("sluice_cache", "Name of the bucket: letters, digits, `_`, `-`", minimum=1, maximum=64)
    max_bytes: int = setting(128 * _MEBIBYTE, "Memory of the bucket in the NATS server", unit="bytes", minimum=_MEBIBYTE)
    max_entry_bytes: int = setting(
        256 * 1024, "Larger answers stay in their process; NATS takes 1 MiB at most", unit="bytes", minimum=0, maximum=900_000
    )
    read_timeout: float = setting(0.05, "Longest wait for an answer of the bucket", unit="s", minimum=0.001, maximum=5)
    queue_entries: int = setting(1000, "Writes that may wait; more are dropped", minimum=1, maximum=100_000)
    queue_bytes: int = setting(16 * _MEBIBYTE, "Memory of waiting writes; more are dropped", unit="bytes", minimum=1)
    known_keys: int = setting(
        100_000,
        "Keys of other replicas' entries that are remembered; only known keys are asked for",
        minimum=0,
        maximum=1_000_000,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Semantic:
    """Settings of the semantic tier."""

    enabled: bool = setting(True, "Whether there is a semantic tier at all; off: the embedding model is not loaded")
    timeout: float = setting(0.2, "Longest time of embedding and search together", unit="s", minimum=0.001, maximum=5)
    max_question_bytes: int = setting(
        4096, "Longer last turns are not looked for by meaning", unit="bytes", minimum=1, maximum=65_536
    )
    candidates: int = setting(5, "Nearest entries that are compared", minimum=1, maximum=50)
    threads: int = setting(1, "Threads of the embedding model", minimum=1, maximum=16)
    batch: int = setting(
        4,
        "Questions that are embedded together; on one core more of them wait longer and are no faster",
        minimum=1,
        maximum=256,
    )
    queue_entries: int = setting(256, "Questions that may wait to be embedded; more are refused", minimum=1, maximum=10_000)
    pending_tickets: int = setting(
        10_000, "Questions kept between a lookup and its store; the oldest are forgotten first", minimum=1, maximum=1_000_000
    )
    max_entries_per_tenant: int = setting(10_000, "Entries of one tenant; the oldest leave first", minimum=1, maximum=1_000_000)
    max_entries: int = setting(100_000, "Entries of all tenants", minimum=1, maximum=10_000_000)
    max_bytes: int = setting(256 * _MEBIBYTE, "Memory of all entries", unit="bytes", minimum=1)
    max_entry_bytes: int = setting(256 * 1024, "Larger answers are not stored", unit="bytes", minimum=0)
    model: Path | None = setting(None, "Another ONNX file of the all-MiniLM-L6-v2 kind; none: the packaged one")
    vocabulary: Path | None = setting(None, "Its WordPiece vocabulary, one piece a line; none: the one that comes with Sluice")


_NO_NAMESPACES: Mapping[str, Namespace] = types.MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the caching service."""

    default: Namespace = setting(Namespace(), "Settings of every namespace that isn't named under `namespaces`")
    namespaces: Mapping[str, Namespace] = setting(_NO_NAMESPACES, "Settings of single namespaces, by name")
    exact: Exact = setting(Exact(), "The exact tier in the process")
    shared: Shared = setting(Shared(), "The exact tier that replicas share")
    semantic: Semantic = setting(Semantic(), "The semantic tier")
    max_tallies: int = setting(
        10_000, "Pairs of tenant and namespace that are counted one by one", minimum=1, maximum=1_000_000
    )
