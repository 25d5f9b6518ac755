"""For cachelib, and so for Flask-Caching and Flask-Session: `CachelibCache`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from cachelib import BaseCache
from cachelib.serializers import RedisSerializer

from ..store import Store

__all__ = ["CachelibCache"]


class CachelibCache(BaseCache):
    """A cachelib cache on a `Store`: every method is one statement, ``add`` and ``inc`` are atomic.

    - Flask-Session: ``SESSION_TYPE = "cachelib"``, ``SESSION_CACHELIB = CachelibCache(store)``.
    - Flask-Caching: ``CACHE_TYPE = "pgkv.integrations.cachelib.CachelibCache"``,
      ``CACHE_ARGS = [store]``.

    Values are pickled, integers kept as text, as in cachelib's Redis cache; `serializer` may be
    another of cachelib's.

    Args:
        store: the store; `clear` empties it, so give the cache a `Store.namespace` or table.
        default_timeout: seconds, or a timedelta; 0 for no end.
        ignore_delete_many_errors: cachelib's; deleting cannot fail here for one key alone.
    """

    serializer: Any = RedisSerializer()

    def __init__(
        self,
        store: Store,
        default_timeout: int | timedelta = 300,
        ignore_delete_many_errors: bool = True,
    ) -> None:
        super().__init__(default_timeout, ignore_delete_many_errors)
        self._store = store

    def _ttl(self, timeout: int | timedelta | None) -> int | None:
        seconds = self._normalize_timeout(timeout)
        return seconds if seconds > 0 else None

    def _loads(self, data: bytes | None) -> Any:
        return None if data is None else self.serializer.loads(data)

    def get(self, key: str) -> Any:
        """Return the value, or None."""
        return self._loads(self._store.get(key))

    def get_many(self, *keys: str) -> list[Any]:
        """Return the values in the order of the keys, None where there is none."""
        found = self._store.get_many(keys)
        return [self._loads(found.get(key)) for key in keys]

    def set(self, key: str, value: Any, timeout: int | timedelta | None = None) -> bool:
        """Write the value; True."""
        self._store.set(key, self.serializer.dumps(value), ttl=self._ttl(timeout))
        return True

    def set_many(
        self, mapping: dict[str, Any], timeout: int | timedelta | None = None
    ) -> list[Any]:
        """Write all pairs or none; return their keys."""
        dumped = {key: self.serializer.dumps(value) for key, value in mapping.items()}
        self._store.set_many(dumped, ttl=self._ttl(timeout))
        return list(mapping)

    def add(self, key: str, value: Any, timeout: int | timedelta | None = None) -> bool:
        """Write the value if there is no such key; True if it was written."""
        return self._store.set_nx(key, self.serializer.dumps(value), ttl=self._ttl(timeout))

    def delete(self, key: str) -> bool:
        """Remove the key; True if it was there."""
        return self._store.delete(key)

    def delete_many(self, *keys: str) -> list[Any]:
        """Remove all the keys; none of them exists afterwards, so all are returned."""
        self._store.delete_many(keys)
        return list(keys)

    def has(self, key: str) -> bool:
        """Tell whether the key exists."""
        return self._store.exists(key)

    def clear(self) -> bool:
        """Remove every key of the store; True."""
        self._store.clear()
        return True

    def inc(self, key: str, delta: int = 1) -> int:
        """Add to an integer, atomically, and return the sum. An absent key counts as 0."""
        return self._store.increment(key, delta)

    def dec(self, key: str, delta: int = 1) -> int:
        """Subtract from an integer; see `inc`."""
        return self._store.decrement(key, delta)
