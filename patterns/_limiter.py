"""The rate limiter's algorithms, each written once as a flow for both colours.

`Core` holds what a limiter is told and remembers; its underscored methods are flows that
`rate_limit` drives, blocking or awaiting. Statements live in `_sql.limit`, arithmetic in `_rate`,
what a process remembers in `_local`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from time import monotonic
from typing import Any, Literal, NamedTuple, Self, TypeAlias, TypeVar

import msgspec

from .. import _observe
from .._aio_channel import AsyncPoolChannel
from .._channel import PoolChannel
from .._codec import seconds
from .._op import Flow, Op, do, pause
from .._sql.limit import Arrival, Limit
from ..config import Seconds
from ..errors import (
    ConfigError,
    ConflictError,
    InvalidKeyError,
    InvalidValueError,
    OperationTimeoutError,
    PgkvError,
    QueryError,
    RateLimitedError,
    StoreUnavailableError,
    TableNotFoundError,
)
from ._local import Counter, Denials, LimiterCounts, Pockets
from ._rate import NS, Decision, Policy, Rate, Rates, rates_of, require_cost

OnError: TypeAlias = Literal["raise", "open", "closed"]
MODES: tuple[OnError, ...] = ("raise", "closed", "open")  # the strictest first

KEY_CHARACTERS_MAX = 256  # a longer key is hashed: a client may choose it
POLICIES_MAX = 1024  # per-call limits remembered with what is computed for them
CLOSED_RETRY_SECONDS = 1.0  # what a refusal for want of an answer asks for
WAIT_SECONDS_MAX = 10 * 366 * 86400.0  # acquire(timeout=None)
RACES_MAX = 10  # hit_many on absent keys: each race ends with the row being there
# What `on_error` is about. A wrong argument or a missing right is no outage.
OUTAGES = (
    StoreUnavailableError,
    OperationTimeoutError,
    QueryError,
    ConflictError,
    TableNotFoundError,
)

L = TypeVar("L", bound="Core")


class Receipt(NamedTuple):
    """What a reservation was given, enough to give it back."""

    row: bytes
    created_at: bytes
    incs: Sequence[int]
    tats: Sequence[int]


class Core:
    """What a limiter is told, and its flows."""

    _colour = ""  # "sync" or "async", by the class that drives
    _store_type: type[Any]
    _other_name = ""

    def __init__(
        self,
        store: Any,
        rates: Rates,
        *,
        name: str,
        on_error: OnError = "raise",
        timeout: Seconds = 0.25,
        local_deny: bool = False,
        lease: int = 1,
    ) -> None:
        if not isinstance(store, self._store_type):
            raise ConfigError(
                f"{type(self).__name__} takes a pgkv.{self._store_type.__name__}, not "
                f"{type(store).__name__}; the other colour is {self._other_name}"
            )
        self.name = check_name(name)
        self.rates = rates_of(rates)
        self.on_error = check_mode(on_error)
        self.timeout = seconds(timeout, "timeout")
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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {'; '.join(map(str, self.rates))}>"

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
                arrival: Arrival = yield self._sql.hit(row, *charge)
                if not arrival.charged and arrival.stepped_back():
                    arrival = yield from self._rebased(row, arrival, charge)
                decision = policy.decide(arrival, cost)
        except OUTAGES as error:
            return self._settled(key, self._degraded(policy, error, on_error))
        if self._denials is not None and not decision.allowed:
            self._denials.remember(row, policy, cost, sent, decision)
        return self._settled(key, decision)

    def _charge(self, row: bytes, charge: tuple[list[int], list[int]]) -> Flow[Arrival]:
        arrival = yield from do(self._sql.hit(row, *charge))
        if arrival.stepped_back():
            arrival = yield from self._rebased(row, arrival, charge)
        return arrival

    def _rebased(
        self, row: bytes, arrival: Arrival, charge: tuple[list[int], list[int]]
    ) -> Flow[Arrival]:
        """The server's clock was set back, and the debt is dated in its future: let it count from
        now, and ask again. Inside the hit this cannot be done, for a denial writes nothing."""
        _observe.warning("pgkv.limit.clock_back", limiter=self.name)
        yield self._sql.rebase(row, arrival.version or b"", len(charge[0]))
        return (yield from do(self._sql.hit(row, *charge)))

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
        self, key: str, cost: int, max_wait: Seconds | None, limits: Rates | None
    ) -> Flow[tuple[Decision, float, Receipt | None]]:
        policy = self._policy_of(limits)
        row = self._row(key, policy)
        wait = wait_seconds(max_wait)
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
        caps = policy.charge(cost)[1]
        delay = max(
            0, *(tat - cap - arrival.now for tat, cap in zip(arrival.tats, caps, strict=True))
        )
        receipt = Receipt(row, arrival.stamp or b"", charge[0], arrival.tats)
        return decision, delay / NS, receipt

    def _cancel(self, receipt: Receipt) -> Flow[bool]:
        return (yield from self._undo(receipt.row, self._sql.cancel(*receipt)))

    def _acquire(
        self, key: str, cost: int, timeout: Seconds | None, limits: Rates | None
    ) -> Flow[Decision]:
        decision, delay, receipt = yield from self._reserve(key, cost, timeout, limits)
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

    def _refuse_function(self, fn: Callable[..., Any]) -> None:
        """Refuse to decorate what this colour cannot wait for."""
        is_async = inspect.iscoroutinefunction(fn)
        if is_async == (self._colour == "async") and not inspect.isasyncgenfunction(fn):
            return
        name = getattr(fn, "__qualname__", repr(fn))
        raise ConfigError(
            f"{type(self).__name__}.limit cannot decorate {name}: "
            + (
                "an async function needs an AsyncRateLimiter; this one would block its event loop"
                if is_async
                else "a function that is not async cannot await; it needs a RateLimiter"
                if self._colour == "async"
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


def check_mode(mode: object) -> OnError:
    """Return a mode of `on_error`.

    Raises:
        ConfigError: there is no such mode.
    """
    for known in MODES:
        if mode == known:
            return known
    raise ConfigError(f"on_error must be 'raise', 'open' or 'closed', not {mode!r}")


def check_name(name: object) -> str:
    """Return a limiter's name.

    Raises:
        ConfigError: it could not stand in a response header.
    """
    if not isinstance(name, str) or not name or not name.isascii() or not name.isprintable():
        raise ConfigError(
            "name must be a non-empty string of printable ASCII characters: it stands in response "
            f"headers; not {name!r}"
        )
    if '"' in name or "\\" in name:
        raise ConfigError(f"name must not contain quotes or backslashes, not {name!r}")
    return name


def check_lease(lease: object, burst: int) -> int:
    """Return how many tokens are taken at once.

    Raises:
        ConfigError: no such lease could ever be granted.
    """
    if not isinstance(lease, int) or isinstance(lease, bool) or lease < 1:
        raise ConfigError(f"lease must be an integer of 1 or more, not {lease!r}")
    if lease > burst:
        raise ConfigError(
            f"lease={lease} is more than a full bucket holds ({burst}, the burst); no such lease "
            "could be granted"
        )
    return lease


def wait_seconds(value: Seconds | None) -> float:
    """Return how long a caller is ready to wait, in seconds; None is without end.

    Raises:
        InvalidValueError: negative, or no number.
    """
    if value is None:
        return WAIT_SECONDS_MAX
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    if isinstance(value, float) and math.isinf(value) and value > 0:
        return WAIT_SECONDS_MAX
    return min(seconds(value, "timeout"), WAIT_SECONDS_MAX)


# -- several keys --------------------------------------------------------------------------


class Charge(NamedTuple):
    """What hit_many asks of one row: by whom, under which rates, how much."""

    limiter: Core
    key: str
    policy: Policy
    cost: int


def charges_of(items: Iterable[tuple[Any, ...]], wanted: type[L]) -> dict[bytes, Charge]:
    """Return what is to be charged, by row, in the order of keys.

    Raises:
        ConfigError: a limiter is of the other colour or on another table, or two with one name
            have different rates.
        InvalidValueError: a cost that no bucket can hold.
    """
    charges: dict[bytes, Charge] = {}
    first: Core | None = None
    for limiter, key, *rest in items:
        if not isinstance(limiter, wanted):
            raise ConfigError(
                f"hit_many of {wanted.__name__} takes (limiter, key, cost) with limiters of that "
                f"class, not {type(limiter).__name__}"
            )
        first = first or limiter
        if limiter._home is not first._home or limiter._sql.table != first._sql.table:
            raise ConfigError(
                f"the limiters {first.name!r} and {limiter.name!r} are on different stores or "
                "tables: one statement cannot charge both"
            )
        cost = rest[0] if rest else 1
        require_cost(cost)
        policy = limiter._policy
        row = limiter._row(key, policy)
        if (known := charges.get(row)) is not None:
            if known.policy.rates != policy.rates:
                raise ConfigError(
                    f"two limiters are named {limiter.name!r} and have different rates; "
                    "give them different names"
                )
            cost += known.cost
        charges[row] = Charge(limiter, key, policy, cost)
    if first is None:
        raise InvalidValueError("hit_many needs at least one (limiter, key, cost)")
    return dict(sorted(charges.items()))


def hit_many(charges: dict[bytes, Charge]) -> Flow[Decision]:
    """Charge every row, or none of them."""
    limiters = [charge.limiter for charge in charges.values()]
    first = limiters[0]
    asked = [(row, *charge.policy.charge(charge.cost)) for row, charge in charges.items()]
    try:
        arrivals = yield from _ask_many(first._sql, asked)
        stale = [(row, arrival) for row, arrival in arrivals.items() if arrival.stepped_back()]
        if stale:
            _observe.warning("pgkv.limit.clock_back", limiter=first.name)
            for row, arrival in stale:
                rates = len(charges[row].policy.rates)
                yield first._sql.rebase(row, arrival.version or b"", rates)
            arrivals = yield from _ask_many(first._sql, asked)
    except OUTAGES as error:
        strictest = min((limiter.on_error for limiter in limiters), key=MODES.index)
        decision = first._degraded(charges[asked[0][0]].policy, error, strictest)
    else:
        decision = _decide_many(charges, arrivals)
    policies = ",".join(dict.fromkeys(charge.policy.header for charge in charges.values()))
    decision = msgspec.structs.replace(decision, policies=policies)
    for charge in charges.values():
        charge.limiter._settled(charge.key, decision)
    return decision


def _ask_many(
    sql: Limit, asked: Sequence[tuple[bytes, Sequence[int], Sequence[int]]]
) -> Flow[dict[bytes, Arrival]]:
    for attempt in range(RACES_MAX):
        try:
            return (yield from do(sql.hit_many(asked)))
        except InvalidValueError as error:
            # Somebody else made one of the rows meanwhile: it is there now.
            if error._sqlstate != "23505" or attempt == RACES_MAX - 1:
                raise
    raise AssertionError("unreachable")


def _decide_many(charges: dict[bytes, Charge], arrivals: dict[bytes, Arrival]) -> Decision:
    decisions = []
    for row, charge in charges.items():
        arrival = arrivals[row]
        if arrival.charged or any(charge.policy.waits(arrival, charge.cost)):
            decisions.append(charge.policy.decide(arrival, charge.cost))
    if not decisions:  # lost a race only: a denial whose data would admit by now
        row, charge = next(iter(charges.items()))
        decisions.append(charge.policy.decide(arrivals[row], charge.cost))
    if decisions[0].allowed:
        return min(decisions, key=lambda each: each.remaining / each.limit)
    return max(decisions, key=lambda each: each.retry_after)
