"""Sessions: load, save of one field, touch, rotate; against Django's database sessions, and
Flask-Session and starsessions on Redis, each through the calls that its middleware makes."""

from __future__ import annotations

from datetime import timedelta
from importlib import import_module  # Django and Flask-Session have no types: mypy looks away
from itertools import count, cycle
from typing import Any

from psycopg.conninfo import conninfo_to_dict

import pgkv
from pgkv.patterns.session.data import id_of
from tests.benchmarks.case import GET, KEYS, PGKV, RAW, Bench, Entrants, case, each

DJANGO = "Django db sessions"
FLASK = "Flask-Session, Redis"
STARSESSIONS = "starsessions, Redis"

SESSIONS = 500
DATA: dict[str, Any] = {
    "cart": [{"sku": f"A-{n}", "amount": n} for n in range(4)],
    "locale": "de_AT",
    "theme": "dark",
    "csrf": "x" * 43,
    "n": 0,
}


def filled(bench: Bench, **options: Any) -> tuple[pgkv.SessionStore, list[str]]:
    """A session store and the tokens in it."""
    sessions = pgkv.SessionStore(bench.store(), **options)
    tokens = [sessions.create(DATA, user_id=n).id for n in range(SESSIONS)]
    bench.vacuum()
    return sessions, tokens


def django_sessions(bench: Bench) -> tuple[Any, list[str]]:
    """Django's class of a session, and the keys of some."""
    settings: Any = import_module("django.conf").settings
    parts = conninfo_to_dict(bench.dsn)
    if not settings.configured:
        names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host"}
        names["PORT"] = "port"
        database = {theirs: str(parts.get(ours) or "") for theirs, ours in names.items()}
        settings.configure(
            INSTALLED_APPS=["django.contrib.sessions"],
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "CONN_MAX_AGE": None,
                    **database,
                }
            },
            SECRET_KEY="bench",
        )
        import_module("django").setup()
    SessionStore: Any = import_module("django.contrib.sessions.backends.db").SessionStore  # noqa: N806  # a class
    connection: Any = import_module("django.db").connection
    model = SessionStore.get_model_class()
    if model._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(model)
    bench.closing(connection.close)

    def made() -> str:
        session = SessionStore()
        session.update(DATA)
        session.create()
        return str(session.session_key)

    return SessionStore, [made() for _ in range(SESSIONS)]


def flask_sessions(bench: Bench) -> tuple[Any, list[str]] | None:
    """Flask-Session's interface on Redis, and the names of some sessions; None without Redis."""
    client = bench.redis()
    return None if client is None else flask_sessions_in("redis", "Redis", client)


def flask_sessions_in(module: str, kind: str, client: Any) -> tuple[Any, list[str]]:
    """Flask-Session's interface of that kind, and the names of some sessions."""
    import flask

    made: Any = getattr(import_module(f"flask_session.{module}"), f"{kind}SessionInterface")
    interface = made(flask.Flask("bench"), client=client)
    names = [f"session:{n}" for n in range(SESSIONS)]
    for name in names:
        interface._upsert_session(LIFETIME, DATA, name)
    return interface, names


LIFETIME = timedelta(hours=1)


@case("session load", {GET: 2.0, RAW: 1.5, DJANGO: 0.5, FLASK: None})
def load(bench: Bench) -> Entrants:
    sessions, tokens = filled(bench)
    yield PGKV, each(sessions.load, cycle(tokens))
    ops = [sessions._flows.sql.look(id_of(token)) for token in tokens]
    yield RAW, each(bench.raw().sender(ops[0]), cycle([op.params for op in ops]))
    django, keys = django_sessions(bench)
    yield DJANGO, each(lambda key: django(key).load(), cycle(keys))
    yield GET, each(bench.store().get, cycle(KEYS))
    if flask := flask_sessions(bench):
        yield FLASK, each(flask[0]._retrieve_session_data, cycle(flask[1]))


@case("session load + save of one field", {DJANGO: 0.7, FLASK: 1.5})
def save(bench: Bench) -> Entrants:
    sessions, tokens = filled(bench)
    numbers = count(1)

    def ours(token: str) -> None:
        session = sessions.load(token)
        assert session is not None
        session.data["n"] = next(numbers)
        sessions.save(session)

    yield PGKV, each(ours, cycle(tokens))
    django, keys = django_sessions(bench)

    def theirs(key: str) -> None:
        session = django(key)
        session["n"] = next(numbers)
        session.save()

    yield DJANGO, each(theirs, cycle(keys))
    if flask := flask_sessions(bench):
        interface, names = flask

        def redis(name: str) -> None:
            data = interface._retrieve_session_data(name)
            data["n"] = next(numbers)
            interface._upsert_session(LIFETIME, data, name)

        yield FLASK, each(redis, cycle(names))


@case("session load that notes the use", {DJANGO: 0.7, FLASK: None})
def touch(bench: Bench) -> Entrants:
    sessions, tokens = filled(bench, touch_interval=0)
    yield PGKV, each(sessions.load, cycle(tokens))
    django, keys = django_sessions(bench)

    def theirs(key: str) -> None:
        session = django(key)
        session._get_session()
        session.save()  # SESSION_SAVE_EVERY_REQUEST: Django has no other way

    yield DJANGO, each(theirs, cycle(keys))
    if flask := flask_sessions(bench):
        interface, names = flask

        def redis(name: str) -> None:
            interface._upsert_session(LIFETIME, interface._retrieve_session_data(name), name)

        yield FLASK, each(redis, cycle(names))


@case("session rotate", {DJANGO: None, FLASK: None})
def rotate(bench: Bench) -> Entrants:
    sessions, tokens = filled(bench)
    loaded = [session for token in tokens if (session := sessions.load(token))]
    yield PGKV, each(lambda session: sessions.rotate(session, user_id=7), cycle(loaded))
    django, keys = django_sessions(bench)
    theirs = [django(key) for key in keys]
    yield DJANGO, each(lambda session: session.cycle_key(), cycle(theirs))
    if flask := flask_sessions(bench):
        interface, names = flask

        def redis(name: str) -> None:
            # What its regenerate() does, under the same name again.
            interface._delete_session(name)
            interface._upsert_session(LIFETIME, DATA, name)

        yield FLASK, each(redis, cycle(names))


@case("session load + save of one field, asyncio", {STARSESSIONS: None})
def save_async(bench: Bench) -> Entrants:
    sessions = pgkv.AsyncSessionStore(bench.async_store())
    numbers = count(1)

    async def make() -> list[str]:
        return [(await sessions.create(DATA, user_id=n)).id for n in range(SESSIONS)]

    tokens = cycle(bench.wait(make()))

    async def ours(_key: str) -> None:
        session = await sessions.load(next(tokens))
        assert session is not None
        session.data["n"] = next(numbers)
        await sessions.save(session)

    yield PGKV, bench.tasks(1, ours)
    client = bench.async_redis()
    if client is None:
        return
    from starsessions import JsonSerializer
    from starsessions.stores.redis import RedisStore

    store, serializer = RedisStore(connection=client), JsonSerializer()

    async def theirs(key: str) -> None:
        raw = await store.read(key, 3600)
        data = dict(serializer.deserialize(raw)) if raw.startswith(b"{") else dict(DATA)
        data["n"] = next(numbers)
        await store.write(key, serializer.serialize(data), 3600, 3600)

    yield STARSESSIONS, bench.tasks(1, theirs)
