"""The algorithms of locks, each written once for sync and async: acquire, extend, release, guard.

What differs between threads and asyncio is behind a `Runtime`, and in `LockOptions.kind` of lease.
The statements are in `sql`, the state of a lease in `lease`.

The protocol is a compare-and-swap with a lease, fenced by the token (Kleppmann, "How to do
distributed locking"). The retry by nonce answers Jepsen's question what an acquire did whose reply
was lost, and the mark that `Acquisition.take_back` leaves ends one that no caller waits for any more.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from random import random, randrange, uniform
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import psycopg
from psycopg import pq

from ... import _observe
from ..._background.renewal import clock
from ..._ops.op import Flow, Op, call, do
from ...errors import (
    ConfigError,
    ConflictError,
    LockTimeoutError,
    PgkvError,
    TableNotFoundError,
    TransactionError,
)
from .._runtime.lease import MARGIN_MIN, do_within, margin_of
from .._runtime.runtimes import Runtime
from .._runtime.wakeup import Waiter, Waiters
from .lease import LeaseState, LockOptions, new_asking
from .sql import (
    CHANNEL,
    CLEAN_PAGES,
    Asking,
    Denied,
    Granted,
    LockInfo,
    Place,
    SemaphoreStatements,
    Undefined,
    read_owner,
)

POLL_FIRST, POLL_GROWTH, POLL_MAX = 0.005, 1.6, 0.5  # seconds; jittered down by half
NOTIFIED_FIRST, NOTIFIED_MAX = 0.5, 5.0  # the same where a release is notified
LOOKS = 2.5  # of a waiter, in the time in which the queue moves up to it
# Seconds in which a queue moves by one, before its speed is known; seconds between two looks.
TURN_FIRST, LOOK_MIN = 0.005, 0.0005
STALL_SHARE, STALL_MAX = 1 / 8, 0.1  # of the time without a move, and seconds, between two looks
TICKET_TTL = 2.0  # seconds that a dead waiter can stall its queue
TICKET_FRESH = 0.25  # seconds in which a ticket needs no renewal
QUEUE_MAX = 0.9  # the most seconds between looks in a queue; each look renews the ticket
CLEAN_UP_TIME = 1.0  # seconds for each statement that takes back what a failed acquire has left
CLEAN_UP = CLEAN_UP_TIME, 3 * CLEAN_UP_TIME  # for `Runtime.clean_up`
BEYOND_EXPIRY = 0.02  # seconds, at most, after a lease's end at which waiters look
CLEAN_CHANCE = 1 / 256  # of a grant being followed by the removal of a chunk of old names
CLEAN_TIME = 5.0  # seconds for each of its statements
LATE_MAX = 3  # grants in a row that came too late to be of use
# Seconds after which a waiter without a ticket leaves a note for `pgkv locks`, renews it, and until it ends.
NOTE_AFTER, NOTE_AGAIN, NOTE_TTL = 1.0, 4.0, 10.0
BUSY_TIME = 1.0  # seconds that one try waits for a connection while all are in use
ANSWER_TIME = 1.0  # seconds that a statement is given at least, to connect and be answered
ROUND_TRIP = 0.05  # the same while all connections are in use

L = TypeVar("L", bound=LeaseState)
T = TypeVar("T")


class LockWaiters(Waiters):
    """Those who wait for locks: a release lets one of each process try."""

    channel: ClassVar[str] = CHANNEL.decode()


# -- acquiring -----------------------------------------------------------------------------


def acquire(
    runtime: Runtime,
    options: LockOptions,
    timeout: float | None,
    stop: Callable[[], bool] | None = None,
) -> Flow[LeaseState | None]:
    """Try until the lock is granted, the time has passed (None), or `stop()` is true (None)."""
    acquisition = Acquisition[LeaseState](runtime, options, timeout, stop)
    try:
        return (yield from acquisition.flow())
    except GeneratorExit:
        raise
    except BaseException:
        yield from call(runtime.clean_up, acquisition.take_back, *CLEAN_UP)
        raise


def _at_once() -> bool:
    return True


class Acquisition(Generic[L]):
    """One call of acquire(): its nonce, its ticket, and what it may have left on the server. It ends
    after `timeout` seconds (None: never; 0: one try), or when `stop` returns True."""

    # Of the class until they change: a try that is granted at once changes few of them.
    waiter: Waiter | None = None
    wait: float = 0.0
    place: int = -1  # how many waiters stand before this one
    moved: float = 0.0  # when that was seen to change
    joined: tuple[int, float] = 0, 0.0  # the first place in the queue, and when
    fresh_until: float = 0.0  # until then its ticket needs no renewal
    created: bool = False
    last: Op[Any] | None = None  # what was sent last
    was_denied: bool = False
    hurried: bool = False
    denied_by: bytes | None = None
    granted: weakref.ref[L] | None = None  # weak: a traceback may keep this object
    in_doubt: bool = False  # what was asked for may have been granted
    overtook: bool = False
    queued: bool = False
    note_at: float = 0.0
    noted: bool = False
    began: float = 0.0  # set where a listener may be told of the wait
    took: float = 0.0  # when `take` was sent, whose answer decided nothing

    def __init__(
        self,
        runtime: Runtime,
        options: LockOptions,
        timeout: float | None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.runtime = runtime
        self.options = options
        self.deadline = None if timeout is None else clock() + timeout
        self.stop = stop
        if timeout == 0:
            # One try has the time of any operation, for connecting too.
            self.deadline, self.stop = None, _at_once
        if _observe.listeners:
            self.began = clock()
        self.pid: int = os.getpid()
        self.asking: Asking = new_asking(options.metadata)

    def _ask_afresh(self) -> None:
        self.pid = os.getpid()
        self.asking = new_asking(self.options.metadata)
        self.granted = None
        self.in_doubt = self.overtook = self.queued = False

    def take(self) -> Op[Granted | Denied | None] | None:
        """What mostly grants a lock, to be sent without a flow; None where `flow` asks otherwise."""
        options = self.options
        if options.fair or options.contended or options.slots is not None:
            return None
        self.took, self.in_doubt = clock(), True
        self.last = op = options.sql.take(options.keys[0], self.asking, options.ttl)
        return op

    def taken(self, reply: Granted | Denied | None) -> L | None:
        """The lease by its answer; None where `flow` goes on."""
        if isinstance(reply, Granted):
            sent_at, self.took = self.took, 0.0
            return self._trusted(reply, sent_at)
        self.overtook = getattr(self.last, "retries", 0) > 0
        return None

    def flow(self) -> Flow[L | None]:
        """Try, and wait, until granted; None when the time has passed."""
        lease: L | None = None
        runtime, options = self.runtime, self.options
        try:
            while True:
                try:
                    lease, reply = yield from self.once()
                except PgkvError:
                    if not self.was_denied or self.left() != 0 or not self.hurried:
                        raise
                    break  # no connection came free in time for a last look
                if lease is not None:
                    return lease
                if self._is_over():
                    break
                if options.notify and (self.waiter is None or runtime.has_moved(self.waiter)):
                    if self.waiter is not None:
                        runtime.unsubscribe(self.waiter, granted=False)
                    payload = options.sql.payload(options.keys[0])
                    self.waiter = yield from call(runtime.subscribe, LockWaiters, payload)
                    continue  # it may have been freed before we listened
                if not options.fair:
                    self._note()
                yield from runtime.wait(self.waiter, self.pause(reply))
                if self.stop is not None and self.stop():
                    break
        finally:
            if self.waiter is not None:
                runtime.unsubscribe(self.waiter, granted=lease is not None)
            if self.noted:
                with contextlib.suppress(RuntimeError):  # its event loop has ended
                    self._later(options.sql.leave(options.keys[0], self.asking, note=True))
        yield from self.take_back()
        if self.began:
            waited = clock() - self.began
            _observe.event("pgkv.lock.denied", lock=options.name, seconds=waited)
        return None

    def _note(self) -> None:
        """Tell `pgkv locks` from time to time that this waits, in the background: no look waits for it."""
        options, now = self.options, clock()
        if not self.note_at:
            self.note_at = now + NOTE_AFTER
        elif now >= self.note_at:
            self.note_at, self.noted, options.noted = now + NOTE_AGAIN, True, True
            self._later(options.sql.note(options.keys[0], self.asking, NOTE_TTL))

    def _later(self, op: Op[Any]) -> None:
        self.runtime.run_later(lambda: self.runtime.channel.run(self._quietly(op)))

    def is_held_here(self) -> bool:
        return read_owner(self.denied_by)[0] == self.asking.owner

    def left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - clock())

    def _is_over(self) -> bool:
        if self.deadline is not None and clock() >= self.deadline:
            return True
        return self.stop is not None and self.stop()

    def pause(self, reply: Denied) -> float:
        if self.waiter is not None and self.waiter.is_listening:
            longest = POLL_MAX if self.options.fair else NOTIFIED_MAX
            self.wait = min(max(NOTIFIED_FIRST, self.wait * POLL_GROWTH), longest)
            wait = self.wait
        elif self.options.fair:
            wait = self._pause_in_queue(reply.ahead)
        else:
            wait = self.wait = min(max(POLL_FIRST, self.wait * POLL_GROWTH), POLL_MAX)
        seconds = uniform(wait / 2, wait)  # noqa: S311  # a pause, no secret
        if reply.remaining > 0:
            # Waiters that look in the same instant would meet each time.
            beyond = uniform(0.0, BEYOND_EXPIRY)  # noqa: S311  # as above
            seconds = min(seconds, reply.remaining + beyond)
        left = self.left()
        return seconds if left is None else min(seconds, left)

    def _pause_in_queue(self, ahead: int) -> float:
        """A part of the time in which the queue reaches this waiter, at the speed that it had so far.
        While it stands still its waiters look ever more seldom, whatever their place: it may go on
        as fast as before."""
        now = clock()
        if ahead != self.place:
            if not ahead < self.place:
                self.joined = ahead, now
            self.place, self.moved = ahead, now
        first, since = self.joined
        turn = (self.moved - since) / (first - ahead) if ahead < first else TURN_FIRST
        stalled = min((now - self.moved) * STALL_SHARE, STALL_MAX)
        return min(max(turn * max(ahead, 0.5) / LOOKS, stalled, LOOK_MIN), QUEUE_MAX)

    def once(self) -> Flow[tuple[L | None, Denied]]:
        """Ask. A grant that leaves no time to trust it is asked for again, by the same nonce."""
        options = self.options
        for _ in range(LATE_MAX):
            if os.getpid() != self.pid:
                self._ask_afresh()  # a forked child: what was asked for is its parent's
            took, self.took = self.took, 0.0
            sent_at = took or clock()
            self.in_doubt = True
            reply = yield from self.ask(sent_at, self.seconds(), took=took > 0)
            if isinstance(reply, Denied):
                # A statement that was sent again may have overtaken the one whose answer was lost.
                self.overtook = self.overtook or getattr(self.last, "retries", 0) > 0
                self.in_doubt = self.overtook
                self.was_denied, self.denied_by = True, reply.holder or self.denied_by
                options.contended = True
                if reply.holder == self.asking.row and reply.remaining <= 0:
                    # Granted, and ended by force before we heard of it.
                    yield from self._leave_queue()
                    self._ask_afresh()
                    continue
                return None, reply
            repeated: int = getattr(self.last, "retries", 0)
            others = [key for key in options.keys if key != reply.key] if repeated else []
            if others:
                # The sending whose answer was lost may be granted another slot.
                yield from self._quietly(*options.sql.take_back(others, self.asking))
            if (lease := self._trusted(reply, sent_at)) is not None:
                return lease, _IN_FLIGHT
        _observe.warning("pgkv.lock.late_grant", lock=options.name, ttl=options.ttl)
        yield from self.take_back()
        self._ask_afresh()
        return None, _IN_FLIGHT

    def _trusted(self, reply: Granted, sent_at: float) -> L | None:
        """The lease of a grant, unless it leaves no time to trust it."""
        options = self.options
        if clock() >= sent_at + options.ttl - margin_of(options.ttl):
            return None
        if self.queued:
            self.queued = False
        runtime, owner = self.runtime, self.asking.owner
        lease: L = runtime.watch(
            options.kind(runtime, options, reply.key, reply.token, owner, sent_at)
        )
        self.granted = weakref.ref(lease)
        options.contended = False
        if random() < CLEAN_CHANCE:  # noqa: S311  # a sample, no secret
            # In a thread or task that nothing waits for.
            runtime.run_later(lambda: runtime.channel.run(clean(options), CLEAN_TIME))
        if self.began:
            waited = clock() - self.began
            _observe.event("pgkv.lock.acquired", lock=options.name, seconds=waited)
        return lease

    def seconds(self) -> float:
        """The time for one statement: a grant older than its ttl is of no use."""
        seconds = min(self.runtime.timeout, max(self.options.ttl, 5.0))
        left = self.left()
        if left is None:
            is_try = self.stop is _at_once
            is_busy = is_try and self.runtime.channel.is_exhausted()
            return min(seconds, BUSY_TIME) if is_busy else seconds
        self.hurried = self.runtime.channel.is_exhausted()
        return min(seconds, max(left, ROUND_TRIP if self.hurried else ANSWER_TIME))

    def ask(self, sent_at: float, seconds: float, *, took: bool = False) -> Flow[Granted | Denied]:
        """Send the statements that grant, the likeliest to answer first. `took`: without the first."""
        options, sql = self.options, self.options.sql
        lock_timeout = min(margin_of(options.ttl) / 2, MARGIN_MIN)
        key = options.keys[0]
        try:
            if isinstance(sql, SemaphoreStatements):
                return (yield from self._ask_slot(sql, seconds, lock_timeout))
            if options.fair:
                makers = [sql.turn] * (self.queued and sent_at < self.fresh_until)
            elif took:
                makers = [sql.look]
                seconds = max(seconds - (clock() - sent_at), ROUND_TRIP)
            else:
                makers = [sql.look] * options.contended + [sql.take, sql.look]
            for make in makers:
                self.last = step = make(key, self.asking, options.ttl)
                reply = yield from do_within(self.runtime, step, seconds)
                if reply is not None:
                    return reply
                self.overtook = self.overtook or getattr(step, "retries", 0) > 0
                seconds = max(seconds - (clock() - sent_at), ROUND_TRIP)
            if options.fair:
                self.queued, self.fresh_until = True, sent_at + TICKET_FRESH
                op = sql.grant_fair(key, self.asking, options.ttl, lock_timeout, TICKET_TTL)
            else:
                op = sql.grant(key, self.asking, options.ttl, lock_timeout)
            self.last = op
            return (yield from do_within(self.runtime, op, seconds))
        except TableNotFoundError:
            # The engine creates the statement's own table; this creates the queue's.
            if self.created or not options.fair or not sql.tickets.auto_create:
                raise
            self.created = True
            yield from call(self.runtime.channel.create_missing_table, sql.tickets)
            return (yield from self.ask(sent_at, seconds))
        except PgkvError as error:
            if self.is_locked(error):
                return _IN_FLIGHT
            raise

    def is_locked(self, error: PgkvError) -> bool:
        """Whether a statement failed as its row was locked for all of its time; or what else the error
        says of the grant is noted."""
        if error._sqlstate == "55P03":
            return True
        if not error.outcome_unknown and not getattr(self.last, "retries", 0):
            self.in_doubt = self.overtook  # nothing was sent, or it was refused
        return False

    def _ask_slot(
        self, sql: SemaphoreStatements, seconds: float, lock_timeout: float
    ) -> Flow[Granted | Denied]:
        options, runtime = self.options, self.runtime
        while True:
            grant = sql.grant_slot(options.keys, self.asking, options.ttl, lock_timeout)
            self.last = grant
            reply = yield from do_within(runtime, grant, seconds)
            if not isinstance(reply, Undefined):
                return reply
            found = reply.slots
            if found is None or options.resize:
                op = sql.define(options.keys, resize=found is not None)
                found = yield from do_within(runtime, op, seconds)
            if found != options.slots:
                raise ConfigError(
                    f"the semaphore {options.name!r} has {found} slots, not {options.slots}; give "
                    "all its users the same number, or change it with resize=True"
                )

    # -- what a failure may leave behind

    def take_back(self) -> Flow[None]:
        """End what was granted without a caller that knows of it, now or in a moment, and leave
        the queue."""
        lease = None if self.granted is None else self.granted()
        if lease is not None:
            self.runtime.forget(lease)
            lease._end()
        if os.getpid() != self.pid:
            return
        options, sql = self.options, self.options.sql
        if self.in_doubt:
            yield from self._quietly(*sql.take_back(options.keys, self.asking))
            if self.queued:
                yield from self._quietly(*sql.leave_in_doubt(options.keys[0], self.asking))
        else:
            yield from self._leave_queue()
        self.in_doubt = self.queued = False

    def _leave_queue(self) -> Flow[None]:
        if self.queued:
            self.queued = False
            yield from self._quietly(self.options.sql.leave(self.options.keys[0], self.asking))

    def _quietly(self, *ops: Op[Any]) -> Flow[None]:
        for op in ops:
            try:
                yield from do_within(self.runtime, op, CLEAN_UP_TIME)
            except PgkvError as error:
                # It ends by its ttl, as everything here does.
                _observe.debug("pgkv.lock.clean_up_failed", error=type(error).__name__)


_IN_FLIGHT = Denied(None, 0.0)


def granted(lease: L | None, acquisition: Acquisition[L], timeout: float | None) -> L:
    """Return the lease that acquire() waited for, or raise LockTimeoutError.

    A function of its own: an error met on the way keeps the frames it passed through until the
    collector comes, and a lease that they hold would not be noticed as abandoned."""
    if lease is not None:
        return lease
    options = acquisition.options
    what = "lock" if options.slots is None else f"semaphore of {options.slots}"
    waited = "at once" if not timeout else f"within {timeout:g} s"
    why = "it is held; holder() and `pgkv locks` show the holder"
    if acquisition.is_held_here():
        why = "this process holds it already, and a second acquire waits like any other"
    raise LockTimeoutError(f"the {what} {options.name!r} was not granted {waited}: {why}")


# -- holding -------------------------------------------------------------------------------


def release(runtime: Runtime, lease: LeaseState) -> Flow[bool]:
    """End the lease; whether it was still held. After a failure it may be called again."""
    ending = begin_release(runtime, lease)
    return ending is not None and end_release(lease, ending, (yield from do(ending.op)))


class Ending(NamedTuple):
    """A release: its statement, and whether the lease was trusted before."""

    op: Op[bool]
    trusted: bool


def begin_release(runtime: Runtime, lease: LeaseState) -> Ending | None:
    """What comes before the statement that ends a lease; None where there is nothing to end."""
    if lease._reason == "released" or lease._is_inherited():
        return None
    trusted = not lease.is_lost
    with lease._state:
        lease._ending = True
    # First, or a renewal would outlive its lease.
    runtime.forget(lease)
    op = lease._options.sql.release(lease._key, lease._token, lease._options.notify)
    return Ending(op, trusted)


def end_release(lease: LeaseState, ending: Ending, released: bool) -> bool:
    """What comes after it: whether the lease was still held."""
    lease._end()
    if _observe.listeners:
        _observe.event("pgkv.lock.released", lock=lease.name, seconds=clock() - lease._began)
    # Asked twice because the first answer was lost: then that was the one that ended it.
    return released or (ending.trusted and getattr(ending.op, "retries", 0) > 0)


def leave(runtime: Runtime, lease: LeaseState, *, failed: bool) -> Flow[None]:
    """The end of a ``with`` block: release, and say so if the lease did not last, unless the block
    itself `failed`: its error must not be masked."""
    if lease._reason == "released":
        return
    was_lost = lease.is_lost
    released = True
    try:
        released = yield from release(runtime, lease)
    except PgkvError as error:
        # The work is done and was covered: the lease ends by itself, a little later.
        _observe.warning(
            "pgkv.lock.release_failed",
            lock=lease.name,
            ttl=lease.ttl,
            error=type(error).__name__,
            detail=str(error),
        )
    if failed:
        return
    if not was_lost and not released:
        lease._reason = "replaced"
        was_lost = True
    if was_lost:
        raise lease._lost_error()


def holder(options: LockOptions) -> Flow[LockInfo | None]:
    rows = yield from do(options.sql.holder(options.keys[0]))
    return rows[0] if rows else None


def force_release(options: LockOptions, token: int) -> Flow[bool]:
    op = options.sql.release(options.keys[0], token, options.notify)
    if (yield from do(op)):
        return True
    repeated: int = getattr(op, "retries", 0)
    return repeated > 0 and (yield from do(options.sql.ended(options.keys[0], token)))


def revoke(options: LockOptions, token: int) -> Flow[bool]:
    try:
        return (yield from do(options.sql.revoke(options.keys[0], token)))
    except PgkvError as error:
        if error._sqlstate == "55P03":
            raise ConflictError(
                f"the lease on {options.name!r} is guarded by an open transaction; it ends with that "
                "(`pgkv locks` shows it), or try again"
            ) from error
        raise


def clean(options: LockOptions) -> Flow[None]:
    """Remove old names, and the tickets of dead waiters, of one chunk of the table.

    The first chunk tells how many there are, and often is the only one; of more, another one at
    random: short-lived processes must reach all of them.
    """
    sql = options.sql
    for chunk in (sql.clean, sql.clean_tickets) if options.fair or options.noted else (sql.clean,):
        try:
            pages = yield from do(chunk(0))
            if pages > CLEAN_PAGES:
                yield from do(chunk(randrange(CLEAN_PAGES, pages, CLEAN_PAGES)))  # noqa: S311  # no secret
        except PgkvError as error:
            _observe.debug("pgkv.lock.clean_failed", error=type(error).__name__)


# -- guarding ------------------------------------------------------------------------------
#
# guard() locks the lease's row FOR KEY SHARE in the caller's transaction. A renewal passes that; a
# takeover, which locks the row FOR UPDATE, does not.


def check_guarded(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Refuse a connection on which a guard would protect nothing."""
    idle = conn.pgconn.transaction_status == pq.TransactionStatus.IDLE
    if conn.autocommit and idle:
        raise TransactionError(
            "guard() needs an open transaction: in autocommit it would end with its own "
            "statement; write `with conn.transaction(): lease.guard(conn); ...`"
        )


def guard(
    lease: LeaseState, theirs: Callable[[Op[Any]], Any], max_hold: float | None
) -> Flow[None]:
    """Protect the caller's transaction, in which `theirs` performs an operation."""
    lease.check()
    options = lease._options
    if options.place is None:
        options.place = yield from do(options.sql.place())
    place = options.place
    if place is None:
        lease._lose("gone")
        raise lease._lost_error()
    op = options.sql.guard(place.quoted, lease._key, lease._token, max_hold)
    try:
        found = yield from call(theirs, op)
    except TableNotFoundError as error:
        raise TransactionError(_elsewhere(place)) from error
    except PgkvError as error:
        if error._sqlstate == "40001":
            lease._lose("replaced")
            raise lease._lost_error() from error
        if error._sqlstate == "25006":
            raise TransactionError(
                "guard() needs a transaction that may write: a read-only one cannot lock the lease"
            ) from error
        raise
    if not found:
        yield from _explain(lease, theirs, place)


def _explain(lease: LeaseState, theirs: Callable[[Op[Any]], Any], place: Place) -> Flow[None]:
    """Why the guard saw no such lease."""
    sql = lease._options.sql
    there = yield from call(theirs, sql.place(place.quoted))
    here = yield from do(sql.place(place.quoted))
    if there is None or (here is not None and there.identity != here.identity):
        raise TransactionError(_elsewhere(place))
    level = yield from call(theirs, sql.isolation())
    if level != "read committed":
        rows = yield from do(sql.holder(lease._key))
        if rows and rows[0].token == lease._token:
            raise TransactionError(
                f"the lease on {lease.name!r} is held, but this {level} transaction's snapshot is "
                "older than its last renewal: call guard() first in the transaction"
            )
    lease._lose("replaced" if here is not None else "gone")
    raise lease._lost_error()


def _elsewhere(place: Place) -> str:
    return (
        f"guard() got a connection to another database than the lock's: {place.quoted} there is not "
        "the same table; guard with a connection to the database that the store uses"
    )
