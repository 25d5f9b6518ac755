"""Scene: several processes hammer one key of a rate limiter.

What must come out is known exactly. From the first hit, which finds the bucket full, to a refusal,
which finds less than one token in it, ``burst + flow`` tokens were to be had, `flow` being what the
rate gives in that time by the server's clock, and all but less than one were handed out: admitted
are ``floor(burst + flow)``. The clock is read right before and right after both hits, so that time
is known but for a millisecond or so, and `flow` but for a fraction of a token.
"""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta

from ...patterns.rate_limit.api import Decision, RateLimiter
from ...store import Store
from .stage import Check, Report, Scene, Stage
from .workers import Orders, answer

PROCESSES = 4
COUNT, BURST = 100, 200  # per second, and at once: two seconds without any hit fill the bucket
KEY = "one for all"
SECOND = timedelta(seconds=1)
TIMEOUT = 60.0  # seconds for one hit: the count must not depend on a busy machine


def limiter_of(store: Store) -> RateLimiter:
    """Return the limiter that all processes share, by its name."""
    return RateLimiter(store, f"{COUNT}/s burst {BURST}", name="demo", timeout=TIMEOUT)


def play(stage: Stage) -> Report:
    """Let them hammer for a while; count what was admitted, and what should have been."""
    limiter = limiter_of(stage.store)
    with stage.workers("limiting", PROCESSES) as workers:
        decision, *opened = _timed_hit(stage, limiter)
        own = int(decision.allowed)
        workers.tell("go")
        stage.wait("hammering", stage.size.seconds * 2 / 3)
        workers.stop()
        answers: list[int] = []
        while len(answers) < PROCESSES:  # the demo takes what flows in meanwhile
            while limiter.hit(KEY):
                own += 1
            with contextlib.suppress(TimeoutError):
                answers.append(workers.answer(0.01)[1])
        decision, *closed = _timed_hit(stage, limiter)
        while decision:
            own += 1
            decision, *closed = _timed_hit(stage, limiter)
    shortest, longest = closed[0] - opened[1], closed[1] - opened[0]
    least, most = (BURST + COUNT * time // SECOND for time in (shortest, longest))
    admitted = sum(answers) + own
    return Report(
        [
            f"admitted to the {PROCESSES} processes: {', '.join(map(str, answers))}, and {own} to "
            "the demo itself"
        ],
        [
            Check(
                f"{admitted} admitted in {longest.total_seconds():.3f} s of the server's clock: "
                f"{BURST} at once and {COUNT} a second make {_span(least, most)}",
                least <= admitted <= most,
            )
        ],
    )


def _timed_hit(stage: Stage, limiter: RateLimiter) -> tuple[Decision, datetime, datetime]:
    before = stage.clock()
    decision = limiter.hit(KEY)
    return decision, before, stage.clock()


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def work(store: Store, orders: Orders) -> None:
    """Hit until told to end; answer how many were admitted."""
    limiter = limiter_of(store)
    admitted = 0
    orders.next()
    while not orders.ended:
        admitted += limiter.hit(KEY).allowed
    answer(admitted)


SCENE = Scene(
    "Rate limit",
    f"{PROCESSES} processes hammer one key. One token too many is a limit broken, one too few is a "
    "customer turned away.",
    play,
)
