"""Every two operations on sessions, overlapping: A is open in a transaction, B answers or waits on
another connection, then A ends. Answers and state must be those of A then B or of B then A; after a
rollback of A, those of B alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

from pgkv import PgkvError, Session, SessionStore, Store, TtlCleanupStrategy
from pgkv.patterns.session.data import id_of
from pgkv.patterns.session.sql import SessionStatements
from tests import servers

TABLE = "kv_store_sessions"
REFUSED = "refused"  # by the isolation level; the caller repeats its transaction
_issued = threading.local()


def token(name: str) -> str:
    """A token that says what it is for."""
    return name.ljust(43, "-")


OLD, MID, NOW, OTHER, EXPIRED = map(token, ("old", "mid", "now", "other", "expired"))

Operation = Callable[[SessionStore, Any], Any]


class World:
    """Sessions of two users: one that was rotated twice, another, and one whose time has passed.

    Attributes:
        current, stale: the first one, as it loads by its newest and by its previous token.
    """

    def __init__(self, dsn: str) -> None:
        self.store = Store.connect(
            dsn, ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL, pool_max_size=2
        )
        # Every load notes the use.
        self.sessions = SessionStore(self.store, touch_interval=0)
        self.sessions.create_table()
        self.watcher = psycopg.connect(dsn, autocommit=True)
        self.conns = [psycopg.connect(dsn), psycopg.connect(dsn)]
        self._make_template()
        self.thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        self.thread.shutdown()
        for conn in (self.watcher, *self.conns):
            conn.close()
        self.store.close()

    def _make_template(self) -> None:
        sessions = self.sessions
        for name in (EXPIRED, OLD, OTHER):
            _issued.token = name
            made = sessions.create({"a": 1, "b": 1}, user_id="u")
            if name == OLD:
                for _issued.token in (MID, NOW):
                    sessions.rotate(made, grace=3600)
        run = self.watcher.execute
        run(f"UPDATE {TABLE} SET expires_at = now() WHERE id = %s".encode(), [id_of(EXPIRED)])
        run(f"CREATE TABLE template AS TABLE {TABLE}".encode())

    def reset(self) -> None:
        """Begin again."""
        run = self.watcher.execute
        run(f"DELETE FROM {TABLE}".encode())
        run(f"INSERT INTO {TABLE} TABLE template".encode())
        current, stale = self.sessions.load(NOW), self.sessions.load(MID)
        assert current is not None
        assert stale is not None
        self.current, self.stale = current, stale

    def copy_for(self, side: str) -> Any:
        """The loaded sessions, for one of the two operations."""
        return Party(side, again(self.current), again(self.stale))

    def state(self) -> Any:
        """What anybody can observe: what each token loads, and each user's list."""
        tokens = [OLD, MID, NOW, OTHER, EXPIRED, *(token(a + b) for a in "ab" for b in ("", "2"))]
        loaded = {name.strip("-"): shape(self.sessions.load(name)) for name in tokens}
        return loaded, {user: shape(self.sessions.list_user(user)) for user in ("u", "v")}

    def is_waiting(self, conn: psycopg.Connection) -> bool:
        query = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        row = self.watcher.execute(query, [conn.info.backend_pid]).fetchone()
        return bool(row and row[0])


class Party:
    """What one of the two operations works with, and the token that it will give out."""

    def __init__(self, side: str, current: Session, stale: Session) -> None:
        self.side, self.current, self.stale = side, current, stale

    def changed(self, **data: Any) -> Session:
        self.current.data.update(data)
        return self.current


def again(session: Session) -> Session:
    """A copy, as another request has it."""
    copy = Session(dict(session.data), id=session.id, user_id=session.user_id)
    for name in ("_before", "_version", "_moved", "is_new", "created_at", "expires_at"):
        setattr(copy, name, getattr(session, name))
    return copy


def shape(answer: Any) -> Any:
    """What of an answer can be compared: no times."""
    if isinstance(answer, Session):
        return answer.user_id, sorted(answer.data.items()), answer._moved
    if isinstance(answer, list):
        return sorted(info.handle for info in answer)
    return answer


def perform(operation: Operation, sessions: SessionStore, party: Party) -> Any:
    _issued.token = token(party.side)
    try:
        return shape(operation(sessions, party))
    except PgkvError as error:
        if error._sqlstate == "40001":
            return REFUSED
        return type(error).__name__, getattr(error, "reason", "")


def upkeep(operation: Operation) -> Operation:
    """An operation that passes over what others hold: how much it did says nothing."""

    def run(sessions: SessionStore, party: Party) -> None:
        operation(sessions, party)

    return run


OPERATIONS: dict[str, Operation] = {
    "create": lambda s, p: s.create({"c": 1}, user_id="u").user_id,
    "load": lambda s, p: s.load(NOW),
    "load timed": lambda s, p: s._run(s._flows.load(NOW, timed=True)),
    "load stub": lambda s, p: s.load(MID),
    "merge": lambda s, p: s.save(p.changed(**{p.side: 1})),
    "merge same key": lambda s, p: s.save(p.changed(a=p.side)),
    "save or fail": lambda s, p: s.save(p.changed(a=p.side), on_conflict="error"),
    "overwrite": lambda s, p: s.save(p.changed(a=p.side), on_conflict="last_wins"),
    "rotate": lambda s, p: s.rotate(p.changed(**{p.side: 1})),
    "rotate at once": lambda s, p: s.rotate(p.current, grace=0),
    "change user": lambda s, p: s.rotate(p.current, user_id="v"),
    "rotate stub": lambda s, p: s.rotate(p.stale),
    "destroy": lambda s, p: s.destroy(NOW),
    "destroy by stub": lambda s, p: s.destroy(MID),
    "destroy by older stub": lambda s, p: s.destroy(OLD),
    "destroy user": lambda s, p: s.destroy_user("u"),
    "destroy others": lambda s, p: s.destroy_user("u", keep=p.current),
    "destroy others by stub": lambda s, p: s.destroy_user("u", keep=p.stale),
    "destroy handle": lambda s, p: s.destroy_handle(p.current.handle, "u"),
    "destroy handle of stub": lambda s, p: s.destroy_handle(p.stale.handle, "u"),
    "list": lambda s, p: s.list_user("u"),
    "purge": upkeep(lambda s, p: s.purge()),
    "collect": upkeep(
        lambda s, p: s._store._execute(s._flows.sql.collect([id_of(EXPIRED), id_of(NOW)]))
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgkv.patterns.session.flows.new_token", lambda: _issued.token)
        yield


@pytest.fixture
def world(dsn: str) -> Iterator[World]:
    found = World(dsn)
    yield found
    found.close()


def serial(world: World, order: list[tuple[str, str]]) -> Any:
    """Answers by side, and the state, of operations one after the other."""
    world.reset()
    parties = {side: world.copy_for(side) for side, _ in order}
    answers = {
        side: perform(OPERATIONS[name], world.sessions, parties[side]) for side, name in order
    }
    return answers, world.state()


def overlapping(world: World, a: str, b: str, level: IsolationLevel, end: str) -> Any:
    """Answers by side and the state, and whether B had to wait."""
    world.reset()
    parties = {side: world.copy_for(side) for side in "ab"}
    first, second = world.conns
    for conn in world.conns:
        conn.isolation_level = level
        conn.execute("SELECT 1 FROM template LIMIT 1")  # its snapshot, where it keeps one
    answers = {"a": perform(OPERATIONS[a], world.sessions.using(first), parties["a"])}

    def run() -> Any:
        answer = perform(OPERATIONS[b], world.sessions.using(second), parties["b"])
        second.rollback() if answer == REFUSED else second.commit()
        return answer

    future: Future[Any] = world.thread.submit(run)
    servers.wait_until(lambda: future.done() or world.is_waiting(second), "b answers or waits")
    waited = not future.done()
    getattr(first, end)()
    answers["b"] = future.result(30)
    return (answers, world.state()), waited


@pytest.mark.parametrize("a", OPERATIONS)
def test_pairs(world: World, a: str) -> None:
    """A open while B runs, for every B: committed at both isolation levels; where B had to wait, also
    rolled back."""
    wrong: list[Any] = []
    a_alone = alone(serial(world, [("a", a)]), "a")
    for b in OPERATIONS:
        orders = [serial(world, [("a", a), ("b", b)]), serial(world, [("b", b), ("a", a)])]
        found, waited = overlapping(world, a, b, IsolationLevel.READ_COMMITTED, "commit")
        if found not in orders:
            wrong.append((a, b, found))
        found, _ = overlapping(world, a, b, IsolationLevel.REPEATABLE_READ, "commit")
        if found not in orders and (found[0]["b"] != REFUSED or alone(found, "a") != a_alone):
            wrong.append((a, b, "REPEATABLE READ", found))
        if waited:
            found, _ = overlapping(world, a, b, IsolationLevel.READ_COMMITTED, "rollback")
            if alone(found, "b") != alone(serial(world, [("b", b)]), "b"):
                wrong.append((a, b, "rolled back", found))
    assert wrong == []


def alone(outcome: Any, side: str) -> Any:
    answers, state = outcome
    return answers[side], state


def test_every_statement_has_its_part(world: World) -> None:
    """The operations above send every statement that pgkv has for sessions."""
    for name in OPERATIONS:
        serial(world, [("a", name)])
    statements = {
        name for name, each in vars(SessionStatements).items() if isinstance(each, cached_property)
    }
    assert statements - set(vars(world.sessions._flows.sql)) == set()
