"""Rotation: the session moves to a new token, and nothing is left behind that could be used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pgkv import (
    InvalidValueError,
    Session,
    SessionConflictError,
    SessionGoneError,
    SessionStore,
    Store,
)
from pgkv.patterns.session.data import id_of
from pgkv.patterns.session.sql import Outcome
from pgkv.testing import ServerClock
from tests.peers import Peer, gather

Make = Callable[..., Coroutine[Any, Any, Any]]
TABLE = "kv_store_sessions"


async def test_a_login(sessions: Any) -> None:
    """The new token has the new user and the unsaved changes; the old one, for the grace, what was
    there before."""
    made = await sessions.create({"cart": [1], "anonymous": True})
    before = made.id
    made.data["name"] = "Ada"
    del made.data["anonymous"]
    assert await sessions.rotate(made, user_id="ada") is None
    assert made.id != before
    assert made.user_id == "ada"
    loaded = await sessions.load(made.id)
    assert (loaded.user_id, loaded.data) == ("ada", {"cart": [1], "name": "Ada"})
    old = await sessions.load(before)
    assert (old.user_id, old.data) == (None, {"cart": [1], "anonymous": True})
    assert len(await sessions.list_user("ada")) == 1


async def test_what_a_request_with_the_old_token_may_do(sessions: Any) -> None:
    """In the grace the old token reads; saving says "rotated", also for one loaded before."""
    made = await sessions.create({"a": 1})
    before, early = made.id, await sessions.load(made.id)
    await sessions.rotate(made, user_id="u")
    late = await sessions.load(before)
    for stale in (early, late):
        await sessions.save(stale)  # unchanged: nothing to refuse
        stale.data["a"] = 2
        for mode in ("merge", "error", "last_wins"):
            with pytest.raises(SessionGoneError) as caught:
                await sessions.save(stale, on_conflict=mode)
            assert caught.value.reason == "rotated"
        with pytest.raises(SessionConflictError):
            await sessions.rotate(stale, user_id="thief")
    assert (await sessions.load(made.id)).data == {"a": 1}


async def test_the_grace_ends(sessions: Any, clock: ServerClock) -> None:
    """After the grace the old token is nothing; the new one stays."""
    made = await sessions.create()
    before = made.id
    await sessions.rotate(made, grace=1000)
    clock.advance(900)
    assert await sessions.load(before) is not None
    clock.advance(200)
    assert await sessions.load(before) is None
    assert await sessions.load(made.id) is not None


async def test_without_grace(sessions: Any, peer: Peer) -> None:
    """grace=0 ends the old token at once. The row that stays of it holds no data."""
    made = await sessions.create({"secret": 1})
    before, early = made.id, await sessions.load(made.id)
    await sessions.rotate(made, grace=0)
    assert await sessions.load(before) is None
    assert sorted(row[0] for row in peer.run(f"SELECT data::text FROM {TABLE}")) == [
        '{"secret": "1"}',
        "{}",
    ]
    early.data["a"] = 1
    with pytest.raises(SessionGoneError):
        await sessions.save(early)


@pytest.mark.parametrize("end", ["new", "old", "user", "handle"])
async def test_whatever_ends_the_session_ends_the_old_token(sessions: Any, end: str) -> None:
    """A logout within the grace, by either token, by user or by handle, leaves none of both."""
    made = await sessions.create()
    before = made.id
    await sessions.rotate(made, user_id="u")
    ended: dict[str, Callable[[], Any]] = {
        "new": lambda: sessions.destroy(made.id),
        "old": lambda: sessions.destroy(before),
        "user": lambda: sessions.destroy_user("u"),
        "handle": lambda: sessions.destroy_handle(made.handle, "u"),
    }
    assert await ended[end]()
    assert await sessions.load(before) is None
    assert await sessions.load(made.id) is None


async def test_an_old_token_never_outlives_its_session_over_several_rotations(
    sessions: Any,
) -> None:
    """Rotated twice within the grace and logged out: none of the three tokens loads."""
    made = await sessions.create()
    tokens = [made.id]
    for _ in range(2):
        await sessions.rotate(made)
        tokens.append(made.id)
    assert await sessions.load(tokens[1]) is not None
    await sessions.destroy(made.id)
    assert [await sessions.load(token) for token in tokens] == [None, None, None]


@pytest.mark.parametrize("grace", [10, 0])
@pytest.mark.parametrize("oldest", [0, 1])
async def test_every_token_of_a_session_ends_it(
    sessions: Any, clock: ServerClock, grace: float, oldest: int
) -> None:
    """A replaced token ends the session for a while after the grace too, over several rotations; it
    loads nothing then."""
    made = await sessions.create()
    tokens = [made.id]
    for _ in range(2):
        await sessions.rotate(made, grace=grace)
        tokens.append(made.id)
    clock.advance(11)
    assert await sessions.load(tokens[oldest]) is None
    assert await sessions.destroy(tokens[oldest]) is True
    assert await sessions.load(made.id) is None


async def test_what_a_rotation_leaves_is_collected(
    sessions: Any, clock: ServerClock, peer: Peer
) -> None:
    """The row under the old id goes with the expired ones."""
    made = await sessions.create()
    await sessions.rotate(made)
    clock.advance(601)
    assert await sessions.purge() == 1
    assert await sessions.load(made.id) is not None
    assert peer.one(f"SELECT count(*) FROM {TABLE}") == 1


async def test_keeping_the_current_session_by_its_old_token(sessions: Any) -> None:
    """destroy_user(keep=) spares the session also where the request still has the old token."""
    made, other = await sessions.create(user_id="u"), await sessions.create(user_id="u")
    early = await sessions.load(made.id)
    await sessions.rotate(made)
    await sessions.rotate(made)
    assert await sessions.destroy_user("u", keep=early) == 1
    assert await sessions.load(made.id) is not None
    assert await sessions.load(other.id) is None


async def test_users_of_a_rotation(sessions: Any) -> None:
    """Left out, the user stays; None takes it away; an int is text."""
    made = await sessions.create(user_id="u")
    for options, user in (({}, "u"), ({"user_id": 7}, "7"), ({"user_id": None}, None)):
        await sessions.rotate(made, **options)
        assert made.user_id == (await sessions.load(made.id)).user_id == user


async def test_which_timeouts_a_rotation_starts_again(make_sessions: Make, clock: Any) -> None:
    """A change of user starts the absolute timeout again, a plain rotation does not."""
    sessions = await make_sessions(idle_timeout=1000, absolute_timeout=1500)
    plain, login = await sessions.create(user_id="u"), await sessions.create()
    clock.advance(900)
    await sessions.rotate(plain, user_id="u")
    await sessions.rotate(login, user_id="u")
    clock.advance(700)
    assert await sessions.load(plain.id) is None
    assert await sessions.load(login.id) is not None


async def test_one_of_two_rotations_wins(sessions: Any, peer: Peer, witness: Peer) -> None:
    """Two requests that rotate at once: one has the new token, the other a conflict, with and
    without grace."""
    for grace in (10, 0):
        made = await sessions.create({"n": 1})
        one, two = await sessions.load(made.id), await sessions.load(made.id)
        with peer.conn.transaction():
            peer.run(f"SELECT 1 FROM {TABLE} FOR UPDATE")
            racing = asyncio.ensure_future(
                gather(
                    sessions.rotate(one, user_id="a", grace=grace),
                    sessions.rotate(two, user_id="b", grace=grace),
                )
            )
            await witness.until_waiting(2)
        outcomes = await racing
        assert sorted(type(each).__name__ for each in outcomes) == [
            "NoneType",
            "SessionConflictError",
        ]
        winner = one if outcomes[0] is None else two
        assert (await sessions.load(winner.id)).user_id == winner.user_id
        await sessions.destroy_user(winner.user_id)
        peer.run(f"DELETE FROM {TABLE}")


async def test_a_session_never_stored(sessions: Any) -> None:
    """rotate() of a session that was never stored stores it: one login for every visitor."""
    visitor = Session({"a": 1})
    await sessions.rotate(visitor, user_id="u")
    loaded = await sessions.load(visitor.id)
    assert (loaded.user_id, loaded.data) == ("u", {"a": 1})


@pytest.mark.parametrize("grace", [-1, float("nan"), "10", float("inf")])
async def test_bad_grace(sessions: Any, grace: Any) -> None:
    """A grace is seconds, 0 or more."""
    made = await sessions.create()
    with pytest.raises(InvalidValueError, match="grace"):
        await sessions.rotate(made, grace=grace)
    assert await sessions.load(made.id) is not None


def test_a_rotation_whose_answer_was_lost(dsn: str) -> None:
    """Sent again, the same rotation finds that it had happened; another one finds itself beaten."""
    with Store.connect(dsn) as store:
        sessions = SessionStore(store)
        made = sessions.create()
        sql = sessions._flows.sql

        def send(token: str) -> Outcome:
            op = sql.rotate(id_of(made.id), id_of(token), b"{}", [], grace=10, user=None)
            return store._execute(op)

        first, again = send("new"), send("new")
        assert (first.status, again.status) == ("done", "done")
        assert (first.version, first.expires_at) == (again.version, again.expires_at)
        assert send("another").status == "rotated"
