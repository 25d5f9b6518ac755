"""``pgkv shards``: the slots of a store on several servers."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import typer

from ..config import dsn_from_environment
from ..errors import ConfigError
from . import console
from .command import DONE, NOT_FOUND, Invocation, argument, confirm, flag, option

if TYPE_CHECKING:
    from .._shards.admin import Servers
    from .._shards.cluster import CitusCluster
    from .._shards.moves import How


# Microseconds of a server's processor for one operation, measured on PostgreSQL 15; the same on Citus.
COSTS = {"get": (22, 26), "set": (46, 86), "increment": (58, 97), "hit": (100, 108)}
COSTS |= {"grant": (97, 120), "cached": (42, 67), "load": (36, 70), "save": (71, 103)}
LOAD_MAX = 0.7  # of the processor: the rest is for vacuum, checkpoints and bursts


class Action(Enum):
    """What `pgkv shards` does."""

    LIST = "list"
    INIT = "init"
    CHECK = "check"
    MOVE = "move"
    RESUME = "resume"
    PLAN = "plan"


def shards(
    call: Invocation,
    action: Action = argument("[ACTION]", "list, init, check, move, resume or plan.", Action.LIST),
    which: str = argument("[SLOTS]", "Which slots to move, such as 3 or 0-7,12.", ""),
    slots: int | None = option(
        "--slots N", "How many slots, for init and plan. Default: 32.", min=1
    ),
    to: str | None = option("--to NODE", "The server to move to, such as n2."),
    rate: float | None = option("--rate N", "For plan: operations a second.", min=1),
    mix: str = option("--mix MIX", "For plan: shares, such as get=80,set=20.", "get=80,set=20"),
    cores: float = option("--cores N", "For plan: cores of a server.", 4, min=0.1),
    citus: bool = flag("--citus", "For plan: slots on Citus."),
    online: bool = flag("--online", "For move: copy first, and lock only for what changed since."),
    drop: bool = flag("--drop", "For move: give up the rows of UNLOGGED tables, as a crash does."),
    yes: bool = flag("--yes -y", "For --drop: do not ask."),
) -> int:
    """List the slots of a store on several servers, make them, check them, or move them.

    PGKV_DSN or --dsn has the DSN of every server, as URIs with spaces between; on Citus the coordinator's.

    `init` makes the slots and their tables, divided among the servers. Run again with one more server, it
    prepares that one. The number of slots is the most servers that the store can ever have, and cannot be
    changed. `check` compares the servers' maps with what is there. Exit code 1: the check found a fault.

    `move` copies slots to another server while clients work: each waits while its slot is copied. With
    --online it waits only for the last changes. With --drop UNLOGGED tables arrive empty. `resume` finishes a
    move that was killed; one with --drop is then finished with all its rows. On Citus `move` has Citus move
    the slot, which finishes or undoes by itself what was interrupted. `plan` works out how many servers a load
    needs.

    **Example:** `pgkv shards init --slots 32`

    **Example:** `pgkv shards move 8-11 --to n3`
    """
    from .._shards.cluster import CitusCluster, administered
    from .._shards.moves import How
    from .._shards.store import settings, split
    from ..patterns.schema import tables

    if (action is Action.MOVE) != (to is not None) or bool(which) != (action is Action.MOVE):
        raise typer.BadParameter("move takes slots and --to NODE, and nothing else does")
    if ((online or drop or yes) and action is not Action.MOVE) or (online and drop):
        raise typer.BadParameter("--online, or --drop with --yes, goes with move")
    if (rate is not None) != (action is Action.PLAN) or (citus and rate is None):
        raise typer.BadParameter("plan takes --rate and --citus, and nothing else does")
    if rate is not None:
        return _plan(call, rate, mix, cores, slots or 32, citus)
    if slots is not None and action is not Action.INIT:
        raise typer.BadParameter("--slots goes with init and plan")
    if call.schema is not None or call.namespace is not None:
        raise typer.BadParameter("slots have schemas of their own, and are of no namespace")
    given: dict[str, Any] = {"application_name": "pgkv cli"}
    if call.table is not None:
        given["table_name"] = call.table
    if call.timeout is not None:
        given["operation_timeout"] = call.timeout
    dsns = split(call.dsn if call.dsn is not None else dsn_from_environment())
    configs = settings(dsns, None, "auto", given)
    with administered(configs, "auto") as cluster:
        if action is Action.INIT:
            made = cluster.init(slots, tables(configs[0]))
            names = cluster.names
            text = f"{console.count(made, 'slot')} made; {cluster.slots} on {', '.join(names)}"
            return call.answer({"made": made, "slots": cluster.slots, "servers": names}, text)
        if not cluster.slots:
            raise ConfigError("the servers have no slots: run `pgkv shards init`")
        if action is Action.CHECK:
            found = cluster.check()
            documents = [problem._asdict() for problem in found]
            call.show(documents, ("slot", "problem"), f"{cluster.slots} slots are in order")
            return NOT_FOUND if found else DONE
        if isinstance(cluster, CitusCluster) and action is Action.RESUME:
            raise ConfigError("Citus finishes or undoes a move that was interrupted by itself")
        if isinstance(cluster, CitusCluster) and (online or drop):
            raise ConfigError(
                "Citus moves slots in its own way: leave out --online and --drop, which are for plain "
                "servers"
            )
        if action in (Action.MOVE, Action.RESUME):
            moving = numbers(which) if which else [*range(cluster.slots)]
            if drop:
                confirm(
                    yes,
                    "--drop loses the rows of UNLOGGED tables",
                    lambda: (
                        f"Move {console.count(len(moving), 'slot')} and lose the rows of UNLOGGED "
                        "tables, as in a crash of the server?"
                    ),
                )
            how = How.ONLINE if online else How.DROP if drop else How.COPY
            return _move(call, cluster, moving, to, how)
        documents = [row._asdict() for row in cluster.shards()]
    columns = ("slot", "node", "state", ("bytes", "bytes", console.size))
    return call.show(documents, columns, "There are no slots.")


def numbers(text: str) -> list[int]:
    """The slots in a text such as ``0-7,12``."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"slots are numbers such as 3 or 0-7,12, not {text!r}")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def _move(
    call: Invocation,
    cluster: Servers | CitusCluster,
    slots: list[int],
    to: str | None,
    how: How,
) -> int:
    """Move slots, or finish their moves; one line for each."""
    from .._shards.admin import Servers
    from .._shards.moves import move, resume

    done = 0
    with console.progress(quiet=call.json) as bar:
        task = bar.add_task("slots", total=len(slots))

        def report(slot: int, step: str, copied: int) -> None:
            size = f" {console.size(copied)}" if copied else ""
            bar.update(task, description=f"slot {slot}: {step}{size}")

        for slot in slots:
            if to is None:
                done += resume(cast("Servers", cluster), slot, report)
            elif isinstance(cluster, Servers):
                done += move(cluster, slot, to, report, how)
            else:
                done += cluster.move(slot, to, report)
            bar.advance(task)
    what = "finished" if to is None else f"moved to {to}"
    return call.answer({"moved": done}, f"{console.count(done, 'slot')} {what}")


def _plan(call: Invocation, rate: float, mix: str, cores: float, slots: int, citus: bool) -> int:
    """Work out how many servers a load needs. The one with the most slots decides."""
    shares = {name: share for name, _, share in (each.partition("=") for each in mix.split(","))}
    if not shares.keys() <= COSTS.keys() or not all(map(str.isdecimal, shares.values())):
        raise typer.BadParameter(f"--mix is such as get=80,set=20, of {', '.join(COSTS)}")
    total = sum(map(int, shares.values()))
    cost = sum(COSTS[name][citus] * int(share) for name, share in shares.items()) / max(1, total)
    if not cost:
        raise typer.BadParameter("--mix needs a share above 0")
    most = cores * LOAD_MAX * 1e6 / cost  # operations a second
    fits = (n for n in range(1, slots + 1) if rate * math.ceil(slots / n) / slots <= most)
    servers = next(fits, None)
    found = {
        "rate": rate,
        "microseconds": round(cost, 1),
        "a_server": round(most),
        "servers": servers,
    }
    need = f"more than {slots} servers" if servers is None else console.count(servers, "server")
    each = f"{cost:.1f} us of processor each; a server of {cores:g} cores takes {most:,.0f}/s"
    return call.answer(found, f"{rate:,.0f}/s need {need}: {each}")
