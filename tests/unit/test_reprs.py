"""What objects show of themselves in a log or a debugger: their name, a fact or two, and no secret.

No server is needed for any of it: a repr makes no round trip.
"""

from __future__ import annotations

import copy
import enum
import pickle
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

import pgkv
from pgkv import _observe
from pgkv._background.renewal import clock
from pgkv._ops.serialize import Serializer
from pgkv.patterns.rate_limit.flows import Reserved
from pgkv.patterns.session.request import RequestSession

PASSWORD = "hunter2"
TOKEN = "t0ken" * 8 + "abc"
DSN = f"postgresql://ada:{PASSWORD}@db.example:5433/shop"
MOMENT = datetime(2030, 1, 1, tzinfo=UTC)

store = pgkv.Store(pgkv.Config(DSN, retry=None))
astore = pgkv.AsyncStore(pgkv.Config(DSN))
PLACE = "at db.example:5433/shop"
limiter = pgkv.RateLimiter(store, "10/s burst 20; 1000/h", name="api")
sessions = pgkv.SessionStore(store)


@pgkv.cached(ttl=60, store=store)
def load_user(user_id: int) -> dict[str, int]:
    """A cached function."""
    return {"id": user_id}


@pgkv.cached(lambda value: 60, store=astore)
async def load_order(order_id: int) -> dict[str, int]:
    """Another, whose ttl depends on its result."""
    return {"id": order_id}


def lease_of(lock: Any, *, begun: float = 0.0) -> pgkv.Lease:
    """A lease as if it had been granted `begun` seconds ago."""
    terms = lock._options
    return pgkv.Lease(lock._runtime, terms, terms.keys[-1], 17, "host:1", clock() - begun)


def session_of(user_id: str | None = None, token: str = TOKEN, **state: Any) -> pgkv.Session:
    """A session as if it had been stored."""
    session = pgkv.Session({"card": PASSWORD}, id=token, user_id=user_id)
    for name, value in state.items():
        setattr(session, name, value)
    return session


def loaded() -> RequestSession:
    """A request's session that was loaded."""
    data = RequestSession()
    data.fill(session_of(is_new=False))
    return data


def handle_of(*answers: Any) -> pgkv.Handle[Any]:
    """A handle of a pipeline that was sent."""
    handle = store.pipeline().get("k")
    handle._state, handle._answers = "", list(answers)
    return handle


HANDLE = session_of().handle[:8]

SHOWN: dict[str, tuple[Callable[[], object], str]] = {
    "store": (lambda: store, f"<Store 'kv_store' {PLACE}>"),
    "async store": (lambda: astore, f"<AsyncStore 'kv_store' {PLACE}>"),
    "table": (lambda: store.table("jobs", schema="app"), f"<Store 'app.jobs' {PLACE}>"),
    "namespace": (
        lambda: store.namespace("a:").namespace("b:"),
        f"<Store 'kv_store' namespace='a:b:' {PLACE}>",
    ),
    "libpq's own place": (
        lambda: pgkv.Store(pgkv.Config("application_name=x")),
        "<Store 'kv_store'>",
    ),
    "socket": (
        lambda: pgkv.Store(pgkv.Config("host=/run/postgresql dbname=shop")),
        "<Store 'kv_store' at /run/postgresql/shop>",
    ),
    "several hosts": (
        lambda: pgkv.Store(pgkv.Config("postgresql://a:1,b:2/shop")),
        "<Store 'kv_store' at a,b/shop>",
    ),
    "embedded": (
        lambda: pgkv.Store(pgkv.Config("embedded:///var/lib/app")),
        "<Store 'kv_store' at embedded:///var/lib/app>",
    ),
    "typed store": (
        lambda: store.typed(list[int], "msgpack"),
        f"<TypedStore of list[int] in msgpack, <Store 'kv_store' {PLACE}>>",
    ),
    "pipeline": (store.pipeline, "<Pipeline 0 operations queued>"),
    "atomic pipeline": (
        lambda: astore.pipeline(atomic=True),
        "<AsyncPipeline atomic, 0 operations queued>",
    ),
    "handle": (lambda: store.pipeline().get("k"), "<Handle get pending>"),
    "handle, done": (lambda: handle_of(b"v"), "<Handle get done>"),
    "handle, failed": (
        lambda: handle_of(pgkv.QueryError(PASSWORD)),
        "<Handle get failed: QueryError>",
    ),
    "connecting": (
        lambda: pgkv.AsyncStore.connect(DSN),
        "<Opening AsyncStore.connect(...), to be awaited or entered>",
    ),
    "lock": (lambda: pgkv.Lock(store, "billing"), "<Lock 'billing' ttl=30>"),
    "acquiring": (
        lambda: pgkv.AsyncLock(astore, "billing").acquire(),
        "<AsyncGrant 'billing', to be awaited or entered>",
    ),
    "semaphore": (
        lambda: pgkv.AsyncSemaphore(astore, "gpu", 4, ttl=0.5),
        "<AsyncSemaphore 'gpu' slots=4 ttl=0.5>",
    ),
    "lease": (
        lambda: lease_of(pgkv.Lock(store, "billing", ttl=3000)),
        "<Lease 'billing' token=17, 2700.0 s left>",
    ),
    "lease of a slot": (
        lambda: lease_of(pgkv.Semaphore(store, "gpu", 4, ttl=3000)),
        "<Lease 'gpu' slot=3 token=17, 2700.0 s left>",
    ),
    "lease, expired": (
        lambda: lease_of(pgkv.Lock(store, "billing"), begun=60),
        "<Lease 'billing' token=17, expired>",
    ),
    "leader": (lambda: pgkv.Leader(store, "cron"), "<Leader 'cron' ttl=15, not leading>"),
    "limiter": (lambda: limiter, "<RateLimiter 'api' 10/s burst 20; 1000/h>"),
    "reservation": (
        lambda: pgkv.Reservation(
            limiter,
            Reserved(limiter._flows.policy.degraded(allowed=True, retry_after=0), 1.25, None),
        ),
        "<Reservation 'api' delay=1.250>",
    ),
    "decision": (
        lambda: limiter._flows.policy.degraded(allowed=False, retry_after=1.0),
        "Decision(allowed=False, limit=20, remaining=0, retry_after=1, reset_after=0, "
        "rate='10/s burst 20', degraded=True)",
    ),
    "session store": (
        lambda: sessions,
        "<SessionStore 'kv_store_sessions' idle_timeout=1800 absolute_timeout=43200>",
    ),
    "session, not stored": (lambda: session_of(token=""), "<Session new>"),
    "session": (
        lambda: session_of("ada", is_new=False),
        f"<Session loaded handle={HANDLE}...>",
    ),
    "session, ended": (lambda: session_of(_ended=True), f"<Session ended handle={HANDLE}...>"),
    "session, moved": (lambda: session_of(_moved=True), f"<Session moved handle={HANDLE}...>"),
    "request's session": (loaded, f"<RequestSession <Session loaded handle={HANDLE}...>>"),
    "request's session, untouched": (RequestSession, "<RequestSession not loaded>"),
    "cached function": (lambda: load_user, f"<CachedFunction {__name__}.load_user:1 ttl=60>"),
    "cached coroutine": (
        lambda: load_order,
        f"<AsyncCachedFunction {__name__}.load_order:1 ttl=computed>",
    ),
    "cached, without a function": (
        lambda: pgkv.cached(ttl=None),
        "<Decorator of cached(ttl=None), to be put before a function>",
    ),
    "first level": (lambda: pgkv.L1(ttl=2), "<L1 max_entries=10000 ttl=2>"),
    "signed pickle": (lambda: pgkv.SignedPickle(PASSWORD.encode() * 3), "<SignedPickle>"),
    "middleware": (
        lambda: pgkv.WSGIRateLimitMiddleware(lambda _environ, _start: [], limiter=limiter),
        f"<WSGIRateLimitMiddleware limiter={limiter}>",
    ),
    "session middleware": (
        lambda: pgkv.WSGISessionMiddleware(lambda _environ, _start: [], sessions=sessions),
        f"<WSGISessionMiddleware cookie='__Host-session' sessions={sessions}>",
    ),
    "config": (
        lambda: pgkv.Config(DSN),
        "Config('user=ada password=*** dbname=shop host=db.example port=5433')",
    ),
}


@pytest.mark.parametrize(("make", "text"), SHOWN.values(), ids=SHOWN)
def test_what_is_shown(
    make: Callable[[], object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repr names the thing and the facts that one looks for, and neither a password nor a token."""
    now = clock()
    monkeypatch.setitem(globals(), "clock", lambda: now)
    for module in ("_runtime", "lock"):
        monkeypatch.setattr(f"pgkv.patterns.{module}.lease.clock", lambda: now)
    shown = repr(make())
    assert shown == text
    assert str(make()) == text
    assert PASSWORD not in shown
    assert TOKEN not in shown


def test_a_closed_store_says_so() -> None:
    """A closed store shows it, and so do its views."""
    closed = pgkv.Store(pgkv.Config(DSN))
    view = closed.namespace("a:")
    closed.close()
    assert repr(closed) == f"<Store 'kv_store' {PLACE}, closed>"
    assert repr(view) == f"<Store 'kv_store' namespace='a:' {PLACE}, closed>"


def test_looking_at_a_lease_changes_nothing() -> None:
    """The repr of a lease whose time has passed does not tell anybody of the loss."""
    lost: list[object] = []
    lease = lease_of(pgkv.Lock(store, "billing", on_lost=lost.append), begun=60)
    assert "expired" in repr(lease)
    assert lease._reason == ""
    assert lost == []


LONG = b"x" * 5_000_000


@pytest.mark.parametrize(
    "value",
    [
        pgkv.Entry("k", LONG, 1, None, MOMENT, MOMENT, MOMENT),
        pgkv.KeyValue("k", LONG),
        pgkv.CasResult(pgkv.CasStatus.MISMATCH, LONG, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_long_values_are_cut(value: object) -> None:
    """A value of megabytes is shown by its beginning and its size."""
    assert len(repr(value)) < 500
    assert "xxx'... (5,000,000 bytes)" in repr(value)


def test_short_values_are_whole() -> None:
    """A value that fits a line is shown whole."""
    assert repr(pgkv.KeyValue("k", b"v" * 64)) == f"KeyValue(key='k', value=b'{'v' * 64}')"
    assert repr(pgkv.CasResult(pgkv.CasStatus.SUCCESS, b"v", 1)) == (
        "CasResult(status=CasStatus.SUCCESS, current=b'v', version=1)"
    )


def is_value(kind: type) -> bool:
    """Values are whole from the beginning: their class makes them at once."""
    values = (enum.Enum, BaseException, tuple, msgspec.Struct)
    return is_dataclass(kind) or issubclass(kind, values)


CLASSES = [
    kind
    for name in pgkv._MODULE_OF
    if isinstance(kind := getattr(pgkv, name), type) and not is_value(kind)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_half_made(kind: type) -> None:
    """An object whose making failed, as the locals in a traceback hold it, can be shown."""
    assert repr(object.__new__(kind)) == f"<{kind.__name__}>"


@pytest.mark.parametrize("dsn", [None, 7, b"x", "mysql://ada:hunter2@h/db", "\ud800"])
def test_a_refused_config(dsn: Any) -> None:
    """A Config that was refused can be shown too, and shows no password."""
    config = object.__new__(pgkv.Config)
    with pytest.raises(pgkv.ConfigError):
        config.__init__(dsn)  # type: ignore[misc]  # as the class does it
    assert PASSWORD not in repr(config)


def test_a_user_s_repr_may_fail() -> None:
    """What a user's object makes of itself cannot make a repr of ours fail."""

    class Bad:
        def __repr__(self) -> str:
            raise RuntimeError

    class Shown:
        __repr__ = _observe.shown(lambda _self: repr(Bad()))

    assert repr(Shown()) == "<Shown>"


# -- what can be sent to another process ----------------------------------------------------

LIVING = [
    "store",
    "async store",
    "namespace",
    "typed store",
    "lock",
    "semaphore",
    "lease",
    "leader",
    "limiter",
    "reservation",
    "session store",
]


@pytest.mark.parametrize("name", LIVING)
@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_stays_in_its_process(name: str, send: Callable[[Any], Any]) -> None:
    """What lives on connections is not pickled or copied, and says what to do instead."""
    with pytest.raises(TypeError, match=r"cannot be pickled or copied.*make one in each process"):
        send(SHOWN[name][0]())


@pytest.mark.parametrize(
    "value",
    [
        pgkv.Config(DSN),
        pgkv.RetryPolicy(),
        pgkv.Entry("k", b"v", 1, None, MOMENT, MOMENT, MOMENT),
        pgkv.KeyValue("k", b"v"),
        pgkv.CasResult(pgkv.CasStatus.SUCCESS, b"v", 1),
        pgkv.TypedCasResult(pgkv.CasStatus.SUCCESS, [1], 1),
        pgkv.ScanOptions(prefix="a"),
        pgkv.Rate.parse("10/s burst 20"),
        pgkv.LimiterCounts(1, 2, 3),
        limiter._flows.policy.degraded(allowed=True, retry_after=0.0),
        load_user,
        load_user.cache_info(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_travel(value: object) -> None:
    """Values, settings and cached functions can be pickled, and arrive equal."""
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        pgkv.Entry("k", b"v", 1, None, MOMENT, MOMENT, MOMENT),
        pgkv.KeyValue("k", b"v"),
        pgkv.CasResult(pgkv.CasStatus.SUCCESS, b"v", 1),
        pgkv.ScanOptions(prefix="a"),
        pgkv.Rate.parse("10/s burst 20"),
        pgkv.LimiterCounts(1, 2, 3),
        limiter._flows.policy.degraded(allowed=True, retry_after=0.0),
        load_user.cache_info(),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_values_can_be_kept(value: Any, codec: Any) -> None:
    """Values of pgkv can be kept in a typed store, and be the result of a cached function."""
    serializer: Serializer[Any] = Serializer(type(value), codec)
    assert serializer.decode("k", serializer.encode("k", value)) == value


ERRORS = [name for name in pgkv._MODULE_OF if name.endswith("Error")]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_where_they_are_found(name: str) -> None:
    """A traceback names an exception as a program imports it, and it travels with what it holds."""
    kind = getattr(pgkv, name)
    assert f"{kind.__module__}.{kind.__qualname__}" == f"pgkv.{name}"
    error = kind("text")
    error.retryable, error.reason = True, "gone"
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived)) == (kind, "text")
    assert (arrived.retryable, arrived.reason) == (True, "gone")


def test_public_objects_name_their_module() -> None:
    """Every public class and function can be found where its __module__ says."""
    for name in pgkv._MODULE_OF:
        thing = getattr(pgkv, name)
        if isinstance(thing, type | types.FunctionType):
            module = __import__(thing.__module__, fromlist=["_"])
            assert getattr(module, thing.__name__) is thing
