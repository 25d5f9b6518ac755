"""Moving slots between servers while clients work.

The tables of the slot are locked, copied into a schema of another name on the new server, and the old
server's schema is renamed with the map, in one transaction: from then on no statement finds the slot
there. Then the copy gets the live name. Lock and name are the fence: nothing is written that the copy
does not have. Between the two commits the slot is nowhere, and clients wait.

A move that was killed leaves one of four states, and `resume` tells them by what is where:

* the slot is live on the old server: the copy is thrown away, and the move begins again;
* it is live nowhere, and the new server, which the map names, has the copy: that becomes live;
* it is live on the new server: the old server's schema is dropped;
* other servers' maps are older: they are told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import psycopg
from psycopg import errors, sql

from ..errors import ConfigError, StoreUnavailableError
from .admin import Server, Servers, translated
from .slots import schema_of
from .sql import (
    CLEAR_TARGET,
    DESCRIBE,
    HAND_OVER,
    MARK_TARGET,
    MOVE_LOCK,
    MOVE_UNLOCK,
    NEWER_ROW,
    SLOT_TABLES,
)

PATIENCE = 60.0  # seconds for which open transactions of the slot are waited for
LOCK_SECONDS = 1  # for one try: behind it every client of the slot waits
PAUSE = 0.5  # seconds between two tries

Progress = Callable[[int, str, int], object]  # slot, step, bytes copied so far


def move(servers: Servers, slot: int, to: str, progress: Progress) -> bool:
    """Move a slot to a server; False where it is there already.

    Raises:
        ConfigError: there is no such slot or server, or an interrupted move has to be resumed.
        StoreUnavailableError: a server does not answer, an open transaction holds the slot, or
            another move of it is under way.
    """
    target = servers.named(to)
    with _only_mover(servers, slot):
        servers.read()
        row = servers.homes().get(slot)
        if row is None:
            raise ConfigError(f"there is no slot {slot}: there are 0 to {servers.slots - 1}")
        source = servers.named(row.home)
        live, rest = servers.schemas_of(slot)
        if live != [source] or any(rest) or row.target not in ("", to):
            raise ConfigError(
                f"slot {slot} is not in order: see `pgkv shards check`; `pgkv shards resume` finishes "
                "a move that was interrupted"
            )
        if source is target:
            return False
        with translated(source.place):
            if not source.execute(MARK_TARGET, to, slot, row.home, row.epoch).rowcount:
                raise ConfigError(f"slot {slot} was moved meanwhile: run the command again")
        progress(slot, "marked", 0)
        try:
            _hand_over(source, target, slot, row.epoch, progress)
        except BaseException:
            # Before the commit nothing has changed for clients, and after it the copy is all there is.
            # A connection that is gone leaves both to `resume`.
            with contextlib.suppress(psycopg.Error):
                if source.execute(CLEAR_TARGET, slot, row.home, row.epoch).rowcount:
                    _drop(target, slot, "_in")
            raise
        _finish(servers, slot, to, row.epoch + 1, progress)
    return True


def _hand_over(source: Server, target: Server, slot: int, epoch: int, progress: Progress) -> None:
    """Copy the slot under its lock, and rename it away."""
    until = monotonic() + PATIENCE
    while True:
        try:
            with source.conn.transaction():
                source.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
                _lock(source, slot)
                progress(slot, "locked", 0)
                _copy(source, target, slot, progress)
                progress(slot, "copied", 0)
                live = schema_of(slot)
                _rename(source, live, f"{live}_out")
                if not source.execute(HAND_OVER, target.name, slot, source.name, epoch).rowcount:
                    raise ConfigError(f"slot {slot} was moved meanwhile: run the command again")
            break
        except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
            if monotonic() > until:
                raise StoreUnavailableError(
                    f"slot {slot} could not be locked for {PATIENCE:g} s: transactions on its tables "
                    f"at {source.place} stay open"
                ) from error
            sleep(PAUSE)
        except psycopg.Error as error:
            with translated(f"{source.place} or {target.place}"):
                raise error from None
    progress(slot, "handed over", 0)


def _lock(source: Server, slot: int) -> None:
    live = schema_of(slot)
    locked: set[str] = set()
    while names := {name for (name,) in source.execute(SLOT_TABLES, live)} - locked:
        tables = sql.SQL(", ").join(sql.Identifier(live, name) for name in sorted(names))
        source.conn.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(tables))
        locked |= names


def _copy(source: Server, target: Server, slot: int, progress: Progress) -> None:
    live, into = schema_of(slot), f"{schema_of(slot)}_in"
    done = 0
    with target.conn.transaction():
        _drop(target, slot, "_in")
        target.conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(into)))
        described = source.conn.execute(DESCRIBE, {"live": live, "into": into}).fetchall()
        for name, create, after, sequence in described:
            target.conn.execute(create)
            read = sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(sql.Identifier(live, name))
            write = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(sql.Identifier(into, name))
            with (
                source.conn.cursor().copy(read) as rows,
                target.conn.cursor().copy(write) as copied,
            ):
                for data in rows:
                    copied.write(data)
                    done += len(data)
                    progress(slot, "copying", done)
            for command in [*after, *([sequence] if sequence else [])]:
                target.conn.execute(command)


def _finish(servers: Servers, slot: int, to: str, epoch: int, progress: Progress) -> None:
    """After the slot was handed over: it becomes live, every server is told, and the rest is dropped."""
    target, live = servers.named(to), schema_of(slot)
    with translated(target.place), target.conn.transaction():
        _rename(target, f"{live}_in", live)
        target.execute(NEWER_ROW, slot, to, epoch)
    progress(slot, "live", 0)
    servers.read()
    servers.spread(servers.homes().values())
    progress(slot, "told", 0)
    _tidy(servers, slot)
    progress(slot, "moved", 0)


def _tidy(servers: Servers, slot: int) -> None:
    """Drop what moves have left; the slot is live where the map says."""
    for server in servers.servers:
        with translated(server.place):
            for end in ("_in", "_out"):
                _drop(server, slot, end)
    servers.read()


def resume(servers: Servers, slot: int, progress: Progress) -> bool:
    """Finish a move of a slot that was interrupted; False where there was none.

    Raises:
        ConfigError: what is there cannot come from a move.
        StoreUnavailableError: the move is still under way.
    """
    with _only_mover(servers, slot):
        servers.read()
        row = servers.homes().get(slot)
        if row is None:
            return False
        home = servers.named(row.home)
        live, (begun, left) = servers.schemas_of(slot)
        behind = any(server.lacks(row) for server in servers.servers)
        if not (begun or left or row.target or behind):
            return False
        if not live and home in begun:
            _finish(servers, slot, row.home, row.epoch, progress)
            return True
        if live != [home]:
            at = ", ".join(server.name for server in live) or "no server"
            raise ConfigError(
                f"slot {slot}: the map says {row.home}, and {at} has it live; no move leaves that. "
                f"Find out which server has the data, and give its schema the name {schema_of(slot)}"
            )
        _tidy(servers, slot)
        servers.spread([row])
        if row.target:
            with translated(home.place):
                home.execute(CLEAR_TARGET, slot, row.home, row.epoch)
    if row.target:
        move(servers, slot, row.target, progress)
    servers.read()
    return True


@contextlib.contextmanager
def _only_mover(servers: Servers, slot: int) -> Iterator[None]:
    """Keep others from moving the slot meanwhile. The lock ends with its session: a mover that was killed
    while the server commits for it still has it."""
    taken: list[Server] = []
    try:
        for server in servers.servers:
            with translated(server.place):
                if server.execute(MOVE_LOCK, slot).fetchone() != (True,):
                    raise StoreUnavailableError(
                        f"another move of slot {slot} is under way (seen at {server.place})"
                    )
            taken.append(server)
        yield
    finally:
        for server in taken:
            with contextlib.suppress(psycopg.Error):
                server.execute(MOVE_UNLOCK, slot)


def _rename(server: Server, old: str, new: str) -> None:
    names = map(sql.Identifier, (old, new))
    server.conn.execute(sql.SQL("ALTER SCHEMA {} RENAME TO {}").format(*names))


def _drop(server: Server, slot: int, end: str) -> None:
    name: Any = sql.Identifier(schema_of(slot) + end)
    server.conn.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(name))
