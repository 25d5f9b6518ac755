"""Sessions, one request at a time: what is stored, who is let in, what a save does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine
from enum import Enum, StrEnum
from typing import Any, NamedTuple

import pytest

import pgkv
from pgkv import (
    ConfigError,
    InvalidValueError,
    SerializationError,
    SessionConflictError,
    SessionGoneError,
    TableNotFoundError,
    TtlCleanupStrategy,
)
from pgkv.patterns.session.data import id_of, new_token
from pgkv.testing import ServerClock
from tests.peers import Peer, fetch, until

Make = Callable[..., Coroutine[Any, Any, Any]]
TABLE = "kv_store_sessions"

# Everything that comes back exactly as it went in.
VALUES: dict[str, Any] = {
    "text": "héllo €",
    "nul": "a\0b",
    "surrogate": "\ud800 alone",
    "huge": 1e22,
    "negative zero": -0.0,
    "long": 10**40,
    "small": 5e-324,
    "nested": {"b": [1, {"a": None}], "a": True},
    "empty": {},
    "": "an empty key",
    "ключ": "a key that is not ASCII",
    'quote"\\': "a key with quotes",
}


class Word(str):
    __slots__ = ()


class Ratio(float):
    __slots__ = ()


class Variant(StrEnum):
    RED = "red"


class Level(int, Enum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    y: int


async def test_a_session_comes_back_as_it_went_in(sessions: Any) -> None:
    """Every JSON value survives exactly, also those that jsonb would alter or refuse."""
    made = await sessions.create(VALUES, user_id="u1")
    loaded = await sessions.load(made.id)
    assert loaded.data == VALUES
    assert repr(loaded.data["negative zero"]) == "-0.0"
    assert isinstance(loaded.data["huge"], float)
    assert list(loaded.data["nested"]) == ["b", "a"]
    assert (loaded.user_id, loaded.is_new, made.is_new) == ("u1", False, True)
    assert (loaded.created_at, loaded.expires_at) == (made.created_at, made.expires_at)


async def test_the_table_holds_no_token(sessions: Any, peer: Peer) -> None:
    """Whoever reads the whole table finds nothing that logs in: only SHA-256 of 256 random bits."""
    made = await sessions.create({"a": 1}, user_id="u")
    before = made.id
    await sessions.rotate(made)
    dump = peer.one(f"SELECT string_agg(t::text, ' ') FROM {TABLE} t")
    for token in (before, made.id):
        assert len(token) == 43
        assert token not in dump
        assert id_of(token).hex() in dump
    for found in peer.run(f"SELECT encode(id, 'hex') FROM {TABLE}"):
        assert await sessions.load(found[0]) is None


@pytest.mark.parametrize(
    "token",
    ["", "x", "a" * 43, "a" * 44, "a" * 1_000_000, "é" * 43, "a" * 42 + "\n", "' OR 1=1", None, 7],
    ids=lambda token: repr(token)[:12],
)
async def test_a_client_cannot_choose_its_token(sessions: Any, peer: Peer, token: Any) -> None:
    """An unknown or malformed token loads as None and creates nothing (session fixation)."""
    await sessions.create_table()
    assert await sessions.load(token) is None
    if isinstance(token, str):
        assert await sessions.destroy(token) is False
    assert peer.run(f"SELECT 1 FROM {TABLE}") == []


async def test_malformed_tokens_cost_no_query(sessions: Any, operations: list[Any]) -> None:
    """Only what may be a token reaches the server."""
    await sessions.load("x" * 1_000_000)
    await sessions.destroy("nonsense")
    assert operations == []


async def test_tampering_finds_nothing(sessions: Any) -> None:
    """A token that differs by one character, is cut or extended, is another token."""
    made = await sessions.create()
    flipped = ("A" if made.id[0] != "A" else "B") + made.id[1:]
    for token in (flipped, made.id[:-1], made.id + "A", made.id.swapcase()):
        assert await sessions.load(token) is None
    assert await sessions.load(made.id) is not None


async def test_destroyed_means_gone(sessions: Any) -> None:
    """After a logout the token loads nothing, and a late save of it revives nothing."""
    made = await sessions.create({"a": 1})
    late = await sessions.load(made.id)
    assert await sessions.destroy(made.id) is True
    assert await sessions.destroy(made.id) is False
    late.data["a"] = 2
    for mode in ("merge", "error", "last_wins"):
        with pytest.raises(SessionGoneError) as caught:
            await sessions.save(late, on_conflict=mode)
        assert caught.value.reason == "gone"
    with pytest.raises(SessionGoneError):
        await sessions.rotate(late)
    assert await sessions.load(made.id) is None


async def test_a_destroyed_session_object_is_known_to_be_gone(sessions: Any) -> None:
    """destroy() takes the session itself as well, which then cannot be saved."""
    made = await sessions.create({"a": 1})
    assert await sessions.destroy(made) is True
    made.data["a"] = 2
    with pytest.raises(SessionGoneError):
        await sessions.save(made)


async def test_only_what_changed_travels(sessions: Any, peer: Peer) -> None:
    """A merge writes changed and removed keys; others keep what parallel requests wrote."""
    made = await sessions.create({"a": 1, "b": 1, "c": 1, "gone": 1})
    mine, theirs = await sessions.load(made.id), await sessions.load(made.id)
    mine.data["a"] = 2
    del mine.data["gone"]
    theirs.data["b"] = 3
    theirs.data["new"] = [1]
    await sessions.save(mine)
    await sessions.save(theirs)
    merged = await sessions.load(made.id)
    assert merged.data == {"a": 2, "b": 3, "c": 1, "new": [1]}


async def test_nested_changes_are_noticed(sessions: Any) -> None:
    """A change deep inside a value is saved without anybody announcing it."""
    made = await sessions.create({"cart": {"items": []}})
    made.data["cart"]["items"].append(7)
    await sessions.save(made)
    assert (await sessions.load(made.id)).data == {"cart": {"items": [7]}}


async def test_unchanged_writes_nothing(
    sessions: Any, operations: list[tuple[str, str, int]], peer: Peer
) -> None:
    """Loading is one statement, which within touch_interval takes no transaction id; saving what
    did not change is none."""
    made = await sessions.create({"a": 1})
    await sessions.load(made.id)
    row = peer.run(f"SELECT xmin::text, xmax::text, ctid::text FROM {TABLE}")
    operations.clear()
    for _ in range(3):
        await sessions.save(await sessions.load(made.id))
    assert [name for name, _, _ in operations] == ["session_load"] * 3
    assert peer.run(f"SELECT xmin::text, xmax::text, ctid::text FROM {TABLE}") == row


async def test_error_mode_refuses_after_any_other_save(sessions: Any) -> None:
    """on_conflict="error": whoever saves second has to load again."""
    made = await sessions.create({"n": 0})
    mine, theirs = await sessions.load(made.id), await sessions.load(made.id)
    theirs.data["other"] = 1
    await sessions.save(theirs)
    mine.data["n"] = 1
    with pytest.raises(SessionConflictError, match="Load it again"):
        await sessions.save(mine, on_conflict="error")
    again = await sessions.load(made.id)
    again.data["n"] = 1
    await sessions.save(again, on_conflict="error")
    again.data["n"] = 2
    await sessions.save(again, on_conflict="error")
    assert (await sessions.load(made.id)).data == {"n": 2, "other": 1}


async def test_error_mode_after_a_merge_erases_nothing(sessions: Any) -> None:
    """A merge that met others' keys does not know the whole document, and cannot overwrite it."""
    made = await sessions.create({"n": 0})
    mine, theirs = await sessions.load(made.id), await sessions.load(made.id)
    theirs.data["other"] = 1
    await sessions.save(theirs)
    mine.data["n"] = 1
    await sessions.save(mine)
    mine.data["n"] = 2
    with pytest.raises(SessionConflictError):
        await sessions.save(mine, on_conflict="error")
    theirs.data["n"] = 5
    with pytest.raises(SessionConflictError):
        await sessions.save(theirs, on_conflict="error")
    assert (await sessions.load(made.id)).data == {"n": 1, "other": 1}


async def test_error_mode_after_an_own_merge(sessions: Any) -> None:
    """A merge that met nobody leaves the session as known as before."""
    made = await sessions.create({"n": 0})
    for n, mode in enumerate(["merge", "error", "merge", "last_wins", "error"], 1):
        made.data["n"] = n
        await sessions.save(made, on_conflict=mode)
    assert (await sessions.load(made.id)).data == {"n": 5}


async def test_last_wins_overwrites(sessions: Any) -> None:
    """on_conflict="last_wins" stores the whole document, whatever was there."""
    made = await sessions.create({"a": 1})
    mine, theirs = await sessions.load(made.id), await sessions.load(made.id)
    theirs.data["b"] = 1
    await sessions.save(theirs)
    mine.data["a"] = 2
    await sessions.save(mine, on_conflict="last_wins")
    assert (await sessions.load(made.id)).data == {"a": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": {"b": [object()]}}, r"data\['a'\]\['b'\]\[0\] is of type object"),
        ({"a": float("nan")}, r"data\['a'\] is not a finite number"),
        ({"a": {1: 2}}, r"data\['a'\] has a key that is of type int"),
        ({"a": b"x"}, r"data\['a'\] is of type bytes"),
        ({1: "a"}, "keys of data must be str, not int"),
        ({"a\0b": 1}, "contains NUL"),
        ({"\udc80": 1}, "lone surrogate"),
        ({"a": "x" * (1 << 20)}, "max_data_size is 1,048,576"),
        ({"a": 10**5000}, "too long for JSON"),
        ([1], "data must be a mapping"),
        ({"a": [Word("x")]}, r"data\['a'\]\[0\] is of type Word.* plain str; store str\(value\)"),
        ({"a": Variant.RED}, r"data\['a'\] is of type Variant.* plain str"),
        ({"a": Level.HIGH}, r"data\['a'\] is of type Level.* plain int"),
        ({"a": Ratio(0.5)}, r"data\['a'\] is of type Ratio.* plain float"),
        ({"a": OrderedDict(b=1)}, r"data\['a'\] is of type OrderedDict.* plain dict"),
        ({"a": Point(1, 2)}, r"data\['a'\] is of type Point.* plain tuple"),
        ({"a": {Word("x"): 1}}, r"data\['a'\] has a key that is of type Word"),
    ],
)
async def test_what_is_not_json_is_refused(sessions: Any, data: Any, message: str) -> None:
    """What a session cannot hold is refused by its place before anything is sent."""
    made = await sessions.create({"kept": 1})
    with pytest.raises(InvalidValueError, match=message):
        await sessions.create(data)
    made.data = data
    with pytest.raises(InvalidValueError, match=message):
        await sessions.save(made)
    assert (await sessions.load(made.id)).data == {"kept": 1}


async def test_users_sessions(sessions: Any) -> None:
    """list_user shows a user's live sessions, the last used first; destroy_user ends all but one."""
    first = await sessions.create(user_id="u", metadata={"agent": "curl\0", "address": "192.0.2.0"})
    second = await sessions.create(user_id="u")
    other = await sessions.create(user_id="v")
    listed = await sessions.list_user("u")
    assert [info.handle for info in listed] == [second.handle, first.handle]
    assert listed[1].metadata == {"agent": "curl\0", "address": "192.0.2.0"}
    assert listed[0].idle() < 60
    assert 1700 < listed[0].remaining() <= 1800
    assert await sessions.destroy_user("u", keep=second) == 1
    assert await sessions.load(first.id) is None
    assert await sessions.load(second.id) is not None
    assert await sessions.destroy_user("u") == 1
    assert await sessions.list_user("u") == []
    assert await sessions.load(other.id) is not None


async def test_a_device_is_ended_by_its_handle(sessions: Any) -> None:
    """A handle from the list ends that session, for its own user only, and is no token."""
    made = await sessions.create(user_id="u")
    (info,) = await sessions.list_user("u")
    assert await sessions.load(info.handle) is None
    assert await sessions.destroy_handle(info.handle, "somebody else") is False
    assert await sessions.destroy_handle("nonsense", "u") is False
    assert await sessions.destroy_handle(info.handle, "u") is True
    assert await sessions.load(made.id) is None


@pytest.mark.parametrize("user_id", ["", "a\0b", "\ud800", "x" * 1025, True, 1.5, b"u"])
async def test_bad_users(sessions: Any, user_id: Any) -> None:
    """A user's id is a str that PostgreSQL can hold, or an int."""
    for call in (sessions.list_user, sessions.destroy_user):
        with pytest.raises(InvalidValueError, match=r"user_id|lone surrogate"):
            await call(user_id)
    with pytest.raises(InvalidValueError):
        await sessions.create(user_id=user_id)


async def test_users_are_text(sessions: Any) -> None:
    """An int is a user too, and comes back as text; so do members of enums and other subclasses."""
    for user_id, text in ((Variant.RED, "red"), (Level.HIGH, "3"), (Word("w"), "w")):
        one = await sessions.create(user_id=user_id)
        assert type(one.user_id) is str
        assert one.user_id == (await sessions.load(one.id)).user_id == text
    made = await sessions.create(user_id=42)
    assert made.user_id == (await sessions.load(made.id)).user_id == "42"
    assert len(await sessions.list_user(42)) == len(await sessions.list_user("42")) == 1


async def test_in_the_callers_transaction(sessions: Any, connect: Make) -> None:
    """A new password and destroy_user are committed together, or not at all."""
    current, other = await sessions.create(user_id="u"), await sessions.create(user_id="u")
    conn = await connect()
    await conn.execute("CREATE TEMP TABLE passwords AS SELECT 'old' AS hash")
    await conn.commit()
    for ending in ("rollback", "commit"):
        await conn.execute("UPDATE passwords SET hash = 'new'")
        bound = sessions.using(conn)
        assert await bound.destroy_user("u", keep=current) == 1
        assert await bound.load(other.id) is None
        assert await sessions.load(other.id) is not None
        await getattr(conn, ending)()
    assert await sessions.load(other.id) is None
    assert await sessions.load(current.id) is not None


async def test_using_leaves_the_commit_alone(sessions: Any, connect: Make) -> None:
    """Inside a caller's transaction nothing changes how durable its commit is."""
    await sessions.create_table()
    conn = await connect()
    bound = sessions.using(conn)
    made = await bound.create({"a": 1}, user_id="u")
    made.data["a"] = 2
    await bound.save(made)
    await bound.rotate(made)
    assert (await bound.load(made.id)).data == {"a": 2}
    assert await bound.destroy(made.id) is True
    assert await bound.destroy_user("u") == 0
    assert await fetch(conn, "SHOW synchronous_commit") == [("on",)]


async def test_in_the_stores_transaction(make_store: Make, variant: Any) -> None:
    """A SessionStore made from a transaction's store is part of that transaction."""
    store = await make_store()
    sessions = variant.make("SessionStore", store)
    made = await sessions.create({"a": 1})

    async def undone() -> None:
        async with store.transaction() as tx:
            assert await variant.make("SessionStore", tx).destroy(made.id)
            raise RuntimeError("undo")

    with pytest.raises(RuntimeError, match="undo"):
        await undone()
    assert await sessions.load(made.id) is not None


async def test_a_missing_table(make_sessions: Make, peer: Peer) -> None:
    """The table is made when it is missing, unless the settings say that somebody else does."""
    sessions = await make_sessions()
    assert await sessions.load(new_token()) is None
    peer.run(f"DROP TABLE {TABLE}")
    made = await sessions.create()
    assert await sessions.load(made.id) is not None
    peer.run(f"DROP TABLE {TABLE}")
    strict = await make_sessions({"auto_create_table": False})
    with pytest.raises(TableNotFoundError):
        await strict.create()


async def test_the_tables_kind(make_sessions: Make, peer: Peer) -> None:
    """Sessions live in a logged table of their own, with an index on the user and on nothing
    that changes with use."""
    await (await make_sessions()).create()
    kind = "SELECT relpersistence::text FROM pg_class WHERE oid = %s::regclass"
    assert peer.one(kind, TABLE) == "p"
    indexes = "SELECT indexdef FROM pg_indexes WHERE tablename = %s AND schemaname = current_schema"
    texts = sorted(row[0].partition("btree ")[2] for row in peer.run(indexes, TABLE))
    assert texts == ["(id)", "(user_id)"]
    await (await make_sessions({"table_name": "brief"}, durable=False)).create()
    assert peer.one(kind, "brief_sessions") == "u"


async def test_somebody_elses_data(sessions: Any, peer: Peer) -> None:
    """A row that another program wrote is an error that quotes nothing of it."""
    made = await sessions.create({"a": 1})
    peer.run(f"""UPDATE {TABLE} SET data = '{{"a": {{"secret-data": 1}}}}'""")
    with pytest.raises(SerializationError) as caught:
        await sessions.load(made.id)
    assert "secret-data" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_expired_rows_are_collected(
    make_sessions: Make, clock: ServerClock, peer: Peer
) -> None:
    """purge() deletes up to its limit; under ON_READ a token that comes back late has its row
    removed; under MANUAL nothing happens by itself."""
    sessions = await make_sessions({"ttl_cleanup_strategy": TtlCleanupStrategy.MANUAL})
    made = [await sessions.create() for _ in range(10)]
    clock.advance(1801)
    live = await sessions.create()
    assert await sessions.load(made[0].id) is None
    assert await sessions.purge(limit=4) == 4
    assert await sessions.purge() == 6
    assert peer.one(f"SELECT count(*) FROM {TABLE}") == 1
    clock.advance(1801)
    reading = await make_sessions()
    assert await reading.load(live.id) is None
    await until(lambda: peer.one(f"SELECT count(*) FROM {TABLE}") == 0, "the row is collected")


async def test_background_collection(make_sessions: Make, clock: ServerClock, peer: Peer) -> None:
    """Under BACKGROUND the session table is swept without anybody asking."""
    sessions = await make_sessions({"ttl_cleanup_strategy": TtlCleanupStrategy.BACKGROUND})
    await sessions.create()
    clock.advance(1801)
    await until(lambda: peer.one(f"SELECT count(*) FROM {TABLE}") == 0, "the table is swept")


async def test_writes_sweep(
    make_sessions: Make, clock: ServerClock, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ON_READ now and then a write sweeps a chunk of the sessions that nobody asks for."""
    sessions = await make_sessions()
    for _ in range(5):
        await sessions.create()
    clock.advance(1801)
    for variant in ("_sync", "_async"):
        monkeypatch.setattr(f"pgkv._engine.{variant}.channel.SWEEP_CHANCE", 1.0)
    await sessions.create()
    await until(lambda: peer.one(f"SELECT count(*) FROM {TABLE}") == 1, "the chunk is swept")


@pytest.mark.parametrize(
    "options",
    [
        {"idle_timeout": 0},
        {"idle_timeout": float("nan")},
        {"idle_timeout": "1h"},
        {"absolute_timeout": -1},
        {"absolute_timeout": 1e12},
        {"touch_interval": 1800},
        {"touch_interval": -1},
        {"max_data_size": 1},
    ],
)
async def test_bad_settings(make_sessions: Make, options: Any) -> None:
    """A setting that cannot work is refused when the session store is made."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        await make_sessions(**options)


async def test_the_wrong_variant(dsn: str) -> None:
    """Each variant takes its own kind of store and says so."""
    with pgkv.Store(pgkv.Config(dsn)) as store, pytest.raises(ConfigError, match="AsyncStore"):
        pgkv.AsyncSessionStore(store)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigError, match="not AsyncStore"):
        pgkv.SessionStore(pgkv.AsyncStore(pgkv.Config(dsn)))  # type: ignore[arg-type]  # likewise


async def test_a_session_says_nothing_of_itself(sessions: Any) -> None:
    """repr() shows neither token nor data: it ends up in logs."""
    made = await sessions.create({"card": "4111"}, user_id="somebody")
    for text in (repr(made), str(made), repr(sessions)):
        assert made.id not in text
        assert "4111" not in text
