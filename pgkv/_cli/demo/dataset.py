"""Scenes: a real data set is loaded, and scanned in order.

The data is in every Python installation: the source of its library, and the names of Unicode.
"""

from __future__ import annotations

import random
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from .. import console
from .stage import Check, Stage, scene

UNICODE, SOURCE = "unicode/", "py/"
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
SAMPLE = 2000
FAVOURITE = "asyncio/tasks.py"


def collect(most: int) -> dict[str, str]:
    """Return at most that many entries: ``py/asyncio/tasks.py:000042`` is a line of the standard
    library, ``unicode/01F600`` the name of a character."""
    codes = ((code, unicodedata.name(chr(code), "")) for code in range(sys.maxunicode + 1))
    names = ((f"{UNICODE}{code:06X}", name) for code, name in codes if name)
    lines = chain.from_iterable(lines_of(*file) for file in source_files())
    return dict(islice(chain(islice(names, most // 3), lines, names), most))


def source_files(folder: str = "") -> Iterator[tuple[str, str]]:
    """Every module of the standard library, or of one folder of it: its path within, and its text."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted((root / folder).rglob("*.py")):
        inner = path.relative_to(root)
        if NOT_LIBRARY.isdisjoint(inner.parts):
            yield inner.as_posix(), path.read_text("utf-8", "replace").replace("\0", "")


def lines_of(name: str, text: str) -> Iterator[tuple[str, str]]:
    """A module's lines that are not blank, under keys that sort in their order."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{SOURCE}{name}:{number:06}", line


@scene("Loading", "Loading real data by COPY. Every key must arrive.")
def loading(stage: Stage) -> Iterator[str | Check]:
    stage.data = data = collect(stage.size.keys)
    with stage.bar("loading", len(data)) as advance:
        started = time.monotonic()
        stage.store.load(data.items(), progress=advance)
        seconds = time.monotonic() - started
    stage.store.vacuum()  # or autovacuum does it, while the next scene is timed
    found = stage.store.count()
    sample = random.sample(list(data), min(SAMPLE, len(data)))
    back = stage.store.get_many(sample)
    names = sum(key.startswith(UNICODE) for key in data)
    size = console.size(sum(len(key.encode()) + len(value.encode()) for key, value in data.items()))
    yield f"{names:,} names of characters, {len(data) - names:,} lines of Python's library: {size}"
    yield f"{len(data):,} keys in {console.duration(seconds)}: {len(data) / seconds:,.0f} a second"
    text = f"the store counts {found:,} keys, and {len(data):,} were written"
    yield Check(text, found == len(data))
    text = f"{len(sample):,} keys drawn at random hold what was written"
    yield Check(text, back == {key: data[key].encode() for key in sample})


@scene("Scanning", "A prefix or a range comes in the order of its bytes, complete.")
def scanning(stage: Stage) -> Iterator[str | Check]:
    started = time.monotonic()
    keys = [key for prefix in (SOURCE, UNICODE)
            for key in stage.store.iter_keys(prefix, page_size=5000)]  # fmt: skip
    seconds = time.monotonic() - started
    yield (
        f"{len(keys):,} keys in order in {console.duration(seconds)}: "
        f"{len(keys) / seconds:,.0f} a second"
    )
    names = sorted(
        {key[len(SOURCE) :].rpartition(":")[0] for key in keys if key.startswith(SOURCE)}
    )
    if names := names[:-1]:  # of the last one only a part may have been loaded
        name = FAVOURITE if FAVOURITE in names else max(names[:50], key=len)
        text = dict(source_files(name.rpartition("/")[0]))[name]
        found = [(key, value.decode()) for key, value in stage.store.scan(f"{SOURCE}{name}:")]
        said = f"a scan puts {name} together again, {len(found):,} lines in order"
        yield Check(said, found == list(lines_of(name, text)))
    kept = sorted(stage.data, key=str.encode)
    yield Check("all keys came once, in the order of their bytes", keys == kept)
