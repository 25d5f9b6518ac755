"""A circuit breaker: after repeated failures a store is left alone for a while, so that an outage
costs no stall per call. It counts; who asks it decides what a failure is. `Misses` asks it for a
store with ``on_error="miss"``."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from .. import _observe
from .._fork import new_lock
from .._ops.op import Statement
from ..errors import OperationTimeoutError, PoolTimeoutError, StoreUnavailableError

FAILURES_MAX = 5  # in a row, until it opens
LOG_AGAIN = 60.0  # seconds between two warnings of misses
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


class Misses:
    """Operations that are answered without the server, because it is away: those whose statement
    says what is `missed` then."""

    def __init__(self) -> None:
        self.breaker: Breaker = Breaker()
        self._count = 0  # since the last warning; a lost update is harmless
        self._log_at = 0.0

    def hold(self, statement: Statement[Any], *, probes: bool = True) -> bool:
        """Whether to answer at once, and not to ask the server. A caller that only passes the
        operation on is no probe."""
        breaker = self.breaker
        if statement.missed is None or (breaker.allows() if probes else not breaker.is_open):
            return False
        self._note(statement, "open circuit")
        return True

    def excuse(self, statement: Statement[Any], error: BaseException) -> bool:
        """Whether a failure is a miss. A mistake is none: a closed store, a refused login."""
        if statement.missed is None or not isinstance(
            error, StoreUnavailableError | OperationTimeoutError
        ):
            return False
        if isinstance(error, StoreUnavailableError) and not (
            error.retryable or isinstance(error, PoolTimeoutError)
        ):
            return False
        self.breaker.failed()
        self._note(statement, type(error).__name__)
        return True

    def _note(self, statement: Statement[Any], reason: str) -> None:
        self._count += 1
        now = monotonic()
        if now >= self._log_at:
            count, self._count, self._log_at = self._count, 0, now + LOG_AGAIN
            _observe.warning(
                "pgkv.store.missed", operation=statement.name, reason=reason, missed=count
            )
