"""A FastAPI service that may run any number of times: what its instances share is in PostgreSQL.

    python examples/fastapi_service.py                           # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/fastapi_service.py

That starts two instances and visits both. To serve it: `uvicorn examples.fastapi_service:app`, with
PGKV_DSN set, or else with an embedded PostgreSQL that keeps its data.

Look at: a limit per API key that both instances count together; a quote computed by one of them for
both; a login at one of them that holds at the other; a nightly job that both start and one runs.
"""

import asyncio
import contextlib
import datetime as dt
import multiprocessing
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import psycopg
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel

import pgkv
from pgkv import embedded
from pgkv.integrations.fastapi import RateLimited, problem_response, rate_limit

SCHEMA = "pgkv_example_fastapi"
API_KEYS = {"key-of-acme": "acme", "key-of-globex": "globex"}
PASSWORDS = {"ada": "lovelace"}  # yours are hashed

# Nothing connects yet: it can all be made at import.
store = pgkv.AsyncStore(pgkv.Config(os.environ.get("PGKV_DSN", "embedded:///"), schema=SCHEMA))
limiter = pgkv.AsyncRateLimiter(store, "5/hour", name="quotes", timeout=20)
sessions = pgkv.AsyncSessionStore(store, idle_timeout=1800)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with store:
        await store.ping()  # a wrong DSN ends the start, not the first request
        yield


app = FastAPI(lifespan=lifespan)
app.add_exception_handler(RateLimited, problem_response)
# This is plain http; and a visit waits for a slow database rather than get a 503 after five seconds.
app.add_middleware(pgkv.SessionMiddleware, sessions=sessions, secure=False, timeout=20)


def customer(request: Request) -> str:
    """Who sends the API key; also what the limit counts."""
    if name := API_KEYS.get(request.headers.get("x-api-key", "")):
        return name
    raise HTTPException(401, "unknown API key")


@pgkv.cached(ttl=60, store=store, store_timeout=20)
async def quote(product: str) -> dict[str, Any]:
    """Return a price that takes long to find."""
    await asyncio.sleep(0.2)
    return {"product": product, "cents": 100 * len(product), "found_by": os.getpid()}


@app.get("/quotes/{product}", dependencies=[Depends(rate_limit(limiter, key=customer))])
async def get_quote(product: str) -> dict[str, Any]:
    return await quote(product)


class Credentials(BaseModel):
    name: str
    password: str


@app.post("/login")
async def login(request: Request, sent: Credentials) -> str:
    if PASSWORDS.get(sent.name) != sent.password:
        raise HTTPException(403)
    await sessions.rotate(request.session, user_id=sent.name)
    return f"welcome, {sent.name}"


async def user(request: Request) -> str:
    """Who is logged in."""
    session = await pgkv.load_session(request)
    if session.user_id is None:
        raise HTTPException(401)
    return session.user_id


@app.get("/me")
async def me(name: Annotated[str, Depends(user)]) -> str:
    return name


@app.post("/logout")
async def logout(request: Request) -> bool:
    return await sessions.destroy(request.session)


@pgkv.locked("nightly", store=store, on_busy="skip")
async def close_the_day(day: str) -> bool | None:
    """The nightly job: once a day, on one instance; None where another one is at it."""
    if await store.exists(f"closed:{day}"):
        return False
    await asyncio.sleep(0.5)  # the work
    await store.set_ex(f"closed:{day}", "yes", 7 * 86400)
    return True


@app.post("/jobs/nightly/{day}", dependencies=[Depends(user)])
async def nightly(day: dt.date) -> bool | None:
    return await close_the_day(day.isoformat())


def serve(listener: socket.socket) -> None:
    """An instance, as a process of its own. SIGTERM ends it in order."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def see(what: str, found: object, expected: object) -> None:
    """Say what was seen, and end if it is not what was promised."""
    print(f"{what}: {found}")
    if found != expected:
        raise SystemExit(f"that should be {expected}")


async def visit(one: str, two: str) -> None:
    """Visit both instances, as an API client and as a browser."""
    async with httpx.AsyncClient(timeout=60) as client:
        key = {"x-api-key": "key-of-acme"}
        asked = (client.get(f"{at}/quotes/tea", headers=key) for at in [one, two] * 4)
        answers = await asyncio.gather(*asked)
        good = [each.json() for each in answers if each.status_code == 200]
        late = [each.headers for each in answers if each.status_code == 429]
        see("quotes, refusals", (len(good), len(late)), (5, 3))
        print("a refusal says: RateLimit:", late[0]["ratelimit"])
        see("instances that computed", len({each["found_by"] for each in good}), 1)
        see("without a key", (await client.get(f"{one}/quotes/tea")).status_code, 401)

        await client.post(f"{one}/login", json={"name": "ada", "password": "lovelace"})
        see("logged in at the other one", (await client.get(f"{two}/me")).json(), "ada")
        job = "jobs/nightly/2026-02-28"
        started = await asyncio.gather(*(client.post(f"{at}/{job}") for at in (one, two)))
        see("nightly jobs that ran", [each.json() for each in started].count(True), 1)
        see("once more", (await client.post(f"{two}/{job}")).json(), False)
        await client.post(f"{two}/logout")
        see("after the logout", (await client.get(f"{one}/me")).status_code, 401)


def main() -> None:
    """Start two instances, visit them, stop them."""
    spawn = multiprocessing.get_context("spawn")
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    instances = [spawn.Process(target=serve, args=[each]) for each in listeners]
    for instance in instances:
        instance.start()
    try:
        asyncio.run(visit(*(f"http://127.0.0.1:{each.getsockname()[1]}" for each in listeners)))
    finally:
        for instance, listener in zip(instances, listeners, strict=True):
            listener.close()
            instance.terminate()
            instance.join()
        with psycopg.connect(os.environ["PGKV_DSN"], autocommit=True) as conn:
            conn.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
