"""pgkv in a Django project: cache, sessions, rate limits, tables, checks and command."""

import asyncio
import functools
import io
import json
import os
import threading
import time

import django
import pytest
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

from pgkv import Pooler

told = conninfo_to_dict(os.environ["PGKV_SUITE_DSN"])
DATABASE = {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": told["dbname"],
    "USER": told["user"],
    "HOST": told["host"],
    "PORT": told["port"],
}
BACKEND = "pgkv.integrations.django.PgkvCache"
settings.configure(
    SECRET_KEY="secret",
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": DATABASE, "lite": {"ENGINE": "django.db.backends.sqlite3"}},
    CACHES={
        "default": {"BACKEND": BACKEND},
        "atomic": {"BACKEND": BACKEND, "OPTIONS": {"atomic": True, "table_name": "atomic_cache"}},
        "small": {"BACKEND": BACKEND, "OPTIONS": {"MAX_ENTRIES": 30, "table_name": "small_cache"}},
        "large": {
            "BACKEND": BACKEND,
            "OPTIONS": {"MAX_ENTRIES": 5000, "table_name": "large_cache"},
        },
        "elsewhere": {
            "BACKEND": BACKEND,
            "OPTIONS": {"schema": "app", "table_name": "c2", "pooler": Pooler.TRANSACTION},
        },
        "same": {"BACKEND": BACKEND, "KEY_PREFIX": "same"},
    },
    SESSION_ENGINE="pgkv.integrations.django.sessions",
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "pgkv.integrations.django",
        "rest_framework",
    ],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    REST_FRAMEWORK={
        "DEFAULT_THROTTLE_RATES": {"anon": "2/day", "search": "1/day"},
        "UNAUTHENTICATED_USER": None,
    },
)
django.setup()

from django.apps import apps  # noqa: E402
from django.contrib.auth import authenticate, get_user_model, login  # noqa: E402
from django.core import checks  # noqa: E402
from django.core.cache import cache, caches  # noqa: E402
from django.core.management import CommandError, call_command  # noqa: E402
from django.db import connection, reset_queries, transaction  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.test import AsyncClient, Client  # noqa: E402
from django.test.utils import CaptureQueriesContext  # noqa: E402
from django.urls import path  # noqa: E402
from rest_framework.decorators import api_view, throttle_classes  # noqa: E402
from rest_framework.response import Response  # noqa: E402

from pgkv import (  # noqa: E402
    AsyncRateLimiter,
    AsyncStore,
    Config,
    ConfigError,
    RateLimiter,
    Store,
    _observe,
    on_event,
)
from pgkv.integrations.django import PgkvCache, sessions  # noqa: E402
from pgkv.integrations.django.ratelimit import ratelimit  # noqa: E402
from pgkv.integrations.django.stores import STORES, config_for  # noqa: E402
from pgkv.integrations.django.throttling import AnonThrottle, ScopedThrottle  # noqa: E402

limiter = RateLimiter(Store(config_for("", {})), "2/day", name="views", timeout=30)
async_limiter = AsyncRateLimiter(
    AsyncStore(config_for("", {})), "2/day", name="async-views", timeout=30
)


@ratelimit(limiter, key="all")
def limited(request):
    return HttpResponse("ok")


@ratelimit(async_limiter, key="all")
async def limited_async(request):
    return HttpResponse("ok")


def enter(request):
    login(request, authenticate(request, username=request.GET["name"], password="x"))
    return HttpResponse(request.session.session_key)


def whoami(request):
    return HttpResponse(str(request.user))


@api_view(["GET"])
@throttle_classes([AnonThrottle])
def api(request):
    return Response("ok")


@api_view(["GET"])
@throttle_classes([ScopedThrottle])
def search(request):
    return Response("ok")


search.cls.throttle_scope = "search"

urlpatterns = [
    path("limited", limited),
    path("limited-async", limited_async),
    path("enter", enter),
    path("whoami", whoami),
    path("api", api),
    path("search", search),
]


@pytest.fixture(scope="module", autouse=True)
def _database():
    call_command("migrate", verbosity=0)
    yield
    STORES.close()
    limiter._store.close()
    connection.close()


@pytest.fixture
def users():
    made = [get_user_model().objects.create_user(name, password="x") for name in ("a", "b")]
    yield made
    for user in made:
        user.delete()


def tables():
    with connection.cursor() as cursor:
        cursor.execute("SELECT relname, relpersistence::text FROM pg_class WHERE relkind = 'r'")
        return dict(cursor.fetchall())


# -- tables, checks, command


def test_migrate_makes_the_tables():
    found = tables()
    assert found["django_cache"] == "u"
    assert found["atomic_cache"] == "u"
    assert found["pgkv_sessions"] == "p"  # a crash of the server logs nobody out


def test_checks_name_a_wrong_setting():
    assert checks.run_checks(tags=["caches"]) == []
    wrong = {**settings.CACHES, "wrong": {"BACKEND": BACKEND, "LOCATION": "lite"}}
    settings.CACHES, kept = wrong, settings.CACHES
    caches.settings = wrong
    try:
        [error] = checks.run_checks(tags=["caches"])
    finally:
        settings.CACHES = caches.settings = kept
    assert error.id == "pgkv.E001"
    assert "is a sqlite database; pgkv needs PostgreSQL" in error.msg


@pytest.mark.parametrize(
    ("location", "options", "said"),
    [
        ("nowhere", {}, "neither a DSN nor an alias of DATABASES"),
        ("", {"poll_size": 3}, "has no OPTIONS poll_size; there are"),
        ("postgresql://x", {"atomic": True}, "needs an alias of DATABASES"),
        ("", {"pool_max_size": -1}, "pool_max_size"),
        ("", {"retry": {"attempts": 3}}, "retry"),
    ],
)
def test_wrong_settings_say_what_there_is(location, options, said):
    with pytest.raises(ConfigError, match=said):
        PgkvCache(location, {"OPTIONS": options}).get("k")


def test_the_command_sees_the_caches_table(capfd):
    cache.clear()
    cache.set("seen", b"by the command")
    call_command("pgkv", "stats", "--json")
    assert json.loads(capfd.readouterr().out)["total_keys"] == 1
    call_command("pgkv", "doctor")  # a failed check would be a SystemExit
    assert "django_cache" in capfd.readouterr().out


def test_the_command_migrates_every_table(capfd, monkeypatch):
    """Of all caches, in their schemas, and of the sessions; each table once."""

    def run(*arguments):
        code = 0
        try:
            call_command("pgkv", *arguments)
        except SystemExit as ended:
            code = ended.code
        return code, capfd.readouterr().out

    few = {alias: settings.CACHES[alias] for alias in ("default", "elsewhere", "same")}
    monkeypatch.setattr(settings, "CACHES", few)
    STORES.close()
    with connection.cursor() as cursor:
        for table in ("app.c2", "pgkv_sessions"):
            cursor.execute(f"ALTER TABLE {table} DROP COLUMN version")
    code, said = run("migrate", "--dry-run")
    assert code == 1
    heads = [line for line in said.splitlines() if line.startswith("--") or line == "nothing to do"]
    assert heads == [
        '-- "django_cache"',
        "nothing to do",
        '-- "app"."c2"',
        '-- "pgkv_sessions"',
    ]
    for table in ('"app"."c2"', '"pgkv_sessions"'):
        assert f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS version" in said
    assert run("--cache", "default", "migrate", "--dry-run") == (0, "nothing to do\n")
    assert run("migrate") == (0, said)
    for reach, table in ((["--cache", "elsewhere"], "app.c2"), (["--sessions"], "pgkv_sessions")):
        assert run(*reach, "set", "seen", "1")[0] == 0
        with connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM {table} WHERE key = 'seen' AND version > 0")
            assert cursor.rowcount == 1
    monkeypatch.setattr(settings, "SESSION_ENGINE", "another")
    with pytest.raises(CommandError, match="--sessions needs SESSION_ENGINE"):
        call_command("pgkv", "--sessions", "stats")


# -- Django's debug tools


def test_statements_are_seen_where_debug_is_on():
    """`connection.queries` has those of the cache and of sessions, and no key or value."""
    cache.set("quiet", 1)
    with CaptureQueriesContext(connection) as seen:
        cache.get("quiet")
    assert len(seen) == 0  # DEBUG is off: nothing is added to a call
    settings.DEBUG, hooks = True, list(_observe.hooks)
    try:
        apps.get_app_config("pgkv").ready()
        reset_queries()
        cache.set("secret", "value")
        cache.get_many(["secret", "other"])
        sessions.SessionStore("n" * 32).load()
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        with CaptureQueriesContext(connection) as seen:
            cache.get("secret")
        texts = [each["sql"] for each in connection.queries]
    finally:
        settings.DEBUG = False
        _observe.hooks[:] = hooks
    assert [text[:15] for text in texts[:3]] == [
        "/* pgkv set */ ",
        "/* pgkv get_man",
        "/* pgkv get */ ",
    ]
    assert texts[3] == "SELECT 1"
    assert '"django_cache"' in texts[0]
    assert '"pgkv_sessions"' in texts[2]
    assert [each["sql"][:15] for each in seen] == ["/* pgkv get */ "]
    assert "secret" not in "".join(texts)


def test_the_debug_toolbars_cache_panel_counts_calls():
    """It wraps the methods of any cache; a hit is told from a miss."""
    from debug_toolbar.panels.cache import CachePanel

    panel = CachePanel(None, lambda request: None)
    cache.delete("k")
    panel.enable_instrumentation()
    try:
        cache.get("k")
        cache.set("k", 1)
        cache.get_many(["k", "none"])
        cache.incr("k")
    finally:
        panel.disable_instrumentation()
    assert [each["name"] for each in panel.calls] == ["get", "set", "get_many", "incr"]
    assert (panel.hits, panel.misses) == (1, 2)
    assert {each["backend"] for each in panel.calls} == {"default (PgkvCache)"}


# -- cache


def test_incr_keeps_the_timeout():
    cache.set("n", 1, timeout=1000)
    before = cache._store.ttl(cache.make_key("n"))
    assert cache.incr("n", 5) == 6
    assert before - 100 < cache._store.ttl(cache.make_key("n")) <= before
    with pytest.raises(ValueError, match="not found"):
        cache.incr("none")
    assert cache.get("none") is None
    cache.set("text", "no number")
    with pytest.raises(TypeError):
        cache.incr("text")


def test_a_location_is_an_alias_or_a_dsn():
    """The default alias by its name is the same store; a DSN names the same table at that server."""
    assert PgkvCache("default", {}).config is PgkvCache("", {}).config
    cache.set("k", "by alias")
    assert PgkvCache(os.environ["PGKV_SUITE_DSN"], {}).get("k") == "by alias"


def test_many_keys_are_one_statement():
    """Each of the *_many methods, blocking and async; the async ones run in the event loop's thread."""
    told = []
    keys = {f"k{n}": n for n in range(100)}

    async def use():
        await cache.aset_many(keys)
        assert await cache.aget_many(keys) == keys
        await cache.adelete_many(keys)
        await cache.aget("k")
        await cache.aget_or_set("k", 1)
        await cache.aincr_version("k")

    cache.clear()  # connects, and prepares nothing that is counted

    def note(event):
        if event.name != "cleanup":  # in the background, after one of many writes
            told.append((event.name, threading.get_ident()))

    remove = on_event(note)
    try:
        cache.set_many(keys)
        assert cache.get_many(keys) == keys
        cache.delete_many(keys)
        asyncio.run(use())
    finally:
        remove()
    names = [name for name, _ in told]
    assert names[:6] == ["set_many", "get_many", "delete_many"] * 2
    assert {thread for _, thread in told} == {threading.get_ident()}


def test_no_incr_of_many_is_lost():
    cache.set("many", 0)
    threads = [
        threading.Thread(target=lambda: [cache.incr("many") for _ in range(25)]) for _ in range(4)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert cache.get("many") == 100


def test_threads_share_one_pool():
    found = set()
    threads = [threading.Thread(target=lambda: found.add(id(cache._store))) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 1


def test_a_cache_inside_atomic_commits_and_rolls_back_with_it():
    joined = caches["atomic"]
    joined.set("k", "before")
    with transaction.atomic():
        joined.set("k", "inside")
        assert joined.get("k") == "inside"
        transaction.set_rollback(True)
    assert joined.get("k") == "before"
    with transaction.atomic():
        joined.set("k", "after")
    assert joined.get("k") == "after"


def test_max_entries_is_the_bound_of_the_table():
    """At least 100; a cache that names none has no bound."""
    bounds = [caches[each].config.max_entries for each in ("small", "large", "default")]
    assert bounds == [100, 5000, None]
    for first in range(0, 600, 100):
        caches["small"].set_many({f"n{first + each}": "x" for each in range(100)})
    caches["small"]._store.evict()
    assert caches["small"]._store.count() <= 100


def test_async_methods_run_on_the_event_loop_and_end_with_it():
    async def use():
        assert await cache.aadd("a", 1) is True
        assert await cache.aadd("a", 2) is False
        assert await cache.aget("a") == 1
        assert await cache.aincr("a", 2) == 3
        await cache.aset_many({"b": "x", "c": None})
        assert await cache.aget_many(["a", "b", "c", "d"]) == {"a": 3, "b": "x", "c": None}
        assert await cache.ahas_key("c") is True
        assert await cache.atouch("b", 10) is True
        await cache.aset("b", "gone", timeout=0)
        assert await cache.aget("b", "none") == "none"
        assert await cache.aget_or_set("e", lambda: 5) == 5
        assert await cache.adelete("a") is True
        await cache.adelete_many(["c", "e"])
        with pytest.raises(ValueError, match="not found"):
            await cache.aincr("a")
        await cache.aclear()
        return await STORES.get_async(cache.config)

    STORES.close()  # of threads
    first, second = asyncio.run(use()), asyncio.run(use())
    assert first is not second  # each loop has its own
    left, end = 1, time.monotonic() + 90
    while left and time.monotonic() < end:  # a backend ends some time after its connection
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pgkv'"
            )
            [left] = cursor.fetchone()
    assert left == 0
    assert not STORES._of_loops


def test_a_serializer_of_the_users():
    class Json:
        def dumps(self, value):
            return json.dumps(value).encode()

        def loads(self, data):
            return json.loads(data)

    own = PgkvCache("", {"OPTIONS": {"serializer": Json}})
    own.set("k", {"a": [1]})
    assert own._store.get(own.make_key("k")) == b'{"a": [1]}'
    assert own.get("k") == {"a": [1]}


# -- rate limits


def test_a_limited_view_answers_429():
    client = Client()
    assert [client.get("/limited").status_code for _ in range(3)] == [200, 200, 429]
    refused = client.get("/limited")
    assert refused["Content-Type"] == "application/problem+json"
    assert int(refused["Retry-After"]) > 1000


def test_a_limited_async_view_answers_429():
    async def use():
        client = AsyncClient()
        codes = [(await client.get("/limited-async")).status_code for _ in range(3)]
        await async_limiter._store.close()
        return codes

    assert asyncio.run(use()) == [200, 200, 429]


def test_an_async_view_refuses_a_blocking_limiter():
    async def view(request): ...

    with pytest.raises(ConfigError):
        ratelimit(limiter)(view)


def test_the_throttles_of_rest_framework(monkeypatch):
    # A busy machine is no outage, in which all are let in.
    patient = functools.partial(RateLimiter, timeout=30)
    monkeypatch.setattr("pgkv.integrations.django.throttling.RateLimiter", patient)
    client = Client()
    assert [client.get("/api").status_code for _ in range(3)] == [200, 200, 429]
    assert int(client.get("/api")["Retry-After"]) > 1000
    assert [client.get("/search").status_code for _ in range(2)] == [200, 429]


# -- sessions


def test_a_logout_everywhere_ends_all_sessions_of_one_user(users):
    a = users[0]
    clients = {name: Client() for name in ("a1", "a2", "b")}
    keys = {name: each.get(f"/enter?name={name[0]}").content for name, each in clients.items()}
    assert len(set(keys.values())) == 3
    kept = sessions.SessionStore(clients["a1"].cookies["sessionid"].value)
    assert sessions.logout(a, keep=kept) == 1
    who = {name: each.get("/whoami").content.decode() for name, each in clients.items()}
    assert who == {"a1": "a", "a2": "AnonymousUser", "b": "b"}
    assert asyncio.run(sessions.alogout(a)) == 1
    assert sessions.logout(a) == 0
    assert clients["a1"].get("/whoami").content == b"AnonymousUser"


def test_a_late_save_does_not_revive_a_session_that_was_logged_out(users):
    from django.contrib.sessions.backends.base import UpdateError

    client = Client()
    client.get("/enter?name=a")
    late = sessions.SessionStore(client.cookies["sessionid"].value)
    assert late["_auth_user_id"]
    sessions.logout(users[0])
    late["cart"] = [1]
    with pytest.raises(UpdateError):
        late.save()
    assert not late.exists(late.session_key)


def test_a_session_without_a_key_is_empty():
    session = sessions.SessionStore()
    assert session.load() == {}
    assert asyncio.run(session.aload()) == {}


def test_the_table_holds_no_session_key(users):
    client = Client()
    key = client.get("/enter?name=a").content.decode()
    with connection.cursor() as cursor:
        cursor.execute("SELECT string_agg(key, ' ') FROM pgkv_sessions")
        assert key not in cursor.fetchone()[0]


def test_clearsessions_deletes_what_has_ended():
    session = sessions.SessionStore()
    session.set_expiry(1)
    session.create()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE pgkv_sessions SET expires_at = now() - interval '1 minute'")
    call_command("clearsessions", stdout=io.StringIO())
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pgkv_sessions")
        assert cursor.fetchone()[0] == 0


def test_sessions_are_settings_away_from_another_server():
    settings.PGKV_SESSIONS = {
        "LOCATION": os.environ["PGKV_SUITE_DSN"],
        "OPTIONS": {"table_name": "other"},
    }
    try:
        assert sessions.config() == Config(
            os.environ["PGKV_SUITE_DSN"],
            table_name="other",
            table_type=sessions.TableType.REGULAR,
        )
    finally:
        del settings.PGKV_SESSIONS
