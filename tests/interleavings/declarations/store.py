"""The store: one operation each, and those on many keys."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg

from pgkv import CasResult, Store, Zstd
from pgkv._ops.codec import encode_ttl
from pgkv._sql import INCREMENTS, SETS, Statements
from tests.interleavings.pairs import NONE, PASSED_OVER, Operation, Subject
from tests.interleavings.scenarios import bounded
from tests.interleavings.schedule import Scenario

STATEMENTS = tuple(
    f"pgkv._sql{each}"
    for each in ("", ".point", ".batch", ".scan", ".sweep", ".evict", ".watch", ".transformed")
)
READS = frozenset((
    "get", "get_entry", "exists", "ttl", "get_many", "get_raw", "exists_many", "exist_many", "keys", "scan", "count", "stats",
    "now", "get_statement", "exists_statement", "ping", "reach", "citus", "may_maintain", "pages", "vacuum", "analyze", "Sweep.collect", "notify", "name", "read", "page", "dump", "vacuum_idle",
    "stored",
))  # fmt: skip
KEYS = ["a", "k", "z"]
# What a side writes: integers, so that all of it can be added to.
VALUE = {"a": "10", "b": "20"}
DELTA = {"a": 100, "b": 1000}
TTL = {"a": 10_000.0, "b": 20_000.0}
OLD_TTL = 5_000
VERSION = 7  # of every row at the beginning


def later(side: str) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=TTL[side])


def upkeep(_count: object) -> None:
    """How many rows were due when another holds them is not promised."""


def outcome(result: CasResult) -> Any:
    return result.status, result.current


def merged(store: Store, kind: int, *params: bytes) -> Any:
    """Calls of several callers that travel as one statement: the keys that it answers."""
    op = store._sql.merged(kind, [(key.encode(), *params) for key in KEYS])
    answers = store._execute(op)
    return sorted(answers)


def evict(store: Store) -> None:
    """Delete the oldest row of three."""
    sql = StoreSubject.bounded
    pages = max(1, store._execute(sql.pages()))
    upkeep(store._execute(sql.evict(pages, 1, 1, None, None)))


OPERATIONS: dict[str, Operation[Store]] = {
    "set": lambda s, x: s.set("k", VALUE[x]) > 0,
    "set keep_ttl": lambda s, x: s.set("k", VALUE[x], keep_ttl=True) > 0,
    "set if_version": lambda s, x: s.set("k", VALUE[x], if_version=VERSION) is not None,
    "set_nx": lambda s, x: s.set_nx("k", VALUE[x]),
    "set_xx": lambda s, x: s.set_xx("k", VALUE[x]),
    "delete": lambda s, x: s.delete("k"),
    "delete if_version": lambda s, x: s.delete("k", if_version=VERSION),
    "get_and_set": lambda s, x: s.get_and_set("k", VALUE[x]),
    "get_and_delete": lambda s, x: s.get_and_delete("k"),
    "get_and_touch": lambda s, x: s.get_and_touch("k", TTL[x]),
    "increment": lambda s, x: s.increment("k", DELTA[x]),
    "compare_and_swap": lambda s, x: outcome(s.compare_and_swap("k", "1", VALUE[x])),
    "compare_and_swap of none": lambda s, x: outcome(s.compare_and_swap("k", None, VALUE[x])),
    "compare_and_delete": lambda s, x: s.compare_and_delete("k", "1"),
    "update": lambda s, x: s.update("k", lambda v: (v or b"") + VALUE[x].encode()),
    "expire": lambda s, x: s.expire("k", TTL[x]),
    "expire if_version": lambda s, x: s.expire("k", TTL[x], if_version=VERSION),
    "persist": lambda s, x: s.persist("k"),
    "set_many": lambda s, x: s.set_many(dict.fromkeys(KEYS, VALUE[x])),
    "sets merged": lambda s, x: merged(s, SETS, VALUE[x].encode()),
    "increments merged": lambda s, x: merged(s, INCREMENTS, b"%d" % DELTA[x]),
    "increment_many": lambda s, x: sorted(s.increment_many(dict.fromkeys(KEYS, DELTA[x])).items()),
    "delete_many": lambda s, x: s.delete_many(KEYS),
    "expire_many": lambda s, x: s.expire_many(KEYS, TTL[x]),
    "delete_prefix": lambda s, x: s.delete_prefix("k"),
    "clear": lambda s, x: s.clear(),
    "truncate": lambda s, x: s.truncate(),
    "cleanup_expired": lambda s, x: upkeep(s.cleanup_expired()),
    "collect": lambda s, x: upkeep(s._execute(s._sql.collect([b"a", b"k"]))),
    "sweep_alone": lambda s, x: upkeep(s._execute(s._sql.sweep_alone(0))),
    "evict": lambda s, x: evict(s),
    "mark": lambda s, x: upkeep(s._execute(StoreSubject.bounded.mark([b"a", b"k"]))),
}
UPKEEP = frozenset(("cleanup_expired", "collect", "sweep_alone", "evict", "mark"))
STATES = ("absent", "live", "expired", "part")
# The same statements with another expiry: only as B, the one that waits.
VARIANTS: dict[str, Operation[Store]] = {
    "set with ttl": lambda s, x: s.set("k", VALUE[x], ttl=TTL[x]) > 0,
    "set at": lambda s, x: s.set_at("k", VALUE[x], later(x)) > 0,
    "set in the past": lambda s, x: s.set_at("k", VALUE[x], datetime(2020, 1, 1, tzinfo=UTC)) > 0,
    "set if_version with ttl": lambda s, x: (
        s.set("k", VALUE[x], ttl=TTL[x], if_version=VERSION) is not None
    ),
    "set if_version keep_ttl": lambda s, x: (
        s.set("k", VALUE[x], keep_ttl=True, if_version=VERSION) is not None
    ),
    "set_nx with ttl": lambda s, x: s.set_nx("k", VALUE[x], ttl=TTL[x]),
    "set_xx with ttl": lambda s, x: s.set_xx("k", VALUE[x], ttl=TTL[x]),
    "increment with ttl": lambda s, x: s.increment("k", DELTA[x], ttl=TTL[x]),
    "increment if it exists": lambda s, x: s.increment("k", DELTA[x], only_if_exists=True),
    "increment within": lambda s, x: s.increment("k", DELTA[x], maximum=1050),
    "append": lambda s, x: s.append("k", VALUE[x]),
    "increment within with ttl": lambda s, x: s.increment("k", DELTA[x], ttl=TTL[x], maximum=1050),
    "append with ttl": lambda s, x: s.append("k", VALUE[x], ttl=TTL[x]),
    "get_and_set with ttl": lambda s, x: s.get_and_set("k", VALUE[x], ttl=TTL[x]),
    "compare_and_swap with ttl": lambda s, x: outcome(
        s.compare_and_swap("k", "1", VALUE[x], ttl=TTL[x])
    ),
    "compare_and_swap of none with ttl": lambda s, x: outcome(
        s.compare_and_swap("k", None, VALUE[x], ttl=TTL[x])
    ),
    "update with ttl": lambda s, x: s.update("k", lambda _: VALUE[x], ttl=TTL[x]),
    "expire_at": lambda s, x: s.expire_at("k", later(x)),
    "sets with ttl merged": lambda s, x: merged(s, SETS, VALUE[x].encode(), encode_ttl(TTL[x])),
    "set_many with ttl": lambda s, x: s.set_many(dict.fromkeys(KEYS, VALUE[x]), ttl=TTL[x]),
    "increment_many with ttl": lambda s, x: sorted(
        s.increment_many(dict.fromkeys(KEYS, DELTA[x]), ttl=TTL[x]).items()
    ),
}
# As B's above, on the one key that exists in the state "part".
ON_EXISTING: dict[str, Operation[Store]] = {
    "delete_many": lambda s, x: s.delete_many(["k"]),
    "expire_many": lambda s, x: s.expire_many(["k"], TTL[x]),
    "clear": lambda s, x: s.delete_prefix("k"),
}
# A row that is removed and written again in one transaction is another row.
TRANSACTIONS = {
    "rewrite": ("delete", "set"),
    "rewrite the same": ("delete", "set the same"),
    "rewrite all": ("clear", "set_many"),
}


class StoreSubject(Subject[Store]):
    """A store's table, with the keys a, k and z in it or not.

    Attributes:
        bounded: the statements that keep the table within two rows.
    """

    bounded: Statements

    operations = OPERATIONS
    only_second: Mapping[str, Operation[Store]] = (
        VARIANTS
        | {f"{name} of existing": operation for name, operation in ON_EXISTING.items()}
        | {"set the same": lambda s, x: s.set("k", "1") > 0}
    )
    states = STATES
    transactions: Mapping[str, tuple[str, ...]] = TRANSACTIONS
    explained: Mapping[tuple[str, str], str] = {
        (name, "part"): f"{name} of existing" for name in ON_EXISTING
    } | {("evict", state): PASSED_OVER for state in STATES}
    repeatable = (OPERATIONS | VARIANTS).keys() - UPKEEP

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        StoreSubject.bounded = bounded(self.store._config, 2)
        self.conn.execute("ALTER TABLE kv_store ADD COLUMN IF NOT EXISTS used_at timestamptz")

    def reset(self, state: str) -> None:
        keys = {"absent": [], "live": KEYS, "expired": KEYS, "part": ["k"]}[state]
        expiry = {"expired": -OLD_TTL, "part": OLD_TTL}.get(state)
        self.conn.execute("DELETE FROM kv_store")
        self.conn.execute(
            "INSERT INTO kv_store SELECT k, '1', now() + make_interval(secs => %s),"
            # k is the oldest
            " '2020-01-01', '2020-01-01'::timestamptz + make_interval(days => ascii(k) * 7 %% 11), %s"
            " FROM unnest(%s::text[]) k",
            [expiry, VERSION, keys],
        )

    def on(self, conn: psycopg.Connection | None) -> Store:
        return self.store if conn is None else self.store.using(conn)

    def observe(self) -> Any:
        # How long a key still lives, in thousands of seconds; and whether it is the one of old.
        return self.conn.execute(
            "SELECT key, convert_from(value, 'UTF8'),"
            " round(extract(epoch FROM expires_at - now()) / 1000)::int, created_at < '2021-01-01'"
            " FROM kv_store WHERE expires_at IS NULL OR expires_at > now() ORDER BY key"
        ).fetchall()


class TransformedSubject(StoreSubject):
    """The same table with transforms, which leave short values plain: what they do in another way.

    `rewrite` puts the same value in another form.
    """

    only_second = NONE
    transactions = NONE
    operations = {
        name: OPERATIONS[name]
        for name in (
            *(
                "set",
                "delete",
                "compare_and_swap",
                "compare_and_swap of none",
                "compare_and_delete",
            ),
            *("update", "get_and_set", "get_and_delete", "get_and_touch", "increment"),
            "increment_many",
        )
    } | {
        "increment with ttl": VARIANTS["increment with ttl"],
        "get_and_delete queued": lambda s, x: s._execute(s._sql.get_and_delete("k")),
        "replaced": lambda s, x: upkeep(
            s._execute(cast(Any, s._sql).replaced([(b"k", b"1", VERSION)]))
        ),
        "replaced_one": lambda s, x: s._execute(
            cast(Any, s._sql).replaced_one(b"k", b"1", VERSION)
        ),
    }
    explained: Mapping[tuple[str, str], str] = {
        ("replaced", state): PASSED_OVER for state in STATES
    }
    repeatable = operations.keys() - {"replaced"}

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.transformed = self.store.table("kv_store", transforms=[Zstd()])

    def on(self, conn: psycopg.Connection | None) -> Store:
        return self.transformed if conn is None else self.transformed.using(conn)


SUBJECTS = (StoreSubject, TransformedSubject)
SCENARIOS: tuple[Scenario, ...] = ()
