"""What the flows of locks need of threads and of asyncio beyond what every pattern is given: making
leases, and hearing of releases."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .._runtime.runtimes import AsyncRuntime, SyncRuntime
from . import flows
from .renewal import LeaseRenewals
from .wakeup import TaskWaiter, ThreadWaiter, Waiters

if TYPE_CHECKING:
    from ...aio import AsyncStore
    from ...store import Store
    from .lease import LeaseState, LockOptions

H = TypeVar("H", bound="LeaseState")


class LockRuntime(SyncRuntime, Generic[H]):
    """For threads.

    Args:
        store: any view of a store, but none of a transaction.
        make: the class of lease.
    """

    def __init__(self, store: Store, make: Callable[..., H]) -> None:
        super().__init__(store, REFUSAL)
        self._make = make

    def lease(self, options: LockOptions, key: bytes, token: int, owner: str, sent_at: float) -> H:
        """Make a lease, and have it renewed."""
        lease = self._make(self, options, key, token, owner, sent_at)
        self.background().part(LeaseRenewals).watch(lease)
        return lease

    def forget(self, lease: LeaseState) -> None:
        """Renew it no more."""
        self.background().part(LeaseRenewals).forget(lease)

    def clean_later(self, options: LockOptions) -> None:
        """Remove old names, in a thread that nothing waits for."""
        self.run_later(lambda: self.channel.run(flows.clean(options), flows.CLEAN_TIME))

    def subscribe(self, options: LockOptions) -> ThreadWaiter:
        """Begin to hear of releases."""
        waiters = self.background().part(Waiters)
        waiter = ThreadWaiter(waiters, options.sql.payload(options.keys[0]))
        waiters.add(waiter)
        return waiter

    def unsubscribe(self, waiter: Any, *, granted: bool) -> None:
        """Hear no more of them."""
        waiter._waiters.remove(waiter, granted=granted)


class AsyncLockRuntime(AsyncRuntime, Generic[H]):
    """For asyncio; see `LockRuntime`."""

    def __init__(self, store: AsyncStore, make: Callable[..., H]) -> None:
        super().__init__(store, REFUSAL)
        self._make = make

    def lease(self, options: LockOptions, key: bytes, token: int, owner: str, sent_at: float) -> H:
        """Make a lease, and have it renewed."""
        lease = self._make(self, options, key, token, owner, sent_at)
        self.background().part(LeaseRenewals).watch(lease)
        return lease

    def forget(self, lease: LeaseState) -> None:
        """Renew it no more."""
        self.background().part(LeaseRenewals).forget(lease)

    def clean_later(self, options: LockOptions) -> None:
        """Remove old names, in a task that nothing waits for."""
        self.run_later(lambda: self.channel.run(flows.clean(options), flows.CLEAN_TIME))

    def subscribe(self, options: LockOptions) -> TaskWaiter:
        """Begin to hear of releases."""
        waiters = self.background().part(Waiters)
        waiter = TaskWaiter(waiters, options.sql.payload(options.keys[0]))
        waiters.add(waiter)
        return waiter

    def unsubscribe(self, waiter: Any, *, granted: bool) -> None:
        """Hear no more of them."""
        waiter._waiters.remove(waiter, granted=granted)


REFUSAL = (
    "a lock cannot be taken inside transaction() or through using(conn): a grant that is rolled "
    "back would give its token twice; take it with the store itself, then guard() the transaction"
)
