"""Every two operations on the rows of cached functions, overlapping: see `pairs`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgkv import Store, TtlCleanupStrategy
from pgkv._ops.lazy import cached_property
from pgkv._ops.op import Op, Statement
from pgkv.patterns.cache import sql as cache_sql
from pgkv.patterns.cache.sql import CacheStatements, ComputeLease
from tests.interleavings.pairs import Operation, Pairs, pairs_of

VERSION = 7
ENTRY_KEY, TAG_KEY, FUNCTION_KEY = b"entry", b"tag", b"function"
PLACEHOLDER = b"~" * 17
ENTRY = b"\x01" * 17 + b"old"
MARK = ENTRY[:17]
SECONDS = {"a": 10_000.0, "b": 20_000.0}


class Rows(NamedTuple):
    """The statements, and what performs them."""

    store: Store
    sql: CacheStatements

    def run(self, op: Op[Any]) -> Any:
        return self.store._execute(op)


def new(side: str) -> bytes:
    return b"~" + side.encode() * 16


def value(side: str) -> bytes:
    return b"\x01" + side.encode() * 20


def leased(lease: ComputeLease) -> Any:
    """Whether it was granted; of a denial what stands there, or that the row is locked."""
    if lease.version is not None:
        return "granted"
    locked = lease.held and lease.remaining is not None and lease.remaining <= 0
    return "locked" if locked else lease.held[:17]


def upkeep(_count: object) -> None:
    """How many rows were removed is not what a cached function asks."""


def seen(rows: Rows) -> Any:
    read = rows.run(rows.sql.read([ENTRY_KEY, TAG_KEY, FUNCTION_KEY]))
    found = None if read.row is None else read.row.value
    return found, [each not in (0, VERSION) for each in read.generations]


OPERATIONS: dict[str, Operation[Rows]] = {
    "lease": lambda r, x: leased(r.run(r.sql.lease(ENTRY_KEY, new(x), SECONDS[x]))),
    "lease in its place": lambda r, x: leased(
        r.run(r.sql.lease(ENTRY_KEY, new(x), SECONDS[x], VERSION))
    ),
    "extend": lambda r, x: r.run(r.sql.extend(ENTRY_KEY, VERSION, PLACEHOLDER, SECONDS[x])),
    "claim": lambda r, x: r.run(r.sql.claim(ENTRY_KEY, VERSION)) is not None,
    "fill": lambda r, x: (
        r.run(r.sql.fill(ENTRY_KEY, VERSION, PLACEHOLDER, value(x), SECONDS[x])) is not None
    ),
    "fill for ever": lambda r, x: (
        r.run(r.sql.fill(ENTRY_KEY, VERSION, PLACEHOLDER, value(x), None)) is not None
    ),
    "refill": lambda r, x: (
        r.run(r.sql.fill(ENTRY_KEY, VERSION, MARK, value(x), SECONDS[x])) is not None
    ),
    "give_up": lambda r, x: r.run(r.sql.give_up(ENTRY_KEY, VERSION, PLACEHOLDER)),
    "invalidate": lambda r, x: r.run(r.sql.invalidate(ENTRY_KEY)),
    "bump_tag": lambda r, x: r.run(r.sql.bump_tag(TAG_KEY)),
    "bump_function": lambda r, x: r.run(r.sql.bump_function(FUNCTION_KEY)),
    "clear": lambda r, x: upkeep(r.store.clear()),
    "collect": lambda r, x: upkeep(r.run(r.store._sql.collect([ENTRY_KEY, TAG_KEY]))),
}
# What a user's own transaction holds: several invalidations.
TRANSACTIONS = {
    "invalidate twice": ("invalidate", "invalidate"),
    "invalidate with its tag": ("invalidate", "bump_tag"),
}
LOCKED = "nothing, the row being locked"
STATES = ("absent", "placeholder", "entry", "expired", "expired placeholder")


class CacheSubject:
    """An entry's row and two generations, in one of the states that a call may meet."""

    operations: Mapping[str, Operation[Rows]] = (
        OPERATIONS
        | {"read": lambda r, x: seen(r)}
        # A lease waits for nobody: of a row that is about to change it says so, and is asked again.
        | {LOCKED: lambda r, x: "locked"}
    )
    states: tuple[str, ...] = STATES
    transactions: Mapping[str, tuple[str, ...]] = TRANSACTIONS
    on_existing: Mapping[tuple[str, str], str] = {  # a Protocol's attribute
        (name, state): LOCKED for name in ("lease", "lease in its place") for state in STATES
    }

    def __init__(self, dsn: str) -> None:
        name = f"pairs_{secrets.token_hex(6)}"
        self.store = Store.connect(
            make_conninfo(dsn, application_name=name),
            ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL,
            pool_max_size=1,
        )
        self.sql = CacheStatements(self.store._config, self.store._sql.prefix)
        self._conn = psycopg.connect(dsn, autocommit=True)
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
        ((pid,),) = self._conn.execute(query, [name]).fetchall()
        self._pid: int = pid

    def close(self) -> None:
        self._conn.close()
        self.store.close()

    def reset(self, state: str) -> None:
        self._conn.execute("DELETE FROM kv_store")
        content = PLACEHOLDER if state.endswith("placeholder") else ENTRY
        expiry = -5_000 if state.startswith("expired") else 5_000
        keys = [] if state == "absent" else ["entry"]
        self._conn.execute(
            "INSERT INTO kv_store SELECT k, %s, now() + make_interval(secs => %s),"
            " '2020-01-01', '2020-01-01', %s FROM unnest(%s::text[]) k",
            [content, expiry, VERSION, keys],
        )

    def using(self, conn: psycopg.Connection) -> Rows:
        return Rows(self.store.using(conn), self.sql)

    def alone(self) -> Rows:
        return Rows(self.store, self.sql)

    def alone_pid(self) -> int:
        return self._pid

    def observe(self) -> Any:
        # What stands in each row, for how many thousands of seconds, and whether under a version of
        # its own; a tombstone is written expired and may be gone at any time.
        return self._conn.execute(
            "SELECT key, value, round(extract(epoch FROM expires_at - now()) / 1000)::int,"
            " version = %s FROM kv_store WHERE expires_at IS NULL OR expires_at > now()"
            " ORDER BY key",
            [VERSION],
        ).fetchall()


@pytest.fixture
def subject(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheSubject]:
    # Waits for as long as the arrangement takes: their end by the timeout has tests of its own.
    monkeypatch.setattr(cache_sql, "_LOCK_TIMEOUT", "set_config('lock_timeout', '60000', true)")
    made = CacheSubject(dsn)
    yield made
    made.close()


@pytest.fixture
def pairs(subject: CacheSubject, dsn: str) -> Iterator[Pairs[Rows]]:
    with pairs_of(subject, dsn) as made:
        yield made


@pytest.mark.parametrize("a", [*OPERATIONS, *TRANSACTIONS])
def test_pairs(pairs: Pairs[Rows], a: str) -> None:
    """A open while B runs, for every B, from every state: as one after the other."""
    wrong = [each for b in (*OPERATIONS, "read") for each in pairs.wrong(a, b)]
    assert not wrong, "\n".join(wrong)


def test_every_writing_statement_of_the_cache_has_its_part(subject: CacheSubject) -> None:
    """A statement that none of the operations sends is left out of the pairs."""
    for name in (*OPERATIONS, "read"):
        subject.reset("placeholder")
        subject.operations[name](subject.alone(), "a")
    named = {
        name
        for name, each in vars(CacheStatements).items()
        if isinstance(each, cached_property) and name.startswith("_")
    }
    made = {name for name, each in vars(subject.sql).items() if isinstance(each, Statement)}
    assert named - made == {"_usage"}  # it only reads
