"""What the declarations' scenarios share: clients' ways to end, invariants, and a clean beginning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pgkv
from pgkv._ops.op import Op, Statement
from pgkv._sql import Statements
from pgkv._sql.table import read_nothing
from tests.interleavings.schedule import Died, World

Client = Callable[[World], Coroutine[Any, Any, Any]]


def died(results: dict[str, Any]) -> bool:
    """Whether a client vanished: what it held then lasts to its ttl."""
    return any(result is Died for result in results.values())


def failed_by_itself(results: dict[str, Any]) -> list[BaseException]:
    """Errors that no fault explains."""
    explained = (pgkv.OperationTimeoutError, pgkv.LeaseLostError)
    return [
        result
        for result in results.values()
        if isinstance(result, BaseException) and not isinstance(result, explained)
    ]


def at_most(number: int) -> Callable[[World], None]:
    def invariant(world: World) -> None:
        held = [name for name, lease in world.held.items() if not lease.is_lost]
        assert len(held) <= number, f"{held} hold it at once"

    return invariant


def no_errors(world: World, results: dict[str, Any]) -> None:
    assert not failed_by_itself(results), results


def truncate(world: World, *suffixes: str) -> None:
    """Empty tables of the scenario, where they exist."""
    names = [f"kv_store{suffix}" for suffix in suffixes]
    commands = " ".join(
        f"IF to_regclass('{name}') IS NOT NULL THEN DELETE FROM {name}; END IF;" for name in names
    )
    sql = f"DO $$ BEGIN {commands} END $$"
    world.sync._execute(Op(Statement("empty", sql, (), read_nothing, writes=False, script=True)))


def bounded(config: pgkv.Config, rows: float) -> Statements:
    """The statements of a table with a bound below the least that a user can set."""
    config = copy.copy(config)
    object.__setattr__(config, "max_entries", rows)
    return Statements(config)


def with_marks(world: World) -> None:
    """Give the store's table the column of a bounded one."""
    world.sync.create_table()
    sql = "ALTER TABLE kv_store ADD COLUMN IF NOT EXISTS used_at timestamptz"
    world.sync._execute(Op(Statement("mark", sql, (), read_nothing, writes=False, script=True)))


async def evicting(world: World) -> None:
    """Evict whatever may be evicted, twice."""
    sql, sync = bounded(world.sync._config, 0.5), world.sync
    for _ in range(2):
        pages = max(1, sync._execute(sql.pages()))
        op = sql.evict(pages, pages, 1000, None, None)
        await world.step("evicts", partial(sync._execute, op))
