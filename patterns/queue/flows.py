"""What queues do, each algorithm once for sync and async: put, take, end a run, and wait for work.

The statements are in `sql`. What a job's holder knows of its lease is in `_runtime/lease.py`, as for
locks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from random import uniform
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from ... import _observe
from ..._background.renewal import clock
from ..._engine.flows import all_of
from ..._fork import new_lock
from ..._observe import shown
from ..._ops import codec as _codec
from ..._ops.op import Flow, call, do
from ..._ops.serialize import Serializer
from ...config import Seconds
from ...errors import (
    ConflictError,
    InvalidValueError,
    LeaseLostError,
    OperationTimeoutError,
    PgkvError,
)
from .._runtime.lease import Held
from .._runtime.runtimes import Runtime
from .._runtime.wakeup import Waiter, Waiters
from .sql import (
    CHANNEL,
    FIRST,
    NEVER,
    PRIORITIES,
    STATES,
    Due,
    JobInfo,
    JobStatements,
    Look,
    QueueStats,
    Taken,
    due_params,
)

T = TypeVar("T")

POLL, POLL_NOTIFIED = 1.0, 5.0  # seconds between looks at an empty queue; jittered down by half
NOTIFY_PAUSE = 0.05  # seconds between two notifications of a process about a queue
LOOK_ALL_PAUSE, LOOK_ALL_SHARE = 1.0, 20  # seconds, and times its own length, between full looks
# Another take may have locked the only job that a look saw, and left one that was put a moment later.
LOOK_AGAIN = 0.01  # seconds from the first look to the second; twice as long to each one after it
FAILED_MAX = 3.0  # seconds that count of a full look that was not answered in time
LATE_US = 250_000  # within which a put may commit late and is found without a full look
CHUNK_ROWS, CHUNK_BYTES = 1000, 8 * 1024 * 1024  # of put_many's statements
ERROR_MAX = 1000  # characters of a failure that are kept
# Seconds for each statement that puts back what a cancelled take has, and for all.
CLEAN_UP = 1.0, 3.0
REFUSAL = (
    "jobs are put and acknowledged, but not taken, inside a transaction: take them with the queue "
    "itself, then acknowledge them with queue.using(conn).ack(job)"
)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a failed job waits for its next attempt: `first` seconds after the first, each time
    `factor` times longer, at most `max`. A random part, up to half, is taken off.

    Args:
        first: seconds.
        factor: 1 or more.
        max: seconds.
    """

    first: Seconds = 1
    factor: float = 2
    max: Seconds = 3600

    def __post_init__(self) -> None:
        for name in ("first", "max"):
            _codec.seconds(getattr(self, name), name, zero=True, endless="")
        if not 1 <= self.factor <= 100:
            raise InvalidValueError("factor must be a number from 1 to 100")

    def seconds(self, attempt: int) -> float:
        """Return the seconds to wait after an attempt.

        Args:
            attempt: from 1.
        """
        first, longest = (_codec.seconds(each, zero=True) for each in (self.first, self.max))
        wait = min(first * self.factor ** min(attempt - 1, 100), longest)
        return uniform(wait / 2, wait)  # noqa: S311  # a pause, no secret


class Later(Exception):  # noqa: N818  # no failure
    """Raised by a worker's function: the job is put back, and the attempt does not count.

    Args:
        delay: seconds until it is due.
    """

    def __init__(self, delay: Seconds = 0) -> None:
        super().__init__(delay)
        self.delay: float = _codec.seconds(delay, "delay", zero=True, endless="")


class Bury(Exception):  # noqa: N818  # as above
    """Raised by a worker's function: the job is given up, and kept with this text."""


class Put(NamedTuple):
    """What became of a put.

    Attributes:
        id: the job's.
        outcome: ``"new"``; with a dedupe key also ``"waiting"`` (a job of the key waits already, and
            runs after this put, as it is) or ``"again"`` (one runs, and will run once more, with this
            payload).
    """

    id: int
    outcome: str = "new"


class JobWaiters(Waiters):
    """Those who wait for jobs: a put wakes all of a process, for it may tell of many jobs."""

    channel: ClassVar[str] = CHANNEL.decode()
    wakes_all = True


class Marks:
    """From where a queue is looked through: for each priority a due time, before which all jobs are
    likely to be finished.

    Index entries of finished jobs stay while any old snapshot is open, and reading over them would
    make takes slower and slower. What a mark hides (a job whose worker died, a put that committed
    late, a clock set back) is found by full looks, which take a twentieth of the time at most.
    """

    def __init__(self) -> None:
        self.size: int = 0  # of the table
        self._at = dict.fromkeys(PRIORITIES, FIRST)
        self._full_from = 0.0

    def ask(self) -> tuple[list[int], bool]:
        """The marks for the next look, and whether it is a full one."""
        if clock() < self._full_from:
            return list(self._at.values()), False
        self._full_from = clock() + LOOK_ALL_PAUSE  # one at a time
        return [FIRST] * len(self._at), True

    def rest(self, seconds: float) -> None:
        """Let no full look begin for a while after one that took that long."""
        self._full_from = clock() + max(LOOK_ALL_PAUSE, LOOK_ALL_SHARE * seconds)

    def note(self, look: Look, n: int, full: bool, seconds: float) -> None:
        """Take note of what a look for `n` jobs found."""
        if full:
            self.rest(seconds)
        self.size = look.size
        # Of a priority that was looked through nothing is left before this moment; of one that
        # was not, the next job is at the last one's time or later, also where that lies behind.
        # But a put that overtook another is seen first.
        late = look.now - LATE_US
        through = -1 if len(look.jobs) < n else look.jobs[-1].priority
        for job in look.jobs:
            if job.due_at != NEVER:
                self._at[job.priority] = min(job.due_at, late)
        for priority in PRIORITIES:
            if priority > through:
                self._at[priority] = max(self._at[priority], late)


class Notifier:
    """Notifies of a queue's puts, in a statement of its own: of the first at once, of those within
    the next NOTIFY_PAUSE together. NOTIFY inside each put would make puts wait for each other."""

    def __init__(self, runtime: Runtime, options: QueueOptions) -> None:
        self._runtime = runtime
        self._options = options
        self._lock = new_lock(self)
        self._resting = self._wanted = False

    def tell(self) -> None:
        """Let other processes know of a put, soon."""
        with self._lock:
            self._wanted = True
            if self._resting:
                return
            self._resting, self._wanted = True, False
        loop = self._runtime.background().loop

        def sent() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(loop.call_later, NOTIFY_PAUSE, self._rested)

        if not self._runtime.run_later(lambda: self._runtime.channel.run(self._send()), sent):
            self._resting = False  # too much to do: the queue is looked at all the same

    def _rested(self) -> None:
        with self._lock:
            self._resting = False
            wanted = self._wanted
        if wanted:
            self.tell()

    def _send(self) -> Flow[None]:
        try:
            yield from do(self._options.sql.notify(self._options.key))
        except PgkvError as error:
            _observe.debug("pgkv.queue.notify_failed", error=type(error).__name__)


@dataclass(slots=True)
class QueueOptions:
    """What a queue was made with."""

    name: str
    key: bytes  # the name as the table has it
    sql: JobStatements
    inside: JobStatements  # for a caller's transaction
    lease: float
    max_attempts: int
    backoff: Backoff
    notify: bool
    size_max: int  # bytes of a payload
    key_max: int  # bytes of a dedupe key
    made: type[HeldJob[Any]]  # the class of its jobs
    serializer: Serializer[Any] | None = None
    marks: Marks = field(default_factory=Marks)

    def encode(self, payload: Any) -> bytes:
        """A payload's bytes, checked."""
        if self.serializer is not None:
            payload = self.serializer.encode(self.name, payload)
        elif not isinstance(payload, bytes | bytearray | memoryview | str):
            raise InvalidValueError(
                f"a payload must be bytes or str, not {type(payload).__name__}; use queue.typed(...) "
                "for other types"
            )
        return _codec.encode_value(payload, self.size_max)


class HeldJob(Held, Generic[T]):
    """What `Job` and `AsyncJob` share; `sent_at` is `clock()` before it was taken."""

    _lost_because: ClassVar[dict[str, str]] = {
        "expired": "its lease passed before a renewal got through",
        "replaced": "its lease had ended, and it was taken by another",
        "broken": "it was put back or buried",
        "gone": "it is finished or was removed",
        "forked": "it belongs to the parent process",
        "closed": "its store was closed",
        "ended": "it was acknowledged or put back",
    }
    _noun = "the job"
    _way_out = "; stop the work: the job is done again elsewhere"

    def __init__(self, runtime: Any, options: QueueOptions, taken: Taken, sent_at: float) -> None:
        super().__init__(runtime, options.sql, taken.id, taken.token, options.lease, sent_at)
        self._options = options
        self._taken = taken

    @property
    def name(self) -> str:
        """The queue's name and the job's id, as messages have them."""
        return f"{self._options.name} {self._taken.id}"

    @property
    def id(self) -> int:
        """The job's number, as `Queue.put` returned it."""
        return self._taken.id

    @property
    def queue(self) -> str:
        """The name of its queue."""
        return self._options.name

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self._taken.attempt

    @property
    def token(self) -> int:
        """Greater than that of every earlier attempt of this job. Pass it to what the job writes to,
        and have that refuse lower ones."""
        return self._taken.token

    @property
    def dedupe(self) -> str | None:
        """The key that it was put with."""
        return self._taken.dedupe

    @property
    def payload(self) -> T:
        """What was put, of the queue's type.

        Raises:
            SerializationError: it does not fit the type.
        """
        raw, serializer = self._taken.payload, self._options.serializer
        return raw if serializer is None else serializer.decode(self.name, raw)  # type: ignore[return-value]  # bytes where nothing else was asked for

    @shown
    def __repr__(self) -> str:
        left = self._until - clock()
        state = self._reason or (f"{left:.1f} s left" if left > 0 else "expired")
        return f"{self._options.name!r} id={self.id} attempt={self.attempt}, {state}"

    def _back(self, *how: Any, **which: bool) -> Any:
        return self._runtime.channel.run(put_back(self._runtime, self, *how, **which))

    def _signal(self, context: dict[str, Any]) -> None:
        _observe.warning("pgkv.queue.lost", queue=self.queue, job=self.id, **context)

    @classmethod
    def _renewal_failed(cls, count: int, context: dict[str, Any]) -> None:
        _observe.warning("pgkv.queue.renewal_failed", jobs=count, **context)

    @classmethod
    def _abandoned(cls, name: str) -> None:
        _observe.warning("pgkv.queue.abandoned", job=name)


# -- putting -------------------------------------------------------------------------------


def put(
    options: QueueOptions,
    sql: JobStatements,
    told: Notifier | None,
    payload: Any,
    dedupe: str | None,
    due: tuple[Seconds, datetime | None, int],
) -> Flow[Put]:
    """Put one job; `due` is delay, at and priority."""
    key = None if dedupe is None else _codec.encode_key(dedupe, b"", options.key_max, "dedupe key")
    when = _due(options, *due)
    answer = yield from do(
        sql.put(options.key, options.encode(payload), when, key, options.marks.size)
    )
    if told is not None:
        told.tell()
    if key is None:
        return Put(answer[0])
    options.marks.size = answer[2]
    return Put(*answer[:2])


def put_many(
    options: QueueOptions,
    sql: JobStatements,
    told: Notifier | None,
    payloads: Iterable[Any],
    due: tuple[Seconds, datetime | None, int],
) -> Flow[list[int]]:
    """Put many jobs, all or none."""
    encoded = [options.encode(payload) for payload in payloads]
    when = _due(options, *due)
    cuts = _codec.chunks(encoded, [len(each) for each in encoded], CHUNK_ROWS, CHUNK_BYTES)
    ops = [sql.put_many(options.key, encoded[cut], when) for cut in cuts]
    answers = yield from all_of(ops)
    if told is not None and ops:
        told.tell()
    return [each for ids in answers for each in ids]


def _due(options: QueueOptions, delay: Seconds, at: datetime | None, priority: Any) -> Due:
    if at is not None and delay != 0:
        raise InvalidValueError("give delay or at, not both")
    if not isinstance(priority, int) or isinstance(priority, bool) or priority not in PRIORITIES:
        raise InvalidValueError(f"priority must be an int from 0 to 9, 9 first, not {priority!r}")
    moment = None if at is None else _codec.encode_moment(at, "at")
    seconds = _codec.seconds(delay, "delay", zero=True, endless="")
    return due_params(seconds, moment, priority, options.max_attempts)


# -- taking --------------------------------------------------------------------------------


def look(runtime: Any, options: QueueOptions, n: int) -> Flow[tuple[list[Any], float]]:
    """Take up to `n` jobs that are due; and the seconds until the next look is worth it.

    A cancellation waits for the answer, and then puts back what was taken: a job whose answer is lost
    is leased, and nothing works on it.
    """
    jobs: list[Any] = []
    full, sent_at = False, clock()

    def note(found: Look) -> None:
        options.marks.note(found, n, full, clock() - sent_at)
        for job in found.jobs:
            if job.due_at == NEVER:
                _observe.warning("pgkv.queue.dead", queue=options.name, job=job.id)
            else:
                jobs.append(options.made(runtime, options, job, sent_at))
                runtime.watch(jobs[-1])

    try:
        while True:
            marks, full = options.marks.ask()
            sent_at = clock()
            op = options.sql.take(options.key, marks, n, options.lease, options.marks.size)
            found: Look = yield from call(runtime.finish, op, note)
            if jobs or not found.jobs:
                break
    except GeneratorExit:
        raise
    except BaseException as error:
        if full and isinstance(error, OperationTimeoutError):
            options.marks.rest(min(clock() - sent_at, FAILED_MAX))  # the next ones go by the marks
        yield from give_back(runtime, jobs)
        raise
    poll = POLL_NOTIFIED if options.notify else POLL
    poll = uniform(poll / 2, poll)  # noqa: S311  # a pause, no secret
    return jobs, poll if found.next_due is None else min(poll, found.next_due)


def give_back(runtime: Any, jobs: list[Any]) -> Flow[None]:
    """Put back jobs that were taken and not begun. What cannot be put back waits for its lease's end."""
    if jobs:
        with contextlib.suppress(PgkvError, TimeoutError):
            yield from call(runtime.clean_up, partial(_give_back, runtime, jobs), *CLEAN_UP)


def _give_back(runtime: Any, jobs: list[Any]) -> Flow[None]:
    while jobs:
        yield from put_back(runtime, jobs.pop(), free=True)


def take(runtime: Any, options: QueueOptions, n: int, timeout: float | None) -> Flow[list[Any]]:
    """Take up to `n` jobs; wait for the first for that long, or (None) without end."""
    deadline = None if timeout is None else clock() + timeout
    waiter: Waiter | None = None
    jobs: list[Any] = []
    soon = LOOK_AGAIN
    try:
        while True:
            jobs, pause = yield from look(runtime, options, n)
            pause, soon = min(pause, soon), soon * 2
            left = pause if deadline is None else deadline - clock()
            if jobs or left <= 0:
                return jobs
            if options.notify and (waiter is None or runtime.has_moved(waiter)):
                if waiter is not None:
                    runtime.unsubscribe(waiter, granted=False)
                payload = options.sql.payload(options.key)
                waiter = yield from call(runtime.subscribe, JobWaiters, payload)
                continue  # a job may have been put before we listened
            if waiter is not None and not waiter.is_listening:
                pause = min(pause, POLL)
            yield from runtime.wait(waiter, min(pause, left))
    finally:
        if waiter is not None:
            runtime.unsubscribe(waiter, granted=bool(jobs))


# -- ending a run --------------------------------------------------------------------------


def ack(runtime: Any, job: HeldJob[Any], sql: JobStatements) -> Flow[None]:
    """End a job for good; `sql` also inside a caller's transaction, which may yet undo it."""
    size = job._options.marks.size
    op = sql.ack(job.id, job.token, deduped=job.dedupe is not None, size=size)
    outcome = yield from _end(runtime, job, op, is_final=not sql.inside)
    if outcome == "lost":
        job._reason = "replaced"
        raise job._lost_error()


def put_back(
    runtime: Any,
    job: HeldJob[Any],
    error: object = None,
    delay: Seconds | None = None,
    *,
    free: bool = False,
    dead: bool = False,
) -> Flow[bool]:
    """End a run without success; whether the job was still held. `free`: without counting as an attempt."""
    if delay is None:
        wait = 0.0 if free else job._options.backoff.seconds(job.attempt)
    else:
        wait = _codec.seconds(delay, "delay", zero=True, endless="")
    text = None if error is None else str(error)[:ERROR_MAX]
    options = job._options
    op = options.sql.put_back(
        job.id, job.token, text, delay=wait, free=free, dead=dead, size=options.marks.size
    )
    outcome = yield from _end(runtime, job, op, is_final=True)
    if outcome == "dead":
        _observe.warning("pgkv.queue.dead", queue=job.queue, job=job.id)
    return outcome != "lost"


def _end(runtime: Any, job: HeldJob[Any], op: Any, *, is_final: bool) -> Flow[str]:
    """Perform what ends a run. After a failure it may be repeated."""
    if job._reason == "ended" or job._is_inherited():
        raise job._lost_error()
    trusted = not job.is_lost
    with job._state:
        job._ending = True
    if is_final:
        runtime.forget(job)  # first, or a renewal would outlive its lease
    outcome: str = yield from do(op)
    if outcome == "lost" and trusted and getattr(op, "retries", 0) > 0:
        outcome = "done"  # by the sending whose answer was lost
    if is_final:
        job._reason = "ended"
    elif outcome != "lost":
        runtime.watch(job)  # on: after a rollback it is still held
    return outcome


def leave(runtime: Any, job: HeldJob[Any], error: BaseException | None) -> Flow[None]:
    """The end of a ``with`` block: acknowledge the job, or put it back. One that was acknowledged
    inside a transaction is gone if that was committed."""
    if job._reason == "ended":
        return
    inside = job._ending
    if error is None:
        try:
            yield from ack(runtime, job, job._options.sql)
        except LeaseLostError:
            if not inside:
                raise
    elif isinstance(error, Bury):
        yield from put_back(runtime, job, error, 0, dead=True)
    elif isinstance(error, Later) or not isinstance(error, Exception):
        # Those that are no Exception interrupt or cancel: not the job's fault.
        yield from put_back(runtime, job, None, getattr(error, "delay", 0), free=True)
    else:
        yield from put_back(runtime, job, f"{type(error).__name__}: {error}")


def ack_many(runtime: Any, jobs: list[Any]) -> Flow[list[Any]]:
    """End jobs for good; return those that were no longer held."""
    lost = []
    plain = {job.id: job for job in jobs if job.dedupe is None}
    for job in jobs:
        if job._reason == "ended" or job._is_inherited():
            raise job._lost_error()
    for cut in range(0, len(plain), CHUNK_ROWS):
        chunk = list(plain.values())[cut : cut + CHUNK_ROWS]
        for job in chunk:
            with job._state:
                job._ending = True
            runtime.forget(job)
        op = chunk[0]._options.sql.ack_many([(job.id, job.token) for job in chunk])
        trusted = {job.id for job in chunk if not job.is_lost}
        done = {*(yield from do(op))}
        if getattr(op, "retries", 0) > 0:
            done |= trusted
        for job in chunk:
            job._reason = "ended"
            if job.id not in done:
                lost.append(job)
    for job in jobs:
        if job.dedupe is not None:
            try:
                yield from ack(runtime, job, job._options.sql)
            except LeaseLostError:
                lost.append(job)
    return lost


# -- looking after a queue -----------------------------------------------------------------


def stats(options: QueueOptions) -> Flow[QueueStats]:
    """The jobs of a queue by state."""
    found = yield from do(options.sql.stats(options.key))
    empty = QueueStats(options.name, 0, 0, 0, 0, 0.0)
    return found[0]._replace(queue=options.name) if found else empty


def jobs(options: QueueOptions, state: str | None, limit: int) -> Flow[list[JobInfo]]:
    """A queue's jobs of one state, or of all."""
    if state not in (None, *STATES):
        raise InvalidValueError(
            f"state must be 'waiting', 'delayed', 'running', 'dead' or None, not {state!r}"
        )
    return (yield from do(options.sql.jobs(options.key, state, _codec.whole("limit", limit))))


def retry(options: QueueOptions, id: int) -> Flow[bool]:
    """Let a dead job wait again."""
    try:
        return (yield from do(options.sql.retry(options.key, _codec.integer(id, "id"))))
    except PgkvError as error:
        if error._sqlstate != "23505":
            raise
    raise ConflictError(
        f"{options.name}: another job with the dedupe key of job {id} is there already"
    )
