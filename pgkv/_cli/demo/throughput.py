"""Scene: how many calls are made in a second, by one caller and by many, beside Redis.

Store and Redis hold the same keys and take turns in short rounds, so that whatever disturbs the
machine disturbs both; what is shown per second is each one's median round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from statistics import median
from time import perf_counter
from typing import Any

from ...store import Store
from .placement import CAN_PLACE, on_one_core, server_pids
from .redis_server import open_redis
from .stage import WORKERS, Check, Rate, Report, Scene, Stage, rate

KEYS = 10_000  # the ones that are asked for
BATCH = 100
ROUNDS = 15
COUNTERS = 100
WRITTEN, COUNTED = "demo:written:", "demo:counted:"  # the data set itself is left as it is
THREAD_ROUNDS = 5
NOT_OURS = "Redis is compared with a server of the demo's own only."


@dataclass(slots=True)
class Operation:
    """One line of the table.

    Args:
        name: what it is called there.
        items: what it is called with, one after the other.
        ours: calls the store.
        theirs: calls a Redis client: ``theirs(client, item)``.
        is_right: whether the store's answer is what it must be.
        increments: how many of them one call makes.
    """

    name: str
    items: Sequence[Any]
    ours: Callable[[Any], Any]
    theirs: Callable[[Any, Any], Any]
    is_right: Callable[[Any, Any], bool]
    increments: int = 0
    our_rounds: list[list[float]] = field(default_factory=list)  # seconds of each call
    their_rounds: list[list[float]] = field(default_factory=list)


def play(stage: Stage) -> Report:
    """Let the two take turns at each operation, and look at every answer of the store's."""
    drawn = random.sample(list(stage.data), min(KEYS, len(stage.data)))
    data = {key: stage.data[key].encode() for key in drawn}
    client: Any
    with open_redis() if stage.is_own else nullcontext((None, NOT_OURS)) as (client, about):
        pairs = iter(stage.data.items() if client is not None else ())
        while batch := dict(islice(pairs, 1000)):
            client.mset(batch)
        operations, answered, wrong, counted = _one_caller(stage, client, data)
        many, reads, misread = _many_callers(stage, client, data)
    rates = [*map(_rate, operations), many]
    total = sum(int(value) for _, value in stage.store.scan(COUNTED))
    return Report(
        [
            f"one caller{', on one core with its server' if stage.is_own and CAN_PLACE else ''}: "
            + ", ".join(f"{each.operation} {each.per_second:,.0f} a second" for each in rates[:3]),
            about + _beside(rates[:3]),
        ],
        [
            Check(f"each of {answered + reads:,} answers is right: what is read is what was written",
                  wrong + misread == 0),
            Check(f"the counters add up to {total:,}, after {counted:,} increments",
                  total == counted),
        ],
        rates,
    )  # fmt: skip


def _one_caller(
    stage: Stage, client: Any, data: dict[str, bytes]
) -> tuple[list[Operation], int, int, int]:
    """Time all operations; return them, and how many answers there were, wrong ones among them,
    and increments."""
    operations = list(_operations(stage.store, data))
    answered = wrong = counted = 0
    seconds = stage.size.seconds / 2 / len(operations) / ROUNDS
    pids = server_pids(stage.store.dsn) if stage.is_own else []
    if client is not None:
        pids.append(int(client.info("server")["process_id"]))
    with on_one_core(pids), stage.bar("one caller", len(operations) * ROUNDS) as advance:
        for operation in operations:
            ours, theirs = cycle(operation.items), cycle(operation.items)
            for _ in range(ROUNDS):
                latencies, answers = _round(operation.ours, ours, seconds)
                operation.our_rounds.append(latencies)
                answered += len(answers)
                wrong += sum(not operation.is_right(*each) for each in answers)
                counted += len(answers) * operation.increments
                if client is not None:
                    call = partial(operation.theirs, client)
                    operation.their_rounds.append(_round(call, theirs, seconds)[0])
                advance(1)
    return operations, answered, wrong, counted


def _many_callers(stage: Stage, client: Any, data: dict[str, bytes]) -> tuple[Rate, int, int]:
    """Time `get` in many threads at once; return how many reads there were, wrong ones among them."""
    keys = list(data)
    every: list[float] = []
    wrong: list[str] = []
    ours, theirs = [], []
    seconds = stage.size.seconds / 4 / THREAD_ROUNDS

    def timed(get: Callable[[str], Any]) -> tuple[float, list[float]]:
        latencies: list[list[float]] = [[] for _ in range(WORKERS)]

        def work(number: int, go_on: Callable[[], bool]) -> None:
            took, chosen = latencies[number].append, cycle(keys[number::WORKERS])
            while go_on():
                key = next(chosen)
                started = perf_counter()
                value = get(key)
                took(perf_counter() - started)
                if value != data[key]:
                    wrong.append(key)

        took = stage.together(f"{WORKERS} callers", work, seconds=seconds)
        found = [each for worker in latencies for each in worker]
        return len(found) / took, found

    for _ in range(THREAD_ROUNDS):
        per_second, latencies = timed(stage.store.get)
        ours.append(per_second)
        every += latencies
        if client is not None:
            theirs.append(timed(client.get)[0])
    found = replace(
        rate("get", WORKERS, every),
        per_second=median(ours),
        redis_per_second=median(theirs) if theirs else None,
    )
    return found, len(every), len(wrong)


def _beside(rates: Sequence[Rate]) -> str:
    theirs = [f"{each.redis_per_second:,.0f}" for each in rates if each.redis_per_second]
    return f", with the same keys: {', '.join(theirs)}" if theirs else ""


def _rate(operation: Operation) -> Rate:
    every = [each for latencies in operation.our_rounds for each in latencies]
    return replace(
        rate(operation.name, 1, every),
        per_second=_per_second(operation.our_rounds),
        redis_per_second=_per_second(operation.their_rounds) if operation.their_rounds else None,
    )


def _per_second(rounds: list[list[float]]) -> float:
    return median(len(each) / sum(each) for each in rounds)


def _operations(store: Store, data: dict[str, bytes]) -> Iterator[Operation]:
    keys = list(data)
    batches = [keys[at : at + BATCH] for at in range(0, len(keys) - BATCH + 1, BATCH)]
    counters = [f"{COUNTED}{number}" for number in range(COUNTERS)]
    yield Operation(
        "get", keys, store.get,
        lambda redis, key: redis.get(key),
        lambda key, value: bool(value == data[key]),
    )  # fmt: skip
    yield Operation(
        "set", [(WRITTEN + key, value) for key, value in data.items()],
        lambda pair: store.set(*pair),
        lambda redis, pair: redis.set(*pair),
        lambda _, version: bool(version),
    )  # fmt: skip
    yield Operation(
        "increment", counters, store.increment,
        lambda redis, key: redis.incr(key),
        lambda _, count: count > 0,
        increments=1,
    )  # fmt: skip
    yield Operation(
        f"get_many of {BATCH}", batches, store.get_many,
        lambda redis, batch: redis.mget(batch),
        lambda batch, values: bool(values == {key: data[key] for key in batch}),
    )  # fmt: skip
    yield Operation(
        f"set_many of {BATCH}",
        [{WRITTEN + key: data[key] for key in batch} for batch in batches],
        store.set_many,
        lambda redis, pairs: redis.mset(pairs),
        lambda pairs, written: bool(written == len(pairs)),
    )  # fmt: skip
    half = BATCH // 2
    yield Operation(
        f"pipeline of {BATCH}",
        [(batch[:half], random.sample(counters, half)) for batch in batches],
        lambda item: _pipeline(store, *item),
        lambda redis, item: _redis_pipeline(redis, *item),
        lambda item, values: bool(values == [data[key] for key in item[0]]),
        increments=half,
    )  # fmt: skip


def _pipeline(store: Store, keys: list[str], counters: list[str]) -> list[bytes | None]:
    with store.pipeline() as queue:
        found = [queue.get(key) for key in keys]
        for counter in counters:
            queue.increment(counter)
    return [each.result() for each in found]


def _redis_pipeline(redis: Any, keys: list[str], counters: list[str]) -> Any:
    with redis.pipeline(transaction=False) as queue:
        for key in keys:
            queue.get(key)
        for counter in counters:
            queue.incr(counter)
        return queue.execute()


def _round(
    call: Callable[[Any], Any], items: Iterator[Any], seconds: float
) -> tuple[list[float], list[tuple[Any, Any]]]:
    """Call it for so long, at least once; return how long each took, what was asked and answered."""
    latencies, answers = [], []
    until = perf_counter() + seconds
    while True:
        item = next(items)
        started = perf_counter()
        answer = call(item)
        ended = perf_counter()
        latencies.append(ended - started)
        answers.append((item, answer))
        if ended >= until:
            return latencies, answers


SCENE = Scene(
    "Throughput",
    "What a request would wait for: one caller, one call after the other. Then many at a time.",
    play,
)
