"""`pgkv locks` and `pgkv lock`, as a terminal sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import pgkv
from tests.faults.support import newest
from tests.servers import wait_until

pytestmark = newest

ROOT = Path(__file__).resolve().parents[2]


def run(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgkv", *arguments],
        env={**os.environ, "PGKV_DSN": dsn},
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def listed(dsn: str) -> dict[str, Any]:
    done = run(dsn, "locks", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_locks_are_listed_broken_and_revoked(dsn: str) -> None:
    """Holders with age, rest, slot and metadata; open guards; --revoke and --break by token."""
    assert listed(dsn) == {"locks": [], "guards": []}
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "billing", metadata={"job": 7})
        lease = lock.acquire()
        slot = pgkv.Semaphore(store, "gpu", 2, durable=False).acquire()
        with psycopg.connect(dsn, application_name="the guard") as conn:
            lease.guard(conn)
            found = listed(dsn)
            (guard,) = found["guards"]
            assert (guard["key"], guard["application"]) == ("billing", "the guard")
            conn.rollback()
        by_name = {each["name"]: each for each in found["locks"]}
        assert by_name["billing"]["metadata"] == {"job": 7}
        assert by_name["billing"]["token"] == lease.token
        assert 0 < by_name["billing"]["remaining"] <= 30
        assert by_name["gpu"]["slot"] == slot.slot
        text = run(dsn, "locks").stdout
        assert "billing\t" in text
        assert text.splitlines()[0].endswith('\t{"job": 7}')
        assert run(dsn, "locks", "--revoke", str(lease.token)).returncode == 0
        assert lock.try_acquire() is None
        assert run(dsn, "locks", "--break", str(slot.token)).returncode == 0
        assert run(dsn, "locks", "--break", "1").returncode == 1
        assert [each["name"] for each in listed(dsn)["locks"]] == ["billing"]


def test_each_answer_about_locks_is_json(dsn: str) -> None:
    """With --json what was ended is a document on standard output, what failed one on standard error."""
    with pgkv.Store.connect(dsn) as store:
        for option, ended in (("--revoke", "revoked"), ("--break", "broken")):
            lease = pgkv.Semaphore(store, "gpu", 2).acquire()
            done = run(dsn, "locks", option, str(lease.token), "--json")
            told = json.loads(done.stdout)
            assert (done.returncode, told.pop("owner")) == (0, lease.owner)
            assert told == {"name": "gpu", "slot": lease.slot, "token": lease.token, "ended": ended}
            none = run(dsn, "locks", option, "1", "--json")
            assert (none.returncode, none.stdout) == (1, "")
            assert json.loads(none.stderr)["error"] == "NotFoundError"
        with pgkv.Lock(store, "job").acquire():
            held = run(dsn, "--json", "lock", "job", "--skip", "--", "true")
            assert (held.returncode, json.loads(held.stderr)["error"]) == (75, "LockTimeoutError")
    for program, code in (("no-such-program", 127), ("/", 126)):
        done = run(dsn, "--json", "lock", "job", "--", program)
        assert (done.returncode, done.stdout) == (code, "")
        assert f"cannot run {program}" in json.loads(done.stderr)["message"]


def test_a_command_runs_under_the_lock(dsn: str) -> None:
    """Its exit code and its token pass through; --skip answers 75 while it is held."""
    program = "import os, sys; print(os.environ['PGKV_LOCK_TOKEN']); sys.exit(7)"
    done = run(dsn, "lock", "job", "--", sys.executable, "-c", program)
    assert done.returncode == 7, done.stderr
    assert int(done.stdout) > 0
    with pgkv.Store.connect(dsn) as store, pgkv.Lock(store, "job").acquire(timeout=0):
        assert run(dsn, "lock", "job", "--skip", "--", "true").returncode == 75
        assert run(dsn, "lock", "job", "--wait", "0.1", "--", "true").returncode == 75
    assert run(dsn, "lock", "job", "--skip", "--", "no-such-program").returncode == 127


def test_a_command_whose_lease_is_lost_is_killed(dsn: str) -> None:
    """After --break the command ends with 76, its children with it."""
    with pgkv.Store.connect(dsn) as store:
        lock = pgkv.Lock(store, "job")
        process = subprocess.Popen(
            [sys.executable, "-m", "pgkv", "lock", "job", "--ttl", "1", "--", "sh", "-c", "sleep 60; true"],
            env={**os.environ, "PGKV_DSN": dsn}, cwd=ROOT, stderr=subprocess.PIPE,
        )  # fmt: skip
        wait_until(lambda: lock.holder() is not None, "it holds the lock", 20)
        info = lock.holder()
        assert info is not None
        assert lock.force_release(info.token)
        started = time.monotonic()
        _, error = process.communicate(timeout=20)
        assert process.returncode == 76, error
        assert time.monotonic() - started < 5
