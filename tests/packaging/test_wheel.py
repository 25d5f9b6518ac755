"""What is published is what is in the repository, and works where the repository is not."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Built, Installed

# The first test pays for the build and the installation.
pytestmark = [pytest.mark.packaging, pytest.mark.timeout(1000)]

IMPORT_EVERY_NAME = """
import pgkv, pgkv.patterns
for name in pgkv.__all__:
    getattr(pgkv, name)
print(pgkv.__file__, pgkv.patterns.__file__, sep="\\n")
"""


def modules_of_the_source() -> set[str]:
    core = {
        path
        for path in (ROOT / "pgkv").rglob("*.py")
        if "patterns" not in path.relative_to(ROOT).parts
    }
    patterns = set((ROOT / "patterns").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in core} | {
        f"pgkv/{path.relative_to(ROOT).as_posix()}" for path in patterns
    }


def test_wheel_holds_every_module(built: Built) -> None:
    """The wheel, made from the sdist, holds each module of pgkv/ and patterns/ and the mark that says it is typed."""
    names = zipfile.ZipFile(built.wheel).namelist()
    packed = {name for name in names if name.endswith(".py")}
    assert modules_of_the_source() == packed, (
        "is a new package missing from [tool.setuptools] packages?"
    )
    assert "pgkv/patterns/__init__.py" in packed
    assert {"pgkv/py.typed", "pgkv/integrations/dashboard.css"} <= {*names}


def test_wheel_holds_nothing_else(built: Built) -> None:
    """Installing pgkv puts one import package into site-packages: no tests, no top-level `patterns`."""
    tops = {name.split("/")[0] for name in zipfile.ZipFile(built.wheel).namelist()}
    assert {"pgkv"} == {top for top in tops if not top.endswith(".dist-info")}


def test_sdist_holds_licence(built: Built) -> None:
    """The sdist carries the licence and the patterns as files, not as a link that points out of the archive."""
    with tarfile.open(built.sdist) as archive:
        members = {"/".join(member.name.split("/")[1:]): member for member in archive.getmembers()}
    assert "LICENSE" in members
    assert members["patterns/__init__.py"].isreg()
    assert not any(member.issym() or member.islnk() for member in members.values())


def test_imports_from_an_empty_directory(installed: Installed, tmp_path: Path) -> None:
    """Every public name can be imported from the installed wheel alone."""
    done = installed.run("python", "-c", IMPORT_EVERY_NAME, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(installed.bin.parent), "not the installed pgkv"


def test_imports_beside_a_users_patterns_module(installed: Installed, tmp_path: Path) -> None:
    """An application may have a `patterns.py` of its own: pgkv neither loads it nor hides it."""
    (tmp_path / "patterns.py").write_text("whose = 'mine'\n")
    check = "import sys; assert 'patterns' not in sys.modules; import patterns; assert patterns.whose == 'mine'"
    for script in (IMPORT_EVERY_NAME + check, "import patterns\n" + IMPORT_EVERY_NAME):
        done = installed.run("python", "-c", script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [("python", "-m", "pgkv"), ("pgkv",)], ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "demo"])
def test_command_without_its_extra(
    installed: Installed, tmp_path: Path, command: tuple[str, ...], option: str
) -> None:
    """Without the cli extra the command fails by saying what to install."""
    done = installed.run(*command, option, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "pip install" in said
    assert "pgkv-toolkit[cli" in said
    assert "Traceback" not in said
