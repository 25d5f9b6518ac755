"""Feature flags: a table of typed values, edited by many at once, and asked all the time.

    python examples/feature_flags.py                             # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/feature_flags.py

A flag is on for the users it names, and for a percentage of the others. `update` changes it by a
function: of editors who write at the same moment none undoes another's work. Checks are answered
from memory, which `watch` keeps up to date: what another process changes is there a moment later.

Look at: the twenty editors, who are all on the list; the users of a rollout, who stay in when it
grows; how few queries the checks took, although the edits are another store's.
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


class Flags:
    """All flags, in memory."""

    def __init__(self, store: pgkv.AsyncStore) -> None:
        self.space = store.namespace("flag:", notify=True)
        self.table = self.space.typed(Flag)
        self.known: dict[str, Flag] = {}
        self.ready = asyncio.Event()
        self.changed = asyncio.Event()

    async def follow(self) -> None:
        """Read the flags that are there, and then each one that changes, for ever."""
        async with self.space.watch("", prefix=True, initial=True) as events:
            async for event in events:
                if event.kind == "resync":
                    self.ready.set()
                elif flag := await self.table.get(event.key):
                    self.known[event.key] = flag
                else:
                    self.known.pop(event.key, None)
                self.changed.set()

    def is_on(self, name: str, user: str) -> bool:
        """Whether a flag is on for a user. One that does not exist is off."""
        flag = self.known.get(name)
        return flag is not None and flag.is_on(name, user)

    async def edit(self, name: str, change: Callable[[Flag], Flag]) -> Flag:
        """Change a flag, which begins as one that is off."""
        return await self.table.update(name, lambda found: change(found or Flag()))


def invite(user: str) -> Callable[[Flag], Flag]:
    """An edit: the flag with one more user."""
    return lambda flag: replace(flag, people=(*flag.people, user))


async def rollout(here: Flags, there: Flags, name: str, percent: int) -> set[str]:
    """Set the percentage elsewhere; the users for whom the flag is on here, once that is known."""
    flag = await there.edit(name, lambda flag: replace(flag, percent=percent))
    async with asyncio.timeout(60):
        while here.known.get(name) != flag:
            here.changed.clear()
            await here.changed.wait()
    return {user for user in USERS if here.is_on(name, user)}


async def show() -> None:
    """Edit, roll out, list."""
    async with (
        pgkv.AsyncStore.connect(schema=SCHEMA) as store,
        pgkv.AsyncStore.connect(schema=SCHEMA) as other,  # another process, usually
    ):
        here, there = Flags(store), Flags(other)
        await asyncio.gather(*(there.edit("search", invite(editor)) for editor in EDITORS))
        following = asyncio.create_task(here.follow())
        await here.ready.wait()
        people = here.known["search"].people
        print(f"{len(people)} of {len(EDITORS)} editors who wrote at once are on the list")

        queries: list[str] = []
        stop_counting = pgkv.on_operation(lambda name, *_: queries.append(name))
        few = await rollout(here, there, "search", percent=20)
        more = await rollout(here, there, "search", percent=50)
        stop_counting()
        print(f"on for {len(few)} of {len(USERS)} users at 20 %, for {len(more)} at 50 %,", end=" ")
        print("the former among them" if few < more else "but not for all of the former")
        print(f"{2 * len(USERS)} checks and two edits elsewhere took {len(queries)} queries")

        await there.edit("dark-mode", invite("ada"))
        async for name, flag in there.table.iter_items():
            print(f"{name}: {flag.percent} %, {len(flag.people)} by name")
        following.cancel()
        if set(people) != set(EDITORS) or not few < more or len(queries) > 100:
            raise SystemExit("an edit was lost, or a check was wrong or slow")


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
