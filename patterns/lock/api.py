"""Distributed locks on PostgreSQL: leases with fencing tokens, for threads and for asyncio.

A lock is a row with a holder, an end and a token; a grant is one compare-and-swap of it. The
algorithms are in `flows`, renewal in `renewal`; this module has the sync and async classes.

What it promises: no second grant before the first lease's end by the server's clock, tokens that
rise with every grant, and holders that stop trusting before that end. What no lease can promise is
that a paused process does nothing afterwards: for that the protected resource compares tokens
(`fence_sql`), or the work is a transaction of the same database (`Lease.guard`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Hashable, Iterable
from functools import lru_cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Self, TypeAlias, TypeVar, cast

import psycopg

from ..._engine import schema as _schema
from ..._engine._async.transaction import AsyncCallerChannel
from ..._engine._sync.transaction import CallerChannel
from ..._engine.caller import unwrap
from ..._engine.unopened import Unawaited
from ..._observe import shown
from ..._ops.codec import encode_key, integer, seconds, waiting
from ..._ops.op import Flow
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Config, Seconds, Table, require_int
from ...errors import ConfigError, InvalidKeyError, LockTimeoutError, PgkvError
from ...store import Store
from .._runtime.checks import home_of, require, require_callback
from .._runtime.lease import extend
from .._runtime.runtimes import AsyncRuntime, SyncRuntime
from . import flows
from .lease import (
    LeaseState,
    LockOptions,
    encode_metadata,
    tell,
    tell_async,
)
from .many import Acquisitions, AsyncLeases, Leases, in_order
from .sql import (
    LOCKS,
    LOCKS_UNLOGGED,
    SEPARATOR,
    TICKETS,
    LockInfo,
    LockStatements,
    SemaphoreStatements,
    slot_keys,
)

A = TypeVar("A", "AsyncLease", AsyncLeases)
Q = TypeVar("Q", bound=LockStatements)
S = TypeVar("S", Store, AsyncStore)
T = TypeVar("T")
Wakeup: TypeAlias = Literal["poll", "notify"]
SLOTS_MAX = 10_000
REFUSAL = (
    "a lock cannot be taken inside transaction() or through using(conn): a grant that is rolled "
    "back would give its token twice; take it with the store itself, then guard() the transaction"
)


# -- leases --------------------------------------------------------------------------------


class Lease(LeaseState):
    """A granted lock: exclusive until it is released, or until its end by the server's clock; made by
    `Lock.acquire`, `Lock.try_acquire` and those of `Semaphore`.

    It is renewed in the background until then. Use it as a context manager, or call `release`. A
    lease that is dropped is no longer renewed and ends by its ttl. Any thread may use it. In a
    forked child it is lost, and releasing it there frees nothing.

    After its end another holder may exist. `check` tells whether this one may still be trusted,
    `token` lets the protected resource tell, and `guard` makes the question moot inside the
    database.
    """

    _runtime: SyncRuntime

    def extend(self, ttl: Seconds) -> None:
        """Let the remaining time become `ttl` seconds, counted from now, and later renewals give
        that much. It may shorten.

        Args:
            ttl: seconds, or a timedelta.

        Raises:
            InvalidValueError: `ttl` is not a duration.
            LeaseLostError: it is lost.
            StoreUnavailableError: the server does not answer; the lease holds as long as it did.
        """
        self._runtime.channel.run(extend(self._runtime, self, seconds(ttl, endless="")))

    def guard(self, conn: Any, *, max_hold: Seconds | None = None) -> None:
        """Protect the caller's transaction: if this returns, no other is granted the lock until
        that transaction has ended, however long the holder pauses.

        It locks the lease's row FOR KEY SHARE: renewals pass, a takeover waits. This is the one
        true exclusion, and it covers work inside the database only. Above READ COMMITTED it must
        be the transaction's first statement. A savepoint that is rolled back takes the protection
        with it. An open guard keeps everybody out, so give it an end:

        Args:
            conn: a psycopg connection (or Django's, SQLAlchemy's) to the store's database, in a
                transaction.
            max_hold: seconds for which the transaction may lie idle before the server ends it.

        Raises:
            LeaseLostError: the lease has ended: roll back.
            TransactionError: no transaction is open, it is read-only, its snapshot is older than
                the lease's last renewal, or it is one of another database.
        """
        inner = unwrap(conn, psycopg.Connection, "guard()")
        flows.check_guarded(inner)
        hold = None if max_hold is None else seconds(max_hold, "max_hold")
        theirs = CallerChannel(inner, self._runtime.timeout).execute
        self._runtime.channel.run(flows.guard(self, theirs, hold))

    def release(self) -> bool:
        """Free the lock; True if it was still held. After a failure it may be called again."""
        runtime = self._runtime
        try:
            if (ending := flows.begin_release(runtime, self)) is None:
                return False
            op = ending.op
            answer = runtime.channel.call(op.statement, op.params, None, op)
            return flows.end_release(self, ending, answer)
        except Exception:
            raise
        except BaseException:  # as of `_to_the_end`
            with contextlib.suppress(PgkvError):
                runtime.clean_up(partial(flows.release, runtime, self), *flows.CLEAN_UP)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Release it.

        Raises:
            LeaseLostError: it was lost before the block ended, which raised nothing itself.
        """
        self._to_the_end(partial(flows.leave, self._runtime, self, failed=error is not None))

    def _to_the_end(self, end: Callable[[], Flow[T]]) -> T:
        try:
            return self._runtime.channel.run(end())
        except Exception:
            raise
        except BaseException:  # an interrupt, or a time limit: ending it again does no harm
            with contextlib.suppress(PgkvError):
                self._runtime.clean_up(end, *flows.CLEAN_UP)
            raise

    def _signal(self, context: dict[str, Any]) -> None:
        super()._signal(context)
        if (fn := self._options.on_lost) is not None:
            # Not in the renewal's thread: a slow callback must not cost other leases.
            threading.Thread(target=tell, args=(fn, self), name="pgkv-lost", daemon=True).start()


class AsyncLease(LeaseState):
    """A granted lock, for asyncio: :class:`Lease`, awaited.

    Entered (``async with lock.acquire() as lease``), its body is **cancelled** when the lease is
    lost, and the block raises `LeaseLostError`. It belongs to its event loop; one that is blocked
    for longer than the ttl loses its leases.
    """

    _runtime: AsyncRuntime
    _body: asyncio.Task[Any] | None = None
    _cancelling = 0
    _cancelled = False

    async def extend(self, ttl: Seconds) -> None:
        """As `Lease.extend`."""
        await self._runtime.channel.run(extend(self._runtime, self, seconds(ttl, endless="")))

    async def guard(self, conn: Any, *, max_hold: Seconds | None = None) -> None:
        """As `Lease.guard`, with a psycopg AsyncConnection."""
        inner = unwrap(conn, psycopg.AsyncConnection, "guard()")
        flows.check_guarded(inner)
        hold = None if max_hold is None else seconds(max_hold, "max_hold")
        theirs = AsyncCallerChannel(inner, self._runtime.timeout).execute
        await self._runtime.channel.run(flows.guard(self, theirs, hold))

    async def release(self) -> bool:
        """As `Lease.release`. A cancellation does not cut it short."""
        runtime = self._runtime
        try:
            if (ending := flows.begin_release(runtime, self)) is None:
                return False
            op = ending.op
            answer = await runtime.channel.call(op.statement, op.params, None, op)
            return flows.end_release(self, ending, answer)
        except asyncio.CancelledError:  # as of `_to_the_end`
            again = partial(flows.release, runtime, self)
            with contextlib.suppress(Exception):
                await runtime.clean_up(again, *flows.CLEAN_UP)
            raise

    async def __aenter__(self) -> Self:
        self._body = asyncio.current_task()
        self._cancelling = self._body.cancelling() if self._body is not None else 0
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Release it, also when cancelled. Raises as of `Lease`."""
        body, self._body = self._body, None
        ours = (
            self._cancelled
            and body is not None
            and body is _current_task()
            and body.uncancel() <= self._cancelling
        )
        leave = partial(flows.leave, self._runtime, self, failed=error is not None)
        if not isinstance(error, asyncio.CancelledError):
            # A body that ended before our cancellation reached it is cancelled here.
            await self._to_the_end(leave, swallow=ours and error is None)
            return
        with contextlib.suppress(Exception):
            await self._runtime.clean_up(leave, *flows.CLEAN_UP)
        if ours:
            raise self._lost_error() from error  # what the cancellation meant

    async def _to_the_end(self, end: Callable[[], Flow[T]], *, swallow: bool = False) -> T:
        try:
            return await self._runtime.channel.run(end())
        except asyncio.CancelledError:
            # The statement may not have been sent, or not be answered; ending it again is safe.
            again = self._runtime.clean_up(end, *flows.CLEAN_UP)
            if swallow:
                return await again
            with contextlib.suppress(Exception):
                await again
            raise

    def _signal(self, context: dict[str, Any]) -> None:
        super()._signal(context)
        body = self._body
        if body is not None and body is not _current_task():
            self._cancelled = True
            body.cancel(f"the lease on {self.name!r} was lost")
        if self._options.on_lost is not None:
            with contextlib.suppress(RuntimeError):  # no loop runs any more
                told = tell_async(self._options.on_lost, self)
                task = asyncio.get_running_loop().create_task(told)
                _reports.add(task)
                task.add_done_callback(_reports.discard)


_reports: set[asyncio.Task[None]] = set()  # the loop keeps only weak references to tasks


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class AsyncGrant(Unawaited[A]):
    """What ``lock.acquire()`` returns: to be awaited, or entered with ``async with``."""

    def __init__(
        self, acquire: Callable[[], Awaitable[A]], name: str, call: str = "lock.acquire(...)"
    ) -> None:
        super().__init__(call, f"`lease = await {call}` or `async with {call} as lease`")
        self._acquire: Callable[[], Awaitable[A]] = acquire
        self._name = name
        self._lease: A | None = None

    @shown
    def __repr__(self) -> str:
        return f"{self._name!r}, to be awaited or entered"

    async def _open(self) -> A:
        return await self._acquire()

    async def __aenter__(self) -> A:
        self._use()
        self._lease = await self._acquire()
        return await self._lease.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._lease is not None
        lease, self._lease = self._lease, None
        await lease.__aexit__(kind, error, traceback)


# -- making locks --------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _statements(kind: Hashable, table: Table, tickets: Table, prefix: bytes) -> Any:
    assert isinstance(kind, type)
    return kind(table, tickets, prefix)


def statements_of(store: Store | AsyncStore, kind: type[Q], *, durable: bool) -> Q:
    """Return the statements of a store's lock table."""
    config: Config = store._config
    table = _schema.companion(config, LOCKS if durable else LOCKS_UNLOGGED, durable=durable)
    tickets = _schema.companion(config, TICKETS, durable=False)
    return cast("Q", _statements(cast("Hashable", kind), table, tickets, store._sql.prefix_bytes))


def make_options(
    store: Store | AsyncStore,
    name: str,
    *,
    who: str,
    ttl: Seconds,
    durable: bool,
    metadata: Any,
    renew: bool = True,
    wakeup: str = "poll",
    fair: bool = False,
    on_lost: Callable[..., Any] | None = None,
) -> LockOptions:
    """Check what a lock is made with; `who` is the class that is made, in its sync form."""
    if wakeup not in ("poll", "notify"):
        raise ConfigError(f"wakeup must be 'poll' or 'notify', not {wakeup!r}")
    blocking = isinstance(store, Store)
    require_callback(on_lost, "on_lost", who, blocking=blocking)
    key = encode_key(name, store._sql.prefix_bytes, store._config.max_key_length, "lock's name")
    if SEPARATOR in name:
        raise InvalidKeyError("a lock's name must not contain U+001F, which parts its tickets")
    return LockOptions(
        name,
        [key],
        statements_of(store, LockStatements, durable=durable),
        Lease if blocking else AsyncLease,
        seconds(ttl, endless=""),
        renew,
        wakeup == "notify",
        fair,
        on_lost,
        encode_metadata(metadata),
    )


class _Leasable(Generic[S]):
    """What locks and semaphores share, for threads and for asyncio."""

    # The class of store that is needed, the name of the class, and that of its twin.
    _needs: tuple[type[Any], str, str]
    _runtime_of: type[Any]
    _options: LockOptions
    _runtime: Any

    def _begin(self, store: S, **options: Any) -> LockOptions:
        require(store, *self._needs)
        who = self._needs[1].removeprefix("Async")
        store = home_of(store, options["name"])
        self._options = made = make_options(store, who=who, **options)
        self._runtime = self._runtime_of(store, REFUSAL)
        return made

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._options.name

    @shown
    def __repr__(self) -> str:
        return self._options.facts()

    __reduce__ = refuse_pickle


class Acquirer(_Leasable[Store]):
    """A `Lock` or a `Semaphore`."""

    _runtime: SyncRuntime
    _runtime_of = SyncRuntime

    def acquire(self, timeout: Seconds | None = None) -> Lease:
        """Wait until it is granted.

        Each call is a grant of its own: the holder's second one waits like any other. Polls
        grow from 5 ms to half a second, are jittered, and never outlast the holder's lease; a
        denied one writes nothing on the server. An interrupted call leaves nothing behind.

        Args:
            timeout: seconds; None waits without end, 0 tries once.

        Returns:
            The `Lease`: enter it with ``with``, or release it.

        Raises:
            LockTimeoutError: it was held by others all that time.
            InvalidValueError: `timeout` is not a duration.
            PoolTimeoutError: all connections of the store were in use all that time.
            StoreUnavailableError: the server does not answer. Nothing is left behind that outlives
                the ttl.
        """
        lease: Lease = self._acquire(waiting(timeout), flows.granted)
        return lease

    def try_acquire(self) -> Lease | None:
        """Try once; None if it is held. It never waits for the lock, not even for a
        `Lease.guard`, and at most a second for a connection of the store's."""
        lease: Lease | None = self._acquire(0.0)
        return lease

    def _acquire(
        self, timeout: float | None, check: Callable[..., Lease] | None = None
    ) -> Any:  # cast() would be one more call, after which an interrupt could lose the lease
        runtime = self._runtime
        call = runtime.channel.call
        acquisition = flows.Acquisition[Lease](runtime, self._options, timeout)
        try:
            # Whatever interrupts this, up to the return, is met below. AsyncAcquirer has the same
            # with an await.
            lease: Lease | None = None
            if (take := acquisition.take()) is not None:
                reply = None
                try:
                    reply = call(take.statement, take.params, acquisition.seconds(), take)
                except PgkvError as error:
                    if not acquisition.is_locked(error):
                        raise
                lease = acquisition.taken(reply)
            if lease is None:
                lease = runtime.channel.run(acquisition.flow())
            return lease if check is None else check(lease, acquisition, timeout)
        except LockTimeoutError:
            raise
        except BaseException:
            runtime.clean_up(acquisition.take_back, *flows.CLEAN_UP)
            raise

    if not TYPE_CHECKING:  # a type checker knows that it cannot be entered

        def __enter__(self) -> NoReturn:
            raise TypeError(_enter_a_lease(self._options, "with"))

        def __exit__(self, *_: object) -> None:
            pass  # `with` looks for it before it calls __enter__


class AsyncAcquirer(_Leasable[AsyncStore]):
    """An `AsyncLock` or an `AsyncSemaphore`."""

    _runtime: AsyncRuntime
    _runtime_of = AsyncRuntime

    def acquire(self, timeout: Seconds | None = None) -> AsyncGrant[AsyncLease]:
        """As `Lock.acquire`; the result is awaited, or entered with ``async with``. A cancelled
        call leaves nothing behind."""
        longest = waiting(timeout)

        async def acquired() -> AsyncLease:
            lease = await self._acquire(longest, flows.granted)
            assert lease is not None
            return lease

        return AsyncGrant(acquired, self.name)

    async def try_acquire(self) -> AsyncLease | None:
        """As `Lock.try_acquire`."""
        return await self._acquire(0.0)

    async def _acquire(
        self, timeout: float | None, check: Callable[..., AsyncLease] | None = None
    ) -> AsyncLease | None:
        runtime = self._runtime
        call = runtime.channel.call
        acquisition = flows.Acquisition[AsyncLease](runtime, self._options, timeout)
        try:
            lease: AsyncLease | None = None
            if (take := acquisition.take()) is not None:
                reply = None
                try:
                    reply = await call(take.statement, take.params, acquisition.seconds(), take)
                except PgkvError as error:
                    if not acquisition.is_locked(error):
                        raise
                lease = acquisition.taken(reply)
            if lease is None:
                lease = await runtime.channel.run(acquisition.flow())
            return lease if check is None else check(lease, acquisition, timeout)
        except (GeneratorExit, LockTimeoutError):  # nothing can be awaited, nothing is left
            raise
        except BaseException:
            with contextlib.suppress(TimeoutError):
                await runtime.clean_up(acquisition.take_back, *flows.CLEAN_UP)
            raise

    if not TYPE_CHECKING:  # as of Acquirer

        async def __aenter__(self) -> NoReturn:
            raise TypeError(_enter_a_lease(self._options, "async with"))

        async def __aexit__(self, *_: object) -> None:
            pass


def _enter_a_lease(options: LockOptions, how: str) -> str:
    kind = "lock" if options.slots is None else "semaphore"
    return (
        f"write `{how} {kind}.acquire() as lease:`; the {kind} {options.name!r} itself cannot be "
        "entered: many threads and tasks may hold leases of it, and only the lease knows which"
    )


class _Locking(_Leasable[S]):
    """What both classes of lock are made with."""

    def __init__(
        self,
        store: S,
        name: str,
        ttl: Seconds = 30.0,
        *,
        renew: bool = True,
        durable: bool = True,
        wakeup: Wakeup = "poll",
        fair: bool = False,
        on_lost: Callable[..., Any] | None = None,
        metadata: Any = None,
    ) -> None:
        self._begin(
            store, name=name, ttl=ttl, renew=renew, durable=durable, wakeup=wakeup, fair=fair,
            on_lost=on_lost, metadata=metadata,
        )  # fmt: skip


class Lock(_Locking[Store], Acquirer):
    """A lock that processes on many machines share, by its name, with leases and fencing tokens.

    ::

        lock = pgkv.Lock(store, "billing", ttl=30)
        with lock.acquire(timeout=10) as lease:
            charge(fence=lease.token)

    A grant is one statement and never waits for another; tokens rise with each. Leases are renewed
    at a third of their ttl over a connection of their own, and a holder that cannot renew stops
    trusting its lease before anybody else can be granted the name. It is not reentrant. One Lock
    may be shared by threads.

    Args:
        store: a `Store` (or a namespace of one: names then carry its prefix). Not a view of a
            transaction.
        name: what is locked.
        ttl: seconds that a dead holder keeps it. The holder trusts it for less, by the larger of
            1 s and a tenth (at most a third): the margin for a jump of the server's clock.
        renew: keep extending until released. Without, a lease ends after `ttl`.
        durable: keep grants in a logged table, synchronously: no crash gives a name twice. False
            uses an UNLOGGED table, faster, which a **crash of the server** empties. All users of a
            name must say the same.
        wakeup: ``"poll"``; or ``"notify"``: a release wakes one waiter of each process, through
            one LISTEN connection (not behind a transaction pooler: there it polls). Holders and
            waiters of a name should say the same.
        fair: waiters are served in the order of their asking. Binds those who say so; others barge
            in.
        on_lost: called once with the lease (or with nothing, if it takes no argument) when it is
            lost, in a thread of its own.
        metadata: JSON that `holder` and ``pgkv locks`` show.

    Raises:
        ConfigError: a setting is wrong, or the store is an `AsyncStore`.
        InvalidKeyError: the name cannot be a key.
        InvalidValueError: `ttl` is not a duration, or `metadata` is not JSON.
    """

    _needs = Store, "Lock", "AsyncLock"

    @staticmethod
    def acquire_many(locks: Iterable[Acquirer], timeout: Seconds | None = None) -> Leases:
        """Wait until all of the locks are granted; none is kept where one is not.

        ::

            accounts = [pgkv.Lock(store, f"account:{n}") for n in (7, 3)]
            with pgkv.Lock.acquire_many(accounts, timeout=5) as (source, target):
                transfer(fences=(source.token, target.token))

        They are acquired in the order of their names, whatever the order given, so that such calls
        never wait for each other in a circle; released in the reverse one. Each is a lease with a
        token and renewals of its own.

        Args:
            locks: locks, or semaphores, of one store; each once.
            timeout: seconds for all of them; None waits without end, 0 tries each once.

        Returns:
            The :class:`Leases`, a tuple in the order of `locks`.

        Raises:
            LockTimeoutError: one was held by others all that time; the message names it.
            LeaseLostError: one was lost while the others were waited for.
            ConfigError: one is no lock, is async, or is of another store.
            InvalidValueError: there is none, or one of them twice; `timeout` is not a duration.
        """
        many = Acquisitions[Lease](in_order(locks, Acquirer), waiting(timeout))
        try:
            return Leases(many.runtime.channel.run(many.flow()))
        except BaseException:
            many.runtime.clean_up(many.take_back, *flows.CLEAN_UP)
            raise

    def holder(self) -> LockInfo | None:
        """Return who holds it, or None."""
        return self._runtime.channel.run(flows.holder(self._options))

    def force_release(self, token: int) -> bool:
        """Free the name at once if it is held by that token; True if it was.

        The holder learns of it at its next renewal, and **works on until then**, at the same time as the
        next one. Its transactions under `guard` are not affected, nor are fenced writes. Where it must
        not overlap, use `revoke`.

        Args:
            token: the grant's, as `holder` shows it.

        Raises:
            InvalidValueError: `token` is no integer.
        """
        return self._runtime.channel.run(
            flows.force_release(self._options, integer(token, "token"))
        )

    def revoke(self, token: int) -> bool:
        """End that token but not its lease: the name is free at the lease's old expiry, so there
        are never two holders. The holder learns of it at its next renewal. Waits at most a second
        for an open guard. True if it was held by that token.

        Args:
            token: the grant's, as `holder` shows it.

        Raises:
            InvalidValueError: `token` is no integer.
        """
        return self._runtime.channel.run(flows.revoke(self._options, integer(token, "token")))


class AsyncLock(_Locking[AsyncStore], AsyncAcquirer):
    """A lock that processes on many machines share, for asyncio: :class:`Lock`, awaited.

    ::

        async with pgkv.AsyncLock(store, "billing", ttl=30).acquire(timeout=10) as lease:
            await charge(fence=lease.token)

    The body of an ``async with`` is cancelled when its lease is lost. `on_lost` may be ``async``;
    it runs as a task.
    """

    _needs = AsyncStore, "AsyncLock", "Lock"

    @staticmethod
    def acquire_many(
        locks: Iterable[AsyncAcquirer], timeout: Seconds | None = None
    ) -> AsyncGrant[AsyncLeases]:
        """As `Lock.acquire_many`; the result is awaited, or entered with ``async with``."""
        ordered, longest = in_order(locks, AsyncAcquirer), waiting(timeout)

        async def acquired() -> AsyncLeases:
            many = Acquisitions[AsyncLease](ordered, longest)
            try:
                return AsyncLeases(await many.runtime.channel.run(many.flow()))
            except GeneratorExit:  # nothing can be awaited
                raise
            except BaseException:
                with contextlib.suppress(TimeoutError):
                    await many.runtime.clean_up(many.take_back, *flows.CLEAN_UP)
                raise

        return AsyncGrant(acquired, "acquire_many", "AsyncLock.acquire_many(...)")

    async def holder(self) -> LockInfo | None:
        """As `Lock.holder`."""
        return await self._runtime.channel.run(flows.holder(self._options))

    async def force_release(self, token: int) -> bool:
        """As `Lock.force_release`."""
        return await self._runtime.channel.run(
            flows.force_release(self._options, integer(token, "token"))
        )

    async def revoke(self, token: int) -> bool:
        """As `Lock.revoke`."""
        return await self._runtime.channel.run(flows.revoke(self._options, integer(token, "token")))


class _Slotted(_Leasable[S]):
    """What both classes of semaphore are made with."""

    def __init__(
        self,
        store: S,
        name: str,
        slots: int,
        ttl: Seconds = 30.0,
        *,
        resize: bool = False,
        renew: bool = True,
        durable: bool = True,
        on_lost: Callable[..., Any] | None = None,
        metadata: Any = None,
    ) -> None:
        require_int("slots", slots, 1, SLOTS_MAX)
        options = self._begin(
            store, name=name, ttl=ttl, renew=renew, durable=durable, on_lost=on_lost,
            metadata=metadata,
        )  # fmt: skip
        sql = statements_of(home_of(store, name), SemaphoreStatements, durable=durable)
        options.sql = sql
        options.keys = slot_keys(options.keys[0], slots)
        options.slots, options.resize = slots, resize

    @property
    def slots(self) -> int:
        """How many may hold it at a time."""
        return self._options.slots or 0


class Semaphore(_Slotted[Store], Acquirer):
    """At most `slots` holders of a name at a time, on however many machines.

    Each slot is a lock of its own, with the same lease, renewal and guard as `Lock`'s; a grant takes
    any free one. There are never more live leases than slots. `Lease.slot` says which one it is, and
    tokens rise per slot: a resource that compares them must do so for each slot.

    Args:
        store: a `Store`, or a namespace of one.
        name: what is limited. A `Lock` of the same name is something else.
        slots: how many, at most 10,000. The number is kept in the database and must be the same for
            all users of the name.
        ttl: seconds that a dead holder keeps its slot.
        resize: change the number kept to this one. Where it was higher, leases in the slots beyond
            it count until they end.
        renew: as of `Lock`.
        durable: as of `Lock`.
        on_lost: as of `Lock`.
        metadata: as of `Lock`.

    Raises:
        ConfigError: (of `acquire` and `try_acquire`) the name has another number of slots.
    """

    _needs = Store, "Semaphore", "AsyncSemaphore"


class AsyncSemaphore(_Slotted[AsyncStore], AsyncAcquirer):
    """At most `slots` holders of a name at a time, for asyncio: :class:`Semaphore`, awaited."""

    _needs = AsyncStore, "AsyncSemaphore", "Semaphore"
