"""What `cached` makes of a function: thin shells in two colours over `_cached_core`.

Helpers such as ``invalidate`` take the arguments that the function takes, those named by `ignore`
left out. An object's methods come as views that put the object before the arguments.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import psycopg

from ..._engine.caller import unwrap
from ..._observe import shown
from ...aio import AsyncStore
from ...errors import PgkvError
from ...store import Store
from .._runtime import switch as _switch
from ..defaults import default_async_store, default_store
from .call import MISSING, Found, Visit, breaker_open
from .context import Site, site_of
from .invalidations import announce, listen
from .refresh import Core
from .runtime import AWAITING, BLOCKING
from .sql import ENTRY, FUNCTION
from .transaction import AsyncInvalidator, Invalidator

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class CachedValue(Generic[R]):
    """What ``peek()`` found.

    Attributes:
        value: the cached value.
        age: seconds since it was stored, by the server's clock.
        stale: its ttl has passed; it is still served while it is computed anew.
    """

    value: R
    age: float
    stale: bool


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """How the calls of one cached function ended, in this process.

    Every call counts once, among hits, stale_hits or misses; background refreshes count among the
    fills only.

    Attributes:
        hits: a fresh value was served, from the store or the first level.
        misses: the call ran the function.
        stale_hits: a value past its ttl was served.
        waits: calls that waited for somebody else's computation.
        errors: the store failed and the call went on without it, or a refresh failed.
        fills: values stored.
        discarded_fills: values not stored, because an invalidation came first or held the row.
    """

    hits: int
    misses: int
    stale_hits: int
    waits: int
    errors: int
    fills: int
    discarded_fills: int


class _Base(Generic[P, R]):
    """What both colours share."""

    __wrapped__: Callable[..., Any]
    __name__: str
    __qualname__: str

    def __init__(
        self, core: Core, store: Store | AsyncStore | None, owner: type | None = None
    ) -> None:
        self._core = core
        self._store: Any = store
        self._head: tuple[Any, ...] = ()
        self._class_bound = owner is type
        wrapped: Any = self
        functools.update_wrapper(wrapped, core.fn)
        _made(self)

    def _bound_to(self, instance: object) -> Self:
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._head = (instance,)
        return view

    def _bind(self, instance: object, owner: type | None) -> Self:
        if self._class_bound:
            return self._bound_to(owner)
        return self if instance is None else self._bound_to(instance)

    @shown
    def __repr__(self) -> str:
        return f"{self._core.name} {self._core.options.facts()}"

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By name, as functions are pickled: so it can be sent to another process.
        if self._head:
            return getattr, (self._head[0], self.__name__)
        return self.__qualname__

    @property
    def name(self) -> str:
        """What the store and ``pgkv cache`` call this function: namespace, module, qualified name
        and version."""
        return self._core.name

    def _visit(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Visit:
        """For helpers: ignored parameters may be left out."""
        return self._core.visit(site, self._head + args, kwargs, lenient=True)

    def cache_key(self, *args: Any, **kwargs: Any) -> str:
        """Return the key of one call's entry, as it stands in the store (below the store's own
        namespace). Asks no store.

        Raises:
            TypeError: an argument has no stable encoding.
        """
        binder = self._core.binder
        arguments = binder.bind(self._head + args, kwargs, lenient=True)
        return f"{ENTRY}{self._core.name}:{binder.digest(arguments)}"

    def cache_info(self) -> CacheInfo:
        """Return how the calls in this process ended. No query."""
        counts = self._core.counts
        return CacheInfo(
            counts.hits,
            counts.misses,
            counts.stale_hits,
            counts.waits,
            counts.errors,
            counts.fills,
            counts.discarded_fills,
        )

    def _clear_key(self, site: Site) -> bytes:
        return site.sql.cache_key(FUNCTION, self._core.name)

    def _forget(self, site: Site, key: bytes) -> None:
        if self._core.l1 is not None:
            self._core.l1.drop(site.scope, key)

    def _seen(self, found: Found | None) -> CachedValue[Any] | None:
        return None if found is None else CachedValue(found.value, found.age, found.fresh <= 0)


class CachedFunction(_Base[P, R]):
    """A function whose results are cached; made by `cached`. Called like the function itself.

    ``invalidate``, ``peek``, ``cache_key`` and ``using(...)`` take the arguments that make the key:
    parameters named by ``ignore=`` are left out. Helpers raise when the store cannot be reached,
    whatever ``on_error`` says of calls. ``__wrapped__`` is the function itself.
    """

    def _site(self) -> Site:
        store = self._store
        if store is None:
            store = default_store()
        site = site_of(store)
        if self._core.l1 is not None:
            listen(site, self._core.l1)
        return site

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        core = self._core
        if _switch.off:
            return core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        site = self._site()
        visit = core.visit(site, self._head + args, kwargs)
        if core.l1 is not None and (value := core.near(visit)) is not MISSING:
            return value  # type: ignore[no-any-return]  # as above
        if site.breaker.allows() or core.options.on_error == "raise":
            try:
                look: Any = site.store._execute(
                    site.sql.look(visit.keys), core.options.store_timeout
                )
            except PgkvError as error:
                look = error
            else:
                site.breaker.succeeded()
                if (value := core.fresh(visit, look)) is not MISSING:
                    return value  # type: ignore[no-any-return]  # as above
        else:
            look = breaker_open()
        flow = core.answer(visit, look)
        return BLOCKING.run(site, flow, core.options.store_timeout)  # type: ignore[no-any-return]  # as above

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function now and store what it returns; the old value is served meanwhile.

        Takes all arguments of the function. Fills that began before are discarded; of concurrent
        refreshes the one that began last is stored.
        """
        if _switch.off:
            return self._core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        site = self._site()
        visit = self._core.visit(site, self._head + args, kwargs)
        flow = self._core.renew(visit)
        try:
            return BLOCKING.run(site, flow, self._core.options.store_timeout)  # type: ignore[no-any-return]  # as above
        finally:
            self._tell(site, visit.key)

    def invalidate(self, *args: Any, **kwargs: Any) -> None:
        """Remove one call's entry. When it returns, no later call sees an older value, and a
        computation that began before is discarded."""
        if _switch.off:
            return
        site = self._site()
        key = self._visit(site, args, kwargs).key
        site.store._execute(site.sql.bury(key))
        self._tell(site, key)

    def peek(self, *args: Any, **kwargs: Any) -> CachedValue[R] | None:
        """Return what is stored for one call, or None. Calls nothing, counts nothing, and asks the
        store even where a first level has the value."""
        if _switch.off:
            return None
        site = self._site()
        visit = self._visit(site, args, kwargs)
        look = site.store._execute(site.sql.look(visit.keys))
        return self._seen(self._core.interpret(visit, look))

    def cache_clear(self) -> None:
        """Make every entry of the function a miss, at once and in constant time: its generation is
        raised, the rows themselves end by their ttl."""
        if _switch.off:
            return
        site = self._site()
        key = self._clear_key(site)
        site.store._execute(site.sql.bump_function(key))
        self._tell(site, key)

    def _tell(self, site: Site, key: bytes) -> None:
        self._forget(site, key)
        if self._core.l1 is not None:
            announce(site, key)

    def using(self, conn: Any) -> Invalidator:
        """Return an object whose ``invalidate`` belongs to the caller's transaction.

        Args:
            conn: a ``psycopg.Connection``, or Django's or SQLAlchemy's wrapper of one.

        Raises:
            ConfigError: it is no psycopg 3 connection, or an async one.
        """
        site = self._site()
        inner = unwrap(conn, psycopg.Connection)
        return Invalidator(self, site, site.store.using(inner))

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: CachedFunction[Concatenate[Any, Q], S], instance: object, owner: type | None = None
    ) -> CachedFunction[Q, S]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self._bind(instance, owner)


class AsyncCachedFunction(_Base[P, R]):
    """An ``async def`` whose results are cached; made by `cached`. Awaited like the function.

    As `CachedFunction`, with ``refresh``, ``invalidate``, ``peek`` and ``cache_clear`` awaited.
    """

    def __init__(
        self, core: Core, store: Store | AsyncStore | None, owner: type | None = None
    ) -> None:
        super().__init__(core, store, owner)
        # Frameworks ask whether to await what they were given.
        if sys.version_info >= (3, 12):
            inspect.markcoroutinefunction(self)
        else:
            self._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # gone in 3.12's stubs

    def _site(self) -> Site:
        store = self._store
        if store is None:
            store = default_async_store()
        site = site_of(store)
        if self._core.l1 is not None:
            listen(site, self._core.l1)
        return site

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        core = self._core
        if _switch.off:
            return await core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        site = self._site()
        visit = core.visit(site, self._head + args, kwargs)
        if core.l1 is not None and (value := core.near(visit)) is not MISSING:
            return value  # type: ignore[no-any-return]  # as above
        if site.breaker.allows() or core.options.on_error == "raise":
            op = site.sql.look(visit.keys)
            try:
                look: Any = await site.store._execute(op, core.options.store_timeout)
            except PgkvError as error:
                look = error
            else:
                site.breaker.succeeded()
                if (value := core.fresh(visit, look)) is not MISSING:
                    return value  # type: ignore[no-any-return]  # as above
        else:
            look = breaker_open()
        flow = core.answer(visit, look)
        return await AWAITING.run(site, flow, core.options.store_timeout)

    async def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function now and store what it returns; see `CachedFunction.refresh`."""
        if _switch.off:
            return await self._core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        site = self._site()
        visit = self._core.visit(site, self._head + args, kwargs)
        flow = self._core.renew(visit)
        try:
            return await AWAITING.run(site, flow, self._core.options.store_timeout)
        finally:
            self._tell(site, visit.key)

    async def invalidate(self, *args: Any, **kwargs: Any) -> None:
        """Remove one call's entry; see `CachedFunction.invalidate`."""
        if _switch.off:
            return
        site = self._site()
        key = self._visit(site, args, kwargs).key
        await site.store._execute(site.sql.bury(key))
        self._tell(site, key)

    async def peek(self, *args: Any, **kwargs: Any) -> CachedValue[R] | None:
        """Return what is stored for one call, or None; see `CachedFunction.peek`."""
        if _switch.off:
            return None
        site = self._site()
        visit = self._visit(site, args, kwargs)
        look = await site.store._execute(site.sql.look(visit.keys))
        return self._seen(self._core.interpret(visit, look))

    async def cache_clear(self) -> None:
        """Make every entry of the function a miss; see `CachedFunction.cache_clear`."""
        if _switch.off:
            return
        site = self._site()
        key = self._clear_key(site)
        await site.store._execute(site.sql.bump_function(key))
        self._tell(site, key)

    def _tell(self, site: Site, key: bytes) -> None:
        self._forget(site, key)
        if self._core.l1 is not None:
            announce(site, key)

    def using(self, conn: Any) -> AsyncInvalidator:
        """Return an object whose ``invalidate`` belongs to the caller's transaction.

        Args:
            conn: a ``psycopg.AsyncConnection``, or SQLAlchemy's wrapper of one.

        Raises:
            ConfigError: it is no psycopg 3 connection, or a blocking one.
        """
        site = self._site()
        inner = unwrap(conn, psycopg.AsyncConnection)
        return AsyncInvalidator(self, site, site.store.using(inner))

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: AsyncCachedFunction[Concatenate[Any, Q], S],
        instance: object,
        owner: type | None = None,
    ) -> AsyncCachedFunction[Q, S]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self._bind(instance, owner)


# -- all of them ---------------------------------------------------------------------------

_functions: list[Any] = []


def _made(function: Any) -> None:
    _functions.append(function)


def cached_functions() -> list[CachedFunction[..., Any] | AsyncCachedFunction[..., Any]]:
    """Return every cached function of this process, in the order of their definition."""
    return list(_functions)


__all__ = [
    "AsyncCachedFunction",
    "CacheInfo",
    "CachedFunction",
    "CachedValue",
    "cached_functions",
]
