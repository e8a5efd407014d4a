"""Server-sent events: cutting a byte stream into whole events without parsing what is only passed on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from services.execution.errors import AttemptFailed
from services.runtime.errors import Reason

_MAX_EVENT: Final = 8 * 1024 * 1024


class EventCutter:
    """Keeps the beginning of an event until its end has come."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def whole(self, data: bytes) -> bytes:
        """What came before and `data`, up to the end of the last whole event; maybe empty. Raises AttemptFailed when one is too long."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            return data
        end = data.rfind(b"\n\n")
        # Some servers end lines with CR LF, and what stands between us may add comments that don't.
        wide = data.rfind(b"\r\n\r\n", max(end, 0))
        if wide >= 0:
            end = wide + 2
        if end < 0:
            if len(data) > _MAX_EVENT:
                raise AttemptFailed(Reason.PROVIDER_MALFORMED, f"an event of the stream is longer than {_MAX_EVENT} bytes")
            self._rest = data
            return b""
        self._rest = data[end + 2 :]
        return data[: end + 2]

    @property
    def rest(self) -> bytes:
        """What came after the last whole event."""
        return self._rest


def events(block: bytes) -> Iterator[bytes]:
    """The events of a block of whole ones, without the blank lines."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    for event in block.split(b"\n\n"):
        if event.strip():
            yield event


def data_of(event: bytes) -> bytes:
    """The data of an event: its `data:` lines."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    return b"\n".join(line[5:].lstrip(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
