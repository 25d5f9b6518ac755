"""Processes that work in a scene, and the orders that one of them gets.

A worker runs the `work` function of a scene's module. Orders and answers are lines of JSON on its
standard input and output. It ends when its input ends, so none outlives the demo.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import FileIO
from typing import Any

ANSWER_TIMEOUT = 60.0  # seconds without any answer
END_TIMEOUT = 10.0  # seconds in which a worker ends by itself


class Worker:
    """One process; its answers go into a queue, as ``(worker, answer)``."""

    def __init__(self, number: int, answers: queue.SimpleQueue[tuple[Worker, Any]]) -> None:
        self.number = number
        self.process: subprocess.Popen[str] = subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
            # -P: a user's module in the working directory must not replace one of ours.
            [sys.executable, "-P", "-m", __package__],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            process_group=0,  # Ctrl-C is for the demo, which ends its workers itself
        )
        self._dismissed = False
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"process {self.number}"

    def tell(self, order: Any) -> None:
        """Send it an order. A dead worker gets none."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        """Tell it to end."""
        self._dismissed = True
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        """Kill it, and wait until it is dead."""
        self._dismissed = True
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        """Wait until it has ended, or end it."""
        self.stop()
        try:
            self.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self, answers: queue.SimpleQueue[tuple[Worker, Any]]) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        for line in self.process.stdout:
            answers.put((self, json.loads(line)))
        complaint = self.process.stderr.read().strip()
        if not self._dismissed:
            last = complaint.rpartition("\n")[2] or "it ended"
            answers.put((self, RuntimeError(f"{self} of the demo failed: {last}")))


class WorkerGroup:
    """Some processes, and their answers."""

    def __init__(self, size: int) -> None:
        self._answers: queue.SimpleQueue[tuple[Worker, Any]] = queue.SimpleQueue()
        self.members = [Worker(number, self._answers) for number in range(1, size + 1)]

    def tell(self, order: Any) -> None:
        """Send this to each."""
        for worker in self.members:
            worker.tell(order)

    def stop(self) -> None:
        """Tell all to end."""
        for worker in self.members:
            worker.stop()

    def answer(self, timeout: float = ANSWER_TIMEOUT) -> tuple[Worker, Any]:
        """Return the next answer with its worker.

        Raises:
            TimeoutError: there was none in that many seconds.
            RuntimeError: a worker has failed.
        """
        try:
            worker, answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"the demo's processes did not answer for {timeout:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return worker, answer

    def answer_of_each(self) -> list[Any]:
        """Return one answer of each."""
        return list(dict(self.answer() for _ in self.members).values())


@contextlib.contextmanager
def running(scene: str, size: int, first: dict[str, Any]) -> Iterator[WorkerGroup]:
    """Start that many workers and wait until they are ready; all have ended afterwards."""
    workers = WorkerGroup(size)
    try:
        workers.tell({"scene": scene, **first})
        workers.answer_of_each()
        yield workers
    except BaseException:
        for worker in workers.members:
            worker.kill()
        raise
    finally:
        workers.stop()
        for worker in workers.members:
            worker.leave()


class Orders:
    """The orders that a worker gets."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        # Not sys.stdin: Python aborts if a thread reads from that when the program ends.
        for line in FileIO(sys.stdin.fileno(), closefd=False):
            self._orders.put(json.loads(line))
        self._ended.set()
        self._orders.put(None)

    @property
    def ended(self) -> bool:
        """Whether it is time to end."""
        return self._ended.is_set()

    def next(self) -> Any:
        """Wait for the next order; None if there are no more."""
        return self._orders.get()

    def one_waits(self) -> bool:
        """Take an order that is there; False where there is none."""
        try:
            return self._orders.get_nowait() is not None
        except queue.Empty:
            return False

    def pause(self, seconds: float) -> None:
        """Let time pass, less if it is time to end."""
        self._ended.wait(seconds)


def answer(value: Any) -> None:
    """Send an answer, in a worker."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
