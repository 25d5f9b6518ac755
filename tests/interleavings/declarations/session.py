"""Sessions: rows, and the stubs that rotations leave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg

import pgkv
from pgkv import Session, SessionStore
from pgkv._ops.codec import encode_interval
from pgkv._ops.op import Op
from pgkv.patterns.session.data import id_of
from pgkv.patterns.session.flows import session_from
from pgkv.patterns.session.sql import LOOK_AGAIN
from tests.interleavings import pairs
from tests.interleavings.pairs import Subject
from tests.interleavings.scenarios import failed_by_itself, truncate
from tests.interleavings.schedule import Scenario, World

STATEMENTS = ("pgkv.patterns.session.sql",)
READS = frozenset(("exists", "look", "look_timed"))
TABLE = "kv_store_sessions"
_issued = threading.local()


def token(name: str) -> str:
    """A token that says what it is for."""
    return name.ljust(43, "-")


OLD, MID, NOW, OTHER, EXPIRED = map(token, ("old", "mid", "now", "other", "expired"))

Operation = Callable[[SessionStore, Any], Any]


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


def looked(sessions: SessionStore, name: str) -> Any:
    """What a load sends first, where uses are noted once an hour."""
    params = id_of(name), encode_interval(3600.0)
    found: Any = sessions._store._execute(Op(sessions._flows.sql._look[False], params))
    if found is None or found is LOOK_AGAIN:
        return found is None
    return shape(session_from(name, found))


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
    "look": lambda s, p: looked(s, NOW),
    "look stub": lambda s, p: looked(s, MID),
    "exists": lambda s, p: s.exists(NOW),
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


class Bound(NamedTuple):
    """A subject, and the sessions as they are on a connection."""

    subject: Any
    sessions: SessionStore


def of_party(operation: Operation) -> pairs.Operation[Bound]:
    def run(bound: Bound, side: str) -> Any:
        _issued.token = token(side)
        return shape(operation(bound.sessions, bound.subject.party(side)))

    return run


class Sessions(Subject[Bound]):
    """Sessions of two users: one that was rotated twice, another, and one whose time has passed.

    Attributes:
        current, stale: the first one, as it loads by its newest and by its previous token.
    """

    states = ("rotated",)
    operations = {name: of_party(each) for name, each in OPERATIONS.items()}  # noqa: RUF012  # as declared

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.patch.setattr("pgkv.patterns.session.flows.new_token", lambda: _issued.token)
        # Every load notes the use.
        self.sessions = sessions = SessionStore(self.store, touch_interval=0)
        sessions.create_table()
        for name in (EXPIRED, OLD, OTHER):
            _issued.token = name
            made = sessions.create({"a": 1, "b": 1}, user_id="u")
            if name == OLD:
                for _issued.token in (MID, NOW):
                    sessions.rotate(made, grace=3600)
        run = self.conn.execute
        run(f"UPDATE {TABLE} SET expires_at = now() WHERE id = %s".encode(), [id_of(EXPIRED)])
        run(f"CREATE TABLE template AS TABLE {TABLE}".encode())

    def reset(self, state: str) -> None:
        self.conn.execute(f"DELETE FROM {TABLE}".encode())
        self.conn.execute(f"INSERT INTO {TABLE} TABLE template".encode())
        current, stale = self.sessions.load(NOW), self.sessions.load(MID)
        assert current is not None
        assert stale is not None
        self.current, self.stale = current, stale

    def party(self, side: str) -> Party:
        """The loaded sessions, for one of the two operations."""
        return Party(side, again(self.current), again(self.stale))

    def on(self, conn: psycopg.Connection | None) -> Bound:
        return Bound(self, self.sessions if conn is None else self.sessions.using(conn))

    def observe(self) -> Any:
        # What each token loads, and each user's list.
        tokens = [OLD, MID, NOW, OTHER, EXPIRED, *(token(a + b) for a in "ab" for b in ("", "2"))]
        loaded = {name.strip("-"): shape(self.sessions.load(name)) for name in tokens}
        return loaded, {user: shape(self.sessions.list_user(user)) for user in ("u", "v")}


# -- schedules


IDLE = 100.0


async def a_session(world: World) -> Any:
    sessions = world.make("SessionStore", idle_timeout=IDLE, touch_interval=0)
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


async def destroying(world: World) -> bool | None:
    sessions, session = await a_session(world)
    if session is None:
        return None
    return bool(await sessions.destroy(session))


async def ending_all(world: World) -> bool:
    """End every session of the user."""
    await world.make("SessionStore").destroy_user("u")
    return True


async def touching(world: World) -> None:
    """Use the session, again and again: where it has ended, it stays ended."""
    sessions = world.make("SessionStore", idle_timeout=IDLE, touch_interval=0)
    for _ in range(3):
        ended = world.memory.get("ended")
        session = await sessions.load(world.memory["token"])
        assert session is None or not ended, "a session came back"
        world.memory["ended"] = ended or session is None


def logged_out(world: World, results: dict[str, Any]) -> None:
    assert not failed_by_itself(results), results
    sessions = pgkv.SessionStore(world.sync, idle_timeout=IDLE)
    if isinstance(results.get("destroyer"), bool):
        alive = [token for token in world.memory["tokens"] if sessions.load(token) is not None]
        assert not alive, "alive after the logout was answered"
    world.pass_time(IDLE + 1)
    assert not sessions.list_user("u"), "a session outlives its idle timeout"


def log_in(world: World) -> None:
    truncate(world, "_sessions")
    sessions = pgkv.SessionStore(world.sync, idle_timeout=IDLE)
    world.memory["token"] = sessions.create({"n": 0}, user_id="u").id
    world.memory["tokens"] = [world.memory["token"]]


def of_sessions(name: str, clients: dict[str, Any], **options: Any) -> Scenario:
    return Scenario(name, clients, **{"check": logged_out, "prepare": log_in, **options})


SUBJECTS = (Sessions,)
SCENARIOS = (
    of_sessions(
        "session: save, rotate, destroy",
        {"saver": saving, "rotator": rotating, "destroyer": destroying},
    ),
    of_sessions(
        "session: save, rotate, end all of the user",
        {"saver": saving, "rotator": rotating, "destroyer": ending_all},
    ),
    of_sessions(
        "session: touch, save, destroy",
        {"toucher": touching, "saver": saving, "destroyer": destroying},
        preemptions=2,
        jumps=(IDLE + 1,),
    ),
    of_sessions(
        "session: the server's clock jumps",
        {"saver": saving, "rotator": rotating, "destroyer": destroying},
        kinds=(),
        server_jumps=(IDLE + 1, -IDLE),
        faults=2,
        preemptions=2,
    ),
)
