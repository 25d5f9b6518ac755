"""The algorithms of locks, each written once for both colours: acquire, extend, release, guard.

They are flows: what differs between threads and asyncio (how to wait, how to perform an operation
within a time) is behind a `Runtime`. Statements are in `sql`, the state of a
lease in `lease`.

The protocol is a compare-and-swap with a lease, fenced by the token (Kleppmann, "How to do
distributed locking"); the retry by nonce answers Jepsen's question what an acquire did whose reply
was lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import uniform
from typing import Any, Generic, Protocol, TypeVar

import psycopg
from psycopg import pq

from ... import _observe
from ..._ops.op import Flow, Op, call, pause
from ...config import Table
from ...errors import ConfigError, ConflictError, PgkvError, TableNotFoundError, TransactionError
from .lease import (
    MARGIN_MIN,
    REASON_OF,
    LeaseState,
    LockOptions,
    clock,
    info_of,
    margin_of,
    new_owner,
    retry_pause,
)
from .sql import (
    LOCKED,
    RELEASED,
    RENEWED,
    Denied,
    Granted,
    Place,
    SemaphoreStatements,
    Undefined,
)

POLL_FIRST, POLL_GROWTH, POLL_MAX = 0.005, 1.6, 0.5  # seconds; jittered down by half
HEARD_FIRST, HEARD_MAX = 0.5, 5.0  # the same where a release is notified
IN_TURN_MAX = 0.5  # seconds between the looks of a waiter in a queue
TICKET_TTL = 2.0  # seconds that a dead waiter can stall its queue
CLEAN_UP_TIME = 1.0  # seconds for taking back what a failed acquire may have left
BEYOND_EXPIRY = 0.02  # seconds, at most, after a lease's end at which waiters look
LATE_MAX = 3  # grants in a row that came too late to be of use

H = TypeVar("H", bound=LeaseState)
H_co = TypeVar("H_co", bound=LeaseState, covariant=True)
T = TypeVar("T")


class Waiter(Protocol):
    """One local caller who waits for a name to become free."""

    @property
    def hears(self) -> bool:
        """Whether a release would be heard of just now."""
        ...


class Runtime(Protocol[H_co]):
    """What the flows need of a colour. What may return an awaitable does so in the async one."""

    @property
    def timeout(self) -> float:
        """Seconds for one operation."""
        ...

    def execute(self, op: Op[T], timeout: float | None = None) -> T | Awaitable[T]:
        """Perform one operation over the store's pool."""
        ...

    def create_missing_table(self, table: Table) -> Awaitable[None] | None:
        """Create a missing table."""
        ...

    def lease(
        self, options: LockOptions, key: bytes, token: int, owner: str, sent_at: float
    ) -> H_co:
        """Make the colour's lease and see to its renewal."""
        ...

    def forget(self, hold: LeaseState) -> None:
        """Renew it no more."""
        ...

    def subscribe(self, options: LockOptions) -> Any:
        """Begin to hear of releases; None where that is not possible."""
        ...

    def unsubscribe(self, waiter: Any, *, granted: bool) -> None:
        """Hear no more."""
        ...

    def wait(self, waiter: Any, seconds: float) -> Any:
        """Let time pass, less if the waiter is woken."""
        ...


def perform(runtime: Runtime[Any], op: Op[T], seconds: float | None = None) -> Flow[T]:
    """Perform one operation within that time, over the store's pool."""
    answer: T = yield from call(runtime.execute, op, seconds)
    return answer


# -- acquiring -----------------------------------------------------------------------------


def acquire(
    runtime: Runtime[H],
    options: LockOptions,
    timeout: float | None,
    stop: Callable[[], bool] | None = None,
) -> Flow[H | None]:
    """Try, and wait, and try: until granted, or the time is over, or `stop()` says so (None)."""
    owner, row = new_owner(options.metadata)
    asking = _Asking(runtime, options, owner, row)
    deadline = None if timeout is None else clock() + timeout
    if timeout == 0:
        # One try is no wait: it has the time of any operation, for a connection too.
        deadline, stop = None, _at_once
    try:
        hold = yield from asking.until(deadline, stop)
    except GeneratorExit:
        raise
    except BaseException:
        yield from asking.take_back()
        raise
    if hold is None:
        yield from asking.leave_queue()
    return hold


def _at_once() -> bool:
    return True


class _Asking(Generic[H]):
    """One call of acquire(): its nonce, its ticket, and what it may have left on the server."""

    def __init__(self, runtime: Runtime[H], options: LockOptions, owner: str, row: bytes) -> None:
        self.runtime = runtime
        self.options = options
        self.owner = owner
        self.row = row
        self.ticket = b""
        if options.fair:
            # The nonce's own part of the row, so that the ticket is as unique.
            self.ticket = b"\x1f".join((options.keys[0], row.split(b'"nonce":"', 1)[1][:24]))
        self.open = False  # an answer is owed: what was asked may have happened
        self.queued = False
        self.waiter: Waiter | None = None
        self.created = False

    def until(self, deadline: float | None, stop: Callable[[], bool] | None) -> Flow[H | None]:
        wait = 0.0
        hold: H | None = None
        try:
            while True:
                hold, reply = yield from self.once(deadline)
                if hold is not None:
                    return hold
                if (deadline is not None and clock() >= deadline) or (stop is not None and stop()):
                    return None
                if self.options.notify and self.waiter is None:
                    self.waiter = yield from call(self.runtime.subscribe, self.options)
                    if self.waiter is not None:
                        continue  # it may have been freed before we listened
                wait = self.next_wait(wait)
                seconds = self.bounded(uniform(wait / 2, wait), reply, deadline)  # noqa: S311  # a pause, no secret
                yield from call(self.runtime.wait, self.waiter, seconds)
                if stop is not None and stop():
                    return None
        finally:
            if self.waiter is not None:
                self.runtime.unsubscribe(self.waiter, granted=hold is not None)

    def next_wait(self, last: float) -> float:
        heard = self.waiter is not None and self.waiter.hears
        first, longest = (HEARD_FIRST, HEARD_MAX) if heard else (POLL_FIRST, POLL_MAX)
        if self.options.fair:
            longest = min(longest, IN_TURN_MAX)
        return min(max(first, last * POLL_GROWTH), longest)

    def bounded(self, seconds: float, reply: Denied, deadline: float | None) -> float:
        if reply.remaining > 0:
            # Not all at the same instant: they would meet again, and again.
            beyond = uniform(0.0, BEYOND_EXPIRY)  # noqa: S311  # as above
            seconds = min(seconds, reply.remaining + beyond)
        return seconds if deadline is None else max(0.0, min(seconds, deadline - clock()))

    def once(self, deadline: float | None) -> Flow[tuple[H | None, Denied]]:
        """Ask. A grant that leaves no time to trust it is asked for again, by the same nonce."""
        options = self.options
        for _ in range(LATE_MAX):
            sent_at = clock()
            self.open = True
            reply = yield from self.ask(self.seconds(deadline))
            self.open = False
            if isinstance(reply, Denied):
                return None, reply
            if clock() < sent_at + options.ttl - margin_of(options.ttl):
                self.queued = False
                return self.runtime.lease(
                    options, reply.key, reply.token, self.owner, sent_at
                ), Denied(None, 0.0)
        _observe.warning("pgkv.lock.late_grant", lock=options.name, ttl=options.ttl)
        yield from self.disown()
        return None, Denied(None, 0.0)

    def seconds(self, deadline: float | None) -> float:
        """For one try: a grant older than its ttl is of no use."""
        seconds = min(self.runtime.timeout, max(self.options.ttl, 5.0))
        return seconds if deadline is None else min(seconds, max(1.0, deadline - clock()))

    def ask(self, seconds: float) -> Flow[Granted | Denied]:
        options, sql = self.options, self.options.sql
        patience = min(margin_of(options.ttl) / 2, MARGIN_MIN)
        key = options.keys[0]
        try:
            if isinstance(sql, SemaphoreStatements):
                assert options.slots is not None
                return (yield from self.ask_slot(sql, seconds, patience))
            if options.fair:
                self.queued = True
                op = sql.grant_fair(key, self.row, options.ttl, patience, self.ticket, TICKET_TTL)
            else:
                op = sql.grant(key, self.row, options.ttl, patience)
            return (yield from perform(self.runtime, op, seconds))
        except TableNotFoundError:
            # The engine creates the statement's own table; the queue's is ours to see to.
            if self.created or not options.fair or not sql.tickets.auto_create:
                raise
            self.created = True
            yield from call(self.runtime.create_missing_table, sql.tickets)
            return (yield from self.ask(seconds))
        except PgkvError as error:
            if error._sqlstate == "55P03":  # its row was locked for all our patience
                return Denied(None, 0.0)
            raise

    def ask_slot(
        self, sql: SemaphoreStatements, seconds: float, patience: float
    ) -> Flow[Granted | Denied]:
        options = self.options
        slots = options.slots or 0
        while True:
            reply = yield from perform(
                self.runtime, sql.grant_slot(options.keys, self.row, options.ttl, patience), seconds
            )
            if not isinstance(reply, Undefined):
                return reply
            if reply.slots is None:
                found = yield from perform(
                    self.runtime, sql.define(options.keys, resize=False), seconds
                )
            elif options.resize:
                found = yield from perform(
                    self.runtime, sql.define(options.keys, resize=True), seconds
                )
            else:
                found = reply.slots
            if found != slots:
                raise ConfigError(
                    f"the semaphore {options.name!r} has {found} slots, not {slots}; give all its "
                    "users the same number, or change it with resize=True"
                )

    # -- what a failure may leave behind

    def take_back(self) -> Flow[None]:
        """After a failure: free what was granted without our hearing of it."""
        if self.open:
            yield from self.disown()
        yield from self.leave_queue()

    def disown(self) -> Flow[None]:
        op = self.options.sql.disown(self.options.keys, self.row)
        yield from self.quietly(op)

    def leave_queue(self) -> Flow[None]:
        if self.queued:
            self.queued = False
            yield from self.quietly(self.options.sql.leave(self.ticket))

    def quietly(self, op: Op[Any]) -> Flow[None]:
        try:
            yield from perform(self.runtime, op, CLEAN_UP_TIME)
        except PgkvError as error:
            # It ends by its ttl, as everything here does.
            _observe.debug("pgkv.lock.clean_up_failed", error=type(error).__name__)


# -- holding -------------------------------------------------------------------------------


def extend(runtime: Runtime[Any], hold: LeaseState, ttl: float) -> Flow[None]:
    """Let the remaining time become `ttl`, and later renewals give that much."""
    hold.check()
    while not hold._turn.acquire(blocking=False):
        yield from pause(POLL_FIRST)
    try:
        # If it is to be shorter, the server may have made it so from now on, whatever answer we
        # get: trust less first, and let an extension that arrives late shorten no renewal.
        hold._ttl = min(hold._ttl, ttl)
        while True:
            hold.check()
            sent_at = clock()
            hold._until = min(hold._until, sent_at + ttl - margin_of(ttl))
            op = hold._options.sql.renew([(hold._key, hold._token, ttl)])
            seconds = min(runtime.timeout, hold.remaining())
            codes = yield from perform(runtime, op, seconds)
            code = codes[hold._key]
            if code == RENEWED:
                hold._ttl = ttl
                hold._trust(sent_at, ttl)
                hold.check()
                return
            if code != LOCKED:
                hold._lose(REASON_OF[code])
                hold.check()
            # A stranger's transaction has the row: it may let go before our time is over.
            yield from pause(retry_pause(ttl) / 4)
    finally:
        hold._turn.release()


def release(runtime: Runtime[Any], hold: LeaseState) -> Flow[bool]:
    """End the lease; whether it was still held. After a failure it may be called again."""
    if hold._reason in ("released", "forked"):
        return False
    trusted = not hold.is_lost
    with hold._state:
        hold._ending = True
    # First, or a renewal would outlive its lease.
    runtime.forget(hold)
    op = hold._options.sql.release(hold._key, hold._token, hold._options.notify)
    code = yield from perform(runtime, op, None)
    hold._end()
    if code == RENEWED:
        return True
    # Asked twice because the first answer was lost: then that was the one that ended it.
    return trusted and getattr(op, "retries", 0) > 0


def leave(runtime: Runtime[Any], hold: LeaseState, *, failed: bool) -> Flow[None]:
    """The end of a ``with`` block: release, and say so if the lease did not last.

    Args:
        runtime: the colour's.
        hold: what ends.
        failed: the block raised: that must not be masked.
    """
    if hold._reason == "released":
        return
    was_lost = hold.is_lost
    released = True
    try:
        released = yield from release(runtime, hold)
    except PgkvError as error:
        # The work is done and was covered: the lease ends by itself, a little later.
        _observe.warning(
            "pgkv.lock.release_failed",
            lock=hold.name,
            ttl=hold.ttl,
            error=type(error).__name__,
            detail=str(error),
        )
    if failed:
        return
    if not was_lost and not released:
        hold._reason = "replaced"
        was_lost = True
    if was_lost:
        raise hold._lost_error()


def holder(runtime: Runtime[Any], options: LockOptions) -> Flow[Any]:
    """Who holds the name, or None."""
    rows = yield from perform(runtime, options.sql.holder(options.keys[0]), None)
    return info_of(rows[0]) if rows else None


def force_release(runtime: Runtime[Any], options: LockOptions, token: int) -> Flow[bool]:
    """Free the name of that token."""
    op = options.sql.release(options.keys[0], token, options.notify)
    code = yield from perform(runtime, op, None)
    return bool(code == RENEWED or (code == RELEASED and getattr(op, "retries", 0) > 0))


def revoke(runtime: Runtime[Any], options: LockOptions, token: int) -> Flow[bool]:
    """End that token, not its lease."""
    try:
        return (yield from perform(runtime, options.sql.revoke(options.keys[0], token), None))
    except PgkvError as error:
        if error._sqlstate == "55P03":
            raise ConflictError(
                f"the lease on {options.name!r} is guarded by an open transaction; it ends with that "
                "(`pgkv locks` shows it), or try again"
            ) from error
        raise


# -- guarding ------------------------------------------------------------------------------
#
# guard() locks the lease's row FOR KEY SHARE in the caller's transaction. UNIQUE (key, version)
# makes a renewal pass and a takeover, which changes the version, wait.


def check_guarded(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Refuse a connection on which a guard would protect nothing.

    Raises:
        TransactionError: it is in autocommit and no transaction is open.
    """
    idle = conn.pgconn.transaction_status == pq.TransactionStatus.IDLE
    if conn.autocommit and idle:
        raise TransactionError(
            "guard() needs an open transaction: in autocommit it would end with its own "
            "statement; write `with conn.transaction(): lease.guard(conn); ...`"
        )


def guard(
    runtime: Runtime[Any],
    hold: LeaseState,
    theirs: Callable[[Op[Any]], Any],
    max_hold: float | None,
) -> Flow[None]:
    """Protect the caller's transaction.

    Args:
        runtime: over the store's own connections.
        hold: the lease.
        theirs: performs an operation in the caller's transaction.
        max_hold: seconds.
    """
    hold.check()
    options = hold._options
    if options.place is None:
        options.place = yield from perform(runtime, options.sql.place(), None)
    place = options.place
    if place is None:
        hold._lose("gone")
        raise hold._lost_error()
    op = options.sql.guard(place.quoted, hold._key, hold._token, max_hold)
    try:
        found = yield from call(theirs, op)
    except TableNotFoundError as error:
        raise TransactionError(_elsewhere(place)) from error
    except PgkvError as error:
        if error._sqlstate == "40001":
            hold._lose("replaced")
            raise hold._lost_error() from error
        if error._sqlstate == "25006":
            raise TransactionError(
                "guard() needs a transaction that may write: a read-only one cannot lock the lease"
            ) from error
        raise
    if not found:
        yield from _explain(runtime, hold, theirs, place)


def _explain(
    runtime: Runtime[Any], hold: LeaseState, theirs: Callable[[Op[Any]], Any], place: Place
) -> Flow[None]:
    """Why the guard saw no such lease."""
    sql = hold._options.sql
    there = yield from call(theirs, sql.place(place.quoted))
    here = yield from perform(runtime, sql.place(place.quoted), None)
    if there is None or (here is not None and there.identity != here.identity):
        raise TransactionError(_elsewhere(place))
    level = yield from call(theirs, sql.isolation())
    if level != "read committed":
        rows = yield from perform(runtime, sql.holder(hold._key), None)
        if rows and rows[0].token == hold._token:
            raise TransactionError(
                f"the lease on {hold.name!r} is held, but this {level} transaction's snapshot is "
                "older than its last renewal: call guard() first in the transaction"
            )
    hold._lose("replaced" if here is not None else "gone")
    raise hold._lost_error()


def _elsewhere(place: Place) -> str:
    return (
        f"guard() got a connection to another database than the lock's: {place.quoted} there is not "
        "the same table; guard with a connection to the database that the store uses"
    )
