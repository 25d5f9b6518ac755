"""A scheduler of threads: every order of their bytecodes, up to a bound.

Each thread is real, but only the one that holds the baton runs. Code of the modules under test is traced by
opcode (`sys.settrace`), and before each opcode that can touch what threads share the scheduler may pass the
baton on, or interrupt the thread there, as a signal handler that raises would. Locks are replaced by
`Lock`, whose waiting the scheduler sees; time is the scheduler's, and passes when every thread waits.

A schedule is a list of numbers: at which switch point another thread goes on, or an interrupt strikes. All
schedules with at most `preemptions` switches and `interrupts` interrupts are run (Musuvathi and Qadeer,
"Iterative context bounding", PLDI 2007).
"""

from __future__ import annotations

import dataclasses
import dis
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

# Opcodes that cannot touch what threads share: a switch before them changes nothing.
LOCAL = frozenset(
    dis.opmap[name]
    for name in (
        "LOAD_FAST", "STORE_FAST", "DELETE_FAST", "LOAD_CONST", "POP_TOP", "PUSH_NULL", "COPY", "SWAP", "NOP",
        "RESUME", "CACHE", "PRECALL", "KW_NAMES", "RETURN_VALUE", "IS_OP", "UNARY_NOT", "JUMP_FORWARD",
        "JUMP_BACKWARD", "POP_JUMP_FORWARD_IF_FALSE", "POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_FORWARD_IF_NONE",
        "POP_JUMP_FORWARD_IF_NOT_NONE", "POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE", "POP_JUMP_IF_NONE",
        "POP_JUMP_IF_NOT_NONE", "PUSH_EXC_INFO", "POP_EXCEPT", "CHECK_EXC_MATCH", "RERAISE", "LOAD_GLOBAL",
        "RETURN_CONST", "COPY_FREE_VARS", "EXTENDED_ARG", "MAKE_CELL", "LOAD_FAST_CHECK", "BUILD_TUPLE",
    )
    if name in dis.opmap
)  # fmt: skip
# Opcodes after which the interpreter looks for signals.
CHECKING = frozenset(
    dis.opmap[name]
    for name in ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME", "CALL_KW")
    if name in dis.opmap
)
AT_ONCE = 1e-6  # seconds: waits that end that close to each other end in either order
POINTS_MAX = 20_000  # of one schedule: a thread that spins is stuck
REAL_SECONDS = (
    60.0  # a thread that does not come back has met something that the scheduler cannot see
)


@cache
def is_checked(code: CodeType, before: int, at: int) -> bool:
    """Whether an interrupt can strike between two opcodes of a frame: the interpreter has looked for
    signals, and what it raised is handled as what the second opcode raises."""
    if before < 0 or code.co_code[before] not in CHECKING:
        return False
    handlers = [
        [(entry.start, entry.target) for entry in entries if entry.start <= place < entry.end]
        for entries in [dis.Bytecode(code).exception_entries]  # type: ignore[attr-defined]  # no stub
        for place in (before, at)
    ]
    return handlers[0] == handlers[1]


class Ended(BaseException):
    """The schedule has failed; the threads that are left end."""


class StuckError(AssertionError):
    """Threads wait for something that never comes."""


class Interrupt(KeyboardInterrupt):
    """What a signal handler raised."""


@dataclasses.dataclass(eq=False)
class Thread:
    """One thread of a schedule."""

    name: str
    run: Callable[[], Any]
    baton: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(0))
    waits_for: Lock | None = None
    until: float | None = None
    has_ended: bool = False
    result: Any = None


@dataclasses.dataclass(frozen=True, order=True)
class Decision:
    """At switch point `point` of the schedule: the baton goes to `thread`, or an interrupt strikes."""

    point: int
    thread: str
    interrupts: bool = False


class Schedule:
    """One run of some threads.

    Args:
        functions: by name; the first one begins.
        files: the modules whose opcodes are switch points.
        decisions: what differs from "each runs until it waits".

    Attributes:
        points: for each switch point the thread that was at it, who else could have gone on, and
            whether an interrupt can strike there.
    """

    current: Schedule | None = None

    def __init__(
        self,
        functions: dict[str, Callable[[], Any]],
        files: frozenset[str],
        decisions: tuple[Decision, ...] = (),
    ) -> None:
        self.now = 1000.0
        self.threads = {name: Thread(name, fn) for name, fn in functions.items()}
        self.points: list[tuple[str, tuple[str, ...], bool]] = []
        self._before: dict[FrameType, int] = {}  # where each frame was at its last opcode
        self.places: list[str] = []
        self.failure: BaseException | None = None
        self._files = files
        self._decisions = {decision.point: decision for decision in decisions}
        self._by_id: dict[int, Thread] = {}
        self._over = threading.Semaphore(0)

    # -- running

    def run(self) -> dict[str, Any]:
        """Run the threads to their end; what each returned or raised."""
        Schedule.current = self
        try:
            started = [
                threading.Thread(target=self._main, args=(each,), daemon=True, name=each.name)
                for each in self.threads.values()
            ]
            for each in started:
                each.start()
            next(iter(self.threads.values())).baton.release()
            if not self._over.acquire(timeout=REAL_SECONDS):
                self.failure = StuckError(
                    "a thread waits for something that the scheduler cannot see"
                )
            for each in started:
                each.join(1.0)
        finally:
            Schedule.current = None
        return {name: thread.result for name, thread in self.threads.items()}

    def _main(self, thread: Thread) -> None:
        self._by_id[threading.get_ident()] = thread
        thread.baton.acquire()
        sys.settrace(self._trace)
        try:
            thread.result = thread.run()
        except Interrupt as error:
            # Tracebacks, its own and that of what it interrupted, would hold what the thread held.
            error.__context__ = None
            thread.result = error.with_traceback(None)
        except BaseException as error:  # what it raised is its result
            thread.result = error
        finally:
            sys.settrace(None)
        thread.has_ended = True
        self._go_on(thread)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._trace_frame

    def _trace_frame(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            before, self._before[frame] = self._before.get(frame, -1), frame.f_lasti
            self._point(
                frame,
                is_local=frame.f_code.co_code[frame.f_lasti] in LOCAL,
                is_checked=is_checked(frame.f_code, before, frame.f_lasti),
            )
        elif event == "return":
            self._before.pop(frame, None)
        return self._trace_frame

    def _point(self, frame: FrameType, *, is_local: bool, is_checked: bool) -> None:
        """A switch point: go on, or do what the schedule says."""
        thread = self._by_id[threading.get_ident()]
        if self.failure is not None:
            raise Ended
        number = len(self.points)
        if number >= POINTS_MAX:
            self._fail(StuckError("a thread spins"), thread)
            raise Ended
        others = () if is_local else tuple(t.name for t in self._ready() if t is not thread)
        self.points.append((thread.name, others, is_checked))
        self.places.append(f"{thread.name} {frame.f_code.co_name}:{frame.f_lineno}")
        decision = self._decisions.get(number)
        if decision is None:
            return
        if decision.interrupts:
            self._before.clear()  # a function that raises is not called again: frames would stay
            raise Interrupt
        self._hand(thread, self.threads[decision.thread])

    # -- the baton

    def _ready(self) -> list[Thread]:
        return [
            t
            for t in self.threads.values()
            if not t.has_ended
            and (
                t.waits_for is None
                or not t.waits_for.is_locked
                or (t.until is not None and t.until <= self.now + AT_ONCE)
            )
        ]

    def _hand(self, thread: Thread, other: Thread) -> None:
        if other is thread:
            return
        other.baton.release()
        thread.baton.acquire()
        if self.failure is not None:
            raise Ended

    def _go_on(self, thread: Thread) -> None:
        """A thread has ended or waits: another goes on."""
        ready = self._ready()
        if not ready:
            waiting = [t for t in self.threads.values() if not t.has_ended and t.until is not None]
            if not waiting:
                if not all(t.has_ended for t in self.threads.values()):
                    self._fail(StuckError(f"for ever: {self._who_waits()}"), thread)
                self._over.release()
                return
            first = min(waiting, key=lambda t: t.until or 0.0)
            self.now = max(self.now, first.until or 0.0)
            first.waits_for = None
            ready = [first]
        if ready[0] is not thread:
            ready[0].baton.release()
        else:
            thread.baton.release()

    def _who_waits(self) -> list[str]:
        return [t.name for t in self.threads.values() if not t.has_ended]

    def _fail(self, error: BaseException, thread: Thread) -> None:
        self.failure = self.failure or error
        for each in self.threads.values():
            if each is not thread and not each.has_ended:
                each.baton.release()

    # -- what locks ask

    def wait(self, lock: Lock, timeout: float) -> bool:
        """The current thread waits for a lock; False when its time was over first."""
        thread = self._by_id[threading.get_ident()]
        thread.waits_for = lock
        thread.until = None if timeout < 0 else self.now + timeout
        while lock.is_locked:
            if thread.until is not None and self.now + AT_ONCE >= thread.until:
                break
            self._go_on(thread)
            thread.baton.acquire()
            if self.failure is not None:
                raise Ended
        thread.waits_for = thread.until = None
        return not lock.is_locked

    def sleep(self, seconds: float) -> None:
        """The current thread sleeps."""
        never = Lock()
        never.is_locked = True
        self.wait(never, seconds)


class Lock:
    """`threading.Lock`, as the scheduler sees it. Outside a schedule it never waits."""

    def __init__(self) -> None:
        self.is_locked = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        schedule = Schedule.current
        if self.is_locked:
            if schedule is None:
                raise AssertionError("a lock is left locked")
            if not blocking or not schedule.wait(self, timeout):
                return False
        self.is_locked = True
        return True

    def release(self) -> None:
        assert self.is_locked, "released twice"
        self.is_locked = False

    def locked(self) -> bool:
        return self.is_locked

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


# -- all schedules -------------------------------------------------------------------------


def explore(
    make: Callable[[tuple[Decision, ...]], tuple[Schedule, Callable[[], None]]],
    *,
    preemptions: int,
    interrupts: int,
) -> int:
    """Run every schedule; how many there were.

    Args:
        make: makes a schedule of these decisions, and what checks its end.
        preemptions, interrupts: the bounds.

    Raises:
        AssertionError: says which schedule failed, and where its threads were.
    """
    number = 0
    pending: list[tuple[Decision, ...]] = [()]
    while pending:
        decisions = pending.pop()
        run, check = make(decisions)
        run.run()
        number += 1
        try:
            if run.failure is not None:
                raise run.failure
            check()
        except AssertionError as error:
            places = [
                f"  {d}: {run.places[d.point]}" for d in decisions if d.point < len(run.places)
            ]
            text = "\n".join([f"schedule {decisions!r}: {error}", *places])
            raise AssertionError(text) from error
        strikes = sum(decision.interrupts for decision in decisions)
        switches = len(decisions) - strikes
        # Each schedule with one decision more, after those that it has.
        for point in range(decisions[-1].point + 1 if decisions else 0, len(run.points)):
            name, others, is_checked = run.points[point]
            if switches < preemptions:
                pending += [(*decisions, Decision(point, other)) for other in others]
            if strikes < interrupts and is_checked:
                pending.append((*decisions, Decision(point, name, interrupts=True)))
    return number


__all__ = ["Decision", "Interrupt", "Lock", "Schedule", "explore"]
