"""The values a store returns: frozen, comparable, and aware of the server's clock.

Moments come from the server. Time that passes since (`Entry.ttl`) is measured by the local monotonic
clock, so a wrong wall clock on the client changes nothing.
"""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Generic, NamedTuple, Required, TypedDict, TypeVar

if TYPE_CHECKING:
    from .config import Seconds

T = TypeVar("T")

SHOWN_MAX = 64  # bytes of a value that its repr shows


def shown_value(value: object) -> str:
    """Return a value as a repr shows it; a long one is cut, with its length."""
    if not isinstance(value, bytes) or len(value) <= SHOWN_MAX:
        return repr(value)
    return f"{value[:SHOWN_MAX]!r}... ({len(value):,} bytes)"


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's whole row, as one read saw it.

    Attributes:
        key: the key, without the namespace's prefix.
        value: the bytes.
        version: rises with every write of the value, not with a change of the expiry alone.
        expires_at: when the key ends (UTC), or None when it never does.
        created_at: when the key last came into being.
        updated_at: when the value was last written.
        read_at: the server's time of this read.
        transforms: what the value was stored with, such as ``("zstd", "aes:2")``.
    """

    key: str
    value: bytes
    version: int
    expires_at: datetime | None
    created_at: datetime
    updated_at: datetime
    read_at: datetime
    transforms: tuple[str, ...] = ()
    _read_clock: float = field(default_factory=time.monotonic, repr=False, compare=False)

    def __repr__(self) -> str:
        return (
            f"Entry(key={self.key!r}, value={shown_value(self.value)}, version={self.version}, "
            f"expires_at={self.expires_at!r}, created_at={self.created_at!r}, "
            f"updated_at={self.updated_at!r}, read_at={self.read_at!r})"
        )

    def ttl(self) -> float:
        """Return the seconds left now: ``math.inf`` without an expiry, never below 0."""
        if self.expires_at is None:
            return math.inf
        left_then = (self.expires_at - self.read_at).total_seconds()
        return max(0.0, left_then - (time.monotonic() - self._read_clock))

    def is_expired(self) -> bool:
        """Tell whether the key has expired by now."""
        return self.ttl() <= 0


class KeyValue(NamedTuple):
    """One row of a scan: a key and its value."""

    key: str
    value: bytes

    def __repr__(self) -> str:
        return f"KeyValue(key={self.key!r}, value={shown_value(self.value)})"


class ExpiryOptions(TypedDict, total=False):
    """How `set` sets the expiry: by one of these."""

    ttl: Seconds | None
    expires_at: datetime | None
    keep_ttl: bool


class Counting(TypedDict, total=False):
    """What `increment` takes with any bound."""

    ttl: Seconds | None
    only_if_exists: bool


class AtLeast(Counting, total=False):
    """What it takes with a minimum."""

    minimum: Required[int]
    maximum: int | None


class AtMost(Counting, total=False):
    """What it takes with a maximum."""

    minimum: int | None
    maximum: Required[int]


@dataclass(frozen=True, slots=True)
class IncrementResult:
    """The outcome of an `increment` with bounds; true when it was applied.

    Attributes:
        value: the number now stored: the sum, or, of a refused increment, the unchanged value.
            Of an absent key 0, or with ``only_if_exists`` None.
        applied: whether the sum was written.
    """

    value: int | None
    applied: bool

    def __bool__(self) -> bool:
        return self.applied


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The connections of one store in this process, at one moment.

    Attributes:
        size: connections open or being opened.
        idle: those that no operation uses.
        waiting: callers that wait for one.
        max_size: how many there may be.
    """

    size: int
    idle: int
    waiting: int
    max_size: int


class CasStatus(enum.Enum):
    """How a compare-and-swap ended."""

    SUCCESS = "success"
    MISMATCH = "mismatch"
    NOT_FOUND = "not_found"


@dataclass(frozen=True, slots=True)
class TypedCasResult(Generic[T]):
    """The outcome of a `compare_and_swap`; true when it succeeded.

    Attributes:
        status: SUCCESS, MISMATCH or NOT_FOUND.
        current: the value now stored: the new one on success, the one found on a mismatch
            (never equal to the expected one), None when there is no such key.
        version: that value's version, or None.
    """

    status: CasStatus
    current: T | None
    version: int | None

    @property
    def is_success(self) -> bool:
        """The new value was written."""
        return self.status is CasStatus.SUCCESS

    @property
    def is_mismatch(self) -> bool:
        """Another value was found; nothing changed."""
        return self.status is CasStatus.MISMATCH

    @property
    def is_not_found(self) -> bool:
        """A value was expected and there is no such key; nothing changed."""
        return self.status is CasStatus.NOT_FOUND

    def __bool__(self) -> bool:
        return self.is_success

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(status={self.status}, current={shown_value(self.current)}, "
            f"version={self.version})"
        )


class CasResult(TypedCasResult[bytes]):
    """The outcome of `Store.compare_and_swap`; true when it succeeded.

    Attributes:
        status: SUCCESS, MISMATCH or NOT_FOUND.
        current: the bytes now stored: the new ones on success, those found on a mismatch (never
            equal to the expected ones), None when there is no such key.
        version: that value's version, or None.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanOptions:
    """What `keys` and `scan` select; accepted in place of their keywords.

    Args:
        prefix: keys that begin with it.
        start: the first key that may appear (inclusive).
        end: the first key that may not (exclusive).
        after: keys beyond it (exclusive): the last key of the previous page.
        limit: rows at most; None for all.
        offset: rows to skip. This costs as much as reading them: prefer `after`.
        include_expired: also expired rows that are not collected yet.
    """

    prefix: str = ""
    start: str | None = None
    end: str | None = None
    after: str | None = None
    limit: int | None = None
    offset: int = 0
    include_expired: bool = False


class ScanRange(TypedDict, total=False):
    """The fields of `ScanOptions` but for the prefix, as keywords."""

    start: str | None
    end: str | None
    after: str | None
    limit: int | None
    offset: int
    include_expired: bool


@dataclass(frozen=True, slots=True)
class Stats:
    """What a table holds, and its health.

    Attributes:
        total_keys: rows, the expired ones included.
        expired_keys: expired rows that are not collected yet.
        total_value_bytes: sum of the values' sizes.
        avg_value_bytes: their mean, 0.0 for an empty table.
        max_value_bytes: the largest.
        table_size_bytes: on disk, with out-of-line values, without indexes.
        index_size_bytes: all indexes on disk.
        dead_tuples: row versions awaiting vacuum (the server's estimate).
        hot_update_ratio: share of updates that touched no index, 0.0 to 1.0; None before the
            first update. Near 1.0 on a healthy table.
        max_entries: the bound on keys that this store keeps; None without one.
        max_bytes: the bound on bytes likewise.
        estimated_keys: what this process's last samples say of the number of rows, by which it evicts;
            None before the first.
        evicted_keys: how many rows this process has evicted from the table.
    """

    total_keys: int
    expired_keys: int
    total_value_bytes: int
    avg_value_bytes: float
    max_value_bytes: int
    table_size_bytes: int
    index_size_bytes: int
    dead_tuples: int
    hot_update_ratio: float | None
    max_entries: int | None = None
    max_bytes: int | None = None
    estimated_keys: int | None = None
    evicted_keys: int = 0
