"""Pipelines: one round trip, in order, each operation with an outcome of its own, or all or
nothing."""
# ruff: noqa: PT012  a pipeline that fails has a body of several statements

from __future__ import annotations

import asyncio
import math
import random
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from pgkv import (
    Handle,
    InvalidValueError,
    NotFoundError,
    OperationTimeoutError,
    QueryError,
    RetryPolicy,
    StoreUnavailableError,
    TableNotFoundError,
    TransactionError,
)
from pgkv._ops.op import Op, Statement
from pgkv.testing import ServerClock
from pgkv.types import CasStatus
from tests import FULL
from tests.faults.proxy import Fault, Proxy
from tests.peers import Peer, until
from tests.servers import LATE
from tests.variants import in_a_hurry

MakeStore = Callable[..., Awaitable[Any]]

LOCK_ROW = "SELECT 1 FROM kv_store WHERE key = 'k' FOR UPDATE"


def outcome(handle: Handle[Any]) -> Any:
    """What the handle returns or raises."""
    try:
        return handle.result()
    except pgkv.PgkvError as error:
        return error


class Tape(Proxy):
    """A proxy that remembers what clients sent."""

    def __init__(self, dsn: str) -> None:
        self._heard = bytearray()
        super().__init__(dsn)

    def _fault_for(self, data: bytes) -> Fault | None:
        self._heard += data
        return super()._fault_for(data)

    def rewind(self) -> None:
        """Forget what was heard."""
        self._heard.clear()

    @property
    def kinds(self) -> str:
        """The letters of the messages since, one after the other: S is a Sync, B a Bind."""
        at, letters = 0, []
        while at < len(self._heard):
            letters.append(chr(self._heard[at]))
            at += 1 + struct.unpack_from("!I", self._heard, at + 1)[0]
        assert at == len(self._heard)
        return "".join(letters)

    @property
    def syncs(self) -> int:
        return self.kinds.count("S")


@pytest.fixture
def tape(dsn: str) -> Iterator[Tape]:
    """Stands between a store and its server: `make_store(dsn=tape.dsn)`."""
    with Tape(dsn) as proxy:
        yield proxy


# -- what it is


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("seed", range(4 if FULL else 2))
async def test_merged_as_one_by_one(
    store: Any, clock: ServerClock, seed: int, *, atomic: bool
) -> None:
    """Operations on few keys, in any order, return in a pipeline, where many are performed as one,
    what they return one by one."""
    calls: list[Callable[[Any, str], Any]] = [
        lambda s, k: s.get(k),
        lambda s, k: s.get(k, b"none"),
        lambda s, k: s.set(k, b"7"),
        lambda s, k: s.set(k, "8", ttl=5000),
        lambda s, k: s.set(k, "9", ttl=60_000),
        lambda s, k: s.increment(k),
        lambda s, k: s.increment(k, -3),
        lambda s, k: s.set_nx(k, b"1"),
        lambda s, k: s.delete(k),
        lambda s, k: s.exists(k),
    ]
    draw = random.Random(seed)
    single, piped = store.namespace("single:"), store.namespace("piped:")
    for _ in range(12):
        chosen = [(draw.choice(calls), draw.choice("abcdefgh")) for _ in range(draw.randrange(30))]
        expected = [await call(single, key) for call, key in chosen]
        async with piped.pipeline(atomic=atomic) as pipe:
            handles = [call(pipe, key) for call, key in chosen]
        for (call, key), handle, wanted in zip(chosen, handles, expected, strict=True):
            if call in calls[2:5]:  # a version: the clock's
                assert handle.result() > 0
            else:
                assert handle.result() == wanted, key
        last = {key: handle for (call, key), handle in zip(chosen, handles, strict=True)
                if call in calls[2:8]}  # fmt: skip
        writes = {key: call for call, key in chosen if call in calls[2:9]}
        for key, call in writes.items():
            if call in calls[2:5]:
                entry = await piped.get_entry(key)
                assert entry.version == last[key].result()
        for key in "abcdefgh":
            assert await piped.get(key) == await single.get(key)
            assert (await piped.ttl(key) == math.inf) == (await single.ttl(key) == math.inf)
        clock.advance(draw.choice([0, 6000]))


async def test_merged_into_few_statements(make_store: MakeStore, tape: Tape) -> None:
    """Gets, sets and increments of different keys are three statements, however many there are."""
    store = await make_store(dsn=tape.dsn)
    for _ in range(2):  # the second time all is prepared
        tape.rewind()
        async with store.pipeline() as pipe:
            for i in range(20):
                pipe.set(f"s{i}", b"v")
                pipe.get(f"g{i}")
                pipe.increment(f"i{i}")
    assert tape.kinds.count("B") == 3
    tape.rewind()
    async with store.pipeline() as pipe:
        handles = [pipe.increment("i0"), pipe.increment("i1"), pipe.get("i0"), pipe.get("i1")]
    assert [handle.result() for handle in handles] == [3, 3, b"3", b"3"]
    assert tape.kinds.count("B") == 2


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_refused_one_of_a_merged_batch(store: Any, *, atomic: bool) -> None:
    """Only the operation that is refused says why; without `atomic` the others are done."""
    await store.set("word", b"word")
    async with store.pipeline(atomic=atomic) as pipe:
        handles = [pipe.increment(key) for key in ("a", "word", "b")]
        read = pipe.get("word")
    done = [outcome(handle) for handle in (*handles, read)]
    assert isinstance(done[1], InvalidValueError)
    if atomic:
        assert [type(done[i]) for i in (0, 2, 3)] == [TransactionError] * 3
        assert await store.get_many(["a", "b"]) == {}
    else:
        assert [done[0], done[2], done[3]] == [1, 1, b"word"]


async def test_in_order(store: Any) -> None:
    """Operations happen in the order in which they were queued, and each handle has its own
    outcome."""
    async with store.pipeline() as p:
        handles = [
            p.get("k"),
            p.set("k", "1"),
            p.increment("k", 4),
            p.get("k"),
            p.get_string("k"),
            p.exists("k"),
            p.compare_and_swap("k", "5", "6"),
            p.compare_and_swap("k", "5", "7"),
            p.get_and_set("k", "8"),
            p.set_nx("k", "9"),
            p.set_xx("k", "10"),
            p.decrement("k", 3),
            p.get_and_delete("k"),
            p.delete("k"),
            p.get("k", b"gone"),
        ]
        assert len(p) == 15
    results = [handle.result() for handle in handles]
    assert results[0] is None
    assert isinstance(results[1], int)
    assert results[2:6] == [5, b"5", "5", True]
    assert (results[6].is_success, results[7].current) == (True, b"6")
    assert results[8:] == [b"6", False, True, 7, b"7", False, b"gone"]


async def test_batches_and_ranges(store: Any) -> None:
    """Operations of many keys are queued as well; those without any key need no server."""
    async with store.pipeline() as p:
        handles = [
            p.set_many({"a": "1", "b": "2", "c": "3"}, ttl=60),
            p.get_many(["a", "c", "none"]),
            p.get_many([]),
            p.exists_many(["b", "none"]),
            p.exists_many([]),
            p.expire_many(["a"], 120),
            p.keys(),
            p.scan("b"),
            p.count(),
            p.delete_many(["a", "none"]),
            p.delete_many([]),
            p.delete_prefix("b"),
            p.persist("c"),
            p.ttl("c"),
            p.get_entry("c"),
            p.set_many({}),
        ]
    results = [handle.result() for handle in handles]
    assert results[:13] == [
        *(3, {"a": b"1", "c": b"3"}, {}, {"b"}, set(), 1),
        *(["a", "b", "c"], [("b", b"2")], 3, 1, 0, 1, True),
    ]
    assert results[13] == float("inf")
    assert results[14].value == b"3"
    assert results[15] == 0


async def test_one_round_trip(make_store: MakeStore, tape: Tape) -> None:
    """A hundred operations go out with a single Sync, also when all or nothing is asked for."""
    store = await make_store(dsn=tape.dsn, pool_max_size=1)

    async def send(*, atomic: bool) -> None:
        async with store.pipeline(atomic=atomic) as p:
            for number in range(50):
                p.set(f"k{number}", b"v")
                p.get(f"k{number}")

    await send(atomic=False)  # everything is prepared
    for atomic in (False, True):
        tape.rewind()
        await send(atomic=atomic)
        kinds = tape.kinds
        assert kinds.count("S") == 1
        assert kinds.count("B") == 100
        assert kinds.endswith("S")
        assert "P" not in kinds


async def test_behind_a_pooler(make_store: MakeStore, tape: Tape) -> None:
    """With pooler=TRANSACTION nothing is prepared, and it still is one round trip."""
    store = await make_store(dsn=tape.dsn, pooler=pgkv.Pooler.TRANSACTION)
    tape.rewind()
    async with store.pipeline() as p:
        handles = [p.increment("n") for _ in range(10)]
    assert [handle.result() for handle in handles] == list(range(1, 11))
    assert tape.kinds == "PBDE" * 10 + "S"


async def test_an_empty_one(make_store: MakeStore, tape: Tape) -> None:
    """A pipeline of nothing sends nothing."""
    store = await make_store(dsn=tape.dsn)
    tape.rewind()
    async with store.pipeline() as p:
        assert len(p) == 0
    async with store.pipeline(atomic=True) as p:
        handle = p.get_many([])
    assert handle.result() == {}
    assert tape.kinds == ""


async def test_a_body_that_raises(make_store: MakeStore, tape: Tape) -> None:
    """When the body raises, nothing is sent, and the handles say so."""
    store = await make_store(dsn=tape.dsn)
    tape.rewind()
    for atomic in (False, True):
        with pytest.raises(LookupError):
            async with store.pipeline(atomic=atomic) as p:
                handle = p.set("k", "v")
                raise LookupError
        with pytest.raises(TransactionError, match="LookupError"):
            handle.result()
    assert tape.kinds == ""
    assert await store.get("k") is None


async def test_bad_input_raises_at_the_call(store: Any) -> None:
    """A key, value or time that no store takes is refused where it is queued; what else was queued
    is sent."""
    async with store.pipeline() as p:
        first = p.set("k", "v")
        with pytest.raises(pgkv.InvalidKeyError):
            p.get("")
        with pytest.raises(InvalidValueError):
            p.set("k", "v", ttl=-1)
        last = p.get("k")
    assert isinstance(first.result(), int)
    assert last.result() == b"v"


async def test_handles_before_and_queueing_after(store: Any) -> None:
    """A handle has no result before the end of the block, and a pipeline takes nothing after it."""
    async with store.pipeline() as p:
        handle = p.get("k")
        with pytest.raises(TransactionError, match="not sent yet"):
            handle.result()
    assert handle.result() is None
    assert handle.result() is None
    with pytest.raises(TransactionError, match="open another"):
        p.get("k")


async def test_namespace(store: Any) -> None:
    """A namespace's pipeline adds its prefix and takes it off again."""
    names = store.namespace("n:")
    async with names.pipeline() as p:
        p.set("a", "1")
        p.set_many({"b": "2"})
        handles = p.keys(), p.scan(), p.get_many(["a", "b"]), p.count()
    assert [handle.result() for handle in handles] == [
        ["a", "b"],
        [("a", b"1"), ("b", b"2")],
        {"a": b"1", "b": b"2"},
        2,
    ]
    assert await store.keys() == ["n:a", "n:b"]


async def test_expired_keys(store: Any, clock: ServerClock, peer: Peer) -> None:
    """A key whose time has passed is none in a pipeline too, and is collected afterwards."""
    await store.set_many({"a": "1", "b": "2"}, ttl=60)
    await store.set("c", "3")
    clock.advance(61)
    async with store.pipeline() as p:
        handles = p.get("a"), p.get_many(["a", "b", "c"]), p.set_nx("d", "4"), p.exists("b")
    assert [handle.result() for handle in handles] == [None, {"c": b"3"}, True, False]
    await until(lambda: peer.keys() == {"c", "d"}, "the expired ones are collected")


# -- refusals


async def test_a_refused_operation(make_store: MakeStore, tape: Tape) -> None:
    """What is refused raises at its own handle; the others have happened, once each."""
    store = await make_store(dsn=tape.dsn)
    await store.set("text", "abc")
    await store.increment("n", 0)
    tape.rewind()
    async with store.pipeline() as p:
        before = p.increment("n", 2)
        bad = p.increment("text")
        after = p.increment("n", 3)
        missing = p.get_or_raise("none")
        p.set("bytes", b"\xff")
        unreadable = p.get_string("bytes")
        worse = p.increment("n", 2**63 - 1)
        end = p.get("n")
    assert (before.result(), after.result(), end.result()) == (2, 5, b"5")
    for handle in (bad, worse):
        for _ in range(2):
            with pytest.raises(InvalidValueError, match="increment"):
                handle.result()
    with pytest.raises(NotFoundError):
        missing.result()
    with pytest.raises(pgkv.PgkvError, match="bytes"):
        unreadable.result()
    assert await store.get("n") == b"5"
    # One Sync for all, then one for each of the nine; each statement was prepared with one, too.
    assert tape.syncs == tape.kinds.count("P") + 1 + 9


async def test_all_or_nothing(store: Any, peer: Peer) -> None:
    """In an atomic pipeline one refusal undoes everything: its handle raises its own error, every
    other one TransactionError."""
    await store.set("text", "abc")
    for many in (3, 1500):  # in one round trip, and in several
        async with store.pipeline(atomic=True) as p:
            before = [p.set(f"k{number}", "v") for number in range(many)]
            bad = p.increment("text")
            after, empty = p.get("text"), p.get_many([])
        with pytest.raises(InvalidValueError, match="not a signed 64-bit integer"):
            bad.result()
        for handle in (before[0], before[-1], after, empty):
            with pytest.raises(TransactionError, match="rolled back"):
                handle.result()
        assert peer.keys() == {"text"}


@pytest.mark.parametrize("many", [100, 2500])
async def test_nobody_sees_half(store: Any, peer: Peer, many: int) -> None:
    """Nobody sees half of an atomic pipeline, however long."""

    async def send() -> list[Any]:
        async with store.pipeline(atomic=True) as p:
            handles = [p.set(f"k{number}", "v") for number in range(many)]
            swap = p.compare_and_swap("k0", "v", "w")
        assert swap.result().is_success
        return [handle.result() for handle in handles]

    sending = asyncio.ensure_future(send())
    seen = set()
    while not sending.done():
        seen.add(peer.one("SELECT count(*) FROM kv_store"))
        await asyncio.sleep(0)
    assert all(isinstance(version, int) for version in await sending)
    assert seen <= {0, many}
    assert await store.get("k0") == b"w"


# -- very many


async def test_thousands_of_ten_kilobytes(make_store: MakeStore, tape: Tape) -> None:
    """Thousands of operations with 10 kB each way end, in bounded batches: neither side waits for the
    other with full buffers."""
    store = await make_store(dsn=tape.dsn, pool_max_size=1, operation_timeout=300)
    value, many = bytes(range(250)) * 40, 10_000 if FULL else 3_000
    async with store.pipeline() as p:
        for number in range(many // 2):
            p.set(f"k{number}", value)
    tape.rewind()
    begun = time.monotonic()
    async with store.pipeline() as p:
        handles = [p.get_and_set(f"k{number % (many // 2)}", value) for number in range(many)]
    print(f"{time.monotonic() - begun:.2f} s")
    assert all(handle.result() == value for handle in handles)
    assert tape.kinds.count("B") >= many
    assert many / 1000 <= tape.syncs <= many / 500  # a thousand at a time
    assert await store.get("k1") == value


# -- inside transactions


async def test_inside_a_transaction(store: Any, peer: Peer) -> None:
    """Inside transaction() a pipeline commits and rolls back with it, and a refusal does not abort
    what was done before."""
    await store.set("text", "abc")
    async with store.transaction() as tx:
        await tx.set("a", "1")
        async with tx.pipeline() as p:
            one, bad, two = p.increment("a"), p.increment("text"), p.increment("a")
        assert (one.result(), two.result()) == (2, 3)
        with pytest.raises(InvalidValueError):
            bad.result()
        async with tx.pipeline(atomic=True) as p:
            undone, bad = p.increment("a"), p.increment("text")
        with pytest.raises(TransactionError):
            undone.result()
        with pytest.raises(InvalidValueError):
            bad.result()
        async with tx.pipeline(atomic=True) as p:
            again = p.increment("a")
        assert again.result() == 4
        assert peer.keys() == {"text"}
        await tx.set("b", "2")
    assert await store.get_many(["a", "b"]) == {"a": b"4", "b": b"2"}
    with pytest.raises(LookupError):
        async with store.transaction() as tx:
            async with tx.pipeline() as p:
                p.set("c", "3")
            raise LookupError
    assert await store.get("c") is None


async def test_a_pipeline_that_outlives_its_transaction(store: Any) -> None:
    """A pipeline entered after its transaction's end is refused, not sent elsewhere."""
    async with store.transaction() as tx:
        p = tx.pipeline()
    failed = None
    try:
        async with p as queue:
            handle = queue.set("k", "v")
        handle.result()
    except TransactionError as error:
        failed = error
    assert "committed" in str(failed)
    assert await store.get("k") is None


@pytest.mark.parametrize("autocommit", [False, True])
async def test_using(store: Any, connect: Any, peer: Peer, *, autocommit: bool) -> None:
    """On the caller's own connection a pipeline is part of the caller's transaction, if there is
    one; a refusal leaves that transaction whole."""
    await store.set("text", "abc")
    conn = await connect(autocommit=autocommit)
    mine = store.using(conn)
    async with mine.pipeline() as p:
        first, bad, second = p.increment("n"), p.increment("text"), p.increment("n")
    assert (first.result(), second.result()) == (1, 2)
    with pytest.raises(InvalidValueError):
        bad.result()
    assert peer.keys() == ({"n", "text"} if autocommit else {"text"})
    async with mine.pipeline(atomic=True) as p:
        undone, bad = p.increment("n"), p.increment("text")
    with pytest.raises(TransactionError):
        undone.result()
    async with mine.pipeline(atomic=True) as p:
        swap, third = p.compare_and_swap("text", "abc", "abcd"), p.increment("n")
    assert swap.result().is_success
    assert third.result() == 3
    if not autocommit:
        assert peer.keys() == {"text"}
        await conn.commit()
    assert await store.get_many(["n", "text"]) == {"n": b"3", "text": b"abcd"}


# -- races


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_race(store: Any, peer: Peer, witness: Peer, *, atomic: bool) -> None:
    """A compare_and_swap(None) that raced with an insert is asked again; the answer is the winner's
    value, and the neighbours' answers are kept."""
    await store.set("a", "1")

    async def send() -> list[Any]:
        async with store.pipeline(atomic=atomic) as p:
            handles = [p.get("a"), p.compare_and_swap("k", None, "mine"), p.set("b", "2")]
        return [handle.result() for handle in handles]

    with peer.conn.transaction():
        peer.run("INSERT INTO kv_store (key, value) VALUES ('k', 'theirs')")
        sending = asyncio.ensure_future(send())
        await witness.until_waiting()
    first, swap, _ = await sending
    assert first == b"1"
    assert (swap.status, swap.current) == (CasStatus.MISMATCH, b"theirs")
    assert await store.get("b") == b"2"


async def test_a_race_inside_a_transaction(store: Any, peer: Peer, witness: Peer) -> None:
    """The same inside transaction(): asked again before the commit."""

    async def send() -> Any:
        async with store.transaction() as tx:
            async with tx.pipeline() as p:
                swap, other = p.compare_and_swap("k", None, "mine"), p.increment("n")
            assert other.result() == 1
            return swap.result()

    with peer.conn.transaction():
        peer.run("INSERT INTO kv_store (key, value) VALUES ('k', 'theirs')")
        sending = asyncio.ensure_future(send())
        await witness.until_waiting()
    swap = await sending
    assert (swap.status, swap.current) == (CasStatus.MISMATCH, b"theirs")
    assert await store.get("n") == b"1"


async def test_pipelines_that_lock_each_other(make_store: MakeStore, dsn: str) -> None:
    """Pipelines that write the same keys in opposite order may deadlock: the victim is repeated, every
    handle has its answer, nothing is counted twice. An atomic one is the caller's to repeat."""
    options = f"{conninfo_to_dict(dsn)['options']} -c deadlock_timeout=20ms"
    store = await make_store(
        dsn=make_conninfo(dsn, options=options), retry=RetryPolicy(attempts=30, deadline=25)
    )
    keys = [f"k{number}" for number in range(200)]
    await store.set_many(dict.fromkeys(keys, "0"))

    async def send(order: list[str], *, atomic: bool = False) -> int:
        done = 0
        for _ in range(10):
            async with store.pipeline(atomic=atomic) as p:
                handles = [p.increment(key) for key in order]
            outcomes = [outcome(handle) for handle in handles]
            if atomic and not isinstance(outcomes[0], int):
                kinds = {type(each) for each in outcomes}
                assert kinds == {TransactionError, QueryError}
                (own,) = (each for each in outcomes if isinstance(each, QueryError))
                assert own.sqlstate == "40P01"
                assert own.retryable
                continue
            assert all(isinstance(each, int) for each in outcomes)
            done += 1
        return done

    done = await asyncio.gather(send(keys), send(keys[::-1]), send(keys[::-1], atomic=True))
    assert list(done[:2]) == [10, 10]
    assert set((await store.get_many(keys)).values()) == {str(sum(done)).encode()}


# -- when things break


async def test_a_missing_table(store: Any, peer: Peer) -> None:
    """A pipeline that finds its table gone makes it again and goes on."""
    for atomic in (False, True):
        peer.run("DROP TABLE kv_store")
        async with store.pipeline(atomic=atomic) as p:
            set_, get = p.set("k", "v"), p.get("k")
        assert isinstance(set_.result(), int)
        assert get.result() == b"v"


async def test_a_missing_table_on_a_fresh_connection(make_store: MakeStore, peer: Peer) -> None:
    """The same when the statement cannot even be prepared; without auto_create_table each handle
    says which table is missing."""
    store = await make_store(pool_max_size=1)
    lazy = await make_store(auto_create_table=False, pool_max_size=1)
    peer.run("DROP TABLE kv_store")
    async with lazy.pipeline() as p:
        handles = p.decrement("n"), p.count()
    for handle in handles:
        with pytest.raises(TableNotFoundError, match="kv_store"):
            handle.result()
    async with store.pipeline() as p:
        first, second = p.decrement("n"), p.count()
    assert (first.result(), second.result()) == (-1, 1)


async def test_statements_that_were_forgotten(store: Any) -> None:
    """Prepared statements that the server has dropped (DISCARD ALL) are prepared again."""
    script: Op[None] = Op(
        Statement("forget", "DEALLOCATE ALL", (), lambda _: None, script=True, writes=False)
    )
    for atomic in (False, True):
        async with store.pipeline(atomic=atomic) as p:
            p.set("k", "v")
            p.get("k")
        await (
            store._execute(script)
            if isinstance(store, pgkv.AsyncStore)
            else asyncio.to_thread(store._target._execute, script)
        )
        async with store.pipeline(atomic=atomic) as p:
            handles = p.set("k", "w"), p.get("k"), p.increment("n")
        assert handles[1].result() == b"w"
        assert isinstance(handles[0].result(), int)
    assert await store.get("n") == b"2"


async def test_a_connection_that_died_before(make_store: MakeStore, peer: Peer, dsn: str) -> None:
    """A pipeline on a store whose connections were ended meanwhile takes a new one, without one
    repeat."""
    named = make_conninfo(dsn, application_name="pipeline-test")
    store = await make_store(dsn=named, retry=None)
    await store.get("k")
    peer.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'pipeline-test'"
    )
    gone = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pipeline-test'"
    await until(lambda: peer.one(gone) == 0, "backends end")
    async with store.pipeline() as p:
        handles = [p.increment("n") for _ in range(3)]
    assert [handle.result() for handle in handles] == [1, 2, 3]


POLICIES = {
    "default": (RetryPolicy(), {"get", "set", "delete"}),
    "reads only": (RetryPolicy(repeat_writes=False), {"get"}),
    "none": (None, set()),
}


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_lost_answer(make_store: MakeStore, tape: Tape, policy: str) -> None:
    """When the answer is lost, what may be repeated is, each operation by itself; an increment is
    not: its handle says that it may have happened, and it has, once. The block says so as well,
    for those who never ask the handles."""
    retry, repeated = POLICIES[policy]
    store = await make_store(dsn=tape.dsn, retry=retry)
    await store.set_many({"old": "1", "n": "0", "doomed": "1"})
    fault = tape.arm(b"marker", keep=0, end="reset")
    with pytest.raises(StoreUnavailableError, match="may or may not"):
        async with store.pipeline() as p:
            handles = {
                "get": p.get("old"),
                "set": p.set("marker", "v"),
                "increment": p.increment("n"),
                "set_nx": p.set_nx("fresh", "v"),
                "delete": p.delete("doomed"),
            }
    assert fault.met == 1
    for name, handle in handles.items():
        if name in repeated:
            handle.result()
            continue
        with pytest.raises(StoreUnavailableError) as caught:
            handle.result()
        assert caught.value.outcome_unknown is True
    # A store that repeats: a pooler may still be busy with the end of the first one's connection.
    again = await make_store(dsn=tape.dsn)
    assert await again.get_many(["n", "fresh", "marker", "doomed"]) == {
        "n": b"1",
        "fresh": b"v",
        "marker": b"v",
    }


async def test_a_lost_answer_of_an_atomic_one(make_store: MakeStore, tape: Tape) -> None:
    """An atomic pipeline whose answer is lost raises where it is sent, unless all of it may be
    repeated; then it is, as a whole."""
    store = await make_store(dsn=tape.dsn)
    tape.arm(b"marker", keep=0, end="reset")
    with pytest.raises(StoreUnavailableError) as caught:
        async with store.pipeline(atomic=True) as p:
            p.set("marker", "v")
            handle = p.delete_prefix("x")
    assert caught.value.outcome_unknown is True
    with pytest.raises(TransactionError, match="sending failed"):
        handle.result()
    assert await store.get("marker") == b"v"
    # With an operation that can race the commit is sent apart: what was lost before it is undone.
    tape.arm(b"third", keep=0, end="reset")
    async with store.pipeline(atomic=True) as p:
        p.set("third", "v")
        handle = p.increment("n")
    assert handle.result() == 1
    tape.arm(b"other", keep=0, end="reset")
    async with store.pipeline(atomic=True) as p:
        p.set("other", "v")
        handle = p.get("other")
    assert handle.result() == b"v"


async def test_a_backend_killed_in_the_middle(
    make_store: MakeStore, peer: Peer, witness: Peer
) -> None:
    """A backend that is ended in the middle of a pipeline hangs nobody: what may be repeated has an
    answer, the rest says what happened."""
    store = await make_store()
    await store.set("k", "v")

    handles: list[Any] = []

    async def send() -> None:
        async with store.pipeline() as p:
            handles.extend([p.increment("n"), p.set("k", "mine"), p.get("k"), p.increment("n")])

    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        sending = asyncio.ensure_future(send())
        await witness.until_waiting()
        witness.run("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
        await witness.until_waiting()  # the set again, by itself
    with pytest.raises(StoreUnavailableError):
        await sending
    first, second, third, fourth = handles
    assert isinstance(second.result(), int)
    assert third.result() == b"mine"
    for handle in (first, fourth):
        found = outcome(handle)
        assert isinstance(found, StoreUnavailableError)
        assert found.outcome_unknown
    assert await store.get("n") is None


async def test_a_late_one(make_store: MakeStore, peer: Peer, witness: Peer) -> None:
    """operation_timeout ends a blocked pipeline, here and on the server, and the store goes on."""
    store = await make_store(retry=None)
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run(LOCK_ROW)
        begun = time.monotonic()
        with in_a_hurry(store, 1.0), pytest.raises(OperationTimeoutError):
            async with store.pipeline() as p:
                handles = p.get("k"), p.set("k", "late"), p.increment("n")
        for handle in handles:
            with pytest.raises(OperationTimeoutError) as caught:
                handle.result()
            assert caught.value.outcome_unknown is True
        with in_a_hurry(store, 1.0), pytest.raises(OperationTimeoutError):
            async with store.pipeline(atomic=True) as p:
                p.set("k", "late")
        assert time.monotonic() - begun < 5 + LATE
        await until(lambda: witness.waiting() == 0, "the statements end on the server")
    assert await store.get("k") == b"v"
    assert await store.get("n") is None


async def test_a_pool_of_the_callers(dsn: str, variant: Any) -> None:
    """Over a caller's pool whose connections are reset with DISCARD ALL, pipelines work all the
    same."""
    if variant.name == "async":
        from psycopg_pool import AsyncConnectionPool

        async def forget(conn: psycopg.AsyncConnection[Any]) -> None:
            await conn.set_autocommit(True)
            await conn.execute("DEALLOCATE ALL")
            await conn.set_autocommit(False)

        async with AsyncConnectionPool(
            dsn, min_size=1, max_size=1, reset=forget, open=False
        ) as pool:
            store = pgkv.AsyncStore.from_pool(pool)
            await store.create_table()
            for expected in range(1, 4):
                async with store.pipeline() as p:
                    handle = p.increment("n")
                assert handle.result() == expected
            await store.close()
        return
    from psycopg_pool import ConnectionPool

    def forget_all(conn: psycopg.Connection[Any]) -> None:
        conn.autocommit = True
        conn.execute("DEALLOCATE ALL")
        conn.autocommit = False

    def blocking() -> None:
        with ConnectionPool(dsn, min_size=1, max_size=1, reset=forget_all, open=False) as pool:
            store = pgkv.Store.from_pool(pool)
            store.create_table()
            for expected in range(1, 4):
                with store.pipeline() as p:
                    handle = p.increment("n")
                assert handle.result() == expected
            store.close()

    await asyncio.to_thread(blocking)
