"""A Flask service that may run any number of times: what its instances share is in PostgreSQL.

    python examples/flask_service.py                             # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/flask_service.py

That makes the application twice and visits both with Flask's own client. To serve it:
`flask --app examples.flask_service run`, with PGKV_DSN set, or else with an embedded PostgreSQL that
keeps its data.

Look at: passwords, which nobody guesses more than five times an hour, whichever instance is asked;
the phone, logged out from the laptop; a report that one instance made for both; a nightly job that
both start and one runs.
"""

import atexit
import datetime as dt
import os
import subprocess
import sys
import tempfile
import time

import click
import psycopg
from flask import Flask, abort, request, session

import pgkv
from pgkv import embedded
from pgkv.integrations.flask import PgkvSessionInterface, rate_limit

SCHEMA = "pgkv_example_flask"
PASSWORDS = {"ada": "lovelace"}  # yours are hashed


def create_app() -> Flask:
    """Make an instance, with a store of its own."""
    dsn = os.environ.get("PGKV_DSN", "embedded:///")
    store = pgkv.Store.connect(dsn, schema=SCHEMA)
    atexit.register(store.close)
    sessions = pgkv.SessionStore(store, idle_timeout=1800)
    guesses = pgkv.RateLimiter(store, "5/hour", name="guesses", timeout=20)
    app = Flask(__name__)
    # This is plain http; and a visit waits for a slow database rather than get a 503 after five seconds.
    app.session_interface = PgkvSessionInterface(sessions, secure=False, timeout=20)

    # Closed: while the limit cannot be checked, nobody guesses at all.
    @app.post("/login")
    @rate_limit(
        guesses, key=lambda sent: f"{sent.remote_addr} {sent.form['name']}", on_error="closed"
    )
    def login() -> str:
        name = request.form["name"]
        if PASSWORDS.get(name) != request.form["password"]:
            abort(403)
        session["user"] = name
        sessions.rotate(session, user_id=name)
        return f"welcome, {name}"

    def user() -> str:
        """Who is logged in."""
        if "user" not in session:
            abort(401)
        return str(session["user"])

    @app.get("/devices")
    def devices() -> list[dict[str, object]]:
        return [
            {"handle": each.handle, "idle": round(each.idle())}
            for each in sessions.list_user(user())
        ]

    @app.post("/devices/logout-others")
    def log_out_others() -> dict[str, int]:
        return {"ended": sessions.destroy_user(user(), keep=session)}

    @app.post("/logout")
    def logout() -> dict[str, bool]:
        return {"ended": sessions.destroy(session)}

    @pgkv.cached(ttl=60, tags=("reports",), store=store, store_timeout=20)
    def report(day: dt.date) -> dict[str, str]:
        """Return figures that take long to find."""
        time.sleep(0.2)
        return {"day": day.isoformat(), "as_of": dt.datetime.now(dt.UTC).isoformat()}

    @app.get("/reports/<day>")
    def get_report(day: str) -> dict[str, str]:
        user()
        return report(dt.date.fromisoformat(day))

    @pgkv.locked("nightly", store=store, on_busy="skip")
    def close_the_day(day: dt.date) -> bool | None:
        """The nightly job: once a day, on one instance; None where another one is at it."""
        if store.exists(f"closed:{day}"):
            return False
        time.sleep(0.5)  # the work
        store.set_ex(f"closed:{day}", "yes", 7 * 86400)
        pgkv.invalidate_tag("reports", store=store)
        return True

    @app.cli.command("close-the-day")
    @click.argument("day", type=dt.date.fromisoformat)
    def nightly(day: dt.date) -> None:
        print({True: "done", False: "was done before", None: "runs elsewhere"}[close_the_day(day)])

    return app


def see(what: str, found: object, expected: object) -> None:
    """Say what was seen, and end if it is not what was promised."""
    print(f"{what}: {found}")
    if found != expected:
        raise SystemExit(f"that should be {expected}")


def visit(one: Flask, two: Flask) -> None:
    """Visit both instances with two browsers."""
    right, wrong = ({"name": "ada", "password": each} for each in ("lovelace", "guess"))
    laptop, phone = one.test_client(), two.test_client()
    see("login", laptop.post("/login", data=right).text, "welcome, ada")
    see("login", phone.post("/login", data=right).text, "welcome, ada")
    answers = [app.test_client().post("/login", data=wrong) for app in [one, two] * 2]
    see("guesses", [each.status_code for each in answers], [403, 403, 403, 429])
    print("the refusal says: Retry-After:", answers[-1].headers["Retry-After"])

    path = "/reports/2026-02-28"
    reports = [each.get(path).get_json() for each in (laptop, phone)]
    see("reports of two instances are one", reports[0] == reports[1], True)
    see("devices", len(laptop.get("/devices").get_json()), 2)
    ended = laptop.post("/devices/logout-others").get_json()["ended"]
    see("logged out from the laptop", ended, 1)
    see("the phone gets", phone.get("/devices").status_code, 401)

    command = [sys.executable, "-m", "flask", "--app", __file__, "close-the-day", "2026-02-28"]
    crons = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  # this program
        for _ in range(2)
    ]
    said = [each.communicate()[0].strip() for each in crons]
    see("nightly jobs that ran", said.count("done"), 1)
    see("the report is a new one", laptop.get(path).get_json() != reports[0], True)
    laptop.post("/logout")
    see("after the logout", laptop.get(path).status_code, 401)


def main() -> None:
    """Make two instances and visit them."""
    try:
        visit(create_app(), create_app())
    finally:
        with psycopg.connect(os.environ["PGKV_DSN"], autocommit=True) as conn:
            conn.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
