"""What sync and async stores share: what they make of their arguments, and `StoreBase`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack

from psycopg import IsolationLevel, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ._engine import conninfo as _conninfo
from ._engine.base import InTransaction
from ._engine.pooling import closed
from ._fork import new_lock
from ._observe import shown
from ._sql import Statements
from ._sql.scan import namespace_prefix
from .config import ANONYMOUS, EMBEDDED_SCHEME, Config, TableOptions, dsn_from_environment
from .errors import ConfigError, InvalidValueError, SerializationError
from .types import PoolStats, ScanOptions, ScanRange

if TYPE_CHECKING:
    from .embedded import EmbeddedServer

_TABLE_OPTIONS = tuple(TableOptions.__annotations__)
_CONFIG_OPTIONS = tuple(field.name for field in fields(Config) if field.name != "dsn")


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords that are fields of `Config`."""
    return _known(given, _CONFIG_OPTIONS)


def config_of(dsn: object, given: Mapping[str, Any]) -> Config:
    """Return the settings of a store for `connect`; without a DSN the environment's."""
    if isinstance(dsn, Config):
        raise ConfigError(
            "connect() takes a DSN, and settings as keywords; a Config goes to Store(config) or "
            "AsyncStore(config)"
        )
    found: Any = dsn_from_environment() if dsn is None else dsn
    return Config(found, **options_of(given))


def reach_timeout(config: Config) -> float:
    """Seconds in which `connect` must reach the server, retries included."""
    seconds = config.connect_timeout
    if not config.dsn.startswith(EMBEDDED_SCHEME):
        seconds = _conninfo.connect_time(config, _conninfo.build(config, config.dsn))
    return min(seconds, config.operation_timeout)


def table_config(config: Config, name: str, given: Mapping[str, Any]) -> Config:
    """Return the settings of another table over the same connections."""
    return replace(config, table_name=name, **_known(given, _TABLE_OPTIONS))


def _known(given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    for name in given:
        if name not in names:
            raise ConfigError(f"there is no option {name!r}; there are {', '.join(names)}")
    return dict(given)


class Target:
    """Where a store connects: a DSN, or an embedded server that is started when first asked for.

    Args:
        config: the store's.
        dsn: used in place of the configuration's own.
    """

    def __init__(self, config: Config, dsn: str | None = None) -> None:
        self._config = config
        self._given = dsn or config.dsn
        self._server: EmbeddedServer | None = None
        self._pid = 0
        self._closed = False
        self._lock = new_lock(self)

    def dsn(self) -> str:
        """The DSN that libpq understands, password included."""
        if not self._given.startswith(EMBEDDED_SCHEME):
            return self._given
        from . import embedded

        with self._lock:
            if self._closed:  # or asking for the DSN would start a server that is never stopped
                raise closed("dsn")
            # A forked child is a user of the server in its own right.
            if self._server is None or self._pid != os.getpid():
                self._server = embedded.start(embedded.parse(self._given))
                self._pid = os.getpid()
            return self._server.dsn

    def place(self) -> str:
        """Where that is, as it may be shown; empty where everything is left to libpq."""
        if self._given.startswith(EMBEDDED_SCHEME):
            return self._given
        params = conninfo_to_dict(self._given)
        host = str(params.get("host") or params.get("hostaddr") or "")
        port = str(params.get("port") or "")
        if host and port and "," not in port:  # of several, each host has its own
            host = f"{host}:{port}"
        return "/".join(part for part in (host, str(params.get("dbname") or "")) if part)

    def conninfo(self) -> str:
        """What the store's own connections are opened with."""
        return _conninfo.build(self._config, self.dsn())

    def close(self) -> None:
        """Give the embedded server up, if there is one: it stops with its last user."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is not None and self._pid == os.getpid():
            server.close()


def check_pool(pool: object, wanted: type[Any]) -> None:
    """Refuse what is not the pool of a sync (or async) store."""
    if not isinstance(pool, wanted):
        raise ConfigError(
            f"from_pool() takes a psycopg_pool.{wanted.__name__}, not {type(pool).__name__}"
        )


def config_of_pool(pool: Any, dsn: str | None, given: Mapping[str, Any]) -> Config:
    """Return the settings of a store over the caller's pool."""
    own = pool.conninfo if isinstance(pool.conninfo, str) else ""
    if dsn is None and isinstance(pool.kwargs, dict):
        # A pool may be told its database by keywords, among others that are psycopg's.
        known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
        own = make_conninfo(own, **{k: v for k, v in pool.kwargs.items() if k in known})
    return Config(dsn or own or ANONYMOUS, **given)


def require_bound(config: Config) -> None:
    """Refuse to evict from a table without a bound."""
    if not config.bounded:
        raise ConfigError("evict: the table has no bound; set max_entries or max_bytes")


def check_transaction(fn: object, isolation: object) -> None:
    """Refuse what `run_transaction` cannot run."""
    if not callable(fn):
        raise InvalidValueError(
            f"run_transaction: fn must be a function of the store, not {type(fn).__name__}"
        )
    if isolation is not None and not isinstance(isolation, IsolationLevel):
        raise InvalidValueError(
            "isolation must be a psycopg.IsolationLevel, such as "
            f"psycopg.IsolationLevel.SERIALIZABLE, or None, not {isolation!r}"
        )


def text_of(key: str, value: bytes) -> str:
    """Return a value as text."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        pass  # raised outside: the decoder's own message quotes the value
    raise SerializationError(f"the value of {key!r} is not UTF-8 text; use get()")


def scan_options(prefix: str | ScanOptions, options: ScanRange) -> ScanOptions:
    """Return what the arguments of a scan select."""
    if not isinstance(prefix, ScanOptions):
        return ScanOptions(prefix=prefix, **options)
    if options and ScanOptions(**options) != ScanOptions():
        raise InvalidValueError("give a ScanOptions or keywords, not both")
    return prefix


def refuse_pickle(thing: object, /, *_: object) -> NoReturn:
    """The `__reduce__` of what lives on connections: these stay in their process."""
    raise TypeError(
        f"this {type(thing).__name__} cannot be pickled or copied: its connections belong to this "
        "process; make one in each process, from the same settings"
    )


class StoreBase:
    """What a `Store` and an `AsyncStore` share: everything that sends nothing."""

    def _bind(
        self, config: Config, target: Target, sql: Statements, channel: Any, *, owner: bool = True
    ) -> None:
        self._config = config
        self._target = target
        self._sql = sql
        self._channel = self._bare = channel
        self._owner = owner
        channel.watch(sql)

    def _view(
        self, *, config: Config | None = None, sql: Statements | None = None, channel: Any = None
    ) -> Self:
        """Return a store that shares everything not given here; it does not own the connections."""
        view = type(self).__new__(type(self))
        view._bind(
            config or self._config,
            self._target,
            sql or self._sql,
            channel or self._bare,
            owner=False,
        )
        return view

    @shown
    def __repr__(self) -> str:
        config, prefix = self._config, self._sql.prefix
        schema = "" if config.schema is None else f"{config.schema}."
        name = f"{schema}{config.table_name}"
        place, state = self._target.place(), self._channel.state
        return (
            f"{name!r}"
            + (f" namespace={prefix!r}" if prefix else "")
            + (f" at {place}" if place else "")
            + (f", {state}" if state else "")
        )

    __reduce__ = refuse_pickle

    def __bool__(self) -> bool:
        # A store is always true, even when it is empty.
        return True

    @property
    def dsn(self) -> str:
        """The libpq DSN of this store's server, for connections of your own.

        For ``embedded://`` it names the embedded server, which is started if it is not running.
        **It contains the password**, if there is one: do not log it.
        """
        return self._target.dsn()

    def pool_stats(self) -> PoolStats:
        """Return how many connections this process has, and how many callers wait for one. Sends
        nothing.

        Raises:
            TransactionError: this store is inside a transaction, which has one connection.
        """
        found: PoolStats = self._channel.pool_stats()
        return found

    def namespace(self, prefix: str, *, notify: bool | None = None) -> Self:
        """Return a view of the keys with a prefix, which is added to keys on the way in and removed
        on the way out.

        Views nest. `clear`, `count` and scans keep to the prefix; operations on the whole table
        (`truncate`, `vacuum`, `recreate_table`) raise `ConfigError`.

        Args:
            prefix: a non-empty str. Nothing is put between it and the key, so end it with a separator
                such as a colon.
            notify: tell watchers of what is written through this view; None as this store does.

        Raises:
            InvalidKeyError: no key can begin with it.
        """
        joined = namespace_prefix(self._sql.prefix, prefix)
        config = self._config if notify is None else replace(self._config, notify=notify)
        return self._view(config=config, sql=self._sql.of(config, joined))

    def table(self, name: str, **options: Unpack[TableOptions]) -> Self:
        """Return a store for another table over the same connections.

        Args:
            name: the table's name.
            **options: ``schema``, ``table_type``, ``auto_create_table``, ``ttl_cleanup_strategy``,
                ``max_key_length``, ``max_value_size``, ``on_error``, ``max_entries``, ``max_bytes``,
                ``transforms``, ``notify``; the others are this store's.

        Raises:
            ConfigError: the name cannot be a table name, or there is no such option.
        """
        config = table_config(self._config, name, options)
        return self._view(config=config, sql=self._sql.of(config))

    def _each(self) -> list[Self]:
        """The stores that have one table each: this one, or those of a sharded store's slots."""
        return [self]

    def _whole_table(self, action: str) -> Statements:
        """The statements, for what acts on the whole table; a namespace refuses that."""
        if self._sql.prefix:
            raise ConfigError(
                f"{action}() acts on the whole table; call it on the store, not on its namespace "
                f"{self._sql.prefix!r} (clear() keeps to a namespace)"
            )
        return self._sql

    def _conninfo(self) -> str:
        """What the connection of `load` is opened with; refused inside a transaction."""
        channel = self._bare
        if isinstance(channel, InTransaction):
            raise ConfigError("load: it has a transaction of its own; call it on the store itself")
        return str(getattr(channel, "_inner", channel).conninfo())
