"""Which server has which slot, and the way of an operation there.

The map is read when a store is made, and again when a server says that a slot's tables are not there:
then nothing happened, and the operation is sent to where the slot went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from random import uniform
from time import monotonic
from typing import Any, NamedTuple

from .._engine import flows as _flows
from .._ops.op import TEXT, Flow, Op, Param, Statement, call, pause
from ..config import Config, Table
from ..errors import (
    ConfigError,
    OperationTimeoutError,
    PgkvError,
    StoreUnavailableError,
    TableNotFoundError,
    TransactionError,
)
from .slots import Slots, apart, schema_of, slot_of_schema
from .sql import (
    READ_MAP,
    READ_SIZES,
    MapRow,
    NodeMap,
    ShardedStatements,
    Spread,
    create_in_slot,
    located,
)

ROUTES_MAX = 10_000  # statements remembered; some are made for each call
PAUSE_FIRST, PAUSE_MAX = 0.002, 0.05  # seconds between two looks for a slot that is being moved
CREATIONS_MAX = 3  # of one call, whose table keeps being dropped


class Shard(NamedTuple):
    """A slot of a sharded store.

    Attributes:
        slot: its number.
        node: the name of the server that has it.
        state: ``live``; ``moving``; or ``lost``, where that server does not have its schema.
        bytes: its tables and their indexes on disk; 0 where the server did not answer.
    """

    slot: int
    node: str
    state: str
    bytes: int


def shard_of(row: MapRow, there: bool, sizes: Mapping[str, int]) -> Shard:
    """What is told of a slot: whether its home has its schema, and how large each schema is there."""
    state = "live" if there and not row.target else "moving" if row.target or row.epoch else "lost"
    return Shard(row.slot, row.home, state, sizes.get(schema_of(row.slot), 0))


class Node:
    """One server.

    Attributes:
        name: as its own map says; empty before that was read.
        channel: performs operations there.
        target: where it is.
        failure: why its map could not be read.
    """

    def __init__(self, channel: Any, target: Any) -> None:
        self.name = ""
        self.channel = channel
        self.target = target
        self.failure: PgkvError | None = None


class Route:
    """Where a statement goes: into the slot of its key, or into one slot.

    Args:
        statement: made for any slot, or for one.
        slots: of the store.
        slot: None for any.
    """

    __slots__ = ("_first", "_of", "_text", "located", "slot", "statement")

    def __init__(self, statement: Statement[Any], slots: Slots, slot: int | None) -> None:
        self.statement = statement
        self.slot = slot
        self._first = statement.key
        self._text = not statement.formats or statement.formats[statement.key] == TEXT
        # What is no text and in a pattern's own table is an id; in the store's, an array of keys.
        is_id = statement.table is not None and statement.table.shape is not None
        self._of: Callable[[Any], int] = (
            slots.of
            if self._text
            else slots.of_id
            if is_id
            else lambda raw: slots.of(_first_of(raw))
        )
        self.located: list[Statement[Any] | None] = [None] * (slots.count if slot is None else 0)

    def find(self, params: Sequence[Param]) -> int:
        """The slot of a call with those parameters."""
        return self._of(params[self._first]) if self.slot is None else self.slot

    def at(self, slot: int) -> Statement[Any]:
        """The statement in that slot."""
        if self.slot is not None:
            return self.statement
        found = self.located[slot]
        if found is None:
            found = self.located[slot] = located(self.statement, slot)
        return found


def _first_of(array: bytes) -> bytes:
    length = int.from_bytes(array[20:24])  # after rank, nulls, type, length and lower bound
    return array[24 : 24 + length]


class Router:
    """The map as a process knows it, and the flows that follow it.

    Args:
        config: the store's.
        slots: how many the map must have; None for whatever it has.
        gather: calls functions, at the same time where that is possible; returns what each returned
            or the `PgkvError` that it raised.
    """

    def __init__(self, config: Config, nodes: Sequence[Node], gather: Callable[..., Any]) -> None:
        self.nodes = [*nodes]
        self.slots = Slots(0)
        self.fences: Any = None  # on Citus
        self.strays: tuple[type[PgkvError], ...] = (TableNotFoundError,)  # what `follow` takes
        self.creates = config.auto_create_table
        self.timeout: float = config.operation_timeout
        self.routes: dict[Statement[Any], Route] = {}
        self._every: dict[Statement[Any], Route] = {}
        self.homes: list[MapRow] = []
        self.channels: list[Any] = []  # of each slot; None where its server is not known
        self.closed = False
        self.gather = gather
        self._reading: set[int] = set()

    # -- the map

    def connect(self, wanted: int | None, timeout: float) -> Flow[None]:
        """Read the map of every server that answers."""
        calls = [partial(node.channel.execute, Op(READ_MAP), timeout) for node in self.nodes]
        for node, found in zip(self.nodes, (yield from call(self.gather, calls)), strict=True):
            if isinstance(found, TableNotFoundError) or found is None:
                raise ConfigError(
                    f"the server at {node.target.place()} has no map of slots: run `pgkv shards init` "
                    "with the DSNs of all servers"
                )
            if isinstance(found, StoreUnavailableError | OperationTimeoutError):
                node.failure = found
            elif isinstance(found, PgkvError):
                raise found
            else:
                self.learn(node, found)
        if all(node.failure is not None for node in self.nodes):
            raise self.nodes[0].failure  # type: ignore[misc]  # as was just asked
        if wanted not in (None, self.slots.count):
            raise ConfigError(
                f"the servers have {self.slots.count} slots, not {wanted}: their number is for the "
                "life of a store; leave slots= out"
            )
        if missing := [slot for slot, row in enumerate(self.homes) if row.epoch < 0]:
            raise ConfigError(f"the map has no home for slot {missing[0]}: run `pgkv shards init`")

    def learn(self, node: Node, found: NodeMap) -> None:
        """Take over what is newer in a server's map."""
        if not self.homes:
            self.slots = Slots(found.slots)
            self.homes = [MapRow(slot, "", -1) for slot in range(found.slots)]
            self.channels = [None] * found.slots
        if found.slots != self.slots.count:
            raise ConfigError(
                f"the server {found.node!r} has a map of {found.slots} slots, others of "
                f"{self.slots.count}: they are not of one store"
            )
        twin = next((each for each in self.nodes if each.name == found.node), node)
        if twin is not node:
            raise ConfigError(
                f"two of the DSNs lead to the server {found.node!r}: {twin.target.place()} and "
                f"{node.target.place()}"
            )
        node.name, node.failure = found.node, None
        for row in found.rows:
            if row.replaces(self.homes[row.slot], node.name):
                self.homes[row.slot] = row
        of_names = {each.name: each.channel for each in self.nodes if each.name}
        self.channels = [of_names.get(row.home) for row in self.homes]

    def channel(self, slot: int) -> Any:
        """The channel of the server that has a slot.

        Raises:
            StoreUnavailableError: that server has not been reached yet, or is not among the DSNs.
        """
        channel = self.channels[slot]
        if channel is None:
            raise self._unknown(slot)
        return channel

    def _unknown(self, slot: int) -> PgkvError:
        home = self.homes[slot].home
        away = [node for node in self.nodes if not node.name]
        if not away:
            return ConfigError(
                f"slot {slot} is on the server {home!r}, which is not among the DSNs: add it"
            )
        places = ", ".join(node.target.place() for node in away)
        return StoreUnavailableError(
            f"slot {slot} is on the server {home!r}, and {places} did not answer: {away[0].failure}"
        )

    def node_of(self, slot: int) -> Node | None:
        """The server that has a slot."""
        return next((each for each in self.nodes if each.channel is self.channels[slot]), None)

    def _find(self, slot: int, deadline: float) -> Flow[Any]:
        """The channel of a slot, its server asked for its name where that is not known yet."""
        if self.channels[slot] is None:
            for node in self.nodes:
                if not node.name:
                    yield from self._read(node, deadline)
        return self.channel(slot)

    def _read(self, node: Node, deadline: float) -> Flow[NodeMap | None]:
        try:
            found: NodeMap | None = yield from call(
                node.channel.execute, Op(READ_MAP), left(deadline)
            )
        except (StoreUnavailableError, OperationTimeoutError) as error:
            node.failure = error
            return None
        if found is not None:
            self.learn(node, found)
        return found

    def shards(self) -> Flow[list[Shard]]:
        """Where each slot is."""
        calls = [
            partial(node.channel.execute, Op(statement))
            for node in self.nodes
            for statement in (READ_MAP, READ_SIZES)
        ]
        answers: list[Any] = yield from call(self.gather, calls)
        sizes: dict[str, dict[str, int]] = {}
        live: dict[str, set[int]] = {}
        for node, found, size in zip(self.nodes, answers[::2], answers[1::2], strict=True):
            if isinstance(found, NodeMap):
                self.learn(node, found)
                live[node.name] = {row.slot for row in found.rows if row.live}
                sizes[node.name] = size if isinstance(size, dict) else {}
        return [
            shard_of(
                row, row.home not in live or row.slot in live[row.home], sizes.get(row.home, {})
            )
            for row in self.homes
        ]

    # -- where an operation goes

    def route(self, statement: Statement[Any]) -> Route | None:
        """The route of a statement of one slot; None of one that is of all of them, or of none."""
        route = self.routes.get(statement)
        if route is None and statement.table is not None and statement.name != "create_table":
            slot = slot_of_schema(statement.table.schema)
            if slot is None and statement.join is not None:
                return None
            if len(self.routes) >= ROUTES_MAX:
                self.routes.clear()
            route = self.routes[statement] = Route(statement, self.slots, slot)
        return route

    def parts(self, op: Op[Any], place: int) -> list[tuple[int, Op[Any]]]:
        """An operation as one for each slot that it concerns."""
        if isinstance(op, Spread):
            return op.parts
        route = self.route(op.statement)
        if route is not None:
            slot = route.find(op.params)
            op.statement = route.at(slot)
            return [(slot, op)]
        if op.statement.table is not None:
            every = self._every.get(op.statement)
            if every is None:
                if len(self._every) >= ROUTES_MAX:
                    self._every.clear()
                every = self._every[op.statement] = Route(op.statement, self.slots, None)
            return [
                (slot, Op(every.at(slot), op.params, op.decode)) for slot in range(self.slots.count)
            ]
        if op.statement.join is None:  # of no table: asked of any server
            return [(place, op)]
        return [(slot, Op(op.statement, op.params, op.decode)) for slot in self.one_of_each()]

    def one_of_each(self) -> list[int]:
        """One slot of each server."""
        return [*{id(channel): slot for slot, channel in enumerate(self.channels)}.values()]

    def perform(self, op: Op[Any], timeout: float | None, own: int) -> Flow[Any]:
        """Perform an operation that is of several slots, or of none."""
        # Citus takes no statement of several slots.
        if isinstance(op, Spread) and op.unite is not None and self.fences is None:
            found = yield from self._united(op, timeout)
            if found:
                return op.join(found)
        answers = yield from self.pipeline([op], atomic=False, own=own, timeout=timeout)
        if isinstance(answers[0], PgkvError):
            raise answers[0]
        return answers[0]

    def _united(self, op: Spread[Any], timeout: float | None) -> Flow[list[Any]]:
        """Read in all slots of a server by one statement, where keys are in most; the answers of the servers.
        Empty where they are to be asked slot by slot: keys are in few, or a slot moved."""
        unite, deadline = op.unite, monotonic() + (self.timeout if timeout is None else timeout)
        slots: dict[Any, list[int]] = {}
        for slot, channel in enumerate(self.channels):
            slots.setdefault(channel, []).append(slot)
        wanted = {self.channels[slot] for slot in op.by_slot}
        if (
            unite is None
            or None in wanted
            or len(op.by_slot) * 2 < sum(len(slots[c]) for c in wanted)
        ):
            return []
        keys = op.by_slot.get

        def read(channel: Any) -> Any:  # made when it is sent: the servers before it work already
            return channel.execute(
                unite([(slot, keys(slot, [])) for slot in slots[channel]]), left(deadline)
            )

        calls = [partial(read, channel) for channel in wanted]
        found: list[Any] = yield from call(self.gather, calls)
        failures = [each for each in found if isinstance(each, PgkvError)]
        if any(isinstance(each, TableNotFoundError) for each in failures):
            return []
        if failures:
            raise failures[0]
        return found

    def pipeline(
        self,
        ops: Sequence[Op[Any]],
        *,
        atomic: bool,
        own: int = 0,
        timeout: float | None = None,
    ) -> Flow[list[Any]]:
        """Send operations, those of one server together; of each its answer or its error.

        Args:
            ops: what to send.
            atomic: all or nothing: they have to be in one slot.
            own: the slot of what names none.
            timeout: seconds for all of it.
        """
        deadline = monotonic() + (self.timeout if timeout is None else timeout)
        parts: list[tuple[int, Op[Any]]] = []
        cuts: list[slice] = []
        for op in ops:
            begin = len(parts)
            parts += self.parts(op, own)
            cuts.append(slice(begin, len(parts)))
        if atomic:
            self._require_one([op for _, op in parts], [slot for slot, _ in parts])
        # What one call writes on a server it writes there at once, or not.
        whole = atomic or (len(ops) == 1 and ops[0].statement.writes)
        answers: list[Any] = [None] * len(parts)
        yield from self._send(parts, answers, whole=whole, deadline=deadline)
        return [
            self._joined(op, answers[cut], parts[cut]) for op, cut in zip(ops, cuts, strict=True)
        ]

    def _require_one(self, ops: Sequence[Op[Any]], slots: Sequence[int]) -> None:
        for op, slot in zip(ops, slots, strict=True):
            if slot != slots[0]:
                raise apart(_key_of(op), slot, f"this transaction in slot {slots[0]}")

    def _joined(self, op: Op[Any], answers: list[Any], parts: list[tuple[int, Op[Any]]]) -> Any:
        if parts[0][1] is op:  # of one slot
            return answers[0]
        join: Any = op.join if isinstance(op, Spread) else op.statement.join
        given: list[Any] = []
        failure: PgkvError | None = None
        for answer, (slot, part) in zip(answers, parts, strict=True):
            if isinstance(answer, PgkvError):
                missed = part.statement.missed
                channel = self.channels[slot]
                if missed is not None and channel.misses.excuse(part.statement, answer):
                    given.append(missed())
                elif failure is None or isinstance(failure, TransactionError):
                    failure = answer  # rather than one that was undone with it
            else:
                given.append(answer)
        return failure or join(given)

    def _send(
        self,
        parts: Sequence[tuple[int, Op[Any]]],
        answers: list[Any],
        *,
        whole: bool,
        deadline: float,
    ) -> Flow[None]:
        waiting = list(range(len(parts)))
        missed: Counter[Any] = Counter()
        strays: set[int] = set()  # slots that are sent apart: with them everything else fails
        while waiting:
            groups: dict[Any, list[int]] = {}
            for index in waiting:
                slot = parts[index][0]
                try:
                    channel = yield from self._find(slot, deadline)
                except PgkvError as error:
                    answers[index] = error
                else:
                    alone = slot if slot in strays and not whole else None
                    groups.setdefault((channel, alone), []).append(index)
            calls = [
                self._calling(channel, [parts[index][1] for index in group], whole, deadline)
                for (channel, _), group in groups.items()
            ]
            sent: list[Any] = yield from call(self.gather, calls)
            again: list[int] = []
            for ((channel, _), group), found in zip(groups.items(), sent, strict=True):
                is_one = len(group) == 1 or isinstance(found, PgkvError)
                for at, index in enumerate(group):
                    answers[index] = found if is_one else found[at]
                lost = [i for i in group if isinstance(answers[i], TableNotFoundError)]
                if isinstance(answers[group[0]], StoreUnavailableError):
                    yield from self.look_for_successor(parts[group[0]][0], channel, deadline)
                follow: dict[Table | None, bool] = {}
                for index in lost:
                    slot, op = parts[index]
                    table, failed = op.statement.table, answers[index]
                    if table in follow or not isinstance(failed, TableNotFoundError):
                        continue
                    follow[table] = True
                    # Preparing a statement fails for all, where the table of one is not there.
                    if failed._table not in ("", table and table.quoted):
                        continue
                    strays.add(slot)
                    settling = self._settled(slot, channel, table, deadline, missed)
                    try:
                        follow[table] = yield from settling
                    except PgkvError as error:  # of this slot: what others answered stays
                        follow[table] = False
                        for each in lost:
                            if whole or parts[each][1].statement.table == table:
                                answers[each] = error
                if not whole:
                    again += [i for i in lost if follow[parts[i][1].statement.table]]
                elif lost and all(follow.values()):
                    again += group
            waiting = again

    def _calling(
        self, channel: Any, ops: list[Op[Any]], whole: bool, deadline: float
    ) -> Callable[[], Any]:
        if len(ops) == 1:
            return partial(channel.execute, ops[0], left(deadline))
        sending = _flows.pipeline(ops, atomic=whole, engine=channel, sql=UNMERGED)
        return partial(channel.run, sending, left(deadline))

    def follow(
        self, op: Op[Any], slot: int, channel: Any, error: PgkvError, deadline: float
    ) -> Flow[Any]:
        """Bring an operation to its end that met no table where its slot was thought to be."""
        failure: PgkvError | None = error
        del error
        table, missed = op.statement.table, Counter[Any]()
        try:
            while True:
                assert failure is not None
                if not (yield from self._settled(slot, channel, table, deadline, missed)):
                    raise failure
                channel = yield from self._find(slot, deadline)
                try:
                    return (yield from call(channel.execute, op, left(deadline)))
                except TableNotFoundError as again:
                    failure = again
        finally:
            failure = None  # its traceback holds this frame

    def look_for_successor(self, slot: int, channel: Any, deadline: float) -> Flow[None]:
        """Read the map after a node did not answer: only Citus may know another address of it."""
        del slot, channel, deadline
        yield from ()

    def _settled(
        self,
        slot: int,
        channel: Any,
        table: Table | None,
        deadline: float,
        missed: Counter[Any],
    ) -> Flow[bool]:
        """After a server said that a slot's table is not there: whether to try again. `missed` counts
        how often a call did not meet that table in a slot that is live."""
        if self.channels[slot] is not channel:
            return True  # another call has read the map meanwhile
        if slot in self._reading:
            yield from pause(PAUSE_FIRST)
            return monotonic() < deadline
        node = next(each for each in self.nodes if each.channel is channel)
        self._reading.add(slot)
        try:
            found = yield from self._read(node, deadline)
            row = next((each for each in found.rows if each.slot == slot), None) if found else None
            known = self.homes[slot]
            if found is None and node.failure is not None:
                raise node.failure
            if row is None or monotonic() >= deadline:
                if row is not None and not row.live:
                    raise StoreUnavailableError(
                        f"slot {slot} was being moved for all of the time; `pgkv shards check` shows "
                        "it, `pgkv shards resume` finishes a move that was interrupted"
                    )
                return False
            if self.channels[slot] is not channel:
                return True
            if row.home == node.name and row.epoch == known.epoch and row.live and not row.target:
                missed[slot, table] += 1
                if table is None or not self.creates:
                    return missed[slot, table] == 1  # it may have got its live name since
                if missed[slot, table] > CREATIONS_MAX:
                    return False
                yield from call(
                    channel.execute,
                    create_in_slot(table, slot),
                    left(deadline),
                )
                return True
            # Between its two commits: the map of its next home does not say so yet.
            yield from pause(uniform(PAUSE_MAX / 4, PAUSE_MAX))  # noqa: S311  # a pause, no secret
            return True
        finally:
            self._reading.discard(slot)

    def create(self, tables: Iterable[Table], slots: Iterable[int] | None = None) -> Flow[None]:
        """Create tables in slots, where they are missing."""
        for slot in range(self.slots.count) if slots is None else slots:
            for table in tables:
                channel = yield from self._find(slot, monotonic() + self.timeout)
                yield from call(channel.execute, create_in_slot(table, slot))


def left(deadline: float) -> float:
    """Seconds until then; never 0, so that the call itself says that its time is over."""
    return max(0.001, deadline - monotonic())


def _key_of(op: Op[Any]) -> bytes:
    key = op.params[op.statement.key] or b""
    return key if op.statement.formats[op.statement.key] == TEXT else _first_of(key)


UNMERGED: Any = ShardedStatements.__new__(ShardedStatements)  # it merges nothing
