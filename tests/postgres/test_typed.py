"""Typed stores: values of one type in, values of that type out, whatever is in the table."""

# ruff: noqa: PT012  a transaction that fails has a body of several statements

from __future__ import annotations

import asyncio
import dataclasses
import json
import traceback
from collections.abc import Callable
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest

import pgkv
from pgkv import CasStatus, SerializationError
from pgkv.testing import ServerClock
from tests.peers import gather

SECRET = "s3cr3t-marker"


@dataclasses.dataclass
class User:
    id: int
    name: str
    tags: list[str] = dataclasses.field(default_factory=list)


class Movie(TypedDict):
    title: str
    year: int


class Point(msgspec.Struct):
    x: int
    y: int = 0


class Account(pydantic.BaseModel):
    id: int
    settings: dict[str, int] = {}


KINDS: list[tuple[Any, Callable[[int], Any]]] = [
    (User, lambda n: User(n, f"n{n}", ["a"] * n)),
    (Movie, lambda n: Movie(title="M", year=n)),
    (Point, Point),
    (Account, lambda n: Account(id=n, settings={"a": n})),
    (list[User], lambda n: [User(i, "x") for i in range(n)]),
    (User | None, lambda n: User(n, "x") if n else None),
    (dict[str, Any], lambda n: {"n": n, "list": [1, None, 2.5]}),
    (int, lambda n: n),
]


@pytest.fixture(params=["json", "msgpack"])
def codec(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize(("type_", "make"), KINDS)
async def test_every_method(store: Any, type_: Any, make: Callable[[int], Any], codec: str) -> None:
    """All methods take and give values of the type."""
    typed = store.typed(type_, codec)
    one, two, three = make(1), make(2), make(3)
    assert await typed.get("k") is None
    with pytest.raises(pgkv.NotFoundError):
        await typed.get_or_raise("k")
    version = await typed.set("k", one)
    assert isinstance(version, int)
    assert await typed.get("k") == one
    assert type(await typed.get("k")) is type(one)
    assert await typed.get_or_raise("k") == one
    assert await typed.set("k", two, if_version=version + 1) is None
    assert await typed.set_nx("k", two) is False
    assert await typed.set_nx("new", two, ttl=60) is True
    assert 0 < await store.ttl("new") <= 60
    assert await typed.set_many({"a": one, "b": two}) == 2
    assert await typed.set_many([("b", three)], ttl=60) == 1
    assert await typed.get_many(["a", "b", "none"]) == {"a": one, "b": three}
    assert [item async for item in typed.iter_items("", page_size=2)] == [
        ("a", one),
        ("b", three),
        ("k", one),
        ("new", two),
    ]
    swap = await typed.compare_and_swap("k", two, three)
    assert (swap.status, swap.current, bool(swap)) == (CasStatus.MISMATCH, one, False)
    assert await typed.compare_and_swap("k", one, two)
    assert (await typed.compare_and_swap("none", one, two)).status is CasStatus.NOT_FOUND
    assert await typed.compare_and_swap("fresh", None, one)
    assert await typed.update("k", lambda _: three) == three
    assert await typed.delete("k") is True
    assert await typed.get("k") is None


async def test_what_is_in_the_table(store: Any) -> None:
    """A json store writes JSON that others can read, and reads what others wrote."""
    users = store.typed(User)
    await users.set("u", User(1, "é"))
    assert json.loads(await store.get("u")) == {"id": 1, "name": "é", "tags": []}
    await store.set("v", '{"name": "x", "id": 2, "more": true}')
    assert await users.get("v") == User(2, "x")
    points = store.typed(Point, "msgpack")
    await points.set("p", Point(1))
    assert msgspec.msgpack.decode(await store.get("p")) == {"x": 1, "y": 0}


async def test_equal_values_swap(store: Any, codec: str) -> None:
    """compare_and_swap compares values, not how their dicts were filled."""
    dicts = store.typed(dict[str, int], codec)
    await dicts.set("d", {"a": 1, "b": 2})
    assert await dicts.compare_and_swap("d", {"b": 2, "a": 1}, {"c": 3})
    accounts = store.typed(Account, codec)
    await accounts.set("x", Account(id=1, settings={"a": 1, "b": 2}))
    assert await accounts.compare_and_swap(
        "x", Account(id=1, settings={"b": 2, "a": 1}), Account(id=2)
    )
    movies = store.typed(Movie, codec)
    await movies.set("m", {"title": "M", "year": 1931})
    assert await movies.compare_and_swap(
        "m", {"year": 1931, "title": "M"}, {"year": 1932, "title": "M"}
    )


@pytest.mark.parametrize("type_", [User, Movie, Point, Account, list[User]])
async def test_wrong_data(store: Any, type_: Any, codec: str) -> None:
    """Data of another type raises SerializationError from every method that reads, with the key and
    without the data; the table stays as it is."""
    typed = store.typed(type_, codec)
    await store.set("bad", f'{{"id": "{SECRET}", "title": 7, "x": "{SECRET}"}}')
    raw = await store.get("bad")
    calls: list[Callable[[], Any]] = [
        lambda: typed.get("bad"),
        lambda: typed.get_or_raise("bad"),
        lambda: typed.get_many(["bad"]),
        lambda: typed.update("bad", lambda _: 1 / 0),
        lambda: anext(aiter(typed.iter_items())),
    ]
    for call in calls:
        with pytest.raises(SerializationError, match="'bad'") as caught:
            await call()
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert await store.get("bad") == raw


async def test_what_cannot_be_written(store: Any, codec: str) -> None:
    """A value that the codec cannot express is refused before anything is sent; of set_many, nothing
    is written."""
    typed = store.typed(dict[str, Any], codec)
    calls: list[Callable[[], Any]] = [
        lambda: typed.set("k", {"a": object()}),
        lambda: typed.set_nx("k", {"a": object()}),
        lambda: typed.set_many({"a": {}, "k": {"a": object()}}),
        lambda: typed.compare_and_swap("k", None, {"a": object()}),
        lambda: typed.update("k", lambda _: {"a": object()}),
    ]
    for call in calls:
        with pytest.raises(SerializationError, match="'k'"):
            await call()
    assert await store.count() == 0


async def test_racing_updates(store: Any, codec: str) -> None:
    """Updates that race are each applied to what the one before left: none is lost."""
    users = store.typed(User, codec)
    await users.set("u", User(0, "x"))

    def add(user: User | None) -> User:
        assert user is not None
        return dataclasses.replace(user, id=user.id + 1)

    await asyncio.gather(*(users.update("u", add, attempts=1000) for _ in range(30)))
    assert await users.get("u") == User(30, "x")


async def test_update_awaits(store: Any) -> None:
    """update() takes an `async def` function where there is a loop to run it."""
    users = store.typed(User)

    async def add(user: User | None) -> User:
        await asyncio.sleep(0)
        return User(1, "new") if user is None else dataclasses.replace(user, id=user.id + 1)

    assert await users.update("u", add) == User(1, "new")
    results = await gather(*(users.update("u", add, attempts=1000) for _ in range(10)))
    assert sorted(each.id for each in results) == list(range(2, 12))


async def test_an_update_that_raises(store: Any) -> None:
    """What the function raises reaches the caller; nothing is written."""
    users = store.typed(User)
    await users.set("u", User(1, "x"))

    def fail(_: User | None) -> User:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await users.update("u", fail)
    assert await users.get("u") == User(1, "x")


async def test_null_is_a_value(store: Any) -> None:
    """For a type that has None, a stored null and no key look alike in get(), and differ in
    get_many()."""
    maybe = store.typed(User | None)
    await maybe.set("k", None)
    assert await maybe.get("k") is None
    assert await maybe.get("none") is None
    assert await maybe.get_or_raise("k") is None
    assert await maybe.get_many(["k", "none"]) == {"k": None}


async def test_expiry_and_views(store: Any, clock: ServerClock) -> None:
    """A typed store is a view: of a namespace, of a transaction, with the store's own expiry."""
    users = store.namespace("n:").typed(User)
    await users.set("u", User(1, "x"), ttl=60)
    assert await store.keys() == ["n:u"]
    assert [key async for key, _ in users.iter_items()] == ["u"]
    with pytest.raises(SerializationError, match="'bad'"):
        await store.namespace("n:").set("bad", "x")
        await users.get("bad")
    clock.advance(61)
    assert await users.get("u") is None
    with pytest.raises(LookupError):
        async with store.transaction() as tx:
            await tx.typed(User).set("t", User(2, "y"))
            assert await tx.typed(User).get("t") == User(2, "y")
            raise LookupError
    assert await store.get("t") is None


def test_repr_says_what_it_is() -> None:
    """repr() names the type, the codec and the store."""
    store = pgkv.Store(pgkv.Config("host=nowhere.invalid"))
    assert repr(store.typed(User, "msgpack")) == (
        "<TypedStore of User in msgpack, <Store 'kv_store' at nowhere.invalid>>"
    )
