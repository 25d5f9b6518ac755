"""A sharded store on a Citus cluster: which node has which slot, and the way of an operation there.

Slots are distributed schemas: Citus places and moves them, and its metadata are the map. They are read when
a store is made, and again when a fence or a node says that a slot is not there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from random import uniform
from time import monotonic
from typing import Any

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .._engine.schema import CREATED_BY_ANOTHER, create_commands
from .._ops.op import Flow, Op, call, pause
from .._sql.table import command
from ..config import Config, Table
from ..errors import (
    ConfigError,
    OperationTimeoutError,
    PgkvError,
    StoreUnavailableError,
    TableNotFoundError,
)
from .fences import Fences
from .placement import CREATIONS_MAX, PAUSE_FIRST, PAUSE_MAX, Node, Router, Shard, left
from .slots import Slots, schema_of
from .sql import (
    CITUS_SIZES,
    HAS_FENCE,
    READ_GROUP,
    READ_PLACEMENT,
    MapRow,
    NodeAddress,
    Placement,
)

LOOK_AGAIN = 0.3  # seconds between two looks for the successor of a node that is away


class CitusRouter(Router):
    """The placement as a process knows it, and the flows that follow it.

    Args:
        make: makes the node at an address that is not among the DSNs.
    """

    def __init__(
        self,
        config: Config,
        nodes: Sequence[Node],
        gather: Callable[..., Any],
        make: Callable[[Config], Node],
    ) -> None:
        super().__init__(config, nodes, gather)
        self.fences = Fences()
        self.strays = (TableNotFoundError, StoreUnavailableError)
        self._looked_at = 0.0
        self._config = config
        self._make = make
        self._of_groups: dict[int, Node] = {}
        self._addresses: dict[int, NodeAddress] = {}

    def connect(self, wanted: int | None, timeout: float) -> Flow[None]:
        """Read which node each DSN leads to, and the placement."""
        calls = [partial(node.channel.execute, Op(READ_GROUP), timeout) for node in self.nodes]
        for node, found in zip(self.nodes, (yield from call(self.gather, calls)), strict=True):
            if isinstance(found, StoreUnavailableError | OperationTimeoutError):
                node.failure = found
                continue
            if isinstance(found, PgkvError):
                raise found
            group, slots = found
            if group in self._of_groups:
                raise ConfigError(
                    f"two of the DSNs lead to one node of Citus: {node.target.place()} and "
                    f"{self._of_groups[group].target.place()}"
                )
            if not slots:
                raise ConfigError(
                    f"the cluster of {node.target.place()} has no slots: run `pgkv shards init` with "
                    "the coordinator's DSN"
                )
            self._of_groups[group] = node
            self.slots = Slots(slots)
        if not self._of_groups:
            raise self.nodes[0].failure  # type: ignore[misc]  # as was just asked
        if wanted not in (None, self.slots.count):
            raise ConfigError(
                f"the cluster has {self.slots.count} slots, not {wanted}: their number is for the "
                "life of a store; leave slots= out"
            )
        for node in [each for each in self.nodes if each.failure is not None]:
            self.nodes.remove(node)  # its address finds it again
            yield from call(node.channel.close)
        yield from self._read_placement(monotonic() + timeout)
        if missing := [slot for slot, row in enumerate(self.homes) if not row.home]:
            raise ConfigError(f"slot {missing[0]} is on no node: run `pgkv shards init` again")

    def _read_placement(self, deadline: float) -> Flow[bool]:
        """Ask the coordinator, or the next node that answers; whether anything is new."""
        failure: PgkvError | None = None
        for _, node in sorted(self._of_groups.items()):
            try:
                found = yield from call(
                    node.channel.execute, Op(READ_PLACEMENT), min(2.0, left(deadline))
                )
            except (StoreUnavailableError, OperationTimeoutError) as error:
                node.failure = failure = error
            else:
                return (yield from self._take_over(found))
        assert failure is not None
        try:
            raise failure
        finally:
            failure = None  # its traceback holds this frame

    def _take_over(self, found: Placement) -> Flow[bool]:
        is_new = False
        for group, address in found.nodes.items():
            known = self._addresses.get(group)
            self._addresses[group] = address
            node = self._of_groups.get(group)
            if node is not None and known in (None, address):
                node.name = address.name
                continue
            is_new = True
            made = self._of_groups[group] = self._at(address)
            self.nodes = [*(each for each in self.nodes if each is not node), made]
            if node is not None:  # Citus was told of another address
                yield from call(node.channel.close)
        homes = [MapRow(slot, "", 0) for slot in range(self.slots.count)]
        channels: list[Any] = [None] * self.slots.count
        for slot, group in found.owners.items():
            if slot < len(homes) and (node := self._of_groups.get(group)) is not None:
                homes[slot], channels[slot] = MapRow(slot, node.name, 0, live=True), node.channel
        is_new = self.fences.learn(found.relations) or is_new or channels != self.channels
        self.homes, self.channels = homes, channels
        return is_new

    def _at(self, address: NodeAddress) -> Node:
        """The node at an address: for the rest, its DSN is that of the first one."""
        params: dict[str, Any] = conninfo_to_dict(self.nodes[0].target.dsn())
        params.pop("hostaddr", None)
        params |= {"host": address.host, "port": address.port}
        node = self._make(replace(self._config, dsn=make_conninfo("", **params)))
        node.name = address.name
        node.channel._collectors = self.nodes[0].channel._collectors
        return node

    def _find(self, slot: int, deadline: float) -> Flow[Any]:
        if self.channels[slot] is None:
            yield from self._read_placement(deadline)
        return self.channel(slot)

    def _unknown(self, slot: int) -> PgkvError:
        return ConfigError(f"slot {slot} is on no node: run `pgkv shards init` again")

    def shards(self) -> Flow[list[Shard]]:
        """Where each slot is."""
        yield from self._read_placement(monotonic() + self.timeout)
        calls = [partial(node.channel.execute, Op(CITUS_SIZES)) for node in self.nodes]
        answers: list[Any] = yield from call(self.gather, calls)
        sizes = {
            node.name: found
            for node, found in zip(self.nodes, answers, strict=True)
            if isinstance(found, dict)
        }
        return [
            Shard(row.slot, row.home, "live", sizes.get(row.home, {}).get(schema_of(row.slot), 0))
            for row in self.homes
        ]

    def perform(self, op: Op[Any], timeout: float | None, own: int) -> Flow[Any]:
        """Perform an operation that is of several slots, or of none."""
        if op.statement.name == "recreate_table":
            deadline = monotonic() + (self.timeout if timeout is None else timeout)
            _, *commands = filter(str.strip, op.statement.sql.split(";"))  # without SET LOCAL
            yield from self._command(commands, deadline)
            yield from self._read_placement(deadline)
            return None
        return (yield from super().perform(op, timeout, own))

    def follow(
        self, op: Op[Any], slot: int, channel: Any, error: PgkvError, deadline: float
    ) -> Flow[Any]:
        """Bring an operation to its end that met no table, or no node: Citus may know another one."""
        if isinstance(error, TableNotFoundError):
            return (yield from super().follow(op, slot, channel, error, deadline))
        try:
            yield from self.look_for_successor(slot, channel, deadline)
            if self.channels[slot] is channel or error.outcome_unknown:
                raise error
        finally:
            del error  # its traceback holds this frame
        return (yield from call(self.channel(slot).execute, op, left(deadline)))

    def look_for_successor(self, slot: int, channel: Any, deadline: float) -> Flow[None]:
        if self.channels[slot] is channel and monotonic() > self._looked_at + LOOK_AGAIN:
            self._looked_at = monotonic()
            with contextlib.suppress(PgkvError):
                yield from self._read_placement(deadline)

    def _settled(
        self,
        slot: int,
        channel: Any,
        table: Table | None,
        deadline: float,
        missed: Counter[Any],
    ) -> Flow[bool]:
        """After a node said that a slot, or its table, is not there: whether to try again."""
        if self.channels[slot] is not channel:
            return True  # another call has read the placement meanwhile
        if self._reading:
            yield from pause(PAUSE_FIRST)
            return monotonic() < deadline
        self._reading.add(slot)
        try:
            if (yield from self._read_placement(deadline)):
                return True
            if table is not None and table.quoted not in self.fences:
                missed[slot, table] += 1
                if not self.creates or missed[slot, table] > CREATIONS_MAX:
                    return False
                yield from self._create(table, deadline)
                yield from self._read_placement(deadline)
                return True
            if monotonic() >= deadline:
                raise StoreUnavailableError(
                    f"slot {slot} was being moved for all of the time; `pgkv shards check` shows it"
                )
            # It is being moved: the metadata do not say where to before that is done.
            yield from pause(uniform(PAUSE_MAX / 4, PAUSE_MAX))  # noqa: S311  # a pause, no secret
            return True
        finally:
            self._reading.discard(slot)

    def create(self, tables: Iterable[Table], slots: Iterable[int] | None = None) -> Flow[None]:
        """Create tables in slots, where they are missing."""
        deadline = monotonic() + self.timeout
        missing = [
            each
            for slot in (range(self.slots.count) if slots is None else slots)
            for table in tables
            if (each := replace(table, schema=schema_of(slot))).quoted not in self.fences
        ]
        for table in missing:
            yield from self._create(table, deadline)
        if missing:
            yield from self._read_placement(deadline)

    def _create(self, table: Table, deadline: float) -> Flow[None]:
        try:
            yield from self._command(create_commands(table), deadline)
        except PgkvError as error:
            if error._sqlstate not in CREATED_BY_ANOTHER:
                raise

    def _command(self, commands: Iterable[str], deadline: float) -> Flow[None]:
        """Run commands at the coordinator, one by one, as Citus takes them."""
        coordinator = self._of_groups.get(0)
        if coordinator is None:
            raise StoreUnavailableError("tables are made at the coordinator, which is not known")
        for text in commands:
            statement = command("create_table", text)
            yield from call(coordinator.channel.execute, Op(statement), left(deadline))


def opened(
    config: Config,
    nodes: Sequence[Node],
    gather: Callable[..., Any],
    make: Callable[[Config], Node],
    placement: str,
    slots: int | None,
    timeout: float,
) -> Flow[Router]:
    """The router of a store over those servers, which has read where its slots are."""
    router = Router(config, nodes, gather)
    if placement != "servers":
        calls = [partial(node.channel.execute, Op(HAS_FENCE), timeout) for node in nodes]
        answers: list[Any] = yield from call(gather, calls)
        if True in answers:
            router = CitusRouter(config, nodes, gather, make)
        elif placement == "citus":
            for each in answers:
                if isinstance(each, PgkvError):
                    raise each
            raise ConfigError(
                f"the server at {nodes[0].target.place()} has no slots on Citus: run `pgkv shards "
                "init` with the coordinator's DSN"
            )
    yield from router.connect(slots, timeout)
    return router
