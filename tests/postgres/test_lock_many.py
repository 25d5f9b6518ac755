"""Several locks at once: all or none, in one order, in both variants."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import pgkv
from pgkv import ConfigError, InvalidValueError, LeaseLostError, LockTimeoutError
from tests.peers import Peer, until
from tests.variants import Variant

HELD = "SELECT key FROM kv_store_locks WHERE expires_at > clock_timestamp() ORDER BY version"


def locks_of(variant: Variant, store: Any, names: str, **options: Any) -> list[Any]:
    return [variant.make("Lock", store, name, **options) for name in names]


def held(peer: Peer) -> list[str]:
    """The names that are held, in the order of their grants."""
    if peer.one("SELECT to_regclass('kv_store_locks')::text") is None:
        return []
    return [key for (key,) in peer.run(HELD)]


async def test_all_are_granted_in_one_order(store: Any, variant: Variant, peer: Peer) -> None:
    """The leases come in the order of the locks, the grants in that of the names."""
    locks = locks_of(variant, store, "cab")
    async with locks[0].acquire_many(locks, timeout=5) as leases:
        assert [lease.name for lease in leases] == ["c", "a", "b"]
        assert held(peer) == ["a", "b", "c"]
        leases.check()
        for lock, lease in zip(locks, leases, strict=True):
            info = await lock.holder()
            assert info.token == lease.token
    assert held(peer) == []


async def test_release_ends_all_in_reverse_order(store: Any, variant: Variant, peer: Peer) -> None:
    """release() without a block; the second one says that nothing was held."""
    locks = locks_of(variant, store, "ba")
    leases = await locks[0].acquire_many(locks)
    released: list[str] = []
    peer.run(
        "CREATE TABLE freed (n serial, key text);"
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO freed (key) VALUES (NEW.key); RETURN NEW; END $$;"
        "CREATE TRIGGER note AFTER UPDATE ON kv_store_locks FOR EACH ROW EXECUTE FUNCTION note()"
    )
    assert await leases.release() is True
    released = [key for (key,) in peer.run("SELECT key FROM freed ORDER BY n")]
    assert released == ["b", "a"]
    assert await leases.release() is False
    with pytest.raises(LeaseLostError):
        leases.check()


async def test_a_release_that_fails_keeps_no_other(
    store: Any, variant: Variant, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is raised when all the others have been released; a second call ends it too."""
    from pgkv.patterns.lock.sql import LockStatements

    locks = locks_of(variant, store, "abc")
    leases = await locks[0].acquire_many(locks)
    real = LockStatements.release

    def failing(sql: Any, key: bytes, token: int, notify: bool) -> Any:
        if key == b"b":
            raise pgkv.StoreUnavailableError("the network is cut")
        return real(sql, key, token, notify)

    with monkeypatch.context() as broken:
        broken.setattr(LockStatements, "release", failing)
        with pytest.raises(pgkv.StoreUnavailableError, match="cut"):
            await leases.release()
    assert held(peer) == ["b"]
    assert await leases.release() is False, "not each of them was held"
    assert held(peer) == []


async def test_none_is_kept_where_one_is_not_granted(
    store: Any, variant: Variant, peer: Peer
) -> None:
    """The deadline is one for all; what was granted before it is released; the error names the lock
    that was held."""
    locks = locks_of(variant, store, "abc")
    async with locks[1].acquire() as other:
        for timeout in (0, 0.3):
            started = time.monotonic()
            with pytest.raises(LockTimeoutError, match="'b'"):
                await locks[0].acquire_many(locks, timeout=timeout)
            assert time.monotonic() - started < timeout + 20  # without the deadline: for ever
            assert held(peer) == ["b"]
        assert peer.one("SELECT count(*) FROM kv_store_locks") == 2, "no mark of a call taken back"
        other.check()


async def test_calls_do_not_wait_for_each_other_in_a_circle(store: Any, variant: Variant) -> None:
    """Callers that name the same locks in all orders all get them."""
    inside: list[int] = []

    async def caller(n: int) -> None:
        names = ("abc", "cba", "bca", "cab")[n % 4]
        locks = locks_of(variant, store, names)
        async with locks[0].acquire_many(locks, timeout=60):
            inside.append(n)
            assert inside == [n], "two hold the same locks"
            await asyncio.sleep(0.002)
            inside.clear()

    await asyncio.gather(*(caller(n) for n in range(12)))


async def test_the_first_is_renewed_while_the_second_is_waited_for(
    store: Any, variant: Variant, peer: Peer
) -> None:
    """A wait that is longer than the ttl loses nothing."""
    (a,), (b,) = locks_of(variant, store, "a", ttl=12), locks_of(variant, store, "b", ttl=60)
    expires = "SELECT expires_at FROM kv_store_locks WHERE key = 'a'"
    other = await b.acquire()
    waiting = asyncio.ensure_future(_acquired(a, [a, b]))
    await until(lambda: held(peer) == ["b", "a"], "a is held, b waited for")
    first = peer.one(expires)
    await until(lambda: peer.one(expires) > first, "a is renewed")
    await other.release()
    leases = await waiting
    leases.check()
    await leases.release()


async def _acquired(lock: Any, locks: list[Any], **options: Any) -> Any:
    return await lock.acquire_many(locks, **options)


async def test_one_that_is_lost_meanwhile_is_an_error(
    store: Any, variant: Variant, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease that ended while the others were waited for is not handed out, nor are these."""
    (a,), (b,) = locks_of(variant, store, "a", ttl=6), locks_of(variant, store, "b", ttl=60)
    other = await b.acquire()
    waiting = asyncio.ensure_future(_acquired(a, [b, a]))
    await until(lambda: held(peer) == ["b", "a"], "a is held, b waited for")
    peer.run("UPDATE kv_store_locks SET version = version + 1 WHERE key = 'a'")
    await until(lambda: "pgkv.lock.lost lock=a" in caplog.text, "its holder knows")
    await other.release()
    with pytest.raises(LeaseLostError, match="'a'"):
        await waiting
    assert "b" not in held(peer)


async def test_a_loss_in_the_block_is_told_and_the_others_are_released(
    store: Any, variant: Variant, peer: Peer
) -> None:
    """The block raises LeaseLostError at its end, and leaves nothing held."""
    a, b = locks_of(variant, store, "ab")
    with pytest.raises(LeaseLostError, match="'b'"):
        async with a.acquire_many([a, b]) as leases:
            await b.force_release(list(leases)[1].token)
    assert held(peer) == []


@pytest.mark.parametrize("stage", ["waiting", "inside"])
async def test_a_cancelled_call_leaves_nothing(dsn: str, peer: Peer, stage: str) -> None:
    """asyncio: cancelled while it waits for the second, or in the block."""
    async with await pgkv.AsyncStore.connect(dsn) as store:
        a, b = (pgkv.AsyncLock(store, name) for name in "ab")
        other = await b.acquire() if stage == "waiting" else None

        async def call() -> None:
            async with pgkv.AsyncLock.acquire_many([a, b]):
                await asyncio.sleep(60)

        task = asyncio.ensure_future(call())
        both = ["b", "a"] if other else ["a", "b"]
        await until(lambda: held(peer) == both, "the call is there")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held(peer) == (["b"] if other else [])
        if other is not None:
            await other.release()


def test_bad_input_names_the_argument(dsn: str) -> None:
    """Before anything is sent."""
    with pgkv.Store.connect(dsn) as store, pgkv.Store.connect(dsn) as second:
        a = pgkv.Lock(store, "a")
        twin = pgkv.Lock(store, "a", ttl=5)
        wrong: list[tuple[type[Exception], str, Any]] = [
            (InvalidValueError, "locks is empty", []),
            (InvalidValueError, "'a' twice", [a, twin]),
            (ConfigError, "not str", ["a"]),
            (ConfigError, "locks must be an iterable", a),
            (ConfigError, "different stores", [a, pgkv.Lock(second, "b")]),
        ]
        for kind, message, locks in wrong:
            with pytest.raises(kind, match=message):
                pgkv.Lock.acquire_many(locks)
            with pytest.raises((ConfigError, InvalidValueError), match="locks"):
                asyncio.run(pgkv.AsyncLock.acquire_many(locks))
        with pytest.raises(InvalidValueError, match="timeout"):
            pgkv.Lock.acquire_many([a], timeout=-1)
        with pgkv.Lock.acquire_many([a, pgkv.Lock(store.namespace("n:"), "a")]) as leases:
            assert len(leases) == 2
