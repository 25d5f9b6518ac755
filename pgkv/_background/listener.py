"""LISTEN: one connection for each process (or event loop) and database, for all patterns.

A pattern subscribes a function to a channel's name. Notifications only speed
things up: a missed one must cost nothing but time. So nothing ever waits for the connection, and
the handler is called with None when notifications may have been missed.

The connection is read by a callback and not by a task: a program that cancels all tasks of its
loop does not end it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from contextvars import Context
from random import uniform
from typing import Any, TypeAlias

import psycopg
from psycopg import sql

from .. import _observe
from .._fork import new_lock
from ..errors import PgkvError
from .connection import opened
from .renewal import broken

TRIAL_CHANNEL = "pgkv_trial"
TRIAL_TIME = 3.0  # seconds in which a trial notification must arrive
TRIAL_AGAIN = 60.0  # seconds until the next trial where none did: the server may just be busy
CONNECT_TIME = 10.0  # seconds
RETRY_FIRST, RETRY_MAX = 0.1, 10.0  # seconds between attempts; jittered down by half

Handler: TypeAlias = Callable[[str | None], None]


class Listener:
    """The LISTEN connection of a loop, opened when something is subscribed.

    Behind a pooler in transaction mode notifications do not arrive. If the
    pooler was not declared, a trial over another connection detects it.

    Attributes:
        unavailable: why notifications do not arrive; empty while no reason is known.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, conninfo: str, context: Context, unavailable: str
    ) -> None:
        self.unavailable: str = unavailable
        self._loop = loop
        self._conninfo = conninfo
        self._context = context
        self._lock = new_lock(self)
        self._handlers: dict[str, list[Handler]] = {}
        self._listening: set[str] = set()  # channels of the connection
        self._proven = False  # the trial notification has arrived over it
        self._conn: psycopg.AsyncConnection[Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._fd = -1
        self._retrying: asyncio.TimerHandle | None = None
        self._trial: asyncio.TimerHandle | None = None
        self._pause = RETRY_FIRST
        self._proof = ""
        self._failing = False
        self._ended = bool(unavailable)

    # -- from any thread

    def subscribe(self, channel: str, handler: Handler) -> None:
        """Call `handler` in the loop with each payload of that channel, and with None whenever
        notifications may have been missed. Returns at once; equal subscriptions count as one."""
        with self._lock:
            handlers = self._handlers.setdefault(channel, [])
            if handler in handlers:
                return
            handlers.append(handler)
        if not self._ended:
            self._loop.call_soon_threadsafe(self._start, context=self._context)

    def is_listening(self, channel: str) -> bool:
        """Whether a notification on that channel would arrive now."""
        return self._proven and channel in self._listening

    def is_settled(self, channel: str) -> bool:
        """Whether the server has acknowledged LISTEN, or it is known that it does not for now."""
        return channel in self._listening or self._failing or bool(self.unavailable)

    def has_lost(self, channel: str) -> bool:
        """Whether the connection does not listen to that channel, or not yet."""
        return channel not in self._listening

    # -- in the loop

    def _start(self) -> None:
        """Connect, or listen to new channels, unless that is already in progress."""
        if self._ended or self._task is not None or self._retrying is not None:
            return
        if self._conn is None:
            self._run(self._connect())
        elif self._handlers.keys() - self._listening:
            self._run(self._listen(self._conn))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._done, context=self._context)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        failure = None if task.cancelled() else task.exception()
        if self._ended:
            return
        if failure is None and not task.cancelled():
            self._start()  # a channel may have been added meanwhile
        elif failure is None or isinstance(failure, psycopg.Error | OSError | PgkvError):
            self._lost(failure)
        else:
            broken(failure)
            self._lost(failure)

    async def _connect(self) -> None:
        async with asyncio.timeout(CONNECT_TIME):
            self._conn = conn = await opened(self._conninfo)
        conn.add_notify_handler(lambda note: self._receive(note.channel, note.payload))
        await self._listen(conn)
        self._proof = secrets.token_hex(8)
        async with asyncio.timeout(CONNECT_TIME):
            other = await opened(self._conninfo)
            try:
                notify = sql.SQL("NOTIFY {}, {}")
                await other.execute(
                    notify.format(sql.Identifier(TRIAL_CHANNEL), sql.Literal(self._proof))
                )
            finally:
                other.pgconn.finish()
        if not self._proven:
            self._trial = self._loop.call_later(TRIAL_TIME, self._trial_failed)

    async def _listen(self, conn: psycopg.AsyncConnection[Any]) -> None:
        channels = {TRIAL_CHANNEL, *self._handlers}
        self._fd = conn.fileno()
        self._loop.remove_reader(self._fd)  # psycopg has its own while it executes
        async with asyncio.timeout(CONNECT_TIME):
            await conn.execute(listen_sql(sorted(channels)))
        self._loop.add_reader(self._fd, self._readable, conn)
        self._readable(conn)  # notifications may already be in libpq's buffer
        if conn is not self._conn:
            return  # it broke
        added, self._listening = channels - self._listening, channels
        self._tell_missed(added)

    def _readable(self, conn: psycopg.AsyncConnection[Any]) -> None:
        try:
            conn.pgconn.consume_input()
            while (note := conn.pgconn.notifies()) is not None:
                self._receive(note.relname.decode(), note.extra.decode())
        except psycopg.Error as error:
            self._lost(error)

    def _receive(self, channel: str, payload: str) -> None:
        if channel != TRIAL_CHANNEL:
            for handler in tuple(self._handlers.get(channel, ())):
                self._call(handler, payload)
        elif payload == self._proof and not self._proven:
            self._stop_timers()
            self._proven = True
            self.unavailable = ""
            self._pause = RETRY_FIRST
            if self._failing:
                self._failing = False
                _observe.info("pgkv.listener.restored")
            self._tell_missed(self._listening)

    def _trial_failed(self) -> None:
        self.unavailable = (
            "a trial notification did not arrive: is there a pooler in transaction mode?"
        )
        listened = self._listening
        self._close()
        self._retrying = self._loop.call_later(TRIAL_AGAIN, self._retry, context=self._context)
        self._tell_missed(listened)

    def _lost(self, error: BaseException | None) -> None:
        """Handle a connection that broke or failed: try again after a growing pause."""
        listened = self._listening
        self._close()
        if not self._failing and error is not None:
            self._failing = True
            _observe.warning(
                "pgkv.listener.lost", error=type(error).__name__, detail=str(error).strip()
            )
        self._tell_missed(listened)
        pause = uniform(self._pause / 2, self._pause)  # noqa: S311  # a pause, no secret
        self._pause = min(self._pause * 2, RETRY_MAX)
        self._retrying = self._loop.call_later(pause, self._retry, context=self._context)

    def _retry(self) -> None:
        self._retrying = None
        self._start()

    def _tell_missed(self, channels: set[str]) -> None:
        for channel in channels:
            for handler in tuple(self._handlers.get(channel, ())):
                self._call(handler, None)

    def _call(self, handler: Handler, payload: str | None) -> None:
        try:
            handler(payload)
        except Exception as error:  # noqa: BLE001  # must not end the others
            broken(error)

    def _stop_timers(self) -> None:
        for timer in (self._trial, self._retrying):
            if timer is not None:
                timer.cancel()
        self._trial = self._retrying = None

    def _close(self) -> None:
        self._stop_timers()
        conn, self._conn = self._conn, None
        self._proven = False
        self._listening = set()
        if conn is not None:
            # By its number: a connection that broke no longer has one.
            self._loop.remove_reader(self._fd)
            conn.pgconn.finish()

    def stop(self) -> None:
        self._ended = True
        listened = self._listening
        self._close()
        if self._task is not None:
            self._task.cancel()
        self._tell_missed(listened)


def listen_sql(channels: list[str]) -> sql.Composed:
    """Return the statements that listen to those channels."""
    return sql.SQL("; ").join(
        sql.SQL("LISTEN {}").format(sql.Identifier(each)) for each in channels
    )


_said: set[str] = set()


def say_polling(reason: str) -> None:
    """Log once that waiters poll, if there is a reason why notifications do not arrive."""
    if reason and not _said:
        _said.add(reason)
        _observe.warning("pgkv.listener.polling", reason=reason)
