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
from functools import partial
from typing import Any

from limits.aio.storage import MovingWindowSupport as AsyncMovingWindowSupport
from limits.aio.storage import SlidingWindowCounterSupport as AsyncSlidingWindowCounterSupport
from limits.aio.storage import Storage as AsyncStorage
from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from limits.storage.base import TimestampedSlidingWindow

from .._ops.drivers import drive, drive_async
from .._ops.op import Flow, call
from ..aio import AsyncStore
from ..config import Config
from ..errors import PgkvError
from ..store import Store

__all__ = ["AsyncPgkvStorage", "PgkvStorage"]

Change = Callable[[bytes | None], bytes]
_ATTEMPTS = 1000  # of an acquisition that meets others; each failure is another's success
# Each strategy has a row of its own, so that a limit may change it. limits' keys end with a unit of time.
_MOVING, _SLIDING = "/moving", "/sliding"


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


class Windows(TimestampedSlidingWindow):
    """The methods of both storages: of the async one they return what is to be awaited."""

    base_exceptions = PgkvError
    _store: Any
    _drive: Callable[[Flow[Any]], Any]

    def incr(self, key: str, expiry: int, amount: int = 1) -> Any:
        """Add to the counter of a fixed window, which begins with its first call."""
        return self._store.increment(key, amount, ttl=expiry)

    def get(self, key: str) -> Any:
        """Return a counter."""
        return self._then(int, self._store.get, key, b"0")

    def get_expiry(self, key: str) -> Any:
        """Return when a counter ends, in seconds since the epoch."""
        return self._then(lambda ttl: time.time() + (ttl or 0), self._store.ttl, key)

    def check(self) -> Any:
        """Tell whether the server answers."""
        return self._unless(PgkvError, self._store.ping)

    def reset(self) -> Any:
        """Remove all limits; return how many there were."""
        return self._store.clear()

    def clear(self, key: str, expiry: int = 0) -> Any:  # noqa: ARG002  # limits' signature
        """Remove the limit of a key, as every strategy counts it."""
        return self._store.delete_many([key, key + _MOVING, key + _SLIDING])

    clear_sliding_window = clear

    def close(self) -> Any:
        """Close its connections."""
        return self._store.close()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> Any:
        """Enter a moving window; False, and nothing written, if it is full."""
        return self._acquire(key + _MOVING, _entered(limit, expiry, amount), expiry)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> Any:  # noqa: ARG002  # limits' signature
        """Return when the oldest entry of the window came, and how many there are."""
        return self._then(lambda data: _moving(data, expiry), self._store.get, key + _MOVING)

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> Any:
        """Enter a window that is weighted with the one before; False if it is full."""
        return self._acquire(key + _SLIDING, _counted(limit, expiry, amount), 2 * expiry)

    def get_sliding_window(self, key: str, expiry: int) -> Any:
        """Return count and seconds left of the window before, and of the current one."""
        return self._then(lambda data: _sliding(data, expiry), self._store.get, key + _SLIDING)

    def _then(self, reader: Callable[[Any], Any], *asked: Any) -> Any:
        def flow() -> Flow[Any]:
            return reader((yield from call(*asked)))

        return self._drive(flow())

    def _acquire(self, key: str, change: Change, ttl: int) -> Any:
        return self._unless(
            Refused, partial(self._store.update, key, change, ttl=ttl, attempts=_ATTEMPTS)
        )

    def _unless(self, error: type[Exception], do: Callable[[], Any]) -> Any:
        """Return whether a call succeeds; False if it raises that error."""

        def flow() -> Flow[bool]:
            try:
                yield from call(do)
            except error:
                return False
            return True

        return self._drive(flow())


class PgkvStorage(Windows, Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """limits' storage on PostgreSQL, for threads.

    Args:
        uri: ``pgkv://user@host:5432/database``; or ``pgkv://`` with an option ``dsn``.
        wrap_exceptions: raise limits' `StorageError` in place of pgkv's errors.
        options: fields of `Config`; the table is ``limits``.
    """

    STORAGE_SCHEME: list[str] | None = ["pgkv", "pgkv+embedded"]  # noqa: RUF012  # limits declares it so
    _drive = staticmethod(drive)

    def __init__(
        self, uri: str | None = None, wrap_exceptions: bool = False, **options: Any
    ) -> None:
        super().__init__(uri, wrap_exceptions)
        self._store = Store(_config(uri, options))


class AsyncPgkvStorage(
    Windows, AsyncStorage, AsyncMovingWindowSupport, AsyncSlidingWindowCounterSupport
):
    """limits' storage on PostgreSQL, for asyncio: `PgkvStorage`, awaited.

    Args:
        uri: ``async+pgkv://user@host:5432/database``.
        wrap_exceptions: see `PgkvStorage`.
        options: fields of `Config`.
    """

    STORAGE_SCHEME: list[str] | None = ["async+pgkv", "async+pgkv+embedded"]  # noqa: RUF012  # limits declares it so
    _drive = staticmethod(drive_async)

    def __init__(
        self, uri: str | None = None, wrap_exceptions: bool = False, **options: Any
    ) -> None:
        super().__init__(uri, wrap_exceptions)
        self._store = AsyncStore(_config(uri, options))
