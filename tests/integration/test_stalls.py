"""What a process that stood still does when it goes on: a frozen virtual machine, a debugger, a machine that swaps."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from urllib.parse import urlsplit

import pytest

from tests.running import Running, running

_CLIENTS = 20
_STALL_SECONDS = 3.0
# Shorter than the stall, so that every lease ends meanwhile. Of the places all but a few are used at any time: what an ended lease still
# keeps would be missed at once.
_SECTIONS = {
    "metering": {"lease_seconds": 1.0, "bootstrap_requests_per_minute": 10_000_000, "bootstrap_concurrency": _CLIENTS + 4}
}


class _Traffic:
    """Clients that each send one request after the other and count the answers by moment and status."""

    def __init__(self, started: Running) -> None:
        self.moment = "before"
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.bodies: set[bytes] = set()
        self._address = urlsplit(started.ready.http).netloc
        self._key = started.ready.key
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(_CLIENTS)]

    def __enter__(self) -> _Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _send(self, number: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        count = 0
        while not self._ended.is_set():
            count += 1
            body = json.dumps({"model": "echo/echo", "messages": [{"role": "user", "content": f"{number} {count}"}]})
            connection.request("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {self._key}"})
            with connection.getresponse() as response:
                said = response.read()
            with self._lock:
                self.statuses[self.moment, response.status] += 1
                if response.status != 200:
                    self.bodies.add(said[:300])
        connection.close()


@pytest.mark.parametrize(("topology", "who"), [("compact", "gateway"), ("mesh", "gateway"), ("mesh", "execution")])
def test_nobody_is_refused_because_a_process_stood_still(topology: str, who: str) -> None:
    with running(topology, sections=_SECTIONS) as started, _Traffic(started) as traffic:
        time.sleep(1.5)
        pid = started.ready.pids[who]
        os.kill(pid, signal.SIGSTOP)
        try:
            traffic.moment = "during"
            time.sleep(_STALL_SECONDS)
        finally:
            os.kill(pid, signal.SIGCONT)
        traffic.moment = "after"
        time.sleep(2.0)
    assert {status for _, status in traffic.statuses} == {200}, traffic.bodies
    assert traffic.statuses["before", 200] > _CLIENTS
    assert traffic.statuses["after", 200] > _CLIENTS
