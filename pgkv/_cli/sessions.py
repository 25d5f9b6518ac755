"""``pgkv sessions``: a user's sessions, and ending them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import typer

from ..errors import NotFoundError, TableNotFoundError
from . import console
from .command import DONE, Invocation, argument, flag, option

if TYPE_CHECKING:
    from ..patterns.session.data import SessionInfo


def sessions(
    call: Invocation,
    user: str = argument("USER", "The sessions' user_id."),
    end: str | None = option("--end HANDLE", "End the session with this handle in the list."),
    end_all: bool = flag("--end-all", "End all sessions of the user."),
) -> int:
    """List a user's live sessions, the last used first, or end them.

    A handle names a session and is not a secret: the token is not in the table. A
    session that was ended is dead at once, in every process. Exit code 1: no session was ended.

    **Example:** `pgkv sessions user:17`

    **Example:** `pgkv sessions user:17 --end-all`
    """
    if end is not None and end_all:
        raise typer.BadParameter("give --end or --end-all, not both")
    from ..patterns.session.api import SessionStore

    found: list[SessionInfo] = []
    with call.store() as store:
        kept = SessionStore(store)
        if end is not None or end_all:
            ended = kept.destroy_user(user) if end is None else kept.destroy_handle(end, user)
            if not ended:
                raise NotFoundError(f"the user {user!r} has no such session")
            call.answer({"ended": int(ended)}, f"ended {console.count(int(ended), 'session')}")
            return DONE
        with contextlib.suppress(TableNotFoundError):
            found = kept.list_user(user)
    documents = [
        {
            "handle": each.handle,
            "age": (each.read_at - each.created_at).total_seconds(),
            "idle": each.idle(),
            "remaining": (each.expires_at - each.read_at).total_seconds(),
            "created_at": each.created_at.isoformat(),
            "ends_at": each.ends_at.isoformat(),
            "metadata": dict(each.metadata),
        }
        for each in found
    ]
    columns: console.Columns = {
        "handle": ("handle", str),
        "age": ("age", console.duration),
        "idle": ("idle", console.duration),
        "remaining": ("remaining", console.duration),
        "metadata": ("metadata", console.as_json),
    }
    call.show(documents, columns, f"The user {user!r} has no live session.")
    return DONE
