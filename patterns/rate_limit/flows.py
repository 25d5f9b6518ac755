"""The rate limiter's operations, each written once as a flow for sync and async.

`LimiterFlows` holds the settings and the memory of one limiter; `api` runs its flows. Statements
are in `sql`, arithmetic in `policy`, the memory of one process in `local`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

from ... import _observe
from ..._engine._async.transaction import AsyncBoundChannel
from ..._engine._sync.transaction import BoundChannel
from ..._ops.codec import waiting
from ..._ops.op import Flow, Op, Param, Statement, call, do, pause
from ...config import Seconds, require_seconds
from ...errors import (
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
from .._runtime import switch as _switch
from .local import ENTRIES_MAX, Counter, DenyCache, PrepaidTokens
from .policy import Decision, Policy, require_cost
from .rate import NS, Rate, Rates, rates_of
from .sql import (
    KEPT_SECONDS,
    KEY_CHARACTERS_MAX,
    ROWS,
    Arrival,
    Charge,
    LimiterStatements,
    Shape,
    hashed,
)

L = TypeVar("L")

OnError: TypeAlias = Literal["raise", "open", "closed"]
MODES: tuple[OnError, ...] = ("raise", "closed", "open")  # the strictest first

POLICIES_MAX = 1024  # per-call limits that are kept, each with its policy
CLOSED_RETRY_SECONDS = 1.0  # the retry_after of a refusal by on_error="closed"
WAIT_SECONDS_MAX = 10 * 366 * 86400.0  # acquire(timeout=None)
ROUND_TRIP_SECONDS = 0.05  # of an answer, which acquire's timeout does not include
STATEMENT_SECONDS_MIN = 0.05  # what a further statement of a call gets when the time is used up
RACES_MAX = 10  # attempts that other callers' changes of a row may spoil
# What `on_error` is about. A wrong argument or a missing right is no outage.
OUTAGES = (
    StoreUnavailableError,
    OperationTimeoutError,
    QueryError,
    ConflictError,
    TableNotFoundError,
)
# SQLSTATEs of a statement that cannot succeed on that table, however often it is tried.
MISTAKES = ("42703", "42804", "42883", "0A")


class Receipt(NamedTuple):
    """What a reservation was charged, enough to give it back. It belongs to one process."""

    pid: int
    row: bytes
    created_at: bytes
    incs: Sequence[int]
    tats: Sequence[int]
    shape: Shape


class Reserved(NamedTuple):
    """The outcome of a reservation. There is no receipt when `on_error` admitted it."""

    decision: Decision
    delay: float
    receipt: Receipt | None


class Usual:
    """What mostly decides the next hit of a key, `LimiterStatements.charge` or `refusal`, until its
    row may be gone."""

    __slots__ = ("params", "refused", "row", "statement", "until")

    def __init__(self, op: Op[Arrival | None], row: bytes, refused: bool, until: float) -> None:
        self.statement: Statement[Arrival | None] = op.statement
        self.params: Sequence[Param] = op.params
        self.row: bytes = row
        self.refused: bool = refused
        self.until: float = until


class LimiterFlows:
    """The settings and the memory of one limiter (see `RateLimiter`), and its operations as flows."""

    def __init__(
        self,
        store: Any,
        rates: Rates,
        name: str,
        on_error: OnError,
        timeout: Seconds,
        local_deny: bool,
        prefetch: int,
    ) -> None:
        self.name: str = check_name(name)
        self.rates: tuple[Rate, ...] = rates_of(rates)
        self.on_error: OnError = check_mode(on_error)
        self.timeout: float = require_seconds("timeout", timeout)
        self.policy: Policy = Policy(name, self.rates)
        self._one_token: Charge = self.policy.charge(1)
        self.prefetch: int = _check_prefetch(prefetch, self.policy.burst)
        self.denied: DenyCache | None = DenyCache() if local_deny else None
        self.prepaid: PrepaidTokens | None = PrepaidTokens() if prefetch > 1 else None
        self.counter: Counter = Counter()
        _observe.limiters[self.counter] = name
        # Mere hints: until when no sweep takes a row; below 0 where its last hit was refused. Numbers,
        # since the garbage collector would look through ten thousand tuples.
        self._lately: dict[bytes, float] = {}
        self._policies: dict[tuple[Rate, ...], Policy] = {self.rates: self.policy}
        # Escaped, so that no name and key make the row of another name and key.
        safe = "".join(f"%{ord(c):02x}" if c in "%:~#" else c for c in name)
        self._prefix = ROWS + safe
        self._attach(store)

    def _attach(self, store: Any) -> None:
        channel = store._bare
        self.sql: LimiterStatements = LimiterStatements(store._config, store._sql.prefix)
        self._execute = store._execute
        # Limiters with the same home can be charged by one statement.
        self._home = getattr(channel, "_conn", channel)
        self.is_bound: bool = isinstance(channel, BoundChannel | AsyncBoundChannel)
        # Likewise of keys charged with one token: their next hit runs no flow while nothing changes.
        self.usual: dict[str, Usual] = {}
        if self.is_bound:
            # What a transaction sees may be rolled back, so nothing local may be learnt from it;
            # and a failed statement has failed the transaction, so that it cannot admit.
            self.denied = self.prepaid = None
            self.on_error = "raise"
            # Waiting for another transaction's charge must not cost the caller its connection.
            self.timeout = store._config.operation_timeout

    def inside(self, store: Any) -> LimiterFlows:
        twin = object.__new__(LimiterFlows)
        twin.__dict__.update(self.__dict__)
        twin._attach(store)
        return twin

    def facts(self) -> str:
        return f"{self.name!r} {'; '.join(map(str, self.rates))}"

    # -- the rates and the row of a call

    def policy_of(self, limits: Rates | None) -> Policy:
        """Return the policy of a call: that of its own limits, or the limiter's."""
        if limits is None:
            return self.policy
        rates = rates_of(limits)
        policy = self._policies.get(rates)
        if policy is None:
            policy = Policy(self.name, rates)
            if len(self._policies) < POLICIES_MAX:
                self._policies[rates] = policy
        return policy

    def row(self, key: str, policy: Policy) -> bytes:
        """Check a key, and return the encoded key of the bucket's row."""
        if not isinstance(key, str):
            raise InvalidKeyError(f"a key must be a str, not {type(key).__name__}")
        if not key:
            raise InvalidKeyError("the key is empty")
        part = f":{key}" if len(key) <= KEY_CHARACTERS_MAX else hashed(key)
        return self.sql.key(f"{self._prefix}{policy.fingerprint}{part}")

    # -- one key

    def hit(
        self, key: str, cost: int, limits: Rates | None, on_error: OnError | None = None
    ) -> Flow[Decision]:
        """Charge the key, or refuse. `on_error` is used instead of the limiter's own."""
        policy = self.policy if limits is None else self.policy_of(limits)
        row = self.row(key, policy)
        charge = policy.charge(cost)
        if _switch.off:
            return policy.degraded(allowed=True, retry_after=0.0)
        known = None
        if self.denied is not None:
            known = self.denied.find(row, policy, cost)
        if known is None and self.prepaid is not None:
            known = self.prepaid.spend(row, policy, cost)
        if known is not None:
            return self._settled(key, known)
        sent = monotonic()
        try:
            if self.prepaid is not None:
                decision = yield from self._hit_prefetching(row, policy, cost, sent)
            else:
                known_row, refused = row in self._lately, self._expected(row, sent)
                ask = self.sql.hit if refused is None else self._likely(refused)
                arrival: Arrival | None = yield ask(row, charge)
                if arrival is None or (not arrival.charged and arrival.stepped_back()):
                    arrival = yield from self._decided(row, arrival, refused, charge, sent)
                self._note(row, arrival, sent)
                decision = policy.decide(arrival, cost)
                plain = charge is self._one_token and self.denied is None and not self.is_bound
                if known_row and plain:  # most clients of an open service come once
                    self._remember(key, row, charge)
        except OUTAGES as error:
            return self.outage(key, error, policy, on_error)
        if self.denied is not None and not decision.allowed:
            self.denied.remember(row, policy, cost, sent, decision)
        return self._settled(key, decision)

    def _remember(self, key: str, row: bytes, charge: Charge) -> None:
        known = self._lately.get(row)
        if known is None:
            return  # another thread has made room meanwhile
        if len(self.usual) >= ENTRIES_MAX:
            self.usual.clear()
        refused = known < 0
        self.usual[key] = Usual(self._likely(refused)(row, charge), row, refused, abs(known))

    def usual_of(self, key: str, began: float) -> Usual | None:
        """What the next hit of a key sends first, as far as that is known."""
        try:
            usual = self.usual.get(key)
        except TypeError:  # no str: `hit` refuses it
            return None
        return None if usual is None or usual.until < began or _switch.off else usual

    def decided(
        self, key: str, usual: Usual, arrival: Arrival | None, began: float
    ) -> Decision | None:
        """The decision of a hit that sent what is usual; None where `go_on` has to."""
        if arrival is not None and not (usual.refused and arrival.stepped_back()):
            decision = self._settled(key, self.policy.decide(arrival, 1))
            usual.until = began + decision.reset_after + KEPT_SECONDS
            return decision
        return None

    def go_on(
        self, key: str, usual: Usual, arrival: Arrival | None, began: float
    ) -> Flow[Decision]:
        """The rest of a hit that began with what is usual, which did not decide it."""
        charge = self._one_token
        try:
            arrival = yield from self._decided(usual.row, arrival, usual.refused, charge, began)
        except OUTAGES as error:
            return self.outage(key, error)
        self._note(usual.row, arrival, began)
        self._remember(key, usual.row, charge)
        return self._settled(key, self.policy.decide(arrival, 1))

    def outage(
        self,
        key: str,
        error: PgkvError,
        policy: Policy | None = None,
        on_error: OnError | None = None,
    ) -> Decision:
        """What `on_error` decides; or raise the error."""
        return self._settled(key, self._degraded(policy or self.policy, error, on_error))

    def _again(self, op: Op[Any], started: float) -> Flow[Any]:
        """Perform another statement of a call, within the time the call has left."""
        left = started + self.timeout - monotonic()
        return (yield from call(self._execute, op, max(left, STATEMENT_SECONDS_MIN)))

    def _charge(self, row: bytes, charge: Charge, started: float) -> Flow[Arrival]:
        refused = self._expected(row, started)
        arrival: Arrival | None = yield self._likely(refused)(row, charge)
        arrival = yield from self._decided(row, arrival, refused, charge, started)
        self._note(row, arrival, started)
        return arrival

    def _expected(self, row: bytes, now: float) -> bool | None:
        """Whether a hit of a row is likely to be refused; None where the row may be gone."""
        until = self._lately.get(row, 0.0)
        return until < 0 if abs(until) > now else None

    def _note(self, row: bytes, arrival: Arrival, started: float) -> None:
        if len(self._lately) >= ENTRIES_MAX:
            self._lately.clear()
        filling = (max(arrival.tats) - arrival.now) / NS
        until = started + filling + KEPT_SECONDS
        self._lately[row] = until if arrival.charged else -until

    def _likely(self, refused: bool | None) -> Callable[[bytes, Charge], Op[Any]]:
        """The statement that probably decides a hit, from what became of the last one of its key."""
        sql = self.sql
        return sql.hit if refused is None else sql.refusal if refused else sql.charge

    def _decided(
        self,
        row: bytes,
        arrival: Arrival | None,
        refused: bool | None,
        charge: Charge,
        started: float,
    ) -> Flow[Arrival]:
        """Decide a hit of which the first statement, sent for `refused`, may have said nothing."""
        if arrival is None and refused:
            arrival = yield from self._again(self.sql.charge(row, charge), started)
        if arrival is None:
            arrival = yield from self._again(self.sql.hit(row, charge), started)
        if arrival.stepped_back():
            arrival = yield from self._rebased(row, arrival, charge, started)
        return arrival

    def _rebased(
        self, row: bytes, arrival: Arrival, charge: Charge, started: float
    ) -> Flow[Arrival]:
        """The server's clock was set back, so that the debt lies in its future: let it count from
        now, and ask again. The hit itself cannot do this: a denial writes nothing."""
        self._report_step_back()
        for _ in range(RACES_MAX):
            op = self.sql.rebase(row, arrival.version or b"", charge.shape)
            yield from self._again(op, started)
            arrival = yield from self._again(self.sql.hit(row, charge), started)
            if not arrival.stepped_back():
                break  # otherwise another caller changed the row before it was rebased
        return arrival

    def _report_step_back(self) -> None:
        if rows := self.counter.steps_back.due(monotonic()):
            _observe.warning("pgkv.limit.clock_back", limiter=self.name, rows=rows)

    def _hit_prefetching(
        self, row: bytes, policy: Policy, cost: int, started: float
    ) -> Flow[Decision]:
        prepaid = self.prepaid
        assert prepaid is not None
        tokens = min(self.prefetch, policy.burst)
        if cost < tokens and prepaid.begin(row):
            try:
                arrival = yield from self._charge(row, policy.charge(tokens), started)
                if arrival.charged:
                    decision = policy.decide(arrival, cost)
                    left = tokens - cost
                    prepaid.fill(row, policy, left, started, decision)
                    return msgspec.structs.replace(decision, remaining=decision.remaining + left)
                if any(policy.waits(arrival, cost)):
                    return policy.decide(arrival, cost)
            finally:
                prepaid.end(row)
            arrival = yield from self._again(self.sql.hit(row, policy.charge(cost)), started)
            return policy.decide(arrival, cost)
        arrival = yield from self._charge(row, policy.charge(cost), started)
        return policy.decide(arrival, cost)

    def peek(self, key: str, cost: int, limits: Rates | None) -> Flow[Decision]:
        policy = self.policy_of(limits)
        op = self.sql.peek(self.row(key, policy), policy.shape)
        policy.charge(cost)
        if _switch.off:
            return policy.degraded(allowed=True, retry_after=0.0)
        try:
            arrival = yield from do(op)
        except OUTAGES as error:
            return self._degraded(policy, error, None)
        return policy.decide(arrival, cost, allowed=not any(policy.waits(arrival, cost)))

    def reset(self, key: str, limits: Rates | None) -> Flow[bool]:
        row = self.row(key, self.policy_of(limits))
        try:
            return (yield from self._undo(row, self.sql.reset(row)))
        finally:
            if self.prepaid is not None:
                self.prepaid.forget(row)

    def refund(self, key: str, cost: int, limits: Rates | None) -> Flow[bool]:
        policy = self.policy_of(limits)
        row = self.row(key, policy)
        return (yield from self._undo(row, self.sql.refund(row, policy.refund(cost), policy.shape)))

    def _undo(self, row: bytes, op: Op[bool]) -> Flow[bool]:
        if _switch.off:
            return False
        try:
            return (yield from do(op))
        finally:
            if self.denied is not None:
                self.denied.forget(row)

    # -- waiting

    def reserve(
        self, key: str, cost: int, max_wait: Seconds | None, limits: Rates | None, name: str
    ) -> Flow[Reserved]:
        """Take a place in the queue. `name` is what the caller's API calls `max_wait`."""
        policy = self.policy_of(limits)
        row = self.row(key, policy)
        charge = policy.charge(cost, round(_wait_seconds(max_wait, name) * NS))
        if _switch.off:
            return Reserved(policy.degraded(allowed=True, retry_after=0.0), 0.0, None)
        try:
            arrival = yield from self._charge(row, charge, monotonic())
        except OUTAGES as error:
            decision = self.outage(key, error, policy)
            if not decision.allowed:
                raise self.refusal(decision) from error
            return Reserved(decision, 0.0, None)
        decision = self._settled(key, policy.decide(arrival, cost))
        if not decision.allowed:
            raise self.refusal(decision)
        caps = policy.charge(cost).caps
        delay = max(
            0, *(tat - cap - arrival.now for tat, cap in zip(arrival.tats, caps, strict=True))
        )
        receipt = Receipt(
            os.getpid(), row, arrival.stamp or b"", charge.incs, arrival.made, charge.shape
        )
        return Reserved(decision, delay / NS, receipt)

    def cancel(self, receipt: Receipt) -> Flow[bool]:
        """Give a reservation back. In a forked child it belongs to the parent."""
        pid, row, created_at, incs, tats, shape = receipt
        if pid != os.getpid():
            return False
        return (yield from self._undo(row, self.sql.cancel(row, created_at, incs, tats, shape)))

    def acquire(
        self, key: str, cost: int, timeout: Seconds | None, limits: Rates | None, waiter: Any
    ) -> Flow[Decision]:
        """Reserve, and sleep until the turn has come. `waiter` is the limiter: `_take_place` runs a
        reservation, `_give_back` takes its receipt."""
        until = monotonic() + _wait_seconds(timeout, "timeout")
        left = timeout
        reserved: Reserved | None = None
        while reserved is None:
            flow = self.reserve(key, cost, left, limits, "timeout")
            try:
                reserved = yield from call(waiter._take_place, flow)
            except RateLimitedError as error:
                # A window has no places in advance: ask again when the next one begins.
                wait = error.decision.retry_after
                waits = self.policy_of(limits).has_quotas and not error.decision.degraded
                if not waits or monotonic() + wait > until:
                    raise
                yield from pause(wait)
                left = max(0.0, until - monotonic())
        decision, delay, receipt = reserved
        if receipt is None or delay <= 0:
            return decision
        try:
            if monotonic() + delay > until + ROUND_TRIP_SECONDS:
                # The answer came so late that it is already this call's turn.
                late = msgspec.structs.replace(decision, allowed=False, retry_after=delay)
                raise self.refusal(late)
            yield from pause(delay)
        except GeneratorExit:
            raise
        except BaseException:
            # Refused, cancelled or interrupted: the next caller gets the place.
            yield from call(waiter._give_back, receipt)
            raise
        return decision

    # -- outcomes

    def _degraded(self, policy: Policy, error: PgkvError, mode: OnError | None) -> Decision:
        mode = self.on_error if mode is None or self.is_bound else mode
        if mode == "raise" or error._sqlstate.startswith(MISTAKES):
            raise error
        if self.counter.outages.due(monotonic()):
            _observe.warning(
                "pgkv.limit.degraded",
                limiter=self.name,
                on_error=mode,
                error=type(error).__name__,
                degraded=self.counter.snapshot().degraded + 1,
            )
        return policy.degraded(allowed=mode == "open", retry_after=CLOSED_RETRY_SECONDS)

    def _settled(self, key: str, decision: Decision) -> Decision:
        """Count a decision and log it."""
        counter = self.counter
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

    def refusal(self, decision: Decision) -> RateLimitedError:
        error = RateLimitedError(
            f"the rate limit {self.name!r} could not be checked, and its on_error is 'closed'"
            if decision.degraded
            else f"the rate limit {self.name!r} ({decision.rate}) refuses this call; it would be "
            f"allowed in {decision.retry_after:.3f} s"
        )
        error.decision = decision
        return error


# -- several keys --------------------------------------------------------------------------


class KeyCharge(NamedTuple):
    limiter: LimiterFlows
    key: str
    policy: Policy
    cost: int


def charges_of(
    items: Iterable[tuple[Any, ...]], wanted: type[L]
) -> tuple[L, dict[bytes, KeyCharge]]:
    """Check what `hit_many` is given; return a limiter to run it, and the charge of each row, in key order."""
    charges: dict[bytes, KeyCharge] = {}
    runner: L | None = None
    first: LimiterFlows | None = None
    if not hasattr(items, "__iter__"):
        raise _not_charges(items)
    for item in items:
        try:
            limiter, key, *rest = item
        except (TypeError, ValueError):
            raise _not_charges(item) from None
        if len(rest) > 1:
            raise _not_charges(item)
        if not isinstance(limiter, wanted):
            raise ConfigError(
                f"hit_many of {wanted.__name__} takes (limiter, key, cost) with limiters of that "
                f"class, not {type(limiter).__name__}"
            )
        flows: LimiterFlows = item[0]._flows
        runner, first = runner or limiter, first or flows
        if flows._home is not first._home or flows.sql.table != first.sql.table:
            raise ConfigError(
                f"the limiters {first.name!r} and {flows.name!r} are on different stores or "
                "tables: one statement cannot charge both"
            )
        cost = rest[0] if rest else 1
        require_cost(cost)
        policy = flows.policy
        row = flows.row(key, policy)
        if (known := charges.get(row)) is not None:
            if known.policy.rates != policy.rates:
                raise ConfigError(
                    f"two limiters are named {flows.name!r} and have different rates; "
                    "give them different names"
                )
            cost += known.cost
        charges[row] = KeyCharge(flows, key, policy, cost)
    if first is not None and (shards := getattr(first.sql.config, "shards", None)) is not None:
        shards.require_one(charges, "hit_many is")
    if runner is None:
        raise InvalidValueError("hit_many needs at least one (limiter, key, cost)")
    return runner, dict(sorted(charges.items()))


def _not_charges(given: object) -> InvalidValueError:
    return InvalidValueError(
        f"hit_many takes an iterable of (limiter, key, cost), not {type(given).__name__}"
        + (f" of {len(given)}" if isinstance(given, tuple) else "")
    )


def hit_many(charges: dict[bytes, KeyCharge]) -> Flow[Decision]:
    limiters = [charge.limiter for charge in charges.values()]
    first = limiters[0]
    asked = [(row, charge.policy.charge(charge.cost)) for row, charge in charges.items()]
    if _switch.off:
        return charges[asked[0][0]].policy.degraded(allowed=True, retry_after=0.0)
    started = monotonic()
    try:
        arrivals = yield from _charge_many(first, asked, started)
        for _ in range(RACES_MAX):
            stale = [(row, arrival) for row, arrival in arrivals.items() if arrival.stepped_back()]
            if not stale:
                break
            first._report_step_back()
            for row, arrival in stale:
                shape = charges[row].policy.shape
                op = first.sql.rebase(row, arrival.version or b"", shape)
                yield from first._again(op, started)
            arrivals = yield from _charge_many(first, asked, started)
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


def _charge_many(
    limiter: LimiterFlows, asked: Sequence[tuple[bytes, Charge]], started: float
) -> Flow[dict[bytes, Arrival]]:
    for attempt in range(RACES_MAX):
        try:
            return (yield from limiter._again(limiter.sql.hit_many(asked), started))  # type: ignore[no-any-return]  # by row
        except InvalidValueError as error:
            # Another caller inserted one of the rows meanwhile: it exists now, if not in the snapshot
            # of a caller's REPEATABLE READ transaction.
            if error._sqlstate != "23505":
                raise
            if attempt == RACES_MAX - 1:
                raise ConflictError(
                    "hit_many: another transaction made one of the buckets meanwhile, and this one's "
                    "snapshot does not show it; repeat the transaction"
                ) from error
    raise AssertionError("unreachable")


def _decide_many(charges: dict[bytes, KeyCharge], arrivals: dict[bytes, Arrival]) -> Decision:
    decisions = []
    for row, charge in charges.items():
        arrival = arrivals[row]
        if arrival.charged or any(charge.policy.waits(arrival, charge.cost)):
            decisions.append(charge.policy.decide(arrival, charge.cost))
    if not decisions:  # it only lost a race: a denial with data that would admit by now
        row, charge = next(iter(charges.items()))
        decisions.append(charge.policy.decide(arrivals[row], charge.cost))
    if decisions[0].allowed:
        return min(decisions, key=lambda each: each.remaining / each.limit)
    return max(decisions, key=lambda each: each.retry_after)


# -- checks --------------------------------------------------------------------------------


def check_mode(mode: object) -> OnError:
    for known in MODES:
        if mode == known:
            return known
    raise ConfigError(f"on_error must be 'raise', 'open' or 'closed', not {mode!r}")


def check_name(name: object) -> str:
    """Return a limiter's name, which response headers must be able to contain."""
    if not isinstance(name, str) or not name or not name.isascii() or not name.isprintable():
        raise ConfigError(
            "name must be a non-empty string of printable ASCII characters, because response "
            f"headers contain it; not {name!r}"
        )
    if '"' in name or "\\" in name:
        raise ConfigError(f"name must not contain quotes or backslashes, not {name!r}")
    return name


def check_limit(key: object, cost: object) -> None:
    if not isinstance(key, str) and not callable(key):
        raise ConfigError(
            "limit() needs a key: a str, or a function of the call's arguments, not "
            f"{type(key).__name__}"
        )
    if not callable(cost):
        require_cost(cost)


def _check_prefetch(prefetch: object, burst: int) -> int:
    if not isinstance(prefetch, int) or isinstance(prefetch, bool) or prefetch < 1:
        raise ConfigError(f"prefetch must be an integer of 1 or more, not {prefetch!r}")
    if prefetch > burst:
        raise ConfigError(
            f"prefetch={prefetch} is more than a full bucket holds ({burst}, the burst): that many "
            "tokens can never be taken at once"
        )
    return prefetch


def _wait_seconds(value: Seconds | None, name: str) -> float:
    longest = waiting(value, name)
    return WAIT_SECONDS_MAX if longest is None else min(longest, WAIT_SECONDS_MAX)
