"""What a store can be told: validated when it is made, immutable afterwards.

`Config` never opens a connection. Every refusal is a `ConfigError` that names the field, and no
text of this module shows a password: a DSN appears only through `Config.safe_dsn`.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict, Unpack
from urllib.parse import unquote_to_bytes

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .errors import ConfigError

if TYPE_CHECKING:
    from .transforms import AesGcmSiv, Compression

    Transform: TypeAlias = Compression | AesGcmSiv
else:
    Transform = Any  # loaded where one is used

Seconds: TypeAlias = float | int | timedelta
OnAway: TypeAlias = Literal["raise", "miss"]

EMBEDDED_SCHEME = "embedded://"
ANONYMOUS = "postgresql://"  # says of no server where it is: libpq's defaults
KEY_LENGTH_MAX = 2600  # bytes; a btree entry must fit a third of an 8 kB page (2,704)
ENTRIES_MIN, BYTES_MIN = 100, 1 << 20  # of a bound: a smaller one cannot be kept by samples
IDENTIFIER_MAX = 63  # bytes; PostgreSQL cuts a longer name
TABLE_NAME_MAX = 54  # bytes; what pgkv adds for other tables and indexes is shortened at need
SECONDS_MAX = 1e9  # 31 years; the waits of threads and sockets overflow far beyond
VALUE_SIZE_MAX = 1 << 30  # bytea's own limit, 1 GiB


class TableType(enum.Enum):
    """Whether writes are logged for crash recovery and replicas."""

    UNLOGGED = "unlogged"
    """No write-ahead log: faster, not replicated, **emptied by a server crash**."""
    REGULAR = "regular"
    """Logged: survives a crash, reaches replicas."""


class TtlCleanupStrategy(enum.Enum):
    """How rows whose time has passed are collected. None of them changes what reads return,
    but DISABLED."""

    ON_READ = "on_read"
    """A read that meets an expired row queues its deletion; one write in 256 sweeps a chunk."""
    BACKGROUND = "background"
    """A thread or task sweeps chunk by chunk; of a fleet one process at a time."""
    MANUAL = "manual"
    """Only `cleanup_expired()` collects."""
    DISABLED = "disabled"
    """Nothing is collected and reads return expired keys. Conditional writes still treat them
    as absent."""


class Pooler(enum.Enum):
    """What stands between pgkv and the server."""

    NONE = "none"
    """A direct connection, or a pooler in session mode: statements are prepared."""
    TRANSACTION = "transaction"
    """A pooler in transaction mode (PgBouncer, Supavisor, RDS Proxy): no session state is used.
    Statements are prepared where the pooler keeps them, which the first connection tries."""


@dataclass(frozen=True, slots=True, eq=False)
class TableShape:
    """What a pattern keeps in a table of its own.

    Args:
        suffix: makes the table's name from that of the store's.
        columns: for CREATE TABLE.
        fillfactor: percent. The rest of a page is room for the next versions of its rows, so
            that updates stay heap-only.
        indexes: of each the end of its name and the rest of its definition; a first word UNIQUE
            goes before INDEX.
    """

    suffix: str
    columns: str
    fillfactor: int
    indexes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When and how often a failed operation is repeated.

    What may be repeated at all is fixed by each operation's semantics: one whose outcome is known
    to be "nothing happened" always may; one whose answer was lost only if repeating it is harmless.

    Args:
        attempts: tries in all, the first included.
        wait_initial: seconds before the second try; doubles from there, with full jitter.
        wait_max: seconds, the longest pause.
        deadline: seconds after the first failure, at which no further try begins.
        repeat_writes: also repeat plain ``set``, ``delete`` and ``expire`` whose answer was lost.
            They may then take effect twice, with another write in between: another client's, or
            your own next one, if the server was still at work on the first.

    Raises:
        ConfigError: a number is out of range.
    """

    attempts: int = 4
    wait_initial: float = 0.02
    wait_max: float = 1.0
    deadline: float = 5.0
    repeat_writes: bool = True

    def __post_init__(self) -> None:
        require_int("attempts", self.attempts, 1, 1000)
        require_bool("repeat_writes", self.repeat_writes)
        for name in ("wait_initial", "wait_max", "deadline"):
            object.__setattr__(self, name, require_seconds(name, getattr(self, name), zero=True))


@dataclass(frozen=True, slots=True)
class Table:
    """Which table a statement is about: enough to quote it, and to create it again."""

    name: str
    schema: str | None = None
    type: TableType = TableType.UNLOGGED
    shape: TableShape | None = None  # None: the store's own
    auto_create: bool = True
    bounded: bool = False  # has a column for eviction
    fences: Any = field(
        default=None, repr=False
    )  # of a slot on Citus; tables of two clusters differ
    quoted: str = field(init=False)

    def __post_init__(self) -> None:
        own = quote_identifier(self.name)
        full = own if self.schema is None else f"{quote_identifier(self.schema)}.{own}"
        object.__setattr__(self, "quoted", full)

    def __hash__(self) -> int:
        return hash(self.quoted)  # an Enum's hash is Python code, and this one is asked often


def short_identifier(name: str) -> str:
    """Return a name that PostgreSQL does not cut: a long one ends in a hash of the whole."""
    encoded = name.encode()
    if len(encoded) <= IDENTIFIER_MAX:
        return name
    digest = blake2b(encoded, digest_size=4).hexdigest()
    return f"{encoded[: IDENTIFIER_MAX - 9].decode(errors='ignore')}_{digest}"


def quote_identifier(name: str) -> str:
    """Return the name as SQL reads it back unchanged, whatever it contains."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True, repr=False)
class Config:
    """Everything a :class:`Store` can be told.

    Args:
        dsn: a libpq URI or conninfo string, or ``embedded:///path``.
        table_name: at most 54 bytes; any characters but NUL (it is quoted).
        schema: the table's schema; None leaves it to ``search_path``.
        table_type: UNLOGGED is emptied by a server crash; REGULAR is logged.
        auto_create_table: create the table when it is missing.
        ttl_cleanup_strategy: how expired rows are collected.
        max_key_length: bytes in UTF-8, a namespace's prefix included; at most 2,600.
        max_value_size: bytes.
        connect_timeout: seconds to open one connection, for each host of the DSN.
        operation_timeout: seconds for a whole call: pool wait, connecting, every attempt.
        application_name: what ``pg_stat_activity`` shows.
        pool_min_size: connections kept open. Raise it to spare a first burst its connecting.
        pool_max_size: connections at most. Two per server core serve most loads.
        pool_timeout: seconds to wait for a connection while all are busy.
        pooler: TRANSACTION behind PgBouncer in transaction mode.
        retry: a :class:`RetryPolicy`, or None for a single attempt.
        coalesce: (async) send the operations of one turn of the event loop together.
        on_error: ``"miss"`` for a cache: while the server is away, reads of keys find nothing and
            plain writes are dropped. Conditions, counters, scans and pipelines raise as ever.
        max_entries: evict the oldest keys of a cache beyond about this number; at least 100.
        max_bytes: the same for keys, values and 80 bytes a row; at least 1 MiB. A value may have an
            eighth of it.
        transforms: compression and encryption of values at rest: `Zstd` or `Lz4`, then `AesGcmSiv`.
        notify: tell watchers (`Store.watch`) at once of every key that this store writes.

    Raises:
        ConfigError: names the field and what it accepts.
    """

    dsn: str
    table_name: str = "kv_store"
    schema: str | None = None
    table_type: TableType = TableType.UNLOGGED
    auto_create_table: bool = True
    ttl_cleanup_strategy: TtlCleanupStrategy = TtlCleanupStrategy.ON_READ
    max_key_length: int = 1024
    max_value_size: int = 100 * 1024 * 1024
    connect_timeout: float = 10.0
    operation_timeout: float = 30.0
    application_name: str = "pgkv"
    pool_min_size: int = 1
    pool_max_size: int = 10
    pool_timeout: float = 10.0
    pooler: Pooler = Pooler.NONE
    retry: RetryPolicy | None = field(default_factory=RetryPolicy)
    coalesce: bool = False
    on_error: OnAway = "raise"
    max_entries: int | None = None
    max_bytes: int | None = None
    transforms: Sequence[Transform] = ()
    notify: bool = False

    def __post_init__(self) -> None:
        _require_dsn(self.dsn)
        _require_name("table_name", self.table_name, TABLE_NAME_MAX)
        if self.schema is not None:
            _require_name("schema", self.schema, IDENTIFIER_MAX)
        for name, kind in _ENUMS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                choices = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise ConfigError(f"{name} must be one of {choices}, not {value!r}")
        for name in ("auto_create_table", "coalesce", "notify"):
            require_bool(name, getattr(self, name))
        if self.on_error not in ("raise", "miss"):
            raise ConfigError(f"on_error must be 'raise' or 'miss', not {self.on_error!r}")
        for name, least in (("max_entries", ENTRIES_MIN), ("max_bytes", BYTES_MIN)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), least, 1 << 60)
                if self.ttl_cleanup_strategy is TtlCleanupStrategy.DISABLED:
                    raise ConfigError(f"{name} needs a cleanup strategy other than DISABLED")
        require_int("max_key_length", self.max_key_length, 1, KEY_LENGTH_MAX)
        require_int("max_value_size", self.max_value_size, 1, VALUE_SIZE_MAX)
        require_int("pool_max_size", self.pool_max_size, 1, 10_000)
        require_int("pool_min_size", self.pool_min_size, 0, self.pool_max_size)
        for name in ("connect_timeout", "operation_timeout", "pool_timeout"):
            object.__setattr__(self, name, require_seconds(name, getattr(self, name)))
        application_name: object = self.application_name
        if not isinstance(application_name, str) or "\0" in application_name:
            raise ConfigError("application_name must be a string without NUL")
        if self.transforms != ():
            from .transforms import checked

            object.__setattr__(self, "transforms", checked(self.transforms))
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise ConfigError(
                "retry must be a pgkv.RetryPolicy, or None for a single attempt, not "
                f"{type(self.retry).__name__}"
            )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **config: Unpack[Options]) -> Self:
        """Return the settings for a server named by connection parameters, as frameworks keep them:
        Django's ``connection.get_connection_params()``.

        Args:
            parameters: libpq's, such as ``host``, ``dbname``, ``user`` and ``password``. None counts as
                not given, and what is psycopg's own (such as ``cursor_factory``) has no effect.
            **config: the fields of `Config`.

        Raises:
            ConfigError: a parameter is unknown or has another type; names it.
        """
        known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
        given: dict[str, str | int] = {}
        for name, value in parameters.items():
            if name in _PSYCOPG_PARAMETERS or value is None:
                continue
            if name not in known:
                raise ConfigError(f"there is no connection parameter {name!r}")
            if not isinstance(value, str | int):
                kind = type(value).__name__
                raise ConfigError(f"the connection parameter {name!r} must be a str, not {kind}")
            given[name] = value
        # An empty conninfo is no DSN, although libpq then has its defaults.
        settings: Any = config  # timedeltas are converted when the Config is made
        return cls(make_conninfo("", **given) or ANONYMOUS, **settings)

    @property
    def table(self) -> Table:
        """The key-value table these settings name."""
        return Table(
            self.table_name,
            self.schema,
            self.table_type,
            auto_create=self.auto_create_table,
            bounded=self.bounded,
            fences=getattr(self, "fences", None),
        )

    @property
    def bounded(self) -> bool:
        """Whether rows are evicted."""
        return self.max_entries is not None or self.max_bytes is not None

    @property
    def safe_dsn(self) -> str:
        """The DSN as it may be shown: without any password."""
        return redact(self.dsn)

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(Config)
            if f.name != "dsn" and getattr(self, f.name) != _DEFAULTS[f.name]
        ]
        return f"Config({', '.join([repr(self.safe_dsn), *changed])})"


class TableOptions(TypedDict, total=False):
    """What a table can be told: the fields of `Config` that are about it, as keywords."""

    schema: str | None
    table_type: TableType
    auto_create_table: bool
    ttl_cleanup_strategy: TtlCleanupStrategy
    max_key_length: int
    max_value_size: int
    on_error: OnAway
    max_entries: int | None
    max_bytes: int | None
    transforms: Sequence[Transform]
    notify: bool


class Options(TableOptions, total=False):
    """The fields of `Config` but for the DSN, as keywords: so that type checkers know them."""

    table_name: str
    connect_timeout: Seconds
    operation_timeout: Seconds
    application_name: str
    pool_min_size: int
    pool_max_size: int
    pool_timeout: Seconds
    pooler: Pooler
    retry: RetryPolicy | None
    coalesce: bool


_ENUMS: dict[str, type[enum.Enum]] = {
    "table_type": TableType,
    "ttl_cleanup_strategy": TtlCleanupStrategy,
    "pooler": Pooler,
}


def dsn_from_environment() -> str:
    """Return ``PGKV_DSN``, else ``DATABASE_URL``."""
    for name in ("PGKV_DSN", "DATABASE_URL"):
        if dsn := os.environ.get(name):
            return dsn
    raise ConfigError(
        "no DSN: pass one, such as 'postgresql://user@host/db' or 'embedded:///path', "
        "or set PGKV_DSN (or DATABASE_URL)"
    )


_PSYCOPG_PARAMETERS = (
    *("autocommit", "context", "cursor_factory", "prepare_threshold", "row_factory"),
    "server_side_binding",
)
_SECRETS = ("password", "sslpassword", "oauth_client_secret", "passfile", "sslkey")


def redact(dsn: str) -> str:
    """Return the DSN with every secret replaced by ``***``."""
    try:
        if dsn.startswith(EMBEDDED_SCHEME):
            return dsn
        params = conninfo_to_dict(dsn)
    except (psycopg.ProgrammingError, AttributeError, TypeError, UnicodeError):
        return "<unreadable DSN>"  # a traceback's locals hold a refused Config, whatever it is
    for name in _SECRETS:
        if params.get(name):
            params[name] = "***"
    return make_conninfo("", **{k: v for k, v in params.items() if v is not None})


def _require_dsn(dsn: object) -> None:
    if not isinstance(dsn, str):
        raise ConfigError(f"dsn must be a libpq URI or conninfo string, not {type(dsn).__name__}")
    if not dsn.strip():
        raise ConfigError("dsn must be a non-empty libpq URI or conninfo string")
    if "\0" in dsn:
        raise ConfigError("dsn must not contain NUL")
    if dsn.startswith(EMBEDDED_SCHEME):
        embedded_path(dsn)
        return
    if "://" not in dsn and "=" not in dsn:
        raise ConfigError(
            "dsn is neither a URI nor a conninfo string; write 'postgresql://user@host/db', "
            "'host=... dbname=...' or 'embedded:///path'"
        )
    scheme, found, _ = dsn.partition("://")
    # A key=value conninfo has no scheme before its first "=".
    if found and "=" not in scheme and scheme not in ("postgresql", "postgres"):
        advice = (
            "drop what follows 'postgresql'"
            if scheme.startswith("postgres")
            else ("pgkv speaks to PostgreSQL: postgresql://user@host/db")
        )
        raise ConfigError(f"dsn has the scheme {scheme!r}; {advice}")
    try:
        readable = not _splits_password(dsn, conninfo_to_dict(dsn))
    except (psycopg.ProgrammingError, UnicodeError):
        readable = False
    if not readable:
        # Raised outside: libpq quotes the part it stumbled over, which may be the password.
        raise ConfigError(
            "dsn is not a valid libpq URI or conninfo string; characters such as @ / : # % "
            "in a password must be percent-encoded in a URI"
        )


def embedded_path(dsn: str) -> str | None:
    """The path in ``embedded:///path``, percent-decoded; None for ``embedded:///``, the default.

    Raises:
        ConfigError: it is anything else.
    """
    rest = dsn.removeprefix(EMBEDDED_SCHEME)
    # The messages do not quote it: another kind of DSN may hold a password.
    if rest == dsn or (rest and not rest.startswith("/")):
        raise ConfigError(
            "an embedded server is named embedded:///absolute/path, or embedded:/// alone"
        )
    if "?" in rest or "#" in rest:
        raise ConfigError(
            "the name of an embedded server takes no parameters; in a path write %3F for ? and"
            " %23 for #"
        )
    return os.fsdecode(unquote_to_bytes(rest)) if rest.strip("/") else None


def _splits_password(dsn: str, params: dict[str, Any]) -> bool:
    """Whether an unencoded @ or / made libpq take a part of the password for a host or a port.

    It would accept that, and show the part in "cannot resolve host".
    """
    scheme, found, rest = dsn.partition("://")
    if not found or "=" in scheme:
        return False
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    ports = str(params.get("port") or "").split(",")
    return authority.count("@") > 1 or any(port and not port.isdigit() for port in ports)


def _require_name(name: str, value: object, length_max: int) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a non-empty string")
    if "\0" in value:
        raise ConfigError(f"{name} must not contain NUL")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{name} holds a lone surrogate, which UTF-8 cannot express") from None
    if length > length_max:
        raise ConfigError(
            f"{name} is {length} bytes long; at most {length_max} fit "
            "(PostgreSQL would cut the rest off in silence)"
        )


def require_bool(name: str, value: object) -> None:
    """Refuse a setting that is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False")


def require_int(name: str, value: object, low: int, high: int) -> None:
    """Refuse a setting that is no integer within its bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low:,} to {high:,}, not {value!r}")


def require_seconds(name: str, value: object, *, zero: bool = False) -> float:
    """Return a setting that is a duration, in seconds."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    # Compared, not converted: an int may be too large for a float.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not -SECONDS_MAX <= value <= SECONDS_MAX
    ):
        raise ConfigError(
            f"{name} must be seconds (a number or a timedelta) up to {SECONDS_MAX:,.0f}, not "
            f"{value!r}"
        )
    if value < 0 or (value == 0 and not zero):
        least = "0 seconds or more" if zero else "more than 0 seconds"
        raise ConfigError(f"{name} must be {least}, not {value!r}")
    return float(value)


def require_config(given: object, what: str) -> None:
    """Refuse what is no Config."""
    if not isinstance(given, Config):
        raise ConfigError(
            f"{what} takes a pgkv.Config, not {type(given).__name__}"
            + (f"; a DSN goes to {what}.connect()" if what.endswith("Store") else "")
        )


_DEFAULTS: dict[str, Any] = {
    f.name: f.default_factory() if callable(f.default_factory) else f.default
    for f in fields(Config)
}
