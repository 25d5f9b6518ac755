"""The stores of a Django process: one for each server and set of options, shared by all threads;
asyncio has its own for each event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.connection import ConnectionDoesNotExist
from psycopg import pq
from psycopg.conninfo import make_conninfo

from ..._fork import new_lock
from ...aio import AsyncStore
from ...config import Config
from ...errors import ConfigError
from ...patterns.defaults import close_with_loop
from ...store import Store


class Stores:
    """A registry: stores are made when first asked for, and connect at their first operation."""

    def __init__(self) -> None:
        self._lock = new_lock(self)
        self._made: dict[int, Store] = {}
        self._of_loops: dict[tuple[asyncio.AbstractEventLoop, int], AsyncStore] = {}

    def get(self, config: Config) -> Store:
        """Return the store of a `Config` of `config_for`, which is looked up by its identity."""
        found = self._made.get(id(config))
        if found is not None:
            return found
        with self._lock:
            if id(config) not in self._made:
                self._made[id(config)] = Store(config)
            return self._made[id(config)]

    async def get_async(self, config: Config) -> AsyncStore:
        """Return the running event loop's store of a `Config` of `config_for`; it is closed when
        the loop ends."""
        key = asyncio.get_running_loop(), id(config)
        if key not in self._of_loops:
            store = self._of_loops[key] = AsyncStore(config)
            close_with_loop(store, functools.partial(self._of_loops.pop, key))
        return self._of_loops[key]

    def close(self) -> None:
        """Close the stores of threads; the next use makes new ones."""
        with self._lock:
            while self._made:
                self._made.popitem()[1].close()


STORES = Stores()


def config_for(location: str, options: Mapping[str, Any]) -> Config:
    """Return the settings of a store.

    Args:
        location: a DSN, or an alias of ``DATABASES``; empty for the default database.
        options: fields of `Config`.

    Raises:
        ConfigError: there is no such alias, its database is not PostgreSQL, or an option is wrong.
    """
    dsn = location if is_dsn(location) else _dsn_of(location or DEFAULT_DB_ALIAS)
    try:
        return _config(dsn, tuple(sorted(options.items())))
    except TypeError:  # no field is of an unhashable type: Config names the one that is
        return Config(dsn, **options)


@functools.cache  # checked once, not for each request; and equal settings are one object
def _config(dsn: str, options: tuple[tuple[str, Any], ...]) -> Config:
    return Config(dsn, **dict(options))


def is_dsn(location: str) -> bool:
    """Whether a location is a DSN, and not an alias of ``DATABASES``."""
    return "://" in location or "=" in location


def _dsn_of(alias: str) -> str:
    try:
        connection = connections[alias]
    except ConnectionDoesNotExist:
        raise ConfigError(
            f"LOCATION {alias!r} is neither a DSN nor an alias of DATABASES; give "
            f"postgresql://user@host/database or one of: {', '.join(connections)}"
        ) from None
    if connection.vendor != "postgresql":
        raise ConfigError(
            f"LOCATION {alias!r} is a {connection.vendor} database; pgkv needs PostgreSQL: name "
            "another alias of DATABASES, or give a DSN"
        )
    given = connection.get_connection_params()
    return make_conninfo(**{name: given[name] for name in _keywords() & given.keys()})


@functools.cache
def _keywords() -> frozenset[str]:
    return frozenset(each.keyword.decode() for each in pq.Conninfo.get_defaults())
