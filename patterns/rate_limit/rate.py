"""Rates: parsing and validation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import TypeAlias
from zoneinfo import ZoneInfo, available_timezones

from ...config import Seconds  # at run time too: decoding a Rate reads its annotations
from ...errors import ConfigError

NS = 1_000_000_000
COUNT_PER_SECOND_MAX = 1_000_000  # beyond it a token is shorter than the server clock's tick
DEBT_MAX = 100 * 366 * 86400 * NS  # an arrival time must fit 64 bits: until the year 2262
RATES_MAX = 16  # rates of one limiter: each is a term of its statement

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
# Calendar windows: a year is 365.2425 days, for what sorts and describes them.
WINDOWS = {
    "minute": 60.0, "hour": 3600.0, "day": 86400.0, "week": 604800.0,
    "month": 2629746.0, "quarter": 7889238.0, "year": 31556952.0,
}  # fmt: skip
_ALWAYS_FIXED = ("month", "quarter", "year")  # no bucket has such a period
_QUOTA = re.compile(
    r"(\d+) *(?:/|per) *([a-z]+)(?: +(fixed))?(?: +(?!burst)([a-z][\w+/-]*))?", re.IGNORECASE
)
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+/-]{0,63}")


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per period, and the most that can be used at once.

    A bucket holds at most `burst` tokens and fills evenly, `count` of them per `period`. Over any
    time span ``t`` at most ``burst + t x count / period`` are handed out. **Without `burst` it is
    count, so a key that was idle may use up to twice the count in its first period**: take
    ``burst=1`` for even spacing, or a smaller count.

    Args:
        count: tokens per period, 1 or more, up to a million per second.
        period: seconds, or a timedelta; kept as float seconds.
        burst: what a full bucket holds; count if left out.

    Raises:
        ConfigError: a number is out of range; says which and why.
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
        """Return the rate in ``"100/minute"``, ``"5 per 10 s"``, ``"10/s burst 20"``, or the `Quota`
        in ``"1000/month"``, ``"100/day fixed Europe/Berlin"``.

        Args:
            text: count, unit and perhaps a burst; units are ms, s, m, h, d, w, and their usual names
                in full. Of a quota: count, window, ``fixed`` (not needed with month, quarter, year),
                and perhaps a time zone.

        Raises:
            ConfigError: the text is not a rate; shows examples.
        """
        match = _match(_RATE, text)
        unit = _UNIT_NAMES.get(match[3].lower()) if match else None
        if match is None or unit is None:
            if (quota := _match(_QUOTA, text)) is not None:
                name = quota[2].lower().removesuffix("s")
                if name in _ALWAYS_FIXED or (quota[3] and name in WINDOWS):
                    return Quota(int(quota[1]), name, quota[4] or "UTC")
            raise ConfigError(
                f"{text!r} is not a rate; write '100/minute', '5 per 10 seconds' or "
                "'10/s burst 20' (units: ms, s, m, h, d, w), or a calendar window: '1000/month', "
                "'100/day fixed Europe/Berlin'; several are separated by ';'"
            )
        period = float(match[2] or 1) * _UNITS[unit]
        count = int(match[1])
        return cls(count, period, count if match[4] is None else int(match[4]))

    def __str__(self) -> str:
        """The rate as `parse` reads it."""
        unit = next((unit for unit, length in _UNITS.items() if length == self.period), None)
        per = unit or f"{self.period:.9g}s"
        return f"{self.count}/{per}" + ("" if self.burst == self.count else f" burst {self.burst}")


@dataclass(frozen=True, slots=True)
class Quota(Rate):
    """Tokens per calendar window, as a contract counts them: all of them back when the next minute,
    hour, day, week (from Monday), month, quarter or year begins, none before.

    The server's clock and its time zone data decide when that is. **Around a boundary up to twice the
    count are handed out in a short time**: where that matters, combine it with a rate
    (``"10/s; 1000/month"``).

    Args:
        count: tokens per window, 1 or more.
        unit: ``"minute"``, ``"hour"``, ``"day"``, ``"week"``, ``"month"``, ``"quarter"`` or
            ``"year"``.
        timezone: in which the window begins, an IANA name such as ``"Europe/Berlin"``.

    Raises:
        ConfigError: the count or the unit is out of range, or there is no such time zone.
    """

    period: Seconds = field(init=False, default=0.0)
    burst: int = field(init=False, default=0)
    unit: str = "month"
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        if self.unit not in WINDOWS:
            raise ConfigError(f"unit must be one of {', '.join(WINDOWS)}, not {self.unit!r}")
        _require_zone(self.timezone)
        object.__setattr__(self, "period", WINDOWS[self.unit])
        object.__setattr__(self, "burst", self.count)
        Rate.__post_init__(self)

    def __str__(self) -> str:
        """The quota as `Rate.parse` reads it."""
        fixed = "" if self.unit in _ALWAYS_FIXED else " fixed"
        zone = "" if self.timezone == "UTC" else f" {self.timezone}"
        return f"{self.count}/{self.unit}{fixed}{zone}"


def _require_zone(name: object) -> None:
    if isinstance(name, str) and _ZONE.fullmatch(name):
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            if not available_timezones():
                return  # this machine has no time zone data: the server judges
        else:
            return
    raise ConfigError(f"timezone must be an IANA name such as 'Europe/Berlin', not {name!r}")


def _default(rate: Rate, name: str, value: int) -> None:
    if getattr(rate, name) is None:
        object.__setattr__(rate, name, value)


def _period_seconds(period: object) -> float:
    seconds = period.total_seconds() if isinstance(period, timedelta) else period
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e10:
        raise ConfigError(
            f"period must be more than 0 seconds (a number or a timedelta), not {period!r}"
        )
    return float(seconds)


def _match(pattern: re.Pattern[str], text: object) -> re.Match[str] | None:
    return pattern.fullmatch(text.strip()) if isinstance(text, str) else None


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of 1 or more, not {value!r}")


Rates: TypeAlias = str | Rate | Iterable[Rate | str]


def rates_of(given: Rates) -> tuple[Rate, ...]:
    """Return the given rates, sorted by (period, count, burst)."""
    if isinstance(given, str):
        return _parse_all(given)
    if isinstance(given, Rate):
        return (given,)
    try:
        items = list(given)
    except TypeError:
        raise ConfigError(
            f"rates must be a str such as '100/minute', a Rate, or several of them, not {given!r}"
        ) from None
    return _sorted([each if isinstance(each, Rate) else Rate.parse(each) for each in items])


@lru_cache(maxsize=1024)
def _parse_all(text: str) -> tuple[Rate, ...]:
    return _sorted([Rate.parse(part) for part in text.split(";") if part.strip()])


def _sorted(rates: list[Rate]) -> tuple[Rate, ...]:
    if not 1 <= len(rates) <= RATES_MAX:
        raise ConfigError(f"a limiter has 1 to {RATES_MAX} rates, not {len(rates)}")
    if len(set(rates)) < len(rates):
        twice = next(rate for rate in rates if rates.count(rate) > 1)
        raise ConfigError(f"the rate {twice} is given twice")
    return tuple(sorted(rates, key=lambda rate: (rate.period, rate.count, rate.burst, str(rate))))
