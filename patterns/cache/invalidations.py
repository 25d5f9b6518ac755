"""Invalidations that first levels in other processes hear of, by LISTEN and NOTIFY.

They are published in batches, behind the caller, so that NOTIFY's global lock is taken once for
many. They are an acceleration and no guarantee: what bounds a first level is its ttl. Whenever
notifications may have been missed, everything is forgotten.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, cast

from ... import _observe
from ..._fork import Forkable, new_lock, survives_fork
from ..._ops.op import Flow, Op, do
from ...errors import PgkvError
from .l1 import L1

if TYPE_CHECKING:
    from .call import StoreContext

CHANNEL = "pgkv_cache"
PAYLOAD_MAX = 7900  # bytes; the server takes less than 8,000
SEPARATOR = b"\x1e"

_lock = new_lock(sys.modules[__name__])
_levels: weakref.WeakKeyDictionary[StoreContext, weakref.WeakSet[L1]] = weakref.WeakKeyDictionary()
_waiting: weakref.WeakKeyDictionary[StoreContext, list[bytes]] = weakref.WeakKeyDictionary()


def subscribe(context: StoreContext, level: L1) -> None:
    """Have a first level hear of invalidations, where that is possible."""
    known = _levels.get(context)
    if known is not None and level in known:
        return
    with _lock:
        _levels.setdefault(context, weakref.WeakSet()).add(level)
    if context.runtime is not None:
        for background in context.runtime.backgrounds():
            background.listener.subscribe(CHANNEL, receive)


def receive(payload: str | None) -> None:
    """Forget what a message names; with None everything, because messages may have been missed."""
    scope, *keys = (payload or "").encode().split(SEPARATOR)
    for context, levels in tuple(_levels.items()):
        for level in tuple(levels):
            if payload is None:
                level.clear()
            elif context.scope.encode() == scope:
                for key in keys:
                    level.drop(context.scope, key)


def message(context: StoreContext, *keys: bytes) -> Op[None]:
    """Return the notification of keys. In the caller's own transaction it is delivered when that
    commits, to this process as well."""
    return context.sql.notify(CHANNEL, SEPARATOR.join((context.scope.encode(), *keys)))


def publish(context: StoreContext, key: bytes) -> None:
    """Tell other processes of a key soon, together with others."""
    with _lock:
        waiting = _waiting.setdefault(context, [])
        waiting.append(key)
        if len(waiting) > 1:
            return  # the one that was first takes it along

    def done() -> None:
        with _lock:
            if _waiting.get(context) is waiting:  # it never began
                _waiting.pop(context, None)

    run, runtime = context.store._run, context.runtime
    if runtime is None or not runtime.run_later(lambda: run(_send(context)), done):
        done()


def _send(context: StoreContext) -> Flow[None]:
    with _lock:
        keys = dict.fromkeys(_waiting.pop(context, []))
    for op in _messages(context, list(keys)):
        try:
            yield from do(op)
        except PgkvError as error:
            # The other processes learn within their level's ttl.
            _observe.debug("pgkv.cached.news_lost", error=type(error).__name__)


def _messages(context: StoreContext, keys: list[bytes]) -> list[Op[None]]:
    batches: list[list[bytes]] = []
    left = 0
    for key in keys:
        if left < len(key) + 1:
            batches.append([])
            left = PAYLOAD_MAX - len(context.scope.encode())
        batches[-1].append(key)
        left -= len(key) + 1
    return [message(context, *batch) for batch in batches]


def after_fork() -> None:
    """Start again in the child: the next call subscribes."""
    _waiting.clear()
    _levels.clear()


survives_fork(cast("Forkable", sys.modules[__name__]))
