"""docs/security.md: the rights that it says are needed are, and no others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import pgkv
from tests.faults.support import newest
from tests.servers import Server

pytestmark = newest
PAGE = Path(__file__).parents[2] / "docs" / "security.md"
RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")


@pytest.fixture
def roles(make_server: Callable[..., Server]) -> tuple[str, str]:
    """A server on which the page's commands were run; the owner's DSN and the application's."""
    server = make_server()
    (commands,) = re.findall(r"```sql\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    ddl = pgkv.schema_sql(pgkv.Config(server.dsn, schema="kv"))
    with server.connect() as conn:
        conn.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        conn.execute(re.sub("^-- here .*$", lambda _: ddl, commands, flags=re.MULTILINE).encode())
    return server.dsn, make_conninfo(server.dsn, user="app")


def use_everything(dsn: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each part of pgkv, as a role that owns nothing."""
    store = pgkv.Store(pgkv.Config(dsn, schema="kv", auto_create_table=False, retry=None))

    def use_store() -> None:
        store.set("k", "v", ttl=0.001)
        store.increment("n")
        store.set_many({"a": "1", "b": "2"})
        assert store.get_many(["a", "b"]) == {"a": b"1", "b": b"2"}
        assert store.delete_many(["a", "b"]) == 2
        store.scan()
        store.cleanup_expired()
        store.stats()
        store.clear()

    def use_limiter() -> None:
        limiter = pgkv.RateLimiter(store, "5/h", name="n", timeout=30)
        assert limiter.hit("u")
        assert pgkv.RateLimiter.hit_many([(limiter, "u", 1), (limiter, "v", 1)])
        assert limiter.reset("u")

    def use_cached() -> None:
        @pgkv.cached(60, store=store, store_timeout=30, on_error="raise", tags=("t",))
        def double(n: int) -> int:
            if n < 0:
                raise ValueError
            return 2 * n

        assert double(1) == 2
        with pytest.raises(ValueError):  # noqa: PT011  # the function's own
            double(-1)
        double.cache_clear()
        pgkv.invalidate_tag("t", store=store)

    def use_locks() -> None:
        for options in ({}, {"durable": False}, {"fair": True}, {"wakeup": "notify"}):
            lock = pgkv.Lock(store, "n", ttl=60, **options)
            with lock.acquire(timeout=20) as lease:
                lease.extend(60)
                with psycopg.connect(dsn) as conn:
                    lease.guard(conn)
        with pgkv.Semaphore(store, "s", slots=2).acquire(timeout=20):
            pass

    def use_sessions() -> None:
        sessions = pgkv.SessionStore(store)
        session = sessions.create({"a": 1}, user_id="u")
        session.data["b"] = 2
        sessions.save(session)
        sessions.rotate(session, user_id="v")
        assert sessions.load(session.id) is not None
        assert sessions.destroy_user("v") == 1
        sessions.purge()

    yield from {
        "store": use_store,
        "limiter": use_limiter,
        "cached": use_cached,
        "locks": use_locks,
        "sessions": use_sessions,
    }.items()
    store.close()


def test_the_documented_rights_are_enough(roles: tuple[str, str]) -> None:
    """A role with the page's GRANTs, which owns nothing, uses every part of pgkv; what changes tables
    is refused."""
    _, app = roles
    for _, use in use_everything(app):
        use()
    with pgkv.Store.connect(app, schema="kv") as store:  # that they are there is enough here too
        for forbidden in (store.truncate, store.vacuum, store.analyze, store.recreate_table):
            with pytest.raises(pgkv.ConfigError, match="lacks a right"):
                forbidden()
    with pytest.raises(pgkv.ConfigError, match="may not create"):
        pgkv.Store.connect(app, schema="kv", table_name="another")


def test_each_documented_right_is_needed(roles: tuple[str, str]) -> None:
    """Without any one of them something is refused, and says so; SELECT alone reads."""
    admin, app = roles
    on_all = "ON ALL TABLES IN SCHEMA kv"
    with psycopg.connect(admin, autocommit=True) as conn:
        for right in RIGHTS:
            conn.execute(f"REVOKE {right} {on_all} FROM app".encode())
            assert list(refused(app)), right
            conn.execute(f"GRANT {right} {on_all} TO app".encode())
        conn.execute(f"REVOKE INSERT, UPDATE, DELETE {on_all} FROM app".encode())
    with pgkv.Store.connect(app, schema="kv") as store:
        assert store.get("k") is None
        store.scan()


def refused(dsn: str) -> Iterator[str]:
    """The parts of pgkv that lack a right."""
    for name, use in use_everything(dsn):
        try:
            use()
        except pgkv.ConfigError as error:
            assert "lacks a right" in str(error)  # noqa: PT017  # some parts do without
            yield name
