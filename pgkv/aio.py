"""`AsyncStore`: `Store` for asyncio, the same methods awaited.

It mirrors `store`: the same statements and flows, awaited. Docstrings here say what a method does;
its arguments, results and exceptions are described in `Store`. A test compares names and signatures.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from operator import attrgetter
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, cast, overload
from urllib.parse import quote

import psycopg
from psycopg import IsolationLevel
from psycopg_pool import AsyncConnectionPool

from ._engine import evict as _evict
from ._engine import flows as _flows
from ._engine import retry as _retry
from ._engine import schema as _schema
from ._engine import sweep as _sweep
from ._engine._async.channel import AsyncPoolChannel
from ._engine._async.coalesce import AsyncChannel, CoalescingChannel
from ._engine._async.pool import AsyncCallerPool, AsyncStorePool
from ._engine._async.transaction import AsyncCallerChannel
from ._engine.caller import unwrap
from ._engine.unopened import Unawaited
from ._ops.codec import Value, seconds, whole
from ._settings import (
    StoreBase,
    Target,
    check_pool,
    check_transaction,
    config_of,
    config_of_pool,
    options_of,
    reach_timeout,
    require_bound,
    scan_options,
    text_of,
)
from ._sql import Statements
from ._sql.point import decimal, negated
from .config import EMBEDDED_SCHEME, Config, Options, Seconds, require_config
from .errors import NotFoundError
from .types import (
    AtLeast,
    AtMost,
    CasResult,
    Entry,
    ExpiryOptions,
    IncrementResult,
    KeyValue,
    ScanOptions,
    ScanRange,
    Stats,
)

if TYPE_CHECKING:
    from ._ops.serialize import CodecName
    from ._shards.store import AsyncShardedStore
    from ._watch.api import AsyncWatch
    from .pipeline import AsyncPipeline
    from .typed import AsyncTypedStore

T = TypeVar("T")


@cache  # an import inside of a call costs each call a microsecond
def _pipeline() -> type[AsyncPipeline]:
    from .pipeline import AsyncPipeline

    return AsyncPipeline


class Opening(Unawaited[T]):
    """An object to await or enter: ``x = await store.transaction()`` or ``async with``.

    The awaited object can also be entered; it then ends with the ``async with``.

    Args:
        manager: opens and closes it.
        call: the call that created it, for messages.
    """

    def __init__(self, manager: contextlib.AbstractAsyncContextManager[T], call: str) -> None:
        super().__init__(call, f"`await {call}` or `async with {call} as ...`")
        self._manager: Any = manager

    async def _open(self) -> T:
        opened: T = await self._manager.__aenter__()
        if isinstance(opened, AsyncStore):
            opened._ending = self._manager
        return opened

    async def __aenter__(self) -> T:
        self._use()
        entered: T = await self._manager.__aenter__()
        return entered

    async def __aexit__(self, *error: object) -> bool | None:
        return bool(await self._manager.__aexit__(*error))


class AsyncStore(StoreBase):
    """A key-value store in one PostgreSQL table, for asyncio: :class:`Store`, awaited.

    It belongs to the event loop of its first operation and serves any number of tasks with at most
    ``pool_max_size`` connections; more wait in order, up to ``pool_timeout``. Cancelling a task is
    safe at any point: the statement is cancelled in the background and its connection closed.

    ``async with AsyncStore.connect(dsn) as store`` or ``store = await AsyncStore.connect(dsn)``.
    On Windows a selector event loop is required.
    """

    _bare: AsyncChannel
    _channel: AsyncChannel
    _ending: Any = None

    def __init__(self, config: Config) -> None:
        require_config(config, "AsyncStore")
        target = Target(config)
        channel = AsyncPoolChannel(config, AsyncStorePool(config, target.conninfo))
        channel.on_close(target.close)
        entry = CoalescingChannel(channel) if config.coalesce else channel
        self._bind(config, target, Statements.of(config), entry)

    def _bind(
        self,
        config: Config,
        target: Target,
        sql: Statements,
        channel: AsyncChannel,
        *,
        owner: bool = True,
    ) -> None:
        super()._bind(config, target, sql, channel, owner=owner)
        self._execute, self._run = channel.execute, channel.run  # for the patterns
        if config.notify:
            from ._watch.hints import AsyncNotingChannel

            self._channel = cast("AsyncChannel", AsyncNotingChannel(channel, config))

    # -- beginning and end

    @classmethod
    def connect(cls, dsn: str | None = None, **config: Unpack[Options]) -> Opening[Self]:
        """Connect and create the table if it is missing, or raise within ``connect_timeout``. See
        `Store.connect`."""
        return cls._opening("connect", dsn, config)

    @classmethod
    def _opening(cls, call: str, dsn: str | None, config: Options) -> Opening[Self]:
        return Opening(cls._connected(dsn, config), f"{cls.__name__}.{call}(...)")

    @classmethod
    @contextlib.asynccontextmanager
    async def _connected(cls, dsn: str | None, config: Options) -> AsyncIterator[Self]:
        store = cls(config_of(dsn, config))
        try:
            await asyncio.to_thread(store._target.dsn)  # an embedded server starts in its own time
            await store._channel.run(_flows.reach(store._sql), reach_timeout(store._config))
            if store._config.auto_create_table:
                await store.create_table()
            else:
                await store.exists("-")
            yield store
        except BaseException:
            await store.close()
            raise
        await store.close()

    @classmethod
    def from_pool(
        cls, pool: AsyncConnectionPool[Any], *, dsn: str | None = None, **config: Unpack[Options]
    ) -> Self:
        """Create a store on your own psycopg_pool. Each operation checks out one connection. See
        `Store.from_pool`."""
        check_pool(pool, AsyncConnectionPool)
        settings = config_of_pool(pool, dsn, options_of(config))
        store = cls.__new__(cls)
        channel = AsyncPoolChannel(settings, AsyncCallerPool(pool, settings))
        store._bind(settings, Target(settings, dsn), Statements.of(settings), channel)
        return store

    @classmethod
    def embedded(
        cls, path: str | os.PathLike[str] | None = None, **config: Unpack[Options]
    ) -> Opening[Self]:
        """Open a store on an embedded PostgreSQL server, which is started if it is not running. See
        `Store.embedded`."""
        where = "/" if path is None else quote(str(Path(path).absolute()))
        return cls._opening("embedded", EMBEDDED_SCHEME + where, config)

    @classmethod
    def sharded(
        cls,
        dsns: Sequence[str] | None = None,
        *,
        slots: int | None = None,
        placement: Literal["auto", "servers", "citus"] = "auto",
        **config: Unpack[Options],
    ) -> Opening[AsyncShardedStore]:
        """Connect to several servers as one store; see `Store.sharded`."""
        from ._shards.store import sharded_async

        return sharded_async(dsns, slots, placement, config)

    async def close(self) -> None:
        """Close every connection. The store cannot be used afterwards. Views (`namespace`, `table`,
        `using`, `transaction`) share their store's connections and close nothing."""
        if self._owner:
            # If the caller is cancelled, closing goes on in the background.
            closing = asyncio.get_running_loop().create_task(self._channel.close())
            _closing.add(closing)
            closing.add_done_callback(_closing.discard)
            await asyncio.shield(closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> bool | None:
        if self._ending is not None:
            ending, self._ending = self._ending, None
            return bool(await ending.__aexit__(*error))
        await self.close()
        return False

    # -- basic

    @overload
    async def get(self, key: str) -> bytes | None: ...
    @overload
    async def get(self, key: str, default: T) -> bytes | T: ...
    async def get(self, key: str, default: Any = None) -> Any:
        """Return the value, or `default` when there is no such key."""
        sql = self._sql
        value = await self._channel.call(sql.get_statement, (sql.key(key),))
        return default if value is None else value

    async def get_or_raise(self, key: str) -> bytes:
        """Return the value; see `Store.get_or_raise`."""
        sql = self._sql
        value = await self._channel.call(sql.get_statement, (sql.key(key),))
        if value is None:
            raise NotFoundError(f"no such key: {key!r}")
        return value

    async def get_string(self, key: str) -> str | None:
        """Return the value as text, or None when there is no such key. See `Store.get_string`."""
        sql = self._sql
        value = await self._channel.call(sql.get_statement, (sql.key(key),))
        return None if value is None else text_of(key, value)

    async def get_entry(self, key: str) -> Entry | None:
        """Return the value with its version, expiry and times; None when there is no such key."""
        return await self._channel.execute(self._sql.get_entry(key))

    @overload
    async def set(self, key: str, value: Value, **expiry: Unpack[ExpiryOptions]) -> int: ...
    @overload
    async def set(
        self, key: str, value: Value, *, if_version: int | None, **expiry: Unpack[ExpiryOptions]
    ) -> int | None: ...
    async def set(
        self,
        key: str,
        value: Value,
        *,
        ttl: Seconds | None = None,
        expires_at: datetime | None = None,
        keep_ttl: bool = False,
        if_version: int | None = None,
    ) -> int | None:
        """Write the value. Without a ttl an earlier one is cleared; see `Store.set`."""
        sql = self._sql
        if ttl is None and expires_at is None and not keep_ttl and if_version is None:
            return await self._channel.call(sql.set_statement, sql.pair(key, value))
        return await self._channel.execute(
            sql.set(key, value, ttl, expires_at, keep_ttl, if_version)
        )

    async def set_ex(self, key: str, value: Value, ttl: Seconds) -> int:
        """Write the value with a ttl in seconds; return the new version."""
        return await self.set(key, value, ttl=ttl)

    async def set_at(self, key: str, value: Value, expires_at: datetime) -> int:
        """Write the value with a moment at which it ends; return the new version."""
        return await self.set(key, value, expires_at=expires_at)

    async def set_nx(self, key: str, value: Value, *, ttl: Seconds | None = None) -> bool:
        """Write the value if there is no such key; True if it was written. Of concurrent callers
        exactly one writes it."""
        return await self._channel.execute(self._sql.set_nx(key, value, ttl))

    async def set_nx_ex(self, key: str, value: Value, ttl: Seconds) -> bool:
        """Write the value with a ttl in seconds if there is no such key; True if it was written."""
        return await self._channel.execute(self._sql.set_nx(key, value, ttl))

    async def set_xx(self, key: str, value: Value, *, ttl: Seconds | None = None) -> bool:
        """Write the value if the key exists; True if it was written."""
        return await self._channel.execute(self._sql.set_xx(key, value, ttl))

    async def delete(self, key: str, *, if_version: int | None = None) -> bool:
        """Remove the key; with `if_version` only that version of it. True if it was there."""
        if if_version is None:
            sql = self._sql
            return await self._channel.call(sql.delete_statement, (sql.key(key),))
        return await self._channel.execute(self._sql.delete(key, if_version))

    async def exists(self, key: str) -> bool:
        """Tell whether the key exists."""
        sql = self._sql
        return await self._channel.call(sql.exists_statement, (sql.key(key),))

    async def get_and_touch(self, key: str, ttl: Seconds) -> bytes | None:
        """Return the value and give it a new ttl in seconds, in one step; None when there is no
        such key."""
        return await self._channel.execute(self._sql.get_and_touch(key, ttl))

    # -- batch

    async def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return the values of those keys that exist, read in one snapshot."""
        op = self._sql.get_many(keys)
        return {} if op is None else await self._channel.execute(op)

    async def set_many(
        self,
        items: Mapping[str, Value] | Iterable[tuple[str, Value]],
        *,
        ttl: Seconds | None = None,
    ) -> int:
        """Write all pairs or none, any number of them. Of a repeated key the last pair counts. See
        `Store.set_many`."""
        count, ops = self._sql.set_many(items, ttl)
        return await self._channel.run(_flows.written(count, ops))

    async def load(
        self,
        items: Iterable[tuple[str, Value] | tuple[str, Value, Seconds | None]],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Write many keys by COPY, in transactions of 20,000, over a connection of its own. See
        `Store.load`. A thread reads `items` and calls `progress`; cancelled, it stops after the
        transaction under way."""
        from ._engine.load import load

        conninfo, stop = self._conninfo(), Event()
        if self._config.auto_create_table:
            await self.create_table()
        try:
            return await asyncio.to_thread(load, self._sql, conninfo, items, progress, stop)
        finally:
            stop.set()
            if self._config.notify:
                cast("Any", self._channel).tell_all()

    async def delete_many(self, keys: Iterable[str]) -> int:
        """Remove all the keys or none; return how many were there."""
        return sum(await self._channel.run(_flows.all_of(self._sql.delete_many(keys))))

    async def increment_many(
        self, deltas: Mapping[str, int], *, ttl: Seconds | None = None
    ) -> dict[str, int]:
        """Add to many integers, all or none; see `increment`. Return the sums."""
        return await self._channel.run(_flows.increment_many(self._sql, deltas, ttl))

    async def exists_many(self, keys: Iterable[str]) -> builtin_set[str]:
        """Return those of the keys that exist."""
        op = self._sql.exists_many(keys)
        return set() if op is None else await self._channel.execute(op)

    async def expire_many(self, keys: Iterable[str], ttl: Seconds) -> int:
        """Give all the keys a new ttl in seconds, or none; return how many exist."""
        return sum(await self._channel.run(_flows.all_of(self._sql.expire_many(keys, ttl))))

    # -- atomic

    @overload
    async def increment(self, key: str, delta: int = 1, *, ttl: Seconds | None = None) -> int: ...
    @overload
    async def increment(
        self, key: str, delta: int = 1, *, only_if_exists: Literal[True]
    ) -> int | None: ...
    @overload
    async def increment(
        self, key: str, delta: int = 1, **bounds: Unpack[AtLeast]
    ) -> IncrementResult: ...
    @overload
    async def increment(
        self, key: str, delta: int = 1, **bounds: Unpack[AtMost]
    ) -> IncrementResult: ...
    async def increment(
        self,
        key: str,
        delta: int = 1,
        *,
        ttl: Seconds | None = None,
        only_if_exists: bool = False,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> Any:
        """Add to an integer and return the sum. An absent key counts as 0. See
        `Store.increment`."""
        if ttl is None and minimum is None and maximum is None and only_if_exists is False:
            sql = self._sql
            return await self._channel.call(sql.increment_statement, (sql.key(key), decimal(delta)))
        return await self._channel.execute(
            self._sql.increment(key, delta, ttl, only_if_exists, minimum, maximum)
        )

    async def decrement(self, key: str, delta: int = 1, *, ttl: Seconds | None = None) -> int:
        """Subtract from an integer and return the difference; see `increment`."""
        left: int = await self._channel.execute(self._sql.increment(key, negated(delta), ttl))
        return left

    async def append(self, key: str, value: Value, *, ttl: Seconds | None = None) -> int:
        """Add bytes to the end of the value and return its new length. See `Store.append`."""
        return await self._channel.execute(self._sql.append(key, value, ttl))

    async def compare_and_swap(
        self,
        key: str,
        expected: Value | None,
        new: Value,
        *,
        ttl: Seconds | None = None,
    ) -> CasResult:
        """Write `new` if the value is `expected`; ``expected=None``: if there is no such key. See
        `Store.compare_and_swap`."""
        if self._sql.transforms is not None:
            return await self._channel.run(_flows.swap(self._sql, key, expected, new, ttl))
        return await self._channel.execute(self._sql.compare_and_swap(key, expected, new, ttl))

    async def compare_and_delete(self, key: str, expected: Value) -> bool:
        """Remove the key if its value is `expected`; True if it was removed."""
        if self._sql.transforms is not None:
            found = await self._channel.run(_flows.take(self._sql, key, expected))
            return found is not None
        return await self._channel.execute(self._sql.compare_and_delete(key, expected))

    async def get_and_set(
        self, key: str, value: Value, *, ttl: Seconds | None = None
    ) -> bytes | None:
        """Write the value and return the previous one, or None. Each value is returned to exactly
        one caller."""
        return await self._channel.execute(self._sql.get_and_set(key, value, ttl))

    async def get_and_delete(self, key: str) -> bytes | None:
        """Remove the key and return its value, None when there was no such key."""
        if self._sql.transforms is not None:
            return await self._channel.run(_flows.take(self._sql, key))
        return await self._channel.execute(self._sql.get_and_delete(key))

    async def update(
        self,
        key: str,
        fn: Callable[[bytes | None], Value | Awaitable[Value]],
        *,
        ttl: Seconds | None = None,
        attempts: int = 100,
    ) -> bytes:
        """Write ``fn(current)``, where `fn` may be async; repeated until no other client changed the
        value in between. See `Store.update`."""
        return await self._channel.run(_flows.update(self._sql, key, fn, ttl, attempts))

    # -- expiry

    async def expire(self, key: str, ttl: Seconds, *, if_version: int | None = None) -> bool:
        """Give the key a new ttl in seconds. True if there was such a key (and version)."""
        return await self._channel.execute(self._sql.expire(key, ttl, if_version))

    async def expire_at(self, key: str, moment: datetime) -> bool:
        """Set the moment (an aware datetime) at which the key ends. True if there was such a
        key."""
        return await self._channel.execute(self._sql.expire_at(key, moment))

    async def persist(self, key: str) -> bool:
        """Remove the key's expiry. True when the key exists."""
        return await self._channel.execute(self._sql.persist(key))

    async def ttl(self, key: str) -> float | None:
        """Return the seconds left: ``math.inf`` without an expiry, None when there is no such
        key."""
        return await self._channel.execute(self._sql.ttl(key))

    # -- scan

    async def keys(self, prefix: str | ScanOptions = "", **options: Unpack[ScanRange]) -> list[str]:
        """Return the selected keys, ordered by their UTF-8 bytes; see `Store.keys`."""
        return await self._channel.execute(self._sql.keys(scan_options(prefix, options)))

    async def scan(
        self, prefix: str | ScanOptions = "", **options: Unpack[ScanRange]
    ) -> list[KeyValue]:
        """Return the selected rows, ordered by their keys' UTF-8 bytes. See `Store.scan`."""
        return await self._channel.execute(self._sql.scan(scan_options(prefix, options)))

    def iter_keys(self, prefix: str = "", *, page_size: int = 1000) -> AsyncIterator[str]:
        """Iterate over the keys with a prefix in constant memory, page by page. See
        `Store.iter_keys`."""
        return self._paged(self._sql.keys, str, prefix, page_size)

    def iter_items(self, prefix: str = "", *, page_size: int = 1000) -> AsyncIterator[KeyValue]:
        """Iterate over keys and values with a prefix in constant memory; see `iter_keys`."""
        return self._paged(self._sql.scan, attrgetter("key"), prefix, page_size)

    def _paged(
        self, select: Any, key_of: Callable[[Any], str], prefix: str, page_size: int
    ) -> AsyncIterator[Any]:
        first = select(ScanOptions(prefix=prefix, limit=whole("page_size", page_size)))
        return self._pages(first, select, key_of, prefix, page_size)

    async def _pages(
        self, op: Any, select: Any, key_of: Callable[[Any], str], prefix: str, page_size: int
    ) -> AsyncIterator[Any]:
        while True:
            page = await self._channel.execute(op)
            for item in page:
                yield item
            if len(page) < page_size:
                return
            op = select(ScanOptions(prefix=prefix, after=key_of(page[-1]), limit=page_size))

    async def count(self, prefix: str = "", *, include_expired: bool = False) -> int:
        """Return how many keys begin with the prefix; with `include_expired` also expired keys that
        are not collected yet. Reads all of them: linear."""
        return await self._channel.execute(self._sql.count(prefix, include_expired))

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every key with the prefix, expired ones too; return how many were live."""
        return await self._channel.execute(self._sql.delete_prefix(prefix))

    # -- upkeep

    async def cleanup_expired(self, *, limit: int | None = None) -> int:
        """Delete rows whose time has passed, in short chunks that block no other client. See
        `Store.cleanup_expired`."""
        done = 0
        for each in self._each():
            found = await each._channel.run(_sweep.sweep_all(each._sql, limit))
            done += found
            if limit is not None:
                limit -= found
                if not limit:
                    break
        return done

    async def evict(self) -> int:
        """Evict keys until the bound of the table holds; return how many. See `Store.evict`."""
        require_bound(self._config)
        done = 0
        for each in self._each():
            done += await each._channel.run(_evict.evict_all(each._sql, each._channel))
        return done

    async def rewrite(
        self,
        prefix: str = "",
        *,
        batch: int = 500,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Bring stored values to this store's transforms; return how many. See `Store.rewrite`."""
        return await self._channel.run(_flows.rewrite(self._sql, prefix, batch, progress))

    async def clear(self) -> int:
        """Remove every key (of the namespace); return how many were live."""
        return await self._channel.execute(self._sql.delete_prefix(""))

    async def truncate(self) -> None:
        """Empty the whole table at once. Waits at most 2 s for transactions that use it."""
        for each in self._each():
            await each._channel.execute(each._whole_table("truncate").truncate())

    async def stats(self) -> Stats:
        """Return sizes and health of the whole table. Reads all of it: linear."""
        found = await self._channel.execute(self._sql.stats())
        return _evict.bounded(found, self._sql, self._channel)

    async def vacuum(self) -> None:
        """Reclaim dead rows now. Normally autovacuum does this; see `Store.vacuum`."""
        for each in self._each():
            sql = each._whole_table("vacuum")
            await each._channel.run(_flows.maintain(sql, sql.vacuum()))

    async def analyze(self) -> None:
        """Refresh the planner's statistics of the table; see `Store.analyze`."""
        for each in self._each():
            await each._channel.run(_flows.maintain(each._sql, each._sql.analyze()))

    async def create_table(self) -> None:
        """Create the table (and its schema) if it is missing; otherwise do nothing. See
        `Store.create_table`."""
        await self._channel.run(_schema.ensure(self._sql.table))

    async def recreate_table(self) -> None:
        """Drop the table **with everything in it** and create it again, in one transaction."""
        for each in self._each():
            await each._channel.run(_schema.recreate(each._whole_table("recreate_table").table))

    async def ping(self, timeout: Seconds | None = None) -> float:
        """Make a round trip to the server and return the seconds it took. See `Store.ping`."""
        started = monotonic()
        await self._channel.execute(
            self._sql.ping(), None if timeout is None else seconds(timeout, "timeout")
        )
        return monotonic() - started

    async def now(self) -> datetime:
        """Return what the server's clock says (UTC): the clock that decides every expiry."""
        return await self._channel.execute(self._sql.now())

    # -- scope

    def transaction(self) -> Opening[Self]:
        """Enter a transaction: a store whose operations commit together, or not at all. See
        `Store.transaction`."""
        return Opening(self._transaction(), "store.transaction()")

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Self]:
        async with self._channel.transaction() as channel:
            yield self._view(channel=channel)

    def pipeline(self, *, atomic: bool = False) -> AsyncPipeline:
        """Queue operations and send them together at the end of a ``with`` block. See
        `Store.pipeline`."""
        return _pipeline()(self._sql, self._channel, atomic=atomic)

    @overload
    def typed(self, type_: type[T], codec: CodecName = "json") -> AsyncTypedStore[T]: ...
    @overload
    def typed(self, type_: Any, codec: CodecName = "json") -> AsyncTypedStore[Any]: ...
    def typed(self, type_: Any, codec: CodecName = "json") -> AsyncTypedStore[Any]:
        """Return this store for values of one type; see `Store.typed`."""
        from .typed import AsyncTypedStore

        return AsyncTypedStore(self, type_, codec)

    async def run_transaction(
        self,
        fn: Callable[[Self], Awaitable[T]],
        *,
        isolation: IsolationLevel | None = None,
    ) -> T:
        """Call ``fn(tx)`` in a transaction; repeated after a serialization failure or a deadlock.
        See `Store.run_transaction`."""
        from tenacity import AsyncRetrying

        check_transaction(fn, isolation)

        async def once() -> T:
            async with self._channel.transaction(isolation) as channel:
                work = fn(self._view(channel=channel))
                if not inspect.isawaitable(work):
                    raise TypeError(
                        "the function given to AsyncStore.run_transaction must be async"
                    )
                return await work

        return await AsyncRetrying(**_retry.transaction_options(self._config.retry))(once)

    def using(self, conn: Any) -> Self:
        """Return this store inside the caller's own connection and transaction. See
        `Store.using`."""
        inner = unwrap(conn, psycopg.AsyncConnection)
        return self._view(channel=AsyncCallerChannel(inner, self._config.operation_timeout))

    def watch(
        self,
        keys: str | Iterable[str],
        *,
        prefix: bool = False,
        initial: bool = False,
        poll: Seconds | None = 30.0,
        values: bool = False,
    ) -> AsyncWatch:
        """Watch keys: iterate over their changes, made by any process. See `Store.watch`."""
        from ._watch.api import AsyncWatch

        return AsyncWatch(self, keys, prefix, initial, poll, values)


builtin_set = set  # inside the class body the name means the method
_closing: set[asyncio.Task[None]] = set()  # a loop holds only weak references to its tasks
