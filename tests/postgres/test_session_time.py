"""Sessions and time: both timeouts, by the server's clock."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest

from pgkv import SessionGoneError
from pgkv.testing import ServerClock
from tests.peers import Peer

Make = Callable[..., Coroutine[Any, Any, Any]]
TABLE = "kv_store_sessions"


async def test_idle_timeout(make_sessions: Make, clock: ServerClock) -> None:
    """An unused session ends after idle_timeout; use prolongs it."""
    sessions = await make_sessions(idle_timeout=timedelta(minutes=30), touch_interval=60)
    used, unused = await sessions.create({"a": 1}), await sessions.create()
    clock.advance(1700)
    assert await sessions.load(used.id) is not None
    clock.advance(101)
    assert await sessions.load(unused.id) is None
    loaded = await sessions.load(used.id)
    clock.advance(1801)
    assert await sessions.load(used.id) is None
    loaded.data["a"] = 2
    with pytest.raises(SessionGoneError):
        await sessions.save(loaded)
    assert await sessions.destroy(used.id) is False


async def test_absolute_timeout(make_sessions: Make, clock: ServerClock) -> None:
    """However much it is used or saved, a session ends after absolute_timeout."""
    sessions = await make_sessions(idle_timeout=1000, absolute_timeout=2500, touch_interval=100)
    made = loaded = await sessions.create({"n": 0})
    for n in range(3):
        clock.advance(800)
        loaded = await sessions.load(made.id)
        loaded.data["n"] = n + 1
        await sessions.save(loaded)
    assert loaded.expires_at == made.created_at + timedelta(seconds=2500)
    clock.advance(101)
    assert await sessions.load(made.id) is None


async def test_use_is_noted_once_per_touch_interval(
    make_sessions: Make, clock: ServerClock, peer: Peer, operations: list[tuple[str, str, int]]
) -> None:
    """Loads within touch_interval are one statement that writes nothing; the first after it is two, and
    notes the use."""
    sessions = await make_sessions(idle_timeout=18_000, touch_interval=600)
    made = await sessions.create()
    seen = f"SELECT extract(epoch from seen_at)::float8 FROM {TABLE}"
    first = peer.one(seen)
    clock.advance(500)
    loaded = await sessions.load(made.id)
    assert peer.one(seen) == first
    assert loaded.expires_at == made.expires_at
    operations.clear()
    await sessions.load(made.id)
    assert len(operations) == 1
    clock.advance(200)
    loaded = await sessions.load(made.id)
    assert len(operations) == 3
    assert 700 <= peer.one(seen) - first < 800
    assert loaded.expires_at > made.expires_at + timedelta(seconds=600)


async def test_touching_every_time(make_sessions: Make, clock: ServerClock) -> None:
    """touch_interval=0 notes every load."""
    sessions = await make_sessions(idle_timeout=1000, touch_interval=0)
    made = await sessions.create()
    for _ in range(3):
        clock.advance(900)
        assert await sessions.load(made.id) is not None


async def test_a_client_clock_changes_nothing(
    make_sessions: Make, clock: ServerClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liveness, and the ages of a listing, are the server's: a wall clock a day off is not read."""
    sessions = await make_sessions(idle_timeout=1000, touch_interval=1)
    made = await sessions.create(user_id="u")
    monkeypatch.setattr("time.time", lambda: 0.0)
    clock.advance(500)
    (info,) = await sessions.list_user("u")
    assert 500 <= info.idle() < 600
    assert 400 < info.remaining() <= 500
    assert await sessions.load(made.id) is not None


async def test_listing_shows_the_living(make_sessions: Make, clock: ServerClock) -> None:
    """A session whose time has passed is in no listing and is not counted when destroyed."""
    sessions = await make_sessions(idle_timeout=100, touch_interval=1)
    await sessions.create(user_id="u")
    clock.advance(60)
    await sessions.create(user_id="u")
    clock.advance(60)
    assert len(await sessions.list_user("u")) == 1
    assert await sessions.destroy_user("u") == 1
