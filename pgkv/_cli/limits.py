"""``pgkv limits``: the buckets of rate limiters in the table, and resetting them."""

from __future__ import annotations

from dataclasses import asdict

import typer

from ..errors import NotFoundError
from . import console
from .command import DONE, Invocation, argument, flag, option


def limits(
    call: Invocation,
    key: str | None = argument("[KEY]", "The buckets of this key.", None),
    limiter: str | None = option("--limiter NAME", "Show this limiter only."),
    reset: bool = flag("--reset", "Fill the buckets of KEY."),
) -> int:
    """List rate limiters with their buckets, or those of one key, or fill them again.

    Only buckets that are not full have a row. The rates are in the programs: the table has when a
    bucket was last charged, and when it is full again. Processes that deny locally or have
    prefetched tokens notice a reset within a second. Exit code 1: the key has no bucket to reset.

    **Example:** `pgkv limits`

    **Example:** `pgkv limits 203.0.113.7 --limiter login --reset`
    """
    if reset and key is None:
        raise typer.BadParameter("--reset needs a KEY")
    from ..patterns.rate_limit.sql import LimiterStatements

    with call.store() as store:
        sql = LimiterStatements(store._config, store._sql.prefix)
        found = [each for each in store._execute(sql.usage(key)) if limiter in (None, each.limiter)]
        if reset:
            filled = sum(store._execute(sql.reset(each.row)) for each in found)
            if not filled:
                raise NotFoundError(f"the key {key!r} has no bucket that is not full")
            call.answer({"reset": filled}, f"filled {console.count(filled, 'bucket')}")
            return DONE
    columns: console.Columns = {
        "limiter": ("limiter", console.one_line),
        "buckets": ("buckets", console.number),
        "last charged": ("idle", console.duration),
        "full in": ("full_in", console.duration),
    }
    shown = [{k: v for k, v in asdict(each).items() if k != "row"} for each in found]
    call.show(shown, columns, "No rate limiter has a bucket here that is not full.")
    return DONE
