"""What one process knows about keys without asking: recent denials, and tokens charged in advance.

Both are bounded, both forget by the local monotonic clock, and neither talks to the store.
docs/rate-limiter.md states how far this may differ from the exact bucket; tests hold it to that.

A signal handler may hit the limiter that it interrupts, and a thread may fork while another runs
code of this module: counts and denials consist of single operations on containers, which are
atomic, and the lock of the tokens is reentrant and renewed after a fork.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import msgspec

from ..._fork import new_lock, survives_fork
from .policy import Decision, Policy

ENTRIES_MAX = 10_000  # keys remembered per limiter and kind; the longest unused is dropped first
DENY_SECONDS_MAX = 1.0  # a reset or refund made elsewhere takes effect within this time
REPORT_SECONDS = 60.0  # between two reports of the counts
WARN_SECONDS = 10.0  # between two log lines of one kind


@dataclass(frozen=True, slots=True)
class LimiterCounts:
    """The decisions of a limiter in this process since it was created.

    Attributes:
        allowed: hits admitted, including those that ``on_error="open"`` admitted.
        denied: hits refused, including local refusals and those of ``on_error="closed"``.
        degraded: hits decided by `on_error`, because the store did not answer.
    """

    allowed: int = 0
    denied: int = 0
    degraded: int = 0


class Tally:
    """A number that goes up, exact between threads and signal handlers, without a lock: each
    `add` and each `value` is one step of a C iterator."""

    __slots__ = ("_added", "_reads", "add")

    def __init__(self) -> None:
        self._added = itertools.count()
        self._reads = itertools.count()
        self.add: Callable[[], int] = self._added.__next__

    def value(self) -> int:
        """The number of calls of `add`; off by one where two threads read at the same moment."""
        return next(self._added) - next(self._reads)


class EventLimit:
    """Lets an event be logged once per `WARN_SECONDS`, and counts those in between."""

    def __init__(self) -> None:
        self._seen = itertools.count(1)
        self._logged = 0
        self._last = -WARN_SECONDS

    def due(self, now: float) -> int:
        """How many events there were since the last that was logged, this one included; 0 when it
        is not to be logged."""
        seen = next(self._seen)
        if now - self._last < WARN_SECONDS:
            return 0
        self._last = now
        logged, self._logged = self._logged, seen
        return seen - logged


class Counter:
    """Counts a limiter's decisions, and says when to log. A forked child starts at zero."""

    def __init__(self) -> None:
        self.after_fork()
        survives_fork(self)

    def after_fork(self) -> None:
        self._allowed, self._denied, self._degraded = Tally(), Tally(), Tally()
        self.outages: EventLimit = EventLimit()
        self.steps_back: EventLimit = EventLimit()
        self.shadows: EventLimit = EventLimit()
        self._reported = monotonic()

    def add(self, decision: Decision) -> None:
        if decision.allowed:
            self._allowed.add()
        else:
            self._denied.add()
        if decision.degraded:
            self._degraded.add()

    def snapshot(self) -> LimiterCounts:
        return LimiterCounts(self._allowed.value(), self._denied.value(), self._degraded.value())

    def report_is_due(self, now: float) -> bool:
        """Whether the counts are to be logged; true once per interval."""
        if now - self._reported < REPORT_SECONDS:
            return False
        self._reported = now
        return True


class DenyCache:
    """Keys that the server denied a moment ago (``local_deny=True``).

    A hit is refused locally if it costs at least what was denied, under the same rates, until the
    denial's ``retry_after`` or `DENY_SECONDS_MAX` has passed since that hit was *sent*: an arrival
    time moves back only by reset and refund.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[Policy, int, float, Decision]] = OrderedDict()

    def find(self, row: bytes, policy: Policy, cost: int) -> Decision | None:
        """The denial that still applies to such a hit, with its times updated; None without one."""
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
        self._entries.pop(row, None)  # inserted again, it is the newest
        self._entries[row] = (policy, cost, sent, decision)
        _drop_oldest(self._entries)

    def forget(self, row: bytes) -> None:
        self._entries.pop(row, None)


class PrepaidTokens:
    """Tokens charged in advance (``prefetch=N``), spent without a query.

    They expire when the bucket would be full again, because the bucket then has them back. While
    one caller fetches tokens for a key, other callers in this process hit one by one, so a process
    never holds more than N - 1 unspent. A forked child has none.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = new_lock(self)
        self._entries: OrderedDict[bytes, tuple[Policy, int, float, Decision]] = OrderedDict()
        self._fetching: set[bytes] = set()
        survives_fork(self)

    def after_fork(self) -> None:
        """Leave the tokens and the fetches to the parent."""
        self._entries.clear()
        self._fetching.clear()

    def spend(self, row: bytes, policy: Policy, cost: int) -> Decision | None:
        """Take tokens; None if there are not enough."""
        with self._lock:
            # Taken out while it is changed: a signal handler may hit the same limiter here.
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
        """Whether the caller may fetch tokens for that row: no other does, and none are left."""
        with self._lock:
            if row in self._fetching or row in self._entries:
                return False
            self._fetching.add(row)
            return True

    def end(self, row: bytes) -> None:
        self._fetching.discard(row)

    def fill(
        self, row: bytes, policy: Policy, tokens: int, sent: float, decision: Decision
    ) -> None:
        """Keep fetched tokens. Their time counts from sending, so they end no later than the
        row."""
        with self._lock:
            self._entries[row] = (policy, tokens, sent + decision.reset_after, decision)
            _drop_oldest(self._entries)

    def forget(self, row: bytes) -> None:
        with self._lock:
            self._entries.pop(row, None)


def _drop_oldest(entries: OrderedDict[bytes, Any]) -> None:
    while len(entries) > ENTRIES_MAX:
        try:
            entries.popitem(last=False)
        except KeyError:  # other callers dropped them meanwhile
            return
