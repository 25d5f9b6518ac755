"""What `cached` returns: thin sync and async classes over the flows of `FunctionCache`.

Helpers such as ``invalidate`` take the arguments that the function takes; at run time those named
by `ignore` may be left out. An object's methods come as views that put the object before the arguments.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import CodeType, MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Self,
    TypeAlias,
    TypeVar,
    overload,
)

import psycopg
from psycopg.pq import TransactionStatus

from ..._engine import schema as _schema
from ..._engine.caller import unwrap
from ..._observe import shown
from ..._ops.op import Flow, do
from ...aio import AsyncStore
from ...errors import PgkvError
from ...store import Store
from .._runtime import switch as _switch
from ..defaults import default_async_store, default_store
from .call import MISSING, StoreContext, context_of
from .flows import FunctionCache, breaker_open
from .invalidations import message, publish, subscribe
from .sql import ENTRY, FUNCTION

Binds: TypeAlias = Literal["instance", "class", "nothing"]  # what a lookup on an object binds

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
        stale: its ttl has passed; it is still served while a new one is computed.
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
        waits: calls that waited for another caller's computation.
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
    """What the sync and async classes share."""

    _default_store: Callable[[], Any]
    __wrapped__: Callable[..., Any]
    __name__: str
    __qualname__: str

    def __init__(
        self, core: FunctionCache, store: Store | AsyncStore | None, binds: Binds = "instance"
    ) -> None:
        self._core = core
        self._store: Any = store
        self._head: tuple[Any, ...] = ()
        self._binds = binds
        wrapped: Any = self
        functools.update_wrapper(wrapped, core.fn)
        _functions[next(_numbers)] = self

    def _bound_to(self, instance: object) -> Self:
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._head = (instance,)
        return view

    def _bind(self, instance: object, owner: type | None) -> Self:
        if self._binds == "class":
            return self._bound_to(owner)
        if instance is None or self._binds == "nothing":
            return self
        return self._bound_to(instance)

    if not TYPE_CHECKING:  # for type checkers it would mean that every attribute exists

        def __getattr__(self, name: str) -> Any:
            # `inspect.signature` asks for it; without one it shows the object among the parameters.
            if name == "__signature__" and self._head:
                return inspect.signature(MethodType(self._core.fn, self._head[0]))
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
            )

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

    def _context(self) -> tuple[Any, StoreContext]:
        """The store of a call, which the caller holds until the end of it, and its context."""
        store = self._store
        if store is None:
            store = self._default_store()
        core = self._core
        context = core.last_context()
        if context is None or context.ref() is not store:
            context = context_of(store)
            core.last_context = weakref.ref(context)
        if core.l1 is not None:
            subscribe(context, core.l1)
        return store, context

    def _key_of(self, context: StoreContext, args: Any, kwargs: Any) -> bytes:
        return self._core.bind(context, self._head + args, kwargs, lenient=True).key

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
        return CacheInfo(**{each.name: getattr(counts, each.name) for each in fields(CacheInfo)})

    # -- what helpers do, for sync and async

    def _refreshing(self, context: StoreContext, args: Any, kwargs: Any) -> Flow[R]:
        call = self._core.bind(context, self._head + args, kwargs)
        try:
            value: R = yield from self._core.renew(call)
            return value
        finally:
            if forget(context, call.key, self._core.name):
                publish(context, call.key)

    def _invalidating(self, context: StoreContext, args: Any, kwargs: Any) -> Flow[None]:
        key = self._key_of(context, args, kwargs)
        return invalidating(context, key, "invalidate", self._core.name)

    def _peeking(
        self, context: StoreContext, args: Any, kwargs: Any
    ) -> Flow[CachedValue[R] | None]:
        call = self._core.bind(context, self._head + args, kwargs, lenient=True)
        found = self._core.interpret(call, (yield from do(context.sql.read(call.keys))))
        return None if found is None else CachedValue(found.value, found.age, found.fresh <= 0)

    def _clearing(self, context: StoreContext) -> Flow[None]:
        key = context.sql.cache_key(FUNCTION, self._core.name)
        return invalidating(context, key, "bump_function", self._core.name)


class CachedFunction(_Base[P, R]):
    """A function whose results are cached; made by `cached`. Called like the function itself.

    ``invalidate``, ``peek``, ``cache_key`` and ``using(...)`` take the arguments that make the key:
    parameters named by ``ignore=`` are left out. Helpers raise when the store cannot be reached,
    whatever ``on_error`` says of calls. ``__wrapped__`` is the function itself.
    """

    _default_store = staticmethod(default_store)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        core = self._core
        if _switch.off:
            return core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        store, context = self._context()
        call = core.bind(context, self._head + args, kwargs)
        if core.l1 is not None and (value := core.from_l1(call)) is not MISSING:
            return value  # type: ignore[no-any-return]  # as above
        if context.breaker.allows() or core.options.on_error == "raise":
            op = context.sql.read(call.keys)
            try:
                read: Any = store._execute(op, core.options.store_timeout)
            except PgkvError as error:
                read = error
            else:
                context.breaker.succeeded()
                if (value := core.fresh(call, read)) is not MISSING:
                    return value  # type: ignore[no-any-return]  # as above
        else:
            read = breaker_open()
        flow = core.answer(call, read)
        return store._run(flow, core.options.store_timeout)  # type: ignore[no-any-return]  # as above

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function now and store what it returns; the old value is served meanwhile.

        Takes all arguments of the function. Fills that began before are discarded; of concurrent
        refreshes the one that began last is stored.
        """
        if _switch.off:
            return self._core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        store, context = self._context()
        flow = self._refreshing(context, args, kwargs)
        return store._run(flow, self._core.options.store_timeout)  # type: ignore[no-any-return]  # as above

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Remove one call's entry. When it returns, no later call sees an older value, and a
        computation that began before is discarded."""
        if not _switch.off:
            store, context = self._context()
            store._run(self._invalidating(context, args, kwargs))

    def peek(self, *args: Any, **kwargs: Any) -> CachedValue[R] | None:
        """Return what is stored for one call, or None. Calls nothing, counts nothing, and asks the
        store even where a first level has the value."""
        if _switch.off:
            return None
        store, context = self._context()
        return store._run(self._peeking(context, args, kwargs))  # type: ignore[no-any-return]  # as above

    def cache_clear(self) -> None:
        """Make every entry of the function a miss, at once and in constant time: its generation is
        raised, the rows themselves end by their ttl."""
        if not _switch.off:
            store, context = self._context()
            store._run(self._clearing(context))

    def using(self, conn: Any) -> Invalidator[P]:
        """Return an object whose ``invalidate`` belongs to the caller's transaction.

        Args:
            conn: a ``psycopg.Connection``, or Django's or SQLAlchemy's wrapper of one.

        Raises:
            ConfigError: it is no psycopg 3 connection, or an async one.
        """
        return Invalidator(self, unwrap(conn, psycopg.Connection))

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: CachedFunction[Concatenate[Any, Q], S], instance: object, owner: type | None = None
    ) -> CachedFunction[Q, S]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self._bind(instance, owner)


async def _awaited() -> None:
    """What `inspect` sees of an `AsyncCachedFunction` before Python 3.12."""


class AsyncCachedFunction(_Base[P, R]):
    """An ``async def`` whose results are cached; made by `cached`. Awaited like the function.

    As `CachedFunction`, with ``refresh``, ``invalidate``, ``peek`` and ``cache_clear`` awaited.
    """

    _default_store = staticmethod(default_async_store)

    def __init__(
        self, core: FunctionCache, store: Store | AsyncStore | None, binds: Binds = "instance"
    ) -> None:
        super().__init__(core, store, binds)
        # Frameworks ask whether to await what they were given.
        if sys.version_info >= (3, 12):
            inspect.markcoroutinefunction(self)
        else:
            self._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # gone in 3.12's stubs
            # ... by asyncio, and by inspect, which believes what has all of these.
            self.__code__: CodeType = _awaited.__code__
            self.__defaults__: None = None
            self.__kwdefaults__: None = None

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        core = self._core
        if _switch.off:
            return await core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        store, context = self._context()
        call = core.bind(context, self._head + args, kwargs)
        if core.l1 is not None and (value := core.from_l1(call)) is not MISSING:
            return value  # type: ignore[no-any-return]  # as above
        if context.breaker.allows() or core.options.on_error == "raise":
            op = context.sql.read(call.keys)
            try:
                read: Any = await store._execute(op, core.options.store_timeout)
            except PgkvError as error:
                read = error
            else:
                context.breaker.succeeded()
                if (value := core.fresh(call, read)) is not MISSING:
                    return value  # type: ignore[no-any-return]  # as above
        else:
            read = breaker_open()
        flow = core.answer(call, read)
        return await store._run(flow, core.options.store_timeout)  # type: ignore[no-any-return]  # as above

    async def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function now and store what it returns; see `CachedFunction.refresh`."""
        if _switch.off:
            return await self._core.fn(*self._head, *args, **kwargs)  # type: ignore[no-any-return]  # what the function returns
        store, context = self._context()
        flow = self._refreshing(context, args, kwargs)
        return await store._run(flow, self._core.options.store_timeout)  # type: ignore[no-any-return]  # as above

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Remove one call's entry; see `CachedFunction.invalidate`."""
        if not _switch.off:
            store, context = self._context()
            await store._run(self._invalidating(context, args, kwargs))

    async def peek(self, *args: Any, **kwargs: Any) -> CachedValue[R] | None:
        """Return what is stored for one call, or None; see `CachedFunction.peek`."""
        if _switch.off:
            return None
        store, context = self._context()
        return await store._run(self._peeking(context, args, kwargs))  # type: ignore[no-any-return]  # as above

    async def cache_clear(self) -> None:
        """Make every entry of the function a miss; see `CachedFunction.cache_clear`."""
        if not _switch.off:
            store, context = self._context()
            await store._run(self._clearing(context))

    def using(self, conn: Any) -> AsyncInvalidator[P]:
        """Return an object whose ``invalidate`` belongs to the caller's transaction: see
        `CachedFunction.using`; `conn` is async."""
        return AsyncInvalidator(self, unwrap(conn, psycopg.AsyncConnection))

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


# -- inside the caller's transaction ---------------------------------------------------------


class _Inside:
    """What `Invalidator` and `AsyncInvalidator` share."""

    def __init__(self, function: _Base[..., Any], conn: Any) -> None:
        self._function = function
        store, self._context = function._context()
        self._conn = conn
        store.using(conn)  # checks it

    @shown
    def __repr__(self) -> str:
        return f"of {self._function.name}"

    def _steps(self, args: Any, kwargs: Any) -> list[tuple[Any, Flow[None]]]:
        key = self._function._key_of(self._context, args, kwargs)
        return steps_inside(self._context, key, "invalidate", self._function.name, self._conn)


class Invalidator(_Inside, Generic[P]):
    """``load.using(conn)``: invalidates inside the caller's transaction.

    Committed with the data or rolled back with it. From this moment to the end of the transaction
    the key's fills are held back; what was stored before remains a hit, for this transaction too,
    because calls read on the store's own connection. Invalidate last, and several keys in a fixed
    order: these are row locks, and two transactions that take them crosswise deadlock.
    """

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Remove one call's entry when the transaction commits."""
        for store, flow in () if _switch.off else self._steps(args, kwargs):
            store._run(flow)


class AsyncInvalidator(_Inside, Generic[P]):
    """`Invalidator`, awaited."""

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Remove one call's entry when the transaction commits."""
        for store, flow in () if _switch.off else self._steps(args, kwargs):
            await store._run(flow)


def invalidating(
    context: StoreContext, key: bytes, how: str, name: str | None, conn: Any = None
) -> Flow[None]:
    """Invalidate an entry or raise a generation by the statement called `how`, and have the first
    levels of that function, or of all, forget what depends on it. `conn` has the caller's
    transaction in which this runs, if it does."""
    yield from do(getattr(context.sql, how)(key))
    if forget(context, key, name, conn):
        if conn is None:
            publish(context, key)
        else:
            yield from do(message(context, key))


def steps_inside(
    context: StoreContext, key: bytes, how: str, name: str | None, conn: Any
) -> list[tuple[Any, Flow[None]]]:
    """What `invalidating` takes, on which store: in the caller's transaction where `conn` has one."""
    flow = invalidating(context, key, how, name, conn)
    if conn is None:
        return [(context.store, flow)]
    return [(context.store, _ensuring_table(context)), (context.store.using(conn), flow)]


def _ensuring_table(context: StoreContext) -> Flow[None]:
    """Make the table before the caller's transaction needs it: a missing one would fail that."""
    if not context.table_known and context.sql.table.auto_create:
        yield from _schema.ensure(context.sql.table)
    context.table_known = True


# -- all of them ---------------------------------------------------------------------------

_functions: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def cached_functions() -> list[CachedFunction[..., Any] | AsyncCachedFunction[..., Any]]:
    """Return every cached function of this process, in the order of their definition."""
    return [function for _, function in sorted(_functions.items())]


def forget(context: StoreContext, key: bytes, name: str | None = None, conn: Any = None) -> bool:
    """Forget what depends on a key in the first levels of this process, and tell whether there are
    any. Before the transaction of `conn` has ended, nothing of that is kept again."""
    levels = {
        each._core.l1
        for each in tuple(_functions.values())
        if each._core.l1 is not None and name in (None, each._core.name)
    }
    for level in levels:
        if conn is None:
            level.drop(context.scope, key)
        else:
            level.hold(context.scope, key, functools.partial(_may_be_open, weakref.ref(conn)))
    return bool(levels)


def _may_be_open(ref: Callable[[], Any]) -> bool:
    """Whether a connection's transaction may still be open. One transaction is not told from the
    next; then a first level does without the entry for longer."""
    conn = ref()
    return conn is not None and conn.pgconn.transaction_status in _OPEN


_OPEN = (TransactionStatus.ACTIVE, TransactionStatus.INTRANS, TransactionStatus.INERROR)
