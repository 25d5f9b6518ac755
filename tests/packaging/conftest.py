"""Builds pgkv as a release does, once per run, and installs it where nothing else is."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "_build", "data"
)


@dataclass(frozen=True)
class Built:
    """What `python -m build` made: the sdist, and the wheel made from that sdist."""

    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Installed:
    """A fresh environment with the wheel, its dependencies and libpq, and no other extra."""

    bin: Path

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in cwd, seeing nothing of the one that runs the tests."""
        return run([str(self.bin / command[0]), *command[1:]], cwd=cwd, timeout=300)


def run(command: list[str], *, cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHON", "PGKV_", "VIRTUAL_ENV", "DATABASE_URL")
    environment: Mapping[str, str] = {
        k: v for k, v in os.environ.items() if not k.startswith(hidden)
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def run_or_fail(command: list[str], *, cwd: Path, timeout: float) -> None:
    done = run(command, cwd=cwd, timeout=timeout)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    # A copy: setuptools leaves build/ and egg-info beside the source, and what an earlier build left would go along.
    source = tmp_path_factory.mktemp("source") / "pgkv"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_BEHIND)
    out = tmp_path_factory.mktemp("dist")
    run_or_fail(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        cwd=out,
        timeout=300,
    )
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("installed")
    venv.create(home)
    environment = Installed(home / ("Scripts" if os.name == "nt" else "bin"))
    # By the pip that is here: one of its own takes longer to install than all that it would install.
    pip = [sys.executable, "-m", "pip", "--python", str(home), "install", "--quiet", "--no-compile"]
    # [binary]: without libpq on the machine psycopg cannot be imported at all.
    run_or_fail([*pip, f"{built.wheel}[binary]"], cwd=home, timeout=300)
    return environment
