"""Idempotency keys under kills: storms with exact totals, and the control that shows doubles."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

import pgkv
from pgkv import TableType
from pgkv.testing import ServerClock
from tests import FULL
from tests.faults.idempotency_worker import LEASE
from tests.faults.proxy import Proxy
from tests.faults.support import newest
from tests.hammer import Start, Storm, count, kill_when_done, starting
from tests.servers import Server
from tests.variants import Variant

pytestmark = newest
# A storm goes on until that much was done, however slow the machine is.
EFFECTS = int(os.environ.get("PGKV_IDEMPOTENCY_EFFECTS", "40" if FULL else "20"))
KILLS = max(6 if FULL else 3, EFFECTS // 20)


start = starting("tests.faults.idempotency_worker")


@pytest.fixture
def effects(dsn: str) -> Iterator[psycopg.Connection]:
    """A table of effects, and a connection that counts them."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE effects (key text)")
        yield conn


@pytest.mark.parametrize("mode", ["inside", "lease"])
def test_a_storm_of_kills(dsn: str, effects: psycopg.Connection, start: Start, mode: str) -> None:
    """Processes are killed, paused past their leases, their backends terminated, their transactions rolled
    back and some commits come past the lease: every key has one effect and its record, and a key asked again is a replay."""
    with pgkv.Store.connect(dsn) as store:
        idem = pgkv.Idempotency(store)
        idem.create_table()
        fates = "kill cut" if mode == "inside" else "kill kill cut cut pause"
        storm = Storm(start, (mode, dsn), effects, fates, LEASE)
        while storm.kills < KILLS or count(effects, "SELECT count(*) FROM effects") < EFFECTS:
            storm.strike()
        storm.wait_for_paused()
        storm.end()
        done = count(effects, "SELECT count(*) FROM effects")
        records = count(effects, "SELECT count(*) FROM kv_store_idempotency WHERE result = 'done'")
        assert count(effects, "SELECT count(DISTINCT key) FROM effects") == done == records
        keys = effects.execute("SELECT trim(E'\\x1f' FROM key) FROM kv_store_idempotency")
        for (key,) in keys.fetchall():
            known = count(effects, f"SELECT count(*) FROM effects WHERE key = '{key}'")
            undone = contextlib.suppress(pgkv.InProgressError, ZeroDivisionError)
            with undone, idem.once(key) as attempt:
                assert attempt.is_replay == bool(known), key
                if not known:
                    raise ZeroDivisionError  # released


@pytest.mark.parametrize(("mode", "effects_done"), [("apart", 2), ("together", 1)])
def test_killed_between_effect_and_record(
    dsn: str,
    effects: psycopg.Connection,
    start: Start,
    mode: str,
    effects_done: int,
) -> None:
    """The control: a record apart from its effect, as any middleware alone writes it, lets the retry of a
    killed process repeat the effect. Completed in the effect's transaction it does not."""
    kill_when_done(start("control", mode, dsn))
    with pgkv.Store.connect(dsn) as store, pgkv.Idempotency(store).once("k", wait=90) as attempt:
        assert attempt.is_replay == (mode == "together")
        if not attempt.is_replay:
            effects.execute("INSERT INTO effects VALUES ('k')")
    assert count(effects, "SELECT count(*) FROM effects") == effects_done


async def test_the_answer_to_a_claim_is_lost(
    dsn: str, make_store: Any, variant: Variant, clock: ServerClock
) -> None:
    """A claim whose answer never came is not sent again: the key is held to the lease's end, and then
    free."""
    with Proxy(dsn) as proxy:
        store = await make_store(dsn=proxy.dsn)
        idem = variant.make("Idempotency", store, lease=60)
        async with idem.once("warm"):
            pass
        proxy.arm(b"unheard")
        with pytest.raises(pgkv.StoreUnavailableError) as lost:
            await claimed(idem, "unheard")
        assert lost.value.outcome_unknown
        with pytest.raises(pgkv.InProgressError):
            await claimed(idem, "unheard")
        clock.advance(61)
        assert not await claimed(idem, "unheard", wait=30)


async def claimed(idem: Any, key: str, **options: Any) -> bool:
    """Run an empty block; whether it was a replay."""
    async with idem.once(key, **options) as attempt:
        return bool(attempt.is_replay)


async def test_a_crash_of_the_server(
    make_server: Callable[..., Server], make_store: Any, variant: Variant
) -> None:
    """A claim, and what was completed, are on disk: after a crash the key is held, and the record there.
    Of a transaction that was open nothing is left."""
    server = make_server(durable=True)
    retry = pgkv.RetryPolicy(attempts=100, deadline=60)
    store = await make_store(dsn=server.dsn, retry=retry, table_type=TableType.REGULAR)
    idem = variant.make("Idempotency", store, lease=600)
    async with idem.once("done") as attempt:
        attempt.result = b"r"
    await store.set("effect", "none")
    killed = False
    async with idem.once("claimed"):
        with pytest.raises(pgkv.PgkvError):
            async with store.transaction() as inside:
                await inside.set("effect", "half")
                async with variant.make("Idempotency", inside).once("inside") as attempt:
                    attempt.result = b"half"
                server.kill()
                killed = True
        assert killed
        server.start()
        with pytest.raises(pgkv.InProgressError):
            await claimed(idem, "claimed")
        assert (await idem.get("done")).result == b"r"
        assert await idem.get("inside") is None
        assert await store.get("effect") == b"none"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_child(dsn: str) -> None:
    """A child's copy of an attempt is lost, and ends nothing; the parent's goes on."""
    with pgkv.Store.connect(dsn) as store:
        idem = pgkv.Idempotency(store)
        with idem.once("k") as attempt:
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    try:
                        attempt.complete(b"child")
                    except pgkv.LeaseLostError as error:
                        code = 0 if attempt.is_lost and error.reason == "forked" else 2
                os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            attempt.check()
            attempt.result = b"parent"
        found = idem.get("k")
        assert found is not None
        assert found.result == b"parent"


@pytest.mark.usefixtures("patience")
def test_interrupted(dsn: str) -> None:
    """Ctrl-C in a block releases the key."""
    with pgkv.Store.connect(dsn) as store:
        idem = pgkv.Idempotency(store)
        with pytest.raises(KeyboardInterrupt), idem.once("k"):
            signal.raise_signal(signal.SIGINT)
        with idem.once("k") as attempt:
            assert not attempt.is_replay
