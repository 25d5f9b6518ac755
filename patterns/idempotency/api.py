"""Idempotency keys, sync and async: work runs once for a key, and retries get the first outcome.

Two thin classes over the flows in `flows`. What Redis cannot do: the record of the outcome commits with
the effects, in one transaction. Middleware is in `pgkv.patterns.web`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, cast, get_type_hints

import psycopg

from ..._engine._async.transaction import AsyncBoundChannel, AsyncCallerChannel
from ..._engine._sync.transaction import BoundChannel, CallerChannel
from ..._engine.caller import check_inside
from ..._observe import shown
from ..._ops.op import do
from ..._ops.serialize import Serializer
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Seconds
from ...errors import ConfigError, PgkvError
from ...store import Store
from .._runtime.checks import OfArguments, require
from .._runtime.runtimes import AsyncRuntime, SyncRuntime
from ..defaults import default_async_store, default_store
from .flows import AttemptState, IdempotencyFlows, Raw
from .sql import Record

T = TypeVar("T")
U = TypeVar("U")
F = TypeVar("F", bound=Callable[..., Any])
DAY = 86400.0


@dataclass(frozen=True, slots=True)
class IdempotencyRecord(Generic[T]):
    """What the table knows of a key, as one read saw it.

    Attributes:
        status: ``"done"``; ``"running"``: an attempt has the lease; ``"abandoned"``: its lease ended
            without an outcome, and the next attempt with the same payload runs.
        result: of the first attempt; None where there is none.
        token: the last attempt's.
        created_at: when that began (UTC, the server's clock).
        expires_at: when the key is new again.
    """

    status: Literal["done", "running", "abandoned"]
    result: T | None
    token: int
    created_at: datetime
    expires_at: datetime


class Attempt(AttemptState[T]):
    """One attempt at the work of a key, made by `Idempotency.once`."""

    def complete(self, result: T | str, conn: Any = None) -> None:
        """Record the outcome now, rather than at the block's end.

        With `conn` it commits with the caller's transaction, which makes an attempt with a lease as exact
        as one inside a transaction.

        Args:
            result: what replays get.
            conn: a psycopg connection (or Django's, SQLAlchemy's) to the store's database, in the
                transaction of the effects.

        Raises:
            LeaseLostError: another attempt took the key over: roll back.
            InvalidValueError: the result is larger than the store's ``max_value_size``.
            TransactionError: it was completed already, or `conn` is not in a transaction.
        """
        self._complete(result, conn, psycopg.Connection, CallerChannel)


class AsyncAttempt(AttemptState[T]):
    """One attempt at the work of a key, for asyncio, made by `AsyncIdempotency.once`: :class:`Attempt`,
    awaited."""

    async def complete(self, result: T | str, conn: Any = None) -> None:
        """Record the outcome now, rather than at the block's end; see `Attempt.complete`."""
        await self._complete(result, conn, psycopg.AsyncConnection, AsyncCallerChannel)


class _Idempotency(Generic[T]):
    """What `Idempotency` and `AsyncIdempotency` share."""

    _store: Any
    _codec: Any = Raw()
    _runtime: Any = None  # None inside a caller's transaction
    _conn: Any = None  # the caller's
    _pooled: Any = None  # the one that `using` was called on

    def _begin(self, store: Any, ttl: Seconds, lease: Seconds, runtime: Any) -> None:
        self._flows = IdempotencyFlows(store._config, store._sql.prefix_bytes, ttl, lease)
        self._store = store
        self._settings = ttl, lease, runtime
        # Of a sharded store: the attributes in each slot, made when first needed.
        self._in_slots: dict[int, dict[str, Any]] = {}
        if not isinstance(store._bare, BoundChannel | AsyncBoundChannel):
            self._runtime = runtime(store, "")
        store._bare.watch(self._flows.sql)

    @shown
    def __repr__(self) -> str:
        flows = self._flows
        return f"{flows.table.name!r} ttl={flows.ttl:g} lease={flows.lease:g}"

    __reduce__ = refuse_pickle

    def typed(self, type_: type[U]) -> Any:
        """Return a view whose results are values of that type, written as JSON.

        Args:
            type_: as of `Store.typed`. A block that ends without a result leaves None.
        """
        return self._view(Serializer(type_, "json"))

    def _view(self, codec: Any) -> Any:
        view = type(self).__new__(type(self))
        view.__dict__.update(self.__dict__, _codec=codec)
        return view

    def _of(self, key: str, scope: str) -> Self:
        """This, on a sharded store that of the key's slot."""
        shards = self._flows.shards
        if shards is None or shards.own is not None:
            return self
        slot = shards.of(self._flows.key(key, scope))
        if slot not in self._in_slots:
            part: _Idempotency[Any] = _Idempotency()
            part._begin(self._store._in_slot(slot), *self._settings)
            self._in_slots[slot] = part.__dict__
        view: Self = self._view(self._codec)
        view.__dict__.update(self._in_slots[slot])
        return view

    def using(self, conn: Any) -> Any:
        """Return this inside the caller's own connection and transaction: `once` then holds the key by
        its uncommitted row, and the record commits with the effects.

        Args:
            conn: a psycopg connection, or Django's or SQLAlchemy's wrapper of one.
        """
        view = self._view(self._codec)
        view._store = self._store.using(conn)
        view._runtime, view._conn, view._pooled = None, view._store._bare._conn, self
        return view

    def _check_inside(self) -> None:
        if self._conn is not None:
            check_inside(self._conn, "using(conn).once()")

    def _record(self, found: Record | None) -> IdempotencyRecord[T] | None:
        if found is None:
            return None
        raw, status = found.result, "done"
        if raw is None:
            status = "running" if found.leased_until > found.read_at else "abandoned"
        empty = raw is None or (not raw and not isinstance(self._codec, Raw))
        result = None if empty else self._codec.decode("", raw)
        return IdempotencyRecord(
            cast("Any", status), result, found.token, found.created_at, found.expires_at
        )


class Idempotency(_Idempotency[T]):
    """Runs work once for a key; retries get the first outcome. For threads.

    ::

        idem = pgkv.Idempotency(store)
        with conn.transaction(), idem.using(conn).once(order_id, fingerprint=body) as attempt:
            if not attempt.is_replay:
                attempt.result = pay(conn)

    **Inside a transaction** (``using(conn)``, or a store of ``store.transaction()``) the uncommitted row
    is the lock: a duplicate waits for that transaction's end, and the record commits with the effects or
    not at all. Use one key in a transaction, or keys in sorted order: two transactions that take two keys
    crosswise deadlock, and one of them is rolled back. **Elsewhere** the key is held by a lease that is
    renewed in the background: after a crash the next attempt begins when it ends, with a larger token.

    **Guaranteed:** no two attempts of a key complete, and a replay gets what the one that did has
    stored. **Not guaranteed:** that an effect outside the transaction happens once. A process can die, or
    be paused past its lease, between the effect and the record: give the effect the key or
    ``attempt.token``, or call ``attempt.complete(result, conn)`` in its transaction.

    Its table is ``<table_name>_idempotency``, always logged. It is created when first needed.

    Args:
        store: the store. Inside ``store.transaction()`` pass that transaction's store.
        ttl: seconds after its completion for which a key is remembered; then it is new.
        lease: seconds for which an attempt that died keeps its key.

    Raises:
        ConfigError: `store` is not a `Store`.
        InvalidValueError: `lease` is below 1 second, or `ttl` shorter than it.
    """

    def __init__(
        self: Idempotency[bytes], store: Store, *, ttl: Seconds = DAY, lease: Seconds = 30
    ) -> None:
        require(store, Store, "Idempotency", "AsyncIdempotency")
        self._begin(store, ttl, lease, SyncRuntime)

    if TYPE_CHECKING:  # what the shared methods return here

        def typed(self, type_: type[U]) -> Idempotency[U]: ...
        def using(self, conn: Any) -> Idempotency[T]: ...

    def once(
        self, key: str, *, fingerprint: bytes | str = b"", scope: str = "", wait: Seconds = 0
    ) -> AbstractContextManager[Attempt[T]]:
        """Return a block that runs the work of a key, to be entered with ``with``.

        A block that raises takes everything back: in a transaction its effects, else the claim, so that
        the next attempt begins at once. A block that ends without a result stores an empty one.

        Args:
            key: what names the request: 1 to 512 bytes of UTF-8.
            fingerprint: the request's content. A later attempt with another one is refused.
            scope: whose key it is, such as the user; keys of different scopes are different.
            wait: seconds to wait while another attempt is under way.

        Raises:
            InProgressError: (on entering) another attempt is under way; `retry_after` is the rest of its
                lease.
            KeyReusedError: (on entering) the key was used with another fingerprint.
            LeaseLostError: (on leaving) another attempt took the key over meanwhile.
            TransactionError: (on entering) the connection of `using` is not in a transaction.
            InvalidKeyError: the key or scope is too long, or holds NUL or U+001F.
            InvalidValueError: `wait` is negative.
        """
        here = self._of(key, scope)
        return here._once(Attempt(here._flows, here._codec, key, fingerprint, scope, wait))

    @contextlib.contextmanager
    def _once(self, attempt: Attempt[T]) -> Generator[Attempt[T]]:
        if (runtime := self._runtime) is None:
            self._check_inside()
            if self._pooled is not None and not self._flows.ready:
                self._pooled.create_table()
            with self._store._bare.transaction() as channel:
                timeout = self._flows.timeout + attempt._wait
                channel.run(attempt._claim_inside(channel), timeout)
                yield attempt
                if not attempt.is_replay and not attempt._completed:
                    attempt.complete(attempt._value)
            return
        runtime.channel.run(attempt._claim(runtime))
        try:
            yield attempt
        except BaseException:
            if end := attempt._ending(failed=True):
                with contextlib.suppress(PgkvError):
                    runtime.clean_up(*end)
            raise
        else:
            if end := attempt._ending(failed=False):
                runtime.clean_up(*end)
        finally:
            attempt._forget()

    def get(self, key: str, *, scope: str = "") -> IdempotencyRecord[T] | None:
        """Return what is known of a key, or None; it claims nothing.

        Args:
            key: the key.
            scope: its scope.
        """
        return self._record(self._store._run(do(self._flows.sql.get(self._flows.key(key, scope)))))

    def forget(self, key: str, *, scope: str = "") -> bool:
        """Make a key new and drop its result; True when it was known. An attempt under way cannot be
        completed any more: its block raises `LeaseLostError`.

        Args:
            key: the key.
            scope: its scope.
        """
        return self._store._run(do(self._flows.sql.forget(self._flows.key(key, scope))))  # type: ignore[no-any-return]  # of an Op

    def purge(self, limit: int = 1000) -> int:
        """Delete up to `limit` expired rows now, and return how many. Only needed where the store's
        ``ttl_cleanup_strategy`` is MANUAL.

        Args:
            limit: rows.
        """
        return self._store._run(self._flows.purge(limit))  # type: ignore[no-any-return]  # of a flow

    def create_table(self) -> None:
        """Create the table if it is missing. Operations do that too, but not in the transaction of
        ``store.transaction()``."""
        self._store._run(self._flows.create_table())


class AsyncIdempotency(_Idempotency[T]):
    """Runs work once for a key, for asyncio: :class:`Idempotency`, awaited."""

    def __init__(
        self: AsyncIdempotency[bytes], store: AsyncStore, *, ttl: Seconds = DAY, lease: Seconds = 30
    ) -> None:
        require(store, AsyncStore, "AsyncIdempotency", "Idempotency")
        self._begin(store, ttl, lease, AsyncRuntime)

    if TYPE_CHECKING:  # what the shared methods return here

        def typed(self, type_: type[U]) -> AsyncIdempotency[U]: ...
        def using(self, conn: Any) -> AsyncIdempotency[T]: ...

    def once(
        self, key: str, *, fingerprint: bytes | str = b"", scope: str = "", wait: Seconds = 0
    ) -> AbstractAsyncContextManager[AsyncAttempt[T]]:
        """Return a block that runs the work of a key, to be entered with ``async with``; see
        `Idempotency.once`."""
        here = self._of(key, scope)
        return here._once(AsyncAttempt(here._flows, here._codec, key, fingerprint, scope, wait))

    @contextlib.asynccontextmanager
    async def _once(self, attempt: AsyncAttempt[T]) -> AsyncGenerator[AsyncAttempt[T]]:
        if (runtime := self._runtime) is None:
            self._check_inside()
            if self._pooled is not None and not self._flows.ready:
                await self._pooled.create_table()
            async with self._store._bare.transaction() as channel:
                timeout = self._flows.timeout + attempt._wait
                await channel.run(attempt._claim_inside(channel), timeout)
                yield attempt
                if not attempt.is_replay and not attempt._completed:
                    await attempt.complete(attempt._value)
            return
        await runtime.channel.run(attempt._claim(runtime))
        try:
            yield attempt
        except GeneratorExit:
            raise
        except BaseException:
            if end := attempt._ending(failed=True):
                with contextlib.suppress(PgkvError, TimeoutError):
                    await runtime.clean_up(*end)
            raise
        else:
            if end := attempt._ending(failed=False):
                await runtime.clean_up(*end)
        finally:
            attempt._forget()

    async def get(self, key: str, *, scope: str = "") -> IdempotencyRecord[T] | None:
        """Return what is known of a key, or None; see `Idempotency.get`."""
        op = self._flows.sql.get(self._flows.key(key, scope))
        return self._record(await self._store._run(do(op)))

    async def forget(self, key: str, *, scope: str = "") -> bool:
        """Make a key new and drop its result; see `Idempotency.forget`."""
        op = self._flows.sql.forget(self._flows.key(key, scope))
        return await self._store._run(do(op))  # type: ignore[no-any-return]  # of an Op

    async def purge(self, limit: int = 1000) -> int:
        """Delete up to `limit` expired rows now, and return how many."""
        return await self._store._run(self._flows.purge(limit))  # type: ignore[no-any-return]  # of a flow

    async def create_table(self) -> None:
        """Create the table if it is missing."""
        await self._store._run(self._flows.create_table())


def idempotent(
    key: OfArguments[Any],
    *,
    store: Store | AsyncStore | None = None,
    conn: OfArguments[Any] | None = None,
    fingerprint: OfArguments[bytes | str] | None = None,
    scope: str | None = None,
    wait: Seconds = 0,
    ttl: Seconds = DAY,
    lease: Seconds = 30,
) -> Callable[[F], F]:
    """Run the decorated function, plain or ``async``, once for a key; later calls return the first one's
    result, as JSON by the function's return annotation.

    ::

        @pgkv.idempotent(key=lambda conn, order: order.id, conn=lambda conn, order: conn, store=store)
        def pay(conn, order) -> Receipt: ...

    Args:
        key: a function of the call's arguments that returns the key.
        store: where the keys are, async for an async function; without it, the default store.
        conn: a function of the arguments that returns the connection of the caller's transaction;
            without it the key is held by a lease. See `Idempotency`.
        fingerprint: a function of the arguments that returns what a retry must repeat.
        scope: by default the function's module and name.
        wait: seconds to wait while another call of the same key runs.
        ttl: seconds for which a result is remembered.
        lease: seconds for which a call that died keeps its key.

    Raises:
        ConfigError: `key` is no function, or the store is async and the function is not, or the reverse.
        InProgressError: (of the function) another call of the same key runs.
        KeyReusedError: (of the function) the key was used with another fingerprint.
        TypeError: it decorates a generator, whose body runs after the call.
    """
    if not callable(key):
        raise ConfigError("idempotent() needs key=, a function of the arguments")

    def decorate(fn: F) -> F:
        if isinstance(fn, staticmethod | classmethod):
            return cast("F", type(fn)(decorate(fn.__func__)))
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(
                "idempotent() cannot decorate a generator: its body runs after the call"
            )
        is_async = inspect.iscoroutinefunction(fn)
        kind: Any = AsyncIdempotency if is_async else Idempotency
        default: Callable[[], Any] = default_async_store if is_async else default_store
        own = f"{fn.__module__}.{fn.__qualname__}" if scope is None else scope

        @functools.lru_cache(maxsize=8)
        def keys_of(chosen: Any) -> Any:
            returned = get_type_hints(fn).get("return", Any)
            return kind(chosen, ttl=ttl, lease=lease).typed(returned)

        if store is not None:
            require(store, AsyncStore if is_async else Store, "idempotent()", "the other kind")

        def once(*args: Any, **kwargs: Any) -> Any:
            keys = keys_of(default() if store is None else store)
            if conn is not None:
                keys = keys.using(conn(*args, **kwargs))
            content = b"" if fingerprint is None else fingerprint(*args, **kwargs)
            named = str(key(*args, **kwargs))
            return keys.once(named, fingerprint=content, scope=own, wait=wait)

        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            with once(*args, **kwargs) as attempt:
                if not attempt.is_replay:
                    attempt.result = fn(*args, **kwargs)
                return attempt.result

        @functools.wraps(fn)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            async with once(*args, **kwargs) as attempt:
                if not attempt.is_replay:
                    attempt.result = await fn(*args, **kwargs)
                return attempt.result

        return cast("F", run_async if is_async else run)

    return decorate
