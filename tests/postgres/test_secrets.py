"""Nothing that leaves pgkv shows a value, a password, or (above debug) a key."""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import structlog
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pgkv
from tests.peers import Peer
from tests.variants import in_a_hurry, inside

VALUE = "VALUE-1f6c"
PASSWORD = "PASSWORD-9d2e:@/"
KEY = "KEY-77aa"
# A bytea in an error text is hex.
SHAPES = [VALUE, VALUE.encode().hex(), PASSWORD, quote(PASSWORD, safe=""), repr(PASSWORD)]
LOUD = "-c log_parameter_max_length_on_error=-1"  # the server then quotes parameters


def shown(error: BaseException) -> str:
    """Everything that a log, a debugger's prompt or an error tracker would show of it."""
    texts = ["".join(traceback.format_exception(error)), str(error), repr(error), repr(error.args)]
    seen: BaseException | None = error
    while seen is not None:
        # A chain that `from None` hides from the traceback is there for error trackers.
        texts += [str(seen), repr(seen)]
        if isinstance(seen, pgkv.PgkvError):
            texts.append(str(vars(seen)))
        seen = seen.__cause__ or seen.__context__
    return "\n".join(texts)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that pgkv logs, from debug on, through logging."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logger = logging.getLogger("pgkv")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield text
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def loud(make_store: Any, dsn: str) -> Any:
    """`await loud(**config)`: a store whose server quotes parameters, with a marked password."""
    options = f"{conninfo_to_dict(dsn)['options']} {LOUD} -c lock_timeout=100"

    async def make(**config: Any) -> Any:
        marked = make_conninfo(dsn, options=options, password=PASSWORD)
        return await make_store(dsn=marked, **config)

    return make


async def failure(call: Any) -> pgkv.PgkvError:
    with pytest.raises(pgkv.PgkvError) as caught:
        await call
    return caught.value


def assert_silent(text: str, *more: str) -> None:
    for secret in (*SHAPES, *more):
        assert secret not in text, secret


REFUSED: dict[str, Callable[[Any], Any]] = {
    "increment of text": lambda s: s.increment(KEY),
    "increment_many of text": lambda s: s.increment_many({KEY: 1}),
    "constraint": lambda s: s.set("constraint", VALUE),
    "constraint in a batch": lambda s: s.set_many({"constraint": VALUE}),
    "value too large": lambda s: s.set(KEY, VALUE * 1000),
    "value of another type": lambda s: s.set(KEY, [VALUE]),
    "value with a surrogate": lambda s: s.set(KEY, VALUE + "\ud800"),
    "pairs": lambda s: s.set_many([(KEY, VALUE, VALUE)]),
    "not text": lambda s: s.get_string("binary"),
    "expected of another type": lambda s: s.compare_and_swap(KEY, {VALUE}, b""),
    "delta": lambda s: s.increment(KEY, VALUE),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_quote_no_value(loud: Any, peer: Peer, log: io.StringIO, name: str) -> None:
    """Refused values are not shown, by pgkv or by what it passes on of the server."""
    store = await loud(max_value_size=5000)
    await store.set_many({KEY: VALUE, "binary": VALUE.encode() + b"\xff"})
    peer.run(
        "ALTER TABLE kv_store ADD CONSTRAINT c CHECK (key <> 'constraint' OR length(value) = 0)"
    )
    error = await failure(REFUSED[name](store))
    assert_silent(shown(error) + log.getvalue())


@pytest.mark.parametrize("state", ["P0001", "40001", "42501", "ZX123", "57014", "54000", "23514"])
async def test_server_errors_quote_no_value(
    loud: Any, peer: Peer, log: io.StringIO, state: str
) -> None:
    """Whatever SQLSTATE the server gives, its detail and context, which quote rows and parameters,
    stay inside.
    """
    peer.run(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'refused' USING ERRCODE = '" + state + "',"
        " DETAIL = 'row ' || encode(NEW.value, 'escape'), HINT = encode(NEW.value, 'hex'); END $$"
    )
    store = await loud(retry=None)
    peer.run("CREATE TRIGGER f BEFORE INSERT ON kv_store FOR EACH ROW EXECUTE FUNCTION f()")
    error = await failure(store.set(KEY, VALUE))
    assert_silent(shown(error) + log.getvalue(), KEY)
    assert error._sqlstate == state


async def test_lock_time_outs_quote_no_value(loud: Any, peer: Peer, log: io.StringIO) -> None:
    """A statement that gave up waiting for a lock is shown without its parameters."""
    store = await loud(retry=None)
    await store.set(KEY, b"1")
    with peer.conn.transaction():
        peer.run("UPDATE kv_store SET value = 'x'")
        error = await failure(store.set(KEY, VALUE))
        batch = await failure(store.set_many({KEY: VALUE}))
    assert_silent(shown(error) + shown(batch) + log.getvalue(), KEY)


async def test_time_outs(loud: Any, peer: Peer, log: io.StringIO) -> None:
    """A timeout shows neither the value nor the password."""
    store = await loud(retry=None)
    await store.set(KEY, b"1")
    with peer.conn.transaction():
        peer.run("UPDATE kv_store SET value = 'x'")
        with in_a_hurry(store, 1.0):
            late = await failure(store.set(KEY, VALUE))
    assert_silent(shown(late) + log.getvalue(), KEY)


async def test_missing_tables_and_rights(loud: Any, peer: Peer, log: io.StringIO) -> None:
    """A missing table, a foreign one and a missing right show neither value nor password."""
    absent = await failure(loud(table_name="absent", auto_create_table=False))
    peer.run("CREATE TABLE other (id int)")
    foreign = await failure(loud(table_name="other"))
    assert_silent(shown(absent) + shown(foreign) + log.getvalue())


BAD_DSNS = [
    f"postgresql://user:{quote(PASSWORD, safe='')}@127.0.0.1:1/db",
    f"postgresql://user:{PASSWORD}@127.0.0.1:1/db",
    f"host=127.0.0.1 port=1 user=u password='{PASSWORD}'",
    f"host=127.0.0.1 port=1 user=u pasword='{PASSWORD}'",
    f"host=127.0.0.1 password='{PASSWORD}",
    f"postgresql+psycopg://user:{PASSWORD}@host/db",
    f"postgresql://user:{quote(PASSWORD, safe='')}@[::1/db",
    f"postgresql://127.0.0.1:1/db?password={quote(PASSWORD, safe='')}",
    f"mysql://user:{PASSWORD}@host/db",
]


@pytest.mark.parametrize("bad", BAD_DSNS)
async def test_connecting_shows_no_password(
    make_store: Any, server: Any, log: io.StringIO, bad: str
) -> None:
    """A DSN that is wrong, or leads nowhere, is not shown with its password."""
    error = await failure(make_store(dsn=bad, connect_timeout=1, retry=None))
    assert_silent(shown(error) + log.getvalue())


async def test_stores_show_no_password(loud: Any) -> None:
    """A store's repr, its views' and its configuration's show no password."""
    store = await loud()
    plain = inside(store)
    for thing in (plain, plain.namespace("n:"), plain._config, plain._config.safe_dsn):
        assert_silent(f"{thing!r} {thing}")


async def test_an_operation_shows_no_parameters(loud: Any) -> None:
    """What tracebacks with local variables would print of an operation is its name."""
    store = await loud()
    op = store._sql.set(KEY, VALUE)
    assert_silent(repr(op), KEY)


async def test_the_log_of_an_eventful_life(
    loud: Any, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """Retries, healing and failing hooks are logged without values, passwords, or keys above
    debug.
    """
    caplog.set_level(logging.DEBUG, "pgkv")
    remove = pgkv.on_operation(lambda *_: 1 / 0)
    try:
        store = await loud()
        await store.set(KEY, VALUE)
        peer.run("DROP TABLE kv_store")
        await store.set(KEY, VALUE)
        with peer.conn.transaction():
            peer.run("UPDATE kv_store SET value = 'x'")
            await failure(store.set(KEY, VALUE))
    finally:
        remove()
    events = {record.args[0] for record in caplog.records if isinstance(record.args, tuple)}
    assert {"pgkv.table.create", "pgkv.retry", "pgkv.hook.failed"} <= events
    for record in caplog.records:
        text = record.getMessage() + str(vars(record))
        assert_silent(text, *([KEY] if record.levelno > logging.DEBUG else []))


async def test_structlog_gets_no_more(loud: Any, peer: Peer) -> None:
    """Through a configured structlog the same holds, exception information included."""
    seen: list[str] = []

    def keep(_logger: Any, _method: str, event: Any) -> Any:
        seen.append(repr(event))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.processors.format_exc_info, keep])
    try:
        store = await loud(retry=pgkv.RetryPolicy(wait_initial=0.001))
        with peer.conn.transaction():
            peer.run("LOCK TABLE kv_store IN EXCLUSIVE MODE")
            await failure(store.set(KEY, VALUE))
    finally:
        structlog.reset_defaults()
    assert any("pgkv.retry" in event for event in seen)
    assert_silent("\n".join(seen), KEY)


async def test_callers_connections(loud: Any, connect: Any, peer: Peer, dsn: str) -> None:
    """Errors inside the caller's own transaction quote no more than others."""
    store = await loud()
    options = f"{conninfo_to_dict(dsn)['options']} {LOUD} -c lock_timeout=100"
    conn = await connect(dsn=make_conninfo(dsn, options=options, password=PASSWORD))
    await store.set(KEY, b"1")
    with peer.conn.transaction():
        peer.run("UPDATE kv_store SET value = 'x'")
        error = await failure(store.using(conn).set(KEY, VALUE))
    await conn.rollback()
    assert_silent(shown(error), KEY)
    assert not isinstance(error, psycopg.Error)
