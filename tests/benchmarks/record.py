"""docs/benchmarks.json: what was measured, on what, with what."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import msgspec

from tests.benchmarks.figures import Fact, Result

PACKAGES = ("psycopg", "psycopg-binary", "psycopg-pool", "redis", "hiredis", "asyncpg")


class Record(msgspec.Struct):
    """One run of the benchmark."""

    machine: dict[str, str]
    versions: dict[str, str]
    rounds: int
    pinned: bool
    results: list[Result]
    facts: list[Fact]


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


def load() -> float:
    """How many processes wanted to run during the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def versions(servers: dict[str, str]) -> dict[str, str]:
    """Of the interpreter, the servers and the clients."""
    return (
        {"Python": platform.python_version()}
        | servers
        | {package: version(package) for package in PACKAGES}
    )


def write(path: Path, record: Record) -> None:
    """Write a record, readable and stable under diff."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read(path: Path) -> Record:
    """Read a record."""
    return msgspec.json.decode(path.read_bytes(), type=Record)
