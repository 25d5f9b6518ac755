"""docs/operations.md and docs/monitoring.md, tried on real servers."""

from __future__ import annotations

import configparser
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from tests import pgbouncer
from tests.faults.support import newest
from tests.servers import PATIENCE, Server, wait_until

DOCS = Path(__file__).resolve().parents[2] / "docs"


def fences(page: str, language: str) -> list[str]:
    """The blocks of a page in that language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# -- SQL


@contextlib.contextmanager
def a_busy_store(dsn: str) -> Iterator[None]:
    """Something of everything: each pattern's rows, a guard that is open, and somebody who waits for
    its transaction."""
    with (
        pgkv.Store.connect(dsn) as store,
        psycopg.connect(dsn) as guarding,
        psycopg.connect(dsn) as waiting,
    ):
        store.set_many({f"k{number}": "v" for number in range(100)})
        store.set("gone", "v", ttl=0.001)

        @pgkv.cached(3600, store=store, store_timeout=20, tags=("t",))
        def load(number: int) -> int:
            return number

        load(1)
        load.cache_clear()
        load(1)
        pgkv.RateLimiter(store, "1/h", name="api", timeout=20).hit("ada")
        pgkv.SessionStore(store).create({"a": 1}, user_id="ada")
        with (
            pgkv.Lock(store, "billing", fair=True, metadata={"job": 7}).acquire() as lease,
            pgkv.Semaphore(store, "gpu", slots=2).acquire(),
            pgkv.Lock(store, "brief", durable=False).acquire(),
        ):
            lease.guard(guarding)
            guarding.execute("SELECT 1 FROM kv_store WHERE key = 'k1' FOR UPDATE")
            update = "UPDATE kv_store SET value = '' WHERE key = 'k1'"
            waiter = threading.Thread(target=waiting.execute, args=(update,))
            waiter.start()
            blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            with psycopg.connect(dsn, autocommit=True) as looking:
                wait_until(lambda: looking.execute(blocked).fetchone() == (1,), "one waits")
            try:
                yield
            finally:
                guarding.rollback()
                waiter.join()


def run(conn: psycopg.Connection, block: str) -> list[tuple[Any, ...]] | None:
    """The rows of a block's last statement, one statement at a time: some refuse company."""
    rows = None
    for statement in filter(str.strip, block.split(";\n")):
        cursor = conn.execute(statement.encode())
        rows = cursor.fetchall() if cursor.description else None
    return rows


def test_queries_for_dashboards_show_something(make_server: Callable[..., Server]) -> None:
    """Each query of docs/monitoring.md runs, and has an answer while every pattern is at work."""
    dsn = make_server().dsn
    with a_busy_store(dsn), psycopg.connect(dsn, autocommit=True) as conn:
        answers = {block: run(conn, block) for block in fences("monitoring.md", "sql")}
    assert len(answers) >= 9
    assert [block for block, rows in answers.items() if not rows] == []
    kinds = {row[0] for rows in answers.values() for row in rows or ()}
    assert {"limiter api", "keys", "billing"} <= kinds
    assert any(str(kind).startswith("cached ") for kind in kinds)


def test_statements_of_operations_run(make_server: Callable[..., Server]) -> None:
    """The SQL of docs/operations.md runs from the first block to the last, on the tables that
    `pgkv schema` makes; what collects expired rows collects those."""
    dsn = make_server().dsn
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(pgkv.schema_sql(pgkv.Config(dsn)).encode())
        with pgkv.Store.connect(dsn, auto_create_table=False) as store:
            store.set("stays", "v")
            store.set("goes", "v", expires_at=datetime(2020, 1, 1, tzinfo=UTC))
        for block in fences("operations.md", "sql"):
            run(conn, block)
            if block.startswith("DELETE"):
                assert conn.execute("SELECT key FROM kv_store").fetchall() == [("stays",)]
        seen = run(conn, fences("operations.md", "sql")[0])
        assert seen is not None
        assert seen[0][1] == "logged"


def test_the_tables_are_as_listed(make_server: Callable[..., Server]) -> None:
    """Each table of `pgkv schema` is on the page, logged or not and as full as it says."""
    text = (DOCS / "operations.md").read_text(encoding="utf-8").partition("## The tables")[2]
    listed = {
        name: ("UNLOGGED" if unlogged else "logged", f"fillfactor={fill}")
        for name, unlogged, fill in re.findall(
            r"^\| `(\w+)` \| .*? \| (by `table_type`: UNLOGGED|UNLOGGED)?.*? \| (\d+) \|",
            text,
            re.MULTILINE,
        )
    }
    dsn = make_server().dsn
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(pgkv.schema_sql(pgkv.Config(dsn)).encode())
        rows = run(conn, fences("operations.md", "sql")[0])
    assert rows is not None
    made = {name: (kind, options[0]) for name, kind, options in rows}
    assert listed == made


# -- connections


def test_connections_are_as_many_as_the_page_counts(dsn: str) -> None:
    """A pool's worth; one for the locks of all stores; one that listens, for their wake-ups and for first
    levels; none for sweeps."""
    name = str(conninfo_to_dict(dsn)["application_name"])
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    sweeping = pgkv.TtlCleanupStrategy.BACKGROUND
    with psycopg.connect(dsn, application_name="counts", autocommit=True) as looking:

        def there_are(number: int) -> None:
            found = f"{number} connections"
            wait_until(lambda: looking.execute(query, [name]).fetchone() == (number,), found)

        with (
            pgkv.Store.connect(dsn, pool_max_size=2) as store,
            pgkv.Store.connect(dsn, pool_max_size=1, ttl_cleanup_strategy=sweeping) as other,
        ):
            there_are(1 + 1)
            with store.transaction(), store.transaction():
                there_are(2 + 1)
            lock = pgkv.Lock(store, "a", wakeup="notify")
            lease = lock.acquire()
            with pgkv.Lock(other, "b").acquire():
                there_are(2 + 1 + 1)
            waiter = threading.Thread(target=lambda: lock.acquire(timeout=PATIENCE).release())
            waiter.start()
            there_are(2 + 1 + 1 + 1)
            lease.release()
            waiter.join()

            @pgkv.cached(60, store=store, store_timeout=20, l1=pgkv.L1())
            def load(number: int) -> int:
                return number

            load(1)
            there_are(2 + 1 + 1 + 1)
        there_are(0)


@newest
@pgbouncer.needed
def test_the_poolers_configuration_works(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PgBouncer starts with the page's settings, addresses and accounts aside; a store works through
    it, and doctor is content."""
    pytest.importorskip("rich")
    from pgkv._cli.doctor.examine import examine

    parser = configparser.ConfigParser()
    parser.read_string(fences("operations.md", "ini")[0])
    settings = [
        f"{name} = {value}"
        for name, value in parser["pgbouncer"].items()
        if not name.startswith(("listen_", "auth_"))
    ]
    assert len(settings) >= 3
    with pgbouncer.started(make_server().dsn, *settings) as dsn:
        with pgkv.Store.connect(dsn, pooler=pgkv.Pooler.TRANSACTION) as store:
            for _ in range(3):
                store.increment("n")
        found = examine(pgkv.Config(dsn, pooler=pgkv.Pooler.TRANSACTION))
    assert [each for each in found if each.status == "fail"] == []
    assert "as configured" in next(each.detail for each in found if each.check == "pooler")


# -- the server's settings


def with_setting(dsn: str, setting: str) -> str:
    """The conninfo of sessions that have it."""
    return make_conninfo(dsn, options=f"{conninfo_to_dict(dsn)['options']} -c {setting}")


@contextlib.contextmanager
def a_locked_row(dsn: str) -> Iterator[None]:
    """Somebody else's transaction holds the key k."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn) as conn:
        store.set("k", "v")
        conn.execute("SELECT 1 FROM kv_store WHERE key = 'k' FOR UPDATE")
        yield
        conn.rollback()


def gone(dsn: str, name: str) -> None:
    """Wait until the server has ended the sessions of that name."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    with psycopg.connect(dsn, autocommit=True) as looking:
        wait_until(lambda: looking.execute(query, [name]).fetchone() == (0,), "sessions end")


def test_statement_timeout(dsn: str) -> None:
    """It is a timeout of which the outcome is known."""
    with (
        a_locked_row(dsn),
        pgkv.Store.connect(with_setting(dsn, "statement_timeout=1000")) as store,
        pytest.raises(pgkv.OperationTimeoutError, match="the server cancelled") as caught,
    ):
        store.set("k", "w")
    assert not caught.value.outcome_unknown


def test_lock_timeout(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is repeated by the policy, and then a QueryError that may be repeated."""
    patient = pgkv.RetryPolicy(deadline=60)
    with (
        a_locked_row(dsn),
        pgkv.Store.connect(with_setting(dsn, "lock_timeout=50"), retry=patient) as store,
        pytest.raises(pgkv.QueryError) as caught,
    ):
        store.set("k", "w")
    assert (caught.value.sqlstate, caught.value.retryable) == ("55P03", True)
    assert caplog.text.count("pgkv.retry") == patient.attempts - 1


def test_idle_in_transaction_session_timeout(dsn: str) -> None:
    """It ends a forgotten transaction, of which nothing was committed; the store goes on."""
    idle = with_setting(dsn, "idle_in_transaction_session_timeout=100")
    options: dict[str, Any] = {"application_name": "forgotten", "pool_max_size": 1}
    with pgkv.Store.connect(dsn):  # makes the table, which takes its time
        pass
    with pgkv.Store.connect(make_conninfo(idle, application_name="forgotten"), **options) as store:

        def forget() -> None:
            with store.transaction() as tx:
                tx.set("k", "v")
                gone(dsn, "forgotten")
                tx.set("k", "w")

        with pytest.raises(pgkv.QueryError) as caught:
            forget()
        assert caught.value.sqlstate == "25P03"
        assert store.get("k") is None


def test_idle_session_timeout(dsn: str) -> None:
    """The store reconnects, and nobody notices."""
    idle = make_conninfo(with_setting(dsn, "idle_session_timeout=1000"), application_name="idle")
    with pgkv.Store.connect(idle, retry=None) as store:
        store.set("n", "1")
        gone(dsn, "idle")
        assert store.increment("n") == 2


def test_a_read_only_server(dsn: str) -> None:
    """Reads and ping work, writes are unavailable."""
    with pgkv.Store.connect(dsn) as store:
        store.set("k", "v")
    read_only = with_setting(dsn, "default_transaction_read_only=on")
    with pgkv.Store.connect(read_only, auto_create_table=False, retry=None) as store:
        assert store.get("k") == b"v"
        store.ping()
        with pytest.raises(pgkv.StoreUnavailableError, match="read-only"):
            store.set("k", "w")


# -- upkeep


def test_another_type_on_a_live_table(dsn: str) -> None:
    """SET LOGGED and back while stores work: they wait, and lose nothing."""
    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn, autocommit=True) as conn:
        store.set("n", "0")
        ended = threading.Event()
        done = []

        def work() -> None:
            while not ended.is_set():
                done.append(store.increment("n"))

        with ThreadPoolExecutor() as threads:
            workers = [threads.submit(work) for _ in range(3)]
            for kind in ("LOGGED", "UNLOGGED", "LOGGED"):
                before = len(done)
                conn.execute(f"ALTER TABLE kv_store SET {kind}".encode())
                wait_until(lambda before=before: len(done) > before + 10, "work goes on")  # type: ignore[misc]  # mypy: a default for a lambda's argument
            ended.set()
            for worker in workers:
                worker.result()
        assert store.get("n") == b"%d" % len(done)


def test_the_command_sweeps_sessions(dsn: str) -> None:
    """`pgkv sweep --table kv_store_sessions` collects sessions that have expired, and no others."""
    pytest.importorskip("typer")
    from pgkv.cli import main

    with pgkv.Store.connect(dsn) as store, psycopg.connect(dsn, autocommit=True) as conn:
        sessions = pgkv.SessionStore(store)
        old, new = sessions.create({"a": 1}, user_id="ada"), sessions.create({"a": 1})
        conn.execute(
            "UPDATE kv_store_sessions SET expires_at = statement_timestamp() - interval '1 min'"
            " WHERE user_id = 'ada'"
        )
        assert main(["sweep", "--dsn", dsn, "--table", "kv_store_sessions"]) == 0
        assert conn.execute("SELECT count(*) FROM kv_store_sessions").fetchone() == (1,)
        assert (sessions.load(old.id), sessions.load(new.id) is not None) == (None, True)


@newest
def test_a_patient_policy_bridges_an_outage(
    make_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """With more attempts a call outlives a server that is away for a while; with the default it does
    not."""
    server = make_server(durable=True)
    patient = pgkv.RetryPolicy(attempts=1000, wait_max=0.1, deadline=60)
    with (
        pgkv.Store.connect(server.dsn) as store,
        pgkv.Store.connect(server.dsn, retry=patient, operation_timeout=90) as batch,
        ThreadPoolExecutor() as threads,
    ):
        store.set("k", "v")
        server.stop()
        with pytest.raises(pgkv.StoreUnavailableError):
            store.get("k")
        caplog.clear()
        answer = threads.submit(batch.get, "k")
        wait_until(lambda: caplog.text.count("pgkv.retry") > 5, "it is tried again and again")
        assert not answer.done()
        server.start()
        assert answer.result() == b"v"
