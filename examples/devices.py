"""A small site with logins: FastAPI, sessions in PostgreSQL, a page "your devices".

    $ PGKV_DSN=postgresql://... python examples/devices.py

It starts the site, visits it with two browsers, and logs one of them out from the other. Without
PGKV_DSN it starts an embedded PostgreSQL.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request

import pgkv

DSN = os.environ.get("PGKV_DSN") or "embedded://" + tempfile.mkdtemp()
PASSWORDS = {"ada": "lovelace"}

store = pgkv.AsyncStore(pgkv.Config(DSN))
sessions = pgkv.AsyncSessionStore(store, idle_timeout=1800)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield
    await store.close()


app = FastAPI(lifespan=lifespan)
# secure=False is for this demonstration: it speaks plain http.
app.add_middleware(pgkv.SessionMiddleware, sessions=sessions, secure=False)


async def user_of(request: Request) -> str:
    session = await pgkv.load_session(request)
    if session.user_id is None:
        raise HTTPException(401)
    return session.user_id


@app.post("/login")
async def login(request: Request, name: str, password: str) -> str:
    if PASSWORDS.get(name) != password:
        raise HTTPException(403)
    request.session["agent"] = request.headers["user-agent"]
    await sessions.rotate(request.session, user_id=name)
    return f"welcome, {name}"


@app.get("/devices")
async def devices(request: Request) -> list[dict[str, Any]]:
    current = (await pgkv.load_session(request)).handle
    return [
        {"handle": each.handle, "idle": round(each.idle()), "this one": each.handle == current}
        for each in await sessions.list_user(await user_of(request))
    ]


@app.post("/devices/{handle}/logout")
async def logout_device(request: Request, handle: str) -> bool:
    return await sessions.destroy_handle(handle, await user_of(request))


def main() -> None:
    """Serve the site and visit it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=address) as laptop, httpx.Client(base_url=address) as phone:
        for browser in (laptop, phone):
            print(browser.post("/login", params={"name": "ada", "password": "lovelace"}).json())
        listed = laptop.get("/devices").json()
        print(f"{len(listed)} devices")
        (other,) = [each["handle"] for each in listed if not each["this one"]]
        print("logged out the other one:", laptop.post(f"/devices/{other}/logout").json())
        print("the phone sees", phone.get("/devices").status_code)
        print("the laptop sees", laptop.get("/devices").status_code)
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main()
