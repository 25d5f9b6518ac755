"""The rate limiter's algorithms, each written once as a flow for both colours.

`Core` holds what a limiter is told and remembers; its underscored methods are flows that
`rate_limit` drives, blocking or awaiting. Statements live in `_sql.limit`, arithmetic in `_policy`,
what a process remembers in `_local`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from hashlib import blake2b
from time import monotonic
from typing import Any, NamedTuple, Self

import msgspec

from ... import _observe
from ..._engine._async.channel import AsyncPoolChannel
from ..._engine._sync.channel import PoolChannel
from ..._observe import shown
from ..._ops.op import Flow, Op, do, pause
from ..._settings import refuse_pickle
from ...config import Seconds, require_seconds
from ...errors import (
    ConfigError,
    ConflictError,
    InvalidKeyError,
    OperationTimeoutError,
    PgkvError,
    QueryError,
    RateLimitedError,
    StoreUnavailableError,
    TableNotFoundError,
)
from .local import Counter, Denials, LimiterCounts, Pockets
from .options import OnError, check_lease, check_mode, check_name, wait_seconds
from .policy import Decision, Policy, require_cost
from .rate import NS, Rate, Rates, rates_of
from .sql import Arrival, Charge, Limit

KEY_CHARACTERS_MAX = 256  # a longer key is hashed: a client may choose it
POLICIES_MAX = 1024  # per-call limits remembered with what is computed for them
CLOSED_RETRY_SECONDS = 1.0  # what a refusal for want of an answer asks for
# What `on_error` is about. A wrong argument or a missing right is no outage.
OUTAGES = (
    StoreUnavailableError,
    OperationTimeoutError,
    QueryError,
    ConflictError,
    TableNotFoundError,
)


class Receipt(NamedTuple):
    """What a reservation was given, enough to give it back."""

    row: bytes
    created_at: bytes
    incs: Sequence[int]
    tats: Sequence[int]


class Core:
    """What a limiter is told, and its flows."""

    _is_async: bool  # by the class that drives

    def _begin(
        self,
        store: Any,
        rates: Rates,
        name: str,
        on_error: OnError,
        timeout: Seconds,
        local_deny: bool,
        lease: int,
    ) -> None:
        self.name: str = check_name(name)
        self.rates: tuple[Rate, ...] = rates_of(rates)
        self.on_error: OnError = check_mode(on_error)
        self.timeout: float = require_seconds("timeout", timeout)
        self._policy = Policy(name, self.rates)
        self._lease = check_lease(lease, self._policy.burst)
        self._denials = Denials() if local_deny else None
        self._pockets = Pockets() if lease > 1 else None
        self._counter = Counter()
        self._policies: dict[tuple[Rate, ...], Policy] = {self.rates: self._policy}
        # Escaped, so that no name and key make the row of another name and key.
        safe = "".join(f"%{ord(c):02x}" if c in "%:~#" else c for c in name)
        self._prefix = f"pgkv:rate:{safe}"
        self._attach(store)

    def _attach(self, store: Any) -> None:
        channel = store._channel
        self._store = store
        self._sql = Limit(store._config, store._sql.prefix)
        self._execute = store._execute
        # Limiters at home in one place can be charged by one statement.
        self._home = getattr(channel, "_conn", channel)
        self._bound = not isinstance(channel, PoolChannel | AsyncPoolChannel)
        if self._bound:
            # What a transaction sees may be rolled back: nothing local may be learnt from it; and
            # a failed statement has failed the transaction, so that admitting would be a lie.
            self._denials = self._pockets = None
            self.on_error = "raise"
            # Waiting for another transaction's charge must not cost the caller its connection.
            self.timeout = store._config.operation_timeout

    def _using(self, conn: Any) -> Self:
        view = type(self).__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._attach(self._store.using(conn))
        return view

    @shown
    def __repr__(self) -> str:
        return f"{self.name!r} {'; '.join(map(str, self.rates))}"

    __reduce__ = refuse_pickle

    @property
    def counts(self) -> LimiterCounts:
        """How many hits this process's limiter allowed, denied, and decided without the store."""
        return self._counter.snapshot()

    # -- what a call is about

    def _policy_of(self, limits: Rates | None) -> Policy:
        if limits is None:
            return self._policy
        rates = rates_of(limits)
        policy = self._policies.get(rates)
        if policy is None:
            policy = Policy(self.name, rates)
            if len(self._policies) < POLICIES_MAX:
                self._policies[rates] = policy
        return policy

    def _row(self, key: str, policy: Policy) -> bytes:
        if not isinstance(key, str):
            raise InvalidKeyError(f"a key must be a str, not {type(key).__name__}")
        if not key:
            raise InvalidKeyError("the key is empty")
        mark = ":"
        if len(key) > KEY_CHARACTERS_MAX:
            key = blake2b(key.encode(errors="surrogatepass"), digest_size=24).hexdigest()
            mark = "#:"  # so that no short key can be written that meets a hashed one
        return self._sql.key(f"{self._prefix}{policy.fingerprint}{mark}{key}")

    # -- one key

    def _hit(
        self, key: str, cost: int, limits: Rates | None, on_error: OnError | None = None
    ) -> Flow[Decision]:
        policy = self._policy if limits is None else self._policy_of(limits)
        row = self._row(key, policy)
        charge = policy.charge(cost)
        known = None
        if self._denials is not None:
            known = self._denials.find(row, policy, cost)
        if known is None and self._pockets is not None:
            known = self._pockets.spend(row, policy, cost)
        if known is not None:
            return self._settled(key, known)
        sent = monotonic()
        try:
            if self._pockets is not None:
                decision = yield from self._hit_leasing(row, policy, cost)
            else:
                arrival: Arrival = yield self._sql.hit(row, charge)
                if not arrival.charged and arrival.stepped_back():
                    arrival = yield from self._rebased(row, arrival, charge)
                decision = policy.decide(arrival, cost)
        except OUTAGES as error:
            return self._settled(key, self._degraded(policy, error, on_error))
        if self._denials is not None and not decision.allowed:
            self._denials.remember(row, policy, cost, sent, decision)
        return self._settled(key, decision)

    def _charge(self, row: bytes, charge: Charge) -> Flow[Arrival]:
        arrival = yield from do(self._sql.hit(row, charge))
        if arrival.stepped_back():
            arrival = yield from self._rebased(row, arrival, charge)
        return arrival

    def _rebased(self, row: bytes, arrival: Arrival, charge: Charge) -> Flow[Arrival]:
        """The server's clock was set back, and the debt is dated in its future: let it count from
        now, and ask again. Inside the hit this cannot be done, for a denial writes nothing."""
        _observe.warning("pgkv.limit.clock_back", limiter=self.name)
        yield self._sql.rebase(row, arrival.version or b"", len(charge.incs))
        return (yield from do(self._sql.hit(row, charge)))

    def _hit_leasing(self, row: bytes, policy: Policy, cost: int) -> Flow[Decision]:
        pockets = self._pockets
        assert pockets is not None
        tokens = min(self._lease, policy.burst)
        if cost < tokens and pockets.begin(row):
            try:
                sent = monotonic()
                arrival = yield from self._charge(row, policy.charge(tokens))
                if arrival.charged:
                    decision = policy.decide(arrival, cost)
                    left = tokens - cost
                    pockets.fill(row, policy, left, sent, decision)
                    return msgspec.structs.replace(decision, remaining=decision.remaining + left)
                if any(policy.waits(arrival, cost)):
                    return policy.decide(arrival, cost)
            finally:
                pockets.end(row)
        arrival = yield from self._charge(row, policy.charge(cost))
        return policy.decide(arrival, cost)

    def _peek(self, key: str, cost: int, limits: Rates | None) -> Flow[Decision]:
        policy = self._policy_of(limits)
        op = self._sql.peek(self._row(key, policy), len(policy.rates))
        policy.charge(cost)
        try:
            arrival = yield from do(op)
        except OUTAGES as error:
            return self._degraded(policy, error, None)
        return policy.decide(arrival, cost, allowed=not any(policy.waits(arrival, cost)))

    def _reset(self, key: str, limits: Rates | None) -> Flow[bool]:
        row = self._row(key, self._policy_of(limits))
        return (yield from self._undo(row, self._sql.reset(row)))

    def _refund(self, key: str, cost: int, limits: Rates | None) -> Flow[bool]:
        policy = self._policy_of(limits)
        row = self._row(key, policy)
        return (yield from self._undo(row, self._sql.refund(row, policy.refund(cost))))

    def _undo(self, row: bytes, op: Op[bool]) -> Flow[bool]:
        try:
            return (yield from do(op))
        finally:
            if self._denials is not None:
                self._denials.forget(row)
            if self._pockets is not None and op.statement.name == "limit_reset":
                self._pockets.forget(row)

    # -- waiting

    def _reserve(
        self,
        key: str,
        cost: int,
        max_wait: Seconds | None,
        limits: Rates | None,
        waits_by: str = "max_wait",
    ) -> Flow[tuple[Decision, float, Receipt | None]]:
        policy = self._policy_of(limits)
        row = self._row(key, policy)
        wait = wait_seconds(max_wait, waits_by)
        charge = policy.charge(cost, round(wait * NS))
        try:
            arrival = yield from self._charge(row, charge)
        except OUTAGES as error:
            decision = self._settled(key, self._degraded(policy, error, None))
            if not decision.allowed:
                raise self._refusal(decision) from error
            return decision, 0.0, None
        decision = self._settled(key, policy.decide(arrival, cost))
        if not decision.allowed:
            raise self._refusal(decision)
        caps = policy.charge(cost).caps
        delay = max(
            0, *(tat - cap - arrival.now for tat, cap in zip(arrival.tats, caps, strict=True))
        )
        receipt = Receipt(row, arrival.stamp or b"", charge.incs, arrival.tats)
        return decision, delay / NS, receipt

    def _cancel(self, receipt: Receipt) -> Flow[bool]:
        return (yield from self._undo(receipt.row, self._sql.cancel(*receipt)))

    def _acquire(
        self, key: str, cost: int, timeout: Seconds | None, limits: Rates | None
    ) -> Flow[Decision]:
        decision, delay, receipt = yield from self._reserve(key, cost, timeout, limits, "timeout")
        if delay > 0:
            try:
                yield from pause(delay)
            except BaseException:
                # Cancelled or interrupted while waiting: the place goes to whoever comes next.
                if receipt is not None:
                    try:
                        yield from self._cancel(receipt)
                    except PgkvError:
                        pass  # the caller is to see why it ended; the tokens flow back by themselves
                raise
        return decision

    # -- outcomes

    def _degraded(self, policy: Policy, error: PgkvError, mode: OnError | None) -> Decision:
        mode = self.on_error if mode is None or self._bound else mode
        if mode == "raise":
            raise error
        if self._counter.warning_is_due(monotonic()):
            _observe.warning(
                "pgkv.limit.degraded",
                limiter=self.name,
                on_error=mode,
                error=type(error).__name__,
                degraded=self._counter.degraded + 1,
            )
        return policy.degraded(allowed=mode == "open", retry_after=CLOSED_RETRY_SECONDS)

    def _settled(self, key: str, decision: Decision) -> Decision:
        """Count it and log it."""
        counter = self._counter
        counter.add(decision)
        if not decision.allowed:
            _observe.debug("pgkv.limit.denied", limiter=self.name, key=key)
        if counter.report_is_due(monotonic()):
            counts = counter.snapshot()
            _observe.info(
                "pgkv.limit.counts",
                limiter=self.name,
                allowed=counts.allowed,
                denied=counts.denied,
                degraded=counts.degraded,
            )
        return decision

    def _refusal(self, decision: Decision) -> RateLimitedError:
        return refusal(self.name, decision)

    def _check_limit(self, key: object, cost: object) -> None:
        if not isinstance(key, str) and not callable(key):
            raise ConfigError(
                "limit() needs a key: a str, or a function of the call's arguments, not "
                f"{type(key).__name__}"
            )
        if not callable(cost):
            require_cost(cost)

    def _refuse_function(self, fn: Callable[..., Any]) -> None:
        """Refuse to decorate what this colour cannot wait for."""
        name = getattr(fn, "__qualname__", type(fn).__name__)
        if not callable(fn):
            raise TypeError(
                f"limit() decorates a function, not {name}; write "
                f"@limiter.limit(key=...) with the parentheses"
            )
        is_async = inspect.iscoroutinefunction(fn)
        if is_async is self._is_async and not inspect.isasyncgenfunction(fn):
            return
        raise ConfigError(
            f"{type(self).__name__}.limit cannot decorate {name}: "
            + (
                "an async function needs an AsyncRateLimiter; this one would block its event loop"
                if is_async
                else "a function that is not async cannot await; it needs a RateLimiter"
                if self._is_async
                else "an async generator is not called once but many times; call hit() inside"
            )
        )


def refusal(name: str, decision: Decision) -> RateLimitedError:
    """The exception for a denial."""
    error = RateLimitedError(
        f"the rate limit {name!r} could not be checked, and its on_error is 'closed'"
        if decision.degraded
        else f"the rate limit {name!r} ({decision.rate}) refuses this call; the same one would be "
        f"allowed in {decision.retry_after:.3f} s"
    )
    error.decision = decision
    return error
