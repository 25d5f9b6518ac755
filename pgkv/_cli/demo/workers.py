"""Processes that work in a scene: `running` starts them, and each of them runs this module.

A worker calls the function that its first order names. Orders and answers are lines of JSON on its
standard input and output. It ends when its input ends, so none outlives the demo.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import FileIO
from pkgutil import resolve_name
from typing import Any

from ...config import Config, Pooler, TtlCleanupStrategy
from ...store import Store

ANSWER_TIMEOUT = 60.0  # seconds without any answer
END_TIMEOUT = 10.0  # seconds in which a worker ends by itself
CONNECTIONS = 20  # of one process: a scene has at most this many threads


def config_of(settings: dict[str, Any], connections: int) -> Config:
    """Return the `Config` of `Stage.settings`, for a process with that many connections."""
    return Config(
        **{**settings, "pooler": Pooler(settings["pooler"])},
        application_name="pgkv demo",
        pool_max_size=connections,
        # Scenes collect expired rows themselves, and count them.
        ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL,
    )


# -- in the demo ---------------------------------------------------------------------------


class DemoWorker(subprocess.Popen[str]):
    """One process. Its answers go into a queue, as ``(worker, answer)``."""

    def __init__(self, number: int, answers: queue.SimpleQueue[tuple[DemoWorker, Any]]) -> None:
        super().__init__(
            # -P: a user's module in the working directory must not replace one of ours.
            [sys.executable, "-P", "-m", __name__],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            process_group=0,  # Ctrl-C is for the demo, which ends its workers itself
        )
        self.number, self._dismissed = number, False
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"process {self.number}"

    def tell(self, order: Any) -> None:
        """Send it an order; None lets it end. A dead worker gets none."""
        assert self.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            if order is None:
                self._dismissed = True
                self.stdin.close()
            else:
                self.stdin.write(json.dumps(order) + "\n")
                self.stdin.flush()

    def kill(self) -> None:
        """Kill it, and wait until it is dead."""
        self._dismissed = True
        super().kill()
        self.wait()

    def leave(self) -> None:
        """Wait until it has ended, or kill it."""
        with self:  # closes the pipes
            try:
                self.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
            self._reader.join()

    def _read(self, answers: queue.SimpleQueue[tuple[DemoWorker, Any]]) -> None:
        assert self.stdout is not None
        assert self.stderr is not None
        for line in self.stdout:
            answers.put((self, json.loads(line)))
        last = self.stderr.read().strip().rpartition("\n")[2] or "it ended"
        if not self._dismissed:
            answers.put((self, RuntimeError(f"{self} of the demo failed: {last}")))


class WorkerGroup:
    """Some processes, and their answers."""

    def __init__(self, size: int) -> None:
        self._answers: queue.SimpleQueue[tuple[DemoWorker, Any]] = queue.SimpleQueue()
        self.members = [DemoWorker(number, self._answers) for number in range(1, size + 1)]

    def tell(self, order: Any) -> None:
        """Send an order to each; None lets them end."""
        for worker in self.members:
            worker.tell(order)

    def answer(self, timeout: float = ANSWER_TIMEOUT) -> tuple[DemoWorker, Any]:
        """Return the next answer with its worker; raise what a worker has failed with."""
        try:
            worker, answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"the demo's processes did not answer for {timeout:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return worker, answer

    def answer_of_each(self) -> list[Any]:
        return [self.answer()[1] for _ in self.members]


@contextlib.contextmanager
def running(work: str, size: int, first: dict[str, Any]) -> Iterator[WorkerGroup]:
    """Start that many workers and wait until they are ready; all have ended afterwards."""
    workers = WorkerGroup(size)
    try:
        workers.tell({"work": work, **first})
        workers.answer_of_each()
        yield workers
    except BaseException:
        for worker in workers.members:
            worker.kill()
        raise
    finally:
        workers.tell(None)
        for worker in workers.members:
            worker.leave()


# -- in a worker ---------------------------------------------------------------------------


class Orders:
    """The orders that a worker gets. `ended` is set when it is time to end."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        # Not sys.stdin: Python aborts if a thread reads from that when the program ends.
        for line in FileIO(sys.stdin.fileno(), closefd=False):
            self._orders.put(json.loads(line))
        self.ended.set()
        self._orders.put(None)

    def next(self) -> Any:
        """Wait for the next order; None if there are no more."""
        return self._orders.get()

    def one_waits(self) -> bool:
        """Take an order that is there; False where there is none."""
        return not self._orders.empty() and self.next() is not None


def answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("pgkv", "psycopg"):  # the answers have what matters
        logging.getLogger(name).addHandler(logging.NullHandler())
    orders = Orders()
    first = orders.next()
    if first is None:
        return
    work = resolve_name(first["work"])
    with (
        contextlib.suppress(BrokenPipeError),  # the demo has ended
        Store(config_of(first["settings"], CONNECTIONS)) as store,
    ):
        store.ping()
        answer("ready")
        work(store, orders, **first["terms"])


if __name__ == "__main__":
    main()
