"""Leader election: of a fleet of processes one leads, and another within moments of its death.

A leader is the holder of a lock, and its term is the grant's token. It steps down before its lease
ends, by its own clock: a leader that cannot reach the database stops leading before another one can
begin.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ... import _observe
from ..._observe import shown
from ..._ops.op import Flow, call
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Seconds
from ...errors import ConfigError, PgkvError
from ...store import Store
from .._runtime.checks import home_of, require, require_callback
from .._runtime.runtimes import AsyncRuntime, SyncRuntime
from . import flows
from .api import REFUSAL, make_options
from .lease import LeaseState, report, report_async, tell, tell_async

S = TypeVar("S", Store, AsyncStore)

LOOK = 0.2  # seconds, at most, between looks at the lease while leading
RETRY_FIRST, RETRY_MAX = 0.1, 2.0  # seconds, while the database cannot be reached


class _Candidate(Generic[S]):
    """What Leader and AsyncLeader share."""

    _needs: tuple[type[Any], str, str]  # as of locks

    def __init__(
        self,
        store: S,
        name: str,
        ttl: Seconds = 15.0,
        *,
        on_elected: Callable[..., Any] | None = None,
        on_lost: Callable[..., Any] | None = None,
        durable: bool = True,
        metadata: Any = None,
    ) -> None:
        require(store, *self._needs)
        for fn, what in ((on_elected, "on_elected"), (on_lost, "on_lost")):
            require_callback(fn, what, "Leader", blocking=isinstance(store, Store))
        store = home_of(store, name)
        self._options = make_options(
            store, name, who="Leader", ttl=ttl, durable=durable, metadata=metadata
        )
        self._store: S = store
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

    def _campaign(self, election: Any) -> Flow[None]:
        pause = RETRY_FIRST
        while not election.stop.is_set():
            try:
                lease = yield from flows.acquire(
                    election, self._options, None, election.stop.is_set
                )
            except PgkvError as error:
                if not error.retryable and not isinstance(error, TimeoutError):
                    raise
                _observe.warning(
                    "pgkv.leader.waiting", lock=self._options.name, error=type(error).__name__
                )
                yield from election.wait(None, pause)
                pause = min(pause * 2, RETRY_MAX)
                continue
            if lease is None:
                return
            pause = RETRY_FIRST
            yield from self._lead(election, lease)

    def _lead(self, election: Any, lease: LeaseState) -> Flow[None]:
        self._lease = lease
        _observe.info("pgkv.leader.elected", lock=lease.name, term=lease.token)
        try:
            election.begin(self._on_elected, lease)
            while not (lease.is_lost or election.stop.is_set() or election.failure):
                yield from election.wait(None, min(LOOK, lease.remaining()))
        finally:
            lost = lease.is_lost
            self._lease = None
            _observe.info("pgkv.leader.stepped_down", lock=lease.name, term=lease.token, lost=lost)
            yield from call(
                election.clean_up,
                lambda: self._step_down(election, lease),
                None,
                lease.ttl + election.timeout,
            )
        if election.failure is not None:
            failure, election.failure = election.failure, None
            raise failure

    def _step_down(self, election: Any, lease: LeaseState) -> Flow[None]:
        # First notify the work, then wait for it; only then may another leader start.
        yield from call(election.tell, self._on_lost, lease)
        ended = yield from call(election.end, lease)
        if not ended:
            election.forget(lease)
            _observe.warning("pgkv.leader.work_goes_on", lock=lease.name, ttl=lease.ttl)
            return
        try:
            yield from flows.release(election, lease)
        except PgkvError as error:
            # It ends by its ttl then.
            _observe.warning(
                "pgkv.leader.resign_failed", lock=lease.name, error=type(error).__name__
            )


class _ThreadElection(SyncRuntime):
    """One run of a Leader: the event that ends it, and the user's work while leading."""

    failure: BaseException | None = None  # what the work raised
    tell = staticmethod(tell)
    _work: threading.Thread | None = None

    def __init__(self, store: Store, stop: threading.Event | None) -> None:
        super().__init__(store, REFUSAL)
        self.stop = stop or threading.Event()

    def begin(self, fn: Callable[..., Any] | None, lease: LeaseState) -> None:
        if fn is not None:
            args = fn, lease
            self._work = threading.Thread(
                target=self._run, args=args, name="pgkv-leader", daemon=True
            )
            self._work.start()

    def _run(self, fn: Callable[..., Any], lease: LeaseState) -> None:
        try:
            report(fn, lease)
        except BaseException as error:  # noqa: BLE001  # raised again by run()
            self.failure = error

    def end(self, lease: LeaseState) -> bool:
        """Wait for the work, for as long as the lease lasts; whether it has ended."""
        work, self._work = self._work, None
        if work is not None:
            work.join(lease.ttl)
        return work is None or not work.is_alive()


class _TaskElection(AsyncRuntime):
    """One run of an AsyncLeader; see `_ThreadElection`."""

    failure: BaseException | None = None
    tell = staticmethod(tell_async)
    _work: asyncio.Task[None] | None = None

    def __init__(self, store: AsyncStore, stop: asyncio.Event | None) -> None:
        super().__init__(store, REFUSAL)
        self.stop = stop or asyncio.Event()

    def begin(self, fn: Callable[..., Any] | None, lease: LeaseState) -> None:
        if fn is not None:
            self._work = asyncio.get_running_loop().create_task(self._run(fn, lease))

    async def _run(self, fn: Callable[..., Any], lease: LeaseState) -> None:
        try:
            await report_async(fn, lease)
        except Exception as error:  # noqa: BLE001  # raised again by run()
            self.failure = error

    async def end(self, lease: LeaseState) -> bool:
        """Cancel the work and wait for it; see `_ThreadElection.end`."""
        work, self._work = self._work, None
        if work is None:
            return True
        work.cancel()
        await asyncio.wait([work], timeout=lease.ttl)
        return work.done()


class Leader(_Candidate[Store]):
    """A candidate for the leadership of a name: one process of a fleet leads at a time.

    `run` campaigns until it is elected, leads until its lease is lost, and campaigns again. A leader
    steps down before its lease ends by the server's clock, so that two never overlap, except for one
    that is paused while it works: pass `term` to what it writes, or use `Lease.guard` in its
    transactions. When a leader dies another is elected within `ttl` and a second.

    Args:
        store: a `Store`, or a namespace of one.
        name: what is led; the same as of a `Lock`.
        ttl: seconds for which a dead leader keeps the others waiting.
        on_elected: called with the `Lease` (or with nothing, if it takes no argument) in a thread of
            its own. It may return at once, or work for as long as ``lease.check()`` passes. What it
            raises ends `run`, after resigning.
        on_lost: called when leading is over, whether the lease was lost or `run` is to stop, before
            the name is freed. It must make `on_elected`'s work end.
        durable: as of `Lock`.
        metadata: as of `Lock`.
    """

    _needs = Store, "Leader", "AsyncLeader"

    def run(self, stop: threading.Event | None = None) -> None:
        """Campaign and lead until `stop` is set, then resign.

        It waits while the database is unreachable. It returns when `on_elected`'s work has ended;
        after waiting `ttl` for that it leaves the lease to end by itself.

        Args:
            stop: set it to end the run; None for never.

        Raises:
            ConfigError: `stop` is not an event that can be waited for here.
        """
        _check_stop(stop, is_async=False)
        election = _ThreadElection(self._store, stop)
        election.channel.run(self._campaign(election))


class AsyncLeader(_Candidate[AsyncStore]):
    """A candidate for the leadership of a name, for asyncio: :class:`Leader`, awaited.

    `on_elected` may be ``async``: it runs as a task, which is cancelled when leading is over.
    """

    _needs = AsyncStore, "AsyncLeader", "Leader"

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """As `Leader.run`; cancelling it resigns too."""
        _check_stop(stop, is_async=True)
        election = _TaskElection(self._store, stop)
        await election.channel.run(self._campaign(election))


def _check_stop(stop: object, *, is_async: bool) -> None:
    # The other class's event would block the event loop, or never be waited for.
    wait = getattr(stop, "wait", None)
    if stop is None or (wait is not None and inspect.iscoroutinefunction(wait) == is_async):
        return
    wanted = "an asyncio.Event" if is_async else "a threading.Event"
    given = f"{type(stop).__module__.partition('.')[0]}.{type(stop).__name__}"
    raise ConfigError(f"run() waits for {wanted}, not {given}")
