"""`Worker` and `AsyncWorker`: take jobs of some queues and call a function with each, a few at a time.

The loop is a flow. What threads and tasks do differently (run a job, wait for news) is in the two
crews.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, Generic, TypeVar

from ... import _observe
from ..._observe import shown
from ..._ops import codec as _codec
from ..._ops.drivers import drive, drive_async, is_set_within, shielded
from ..._ops.op import Flow, call
from ..._settings import refuse_pickle
from ...config import Seconds, require_int
from ...errors import ConfigError, PgkvError
from .._runtime.checks import named, require, require_callback
from .._runtime.wakeup import Waiter
from . import flows
from .api import AsyncJob, AsyncQueue, Job, Queue
from .flows import Bury, JobWaiters, Later, give_back

J = TypeVar("J")
Q = TypeVar("Q")

LOOK = 0.2  # seconds, at most, between looks at a stop event of threads
BUSY_PAUSE = 0.5  # seconds until the next try for a slot
RETRY_FIRST, RETRY_MAX = 0.1, 5.0  # seconds, while the database cannot be reached
FULL = 3600.0  # seconds: nothing is to be done before a job ends
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Bell(Waiter):
    """Rings when jobs of a queue were put."""

    ring: Callable[[], object]  # nothing waits for its event

    def wake(self) -> None:
        """Called in the background's loop."""
        self.ring()


class _Crew:
    """One run of a worker: its running jobs, and the news that end a wait.

    Attributes:
        running: each job, and the slot that it holds.
        stopped: it takes no more.
    """

    def __init__(self, stop: Any) -> None:
        self.running: dict[Any, Any] = {}
        self.stopped = False
        self._stop = stop

    def ring(self) -> None:
        """There is news."""
        raise NotImplementedError

    def end(self) -> None:
        """Take no more jobs. May be called by a signal's handler."""
        self.stopped = True
        self.ring()

    def is_over(self) -> bool:
        """Whether it was told to stop."""
        return self.stopped or (self._stop is not None and bool(self._stop.is_set()))


class _Labour(Generic[Q, J]):
    """What `Worker` and `AsyncWorker` share."""

    _needs: tuple[type[Any], str, str]  # as of queues

    def __init__(
        self,
        queues: Q | Iterable[Q],
        fn: Callable[[J], object],
        *,
        concurrency: int = 8,
        limit: Any = None,
        slots: Any = None,
        grace: Seconds = 30,
    ) -> None:
        self._queues: list[Any] = [*queues] if isinstance(queues, Iterable) else [queues]
        if not self._queues:
            raise ConfigError(f"{named(self._needs[1])} needs one queue at least")
        for each in self._queues:
            require(each, *self._needs)
        blocking = self._needs[1] == "Worker"
        if fn is None:
            raise ConfigError("fn must be a function of the job")
        require_callback(fn, "fn", "Worker", blocking=blocking)
        for other, what, method in ((limit, "limit", "peek"), (slots, "slots", "try_acquire")):
            found = getattr(other, method, None)
            if other is not None and inspect.iscoroutinefunction(found) == blocking:
                raise ConfigError(f"{what} must be of the same kind: for threads, or for asyncio")
        require_int("concurrency", concurrency, 1, 1000)
        self._fn = fn
        self._concurrency = concurrency
        self._limit = limit
        self._slots = slots
        self._grace = _codec.seconds(grace, "grace", zero=True, endless="")

    @shown
    def __repr__(self) -> str:
        names = ", ".join(repr(each.name) for each in self._queues)
        return f"of {names} concurrency={self._concurrency}"

    __reduce__ = refuse_pickle

    def _work(self, crew: Any) -> Flow[None]:
        """Take jobs and start them, until told to stop; then wait for those that run."""
        bells = [self._bell(crew, each) for each in self._queues if each._options.notify]
        failing = RETRY_FIRST
        try:
            while not crew.is_over():
                pause = FULL
                if len(crew.running) < self._concurrency:
                    try:
                        pause = yield from self._take(crew, self._concurrency - len(crew.running))
                        failing = RETRY_FIRST
                    except PgkvError as error:
                        if not error.retryable and not isinstance(error, TimeoutError):
                            raise
                        _observe.warning("pgkv.queue.waiting", error=type(error).__name__)
                        pause, failing = failing, min(failing * 2, RETRY_MAX)
                if pause > 0:
                    yield from call(crew.wait, pause)
            until = monotonic() + self._grace
            while crew.running and (left := until - monotonic()) > 0:
                yield from call(crew.wait_for_jobs, left)
        finally:
            for bell in bells:
                bell._waiters.remove(bell, granted=True)

    @staticmethod
    def _bell(crew: _Crew, of: Any) -> _Bell:
        waiters = of._runtime.background().part(JobWaiters)
        bell = _Bell(waiters, of._options.sql.payload(of._options.key), None)
        bell.ring = crew.ring
        waiters.add(bell)
        return bell

    def _take(self, crew: Any, room: int) -> Flow[float]:
        """Start what the first queue that has jobs gives; the seconds until the next look."""
        pause = FULL
        for each in self._queues:
            if self._limit is not None:
                seen = yield from call(self._limit.peek, each.name)
                if not seen.allowed:
                    pause = min(pause, seen.retry_after)
                    continue
            slot = None
            if self._slots is not None:
                slot = yield from call(self._slots.try_acquire)
                if slot is None:
                    return min(pause, BUSY_PAUSE)
            jobs: list[Any] = []
            try:
                one = self._limit is not None or self._slots is not None
                jobs, wait = yield from call(each._look, 1 if one else room)
                pause = min(pause, wait)
                if jobs and self._limit is not None:
                    hit = yield from call(self._limit.hit, each.name)
                    if not hit.allowed:
                        yield from call(jobs.pop().release, hit.retry_after)
            except GeneratorExit:
                raise
            except BaseException:
                yield from give_back(each._runtime, jobs)
                raise
            finally:
                if slot is not None and not jobs:
                    yield from call(slot.release)
            for job in jobs:
                crew.running[job] = slot
                crew.start(job, self._perform(job, slot))
            if jobs:
                return 0.0
        return pause

    def _perform(self, job: Any, slot: Any) -> Flow[None]:
        """Call the function with a job, and end its run by what comes of it."""
        raised: BaseException | None = None
        try:
            try:
                yield from call(self._fn, job)
            except BaseException as error:  # noqa: BLE001  # the job ends by it, and the worker goes on
                raised = error
                if isinstance(error, Exception) and not isinstance(error, Later | Bury):
                    _observe.warning(
                        "pgkv.queue.failed", queue=job.queue, job=job.id, attempt=job.attempt,
                        error=type(error).__name__,
                    )  # fmt: skip
            yield from call(job._leave, raised)
        except PgkvError as error:
            # It is given to another at its lease's end; if it was given already, that is why.
            _observe.warning(
                "pgkv.queue.end_failed", queue=job.queue, job=job.id, error=type(error).__name__
            )
        finally:
            raised = None  # its traceback holds this frame
            if slot is not None:
                with contextlib.suppress(PgkvError):  # it ends by its ttl
                    yield from call(slot.release)


class _ThreadCrew(_Crew):
    """Jobs run in threads, one each: daemons, for a job that does not end must not keep the program."""

    def __init__(self, stop: threading.Event | None) -> None:
        super().__init__(stop)
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put is reentrant

    def ring(self) -> None:
        self._news.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for news, or to be told to stop."""
        until = monotonic() + seconds
        while not self.is_over() and (left := until - monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._news.get(timeout=left if self._stop is None else min(left, LOOK))
                return

    def wait_for_jobs(self, seconds: float) -> None:
        """Wait for news."""
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=seconds)

    def start(self, job: Job[Any], work: Flow[None]) -> None:
        """Run a job's flow."""

        def run() -> None:
            try:
                drive(work)
            finally:
                self.running.pop(job, None)
                self.ring()

        threading.Thread(target=run, name=f"pgkv-job-{job.id}", daemon=True).start()

    def close(self) -> None:
        """Put back what still runs."""
        for job in list(self.running):
            with contextlib.suppress(PgkvError):
                job.release()


class _TaskCrew(_Crew):
    """Jobs run in tasks."""

    def __init__(self, stop: asyncio.Event | None) -> None:
        super().__init__(stop)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch = None if stop is None else asyncio.ensure_future(self._await_stop(stop))

    async def _await_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.ring()

    def ring(self) -> None:
        self._loop.call_soon_threadsafe(self._news.set)  # also from a signal's handler

    async def wait(self, seconds: float) -> None:
        """Wait for news."""
        await is_set_within(self._news, seconds)
        self._news.clear()

    wait_for_jobs = wait

    def start(self, job: AsyncJob[Any], work: Flow[None]) -> None:
        """Run a job's flow."""
        task = self._loop.create_task(drive_async(work))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self.running.pop(job, None)
            self.ring()

        task.add_done_callback(ended)

    async def close(self) -> None:
        """Cancel what still runs: it is put back."""
        if self._watch is not None:
            self._watch.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=flows.CLEAN_UP[1])


class Worker(_Labour[Queue[Any], Job[Any]]):
    """Takes jobs and calls a function with each, in threads.

    ::

        def send(job: pgkv.Job[bytes]) -> None: ...


        pgkv.Worker(emails, send, concurrency=8).run()

    When the function returns, its job is acknowledged; when it raises, the job is put back for its next
    attempt. ``raise pgkv.Later(60)`` puts it back without counting the attempt, ``raise
    pgkv.Bury("why")`` gives it up. A function that ended its job itself, for instance with
    ``queue.using(conn).ack(job)``, is left alone.

    Args:
        queues: a `Queue`, or several: later ones are looked at when earlier ones are empty.
        fn: called with the `Job`.
        concurrency: jobs at a time in this worker.
        limit: a `RateLimiter`: jobs of a queue begin at its rates, under the queue's name as key.
        slots: a `Semaphore`: jobs at a time in all workers that share it.
        grace: seconds that running jobs have to end after `run` was told to stop.

    Raises:
        ConfigError: a setting is wrong, or something is for asyncio.
    """

    _needs = Queue, "Worker", "AsyncWorker"

    def run(self, stop: threading.Event | None = None) -> None:
        """Work until told to stop. Then take no more, wait for `grace` seconds for what runs, and put
        the rest back. While the database is unreachable it waits.

        Args:
            stop: set it to end the run. None: SIGTERM and SIGINT end it (in the main thread), a second
                one as usual.
        """
        crew = _ThreadCrew(stop)
        with _signals(crew) if stop is None else contextlib.nullcontext():
            try:
                drive(self._work(crew))
            finally:
                crew.close()


@contextlib.contextmanager
def _signals(crew: _Crew) -> Iterator[None]:
    """Let the first signal end the run, and further ones do what they did before."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def handle(_number: int, _frame: object) -> None:
        restore()
        crew.end()

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


class AsyncWorker(_Labour[AsyncQueue[Any], AsyncJob[Any]]):
    """Takes jobs and calls an async function with each, in tasks: `Worker`, awaited.

    After `grace` the tasks that still run are cancelled, and their jobs put back.
    """

    _needs = AsyncQueue, "AsyncWorker", "Worker"

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """Work until told to stop, or cancelled; see `Worker.run`."""
        crew = _TaskCrew(stop)
        with _signals(crew) if stop is None else contextlib.nullcontext():
            try:
                await drive_async(self._work(crew))
            finally:
                await shielded(crew.close(), 2 * flows.CLEAN_UP[1])
