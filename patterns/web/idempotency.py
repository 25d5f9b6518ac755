"""The header ``Idempotency-Key`` (draft-ietf-httpapi-idempotency-key-header-07): `IdempotencyMiddleware`
for ASGI, `WSGIIdempotencyMiddleware`, and what adapters of frameworks share.

A request with a key runs once; a retry gets the stored response. Middleware alone leaves a window: a
process that dies after the effect and before the response is stored has done the work, and the retry does
it again. A route closes it by ``attempt.complete(response, conn)`` in the transaction of the effect.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from http import HTTPStatus
from typing import Any, Generic, NamedTuple, TypeAlias, TypedDict, TypeVar, Unpack

import msgspec

from ..._observe import shown
from ..._ops.codec import seconds
from ..._ops.drivers import drive, drive_async
from ..._ops.op import Flow, call
from ...config import Seconds, require_int
from ...errors import ConfigError, InProgressError, KeyReusedError, SerializationError
from .._runtime.checks import require
from ..idempotency.api import AsyncIdempotency, Idempotency
from .asgi import answer, encoded
from .limit import PROBLEM_TYPE, heard_by_servers
from .request import HttpRequest
from .session import OUTAGES, RETRY_AFTER

K = TypeVar("K")

ATTEMPT = "pgkv.idempotency"  # in scope or environ: the request's attempt
KEY_MAX = 255
BODY_MAX = 1 << 20
# Kept with a response: what the client needs, and nothing of the one who sent it first.
KEPT = ("content-type", "location", "etag", "link")
# Answers that say "later", "again" or "broken": the retry runs.
RELEASED = frozenset((408, 409, 425, 429))


class IdempotencyOptions(TypedDict, total=False):
    """The options of idempotency in front of an application or a route.

    Attributes:
        methods: of the requests that may have a key. Default POST and PATCH.
        required: answer 400 where the header is missing. Default False: such requests just run.
        wait: seconds to wait for another attempt before 409. Default 0.
        max_request: bytes of a request's body, which is read first; 413 beyond. Default 1 MiB.
        max_body: bytes of a response's body that are kept. A larger one is sent, and recorded without its
            body: a retry gets 409. Default 1 MiB.
    """

    methods: Collection[str]
    required: bool
    wait: Seconds
    max_request: int
    max_body: int


class StoredResponse(NamedTuple):
    """A response as it is kept; `body` is None where it was too large."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes | None

    @classmethod
    def of(cls, response: Any, body_max: int) -> StoredResponse:
        """Read the response of a framework: Starlette's, Flask's, Django's, or a stored one."""
        if isinstance(response, cls):
            return response._cut(body_max)
        if not hasattr(response, "status_code"):
            raise SerializationError(f"a {type(response).__name__} is no response that can be kept")
        body = getattr(response, "body", None) or getattr(response, "content", None)
        if hasattr(response, "get_data"):
            body = response.get_data()
        headers = [(name.lower(), value) for name, value in response.headers.items()]
        return cls(response.status_code, headers, None if body is None else bytes(body))._cut(
            body_max
        )

    def _cut(self, body_max: int) -> StoredResponse:
        body = None if self.body is None or len(self.body) > body_max else self.body
        headers = [each for each in self.headers if each[0].lower() in KEPT]
        return StoredResponse(self.status, headers, body)

    def replayed(self) -> StoredResponse:
        """What a retry gets."""
        if self.body is None:
            return refusal(409, "The request was done, but its response was not kept").response
        headers = [*self.headers, ("content-length", str(len(self.body)))]
        return StoredResponse(self.status, [*headers, ("idempotent-replayed", "true")], self.body)

    @property
    def line(self) -> str:
        """The status with its phrase."""
        known = self.status in HTTPStatus._value2member_map_
        return f"{self.status} {HTTPStatus(self.status).phrase if known else 'Unknown'}"


class RefusedRequest(Exception):  # noqa: N818  # not an error: what is answered
    """A request that is answered without running."""

    def __init__(self, response: StoredResponse) -> None:
        self.response = response


def refusal(status: int, title: str, retry_after: int | None = None) -> RefusedRequest:
    """Return what answers with a problem (RFC 9457)."""
    body = json.dumps({"type": "about:blank", "title": title, "status": status}).encode()
    headers = [("content-type", PROBLEM_TYPE), ("content-length", str(len(body)))]
    headers += [("cache-control", "no-store")]
    if retry_after is not None:
        headers.append(("retry-after", str(retry_after)))
    return RefusedRequest(StoredResponse(status, headers, body))


def cut_off() -> RefusedRequest:
    """Return the answer to half a body: by its content the retry would be another request."""
    return refusal(400, "The body ended before its end")


class IdempotentRequests:
    """An adapter's idempotency and options, checked once, and what it asks of a request. `twin` is the
    adapter for an idempotency of the other class."""

    def __init__(
        self,
        kind: type[Any],
        adapter: str,
        twin: str,
        idempotency: Any,
        scope: Callable[[Any], Any] | str,
        options: IdempotencyOptions,
    ) -> None:
        require(idempotency, kind, adapter, twin)
        unknown = set(options) - set(IdempotencyOptions.__annotations__)
        if unknown or not (scope == "" or callable(scope)):
            what = f"no option {min(unknown)!r}" if unknown else "a scope= that is a function or ''"
            raise ConfigError(
                f"{adapter} has {what}: the function of the request returns whose key it is, such as "
                "the user's id"
            )
        self.scope = scope
        self.methods: frozenset[str] = frozenset(
            map(str.upper, options.get("methods", ("POST", "PATCH")))
        )
        self.required: bool = options.get("required", False)
        self.wait: float = seconds(options.get("wait", 0), "wait", zero=True, endless="")
        self.max_request: int = options.get("max_request", BODY_MAX)
        self.max_body: int = options.get("max_body", BODY_MAX)
        require_int("max_request", self.max_request, 0, 1 << 30)
        require_int("max_body", self.max_body, 0, idempotency._flows.size_max - 4096)
        self.responses: Any = idempotency._view(self)

    # As a codec of results

    def encode(self, _key: str, value: Any) -> bytes:
        """Return a response's bytes."""
        return msgspec.msgpack.encode(StoredResponse.of(value, self.max_body))

    def decode(self, _key: str, raw: bytes) -> StoredResponse:
        """Return a stored response."""
        return msgspec.msgpack.decode(raw, type=StoredResponse)

    # Of a request

    def claim(
        self,
        request: HttpRequest,
        read: Callable[[], Any],
        enter: Callable[[Any], Any],
        given: Any = None,
    ) -> Flow[Any]:
        """Return the attempt of a request; None where it has no key, and needs none.

        `read` returns its body, `enter` enters the attempt's block, and `given` is what the function for
        the scope gets.

        Raises:
            RefusedRequest: the request is answered without running.
        """
        if ATTEMPT in request.scope or (key := self._key(request)) is None:
            return None
        body = yield from call(read)
        if len(body) > self.max_request:
            raise refusal(413, f"The body is larger than {self.max_request} bytes")
        scope = self.scope
        if callable(scope):
            scope = yield from call(scope, request if given is None else given)
        query = request.scope.get("query_string", request.scope.get("QUERY_STRING", ""))
        content_type = request.headers.get("content-type", "")
        digest = hashlib.sha256()
        for part in (request.method, request.path, query, content_type, body):
            raw = part if isinstance(part, bytes) else part.encode()
            digest.update(b"%d:%s" % (len(raw), raw))
        block = self.responses.once(
            key, fingerprint=digest.digest(), scope=str(scope), wait=self.wait
        )
        try:
            attempt = yield from call(enter, block)
        except InProgressError:
            raise refusal(409, "A request with this Idempotency-Key is in progress", 1) from None
        except KeyReusedError:
            raise refusal(422, "This Idempotency-Key was used with another request") from None
        except OUTAGES:
            raise refusal(503, "Service Unavailable", RETRY_AFTER) from None
        if attempt.is_replay:
            raise RefusedRequest(attempt.result.replayed())
        attempt._dropped = True  # until there is a whole response
        request.scope[ATTEMPT] = attempt  # type: ignore[index]  # a scope or environ is a dict
        return attempt

    def _key(self, request: HttpRequest) -> str | None:
        if request.method not in self.methods:
            return None
        given = request.headers.get("idempotency-key")
        if given is None:
            if self.required:
                raise refusal(400, "The header Idempotency-Key is missing")
            return None
        key = given.strip()
        if len(key) > 1 and key[0] == key[-1] == '"':
            key = key[1:-1]
        if not 1 <= len(key) <= KEY_MAX or not all(" " <= each <= "~" for each in key):
            raise refusal(400, "Idempotency-Key must be 1 to 255 printable ASCII characters")
        return key

    def give(self, attempt: Any, response: StoredResponse) -> None:
        """Store that response at the block's end, unless a route has completed the attempt: or let the
        next attempt run."""
        attempt._dropped = response.status in RELEASED or response.status >= 500
        if not attempt._completed:
            attempt.result = response

    def run(self, *given: Any) -> Any:
        """Run a view of a framework, or answer without it; as of `_run`."""
        with ExitStack() as stack:
            return drive(self._run(stack.enter_context, *given))

    async def run_async(self, *given: Any) -> Any:
        """Run an async view; see `run`."""
        async with AsyncExitStack() as stack:
            return await drive_async(self._run(stack.enter_async_context, *given))

    def _run(
        self,
        enter: Callable[[Any], Any],
        scope: Any,
        read: Callable[[], Any],
        request: Any,
        view: Callable[[], Any],
        make: Callable[[bytes | None, int, dict[str, str]], Any],
    ) -> Flow[Any]:
        """Run the view, or `make` the response without it. `scope` is the request's ASGI scope or WSGI
        environ, and `read` returns its body."""
        try:
            attempt = yield from self.claim(HttpRequest(scope), read, enter, request)
        except RefusedRequest as refused:
            status, headers, body = refused.response
            return make(body, status, dict(headers))
        response = yield from call(view)
        if attempt is not None:
            self.give(attempt, StoredResponse.of(response, self.max_body))
        return response


def idempotent_attempt(request: Any) -> Any:
    """Return the attempt of a request, for ``attempt.complete(response, conn)``; None where it has no
    key, or there is no middleware.

    Args:
        request: a request of any framework, an ASGI scope or a WSGI environ.
    """
    for name in ("scope", "environ", "META"):
        request = getattr(request, name, request)
    return request.get(ATTEMPT)


class _Middleware(Generic[K]):
    """What both have in common."""

    _names: tuple[type[Any], str, str]  # its class of idempotency, its name, and its twin's

    def __init__(
        self,
        app: Any,
        *,
        idempotency: K,
        scope: Callable[[Any], Any] | str,
        **options: Unpack[IdempotencyOptions],
    ) -> None:
        self.app = app
        self._requests = IdempotentRequests(*self._names, idempotency, scope, options)

    @shown
    def __repr__(self) -> str:
        return repr(self._requests.responses)


# -- ASGI ------------------------------------------------------------------------------------


class IdempotencyMiddleware(_Middleware[AsyncIdempotency[Any]]):
    """Run a request with an ``Idempotency-Key`` once: ``app.add_middleware(IdempotencyMiddleware, ...)``.

    A retry gets the stored status, body, Content-Type, Location, ETag and Link, with
    ``Idempotent-Replayed: true``; never a cookie. It is stored before the last byte is sent. While the first
    runs a retry gets 409, with another content 422. Responses of 408, 409, 425, 429 and from 500 on are
    not stored: the retry runs. When the database does not answer: 503.

    **The window**: a process that dies after the effect and before the response is stored lets the retry
    do it again. A route closes it by ``await idempotent_attempt(request).complete(response, conn)`` in the
    transaction of its effect.

    Args:
        app: the ASGI application.
        idempotency: an `AsyncIdempotency`.
        scope: a function of the request that returns whose key it is, such as the user's id; ``""`` for an
            application with one user. Without it one user could be handed the response of another.
        options: `methods`, `required`, `wait`, `max_request` and `max_body`: see
            :class:`~pgkv.patterns.web.idempotency.IdempotencyOptions`.

    Raises:
        ConfigError: a setting is wrong, or the idempotency is not async.
    """

    _names = AsyncIdempotency, "IdempotencyMiddleware", "WSGIIdempotencyMiddleware"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: list[Any] = []
        read = partial(_read, receive, messages, self._requests.max_request)
        async with AsyncExitStack() as stack:
            try:
                flow = self._requests.claim(HttpRequest(scope), read, stack.enter_async_context)
                attempt = await drive_async(flow)
            except RefusedRequest as refused:
                status, headers, body = refused.response
                await answer(scope, send, status, encoded(headers), body or b"")
                return

            async def receive_again() -> Any:
                return messages.pop(0) if messages else await receive()

            if attempt is not None:
                send = _ASGIResponse(self._requests, attempt, stack, send).send
            await self.app(scope, receive_again, send)


async def _read(receive: Any, messages: list[Any], size_max: int) -> bytes:
    """Read the body. Its messages are kept for the application."""
    parts, size = [], 0
    while size <= size_max:
        messages.append(await receive())
        if messages[-1]["type"] == "http.disconnect":
            raise cut_off()
        parts.append(messages[-1].get("body", b""))
        size += len(parts[-1])
        if not messages[-1].get("more_body"):
            break
    return b"".join(parts)


class _ASGIResponse:
    """A response on its way: its last message is held back until it is stored."""

    def __init__(
        self, requests: IdempotentRequests, attempt: Any, stack: AsyncExitStack, send: Any
    ) -> None:
        self._requests, self._attempt, self._stack, self._send = requests, attempt, stack, send
        self._head: Any = None
        self._held: list[Any] = []
        self._body: bytes | None = b""

    async def send(self, message: Any) -> None:
        self._held.append(message)
        if message["type"] == "http.response.start":
            self._head = message
            return
        if message["type"] == "http.response.body":
            if self._body is not None:
                self._body += message.get("body", b"")
                if len(self._body) > self._requests.max_body:
                    self._body = None
            if not message.get("more_body"):
                found = self._head.get("headers", ())
                headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in found]
                stored = StoredResponse(self._head["status"], headers, self._body)
                self._requests.give(self._attempt, stored)
                with heard_by_servers("the response could not be stored"):
                    await self._stack.aclose()
        while self._held:
            await self._send(self._held.pop(0))


# -- WSGI ------------------------------------------------------------------------------------

Environ: TypeAlias = "dict[str, Any]"


class WSGIIdempotencyMiddleware(_Middleware[Idempotency[Any]]):
    """:class:`IdempotencyMiddleware` for WSGI: ``app.wsgi_app = WSGIIdempotencyMiddleware(app.wsgi_app,
    ...)``.

    Args:
        app: the WSGI application.
        idempotency: an `Idempotency`.
        scope: a function of the request that returns whose key it is, or ``""``.
        options: `methods`, `required`, `wait`, `max_request` and `max_body`: see
            :class:`~pgkv.patterns.web.idempotency.IdempotencyOptions`.

    Raises:
        ConfigError: a setting is wrong, or the idempotency is async.
    """

    _names = Idempotency, "WSGIIdempotencyMiddleware", "IdempotencyMiddleware"

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        """Serve one request."""
        with ExitStack() as stack:
            try:
                read = partial(_read_input, environ, self._requests.max_request)
                flow = self._requests.claim(HttpRequest(environ), read, stack.enter_context)
                attempt = drive(flow)
            except RefusedRequest as refused:
                response = refused.response
                start_response(response.line, [(n.title(), v) for n, v in response.headers])
                return [response.body or b""]
            if attempt is None:
                return self.app(environ, start_response)  # type: ignore[no-any-return]  # the app's
            answer = self._answer(stack.pop_all(), attempt, environ, start_response)
            # Run to the first chunk: a server that reads none of it ends the attempt all the same.
            return itertools.chain((next(answer),), answer)
        raise AssertionError

    def _answer(
        self, stack: ExitStack, attempt: Any, environ: Environ, start_response: Any
    ) -> Iterator[bytes]:
        """Run the application; one chunk is held back, so that the last is sent when all is stored."""
        head: list[Any] = []
        written: list[bytes] = []

        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            head[:] = [status, headers, *([exc_info] if exc_info else [])]
            return written.append

        kept: bytes | None = b""
        held: bytes | None = None
        is_first = True
        with stack:
            body = self.app(environ, start)
            try:
                for chunk in itertools.chain(body, (b"",)):
                    chunk = b"".join(written) + chunk  # of a write() before it
                    written.clear()
                    if held is not None and chunk:
                        if is_first:
                            start_response(*head)
                            is_first = False
                        yield held
                    held = chunk or held
                    if kept is not None:
                        kept = kept + chunk if len(kept) <= self._requests.max_body else None
            except GeneratorExit:  # the client has gone; the work is done
                kept, held = None, None
                is_first = False
            finally:
                if hasattr(body, "close"):
                    body.close()
            stored = StoredResponse(int(head[0][:3]), list(head[1]), kept)
            self._requests.give(attempt, stored)
            with heard_by_servers("the response could not be stored"):
                stack.close()
        if is_first:
            start_response(*head)
            yield held or b""
        elif held is not None:
            yield held


def _read_input(environ: Environ, size_max: int) -> bytes:
    """Read the body, and give it back to the application."""
    length = environ.get("CONTENT_LENGTH") or ""
    size = int(length) if length.isdigit() else size_max + 1
    if not length and not environ.get("wsgi.input_terminated"):
        size = 0  # such a server has nothing to read, or would wait for ever
    body: bytes = environ["wsgi.input"].read(min(size, size_max + 1))
    if length and len(body) < min(size, size_max + 1):
        raise cut_off()
    environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(body), str(len(body))
    return body
