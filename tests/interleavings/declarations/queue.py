"""Queues: one job, with a dedupe key or without one, and workers that are cut short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psycopg

import pgkv
from pgkv._ops.op import Op
from pgkv.patterns._runtime.lease import LOCKED
from pgkv.patterns.queue.sql import FIRST, JobStatements, Look, due_params
from tests.interleavings.pairs import Operation, Subject
from tests.interleavings.scenarios import at_most, failed_by_itself, truncate
from tests.interleavings.schedule import Scenario, World

STATEMENTS = ("pgkv.patterns.queue.sql",)
READS = frozenset(["stats", "jobs", "notify"])
TABLE = "kv_store_jobs"
Q, ID, TOKEN, LEASE = b"q", 1_000_000, 100, 60.0
BUSY, NOTHING = "busy", "nothing"  # ask again
DUE = due_params(0.0, None, 0, 3)
TAKE = ([FIRST] * 10, 1, LEASE, 0)


class Bound(NamedTuple):
    """The statements, and what performs their operations."""

    sql: JobStatements
    store: Any


def said(answer: Any) -> Any:
    """What of an answer can be compared: no ids of new jobs, no times, no tokens."""
    if isinstance(answer, Look):
        return [(job.payload, job.attempt) for job in answer.jobs] or NOTHING
    if isinstance(answer, dict):  # of a renewal
        return [BUSY if code == LOCKED else code for code in answer.values()]
    if isinstance(answer, tuple):  # of a put with a key
        return answer[1]
    return answer


def sent(make: Callable[[Any, bytes], Op[Any]], *, answers: bool = True) -> Operation[Bound]:
    """An operation: what is sent is made for the statements at hand."""

    def run(bound: Bound, side: str) -> Any:
        answer = said(bound.store._channel.execute(make(bound.sql, side.encode())))
        return answer if answers else None

    return run


class Jobs(Subject[Bound]):
    """A job without a key, in each of its states."""

    key = ""
    states: tuple[str, ...] = ("waiting", "failed", "running", "over", "last", "dead")
    repeatable = frozenset(("put", "put many", "ack"))
    operations: Mapping[str, Operation[Bound]] = {
        "put": sent(lambda s, x: s.put(Q, x, DUE), answers=False),
        "put many": sent(lambda s, x: s.put_many(Q, [x, x], DUE), answers=False),
        "ack": sent(lambda s, _: s.ack(ID, TOKEN, deduped=False)),
        "ack many": sent(lambda s, _: s.ack_many([(ID, TOKEN)])),
        "take": sent(lambda s, _: s.take(Q, *TAKE)),
        "nack": sent(lambda s, _: s.put_back(ID, TOKEN, "e", delay=50.0)),
        "release": sent(lambda s, _: s.put_back(ID, TOKEN, None, delay=0.0, free=True)),
        "bury": sent(lambda s, _: s.put_back(ID, TOKEN, None, delay=0.0, dead=True)),
        "renew": sent(lambda s, _: s.renew([(ID, TOKEN, LEASE)])),
        "cancel": sent(lambda s, _: s.cancel(Q, ID)),
        "retry": sent(lambda s, _: s.retry(Q, ID)),
        "purge": sent(lambda s, _: s.purge(Q, 10)),
    }

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        queue = pgkv.Queue(self.store, "q")
        queue.create_table()
        self.sql, self.inside = queue._options.sql, queue._options.inside

    def on(self, conn: psycopg.Connection | None) -> Bound:
        if conn is None:
            return Bound(self.sql, self.store)
        return Bound(self.inside, self.store.using(conn))

    def asks_again(self, answer: Any) -> bool:
        # A take, a renewal and a purge pass over a row in flight.
        return answer in (NOTHING, [BUSY]) or (answer == 0 and answer is not False)  # of purge

    def reset(self, state: str) -> None:
        self.conn.execute(f"DELETE FROM {TABLE}".encode())
        if state == "absent":
            return
        leased = {"running": "now() + interval '1 min'", "again": "now() + interval '1 min'"}
        over = "now() - interval '1 s'"
        until = leased.get(state, over if state in ("over", "over again", "last") else "'epoch'")
        attempt = {"waiting": 0, "last": 3, "dead": 3}.get(state, 1)
        due = "'infinity'" if state == "dead" else "now() - interval '1 min'"
        again = "again" in state
        self.conn.execute(
            f"INSERT INTO {TABLE} (id, queue, priority, due_at, leased_until, token, attempt,"
            " max_attempts, created_at, payload, dedupe, again) OVERRIDING SYSTEM VALUE"
            f" VALUES ({ID}, 'q', 0, {due}, {until}, {TOKEN}, {attempt}, 3, now(), 'p', %s, {again})".encode(),
            [self.key or None],
        )

    def observe(self) -> Any:
        return self.conn.execute(
            "SELECT payload, attempt, again, dedupe, due_at = 'infinity', due_at > now(),"
            f" leased_until > now(), leased_until = 'epoch', error FROM {TABLE}"
            " ORDER BY payload, attempt, again, leased_until".encode()
        ).fetchall()


class KeyedJobs(Jobs):
    """A job with a dedupe key, also one that is to run again."""

    key = "k"
    states = ("absent", *Jobs.states, "again", "over again")
    operations: Mapping[str, Operation[Bound]] = {
        **{name: Jobs.operations[name] for name in Jobs.operations if "many" not in name},
        "put": sent(lambda s, x: s.put(Q, x, DUE, b"k")),
        "ack": sent(lambda s, _: s.ack(ID, TOKEN, deduped=True)),
    }


# -- schedules


def putting() -> Callable[[World], Any]:
    """Change what the job's work reads, then put it."""

    async def client(world: World) -> None:
        def change() -> int:
            world.memory["changes"] += 1
            return int(world.memory["changes"])

        number = await world.step("changes", change)
        await world.make("Queue", "q").put("x", dedupe="k")
        world.memory["put"] = max(world.memory["put"], number)

    return client


def working(*ends: str) -> Callable[[World], Any]:
    """Take a job, work on what there is, and end the run in each of these ways."""

    async def client(world: World) -> None:
        queue = world.make("Queue", "q", lease=10, backoff=pgkv.Backoff(0))
        name = world.client()
        for end in ends:
            job = await queue.take()
            if job is None:
                return
            world.held[name] = job
            try:
                await world.step("works", lambda: world.memory.update(seen=world.memory["changes"]))
                await getattr(job, end)()
                if end == "ack":
                    world.memory["acked"].append(job.id)
                    newer = [
                        n
                        for n, each in world.held.items()
                        if each.id == job.id and each.token > job.token
                    ]
                    assert not newer, f"acknowledged what {newer} had taken over"
            except pgkv.LeaseLostError:
                pass
            finally:
                del world.held[name]

    return client


def nothing_is_lost(world: World, results: dict[str, Any]) -> None:
    """Every change whose put was answered was worked on, or there is a job that will be."""
    assert not failed_by_itself(results), results
    stats = pgkv.Queue(world.sync, "q").stats()
    left = stats.waiting + stats.delayed + stats.running
    assert left <= 1, "never two jobs of a key"
    assert left or world.memory["seen"] >= world.memory["put"], world.memory


def one_worker_each(world: World) -> None:
    """No two workers trust their lease of the same job."""
    held = [job.id for job in world.held.values() if not job.is_lost]
    assert len(held) == len(set(held)), f"{world.held} hold it at once"


def each_is_done_once(world: World, results: dict[str, Any]) -> None:
    """No job is acknowledged twice; none is gone but by an ack, heard of or not."""
    assert not failed_by_itself(results), results
    acked, left = world.memory["acked"], {job.id for job in pgkv.Queue(world.sync, "q").jobs()}
    assert len(acked) == len(set(acked)), f"acknowledged twice: {acked}"
    assert not left & set(acked), "a job is there after its ack"
    unheard = sum(result is not None for result in results.values())
    assert len(left) + len(acked) + unheard >= 2, f"lost a job: {left} are left, {acked} are done"


def of_jobs(name: str, clients: dict[str, Any], **options: Any) -> Scenario:
    def prepare(world: World) -> None:
        queue = pgkv.Queue(world.sync, "q")
        queue.create_table()
        truncate(world, "_jobs")
        queue.put("first", dedupe="k") if options.get("check") is None else queue.put_many("ab")
        world.memory.update(changes=0, put=0, seen=0, acked=[])

    settings = {"check": nothing_is_lost, "prepare": prepare, "invariant": at_most(1), **options}
    return Scenario(name, clients, **settings)


ACKS = ("ack",) * 3

SUBJECTS = (Jobs, KeyedJobs)
SCENARIOS = (
    of_jobs(
        "queue: two workers, one putter",
        {"one": working(*ACKS), "two": working(*ACKS), "putter": putting()},
        jumps=(11.0,),
        preemptions=2,
    ),
    of_jobs(
        "queue: a worker, two putters",
        {"one": working(*ACKS), "putter": putting(), "putter two": putting()},
        preemptions=2,
    ),
    of_jobs(
        "queue: put back",
        {"one": working("nack", "ack"), "two": working("release", *ACKS), "putter": putting()},
        jumps=(11.0,),
        preemptions=2,
    ),
    of_jobs(
        "queue: two jobs without a key",
        {"one": working("nack", "ack"), "two": working("ack", "release"), "three": working(*ACKS)},
        check=each_is_done_once,
        invariant=one_worker_each,
        jumps=(11.0,),
        preemptions=2,
    ),
    of_jobs(
        "queue: the server's clock jumps",
        {"one": working("nack", "ack"), "two": working(*ACKS)},
        check=each_is_done_once,
        invariant=None,
        kinds=("lose",),
        server_jumps=(11.0, -100.0),
        faults=2,
        preemptions=2,
    ),
)
