"""`cached`: what a hit is, what is stored and for how long, single flight, tags, and the variants."""

from __future__ import annotations

import asyncio
import contextvars
import enum
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import pydantic
import pytest

import pgkv
from pgkv._background.renewal import clock as local_clock
from pgkv.patterns.cache.single_flight import Extended
from pgkv.testing import ServerClock
from tests.cached import cached_in, invalidate_tag
from tests.peers import Peer, until
from tests.servers import wait_until
from tests.variants import Variant, in_thread, inside


@dataclass
class User:
    id: int
    name: str | None


async def test_one_entry_for_one_call_however_written(store: Any, variant: Variant) -> None:
    """f(1), f(a=1) and f() with the default 1 run the function once; 1, True, 1.0 and "1" do not
    share."""
    calls: list[Any] = []

    @cached_in(variant, store)
    async def f(a: Any = 1, *, b: int = 2) -> Any:
        calls.append(a)
        return [repr(a), b]

    assert await f(1) == await f(a=1) == await f() == await f(b=2) == ["1", 2]
    assert len(calls) == 1
    assert [await f(v) for v in (True, 1.0, "1")] == [["True", 2], ["1.0", 2], ["'1'", 2]]
    assert len(calls) == 4
    assert f.cache_info() == pgkv.CacheInfo(3, 4, 0, 0, 0, 4, 0)


@pytest.mark.parametrize("value", [None, 0, "", False, []])
async def test_falsy_results_are_cached(store: Any, variant: Variant, value: Any) -> None:
    """None and falsy results are hits like any other."""
    calls: list[int] = []

    @cached_in(variant, store)
    async def f() -> Any:
        calls.append(1)
        return value

    assert [await f(), await f()] == [value, value]
    assert len(calls) == 1


async def test_exceptions_are_not_cached(store: Any, variant: Variant) -> None:
    """A function that raises runs again, its exception unchanged, and leaves no row behind."""
    calls: list[int] = []

    @cached_in(variant, store)
    async def f() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise LookupError("once")
        return 7

    with pytest.raises(LookupError, match="once") as caught:
        await f()
    assert caught.value.__context__ is None
    assert not await store.keys("pgkv:cache:e:")
    assert [await f(), await f()] == [7, 7]
    assert len(calls) == 2


async def test_values_come_back_as_annotated(store: Any, variant: Variant) -> None:
    """A dataclass comes back as that dataclass, on the miss and on the hit. Without an annotation a
    tuple is a tuple for both, those inside it lists, and what JSON would change into another type is
    refused."""

    @cached_in(variant, store)
    async def annotated(n: int) -> User:
        return User(n, None)

    @cached_in(variant, store)
    async def plain(n: int):  # type: ignore[no-untyped-def]  # on purpose
        return "x", (n, 2)

    @cached_in(variant, store, codec="msgpack")
    async def packed(n: int):  # type: ignore[no-untyped-def]  # on purpose
        return "x", n

    @cached_in(variant, store)
    async def unknown(n: int):  # type: ignore[no-untyped-def]  # on purpose
        return User(n, None), n

    for _ in range(2):
        assert await annotated(1) == User(1, None)
        assert await plain(1) == ("x", [1, 2])
        assert await packed(1) == ("x", 1)
        with pytest.raises(pgkv.SerializationError, match=r"User would return as dict.*\$\[0\]"):
            await unknown(1)


async def test_a_result_that_does_not_fit_is_refused_at_once(store: Any, variant: Variant) -> None:
    """A result that contradicts the annotation, or that the codec cannot write, raises on the
    first call: not on some later hit, and not a miss for ever."""

    @cached_in(variant, store)
    async def wrong() -> User:
        return None  # type: ignore[return-value]  # on purpose

    @cached_in(variant, store)
    async def unwritable() -> Any:
        return object()

    for f in (wrong, unwritable):
        with pytest.raises(pgkv.SerializationError, match=f.__name__):
            await f()


@pytest.mark.parametrize("codec", ["json", "msgpack", pgkv.SignedPickle(b"k" * 16)])
async def test_codecs(store: Any, variant: Variant, codec: Any) -> None:
    """JSON, msgpack and signed pickle keep a value; each takes the others' entries for misses."""
    calls: list[int] = []
    for each in (codec, "json"):
        calls.clear()

        @cached_in(variant, store, codec=each)
        async def f(n: int) -> User:
            calls.append(n)
            return User(n, "x")

        assert [await f(1), await f(1)] == [User(1, "x")] * 2
        assert len(calls) == (0 if each == codec == "json" and each is not codec else 1)
        if codec == "json":
            break


async def test_pickle_is_loaded_only_with_its_signature(
    store: Any, variant: Variant, peer: Peer
) -> None:
    """Bytes that somebody else wrote, and a signed entry moved to another key, are misses."""

    @cached_in(variant, store, codec=pgkv.SignedPickle(b"secret" * 4))
    async def f(n: int) -> Any:
        return (n, object)

    await f(1)
    await f(2)
    peer.run(
        "UPDATE kv_store SET value = (SELECT value FROM kv_store WHERE key = %s) WHERE key = %s",
        f.cache_key(1), f.cache_key(2),
    )  # fmt: skip
    assert await f.peek(1) is not None
    assert await f.peek(2) is None
    assert await f(2) == (2, object)


@pytest.mark.parametrize("damage", ["", "'~'", "'\\x01'", "value || 'x'", "'hello'"])
async def test_damaged_entries_are_misses(
    store: Any, variant: Variant, peer: Peer, damage: str
) -> None:
    """Foreign and damaged bytes are computed anew, never an exception."""
    calls: list[int] = []

    @cached_in(variant, store)
    async def f() -> int:
        calls.append(1)
        return 1

    await f()
    new = damage if damage.startswith("value") else f"{damage or chr(39) * 2}::bytea"
    peer.run(f"UPDATE kv_store SET value = {new}")
    assert [await f(), await f()] == [1, 1]
    assert len(calls) == 2


async def test_ttl_is_judged_by_the_server(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """An entry is a hit until its ttl by the server's clock, and a miss after; peek tells its age.
    Without beta no hit refreshes early."""
    calls: list[int] = []

    @cached_in(variant, store, ttl=600, beta=0)
    async def f() -> int:
        calls.append(1)
        return len(calls)

    await f()
    clock.advance(570)
    found = await f.peek()
    assert found is not None
    assert 570 <= found.age < 600
    assert (found.value, found.stale) == (1, False)
    assert await f() == 1
    clock.advance(31)
    assert await f.peek() is None
    assert await f() == 2


async def test_ttl_of_the_result_and_condition(
    store: Any, variant: Variant, clock: ServerClock
) -> None:
    """ttl may be a function of result and arguments, None keeps for ever, 0 stores nothing, and
    neither does a condition that is false."""
    calls: list[int] = []
    seconds = {1: 100, 2: None, 3: 0}

    @cached_in(
        variant,
        store,
        ttl=lambda result, n: seconds.get(n, 50),
        condition=lambda result: result != [4],
        beta=0,
    )
    async def f(n: int) -> list[int]:
        calls.append(n)
        return [n]

    for n in (1, 2, 3, 4):
        assert [await f(n), await f(n)] == [[n], [n]]
    assert calls == [1, 2, 3, 3, 4, 4]
    clock.advance(101)
    await f(1)
    await f(2)
    assert calls == [1, 2, 3, 3, 4, 4, 1]
    clock.advance(10**8)
    await f(2)
    assert len(calls) == 7


async def test_jitter_only_shortens(store: Any, variant: Variant, peer: Peer) -> None:
    """jitter=0.5 spreads the ends of entries over the second half of the ttl."""

    @cached_in(variant, store, ttl=100, jitter=0.5)
    async def f(n: int) -> int:
        return n

    await asyncio.gather(*(f(n) for n in range(30)))
    ends = [
        float(row[0])
        for row in peer.run("SELECT extract(epoch FROM expires_at - updated_at) FROM kv_store")
    ]
    assert 49 < min(ends) < 75 < max(ends) <= 100


async def test_every_call_returns_what_a_hit_would(store: Any, variant: Variant) -> None:
    """Also the call that computes, one whose result is not stored, and one that cannot reach the
    store's row. What the codec cannot write can be no hit: where `condition` refuses it, it is
    returned as it is."""

    def make(condition: Any, result: Any, returns: Any, ttl: Any = 60) -> Any:
        async def f() -> Any:
            return result

        f.__annotations__["return"] = returns
        f.__qualname__ = f"{returns} {condition} {ttl} {result}"
        return cached_in(variant, store, ttl=ttl, condition=condition)(f)

    for ttl in (60, lambda *_: 0):
        for condition in (None, lambda _: True, lambda _: False):
            ratio = make(condition, 1, float, ttl)  # what JSON has is 1, and a hit shows 1.0
            shown = [await ratio(), await ratio(), await ratio.refresh()]
            assert [type(each) for each in shown] == [float] * 3
            users = make(condition, [User(1, "x")], list[User], ttl)
            assert [await users(), await users()] == [[User(1, "x")]] * 2
    other = object()
    refused = make(lambda _: False, other, Any)
    assert [await refused(), await refused()] == [other, other]
    with pytest.raises(pgkv.SerializationError):
        await make(lambda _: True, other, Any)()


class Text(str):
    """As a template engine marks what is safe."""

    __slots__ = ()


class Size(enum.IntEnum):
    BIG = 1


@pytest.mark.parametrize("codec", ["json", "msgpack", pgkv.SignedPickle(b"k" * 16)])
@pytest.mark.parametrize("value", [Text("<b>"), Size.BIG, {"a": [Text("x")]}, date(2020, 1, 1)])
async def test_a_type_that_would_change_is_refused(
    store: Any, variant: Variant, codec: Any, value: Any
) -> None:
    """Without an annotation a subclass would come back as its base: the call is refused at once and
    says what to do. Pickle keeps it, and so does an annotation."""

    @cached_in(variant, store, codec=codec)
    async def f() -> Any:
        return value

    if isinstance(codec, pgkv.SignedPickle):
        for _ in range(2):
            kept = await f()
            assert kept == value
            assert type(kept) is type(value)
    else:
        with pytest.raises(pgkv.SerializationError, match="SignedPickle"):
            await f()

    @cached_in(variant, store)
    async def annotated() -> Size:
        return Size.BIG

    assert [type(await annotated()) for _ in range(2)] == [Size, Size]


class Login(pydantic.BaseModel):
    name: str = pydantic.Field(alias="userName")
    password: pydantic.SecretStr


class Hidden(pydantic.BaseModel):
    name: str
    note: str = pydantic.Field(exclude=True)


class Admin(Hidden):
    level: int


@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (Login(userName="ann", password=pydantic.SecretStr("hush")), Login),
        (Hidden(name="ann", note="x"), Hidden),
        (Admin(name="ann", note="x", level=1), Hidden),
    ],
)
async def test_models_come_back_equal_or_are_refused(
    store: Any, variant: Variant, codec: Any, value: Any, type_: Any
) -> None:
    """Secrets, aliases, excluded fields and the fields of subclasses: no call shows another object."""

    async def f() -> Any:
        return value

    f.__annotations__["return"] = type_
    f.__qualname__ += str(type_)
    cached = cached_in(variant, store, codec=codec)(f)
    try:
        shown = [await cached(), await cached()]
    except pgkv.SerializationError as error:
        refused = str(error)
    else:
        assert shown == [value, value]
        return
    assert "hush" not in refused


async def test_stampede_of_64_callers(store: Any, variant: Variant) -> None:
    """64 threads, or tasks, on one cold key: the function runs once, all get its value."""
    calls: list[int] = []

    @cached_in(variant, store)
    async def f() -> int:
        calls.append(1)
        await asyncio.sleep(0.05)
        return 7

    assert await asyncio.gather(*(f() for _ in range(64))) == [7] * 64
    assert len(calls) == 1
    info = f.cache_info()
    assert (info.hits, info.misses, info.fills, info.errors) == (63, 1, 1, 0)


async def test_a_leader_that_raises(store: Any, variant: Variant) -> None:
    """Each waiter sees its own attempt's outcome: the failures are the failing runs, nobody hangs."""
    calls: list[int] = []

    @cached_in(variant, store)
    async def f() -> int:
        calls.append(1)
        await asyncio.sleep(0.01)
        if len(calls) <= 3:
            raise LookupError(len(calls))
        return 7

    outcomes = await asyncio.gather(*(f() for _ in range(10)), return_exceptions=True)
    errors = [each for each in outcomes if isinstance(each, LookupError)]
    assert sorted(error.args[0] for error in errors) == [1, 2, 3]
    assert [each for each in outcomes if each not in errors] == [7] * 7
    assert len(calls) == 4


async def test_two_stores_compute_once(make_store: Any, variant: Variant) -> None:
    """Callers with different stores, as different processes have, wait for the lease's holder; with
    lock=False each computes, and one stores."""
    calls: list[int] = []
    for lock, expected in [(True, 1), (False, 2)]:
        calls.clear()

        async def f(n: bool) -> int:
            calls.append(1)
            await asyncio.sleep(0.1)
            async with asyncio.timeout(30):
                while len(calls) < 2 - n:  # with a lease one computes, else both
                    await asyncio.sleep(0.005)
            return 7

        first, second = [cached_in(variant, await make_store(), lock=lock)(f) for _ in range(2)]
        assert list(await asyncio.gather(first(lock), second(lock))) == [7, 7]
        assert len(calls) == expected
        fills = first.cache_info().fills + second.cache_info().fills
        assert fills == 1


async def test_max_wait(make_store: Any, variant: Variant) -> None:
    """A waiter waits no longer than max_wait, then computes itself and does not store."""
    gate, end = asyncio.Event(), asyncio.Event()

    async def f() -> int:
        if not gate.is_set():
            gate.set()
            await end.wait()
        return 7

    first, second = [cached_in(variant, await make_store(), max_wait=0.1)(f) for _ in range(2)]
    slow = asyncio.ensure_future(first())
    await gate.wait()
    for other in (first, second):
        assert await asyncio.wait_for(other(), 60) == 7
    assert not slow.done()
    end.set()
    assert await slow == 7
    assert first.cache_info().fills == 1
    assert second.cache_info().fills == 0


async def test_reentrant_calls_do_not_wait_for_themselves(store: Any, variant: Variant) -> None:
    """A function that calls itself for the same key, also by way of another, computes."""
    depth: list[int] = []
    plain = inside(store)
    options: dict[str, Any] = {"store": plain, "store_timeout": 20, "max_wait": 60}
    if variant.name == "async":

        @pgkv.cached(60, name="f", **options)
        async def f() -> int:
            depth.append(1)
            return 1 if len(depth) > 2 else await g()

        @pgkv.cached(60, name="g", **options)
        async def g() -> int:
            return await f()

        answer = await asyncio.wait_for(f(), 50)
    else:

        @pgkv.cached(60, name="h", **options)
        def h() -> int:
            depth.append(1)
            return 1 if len(depth) > 2 else k()

        @pgkv.cached(60, name="k", **options)
        def k() -> int:
            return h()

        answer = await asyncio.wait_for(in_thread(h), 50)
    assert answer == 1


async def test_the_lease_is_renewed_while_the_function_runs(
    make_store: Any,
    variant: Variant,
    clock: ServerClock,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A function that runs longer than its lease is not replaced as long as its process lives."""
    calls: list[int] = []
    pauses: list[float] = []

    # The local clock does not move as the server's does: sooner than asked for.
    soon = property(
        lambda extended: extended._until - 19.9, lambda _, due: pauses.append(due - local_clock())
    )
    monkeypatch.setattr(Extended, "_due", soon, raising=False)

    def end() -> Any:
        return peer.one("SELECT max(expires_at) FROM kv_store")

    async def f() -> int:
        calls.append(1)
        for _ in range(3):
            before = end()
            clock.advance(10)
            await until(lambda: end() >= before + timedelta(seconds=10), "it is renewed")  # noqa: B023
        return 7

    both = [cached_in(variant, await make_store(), compute_timeout=20)(f) for _ in range(2)]
    assert await asyncio.gather(*(each() for each in both)) == [7, 7]
    assert len(calls) == 1
    assert max(pauses) <= 20 / 2, "a lease has time for two tries"


async def test_the_mark_against_recursion_ends_with_the_computation(
    store: Any, variant: Variant
) -> None:
    """A task that a computation starts and leaves behind is a caller like any other afterwards: its
    calls are hits, and of those that miss one computes."""
    calls: list[int] = []
    left: list[asyncio.Future[list[int]]] = []
    ended = asyncio.Event()
    plain = inside(store)
    options: dict[str, Any] = {"store": plain, "store_timeout": 20}

    async def later() -> list[int]:
        await ended.wait()
        if variant.name == "async":
            first = await load()
            await load.invalidate()
            return [first, *await asyncio.gather(*(load() for _ in range(8)))]

        def in_the_thread() -> list[int]:
            first = load()
            load.invalidate()
            return [first, load()]

        return await asyncio.to_thread(in_the_thread)

    def leave_a_task() -> None:
        calls.append(1)
        if len(calls) == 1:
            left.append(asyncio.get_running_loop().create_task(later()))

    load: Any
    if variant.name == "async":

        @pgkv.cached(60, **options, name="left behind, in a task")
        async def load() -> int:
            leave_a_task()
            await asyncio.sleep(0.02)
            return len(calls)

        assert await load() == 1
    else:
        loop = asyncio.get_running_loop()

        @pgkv.cached(60, **options, name="left behind, in a thread")
        def load() -> int:
            context = contextvars.copy_context()  # as run_in_executor() and to_thread() do
            before = len(calls)
            loop.call_soon_threadsafe(leave_a_task, context=context)
            wait_until(lambda: len(calls) > before, "the loop has taken it")
            return len(calls)

        assert await asyncio.to_thread(load) == 1
    ended.set()
    assert set(await left[0]) == {1, 2}
    assert len(calls) == 2


async def test_cancelling_a_leader_frees_the_key(make_store: Any, variant: Variant) -> None:
    """A cancelled leader leaves no placeholder: the next caller computes at once."""
    if variant.name == "sync":
        pytest.skip("threads are not cancelled")
    store = await make_store()
    begun = asyncio.Event()

    @cached_in(variant, store)
    async def f(quick: list[int]) -> int:
        begun.set()
        await asyncio.sleep(0 if quick else 60)
        return 7

    task = asyncio.ensure_future(f([]))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await store.keys("pgkv:cache:e:")


async def test_tags(store: Any, variant: Variant) -> None:
    """invalidate_tag makes misses of all entries with the tag, of every function, and of no other;
    one query, however many there are."""
    calls: list[Any] = []

    @cached_in(variant, store, tags=("user:{user_id}", "all"))
    async def f(user_id: int, n: int = 0) -> int:
        calls.append((user_id, n))
        return n

    @cached_in(variant, store, tags=("user:{u.id}",))
    async def g(u: User) -> int:
        calls.append(u.id)
        return u.id

    async def call_all() -> None:
        for n in range(3):
            await f(1, n)
        await f(2)
        await g(User(1, "x"))

    await call_all()
    assert len(calls) == 5
    await call_all()
    assert len(calls) == 5
    await invalidate_tag(variant, "user:1", store)
    assert await f.peek(1, 0) is None
    assert await f.peek(2) is not None
    await call_all()
    assert len(calls) == 9
    await invalidate_tag(variant, "all", store)
    await call_all()
    assert len(calls) == 13


async def test_many_tags(store: Any, variant: Variant) -> None:
    """More tags than a statement names one by one."""

    @cached_in(variant, store, tags=tuple(f"t{n}" for n in range(20)))
    async def f() -> int:
        return 1

    await f()
    assert await f.peek() is not None
    await invalidate_tag(variant, "t17", store)
    assert await f.peek() is None


async def test_tag_rows_outlive_tagged_entries(
    store: Any, variant: Variant, clock: ServerClock, peer: Peer
) -> None:
    """A tagged entry lives at most 30 days, its tag's row an hour more: no old value returns when
    the tag's row ends."""

    @cached_in(variant, store, ttl=None, tags=("t",))
    async def f() -> int:
        return 1

    await f()
    await invalidate_tag(variant, "t", store)
    assert await f.peek() is None
    clock.advance(30 * 86400 - 5)
    assert await f.peek() is None
    clock.advance(10)
    assert await f.peek() is None
    assert peer.one("SELECT count(*) FROM kv_store WHERE expires_at > statement_timestamp()") == 1
    clock.advance(3600)
    assert await f.peek() is None


async def test_cache_clear(store: Any, variant: Variant) -> None:
    """cache_clear makes all entries of that function misses, in one write, and of no other."""

    async def f(n: int) -> int:
        return n

    one = cached_in(variant, store)(f)
    two = cached_in(variant, store, version=2)(f)
    for n in range(3):
        await one(n)
        await two(n)
    await one.cache_clear()
    assert [await one.peek(n) for n in range(3)] == [None] * 3
    assert None not in [await two.peek(n) for n in range(3)]
    await one(1)
    assert await one.peek(1) is not None


async def test_refresh(store: Any, variant: Variant) -> None:
    """refresh computes and stores, whether or not something was there; ignored parameters are its
    own."""
    values = iter(range(10))

    @cached_in(variant, store, ignore=("db",))
    async def f(n: int, db: object) -> int:
        return next(values)

    assert await f.refresh(1, object()) == 0
    assert await f(1, None) == 0
    assert await f.refresh(1, db=object()) == 1
    assert await f(1, object()) == 1
    assert (await f.peek(1)).value == 1
    await f.invalidate(1)
    assert await f.peek(1, "any db") is None


async def test_the_refresh_that_began_last_wins(store: Any, variant: Variant) -> None:
    """Of two refreshes at once the fill of the earlier one is discarded, whichever ends first."""
    gates = [asyncio.Event(), asyncio.Event()]
    begun: list[int] = []

    @cached_in(variant, store)
    async def f() -> int:
        me = len(begun)
        begun.append(me)
        if me:
            await gates[me - 1].wait()
        return me

    await f()
    earlier = asyncio.ensure_future(f.refresh())
    while len(begun) < 2:
        await asyncio.sleep(0.002)
    later = asyncio.ensure_future(f.refresh())
    while len(begun) < 3:
        await asyncio.sleep(0.002)
    assert await f() == 0  # the old value is served meanwhile
    gates[0].set()
    assert await earlier == 1
    gates[1].set()
    assert await later == 2
    assert await f() == 2
    assert f.cache_info().discarded_fills == 1


async def test_a_namespaced_store_keeps_apart(store: Any, variant: Variant) -> None:
    """Entries, clears and tags of one namespace do not touch another's."""

    async def f() -> int:
        return 1

    one, two = [cached_in(variant, store.namespace(each), tags=("t",))(f) for each in "ab"]
    await one()
    assert await two.peek() is None
    await two()
    await one.cache_clear()
    assert await two.peek() is not None
    await invalidate_tag(variant, "t", store.namespace("a"))
    assert await two.peek() is not None


async def test_methods(store: Any, variant: Variant) -> None:
    """A method counts its object by __cache_key__, a classmethod its class, a staticmethod nothing;
    helpers come bound."""
    plain = inside(store)
    calls: list[Any] = []
    if variant.name == "async":
        pytest.skip("the binding is the same")

    class Repo:
        def __init__(self, tenant: str) -> None:
            self.tenant = tenant

        @pgkv.cached(60, name="Repo.load", store=plain, store_timeout=20)
        def load(self, n: int) -> str:
            calls.append(n)
            return f"{self.tenant}{n}"

        def __cache_key__(self) -> str:
            return self.tenant

        @pgkv.cached(60, store=plain, store_timeout=20)
        @classmethod
        def made(cls, n: int) -> str:
            return f"{cls.__name__}{n}"

        @staticmethod
        @pgkv.cached(60, store=plain, store_timeout=20)
        def alone(n: int) -> int:
            return n

    def work() -> None:
        a, b = Repo("a"), Repo("b")
        assert [a.load(1), b.load(1), a.load(n=1)] == ["a1", "b1", "a1"]
        assert len(calls) == 2
        a.load.invalidate(1)
        assert a.load.peek(1) is None
        assert b.load.peek(1) is not None
        made: Any = Repo.made  # type checkers take a classmethod inside a decorator for a method
        assert made(1) == "Repo1"
        assert made.peek(1) is not None
        assert Repo.alone(3) == 3
        assert Repo("c").alone(3) == 3  # type: ignore[call-arg]  # mypy: as above
        assert Repo.alone.cache_info().hits == 1

    await in_thread(work)


async def test_a_hit_is_one_query_and_writes_nothing(
    store: Any, variant: Variant, operations: list[tuple[str, str, int]]
) -> None:
    """A hit, tags and generations included, is one statement; a miss three."""

    @cached_in(variant, store, tags=("t:{n}",))
    async def f(n: int) -> int:
        return n

    await f(1)
    assert [name for name, _, _ in operations] == ["cache_read", "cache_lease", "cache_fill"]
    operations.clear()
    await f(1)
    assert [name for name, _, _ in operations] == ["cache_read"]


async def test_a_missing_table_is_made(store: Any, variant: Variant) -> None:
    """The first call on a new database makes the table."""

    @cached_in(variant, store.table("brand_new"))
    async def f() -> int:
        return 1

    assert [await f(), await f()] == [1, 1]
    assert f.cache_info().hits == 1
