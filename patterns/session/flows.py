"""What each operation on sessions does: flows that a sync or an async store runs.

The statements are in `pgkv.patterns.session.sql`; here is what surrounds them: tokens, checks, what is sent
of a changed session, and which error an outcome means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ..._engine.schema import companion, ensure
from ..._ops.codec import seconds
from ..._ops.op import Flow, Op, do
from ...config import VALUE_SIZE_MAX, Config, Seconds, Table, require_int
from ...errors import (
    ConfigError,
    ConflictError,
    InvalidValueError,
    SerializationError,
    SessionConflictError,
    SessionError,
    SessionGoneError,
)
from .._runtime.checks import encrypts
from .._runtime.sql import sweep_slots
from .data import (
    KEEP,
    Keep,
    Session,
    SessionInfo,
    difference,
    document,
    id_of,
    is_token,
    new_token,
    read_document,
    require_mapping,
    texts_of,
    user_of,
    values_of,
)
from .request import RequestSession
from .sql import (
    LOOK_AGAIN,
    REPEATS,
    SESSIONS,
    UNCHANGED,
    Lifetimes,
    Loaded,
    Mode,
    NewLifetimes,
    SessionStatements,
)

_HANDLE = re.compile("[0-9a-f]{64}")
MODES = ("merge", "error", "last_wins")


class SessionFlows:
    """The operations on the sessions of one table; the arguments are those of `SessionStore`."""

    sql: SessionStatements

    def __init__(
        self,
        config: Config,
        *,
        idle_timeout: Seconds,
        absolute_timeout: Seconds,
        touch_interval: Seconds,
        durable: bool,
        max_data_size: int,
    ) -> None:
        self.lifetimes: Lifetimes = Lifetimes(
            _setting("idle_timeout", idle_timeout),
            _setting("absolute_timeout", absolute_timeout),
            _setting("touch_interval", touch_interval, zero=True),
        )
        if self.lifetimes.touch >= self.lifetimes.idle:
            raise ConfigError(
                "touch_interval must be shorter than idle_timeout: a session in use would end"
            )
        require_int("max_data_size", max_data_size, 2, VALUE_SIZE_MAX)
        self.size_max: int = min(max_data_size, config.max_value_size)
        self.config = config
        self._shards: Any = getattr(config, "shards", None)
        if self._shards is not None and self._shards.own is not None:
            raise ConfigError(
                "sessions are in the slots of their tokens, which are random: give the sharded store, "
                "not the store of one slot"
            )
        self.table: Table = companion(config, SESSIONS, durable=durable)
        self.sql = self._statements(inside=False)
        self._inside: SessionFlows | None = None

    def inside(self) -> SessionFlows:
        if self._inside is None:
            twin = self._inside = object.__new__(SessionFlows)
            twin.__dict__.update(self.__dict__, _inside=twin)
            twin.sql = self._statements(inside=True)
        return self._inside

    def _statements(self, *, inside: bool) -> SessionStatements:
        if not encrypts(self.config):
            return SessionStatements(self.config, self.table, self.lifetimes, inside=inside)
        from .encrypted import EncryptedSessionStatements

        return EncryptedSessionStatements(self.config, self.table, self.lifetimes, inside=inside)

    def facts(self) -> str:
        idle, absolute = self.lifetimes.idle, self.lifetimes.absolute
        return f"{self.table.name!r} idle_timeout={idle:g} absolute_timeout={absolute:g}"

    # -- one session

    def create(
        self,
        data: Mapping[str, Any] | None,
        user_id: object,
        metadata: Mapping[str, Any] | None,
        idle: Seconds | None = None,
        absolute: Seconds | None = None,
    ) -> Flow[Session]:
        user = None if user_id is None else user_of(user_id)
        data = {} if data is None else data
        require_mapping(data, "data")
        session = Session(dict(data), user_id=user)
        if metadata:
            session._meta = document(texts_of(metadata, self.size_max, "metadata"))
        own = self._own(
            session, KEEP if idle is None else idle, KEEP if absolute is None else absolute
        )
        yield from self._store(session, own)
        return session

    def _own(self, session: Session, idle: Any, absolute: Any) -> NewLifetimes:
        """The lifetimes that a session is given, by the call or by what it is in a request."""
        if isinstance(session.data, RequestSession):
            asked = session.data.lifetimes
            idle, absolute = (
                there if isinstance(each, Keep) else each
                for each, there in zip((idle, absolute), asked, strict=True)
            )
        if isinstance(idle, Keep) and isinstance(absolute, Keep):
            return UNCHANGED
        own = NewLifetimes(_own("idle_timeout", idle), _own("absolute_timeout", absolute))
        if own.idle and own.idle <= self.lifetimes.touch:
            raise InvalidValueError(
                "idle_timeout must be longer than the store's touch_interval of "
                f"{self.lifetimes.touch:g} seconds: a session in use would end"
            )
        if own.idle and not own.absolute and own.idle > self.lifetimes.absolute:
            raise InvalidValueError(
                "idle_timeout is longer than the store's absolute_timeout of "
                f"{self.lifetimes.absolute:g} seconds; give absolute_timeout as well"
            )
        return own

    def _store(self, session: Session, own: NewLifetimes) -> Flow[None]:
        """Insert a session that was never stored, under a token of its own."""
        texts = self._texts(session)
        token = new_token()
        op = self.sql.create(id_of(token), session.user_id, document(texts), session._meta, own)
        created = yield from do(op)
        if created is None:  # another row has this hash: a broken source of randomness
            raise SessionError("a new session's token exists already; nothing was stored")
        session._version, session.expires_at, session.created_at = created
        session.id, session._before = token, texts
        _note(session, own)

    def _fitting(self, id: bytes) -> str:
        """A new token for the session of an id: of a sharded store one of the same slot."""
        token = new_token()
        if self._shards is not None:
            slot = self._shards.of_id(id)
            while self._shards.of_id(id_of(token)) != slot:
                token = new_token()
        return token

    def _texts(self, session: Session) -> dict[str, str]:
        data = session.data
        return texts_of(data.as_json() if isinstance(data, RequestSession) else data, self.size_max)

    def load(
        self, token: object, *, timed: bool = False, looked: bool = False
    ) -> Flow[Session | None]:
        """Return the live session of that token; None for anything else. `timed`: with what
        `Session._enters_period` needs; `looked`: a look did not answer."""
        if not isinstance(token, str) or not is_token(token):
            return None
        loaded: Loaded | None = LOOK_AGAIN
        if self.lifetimes.touch and not looked:
            loaded = yield self.sql.look(id_of(token), timed=timed)
        if loaded is LOOK_AGAIN:
            loaded = yield self.sql.load(id_of(token), timed=timed)
        return None if loaded is None else session_from(token, loaded)

    def look(self, token: object) -> Op[Loaded | None] | None:
        """What mostly answers a load by itself; None where `load` has to see to it."""
        if self.lifetimes.touch and isinstance(token, str) and is_token(token):
            return self.sql.look(id_of(token))
        return None

    def exists(self, token: object) -> Flow[bool]:
        if not isinstance(token, str) or not is_token(token):
            return False
        return (yield from do(self.sql.exists(id_of(token))))

    def save(
        self, given: object, on_conflict: str, idle: Any = KEEP, absolute: Any = KEEP
    ) -> Flow[None]:
        session = session_of(given)
        own = self._own(session, idle, absolute)
        if on_conflict not in MODES:
            raise InvalidValueError(
                f"on_conflict must be one of {', '.join(MODES)}, not {on_conflict!r}"
            )
        if not session.id:
            yield from self._store(session, own)
            return
        now = self._texts(session)
        changed, removed = difference(session._before, now)
        if not changed and not removed and own == UNCHANGED:
            return
        if session._ended:
            raise gone("gone")
        if session._moved:
            raise gone("rotated")
        mode: Mode = on_conflict  # type: ignore[assignment]  # one of MODES
        merging = mode == "merge"
        outcome = yield from do(
            self.sql.save(
                id_of(session.id),
                mode,
                session._version,
                document(changed if merging else now),
                [key.encode() for key in removed] if merging else [],
                own,
            )
        )
        if outcome.status == "conflict":
            raise SessionConflictError(
                "another request changed the session since it was loaded; nothing was saved. "
                "Load it again and repeat the change"
            )
        if outcome.status != "done":
            raise gone(outcome.status)
        session._before = now
        session.expires_at = outcome.expires_at
        _note(session, own)
        if merging and outcome.before != session._version:
            # Others' keys are in the database and not here: a later save of the whole document
            # would erase them, so it must meet a conflict.
            session._version = -1
        else:
            session._version = outcome.version

    def rotate(
        self,
        given: object,
        user_id: object,
        grace: Seconds,
        idle: Any = KEEP,
        absolute: Any = KEEP,
    ) -> Flow[None]:
        session = session_of(given)
        own = self._own(session, idle, absolute)
        kept = seconds(grace, "grace", zero=True)
        user: tuple[str | None] | None = None
        if not isinstance(user_id, Keep):
            user = (None if user_id is None else user_of(user_id),)
        if session._ended:
            raise gone("gone")
        if not session.id:
            if user is not None:
                session.user_id = user[0]
            yield from self._store(session, own)
            _begun(session)
            return
        if session._moved:
            raise _rotated_by_another()
        now = self._texts(session)
        changed, removed = difference(session._before, now)
        old = id_of(session.id)
        token = self._fitting(old)
        outcome = yield from do(
            self.sql.rotate(
                old,
                id_of(token),
                document(changed),
                [key.encode() for key in removed],
                grace=kept,
                user=user,
                own=own,
            )
        )
        if outcome.status == "gone":
            raise gone("gone")
        if outcome.status != "done":
            raise _rotated_by_another()
        session._version = outcome.version if outcome.before == session._version else -1
        session.id, session._before, session.expires_at = token, now, outcome.expires_at
        _note(session, own)
        if user is not None:
            session.user_id = user[0]
        _begun(session)

    def destroy(self, given: object) -> Flow[bool]:
        if isinstance(given, str):
            if not is_token(given):
                return False
            return (yield from do(self.sql.destroy(id_of(given))))
        session = session_of(given)
        was_alive = False
        if session.id:
            was_alive = yield from do(self.sql.destroy(id_of(session.id)))
        session._ended = True
        if isinstance(session.data, RequestSession):
            session.data.clear()  # what the program puts in from now on begins another session
        return was_alive

    # -- a user's sessions

    def destroy_user(self, user_id: object, keep: object) -> Flow[int]:
        kept = None if keep is None else session_of(keep).id
        user = user_of(user_id)
        op = self.sql.destroy_user(user, id_of(kept) if kept else None)
        total = 0
        for _ in range(REPEATS):
            ended, raced = yield from do(op)
            total += ended
            if not raced:
                return total
        raise ConflictError(
            f"destroy_user: sessions of the user were rotated during each of {REPEATS} attempts; "
            "some may be alive. Repeat the call"
        )

    def destroy_handle(self, handle: object, user_id: object) -> Flow[bool]:
        user = user_of(user_id)
        if not isinstance(handle, str) or not _HANDLE.fullmatch(handle):
            return False
        return (yield from do(self.sql.destroy(bytes.fromhex(handle), user)))

    def list_user(self, user_id: object) -> Flow[list[SessionInfo]]:
        return (yield from do(self.sql.list_user(user_of(user_id))))

    # -- upkeep

    def purge(self, limit: int) -> Flow[int]:
        return sweep_slots(self.sql, limit)

    def create_table(self) -> Flow[None]:
        return ensure(self.table)


def session_of(given: object) -> Session:
    """Return the session itself, also of what stands for it in a request."""
    if isinstance(given, RequestSession):
        # Also through a proxy such as flask.session: attributes go through it.
        given = given.session
    if not isinstance(given, Session):
        raise InvalidValueError(
            f"a session is needed here, not a {type(given).__name__}: what create() or load() "
            "returned, or the request's session"
        )
    return given


def _own(name: str, value: Any) -> float | None:
    if isinstance(value, Keep):
        return None
    if value is None:
        return 0.0
    return seconds(value, name, endless="")


def _note(session: Session, own: NewLifetimes) -> None:
    if own.idle is not None:
        session.idle_timeout = own.idle or None
    session._has_new_life |= own != UNCHANGED
    if isinstance(session.data, RequestSession):
        session.data.lifetimes = (KEEP, KEEP)


def _begun(session: Session) -> None:
    """A rotation is a new beginning: what was cleared before it needs no other one."""
    if isinstance(session.data, RequestSession):
        session.data.cleared = False


def gone(reason: str) -> SessionGoneError:
    """Return the error for a session that cannot be changed any more."""
    error = SessionGoneError(
        "the session moved to a new id while this request had the old one; nothing was saved"
        if reason == "rotated"
        else "the session has ended; nothing was saved. create() begins another"
    )
    error.reason = reason
    return error


def _rotated_by_another() -> SessionConflictError:
    return SessionConflictError(
        "another request rotated the session at the same time; this rotation did nothing"
    )


def session_from(token: str, loaded: Loaded) -> Session:
    try:
        texts = read_document(loaded.data)
        session = Session(values_of(texts), id=token, user_id=loaded.user_id)
    except (ValueError, msgspec.MsgspecError):
        # From None: the exceptions of json hold the document.
        raise SerializationError(
            "a session's data is not what pgkv stores: another program wrote to the table"
        ) from None
    session.created_at, session.expires_at = loaded.created_at, loaded.expires_at
    session.is_new = False
    session._before, session._version, session._moved = texts, loaded.version, loaded.moved
    session._times, session.idle_timeout = loaded.times, loaded.idle
    return session


def _setting(name: str, value: Seconds, *, zero: bool = False) -> float:
    try:
        return seconds(value, name, zero, endless="")
    except InvalidValueError as error:
        raise ConfigError(str(error)) from None
