"""What cached functions do beside their callers: refreshing stale values, and prolonging leases.

Bounded in every direction: a few threads (or tasks per loop), a queue that refuses when it is
full, and an end within `STOP_SECONDS` when the interpreter leaves.
"""

from __future__ import annotations

import asyncio
import atexit
import heapq
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

from ... import _observe
from ..._fork import survives_fork

THREADS_MAX = 4
QUEUE_MAX = 256
TASKS_MAX = 64  # per event loop
IDLE_SECONDS = 10.0  # after which a thread ends
STOP_SECONDS = 5.0  # what an interpreter that ends waits for refreshes under way


class ThreadPool:
    """Runs functions in a few daemon threads, started when needed."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(QUEUE_MAX)
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, fn: Callable[[], object]) -> bool:
        """Run `fn` soon. False when too much waits already, or the interpreter ends."""
        with self._lock:
            if self._closed:
                return False
            try:
                self._queue.put_nowait(fn)
            except queue.Full:
                return False
            if self._queue.qsize() > self._idle and len(self._threads) < THREADS_MAX:
                thread = threading.Thread(target=self._work, name="pgkv-cached", daemon=True)
                self._threads.add(thread)
                thread.start()
        return True

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._lock:
                self._idle += 1
            try:
                fn = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                fn = None
            with self._lock:
                self._idle -= 1
                # An item may have come between the timeout and here: then stay.
                if fn is None and (self._closed or self._queue.empty()):
                    self._threads.discard(me)
                    return
            if fn is not None:
                _guarded(fn)

    def close(self, seconds: float = STOP_SECONDS) -> None:
        """Drop what waits, and give what runs so long to end."""
        with self._lock:
            self._closed = True
            threads = tuple(self._threads)
            while True:
                try:
                    self._queue.get_nowait()
                except queue.Empty:
                    break
            for _ in threads:
                self._queue.put_nowait(None)
        deadline = monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))

    def after_fork(self) -> None:
        """Begin anew: threads do not survive a fork."""
        self._begin()


class TaskPool:
    """Runs coroutines as tasks, at most `TASKS_MAX` per event loop. They end with their loop:
    ``asyncio.run()`` cancels them, and each gives up its lease on the way out."""

    def __init__(self) -> None:
        self._tasks: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, set[asyncio.Task[None]]
        ] = weakref.WeakKeyDictionary()

    def submit(self, make: Callable[[], Coroutine[Any, Any, object]]) -> bool:
        """Run a coroutine soon, on the running loop. False when too many run already."""
        loop = asyncio.get_running_loop()
        tasks = self._tasks.setdefault(loop, set())
        if len(tasks) >= TASKS_MAX:
            return False
        task = loop.create_task(self._guard(make()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return True

    async def _guard(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  # a mistake of ours must not end the others
            _observe.warning("pgkv.cached.broken", error=type(error).__name__)


def _guarded(fn: Callable[[], object]) -> None:
    try:
        fn()
    except Exception as error:  # noqa: BLE001  # a mistake of ours must not end the others
        _observe.warning("pgkv.cached.broken", error=type(error).__name__)


class Heartbeats:
    """Calls functions again and again, from one daemon thread, until they are stopped or return
    False. A function that runs less than its first interval costs a heap entry and no more."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._heap: list[tuple[float, int, float, Callable[[], bool], str]] = []
        self._live: set[int] = set()
        self._numbers = itertools.count()
        self._running = False
        self._changed = threading.Condition(threading.Lock())

    def start(self, seconds: float, beat: Callable[[], bool], function: str) -> Callable[[], None]:
        """Call `beat` every so many seconds, for that cached function; returns what stops it."""
        with self._changed:
            number = next(self._numbers)
            self._live.add(number)
            due = monotonic() + seconds
            heapq.heappush(self._heap, (due, number, seconds, beat, function))
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="pgkv-cached-leases", daemon=True).start()
            elif self._heap[0][1] == number:
                self._changed.notify()
        return lambda: self._live.discard(number)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._heap and self._heap[0][1] not in self._live:
                    heapq.heappop(self._heap)
                now = monotonic()
                if not self._heap:
                    if not self._changed.wait(IDLE_SECONDS) and not self._heap:
                        self._running = False
                        return
                    continue
                due, number, seconds, beat, function = self._heap[0]
                if due > now:
                    self._changed.wait(due - now)
                    continue
                heapq.heappop(self._heap)
            try:
                again = beat()
            except Exception as error:  # noqa: BLE001  # tried again: the lease may yet be saved
                _observe.debug(
                    "pgkv.cached.renewal_failed", function=function, error=type(error).__name__
                )
                again = True
            with self._changed:
                if again and number in self._live:
                    again_at = monotonic() + seconds
                    heapq.heappush(self._heap, (again_at, number, seconds, beat, function))
                else:
                    self._live.discard(number)

    def after_fork(self) -> None:
        """Begin anew: threads do not survive a fork."""
        self._begin()


def start_task_heartbeat(
    seconds: float, beat: Callable[[], Coroutine[Any, Any, bool]], function: str
) -> Callable[[], None]:
    """Await `beat` every so many seconds, for that cached function, on the running loop, until
    stopped or it returns False.

    A function that runs less than the first interval costs a timer and no task. A beat under way
    is left to end by itself: cancelling it would cost a connection.
    """
    loop = asyncio.get_running_loop()
    state: dict[str, Any] = {"stopped": False}

    async def once() -> None:
        try:
            again = await beat()
        except Exception as error:  # noqa: BLE001  # tried again: the lease may yet be saved
            _observe.debug(
                "pgkv.cached.renewal_failed", function=function, error=type(error).__name__
            )
            again = True
        if again and not state["stopped"]:
            arm()

    def begin() -> None:
        state["task"] = loop.create_task(once())  # kept: a loop's own reference is weak

    def arm() -> None:
        state["timer"] = loop.call_later(seconds, begin)

    def stop() -> None:
        state["stopped"] = True
        state["timer"].cancel()

    arm()
    return stop


threads = survives_fork(ThreadPool())
tasks = TaskPool()
heartbeats = survives_fork(Heartbeats())


atexit.register(threads.close)
