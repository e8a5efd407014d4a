"""Errors of the execution service.

Failure
└── ExecutionError
    ├── AttemptFailed        one attempt failed; `ends_chain` says whether another candidate may help
    ├── ConnectionStale      a kept connection was closed before a byte of the answer came (an AttemptFailed)
    ├── AllFailed            every candidate failed
    └── SpoolFull            settlements can't be recorded, so nothing may run
"""

from __future__ import annotations

from collections.abc import Sequence

from services.runtime.errors import Failure, Reason


class ExecutionError(Failure):
    """Base of the service's own errors."""


_CALLER: frozenset[Reason] = frozenset(
    {Reason.PROVIDER_REJECTED, Reason.CONTEXT_WINDOW_EXCEEDED, Reason.REQUEST_INVALID, Reason.FIELD_UNSUPPORTED}
)


class AttemptFailed(ExecutionError):
    """One attempt failed. `status` is the provider's HTTP status, 0 when there was none."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        status: int = 0,
        retry_delay: float | None = None,
        param: str = "",
        was_read: bool = False,
    ) -> None:
        """`was_read`: the provider has likely worked on the prompt, and bills it, though no answer came of it."""
        metadata = {"provider_status": str(status)} if status else {}
        if param:
            metadata["field"] = param
        super().__init__(reason, message, metadata=metadata, retry_delay=retry_delay)
        self.status = status
        self.was_read = was_read

    @property
    def ends_chain(self) -> bool:
        """Whether the fault is the caller's: every other candidate would refuse it too."""
        return self.reason in _CALLER


class ConnectionStale(AttemptFailed):
    """A kept connection was closed before a byte of the answer came. The same candidate is worth another, recorded, attempt."""

    def __init__(self) -> None:
        super().__init__(Reason.PROVIDER_UNAVAILABLE, "the provider closed a kept connection")


class AllFailed(ExecutionError):
    """Every candidate failed; the metadata has `attempt/<n>`: `<model> <reason>`."""

    def __init__(self, attempts: Sequence[tuple[str, Reason]], retry_delay: float | None) -> None:
        said = "; ".join(f"{model}: {reason.value}" for model, reason in attempts) or "there was no candidate"
        metadata = {f"attempt/{index}": f"{model} {reason.value}" for index, (model, reason) in enumerate(attempts[:12], 1)}
        super().__init__(
            Reason.ALL_CANDIDATES_FAILED, f"every candidate failed: {said}", metadata=metadata, retry_delay=retry_delay
        )


class SpoolFull(ExecutionError):
    """Settlements can't be recorded."""

    def __init__(self) -> None:
        super().__init__(
            Reason.DEPENDENCY_UNAVAILABLE,
            "settlements can't be recorded: metering has been away for too long; nothing runs unmetered",
            metadata={"dependency": "metering"},
            retry_delay=5.0,
        )
