"""`Store`: the key-value store, blocking.

A store is a set of statements (`_sql`) and a channel that performs them; most methods are one line.
To follow ``store.get("k")``, read it here, then `PointStatements.get` in `_sql.point` and
`PoolChannel.execute` in `_engine._sync.channel`. `aio` mirrors this file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from operator import attrgetter
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, Unpack, cast, overload
from urllib.parse import quote

import psycopg
from psycopg import IsolationLevel
from psycopg_pool import ConnectionPool

from ._engine import evict as _evict
from ._engine import flows as _flows
from ._engine import retry as _retry
from ._engine import schema as _schema
from ._engine import sweep as _sweep
from ._engine._sync.channel import Channel, PoolChannel
from ._engine._sync.pool import CallerPool, StorePool
from ._engine._sync.transaction import CallerChannel
from ._engine.caller import unwrap
from ._engine.unopened import Unopened
from ._ops.codec import Value, seconds, whole
from ._ops.drivers import invoke
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
    from ._shards.store import ShardedStore
    from ._watch.api import Watch
    from .pipeline import Pipeline
    from .typed import TypedStore

T = TypeVar("T")


@cache  # an import inside of a call costs each call a microsecond
def _pipeline() -> type[Pipeline]:
    from .pipeline import Pipeline

    return Pipeline


class Entering(Unopened, Generic[T]):
    """An object to enter: ``with store.transaction() as tx``.

    Args:
        manager: opens and closes it.
    """

    def __init__(self, manager: contextlib.AbstractContextManager[T]) -> None:
        super().__init__("store.transaction()", "`with store.transaction() as tx`")
        self._manager: Any = manager

    def __enter__(self) -> T:
        entered: T = self._manager.__enter__()
        return entered

    def __exit__(self, *error: object) -> bool | None:
        return bool(self._manager.__exit__(*error))


class Store(StoreBase):
    """A key-value store in one PostgreSQL table, for threads.

    Keys are strings, values bytes (a str goes in as UTF-8). Every operation on one key is atomic
    and one statement; only the server's clock decides expiry. One store serves any number of
    threads with at most ``pool_max_size`` connections and survives ``fork()``.

    A store made from a `Config` connects at its first operation, so it can be created at import
    time; `connect` connects at once.

    An UNLOGGED table, the default, is **emptied by a crash of the server**. Keep data that must
    survive one in ``table_type=TableType.REGULAR``.

    Arguments mean the same in all operations:

    - `key` is a non-empty str of at most ``max_key_length`` bytes of UTF-8, without NUL; `keys` is an
      iterable of keys, and a `prefix` may be empty.
    - `value`, `new` and `expected` are bytes, bytearray, memoryview, or a str that is kept as UTF-8;
      `items` is a mapping of keys to values, or an iterable of pairs.
    - `ttl` is seconds from now, a number or a timedelta, more than 0; `expires_at` and `moment` are
      aware datetimes, and one in the past ends the key at once: the call counts as done. A ttl of 0
      is an error; to end a key now, `delete` it.
    - `if_version`: act only if the key has that version.
    - `delta` is a signed 64-bit int; `deltas` maps keys to deltas.

    Every operation may raise `StoreUnavailableError` (no connection, or lost),
    `OperationTimeoutError` (``operation_timeout`` passed; it may still have happened) and
    `ConfigError` (a right is missing); bad input raises `InvalidKeyError` or `InvalidValueError`
    before anything is sent.

    Args:
        config: the settings; `connect` makes a `Config` from keywords.

    Raises:
        ConfigError: `config` is not a `Config`.
    """

    _bare: Channel
    _channel: Channel

    def __init__(self, config: Config) -> None:
        require_config(config, "Store")
        target = Target(config)
        channel = PoolChannel(config, StorePool(config, target.conninfo))
        channel.on_close(target.close)
        self._bind(config, target, Statements.of(config), channel)

    def _bind(
        self,
        config: Config,
        target: Target,
        sql: Statements,
        channel: Channel,
        *,
        owner: bool = True,
    ) -> None:
        super()._bind(config, target, sql, channel, owner=owner)
        self._execute, self._run = channel.execute, channel.run  # for the patterns
        if config.notify:
            from ._watch.hints import NotingChannel

            self._channel = cast("Channel", NotingChannel(channel, config))

    # -- beginning and end

    @classmethod
    def connect(cls, dsn: str | None = None, **config: Unpack[Options]) -> Self:
        """Connect and create the table if it is missing, or raise within ``connect_timeout``.

        Args:
            dsn: a libpq URI or conninfo string, or ``embedded:///path``; without one ``PGKV_DSN``,
                else ``DATABASE_URL``.
            **config: the fields of `Config`.

        Raises:
            ConfigError: a setting is wrong or missing, or the table may not be created.
            StoreUnavailableError: the server cannot be reached or refuses the login; the message
                says why.
            TableNotFoundError: there is no table and ``auto_create_table`` is off.
        """
        store = cls(config_of(dsn, config))
        try:
            store._target.dsn()  # an embedded server has a time limit of its own
            store._channel.run(_flows.reach(store._sql), reach_timeout(store._config))
            store.create_table() if store._config.auto_create_table else store.exists("-")
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def from_pool(
        cls, pool: ConnectionPool[Any], *, dsn: str | None = None, **config: Unpack[Options]
    ) -> Self:
        """Create a store on your own psycopg_pool. Each operation checks out one connection.

        The pool must be open; it is never closed or reconfigured. Its connections need
        ``client_encoding`` UTF8.

        Args:
            pool: a ``psycopg_pool.ConnectionPool``.
            dsn: for connections outside the pool (lease renewal, LISTEN); by default the pool's.
            **config: the fields of `Config`; those that size a pool have no effect.

        Raises:
            ConfigError: `pool` is not such a pool, or a setting is wrong.
        """
        check_pool(pool, ConnectionPool)
        settings = config_of_pool(pool, dsn, options_of(config))
        store = cls.__new__(cls)
        channel = PoolChannel(settings, CallerPool(pool, settings))
        store._bind(settings, Target(settings, dsn), Statements.of(settings), channel)
        return store

    @classmethod
    def embedded(
        cls, path: str | os.PathLike[str] | None = None, **config: Unpack[Options]
    ) -> Self:
        """Open a store on an embedded PostgreSQL server, which is started if it is not running.

        The server stops when the last process that uses it closes its store or exits. Needs the
        extra ``embedded``, or PostgreSQL's server programs on this machine.

        Args:
            path: the server's directory, created if missing; None for the user's default one.
            **config: the fields of `Config`.

        Raises:
            ConfigError: no PostgreSQL was found, the directory cannot be used, or a setting is wrong.
            StoreUnavailableError: the server does not start in time.
        """
        where = "/" if path is None else quote(str(Path(path).absolute()))
        return cls.connect(EMBEDDED_SCHEME + where, **config)

    @classmethod
    def sharded(
        cls,
        dsns: Sequence[str] | None = None,
        *,
        slots: int | None = None,
        placement: Literal["auto", "servers", "citus"] = "auto",
        **config: Unpack[Options],
    ) -> ShardedStore:
        """Connect to several servers as one store: each key is in a slot, and each slot is a schema on
        one of the servers. ``pgkv shards init`` makes the slots.

        Args:
            dsns: one DSN for each server; without them those in ``PGKV_DSN``, with spaces between.
            slots: how many there must be; None for as many as there are.
            placement: ``"servers"``: plain PostgreSQL servers, with a map on each. ``"citus"``: a Citus
                cluster; the DSN of one node is enough. ``"auto"`` finds out.
            **config: the fields of `Config` but for ``schema`` and ``coalesce``. The sizes of the pool are
                of each server's; bounds on the table are shared out among the slots.

        Raises:
            ConfigError: a setting is wrong, the servers have no slots, or not of one store.
            StoreUnavailableError: no server can be reached.
        """
        from ._shards.store import sharded

        return sharded(dsns, slots, placement, config)

    def close(self) -> None:
        """Close every connection. The store cannot be used afterwards. Views (`namespace`,
        `table`, `using`, `transaction`) share their store's connections and close nothing."""
        if self._owner:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- basic

    @overload
    def get(self, key: str) -> bytes | None: ...
    @overload
    def get(self, key: str, default: T) -> bytes | T: ...
    def get(self, key: str, default: Any = None) -> Any:
        """Return the value, or `default` when there is no such key."""
        sql = self._sql
        value = self._channel.call(sql.get_statement, (sql.key(key),))
        return default if value is None else value

    def get_or_raise(self, key: str) -> bytes:
        """Return the value.

        Raises:
            NotFoundError: there is no such key.
        """
        sql = self._sql
        value = self._channel.call(sql.get_statement, (sql.key(key),))
        if value is None:
            raise NotFoundError(f"no such key: {key!r}")
        return value

    def get_string(self, key: str) -> str | None:
        """Return the value as text, or None when there is no such key.

        Raises:
            SerializationError: the value is not UTF-8.
        """
        sql = self._sql
        value = self._channel.call(sql.get_statement, (sql.key(key),))
        return None if value is None else text_of(key, value)

    def get_entry(self, key: str) -> Entry | None:
        """Return the value with its version, expiry and times; None when there is no such key."""
        return self._channel.execute(self._sql.get_entry(key))

    @overload
    def set(self, key: str, value: Value, **expiry: Unpack[ExpiryOptions]) -> int: ...
    @overload
    def set(
        self, key: str, value: Value, *, if_version: int | None, **expiry: Unpack[ExpiryOptions]
    ) -> int | None: ...
    def set(
        self,
        key: str,
        value: Value,
        *,
        ttl: Seconds | None = None,
        expires_at: datetime | None = None,
        keep_ttl: bool = False,
        if_version: int | None = None,
    ) -> int | None:
        """Write the value. Without a ttl an earlier one is cleared.

        Args:
            key: a non-empty string.
            value: bytes, or a str kept as UTF-8.
            ttl: seconds (or a timedelta) until the key ends.
            expires_at: an aware datetime at which it ends; one in the past ends it at once.
            keep_ttl: keep the expiry of a live key.
            if_version: write only if the key has this version; 0: only if there is no such key.

        Returns:
            The new version; None only where `if_version` did not match.
        """
        sql = self._sql
        if ttl is None and expires_at is None and not keep_ttl and if_version is None:
            return self._channel.call(sql.set_statement, sql.pair(key, value))
        return self._channel.execute(sql.set(key, value, ttl, expires_at, keep_ttl, if_version))

    def set_ex(self, key: str, value: Value, ttl: Seconds) -> int:
        """Write the value with a ttl in seconds; return the new version."""
        return self.set(key, value, ttl=ttl)

    def set_at(self, key: str, value: Value, expires_at: datetime) -> int:
        """Write the value with a moment at which it ends; return the new version."""
        return self.set(key, value, expires_at=expires_at)

    def set_nx(self, key: str, value: Value, *, ttl: Seconds | None = None) -> bool:
        """Write the value if there is no such key; True if it was written. Of concurrent callers
        exactly one writes it."""
        return self._channel.execute(self._sql.set_nx(key, value, ttl))

    def set_nx_ex(self, key: str, value: Value, ttl: Seconds) -> bool:
        """Write the value with a ttl in seconds if there is no such key; True if it was written."""
        return self._channel.execute(self._sql.set_nx(key, value, ttl))

    def set_xx(self, key: str, value: Value, *, ttl: Seconds | None = None) -> bool:
        """Write the value if the key exists; True if it was written."""
        return self._channel.execute(self._sql.set_xx(key, value, ttl))

    def delete(self, key: str, *, if_version: int | None = None) -> bool:
        """Remove the key; with `if_version` only that version of it. True if it was there."""
        if if_version is None:
            sql = self._sql
            return self._channel.call(sql.delete_statement, (sql.key(key),))
        return self._channel.execute(self._sql.delete(key, if_version))

    def exists(self, key: str) -> bool:
        """Tell whether the key exists."""
        sql = self._sql
        return self._channel.call(sql.exists_statement, (sql.key(key),))

    def get_and_touch(self, key: str, ttl: Seconds) -> bytes | None:
        """Return the value and give it a new ttl in seconds, in one step; None when there is no such
        key."""
        return self._channel.execute(self._sql.get_and_touch(key, ttl))

    # -- mapping

    def __getitem__(self, key: str) -> bytes:
        return self.get_or_raise(key)

    def __setitem__(self, key: str, value: Value) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        if not self.delete(key):
            raise NotFoundError(f"no such key: {key!r}")

    def __contains__(self, key: str) -> bool:
        return self.exists(key)

    def __iter__(self) -> Iterator[str]:
        return self.iter_keys()

    # -- batch

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return the values of those keys that exist, read in one snapshot."""
        op = self._sql.get_many(keys)
        return {} if op is None else self._channel.execute(op)

    def set_many(
        self,
        items: Mapping[str, Value] | Iterable[tuple[str, Value]],
        *,
        ttl: Seconds | None = None,
    ) -> int:
        """Write all pairs or none, any number of them. Of a repeated key the last pair counts.

        Each key's ttl is set, or cleared without one.

        Returns:
            How many distinct keys were written.
        """
        count, ops = self._sql.set_many(items, ttl)
        return self._channel.run(_flows.written(count, ops))

    def load(
        self,
        items: Iterable[tuple[str, Value] | tuple[str, Value, Seconds | None]],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Write many keys by COPY, in transactions of 20,000, over a connection of its own: a million
        keys in seconds, in constant memory.

        If it fails, the chunks that `progress` heard of are written and no others. Each key's ttl is
        set, or cleared without one.

        Args:
            items: pairs of key and value, or with a ttl in seconds as the third; may be a generator.
            progress: called with the number of keys written, after each transaction.

        Returns:
            How many keys were written.

        Raises:
            ConfigError: this store is inside a transaction.
        """
        from ._engine.load import load

        conninfo = self._conninfo()
        if self._config.auto_create_table:
            self.create_table()
        try:
            return load(self._sql, conninfo, items, progress, Event())
        finally:
            if self._config.notify:
                cast("Any", self._channel).tell_all()

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove all the keys or none; return how many were there."""
        return sum(self._channel.run(_flows.all_of(self._sql.delete_many(keys))))

    def increment_many(
        self, deltas: Mapping[str, int], *, ttl: Seconds | None = None
    ) -> dict[str, int]:
        """Add to many integers, all or none; see `increment`. Return the sums."""
        return self._channel.run(_flows.increment_many(self._sql, deltas, ttl))

    def exists_many(self, keys: Iterable[str]) -> builtin_set[str]:
        """Return those of the keys that exist."""
        op = self._sql.exists_many(keys)
        return set() if op is None else self._channel.execute(op)

    def expire_many(self, keys: Iterable[str], ttl: Seconds) -> int:
        """Give all the keys a new ttl in seconds, or none; return how many exist."""
        return sum(self._channel.run(_flows.all_of(self._sql.expire_many(keys, ttl))))

    # -- atomic

    @overload
    def increment(self, key: str, delta: int = 1, *, ttl: Seconds | None = None) -> int: ...
    @overload
    def increment(
        self, key: str, delta: int = 1, *, only_if_exists: Literal[True]
    ) -> int | None: ...
    @overload
    def increment(self, key: str, delta: int = 1, **bounds: Unpack[AtLeast]) -> IncrementResult: ...
    @overload
    def increment(self, key: str, delta: int = 1, **bounds: Unpack[AtMost]) -> IncrementResult: ...
    def increment(
        self,
        key: str,
        delta: int = 1,
        *,
        ttl: Seconds | None = None,
        only_if_exists: bool = False,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> Any:
        """Add to an integer and return the sum. An absent key counts as 0.

        The value is decimal text within the signed 64-bit range. A live key keeps its expiry; `ttl`
        applies only when this call creates the key, so ``increment(k, ttl=60)`` counts in a fixed
        window. Never repeated after a lost answer: no increment counts twice.

        Args:
            key: the key.
            delta: what to add; it may be negative.
            ttl: seconds, for a key that this call creates.
            only_if_exists: create no key; the answer is then None.
            minimum: refuse a sum below this, and change nothing.
            maximum: refuse a sum above this, and change nothing.

        Returns:
            The sum; with `minimum` or `maximum` an `IncrementResult`, true when it was applied.

        Raises:
            InvalidValueError: the stored value is not an integer, or the sum does not fit 64 bits.
        """
        if ttl is None and minimum is None and maximum is None and only_if_exists is False:
            sql = self._sql
            return self._channel.call(sql.increment_statement, (sql.key(key), decimal(delta)))
        return self._channel.execute(
            self._sql.increment(key, delta, ttl, only_if_exists, minimum, maximum)
        )

    def decrement(self, key: str, delta: int = 1, *, ttl: Seconds | None = None) -> int:
        """Subtract from an integer and return the difference; see `increment`."""
        left: int = self._channel.execute(self._sql.increment(key, negated(delta), ttl))
        return left

    def append(self, key: str, value: Value, *, ttl: Seconds | None = None) -> int:
        """Add bytes to the end of the value and return its new length. An absent key counts as
        empty; expiry, and what is repeated, are as for `increment`.

        Raises:
            InvalidValueError: the result would exceed ``max_value_size``; nothing was changed.
        """
        return self._channel.execute(self._sql.append(key, value, ttl))

    def compare_and_swap(
        self,
        key: str,
        expected: Value | None,
        new: Value,
        *,
        ttl: Seconds | None = None,
    ) -> CasResult:
        """Write `new` if the value is `expected`; ``expected=None``: if there is no such key.

        Without a ttl the key keeps its expiry.

        Returns:
            A `CasResult`, true on success; on a mismatch it has the value found.

        Raises:
            ConflictError: a hundred attempts in a row met concurrent changes.
        """
        if self._sql.transforms is not None:
            return self._channel.run(_flows.swap(self._sql, key, expected, new, ttl))
        return self._channel.execute(self._sql.compare_and_swap(key, expected, new, ttl))

    def compare_and_delete(self, key: str, expected: Value) -> bool:
        """Remove the key if its value is `expected`; True if it was removed."""
        if self._sql.transforms is not None:
            return self._channel.run(_flows.take(self._sql, key, expected)) is not None
        return self._channel.execute(self._sql.compare_and_delete(key, expected))

    def get_and_set(self, key: str, value: Value, *, ttl: Seconds | None = None) -> bytes | None:
        """Write the value and return the previous one, or None. Each value is returned to exactly
        one caller."""
        return self._channel.execute(self._sql.get_and_set(key, value, ttl))

    def get_and_delete(self, key: str) -> bytes | None:
        """Remove the key and return its value, None when there was no such key."""
        if self._sql.transforms is not None:
            return self._channel.run(_flows.take(self._sql, key))
        return self._channel.execute(self._sql.get_and_delete(key))

    def update(
        self,
        key: str,
        fn: Callable[[bytes | None], Value],
        *,
        ttl: Seconds | None = None,
        attempts: int = 100,
    ) -> bytes:
        """Write ``fn(current)``, repeated until no other client changed the value in between.

        Changes are detected by the version. A client that does not write versions, such as the Rust
        crate, may have its change overwritten.

        Args:
            key: the key.
            fn: maps the current value (None without one) to the new one. It may run several times.
            ttl: seconds; without it a live key keeps its expiry.
            attempts: how often to try.

        Returns:
            The value written.

        Raises:
            ConflictError: others changed the value during every attempt.
        """
        return self._channel.run(_flows.update(self._sql, key, fn, ttl, attempts))

    # -- expiry

    def expire(self, key: str, ttl: Seconds, *, if_version: int | None = None) -> bool:
        """Give the key a new ttl in seconds. True if there was such a key (and version)."""
        return self._channel.execute(self._sql.expire(key, ttl, if_version))

    def expire_at(self, key: str, moment: datetime) -> bool:
        """Set the moment (an aware datetime) at which the key ends. True if there was such a key."""
        return self._channel.execute(self._sql.expire_at(key, moment))

    def persist(self, key: str) -> bool:
        """Remove the key's expiry. True when the key exists."""
        return self._channel.execute(self._sql.persist(key))

    def ttl(self, key: str) -> float | None:
        """Return the seconds left: ``math.inf`` without an expiry, None when there is no such key."""
        return self._channel.execute(self._sql.ttl(key))

    # -- scan

    def keys(self, prefix: str | ScanOptions = "", **options: Unpack[ScanRange]) -> list[str]:
        """Return the selected keys, ordered by their UTF-8 bytes.

        Args:
            prefix: what the keys begin with; or a `ScanOptions`.
            **options: the other fields of `ScanOptions`: `start`, `end`, `after`, `limit`, `offset`,
                `include_expired`.
        """
        return self._channel.execute(self._sql.keys(scan_options(prefix, options)))

    def scan(self, prefix: str | ScanOptions = "", **options: Unpack[ScanRange]) -> list[KeyValue]:
        """Return the selected rows, ordered by their keys' UTF-8 bytes.

        Args:
            prefix: what the keys begin with; or a `ScanOptions`.
            **options: the other fields of `ScanOptions`: `start`, `end`, `after`, `limit`, `offset`,
                `include_expired`.
        """
        return self._channel.execute(self._sql.scan(scan_options(prefix, options)))

    def iter_keys(self, prefix: str = "", *, page_size: int = 1000) -> Iterator[str]:
        """Iterate over the keys with a prefix in constant memory, page by page.

        Each page is its own snapshot: keys written or removed meanwhile may or may not appear.

        Args:
            prefix: what the keys begin with.
            page_size: keys per round trip.
        """
        return self._paged(self._sql.keys, str, prefix, page_size)

    def iter_items(self, prefix: str = "", *, page_size: int = 1000) -> Iterator[KeyValue]:
        """Iterate over keys and values with a prefix in constant memory; see `iter_keys`.

        Args:
            prefix: what the keys begin with.
            page_size: rows per round trip, and so the number of values in memory at once.
        """
        return self._paged(self._sql.scan, attrgetter("key"), prefix, page_size)

    def _paged(
        self, select: Any, key_of: Callable[[Any], str], prefix: str, page_size: int
    ) -> Iterator[Any]:
        first = select(ScanOptions(prefix=prefix, limit=whole("page_size", page_size)))
        return self._pages(first, select, key_of, prefix, page_size)

    def _pages(
        self, op: Any, select: Any, key_of: Callable[[Any], str], prefix: str, page_size: int
    ) -> Iterator[Any]:
        while True:
            page = self._channel.execute(op)
            yield from page
            if len(page) < page_size:
                return
            op = select(ScanOptions(prefix=prefix, after=key_of(page[-1]), limit=page_size))

    def count(self, prefix: str = "", *, include_expired: bool = False) -> int:
        """Return how many keys begin with the prefix; with `include_expired` also expired keys
        that are not collected yet. Reads all of them: linear."""
        return self._channel.execute(self._sql.count(prefix, include_expired))

    def delete_prefix(self, prefix: str) -> int:
        """Remove every key with the prefix, expired ones too; return how many were live."""
        return self._channel.execute(self._sql.delete_prefix(prefix))

    # -- upkeep

    def cleanup_expired(self, *, limit: int | None = None) -> int:
        """Delete rows whose time has passed, in short chunks that block no other client.

        Args:
            limit: stop after this many rows; None for all.

        Returns:
            How many were deleted.
        """
        done = 0
        for each in self._each():
            found = each._channel.run(_sweep.sweep_all(each._sql, limit))
            done += found
            if limit is not None:
                limit -= found
                if not limit:
                    break
        return done

    def evict(self) -> int:
        """Evict keys until the bound of the table (`max_entries`, `max_bytes`) holds; return how
        many. Otherwise it is kept in the background.

        Raises:
            ConfigError: the table has no bound.
        """
        require_bound(self._config)
        return sum(
            each._channel.run(_evict.evict_all(each._sql, each._channel)) for each in self._each()
        )

    def rewrite(
        self,
        prefix: str = "",
        *,
        batch: int = 500,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Bring stored values to this store's transforms while traffic goes on: after a new key of
        encryption was put first, or a transform added. Return how many values were rewritten.

        Version, expiry and times stay. Rows in the present form are passed over, so a call that was
        interrupted can be repeated. Cached functions' entries stay as they are until they end.

        Args:
            prefix: what the keys begin with.
            batch: rows read at a time.
            progress: called with the number of values rewritten, after each page that had some.

        Raises:
            ConfigError: the table has no transforms.
            DecodingError: a value does not open; raised at the end, for the first such value.
        """
        return self._channel.run(_flows.rewrite(self._sql, prefix, batch, progress))

    def clear(self) -> int:
        """Remove every key (of the namespace); return how many were live."""
        return self._channel.execute(self._sql.delete_prefix(""))

    def truncate(self) -> None:
        """Empty the whole table at once. Waits at most 2 s for transactions that use it."""
        for each in self._each():
            each._channel.execute(each._whole_table("truncate").truncate())

    def stats(self) -> Stats:
        """Return sizes and health of the whole table. Reads all of it: linear."""
        found = self._channel.execute(self._sql.stats())
        return _evict.bounded(found, self._sql, self._channel)

    def vacuum(self) -> None:
        """Reclaim dead rows now. Normally autovacuum does this.

        Raises:
            ConfigError: the role neither owns the table nor has MAINTAIN (PostgreSQL 17 and newer).
        """
        for each in self._each():
            sql = each._whole_table("vacuum")
            each._channel.run(_flows.maintain(sql, sql.vacuum()))

    def analyze(self) -> None:
        """Refresh the planner's statistics of the table.

        Raises:
            ConfigError: as for `vacuum`.
        """
        for each in self._each():
            each._channel.run(_flows.maintain(each._sql, each._sql.analyze()))

    def create_table(self) -> None:
        """Create the table (and its schema) if it is missing; otherwise do nothing.

        Raises:
            ConfigError: the role may not create it (the message contains the DDL to run), or the
                name belongs to another kind of table.
        """
        self._channel.run(_schema.ensure(self._sql.table))

    def recreate_table(self) -> None:
        """Drop the table **with everything in it** and create it again, in one transaction."""
        for each in self._each():
            each._channel.run(_schema.recreate(each._whole_table("recreate_table").table))

    def ping(self, timeout: Seconds | None = None) -> float:
        """Make a round trip to the server and return the seconds it took.

        Args:
            timeout: seconds for the whole call; None for ``operation_timeout``.
        """
        started = monotonic()
        self._channel.execute(
            self._sql.ping(), None if timeout is None else seconds(timeout, "timeout")
        )
        return monotonic() - started

    def now(self) -> datetime:
        """Return what the server's clock says (UTC): the clock that decides every expiry."""
        return self._channel.execute(self._sql.now())

    # -- scope

    def transaction(self) -> Entering[Self]:
        """Enter a transaction: a store whose operations commit together, or not at all.

        Inside a transaction it opens a savepoint; other threads (or tasks) that share the
        transaction wait until that ends. Nothing is retried or collected inside. It holds a
        connection and row locks until its end, so keep it short.

        Returns:
            An object to enter: ``with store.transaction() as tx``. That of an `AsyncStore` is entered
            with ``async with`` or awaited. `tx` is a store.

        Raises:
            TransactionError: (of the store it gives) it was used after its end, or another thread
                or task was inside a nested transaction for longer than ``operation_timeout``.
        """
        return Entering(self._transaction())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Self]:
        with self._channel.transaction() as channel:
            yield self._view(channel=channel)

    def pipeline(self, *, atomic: bool = False) -> Pipeline:
        """Queue operations and send them together at the end of a ``with`` block.

        ``with store.pipeline() as p: a = p.get("x"); b = p.increment("n", 2)`` takes one round
        trip; then ``a.result()`` gives the value or raises that operation's own error.

        Args:
            atomic: all or nothing; see `Pipeline`.

        Returns:
            A `Pipeline`, which has the names of a store's operations.
        """
        return _pipeline()(self._sql, self._channel, atomic=atomic)

    @overload
    def typed(self, type_: type[T], codec: CodecName = "json") -> TypedStore[T]: ...
    @overload
    def typed(self, type_: Any, codec: CodecName = "json") -> TypedStore[Any]: ...
    def typed(self, type_: Any, codec: CodecName = "json") -> TypedStore[Any]:
        """Return this store for values of one type.

        Args:
            type_: a dataclass, TypedDict, ``msgspec.Struct``, pydantic model, or any type that the
                codec can write and read back, such as ``dict[int, str]``.
            codec: ``"json"``; or ``"msgpack"``, which also keeps NaN, infinities and bytes under ``Any``.

        Returns:
            A `TypedStore` on the same connections.

        Raises:
            ConfigError: values of that type cannot be written and read back.
        """
        from .typed import TypedStore

        return TypedStore(self, type_, codec)

    def run_transaction(
        self, fn: Callable[[Self], T], *, isolation: IsolationLevel | None = None
    ) -> T:
        """Call ``fn(tx)`` in a transaction; repeated after a serialization failure or a deadlock.

        Args:
            fn: gets a store bound to the transaction. It may run several times.
            isolation: a ``psycopg.IsolationLevel``; None for READ COMMITTED.

        Returns:
            What `fn` returned when it was committed.

        Raises:
            InvalidValueError: `fn` is not a function, or `isolation` is not such a level.
            TypeError: `fn` is async, or (for an `AsyncStore`) is not; nothing was committed.
        """
        from tenacity import Retrying

        check_transaction(fn, isolation)

        def once() -> T:
            with self._channel.transaction(isolation) as channel:
                return invoke(fn, self._view(channel=channel))  # type: ignore[no-any-return]  # what fn returns

        return Retrying(**_retry.transaction_options(self._config.retry))(once)

    def using(self, conn: Any) -> Self:
        """Return this store inside the caller's own connection and transaction.

        Its operations commit or roll back with the caller's statements. Nothing is prepared on the
        connection, retried or collected.

        Args:
            conn: a ``psycopg.Connection``, or Django's or SQLAlchemy's wrapper of one.

        Raises:
            ConfigError: `conn` is not a psycopg 3 connection, or it is an async one.
            TransactionError: it is closed; or, from an operation, its transaction has failed.
        """
        inner = unwrap(conn, psycopg.Connection)
        return self._view(channel=CallerChannel(inner, self._config.operation_timeout))

    def watch(
        self,
        keys: str | Iterable[str],
        *,
        prefix: bool = False,
        initial: bool = False,
        poll: Seconds | None = 30.0,
        values: bool = False,
    ) -> Watch:
        """Watch keys: iterate over their changes, made by any process.

        ``with store.watch("settings:", prefix=True) as events: for event in events: ...``. It says
        which keys changed since they were last read, not each change: states in between may be
        skipped. Writers with ``notify=True`` are heard at once; others are seen after `poll` seconds.

        Args:
            keys: a key, or several; with `prefix` what they begin with.
            prefix: watch all keys with that prefix.
            initial: begin with a "set" for each key that is there, then one "resync".
            poll: seconds between comparisons of all watched keys with the table; None: none, but when
                notifications may have been missed. While none can arrive (behind a pooler) it is 1 at
                most.
            values: events of kind "set" carry the value.

        Returns:
            A `Watch`, to be entered. What changes after it was entered is not missed.

        Raises:
            ConfigError: `poll` is below 0.1; or None behind a pooler; this store is in a transaction,
                or over a pool that does not tell its server.
            InvalidKeyError: no key is given, or one that cannot be.
        """
        from ._watch.api import Watch

        return Watch(self, keys, prefix, initial, poll, values)


builtin_set = set  # inside the class body the name means the method
