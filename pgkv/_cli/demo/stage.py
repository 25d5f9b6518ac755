"""A scene, and what it works with: a store, threads, and processes, of which none outlives the demo: one
ends with the pipe between them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple, TypeAlias

from ...config import Config, TtlCleanupStrategy
from ...store import Store
from .. import console

WORKERS = 8
SPAWN = multiprocessing.get_context("spawn")
ANSWER_TIMEOUT = 60.0  # seconds without any answer
END_TIMEOUT = 10.0  # seconds in which a worker ends by itself
CONNECTIONS = 20  # of one process: a scene has at most this many threads


class Size(NamedTuple):
    """How much a demo does: entries of the data set at most, and seconds of a timed scene."""

    keys: int = 400_000
    seconds: float = 3.0


class Check(NamedTuple):
    """A sentence about what was just done, and whether it holds."""

    text: str
    held: bool


Pipe: TypeAlias = "connection.Connection[Any, Any]"
Play: TypeAlias = "Callable[[Stage], Iterator[str | Check]]"


class Scene(NamedTuple):
    """One part of the demo: its heading, what is at stake, and what yields its lines and checks."""

    title: str
    stake: str
    play: Play


def scene(title: str, stake: str) -> Callable[[Play], Scene]:
    """Make a scene of the decorated function."""
    return lambda play: Scene(title, stake, play)


@dataclass(slots=True)
class Stage:
    """A store on an empty table, and what scenes leave for later ones."""

    store: Store
    settings: dict[str, Any]  # for other processes: fields of `Config`
    size: Size
    quiet: bool  # show no progress
    data: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def bar(self, what: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a progress bar; give a function that advances it. It is full at the end."""
        with console.progress(quiet=self.quiet) as progress:
            task = progress.add_task(what, total=total)
            yield lambda step: progress.advance(task, step)
            progress.update(task, completed=total)

    def wait(self, what: str, seconds: float, is_over: Callable[[], bool] = lambda: True) -> None:
        """Show a progress bar for that long, and longer while it is not over."""
        until, latest = time.monotonic() + seconds, time.monotonic() + seconds + 30.0
        with self.bar(what, round(seconds * 10)) as advance:
            while time.monotonic() < until or (not is_over() and time.monotonic() < latest):
                time.sleep(0.1)
                advance(1)

    @contextlib.contextmanager
    def workers(self, work: Callable[..., None], size: int, **terms: Any) -> Iterator[WorkerGroup]:
        """Start processes that run ``work(store, orders, **terms)``, and wait until they are ready; all
        have ended afterwards."""
        with _uninterrupted(), _safe_path():
            workers = WorkerGroup(size, work, self.settings, terms)
        try:
            workers.answer_of_each()
            yield workers
            workers.tell(None)
        except BaseException:
            for worker in workers.members:
                worker.kill()
            raise
        finally:
            for worker in workers.members:
                worker.leave()

    def together(self, what: str, step: Callable[[int], object], seconds: float) -> int:
        """Call `step` with growing numbers from all threads until the time is up; return how often.

        The first failure ends all of them and is raised here, as is Ctrl-C.
        """
        until, stop = time.monotonic() + seconds, threading.Event()

        def work(number: int) -> int:
            calls = 0
            while not stop.is_set() and time.monotonic() < until:
                step(number + calls)
                calls += 1
            return calls

        with ThreadPoolExecutor(WORKERS) as pool, self.bar(what, round(seconds * 10)) as advance:
            started = rest = {pool.submit(work, number) for number in range(WORKERS)}
            try:
                while rest:
                    done, rest = wait(rest, timeout=0.05, return_when=FIRST_EXCEPTION)
                    [future.result() for future in done]
                    advance(0.5)
            finally:
                stop.set()
        return sum(future.result() for future in started)


def config_of(settings: dict[str, Any], connections: int) -> Config:
    """Return the `Config` of `Stage.settings`, for a process with that many connections."""
    return Config(
        **settings,
        application_name="pgkv demo",
        pool_max_size=connections,
        # Scenes collect expired rows themselves, and count them.
        ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL,
    )


# -- processes ---------------------------------------------------------------------------


class DemoWorker:
    """One process, which calls ``work(store, orders, **terms)``."""

    def __init__(self, number: int, *work: Any) -> None:
        self.number, self.is_dismissed = number, False
        self.pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=main, args=(theirs, *work), daemon=True)
        self._process.start()
        theirs.close()

    def __str__(self) -> str:
        return f"process {self.number}"

    def tell(self, order: Any) -> None:
        """Send it an order; None lets it end. A dead worker gets none."""
        self.is_dismissed |= order is None
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(order)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        self.is_dismissed = True
        self._process.kill()
        self._process.join()

    def leave(self) -> None:
        self._process.join(END_TIMEOUT)
        self.kill()
        self._process.close()
        self.pipe.close()


class WorkerGroup:
    """Some processes, and their answers."""

    def __init__(self, size: int, *work: Any) -> None:
        self.members = [DemoWorker(number, *work) for number in range(1, size + 1)]
        self._talking = {worker.pipe: worker for worker in self.members}

    def tell(self, order: Any) -> None:
        """Send an order to each; None lets them end."""
        for worker in self.members:
            worker.tell(order)

    def answer(self, timeout: float = ANSWER_TIMEOUT) -> tuple[DemoWorker, Any]:
        """Return the next answer with its worker; raise what a worker has failed with."""
        while ready := connection.wait([*self._talking], timeout):
            pipe: Any = ready[0]
            worker = self._talking[pipe]
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                if not worker.is_dismissed:
                    raise RuntimeError(f"{worker} of the demo failed: it ended") from None
                del self._talking[pipe]
                continue
            if not isinstance(answer, Exception):
                return worker, answer
            raise RuntimeError(f"{worker} of the demo failed: {answer}")
        raise TimeoutError(f"the demo's processes did not answer for {timeout:g} s")

    def answer_of_each(self) -> list[Any]:
        return [self.answer()[1] for _ in self.members]


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """A user's module in the working directory does not replace one of Python's in new processes."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that are started here get no Ctrl-C: it is for the demo, which ends them itself."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # as it starts it lets SIGINT through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in a worker ---------------------------------------------------------------------------


class Orders:
    """The orders that a worker gets, and its answers. `ended` is set when it is time to end."""

    def __init__(self, pipe: Pipe) -> None:
        self.ended = False
        self._pipe = pipe
        self.answer = pipe.send

    def next(self) -> Any:
        order = self._pipe.recv()
        self.ended = order is None
        return order

    def one_waits(self) -> bool:
        """Take an order that is there; False where there is none."""
        return self._pipe.poll() and self.next() is not None


def main(
    pipe: Pipe,
    work: Callable[..., None],
    settings: dict[str, Any],
    terms: dict[str, Any],
) -> None:
    for name in ("pgkv", "psycopg"):  # the answers have what matters
        logging.getLogger(name).addHandler(logging.NullHandler())
    with contextlib.suppress(EOFError, BrokenPipeError):  # the demo has ended
        try:
            with Store(config_of(settings, CONNECTIONS)) as store:
                store.ping()
                pipe.send("ready")
                work(store, Orders(pipe), **terms)
        except Exception as error:  # noqa: BLE001  # raised in the demo
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
