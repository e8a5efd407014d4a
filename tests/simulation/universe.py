"""The clock, the processes' event loops, and who gets the next turn.

Each process has an event loop of its own, in which callbacks run in the order in which they were asked for, as asyncio promises. Nothing
is promised between processes: the seed says whose turn it is. Time passes where nobody has anything to do, and a little at each turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import random
import secrets
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any, Final, TypeVar, TypeVarTuple
from unittest import mock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_START: Final = 1_000.0
_EPOCH: Final = 1_700_000_000.0
"""Unix seconds at moment 0 of the clock."""
_TURN: Final = 0.000_001
"""Seconds that a turn takes."""
_PRUNE: Final = 512


class Killed(BaseException):
    """The process was killed in the middle of a turn. Whatever still runs of it can't reach anything any more."""


class Loop(asyncio.AbstractEventLoop):
    """The event loop of one process. Once it is dead nothing runs in it."""

    def __init__(self, universe: Universe, name: str) -> None:
        self.universe = universe
        self.name = name
        self.alive = True
        self.ready: deque[asyncio.Handle] = deque()
        self.stalled_until = 0.0
        self.step_count = 0
        self.killable = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._generators: list[Any] = []

    def check(self) -> None:
        """Raises Killed when the process is dead: called wherever something would leave it."""
        if not self.alive:
            raise Killed

    def die(self) -> list[asyncio.Task[Any]]:
        """Ends it as `kill -9` does. Returns what was under way: kept by the universe, since dropping it would run its cleanup now."""
        self.alive = False
        self.ready.clear()
        # The generators are kept by who reads them.
        self._generators.clear()
        tasks, self._tasks = self._tasks, []
        return tasks

    def spawn(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Starts a task from outside of the process."""
        return self.create_task(work, name=name)

    def pending(self) -> list[asyncio.Task[Any]]:
        """What hasn't ended."""
        return [task for task in self._tasks if not task.done()]

    def began(self, generator: Any) -> None:
        """An asynchronous generator of this process is read from now on."""
        if len(self._generators) >= _PRUNE:
            self._generators = [known for known in self._generators if known.ag_frame is not None]
        self._generators.append(generator)

    def places(self) -> Iterator[tuple[str, int]]:
        """File and line of every frame that waits."""
        for work in [task.get_coro() for task in self.pending()] + self._generators:
            inner: Any = work
            while inner is not None:
                frame = getattr(inner, "cr_frame", None) or getattr(inner, "gi_frame", None) or getattr(inner, "ag_frame", None)
                if frame is not None:
                    yield frame.f_code.co_filename, frame.f_lineno
                behind = (
                    getattr(inner, "cr_await", None) or getattr(inner, "gi_yieldfrom", None) or getattr(inner, "ag_await", None)
                )
                if behind is None and frame is not None and frame.f_code.co_name == "carried":
                    # It hands on what its work waits for, and at first doesn't wait for the work itself.
                    behind = frame.f_locals["work"]
                inner = behind

    # What asyncio asks of a loop.

    def time(self) -> float:
        return self.universe.now

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if self.alive:
            self.ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.universe.now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self.alive:
            self.universe.set_timer(when, handle, self)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is left where it is and passed over at its time."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        if not self.alive:
            self.universe.bury([task])
            return task
        if len(self._tasks) >= _PRUNE:
            self._tasks = self.pending()
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """There are no threads: the work is done some time later, all at once."""
        future: asyncio.Future[T] = self.create_future()

        def run() -> None:
            if future.done():
                return
            try:
                result = func(*args)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self.universe.pause(), run)
        return future

    def call_exception_handler(self, context: Any) -> None:
        error = context.get("exception")
        if self.alive and not isinstance(error, Killed):
            self.universe.complain(f"{self.name}: {context.get('message')}: {error!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self.alive

    def is_closed(self) -> bool:
        return not self.alive


class Universe:
    """Everything there is of one seed. `turn` is called before each turn of a process that can be killed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = _START
        self.trace: list[str] = []
        self.complaints: list[str] = []
        self.turn: Callable[[Loop], None] = lambda _: None
        self.point: Callable[[Loop, str], None] = lambda _, __: None
        self._loops: list[Loop] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Loop]] = []
        self._sequence = 0
        self._graves: list[asyncio.Task[Any]] = []
        self.step_count = 0

    def log(self, text: str) -> None:
        """A line of the trace."""
        self.trace.append(f"{self.now - _START:11.6f} {text}")

    def complain(self, text: str) -> None:
        """Something that must not be."""
        self.log(f"!!! {text}")
        self.complaints.append(text)

    def loop(self, name: str) -> Loop:
        """The loop of a new process."""
        made = Loop(self, name)  # type: ignore[abstract]  # of a loop what is used here, no sockets and no children
        self._loops.append(made)
        return made

    def kill(self, loop: Loop) -> None:
        """Ends a process at once."""
        self.bury(loop.die())
        self._loops.remove(loop)

    def bury(self, tasks: list[asyncio.Task[Any]]) -> None:
        """Keeps what mustn't run on, until the end."""
        self._graves += tasks

    def pause(self) -> float:
        """Seconds that something takes: mostly less than a millisecond, sometimes much more."""
        drawn = self.rng.random()
        return 0.000_1 + 0.000_9 * drawn if drawn < 0.8 else 0.001 * 40.0 ** ((drawn - 0.8) * 5.0)

    def may(self, probability: float) -> bool:
        """Whether something happens."""
        return self.rng.random() < probability

    def set_timer(self, when: float, handle: asyncio.TimerHandle, loop: Loop) -> None:
        """Puts a callback off."""
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, handle, loop))

    def run(self, until: float, done: Callable[[], bool]) -> bool:
        """Gives turns until `done`; False when `until` came first, or nothing was left to do."""
        while not done():
            if self.now >= until or not self._step(until):
                return False
        return True

    def _step(self, until: float) -> bool:
        now, timers = self.now, self._timers
        while timers and timers[0][0] <= now:
            _, _, timer, owner = heapq.heappop(timers)
            if owner.alive and not timer.cancelled():
                owner.ready.append(timer)
        runnable = [loop for loop in self._loops if loop.ready and loop.stalled_until <= now]
        if not runnable:
            moments = [loop.stalled_until for loop in self._loops if loop.ready]
            if timers:
                moments.append(timers[0][0])
            if not moments:
                return False
            self.now = max(now, min(until, *moments))
            return True
        loop = runnable[0] if len(runnable) == 1 else runnable[int(self.rng.random() * len(runnable))]
        if loop.killable:
            self.turn(loop)
            if not loop.alive or loop.stalled_until > now:
                return True
        handle = loop.ready.popleft()
        if handle.cancelled():
            return True
        self.now = now + _TURN
        self.step_count += 1
        loop.step_count += 1
        asyncio._set_running_loop(loop)
        try:
            handle._run()
        finally:
            asyncio._set_running_loop(None)
        return True

    def close(self) -> None:
        """The end of everything: what was under way is dropped, and can't reach anything."""
        for loop in self._loops:
            self._graves += loop.die()
        self._loops.clear()
        self._timers.clear()
        with mock.patch.object(sys, "unraisablehook", _ignore), warnings.catch_warnings():
            # They are cut off where they wait, and many complain.
            warnings.simplefilter("ignore")
            for task in self._graves:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    work: Any = task.get_coro()
                    with contextlib.suppress(BaseException):
                        work.close()
            self._graves.clear()
            gc.collect()


@contextlib.contextmanager
def governed(universe: Universe) -> Iterator[None]:
    """While it is open, clocks and secrets come from the universe, and whatever the interpreter ends late ends in silence."""

    def wall() -> float:
        return _EPOCH + universe.now

    def token_hex(size: int = 32) -> str:
        return universe.rng.randbytes(size).hex()

    with contextlib.ExitStack() as stack:
        for name, clock in (
            ("time", wall),
            ("time_ns", lambda: int(wall() * 1e9)),
            ("monotonic", lambda: universe.now),
            ("monotonic_ns", lambda: int(universe.now * 1e9)),
            ("perf_counter", lambda: universe.now),
        ):
            stack.enter_context(mock.patch.object(time, name, clock))
        stack.enter_context(mock.patch.object(secrets, "randbits", universe.rng.getrandbits))
        stack.enter_context(mock.patch.object(secrets, "token_hex", token_hex))
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(_begin, _drop)
        stack.callback(sys.set_asyncgen_hooks, *hooks)
        stack.callback(universe.close)
        yield


def _begin(generator: Any) -> None:
    loop = asyncio._get_running_loop()
    if isinstance(loop, Loop):
        loop.began(generator)


def _ignore(unraisable: Any) -> None:
    """Nobody is told."""


def _drop(generator: Any) -> None:
    """A generator that nobody reads on: its process closes it, when there is one."""
    loop = asyncio._get_running_loop()
    if isinstance(loop, Loop) and loop.alive:
        loop.create_task(generator.aclose())
