"""What a signal handler may enter while the interrupted thread is inside: it neither waits for a
lock that this thread holds, nor breaks what the thread goes on with.

A handler runs between two bytecodes. Here it runs between every two, by a trace function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from pgkv import Config, Decision, Rate
from pgkv._engine._sync.connection import PgConnection
from pgkv._engine._sync.pool import StorePool
from pgkv._engine.breaker import Breaker
from pgkv._engine.sweep import Collector
from pgkv.patterns.cache.call import Counts
from pgkv.patterns.cache.l1 import L1
from pgkv.patterns.cache.single_flight import Flights, ThreadFlight
from pgkv.patterns.rate_limit import local
from pgkv.patterns.rate_limit.policy import Policy

POLICY: Policy = object()  # type: ignore[assignment]  # only compared here
Work = Callable[[], object]


def interrupted(work: Work, handler: Work, module: str) -> int:
    """Run `work`, and `handler` before each bytecode of that module's code; how often it ran."""
    ran = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal ran
        if frame.f_globals["__name__"] != module:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            ran += 1
            handler()
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return ran


def of_l1() -> tuple[list[Work], str]:
    level = L1(3, ttl=60)

    def put() -> None:
        level.put("s", (b"k", b"tag"), b"v", 1e12, level.epoch)

    def put_others() -> None:
        for key in (b"a", b"b", b"c"):
            level.put("s", (key,), b"v", 1e12, level.epoch)

    return [
        put, put_others, lambda: level.get("s", b"k"), lambda: level.drop("s", b"k"),
        lambda: level.drop("s", b"tag"), level.clear,
    ], L1.__module__  # fmt: skip


def of_breaker() -> tuple[list[Work], str]:
    breaker = Breaker(clock=lambda: 0.0)
    return [breaker.failed, breaker.succeeded, breaker.allows], Breaker.__module__


def of_flights() -> tuple[list[Work], str]:
    flights = Flights(ThreadFlight)

    def fly() -> None:
        flight, leads = flights.join("k")
        if leads:
            flights.end("k", flight)

    return [fly], Flights.__module__


def of_counts() -> tuple[list[Work], str]:
    counts = Counts()
    return [lambda: counts.add("hits")], Counts.__module__


def of_collector() -> tuple[list[Work], str]:
    collector = Collector.__new__(Collector)
    Collector.__init__(collector, None, lambda flow, done: flow.close())  # type: ignore[arg-type]  # asks no server here
    return [lambda: collector.collect([b"k"])], Collector.__module__


def decision() -> Decision:
    return Decision(True, 10, 5, 1.0, 60.0, Rate(10))


def of_counter() -> tuple[list[Work], str]:
    counter = local.Counter()
    return [lambda: counter.add(decision()), counter.snapshot], local.__name__


def of_deny_cache() -> tuple[list[Work], str]:
    denied, policy = local.DenyCache(clock=lambda: 0.0), POLICY
    return [
        lambda: denied.remember(b"k", policy, 1, 0.0, decision()),
        lambda: denied.find(b"k", policy, 1),
        lambda: denied.forget(b"k"),
    ], local.__name__


@pytest.mark.parametrize(
    "make", [of_l1, of_breaker, of_flights, of_counts, of_collector, of_counter, of_deny_cache]
)
def test_any_call_may_be_interrupted_by_any_other(
    make: Callable[[], tuple[list[Work], str]],
) -> None:
    """Each pair of calls, one inside the other at every bytecode: none hangs and none raises."""
    for first in range(len(make()[0])):
        for second in range(len(make()[0])):
            calls, module = make()
            calls[0]()
            assert interrupted(calls[first], calls[second], module) > 0


def test_a_store_has_no_more_connections_than_it_may() -> None:
    """A handler that takes the place for a connection, at any bytecode of a call that takes one:
    neither waits, and together they have no more places than there are."""
    for size in (1, 2):
        pool = StorePool(Config("postgresql://", pool_max_size=size, pool_min_size=0), str)
        taken: list[object] = []

        def take(pool: StorePool = pool, taken: list[object] = taken) -> None:
            taken.append(pool._new_place("test"))

        assert interrupted(take, take, StorePool.__module__) > 0
        assert len([place for place in taken if place is not None]) == size


def test_prepaid_tokens_are_spent_once() -> None:
    """A handler that spends from the same row never gets a token that the interrupted call got."""
    for tokens in (1, 2, 5):
        prepaid, policy = local.PrepaidTokens(clock=lambda: 0.0), POLICY
        spent: list[object] = []

        def spend(
            prepaid: local.PrepaidTokens = prepaid,
            policy: Policy = policy,
            spent: list[object] = spent,
        ) -> None:
            if prepaid.spend(b"k", policy, 1) is not None:
                spent.append(1)

        prepaid.fill(b"k", policy, tokens, 0.0, decision())
        assert interrupted(spend, spend, local.__name__) > 0
        while prepaid.spend(b"k", policy, 1) is not None:
            spent.append(1)
        assert len(spent) == tokens


def test_a_connection_whose_making_was_interrupted_is_dropped_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    del_me = PgConnection.__new__(PgConnection)  # an interrupt before the first line of __init__
    del del_me
    assert failures == []
