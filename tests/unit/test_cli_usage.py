"""The command line where no database is asked: options, usage errors, exit codes, and what is never shown."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from pgkv import __main__ as entry
from pgkv._cli import console
from pgkv._cli.command import UsageError, duration
from pgkv._cli.lock import _members
from pgkv.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    *("get", "set", "delete", "scan", "load", "dump", "stats", "sweep", "evict", "rewrite"),
    *(
        "doctor",
        "top",
        "dashboard",
        "schema",
        "migrate",
        "locks",
        "lock",
        "cache",
        "limits",
        "sessions",
        "idempotency",
        "queue",
    ),
    *("worker", "shards", "demo"),
)
NOWHERE = "postgresql://somebody:hunter2@127.0.0.1:1/db"


@pytest.fixture(autouse=True)
def _no_dsn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGKV_DSN", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def run_command(
    *arguments: str, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    env = {k: v for k, v in os.environ.items() if k not in ("PGKV_DSN", "DATABASE_URL")}
    return subprocess.run(
        [sys.executable, "-m", "pgkv", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
        env={**env, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pgkv COMMAND --help` says what it does, gives an example, and lists the common options."""
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example: " in said
    for option in ("--dsn", "--table", "--schema", "--namespace", "--json"):
        assert option in said


@pytest.mark.parametrize("command", ["set", "scan", "delete", "schema", "lock"])
def test_flags_take_no_value(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows a flag as a flag."""
    assert main([command, "--help"]) == 0
    assert "bool" not in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """`pgkv` alone shows what there is, the everyday first, and counts as wrong usage."""
    assert main([]) == 2
    said = capsys.readouterr().out
    shown = re.findall(r"^[^\w-]*([a-z]+)  ", said, re.MULTILINE)
    assert tuple(shown) == COMMANDS
    assert "--install-completion" in said


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """`pgkv --version` names it."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pgkv ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["get"],
        ["get", "a", "b"],
        ["get", "a", "--no-such-option"],
        ["set", "a"],
        ["set", "a", "b", "--nx", "--xx"],
        ["set", "a", "b", "--nx", "--if-version", "3"],
        ["set", "a", "b", "--ttl", "soon"],
        ["set", "a", "b", "--ttl", "0"],
        ["set", "a", "b", "--ttl", "-5s"],
        ["set", "a", "b", "--keep-ttl", "--ttl", "5"],
        ["delete"],
        ["delete", "a", "--prefix", "a"],
        ["scan", "--limit", "-1"],
        ["get", "a"],
        ["get", "a", "--dsn", "mysql://host/db"],
        ["get", "a", "--dsn", "postgresql://h/d", "--table", "t" * 60],
        ["get", "a", "--dsn", "postgresql://h/d", "--pooler", "sometimes"],
        ["--dsn", "postgresql://h/d", "--namespace", "", "get", "a"],
        ["limits", "--reset"],
        ["sessions"],
        ["sessions", "user:1", "--end", "ab", "--end-all"],
        ["demo", "--keys", "1"],
        ["demo", "--table", "t"],
        ["--namespace", "n:", "demo"],
        ["demo", "--timeout", "5"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with the arguments is said in one line on standard error."""
    assert main([*arguments, *(["--json"] if as_json else [])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    if as_json:
        assert set(json.loads(err)) == {"error", "message"}
    else:
        assert err.startswith("pgkv: ")


def test_an_unreachable_server_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing listens, one line says so, without the password."""
    assert main(["get", "a", "--dsn", NOWHERE]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "hunter2" not in err


@pytest.mark.parametrize("command", [["doctor"], ["scan"], ["stats", "--json"], ["delete", "a"]])
def test_every_command_reports_an_unreachable_server_alike(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 and one line, for commands that speak to the server each in their way."""
    assert main(["--dsn", NOWHERE, *command]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "hunter2" not in err


@pytest.mark.parametrize(
    "stray",
    [
        NOWHERE,
        "postgresql://somebody:hunter2@x@host/db",
        "host=h password=hunter2 user=u",
        "host=h password='hunter2 and more' user=u",
        "postgresql://h/db?user=u&password=hunter2",
    ],
)
def test_a_password_in_the_wrong_place_is_not_repeated(
    stray: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A DSN given as an argument too many is quoted by the error, its password is not."""
    assert main(["get", "a", stray]) == 2
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://u:hunter2@more@host/db", "postgresql://u:hunter2/more@host/db",
     "postgresql://u:p@hunter2@host", "postgresql://u:hunter2:more/x@host/db"],
)  # fmt: skip
def test_a_password_that_is_not_encoded_is_not_taken_for_a_host(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """libpq would look for a part of it in the DNS, and show it; here it is wrong usage."""
    assert main(["get", "a", "--dsn", dsn]) == 2
    said = capsys.readouterr().err
    assert "percent-encoded" in said
    assert "hunter2" not in said
    assert "more" not in said


def test_options_after_the_command_win(capsys: pytest.CaptureFixture[str]) -> None:
    """Common options stand before or after the command; the later ones count."""
    assert main(["--table", "before", "schema", "--no-locks", "--no-sessions"]) == 0
    assert '"before"' in capsys.readouterr().out
    assert main(["--table", "before", "schema", "--table", "after", "--no-locks"]) == 0
    said = capsys.readouterr().out
    assert '"after"' in said
    assert '"before"' not in said


def test_schema_prints_ddl_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    """The DDL of all tables that follow the type, in the schema and of the type asked for; with --json in an object."""
    assert main(["schema", "--schema", "app", "--regular"]) == 0
    said = capsys.readouterr().out
    assert said.count("CREATE TABLE IF NOT EXISTS") == 5
    assert 'CREATE SCHEMA IF NOT EXISTS "app"' in said
    assert main(["schema", "--json"]) == 0
    assert "UNLOGGED" in json.loads(capsys.readouterr().out)["sql"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("30s", 30), ("15m", 900), ("1h30m", 5400), ("7d", 604800),
     ("2w", 1209600), ("250ms", 0.25), (" 1h 5s ", 3605), ("1H", 3600)],
)  # fmt: skip
def test_durations_are_read(text: str, seconds: float) -> None:
    """Seconds, or numbers with units."""
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "h", "1x", "1h30", "-1", "0", "0s", "nan", "inf", "1h-5m", "1e"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    """Anything else, zero included, is wrong usage."""
    with pytest.raises(UsageError, match=r"duration|more than 0"):
        duration(text)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("plain", "plain"),
        ("é\n\t\\", "é\\n\\t\\\\"),
        (b"\xff\x00a", "\\xff\\x00a"),
        (b"text\n", "text\\n"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202eb", "a\\u202eb"),
    ],
)
def test_a_line_holds_no_control_character(value: str | bytes, line: str) -> None:
    """Keys and values are escaped before they reach a terminal or a line of text."""
    assert console.one_line(value) == line


def test_json_holds_any_value() -> None:
    """Text as text, anything else in base64."""
    assert console.json_value("é".encode()) == {"value": "é", "encoding": "utf-8"}
    assert console.json_value(b"\xff") == {"value": "/w==", "encoding": "base64"}


def test_without_its_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the pip command, exit code 2."""
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    assert entry.main() == 2
    said = capsys.readouterr().err
    assert "pip install 'pgkv-toolkit[cli]'" in said
    assert said.count("\n") == 1


def test_an_unforeseen_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A defect of pgkv's shows no traceback, unless it is asked for."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("pgkv.patterns.schema.schema_sql", broken)
    assert main(["schema"]) == 70
    assert "this should not happen: RuntimeError" in capsys.readouterr().err
    monkeypatch.setenv("PGKV_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["schema"])


def test_as_a_process() -> None:
    """`python -m pgkv` has the same exit codes, and no traceback reaches anybody."""
    for arguments, code in ((["--version"], 0), (["get"], 2), (["get", "a", "--dsn", NOWHERE], 3)):
        done = run_command(*arguments)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        assert b"hunter2" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["get", "k"],
        ["scan"],
        ["stats"],
        ["sweep"],
        ["evict", "--max-entries", "100"],
        ["delete", "k"],
        ["locks"],
        ["cache"],
        ["idempotency", "show", "k"],
    ],
    ids=" ".join,
)
def test_a_mistyped_embedded_path(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that only reads makes no database: exit code 1, and nothing is left behind."""
    assert main([*command, "--dsn", f"embedded://{tmp_path}/data"]) == 1
    assert "there is no embedded database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "spared"),
    [
        (["--version"], {"typer", "rich", "psycopg", "asyncio"}),
        (["get", "a", "--dsn", NOWHERE], {"rich", "pgkv.patterns.lock", "pgkv.patterns.cache"}),
    ],
)
def test_a_command_loads_what_it_needs(arguments: list[str], spared: set[str]) -> None:
    """Commands in scripts start often: neither the version nor a get loads what it does not use."""
    script = "import sys; from pgkv.__main__ import main; main(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert spared & set(done.stdout.split()) == set()


def test_completion_is_offered() -> None:
    """The shell's completion script comes from the command itself."""
    done = run_command(
        _PGKV_COMPLETE="source_bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert b"pgkv" in done.stdout
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_process_that_ends_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its directory in /proc is still listed, but a look into it says "no such process"."""

    def gone(*_: Any, **__: Any) -> Any:
        raise ProcessLookupError(errno.ESRCH, "No such process")

    monkeypatch.setattr(Path, "exists", gone)
    monkeypatch.setattr(Path, "read_bytes", gone)
    assert _members(os.getsid(0)) == set()
