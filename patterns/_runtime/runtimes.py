"""What patterns use of a store: its channel, its background, and a way to wait. One class is for
threads, one for event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..._background.background import Background, backgrounds, pool_channel
from ..._engine._async.channel import AsyncPoolChannel
from ..._engine._sync.channel import PoolChannel
from ..._ops.drivers import is_set_within, shielded
from ..._ops.op import Flow, Op, call, pause
from ...aio import AsyncStore
from ...errors import PgkvError, TransactionError
from ...store import Store
from .lease import Held, LeaseRenewals, follow
from .wakeup import Waiter, Waiters

H = TypeVar("H", bound="Held")
T = TypeVar("T")

PATIENCE = 3.0  # seconds beyond its timeout for an answer that a cancelled task waits for


class Runtime:
    """What both runtimes have in common. `refusal` is the message of the TransactionError for a view of
    a transaction."""

    channel: Any
    background: Callable[[], Background]  # of the store's database
    _of: Callable[[Any], Background]  # of a channel's server; of all servers any one
    clean_up: Callable[..., Any]
    finish: Callable[..., Any]
    stop: Any = None  # an event that ends a wait without a waiter
    _event: Callable[[], Any]
    _wait: Callable[[Any, float], Any]  # for an event, at most that long
    _background: Background | None = None

    def __init__(self, store: Store | AsyncStore, refusal: str) -> None:
        channel = pool_channel(store)
        if channel is None:
            raise TransactionError(refusal)
        self.channel = channel
        self.timeout: float = store._config.operation_timeout

    def watch(self, held: H) -> H:
        """Renew it until it is forgotten, and tell its holder of its end. Return it."""
        self.background().part(LeaseRenewals).watch(held)
        return held

    def forget(self, held: Held) -> None:
        self.background().part(LeaseRenewals).forget(held)

    def backgrounds(self) -> list[Background]:
        """Return the background of the store's database, or of each of a sharded store."""
        router = getattr(self.channel, "router", None)
        if router is None:
            return [self.background()]
        return [self._of(self.channel.of_slot(slot)) for slot in router.one_of_each()]

    def placed(self, op: Op[T]) -> tuple[Op[T], Background]:
        """Return an operation on a key as the background that performs it needs it, and that one."""
        router = getattr(self.channel, "router", None)
        if router is None:
            return op, self.background()
        ((slot, op),) = router.parts(op, 0)
        return op, self._of(self.channel.of_slot(slot))

    def follow(self, held: Held, error: PgkvError) -> None:
        """Renew what may no longer be where it was watched: its slot has moved to another server, or on
        Citus its server has another address."""
        router = getattr(self.channel, "router", None)
        if router is not None and isinstance(error, router.strays):
            self.run_later(lambda: self.channel.run(follow(self, held)))

    def leave(self) -> None:
        """Use the background of the server that has the slot now."""
        self._background = None
        backgrounds.forget(self.channel)

    def subscribe(self, kind: type[Waiters], payload: bytes) -> Waiter:
        """Begin to hear of notifications with that payload."""
        waiters = self.background().part(kind)
        waiter = Waiter(waiters, payload, self._event())
        waiter.server = self._server()
        waiters.add(waiter)
        return waiter

    def has_moved(self, waiter: Waiter) -> bool:
        """Whether what it waits for has moved to another server, with its slot. That one's background is
        used from then on."""
        moved = waiter.server is not self._server()
        if moved:
            self.leave()
        return moved

    def _server(self) -> object:
        router = getattr(self.channel, "router", None)
        return router and router.channels[self.channel.slot]

    def unsubscribe(self, waiter: Any, *, granted: bool) -> None:
        waiter._waiters.remove(waiter, granted=granted)

    def wait(self, waiter: Waiter | None, seconds: float) -> Flow[None]:
        """Let time pass, less if the waiter is woken."""
        if waiter is not None:
            if not waiter.event.is_set():
                waiter.trying = False
            yield from call(self._wait, waiter.event, seconds)
            waiter.event.clear()
        elif self.stop is not None:
            yield from call(self._wait, self.stop, seconds)
        else:
            yield from pause(seconds)

    def run_later(self, work: Callable[[], Any], done: Callable[[], object] | None = None) -> bool:
        """Run work that nothing waits for; see `Background.run_later`."""
        return self.background().run_later(work, done)


class SyncRuntime(Runtime):
    """For a `Store`."""

    channel: PoolChannel
    _event = threading.Event
    # The event's own: a caller's `stop` may be of multiprocessing.
    _wait = staticmethod(lambda event, seconds: event.wait(seconds))

    def background(self) -> Background:
        known = self._background
        if known is None or known.ended:
            known = self._background = self._of(self.channel)
        return known

    def _of(self, channel: Any) -> Background:
        return backgrounds.get(_of_one_server(channel), None)

    def clean_up(self, make: Callable[[], Flow[T]], timeout: float | None, longest: float) -> T:
        """Run a clean-up flow of its caller."""
        del longest  # nothing interrupts it here
        return self.channel.run(make(), timeout)

    def finish(self, op: Op[T], note: Callable[[T], object]) -> T:
        """Perform an operation whose answer must not be lost; `note` hears it first."""
        answer = self.channel.execute(op)
        note(answer)
        return answer


class AsyncRuntime(Runtime):
    """For an `AsyncStore`."""

    channel: AsyncPoolChannel
    _event = asyncio.Event
    _wait = staticmethod(is_set_within)

    def background(self) -> Background:
        known = self._background
        loop = asyncio.get_running_loop()
        if known is None or known.ended or known.loop is not loop:
            known = self._background = self._of(self.channel)
        return known

    def _of(self, channel: Any) -> Background:
        return backgrounds.get(_of_one_server(channel), asyncio.get_running_loop())

    async def clean_up(
        self, make: Callable[[], Flow[T]], timeout: float | None, longest: float
    ) -> T:
        """Run a clean-up flow of its caller; cancellations do not interrupt it."""
        return await shielded(self.channel.run(make(), timeout), longest)

    async def finish(self, op: Op[T], note: Callable[[T], object]) -> T:
        """Perform an operation whose answer must not be lost: a cancellation waits for it, and `note`
        hears it also then."""

        async def perform() -> T:
            answer = await self.channel.execute(op)
            note(answer)
            return answer

        async def end() -> None:
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()  # looked at: or asyncio logs that nothing did

        task = asyncio.get_running_loop().create_task(perform())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                await shielded(end(), self.timeout + PATIENCE)
            raise


def _of_one_server(channel: Any) -> Any:
    if hasattr(channel, "router") and channel.slot is None:
        return channel.of_slot(0)
    return channel


def runtime_of(store: Store | AsyncStore) -> SyncRuntime | AsyncRuntime | None:
    """Return the runtime for a store; None for a view of a transaction."""
    channel = pool_channel(store)
    if channel is None:
        return None
    kind = SyncRuntime if isinstance(channel, PoolChannel) else AsyncRuntime
    return kind(store, "")
