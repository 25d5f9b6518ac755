"""The behaviour tests of store and patterns once more, through a PgBouncer in transaction mode with two server
connections: one that keeps prepared statements, and one that does not.

Every test of the modules below that works with a store runs here with ``pooler=Pooler.TRANSACTION``,
in both variants, on one version of PostgreSQL; in `make test` every other one. The peers of a test, and its own connections, go to the
server directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import pgkv
from pgkv import Pooler
from pgkv._engine.wire import Preparing
from tests import pgbouncer
from tests.again import adopt
from tests.faults.support import newest
from tests.peers import Peer, caller_connection
from tests.postgres import (
    test_atomic,
    test_basic,
    test_batch,
    test_cached,
    test_cached_invalidation,
    test_coalesce,
    test_collection,
    test_expiry,
    test_idempotency,
    test_leader,
    test_lock,
    test_lock_guard,
    test_overview,
    test_pipeline,
    test_queue,
    test_races,
    test_rate_limit,
    test_scan,
    test_semaphore,
    test_session,
    test_session_races,
    test_session_rotation,
    test_storms,
    test_transaction,
    test_using,
)
from tests.postgres.test_pipeline import Tape
from tests.servers import Server, UserServer
from tests.variants import Variant, closing_all, inside

MODULES = (
    *(test_basic, test_batch, test_atomic, test_scan, test_expiry, test_collection),
    *(test_lock, test_lock_guard, test_semaphore, test_leader, test_rate_limit),
    *(test_cached, test_cached_invalidation, test_idempotency, test_queue),
    *(test_session, test_session_rotation, test_session_races),
    *(test_transaction, test_using, test_races, test_storms, test_pipeline, test_coalesce),
    test_overview,
)
# What cannot be asked here, and why.
_COUNTED = "counts the messages of prepared statements, which not every pooler keeps"
LEFT_OUT = dict.fromkeys(
    (
        *("test_pipeline__one_round_trip", "test_pipeline__a_refused_operation"),
        *("test_coalesce__gets_of_a_turn", "test_coalesce__everything_else_of_a_turn"),
        "test_coalesce__one_alone",
    ),
    _COUNTED,
) | {
    "test_coalesce__a_task_does_not_wait_for_itself": "its transaction and the write that waits"
    " hold two connections, which is all that this pooler has",
    "test_pipeline__behind_a_pooler": "counts the messages of one that keeps no statements",
    "test_pipeline__statements_that_were_forgotten": "PgBouncer closes the connection of a client"
    " that deallocates all and then uses one",
    "test_idempotency__the_wait_is_over": "sets a session's parameter, which a pooler does not keep",
    **dict.fromkeys(
        (
            "test_idempotency__the_first_rolls_back_or_dies",
            "test_transaction__a_connection_lost_before_the_first_operation",
        ),
        "a pooler invents the id of its process",
    ),
    "test_queue__notified_takers_wake": "no notification comes through a pooler",
    "test_using__nothing_is_prepared": "the server's connection has what others prepared",
}

pytestmark = [newest, pgbouncer.needed]


@pytest.fixture(params=pgbouncer.programs())
def program(request: pytest.FixtureRequest) -> str:
    """Whether the pooler keeps prepared statements: "newer" ones do."""
    return str(request.param)


def pooler(
    dsn: str, *settings: str, program: str = "", connections: int = 2, mode: str = "transaction"
) -> contextlib.AbstractContextManager[str]:
    """A PgBouncer whose server connections work in the schema of `dsn`; gives its own DSN."""
    to = conninfo_to_dict(dsn)
    schema = re.search(r"search_path=(\w+)", str(to["options"]))
    assert schema is not None
    if pgbouncer.FOREIGN:
        if settings or mode != "transaction":
            pytest.skip("needs a PgBouncer with settings of its own")
        return pgbouncer.borrowed(dsn, schema[1])
    return pgbouncer.started(
        dsn,
        f"pool_mode = {mode}",
        f"default_pool_size = {connections}",
        "max_client_conn = 500",
        *settings,
        program=program,
        connect_query=f"SET search_path = {schema[1]}, pg_catalog",
        application_name=str(to["application_name"]),
    )


@pytest.fixture
def pooled(server: Server | UserServer, dsn: str, program: str) -> Iterator[str]:
    """The way through PgBouncer to the test's schema."""
    if not isinstance(server, Server) and not pgbouncer.FOREIGN:
        pytest.skip("PgBouncer needs the password of PGKV_TEST_DSN's server")
    with pooler(dsn, program=program) as through:
        yield through


@pytest.fixture
def make_store(
    pooled: str, variant: Variant, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """As everywhere, but through the pooler."""
    with closing_all(event_loop_runner) as made:

        async def make(**config: Any) -> Any:
            config = {"dsn": pooled, "pooler": Pooler.TRANSACTION, **config}
            made.append(await variant.connect(config.pop("dsn"), **config))
            return made[-1]

        yield make


@pytest.fixture
def connect(
    pooled: str, variant: Variant, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """The caller's own connection, which passes through the pooler too."""
    with closing_all(event_loop_runner) as made:

        async def make(**options: Any) -> Any:
            options = {"dsn": pooled, "prepare_threshold": None, **options}
            made.append(await caller_connection(variant, options.pop("dsn"), **options))
            return made[-1]

        yield make


@pytest.fixture
def tape(pooled: str) -> Iterator[Tape]:
    """Listens between the store and the pooler."""
    with Tape(pooled) as proxy:
        yield proxy


adopt(
    globals(),
    MODULES,
    own={"make_store", "connect", "tape", "variant"},
    left_out=LEFT_OUT,
    one_in=2,
    marks={test_coalesce: pytest.mark.parametrize("variant", ["async"], indirect=True)},
)


# -- what only a pooler does


def allowed(store: Any) -> bool | None:
    """Whether the store prepares its statements."""
    inner = inside(store)
    found: bool | None = inner._channel._pool._preparing.allowed
    return found


async def test_statements_are_prepared_where_the_pooler_keeps_them(
    make_store: Any, program: str
) -> None:
    """One trial tells."""
    store = await make_store()
    await asyncio.gather(*(store.increment("n") for _ in range(50)))
    assert await store.get("n") == b"50"
    assert allowed(store) is (program == "newer")


@pgbouncer.newer_needed
async def test_a_newer_pooler_that_keeps_none(dsn: str, variant: Variant) -> None:
    """max_prepared_statements = 0, the default until 1.23: nothing is prepared."""
    with pooler(dsn, "max_prepared_statements = 0", program="newer") as through:
        store = await variant.connect(through, pooler=Pooler.TRANSACTION)
        await asyncio.gather(*(store.increment("n") for _ in range(50)))
        assert await store.get("n") == b"50"
        assert allowed(store) is False
        await store.close()


@pytest.mark.parametrize("batch", [False, True], ids=["alone", "pipeline"])
async def test_a_statement_that_the_pooler_lost(
    make_store: Any, pooled: str, monkeypatch: pytest.MonkeyPatch, *, batch: bool, program: str
) -> None:
    """The trial was passed, and then a statement is gone with the transaction: it is sent once more,
    unprepared, as are all that follow."""
    if program == "newer":
        pytest.skip("it loses none")
    monkeypatch.setattr(Preparing, "learn", lambda self, _: setattr(self, "allowed", True))
    store = await make_store(pool_max_size=1)
    await store.set("k", b"v")

    async def ask() -> list[bytes | None]:
        if not batch:
            return [await store.get("k")]
        async with store.pipeline() as pipe:
            answers = pipe.get("k"), pipe.exists("k")
        return [each.result() for each in answers]

    before = await ask()
    assert allowed(store) is True
    # The server's connection on which it was prepared is another client's for a while.
    with psycopg.connect(pooled, prepare_threshold=None) as other:
        other.execute("SELECT 1")
        assert await ask() == before
        assert allowed(store) is False
        assert await store.increment("n") == 1


@pytest.mark.parametrize("told", [Pooler.NONE, Pooler.TRANSACTION])
async def test_session_mode(dsn: str, variant: Variant, program: str, told: Pooler) -> None:
    """A client has a server connection of its own, and statements may be prepared, where the pooler
    ignores the settings that pgkv sends."""
    ignored = "ignore_startup_parameters = options"
    with pooler(dsn, ignored, program=program, mode="session") as through:
        store = await variant.connect(through, pooler=told, pool_max_size=2)
        await asyncio.gather(*(store.increment("n") for _ in range(50)))
        async with store.transaction() as tx:
            await tx.increment("n")
        assert await store.get("n") == b"51"
        await store.close()


async def test_prepared_statements_through_a_pooler(
    pooled: str, variant: Variant, dsn: str
) -> None:
    """A store that does not know of the pooler is told what to set, by connect() or by the first
    operation that meets another server connection."""
    with pytest.raises(pgkv.PgkvError, match=r"Pooler\.TRANSACTION"):
        await variant.connect(pooled, retry=None)


async def test_two_server_connections(make_store: Any, peer: Peer) -> None:
    """Many stores with many connections share the pooler's two."""
    stores = [await make_store(pool_max_size=5) for _ in range(4)]
    await asyncio.gather(*(each.increment("n") for each in stores for _ in range(100)))
    assert await stores[0].get("n") == b"400"
    found = peer.one(
        "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND"
        " backend_type = 'client backend' AND application_name ="
        " (SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid())"
    )
    assert 1 <= found <= 2


async def test_a_watcher_polls_and_a_writer_tells(
    make_store: Any, variant: Variant, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the pooler a watcher hears nothing and sees the change by itself; a writer's notification
    passes."""
    monkeypatch.setattr("pgkv._watch.source.POLL_DEAF", 0.1)
    store = await make_store(notify=True)
    direct = await make_store(dsn=dsn, pooler=Pooler.NONE)
    async with store.watch("k") as polling, direct.watch("k", poll=None) as hearing:
        await store.set("k", b"1")
        for events in (polling, hearing):
            assert (await events.next(timeout=60)).kind == "set"
