"""A lease as its holder sees it: what it is on, and until when it may be trusted.

A holder never asks the server whether it still holds the lease. It counts by its own clock, from
BEFORE the request was sent, and stops trusting the lease a margin before the server would grant it
to another. The rule is River's and Chubby's. What no clock can promise (a process may be paused
between `check()` and its next line) needs the fencing token, or `guard()`.

This module keeps the state. `renewal` renews leases, `flows` sends what their holders ask for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from ... import _observe
from ..._observe import shown
from ..._settings import refuse_pickle
from ...errors import InvalidKeyError, InvalidValueError, LeaseLostError
from .._runtime.renewal import clock
from .sql import EXPIRED, GONE, RELEASED, REPLACED, SEPARATOR, Asking, LockStatements

if TYPE_CHECKING:
    from .sql import Holder, Place

MARGIN_MIN = 1.0  # seconds, the assumed largest jump forward of the server's clock
MARGIN_SHARE = 0.1  # of the ttl
MARGIN_MAX_SHARE = 1 / 3  # of the ttl: short leases must be of some use
RENEW_SHARE = 1 / 3  # of the ttl, after which a lease is renewed
RETRY_SHARE, RETRY_MAX = 0.1, 1.0  # of the ttl, and seconds, before a failed renewal is repeated

LOST_BECAUSE = {
    "expired": "its time passed before a renewal got through",
    "replaced": "its token was revoked, or the name was granted to another",
    "broken": "the name was freed with force_release",
    "gone": "its row no longer exists",
    "forked": "it belongs to the parent process",
    "closed": "its store was closed",
    "released": "it was released",
}
REASON_OF = {EXPIRED: "expired", REPLACED: "replaced", RELEASED: "broken", GONE: "gone"}


def margin_of(ttl: float) -> float:
    """How long before a lease's end its holder stops trusting it, in seconds."""
    return min(max(MARGIN_MIN, ttl * MARGIN_SHARE), ttl * MARGIN_MAX_SHARE)


def retry_pause(ttl: float) -> float:
    """Seconds before a renewal that failed is tried again."""
    return min(ttl * RETRY_SHARE, RETRY_MAX)


def key_of(name: str, prefix: bytes, length_max: int) -> bytes:
    """Check a lock's name and return its key."""
    from ..._ops.codec import encode_key

    key = encode_key(name, prefix, length_max, "lock's name")
    if SEPARATOR in name:
        raise InvalidKeyError("a lock's name must not contain U+001F, which parts its tickets")
    return key


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who holds a lock, as one read saw it.

    Attributes:
        name: the lock's name.
        owner: ``host:pid`` of the holder.
        token: the grant's fencing token.
        metadata: what the holder's Lock was given.
        acquired_at: when it was granted (UTC, the server's clock).
        expires_at: when it ends unless it is renewed.
        read_at: the server's time of this read.
    """

    name: str
    owner: str
    token: int
    metadata: Any
    acquired_at: datetime
    expires_at: datetime
    read_at: datetime
    _read_clock: float = field(default_factory=time.monotonic, repr=False, compare=False)

    def remaining(self) -> float:
        """Return the seconds left now unless it is renewed, never below 0."""
        left_then = (self.expires_at - self.read_at).total_seconds()
        return max(0.0, left_then - (time.monotonic() - self._read_clock))

    def age(self) -> float:
        """Return the seconds since it was granted."""
        age_then = (self.read_at - self.acquired_at).total_seconds()
        return age_then + (time.monotonic() - self._read_clock)


def info_of(holder: Holder) -> LockInfo:
    """Return what a row says, as users see it."""
    owner, metadata = read_owner(holder.value)
    return LockInfo(
        holder.key,
        owner,
        holder.token,
        metadata,
        holder.acquired_at,
        holder.expires_at,
        holder.read_at,
    )


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
    nonce = secrets.token_hex(12).encode()
    row = b'{"owner":%s,"nonce":"%s","metadata":%s}' % (encoded, nonce, metadata)
    return Asking(owner, row, b"\x1f" + nonce)


def read_owner(row: bytes | None) -> tuple[str, Any]:
    """Return owner and metadata of a row; what others wrote there is shown as unknown."""
    try:
        document = msgspec.json.decode(row or b"")
        return str(document["owner"]), document["metadata"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return "unknown", None


# -- what is held --------------------------------------------------------------------------


@dataclass(slots=True)
class LockOptions:
    """What a lock was made with: the same for all its leases.

    Attributes:
        name: as the user gave it.
        keys: the row, or the rows of a semaphore's slots.
        sql: the statements of its table.
        ttl: seconds.
        renew: extend its leases until they are released.
        notify: a release tells waiting processes.
        fair: waiters are served in order.
        on_lost: the user's, called with the lease.
        metadata: JSON.
        slots: of a semaphore; None for a lock.
        place: where the table is, once known.
    """

    name: str
    keys: list[bytes]
    sql: LockStatements
    ttl: float
    renew: bool = True
    notify: bool = False
    fair: bool = False
    on_lost: Callable[..., Any] | None = None
    metadata: bytes = b"null"
    slots: int | None = None
    resize: bool = False
    place: Place | None = None

    def facts(self) -> str:
        """What a repr says of a lock."""
        slots = "" if self.slots is None else f" slots={self.slots}"
        return f"{self.name!r}{slots} ttl={self.ttl:g}"


class LeaseState:
    """What `Lease` and `AsyncLease` share. Safe to use from any thread.

    Args:
        runtime: of threads or asyncio.
        options: its lock's.
        key: the row.
        token: the grant's.
        owner: ``host:pid``.
        sent_at: `clock()` before the grant was sent.
    """

    _runtime: Any

    def __init__(
        self,
        runtime: Any,
        options: LockOptions,
        key: bytes,
        token: int,
        owner: str,
        sent_at: float,
    ) -> None:
        self._runtime = runtime
        self._options = options
        self._key = key
        self._token = token
        self._owner = owner
        self._pid = os.getpid()
        self._ttl = options.ttl
        self._until = 0.0  # the end of trust
        self._due = 0.0  # when to renew
        self._reason = ""  # why it ended
        self._cause: BaseException | None = None  # of the last failed renewal
        self._ending = False  # release() was called: what the server says now is no loss
        # Reentrant, for signal handlers. A forked child takes neither lock: see `_is_inherited`.
        self._state = threading.RLock()
        # One statement about the lease at a time: of a renewal and an extension that overlap,
        # it would not be known which the server did last.
        self._turn = threading.Lock()
        self._trust(sent_at, options.ttl)

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

    @property
    def is_lost(self) -> bool:
        """Whether the lease can no longer be trusted, or was released. It never becomes False
        again. Costs no round trip."""
        return bool(self._why())

    def remaining(self) -> float:
        """Return for how many seconds it may still be trusted if no renewal got through; 0 when
        lost. It ends before the server's own expiry, by the margin."""
        return 0.0 if self._why() else max(0.0, self._until - clock())

    def check(self) -> None:
        """Return if the lease may be trusted at this moment. Costs no round trip.

        The next moment is not covered: a process can be paused right after. What must not be
        written by a paused holder needs `guard()` or a check of `token` where it is written.

        Raises:
            LeaseLostError: it is lost or was released; `reason` says how.
        """
        if self._why():
            raise self._lost_error()

    @shown
    def __repr__(self) -> str:
        # Not by `_why`, which would tell the user of a loss: looking changes nothing.
        left = self._until - clock()
        state = self._reason or ("forked" if os.getpid() != self._pid else "")
        if not state:
            state = f"{left:.1f} s left" if left > 0 else "expired"
        slot = "" if self.slot is None else f" slot={self.slot}"
        return f"{self.name!r}{slot} token={self._token}, {state}"

    __reduce__ = refuse_pickle

    # -- what pgkv does with it

    def _trust(self, sent_at: float, ttl: float) -> None:
        """The server has granted `ttl` seconds at some time after `sent_at`."""
        self._until = sent_at + ttl - margin_of(ttl)
        self._due = sent_at + ttl * RENEW_SHARE if self._options.renew else float("inf")
        self._cause = None

    def _is_inherited(self) -> bool:
        """Whether this is a forked child's copy: the lease belongs to the parent."""
        if os.getpid() == self._pid:
            return False
        self._reason = "forked"
        return True

    def _why(self) -> str:
        """Why it is lost; empty while it is not."""
        if not self._reason and not self._is_inherited() and clock() >= self._until:
            self._lose("expired")
        return self._reason

    def _lose(self, reason: str) -> None:
        """Note the loss once, and tell the user."""
        with self._state:
            if self._reason or self._ending:
                # A holder that is releasing gets no notice, but must not trust the lease for ever.
                if self._ending and not self._reason and clock() >= self._until:
                    self._reason = reason
                return
            self._reason = reason
        context: dict[str, Any] = {"lock": self.name, "reason": reason, "owner": self._owner}
        if self._cause is not None:
            context |= {"cause": type(self._cause).__name__, "detail": str(self._cause)}
        _observe.warning("pgkv.lock.lost", **context)
        self._signal()

    def _signal(self) -> None:
        """Tell the user."""
        raise NotImplementedError

    def _end(self) -> None:
        """It was released."""
        with self._state:
            self._reason = self._reason or "released"

    def _lost_error(self) -> LeaseLostError:
        reason = self._reason
        text = f"the lease on {self.name!r} is no longer held: {LOST_BECAUSE.get(reason, reason)}"
        if self._cause is not None and reason == "expired":
            text += f" (the last renewal failed: {type(self._cause).__name__})"
        if reason != "released":
            text += "; stop the work, and acquire the lock again"
        error = LeaseLostError(text)
        error.reason = reason
        error.__cause__ = self._cause
        return error


def report(fn: Callable[..., Any], lease: Any) -> Any:
    """Call the user's callback with the lease, or without where it takes no argument."""
    import inspect

    takes_none = False
    with contextlib.suppress(TypeError, ValueError):
        takes_none = not inspect.signature(fn).parameters
    return fn() if takes_none else fn(lease)


def failed_callback(name: str, error: BaseException) -> None:
    """A callback of the user's raised: that is logged, and stops nothing."""
    _observe.warning("pgkv.lock.callback_failed", lock=name, error=type(error).__name__)
