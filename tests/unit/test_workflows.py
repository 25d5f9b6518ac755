"""The workflows run what there is: targets of the Makefile, on the versions that pgkv supports."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import pgkv
from tests import servers

ROOT = Path(__file__).parents[2]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"(?m)^([a-z-]+):.*## ", MAKEFILE))
# What a runner needs before `make`, and what a release compares. All else is the Makefile's.
PREPARATIONS = (
    "apt-get ",
    "systemctl stop ",
    "psql ",
    "choco install ",
    "Set-Service ",
    "test -f ",
)
PGDG = "/usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y"


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for workflow, content in WORKFLOWS.items():
        for name, job in content["jobs"].items():
            yield f"{workflow}/{name}", job


def lines() -> list[tuple[str, str]]:
    return [
        (name, line.strip())
        for name, job in jobs()
        for step in job.get("steps", ())
        for line in step.get("run", "").splitlines()
    ]


def commands() -> list[tuple[str, str]]:
    return [(job, line) for job, line in lines() if line.startswith("make ")]


@pytest.mark.parametrize(("job", "line"), lines())
def test_a_line_makes_a_target_or_prepares_the_runner(job: str, line: str) -> None:
    assert line.removeprefix("sudo ").startswith(("make ", *PREPARATIONS, PGDG))


@pytest.mark.parametrize(("job", "command"), commands())
def test_a_command_is_a_target_and_its_paths_exist(job: str, command: str) -> None:
    target, *settings = shlex.split(command)[1:]
    assert target in TARGETS
    for setting in settings:
        name, _, value = setting.partition("=")
        assert name in {"ARGS", "JOBS", "PYTHON"}
        paths = value.split() if name == "ARGS" else []
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_a_variable_is_one_that_is_read() -> None:
    """A DSN that no test looks at would be a job that tests nothing."""
    named = {
        name
        for _, job in jobs()
        for each in (job, *job.get("steps", ()))
        for name in each.get("env", {})
        if name.startswith("PGKV_")
    }
    read = "".join(
        path.read_text("utf-8") for path in [ROOT / "Makefile", *(ROOT / "tests").rglob("*.py")]
        if path != Path(__file__)
    )  # fmt: skip
    assert {name for name in named if name not in read} == set()
    assert named >= {
        *("PGKV_TEST_DSN", "PGKV_TEST_CITUS_DSN", "PGKV_TEST_POOLER_DSN", "PGKV_TEST_POSTGRES")
    }


def test_a_dsn_leads_to_a_service_of_its_job() -> None:
    """By name where the job runs in a container, else by a port that is published."""
    for name, job in jobs():
        services = job.get("services", {})
        for variable, dsn in job.get("env", {}).items():
            if services and variable.endswith("_DSN"):
                found = re.fullmatch(r"postgresql://[\w:]+@([\w.]+)(?::(\d+))?/postgres", dsn)
                assert found, (name, dsn)
                host, port = found.groups()
                if "container" in job:
                    assert host in services
                else:
                    published = [
                        each.partition(":")[0] for s in services.values() for each in s["ports"]
                    ]
                    assert (host, port in published) == ("127.0.0.1", True)


@pytest.mark.skipif(
    importlib.util.find_spec("check_jsonschema") is None, reason="check-jsonschema is not installed"
)
@pytest.mark.parametrize(
    ("schema", "files"), [("github-workflows", "workflows/*.yml"), ("dependabot", "dependabot.yml")]
)
def test_they_are_what_github_reads(schema: str, files: str) -> None:
    """Keys, types and triggers, by the schemas that check-jsonschema brings."""
    paths = map(str, (ROOT / ".github").glob(files))
    options = ["--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *options, *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_checks_of_make_test_all_run() -> None:
    run = {command.split()[1] for _, command in commands()}
    assert run >= {"lint", "types", "imports", "tests", "package", "docs", "test-all"}


def test_the_matrix_is_what_the_project_says_it_supports() -> None:
    matrix = WORKFLOWS["test"]["jobs"]["linux"]["strategy"]["matrix"]
    pythons = set(matrix["python"])
    stated = {
        each.rpartition(" ")[2]
        for each in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", each)
    }
    assert pythons == stated
    assert min(pythons, key=lambda each: int(each[2:])) == PROJECT["requires-python"][2:]
    assert matrix["postgres"] == [14, 15, 16, 17, 18]
    assert [(each["python"], each["may-fail"]) for each in matrix["include"]] == [("3.14t", True)]


def test_a_cell_of_the_matrix_tests_its_own_postgresql() -> None:
    """Other versions that a runner has are left out."""
    env = WORKFLOWS["test"]["jobs"]["linux"]["env"]
    assert env["PGKV_TEST_POSTGRES"] == "${{ matrix.postgres }}"


@pytest.mark.skipif(os.name != "posix" or not servers.installed(), reason="no PostgreSQL here")
def test_only_the_postgresql_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests are all there, as of the newest; a version that is missing is an error, not a run of none."""
    found = servers.installed()
    for major in found:
        monkeypatch.setattr(servers, "ONLY", f"{major}")
        assert servers.installed.__wrapped__() == {major: found[major]}
    monkeypatch.setattr(servers, "ONLY", "9")
    with pytest.raises(LookupError, match="PGKV_TEST_POSTGRES: no PostgreSQL 9 here"):
        servers.installed.__wrapped__()


def test_a_cell_without_wheels_installs_what_there_is() -> None:
    """The default of EXTRAS is the Makefile's; the cell leaves out `binary`."""
    linux = WORKFLOWS["test"]["jobs"]["linux"]
    [extras] = re.findall(r"(?m)^EXTRAS \?= (\S+)$", MAKEFILE)
    assert linux["env"]["EXTRAS"] == f"${{{{ matrix.extras || '{extras}' }}}}"
    [cell] = linux["strategy"]["matrix"]["include"]
    assert set(cell["extras"].split(",")) == set(extras.split(",")) - {"binary"}


def test_a_package_is_built_and_checked() -> None:
    """As it is uploaded: what is inside, and how it looks to its users."""
    recipe = MAKEFILE.partition("\npackage:")[2].partition("\n\n")[0]
    run = re.findall(r"(?m)^\t@\$\(BIN\)/(?:python -m )?([\w-]+)", recipe)
    assert run == ["build", "twine", "check-wheel-contents", "pyroma"]


def test_checkouts_are_pinned() -> None:
    """Each suite of another project has a commit of it."""
    script = (ROOT / "tests" / "upstream.sh").read_text("utf-8")
    suites = (ROOT / "tests" / "integrations" / "test_suites.py").read_text("utf-8")
    pinned = re.findall(r"(?m)^[\w-]+/([\w-]+) [0-9a-f]{40}$", script)
    assert sorted(pinned) == sorted(re.findall(r'(?m)^@needs\("([\w-]+)"\)$', suites))


def test_checkouts_in_the_workspace_are_not_linted() -> None:
    """`make test-all` finds other people's code there."""
    file = ".servers/upstream/flask/app.py"
    command = ["ruff", "check", "--no-cache", "--force-exclude", "--stdin-filename", file, "-"]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, input=b"import os", check=False
    )
    assert done.returncode == 0


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
@pytest.mark.skipif(os.name != "posix", reason="the script is for a POSIX shell")
@pytest.mark.parametrize("in_ci", [True, False])
def test_a_checkout_that_cannot_be_had(tmp_path: Path, *, in_ci: bool) -> None:
    """Its suite is skipped, except in CI: there a job that tests nothing does not pass."""
    (tmp_path / "tests").mkdir()
    script = shutil.copy(ROOT / "tests" / "upstream.sh", tmp_path / "tests")
    nowhere = {  # as git's configuration: an address that does not exist
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/absent/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
        "CI": "true" if in_ci else "",
    }
    done = subprocess.run(
        ["sh", script], env=os.environ | nowhere, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("cannot be had: its suite is skipped") == 5
    assert done.returncode == in_ci
    assert not [*(tmp_path / ".servers" / "upstream").glob("*")]


def test_no_job_may_write_but_those_that_publish() -> None:
    assert all(each["permissions"] == {"contents": "read"} for each in WORKFLOWS.values())
    writing = {name for name, job in jobs() if "write" in (job.get("permissions") or {}).values()}
    assert writing == {"release/publish", "docs/publish"}


def test_a_release_is_tested_first() -> None:
    release = WORKFLOWS["release"]["jobs"]
    assert release["publish"]["needs"] == "test"
    assert release["test"]["uses"] == "./.github/workflows/test.yml"
    may_fail = {
        name for name, job in WORKFLOWS["test"]["jobs"].items() if "continue-on-error" in job
    }
    assert may_fail == {"linux", "macos", "windows"}  # of Linux, one cell


def test_windows_runs_what_needs_no_posix() -> None:
    """A module that forks, or has signals of POSIX, cannot even be collected there."""
    [command] = [command for job, command in commands() if job == "test/windows"]
    [paths] = [each for each in shlex.split(command) if each.startswith("ARGS=")]
    files = paths.removeprefix("ARGS=").split()
    assert len(files) >= 6
    for file in files:
        text = (ROOT / file).read_text("utf-8")
        assert not re.search(
            r"import (fcntl|pty|pwd|resource|termios)|os\.(fork|kill|getuid)|signal\.SIG", text
        )


def test_nodes_of_citus_can_move_logged_tables() -> None:
    nodes = [
        service
        for service in WORKFLOWS["test"]["jobs"]["citus"]["services"].values()
        if "citus" in service["image"]
    ]
    assert len(nodes) == 3
    assert all("wal_level=logical" in each["env"]["POSTGRES_INITDB_ARGS"] for each in nodes)


def test_the_version_has_a_dated_section() -> None:
    """The changelog begins with the version that a tag would publish."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first = re.search(r"(?m)^## (\S+) - (\d{4}-\d\d-\d\d)$", text)
    assert first is not None
    assert first[1] == pgkv.__version__
    assert not re.search(r"(?mi)^## .*unreleased", text)
