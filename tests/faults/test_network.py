"""Faults between client and server, made by a proxy: what was lost is repeated where that is safe,
and an answer never reaches the wrong question."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkv import (
    OperationTimeoutError,
    PgkvError,
    QueryError,
    RetryPolicy,
    Store,
    StoreUnavailableError,
)
from tests.faults.proxy import Proxy, certificate, error_answer
from tests.faults.support import newest
from tests.servers import LATE, PATIENCE
from tests.variants import hurries, in_a_hurry, inside

MakeStore = Callable[..., Awaitable[Any]]
pytestmark = newest


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with Proxy(dsn) as between:
        yield between


@pytest.fixture
def make_far_store(proxy: Proxy, make_store: MakeStore) -> MakeStore:
    """A store behind the proxy."""

    async def make(**config: Any) -> Any:
        # A machine that stalls for the usual five seconds would have no repeat begin.
        config.setdefault("retry", RetryPolicy(deadline=60))
        # A call that waits for a new connection beyond its own time takes longer than a test allows.
        config.setdefault("connect_timeout", 60)
        return await make_store(dsn=proxy.dsn, **config)

    return make


def heard(store: Any) -> None:
    """Wait until what the proxy has done to the store's idle connection has arrived there: the next call
    may be faster."""
    inner = inside(store)
    arrived = select.poll()
    arrived.register(inner._channel._pool.idle[0].pgconn.socket, select.POLLIN)
    assert arrived.poll(PATIENCE * 1000)


# What is repeated when the answer is lost after the server has committed, with its answer then.
REPEATED: dict[str, tuple[Callable[[Any], Awaitable[Any]], Any]] = {
    "get": (lambda store: store.get("key-1"), b"1"),
    "exists": (lambda store: store.exists("key-1"), True),
    "get_many": (lambda store: store.get_many(["key-1"]), {"key-1": b"1"}),
    "keys": (lambda store: store.keys("key-1"), ["key-1"]),
    "expire": (lambda store: store.expire("key-1", 60), True),
    # The key is gone by the time it is repeated: True would be a second deletion.
    "delete": (lambda store: store.delete("key-1"), False),
    "set_many": (lambda store: store.set_many({"key-1": b"2"}), 1),
}
NOT_REPEATED: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "increment": lambda store: store.increment("key-1"),
    "set_nx": lambda store: store.set_nx("key-1 new", b"x"),
    "set_xx": lambda store: store.set_xx("key-1", b"x"),
    "compare_and_swap": lambda store: store.compare_and_swap("key-1", b"1", b"x"),
    "get_and_set": lambda store: store.get_and_set("key-1", b"x"),
    "get_and_delete": lambda store: store.get_and_delete("key-1"),
    "set if_version": lambda store: store.set("key-1", b"x", if_version=0),
    "delete_prefix": lambda store: store.delete_prefix("key-1"),
    "increment_many": lambda store: store.increment_many({"key-1": 1}),
}
ENDS = ["reset", "eof"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operation", REPEATED)
async def test_repeated_after_a_lost_answer(
    proxy: Proxy, make_far_store: MakeStore, operation: str, end: str
) -> None:
    """The server has committed and its answer is lost on the way: repeated, and answered."""
    call, answer = REPEATED[operation]
    store = await make_far_store()
    await store.set("key-1", b"1")
    lost = proxy.arm(b"key-1", end=end)
    assert await call(store) == answer
    assert lost.met == 1


@pytest.mark.parametrize("operation", NOT_REPEATED)
async def test_not_repeated_after_a_lost_answer(
    proxy: Proxy, make_far_store: MakeStore, operation: str
) -> None:
    """What must not happen twice raises, and says that it may have happened; asked once only."""
    store = await make_far_store()
    await store.set("key-1", b"1")
    lost = proxy.arm(b"key-1", times=2)
    with pytest.raises(StoreUnavailableError, match="may or may not") as caught:
        await NOT_REPEATED[operation](store)
    assert caught.value.outcome_unknown
    assert lost.met == 1
    assert (await store.ping()) < 30


async def test_an_increment_counts_once(proxy: Proxy, make_far_store: MakeStore) -> None:
    """The lost answer was of an increment that took effect: the sum shows it once."""
    store = await make_far_store()
    await store.set("n", b"0")
    for expected in range(1, 4):
        proxy.arm(b"\0\x01n", keep=3)
        with pytest.raises(StoreUnavailableError) as caught:
            await store.increment("n")
        assert caught.value.outcome_unknown
        assert await store.get("n") == b"%d" % expected


@pytest.mark.parametrize("operation", ["set", "delete", "expire", "set_many"])
async def test_without_repeat_writes(
    proxy: Proxy, make_far_store: MakeStore, operation: str
) -> None:
    """RetryPolicy(repeat_writes=False): plain writes are not repeated either; reads are."""
    store = await make_far_store(retry=RetryPolicy(repeat_writes=False, deadline=60))
    await store.set("key-1", b"1")
    calls = {"set": lambda: store.set("key-1", b"2"), "set_many": None}
    call = calls.get(operation) or (lambda: REPEATED[operation][0](store))
    proxy.arm(b"key-1")
    with pytest.raises(StoreUnavailableError) as caught:
        await call()
    assert caught.value.outcome_unknown
    await store.set("key-1", b"3")
    proxy.arm(b"key-1")
    assert await store.get("key-1") == b"3"


async def test_answer_lost_at_every_byte(proxy: Proxy, make_far_store: MakeStore) -> None:
    """The link breaks after each number of bytes of an answer: a repeat gives the whole one."""
    store = await make_far_store(retry=RetryPolicy(attempts=3, wait_initial=0, deadline=60))
    await store.set("key-1", b"0123456789")
    for keep in range(0, 70, 3):
        lost = proxy.arm(b"key-1", keep=keep)
        assert await store.get("key-1") == b"0123456789"
        assert lost.met == 1


async def test_answer_split_at_every_byte(proxy: Proxy, make_far_store: MakeStore) -> None:
    """Answers that come byte by byte are answers."""
    store = await make_far_store()
    proxy.shape(chunk=1)
    for i in range(10):
        await store.set(f"k{i}", b"%d" % i)
        assert await store.get(f"k{i}") == b"%d" % i
    await store.set_many({f"m{i}": b"%d" % i for i in range(20)})
    assert len(await store.scan("m")) == 20
    with pytest.raises(PgkvError, match="not a signed 64-bit integer"):
        await store.set("word", b"x")
        await store.increment("word")


async def test_answer_dripping_beyond_the_deadline(proxy: Proxy, make_far_store: MakeStore) -> None:
    """operation_timeout counts from the beginning of the call, however often a byte arrives."""
    store = await make_far_store()
    await store.set("k", b"x" * 3000)  # at 0.02 s a byte: a minute
    await store.get("k")
    proxy.shape(chunk=1, pause=0.02, delay=0.3)
    started = time.monotonic()
    with in_a_hurry(store, 1.0), pytest.raises(OperationTimeoutError):
        await store.get("k")
    assert time.monotonic() - started < 1.0 + LATE
    proxy.shape()
    assert await store.get("k") == b"x" * 3000


async def test_black_hole(proxy: Proxy, make_far_store: MakeStore) -> None:
    """Nothing passes any more: every call ends at operation_timeout, idle connection or new; then
    everything arrives at once, and no answer is taken for another."""
    store = await make_far_store(pool_max_size=2)
    await store.set_many({f"k{i}": b"%d" % i for i in range(20)})
    proxy.hold()
    try:
        for i in range(3):
            started = time.monotonic()
            with (
                in_a_hurry(store, 0.3),
                pytest.raises((OperationTimeoutError, StoreUnavailableError)),
            ):
                await store.get(f"k{i}")
            assert time.monotonic() - started < 0.3 + LATE
    finally:
        proxy.release()
    for i in range(20):
        assert await store.get(f"k{i}") == b"%d" % i


async def test_silence_after_a_partial_answer(proxy: Proxy, make_far_store: MakeStore) -> None:
    """Half an answer and then silence is no answer; the rest is never read by another call."""
    store = await make_far_store()
    await store.set("key-1", b"1" * 50)
    # Of every question: the first may arrive only after it has been looked for.
    silent = proxy.arm(b"key-1", keep=20, end="silence", times=100)
    for _ in hurries(store):
        with pytest.raises(OperationTimeoutError):
            await store.get("key-1")
        if silent.met:
            break
    silent.times = 0
    assert await store.get("key-1") == b"1" * 50


async def test_broken_before_sending(proxy: Proxy, make_far_store: MakeStore) -> None:
    """Links that broke while idle: whatever comes next is sent over another, an increment too, with
    no repeat allowed."""
    store = await make_far_store(retry=None)
    await store.set("n", b"0")
    breaks: list[Callable[[], int]] = [proxy.reset_all, proxy.half_close] * 5
    for expected, end_all in enumerate(breaks, 1):
        assert end_all() >= 1
        heard(store)
        assert await store.increment("n") == expected


async def test_broken_while_sending(proxy: Proxy, make_far_store: MakeStore) -> None:
    """A link that is reset while a large question is on its way: a set is repeated; of an increment
    nobody knows."""
    store = await make_far_store()
    await store.set("key-1", b"1")
    cut = proxy.arm(b"key-1", before=True)
    value = b"x" * 4_000_000
    assert await store.set("key-1", value)
    assert cut.met == 1
    assert await store.get("key-1") == value


async def test_nobody_listens(proxy: Proxy, make_far_store: MakeStore) -> None:
    """Connection refused is said at once, with its reason, and is no unknown outcome; when it is
    over, the store works."""
    store = await make_far_store()
    await store.set("n", b"0")
    proxy.refuse()
    proxy.reset_all()
    heard(store)
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="refused") as caught:
        await store.increment("n")
    assert time.monotonic() - started < 2 + LATE
    assert not caught.value.outcome_unknown
    proxy.listen()
    assert await store.increment("n") == 1


@pytest.mark.parametrize("sqlstate", ["08006", "08P01", "08000"])
async def test_a_poolers_08_is_no_answer(
    proxy: Proxy, make_far_store: MakeStore, sqlstate: str
) -> None:
    """A pooler says "server connection lost" with an SQLSTATE of class 08: it knows no more than we
    do. A read is repeated, an increment is not."""
    store = await make_far_store()
    await store.set("key-1", b"1")
    answer = error_answer(sqlstate, "server conn crashed?")
    proxy.arm(b"key-1", replace=answer, end="nothing")
    assert await store.get("key-1") == b"1"
    proxy.arm(b"key-1", replace=answer, end="nothing")
    with pytest.raises(StoreUnavailableError, match="may or may not") as caught:
        await store.increment("key-1")
    assert caught.value.outcome_unknown
    assert await store.get("key-1") == b"2"


@pytest.mark.parametrize("sqlstate", ["57P01", "57P02", "57P03"])
async def test_a_fatal_message_is_an_answer(
    proxy: Proxy, make_far_store: MakeStore, sqlstate: str
) -> None:
    """FATAL with an SQLSTATE in place of the answer proves that nothing was committed: even an
    increment is repeated."""
    store = await make_far_store()
    await store.set("key-1", b"1")
    text = "terminating connection due to administrator command"
    answer = error_answer(sqlstate, text, severity="FATAL")[:-6]  # no ReadyForQuery
    # Said in the server's place, before it has the question.
    met = proxy.arm(b"key-1", replace=answer, before=True, end="eof")
    assert await store.increment("key-1") == 2
    assert met.met == 1


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
async def test_conflicts_are_repeated(
    proxy: Proxy, make_far_store: MakeStore, sqlstate: str
) -> None:
    """Serialization failures and deadlocks of single operations are repeated, at most `attempts`
    times."""
    store = await make_far_store(retry=RetryPolicy(attempts=3, wait_initial=0, deadline=60))
    await store.set("key-1", b"1")
    answer = error_answer(sqlstate, "try again")
    proxy.arm(b"key-1", replace=answer, before=True, end="nothing", times=2)
    assert await store.increment("key-1") == 2
    tried = proxy.arm(b"key-1", replace=answer, before=True, end="nothing", times=9)
    with pytest.raises(QueryError) as caught:
        await store.increment("key-1")
    assert caught.value.retryable
    assert tried.met == 3
    tried.times = 0
    assert await store.get("key-1") == b"2"


async def test_lost_commit_of_a_transaction(proxy: Proxy, make_far_store: MakeStore) -> None:
    """The answer to COMMIT is lost: transaction() says that the outcome is unknown, and it did
    commit; run_transaction does not run a second time."""
    store = await make_far_store()
    await store.set("n", b"0")
    runs = 0

    async def add(tx: Any) -> None:
        nonlocal runs
        runs += 1
        await tx.increment("n")

    for expected in (1, 2):
        proxy.arm(b"COMMIT\0")
        with pytest.raises(StoreUnavailableError) as caught:
            if expected == 1:
                async with store.transaction() as tx:
                    await tx.increment("n")
            else:
                await store.run_transaction(add)
        assert caught.value.outcome_unknown
        assert await store.get("n") == b"%d" % expected
    assert runs == 1


async def test_chunked_batch_with_a_lost_commit(proxy: Proxy, make_far_store: MakeStore) -> None:
    """set_many in chunks is repeated as a whole; increment_many is not."""
    store = await make_far_store()
    proxy.arm(b"COMMIT\0")
    assert await store.set_many({f"k{i}": b"1" for i in range(5001)}) == 5001
    proxy.arm(b"COMMIT\0")
    with pytest.raises(StoreUnavailableError) as caught:
        await store.increment_many({f"k{i}": 1 for i in range(5001)})
    assert caught.value.outcome_unknown
    assert await store.get("k0") == b"2"
    assert await store.get("k5000") == b"2"


async def test_many_callers_over_a_bad_network(proxy: Proxy, make_far_store: MakeStore) -> None:
    """Resets at any moment while many callers set and get: no answer is another question's. (A set
    whose link broke may still run on the server after its repeat, and after later ones: which of a
    caller's own values it finds is not certain. See `repeat_writes`.)"""
    store = await make_far_store(
        pool_max_size=4,
        pool_timeout=300,
        retry=RetryPolicy(attempts=100, deadline=300),
        operation_timeout=300,
    )
    running = True

    async def work(number: int) -> int:
        done = 0
        while running:
            value = b"%d:%d" % (number, done)
            await store.set(f"k{number}", value)
            assert (await store.get(f"k{number}") or b"").startswith(b"%d:" % number)
            done += 1
        return done

    async def cut() -> None:
        nonlocal running
        for _ in range(30):
            await asyncio.sleep(0.02)
            await asyncio.to_thread(proxy.reset_all)
        running = False

    cutting = asyncio.ensure_future(cut())
    done = await asyncio.gather(*(work(i) for i in range(12)))
    await cutting
    print(f"{sum(done)} rounds over {proxy.accepted} connections")
    assert min(done) > 0


def test_tls_answers_of_every_size(dsn: str, tmp_path: Path) -> None:
    """A TLS peer that writes 16 kB records: answers from 79,000 to 82,000 bytes all arrive, though
    part of one may lie inside OpenSSL while the socket is silent."""
    with (
        Proxy(dsn, tls=certificate(tmp_path)) as proxy,
        Store.connect(proxy.dsn) as store,
    ):
        for size in range(79_000, 82_000, 3):
            value = b"x" * size
            store.set("k", value)
            assert store.get("k") == value


async def test_tls(dsn: str, make_store: MakeStore, tmp_path: Path) -> None:
    """Over TLS: single operations, a large batch, a deadline, a break."""
    with Proxy(dsn, tls=certificate(tmp_path)) as proxy:
        store = await make_store(dsn=proxy.dsn, connect_timeout=60)
        for size in range(79_000, 82_000, 101):
            await store.set("k", b"x" * size)
            assert len(await store.get("k")) == size
        many = {f"m{i}": b"v" * 1000 for i in range(3000)}
        assert await store.set_many(many) == 3000
        assert await store.get_many(many) == many
        proxy.reset_all()
        heard(store)
        assert await store.increment("n") == 1
        proxy.arm(b"key-1", keep=20)
        assert await store.get("key-1") is None
        proxy.hold()
        started = time.monotonic()
        with pytest.raises((OperationTimeoutError, StoreUnavailableError)):
            await store.ping(timeout=0.2)
        assert time.monotonic() - started < 1.6 + LATE
        proxy.release()
        await store.close()
