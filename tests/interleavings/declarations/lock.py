"""Locks and semaphores: one name's row, the rows of its slots, and the queue.

A grant that meets a row in flight is denied and asks again, a renewal is sent again, a revocation
gives up for the moment: such an answer is asked for again when the other statement has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psycopg

import pgkv
from pgkv import PgkvError
from pgkv._ops.op import Op, Statement
from pgkv._sql.table import read_int
from pgkv.patterns._runtime.lease import LOCKED
from pgkv.patterns.lock import api
from pgkv.patterns.lock.sql import (
    Asking,
    Denied,
    Granted,
    LockStatements,
    SemaphoreStatements,
    size_key,
    slot_keys,
)
from tests.interleavings.pairs import PASSED_OVER, Operation, Subject
from tests.interleavings.scenarios import (
    Client,
    at_most,
    died,
    failed_by_itself,
    truncate,
)
from tests.interleavings.schedule import Scenario, World

STATEMENTS = ("pgkv.patterns.lock.sql",)
READS = frozenset(["ended", "holders", "queue", "guards", "place", "isolation", "notify"])
BUSY = "busy"  # ask again
TOKEN = 100  # of the lease that a state begins with: older than a week
TTL, PATIENCE, TICKET_TTL = 30.0, 1.0, 20.0


def asking(name: str) -> Asking:
    return Asking("host:1", name.encode(), b"\x1f" + name.encode())


ASKINGS = {name: asking(name) for name in "abx"}


def said(answer: Any) -> Any:
    """What of an answer can be compared: no times, no new tokens."""
    if isinstance(answer, Granted):
        return "granted", answer.token == TOKEN
    if isinstance(answer, Denied):
        return "denied"
    if isinstance(answer, dict):  # of a renewal
        return [BUSY if code == LOCKED else code for code in answer.values()]
    return answer


class Bound(NamedTuple):
    """A subject, and what performs its operations."""

    subject: Any
    store: Any


class LockSubject(Subject[Bound]):
    """One lock, or one semaphore, in a table of its own.

    Attributes:
        sql: the statements.
        keys: the lock's row, or the rows of the semaphore's slots.
    """

    kind: type[LockStatements]
    keys: tuple[bytes, ...]
    repeatable = frozenset(("guard",))

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        api._statements.cache_clear()  # made again, so that it is seen which are made
        self.sql: Any = api.statements_of(self.store, self.kind, durable=True)
        creating: list[Op[Any]] = [self.sql.holder(b"n"), self.sql.queue()]
        for op in creating:
            self.store._execute(op)

    def on(self, conn: psycopg.Connection | None) -> Bound:
        return Bound(self, self.store if conn is None else self.store.using(conn))

    def asks_again(self, answer: Any) -> bool:
        return answer in ([BUSY], "denied")

    def plain(self, answer: Any) -> Any:
        return "denied" if answer == BUSY else answer

    def reset(self, state: str) -> None:
        for table in (self.sql.t, self.sql.q):
            self.conn.execute(f"DELETE FROM {table}".encode())
        for key, holder, expires in self.rows(state):
            self.conn.execute(
                f"INSERT INTO {self.sql.t} (key, value, expires_at, created_at, updated_at, version)"
                f" VALUES (%s, %s, {expires}, now(), now(), {TOKEN})".encode(),
                [key.decode(), holder],
            )

    def rows(self, state: str) -> list[tuple[bytes, bytes, str]]:
        raise NotImplementedError

    def late(self, name: str) -> list[list[Op[Any]]]:
        """Copies of the statements that grant, which the server gets to last."""
        raise NotImplementedError

    def observe(self) -> Any:
        """Who holds what by which token, who queues, and what late copies of both grants get."""
        live = self.conn.execute(
            f"SELECT key, convert_from(value, 'UTF8'), version = {TOKEN} FROM {self.sql.t}"
            " WHERE expires_at > clock_timestamp() ORDER BY key".encode()
        ).fetchall()
        # A ticket drawn while its asking was taken back ends by itself.
        queue = self.conn.execute(
            f"SELECT key FROM {self.sql.q} WHERE expires_at > clock_timestamp() AND NOT EXISTS"
            f" (SELECT 1 FROM {self.sql.t} l WHERE l.key = substr({self.sql.q}.key, 2))"
            " ORDER BY key".encode()
        ).fetchall()
        late: dict[str, list[Any]] = {}
        for name in "ab":
            for ops in self.late(name):
                with self.conn.transaction(force_rollback=True):
                    late.setdefault(name, []).append(perform(self.store.using(self.conn), *ops))
        return live, queue, late


def perform(store: Any, *ops: Op[Any]) -> Any:
    answer: Any = None
    for op in ops:
        try:
            answer = store._channel.execute(op)
            if isinstance(answer, Denied) and answer.holder in op.params:
                answer = BUSY  # its own, and locked: a repeat of it is granted
            answer = said(answer)
        except PgkvError as error:
            if error._sqlstate != "55P03":
                raise
            answer = BUSY
    return answer


def sent(make: Callable[[Any], Any], *, answers: bool = True) -> Operation[Bound]:
    """An operation: what is sent is made for the subject at hand."""

    def run(bound: Bound, side: str) -> Any:
        ops = make(bound.subject)
        answer = perform(bound.store, *(ops if isinstance(ops, list) else [ops]))
        return answer if answers else None

    return run


class NamedLock(LockSubject):
    """A lock: without a row, free, held, expired, ended by force, and held by one who asks again."""

    kind = LockStatements
    keys = (b"n",)
    states = ("absent", "free", "held", "expired", "held by a", "a ended")
    # What a row still knows of an asking of long ago is not promised.
    explained: Mapping[tuple[str, str], str] = {("clean", "a ended"): PASSED_OVER}

    def rows(self, state: str) -> list[tuple[bytes, bytes, str]]:
        soon, past, never = "now() + interval '1 minute'", "now() - interval '1 s'", "'epoch'"
        holder, expires = {
            "free": (b"x", never), "held": (b"x", soon), "expired": (b"x", past),
            "held by a": (b"a", soon), "a ended": (b"a", never),
        }.get(state, (b"", ""))  # fmt: skip
        return [(b"n", holder, expires)] if expires else []

    def late(self, name: str) -> list[list[Op[Any]]]:
        return [self.taking(name), [self.grant(name)]]

    def taking(self, name: str) -> list[Op[Any]]:
        """What answers first, and the statement that knows where it says nothing."""
        return [self.take(name), self.grant(name)]

    def take(self, name: str) -> Op[Any]:
        return self.sql.take(b"n", ASKINGS[name], TTL)  # type: ignore[no-any-return]  # an Op

    def grant(self, name: str) -> Op[Any]:
        return self.sql.grant(b"n", ASKINGS[name], TTL, PATIENCE)  # type: ignore[no-any-return]  # as above

    def turn(self, name: str) -> Op[Any]:
        return self.sql.turn(b"n", ASKINGS[name], TTL)  # type: ignore[no-any-return]  # as above

    def fair(self, name: str) -> Op[Any]:
        return self.sql.grant_fair(b"n", ASKINGS[name], TTL, PATIENCE, TICKET_TTL)  # type: ignore[no-any-return]  # as above

    operations: Mapping[str, Operation[Bound]] = {
        "take a": sent(lambda s: s.taking("a")),
        "take b": sent(lambda s: s.taking("b")),
        "look": sent(lambda s: s.sql.look(b"n", ASKINGS["b"], TTL), answers=False),
        "grant a": sent(lambda s: s.grant("a")),
        "grant b": sent(lambda s: s.grant("b")),
        "grant fair a": sent(lambda s: s.fair("a")),
        "grant fair b": sent(lambda s: s.fair("b")),
        # With its ticket, the short statement and the one that knows where it says nothing.
        "turn b": sent(lambda s: [s.fair("b"), s.turn("b"), s.fair("b")]),
        "take back a": sent(lambda s: s.sql.take_back(s.keys, ASKINGS["a"]), answers=False),
        "leave": sent(lambda s: s.sql.leave(b"n", ASKINGS["a"]), answers=False),
        "leave in doubt": sent(lambda s: s.sql.leave_in_doubt(b"n", ASKINGS["a"]), answers=False),
        "renew": sent(lambda s: s.sql.renew([(b"n", TOKEN, TTL)])),
        "release": sent(lambda s: s.sql.release(b"n", TOKEN, False)),
        "release and notify": sent(lambda s: s.sql.release(b"n", TOKEN, True)),
        "revoke": sent(lambda s: s.sql.revoke(b"n", TOKEN)),
        "guard": sent(lambda s: s.sql.guard(s.sql.t, b"n", TOKEN, None)),
        "holder": sent(lambda s: [s.sql.holder(b"n")], answers=False),
        "clean": sent(lambda s: s.sql.clean(0), answers=False),
        "note": sent(lambda s: s.sql.note(b"n", ASKINGS["b"], TICKET_TTL), answers=False),
        "clean tickets": sent(lambda s: s.sql.clean_tickets(0), answers=False),
    }


class Slots(LockSubject):
    """A semaphore of two slots: free, with one and two leases, with one beyond them, and without a
    number."""

    kind = SemaphoreStatements
    keys = tuple(slot_keys(b"n", 2))
    states = ("undefined", "free", "one", "two", "beyond", "a has one")

    def rows(self, state: str) -> list[tuple[bytes, bytes, str]]:
        soon = "now() + interval '1 minute'"
        keys = slot_keys(b"n", 3)
        if state == "undefined":
            return []
        held = {
            "one": [(keys[0], b"x")], "two": [(keys[0], b"x"), (keys[1], b"y")],
            "beyond": [(keys[2], b"x")], "a has one": [(keys[1], b"a")],
        }.get(state, [])  # fmt: skip
        return [(size_key(keys), b"2", "'infinity'"), *((key, who, soon) for key, who in held)]

    def late(self, name: str) -> list[list[Op[Any]]]:
        return [[self.slot(name)]]

    def slot(self, name: str) -> Op[Any]:
        return self.sql.grant_slot(self.keys, ASKINGS[name], TTL, PATIENCE)  # type: ignore[no-any-return]  # as above

    def meet(self, a: str, b: str) -> bool:
        # Two sendings of one grant may take two slots: who sent it again gives the other one back.
        return not (a == b and "grant" in a)

    def observe(self) -> Any:
        live, _, late = super().observe()
        # Which free slot is taken does not matter, how many are does, and the number.
        return sorted((who, old) for _, who, old in live), late

    operations: Mapping[str, Operation[Bound]] = {
        "grant a": sent(lambda s: s.slot("a")),
        "grant b": sent(lambda s: s.slot("b")),
        "take back a": sent(lambda s: s.sql.take_back(s.keys, ASKINGS["a"]), answers=False),
        "define": sent(lambda s: s.sql.define(s.keys, resize=False)),
        "lower": sent(lambda s: s.sql.define(s.keys[:1], resize=True)),
        "raise": sent(lambda s: s.sql.define(slot_keys(b"n", 3), resize=True)),
        "release": sent(lambda s: s.sql.release(s.keys[0], TOKEN, False)),
        "renew": sent(lambda s: s.sql.renew([(s.keys[0], TOKEN, TTL)])),
        "revoke": sent(lambda s: s.sql.revoke(s.keys[0], TOKEN)),
        "clean": sent(lambda s: s.sql.clean(0), answers=False),
    }


# -- schedules

TTL = 10.0


def has_expired(lease: Any) -> bool:
    """Whether its holder's time is over by now."""
    return bool(lease.is_lost and lease._reason == "expired")


async def hold(world: World, held: Any, *, extends: bool = False) -> None:
    """Be inside for a while, with what was acquired."""
    name = world.client()
    async with held as lease:
        world.memory.setdefault("tokens", []).append((lease.slot, lease.token))
        world.held[name] = lease
        try:
            if extends:
                await lease.extend(2 * TTL)
                # The server has just said so, whatever the holder's clock believes.
                holder = pgkv.Lock(world.sync, "a").holder()
                is_held = holder is not None and holder.token == lease.token
                assert is_held or has_expired(lease), "an ended lease was extended"
            await world.step("inside")
        finally:
            del world.held[name]


def holding(*, extends: bool = False, **options: Any) -> Client:
    """Acquire the lock, be inside, release."""

    async def client(world: World) -> None:
        lock = world.make("Lock", "a", ttl=TTL, renew=False, **options)
        await hold(world, lock.acquire(timeout=100), extends=extends)

    return client


def holding_both(names: str) -> Client:
    """Acquire several locks at once, given in that order."""

    async def client(world: World) -> None:
        locks = [world.make("Lock", name, ttl=TTL, renew=False) for name in names]
        given = [getattr(lock, "_target", lock) for lock in locks]
        async with locks[0].acquire_many(given, timeout=100) as leases:
            leases = list(leases)
            for lease in leases:
                world.held[f"{world.client()} {lease.name}"] = lease
            try:
                await world.step("inside")
            finally:
                for lease in leases:
                    del world.held[f"{world.client()} {lease.name}"]

    return client


def one_of_each(world: World) -> None:
    """At most one client trusts its lease of each name."""
    names = [lease.name for lease in world.held.values() if not lease.is_lost]
    assert len(names) == len(set(names)), f"{sorted(world.held)} at once"


def of_semaphore(slots: int, **options: Any) -> Client:
    async def client(world: World) -> None:
        semaphore = world.make("Semaphore", "s", slots, ttl=TTL, renew=False, **options)
        try:
            await hold(world, semaphore.acquire(timeout=100))
        except pgkv.ConfigError:  # it has another number of slots by now
            world.memory["resized"] = True

    return client


async def revoking(world: World) -> None:
    """End a holder's token, but not its lease: the next one waits for the lease's end."""
    lock = world.make("Lock", "a", ttl=TTL, renew=False)
    holder = await lock.holder()
    if holder is not None:
        world.memory["revoked"] = True  # its lease goes on to its end
        await lock.revoke(holder.token)


async def freeing(world: World) -> None:
    """Free the name at once, whoever holds it."""
    lock = world.make("Lock", "a", ttl=TTL, renew=False)
    holder = await lock.holder()
    if holder is not None:
        world.memory["freed"] = holder.token
        await lock.force_release(holder.token)


def holds_on_server(world: World, lease: Any) -> None:
    found = pgkv.Lock(world.sync, "a").holder()
    token = None if found is None else found.token
    is_held = token == lease.token
    assert is_held or has_expired(lease), "a lease that its holder trusts has ended on the server"


def one_holder(world: World) -> None:
    """At most one client trusts its lease, and what it trusts is what the server says."""
    at_most(1)(world)
    for lease in world.held.values():
        if not lease.is_lost:
            holds_on_server(world, lease)


def newest_holds(world: World) -> None:
    """What frees a name frees that token only: the lease that was granted last is on the server."""
    trusted = [lease for lease in world.held.values() if not lease.is_lost]
    newest = max(trusted, key=lambda lease: lease.token, default=None)
    if newest is not None and newest.token != world.memory.get("freed"):
        holds_on_server(world, newest)


def one_beside_the_lowered(world: World) -> None:
    """Never more than two, and none next to the one that has lowered the number to 1."""
    at_most(1 if "lowers" in world.held else 2)(world)


def one_of_the_old(world: World) -> None:
    """Those that know of one slot never hold two."""
    at_most(2)(world)
    assert not {"A", "B"} <= {n for n, lease in world.held.items() if not lease.is_lost}


def free(world: World, results: dict[str, Any]) -> None:
    """Tokens have risen, no client waits, and nothing outlives its ttl."""
    assert not failed_by_itself(results), results
    tokens: dict[Any, list[int]] = {}
    for slot, token in world.memory.get("tokens", []):
        tokens.setdefault(slot, []).append(token)
    assert all(each == sorted(set(each)) for each in tokens.values()), f"tokens: {tokens}"
    if died(results) or "revoked" in world.memory:
        world.pass_time(3 * TTL)
    left = world.sync._execute(LEFT)
    assert not left, f"{left} rows are live, after {results}"


LEFT: Op[int] = Op(
    Statement(
        "left",
        "SELECT count(*) FROM kv_store_locks WHERE clock_timestamp() < expires_at"
        " AND expires_at < 'infinity'",
        (),
        read_int,
        writes=False,
    )
)


def of_locks(name: str, clients: dict[str, Client], **options: Any) -> Scenario:
    return Scenario(
        name, clients, **{"invariant": one_holder, "check": free, "prepare": clean, **options}
    )


def clean(world: World) -> None:
    truncate(world, "_locks", "_tickets")


LATER, BACK = TTL + 5, -20.0

SUBJECTS = (NamedLock, Slots)
SCENARIOS = (
    of_locks("lock", {"A": holding(), "B": holding()}, jumps=(LATER,)),
    of_locks(
        "lock, three clients",
        {"A": holding(extends=True), "B": holding(), "C": holding()},
        kinds=("die",),
        jumps=(LATER,),
        faults=2,
    ),
    of_locks("lock: past its ttl", {"A": holding(), "B": holding()}, kinds=(), jumps=(LATER,)),
    of_locks(
        "lock: cancelled",
        {"A": holding(), "B": holding()},
        kinds=("cancel",),
        preemptions=1,
        small=0,
    ),
    of_locks(
        "lock: extended past its end",
        {"A": holding(extends=True), "B": holding()},
        invariant=None,
        kinds=(),
        server_jumps=(LATER,),
        preemptions=2,
        small=2,
    ),
    of_locks(
        "lock: the server's clock jumps",
        {"A": holding(extends=True), "B": holding()},
        invariant=None,
        kinds=("lose",),
        server_jumps=(LATER, BACK),
        faults=2,
    ),
    of_locks(
        "lock: revoked",
        {"A": holding(), "B": holding(), "revoker": revoking},
        invariant=at_most(1),
        preemptions=2,
        kinds=("lose", "die"),
    ),
    of_locks(
        "lock: freed by force",
        {"A": holding(extends=True), "B": holding(), "freer": freeing},
        invariant=newest_holds,
        preemptions=2,
    ),
    of_locks(
        "fair lock",
        {name: holding(fair=True) for name in "ABC"},
        preemptions=1,
        jumps=(LATER,),
    ),
    of_locks(
        "fair lock: the server's clock jumps",
        {"A": holding(fair=True, extends=True), "B": holding(fair=True)},
        invariant=None,
        kinds=("lose",),
        server_jumps=(LATER, BACK),
        faults=2,
        preemptions=2,
    ),
    of_locks(
        "several locks",
        {"A": holding_both("ab"), "B": holding_both("ba"), "C": holding()},
        invariant=one_of_each,
        kinds=("die", "cancel"),
        preemptions=1,
        jumps=(LATER,),
    ),
    of_locks(
        "semaphore",
        {name: of_semaphore(2) for name in "ABC"},
        invariant=at_most(2),
        preemptions=1,
        jumps=(LATER,),
    ),
    of_locks(
        "semaphore: the server's clock jumps",
        {name: of_semaphore(2) for name in "ABC"},
        invariant=None,
        kinds=("die",),
        server_jumps=(LATER, BACK),
        preemptions=1,
    ),
    of_locks(
        "semaphore: lowered",
        {"A": of_semaphore(2), "B": of_semaphore(2), "lowers": of_semaphore(1, resize=True)},
        invariant=one_beside_the_lowered,
        preemptions=2,
    ),
    of_locks(
        "semaphore: raised",
        {"A": of_semaphore(1), "B": of_semaphore(1), "raises": of_semaphore(2, resize=True)},
        invariant=one_of_the_old,
        preemptions=2,
    ),
)
