"""`RateLimiter` and `AsyncRateLimiter`: a token bucket per key that all processes share.

Thin shells: the flows of `_limiter` are driven here, blocking or awaited. Middleware and framework
adapters stand beside this module and only ever call `hit`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic
from typing import Any, ParamSpec, Self, TypeVar

from ..._observe import shown
from ..._ops.drivers import drive, drive_async
from ..._ops.op import Flow, Op
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Seconds
from ...store import Store
from ...typed import document
from .._runtime.colour import require
from .flows import Core, Receipt
from .local import LimiterCounts
from .many import charges_of, hit_many
from .options import OnError
from .policy import Decision
from .rate import Rate, Rates

__all__ = [
    "AsyncRateLimiter",
    "AsyncReservation",
    "Decision",
    "LimiterCounts",
    "Rate",
    "RateLimiter",
    "Reservation",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

CANCEL_SECONDS_MIN = 0.05  # what a flow may still use after its time, to give back what it took


class RateLimiter(Core):
    """A rate limit shared by every process that uses the same store: a token bucket per key.

    One statement per hit, whatever the number of rates, judged by the server's clock. Over any
    span ``t`` at most ``burst + rate x t`` tokens per key are handed out (plus what was refunded),
    by any number of processes; a refused hit costs nothing. The algorithm is GCRA (ITU-T I.371),
    in integers of nanoseconds: no token is lost to rounding but 1 ns per hit.

    Limits of that promise: the store's table is UNLOGGED by default, so a crash of the server
    fills every bucket; a step of its clock forward may admit one burst early; `local_deny` and
    `lease` loosen it by amounts that ``docs/rate-limiter.md`` states.

    Args:
        store: a :class:`Store`. Rows live in its table, under keys that begin with ``pgkv:rate:``.
        rates: ``"10/s burst 20; 1000/h"``, a :class:`Rate`, or several: charged all or none.
        name: part of every key and of the response headers: limiters that share a name share
            buckets. Printable ASCII.
        on_error: when the store does not answer: ``"raise"``, ``"open"`` (admit) or ``"closed"``
            (refuse; take it for logins). Wrong arguments always raise.
        timeout: seconds that one call may spend on the store, an outage included.
        local_deny: refuse a denied key locally, without a query, until it could be admitted, at
            most for a second: an attack then costs next to nothing. A reset or refund made by
            another process acts within that second.
        lease: tokens that a process takes at once and spends without a query; 1 for none. For very
            hot keys: each process may admit up to ``lease - 1`` late, or leave them unspent.

    Raises:
        ConfigError: a setting is wrong; says which and why.
    """

    _is_async = False

    def __init__(
        self,
        store: Store,
        rates: Rates,
        *,
        name: str,
        on_error: OnError = "raise",
        timeout: Seconds = 0.25,
        local_deny: bool = False,
        lease: int = 1,
    ) -> None:
        require(store, Store, "RateLimiter", "AsyncRateLimiter")
        self._begin(store, rates, name, on_error, timeout, local_deny, lease)

    def hit(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        """Charge the key, or refuse. Never waits for tokens.

        Args:
            key: whom to charge; beyond 256 characters it is hashed.
            cost: tokens, 1 or more.
            limits: rates for this call instead of the limiter's own: a user's plan. With one rate
                a new plan takes effect on the bucket as it stands.

        Returns:
            A :class:`Decision`, true when allowed.

        Raises:
            InvalidValueError: the cost is more than a full bucket holds.
            StoreUnavailableError, OperationTimeoutError: with ``on_error="raise"``.
        """
        return self._drive(self._hit(key, cost, limits))

    def acquire(
        self,
        key: str,
        cost: int = 1,
        timeout: Seconds | None = None,
        *,
        limits: Rates | None = None,
    ) -> Decision:
        """Wait for the turn of this call: first come, first served, one statement and one sleep.

        An exception or cancellation while it sleeps gives the place back.

        Args:
            key: whom to charge.
            cost: tokens.
            timeout: seconds to wait at most; None without end; 0 not at all.
            limits: rates for this call.

        Returns:
            A :class:`Decision`, which is true.

        Raises:
            RateLimitedError: the wait would take longer; raised at once, nothing is charged.
        """
        return self._drive(self._acquire(key, cost, timeout, limits))

    def reserve(
        self,
        key: str,
        cost: int = 1,
        max_wait: Seconds | None = None,
        *,
        limits: Rates | None = None,
    ) -> Reservation:
        """Take a place in the queue: act after ``reservation.delay`` seconds, or cancel it.

        Args:
            key: whom to charge.
            cost: tokens.
            max_wait: seconds; None for any wait, 0 for none.
            limits: rates for this call.

        Returns:
            A `Reservation`, charged already.

        Raises:
            RateLimitedError: the delay would be longer; nothing is charged.
        """
        return Reservation(self, *self._drive(self._reserve(key, cost, max_wait, limits)))

    def peek(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        """Tell what `hit` would decide, without charging or counting.

        Args:
            key: whom.
            cost: tokens.
            limits: rates for this call.
        """
        return self._drive(self._peek(key, cost, limits))

    def reset(self, key: str, *, limits: Rates | None = None) -> bool:
        """Fill the key's bucket. True if it was not full.

        Args:
            key: whose.
            limits: the rates that it was charged under, where these were not the limiter's own.
        """
        return self._drive(self._reset(key, limits))

    def refund(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> bool:
        """Give tokens back, never above a full bucket. True if there was something to fill.

        Args:
            key: whose.
            cost: tokens, 1 or more.
            limits: the rates that it was charged under, where these were not the limiter's own.
        """
        return self._drive(self._refund(key, cost, limits))

    @staticmethod
    def hit_many(charges: Iterable[tuple[RateLimiter, str, int]]) -> Decision:
        """Charge several keys of several limiters, all or none, in one statement.

        ::

            RateLimiter.hit_many([(per_user, "user:1", 1), (llm_tokens, "org:9", 850)])

        Keys are locked in order, so that calls never deadlock with each other. When the store does
        not answer, the strictest `on_error` among the limiters decides.

        Args:
            charges: ``(limiter, key, cost)``; the limiters are on one store and table.

        Returns:
            A :class:`Decision` about the tightest of them; of a denial, the longest wait.

        Raises:
            ConfigError: they cannot be charged by one statement; says why.
            InvalidValueError: a cost is more than its full bucket holds.
        """
        found = charges_of(charges, RateLimiter)
        first: RateLimiter = next(iter(found.values())).limiter  # type: ignore[assignment]  # checked there
        return first._drive(hit_many(found))

    def using(self, conn: Any) -> Self:
        """Return this limiter inside the caller's own connection and transaction.

        What it charges comes back when the transaction rolls back. The key's row stays locked until
        the transaction ends, and other hits on it wait: charge last. Failures always raise, and a
        call is bounded by the store's ``operation_timeout``.

        Args:
            conn: a ``psycopg.Connection``, or Django's or SQLAlchemy's wrapper of one.
        """
        return self._using(conn)

    def limit(
        self, key: str | Callable[..., str], cost: int | Callable[..., int] = 1
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a function: each call is a hit.

        ::

            @limiter.limit(key=lambda request: request.user)
            def view(request): ...

        Args:
            key: the key, or a function that gets the call's arguments and returns it.
            cost: tokens, or a function of the arguments.

        Raises:
            RateLimitedError: (of the decorated function) the call is refused; it did not begin.
            ConfigError: the function is async, or `key` is neither a str nor a function.
            TypeError: it decorates no function.
        """
        self._check_limit(key, cost)

        def decorate(fn: Callable[P, R]) -> Callable[P, R]:
            self._refuse_function(fn)

            @functools.wraps(fn)
            def limited(*args: P.args, **kwargs: P.kwargs) -> R:
                whom = key(*args, **kwargs) if callable(key) else key
                tokens = cost(*args, **kwargs) if callable(cost) else cost
                decision = self.hit(whom, cost=tokens)
                if not decision.allowed:
                    raise self._refusal(decision)
                return fn(*args, **kwargs)

            return limited

        return decorate

    def _judge(self, key: str, cost: int, limits: Rates | None, on_error: OnError) -> Decision:
        """`hit` with another `on_error`: for middleware."""
        return self._drive(self._hit(key, cost, limits, on_error))

    def _drive(self, flow: Flow[T]) -> T:
        """Run a flow; its statements together take at most `timeout`, sleeps apart."""
        until = monotonic() + self.timeout

        def execute(op: Op[Any], _: float | None) -> Any:
            return self._execute(op, max(until - monotonic(), CANCEL_SECONDS_MIN))

        def sleep(seconds: float) -> None:
            nonlocal until
            try:
                time.sleep(seconds)
            finally:
                until = monotonic() + self.timeout

        return drive(flow, execute, sleep=sleep)


class AsyncRateLimiter(Core):
    """:class:`RateLimiter` for asyncio, over an :class:`AsyncStore`: the same methods awaited."""

    _is_async = True

    def __init__(
        self,
        store: AsyncStore,
        rates: Rates,
        *,
        name: str,
        on_error: OnError = "raise",
        timeout: Seconds = 0.25,
        local_deny: bool = False,
        lease: int = 1,
    ) -> None:
        require(store, AsyncStore, "AsyncRateLimiter", "RateLimiter")
        self._begin(store, rates, name, on_error, timeout, local_deny, lease)

    async def hit(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        return await self._drive(self._hit(key, cost, limits))

    async def acquire(
        self,
        key: str,
        cost: int = 1,
        timeout: Seconds | None = None,
        *,
        limits: Rates | None = None,
    ) -> Decision:
        return await self._drive(self._acquire(key, cost, timeout, limits))

    async def reserve(
        self,
        key: str,
        cost: int = 1,
        max_wait: Seconds | None = None,
        *,
        limits: Rates | None = None,
    ) -> AsyncReservation:
        return AsyncReservation(
            self, *await self._drive(self._reserve(key, cost, max_wait, limits))
        )

    async def peek(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        return await self._drive(self._peek(key, cost, limits))

    async def reset(self, key: str, *, limits: Rates | None = None) -> bool:
        return await self._drive(self._reset(key, limits))

    async def refund(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> bool:
        return await self._drive(self._refund(key, cost, limits))

    @staticmethod
    async def hit_many(charges: Iterable[tuple[AsyncRateLimiter, str, int]]) -> Decision:
        found = charges_of(charges, AsyncRateLimiter)
        first: AsyncRateLimiter = next(iter(found.values())).limiter  # type: ignore[assignment]  # checked there
        return await first._drive(hit_many(found))

    def using(self, conn: Any) -> Self:
        return self._using(conn)

    def limit(
        self, key: str | Callable[..., str], cost: int | Callable[..., int] = 1
    ) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
        self._check_limit(key, cost)

        def decorate(fn: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
            self._refuse_function(fn)

            @functools.wraps(fn)
            async def limited(*args: P.args, **kwargs: P.kwargs) -> R:
                whom = key(*args, **kwargs) if callable(key) else key
                tokens = cost(*args, **kwargs) if callable(cost) else cost
                decision = await self.hit(whom, cost=tokens)
                if not decision.allowed:
                    raise self._refusal(decision)
                return await fn(*args, **kwargs)

            return limited

        return decorate

    async def _judge(
        self, key: str, cost: int, limits: Rates | None, on_error: OnError
    ) -> Decision:
        return await self._drive(self._hit(key, cost, limits, on_error))

    async def _drive(self, flow: Flow[T]) -> T:
        until = monotonic() + self.timeout

        async def execute(op: Op[Any], _: float | None) -> Any:
            return await self._execute(op, max(until - monotonic(), CANCEL_SECONDS_MIN))

        async def sleep(seconds: float) -> None:
            nonlocal until
            try:
                await asyncio.sleep(seconds)
            finally:
                until = monotonic() + self.timeout

        return await drive_async(flow, execute, sleep=sleep)


class _Reserved:
    """What both colours of reservation are told."""

    def __init__(
        self, limiter: Any, decision: Decision, delay: float, receipt: Receipt | None
    ) -> None:
        self.decision = decision
        self.delay = delay
        self._limiter = limiter
        self._receipt = receipt

    @shown
    def __repr__(self) -> str:
        return f"{self._limiter.name!r} delay={self.delay:.3f}"

    __reduce__ = refuse_pickle

    def _take(self) -> Receipt | None:
        receipt, self._receipt = self._receipt, None
        return receipt


class Reservation(_Reserved):
    """A place in the queue, made by `RateLimiter.reserve`. It is charged already.

    Attributes:
        delay: seconds after which to act, counted from when `reserve` returned; 0.0 for now.
        decision: the :class:`Decision`, with what remains after it.
    """

    def cancel(self) -> bool:
        """Give back what nobody has reserved after it, so that no place is ever held twice.

        Of the last place in the queue that is all of it, of one in the middle what its cost exceeds
        the later ones'. Idempotent.

        Returns:
            Whether anything was given back.
        """
        receipt = self._take()
        return receipt is not None and self._limiter._drive(self._limiter._cancel(receipt))


class AsyncReservation(_Reserved):
    """:class:`Reservation` of an :class:`AsyncRateLimiter`: `cancel` is awaited.

    Attributes:
        delay: seconds after which to act; 0.0 for now.
        decision: the :class:`Decision`, with what remains after it.
    """

    async def cancel(self) -> bool:
        """Give back what nobody has reserved after it; see :meth:`Reservation.cancel`."""
        receipt = self._take()
        return receipt is not None and await self._limiter._drive(self._limiter._cancel(receipt))


# What a method means is written once, in the blocking colour.
document(AsyncRateLimiter, RateLimiter)
AsyncRateLimiter.hit_many.__doc__ = RateLimiter.hit_many.__doc__
