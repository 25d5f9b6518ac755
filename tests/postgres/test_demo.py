"""`pgkv demo`: what it shows, where, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from pgkv import Store
from pgkv._cli.demo import show as _demo
from pgkv._cli.demo.stage import Check, Scene, Size, Stage
from pgkv._embedded.binaries import exists
from pgkv.cli import main
from tests import servers
from tests.faults.support import newest
from tests.servers import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--keys", "6000", "--seconds", "0.3")
FLEET = "A fleet with one lock"
# `pgkv demo`, of which only the scene of the first argument is run; a lease may be long.
ONE_SCENE = """
import functools, os, sys
from pgkv import cli
from pgkv._cli.demo import fleet, show as _demo
fleet.TTL = float(os.environ.get("TTL", fleet.TTL))
scenes = [scene for scene in _demo.SCENES if scene.title == sys.argv[1]]
_demo.run = functools.partial(_demo.run, scenes=scenes)
sys.exit(cli.main(["demo", *sys.argv[2:]]))
"""


# -- as a whole -------------------------------------------------------------------------------------


@newest
def test_on_another_server(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every check of every scene holds; a pipe gets plain lines; no table is left on the server."""
    code = main(["demo", "--dsn", dsn, *SMALL])
    said, complaints = capsys.readouterr()
    assert code == 0, said + complaints
    assert "WRONG" not in said
    held = [line for line in said.splitlines() if line.startswith("  ok: ")]
    # Three checks need what a slow machine is too late for, and are left out then.
    assert 20 <= len(held) <= 23
    for line in held:
        assert not re.search(
            r"missing|wrong|noth|none|worthless|never|lost|\b0 (?:were|are|is)\b|(?<![.\d])1 \w+s\b",
            line,
        ), line
    assert f"{len(held)} of {len(held)} checks held" in said
    for scene in _demo.SCENES:
        assert f"\n{scene.title}\n  {scene.stake}\n" in said
    assert "\x1b" not in said
    assert "PYTHONSAFEPATH" not in os.environ
    assert "\r" not in said
    assert max(line.count("\t") for line in said.splitlines()) == 0
    with psycopg.connect(dsn) as conn:
        left = conn.execute("SELECT relname FROM pg_class WHERE relname LIKE 'pgkv_demo%'")
        assert left.fetchall() == []


def scene(*held: bool) -> Scene:
    """A scene with those checks."""

    def play(_: Stage) -> Iterator[str | Check]:
        yield "said"
        yield from (Check("checked", each) for each in held)

    return Scene("A scene", "what is at stake", play)


@newest
def test_a_check_that_fails(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is called wrong, is missing from the sum, and makes the exit code 1."""
    whole = _demo.run

    def run(*args: Any, **options: Any) -> bool:
        return whole(*args, **options, scenes=[scene(True), scene(True, False)])

    monkeypatch.setattr(_demo, "run", run)
    assert main(["demo", "--dsn", dsn]) == 1
    said = capsys.readouterr().out
    assert said.count("  ok: checked\n") == 2
    assert said.count("  WRONG: checked\n") == 1
    assert "2 of 3 checks held" in said


@newest
def test_a_thread_that_fails_ends_the_others(dsn: str) -> None:
    """The first failure is raised long before the time is up."""
    with Store.connect(dsn) as store:
        stage = Stage(store, {}, Size(), quiet=True)

        def step(number: int) -> None:
            if number == 3:
                raise RuntimeError("the third")
            time.sleep(0.01)

        started = time.monotonic()
        with pytest.raises(RuntimeError, match="the third"):
            stage.together("work", step, 120)
        assert time.monotonic() - started < 60


@newest
def test_as_json(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json standard output is one document and nothing else."""
    whole = _demo.run

    def run(*args: Any, **options: Any) -> bool:
        return whole(*args, **options, scenes=[scene(True)])

    monkeypatch.setattr(_demo, "run", run)
    assert main(["demo", "--dsn", dsn, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held"] is True
    assert found["scenes"] == [
        {
            "title": "A scene",
            "stake": "what is at stake",
            "said": ["said"],
            "checks": [{"text": "checked", "held": True}],
        }
    ]


# -- on the screen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_encoding(terminal: bool, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where standard output has ASCII only, marks are made of that."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding, write_through=True))
    monkeypatch.setattr("pgkv._cli.console.on_terminal", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "80")
    long = "a sentence that is longer than the screen is wide " * 3
    for line in (long, Check("good", True), Check("bad", False)):
        _demo.show(line)
    said = written.getvalue().decode(encoding)
    assert " ".join(said.split()).startswith(" ".join(long.split()))
    good, bad = (line for line in said.splitlines() if line.endswith(("good", "bad")))
    assert good.split()[0] == (
        "✓" if terminal and encoding == "utf-8" else "ok" + ":" * (not terminal)
    )
    assert bad.split()[0] == (
        "✗" if terminal and encoding == "utf-8" else "WRONG" + ":" * (not terminal)
    )
    assert not terminal or max(map(len, said.splitlines())) <= 80


# -- processes --------------------------------------------------------------------------------------


def test_a_worker_that_fails_is_reported() -> None:
    """What a worker died of is raised in the demo, and no process is left."""
    with (
        pytest.raises(RuntimeError, match=r"process 1 of the demo failed: TypeError: .*dsn"),
        Stage(None, {}, Size(), quiet=True).workers(print, 1),  # type: ignore[arg-type]  # not used
    ):
        pytest.fail("it was ready")


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start("A scene", "--dsn", dsn, TMPDIR=...) plays one scene in a process that leads its own
    group, as a shell's job does."""
    made: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", ONE_SCENE, *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            start_new_session=True,
        )
        made.append(process)
        return process

    yield begin
    for process in made:
        process.kill()
        process.communicate()


def workers_of(demo: subprocess.Popen[bytes]) -> list[int]:
    """The processes that it has started for a scene."""
    table = subprocess.run(
        ["ps", "-ww", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    return [
        int(pid)
        for pid, parent, args in rows
        if int(parent) == demo.pid and "multiprocessing.spawn" in args
    ]


@pytest.mark.skipif(os.name != "posix" or not servers.installed(), reason="no server programs here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals, start: Start) -> None:
    """Ctrl-C, or SIGTERM, while processes contend for the lock: they end, and the temporary server
    and its directory are gone."""
    directory = servers.new_directory("demo")
    # One is killed soon; its lease keeps the scene from going on before the signal comes.
    demo = start(FLEET, "--seconds", "600", TMPDIR=str(directory), TTL="300")
    servers.wait_until(lambda: len(workers_of(demo)) >= 3, "the processes of the scene run")
    running = workers_of(demo)
    if number == signal.SIGINT:
        os.killpg(demo.pid, number)  # a terminal's Ctrl-C is for the whole group
    else:
        demo.send_signal(number)
    said, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 130, said
    assert b"Interrupted: cleaning up" in said
    assert b"Traceback" not in said
    # One that was just being started is not known yet, and ends by itself.
    servers.wait_until(lambda: not any(map(exists, running)), "they end")
    assert list(directory.iterdir()) == []


@newest
def test_killed(dsn: str, start: Start) -> None:
    """kill -9 of the demo: the processes that it has started end by themselves."""
    demo = start(FLEET, "--seconds", "3", "--dsn", dsn)
    servers.wait_until(lambda: len(workers_of(demo)) >= 3, "the processes of the scene run")
    running = workers_of(demo)
    demo.kill()
    servers.wait_until(lambda: not any(map(exists, running)), "they end")


@newest
def test_a_module_in_the_working_directory(dsn: str, start: Start, tmp_path: Path) -> None:
    """A user's module that is called as one of Python's own does not get into those processes."""
    (tmp_path / "json.py").write_text("raise RuntimeError('a module of the user')")
    demo = start("Rate limit", "--seconds", "0.3", "--dsn", dsn, PYTHONSAFEPATH="1")
    said, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 0, said


def test_importing_pgkv_does_not_load_the_demo() -> None:
    """`import pgkv` does not load the demo."""
    script = "import sys, pgkv; print({'pgkv._cli.demo', 'rich', 'typer'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
