"""hit_many: several keys of several limiters, charged all or none by one statement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from ... import _observe
from ..._ops.op import Flow, do
from ...errors import ConfigError, InvalidValueError
from .flows import OUTAGES, Core
from .options import MODES
from .policy import Decision, Policy, require_cost
from .sql import Arrival, Charge, Limit

L = TypeVar("L", bound=Core)

RACES_MAX = 10  # on absent keys: each race ends with the row being there


class Asked(NamedTuple):
    """What hit_many asks of one row: by whom, under which rates, how much."""

    limiter: Core
    key: str
    policy: Policy
    cost: int


def charges_of(items: Iterable[tuple[Any, ...]], wanted: type[L]) -> dict[bytes, Asked]:
    """Return what is to be charged, by row, in the order of keys.

    Raises:
        ConfigError: a limiter is of the other colour or on another table, or two with one name
            have different rates.
        InvalidValueError: a cost that no bucket can hold.
    """
    charges: dict[bytes, Asked] = {}
    first: Core | None = None
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
        charges[row] = Asked(limiter, key, policy, cost)
    if first is None:
        raise InvalidValueError("hit_many needs at least one (limiter, key, cost)")
    return dict(sorted(charges.items()))


def _not_charges(given: object) -> InvalidValueError:
    return InvalidValueError(
        f"hit_many takes an iterable of (limiter, key, cost), not {type(given).__name__}"
        + (f" of {len(given)}" if isinstance(given, tuple) else "")
    )


def hit_many(charges: dict[bytes, Asked]) -> Flow[Decision]:
    """Charge every row, or none of them."""
    limiters = [charge.limiter for charge in charges.values()]
    first = limiters[0]
    asked = [(row, charge.policy.charge(charge.cost)) for row, charge in charges.items()]
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


def _ask_many(sql: Limit, asked: Sequence[tuple[bytes, Charge]]) -> Flow[dict[bytes, Arrival]]:
    for attempt in range(RACES_MAX):
        try:
            return (yield from do(sql.hit_many(asked)))
        except InvalidValueError as error:
            # Somebody else made one of the rows meanwhile: it is there now.
            if error._sqlstate != "23505" or attempt == RACES_MAX - 1:
                raise
    raise AssertionError("unreachable")


def _decide_many(charges: dict[bytes, Asked], arrivals: dict[bytes, Arrival]) -> Decision:
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
