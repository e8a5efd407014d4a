"""Errors of the metering service.

Failure
└── MeteringError
    ├── KeyUnknown          no such key, or it ended
    ├── BudgetExhausted     a budget doesn't cover the hold
    ├── NotFound            no such tenant, project, key or hold
    ├── Exists              the id is taken
    ├── LedgerFileError     a ledger's file, or a backup of one, isn't what it should be
    └── StoreUnavailable    the ledger store can't be used
"""

from __future__ import annotations

from pathlib import Path

from services.runtime.errors import Failure, Reason


class MeteringError(Failure):
    """Base of the service's own errors."""


class KeyUnknown(MeteringError):
    """No such key, or it ended."""

    def __init__(self) -> None:
        super().__init__(
            Reason.KEY_INVALID, "the key is unknown, expired or revoked; make another one with `sluice keys create`"
        )


class BudgetExhausted(MeteringError):
    """A budget doesn't cover the hold."""

    def __init__(self, level: str, wanted: int, left: int) -> None:
        super().__init__(
            Reason.BUDGET_EXHAUSTED,
            f"the request may cost {wanted} nano-dollars and the budget of its {level} has {max(0, left)} left",
            metadata={"level": level, "wanted_nano_usd": str(wanted), "left_nano_usd": str(max(0, left))},
        )


class NotFound(MeteringError):
    """No such thing."""

    def __init__(self, what: str) -> None:
        super().__init__(Reason.RESOURCE_NOT_FOUND, f"there is no {what}", metadata={"resource": what})


class Exists(MeteringError):
    """The id is taken."""

    def __init__(self, what: str) -> None:
        super().__init__(Reason.RESOURCE_EXISTS, f"{what} exists already", metadata={"resource": what})


class LedgerFileError(MeteringError):
    """A ledger's file, or a backup of one, isn't what it should be."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(Reason.STATE_CONFLICT, f"{path} {what}", metadata={"path": str(path)})


class StoreUnavailable(MeteringError):
    """The ledger store can't be used."""

    def __init__(self) -> None:
        super().__init__(
            Reason.DEPENDENCY_UNAVAILABLE,
            "the ledger can't be written at the moment; retry",
            metadata={"dependency": "ledger"},
            retry_delay=1.0,
        )
