"""``pgkv shards``: the slots of a store on several servers."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import dsn_from_environment
from ..errors import ConfigError
from . import console
from .command import DONE, NOT_FOUND, Invocation

if TYPE_CHECKING:
    from .._shards.admin import Servers


class Action(Enum):
    """What `pgkv shards` does."""

    LIST = "list"
    INIT = "init"
    CHECK = "check"
    MOVE = "move"
    RESUME = "resume"


def shards(
    call: Invocation,
    action: Annotated[
        Action, typer.Argument(metavar="[ACTION]", help="list, init, check, move or resume.")
    ] = Action.LIST,
    which: Annotated[
        str, typer.Argument(metavar="[SLOTS]", help="Which slots to move, such as 3 or 0-7,12.")
    ] = "",
    slots: Annotated[
        int | None,
        typer.Option("--slots", metavar="N", min=1, help="How many slots init makes. Default: 32."),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="NODE", help="The server to move to, such as n2.")
    ] = None,
) -> int:
    """List the slots of a store on several servers, make them, check them, or move them.

    PGKV_DSN or --dsn has the DSN of every server, as URIs with spaces between.

    `init` makes the slots and their tables, divided among the servers. Run again with one more server, it
    prepares that one. The number of slots is the most servers that the store can ever have, and cannot be
    changed. `check` compares the servers' maps with what is there. Exit code 1: the check found a fault.

    `move` copies slots to another server while clients work: each waits while its slot is copied. `resume`
    finishes a move that was killed.

    **Example:** `pgkv shards init --slots 32`

    **Example:** `pgkv shards move 8-11 --to n3`
    """
    from .._shards.admin import Servers
    from .._shards.store import settings, split
    from ..patterns.schema import tables

    if (action is Action.MOVE) != (to is not None) or bool(which) != (action is Action.MOVE):
        raise typer.BadParameter("move takes slots and --to NODE, and nothing else does")
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
        if action in (Action.MOVE, Action.RESUME):
            return _move(call, cluster, numbers(which) if which else [*range(cluster.slots)], to)
        documents = [row._asdict() for row in cluster.shards()]
    columns = {
        "slot": ("slot", console.number),
        "node": ("node", console.one_line),
        "state": ("state", console.one_line),
        "bytes": ("bytes", console.size),
    }
    call.show(documents, columns, "There are no slots.")
    return DONE


def numbers(text: str) -> list[int]:
    """The slots in a text such as ``0-7,12``."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"slots are numbers such as 3 or 0-7,12, not {text!r}")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def _move(call: Invocation, cluster: Servers, slots: list[int], to: str | None) -> int:
    """Move slots, or finish their moves; one line for each."""
    from .._shards.moves import move, resume

    done = 0
    with console.progress(quiet=call.json) as bar:
        task = bar.add_task("slots", total=len(slots))

        def report(slot: int, step: str, copied: int) -> None:
            size = f" {console.size(copied)}" if copied else ""
            bar.update(task, description=f"slot {slot}: {step}{size}")

        for slot in slots:
            done += resume(cluster, slot, report) if to is None else move(cluster, slot, to, report)
            bar.advance(task)
    what = "finished" if to is None else f"moved to {to}"
    call.answer({"moved": done}, f"{console.count(done, 'slot')} {what}")
    return DONE
