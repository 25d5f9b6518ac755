"""The two variants are one API: the same names, the same signatures, other waiting."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest

import pgkv
from pgkv.pipeline import AsyncPipeline, Pipeline

TWINS = [
    pytest.param(pgkv.Store, pgkv.AsyncStore, id="Store"),
    pytest.param(pgkv.TypedStore, pgkv.AsyncTypedStore, id="TypedStore"),
    pytest.param(Pipeline, AsyncPipeline, id="Pipeline"),
    pytest.param(pgkv.RateLimiter, pgkv.AsyncRateLimiter, id="RateLimiter"),
    pytest.param(pgkv.Reservation, pgkv.AsyncReservation, id="Reservation"),
    pytest.param(pgkv.SessionStore, pgkv.AsyncSessionStore, id="SessionStore"),
]
# The mapping protocol cannot be awaited.
BLOCKING_ONLY = {"__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__"}
# Calls that return at once, in both variants: what is awaited or entered, views, iterators.
TO_AWAIT_OR_ENTER = {"connect", "embedded", "sharded", "transaction", "pipeline"}
PLAIN = {
    "from_pool",
    "pool_stats",
    "using",
    "namespace",
    "table",
    "typed",
    "watch",
    "iter_keys",
    "iter_items",
}
# How each variant is opened and closed.
COLOURED = {"__enter__", "__exit__", "__aenter__", "__aexit__", "__await__"}


def public(cls: type) -> dict[str, Any]:
    """The members that pgkv's own classes give it and that users may name."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("pgkv"):
            found |= vars(base)
    return {
        name: member
        for name, member in found.items()
        if callable(inspect.unwrap(getattr(cls, name)))
        and (not name.startswith("_") or (name.startswith("__") and name in BLOCKING_ONLY))
    }


def parameters(cls: type, name: str) -> list[tuple[str, Any, Any]]:
    return [
        (each.name, each.kind, each.default)
        for each in inspect.signature(getattr(cls, name)).parameters.values()
    ]


def function(cls: type, name: str) -> Any:
    member = inspect.getattr_static(cls, name)
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


@pytest.mark.parametrize(("blocking", "awaited"), TWINS)
def test_same_names(blocking: type, awaited: type) -> None:
    """Whatever one variant offers, the other offers by the same name."""
    mine, twins = set(public(blocking)), set(public(awaited))
    assert mine - twins == (BLOCKING_ONLY if blocking is pgkv.Store else set())
    assert twins - mine == set()


@pytest.mark.parametrize(("blocking", "awaited"), TWINS)
def test_same_signatures(blocking: type, awaited: type) -> None:
    """Each method takes the same parameters in both variants: names, kinds and defaults."""
    differing = {
        name: (parameters(blocking, name), parameters(awaited, name))
        for name in public(awaited)
        if parameters(blocking, name) != parameters(awaited, name)
    }
    assert differing == {}


@pytest.mark.parametrize("cls", [pgkv.AsyncStore, pgkv.AsyncTypedStore, pgkv.AsyncSessionStore])
def test_what_is_awaited(cls: type) -> None:
    """Every method that meets the server is `async def`; what opens something returns an object to
    await or enter; views and iterators are plain calls."""
    for name in public(cls):
        own = function(cls, name)
        expected = name not in TO_AWAIT_OR_ENTER | PLAIN
        if name in {"iter_keys", "iter_items"}:
            # An async generator or a plain function that returns one: called, then iterated.
            assert not inspect.iscoroutinefunction(own), name
        else:
            assert inspect.iscoroutinefunction(own) is expected, name


def test_queueing_is_never_awaited() -> None:
    """A pipeline's methods return a handle at once, in both variants."""
    for cls in (Pipeline, AsyncPipeline):
        for name in public(cls):
            assert not inspect.iscoroutinefunction(function(cls, name)), name


def test_what_is_opened_can_be_awaited_or_entered() -> None:
    """connect(), embedded(), transaction() and pipeline() give what `await` and `async with` take,
    and do nothing yet."""
    store = pgkv.AsyncStore(pgkv.Config("host=nowhere.invalid"))
    for opened in (
        pgkv.AsyncStore.connect("host=nowhere.invalid"),
        pgkv.AsyncStore.embedded("nowhere"),
        pgkv.AsyncStore.sharded(["host=nowhere.invalid"]),
        store.transaction(),
        store.pipeline(),
    ):
        assert hasattr(opened, "__await__")
        assert hasattr(opened, "__aenter__")
        assert hasattr(opened, "__aexit__")


def test_views_need_no_loop() -> None:
    """An AsyncStore and its views can be built at import, before there is an event loop."""
    store = pgkv.AsyncStore(pgkv.Config("host=nowhere.invalid"))
    for view in (store.namespace("a:"), store.table("other"), store.typed(int), store.pipeline()):
        assert view


@pytest.mark.parametrize(
    "cls",
    [
        pgkv.Store,
        pgkv.AsyncStore,
        pgkv.TypedStore,
        pgkv.AsyncTypedStore,
        Pipeline,
        AsyncPipeline,
        pgkv.SessionStore,
        pgkv.AsyncSessionStore,
    ],
)
def test_docstrings(cls: type) -> None:
    """Every method of either variant has a docstring: help() must answer."""
    own = {name for name in public(cls) if not name.startswith("_")}
    missing = sorted(name for name in own if not (function(cls, name).__doc__ or "").strip())
    assert missing == []


@pytest.mark.parametrize(
    "cls", [pgkv.Store, pgkv.AsyncStore, pgkv.TypedStore, pgkv.AsyncTypedStore]
)
def test_docstrings_stand_in_the_source(cls: type) -> None:
    """An editor shows the source: docstrings are written there, not copied at run time."""
    for name in public(cls):
        if not name.startswith("_"):
            source = textwrap.dedent(inspect.getsource(function(cls, name)))
            assert ast.get_docstring(ast.parse(source).body[0]), name  # type: ignore[arg-type]  # a function


def test_a_pipeline_speaks_as_its_store() -> None:
    """A pipeline queues by the store's names and parameters; nothing is named otherwise."""
    for cls, store in ((Pipeline, pgkv.Store), (AsyncPipeline, pgkv.AsyncStore)):
        for name in public(cls):
            assert parameters(cls, name) == parameters(store, name), name


def test_what_a_pipeline_does_not_offer() -> None:
    """The list of a store's operations that cannot be queued is a decision, not an oversight."""
    offered = set(public(Pipeline))
    absent = set(public(pgkv.Store)) - offered - BLOCKING_ONLY
    assert absent == {
        # several round trips by nature
        *(
            "update",
            "increment_many",
            "iter_keys",
            "iter_items",
            "cleanup_expired",
            "evict",
            "rewrite",
            "load",
        ),
        *("now", "pool_stats"),
        # upkeep, and what opens or closes
        *("truncate", "stats", "vacuum", "analyze", "create_table", "recreate_table", "ping"),
        *("connect", "from_pool", "embedded", "sharded", "close", "transaction", "run_transaction"),
        *("using", "namespace", "table", "typed", "pipeline", "clear", "watch"),
    }
