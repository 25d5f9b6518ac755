"""Sessions when the server crashes, and what an intruder finds: in its files, and in the logs.

Durability is the statements', the same in both variants: one of them will do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from pgkv import (
    OperationTimeoutError,
    PgkvError,
    SessionConflictError,
    SessionGoneError,
    SessionStore,
    Store,
    schema_sql,
)
from pgkv.config import Config
from pgkv.patterns.session.data import id_of
from tests.faults.support import newest
from tests.servers import Server
from tests.variants import in_a_hurry

MakeServer = Callable[..., Server]


def test_a_logout_survives_a_crash(make_server: MakeServer) -> None:
    """Whoever was told "logged out", by destroy, destroy_user or a rotation without grace, stays so
    when the server stops at once, even where the database defaults to asynchronous commits."""
    server = make_server(settings={"synchronous_commit": "off", "wal_writer_delay": "10s"})
    with Store.connect(server.dsn) as store:
        sessions = SessionStore(store)
        made = [sessions.create(user_id=f"u{n}") for n in range(15)]
        with server.connect() as conn:
            conn.execute("CHECKPOINT")
        dead = [each.id for each in made]
        for n, each in enumerate(made):
            if n % 3 == 0:
                assert sessions.destroy(each.id)
            elif n % 3 == 1:
                assert sessions.destroy_user(f"u{n}") == 1
            else:
                sessions.rotate(each, grace=0)
            if n >= 12:
                # The last of each kind with nobody behind it whose commit would carry it along.
                server.restart("immediate")
        assert [sessions.load(token) for token in dead] == [None] * 15
        assert all(sessions.load(each.id) is not None for each in made[2::3])


def test_what_waits_for_the_disk(make_server: MakeServer) -> None:
    """A missing synchronous standby makes every synchronous commit wait, and so shows which are:
    what ends a session, also where the default is off; not create, touch and save."""
    server = make_server(settings={"synchronous_standby_names": "nobody"})
    with server.connect() as conn:
        conn.execute("SET synchronous_commit = off")
        conn.execute(schema_sql(Config("postgresql://")).encode())
    with Store.connect(server.dsn, auto_create_table=False, operation_timeout=20) as store:
        sessions = SessionStore(store, touch_interval=0)
        made = sessions.create({"a": 1}, user_id="u")
        loaded = sessions.load(made.id)
        assert loaded is not None
        loaded.data["a"] = 2
        sessions.save(loaded)
    off = f"{server.dsn} options='-c synchronous_commit=off'"
    with Store.connect(off, auto_create_table=False) as store:
        sessions = SessionStore(store)
        other = sessions.create(user_id="u")
        for end in (
            lambda: sessions.rotate(made),
            lambda: sessions.destroy(other.id),
            lambda: sessions.destroy_user("u"),
        ):
            with in_a_hurry(store, 1.0), pytest.raises(OperationTimeoutError):
                end()


@newest
def test_the_servers_files_log_nobody_in(make_server: MakeServer) -> None:
    """A copy of the whole server, its log and write-ahead log included, holds no token, and neither
    does a dump of the table; with every statement logged."""
    server = make_server(settings={"log_statement": "all", "log_parameter_max_length": "-1"})
    with Store.connect(server.dsn) as store:
        sessions = SessionStore(store)
        made = sessions.create({"a": 1}, user_id="u")
        tokens = [made.id]
        made.data["a"] = 2
        sessions.save(made)
        sessions.rotate(made, user_id="v")
        tokens.append(made.id)
        assert sessions.load(tokens[0]) is not None
        with (
            server.connect() as conn,
            conn.cursor().copy("COPY kv_store_sessions TO STDOUT") as copy,
        ):
            dump = b"".join(bytes(block) for block in copy).decode()
        sessions.destroy(made)
    server.stop()
    files = [path for path in Path(server._cluster.root).rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    for token in tokens:
        assert id_of(token) in content
        assert id_of(token).hex() in dump
        assert token.encode() not in content


@newest
def test_neither_logs_nor_errors_hold_a_token_or_data(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong with a session is told without its token and without its data."""
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with Store.connect(dsn) as store:
        sessions = SessionStore(store)
        made = sessions.create({"card": "4111-secret"}, user_id="u")
        stale = sessions.load(made.id)
        assert stale is not None
        tokens = [made.id]
        sessions.rotate(made)
        tokens.append(made.id)
        stale.data["card"] = "4222-secret"
        with pytest.raises(SessionGoneError) as caught:
            sessions.save(stale)
        said.append(f"{caught.value!r}")
        with pytest.raises(SessionConflictError) as beaten:
            sessions.rotate(stale)
        said.append(f"{beaten.value!r}")
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("ALTER TABLE kv_store_sessions ADD CHECK (id IS NULL) NOT VALID")
        made.data["card"] = "4333-secret"
        with pytest.raises(PgkvError) as failed:
            sessions.save(made)
        said.append(f"{failed.value!r} {failed.value.__cause__!r} {failed.value.__context__!r}")
    everything = "\n".join([*said, caplog.text])
    for secret in (*tokens, "4111-secret", "4222-secret", "4333-secret"):
        assert secret not in everything
