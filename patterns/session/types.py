"""`Session`, what a program holds of one, and `SessionInfo`, what a user may see of theirs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..._observe import shown
from .data import id_of


class Session:
    """One session, as it was when it was loaded or made, and what you changed since.

    Change `data` as any dict, nested values included; `SessionStore.save` finds out what is
    different. A Session belongs to one request: it is not for several threads or tasks at once.

    Attributes:
        id: the secret token, for the cookie and nothing else: **not for logs**. Empty while the
            session was never stored. A rotation replaces it.
        data: a dict of JSON values. Top-level keys are merged one by one with those of other
            requests, and come back in no particular order.
        user_id: whose session it is, or None. Changed by `SessionStore.rotate` only.
        created_at: when it began, by the server's clock (UTC). None while never stored.
        expires_at: when it ends if it is not used again. None while never stored.
        is_new: it was made here and not loaded.
    """

    __slots__ = (
        "_before",
        "_ended",
        "_meta",
        "_moved",
        "_version",
        "created_at",
        "data",
        "expires_at",
        "id",
        "is_new",
        "user_id",
    )

    def __init__(
        self,
        data: dict[str, Any],
        *,
        id: str = "",
        user_id: str | None = None,
    ) -> None:
        self.id: str = id
        self.data: dict[str, Any] = data
        self.user_id: str | None = user_id
        self.created_at: datetime | None = None
        self.expires_at: datetime | None = None
        self.is_new: bool = True
        self._before: dict[str, str] = {}  # the JSON text of each key as the database has it
        self._version = 0
        self._meta: bytes | None = None
        self._moved = False  # loaded under an id that a rotation has replaced
        self._ended = False  # destroyed by this program

    @property
    def handle(self) -> str:
        """A name for this session that is no secret: that of its `SessionInfo`, until it rotates.

        Empty while it was never stored. Nobody can log in with it.
        """
        return id_of(self.id).hex() if self.id else ""

    @shown
    def __repr__(self) -> str:
        # Neither the token, the data nor the user, who may be an e-mail address, and reprs end in
        # logs. The handle is no secret, and names it in `list_user` too.
        state = "ended" if self._ended else "moved" if self._moved else ""
        if not state:
            state = "new" if self.is_new else "loaded"
        return state + (f" handle={self.handle[:8]}..." if self.id else "")


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A live session as its user may see it, on a page "your devices".

    Attributes:
        handle: names the session to `SessionStore.destroy_handle`. No secret, and no token.
        created_at: when it began (UTC, the server's clock).
        seen_at: when it was last used, at most ``touch_interval`` too early.
        expires_at: when it ends if it is not used again.
        ends_at: when it ends in any case.
        metadata: what was given to `SessionStore.create`.
        read_at: the server's time of this reading.
    """

    handle: str
    created_at: datetime
    seen_at: datetime
    expires_at: datetime
    ends_at: datetime
    metadata: Mapping[str, Any]
    read_at: datetime
    _read_clock: float = field(default_factory=time.monotonic, repr=False, compare=False)

    def idle(self) -> float:
        """Return the seconds since it was last used, by now; never below 0."""
        then = (self.read_at - self.seen_at).total_seconds()
        return max(0.0, then + time.monotonic() - self._read_clock)

    def remaining(self) -> float:
        """Return the seconds until it ends if it is not used again; never below 0."""
        then = (self.expires_at - self.read_at).total_seconds()
        return max(0.0, then - (time.monotonic() - self._read_clock))
