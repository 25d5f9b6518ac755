"""Idempotency keys under kills: storms with exact totals, and the control that shows doubles."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import pgkv
from tests.faults.idempotency_worker import KEYS, LEASE
from tests.faults.proxy import Proxy
from tests.faults.support import newest
from tests.servers import Server, wait_until

pytestmark = newest
ROOT = Path(__file__).resolve().parents[2]
# A storm goes on until that much was done, however slow the machine is.
EFFECTS = int(os.environ.get("PGKV_IDEMPOTENCY_EFFECTS", "40"))
KILLS, WORKERS = max(6, EFFECTS // 20), 4


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start("storm", "inside", dsn, 1) starts a worker; none outlives the test."""
    made: list[subprocess.Popen[str]] = []

    def begin(*args: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.faults.idempotency_worker", *map(str, args)]
        pipe = subprocess.PIPE
        made.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
        return made[-1]

    yield begin
    for each in made:
        each.kill()
        each.communicate()


@pytest.fixture
def effects(dsn: str) -> Iterator[psycopg.Connection]:
    """A table of effects, and a connection that counts them."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE effects (key text)")
        yield conn


def count(conn: psycopg.Connection, query: str) -> int:
    """The only number of a query."""
    row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("mode", ["inside", "lease"])
def test_a_storm_of_kills(
    dsn: str, effects: psycopg.Connection, start: Callable[..., Any], mode: str
) -> None:
    """Processes are killed, their backends terminated, their transactions rolled back and some commits
    come past the lease: every key has one effect and its record, and a key asked again is a replay."""
    rng = random.Random(17)
    with pgkv.Store.connect(dsn) as store:
        idem = pgkv.Idempotency(store)
        idem.create_table()
        seeds = iter(range(10_000))
        workers = [start("storm", mode, dsn, next(seeds)) for _ in range(WORKERS)]
        wait_until(lambda: count(effects, "SELECT count(*) FROM effects") > 0, "work begins")
        kills, end = 0, time.monotonic() + 100
        while kills < KILLS or count(effects, "SELECT count(*) FROM effects") < EFFECTS:
            assert time.monotonic() < end, "the storm makes no progress"
            time.sleep(rng.uniform(0.1, 0.6))
            if rng.random() < 0.5:
                effects.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <>"
                    " pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'"
                    " AND query LIKE '%effects%' ORDER BY random() LIMIT 1"
                )
                continue
            victim = rng.randrange(WORKERS)
            workers[victim].kill()
            kills += 1
            workers[victim] = start("storm", mode, dsn, next(seeds))
        for worker in workers:
            worker.kill()
            worker.wait()
        wait_until(
            lambda: (
                count(effects, "SELECT count(*) FROM pg_stat_activity WHERE state <> 'idle'") == 1
            ),
            "their transactions end",
        )
        done = count(effects, "SELECT count(*) FROM effects")
        records = count(effects, "SELECT count(*) FROM kv_store_idempotency WHERE result = 'done'")
        assert count(effects, "SELECT count(DISTINCT key) FROM effects") == done == records
        for key in range(KEYS):
            known = count(effects, f"SELECT count(*) FROM effects WHERE key = '{key}'")
            undone = contextlib.suppress(pgkv.InProgressError, ZeroDivisionError)
            with undone, idem.once(str(key)) as attempt:
                assert attempt.is_replay == bool(known), key
                if not known:
                    raise ZeroDivisionError  # released


@pytest.mark.parametrize(("mode", "effects_done"), [("apart", 2), ("together", 1)])
def test_killed_between_effect_and_record(
    dsn: str,
    effects: psycopg.Connection,
    start: Callable[..., Any],
    mode: str,
    effects_done: int,
) -> None:
    """The control: a record apart from its effect, as any middleware alone writes it, lets the retry of a
    killed process repeat the effect. Completed in the effect's transaction it does not."""
    worker = start("control", mode, dsn)
    assert worker.stdout.readline() == "done\n"
    worker.kill()
    worker.wait()
    with pgkv.Store.connect(dsn) as store, pgkv.Idempotency(store).once("k", wait=30) as attempt:
        assert attempt.is_replay == (mode == "together")
        if not attempt.is_replay:
            effects.execute("INSERT INTO effects VALUES ('k')")
    assert count(effects, "SELECT count(*) FROM effects") == effects_done


def test_the_answer_to_a_claim_is_lost(dsn: str, make_server: Callable[..., Server]) -> None:
    """A claim whose answer never came is not sent again: the key is held to the lease's end, and then
    free."""
    server = make_server()
    with Proxy(server.dsn) as proxy, pgkv.Store.connect(proxy.dsn) as store:
        idem = pgkv.Idempotency(store, lease=LEASE)
        idem.create_table()
        with idem.once("warm"):
            pass
        proxy.arm(b"unheard")
        with pytest.raises(pgkv.StoreUnavailableError) as lost, idem.once("unheard"):
            pass
        assert lost.value.outcome_unknown
        with pytest.raises(pgkv.InProgressError), idem.once("unheard"):
            pass
        with idem.once("unheard", wait=30) as attempt:
            assert not attempt.is_replay


def test_a_crash_of_the_server(make_server: Callable[..., Server]) -> None:
    """A claim, and what was completed, are on disk: after a crash the key is held, and the record there."""
    server = make_server(durable=True)
    with pgkv.Store.connect(server.dsn, retry=pgkv.RetryPolicy(attempts=100, deadline=20)) as store:
        idem = pgkv.Idempotency(store, lease=60)
        with idem.once("done") as attempt:
            attempt.result = b"r"
        with idem.once("claimed"):
            server.kill()
            server.start()
            with pytest.raises(pgkv.InProgressError), idem.once("claimed"):
                pass
            found = idem.get("done")
            assert found is not None
            assert found.result == b"r"


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


def test_interrupted(dsn: str) -> None:
    """Ctrl-C in a block releases the key."""
    with pgkv.Store.connect(dsn) as store:
        idem = pgkv.Idempotency(store)
        with pytest.raises(KeyboardInterrupt), idem.once("k"):
            signal.raise_signal(signal.SIGINT)
        with idem.once("k") as attempt:
            assert not attempt.is_replay
