"""Where events go, and the hook for metrics."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

import pgkv
from pgkv import _observe
from pgkv._ops.op import Op
from pgkv._sql import Statements


@pytest.fixture
def configured() -> Iterator[list[dict[str, Any]]]:
    """structlog configured by the application: the events it gets."""
    seen: list[dict[str, Any]] = []

    def keep(_logger: Any, method: str, event: Any) -> Any:
        seen.append({**event, "level": method})
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    yield seen
    structlog.reset_defaults()


def test_events_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    """Where structlog is not configured events go to the logger `pgkv`, with their context."""
    caplog.set_level(logging.DEBUG, "pgkv")
    _observe.warning("pgkv.test.event", table='"t"', attempt=2)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("pgkv", "WARNING")
    assert record.getMessage() == 'pgkv.test.event table="t" attempt=2'
    assert record.__dict__["pgkv"] == {"table": '"t"', "attempt": 2}


def test_events_go_to_structlog(
    configured: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is configured they go there, as key-value pairs, and not to logging as well."""
    _observe.info("pgkv.test.event", attempt=2)
    assert configured == [{"event": "pgkv.test.event", "attempt": 2, "level": "info"}]
    assert caplog.records == []


def test_warnings_that_an_outage_repeats_are_counted(
    configured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten in a minute are logged; the first of the next minute tells how many were not. Each event
    counts for itself, and others are logged every time."""
    now = 1000.0
    monkeypatch.setattr(_observe, "monotonic", lambda: now)
    for _ in range(25):
        _observe.warning("pgkv.session.unavailable", error="E")
        _observe.warning("pgkv.lock.lost", lock="n")
    _observe.warning("pgkv.retry", attempt=1)
    now += 61
    _observe.warning("pgkv.session.unavailable", error="E")
    now += 61
    _observe.warning("pgkv.session.unavailable", error="E")
    seen = [each for each in configured if each["event"] == "pgkv.session.unavailable"]
    assert [each.get("omitted") for each in seen] == [None] * 10 + [15, None]
    assert sum(each["event"] == "pgkv.lock.lost" for each in configured) == 25
    assert sum(each["event"] == "pgkv.retry" for each in configured) == 1


def test_levels(configured: list[dict[str, Any]]) -> None:
    """debug, info and warning are what they say."""
    for level in ("debug", "info", "warning"):
        getattr(_observe, level)("pgkv.test.event")
    assert [event["level"] for event in configured] == ["debug", "info", "warning"]


def test_levels_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    """What the application does not listen to costs no formatting and shows nowhere."""
    caplog.set_level(logging.INFO, "pgkv")

    class Loud:
        def __repr__(self) -> str:
            raise AssertionError

        __str__ = __repr__

    _observe.debug("pgkv.test.event", loud=Loud())
    assert caplog.records == []


SCRIPT = """
import pgkv
from pgkv import _observe
_observe.debug("pgkv.test.debug")
_observe.info("pgkv.test.info")
_observe.warning("pgkv.test.warning", attempt=1)
"""


def test_an_application_that_set_up_nothing() -> None:
    """Without any set-up warnings go to stderr, the rest nowhere, and nothing to stdout."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr == "pgkv.test.warning attempt=1\n"


def test_importing_configures_nothing() -> None:
    """Importing pgkv leaves structlog and logging as they were, and prints nothing."""
    script = (
        "import logging, structlog, pgkv;"
        "assert not structlog.is_configured();"
        "assert not logging.getLogger('pgkv').handlers;"
        "assert logging.getLogger('pgkv').level == 0 and not logging.getLogger().handlers"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


# -- the hook --------------------------------------------------------------------------------


def test_hooks_are_told_and_taken_away() -> None:
    """A hook gets name, seconds, outcome and retries, until it is taken away; twice is harmless."""
    seen: list[tuple[object, ...]] = []
    remove = pgkv.on_operation(lambda *told: seen.append(told))
    op: Op[object] = Op(Statements(pgkv.Config("postgresql:///app")).get("k").statement, (b"k",))
    op.retries = 2
    _observe.notify(op, 0.0)
    remove()
    remove()
    _observe.notify(op, 0.0)
    ((name, seconds, outcome, retries),) = seen
    assert (name, outcome, retries) == ("get", "ok", 2)
    assert isinstance(seconds, float)


def test_a_failing_hook_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A hook's exception is logged by its class and goes no further; other hooks are told."""
    seen: list[str] = []
    removes = [
        pgkv.on_operation(lambda *_: 1 / 0),
        pgkv.on_operation(lambda name, *_: seen.append(name)),
    ]
    _observe.notify(Statements(pgkv.Config("postgresql:///app")).get("k"), 0.0)
    for remove in removes:
        remove()
    assert seen == ["get"]
    assert "pgkv.hook.failed error=ZeroDivisionError" in caplog.text


def test_a_failed_operation_is_told() -> None:
    """An operation that fails is told with the class of its error."""
    seen: list[tuple[str, str]] = []
    remove = pgkv.on_operation(lambda name, _s, outcome, _r: seen.append((name, outcome)))
    store = pgkv.Store(
        pgkv.Config("postgresql://nobody@127.0.0.1:1/nowhere", connect_timeout=1, retry=None)
    )
    try:
        with pytest.raises(pgkv.StoreUnavailableError):
            store.get("k")
    finally:
        remove()
        store.close()
    assert seen == [("get", "StoreUnavailableError")]


# -- events ----------------------------------------------------------------------------------


def test_an_event_is_worked_out_when_it_is_read() -> None:
    """What an event says of one key, of many, of a scan and of a failure; never a key or a value."""
    sql = Statements(pgkv.Config("postgresql:///app", table_name="cache"))
    few, many = sql.get_many(["a", "b", "c"]), sql.get_many([f"secret{n}" for n in range(100)])
    assert few is not None
    assert many is not None
    _, (written, *_) = sql.set_many({f"secret{n}": b"v" for n in range(50)})
    error = pgkv.StoreUnavailableError("gone")
    error._sqlstate = "57P01"
    told: list[tuple[object, ...]] = []

    def read(event: pgkv.OperationEvent) -> None:
        told.append(
            (event.name, event.batch_size, event.hits, event.misses, event.outcome, event.sqlstate)
        )
        assert event.table == "cache"
        assert event.retries == 0
        assert "secret" not in repr(event)

    remove = pgkv.on_event(read)
    for op, answer, failure in (
        (sql.get("secret"), b"value", None),
        (sql.get("secret"), None, None),
        (sql.exists("secret"), False, None),
        (few, {"a": b"1"}, None),
        (many, {}, None),
        (written, None, None),
        (sql.delete("secret", None), True, None),
        (sql.count("secret", False), 7, None),
        (sql.get("secret"), None, error),
    ):
        _observe.notify(op, 0.0, answer, failure)
    remove()
    assert told == [
        ("get", 1, 1, 0, "ok", None),
        ("get", 1, 0, 1, "ok", None),
        ("exists", 1, 0, 1, "ok", None),
        ("get_many", 3, 1, 2, "ok", None),
        ("get_many", 100, 0, 100, "ok", None),
        ("set_many", 50, None, None, "ok", None),
        ("delete", 1, None, None, "ok", None),
        ("count", None, None, None, "ok", None),
        ("get", 1, None, None, "StoreUnavailableError", "57P01"),
    ]


def test_changes_of_state_are_told_by_kind() -> None:
    """A listener of a kind hears what is logged at info and above; of other kinds, and of what is
    logged for debugging, which may hold keys, nothing."""
    heard: list[tuple[str, str, object]] = []

    def hear(event: pgkv.StateEvent) -> None:
        heard.append((event.kind, event.name, dict(event.fields)))

    remove = pgkv.on_event(hear, kinds=["lock"])
    _observe.warning("pgkv.lock.lost", lock="billing")
    _observe.info("pgkv.limit.counts", limiter="api")
    _observe.debug("pgkv.lock.debugged", key="secret")
    remove()
    _observe.warning("pgkv.lock.lost", lock="billing")
    assert heard == [("lock", "pgkv.lock.lost", {"lock": "billing"})]


def test_a_listener_that_fails_does_not_hear_of_itself_for_ever() -> None:
    heard: list[str] = []

    def fail(event: pgkv.StateEvent) -> None:
        heard.append(event.name)
        raise ValueError

    remove = pgkv.on_event(fail, kinds=["hook", "lock"])
    _observe.warning("pgkv.lock.lost", lock="billing")
    remove()
    assert heard == ["pgkv.lock.lost"]


def test_what_is_too_frequent_for_the_log_is_told_to_listeners_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And a listener may take itself away while it is told."""
    caplog.set_level(logging.DEBUG, "pgkv")
    heard: list[str] = []

    def hear(event: pgkv.StateEvent) -> None:
        heard.append(event.name)
        remove()

    remove = pgkv.on_event(hear, kinds=["pool"])
    also = pgkv.on_event(lambda event: heard.append(event.kind), kinds=["pool"])
    _observe.event("pgkv.pool.opened", seconds=0.1)
    _observe.event("pgkv.pool.opened", seconds=0.1)
    also()
    _observe.event("pgkv.pool.opened", seconds=0.1)
    assert heard == ["pgkv.pool.opened", "pool", "pool"]
    assert caplog.records == []


def test_a_wrong_hook_is_refused() -> None:
    with pytest.raises(pgkv.ConfigError, match=r"on_event\(\) takes a function"):
        pgkv.on_event(None)  # type: ignore[arg-type]
    with pytest.raises(pgkv.ConfigError, match="list of names"):
        pgkv.on_event(print, kinds="lock")
