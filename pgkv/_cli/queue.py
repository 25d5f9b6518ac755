"""``pgkv queue``: the queues of a table, their jobs, and what can be done to a job by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from ..errors import NotFoundError, TableNotFoundError
from . import console
from .command import DONE, Invocation, argument, flag, option

if TYPE_CHECKING:
    from ..patterns.queue.api import Queue
    from ..store import Store


def queue(
    call: Invocation,
    name: str | None = argument("NAME", "The queue.", None),
    dead: bool = flag("--dead", "List dead jobs only."),
    put: str | None = option("--put PAYLOAD", "Put a job."),
    retry: int | None = option("--retry ID", "Let this dead job wait again."),
    drop: int | None = option("--drop ID", "Delete this job, unless a worker has it."),
    purge: bool = flag("--purge", "Delete all dead jobs."),
    unlogged: bool = flag("--unlogged", "A queue with durable=False."),
) -> int:
    """List queues with their jobs by state, or the jobs of one queue. Put, retry or drop a job.

    At most 100 jobs of a queue are listed, in the order in which they would be taken. Exit code 1:
    there is no such job.

    **Example:** `pgkv queue`

    **Example:** `pgkv queue emails --dead`

    **Example:** `pgkv queue emails --retry 17`
    """
    actions = [put is not None, retry is not None, drop is not None, purge]
    if sum(actions) > 1:
        raise typer.BadParameter("give at most one of --put, --retry, --drop and --purge")
    if name is None and (dead or any(actions)):
        raise typer.BadParameter("say which queue: pgkv queue NAME ...")
    from ..patterns.queue.api import Queue

    with call.store(create=put is not None) as store:
        if name is None:
            _list_queues(call, store, durable=not unlogged)
            return DONE
        of = Queue(store, name, durable=not unlogged)
        if put is not None:
            job = of.put(put).id
            call.answer({"id": job}, f"put job {job}")
        elif retry is not None:
            _one(call, of.retry, retry, "retried", "dead job")
        elif drop is not None:
            _one(call, of.cancel, drop, "dropped", "waiting or dead job")
        elif purge:
            _purge(call, of)
        else:
            _list_jobs(call, of, "dead" if dead else None)
    return DONE


def _one(call: Invocation, do: Callable[[int], bool], job: int, done: str, what: str) -> None:
    if not do(job):
        raise NotFoundError(f"there is no {what} {job} in this queue")
    call.answer({"id": job, "done": done}, f"{done} job {job}")


def _purge(call: Invocation, of: Queue[Any]) -> None:
    removed = 0
    while some := of.purge():
        removed += some
    call.answer({"deleted": removed}, f"deleted {console.count(removed, 'dead job')}")


def _list_queues(call: Invocation, store: Store, *, durable: bool) -> None:
    from ..patterns.queue.api import Queue
    from ..patterns.queue.sql import STATES

    sql = Queue(store, "any", durable=durable)._options.sql
    prefix = store._sql.prefix_bytes
    try:
        found = store._execute(sql.stats(None, prefix))
    except TableNotFoundError:
        found = []
    columns: console.Columns = {
        "queue": ("queue", console.one_line),
        **console.numbers(*STATES),
        "oldest": ("oldest", console.duration),
    }
    documents = [{**each._asdict(), "queue": each.queue[len(prefix.decode()) :]} for each in found]
    call.show(documents, columns, "No queue has jobs in this table.")


def _list_jobs(call: Invocation, of: Queue[Any], state: str | None) -> None:
    try:
        found = of.jobs(state)
    except TableNotFoundError:
        found = []
    columns: console.Columns = {
        "id": ("id", str),
        "state": ("state", str),
        "priority": ("priority", str),
        "attempt": ("attempt", str),
        "payload": ("payload", console.one_line),
        "error": ("error", console.one_line),
    }
    documents = [
        {
            **each._asdict(),
            "created_at": each.created_at.isoformat(),
            "due_at": each.due_at.isoformat(),
            "payload": each.payload[:80].decode("utf-8", "replace"),
            "error": each.error or "",
        }
        for each in found
    ]
    call.show(documents, columns, "There are no such jobs.")
