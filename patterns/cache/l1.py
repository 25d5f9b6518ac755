"""The first level of a cache: entries kept in this process's memory for a few seconds.

It keeps the codec's bytes, so that every caller gets a value of its own, and with them the keys of
what an entry depends on. It never talks to a store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from ..._fork import new_lock, survives_fork
from ..._observe import shown
from ..._ops.codec import seconds
from ...config import Seconds
from ...errors import ConfigError

HELD_MIN = 64  # keys of transactions, from which on those that have ended are looked for


class L1:
    """A first level in memory, for ``cached(l1=...)``: a hit in it costs no query.

    Bounded twice: the least recently used entries go beyond `max_entries`, and none is served for
    longer than `ttl` after it was read from the store. After ``invalidate()`` this process sees the
    change at once; other processes when the notification reaches them (where they have a direct
    connection to the server), and **within `ttl`** in any case. The same holds for
    ``invalidate_tag`` and ``cache_clear``; inside a transaction (``using(conn)``) from its commit,
    and until then the level keeps nothing of what was invalidated. One `L1` may serve several
    functions and threads.

    Args:
        max_entries: the most entries it keeps.
        ttl: seconds.

    Raises:
        ConfigError: `max_entries` is no positive integer.
        InvalidValueError: `ttl` is no positive duration.
    """

    def __init__(self, max_entries: int = 10_000, ttl: Seconds = 5.0) -> None:
        given: object = max_entries
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ConfigError(f"L1: max_entries must be 1 or more, not {max_entries!r}")
        self.max_entries = max_entries
        self.ttl: float = seconds(ttl, endless="")
        self._entries: OrderedDict[tuple[object, bytes], _Kept] = OrderedDict()
        self._held: dict[tuple[object, bytes], tuple[Callable[[], bool], ...]] = {}
        self._held_max = HELD_MIN
        self._epoch = 0
        self._lock = new_lock(self)
        survives_fork(self)

    @shown
    def __repr__(self) -> str:
        return f"max_entries={self.max_entries} ttl={self.ttl:g}"

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return True  # an empty one is no absent one

    @property
    def epoch(self) -> int:
        """Changes with every invalidation."""
        return self._epoch

    def get(self, scope: object, key: bytes) -> bytes | None:
        """Return the payload of a live entry of that `key` in that `scope`."""
        with self._lock:
            kept = self._entries.get((scope, key))
            if kept is None:
                return None
            if kept.ends <= monotonic():
                self._entries.pop((scope, key), None)
                return None
            try:
                self._entries.move_to_end((scope, key))
            except KeyError:  # dropped by a signal handler
                pass
            return kept.payload

    def put(
        self, scope: object, keys: tuple[bytes, ...], payload: bytes, ends: float, epoch: int
    ) -> None:
        """Keep an entry unless something was invalidated since `epoch`, which is that of before the
        store was asked: its `payload` in that `scope`, until the monotonic time `ends`. `keys` are
        the entry's and those of the generations that it depends on."""
        with self._lock:
            if (self._held and self._is_held(scope, keys)) or epoch != self._epoch:
                return
            self._entries.pop((scope, keys[0]), None)
            self._entries[scope, keys[0]] = _Kept(ends, payload, keys)
            while len(self._entries) > self.max_entries:
                self._entries.popitem(last=False)

    def drop(self, scope: object, key: bytes) -> None:
        """Forget the entry of that `key` in that `scope`, or every entry that depends on it."""
        with self._lock:
            self._drop(scope, key)

    def _drop(self, scope: object, key: bytes) -> None:
        self._epoch += 1
        if self._entries.pop((scope, key), None) is None:
            for name, kept in tuple(self._entries.items()):
                if name[0] == scope and key in kept.keys:
                    self._entries.pop(name, None)

    def hold(self, scope: object, key: bytes, is_open: Callable[[], bool]) -> None:
        """Forget like `drop`, and keep nothing that depends on `key` while a transaction is open:
        what is read before its commit is old after it. `is_open` tells whether it may still be
        open, and `scope` whose key it is."""
        with self._lock:
            self._drop(scope, key)
            if len(self._held) >= self._held_max:
                self._held = {name: left for name in self._held if (left := self._open_of(name))}
                self._held_max = max(HELD_MIN, 2 * len(self._held))
            name = (scope, key)
            self._held[name] = (*self._held.get(name, ()), is_open)

    def _open_of(self, name: tuple[object, bytes]) -> tuple[Callable[[], bool], ...]:
        return tuple(is_open for is_open in self._held.get(name, ()) if is_open())

    def _is_held(self, scope: object, keys: tuple[bytes, ...]) -> bool:
        for key in keys:
            name = (scope, key)
            if name in self._held:
                if left := self._open_of(name):
                    self._held[name] = left
                    return True
                # The end is noticed here, and what was read before it may still come.
                del self._held[name]
                self._epoch += 1
        return False

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._epoch += 1
            self._entries.clear()

    def after_fork(self) -> None:
        """Forget everything: no listener runs in this process yet, and no transaction."""
        self._held = {}
        self.clear()


class _Kept(NamedTuple):
    ends: float
    payload: bytes
    keys: tuple[bytes, ...]
