"""What the flows of locks need of threads and of asyncio beyond what every pattern is given: making
leases."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from .._runtime.runtimes import AsyncRuntime, Runtime, SyncRuntime
from . import flows

if TYPE_CHECKING:
    from ...aio import AsyncStore
    from ...store import Store
    from .lease import LeaseState, LockOptions

L = TypeVar("L", bound="LeaseState")

REFUSAL = (
    "a lock cannot be taken inside transaction() or through using(conn): a grant that is rolled "
    "back would give its token twice; take it with the store itself, then guard() the transaction"
)


class LeasingRuntime(Runtime, Generic[L]):
    """What both runtimes of locks add."""

    def __init__(self, store: Store | AsyncStore, make: Callable[..., L]) -> None:
        super().__init__(store, REFUSAL)
        self._make = make  # the class of lease

    def lease(self, options: LockOptions, key: bytes, token: int, owner: str, sent_at: float) -> L:
        """Make a lease, and have it renewed."""
        lease = self._make(self, options, key, token, owner, sent_at)
        self.watch(lease)
        return lease

    def clean_later(self, options: LockOptions) -> None:
        """Remove old names, in a thread or task that nothing waits for."""
        self.run_later(lambda: self.channel.run(flows.clean(options), flows.CLEAN_TIME))


class LockRuntime(LeasingRuntime[L], SyncRuntime):
    """For threads."""


class AsyncLockRuntime(LeasingRuntime[L], AsyncRuntime):
    """For asyncio."""
