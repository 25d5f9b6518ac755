"""docs/command-line.md is complete, and its terminal sessions are what a terminal shows.

`python -m tests.docs.test_command_line` writes what the commands print into the page.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer

from pgkv import embedded
from pgkv.cli import app
from tests import servers
from tests.each import for_each

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "command-line.md"
PAGE = FILE.read_text(encoding="utf-8")
COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")

# What differs from run to run: numbers with their units, the server's clock, this machine's name.
VARYING = re.compile(r"\d[\d.,:+T-]*(?:\s?(?:µs|us|ms|s|min|h|days|B|kB|MB|GB|%)(?![a-z]))?")
MARK = "\x1e"
ERASE, UP = "\x1b[2K", "\x1b[1A"
ESCAPE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


def section(heading: str) -> str:
    """The page from a heading to the next."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"docs/command-line.md has no section {heading!r}"
    return found[1]


def options_of(command: Any) -> set[str]:
    """Every option of a command that its help shows, in all its spellings."""
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    spelt = {text for each in shown for text in (*each.opts, *each.secondary_opts)}
    return {text for text in spelt if text.startswith("-")} | {"--help", "-h"}


def common() -> set[str]:
    """The options that every command has."""
    return set.intersection(*map(options_of, COMMANDS.values()))


def first_column(text: str) -> set[str]:
    """The options that the tables of a section are about."""
    rows = re.findall(r"^\| (`-.*?) \|", text.replace(r"\|", "/"), re.MULTILINE)
    return {option for row in rows for option in OPTION.findall(row)}


@for_each(COMMANDS)
def test_each_command_has_a_section_with_its_options(name: str) -> None:
    """A command's own options, in every spelling, are those of the table in its section."""
    assert f"\npgkv {name}" in section(name)
    assert first_column(section(name)) == options_of(COMMANDS[name]) - common()


def test_the_options_of_every_command_are_there() -> None:
    """So are the common options in theirs; those of `pgkv` alone are named."""
    text = section("Options of every command")
    assert first_column(text) == common()
    assert options_of(typer.main.get_command(app)) <= set(OPTION.findall(text))


def test_the_page_begins_with_every_command() -> None:
    """The list of commands at the top leads to each of them."""
    listed = re.findall(r"^\| \[`pgkv (\w+).*?`\]\(#(\w+)\)", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted((name, name) for name in COMMANDS)


# -- the terminal sessions


def steps() -> list[tuple[str, str]]:
    """Every command line of the page, and what stands below it."""
    lines = re.split(r"^\$ ", "".join(BLOCK.findall(PAGE)), flags=re.MULTILINE)[1:]
    return [(first, rest) for first, _, rest in (line.partition("\n") for line in lines)]


# What a program has done before a command of the page.
SEED = {"pgkv cache": f"'{sys.executable}' -m app.program; "}
PROGRAM = """
import os
import pgkv
from app.users import load_user

store = pgkv.Store.connect(os.environ["PGKV_DSN"])
pgkv.configure(store)
for number in range(5):
    load_user(number)
store.set("pgkv:cache:s:web-1:17", '{"app.users.load_user:1": [67, 5]}')
store.close()
"""
USERS = """
import pgkv

@pgkv.cached(3600, store_timeout=20)
def load_user(number: int) -> dict[str, int]:
    return {"id": number}
"""


def script() -> str:
    """One shell session. Before each command, and at the end, a mark with the exit code of the one
    before, which `$?` still has."""
    marked = (
        f"s=$?; {SEED.get(line, '')}printf '{MARK}%s\\n' $s; (exit $s)\n{line}"
        for line, _ in steps()
    )
    return "\n".join([*marked, f"printf '{MARK}%s\\n' $?", ""])


def on_a_terminal(shell_script: str, where: Path) -> str:
    """All that a terminal of 100 columns is sent while the script runs there."""
    import pty

    program = where / "pgkv"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m pgkv \"$@\"\n")
    program.chmod(0o755)
    settings = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    settings["PATH"] = f"{where}:{settings['PATH']}"
    settings |= {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", shell_script],
        cwd=where,
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    sent = bytearray()
    with contextlib.suppress(OSError):  # so a terminal ends, on Linux
        while part := os.read(ours, 65536):
            sent += part
    os.close(ours)
    process.wait(servers.PATIENCE)
    return sent.decode().replace("\r\n", "\n")


def visible(sent: str) -> str:
    """What of it stays on the screen: a progress bar removes itself."""
    lines: list[str] = []
    for line in sent.split("\n"):
        if UP in line:
            lines.pop()
        lines.append(ESCAPE.sub("", line.rpartition(ERASE)[2]))
    return "\n".join(lines).replace(socket.gethostname(), "web-1")


def comparable(text: str) -> str:
    """Without frames, numbers and the width of columns."""
    bare = re.sub(r"[─-╿]+", " ", text).replace("behind this", "ahead of this")
    return re.sub(r"\s+", " ", VARYING.sub("0", bare)).strip()


def sessions(where: Path) -> Iterator[tuple[str, str, str, int]]:
    """Each command of the page, what the page says it prints, what it printed, its exit code."""
    package = where / "app"
    package.mkdir()
    (package / "program.py").write_text(PROGRAM)
    (package / "users.py").write_text(USERS)
    with embedded.start(where / "data"):  # kept up between the commands
        parts = [part.partition("\n") for part in on_a_terminal(script(), where).split(MARK)[1:]]
    for (line, wanted), (here, following) in zip(steps(), pairwise(parts), strict=True):
        yield line, wanted, visible(here[2]), int(following[0])


@pytest.mark.skipif(not servers.installed(), reason="no PostgreSQL server programs here")
def test_its_sessions_are_what_a_terminal_shows() -> None:
    """Each command of the page, in order, prints what stands below it, but for numbers; and succeeds,
    unless the page asks for its exit code next."""
    done = list(sessions(servers.new_directory("terminal")))
    asked = [line == "echo $?" for line, *_ in done[1:]] + [False]
    for (line, wanted, printed, code), exempt in zip(done, asked, strict=True):
        assert comparable(printed) == comparable(wanted), line
        assert exempt or code == 0, line


def write() -> None:
    """Put what each command prints below it."""
    done = sessions(servers.new_directory("terminal"))

    def anew(block: re.Match[str]) -> str:
        lines = []
        for _ in range(block[1].count("\n$ ") + 1):
            line, _, printed, _ = next(done)
            lines += [f"$ {line}", *(each.rstrip() for each in printed.splitlines())]
        return "\n".join(["```console", *lines, "```"])

    FILE.write_text(BLOCK.sub(anew, PAGE), encoding="utf-8")
    servers.remove_base_directory()


if __name__ == "__main__":
    write()
