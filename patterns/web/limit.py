"""What all middleware and framework adapters share: whom to charge, and what to answer.

`Guard.check` is a flow, so that callables given by the user may be sync or, in the async adapters,
async. Nothing here knows a framework.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from ... import _observe
from ..._ops.op import Flow, call
from ...errors import ConfigError, PgkvError
from .._runtime.colour import require
from ..rate_limit.flows import Core
from ..rate_limit.options import OnError, check_mode
from ..rate_limit.policy import Decision, HeaderStyle
from ..rate_limit.rate import Rates, rates_of
from .client_ip import client_ip
from .exempt import under

Headers: TypeAlias = "HeaderStyle | None"
Limits: TypeAlias = "Rates | Callable[[Any], Any] | None"
Option: TypeAlias = "Callable[[Any], Any] | None"

PROBLEMS = "https://iana.org/assignments/http-problem-types#"
PROBLEM_TYPE = "application/problem+json"


class HttpRequest(Mapping[str, Any]):
    """A request as key functions see it, the same for ASGI and WSGI.

    It is the scope or environ itself (``request["path"]``), with a few names for what is asked most.

    Attributes:
        scope: the ASGI scope or WSGI environ.
        method: such as ``"GET"``; ``"WEBSOCKET"`` for a handshake.
        path: decoded, without the query.
        client: the peer's address as the server gives it, or None. See `client_ip`.
    """

    __slots__ = ("_headers", "client", "method", "path", "scope")

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self.scope = scope
        self._headers: dict[str, str] | None = None
        if "wsgi.version" in scope:
            self.method: str = scope["REQUEST_METHOD"]
            path = scope.get("PATH_INFO", "").encode("latin-1").decode("utf-8", "replace")
            self.path: str = path or "/"
            self.client: str | None = scope.get("REMOTE_ADDR") or None
        else:
            self.method = scope.get("method", "WEBSOCKET")
            self.path = scope["path"]
            peer = scope.get("client")
            self.client = peer[0] if peer else None

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers by lower-case name; repeated ones are joined by commas."""
        if self._headers is None:
            self._headers = {}
            for name, value in self._pairs():
                known = self._headers.get(name)
                self._headers[name] = value if known is None else f"{known},{value}"
        return self._headers

    def _pairs(self) -> Iterator[tuple[str, str]]:
        if "wsgi.version" not in self.scope:
            for name, value in self.scope["headers"]:
                yield name.decode("latin-1").lower(), value.decode("latin-1")
            return
        for name, value in self.scope.items():
            if name.startswith("HTTP_"):
                yield name[5:].replace("_", "-").lower(), value
            elif name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                yield name.replace("_", "-").lower(), value

    def __getitem__(self, name: str) -> Any:
        return self.scope[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scope)

    def __len__(self) -> int:
        return len(self.scope)


class Verdict(NamedTuple):
    """What is to be done with a request: the decision, and whether to refuse."""

    decision: Decision
    refuse: bool


class Guard:
    """The options of middleware, checked once, and how a request is judged by them.

    Args:
        colour: the class of limiter that the adapter can wait for.
        who: the adapter.
        twin: the adapter for limiters of the other colour.
        limiter: one of that class, or a function of the request that returns one, or None to let
            the request pass.
        key: a function of the request that returns its key, or None to let it pass; a string for
            one bucket for all. Without one, `client_ip()`.
        cost: tokens, or a function of the request; 0 lets it pass.
        limits: rates for this request, or a function of the request; None for the limiter's own.
        exempt: paths (each with all below it), or a function of the request that is true for those
            to let pass.
        headers: ``"draft"``, ``"x"`` or None for no headers.
        on_error: see `RateLimiter`; instead of the limiter's own.
        shadow: decide and log, never refuse.
    """

    def __init__(
        self,
        colour: type[Core],
        who: str,
        twin: str,
        *,
        limiter: Any,
        key: Any = None,
        cost: Any = 1,
        limits: Any = None,
        exempt: Any = None,
        headers: Headers = "draft",
        on_error: OnError = "open",
        shadow: bool = False,
    ) -> None:
        self._colour = colour
        self._names = (who, twin)
        self.limiter = limiter
        if isinstance(limiter, Core) or not callable(limiter):
            self._require_colour(limiter)
        if key is client_ip:
            raise ConfigError("client_ip makes key functions: write key=client_ip()")
        if key is not None and not isinstance(key, str) and not callable(key):
            raise ConfigError(
                f"key must be a str or a function of the request, not {type(key).__name__}"
            )
        self._key = client_ip() if key is None else key
        if not callable(cost) and (type(cost) is not int or cost < 1):
            raise ConfigError(
                f"cost must be an integer of 1 or more, or a function of the request, not {cost!r}"
            )
        self._cost = cost
        self._limits = limits if limits is None or callable(limits) else rates_of(limits)
        self._exempt = exempt
        if exempt is not None and not callable(exempt):
            is_under = under(exempt)
            self._exempt = lambda request: is_under(_path_of(request))
        if headers not in ("draft", "x", None):
            raise ConfigError(f"headers are 'draft', 'x' or None, not {headers!r}")
        self._headers = headers
        self._on_error = check_mode(on_error)
        self._shadow = shadow

    def _require_colour(self, limiter: object) -> None:
        require(limiter, self._colour, *self._names)

    def check(self, request: Any) -> Flow[Verdict | None]:
        """Judge a request. None lets it pass unseen."""
        if self._exempt is not None and (yield from call(self._exempt, request)):
            return None
        limiter = self.limiter
        if not isinstance(limiter, Core):
            limiter = yield from call(limiter, request)
            if limiter is None:
                return None
            self._require_colour(limiter)
        key = self._key
        if callable(key):
            key = yield from call(key, request)
            if key is None:
                return None
        cost = self._cost
        if callable(cost):
            cost = yield from call(cost, request)
            if cost == 0:
                return None
        limits: Rates | None = self._limits
        if callable(self._limits):
            limits = yield from call(self._limits, request)
        decision: Decision = yield from call(limiter._judge, key, cost, limits, self._on_error)
        if self._shadow and not decision.allowed:
            _observe.info(
                "pgkv.limit.shadow",
                limiter=limiter.name,
                rate=str(decision.rate),
                retry_after=round(decision.retry_after, 3),
            )
        return Verdict(decision, not decision.allowed and not self._shadow)

    def headers(self, verdict: Verdict | None) -> dict[str, str]:
        """What to add to the response. In shadow mode nothing tells the client."""
        if verdict is None or self._shadow or self._headers is None:
            return {}
        return verdict.decision.headers(self._headers)

    def refusal(self, verdict: Verdict) -> tuple[dict[str, str], bytes]:
        """Headers and body of the 429."""
        decision = verdict.decision
        found = self.headers(verdict)
        # Also without the other headers: a client that is told nothing comes again at once.
        found["Retry-After"] = decision.headers("x")["Retry-After"]
        found["Content-Type"] = PROBLEM_TYPE
        body = json.dumps(problem(decision)).encode()
        found["Content-Length"] = str(len(body))
        return found, body


@contextlib.contextmanager
def heard_by_servers() -> Iterator[None]:
    """Let a failure of the store reach the HTTP server as one of the application's.

    Raises:
        PgkvError: instead of those that are also a ConnectionError or TimeoutError: servers take
            these for a client that went away, and answer nothing.
    """
    try:
        yield
    except PgkvError as error:
        if not isinstance(error, OSError):
            raise
        raise PgkvError(f"the rate limit could not be checked: {error}") from error


def problem(decision: Decision) -> dict[str, Any]:
    """The problem details (RFC 9457) of a refused request."""
    if decision.degraded:
        return {
            "type": PROBLEMS + "temporary-reduced-capacity",
            "title": "Request cannot be satisfied due to temporary server capacity constraints",
            "status": 429,
        }
    return {
        "type": PROBLEMS + "quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "violated-policies": [decision.policy],
    }


def _path_of(request: Any) -> str:
    if isinstance(request, HttpRequest):
        return request.path
    path: str = getattr(request, "path", None) or request.url.path
    return path


STATUS: Literal[429] = 429
