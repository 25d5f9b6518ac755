"""Fixtures of the store's behaviour tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

import pgkv
from tests.colours import Colour
from tests.peers import Peer, caller_connection


@pytest.fixture
def peer(dsn: str) -> Iterator[Peer]:
    """Another client of the test's schema."""
    client = Peer(dsn)
    yield client
    client.conn.close()


@pytest.fixture
def witness(dsn: str) -> Iterator[Peer]:
    """A second one, that watches while the first holds locks."""
    client = Peer(dsn)
    yield client
    client.conn.close()


@pytest.fixture
def connect(
    dsn: str, colour: Colour, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """`await connect(autocommit=True)` is the caller's own connection, in the store's colour."""
    made: list[Any] = []

    async def make(**options: Any) -> Any:
        made.append(await caller_connection(colour, options.pop("dsn", dsn), **options))
        return made[-1]

    yield make

    async def close() -> None:
        for each in made:
            await each.close()

    event_loop_runner.run(close())


@pytest.fixture
def operations() -> Iterator[list[tuple[str, str, int]]]:
    """Every operation of every store during the test: name, outcome, retries."""
    seen: list[tuple[str, str, int]] = []
    remove = pgkv.on_operation(
        lambda name, _seconds, outcome, retries: seen.append((name, outcome, retries))
    )
    yield seen
    remove()
