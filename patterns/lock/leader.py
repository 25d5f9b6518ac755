"""Leader election: of a fleet of processes one leads, and another within moments of its death.

A leader is whoever holds a lock, and its term is the grant's token. It steps down before its lease
ends, by its own clock: a leader that cannot reach the database stops leading while nobody else can
have begun.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ... import _observe
from ..._observe import shown
from ..._ops.op import Flow, call
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...errors import ConfigError, PgkvError
from ...store import Store
from .._runtime.colour import require, require_callback
from . import flows
from .api import AsyncLease, Lease, make_options
from .lease import LeaseState, LockOptions, failed_callback, report
from .runtime import AsyncLockRuntime, LockRuntime

if TYPE_CHECKING:
    from ...config import Seconds

LOOK = 0.2  # seconds, at most, between looks at the lease while leading
RETRY_FIRST, RETRY_MAX = 0.1, 2.0  # seconds, while the database cannot be reached


class _Candidate:
    """What both colours have.

    Args:
        options: of the lock that the leader holds.
        on_elected: the user's.
        on_lost: the user's.
    """

    def __init__(
        self,
        options: LockOptions,
        on_elected: Callable[..., Any] | None,
        on_lost: Callable[..., Any] | None,
    ) -> None:
        self._options = options
        self._on_elected = on_elected
        self._on_lost = on_lost
        self._lease: LeaseState | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this process leads, as far as its lease may be trusted. No round trip."""
        lease = self._lease
        return lease is not None and not lease.is_lost

    @property
    def term(self) -> int | None:
        """The fencing token of this leadership, above those of all before; None if not leading."""
        lease = self._lease
        return None if lease is None or lease.is_lost else lease.token

    @shown
    def __repr__(self) -> str:
        lease = self._lease
        return (
            f"{self._options.facts()}, {'not leading' if lease is None else f'leading: {lease!r}'}"
        )

    __reduce__ = refuse_pickle

    def _campaign(self, runtime: Any, work: _Work) -> Flow[None]:
        """Campaign, lead, and again, until told to stop."""
        pause = RETRY_FIRST
        while not work.stopping():
            try:
                lease = yield from flows.acquire(runtime, self._options, None, work.stopping)
            except PgkvError as error:
                if not error.retryable and not isinstance(error, TimeoutError):
                    raise
                _observe.warning(
                    "pgkv.leader.waiting", lock=self._options.name, error=type(error).__name__
                )
                yield from call(runtime.wait, None, pause)
                pause = min(pause * 2, RETRY_MAX)
                continue
            if lease is None:
                return
            pause = RETRY_FIRST
            yield from self._lead(runtime, lease, work)

    def _lead(self, runtime: Any, lease: LeaseState, work: _Work) -> Flow[None]:
        self._lease = lease
        _observe.info("pgkv.leader.elected", lock=lease.name, term=lease.token)
        try:
            work.begin(self._on_elected, lease)
            while not lease.is_lost and not work.stopping() and not work.failed():
                yield from call(runtime.wait, None, min(LOOK, lease.remaining()))
        finally:
            lost = lease.is_lost
            self._lease = None
            _observe.info("pgkv.leader.stepped_down", lock=lease.name, term=lease.token, lost=lost)
            # First it is told, then waited for, and only then may another one begin.
            yield from call(work.tell, self._on_lost, lease)
            ended = yield from call(work.end, lease)
            if ended:
                yield from _resign(runtime, lease)
            else:
                runtime.forget(lease)
                _observe.warning("pgkv.leader.work_goes_on", lock=lease.name, ttl=lease.ttl)
        work.raise_failure()


def _resign(runtime: Any, lease: LeaseState) -> Flow[None]:
    try:
        yield from flows.release(runtime, lease)
    except PgkvError as error:
        # It ends by its ttl then.
        _observe.warning("pgkv.leader.resign_failed", lock=lease.name, error=type(error).__name__)


class _Work:
    """The user's work while leading, and the event that ends it all."""

    failure: BaseException | None = None

    def stopping(self) -> bool:
        """Whether run() is to end."""
        raise NotImplementedError

    def begin(self, fn: Callable[..., Any] | None, lease: LeaseState) -> None:
        """Start it beside."""
        raise NotImplementedError

    def tell(self, fn: Callable[..., Any] | None, lease: LeaseState) -> Any:
        """Say that leading is over."""
        raise NotImplementedError

    def end(self, lease: LeaseState) -> Any:
        """Wait for it to end, for as long as the lease lasts; whether it did."""
        raise NotImplementedError

    def failed(self) -> bool:
        """Whether it raised."""
        return self.failure is not None

    def raise_failure(self) -> None:
        """Let out what it raised."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


class _ThreadWork(_Work):
    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._thread: threading.Thread | None = None

    def stopping(self) -> bool:
        return self._stop.is_set()

    def begin(self, fn: Callable[..., Any] | None, lease: LeaseState) -> None:
        if fn is None:
            return

        def work() -> None:
            try:
                report(fn, lease)
            except BaseException as error:  # noqa: BLE001  # raised again by run()
                self.failure = error

        self._thread = threading.Thread(target=work, name="pgkv-leader", daemon=True)
        self._thread.start()

    def tell(self, fn: Callable[..., Any] | None, lease: LeaseState) -> None:
        if fn is not None:
            try:
                report(fn, lease)
            except Exception as error:  # noqa: BLE001  # the user's code
                failed_callback(lease.name, error)

    def end(self, lease: LeaseState) -> bool:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(lease.ttl)
        return thread is None or not thread.is_alive()


class _TaskWork(_Work):
    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._task: asyncio.Task[None] | None = None

    def stopping(self) -> bool:
        return self._stop.is_set()

    def begin(self, fn: Callable[..., Any] | None, lease: LeaseState) -> None:
        if fn is not None:
            self._task = asyncio.get_running_loop().create_task(self._work(fn, lease))

    async def _work(self, fn: Callable[..., Any], lease: LeaseState) -> None:
        try:
            answer = report(fn, lease)
            if inspect.isawaitable(answer):
                await answer
        except Exception as error:  # noqa: BLE001  # raised again by run()
            self.failure = error

    async def tell(self, fn: Callable[..., Any] | None, lease: LeaseState) -> None:
        if fn is not None:
            try:
                answer = report(fn, lease)
                if inspect.isawaitable(answer):
                    await answer
            except Exception as error:  # noqa: BLE001  # the user's code
                failed_callback(lease.name, error)

    async def end(self, lease: LeaseState) -> bool:
        task, self._task = self._task, None
        if task is None:
            return True
        task.cancel()
        await asyncio.wait([task], timeout=lease.ttl)
        return task.done()


class _ThreadElection(LockRuntime[Lease]):
    """A runtime whose waits end when the candidate is to stop."""

    stop: threading.Event

    def wait(self, waiter: Any, seconds: float) -> None:
        del waiter  # a candidate polls
        self.stop.wait(seconds)


class _TaskElection(AsyncLockRuntime[AsyncLease]):
    """As `_ThreadElection`."""

    stop: asyncio.Event

    async def wait(self, waiter: Any, seconds: float) -> None:
        del waiter  # a candidate polls
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            pass


class Leader(_Candidate):
    """A candidate for the leadership of a name: one process of a fleet leads at a time.

    `run` campaigns until it is elected, leads until its lease is lost, and campaigns again. A leader
    steps down before its lease ends by the server's clock, so that two never overlap, but for one
    that is paused as it works: give what it writes `term`, or `Lease.guard` its transactions. When a
    leader dies another is elected within `ttl` and a second.

    Args:
        store: a `Store`, or a namespace of one.
        name: what is led; the same as of a `Lock`.
        ttl: seconds that a dead leader keeps the others waiting.
        on_elected: called with the `Lease` (or with nothing, if it takes no argument) in a thread of
            its own. It may return at once, or work for as long as ``lease.check()`` passes. What it
            raises ends `run`, after resigning.
        on_lost: called when leading is over, whether the lease was lost or `run` is to stop, before
            the name is freed. It must make `on_elected`'s work end.
        durable: as of `Lock`.
        metadata: as of `Lock`.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        ttl: Seconds = 15.0,
        *,
        on_elected: Callable[..., Any] | None = None,
        on_lost: Callable[..., Any] | None = None,
        durable: bool = True,
        metadata: Any = None,
    ) -> None:
        require(store, Store, "Leader", "AsyncLeader")
        for fn, what in ((on_elected, "on_elected"), (on_lost, "on_lost")):
            require_callback(fn, what, "Leader", blocking=True)
        super().__init__(_leader_options(store, name, ttl, durable, metadata), on_elected, on_lost)
        self._store = store

    def run(self, stop: threading.Event | None = None) -> None:
        """Campaign and lead until `stop` is set, then resign.

        An unreachable database is waited for. It returns when `on_elected`'s work has ended; after
        waiting `ttl` for that it leaves the lease to end by itself.

        Args:
            stop: set by whoever ends it; None for never.

        Raises:
            ConfigError: `stop` is no event that can be waited for here.
        """
        _check_stop(stop, is_async=False)
        event = stop or threading.Event()
        runtime = _ThreadElection(self._store, Lease)
        runtime.stop = event
        runtime.channel.run(self._campaign(runtime, _ThreadWork(event)))


class AsyncLeader(_Candidate):
    """A candidate for the leadership of a name, for asyncio: :class:`Leader`, awaited.

    `on_elected` may be ``async``: it runs as a task, which is cancelled when leading is over.
    """

    def __init__(
        self,
        store: AsyncStore,
        name: str,
        ttl: Seconds = 15.0,
        *,
        on_elected: Callable[..., Any] | None = None,
        on_lost: Callable[..., Any] | None = None,
        durable: bool = True,
        metadata: Any = None,
    ) -> None:
        require(store, AsyncStore, "AsyncLeader", "Leader")
        for fn, what in ((on_elected, "on_elected"), (on_lost, "on_lost")):
            require_callback(fn, what, "Leader", blocking=False)
        super().__init__(_leader_options(store, name, ttl, durable, metadata), on_elected, on_lost)
        self._store = store

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """As `Leader.run`; cancelling it resigns too."""
        _check_stop(stop, is_async=True)
        event = stop or asyncio.Event()
        runtime = _TaskElection(self._store, AsyncLease)
        runtime.stop = event
        await runtime.channel.run(self._campaign(runtime, _TaskWork(event)))


def _check_stop(stop: object, *, is_async: bool) -> None:
    # An event of the other colour would block the event loop, or never be waited for.
    wait = getattr(stop, "wait", None)
    if stop is None or (wait is not None and inspect.iscoroutinefunction(wait) == is_async):
        return
    wanted = "an asyncio.Event" if is_async else "a threading.Event"
    given = f"{type(stop).__module__.partition('.')[0]}.{type(stop).__name__}"
    raise ConfigError(f"run() waits for {wanted}, not {given}")


def _leader_options(
    store: Store | AsyncStore, name: str, ttl: Seconds, durable: bool, metadata: Any
) -> LockOptions:
    return make_options(
        store, name, who="Leader", ttl=ttl, renew=True, durable=durable, wakeup="poll",
        fair=False, on_lost=None, metadata=metadata,
    )  # fmt: skip


__all__ = ["AsyncLeader", "Leader"]
