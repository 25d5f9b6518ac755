"""Renewal of leases: those of locks, and those of computations of cached functions.

One `Renewer` serves all of them in one event loop, for one database, over one connection. It
watches every end by the local clock, and never waits for a statement to do so. It is
independent of the patterns, which give it objects (`Renewable`) and the way to renew them
(`Renewal`).

The watch is a timer, not a task. A program that cancels all tasks of its loop can only cancel a
running statement, which is repeated.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Coroutine
from contextvars import Context, copy_context
from typing import Any, NamedTuple, Protocol

from .. import _observe
from .._fork import new_lock
from .connection import DedicatedConnection

LOOK_MAX = 1.0  # seconds between looks at the clock: a suspended machine's timers are late
BATCH_MAX = 1000  # objects in one statement
SEND_MAX = 10.0  # seconds for one renewal, if the objects allow that much
SEND_MIN = 0.3  # seconds for one, if the objects have that much left
OPEN_AHEAD = 2.0  # seconds before a renewal in which its connection is made
OPEN_PAUSE = 1.0  # seconds between attempts at that
RESEND_PAUSE = 0.1  # seconds before a renewal that was cancelled or raised is repeated
NEVER = float("inf")

# CLOCK_BOOTTIME goes on while the machine sleeps; monotonic on Linux does not.
_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)


def clock() -> float:
    """Seconds on a clock that cannot be set and, where available, that runs during a suspend."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


class Renewable(Protocol):
    """An object that ends unless it is renewed. Its times are by `clock()`."""

    _due: float  # when to renew it
    _until: float  # when it ends

    @property
    def name(self) -> str: ...

    @property
    def is_lost(self) -> bool:
        """Whether it has ended. The check reports a loss to its user."""
        ...


class Renewal(Protocol):
    """How objects of one kind are renewed. Those with the same `Renewal` are renewed together."""

    async def renew(
        self, connection: DedicatedConnection, batch: list[Any], seconds: float
    ) -> None:
        """Renew them within that time: set each one's `_due`, and `_until` where it succeeded.
        Empties the list."""
        ...

    def abandoned(self, name: str) -> None:
        """An object was dropped: it is not renewed any more."""
        ...

    def closed(self, each: Any) -> None:
        """The background ends while the object lives on."""
        ...


class _Entry(NamedTuple):
    # Weak: a dropped object can no longer be released; its ttl ends it.
    ref: weakref.ref[Any]
    name: str
    renewal: Renewal
    context: Context  # of the code that made the object: its callbacks run there


class Renewer:
    """Renews and watches. The loop does the work; `add` and `discard` are for any thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: DedicatedConnection, context: Context
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._context = context
        self._lock = new_lock(self)
        self._entries: dict[int, _Entry] = {}
        self._next_look = NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._send_until = NEVER
        self._send_from = 0.0
        self._open_from = 0.0
        self._closed = False

    # -- from any thread

    def add(self, each: Renewable, renewal: Renewal, *, quiet: bool = False) -> None:
        """Renew and watch it from now on. Holds a weak reference. `quiet`: it may be dropped."""
        name = "" if quiet else each.name
        entry = _Entry(weakref.ref(each), name, renewal, copy_context())
        first = min(each._due, each._until)
        with self._lock:
            self._entries[id(each)] = entry
            sleeps_past = self._next_look > first
            if sleeps_past:
                self._next_look = first
        if sleeps_past:
            self._loop.call_soon_threadsafe(self._look, context=self._context)

    def discard(self, each: Renewable) -> None:
        with self._lock:
            self._entries.pop(id(each), None)

    # -- in the loop

    def _look(self) -> None:
        """Check every object, and set the timer for the next check."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closed:
            return
        with self._lock:
            # An object added during the check has to set the timer again: the check may miss it.
            self._next_look = NEVER
        soonest = clock() + LOOK_MAX
        try:
            soonest = self._look_after(clock())
        except Exception as error:  # noqa: BLE001  # see there
            broken(error)
        finally:  # an interrupt in the main thread must not end the watch
            with self._lock:
                self._next_look = soonest = min(self._next_look, soonest)
            if soonest < NEVER:
                self._timer = self._loop.call_later(
                    max(0.0, soonest - clock()), self._look, context=self._context
                )

    def _look_after(self, now: float) -> float:
        """Report losses and start due renewals; return the time of the next check."""
        soonest = next_due = NEVER
        due: list[tuple[Renewal, Any]] = []
        for each, entry in self._living():
            # In the context of the code that made it, because this may call its callbacks.
            if entry.context.run(_is_lost, each):
                self.discard(each)
                continue
            soonest = min(soonest, each._until, now + LOOK_MAX)
            if each._due <= now:
                due.append((entry.renewal, each))
                self._send_until = min(self._send_until, now + _share(each._until - now))
            else:
                next_due = min(next_due, each._due)
        soonest = min(soonest, next_due)
        if self._sending is not None:
            if now >= self._send_until:
                self._sending.cancel()
            else:
                soonest = min(soonest, self._send_until)
        elif due and now < self._send_from:
            soonest = min(soonest, self._send_from)
        elif due:
            limit = min(_share(each._until - now) for _, each in due)
            self._send(self._renew(due[:BATCH_MAX], limit), now + limit)
        elif (
            next_due <= now + OPEN_AHEAD
            and now >= self._open_from
            and not self._connection.is_ready
        ):
            # Connecting takes several round trips, which should not use up a lease's time.
            self._open_from = now + OPEN_PAUSE
            self._send(self._connection.open(SEND_MAX), NEVER)
        return soonest

    def _living(self) -> list[tuple[Any, _Entry]]:
        with self._lock:
            entries = list(self._entries.items())
        living = []
        for key, entry in entries:
            each = entry.ref()
            if each is not None:
                living.append((each, entry))
                continue
            with self._lock:
                if self._entries.get(key) is entry:
                    del self._entries[key]
            if entry.name:
                entry.renewal.abandoned(entry.name)
        return living

    def _send(self, work: Coroutine[Any, Any, None], until: float) -> None:
        self._send_until = until
        self._sending = self._loop.create_task(work)
        self._sending.add_done_callback(self._sent, context=self._context)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending = None
        self._send_until = NEVER
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            broken(failure)
        if failure is not None or task.cancelled():
            self._send_from = clock() + RESEND_PAUSE
        self._look()

    async def _renew(self, due: list[tuple[Renewal, Any]], seconds: float) -> None:
        until = clock() + seconds
        for renewal, batch in _grouped(due):
            try:
                await renewal.renew(self._connection, batch, max(0.001, until - clock()))
            except Exception as error:  # noqa: BLE001  # the others are renewed all the same
                self._send_from = clock() + RESEND_PAUSE
                broken(error)

    def stop(self) -> None:
        """End it. Leases that are still held are lost."""
        self._closed = True
        for each, entry in self._living():
            entry.context.run(entry.renewal.closed, each)
        with self._lock:
            self._entries.clear()
            self._next_look = 0.0
        self._look()  # cancels the timer
        if self._sending is not None:
            self._sending.cancel()
        self._connection.close()


# A failed statement's traceback keeps the frames it passed through until the collector comes. So
# that dropped objects are noticed, the frames that await hold none: lists are emptied, and loops
# over them are functions of their own.


def _grouped(due: list[tuple[Renewal, Any]]) -> list[tuple[Renewal, list[Any]]]:
    groups: dict[Renewal, list[Any]] = {}
    for renewal, each in due:
        groups.setdefault(renewal, []).append(each)
    due.clear()
    return list(groups.items())


def _is_lost(each: Renewable) -> bool:
    return each.is_lost


def _share(left: float) -> float:
    """Seconds for one try: half of the time left, so that another try is possible, but long enough
    for a slow network."""
    return min(max(left / 2, min(left, SEND_MIN)), SEND_MAX)


def broken(error: BaseException) -> None:
    """Log a defect of pgkv, which must not end the background or go unnoticed."""
    _observe.warning("pgkv.background.broken", error=type(error).__name__)
