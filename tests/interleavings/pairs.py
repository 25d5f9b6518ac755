"""Two operations that overlap: A has answered and is open in a transaction, B answers or waits on
another connection, then A ends.

What came out must be what A then B, or B then A, give one after the other: both answers, and the
state that they leave. After a rollback of A it must be what B alone gives. In transactions of
REPEATABLE READ B may also be refused, and then leaves nothing. Two weaker outcomes are promised
(docs/guarantees.md) where A is a transaction of several statements, or B concerns many keys; a subject
says which.

A pattern declares a `Subject`: what the operations are called on, which states they begin from, what
of an outcome can be observed. `left_out` names the statements of the pattern that no operation sends.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from types import CodeType, FrameType, FunctionType, MappingProxyType, ModuleType
from typing import Any, Generic, TypeVar
from zlib import crc32

import psycopg
import pytest
from psycopg import IsolationLevel

from pgkv import ConflictError, PgkvError, Store, TtlCleanupStrategy
from pgkv._ops.lazy import cached_property
from pgkv._ops.op import Op, Statement
from pgkv._sql.table import read_int
from tests import servers

S = TypeVar("S")

# Called with what the subject says of a connection, and the side, "a" or "b".
Operation = Callable[[S, str], Any]
Operations = Mapping[str, Operation[S]]

FULL = os.environ.get("PGKV_INTERLEAVINGS") == "full"
PASSED_OVER = "nothing, the row being locked"  # what upkeep may do of a row in flight
REFUSED = "refused"  # by the isolation level: the caller repeats its transaction
NONE: Mapping[Any, Any] = MappingProxyType({})
PID: Op[int] = Op(Statement("pid", "SELECT pg_backend_pid()::bigint", (), read_int, writes=False))


class Subject(Generic[S]):
    """What a pattern declares.

    Attributes:
        states: which `reset` knows.
        operations: each is A, and B, of every pair.
        only_first, only_second: further ones that are A only, or B only.
        transactions: further A: several operations, of which another may come between any two.
        explained: for a B and a state, another operation whose outcome is right too.
        repeatable: the operations that users run in transactions of their own; None: all.
        conn: for arranging and observing.
        store: what operations that commit by themselves use: one connection, of the process `pid`.
    """

    states: tuple[str, ...]
    operations: Operations[S]
    only_first: Operations[S] = NONE
    only_second: Operations[S] = NONE
    transactions: Mapping[str, tuple[str, ...]] = NONE
    explained: Mapping[tuple[str, str], str] = NONE
    repeatable: Collection[str] | None = None

    def __init__(self, dsn: str) -> None:
        self.patch = pytest.MonkeyPatch()  # undone by close()
        self.conn = psycopg.connect(dsn, autocommit=True)
        self.store = Store.connect(
            dsn, ttl_cleanup_strategy=TtlCleanupStrategy.MANUAL, pool_max_size=1
        )
        self.pid: int = self.store._execute(PID)

    def close(self) -> None:
        """Close what it opened."""
        self.patch.undo()
        self.conn.close()
        self.store.close()

    def reset(self, state: str) -> None:
        """Begin again in that state."""
        raise NotImplementedError

    def on(self, conn: psycopg.Connection | None) -> S:
        """What operations are called on: those of a transaction, or those that commit by themselves."""
        raise NotImplementedError

    def observe(self) -> Any:
        """All that a user can observe of the state, but for times and versions."""
        raise NotImplementedError

    def meet(self, a: str, b: str) -> bool:
        """Whether the two are a pair."""
        return True

    def asks_again(self, answer: Any) -> bool:
        """Whether the caller of B asks again when A has ended."""
        return False

    def plain(self, answer: Any) -> Any:
        """What of an answer is compared."""
        return answer

    def all(self) -> Operations[S]:
        """Every operation there is."""
        nothing: Operations[S] = {PASSED_OVER: lambda _on, _side: None}
        return {**self.operations, **self.only_first, **self.only_second, **nothing}


class Pairs(Generic[S]):
    """Runs pairs of operations of one subject.

    Args:
        subject: what they are.
        dsn: of connections for A, for B in a transaction, and for watching B.
    """

    def __init__(self, subject: Subject[S], dsn: str) -> None:
        self._subject = subject
        self._operations = subject.all()
        self._conns = psycopg.connect(dsn), psycopg.connect(dsn)
        self._watcher = psycopg.connect(dsn, autocommit=True)
        self._thread = ThreadPoolExecutor(1)
        self._known: dict[Any, Any] = {}

    def close(self) -> None:
        self._thread.shutdown()
        for conn in (*self._conns, self._watcher):
            conn.close()

    def serial(self, state: str, *order: tuple[str, str]) -> Any:
        """Answers by side and the state, of sides and names one after the other."""
        if (state, order) not in self._known:
            self._subject.reset(state)
            answers: dict[str, Any] = {}
            for side, name in order:
                answer = self._perform(None, side, name)
                answers[side] = (answers[side], answer) if side in answers else answer
            self._known[state, order] = answers, self._subject.observe()
        return self._known[state, order]

    def overlapping(self, state: str, a: str, b: str, end: str, *, repeatable: bool = False) -> Any:
        """Answers by side and the state, and whether B had to wait; `end` is A's: commit, rollback."""
        subject, (first, second) = self._subject, self._conns
        subject.reset(state)
        level = IsolationLevel.REPEATABLE_READ if repeatable else IsolationLevel.READ_COMMITTED
        for conn in (first, second):
            conn.isolation_level = level
            if repeatable:
                conn.execute("SELECT 1 FROM pg_class LIMIT 1")  # its snapshot
        answers: dict[str, Any] = {}
        for step in subject.transactions.get(a, (a,)):
            answer = self._perform(first, "a", step)
            answers["a"] = (answers["a"], answer) if answers else answer

        def run() -> Any:
            answer = self._perform(second if repeatable else None, "b", b)
            second.rollback() if answer == REFUSED else second.commit()
            return answer

        future = self._thread.submit(run)
        pid = second.info.backend_pid if repeatable else subject.pid
        try:
            servers.wait_until(
                lambda: bool(wait([future], 0.002).done) or self._waits(pid),
                f"{b} answers or waits for {a}",
            )
            waited = not future.done()
        finally:
            getattr(first, end)()
        answers["b"] = future.result(30)
        if subject.asks_again(answers["b"]):
            answers["b"] = self._perform(None, "b", b)
        return (answers, subject.observe()), waited

    def wrong(self, a: str, b: str) -> Iterator[str]:
        """What differs from every serial order, in words."""
        subject = self._subject
        if not (subject.meet(a, b) and self._is_chosen(a, b)):
            return
        steps = subject.transactions.get(a, (a,))
        users = subject.repeatable
        in_both = users is None or all(each in users for each in (*steps, b))
        # Without the full set a pair begins from one of them, and beyond the commit it has either the
        # rollback or the isolation level.
        number = crc32(f"{a}, {b}".encode())
        chosen, strict = number % len(subject.states), in_both and number >> 16 & 1
        for number, state in enumerate(subject.states):
            if not FULL and number != chosen:
                continue
            found, waited = self.overlapping(state, a, b, "commit")
            how = f"{state}: {a}, {b}" + " (waited)" * waited
            if not self._is_serial(found, state, a, b):
                yield f"{how}: {found} is none of {list(self._serials(state, a, b))}"
            if FULL or not strict:
                (answers, after), _ = self.overlapping(state, a, b, "rollback")
                alone = [self.serial(state, ("b", each)) for each in self._names(state, b)]
                if ({"b": answers["b"]}, after) not in alone:
                    yield f"{how}, rolled back: {answers['b']}, {after}"
            if strict or (FULL and in_both):
                found, _ = self.overlapping(state, a, b, "commit", repeatable=True)
                answers, after = found
                refused = answers["b"] == REFUSED and self.serial(
                    state, *(("a", step) for step in steps)
                ) == ({"a": answers["a"]}, after)
                if not refused and not self._is_serial(found, state, a, b):
                    yield f"{how}, REPEATABLE READ: {found}"

    def _is_chosen(self, a: str, b: str) -> bool:
        """Without the full set, two different operations meet in one order only."""
        if FULL or a == b or not {a, b} <= self._subject.operations.keys():
            return True
        return bool(crc32(", ".join(sorted((a, b))).encode()) >> 17 & 1) == (a < b)

    def _is_serial(self, found: Any, state: str, a: str, b: str) -> bool:
        return any(found == each for each in self._serials(state, a, b))

    def _serials(self, state: str, a: str, b: str) -> Iterator[Any]:
        """What may explain an outcome, the likeliest first."""
        steps = [("a", step) for step in self._subject.transactions.get(a, (a,))]
        for index in range(len(steps), -1, -1):
            yield self.serial(state, *steps[:index], ("b", b), *steps[index:])
        for other in self._names(state, b)[1:]:
            yield self.serial(state, *steps, ("b", other))

    def _names(self, state: str, b: str) -> list[str]:
        """B, and what else its outcome may be."""
        other = self._subject.explained.get((b, state))
        return [b] if other is None else [b, other]

    def _perform(self, conn: psycopg.Connection | None, side: str, name: str) -> Any:
        subject = self._subject
        return subject.plain(answer_of(self._operations[name], subject.on(conn), side))

    def _waits(self, pid: int) -> bool:
        row = self._watcher.execute(
            "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s", [pid]
        ).fetchone()
        return bool(row and row[0])


def answer_of(operation: Operation[S], on: S, side: str) -> Any:
    """What an operation returns, or which error it raises."""
    try:
        return operation(on, side)
    except PgkvError as error:
        if error._sqlstate == "40001" or type(error) is ConflictError:
            return REFUSED
        return f"{type(error).__name__} {getattr(error, 'reason', '')}".strip()


# -- that nothing is left out --------------------------------------------------------------


def makers(module: ModuleType) -> dict[str, CodeType]:
    """The functions of a module that return operations or statements, by class and name."""
    found: dict[str, CodeType] = {}
    owners: list[Any] = [each for each in vars(module).values() if isinstance(each, type)]
    for owner in (module, *(each for each in owners if each.__module__ == module.__name__)):
        for name, each in vars(owner).items():
            function = each._compute if isinstance(each, cached_property) else each
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                kind = str(function.__annotations__.get("return", ""))
                if "Op[" in kind or "Statement[" in kind:
                    found[f"{owner.__name__.rpartition('.')[2]}.{name}"] = function.__code__
    return found


CHANGES = re.compile(
    r"\b(INSERT|UPDATE|DELETE|TRUNCATE|MERGE|FOR (NO KEY )?UPDATE|FOR (KEY )?SHARE)\b"
)


def left_out(declaration: Any, dsn: str) -> set[str]:
    """The functions of `STATEMENTS` that no operation of `SUBJECTS` calls, but for `READS`; and those of
    `READS` whose statements change or lock rows."""
    found: set[str] = set()
    made: dict[CodeType, str] = {}
    for module in map(importlib.import_module, declaration.STATEMENTS):
        made |= {code: name for name, code in makers(module).items()}
    reads = {
        code
        for code, name in made.items()
        if {name, name.partition(".")[2].removeprefix("_").removeprefix("make_")}
        & declaration.READS
    }
    ever: set[CodeType] = set()
    by_operations: set[CodeType] = set()
    noting = [ever]

    def note(frame: FrameType, event: str, answer: object) -> None:
        if event == "call":
            for each in noting:
                each.add(frame.f_code)
        elif event == "return" and frame.f_code in reads:
            statement = getattr(answer, "statement", answer)
            if isinstance(statement, Statement) and CHANGES.search(statement.sql):
                found.add(f"{made[frame.f_code]} is no read")

    sys.setprofile(note)
    try:
        for kind in declaration.SUBJECTS:
            subject = kind(dsn)
            for state in subject.states:
                for operation in subject.all().values():
                    subject.reset(state)
                    noting.append(by_operations)
                    answer_of(operation, subject.on(None), "a")
                    noting.pop()
            subject.close()
    finally:
        sys.setprofile(None)
    for code, name in made.items():
        # A statement is made once, perhaps when a state is arranged; it is sent by a function.
        called = ever if name.partition(".")[2].startswith("_") else by_operations
        if code not in called and code not in reads:
            found.add(name)
    return found
