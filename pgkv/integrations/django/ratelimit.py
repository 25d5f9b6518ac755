"""Rate limits per view for Django: `ratelimit`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, cast

from asgiref.sync import iscoroutinefunction
from django.http import HttpResponse

from ..._ops.drivers import drive, drive_async
from ..._ops.op import Flow, call
from ...patterns.rate_limit.api import AsyncRateLimiter, RateLimiter
from ...patterns.web.limit import STATUS, Guard, LimitOptions

__all__ = ["ratelimit"]

_NAME = "pgkv.integrations.django.ratelimit.ratelimit"
View = TypeVar("View", bound=Callable[..., Any])


def ratelimit(limiter: Any, **options: Unpack[LimitOptions]) -> Callable[[View], View]:
    """Return a decorator that limits a view::

        @ratelimit(limiter)
        def search(request): ...

    A refused request gets 429 with ``Retry-After`` and a problem+json body; the view is not called.
    Functions get Django's `HttpRequest`. Around a method of a class use Django's
    ``method_decorator``.

    Args:
        limiter: a :class:`RateLimiter`, or an :class:`AsyncRateLimiter` where the view is async; or a
            function of the request that returns one, or None to let the request pass.
        options: `key`, `cost`, `limits`, `exempt`, `headers`, `on_error` and `shadow`: see
            :class:`~pgkv.patterns.web.limit.LimitOptions`.

    Raises:
        ConfigError: a setting is wrong, or the limiter is of the wrong kind for the view.
    """

    def decorate(view: View) -> View:
        is_async = iscoroutinefunction(view)
        kind: Any = AsyncRateLimiter if is_async else RateLimiter
        guard = Guard(
            kind, f"{_NAME} of this view", f"{_NAME} of the other kind of view", limiter, options
        )

        def flow(request: Any, answer: Callable[[], Any]) -> Flow[Any]:
            decision = yield from guard.check(request)
            if decision is not None and not decision.allowed:
                headers, body = guard.refusal(request, decision)
                return HttpResponse(body, status=STATUS, headers=headers)
            response = yield from call(answer)
            if decision is not None:
                for name, value in guard.headers(request).items():
                    response[name] = value
            return response

        @functools.wraps(view)
        def limited(request: Any, *args: Any, **kwargs: Any) -> Any:
            return drive(flow(request, functools.partial(view, request, *args, **kwargs)))

        @functools.wraps(view)
        async def limited_async(request: Any, *args: Any, **kwargs: Any) -> Any:
            answer = functools.partial(view, request, *args, **kwargs)
            return await drive_async(flow(request, answer))

        return cast("View", limited_async if is_async else limited)

    return decorate
