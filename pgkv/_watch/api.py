"""What `store.watch` returns: iterators over the changes of some keys."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, Self

from .._background.background import backgrounds, pool_channel
from .._engine._async.pool import AsyncCallerPool, AsyncStorePool
from .._engine._sync.pool import CallerPool
from .._fork import survives_fork
from .._observe import shown
from .._ops import codec as _codec
from .._ops.drivers import is_set_within
from .._ops.op import Flow, call
from .._settings import refuse_pickle
from .._sql.watch import WatchStatements
from ..config import (
    ANONYMOUS,
    Config,
    Pooler,
    Seconds,
    require_bool,
    require_config,
    require_seconds,
)
from ..errors import ConfigError, InvalidKeyError
from ..types import shown_value
from .source import KEYS_MAX, Ears, Selection, Source

POLL_MIN = 0.1  # seconds
WAIT_MAX = 3600.0  # seconds of one wait; threads cannot wait for an unlimited number


@dataclass(frozen=True, slots=True)
class Event:
    """What a watcher saw.

    Attributes:
        kind: ``"set"``: the key has a new value. ``"gone"``: it was removed, or it expired.
            ``"resync"``: changes may have been missed; the events that follow bring you up to date.
            With ``initial=True`` also: all that was there has been told.
        key: the key; empty for a resync.
        version: that of the value, for "set".
        value: for "set", with ``values=True``.
    """

    kind: Literal["set", "gone", "resync"]
    key: str = ""
    version: int | None = None
    value: bytes | None = None

    def __repr__(self) -> str:
        value = None if self.value is None else shown_value(self.value)
        return f"Event(kind={self.kind!r}, key={self.key!r}, version={self.version}, value={value})"


class Watching:
    """What a `Watch` and an `AsyncWatch` share."""

    _wait: Callable[[float], Any]
    _wake: Callable[[], None]  # ends the wait, from any thread

    def __init__(
        self,
        store: Any,
        keys: str | Iterable[str],
        prefix: bool,
        initial: bool,
        poll: Seconds | None,
        values: bool,
    ) -> None:
        for name, flag in (("prefix", prefix), ("initial", initial), ("values", values)):
            require_bool(f"watch: {name}", flag)
        self._selection = _selection(store._sql, keys, prefix=prefix)
        self._channel: Any = pool_channel(store)
        if self._channel is None:
            raise ConfigError(
                "watch: it reads outside of transactions; call it on the store itself"
            )
        config: Config = store._config
        if hasattr(config, "shards"):
            raise ConfigError("watch: a sharded store has several servers; watch a store of one")
        self._poll = None if poll is None else require_seconds("watch: poll", poll)
        if self._poll is None and config.pooler is not Pooler.NONE:
            raise ConfigError("watch: behind a pooler nothing is notified; poll must not be None")
        if self._poll is not None and self._poll < POLL_MIN:
            raise ConfigError(f"watch: poll must be {POLL_MIN} seconds or more, not {poll!r}")
        if config.dsn == ANONYMOUS and isinstance(
            self._channel._pool, CallerPool | AsyncCallerPool
        ):
            raise ConfigError(
                "watch: it listens on a connection of its own, and the pool does not tell where the "
                "server is; give from_pool() a dsn"
            )
        self._sql = WatchStatements(config, values=values, transforms=store._sql.transforms)
        self._cut = len(store._sql.prefix)
        self._initial = initial
        self._source: Source | None = None
        self._pending: dict[str, int | None] = {}  # with the version that was told last
        self._present: deque[str] | None = None  # still to be told, after `initial=True`
        self._gap = self._ended = False
        survives_fork(self)

    @shown
    def __repr__(self) -> str:
        keys, prefix = self._selection
        what = f"prefix {prefix!r}" if prefix is not None else f"{len(keys)} keys"
        state = "closed" if self._ended else "open" if self._source else "to be entered"
        return f"of {what}, {state}"

    __reduce__ = refuse_pickle

    def after_fork(self) -> None:
        """End in the child: the iterator is the parent's."""
        self._ended = True

    def _join(self, loop: asyncio.AbstractEventLoop | None) -> Flow[None]:
        if self._source is not None:
            raise ConfigError("watch: it was entered already; call watch() again")
        ears = backgrounds.get(self._channel, loop).part(Ears)
        source = ears.source(self._channel, self._sql, self._selection, self._poll)
        yield from source.opened()
        with source.lock:
            if self._initial:
                self._present = deque(sorted(source.known))
            source.hearers.add(self)
        self._source = source

    def close(self) -> None:
        """End the iteration; may be called from any thread."""
        self._ended = True
        if self._source is not None:
            with self._source.lock:
                self._source.hearers.discard(self)
        self._wake()

    # -- as a source sees it

    def _hear(self, changed: dict[str, tuple[int | None, int | None]], *, gap: bool) -> None:
        """Take note of keys with their versions of before and after; None: there was no such key."""
        self._gap = self._gap or gap
        for key, (old, new) in changed.items():
            if self._pending.setdefault(key, old) == new:
                del self._pending[key]  # it is again as it was told

    # -- the next event

    def _following(self, timeout: Seconds | None) -> Flow[Event | None]:
        limit = _codec.waiting(timeout)
        until = math.inf if limit is None else monotonic() + limit
        source = self._source
        if source is None:
            raise ConfigError("watch: enter it first: `with store.watch(...) as events`")
        source.waiting[self] = None
        try:
            while not (self._ended or source.is_closed):
                with source.lock:
                    event = self._take(source)
                if event is not None:
                    return event
                if source.claim():
                    yield from source.read()
                    continue
                now = monotonic()
                if until <= now:
                    return None
                if (left := min(until, source.due()) - now) > 0:
                    yield from call(self._wait, min(left, WAIT_MAX))
            self._ended = True
            return None
        finally:
            source.waiting.pop(self, None)
            if source.due() <= monotonic():
                source.wake_one()  # what this one leaves to do

    def _take(self, source: Source) -> Event | None:
        if self._gap:
            self._gap = False
            return Event("resync")
        while self._present is not None:
            if not self._present:
                self._present = None
                return Event("resync")
            key = self._present.popleft()
            self._pending.pop(key, None)
            if key in source.known:
                return self._told(source, key)
        while self._pending:
            key = next(iter(self._pending))
            told = self._pending.pop(key)
            row = source.known.get(key)
            if told != (row and row.version):
                return self._told(source, key)
        return None

    def _told(self, source: Source, key: str) -> Event:
        row = source.known.get(key)
        if row is None:
            return Event("gone", key[self._cut :])
        return Event("set", key[self._cut :], row.version, row.value)


class Watch(Watching):
    """The changes of some keys, as an iterator; see `Store.watch`. One thread at a time may iterate."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._awake = threading.Event()

    def __enter__(self) -> Self:
        self._channel.run(self._join(None))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self.next()
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout: Seconds | None = None) -> Event | None:
        """Return the next event; None when there was none for `timeout` seconds, or it was closed.

        Args:
            timeout: seconds; 0 does not wait, None waits without end.
        """
        event: Event | None = self._channel.run(self._following(timeout))
        return event

    def _wait(self, seconds: float) -> None:
        self._awake.wait(seconds)
        self._awake.clear()

    def _wake(self) -> None:
        self._awake.set()


class AsyncWatch(Watching):
    """The changes of some keys, as an async iterator; see `Store.watch`. One task at a time may iterate."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._awake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        self._loop = loop = asyncio.get_running_loop()
        if isinstance(pool := self._channel._pool, AsyncStorePool):
            pool.refuse_other(loop)
        await self._channel.run(self._join(loop))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def next(self, timeout: Seconds | None = None) -> Event | None:
        """Return the next event; None when there was none for `timeout` seconds, or it was closed."""
        if self._loop not in (None, asyncio.get_running_loop()):
            raise ConfigError("watch: it belongs to another event loop; watch in each loop")
        event: Event | None = await self._channel.run(self._following(timeout))
        return event

    async def _wait(self, seconds: float) -> None:
        await is_set_within(self._awake, seconds)
        self._awake.clear()

    def _wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no one waits there
                self._loop.call_soon_threadsafe(self._awake.set)


def _selection(sql: Any, keys: Any, *, prefix: bool) -> Selection:
    """What the arguments select."""
    if prefix:
        _codec.encode_bound(keys, "prefix")
        return Selection(prefix=sql.prefix + keys)
    if not isinstance(keys, Iterable):
        raise InvalidKeyError(f"watch: give a key or several, not {type(keys).__name__}")
    names = [keys] if isinstance(keys, str) else list(keys)
    if not 0 < len(names) <= KEYS_MAX:
        raise InvalidKeyError(f"watch: give from 1 to {KEYS_MAX:,} keys, not {len(names):,}")
    return Selection(frozenset(raw.decode() for raw in sql.many_keys(names)))


def watch_sql(config: Config) -> str:
    """Return commands for triggers by which watchers hear of every writer of the table, whatever
    program it is. The text is idempotent; run it as the table's owner.

    Args:
        config: names the table and its schema.

    Raises:
        ConfigError: `config` is no `Config`.
    """
    require_config(config, "watch_sql()")
    return WatchStatements(config).triggers()
