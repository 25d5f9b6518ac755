"""The background of a database: the work done outside callers.

There is one for each process and database (for stores of threads: an event loop in a thread), and
one for each event loop and database. It renews (`renewer`), listens (`listener`), and runs work
that nothing waits for (`run_later`). It starts when a store first needs it, and ends when the last
store that uses it is closed or dropped. A forked child starts its own.

A pattern keeps its own state for a database in a `part`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from .._engine._async.channel import AsyncPoolChannel
from .._engine._async.coalesce import CoalescingChannel
from .._engine._sync.channel import PoolChannel
from .._fork import CONNECTIONS, THREADS, new_lock, survives_fork
from ..config import Pooler
from .connection import DedicatedConnection
from .listener import Listener
from .renewal import Renewer, broken

THREADS_MAX = 4
QUEUE_MAX = 256
TASKS_MAX = 64  # per background
IDLE_SECONDS = 10.0  # after which a thread ends
STOP_TIME = 5.0  # seconds for a background to end, and for work under way when the program ends

T = TypeVar("T")


class Background:
    """Renewal, notifications and later work of one database, in one event loop: that one, or one in a
    thread of its own."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop | None, conninfo: str, pooler: Pooler
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = loop or asyncio.SelectorEventLoop()
        self.ended: bool = False
        self.users: set[int] = set()
        direct = pooler is Pooler.NONE
        # Timers keep the context they were created in, which must not be the first caller's.
        context = Context()
        connection = DedicatedConnection(conninfo, prepares=direct)
        self.renewer: Renewer = Renewer(self.loop, connection, context)
        unavailable = "" if direct else "pooler=TRANSACTION carries no notifications"
        self.listener: Listener = Listener(self.loop, conninfo, context, unavailable)
        self._parts: dict[Any, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        if loop is None:
            self._thread = threading.Thread(target=self._run, name="pgkv-background", daemon=True)
            self._thread.start()

    def part(self, kind: Callable[[Background], T]) -> T:
        """Return this background's object of that kind, created at the first call."""
        part = self._parts.get(kind)
        if part is None:
            part = self._parts.setdefault(kind, kind(self))
        return part  # type: ignore[no-any-return]  # what `kind` makes

    def run_later(self, work: Callable[[], Any], done: Callable[[], object] | None = None) -> bool:
        """Run work that nothing waits for, in a copy of the caller's context: in the background of
        an event loop as a task (`work` returns a coroutine), otherwise in a thread. `done` is
        called when it has ended in any way, even if it never started. Returns False, and does not
        call `done`, if too much work is waiting already."""
        if self._thread is not None:
            return workers.submit(work, done)
        if len(self._tasks) >= TASKS_MAX:
            return False
        task = self.loop.create_task(_guarded(work))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if done is not None:
                done()

        task.add_done_callback(ended)
        return True

    # -- its life

    def _run(self) -> None:
        try:
            while not self.ended:
                try:
                    self.loop.run_forever()
                except BaseException as error:  # noqa: BLE001  # a callback's SystemExit ends no renewal
                    broken(error)
            pending = asyncio.all_tasks(self.loop)
            for task in pending:
                task.cancel()
            if pending:
                self.loop.run_until_complete(asyncio.wait(pending))
        finally:
            self.loop.close()

    def _stop(self, stopped: threading.Event) -> None:
        try:
            self.listener.stop()
            self.renewer.stop()
        finally:
            self.ended = True
            if self._thread is not None:
                self.loop.stop()
            stopped.set()

    def close(self, *, wait: bool) -> None:
        """End it, from any thread. With `wait`, return when it has ended, unless called in its own
        thread."""
        if self.loop.is_closed():
            self.ended = True
            return
        stopped = threading.Event()
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self.loop.call_soon_threadsafe(self._stop, stopped)
        if wait and not self._is_here():
            stopped.wait(STOP_TIME)
            if self._thread is not None:
                self._thread.join(STOP_TIME)

    def _is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            # An async store is closed from a thread, while its loop runs.
            return not self.loop.is_running()


async def _guarded(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    try:
        await work()
    except Exception as error:  # noqa: BLE001  # nothing waits for it
        broken(error)


# -- which one -----------------------------------------------------------------------------


def pool_channel(store: Any) -> PoolChannel | AsyncPoolChannel | None:
    """Return the channel over the store's pool; None for a view of a transaction."""
    channel: object = store._bare
    if isinstance(channel, CoalescingChannel):
        channel = channel._inner
    return channel if isinstance(channel, PoolChannel | AsyncPoolChannel) else None


class _Backgrounds:
    def __init__(self) -> None:
        self._lock = new_lock(self)
        self._inherited: list[object] = []
        self._begin()
        survives_fork(self, CONNECTIONS)

    def _begin(self) -> None:
        self._of_process: dict[Any, Background] = {}
        self._of_loops: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[Any, Background]
        ] = weakref.WeakKeyDictionary()
        # A store's own, found without putting its conninfo together again.
        self._of_channels: weakref.WeakKeyDictionary[Any, Background] = weakref.WeakKeyDictionary()

    def after_fork(self) -> None:
        # Kept: a destructor would send a goodbye on the parent's sockets.
        for background in self._of_channels.values():
            background.ended = True
        self._inherited.append((self._of_process, self._of_loops, self._of_channels))
        self._begin()

    def get(
        self, channel: PoolChannel | AsyncPoolChannel, loop: asyncio.AbstractEventLoop | None
    ) -> Background:
        known = self._of_channels.get(channel)
        if known is not None and not known.ended and loop in (None, known.loop):
            return known
        pooler = channel._config.pooler
        key = (channel.conninfo(), pooler)
        with self._lock:
            table = self._of_process if loop is None else self._of_loops.setdefault(loop, {})
            background = table.get(key)
            if background is None or background.ended:
                background = table[key] = Background(loop, key[0], pooler)
                # Exit handlers run from the last to the first: this one before the stop of an embedded server.
                atexit.unregister(_at_exit)
                atexit.register(_at_exit)
            if id(channel) not in background.users:
                background.users.add(id(channel))
                self._watch(channel, background, table, key)
            self._of_channels[channel] = background
        return background

    def stop_listening(self) -> None:
        """End the listeners of threads. Leases are left as they are: their ends are not reported."""
        for background in list(self._of_process.values()):
            stopped = threading.Event()
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                background.loop.call_soon_threadsafe(background.listener.stop)
                background.loop.call_soon_threadsafe(stopped.set)
                stopped.wait(STOP_TIME)

    def forget(self, channel: Any) -> None:
        """Look again where the channel's server is, at the next `get`."""
        self._of_channels.pop(channel, None)

    def _watch(
        self, channel: Any, background: Background, table: dict[Any, Background], key: Any
    ) -> None:
        user, pid = id(channel), os.getpid()

        def leave(*, wait: bool) -> None:
            if os.getpid() != pid:
                return  # it is the parent's
            with self._lock:
                background.users.discard(user)
                last = not background.users
                if last and table.get(key) is background:
                    del table[key]
            if last:
                background.close(wait=wait)

        def dropped() -> None:
            leave(wait=False)
            if os.getpid() == pid:
                warnings.warn(
                    "a store was dropped without close(); its background work was stopped",
                    ResourceWarning,
                    stacklevel=2,
                )

        finalizer = weakref.finalize(channel, dropped)
        finalizer.atexit = False

        def closed() -> None:
            finalizer.detach()
            leave(wait=True)

        channel.on_close(closed)


# -- functions that run later, in threads --------------------------------------------------


class Workers:
    """Runs functions in a few daemon threads, started when needed."""

    def __init__(self) -> None:
        self._lock = new_lock(self)
        self._begin()
        survives_fork(self, THREADS)

    def _begin(self) -> None:
        # Jobs: called with whether to do the work; None wakes a thread.
        self._queue: queue.SimpleQueue[Callable[[bool], None] | None] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def submit(self, work: Callable[[], object], done: Callable[[], object] | None = None) -> bool:
        """Run `work` soon; see `Background.run_later`. False when too much work is waiting already,
        or the interpreter ends."""
        with self._lock:
            if self._closed or self._queue.qsize() >= QUEUE_MAX:
                return False
            self._queue.put(partial(_do, copy_context(), work, done))
            if self._queue.qsize() > self._idle and len(self._threads) < THREADS_MAX:
                thread = threading.Thread(target=self._work, name="pgkv-worker", daemon=True)
                self._threads.add(thread)
                thread.start()
        return True

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._lock:
                self._idle += 1
            try:
                job = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                job = None
            with self._lock:
                self._idle -= 1
                # An item may have come between the timeout and here: then stay.
                if job is None and (self._closed or self._queue.empty()):
                    self._threads.discard(me)
                    return
            if job is not None:
                job(True)
                job = None  # a waiting thread must not keep finished work alive

    def close(self, seconds: float = STOP_TIME) -> None:
        """Drop waiting work, and wait that long for running work."""
        with self._lock:
            self._closed = True
            threads = tuple(self._threads)
            while True:
                try:
                    job = self._queue.get_nowait()
                except queue.Empty:
                    break
                if job is not None:
                    job(False)
            for _ in threads:
                self._queue.put(None)
        deadline = monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))

    def after_fork(self) -> None:
        self._begin()


def _do(
    context: Context, work: Callable[[], object], done: Callable[[], object] | None, begin: bool
) -> None:
    try:
        if begin:
            context.run(work)
    except BaseException as error:  # noqa: BLE001  # not even SystemExit may end the thread
        broken(error)
    finally:
        if done is not None:
            done()


backgrounds = _Backgrounds()
workers = Workers()


def _at_exit() -> None:
    workers.close()
    backgrounds.stop_listening()


atexit.register(_at_exit)
