"""Invalidation inside the caller's own transaction."""

from __future__ import annotations

from typing import Any

from ..._engine import schema as _schema
from ..._observe import shown
from .._runtime import switch as _switch
from .context import Site
from .invalidations import announcement


class Invalidator:
    """``load.using(conn)``: invalidates inside the caller's transaction.

    Committed with the data or rolled back with it. From this moment to the end of the transaction
    the key's fills are held back; what was stored before remains a hit, for this transaction too,
    because calls read on the store's own connection. Invalidate last, and several keys in a fixed
    order: these are row locks, and two transactions that take them crosswise deadlock.
    """

    def __init__(self, function: Any, site: Site, bound: Any) -> None:
        self._function = function
        self._site = site
        self._bound = bound

    @shown
    def __repr__(self) -> str:
        return f"of {self._function.name}"

    def invalidate(self, *args: Any, **kwargs: Any) -> None:
        """Remove one call's entry when the transaction commits."""
        if _switch.off:
            return
        function, site = self._function, self._site
        key = function._visit(site, args, kwargs).key
        ensure_table(site)
        self._bound._execute(site.sql.bury(key))
        function._forget(site, key)
        if function._core.l1 is not None:
            self._bound._execute(announcement(site, key))


class AsyncInvalidator:
    """`Invalidator`, awaited."""

    def __init__(self, function: Any, site: Site, bound: Any) -> None:
        self._function = function
        self._site = site
        self._bound = bound

    @shown
    def __repr__(self) -> str:
        return f"of {self._function.name}"

    async def invalidate(self, *args: Any, **kwargs: Any) -> None:
        """Remove one call's entry when the transaction commits."""
        if _switch.off:
            return
        function, site = self._function, self._site
        key = function._visit(site, args, kwargs).key
        await ensure_table_async(site)
        await self._bound._execute(site.sql.bury(key))
        function._forget(site, key)
        if function._core.l1 is not None:
            await self._bound._execute(announcement(site, key))


def ensure_table(site: Site) -> None:
    """Make the table before the caller's transaction needs it: a missing one would fail that."""
    if not site.table_known and site.sql.table.auto_create:
        site.store._run(_schema.ensure(site.sql.table))
    site.table_known = True


async def ensure_table_async(site: Site) -> None:
    """`ensure_table`, awaited."""
    if not site.table_known and site.sql.table.auto_create:
        await site.store._run(_schema.ensure(site.sql.table))
    site.table_known = True
