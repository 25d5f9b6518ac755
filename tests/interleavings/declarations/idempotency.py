"""Idempotency keys: one key's row, and attempts that are cut short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psycopg

import pgkv
from pgkv._background.renewal import clock
from pgkv._ops.op import Op
from pgkv.patterns._runtime.lease import LOCKED
from pgkv.patterns.idempotency.flows import IdempotencyFlows, claim_inside
from pgkv.patterns.idempotency.sql import Answer
from tests.interleavings.pairs import Operation, Subject
from tests.interleavings.scenarios import at_most, failed_by_itself, truncate
from tests.interleavings.schedule import Scenario, World

STATEMENTS = ("pgkv.patterns.idempotency.sql",)
READS = frozenset(["get"])
TABLE = "kv_store_idempotency"
KEY, TOKEN = b"\x1fk", 100
TTL, LEASE, PATIENCE = 3600.0, 30.0, 60.0
BUSY = "busy"  # ask again


class Bound(NamedTuple):
    """A subject, and what performs its operations."""

    subject: Any
    store: Any


def said(answer: Any) -> Any:
    """What of an answer can be compared: no times, no new tokens."""
    if isinstance(answer, Answer):
        return answer.status, answer.result
    if isinstance(answer, dict):  # of a renewal
        return [BUSY if code == LOCKED else code for code in answer.values()]
    return answer


def sent(make: Callable[[Any, bytes], Op[Any]], *, answers: bool = True) -> Operation[Bound]:
    """An operation: what is sent is made for the subject at hand."""

    def run(bound: Bound, side: str) -> Any:
        answer = said(bound.store._channel.execute(make(bound.subject.sql, side.encode())))
        return answer if answers else None

    return run


def claimed(fingerprint: bytes) -> Operation[Bound]:
    """The claim inside a transaction, which takes up to three statements."""

    def run(bound: Bound, _side: str) -> Any:
        until = clock() + PATIENCE
        flow = claim_inside(bound.subject.sql, KEY, fingerprint, TTL, until)
        return said(bound.store._channel.run(flow))

    return run


class Keys(Subject[Bound]):
    """A key that is new, worked on, abandoned, done, or whose time has passed."""

    states = ("absent", "running", "abandoned", "done", "expired", "released")
    repeatable = frozenset(("claim inside", "claim inside, other payload", "complete inside"))
    operations: Mapping[str, Operation[Bound]] = {
        "claim": sent(lambda s, _: s.claim(KEY, b"f", TTL, PATIENCE, LEASE)),
        "claim, other payload": sent(lambda s, _: s.claim(KEY, b"g", TTL, PATIENCE, LEASE)),
        "claim inside": claimed(b"f"),
        "claim inside, other payload": claimed(b"g"),
        "complete": sent(lambda s, x: s.complete(KEY, TOKEN, x, TTL, inside=False)),
        "complete inside": sent(lambda s, x: s.complete(KEY, TOKEN, x, TTL, inside=True)),
        "release": sent(lambda s, _: s.release(KEY, TOKEN)),
        "renew": sent(lambda s, _: s.renew([(KEY, TOKEN, LEASE)])),
        "forget": sent(lambda s, _: s.forget(KEY)),
        "sweep": sent(lambda s, _: s.sweep(0), answers=False),
    }

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.flows = IdempotencyFlows(self.store._config, b"", TTL, LEASE)
        self.store._run(self.flows.create_table())
        self.sql = self.flows.sql

    def on(self, conn: psycopg.Connection | None) -> Bound:
        return Bound(self, self.store if conn is None else self.store.using(conn))

    def asks_again(self, answer: Any) -> bool:
        # A claim never waits for a row in flight, and a release passes it over.
        return answer in ([BUSY], (BUSY, b""), False)

    def plain(self, answer: Any) -> Any:
        return answer

    def reset(self, state: str) -> None:
        self.conn.execute(f"DELETE FROM {TABLE}".encode())
        if state == "absent":
            return
        leased, expires = {
            "running": ("now() + interval '1 minute'", "now() + interval '1 hour'"),
            "expired": ("'epoch'", "now() - interval '1 s'"),
            "released": ("'epoch'", "'epoch'"),
        }.get(state, ("now() - interval '1 s'", "now() + interval '1 hour'"))
        result = b"r" if state in ("done", "expired") else None
        self.conn.execute(
            f"INSERT INTO {TABLE} VALUES ('\x1fk', 'f', {TOKEN}, {leased}, {expires}, now(), %s)".encode(),
            [result],
        )

    def observe(self) -> Any:
        return self.conn.execute(
            f"SELECT fingerprint, token = {TOKEN}, result, leased_until > now() FROM {TABLE}"
            " WHERE expires_at > now()".encode()
        ).fetchall()


# -- schedules


def attempting(*, wait: float = 0) -> Callable[[World], Any]:
    """Do the work of the key by a lease, unless it is done or another attempt has it."""

    async def client(world: World) -> None:
        keys = world.make("Idempotency", ttl=1000, lease=10)
        name = world.client()
        with contextlib.suppress(pgkv.InProgressError, pgkv.LeaseLostError):
            async with keys.once("k", wait=wait) as attempt:
                if attempt.is_replay:
                    assert attempt.result == b"r"
                    return
                world.held[name] = attempt
                try:
                    await world.step("works")
                    await attempt.complete(b"r")
                    world.memory["completed"] = world.memory.get("completed", 0) + 1
                finally:
                    del world.held[name]

    return client


async def forgetting(world: World) -> None:
    """Make the key new, whatever its state."""
    world.memory["forgotten"] = True
    await world.make("Idempotency").forget("k")


def one_completes(world: World, results: dict[str, Any]) -> None:
    """No two attempts complete; what one completed is there, unless it was forgotten afterwards."""
    assert not failed_by_itself(results), results
    completed = world.memory.get("completed", 0)
    forgotten = "forgotten" in world.memory
    assert completed <= 1 + forgotten, completed
    found = pgkv.Idempotency(world.sync).get("k")
    if completed and not forgotten:
        assert found is not None
        assert found.result == b"r"


def of_key(name: str, clients: dict[str, Any], **options: Any) -> Scenario:
    def prepare(world: World) -> None:
        pgkv.Idempotency(world.sync).create_table()
        truncate(world, "_idempotency")

    settings = {"check": one_completes, "prepare": prepare, "invariant": at_most(1), **options}
    return Scenario(name, clients, **settings)


SUBJECTS = (Keys,)
SCENARIOS = (
    of_key(
        "idempotency: three attempts, two wait",
        {"first": attempting(), "second": attempting(wait=30), "third": attempting(wait=30)},
        jumps=(11.0,),
        preemptions=2,
    ),
    of_key(
        "idempotency: two attempts, one forgets",
        {"first": attempting(), "second": attempting(wait=30), "forgets": forgetting},
        preemptions=2,
        invariant=None,
    ),
    of_key(
        "idempotency: the server's clock jumps",
        {"first": attempting(), "second": attempting(wait=30)},
        invariant=None,
        kinds=("lose",),
        server_jumps=(11.0, -100.0),
        faults=2,
        preemptions=2,
    ),
)
