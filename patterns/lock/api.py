"""Distributed locks on PostgreSQL: leases with fencing tokens, for threads and for asyncio.

A lock is a row with a holder, an end and a token; a grant is one compare-and-swap of it. The
algorithms are in `_grant`, renewal in `_renewal`; here are their two thin shells.

What it promises: no second grant before the first lease's end by the server's clock, tokens that
rise with every grant, and holders that stop trusting before that end. What no lease can promise is
that a paused process does nothing afterwards: for that the protected resource compares tokens
(`fence_sql`), or the work is a transaction of the same database (`Lease.guard`).
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Hashable
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

from ..._engine import schema as _schema
from ..._observe import shown
from ..._ops.codec import integer, seconds, waiting
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Config, TableKind
from ...errors import ConfigError, InvalidValueError, LockTimeoutError
from ...store import Store
from .._runtime.colour import require, require_callback
from . import flows as _grant
from .lease import LockInfo, Terms, encode_metadata, key_of
from .leases import AsyncGrant, AsyncLease, Lease
from .runtime import TaskPort, ThreadPort
from .sql import LockStatements

if TYPE_CHECKING:
    from ...config import Seconds, Table

S = TypeVar("S", bound=LockStatements)
Wakeup: TypeAlias = Literal["poll", "notify"]


# -- making locks --------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _statements(kind: Hashable, table: Table, tickets: Table, prefix: bytes) -> Any:
    assert isinstance(kind, type)
    return kind(table, tickets, prefix)


def statements_of(store: Store | AsyncStore, kind: type[S], *, durable: bool) -> S:
    """Return the statements of a store's lock table."""
    config: Config = store._config
    table = _schema.companion(config, TableKind.LOCKS, durable=durable)
    tickets = _schema.companion(config, TableKind.TICKETS, durable=False)
    return cast("S", _statements(cast("Hashable", kind), table, tickets, store._sql.prefix_bytes))


def make_terms(
    store: Store | AsyncStore,
    name: str,
    *,
    who: str,
    ttl: Seconds,
    renew: bool,
    durable: bool,
    wakeup: str,
    fair: bool,
    on_lost: Callable[..., Any] | None,
    metadata: Any,
) -> Terms:
    """Check what a lock is made with; `who` is the class that is made, in its blocking colour.

    Raises:
        ConfigError, InvalidKeyError, InvalidValueError: names what is wrong.
    """
    if wakeup not in ("poll", "notify"):
        raise ConfigError(f"wakeup must be 'poll' or 'notify', not {wakeup!r}")
    require_callback(on_lost, "on_lost", who, blocking=isinstance(store, Store))
    key = key_of(name, store._sql.prefix_bytes, store._config.max_key_length)
    return Terms(
        name,
        [key],
        statements_of(store, LockStatements, durable=durable),
        seconds(ttl, endless=""),
        renew,
        wakeup == "notify",
        fair,
        on_lost,
        encode_metadata(metadata),
    )


def granted(lease: Lease | AsyncLease | None, terms: Terms, timeout: float | None) -> Any:
    """Return the lease that acquire() waited for.

    A function of its own: an error met on the way keeps the frames it passed through until the
    collector comes, and a lease that they held would not be noticed as abandoned.

    Raises:
        LockTimeoutError: there is none.
    """
    if lease is not None:
        return lease
    what = "lock" if terms.slots is None else f"semaphore of {terms.slots}"
    waited = "at once" if not timeout else f"within {timeout:g} s"
    raise LockTimeoutError(
        f"the {what} {terms.name!r} was not granted {waited}: it is held; holder() and `pgkv locks` "
        "show by whom"
    )


class Acquirer:
    """What Lock and Semaphore share, for threads."""

    _terms: Terms
    _port: ThreadPort[Lease]

    def _begin(self, store: Store, terms: Terms) -> None:
        self._terms = terms
        self._port = ThreadPort(store, Lease)
        self._entered = threading.local()

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._terms.name

    def acquire(self, timeout: Seconds | None = None) -> Lease:
        """Wait until it is granted.

        Each call is a grant of its own: the holder's second one waits as a stranger's would. Polls
        grow from 5 ms to half a second, are jittered, and never outlast the holder's lease; a
        denied one writes nothing on the server.

        Args:
            timeout: seconds; None waits without end, 0 tries once.

        Returns:
            The `Lease`: enter it with ``with``, or release it.

        Raises:
            LockTimeoutError: somebody else held it all that time.
            InvalidValueError: `timeout` is no duration.
            StoreUnavailableError: the server does not answer. Nothing is left behind that outlives
                the ttl.
        """
        longest = waiting(timeout)
        flow = _grant.acquire(self._port, self._terms, longest)
        return cast("Lease", granted(self._port.channel.run(flow), self._terms, longest))

    def try_acquire(self) -> Lease | None:
        """Try once; None where somebody else holds it. It waits for nobody, not even for a
        `Lease.guard`."""
        return cast(
            "Lease | None", self._port.channel.run(_grant.acquire(self._port, self._terms, 0.0))
        )

    def __enter__(self) -> Lease:
        lease = self.acquire()
        stack: list[Lease] = self._entered.__dict__.setdefault("stack", [])
        stack.append(lease)
        return lease

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.stack.pop().__exit__(kind, error, traceback)

    @shown
    def __repr__(self) -> str:
        return self._terms.facts()

    __reduce__ = refuse_pickle


class AsyncAcquirer:
    """What AsyncLock and AsyncSemaphore share."""

    _terms: Terms
    _port: TaskPort[AsyncLease]

    def _begin(self, store: AsyncStore, terms: Terms) -> None:
        self._terms = terms
        self._port = TaskPort(store, AsyncLease)
        self._entered: weakref.WeakKeyDictionary[asyncio.Task[Any], list[AsyncLease]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._terms.name

    def acquire(self, timeout: Seconds | None = None) -> AsyncGrant:
        """As `Lock.acquire`; the result is awaited, or entered with ``async with``. Cancelling it
        is safe at any point."""
        longest = waiting(timeout)

        async def acquired() -> AsyncLease:
            flow = _grant.acquire(self._port, self._terms, longest)
            return cast(
                "AsyncLease", granted(await self._port.channel.run(flow), self._terms, longest)
            )

        return AsyncGrant(acquired, self.name)

    async def try_acquire(self) -> AsyncLease | None:
        """As `Lock.try_acquire`."""
        flow = _grant.acquire(self._port, self._terms, 0.0)
        return cast("AsyncLease | None", await self._port.channel.run(flow))

    async def __aenter__(self) -> AsyncLease:
        lease = await self.acquire()
        task = asyncio.current_task()
        assert task is not None
        self._entered.setdefault(task, []).append(lease)
        return await lease.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        await self._entered[task].pop().__aexit__(kind, error, traceback)

    @shown
    def __repr__(self) -> str:
        return self._terms.facts()

    __reduce__ = refuse_pickle


class Lock(Acquirer):
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
        InvalidValueError: `ttl` is no duration, or `metadata` is not JSON.
    """

    def __init__(
        self,
        store: Store,
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
        require(store, Store, "Lock", "AsyncLock")
        terms = make_terms(
            store, name, who="Lock", ttl=ttl, renew=renew, durable=durable, wakeup=wakeup,
            fair=fair, on_lost=on_lost, metadata=metadata,
        )  # fmt: skip
        self._begin(store, terms)

    def holder(self) -> LockInfo | None:
        """Return who holds it, or None."""
        return cast(
            "LockInfo | None", self._port.channel.run(_grant.holder(self._port, self._terms))
        )

    def force_release(self, token: int) -> bool:
        """Free the name at once, whoever holds it by that token; True if somebody did.

        The holder learns of it at its next renewal, and **works on until then**, beside the next
        one. Its transactions under `guard` are not affected, nor are fenced writes. Where it must
        not overlap, use `revoke`.

        Args:
            token: the grant's, as `holder` shows it.

        Raises:
            InvalidValueError: `token` is no integer.
        """
        return cast(
            "bool",
            self._port.channel.run(_grant.force_release(self._port, self._terms, _token(token))),
        )

    def revoke(self, token: int) -> bool:
        """End that token but not its lease: the name is free at the lease's old expiry, so there
        are never two holders. The holder learns of it at its next renewal. Waits at most a second
        for an open guard. True if somebody held it by that token.

        Args:
            token: the grant's, as `holder` shows it.

        Raises:
            InvalidValueError: `token` is no integer.
        """
        return cast(
            "bool", self._port.channel.run(_grant.revoke(self._port, self._terms, _token(token)))
        )


class AsyncLock(AsyncAcquirer):
    """A lock that processes on many machines share, for asyncio: :class:`Lock`, awaited.

    ::

        async with pgkv.AsyncLock(store, "billing", ttl=30).acquire(timeout=10) as lease:
            await charge(fence=lease.token)

    The body of an ``async with`` is cancelled when its lease is lost. `on_lost` may be ``async``;
    it runs as a task.
    """

    def __init__(
        self,
        store: AsyncStore,
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
        require(store, AsyncStore, "AsyncLock", "Lock")
        terms = make_terms(
            store, name, who="Lock", ttl=ttl, renew=renew, durable=durable, wakeup=wakeup,
            fair=fair, on_lost=on_lost, metadata=metadata,
        )  # fmt: skip
        self._begin(store, terms)

    async def holder(self) -> LockInfo | None:
        """As `Lock.holder`."""
        return cast(
            "LockInfo | None", await self._port.channel.run(_grant.holder(self._port, self._terms))
        )

    async def force_release(self, token: int) -> bool:
        """As `Lock.force_release`."""
        flow = _grant.force_release(self._port, self._terms, _token(token))
        return cast("bool", await self._port.channel.run(flow))

    async def revoke(self, token: int) -> bool:
        """As `Lock.revoke`."""
        flow = _grant.revoke(self._port, self._terms, _token(token))
        return cast("bool", await self._port.channel.run(flow))


def _token(token: object) -> int:
    if not isinstance(token, int) or isinstance(token, bool):
        raise InvalidValueError(f"token must be an int, not {type(token).__name__}")
    return integer(token, "token")


__all__ = ["AsyncLease", "AsyncLock", "Lease", "Lock", "LockInfo"]
