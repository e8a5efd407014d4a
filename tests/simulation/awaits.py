"""The places where the code of money waits, and so where a crash can meet it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

_SERVICES: Final = Path(__file__).resolve().parents[2] / "services"
MODULES: Final = (
    "gateway/core.py",
    "gateway/leases.py",
    "gateway/releases.py",
    "gateway/flights.py",
    "gateway/sharing.py",
    "gateway/service.py",
    "gateway/adapters/metering.py",
    "execution/attempts.py",
    "execution/counts.py",
    "execution/service.py",
    "execution/spool.py",
    "metering/leasing.py",
    "metering/service.py",
)


@cache
def awaits() -> frozenset[tuple[str, int, int]]:
    """Every `await`, `async for` and `async with`: module, first and last line."""
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((_SERVICES / module).read_text())):
            if isinstance(node, ast.Await):
                found.add((module, node.lineno, node.end_lineno or node.lineno))
            elif isinstance(node, ast.AsyncFor):
                found.add((module, node.lineno, node.iter.end_lineno or node.lineno))
            elif isinstance(node, ast.AsyncWith):
                found.add((module, node.lineno, node.lineno))
    return frozenset(found)


def met(places: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int, int]]:
    """Those at which something waited in a process that was killed."""
    lines = {(path.removeprefix(f"{_SERVICES}/"), line) for path, line in places}
    return frozenset(one for one in awaits() if any((one[0], line) in lines for line in range(one[1], one[2] + 1)))
