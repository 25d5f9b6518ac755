"""A store over slots on several servers: where its operations go, and what it refuses.

The servers are databases of one server. What happens when slots move is in test_sharded_moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import secrets
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgkv
from pgkv.cli import main
from pgkv.integrations.dashboard import dashboard
from pgkv.patterns.overview import Overviews
from tests import FULL, sharded
from tests.cached import PATIENT
from tests.faults.support import until
from tests.peers import caller_connection
from tests.servers import Server, UserServer
from tests.variants import Variant, closing_all, inside

SLOTS = 6


@pytest.fixture(scope="module")
def dsns(server: Server | UserServer) -> list[str]:
    """Three servers with six slots."""
    if isinstance(server, UserServer):
        pytest.skip("makes databases: not on the server of PGKV_TEST_DSN")
    made = sharded.databases(server.dsn, [f"n_{secrets.token_hex(4)}" for _ in range(3)])
    sharded.init(made, SLOTS)
    return made


@pytest.fixture
def make(
    dsns: list[str], variant: Variant, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """`await make()` is a sharded store."""
    with closing_all(event_loop_runner) as made:

        async def connect(**config: Any) -> Any:
            made.append(await sharded.connect(variant, config.pop("dsns", dsns), **config))
            return made[-1]

        yield connect
    sharded.clear(dsns)


@pytest.fixture
def store(make: Callable[..., Coroutine[Any, Any, Any]], event_loop_runner: asyncio.Runner) -> Any:
    """A sharded store with the default settings."""
    return event_loop_runner.run(make())


def rows(dsns: list[str]) -> dict[str, tuple[int, int]]:
    """Of each key of the store's table the server and the slot that have it."""
    found: dict[str, tuple[int, int]] = {}
    for number, dsn in enumerate(dsns):
        with psycopg.connect(dsn) as conn:
            names = conn.execute(
                "SELECT schemaname FROM pg_tables WHERE schemaname ~ '^pgkv_[0-9]+$' "
                "AND tablename = 'kv_store'"
            ).fetchall()
            for (name,) in names:
                for (key,) in conn.execute(f"SELECT key FROM {name}.kv_store"):
                    assert key not in found, "in two slots"
                    found[key] = number, int(name.removeprefix("pgkv_"))
    return found


async def test_each_key_is_in_its_slot(store: Any, dsns: list[str]) -> None:
    """Written singly, in a batch, in a pipeline, through a namespace or an update."""
    await store.set("a", "1")
    await store.set_many({f"b{n}": "2" for n in range(20)})
    async with store.pipeline() as p:
        for n in range(20):
            p.set(f"c{n}", "3")
    await store.update("d", lambda _: b"4")
    await store.namespace("ns:").set("e", "5")
    await store.load((f"f{n}", "6") for n in range(20))
    found = rows(dsns)
    assert len(found) == 63
    assert {server for server, _ in found.values()} == {0, 1, 2}
    for key, (_, slot) in found.items():
        assert store.slot_of(key) == slot
    assert store.namespace("ns:").slot_of("e") == store.slot_of("ns:e")
    assert len(await store.get_many(found)) == 63


async def test_tags_keep_keys_together(store: Any) -> None:
    """{user:7} decides, so that they can be changed in one transaction."""
    keys = [f"{{user:7}}:{name}" for name in ("cart", "seen", "name")]
    assert {store.slot_of(key) for key in keys} == {store.slot_of("user:7")}
    async with store.on(keys[0]).transaction() as tx:
        for key in keys:
            await tx.set(key, "x")
    async with store.pipeline(atomic=True) as p:
        handles = [p.increment(f"{key}:n") for key in keys]
    assert [handle.result() for handle in handles] == [1, 1, 1]
    assert await store.exists_many(keys) == set(keys)

    async def work(tx: Any) -> int:
        return int(await tx.increment("{user:7}:visits"))

    assert await store.on("user:7").run_transaction(work) == 1


async def test_what_is_refused(store: Any, dsns: list[str], variant: Variant) -> None:
    """Nothing is sent of what one transaction cannot have, and the message says what to do."""
    a, b = "a", next(key for key in "bcdefgh" if store.slot_of(key) != store.slot_of("a"))
    message = (
        f"'{b}' is in slot {store.slot_of(b)}, this .* slot {store.slot_of(a)}: give both keys one"
    )

    async def both() -> None:
        async with store.pipeline(atomic=True) as p:
            p.set(a, "1")
            p.set(b, "1")

    with pytest.raises(pgkv.ConfigError, match=message):
        await both()
    async with store.on(a).transaction() as tx:
        await tx.set(a, "1")
        with pytest.raises(pgkv.ConfigError, match=message):
            await tx.get(b)
    await store.delete(a)
    with pytest.raises(pgkv.ConfigError, match=r"transaction is of one: use store.on\(key\)"):
        async with store.transaction():
            pass
    with pytest.raises(pgkv.ConfigError, match=r"connection is of one: use store.on\(key\)"):
        store.using(None)
    with pytest.raises(pgkv.ConfigError, match="watch: a sharded store has several servers"):
        inside(store).watch("k")
    with pytest.raises(pgkv.ConfigError, match="no notify="):
        store.namespace("n:", notify=True)
    with pytest.raises(pgkv.ConfigError, match="several DSNs"):
        _ = store.dsn
    with pytest.raises(pgkv.ConfigError, match="only slot"):
        store.on(a).on(b)
    with pytest.raises(pgkv.ConfigError, match="no schema="):
        store.table("t", schema="s")
    owner = {slot: number for number, slot in rows(dsns).values()}
    assert owner == {}
    with psycopg.connect(store.on(a).dsn) as conn:
        here = conn.info.dbname
    elsewhere = next(dsn for dsn in dsns if here not in dsn)
    conn = await caller_connection(variant, elsewhere)
    try:
        with pytest.raises(
            pgkv.ConfigError, match=f"not to the one that has slot {store.slot_of(a)}"
        ):
            store.on(a).using(conn)
    finally:
        await conn.close()


async def test_in_the_callers_transaction(store: Any, variant: Variant) -> None:
    """On a connection to the slot's server, whose DSN the slot's store tells."""
    conn = await caller_connection(variant, store.on("k").dsn)
    try:
        async with conn.transaction():
            await store.on("k").using(conn).set("k", "1")
            assert await store.get("k") is None
        assert await store.get("k") == b"1"
    finally:
        await conn.close()


async def test_scans_are_merged(store: Any) -> None:
    """In the order of keys over all slots, with limits, offsets and pages."""
    keys = sorted(f"k{n:02d}" for n in range(30))
    await store.set_many(dict.fromkeys(keys, "v"))
    assert await store.keys() == keys
    assert await store.keys(limit=4, offset=3) == keys[3:7]
    for wrong in ({"limit": "4"}, {"limit": -1, "offset": 2}, {"limit": 4, "offset": None}):
        with pytest.raises(pgkv.InvalidValueError, match="must be an integer of 0 or more"):
            await store.keys(**wrong)
    assert [row.key for row in await store.scan("k1", after="k12")] == keys[13:20]
    assert [key async for key in store.iter_keys(page_size=7)] == keys
    assert await store.count("k2") == 10
    assert (await store.stats()).total_keys == 30
    assert await store.delete_prefix("k0") == 10
    await store.truncate()
    assert await store.count() == 0


async def test_bounds_are_shared_out(make: Callable[..., Coroutine[Any, Any, Any]]) -> None:
    """Each slot keeps its part of max_entries, and at least 100."""
    store = await make(max_entries=1200, table_name="bounded")
    await store.load((f"k{n}", "v") for n in range(2400))
    await store.evict()
    found = await store.stats()
    assert found.total_keys <= 1200
    assert found.max_entries == 1200
    await store.recreate_table()
    other = store.table("bounded_too", max_entries=1800)
    await other.load((f"k{n}", "v") for n in range(2400))
    await other.evict()
    found = await other.stats()
    assert found.total_keys <= 1800
    assert found.max_entries == 1800
    await other.recreate_table()
    few = store.table("bounded_few", max_entries=100, max_bytes=1 << 20)
    found = await few.stats()
    assert (found.max_entries, found.max_bytes) == (SLOTS * 100, SLOTS << 20)
    await few.recreate_table()


async def test_a_batch_is_whole_on_each_server(store: Any, dsns: list[str]) -> None:
    """What one server refuses has not happened there, in none of its slots; the others have done their part."""
    keys = [f"k{n}" for n in range(30)]
    await store.set_many(dict.fromkeys(keys, "0"))
    places = rows(dsns)
    refused = places[keys[0]][0]
    await store.set(keys[0], "no number")
    with pytest.raises(pgkv.InvalidValueError):
        await store.increment_many(dict.fromkeys(keys, 1))
    slots: set[int] = set()
    for key, value in (await store.get_many(keys[1:])).items():
        server, slot = places[key]
        assert value == (b"0" if server == refused else b"1")
        slots |= {slot} if server == refused else set()
    assert len(slots) == 2


async def test_sweeps_reach_every_slot(store: Any) -> None:
    """cleanup_expired collects in all of them, and keeps to its limit."""
    await store.set_many({f"k{n}": "v" for n in range(30)}, ttl=0.001)
    await asyncio.sleep(0.01)
    assert await store.cleanup_expired(limit=7) == 7
    assert await store.cleanup_expired() == 23


async def test_servers_are_asked_at_the_same_time(store: Any, dsns: list[str]) -> None:
    """A batch whose rows are locked on all servers waits on all of them at once."""
    keys = [f"k{n}" for n in range(20)]
    await store.set_many(dict.fromkeys(keys, "v"))
    waiting = (
        "SELECT count(DISTINCT datname) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = ANY (%s)"
    )
    with contextlib.ExitStack() as stack:
        conns = [stack.enter_context(psycopg.connect(dsn)) for dsn in dsns]
        for number, conn in enumerate(conns):
            for slot in range(2):
                conn.execute(f"SELECT FROM pgkv_{2 * number + slot:02d}.kv_store FOR UPDATE")
        batch = asyncio.ensure_future(store.set_many(dict.fromkeys(keys, "w")))
        try:
            look = stack.enter_context(psycopg.connect(dsns[0], autocommit=True))
            names = [conn.info.dbname for conn in conns]
            await until(
                lambda: look.execute(waiting, [names]).fetchone() == (3,), "it waits on all three"
            )
        finally:
            for conn in conns:
                conn.rollback()
            assert await batch == 20


async def test_tables_are_made_where_slots_live(
    make: Callable[..., Coroutine[Any, Any, Any]], dsns: list[str]
) -> None:
    """When one is missing, as on a single server, and never a schema."""
    store = await make()
    table = store.table("extra")
    await table.set_many({f"k{n}": "v" for n in range(20)})
    assert await table.count() == 20
    for dsn in dsns:
        with psycopg.connect(dsn, autocommit=True) as conn:
            schemas = conn.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ '^pgkv_'")
            assert len(schemas.fetchall()) == SLOTS / 3 + 1  # and the map
            conn.execute("DO $$ DECLARE n text; BEGIN FOR n IN SELECT schemaname FROM pg_tables "
                         "WHERE tablename = 'extra' LOOP EXECUTE format('DROP TABLE %I.extra', n); "
                         "END LOOP; END $$")  # fmt: skip
    assert await table.get("k1") is None
    await table.set("k1", "v")
    async with table.on("k1").transaction() as tx:
        await tx.set("k1", "w")
    never = await make(auto_create_table=False)
    with pytest.raises(pgkv.TableNotFoundError, match="other"):
        await never.table("other").set("k", "v")


async def test_limiters_are_in_the_slots_of_their_keys(store: Any, variant: Variant) -> None:
    """Each bucket is a key; several are charged together where a tag keeps them together."""
    limiter = variant.make("RateLimiter", store, "1/h", name="n")
    assert [(await limiter.hit(f"k{n}")).allowed for n in range(12)] == [True] * 12
    assert not (await limiter.hit("k3")).allowed
    other = variant.make("RateLimiter", store, "2/h", name="m")
    both = [(limiter, "{o}a", 1), (other, "{o}", 2)]
    assert (await limiter.hit_many(both)).allowed
    assert not (await limiter.hit_many(both)).allowed
    with pytest.raises(pgkv.ConfigError, match=r"this hit_many is in slot \d: give both keys one"):
        await limiter.hit_many([(other, f"k{n}", 1) for n in range(12)])
    assert (await other.peek("k0")).remaining == 2
    conn = await caller_connection(variant, store.on("{o}").dsn)
    try:
        inside = variant.make("RateLimiter", store.on("{o}"), "1/h", name="i").using(conn)
        async with conn.transaction():
            assert (await inside.hit("{o}b")).allowed
            with pytest.raises(pgkv.ConfigError, match="give both keys one"):
                await inside.hit("k0" if store.slot_of("k0") != store.slot_of("o") else "k1")
    finally:
        await conn.close()


async def test_names_have_their_slots(store: Any, variant: Variant) -> None:
    """A lock, a semaphore and a queue are in the slot of their name, and nowhere else."""
    lock = variant.make("Lock", store, "job")
    async with lock.acquire() as lease:
        token = lease.token
        assert await variant.make("Lock", store.on("job"), "job").try_acquire() is None
    async with lock.acquire() as lease:
        assert lease.token > token
    many = [variant.make("Lock", store, f"l{n}") for n in range(8)]
    async with await variant.make("Lock", store, "l").acquire_many(many):
        assert await many[3].try_acquire() is None
    assert (await many[3].holder()) is None
    elsewhere = next(key for key in "abcdef" if store.slot_of(key) != store.slot_of("job"))
    for name in ("Lock", "Queue"):
        with pytest.raises(pgkv.ConfigError, match="'job' is in slot"):
            variant.make(name, store.on(elsewhere), "job")
    queue = variant.make("Queue", store, "job")
    await queue.create_table()
    async with store.on("job").transaction() as tx:
        await queue.using(tx).put("a")
    async with store.on(elsewhere).transaction() as tx:
        with pytest.raises(pgkv.ConfigError, match="'job' is in slot"):
            await queue.using(tx).put("a")
    job = await queue.take()
    assert job.payload == b"a"
    await job.ack()


async def test_idempotency_keys_have_their_slots(store: Any, variant: Variant) -> None:
    """A key's work is done once, from wherever it is asked; in a transaction of the key's slot too."""
    idem = variant.make("Idempotency", store)
    await idem.create_table()
    for n in range(12):
        async with idem.once(f"{{k{n}}}", scope="s") as attempt:
            assert not attempt.is_replay
            attempt.result = b"%d" % n
    here = variant.make("Idempotency", store.on("k7"))
    async with here.once("{k7}", scope="s") as attempt:
        assert attempt.is_replay
    assert (await here.get("{k7}", scope="s")).result == b"7"
    with pytest.raises(pgkv.ConfigError, match="give both keys one"):
        await here.get("{k0}" if store.slot_of("k0") != store.slot_of("k7") else "{k1}")
    async with store.on("k0").transaction() as tx:
        inside = variant.make("Idempotency", tx)
        async with inside.once("{k0}:again") as attempt:
            attempt.result = b"in"
    assert await idem.forget("{k0}:again")
    assert await idem.purge() == 1


async def test_sessions_have_the_slots_of_their_tokens(
    store: Any, variant: Variant, dsns: list[str]
) -> None:
    """A rotation stays in the slot; a user's sessions are found in all of them."""
    sessions = variant.make("SessionStore", store)
    made = [await sessions.create({"n": n}, user_id="u") for n in range(20)]
    for each in made[:10]:
        old = each.id
        await sessions.rotate(each)
        assert (await sessions.load(old)).data == (await sessions.load(each.id)).data
    found = await sessions.list_user("u")
    assert len(found) == 20
    assert [each.seen_at for each in found] == sorted((e.seen_at for e in found), reverse=True)
    assert await sessions.destroy(made[3])
    assert await sessions.destroy_user("u", keep=made[0]) == 18
    assert [(await sessions.load(each.id)) is not None for each in made] == [True] + [False] * 19
    with pytest.raises(pgkv.ConfigError, match="sessions are in the slots of their tokens"):
        variant.make("SessionStore", store.on("a"))
    assert len(dsns) == 3


async def test_tags_and_functions_begin_anew_in_every_slot(store: Any, variant: Variant) -> None:
    """invalidate_tag and cache_clear reach entries wherever they are, and listeners on every server."""
    calls: list[int] = []

    def square(n: int) -> int:
        calls.append(n)
        return n * n

    async def square_later(n: int) -> int:
        return square(n)

    level = pgkv.L1(max_entries=100, ttl=600)
    options: dict[str, Any] = {"ttl": 600, "tags": ["t"], "l1": level, "beta": 0, **PATIENT}
    if variant.name == "async":
        here = pgkv.cached(store=store, **options)(square_later)
        ask: Any = here
        invalidate: Any = functools.partial(pgkv.invalidate_tag, "t", store=store)
        clear: Any = here.cache_clear
    else:
        blocking = pgkv.cached(store=store._target, **options)(square)
        in_thread: Any = asyncio.to_thread
        ask = functools.partial(in_thread, blocking)
        invalidate = functools.partial(in_thread, pgkv.invalidate_tag, "t", store=store._target)
        clear = functools.partial(in_thread, blocking.cache_clear)
    for _ in range(2):
        assert [await ask(n) for n in range(15)] == [n * n for n in range(15)]
    assert len(calls) == 15
    await invalidate()
    assert [await ask(n) for n in range(15)] == [n * n for n in range(15)]
    assert len(calls) == 30
    await clear()
    await ask(3)
    assert len(calls) == 31


async def test_it_says_where_slots_are(store: Any) -> None:
    """shards() tells the server, the state and the size of each."""
    found = await store.shards()
    assert [shard.slot for shard in found] == [*range(SLOTS)]
    assert [shard.node for shard in found] == ["n1", "n1", "n2", "n2", "n3", "n3"]
    assert all(shard.state == "live" and shard.bytes > 0 for shard in found)
    assert "3" in repr(store) or "kv_store" in repr(store)
    assert (await store.ping()) > 0
    assert store.pool_stats().max_size == 30


async def test_servers_of_no_store(
    make: Callable[..., Coroutine[Any, Any, Any]], dsns: list[str], server: Server
) -> None:
    """Without slots, with another number of them, or given twice, they are refused."""
    with pytest.raises(pgkv.ConfigError, match="6 slots, not 32"):
        await make(slots=32)
    with pytest.raises(pgkv.ConfigError, match="two of the DSNs lead to"):
        await make(dsns=[*dsns, dsns[0]])
    with pytest.raises(pgkv.ConfigError, match="is not among the DSNs"):
        await (await make(dsns=dsns[:2])).set_many({f"k{n}": "" for n in range(20)})
    with pytest.raises(pgkv.ConfigError, match="pgkv shards init"):
        await make(dsns=[server.dsn])


MANY = st.sampled_from([f"{tag}{name}" for tag in ("", "{t}", "{u}") for name in "abcd"])


@settings(max_examples=60 if FULL else 12)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("set"), MANY),
            st.tuples(st.just("delete"), MANY),
            st.tuples(st.just("increment_many"), st.lists(MANY, min_size=1, max_size=6)),
            st.tuples(st.just("set_many"), st.lists(MANY, min_size=1, max_size=6)),
            st.tuples(st.just("delete_many"), st.lists(MANY, min_size=1, max_size=6)),
            st.tuples(st.just("pipeline"), st.lists(MANY, min_size=1, max_size=6)),
        ),
        max_size=12,
    )
)
def test_it_is_a_dict(dsns: list[str], steps: list[tuple[str, Any]]) -> None:
    """Whatever is done to keys with and without tags, it holds what a dict would."""
    model: dict[str, bytes] = {}
    with pgkv.Store.sharded(dsns, pool_min_size=0) as store:
        store.clear()
        for number, (action, given_) in enumerate(steps):
            value = b"%d" % number
            if action == "set":
                store.set(given_, value)
                model[given_] = value
            elif action == "delete":
                assert store.delete(given_) == (model.pop(given_, None) is not None)
            elif action == "set_many":
                assert store.set_many(dict.fromkeys(given_, value)) == len(set(given_))
                model.update(dict.fromkeys(given_, value))
            elif action == "delete_many":
                assert store.delete_many(given_) == len(model.keys() & set(given_))
                for key in given_:
                    model.pop(key, None)
            elif action == "increment_many":
                sums = store.increment_many(dict.fromkeys(given_, 3))
                model.update({key: b"%d" % (int(model.get(key, 0)) + 3) for key in set(given_)})
                assert sums == {key: int(model[key]) for key in set(given_)}
            else:
                with store.pipeline() as p:
                    handles = [(key, p.append(key, b"7"), p.get(key)) for key in given_]
                for key, _, _ in handles:
                    model[key] = model.get(key, b"") + b"7"
                last = {key: got.result() for key, _, got in handles}
                assert last == {key: model[key] for key in last}
            assert dict(store.scan()) == model
            assert store.get_many([*model, "none"]) == model
            assert store.keys() == sorted(model)


def test_the_command(dsns: list[str], server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """`pgkv shards` lists, makes and checks; run again it changes nothing."""
    made = sharded.databases(server.dsn, [f"n_{secrets.token_hex(4)}" for _ in range(2)])
    both = " ".join(
        f"postgresql:///{name}?host={host}&port={port}&user={user}"
        for name, host, port, user in map(parts_of, made)
    )

    def run(*args: str) -> tuple[int, list[Any]]:
        code = main(["shards", *args, "--dsn", both, "--json"])
        return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    assert run()[0] == 2
    assert run("init", "--slots", "3") == (0, [{"made": 3, "slots": 3, "servers": ["n1", "n2"]}])
    assert run("init") == (0, [{"made": 0, "slots": 3, "servers": ["n1", "n2"]}])
    assert run("init", "--slots", "4")[0] == 2
    assert run("check") == (0, [])
    assert run("move", "0-1", "--to", "n2") == (0, [{"moved": 2}])
    assert run("move", "0", "--to", "n2") == (0, [{"moved": 0}])
    assert run("move", "0,1", "--to", "n1") == (0, [{"moved": 2}])
    assert run("move", "0", "--to", "n2", "--online") == (0, [{"moved": 1}])
    assert run("move", "0", "--to", "n1", "--drop")[0] == 2  # it asks, and no person is there
    assert run("move", "0", "--to", "n1", "--drop", "--yes") == (0, [{"moved": 1}])
    for wrong in (
        ("move", "x", "--to", "n1"),
        ("move", "0"),
        ("move", "0", "--to", "n9"),
        ("check", "0"),
        ("check", "--online"),
        ("move", "0", "--to", "n1", "--online", "--drop"),
    ):
        assert run(*wrong)[0] == 2
    assert run("resume") == (0, [{"moved": 0}])
    code, found = run()
    assert (code, [each["node"] for each in found]) == (0, ["n1", "n1", "n2"])
    with psycopg.connect(made[0], autocommit=True) as conn:
        conn.execute("ALTER SCHEMA pgkv_00 RENAME TO pgkv_00_out")
    code, found = run("check")
    assert (code, "interrupted" in found[0]["problem"]) == (1, True)
    assert run("init")[0] == 0  # which leaves it alone
    assert run("resume")[0] == 2  # no move leaves that
    assert run("check")[0] == 1


def parts_of(dsn: str) -> tuple[str, ...]:
    found = psycopg.conninfo.conninfo_to_dict(dsn)
    return tuple(str(found.get(name)) for name in ("dbname", "host", "port", "user"))


def test_an_overview_is_of_one_slot(dsns: list[str]) -> None:
    """The figures of `pgkv top` and of the dashboard are of one server: a sharded store says which to give."""
    with pgkv.Store.sharded(dsns) as store:
        with pytest.raises(pgkv.ConfigError, match=r"store\.on\(key\)"):
            Overviews(store)
        with pytest.raises(pgkv.ConfigError, match=r"store\.on\(key\)"):
            dashboard(store, authorize=lambda _: True)
        store.clear()
        store.set_many({"{a}:1": "x", "{a}:2": "x"})
        one = store.on("{a}:1")
        frame = one._run(Overviews(one).look(), 30.0)
        assert [(each.name, each.rows) for each in frame.keys] == [("{a}:", 2)]
    sharded.clear(dsns)
