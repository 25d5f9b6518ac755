"""The application that the tests of ASGI sessions and of the browser visit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

import pgkv
from tests.servers import PATIENCE


class Site:
    """An application of many routes, in Starlette or FastAPI."""

    def __init__(
        self, dsn: str, framework: str = "starlette", touch_interval: float = 60, **options: Any
    ) -> None:
        self.store = pgkv.AsyncStore(pgkv.Config(dsn))
        self.sessions = pgkv.AsyncSessionStore(self.store, touch_interval=touch_interval)
        self.gates: dict[str, threading.Event] = {}
        self.arrived: dict[str, threading.Event] = {}
        routes: list[Any] = [
            Route(f"/{name}", getattr(self, name))
            for name in dir(self)
            if not name.startswith("_") and asyncio.iscoroutinefunction(getattr(self, name))
        ]
        routes += [
            WebSocketRoute("/ws", self._ws),
            Mount(
                "/static",
                routes=[
                    Route("/read", self.read),
                    Route("/plain", self.plain),
                    Route("/load", self.load),
                ],
            ),
        ]
        kind = {"starlette": Starlette, "fastapi": FastAPI}[framework]
        self.app = kind(routes=routes, lifespan=self._lifespan)
        self.app.add_middleware(
            # timeout: the store's, since a busy machine is no outage.
            pgkv.SessionMiddleware,
            sessions=self.sessions,
            **{"secure": False, "timeout": None, **options},
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Any) -> AsyncIterator[None]:
        await self.sessions.create_table()
        yield
        await self.store.close()

    async def plain(self, _request: Request) -> Response:
        return PlainTextResponse("plain")

    async def read(self, request: Request) -> Response:
        return JSONResponse(dict(request.session))

    async def put(self, request: Request) -> Response:
        request.session.update(request.query_params)
        return PlainTextResponse("ok", headers={"Cache-Control": "public, max-age=60"})

    async def drop(self, request: Request) -> Response:
        for key in request.query_params:
            request.session.pop(key, None)
        return PlainTextResponse("ok")

    async def held(self, request: Request) -> Response:
        """Changes the session, then waits: a request that is under way."""
        me = request.query_params["me"]
        request.session[me] = "held"
        self.arrived[me].set()
        await asyncio.to_thread(self.gates[me].wait, PATIENCE)
        return PlainTextResponse("ok")

    async def login(self, request: Request) -> Response:
        own: Any = {"grace": PATIENCE}  # however slow the machine is
        if "days" in request.query_params:
            days = timedelta(days=int(request.query_params["days"]))
            own |= {"idle_timeout": days, "absolute_timeout": 10 * days}
        await self.sessions.rotate(request.session, user_id=request.query_params["user"], **own)
        request.session["role"] = "member"
        return PlainTextResponse("ok")

    async def renew(self, request: Request) -> Response:
        """Changes the token of who is logged in, as after a change of rights."""
        if "role" in request.session:
            await self.sessions.rotate(request.session)
        return PlainTextResponse("ok")

    async def logout(self, request: Request) -> Response:
        await self.sessions.destroy(request.session)
        return PlainTextResponse("bye")

    async def logout_with_a_word(self, request: Request) -> Response:
        await self.sessions.destroy(request.session)
        request.session["flash"] = "bye"
        return PlainTextResponse("bye")

    async def everywhere(self, request: Request) -> Response:
        session = await pgkv.load_session(request)
        ended = await self.sessions.destroy_user(session.user_id or "")
        return PlainTextResponse(str(ended))

    async def clear(self, request: Request) -> Response:
        request.session.clear()
        request.session.update(request.query_params)
        return PlainTextResponse("ok")

    async def fail(self, request: Request) -> Response:
        request.session["failed"] = True
        raise RuntimeError("on purpose")

    async def refuse(self, request: Request) -> Response:
        request.session["refused"] = True
        raise HTTPException(403)

    async def bad(self, request: Request) -> Response:
        request.session["bad"] = object()
        return PlainTextResponse("never sent")

    async def stream(self, request: Request) -> Response:
        request.session["head"] = 1

        async def body() -> AsyncIterator[str]:
            yield "a"
            request.session["body"] = 1
            yield "b"

        return StreamingResponse(body())

    async def background(self, request: Request) -> Response:
        request.session["head"] = 1

        async def task() -> None:
            request.session["task"] = 1

        return PlainTextResponse("ok", background=BackgroundTask(task))

    async def late(self, request: Request) -> Response:
        async def task() -> None:
            request.session["late"] = 1

        return PlainTextResponse("ok", background=BackgroundTask(task))

    async def load(self, request: Request) -> Response:
        session = await pgkv.load_session(request)
        again = await pgkv.load_session(request)
        assert session is again
        request.session["loaded"] = session.is_new
        return JSONResponse(dict(request.session))

    async def _ws(self, socket: WebSocket) -> None:
        socket.session["accepted"] = True
        await socket.accept()
        await socket.send_text(json.dumps(dict(socket.session)))
        socket.session["said"] = await socket.receive_text()
        await socket.close()
