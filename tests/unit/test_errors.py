"""translate(): every error of psycopg and its pool, as one of pgkv's."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from psycopg_pool import PoolClosed, PoolTimeout

import pgkv
from pgkv import errors
from pgkv._engine.pooling import unreachable
from pgkv._engine.results import past_deadline
from pgkv.errors import translate

SECRET = "SECRET-41"


class Refused(psycopg.Error):
    """An error with diagnostics, as psycopg makes it of the server's answer."""

    def __init__(self, state: str, **told: str) -> None:
        super().__init__("\n".join(["text", *told.values()]))
        self.sqlstate = state
        self._told = told

    @property
    def diag(self) -> Any:
        names = ("message_primary", "message_detail", "context", "source_function")
        return SimpleNamespace(**(dict.fromkeys(names) | self._told))


CASES: dict[str, tuple[type[pgkv.PgkvError], bool]] = {
    # SQLSTATE: class, retryable
    "22P02": (pgkv.InvalidValueError, False),
    "22003": (pgkv.InvalidValueError, False),
    "23514": (pgkv.InvalidValueError, False),
    "23505": (pgkv.InvalidValueError, False),
    "54000": (pgkv.InvalidValueError, False),
    "25006": (pgkv.StoreUnavailableError, True),
    "53300": (pgkv.StoreUnavailableError, True),
    "57P01": (pgkv.StoreUnavailableError, True),
    "57P02": (pgkv.StoreUnavailableError, True),
    "57P03": (pgkv.StoreUnavailableError, True),
    "57P05": (pgkv.StoreUnavailableError, True),
    "08006": (pgkv.StoreUnavailableError, True),
    "08P01": (pgkv.StoreUnavailableError, True),
    "42P01": (pgkv.TableNotFoundError, False),
    "3F000": (pgkv.TableNotFoundError, False),
    "42501": (pgkv.ConfigError, False),
    "40001": (pgkv.QueryError, True),
    "40P01": (pgkv.QueryError, True),
    "55P03": (pgkv.QueryError, True),
    "57014": (pgkv.OperationTimeoutError, False),
    "25P02": (pgkv.TransactionError, False),
    "42601": (pgkv.QueryError, False),
    "P0001": (pgkv.QueryError, False),
    "XX000": (pgkv.QueryError, False),
    "0A000": (pgkv.QueryError, False),
}


@pytest.mark.parametrize("state", CASES)
def test_by_sqlstate(state: str) -> None:
    """Each SQLSTATE has its class, its retryable, and a message that names the operation."""
    kind, retryable = CASES[state]
    cause = Refused(state, message_primary="why", message_detail=SECRET)
    error = translate(cause, action="set", table='"t"')
    assert type(error) is kind
    assert error.retryable is retryable
    assert str(error).startswith("set: ")
    assert SECRET not in str(error)


@pytest.mark.parametrize("state", [state for state in CASES if state[:2] in ("22", "23", "54")])
def test_classes_that_quote_data(state: str) -> None:
    """Of classes 22, 23 and 54 only the SQLSTATE is kept: no text, no cause."""
    error = translate(Refused(state, message_primary=SECRET), action="set", table='"t"')
    assert SECRET not in str(error)
    assert error.__cause__ is None
    assert error._sqlstate == state


@pytest.mark.parametrize("place", ["context", "message_detail"])
@pytest.mark.parametrize("state", ["40P01", "P0001", "57014"])
def test_details_are_cut_off_the_cause(state: str, place: str) -> None:
    """A cause whose detail or context may quote parameters is replaced by its bare sentence."""
    error = translate(Refused(state, **{place: SECRET}), action="set")
    assert isinstance(error.__cause__, psycopg.Error)
    assert SECRET not in str(error.__cause__)


def test_an_operations_own_words() -> None:
    """An operation may say what an SQLSTATE means for it."""
    error = translate(Refused("22P02"), action="increment", refused={"22P02": "no integer"})
    assert str(error) == "increment: no integer"


def test_recovery() -> None:
    """An UNLOGGED table on a standby: the general 0A000, told apart by its function."""
    error = translate(Refused("0A000", source_function="get_relation_info"), action="get")
    assert isinstance(error, pgkv.StoreUnavailableError)
    assert "recovery" in str(error)


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("cause", [psycopg.OperationalError("gone"), Refused("08006")])
def test_lost_connections(cause: psycopg.Error, sent: bool) -> None:
    """Without an SQLSTATE, or with a pooler's 08, the outcome is unknown exactly if it was sent."""
    error = translate(cause, action="set", sent=sent)
    assert isinstance(error, pgkv.StoreUnavailableError)
    assert error.outcome_unknown is sent
    assert ("may or may not have taken effect" in str(error)) is sent


@pytest.mark.parametrize("state", [state for state in CASES if not state.startswith("08")])
def test_an_answer_is_a_known_outcome(state: str) -> None:
    """An error with an SQLSTATE, FATAL ones too, means that nothing happened."""
    assert not translate(Refused(state), action="set", sent=True).outcome_unknown


def test_the_pools_errors() -> None:
    """A pool's timeout is a PoolTimeoutError, a closed pool StoreUnavailableError."""
    busy = translate(PoolTimeout("30 s"), action="get")
    assert isinstance(busy, pgkv.PoolTimeoutError)
    assert isinstance(busy, TimeoutError)
    assert isinstance(translate(PoolClosed("closed"), action="get"), pgkv.StoreUnavailableError)


def test_other_errors() -> None:
    """An error of the operating system is StoreUnavailableError; one of pgkv's stays itself."""
    assert isinstance(translate(OSError("host"), action="get"), pgkv.StoreUnavailableError)
    own = pgkv.ConflictError("mine")
    assert translate(own, action="get") is own


def test_missing_rights_say_what_to_grant() -> None:
    """42501 names the GRANT to run, on the quoted table."""
    error = translate(Refused("42501", message_primary="denied"), action="set", table='"s"."t"')
    assert 'GRANT SELECT, INSERT, UPDATE, DELETE ON "s"."t"' in str(error)


def test_what_truncate_needs() -> None:
    """truncate() needs a right that nothing else does: the advice names it, and no other."""
    error = translate(Refused("42501", message_primary="denied"), action="truncate", table='"t"')
    assert 'GRANT TRUNCATE ON "t"' in str(error)
    assert "SELECT" not in str(error)


def test_missing_tables_say_what_to_do() -> None:
    """42P01 names the table and the ways to make it."""
    error = translate(Refused("42P01"), action="set", table='"t"')
    assert 'the table "t" does not exist' in str(error)
    assert "create_table()" in str(error)


def test_sqlstate_of_query_errors() -> None:
    """QueryError has the SQLSTATE, and names it."""
    error = translate(Refused("42601", message_primary="syntax"), action="set")
    assert isinstance(error, pgkv.QueryError)
    assert error.sqlstate == "42601"
    assert "42601" in str(error)


BUILTIN = {
    pgkv.ConfigError: ValueError,
    pgkv.InvalidKeyError: ValueError,
    pgkv.InvalidValueError: ValueError,
    pgkv.NotFoundError: KeyError,
    pgkv.SerializationError: ValueError,
    pgkv.StoreUnavailableError: ConnectionError,
    pgkv.PoolTimeoutError: TimeoutError,
    pgkv.OperationTimeoutError: TimeoutError,
    pgkv.LockTimeoutError: TimeoutError,
}


@pytest.mark.parametrize("name", errors.__all__)
def test_the_tree(name: str) -> None:
    """Every error is a PgkvError with a bool `retryable`, importable from pgkv and picklable."""
    kind = getattr(pgkv, name)
    assert issubclass(kind, pgkv.PgkvError)
    assert issubclass(kind, BUILTIN.get(kind, Exception))
    assert isinstance(kind.retryable, bool)
    again = pickle.loads(pickle.dumps(kind("text")))
    assert type(again) is kind
    assert str(again) == "text"


def test_families() -> None:
    """What may be caught together has a common base."""
    assert issubclass(pgkv.PoolTimeoutError, pgkv.StoreUnavailableError)
    for kind in (pgkv.LockTimeoutError, pgkv.LeaseLostError):
        assert issubclass(kind, pgkv.LockError)
    for other in (pgkv.SessionGoneError, pgkv.SessionConflictError):
        assert issubclass(other, pgkv.SessionError)
    assert not issubclass(pgkv.OperationTimeoutError, pgkv.StoreUnavailableError)


def test_retryable_by_class() -> None:
    """Only unavailability and lost races invite the same call again."""
    retryable = {name for name in errors.__all__ if getattr(pgkv, name).retryable}
    assert retryable == {"StoreUnavailableError", "PoolTimeoutError", "ConflictError"}


def test_not_found_reads_like_a_message() -> None:
    """KeyError would show its message in quotes."""
    assert str(pgkv.NotFoundError("no such key: 'k'")) == "no such key: 'k'"


def test_lookups_of_psycopg() -> None:
    """psycopg's own classes for the SQLSTATEs arrive the same way."""
    assert isinstance(
        translate(pg.ReadOnlySqlTransaction("x"), action="a"), pgkv.StoreUnavailableError
    )
    assert isinstance(translate(pg.UndefinedTable("x"), action="a"), pgkv.TableNotFoundError)
    assert isinstance(translate(pg.DeadlockDetected("x"), action="a"), pgkv.QueryError)


LOGINS = [
    'FATAL:  password authentication failed for user "a"',
    'FATAL:  role "a" does not exist',
    'FATAL:  role "a" is not permitted to log in',
    'FATAL:  database "a" does not exist',
    'FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "a", database "b", no encryption',
    'FATAL:  permission denied for database "a"',
    "fe_sendauth: no password supplied",
    'FATAL:  SCRAM authentication failed for user "a"',
    "FATAL:  no such user: a",
]


@pytest.mark.parametrize("text", LOGINS)
def test_a_refused_login_is_not_retried(text: str) -> None:
    """A wrong password, role or database does not become right by waiting."""
    cause = psycopg.OperationalError(
        f'connection failed: connection to server at "h", port 5432 failed: {text}'
    )
    error = translate(cause, action="get")
    assert isinstance(error, pgkv.StoreUnavailableError)
    assert not error.retryable
    assert "refuses the login" in str(error)
    assert text.removeprefix("FATAL:  ") in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "connection refused",
        "FATAL:  the database system is starting up",
        'FATAL:  too many connections for role "a"',
        f"host: 'a': connection failed: {LOGINS[0]}\n- host: 'b': connection failed: refused",
    ],
)
def test_an_outage_is_retried(text: str) -> None:
    """A server that starts, is full or cannot be reached may answer later; so may one of several."""
    cause = psycopg.OperationalError(f"connection failed: {text}")
    error = translate(cause, action="get")
    assert error.retryable
    assert "refuses the login" not in str(error)


def test_a_missing_schema_and_a_search_path_without_one() -> None:
    """3F000 names the schema that is missing, or says that the search_path has none."""
    missing = Refused("3F000", source_function="get_namespace_oid", message_primary="x")
    assert "the schema of" in str(translate(missing, action="create_table", table='"s"."t"'))
    none = Refused("3F000", source_function="RangeVarGetCreationNamespace", message_primary="x")
    error = translate(none, action="create_table")
    assert isinstance(error, pgkv.ConfigError)
    assert "search_path" in str(error)


def test_an_encoding_is_named_in_any_language() -> None:
    """What a database's encoding cannot hold: the encoding, and no byte of the data."""
    text = "Zeichen mit Byte-Folge 0xe2 0x98 in Kodierung »UTF8« hat keine Entsprechung in »LATIN1«"
    error = translate(Refused("22P05", message_primary=text), action="set")
    assert "LATIN1" in str(error)
    assert "0xe2" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "FATAL:  unsupported startup parameter: options",
        "ERROR:  unsupported startup parameter in options: jit",
        "FATAL:  Feature not supported: RDS Proxy currently doesn't support command-line options.",
    ],
)
def test_a_pooler_that_refuses_session_settings(text: str) -> None:
    """The error of connecting names the setting that makes pgkv send none."""
    error = unreachable(psycopg.OperationalError(f"connection failed: {text}"), "connecting")
    assert isinstance(error, pgkv.StoreUnavailableError)
    assert "set pooler=pgkv.Pooler.TRANSACTION" in str(error)


@pytest.mark.parametrize(
    ("seconds", "within"), [(0.25, "within 0.25 s;"), (-0.0068, "within the time that was left;")]
)
def test_a_deadline_that_had_passed_is_no_negative_time(seconds: float, within: str) -> None:
    assert within in str(past_deadline("get", seconds))
