"""Two operations that overlap: A has answered and is open in a transaction, B answers or waits on
another connection, then A ends.

What came out must be what A then B, or B then A, give one after the other: both answers, and the
state that they leave. After a rollback of A it must be what B alone gives. Two weaker outcomes are
promised (docs/guarantees.md) where A is a transaction of several statements, or B concerns many
keys; a subject says which.

A pattern adds its own operations by a `Subject`: what the operations are called on, which states
they begin from, what of an outcome can be observed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import psycopg

from pgkv import PgkvError
from tests import servers

S = TypeVar("S")

# Called with the subject (bound to a transaction, or not) and the side, "a" or "b".
Operation = Callable[[S, str], Any]


class Subject(Protocol[S]):
    """What a pattern declares."""

    operations: Mapping[str, Operation[S]]
    states: tuple[str, ...]
    # Transactions of several operations: another may come between any two of them.
    transactions: Mapping[str, tuple[str, ...]]
    # For an operation on many keys, by state: the same on those that exist in that state.
    on_existing: Mapping[tuple[str, str], str]

    def reset(self, state: str) -> None:
        """Begin again in that state."""
        ...

    def using(self, conn: psycopg.Connection) -> S:
        """What operations of an open transaction are called on."""
        ...

    def alone(self) -> S:
        """What operations are called on that commit by themselves, over one connection."""
        ...

    def alone_pid(self) -> int:
        """The server's process behind `alone`."""
        ...

    def observe(self) -> Any:
        """All that a user can observe of the state, but for times and versions."""
        ...


class Pairs(Generic[S]):
    """Runs pairs of operations of one subject.

    Args:
        subject: what they are.
        dsn: of connections for A, and for watching B.
    """

    def __init__(self, subject: Subject[S], dsn: str) -> None:
        self._subject = subject
        self._first = psycopg.connect(dsn)
        self._watcher = psycopg.connect(dsn, autocommit=True)
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._thread.shutdown()
        self._first.close()
        self._watcher.close()

    def serial(self, state: str, *order: tuple[str, str]) -> Any:
        """Answers by side and the state, of sides and names one after the other."""
        self._subject.reset(state)
        answers: dict[str, Any] = {}
        for side, name in order:
            answer = self._perform(self._subject.alone(), side, name)
            answers[side] = (answers[side], answer) if side in answers else answer
        return answers, self._subject.observe()

    def overlapping(self, state: str, a: str, b: str, end: str) -> Any:
        """Answers by side and the state, and whether B had to wait; `end` is A's: commit, rollback."""
        self._subject.reset(state)
        answers: dict[str, Any] = {}
        for step in self._subject.transactions.get(a, (a,)):
            answer = self._perform(self._subject.using(self._first), "a", step)
            answers["a"] = (answers["a"], answer) if answers else answer
        future = self._thread.submit(self._perform, self._subject.alone(), "b", b)
        pid = self._subject.alone_pid()
        try:
            servers.wait_until(
                lambda: future.done() or self._waits(pid), f"{b} answers or waits for {a}"
            )
            waited = not future.done()
        finally:
            getattr(self._first, end)()
        answers["b"] = future.result(30)
        return (answers, self._subject.observe()), waited

    def wrong(self, a: str, b: str) -> Iterator[str]:
        """What differs from every serial order, in words."""
        for state in self._subject.states:
            found, waited = self.overlapping(state, a, b, "commit")
            orders: list[Any] = []
            for order in self._orders(state, a, b):
                orders.append(self.serial(state, *order))
                if found == orders[-1]:
                    break
            else:
                how = " (waited)" if waited else ""
                yield f"{state}: {a}, {b}{how}: {found} is none of {orders}"
            if waited:
                (answers, after), _ = self.overlapping(state, a, b, "rollback")
                only, expected = self.serial(state, ("b", b))
                if (answers["b"], after) != (only["b"], expected):
                    yield f"{state}: {b} after {a} was rolled back: {answers['b']}, {after}"

    def _orders(self, state: str, a: str, b: str) -> Iterator[list[tuple[str, str]]]:
        """The orders that may explain an outcome, the likeliest first."""
        steps = [("a", step) for step in self._subject.transactions.get(a, (a,))]
        for index in range(len(steps), -1, -1):
            yield [*steps[:index], ("b", b), *steps[index:]]
        if (b, state) in self._subject.on_existing:
            yield [*steps, ("b", self._subject.on_existing[b, state])]

    def _perform(self, subject: S, side: str, name: str) -> Any:
        try:
            return self._subject.operations[name](subject, side)
        except PgkvError as error:
            return type(error).__name__

    def _waits(self, pid: int) -> bool:
        row = self._watcher.execute(
            "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s", [pid]
        ).fetchone()
        return bool(row and row[0])


@contextlib.contextmanager
def pairs_of(subject: Subject[S], dsn: str) -> Iterator[Pairs[S]]:
    """Enter `Pairs`."""
    pairs = Pairs(subject, dsn)
    try:
        yield pairs
    finally:
        pairs.close()
