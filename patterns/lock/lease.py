"""A lock's lease as its holder sees it: what it is on, and who holds it.

This module has what a lease of a lock adds to `Held`, which keeps its time and renews it. `flows`
sends what holders ask for.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from ... import _observe
from ..._background.renewal import clock
from ..._observe import shown
from ...errors import InvalidValueError
from .._runtime.lease import Held
from .sql import SEPARATOR, Asking, LockStatements, Place

LOST_BECAUSE = {
    "expired": "its time passed before a renewal got through",
    "replaced": "its token was revoked, or the name was granted to another",
    "broken": "the name was freed with force_release",
    "gone": "its row no longer exists",
    "forked": "it belongs to the parent process",
    "closed": "its store was closed",
    "released": "it was released",
}


# -- who asks ------------------------------------------------------------------------------


def encode_metadata(metadata: Any) -> bytes:
    """Return the metadata as JSON, or raise InvalidValueError."""
    try:
        return msgspec.json.encode(metadata)
    except (TypeError, ValueError, RecursionError):
        raise InvalidValueError(
            "metadata must be JSON: dicts with string keys, lists, strings, numbers, True, False, None"
        ) from None


_owner = 0, "", b""  # the process it was made in, its name, and that as JSON


def new_asking(metadata: bytes) -> Asking:
    """Return a new asking of this process, unlike any other."""
    global _owner  # noqa: PLW0603  # once per process
    pid, owner, encoded = _owner
    if pid != os.getpid():
        owner = f"{socket.gethostname()}:{os.getpid()}"
        encoded = msgspec.json.encode(owner)
        _owner = os.getpid(), owner, encoded
    nonce = os.urandom(12).hex().encode()
    row = b'{"owner":%s,"nonce":"%s","metadata":%s}' % (encoded, nonce, metadata)
    return Asking(owner, row, b"\x1f" + nonce)


# -- what is held --------------------------------------------------------------------------


@dataclass(slots=True)
class LockOptions:
    """What a lock was made with: the same for all its leases.

    Attributes:
        name: as the user gave it.
        keys: the row, or the rows of a semaphore's slots.
        sql: the statements of its table.
        kind: the class of its leases.
        ttl: seconds.
        renew: extend its leases until they are released.
        notify: a release tells waiting processes.
        fair: waiters are served in order.
        on_lost: the user's, called with the lease.
        metadata: JSON.
        slots: of a semaphore; None for a lock.
        place: where the table is, once known.
        contended: the last try was denied: the next one may as well be.
        noted: a waiter without a ticket has left a note.
    """

    name: str
    keys: list[bytes]
    sql: LockStatements
    kind: type[Any]
    ttl: float
    renew: bool = True
    notify: bool = False
    fair: bool = False
    on_lost: Callable[..., Any] | None = None
    metadata: bytes = b"null"
    slots: int | None = None
    resize: bool = False
    place: Place | None = None
    contended: bool = False
    noted: bool = False

    def facts(self) -> str:
        slots = "" if self.slots is None else f" slots={self.slots}"
        return f"{self.name!r}{slots} ttl={self.ttl:g}"


class LeaseState(Held):
    """What `Lease` and `AsyncLease` share. Safe to use from any thread."""

    _lost_because = LOST_BECAUSE
    _noun = "the lease on"
    _way_out = "; stop the work, and acquire the lock again"

    def __init__(
        self,
        runtime: Any,
        options: LockOptions,
        key: bytes,
        token: int,
        owner: str,
        sent_at: float,
    ) -> None:
        super().__init__(
            runtime, options.sql, key, token, options.ttl, sent_at, renew=options.renew
        )
        self._options = options
        self._owner = owner

    # -- what users read

    @property
    def name(self) -> str:
        """The lock's name."""
        return self._options.name

    @property
    def token(self) -> int:
        """The fencing token: greater than that of every earlier grant of this name (of a
        semaphore: of this slot). Pass it to what the lock protects, and have that refuse lower
        ones."""
        return self._token

    @property
    def owner(self) -> str:
        """``host:pid`` of the holder, as `Lock.holder` shows it."""
        return self._owner

    @property
    def slot(self) -> int | None:
        """Which of a semaphore's slots it is, from 0; None for a lock."""
        if self._options.slots is None:
            return None
        return int(self._key.rpartition(SEPARATOR.encode())[2])

    @property
    def ttl(self) -> float:
        """Seconds that each renewal gives it."""
        return self._ttl

    @shown
    def __repr__(self) -> str:
        # Not by `_why`, which would tell the user of a loss: looking changes nothing.
        left = self._until - clock()
        state = self._reason or ("forked" if os.getpid() != self._pid else "")
        if not state:
            state = f"{left:.1f} s left" if left > 0 else "expired"
        slot = "" if self.slot is None else f" slot={self.slot}"
        return f"{self.name!r}{slot} token={self._token}, {state}"

    def _signal(self, context: dict[str, Any]) -> None:
        _observe.warning("pgkv.lock.lost", lock=self.name, owner=self._owner, **context)

    @classmethod
    def _renewal_failed(cls, count: int, context: dict[str, Any]) -> None:
        _observe.warning("pgkv.lock.renewal_failed", leases=count, **context)

    @classmethod
    def _abandoned(cls, name: str) -> None:
        _observe.warning("pgkv.lock.abandoned", lock=name)


# -- the user's callbacks ------------------------------------------------------------------


def report(fn: Callable[..., Any], lease: Any) -> Any:
    """Call the user's callback with the lease, or without where it takes no argument."""
    takes_none = False
    with contextlib.suppress(TypeError, ValueError):
        takes_none = not inspect.signature(fn).parameters
    return fn() if takes_none else fn(lease)


async def report_async(fn: Callable[..., Any], lease: Any) -> None:
    """`report`, and await what the callback returns."""
    answer = report(fn, lease)
    if inspect.isawaitable(answer):
        await answer


@contextlib.contextmanager
def failures_logged(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  # the user's code
        _observe.warning("pgkv.lock.callback_failed", lock=name, error=type(error).__name__)


def tell(fn: Callable[..., Any] | None, lease: Any) -> None:
    if fn is not None:
        with failures_logged(lease.name):
            report(fn, lease)


async def tell_async(fn: Callable[..., Any] | None, lease: Any) -> None:
    """`tell`, awaited."""
    if fn is not None:
        with failures_logged(lease.name):
            await report_async(fn, lease)
