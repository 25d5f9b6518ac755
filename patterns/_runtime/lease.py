"""A lease as its holder sees it, of a lock or of a job: until when it may be trusted, and how it
is renewed.

A holder never asks the server whether it still holds the lease. It counts by its own clock, from
BEFORE the request was sent, and stops trusting the lease a margin before the server would grant it
to another. The rule is River's and Chubby's. What no clock can promise (a process may be paused
between `check()` and its next line) needs the fencing token, or `guard()`.

All leases of one table are renewed by one statement, each at a third of its own ttl. A failed renewal
is repeated until the lease can no longer be trusted. Then its holder is notified, whether or not an
answer has arrived. `renewal` watches the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from ..._background.renewal import clock
from ..._ops.op import Flow, Op, call, pause
from ..._settings import refuse_pickle
from ...errors import LeaseLostError, OperationTimeoutError, PgkvError

if TYPE_CHECKING:
    from ..._background.background import Background
    from ..._background.connection import DedicatedConnection
    from .runtimes import Runtime

T = TypeVar("T")

MARGIN_MIN = 1.0  # seconds, the assumed largest jump forward of the server's clock
MARGIN_SHARE = 0.1  # of the ttl
MARGIN_MAX_SHARE = 1 / 3  # of the ttl: short leases must be of some use
RENEW_SHARE = 1 / 3  # of the ttl, after which a lease is renewed
RETRY_SHARE, RETRY_MAX = 0.1, 1.0  # of the ttl, and seconds, before a failed renewal is repeated

TURN_PAUSE = 0.005  # seconds between tries to take a turn

# What became of a lease that a renewal names.
RENEWED, LOCKED, RELEASED, EXPIRED, REPLACED, GONE = range(6)
REASON_OF = {EXPIRED: "expired", REPLACED: "replaced", RELEASED: "broken", GONE: "gone"}


def margin_of(ttl: float) -> float:
    """How long before a lease's end its holder stops trusting it, in seconds."""
    return min(max(MARGIN_MIN, ttl * MARGIN_SHARE), ttl * MARGIN_MAX_SHARE)


def retry_pause(ttl: float) -> float:
    """Seconds before a renewal that failed is tried again."""
    return min(ttl * RETRY_SHARE, RETRY_MAX)


class Renewing(Protocol):
    """The statements of a table whose leases are renewed."""

    t: str

    def renew(self, leases: Sequence[tuple[Any, int, float]]) -> Op[Any]:
        """Extend many leases: (key, token, seconds from now). For each key, what became of it."""
        ...


class Held:
    """What its holder has until an end by the server's clock. Safe to use from any thread.

    Args:
        runtime: of threads or asyncio.
        sql: the statements of its table.
        key: the row.
        token: the grant's.
        ttl: seconds.
        sent_at: `clock()` before the grant was sent.
        renew: extend it until it is released.
    """

    _lost_because: ClassVar[dict[str, str]]
    _noun: ClassVar[str]  # what it is, before its name
    _way_out: ClassVar[str]  # what a holder does after a loss

    def __init__(
        self,
        runtime: Any,
        sql: Renewing,
        key: Any,
        token: int,
        ttl: float,
        sent_at: float,
        *,
        renew: bool = True,
    ) -> None:
        self._runtime = runtime
        self._sql = sql
        self._key = key
        self._token = token
        self._ttl = ttl
        self._renew = renew
        self._pid = os.getpid()
        self._began = sent_at
        self._until = 0.0  # the end of trust
        self._due = 0.0  # when to renew
        self._reason = ""  # why it ended
        self._cause: BaseException | None = None  # of the last failed renewal
        self._ending = False  # it is being released: what the server says now is no loss
        # Reentrant, for signal handlers. A forked child takes neither lock: see `_is_inherited`.
        self._state = threading.RLock()
        # One statement about the lease at a time: of a renewal and an extension that overlap,
        # it would not be known which the server did last.
        self._turn = threading.Lock()
        self._trust(sent_at, ttl)

    # -- what users read

    @property
    def name(self) -> str:
        """The name in messages."""
        raise NotImplementedError

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

    __reduce__ = refuse_pickle

    # -- what pgkv does with it

    def _trust(self, sent_at: float, ttl: float) -> None:
        """The server has granted `ttl` seconds at some time after `sent_at`."""
        self._until = sent_at + ttl - margin_of(ttl)
        self._due = sent_at + ttl * RENEW_SHARE if self._renew else float("inf")
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
        context: dict[str, Any] = {"reason": reason}
        if self._cause is not None:
            context |= {"cause": type(self._cause).__name__, "detail": str(self._cause)}
        self._signal(context)

    def _signal(self, context: dict[str, Any]) -> None:
        """Log the loss, and tell the user."""
        raise NotImplementedError

    def _end(self) -> None:
        with self._state:
            self._reason = self._reason or "released"

    @classmethod
    def _renewal_failed(cls, count: int, context: dict[str, Any]) -> None:
        """Log a failed renewal, the first of a row."""
        raise NotImplementedError

    @classmethod
    def _abandoned(cls, name: str) -> None:
        """Log that one was dropped without its release."""
        raise NotImplementedError

    def _lost_error(self) -> LeaseLostError:
        reason = self._reason
        why = self._lost_because.get(reason, reason)
        text = f"{self._noun} {self.name!r} is no longer held: {why}"
        if self._cause is not None and reason == "expired":
            text += f" (the last renewal failed: {type(self._cause).__name__})"
        if reason != "released":
            text += self._way_out
        error = LeaseLostError(text)
        error.reason = reason
        error.__cause__ = self._cause
        return error


def extend(runtime: Runtime, lease: Held, ttl: float) -> Flow[None]:
    """Let the remaining time become `ttl`, and later renewals give that much."""
    lease.check()
    while not lease._turn.acquire(blocking=False):
        yield from pause(TURN_PAUSE)
    try:
        # If it is to be shorter, the server may have made it so from now on, whatever answer we
        # get: trust less first, and let an extension that arrives late shorten no renewal.
        lease._ttl = min(lease._ttl, ttl)
        while True:
            lease.check()
            sent_at = clock()
            lease._until = min(lease._until, sent_at + ttl - margin_of(ttl))
            op = lease._sql.renew([(lease._key, lease._token, ttl)])
            seconds = min(runtime.timeout, lease.remaining())
            codes = yield from do_within(runtime, op, seconds)
            code = codes[lease._key]
            if code == RENEWED:
                lease._ttl = ttl
                lease._trust(sent_at, ttl)
                lease.check()
                return
            if code != LOCKED:
                lease._lose(REASON_OF[code])
                lease._reason = (
                    lease._reason or REASON_OF[code]
                )  # also of one that is being released
                raise lease._lost_error()
            # A stranger's transaction has the row: it may let go before our time is over.
            yield from pause(retry_pause(ttl) / 4)
    finally:
        lease._turn.release()


def do_within(runtime: Runtime, op: Op[T], seconds: float) -> Flow[T]:
    """Perform one operation of a flow within a time of its own."""
    answer: T = yield from call(runtime.channel.execute, op, seconds)
    return answer


def follow(runtime: Runtime, lease: Held) -> Flow[None]:
    """Renew a lease where its slot is now, and watch it there."""
    with contextlib.suppress(PgkvError):  # the next renewal tries again
        yield from extend(runtime, lease, lease._ttl)
        runtime.forget(lease)
        runtime.leave()
        runtime.watch(lease)


# -- renewal ---------------------------------------------------------------------------------


class LeaseRenewals:
    """The tables of one background. One `LeaseRenewal` each: locks made one by one have
    statements of their own, but mostly one table."""

    def __init__(self, background: Background) -> None:
        self._renewer = background.renewer
        self._of_tables: dict[str, LeaseRenewal] = {}

    def watch(self, lease: Held) -> None:
        sql = lease._sql
        renewal = self._of_tables.get(sql.t)
        if renewal is None:
            renewal = self._of_tables.setdefault(sql.t, LeaseRenewal(sql, type(lease)))
        # One that is ending was acknowledged in a transaction of the caller, which may yet undo that.
        self._renewer.add(lease, renewal, quiet=lease._ending)

    def forget(self, lease: Held) -> None:
        self._renewer.discard(lease)


class LeaseRenewal:
    """The renewal of one table's leases."""

    def __init__(self, sql: Renewing, kind: type[Held]) -> None:
        self._sql = sql
        self._kind = kind
        self._failing = False

    async def renew(
        self, connection: DedicatedConnection, batch: list[Held], seconds: float
    ) -> None:
        """Send one statement for all of them, and note what the server says of each."""
        mine = _take_turns(batch)
        sent_at = clock()
        try:
            op = self._sql.renew([(lease._key, lease._token, lease._ttl) for lease in mine])
            codes = await connection.execute(op, seconds)
        except asyncio.CancelledError:
            self._failed(mine, OperationTimeoutError("no answer in the time the leases leave"))
            raise
        except PgkvError as error:
            self._failed(mine, error)
        else:
            self._failing = False
            _note(mine, codes, sent_at)
        finally:
            _end_turns(mine)

    def _failed(self, batch: list[Held], error: PgkvError) -> None:
        for lease in batch:
            lease._cause = error.with_traceback(None)
            lease._runtime.follow(lease, error)
        if not self._failing:
            self._failing = True
            context = {"error": type(error).__name__, "detail": str(error)}
            self._kind._renewal_failed(len(batch), context)

    def abandoned(self, name: str) -> None:
        self._kind._abandoned(name)

    def closed(self, lease: Held) -> None:
        lease._lose("closed")


# A failed statement's traceback keeps the frames it passed through until the collector comes. So
# that dropped leases are noticed, the frames that await hold none: lists are emptied, and loops
# over them are functions of their own.


def _take_turns(due: list[Held]) -> list[Held]:
    """Take those leases that no other call sends a statement about, one of each key: the answer is
    by key, and a process may have both the lost lease of a key and the next one."""
    mine: dict[Any, Held] = {}
    for lease in due:
        # Whatever becomes of this try: it is not due again before a while.
        lease._due = clock() + retry_pause(lease._ttl) / 2
        if lease._key not in mine and lease._turn.acquire(blocking=False):
            mine[lease._key] = lease
    due.clear()
    return list(mine.values())


def _end_turns(mine: list[Held]) -> None:
    for lease in mine:
        lease._turn.release()
    mine.clear()


def _note(batch: list[Held], codes: dict[bytes, int], sent_at: float) -> None:
    for lease in batch:
        code = codes.get(lease._key, LOCKED)
        if code == RENEWED:
            # A reply that comes after the trust has ended does not bring it back.
            if not lease.is_lost:
                lease._trust(sent_at, lease._ttl)
        elif code != LOCKED:
            lease._lose(REASON_OF[code])
