"""docs/benchmarks.json: what was measured, on what, with what."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.benchmarks.figures import Fact, Result

Measured = TypeVar("Measured", Result, Fact)

DRIVERS = ("psycopg", "psycopg-binary", "psycopg-pool", "asyncpg", "redis", "hiredis")
LIBRARIES = (
    "pymemcache", "libmc", "dogpile.cache", "cashews", "aiocache", "diskcache", "limits",
    "throttled-py", "pyrate-limiter", "starlette", "Django", "Flask-Session", "starsessions",
    "python-redis-lock",
)  # fmt: skip


class Section(msgspec.Struct):
    """What was measured of one topic."""

    topic: str
    results: list[Result]
    facts: list[Fact]


class Record(msgspec.Struct):
    """One run of the benchmark, or several with the same settings on the same machine.

    `costs` is what the machine itself takes: see `tests.benchmarks.machine`.
    """

    machine: dict[str, str]
    versions: dict[str, str]
    rounds: int
    sections: list[Section]
    costs: dict[str, float] = {}

    @property
    def results(self) -> list[Result]:
        """Of all topics."""
        return [result for section in self.sections for result in section.results]

    @property
    def facts(self) -> list[Fact]:
        """Of all topics."""
        return [fact for section in self.sections for fact in section.facts]


def machine() -> dict[str, str]:
    """What kind of machine this is; not which."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"system": platform.system(), "architecture": platform.machine(), "cores": str(cores)}
    if processor := _processor():
        found["processor"] = processor
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{memory / 1024**3:.0f} GiB"
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def versions(servers: dict[str, str]) -> dict[str, str]:
    """Of the interpreter, the servers and the clients."""
    found = {"Python": platform.python_version()} | servers
    for package in DRIVERS + LIBRARIES:
        with suppress(PackageNotFoundError):  # its entrants are left out
            found[package] = version(package)
    return found


def merged(old: Record, new: Record) -> Record:
    """The new record, completed by what only the old one has.

    Raises:
        ValueError: their figures are not comparable.
    """
    differing = [
        name for name in ("machine", "rounds") if getattr(old, name) != getattr(new, name)
    ] + [
        name
        for name in old.versions
        if new.versions.get(name, old.versions[name]) != old.versions[name]
    ]
    if differing:
        raise ValueError(f"the record is of another run: {', '.join(differing)} differ")
    sections = {section.topic: section for section in old.sections}
    for section in new.sections:
        before = sections.get(section.topic, Section(section.topic, [], []))
        sections[section.topic] = Section(
            section.topic,
            _replaced(before.results, section.results),
            _replaced(before.facts, section.facts),
        )
    # The costs belong to times; sizes and shares do not depend on them.
    costs = new.costs if new.results else old.costs
    versions = new.versions | old.versions
    return Record(new.machine, versions, new.rounds, list(sections.values()), costs)


def completed(old: Record, new: Record) -> Record:
    """The new record of a whole run, with the topics that only other runs measure."""
    if old.machine == new.machine:
        topics = {section.topic for section in new.sections}
        new.sections += [section for section in old.sections if section.topic not in topics]
    return new


def _replaced(old: list[Measured], new: list[Measured]) -> list[Measured]:
    """Each where it was; what is new at the end."""

    def name(each: Result | Fact) -> tuple[str, str]:
        return each.case, each.placement if isinstance(each, Result) else ""

    return list(({name(each): each for each in old} | {name(each): each for each in new}).values())


def write(path: Path, record: Record) -> None:
    """Write a record, readable and stable under diff."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read(path: Path) -> Record:
    """Read a record."""
    return msgspec.json.decode(path.read_bytes(), type=Record)
