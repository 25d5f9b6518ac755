"""What this process says of its own writes, under ``notify=True``.

Keys are collected and sent together a moment later, outside the caller's way, so that NOTIFY's global lock
is taken once for many writes. In a transaction they are part of it: heard at its commit, or never.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .. import _observe
from .._background.background import backgrounds, workers
from .._engine._sync.channel import PoolChannel
from .._engine.base import InTransaction
from .._fork import survives_fork
from .._ops.codec import decode_array
from .._ops.drivers import drive, drive_async
from .._ops.op import Flow, Op, Param, Pipelined, Statement, Step, Transaction, do, pause
from .._sql.watch import WatchStatements
from ..config import Config
from ..errors import ConfigError, PgkvError

DELAY = 0.01  # seconds in which keys are collected
KEYS_MAX = 1_000  # of one call; more are not named

ALL: tuple[bytes, ...] = (b"",)  # stands for any key


class Outbox:
    """Keys that were written over one pool's connections and that no notification has named yet."""

    def __init__(self, channel: Any) -> None:
        self._channel = weakref.ref(channel)
        self._waiting: deque[tuple[WatchStatements, Iterable[bytes]]] = deque()
        self._job: object | None = None  # sends what waits, soon
        channel.last_flows.append(self._send)
        survives_fork(self)

    def after_fork(self) -> None:
        """What waits is the parent's to send."""
        self._waiting.clear()
        self._job = None

    def add(self, sql: WatchStatements, keys: Iterable[bytes]) -> None:
        """Say soon that these keys were written."""
        self._waiting.append((sql, keys))
        if self._job is None:
            job = self._job = object()
            channel = self._channel()

            def done() -> None:
                if self._job is job:  # it never began
                    self._job = None
                    self._waiting.clear()

            def later() -> Any:
                return channel.run(self._send_soon())  # type: ignore[union-attr]  # who adds has it

            if isinstance(channel, PoolChannel):
                begun = workers.submit(later, done)
            else:
                loop = asyncio.get_running_loop()
                begun = backgrounds.get(channel, loop).run_later(later, done)  # type: ignore[arg-type]  # as above
            if not begun:
                done()

    def _send_soon(self) -> Flow[None]:
        yield from pause(DELAY)
        yield from self._send()

    def _send(self) -> Flow[None]:
        self._job = None  # what is added from now on may not be sent here
        tables: dict[str, tuple[WatchStatements, dict[bytes, None]]] = {}
        while self._waiting:
            sql, keys = self._waiting.popleft()
            tables.setdefault(sql.t, (sql, {}))[1].update(dict.fromkeys(keys))
        for sql, found in tables.values():
            for op in sql.notify(() if b"" in found or len(found) > KEYS_MAX else found):
                try:
                    yield from do(op)
                except PgkvError as error:
                    # Watchers see it when they compare.
                    _observe.debug("pgkv.watch.hint_lost", error=type(error).__name__)


_outboxes: weakref.WeakKeyDictionary[Any, Outbox] = weakref.WeakKeyDictionary()


class Noting:
    """A channel that tells of what its operations wrote. Everything else is the inner channel's.

    Args:
        inner: performs the operations.
        config: names the table.
    """

    _noted: Callable[[Any, Step], Any]  # the answer, once what the step wrote is noted

    def __init__(self, inner: Any, config: Config) -> None:
        if hasattr(config, "shards"):
            raise ConfigError("a sharded store has no notify=: watchers hear of one server")
        self._inner = inner
        self._sql = WatchStatements(config)
        self._pool = getattr(inner, "_inner", inner)  # under a channel that coalesces
        self._outbox: Outbox | None = None
        if not isinstance(self._pool, InTransaction):
            self._outbox = _outboxes.get(self._pool) or _outboxes.setdefault(
                self._pool, Outbox(self._pool)
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def call(self, statement: Statement[Any], params: Sequence[Param]) -> Any:
        answer = self._inner.call(statement, params)
        return self._noted(answer, Op(statement, params)) if statement.writes else answer

    def execute(self, op: Op[Any], timeout: float | None = None) -> Any:
        return self._noted(self._inner.execute(op, timeout), op)

    def _together(self, step: Transaction[Any] | Pipelined, timeout: float | None) -> Any:
        return self._noted(self._pool._together(step, timeout), step)

    def tell_all(self) -> None:
        """Say that any key may have been written, outside of transactions."""
        self._ops(ALL)

    def _ops(self, keys: Sequence[bytes]) -> Sequence[Op[None]]:
        """The notifications that the caller's own transaction has to carry."""
        if not keys:
            return ()
        if self._outbox is None:
            return self._sql.notify(() if b"" in keys else keys)
        self._outbox.add(self._sql, keys)
        return ()


class NotingChannel(Noting):
    def run(self, flow: Flow[Any], timeout: float | None = None) -> Any:
        return drive(flow, self.execute, timeout, self._together)

    def _noted(self, answer: Any, step: Step) -> Any:
        for op in self._ops(written(step)):
            self._inner.execute(op)
        return answer


class AsyncNotingChannel(Noting):
    async def run(self, flow: Flow[Any], timeout: float | None = None) -> Any:
        return await drive_async(flow, self.execute, timeout, self._together)

    async def _noted(self, answer: Any, step: Step) -> Any:
        found = await answer
        for op in self._ops(written(step)):
            await self._inner.execute(op)
        return found


def written(step: Step) -> Sequence[bytes]:
    """The keys that a step wrote; `ALL` where it does not name them, or names many."""
    if isinstance(step, Pipelined):
        return [key for op in step.ops for key in written(op)]
    if not isinstance(step, Op):
        return ALL
    statement = step.statement
    if not statement.writes:
        return ALL if statement.name == "truncate" else ()
    if statement.one_key:
        return (step.params[0] or b"",)
    count = step.keys
    return ALL if count is None or count > KEYS_MAX else decode_array(step.params[0] or b"")
