"""PLACEHOLDER by the lead, so that the rest can start: the helper that writes the real module overwrites this file."""

from typing import Any


class MessageStream:
    def __init__(self, opened: Any) -> None: ...


def message_from_json(body: Any) -> Any: ...
