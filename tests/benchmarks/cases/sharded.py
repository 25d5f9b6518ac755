"""A store over slots, on one server and on three, beside one that is not sharded."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psycopg

import pgkv
from pgkv import embedded
from tests import sharded
from tests.benchmarks.case import KEYS, VALUE, Bench, Entrants, case, each, filled, spent
from tests.benchmarks.case import facts as figures
from tests.benchmarks.cases.batch import BATCHES, PAIRS
from tests.benchmarks.figures import Fact, Goal
from tests.benchmarks.placement import server_pids

PLAIN, ONE, THREE = "pgkv, not sharded", "32 slots on one server", "32 slots on three servers"
SLOTS, WARM = 32, 400
SINGLE = {(ONE, PLAIN): 1.05, (THREE, PLAIN): 1.05}
MANY = {(ONE, PLAIN): None, (THREE, PLAIN): 2.0}


def connected(dsns: list[str], slots: int = SLOTS, **config: Any) -> pgkv.Store:
    """A sharded store with its slots."""
    sharded.init(dsns, slots)
    return pgkv.Store.sharded(dsns, **config)


@cache
def clusters(dsn: str) -> dict[str, list[str]]:
    """The DSNs of slots on that server, and on that and two more: made once, which takes a while."""
    stack = ExitStack()
    atexit.register(stack.close)
    dsns = [dsn]
    for _ in range(2):
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="pgkv-bench-"))).resolve()
        directory.chmod(0o755)  # under root the server runs as another user
        dsns.append(stack.enter_context(embedded.start(directory / "pg")).dsn)
    found = {}
    for name, servers in ((ONE, dsns[:1]), (THREE, dsns)):
        found[name] = [sharded.databases(each, [f"slots_{len(servers)}"])[0] for each in servers]
        with connected(found[name]) as store:
            filled(store)
    return found


def stores(bench: Bench) -> Iterator[tuple[str, pgkv.Store]]:
    """A plain store, and sharded ones on its server and on that and two more."""
    yield PLAIN, bench.store()
    for name, dsns in clusters(bench.dsn).items():
        yield name, bench.enter(pgkv.Store.sharded(dsns))
        bench.more_pids |= {pid for each in dsns for pid in server_pids(each)}


class Timed(NamedTuple):
    """A case: what is called with each of some inputs."""

    name: str
    goals: Any
    make: Callable[[pgkv.Store], Callable[[Any], object]]
    inputs: list[Any] = KEYS


def held(store: pgkv.Store) -> Callable[[str], object]:
    """Acquire a lock and release it."""

    def hold(name: str) -> None:
        with pgkv.Lock(store, name, durable=False).acquire():
            pass

    return hold


def hits(store: pgkv.Store) -> Callable[[str], object]:
    """A hit of a limiter."""
    return pgkv.RateLimiter(store, "1000000/s", name="bench").hit


TIMED = (
    Timed("sharded get", SINGLE, lambda store: store.get),
    Timed("sharded set", SINGLE, lambda store: lambda key: store.set(key, VALUE)),
    Timed("sharded increment", SINGLE, lambda store: lambda key: store.increment(f"n{key}")),
    Timed("sharded limiter hit", SINGLE, hits),
    Timed("sharded lock and release", SINGLE, held, KEYS[:100]),
    Timed("sharded get_many of 100", MANY, lambda store: store.get_many, BATCHES),
    Timed(
        "sharded set_many of 100",
        dict.fromkeys(MANY),
        lambda store: store.set_many,
        PAIRS,
    ),
)


def _register(timed: Timed) -> None:
    @case(timed.name, timed.goals)
    def entrants(bench: Bench) -> Entrants:
        for name, store in stores(bench):
            call = timed.make(store)
            each(call, cycle(timed.inputs))(WARM)  # prepares its statement in every slot
            yield name, each(call, cycle(timed.inputs))


for _timed in TIMED:
    _register(_timed)


@figures("sharded routing")
def routing(bench: Bench) -> Iterator[Fact]:
    with connected([bench.enter(sharded.database(bench.dsn))]) as store:
        store.get(KEYS[0])
        router = store._channel.router  # type: ignore[union-attr]  # a sharded store's
        statement = next(each for each in router.routes if each.name == "get")
        keys = [(key.encode(),) for key in KEYS]

        def route() -> None:
            for params in keys:
                found = router.routes.get(statement)
                found.at(found.find(params))

        seconds = min(spent(route) for _ in range(5 if bench.quick else 50))
    yield Fact("routing of a get", seconds / len(keys) * 1e9, "ns", Goal(500))


OPERATIONS: tuple[Callable[[pgkv.Store, str], object], ...] = (
    lambda store, key: store.set(key, "1"),
    lambda store, key: store.get(key),
    lambda store, key: store.increment(key),
    lambda store, key: store.exists(key),
    lambda store, key: store.append(key, "0"),
    lambda store, key: store.get_entry(key),
    lambda store, key: store.expire(key, 60),
    lambda store, key: store.set(key, "1", ttl=60),
    lambda store, key: store.get_and_set(key, "2"),
    lambda store, key: store.set_nx(key, "3"),
    lambda store, key: store.get_and_delete(key),
    lambda store, key: store.delete(key),
)


@figures("sharded memory")
def memory(bench: Bench) -> Iterator[Fact]:
    for slots in (0, 16, 32, 64):
        dsn = bench.enter(sharded.database(bench.dsn))
        options: Any = {
            "pool_min_size": 0,
            "pool_max_size": 1,
            "application_name": f"slots_{slots}",
        }
        made = connected([dsn], slots, **options) if slots else pgkv.Store.connect(dsn, **options)
        with made as store:
            for key in KEYS[: 20 * max(1, slots)]:
                for operation in OPERATIONS:
                    operation(store, key)
            with psycopg.connect(dsn) as conn:
                query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
                ((pid,),) = conn.execute(query, [f"slots_{slots}"]).fetchall()
            status = Path(f"/proc/{pid}/status")
            if not status.exists():
                return
            (line,) = (each for each in status.read_text().splitlines() if "RssAnon" in each)
        name = f"{slots} slots" if slots else PLAIN
        yield Fact(f"memory of a connection, {name}", int(line.split()[1]) / 1024, "MiB")
