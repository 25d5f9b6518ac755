"""coalesce=True: one turn's operations travel together, and nobody can tell but by the clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from pgkv import AsyncStore, InvalidValueError
from pgkv.testing import ServerClock
from tests.faults.support import newest
from tests.peers import Peer, gather, until
from tests.postgres.test_pipeline import Tape
from tests.variants import Variant

MakeStore = Callable[..., Coroutine[Any, Any, AsyncStore]]

WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted"


pytestmark = newest  # what a server has no part in


@pytest.fixture(params=["async"])
def variant(request: pytest.FixtureRequest) -> Variant:
    """Turns are a thing of event loops."""
    return Variant(request.param)


@pytest.fixture
def tape(dsn: str) -> Iterator[Tape]:
    """Stands between a store and its server, and counts."""
    with Tape(dsn) as proxy:
        yield proxy


@pytest.fixture
def coalescing(make_store: MakeStore) -> MakeStore:
    """`await coalescing(...)` connects a store with coalesce=True."""

    async def make(**config: Any) -> AsyncStore:
        return await make_store(coalesce=True, **config)

    return make


async def together(*calls: Any) -> list[Any]:
    """Started in this order, in one turn; the first failure is the test's."""
    return await asyncio.gather(*calls)


# -- what travels together


async def test_gets_of_a_turn(coalescing: MakeStore, tape: Tape) -> None:
    """The gets of one turn are one statement, equal keys included; each caller has its own answer."""
    store = await coalescing(dsn=tape.dsn)
    await store.set_many({f"k{i}": str(i) for i in range(100)})

    async def ask() -> list[Any]:
        keys = [f"k{i}" for i in range(110)] * 2
        return await together(*(store.get(key) for key in keys))

    expected = [*(str(i).encode() for i in range(100)), *([None] * 10)] * 2
    assert await ask() == expected
    tape.rewind()
    assert await ask() == expected
    assert tape.kinds == "BDES"
    assert await store.get("k1", b"default") == b"1"
    assert await store.get("none", b"default") == b"default"


async def test_everything_else_of_a_turn(coalescing: MakeStore, tape: Tape) -> None:
    """A turn's reads are one round trip, and its writes, with the reads that depend on them, another
    at the same time."""
    store = await coalescing(dsn=tape.dsn)

    async def turn() -> list[Any]:
        return await together(
            *(store.get(f"k{i}") for i in range(10)),
            *(store.increment(f"n{i}") for i in range(10)),
            *(store.set(f"k{i}", "v") for i in range(10)),
            *(store.exists(f"k{i}") for i in range(10)),
        )

    await turn()
    tape.rewind()
    answers = await turn()
    assert answers[:20] == [b"v"] * 10 + [2] * 10
    assert answers[30:] == [True] * 10
    # One get for all; the limit for waiting, and what comes after it.
    assert tape.kinds.count("E") == 1 + 31


async def test_writes_of_one_kind(coalescing: MakeStore, tape: Tape) -> None:
    """A turn's sets, or increments, of different keys are one statement; where one is refused the
    others are done, also from another namespace."""
    store = await coalescing(dsn=tape.dsn)
    await store.set("word", "word")
    kinds: tuple[Callable[[int], Any], ...] = (
        lambda i: store.set(f"s{i}", "v"),
        lambda i: store.increment(f"i{i}"),
    )
    for kind in kinds:
        await together(*(kind(i) for i in range(10)))
        tape.rewind()
        await together(*(kind(i) for i in range(10)))
        assert tape.kinds.count("E") == 2  # with the limit for waiting
    part = store.namespace("part:")
    asked = (store.increment("i0"), store.increment("word"), part.increment("i0"))
    sums = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(sums[1], InvalidValueError)
    assert (sums[0], sums[2]) == (3, 1)


async def test_one_alone(coalescing: MakeStore, tape: Tape) -> None:
    """An operation that is alone in its turn goes out as ever."""
    store = await coalescing(dsn=tape.dsn)
    await store.get("k")
    tape.rewind()
    await store.get("k")
    await store.get("k")
    assert tape.kinds == "BDESBDES"


async def test_more_than_a_batch(coalescing: MakeStore) -> None:
    """A turn of thousands is cut into batches that all arrive."""
    store = await coalescing()
    answers = await together(*(store.increment(f"n{i % 7}") for i in range(7000)))
    assert sorted(answers) == sorted(list(range(1, 1001)) * 7)


# -- rows that are locked


async def test_a_blocked_write_delays_only_itself(coalescing: MakeStore, dsn: str) -> None:
    """While a row is locked, everything else of the turn is answered, another write included; the
    write that waits happens when the lock is gone."""
    store = await coalescing()
    await store.set_many({"hot": "0", "cold": "1"})
    with psycopg.connect(dsn) as conn:
        conn.execute("SELECT 1 FROM kv_store WHERE key = 'hot' FOR UPDATE")
        calls = (
            store.set("hot", "1"),
            store.get("cold"),
            store.exists("cold"),
            store.get("hot"),
            store.set("new", "2"),
            store.increment("n"),
            store.set_nx("cold", "3"),
            store.count(),
        )
        blocked, *others = [asyncio.create_task(call) for call in calls]
        answers = await asyncio.wait_for(asyncio.gather(*others), 30)
        assert answers[:3] == [b"1", True, b"0"]
        assert answers[4:6] == [1, False]
        assert not blocked.done()
        conn.rollback()
    await asyncio.wait_for(blocked, 30)
    assert await store.get("hot") == b"1"


async def test_a_task_does_not_wait_for_itself(coalescing: MakeStore, dsn: str) -> None:
    """A task whose transaction holds a row reads and writes others in the turn of a task that
    waits for that row."""
    store = await coalescing()
    await store.set_many({"mine": "0", "other": "1"})
    async with store.transaction() as tx:
        await tx.set("mine", "1")
        calls = (store.set("mine", "2"), store.get("other"), store.set("third", "3"))
        blocked, *others = [asyncio.create_task(call) for call in calls]
        answers = await asyncio.wait_for(asyncio.gather(*others), 30)
        assert answers[0] == b"1"
        assert not blocked.done()
    await asyncio.wait_for(blocked, 30)
    assert await store.get("mine") == b"2"


# -- the order of one key's operations


async def test_order_of_one_key(coalescing: MakeStore) -> None:
    """What one key's operations of a turn return is what they would in that order."""
    store = await coalescing()
    await store.set("k", "0")
    answers = await together(
        store.get("k"),
        store.set("k", "1"),
        store.get("k"),
        store.set("k", "2"),
        store.get("k"),
        store.increment("k"),
        store.get("k"),
        store.get_and_delete("k"),
        store.get("k"),
        store.set_nx("k", "9"),
        store.get_entry("k"),
        store.get("k"),
    )
    assert [answers[i] for i in (0, 2, 4, 5, 6, 7, 8, 9, 11)] == [
        *(b"0", b"1", b"2", 3, b"3", b"3", None, True, b"9")
    ]


async def test_order_around_ranges(coalescing: MakeStore) -> None:
    """Operations of many keys keep their place among those of one. (set_many, delete_many and others
    that may take several statements go by themselves.)"""
    store = await coalescing()
    names = store.namespace("n:")
    await store.set_many({"a": "0", "b": "0", "n:a": "0"})
    steps: list[tuple[Any, Any]] = [
        (store.get("a"), b"0"),
        (store.delete_prefix("a"), 1),
        (store.get("a"), None),
        (store.get("b"), b"0"),
        (store.set("b", "1"), ...),
        (store.get_many(["a", "b"]), {"b": b"1"}),
        (store.set_nx("a", "2"), True),
        (store.get("a"), b"2"),
        (store.exists_many(["a", "b"]), {"a", "b"}),
        (store.delete("a"), True),
        (store.get("a"), None),
        (names.get("a"), b"0"),
        (store.set("n:a", "3"), ...),
        (names.get("a"), b"3"),
        (names.clear(), 1),
        (names.get("a"), None),
        (store.keys(), ["b"]),
        (names.set("b", "4"), ...),
        (store.keys(), ["b", "n:b"]),
        (store.get("n:b"), b"4"),
        (store.count("n"), 1),
    ]
    answers = await together(*(call for call, _ in steps))
    wanted = [answer for _, answer in steps]
    assert [
        answer if want is not ... else ... for answer, want in zip(answers, wanted, strict=True)
    ] == wanted


async def test_tables_of_their_own(coalescing: MakeStore) -> None:
    """Equal keys of two tables are two keys."""
    store = await coalescing()
    other = store.table("other")
    await other.create_table()
    answers = await together(
        store.set("k", "1"), other.set("k", "2"), store.get("k"), other.get("k"), other.clear()
    )
    assert answers[2:] == [b"1", b"2", 1]
    assert await together(store.get("k"), other.get("k")) == [b"1", None]


async def test_expired_keys(coalescing: MakeStore, clock: ServerClock, peer: Peer) -> None:
    """Keys whose time has passed are none, and are collected."""
    store = await coalescing()
    await store.set_many({"a": "1", "b": "2"}, ttl=60)
    await store.set("c", "3")
    clock.advance(61)
    assert await together(*(store.get(key) for key in "abc")) == [None, None, b"3"]
    await until(lambda: peer.keys() == {"c"}, "the expired ones are collected")
    await store.set("a", "4", ttl=60)
    clock.advance(61)
    answers = await together(store.set_nx("a", "5"), store.get("a"), store.exists("b"))
    assert answers == [True, b"5", False]


# -- whose error, whose cancellation


async def test_errors_go_to_their_caller(coalescing: MakeStore) -> None:
    """A refused operation raises at its own caller; the turn's others have their answers, and have
    happened once."""
    store = await coalescing()
    await store.set("text", "abc")
    answers = await gather(
        store.increment("n"),
        store.increment("text"),
        store.get("text"),
        store.increment("n"),
        store.increment("text"),
        store.get_or_raise("none"),
        store.get(""),
    )
    assert answers[::2][:2] == [1, b"abc"]
    assert answers[3] == 2
    refused = answers[1], answers[4]
    assert all(isinstance(each, pgkv.InvalidValueError) for each in refused)
    assert refused[0] is not refused[1]
    assert isinstance(answers[5], pgkv.NotFoundError)
    assert isinstance(answers[6], pgkv.InvalidKeyError)
    assert await store.get("n") == b"2"


async def test_cancelled_before_it_is_sent(coalescing: MakeStore) -> None:
    """A caller cancelled in the turn in which it asked wants nothing: nothing of it is sent."""
    store = await coalescing()
    tasks = [asyncio.create_task(store.increment("n")) for _ in range(10)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await gather(*tasks)
    assert sorted(each for each in answers if isinstance(each, int)) == [1, 2, 3, 4, 5]
    assert await store.get("n") == b"5"


async def test_cancelled_after_it_was_sent(coalescing: MakeStore, peer: Peer) -> None:
    """A caller cancelled later disturbs none of those whose operations travelled with its own; its
    own, if it still waits for a row, does not happen."""
    store = await coalescing()
    await store.set("k", "v")
    with peer.conn.transaction():
        peer.run("SELECT 1 FROM kv_store WHERE key = 'k' FOR UPDATE")
        tasks = [
            asyncio.create_task(call)
            for call in (
                store.get("k"),
                store.get("k"),
                store.set("k", "w"),
                store.increment("n"),
                store.increment("n"),
            )
        ]
        assert await asyncio.gather(*tasks[:2], *tasks[3:]) == [b"v", b"v", 1, 2]
        await until(lambda: peer.one(WAITING) == 1, "the write waits")
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        await until(lambda: peer.one(WAITING) == 0, "the write is cancelled")
    assert await together(store.get("k"), store.get("n")) == [b"v", b"2"]


async def test_storm_with_cancellations(coalescing: MakeStore) -> None:
    """While callers are cancelled at random, every answer that arrives is the right one."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = await coalescing(pool_max_size=3)
    await store.set_many({f"k{i}": str(i) for i in range(50)})
    wrong: list[Any] = []

    async def ask(number: int) -> None:
        for _ in range(20):
            i = rng.randrange(50)
            if await store.get(f"k{i}") != str(i).encode():
                wrong.append(number)
            own = str(rng.random())
            await store.set(f"own{number}", own)
            if await store.get(f"own{number}") != own.encode():
                wrong.append(number)

    tasks = [asyncio.create_task(ask(number)) for number in range(200)]
    for task in rng.sample(tasks, 100):
        await asyncio.sleep(rng.uniform(0, 0.002))
        task.cancel()
    answers = await gather(*tasks)
    assert {type(each) for each in answers} <= {type(None), asyncio.CancelledError}
    assert wrong == []


# -- what does not travel with others


async def test_transactions(coalescing: MakeStore) -> None:
    """A transaction's operations stay in it, whatever the turn holds."""
    store = await coalescing()
    async with store.transaction() as tx:
        answers = await together(
            tx.set("k", "mine"), store.get("k"), tx.get("k"), store.set("other", "v"), tx.get("o")
        )
        assert answers[1:3] == [None, b"mine"]
        assert answers[4] is None
        assert await together(store.get("k"), store.get("other")) == [None, b"v"]
    assert await store.get("k") == b"mine"


async def test_scripts_and_long_ways(coalescing: MakeStore, dsn: str) -> None:
    """truncate, vacuum, ping, updates, iterations, pipelines and using() work in any turn."""
    store = await coalescing()
    await store.set_many({f"k{i}": "1" for i in range(10)})

    async def iterate() -> list[str]:
        return [key async for key in store.iter_keys(page_size=3)]

    async def pipeline() -> Any:
        async with store.pipeline() as p:
            handle = p.get("k2")
        return handle.result()

    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        answers = await together(
            iterate(),
            store.update("k1", lambda value: (value or b"") + b"!"),
            pipeline(),
            store.using(conn).get("k3"),
            store.ping(30),
            store.ping(),
            store.vacuum(),
            store.stats(),
        )
    assert answers[:4] == [[f"k{i}" for i in range(10)], b"1!", b"1", b"1"]
    await together(store.truncate(), store.get("other"), store.get("other"))
    assert await store.count() == 0


# -- when things break


async def test_a_missing_table(coalescing: MakeStore, peer: Peer) -> None:
    """A turn that meets a missing table makes it and goes on; other tables' operations do not
    notice."""
    store = await coalescing()
    other = store.table("other", auto_create_table=False)
    for _ in range(2):
        peer.run("DROP TABLE kv_store")
        answers = await together(store.increment("n"), store.get("k"), store.increment("n"))
        assert answers == [1, None, 2]
    answers = await gather(
        store.increment("n"), other.get("a"), other.get("b"), other.set("a", "1"), store.get("k")
    )
    assert (answers[0], answers[4]) == (3, None)
    for each in answers[1:4]:
        assert isinstance(each, pgkv.TableNotFoundError)
        assert "other" in str(each)


async def test_a_lost_answer(coalescing: MakeStore, tape: Tape) -> None:
    """When a turn's answer is lost, reads are repeated; increments raise, each its own exception,
    and have happened once."""
    store = await coalescing(dsn=tape.dsn)
    await store.set("k", "v")
    tape.arm(b"marker", keep=0, end="reset")
    answers = await gather(
        store.get("k"), store.increment("marker"), store.exists("marker"), store.increment("marker")
    )
    assert answers[::2] == [b"v", True]
    lost = answers[1], answers[3]
    assert all(isinstance(each, pgkv.StoreUnavailableError) for each in lost)
    assert all(each.outcome_unknown for each in lost)
    assert lost[0] is not lost[1]
    assert await store.get("marker") == b"2"


async def test_a_full_pool(coalescing: MakeStore) -> None:
    """A turn that finds no connection within pool_timeout says so to every caller."""
    store = await coalescing(pool_max_size=1, pool_timeout=0.1)
    async with store.transaction():
        answers = await gather(store.get("k"), store.set("k", "v"), store.get("k"))
    assert {type(each) for each in answers} == {pgkv.PoolTimeoutError}
    assert len({id(each) for each in answers}) == 3
    assert await together(store.get("k"), store.get("k")) == [None, None]


async def test_close(coalescing: MakeStore) -> None:
    """close() lets what was asked for before it end, in the same turn too; what comes after is
    refused."""
    for count in (1, 2, 50):
        store = await coalescing()
        *answers, _ = await gather(*(store.increment("n") for _ in range(count)), store.close())
        assert len(answers) == count
        assert all(isinstance(each, int) for each in answers), answers
        late = await gather(store.get("n"), store.get("n"))
        assert {type(each) for each in late} == {pgkv.StoreUnavailableError}
        assert "closed" in str(late[0])


def test_another_loop(dsn: str) -> None:
    """Turns belong to a loop as the store does."""
    with asyncio.Runner() as first, asyncio.Runner() as second:

        async def connect() -> AsyncStore:
            return await AsyncStore.connect(dsn, coalesce=True)

        async def turn() -> list[Any]:
            return await gather(store.get("k"), store.get("k"), store.increment("n"))

        store = first.run(connect())
        for each in second.run(turn()):
            assert isinstance(each, pgkv.ConfigError)
            assert "another event loop" in str(each)
        assert first.run(turn()) == [None, None, 1]
        first.run(store.close())


async def test_two_processes_do_not_deadlock(dsn: str) -> None:
    """Clients whose tasks write the same keys in opposite order never wait for each other, as their
    single operations would not."""
    # A deadlock would last until the test's end.
    options = f"{conninfo_to_dict(dsn)['options']} -c deadlock_timeout=10min"
    patient = make_conninfo(dsn, options=options)
    keys = [f"k{i}" for i in range(300)]

    async def work(order: list[str], seed: int) -> None:
        rng = random.Random(seed)
        async with AsyncStore.connect(
            patient, coalesce=True, pool_timeout=60, operation_timeout=60
        ) as store:
            for _ in range(25):
                calls: list[Any] = [store.increment(key) for key in order]
                calls.insert(rng.randrange(300), store.set_many({"k7": "0", "k150": "0"}))
                calls.insert(rng.randrange(300), store.get_many(["k7"]))
                calls.insert(rng.randrange(300), store.count())
                for answer in await gather(*calls):
                    assert not isinstance(answer, BaseException), answer

    await together(
        asyncio.to_thread(asyncio.run, work(keys, 1)),
        asyncio.to_thread(asyncio.run, work(keys[::-1], 2)),
    )
    async with AsyncStore.connect(dsn) as store:
        values = await store.get_many(key for key in keys if key not in {"k7", "k150"})
        assert set(values.values()) == {b"50"}


# -- against a model

OPERATIONS = ("get", "set", "increment", "delete", "set_nx", "get_and_set", "exists", "many")


def expected(model: dict[str, bytes], name: str, key: str, value: str) -> Any:
    """What a dict would answer."""
    old = model.get(key)
    if name == "set":
        model[key] = value.encode()
        return ...
    if name == "increment":
        model[key] = str(int(old or 0) + 1).encode()
        return int(model[key])
    if name == "delete":
        return model.pop(key, None) is not None
    if name == "set_nx":
        model.setdefault(key, value.encode())
        return old is None
    if name == "get_and_set":
        model[key] = value.encode()
        return old
    if name == "exists":
        return old is not None
    if name == "many":
        return {} if old is None else {key: old}
    return old


async def perform(store: AsyncStore, name: str, key: str, value: str) -> Any:
    if name in {"set", "set_nx", "get_and_set"}:
        answer = await getattr(store, name)(key, value)
        return ... if name == "set" else answer
    if name == "many":
        return await store.get_many([key])
    return await getattr(store, name)(key)


async def test_random_turns(coalescing: MakeStore) -> None:
    """Hundreds of random turns of up to forty operations answer as a dict does."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = await coalescing(pool_max_size=2)
    model: dict[str, bytes] = {}
    for _ in range(300):
        turn = [
            (rng.choice(OPERATIONS), f"k{rng.randrange(6)}", str(rng.randrange(100)))
            for _ in range(rng.randrange(1, 40))
        ]
        wanted = [expected(model, *each) for each in turn]
        assert await together(*(perform(store, *each) for each in turn)) == wanted, turn
    assert await store.get_many([f"k{i}" for i in range(6)]) == model


async def test_random_tasks(coalescing: MakeStore) -> None:
    """Tasks that each keep to keys of their own see what they wrote, in their order, while all their
    turns mix."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    store = await coalescing(pool_max_size=4)

    async def work(number: int) -> None:
        rng = random.Random(seed + number)
        model: dict[str, bytes] = {}
        for _ in range(60):
            step = (
                rng.choice(OPERATIONS),
                f"t{number}:{rng.randrange(3)}",
                str(rng.randrange(100)),
            )
            wanted = expected(model, *step)
            assert await perform(store, *step) == wanted, step
            if rng.random() < 0.1:
                await asyncio.sleep(rng.uniform(0, 0.002))

    await together(*(work(number) for number in range(100)))
