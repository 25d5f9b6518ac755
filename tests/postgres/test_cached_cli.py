"""`pgkv cache` and `pgkv idempotency` against a real server."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import pgkv
from pgkv.cli import main
from pgkv.patterns.cache.call import context_of
from pgkv.patterns.cache.sql import CacheStatements
from tests.cached import cached_in
from tests.peers import until
from tests.variants import Variant, inside


def test_cache_lists_and_clears(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Functions with their entries and bytes; clearing by a short or full name, or a tag; exit code
    1 where there is no such function, 0 where there is nothing to list."""
    with pgkv.Store.connect(dsn) as store:

        @pgkv.cached(600, store=store, store_timeout=20, tags=("t:{n}",))
        def load(n: int) -> int:
            return n

        assert main(["cache", "--dsn", dsn]) == 0
        assert main(["cache", "--dsn", dsn, "--json"]) == 0
        assert capsys.readouterr().out == ""
        load(1)
        load(2)
        capsys.readouterr()
        assert main(["cache", "--dsn", dsn, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["function"] == load.name
        assert (shown["entries"], shown["computing"]) == (2, 0)
        assert main(["cache", "--dsn", dsn]) == 0
        assert capsys.readouterr().out.startswith(f"{load.name}\t2\t0\t")
        assert main(["cache", "--dsn", dsn, "--tag", "t:1"]) == 0
        assert load.peek(1) is None
        assert load.peek(2) is not None
        assert main(["cache", "--dsn", dsn, "--clear", "nothing"]) == 1
        assert main(["cache", "--dsn", dsn, "--clear", load.name]) == 0
        assert load.peek(2) is None
        load(2)
        short = load.name.rpartition(":")[0].rpartition(".")[2]
        assert main(["cache", "--dsn", dsn, "--clear", short, "--json"]) == 0
        assert load.peek(2) is None
        assert main(["cache", "--dsn", dsn, "--clear", "a", "--tag", "b"]) == 2


def test_idempotency_shows_and_forgets(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is known of a key, without its result; a forgotten key is new; exit code 1 where it is not
    known."""
    command = ["idempotency", "show", "k", "--dsn", dsn, "--scope", "ann"]
    assert main(command) == 1
    with pgkv.Store.connect(dsn) as store:
        keys = pgkv.Idempotency(store)
        with keys.once("k", scope="ann") as attempt:
            assert main([*command, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["status"] == "running"
            attempt.result = b"secret"
        assert main(["idempotency", "show", "k", "--dsn", dsn]) == 1
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert "status\tdone\n" in shown
        assert "result_bytes\t6\n" in shown
        assert "secret" not in shown
        assert main(["idempotency", "forget", "k", "--dsn", dsn, "--scope", "ann"]) == 0
        assert keys.get("k", scope="ann") is None
        assert main(["idempotency", "forget", "k", "--dsn", dsn, "--scope", "ann"]) == 1


async def test_cache_shows_the_hit_ratio_of_processes(
    store: Any, variant: Variant, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes report their counts when they fill, at most once a minute."""

    @cached_in(variant, store, store_timeout=20)
    async def load(n: int) -> int:
        return n

    for _ in range(3):
        await load(1)
    context_of(inside(store)).report_at = 0.0  # a minute has passed
    await load(2)
    with pgkv.Store.connect(dsn) as other:

        def reported() -> list[bytes]:
            return other._execute(CacheStatements(other._config).reports())

        await until(lambda: b"[2,2]" in b"".join(reported()), "the second fill has reported")
        await load(3)
        assert b"[2,3]" not in b"".join(reported()), "once a minute"
        # A second process, and a row of another program.
        other.set("pgkv:cache:s:web-2:1", f'{{"{load.name}": [6, 0], "gone:1": [1, 1]}}')
        other.set("pgkv:cache:s:other", b"\xff")
    assert main(["cache", "--dsn", dsn, "--json"]) == 0
    gone, shown = map(json.loads, capsys.readouterr().out.splitlines())
    assert (shown["function"], shown["entries"], shown["processes"]) == (load.name, 3, 2)
    assert (shown["hits"], shown["misses"], shown["hit_ratio"]) == (8, 2, 0.8)
    assert (gone["function"], gone["entries"], gone["hit_ratio"]) == ("gone:1", 0, 0.5)
    assert main(["cache", "--dsn", dsn]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("\t80.0%")
