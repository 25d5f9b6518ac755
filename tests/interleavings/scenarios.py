"""The flows that are interleaved, and what must hold: one `Scenario` for each.

To add a flow: write what each client does as a coroutine over `world.store`, mark with ``await
world.step(...)`` what happens outside the store, note in `world.memory` what the invariant needs, and list the
scenario in `SCENARIOS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg

import pgkv
from tests.interleavings.schedule import Call, Died, Inline, Scenario, World, ended

Client = Callable[[World], Coroutine[Any, Any, Any]]
TTL = 10.0


def died(results: dict[str, Any]) -> bool:
    """Whether a client vanished: what it held then lasts to its ttl."""
    return any(result is Died for result in results.values())


def failed_by_itself(results: dict[str, Any]) -> list[BaseException]:
    """Errors that no fault explains."""
    explained = (pgkv.OperationTimeoutError, pgkv.LeaseLostError)
    return [
        result
        for result in results.values()
        if isinstance(result, BaseException) and not isinstance(result, explained)
    ]


# -- locks ---------------------------------------------------------------------------------


def holding(**options: Any) -> Client:
    """Acquire, be inside for a while, release."""

    async def client(world: World) -> int:
        name = world.client()
        lock = world.make("Lock", "a", ttl=TTL, renew=False, **options)
        async with lock.acquire(timeout=60) as lease:
            world.held[name] = lease
            try:
                await world.step("inside")
            finally:
                del world.held[name]
        note_token(world, lease)
        return int(lease.token)

    return client


async def extending(world: World) -> None:
    """Acquire, and extend the lease while inside."""
    name = world.client()
    lock = world.make("Lock", "a", ttl=TTL, renew=False)
    async with lock.acquire(timeout=60) as lease:
        world.held[name] = lease
        try:
            await lease.extend(2 * TTL)
            await world.step("inside")
        finally:
            del world.held[name]
    note_token(world, lease)


async def revoking(world: World) -> None:
    """End a holder's token, but not its lease: the next one waits for the lease's end."""
    lock = world.make("Lock", "a", ttl=TTL, renew=False)
    holder = await lock.holder()
    if holder is not None:
        await lock.revoke(holder.token)


def of_semaphore(slots: int) -> Client:
    async def client(world: World) -> None:
        name = world.client()
        semaphore = world.make("Semaphore", "s", slots, ttl=TTL, renew=False)
        async with semaphore.acquire(timeout=60) as lease:
            world.held[name] = lease
            try:
                await world.step("inside")
            finally:
                del world.held[name]

    return client


def note_token(world: World, lease: Any) -> None:
    world.memory.setdefault("tokens", []).append(lease.token)


def at_most(number: int) -> Callable[[World], None]:
    def invariant(world: World) -> None:
        held = [name for name, lease in world.held.items() if not lease.is_lost]
        assert len(held) <= number, f"{held} hold it at once"

    return invariant


def one_holder(world: World) -> None:
    """At most one client trusts its lease, and what it trusts is what the server says."""
    at_most(1)(world)
    for lease in world.held.values():
        if not lease.is_lost:
            found = pgkv.Lock(world.sync, "a").holder()
            token = None if found is None else found.token
            assert token == lease.token, "a lease that its holder trusts has ended on the server"


def free(world: World, results: dict[str, Any]) -> None:
    """Nobody holds a lock, and nobody queues for it, when all clients have ended."""
    assert not failed_by_itself(results), results
    tokens = world.memory.get("tokens", [])
    assert len(set(tokens)) == len(tokens), "a token was given twice"
    if not died(results):
        lock = pgkv.Lock(world.sync, "a")
        assert lock.holder() is None, f"still held, after {results}"


def truncate(world: World, *suffixes: str) -> None:
    """Empty tables of the scenario, where they exist."""
    with psycopg.connect(world.clock.dsn, autocommit=True) as conn:
        for suffix in suffixes:
            name = f"kv_store{suffix}"
            if conn.execute("SELECT to_regclass(%s)", [name]).fetchone() != (None,):
                conn.execute(f"DELETE FROM {name}")


# -- cached --------------------------------------------------------------------------------


async def version() -> int:
    """The scenario's source, which is read at one moment and returned at a later one."""
    world = World.current
    assert world is not None
    value = int(world.memory["version"])
    await world.step("computes")
    return value


def version_sync() -> int:
    """The same for threads."""
    return int(ended(version()))


def cached_version(world: World, **options: Any) -> Any:
    """The source, cached in a process of the client's own."""
    cached = pgkv.cached(ttl=TTL * 10, beta=0, compute_timeout=1, store=world.store, **options)
    return InlineFunction(cached(version_sync)) if world.is_sync else cached(version)


class InlineFunction(Inline):
    """A cached function of threads, to be awaited."""

    def __call__(self) -> Call:
        return Call(self._target)


def reading(**options: Any) -> Client:
    async def client(world: World) -> None:
        function = cached_version(world, **options)
        for _ in range(2):
            before = world.memory["visible"]
            value = await function()
            assert value >= before, f"read {value} after {before} had been invalidated"

    return client


def writing(*, clears: bool = False, **options: Any) -> Client:
    async def client(world: World) -> None:
        function = cached_version(world, **options)
        await world.step("writes", lambda: change(world))
        version = world.memory["version"]
        await (function.cache_clear() if clears else function.invalidate())
        world.memory["visible"] = max(world.memory["visible"], version)

    return client


def change(world: World) -> None:
    world.memory["version"] += 1


def new_source(world: World) -> None:
    world.memory.update(version=1, visible=1)
    truncate(world, "")


def no_errors(world: World, results: dict[str, Any]) -> None:
    assert not failed_by_itself(results), results


# -- the rate limiter ----------------------------------------------------------------------

INTERVAL = 10.0


async def acquiring(world: World) -> None:
    """Wait for a token of a bucket that holds one."""
    rate = pgkv.Rate(1, INTERVAL, burst=1)
    limiter = world.make("RateLimiter", rate, name="r", timeout=5)
    decision = await limiter.acquire("k", timeout=1000)
    assert decision.allowed
    world.memory.setdefault("admitted", []).append(world.now)


async def cancelling(world: World) -> None:
    """Reserve a token, and give it back."""
    rate = pgkv.Rate(1, INTERVAL, burst=1)
    limiter = world.make("RateLimiter", rate, name="r", timeout=5)
    reservation = await limiter.reserve("k", max_wait=1000)
    await world.step("thinks")
    await reservation.cancel()


def evenly(world: World, results: dict[str, Any]) -> None:
    """Never more than the bucket's bound: with a burst of 1, one in each interval."""
    assert not failed_by_itself(results), results
    admitted = sorted(world.memory.get("admitted", []))
    gaps = [b - a for a, b in itertools.pairwise(admitted)]
    assert all(gap >= INTERVAL - 0.5 for gap in gaps), f"admitted at {admitted}"


# -- sessions ------------------------------------------------------------------------------


async def a_session(world: World) -> Any:
    sessions = world.make("SessionStore")
    session = await sessions.load(world.memory["token"])
    return sessions, session


async def saving(world: World) -> None:
    sessions, session = await a_session(world)
    if session is None:
        return
    session.data["n"] = 1
    try:
        await sessions.save(session)
    except pgkv.SessionGoneError:
        pass


async def rotating(world: World) -> None:
    sessions, session = await a_session(world)
    if session is None:
        return
    try:
        await sessions.rotate(session)
    except (pgkv.SessionGoneError, pgkv.SessionConflictError):
        pass
    world.memory["tokens"].append(session.id)


async def destroying(world: World) -> bool:
    sessions, session = await a_session(world)
    if session is None:
        return False
    return bool(await sessions.destroy(session))


async def ending_all(world: World) -> bool:
    """End every session of the user."""
    await world.make("SessionStore").destroy_user("u")
    return True


def logged_out(world: World, results: dict[str, Any]) -> None:
    assert not failed_by_itself(results), results
    if isinstance(results["destroyer"], bool):
        sessions = pgkv.SessionStore(world.sync)
        alive = [token for token in world.memory["tokens"] if sessions.load(token) is not None]
        assert not alive, "alive after the logout was answered"


def log_in(world: World) -> None:
    sessions = pgkv.SessionStore(world.sync)
    world.memory["token"] = sessions.create({"n": 0}, user_id="u").id
    world.memory["tokens"] = [world.memory["token"]]


SCENARIOS: dict[str, Scenario] = {
    each.name: each
    for each in (
        Scenario(
            "lock",
            {"A": holding(), "B": holding()},
            invariant=one_holder,
            check=free,
            prepare=lambda world: truncate(world, "_locks", "_locks_tickets"),
            jumps=(TTL + 5,),
        ),
        Scenario(
            "lock, three clients",
            {"A": holding(), "B": holding(), "C": extending},
            invariant=one_holder,
            check=free,
            prepare=lambda world: truncate(world, "_locks"),
            kinds=("die",),
            jumps=(TTL + 5,),
            faults=2,
        ),
        Scenario(
            "lock: past its ttl",
            {"A": holding(), "B": holding()},
            invariant=one_holder,
            check=free,
            prepare=lambda world: truncate(world, "_locks"),
            kinds=(),
            jumps=(TTL + 5,),
        ),
        Scenario(
            "lock: revoked",
            {"A": holding(), "B": holding(), "revoker": revoking},
            invariant=at_most(1),
            check=no_errors,
            prepare=lambda world: truncate(world, "_locks"),
            preemptions=2,
            kinds=("lose", "die"),
        ),
        Scenario(
            "fair lock",
            {"A": holding(fair=True), "B": holding(fair=True), "C": holding(fair=True)},
            invariant=one_holder,
            check=free,
            prepare=lambda world: truncate(world, "_locks", "_tickets"),
            preemptions=1,
        ),
        Scenario(
            "semaphore",
            {"A": of_semaphore(2), "B": of_semaphore(2), "C": of_semaphore(2)},
            invariant=at_most(2),
            check=no_errors,
            prepare=lambda world: truncate(world, "_locks"),
            preemptions=1,
        ),
        Scenario(
            "cached: invalidate against fill",
            {"reader": reading(), "writer": writing(), "other": reading()},
            check=no_errors,
            prepare=new_source,
            preemptions=2,
            kinds=("die",),
        ),
        Scenario(
            "cached: every fault",
            {"reader": reading(), "writer": writing()},
            check=no_errors,
            prepare=new_source,
        ),
        Scenario(
            "cached: clear",
            {"reader": reading(), "writer": writing(clears=True)},
            check=no_errors,
            prepare=new_source,
        ),
        Scenario(
            "limiter: acquire and cancel",
            {"A": acquiring, "B": acquiring, "C": cancelling},
            check=evenly,
            prepare=lambda world: truncate(world, ""),
        ),
        Scenario(
            "session: save, rotate, destroy",
            {"saver": saving, "rotator": rotating, "destroyer": destroying},
            check=logged_out,
            prepare=log_in,
        ),
        Scenario(
            "session: save, rotate, end all of the user",
            {"saver": saving, "rotator": rotating, "destroyer": ending_all},
            check=logged_out,
            prepare=log_in,
        ),
    )
}
