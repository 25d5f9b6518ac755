"""The statements that open and close transactions and savepoints, and a trial of a connection."""

from __future__ import annotations

from functools import cache

from psycopg import IsolationLevel

from .._ops.op import TEXT, Op, Statement
from .table import command, query, read_int, read_nothing

_NAMED: Statement[int] = Statement(
    "prepare_trial",
    "SELECT count(*) FROM pg_prepared_statements WHERE name = $1",
    (TEXT,),
    read_int,
    writes=False,
)
# How many statements the server knows by the name that this one is prepared by.
PREPARE_TRIAL: Op[int] = Op(_NAMED, (_NAMED.prepared_name,))


_command = cache(command)


@cache
def begin(isolation: IsolationLevel | None = None) -> Op[None]:
    """Open a transaction; None leaves the isolation to the connection's default."""
    if isolation is None:
        return Op(_command("begin", "BEGIN"))
    level = isolation.name.replace("_", " ")
    return Op(_command("begin", f"BEGIN ISOLATION LEVEL {level}"))


@cache
def commit() -> Op[None]:
    """Make the transaction's changes last."""
    return Op(_command("commit", "COMMIT"))


@cache
def rollback() -> Op[None]:
    """Undo the transaction's changes."""
    return Op(_command("rollback", "ROLLBACK"))


@cache
def savepoint(depth: int) -> Op[None]:
    """Mark a point to which the transaction can be undone."""
    return Op(_command("savepoint", f"SAVEPOINT pgkv_{depth}"))


@cache
def release(depth: int) -> Op[None]:
    """Remove the mark and keep the changes made since."""
    return Op(_command("release", f"RELEASE SAVEPOINT pgkv_{depth}"))


@cache
def rollback_to(depth: int) -> Op[None]:
    """Undo the changes made since the mark, and remove it."""
    sql = f"ROLLBACK TO SAVEPOINT pgkv_{depth}; RELEASE SAVEPOINT pgkv_{depth}"
    return Op(_command("rollback_to", sql))


@cache
def lock_timeout(milliseconds: int) -> Op[None]:
    """Limit the wait for each lock until the transaction ends."""
    sql = f"SELECT set_config('lock_timeout', '{milliseconds}', true)"
    return Op(query("lock_timeout", sql, read_nothing))
