"""Rate limits per view for Django: `ratelimit`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, cast

from asgiref.sync import iscoroutinefunction
from django.http import HttpResponse

from ..._ops.drivers import drive, drive_async
from ...patterns.rate_limit.api import AsyncRateLimiter, RateLimiter
from ...patterns.web.limit import STATUS, Guard, LimitOptions, Verdict

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

        def refused(request: Any, verdict: Verdict | None) -> HttpResponse | None:
            if verdict is None or not verdict.refuse:
                return None
            headers, body = guard.refusal(request, verdict)
            return HttpResponse(body, status=STATUS, headers=headers)

        def shown(request: Any, response: Any, verdict: Verdict | None) -> Any:
            if guard.is_shown(verdict):
                for name, value in guard.headers(request).items():
                    response[name] = value
            return response

        if is_async:

            @functools.wraps(view)
            async def limited(request: Any, *args: Any, **kwargs: Any) -> Any:
                verdict = await drive_async(guard.check(request))
                return refused(request, verdict) or shown(
                    request, await view(request, *args, **kwargs), verdict
                )

        else:

            @functools.wraps(view)
            def limited(request: Any, *args: Any, **kwargs: Any) -> Any:
                verdict = drive(guard.check(request))
                return refused(request, verdict) or shown(
                    request, view(request, *args, **kwargs), verdict
                )

        return cast("View", limited)

    return decorate
