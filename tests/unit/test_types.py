"""The values a store returns: what they say of themselves, without a server."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import pgkv
from pgkv import CasResult, CasStatus, Entry, KeyValue, ScanOptions

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def entry(seconds: float | None, **changes: Any) -> Entry:
    ends = None if seconds is None else NOW + timedelta(seconds=seconds)
    return Entry("k", b"v", 1, ends, NOW, NOW, NOW, **changes)


def test_entry_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """ttl() is what was left when the entry was read, less the time since, never below 0."""
    ticks = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: ticks[0])
    read = entry(60, _read_clock=100.0)
    assert (read.ttl(), read.is_expired()) == (60.0, False)
    ticks[0] = 159.5
    assert (read.ttl(), read.is_expired()) == (0.5, False)
    ticks[0] = 1000.0
    assert (read.ttl(), read.is_expired()) == (0.0, True)


def test_entry_without_expiry() -> None:
    """An entry that never expires has an infinite ttl."""
    assert entry(None).ttl() == math.inf
    assert not entry(None).is_expired()


def test_entry_goes_by_the_servers_clock() -> None:
    """The client's wall clock, decades off here, plays no part."""
    assert 0 < entry(60).ttl() <= 60


@pytest.mark.parametrize("value", [entry(1), CasResult(CasStatus.SUCCESS, b"", 1), ScanOptions()])
def test_values_are_frozen(value: Any) -> None:
    """What a store returns cannot be changed."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)


def test_entries_compare_by_content() -> None:
    """Two reads of the same row are equal, whenever they were made."""
    assert entry(60, _read_clock=1.0) == entry(60, _read_clock=2.0)


def test_cas_result() -> None:
    """A result is true exactly when it succeeded, and has one of three natures."""
    for status in CasStatus:
        result = CasResult(status, None, None)
        assert bool(result) == (status is CasStatus.SUCCESS) == result.is_success
        assert result.is_mismatch == (status is CasStatus.MISMATCH)
        assert result.is_not_found == (status is CasStatus.NOT_FOUND)


def test_key_value() -> None:
    """A KeyValue is a pair."""
    key, value = KeyValue("k", b"v")
    assert (key, value) == ("k", b"v")


def test_scan_options_by_keyword() -> None:
    """ScanOptions takes keywords only: limit and offset cannot be mixed up."""
    with pytest.raises(TypeError):
        ScanOptions("a")  # type: ignore[call-arg]  # that is the test


def test_a_lazy_store() -> None:
    """A store made of a Config does nothing until it is used: it can be made at import."""
    store = pgkv.Store(pgkv.Config("postgresql://nobody@127.0.0.1:1/nowhere"))
    assert repr(store) == "<Store 'kv_store' at 127.0.0.1:1/nowhere>"
    assert bool(store)
    with pytest.raises(TypeError):
        len(store)  # type: ignore[arg-type]  # that is the test
    store.close()
    store.close()
