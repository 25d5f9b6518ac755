"""Fixtures of the store's behaviour tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from tests.peers import Peer, caller_connection
from tests.variants import Variant, closing_all


@pytest.fixture(autouse=True)
def _patience(patience: None) -> None:
    """Of every test here."""


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
    dsn: str, variant: Variant, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """`await connect(autocommit=True)` is the caller's own connection, in the store's variant."""
    with closing_all(event_loop_runner) as made:

        async def make(**options: Any) -> Any:
            made.append(await caller_connection(variant, options.pop("dsn", dsn), **options))
            return made[-1]

        yield make


@pytest.fixture
def make_sessions(
    make_store: Callable[..., Coroutine[Any, Any, Any]], variant: Variant
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """`await make_sessions(idle_timeout=60)` is a session store on a store of its own; settings of
    the store go into `config`."""

    async def make(config: dict[str, Any] | None = None, **options: Any) -> Any:
        return variant.make("SessionStore", await make_store(**(config or {})), **options)

    return make


@pytest.fixture
def sessions(
    make_sessions: Callable[..., Coroutine[Any, Any, Any]], event_loop_runner: asyncio.Runner
) -> Any:
    """A session store with the default settings; used as an AsyncSessionStore."""
    return event_loop_runner.run(make_sessions())
