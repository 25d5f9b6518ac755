"""A circuit breaker: after repeated failures a store is left alone for a while, so that an outage
costs no stall per call. It counts; who asks it decides what a failure is."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from ..._fork import new_lock

FAILURES_MAX = 5  # in a row, until it opens
PAUSE_FIRST, PAUSE_MAX = 1.0, 30.0  # seconds; doubled after each probe that fails


class Breaker:
    """Closed (calls pass), open (none does), or half open: one call passes and decides.

    Args:
        clock: seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = PAUSE_FIRST
        self._until: float | None = None  # None: closed
        self._lock = new_lock(self)

    @property
    def is_open(self) -> bool:
        """Whether calls are held back now."""
        return self._until is not None and self._clock() < self._until

    def allows(self) -> bool:
        """Whether a call may pass. An open one whose pause is over lets one through per pause."""
        if self._until is None:
            return True
        with self._lock:
            return self._probes()

    def _probes(self) -> bool:
        if self._until is None:  # closed while this call waited for the lock
            return True
        now = self._clock()
        if now < self._until:
            return False
        self._until = now + self._pause
        return True

    def succeeded(self) -> None:
        """The store answered."""
        if self._failures or self._until is not None:
            with self._lock:
                self._failures = 0
                self._pause = PAUSE_FIRST
                self._until = None

    def failed(self) -> bool:
        """The store did not answer. Returns whether this opened the breaker."""
        with self._lock:
            self._failures += 1
            if self._failures < FAILURES_MAX:
                return False
            opened = self._until is None
            if not opened:
                self._pause = min(self._pause * 2, PAUSE_MAX)
            self._until = self._clock() + self._pause
            return opened
