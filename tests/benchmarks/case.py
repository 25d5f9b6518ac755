"""What a case is, and what it may use.

A case is a generator function that yields its entrants, each a name with what is timed:

    @case("get", {RAW: 1.25, REDIS: 0.75})
    def get(bench: Bench) -> Entrants:
        store = bench.store()
        yield PGKV, each(store.get, cycle(KEYS))
        if client := bench.redis():
            yield REDIS, each(client.get, cycle(KEYS))

Its module has to be named in `cases.TOPICS`; nothing else has to change. What is no time, a
size or a share, is measured by a generator of `Fact`, registered by `facts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, TypeAlias, TypeVar

import psycopg
import redis

import pgkv
from pgkv._sql import Statements
from tests.benchmarks.figures import LATENCY, THROUGHPUT, Fact, Goal
from tests.benchmarks.placement import LINK, TWO_CORES
from tests.benchmarks.raw import Raw
from tests.benchmarks.services import Services, memcached_client

T = TypeVar("T")

PGKV = "pgkv"
GET = "pgkv, get"
COALESCING = "pgkv, coalescing"
RAW = "raw libpq"
PSYCOPG = "psycopg"
PSYCOPG_POOL = "psycopg pool"
ASYNCPG = "asyncpg"
ASYNCPG_POOL = "asyncpg pool"
REDIS = "redis-py"
REDIS_ASYNC = "redis.asyncio"
MEMCACHED = "pymemcache"

# Performs so many operations.
Run: TypeAlias = Callable[[int], object]
Entrants: TypeAlias = Iterator[tuple[str, Run]]
# Of a latency with client and servers on one core, and on two; one number is for both.
Limit: TypeAlias = "float | tuple[float | None, float | None] | None"
Goals: TypeAlias = "Mapping[str | tuple[str, str], Limit]"

# redis.asyncio raises an error when more tasks than its default of 100 ask at once.
REDIS_CONNECTIONS = 1024

VALUE = b"v" * 256
KEYS = [f"bench:{n:05}" for n in range(10_000)]


@dataclass(frozen=True, slots=True)
class Case:
    """A case that is timed."""

    name: str
    make: Callable[[Bench], Entrants]
    goals: dict[tuple[str, str], Limit]
    workers: int
    unit: str
    only_big: bool = False

    @property
    def module(self) -> str:
        """The module whose case it is: see `cases.TOPICS`."""
        return self.make.__module__

    @property
    def is_pinned(self) -> bool:
        """One client that waits for one server is placed: see `tests.benchmarks.placement`."""
        return self.workers == 1

    def goals_at(self, placement: str) -> dict[tuple[str, str], Goal | None]:
        """What is compared there, and what the ratio should be."""

        def goal(limit: Limit) -> Goal | None:
            if isinstance(limit, tuple):
                limit = limit[placement == TWO_CORES]
            if limit is None or placement == LINK:
                return None
            return Goal(limit, self.workers > 1)

        return {pair: goal(limit) for pair, limit in self.goals.items()}


@dataclass(frozen=True, slots=True)
class FactCase:
    """A case that yields figures."""

    name: str
    measure: Callable[[Bench], Iterator[Fact]]
    only_big: bool = False

    @property
    def module(self) -> str:
        """The module whose case it is."""
        return self.measure.__module__


CASES: list[Case | FactCase] = []


def case(
    name: str, goals: Goals, *, workers: int = 1, only_big: bool = False
) -> Callable[[Callable[[Bench], Entrants]], Callable[[Bench], Entrants]]:
    """Make a generator of entrants a case.

    Args:
        name: what the table calls it.
        goals: per peer of `PGKV` (or per pair) the ratio that should not be exceeded, on one core
            and on two, or None; with several workers the ratio is one of throughputs, that should
            be reached.
        workers: threads or tasks. With one, latency is measured.
        only_big: leave it out unless asked for the big ones.
    """
    pairs = {(PGKV, key) if isinstance(key, str) else key: limit for key, limit in goals.items()}

    def register(make: Callable[[Bench], Entrants]) -> Callable[[Bench], Entrants]:
        unit = THROUGHPUT if workers > 1 else LATENCY
        CASES.append(Case(name, make, pairs, workers, unit, only_big))
        return make

    return register


def facts(
    name: str, *, only_big: bool = False
) -> Callable[[Callable[[Bench], Iterator[Fact]]], Callable[[Bench], Iterator[Fact]]]:
    """Make a generator of `Fact` a case."""

    def register(
        measure: Callable[[Bench], Iterator[Fact]],
    ) -> Callable[[Bench], Iterator[Fact]]:
        CASES.append(FactCase(name, measure, only_big))
        return measure

    return register


class Bench:
    """What a case may use; all of it is closed when the case ends.

    Args:
        running: the servers.
        big: take the time for millions of keys.
        quick: keep everything small.
        placements: where client and servers run while one client is timed.
    """

    def __init__(
        self,
        running: Services,
        *,
        big: bool,
        quick: bool,
        placements: tuple[str, ...] = ("",),
    ) -> None:
        self.dsn = running.dsn
        self._running = running
        self.more_pids: set[int] = set()
        self.placements = placements
        self.redis_socket = running.redis.socket if running.redis else None
        self.memcached_socket = running.memcached.socket if running.memcached else None
        self.big = big
        self.quick = quick
        self._stack = ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None

    def close(self) -> None:
        """End of the case."""
        self._stack.close()

    def closing(self, close: Callable[[], object]) -> None:
        """Call `close` at the end of the case."""
        self._stack.callback(close)

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that ends with the case."""
        return self._stack.enter_context(context)

    def server_pids(self) -> list[int]:
        """The processes that work for the entrants."""
        return [*self._running.pids(), *self.more_pids]

    def vacuum(self) -> None:
        """Bring every table into the shape it has in use."""
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            conn.execute("VACUUM ANALYZE")

    # -- blocking clients

    def store(self, **config: Any) -> pgkv.Store:
        """A store on a table that holds `KEYS`."""
        return self.enter(filled(pgkv.Store.connect(self.dsn, **config)))

    def raw(self) -> Raw:
        """A bare connection."""
        return self._stack.enter_context(Raw(self.dsn))

    def psycopg(self) -> psycopg.Connection[Any]:
        """A connection as psycopg is used at its best: autocommit, prepared statements."""
        return self._stack.enter_context(
            psycopg.connect(self.dsn, autocommit=True, cursor_factory=psycopg.RawCursor)
        )

    def psycopg_pool(self) -> Any:
        """A pool of such connections."""
        from psycopg_pool import ConnectionPool

        options = {"autocommit": True, "cursor_factory": psycopg.RawCursor}
        return self._stack.enter_context(
            ConnectionPool(self.dsn, kwargs=options, min_size=1, max_size=10, open=True)
        )

    def redis(self) -> redis.Redis | None:
        """A Redis client whose database holds `KEYS`; None where there is no Redis."""
        if self.redis_socket is None:
            return None
        client = redis.Redis(unix_socket_path=self.redis_socket)
        client.mset(dict.fromkeys(KEYS, VALUE))
        self.closing(client.close)
        return client

    def memcached(self) -> Any:
        """A client of a memcached that holds `KEYS`; None where there is none."""
        if self.memcached_socket is None:
            return None
        client = memcached_client(self.memcached_socket)
        stored(client, dict.fromkeys(KEYS, VALUE))
        self.closing(client.close)
        return client

    # -- asyncio clients

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the case."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self.closing(self._close_loop)
        return self._loop

    def _close_loop(self) -> None:
        loop, self._loop = self._loop, None
        assert loop is not None
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    def wait(self, work: Awaitable[T]) -> T:
        """Wait for what is awaitable."""
        return self.loop.run_until_complete(work)

    def async_store(self, **config: Any) -> pgkv.AsyncStore:
        """An AsyncStore on a table that holds `KEYS`."""
        filled(pgkv.Store.connect(self.dsn)).close()

        async def connect() -> pgkv.AsyncStore:
            return await pgkv.AsyncStore.connect(self.dsn, **config)

        store = self.wait(connect())
        self.closing(lambda: self.wait(store.close()))
        return store

    def async_redis(self) -> Any:
        """An asyncio client of Redis; None where there is none."""
        if self.redis_socket is None:
            return None
        client = redis.asyncio.Redis(
            unix_socket_path=self.redis_socket,
            max_connections=REDIS_CONNECTIONS,
        )
        self.wait(client.mset(dict.fromkeys(KEYS, VALUE)))
        self.closing(lambda: self.wait(client.aclose()))
        return client

    def asyncpg(self) -> Any:
        """A connection of asyncpg."""
        import asyncpg

        connection = self.wait(asyncpg.connect(**self._parts()))
        self.closing(lambda: self.wait(connection.close()))
        return connection

    def asyncpg_pool(self, size: int) -> Any:
        """A pool of such connections."""
        import asyncpg

        async def connect() -> Any:
            return await asyncpg.create_pool(min_size=size, max_size=size, **self._parts())

        pool = self.wait(connect())
        self.closing(lambda: self.wait(pool.close()))
        return pool

    def _parts(self) -> dict[str, Any]:
        # asyncpg reads no conninfo strings.
        names = {"host": "host", "port": "port", "user": "user", "dbname": "database"}
        given = psycopg.conninfo.conninfo_to_dict(self.dsn)
        return {names[name]: value for name, value in given.items() if name in names}

    # -- many workers

    def threads(self, count: int, call: Callable[[str], object]) -> Run:
        """Spread the operations over threads."""
        pool = self._stack.enter_context(ThreadPoolExecutor(count))

        def run(n: int) -> None:
            shares = [each(call, parted(KEYS, worker, count)) for worker in range(count)]
            for future in [pool.submit(share, n // count) for share in shares]:
                future.result()

        return run

    def tasks(self, count: int, call: Callable[[str], Awaitable[object]]) -> Run:
        """Spread the operations over tasks of the case's event loop."""
        keys = [parted(KEYS, worker, count) for worker in range(count)]

        async def work(mine: Iterator[str], n: int) -> None:
            for key in islice(mine, n):
                await call(key)

        async def all_of_them(n: int) -> None:
            await asyncio.gather(*(work(mine, n // count) for mine in keys))

        def run(n: int) -> None:
            self.wait(all_of_them(n) if count > 1 else work(keys[0], n))

        return run


def filled(store: pgkv.Store) -> pgkv.Store:
    """Write `KEYS` and bring the table into the shape it has in use."""
    store.set_many(dict.fromkeys(KEYS, VALUE))
    store.vacuum()
    store.analyze()
    return store


def stored(memcached: Any, pairs: dict[str, bytes]) -> None:
    """Write any number of pairs. pymemcache reads no answer before it has sent everything: so many
    answers would fill the socket, and both ends wait for ever. So it is told to expect none."""
    memcached.set_many(pairs, noreply=True)


def each(call: Callable[[Any], object], inputs: Iterator[Any]) -> Run:
    """One operation after the other, each with the next input."""

    def run(n: int) -> None:
        for item in islice(inputs, n):
            call(item)

    return run


def spent(work: Callable[[], object]) -> float:
    """Seconds."""
    started = perf_counter()
    work()
    return perf_counter() - started


def parted(keys: list[str], worker: int, workers: int) -> Iterator[str]:
    """The keys from a worker's own place on, for ever."""
    place = worker * len(keys) // workers
    while True:
        yield from keys[place:]
        yield from keys[:place]


def statements(store: pgkv.Store | pgkv.AsyncStore) -> Statements:
    """The SQL of a store, for entrants that send it by other ways."""
    return store._sql
