"""Values compressed and encrypted at rest, on a server: what the table holds, moved and foreign values, rotation."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import pgkv
from pgkv import AesGcmSiv, ConfigError, DecodingError, Zstd
from pgkv._sql.transformed import StoredRow, TransformedStatements
from pgkv.testing import ServerClock
from tests import FULL
from tests.cached import cached_in
from tests.faults.support import newest
from tests.peers import Peer, gather
from tests.variants import Variant

pytestmark = newest
OLD, NEW = b"1" * 32, b"2" * 32
TEXT = b"a secret of some length, " * 60
BEFORE: list[Any] = [AesGcmSiv({1: OLD})]
BOTH: list[Any] = [Zstd(), AesGcmSiv({2: NEW, 1: OLD})]
AFTER: list[Any] = [Zstd(), AesGcmSiv({2: NEW})]


async def test_the_table_holds_no_plaintext(make_store: Any, variant: Variant, peer: Peer) -> None:
    """Neither by one key nor by many, load, update or a cached function."""
    store = await make_store(transforms=AFTER)

    @cached_in(variant, store)
    async def text() -> str:
        return TEXT.decode()

    assert await text() == await text() == TEXT.decode()
    await store.set("a", TEXT)
    await store.set_nx("b", TEXT)
    await store.set_many({"c": TEXT, "d": TEXT})
    await store.update("e", lambda _: TEXT)
    await store.load([("f", TEXT), ("g", TEXT, 60)])
    async with store.pipeline() as pipe:
        pipe.set("h", TEXT)
        pipe.get_and_set("i", TEXT)
    await store.typed(dict[str, str]).set("j", {"text": TEXT.decode()})
    rows = peer.run("SELECT key, value FROM kv_store")
    assert len(rows) == 11
    assert not any(b"secret" in bytes(value) for _, value in rows)
    for key in "abcdefghi":
        entry = await store.get_entry(key)
        assert (entry.value, entry.transforms) == (TEXT, ("zstd", "aes:2"))


async def test_what_is_refused(make_store: Any) -> None:
    """What the server would have to read has an error of its own, before anything is sent."""
    store = await make_store(transforms=AFTER)
    await store.set("n", b"1")
    for name, arg in (("increment", "n"), ("decrement", "n"), ("increment_many", {"n": 1})):
        with pytest.raises(ConfigError, match="plain_integers"):
            await getattr(store, name)(arg)
    with pytest.raises(ConfigError, match="plain_integers"):
        await store.increment("n", 1, maximum=9)
    with pytest.raises(ConfigError, match=r"append: .*update\(\)"):
        await store.append("n", b"1")
    for name, *args in (("compare_and_swap", "n", b"1", b"2"), ("compare_and_delete", "n", b"1")):
        with pytest.raises(ConfigError, match="if_version"):
            async with store.pipeline() as pipe:
                getattr(pipe, name)(*args)
    assert await store.get("n") == b"1"


async def test_a_table_of_its_own(make_store: Any, peer: Peer) -> None:
    """Transforms are a table's: a namespace inherits them, another table may have others or none."""
    store = await make_store()
    secrets = store.table("secrets", transforms=AFTER)
    await secrets.namespace("ns:").set("k", TEXT)
    assert await secrets.get("ns:k") == await secrets.namespace("ns:").get("k") == TEXT
    assert await secrets.table("open", transforms=[]).set("k", TEXT)
    assert bytes(peer.one("SELECT value FROM open")) == TEXT
    assert (await store.table("secrets").get("ns:k")).startswith(b"\x00pk")


async def test_a_value_that_was_moved(make_store: Any, peer: Peer) -> None:
    """A row copied to another key, and plaintext put in by SQL, are errors in every reading."""
    store = await make_store(transforms=AFTER)
    await store.set("mine", b"secret")
    await store.set("other", b"x")
    peer.run(
        "UPDATE kv_store SET value = (SELECT value FROM kv_store WHERE key = 'mine') WHERE key = 'other'"
    )
    await store.set("plain", b"x")
    peer.run("UPDATE kv_store SET value = 'plaintext' WHERE key = 'plain'")
    for key in ("other", "plain"):
        reads = (
            store.get(key),
            store.get_entry(key),
            store.get_many([key, "mine"]),
            store.scan(key),
            store.get_and_touch(key, 60),
            store.update(key, lambda _: b"never"),
            store.compare_and_swap(key, b"secret", b"never"),
            store.compare_and_delete(key, b"secret"),
            store.get_and_delete(key),
            store.get_string(key),
        )
        for read in reads:
            with pytest.raises(DecodingError, match=repr(key)) as caught:
                await read
            assert "secret" not in str(caught.value)
            assert "plaintext" not in str(caught.value)
    assert peer.keys() == {"mine", "other", "plain"}
    assert await store.get("mine") == b"secret"
    async with store.transaction() as tx:
        with pytest.raises(DecodingError):
            await tx.get("other")
        assert await tx.get("mine") == b"secret"
        await tx.set("after", b"1")
    assert await store.get("after") == b"1"


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_pipeline_with_one_that_does_not_open(
    make_store: Any, peer: Peer, *, atomic: bool
) -> None:
    """Its handle raises; the others have happened, once."""
    store = await make_store(transforms=[Zstd(), AesGcmSiv({2: NEW}, plain_integers=True)])
    await store.set("bad", b"x")
    peer.run("UPDATE kv_store SET value = 'plaintext' WHERE key = 'bad'")
    async with store.pipeline(atomic=atomic) as pipe:
        first = pipe.increment("n")
        bad, many = pipe.get("bad"), pipe.get_many(["bad"])
        second = pipe.increment("n")
    assert (first.result(), second.result()) == (1, 2)
    for handle in (bad, many):
        with pytest.raises(DecodingError, match="'bad'"):
            handle.result()
    assert await store.get("n") == b"2"


@pytest.mark.parametrize("variant", ["async"], indirect=True)
async def test_a_turn_with_one_that_does_not_open(make_store: Any, peer: Peer) -> None:
    """With coalesce=True only its own caller gets the error."""
    store = await make_store(coalesce=True, transforms=AFTER)
    await store.set_many({"bad": b"x", "a": b"1", "b": b"2"})
    peer.run("UPDATE kv_store SET value = 'plaintext' WHERE key = 'bad'")
    found = await gather(store.get("a"), store.get("bad"), store.get("b"))
    assert (found[0], found[2]) == (b"1", b"2")
    assert isinstance(found[1], DecodingError)
    plain = store.table("kv_store", transforms=[Zstd()])
    found = await gather(*(plain.get("bad") for _ in range(3)), store.get("a"))
    assert found == [b"plaintext"] * 3 + [b"1"]


async def test_a_cached_value_that_does_not_open(make_store: Any, variant: Variant) -> None:
    """Is a miss: after the old key has gone the function is called again."""
    calls: list[int] = []
    for transforms in (BEFORE, BOTH, AFTER, AFTER):
        store = await make_store(transforms=transforms)

        @cached_in(variant, store, name=f"encrypted-{variant.name}")
        async def value() -> int:
            calls.append(1)
            return 7

        assert await value() == 7
    assert len(calls) == 2


async def test_patterns_that_would_keep_plaintext_refuse(make_store: Any, variant: Variant) -> None:
    """Jobs and stored results are not encrypted: a store that encrypts is refused."""
    store = await make_store(transforms=AFTER)
    for kind, args in (("Queue", ("q",)), ("Idempotency", ())):
        with pytest.raises(ConfigError, match=r"does not encrypt .* transforms=\[\]"):
            variant.make(kind, store, *args)
        variant.make(kind, store.table("kv_store", transforms=[]), *args)
    lock = variant.make("Lock", store, "l")
    async with lock.acquire():
        pass
    limiter = variant.make("RateLimiter", store, "2/minute", name="l", timeout=20)
    assert (await limiter.hit("k")).allowed
    await store.set("mine", TEXT)
    rows = {row.key: row.value for row in await store.scan()}
    assert rows.pop("mine") == TEXT
    assert [key.startswith("pgkv:rate:") for key in rows] == [True]
    assert await store.rewrite() == 0


# -- sessions


async def test_session_data_is_encrypted(make_sessions: Any, peer: Peer) -> None:
    """Values are unreadable in the table, and merged key by key as always, also by a rotation."""
    sessions = await make_sessions({"transforms": AFTER})
    session = await sessions.create({"name": "secret", "n": 1}, user_id="u")
    other = await sessions.load(session.id)
    session.data["n"] = 2
    other.data["cart"] = ["secret", 1e22]
    await sessions.save(session)
    await sessions.save(other)
    await sessions.rotate(other)
    found = (await sessions.load(other.id)).data
    assert found == {"name": "secret", "n": 2, "cart": ["secret", 1e22]}
    (data,) = peer.run("SELECT data::text FROM kv_store_sessions WHERE successor IS NULL")[0]
    assert "secret" not in data
    assert data.count("AHBr") == 3


@pytest.mark.parametrize(
    "change",
    [
        "data = jsonb_build_object('role', data->'name')",
        'data = data || \'{"role": "\\"admin\\""}\'',
        "data = jsonb_set(data, '{name}', to_jsonb(overlay(data->>'name' placing "
        "CASE substr(data->>'name', 40, 1) WHEN 'x' THEN 'y' ELSE 'x' END from 40)))",
        'data = \'{"name": "AHBr"}\'',
        "data = '[]'",
    ],
    ids=["moved", "plain", "changed", "cut", "foreign"],
)
async def test_a_session_that_does_not_open(
    make_sessions: Any, peer: Peer, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """Belongs to no one, and is logged without its data."""
    sessions = await make_sessions({"transforms": AFTER})
    session = await sessions.create({"name": "secret"})
    peer.run(f"UPDATE kv_store_sessions SET {change}")
    assert await sessions.load(session.id) is None
    assert "pgkv.session.unreadable" in caplog.text
    assert "secret" not in caplog.text


async def test_keys_of_sessions_rotate(make_sessions: Any) -> None:
    """The old key reads while it is given; without it a session is over. read_plain takes over what was
    there before."""
    plain = await (await make_sessions()).create({"k": [1]})
    reading = await make_sessions({"transforms": [AesGcmSiv({1: OLD}, read_plain=True)]})
    session = await reading.load(plain.id)
    assert session.data == {"k": [1]}
    session.data["k"] = [2]
    await reading.save(session)
    assert (await (await make_sessions({"transforms": BOTH})).load(plain.id)).data == {"k": [2]}
    assert await (await make_sessions({"transforms": AFTER})).load(plain.id) is None


# -- rotation


async def test_rotation(make_store: Any, peer: Peer) -> None:
    """rewrite brings every value to the present form, keeps version, times and expiry, and has nothing to do
    the second time."""
    old = await make_store(transforms=BEFORE)
    await old.set_many({f"k{n:03}": b"%d" % n * 200 for n in range(250)})
    await old.set("k-ttl", TEXT, ttl=1000)
    await old.namespace("other:").set("k", b"stays")
    before = peer.run(
        "SELECT key, version, expires_at, created_at, updated_at FROM kv_store ORDER BY key"
    )
    new = await make_store(transforms=BOTH)
    heard: list[int] = []
    assert await new.rewrite("k", batch=100, progress=heard.append) == 251
    assert heard == [100, 200, 251]
    assert await new.rewrite("k") == 0
    assert (
        peer.run(
            "SELECT key, version, expires_at, created_at, updated_at FROM kv_store ORDER BY key"
        )
        == before
    )
    last = await make_store(transforms=AFTER)
    found = await last.get_many([f"k{n:03}" for n in range(250)])
    assert found == {f"k{n:03}": b"%d" % n * 200 for n in range(250)}
    with pytest.raises(DecodingError, match="key 1, which is not given"):
        await last.get("other:k")
    assert await new.namespace("other:").rewrite() == 1
    assert await last.get("other:k") == b"stays"


SETTINGS = """
import pgkv
OLD = [pgkv.AesGcmSiv({1: b"1" * 32})]
NEW = [pgkv.AesGcmSiv({2: b"2" * 32, 1: b"1" * 32})]
WRONG = [pgkv.AesGcmSiv({2: b"2" * 32})]
"""


def test_rotation_from_the_shell(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pgkv rewrite takes the transforms from the program; an error shows no key and no value."""
    cli = pytest.importorskip("pgkv.cli")
    (tmp_path / "rotating.py").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    with pgkv.Store.connect(dsn, transforms=BEFORE) as store:
        store.set_many({"a": "secret", "b": "secret", "other": "secret"})
    command = ["rewrite", "--dsn", dsn]
    assert cli.main([*command, "rotating:WRONG"]) == 1
    text = "".join(capsys.readouterr())
    assert "the value of 'a' cannot be read: it is encrypted with key 1, which is not given" in text
    assert "secret" not in text
    assert "2222" not in text
    assert cli.main([*command, "rotating:NEW", "--prefix", "a", "--json"]) == 0
    assert capsys.readouterr().out == '{"rewritten": 1}\n'
    assert cli.main([*command, "rotating:NEW"]) == 0
    assert capsys.readouterr().out == "rewrote 2 values\n"
    for wrong in ("rotating", "rotating:NONE", "rotating:SETTINGS"):
        assert cli.main([*command, wrong]) == 2
    with pgkv.Store.connect(dsn, transforms=AFTER) as store:
        assert store.get_many(["a", "b", "other"]) == dict.fromkeys(("a", "b", "other"), b"secret")


async def test_turned_on_while_there_are_values(make_store: Any) -> None:
    """read_plain reads what is there; after rewrite it can go. Numbers and limiters stay plain."""
    plain = await make_store()
    await plain.set_many({"a": TEXT, "b": b"short", "n": b"41"})
    limiter = plain.namespace("pgkv:rate:").set("x", b"1 2")
    await limiter
    cipher = AesGcmSiv({1: OLD}, read_plain=True, plain_integers=True)
    store = await make_store(transforms=[cipher])
    assert await store.increment("n") == 42
    assert await store.rewrite() == 2
    strict = await make_store(transforms=[AesGcmSiv({1: OLD}, plain_integers=True)])
    assert await strict.get_many(["a", "b", "n"]) == {"a": TEXT, "b": b"short", "n": b"42"}
    assert await plain.get("pgkv:rate:x") == b"1 2"


async def test_compression_turned_on_and_off(make_store: Any) -> None:
    """rewrite compresses what is long, and with a min_size that no value has makes all of it plain again."""
    plain = await make_store()
    await plain.set_many({"long": TEXT, "short": b"x"})
    assert await (await make_store(transforms=[Zstd()])).rewrite() == 1
    assert len(await plain.get("long")) < 100
    assert await (await make_store(transforms=[Zstd(min_size=1 << 30)])).rewrite() == 1
    assert await plain.get_many(["long", "short"]) == {"long": TEXT, "short": b"x"}


async def test_rows_that_do_not_open(make_store: Any, peer: Peer) -> None:
    """Are left as they are, and raised when the others are done."""
    old = await make_store(transforms=BEFORE)
    await old.set_many({"a": b"1", "b": b"2", "c": b"3"})
    peer.run("UPDATE kv_store SET value = value || 'x' WHERE key = 'b'")
    new = await make_store(transforms=BOTH)
    with pytest.raises(DecodingError, match="'b'"):
        await new.rewrite(batch=1)
    assert await (await make_store(transforms=AFTER)).get_many(["a", "c"]) == {"a": b"1", "c": b"3"}
    with pytest.raises(ConfigError, match="no transforms"):
        await (await make_store()).rewrite()
    with pytest.raises(pgkv.InvalidValueError, match="batch"):
        await new.rewrite(batch=0)


async def test_a_locked_row_waits_for_its_owner(make_store: Any, peer: Peer, witness: Peer) -> None:
    """A row that another client holds is rewritten when that ends, or left where that has written it."""
    old = await make_store(transforms=BEFORE)
    await old.set_many({"a": b"1", "b": b"2", "c": b"3"})
    new = await make_store(transforms=BOTH)
    with peer.conn.transaction():
        peer.run("SELECT FROM kv_store WHERE key = 'b' FOR UPDATE")
        rewriting = asyncio.ensure_future(new.rewrite())
        await witness.until_waiting()
        assert [k for k in "ac" if (await new.get_entry(k)).transforms == ("aes:2",)] == ["a", "c"]
    assert await rewriting == 3


async def test_a_write_between_reading_and_replacing(
    make_store: Any, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rewrite does not put what it read over what was written meanwhile."""
    old = await make_store(transforms=BEFORE)
    await old.set_many({"a": b"1", "b": b"2", "c": b"3"})
    new = await make_store(transforms=BOTH)
    again = TransformedStatements.again
    with pgkv.Store.connect(dsn, transforms=BOTH) as other:

        def late(sql: TransformedStatements, row: StoredRow) -> bytes | None:
            if row.key == b"b":
                other.set("b", b"newer")
            return again(sql, row)

        monkeypatch.setattr(TransformedStatements, "again", late)
        assert await new.rewrite() == 2
    assert await new.get_many(["a", "b", "c"]) == {"a": b"1", "b": b"newer", "c": b"3"}


async def test_rotation_under_a_storm(make_store: Any) -> None:
    """Writers lose no update while the keys are rotated forth and back, and every value opens with the last
    key alone."""
    keys = [f"k{n}" for n in range(20)]
    stores = [
        await make_store(transforms=[AesGcmSiv({first: secrets[first], **secrets})])
        for secrets in [{1: OLD, 2: NEW}]
        for first in (2, 1)
    ]
    await stores[1].set_many(dict.fromkeys(keys, b"0"))
    done = asyncio.Event()

    async def write(number: int) -> int:
        count = 0
        while not done.is_set():
            key = keys[(count + 5 * number) % len(keys)]
            await stores[number % 2].update(key, lambda raw: b"%d" % (int(raw) + 1))
            count += 1
        return count

    async def rotate() -> None:
        try:
            for turn in range(200 if FULL else 12):
                await stores[turn % 2].rewrite(batch=7)
        finally:
            done.set()

    writers = [asyncio.ensure_future(write(number)) for number in range(4)]
    await rotate()
    counts = await asyncio.gather(*writers)
    assert min(counts) > 0
    await stores[0].rewrite()
    found = await (await make_store(transforms=AFTER)).get_many(keys)
    assert sum(map(int, found.values())) == sum(counts)


async def test_expired_rows_are_left(make_store: Any, clock: ServerClock) -> None:
    """rewrite does not touch a key that is over."""
    old = await make_store(transforms=BEFORE, ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.MANUAL)
    await old.set("k", b"v", ttl=60)
    clock.advance(61)
    new = await make_store(transforms=BOTH, ttl_cleanup_strategy=pgkv.TtlCleanupStrategy.MANUAL)
    assert await new.rewrite() == 0
    assert await new.compare_and_swap("k", b"v", b"w") == pgkv.CasResult(
        pgkv.CasStatus.NOT_FOUND, None, None
    )


@pytest.mark.parametrize("transforms", [[Zstd(min_size=0)], AFTER], ids=["zstd", "both"])
async def test_swaps_of_many(make_store: Any, transforms: Any) -> None:
    """Of swaps from one value one succeeds; a chain of them counts exactly."""
    store = await make_store(transforms=transforms)
    await store.set("n", b"0")

    async def add() -> None:
        for _ in range(10):
            while True:
                current = await store.get("n")
                if await store.compare_and_swap("n", current, b"%d" % (int(current) + 1)):
                    break

    await asyncio.gather(*(add() for _ in range(4)))
    assert await store.get("n") == b"40"
    answers = await asyncio.gather(*(store.compare_and_delete("n", b"40") for _ in range(8)))
    assert sorted(answers) == [False] * 7 + [True]
