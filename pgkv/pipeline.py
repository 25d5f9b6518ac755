"""`Pipeline`: operations queued now and sent together, in one round trip.

It has a store's methods, which return a `Handle` at once; the handle's ``result()`` is available after
the ``with`` block. `_flows.pipeline` sends the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Self, TypeVar, Unpack, overload

from ._engine import flows as _flows
from ._observe import shown
from ._ops.op import Flow, Op, Undecoded
from ._settings import scan_options, text_of
from ._sql import Statements
from ._sql.point import negated
from .errors import NotFoundError, PgkvError, TransactionError
from .types import (
    AtLeast,
    AtMost,
    CasResult,
    Entry,
    ExpiryOptions,
    IncrementResult,
    KeyValue,
    ScanOptions,
    ScanRange,
)

if TYPE_CHECKING:
    from ._engine._async.coalesce import AsyncChannel
    from ._engine._sync.channel import Channel
    from ._ops.codec import Value
    from .config import Seconds

T = TypeVar("T")

UNSENT = "not sent yet: leave the pipeline's `with` block first"


class Handle(Generic[T]):
    """The promise of one queued operation's outcome; made by the methods of a `Pipeline`."""

    __slots__ = ("_answers", "_begin", "_combine", "_end", "_names", "_state")

    # Few objects for each: a pipeline makes hundreds, and the garbage collector looks at them.
    _answers: list[Any]

    def __init__(self, names: str, combine: Callable[[list[Any]], T], begin: int, end: int) -> None:
        self._names = names
        self._combine = combine
        self._begin = begin  # its operations among the pipeline's
        self._end = end
        self._state = UNSENT

    def result(self) -> T:
        """Return what the operation returned.

        Raises:
            TransactionError: the pipeline was not sent, or was rolled back as a whole.
            PgkvError: the operation's own error.
        """
        if self._state:
            raise TransactionError(f"{self._names}: {self._state}")
        for answer in self._answers:
            if isinstance(answer, PgkvError):
                raise answer
            if isinstance(answer, Undecoded):
                raise answer.error
        return self._combine(self._answers)

    def __bool__(self) -> NoReturn:
        # A handle would always be true, even that of a set_nx that wrote nothing.
        raise TypeError(f"a Handle is neither true nor false; ask {self._names}'s result()")

    @shown
    def __repr__(self) -> str:
        for answer in () if self._state else self._answers:
            if isinstance(answer, PgkvError):
                return f"{self._names} failed: {type(answer).__name__}"
        return f"{self._names} {'pending' if self._state is UNSENT else self._state or 'done'}"


def _first(answers: list[Any]) -> Any:
    return answers[0]


class _Queue:
    """What the sync and the async pipeline share: everything but the sending."""

    def __init__(self, sql: Statements, channel: Any, *, atomic: bool) -> None:
        self._sql = sql
        self._channel = channel
        self._atomic = atomic
        self._ops: list[Op[Any]] = []
        self._handles: list[Handle[Any]] = []
        self._over = False

    def __len__(self) -> int:
        return len(self._handles)

    def __bool__(self) -> bool:
        return True

    @shown
    def __repr__(self) -> str:
        kind = "atomic, " if self._atomic else ""
        return f"{kind}{len(self)} operations {'sent' if self._over else 'queued'}"

    def _queue(self, op: Op[Any], combine: Callable[[list[Any]], T] = _first) -> Handle[T]:
        return self._queue_all((op,), op.statement.name, combine)

    def _queue_all(
        self, ops: Sequence[Any], name: str, combine: Callable[[list[Any]], T]
    ) -> Handle[T]:
        if self._over:
            raise TransactionError(f"{name}: the pipeline has been sent; open another one")
        begin = len(self._ops)
        self._ops += ops
        handle = Handle(name, combine, begin, len(self._ops))
        self._handles.append(handle)
        return handle

    def _sending(self) -> Flow[None]:
        """Send what was queued, and give each handle its outcome."""
        self._over = True
        try:
            answers = yield from _flows.pipeline(
                self._ops, atomic=self._atomic, engine=self._channel, sql=self._sql
            )
        except BaseException as error:
            if not isinstance(error, PgkvError) or self._atomic:
                self._discard(f"sending failed: {type(error).__name__}")
            raise
        undone = self._atomic and any(isinstance(answer, PgkvError) for answer in answers)
        for handle in self._handles:
            handle._answers = answers[handle._begin : handle._end]
            handle._state = _flows.UNDONE if undone and not handle._answers else ""
        failure = _flows.unsent(answers)
        if failure is not None:
            raise failure

    def _discard(self, why: str) -> None:
        self._over = True
        for handle in self._handles:
            handle._state = why

    # -- the operations; see Store for what they do

    @overload
    def get(self, key: str) -> Handle[bytes | None]: ...
    @overload
    def get(self, key: str, default: T) -> Handle[bytes | T]: ...
    def get(self, key: str, default: Any = None) -> Handle[Any]:
        """Queue `Store.get`."""
        op = self._sql.get(key)
        if default is None:
            return self._queue(op)
        return self._queue(op, lambda values: default if values[0] is None else values[0])

    def get_or_raise(self, key: str) -> Handle[bytes]:
        """Queue `Store.get_or_raise`."""

        def found(values: list[bytes | None]) -> bytes:
            if values[0] is None:
                raise NotFoundError(f"no such key: {key!r}")
            return values[0]

        return self._queue(self._sql.get(key), found)

    def get_string(self, key: str) -> Handle[str | None]:
        """Queue `Store.get_string`."""
        return self._queue(
            self._sql.get(key),
            lambda values: None if values[0] is None else text_of(key, values[0]),
        )

    def get_entry(self, key: str) -> Handle[Entry | None]:
        """Queue `Store.get_entry`."""
        return self._queue(self._sql.get_entry(key))

    @overload
    def set(self, key: str, value: Value, **expiry: Unpack[ExpiryOptions]) -> Handle[int]: ...
    @overload
    def set(
        self, key: str, value: Value, *, if_version: int | None, **expiry: Unpack[ExpiryOptions]
    ) -> Handle[int | None]: ...
    def set(
        self,
        key: str,
        value: Value,
        *,
        ttl: Seconds | None = None,
        expires_at: datetime | None = None,
        keep_ttl: bool = False,
        if_version: int | None = None,
    ) -> Handle[Any]:
        """Queue `Store.set`."""
        return self._queue(self._sql.set(key, value, ttl, expires_at, keep_ttl, if_version))

    def set_ex(self, key: str, value: Value, ttl: Seconds) -> Handle[int]:
        """Queue `Store.set_ex`."""
        return self.set(key, value, ttl=ttl)

    def set_at(self, key: str, value: Value, expires_at: datetime) -> Handle[int]:
        """Queue `Store.set_at`."""
        return self.set(key, value, expires_at=expires_at)

    def set_nx(self, key: str, value: Value, *, ttl: Seconds | None = None) -> Handle[bool]:
        """Queue `Store.set_nx`."""
        return self._queue(self._sql.set_nx(key, value, ttl))

    def set_nx_ex(self, key: str, value: Value, ttl: Seconds) -> Handle[bool]:
        """Queue `Store.set_nx_ex`."""
        return self._queue(self._sql.set_nx(key, value, ttl))

    def set_xx(self, key: str, value: Value, *, ttl: Seconds | None = None) -> Handle[bool]:
        """Queue `Store.set_xx`."""
        return self._queue(self._sql.set_xx(key, value, ttl))

    def delete(self, key: str, *, if_version: int | None = None) -> Handle[bool]:
        """Queue `Store.delete`."""
        return self._queue(self._sql.delete(key, if_version))

    def exists(self, key: str) -> Handle[bool]:
        """Queue `Store.exists`."""
        return self._queue(self._sql.exists(key))

    def get_and_touch(self, key: str, ttl: Seconds) -> Handle[bytes | None]:
        """Queue `Store.get_and_touch`."""
        return self._queue(self._sql.get_and_touch(key, ttl))

    def get_many(self, keys: Iterable[str]) -> Handle[dict[str, bytes]]:
        """Queue `Store.get_many`."""
        op = self._sql.get_many(keys)
        return self._queue_all([] if op is None else [op], "get_many", lambda all_: _one(all_, {}))

    def set_many(
        self,
        items: Mapping[str, Value] | Iterable[tuple[str, Value]],
        *,
        ttl: Seconds | None = None,
    ) -> Handle[int]:
        """Queue `Store.set_many`. Beyond 5,000 keys all or nothing only in an atomic pipeline."""
        count, ops = self._sql.set_many(items, ttl)
        return self._queue_all(ops, "set_many", lambda _: count)

    def delete_many(self, keys: Iterable[str]) -> Handle[int]:
        """Queue `Store.delete_many`; see `set_many`."""
        return self._queue_all(self._sql.delete_many(keys), "delete_many", sum)

    def exists_many(self, keys: Iterable[str]) -> Handle[builtin_set[str]]:
        """Queue `Store.exists_many`."""
        op = self._sql.exists_many(keys)
        none: builtin_set[str] = builtin_set()
        return self._queue_all(
            [] if op is None else [op], "exists_many", lambda all_: _one(all_, none)
        )

    def expire_many(self, keys: Iterable[str], ttl: Seconds) -> Handle[int]:
        """Queue `Store.expire_many`; see `set_many`."""
        return self._queue_all(self._sql.expire_many(keys, ttl), "expire_many", sum)

    @overload
    def increment(self, key: str, delta: int = 1, *, ttl: Seconds | None = None) -> Handle[int]: ...
    @overload
    def increment(
        self, key: str, delta: int = 1, *, only_if_exists: Literal[True]
    ) -> Handle[int | None]: ...
    @overload
    def increment(
        self, key: str, delta: int = 1, **bounds: Unpack[AtLeast]
    ) -> Handle[IncrementResult]: ...
    @overload
    def increment(
        self, key: str, delta: int = 1, **bounds: Unpack[AtMost]
    ) -> Handle[IncrementResult]: ...
    def increment(
        self,
        key: str,
        delta: int = 1,
        *,
        ttl: Seconds | None = None,
        only_if_exists: bool = False,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> Any:
        """Queue `Store.increment`; the handle returns what that does."""
        return self._queue(self._sql.increment(key, delta, ttl, only_if_exists, minimum, maximum))

    def decrement(self, key: str, delta: int = 1, *, ttl: Seconds | None = None) -> Handle[int]:
        """Queue `Store.decrement`."""
        return self._queue(self._sql.increment(key, negated(delta), ttl))

    def append(self, key: str, value: Value, *, ttl: Seconds | None = None) -> Handle[int]:
        """Queue `Store.append`."""
        return self._queue(self._sql.append(key, value, ttl))

    def compare_and_swap(
        self,
        key: str,
        expected: Value | None,
        new: Value,
        *,
        ttl: Seconds | None = None,
    ) -> Handle[CasResult]:
        """Queue `Store.compare_and_swap`."""
        return self._queue(self._sql.compare_and_swap(key, expected, new, ttl))

    def compare_and_delete(self, key: str, expected: Value) -> Handle[bool]:
        """Queue `Store.compare_and_delete`."""
        return self._queue(self._sql.compare_and_delete(key, expected))

    def get_and_set(
        self, key: str, value: Value, *, ttl: Seconds | None = None
    ) -> Handle[bytes | None]:
        """Queue `Store.get_and_set`."""
        return self._queue(self._sql.get_and_set(key, value, ttl))

    def get_and_delete(self, key: str) -> Handle[bytes | None]:
        """Queue `Store.get_and_delete`."""
        return self._queue(self._sql.get_and_delete(key))

    def expire(self, key: str, ttl: Seconds, *, if_version: int | None = None) -> Handle[bool]:
        """Queue `Store.expire`."""
        return self._queue(self._sql.expire(key, ttl, if_version))

    def expire_at(self, key: str, moment: datetime) -> Handle[bool]:
        """Queue `Store.expire_at`."""
        return self._queue(self._sql.expire_at(key, moment))

    def persist(self, key: str) -> Handle[bool]:
        """Queue `Store.persist`."""
        return self._queue(self._sql.persist(key))

    def ttl(self, key: str) -> Handle[float | None]:
        """Queue `Store.ttl`."""
        return self._queue(self._sql.ttl(key))

    def keys(
        self, prefix: str | ScanOptions = "", **options: Unpack[ScanRange]
    ) -> Handle[list[str]]:
        """Queue `Store.keys`."""
        return self._queue(self._sql.keys(scan_options(prefix, options)))

    def scan(
        self, prefix: str | ScanOptions = "", **options: Unpack[ScanRange]
    ) -> Handle[list[KeyValue]]:
        """Queue `Store.scan`."""
        return self._queue(self._sql.scan(scan_options(prefix, options)))

    def count(self, prefix: str = "", *, include_expired: bool = False) -> Handle[int]:
        """Queue `Store.count`."""
        return self._queue(self._sql.count(prefix, include_expired))

    def delete_prefix(self, prefix: str) -> Handle[int]:
        """Queue `Store.delete_prefix`."""
        return self._queue(self._sql.delete_prefix(prefix))


builtin_set = set  # inside the class body the name means the method


class Pipeline(_Queue):
    """Operations of a `Store` that are sent together: ``with store.pipeline() as p``; made by
    `Store.pipeline`.

    Each method takes what the store's of the same name takes, queues, and returns a `Handle`; at the
    end of the block everything is sent, in order. Bad input raises at the call. If the body raises, nothing is sent.

    A refused operation does not disturb the others; its own handle raises. That the server cannot
    be reached, or does not answer in time, is raised at the end of the block as well. With ``atomic=True``
    they are one transaction: after a refusal none has happened, the refused one's handle raises
    its own error and every other handle `TransactionError`. (Without a refusal a pipeline of up to
    1,000 operations is one transaction either way.)

    Not offered: `update` and `increment_many`, which take several round trips by nature.
    """

    _channel: Channel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard(f"not sent, because the block raised {kind.__name__}")
            return
        self._channel.run(self._sending())


class AsyncPipeline(_Queue):
    """Operations of an `AsyncStore` that are sent together: ``async with store.pipeline() as p``.

    Queueing is not awaited, and neither is ``result()``; only the end of the block is. See
    `Pipeline`.
    """

    _channel: AsyncChannel

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard(f"not sent, because the block raised {kind.__name__}")
            return
        await self._channel.run(self._sending())


def _one(answers: list[Any], otherwise: T) -> T:
    return answers[0] if answers else otherwise
