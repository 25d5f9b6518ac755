"""The `pgkv` command against a real server: what it writes, and its exit codes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from pgkv import Store
from pgkv.cli import main
from tests.servers import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[2]
BINARY = bytes(range(256)) + b"\n\n"


class Keyboard(io.TextIOWrapper):
    """Standard input that a person sits at."""

    def isatty(self) -> bool:
        return True


class Terminal:
    """Runs the command in this process: exit code, output and errors as bytes."""

    def __init__(
        self,
        dsn: str,
        monkeypatch: pytest.MonkeyPatch,
        capture: pytest.CaptureFixture[bytes],
    ) -> None:
        self._monkeypatch = monkeypatch
        self._capture = capture
        monkeypatch.setenv("PGKV_DSN", dsn)

    def __call__(
        self, *arguments: str, stdin: bytes = b"", typed: bytes | None = None
    ) -> tuple[int, bytes, bytes]:
        pipe = io.TextIOWrapper(io.BytesIO(stdin))
        self._monkeypatch.setattr(
            "sys.stdin", pipe if typed is None else Keyboard(io.BytesIO(typed))
        )
        self._capture.readouterr()
        code = main(list(arguments))
        out, err = self._capture.readouterr()
        return code, out, err

    def json(self, *arguments: str) -> Any:
        """The one JSON document that a successful command writes."""
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def pgkv(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Terminal:
    return Terminal(dsn, monkeypatch, capsysbinary)


def as_process(*arguments: str, dsn: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pgkv", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PGKV_DSN": dsn},
    )


def test_set_get_delete(pgkv: Terminal) -> None:
    """A value goes in, comes out exactly, and goes; then there is none: exit code 1."""
    assert pgkv("set", "greeting", "héllo") == (0, b"", b"")
    assert pgkv("get", "greeting") == (0, "héllo".encode(), b"")
    assert pgkv("delete", "greeting") == (0, b"", b"")
    code, out, err = pgkv("get", "greeting")
    assert (code, out) == (1, b"")
    assert err == b"pgkv: no such key: 'greeting'\n"
    assert pgkv("delete", "greeting")[0] == 1


def test_binary_through_pipes(dsn: str) -> None:
    """Standard input and output carry any byte, in a real process."""
    assert as_process("set", "bin", "-", dsn=dsn, stdin=BINARY).returncode == 0
    done = as_process("get", "bin", dsn=dsn)
    assert (done.returncode, done.stdout, done.stderr) == (0, BINARY, b"")
    done = as_process("get", "absent", dsn=dsn)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"Traceback" not in done.stderr


def test_get_as_json(pgkv: Terminal) -> None:
    """The whole entry; a value that is not UTF-8 in base64."""
    pgkv("set", "k", "v", "--ttl", "1h")
    found = pgkv.json("get", "k")
    assert (found["key"], found["value"], found["encoding"]) == ("k", "v", "utf-8")
    assert 3500 < found["ttl"] <= 3600
    assert found["expires_at"] > found["created_at"]
    pgkv("set", "k", "-", stdin=b"\xff\xfe")
    found = pgkv.json("get", "k")
    assert (found["value"], found["encoding"], found["ttl"]) == ("//4=", "base64", None)


def test_conditions_of_set(pgkv: Terminal) -> None:
    """--nx, --xx and --if-version write or not: exit code 0 or 1."""
    assert pgkv("set", "k", "1", "--xx")[0] == 1
    assert pgkv("set", "k", "1", "--nx")[0] == 0
    code, _, err = pgkv("set", "k", "2", "--nx")
    assert (code, err) == (1, b"pgkv: not written: the key 'k' exists\n")
    assert pgkv("set", "k", "2", "--xx", "--ttl", "1h")[0] == 0
    version = pgkv.json("get", "k")["version"]
    assert pgkv("set", "k", "3", "--if-version", str(version + 1))[0] == 1
    assert pgkv("set", "k", "3", "--if-version", str(version), "--keep-ttl")[0] == 0
    found = pgkv.json("get", "k")
    assert found["value"] == "3"
    assert found["ttl"] > 3500
    assert pgkv("set", "new", "1", "--if-version", "0")[0] == 0
    assert pgkv("set", "dash", "--", "-5")[0] == 0
    assert pgkv("get", "dash")[1] == b"-5"


def test_watchers_are_told(pgkv: Terminal, dsn: str) -> None:
    """What a person sets, removes or loads is an event at once."""
    with Store.connect(dsn) as store, store.watch("k", poll=None) as events:
        for arguments, stdin, kind in (
            (["set", "k", "v"], b"", "set"),
            (["set", "k", "w", "--xx"], b"", "set"),
            (["delete", "k"], b"", "gone"),
            (["load", "-"], b'{"key": "k", "value": "v"}', "set"),
        ):
            assert pgkv(*arguments, stdin=stdin)[0] == 0
            event = events.next(timeout=60)
            assert event is not None
            assert event.kind == kind


def test_several_keys_are_removed_only_when_confirmed(pgkv: Terminal) -> None:
    """More than one key, or a prefix, needs --yes where nobody can be asked."""
    for key in ("a1", "a2", "b1", "b2"):
        pgkv("set", key, "x")
    for arguments in (("a1", "a2"), ("--prefix", "a")):
        code, _, err = pgkv("delete", *arguments)
        assert code == 2
        assert b"--yes" in err
    assert pgkv("delete", "a1", "a1", "nothing", "--yes") == (0, b"deleted 1\n", b"")
    assert pgkv.json("delete", "--prefix", "b", "-y") == {"deleted": 2}
    assert pgkv("delete", "--prefix", "b", "-y")[0] == 1
    assert pgkv("scan", "--keys")[1] == b"a2\n"


@pytest.mark.parametrize(("answer", "code", "left"), [(b"y\n", 0, b""), (b"n\n", 1, b"a\nb\n")])
def test_the_question_is_asked_on_a_terminal(
    pgkv: Terminal, answer: bytes, code: int, left: bytes
) -> None:
    """A person is told how many keys would go, and decides."""
    for key in ("a", "b"):
        pgkv("set", key, "x")
    found = pgkv("delete", "--prefix", "", typed=answer)
    assert found[0] == code
    assert b"all 2 keys" in found[2]
    assert pgkv("scan", "--keys")[1] == left


def test_scan_in_a_pipe(pgkv: Terminal) -> None:
    """Lines of key, tab, value in key order; what would break a line is escaped."""
    pgkv("set", "b", "-", stdin=b"two\nlines\t\\")
    pgkv("set", "a", "-", stdin=b"\xff\x00")
    pgkv("set", "c", "three")
    assert pgkv("scan")[1] == b"a\t\\xff\\x00\nb\ttwo\\nlines\\t\\\\\nc\tthree\n"
    assert pgkv("scan", "--limit", "2", "--keys")[1] == b"a\nb\n"
    assert pgkv("scan", "--prefix", "c", "--limit", "0")[1] == b"c\tthree\n"
    lines = pgkv("scan", "--json")[1].splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"]
    assert json.loads(lines[0])["encoding"] == "base64"
    assert pgkv("scan", "--prefix", "nothing") == (0, b"", b"")


def test_scan_of_many_pages(pgkv: Terminal, dsn: str) -> None:
    """A scan goes on beyond its page, and stops where its reader does."""
    with Store.connect(dsn) as store:
        store.set_many({f"k{number:05}": "v" * 50 for number in range(12_000)})
    assert pgkv("scan")[1].count(b"\n") == 12_000
    assert pgkv("scan", "--keys")[1].count(b"\n") == 12_000
    assert pgkv("scan", "--limit", "1234")[1].count(b"\n") == 1234
    command = f"'{sys.executable}' -m pgkv scan | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PGKV_DSN": dsn}
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, check=True, timeout=PATIENCE, env=environment
    )
    assert done.stdout.startswith(b"k00000\t")
    assert done.stderr == b""


def test_a_namespace_is_put_before_keys_and_taken_off(pgkv: Terminal) -> None:
    """--namespace holds for reading, writing, scanning and removing."""
    pgkv("set", "x", "plain")
    pgkv("set", "x", "spaced", "--namespace", "app:")
    assert pgkv("get", "app:x")[1] == b"spaced"
    assert pgkv("-n", "app:", "scan")[1] == b"x\tspaced\n"
    assert pgkv("delete", "--prefix", "", "-y", "-n", "app:")[1] == b"deleted 1\n"
    assert pgkv("scan")[1] == b"x\tplain\n"


def test_a_missing_table_is_left_missing_by_reading(pgkv: Terminal, dsn: str) -> None:
    """A mistyped --table is "not found", and leaves no table behind; set makes one."""
    for arguments in (["get", "k"], ["scan"], ["stats"], ["sweep"], ["delete", "k"]):
        code, out, err = pgkv(*arguments, "--table", "mistyped")
        assert (code, out) == (1, b"")
        assert b'"mistyped" does not exist' in err
        assert err.count(b"\n") == 1
    with psycopg.connect(dsn) as conn:
        assert conn.execute("SELECT to_regclass('mistyped')").fetchone() == (None,)
    assert pgkv("set", "k", "v", "--table", "made")[0] == 0
    assert pgkv("get", "k", "--table", "made")[1] == b"v"


def test_stats_and_sweep(pgkv: Terminal, dsn: str) -> None:
    """stats counts expired rows, sweep removes them."""
    with Store.connect(dsn) as store:
        store.set_many({f"k{number}": "value" for number in range(100)}, ttl=0.05)
        store.set("stays", "value")
        wait_until(lambda: store.count() == 1, "their time passes")
    found = pgkv.json("stats")
    assert (found["total_keys"], found["expired_keys"]) == (101, 100)
    assert b"expired, not yet collected\t100 (99%)\n" in pgkv("stats")[1]
    assert pgkv("sweep", "--limit", "40") == (0, b"deleted 40 expired rows\n", b"")
    assert pgkv.json("sweep") == {"deleted": 60}
    assert pgkv.json("stats")["total_keys"] == 1


def test_the_ddl_of_schema_is_what_the_store_needs(pgkv: Terminal, dsn: str) -> None:
    """What `pgkv schema` prints can be run, twice, and doctor finds the table in order."""
    _, ddl, _ = pgkv("schema", "--table", "planned")
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(ddl)
        conn.execute(ddl)
    with Store.connect(dsn, table_name="planned", auto_create_table=False) as store:
        store.set("k", "v")
    assert pgkv("doctor", "--table", "planned")[0] == 0


def test_a_refused_operation_is_one_line(pgkv: Terminal) -> None:
    """What the store refuses is exit code 2, said without a traceback."""
    code, _, err = pgkv("set", "k" * 2000, "v")
    assert code == 2
    assert err.count(b"\n") == 1
    code, _, err = pgkv("get", "k" * 2000, "--json")
    assert code == 2
    assert json.loads(err)["error"] == "InvalidKeyError"


def test_a_table_that_is_not_pgkvs(pgkv: Terminal, dsn: str) -> None:
    """Another application's table is named as such: the store cannot be used."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE foreign_one (id int)")
    code, _, err = pgkv("get", "k", "--table", "foreign_one")
    assert code == 3
    assert err.count(b"\n") == 1


def test_on_a_terminal_scan_is_a_table(
    pgkv: Terminal, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People get a table, cut off after a hundred rows, which is said; control characters are shown
    as text."""
    with Store.connect(dsn) as store:
        store.set_many({f"k{number:03}": "\x1b[31mred [bold]" for number in range(150)})
    monkeypatch.setattr("pgkv._cli.console.on_terminal", lambda: True)
    code, out, err = pgkv("scan")
    assert code == 0
    assert b"k099" in out
    assert b"k100" not in out
    assert b"\\x1b[31mred [bold]" in out
    assert b"--limit 0 shows all" in err
    assert b"k149" in pgkv("scan", "--limit", "0")[1]
    assert b"heap-only" in pgkv("stats")[1]
    assert b"0 failed, 0 warnings, 17 ok" in pgkv("doctor")[1]
