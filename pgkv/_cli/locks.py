"""The commands about locks: who holds which, and running a program under one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from typing import Annotated, Any

import typer

from ..errors import LeaseLostError, LockTimeoutError, NotFoundError, TableNotFoundError
from ..patterns.lock.api import Lock, statements_of
from ..patterns.lock.lease import info_of
from ..patterns.lock.sql import SEPARATOR, Guarding, Holder, LockStatements
from ..store import Store
from . import console
from .command import DONE, Call, Seconds, duration

BUSY = 75  # sysexits' EX_TEMPFAIL: try again later
LOST = 76  # the lease was lost, and the command killed
KILL_AFTER = 0.5  # of the time between the loss and the lease's end, from TERM to KILL


def locks(
    call: Call,
    break_: Annotated[
        int | None,
        typer.Option("--break", metavar="TOKEN", help="Free the lock of this token at once. Its "
                     "holder works on until its next renewal."),
    ] = None,
    revoke: Annotated[
        int | None,
        typer.Option("--revoke", metavar="TOKEN", help="End this token; the lock is free when its "
                     "lease would have ended. Never two holders."),
    ] = None,
) -> int:  # fmt: skip
    """List who holds which lock: since when, for how long yet, how many wait in order.

    Below, the transactions that have guarded a lease and are still open. Waiters of locks that are
    not fair leave no trace and are not counted. Exit code 1: no lease has that token.

    **Example:** `pgkv locks`

    **Example:** `pgkv locks --revoke 1795367314868272`
    """
    if break_ is not None and revoke is not None:
        raise typer.BadParameter("give --break or --revoke, not both")
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
            lease["name"] + ("" if lease["slot"] is None else f" [{lease['slot']}]"),
            lease["owner"],
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
            each.key or "?",
            str(each.pid),
            each.application,
            each.state,
            console.duration(each.seconds),
        )
        for each in guards
    ]
    if console.on_terminal():
        console.out().print(console.table(columns, rows, title="Locks"))
        if held:
            names = ("name", "pid", "application", "state", "open for")
            console.out().print(console.table(names, held, title="Open guards"))
        return DONE
    for row in rows:
        console.say("\t".join(row))
    for guard in held:
        console.say("\t".join(("guard", *guard)))
    return DONE


def _shown(holder: Holder) -> dict[str, Any]:
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
    """End the lease of that token; whose it was."""
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


def lock(
    call: Call,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The lock.")],
    program: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="What to run, and its arguments.")
    ],
    ttl: Annotated[
        float,
        typer.Option("--ttl", metavar="TIME", parser=duration,
                     help="How long a dead holder keeps it."),
    ] = "30s",  # type: ignore[assignment]  # typer parses it
    wait: Annotated[
        Seconds,
        typer.Option("--wait", metavar="TIME", parser=duration,
                     help="Wait at most so long. Default: without end."),
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Do not wait: exit with 75 if it is held.")] = False,
) -> int:  # fmt: skip
    """Run a command while holding a lock: for cron jobs on many machines.

    The command finds its fencing token in PGKV_LOCK_TOKEN. It is killed when the lease is lost
    (exit code 76). Exit code 75: the lock was held. Otherwise the command's own.

    **Example:** `pgkv lock nightly --skip -- ./report.sh`

    **Example:** `pgkv lock deploy --wait 5m -- make deploy`
    """
    with call.store(create=True) as store:
        lost = threading.Event()
        made = Lock(store, name, ttl=ttl, on_lost=lost.set, metadata={"command": program[0]})
        try:
            lease = made.try_acquire() if skip else made.acquire(wait)
        except LockTimeoutError:
            lease = None
        if lease is None:
            console.fail(LockTimeoutError.__name__, f"the lock {name!r} is held", as_json=call.json)
            return BUSY
        margin = lease.ttl - lease.remaining()
        code = 1
        try:
            code = _run(call, program, lease.token, lost, margin * KILL_AFTER)
        finally:
            lease.release()
        if lost.is_set():
            why = f"the lease on {name!r} was lost; {program[0]} was killed"
            console.fail(LeaseLostError.__name__, why, as_json=call.json)
            return LOST
        return code


def _run(call: Call, program: list[str], token: int, lost: threading.Event, patience: float) -> int:
    """Run it in a process group of its own, so that its children can be killed with it."""
    environment = {**os.environ, "PGKV_LOCK_TOKEN": str(token)}
    try:
        process = subprocess.Popen(program, env=environment, start_new_session=True)  # noqa: S603  # what the user asked for
    except OSError as error:
        why = f"cannot run {program[0]}: {error.strerror}"
        console.fail(type(error).__name__, why, as_json=call.json)
        return 127 if isinstance(error, FileNotFoundError) else 126

    def tell(number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    def forward(number: int, _frame: object) -> None:
        tell(number)

    before = {
        number: signal.signal(number, forward)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
    }

    def watch() -> None:
        lost.wait()
        if process.poll() is None:
            tell(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        # Also what the command left behind: nobody may work under this lock any more.
        tell(signal.SIGKILL)

    watcher = threading.Thread(target=watch, name="pgkv-lock", daemon=True)
    watcher.start()
    try:
        code = process.wait()
        if lost.is_set():
            watcher.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


__all__ = ["lock", "locks"]
