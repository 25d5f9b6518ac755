"""Tables that version 0.1 made, with programs of that version and of this one on them at once.

`before/` has the tables and statements of 0.1 as that version sent them, and the keys that it made of a
cached function's calls.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import math
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path, PurePosixPath
from time import sleep
from typing import Any, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
import pytest

import pgkv
from pgkv.cli import main
from tests.peers import Peer
from tests.servers import PATIENCE

BEFORE = Path(__file__).parent / "before"
STATEMENTS: dict[str, str] = json.loads((BEFORE / "statements.json").read_text("utf-8"))
KEYS: dict[str, str] = json.loads((BEFORE / "keys.json").read_text("utf-8"))
ROUNDS = 10
T = TypeVar("T")
HOUR_NS = 3_600_000_000_000


# Classes of an application, which both versions import under one name.


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int


class Pair(NamedTuple):
    a: int
    b: int


Point.__module__ = Pair.__module__ = "app"


class Text(str):
    __module__ = "app"
    __slots__ = ()


class Plan(enum.Enum):
    __module__ = "app"
    FREE = "free"


class Level(enum.IntEnum):
    __module__ = "app"
    LOW = 1


class Name(enum.StrEnum):
    __module__ = "app"
    ADA = "ada"


class Own:
    __module__ = "app"

    def __cache_key__(self) -> int:
        return 7


SAME_KEYS: dict[str, Any] = {
    "str": "a",
    "bytes": b"a",
    "bytearray": bytearray(b"a"),
    "int": 1,
    "long": -(10**30),
    "bool": True,
    "None": None,
    "float": -0.0,
    "complex": 1.5j,
    "tuple": (1, "a", (2,)),
    "list": [1, [None]],
    "dict": {"b": 1, "a": [True]},
    "set": {1, "a"},
    "frozenset": frozenset({1}),
    "date": date(2026, 1, 2),
    "timedelta": timedelta(days=1, seconds=2),
    "Decimal": Decimal("1.50"),
    "UUID": UUID(int=7),
    "path": PurePosixPath("/a"),
}
OTHER_KEYS: dict[str, Any] = {
    "datetime": datetime(2026, 1, 2, 3, 4),  # noqa: DTZ001  # without a zone is another kind
    "aware datetime": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    "zone": datetime(2026, 1, 2, tzinfo=ZoneInfo("Europe/Berlin")),
    "time": time(3, 4),
    "NaN": math.nan,
    "dataclass": Point(1, 2),
    "named tuple": Pair(1, 2),
    "subclass": Text("a"),
    "enum": Plan.FREE,
    "IntEnum": Level.LOW,
    "StrEnum": Name.ADA,
    "set of enums": frozenset({Plan.FREE}),
    "class": int,
    "__cache_key__": Own(),
}
VALUES = SAME_KEYS | OTHER_KEYS


class Old:
    """A program of 0.1: its statements on one connection. A grant waits for a row for up to a minute."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True)
        self._cursor = psycopg.RawCursor(self.conn)

    def ask(self, name: str, *params: Any) -> tuple[Any, ...] | None:
        cursor = self._cursor.execute(STATEMENTS[name].encode(), params)
        return cursor.fetchone() if cursor.description else None

    def grant(self, name: str, holder: bytes = b"") -> int | None:
        """A lock's token, or None while another holds it."""
        found = self.ask("lock_grant", name, holder or secrets.token_bytes(8), 30.0, "60000")
        return None if found is None else found[0]

    def grant_fair(self, name: str, holder: bytes) -> int | None:
        """As `grant`, after those who came before."""
        ticket = f"{name}\x1f{holder.hex()}"
        found = self.ask(
            "lock_grant_fair", name, holder, 30.0, "60000", ticket, f"{name}\x1f", f"{name} ", 2.0
        )
        return None if found is None else found[0]

    def grant_place(self, name: str, holder: bytes) -> tuple[int, str] | None:
        """The token and the key of one of a semaphore's two places, or None while they are taken."""
        keys = [f"{name}\x1f0", f"{name}\x1f1"]
        found = self.ask("semaphore_grant", keys, holder, 30.0, "60000", f"{name}\x1f", b"2", 2)
        return None if found is None or found[0] is None else (found[0], found[1])

    def wait(self, grant: Callable[[str, bytes], T | None], name: str) -> T:
        """Ask until it is granted."""
        holder = secrets.token_bytes(8)
        while (got := grant(name, holder)) is None:
            sleep(0.001)
        return got


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


class Halves:
    """Traffic in two halves: the second begins when all have done the first, and lasts at least as long
    as what comes between."""

    def __init__(self, parties: int) -> None:
        self._middle = threading.Barrier(parties + 1, timeout=PATIENCE)
        self._over = threading.Event()

    def rounds(self) -> Iterator[int]:
        """The rounds of one party."""
        yield from range(ROUNDS)
        self._middle.wait()
        for n in itertools.count(ROUNDS):
            if n >= 2 * ROUNDS and self._over.is_set():
                return
            yield n

    def run(self, between: Callable[[], None], work: list[Callable[[], None]]) -> None:
        """Each in a thread of its own; the first failure is the test's."""

        def guarded(each: Callable[[], None]) -> None:
            try:
                each()
            except BaseException:
                self._middle.abort()
                raise

        with ThreadPoolExecutor(len(work)) as threads:
            running = [threads.submit(guarded, each) for each in work]
            try:
                self._middle.wait()
                between()
            except threading.BrokenBarrierError:
                pass  # its cause is the failure
            finally:
                self._over.set()
            failed = [error for each in running if (error := each.exception()) is not None]
        for error in sorted(
            failed, key=lambda each: isinstance(each, threading.BrokenBarrierError)
        ):
            raise error  # what broke the barrier comes first


def test_at_once(
    store: pgkv.Store,
    old: Callable[[], Old],
    peer: Peer,
    dsn: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both versions count, lock, limit and write sessions at once, while `migrate` runs: every total is
    exact, and tokens rise."""
    work: list[Callable[[], None]] = []
    done: Counter[str] = Counter()

    def count(key: str, add: Callable[[], object]) -> None:
        for _ in halves.rounds():
            add()
            done[key] += 1

    one, two = old(), old()
    work.append(partial(count, "n:old", lambda: one.ask("increment", "n", b"1")))
    work.append(partial(count, "n:new", lambda: store.increment("n")))

    # One name has one holder. What it does there is lost where two are inside.
    tokens: dict[str, list[int]] = {"lock": [], "fair": []}
    peer.run("CREATE TABLE guarded (name text, n int)")

    def inside(name: str, conn: psycopg.Connection, token: int) -> None:
        tokens[name].append(token)
        row = conn.execute("SELECT n FROM guarded WHERE name = %s", [name]).fetchone()
        assert row is not None
        conn.execute("UPDATE guarded SET n = %s WHERE name = %s", [row[0] + 1, name])

    def hold_before(name: str, each: Old) -> None:
        for _ in halves.rounds():
            token = each.wait(each.grant_fair if name == "fair" else each.grant, name)
            inside(name, each.conn, token)
            assert each.ask("lock_release", name, token) == (0,)

    def hold_now(lock: pgkv.Lock, conn: psycopg.Connection) -> None:
        for _ in halves.rounds():
            with lock.acquire() as lease:
                inside(lock.name, conn, lease.token)

    locks = [pgkv.Lock(store, "lock"), pgkv.Lock(store, "fair", fair=True)]
    for lock in locks:
        peer.run("INSERT INTO guarded VALUES (%s, 0)", lock.name)
        work += [partial(hold_before, lock.name, old()), partial(hold_now, lock, old().conn)]

    # A semaphore of two, and three who want it.
    most, within, taken = [0], [0], threading.Lock()
    semaphore = pgkv.Semaphore(store, "few", 2)

    def place() -> None:
        with taken:
            within[0] += 1
            most[0] = max(most[0], within[0])
        sleep(0.001)
        with taken:
            within[0] -= 1

    def enter_before(each: Old) -> None:
        for _ in halves.rounds():
            token, key = each.wait(each.grant_place, "few")
            place()
            assert each.ask("lock_release", key, token) == (0,)

    def enter_now() -> None:
        for _ in halves.rounds():
            with semaphore.acquire():
                place()

    with semaphore.acquire():  # its size is known
        pass
    work += [partial(enter_before, old()), enter_now, enter_now]

    # Two of three hits of a key are allowed.
    limiter = pgkv.RateLimiter(store, "2/d", name="api", timeout=PATIENCE)
    assert limiter.hit("u")
    (row,) = [each for each in peer.keys() if each.endswith("u")]  # noqa: SIM118  # no dict
    hits: Counter[int] = Counter()
    allowed: Counter[int] = Counter()
    counted = threading.Lock()

    def limit(hit: Callable[[str], bool]) -> None:
        for n in halves.rounds():
            passed = hit(str(n))
            with counted:
                hits[n] += 1
                allowed[n] += passed

    def hit_before(each: Old, key: str) -> bool:
        found = each.ask("limit_hit", f"{row[:-1]}{key}", 24 * HOUR_NS // 2, 24 * HOUR_NS)
        assert found is not None
        return bool(found[0])

    work.append(partial(limit, partial(hit_before, old())))
    work += 2 * [partial(limit, lambda key: bool(limiter.hit(key)))]

    # Each writes its own keys of one session.
    sessions = pgkv.SessionStore(store)
    made = sessions.create({}, user_id="u")
    (row_id,) = peer.run("SELECT id FROM kv_store_sessions")[0]

    def save_before(each: Old) -> None:
        for n in halves.rounds():
            saved = each.ask("session_save", row_id, json.dumps({f"old{n}": str(n)}), "1 hour", [])
            assert saved is not None
            assert saved[0] == "done"
            done["session:old"] += 1

    def save_now() -> None:
        for n in halves.rounds():
            found = sessions.load(made.id)
            assert found is not None
            found.data[f"new{n}"] = n
            sessions.save(found)
            done["session:new"] += 1

    work += [partial(save_before, old()), save_now]

    def migrate() -> None:
        assert main(["migrate", "--dsn", dsn]) == 0
        assert capsys.readouterr().out.count("DROP CONSTRAINT") == 2

    halves = Halves(len(work))
    halves.run(migrate, work)
    total = done["n:old"] + done["n:new"]
    assert store.get("n") == b"%d" % total
    assert one.ask("get", "n") == (b"%d" % total,)
    for name, each in tokens.items():
        assert peer.one("SELECT n FROM guarded WHERE name = %s", name) == len(each)
        assert each == sorted(set(each))
    assert most == [2]
    assert allowed == {n: min(count, 2) for n, count in hits.items()}
    last = sessions.load(made.id)
    assert last is not None
    assert last.data == {
        f"{who}{n}": n for who in ("old", "new") for n in range(done[f"session:{who}"])
    }
    with locks[0].acquire():
        assert two.grant("lock") is None


def test_limits(store: pgkv.Store, old: Callable[[], Old], peer: Peer) -> None:
    """Hits of both spend one bucket."""
    limiter = pgkv.RateLimiter(store, "20/h", name="api", timeout=PATIENCE)
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

    limiter, one = pgkv.RateLimiter(store, "20/m", name="api", timeout=PATIENCE), old()
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


def load(value: Any) -> int:
    """A function of an application."""
    computed.append(value)
    return len(computed)


load.__module__ = "app"
computed: list[Any] = []


def test_keys_of_cached_functions() -> None:
    """For which arguments both versions make the same keys, as the page about upgrading says."""
    function = pgkv.cached(ttl=60)(load)
    same = {name for name, value in VALUES.items() if function.cache_key(value) == KEYS[name]}
    assert same == set(SAME_KEYS)
    page = (Path(__file__).parents[2] / "docs/upgrading.md").read_text("utf-8")
    for kind in ("datetimes", "times", "NaN", "dataclasses", "named tuples", "enums", "classes"):
        assert kind in page[page.index("For datetimes, times") : page.index("0.2 makes other keys")]


def test_cached_functions(store: pgkv.Store, old: Callable[[], Old], peer: Peer) -> None:
    """`invalidate` reaches the other version's entries where the keys are the same, `cache_clear` and
    `invalidate_tag` reach all of them."""
    function = pgkv.cached(ttl=600, store=store, tags=["all"], store_timeout=PATIENCE)(load)
    one, generations = old(), ("pgkv:cache:f:app.load:1", "pgkv:cache:t:all")

    def is_kept(reach: Callable[[], object], value: Any) -> bool:
        """Whether an entry of today is served after that."""
        first = function(value)
        assert function(value) == first
        reach()
        return function(value) == first

    def seen() -> list[int]:
        """The generations as 0.1 reads them: an entry that was made under others is a miss."""
        found = [one.ask("cache_look", key, key) for key in generations]
        return [0 if row is None else row[2] for row in found]

    for name in ("int", "dataclass"):
        value, before = VALUES[name], KEYS[name]
        apart = name == "dataclass"
        assert is_kept(partial(one.ask, "cache_bury", before), value) == apart
        if apart:
            peer.run(
                "UPDATE kv_store SET value = 'an entry', expires_at = NULL WHERE key = %s", before
            )
        function.invalidate(value)
        assert (one.ask("cache_look", before, before) is not None) == apart
        for generation in generations:
            assert not is_kept(partial(one.ask, "cache_bump", generation), value)
        earlier = seen()
        function.cache_clear()
        pgkv.invalidate_tag("all", store=store)
        assert all(now > then for now, then in zip(seen(), earlier, strict=True))


def test_migrate(
    store: pgkv.Store, old: Callable[[], Old], dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pgkv migrate --dry-run` says what is to be done, `migrate` does it once, and both versions go on."""

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
