"""Settings of the tokenization service."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the tokenization service."""

    reload_interval: float = setting(2.0, "Time between two looks at the catalogue file", unit="s", minimum=0.1, maximum=3600)
    inline_bytes: int = setting(
        16 * 1024,
        "Conversations up to this size are counted on the event loop; larger ones in a worker thread",
        unit="bytes",
        minimum=0,
        maximum=1024 * 1024,
    )
    threads: int = setting(2, "Worker threads that count large conversations", minimum=1, maximum=64)
    piece_cache_entries: int = setting(
        20_000,
        "Counts of texts that are remembered, so that unchanged turns are not counted again",
        minimum=0,
        maximum=10_000_000,
    )
    estimator_window: int = setting(
        2000, "Observations per model from which the estimator learns", minimum=200, maximum=100_000
    )
    estimator_models: int = setting(
        1000,
        "Models that the estimator keeps observations of; the one idle longest is forgotten first",
        minimum=1,
        maximum=100_000,
    )
