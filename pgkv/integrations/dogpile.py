"""For dogpile.cache: the backend ``pgkv``, with a lock across processes as its mutex.

::

    region = make_region().configure("pgkv", expiration_time=60, arguments={"store": store})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dogpile.cache.api import NO_VALUE, BytesBackend, CacheMutex, KeyType, SerializedReturnType

from ..errors import ConfigError
from ..patterns.lock.api import Lease, Lock
from ..store import Store

__all__ = ["DogpileBackend"]


class DogpileBackend(BytesBackend):
    """dogpile.cache's backend on a `Store`.

    Args:
        arguments: ``store``, a `Store`; ``ttl``, seconds after which an entry is removed (longer than
            the region's expiration time; none by default); ``distributed_lock``, True to have one
            process of all compute a missing value; ``lock_lease``, seconds (10) after which the
            lock of a dead process is free.

    Raises:
        ConfigError: `arguments` has no store.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        store = arguments.get("store")
        if not isinstance(store, Store):
            raise ConfigError(
                'arguments["store"] must be a Store: configure("pgkv", arguments={...})'
            )
        self._store = store
        self._ttl = arguments.get("ttl")
        self._lock_lease: float = arguments.get("lock_lease", 10)
        self._is_distributed = bool(arguments.get("distributed_lock", False))

    def has_lock_timeout(self) -> bool:
        """Tell whether a lock ends by itself: it does, with its lease."""
        return self._is_distributed

    def get_mutex(self, key: KeyType) -> CacheMutex | None:
        """Return the lock of a key, or None for dogpile's own within the process."""
        if not self._is_distributed:
            return None
        return DogpileMutex(Lock(self._store, f"dogpile:{key}", ttl=self._lock_lease))

    def get_serialized(self, key: KeyType) -> SerializedReturnType:
        """Return the value, or dogpile's NO_VALUE."""
        return self._store.get(key, NO_VALUE)

    def get_serialized_multi(self, keys: Iterable[KeyType]) -> Sequence[SerializedReturnType]:
        """Return the values in the order of the keys, in one statement."""
        keys = list(keys)
        found = self._store.get_many(keys)
        return [found.get(key, NO_VALUE) for key in keys]

    def set_serialized(self, key: KeyType, value: bytes) -> None:
        """Write the value."""
        self._store.set(key, value, ttl=self._ttl)

    def set_serialized_multi(self, mapping: Mapping[KeyType, bytes]) -> None:
        """Write all pairs, in one statement."""
        self._store.set_many(mapping, ttl=self._ttl)

    def delete(self, key: KeyType) -> None:
        """Remove the key, if it is there."""
        self._store.delete(key)

    def delete_multi(self, keys: Iterable[KeyType]) -> None:
        """Remove all the keys, in one statement."""
        self._store.delete_many(keys)


class DogpileMutex(CacheMutex):
    """A `Lock` as dogpile holds one.

    Args:
        lock: the lock.
    """

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self._lease: Lease | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; with `wait` only when it is granted."""
        lease = self._lock.acquire() if wait else self._lock.try_acquire()
        self._lease = lease or self._lease  # a refused second acquire leaves the first one's
        return bool(lease)

    def release(self) -> None:
        """Free the lock."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def locked(self) -> bool:
        """Tell whether this mutex or another holds the lock."""
        return self._lock.holder() is not None
