"""Reading JSON that strangers send: every wrong type, range or name becomes a refusal that says where.

Paths are those of the JSON as it was sent, `messages[2].content[0].image_url.url`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from typing import Any, Final

import orjson

from services.gateway.edge.errors import EdgeError
from services.runtime.errors import Reason
from sluice.inference.v1 import conversation_pb2

INT32_MAX: Final = 2**31 - 1
INT64_MAX: Final = 2**63 - 1
MEDIA_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
MAX_IMAGE_BYTES: Final = 8 * 1024 * 1024
MAX_URL_BYTES: Final = 2048
_SHOWN: Final = 40


class RequestInvalid(EdgeError):
    """The request breaks a rule at `field`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(Reason.REQUEST_INVALID, f"{field}: {message}", metadata={"field": field})


class FieldUnsupported(EdgeError):
    """The request uses a field, or a value of it, that Sluice can't honour; leaving it out would change the answer in silence."""

    def __init__(self, field: str, message: str = "is not supported by Sluice; leave it out") -> None:
        super().__init__(Reason.FIELD_UNSUPPORTED, f"{field}: {message}", metadata={"field": field})


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that is the body."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not body:
            raise RequestInvalid("body", "is empty; send a JSON object") from None
        raise RequestInvalid("body", f"is not JSON: {error.msg} at byte {error.pos}") from None
    if type(value) is not dict:
        raise RequestInvalid("body", f"must be a JSON object, is {shown(value)}")
    return value


def text(value: object, path: str) -> str:
    """A string."""
    if type(value) is not str:
        raise RequestInvalid(path, f"must be a string, is {shown(value)}")
    return value


def boolean(value: object, path: str) -> bool:
    """`true` or `false`."""
    if type(value) is not bool:
        raise RequestInvalid(path, f"must be true or false, is {shown(value)}")
    return value


def integer(value: object, path: str, minimum: int, maximum: int) -> int:
    """A whole number in bounds that are inclusive."""
    if type(value) is not int:
        raise RequestInvalid(path, f"must be a whole number, is {shown(value)}")
    if not minimum <= value <= maximum:
        raise RequestInvalid(path, f"must be {minimum} to {maximum}, is {value}")
    return value


def number(value: object, path: str, minimum: float, maximum: float) -> float:
    """A number in bounds that are inclusive."""
    if type(value) is not int and type(value) is not float:
        raise RequestInvalid(path, f"must be a number, is {shown(value)}")
    if not minimum <= value <= maximum:
        raise RequestInvalid(path, f"must be {minimum:g} to {maximum:g}, is {shown(value)}")
    return float(value)


def array(value: object, path: str) -> list[Any]:
    """A JSON array."""
    if type(value) is not list:
        raise RequestInvalid(path, f"must be an array, is {shown(value)}")
    return value


def mapping(value: object, path: str) -> dict[str, Any]:
    """A JSON object."""
    if type(value) is not dict:
        raise RequestInvalid(path, f"must be an object, is {shown(value)}")
    return value


def choice(value: object, path: str, choices: Collection[str]) -> str:
    """One of `choices`."""
    if type(value) is not str or value not in choices:
        raise RequestInvalid(path, f"must be one of {', '.join(map(repr, choices))}, is {shown(value)}")
    return value


def required(item: Mapping[str, Any], key: str, path: str) -> Any:
    """The value at `key`, which must be there and not null."""
    value = item.get(key)
    if value is None:
        raise RequestInvalid(inside(path, key), "is required")
    return value


def only(item: Mapping[str, Any], known: Collection[str], path: str) -> None:
    """Refuses by name every key of `item` that isn't known."""
    for key in item:
        if key not in known:
            raise FieldUnsupported(inside(path, _name(key)), "is unknown or not supported by Sluice; leave it out")


def null_only(item: Mapping[str, Any], keys: Collection[str], path: str) -> None:
    """Refuses by name those of `keys` that have a value: null asks for nothing."""
    for key in keys:
        if item.get(key) is not None:
            raise FieldUnsupported(inside(path, key))


def inside(path: str, key: str) -> str:
    """The path of `key` below `path`."""
    return f"{path}.{key}" if path else key


def json_text(value: object, path: str) -> str:
    """An object as JSON text."""
    mapping(value, path)
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise RequestInvalid(path, f"can't be passed on: {error}") from None


def labels(value: object, path: str) -> dict[str, str]:
    """An object whose values are strings."""
    result = mapping(value, path)
    for key, label in result.items():
        if type(label) is not str:
            raise RequestInvalid(f"{path}.{_name(key)}", f"must be a string, is {shown(label)}")
    return result


def image_from_url(image: conversation_pb2.Image, url: str, path: str) -> None:
    """Fills `image` from a `data:` or https address."""
    if url.startswith("data:"):
        head, comma, encoded = url[5:].partition(",")
        media_type, _, encoding = head.partition(";")
        if not comma or encoding != "base64":
            raise RequestInvalid(path, "a data: address must look like data:image/png;base64,…")
        image_from_base64(image, encoded, media_type.lower(), path)
        return
    if not url.startswith("https://"):
        raise RequestInvalid(path, "must be an https: or a data: address")
    if len(url.encode()) > MAX_URL_BYTES:
        raise RequestInvalid(path, f"may have at most {MAX_URL_BYTES} bytes")
    if len(url) == 8 or " " in url or not url.isprintable():
        # A line break in it could end a provider's log line or header.
        raise RequestInvalid(path, "must be an https: address without spaces and control characters")
    image.url = url


def image_from_base64(image: conversation_pb2.Image, encoded: str, media_type: str, path: str) -> None:
    """Fills `image` from its base64 text."""
    if media_type not in MEDIA_TYPES:
        raise RequestInvalid(
            path, f"the media type must be one of {', '.join(sorted(MEDIA_TYPES))}, is {media_type[:_SHOWN]!r}"
        )
    if len(encoded) > MAX_IMAGE_BYTES // 3 * 4 + 4:
        raise RequestInvalid(path, f"a picture may have at most {MAX_IMAGE_BYTES} bytes")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RequestInvalid(path, "is not base64") from None
    if not data:
        raise RequestInvalid(path, "the picture is empty")
    if len(data) > MAX_IMAGE_BYTES:
        raise RequestInvalid(path, f"a picture may have at most {MAX_IMAGE_BYTES} bytes")
    image.data = data
    image.media_type = media_type


def shown(value: object) -> str:
    """`value` for an error text: its kind, and itself where it is short."""
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}…"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "an object"
    return repr(value)


def _name(key: str) -> str:
    return key if len(key) <= 64 else key[:64] + "…"
