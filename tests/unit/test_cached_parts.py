"""The parts of `cached` that need no server: envelope, breaker, first level, pools, flights."""

from __future__ import annotations

import contextvars
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkv import L1
from pgkv._background import background as _background
from pgkv._engine.breaker import FAILURES_MAX, PAUSE_FIRST, PAUSE_MAX, Breaker
from pgkv.patterns.cache import envelope as _envelope
from pgkv.patterns.cache.envelope import (
    FORMAT_1,
    PLACEHOLDER,
    Envelope,
    is_placeholder,
    new_mark,
    read,
)
from pgkv.patterns.cache.single_flight import Flights, ThreadFlight
from tests.servers import PATIENCE, wait_until

durations = st.floats(min_value=0, allow_nan=False)
envelopes = st.builds(
    Envelope, durations, durations, durations,
    st.lists(st.integers(0, 2**62), max_size=5).map(tuple), st.binary(),
)  # fmt: skip


@given(envelopes)
def test_an_envelope_reads_back(envelope: Envelope) -> None:
    """Every field, bit for bit."""
    assert read(envelope.pack(b"j"), b"j") == envelope


@given(envelopes, st.data())
def test_a_damaged_envelope_is_nobodys(envelope: Envelope, data: st.DataObject) -> None:
    """Cut short, one bit turned (behind the mark), another codec's: None, never an exception."""
    raw = envelope.pack(b"j")
    assert read(raw, b"m") is None
    assert read(raw[: data.draw(st.integers(0, len(raw) - 1))], b"j") is None
    at = data.draw(st.integers(17 * 8, len(raw) * 8 - 1))
    turned = bytearray(raw)
    turned[at // 8] ^= 1 << at % 8
    assert read(bytes(turned), b"j") is None


@given(st.binary(max_size=60))
def test_foreign_bytes_are_nobodys(raw: bytes) -> None:
    """Whatever stands there."""
    assert read(raw, b"j") is None
    assert read(FORMAT_1 + raw, b"j") is None


def test_marks() -> None:
    """Each is new, and a placeholder is told from an entry."""
    assert len({new_mark(PLACEHOLDER) for _ in range(100)}) == 100
    assert is_placeholder(new_mark(PLACEHOLDER))
    assert not is_placeholder(Envelope(1, 1, 1, (), b"").pack(b"j"))
    assert _envelope.mark_of(new_mark(FORMAT_1) + b"x")[:1] == FORMAT_1


def test_breaker() -> None:
    """Opens after failures in a row, lets one call through per pause, doubles the pause to a limit,
    closes at the first success; a success in between starts the count anew."""
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for _ in range(FAILURES_MAX - 1):
        assert not breaker.failed()
    breaker.succeeded()
    for _ in range(FAILURES_MAX - 1):
        assert not breaker.failed()
    assert breaker.allows()
    assert breaker.failed()
    assert breaker.is_open
    assert not breaker.allows()
    pause = PAUSE_FIRST
    for _ in range(8):
        now[0] += pause - 0.001
        assert not breaker.allows()
        now[0] += 0.002
        assert [breaker.allows(), breaker.allows()] == [True, False]
        assert not breaker.failed()
        pause = min(pause * 2, PAUSE_MAX)
    now[0] += pause + 1
    assert breaker.allows()
    breaker.succeeded()
    assert [breaker.allows(), breaker.allows()] == [True, True]


def test_l1_is_bounded_and_forgets_the_least_recently_used() -> None:
    """max_entries holds; what was used last stays."""
    level = L1(max_entries=3)
    later = time.monotonic() + 60
    for n in range(3):
        level.put("s", (b"%d" % n,), b"v", later, level.epoch)
    assert level.get("s", b"0") == b"v"
    level.put("s", (b"3",), b"v", later, level.epoch)
    assert [level.get("s", b"%d" % n) for n in range(4)] == [b"v", None, b"v", b"v"]
    assert len(level) == 3


def test_l1_keeps_nothing_that_was_read_before_an_invalidation() -> None:
    """A value read before a drop and kept after it would outlive it."""
    level = L1()
    later = time.monotonic() + 60
    epoch = level.epoch
    level.drop("s", b"k")
    level.put("s", (b"k",), b"old", later, epoch)
    assert level.get("s", b"k") is None
    level.put("s", (b"k", b"gen", b"tag"), b"new", later, level.epoch)
    level.put("t", (b"k", b"gen", b"tag"), b"new", later, level.epoch)
    level.drop("s", b"tag")
    assert level.get("s", b"k") is None
    assert level.get("t", b"k") == b"new"
    level.put("s", (b"k",), b"v", time.monotonic() - 1, level.epoch)
    assert level.get("s", b"k") is None
    level.clear()
    assert len(level) == 0


def test_workers_are_bounded_and_end() -> None:
    """A few threads, a queue that refuses when it is full, an end that drops what waits; `done` is
    called for each that was accepted."""
    pool = _background.Workers()
    gate, running = threading.Event(), threading.Semaphore(0)
    ran: list[int] = []
    done: list[int] = []

    def work() -> None:
        running.release()
        gate.wait(PATIENCE)
        ran.append(1)

    accepted = sum(pool.submit(work, lambda: done.append(1)) for _ in range(1000))
    for _ in range(_background.THREADS_MAX):
        assert running.acquire(timeout=PATIENCE)
    assert accepted <= _background.THREADS_MAX + _background.QUEUE_MAX
    assert len(pool._threads) == _background.THREADS_MAX
    closing = threading.Thread(target=pool.close, args=(PATIENCE,))
    closing.start()
    wait_until(lambda: pool._closed, "it closes")
    gate.set()
    closing.join(PATIENCE)
    assert len(ran) == _background.THREADS_MAX
    assert len(done) == accepted
    assert not pool.submit(work)
    wait_until(lambda: not pool._threads, "threads end")


def test_workers_survive_what_they_run(caplog: pytest.LogCaptureFixture) -> None:
    """Not even SystemExit ends a thread; each time `done` is called, and work runs in the context
    of the code that submitted it."""
    pool = _background.Workers()
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    seen: list[int] = []
    done = threading.Semaphore(0)

    def work(fail: bool) -> None:
        seen.append(variable.get())
        if fail:
            raise SystemExit

    for n in range(_background.THREADS_MAX + 1):
        variable.set(n)
        assert pool.submit(lambda n=n: work(n < _background.THREADS_MAX), done.release)  # type: ignore[misc]  # a default of the loop's variable
    for _ in range(_background.THREADS_MAX + 1):
        assert done.acquire(timeout=PATIENCE)
    assert sorted(seen) == list(range(_background.THREADS_MAX + 1))
    assert "pgkv.background.broken error=SystemExit" in caplog.text
    pool.close()


def test_flights() -> None:
    """The first to join leads; who joins after the end leads anew."""
    flights = Flights(ThreadFlight)
    name = flights.name("store", b"k")
    flight, leads = flights.join(name)
    assert leads
    assert flights.join(name) == (flight, False)
    assert not flight.wait(0)
    flights.end(name, flight)
    assert flight.wait(0)
    assert flights.join(name)[1]


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_a_flight_that_does_not_land_is_waited_for_no_longer_than_asked(seconds: float) -> None:
    """False after that time."""
    assert not ThreadFlight().wait(seconds)
