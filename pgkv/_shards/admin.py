"""Making the slots of a sharded store, and looking whether they are in order. Sync only: `pgkv shards`
and `moves` use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import psycopg
from psycopg import sql

from .._engine import conninfo as _conninfo
from .._engine.schema import create_sql
from .._ops.op import Statement
from .._settings import Target
from ..config import Config, Table
from ..errors import ConfigError, translate
from .placement import Shard, shard_of
from .slots import schema_of, settled_count
from .sql import (
    DURABLE,
    HAS_MAP,
    INIT_LOCK,
    MAP_DDL,
    NAME_SERVER,
    NEWER_ROW,
    READ_MAP,
    READ_SIZES,
    SCHEMAS,
    MapRow,
)

ENDS = (
    "_in",
    "_log",
    "_out",
)  # of schemas during a move: the copy, its changes, what was moved away


class Server:
    """One server of a sharded store, with a connection for administration.

    Attributes:
        name: as its map says; empty before it has one.
        slots: how many its map has; 0 before.
        rows: its map.
        schemas: those of slots that it has, those of a move among them.
    """

    def __init__(self, config: Config) -> None:
        self._target = Target(config)
        self.place = self._target.place()
        with translated(self.place):
            dsn = self._target.dsn()
            self.conninfo = _conninfo.build(config, dsn)
            self.conn = psycopg.connect(self.conninfo, autocommit=True, prepare_threshold=None)
            # A copy is not older than its lock, and each server relies on what the other has committed.
            self.conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            try:
                self.conn.execute(DURABLE)
                self.read()
            except BaseException:
                self.conn.close()
                raise

    def read(self) -> None:
        """Read its map and its schemas."""
        self.name, self.slots = "", 0
        self.rows: dict[int, MapRow] = {}
        with translated(self.place):
            self.schemas: set[str] = {name for (name,) in self.conn.execute(SCHEMAS)}
            if self.conn.execute(HAS_MAP).fetchone() != (True,):
                return
            found = self.ask(READ_MAP)
        if found is not None:
            self.name, self.slots = found.node, found.slots
            self.rows = {row.slot: row for row in found.rows}

    def ask(self, statement: Statement[Any]) -> Any:
        """Run a statement of the stores that has no parameters, and return its answer."""
        result: Any = self.conn.execute(statement.sql).pgresult
        return statement.decode(result)

    def lacks(self, row: MapRow) -> bool:
        """Whether its map does not know that row yet."""
        return row.slot not in self.rows or self.rows[row.slot].epoch < row.epoch

    def execute(self, text: str, *params: Any) -> psycopg.Cursor[Any]:
        """Run one statement; several in one transaction where `params` are none."""
        return self.conn.execute(text, params or None)

    def close(self) -> None:
        """Close the connection."""
        self.conn.close()
        self._target.close()


@contextlib.contextmanager
def translated(place: str) -> Iterator[None]:
    """Raise pgkv's errors for psycopg's."""
    failure = None
    try:
        yield
    except psycopg.Error as error:
        failure = translate(error, action=f"shards at {place}")
    if failure is not None:
        raise failure from failure.__cause__


class Problem(NamedTuple):
    """What `check` found."""

    slot: int
    problem: str


class Servers:
    """All servers of a sharded store; a context manager."""

    def __init__(self, configs: Sequence[Config]) -> None:
        self.servers: list[Server] = []
        try:
            for config in configs:
                self.servers.append(Server(config))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        for server in self.servers:
            server.close()

    def read(self) -> None:
        """Read every map again."""
        for server in self.servers:
            server.read()

    @property
    def slots(self) -> int:
        """How many slots the maps have; 0 where there is none.

        Raises:
            ConfigError: the servers are not of one store.
        """
        found = {server.slots for server in self.servers if server.slots}
        names = [server.name for server in self.servers if server.name]
        if len(found) > 1 or len(names) > len(set(names)):
            raise ConfigError(
                "the servers are not of one store, or a DSN is given twice: "
                + ", ".join(f"{each.place} is {each.name or 'new'}" for each in self.servers)
            )
        return max(found, default=0)

    @property
    def names(self) -> list[str]:
        """The names of all servers."""
        return [server.name for server in self.servers]

    def homes(self) -> dict[int, MapRow]:
        """The newest row of each slot."""
        newest: dict[int, MapRow] = {}
        for server in self.servers:
            for slot, row in server.rows.items():
                if row.replaces(newest.get(slot, MapRow(slot, "", -1)), server.name):
                    newest[slot] = row
        return newest

    def named(self, name: str) -> Server:
        """The server of that name.

        Raises:
            ConfigError: there is none; names those there are.
        """
        for server in self.servers:
            if server.name == name:
                return server
        names = ", ".join(server.name for server in self.servers)
        raise ConfigError(f"there is no server {name!r} among the DSNs; there are {names}")

    def schemas_of(self, slot: int) -> tuple[list[Server], list[list[Server]]]:
        """Where a slot is live, and where a move has left something, for each of `ENDS`."""
        live, *rest = (
            [each for each in self.servers if schema_of(slot) + end in each.schemas]
            for end in ("", *ENDS)
        )
        return live, rest

    # -- init

    def init(self, slots: int | None, tables: Sequence[Table]) -> int:
        """Make the maps, the slots and their tables, where they are missing; how many slots were
        made. A server that is new among others gets the map and no slot.

        Raises:
            ConfigError: the servers have another number of slots.
        """
        count = settled_count(slots, self.slots)
        self._name_servers(count)
        homes = self.homes()
        for slot in range(count):
            if slot not in homes:
                home = self.servers[slot * len(self.servers) // count].name
                homes[slot] = MapRow(slot, home, 0)
        self.spread(homes.values())
        self.read()
        made = sum(self._make(row, tables) for row in homes.values())
        self.read()
        return made

    def _name_servers(self, count: int) -> None:
        taken = {server.name for server in self.servers}
        for server in self.servers:
            if not server.name:
                number = next(n for n in range(1, 10_000) if f"n{n}" not in taken)
                taken.add(f"n{number}")
                with translated(server.place), server.conn.transaction():
                    server.execute(INIT_LOCK)
                    server.execute(MAP_DDL)
                    server.execute(NAME_SERVER, count, f"n{number}")
                server.read()

    def spread(self, rows: Any) -> None:
        """Tell every server what is newer than its map."""
        for server in self.servers:
            with translated(server.place), server.conn.transaction():
                for row in filter(server.lacks, rows):
                    server.execute(NEWER_ROW, row.slot, row.home, row.epoch)

    def _make(self, row: MapRow, tables: Sequence[Table]) -> int:
        """Make a slot's schema, unless it is somewhere, also under a move's name, and its tables."""
        live = schema_of(row.slot)
        there, rest = self.schemas_of(row.slot)
        at = sum(rest, there)
        home = self.named(row.home)
        if at and home not in at:
            return 0  # a move was interrupted: `resume` knows
        made = not at
        with translated(home.place), home.conn.transaction():
            if made:
                home.conn.execute(
                    sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(live))
                )
            if made or live in home.schemas:
                for table in tables:
                    home.execute(create_sql(replace(table, schema=live)))
        return int(made)

    # -- looking

    def shards(self) -> list[Shard]:
        """Where each slot is, and how large."""
        sizes: dict[str, dict[str, int]] = {}
        for server in self.servers:
            with translated(server.place):
                sizes[server.name] = server.ask(READ_SIZES)
        return [
            shard_of(row, schema_of(slot) in sizes.get(row.home, {}), sizes.get(row.home, {}))
            for slot, row in sorted(self.homes().items())
        ]

    def check(self) -> list[Problem]:
        """What is not in order: slots with no home or with two, moves that were interrupted, and
        servers that do not know of a move yet."""
        found: list[Problem] = []
        homes = self.homes()
        for slot in range(self.slots):
            row, name = homes.get(slot), schema_of(slot)
            if row is None:
                found.append(Problem(slot, "no server has it: run `pgkv shards init`"))
                continue
            at, ends = self.schemas_of(slot)
            live = [each.name for each in at]
            rest = [
                f"{name}{end} on {each.name}"
                for end, there in zip(ENDS, ends, strict=True)
                for each in there
            ]
            if len(live) > 1:
                found.append(Problem(slot, f"it is on {' and '.join(live)}: one of them is wrong"))
            elif rest or row.target:
                what = ", ".join(rest) or f"to {row.target}"
                found.append(Problem(slot, f"a move is under way or was interrupted ({what})"))
            elif live != [row.home]:
                where = live[0] if live else "no server here"
                found.append(Problem(slot, f"the map says {row.home}, and {where} has it"))
            behind = [each.name for each in self.servers if each.lacks(row)]
            if behind:
                found.append(Problem(slot, f"{', '.join(behind)} does not know where it is yet"))
        return found
