"""The common part of rate limiting middleware and framework adapters: the key to charge, and the
response.

`Guard.check` is a flow, so that functions given by the user may be sync or, in the async adapters,
async. Nothing here knows a framework.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar, Unpack

import msgspec

from ... import _observe
from ..._observe import shown
from ..._ops.op import Flow, call
from ...errors import ConfigError, PgkvError
from .._runtime.checks import require
from ..rate_limit.flows import OnError, check_mode
from ..rate_limit.policy import Decision, HeaderStyle
from ..rate_limit.rate import Rates, rates_of
from .client_ip import client_ip
from .request import Exempt, exemption, path_of, scope_of

A = TypeVar("A")
L = TypeVar("L")

Headers: TypeAlias = "HeaderStyle | None"
Limits: TypeAlias = "Rates | Callable[[Any], Any] | None"

PROBLEMS = "https://iana.org/assignments/http-problem-types#"
PROBLEM_TYPE = "application/problem+json"
STATUS: Literal[429] = 429
DECISIONS = "pgkv.rate_limit"  # in scope or environ: what the limits of a request decided


class LimitOptions(TypedDict, total=False):
    """The options of a rate limit in front of an application or a route, besides its limiter.

    The functions get the request: a mapping with ``headers``, ``path``, ``method`` and ``client``
    in middleware, the framework's own object in the adapters of FastAPI and Flask. In the async
    adapters they may be async.

    Attributes:
        key: a function of the request that returns its key, or None to let it pass; a string for
            one bucket for all. Without one: :func:`client_ip` with no trusted proxy.
        cost: tokens, or a function of the request; 0 lets it pass. Default 1.
        limits: rates that replace the limiter's, or a function of the request, such as a user's
            plan.
        exempt: paths within the application (each with all below it), or a function that is true
            for requests to let pass.
        headers: ``"draft"`` (the default), ``"x"`` or None; see :meth:`Decision.headers`. Where
            several limits judge one request, the response shows the strictest.
        on_error: when the store does not answer: ``"open"`` (the default) lets the request pass,
            ``"closed"`` refuses it (use it for logins), ``"raise"`` makes it a server error.
        shadow: decide, count and log ``pgkv.limit.shadow``, but never refuse nor add headers: to
            try a limit on live traffic.
    """

    key: Callable[[Any], Any] | str | None
    cost: Callable[[Any], Any] | int
    limits: Limits
    exempt: Exempt
    headers: Headers
    on_error: OnError
    shadow: bool


class Guard:
    """Judges requests by a limiter (or a function that returns one) and an adapter's options, which are
    checked once. `twin` is the adapter for limiters of the other class."""

    def __init__(
        self,
        limiter_class: type[Any],
        adapter: str,
        twin: str,
        limiter: Any,
        options: LimitOptions,
    ) -> None:
        for name in options:
            if name not in LimitOptions.__annotations__:
                known = ", ".join(LimitOptions.__annotations__)
                raise ConfigError(f"{adapter} has no option {name!r}; there are {known}")
        self._limiter_class = limiter_class
        self._names = (adapter, twin)
        self.limiter = limiter
        self._is_chosen = callable(limiter)  # for each request
        if not self._is_chosen:
            self._require(limiter)
        key = options.get("key")
        if key is client_ip:
            raise ConfigError("client_ip makes key functions: write key=client_ip()")
        if key is not None and not isinstance(key, str) and not callable(key):
            raise ConfigError(
                f"key must be a str or a function of the request, not {type(key).__name__}"
            )
        self._key = client_ip() if key is None else key
        cost = options.get("cost", 1)
        if not callable(cost) and (type(cost) is not int or cost < 1):
            raise ConfigError(
                f"cost must be an integer of 1 or more, or a function of the request, not {cost!r}"
            )
        self._cost = cost
        limits = options.get("limits")
        self._limits = limits if limits is None or callable(limits) else rates_of(limits)
        self._exempt = self._exempt_of(options.get("exempt"))
        headers = options.get("headers", "draft")
        if headers not in ("draft", "x", None):
            raise ConfigError(f"headers are 'draft', 'x' or None, not {headers!r}")
        self._headers = headers
        self._on_error = check_mode(options.get("on_error", "open"))
        self._shadow = options.get("shadow", False)

    @staticmethod
    def _exempt_of(exempt: Exempt) -> Callable[[Any], Any] | None:
        if exempt is None or callable(exempt):
            return exempt
        is_exempt = exemption(exempt)
        return lambda request: is_exempt(request, path_of(scope_of(request)))

    def _require(self, limiter: object) -> None:
        require(limiter, self._limiter_class, *self._names)

    def check(self, request: Any) -> Flow[Decision | None]:
        """Judge a request. None lets it pass unseen: it has no limit, or in shadow mode."""
        if self._exempt is not None and (yield from call(self._exempt, request)):
            return None
        limiter = self.limiter
        if self._is_chosen:
            limiter = yield from call(limiter, request)
            if limiter is None:
                return None
            self._require(limiter)
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
        limits: Any = self._limits
        if callable(limits):
            limits = yield from call(limits, request)
        decision: Decision = yield from call(limiter._judge, key, cost, limits, self._on_error)
        if not self._shadow:
            scope_of(request).setdefault(DECISIONS, []).append(decision)
            return decision
        if not decision.allowed and (refused := limiter._flows.counter.shadows.due(monotonic())):
            _observe.info(
                "pgkv.limit.shadow",
                limiter=limiter.name,
                rate=str(decision.rate),
                retry_after=round(decision.retry_after, 3),
                refused=refused,
            )
        return None

    def headers(self, request: Any) -> dict[str, str]:
        """The headers of the response to a request that was judged, by all limits that have done so.
        They replace headers of the same names."""
        if self._headers is None:
            return {}
        return strictest(scope_of(request)[DECISIONS]).headers(self._headers)

    def refusal(self, request: Any, decision: Decision) -> tuple[dict[str, str], bytes]:
        found = self.headers(request)
        # Also without the other headers: a client without Retry-After tries again at once.
        found["Retry-After"] = decision.headers("x")["Retry-After"]
        found["Content-Type"] = PROBLEM_TYPE
        body = json.dumps(problem(decision)).encode()
        found["Content-Length"] = str(len(body))
        return found, body


class LimitAdapter(Generic[A, L]):
    """What the middleware of ASGI and that of WSGI have in common."""

    _names: tuple[type[Any], str, str]  # its class of limiters, its name, and its twin's

    def __init__(
        self, app: A, *, limiter: L | Callable[[Any], Any], **options: Unpack[LimitOptions]
    ) -> None:
        self.app = app
        self._guard = Guard(*self._names, limiter, options)

    @shown
    def __repr__(self) -> str:
        return f"limiter={self._guard.limiter!r}"


def strictest(decisions: Sequence[Decision]) -> Decision:
    """Return the decision that a response shows: a denial, else the one with the smallest share of
    tokens left. It lists the policies of all of them."""
    known = [each for each in decisions if not each.degraded] or decisions
    shown = min(known, key=lambda each: (each.allowed, each.remaining / each.limit))
    policies = ",".join(dict.fromkeys(each.policies for each in known))
    return msgspec.structs.replace(shown, policies=policies)


@contextlib.contextmanager
def heard_by_servers(failed: str = "the rate limit could not be checked") -> Iterator[None]:
    """Let a failure of the store reach the HTTP server as an error of the application. Servers treat
    a ConnectionError or TimeoutError as a client that disconnected, and send no response."""
    try:
        yield
    except PgkvError as error:
        if not isinstance(error, OSError):
            raise
        raise PgkvError(f"{failed}: {error}") from error


def problem(decision: Decision) -> dict[str, Any]:
    """The problem details (RFC 9457) of a refused request."""
    if decision.degraded:
        return {
            "type": PROBLEMS + "temporary-reduced-capacity",
            "title": "Request cannot be satisfied due to temporary server capacity constraints",
            "status": STATUS,
        }
    return {
        "type": PROBLEMS + "quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": STATUS,
        "violated-policies": [decision.policy],
    }
