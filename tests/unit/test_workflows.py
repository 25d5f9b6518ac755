"""The workflows run what there is: targets of the Makefile, on the versions that pgkv supports."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import pgkv

ROOT = Path(__file__).parents[2]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TARGETS = set(re.findall(r"(?m)^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8")))


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for workflow, content in WORKFLOWS.items():
        for name, job in content["jobs"].items():
            yield f"{workflow}/{name}", job


def commands() -> list[tuple[str, str]]:
    return [
        (name, line.strip())
        for name, job in jobs()
        for step in job.get("steps", ())
        for line in step.get("run", "").splitlines()
        if line.strip().startswith("make ")
    ]


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
    assert named >= {"PGKV_TEST_DSN", "PGKV_TEST_CITUS_DSN", "PGKV_TEST_POOLER_DSN"}


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


def test_no_job_may_write_but_those_that_publish() -> None:
    assert all(each["permissions"] == {"contents": "read"} for each in WORKFLOWS.values())
    writing = {name for name, job in jobs() if "write" in (job.get("permissions") or {}).values()}
    assert writing == {"release/publish", "docs/publish"}


def test_a_release_is_tested_first() -> None:
    release = WORKFLOWS["release"]["jobs"]
    assert release["publish"]["needs"] == "test"
    assert release["test"]["uses"] == "./.github/workflows/test.yml"


def test_the_version_has_a_dated_section() -> None:
    """The changelog begins with the version that a tag would publish."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first = re.search(r"(?m)^## (\S+) - (\d{4}-\d\d-\d\d)$", text)
    assert first is not None
    assert first[1] == pgkv.__version__
    assert not re.search(r"(?mi)^## .*unreleased", text)
