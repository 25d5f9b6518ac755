"""Bad input is refused by its own error, naming the fault, before anything is sent.

The stores here have a DSN that leads nowhere: an operation that reached for a connection would fail
in another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

import pgkv
from pgkv import ScanOptions

NOWHERE = "postgresql://nobody@127.0.0.1:1/nowhere?connect_timeout=1"
SURROGATE = "a\ud800b"
LATER = datetime(2999, 1, 1, tzinfo=UTC)
NAIVE = LATER.replace(tzinfo=None)


@pytest.fixture
def store() -> Any:
    """A store without a server; a max_key_length of 10 and a max_value_size of 100."""
    return pgkv.Store(pgkv.Config(NOWHERE, retry=None, max_key_length=10, max_value_size=100))


def refused(kind: type[Exception], match: str, call: Callable[[], Any]) -> None:
    sent: list[str] = []
    remove = pgkv.on_operation(lambda name, *_: sent.append(name))
    try:
        with pytest.raises(kind, match=match):
            call()
    finally:
        remove()
    assert sent == []


def test_nowhere_is_nowhere(store: Any) -> None:
    """Good input does reach for a connection: the other tests here prove something."""
    with pytest.raises(pgkv.StoreUnavailableError):
        store.get("k")


# -- keys ------------------------------------------------------------------------------------

BAD_KEYS: list[tuple[Any, str]] = [
    ("", "empty"),
    ("a\0b", "NUL"),
    (SURROGATE, "surrogate"),
    (None, "must be a str, not NoneType"),
    (7, "must be a str, not int"),
    (b"bytes", "must be a str, not bytes"),
    (["k"], "must be a str, not list"),
    ("x" * 11, "11 bytes long.*max_key_length is 10"),
    ("ž" * 6, "12 bytes long.*max_key_length is 10"),
]
POINT: dict[str, Callable[[Any, Any], Any]] = {
    "get": lambda s, k: s.get(k),
    "get_or_raise": lambda s, k: s.get_or_raise(k),
    "get_string": lambda s, k: s.get_string(k),
    "get_entry": lambda s, k: s.get_entry(k),
    "set": lambda s, k: s.set(k, b""),
    "set if_version": lambda s, k: s.set(k, b"", if_version=1),
    "set_ex": lambda s, k: s.set_ex(k, b"", 1),
    "set_at": lambda s, k: s.set_at(k, b"", LATER),
    "set_nx": lambda s, k: s.set_nx(k, b""),
    "set_nx_ex": lambda s, k: s.set_nx_ex(k, b"", 1),
    "set_xx": lambda s, k: s.set_xx(k, b""),
    "delete": lambda s, k: s.delete(k),
    "exists": lambda s, k: s.exists(k),
    "get_and_touch": lambda s, k: s.get_and_touch(k, 1),
    "getitem": lambda s, k: s[k],
    "setitem": lambda s, k: s.__setitem__(k, b""),
    "delitem": lambda s, k: s.__delitem__(k),
    "contains": lambda s, k: k in s,
    "increment": lambda s, k: s.increment(k),
    "increment within": lambda s, k: s.increment(k, maximum=9),
    "decrement": lambda s, k: s.decrement(k),
    "append": lambda s, k: s.append(k, b""),
    "compare_and_swap": lambda s, k: s.compare_and_swap(k, b"", b""),
    "compare_and_swap of none": lambda s, k: s.compare_and_swap(k, None, b""),
    "compare_and_delete": lambda s, k: s.compare_and_delete(k, b""),
    "get_and_set": lambda s, k: s.get_and_set(k, b""),
    "get_and_delete": lambda s, k: s.get_and_delete(k),
    "update": lambda s, k: s.update(k, lambda _: b""),
    "expire": lambda s, k: s.expire(k, 1),
    "expire_at": lambda s, k: s.expire_at(k, LATER),
    "persist": lambda s, k: s.persist(k),
    "ttl": lambda s, k: s.ttl(k),
}
BATCHES: dict[str, Callable[[Any, Any], Any]] = {
    "get_many": lambda s, k: s.get_many(["a", k]),
    "exists_many": lambda s, k: s.exists_many(["a", k]),
    "set_many": lambda s, k: s.set_many([("a", b""), (k, b"")]),
    "delete_many": lambda s, k: s.delete_many(["a", k]),
    "expire_many": lambda s, k: s.expire_many(["a", k], 1),
}


@pytest.mark.parametrize(("key", "why"), BAD_KEYS)
def test_bad_keys(store: Any, key: Any, why: str) -> None:
    """A key that cannot be stored is an InvalidKeyError that says why, in every call."""
    for call in (POINT | BATCHES).values():
        refused(pgkv.InvalidKeyError, why, partial(call, store, key))


def test_bad_key_in_increment_many(store: Any) -> None:
    """A bad key among many is refused."""
    refused(pgkv.InvalidKeyError, "empty", lambda: store.increment_many({"a": 1, "": 1}))


def test_the_namespace_counts(store: Any) -> None:
    """max_key_length counts the namespace's prefix."""
    inner = store.namespace("12345678:")
    refused(pgkv.InvalidKeyError, "11 bytes long.*prefix included", lambda: inner.get("ab"))


def test_one_string_is_not_many_keys(store: Any) -> None:
    """A single string given for several keys is refused, not taken letter by letter."""
    for call in (store.get_many, store.delete_many, store.exists_many):
        refused(pgkv.InvalidKeyError, "single string", partial(call, "abc"))
    refused(pgkv.InvalidKeyError, "single string", lambda: store.expire_many("abc", 1))


@pytest.mark.parametrize("prefix", ["", None, 7, "a\0", SURROGATE])
def test_bad_namespaces(store: Any, prefix: Any) -> None:
    """A namespace's prefix is a non-empty text that a key can begin with."""
    refused(pgkv.InvalidKeyError, "namespace", lambda: store.namespace(prefix))


@pytest.mark.parametrize("bound", ["a\0", SURROGATE, 7, b"a"])
@pytest.mark.parametrize("name", ["prefix", "start", "end", "after"])
def test_bad_bounds(store: Any, name: str, bound: Any) -> None:
    """A bound that no key could meet is an InvalidKeyError that names it."""
    for call in (store.keys, store.scan):
        refused(pgkv.InvalidKeyError, name, partial(call, **{name: bound}))
        options = ScanOptions(**{name: bound})
        refused(pgkv.InvalidKeyError, name, partial(call, options))
    if name == "prefix":
        for method in (store.count, store.delete_prefix, store.iter_keys, store.iter_items):
            refused(pgkv.InvalidKeyError, name, partial(method, bound))


@pytest.mark.parametrize("number", [-1, 1.5, "1", True, None])
@pytest.mark.parametrize("name", ["limit", "offset", "page_size"])
def test_bad_counts(store: Any, name: str, number: Any) -> None:
    """limit, offset and page_size are integers, refused by name otherwise."""
    if (name, number) == ("limit", None):
        return
    call = store.iter_keys if name == "page_size" else store.keys
    refused(pgkv.InvalidValueError, name, lambda: call(**{name: number}))


def test_bad_cleanup_limit(store: Any) -> None:
    """cleanup_expired's limit is an integer of 0 or more."""
    for limit in (-1, 1.5, "1", True):
        refused(pgkv.InvalidValueError, "limit", partial(store.cleanup_expired, limit=limit))


# -- values ----------------------------------------------------------------------------------

VALUES: dict[str, Callable[[Any, Any], Any]] = {
    "set": lambda s, v: s.set("k", v),
    "set with ttl": lambda s, v: s.set("k", v, ttl=1),
    "set if_version": lambda s, v: s.set("k", v, if_version=1),
    "set_ex": lambda s, v: s.set_ex("k", v, 1),
    "set_at": lambda s, v: s.set_at("k", v, LATER),
    "set_nx": lambda s, v: s.set_nx("k", v),
    "set_nx_ex": lambda s, v: s.set_nx_ex("k", v, 1),
    "set_xx": lambda s, v: s.set_xx("k", v),
    "setitem": lambda s, v: s.__setitem__("k", v),
    "set_many": lambda s, v: s.set_many({"a": b"", "k": v}),
    "get_and_set": lambda s, v: s.get_and_set("k", v),
    "cas expected": lambda s, v: s.compare_and_swap("k", v, b""),
    "cas new": lambda s, v: s.compare_and_swap("k", b"", v),
    "cas of none": lambda s, v: s.compare_and_swap("k", None, v),
    "compare_and_delete": lambda s, v: s.compare_and_delete("k", v),
}
BAD_VALUES: list[tuple[Any, str]] = [
    (7, "not int; use store.typed"),
    (1.5, "not float"),
    (True, "not bool"),
    ({"a": 1}, "not dict"),
    ([b"x"], "not list"),
    (object(), "not object"),
    (SURROGATE, "surrogate"),
    (b"x" * 101, "101 bytes; max_value_size is 100"),
    ("ž" * 51, "102 bytes; max_value_size is 100"),
    (bytearray(101), "101 bytes"),
    (memoryview(bytes(101)), "101 bytes"),
]


@pytest.mark.parametrize(("value", "why"), BAD_VALUES, ids=lambda p: type(p).__name__)
def test_bad_values(store: Any, value: Any, why: str) -> None:
    """A value that cannot be stored is an InvalidValueError that says why, in every call."""
    for call in VALUES.values():
        refused(pgkv.InvalidValueError, why, partial(call, store, value))


def test_none_is_no_value(store: Any) -> None:
    """None is refused wherever it is not CAS's "no such key"."""
    for name, call in VALUES.items():
        if name != "cas expected":
            refused(pgkv.InvalidValueError, "not NoneType", partial(call, store, None))


@pytest.mark.parametrize("items", [[("a",)], [("a", b"", b"")], [7], ["x"], ["abc"]])
def test_bad_pairs(store: Any, items: Any) -> None:
    """set_many takes a mapping or pairs."""
    refused(pgkv.InvalidValueError, "pairs", lambda: store.set_many(items))


# -- durations and moments -------------------------------------------------------------------

TTLS: dict[str, Callable[[Any, Any], Any]] = {
    "set": lambda s, t: s.set("k", b"", ttl=t),
    "set if_version": lambda s, t: s.set("k", b"", ttl=t, if_version=1),
    "set_ex": lambda s, t: s.set_ex("k", b"", t),
    "set_nx": lambda s, t: s.set_nx("k", b"", ttl=t),
    "set_nx_ex": lambda s, t: s.set_nx_ex("k", b"", t),
    "set_xx": lambda s, t: s.set_xx("k", b"", ttl=t),
    "set_many": lambda s, t: s.set_many({"k": b""}, ttl=t),
    "increment": lambda s, t: s.increment("k", ttl=t),
    "increment within": lambda s, t: s.increment("k", ttl=t, maximum=9),
    "decrement": lambda s, t: s.decrement("k", ttl=t),
    "append": lambda s, t: s.append("k", b"", ttl=t),
    "increment_many": lambda s, t: s.increment_many({"k": 1}, ttl=t),
    "compare_and_swap": lambda s, t: s.compare_and_swap("k", b"", b"", ttl=t),
    "compare_and_swap of none": lambda s, t: s.compare_and_swap("k", None, b"", ttl=t),
    "get_and_set": lambda s, t: s.get_and_set("k", b"", ttl=t),
    "expire": lambda s, t: s.expire("k", t),
    "expire_many": lambda s, t: s.expire_many(["k"], t),
    "get_and_touch": lambda s, t: s.get_and_touch("k", t),
}
BAD_TTLS: list[tuple[Any, str]] = [
    (0, "more than 0"),
    (0.0, "more than 0"),
    (-1, "more than 0"),
    (-math.inf, "more than 0"),
    (math.nan, "more than 0"),
    (timedelta(0), "more than 0"),
    (timedelta(seconds=-1), "more than 0"),
    (math.inf, "beyond 1,000 years"),
    (1e300, "beyond 1,000 years"),
    (10**400, "beyond 1,000 years"),
    (timedelta.max, "beyond 1,000 years"),
    ("60", "must be seconds.*not str"),
    (True, "must be seconds.*not bool"),
    (LATER, "must be seconds.*not datetime"),
]


@pytest.mark.parametrize(("ttl", "why"), BAD_TTLS)
def test_bad_ttls(store: Any, ttl: Any, why: str) -> None:
    """A ttl that is no positive, finite duration is an InvalidValueError, in every call."""
    for call in TTLS.values():
        refused(pgkv.InvalidValueError, why, partial(call, store, ttl))


def test_required_ttls(store: Any) -> None:
    """Where a ttl is the point of the call, None is refused."""
    refused(pgkv.InvalidValueError, "ttl", lambda: store.expire("k", None))
    refused(pgkv.InvalidValueError, "ttl", lambda: store.get_and_touch("k", None))
    refused(pgkv.InvalidValueError, "ttl", lambda: store.expire_many(["k"], None))


@pytest.mark.parametrize(
    ("moment", "why"),
    [
        (NAIVE, "naive"),
        (LATER.timestamp(), "not float"),
        ("2999-01-01", "not str"),
        (LATER.date(), "not date"),
        (timedelta(1), "not timedelta"),
    ],
)
def test_bad_moments(store: Any, moment: Any, why: str) -> None:
    """A moment is an aware datetime; anything else is an InvalidValueError."""
    refused(pgkv.InvalidValueError, why, lambda: store.set("k", b"", expires_at=moment))
    refused(pgkv.InvalidValueError, why, lambda: store.set_at("k", b"", moment))
    refused(pgkv.InvalidValueError, why, lambda: store.expire_at("k", moment))


def test_required_moments(store: Any) -> None:
    """expire_at needs a moment."""
    refused(pgkv.InvalidValueError, "expires_at", lambda: store.expire_at("k", None))


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": 1, "expires_at": LATER},
        {"ttl": 1, "keep_ttl": True},
        {"expires_at": LATER, "keep_ttl": True},
        {"ttl": 1, "expires_at": LATER, "keep_ttl": True},
    ],
)
def test_one_expiry_at_most(store: Any, options: Any) -> None:
    """ttl, expires_at and keep_ttl exclude each other."""
    refused(pgkv.InvalidValueError, "at most one", lambda: store.set("k", b"", **options))
    refused(
        pgkv.InvalidValueError, "at most one", lambda: store.set("k", b"", if_version=1, **options)
    )


def test_bad_ping_timeout(store: Any) -> None:
    """ping's timeout is a positive duration."""
    for timeout in (0, -1, math.nan, "1"):
        refused(pgkv.InvalidValueError, "timeout", partial(store.ping, timeout))


# -- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "why"),
    [
        (1.0, "int, not float"),
        ("1", "int, not str"),
        (True, "int, not bool"),
        (None, "int, not NoneType"),
        (2**63, "64-bit range"),
        (-(2**63) - 1, "64-bit range"),
    ],
)
def test_bad_deltas(store: Any, delta: Any, why: str) -> None:
    """A delta is an integer of 64 bits."""
    for call in (store.increment, store.decrement, partial(store.increment, maximum=1)):
        refused(pgkv.InvalidValueError, why, partial(call, "k", delta))
    refused(pgkv.InvalidValueError, why, lambda: store.increment_many({"k": delta}))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"minimum": 1.0}, "minimum must be an int, not float"),
        ({"maximum": True}, "maximum must be an int, not bool"),
        ({"maximum": 2**63}, "maximum is outside"),
        ({"minimum": 2, "maximum": 1}, "minimum must not be greater"),
        ({"only_if_exists": True, "ttl": 1}, "ttl or only_if_exists, not both"),
        ({"only_if_exists": 1}, "only_if_exists must be True or False"),
    ],
)
def test_bad_bounds_of_counting(store: Any, options: Any, why: str) -> None:
    """Bounds are integers of 64 bits in order, and a ttl needs a key that may be created."""
    refused(pgkv.InvalidValueError, why, partial(store.increment, "k", **options))


def test_what_cannot_be_subtracted(store: Any) -> None:
    """The negative of the smallest integer does not fit."""
    refused(pgkv.InvalidValueError, "subtracted", lambda: store.decrement("k", -(2**63)))


@pytest.mark.parametrize("deltas", [[("k", 1), ("k", 2)], ["k"], "k", 7, None])
def test_increment_many_needs_a_mapping(store: Any, deltas: Any) -> None:
    """increment_many takes a mapping: of pairs a repeated key's increments would be lost."""
    refused(pgkv.InvalidValueError, "mapping", lambda: store.increment_many(deltas))


@pytest.mark.parametrize("version", [1.0, "1", True, 2**63, b"1"])
def test_bad_versions(store: Any, version: Any) -> None:
    """A version is an integer of 64 bits."""
    refused(pgkv.InvalidValueError, "if_version", lambda: store.set("k", b"", if_version=version))
    refused(pgkv.InvalidValueError, "if_version", lambda: store.delete("k", if_version=version))
    refused(pgkv.InvalidValueError, "if_version", lambda: store.expire("k", 1, if_version=version))


@pytest.mark.parametrize("attempts", [0, -1])
def test_bad_attempts(store: Any, attempts: int) -> None:
    """update needs one attempt at least."""
    refused(
        pgkv.InvalidValueError,
        "attempts",
        lambda: store.update("k", lambda _: b"", attempts=attempts),
    )


# -- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", None, "a\0", "x" * 55, SURROGATE])
def test_bad_tables(store: Any, name: Any) -> None:
    """A table's name is checked when it is given."""
    refused(pgkv.ConfigError, "table_name", lambda: store.table(name))


def test_bad_table_options(store: Any) -> None:
    """table() takes the options of a table, and says so of others."""
    refused(pgkv.ConfigError, "no option 'dsn'.*table_type", lambda: store.table("t", dsn="x"))
    refused(pgkv.ConfigError, "pool_max_size", lambda: store.table("t", pool_max_size=3))
    refused(pgkv.ConfigError, "table_type", lambda: store.table("t", table_type="regular"))


@pytest.mark.parametrize("name", ["truncate", "vacuum", "recreate_table"])
def test_whole_tables_are_not_a_namespaces(store: Any, name: str) -> None:
    """What acts on the whole table is a ConfigError on a namespace."""
    inner = store.namespace("n:")
    refused(pgkv.ConfigError, "whole table", getattr(inner, name))


@pytest.mark.parametrize("pool", [None, "postgresql://", object()])
def test_bad_pools(pool: Any) -> None:
    """from_pool takes a psycopg_pool.ConnectionPool."""
    refused(pgkv.ConfigError, r"psycopg_pool\.ConnectionPool", lambda: pgkv.Store.from_pool(pool))
