"""One call of a cached function as a value, the settings it runs under, and how calls are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from ..._fork import new_lock
from ..._ops.op import Flow, Op, do
from ...errors import PgkvError, StoreUnavailableError
from .context import Site
from .envelope import Envelope

if TYPE_CHECKING:
    from ...config import Seconds

MISSING: Any = object()

Ttl: TypeAlias = "Seconds | Callable[..., Seconds | None] | None"


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of one cached function; see `cached`."""

    ttl: Ttl
    stale: float
    beta: float
    jitter: float
    lock: bool
    lease: float
    max_wait: float
    condition: Callable[[Any], bool] | None
    on_error: Literal["call", "raise"]
    store_timeout: float

    def facts(self) -> str:
        """What a repr says of them."""
        ttl: Any = self.ttl
        return f"ttl={'computed' if callable(ttl) else ttl if ttl is None else f'{ttl:g}'}"


class Colour(Protocol):
    """What the two colours do differently."""

    def later(self, site: Site, make: Callable[[], Flow[Any]], timeout: float) -> bool:
        """Run a flow in the background; False when there is no room."""
        ...

    def beat(
        self, site: Site, op: Op[bool], every: float, timeout: float, function: str
    ) -> Callable[[], None]:
        """Perform an operation again and again until what it returns is called."""
        ...


class Visit:
    """One call of a cached function.

    Attributes:
        keys: of the entry, of the function's generation, and of its tags' generations.
        work: calls the function.
        epoch: the first level's, before the store was asked; `sent` the monotonic time.
        counted: already among the calls that waited.
    """

    __slots__ = (
        "arguments", "counted", "digest", "epoch", "keys", "positional", "sent", "site", "work",
    )  # fmt: skip

    def __init__(
        self,
        site: Site,
        keys: tuple[bytes, ...],
        digest: str,
        work: Callable[[], Any],
        positional: tuple[tuple[Any, ...], dict[str, Any]],
        epoch: int,
    ) -> None:
        self.site: Site = site
        self.keys: tuple[bytes, ...] = keys
        self.digest: str = digest
        self.work: Callable[[], Any] = work
        self.positional: tuple[tuple[Any, ...], dict[str, Any]] = positional
        self.epoch: int = epoch
        self.sent: float = monotonic()
        self.counted: bool = False

    @property
    def key(self) -> bytes:
        """The entry's key."""
        return self.keys[0]


@dataclass(frozen=True, slots=True)
class Found:
    """A valid entry: its value, its age, and the seconds for which it is still fresh (0 or less:
    it is stale)."""

    value: Any
    age: float
    fresh: float
    envelope: Envelope


class Unreachable(Exception):  # noqa: N818  # never leaves this module
    """The store did not answer; before the function was called."""

    def __init__(self, error: PgkvError) -> None:
        self.error = error


class Busy(Exception):  # noqa: N818  # never leaves this module
    """An open transaction holds the row."""


class Counts:
    """How calls ended; see `CacheInfo`."""

    def __init__(self) -> None:
        self._lock = new_lock(self)
        self.hits = self.misses = self.stale_hits = self.waits = 0
        self.errors = self.fills = self.discarded_fills = 0

    def add(self, name: str) -> None:
        """Count one."""
        with self._lock:  # `+= 1` alone loses counts between threads
            setattr(self, name, getattr(self, name) + 1)


@dataclass(frozen=True, slots=True)
class State:
    """One state of an entry's row, which a fill may replace: no other."""

    key: bytes
    version: int
    mark: bytes


def quietly(op: Op[Any]) -> Flow[None]:
    """Perform what need not succeed: a lease that is not given up ends by itself."""
    with contextlib.suppress(PgkvError):
        yield from do(op)


def breaker_open() -> PgkvError:
    """What stands for an answer while the circuit is open."""
    error = StoreUnavailableError("cached: the store failed repeatedly and is left alone for now")
    error.breaker = True  # type: ignore[attr-defined]  # told from an answer of the store
    return error
