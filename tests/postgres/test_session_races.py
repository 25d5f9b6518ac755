"""Sessions under concurrency: arranged interleavings, then storms with an exact outcome."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from pgkv import SessionGoneError, SessionStore, Store
from pgkv.patterns.session.data import id_of
from pgkv.testing import ServerClock
from tests import FULL
from tests.faults.support import newest
from tests.peers import Peer, gather, until

Make = Callable[..., Coroutine[Any, Any, Any]]
TABLE = "kv_store_sessions"
MODES = ("merge", "error", "last_wins")

PROCESSES, ROUNDS = 8, 25 if FULL else 15
# One worker: changes a key of its own and one that all share, and counts by optimistic saves.
WORKER = """
import sys
import pgkv
dsn, token, me, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
with pgkv.Store.connect(dsn) as store:
    sessions = pgkv.SessionStore(store)
    for n in range(rounds):
        session = sessions.load(token)
        session.data[me] = n
        session.data["shared"] = me
        session.data.pop("drop " + me, None)
        sessions.save(session)
        while True:
            session = sessions.load(token)
            session.data["count"] += 1
            try:
                sessions.save(session, on_conflict="error")
                break
            except pgkv.SessionConflictError:
                pass
"""


@newest
def test_parallel_requests_of_eight_processes(dsn: str) -> None:
    """Eight processes that change the session at the same time lose no key and no count."""
    drops = {f"drop p{n}": 1 for n in range(PROCESSES)}
    with Store.connect(dsn) as store:
        made = SessionStore(store).create({"count": 0, "untouched": 1, **drops})
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, dsn, made.id, f"p{n}", str(ROUNDS)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(PROCESSES)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    with Store.connect(dsn) as store:
        loaded = SessionStore(store).load(made.id)
    assert loaded is not None
    data = loaded.data
    assert data.pop("shared") in {f"p{n}" for n in range(PROCESSES)}
    assert data == {
        "count": PROCESSES * ROUNDS,
        "untouched": 1,
        **{f"p{n}": ROUNDS - 1 for n in range(PROCESSES)},
    }


async def interleaved(
    peer: Peer, witness: Peer, change: str, call: Callable[[], Awaitable[Any]]
) -> Any:
    """Begin `call` while another transaction has made a change that it then commits."""
    with peer.conn.transaction():
        peer.run(change)
        racing = asyncio.ensure_future(gather(call()))
        await witness.until_waiting()
    (outcome,) = await racing
    return outcome


@pytest.mark.parametrize("mode", MODES)
async def test_a_save_that_waited_for_a_logout(
    sessions: Any, peer: Peer, witness: Peer, mode: str
) -> None:
    """A save that had begun when the logout committed finds the session gone, in every mode."""
    made = await sessions.create({"a": 1})
    late = await sessions.load(made.id)
    late.data["a"] = 2
    outcome = await interleaved(
        peer, witness, f"DELETE FROM {TABLE}", lambda: sessions.save(late, on_conflict=mode)
    )
    assert isinstance(outcome, SessionGoneError)
    assert outcome.reason == "gone"
    assert await sessions.load(made.id) is None


@pytest.mark.parametrize("mode", MODES)
async def test_a_save_that_waited_for_a_rotation(
    sessions: Any, peer: Peer, witness: Peer, mode: str
) -> None:
    """A save that had begun when the rotation committed says so, and changes neither row."""
    made = await sessions.create({"a": 1})
    late = await sessions.load(made.id)
    late.data["a"] = 2
    # What rotate() does, held open: the row moves, a stub stays.
    new_id = id_of("the next token").hex()
    move = f"UPDATE {TABLE} SET id = decode('{new_id}', 'hex')"
    stub = (
        f"INSERT INTO {TABLE} SELECT decode('{id_of(made.id).hex()}', 'hex'), user_id, data,"
        f" version, created_at, seen_at, expires_at, ends_at, id, meta FROM {TABLE}"
    )
    outcome = await interleaved(
        peer, witness, f"{move}; {stub}", lambda: sessions.save(late, on_conflict=mode)
    )
    assert isinstance(outcome, SessionGoneError)
    assert outcome.reason == "rotated"
    assert [row[0] for row in peer.run(f"SELECT data->>'a' FROM {TABLE}")] == ["1", "1"]


async def test_a_save_that_waited_for_another(sessions: Any, peer: Peer, witness: Peer) -> None:
    """A merge that waited for another's merge keeps both changes, and knows that it missed one."""
    made = await sessions.create({"a": 1})
    made.data["b"] = 2
    other = f"""UPDATE {TABLE} SET data = data || '{{"c": "3"}}', version = version + 1"""
    assert await interleaved(peer, witness, other, lambda: sessions.save(made)) is None
    assert (await sessions.load(made.id)).data == {"a": 1, "b": 2, "c": 3}
    assert made._version == -1


async def test_a_rotation_that_waited_for_destroy_user(
    sessions: Any, peer: Peer, witness: Peer
) -> None:
    """A session that is being rotated does not escape a destroy_user of the same moment."""
    made = await sessions.create(user_id="u")
    delete = f"DELETE FROM {TABLE} WHERE user_id = 'u'"
    outcome = await interleaved(peer, witness, delete, lambda: sessions.rotate(made))
    assert outcome is not None
    assert await sessions.list_user("u") == []


async def test_a_destroy_user_that_waited_for_a_rotation(
    sessions: Any, peer: Peer, witness: Peer
) -> None:
    """The other way round: the row moves first, and is destroyed under its new id."""
    made = await sessions.create(user_id="u")
    move = f"UPDATE {TABLE} SET id = decode('{id_of('next').hex()}', 'hex')"
    assert await interleaved(peer, witness, move, lambda: sessions.destroy_user("u")) == 1
    assert peer.run(f"SELECT 1 FROM {TABLE}") == []
    assert await sessions.load(made.id) is None


@pytest.mark.parametrize("grace", [10, 0])
@pytest.mark.parametrize("by", ["token", "stub", "session", "handle"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "using"])
async def test_a_destroy_that_waited_for_a_rotation(
    sessions: Any, connect: Make, peer: Peer, by: str, grace: float, inside: bool
) -> None:
    """A logout that had begun when a rotation committed ends the session under its new token, also
    by a token that an earlier rotation had replaced, and where the rotation leaves no grace."""
    made = await sessions.create({"a": 1}, user_id="u")
    tokens = [made.id]
    await sessions.rotate(made)
    tokens.append(made.id)
    late = await sessions.load(made.id)
    ends = {
        "token": lambda store: store.destroy(tokens[1]),
        "stub": lambda store: store.destroy(tokens[0]),
        "session": lambda store: store.destroy(late),
        "handle": lambda store: store.destroy_handle(late.handle, "u"),
    }
    rotating, ending = await connect(), await connect()
    await sessions.using(rotating).rotate(made, grace=grace)
    tokens.append(made.id)
    racing = asyncio.ensure_future(ends[by](sessions.using(ending) if inside else sessions))
    await peer.until_waiting()
    await rotating.commit()
    assert await racing is True
    await ending.commit()
    assert [await sessions.load(token) for token in tokens] == [None] * 3
    assert await sessions.list_user("u") == []


async def test_a_destroy_that_waited_for_two_rotations(
    sessions: Any, connect: Make, peer: Peer
) -> None:
    """However many rotations one transaction makes, the logout that waited for it ends the session."""
    made = await sessions.create({"a": 1})
    tokens = [made.id]
    rotating = await connect()
    for grace in (10, 0):
        await sessions.using(rotating).rotate(made, grace=grace)
        tokens.append(made.id)
    racing = asyncio.ensure_future(sessions.destroy(tokens[0]))
    await peer.until_waiting()
    await rotating.commit()
    assert await racing is True
    assert [await sessions.load(token) for token in tokens] == [None] * 3


async def test_a_destroy_that_waited_for_a_rotation_undone(
    sessions: Any, connect: Make, peer: Peer
) -> None:
    """A rotation that is rolled back leaves the session to the logout that waited for it."""
    made = await sessions.create({"a": 1})
    before, rotating = made.id, await connect()
    await sessions.using(rotating).rotate(made)
    racing = asyncio.ensure_future(sessions.destroy(before))
    await peer.until_waiting()
    await rotating.rollback()
    assert await racing is True
    assert [await sessions.load(token) for token in (before, made.id)] == [None, None]


async def test_a_destroy_user_that_waited_for_a_change_of_user(
    sessions: Any, connect: Make, peer: Peer
) -> None:
    """A session that another user takes over while all of the first user's are ended: its old token
    shows nothing of that user any more; the session of the other stays."""
    made = await sessions.create({"a": 1}, user_id="u")
    before, rotating = made.id, await connect()
    await sessions.using(rotating).rotate(made, user_id="v")
    racing = asyncio.ensure_future(sessions.destroy_user("u"))
    await peer.until_waiting()
    await rotating.commit()
    assert await racing == 0
    assert await sessions.load(before) is None
    assert (await sessions.load(made.id)).user_id == "v"


@pytest.mark.parametrize("grace", [10, 0])
async def test_rotations_against_logouts(sessions: Any, grace: float) -> None:
    """A storm: of each session one request rotates while another logs out. Each logout ended one
    session, and no token of any loads."""
    for _ in range(10):
        made = [await sessions.create() for _ in range(16)]
        tokens = [each.id for each in made]
        outcomes = await gather(
            *(
                call
                for each in made
                for call in (sessions.rotate(each, grace=grace), sessions.destroy(each.id))
            )
        )
        assert outcomes[1::2] == [True] * 16
        assert {type(each) for each in outcomes[::2]} <= {type(None), SessionGoneError}
        tokens += [each.id for each in made]
        assert [await sessions.load(token) for token in tokens] == [None] * 32


async def test_rotations_against_destroy_user(sessions: Any) -> None:
    """A storm of both: afterwards none of the user's tokens loads."""
    for _ in range(10):
        made = [await sessions.create(user_id="u") for _ in range(4)]
        tokens = [each.id for each in made]
        await gather(
            *(sessions.rotate(each) for each in made),
            sessions.destroy_user("u"),
            *(sessions.rotate(each) for each in made),
        )
        await sessions.destroy_user("u")
        tokens += [each.id for each in made]
        assert [await sessions.load(token) for token in tokens] == [None] * 8


async def test_a_load_waits_for_nobody(sessions: Any, peer: Peer, clock: ServerClock) -> None:
    """While somebody holds the row, a load that is due to note the use returns, and notes nothing."""
    made = await sessions.create({"a": 1})
    clock.advance(100)
    with peer.conn.transaction():
        peer.run(f"SELECT 1 FROM {TABLE} FOR UPDATE")
        loaded = await asyncio.wait_for(sessions.load(made.id), 30)
        assert loaded.data == {"a": 1}
        assert loaded.expires_at == made.expires_at
    assert (await sessions.load(made.id)).expires_at > made.expires_at


async def test_a_purge_waits_for_nobody(sessions: Any, peer: Peer, clock: ServerClock) -> None:
    """purge() passes over rows that somebody holds."""
    held = await sessions.create({"held": 1})
    await sessions.create()
    clock.advance(1801)
    with peer.conn.transaction():
        key = id_of(held.id).hex()
        peer.run(f"SELECT 1 FROM {TABLE} WHERE id = decode('{key}', 'hex') FOR UPDATE")
        assert await asyncio.wait_for(sessions.purge(), 30) == 1
    assert await sessions.purge() == 1


async def test_most_updates_are_heap_only(sessions: Any, connect: Make, peer: Peer) -> None:
    """Saves touch no index: nearly all of them are HOT."""
    made = await sessions.create({"n": 0})
    conn = await connect(autocommit=True)
    bound = sessions.using(conn)
    for n in range(1, 201):
        made.data["n"] = n
        await bound.save(made)
    await conn.close()
    peer.count_all()
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = %s"
    query += " AND schemaname = current_schema()"
    await until(lambda: peer.run(query, TABLE)[0][0] == 200, "the statistics arrive")
    assert peer.run(query, TABLE)[0][1] >= 0.95 * 200
