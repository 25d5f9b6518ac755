"""Idempotency keys: both modes, each fault and race arranged, for threads and for asyncio."""

# ruff: noqa: PT012  # a transaction or an attempt is open where the error is raised

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from pgkv.patterns._runtime.lease import RENEWED
from pgkv.patterns.idempotency.sql import IdempotencyStatements
from pgkv.testing import ServerClock
from tests.peers import Peer, fetch, gather, until
from tests.variants import Threaded, Variant

Make = Callable[..., Coroutine[Any, Any, Any]]
TABLE = "kv_store_idempotency"


@pytest.fixture
def idem(store: Any, variant: Variant, event_loop_runner: asyncio.Runner, peer: Peer) -> Any:
    """Keys that are remembered for an hour, and a table for effects."""

    async def make() -> Any:
        made = variant.make("Idempotency", store, ttl=3600, lease=300)
        await made.create_table()
        return made

    peer.run("CREATE TABLE effects (key text)")
    return event_loop_runner.run(make())


async def effect(conn: Any, key: str) -> None:
    """Do the work of a key on the caller's connection."""
    await conn.execute("INSERT INTO effects VALUES (%s)", (key,))


def effects(peer: Peer) -> int:
    """How often work was done."""
    count: int = peer.one("SELECT count(*) FROM effects")
    return count


async def pay(idem: Any, conn: Any, key: str = "k", **options: Any) -> tuple[bool, bytes]:
    """One request in a transaction of its own: whether it was a replay, and its result."""
    async with conn.transaction(), idem.using(conn).once(key, **options) as attempt:
        if not attempt.is_replay:
            await effect(conn, key)
            attempt.result = b"paid"
        return attempt.is_replay, attempt.result


async def run(idem: Any, key: str = "k", **options: Any) -> tuple[bool, bytes]:
    """One request by a lease."""
    async with idem.once(key, **options) as attempt:
        if not attempt.is_replay:
            attempt.result = b"done"
        return attempt.is_replay, attempt.result


# -- what they do --------------------------------------------------------------------------


async def test_a_retry_gets_the_first_outcome(idem: Any, connect: Make, peer: Peer) -> None:
    """The work of a key is done once, by a lease and in a transaction; a retry gets its result."""
    conn = await connect(autocommit=True)
    assert await pay(idem, conn) == (False, b"paid")
    assert await pay(idem, conn) == (True, b"paid")
    assert effects(peer) == 1
    assert await run(idem, "other") == (False, b"done")
    assert await run(idem, "other") == (True, b"done")
    # Both modes share the keys.
    assert await run(idem, "k") == (True, b"paid")
    assert await pay(idem, conn, "other") == (True, b"done")


async def test_a_block_without_a_result_stores_an_empty_one(idem: Any) -> None:
    """A block that ends without a result is done, too."""
    async with idem.once("k") as attempt:
        assert not attempt.is_replay
    async with idem.once("k") as attempt:
        assert attempt.is_replay
        assert attempt.result == b""


async def test_a_block_that_raises_lets_the_next_run_at_once(
    idem: Any, connect: Make, peer: Peer
) -> None:
    """An exception takes the claim back, with any payload, and its token still rises."""
    with pytest.raises(ZeroDivisionError):
        async with idem.once("k", fingerprint=b"a") as attempt:
            first = attempt.token
            raise ZeroDivisionError
    async with idem.once("k", fingerprint=b"b") as attempt:
        assert not attempt.is_replay
        assert attempt.token > first
    conn = await connect(autocommit=True)
    with pytest.raises(ZeroDivisionError):
        async with conn.transaction(), idem.using(conn).once("t"):
            await effect(conn, "t")
            raise ZeroDivisionError
    assert effects(peer) == 0
    assert await pay(idem, conn, "t") == (False, b"paid")


async def test_a_swallowed_exception_takes_the_effects_of_the_block_back(
    idem: Any, connect: Make, peer: Peer
) -> None:
    """Block and claim are a savepoint: what the caller did before stays, the effect and its record go."""
    conn = await connect(autocommit=True)
    async with conn.transaction():
        await effect(conn, "before")
        try:
            async with idem.using(conn).once("k"):
                await effect(conn, "k")
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    assert peer.run("SELECT key FROM effects") == [("before",)]
    assert await pay(idem, conn) == (False, b"paid")


async def test_completed_in_the_transaction_of_the_effects(
    idem: Any, connect: Make, peer: Peer
) -> None:
    """complete(result, conn) commits with the caller's transaction, or not at all."""
    conn = await connect(autocommit=True)
    with pytest.raises(ZeroDivisionError):
        async with idem.once("k") as attempt, conn.transaction():
            await effect(conn, "k")
            await attempt.complete(b"lost", conn)
            raise ZeroDivisionError
    assert effects(peer) == 0
    async with idem.once("k") as attempt:
        assert not attempt.is_replay
        async with conn.transaction():
            await effect(conn, "k")
            await attempt.complete(b"paid", conn)
        attempt.check()
    assert await run(idem) == (True, b"paid")
    assert effects(peer) == 1


async def test_an_exception_after_the_commit_does_not_release(idem: Any, connect: Make) -> None:
    """What was completed stays done, whatever the block raises afterwards."""
    conn = await connect(autocommit=True)
    with pytest.raises(ZeroDivisionError):
        async with idem.once("k") as attempt:
            async with conn.transaction():
                await attempt.complete(b"paid", conn)
            raise ZeroDivisionError
    assert await run(idem) == (True, b"paid")


async def test_inside_the_stores_own_transaction(store: Any, idem: Any, variant: Variant) -> None:
    """A store of store.transaction() gives the first mode: the record commits with its writes."""
    with pytest.raises(ZeroDivisionError):
        async with store.transaction() as tx:
            await tx.set("effect", "1")
            async with variant.make("Idempotency", tx).once("k") as attempt:
                attempt.result = b"r"
            raise ZeroDivisionError
    assert await idem.get("k") is None
    async with store.transaction() as tx:
        await tx.set("effect", "1")
        async with variant.make("Idempotency", tx).once("k") as attempt:
            attempt.result = b"r"
    assert await run(idem) == (True, b"r")


async def test_typed_results(idem: Any) -> None:
    """Results of a typed view come back as values of its type."""
    typed = idem.typed(dict[str, int])
    async with typed.once("k") as attempt:
        attempt.result = {"paid": 3}
    async with typed.once("k") as attempt:
        assert attempt.result == {"paid": 3}
    assert (await typed.get("k")).result == {"paid": 3}
    async with typed.once("empty"):
        pass
    async with typed.once("empty") as attempt:
        assert attempt.is_replay
        assert attempt.result is None


async def test_get_and_forget(idem: Any, clock: ServerClock) -> None:
    """get() tells running, done and abandoned; a forgotten key is new, and its attempt cannot end."""
    assert await idem.get("k", scope="u") is None
    async with idem.once("k", scope="u") as attempt:
        found = await idem.get("k", scope="u")
        assert (found.status, found.result, found.token) == ("running", None, attempt.token)
        clock.advance(301)
        assert (await idem.get("k", scope="u")).status == "abandoned"
        attempt.result = b"r"
    found = await idem.get("k", scope="u")
    assert (found.status, found.result) == ("done", b"r")
    assert found.expires_at - found.created_at > dt.timedelta(minutes=59)
    assert await idem.get("k") is None
    assert await idem.forget("k", scope="u") is True
    assert await idem.forget("k", scope="u") is False
    assert await idem.get("k", scope="u") is None
    with pytest.raises(pgkv.LeaseLostError):
        async with idem.once("k", scope="u"):
            assert await idem.forget("k", scope="u") is True


async def test_scopes_are_apart(idem: Any, make_store: Make, variant: Variant) -> None:
    """One key of two users, and of two namespaces, is two keys."""
    assert await run(idem, scope="ann") == (False, b"done")
    assert await run(idem, scope="bob") == (False, b"done")
    assert await run(idem, scope="ann") == (True, b"done")
    other = variant.make("Idempotency", (await make_store()).namespace("app:"))
    assert await run(other, scope="ann") == (False, b"done")


async def test_bad_input_sends_nothing(
    idem: Any, store: Any, variant: Variant, connect: Make, operations: list[Any]
) -> None:
    """What cannot be kept is refused before anything is sent, and names no value."""
    operations.clear()
    for key in ("", "a\0", "a\x1fb", "x" * 513, b"bytes", None):
        with pytest.raises(pgkv.InvalidKeyError):
            async with idem.once(key):
                pass
    for wrong in ({"ttl": 1, "lease": 2}, {"lease": 0.5}, {"ttl": 0}, {"ttl": -1}):
        with pytest.raises(pgkv.InvalidValueError):
            variant.make("Idempotency", store, **wrong)
    with pytest.raises(pgkv.InvalidValueError, match="wait"):
        async with idem.once("k", wait=-1):
            pass
    conn = await connect(autocommit=True)
    with pytest.raises(pgkv.TransactionError, match="autocommit"):
        async with idem.using(conn).once("k"):
            pass
    assert operations == []


async def test_completed_once(idem: Any, make_store: Make, variant: Variant, connect: Make) -> None:
    """A second complete(), one of a replay, and one outside a transaction are refused; so is a
    result that the store cannot hold."""
    conn = await connect(autocommit=True)
    async with idem.once("k") as attempt:
        with pytest.raises(pgkv.TransactionError, match="autocommit"):
            await attempt.complete(b"r", conn)
        await attempt.complete(b"r")
        with pytest.raises(pgkv.TransactionError, match="already"):
            await attempt.complete(b"s")
    async with idem.once("k") as attempt:
        with pytest.raises(pgkv.TransactionError, match="replay"):
            await attempt.complete(b"s")
    small = variant.make("Idempotency", await make_store(max_value_size=10))
    with pytest.raises(pgkv.InvalidValueError, match="max_value_size"):
        async with small.once("large") as attempt:
            attempt.result = b"x" * 11


# -- races, arranged -----------------------------------------------------------------------


async def test_two_at_once_in_transactions(idem: Any, connect: Make, peer: Peer) -> None:
    """The second waits for the first one's end, then replays."""
    one, two = await connect(autocommit=True), await connect(autocommit=True)
    async with one.transaction():
        async with idem.using(one).once("k") as attempt:
            await effect(one, "k")
            attempt.result = b"paid"
        second = asyncio.ensure_future(pay(idem, two, wait=30))
        await peer.until_waiting()
    assert await second == (True, b"paid")
    assert effects(peer) == 1


async def test_the_wait_is_over(idem: Any, connect: Make, peer: Peer) -> None:
    """Busy after `wait`: the transaction stays usable, and its lock_timeout is the caller's."""
    one, two = await connect(autocommit=True), await connect(autocommit=True)
    await two.execute("SET lock_timeout = '12345ms'")
    peer.run(f"INSERT INTO {TABLE} VALUES ('\x1fleft', '', 1, 'epoch', 'epoch', now(), 'old')")
    async with one.transaction(), idem.using(one).once("k"):
        async with two.transaction():
            await effect(two, "before")
            with pytest.raises(pgkv.InProgressError) as busy:
                async with idem.using(two).once("k", wait=0.01):
                    pass
            assert busy.value.retry_after > 0
            assert await fetch(two, "SHOW lock_timeout") == [("12345ms",)]
            for key in ("other", "other", "left", "left"):  # new, known, taken over, known
                async with idem.using(two).once(key):
                    assert await fetch(two, "SHOW lock_timeout") == [("12345ms",)]
        # The other mode is told as well.
        with pytest.raises(pgkv.InProgressError):
            await run(idem)
    assert effects(peer) == 1


async def test_what_waits_for_the_disk(
    make_store: Make, variant: Variant, dsn: str, peer: Peer
) -> None:
    """With synchronous_commit off for the role a claim, and what it left, are on disk all the same."""
    options = conninfo_to_dict(dsn).get("options") or ""
    relaxed = make_conninfo(dsn, options=f"{options} -c synchronous_commit=off")
    idem = variant.make("Idempotency", await make_store(dsn=relaxed))
    await idem.create_table()
    flushed = "SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()"
    claims, outcomes = [], []
    for n in range(10):  # others write at the same time
        async with idem.once(f"k{n}"):
            claims.append(peer.one(flushed))
        outcomes.append(peer.one(flushed))
    assert any(claims)
    assert any(outcomes)


async def test_the_first_outcome_stays(idem: Any, peer: Peer) -> None:
    """A completion that was recorded and whose answer was lost may be repeated, but not with another result."""
    recorded = f"UPDATE {TABLE} SET result = 'first'"
    for key, result in (("same", b"first"), ("other", b"second")):
        try:
            async with idem.once(key) as attempt:
                attempt.result = result
                peer.run(recorded)
        except pgkv.LeaseLostError:
            assert key == "other"
        else:
            assert key == "same"
        assert (await idem.get(key)).result == b"first"


async def test_the_callers_commit_stays_as_it_is(idem: Any, connect: Make) -> None:
    """A claim and a completion in a transaction do not say whether its commit waits for the disk."""
    conn = await connect(autocommit=True)
    for setting in ("off", "on"):
        await conn.execute(f"SET synchronous_commit = {setting}")
        async with conn.transaction():
            for key in ("new", "new"):  # and known
                async with idem.using(conn).once(f"{key}{setting}"):
                    pass
            assert await fetch(conn, "SHOW synchronous_commit") == [(setting,)]


# What another one does to a row, and how a claim ends that it comes between.
MEANWHILE: dict[str, tuple[str, Any]] = {
    "swept": (f"DELETE FROM {TABLE}", (False, b"paid")),
    "done": (
        f"UPDATE {TABLE} SET token = token + 1, result = 'theirs', leased_until = 'epoch', "
        "expires_at = now() + interval '1 hour'",
        (True, b"theirs"),
    ),
    "reused": (
        f"UPDATE {TABLE} SET token = token + 1, result = 'theirs', fingerprint = 'other', "
        "leased_until = 'epoch', expires_at = now() + interval '1 hour'",
        pgkv.KeyReusedError,
    ),
    "left": (
        f"UPDATE {TABLE} SET token = token + 1, result = NULL, fingerprint = 'other', "
        "leased_until = 'epoch', expires_at = now() + interval '1 hour'",
        pgkv.KeyReusedError,
    ),
    "taken": (
        f"UPDATE {TABLE} SET token = token + 1, result = NULL, "
        "leased_until = now() + interval '60 s', expires_at = now() + interval '1 hour'",
        pgkv.InProgressError,
    ),
}
LEFT = [
    "expires_at = 'epoch'",
    "result = NULL, leased_until = 'epoch'",
]  # it expired; its attempt died


def before(monkeypatch: pytest.MonkeyPatch, statement: str, do: Callable[[], object]) -> None:
    """Do something once, before a claim in a transaction sends that statement."""
    make, left = getattr(IdempotencyStatements, statement), [do]

    def made(self: IdempotencyStatements, *args: Any) -> Any:
        while left:
            left.pop()()
        return make(self, *args)

    monkeypatch.setattr(IdempotencyStatements, statement, made)


@pytest.mark.parametrize("event", MEANWHILE)
@pytest.mark.parametrize("statement", ["look", "take_over"])
async def test_between_the_statements_of_a_claim(
    idem: Any,
    connect: Make,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
    event: str,
) -> None:
    """A claim in a transaction looks at a row, and then takes over one that is free again. What becomes of the
    row in between decides: the key is new, done, used with another payload, or another one's."""
    conn = await connect(autocommit=True)
    change, ending = MEANWHILE[event]
    for left in LEFT:
        await run(idem)
        peer.run(f"UPDATE {TABLE} SET {left}")
        peer.run("TRUNCATE effects")
        with monkeypatch.context() as patched:
            before(patched, statement, lambda: peer.run(change))
            if isinstance(ending, tuple):
                assert await pay(idem, conn) == ending
                found = await idem.get("k")
                assert (found.status, found.result) == ("done", ending[1])
            else:
                with pytest.raises(ending):
                    await pay(idem, conn)
        assert effects(peer) == (event == "swept")
        peer.run(f"DELETE FROM {TABLE}")


@pytest.mark.parametrize("commits", [True, False])
async def test_taken_over_by_a_transaction_in_between(
    idem: Any, connect: Make, peer: Peer, monkeypatch: pytest.MonkeyPatch, *, commits: bool
) -> None:
    """Another transaction takes the row after the look: the take-over waits for its end. Its outcome is
    replayed, or there is none, and the key is free."""
    conn, change = await connect(autocommit=True), MEANWHILE["done"][0]
    with psycopg.connect(peer.conn.info.dsn) as other:
        for left in LEFT:
            await run(idem)
            peer.run(f"UPDATE {TABLE} SET {left}")
            peer.run("TRUNCATE effects")
            with monkeypatch.context() as patched:
                before(patched, "take_over", lambda: other.execute(change.encode()))
                paying = asyncio.ensure_future(pay(idem, conn, wait=60))
                await peer.until_waiting()
                if commits:
                    other.commit()
                else:
                    other.rollback()
                assert await paying == ((True, b"theirs") if commits else (False, b"paid"))
            assert effects(peer) == (not commits)
            peer.run(f"DELETE FROM {TABLE}")


async def test_two_at_once_by_leases(idem: Any) -> None:
    """Of many claims at once one gets the key; the others are told that it is busy."""
    entered = asyncio.Event()

    async def claim() -> str:
        try:
            async with idem.once("k"):
                await entered.wait()
                return "mine"
        except pgkv.InProgressError:
            return "busy"

    claims = [asyncio.ensure_future(claim()) for _ in range(12)]
    await until(lambda: sum(each.done() for each in claims) == 11, "eleven are told")
    entered.set()
    assert sorted(await gather(*claims)) == ["busy"] * 11 + ["mine"]


async def test_a_lease_that_is_waited_for(idem: Any, connect: Make) -> None:
    """With `wait` the second polls, in either mode, and replays what the first has left."""
    conn = await connect(autocommit=True)
    async with idem.once("k") as attempt:
        seconds = [asyncio.ensure_future(run(idem, wait=30))]
        seconds.append(asyncio.ensure_future(pay(idem, conn, wait=30)))
        await asyncio.sleep(0.05)
        assert not any(each.done() for each in seconds)
        attempt.result = b"first"
    assert await gather(*seconds) == [(True, b"first")] * 2


@pytest.mark.parametrize("dies", [False, True])
async def test_the_first_rolls_back_or_dies(
    idem: Any, connect: Make, peer: Peer, witness: Peer, dies: bool
) -> None:
    """The second, which waited, runs: of the first one nothing is left."""
    one, two = await connect(), await connect(autocommit=True)
    async with idem.using(one).once("k"):
        await effect(one, "k")
    pid = one.info.backend_pid
    second = asyncio.ensure_future(pay(idem, two, wait=30))
    await peer.until_waiting()
    if dies:
        witness.run("SELECT pg_terminate_backend(%s)", pid)
    else:
        await one.rollback()
    assert await second == (False, b"paid")
    assert effects(peer) == 1


async def test_the_first_dies_with_its_lease(idem: Any, clock: ServerClock, peer: Peer) -> None:
    """After the lease's end the next one runs, with a larger token; what comes late matches nothing."""
    with pytest.raises(pgkv.LeaseLostError) as lost:
        async with idem.once("k") as late:
            late.result = b"late"
            clock.advance(270)
            with pytest.raises(pgkv.InProgressError) as busy:
                await run(idem)
            assert 0 < busy.value.retry_after <= 30.5
            clock.advance(31)
            async with idem.once("k") as attempt:
                assert not attempt.is_replay
                assert attempt.token > late.token
                attempt.result = b"second"
    assert lost.value.reason == "replaced"
    assert await run(idem) == (True, b"second")


@pytest.mark.parametrize("commits", [True, False])
async def test_a_commit_delayed_past_the_lease(
    idem: Any, connect: Make, clock: ServerClock, peer: Peer, commits: bool
) -> None:
    """While the completing transaction is open, the key is busy, without a wait; then it is done, or
    taken over after a rollback."""
    conn = await connect()
    async with idem.once("k") as attempt:
        await effect(conn, "k")
        await attempt.complete(b"paid", conn)
        token = attempt.token
        clock.advance(301)
        with pytest.raises(pgkv.InProgressError):
            await run(idem)
        assert peer.waiting() == 0
        await (conn.commit() if commits else conn.rollback())
    if commits:
        assert await run(idem) == (True, b"paid")
    else:
        async with idem.once("k") as second:
            assert not second.is_replay
            assert second.token > token
    assert effects(peer) == commits


@pytest.mark.parametrize("inside", [False, True])
async def test_another_payload(idem: Any, connect: Make, clock: ServerClock, inside: bool) -> None:
    """Another payload is refused while the first runs, after it is done, and after a crash."""
    conn = await connect(autocommit=True)

    async def other() -> None:
        with pytest.raises(pgkv.KeyReusedError):
            await (pay(idem, conn, fingerprint="b") if inside else run(idem, fingerprint="b"))

    with pytest.raises(pgkv.LeaseLostError):
        async with idem.once("k", fingerprint="a"):
            await other()
            clock.advance(301)  # its process is dead, as far as others can tell
            await other()
            assert await run(idem, fingerprint="a") == (False, b"done")
    await other()
    assert await run(idem, fingerprint="a") == (True, b"done")


async def test_a_stale_snapshot(idem: Any, connect: Make, peer: Peer, clock: ServerClock) -> None:
    """At REPEATABLE READ a claim, and a completion after a mere renewal, meet 40001: repeat it."""
    one = await connect()
    await one.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
    await fetch(one, "SELECT 1")
    assert await run(idem) == (False, b"done")
    with pytest.raises(pgkv.QueryError) as raised:
        async with idem.using(one).once("k"):
            pass
    assert raised.value.sqlstate == "40001"
    assert raised.value.retryable
    await one.rollback()
    async with idem.using(one).once("k") as attempt:
        assert attempt.is_replay
    await one.rollback()
    async with idem.once("r") as attempt:
        await fetch(one, "SELECT 1")
        peer.run(f"UPDATE {TABLE} SET leased_until = leased_until + '1 s' WHERE result IS NULL")
        with pytest.raises(pgkv.QueryError) as raised:
            await attempt.complete(b"x", one)
        assert raised.value.sqlstate == "40001"
        await one.rollback()
        await attempt.complete(b"x", one)
        await one.commit()
    assert await run(idem, "r") == (True, b"x")


async def test_two_keys_crossed(idem: Any, connect: Make, peer: Peer) -> None:
    """Two transactions that take two keys crosswise: one of them is rolled back, and can be repeated."""
    conns = [await connect(autocommit=True), await connect(autocommit=True)]
    holding = asyncio.Barrier(2)

    async def both(conn: Any, *keys: str) -> None:
        async with conn.transaction():
            try:
                async with idem.using(conn).once(keys[0]):
                    pass
            except BaseException:
                await holding.abort()  # or the other one waits without end
                raise
            await holding.wait()
            async with idem.using(conn).once(keys[1], wait=30):
                pass

    outcomes = await gather(both(conns[0], "a", "b"), both(conns[1], "b", "a"))
    failures = [each for each in outcomes if each is not None]
    assert [getattr(each, "sqlstate", repr(each)) for each in failures] == ["40P01"]
    assert failures[0].retryable


async def test_two_keys_crossed_by_leases(idem: Any) -> None:
    """By a lease nothing waits: each is told that the other's key is busy."""
    async with idem.once("a"), idem.once("b"):
        for key in "ba":
            with pytest.raises(pgkv.InProgressError):
                await run(idem, key)


@pytest.mark.parametrize("inside", [False, True])
async def test_the_ttl_is_over(idem: Any, connect: Make, clock: ServerClock, inside: bool) -> None:
    """When its ttl has passed, since its completion, the key is new, with any payload."""
    conn = await connect(autocommit=True)

    async def ask(fingerprint: str) -> tuple[bool, bytes]:
        if inside:
            return await pay(idem, conn, fingerprint=fingerprint)
        return await run(idem, fingerprint=fingerprint)

    async with contextlib.AsyncExitStack() as stack:
        if inside:
            await stack.enter_async_context(conn.transaction())
        here = idem.using(conn) if inside else idem
        attempt = await stack.enter_async_context(here.once("k", fingerprint="a"))
        assert not attempt.is_replay
        clock.advance(200)  # at work, for less than its lease
    clock.advance(3500)
    assert (await ask("a"))[0] is True
    clock.advance(101)
    assert (await ask("b"))[0] is False


async def test_work_longer_than_the_ttl(store: Any, idem: Any, clock: ServerClock) -> None:
    """A renewal moves the end of the key as well: a second attempt does not begin while one runs."""
    async with idem.once("k") as attempt:
        for _ in range(130):  # longer than the ttl of an hour
            clock.advance(28)
            renewed = await store._execute(idem._flows.sql.renew([(b"\x1fk", attempt.token, 30.0)]))
            assert renewed == {b"\x1fk": RENEWED}
        with pytest.raises(pgkv.InProgressError):
            await run(idem)
    assert await run(idem) == (True, b"")


async def test_renewed_while_it_runs(idem: Any, peer: Peer) -> None:
    """An attempt is renewed in the background, at a third of its lease."""
    async with idem.once("k") as attempt:
        held = attempt._lease
        assert held._due - held._began == pytest.approx(100)
        first = peer.one(f"SELECT leased_until FROM {TABLE}")
        held._due = 0.0
        await until(lambda: peer.one(f"SELECT leased_until FROM {TABLE}") > first, "a renewal")
        attempt.check()


async def test_a_lost_lease_is_noticed(idem: Any, peer: Peer) -> None:
    """When another took the key over, the next renewal tells: check() raises."""
    with pytest.raises(pgkv.LeaseLostError):
        async with idem.once("k") as attempt:
            peer.run(f"UPDATE {TABLE} SET token = token + 1")
            attempt._lease._due = 0.0
            await until(lambda: attempt.is_lost, "the loss is noticed")
            attempt.check()


async def test_a_replay_and_a_refusal_take_no_xid(idem: Any, connect: Make, peer: Peer) -> None:
    """Busy, done and mismatch are read-only, by a lease and in a transaction."""
    await run(idem, "done", fingerprint="a")
    conn = await connect()
    assigned = "SELECT pg_current_xact_id_if_assigned()::text"
    async with idem.using(conn).once("done", fingerprint="a") as attempt:
        assert attempt.is_replay
    for fingerprint in ("b", "c"):
        with pytest.raises(pgkv.KeyReusedError):
            async with idem.using(conn).once("done", fingerprint=fingerprint):
                pass
    assert await fetch(conn, assigned) == [(None,)]
    await conn.rollback()
    async with idem.once("busy"):
        before = int(peer.one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
        for _ in range(20):
            assert await run(idem, "done", fingerprint="a") == (True, b"done")
            for key, error in (("busy", pgkv.InProgressError), ("done", pgkv.KeyReusedError)):
                with pytest.raises(error):
                    await run(idem, key)
        after = int(peer.one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
    assert after - before < 20  # 60 calls; autovacuum may take some


async def test_swept_when_their_time_has_passed(
    make_store: Make, variant: Variant, clock: ServerClock, peer: Peer
) -> None:
    """The store's own sweeps collect expired keys, done and abandoned; those under way stay."""
    background = await make_store(ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.BACKGROUND)
    idem = variant.make("Idempotency", background, ttl=60)
    for n in range(50):
        await run(idem, f"k{n}")
    clock.advance(61)
    async with idem.once("running"):
        await until(lambda: peer.keys(TABLE) == {"\x1frunning"}, "the expired are swept")
    await background.close()
    manual = await make_store(ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.MANUAL)
    mine = variant.make("Idempotency", manual)
    clock.advance(100)
    assert await mine.purge() == 1


async def test_a_sweep_and_a_claim_of_an_expired_key(
    idem: Any, peer: Peer, witness: Peer, clock: ServerClock
) -> None:
    """A claim that meets the row in a sweep's open transaction waits for nothing, and then has it."""
    await run(idem)
    clock.advance(3601)
    with peer.conn.transaction():
        peer.run(f"DELETE FROM {TABLE} WHERE expires_at < statement_timestamp()")
        with pytest.raises(pgkv.InProgressError):
            await run(idem)
        assert witness.waiting() == 0
    assert await run(idem) == (False, b"done")


# -- the decorator -------------------------------------------------------------------------


async def test_the_decorator(
    store: Any, idem: Any, variant: Variant, connect: Make, peer: Peer
) -> None:
    """A decorated function runs once for a key: by a lease, and in the caller's transaction."""
    calls: list[int] = []
    given = store._target if isinstance(store, Threaded) else store
    conn = await connect(autocommit=True)
    options: dict[str, Any] = {"store": given, "fingerprint": lambda n, *_: str(n)}

    def work(n: int, key: str, conn: Any = None) -> dict[str, int]:
        calls.append(n)
        return {"paid": n}

    async def async_work(n: int, key: str, conn: Any = None) -> dict[str, int]:
        return work(n, key)

    fn: Any = work if variant.name == "sync" else async_work
    by_lease = pgkv.idempotent(lambda _n, key, conn=None: key, **options)(fn)
    inside = pgkv.idempotent(
        lambda _n, key, conn=None: key, conn=lambda _n, _key, conn: conn, scope="t", **options
    )(fn)

    async def ask(function: Any, *args: Any) -> Any:
        if variant.name == "async":
            return await function(*args)
        return await asyncio.to_thread(function, *args)

    assert await ask(by_lease, 1, "k") == {"paid": 1}
    assert await ask(by_lease, 1, "k") == {"paid": 1}
    with pytest.raises(pgkv.KeyReusedError):
        await ask(by_lease, 2, "k")
    raw = conn._target if isinstance(conn, Threaded) else conn
    async with conn.transaction():
        assert await ask(inside, 1, "k", raw) == {"paid": 1}
    async with conn.transaction():
        assert await ask(inside, 1, "k", raw) == {"paid": 1}
    assert calls == [1, 1]
    keys = {row[0] for row in peer.run(f"SELECT key FROM {TABLE}")}
    assert keys == {f"{fn.__module__}.{fn.__qualname__}\x1fk", "t\x1fk"}
    with pytest.raises(pgkv.ConfigError):
        pgkv.idempotent("k")  # type: ignore[arg-type]  # no function


async def test_cancelled_anywhere(idem: Any, variant: Variant) -> None:
    """A cancellation, whichever step it strikes, leaves the key done or free, never held."""
    if variant.name == "sync":
        pytest.skip("threads are not cancelled")
    done = 0
    for steps in range(40):
        task = asyncio.ensure_future(run(idem, f"k{steps}"))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        async with idem.once(f"k{steps}", wait=20) as attempt:
            done += attempt.is_replay
    assert done < 40


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_no_statement_reads_the_table(store: Any, idem: Any, peer: Peer, mode: str) -> None:
    """In a large table every statement about a key goes by the primary key, however it is planned."""
    peer.run(
        f"INSERT INTO {TABLE} SELECT 'k' || n, '', 1, 'epoch', now() + interval '1 hour', now(), 'r'"
        " FROM generate_series(1, 20000) n"
    )
    peer.run(f"ANALYZE {TABLE}")
    peer.run(f"SET plan_cache_mode = {mode}")
    sql = idem._flows.sql
    ops = {
        sql.claim(b"k1", b"f", 60.0, 1.0, 30.0): "'k1', 'f', 60, '1000', 30",
        sql.insert(b"k1", b"f", 60.0, 1.0): "'k1', 'f', 60, '1000'",
        sql.look(b"k1", b"f"): "'k1', 'f'",
        sql.take_over(b"k1", b"f", 60.0, 1.0): "'k1', 'f', 60, '1000'",
        sql.complete(b"k1", 1, b"r", 60.0, inside=False): "'r', 'k1', 1, 60",
        sql.complete(b"k1", 1, b"r", 60.0, inside=True): "'r', 'k1', 1, 60",
        sql.release(b"k1", 1): "'k1', 1",
        sql.get(b"k1"): "'k1'",
        sql.forget(b"k1"): "'k1'",
    }
    for number, (op, arguments) in enumerate(ops.items()):
        text = op.statement.text(peer.conn.info.server_version).decode()
        peer.run(f"PREPARE p{number} AS {text}".replace("%", "%%"))
        plan = "\n".join(row[0] for row in peer.run(f"EXPLAIN EXECUTE p{number} ({arguments})"))
        assert f"Seq Scan on {TABLE}" not in plan, plan
