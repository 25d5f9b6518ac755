"""What the server refuses for a reason that lies in its set-up: the message names it and the way out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import pgkv
from tests.servers import Server, UserServer


@pytest.fixture
def admin(server: Server | UserServer) -> Iterator[psycopg.Connection]:
    """A superuser's connection to a server of ours."""
    if not server.is_ours:
        pytest.skip("makes roles and databases: not on the server of PGKV_TEST_DSN")
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture
def name() -> str:
    return f"refusal_{secrets.token_hex(4)}"


def test_a_search_path_without_a_schema(server: Server | UserServer) -> None:
    """Where no schema of the search_path exists there is none to create the table in."""
    dsn = make_conninfo(server.dsn, options="-c search_path=no_such_schema")
    with pytest.raises(pgkv.ConfigError, match=r"search_path names no schema.*schema=") as caught:
        pgkv.Store.connect(dsn)
    assert "create_table" in str(caught.value)


def test_row_level_security(dsn: str, admin: psycopg.Connection, name: str) -> None:
    """A row that a policy refuses is not a matter of GRANT."""
    role = sql.Identifier(name)
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn, autocommit=True) as conn:
        (schema,) = conn.execute("SELECT current_schema()").fetchone() or ("",)
        conn.execute("ALTER TABLE kv_store ENABLE ROW LEVEL SECURITY")
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        try:
            conn.execute(sql.SQL("GRANT ALL ON kv_store TO {}").format(role))
            usage = sql.SQL("GRANT USAGE ON SCHEMA {} TO {}")
            conn.execute(usage.format(sql.Identifier(schema), role))
            conn.execute(sql.SQL("SET ROLE {}").format(role))
            with conn.transaction(), pytest.raises(pgkv.ConfigError) as caught:
                store.using(conn).set("k", "v")
        finally:
            conn.execute("RESET ROLE")
            conn.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))
    assert 'ALTER TABLE "kv_store" DISABLE ROW LEVEL SECURITY' in str(caught.value)
    assert "GRANT SELECT" not in str(caught.value)


def test_an_encoding_without_the_character(
    server: Server | UserServer, admin: psycopg.Connection, name: str
) -> None:
    """A database in LATIN1 cannot keep every key; the message names the encoding, not the key."""
    database = sql.Identifier(name)
    admin.execute(
        sql.SQL(
            "CREATE DATABASE {} ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        ).format(database)
    )
    try:
        with pgkv.Store.connect(make_conninfo(server.dsn, dbname=name)) as store:
            store.set("\N{LATIN SMALL LETTER E WITH ACUTE}", "v")
            with pytest.raises(pgkv.InvalidValueError, match=r"LATIN1.*ENCODING 'UTF8'") as caught:
                store.set("\N{SNOWMAN}", "v")
        assert "0xe2" not in str(caught.value)
        assert "\N{SNOWMAN}" not in str(caught.value)
    finally:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))


@pytest.mark.parametrize("wrong", ["user", "dbname"])
def test_a_login_that_is_refused(
    server: Server | UserServer, admin: psycopg.Connection, wrong: str, name: str
) -> None:
    """A wrong role or database is no outage: the error says what to check, and is not retryable."""
    store = pgkv.Store(pgkv.Config(make_conninfo(server.dsn, **{wrong: name})))
    with store, pytest.raises(pgkv.StoreUnavailableError, match="refuses the login") as caught:
        store.get("k")
    assert not caught.value.retryable
    assert "check the user" in str(caught.value)
