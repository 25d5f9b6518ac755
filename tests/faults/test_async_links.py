"""AsyncStore's links: an answer that comes in pieces, in bulk, under TLS or not at all never blocks the
loop and never reaches another question."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pgkv import AsyncStore, InvalidValueError, StoreUnavailableError
from tests import FULL
from tests.faults.proxy import Proxy, certificate
from tests.faults.support import Witness, newest, until
from tests.servers import LATE
from tests.variants import Variant

MakeStore = Callable[..., Coroutine[Any, Any, AsyncStore]]
pytestmark = newest

# A loop that waits inside libpq stands still for as long as the proxy pauses, or for ever.
PAUSE = 0.004


@pytest.fixture(params=["async"])
def variant(request: pytest.FixtureRequest) -> Variant:
    """Links of a loop."""
    return Variant(request.param)


class Ticker:
    """Measures the longest time for which the loop did nothing else."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.ticks = 0

    async def run(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.0005)
            now = time.monotonic()
            self.longest = max(self.longest, now - last)
            self.ticks += 1
            last = now


@asynccontextmanager
async def ticking() -> AsyncIterator[Ticker]:
    ticker = Ticker()
    task = asyncio.create_task(ticker.run())
    try:
        yield ticker
    finally:
        task.cancel()
        await asyncio.wait([task])
        print(f"longest gap {ticker.longest * 1000:.1f} ms in {ticker.ticks} ticks")


async def ask_all(store: AsyncStore, number: int) -> None:
    """One question of each kind of answer: a row, many rows, none, a refusal, a script, a pipeline,
    a transaction; each checked."""
    own = f"own:{number}".encode()
    await store.set("own", own)
    assert await store.get("own") == own
    assert await store.get("none") is None
    assert await store.get_many(["a", "b", "own"]) == {"a": b"1", "b": b"2", "own": own}
    with pytest.raises(InvalidValueError):
        await store.increment("own")
    await store.analyze()
    async with store.pipeline() as p:
        first, bad, last = p.get("own"), p.increment("own"), p.get("b")
    assert (first.result(), last.result()) == (own, b"2")
    with pytest.raises(InvalidValueError):
        bad.result()
    async with store.transaction() as tx:
        assert await tx.get("own") == own


async def test_answers_split_at_every_byte(dsn: str, make_store: MakeStore) -> None:
    """Answers that arrive in pieces of any size, down to single bytes, are read whole; the loop goes
    on meanwhile."""
    with Proxy(dsn) as proxy:
        store = await make_store(dsn=proxy.dsn, pool_max_size=1)
        await store.set_many({"a": "1", "b": "2"})
        async with ticking() as ticker:
            for chunk in [*range(1, 60), 61, 67, 71, 79, 83, 89, 97, 101, 128]:
                proxy.shape(chunk=chunk)
                await ask_all(store, chunk)
        assert proxy.accepted == 1  # no link was given up
        assert ticker.ticks > 59


async def test_an_answer_that_pauses_after_every_byte(dsn: str, make_store: MakeStore) -> None:
    """A pause after each byte of an answer is a pause of that answer alone, not of the loop."""
    with Proxy(dsn) as proxy:
        store = await make_store(dsn=proxy.dsn, pool_max_size=1)
        await store.set("k", b"v" * 20)
        with pytest.raises(InvalidValueError):
            await store.increment("k")
        proxy.shape(chunk=1, pause=PAUSE)
        async with ticking() as ticker:
            begun = time.monotonic()
            assert await store.get("k") == b"v" * 20
            with pytest.raises(InvalidValueError):
                await store.increment("k")
            took = time.monotonic() - begun
        assert took > 50 * PAUSE
        # A loop that waited for the rest of an answer would tick a few times between the two.
        assert ticker.ticks > 50


async def test_killed_while_idle_and_busy(
    make_store: MakeStore, witness: Witness, dsn: str
) -> None:
    """A connection killed while idle is replaced before the next question; one killed while busy is
    an error that says so; new connections on old descriptor numbers are heard."""
    store = await make_store(pool_max_size=3, retry=None)
    await store.set("k", "v")
    for _ in range(5):
        await asyncio.gather(*(store.get("k") for _ in range(20)))
        assert await asyncio.to_thread(witness.terminate) >= 1
        assert await asyncio.gather(*(store.get("k") for _ in range(20))) == [b"v"] * 20
    for _ in range(3):
        with witness.lock("k"):
            blocked = asyncio.create_task(store.set("k", "late"))
            await until(lambda: witness.waiting() == 1, "the set waits")
            await asyncio.to_thread(witness.terminate)
            with pytest.raises(StoreUnavailableError):
                await blocked
        assert await asyncio.gather(*(store.get("k") for _ in range(20))) == [b"v"] * 20


async def large_values(store: AsyncStore, size: int) -> None:
    value = bytes(range(256)) * (size // 256)
    async with ticking():
        await store.set("large", value)
        assert await store.get("large") == value
        # Both ways at once, while small questions go on beside.
        swapped, *small = await asyncio.gather(
            store.get_and_set("large", value[::-1]), *(store.get("small") for _ in range(50))
        )
        assert swapped == value
        assert small == [b"1"] * 50
        async with store.pipeline() as p:
            before, _, after = p.get("large"), p.set("large", value), p.get("large")
        assert before.result() == value[::-1]
        assert after.result() == value


@pytest.mark.parametrize("megabytes", [1, 60 if FULL else 20])
async def test_large_values(make_store: MakeStore, megabytes: int) -> None:
    """Values of many megabytes go both ways, by single operations and pipelines, while others work."""
    store = await make_store(pool_max_size=2, pool_timeout=300, operation_timeout=300)
    await store.set("small", "1")
    await large_values(store, megabytes * 1_000_000)


async def test_tls(dsn: str, make_store: MakeStore, tmp_path: Path) -> None:
    """Under TLS no answer is left inside OpenSSL, whatever its size: records of 16 kB end within,
    at and after the buffers of libpq."""
    pytest.importorskip("cryptography")
    with Proxy(dsn, tls=certificate(tmp_path)) as proxy:
        store = await make_store(dsn=proxy.dsn, pool_max_size=1, retry=None)
        await store.set("small", "1")
        async with ticking():
            for size in (*range(79_000, 82_000, 13), 16_384, 16_383, 32_768, 0, 1):
                await store.set("k", b"x" * size)
                assert len(await store.get("k") or b"") == size
        for chunk in (1000, 16_000, 20_000):
            proxy.shape(chunk=chunk)
            await store.set("k", b"x" * 100_000)
            assert len(await store.get("k") or b"") == 100_000
        proxy.shape()
        await large_values(store, 5_000_000)
        assert proxy.accepted == 1


async def test_a_mute_network_and_a_cancelled_task(dsn: str, make_store: MakeStore) -> None:
    """While the network swallows everything, cancelling is immediate and close() bounded: neither
    waits for the server."""
    with Proxy(dsn) as proxy:
        store = await AsyncStore.connect(proxy.dsn, operation_timeout=60, connect_timeout=60)
        await store.set("k", "v")
        proxy.hold()
        tasks = [asyncio.create_task(store.get("k")) for _ in range(3)]
        await asyncio.sleep(0.05)
        begun = time.monotonic()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=60)
        assert all(task.cancelled() for task in tasks)
        assert time.monotonic() - begun < LATE
        await asyncio.wait_for(store.close(), LATE)
        proxy.release()
