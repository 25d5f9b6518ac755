"""`pgkv locks` and `pgkv lock`, as a terminal sees them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

if sys.platform == "win32":
    pytest.skip("Windows has other signals", allow_module_level=True)
pytest.importorskip("typer")
pytest.importorskip("rich")

import pgkv
from pgkv._cli.command import Invocation
from pgkv._cli.lock import _guarded, _Guardian
from pgkv._embedded.binaries import exists
from pgkv.cli import main
from tests.faults.support import newest
from tests.servers import LATE, PATIENCE, Server, wait_until

pytestmark = newest

ROOT = Path(__file__).resolve().parents[2]


def run(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgkv", *arguments],
        env={**os.environ, "PGKV_DSN": dsn},
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def asked(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that starts no other, here: an interpreter of its own would bring nothing."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*arguments, "--dsn", dsn])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def listed(dsn: str) -> dict[str, Any]:
    done = asked(dsn, "locks", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_locks_are_listed_broken_and_revoked(dsn: str) -> None:
    """Holders with age, rest, slot and metadata; open guards; --revoke and --break by token."""
    assert listed(dsn) == {"locks": [], "guards": []}
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "billing", metadata={"job": 7})
        lease = lock.acquire()
        slot = pgkv.Semaphore(store, "gpu", 2, durable=False).acquire()
        with psycopg.connect(dsn, application_name="the guard") as conn:
            lease.guard(conn)
            found = listed(dsn)
            (guard,) = found["guards"]
            assert (guard["key"], guard["application"]) == ("billing", "the guard")
            conn.rollback()
        by_name = {each["name"]: each for each in found["locks"]}
        assert by_name["billing"]["metadata"] == {"job": 7}
        assert by_name["billing"]["token"] == lease.token
        assert 0 < by_name["billing"]["remaining"] <= 30
        assert by_name["gpu"]["slot"] == slot.slot
        told = ("a text", 1000, 7.5, True, [1.0], None)
        with contextlib.ExitStack() as stack:
            for n, metadata in enumerate(told):
                stack.enter_context(pgkv.Lock(store, f"told {n}", metadata=metadata).acquire())
            text = asked(dsn, "locks").stdout
        assert "billing\t" in text
        assert text.splitlines()[0].endswith('\t{"job": 7}')
        shown = [row.rpartition("\t")[2] for row in text.splitlines() if row.startswith("told")]
        assert shown == ['"a text"', "1000", "7.5", "true", "[1.0]", ""]
        assert asked(dsn, "locks", "--revoke", str(lease.token)).returncode == 0
        assert lock.try_acquire() is None
        assert asked(dsn, "locks", "--break", str(slot.token)).returncode == 0
        assert asked(dsn, "locks", "--break", "1").returncode == 1
        assert [each["name"] for each in listed(dsn)["locks"]] == ["billing"]


def test_each_answer_about_locks_is_json(dsn: str) -> None:
    """With --json what was ended is a document on standard output, what failed one on standard error."""
    with pgkv.Store.connect(dsn) as store:
        for option, ended in (("--revoke", "revoked"), ("--break", "broken")):
            lease = pgkv.Semaphore(store, "gpu", 2).acquire()
            done = asked(dsn, "locks", option, str(lease.token), "--json")
            told = json.loads(done.stdout)
            assert (done.returncode, told.pop("owner")) == (0, lease.owner)
            assert told == {"name": "gpu", "slot": lease.slot, "token": lease.token, "ended": ended}
            none = asked(dsn, "locks", option, "1", "--json")
            assert (none.returncode, none.stdout) == (1, "")
            assert json.loads(none.stderr)["error"] == "NotFoundError"
        with pgkv.Lock(store, "job").acquire():
            held = run(dsn, "--json", "lock", "job", "--skip", "--", "true")
            assert (held.returncode, json.loads(held.stderr)["error"]) == (75, "LockTimeoutError")
    for program, code in (("no-such-program", 127), ("/", 126)):
        done = run(dsn, "--json", "lock", "job", "--", program)
        assert (done.returncode, done.stdout) == (code, "")
        assert f"cannot run {program}" in json.loads(done.stderr)["message"]


def test_a_command_runs_under_the_lock(dsn: str) -> None:
    """Its exit code and its token pass through; --skip answers 75 while it is held."""
    program = "import os, sys; print(os.environ['PGKV_LOCK_TOKEN']); sys.exit(7)"
    done = run(dsn, "lock", "job", "--", sys.executable, "-c", program)
    assert done.returncode == 7, done.stderr
    assert int(done.stdout) > 0
    with pgkv.Store.connect(dsn) as store, pgkv.Lock(store, "job").acquire(timeout=0):
        assert run(dsn, "lock", "job", "--skip", "--", "true").returncode == 75
        assert run(dsn, "lock", "job", "--wait", "0.1", "--", "true").returncode == 75
    assert run(dsn, "lock", "job", "--skip", "--", "no-such-program").returncode == 127


def test_a_command_whose_lease_is_lost_is_killed(dsn: str) -> None:
    """After --break the command ends with 76, its children with it."""
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "job")
        process = subprocess.Popen(
            [sys.executable, "-m", "pgkv", "lock", "job", "--ttl", "6", "--", "sh", "-c", "sleep 300; true"],
            env={**os.environ, "PGKV_DSN": dsn}, cwd=ROOT, stderr=subprocess.PIPE,
        )  # fmt: skip
        wait_until(lambda: lock.holder() is not None, "it holds the lock")
        info = lock.holder()
        assert info is not None
        assert lock.force_release(info.token)
        started = time.monotonic()
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 76, error
        assert time.monotonic() - started < 5 + LATE


# -- the guardian of a command, and its end


def hear_signals() -> None:
    """In a child: a shell may have started the tests in the background, where these are ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


class Guarded:
    """A `pgkv lock` whose command says its process id, and the one of a child that it has."""

    # The child keeps nothing open that the test reads.
    COMMAND = "sleep 300 >/dev/null 2>&1 & echo $$ $! >{file}.new; mv {file}.new {file}; wait"

    def __init__(self, dsn: str, file: Path, *options: str, command: str = COMMAND) -> None:
        script = command.format(file=shlex.quote(str(file)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgkv", "lock", "job", *options, "--", "sh", "-c", script],
            env={**os.environ, "PGKV_DSN": dsn}, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=hear_signals,  # noqa: PLW1509  # no threads here
        )  # fmt: skip
        wait_until(file.exists, "the command runs")
        self.pids = [int(word) for word in file.read_text().split()]

    def ends(self) -> tuple[int, str]:
        """The exit code, and standard error."""
        _, error = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, error

    def is_dead(self) -> bool:
        return not any(map(exists, self.pids))


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Callable[..., Guarded]]:
    """guarded(dsn, "--ttl", "1", command=...): its processes are killed afterwards."""
    made: list[Guarded] = []

    def start(dsn: str, *options: str, **more: str) -> Guarded:
        made.append(Guarded(dsn, tmp_path / f"pids{len(made)}", *options, **more))
        return made[-1]

    yield start
    for each in made:
        with each.process as process:
            process.kill()
        for pid in each.pids:
            if exists(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_command_dies_with_its_guardian(
    dsn: str, guarded: Callable[..., Guarded], number: signal.Signals
) -> None:
    """SIGKILL of pgkv, or another death without warning: the command and its children are dead long
    before another holder gets the lock."""
    first = guarded(dsn)
    first.process.send_signal(number)
    first.process.wait(PATIENCE)
    wait_until(first.is_dead, "the command and its child are dead")
    with pgkv.Store.connect(dsn) as store:
        assert pgkv.Lock(store, "job").holder() is not None


def test_a_command_whose_whole_job_is_killed(dsn: str, guarded: Callable[..., Guarded]) -> None:
    """SIGKILL of pgkv's process group, as a supervisor does it, ends the command too."""
    first = guarded(dsn)
    os.killpg(first.process.pid, signal.SIGKILL)
    wait_until(first.is_dead, "the command and its child are dead")


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2],
)
def test_signals_are_passed_on(
    dsn: str, guarded: Callable[..., Guarded], number: signal.Signals
) -> None:
    """The command gets the signal; its own end decides the exit code, and the lock is free."""
    name = number.name.removeprefix("SIG")
    command = f"trap 'echo caught {name} >&2; exit 9' {name}; {Guarded.COMMAND}"
    first = guarded(dsn, command=command)
    first.process.send_signal(number)
    code, error = first.ends()
    # The shell may tell first that its own child has died of the signal.
    assert (code, error.splitlines()[-1:]) == (9, [f"caught {name}"])
    assert listed(dsn)["locks"] == []


def test_a_command_that_a_signal_ends(dsn: str, guarded: Callable[..., Guarded]) -> None:
    """SIGQUIT without a handler ends the command: 128 and its number, as a shell says."""
    first = guarded(dsn, command="echo $$ >{file}.new; mv {file}.new {file}; exec sleep 300")
    first.process.send_signal(signal.SIGQUIT)
    assert first.ends() == (128 + signal.SIGQUIT, "")
    assert first.is_dead()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_ends_the_wait_for_the_lock(dsn: str, number: signal.Signals) -> None:
    """Before the command runs, a signal ends pgkv, which leaves no lock behind."""
    with pgkv.Store.connect(dsn) as store, pgkv.Lock(store, "job").acquire() as lease:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgkv", "lock", "job", "--", "true"],
            env={**os.environ, "PGKV_DSN": make_conninfo(dsn, application_name="the waiter")}, cwd=ROOT, stderr=subprocess.PIPE,
            preexec_fn=hear_signals,  # noqa: PLW1509  # no threads here
        )  # fmt: skip
        waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'the waiter'"
        with psycopg.connect(dsn, autocommit=True) as conn:
            wait_until(lambda: conn.execute(waits).fetchone() != (0,), "it waits")
        process.send_signal(number)
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + number, error
        assert b"Traceback" not in error
        lease.check()


LOST = re.compile(
    r"pgkv: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d: the lease on 'job' is no longer held: .+; sh was killed\n"
)


@pytest.mark.parametrize("how", ["lost", "frozen"])
def test_a_server_that_goes_away(
    make_server: Callable[..., Server], guarded: Callable[..., Guarded], how: str
) -> None:
    """A server that is gone, or answers no more: the command is killed before the lease ends, exit
    code 76, and one line says what happened and when."""
    server = make_server()
    first = guarded(server.dsn, "--ttl", "5", "--timeout", "60")
    if how == "frozen":
        server.freeze()
    else:
        server.stop("immediate")
    try:
        code, error = first.ends()
    finally:
        if how == "frozen":
            server.thaw()
    assert code == 76, error
    assert LOST.fullmatch(error), error
    assert first.is_dead()


def test_a_lock_that_cannot_be_freed(
    make_server: Callable[..., Server], guarded: Callable[..., Guarded]
) -> None:
    """When the server is frozen at the end, the command's exit code counts; a line says what becomes of
    the lock."""
    server = make_server()
    first = guarded(
        server.dsn,
        "--ttl",
        "60",
        command="echo $$ >{file}.new; mv {file}.new {file}; exec sleep 300",
    )
    server.freeze()
    try:
        os.kill(first.pids[0], signal.SIGKILL)
        code, error = first.ends()
    finally:
        server.thaw()
    assert code == 128 + signal.SIGKILL
    assert "the lock 'job' was not freed, it ends with its ttl of 60 s" in error
    assert error.count("\n") == 1


def states(guarded: Guarded) -> set[str]:
    """The states of pgkv, the command and its child, as /proc has them."""
    pids = [guarded.process.pid, *guarded.pids]
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


@pytest.mark.skipif(sys.platform != "linux", reason="process states of /proc")
def test_a_guardian_that_is_suspended(dsn: str, guarded: Callable[..., Guarded]) -> None:
    """Ctrl-Z stops the command as well, whose lease is not renewed meanwhile; both go on together."""

    first = guarded(dsn)
    first.process.send_signal(signal.SIGTSTP)
    wait_until(lambda: states(first) == {"T"}, "all are stopped")
    first.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "T" not in states(first), "all go on")
    first.process.send_signal(signal.SIGTERM)
    assert first.ends()[0] == 128 + signal.SIGTERM


def test_a_suspended_guardian_is_overtaken(
    dsn: str, guarded: Callable[..., Guarded], tmp_path: Path
) -> None:
    """The lease ends while Ctrl-Z keeps the command stopped, and another process gets the lock. The
    command does not run again: it is killed, exit code 76."""
    log = tmp_path / "log"
    command = f"(while :; do echo >>{log}; sleep 0.01; done) & echo $$ $! >{{file}}.new; mv {{file}}.new {{file}}; wait"
    first = guarded(dsn, "--ttl", "3", command=command)
    wait_until(log.exists, "it works")
    first.process.send_signal(signal.SIGTSTP)
    if sys.platform == "linux":
        wait_until(lambda: states(first) == {"T"}, "all are stopped")
    with (
        pgkv.Store.connect(dsn) as store,
        pgkv.Lock(store, "job").acquire(timeout=PATIENCE) as lease,
    ):
        written = log.stat().st_size
        first.process.send_signal(signal.SIGCONT)
        code, error = first.ends()
        assert (code, log.stat().st_size) == (76, written), error
        assert LOST.fullmatch(error), error
        assert first.is_dead()
        lease.check()


# The child leads a process group of its own, as each job of a shell with job control does.
JOB = (
    f"{shlex.quote(sys.executable)} -c 'import os, time; os.setpgid(0, 0); time.sleep(300)' "
    ">/dev/null 2>&1 & while [ $(ps -o pgid= $!) != $! ]; do :; done; "
    "echo $$ $! >{file}.new; mv {file}.new {file}; wait"
)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a session in /proc")
@pytest.mark.parametrize("how", ["lost", "killed", "suspended"])
def test_a_job_in_a_process_group_of_its_own(
    dsn: str, guarded: Callable[..., Guarded], how: str
) -> None:
    """Such a child is killed and stopped with the command."""
    first = guarded(dsn, "--ttl", "6", command=JOB)
    if how == "killed":
        first.process.kill()
    elif how == "lost":
        with pgkv.Store.connect(dsn) as store:
            lock = pgkv.Lock(store, "job")
            info = lock.holder()
            assert info is not None
            assert lock.force_release(info.token)
        code, error = first.ends()
        assert code == 76, error
    else:
        first.process.send_signal(signal.SIGTSTP)
        wait_until(lambda: states(first) == {"T"}, "all are stopped")
        first.process.send_signal(signal.SIGCONT)
        wait_until(lambda: "T" not in states(first), "all go on")
        return
    wait_until(first.is_dead, "the command and its job are dead")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_child_that_ignores_signals(
    dsn: str, guarded: Callable[..., Guarded], number: signal.Signals
) -> None:
    """The signal ends the command, and its child ignores it. The child is killed before the lock is
    free."""
    child = "(trap '' INT QUIT HUP TERM; exec sleep 300) >/dev/null 2>&1 &"
    first = guarded(
        dsn, command=f"{child} echo $$ $! >{{file}}.new; mv {{file}}.new {{file}}; wait"
    )
    first.process.send_signal(number)
    assert first.ends() == (128 + number, "")
    assert first.is_dead()
    assert listed(dsn)["locks"] == []


def test_a_lease_lost_before_the_command_starts(
    dsn: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """pgkv was stopped between the grant and the start: the command does not run."""
    with pgkv.Store.connect(dsn) as store, _Guardian() as guardian:
        lease = pgkv.Lock(store, "job").acquire()
        lease.release()
        program = ["touch", str(tmp_path / "ran")]
        assert _guarded(Invocation(), program, lease, guardian) == 76
    assert not (tmp_path / "ran").exists()
    assert "touch was not started" in capfd.readouterr().err
