"""Waking those who wait for a lock or a job: a notification on one channel says what is there, and
each process (or event loop) lets its waiters try.

What is missed costs time, never correctness: every waiter also looks by itself, if seldom. Where
nothing is heard, waiters poll as if no notification had been asked for.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any, ClassVar

from ..._background.background import Background
from ..._background.listener import say_polling
from ..._fork import new_lock


class Waiter:
    """One caller who waits; `payload` is what the notification says that wakes it, and `event` is that of
    a thread or of a task."""

    server: object = None  # of a sharded store, that it hears

    def __init__(self, waiters: Waiters, payload: bytes, event: Any) -> None:
        self.event = event
        self.payload = payload
        self.trying: bool = False  # woken, and its try has not ended yet
        self._waiters = waiters

    @property
    def is_listening(self) -> bool:
        """Whether a notification would be heard of now."""
        return self._waiters.is_listening

    def wake(self) -> None:
        """Let it try. Called in the background's loop."""
        self.trying = True
        self.event.set()


class Waiters:
    """The waiters of one background and channel, by the payload that wakes them."""

    channel: ClassVar[str]
    wakes_all: ClassVar[bool] = False  # or one, and the next when that one is served

    def __init__(self, background: Background) -> None:
        self._loop = background.loop
        self._listener = background.listener
        self._lock = new_lock(self)
        self._lines: dict[bytes, deque[Waiter]] = {}

    @property
    def is_listening(self) -> bool:
        return self._listener.is_listening(self.channel)

    def add(self, waiter: Waiter) -> None:
        """Wake it when its turn comes. From any thread; waits for nothing."""
        with self._lock:
            self._lines.setdefault(waiter.payload, deque()).append(waiter)
        self._listener.subscribe(self.channel, self._receive)
        say_polling(self._listener.unavailable)

    def remove(self, waiter: Waiter, *, granted: bool) -> None:
        """It waits no more. A chance that it was given and did not take goes to the next."""
        with self._lock:
            line = self._lines.get(waiter.payload)
            if line is not None:
                with contextlib.suppress(ValueError):
                    line.remove(waiter)
                if not line:
                    self._lines.pop(waiter.payload, None)
        if waiter.trying and not granted:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no one waits there
                self._loop.call_soon_threadsafe(self._wake, waiter.payload)

    # -- in the loop

    def _receive(self, payload: str | None) -> None:
        if payload:
            self._wake(payload.encode())
            return
        # Notifications may have been missed, or (an empty one) a slot was moved away.
        say_polling(self._listener.unavailable)
        with self._lock:
            waiters = [waiter for line in self._lines.values() for waiter in line]
        for waiter in waiters:
            waiter.wake()

    def _wake(self, payload: bytes) -> None:
        with self._lock:
            for waiter in tuple(self._lines.get(payload, ())):
                if not waiter.trying:
                    waiter.wake()
                    if not self.wakes_all:
                        return
