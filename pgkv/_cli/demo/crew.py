"""Processes that take part in a scene, as seen from the demo; `__main__` is their own end.

A member runs the `take_part` function of a scene's module. It is told what to do in lines of JSON
on its standard input, and answers in the same way. Where its input ends it ends too: so none
outlives the demo, however that ended.
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

WAIT = 60.0  # seconds without any answer, after which something is wrong
END = 10.0  # seconds in which a member ends by itself


class Member:
    """One process.

    Args:
        number: from 1.
        answers: where its answers go, as ``(member, answer)``.
    """

    def __init__(self, number: int, answers: queue.SimpleQueue[tuple[Member, Any]]) -> None:
        self.number = number
        self._process = subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
            # -P: a module of the user's in the working directory must not take the place of ours.
            [sys.executable, "-P", "-m", __package__],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            process_group=0,  # a Ctrl-C is for the demo, which ends its members itself
        )
        self.pid = self._process.pid
        self._dismissed = False
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"process {self.number}"

    def tell(self, word: Any) -> None:
        """Send it something. What is said to the dead is lost."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(word) + "\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """Tell it to come to an end."""
        self._dismissed = True
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, and wait until it is dead."""
        self._dismissed = True
        self._process.kill()
        self._process.wait()

    def leave(self) -> None:
        """Wait until it has ended, or end it."""
        self.stop()
        try:
            self._process.wait(END)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self, answers: queue.SimpleQueue[tuple[Member, Any]]) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for line in self._process.stdout:
            answers.put((self, json.loads(line)))
        complaint = self._process.stderr.read().strip()
        if not self._dismissed:
            last = complaint.rpartition("\n")[2] or "it ended"
            answers.put((self, RuntimeError(f"{self} of the demo failed: {last}")))


class Crew:
    """Some processes, and what they answer."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._answers: queue.SimpleQueue[tuple[Member, Any]] = queue.SimpleQueue()

    def hire(self, first_word: Any) -> None:
        """Start one more, and tell it this."""
        member = Member(len(self.members) + 1, self._answers)
        self.members.append(member)
        member.tell(first_word)

    def tell(self, word: Any) -> None:
        """Send this to each."""
        for member in self.members:
            member.tell(word)

    def stop(self) -> None:
        """Tell all to come to an end."""
        for member in self.members:
            member.stop()

    def hear(self, wait: float = WAIT) -> tuple[Member, Any]:
        """Return the next answer, and whose it is.

        Raises:
            TimeoutError: there was none in so many seconds.
            RuntimeError: one of them has failed.
        """
        try:
            member, answer = self._answers.get(timeout=wait)
        except queue.Empty:
            raise TimeoutError(f"the demo's processes said nothing for {wait:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return member, answer

    def hear_each(self) -> list[Any]:
        """Return one answer of each."""
        found = dict(self.hear() for _ in self.members)
        return [found[member] for member in self.members]


@contextlib.contextmanager
def hired(part: str, size: int, told: dict[str, Any]) -> Iterator[Crew]:
    """Start so many processes on a part, and wait until they are ready; at the end they are gone."""
    crew = Crew()
    try:
        for _ in range(size):
            crew.hire({"part": part, **told})
        crew.hear_each()
        yield crew
    except BaseException:
        for member in crew.members:
            member.kill()
        raise
    finally:
        crew.stop()
        for member in crew.members:
            member.leave()


class Orders:
    """What a member is told: its end of the pipe."""

    def __init__(self) -> None:
        self._words: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        # Not sys.stdin: Python aborts where a thread is reading that when the program ends.
        for line in FileIO(sys.stdin.fileno(), closefd=False):
            self._words.put(json.loads(line))
        self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether it is time to come to an end."""
        return self._ended.is_set()

    def next(self) -> Any:
        """Wait for a word; None where there will be none."""
        while not self.ended or not self._words.empty():
            with contextlib.suppress(queue.Empty):
                return self._words.get(timeout=0.02)
        return None

    def heard(self) -> bool:
        """Whether a word was waiting, which is taken."""
        with contextlib.suppress(queue.Empty):
            self._words.get_nowait()
            return True
        return False

    def pause(self, seconds: float) -> None:
        """Let time pass, less if it is time to end."""
        self._ended.wait(seconds)


def say(answer: Any) -> None:
    """Answer, as a member."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
