"""The DDL of every table: the store's and those of the patterns."""

from __future__ import annotations

from .._engine.schema import companion, create_schema_sql, create_sql
from ..config import Config, Table, require_config
from .idempotency.sql import IDEMPOTENCY
from .lock.sql import LOCKS, LOCKS_UNLOGGED, TICKETS
from .queue.sql import JOBS, JOBS_UNLOGGED
from .session.sql import SESSIONS

SHAPES = {  # kind of table: of which part of `tables`, its shape, whether it is logged
    "locks": ("locks", LOCKS, True),
    "locks_unlogged": ("locks", LOCKS_UNLOGGED, False),
    "tickets": ("locks", TICKETS, False),
    "sessions": ("sessions", SESSIONS, True),
    "idempotency": ("idempotency", IDEMPOTENCY, True),
    "jobs": ("queues", JOBS, True),
    "jobs_unlogged": ("queues", JOBS_UNLOGGED, False),
}


def tables(config: Config, **parts: bool) -> list[Table]:
    """Return the store's table and those of the patterns, but for the `parts` that are False."""
    return [config.table] + [
        companion(config, shape, durable=logged)
        for part, shape, logged in SHAPES.values()
        if parts.get(part, True)
    ]


def schema_sql(
    config: Config,
    *,
    locks: bool = True,
    sessions: bool = True,
    idempotency: bool = True,
    queues: bool = True,
) -> str:
    """Return the DDL of everything a store uses, for a migration tool.

    With ``auto_create_table=False`` nothing else is needed. The text is idempotent.

    Args:
        config: names the table, its schema and its type.
        locks: also the tables of `Lock`, `Semaphore` and `Leader`: of durable and other grants,
            and of the tickets of those who wait in order.
        sessions: also the table of `SessionStore`.
        idempotency: also the table of `Idempotency`.
        queues: also the tables of `Queue`: of durable jobs, and of others.

    Raises:
        ConfigError: `config` is no `Config`.
    """
    require_config(config, "schema_sql()")
    wanted = tables(config, locks=locks, sessions=sessions, idempotency=idempotency, queues=queues)
    parts = [create_sql(table) for table in wanted]
    if config.schema is not None:
        parts.insert(0, create_schema_sql(config.schema))
    return "\n\n".join(parts) + "\n"
