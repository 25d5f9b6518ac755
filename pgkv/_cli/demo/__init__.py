"""``pgkv demo``: real data, threads and processes, on a server started for the purpose."""

from __future__ import annotations

from typing import Any

import typer

from ...config import Pooler
from ..command import DONE, NOT_FOUND, Invocation, option


def demo(
    call: Invocation,
    keys: int = option("--keys N", "", 400_000, min=1000, hidden=True),
    seconds: float = option("--seconds N", "", 3.0, min=0.1, hidden=True),
) -> int:
    """Show pgkv at work, in less than a minute.

    Starts a temporary PostgreSQL (extra `embedded`, or PostgreSQL's server programs) and removes it
    at the end. With --dsn it uses that server, in tables of its own, which it drops at the end.
    PGKV_DSN is not used.

    **Example:** `pgkv demo`

    **Example:** `pgkv demo --dsn postgresql://user@host/db`
    """
    from . import show
    from .stage import Size

    given = {"--table": call.table, "--namespace": call.namespace, "--timeout": call.timeout}
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"the demo uses its own tables: it takes no {name}")
    options: dict[str, Any] = {"schema": call.schema, "pooler": call.pooler or Pooler.NONE}
    held = show.run(call.dsn, options, Size(keys, seconds), as_json=call.json)
    return DONE if held else NOT_FOUND
