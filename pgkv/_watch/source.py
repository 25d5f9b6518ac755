"""What is known of some watched keys, and the flows that read them.

Watchers of one process that watch the same keys of a store share a `Source`: of those who wait for an
event one reads, and all hear of the differences. Nothing reads while none of them waits.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from functools import partial
from random import uniform
from time import monotonic
from typing import Any, NamedTuple

from .. import _observe
from .._background.background import Background
from .._background.listener import RETRY_FIRST, RETRY_MAX, Listener, say_polling
from .._fork import new_lock
from .._ops.op import Flow, do, pause
from .._sql.watch import CHANNEL, NEVER_ENDS, PAGE, Seen, WatchStatements
from ..errors import ConfigError, OperationTimeoutError, StoreUnavailableError

HINTS_MAX = 1_000  # keys; beyond that everything is compared
KEYS_MAX = 10_000  # keys under a prefix that is polled
POLL_DEAF = 1.0  # seconds between comparisons while no notification arrives
LISTEN_TIME = 5.0  # seconds to wait for LISTEN; then the table is polled until it comes


class Selection(NamedTuple):
    """Which keys, with their namespace's prefix: those named, or all with a prefix."""

    keys: frozenset[str] = frozenset()
    prefix: str | None = None

    def of(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that are selected."""
        prefix = self.prefix
        if prefix is None:
            return set(keys) & self.keys
        return {key for key in keys if key.startswith(prefix)}


class Ears:
    """The sources of one background, and what they hear."""

    def __init__(self, background: Background) -> None:
        self.listener: Listener = background.listener
        self._lock = new_lock(self)
        self._sources: weakref.WeakValueDictionary[Any, Source] = weakref.WeakValueDictionary()
        self._channels: weakref.WeakSet[Any] = weakref.WeakSet()

    def source(
        self, channel: Any, sql: WatchStatements, selection: Selection, poll: float | None
    ) -> Source:
        """Return the source of those keys; made with the first watcher, and gone with the last."""
        steps = sql.transforms and sql.transforms.steps
        key = (id(channel), sql.t, sql.readable, sql.values, steps, selection, poll)
        with self._lock:
            source = self._sources.get(key)
            if source is None:
                source = self._sources[key] = Source(channel, sql, selection, poll, self.listener)
            if channel not in self._channels:
                self._channels.add(channel)
                channel.on_close(partial(_closed, weakref.ref(self), id(channel)))
        self.listener.subscribe(CHANNEL, self.receive)
        say_polling(self.listener.unavailable)
        return source

    def all(self) -> list[Source]:
        with self._lock:
            return list(self._sources.values())

    def receive(self, payload: str | None) -> None:
        """Pass on a notification; None: some may have been missed."""
        if payload is None:
            say_polling(self.listener.unavailable)
            for source in self.all():
                source.missed(lost=self.listener.has_lost(CHANNEL))
            return
        try:
            schema, table, *keys = json.loads(payload)
        except (ValueError, TypeError):
            return  # it is not ours
        for source in self.all():
            if source.name == [schema, table]:
                source.hint(keys)


def _closed(ears: weakref.ref[Ears], channel: int) -> None:
    there = ears()
    for source in () if there is None else there.all():
        if id(source.channel) == channel:
            source.wake_all()


class Source:
    """What some keys are known to be, and who wants to hear of changes.

    Attributes:
        name: the table's schema and name; None before the first read.
        known: the rows as they were last read.
        hearers: the watchers.
        waiting: those of them that wait for an event.
    """

    def __init__(
        self,
        channel: Any,
        sql: WatchStatements,
        selection: Selection,
        poll: float | None,
        listener: Listener,
    ) -> None:
        self.channel = channel
        self.sql = sql
        self.selection = selection
        self.name: list[str] | None = None
        self.known: dict[str, Seen] = {}
        self.hearers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.waiting: dict[Any, None] = {}
        self._poll = NEVER_ENDS if poll is None else poll
        self._listener = listener
        self.lock = new_lock(self, "lock")
        self._hinted: set[str] = set()
        self._everything = self._gap = self._lost = self._reading = False
        self._compared = -NEVER_ENDS  # when the last comparison of everything began
        self._ends = NEVER_ENDS  # of the row that expires first, or before
        self._retry_at, self._pause = 0.0, RETRY_FIRST

    @property
    def is_closed(self) -> bool:
        return bool(self.channel.state)

    # -- what may have changed

    def hint(self, keys: list[str]) -> None:
        """These keys may have changed; without any, all may."""
        with self.lock:
            found = self.selection.of(keys)
            if not keys:
                self._everything = True
            elif not found:
                return
            elif len(self._hinted) + len(found) > HINTS_MAX:
                self._everything = self._gap = True
            else:
                self._hinted |= found
        self.wake_one()

    def missed(self, *, lost: bool) -> None:
        """Hints may have been missed; `lost`: and more will be, for now."""
        with self.lock:
            self._gap = self._gap or (self._lost and not lost)
            self._everything = self._everything or not lost
            self._lost = lost and self.name is not None
        self.wake_one()

    def wake_one(self) -> None:
        """Let one of those who wait read, or set its timer."""
        hearer = next(iter(tuple(self.waiting)), None)
        if hearer is not None:
            hearer._wake()

    def wake_all(self) -> None:
        for hearer in tuple(self.waiting):
            hearer._wake()

    def due(self) -> float:
        """The monotonic time of the next read that no hint asks for."""
        if self._reading:
            return NEVER_ENDS
        if self._everything or self._hinted:
            return self._retry_at
        return max(self._retry_at, min(self._compared + self._interval(), self._ends))

    def _interval(self) -> float:
        """Seconds between comparisons of everything."""
        deaf = not self._listener.is_listening(CHANNEL)
        return min(self._poll, POLL_DEAF) if deaf else self._poll

    # -- reading

    def opened(self) -> Flow[None]:
        """Read everything, once notifications arrive: no later change is missed."""
        began, step = monotonic(), 0.002
        while not self._listener.is_settled(CHANNEL) and monotonic() < began + LISTEN_TIME:
            yield from pause(step)
            step = min(2 * step, 0.05)
        began = monotonic()
        while self._compared < began:
            self._everything = True
            if self.claim():
                yield from self.read(opening=True)
            else:
                yield from pause(0.01)  # another watcher reads
        if self._poll < NEVER_ENDS and len(self.known) > KEYS_MAX:
            raise ConfigError(
                f"watch: {len(self.known):,} keys would be compared every {self._poll:g} s; watch at "
                f"most {KEYS_MAX:,} keys, or give poll=None"
            )

    def claim(self) -> bool:
        """Whether the caller is to `read` now."""
        with self.lock:
            if self._reading or self.due() > monotonic():
                return False
            self._reading = True
            return True

    def read(self, *, opening: bool = False) -> Flow[None]:
        """Read what may have changed and tell the watchers; for the one who has the claim. While the
        server is away it is tried again later, but for the first read of a new watcher."""
        now = monotonic()
        with self.lock:
            everything = self._everything or now >= self._compared + self._interval()
            keys = self._hinted
            if now >= self._ends:
                keys = keys | {key for key, row in self.known.items() if row.ends <= now}
            self._hinted, self._everything = set(), False
        rows: dict[str, Seen] | None = None
        try:
            rows = yield from self._rows(None if everything else keys)
            self._pause = RETRY_FIRST
        except (StoreUnavailableError, OperationTimeoutError) as error:
            refused = isinstance(error, StoreUnavailableError) and not error.retryable
            if opening or (refused and not self.is_closed):
                raise
            self._retry_at = now + uniform(self._pause / 2, self._pause)  # noqa: S311  # no secret
            self._pause = min(2 * self._pause, RETRY_MAX)
            _observe.debug("pgkv.watch.unreadable", error=type(error).__name__)
        finally:
            with self.lock:
                if rows is None:
                    self._everything = self._everything or everything
                    self._hinted |= keys
                else:
                    self._compare(rows, None if everything else keys, now)
                self._reading = False
            self.wake_all()

    def _rows(self, keys: Iterable[str] | None) -> Flow[dict[str, Seen]]:
        sql, prefix = self.sql, self.selection.prefix
        if keys is None and self.name is None:
            self.name = yield from do(sql.name())
        if keys is not None or prefix is None:
            keys = self.selection.keys if keys is None else keys
            return (yield from do(sql.read(keys))) if keys else {}
        rows: dict[str, Seen] = {}
        page: dict[str, Seen] | None = None
        while page is None or len(page) == PAGE:
            page = yield from do(sql.page(prefix, next(reversed(page)) if page else None))
            rows.update(page)
        return rows

    def _compare(self, rows: dict[str, Seen], keys: Iterable[str] | None, now: float) -> None:
        """Take what was read, and tell the watchers of what is different."""
        known = self.known
        gap = False
        if keys is None:
            keys = known.keys() | rows.keys()
            self._compared = now
            gap, self._gap = self._gap, False
        changed: dict[str, tuple[int | None, int | None]] = {}
        for key in tuple(keys):
            old, new = known.pop(key, None), rows.get(key)
            if new is not None:
                known[key] = new
            versions = old and old.version, new and new.version
            if versions[0] != versions[1]:
                changed[key] = versions
        if now >= self._ends or len(rows) > HINTS_MAX:
            self._ends = min((row.ends for row in known.values()), default=NEVER_ENDS)
        else:
            self._ends = min([self._ends, *(row.ends for row in rows.values())])
        for hearer in self.hearers if changed or gap else ():
            hearer._hear(changed, gap=gap)
