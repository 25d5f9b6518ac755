"""The parts of sessions that need no database: data, cookies, the request's dict, statements."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pgkv
from pgkv import Config, ConfigError, InvalidValueError, SessionError
from pgkv._ops.op import Op, Statement
from pgkv.config import Table
from pgkv.patterns._runtime.sql import ASYNC
from pgkv.patterns.session.data import (
    difference,
    document,
    id_of,
    is_token,
    new_token,
    read_document,
    texts_of,
    values_of,
)
from pgkv.patterns.session.request import RequestSession
from pgkv.patterns.session.sql import SESSIONS, Lifetimes, SessionStatements
from pgkv.patterns.web.cookie import Cookie, private, varying
from pgkv.patterns.web.request import exemption

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
DOCUMENTS = st.dictionaries(KEYS, JSON, max_size=6)

# -- data ------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine it says nothing
@given(DOCUMENTS)
def test_documents_survive(data: dict[str, Any]) -> None:
    """Any JSON document comes back equal, the types of its numbers and its order included, and
    writes the same text again: an unchanged session is seen as unchanged."""
    texts = texts_of(data, 1 << 20)
    stored = document(texts)
    stored.decode("utf-8")
    back = values_of(read_document(stored))
    assert repr(back) == repr(data)
    assert texts_of(back, 1 << 20) == texts


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(DOCUMENTS, DOCUMENTS)
def test_differences_lead_from_one_to_the_other(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    """What a merge sends, applied to the old document, gives the new one."""
    old, new = texts_of(before, 1 << 20), texts_of(after, 1 << 20)
    changed, removed = difference(old, new)
    merged = {key: text for key, text in old.items() if key not in removed} | changed
    assert merged == new
    assert difference(new, new) == ({}, [])


def test_a_document_holds_strings_that_jsonb_takes() -> None:
    """On the wire every value is a string without NUL escapes of its own."""
    raw = document(texts_of({"a": "\0\ud800", "b": -0.0}, 1000))
    assert json.loads(raw) == {"a": '"\\u0000\\ud800"', "b": "-0.0"}
    assert b"\\\\u0000" in raw


def test_containers_within_themselves() -> None:
    """A cycle, or a hundred levels, is refused and not followed for ever."""
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: Any = 1
    for _ in range(101):
        deep = {"a": deep}
    for value in (cycle, deep):
        with pytest.raises(InvalidValueError, match="nested more than 100 deep"):
            texts_of({"a": value}, 1000)


def test_errors_hold_no_data() -> None:
    """A refusal names the place and the type, not the value; nor does its chain."""
    for data in ({"a": "secret" * 1000}, {"a": [b"secret"]}, {"secret\ud800": 1}, {"k": "secret"}):
        with pytest.raises(InvalidValueError) as caught:
            texts_of(data, 1)
        assert "secret" not in str(caught.value)
        assert caught.value.__context__ is None


def test_tokens() -> None:
    """256 bits, in the alphabet of cookies, never twice; SHA-256 is what the database gets."""
    tokens = {new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(is_token(token) for token in tokens)
    assert len(id_of(tokens.pop())) == 32
    for bad in ("", "a" * 42, "a" * 44, "a" * 42 + "=", "a" * 42 + "\n", None, b"a" * 43):
        assert not is_token(bad)


# -- cookies ---------------------------------------------------------------------------------

A, B = "A" * 43, "B" * 43


def test_safe_by_default() -> None:
    """__Host-, Secure, HttpOnly, SameSite=Lax, the whole site, until the browser closes."""
    cookie = Cookie("__Host-session")
    assert cookie.set(A) == f"__Host-session={A}; Path=/; Secure; HttpOnly; SameSite=Lax"
    assert cookie.set("") == (
        '__Host-session=""; Path=/; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT; '
        "Secure; HttpOnly; SameSite=Lax"
    )


def test_cookie_options() -> None:
    """What is asked for is what is sent."""
    cookie = Cookie("__Secure-x", same_site="strict", path="/app", domain="example.org", max_age=60)
    assert cookie.set(A) == (
        f"__Secure-x={A}; Path=/app; Domain=example.org; Max-Age=60; Secure; HttpOnly; "
        "SameSite=Strict"
    )


def test_cookies_of_single_sessions_and_of_frames() -> None:
    """A session's own life counts before the application's; Partitioned stands on the cookie that
    is taken back as well."""
    cookie = Cookie("s", same_site="none", max_age=60, partitioned=True)
    flags = "Secure; HttpOnly; SameSite=None; Partitioned"
    assert cookie.set(A) == f"s={A}; Path=/; Max-Age=60; {flags}"
    assert cookie.set(A, 6.5) == f"s={A}; Path=/; Max-Age=7; {flags}"
    assert cookie.set("", 6.5).endswith(
        f"Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT; {flags}"
    )


def test_plain_http(caplog: pytest.LogCaptureFixture) -> None:
    """secure=False drops prefix and flag, and says so once."""
    cookie = Cookie("__Host-session", secure=False)
    assert cookie.set(A) == f"session={A}; Path=/; HttpOnly; SameSite=Lax"
    assert cookie.find([f"session={A}"]) == [A]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "insecure_cookie" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"cookie": "a b"},
        {"cookie": ""},
        {"cookie": "__Host-a", "path": "/app"},
        {"cookie": "__Host-a", "domain": "example.org"},
        {"cookie": "a", "same_site": "None"},
        {"cookie": "a", "same_site": "none", "secure": False},
        {"cookie": "a", "path": "app"},
        {"cookie": "a", "path": "/;x"},
        {"cookie": "a", "domain": "a;b"},
        {"cookie": "a", "max_age": 0},
        {"cookie": "a", "partitioned": True, "secure": False},
    ],
)
def test_cookies_that_browsers_would_refuse(options: Any) -> None:
    """A cookie that would never arrive, or say more than meant, is refused when it is configured."""
    with pytest.raises(ConfigError):
        Cookie(**options)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], []),
        ([f"s={A}"], [A]),
        ([f"other=1; s={A};theme=dark"], [A]),
        ([f"a=b; s={A}", "c=d"], [A]),
        ([f"s={A}; s={A}"], [A]),
        ([f"s={A}; s={B}"], [A, B]),
        ([f"s={A}", f"s={B}"], [A, B]),
        ([f"s=junk; s={A}"], [A]),
        ([f"ss={A}; xs={A}"], []),
        ([f"S={A}"], []),
        ([f's="{A}"'], []),
        ([f"s={A}x"], []),
        ([f"s={A[:-1]}"], []),
        (["s=" + "x" * 1_000_000], []),
        (["s=" + "é" * 43], []),
        (["s=" + A[:-1] + "\xff"], []),
        ([";;;=;s;s=;"], []),
        ([f"s = {A}"], []),
        (["s=" + A + "\0"], []),
        ([f"s={B}; s={A}; s={B}"], [B, A]),
        (["; ".join(f"s={n:043}" for n in range(1000))], [f"{n:043}" for n in range(4)]),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_finding_the_tokens(headers: list[str], found: list[str]) -> None:
    """Tokens of the right form are found in their order, each once and at most four; the rest is
    nothing."""
    assert Cookie("s").find(headers) == found


def test_ambiguous_cookies_are_logged_without_tokens(caplog: pytest.LogCaptureFixture) -> None:
    """Two tokens in one request are told, not shown."""
    Cookie("s").find([f"s={A}; s={B}"])
    assert "ambiguous_cookie" in caplog.text
    assert A not in caplog.text


@pytest.mark.parametrize(
    ("exempt", "path", "expected"),
    [
        (None, "/", False),
        (["/static", "/health"], "/static/a.css", True),
        (["/static/"], "/static/a.css", True),
        (["/static/"], "/static", True),
        (["/static"], "/statics", False),
        (["/health"], "/", False),
        (lambda request: request == "this", "/", True),
    ],
)
def test_exempt_paths(exempt: Any, path: str, expected: bool) -> None:
    """A path stands for itself and what is below it; a function decides by the request."""
    assert exemption(exempt)("this", path) is expected


@pytest.mark.parametrize("exempt", ["/static", ["static"]])
def test_bad_exemptions(exempt: Any) -> None:
    """A single string, or a path without its slash, would exempt something else than meant."""
    with pytest.raises(ConfigError, match="exempt"):
        exemption(exempt)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "private"),
        ("no-store", "no-store"),
        ("private, max-age=5", "private, max-age=5"),
        ("Public, max-age=60, s-maxage=60", "max-age=60, private"),
    ],
)
def test_shared_caches_are_kept_out(given: str, expected: str) -> None:
    """A response that depends on a session is for one browser."""
    assert private(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", "Cookie"), ("Accept", "Accept, Cookie"), ("cookie", "cookie"), ("*", "*")],
)
def test_vary(given: str, expected: str) -> None:
    """Vary names the cookie, once."""
    assert varying(given) == expected


# -- the request's dict ----------------------------------------------------------------------

READS: dict[str, Any] = {
    "[]": lambda s: s["a"],
    "get": lambda s: s.get("a"),
    "in": lambda s: "a" in s,
    "len": len,
    "bool": bool,
    "iter": list,
    "reversed": lambda s: list(reversed(s)),
    "keys": lambda s: list(s.keys()),
    "values": lambda s: list(s.values()),
    "items": lambda s: list(s.items()),
    "copy": lambda s: s.copy(),
    "dict": dict,
    "**": lambda s: {**s},
    "==": lambda s: s == {},
    "!=": lambda s: s != {},
    "|": lambda s: s | {"b": 1},
    "r|": lambda s: {"b": 1} | s,
    "set": lambda s: s.__setitem__("b", 1),
    "del": lambda s: s.__delitem__("a"),
    "pop": lambda s: s.pop("a"),
    "pop default": lambda s: s.pop("z", None),
    "popitem": lambda s: s.popitem(),
    "setdefault": lambda s: s.setdefault("b", 1),
    "update": lambda s: s.update(b=1),
    "|=": lambda s: s.__ior__({"b": 1}),
    "clear": lambda s: s.clear(),
    "session": lambda s: s.session,
}


@pytest.mark.parametrize("use", READS)
def test_any_use_loads_first(use: str) -> None:
    """Whatever a program does with the dict, it finds the loaded session, and it counts as read."""
    loads: list[int] = []

    def load() -> None:
        loads.append(1)
        lazy.fill(pgkv.Session({"a": 1}))

    lazy, plain = RequestSession(load), {"a": 1}
    assert (lazy.accessed, lazy.is_loaded) == (False, False)
    answer = READS[use](lazy)
    assert loads == [1]
    assert lazy.accessed
    if use != "session":
        assert answer == READS[use](plain)
        assert dict(lazy) == plain


@pytest.mark.parametrize("use", READS)
def test_any_use_may_be_refused(use: str) -> None:
    """Where loading is refused, no use slips through to an empty dict."""

    def refuse() -> None:
        raise SessionError("not loaded")

    with pytest.raises(SessionError):
        READS[use](RequestSession(refuse))


def test_the_dict_shows_nothing() -> None:
    """repr() of a request's session, as in a traceback, is empty of data."""
    session = RequestSession()
    session.fill(pgkv.Session({"card": "4111"}))
    assert "4111" not in repr(session)


# -- statements ------------------------------------------------------------------------------


def statements(*, inside: bool = False, table: str = "s") -> dict[str, Op[Any]]:
    sql = SessionStatements(
        Config("postgresql://"),
        Table(table, shape=SESSIONS),
        Lifetimes(1800, 43200, 60),
        inside=inside,
    )
    return {
        "create": sql.create(b"id", "u", b"{}", None),
        "load": sql.load(b"id"),
        "merge": sql.save(b"id", "merge", 1, b"{}", []),
        "error": sql.save(b"id", "error", 1, b"{}", []),
        "last_wins": sql.save(b"id", "last_wins", 1, b"{}", []),
        "rotate": sql.rotate(b"id", b"new", b"{}", [], grace=10, user=None),
        "rotate at once": sql.rotate(b"id", b"new", b"{}", [], grace=0, user=("u",)),
        "load timed": sql.load(b"id", timed=True),
        "destroy": sql.destroy(b"id"),
        "destroy_user": sql.destroy_user("u", None),
        "destroy_of_user": sql.destroy(b"id", "u"),
        "list_user": sql.list_user("u"),
        "collect": sql.collect([b"id"]),
        "pages": sql.pages(),
        "sweep": sql.sweep(0),
        "sweep_alone": sql.sweep_alone(0),
    }


NAMES = list(statements())
REPEATED = {
    *(
        "load",
        "load timed",
        "rotate",
        "rotate at once",
        "destroy",
        "destroy_user",
        "destroy_of_user",
        "list_user",
    ),
    *("collect", "pages", "sweep", "sweep_alone"),
}
RELAXED = {"create", "load", "load timed", "merge", "error", "last_wins"}
DURABLE = {"rotate", "rotate at once", "destroy", "destroy_user", "destroy_of_user"}


def texts(statement: Statement[Any]) -> list[str]:
    return [text for text in (statement.sql, statement.sql_18) if text is not None]


@pytest.mark.parametrize("name", NAMES)
def test_what_may_be_sent_twice(name: str) -> None:
    """Creating and saving are never repeated once sent."""
    assert statements()[name].statement.retry_safe is (name in REPEATED)


@pytest.mark.parametrize("name", NAMES)
def test_what_waits_for_the_disk(name: str) -> None:
    """Each statement says how durable its commit is, and nothing of it in a caller's transaction."""
    for text in texts(statements()[name].statement):
        assert (ASYNC in text) is (name in RELAXED)
        assert ("'synchronous_commit', coalesce" in text) is (name in DURABLE)
    for text in texts(statements(inside=True)[name].statement):
        assert "set_config" not in text


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_of_the_texts(name: str) -> None:
    """Clocks that move and can be injected, complete parameters, quoted names."""
    op = statements()[name]
    for text in texts(op.statement):
        assert not re.search(r"\bnow\(|current_timestamp|\.\s*(clock|statement)_timestamp", text)
        assert ("clock_timestamp" in text) is (name == "create")
        numbers = {int(n) for n in re.findall(r"\$(\d+)", text)}
        assert numbers == set(range(1, len(op.params) + 1))
        assert len(op.params) == len(op.statement.formats)
    for text in texts(statements(table='we"ird')[name].statement):
        assert 'we"ird' not in text.replace('"we""ird"', "")


def test_plain_logging_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Making a secure cookie says nothing."""
    caplog.set_level(logging.DEBUG)
    Cookie("__Host-session")
    assert caplog.records == []


def test_get_takes_its_default_by_name() -> None:
    """As in Flask's own session."""
    assert RequestSession().get("z", default=2) == 2
