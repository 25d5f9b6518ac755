"""Config: validated when made, frozen, and silent about passwords."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any, get_type_hints

import pytest
from psycopg.conninfo import conninfo_to_dict

import pgkv
from pgkv import Config, ConfigError, RetryPolicy
from pgkv.config import Options

DSN = "postgresql://user:PASSWORD@host:5433/db?sslpassword=SSLSECRET"


def test_defaults() -> None:
    """Only the DSN is needed."""
    config = Config("postgresql://")
    assert (config.table_name, config.schema) == ("kv_store", None)
    assert config.table_type is pgkv.TableType.UNLOGGED
    assert config.ttl_cleanup_strategy is pgkv.TtlCleanupStrategy.ON_READ
    assert (config.max_key_length, config.max_value_size) == (1024, 100 * 1024 * 1024)
    assert config.pooler is pgkv.Pooler.NONE
    assert config.retry == RetryPolicy(
        attempts=4, wait_initial=0.02, wait_max=1.0, deadline=5.0, repeat_writes=True
    )


def test_frozen_and_comparable() -> None:
    """A configuration cannot be changed; equal ones are equal, and usable as dict keys."""
    config = Config("postgresql://")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.table_name = "other"  # type: ignore[misc]  # that is the test
    assert config == Config("postgresql://")
    assert len({config, Config("postgresql://"), Config("postgresql://", table_name="t")}) == 2


def test_durations_may_be_timedeltas() -> None:
    """Durations become seconds."""
    config = Config("postgresql://", operation_timeout=timedelta(minutes=1), pool_timeout=3)  # type: ignore[arg-type]  # accepted, kept as float
    assert (config.operation_timeout, config.pool_timeout) == (60.0, 3.0)
    assert isinstance(config.pool_timeout, float)


@pytest.mark.parametrize(
    "dsn",
    [
        DSN,
        "host=h user=u password=PASSWORD sslpassword='SSLSECRET'",
        "postgresql://h/db?user=u&password=PASSWORD",
        "postgresql://user:PASS%57ORD@host/db",
    ],
)
def test_repr_shows_no_password(dsn: str) -> None:
    """repr, str and safe_dsn show where to, without password."""
    config = Config(dsn, table_name="t")
    for text in (repr(config), str(config), config.safe_dsn, f"{config}"):
        assert "PASSWORD" not in text
        assert "SSLSECRET" not in text
    assert "***" in config.safe_dsn
    assert "table_name='t'" in repr(config)
    assert "pool_max_size" not in repr(config)  # defaults are left out


def test_repr_shows_where_to() -> None:
    """What is no secret stays readable."""
    assert "host=host" in Config(DSN).safe_dsn
    assert "port=5433" in Config(DSN).safe_dsn


BAD: list[tuple[str, Any, str]] = [
    ("dsn", "", "non-empty"),
    ("dsn", "  ", "non-empty"),
    ("dsn", None, "libpq URI"),
    ("dsn", 7, "libpq URI"),
    ("dsn", b"postgresql://", "libpq URI"),
    ("dsn", "postgresql://\0", "NUL"),
    ("dsn", "mysql://u@h/d", "scheme 'mysql'"),
    ("dsn", "postgresql+psycopg://u@h/d", "drop what follows"),
    ("dsn", "postgres+asyncpg://u@h/d", "drop what follows"),
    ("dsn", "not a dsn", "neither a URI nor a conninfo string"),
    ("dsn", "hots=localhost", "not a valid libpq"),
    ("dsn", "postgresql://u:p%zz@h/d", "not a valid libpq"),
    ("table_name", "", "non-empty"),
    ("table_name", None, "non-empty"),
    ("table_name", 7, "non-empty"),
    ("table_name", "a\0b", "NUL"),
    ("table_name", "\ud800", "surrogate"),
    ("table_name", "x" * 55, "at most 54"),
    ("table_name", "ž" * 28, "at most 54"),
    ("schema", "", "non-empty"),
    ("schema", "x" * 64, "at most 63"),
    ("schema", "a\0", "NUL"),
    ("table_type", "unlogged", "TableType.UNLOGGED"),
    ("table_type", None, "TableType.REGULAR"),
    ("ttl_cleanup_strategy", "manual", "TtlCleanupStrategy.MANUAL"),
    ("pooler", True, "Pooler.TRANSACTION"),
    ("auto_create_table", 1, "True or False"),
    ("coalesce", None, "True or False"),
    ("max_key_length", 0, "from 1 to 2,600"),
    ("max_key_length", 2601, "from 1 to 2,600"),
    ("max_key_length", 10.0, "integer"),
    ("max_key_length", True, "integer"),
    ("max_value_size", 0, "from 1"),
    ("max_value_size", (1 << 30) + 1, "from 1"),
    ("pool_max_size", 0, "from 1"),
    ("pool_max_size", "10", "integer"),
    ("pool_min_size", -1, "from 0"),
    ("pool_min_size", 11, "from 0 to 10"),
    ("connect_timeout", 0, "more than 0"),
    ("connect_timeout", -1, "more than 0"),
    ("connect_timeout", float("nan"), "seconds"),
    ("connect_timeout", float("inf"), "seconds"),
    ("operation_timeout", None, "seconds"),
    ("operation_timeout", 10**400, "seconds"),
    ("operation_timeout", 1e10, "up to 1,000,000,000"),
    ("operation_timeout", "30", "seconds"),
    ("operation_timeout", True, "seconds"),
    ("pool_timeout", timedelta(0), "more than 0"),
    ("application_name", None, "without NUL"),
    ("application_name", "a\0", "without NUL"),
    ("retry", 3, "RetryPolicy, or None"),
    ("retry", {"attempts": 3}, "RetryPolicy, or None"),
]


@pytest.mark.parametrize(("field", "value", "why"), BAD)
def test_refusals(field: str, value: Any, why: str) -> None:
    """Each bad setting is a ConfigError that names the field and what it accepts."""
    settings = {"dsn": "postgresql://"} | {field: value}
    with pytest.raises(pgkv.ConfigError) as caught:
        Config(**settings)
    assert field in str(caught.value)
    assert why in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempts", 0),
        ("attempts", True),
        ("attempts", 1.5),
        ("wait_initial", -1),
        ("wait_max", float("nan")),
        ("deadline", float("inf")),
        ("deadline", "5"),
    ],
)
def test_refused_retry_policies(field: str, value: Any) -> None:
    """Each bad number of a RetryPolicy is a ConfigError that names it."""
    with pytest.raises(pgkv.ConfigError, match=field):
        RetryPolicy(**{field: value})


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://",
        "postgres://user@host/db",
        "host=localhost dbname=db",
        "dbname=a://b",
        "service=x",
        "embedded:///var/lib/x",
        "postgresql://a,b/db?target_session_attrs=read-write",
    ],
)
def test_accepted_dsns(dsn: str) -> None:
    """libpq's URIs and key=value strings, and embedded:///path, are taken."""
    assert Config(dsn).dsn == dsn


def test_limits_themselves_fit() -> None:
    """The largest names and sizes are accepted."""
    config = Config(
        "postgresql://", table_name="x" * 54, schema="ž" * 31, max_key_length=2600,
        max_value_size=1 << 30, pool_min_size=10, pool_max_size=10,
    )  # fmt: skip
    assert config.table.quoted == f'"{"ž" * 31}"."{"x" * 54}"'


def test_quoting() -> None:
    """A name is quoted so that it reads back unchanged."""
    assert (
        Config("postgresql://", table_name='a"b;c', schema="S x").table.quoted == '"S x"."a""b;c"'
    )


def test_dsn_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a DSN PGKV_DSN counts, else DATABASE_URL, else it is a ConfigError that says so."""
    monkeypatch.delenv("PGKV_DSN", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with pytest.raises(pgkv.ConfigError, match="PGKV_DSN"):
        pgkv.Store.connect()
    monkeypatch.setenv("DATABASE_URL", "mysql://one")
    with pytest.raises(pgkv.ConfigError, match="mysql"):
        pgkv.Store.connect()
    monkeypatch.setenv("PGKV_DSN", "oracle://two")
    with pytest.raises(pgkv.ConfigError, match="oracle"):
        pgkv.Store.connect()


def test_options_are_the_fields() -> None:
    """What connect() takes as keywords, as type checkers see it, are the fields of a Config."""
    fields = {field.name for field in dataclasses.fields(Config)} - {"dsn"}
    assert fields == get_type_hints(Options, localns={"Seconds": float}).keys()


def test_unknown_options() -> None:
    """A misspelled option is a ConfigError that lists what there is."""
    with pytest.raises(pgkv.ConfigError, match=r"no option 'pool_size'.*pool_max_size"):
        pgkv.Store.connect("postgresql://", pool_size=3)  # type: ignore[call-arg]  # that is the test


# -- connection parameters -------------------------------------------------------------------


def test_from_parameters() -> None:
    """A mapping of libpq's parameters is a DSN; psycopg's own and what is None have no effect."""
    given = {
        "host": "db",
        "port": 5433,
        "dbname": "my app",
        "password": "it's/@",
        "user": None,
        "cursor_factory": object,
    }
    config = Config.from_parameters(given, table_name="t", pool_timeout=timedelta(seconds=3))
    assert conninfo_to_dict(config.dsn) == {
        "host": "db",
        "port": "5433",
        "dbname": "my app",
        "password": "it's/@",
    }
    assert (config.table_name, config.pool_timeout) == ("t", 3.0)
    assert "it's" not in repr(config)
    assert Config.from_parameters({}).dsn == "postgresql://"


@pytest.mark.parametrize(
    ("parameters", "why"),
    [({"hots": "db"}, "no connection parameter 'hots'"), ({"host": b"db"}, "'host' must be a str")],
)
def test_bad_parameters(parameters: Any, why: str) -> None:
    """An unknown parameter, or one of another type, is named."""
    with pytest.raises(ConfigError, match=why):
        Config.from_parameters(parameters)


@pytest.mark.parametrize("value", ["open", None, True])
def test_bad_on_error(value: Any) -> None:
    """on_error is one of two words."""
    with pytest.raises(ConfigError, match="on_error must be 'raise' or 'miss'"):
        Config("postgresql://", on_error=value)
