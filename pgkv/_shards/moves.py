"""Moving slots between servers while clients work.

The tables of the slot are locked, copied into a schema of another name on the new server, and the old
server's schema is renamed with the map, in one transaction: from then on no statement finds the slot
there. Then the copy gets the live name. Lock and name are the fence: nothing is written that the copy
does not have. Between the two commits the slot is nowhere, and clients wait.

An online move copies before it locks. Triggers note the keys of all rows that change meanwhile, and the
copy is brought up to date several times, the last time under the lock.

A move that was killed leaves one of four states, and `resume` tells them by what is where:

* the slot is live on the old server: copy and notes are thrown away, and the move begins again;
* it is live nowhere, and the new server, which the map names, has the copy: that becomes live;
* it is live on the new server: the old server's schema is dropped;
* other servers' maps are older: they are told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from time import monotonic, sleep
from typing import Any

import psycopg
from psycopg import errors, sql

from ..errors import ConfigError, StoreUnavailableError
from .admin import ENDS, Server, Servers, translated
from .slots import schema_of
from .sql import (
    CLEAR_TARGET,
    COUNT_NOTES,
    CREATE_GONE,
    DELETE_GONE,
    DELETE_NOTES,
    DESCRIBE,
    HAND_OVER,
    KEYS,
    MARK_TARGET,
    MOVE_LOCK,
    MOVE_UNLOCK,
    NEWER_ROW,
    NOTE_CHANGES,
    NOTED_KEYS,
    NOTED_ROWS,
    SLOT_TABLES,
    WAKE_WAITERS,
    MapRow,
)

PATIENCE = 60.0  # seconds for which open transactions of the slot are waited for
LOCK_SECONDS = 1  # for one try: behind it every client of the slot waits
PAUSE = 0.5  # seconds between two tries
ROUNDS = 20  # of bringing a copy up to date before the lock
FEW = 500  # changes that are left to be copied under the lock

Progress = Callable[[int, str, int], object]  # slot, step, bytes copied so far


class How(Enum):
    """How a slot moves."""

    COPY = "copy"  # it is locked while it is copied
    ONLINE = "online"  # it is copied first, then locked
    DROP = "drop"  # as COPY, without the rows of UNLOGGED tables


def move(servers: Servers, slot: int, to: str, progress: Progress, how: How = How.COPY) -> bool:
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
        begun = _Move(source, target, row, progress)
        try:
            with translated(f"{source.place} or {target.place}"):
                begun.run(how)
        except BaseException:
            # Before the commit nothing has changed for clients, and after it the copy is all there is.
            # A connection that is gone leaves both to `resume`.
            with contextlib.suppress(psycopg.Error, StoreUnavailableError):
                if source.execute(CLEAR_TARGET, slot, row.home, row.epoch).rowcount:
                    locking(source, slot, partial(_drop, source, begun.log))
                    _drop(target, begun.into)
            raise
        _finish(servers, slot, to, row.epoch + 1, progress)
    return True


class _Move:
    """A move of one slot, up to the commit by which the old server gives it away."""

    def __init__(self, source: Server, target: Server, row: MapRow, progress: Progress) -> None:
        self.source, self.target, self.row = source, target, row
        self.live, self.into, self.log = (schema_of(row.slot) + end for end in ("", "_in", "_log"))
        self.parts: dict[str, dict[str, sql.Composable]] = {}  # of tables whose changes are noted
        self.done = 0
        self._progress = progress

    def run(self, how: How) -> None:
        """Mark the slot, copy it, and give it away."""
        if how is How.ONLINE:
            self._locking(self._note_changes)
            self._tell("marked")
            with self._snapshot():
                self._copy(how)
            for _ in range(ROUNDS):
                with self._snapshot():
                    changes = self._catch_up()
                self._tell("following")
                if changes < FEW:
                    break
        else:
            self._change_map(MARK_TARGET, self.target.name)
            self._tell("marked")
        self._locking(partial(self._hand_over, how))
        self._tell("handed over")

    def _tell(self, step: str) -> None:
        self._progress(self.row.slot, step, self.done)

    def _change_map(self, text: str, *params: Any) -> None:
        row = self.row
        if not self.source.execute(text, *params, row.slot, row.home, row.epoch).rowcount:
            raise ConfigError(f"slot {row.slot} was moved meanwhile: run the command again")

    def _locking(self, work: Callable[[], None]) -> None:
        locking(self.source, self.row.slot, work)

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """A transaction that reads the slot as of one moment: its unique indexes hold in the copy too."""
        with self.source.conn.transaction():
            self.source.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield

    def _note_changes(self) -> None:
        self._change_map(MARK_TARGET, self.target.name)
        self.source.conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self.log)))
        for name, keys, _ in self.source.execute(KEYS, self.live).fetchall():
            if not keys:
                raise ConfigError(
                    f"slot {self.row.slot} cannot move online: {self.live}.{name} has no primary key"
                )
            parts = self.parts[name] = {
                "live": sql.Identifier(self.live, name),
                "copy": sql.Identifier(self.into, name),
                "log": sql.Identifier(self.log, name),
                **{
                    part: sql.SQL(", ").join(sql.SQL(prefix + key) for key in keys)
                    for part, prefix in (("keys", ""), ("old", "OLD."), ("new", "NEW."))
                },
            }
            _filled(self.source, NOTE_CHANGES, parts)

    def _hand_over(self, how: How) -> None:
        _lock(self.source, self.row.slot)
        self._tell("locked")
        if how is How.ONLINE:
            found = self.source.execute(KEYS, self.live).fetchall()
            if [(name, True) for name in self.parts] != [(name, noted) for name, _, noted in found]:
                raise StoreUnavailableError(
                    f"tables of slot {self.row.slot} were made or dropped meanwhile: run the command again"
                )
            self._catch_up()
            for *_, sequence in self._described():
                if sequence:
                    self.target.execute(sequence)
            _drop(self.source, self.log)
        else:
            self._copy(how)
        self._tell("copied")
        _rename(self.source, self.live, f"{self.live}_out")
        self._change_map(HAND_OVER, self.target.name)
        self.source.execute(WAKE_WAITERS)

    def _described(self) -> list[Any]:
        names = {"live": self.live, "into": self.into}
        return self.source.conn.execute(DESCRIBE, names).fetchall()

    def _copy(self, how: How) -> None:
        with self.target.conn.transaction():
            _drop(self.target, self.into)
            self.target.conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self.into)))
            for name, unlogged, create, after, sequence in self._described():
                self.target.conn.execute(create)
                if not (unlogged and how is How.DROP):
                    self._copy_rows(
                        sql.Identifier(self.live, name), sql.Identifier(self.into, name)
                    )
                for command in [*after, *([sequence] if sequence else [])]:
                    self.target.conn.execute(command)

    def _copy_rows(self, what: sql.Composable, into: sql.Composable) -> None:
        read = sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(what)
        write = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(into)
        with (
            self.source.conn.cursor().copy(read) as rows,
            self.target.conn.cursor().copy(write) as copied,
        ):
            for data in rows:
                copied.write(data)
                self.done += len(data)
                self._tell("copying")

    def _catch_up(self) -> int:
        """Copy the rows whose keys were noted; how many notes there were."""
        notes = 0
        for parts in self.parts.values():
            ((count,),) = _filled(self.source, COUNT_NOTES, parts)
            if count:
                with self.target.conn.transaction():
                    _filled(self.target, CREATE_GONE, parts)
                    self._copy_rows(
                        sql.SQL(NOTED_KEYS).format(**parts), sql.Identifier("pgkv_gone")
                    )
                    _filled(self.target, DELETE_GONE, parts)
                    self._copy_rows(sql.SQL(NOTED_ROWS).format(**parts), parts["copy"])
                _filled(self.source, DELETE_NOTES, parts)
                notes += count
        return notes


def _filled(server: Server, text: str, parts: Mapping[str, sql.Composable]) -> psycopg.Cursor[Any]:
    return server.conn.execute(sql.SQL(text).format(**parts))


def locking(server: Server, slot: int, work: Callable[[], None]) -> None:
    """Do what locks tables of a slot in one transaction, and again while others hold them for long."""
    until = monotonic() + PATIENCE
    while True:
        try:
            with server.conn.transaction():
                server.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
                work()
            return
        except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
            if monotonic() > until:
                raise StoreUnavailableError(
                    f"slot {slot} could not be locked for {PATIENCE:g} s: transactions on its tables "
                    f"at {server.place} stay open"
                ) from error
            sleep(PAUSE)


def _lock(source: Server, slot: int) -> None:
    live = schema_of(slot)
    locked: set[str] = set()
    while names := {name for (name,) in source.execute(SLOT_TABLES, live)} - locked:
        tables = sql.SQL(", ").join(sql.Identifier(live, name) for name in sorted(names))
        source.conn.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(tables))
        locked |= names


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
            for end in ENDS:
                locking(server, slot, partial(_drop, server, schema_of(slot) + end))
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
        live, rest = servers.schemas_of(slot)
        behind = any(server.lacks(row) for server in servers.servers)
        if not (any(rest) or row.target or behind):
            return False
        copied, noted, _ = rest
        if not live and home in copied:
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
        move(servers, slot, row.target, progress, How.ONLINE if noted else How.COPY)
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


def _drop(server: Server, schema: str) -> None:
    server.conn.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
