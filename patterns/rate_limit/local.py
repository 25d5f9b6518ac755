"""What one process knows about keys without asking: recent denials, and tokens taken in advance.

Both are bounded, both forget by the local monotonic clock, and neither ever talks to the store.
How far this may stray from the exact bucket is said in docs/rate-limiter.md and tested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import msgspec

from ..._fork import new_lock, survives_fork
from .policy import Decision, Policy

ENTRIES_MAX = 10_000  # keys remembered per limiter and kind; the longest unused goes first
DENY_SECONDS_MAX = 1.0  # a reset or a refund made elsewhere acts within this time
REPORT_SECONDS = 60.0  # counts are logged at most so often
WARN_SECONDS = 10.0  # an outage is logged at most so often


@dataclass(frozen=True, slots=True)
class LimiterCounts:
    """How often a limiter decided what, in this process, since it was made.

    Attributes:
        allowed: admitted, also when only because ``on_error="open"``.
        denied: refused, also locally, and when only because ``on_error="closed"``.
        degraded: decided by `on_error`, because the store could not be asked.
    """

    allowed: int = 0
    denied: int = 0
    degraded: int = 0


class Counter:
    """Counts decisions. One lock: ``+= 1`` alone loses counts between threads."""

    def __init__(self) -> None:
        self._lock = new_lock(self)
        self.allowed = self.denied = self.degraded = 0
        self._reported = monotonic()
        self._warned = -WARN_SECONDS

    def add(self, decision: Decision, count: int = 1) -> None:
        """Count a decision."""
        with self._lock:
            if decision.allowed:
                self.allowed += count
            else:
                self.denied += count
            if decision.degraded:
                self.degraded += count

    def snapshot(self) -> LimiterCounts:
        """The counts so far."""
        with self._lock:
            return LimiterCounts(self.allowed, self.denied, self.degraded)

    def report_is_due(self, now: float) -> bool:
        """Whether the counts are to be logged; true once per interval."""
        if now - self._reported < REPORT_SECONDS:
            return False
        self._reported = now
        return True

    def warning_is_due(self, now: float) -> bool:
        """Whether an outage is to be logged; true once per interval."""
        if now - self._warned < WARN_SECONDS:
            return False
        self._warned = now
        return True


class _Remembered:
    """Entries by row, the longest unused dropped first; forgotten in a forked child: parent and
    child must not both spend the tokens.

    A signal handler may be inside as well. An entry is therefore taken out while it is changed.
    """

    def __init__(self) -> None:
        self.lock = new_lock(self, "lock")
        self._entries: OrderedDict[bytes, tuple[Policy, int, float, Decision]] = OrderedDict()
        survives_fork(self)

    def after_fork(self) -> None:
        """Forget everything."""
        self._entries.clear()


class Denials(_Remembered):
    """Keys that the server denied a moment ago (``local_deny=True``).

    A hit is refused locally if it costs at least what was denied, under the same rates, until the
    denial's ``retry_after`` or `DENY_SECONDS_MAX` has passed since that hit was *sent*: an arrival
    time moves back only by reset and refund.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self._clock = clock

    def find(self, row: bytes, policy: Policy, cost: int) -> Decision | None:
        """The denial that still holds for such a hit, its times moved on; None without one."""
        entry = self._entries.get(row)
        if entry is None:
            return None
        known, denied_cost, sent, decision = entry
        if known is not policy or cost < denied_cost:
            return None
        elapsed = self._clock() - sent
        if elapsed >= min(decision.retry_after, DENY_SECONDS_MAX):
            self.forget(row)
            return None
        return msgspec.structs.replace(
            decision,
            retry_after=decision.retry_after - elapsed,
            reset_after=max(0.0, decision.reset_after - elapsed),
        )

    def remember(
        self, row: bytes, policy: Policy, cost: int, sent: float, decision: Decision
    ) -> None:
        """Note a denial of the server's."""
        with self.lock:
            self._entries.pop(row, None)
            self._entries[row] = (policy, cost, sent, decision)
            if len(self._entries) > ENTRIES_MAX:
                self._entries.popitem(last=False)

    def forget(self, row: bytes) -> None:
        """Ask the server again about that row."""
        with self.lock:
            self._entries.pop(row, None)


class Pockets(_Remembered):
    """Tokens charged in advance (``lease=N``), spent without a query.

    A pocket ends when the bucket would be full again: from then on its tokens are worth nothing,
    because the bucket has them. While one caller fetches tokens for a key, others of this process
    hit one by one, so that a process never holds more than N - 1 unspent.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._fetching: set[bytes] = set()

    def after_fork(self) -> None:
        """Forget everything: the tokens are the parent's, and its fetches end there."""
        super().after_fork()
        self._fetching.clear()

    def spend(self, row: bytes, policy: Policy, cost: int) -> Decision | None:
        """Take tokens from the pocket; None if it has not enough."""
        with self.lock:
            entry = self._entries.pop(row, None)
            if entry is None:
                return None
            known, tokens, until, decision = entry
            left = until - self._clock()
            if left <= 0 or known is not policy:
                return None
            if tokens != cost:
                rest = tokens if tokens < cost else tokens - cost
                self._entries[row] = (known, rest, until, decision)
            if tokens < cost:
                return None
        return msgspec.structs.replace(
            decision,
            remaining=min(decision.limit, decision.remaining + tokens - cost),
            reset_after=left,
        )

    def begin(self, row: bytes) -> bool:
        """Whether the caller may fetch tokens for that row: nobody else does, and none are left."""
        with self.lock:
            if row in self._fetching or row in self._entries:
                return False
            self._fetching.add(row)
            return True

    def end(self, row: bytes) -> None:
        """The fetch has ended."""
        with self.lock:
            self._fetching.discard(row)

    def fill(
        self, row: bytes, policy: Policy, tokens: int, sent: float, decision: Decision
    ) -> None:
        """Put fetched tokens into the pocket. Counted from sending, it ends no later than the row."""
        with self.lock:
            self._entries[row] = (policy, tokens, sent + decision.reset_after, decision)
            if len(self._entries) > ENTRIES_MAX:
                self._entries.popitem(last=False)

    def forget(self, row: bytes) -> None:
        """Give up the tokens of that row."""
        with self.lock:
            self._entries.pop(row, None)
