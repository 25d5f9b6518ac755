"""Rates and decisions: the limiter's arithmetic, all of it in integers of nanoseconds.

Nothing here waits, locks or asks a server. A bucket is full at its theoretical arrival time (TAT);
a hit of some cost moves that time by ``ceil(cost x period / count)`` and is admitted while it stays
within ``burst x period / count`` of now (GCRA, ITU-T I.371). Each number is computed from cost,
period and count, never from a rounded interval, and rounded against the caller, by less than 1 ns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from .._sql.limit import Arrival
from ..errors import ConfigError, InvalidValueError

if TYPE_CHECKING:
    from ..config import Seconds

NS = 1_000_000_000
COUNT_PER_SECOND_MAX = 1_000_000  # beyond it a token is shorter than the server clock's tick
DEBT_MAX = 100 * 366 * 86400 * NS  # an arrival time must fit 64 bits: until the year 2262
RATES_MAX = 16  # rates of one limiter: each is a term of its statement
TICK = 999  # nanoseconds that the server's clock, read in microseconds, may lag behind
HeaderStyle: TypeAlias = Literal["draft", "x"]

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_UNIT_NAMES = {
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), "m"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("d", "day", "days"), "d"),
    **dict.fromkeys(("w", "week", "weeks"), "w"),
}
_RATE = re.compile(
    r"(\d+) *(?:/|per) *(\d+(?:\.\d+)?)? *([a-z]+)(?:[ ,]+burst *=? *(\d+))?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Rate:
    """So many tokens per period, and so many at once.

    A bucket holds at most `burst` tokens and fills evenly, `count` of them per `period`. Over any
    time span ``t`` at most ``burst + t x count / period`` are handed out. **Without `burst` it is
    count, so a key that was idle may use up to twice the count in its first period**: take
    ``burst=1`` for even spacing, or a smaller count.

    Args:
        count: tokens per period, 1 or more, up to a million per second.
        period: seconds, or a timedelta; kept as float seconds.
        burst: what a full bucket holds; count if left out.

    Raises:
        ConfigError: says which number cannot be, and why.
    """

    count: int
    period: Seconds = 1.0
    burst: int = None  # type: ignore[assignment]  # left out it becomes `count`: never None afterwards

    def __post_init__(self) -> None:
        period = _period_seconds(self.period)
        object.__setattr__(self, "period", period)
        _require_count("count", self.count)
        _default(self, "burst", self.count)
        _require_count("burst", self.burst)
        period_ns = round(period * NS)
        if self.count * NS > COUNT_PER_SECOND_MAX * period_ns:
            raise ConfigError(
                f"the rate {self} is above {COUNT_PER_SECOND_MAX:,} per second: a token would be "
                "shorter than a tick of the server's clock"
            )
        if self.burst * period_ns > DEBT_MAX * self.count:
            raise ConfigError(
                f"the rate {self} takes more than 100 years to fill its bucket: the arrival time "
                "would not fit 64 bits; make burst smaller or the period shorter"
            )

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read ``"100/minute"``, ``"5 per 10 s"``, ``"10/s burst 20"``.

        Units: ms, s, m, h, d, w, and their usual names in full.

        Raises:
            ConfigError: the text is no rate; says what one looks like.
        """
        match = _match(text)
        unit = _UNIT_NAMES.get(match[3].lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(
                f"{text!r} is not a rate; write '100/minute', '5 per 10 seconds' or "
                "'10/s burst 20' (units: ms, s, m, h, d, w)"
            )
        period = float(match[2] or 1) * _UNITS[unit]
        count = int(match[1])
        return cls(count, period, count if match[4] is None else int(match[4]))

    def __str__(self) -> str:
        """The rate as `parse` reads it."""
        unit = next((unit for unit, length in _UNITS.items() if length == self.period), None)
        per = unit or f"{self.period:.9g}s"
        return f"{self.count}/{per}" + ("" if self.burst == self.count else f" burst {self.burst}")


def _default(rate: Rate, name: str, value: int) -> None:
    if getattr(rate, name) is None:
        object.__setattr__(rate, name, value)


def _period_seconds(period: object) -> float:
    seconds = period.total_seconds() if isinstance(period, timedelta) else period
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e10:
        raise ConfigError(f"period must be more than 0 seconds, not {period!r}")
    return float(seconds)


def _match(text: object) -> re.Match[str] | None:
    return _RATE.fullmatch(text.strip()) if isinstance(text, str) else None


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of 1 or more, not {value!r}")


Rates: TypeAlias = "str | Rate | Iterable[Rate | str]"


def rates_of(given: Rates) -> tuple[Rate, ...]:
    """Return what was given as rates, sorted by (period, count, burst).

    Raises:
        ConfigError: none, too many, or one of them twice.
    """
    if isinstance(given, str):
        return _parse_all(given)
    if isinstance(given, Rate):
        return (given,)
    try:
        items = list(given)
    except TypeError:
        raise ConfigError(f"rates are a str, a Rate or several of them, not {given!r}") from None
    return _sorted([each if isinstance(each, Rate) else Rate.parse(each) for each in items])


@lru_cache(maxsize=1024)
def _parse_all(text: str) -> tuple[Rate, ...]:
    return _sorted([Rate.parse(part) for part in text.split(";") if part.strip()])


def _sorted(rates: list[Rate]) -> tuple[Rate, ...]:
    if not 1 <= len(rates) <= RATES_MAX:
        raise ConfigError(f"a limiter has 1 to {RATES_MAX} rates, not {len(rates)}")
    if len(set(rates)) < len(rates):
        raise ConfigError("the same rate is given twice")
    return tuple(sorted(rates, key=lambda rate: (rate.period, rate.count, rate.burst)))


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a limiter decided. True when the hit is allowed.

    Of several rates it tells of the one with the least share remaining; of a denial, the one that
    asks for the longest wait.

    Attributes:
        allowed: the hit was charged; a refused one costs nothing.
        limit: the burst of `rate`: what a full bucket holds.
        remaining: tokens left in that bucket.
        retry_after: seconds until the same hit would be allowed; 0.0 when it was.
        reset_after: seconds until the bucket is full.
        rate: which rate that is.
        degraded: the store could not be asked; `on_error` decided.
        policy: the name under which the headers speak of `rate`.
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

    def headers(self, style: HeaderStyle = "draft") -> dict[str, str]:
        """The response headers that tell a client where it stands.

        Args:
            style: ``"draft"`` for ``RateLimit-Policy`` and ``RateLimit`` of
                draft-ietf-httpapi-ratelimit-headers-10; ``"x"`` for ``X-RateLimit-Limit``,
                ``-Remaining`` and ``-Reset`` (in seconds from now). A denial adds ``Retry-After``,
                whole seconds, rounded up. Of a degraded decision that is all there is to say.

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
                # Of a denial `t` is when to come again: Retry-After must not be earlier than it.
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
    # Up, but not for the dust of a float.
    return -int(-(seconds - 1e-7) // 1) if seconds > 0 else 0


class Gauge:
    """One rate in nanoseconds."""

    __slots__ = ("burst", "cap", "count", "name", "period", "rate")

    def __init__(self, rate: Rate, name: str) -> None:
        self.rate = rate
        self.name = name
        self.count = rate.count
        self.burst = rate.burst
        self.period = round(float(rate.period) * NS)  # type: ignore[arg-type]  # made float
        self.cap = self.burst * self.period // self.count

    def inc(self, cost: int) -> int:
        """How far a hit moves the arrival time."""
        return -(-cost * self.period // self.count)

    def amount(self, cost: int) -> int:
        """How far a refund moves it back."""
        return cost * self.period // self.count

    def remaining(self, used: int) -> int:
        """How many tokens are left `used` nanoseconds before the bucket is full."""
        if used <= 0:
            return self.burst
        # A hit is rounded up by less than 1 ns. Without the tick, which will have passed before
        # anybody can ask again, the third of "3 at 7/s" would be denied a nanosecond too early.
        left = (self.cap - used + TICK) * self.count // self.period
        return min(max(left, 0), self.burst)

    def header(self) -> str:
        """The rate as ``RateLimit-Policy`` lists it."""
        window = -(-self.burst * self.period // (self.count * NS))
        return f'"{self.name}";q={self.burst};w={window}'


class Policy:
    """The rates under which one hit is judged, with what is computed once for them.

    Args:
        name: the limiter's.
        rates: sorted, as `rates_of` returns them.
    """

    def __init__(self, name: str, rates: tuple[Rate, ...]) -> None:
        self.rates = rates
        names = [name] if len(rates) == 1 else [f"{name} {rate}" for rate in rates]
        self.gauges = [Gauge(*pair) for pair in zip(rates, names, strict=True)]
        self.burst = min(rate.burst for rate in rates)
        self.header = ",".join(gauge.header() for gauge in self.gauges)
        # With one rate an arrival time keeps its meaning when the rate changes, so that a new plan
        # takes effect at once. Several share a row by position: other rates, another row.
        text = ";".join(f"{rate.count},{rate.period!r},{rate.burst}" for rate in rates)
        digest = blake2b(text.encode(), digest_size=6).hexdigest()
        self.fingerprint = "" if len(rates) == 1 else f"~{digest}"
        self._one = self._charge(1, 0)

    def charge(self, cost: int, wait: int = 0) -> tuple[list[int], list[int]]:
        """Return what a hit adds to each arrival time, and how far ahead of now each may be.

        Args:
            cost: tokens.
            wait: nanoseconds that the caller is ready to wait.

        Raises:
            InvalidValueError: a cost that no bucket can ever hold, or no cost at all.
        """
        return (
            self._one if cost == 1 and type(cost) is int and not wait else self._charge(cost, wait)
        )

    def _charge(self, cost: int, wait: int) -> tuple[list[int], list[int]]:
        require_cost(cost)
        if cost > self.burst:
            raise InvalidValueError(
                f"a cost of {cost} can never be admitted: a full bucket holds {self.burst} "
                "(the burst); raise the burst or split the work"
            )
        incs = [gauge.inc(cost) for gauge in self.gauges]
        # At cost = burst the rounded-up cost may be 1 ns above the rounded-down cap: such a hit
        # needs a bucket that is entirely full, and then passes.
        caps = [
            min(max(gauge.cap, inc) + wait, DEBT_MAX)
            for gauge, inc in zip(self.gauges, incs, strict=True)
        ]
        return incs, caps

    def refund(self, cost: int) -> list[int]:
        """Return what a refund takes off each arrival time."""
        require_cost(cost)
        return [min(gauge.amount(cost), DEBT_MAX) for gauge in self.gauges]

    def waits(self, arrival: Arrival, cost: int) -> list[int]:
        """Return the nanoseconds until each rate would admit a hit, in whole ticks; 0 is now."""
        incs, caps = self.charge(cost)
        return [
            max(0, -(-(tat + inc - cap - arrival.now) // 1000) * 1000)
            for tat, inc, cap in zip(arrival.tats, incs, caps, strict=True)
        ]

    def decide(self, arrival: Arrival, cost: int, *, allowed: bool | None = None) -> Decision:
        """Put the server's answer into words.

        Args:
            arrival: what the server said.
            cost: what was asked for.
            allowed: instead of whether the hit was charged.
        """
        if allowed is None:
            allowed = arrival.charged
        now, tats = arrival.now, arrival.tats
        gauges = self.gauges
        wait = 0
        if allowed:
            place = 0 if len(gauges) == 1 else self._tightest(now, tats, range(len(gauges)))
        else:
            waits = self.waits(arrival, cost)
            wait = max(waits)
            longest = [n for n, each in enumerate(waits) if each == wait]
            place = longest[0] if len(longest) == 1 else self._tightest(now, tats, longest)
            # After races only: there was a token at the time of the answer. Not at once, then.
            wait = wait or gauges[place].inc(1)
        gauge = gauges[place]
        used = tats[place] - now
        return Decision(
            allowed,
            gauge.burst,
            gauge.remaining(used),
            wait / NS,
            used / NS,
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
        """The decision for want of an answer."""
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
    """Refuse a cost that is no number of tokens.

    Raises:
        InvalidValueError: not an integer of 1 or more.
    """
    if not isinstance(cost, int) or isinstance(cost, bool) or cost < 1:
        raise InvalidValueError(f"cost must be an integer of 1 or more, not {cost!r}")
