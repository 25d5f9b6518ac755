"""Cached functions: entries, and the generations of functions and tags."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import psycopg
import pytest

import pgkv
from pgkv import Store
from pgkv._ops.op import Op
from pgkv.patterns.cache import sql as cache_sql
from pgkv.patterns.cache.sql import CacheStatements, ComputeLease
from tests.interleavings.pairs import Operation, Subject
from tests.interleavings.scenarios import Client, evicting, no_errors, truncate, with_marks
from tests.interleavings.schedule import Call, Inline, Scenario, World, ended

STATEMENTS = ("pgkv.patterns.cache.sql",)
READS = frozenset(("usage", "reports", "notify"))
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
    "report": lambda r, x: r.run(r.sql.report("host:1", value(x))),
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


class Cache(Subject[Rows]):
    """An entry's row and two generations, in one of the states that a call may meet."""

    operations = OPERATIONS
    only_second: Mapping[str, Operation[Rows]] = {"read": lambda r, x: seen(r)}
    states = STATES
    transactions = TRANSACTIONS
    # A lease waits for nobody: of a row that is about to change it says so, and is asked again.
    explained: Mapping[tuple[str, str], str] = {
        (name, state): LOCKED for name in ("lease", "lease in its place") for state in STATES
    }
    repeatable = frozenset(("invalidate", "bump_tag", "bump_function"))

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        # Waits for as long as the arrangement takes: their end by the timeout has tests of its own.
        timeout = "set_config('lock_timeout', '60000', true)"
        self.patch.setattr(cache_sql, "_LOCK_TIMEOUT", timeout)
        self.sql = CacheStatements(self.store._config, self.store._sql.prefix)

    def all(self) -> Mapping[str, Operation[Rows]]:
        return {**super().all(), LOCKED: lambda r, x: "locked"}

    def reset(self, state: str) -> None:
        self.conn.execute("DELETE FROM kv_store")
        content = PLACEHOLDER if state.endswith("placeholder") else ENTRY
        expiry = -5_000 if state.startswith("expired") else 5_000
        keys = [] if state == "absent" else ["entry"]
        self.conn.execute(
            "INSERT INTO kv_store SELECT k, %s, now() + make_interval(secs => %s),"
            " '2020-01-01', '2020-01-01', %s FROM unnest(%s::text[]) k",
            [content, expiry, VERSION, keys],
        )

    def on(self, conn: psycopg.Connection | None) -> Rows:
        return Rows(self.store if conn is None else self.store.using(conn), self.sql)

    def observe(self) -> Any:
        # What stands in each row, for how many thousands of seconds, and whether under a version of
        # its own; a tombstone is written expired and may be gone at any time.
        return self.conn.execute(
            "SELECT key, value, round(extract(epoch FROM expires_at - now()) / 1000)::int,"
            " version = %s FROM kv_store WHERE expires_at IS NULL OR expires_at > now()"
            " ORDER BY key",
            [VERSION],
        ).fetchall()


# -- schedules

TTL = 10.0


async def version() -> int:
    """The scenario's source, which is read at one moment and returned at a later one."""
    world = World.current
    assert world is not None
    value = int(world.memory["version"])
    await world.step("computes")
    return value


def version_sync() -> int:
    """The same for threads."""
    return int(ended(version()))


def cached_version(world: World, **options: Any) -> Any:
    """The source, cached in a process of the client's own; with `l1`, in one process of all clients."""
    settings: dict[str, Any] = {"ttl": TTL * 10, "beta": 0, "compute_timeout": 2, **options}
    if settings.get("l1"):
        settings["l1"] = world.memory.setdefault("l1", pgkv.L1(ttl=TTL))
    cached = pgkv.cached(store=world.store, **settings)
    return InlineFunction(cached(version_sync)) if world.is_sync else cached(version)


class InlineFunction(Inline):
    """A cached function of threads, to be awaited."""

    def __call__(self) -> Call:
        return Call(self._target)


def reading(method: str = "__call__", **options: Any) -> Client:
    """Call it twice, or `method`: no value is older than what was invalidated before."""

    async def client(world: World) -> None:
        function = cached_version(world, **options)
        for _ in range(2):
            before = world.memory["visible"]
            value = await getattr(function, method)()
            assert value >= before, f"read {value} after {before} had been invalidated"

    return client


def writing(method: str = "invalidate", **options: Any) -> Client:
    """Change the source, and then what is cached of it."""

    async def client(world: World) -> None:
        function = cached_version(world, **options)
        await world.step("writes", lambda: change(world))
        version = world.memory["version"]
        if method == "tag":
            done = pgkv.invalidate_tag("t", store=world.store)
            await (done or world.step("has invalidated"))  # threads have done it
        else:
            await getattr(function, method)()
        world.memory["visible"] = max(world.memory["visible"], version)

    return client


async def writing_in_transaction(world: World) -> None:
    """Invalidate first, change the source, and commit both."""
    function = cached_version(world)
    key = getattr(function, "_target", function).cache_key()
    with psycopg.connect(world.clock.dsn) as conn:
        rows = Rows(world.sync.using(conn), CacheStatements(world.sync._config, ""))
        await world.step("invalidates", lambda: rows.run(rows.sql.invalidate(key.encode())))

        def commit() -> None:
            conn.commit()
            change(world)
            world.memory["visible"] = world.memory["version"]

        await world.step("commits", commit)


def change(world: World) -> None:
    world.memory["version"] += 1


def impatient() -> contextlib.AbstractContextManager[None]:
    """Who meets the row of an open transaction gives up at once: it would wait for the scheduler."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_sql, "_LOCK_TIMEOUT", "set_config('lock_timeout', '1', true)")
            yield

    return patched()


def new_source(world: World) -> None:
    world.memory.update(version=1, visible=1)
    truncate(world, "")
    with_marks(world)


def of_cache(name: str, clients: dict[str, Client], **options: Any) -> Scenario:
    return Scenario(name, clients, **{"check": no_errors, "prepare": new_source, **options})


STALE: dict[str, Any] = {"ttl": TTL, "stale": TTL * 10}

SUBJECTS = (Cache,)
SCENARIOS = (
    of_cache(
        "cached: invalidate against fill",
        {"reader": reading(), "writer": writing(), "other": reading()},
        preemptions=2,
        kinds=("die",),
    ),
    of_cache("cached: every fault", {"reader": reading(), "writer": writing()}),
    of_cache(
        "cached: clear",
        {"reader": reading(), "writer": writing("cache_clear")},
        jumps=(TTL * 10 + 1,),
    ),
    of_cache(
        "cached: evicted",
        {"reader": reading(), "writer": writing(), "evicter": evicting},
        kinds=("die",),
        preemptions=2,
    ),
    of_cache(
        "cached: tags",
        {"reader": reading(tags=("t",)), "writer": writing("tag", tags=("t",))},
        server_jumps=(TTL * 10 + 1,),
    ),
    of_cache(
        "cached: refresh",
        {"reader": reading(), "writer": writing(), "refresher": reading("refresh")},
        preemptions=2,
        kinds=("die", "lose"),
    ),
    of_cache(
        "cached: stale",
        {"reader": reading(**STALE), "writer": writing(**STALE), "other": reading(**STALE)},
        preemptions=2,
        kinds=("die",),
        jumps=(TTL + 1,),
        faults=2,
    ),
    of_cache(
        "cached: the server's clock jumps",
        {"reader": reading(**STALE), "writer": writing(**STALE)},
        kinds=(),
        server_jumps=(TTL + 1, -TTL * 20),
        faults=2,
    ),
    of_cache(
        "cached: a first level",
        {"reader": reading(l1=True), "writer": writing(l1=True), "other": reading(l1=True)},
        preemptions=2,
        jumps=(TTL + 1,),
    ),
    of_cache(
        "cached: a first level, read before and answered after",
        {"filler": reading(), "reader": reading(l1=True), "writer": writing(l1=True)},
        kinds=("late",),
        preemptions=0,
        small=0,
    ),
    of_cache(
        "cached: invalidated in a transaction",
        {"reader": reading(), "writer": writing_in_transaction},
        around=impatient,
        kinds=(),
        preemptions=2,
        small=2,
    ),
)
