"""What users' type checkers make of pgkv: never run, only checked, by mypy and by pyright.

Each wrong call carries a comment that expects the error: where none is found, the unused comment is
one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypedDict, assert_type

import pgkv
from pgkv import (
    AsyncPipeline,
    AsyncStore,
    AsyncTypedStore,
    CasResult,
    Entry,
    Handle,
    KeyValue,
    Pipeline,
    Stats,
    Store,
    TypedCasResult,
    TypedStore,
)


@dataclass
class User:
    id: int
    name: str


class Movie(TypedDict):
    title: str


def basics(store: Store) -> None:
    assert_type(store.get("k"), bytes | None)
    assert_type(store.get("k", 5), bytes | int)
    assert_type(store.get("k", b""), bytes)
    assert_type(store.get_or_raise("k"), bytes)
    assert_type(store.get_string("k"), str | None)
    assert_type(store.get_entry("k"), Entry | None)
    assert_type(store.set("k", "v"), int)
    assert_type(store.set("k", "v", ttl=5, keep_ttl=False), int)
    assert_type(store.set("k", "v", if_version=0), int | None)
    assert_type(store.set_nx("k", b"v"), bool)
    assert_type(store.delete("k"), bool)
    assert_type(store.ttl("k"), float | None)
    assert_type(store["k"], bytes)
    assert_type("k" in store, bool)
    assert_type(iter(store), Iterator[str])


def the_rest(store: Store) -> None:
    assert_type(store.get_many(["k"]), dict[str, bytes])
    assert_type(store.set_many({"k": b"v", "l": b"w"}), int)
    assert_type(store.set_many([("k", "v")]), int)
    assert_type(store.increment("k"), int)
    assert_type(store.increment("k", only_if_exists=True), int | None)
    assert_type(store.increment("k", maximum=3), pgkv.IncrementResult)
    assert_type(store.increment("k", 2, minimum=0, ttl=9), pgkv.IncrementResult)
    assert_type(store.increment_many({"k": 1}), dict[str, int])
    assert_type(store.exists_many(["k"]), set[str])
    assert_type(store.compare_and_swap("k", None, "v"), CasResult)
    assert_type(store.get_and_set("k", "v"), bytes | None)
    assert_type(store.update("k", lambda value: value or b""), bytes)
    assert_type(store.keys("k"), list[str])
    assert_type(store.scan("k"), list[KeyValue])
    assert_type(store.iter_items(), Iterator[KeyValue])
    assert_type(store.stats(), Stats)
    assert_type(store.namespace("n:"), Store)
    assert_type(store.run_transaction(lambda tx: tx.increment("n")), int)
    with store.transaction() as tx:
        assert_type(tx, Store)
    with Store.connect("dsn") as opened:
        assert_type(opened, Store)


def pipelines(store: Store) -> None:
    with store.pipeline() as p:
        assert_type(p, Pipeline)
        got = p.get("k")
        counted = p.increment("n")
        assert_type(p.increment("n", only_if_exists=True), pgkv.Handle[int | None])
        assert_type(p.increment("n", maximum=3), pgkv.Handle[pgkv.IncrementResult])
        many = p.get_many(["k"])
        version = p.set("k", "v")
        perhaps = p.set("k", "v", if_version=0)
        otherwise = p.get("k", 5)
        swapped = p.compare_and_swap("k", "a", "b")
    assert_type(got, Handle[bytes | None])
    assert_type(got.result(), bytes | None)
    assert_type(counted.result(), int)
    assert_type(many.result(), dict[str, bytes])
    assert_type(version.result(), int)
    assert_type(perhaps.result(), int | None)
    assert_type(otherwise.result(), bytes | int)
    assert_type(swapped.result(), CasResult)


def typed(store: Store) -> None:
    users = store.typed(User)
    assert_type(users, TypedStore[User])
    assert_type(users.get("u"), User | None)
    assert_type(users.get_or_raise("u"), User)
    assert_type(users.set("u", User(1, "x")), int | None)
    assert_type(users.get_many(["u"]), dict[str, User])
    assert_type(users.compare_and_swap("u", None, User(1, "x")), TypedCasResult[User])
    assert_type(users.update("u", lambda user: user or User(1, "x")), User)
    assert_type(users.iter_items(), Iterator[tuple[str, User]])
    assert_type(store.typed(Movie, "msgpack").get("m"), Movie | None)
    assert_type(store.typed(list[User]).get("m"), list[User] | None)
    assert_type(store.typed(int).get_or_raise("n"), int)


async def awaited(store: AsyncStore) -> None:
    assert_type(await store.get("k"), bytes | None)
    assert_type(await store.get("k", 5), bytes | int)
    assert_type(await store.set("k", "v"), int)
    assert_type(await store.set("k", "v", if_version=0), int | None)
    assert_type(await store.get_many(["k"]), dict[str, bytes])
    assert_type(await store.increment("k"), int)
    assert_type(await store.exists_many(["k"]), set[str])
    assert_type(await store.update("k", lambda value: value or b""), bytes)
    assert_type(store.iter_keys(), AsyncIterator[str])
    assert_type(store.iter_items(), AsyncIterator[KeyValue])
    assert_type(store.namespace("n:"), AsyncStore)

    async def twice(value: bytes | None) -> bytes:
        return (value or b"") * 2

    async def work(tx: AsyncStore) -> int:
        return await tx.increment("n")

    assert_type(await store.update("k", twice), bytes)
    assert_type(await store.run_transaction(work), int)
    async with store.transaction() as tx:
        assert_type(tx, AsyncStore)
    assert_type(await store.transaction(), AsyncStore)
    async with store.pipeline() as p:
        queue: AsyncPipeline = p
        got = queue.get("k")
    assert_type(got.result(), bytes | None)
    async with AsyncStore.connect("dsn") as opened:
        assert_type(opened, AsyncStore)
    assert_type(await AsyncStore.connect("dsn"), AsyncStore)


async def awaited_typed(store: AsyncStore) -> None:
    users = store.typed(User)
    assert_type(users, AsyncTypedStore[User])
    assert_type(await users.get("u"), User | None)
    assert_type(await users.get_many(["u"]), dict[str, User])

    async def same(user: User | None) -> User:
        return user or User(1, "x")

    assert_type(await users.update("u", same), User)
    assert_type(users.iter_items(), AsyncIterator[tuple[str, User]])


def settings() -> None:
    Store.connect("dsn", table_name="kv", operation_timeout=timedelta(seconds=5), retry=None)
    pgkv.configure("dsn", table_type=pgkv.TableType.REGULAR)
    more: dict[str, Any] = {"pool_max_size": 3}
    Store.connect("dsn", **more)


def wrong(store: Store, users: TypedStore[User]) -> None:
    store.get(5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    store.set("k", 5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    store.set("k", "v", 60)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    store.set_many({"k": 5})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    store.increment("k", "1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    store.typed(User, "pickle")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    users.set("u", {"id": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    users.update("u", lambda user: "text")  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]
    name: str = store.get("k")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    number: int = store.pipeline().get("k").result()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(name, number)


async def wrong_awaited(store: AsyncStore, users: AsyncTypedStore[User]) -> None:
    await store.set("k", 5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await users.set("u", {"id": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    for _ in store.iter_items():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
        pass
    with store.transaction():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    async with store.pipeline() as p:
        await p.get("k")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]


async def wrong_unawaited(store: AsyncStore) -> None:
    AsyncStore.connect("dsn").get("k")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    store.transaction().set("k", "v")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    print(pgkv.AsyncLock(store, "l").acquire().token)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
    print((await store.get("k")).decode())  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]


def wrong_variants(store: Store, other: AsyncStore) -> None:
    pgkv.Lock(other, "l")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pgkv.AsyncSemaphore(store, "l", 2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pgkv.RateLimiter(other, "1/s", name="l")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pgkv.AsyncRateLimiter(store, "1/s", name="l")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pgkv.SessionStore(other)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    store.transaction().set("k", "v")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    Store.connect("dsn", tabel_name="kv")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    store.table("kv", pool_max_size=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    pgkv.Lock(store, "l", wakeup="listen")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pgkv.locked("l", on_busy="fail")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    pgkv.Store("dsn")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def anything(store: Store) -> Any:
    return pgkv.CasStatus.SUCCESS if store else None
