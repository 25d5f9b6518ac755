"""The commands about what patterns keep: ``cache``, ``limits``, ``sessions``, ``idempotency``, ``queue``
and ``locks`` list it, and end or change one by hand. ``worker`` runs the jobs of queues."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from ..errors import NotFoundError, TableNotFoundError
from . import console
from .command import DONE, Invocation, argument, flag, load_object, option, span

if TYPE_CHECKING:
    from ..patterns.cache.sql import CacheStatements, Usage
    from ..patterns.lock.sql import Guarding, LockInfo, LockStatements
    from ..patterns.queue.api import Queue
    from ..patterns.session.data import SessionInfo
    from ..store import Store


# -- pgkv cache ------------------------------------------------------------------------------


_REPORT = dict[str, tuple[int, int]]  # hits and misses by function


def cache(
    call: Invocation,
    clear: str | None = option("--clear FUNCTION", "Invalidate all entries of this function."),
    tag: str | None = option("--tag TAG", "Invalidate all entries with this tag."),
) -> int:
    """List cached functions with their entries, or clear one function or tag.

    Name a function as the list shows it: module, qualified name and version. The last part is
    enough if it is unambiguous. Clearing takes effect in every process at once (in first levels
    within their ttl) and costs one write, however many entries there are. Their rows stay in the
    list until they expire. Exit code 1: there is no such function.

    The hit ratio is of the processes that stored a value in the last hour and have lived for a
    minute. Each reports its counts in the table, at most once a minute.

    **Example:** `pgkv cache`

    **Example:** `pgkv cache --clear app.users.load_user:1`

    **Example:** `pgkv cache --tag user:17`
    """
    if clear is not None and tag is not None:
        raise typer.BadParameter("give at most one of --clear and --tag")
    from ..patterns.cache.sql import TAG, CacheStatements

    with call.store() as store:
        sql = CacheStatements(store._config, store._sql.prefix)
        if tag is not None:
            store._execute(sql.bump_tag(sql.cache_key(TAG, tag)))
            return call.answer({"cleared": tag, "kind": "tag"}, f"cleared tag {tag}")
        usages, reports = store._execute(sql.usage()), store._execute(sql.reports())
        if clear is not None:
            return _clear(call, store, sql, clear, usages)
    columns: list[console.Column] = [
        *("function", "entries", "computing"),
        ("values", "value_bytes", console.size),
        ("hit ratio", "hit_ratio", lambda n: "" if n is None else f"{n:.1%}"),
    ]
    documents = _with_ratios(usages, reports)
    return call.show(documents, columns, "No cached function has entries in this table.")


def _with_ratios(usages: list[Usage], reports: list[bytes]) -> list[dict[str, Any]]:
    """Add what processes have reported; a function without entries may be in a report as well."""
    from ..patterns.cache.sql import Usage

    documents = {each.function: each._asdict() for each in usages}
    totals: dict[str, list[int]] = {}
    for report in reports:
        with contextlib.suppress(msgspec.MsgspecError):  # another program's row
            for name, (hits, misses) in msgspec.json.decode(report, type=_REPORT).items():
                total = totals.setdefault(name, [0, 0, 0])
                for index, count in enumerate((hits, misses, 1)):
                    total[index] += count
    for name in totals.keys() - documents.keys():
        documents[name] = Usage(name, 0, 0, 0)._asdict()
    for name, document in documents.items():
        hits, misses, processes = totals.get(name, (0, 0, 0))
        ratio = hits / (hits + misses) if hits + misses else None
        document |= {"hits": hits, "misses": misses, "processes": processes, "hit_ratio": ratio}
    return [documents[name] for name in sorted(documents)]


def _clear(
    call: Invocation, store: Store, sql: CacheStatements, wanted: str, usages: list[Usage]
) -> int:
    from ..patterns.cache.sql import FUNCTION

    names = [each.function for each in usages]
    found = [name for name in names if name == wanted] or [
        name for name in names if name.rpartition(":")[0].endswith(f".{wanted}")
    ]
    if not found:
        raise NotFoundError(f"no cached function {wanted!r} has entries in this table")
    if len(found) > 1:
        raise typer.BadParameter(f"{wanted!r} is ambiguous: {', '.join(found)}; give the full name")
    store._execute(sql.bump_function(sql.cache_key(FUNCTION, found[0])))
    return call.answer({"cleared": found[0], "kind": "function"}, f"cleared function {found[0]}")


# -- pgkv limits -----------------------------------------------------------------------------


def limits(
    call: Invocation,
    key: str | None = argument("[KEY]", "The buckets of this key.", None),
    limiter: str | None = option("--limiter NAME", "Show this limiter only."),
    reset: bool = flag("--reset", "Fill the buckets of KEY."),
) -> int:
    """List rate limiters with their buckets, or those of one key, or fill them again.

    Only buckets that are not full are listed. The rates are in the programs: the table has when a
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
            return call.answer({"reset": filled}, f"filled {console.count(filled, 'bucket')}")
    columns = ("limiter", "buckets", ("last charged", "idle"), ("full in", "full_in"))
    shown = [{k: v for k, v in asdict(each).items() if k != "row"} for each in found]
    return call.show(shown, columns, "No rate limiter has a bucket here that is not full.")


# -- pgkv sessions ---------------------------------------------------------------------------


def sessions(
    call: Invocation,
    user: str = argument("USER", "The sessions' user_id."),
    end: str | None = option("--end HANDLE", "End the session with this handle in the list."),
    end_all: bool = flag("--end-all", "End all sessions of the user."),
) -> int:
    """List a user's live sessions, the last used first, or end them.

    A handle names a session and is not a secret: the token is not in the table. A
    session that was ended is dead at once, in every process. Exit code 1: no session was ended.

    **Example:** `pgkv sessions user:17`

    **Example:** `pgkv sessions user:17 --end-all`
    """
    if end is not None and end_all:
        raise typer.BadParameter("give --end or --end-all, not both")
    from ..patterns.session.api import SessionStore

    found: list[SessionInfo] = []
    with call.store() as store:
        kept = SessionStore(store)
        if end is not None or end_all:
            ended = kept.destroy_user(user) if end is None else kept.destroy_handle(end, user)
            if not ended:
                raise NotFoundError(f"the user {user!r} has no such session")
            return call.answer(
                {"ended": int(ended)}, f"ended {console.count(int(ended), 'session')}"
            )
        with contextlib.suppress(TableNotFoundError):
            found = kept.list_user(user)
    documents = [
        {
            "handle": each.handle,
            "age": (each.read_at - each.created_at).total_seconds(),
            "idle": each.idle(),
            "remaining": (each.expires_at - each.read_at).total_seconds(),
            "created_at": each.created_at.isoformat(),
            "ends_at": each.ends_at.isoformat(),
            "metadata": dict(each.metadata),
        }
        for each in found
    ]
    columns = ("handle", "age", "idle", "remaining", "metadata")
    return call.show(documents, columns, f"The user {user!r} has no live session.")


# -- pgkv idempotency ------------------------------------------------------------------------


class KeyAction(StrEnum):
    SHOW = "show"
    FORGET = "forget"


def idempotency(
    call: Invocation,
    action: KeyAction = argument("", "show, or forget."),
    key: str = argument("", "The idempotency key."),
    scope: str = option("--scope SCOPE", "Whose key it is. Default: none.", ""),
) -> int:
    """Show what is known of an idempotency key, or forget it.

    **show** says whether the work is done, running (an attempt has the lease) or abandoned (its attempt died).
    The result is not shown. **forget** drops the result: the next request with the key runs. An attempt under
    way can then no longer complete. Exit code 1: the key is not known.

    **Example:** `pgkv idempotency show 8e03978e --scope user:17`

    **Example:** `pgkv idempotency forget 8e03978e`
    """
    from ..patterns.idempotency.api import Idempotency

    with call.store() as store:
        keys = Idempotency(store)
        found = keys.get(key, scope=scope)
        if found is None or (action is KeyAction.FORGET and not keys.forget(key, scope=scope)):
            raise NotFoundError(f"the idempotency key {key!r} is not known in this scope")
    facts = {
        "key": key,
        "status": "forgotten" if action is KeyAction.FORGET else found.status,
        "token": found.token,
        "created_at": found.created_at.isoformat(),
        "expires_at": found.expires_at.isoformat(),
        "result_bytes": None if found.result is None else len(found.result),
    }
    if call.json:
        console.say_json(facts)
    elif action is KeyAction.FORGET:
        console.say(f"forgotten {console.one_line(key)}")
    else:
        console.show_table(("", ""), [(name, str(value)) for name, value in facts.items()])
    return DONE


# -- pgkv queue ------------------------------------------------------------------------------


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
        of = Queue(store, name or "any", durable=not unlogged)
        if name is None:
            return _list_queues(call, store, of)
        if put is not None:
            job = of.put(put).id
            return call.answer({"id": job}, f"put job {job}")
        if retry is not None:
            return _one(call, of.retry, retry, "retried", "dead job")
        if drop is not None:
            return _one(call, of.cancel, drop, "dropped", "waiting or dead job")
        if purge:
            removed = sum(iter(of.purge, 0))  # it deletes some at a time
            return call.answer(
                {"deleted": removed}, f"deleted {console.count(removed, 'dead job')}"
            )
        return _list_jobs(call, of, "dead" if dead else None)


def _one(call: Invocation, do: Callable[[int], bool], job: int, done: str, what: str) -> int:
    if not do(job):
        raise NotFoundError(f"there is no {what} {job} in this queue")
    return call.answer({"id": job, "done": done}, f"{done} job {job}")


def _list_queues(call: Invocation, store: Store, of: Queue[Any]) -> int:
    from ..patterns.queue.sql import STATES

    prefix = store._sql.prefix_bytes
    try:
        found = store._execute(of._options.sql.stats(None, prefix))
    except TableNotFoundError:
        found = []
    documents = [{**each._asdict(), "queue": each.queue[len(prefix.decode()) :]} for each in found]
    return call.show(documents, ("queue", *STATES, "oldest"), "No queue has jobs in this table.")


def _list_jobs(call: Invocation, of: Queue[Any], state: str | None) -> int:
    try:
        found = of.jobs(state)
    except TableNotFoundError:
        found = []
    columns = (("id", "id", str), "state", "priority", "attempt", "payload", "error")
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
    return call.show(documents, columns, "There are no such jobs.")


# -- pgkv locks ------------------------------------------------------------------------------


def locks(
    call: Invocation,
    break_: int | None = option(
        "--break TOKEN",
        "Free the lock of this token at once. Its holder continues until its next renewal.",
    ),
    revoke: int | None = option(
        "--revoke TOKEN",
        "End this token. The lock becomes free when its lease would have ended. Never two holders.",
    ),
) -> int:
    """List the holders of locks: age, time left, waiters.

    Below the holders it lists the open transactions that have guarded a lease. A waiter of a lock that
    is not fair is counted after its first second. Exit code 1: no lease has that token.

    **Example:** `pgkv locks`

    **Example:** `pgkv locks --revoke 1795367314868272`
    """
    if break_ is not None and revoke is not None:
        raise typer.BadParameter("give --break or --revoke, not both")
    token = revoke if break_ is None else break_
    with call.store() as store:
        if token is not None:
            ended = _end(store, token, safely=break_ is None)
            return call.answer({**ended, "ended": "broken" if revoke is None else "revoked"}, "")
        leases, guards = held(store)
    if call.json:
        console.say_json({"locks": leases, "guards": [each._asdict() for each in guards]})
        return DONE
    for lease in leases:
        lease["name"] += "" if lease["slot"] is None else f" [{lease['slot']}]"
    columns: list[console.Column] = [
        *("name", ("holder", "owner"), ("token", "token", str)),
        *("age", "remaining", "waiters", ("metadata", "metadata", console.as_json)),
    ]
    console.show_documents(leases, columns, title="Locks")
    columns = [
        ("name", "key"),
        ("pid", "pid", str),
        "application",
        "state",
        ("open for", "seconds"),
    ]
    rows = [{**each._asdict(), "key": each.key or "?", "what": "guard"} for each in guards]
    if rows and console.on_terminal():
        console.show_documents(rows, columns, title="Open guards")
    elif rows:
        console.show_documents(rows, [("", "what"), *columns])
    return DONE


def _tables(store: Store) -> list[LockStatements]:
    from ..patterns.lock.api import statements_of
    from ..patterns.lock.sql import LockStatements

    return [statements_of(store, LockStatements, durable=durable) for durable in (True, False)]


def held(store: Store) -> tuple[list[dict[str, Any]], list[Guarding]]:
    """Return the leases, each with how many wait for it, and the open guards."""
    leases: list[dict[str, Any]] = []
    guards: list[Guarding] = []
    waiting: dict[str, int] = {}
    tables = _tables(store)
    for sql in tables:
        with contextlib.suppress(TableNotFoundError):
            leases += [_shown(each) for each in store._execute(sql.holders())]
            open_now: list[Guarding] = store._execute(sql.guards())
            guards += open_now
    with contextlib.suppress(TableNotFoundError):
        waiting = store._execute(tables[0].queue())
    for lease in leases:
        lease["waiters"] = waiting.pop(lease["name"], 0)
    return leases, guards


def _shown(info: LockInfo) -> dict[str, Any]:
    from ..patterns.lock.sql import name_and_slot

    name, slot = name_and_slot(info.name)
    return {
        "name": name,
        "slot": slot,
        "owner": info.owner,
        "token": info.token,
        "age": round(info.age(), 3),
        "remaining": round(info.remaining(), 3),
        "acquired_at": info.acquired_at.isoformat(),
        "expires_at": info.expires_at.isoformat(),
        "metadata": info.metadata,
    }


def _end(store: Store, token: int, *, safely: bool) -> dict[str, Any]:
    """End the lease of that token; return who held it."""
    for sql in _tables(store):
        with contextlib.suppress(TableNotFoundError):
            for holder in store._execute(sql.holders()):
                if holder.token != token:
                    continue
                key = store._sql.prefix_bytes + holder.name.encode()
                end = sql.revoke(key, token) if safely else sql.release(key, token, notify=True)
                if store._execute(end):
                    shown = _shown(holder)
                    return {name: shown[name] for name in ("name", "slot", "owner", "token")}
    raise NotFoundError(f"no lease has the token {token}; see pgkv locks")


# -- pgkv worker ------------------------------------------------------------------------------


def worker(
    call: Invocation,
    function: str = argument("MODULE:FUNCTION", "Called with each job. May be async."),
    queues: list[str] = option(
        "--queue -q NAME", "A queue. Later ones are used when earlier ones are empty.", ...
    ),
    concurrency: int = option("--concurrency N", "Jobs at a time.", 8, min=1, max=1000),
    lease: float = span("--lease", "When the job of a dead worker is given to another.", "60s"),
    grace: float = span("--grace", "How long running jobs may take to end after SIGTERM.", "30s"),
    notify: bool = flag("--notify", 'Wake up at puts with wakeup="notify".'),
    unlogged: bool = flag("--unlogged", "Queues with durable=False."),
) -> int:
    """Run the jobs of queues with a function of your program, until SIGTERM or SIGINT.

    The module is found from the working directory. The function gets the job: when it returns, the
    job is done. When it raises, the job waits for its next attempt.

    **Example:** `pgkv worker app.jobs:send --queue emails`
    """
    fn = load_object(function, "MODULE:FUNCTION, such as app.jobs:send")
    if not callable(fn):
        raise typer.BadParameter(f"{function} is not a function")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    wakeup = "notify" if notify else "poll"
    options: dict[str, Any] = {"lease": lease, "wakeup": wakeup, "durable": not unlogged}
    names = ", ".join(queues)

    async def run() -> None:
        from ..aio import AsyncStore
        from ..patterns.queue.api import AsyncQueue
        from ..patterns.queue.worker import AsyncWorker

        async with AsyncStore(call.config()) as store:
            where = store if call.namespace is None else store.namespace(call.namespace)
            console.note(f"working on {names}")
            of = [AsyncQueue(where, name, **options) for name in queues]
            await AsyncWorker(of, fn, concurrency=concurrency, grace=grace).run()

    if inspect.iscoroutinefunction(fn):
        asyncio.run(run())
        return DONE
    from ..patterns.queue.api import Queue
    from ..patterns.queue.worker import Worker

    with call.store(create=True) as store:
        console.note(f"working on {names}")
        of = [Queue(store, name, **options) for name in queues]
        Worker(of, fn, concurrency=concurrency, grace=grace).run()
    return DONE
