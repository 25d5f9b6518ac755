"""Several locks at once: all of them, or none.

They are acquired one after the other in the order of their names, so that calls with the same
locks never wait for each other in a circle. What was granted is renewed while the rest is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from ..._ops.op import Flow
from ...errors import ConfigError, InvalidValueError, PgkvError
from . import flows
from .lease import LeaseState

if TYPE_CHECKING:
    from .api import AsyncLease, Lease  # noqa: F401  # of the bases below, in quotes

L = TypeVar("L", bound=LeaseState)


class _Held(tuple[L, ...]):  # noqa: SLOT001  # it keeps what it has entered
    """The leases, in the order in which their locks were given."""

    _stack: Any

    def check(self) -> None:
        """Return if every one of them may be trusted at this moment; as of `Lease.check`."""
        for lease in self:
            lease.check()

    def _granted(self) -> list[L]:
        return sorted(self, key=_place)


class Leases(_Held["Lease"]):
    """Leases of several locks, as `Lock.acquire_many` returns them: a tuple in the order of the
    locks. Enter it with ``with``, or call `release`."""

    def release(self) -> bool:
        """Free all of them, the last granted first; True if each was still held. One that fails
        does not keep the others, and its error is raised."""
        return self[0]._to_the_end(partial(_release, self._granted()))

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for lease in self._granted():
            self._stack.enter_context(lease)
        return self

    def __exit__(self, *failure: object) -> None:
        """Release them; raises LeaseLostError as of `Lease`."""
        self._stack.__exit__(*failure)


class AsyncLeases(_Held["AsyncLease"]):
    """:class:`Leases` for asyncio. The body of an ``async with`` is cancelled when any is lost."""

    async def release(self) -> bool:
        """As `Leases.release`."""
        return await self[0]._to_the_end(partial(_release, self._granted()))

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        for lease in self._granted():
            await self._stack.enter_async_context(lease)
        return self

    async def __aexit__(self, *failure: object) -> None:
        """As `Leases.__exit__`, also when cancelled."""
        await self._stack.__aexit__(*failure)


def _place(each: Any) -> tuple[str, bytes]:
    return each._sql.t, each._key


def _release(leases: list[Any]) -> Flow[bool]:
    held, failure = True, None
    for lease in reversed(leases):
        try:
            held = (yield from flows.release(lease._runtime, lease)) and held
        except PgkvError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return held


def in_order(locks: Any, wanted: type[Any]) -> list[tuple[int, Any]]:
    """Check what acquire_many is given: locks of one store and of that class, each once. Return them
    in the order of granting, each with its place in the order given."""
    if isinstance(locks, str) or not isinstance(locks, Iterable):
        raise ConfigError(f"locks must be an iterable of locks, not {type(locks).__name__}")
    given = list(locks)
    places: dict[tuple[str, bytes], tuple[int, Any]] = {}
    for index, lock in enumerate(given):
        if not isinstance(lock, wanted):
            raise ConfigError(
                f"locks must be {'async' if 'Async' in wanted.__name__ else 'blocking'} locks or "
                f"semaphores, not {type(lock).__name__}"
            )
        if _servers(lock) is not _servers(given[0]):
            raise ConfigError(
                f"the locks {given[0].name!r} and {lock.name!r} are of different stores: their "
                "names have no common order"
            )
        options = lock._options
        if places.setdefault((options.sql.t, options.keys[0]), (index, lock))[0] != index:
            raise InvalidValueError(
                f"locks has {lock.name!r} twice: the second one would wait for the first"
            )
    if not given:
        raise InvalidValueError("locks is empty: acquire_many needs at least one lock")
    return [placed for _, placed in sorted(places.items())]


def _servers(lock: Any) -> Any:
    """What locks of one store have in common: of a sharded one all slots have."""
    channel = lock._runtime.channel
    return getattr(channel, "router", channel)


class Acquisitions(Generic[L]):
    """One call of acquire_many(): an `Acquisition` for each of `ordered`, with one deadline."""

    def __init__(self, ordered: list[tuple[int, Any]], timeout: float | None) -> None:
        self.runtime: Any = ordered[0][1]._runtime
        self.timeout = timeout
        self._places = {
            flows.Acquisition[L](lock._runtime, lock._options, timeout): place
            for place, lock in ordered
        }
        self._leases: dict[flows.Acquisition[L], L] = {}

    def flow(self) -> Flow[list[L]]:
        """Acquire each in order.

        Raises:
            LockTimeoutError: one was held by others until the deadline; `take_back` releases the
                others.
        """
        for acquisition in self._places:
            lease = yield from acquisition.flow()
            self._leases[acquisition] = flows.granted(lease, acquisition, self.timeout)
        for lease in self._leases.values():
            lease.check()
        leases, self._leases = self._leases, {}
        return [leases[each] for each in sorted(leases, key=self._places.__getitem__)]

    def take_back(self) -> Flow[None]:
        """End whatever was granted, the last first."""
        for acquisition in reversed(self._places):
            lease = self._leases.pop(acquisition, None)
            if lease is not None:
                with suppress(PgkvError):  # it is tried once more
                    yield from flows.release(lease._runtime, lease)
                    acquisition.in_doubt = False
            yield from acquisition.take_back()
