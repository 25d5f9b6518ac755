"""`pgkv limits` and `pgkv sessions` against a real server."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import pgkv
from pgkv.cli import main


def documents(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """What a command that has to succeed prints with --json."""
    assert main([*arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("namespace", [None, "app:"])
def test_limits_are_listed_and_reset(
    namespace: str | None, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Limiters with their buckets, the buckets of one key alone, and a reset of these; whatever
    characters names and keys are made of, and however long a key is."""
    common = ["limits", "--dsn", dsn, *(["--namespace", namespace] if namespace else [])]
    with pgkv.Store.connect(dsn) as whole:
        store = whole if namespace is None else whole.namespace(namespace)
        store.set("user:1", b"x")
        assert documents(capsys, *common) == []
        odd = pgkv.RateLimiter(store, "5/h", name="a:b~c#d%e", timeout=20)
        both = pgkv.RateLimiter(store, "5/h; 50/d", name="login", timeout=20)
        long = "k" * 300
        for key in ("user:1", "x:user:1", "#:user:1", long):
            odd.hit(key)
        both.hit("user:1", 5)
        found = documents(capsys, *common)
        assert [(each["limiter"], each["buckets"]) for each in found] == [
            ("a:b~c#d%e", 4),
            ("login", 1),
        ]
        assert 0 <= found[0]["idle"] < 600
        assert 0 < found[0]["full_in"] <= 720
        assert main(common) == 0
        assert capsys.readouterr().out.startswith("a:b~c#d%e\t4\t")
        of_key = documents(capsys, *common, "user:1")
        assert [(each["limiter"], each["buckets"]) for each in of_key] == [
            ("a:b~c#d%e", 1),
            ("login", 1),
        ]
        assert not both.hit("user:1")
        assert documents(capsys, *common, "user:1", "--limiter", "login", "--reset") == [
            {"reset": 1}
        ]
        assert both.hit("user:1")
        assert documents(capsys, *common, long, "--reset") == [{"reset": 1}]
        assert odd.peek(long).remaining == 5
        assert odd.peek("x:user:1").remaining == 4
        assert main([*common, long, "--reset"]) == 1
        assert "has no bucket that is not full" in capsys.readouterr().err
        store.set("pgkv:rate:foreign:u", "another program's")
        (foreign,) = documents(capsys, *common, "--limiter", "foreign")
        assert (foreign["buckets"], foreign["full_in"]) == (1, 0)
        assert documents(capsys, *common, "u", "--reset") == [{"reset": 1}]


def test_sessions_are_listed_and_ended(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's sessions, never a token; one ended by its handle, then all; exit code 1 without any."""
    with pgkv.Store.connect(dsn) as store:
        common = ["sessions", "--dsn", dsn]
        assert documents(capsys, *common, "user:1") == []  # nor is there a table
        assert main([*common, "user:1", "--end-all"]) == 1
        kept = pgkv.SessionStore(store)
        phone = kept.create({}, user_id="user:1", metadata={"device": "phone"})
        laptop = kept.create({}, user_id="user:1")
        other = kept.create({}, user_id="user:2")
        capsys.readouterr()
        assert main([*common, "user:1", "--json"]) == 0
        text = capsys.readouterr().out
        assert not any(session.id in text for session in (phone, laptop, other))
        found = [json.loads(line) for line in text.splitlines()]
        assert {each["metadata"].get("device") for each in found} == {"phone", None}
        assert {"age", "idle", "remaining", "created_at", "ends_at"} < set(found[0])
        (handle,) = (each["handle"] for each in found if each["metadata"])
        assert main([*common, "user:1"]) == 0
        assert sum(line.startswith(handle) for line in capsys.readouterr().out.splitlines()) == 1
        assert main([*common, "user:2", "--end", handle]) == 1
        assert main([*common, "user:1", "--end", handle]) == 0
        assert capsys.readouterr().out == "ended 1 session\n"
        assert (kept.load(phone.id), kept.load(laptop.id) is None) == (None, False)
        assert documents(capsys, *common, "user:1", "--end-all") == [{"ended": 1}]
        assert kept.load(laptop.id) is None
        assert kept.load(other.id) is not None
        assert main([*common, "user:1", "--end-all"]) == 1
