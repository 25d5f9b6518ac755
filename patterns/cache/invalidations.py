"""News of invalidations between the first levels of processes, by LISTEN and NOTIFY.

One thread per process and server listens, on a connection of its own; it serves both colours. News
go out in batches, beside the caller, so that NOTIFY's global lock is taken once for many. They are
an acceleration and no guarantee: what bounds a first level is its ttl. After a reconnect
everything is forgotten, because news may have been missed.
"""

from __future__ import annotations

import random
import sys
import threading
import weakref
from typing import Any, cast

import psycopg
from psycopg import sql

from ... import _observe
from ..._fork import Forkable, new_lock, survives_fork
from ..._ops.op import Op
from ...aio import AsyncStore
from ...config import Pooler
from ...errors import PgkvError
from .._runtime.background import tasks, threads
from .call import StoreContext as Site
from .l1 import L1

CHANNEL = "pgkv_cache"
PAYLOAD_MAX = 7900  # bytes; the server takes less than 8,000
TICK = 0.5  # seconds in which a listener notices that it is to end
RETRY_MAX = 5.0  # seconds between attempts to connect again
SEPARATOR = b"\x1e"

_lock = new_lock(sys.modules[__name__])
_levels: weakref.WeakKeyDictionary[Site, weakref.WeakSet[L1]] = weakref.WeakKeyDictionary()
_listeners: weakref.WeakKeyDictionary[Any, Listener] = weakref.WeakKeyDictionary()
_waiting: weakref.WeakKeyDictionary[Site, list[bytes]] = weakref.WeakKeyDictionary()


def listen(site: Site, level: L1) -> None:
    """Have a first level hear of invalidations, where that is possible."""
    known = _levels.get(site)
    if known is not None and level in known:
        return
    with _lock:
        _levels.setdefault(site, weakref.WeakSet()).add(level)
        store = site.store
        channel = store._channel
        if store._config.pooler is not Pooler.NONE or channel in _listeners:
            return  # behind a pooler in transaction mode nobody can listen
        listener = _listeners[channel] = Listener(store._target.conninfo)
    end_with = getattr(channel, "_inner", channel)  # a coalescing channel has one inside
    if hasattr(end_with, "on_close"):
        end_with.on_close(listener.close)


def announcement(site: Site, key: bytes) -> Op[None]:
    """The news of one key, for the caller's own transaction."""
    return site.sql.notify(CHANNEL, _head(site) + SEPARATOR + key)


def announce(site: Site, key: bytes) -> None:
    """Send the news of a key soon, together with others."""
    with _lock:
        waiting = _waiting.setdefault(site, [])
        waiting.append(key)
        if len(waiting) > 1:
            return  # somebody will take it along
    store = site.store

    def send() -> None:
        for op in _taken(site):
            _ignoring(lambda op=op: store._execute(op))

    async def send_async() -> None:
        for op in _taken(site):
            try:
                await store._execute(op)
            except PgkvError as error:
                _lost(error)

    sent = tasks.submit(send_async) if isinstance(store, AsyncStore) else threads.submit(send)
    if not sent:
        _taken(site)


def _ignoring(send: Any) -> None:
    try:
        send()
    except PgkvError as error:
        _lost(error)


def _lost(error: PgkvError) -> None:
    # The other processes learn within their level's ttl.
    _observe.debug("pgkv.cached.news_lost", error=type(error).__name__)


def _taken(site: Site) -> list[Op[None]]:
    with _lock:
        keys = dict.fromkeys(_waiting.pop(site, []))
    head = _head(site)
    ops: list[Op[None]] = []
    batch = head
    for key in keys:
        if len(batch) + len(key) + 1 > PAYLOAD_MAX:
            ops.append(site.sql.notify(CHANNEL, batch))
            batch = head
        batch += SEPARATOR + key
    if batch != head:
        ops.append(site.sql.notify(CHANNEL, batch))
    return ops


def _head(site: Site) -> bytes:
    return site.scope.encode()


def hear(payload: str) -> None:
    """Forget what a message names."""
    scope, *keys = payload.encode().split(SEPARATOR)
    for site, levels in tuple(_levels.items()):
        if _head(site) == scope:
            for level in tuple(levels):
                for key in keys:
                    level.drop(site.scope, key)


def forget_all() -> None:
    """Forget everything in every first level that listens: news may have been missed."""
    for levels in tuple(_levels.values()):
        for level in tuple(levels):
            level.clear()


class Listener:
    """A thread that listens on one server until it is closed.

    Args:
        conninfo: returns what to connect with.
    """

    def __init__(self, conninfo: Any) -> None:
        self._conninfo = conninfo
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pgkv-cached-news", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it, connection included."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join(TICK * 4)

    def _run(self) -> None:
        pause = 0.1
        while not self._ended.is_set():
            try:
                with psycopg.connect(self._conninfo(), autocommit=True) as conn:
                    conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
                    forget_all()
                    pause = 0.1
                    while not self._ended.is_set():
                        for message in conn.notifies(timeout=TICK):
                            hear(message.payload)
            except (psycopg.Error, OSError, PgkvError) as error:
                _observe.debug("pgkv.cached.listener", error=type(error).__name__)
                forget_all()
                self._ended.wait(pause * (0.5 + random.random()))  # noqa: S311  # jitter
                pause = min(pause * 2, RETRY_MAX)


def after_fork() -> None:
    """Start again in the child."""
    _listeners.clear()
    _waiting.clear()
    _levels.clear()  # the next call listens anew


survives_fork(cast("Forkable", sys.modules[__name__]))

__all__ = ["CHANNEL", "announce", "announcement", "hear", "listen"]
