"""The cases, by topic, in the order in which they are run and shown."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from tests.benchmarks.case import CASES, Case, FactCase
from tests.benchmarks.cases import (
    adapters,
    batch,
    bounded,
    cached,
    counter,
    growth,
    idempotency,
    limiter,
    listeners,
    lock,
    memory,
    pipeline,
    point,
    pooler,
    queue,
    session,
    sharded,
    size,
    tasks,
    threads,
    transforms,
    watch,
)

SHARDED = "Several servers"


class Topic(NamedTuple):
    """What is shown together: under a heading, with what has to be known to read its figures."""

    title: str
    note: str
    modules: tuple[ModuleType, ...]
    is_linked: bool = False  # once more, over a network

    def cases(self) -> Iterator[Case | FactCase]:
        """Its cases."""
        for module in self.modules:
            yield from (each for each in CASES if each.module == module.__name__)


TOPICS = (
    Topic(
        "One key",
        "One client, one call after the other.",
        (point,),
    ),
    Topic(
        "One key, over a network",
        "The same over a link on which a round trip takes 0.2 ms longer, as between two machines of"
        " a data centre. A relay holds back each message. Client and servers share the other core.",
        (point,),
        is_linked=True,
    ),
    Topic(
        "A hundred keys",
        "One call for all of them. The pipeline is fifty `get`, twenty-five `set` and twenty-five"
        " `increment`. With a hundred keys the client's own work counts: *redis-py* parses with hiredis,"
        " in C. *libmc* is written in C++, *pymemcache* in Python.",
        (batch, pipeline),
    ),
    Topic(
        "Threads and tasks",
        "Many callers share one store in one process. *coalescing* is"
        " `AsyncStore.connect(dsn, coalesce=True)`: one statement for all the reads of one turn of"
        " the event loop. The get through PgBouncer, in transaction mode, has one caller.",
        (threads, tasks, pooler),
    ),
    Topic(
        "Cached functions",
        "A function that returns a small dict, behind each library's decorator. dogpile.cache,"
        " cashews and aiocache keep it in Redis, diskcache in SQLite on the local disk,"
        " `functools.lru_cache` in the process itself. A hit of pgkv reads two keys, so the store's own"
        " *get_many of 2* is shown too.",
        (cached,),
    ),
    Topic(
        "Rate limiter",
        "Each library uses the algorithm that it recommends: *limits* a sliding window, *throttled-py*"
        " GCRA, *PyrateLimiter* a log of all hits, pgkv token buckets by GCRA. `prefetch=100` takes a hundred tokens at once and"
        " `local_deny` remembers a refusal, so neither asks the server each time. The"
        " application behind the Starlette request does nothing.",
        (limiter,),
    ),
    Topic(
        "Sessions",
        "Each library is measured through the calls that its middleware makes. Django keeps its sessions"
        " in the same PostgreSQL.",
        (session,),
    ),
    Topic(
        "Adapters",
        "The interfaces of Django and limits, over pgkv and over their own backends."
        " On pgkv, *limits* and the sliding counter read before they write. On Redis a script does both.",
        (adapters,),
    ),
    Topic(
        "Idempotency keys",
        "An insert in a transaction, done once for a key. On Redis the record is separate from the effect:"
        " if the process dies between the two, the work is done again.",
        (idempotency,),
    ),
    Topic(
        "Work queue",
        "A job of 100 bytes through an empty queue. *pgmq* and *procrastinate* are their statements on the"
        " same PostgreSQL, without their clients. *RQ* is without the bookkeeping of its worker. Redis"
        " does not wait for its disk.",
        (queue,),
    ),
    Topic(
        "Locks",
        "pgkv's default survives a crash of the server: each grant waits for the disk. With"
        " `durable=False` it does not survive one, nor do the others. An advisory lock has a"
        " number as its name, no lease and no fencing token. A connection holds it, so each"
        " holder needs a connection of its own for that time. *redis-py* sets a key with NX and removes it"
        " by a script, *python-redis-lock* uses a script for both. pgkv's tables had 30,000 grants and"
        " releases before.",
        (lock,),
    ),
    Topic(
        "A bound on size",
        "A cache with room for a tenth of its keys. *Redis* gets the memory that the same number of keys takes"
        " there, and evicts the best of five samples.",
        (bounded,),
    ),
    Topic(
        "Compression and encryption",
        "JSON of that size, compressed, encrypted, or both, compared with the same value plain. `Zstd` does not"
        " compress what is shorter than 512 bytes.",
        (transforms,),
    ),
    Topic(
        "Watching",
        "A store with `notify=True` tells of the keys that it wrote, 10 ms later and for many writes at once.",
        (watch,),
    ),
    Topic(
        SHARDED,
        "A store over 32 slots, on the same server as one that is not sharded, and on that and two more"
        " servers of the same machine. The batches are of keys from all slots. A connection keeps its"
        " statements for each slot: twelve of them were used in every one.",
        (sharded,),
    ),
    Topic(
        "Size",
        "The cost of a large table, of a hot key, and of an iteration.",
        (size, counter, memory),
    ),
    Topic(
        "Growth",
        "The size of what is written again and again, half-way and at the end. Where both are alike, it does"
        " not grow further. How much is left depends on how much is written while it lives: names of locks"
        " a week, buckets until ten seconds after they are full.",
        (growth,),
    ),
    Topic(
        "Listeners",
        "The same calls with nothing listening, and with each way to look at them. In brackets is what a"
        " listener makes of the time.",
        (listeners,),
    ),
)
