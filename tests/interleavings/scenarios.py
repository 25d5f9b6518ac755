"""What the declarations' scenarios share: clients' ways to end, invariants, and a clean beginning."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pgkv
from pgkv._ops.op import Op, Statement
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
