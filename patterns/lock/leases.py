"""The two colours of lease: `_lease.Hold`, with what takes a round trip."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import psycopg

from ..._engine._async.transaction import AsyncCallerChannel
from ..._engine._sync.transaction import CallerChannel
from ..._engine.caller import unwrap
from ..._engine.unopened import Unawaited
from ..._observe import shown
from ..._ops.codec import seconds
from . import flows as _grant
from . import guard as _guarding
from .lease import Hold, Terms, failed_callback, report
from .runtime import TaskPort, ThreadPort

if TYPE_CHECKING:
    from ...config import Seconds


class Lease(Hold):
    """A granted lock: exclusive until it is released, or until its end by the server's clock; made by
    `Lock.acquire`, `Lock.try_acquire` and those of `Semaphore`.

    It is renewed in the background until then. Use it as a context manager, or call `release`; one
    that is simply dropped is renewed no more and ends by its ttl. Any thread may use it. A forked
    child does not inherit it.

    After its end another holder may exist. `check` tells whether this one may still be trusted,
    `token` lets the protected resource tell, and `guard` makes the question moot inside the
    database.
    """

    def __init__(
        self,
        port: ThreadPort[Lease],
        terms: Terms,
        key: bytes,
        token: int,
        owner: str,
        sent_at: float,
    ) -> None:
        super().__init__(terms, key, token, owner, sent_at)
        self._port = port

    def extend(self, ttl: Seconds) -> None:
        """Let the remaining time become `ttl` seconds, counted from now, and later renewals give
        that much. It may shorten.

        Args:
            ttl: seconds, or a timedelta.

        Raises:
            InvalidValueError: `ttl` is no duration.
            LeaseLostError: it is lost.
            StoreUnavailableError: the server does not answer; the lease holds as long as it did.
        """
        self._port.channel.run(_grant.extend(self._port, self, seconds(ttl, endless="")))

    def guard(self, conn: Any, *, max_hold: Seconds | None = None) -> None:
        """Protect the caller's transaction: if this returns, nobody else is granted the lock until
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
        _guarding.check_guarded(inner)
        hold = None if max_hold is None else seconds(max_hold, "max_hold")
        theirs = CallerChannel(inner, self._port.timeout).execute
        self._port.channel.run(_guarding.guard(self._port, self, theirs, hold))

    def release(self) -> bool:
        """Free the lock; True if it was still held. After a failure it may be called again."""
        return cast("bool", self._port.channel.run(_grant.release(self._port, self)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release it.

        Raises:
            LeaseLostError: it was lost before the block ended, which raised nothing itself.
        """
        self._port.channel.run(_grant.leave(self._port, self, failed=error is not None))

    def _signal(self) -> None:
        if (fn := self._terms.on_lost) is None:
            return
        # Not in the renewal's thread: a slow callback must not cost other leases.
        threading.Thread(target=self._report, args=(fn,), name="pgkv-lost", daemon=True).start()

    def _report(self, fn: Callable[..., Any]) -> None:
        try:
            report(fn, self)
        except Exception as error:  # noqa: BLE001  # the user's code
            failed_callback(self.name, error)


class AsyncLease(Hold):
    """A granted lock, for asyncio: :class:`Lease`, awaited.

    Entered (``async with lock.acquire() as lease``), its body is **cancelled** when the lease is
    lost, and the block raises `LeaseLostError`. It belongs to its event loop; one that is blocked
    for longer than the ttl loses its leases.
    """

    def __init__(
        self,
        port: TaskPort[AsyncLease],
        terms: Terms,
        key: bytes,
        token: int,
        owner: str,
        sent_at: float,
    ) -> None:
        super().__init__(terms, key, token, owner, sent_at)
        self._port = port
        self._body: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._cancelled = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def extend(self, ttl: Seconds) -> None:
        """As `Lease.extend`."""
        await self._port.channel.run(_grant.extend(self._port, self, seconds(ttl, endless="")))

    async def guard(self, conn: Any, *, max_hold: Seconds | None = None) -> None:
        """As `Lease.guard`, with a psycopg AsyncConnection."""
        inner = unwrap(conn, psycopg.AsyncConnection, "guard()")
        _guarding.check_guarded(inner)
        hold = None if max_hold is None else seconds(max_hold, "max_hold")
        theirs = AsyncCallerChannel(inner, self._port.timeout).execute
        await self._port.channel.run(_guarding.guard(self._port, self, theirs, hold))

    async def release(self) -> bool:
        """As `Lease.release`."""
        return cast("bool", await self._port.channel.run(_grant.release(self._port, self)))

    async def __aenter__(self) -> Self:
        self._body = asyncio.current_task()
        self._cancelling = self._body.cancelling() if self._body is not None else 0
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        body, self._body = self._body, None
        ours = self._cancelled and body is not None and body.uncancel() <= self._cancelling
        if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            # The cancellation was ours: say what it meant.
            with contextlib.suppress(Exception):
                await self._leave(failed=True)
            raise self._lost_error() from error
        await self._leave(failed=error is not None, cancelled=ours and error is None)

    async def _leave(self, *, failed: bool, cancelled: bool = False) -> None:
        try:
            await self._port.channel.run(_grant.leave(self._port, self, failed=failed))
        except asyncio.CancelledError:
            if not cancelled:
                raise
            # The body ended before our cancellation reached it: it reached the release instead.
            await self._port.channel.run(_grant.leave(self._port, self, failed=failed))

    def _signal(self) -> None:
        body = self._body
        if body is not None and body is not _current_task():
            self._cancelled = True
            body.cancel(f"the lease on {self.name!r} was lost")
        if self._terms.on_lost is not None:
            with contextlib.suppress(RuntimeError):  # no loop runs any more
                task = asyncio.get_running_loop().create_task(self._report(self._terms.on_lost))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _report(self, fn: Callable[..., Any]) -> None:
        try:
            answer = report(fn, self)
            if hasattr(answer, "__await__"):
                await answer
        except Exception as error:  # noqa: BLE001  # the user's code
            failed_callback(self.name, error)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class AsyncGrant(Unawaited):
    """What ``lock.acquire()`` returns: to be awaited, or entered with ``async with``."""

    def __init__(self, acquire: Callable[[], Any], name: str) -> None:
        super().__init__(
            "lock.acquire(...)",
            "`lease = await lock.acquire(...)` or `async with lock.acquire(...) as lease`",
        )
        self._acquire = acquire
        self._name = name
        self._lease: AsyncLease | None = None

    @shown
    def __repr__(self) -> str:
        return f"{self._name!r}, to be awaited or entered"

    def __await__(self) -> Generator[Any, None, AsyncLease]:
        return cast("Generator[Any, None, AsyncLease]", self._acquire().__await__())

    async def __aenter__(self) -> AsyncLease:
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
