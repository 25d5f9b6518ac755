"""The command ``pgkv locks``: the holders of locks, who waits for them, and ending one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import typer

from ..errors import NotFoundError, TableNotFoundError
from . import console
from .command import DONE, Invocation, option

if TYPE_CHECKING:
    from ..patterns.lock.sql import Guarding, Holder, LockStatements
    from ..store import Store


def locks(
    call: Invocation,
    break_: int | None = option(
        "--break TOKEN",
        "Free the lock of this token at once. Its holder continues until its next renewal.",
    ),
    revoke: int | None = option(
        "--revoke TOKEN",
        "End this token. The lock becomes free when its lease would have ended. Never two holders.",
    ),
) -> int:
    """List the holders of locks: age, time left, waiters.

    Below the holders it lists the open transactions that have guarded a lease. A waiter of a lock that
    is not fair is counted after its first second. Exit code 1: no lease has that token.

    **Example:** `pgkv locks`

    **Example:** `pgkv locks --revoke 1795367314868272`
    """
    if break_ is not None and revoke is not None:
        raise typer.BadParameter("give --break or --revoke, not both")
    token = revoke if break_ is None else break_
    with call.store() as store:
        if token is not None:
            ended = _end(store, token, safely=break_ is None)
            call.answer({**ended, "ended": "broken" if revoke is None else "revoked"}, "")
            return DONE
        leases, guards = held(store)
    if call.json:
        console.say_json({"locks": leases, "guards": [each._asdict() for each in guards]})
        return DONE
    for lease in leases:
        lease["name"] += "" if lease["slot"] is None else f" [{lease['slot']}]"
    console.show_documents(
        leases,
        {
            "name": ("name", console.one_line),
            "holder": ("owner", console.one_line),
            "token": ("token", str),
            "age": ("age", console.duration),
            "remaining": ("remaining", console.duration),
            "waiters": ("waiters", str),
            "metadata": ("metadata", console.as_json),
        },
        title="Locks",
    )
    columns: console.Columns = {
        "name": ("key", lambda key: console.one_line(key or "?")),
        "pid": ("pid", str),
        "application": ("application", console.one_line),
        "state": ("state", str),
        "open for": ("seconds", console.duration),
    }
    rows = [{**each._asdict(), "what": "guard"} for each in guards]
    if rows and console.on_terminal():
        console.show_documents(rows, columns, title="Open guards")
    elif rows:
        console.show_documents(rows, {"": ("what", str), **columns})
    return DONE


def _tables(store: Store) -> list[LockStatements]:
    from ..patterns.lock.api import statements_of
    from ..patterns.lock.sql import LockStatements

    return [statements_of(store, LockStatements, durable=durable) for durable in (True, False)]


def held(store: Store) -> tuple[list[dict[str, Any]], list[Guarding]]:
    """Return the leases, each with how many wait for it, and the open guards."""
    leases: list[dict[str, Any]] = []
    guards: list[Guarding] = []
    waiting: dict[str, int] = {}
    tables = _tables(store)
    for sql in tables:
        with contextlib.suppress(TableNotFoundError):
            leases += [_shown(each) for each in store._execute(sql.holders())]
            open_now: list[Guarding] = store._execute(sql.guards())
            guards += open_now
    with contextlib.suppress(TableNotFoundError):
        waiting = store._execute(tables[0].queue())
    for lease in leases:
        lease["waiters"] = waiting.pop(lease["name"], 0)
    return leases, guards


def _shown(holder: Holder) -> dict[str, Any]:
    from ..patterns.lock.lease import info_of
    from ..patterns.lock.sql import name_and_slot

    info = info_of(holder)
    name, slot = name_and_slot(info.name)
    return {
        "name": name,
        "slot": slot,
        "owner": info.owner,
        "token": info.token,
        "age": round(info.age(), 3),
        "remaining": round(info.remaining(), 3),
        "acquired_at": info.acquired_at.isoformat(),
        "expires_at": info.expires_at.isoformat(),
        "metadata": info.metadata,
    }


def _end(store: Store, token: int, *, safely: bool) -> dict[str, Any]:
    """End the lease of that token; return who held it."""
    for sql in _tables(store):
        with contextlib.suppress(TableNotFoundError):
            for holder in store._execute(sql.holders()):
                if holder.token != token:
                    continue
                key = store._sql.prefix_bytes + holder.key.encode()
                if safely:
                    done = store._execute(sql.revoke(key, token))
                else:
                    done = store._execute(sql.release(key, token, notify=True))
                if done:
                    shown = _shown(holder)
                    return {name: shown[name] for name in ("name", "slot", "owner", "token")}
    raise NotFoundError(f"no lease has the token {token}; see pgkv locks")


__all__ = ["locks"]
