"""``pgkv sessions``: a user's sessions, and ending them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..errors import NotFoundError, TableNotFoundError
from . import console
from .command import DONE, Invocation, flag


def sessions(
    call: Invocation,
    user: Annotated[str, typer.Argument(metavar="USER", help="The sessions' user_id.")],
    end: Annotated[
        str | None,
        typer.Option("--end", metavar="HANDLE", help="End the session that the list shows so."),
    ] = None,
    end_all: Annotated[bool, flag("--end-all", help="End all sessions of the user.")] = False,
) -> int:
    """List a user's live sessions, the last used first, or end them.

    A handle names a session and is no secret: it is not the token, which the table does not have. A
    session that was ended is dead at once, in every process. Exit code 1: no session was ended.

    **Example:** `pgkv sessions user:17`

    **Example:** `pgkv sessions user:17 --end-all`
    """
    if end is not None and end_all:
        raise typer.BadParameter("give --end or --end-all, not both")
    from ..patterns.session.api import SessionStore

    with call.store() as store:
        kept = SessionStore(store)
        try:
            if end is not None or end_all:
                ended = kept.destroy_user(user) if end is None else kept.destroy_handle(end, user)
                if not ended:
                    raise NotFoundError(f"the user {user!r} has no such session")
                if call.json:
                    console.say_json({"ended": int(ended)})
                else:
                    console.say(f"ended {console.count(int(ended), 'session')}")
                return DONE
            found = kept.list_user(user)
        except TableNotFoundError:
            if end is not None or end_all:
                raise
            found = []
    shown: list[dict[str, Any]] = [
        {
            "handle": each.handle,
            "idle": round(each.idle(), 3),
            **{name: getattr(each, name).isoformat() for name in _TIMES},
            "metadata": dict(each.metadata),
        }
        for each in found
    ]
    if call.json:
        for document in shown:
            console.say_json(document)
    elif not found:
        console.note(f"The user {user!r} has no live session.")
    else:
        rows = [
            (
                each.handle,
                console.duration((each.read_at - each.created_at).total_seconds()),
                console.duration(each.idle()),
                console.duration((each.expires_at - each.read_at).total_seconds()),
                console.printable(json.dumps(dict(each.metadata), ensure_ascii=False)),
            )
            for each in found
        ]
        console.show_table(("handle", "age", "idle", "ends in", "metadata"), rows)
    return DONE


_TIMES = ("created_at", "seen_at", "expires_at", "ends_at")
