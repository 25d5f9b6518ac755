"""A process of the soak: all patterns at once, until it is told to stop or is killed.

``python -m tests.interleavings.soak_worker DSN LEDGER SEED sync|async PAUSE``. Each actor writes to the ledger
what it is about to do, and afterwards how that ended. What it was doing when it was killed is therefore
known to be unknown, and nothing else is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg

import pgkv
from tests.variants import Variant, in_thread, inside

COUNTERS = ("a", "b", "c")
ENTRIES = 200  # of the bounded table
ACCOUNTS = 4
SLOTS = 3
RATE, BURST = 40, 20  # of the limiter: tokens a second, and at once
FEW_SECONDS = 5.0  # the ttl of leases
# What another process, the server or the clock may do to a call at any time.
DISTURBED = (pgkv.PgkvError, psycopg.Error)


class Ledger:
    """An append-only file. One write() is one line, so that a kill loses no finished line."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._numbers = itertools.count()

    def write(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())

    @contextlib.contextmanager
    def attempt(self, what: str, name: str) -> Any:
        """Note an effect that must be counted: begun, then done or unknown."""
        number = next(self._numbers)
        self.write("begin", number, what, name)
        try:
            yield
        except DISTURBED:
            self.write("unknown", number, what, name)
            raise
        self.write("done", number, what, name)


class Soaked:
    """The actors of one process, in one of the two kinds of store."""

    def __init__(self, dsn: str, kind: str, ledger: Ledger, seed: int, pause: float) -> None:
        self.dsn = dsn
        self.pause = pause
        self.kind = Variant(kind)
        self.ledger = ledger
        self.random = random.Random(seed)
        self.store: Any = None
        self.bounded: Any = None

    async def run(self) -> None:
        self.store = await self.connected(
            table_type=pgkv.TableType.REGULAR, pool_max_size=8, operation_timeout=10
        )
        self.bounded = await self.connected(
            table_name="bounded", max_entries=ENTRIES, pool_max_size=2
        )
        # `load` of these reads the table itself, by a connection of the actor's own.
        self.source = self.make_source()
        self.queue = self.kind.make(
            "Queue",
            self.store,
            "soak",
            lease=FEW_SECONDS,
            max_attempts=10_000,
            backoff=pgkv.Backoff(0),
        )
        actors = (
            self.count, self.transfer, self.cache, self.lock, self.semaphore, self.hit, self.read, self.write,
            self.sessions, self.once, self.order, self.ship,
        )  # fmt: skip
        await asyncio.gather(*map(self.repeat, actors))

    async def connected(self, **config: Any) -> Any:
        """A store; the server may be away."""
        while True:
            with contextlib.suppress(*DISTURBED):
                return await self.kind.connect(self.dsn, **config)
            await asyncio.sleep(0.1)

    async def together(
        self, conn: Any, query: Any, params: list[Any], then: Callable[[Any], Any]
    ) -> None:
        """Run a query, and then what takes its connection, in one transaction."""
        if self.kind.name == "async":
            async with conn.transaction():
                await conn.execute(query, params)
                await then(conn)
            return

        def blocking() -> None:
            with psycopg.connect(self.dsn) as own:
                own.execute(query, params)
                then(own)

        await in_thread(blocking)

    async def repeat(self, actor: Callable[[Any], Awaitable[None]]) -> None:
        conn: Any = None
        while True:
            try:
                if conn is None or conn.closed:
                    conn = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True)
                await actor(conn)
                await asyncio.sleep(self.random.uniform(0, self.pause))
            except DISTURBED as error:
                self.ledger.write("disturbed", actor.__name__, type(error).__name__)
                if conn is not None and conn.info.transaction_status:
                    await conn.close()
                await asyncio.sleep(self.random.uniform(0, 0.2))

    # -- the store

    async def count(self, _: Any) -> None:
        """A counter that all processes share."""
        name = self.random.choice(COUNTERS)
        with self.ledger.attempt("count", name):
            await self.store.increment(f"count:{name}")

    async def transfer(self, _: Any) -> None:
        """A transaction that moves 1 between two accounts: their sum stays 0, whatever happens."""
        one, two = self.random.sample(range(ACCOUNTS), 2)

        async def move(tx: Any) -> None:
            await tx.increment_many({f"account:{one}": -1, f"account:{two}": 1})

        await self.store.run_transaction(move)

    async def cache(self, _: Any) -> None:
        """A table that evicts: what it still has of a key is that key's."""
        key = str(self.random.randrange(ENTRIES * 10))
        if self.random.random() < 0.5:
            await self.bounded.set(key, key)
        elif (found := await self.bounded.get(key)) not in (None, key.encode()):
            self.ledger.write("violation", f"the cache has {found} of {key}")

    # -- locks

    async def lock(self, conn: Any) -> None:
        """Read, then write, under a guarded lease: no increment may be lost."""
        lock = self.kind.make("Lock", self.store, "soak", ttl=FEW_SECONDS)
        async with lock.acquire(timeout=5) as lease:
            with self.ledger.attempt("guarded", "soak"):
                await self.guarded(conn, lease)

    async def guarded(self, conn: Any, lease: Any) -> None:
        if self.kind.name == "async":
            async with conn.transaction():
                await lease.guard(conn, max_hold=10)
                row = await (await conn.execute("SELECT n FROM guarded")).fetchone()
                await asyncio.sleep(self.random.uniform(0, 0.005))
                await conn.execute(
                    "UPDATE guarded SET n = %s, fence = %s", [row[0] + 1, lease.token]
                )
            return
        await in_thread(self.guarded_blocking, lease._target)

    def guarded_blocking(self, lease: pgkv.Lease) -> None:
        with psycopg.connect(self.dsn) as conn:
            lease.guard(conn, max_hold=10)
            row = conn.execute("SELECT n FROM guarded").fetchone()
            assert row is not None
            conn.execute("UPDATE guarded SET n = %s, fence = %s", [row[0] + 1, lease.token])

    async def semaphore(self, conn: Any) -> None:
        """The tokens of each slot rise."""
        semaphore = self.kind.make("Semaphore", self.store, "slots", SLOTS, ttl=FEW_SECONDS)
        async with semaphore.acquire(timeout=5) as lease:
            query = "UPDATE slots SET token = %s WHERE slot = %s AND token < %s"
            changed = await conn.execute(query, [lease.token, lease.slot, lease.token])
            # A lease that has ended meanwhile may rightly come too late.
            if not changed.rowcount and not lease.is_lost:
                self.ledger.write("suspect", "slot", lease.slot, lease.token)
            await asyncio.sleep(self.random.uniform(0, 0.01))

    # -- limits

    async def hit(self, _: Any) -> None:
        """What is admitted is counted, and bounded by the server's clock."""
        rate = pgkv.Rate(RATE, 1, burst=BURST)
        limiter = self.kind.make("RateLimiter", self.store, rate, name="soak", timeout=5)
        if (await limiter.hit("all")).allowed:
            self.ledger.write("admitted", "all")

    # -- cached

    def make_source(self) -> Any:
        """A cached function of one name in both kinds of process: they share its entries."""
        query = "SELECT version FROM source WHERE name = %s"

        def version(name: str) -> int:
            with psycopg.connect(self.dsn) as conn:
                row = conn.execute(query, [name]).fetchone()
                assert row is not None
                return int(row[0])

        async def version_async(name: str) -> int:
            async with await psycopg.AsyncConnection.connect(self.dsn) as conn:
                row = await (await conn.execute(query, [name])).fetchone()
                assert row is not None
                return int(row[0])

        version_async.__qualname__ = version.__qualname__
        if self.kind.name == "async":
            return pgkv.cached(ttl=30, stale=5, store_timeout=2, store=self.store)(version_async)
        return pgkv.cached(ttl=30, stale=5, store_timeout=2, store=self.store._target)(version)

    async def read(self, conn: Any) -> None:
        """A cached call is never older than what was committed before it."""
        name = self.random.choice("xyz")
        query = "SELECT version FROM source WHERE name = %s"
        row = await (await conn.execute(query, [name])).fetchone()
        value = self.source(name) if self.kind.name == "async" else in_thread(self.source, name)
        if (found := await value) < row[0]:
            self.ledger.write(
                "violation", f"cached {name} is {found}, was {row[0]} before the call"
            )

    async def write(self, conn: Any) -> None:
        """Write the source and invalidate, in one transaction."""
        name = self.random.choice("xyz")
        query = "UPDATE source SET version = version + 1 WHERE name = %s"
        await self.together(
            conn, query, [name], lambda own: self.source.using(own).invalidate(name)
        )
        await asyncio.sleep(self.random.uniform(0.01, 0.1))

    # -- sessions

    async def sessions(self, _: Any) -> None:
        """After a logout that was answered none of the session's tokens is alive."""
        sessions = self.kind.make("SessionStore", self.store)
        session = await sessions.create({"n": 0}, user_id="soak")
        tokens = [session.id]
        for step in range(self.random.randrange(4)):
            session.data["n"] = step
            if self.random.random() < 0.5:
                await sessions.rotate(session)
                tokens.append(session.id)
            else:
                await sessions.save(session)
        other = await sessions.load(session.id)
        if other is not None and self.random.random() < 0.5:
            # A logout meets a rotation, as two requests of one browser do.
            ended, _ = await asyncio.gather(
                sessions.destroy(session), sessions.rotate(other), return_exceptions=True
            )
            tokens.append(other.id)
        else:
            ended = await sessions.destroy(session)
        if isinstance(ended, BaseException):
            return
        for token in tokens:
            if await sessions.load(token) is not None:
                self.ledger.write("violation", "a session is alive after its logout")

    # -- idempotency keys

    async def once(self, conn: Any) -> None:
        """All processes try the same few keys: each has one effect."""
        key = f"{int(time.time() / FEW_SECONDS)} {self.random.randrange(50)}"
        keys = self.kind.make("Idempotency", self.store, ttl=60, lease=FEW_SECONDS)
        with contextlib.suppress(pgkv.InProgressError):
            async with keys.once(key) as attempt:
                if not attempt.is_replay:
                    complete = inside(attempt).complete
                    with self.ledger.attempt("effects", "soak"):
                        await self.together(
                            conn,
                            "INSERT INTO effects VALUES (%s)",
                            [key],
                            lambda own: complete(b"done", own),
                        )
                elif attempt.result != b"done":
                    self.ledger.write("violation", f"a replay has {attempt.result}")

    # -- jobs

    async def order(self, conn: Any) -> None:
        """An order and its job, in one transaction."""
        number = str(self.random.getrandbits(60))
        queue = inside(self.queue)
        with self.ledger.attempt("orders", "soak"):
            await self.together(
                conn,
                "INSERT INTO orders VALUES (%s)",
                [number],
                lambda own: queue.using(own).put(number),
            )
        await asyncio.sleep(self.random.uniform(0.01, 0.05))

    async def ship(self, conn: Any) -> None:
        """An order's effect and the ack of its job, in one transaction."""
        job = await self.queue.take(timeout=1)
        if job is None:
            return
        queue, taken = inside(self.queue), inside(job)
        async with job:
            with self.ledger.attempt("shipped", "soak"):
                await self.together(
                    conn,
                    "INSERT INTO shipped VALUES (%s)",
                    [job.payload.decode()],
                    lambda own: queue.using(own).ack(taken),
                )


def main(dsn: str, path: str, seed: str, kind: str, pause: str) -> None:
    asyncio.run(Soaked(dsn, kind, Ledger(path), int(seed), float(pause)).run())


if __name__ == "__main__":
    main(*sys.argv[1:])
