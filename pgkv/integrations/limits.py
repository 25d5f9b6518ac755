"""For limits, and so for Flask-Limiter and slowapi: the storages ``pgkv://`` and ``async+pgkv://``.

limits has no registry to find them in, so import this module before a URI is used::

    import pgkv.integrations.limits

    Limiter(get_remote_address, app=app, storage_uri="pgkv://user@host:5432/database")

A URI is a PostgreSQL one with another scheme; the option ``dsn`` takes any other DSN. All of limits' strategies work, each acquisition
atomic. Windows follow the clock of the client, as in limits' other storages; the server's clock only
removes what has ended. pgkv's own `RateLimiter` needs one statement where these need two.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

from limits.aio.storage import MovingWindowSupport as AsyncMovingWindowSupport
from limits.aio.storage import SlidingWindowCounterSupport as AsyncSlidingWindowCounterSupport
from limits.aio.storage import Storage as AsyncStorage
from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from limits.storage.base import TimestampedSlidingWindow

from ..aio import AsyncStore
from ..config import Config
from ..errors import PgkvError
from ..store import Store

__all__ = ["AsyncPgkvStorage", "PgkvStorage"]

Change = Callable[[bytes | None], bytes]
_ATTEMPTS = 1000  # of an acquisition that meets others; each failure is another's success


class Refused(Exception):  # noqa: N818  # no error: it leaves the update of a full window
    """The window is full."""


def _config(uri: str | None, options: dict[str, Any]) -> Config:
    scheme, _, rest = (uri or "").partition("://")
    if "dsn" in options:
        return Config(**{"table_name": "limits", **options})
    dsn = f"{'embedded' if 'embedded' in scheme else 'postgresql'}://{rest}"
    return Config(dsn, **{"table_name": "limits", **options})


# -- the moving window: the moments of its entries, newest first, as doubles


def _entered(limit: int, expiry: int, amount: int) -> Change:
    def change(data: bytes | None) -> bytes:
        now = time.time()
        kept = _moments(data, now - expiry)[: limit - amount + 1]
        if len(kept) + amount > limit:
            raise Refused
        return struct.pack(f"<{amount + len(kept)}d", *[now] * amount, *kept)

    return change


def _moments(data: bytes | None, since: float) -> list[float]:
    return [each for (each,) in struct.iter_unpack("<d", data or b"") if each >= since]


def _moving(data: bytes | None, expiry: int) -> tuple[float, int]:
    now = time.time()
    moments = _moments(data, now - expiry)
    return (moments[-1] if moments else now), len(moments)


# -- the sliding counter: the number of the window, its count, and the count of the one before


def _counted(limit: int, expiry: int, amount: int) -> Change:
    def change(data: bytes | None) -> bytes:
        now = time.time()
        window, count, before = _window(data, expiry, now)
        weighted = before * (1 - now / expiry % 1) + count
        if int(weighted) + amount > limit:
            raise Refused
        return struct.pack("<3q", window, count + amount, before)

    return change


def _window(data: bytes | None, expiry: int, now: float) -> tuple[int, int, int]:
    current = int(now / expiry)
    window, count, before = struct.unpack("<3q", data) if data else (current, 0, 0)
    if window == current:
        return window, count, before
    return current, 0, count if window == current - 1 else 0


def _sliding(data: bytes | None, expiry: int) -> tuple[int, float, int, float]:
    now = time.time()
    _, count, before = _window(data, expiry, now)
    left = (1 - now / expiry % 1) * expiry
    return before, left if before else 0.0, count, left + expiry


class PgkvStorage(
    Storage, MovingWindowSupport, SlidingWindowCounterSupport, TimestampedSlidingWindow
):
    """limits' storage on PostgreSQL, for threads.

    Args:
        uri: ``pgkv://user@host:5432/database``; or ``pgkv://`` with an option ``dsn``.
        wrap_exceptions: raise limits' `StorageError` in place of pgkv's errors.
        options: fields of `Config`; the table is ``limits``.
    """

    STORAGE_SCHEME: list[str] | None = ["pgkv", "pgkv+embedded"]  # noqa: RUF012  # limits declares it so
    base_exceptions = PgkvError

    def __init__(
        self, uri: str | None = None, wrap_exceptions: bool = False, **options: Any
    ) -> None:
        super().__init__(uri, wrap_exceptions)
        self._store = Store(_config(uri, options))

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Add to the counter of a fixed window, which begins with its first call."""
        return self._store.increment(key, amount, ttl=expiry)

    def get(self, key: str) -> int:
        """Return a counter."""
        return int(self._store.get(key, b"0"))

    def get_expiry(self, key: str) -> float:
        """Return when a counter ends, in seconds since the epoch."""
        return time.time() + (self._store.ttl(key) or 0)

    def check(self) -> bool:
        """Tell whether the server answers."""
        try:
            self._store.ping()
        except PgkvError:
            return False
        return True

    def reset(self) -> int:
        """Remove all limits; return how many there were."""
        return self._store.clear()

    def clear(self, key: str) -> None:
        """Remove the limit of a key."""
        self._store.delete(key)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Enter a moving window; False, and nothing written, if it is full."""
        return self._acquire(key, _entered(limit, expiry, amount), expiry)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002  # limits' signature
        """Return when the oldest entry of the window came, and how many there are."""
        return _moving(self._store.get(key), expiry)

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        """Enter a window that is weighted with the one before; False if it is full."""
        return self._acquire(key, _counted(limit, expiry, amount), 2 * expiry)

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return count and seconds left of the window before, and of the current one."""
        return _sliding(self._store.get(key), expiry)

    def clear_sliding_window(self, key: str, expiry: int) -> None:  # noqa: ARG002  # limits' signature
        """Remove both windows of a key."""
        self._store.delete(key)

    def _acquire(self, key: str, change: Change, ttl: int) -> bool:
        try:
            self._store.update(key, change, ttl=ttl, attempts=_ATTEMPTS)
        except Refused:
            return False
        return True


class AsyncPgkvStorage(
    AsyncStorage,
    AsyncMovingWindowSupport,
    AsyncSlidingWindowCounterSupport,
    TimestampedSlidingWindow,
):
    """limits' storage on PostgreSQL, for asyncio: `PgkvStorage`, awaited.

    Args:
        uri: ``async+pgkv://user@host:5432/database``.
        wrap_exceptions: see `PgkvStorage`.
        options: fields of `Config`.
    """

    STORAGE_SCHEME: list[str] | None = ["async+pgkv", "async+pgkv+embedded"]  # noqa: RUF012  # limits declares it so
    base_exceptions = PgkvError

    def __init__(
        self, uri: str | None = None, wrap_exceptions: bool = False, **options: Any
    ) -> None:
        super().__init__(uri, wrap_exceptions)
        self._store = AsyncStore(_config(uri, options))

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Add to the counter of a fixed window, which begins with its first call."""
        return await self._store.increment(key, amount, ttl=expiry)

    async def get(self, key: str) -> int:
        """Return a counter."""
        return int(await self._store.get(key, b"0"))

    async def get_expiry(self, key: str) -> float:
        """Return when a counter ends, in seconds since the epoch."""
        return time.time() + (await self._store.ttl(key) or 0)

    async def check(self) -> bool:
        """Tell whether the server answers."""
        try:
            await self._store.ping()
        except PgkvError:
            return False
        return True

    async def reset(self) -> int:
        """Remove all limits; return how many there were."""
        return await self._store.clear()

    async def clear(self, key: str) -> None:
        """Remove the limit of a key."""
        await self._store.delete(key)

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Enter a moving window; False, and nothing written, if it is full."""
        return await self._acquire(key, _entered(limit, expiry, amount), expiry)

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002  # limits' signature
        """Return when the oldest entry of the window came, and how many there are."""
        return _moving(await self._store.get(key), expiry)

    async def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        """Enter a window that is weighted with the one before; False if it is full."""
        return await self._acquire(key, _counted(limit, expiry, amount), 2 * expiry)

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return count and seconds left of the window before, and of the current one."""
        return _sliding(await self._store.get(key), expiry)

    async def clear_sliding_window(self, key: str, expiry: int) -> None:  # noqa: ARG002  # limits' signature
        """Remove both windows of a key."""
        await self._store.delete(key)

    async def _acquire(self, key: str, change: Change, ttl: int) -> bool:
        try:
            await self._store.update(key, change, ttl=ttl, attempts=_ATTEMPTS)
        except Refused:
            return False
        return True
