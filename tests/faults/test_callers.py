"""The caller's own connections and pools: used, never kept, closed or changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg.conninfo import conninfo_to_dict

import pgkv
from pgkv import (
    ConfigError,
    InvalidValueError,
    PgkvError,
    PoolTimeoutError,
    QueryError,
    Store,
    StoreUnavailableError,
    TransactionError,
)
from tests.faults.support import Crew, Witness, newest, until
from tests.servers import LATE
from tests.variants import hurries, in_a_hurry, was_sent

pytestmark = newest


@pytest.fixture
def own_store(dsn: str) -> Iterator[Store]:
    with Store.connect(dsn) as store:
        yield store


def pool_of(dsn: str, **options: Any) -> psycopg_pool.ConnectionPool[Any]:
    return psycopg_pool.ConnectionPool(
        dsn, **{"min_size": 1, "max_size": 2, "open": True, **options}
    )


# -- from_pool -----------------------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("close_returns", [True, False])
def test_a_callers_pool(dsn: str, witness: Witness, autocommit: bool, close_returns: bool) -> None:
    """Every operation checks out and in; nothing is kept, changed or closed; what is written is
    committed."""
    with pool_of(dsn, kwargs={"autocommit": autocommit}, close_returns=close_returns) as pool:
        store = Store.from_pool(pool)
        store.create_table()
        before = (pool.min_size, pool.max_size, pool.timeout, pool.max_idle)
        requests = pool.get_stats()["requests_num"]
        for i in range(10):
            store.set("k", b"%d" % i)
            assert store.get("k") == b"%d" % i
        assert pool.get_stats()["requests_num"] - requests == 20
        assert store.increment("n") == 1
        with store.transaction() as tx:
            tx.increment("n")
        assert store.run_transaction(lambda tx: tx.increment("n")) == 3
        with pytest.raises(InvalidValueError):
            store.set("word", b"x")
            store.increment("word")
        assert witness.rows("key = 'n' AND value = '3'") == 1
        with pool.connection() as conn:
            assert conn.autocommit is autocommit
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert conn.execute("SELECT 1").fetchone() == (1,)
        store.close()
        assert not pool.closed
        assert (pool.min_size, pool.max_size, pool.timeout, pool.max_idle) == before
        assert store.get("n") == b"3"  # there was nothing to close


def test_others_are_not_starved(dsn: str) -> None:
    """A pool of one, used by the store without pause: its other users get their turns."""
    with pool_of(dsn, max_size=1, timeout=60) as pool:
        store = Store.from_pool(pool)
        store.create_table()
        running = True

        def work() -> None:
            while running:
                store.set("k", b"v")

        with Crew() as crew:
            for _ in range(3):
                crew.start(work)
            try:
                started = time.monotonic()
                for _ in range(20):
                    with pool.connection() as conn:
                        conn.execute("SELECT 1")
                assert time.monotonic() - started < 10 + LATE
            finally:
                running = False


def test_dead_connections_of_a_pool(dsn: str, witness: Witness) -> None:
    """Dead connections in the caller's pool are replaced, not used, whatever the retry policy."""
    with pool_of(dsn, min_size=4, max_size=4) as pool:
        pool.wait()
        store = Store.from_pool(pool, retry=None)
        store.create_table()
        for expected in range(1, 4):
            witness.terminate()
            assert store.increment("n") == expected
        pool.wait()
        assert pool.get_stats()["pool_size"] == 4


@pytest.mark.parametrize("close_returns", [True, False])
def test_a_timed_out_connection_is_not_given_back_alive(
    dsn: str, witness: Witness, close_returns: bool
) -> None:
    """After a deadline the connection is closed, not returned with a statement running on it."""
    with pool_of(dsn, max_size=1, close_returns=close_returns) as pool:
        store = Store.from_pool(pool)
        store.create_table()
        store.set("k", b"old")
        with witness.lock("k"):
            for _ in hurries(store):
                with pytest.raises(PgkvError) as caught:
                    store.set("k", b"new")
                if was_sent(caught.value):
                    break
        with pool.connection() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
        assert store.get("k") == b"old"


def test_a_busy_and_a_closed_pool(dsn: str) -> None:
    """A pool whose connections are all out: PoolTimeoutError after the pool's own timeout; a closed
    one: StoreUnavailableError."""
    with pool_of(dsn, max_size=1) as pool:
        store = Store.from_pool(pool, pool_timeout=60, operation_timeout=60)
        store.create_table()
        pool.timeout = 0.2
        with pool.connection():
            started = time.monotonic()
            with pytest.raises(PoolTimeoutError):
                store.get("k")
            assert 0.15 < time.monotonic() - started < 2 + LATE
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.get("k")


def test_a_pool_that_resets_its_connections(dsn: str) -> None:
    """reset=DISCARD ALL between any two checkouts: operations, batches and transactions work."""

    def discard(conn: psycopg.Connection[Any]) -> None:
        conn.autocommit = True
        conn.execute("DISCARD ALL")
        conn.autocommit = False

    with pool_of(dsn, reset=discard, max_size=1) as pool:
        store = Store.from_pool(pool)
        store.create_table()
        for expected in range(2, 12, 2):
            store.increment("n")
            with store.transaction() as tx:
                assert tx.increment("n") == expected
            assert store.set_many({f"k{i}": b"v" for i in range(5001)}) == 5001


def test_what_is_no_pool(dsn: str) -> None:
    """Anything but a ConnectionPool is a ConfigError that says what is wanted."""
    for wrong in (dsn, psycopg_pool.AsyncConnectionPool(dsn, open=False), object()):
        with pytest.raises(ConfigError, match="ConnectionPool"):
            Store.from_pool(wrong)  # type: ignore[arg-type]  # what it refuses


# -- using ---------------------------------------------------------------------------------


def test_commit_and_rollback(dsn: str, own_store: Store) -> None:
    """What the store does on a connection ends as its transaction does, savepoints included; the
    connection's own transaction is begun if there is none."""
    with psycopg.connect(dsn) as conn:
        mine = own_store.using(conn)
        mine.set("k", b"v")
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        assert own_store.get("k") is None
        conn.rollback()
        assert mine.get("k") is None
        mine.set("k", b"v")
        with conn.transaction():
            mine.set("inner", b"v")
            with pytest.raises(ZeroDivisionError), conn.transaction():
                mine.set("undone", b"v")
                raise ZeroDivisionError
            with pytest.raises(InvalidValueError):
                mine.increment("k")  # under a savepoint: the transaction goes on
            with pytest.raises(ZeroDivisionError), mine.transaction() as tx:
                tx.set("undone", b"v")
                raise ZeroDivisionError
        assert mine.increment("n") == 1
        conn.commit()
        assert set(own_store.keys()) == {"k", "inner", "n"}
        mine.close()
        assert not conn.closed
        assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)


def test_autocommit(dsn: str, own_store: Store) -> None:
    """On a connection in autocommit each operation is its own; transaction() opens one."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        mine = own_store.using(conn)
        mine.set("k", b"v")
        assert own_store.get("k") == b"v"
        assert mine.increment("n") == 1
        with pytest.raises(InvalidValueError):
            mine.increment("k")
        with pytest.raises(ZeroDivisionError), mine.transaction() as tx:
            tx.set("k", b"w")
            raise ZeroDivisionError
        assert own_store.get("k") == b"v"
        with conn.transaction():
            mine.set("k", b"w")
            assert own_store.get("k") == b"v"
        assert own_store.get("k") == b"w"


def test_isolation_level_is_kept(dsn: str, own_store: Store) -> None:
    """The transaction begun by the store's first operation has the connection's isolation level."""
    with psycopg.connect(dsn) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        mine = own_store.using(conn)
        assert mine.get("k") is None
        own_store.set("k", b"v")
        assert mine.get("k") is None
        with pytest.raises(QueryError) as caught:
            mine.set("k", b"w")
        assert (caught.value.sqlstate, caught.value.retryable) == ("40001", True)


def test_connections_that_cannot_be_used(dsn: str, own_store: Store) -> None:
    """Failed, closed, in pipeline mode, of another encoding: refused with the reason."""
    conn = psycopg.connect(dsn)
    mine = own_store.using(conn)
    with pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute("SELECT 1/0")
    with pytest.raises(TransactionError, match="roll it back"):
        mine.get("k")
    conn.rollback()
    with conn.pipeline(), pytest.raises(TransactionError, match="pipeline"):
        mine.get("k")
    assert mine.get("k") is None
    conn.close()
    with pytest.raises(TransactionError, match="closed"):
        mine.set("k", b"v")
    with (
        psycopg.connect(dsn, client_encoding="latin1") as other,
        pytest.raises(ConfigError, match="UTF8"),
    ):
        own_store.using(other).get("k")


def test_a_missing_table_is_not_created(dsn: str, own_store: Store, witness: Witness) -> None:
    """In the caller's transaction nothing is healed; the error says what to do."""
    witness.conn.execute("DROP TABLE kv_store")
    with psycopg.connect(dsn) as conn, pytest.raises(PgkvError, match="create_table"):
        own_store.using(conn).set("k", b"v")


def test_two_threads_on_one_connection(dsn: str, own_store: Store) -> None:
    """Threads that share a connection, one through the store and one through psycopg, take turns by
    the connection's lock, refused values included."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        own_store.set("word", b"x")
        conn.execute("BEGIN")
        stores = [own_store.using(conn) for _ in range(2)]

        def by_store(number: int) -> None:
            mine = stores[number % 2]
            for i in range(60):
                mine.set(f"k{number}", b"%d" % i)
                assert mine.get(f"k{number}") == b"%d" % i
                with pytest.raises(InvalidValueError):
                    mine.increment("word")

        def by_cursor() -> None:
            for i in range(200):
                assert conn.execute("SELECT %s::int", [i]).fetchone() == (i,)

        with Crew() as crew:
            for number in range(3):
                crew.start(by_store, number)
            crew.start(by_cursor)
        conn.execute("COMMIT")
    assert own_store.get("k2") == b"59"


def test_deadline_on_a_callers_connection(dsn: str, own_store: Store, witness: Witness) -> None:
    """operation_timeout cancels the statement and closes the connection: a late cancel request must
    hit nothing of the caller's."""
    own_store.set("k", b"old")
    with witness.lock("k"):
        for seconds in hurries(own_store):
            hasty = Store(pgkv.Config(dsn, operation_timeout=seconds))  # opens nothing by itself
            with psycopg.connect(dsn) as conn:
                with pytest.raises(PgkvError) as caught:
                    hasty.using(conn).set("k", b"new")
                if was_sent(caught.value):
                    assert conn.closed
                    break
    assert own_store.get("k") == b"old"


def test_wrong_connections(dsn: str, own_store: Store) -> None:
    """What is no psycopg 3 connection of this variant is refused by its name."""
    psycopg2 = pytest.importorskip("psycopg2")
    conn = psycopg2.connect(dsn)
    with pytest.raises(ConfigError, match="psycopg2"):
        own_store.using(conn)
    conn.close()

    async def check() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as other:
            with pytest.raises(ConfigError, match="AsyncConnection"):
                own_store.using(other)

    asyncio.run(check())
    for wrong in (None, dsn, object()):
        with pytest.raises(ConfigError, match="using"):
            own_store.using(wrong)


def test_sqlalchemy(dsn: str, own_store: Store) -> None:
    """SQLAlchemy's Connection and Session are unwrapped: one transaction for both."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    orm = pytest.importorskip("sqlalchemy.orm")
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    with engine.connect() as conn:
        own_store.using(conn).set("k", b"v")
        assert conn.execute(sqlalchemy.text("SELECT count(*) FROM kv_store")).scalar() == 1
        conn.rollback()
    assert own_store.get("k") is None
    with engine.begin() as conn:
        own_store.using(conn).set("k", b"v")
    assert own_store.get("k") == b"v"
    with orm.Session(engine) as session, session.begin():
        own_store.using(session).increment("n")
    assert own_store.get("n") == b"1"
    engine.dispose()
    old = sqlalchemy.create_engine(
        "postgresql+psycopg2://", creator=lambda: pytest.importorskip("psycopg2").connect(dsn)
    )
    with old.connect() as conn, pytest.raises(ConfigError, match="psycopg2"):
        own_store.using(conn)
    old.dispose()


def test_django(dsn: str, own_store: Store) -> None:
    """Django's connection is unwrapped; what the store does belongs to its atomic()."""
    pytest.importorskip("django")
    from django.conf import settings

    if not settings.configured:
        params = conninfo_to_dict(dsn)
        settings.configure(
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": params["dbname"],
                    "USER": params.get("user", ""),
                    "HOST": params.get("host", ""),
                    "PORT": params.get("port", ""),
                    "PASSWORD": params.get("password", ""),
                    "OPTIONS": {"options": params["options"]},
                }
            }
        )
    from django.db import connection, transaction

    with pytest.raises(ZeroDivisionError), transaction.atomic():
        own_store.using(connection).set("k", b"v")
        raise ZeroDivisionError
    assert own_store.get("k") is None
    with transaction.atomic():
        own_store.using(connection).set("k", b"v")
    assert own_store.get("k") == b"v"
    own_store.using(connection).set("k", b"w")  # Django's autocommit
    assert own_store.get("k") == b"w"
    connection.close()


# -- the same for asyncio ------------------------------------------------------------------


async def test_an_async_pool(dsn: str, witness: Witness) -> None:
    """AsyncStore over the caller's AsyncConnectionPool: dead and timed-out connections are
    replaced, cancelled tasks lose none, the pool is not closed."""
    pool: psycopg_pool.AsyncConnectionPool[Any] = psycopg_pool.AsyncConnectionPool(
        dsn, min_size=2, max_size=2, open=False
    )
    async with pool:
        await pool.wait()
        store = pgkv.AsyncStore.from_pool(pool, retry=None)
        await store.create_table()
        for expected in range(1, 4):
            await asyncio.to_thread(witness.terminate)
            assert await store.increment("n") == expected
        await store.set("k", b"old")
        with witness.lock("k"):
            with in_a_hurry(store, 1.0), pytest.raises(pgkv.OperationTimeoutError):
                await store.set("k", b"new")
            task = asyncio.ensure_future(store.set("k", b"new"))
            await until(lambda: witness.waiting() == 1, "the call is blocked")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not witness.active(), "the statement is cancelled")
        assert await store.get("k") == b"old"
        async with pool.connection(), pool.connection() as conn:
            assert await (await conn.execute("SELECT 1")).fetchone() == (1,)
        await store.close()
        assert not pool.closed
