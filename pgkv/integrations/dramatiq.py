"""For dramatiq: `DramatiqBackend`, the backend of its rate limiters and barriers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from dramatiq.rate_limits import RateLimiterBackend
from psycopg import IsolationLevel

from ..store import Store

__all__ = ["DramatiqBackend"]

_POLL = 0.05  # seconds between two looks of a waiter
_ATTEMPTS = 1000  # of a change that meets others; each failure is another's success


class _Refused(Exception):  # noqa: N818  # no error: it leaves the update of a full counter
    """The counter would pass its bound."""


class DramatiqBackend(RateLimiterBackend):
    """dramatiq's rate limiter backend: ``ConcurrentRateLimiter(DramatiqBackend(store), "key")``.

    Args:
        store: the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Write the value if there is no such key; `ttl` is milliseconds, as everywhere here."""
        return self._store.set_nx(key, b"%d" % value, ttl=ttl / 1000)

    def incr(self, key: str, amount: int, maximum: int, ttl: int) -> bool:
        """Add unless the sum would pass `maximum`; True if it was added."""
        return self._change(key, amount, lambda total: total <= maximum, ttl)

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        """Subtract unless the difference would pass `minimum`; True if it was subtracted."""
        return self._change(key, -amount, lambda total: total >= minimum, ttl)

    def incr_and_sum(
        self, key: str, keys: Callable[[], Iterable[str]], amount: int, maximum: int, ttl: int
    ) -> bool:
        """Add to a key unless the sum of all `keys` would pass `maximum`; True if it was added."""

        def add(store: Store) -> bool:
            names = list(keys())
            counts = {name: int(data) for name, data in store.get_many([key, *names]).items()}
            total = counts.get(key, 0) + amount
            if total > maximum or amount + sum(counts.get(name, 0) for name in names) > maximum:
                return False
            store.set(key, b"%d" % total, ttl=ttl / 1000)
            return True

        return self._store.run_transaction(add, isolation=IsolationLevel.SERIALIZABLE)

    def wait(self, key: str, timeout: int | None) -> bool:
        """Wait until `wait_notify` was called for the key; False after `timeout` milliseconds."""
        end = None if timeout is None else time.monotonic() + timeout / 1000
        while not self._store.exists(key):
            left = _POLL if end is None else min(_POLL, end - time.monotonic())
            if left <= 0:
                return False
            time.sleep(left)
        return True

    def wait_notify(self, key: str, ttl: int) -> None:
        """Let all who wait for the key go on, for `ttl` milliseconds also those who come later."""
        self._store.set(key, b"x", ttl=ttl / 1000)

    def _change(self, key: str, amount: int, fits: Callable[[int], bool], ttl: int) -> bool:
        def change(data: bytes | None) -> bytes:
            total = int(data or 0) + amount
            if not fits(total):
                raise _Refused
            return b"%d" % total

        try:
            self._store.update(key, change, ttl=ttl / 1000, attempts=_ATTEMPTS)
        except _Refused:
            return False
        return True
