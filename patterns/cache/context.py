"""One store as cached functions see it: its statements, its circuit breaker, its first levels."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from ..._fork import new_lock
from .breaker import Breaker
from .sql import CacheStatements

if TYPE_CHECKING:
    from ...aio import AsyncStore
    from ...store import Store

_lock = new_lock(sys.modules[__name__])
_breakers: weakref.WeakKeyDictionary[Any, Breaker] = weakref.WeakKeyDictionary()
_sites: weakref.WeakKeyDictionary[Any, Site] = weakref.WeakKeyDictionary()


class Site:
    """What all cached functions share on one store.

    Attributes:
        sql: the cache's statements on its table, under its namespace.
        breaker: one per pool of connections, shared by the views of a store.
        names: by function, what its entries' keys begin with, and its generation's key.
        scope: names table and namespace in messages between processes and in first levels.
    """

    def __init__(self, store: Store | AsyncStore) -> None:
        self._store = weakref.ref(store)
        self.sql: CacheStatements = CacheStatements(store._config, store._sql.prefix)
        self.breaker: Breaker = _breakers.setdefault(store._channel, Breaker())
        self.scope: str = f"{self.sql.t}\x1f{self.sql.prefix}"
        self.table_known = False
        self.names: dict[str, tuple[bytes, bytes]] = {}

    @property
    def store(self) -> Any:
        """The store, in whichever colour."""
        store = self._store()
        assert store is not None  # whoever uses the site holds the store
        return store


def site_of(store: Store | AsyncStore) -> Site:
    """Return the store's site, made at first use."""
    site = _sites.get(store)
    if site is None:
        with _lock:
            site = _sites.get(store)
            if site is None:
                site = _sites[store] = Site(store)
    return site


__all__ = ["Site", "site_of"]
