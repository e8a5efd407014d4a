"""Cutting of server-sent events."""

from __future__ import annotations

import pytest

from services.execution.adapters.sse import EventCutter, data_of, events

STREAMS = {
    "lf": b'data: {"a":1}\n\nevent: x\ndata: {"b":2}\n\n: ping\n\ndata: [DONE]\n\n',
    "crlf": b'data: {"a":1}\r\n\r\nevent: x\r\ndata: {"b":2}\r\n\r\n: ping\r\n\r\ndata: [DONE]\r\n\r\n',
    "mixed": b': ping\n\ndata: {"a":1}\r\n\r\nevent: x\r\ndata: {"b":2}\r\n\r\ndata: [DONE]\r\n\r\n',
}
DATA = [b'{"a":1}', b'{"b":2}', b"[DONE]"]


def cut(*pieces: bytes) -> list[bytes]:
    cutter = EventCutter()
    found = [data_of(event) for piece in pieces for event in events(cutter.whole(piece))]
    assert cutter.rest == b""
    return [data for data in found if data]


@pytest.mark.parametrize("ends", STREAMS)
def test_events_are_the_same_wherever_the_stream_is_cut(ends: str) -> None:
    raw = STREAMS[ends]
    for first in range(len(raw) + 1):
        assert cut(raw[:first], raw[first:]) == DATA
        for second in range(first, len(raw) + 1, 3):
            assert cut(raw[:first], raw[first:second], raw[second:]) == DATA
    assert cut(*(raw[index : index + 1] for index in range(len(raw)))) == DATA


def test_only_whole_events_leave_the_cutter() -> None:
    cutter = EventCutter()
    assert cutter.whole(b"data: a\n\ndata: b") == b"data: a\n\n"
    assert cutter.rest == b"data: b"
    assert cutter.whole(b"\n\n") == b"data: b\n\n"
    # An event is not held back for the end of the next, whichever line ends there are.
    assert cutter.whole(b"data: c\r\n\r\ndata: d") == b"data: c\r\n\r\n"
    assert cutter.whole(b"\n\ndata: e\r\n\r\ndata: f") == b"data: d\n\ndata: e\r\n\r\n"
    assert cutter.whole(b"\r\n\r\n: ping\n\ndata: g") == b"data: f\r\n\r\n: ping\n\n"
    assert cutter.rest == b"data: g"


def test_data_in_several_lines_is_joined_by_line_breaks() -> None:
    assert data_of(b"event: x\ndata: a\ndata:b\nid: 3") == b"a\nb"
    assert data_of(b": only a comment") == b""


def test_an_event_without_an_end_does_not_fill_the_memory() -> None:
    cutter = EventCutter()
    piece = b"x" * (1024 * 1024)
    taken = 0
    with pytest.raises(Exception, match="longer than"):
        while taken < 64:
            cutter.whole(piece)
            taken += 1
    assert taken == 8
