"""`pgkv doctor`: what it finds, on tables and servers made ill on purpose."""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

pytest.importorskip("typer")
pytest.importorskip("rich")

from pgkv import (
    AesGcmSiv,
    Config,
    Pooler,
    Store,
    StoreUnavailableError,
    TableType,
    TtlCleanupStrategy,
    Zstd,
    fence_sql,
)
from pgkv._cli.doctor.examine import Finding
from pgkv._cli.doctor.examine import examine as _examine
from pgkv.cli import main
from pgkv.testing import ServerClock
from tests import pgbouncer, servers
from tests.servers import Server, UserServer, wait_until

# What the Rust crate pgkv creates.
RUST_TABLE = """
CREATE UNLOGGED TABLE kv_store (
    key TEXT PRIMARY KEY, value BYTEA NOT NULL, expires_at TIMESTAMPTZ,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(), updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW());
CREATE INDEX idx_kv_store_expires_at ON kv_store (expires_at) WHERE expires_at IS NOT NULL;
"""
OF_THE_SERVER = ["server", "writes", "pooler", "pool", "clock", "oldest transaction"]
OF_THE_TABLE = [
    "table",
    "columns",
    "unique key",
    "key's collation",
    "rights",
    "owner and triggers",
    "index on expires_at",
    "heap-only updates",
    "dead rows",
    "expired rows",
]


def examine(dsn: str, **options: Any) -> dict[str, Finding]:
    return {found.check: found for found in _examine(Config(dsn, **options))}


def execute(dsn: str, commands: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(commands.encode())


def schema_of(dsn: str) -> str:
    found = re.search(r"search_path=(\w+)", dsn)
    assert found is not None
    return found[1]


@pytest.fixture
def role(dsn: str, server: Server | UserServer) -> Iterator[str]:
    """A role without any right, but to log in; its name is that of the test's schema."""
    name = sql.Identifier(schema_of(dsn))
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(name))
        yield schema_of(dsn)
        conn.execute(sql.SQL("DROP OWNED BY {}").format(name))
        conn.execute(sql.SQL("DROP ROLE {}").format(name))


def test_a_fresh_table_is_in_order(dsn: str) -> None:
    """Each check is made, and nothing is found wanting."""
    with Store.connect(dsn) as store:
        store.set("k", "v")
    found = examine(dsn)
    assert list(found) == [*OF_THE_SERVER, *OF_THE_TABLE, "emptied by a crash"]
    assert {each.check: each for each in found.values() if each.status != "ok"} == {}
    with Store.connect(dsn, table_name="logged", table_type=TableType.REGULAR):
        pass
    assert list(examine(dsn, table_name="logged")) == [*OF_THE_SERVER, *OF_THE_TABLE]


def test_the_command_says_what_it_found(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines in a pipe, JSON on request; exit code 1 when a check failed."""
    with Store.connect(dsn):
        pass
    assert main(["doctor", "--dsn", dsn]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok\tserver\tPostgreSQL")
    assert main(["doctor", "--dsn", dsn, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"]
    execute(dsn, "ALTER TABLE kv_store DROP COLUMN value")
    assert main(["doctor", "--dsn", dsn, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["healthy"]
    assert [each["check"] for each in found["findings"] if each["status"] == "fail"] == ["columns"]


def test_a_table_of_the_rust_crate(dsn: str) -> None:
    """It works; what would make it better is said, and helps."""
    execute(dsn, RUST_TABLE)
    found = examine(dsn)
    assert {each.check for each in found.values() if each.status != "ok"} == {
        "columns",
        "key's collation",
        "index on expires_at",
    }
    assert all(each.status != "fail" for each in found.values())
    assert "create_table()" in found["columns"].advice
    with Store.connect(dsn) as store:
        store.set("k", "v")
    for check in ("key's collation", "index on expires_at"):
        command = found[check].advice.split(": ", 1)[1].split(" (a Rust")[0]
        execute(dsn, command)
    assert all(each.status == "ok" for each in examine(dsn).values())


def test_an_index_in_disguise(dsn: str) -> None:
    """Also an index whose expression or condition alone names a column that updates change."""
    with Store.connect(dsn):
        pass
    execute(dsn, "CREATE INDEX by_size ON kv_store (octet_length(value))")
    execute(dsn, "CREATE INDEX partial ON kv_store (created_at) WHERE version > 5")
    found = examine(dsn)["index on expires_at"]
    assert found.status == "warn"
    assert "by_size on value" in found.detail
    assert "partial on version" in found.detail


def test_a_lock_table_of_an_early_version(dsn: str) -> None:
    """The index that it does not need is named, with what removes it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE kv_store_locks (key text PRIMARY KEY, version bigint)")
        with Store.connect(dsn):
            assert "lock tables" not in examine(dsn)
        conn.execute("ALTER TABLE kv_store_locks ADD UNIQUE (key, version)")
        found = examine(dsn)["lock tables"]
        assert (found.status, "kv_store_locks:" in found.detail) == ("warn", True)
        conn.execute(found.advice.encode())
    assert "lock tables" not in examine(dsn)


def test_a_missing_table(dsn: str) -> None:
    """No table is no illness where the role may create one."""
    found = examine(dsn)
    assert list(found) == [*OF_THE_SERVER, "table"]
    assert found["table"].status == "warn"
    assert "the first write creates it" in found["table"].advice
    found = examine(dsn, schema="no_such_schema")
    assert found["table"].status == "warn"
    assert "no_such_schema does not exist" in found["table"].detail


def test_missing_rights(dsn: str, role: str) -> None:
    """What the role lacks is named, with the GRANT that helps: schema, table, columns."""
    theirs = make_conninfo(dsn, user=role)
    schema = schema_of(dsn)
    found = examine(theirs, schema=schema)["table"]
    assert found.status == "fail"
    assert f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}"' in found.advice
    execute(dsn, f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}"')
    found = examine(theirs, schema=schema)["table"]
    assert found.status == "fail"
    assert "cannot create it" in found.detail
    with Store.connect(dsn):
        pass
    execute(dsn, f'GRANT SELECT, INSERT ON kv_store TO "{role}"')
    found = examine(theirs)["rights"]
    assert found.status == "fail"
    assert "lacks UPDATE, DELETE" in found.detail
    execute(dsn, found.advice.split(": ", 1)[1])
    found = examine(theirs)["rights"]
    assert found.status == "ok"
    assert "need the table's owner" in found.detail
    execute(dsn, "ALTER TABLE kv_store DROP COLUMN version")
    found = examine(theirs)["columns"]
    assert found.status == "fail"
    assert "ALTER TABLE" in found.advice


def test_a_table_that_a_stranger_planted(dsn: str, role: str) -> None:
    """Another role's table in a schema of the search_path is warned of, until the schema is named or
    the owner is one of ours; so is a trigger, whose code has the rights of those who write."""
    schema = schema_of(dsn)
    other = f"{role}_2"
    execute(dsn, f'CREATE ROLE "{other}"; GRANT USAGE, CREATE ON SCHEMA "{schema}" TO "{other}"')
    try:
        with Store.connect(dsn):
            pass
        execute(dsn, f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}"')
        theirs = make_conninfo(dsn, user=role)
        found = examine(theirs)["owner and triggers"]
        assert found.status == "ok", "a superuser's"
        execute(dsn, f'ALTER TABLE kv_store OWNER TO "{other}"')
        found = examine(theirs)["owner and triggers"]
        assert found.status == "warn"
        assert other in found.detail
        assert f"CREATE ON SCHEMA {schema}" in found.advice
        assert examine(theirs, schema=schema)["owner and triggers"].status == "ok"
        execute(dsn, f'GRANT "{other}" TO "{role}"')
        assert examine(theirs)["owner and triggers"].status == "ok"
        execute(
            dsn,
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
            'CREATE TRIGGER "Mine" BEFORE INSERT ON kv_store FOR EACH ROW EXECUTE FUNCTION f()',
        )
        found = examine(theirs, schema=schema)["owner and triggers"]
        assert found.status == "warn"
        execute(dsn, found.advice.split(": ", 1)[1])
        execute(dsn, fence_sql("kv_store", "version"))
        assert examine(theirs)["owner and triggers"].status == "ok"
    finally:
        execute(dsn, f'DROP OWNED BY "{other}" CASCADE; DROP ROLE "{other}"')


@pytest.mark.parametrize(
    ("commands", "check"),
    [
        ("CREATE VIEW kv_store AS SELECT 1 AS x", "table"),
        ("CREATE TABLE kv_store (id int)", "columns"),
        ("CREATE TABLE kv_store (key int, value bytea, expires_at timestamptz, "
         "created_at timestamptz, updated_at timestamptz, version bigint)", "columns"),
        ("CREATE TABLE kv_store (key text, value bytea, expires_at timestamptz, "
         "created_at timestamptz, updated_at timestamptz, version bigint)", "unique key"),
    ],
)  # fmt: skip
def test_what_is_no_store(dsn: str, commands: str, check: str) -> None:
    """Another application's table or view is a failure of the check that tells."""
    execute(dsn, commands)
    assert examine(dsn)[check].status == "fail"


def test_read_only_transactions(dsn: str) -> None:
    """A server that takes no writes now is a failure; the table is examined all the same."""
    with Store.connect(dsn):
        pass
    options = conninfo_to_dict(dsn)["options"]
    found = examine(make_conninfo(dsn, options=f"{options} -c default_transaction_read_only=on"))
    assert found["writes"].status == "fail"
    assert found["columns"].status == "ok"


def test_a_standby(make_server: Callable[..., Server]) -> None:
    """On a standby the advice is the primary; an UNLOGGED table there cannot be read, which hides
    nothing else."""
    server = make_server()
    with Store.connect(server.dsn):
        pass
    server.stop()
    signal = server._cluster.pgdata / "standby.signal"
    signal.touch()
    if account := servers.server_account():
        os.chown(signal, account.uid, account.gid)
    server.start()
    found = examine(server.dsn)
    assert found["writes"].status == "fail"
    assert "standby" in found["writes"].detail
    assert found["columns"].status == "ok"
    assert "expired rows" in found


def test_a_crash_that_emptied_the_table(make_server: Callable[..., Server]) -> None:
    """A table that had rows when it was analyzed, and lost its pages without a vacuum, was emptied by
    a crash; a cleared, truncated or never filled one was not."""
    server = make_server()
    with Store.connect(server.dsn) as store:
        store.set_many({f"k{number}": "v" * 100 for number in range(2000)})
        assert examine(server.dsn)["emptied by a crash"].status == "ok"
        store.analyze()
        store.table("cleared").set_many({f"k{number}": "v" * 100 for number in range(2000)})
        store.table("cleared").analyze()
        store.table("cleared").clear()
        store.table("cleared").vacuum()
        store.table("cut").set_many({f"k{number}": "v" * 100 for number in range(2000)})
        store.table("cut").analyze()
        store.table("cut").truncate()
    for name in ("kv_store", "cleared", "cut"):
        assert examine(server.dsn, table_name=name)["emptied by a crash"].status == "ok"
    server.restart("immediate")
    found = examine(server.dsn)["emptied by a crash"]
    assert found.status == "warn"
    assert "very likely" in found.detail
    assert "about 2,000 rows" in found.detail
    for name in ("cleared", "cut"):
        assert examine(server.dsn, table_name=name)["emptied by a crash"].status == "ok"


def test_updates_that_are_not_heap_only(dsn: str) -> None:
    """An index on expires_at shows in the ratio too, once there are updates to judge by."""
    with Store.connect(dsn) as store:
        store.set("k", "v")
        execute(dsn, "CREATE INDEX ON kv_store (expires_at)")
        for number in range(21):
            store.set_many({f"k{key}": str(number) for key in range(500)}, ttl=100 + number)
    deadline = time.monotonic() + servers.PATIENCE  # the server's counters follow when they do
    found = examine(dsn)["heap-only updates"]
    while "too few" in found.detail and time.monotonic() < deadline:
        time.sleep(0.05)
        found = examine(dsn)["heap-only updates"]
    assert found.status == "warn"
    assert "SET (fillfactor = 60)" in found.advice


def test_vacuum_turned_off(dsn: str) -> None:
    """A table without autovacuum is noticed."""
    with Store.connect(dsn):
        pass
    execute(dsn, "ALTER TABLE kv_store SET (autovacuum_enabled = off)")
    found = examine(dsn)["dead rows"]
    assert found.status == "warn"
    assert "autovacuum is off" in found.detail


def test_expired_rows_that_pile_up(dsn: str, clock: ServerClock) -> None:
    """More than a quarter expired is worth a sweep, also where only a sample is read."""
    with Store.connect(dsn, ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL) as store:
        store.set_many({f"k{number}": "v" for number in range(2000)}, ttl=60)
        assert examine(dsn)["expired rows"].status == "ok"
        clock.advance(3600)
        found = examine(dsn)
        assert found["expired rows"].status == "warn"
        assert "pgkv sweep" in found["expired rows"].advice
        store.cleanup_expired()
    assert examine(dsn)["expired rows"].status == "ok"


def test_a_bound(dsn: str) -> None:
    """A table that evicts is compared with its bound; others have no such check."""
    assert "bound" not in examine(dsn)
    with Store.connect(dsn, ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL) as store:
        store.set_many({f"k{number}": "v" for number in range(300)})
        found = examine(dsn, max_entries=200)["bound"]
        assert (found.status, "the first eviction adds" in found.detail) == ("ok", True)
        bounded = store.table("kv_store", max_entries=200)
        bounded.evict()
        found = examine(dsn, max_entries=200, max_bytes=1 << 20)["bound"]
        assert found.status == "ok"
        assert found.detail.startswith("200 of 200 keys, ")
        bounded.set_many({f"n{number}": "v" for number in range(300)})
        found = examine(dsn, max_entries=200)["bound"]
        assert found.status == "warn"
        assert "pgkv evict" in found.advice


def test_transforms(dsn: str) -> None:
    """Values are counted by the transforms that they were stored with; of two encryption keys it warns."""
    old, new = (AesGcmSiv({n: bytes([n]) * 32}) for n in (1, 2))
    with Store.connect(dsn) as store:
        store.set("plain", "v")
        assert "transforms" not in examine(dsn)
        store.table("kv_store", transforms=[Zstd(), old]).set_many(
            {"a": "v", "b": "v" * 999, "c": "v" * 999}
        )
        found = examine(dsn)["transforms"]
        assert (found.status, found.advice) == ("ok", "")
        assert found.detail == "2 zstd + aes:1, 1 plain, 1 aes:1, of a sample"
        store.table("kv_store", transforms=[new]).set("a", "v")
        found = examine(dsn)["transforms"]
        assert (found.status, "pgkv rewrite" in found.advice) == ("warn", True)


def test_a_large_table_is_sampled(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of pages a sample stands for the table."""
    monkeypatch.setattr("pgkv._cli.doctor.table.SAMPLED_PAGES", 32)
    with Store.connect(dsn) as store:
        store.set_many({f"k{number}": "v" * 200 for number in range(5000)})
    found = examine(dsn)["expired rows"]
    assert "(a sample)" in found.detail


def test_a_clock_that_differs(dsn: str, clock: ServerClock) -> None:
    """An hour between the clocks is a warning that says what suffers by it and what does not."""
    clock.advance(3600)
    found = examine(dsn)["clock"]
    assert found.status == "warn"
    assert "60 min ahead" in found.detail
    assert "expire_at" in found.advice


def test_an_old_transaction(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's open transaction is named by its process."""
    monkeypatch.setattr("pgkv._cli.doctor.server.OLD_TRANSACTION", 0)
    with psycopg.connect(dsn) as conn:
        conn.execute("CREATE TABLE anything (id int)")  # takes a transaction id
        pid = conn.info.backend_pid
        # One of autovacuum's may be older.
        wait_until(
            lambda: f"pg_terminate_backend({pid})" in examine(dsn)["oldest transaction"].advice,
            "it is the oldest",
        )
        assert examine(dsn)["oldest transaction"].status == "warn"
        conn.rollback()


def test_a_pool_larger_than_the_server(dsn: str) -> None:
    """More connections than the server has can never be had."""
    found = examine(dsn, pool_max_size=9999)["pool"]
    assert found.status == "fail"
    assert "lower pool_max_size" in found.advice


def test_a_check_that_cannot_be_made_hides_no_other(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A locked table keeps the checks that read it from an answer, for a bounded time; the rest
    answers."""
    monkeypatch.setattr("pgkv._cli.doctor.examine.CHECK_TIMEOUT", "1s")
    with Store.connect(dsn):
        pass
    with psycopg.connect(dsn) as conn:
        conn.execute("LOCK TABLE kv_store IN ACCESS EXCLUSIVE MODE")
        found = examine(dsn)
        conn.rollback()
    assert found["expired rows"].status == "warn"
    assert "could not be checked" in found["expired rows"].detail
    assert found["columns"].status == "ok"


def test_no_server_is_an_error() -> None:
    """Without a connection there is nothing to examine."""
    with pytest.raises(StoreUnavailableError):
        examine("host=127.0.0.1 port=1")


# -- behind PgBouncer ----------------------------------------------------------------------


def pooler(
    server: Server | UserServer, mode: str, *, ignores_options: bool
) -> contextlib.AbstractContextManager[str]:
    """A PgBouncer in front of the server; gives its DSN."""
    if not isinstance(server, Server):
        pytest.skip("PgBouncer needs the password of PGKV_TEST_DSN's server")
    ignored = ["ignore_startup_parameters = options"] if ignores_options else []
    return pgbouncer.started(server.dsn, f"pool_mode = {mode}", "default_pool_size = 3", *ignored)


@pgbouncer.needed
def test_a_pooler_in_transaction_mode(dsn: str, server: Server | UserServer) -> None:
    """It is recognised also where it lets the session's settings pass unheeded, and pgkv has to know
    of it."""
    schema = schema_of(dsn)
    with Store.connect(dsn), pooler(server, "transaction", ignores_options=True) as pooled:
        found = examine(pooled, schema=schema)
        assert found["pooler"].status == "fail"
        assert "Pooler.TRANSACTION" in found["pooler"].advice
        assert found["columns"].status == "ok"
        found = examine(pooled, schema=schema, pooler=Pooler.TRANSACTION)
        assert found["pooler"].status == "ok"
        assert "transaction mode" in found["pooler"].detail


@pgbouncer.needed
def test_a_pooler_that_refuses_settings(dsn: str, server: Server | UserServer) -> None:
    """PgBouncer as it comes refuses a session's settings: doctor goes on without them."""
    schema = schema_of(dsn)
    with Store.connect(dsn), pooler(server, "transaction", ignores_options=False) as pooled:
        found = examine(pooled, schema=schema)
        assert found["pooler"].status == "fail"
        assert "refuses" in found["pooler"].detail
        assert found["columns"].status == "ok"
        assert main(["get", "k", "--dsn", pooled, "--schema", schema]) == 3
        assert (
            main(["get", "k", "--dsn", pooled, "--schema", schema, "--pooler", "transaction"]) == 1
        )
        assert (
            main(["set", "k", "v", "--dsn", pooled, "--schema", schema, "--pooler", "transaction"])
            == 0
        )


@pgbouncer.needed
def test_a_pooler_in_session_mode(dsn: str, server: Server | UserServer) -> None:
    """A pooler that shares nothing is seen, and is a matter of the right setting."""
    with Store.connect(dsn), pooler(server, "session", ignores_options=True) as pooled:
        found = examine(pooled, schema=schema_of(dsn))["pooler"]
        assert found.status == "warn"
        assert "not seen to share" in found.detail


def test_a_pooler_configured_where_there_is_none(dsn: str) -> None:
    """Prepared statements are given up for nothing."""
    found = examine(dsn, pooler=Pooler.TRANSACTION)["pooler"]
    assert found.status == "warn"
    assert "Pooler.NONE" in found.advice
