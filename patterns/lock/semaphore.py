"""A lock with several slots: at most so many holders at a time, each with its own lease."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...aio import AsyncStore
from ...config import require_int
from ...store import Store
from .._runtime.colour import require
from .api import Acquirer, AsyncAcquirer, make_terms, statements_of
from .lease import Terms
from .semaphore_sql import SemaphoreStatements, slot_keys

if TYPE_CHECKING:
    from ...config import Seconds

SLOTS_MAX = 10_000


class Semaphore(Acquirer):
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

    def __init__(
        self,
        store: Store,
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
        require(store, Store, "Semaphore", "AsyncSemaphore")
        self._begin(
            store, _terms(store, name, slots, ttl, resize, renew, durable, on_lost, metadata)
        )

    @property
    def slots(self) -> int:
        """How many may hold it at a time."""
        return self._terms.slots or 0


class AsyncSemaphore(AsyncAcquirer):
    """At most `slots` holders of a name at a time, for asyncio: :class:`Semaphore`, awaited."""

    def __init__(
        self,
        store: AsyncStore,
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
        require(store, AsyncStore, "AsyncSemaphore", "Semaphore")
        self._begin(
            store, _terms(store, name, slots, ttl, resize, renew, durable, on_lost, metadata)
        )

    @property
    def slots(self) -> int:
        """How many may hold it at a time."""
        return self._terms.slots or 0


def _terms(
    store: Store | AsyncStore,
    name: str,
    slots: int,
    ttl: Seconds,
    resize: bool,
    renew: bool,
    durable: bool,
    on_lost: Callable[..., Any] | None,
    metadata: Any,
) -> Terms:
    require_int("slots", slots, 1, SLOTS_MAX)
    terms = make_terms(
        store, name, who="Semaphore", ttl=ttl, renew=renew, durable=durable, wakeup="poll",
        fair=False, on_lost=on_lost, metadata=metadata,
    )  # fmt: skip
    terms.sql = statements_of(store, SemaphoreStatements, durable=durable)
    terms.keys = slot_keys(terms.keys[0], slots)
    terms.slots, terms.resize = slots, resize
    return terms


__all__ = ["AsyncSemaphore", "Semaphore"]
