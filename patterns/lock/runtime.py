"""What the flows of locks need of a colour, for threads and for asyncio, and the background that
both share: one for each process (event loop) and database, made when the first lease is granted
and ended with the last store that uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ..._engine._async.channel import AsyncPoolChannel
from ..._engine._async.coalesce import CoalescingChannel
from ..._engine._sync.channel import PoolChannel
from ..._fork import Forkable, new_lock, survives_fork
from ..._ops.drivers import shielded
from ...config import Config, Pooler
from ...errors import TransactionError
from .lease import LeaseState, LockOptions
from .renewal import STOP_TIME, OwnLink, Renewer
from .wakeup import Listener, TaskWaiting, ThreadWaiting, say_polling

if TYPE_CHECKING:
    from ..._ops.op import Flow, Op
    from ...aio import AsyncStore
    from ...config import Table
    from ...store import Store

H = TypeVar("H", bound=LeaseState)
T = TypeVar("T")


class Background:
    """Renewal and wake-ups of one database, in one event loop.

    Args:
        loop: where they run.
        conninfo: for libpq.
        config: whether statements may be prepared.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, conninfo: str, config: Config) -> None:
        self.loop = loop
        self.users: set[int] = set()
        prepares = config.pooler is Pooler.NONE
        # A link carries one statement at a time: each has one of its own.
        self.renewer: Renewer = Renewer(loop, OwnLink(conninfo, prepares=prepares))
        self.listener: Listener = Listener(loop, conninfo, OwnLink(conninfo, prepares=False))
        self.thread: threading.Thread | None = None

    async def stop(self) -> None:
        """End both."""
        await self.listener.stop()
        await self.renewer.stop()

    def close(self) -> None:
        """End both, from another thread than the loop's."""
        if self.loop.is_closed():
            return
        with contextlib.suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self.stop(), self.loop).result(STOP_TIME)
        if self.thread is not None:
            self.loop.call_soon_threadsafe(self.loop.stop)
            if self.thread is not threading.current_thread():
                self.thread.join(STOP_TIME)

    def run_in_thread(self) -> None:
        """Give the loop a thread of its own."""

        def run() -> None:
            try:
                self.loop.run_forever()
            finally:
                self.loop.close()

        self.thread = threading.Thread(target=run, name="pgkv-renewal", daemon=True)
        self.thread.start()


_Key = tuple[str, Pooler]
_lock = new_lock(sys.modules[__name__])
_of_process: dict[_Key, Background] = {}
_of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, Background]] = (
    weakref.WeakKeyDictionary()
)
# A store's own, found without putting its conninfo together again.
_of_channels: weakref.WeakKeyDictionary[Any, Background] = weakref.WeakKeyDictionary()
_inherited: list[object] = []  # a child must not say goodbye on its parent's sockets


def after_fork() -> None:
    """Start again in the child."""
    global _of_process, _of_loops, _of_channels  # noqa: PLW0603  # empty in a child
    _inherited.append((_of_process, _of_loops, _of_channels))
    _of_process = {}
    _of_loops, _of_channels = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()


survives_fork(cast("Forkable", sys.modules[__name__]))


def _background_of(
    channel: Any, config: Config, loop: asyncio.AbstractEventLoop | None
) -> Background:
    """Return the background for a store's database; the store uses it until it is closed."""
    known = _of_channels.get(channel)
    if known is not None and loop in (None, known.loop):
        return known
    key = (channel.conninfo(), config.pooler)
    with _lock:
        table = _of_process if loop is None else _of_loops.setdefault(loop, {})
        background = table.get(key)
        if background is None:
            background = Background(loop or asyncio.SelectorEventLoop(), key[0], config)
            if loop is None:
                background.run_in_thread()
            table[key] = background
        if id(channel) not in background.users:
            background.users.add(id(channel))
            channel.on_close(_leaver(background, table, key, id(channel)))
        _of_channels[channel] = background
    return background


def _leaver(
    background: Background, table: dict[_Key, Background], key: _Key, user: int
) -> Callable[[], None]:
    pid = os.getpid()

    def leave() -> None:
        if os.getpid() != pid:
            return
        with _lock:
            background.users.discard(user)
            last = not background.users
            if last and table.get(key) is background:
                del table[key]
        if last:
            background.close()

    return leave


class _Port(Generic[H]):
    """What both have.

    Args:
        store: any view of a store, but none of a transaction.
        make: the colour's class of lease, or what makes one.
    """

    channel: Any

    def __init__(self, store: Store | AsyncStore, make: Callable[..., H]) -> None:
        self._config = store._config
        self._make = make
        self.timeout: float = store._config.operation_timeout
        channel = store._channel
        if isinstance(channel, CoalescingChannel):
            channel = channel._inner  # a grant has a time of its own, and its answer is waited for
        if not isinstance(channel, PoolChannel | AsyncPoolChannel):
            raise TransactionError(
                "a lock cannot be taken inside transaction() or through using(conn): a grant that "
                "is rolled back would give its token twice; take it with the store itself, then "
                "guard() the transaction"
            )
        self.channel = channel
        self._background: Background | None = None
        self._pid = 0

    def background(self) -> Background:
        """The renewal and wake-ups of this process (loop)."""
        raise NotImplementedError

    def lease(self, terms: LockOptions, key: bytes, token: int, owner: str, sent_at: float) -> H:
        """Make a lease and see to its renewal."""
        hold = self._make(self, terms, key, token, owner, sent_at)
        self.background().renewer.add(hold)
        return hold

    def forget(self, hold: LeaseState) -> None:
        """Renew it no more."""
        self.background().renewer.discard(hold)

    def execute(self, op: Op[T], timeout: float | None = None) -> Any:
        """Perform one operation over the store's pool."""
        return self.channel.execute(op, timeout)

    def is_exhausted(self) -> bool:
        """Whether all connections of the pool are in use."""
        return bool(self.channel.is_exhausted())

    def create_missing_table(self, table: Table) -> Any:
        """Create a missing table."""
        return self.channel.create_missing_table(table)

    def unsubscribe(self, waiter: Any, *, granted: bool) -> None:
        """Hear no more of releases."""
        self.background().listener.remove(waiter, granted=granted)

    def _may_listen(self) -> bool:
        if self._config.pooler is Pooler.TRANSACTION:
            say_polling("pooler=TRANSACTION carries no notifications")
            return False
        return True


class ThreadPort(_Port[H]):
    """For threads."""

    def background(self) -> Background:
        """The renewal and wake-ups of this process."""
        if self._background is None or self._pid != os.getpid():
            self._background = _background_of(self.channel, self._config, None)
            self._pid = os.getpid()
        return self._background

    def clean_up(
        self, make: Callable[[], Flow[Any]], timeout: float | None, longest: float
    ) -> None:
        """Run a flow that ends what its caller began."""
        del longest  # nothing cuts it short here
        self.channel.run(make(), timeout)

    def subscribe(self, terms: LockOptions, timeout: float | None) -> ThreadWaiting | None:
        """Begin to hear of releases."""
        if not self._may_listen():
            return None
        background = self.background()
        waiting = ThreadWaiting(background.listener, terms.sql.payload(terms.keys[0]))
        background.listener.add(waiting)
        try:
            heard = asyncio.run_coroutine_threadsafe(
                background.listener.listen(terms.sql, timeout), background.loop
            ).result()
        except BaseException:
            background.listener.remove(waiting, granted=False)
            raise
        if not heard:
            background.listener.remove(waiting, granted=False)
        return waiting if heard else None

    def wait(self, waiter: ThreadWaiting | None, seconds: float) -> None:
        """Let time pass, less if the waiter is woken."""
        if waiter is None:
            time.sleep(seconds)
        else:
            waiter.wait(seconds)


class TaskPort(_Port[H]):
    """For asyncio."""

    def background(self) -> Background:
        """The renewal and wake-ups of this event loop."""
        loop = asyncio.get_running_loop()
        if (
            self._background is None
            or self._background.loop is not loop
            or self._pid != os.getpid()
        ):
            self._background = _background_of(self.channel, self._config, loop)
            self._pid = os.getpid()
        return self._background

    async def clean_up(
        self, make: Callable[[], Flow[Any]], timeout: float | None, longest: float
    ) -> Any:
        """Run a flow that ends what its caller began; cancellations do not cut it short."""
        return await shielded(self.channel.run(make(), timeout), longest)

    async def subscribe(self, terms: LockOptions, timeout: float | None) -> TaskWaiting | None:
        """Begin to hear of releases."""
        if not self._may_listen():
            return None
        listener = self.background().listener
        waiting = TaskWaiting(listener, terms.sql.payload(terms.keys[0]))
        listener.add(waiting)
        heard = False
        try:
            heard = await listener.listen(terms.sql, timeout)
        finally:
            if not heard:
                listener.remove(waiting, granted=False)
        return waiting if heard else None

    async def wait(self, waiter: TaskWaiting | None, seconds: float) -> None:
        """Let time pass, less if the waiter is woken."""
        if waiter is None:
            await asyncio.sleep(seconds)
        else:
            await waiter.wait(seconds)


__all__ = ["Background", "TaskPort", "ThreadPort"]
