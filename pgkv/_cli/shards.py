"""``pgkv shards``: the slots of a store on several servers."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from ..config import dsn_from_environment
from ..errors import ConfigError
from . import console
from .command import DONE, NOT_FOUND, Invocation


class Action(Enum):
    """What `pgkv shards` does."""

    LIST = "list"
    INIT = "init"
    CHECK = "check"


def shards(
    call: Invocation,
    action: Annotated[
        Action, typer.Argument(metavar="[ACTION]", help="list, init or check.")
    ] = Action.LIST,
    slots: Annotated[
        int | None,
        typer.Option("--slots", metavar="N", min=1, help="How many slots init makes. Default: 32."),
    ] = None,
) -> int:
    """List the slots of a store on several servers, make them, or check them.

    PGKV_DSN or --dsn has the DSN of every server, as URIs with spaces between.

    `init` makes the slots and their tables, divided among the servers; run again with one more server, it
    prepares that one. The number of slots is the most servers that the store can ever have, and cannot be
    changed. `check` compares the servers' maps with what is there. Exit code 1: something is not in order.

    **Example:** `pgkv shards init --slots 32`

    **Example:** `pgkv shards --json`
    """
    from .._shards.admin import Servers
    from .._shards.store import settings, split
    from ..patterns.schema import tables

    if slots is not None and action is not Action.INIT:
        raise typer.BadParameter("--slots goes with init")
    if call.schema is not None or call.namespace is not None:
        raise typer.BadParameter("slots have schemas of their own, and are of no namespace")
    given: dict[str, Any] = {"application_name": "pgkv cli"}
    if call.table is not None:
        given["table_name"] = call.table
    if call.timeout is not None:
        given["operation_timeout"] = call.timeout
    dsns = split(call.dsn if call.dsn is not None else dsn_from_environment())
    with Servers(settings(dsns, None, "auto", given)) as cluster:
        if action is Action.INIT:
            made = cluster.init(slots, tables(settings(dsns, None, "auto", given)[0]))
            names = [server.name for server in cluster.servers]
            text = f"{console.count(made, 'slot')} made; {cluster.slots} on {', '.join(names)}"
            call.answer({"made": made, "slots": cluster.slots, "servers": names}, text)
            return DONE
        if not cluster.slots:
            raise ConfigError("the servers have no slots: run `pgkv shards init`")
        if action is Action.CHECK:
            found = cluster.check()
            documents = [problem._asdict() for problem in found]
            columns: console.Columns = {
                "slot": ("slot", console.number),
                "problem": ("problem", console.one_line),
            }
            call.show(documents, columns, f"{cluster.slots} slots are in order")
            return NOT_FOUND if found else DONE
        documents = [row._asdict() for row in cluster.shards()]
    columns = {
        "slot": ("slot", console.number),
        "node": ("node", console.one_line),
        "state": ("state", console.one_line),
        "bytes": ("bytes", console.size),
    }
    call.show(documents, columns, "There are no slots.")
    return DONE
