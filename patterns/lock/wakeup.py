"""Waking those who wait: one LISTEN connection for each process (loop) and database.

A release says on one channel which name is free; each process lets one of its waiters try. What
is missed costs time, never correctness: every waiter also looks by itself, if seldom. Behind a
pooler that does not carry notifications, waiters poll as if none had been asked for; that is
found out by a trial, and said once.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import psycopg

from ... import _observe
from ...errors import PgkvError
from .sql import CHANNEL, LISTEN, LockStatements

if TYPE_CHECKING:
    from .renewal import OwnLink

PROOF_TIME = 3.0  # seconds in which a trial notification must arrive
RECONNECT_FIRST, RECONNECT_MAX = 0.1, 10.0  # seconds


class _Waiting:
    """One caller who waits for one name.

    Args:
        listener: whom it hears from.
        payload: what a release of the name says.
    """

    def __init__(self, listener: Listener, payload: bytes) -> None:
        self.payload = payload
        self.trying = False  # woken, and not yet heard of again
        self._listener = listener

    @property
    def hears(self) -> bool:
        """Whether a release would be heard of just now."""
        return self._listener.hears

    def wake(self) -> None:
        """Let it try. Called in the listener's loop, or by another waiter that gives up."""
        raise NotImplementedError


class ThreadWaiting(_Waiting):
    """A thread that waits."""

    trying: bool

    def __init__(self, listener: Listener, payload: bytes) -> None:
        super().__init__(listener, payload)
        self._event = threading.Event()

    def wake(self) -> None:
        """Let it try."""
        self.trying = True
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Sleep until woken, at most so long."""
        if not self._event.is_set():
            self.trying = False
        self._event.wait(seconds)
        self._event.clear()


class TaskWaiting(_Waiting):
    """A task that waits."""

    trying: bool

    def __init__(self, listener: Listener, payload: bytes) -> None:
        super().__init__(listener, payload)
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Let it try."""
        self.trying = True
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Sleep until woken, at most so long."""
        if not self._event.is_set():
            self.trying = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()


class Listener:
    """The LISTEN connection of a loop, and who waits for what.

    Args:
        loop: where it listens.
        conninfo: for libpq.
        link: another connection to the same database, for the trial and no other use.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, conninfo: str, link: OwnLink) -> None:
        self.hears: bool = False
        self._loop = loop
        self._conninfo = conninfo
        self._link = link
        self._lock = threading.Lock()
        self._waiting: dict[bytes, deque[_Waiting]] = {}
        self._task: asyncio.Task[None] | None = None
        self._settled: asyncio.Future[bool] | None = None
        self._deaf = False  # a trial showed that nothing arrives here

    # -- from any thread

    def add(self, waiting: _Waiting) -> None:
        """Wake it when its turn comes."""
        with self._lock:
            self._waiting.setdefault(waiting.payload, deque()).append(waiting)

    def remove(self, waiting: _Waiting, *, granted: bool) -> None:
        """It waits no more. A chance that it was given and did not take goes to the next."""
        with self._lock:
            line = self._waiting.get(waiting.payload)
            if line is not None:
                with contextlib.suppress(ValueError):
                    line.remove(waiting)
                if not line:
                    del self._waiting[waiting.payload]
        if waiting.trying and not granted:
            self._loop.call_soon_threadsafe(self._wake_one, waiting.payload)

    # -- in the loop

    async def listen(self, sql: LockStatements, timeout: float | None) -> bool:
        """Begin to listen, once; whether notifications arrive here, as far as that can be told
        within that time."""
        if self._deaf:
            return False
        if self._task is None:
            self._settled = self._loop.create_future()
            self._task = self._loop.create_task(self._run(sql))
        assert self._settled is not None
        try:
            longest = PROOF_TIME + 1.0
            async with asyncio.timeout(longest if timeout is None else min(timeout, longest)):
                return await asyncio.shield(self._settled)
        except TimeoutError:
            return False

    async def _run(self, sql: LockStatements) -> None:
        pause = RECONNECT_FIRST
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._conninfo, autocommit=True, prepare_threshold=None
                ) as conn:
                    await conn.execute(LISTEN)
                    await self._hear(conn, sql)
                    pause = RECONNECT_FIRST
            except (psycopg.Error, OSError, PgkvError) as error:
                self._lost(error)
            if self._deaf:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, RECONNECT_MAX)

    async def _hear(self, conn: psycopg.AsyncConnection[Any], sql: LockStatements) -> None:
        proof = b"? " + secrets.token_hex(8).encode()
        trial = self._loop.create_task(self._try_out(conn, sql, proof))
        try:
            async for note in conn.notifies():
                payload = note.payload.encode()
                if note.channel.encode() != CHANNEL:
                    continue
                if payload == proof:
                    trial.cancel()
                    self._heard()
                else:
                    self._wake_one(payload)
        finally:
            trial.cancel()

    def _heard(self) -> None:
        self.hears = True
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(True)
        self._wake_all()  # what was said while nobody listened

    async def _try_out(
        self, conn: psycopg.AsyncConnection[Any], sql: LockStatements, proof: bytes
    ) -> None:
        """Say something over another connection. If it does not arrive, listening is in vain."""
        with contextlib.suppress(PgkvError):
            try:
                await self._link.execute(sql.notify(proof), PROOF_TIME)
            finally:
                self._link.close()
            await asyncio.sleep(PROOF_TIME)
            self._deaf = True
            say_polling(
                "a trial notification did not arrive: is there a pooler in transaction mode?"
            )
        await conn.close()

    def _lost(self, error: BaseException) -> None:
        was, self.hears = self.hears, False
        if self._settled is not None and not self._settled.done() and self._deaf:
            self._settled.set_result(False)
        if was:
            _observe.warning(
                "pgkv.lock.listener_lost", error=type(error).__name__, detail=str(error).strip()
            )
        self._wake_all()  # releases may have gone unheard

    def _wake_one(self, payload: bytes) -> None:
        with self._lock:
            for waiting in self._waiting.get(payload, ()):
                if not waiting.trying:
                    waiting.wake()
                    return

    def _wake_all(self) -> None:
        with self._lock:
            for line in self._waiting.values():
                for waiting in line:
                    waiting.wake()

    async def stop(self) -> None:
        """Listen no more."""
        self.hears = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._wake_all()


_said = threading.Event()


def say_polling(reason: str) -> None:
    """Tell once that waiters poll although they were to be notified."""
    if not _said.is_set():
        _said.set()
        _observe.warning("pgkv.lock.polling", reason=reason)


__all__ = ["Listener", "TaskWaiting", "ThreadWaiting", "say_polling"]
