"""The command ``pgkv lock``: run a program under a lock, and end it with its lease."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import typer

from ..errors import LeaseLostError, LockTimeoutError
from . import console
from .command import Invocation, argument, flag, span

if TYPE_CHECKING:
    from ..patterns.lock.api import Lease

BUSY = 75  # sysexits' EX_TEMPFAIL: try again later
LOST = 76  # the lease was lost, and the command killed
ENDING = {getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT")}
REST_WITHIN = 2.0  # seconds for what a command that a signal ended has left running
TICK = 1.0  # seconds between looks for signals
KILL_AFTER = 0.5  # of the time between the loss and the lease's end, from TERM to KILL
END_WITHIN = 5.0  # seconds to free the lock, and to close the store; after that its ttl frees it
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def lock(
    call: Invocation,
    name: str = argument("NAME", "The lock."),
    program: list[str] = argument("-- COMMAND...", "The command to run, with its arguments."),
    ttl: float = span("--ttl", "How long the lock stays held after its holder has died.", "30s"),
    wait: float | None = span("--wait", "Wait at most this long. Default: without limit."),
    skip: bool = flag("--skip", "Do not wait: exit with 75 if the lock is held."),
) -> int:
    """Run a command while holding a lock: for cron jobs on many machines.

    The command finds its fencing token in PGKV_LOCK_TOKEN. Signals are passed on to it, and it is
    killed when pgkv dies or the lease is lost (exit code 76). Exit code 75: the lock was held.
    Otherwise the exit code is the command's own.

    **Example:** `pgkv lock nightly --skip -- ./report.sh`

    **Example:** `pgkv lock deploy --wait 5m -- make deploy`
    """
    if skip and wait is not None:
        raise typer.BadParameter("give --skip or --wait, not both")
    from ..patterns.lock.api import Lock

    cleanup = contextlib.ExitStack()
    with _Guardian() as guardian:
        try:
            store = cleanup.enter_context(call.store(create=True))
            metadata = {"command": program[0]}
            made = Lock(store, name, ttl=ttl, on_lost=guardian.note_lost, metadata=metadata)
            try:
                lease = made.try_acquire() if skip else made.acquire(wait)
            except LockTimeoutError:
                lease = None
            if lease is None:
                text = f"the lock {name!r} is held"
                console.fail(LockTimeoutError.__name__, text, as_json=call.json)
                return BUSY
            return _guarded(call, program, lease, guardian)
        finally:
            _within(END_WITHIN, cleanup.close)


def _guarded(call: Invocation, program: list[str], lease: Lease, guardian: _Guardian) -> int:
    try:
        # This process may have been stopped since the grant.
        code = None if lease.is_lost else guardian.run(program, lease)
    except OSError as error:
        _free(call, lease)
        why = f"cannot run {program[0]}: {error.strerror}"
        console.fail(type(error).__name__, why, as_json=call.json)
        return 127 if isinstance(error, FileNotFoundError) else 126
    if code is not None and guardian.lost_at is None:
        _free(call, lease)
        return code if code >= 0 else 128 - code
    try:
        lease.check()
        why = f"the lease on {lease.name!r} is no longer held"
    except LeaseLostError as error:
        why = str(error).partition("; stop the work")[0]
    ended = "was killed" if guardian.killed else f"had ended with exit code {code}"
    at = (guardian.lost_at or _now()).isoformat(timespec="seconds")
    text = f"{at}: {why}; {program[0]} {'was not started' if code is None else ended}"
    console.fail(LeaseLostError.__name__, text, as_json=call.json)
    return LOST


def _now() -> datetime:
    return datetime.now(UTC).astimezone()


def _free(call: Invocation, lease: Lease) -> None:
    """Free the lock. A failure does not change the exit code, which is the command's."""
    error = _within(END_WITHIN, lease.release)
    if error is not None:
        why = f"the lock {lease.name!r} was not freed, it ends with its ttl of {lease.ttl:g} s"
        console.fail(type(error).__name__, f"{why}: {error}", as_json=call.json)


def _within(seconds: float, fn: Callable[[], object]) -> Exception | None:
    """Call it in a thread; return its error, or a TimeoutError after that many seconds. A server that
    does not answer must not keep the command from ending."""
    found: list[Exception | None] = [TimeoutError(f"no answer within {seconds:g} s")]

    def run() -> None:
        try:
            fn()
            found.append(None)
        except Exception as error:  # noqa: BLE001  # returned to the caller
            found.append(error)

    thread = threading.Thread(target=run, name="pgkv-lock-end", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[-1]


# Kills the session of its first line when its input ends without a second one.
_KEEPER = """read -r s && { read -r line || {
    kill -s KILL -- "-$s"; kill -s KILL $(ps -A -o sess= -o pid= | sed -n "s/^ *$s  *//p"); }; }"""


class _Guardian:
    """Runs the command in a session of its own, and ends it with the lease or with this process.

    Signals are passed on to the command; before the lock is held they end the wait. If this process
    dies, the kernel kills the command (Linux), and a shell that reads from a pipe, whose other end
    closes then, kills its session.

    A handler may run between any two steps of the program, so it takes no lock: `_news` is a
    SimpleQueue because its `put` is reentrant.
    """

    STOPPING = ("SIGTERM", "SIGHUP", "SIGQUIT")
    PASSED_ON = (*STOPPING, "SIGINT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGWINCH", "SIGTSTP")

    def __init__(self) -> None:
        self.lost_at: datetime | None = None
        self.killed = False
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._session = 0  # of the command; its process group has the same number
        self._early: list[int] = []
        self._told_to_end = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handle(self.STOPPING, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, program: list[str], lease: Lease) -> int:
        """Run the command; return its exit code as `subprocess` has it."""
        self._handle(self.PASSED_ON, self._pass_on)
        patience = (lease.ttl - lease.remaining()) * KILL_AFTER
        with _keeper() as keeper:
            process = subprocess.Popen(  # noqa: S603  # the user's own command
                program,
                env={**os.environ, "PGKV_LOCK_TOKEN": str(lease.token)},
                start_new_session=True,
                preexec_fn=_kept(os.getpid(), keeper),  # noqa: PLW1509  # three system calls
            )
            self._session = process.pid
            for number in self._early:
                self._pass_on(number)

            def wait() -> None:
                process.wait()
                self._news.put("ended")

            threading.Thread(target=wait, name="pgkv-lock", daemon=True).start()
            self._watch(process, lease, patience)
            code = process.wait()
            _tell(keeper, "ended")
        return code

    def note_lost(self) -> None:
        self._news.put("lost")

    def _handle(self, names: Iterable[str], handler: Callable[[int, Any], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in names:
            number = getattr(signal, name, None)
            # An ignored signal (nohup) stays ignored, here and in the command.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before.setdefault(number, signal.signal(number, handler))

    @staticmethod
    def _stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _pass_on(self, number: int, _: FrameType | None = None) -> None:
        if not self._session:
            self._early.append(number)
        elif number == signal.SIGTSTP:
            # Without this process the lease is not renewed: the command stops as well.
            self._send_all(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._news.put("resumed")
        else:
            self._told_to_end |= number in ENDING
            self._send(number)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._session, number)

    def _send_all(self, number: int) -> None:
        """Send a signal to the whole session: a job of a shell leads a process group of its own."""
        self._send(number)
        reached: set[int] = set()
        while others := _members(self._session, but_group=True) - reached:
            reached |= others  # a process that is not yet stopped may start another
            for pid in others:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)

    def _watch(self, process: subprocess.Popen[bytes], lease: Lease, patience: float) -> None:
        """Return when the command has ended; at the loss of the lease end it."""
        while not lease.is_lost:
            news = ""
            with contextlib.suppress(queue.Empty):
                # The tick: where the system gives a signal to another thread, this one, which has to
                # run the handler, is not woken up.
                news = self._news.get(timeout=min(lease.remaining(), TICK))
            if news == "ended" and (not self._told_to_end or self._end_rest(lease)):
                return
            if news == "resumed" and not lease.is_lost:
                self._send_all(signal.SIGCONT)
        self.lost_at = _now()
        if process.poll() is None:
            self.killed = True
            self._send_all(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        # Children that the command left running must not work under this lock either.
        self._send_all(signal.SIGKILL)

    def _end_rest(self, lease: Lease) -> bool:
        """Wait until what the signalled command left running has ended; kill it after a while.
        Returns whether the lease is still held."""
        until = time.monotonic() + REST_WITHIN
        while not lease.is_lost and time.monotonic() < until and _members(self._session):
            time.sleep(0.02)
        self._send_all(signal.SIGKILL)
        return not lease.is_lost


def _members(session: int, *, but_group: bool = False) -> set[int]:
    """Return the living processes of a session, or those outside its first process group.

    Without Linux's /proc only the group is known: it stands for its members.
    """
    found: set[int] = set()
    if sys.platform != "linux":
        with contextlib.suppress(OSError):
            os.killpg(session, 0)
            found = set() if but_group else {session}
        return found
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # it ended; no process
            number, stat = int(process.name), (process / "stat").read_bytes()
            # After the name in brackets: state, parent, process group, session.
            state, _, group, its = stat.rpartition(b")")[2].split()[:4]
            if int(its) == session and state != b"Z" and not (but_group and int(group) == session):
                found.add(number)
    return found


@contextlib.contextmanager
def _keeper() -> Iterator[int]:
    """Start the shell of `_KEEPER`; give the descriptor that it reads."""
    keeper = subprocess.Popen(  # noqa: S603  # a constant
        ["/bin/sh", "-c", _KEEPER], stdin=subprocess.PIPE, start_new_session=True, cwd="/",
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert keeper.stdin is not None
    try:
        yield keeper.stdin.fileno()
    except OSError:  # the command could not be started
        _tell(keeper.stdin.fileno(), "ended")
        raise
    finally:
        keeper.stdin.close()
        keeper.wait()


def _tell(keeper: int, line: str) -> None:
    with contextlib.suppress(OSError):  # it was killed
        os.write(keeper, f"{line}\n".encode())


def _kept(parent: int, keeper: int) -> Callable[[], None]:
    """Return a function for a child of `parent`, before it becomes the command: the kernel kills it
    when `parent` dies (Linux), and `keeper` its session."""
    # Found before the fork: the child only calls it.
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def arrange() -> None:
        _tell(keeper, str(os.getpid()))
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before that
                os.kill(os.getpid(), signal.SIGKILL)

    return arrange


__all__ = ["lock"]
