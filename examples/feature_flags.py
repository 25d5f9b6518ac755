"""Feature flags: a table of typed values, edited by many at once, and asked all the time.

    python examples/feature_flags.py                             # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/feature_flags.py

A flag is on for the users it names, and for a percentage of the others. `update` changes it by a
function: of editors who write at the same moment none undoes another's work. Checks are answered
from memory; what another process changes is seen there after two seconds at the latest.

Look at: the twenty editors, who are all on the list; the users of a rollout, who stay in when it
grows; how few of the checks asked the database.
"""

import asyncio
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import psycopg

import pgkv
from pgkv import embedded

SCHEMA = "pgkv_example_flags"
EDITORS = [f"editor{n:02}" for n in range(20)]
USERS = [f"user{n}" for n in range(10_000)]


@dataclass(frozen=True)
class Flag:
    """For whom something is on."""

    percent: int = 0
    people: tuple[str, ...] = ()

    def is_on(self, name: str, user: str) -> bool:
        """Whether it is on for a user: always the same ones, and others for another flag."""
        return user in self.people or zlib.crc32(f"{name}:{user}".encode()) % 100 < self.percent


Table = pgkv.AsyncTypedStore[Flag]


@pgkv.cached(ttl=60, ignore=("table",), l1=pgkv.L1(ttl=2), store_timeout=5)
async def look_up(name: str, table: Table) -> Flag | None:
    """Return a flag, from memory, the cache or the table."""
    return await table.get(name)


async def is_on(table: Table, name: str, user: str) -> bool:
    """Whether a flag is on for a user. One that does not exist is off."""
    flag = await look_up(name, table)
    return flag is not None and flag.is_on(name, user)


async def edit(table: Table, name: str, change: Callable[[Flag], Flag]) -> Flag:
    """Change a flag, which begins as one that is off, and let everybody know."""
    flag = await table.update(name, lambda found: change(found or Flag()))
    await look_up.invalidate(name, table)
    return flag


def invite(user: str) -> Callable[[Flag], Flag]:
    """An edit: the flag with one more user."""
    return lambda flag: replace(flag, people=(*flag.people, user))


async def rollout(table: Table, name: str, percent: int) -> set[str]:
    """Set the percentage; the users for whom the flag is on then."""
    await edit(table, name, lambda flag: replace(flag, percent=percent))
    return {user for user in USERS if await is_on(table, name, user)}


async def show() -> None:
    """Edit, roll out, list."""
    async with pgkv.AsyncStore.connect(schema=SCHEMA) as store:
        pgkv.configure(store)  # for the decorator
        table = store.namespace("flag:").typed(Flag)
        await asyncio.gather(*(edit(table, "search", invite(editor)) for editor in EDITORS))
        people = (await table.get_or_raise("search")).people
        print(f"{len(people)} of {len(EDITORS)} editors who wrote at once are on the list")

        queries: list[str] = []
        stop_counting = pgkv.on_operation(lambda name, *_: queries.append(name))
        few = await rollout(table, "search", percent=20)
        more = await rollout(table, "search", percent=50)
        stop_counting()
        print(f"on for {len(few)} of {len(USERS)} users at 20 %, for {len(more)} at 50 %,", end=" ")
        print("the former among them" if few < more else "but not for all of the former")
        print(f"{2 * len(USERS)} checks and two edits took {len(queries)} queries")

        await edit(table, "dark-mode", invite("ada"))
        async for name, flag in table.iter_items():
            print(f"{name}: {flag.percent} %, {len(flag.people)} by name")
        if set(people) != set(EDITORS) or not few < more or len(queries) > 100:
            raise SystemExit("an edit was lost, or a check was wrong or dear")


def main() -> None:
    """Run it, and clean up."""
    try:
        asyncio.run(show())
    finally:
        with psycopg.connect(os.environ["PGKV_DSN"], autocommit=True) as conn:
            conn.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
