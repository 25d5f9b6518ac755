"""The commands about locks: their holders, and running a program under one."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from ..errors import (
    LeaseLostError,
    LockTimeoutError,
    NotFoundError,
    TableNotFoundError,
)
from . import console
from .command import DONE, Invocation, Seconds, duration

if TYPE_CHECKING:
    from ..patterns.lock.api import Lease
    from ..patterns.lock.sql import Guarding, Holder, LockStatements
    from ..store import Store

BUSY = 75  # sysexits' EX_TEMPFAIL: try again later
LOST = 76  # the lease was lost, and the command killed
KILL_AFTER = 0.5  # of the time between the loss and the lease's end, from TERM to KILL
END_WITHIN = 5.0  # seconds to free the lock, and to close the store; after that its ttl frees it
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def locks(
    call: Invocation,
    break_: Annotated[
        int | None,
        typer.Option("--break", metavar="TOKEN", help="Free the lock of this token at once. Its "
                     "holder continues until its next renewal."),
    ] = None,
    revoke: Annotated[
        int | None,
        typer.Option("--revoke", metavar="TOKEN", help="End this token; the lock becomes free when "
                     "its lease would have ended. Never two holders."),
    ] = None,
) -> int:  # fmt: skip
    """List the holders of locks: age, time left, queued waiters.

    Below the holders, the open transactions that have guarded a lease. Waiters of locks that are not
    fair leave no trace and are not counted. Exit code 1: no lease has that token.

    **Example:** `pgkv locks`

    **Example:** `pgkv locks --revoke 1795367314868272`
    """
    if break_ is not None and revoke is not None:
        raise typer.BadParameter("give --break or --revoke, not both")
    from ..patterns.lock.api import statements_of
    from ..patterns.lock.sql import LockStatements

    token = revoke if break_ is None else break_
    with call.store() as store:
        tables = [
            statements_of(store, LockStatements, durable=durable) for durable in (True, False)
        ]
        if token is not None:
            ended = _end(store, tables, token, safely=break_ is None)
            if call.json:
                console.say_json({**ended, "ended": "broken" if revoke is None else "revoked"})
            return DONE
        leases: list[dict[str, Any]] = []
        guards: list[Guarding] = []
        for sql in tables:
            with contextlib.suppress(TableNotFoundError):
                leases += [_shown(each) for each in store._execute(sql.holders())]
                open_now: list[Guarding] = store._execute(sql.guards())
                guards += open_now
        waiting: dict[str, int] = {}
        with contextlib.suppress(TableNotFoundError):
            waiting = store._execute(tables[0].queue())
    for lease in leases:
        lease["waiters"] = waiting.pop(lease["name"], 0)
    if call.json:
        console.say_json({"locks": leases, "guards": [each._asdict() for each in guards]})
        return DONE
    columns = ("name", "holder", "token", "age", "remaining", "waiters", "metadata")
    rows = [
        (
            console.one_line(lease["name"])
            + ("" if lease["slot"] is None else f" [{lease['slot']}]"),
            console.one_line(lease["owner"]),
            str(lease["token"]),
            console.duration(lease["age"]),
            console.duration(lease["remaining"]),
            str(lease["waiters"]),
            "" if lease["metadata"] is None else _in_json(lease["metadata"]),
        )
        for lease in leases
    ]
    held = [
        (
            console.one_line(each.key or "?"),
            str(each.pid),
            console.one_line(each.application),
            each.state,
            console.duration(each.seconds),
        )
        for each in guards
    ]
    console.show_table(columns, rows, title="Locks")
    if held and console.on_terminal():
        names = ("name", "pid", "application", "state", "open for")
        console.show_table(names, held, title="Open guards")
    elif held:
        console.show_table((), [("guard", *guard) for guard in held])
    return DONE


def _shown(holder: Holder) -> dict[str, Any]:
    from ..patterns.lock.lease import info_of
    from ..patterns.lock.sql import SEPARATOR

    info = info_of(holder)
    name, separator, slot = info.name.partition(SEPARATOR)
    return {
        "name": name,
        "slot": int(slot) if separator else None,
        "owner": info.owner,
        "token": info.token,
        "age": round(info.age(), 3),
        "remaining": round(info.remaining(), 3),
        "acquired_at": info.acquired_at.isoformat(),
        "expires_at": info.expires_at.isoformat(),
        "metadata": info.metadata,
    }


def _in_json(metadata: Any) -> str:
    return console.printable(json.dumps(metadata, ensure_ascii=False))


def _end(store: Store, tables: list[LockStatements], token: int, *, safely: bool) -> dict[str, Any]:
    """End the lease of that token; return who held it."""
    for sql in tables:
        with contextlib.suppress(TableNotFoundError):
            for holder in store._execute(sql.holders()):
                if holder.token != token:
                    continue
                key = store._sql.prefix_bytes + holder.key.encode()
                if safely:
                    done = store._execute(sql.revoke(key, token))
                else:
                    done = store._execute(sql.release(key, token, notify=True)) == 0
                if done:
                    shown = _shown(holder)
                    return {name: shown[name] for name in ("name", "slot", "owner", "token")}
    raise NotFoundError(f"no lease has the token {token}; see pgkv locks")


# -- lock NAME -- COMMAND


def lock(
    call: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The lock.")],
    program: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="The command to run, with its arguments."),
    ],
    ttl: Annotated[
        float,
        typer.Option("--ttl", metavar="TIME", parser=duration,
                     help="How long the lock stays held after its holder has died."),
    ] = "30s",  # type: ignore[assignment]  # typer parses it
    wait: Annotated[
        Seconds,
        typer.Option("--wait", metavar="TIME", parser=duration,
                     help="Wait at most this long. Default: without limit."),
    ] = None,
    skip: Annotated[
        bool,
        typer.Option("--skip", metavar="", help="Do not wait: exit with 75 if the lock is held."),
    ] = False,
) -> int:  # fmt: skip
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
    with _Signals() as signals:
        try:
            store = cleanup.enter_context(call.store(create=True))
            metadata = {"command": program[0]}
            made = Lock(store, name, ttl=ttl, on_lost=signals.note_lost, metadata=metadata)
            try:
                lease = made.try_acquire() if skip else made.acquire(wait)
            except LockTimeoutError:
                lease = None
            if lease is None:
                text = f"the lock {name!r} is held"
                console.fail(LockTimeoutError.__name__, text, as_json=call.json)
                return BUSY
            signals.hold()
            return _guarded(call, program, lease, signals)
        except _Stopped as stop:
            return 128 + stop.number
        finally:
            _within(END_WITHIN, cleanup.close)


def _guarded(call: Invocation, program: list[str], lease: Lease, signals: _Signals) -> int:
    """Run the command, free the lock, and report a loss."""
    margin = lease.ttl - lease.remaining()
    try:
        guardian = _Guardian(program, lease, signals, margin * KILL_AFTER)
    except OSError as error:
        _free(call, lease)
        why = f"cannot run {program[0]}: {error.strerror}"
        console.fail(type(error).__name__, why, as_json=call.json)
        return 127 if isinstance(error, FileNotFoundError) else 126
    code = guardian.wait()
    if guardian.lost_at is None:
        _free(call, lease)
        return code if code >= 0 else 128 - code
    try:
        lease.check()
        why = f"the lease on {lease.name!r} is no longer held"
    except LeaseLostError as error:
        why = str(error).partition("; stop the work")[0]
    ended = "was killed" if guardian.killed else f"had ended with exit code {code}"
    at = guardian.lost_at.isoformat(timespec="seconds")
    console.fail(LeaseLostError.__name__, f"{at}: {why}; {program[0]} {ended}", as_json=call.json)
    return LOST


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


class _Stopped(BaseException):
    """A signal ended the wait for the lock."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """Passes signals on to the command. Before the lock is held they end the wait.

    A handler may run between any two steps of the program, so it takes no lock: `news` is a
    SimpleQueue because its `put` is reentrant.
    """

    STOPPING = ("SIGTERM", "SIGHUP", "SIGQUIT")
    PASSED_ON = (*STOPPING, "SIGINT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGWINCH", "SIGTSTP")

    def __init__(self) -> None:
        self.news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._group = 0
        self._early: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handle(self.STOPPING, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
        raise _Stopped(number)

    def hold(self) -> None:
        """The lock is held: from here on signals are for the command."""
        self._handle(self.PASSED_ON, self._pass_on)

    def aim(self, group: int) -> None:
        """The command runs in that process group: pass on earlier signals."""
        self._group = group
        for number in self._early:
            self.send(number)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if not self._group:
            self._early.append(number)
        elif number == signal.SIGTSTP:
            # Without this process the lease is not renewed: the command stops as well.
            self.send(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self.news.put("resumed")
        else:
            self.send(number)

    def send(self, number: int) -> None:
        """Send a signal to the command and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._group, number)

    def note_lost(self) -> None:
        """The lease was lost."""
        self.news.put("lost")


# Kills the process group of its first line when its input ends without a second one.
_KEEPER = 'read -r group && { read -r line || kill -s KILL -- "-$group"; }'


class _Guardian:
    """Runs the command in a session of its own and ends it with the lease, or with this process.

    If this process dies, the kernel kills the command (Linux), and a shell that reads from a pipe,
    whose other end closes then, kills its process group (every system).
    """

    def __init__(
        self, program: list[str], lease: Lease, signals: _Signals, patience: float
    ) -> None:
        self.lost_at: datetime | None = None
        self.killed = False
        self._lease, self._signals, self._patience = lease, signals, patience
        self._keeper = subprocess.Popen(  # noqa: S603  # a constant
            ["/bin/sh", "-c", _KEEPER], stdin=subprocess.PIPE, start_new_session=True, cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self._process = subprocess.Popen(  # noqa: S603  # the user's own command
                program,
                env={**os.environ, "PGKV_LOCK_TOKEN": str(lease.token)},
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  # one system call
            )
        except BaseException:
            self._dismiss_keeper()
            raise
        self._tell_keeper(f"{self._process.pid}\n")
        signals.aim(self._process.pid)
        self._watcher = threading.Thread(target=self._watch, name="pgkv-lock", daemon=True)
        self._watcher.start()

    def wait(self) -> int:
        """Wait for the end of the command; return its exit code as `subprocess` has it."""
        code = self._process.wait()
        self._signals.news.put("ended")
        self._watcher.join()
        self._tell_keeper("ended\n")
        self._dismiss_keeper()
        return code

    def _watch(self) -> None:
        while not self._lease.is_lost:
            news = ""
            with contextlib.suppress(queue.Empty):
                news = self._signals.news.get(timeout=self._lease.remaining())
            if news == "ended":
                return
            if news == "resumed" and not self._lease.is_lost:
                self._signals.send(signal.SIGCONT)
        self.lost_at = datetime.now(UTC).astimezone()
        if self._process.poll() is None:
            self.killed = True
            self._signals.send(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience)
        # Children that the command left running must not work under this lock either.
        self._signals.send(signal.SIGKILL)

    def _tell_keeper(self, line: str) -> None:
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):  # it was killed
            self._keeper.stdin.write(line.encode())
            self._keeper.stdin.flush()

    def _dismiss_keeper(self) -> None:
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):
            self._keeper.stdin.close()
        self._keeper.wait()


def _die_with(parent: int) -> Callable[[], None] | None:
    """Return a function for a child of `parent`: the kernel kills it when `parent` dies (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # found before the fork: the child only calls it

    def arrange() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os.kill(os.getpid(), signal.SIGKILL)

    return arrange


__all__ = ["lock", "locks"]
