"""The rate limiter: one hit on one of many keys, on one hot key, denied; blocking and asyncio."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, repeat
from typing import Any

import pgkv
from tests.benchmarks.case import KEYS, PGKV, RAW, Bench, Entrants, case, each

LIMITS = "limits, Redis"
LIMITS_MEMORY = "limits, memory"
THROTTLED = "throttled-py, Redis"
PYRATE = "PyrateLimiter, PostgreSQL"
LOCAL = "pgkv, local_deny"
PREFETCH = "pgkv, prefetch=100"
WITHOUT = "no middleware"
FIRST = "raw libpq, first hit of a key"

PLENTY = 1_000_000  # a second: never denied
ONE_A_DAY = pgkv.Rate(1, 86400.0)
TASKS = 16


def rate_of(denied: bool) -> pgkv.Rate:
    return ONE_A_DAY if denied else pgkv.Rate(PLENTY)


def raw(
    bench: Bench, limiter: pgkv.RateLimiter, keys: list[str], statement: str
) -> Callable[[int], object]:
    """One of the limiter's own statements, its parameters made beforehand."""
    flows = limiter._flows
    make, policy = getattr(flows.sql, statement), flows.policy
    ops = [make(flows.row(key, policy), policy.charge(1)) for key in keys]
    send = bench.raw().sender(ops[0])
    return each(send, cycle([op.params for op in ops]))


def peers(bench: Bench, keys: list[str], denied: bool) -> Entrants:
    """Other libraries, each with the algorithm it recommends for a Redis."""
    import limits
    from limits.storage import MemoryStorage, RedisStorage
    from limits.strategies import SlidingWindowCounterRateLimiter
    from throttled import RateLimiterType, RedisStore, Throttled, per_day, per_sec

    item = limits.parse("1/day" if denied else f"{PLENTY}/second")
    stores: list[tuple[str, Any]] = [(LIMITS_MEMORY, MemoryStorage())]
    client = bench.redis()
    socket = bench.redis_socket
    if client is not None:
        stores.insert(0, (LIMITS, RedisStorage(f"redis+unix://{socket}")))
    for name, storage in stores:
        limiter = SlidingWindowCounterRateLimiter(storage)
        yield name, each(lambda key, hit=limiter.hit: hit(item, key), cycle(keys))  # type: ignore[misc]  # bound here
    if client is not None:
        throttle = Throttled(
            using=RateLimiterType.GCRA.value,
            quota=per_day(1) if denied else per_sec(PLENTY),
            store=RedisStore(server=f"unix://{socket}"),
        )
        yield THROTTLED, each(throttle.limit, cycle(keys))


def pyrate(bench: Bench, denied: bool) -> Entrants:
    """PyrateLimiter's bucket is one table, so one key."""
    from psycopg_pool import ConnectionPool
    from pyrate_limiter import Duration, Limiter, PostgresBucket, Rate

    pool = ConnectionPool(bench.dsn, min_size=1, max_size=4, open=True)
    bench.closing(pool.close)
    rate = Rate(1, Duration.DAY) if denied else Rate(PLENTY, Duration.SECOND)
    table = f"pyrate_{'denied' if denied else 'allowed'}"
    limiter: Any = Limiter(PostgresBucket(pool, table, [rate]))
    bench.closing(limiter.close)
    yield PYRATE, each(lambda _: limiter.try_acquire("k", blocking=False), repeat(None))


def blocking(bench: Bench, keys: list[str], denied: bool) -> Entrants:
    store = bench.store()
    rate = rate_of(denied)
    limiter = pgkv.RateLimiter(store, rate, name="bench", timeout=10)
    for key in keys:
        limiter.hit(key)
    bench.vacuum()
    yield PGKV, each(limiter.hit, cycle(keys))
    # What a known key's hit sends, and what the first hit of a key does.
    yield RAW, raw(bench, limiter, keys, "refusal" if denied else "charge")
    yield FIRST, raw(bench, limiter, keys, "hit")
    yield from peers(bench, keys, denied)


@case(
    "hit, many keys",
    {RAW: 1.4, LIMITS: (1.1, 0.95), LIMITS_MEMORY: None, THROTTLED: None, (RAW, FIRST): 0.65},
)
def many(bench: Bench) -> Entrants:
    return blocking(bench, KEYS, False)


@case(
    "hit, hot key",
    {
        RAW: 1.4,
        LIMITS: (1.1, 0.95),
        LIMITS_MEMORY: None,
        THROTTLED: None,
        PYRATE: 0.1,
        (PREFETCH, RAW): None,
    },
)
def hot(bench: Bench) -> Entrants:
    yield from blocking(bench, ["hot"], False)
    yield from pyrate(bench, False)
    prefetching = pgkv.RateLimiter(
        bench.store(), rate_of(False), name="prefetch", timeout=10, prefetch=100
    )
    yield PREFETCH, each(prefetching.hit, repeat("hot"))


@case(
    "hit, denied",
    {
        RAW: 1.4,
        LIMITS: (1.1, 0.95),
        LIMITS_MEMORY: None,
        THROTTLED: None,
        PYRATE: 0.1,
        (LOCAL, RAW): None,
        (RAW, FIRST): 0.6,
    },
)
def denied(bench: Bench) -> Entrants:
    yield from blocking(bench, ["denied"], True)
    yield from pyrate(bench, True)
    local = pgkv.RateLimiter(bench.store(), ONE_A_DAY, name="local", timeout=10, local_deny=True)
    yield LOCAL, each(local.hit, repeat("denied"))


def awaited(bench: Bench, count: int) -> Entrants:
    limiter = pgkv.AsyncRateLimiter(bench.async_store(), rate_of(False), name="bench", timeout=10)
    yield PGKV, bench.tasks(count, limiter.hit)
    if bench.redis() is None:
        return
    import limits
    from limits.aio.storage import RedisStorage
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

    storage = RedisStorage(f"async+redis+unix://{bench.redis_socket}", implementation="redispy")
    theirs = SlidingWindowCounterRateLimiter(storage)
    item = limits.parse(f"{PLENTY}/second")
    yield LIMITS, bench.tasks(count, lambda key: theirs.hit(item, key))


@case("async hit, 1 task", {LIMITS: 0.8})
def one_task(bench: Bench) -> Entrants:
    return awaited(bench, 1)


@case(f"async hit, {TASKS} tasks", {LIMITS: None}, workers=TASKS)
def some_tasks(bench: Bench) -> Entrants:
    return awaited(bench, TASKS)


@case(f"Starlette request, {TASKS} tasks", {WITHOUT: None}, workers=TASKS)
def requests(bench: Bench) -> Entrants:
    """An application that does nothing, called as a server calls it."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def hello(request: Any) -> PlainTextResponse:
        return PlainTextResponse("hello")

    def client(app: Any) -> Callable[[str], Any]:
        async def receive() -> Any:
            return {"type": "http.request"}

        async def send(message: Any) -> None: ...

        async def get(key: str) -> None:
            scope = {
                "type": "http", "method": "GET", "path": "/", "query_string": b"",
                "headers": [(b"x-user", key.encode())], "client": ("192.0.2.1", 1),
            }  # fmt: skip
            await app(scope, receive, send)

        return get

    limiter = pgkv.AsyncRateLimiter(bench.async_store(), rate_of(False), name="web", timeout=10)
    limited = Starlette(routes=[Route("/", hello)])
    limited.add_middleware(
        pgkv.RateLimitMiddleware, limiter=limiter, key=lambda request: request.headers["x-user"]
    )
    yield PGKV, bench.tasks(TASKS, client(limited))
    yield WITHOUT, bench.tasks(TASKS, client(Starlette(routes=[Route("/", hello)])))
