"""The programs in examples/ run, do what they say, print what docs/examples.md shows, and leave nothing behind."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from tests import servers
from tests.faults.support import newest

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
PAGE = (ROOT / "docs" / "examples.md").read_text()
SHOWN = {
    name: output.splitlines()
    for name, output in re.findall(r"(?ms)^\$ python examples/(\w+)\.py\n(.*?)^```$", PAGE)
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")

Run = Callable[[str], list[str]]


def environment(**settings: str) -> dict[str, str]:
    """This one, with the database of the settings or none."""
    kept = {name: value for name, value in os.environ.items() if name != "PGKV_DSN"}
    return {**kept, "PYTHONPATH": str(ROOT), **settings}


def program(
    *command: str | Path, where: Path = ROOT, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run Python as a reader would, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=where,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=200,  # it takes seconds, but for a busy machine
        check=False,
    )


def shape(lines: list[str]) -> list[str]:
    """Lines without their numbers."""
    return [NUMBER.sub("N", line) for line in lines]


def numbers(line: str) -> list[float]:
    return [float(found) for found in NUMBER.findall(line)]


@pytest.fixture
def run(dsn: str) -> Iterator[Run]:
    """What an example prints. It succeeds, prints lines like those of the page, and cleans up."""

    def lines_of(name: str) -> list[str]:
        done = program(EXAMPLES[name], PGKV_DSN=dsn)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert shape(lines) == shape(SHOWN[name])
        return lines

    yield lines_of
    with psycopg.connect(dsn) as conn:
        left = conn.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ '^pgkv_example'")
        assert left.fetchall() == []


@newest
def test_fastapi_service(run: Run) -> None:
    """Two instances admit five of eight requests together, compute once, share a login, and run a
    nightly job once."""
    lines = run("fastapi_service")
    assert lines[0] == "quotes, refusals: (5, 3)"
    assert lines[2:] == SHOWN["fastapi_service"][2:]


@newest
def test_flask_service(run: Run) -> None:
    """Two instances admit five passwords together, log one device out from another, and share a
    report and a nightly job."""
    lines = run("flask_service")
    assert [*lines[:3], *lines[4:]] == [*SHOWN["flask_service"][:3], *SHOWN["flask_service"][4:]]


@newest
def test_worker_fleet(run: Run) -> None:
    """Tokens rise past a killed and a paused worker; the paused one's write is refused, and every
    turn that was accepted counts."""
    lines = run("worker_fleet")
    killed, second, paused, third, late = (int(numbers(line)[0]) for line in lines[:5])
    assert killed < second < paused < third
    assert late == paused
    assert lines[5] == "8 turns were accepted, the total is 8"


@newest
def test_order_pipeline(run: Run) -> None:
    """Three workers are killed, and each order is paid once and shipped once."""
    lines = run("order_pipeline")
    assert lines[3:5] == ["paid: 40 times, 40 orders", "shipped: 40 times, 40 orders"]


@newest
def test_leader_cron(run: Run) -> None:
    """Three leaders in turn, of rising terms; no tick is doubled or lost."""
    lines = run("leader_cron")
    (one, first, _), (two, second, _), (three, third, _) = (numbers(lines[n]) for n in (0, 2, 4))
    assert len({one, two, three}) == 3
    assert first < second < third
    assert re.fullmatch(r"\d+ ticks, 0 doubled, 0 missing", lines[-1])


@newest
def test_periodic_jobs(run: Run) -> None:
    """A scheduler is killed, another goes on, and each slot runs once."""
    lines = run("periodic_jobs")
    [killed], [next_one] = numbers(lines[0]), numbers(lines[1])
    assert killed != next_one
    assert re.fullmatch(r"\d+ runs, 0 doubled, 0 missing", lines[-1])


@newest
def test_scraper(run: Run) -> None:
    """Forty-eight requests of four processes take as long as the rate asks."""
    requests, processes, seconds = numbers(run("scraper")[0])
    assert (requests, processes) == (48, 4)
    assert seconds >= (48 - 5 - 4) / 20 - 0.1  # the burst, one on its way per process; rounding


@newest
def test_memoize(run: Run) -> None:
    """A remembered answer is not counted again, as it sees for itself, and four processes count once."""
    lines = run("memoize")
    assert sorted(numbers(lines[2])[-4:]) == [0, 0, 0, 1]


@newest
def test_payments(run: Run) -> None:
    """Each kill doubles a payment that is recorded apart, and none that is recorded with it."""
    apart, together = run("payments")
    assert numbers(apart) == [6, 2, 8, 2]
    assert numbers(together) == [6, 2, 6, 0]


@newest
def test_transactional_invalidation(run: Run) -> None:
    """A rollback keeps the cached price, a commit ends it; a cache by hand falls behind the table,
    this one does not."""
    first, by_hand, cached = run("transactional_invalidation")
    assert numbers(first) == [100, 100, 101]
    assert numbers(by_hand)[1] > 0
    assert numbers(cached)[0] > 10
    assert numbers(cached)[1] == 0


@newest
def test_feature_flags(run: Run) -> None:
    """No editor's work is lost, a rollout grows by users and loses none, and checks ask the memory."""
    lines = run("feature_flags")
    assert lines[0].startswith("20 of 20 ")
    few, _, share, more, _ = numbers(lines[1])
    assert 0 < few < more
    assert share == 20
    assert lines[1].endswith("the former among them")
    assert numbers(lines[2])[1] < 100


@pytest.mark.skipif(not servers.installed(), reason="no PostgreSQL server programs here")
def test_an_example_without_a_database_starts_one(tmp_path: Path) -> None:
    """With nothing but the file an example runs, on a server of its own that is gone afterwards."""
    directory = servers.new_directory("examples")
    copy = tmp_path / "memoize.py"
    copy.write_text(EXAMPLES["memoize"].read_text())
    done = program(copy, where=tmp_path, TMPDIR=str(directory))
    assert done.returncode == 0, done.stderr
    assert list(directory.iterdir()) == []


def last_block(path: Path) -> str:
    return path.read_text().split('if __name__ == "__main__":\n')[1]


@pytest.mark.parametrize("path", EXAMPLES.values(), ids=EXAMPLES)
def test_examples_begin_and_end_alike(path: Path) -> None:
    """Each says how to run it and what to look at, and finds its database by the same lines."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python examples/{path.name}" in text
    assert "\n\nLook at: " in text
    assert last_block(path) == last_block(EXAMPLES["scraper"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_tested_and_shown(name: str) -> None:
    """No example goes unrun, and docs/examples.md links each one and shows its output."""
    assert f"test_{name}" in globals()
    assert f"(../examples/{name}.py)" in PAGE
    assert set(SHOWN) == set(EXAMPLES)


@newest
def test_the_fastapi_service_is_served_by_uvicorn(dsn: str) -> None:
    """`uvicorn examples.fastapi_service:app` answers, and ends in order when it is told to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = ["-m", "uvicorn", "examples.fastapi_service:app", "--fd", str(listener.fileno())]
        service = subprocess.Popen(
            [sys.executable, "-W", "error", *command],
            cwd=ROOT,
            env=environment(PGKV_DSN=dsn),
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            port = listener.getsockname()[1]
            answer = httpx.get(f"http://127.0.0.1:{port}/me", timeout=servers.PATIENCE)
        finally:
            service.send_signal(signal.SIGTERM)
            log = service.communicate(timeout=servers.PATIENCE)[1]
    assert answer.status_code == 401
    assert "Application shutdown complete" in log


@newest
def test_the_flask_service_is_found_by_flask(dsn: str) -> None:
    """`flask --app examples.flask_service` finds the factory."""
    done = program("-m", "flask", "--app", "examples.flask_service", "routes", PGKV_DSN=dsn)
    with psycopg.connect(dsn) as conn:
        conn.execute("DROP SCHEMA pgkv_example_flask CASCADE")
    assert done.returncode == 0, done.stderr
    assert "/devices" in done.stdout
