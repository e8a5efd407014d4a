"""Reading strangers' JSON: each reader takes what it says and names the place of everything else."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.edge import payload
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from services.runtime.errors import Reason
from sluice.inference.v1 import conversation_pb2

# The machine may be busy: how long an example takes says nothing about the code.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
PIXEL = base64.b64encode(b"\x89PNG not really").decode()
OTHERS: list[Any] = [None, True, 0, -1, 1.5, "text", [], ["a"], {}, {"a": 1}]


def refused(call: Callable[[], object], field: str) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as caught:
        call()
    assert caught.value.metadata == {"field": field}
    assert caught.value.message.startswith(f"{field}: ")
    assert caught.value.reason is Reason.REQUEST_INVALID
    return caught.value


@pytest.mark.parametrize("body", [b'{"a": 1}', bytearray(b'{"a": 1}')])
def test_an_object_is_read(body: bytes | bytearray) -> None:
    assert payload.read_object(body) == {"a": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"null", b"[]", b'"text"', b"7", b"true", b"{", b"{}x", b'{"a":}', b"{'a':1}", b'{"a":NaN}', b'{"a":1e999}',
        b'{"a":"\\ud800"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xff"}', b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b'{"a":"\n"}',
        b"[" * 100_000, b'{"a":' * 100_000, b"\x00", b'{"a":1}\x00',
    ],
)  # fmt: skip
def test_what_is_no_object_is_refused(body: bytes) -> None:
    assert len(refused(lambda: payload.read_object(body), "body").message) < 200
    refused(lambda: payload.read_object(bytearray(body)), "body")


READERS: list[tuple[Callable[[Any], Any], list[Any]]] = [
    (lambda value: payload.text(value, "p"), ["text"]),
    (lambda value: payload.boolean(value, "p"), [True]),
    (lambda value: payload.integer(value, "p", -1, 1), [0, -1]),
    (lambda value: payload.number(value, "p", -1, 1.5), [0, -1, 1.5]),
    (lambda value: payload.array(value, "p"), [[], ["a"]]),
    (lambda value: payload.mapping(value, "p"), [{}, {"a": 1}]),
    (lambda value: payload.choice(value, "p", ("text", "other")), ["text"]),
]


@pytest.mark.parametrize(("read", "taken"), READERS)
@pytest.mark.parametrize("value", OTHERS)
def test_readers_take_their_kind_only(read: Callable[[Any], Any], taken: list[Any], value: Any) -> None:
    # By type as well: in Python True equals 1, in JSON it doesn't.
    if any(type(value) is type(item) and value == item for item in taken):
        assert read(value) == value
    else:
        refused(lambda: read(value), "p")


@pytest.mark.parametrize("value", [-3, 4, 10**18, 1e300])
def test_bounds_are_inclusive(value: Any) -> None:
    assert payload.integer(-2, "p", -2, 3) == -2
    assert payload.integer(3, "p", -2, 3) == 3
    assert payload.number(3, "p", -2, 3) == 3.0
    assert type(payload.number(3, "p", -2, 3)) is float
    refused(lambda: payload.integer(value, "p", -2, 3), "p")
    refused(lambda: payload.number(value, "p", -2, 3), "p")


def test_no_number_is_no_number() -> None:
    refused(lambda: payload.number(float("nan"), "p", -2, 3), "p")


def test_a_choice_may_not_be_hashable() -> None:
    refused(lambda: payload.choice(["a"], "p", {"a": 1}), "p")


def test_required() -> None:
    assert payload.required({"a": 0}, "a", "x") == 0
    refused(lambda: payload.required({"a": None}, "a", "x"), "x.a")
    refused(lambda: payload.required({}, "a", ""), "a")


def test_unknown_keys_are_refused_by_name() -> None:
    payload.only({"a": 1, "b": 2}, ("a", "b", "c"), "x")
    with pytest.raises(FieldUnsupported) as caught:
        payload.only({"a": 1, "z": None}, ("a",), "x")
    assert caught.value.metadata == {"field": "x.z"}
    assert caught.value.reason is Reason.FIELD_UNSUPPORTED
    with pytest.raises(FieldUnsupported) as caught:
        payload.only({"z" * 100_000: 1}, ("a",), "")
    assert len(caught.value.message) < 200


def test_null_only() -> None:
    payload.null_only({"a": None, "b": 1}, ("a", "c"), "x")
    with pytest.raises(FieldUnsupported) as caught:
        payload.null_only({"a": False}, ("a",), "x")
    assert caught.value.metadata == {"field": "x.a"}


def test_json_text() -> None:
    assert payload.json_text({"a": ["é", 1.5, None]}, "p") == '{"a":["é",1.5,null]}'
    refused(lambda: payload.json_text([1], "p"), "p")
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    refused(lambda: payload.json_text(deep, "p"), "p")


def test_labels() -> None:
    assert payload.labels({"a": "1"}, "m") == {"a": "1"}
    refused(lambda: payload.labels({"a": 1}, "m"), "m.a")
    refused(lambda: payload.labels([], "m"), "m")
    assert len(refused(lambda: payload.labels({"k" * 9000: 1}, "m"), "m." + "k" * 64 + "…").message) < 200


def image(url: str) -> conversation_pb2.Image:
    result = conversation_pb2.Image()
    payload.image_from_url(result, url, "u")
    return result


def test_pictures_by_address() -> None:
    assert image("https://example.com/a.png?b=c").url == "https://example.com/a.png?b=c"
    assert image("https://" + "a" * 2040).url


@pytest.mark.parametrize(
    "url",
    [
        "", "https://", "http://example.com/a.png", "file:///etc/passwd", "ftp://a/b", "//a/b", "javascript:1", " https://a/b",
        "https://" + "a" * 2041, "https://" + "é" * 1100, "https://a/\r\nhost: b", "https://a/b c", "https://a/\0", "https://a/\x7f",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(url: str) -> None:
    refused(lambda: image(url), "u")


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/gif", "image/webp", "IMAGE/PNG"])
def test_pictures_by_value(media_type: str) -> None:
    result = image(f"data:{media_type};base64,{PIXEL}")
    assert result.data == b"\x89PNG not really"
    assert result.media_type == media_type.lower()


@pytest.mark.parametrize(
    "url",
    [
        "data:", "data:,", f"data:image/png,{PIXEL}", f"data:image/png;base64{PIXEL}", f"data:image/svg+xml;base64,{PIXEL}",
        f"data:;base64,{PIXEL}", f"data:image/png;charset=utf-8;base64,{PIXEL}", "data:image/png;base64,", "data:image/png;base64,A",
        "data:image/png;base64,AA=A", "data:image/png;base64,AAé=", "data:image/png;base64,AA AA", "data:image/png;base64,AA\nAA",
        "data:image/png;base64,-_-_", "data:" + "a" * 10_000 + ";base64,AAAA",
    ],
)  # fmt: skip
def test_other_values_are_refused(url: str) -> None:
    assert len(refused(lambda: image(url), "u").message) < 250


@pytest.mark.parametrize("excess", [0, 1, 2, 3])
def test_a_picture_may_be_as_large_as_the_contract_says(excess: int) -> None:
    encoded = base64.b64encode(bytes(payload.MAX_IMAGE_BYTES + excess)).decode()
    result = conversation_pb2.Image()
    if excess:
        refused(lambda: payload.image_from_base64(result, encoded, "image/png", "u"), "u")
        assert result == conversation_pb2.Image()
    else:
        payload.image_from_base64(result, encoded, "image/png", "u")
        assert len(result.data) == payload.MAX_IMAGE_BYTES


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, "null"), (True, "true"), (False, "false"), ("a", "'a'"), (1, "1"), (1.5, "1.5"), ([1] * 99, "an array"), ({}, "an object"),
        ("b" * 41, f"{'b' * 40!r}…"),
    ],
)  # fmt: skip
def test_shown(value: Any, wanted: str) -> None:
    assert payload.shown(value) == wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@unhurried
@given(value=json_values)
def test_what_is_shown_is_short_and_one_line(value: Any) -> None:
    shown = payload.shown(value)
    assert "\n" not in shown
    assert len(shown) < 600


@unhurried
@given(value=json_values, reader=st.sampled_from([read for read, _ in READERS]))
def test_readers_raise_nothing_else(value: Any, reader: Callable[[Any], Any]) -> None:
    try:
        assert reader(value) == value
    except RequestInvalid:
        refused(lambda: reader(value), "p")


@unhurried
@given(
    url=st.text(max_size=80)
    | st.text(max_size=40).map("data:image/png;base64,".__add__)
    | st.text(max_size=40).map("https://".__add__)
)
def test_addresses_raise_nothing_else(url: str) -> None:
    try:
        image(url)
    except RequestInvalid:
        refused(lambda: image(url), "u")
