"""The conventions of Unix tools: pipes that close, full disks, closed descriptors, plain lines in pipes,
and that a command which only reads leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import pgkv
from pgkv import Store
from pgkv.cli import main
from tests import FULL
from tests.faults.support import newest
from tests.servers import PATIENCE

pytestmark = newest

ROOT = Path(__file__).resolve().parents[2]
BOX = re.compile("[\u2500-\u257f]")


def shell(script: str, dsn: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `pgkv` is the command."""
    define = f"pgkv() {{ '{sys.executable}' -m pgkv \"$@\"; }}\n"
    return subprocess.run(
        ["bash", "-c", define + script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PGKV_DSN": dsn},
        capture_output=True, text=True, timeout=2 * PATIENCE, check=False,
    )  # fmt: skip


@pytest.fixture
def filled(dsn: str) -> str:
    """A store of more than a pipe holds."""
    with Store.connect(dsn) as store:
        store.set_many({f"k{number:05}": "v" * 50 for number in range(6000)})
        store.set("large", b"x" * 300_000)
    return dsn


# -- what is written


@pytest.mark.parametrize(
    "command",
    ["scan", "scan --limit 0", "scan --json", "scan --keys", "get large", "get large --json"],
)
def test_a_reader_that_has_seen_enough(filled: str, command: str) -> None:
    """A pipe that closes early ends the command quietly, exit code 0, however much was to come."""
    done = shell(f"pgkv {command} | head -c 5 >/dev/null; echo ${{PIPESTATUS[0]}}", filled)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize(
    ("command", "target", "why"),
    [
        (command, *target)
        for command in ("--version", "--help", "get large", "scan", "stats", "schema", "cache")
        for target in ((">/dev/full", "No space left"), (">&-", "closed"))
        if FULL or "full" in target[0] or command in ("--help", "scan")
    ],
)
def test_output_that_cannot_be_written(filled: str, command: str, target: str, why: str) -> None:
    """A full disk or a closed standard output is one line and exit code 74, never a success."""
    with Store.connect(filled) as store:
        pgkv.cached(3600, store=store, store_timeout=20)(lambda_like)(1)
    done = shell(f"pgkv {command} {target}; echo $? >&2", filled)
    line, code = done.stderr.splitlines()
    assert code == "74"
    assert line.startswith("pgkv: cannot write to standard output: ")
    assert why in line


def lambda_like(number: int) -> int:
    """What a program caches."""
    return number


def test_a_command_without_output_needs_none(dsn: str) -> None:
    """Closed standard output and standard error do not hinder a command that has nothing to say."""
    assert shell("pgkv set k v >&- 2>&-", dsn).returncode == 0
    assert shell("pgkv get nothing 2>&-", dsn).returncode == 1
    assert shell("pgkv get nothing 2>/dev/full", dsn).returncode == 1
    assert shell("pgkv get k", dsn).stdout == "v"


@pytest.mark.parametrize(("source", "why"), [("<&-", "closed"), ("0>/dev/null", "")])
def test_input_that_cannot_be_read(dsn: str, source: str, why: str) -> None:
    """A closed standard input, or one that cannot be read, is one line and exit code 74."""
    done = shell(f"pgkv set k - {source}", dsn)
    assert (done.returncode, done.stdout) == (74, "")
    assert done.stderr.startswith("pgkv: cannot read standard input: ")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_closed_input_is_no_terminal(dsn: str) -> None:
    """A question cannot be asked there: --yes is demanded, as in a pipe."""
    done = shell("pgkv delete a b <&-", dsn)
    assert done.returncode == 2
    assert "--yes" in done.stderr


@pytest.mark.parametrize("command", ["cache", "locks", "scan", "stats", "doctor"])
def test_a_pipe_gets_lines(filled: str, command: str) -> None:
    """No command draws boxes into a pipe: columns are separated by tabs."""
    with Store.connect(filled) as store:
        pgkv.cached(3600, store=store, store_timeout=20)(lambda_like)(1)
        with pgkv.Lock(store, "job").acquire():
            done = shell(f"pgkv {command} | cat", filled)
    assert not BOX.search(done.stdout)
    assert done.stderr == ""
    assert "\t" in done.stdout.splitlines()[0]


def test_what_is_cached_in_a_pipe(dsn: str) -> None:
    """One line for each function, with the cells of the table. The last, the share of hits, is empty:
    no process has told it yet."""
    with Store.connect(dsn) as store:
        pgkv.cached(3600, store=store, store_timeout=20)(lambda_like)(1)
    name = f"{__name__}.lambda_like:1"
    assert re.fullmatch(rf"{re.escape(name)}\t1\t0\t\d+ B\t\n", shell("pgkv cache", dsn).stdout)


# -- what is answered


@pytest.mark.parametrize("condition", [["--nx"], ["--xx"], ["--if-version", "0"], []])
def test_the_version_that_was_written(
    dsn: str, condition: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """set --json names the new version, whatever the condition; null where nothing was written."""
    with Store.connect(dsn) as store:
        if condition == ["--xx"]:
            store.set("k", "old")
        arguments = ["set", "k", "v", "--ttl", "1h", *condition, "--json", "--dsn", dsn]
        assert main(arguments) == 0
        entry = store.get_entry("k")
        assert entry is not None
        told = json.loads(capsys.readouterr().out)
        assert told == {"key": "k", "written": True, "version": entry.version}
        assert entry.value == b"v"
        if condition == ["--xx"]:
            store.delete("k")
        assert main(arguments) == (1 if condition else 0)
        again = json.loads(capsys.readouterr().out)
        assert (again["version"] is None) == bool(condition)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["set", "k", "v", "--dsn", "postgresql://u@127.0.0.1:1/d"], "set"),
        (["scan", "--table", "mistyped"], "scan"),
        (["scan", "--keys", "--table", "mistyped"], "keys"),
        (["stats", "--table", "mistyped"], "stats"),
        (["sweep", "--table", "mistyped"], "sweep"),
        (["delete", "--prefix", "a", "--yes", "--table", "mistyped"], "delete_prefix"),
        (["cache", "--table", "mistyped"], "usage"),
        (["doctor", "--dsn", "postgresql://u@127.0.0.1:1/d"], "doctor"),
    ],
)
def test_messages_name_no_operation_of_pgkvs(
    dsn: str, command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of an error begins with what is wrong, not with a name from inside."""
    assert main([*([] if "--dsn" in command else ["--dsn", dsn]), *command]) in (1, 3)
    line = capsys.readouterr().err
    assert not re.match(r"pgkv: [a-z_]+: ", line), words


def test_a_mistyped_table_is_not_healthy(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """doctor fails a table or schema that was asked for by name and is not there; the default table
    may still be made by the first write."""
    assert main(["doctor", "--dsn", dsn, "--table", "mistyped", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["healthy"]
    (finding,) = [each for each in told["findings"] if each["status"] == "fail"]
    assert finding["check"] == "table"
    assert '"mistyped" does not exist' in finding["detail"]
    assert main(["doctor", "--dsn", dsn, "--schema", "mistyped"]) == 1
    assert main(["doctor", "--dsn", dsn]) == 0


def test_counts_agree_with_their_nouns(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One is singular."""
    with Store.connect(dsn) as store:
        store.set("k", "v")
        store.analyze()
    assert main(["sweep", "--dsn", dsn]) == 0
    assert capsys.readouterr().out == "deleted 0 expired rows\n"
    assert main(["doctor", "--dsn", dsn]) == 0
    assert "of 1 row\n" in capsys.readouterr().out


# -- what is understood


def test_scan_takes_its_prefix_as_an_argument(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`pgkv scan user:` is `pgkv scan --prefix user:`; both at once are refused."""
    with Store.connect(dsn) as store:
        store.set_many({"user:1": "a", "word:1": "b"})
    assert main(["scan", "user:", "--dsn", dsn]) == 0
    assert capsys.readouterr().out == "user:1\ta\n"
    assert main(["scan", "user:", "--prefix", "user:", "--dsn", dsn]) == 2
    assert "not both" in capsys.readouterr().err


def test_skip_and_wait_exclude_each_other(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Waiting and not waiting at once is wrong usage."""
    assert main(["lock", "job", "--skip", "--wait", "5", "--dsn", dsn, "--", "true"]) == 2
    assert "--skip or --wait, not both" in capsys.readouterr().err
