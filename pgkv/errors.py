"""Every exception pgkv raises, and the one place that translates psycopg's errors into them.

::

    PgkvError
    ├── ConfigError (ValueError)                bad configuration, a missing right on the server
    ├── InvalidKeyError (ValueError)            a key the store cannot hold
    ├── InvalidValueError (ValueError)          a value, ttl or number the store cannot hold
    ├── NotFoundError (KeyError)                the key does not exist
    ├── SerializationError (ValueError)         stored bytes do not fit the wanted type
    ├── StoreUnavailableError (ConnectionError) no connection, or it was lost; retryable, but for a
    │   │                                       login that the server refuses
    │   └── PoolTimeoutError (TimeoutError)     every connection was busy for pool_timeout
    ├── OperationTimeoutError (TimeoutError)    operation_timeout passed; outcome unknown
    ├── TableNotFoundError                      the table is missing and may not be created
    ├── QueryError                              anything else the server refused; .sqlstate
    ├── ConflictError                           too many concurrent changes; retryable
    ├── TransactionError                        use after the end of a transaction
    ├── LockError
    │   ├── LockTimeoutError (TimeoutError)
    │   └── LeaseLostError                      .reason
    ├── RateLimitedError                        .decision
    ├── IdempotencyError
    │   ├── InProgressError                     .retry_after
    │   └── KeyReusedError
    └── SessionError
        ├── SessionGoneError                    .reason: "gone" or "rotated"
        └── SessionConflictError

An expected outcome (no such key, a lock that is held) is a value, never an exception. Messages
name the thing, the cause and the way out; they never hold a value, a password or a DSN with one.
"""

from __future__ import annotations

import re
from typing import Any

import psycopg
from psycopg import pq
from psycopg_pool import PoolTimeout

__all__ = [
    "ConfigError",
    "ConflictError",
    "DecodingError",
    "IdempotencyError",
    "InProgressError",
    "InvalidKeyError",
    "InvalidValueError",
    "KeyReusedError",
    "LeaseLostError",
    "LockError",
    "LockTimeoutError",
    "NotFoundError",
    "OperationTimeoutError",
    "PgkvError",
    "PoolTimeoutError",
    "QueryError",
    "RateLimitedError",
    "SerializationError",
    "SessionConflictError",
    "SessionError",
    "SessionGoneError",
    "StoreUnavailableError",
    "TableNotFoundError",
    "TransactionError",
]


class PgkvError(Exception):
    """Base of every exception pgkv raises.

    Attributes:
        retryable: the same call, made again a little later, may well succeed.
        outcome_unknown: the operation was sent and no answer came: it may or may not have
            taken effect.
    """

    retryable: bool = False
    outcome_unknown: bool = False
    _sqlstate: str = ""


class ConfigError(PgkvError, ValueError):
    """A setting is wrong, or the role lacks a right; the message says how to grant it."""


class InvalidKeyError(PgkvError, ValueError):
    """The key is not a non-empty string that PostgreSQL can hold within ``max_key_length``."""


class InvalidValueError(PgkvError, ValueError):
    """A value, ttl, moment or number was refused; nothing was changed."""


class NotFoundError(PgkvError, KeyError):
    """The key does not exist, or its time has passed."""

    def __str__(self) -> str:
        # KeyError would show repr(message): quotes inside quotes.
        return Exception.__str__(self)


class SerializationError(PgkvError, ValueError):
    """Stored bytes do not decode to the wanted type; names the key and the path, not the data."""


class DecodingError(SerializationError):
    """A stored value is not what the table's transforms write: of a key that is not given, moved from
    another place, or damaged. Names the key, never the data.

    Attributes:
        key: the key, with its namespace.
        key_id: of the key of encryption that the value names; 0 for none.
    """

    key: str = ""
    key_id: int = 0


class StoreUnavailableError(PgkvError, ConnectionError):
    """The server cannot be reached, was lost, is starting, stopping or read-only; or it refuses the
    login (wrong role, password or database), and then ``retryable`` is False."""

    retryable = True


class PoolTimeoutError(StoreUnavailableError, TimeoutError):
    """All connections stayed busy for ``pool_timeout`` seconds."""


class OperationTimeoutError(PgkvError, TimeoutError):
    """``operation_timeout`` passed. Unless the message says otherwise, the outcome is unknown."""

    outcome_unknown = True


class TableNotFoundError(PgkvError):
    """The table does not exist and ``auto_create_table`` is off (or a transaction is open)."""

    _table: str = ""


class QueryError(PgkvError):
    """The server refused the statement for a reason that has no exception of its own."""

    @property
    def sqlstate(self) -> str:
        """The five-character PostgreSQL error code."""
        return self._sqlstate


class ConflictError(PgkvError):
    """Concurrent changes won every attempt; nothing was changed."""

    retryable = True


class TransactionError(PgkvError):
    """A transaction-bound store was used wrongly: after its end, or out of its nesting."""


class LockError(PgkvError):
    """Base of the lock's errors."""


class LockTimeoutError(LockError, TimeoutError):
    """The lock was not granted within the time the caller gave."""


class LeaseLostError(LockError):
    """The lease is no longer held: it expired, was revoked, or cannot be shown to hold.

    Attributes:
        reason: what ended it.
    """

    reason: str = ""


class RateLimitedError(PgkvError):
    """The rate limit refuses this call.

    Attributes:
        decision: the :class:`Decision`, with ``retry_after`` in seconds.
    """

    decision: Any = None


class IdempotencyError(PgkvError):
    """Base of the errors of idempotency keys."""


class InProgressError(IdempotencyError):
    """Another attempt of the same key is under way.

    Attributes:
        retry_after: seconds: the rest of that attempt's lease. It may end sooner.
    """

    retry_after: float = 1.0


class KeyReusedError(IdempotencyError):
    """The key was used before, with another fingerprint."""


class SessionError(PgkvError):
    """Base of the session store's errors."""


class SessionGoneError(SessionError):
    """The session ended or moved to another id.

    Attributes:
        reason: ``"gone"`` or ``"rotated"``.
    """

    reason: str = "gone"


class SessionConflictError(SessionError):
    """Another request changed the session since it was loaded."""


# A traceback then names the module that programs import, and a pickle does not name this one.
for _name in __all__:
    globals()[_name].__module__ = "pgkv"


# -- the one mapper ------------------------------------------------------------------------

_UNAVAILABLE = {
    "25006": "the server is read-only (a standby, or in recovery)",
    "53300": "the server has no free connection slots",
    "57P01": "the server ended the connection",
    "57P02": "the server is restarting after a crash",
    "57P03": "the server is not accepting connections yet",
    "57P05": "the server closed the idle session",
}
_FENCE = "pgkv_map.fence("  # of a slot on Citus
_MISSING = {"42P01": "the table {}", "3F000": "the schema of {}"}
# A server that refuses a login says so before there is an SQLSTATE to read: by its own text, or by
# libpq's, or PgBouncer's. In another language than English it counts as unreachable.
_LOGIN_REFUSED = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|pg_hba\.conf rejects"
    r'|(?:role|user|database) ".*" (?:does not exist|is not permitted to log in)'
    r"|permission denied for database|no such (?:user|database)|password authentication is required"
)
# The names of encodings are the words in capitals, in any language of the message.
_ENCODING = re.compile(r"\b[A-Z][A-Z0-9_]+\b")
_NO_SCHEMA_SELECTED = ("RangeVarGetCreationNamespace", "RangeVarGetAndCheckCreationNamespace")
_ROW_SECURITY = ("ExecWithCheckOptions", "check_enable_rls")
# The server quotes data in the texts of these classes: 22 data exception, 23 integrity
# constraint, 54 program limit exceeded. Their messages and tracebacks must not leave pgkv.
_QUOTES_DATA = ("22", "23", "54")


def translate(
    error: BaseException,
    *,
    action: str,
    table: str = "",
    refused: dict[str, str] | None = None,
    sent: bool = False,
) -> PgkvError:
    """Return the pgkv exception for an error of psycopg or its pool, its ``__cause__`` set.

    Args:
        error: what psycopg raised.
        action: the operation's name, for the message.
        table: the quoted table name, for messages about it.
        refused: the operation's own texts for SQLSTATEs that mean "this value is refused".
        sent: the statement was on its way: without an SQLSTATE its outcome is unknown.
    """
    if isinstance(error, PgkvError):
        return error
    if isinstance(error, PoolTimeout):
        return _because(PoolTimeoutError(f"{action}: no connection became free: {error}"), error)
    if not isinstance(error, psycopg.Error):
        return _because(StoreUnavailableError(f"{action}: {_one_line(error)}"), error)

    state = error.sqlstate
    # Poolers report a lost server with class 08, which says nothing about the outcome.
    if state is None or state.startswith("08"):
        if not sent and refuses_login(error):
            refused_login = StoreUnavailableError(
                f"{action}: the server refuses the login: {_one_line(error)}; check the user, the "
                "password and the database of the DSN, and the server's pg_hba.conf"
            )
            refused_login.retryable = False
            return _because(refused_login, error)
        lost = StoreUnavailableError(
            f"{action}: the connection was lost before the answer came; "
            f"it may or may not have taken effect: {_one_line(error)}"
            if sent
            else f"{action}: no connection to PostgreSQL: {_one_line(error)}"
        )
        lost.outcome_unknown = sent
        return _because(lost, error)
    return _from_sqlstate(error, state, action, table, refused or {})


def refuses_login(error: BaseException) -> bool:
    """Tell whether a connection failed because the server refuses this role, password or database:
    on every host that was tried. Trying again does not help."""
    tried = [line for line in str(error).splitlines() if "failed:" in line] or [str(error)]
    return all(_LOGIN_REFUSED.search(line) for line in tried)


def _from_sqlstate(
    error: psycopg.Error, state: str, action: str, table: str, refused: dict[str, str]
) -> PgkvError:
    text = _one_line(error)
    found: PgkvError
    if state.startswith(_QUOTES_DATA):
        why = refused.get(state) or _refused_data(state, text)
        found = InvalidValueError(f"{action}: {why}")
        found._sqlstate = state
        return found
    if state in _UNAVAILABLE or _during_recovery(error):
        why = _UNAVAILABLE.get(state, "the server is in recovery")
        found = StoreUnavailableError(f"{action}: {why}: {text}")
    elif state == "3F000" and error.diag.source_function in _NO_SCHEMA_SELECTED:
        found = ConfigError(
            f"{action}: the connection's search_path names no schema that exists, so there is none "
            "for the table: set schema=, or create a schema of the search_path"
        )
    elif state in _MISSING:
        found = TableNotFoundError(
            f"{action}: {_MISSING[state].format(table)} does not exist; call create_table(), "
            "run the DDL that `pgkv schema` prints, or set auto_create_table=True"
        )
        found._table = table
    elif state == "PK001" or (state == "55P03" and _FENCE in (error.diag.context or "")):
        found = TableNotFoundError(
            f"{action}: the slot of {table} is being moved, or is on another node by now; repeat it"
        )
    elif state == "PK002":
        found = ConfigError(
            f"{action}: no REPEATABLE READ on a Citus slot: its snapshot may be older than a move; "
            "use READ COMMITTED"
        )
    elif state == "42501" and error.diag.source_function in _ROW_SECURITY:
        found = ConfigError(
            f"{action}: {text}. Row-level security is not a matter of GRANT: run as the table's "
            f"owner ALTER TABLE {table or '<table>'} DISABLE ROW LEVEL SECURITY, or add a policy "
            "that admits every row to the role"
        )
    elif state == "42501":
        found = ConfigError(
            f"{action}: the database role lacks a right: {text}. {_grant(table, action)}"
        )
    elif state in ("40001", "40P01", "55P03"):
        found = QueryError(f"{action}: {text} (SQLSTATE {state}); repeat it")
        found.retryable = True
    elif state == "26000":
        found = QueryError(
            f"{action}: {text} (SQLSTATE {state}); behind a pooler in transaction mode set "
            "pooler=pgkv.Pooler.TRANSACTION"
        )
        found.retryable = True  # it is prepared again
    elif state == "57014":
        found = OperationTimeoutError(f"{action}: the server cancelled the statement: {text}")
        found.outcome_unknown = False
    elif state == "25P02":
        found = TransactionError(f"{action}: the transaction has failed; roll it back first")
    else:
        found = QueryError(f"{action}: {text} (SQLSTATE {state})")
    found._sqlstate = state
    return _because(found, error)


def _refused_data(state: str, text: str) -> str:
    if state == "22P05":
        names = _ENCODING.findall(text)
        encoding = f"the database's encoding, {names[-1]}," if names else "the database's encoding"
        return (
            f"a character of the text cannot be kept: {encoding} does not have it; use a database "
            "with ENCODING 'UTF8'"
        )
    return f"refused (SQLSTATE {state})"


def _grant(table: str, action: str) -> str:
    if not table:
        return "Grant it, or create the table with a role that has it (see `pgkv schema`)."
    if action == "truncate":
        return (
            f"Run as the table's owner: GRANT TRUNCATE ON {table} TO <role>; or call clear(), "
            "which does not need it."
        )
    return (
        f"Run as the table's owner: GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO <role>; "
        "or, if the table does not exist yet, create it with the DDL of `pgkv schema` "
        "and set auto_create_table=False."
    )


def _during_recovery(error: psycopg.Error) -> bool:
    # An unlogged table on a standby is refused with the general 0A000 "feature not supported";
    # the name of the function that says so is the one part that is never translated.
    return error.sqlstate == "0A000" and error.diag.source_function == "get_relation_info"


def _one_line(error: BaseException) -> str:
    """The server's own sentence, without detail lines (these quote rows)."""
    diag = getattr(error, "diag", None)
    text = (diag.message_primary if diag is not None else None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _because(error: PgkvError, cause: BaseException) -> PgkvError:
    error.__cause__ = _without_data(cause)
    return error


def _without_data(error: BaseException) -> BaseException:
    # Under log_parameter_max_length_on_error the server adds the statement's parameters to the
    # context of any error, and detail lines quote rows: a traceback must not show them.
    if isinstance(error, psycopg.Error) and (error.diag.context or error.diag.message_detail):
        return type(error)(_one_line(error))
    return error


def from_result(result: pq.abc.PGresult, encoding: str = "utf-8") -> psycopg.Error:
    """Return psycopg's exception for an error result."""
    return psycopg.errors.error_from_result(result, encoding)
