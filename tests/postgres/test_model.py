"""The store against a dict: random sequences of every operation, with a clock that moves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import pgkv
from pgkv import ScanOptions
from pgkv.errors import InvalidValueError
from pgkv.testing import ServerClock
from tests import FULL

# Neighbours of each other in every way: prefixes, successors, seams of UTF-8, wildcards.
KEYS = [
    "a", "a%", "aa", "aé", "a\U0010ffff", "a\U0010ffffz", "b", "B", "b_", "é", "\ud7ff", "\ue000",
    "\U0001f40e", "\U0010ffff", "\U0010ffff\U0010ffff",
]  # fmt: skip
keys = st.sampled_from(KEYS)
bounds = st.sampled_from(["", *KEYS, "A", "ab", "z", "\U00010000"])
values = st.sampled_from([b"", b"1", b"41", b"-7", b"007", b"x", b"\0\xff", b"9223372036854775807"])
# Far longer than an example takes.
TTLS = [5_000, 60_000]
ttls = st.none() | st.sampled_from(TTLS)
deltas = st.sampled_from([0, 1, -1, 40, 2**63 - 1, -(2**63)])
many = st.lists(keys, max_size=12)


class Model:
    """What the store should be: a dict of value and the time at which it ends."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[bytes, float]] = {}
        self.now = 0.0

    def live(self) -> dict[str, bytes]:
        return {key: value for key, (value, ends) in self.rows.items() if ends > self.now}

    def get(self, key: str) -> bytes | None:
        return self.live().get(key)

    def put(self, key: str, value: bytes, ttl: float | None, *, keep: bool = False) -> None:
        ends = math.inf if ttl is None else self.now + ttl
        if keep and ttl is None and key in self.live():
            ends = self.rows[key][1]
        self.rows[key] = (value, ends)

    def add(self, key: str, delta: int, ttl: float | None) -> int | None:
        old = self.get(key)
        if old is not None and not (old.lstrip(b"-").isdigit() and old.count(b"-") <= 1):
            return None
        total = int(old or b"0") + delta
        if not -(2**63) <= total < 2**63:
            return None
        if old is None:
            self.put(key, b"%d" % total, ttl)
        else:
            self.put(key, b"%d" % total, None, keep=True)
        return total

    def select(self, options: ScanOptions) -> list[str]:
        chosen = [
            key
            for key in sorted(self.live(), key=str.encode)
            if key.startswith(options.prefix)
            and (options.start is None or key.encode() >= options.start.encode())
            and (options.end is None or key.encode() < options.end.encode())
            and (options.after is None or key.encode() > options.after.encode())
        ]
        stop = None if options.limit is None else options.offset + options.limit
        return chosen[options.offset : stop]


def machine(
    new_store: Callable[[], Coroutine[Any, Any, Any]],
    clock: ServerClock,
    run: Callable[[Any], Any],
) -> type[RuleBasedStateMachine]:
    """The state machine over that store; each example has a namespace of its own."""
    base = run(new_store())
    count = iter(range(10**9))

    class StoreMachine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            async def view() -> Any:
                return base.namespace(f"{next(count)}:")

            self.store = run(view())
            self.model = Model()

        def call(self, name: str, *args: Any, **options: Any) -> Any:
            async def perform() -> Any:
                return await getattr(self.store, name)(*args, **options)

            return run(perform())

        @rule(seconds=st.sampled_from([1_000, 30_000, 100_000]))
        def time_passes(self, seconds: int) -> None:
            clock.advance(seconds)
            self.model.now += seconds

        @rule(key=keys, value=values, ttl=ttls, keep=st.booleans())
        def set(self, key: str, value: bytes, ttl: int | None, keep: bool) -> None:
            keep = keep and ttl is None
            assert self.call("set", key, value, ttl=ttl, keep_ttl=keep) > 0
            self.model.put(key, value, ttl, keep=keep)

        @rule(key=keys, value=values, ttl=ttls, match=st.booleans())
        def set_if_version(self, key: str, value: bytes, ttl: int | None, match: bool) -> None:
            entry = self.call("get_entry", key)
            assert (entry and entry.value) == self.model.get(key)
            version = (entry.version if entry else 0) + (0 if match else 1)
            done = self.call("set", key, value, ttl=ttl, if_version=version)
            assert (done is not None) == match
            if match:
                self.model.put(key, value, ttl)

        @rule(key=keys, value=values, ttl=ttls)
        def set_nx(self, key: str, value: bytes, ttl: int | None) -> None:
            absent = self.model.get(key) is None
            assert self.call("set_nx", key, value, ttl=ttl) == absent
            if absent:
                self.model.put(key, value, ttl)

        @rule(key=keys, value=values, ttl=ttls)
        def set_xx(self, key: str, value: bytes, ttl: int | None) -> None:
            there = self.model.get(key) is not None
            assert self.call("set_xx", key, value, ttl=ttl) == there
            if there:
                self.model.put(key, value, ttl)

        @rule(key=keys, value=values, ttl=ttls)
        def get_and_set(self, key: str, value: bytes, ttl: int | None) -> None:
            assert self.call("get_and_set", key, value, ttl=ttl) == self.model.get(key)
            self.model.put(key, value, ttl)

        @rule(key=keys)
        def delete(self, key: str) -> None:
            assert self.call("delete", key) == (self.model.get(key) is not None)
            self.model.rows.pop(key, None)

        @rule(key=keys)
        def get_and_delete(self, key: str) -> None:
            assert self.call("get_and_delete", key) == self.model.get(key)
            self.model.rows.pop(key, None)

        @rule(key=keys, expected=st.none() | values, new=values, ttl=ttls, hit=st.booleans())
        def compare_and_swap(
            self, key: str, expected: bytes | None, new: bytes, ttl: int | None, hit: bool
        ) -> None:
            current = self.model.get(key)
            expected = current if hit else expected
            result = self.call("compare_and_swap", key, expected, new, ttl=ttl)
            if expected == current:
                assert (result.is_success, result.current) == (True, new)
                self.model.put(key, new, ttl, keep=current is not None)
            else:
                assert result.is_not_found == (current is None)
                assert result.is_mismatch == (current is not None)
                assert result.current == current

        @rule(key=keys, expected=values, hit=st.booleans())
        def compare_and_delete(self, key: str, expected: bytes, hit: bool) -> None:
            current = self.model.get(key)
            expected = current if hit and current is not None else expected
            done = self.call("compare_and_delete", key, expected)
            assert done == (current == expected)
            if done:
                self.model.rows.pop(key)

        @rule(key=keys, ttl=ttls)
        def update(self, key: str, ttl: int | None) -> None:
            current = self.model.get(key)
            new = b"none" if current is None else current[:4] + b"!"

            def fn(old: bytes | None) -> bytes:
                assert old == current
                return new

            assert self.call("update", key, fn, ttl=ttl) == new
            self.model.put(key, new, ttl, keep=current is not None)

        @rule(key=keys, delta=deltas, ttl=ttls)
        def increment(self, key: str, delta: int, ttl: int | None) -> None:
            total = self.model.add(key, delta, ttl)
            if total is None:
                with pytest.raises(InvalidValueError):
                    self.call("increment", key, delta, ttl=ttl)
            else:
                assert self.call("increment", key, delta, ttl=ttl) == total

        @rule(chosen=st.dictionaries(keys, deltas, max_size=6), ttl=ttls)
        def increment_many(self, chosen: dict[str, int], ttl: int | None) -> None:
            before = dict(self.model.rows)
            totals = {key: self.model.add(key, delta, ttl) for key, delta in chosen.items()}
            if None in totals.values():
                self.model.rows = before
                with pytest.raises(InvalidValueError):
                    self.call("increment_many", chosen, ttl=ttl)
            else:
                assert self.call("increment_many", chosen, ttl=ttl) == totals

        @rule(pairs=st.lists(st.tuples(keys, values), max_size=12), ttl=ttls)
        def set_many(self, pairs: list[tuple[str, bytes]], ttl: int | None) -> None:
            assert self.call("set_many", pairs, ttl=ttl) == len(dict(pairs))
            for key, value in pairs:
                self.model.put(key, value, ttl)

        @rule(chosen=many)
        def get_many(self, chosen: list[str]) -> None:
            live = self.model.live()
            wanted = {key: live[key] for key in chosen if key in live}
            assert self.call("get_many", chosen) == wanted
            assert self.call("exists_many", chosen) == wanted.keys()

        @rule(chosen=many)
        def delete_many(self, chosen: list[str]) -> None:
            live = self.model.live().keys() & {*chosen}
            assert self.call("delete_many", chosen) == len(live)
            for key in live:
                del self.model.rows[key]

        @rule(chosen=many, ttl=st.sampled_from(TTLS))
        def expire_many(self, chosen: list[str], ttl: int) -> None:
            live = self.model.live().keys() & {*chosen}
            assert self.call("expire_many", chosen, ttl) == len(live)
            for key in live:
                self.model.put(key, self.model.rows[key][0], ttl)

        @rule(key=keys, ttl=ttls, touch=st.booleans())
        def expire_or_persist(self, key: str, ttl: int | None, touch: bool) -> None:
            current = self.model.get(key)
            if ttl is None:
                assert self.call("persist", key) == (current is not None)
            elif touch:
                assert self.call("get_and_touch", key, ttl) == current
            else:
                assert self.call("expire", key, ttl) == (current is not None)
            if current is not None:
                self.model.put(key, current, ttl)

        @rule(key=keys)
        def read_one(self, key: str) -> None:
            value = self.model.get(key)
            assert self.call("get", key) == value
            assert self.call("exists", key) == (value is not None)
            left = self.call("ttl", key)
            if value is None:
                assert left is None
            else:
                wanted = self.model.rows[key][1] - self.model.now
                assert left == wanted or wanted - 900 < left <= wanted

        @rule(
            prefix=bounds,
            start=st.none() | bounds,
            end=st.none() | bounds,
            after=st.none() | bounds,
            limit=st.none() | st.integers(0, 5),
            offset=st.integers(0, 3),
        )
        def scan(self, **selection: Any) -> None:
            options = ScanOptions(**selection)
            wanted = self.model.select(options)
            assert self.call("keys", options) == wanted
            assert self.call("scan", options) == [(key, self.model.get(key)) for key in wanted]

        @rule(prefix=bounds, page=st.integers(1, 4))
        def iterate(self, prefix: str, page: int) -> None:
            async def collect() -> list[str]:
                return [key async for key in self.store.iter_keys(prefix, page_size=page)]

            wanted = self.model.select(ScanOptions(prefix=prefix))
            assert run(collect()) == wanted
            assert self.call("count", prefix) == len(wanted)

        @rule(prefix=bounds.filter(bool))
        def delete_prefix(self, prefix: str) -> None:
            gone = self.model.select(ScanOptions(prefix=prefix))
            assert self.call("delete_prefix", prefix) == len(gone)
            self.model.rows = {k: v for k, v in self.model.rows.items() if not k.startswith(prefix)}

        @rule()
        def clean_up(self) -> None:
            self.call("cleanup_expired")

        @rule()
        def clear(self) -> None:
            assert self.call("clear") == len(self.model.live())
            self.model.rows.clear()

        @invariant()
        def everything_is_as_in_the_model(self) -> None:
            if hasattr(self, "store"):
                assert dict(self.call("scan")) == self.model.live()

    return StoreMachine


@pytest.mark.parametrize(
    "strategy", [pgkv.TtlCleanupStrategy.ON_READ, pgkv.TtlCleanupStrategy.MANUAL]
)
def test_store_behaves_like_a_dict(
    make_store: Any, clock: ServerClock, event_loop_runner: asyncio.Runner, strategy: Any
) -> None:
    """Whatever is done in whatever order, the store holds what a dict with expiry would."""
    kind = machine(lambda: make_store(ttl_cleanup_strategy=strategy), clock, event_loop_runner.run)
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=60 if FULL else 12,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
