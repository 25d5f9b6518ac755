"""``pgkv idempotency``: what is known of an idempotency key, and forgetting it."""

from __future__ import annotations

from enum import StrEnum

from ..errors import NotFoundError
from . import console
from .command import DONE, Invocation, argument, option


class KeyAction(StrEnum):
    """What `pgkv idempotency` does."""

    SHOW = "show"
    FORGET = "forget"


def idempotency(
    call: Invocation,
    action: KeyAction = argument("", "show, or forget."),
    key: str = argument("", "The idempotency key."),
    scope: str = option("--scope SCOPE", "Whose key it is. Default: none.", ""),
) -> int:
    """Show what is known of an idempotency key, or make it new.

    **show** says whether the work is done, running (an attempt has the lease) or abandoned (its attempt died).
    The result is not shown. **forget** drops the result: the next request with the key runs. An attempt under
    way can then no longer complete. Exit code 1: the key is not known.

    **Example:** `pgkv idempotency show 8e03978e --scope user:17`

    **Example:** `pgkv idempotency forget 8e03978e`
    """
    from ..patterns.idempotency.api import Idempotency

    with call.store() as store:
        keys = Idempotency(store)
        found = keys.get(key, scope=scope)
        if found is None or (action is KeyAction.FORGET and not keys.forget(key, scope=scope)):
            raise NotFoundError(f"the idempotency key {key!r} is not known in this scope")
    facts = {
        "key": key,
        "status": "forgotten" if action is KeyAction.FORGET else found.status,
        "token": found.token,
        "created_at": found.created_at.isoformat(),
        "expires_at": found.expires_at.isoformat(),
        "result_bytes": None if found.result is None else len(found.result),
    }
    if call.json:
        console.say_json(facts)
    elif action is KeyAction.FORGET:
        console.say(f"forgotten {console.one_line(key)}")
    else:
        console.show_table(("", ""), [(name, str(value)) for name, value in facts.items()])
    return DONE
