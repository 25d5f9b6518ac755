"""`RateLimiter` and `AsyncRateLimiter`: a token bucket per key that all processes share.

Both run the flows of `flows`; one blocks, the other awaits. Middleware and framework adapters call
only `hit`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from time import monotonic
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast

from ..._observe import shown
from ..._ops.codec import waiting
from ..._ops.drivers import shielded
from ..._ops.op import Flow
from ..._settings import refuse_pickle
from ...aio import AsyncStore
from ...config import Seconds
from ...errors import ConfigError, PgkvError
from ...store import Store
from .._runtime.checks import OfArguments, require
from .flows import (
    OUTAGES,
    LimiterFlows,
    OnError,
    Receipt,
    Reserved,
    charges_of,
    check_limit,
    hit_many,
)
from .local import LimiterCounts
from .policy import Decision
from .rate import Rate, Rates

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", Store, AsyncStore)
T = TypeVar("T")

ABANDON_SECONDS = 1.0  # for the statement of a cancelled caller; then the server cancels it


class LimiterView(Generic[S]):
    """What both limiters have in common; nothing here waits."""

    # The class of store that is needed, the name of the class, and that of its twin.
    _needs: tuple[type[Any], str, str]

    def __init__(
        self,
        store: S,
        rates: Rates,
        *,
        name: str,
        on_error: OnError = "raise",
        timeout: Seconds = 0.25,
        local_deny: bool = False,
        prefetch: int = 1,
    ) -> None:
        require(store, *self._needs)
        flows = LimiterFlows(store, rates, name, on_error, timeout, local_deny, prefetch)
        self._bind(store, flows)

    def _bind(self, store: Any, flows: LimiterFlows) -> None:
        self._store = store
        self._flows = flows
        self._store_run = store._run
        self._call = store._bare.call

    def _inside(self, conn: Any) -> Self:
        view = type(self).__new__(type(self))
        store = self._store.using(conn)
        view._bind(store, self._flows.inside(store))
        return view

    @property
    def name(self) -> str:
        """The name, which is part of every key and of the response headers."""
        return self._flows.name

    @property
    def rates(self) -> tuple[Rate, ...]:
        """The rates, by period."""
        return self._flows.rates

    @property
    def counts(self) -> LimiterCounts:
        """How many hits this process's limiter allowed, denied, and decided without the store."""
        return self._flows.counter.snapshot()

    @shown
    def __repr__(self) -> str:
        return self._flows.facts()

    __reduce__ = refuse_pickle


class RateLimiter(LimiterView[Store]):
    """A rate limit shared by every process that uses the same store: a token bucket per key.

    Each hit is one statement, for any number of rates (two, when a key's hits begin or cease to be
    refused), and the server's clock decides. Over any
    span ``t`` at most ``burst + rate x t`` tokens per key are handed out (plus refunded tokens), by
    any number of processes; a refused hit costs nothing. The algorithm is GCRA (ITU-T I.371),
    in integers of nanoseconds: no token is lost to rounding but 1 ns per hit.

    Limits of that promise: the store's table is UNLOGGED by default, so a crash of the server
    fills every bucket; a step of its clock forward may admit one burst early; `local_deny` and
    `prefetch` loosen it by amounts that ``docs/rate-limiter.md`` states.

    Args:
        store: a :class:`Store`. Rows live in its table, under keys that begin with ``pgkv:rate:``.
        rates: ``"10/s burst 20; 1000/h"``, a :class:`Rate`, a :class:`Quota` (``"1000/month"``: a
            calendar window, of whose count no more is handed out before the next begins), or
            several: charged all or none.
        name: part of every key and of the response headers: limiters that share a name share
            buckets. Printable ASCII.
        on_error: when the store does not answer: ``"raise"``, ``"open"`` (admit) or ``"closed"``
            (refuse; use it for logins). Mistakes of the program always raise: wrong arguments, a
            store of another event loop, a missing right.
        timeout: seconds that one call may spend on the store, an outage included.
        local_deny: refuse a denied key locally, without a query, until it could be admitted, at
            most for a second: an attack then costs next to nothing. A reset or refund made by
            another process takes effect within that second.
        prefetch: tokens that a process takes at once and spends without a query; 1 for none. For
            very hot keys: each process may admit up to ``prefetch - 1`` late, or leave them unspent.

    Raises:
        ConfigError: a setting is wrong; says which and why.
    """

    _needs = (Store, "RateLimiter", "AsyncRateLimiter")

    def _run(self, flow: Flow[T]) -> T:
        return self._store_run(flow, self._flows.timeout)  # type: ignore[no-any-return]  # of either store

    def hit(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        """Charge the key, or refuse. Never waits for tokens.

        Args:
            key: the client to charge; beyond 256 characters it is hashed.
            cost: tokens, 1 or more.
            limits: rates for this call instead of the limiter's own: a user's plan. With one rate
                a new plan takes effect on the bucket's present level.

        Returns:
            A :class:`Decision`, true when allowed.

        Raises:
            InvalidValueError: the cost is more than a full bucket holds.
            StoreUnavailableError, OperationTimeoutError: with ``on_error="raise"``.
        """
        flows = self._flows
        began = monotonic()
        plain = limits is None and cost == 1 and type(cost) is int
        usual = flows.usual_of(key, began) if plain else None
        if usual is None:
            return self._store_run(flows.hit(key, cost, limits), flows.timeout)  # type: ignore[no-any-return]  # as of `_run`
        try:
            arrival = self._call(usual.statement, usual.params, flows.timeout)
        except OUTAGES as error:
            return flows.outage(key, error)
        decision = flows.decided(key, usual, arrival, began)
        if decision is None:
            return self._run(flows.go_on(key, usual, arrival, began))
        return decision

    def acquire(
        self,
        key: str,
        cost: int = 1,
        timeout: Seconds | None = None,
        *,
        limits: Rates | None = None,
    ) -> Decision:
        """Wait until it is this call's turn, in order of arrival, with one statement and one sleep.

        An exception or cancellation while it sleeps gives the place back. A used-up quota has no
        places: it sleeps until the next window begins, and asks again.

        Args:
            key: the client to charge.
            cost: tokens.
            timeout: seconds to wait at most; None without end; 0 not at all.
            limits: rates for this call.

        Returns:
            A :class:`Decision`, which is true.

        Raises:
            RateLimitedError: the wait would take longer; raised at once, nothing is charged.
        """
        return self._run(self._flows.acquire(key, cost, timeout, limits, self))

    def _take_place(self, flow: Flow[Reserved]) -> Reserved:
        return self._run(flow)

    def _give_back(self, receipt: Receipt) -> None:
        with contextlib.suppress(PgkvError):  # the caller is to see why it ended
            self._run(self._flows.cancel(receipt))

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
            key: the client to charge.
            cost: tokens.
            max_wait: seconds; None for any wait, 0 for none.
            limits: rates for this call.

        Returns:
            A `Reservation`, charged already.

        Raises:
            RateLimitedError: the delay would be longer; nothing is charged.
        """
        return Reservation(
            self, self._run(self._flows.reserve(key, cost, max_wait, limits, "max_wait"))
        )

    def peek(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        """Tell what `hit` would decide, without charging or counting.

        Args:
            key: the client.
            cost: tokens.
            limits: rates for this call.
        """
        return self._run(self._flows.peek(key, cost, limits))

    def reset(self, key: str, *, limits: Rates | None = None) -> bool:
        """Fill the key's bucket. True if it was not full.

        Args:
            key: the client.
            limits: the rates that it was charged under, where these were not the limiter's own.
        """
        return self._run(self._flows.reset(key, limits))

    def refund(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> bool:
        """Give tokens back, never above a full bucket. True if there was something to fill.

        Args:
            key: the client.
            cost: tokens, 1 or more.
            limits: the rates that it was charged under, where these were not the limiter's own.
        """
        return self._run(self._flows.refund(key, cost, limits))

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
            A :class:`Decision` about the tightest of them; for a denial, the one with the longest
            wait.

        Raises:
            ConfigError: they cannot be charged by one statement; says why.
            InvalidValueError: a cost is more than its full bucket holds.
        """
        runner, found = charges_of(charges, RateLimiter)
        return runner._run(hit_many(found))

    def using(self, conn: Any) -> Self:
        """Return this limiter inside the caller's own connection and transaction.

        Charged tokens come back when the transaction rolls back. The key's row stays locked until
        the transaction ends, and other hits on it wait: charge last. Failures always raise, and a
        call is bounded by the store's ``operation_timeout``.

        Args:
            conn: a ``psycopg.Connection``, or Django's or SQLAlchemy's wrapper of one.
        """
        return self._inside(conn)

    def limit(
        self,
        key: str | OfArguments[str],
        cost: int | OfArguments[int] = 1,
        *,
        timeout: Seconds | None = 0,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a function: each call is a hit, or waits for its turn.

        ::

            @limiter.limit(key=lambda request: request.user)
            def view(request): ...

        Args:
            key: the key, or a function that gets the call's arguments and returns it.
            cost: tokens, or a function of the arguments.
            timeout: seconds that a call waits for its turn, as of `acquire`; None without end, 0
                not at all.

        Raises:
            RateLimitedError: (of the decorated function) the call is refused; it did not begin.
            ConfigError: the function is async, or `key` is neither a str nor a function.
            InvalidValueError: `timeout` is not a duration.
            TypeError: it decorates no function.
        """
        longest = waiting(timeout)

        def wrap(fn: Callable[P, R]) -> Callable[P, R]:
            if is_async(fn):
                raise ConfigError(
                    f"RateLimiter.limit cannot decorate {_name(fn)}: an async function needs "
                    "an AsyncRateLimiter; this one would block its event loop"
                )

            @functools.wraps(fn)
            def limited(*args: P.args, **kwargs: P.kwargs) -> R:
                charged = key(*args, **kwargs) if callable(key) else key
                tokens = cost(*args, **kwargs) if callable(cost) else cost
                if longest != 0:
                    self.acquire(charged, tokens, longest)
                elif not (decision := self.hit(charged, tokens)).allowed:
                    raise self._flows.refusal(decision)
                return fn(*args, **kwargs)

            return limited

        return _decorating(key, cost, wrap)

    def _judge(self, key: str, cost: int, limits: Rates | None, on_error: OnError) -> Decision:
        """`hit` with another `on_error`: for middleware."""
        return self._run(self._flows.hit(key, cost, limits, on_error))


class AsyncRateLimiter(LimiterView[AsyncStore]):
    """:class:`RateLimiter` for asyncio, over an :class:`AsyncStore`: the same methods awaited."""

    _needs = (AsyncStore, "AsyncRateLimiter", "RateLimiter")

    async def _run(self, flow: Flow[T]) -> T:
        return await self._store_run(flow, self._flows.timeout)  # type: ignore[no-any-return]  # of either store

    async def hit(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        """Charge the key, or refuse. Never waits for tokens; see :meth:`RateLimiter.hit`."""
        flows = self._flows
        began = monotonic()
        plain = limits is None and cost == 1 and type(cost) is int
        usual = flows.usual_of(key, began) if plain else None
        if usual is None:
            return await self._run(flows.hit(key, cost, limits))
        try:
            arrival = await self._call(usual.statement, usual.params, flows.timeout)
        except OUTAGES as error:
            return flows.outage(key, error)
        decision = flows.decided(key, usual, arrival, began)
        if decision is None:
            return await self._run(flows.go_on(key, usual, arrival, began))
        return decision

    async def acquire(
        self,
        key: str,
        cost: int = 1,
        timeout: Seconds | None = None,
        *,
        limits: Rates | None = None,
    ) -> Decision:
        """Wait for the turn of this call; see :meth:`RateLimiter.acquire`."""
        return await self._run(self._flows.acquire(key, cost, timeout, limits, self))

    async def _take_place(self, flow: Flow[Reserved]) -> Reserved:
        """Run a reservation; when the caller is cancelled meanwhile, give the place back."""
        if self._flows.is_bound:  # it ends with the caller's transaction
            return await self._run(flow)
        task = asyncio.create_task(self._run(flow))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                await shielded(self._abandon(task), ABANDON_SECONDS)
            raise

    async def _abandon(self, task: asyncio.Task[Reserved]) -> None:
        """Give back what a reservation gets, or stop it when this is cancelled."""
        with contextlib.suppress(PgkvError):
            receipt = (await task).receipt
            if receipt is not None:
                await self._run(self._flows.cancel(receipt))

    async def _give_back(self, receipt: Receipt) -> None:
        # The caller is to see why it ended.
        with contextlib.suppress(PgkvError, TimeoutError):
            await self._cancel(receipt)

    async def _cancel(self, receipt: Receipt) -> bool:
        seconds = self._flows.timeout + ABANDON_SECONDS
        return await shielded(self._run(self._flows.cancel(receipt)), seconds)

    async def reserve(
        self,
        key: str,
        cost: int = 1,
        max_wait: Seconds | None = None,
        *,
        limits: Rates | None = None,
    ) -> AsyncReservation:
        """Take a place in the queue; see :meth:`RateLimiter.reserve`."""
        flow = self._flows.reserve(key, cost, max_wait, limits, "max_wait")
        return AsyncReservation(self, await self._take_place(flow))

    async def peek(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> Decision:
        """Tell what `hit` would decide, without charging or counting."""
        return await self._run(self._flows.peek(key, cost, limits))

    async def reset(self, key: str, *, limits: Rates | None = None) -> bool:
        """Fill the key's bucket. True if it was not full; see :meth:`RateLimiter.reset`."""
        return await self._run(self._flows.reset(key, limits))

    async def refund(self, key: str, cost: int = 1, *, limits: Rates | None = None) -> bool:
        """Give tokens back. True if the bucket was not full; see :meth:`RateLimiter.refund`."""
        return await self._run(self._flows.refund(key, cost, limits))

    @staticmethod
    async def hit_many(charges: Iterable[tuple[AsyncRateLimiter, str, int]]) -> Decision:
        """Charge several keys of several limiters, all or none; see :meth:`RateLimiter.hit_many`."""
        runner, found = charges_of(charges, AsyncRateLimiter)
        return await runner._run(hit_many(found))

    def using(self, conn: Any) -> Self:
        """Return this limiter inside the caller's own connection and transaction; see
        :meth:`RateLimiter.using`.

        Args:
            conn: a ``psycopg.AsyncConnection``, or SQLAlchemy's wrapper of one.
        """
        return self._inside(conn)

    def limit(
        self,
        key: str | OfArguments[str],
        cost: int | OfArguments[int] = 1,
        *,
        timeout: Seconds | None = 0,
    ) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]]:
        """Decorate an async function: each call is a hit, or waits for its turn; see
        :meth:`RateLimiter.limit`."""
        longest = waiting(timeout)

        def wrap(fn: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
            if not is_async(fn) or inspect.isasyncgenfunction(fn):
                raise ConfigError(
                    f"AsyncRateLimiter.limit cannot decorate {_name(fn)}: "
                    + (
                        "an async generator is resumed many times in one call; call hit() inside"
                        if inspect.isasyncgenfunction(fn)
                        else "a function that is not async cannot await; it needs a RateLimiter"
                    )
                )

            @functools.wraps(fn)
            async def limited(*args: P.args, **kwargs: P.kwargs) -> R:
                charged = key(*args, **kwargs) if callable(key) else key
                tokens = cost(*args, **kwargs) if callable(cost) else cost
                if longest != 0:
                    await self.acquire(charged, tokens, longest)
                elif not (decision := await self.hit(charged, tokens)).allowed:
                    raise self._flows.refusal(decision)
                return await fn(*args, **kwargs)

            return limited

        return _decorating(key, cost, wrap)

    async def _judge(
        self, key: str, cost: int, limits: Rates | None, on_error: OnError
    ) -> Decision:
        return await self._run(self._flows.hit(key, cost, limits, on_error))


def _decorating(key: object, cost: object, wrap: F) -> F:
    """The decorator of both classes; a static or class method stays one."""
    check_limit(key, cost)

    def decorate(fn: Any) -> Any:
        if isinstance(fn, staticmethod | classmethod):
            return type(fn)(decorate(fn.__func__))
        return wrap(fn)

    return cast("F", decorate)


def is_async(fn: Any) -> bool:
    """Whether calling a function gives something to await, or to iterate with ``async for``."""
    if not callable(fn):
        raise TypeError(
            f"limit() decorates a function, not {type(fn).__name__}; write "
            "@limiter.limit(key=...) with the parentheses"
        )
    own = getattr(type(fn), "__call__", None)  # noqa: B004  # an object's `async def __call__`
    return any(map(inspect.iscoroutinefunction, (fn, own))) or inspect.isasyncgenfunction(fn)


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", type(fn).__name__)


class ReservationView:
    """What both kinds of reservation have in common."""

    def __init__(self, limiter: Any, reserved: Reserved) -> None:
        self.decision: Decision = reserved[0]
        self.delay: float = reserved[1]
        self._receipt = reserved[2]
        self._limiter = limiter

    @shown
    def __repr__(self) -> str:
        return f"{self._limiter.name!r} delay={self.delay:.3f}"

    __reduce__ = refuse_pickle

    def _take(self) -> Receipt | None:
        receipt, self._receipt = self._receipt, None
        return receipt


class Reservation(ReservationView):
    """A place in the queue, made by `RateLimiter.reserve`. It is charged already.

    Attributes:
        delay: seconds after which to act, counted from when `reserve` returned; 0.0 for now.
        decision: the :class:`Decision`, with what remains after it.
    """

    def cancel(self) -> bool:
        """Give the place back, except the part that later reservations rely on, so that no place is
        ever held twice.

        The last place in the queue is given back whole; one in the middle by as much as its cost
        exceeds the later ones'. Idempotent.

        Returns:
            Whether anything was given back.
        """
        receipt = self._take()
        return receipt is not None and self._limiter._run(self._limiter._flows.cancel(receipt))


class AsyncReservation(ReservationView):
    """:class:`Reservation` of an :class:`AsyncRateLimiter`: `cancel` is awaited."""

    async def cancel(self) -> bool:
        """Give the place back, except the part that later reservations rely on; see
        :meth:`Reservation.cancel`."""
        receipt = self._take()
        return receipt is not None and await self._limiter._cancel(receipt)
