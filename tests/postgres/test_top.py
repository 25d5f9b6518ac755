"""`pgkv top` in a terminal, and as a document."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("pty", reason="Windows has no terminals of this kind")
pytest.importorskip("typer")
pytest.importorskip("rich")

import pgkv
from pgkv.cli import main
from pgkv.patterns.overview import Overviews, rates_between
from tests.faults.proxy import Proxy
from tests.faults.support import newest

pytestmark = newest
WITHIN = 60.0  # seconds for the program to start and draw, on a machine under load


class Terminal:
    """A terminal in which the program runs."""

    def __init__(self, number: int) -> None:
        self.number = number

    def press(self, key: str) -> None:
        os.write(self.number, key.encode())

    def reads(self, wanted: str) -> str:
        """What is drawn from now on, up to that text."""
        text, until = "", time.monotonic() + WITHIN
        while wanted not in text:
            ready, _, _ = select.select([self.number], [], [], until - time.monotonic())
            assert ready, f"no {wanted!r} in {text[-2000:]!r}"
            text += re.sub(
                r"\x1b\[[\d;?]*[A-Za-z]", "", os.read(self.number, 65536).decode("utf-8", "replace")
            )
        return text


@contextmanager
def on_terminal(*arguments: str) -> Iterator[tuple[Terminal, Callable[[], int]]]:
    import pty

    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "pgkv", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "120", "LINES": "60", "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours), lambda: program.wait(WITHIN)
    finally:
        program.kill()
        program.wait()
        os.close(ours)


def test_keys_switch_views_and_quit(dsn: str) -> None:
    """Each view shows its part; what is no key of a view changes nothing; q ends."""
    with pgkv.Store.connect(dsn) as store, pgkv.Lock(store, "billing").acquire():
        store.set("user\x1b[31m:1", "x")
        pgkv.Queue(store, "emails").put(b"x")
        with on_terminal("top", "--dsn", dsn, "--interval", "1h") as (terminal, ended):
            terminal.reads("heap-only")
            terminal.press("2")
            terminal.reads(r"user\x1b[31m:")
            terminal.press("x")
            terminal.press("3")
            terminal.reads("billing")
            terminal.press("4")
            terminal.reads("emails")
            terminal.press("5")
            terminal.reads("longest")
            terminal.press("q")
            assert ended() == 0


def test_a_server_that_goes_away_and_comes_back(dsn: str) -> None:
    """The last frame stays, with a line that says why there is no other."""
    with pgkv.Store.connect(dsn) as store:
        store.set("k", "v")
    with (
        Proxy(dsn) as proxy,
        on_terminal("top", "--dsn", proxy.dsn, "--interval", "1s") as (terminal, ended),
    ):
        terminal.reads("commits/s")
        proxy.refuse()
        proxy.reset_all()
        terminal.reads("no answer")
        proxy.listen()
        while "no answer" in terminal.reads("heap-only"):
            pass
        terminal.press("q")
        assert ended() == 0


def test_once(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of a frame with its rates: a document, or all views."""
    with pgkv.Store.connect(dsn) as store, pgkv.Lock(store, "billing").acquire():
        store.set("user:1", "x")
        assert main(["top", "--once", "--json", "--interval", "1s", "--dsn", dsn]) == 0
        [line] = capsys.readouterr().out.splitlines()
        shown = json.loads(line)
        assert main(["top", "--once", "--interval", "1s", "--dsn", dsn]) == 0
        text = capsys.readouterr().out
    assert shown["server"]["database"]
    assert [each["name"] for each in shown["locks"]] == ["billing"]
    assert {each["kind"] for each in shown["tables"]} == {"store", "locks"}
    rates = shown["rates"]
    assert rates["seconds"] > 0.5
    assert rates["commits"] >= 0
    assert set(rates["tables"]) == {"store", "locks"}
    assert set(rates["tables"]["store"]) == {"changes", "hot"}
    assert "\nbilling\t" in text
    assert "\nuser:\t1\t" in text


def test_what_is_refused(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal it needs to be told what to print; without a server it fails."""
    assert main(["top", "--dsn", dsn]) == 2
    assert "give --once or --json" in capsys.readouterr().err
    assert main(["top", "--once", "--dsn", "postgresql://127.0.0.1:1/x", "--timeout", "1s"]) == 3


def test_rates_are_of_two_frames(dsn: str) -> None:
    """Writes of a table per second; nothing negative after a reset of the statistics."""
    with pgkv.Store.connect(dsn) as store:
        store.set("k", "v")
        overviews = Overviews(store)
        before = store._run(overviews.look())
        until = time.monotonic() + WITHIN
        store.set_many({f"k{n}": "v" for n in range(100)})
        while True:  # the server notes them within a second
            store.get("k")
            after = store._run(overviews.look())
            rates = rates_between(before, after)
            changes = rates["tables"]["store"]["changes"] * rates["seconds"]
            if changes > 98 or time.monotonic() > until:
                break
        assert 99 <= round(changes) <= 102
        assert rates_between(after, before)["tables"]["store"]["changes"] == 0.0
