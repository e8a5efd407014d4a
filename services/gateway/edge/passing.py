"""Streams that are passed on unread, with our names in them.

A provider's own response id and model name stand in its events. The id must be that of our operation, by which an outcome is reported
and a support case found; the name must be the catalogue's, since a server's own may be a path on its disk. Both stand between unescaped
quotes, which occur in JSON only as structure: replacing the bytes can't touch what the model says.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

Swaps = tuple[tuple[bytes, bytes], ...]


def swaps_of(data: bytes, ours: Mapping[str, str], inner: str = "") -> Swaps | None:
    """What to replace by what, learnt from the first event that has the fields of `ours` (below `inner`, if given).

    None: that event hasn't come yet.
    """
    for line in data.split(b"\n"):
        if not line.startswith(b"data:"):
            continue
        try:
            document = orjson.loads(line[5:].strip())
        except orjson.JSONDecodeError:
            continue
        if inner and isinstance(document, dict):
            document = document.get(inner)
        if not isinstance(document, dict) or not any(isinstance(document.get(name), str) for name in ours):
            continue
        found = []
        for name, value in ours.items():
            theirs = document.get(name)
            if not isinstance(theirs, str):
                continue
            for gap in (b"", b" "):
                written = b'"%b":%b%b' % (name.encode(), gap, orjson.dumps(theirs))
                if written in line:
                    found.append((written, b'"%b":%b%b' % (name.encode(), gap, orjson.dumps(value))))
        return tuple(found)
    return None
