"""What the flows of locks need of threads and of asyncio beyond what every pattern is given: making
leases, and hearing of releases."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .._runtime.lease import LeaseRenewals
from .._runtime.runtimes import AsyncRuntime, Runtime, SyncRuntime
from .._runtime.wakeup import TaskWaiter, ThreadWaiter, Waiter, Waiters
from . import flows
from .sql import CHANNEL

if TYPE_CHECKING:
    from ...aio import AsyncStore
    from ...store import Store
    from .lease import LeaseState, LockOptions

L = TypeVar("L", bound="LeaseState")

REFUSAL = (
    "a lock cannot be taken inside transaction() or through using(conn): a grant that is rolled "
    "back would give its token twice; take it with the store itself, then guard() the transaction"
)


class LockWaiters(Waiters):
    """Those who wait for locks: a release lets one of each process try."""

    channel = CHANNEL.decode()


class LeasingRuntime(Runtime, Generic[L]):
    """What both runtimes of locks add."""

    _waiter: type[Waiter]

    def __init__(self, store: Store | AsyncStore, make: Callable[..., L]) -> None:
        super().__init__(store, REFUSAL)
        self._make = make  # the class of lease

    def lease(self, options: LockOptions, key: bytes, token: int, owner: str, sent_at: float) -> L:
        """Make a lease, and have it renewed."""
        lease = self._make(self, options, key, token, owner, sent_at)
        self.background().part(LeaseRenewals).watch(lease)
        return lease

    def forget(self, lease: LeaseState) -> None:
        """Renew it no more."""
        self.background().part(LeaseRenewals).forget(lease)

    def clean_later(self, options: LockOptions) -> None:
        """Remove old names, in a thread or task that nothing waits for."""
        self.run_later(lambda: self.channel.run(flows.clean(options), flows.CLEAN_TIME))

    def subscribe(self, options: LockOptions) -> Waiter:
        """Begin to hear of releases."""
        waiters = self.background().part(LockWaiters)
        waiter = self._waiter(waiters, options.sql.payload(options.keys[0]))
        waiters.add(waiter)
        return waiter

    def unsubscribe(self, waiter: Any, *, granted: bool) -> None:
        """Hear no more of them."""
        waiter._waiters.remove(waiter, granted=granted)


class LockRuntime(LeasingRuntime[L], SyncRuntime):
    """For threads."""

    _waiter = ThreadWaiter


class AsyncLockRuntime(LeasingRuntime[L], AsyncRuntime):
    """For asyncio."""

    _waiter = TaskWaiter
