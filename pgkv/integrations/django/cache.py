"""Django's cache in PostgreSQL. The contract is `django.core.cache.backends.base.BaseCache`; where
that is silent this follows Django's own Redis backend."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from django.core.cache.backends.base import (
    DEFAULT_TIMEOUT,
    MEMCACHE_MAX_KEY_LENGTH,
    BaseCache,
)
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.module_loading import import_string

from ..._ops.lazy import cached_property
from ...config import ENTRIES_MIN, Config
from ...errors import ConfigError, InvalidValueError
from ...store import Store
from .stores import STORES, config_for, is_dsn

Call = Callable[[Any], Any]  # of a Store, which answers, or an AsyncStore, which is awaited

_FIELDS = frozenset(field.name for field in fields(Config)) - {"dsn"}
_DJANGOS = frozenset(("MAX_ENTRIES", "CULL_FREQUENCY"))
_WARNED = re.compile(r"[\x00-\x20\x7f]")
_INSTANT = 1e-6  # seconds: over when the next statement begins


class PgkvCache(BaseCache):
    """A cache backend: ``CACHES = {"default": {"BACKEND": "pgkv.integrations.django.PgkvCache"}}``.

    All of `BaseCache`, each method one statement, ``incr`` and ``add`` atomic, and the ``a*``
    methods natively async. Threads share one pool of connections. The methods of asyncio use a pool
    of the running event loop.

    ``LOCATION`` is an alias of ``DATABASES`` or a DSN; without one it is the default database.
    ``OPTIONS`` are fields of `Config` (the table is ``django_cache``), and:

    - ``serializer``: an object, class or dotted path with ``dumps(value) -> bytes`` and
      ``loads(bytes)``; pickle by default, as in Django's own backends. Integers are kept as text.
    - ``atomic``: True makes blocking calls part of an open ``transaction.atomic()`` of the
      database that ``LOCATION`` names: they commit and roll back with it.
    - ``MAX_ENTRIES``: `Config`'s ``max_entries``, at least 100. There is no bound without it.
      ``CULL_FREQUENCY`` has no effect: no more is evicted than the bound asks for.

    ``clear()`` empties the table, the entries of other prefixes and versions included.

    Args:
        location: ``LOCATION``.
        params: the other settings of the cache.
    """

    def __init__(self, location: str, params: Mapping[str, Any]) -> None:
        super().__init__(dict(params))
        options = {"table_name": "django_cache", **params.get("OPTIONS", {})}
        serializer = options.pop("serializer", pickle)
        if isinstance(serializer, str):
            serializer = import_string(serializer)
        self._serializer: Any = serializer() if isinstance(serializer, type) else serializer
        self._location = location
        self._atomic: bool = options.pop("atomic", False)
        self._options = {name: value for name, value in options.items() if name not in _DJANGOS}
        if options.get("MAX_ENTRIES", params.get("max_entries")) is not None:
            self._options.setdefault("max_entries", max(self._max_entries, ENTRIES_MIN))
        if unknown := sorted(self._options.keys() - _FIELDS):
            raise ConfigError(
                f"CACHES has no OPTIONS {', '.join(unknown)}; there are serializer, atomic, "
                f"{', '.join(sorted(_FIELDS | _DJANGOS))}"
            )
        if self._atomic and is_dsn(location):
            raise ConfigError(
                "the option `atomic` needs an alias of DATABASES as LOCATION, not a DSN: it joins "
                "the transactions of that database"
            )

    @cached_property
    def config(self) -> Config:
        """The settings of its store."""
        return config_for(self._location, self._options)

    @property
    def database(self) -> str:
        """The alias of its database; with a DSN the default one, whose migration makes its table."""
        alias = "" if is_dsn(self._location) else self._location
        return alias or DEFAULT_DB_ALIAS

    @property
    def _store(self) -> Store:
        # Not kept: STORES.close() ends what a long-lived cache uses, and the next call opens it.
        shared = STORES.get(self.config)
        if self._atomic and (connection := connections[self.database]).in_atomic_block:
            return shared.using(connection)
        return shared

    async def _acall(self, call: Call) -> Any:
        return await call(await STORES.get_async(self.config))

    # -- what a call is, for both

    def _seconds(self, timeout: Any) -> float | None:
        """Return seconds; 0 or less where the entry ends at once, None where it never does."""
        seconds: float | None = self.default_timeout if timeout is DEFAULT_TIMEOUT else timeout
        return seconds

    def _dumps(self, value: Any) -> bytes:
        if type(value) is int and -(2**63) <= value < 2**63:
            return b"%d" % value
        return self._serializer.dumps(value)  # type: ignore[no-any-return]  # the user's

    def _loads(self, data: bytes | None, default: Any) -> Any:
        if data is None:
            return default
        if data[:1] != b"\x80":  # of a pickle: int() would raise for each
            with contextlib.suppress(ValueError):
                return int(data)
        return self._serializer.loads(data)

    def validate_key(self, key: str) -> None:
        """Warn of a key that memcached would refuse. Django's own way costs as much for a few keys as
        the round trip, so only keys that have something to warn of go there."""
        if len(key) > MEMCACHE_MAX_KEY_LENGTH or _WARNED.search(key):
            super().validate_key(key)

    def _add(self, key: Any, value: Any, timeout: Any, version: int | None) -> Call:
        name, data = self.make_and_validate_key(key, version), self._dumps(value)
        seconds = self._seconds(timeout)
        if seconds is not None and seconds <= 0:
            return lambda store: store.set_nx(name, data, ttl=_INSTANT)
        return lambda store: store.set_nx(name, data, ttl=seconds)

    def _set(self, key: Any, value: Any, timeout: Any, version: int | None) -> Call:
        name, data = self.make_and_validate_key(key, version), self._dumps(value)
        seconds = self._seconds(timeout)
        if seconds is not None and seconds <= 0:
            return lambda store: store.delete(name)
        return lambda store: store.set(name, data, ttl=seconds)

    def _touch(self, key: Any, timeout: Any, version: int | None) -> Call:
        name, seconds = self.make_and_validate_key(key, version), self._seconds(timeout)
        if seconds is None:
            return lambda store: store.persist(name)
        if seconds <= 0:
            return lambda store: store.delete(name)
        return lambda store: store.expire(name, seconds)

    def _incr(self, key: Any, delta: int, version: int | None) -> Call:
        name = self.make_and_validate_key(key, version)
        return lambda store: store.increment(name, delta, only_if_exists=True)

    def _set_many(self, data: Mapping[Any, Any], timeout: Any, version: int | None) -> Call:
        seconds = self._seconds(timeout)
        items = {
            self.make_and_validate_key(key, version): self._dumps(value)
            for key, value in data.items()
        }
        if seconds is not None and seconds <= 0:
            return lambda store: store.delete_many(items)
        return lambda store: store.set_many(items, ttl=seconds)

    def _names(self, keys: Iterable[Any], version: int | None) -> dict[str, Any]:
        return {self.make_and_validate_key(key, version): key for key in keys}

    def _values(self, names: Mapping[str, Any], found: Mapping[str, bytes]) -> dict[Any, Any]:
        return {names[name]: self._loads(data, None) for name, data in found.items()}

    # -- blocking

    def add(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        """Write the value if there is no such key; True if it was written. Of concurrent callers
        exactly one writes it."""
        return self._add(key, value, timeout, version)(self._store)  # type: ignore[no-any-return]  # of either store

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        """Return the value, or `default`."""
        return self._loads(self._store.get(self.make_and_validate_key(key, version)), default)

    def set(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> None:
        """Write the value; a `timeout` (seconds) of 0 or less removes the key."""
        self._set(key, value, timeout, version)(self._store)

    def touch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Give the key a new timeout in seconds; True if there is such a key."""
        return self._touch(key, timeout, version)(self._store)  # type: ignore[no-any-return]  # of either store

    def delete(self, key: Any, version: int | None = None) -> bool:
        """Remove the key; True if it was there."""
        return self._store.delete(self.make_and_validate_key(key, version))

    def get_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        """Return the values of those keys that exist, read in one statement."""
        names = self._names(keys, version)
        return self._values(names, self._store.get_many(names))

    def set_many(
        self, data: Mapping[Any, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        """Write all pairs or none, in one statement; no key can fail alone, so the list is empty."""
        self._set_many(data, timeout, version)(self._store)
        return []

    def delete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        """Remove all the keys in one statement."""
        self._store.delete_many(self._names(keys, version))

    def has_key(self, key: Any, version: int | None = None) -> bool:
        """Tell whether the key exists."""
        return self._store.exists(self.make_and_validate_key(key, version))

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> int:
        """Add to an integer, atomically, and return the sum. The timeout stays.

        Raises:
            ValueError: there is no such key.
            TypeError: the value is not an integer of 64 bits.
        """
        with _incr_errors():
            return _found(key, self._incr(key, delta, version)(self._store))

    def clear(self) -> None:
        """Remove all entries of the table."""
        self._store.clear()

    # -- asyncio

    async def aadd(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> Any:
        """See `add`."""
        return await self._acall(self._add(key, value, timeout, version))

    async def aget(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        """See `get`."""
        name = self.make_and_validate_key(key, version)
        return self._loads(await self._acall(lambda store: store.get(name)), default)

    async def aset(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> None:
        """See `set`."""
        await self._acall(self._set(key, value, timeout, version))

    async def atouch(
        self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> Any:
        """See `touch`."""
        return await self._acall(self._touch(key, timeout, version))

    async def adelete(self, key: Any, version: int | None = None) -> Any:
        """See `delete`."""
        name = self.make_and_validate_key(key, version)
        return await self._acall(lambda store: store.delete(name))

    async def aget_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        """See `get_many`."""
        names = self._names(keys, version)
        return self._values(names, await self._acall(lambda store: store.get_many(names)))

    async def aset_many(
        self, data: Mapping[Any, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        """See `set_many`."""
        await self._acall(self._set_many(data, timeout, version))
        return []

    async def adelete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        """See `delete_many`."""
        names = self._names(keys, version)
        await self._acall(lambda store: store.delete_many(names))

    async def ahas_key(self, key: Any, version: int | None = None) -> Any:
        """See `has_key`."""
        name = self.make_and_validate_key(key, version)
        return await self._acall(lambda store: store.exists(name))

    async def aincr(self, key: Any, delta: int = 1, version: int | None = None) -> int:
        """See `incr`."""
        with _incr_errors():
            return _found(key, await self._acall(self._incr(key, delta, version)))

    async def aclear(self) -> None:
        """See `clear`."""
        await self._acall(lambda store: store.clear())


@contextlib.contextmanager
def _incr_errors() -> Iterator[None]:
    try:
        yield
    except InvalidValueError as error:  # a ValueError, which stands for "no such key" here
        raise TypeError(str(error)) from error


def _found(key: object, total: int | None) -> int:
    if total is None:
        raise ValueError(f"Key {key!r} not found")
    return total
