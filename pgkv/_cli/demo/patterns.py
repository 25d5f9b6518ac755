"""Scenes about what is built on the store: cached functions, rate limits, sessions."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier
from time import monotonic

from ...errors import SessionGoneError
from ...patterns.cache.decorator import cached
from ...patterns.rate_limit.api import RateLimiter
from ...patterns.rate_limit.policy import Decision
from ...patterns.session.api import SessionStore
from ...patterns.session.data import Session
from ...store import Store
from .. import console
from . import dataset
from .stage import Check, Orders, Stage, scene

PROCESSES, THREADS = 4, 16
CALLERS = PROCESSES * THREADS
TIMEOUT = 60.0  # seconds of one call: no result depends on a busy machine

# -- a cached function ---------------------------------------------------------------------

LIBRARY = ("asyncio", "email", "multiprocessing")  # whose words are counted: some 50 ms of work
COMPUTED = "demo:computed"


@scene(
    "Stampede",
    f"{PROCESSES} processes of {THREADS} threads need the same new result at the same moment. "
    "One of them should compute it.",
)
def stampede(stage: Stage) -> Iterator[str | Check]:
    seconds, computed, results = [], [], []
    share = min(1.0, stage.size.seconds / 3)
    with stage.workers(call, PROCESSES, share=share) as workers, stage.bar("calling", 2) as advance:
        for how in ("uncached", "cached"):
            before = stage.store.increment(COMPUTED, 0)
            started = monotonic()
            workers.tell(how)
            answers = workers.answer_of_each()
            seconds.append(monotonic() - started)
            computed.append(stage.store.increment(COMPUTED, 0) - before)
            results.append([each for answer in answers for each in answer])
            advance(1)
    alike = sum(result == results[0][0] for result in results[1])
    times = ["once" if number == 1 else f"{number} times" for number in computed]
    for what, often, took in zip(("no cache", "@pgkv.cached"), times, seconds, strict=True):
        yield f"with {what}: computed {often}, all have the result after {console.duration(took)}"
    yield Check(f"{CALLERS} cold calls computed it {times[1]}", computed[1] == 1)
    text = f"{alike} of {CALLERS} callers got the right result"
    yield Check(text, alike == len(results[1]) == CALLERS)


def call(store: Store, orders: Orders, *, share: float) -> None:
    """In a worker: call the function from all threads at once, as each order says."""
    text = "".join(text for folder in LIBRARY for _, text in dataset.source_files(folder))
    text = text[: round(len(text) * share)]

    @cached(ttl=60, store=store, store_timeout=TIMEOUT, max_wait=TIMEOUT, on_error="raise")
    def most_used() -> str:
        store.increment(COMPUTED)
        words = Counter(re.findall(r"[^\W\d_]{5,}", text))
        return " ".join(f"{word} {count}" for word, count in words.most_common(10))

    gate = Barrier(THREADS)

    def call_at_once(how: str) -> str:
        gate.wait(TIMEOUT)
        return most_used() if how == "cached" else most_used.__wrapped__()

    with ThreadPoolExecutor(THREADS) as threads:
        while (how := orders.next()) is not None:
            orders.answer(list(threads.map(call_at_once, [how] * THREADS)))


# -- a rate limit --------------------------------------------------------------------------
#
# The right number is known exactly. The first hit empties a full bucket, the last one finds less than
# one token in it, and between them the rate gives `flow` tokens by the server's clock: admitted are
# ``floor(burst + flow)``. The clock is read right before and after both hits, so `flow` is known but
# for a fraction of a token.

COUNT, BURST = 100, 3000  # per second, and at once: half a minute without any hit fills the bucket
KEY = "one for all"


def limiter_of(store: Store) -> RateLimiter:
    return RateLimiter(store, f"{COUNT}/s burst {BURST}", name="demo", timeout=TIMEOUT)


@scene(
    "Rate limit",
    f"{PROCESSES} processes share one key. One token too many breaks the limit, one too few turns a "
    "customer away.",
)
def rate_limit(stage: Stage) -> Iterator[str | Check]:
    limiter = limiter_of(stage.store)

    def timed_hit(cost: int = 1) -> tuple[Decision, datetime, datetime]:
        before = stage.store.now()
        return limiter.hit(KEY, cost=cost), before, stage.store.now()

    with stage.workers(hammer, PROCESSES) as workers:
        decision, *opened = timed_hit(BURST)
        own = BURST if decision else 0
        workers.tell("go")
        stage.wait("hammering", stage.size.seconds * 2 / 3)
        workers.tell(None)
        answers: list[int] = []
        while len(answers) < PROCESSES:  # the demo takes what flows in meanwhile
            while limiter.hit(KEY):
                own += 1
            with contextlib.suppress(TimeoutError):
                answers.append(workers.answer(0.01)[1])
        decision, *closed = timed_hit()
        while decision:
            own += 1
            decision, *closed = timed_hit()
    shortest, longest = closed[0] - opened[1], closed[1] - opened[0]
    least, most = (BURST + COUNT * time // timedelta(seconds=1) for time in (shortest, longest))
    admitted = sum(answers) + own
    shares = ", ".join(map(str, answers))
    yield f"admitted for the {PROCESSES} processes: {shares}, and {own} for the demo itself"
    due = str(least) if least == most else f"{least} to {most}"
    text = f"{admitted} admitted in {longest.total_seconds():.3f} s by the server's clock"
    text = f"{text}: a burst of {BURST} and {COUNT} a second allow {due}"
    yield Check(text, least <= admitted <= most)


def hammer(store: Store, orders: Orders) -> None:
    """In a worker: hit until told to end; answer how many were admitted."""
    limiter = limiter_of(store)
    admitted = 0
    orders.next()
    while not orders.ended:
        admitted += limiter.hit(KEY).allowed
        orders.one_waits()
    orders.answer(admitted)


# -- sessions ------------------------------------------------------------------------------

VISITORS = 100
GRACE = 1.0  # seconds in which an old token still reads


@scene(
    "Sessions",
    "A login gives a session a new token. The cart must survive it, and the old token must not help "
    "a thief.",
)
def visitors(stage: Stage) -> Iterator[str | Check]:
    sessions = SessionStore(stage.store)
    sessions.create_table()

    def load(tokens: Iterable[str]) -> list[Session]:
        return [found for token in tokens if (found := sessions.load(token)) is not None]

    def is_refused(session: Session) -> bool:
        session.data["late"] = True
        try:
            sessions.save(session)
        except SessionGoneError:
            return True
        return False

    carts = {f"user:{number}": {"cart": [number, number + 1]} for number in range(VISITORS)}
    # A thief may know these: the tokens that the visitors had before they logged in.
    old = [sessions.create(cart).id for cart in carts.values()]
    rotated = monotonic()
    current = load(old)
    for session, user in zip(current, carts, strict=True):
        sessions.rotate(session, user_id=user, grace=GRACE)
    kept = {each.user_id: each.data for each in load(session.id for session in current)}
    survived = sum(kept.get(user) == cart for user, cart in carts.items())
    late = load(old)
    as_before = [each.data for each in late if each.user_id is None] == list(carts.values())
    refused = sum(map(is_refused, late))
    in_time = monotonic() - rotated < GRACE
    stage.wait("waiting for the old tokens to end", GRACE, lambda: not load(old[-1:]))
    dead = VISITORS - len(load(old))
    ended = sum(map(sessions.destroy_user, carts))
    late_saves = sum(map(is_refused, current))
    alive = len(load(session.id for session in current))
    text = (
        f"{survived} of {VISITORS} sessions kept their data, under a new token and with their user"
    )
    yield Check(text, survived == VISITORS)
    if in_time:
        text = f"for {GRACE:g} s the old tokens read the data of before the login, without the user"
        text = f"{text}, and {refused} of {VISITORS} writes with them were refused"
        yield Check(text, as_before and refused == VISITORS)
    yield Check(f"after that {dead} of {VISITORS} old tokens are refused", dead == VISITORS)
    text = f"destroy_user ended {ended} of {VISITORS} sessions for good"
    text = f"{text}: {late_saves} of {VISITORS} late saves were refused"
    yield Check(text, (ended, alive, late_saves) == (VISITORS, 0, VISITORS))
