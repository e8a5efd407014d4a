"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """What a key stands for."""

    tenant_id: str
    project_id: str
    key_id: str
    scopes: tuple[str, ...]
    """What the key may do: `inference`, `jobs`, `usage`."""
    allowed_models: tuple[str, ...]
    """Catalogue ids or `policy/<name>`; empty: all."""
    cache_namespace: str
    """Cache namespace when the request names none; empty: `default`."""
    expire_time: float | None
    """Unix seconds; None: never."""
    limited_models: frozenset[str] = frozenset()
    """Catalogue ids of models that have limits of their own for this key."""
