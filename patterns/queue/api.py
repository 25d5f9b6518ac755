"""`Queue` and `AsyncQueue`: jobs that are put in the application's transaction and done by workers.

The algorithms are in `flows`, the loop of a worker in `worker`; this module has the sync and async
classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, cast

import psycopg

from ..._engine.caller import check_inside, unwrap
from ..._engine.schema import companion, ensure
from ..._observe import shown
from ..._ops import codec as _codec
from ..._ops.drivers import shielded
from ..._ops.op import Flow, do
from ..._ops.serialize import CodecName, Serializer
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Seconds, require_int
from ...errors import ConfigError, InvalidValueError, TransactionError
from ...store import Store
from .._runtime.checks import home_of, require, require_plain
from .._runtime.lease import extend
from .._runtime.runtimes import AsyncRuntime, SyncRuntime
from . import flows
from .flows import Backoff, HeldJob, Notifier, Put, QueueOptions
from .sql import JOBS, JOBS_UNLOGGED, JobInfo, JobStatements, QueueStats

R = TypeVar("R")
T = TypeVar("T")
U = TypeVar("U")


class Job(HeldJob[T]):
    """A job that was taken; made by `Queue.take`.

    It is leased, and renewed in the background until it ends. Enter it with ``with``: it is
    acknowledged at the end of the block, and put back if that raises. A job that is dropped is no
    longer renewed, and is given to another worker when its lease ends; so is that of a killed or
    paused process. So effects outside of this database may happen twice; `token` tells the attempts
    apart, and ``queue.using(conn).ack(job)`` makes effects inside of it happen once.
    """

    def ack(self) -> None:
        """The job is done: delete it. If its key was put meanwhile it waits again instead.

        Raises:
            LeaseLostError: it was given to another worker, or ended already.
        """
        self._runtime.channel.run(flows.ack(self._runtime, self, self._options.sql))

    def nack(self, delay: Seconds | None = None, error: object = None) -> bool:
        """The attempt failed: let the job wait for its next one. After its last one it is dead.

        Args:
            delay: seconds; by default as the queue's `backoff` has it.
            error: kept with the job, up to 1,000 characters of it.

        Returns:
            Whether it was still held.

        Raises:
            LeaseLostError: it was acknowledged or put back already.
        """
        return bool(self._back(error, delay))

    def release(self, delay: Seconds = 0) -> bool:
        """Put the job back as if it had not been taken: the attempt does not count.

        Args:
            delay: seconds until it is due.

        Returns:
            Whether it was still held.
        """
        return bool(self._back(None, delay, free=True))

    def bury(self, error: object = None) -> bool:
        """Give the job up: it is dead, and kept until `Queue.retry` or `Queue.purge`. If its key was
        put meanwhile it waits again instead.

        Args:
            error: kept with it.

        Returns:
            Whether it was still held.
        """
        return bool(self._back(error, 0, dead=True))

    def extend(self, lease: Seconds) -> None:
        """Let the remaining time become `lease` seconds, and later renewals give that much.

        Args:
            lease: seconds.

        Raises:
            LeaseLostError: it is lost.
        """
        ttl = _codec.seconds(lease, "lease", endless="")
        self._runtime.channel.run(extend(self._runtime, self, ttl))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self._runtime.channel.run(flows.leave(self._runtime, self, error))


class AsyncJob(HeldJob[T]):
    """A job that was taken, for asyncio: `Job`, awaited."""

    async def ack(self) -> None:
        """The job is done; see `Job.ack`."""
        await self._runtime.channel.run(flows.ack(self._runtime, self, self._options.sql))

    async def nack(self, delay: Seconds | None = None, error: object = None) -> bool:
        """The attempt failed; see `Job.nack`."""
        return bool(await self._back(error, delay))

    async def release(self, delay: Seconds = 0) -> bool:
        """Put the job back as if it had not been taken; see `Job.release`."""
        return bool(await self._back(None, delay, free=True))

    async def bury(self, error: object = None) -> bool:
        """Give the job up; see `Job.bury`."""
        return bool(await self._back(error, 0, dead=True))

    async def extend(self, lease: Seconds) -> None:
        """Let the remaining time become `lease` seconds; see `Job.extend`."""
        ttl = _codec.seconds(lease, "lease", endless="")
        await self._runtime.channel.run(extend(self._runtime, self, ttl))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: object, error: BaseException | None, _traceback: object
    ) -> None:
        """As of `Job`; a cancelled block puts the job back without counting the attempt."""
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        end = self._runtime.channel.run(flows.leave(self._runtime, self, error))
        await (shielded(end, flows.CLEAN_UP[1]) if error is not None else end)


class _Jobs(Generic[T]):
    """What `Queue` and `AsyncQueue` share."""

    # The class of store that is needed, the name of the class, and that of its twin.
    _needs: tuple[type[Any], str, str]
    _runtime_of: type[Any]
    _job_of: type[Any]
    _wanted: type[Any]  # psycopg's class of connection
    _bound: Any = None  # the channel of a caller's transaction

    def __init__(
        self,
        store: Any,
        name: str,
        *,
        lease: Seconds = 60,
        max_attempts: int = 20,
        backoff: Backoff = Backoff(),  # noqa: B008  # it cannot change
        wakeup: Literal["poll", "notify"] = "poll",
        durable: bool = True,
    ) -> None:
        require(store, *self._needs)
        store = home_of(store, name)
        if wakeup not in ("poll", "notify"):
            raise ConfigError(f"wakeup must be 'poll' or 'notify', not {wakeup!r}")
        if not isinstance(backoff, Backoff):
            raise ConfigError(f"backoff must be a Backoff, not {type(backoff).__name__}")
        require_int("max_attempts", max_attempts, 1, 10_000)
        ttl = _codec.seconds(lease, "lease", endless="")
        if ttl < 1:
            raise InvalidValueError(f"lease must be 1 second or more, not {lease!r}")
        config = store._config
        require_plain(config, "Queue", "jobs")
        table = companion(config, JOBS if durable else JOBS_UNLOGGED, durable=durable)
        notify = wakeup == "notify"
        self._options = QueueOptions(
            name,
            _codec.encode_key(name, store._sql.prefix_bytes, config.max_key_length, "queue's name"),
            JobStatements(table),
            JobStatements(table, inside=True, notify=notify),
            ttl,
            max_attempts,
            backoff,
            notify,
            config.max_value_size,
            config.max_key_length,
            self._job_of,
        )
        self._store = store
        self._runtime: Any = self._runtime_of(store, flows.REFUSAL)
        self._notifier = Notifier(self._runtime, self._options) if notify else None

    @property
    def name(self) -> str:
        """The queue's name."""
        return self._options.name

    @shown
    def __repr__(self) -> str:
        return (
            f"{self.name!r} lease={self._options.lease:g} max_attempts={self._options.max_attempts}"
        )

    __reduce__ = refuse_pickle

    def using(self, conn: Any) -> Self:
        """Return this queue inside the caller's own connection and transaction: `put`, `put_many` and
        `ack` then take effect with its commit, or not at all.

        Args:
            conn: a psycopg connection, Django's or SQLAlchemy's wrapper of one, or the store of
                ``store.transaction()``.
        """
        view = self._view()
        if inside := isinstance(conn, type(self._store)):
            home_of(conn, self.name)  # refuses the transaction of another slot
        view._bound = (conn if inside else self._store.using(conn))._bare
        if not inside:
            view._caller = unwrap(conn, self._wanted)
        return view

    _caller: Any = None  # the caller's connection

    def _typed(self, type_: Any, codec: CodecName) -> Any:
        view: Any = self._view()
        view._options = replace(self._options, serializer=Serializer(type_, codec))
        return view

    def _view(self) -> Self:
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        return view

    @property
    def _channel(self) -> Any:
        return self._bound or self._runtime.channel

    @property
    def _pool(self) -> Any:
        """The channel of what cannot be done inside a transaction."""
        if self._bound is not None:
            raise TransactionError(flows.REFUSAL)
        return self._runtime.channel

    def _put(self, payload: Any, dedupe: str | None, *due: Any) -> Flow[Put]:
        return flows.put(self._options, *self._putting, payload, dedupe, due)

    def _put_many(self, payloads: Any, *due: Any) -> Flow[list[int]]:
        return flows.put_many(self._options, *self._putting, payloads, due)

    @property
    def _putting(self) -> tuple[JobStatements, Notifier | None]:
        if self._bound is None:
            return self._options.sql, self._notifier
        return self._options.inside, None

    def _take(self, n: int, timeout: Seconds | None) -> Flow[list[Any]]:
        require_int("n", n, 1, 10_000)
        return flows.take(self._runtime, self._options, n, _codec.waiting(timeout))

    def _look(self, n: int) -> Any:
        """One look for jobs: they, and the seconds until the next look."""
        return self._pool.run(flows.look(self._runtime, self._options, n))

    def _ack(self, job: HeldJob[Any]) -> Flow[None]:
        conn, sql = self._caller, self._options.sql
        if self._bound is not None:
            sql = self._options.inside
            if conn is not None:
                check_inside(conn, "ack() through using()")
        return flows.ack(self._runtime, job, sql)

    def _cancel(self, id: int) -> Flow[bool]:
        return do(self._options.sql.cancel(self._options.key, _codec.integer(id, "id")))

    def _purge(self, limit: int) -> Flow[int]:
        return do(self._options.sql.purge(self._options.key, _codec.whole("limit", limit)))


class Queue(_Jobs[T]):
    """A queue of jobs that processes on many machines share, by its name.

    ::

        emails = pgkv.Queue(store, "emails")
        emails.put(b"17")
        with emails.take(timeout=10) as job:
            send(job.payload)

    **Guaranteed:** a job whose put was committed is done at least once, unless it is cancelled or
    dies after `max_attempts`; no crash loses it. If its effects are in this database, and
    ``using(conn).ack(job)`` is in their transaction, it is done exactly once. A job is with one worker
    at a time, as long as each stops at the end of its lease. **Not guaranteed:** that effects outside of
    this database happen once.

    Jobs are taken by priority, and within one by the time they are due. Its table is
    ``<table_name>_jobs``, shared by all queues of the store and created when first needed.

    Args:
        store: a `Store` (or a namespace of one: names then carry its prefix). Not a view of a
            transaction: see `using`.
        name: the queue.
        lease: seconds after which the job of a dead worker is given to another.
        max_attempts: of each job put with this object, after which it is dead. Each take counts.
        backoff: seconds that a failed job waits.
        wakeup: ``"poll"``: who waits looks every second. ``"notify"``: a put wakes who waits, through
            one LISTEN connection (not behind a transaction pooler: there it polls).
        durable: a logged table. False makes it UNLOGGED, faster, and a **crash of the server** loses
            all jobs. All users of a name must say the same.

    Raises:
        ConfigError: a setting is wrong, or `store` is not a `Store`.
        InvalidKeyError: the name cannot be a key.
        InvalidValueError: `lease` is shorter than a second.
        TransactionError: `store` is a view of a transaction.
    """

    _needs = Store, "Queue", "AsyncQueue"
    _runtime_of, _job_of = SyncRuntime, Job
    _wanted = psycopg.Connection

    if TYPE_CHECKING:  # a new queue is one of bytes

        def __new__(cls, *args: Any, **kwargs: Any) -> Queue[bytes]: ...

    def typed(self, type_: type[U], codec: CodecName = "json") -> Queue[U]:
        """Return this queue with payloads of a type.

        Args:
            type_: as of `Store.typed`.
            codec: ``"json"`` or ``"msgpack"``.

        Raises:
            ConfigError: values of that type cannot be kept.
        """
        return cast("Queue[U]", self._typed(type_, codec))

    def put(
        self,
        payload: T | str,
        *,
        delay: Seconds = 0,
        at: datetime | None = None,
        priority: int = 0,
        dedupe: str | None = None,
    ) -> Put:
        """Put a job. Not repeated when the answer is lost: it may have been put, or done already.

        Args:
            payload: bytes or str, or a value of the queue's type.
            delay: seconds until it is due.
            at: the moment at which it is due, instead.
            priority: 0 to 9; 9 is taken first. Low ones wait for as long as there are higher ones.
            dedupe: a key. If a job of this key waits, nothing is put: it runs after this call, at its
                own time and with its own payload. If one runs, it runs again when it has ended, with
                this payload, at once.

        Returns:
            The job's id, and what became of the put.

        Raises:
            InvalidValueError: the payload is too large or of another type; a bad `delay`, `at` or
                `priority`.
        """
        return self._run(self._put(payload, dedupe, delay, at, priority))

    def put_many(
        self,
        payloads: Iterable[T | str],
        *,
        delay: Seconds = 0,
        at: datetime | None = None,
        priority: int = 0,
    ) -> list[int]:
        """Put many jobs, all or none, to be taken in this order; return their ids.

        Args:
            payloads: any number.
            delay: as of `put`, like the others.
            at: a moment.
            priority: 0 to 9.
        """
        return self._run(self._put_many(payloads, delay, at, priority))

    def take(self, timeout: Seconds | None = 0) -> Job[T] | None:
        """Take the next job; None if there is none.

        Args:
            timeout: seconds to wait for one; None waits without end.
        """
        found = self._run(self._take(1, timeout), self._pool)
        return found[0] if found else None

    def take_many(self, n: int, timeout: Seconds | None = 0) -> list[Job[T]]:
        """Take up to `n` jobs in one statement, and return them. Each is leased from now on.

        Args:
            n: 1 to 10,000.
            timeout: seconds to wait for the first.
        """
        return self._run(self._take(n, timeout), self._pool)

    def ack(self, job: Job[Any]) -> None:
        """As `Job.ack`; of ``using(conn)`` in that transaction: if it commits, the job is done, and
        no other worker was given it meanwhile, also past its lease.

        Args:
            job: one of this queue.

        Raises:
            LeaseLostError: it was given to another: roll back.
            TransactionError: no transaction is open.
        """
        self._run(self._ack(job))

    def ack_many(self, jobs: Sequence[Job[Any]]) -> list[Job[Any]]:
        """Acknowledge many jobs; return those that were no longer held.

        Args:
            jobs: of this queue.
        """
        return self._run(flows.ack_many(self._runtime, list(jobs)), self._pool)

    def stats(self) -> QueueStats:
        """Return how many jobs there are in each state. Reads all of them."""
        return self._run(flows.stats(self._options), self._pool)

    def jobs(self, state: str | None = None, *, limit: int = 100) -> list[JobInfo]:
        """List jobs in the order in which they would be taken.

        Args:
            state: ``"waiting"``, ``"delayed"``, ``"running"`` or ``"dead"``; None for all.
            limit: how many at most.
        """
        return self._run(flows.jobs(self._options, state, limit), self._pool)

    def cancel(self, id: int) -> bool:
        """Delete a job that does not run; True if there was one.

        Args:
            id: the job's.
        """
        return self._run(self._cancel(id), self._pool)

    def retry(self, id: int) -> bool:
        """Let a dead job wait again, with all its attempts; True if there was one.

        Args:
            id: the job's.

        Raises:
            ConflictError: another job of its dedupe key is there.
        """
        return self._run(flows.retry(self._options, id), self._pool)

    def purge(self, limit: int = 1000) -> int:
        """Delete up to `limit` dead jobs; return how many."""
        return self._run(self._purge(limit), self._pool)

    def create_table(self) -> None:
        """Create the table if it is missing. Operations do that too, but not inside a caller's
        transaction."""
        self._run(ensure(self._options.sql.table), self._pool)

    def _run(self, flow: Flow[R], channel: Any = None) -> R:
        return cast("R", (channel or self._channel).run(flow))


class AsyncQueue(_Jobs[T]):
    """A queue of jobs that processes on many machines share, for asyncio: `Queue`, awaited.

    ::

        async with await emails.take(timeout=10) as job:
            await send(job.payload)
    """

    _needs = AsyncStore, "AsyncQueue", "Queue"
    _runtime_of, _job_of = AsyncRuntime, AsyncJob
    _wanted = psycopg.AsyncConnection

    if TYPE_CHECKING:  # as of Queue

        def __new__(cls, *args: Any, **kwargs: Any) -> AsyncQueue[bytes]: ...

    def typed(self, type_: type[U], codec: CodecName = "json") -> AsyncQueue[U]:
        """Return this queue with payloads of a type; see `Queue.typed`."""
        return cast("AsyncQueue[U]", self._typed(type_, codec))

    async def put(
        self,
        payload: T | str,
        *,
        delay: Seconds = 0,
        at: datetime | None = None,
        priority: int = 0,
        dedupe: str | None = None,
    ) -> Put:
        """Put a job; see `Queue.put`."""
        return await self._run(self._put(payload, dedupe, delay, at, priority))

    async def put_many(
        self,
        payloads: Iterable[T | str],
        *,
        delay: Seconds = 0,
        at: datetime | None = None,
        priority: int = 0,
    ) -> list[int]:
        """Put many jobs, all or none; see `Queue.put_many`."""
        return await self._run(self._put_many(payloads, delay, at, priority))

    async def take(self, timeout: Seconds | None = 0) -> AsyncJob[T] | None:
        """Take the next job; None if there is none. A cancelled call waits for the answer to its
        statement, and puts the job back."""
        found = await self._run(self._take(1, timeout), self._pool)
        return found[0] if found else None

    async def take_many(self, n: int, timeout: Seconds | None = 0) -> list[AsyncJob[T]]:
        """Take up to `n` jobs in one statement; see `Queue.take_many`."""
        return await self._run(self._take(n, timeout), self._pool)

    async def ack(self, job: AsyncJob[Any]) -> None:
        """As `AsyncJob.ack`, also inside a transaction; see `Queue.ack`."""
        await self._run(self._ack(job))

    async def ack_many(self, jobs: Sequence[AsyncJob[Any]]) -> list[AsyncJob[Any]]:
        """Acknowledge many jobs; return those that were no longer held."""
        return await self._run(flows.ack_many(self._runtime, list(jobs)), self._pool)

    async def stats(self) -> QueueStats:
        """Count its jobs by state; see `Queue.stats`."""
        return await self._run(flows.stats(self._options), self._pool)

    async def jobs(self, state: str | None = None, *, limit: int = 100) -> list[JobInfo]:
        """List jobs in the order in which they would be taken; see `Queue.jobs`."""
        return await self._run(flows.jobs(self._options, state, limit), self._pool)

    async def cancel(self, id: int) -> bool:
        """Delete a job that does not run; True if there was one."""
        return await self._run(self._cancel(id), self._pool)

    async def retry(self, id: int) -> bool:
        """Let a dead job wait again, with all its attempts; see `Queue.retry`."""
        return await self._run(flows.retry(self._options, id), self._pool)

    async def purge(self, limit: int = 1000) -> int:
        """Delete up to `limit` dead jobs; return how many."""
        return await self._run(self._purge(limit), self._pool)

    async def create_table(self) -> None:
        """Create the table if it is missing; see `Queue.create_table`."""
        await self._run(ensure(self._options.sql.table), self._pool)

    async def _run(self, flow: Flow[R], channel: Any = None) -> R:
        return cast("R", await (channel or self._channel).run(flow))
