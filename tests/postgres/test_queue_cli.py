"""`pgkv queue`, `pgkv worker` and `pgkv idempotency`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pgkv
from pgkv.cli import main

PROGRAM = """
import asyncio, signal, os

def work(job):
    open("done", "a").write(job.payload.decode() + "\\n")
    if job.payload == b"last":
        os.kill(os.getpid(), signal.SIGTERM)

async def awork(job):
    work(job)
"""


def run(capsys: pytest.CaptureFixture[str], dsn: str, *args: str) -> list[dict[str, Any]]:
    assert main(["queue", *args, "--dsn", dsn, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_jobs_by_hand(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A job is put, listed, retried and dropped."""
    assert run(capsys, dsn) == []
    assert run(capsys, dsn, "q") == []
    (put,) = run(capsys, dsn, "q", "--put", "payload")
    (row,) = run(capsys, dsn, "q")
    assert (row["id"], row["state"], row["payload"]) == (put["id"], "waiting", "payload")
    with pgkv.Store.connect(dsn) as store:
        job = pgkv.Queue(store, "q").take()
        assert job is not None
        job.bury("no luck")
        pgkv.Queue(store.namespace("ns:"), "other").put("x")
    (row,) = run(capsys, dsn, "q", "--dead")
    assert row["error"] == "no luck"
    assert [each["queue"] for each in run(capsys, dsn)] == ["ns:other", "q"]
    assert [each["queue"] for each in run(capsys, dsn, "--namespace", "ns:")] == ["other"]
    run(capsys, dsn, "q", "--retry", str(put["id"]))
    run(capsys, dsn, "q", "--drop", str(put["id"]))
    assert run(capsys, dsn, "q", "--purge") == [{"deleted": 0}]
    assert main(["queue", "q", "--retry", "17", "--dsn", dsn]) == 1
    assert main(["queue", "--dead", "--dsn", dsn]) == 2
    assert main(["queue", "q", "--purge", "--put", "x", "--dsn", dsn]) == 2


@pytest.mark.parametrize("fn", ["program:work", "send-mail:awork"])
def test_a_worker_of_the_shell(dsn: str, tmp_path: Path, fn: str) -> None:
    """pgkv worker loads a function, does the jobs, and ends in order at SIGTERM."""
    (tmp_path / f"{fn.partition(':')[0]}.py").write_text(PROGRAM)
    with pgkv.Store.connect(dsn) as store:
        queue = pgkv.Queue(store, "q")
        queue.put_many(["first", "second", "last", "after"])
        command = [sys.executable, "-m", "pgkv", "worker", fn, "-q", "q"]
        done = subprocess.run(
            [*command, "--concurrency", "1", "--dsn", dsn],
            check=False, cwd=tmp_path, env={"PYTHONPATH": ":".join(sys.path)}, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0
        assert (tmp_path / "done").read_text().split() == ["first", "second", "last"]
        assert queue.stats()[1:5] == (1, 0, 0, 0)


@pytest.mark.parametrize(
    "text",
    ["nothing", "json:nothing", "no_such_module:fn", "json:__doc__", ".json:loads", "json:load."],
)
def test_what_cannot_be_a_workers_function(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage is told in a line."""
    assert main(["worker", text, "--queue", "q", "--dsn", "postgresql://"]) == 2
    assert text.partition(":")[0] in capsys.readouterr().err


def test_a_key_by_hand(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A key is shown without its result, and forgotten; one that is not known is an error."""

    def ask(action: str, *more: str) -> int:
        return main(["idempotency", action, "k", "--scope", "ann", "--dsn", dsn, *more])

    assert ask("show") == 1
    with pgkv.Store.connect(dsn) as store:
        idem = pgkv.Idempotency(store)
        with idem.once("k", scope="ann") as attempt:
            assert ask("show", "--json") == 0
            attempt.result = b"secret"
        assert ask("show", "--json") == 0
        out = capsys.readouterr().out
        running, done = map(json.loads, out.splitlines())
        assert (running["status"], running["result_bytes"]) == ("running", None)
        assert (done["status"], done["result_bytes"], done["token"]) == ("done", 6, attempt.token)
        assert "secret" not in out
        assert ask("forget") == 0
        assert idem.get("k", scope="ann") is None
    assert ask("forget") == 1
