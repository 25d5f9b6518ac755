"""Every two statements about one lock, and about one semaphore, overlapping: see `pairs`.

A grant that meets a row in flight is denied and asks again, a renewal is sent again, a revocation
gives up for the moment: such an answer is asked for again when the other statement has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import psycopg
import pytest

from pgkv import PgkvError, Store
from pgkv._ops.op import Op
from pgkv.patterns._runtime.lease import LOCKED
from pgkv.patterns.lock.api import statements_of
from pgkv.patterns.lock.sql import (
    Asking,
    Denied,
    Granted,
    LockStatements,
    SemaphoreStatements,
    size_key,
    slot_keys,
)
from tests.interleavings.pairs import Operation, Pairs

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


class LockSubject:
    """One lock, or one semaphore, in a table of its own.

    Attributes:
        sql: the statements.
        keys: the lock's row, or the rows of the semaphore's slots.
    """

    transactions: Mapping[str, tuple[str, ...]] = {}
    on_existing: Mapping[tuple[str, str], str] = {}
    operations: Mapping[str, Operation[Any]]
    states: tuple[str, ...]
    keys: tuple[bytes, ...]

    def __init__(self, dsn: str, kind: type[LockStatements]) -> None:
        self.store = Store.connect(dsn, pool_max_size=1)
        self.sql: Any = statements_of(self.store, kind, durable=True)
        self.watcher = psycopg.connect(dsn, autocommit=True)
        creating: list[Op[Any]] = [self.sql.holder(b"n"), self.sql.queue()]
        for op in creating:
            self.store._execute(op)
        self._pid: int = self.store._execute(_backend())

    def close(self) -> None:
        self.watcher.close()
        self.store.close()

    def using(self, conn: psycopg.Connection) -> Any:
        return self.store.using(conn)

    def alone(self) -> Any:
        return self.store

    def alone_pid(self) -> int:
        return self._pid

    def reset(self, state: str) -> None:
        for table in (self.sql.t, self.sql.q):
            self.watcher.execute(f"TRUNCATE {table}".encode())
        for key, holder, expires in self.rows(state):
            self.watcher.execute(
                f"INSERT INTO {self.sql.t} (key, value, expires_at, created_at, updated_at, version)"
                f" VALUES (%s, %s, {expires}, now(), now(), {TOKEN})".encode(),
                [key.decode(), holder],
            )

    def rows(self, state: str) -> list[tuple[bytes, bytes, str]]:
        raise NotImplementedError

    def late(self, name: str) -> Op[Any]:
        """A copy of a grant's statement that the server gets to last."""
        raise NotImplementedError

    def observe(self) -> Any:
        """Who holds what by which token, who queues, and what late copies of both grants get."""
        live = self.watcher.execute(
            f"SELECT key, convert_from(value, 'UTF8'), version = {TOKEN} FROM {self.sql.t}"
            " WHERE expires_at > clock_timestamp() ORDER BY key".encode()
        ).fetchall()
        # A ticket drawn while its asking was taken back ends by itself.
        queue = self.watcher.execute(
            f"SELECT key FROM {self.sql.q} WHERE expires_at > clock_timestamp() AND NOT EXISTS"
            f" (SELECT 1 FROM {self.sql.t} l WHERE l.key = substr({self.sql.q}.key, 2))"
            " ORDER BY key".encode()
        ).fetchall()
        late = {}
        for name in "ab":
            with self.watcher.transaction(force_rollback=True):
                late[name] = perform(self.store.using(self.watcher), self.late(name))
        return live, queue, late


def _backend() -> Op[int]:
    from pgkv._ops.op import Statement
    from pgkv._sql.table import read_int

    return Op(Statement("pid", "SELECT pg_backend_pid()::bigint", (), read_int, writes=False))


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


def sent(make: Callable[[Any], Any], *, answers: bool = True) -> Operation[Any]:
    """An operation: what is sent is made for the subject at hand."""

    def run(store: Any, side: str) -> Any:
        ops = make(_at_hand[0])
        answer = perform(store, *(ops if isinstance(ops, list) else [ops]))
        return answer if answers else None

    return run


_at_hand: list[Any] = []


class NamedLock(LockSubject):
    """A lock: without a row, free, held, expired, ended by force, and held by one who asks again."""

    keys = (b"n",)
    states = ("absent", "free", "held", "expired", "held by a", "a ended")

    def rows(self, state: str) -> list[tuple[bytes, bytes, str]]:
        soon, past, never = "now() + interval '1 minute'", "now() - interval '1 s'", "'epoch'"
        holder, expires = {
            "free": (b"x", never), "held": (b"x", soon), "expired": (b"x", past),
            "held by a": (b"a", soon), "a ended": (b"a", never),
        }.get(state, (b"", ""))  # fmt: skip
        return [(b"n", holder, expires)] if expires else []

    def late(self, name: str) -> Op[Any]:
        return self.sql.grant(b"n", ASKINGS[name], TTL, PATIENCE)  # type: ignore[no-any-return]  # an Op

    def fair(self, name: str) -> Op[Any]:
        return self.sql.grant_fair(b"n", ASKINGS[name], TTL, PATIENCE, TICKET_TTL)  # type: ignore[no-any-return]  # as above

    operations = MappingProxyType(
        {
            "grant a": sent(lambda s: s.late("a")),
            "grant b": sent(lambda s: s.late("b")),
            "grant fair a": sent(lambda s: s.fair("a")),
            "grant fair b": sent(lambda s: s.fair("b")),
            "take back a": sent(lambda s: s.sql.take_back(s.keys, ASKINGS["a"]), answers=False),
            "leave": sent(lambda s: s.sql.leave(b"n", ASKINGS["a"]), answers=False),
            "leave in doubt": sent(
                lambda s: s.sql.leave_in_doubt(b"n", ASKINGS["a"]), answers=False
            ),
            "renew": sent(lambda s: s.sql.renew([(b"n", TOKEN, TTL)])),
            "release": sent(lambda s: s.sql.release(b"n", TOKEN, False)),
            "release and notify": sent(lambda s: s.sql.release(b"n", TOKEN, True)),
            "revoke": sent(lambda s: s.sql.revoke(b"n", TOKEN)),
            "guard": sent(lambda s: s.sql.guard(s.sql.t, b"n", TOKEN, None)),
            "holder": sent(lambda s: [s.sql.holder(b"n")], answers=False),
            "clean": sent(lambda s: s.sql.clean(0), answers=False),
            "clean tickets": sent(lambda s: s.sql.clean_tickets(0), answers=False),
        }
    )


class Slots(LockSubject):
    """A semaphore of two slots: free, with one and two leases, with one beyond them, and without a
    number."""

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

    def late(self, name: str) -> Op[Any]:
        return self.sql.grant_slot(self.keys, ASKINGS[name], TTL, PATIENCE)  # type: ignore[no-any-return]  # as above

    def observe(self) -> Any:
        live, _, late = super().observe()
        # Which free slot is taken does not matter, how many are does, and the number.
        return sorted((who, old) for _, who, old in live), late

    operations = MappingProxyType(
        {
            "grant a": sent(lambda s: s.late("a")),
            "grant b": sent(lambda s: s.late("b")),
            "take back a": sent(lambda s: s.sql.take_back(s.keys, ASKINGS["a"]), answers=False),
            "define": sent(lambda s: s.sql.define(s.keys, resize=False)),
            "lower": sent(lambda s: s.sql.define(s.keys[:1], resize=True)),
            "raise": sent(lambda s: s.sql.define(slot_keys(b"n", 3), resize=True)),
            "release": sent(lambda s: s.sql.release(s.keys[0], TOKEN, False)),
            "renew": sent(lambda s: s.sql.renew([(s.keys[0], TOKEN, TTL)])),
            "revoke": sent(lambda s: s.sql.revoke(s.keys[0], TOKEN)),
            "clean": sent(lambda s: s.sql.clean(0), answers=False),
        }
    )


class LockPairs(Pairs[Any]):
    """An answer that says "ask again" is asked for again when A has ended."""

    def serial(self, state: str, *order: tuple[str, str]) -> Any:
        answers, after = super().serial(state, *order)
        return plain(answers), after

    def overlapping(self, state: str, a: str, b: str, end: str) -> Any:
        (answers, after), waited = super().overlapping(state, a, b, end)
        if answers["b"] in (BUSY, [BUSY], "denied"):
            answers["b"] = self._perform(self._subject.alone(), "b", b)
            after = self._subject.observe()
        return (plain(answers), after), waited


def plain(answers: dict[str, Any]) -> dict[str, Any]:
    return {side: "denied" if answer == BUSY else answer for side, answer in answers.items()}


@pytest.fixture(params=[NamedLock, Slots], ids=["lock", "semaphore"])
def subject(dsn: str, request: pytest.FixtureRequest) -> Iterator[LockSubject]:
    kind = SemaphoreStatements if request.param is Slots else LockStatements
    made: LockSubject = request.param(dsn, kind)
    _at_hand[:] = [made]
    yield made
    made.close()


@pytest.fixture
def pairs(subject: LockSubject, dsn: str) -> Iterator[LockPairs]:
    made = LockPairs(subject, dsn)
    yield made
    made.close()


@pytest.mark.parametrize("part", range(4))
def test_pairs(pairs: LockPairs, subject: LockSubject, part: int) -> None:
    """A open while B runs, for all A and B, from every state: as one after the other."""
    wrong = [
        each
        for a, b in itertools.product(list(subject.operations)[part::4], subject.operations)
        # Two sendings of one grant may take two slots: who sent it again gives the other one back.
        if not (isinstance(subject, Slots) and a == b and "grant" in a)
        for each in pairs.wrong(a, b)
    ]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


def test_every_statement_has_its_part(subject: LockSubject) -> None:
    """The operations above send every statement that changes or locks a row."""
    for name in subject.operations:
        subject.reset(subject.states[1])
        subject.operations[name](subject.store, "a")
    kinds = (SemaphoreStatements,) if isinstance(subject, Slots) else (LockStatements,)
    made = {
        name
        for kind in kinds
        for name, each in vars(kind).items()
        if isinstance(each, cached_property)
    }
    assert made - set(vars(subject.sql)) <= {"_holder"}
