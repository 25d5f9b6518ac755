"""What mypy and pyright make of cached functions: signature and return type stay. Never run."""

from __future__ import annotations

from typing import Any, assert_type

import pgkv
from pgkv import AsyncCachedFunction, CachedFunction, CachedValue


@pgkv.cached(ttl=60)
def plain(user_id: int, name: str = "x") -> dict[str, int]:
    return {name: user_id}


@pgkv.cached(ttl=None, ignore=("db",), stale=60)
async def coroutine(user_id: int, *, db: object) -> list[str]:
    return [str(user_id)]


class Repo:
    def __cache_key__(self) -> str:
        return "repo"

    @pgkv.cached(ttl=lambda result, *args: 60)
    def load(self, n: int) -> str:
        return str(n)

    @pgkv.cached(ttl=60)
    async def fetch(self, n: int, flag: bool = False) -> bytes:
        return b"%d" % n

    @staticmethod
    @pgkv.cached(ttl=60)
    def alone(n: int) -> float:
        return n / 2


assert_type(plain(1), dict[str, int])
assert_type(plain(user_id=1, name="y"), dict[str, int])
assert_type(plain.refresh(1), dict[str, int])
assert_type(plain.peek(1), CachedValue[dict[str, int]] | None)
assert_type(plain.invalidate(1), None)
plain.invalidate("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
plain.refresh()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
plain.using(None).invalidate(1, nope=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
plain("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
plain(1, nope=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
plain()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

repo = Repo()
assert_type(repo.load(1), str)
assert_type(Repo.alone(3), float)
repo.load.invalidate(1)
repo.load.invalidate("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
repo.load("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
repo.load()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def check() -> None:
    assert_type(await coroutine(1, db=None), list[str])
    assert_type(await coroutine.refresh(1, db=None), list[str])
    assert_type(await coroutine.peek(1), CachedValue[list[str]] | None)
    await coroutine.invalidate(1, db=None)
    await coroutine.invalidate("1", db=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await coroutine(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(await repo.fetch(1, flag=True), bytes)
    await repo.fetch("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await pgkv.invalidate_tag("t", store=pgkv.AsyncStore(pgkv.Config("postgresql://")))


pgkv.invalidate_tag("t")
functions: list[CachedFunction[..., Any] | AsyncCachedFunction[..., Any]] = pgkv.cached_functions()
