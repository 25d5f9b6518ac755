"""Tables that version 0.1 made, with programs of that version and of this one on them at once.

`before/` has the tables and statements of 0.1 as that version sent them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv.cli import main
from tests.peers import Peer

BEFORE = Path(__file__).parent / "before"
STATEMENTS: dict[str, str] = json.loads((BEFORE / "statements.json").read_text("utf-8"))
ROUNDS = 50
HOUR_NS = 3_600_000_000_000


class Old:
    """A program of 0.1: its statements on one connection."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True)
        self._cursor = psycopg.RawCursor(self.conn)

    def ask(self, name: str, *params: Any) -> tuple[Any, ...] | None:
        return self._cursor.execute(STATEMENTS[name].encode(), params).fetchone()

    def grant(self, name: str) -> int | None:
        """A lock's token, or None while somebody holds it."""
        found = self.ask("lock_grant", name, b"old:1\x1f" + secrets.token_bytes(8), 30.0, "1000")
        return None if found is None else found[0]


@pytest.fixture
def old(dsn: str) -> Iterator[Callable[[], Old]]:
    """Makes old programs, on the tables that they made."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute((BEFORE / "tables.sql").read_bytes())
    made: list[Old] = []

    def make() -> Old:
        made.append(Old(dsn))
        return made[-1]

    yield make
    for each in made:
        each.conn.close()


@pytest.fixture
def store(dsn: str, old: Any) -> Iterator[pgkv.Store]:
    with pgkv.Store.connect(dsn) as made:
        yield made


def at_once(*work: Callable[[], None]) -> None:
    """Each in a thread of its own; the first failure is the test's."""
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(each) for each in work]:
            done.result()


def test_counters(store: pgkv.Store, old: Callable[[], Old]) -> None:
    """Both count on one key."""

    def before(one: Old) -> None:
        for _ in range(ROUNDS):
            one.ask("increment", "n", b"1")

    def now() -> None:
        for _ in range(ROUNDS):
            store.increment("n")

    at_once(partial(before, old()), partial(before, old()), now, now)
    assert store.get("n") == b"%d" % (4 * ROUNDS)
    assert old().ask("get", "n") == (b"%d" % (4 * ROUNDS),)


def test_locks(store: pgkv.Store, old: Callable[[], Old], peer: Peer) -> None:
    """One name has one holder, whichever version; tokens rise across them."""
    lock, tokens = pgkv.Lock(store, "n"), []
    peer.run("CREATE TABLE guarded (n int)")
    peer.run("INSERT INTO guarded VALUES (0)")

    def work(conn: psycopg.Connection, token: int) -> None:
        tokens.append(token)
        row = conn.execute("SELECT n FROM guarded").fetchone()
        assert row is not None
        conn.execute("UPDATE guarded SET n = %s", [row[0] + 1])

    def before(one: Old) -> None:
        for _ in range(ROUNDS):
            while (token := one.grant("n")) is None:
                pass
            work(one.conn, token)
            assert one.ask("lock_release", "n", token) == (0,)

    def now(conn: psycopg.Connection) -> None:
        for _ in range(ROUNDS):
            with lock.acquire() as lease:
                work(conn, lease.token)

    first, second = old(), old()
    at_once(lambda: before(first), lambda: now(second.conn))
    assert peer.one("SELECT n FROM guarded") == 2 * ROUNDS
    assert tokens == sorted(set(tokens))
    with lock.acquire():
        assert first.grant("n") is None


def test_limits(store: pgkv.Store, old: Callable[[], Old], peer: Peer) -> None:
    """Hits of both spend one bucket."""
    limiter = pgkv.RateLimiter(store, "20/h", name="api")
    assert limiter.hit("u")
    (row,) = peer.keys()
    one = old()
    for _ in range(9):
        found = one.ask("limit_hit", row, HOUR_NS // 20, HOUR_NS)
        assert found is not None
        assert found[0]
        assert limiter.hit("u")
    assert limiter.hit("u")
    found = one.ask("limit_hit", row, HOUR_NS // 20, HOUR_NS)
    assert found is not None
    assert not found[0]
    assert not limiter.hit("u")


def test_limits_that_are_soon_full(
    store: pgkv.Store, old: Callable[[], Old], peer: Peer, dsn: str, capsys: Any
) -> None:
    """A bucket that 0.1 charged last is listed, refunded and reset until it is full, as any other."""
    for name in ("clock_timestamp", "statement_timestamp"):
        peer.run(
            f"CREATE FUNCTION {name}() RETURNS timestamptz STABLE LANGUAGE sql AS "
            "$$ SELECT timestamptz '2027-01-01 00:00Z' $$"
        )

    def command(*args: str) -> tuple[int, list[Any]]:
        code = main(["limits", *args, "--dsn", dsn, "--json"])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    limiter, one = pgkv.RateLimiter(store, "20/m", name="api"), old()
    assert limiter.hit("u")
    (row,) = peer.keys()
    assert limiter.reset("u")

    def before() -> None:
        found = one.ask("limit_hit", row, 3_000_000_000, 60_000_000_000)
        assert found is not None
        assert found[0]
        assert limiter.peek("u").remaining == 19

    before()
    (shown,) = command()[1]
    assert (shown["limiter"], shown["buckets"], round(shown["full_in"], 3)) == ("api", 1, 3.0)
    fills: list[Callable[[], bool]] = [
        lambda: command("u", "--reset") == (0, [{"reset": 1}]),
        lambda: limiter.reset("u"),
        lambda: limiter.refund("u"),
    ]
    for fill in fills:
        assert fill()
        assert limiter.peek("u").remaining == 20
        assert not limiter.reset("u")
        assert not limiter.refund("u")
        assert command() == (0, [])
        before()


def test_sessions(store: pgkv.Store, old: Callable[[], Old]) -> None:
    """A session that 0.1 made is loaded and saved, and read by it again."""
    sessions, one = pgkv.SessionStore(store), old()
    made = sessions.create({"n": 1}, user_id="u")
    (row,) = one.conn.execute("SELECT id FROM kv_store_sessions").fetchall()
    one.conn.execute("DELETE FROM kv_store_sessions")
    one.ask("session_create", row[0], "u", '{"n": "2"}', "null", "1 hour", "1 day")
    found = sessions.load(made.id)
    assert found is not None
    assert (found.data["n"], found.user_id) == (2, "u")
    found.data["n"] = 3
    sessions.save(found)
    again = one.ask("session_load", row[0], "1 hour", "1 minute")
    assert again is not None
    assert json.loads(again[3]) == {"n": "3"}, "values are JSON texts"


def test_migrate(
    store: pgkv.Store, old: Callable[[], Old], dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pgkv migrate --dry-run` says what is to be done, `migrate` does it once, and both versions go on."""
    pytest.importorskip("typer")
    from pgkv.cli import main

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["migrate", *arguments, "--dsn", dsn])
        return code, capsys.readouterr().out

    code, said = run("--dry-run")
    assert code == 1
    assert said.count("DROP CONSTRAINT") == 2
    assert run("--dry-run") == (code, said), "nothing was changed"
    assert run() == (0, said)
    assert run("--dry-run") == (0, "nothing to do\n")
    token = old().grant("n")
    assert token is not None
    assert pgkv.Lock(store, "n").try_acquire() is None
