"""Lifetimes of single sessions ("remember me"), and looking for a session without using it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest

from pgkv import InvalidValueError, SessionGoneError
from pgkv.testing import ServerClock
from tests.peers import Peer, gather
from tests.postgres.test_session_races import interleaved

Make = Callable[..., Coroutine[Any, Any, Any]]
TABLE = "kv_store_sessions"
DAY = 86400
LIFE = (
    "SELECT meta->>1, meta->>2, extract(epoch from expires_at - seen_at)::int, "
    f"extract(epoch from ends_at - seen_at)::int FROM {TABLE} WHERE successor IS NULL"
)


def assert_lives(peer: Peer, *expected: Any) -> None:
    """The only session's timeouts of its own, and the seconds to both ends: the clock moves on between
    two calls."""
    [(idle, absolute, *ends)] = peer.run(LIFE)
    assert (idle, absolute) == expected[:2]
    assert ends == pytest.approx(expected[2:], abs=30)


@pytest.mark.parametrize("way", ["create", "save", "rotate", "rotate, never stored"])
async def test_a_session_with_lifetimes_of_its_own(
    make_sessions: Make, clock: ServerClock, way: str
) -> None:
    """Whatever gives it them, it lives by them: by loads, saves and rotations as well; any other
    session lives by the store's."""
    sessions = await make_sessions(idle_timeout=1800, absolute_timeout=43200)
    own: Any = {"idle_timeout": timedelta(days=7), "absolute_timeout": 30 * DAY}
    plain = await sessions.create({"a": 1})
    made = await sessions.create(
        {"a": 1}, metadata={"agent": "x"}, **(own if way == "create" else {})
    )
    if way == "save":
        await sessions.save(made, **own)
    elif way.startswith("rotate"):
        if "never" in way:
            made.id = ""
        await sessions.rotate(made, user_id="ada", **own)
    assert made.idle_timeout == 7 * DAY
    for day in range(4):
        clock.advance(6 * DAY)
        made = await sessions.load(made.id)
        assert made.idle_timeout == 7 * DAY
        made.data["a"] = day
        await (sessions.save(made) if day % 2 else sessions.rotate(made))
    assert await sessions.load(plain.id) is None
    clock.advance(6 * DAY + 60)
    assert await sessions.load(made.id) is None


@pytest.mark.parametrize("mode", ["merge", "error", "last_wins"])
async def test_lifetimes_are_kept_given_again_and_taken_back(
    sessions: Any, peer: Peer, mode: str
) -> None:
    """Each of the two by itself, together with data or without; metadata stays."""
    made = await sessions.create({"a": 1}, user_id="ada", metadata={"agent": "x"})
    assert_lives(peer, None, None, 1800, 43200)
    steps: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        ({"idle_timeout": 900}, ("900", None, 900, 43200)),
        ({"absolute_timeout": 600}, ("900", "600", 600, 600)),
        ({"absolute_timeout": 5000}, ("900", "5000", 900, 5000)),
        ({"idle_timeout": None}, (None, "5000", 1800, 5000)),
        ({"idle_timeout": 90.25, "absolute_timeout": None}, ("90.25", None, 90, 43200)),
    ]
    for n, (given, expected) in enumerate(steps):
        if n % 2:
            made.data["n"] = n
        await sessions.save(made, on_conflict=mode, **given)
        assert_lives(peer, *expected)
        assert made.idle_timeout == (float(expected[0]) if expected[0] else None)
    [info] = await sessions.list_user("ada")
    assert info.metadata == {"agent": "x"}
    await sessions.rotate(made, idle_timeout=None)
    assert (await sessions.load(made.id)).idle_timeout is None
    await sessions.rotate(made, absolute_timeout=7000)
    # Another user: its own absolute timeout starts again.
    await sessions.rotate(made, user_id="bob")
    assert_lives(peer, None, "7000", 1800, 7000)


async def test_lifetimes_that_contradict_the_store_are_refused(sessions: Any) -> None:
    """Before anything is sent, and by name."""
    made = await sessions.create()
    given: Any
    for given, named in [
        ({"idle_timeout": 60}, "touch_interval"),
        ({"idle_timeout": 30 * DAY}, "absolute_timeout as well"),
        ({"idle_timeout": -1}, "idle_timeout must be"),
        ({"absolute_timeout": "long"}, "absolute_timeout must be"),
    ]:
        for call in (sessions.create, lambda **own: sessions.save(made, **own),
                     lambda **own: sessions.rotate(made, **own)):  # fmt: skip
            with pytest.raises(InvalidValueError, match=named):
                await call(**given)


async def test_a_rotation_that_waited_for_other_lifetimes(
    sessions: Any, peer: Peer, witness: Peer
) -> None:
    """It adds what it was given to what the other one left, and the ends follow from both."""
    made = await sessions.create({"a": 1})
    other = f"UPDATE {TABLE} SET meta = '[null, 500, null]', version = version + 1"
    rotate = lambda: sessions.rotate(made, absolute_timeout=5000)  # noqa: E731  # named for its line
    assert await interleaved(peer, witness, other, rotate) is None
    assert_lives(peer, "500", "5000", 500, 5000)


async def test_saves_against_rotations_with_other_lifetimes(sessions: Any, peer: Peer) -> None:
    """Whichever comes first, the session that remains has the rotation's: a save by the old token
    either came before it or is refused."""
    for _ in range(10):
        made = await sessions.create({"a": 1})
        late = await sessions.load(made.id)
        late.data["b"] = 1
        saved, rotated = await gather(
            sessions.save(late, idle_timeout=100, absolute_timeout=1000),
            sessions.rotate(made, idle_timeout=200, absolute_timeout=2000),
        )
        assert rotated is None
        assert saved is None or isinstance(saved, SessionGoneError)
        assert_lives(peer, "200", "2000", 200, 2000)
        assert ("b" in (await sessions.load(made.id)).data) is (saved is None)
        await sessions.destroy(made)
        peer.run(f"DELETE FROM {TABLE}")


async def test_exists_notes_no_use(sessions: Any, peer: Peer, clock: ServerClock) -> None:
    """It is true of what a load would find, a replaced token in its grace too, and writes nothing."""
    made = await sessions.create({"a": 1})
    assert await sessions.exists(made.id)
    assert not await sessions.exists("x" * 43)
    assert not await sessions.exists("no token")
    clock.advance(1000)
    before = peer.run(f"SELECT xmin, * FROM {TABLE}")
    assert await sessions.exists(made.id)
    assert peer.run(f"SELECT xmin, * FROM {TABLE}") == before
    old = made.id
    await sessions.rotate(made, grace=100)
    assert await sessions.exists(old)
    assert await sessions.exists(made.id)
    clock.advance(101)
    assert not await sessions.exists(old)
    clock.advance(1800)
    assert not await sessions.exists(made.id)
