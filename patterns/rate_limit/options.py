"""What a limiter can be told besides its rates: checked when it is made or called."""

from __future__ import annotations

from typing import Literal, TypeAlias

from ..._ops.codec import waiting
from ...config import Seconds
from ...errors import ConfigError

OnError: TypeAlias = Literal["raise", "open", "closed"]
MODES: tuple[OnError, ...] = ("raise", "closed", "open")  # the strictest first
WAIT_SECONDS_MAX = 10 * 366 * 86400.0  # acquire(timeout=None)


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


def wait_seconds(value: Seconds | None, name: str) -> float:
    """Return how long a caller is ready to wait, in seconds; without end is a long time.

    Raises:
        InvalidValueError: negative, or no number.
    """
    longest = waiting(value, name)
    return WAIT_SECONDS_MAX if longest is None else min(longest, WAIT_SECONDS_MAX)
