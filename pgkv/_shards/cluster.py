"""Making the slots of a sharded store on Citus, looking at them, and having Citus move them. Sync only:
`pgkv shards` uses it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic, sleep
from typing import Any, Self

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .._engine.schema import create_commands
from ..config import Config, Table
from ..errors import ConfigError, StoreUnavailableError
from .admin import Problem, Server, Servers, translated
from .moves import LOCK_SECONDS, PATIENCE, PAUSE, Progress
from .placement import Shard
from .slots import schema_of, settled_count
from .sql import (
    CITUS_COUNT,
    CITUS_LOCAL,
    CITUS_MOVE,
    CITUS_MOVING,
    CITUS_MOVING_STATUS,
    CITUS_NODES,
    CITUS_PLAIN,
    CITUS_REPLICATE,
    CITUS_SELF,
    CITUS_SETTINGS,
    CITUS_SETUP,
    CITUS_SIZES,
    CITUS_UNLOGGED,
    CITUS_WAITS,
    HAS_CITUS,
    READ_PLACEMENT,
    Placement,
)

LOOK = 0.05  # seconds between two looks at a move


class CitusCluster:
    """A Citus cluster, with connections for administration; a context manager.

    Attributes:
        slots: how many it has; 0 before `init`.
        placement: which node has which slot.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._given = servers
        groups = [server.execute(CITUS_LOCAL).fetchone() for server in servers]
        if (0,) not in groups:
            raise ConfigError(
                f"{servers[0].place} is a worker of a Citus cluster: give the coordinator's DSN"
            )
        self.coordinator = servers[groups.index((0,))]
        self.slots = 0
        self.placement = Placement({}, {}, {})
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._given:
            server.close()

    def _read(self) -> None:
        with translated(self.coordinator.place):
            self.placement = self.coordinator.ask(READ_PLACEMENT)
            if self.coordinator.execute(CITUS_SETTINGS[0]).fetchone() == (True,):
                ((self.slots,),) = self.coordinator.execute(CITUS_SETTINGS[1]).fetchall()

    @property
    def names(self) -> list[str]:
        """The nodes, the coordinator first."""
        return [address.name for _, address in sorted(self.placement.nodes.items())]

    def init(self, slots: int | None, tables: Sequence[Table]) -> int:
        """Make the fence, the slots and their tables, where they are missing; how many slots were made.
        Citus divides them among its nodes, and knows them on a node that is new.

        Raises:
            ConfigError: the cluster has another number of slots, or a schema of such a name is not
                distributed.
        """
        count, run = settled_count(slots, self.slots), self.coordinator.conn.execute
        with translated(self.coordinator.place):
            run("SET citus.enable_schema_based_sharding TO off")
            for command in CITUS_SETUP:
                run(command)
            # A node that is new may ask another one for the settings until Citus has copied them.
            with contextlib.suppress(errors.InsufficientPrivilege):
                run(CITUS_REPLICATE)
            run(CITUS_COUNT, (count,))
            run("SET citus.enable_schema_based_sharding TO on")
            if plain := run(CITUS_PLAIN).fetchone():
                raise ConfigError(
                    f"{plain[0]} is an ordinary schema: rename it, or give it to Citus by "
                    "citus_schema_distribute()"
                )
            made = 0
            for slot in range(count):
                live = schema_of(slot)
                made += slot not in self.placement.owners
                run(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(live)))
                for table in (replace(each, schema=live) for each in tables):
                    if table.quoted not in self.placement.relations:
                        for command in create_commands(table):
                            self.coordinator.execute(command)
        self._read()
        return made

    def shards(self) -> list[Shard]:
        """Which node has each slot, and how large it is there."""
        with translated(self.coordinator.place):
            moving = {schema for schema, _ in self.coordinator.execute(CITUS_MOVING)}
        sizes: dict[int, dict[str, int]] = {}
        found = []
        for slot in range(self.slots):
            group = self.placement.owners.get(slot)
            if group is None:
                found.append(Shard(slot, "", "lost", 0))
                continue
            if group not in sizes:
                sizes[group] = self._sizes(group)
            state = "moving" if schema_of(slot) in moving else "live"
            size = sizes[group].get(schema_of(slot), 0)
            found.append(Shard(slot, self.placement.nodes[group].name, state, size))
        return found

    def _sizes(self, group: int) -> dict[str, int]:
        """The sizes of the slots of a node; none where it does not answer."""
        address = self.placement.nodes[group]
        params: dict[str, Any] = conninfo_to_dict(self.coordinator.conninfo)
        params.pop("hostaddr", None)
        params |= {"host": address.host, "port": address.port}
        try:
            with psycopg.connect(make_conninfo("", **params), autocommit=True) as conn:
                result: Any = conn.execute(CITUS_SIZES.sql).pgresult
                return CITUS_SIZES.decode(result)  # type: ignore[return-value]  # no signal
        except psycopg.Error:
            return {}

    def check(self) -> list[Problem]:
        """Slots that are on no node or on one that is not active, tables that are missing, and moves."""
        with translated(self.coordinator.place):
            active = {group for (group,) in self.coordinator.execute(CITUS_NODES)}
            moving = dict(self.coordinator.execute(CITUS_MOVING).fetchall())
        found = []
        for slot in range(self.slots):
            group, schema = self.placement.owners.get(slot), schema_of(slot)
            if group is None:
                found.append(Problem(slot, "it is on no node: run `pgkv shards init`"))
            elif group not in active:
                found.append(Problem(slot, f"its node (group {group}) is not active"))
            if schema in moving:
                found.append(Problem(slot, f"a move is under way ({moving[schema]})"))
        return found

    def move(self, slot: int, to: str, progress: Progress) -> bool:
        """Have Citus move a slot to a node; False where it is there already. While it has logged tables
        only, clients wait for the end of the move; an UNLOGGED one makes them wait for all of it.

        Raises:
            ConfigError: there is no such slot or node.
            StoreUnavailableError: an open transaction holds the slot, or a node does not answer.
        """
        groups = {address.name: group for group, address in self.placement.nodes.items()}
        if to not in groups:
            raise ConfigError(f"there is no node {to!r}; there are {', '.join(groups)}")
        owner = self.placement.owners.get(slot)
        if owner is None:
            raise ConfigError(f"there is no slot {slot}: there are 0 to {self.slots - 1}")
        if owner == groups[to]:
            return False
        with translated(self.coordinator.place):
            unlogged = self.coordinator.execute(CITUS_UNLOGGED, schema_of(slot)).fetchone()
            mode = "force_logical" if unlogged is None else "block_writes"
            self._transfer(slot, self.placement.nodes[groups[to]], mode, progress)
        self._read()
        return True

    def _transfer(self, slot: int, address: Any, mode: str, progress: Progress) -> None:
        until: float | None = None
        params = (schema_of(slot), address.host, int(address.port), mode)
        while True:
            try:
                with psycopg.connect(self.coordinator.conninfo, autocommit=True) as conn:
                    ((gpid,),) = conn.execute(CITUS_SELF).fetchall()
                    work = _Work(conn, params)
                    self._look_after(work, slot, gpid, progress)
                    work.join()
                if work.failure is None:
                    progress(slot, "moved", 0)
                    return
                raise work.failure
            except errors.QueryCanceled as error:
                until = until or monotonic() + PATIENCE
                if monotonic() >= until:
                    raise StoreUnavailableError(
                        f"slot {slot} could not be locked for {PATIENCE:g} s: transactions on its "
                        "tables stay open"
                    ) from error
                sleep(PAUSE)

    def _look_after(self, work: _Work, slot: int, gpid: int, progress: Progress) -> None:
        """Show how far it is. Step back from a lock that others hold: behind it the slot waits."""
        waits_since = None
        try:
            while not work.ended.wait(LOOK):
                run = self.coordinator.execute
                for status, copied in run(CITUS_MOVING_STATUS, schema_of(slot)):
                    progress(slot, status.lower(), copied)
                if run(CITUS_WAITS, gpid).fetchone() == (True,):
                    waits_since = waits_since or monotonic()
                    if monotonic() - waits_since > LOCK_SECONDS:
                        work.conn.cancel_safe()
                        work.ended.wait()
                else:
                    waits_since = None
        except BaseException:
            work.conn.cancel_safe()
            raise


class _Work(threading.Thread):
    """Citus' own function, which answers when the slot has moved."""

    def __init__(self, conn: psycopg.Connection[Any], params: tuple[Any, ...]) -> None:
        super().__init__(name="pgkv-move", daemon=True)
        self.conn = conn
        self.failure: psycopg.Error | None = None
        self.ended = threading.Event()
        self._params = params
        self.start()

    def run(self) -> None:
        try:
            self.conn.execute(CITUS_MOVE, self._params)
        except psycopg.Error as error:
            self.failure = error
        finally:
            self.ended.set()


def administered(configs: Sequence[Config], placement: str) -> Servers | CitusCluster:
    """Connections to the servers of a sharded store, or to the nodes of its Citus cluster.

    Args:
        configs: one for each DSN.
        placement: as of `Store.sharded`.
    """
    servers = Servers(configs)
    try:
        first = servers.servers[0]
        if placement != "servers" and not servers.slots:
            with translated(first.place):
                if first.execute(HAS_CITUS).fetchone() == (True,) and any(
                    first.execute(CITUS_NODES)
                ):
                    return CitusCluster(servers.servers)
        if placement == "citus":
            raise ConfigError(f"{first.place} is no node of a Citus cluster")
    except BaseException:
        servers.close()
        raise
    return servers
