"""The sharded stores: a `Store` and an `AsyncStore` whose keys are spread over slots on several servers.

Most operations are the ones of every store. Here is what concerns all slots, and what a store of one
server has and a sharded one has not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import islice
from time import monotonic
from typing import Any, Self, Unpack

from psycopg.conninfo import conninfo_to_dict

from .._engine._async.channel import AsyncPoolChannel
from .._engine._async.pool import AsyncStorePool
from .._engine._sync.channel import PoolChannel
from .._engine._sync.pool import StorePool
from .._ops import codec as _codec
from .._ops.codec import Value
from .._ops.drivers import drive, drive_async
from .._settings import Target, options_of, reach_timeout, table_config
from ..aio import AsyncStore, Opening
from ..config import BYTES_MIN, ENTRIES_MIN, Config, Seconds, TableOptions, dsn_from_environment
from ..errors import ConfigError
from ..store import Store
from ..types import Stats
from .channel import AsyncShardedChannel, InThreads, ShardedChannel, at_once
from .citus import opened
from .placement import Node, Router, Shard
from .slots import ANY, ShardedConfig, Slots, apart
from .sql import ShardedStatements

LOAD_ROWS = 50_000  # items sorted by slot at a time
PLACEMENTS = ("auto", "servers", "citus")


class ShardedTarget:
    """Where a sharded store, or one slot of it, is: what `Target` is to other stores.

    Args:
        router: knows the servers.
        slot: None for all.
    """

    def __init__(self, router: Router, slot: int | None = None) -> None:
        self._router = router
        self._slot = slot

    def dsn(self) -> str:
        """The DSN of the slot's server.

        Raises:
            ConfigError: this is not the place of one slot.
        """
        if self._slot is None:
            raise ConfigError("a sharded store has several DSNs; store.on(key).dsn is one")
        self._router.channel(self._slot)
        return str(self._router.node_of(self._slot).target.dsn())  # type: ignore[union-attr]  # it has a channel

    def place(self) -> str:
        """The servers, as they may be shown."""
        if self._slot is None:
            return ", ".join(node.target.place() for node in self._router.nodes)
        node = self._router.node_of(self._slot)
        return node.target.place() if node is not None else ""


def split(text: str) -> list[str]:
    """The DSNs in a text: URIs with spaces between, or one of any form."""
    parts = text.split()
    return parts if all("://" in part for part in parts) else [text]


def settings(
    dsns: object, slots: object, placement: object, given: Mapping[str, Any]
) -> list[Config]:
    """The settings of each server's connections.

    Raises:
        ConfigError: something is wrong with the DSNs or the settings.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, not {placement!r}")
    if slots is not None and (not isinstance(slots, int) or isinstance(slots, bool)):
        raise ConfigError(f"slots must be an integer, not {slots!r}")
    found: Any = split(dsn_from_environment()) if dsns is None else dsns
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise ConfigError("sharded() takes a list of DSNs, one for each server")
    found = list(found)
    if not found:
        raise ConfigError("sharded() needs the DSN of at least one server")
    options = options_of(given)
    for name, why in (
        ("schema", "each slot is a schema"),
        ("coalesce", "the operations of one turn go to several servers"),
        ("transforms", "its values are stored plain"),
        ("notify", "watch() is of one server"),
    ):
        if options.pop(name, None):
            raise ConfigError(f"a sharded store has no {name}=: {why}")
    return [Config(dsn, schema=ANY, **options) for dsn in found]


def sharded_config(config: Config, slots: Slots, fences: Any = None) -> ShardedConfig:
    """The settings of a store over all slots: a bound is shared out among them, and a missing table is
    created by the store itself."""
    values = {field.name: getattr(config, field.name) for field in fields(Config)}
    values |= shares(config, slots, values) | {"auto_create_table": False}
    return ShardedConfig(**values, shards=slots, fences=fences)


def shares(config: Config, slots: Slots, given: Container[str]) -> dict[str, Any]:
    """Each slot's part of those bounds that were given."""
    least = {"max_entries": ENTRIES_MIN, "max_bytes": BYTES_MIN}
    return {
        name: max(least[name], -(-bound // slots.count))
        for name in least
        if name in given and (bound := getattr(config, name)) is not None
    }


class _Sharded:
    """What both stores share."""

    _config: Any
    _sql: Any
    _channel: Any
    _target: Any
    _bind: Any
    _view: Any

    def _begin(self, config: Config, channel: Any) -> None:
        """Bind it, when the map was read."""
        router: Router = channel.router
        settled = sharded_config(config, router.slots, router.fences)
        for node in router.nodes:
            node.channel._collectors = channel._collectors
        channel.on_close(lambda: [node.target.close() for node in router.nodes])
        self._bind(settled, ShardedTarget(router), ShardedStatements(settled), channel)

    @property
    def _slots(self) -> Slots:
        return self._config.shards  # type: ignore[no-any-return]  # a ShardedConfig's

    def slot_of(self, key: str) -> int:
        """Return the slot of a key: that of the text in its first ``{braces}``, if there is some.

        Args:
            key: as of every operation.
        """
        sql = self._sql
        return self._slots.of(_codec.encode_key(key, sql.prefix_bytes, sql.key_length_max))

    def on(self, key: str) -> Self:
        """Return the store of one slot, that of a key: a plain store, with transactions, ``using(conn)``
        and atomic pipelines. It refuses keys of other slots before anything is sent.

        Args:
            key: any key of the slot.
        """
        return self._home(key)

    def _in_slot(self, slot: int) -> Self:
        if self._slots.own is not None:
            return self
        sql, channel = self._sql.of_slot(slot), self._channel.of_slot(slot)
        view: Self = self._view(config=sql.config, sql=sql, channel=channel)
        view._target = ShardedTarget(channel.router, slot)
        return view

    def _home(self, name: str) -> Self:
        """The store that has a name's lock or queue."""
        slot, own = self.slot_of(name), self._slots.own
        if own not in (None, slot):
            raise apart(name.encode(), slot, f"this store has only slot {own}")
        return self._in_slot(slot)

    def _each(self) -> list[Self]:
        """The stores of all slots, or this one of one slot."""
        if self._slots.own is not None:
            return [self]
        return [self._in_slot(slot) for slot in range(self._slots.count)]

    def table(self, name: str, **options: Unpack[TableOptions]) -> Self:
        """Return a store for another table in the same slots; see `Store.table`."""
        for option in ("schema", "auto_create_table", "transforms", "notify"):
            if option in options:
                raise ConfigError(f"the tables of a sharded store have no {option}= of their own")
        config = table_config(self._config, name, options)
        config = replace(config, **shares(config, self._slots, options))
        view: Self = self._view(config=config, sql=self._sql.of(config))
        return view

    def _check_connection(self, conn: Any) -> None:
        """Refuse the caller's connection where it is plainly another server's."""
        self._channel._one("a caller's connection")
        router = self._channel.router
        info: Any = getattr(conn, "info", None)
        here = router.channel(self._slots.own)
        for node in router.nodes if info is not None else ():
            params = conninfo_to_dict(node.target.dsn())
            if node.channel is not here and all(
                str(params.get(name)) == str(value)
                for name, value in (
                    ("host", info.host),
                    ("port", info.port),
                    ("dbname", info.dbname),
                )
            ):
                raise ConfigError(
                    f"using: this connection is to the server {node.name!r}, not to the one that has "
                    f"slot {self._slots.own}; open it with store.on(key).dsn"
                )

    def _of_all(self, found: Stats) -> Stats:
        """The bounds of all slots together."""
        count = self._slots.count if self._slots.own is None else 1
        return replace(
            found,
            max_entries=found.max_entries and found.max_entries * count,
            max_bytes=found.max_bytes and found.max_bytes * count,
        )

    def _loads(
        self, items: Iterable[Any], progress: Callable[[int], object] | None
    ) -> Iterator[tuple[Any, list[Any], Callable[[int], object] | None]]:
        """What to load into which slot, and what to tell of it."""
        rest, done = iter(items), 0
        while batch := list(islice(rest, LOAD_ROWS)):
            of_slots: dict[int, list[Any]] = {}
            for item in batch:
                of_slots.setdefault(self.slot_of(item[0]), []).append(item)
            for slot, part in sorted(of_slots.items()):
                told = None if progress is None else _told(progress, done)
                yield self._in_slot(slot), part, told
                done += len({item[0] for item in part})


def _node(config: Config) -> Node:
    """A server of a `ShardedStore`."""
    target, own = Target(config), replace(config, auto_create_table=False)
    return Node(PoolChannel(own, StorePool(own, target.conninfo)), target)


def _async_node(config: Config) -> Node:
    """The same for an `AsyncShardedStore`."""
    target, own = Target(config), replace(config, auto_create_table=False)
    return Node(AsyncPoolChannel(own, AsyncStorePool(own, target.conninfo)), target)


def _told(progress: Callable[[int], object], before: int) -> Callable[[int], object]:
    return lambda count: progress(before + count)


def _given(timeout: Seconds | None) -> float | None:
    return None if timeout is None else _codec.seconds(timeout)


class ShardedStore(_Sharded, Store):
    """A `Store` whose keys are spread over slots on several servers; made by `Store.sharded`.

    An operation on one key is what it is in every store. One on many keys is atomic on each server, not
    across servers, and a scan has no common snapshot. A transaction is in one slot: ``store.on(key)``.
    What acts on the whole table (`truncate`, `vacuum`, `evict`, ...) goes slot by slot.
    """

    _channel: ShardedChannel

    @classmethod
    def _open(
        cls, dsns: object, slots: int | None, placement: str, options: Mapping[str, Any]
    ) -> Self:
        configs = settings(dsns, slots, placement, options)
        nodes = [*map(_node, configs)]
        gather = InThreads()
        store = cls.__new__(cls)
        try:
            for node in nodes:
                node.target.dsn()  # an embedded server has a time limit of its own
            timeout = reach_timeout(configs[0])
            found = opened(configs[0], nodes, gather, _node, placement, slots, timeout)
            store._begin(configs[0], ShardedChannel(configs[0], drive(found)))
            store._channel.on_close(gather.close)
        except BaseException:
            gather.close()
            for node in nodes:
                node.channel.close()
                node.target.close()
            raise
        return store

    def shards(self) -> list[Shard]:
        """Return where each slot is, and how large."""
        return drive(self._channel.router.shards())

    def using(self, conn: Any) -> Self:
        """Return the store of one slot inside the caller's own connection; see `Store.using`."""
        self._check_connection(conn)
        return super().using(conn)

    def create_table(self) -> None:
        """Create the table in every slot where it is missing."""
        self._channel.create_missing_table(self._sql.table)

    def load(
        self,
        items: Iterable[tuple[str, Value] | tuple[str, Value, Seconds | None]],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Write many keys by COPY, slot by slot, and return how many; see `Store.load`."""
        if self._channel.router.creates:
            self.create_table()
        parts = self._loads(items, progress)
        return sum(Store.load(store, part, progress=told) for store, part, told in parts)

    def stats(self) -> Stats:
        """Return sizes and health of the table in all slots. Reads all of it: linear."""
        return self._of_all(super().stats())

    def ping(self, timeout: Seconds | None = None) -> float:
        """Make a round trip to every server and return the seconds that all took."""
        started = monotonic()
        drive(self._channel.ping(self._sql.ping(), _given(timeout)))
        return monotonic() - started


class AsyncShardedStore(_Sharded, AsyncStore):
    """A sharded store for asyncio: :class:`ShardedStore`, awaited; made by `AsyncStore.sharded`."""

    _channel: AsyncShardedChannel

    @classmethod
    @contextlib.asynccontextmanager
    async def _open(
        cls, dsns: object, slots: int | None, placement: str, options: Mapping[str, Any]
    ) -> AsyncIterator[Self]:
        configs = settings(dsns, slots, placement, options)
        nodes = [*map(_async_node, configs)]
        store = cls.__new__(cls)
        async with contextlib.AsyncExitStack() as stack:
            for node in nodes:
                stack.push_async_callback(node.channel.close)
            for node in nodes:
                await asyncio.to_thread(node.target.dsn)
            timeout = reach_timeout(configs[0])
            router = await drive_async(
                opened(configs[0], nodes, at_once, _async_node, placement, slots, timeout)
            )
            channel = AsyncShardedChannel(configs[0], router)
            stack.push_async_callback(channel.close)
            store._begin(configs[0], channel)
            yield store

    async def shards(self) -> list[Shard]:
        """Return where each slot is, and how large."""
        return await drive_async(self._channel.router.shards())

    def using(self, conn: Any) -> Self:
        """Return the store of one slot inside the caller's own connection; see `Store.using`."""
        self._check_connection(conn)
        return super().using(conn)

    async def create_table(self) -> None:
        """Create the table in every slot where it is missing."""
        await self._channel.create_missing_table(self._sql.table)

    async def load(
        self,
        items: Iterable[tuple[str, Value] | tuple[str, Value, Seconds | None]],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Write many keys by COPY, slot by slot, and return how many; see `Store.load`."""
        if self._channel.router.creates:
            await self.create_table()
        done = 0
        for store, part, told in self._loads(items, progress):
            done += await AsyncStore.load(store, part, progress=told)
        return done

    async def stats(self) -> Stats:
        """Return sizes and health of the table in all slots. Reads all of it: linear."""
        return self._of_all(await super().stats())

    async def ping(self, timeout: Seconds | None = None) -> float:
        """Make a round trip to every server and return the seconds that all took."""
        started = monotonic()
        await drive_async(self._channel.ping(self._sql.ping(), _given(timeout)))
        return monotonic() - started


def sharded(
    dsns: object, slots: int | None, placement: str, options: Mapping[str, Any]
) -> ShardedStore:
    """What `Store.sharded` returns."""
    return ShardedStore._open(dsns, slots, placement, options)


def sharded_async(
    dsns: object, slots: int | None, placement: str, options: Mapping[str, Any]
) -> Opening[AsyncShardedStore]:
    """What `AsyncStore.sharded` returns."""
    return Opening(
        AsyncShardedStore._open(dsns, slots, placement, options), "AsyncStore.sharded(...)"
    )
