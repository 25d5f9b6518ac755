"""Policies and decisions: the limiter's arithmetic, all of it in integers of nanoseconds.

Nothing here waits, locks or asks a server. A bucket is full at its theoretical arrival time (TAT);
a hit of some cost moves that time by ``ceil(cost x period / count)`` and is admitted while it stays
within ``burst x period / count`` of now (GCRA, ITU-T I.371). Each number is computed from cost,
period and count, never from a rounded interval, and rounded against the caller, by less than 1 ns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal, TypeAlias

import msgspec

from ...errors import ConfigError, InvalidValueError
from .rate import DEBT_MAX, NS, Quota, Rate
from .sql import Arrival, Charge, Shape

TICK = 999  # nanoseconds that the server's clock, read in microseconds, may lag behind
HeaderStyle: TypeAlias = Literal["draft", "x"]


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a limiter decided. True when the hit is allowed.

    With several rates it describes the one with the smallest share of tokens left or, when the hit
    is refused, the one with the longest wait.

    Attributes:
        allowed: the hit was charged; a refused one costs nothing.
        limit: the burst of `rate`: what a full bucket holds; of a quota its count.
        remaining: tokens left in that bucket or window.
        retry_after: seconds until the same hit would be allowed; 0.0 when it was.
        reset_after: seconds until the bucket is full, or the window ends.
        rate: the rate that the fields above describe.
        degraded: the store could not be asked; `on_error` decided.
        policy: the name of `rate` in the headers.
        policies: all rates, as the header ``RateLimit-Policy`` lists them.
    """

    allowed: bool
    limit: int
    remaining: int
    retry_after: float
    reset_after: float
    rate: Rate
    degraded: bool = False
    policy: str = ""
    policies: str = ""

    def __bool__(self) -> bool:
        return self.allowed

    def __repr__(self) -> str:
        # Without the header texts.
        return (
            f"Decision(allowed={self.allowed}, limit={self.limit}, remaining={self.remaining}, "
            f"retry_after={self.retry_after:.6g}, reset_after={self.reset_after:.6g}, "
            f"rate={str(self.rate)!r}, degraded={self.degraded})"
        )

    def headers(self, style: HeaderStyle = "draft") -> dict[str, str]:
        """Return the response headers that tell a client how many tokens it has left.

        Args:
            style: ``"draft"`` for ``RateLimit-Policy`` and ``RateLimit`` of
                draft-ietf-httpapi-ratelimit-headers-10; ``"x"`` for ``X-RateLimit-Limit``,
                ``-Remaining`` and ``-Reset`` (in seconds from now). A denial adds ``Retry-After``,
                whole seconds, rounded up; a degraded decision has no other header.

        Raises:
            ConfigError: there is no such style.
        """
        if style not in ("draft", "x"):
            raise ConfigError(f"headers are 'draft' or 'x', not {style!r}")
        wait = _whole_seconds(self.reset_after if self.allowed else self.retry_after)
        found: dict[str, str] = {}
        if self.degraded:
            pass  # nothing is known of the bucket
        elif style == "draft":
            found = {
                "RateLimit-Policy": self.policies,
                # For a denial `t` is the time to retry: Retry-After must not be earlier.
                "RateLimit": f'"{self.policy}";r={self.remaining};t={wait}',
            }
        else:
            found = {
                "X-RateLimit-Limit": str(self.limit),
                "X-RateLimit-Remaining": str(self.remaining),
                "X-RateLimit-Reset": str(_whole_seconds(self.reset_after)),
            }
        if not self.allowed:
            found["Retry-After"] = str(max(1, wait))
        return found


def _whole_seconds(seconds: float) -> int:
    # Rounds up, but ignores the rounding error of a float.
    return -int(-(seconds - 1e-7) // 1) if seconds > 0 else 0


class Gauge:
    """One rate in nanoseconds."""

    __slots__ = ("burst", "cap", "count", "name", "period", "rate")

    def __init__(self, rate: Rate, name: str) -> None:
        self.rate: Rate = rate
        self.name: str = name
        self.count: int = rate.count
        self.burst: int = rate.burst
        self.period: int = round(float(rate.period) * NS)  # type: ignore[arg-type]  # made float
        self.cap: int = self.burst * self.period // self.count

    def inc(self, cost: int) -> int:
        """How far a hit moves the arrival time."""
        return -(-cost * self.period // self.count)

    def amount(self, cost: int) -> int:
        """How far a refund moves it back."""
        return cost * self.period // self.count

    def limit(self, inc: int, wait: int) -> int:
        """How far ahead of now the arrival time may be after a hit."""
        # At cost = burst the rounded-up cost may be 1 ns above the rounded-down cap: such a hit
        # needs a bucket that is entirely full, and then passes.
        return min(max(self.cap, inc) + wait, DEBT_MAX)

    def remaining(self, used: int) -> int:
        """How many tokens are left `used` nanoseconds before the bucket is full."""
        if used <= 0:
            return self.burst
        # A hit is rounded up by less than 1 ns. Without the tick, which will have passed before
        # the next hit arrives, the third of "3 at 7/s" would be denied a nanosecond too early.
        left = (self.cap - used + TICK) * self.count // self.period
        return min(max(left, 0), self.burst)

    def header(self) -> str:
        """The rate as ``RateLimit-Policy`` lists it."""
        window = -(-self.burst * self.period // (self.count * NS))
        return f'"{self.name}";q={self.burst};w={window}'


class QuotaGauge(Gauge):
    """One calendar window: a token is a nanosecond, counted from the window's beginning."""

    __slots__ = ()

    def inc(self, cost: int) -> int:
        return cost

    amount = inc

    def limit(self, inc: int, wait: int) -> int:  # noqa: ARG002  # no place beyond the window's end
        return self.count

    def remaining(self, used: int) -> int:
        return max(0, self.count - used)


class Policy:
    """The rates that apply to a hit, sorted, with the values that are computed once for them."""

    def __init__(self, name: str, rates: tuple[Rate, ...]) -> None:
        self.rates: tuple[Rate, ...] = rates
        names = [name] if len(rates) == 1 else [f"{name} {rate}" for rate in rates]
        self.gauges: list[Gauge] = [
            (QuotaGauge if isinstance(rate, Quota) else Gauge)(rate, each)
            for rate, each in zip(rates, names, strict=True)
        ]
        windows = tuple(
            f"{rate.unit} {rate.timezone}" if isinstance(rate, Quota) else "" for rate in rates
        )
        self.has_quotas: bool = any(windows)
        self.shape: Shape = windows if self.has_quotas else len(rates)
        self.burst: int = min(rate.burst for rate in rates)
        self.header: str = ",".join(gauge.header() for gauge in self.gauges)
        # With one rate a counter keeps its meaning when the count changes, so that a new plan
        # takes effect at once. Several share a row by position, so other rates need another row.
        text = ";".join(f"{rate.count},{rate.period!r},{rate.burst}" for rate in rates)
        if self.has_quotas:
            text = ";".join(windows) + text * (len(rates) > 1)
        digest = blake2b(text.encode(), digest_size=6).hexdigest()
        plain = len(rates) == 1 and not self.has_quotas
        self.fingerprint: str = "" if plain else f"~{digest}"
        self._one = self._charge(1, 0)

    def charge(self, cost: int, wait: int = 0) -> Charge:
        """Return what a hit adds to each arrival time, and how far ahead of now each may be, for a
        caller that is ready to wait that many nanoseconds."""
        if cost == 1 and type(cost) is int and not wait:
            return self._one
        return self._charge(cost, wait)

    def _charge(self, cost: int, wait: int) -> Charge:
        require_cost(cost)
        if cost > self.burst:
            raise InvalidValueError(
                f"a cost of {cost} can never be admitted: a full bucket holds {self.burst} "
                "(the burst); raise the burst or split the work"
            )
        incs = [gauge.inc(cost) for gauge in self.gauges]
        limits = zip(self.gauges, incs, strict=True)
        return Charge(incs, [gauge.limit(inc, wait) for gauge, inc in limits], self.shape)

    def refund(self, cost: int) -> list[int]:
        """Return the nanoseconds that a refund takes off each arrival time."""
        require_cost(cost)
        return [min(gauge.amount(cost), DEBT_MAX) for gauge in self.gauges]

    def waits(self, arrival: Arrival, cost: int) -> list[int]:
        """Return the nanoseconds until each rate would admit a hit, in whole ticks; 0 is now."""
        charge = self.charge(cost)
        if len(charge.incs) == 1 and not self.has_quotas:
            over = arrival.tats[0] + charge.incs[0] - charge.caps[0] - arrival.now
            return [-(-over // 1000) * 1000] if over > 0 else [0]
        found = [
            max(0, -(-(tat + inc - cap - arrival.now) // 1000) * 1000)
            for tat, inc, cap in zip(arrival.tats, charge.incs, charge.caps, strict=True)
        ]
        for n, end in enumerate(arrival.ends):
            if end and found[n]:  # not before the window's end
                found[n] = end - arrival.now
        return found

    def decide(self, arrival: Arrival, cost: int, *, allowed: bool | None = None) -> Decision:
        """Return the decision that the server's answer means; `allowed` overrides whether it charged."""
        if allowed is None:
            allowed = arrival.charged
        now, tats = arrival.now, arrival.tats
        gauges = self.gauges
        place = wait = 0
        if len(gauges) == 1:
            if not allowed:
                wait = self.waits(arrival, cost)[0]
        elif allowed:
            place = self._tightest(now, tats, range(len(gauges)))
        else:
            waits = self.waits(arrival, cost)
            wait = max(waits)
            longest = [n for n, each in enumerate(waits) if each == wait]
            place = longest[0] if len(longest) == 1 else self._tightest(now, tats, longest)
        gauge = gauges[place]
        if not allowed and not wait:
            wait = gauge.inc(1)  # it lost races, although there was a token: wait for one more
        used = tats[place] - now
        reset = used
        if self.has_quotas and used and arrival.ends[place]:
            reset = arrival.ends[place] - now
        return Decision(
            allowed,
            gauge.burst,
            gauge.remaining(used),
            wait / NS,
            reset / NS,
            gauge.rate,
            False,
            gauge.name,
            self.header,
        )

    def _tightest(self, now: int, tats: Sequence[int], places: Iterable[int]) -> int:
        def share(n: int) -> float:
            return self.gauges[n].remaining(tats[n] - now) / self.gauges[n].burst

        return min(places, key=share)

    def degraded(self, *, allowed: bool, retry_after: float) -> Decision:
        gauge = min(self.gauges, key=lambda each: each.burst)
        return Decision(
            allowed,
            gauge.burst,
            gauge.burst if allowed else 0,
            0.0 if allowed else retry_after,
            0.0,
            gauge.rate,
            True,
            gauge.name,
            self.header,
        )


def require_cost(cost: object) -> None:
    if not isinstance(cost, int) or isinstance(cost, bool) or cost < 1:
        raise InvalidValueError(f"cost must be an integer of 1 or more, not {cost!r}")
