"""load and dump: many keys at once, by COPY."""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgkv
from pgkv._engine import load as _load
from pgkv.cli import main
from pgkv.testing import ServerClock
from tests.benchmarks.redis_server import open_redis


async def test_load(store: Any, clock: ServerClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """load writes every item of any iterable, in chunks, with its ttl by the server's clock; of a
    repeated key the last item counts."""
    monkeypatch.setattr(_load, "CHUNK_ROWS", 1_000)
    clock.set_offset(-7200)
    heard: list[int] = []
    items: list[tuple[Any, ...]] = [(f"k{n:05}", b"%d" % n) for n in range(2_500)]
    items += [("ž\\", "ž\t\n\\N"), ("ttl", b"", 60), ("none", b"x", None), ("k00000", b"last")]
    assert await store.load(iter(items), progress=heard.append) == 2_504
    assert heard == [1_000, 2_000, 2_504]
    assert await store.count() == 2_503
    assert await store.get("k02499") == b"2499"
    assert await store.get("k00000") == b"last"
    assert await store.get_string("ž\\") == "ž\t\n\\N"
    assert 50 < await store.ttl("ttl") <= 60
    assert await store.ttl("none") == float("inf")
    entry = await store.get_entry("k00001")
    assert abs((entry.updated_at - clock.now()).total_seconds()) < 60
    assert await store.load([]) == 0


async def test_load_over_what_is_there(store: Any, clock: ServerClock) -> None:
    """A key that is there is overwritten as by set: a new version, and no earlier ttl; an expired
    one begins again."""
    version = await store.set("live", b"old", ttl=60)
    await store.set("dead", b"old", ttl=1)
    clock.advance(2)
    assert await store.load([("live", b"new"), ("dead", b"new", 60), ("new", b"new")]) == 3
    entry = await store.get_entry("live")
    assert entry.value == b"new"
    assert entry.version > version
    assert entry.expires_at is None
    dead = await store.get_entry("dead")
    assert 50 < dead.ttl() <= 60
    assert abs((dead.created_at - clock.now()).total_seconds()) < 60


@pytest.mark.parametrize(
    ("items", "kind", "why"),
    [
        ([("k",)], pgkv.InvalidValueError, "give"),
        (["k"], pgkv.InvalidValueError, "give"),
        ([("k", b"", 1, 2)], pgkv.InvalidValueError, "give"),
        (7, pgkv.InvalidValueError, "must be an iterable, not int"),
        ([("", b"")], pgkv.InvalidKeyError, "empty"),
        ([("k", 7)], pgkv.InvalidValueError, "int"),
        ([("k", b"", 0)], pgkv.InvalidValueError, "more than 0"),
    ],
)
async def test_bad_items(store: Any, items: Any, kind: type[Exception], why: str) -> None:
    """A bad item is refused with its own error, before anything of its chunk is sent."""
    with pytest.raises(kind, match=why):
        await store.load(items)
    assert await store.count() == 0


async def test_load_fails_in_the_middle(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `progress` heard of is written, and nothing of the chunk that failed."""
    monkeypatch.setattr(_load, "CHUNK_ROWS", 1_000)
    heard: list[int] = []

    def items() -> Iterator[tuple[str, bytes]]:
        yield from ((f"k{n:05}", b"v") for n in range(2_500))
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError, match="the source ended"):
        await store.load(items(), progress=heard.append)
    assert await store.count() == heard[-1] == 2_000
    async with store.transaction() as tx:
        with pytest.raises(pgkv.ConfigError, match="a transaction of its own"):
            await tx.load([("k", b"v")])


async def test_a_namespace_and_a_race(store: Any) -> None:
    """Keys get the namespace's prefix; loads of the same keys at once do not deadlock."""
    inner = store.namespace("app:")
    rows = [(f"k{n}", b"v") for n in range(3_000)]
    await asyncio.gather(inner.load(rows), inner.load(rows[::-1]), store.load(rows))
    assert await inner.count() == 3_000
    assert await store.count() == 6_000


def run(*args: str) -> int:
    return main(list(args))


def test_dump_and_load(
    dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dump prints load writes: bytes, text and the time left."""
    with pgkv.Store.connect(dsn) as store:
        store.set_many({f"k{n:04}": f"v{n}" for n in range(1_203)})
        store.set("bytes", b"\x00\xff\n")
        store.set("ttl", "x", ttl=3600)
        assert run("dump", "--dsn", dsn) == 0
        lines = capsys.readouterr().out
        assert len(lines.splitlines()) == 1_205
        assert run("load", "--dsn", dsn, "--table", "copy", _file(tmp_path, lines)) == 0
        assert capsys.readouterr().out == "wrote 1,205 keys\n"
        copy = store.table("copy")
        assert dict(copy.iter_items()) == dict(store.iter_items())
        assert 3500 < (copy.ttl("ttl") or 0) <= 3600
        monkeypatch.setattr("sys.stdin", io.StringIO('a,"x,y"\nb,z,60\n'))
        assert run("load", "--dsn", dsn, "--table", "csv", "-", "--csv", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"written": 2}
        assert store.table("csv").get("a") == b"x,y"
        assert 50 < (store.table("csv").ttl("b") or 0) <= 60


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ('{"key": "k"}\n', [], "line 1 is not a JSON object"),
        ('\n{"key": "k", "value": "SECRET!", "encoding": "base64"}\n', [], "line 2"),
        ("SECRET\n", ["--csv"], "row 1 is not"),
    ],
)
def test_bad_lines(
    dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, options: Any, why: str
) -> None:
    """A bad line is named by its number, and not quoted."""
    assert run("load", "--dsn", dsn, _file(tmp_path, text), *options) == 2
    said = capsys.readouterr().err
    assert why in said
    assert "SECRET" not in said


DOCS = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"


def test_from_a_redis_dump(
    dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of the documentation, over a Redis that was started from an RDB file: strings with
    their expiry, any bytes, nothing else."""
    program = re.search(
        r"```text\n(import base64.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL
    )
    assert program is not None
    script = tmp_path / "redis_strings.py"
    script.write_text(program[1], encoding="utf-8")
    rdb = {"dir": str(tmp_path), "dbfilename": "dump.rdb"}
    with open_redis(**rdb) as (client, why):
        if client is None:
            pytest.skip(why)
        pipe = client.pipeline()
        for n in range(2_345):
            pipe.set(f"k{n}", b"\x00\xff" + str(n).encode())
        pipe.set("ttl", "soon", ex=3600).hset("hash", "a", "1").execute()
        client.save()
    with open_redis(**rdb) as (client, _):
        assert client is not None
        url = f"unix://{client.connection_pool.connection_kwargs['path']}"
        command = [sys.executable, str(script), url]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run("load", "--dsn", dsn, "-", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"written": 2_346}
    with pgkv.Store.connect(dsn) as store:
        assert store.count() == 2_346
        assert store.get("k2344") == b"\x00\xff2344"
        assert 3000 < (store.ttl("ttl") or 0) <= 3600


def _file(tmp_path: Path, text: str) -> str:
    (tmp_path / "rows").write_text(text, encoding="utf-8")
    return str(tmp_path / "rows")
