"""Scene: visitors log in. Their sessions continue under new tokens; the old tokens end."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

from ...errors import SessionGoneError
from ...patterns.session.api import Session, SessionStore
from .stage import Check, Report, Scene, Stage

VISITORS = 100
GRACE = 1.0  # seconds in which an old token still reads


def play(stage: Stage) -> Report:
    """Follow the sessions of all visitors through login, grace and logout."""
    sessions = SessionStore(stage.store)
    sessions.create_table()

    def load(tokens: Iterable[str]) -> list[Session | None]:
        return [sessions.load(token) for token in tokens]

    users = [f"user:{number}" for number in range(VISITORS)]
    carts = [{"cart": [number, number + 1]} for number in range(VISITORS)]
    # A thief may know these: the tokens that the visitors had before they logged in.
    old = [sessions.create(cart).id for cart in carts]
    rotated = monotonic()
    current: list[Session] = []
    for session, user in zip(load(old), users, strict=True):
        assert session is not None
        session.data["greeting"] = f"hello {user}"
        sessions.rotate(session, user_id=user, grace=GRACE)
        current.append(session)
    found = load(session.id for session in current)
    survived = sum(
        session is not None
        and session.user_id == user
        and session.data == {**cart, "greeting": f"hello {user}"}
        for session, user, cart in zip(found, users, carts, strict=True)
    )
    late = load(old)
    as_before = sum(
        session is not None and session.user_id is None and session.data == cart
        for session, cart in zip(late, carts, strict=True)
    )
    refused = sum(_is_refused(sessions, session) for session in late if session is not None)
    in_time = monotonic() - rotated < GRACE
    stage.wait("waiting for the old tokens to end", GRACE, lambda: not any(load(old[-1:])))
    dead = sum(session is None for session in load(old))
    ended = sum(map(sessions.destroy_user, users))
    revived = sum(not _is_refused(sessions, session) for session in current)
    alive = sum(session is not None for session in load(session.id for session in current))
    checks = [
        Check(f"{survived} of {VISITORS} sessions kept their data, under a new token and with their "
              "user", survived == VISITORS),
        Check(f"{dead} of {VISITORS} old tokens are dead after the grace", dead == VISITORS),
        Check(f"destroy_user ended {ended}; {alive or 'none'} alive, {revived or 'none'} revived by a late save",
              (ended, alive, revived) == (VISITORS, 0, 0)),
    ]  # fmt: skip
    if in_time:
        text = (
            f"within the grace of {GRACE:g} s {as_before} of {VISITORS} old tokens read what was "
            f"there before the login, without the user; {refused} of {VISITORS} writes were refused"
        )
        checks.insert(1, Check(text, as_before == refused == VISITORS))
    return Report([], checks)


def _is_refused(sessions: SessionStore, session: Session) -> bool:
    session.data["late"] = True
    try:
        sessions.save(session)
    except SessionGoneError:
        return True
    return False


SCENE = Scene(
    "Sessions",
    "A login gives a session a new token. The cart must survive it, and the old token must be "
    "worthless to a thief.",
    play,
)
