"""The workflows run what there is: targets of the Makefile, on the versions that pgkv supports."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

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
        assert name == "ARGS"
        assert [path for path in value.split() if not (ROOT / path).exists()] == []


def test_the_checks_of_make_test_all_run() -> None:
    run = {command.split()[1] for _, command in commands()}
    assert run >= {"lint", "types", "imports", "tests", "package", "docs", "test-all"}


def test_the_matrix_is_what_the_project_says_it_supports() -> None:
    matrix = WORKFLOWS["test"]["jobs"]["linux"]["strategy"]["matrix"]["include"]
    pythons = {each["python"] for each in matrix if not each.get("may-fail")}
    stated = {
        each.rpartition(" ")[2]
        for each in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", each)
    }
    assert pythons == stated
    assert min(pythons, key=lambda each: int(each[2:])) == PROJECT["requires-python"][2:]
    assert {each["postgres"] for each in matrix} == {14, 15, 16, 17, 18}
    assert [each["python"] for each in matrix if each.get("may-fail")] == ["3.14t"]


def test_no_job_may_write_but_those_that_publish() -> None:
    assert all(each["permissions"] == {"contents": "read"} for each in WORKFLOWS.values())
    writing = {name for name, job in jobs() if "write" in (job.get("permissions") or {}).values()}
    assert writing == {"release/publish", "docs/publish"}


def test_a_release_is_tested_first() -> None:
    release = WORKFLOWS["release"]["jobs"]
    assert release["publish"]["needs"] == "test"
    assert release["test"]["uses"] == "./.github/workflows/test.yml"
